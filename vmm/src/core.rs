//! What a machine's threads share: KVM's machine, RAM, the devices behind their lock; and the timer thread.
//!
//! The device lock is held for the length of one access, and by a cut while it captures. Nobody waits for anything else while
//! holding it.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_ioctls::VmFd;
use understudy_protocol::ids::Generation;

use crate::devices::{Action, VmTime};
use crate::hardware::{Asked, Env, Hardware};
use crate::memory::Ram;
use crate::net::nic::Nic;
use crate::port::Port;
use crate::vcpus::Exits;

/// Something that whoever owns the machine has to act upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// A board belongs to a newer generation.
    Fenced(Generation),
    /// KVM cannot run the machine any further.
    Broken(String),
    /// The guest is off and there is no use for the process any more.
    Ended,
    /// Somebody asked for the end over the control socket.
    Quit,
}

/// Counts the times that output begins to wait for a cut, and wakes whoever waits for that.
#[derive(Debug, Default)]
pub struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    /// Output begins to wait.
    pub fn ring(&self) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.rung.notify_all();
    }

    /// Until it has rung more often than `seen` times, at most `timeout`; how often it has rung.
    pub fn wait(&self, seen: u64, timeout: Duration) -> u64 {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        *self.rung.wait_timeout_while(rings, timeout, |n| *n <= seen).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// See the module.
pub struct Core {
    /// The machine's name.
    pub machine: String,
    /// The machine in KVM.
    pub vm: VmFd,
    /// Guest RAM.
    pub ram: Ram,
    /// Reading KVM's dirty log does not clear it ([`crate::sys::manual_dirty_log`]).
    pub manual_log: bool,
    /// Rings when output begins to wait.
    bell: Arc<Bell>,
    /// Why this host cannot lock pages, once that was tried in vain ([`crate::capture::lock::Locker::new`]).
    pub cannot_lock: OnceLock<String>,
    hardware: Mutex<Hardware>,
    /// Something happened that may concern the timer: an earlier deadline, thaw, end.
    timer: Condvar,
    events: Mutex<Sender<Event>>,
}

impl Core {
    /// Put the parts together.
    pub fn new(
        machine: String,
        vm: VmFd,
        ram: Ram,
        manual_log: bool,
        hardware: Hardware,
        events: Sender<Event>,
    ) -> Self {
        let bell = hardware.bell.clone();
        let (hardware, events) = (Mutex::new(hardware), Mutex::new(events));
        let cannot_lock = OnceLock::new();
        Self { machine, vm, ram, manual_log, bell, cannot_lock, hardware, timer: Condvar::new(), events }
    }

    /// Wait until output waits that no cut covers and the caller has not heard of; at most `timeout`.
    pub fn await_output(&self, seen: u64, timeout: Duration) -> u64 {
        self.bell.wait(seen, timeout)
    }

    /// The devices, frozen or not.
    pub fn hardware(&self) -> MutexGuard<'_, Hardware> {
        self.hardware.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What surrounds the devices.
    pub fn env(&self) -> Env<'_> {
        Env { vm: &self.vm, ram: &self.ram.mem }
    }

    /// Do something with a port's stream and input queue; `None` if there is no such port.
    pub fn with_port<R>(&self, port: usize, f: impl FnOnce(&mut Port) -> R) -> Option<R> {
        self.hardware().ports_mut().nth(port).map(f)
    }

    /// Do something with a network card; `None` if there is no such card.
    pub fn with_nic<R>(&self, nic: usize, f: impl FnOnce(&mut Nic) -> R) -> Option<R> {
        self.hardware().nics.get_mut(nic).map(f)
    }

    /// Packets arrived for a network card, by this pair of its queues; left are buffers to be used again. False: it takes no more now.
    pub fn arrived(&self, nic: usize, pair: u16, packets: &mut Vec<Vec<u8>>) -> bool {
        let mut hardware = self.hardware();
        if let Some(nic) = hardware.nics.get_mut(nic) {
            nic.arrived(pair, packets.drain(..));
        }
        if !hardware.frozen {
            hardware.settle(self.env());
            self.arm(&mut hardware);
        }
        let Some(nic) = hardware.nics.get_mut(nic) else { return false };
        *packets = nic.taken();
        nic.has_room(pair)
    }

    /// By a card's worker: some of what the guest has sent goes into the gate. False: there is no more now, or somebody else sees to it.
    pub fn take_deferred(&self, nic: usize) -> bool {
        let mut hardware = self.hardware();
        // After the thaw it is woken again.
        if hardware.frozen {
            return false;
        }
        let some = hardware.take_deferred(nic, self.env());
        if some {
            self.arm(&mut hardware);
        }
        some
    }

    /// Something outside has changed; let the devices see it (unless they are frozen: then the thaw does).
    pub fn settle(&self) {
        let mut hardware = self.hardware();
        if !hardware.frozen {
            hardware.settle(self.env());
            self.arm(&mut hardware);
        }
    }

    /// Devices work again.
    pub fn thaw(&self, hardware: &mut Hardware) {
        hardware.thaw(self.env());
        self.timer.notify_all();
    }

    /// Leave an event for the machine's owner.
    pub fn tell(&self, event: Event) {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = events.send(event);
    }

    /// Start the thread that ticks the devices at their deadlines. It ends with the core.
    pub fn start_timer(self: &Arc<Self>) -> Result<()> {
        let weak = Arc::downgrade(self);
        std::thread::Builder::new()
            .name("timer".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                // A byte on the line, a timer's interrupt: the guest waits for it, and so may an output.
                understudy_protocol::urgent::this_thread();
                while let Some(core) = weak.upgrade() {
                    core.timer_round();
                }
            })
            .context("cannot start the timer thread")?;
        Ok(())
    }

    /// Tick what is due, then wait for the next deadline or news (at most a while, to notice the end).
    fn timer_round(&self) {
        const AT_MOST: Duration = Duration::from_millis(200);
        let mut hardware = self.hardware();
        let mut wait = AT_MOST;
        if !hardware.frozen && hardware.stopwatch.runs() {
            let due = |h: &Hardware| h.deadline().is_some_and(|d: VmTime| d <= h.stopwatch.now());
            if due(&hardware) {
                let action = hardware.tick(self.env());
                self.ask(&mut hardware, action);
            }
            if let Some(at) = hardware.deadline().and_then(|d| hardware.stopwatch.instant_of(d)) {
                wait = wait.min(at.saturating_duration_since(Instant::now()));
            }
            hardware.armed = Some(hardware.stopwatch.now().plus(wait.as_nanos() as u64));
        } else {
            hardware.armed = None;
        }
        if wait > Duration::ZERO {
            let _ = self.timer.wait_timeout(hardware, wait);
        }
    }

    /// The guest, or its watchdog, wants something of the machine's owner.
    fn ask(&self, hardware: &mut Hardware, what: Action) {
        let (asked, event) = match what {
            Action::None => return,
            Action::Reset => (Asked::Reset, Event::Reset),
            Action::PowerOff => (Asked::PowerOff, Event::PowerOff),
        };
        // Several vCPUs may ask; once is enough.
        if hardware.asked.is_none() {
            hardware.asked = Some(asked);
            self.tell(event);
        }
    }

    /// The devices have worked: wake the timer if one wants to be ticked before it wakes by itself. (To wake it every time would cost a request more than
    /// the rest of its way.)
    fn arm(&self, hardware: &mut Hardware) {
        if let Some(deadline) = hardware.deadline()
            && hardware.armed.is_some_and(|armed| deadline < armed)
        {
            hardware.armed = Some(deadline);
            self.timer.notify_all();
        }
    }

    /// An exit is over: who has to be woken for it wakes without the lock.
    fn after_exit(&self, mut hardware: MutexGuard<'_, Hardware>) {
        self.arm(&mut hardware);
        let wakes = hardware.late_wakes();
        drop(hardware);
        wakes.for_each(|port| port.wake(0));
    }
}

impl Exits for Core {
    fn io(&self, port: u16, write: bool, data: &mut [u8]) -> Action {
        let mut hardware = self.hardware();
        let action = hardware.io(port, write, data, self.env());
        self.after_exit(hardware);
        action
    }

    fn mmio(&self, addr: u64, write: bool, data: &mut [u8]) -> Action {
        let mut hardware = self.hardware();
        let action = hardware.mmio(addr, write, data, self.env());
        self.after_exit(hardware);
        action
    }

    fn asks(&self, what: Action) {
        if what != Action::None {
            self.ask(&mut self.hardware(), what);
        }
    }

    fn broken(&self, vcpu: usize, why: String) {
        self.tell(Event::Broken(format!("vCPU {vcpu}: {why}")));
    }
}
