//! The vCPU threads: one a vCPU, running guest code or parked.
//!
//! ```text
//!            run_all                      exit: port, MMIO → Exits, on this thread
//!  parked ────────────► running ──┐
//!    ▲  ▲                  │      └─ stop flag + kick, or the guest asked for reset/power-off
//!    │  └── task ──┐       ▼
//!    │   (state    │   complete pending I/O (KVM_RUN with immediate_exit), report parked
//!    └─────────────┴───────┘
//! ```
//! Stopping signals *all* vCPUs and then waits for *all*: the cost is that of the slowest, not the sum. Everything that touches a
//! vCPU's state runs as a task on its own thread, while it is parked.
//!
//! Whoever stops vCPUs waits for their threads; so it lifts them over whatever else is in the queues of their processors
//! ([`Standing::lift`]), once they have been told to stop. They step back before they enter the guest again.
//!
//! Every entry into `KVM_RUN` and every return is counted ([`Vcpus::touch`]), and a throttled machine's vCPUs nap for a share of every
//! [`PERIOD`] ([`Vcpus::throttle`]).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::VcpuFd;
use understudy_protocol::urgent::Standing;

use crate::devices::Action;
use crate::sys::{self, Exit, Kick};

/// What happens on the vCPUs' threads when a guest leaves guest mode. Called by several threads at once.
pub trait Exits: Send + Sync + 'static {
    /// Port I/O: `data` is one access, written or to be filled.
    fn io(&self, port: u16, write: bool, data: &mut [u8]) -> Action;
    /// Memory-mapped I/O.
    fn mmio(&self, addr: u64, write: bool, data: &mut [u8]) -> Action;
    /// The guest asks for a reset or power-off; the vCPU is parked from now on.
    fn asks(&self, what: Action);
    /// KVM cannot go on with this vCPU; it is parked from now on.
    fn broken(&self, vcpu: usize, why: String);
}

type Task = Box<dyn FnOnce(&mut VcpuFd) + Send>;

enum Order {
    Run,
    Task(Task),
    End,
}

/// A throttled vCPU runs for a share of each such stretch.
pub const PERIOD: Duration = Duration::from_millis(10);

struct Shared {
    stop: AtomicBool,
    running: Mutex<usize>,
    all_parked: Condvar,
    /// Share of the time that the vCPUs run, percent.
    share: AtomicU8,
    /// Until when they nap, ns after `start`.
    nap_until: AtomicU64,
    start: Instant,
    napping: Mutex<()>,
    nap_over: Condvar,
    /// Somebody waits for vCPUs to leave `KVM_RUN`.
    touching: AtomicBool,
    left: Mutex<()>,
    has_left: Condvar,
}

impl Shared {
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// Nap, if it is time to; a stop ends it.
    fn nap(&self) {
        let until = self.nap_until.load(Ordering::Relaxed);
        if until <= self.now() {
            return;
        }
        let mut napping = self.napping.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let rest = until.saturating_sub(self.now());
            if rest == 0 || self.stop.load(Ordering::SeqCst) {
                return;
            }
            let waited = self.nap_over.wait_timeout(napping, Duration::from_nanos(rest));
            napping = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct Handle {
    kick: Arc<Kick>,
    standing: Arc<Standing>,
    orders: Sender<Order>,
    /// Odd while the thread is inside of `KVM_RUN`.
    entries: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of a machine.
pub struct Vcpus {
    shared: Arc<Shared>,
    handles: Vec<Handle>,
    throttler: Mutex<Option<JoinHandle<()>>>,
}

/// A vCPU thread that panics must not leave `Kick`s behind that point into its unmapped `kvm_run`.
struct AbortOnPanic;
impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Vcpus {
    /// Start the threads; the vCPUs are parked.
    pub fn start(fds: Vec<VcpuFd>, exits: &Arc<impl Exits>) -> Result<Self> {
        sys::install_kick_handler().context("cannot install the vCPU signal's handler")?;
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            running: Mutex::new(0),
            all_parked: Condvar::new(),
            share: AtomicU8::new(100),
            nap_until: AtomicU64::new(0),
            start: Instant::now(),
            napping: Mutex::new(()),
            nap_over: Condvar::new(),
            touching: AtomicBool::new(false),
            left: Mutex::new(()),
            has_left: Condvar::new(),
        });
        let mut handles = Vec::new();
        for (id, mut fd) in fds.into_iter().enumerate() {
            let kick = Arc::new(Kick::new(&mut fd));
            let standing = Arc::new(Standing::default());
            let (orders, inbox) = channel();
            let entries = Arc::new(AtomicU64::new(0));
            let mut worker = Worker {
                id,
                fd,
                kick: kick.clone(),
                standing: standing.clone(),
                shared: shared.clone(),
                exits: exits.clone(),
                inbox,
                entries: entries.clone(),
            };
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(256 * 1024)
                .spawn(move || {
                    let _guard = AbortOnPanic;
                    worker.main();
                })
                .with_context(|| format!("cannot start the thread of vCPU {id}"))?;
            handles.push(Handle { kick, standing, orders, entries, thread: Some(thread) });
        }
        Ok(Self { shared, handles, throttler: Mutex::new(None) })
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.handles.len()
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    fn order(&self, id: usize, order: Order) -> Result<()> {
        let Some(handle) = self.handles.get(id) else { bail!("there is no vCPU {id}") };
        handle.orders.send(order).map_err(|_| anyhow::anyhow!("the thread of vCPU {id} has ended"))
    }

    /// Let all parked vCPUs run.
    pub fn run_all(&self) -> Result<()> {
        self.shared.stop.store(false, Ordering::SeqCst);
        *self.shared.running.lock().unwrap_or_else(PoisonError::into_inner) = self.handles.len();
        (0..self.handles.len()).try_for_each(|id| self.order(id, Order::Run))
    }

    /// Stop all vCPUs; returns when every one is parked with its pending I/O completed. Harmless when they are parked already.
    pub fn stop_all(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if self.shared.share.load(Ordering::Relaxed) < 100 {
            let _napping = self.shared.napping.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.nap_over.notify_all();
        }
        let mut running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lifted = false;
        while *running > 0 {
            for handle in &self.handles {
                handle.kick.kick();
            }
            // After the kicks: wherever they are, they are on their way to park. One that went on in the guest would keep its
            // processor from whoever is to stop it.
            if !std::mem::replace(&mut lifted, true) {
                self.handles.iter().for_each(|handle| handle.standing.lift());
            }
            // A kick cannot be lost (see Kick); the bound only guards against a thread that has not told its id yet.
            running = self
                .shared
                .all_parked
                .wait_timeout_while(running, Duration::from_millis(20), |n| *n > 0)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// See every vCPU outside of `KVM_RUN` once, without stopping the machine: when this returns, whatever the kernel was doing for
    /// a vCPU when it was called (writing to guest RAM on the guest's behalf, for one) is complete, its trace in the dirty log
    /// included.
    pub fn touch(&self) {
        const AGAIN: Duration = Duration::from_millis(20);
        // In this order: whoever leaves after its count was read sees the flag.
        self.shared.touching.store(true, Ordering::SeqCst);
        let inside: Vec<_> = self.handles.iter().map(|h| (h, h.entries.load(Ordering::SeqCst))).collect();
        let mut inside: Vec<_> = inside.into_iter().filter(|(_, entries)| entries % 2 == 1).collect();
        inside.iter().for_each(|(handle, _)| handle.kick.kick());
        // (Not a loop that spins: it may run before the vCPUs' threads, on their processor.)
        let mut left = self.shared.left.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            inside.retain(|(handle, entries)| handle.entries.load(Ordering::SeqCst) == *entries);
            if inside.is_empty() {
                break;
            }
            let (guard, timeout) =
                self.shared.has_left.wait_timeout(left, AGAIN).unwrap_or_else(PoisonError::into_inner);
            left = guard;
            if timeout.timed_out() {
                inside.iter().for_each(|(handle, _)| handle.kick.kick());
            }
        }
        self.shared.touching.store(false, Ordering::SeqCst);
    }

    /// Let the vCPUs run only for `percent` (1 to 100) of the time.
    pub fn throttle(&self, percent: u8) -> Result<()> {
        let mut thread = self.throttler.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.shared.share.swap(percent.clamp(1, 100), Ordering::SeqCst);
        if percent >= 100 || before < 100 {
            // The thread sees the change, or there is none and need be none.
            return Ok(());
        }
        if let Some(ending) = thread.take() {
            let _ = ending.join();
        }
        let shared = self.shared.clone();
        let kicks: Vec<_> = self.handles.iter().map(|h| h.kick.clone()).collect();
        let started = std::thread::Builder::new().name("throttle".into()).stack_size(64 * 1024).spawn(move || {
            // Late, it would let the guest run for more than its share.
            understudy_protocol::urgent::this_thread();
            loop {
                let share = u32::from(shared.share.load(Ordering::SeqCst));
                if share == 100 {
                    return;
                }
                let nap = PERIOD * (100 - share) / 100;
                shared.nap_until.store(shared.now() + nap.as_nanos() as u64, Ordering::Relaxed);
                kicks.iter().for_each(|kick| kick.kick());
                // The pace of the naps is what this thread is for; nothing is waited for.
                std::thread::sleep(PERIOD);
            }
        });
        *thread = Some(started.context("cannot start the thread that throttles the machine")?);
        Ok(())
    }

    /// Share of the time that the vCPUs run, percent.
    pub fn share(&self) -> u8 {
        self.shared.share.load(Ordering::Relaxed)
    }

    /// Run `f(vcpu index, fd)` on every vCPU's thread, in parallel; they are parked. Results in vCPU order.
    pub fn on_all<R: Send + 'static>(
        &self,
        f: impl Fn(usize, &mut VcpuFd) -> Result<R> + Send + Sync + 'static,
    ) -> Result<Vec<R>> {
        self.on_all_meanwhile(f, || ()).map(|(results, ())| results)
    }

    /// As [`Vcpus::on_all`]; `meanwhile` runs on this thread at the same time.
    pub fn on_all_meanwhile<R: Send + 'static, M>(
        &self,
        f: impl Fn(usize, &mut VcpuFd) -> Result<R> + Send + Sync + 'static,
        meanwhile: impl FnOnce() -> M,
    ) -> Result<(Vec<R>, M)> {
        let f = Arc::new(f);
        let (reply, replies) = channel();
        for id in 0..self.handles.len() {
            let (f, reply) = (f.clone(), reply.clone());
            let task: Task = Box::new(move |fd| {
                let _ = reply.send((id, f(id, fd)));
            });
            self.order(id, Order::Task(task))?;
        }
        drop(reply);
        let meanwhile = meanwhile();
        let mut results: Vec<Option<R>> = self.handles.iter().map(|_| None).collect();
        for (id, result) in replies {
            results[id] = Some(result.with_context(|| format!("vCPU {id}"))?);
        }
        let results = results.into_iter().collect::<Option<Vec<R>>>().context("the thread of a vCPU has ended")?;
        Ok((results, meanwhile))
    }

    /// As [`Vcpus::on_all`], for the first vCPU alone.
    pub fn on_first<R: Send + 'static>(&self, f: impl FnOnce(&mut VcpuFd) -> Result<R> + Send + 'static) -> Result<R> {
        let (reply, replies) = channel();
        let task: Task = Box::new(move |fd| {
            let _ = reply.send(f(fd));
        });
        self.order(0, Order::Task(task))?;
        replies.recv().context("the thread of vCPU 0 has ended")?
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        // Its kicks must not outlive the vCPUs.
        self.shared.share.store(100, Ordering::SeqCst);
        if let Some(thread) = self.throttler.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
        self.stop_all();
        for handle in &mut self.handles {
            let _ = handle.orders.send(Order::End);
            if let Some(thread) = handle.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

struct Worker<E> {
    id: usize,
    fd: VcpuFd,
    kick: Arc<Kick>,
    standing: Arc<Standing>,
    shared: Arc<Shared>,
    exits: Arc<E>,
    inbox: Receiver<Order>,
    entries: Arc<AtomicU64>,
}

impl<E: Exits> Worker<E> {
    fn main(&mut self) {
        self.kick.this_is_the_thread();
        self.standing.this_is_the_thread();
        while let Ok(order) = self.inbox.recv() {
            match order {
                Order::Run => {
                    self.run();
                    self.complete();
                    let mut running = self.shared.running.lock().unwrap_or_else(PoisonError::into_inner);
                    *running = running.saturating_sub(1);
                    if *running == 0 {
                        self.shared.all_parked.notify_all();
                    }
                }
                Order::Task(task) => task(&mut self.fd),
                Order::End => return,
            }
        }
    }

    /// Guest code until something stops it.
    fn run(&mut self) {
        loop {
            // In this order: a stop that comes after the clear is seen by the load, one that came before has set the flag.
            self.kick.clear();
            if self.shared.stop.load(Ordering::SeqCst) {
                return;
            }
            self.standing.step_back();
            self.shared.nap();
            self.entries.fetch_add(1, Ordering::SeqCst);
            let came_back = self.fd.run().map(|_| ());
            self.entries.fetch_add(1, Ordering::SeqCst);
            if self.shared.touching.load(Ordering::SeqCst) {
                let _left = self.shared.left.lock().unwrap_or_else(PoisonError::into_inner);
                self.shared.has_left.notify_all();
            }
            match came_back {
                Ok(()) => {
                    if !self.exit() {
                        return;
                    }
                }
                Err(e) if [libc::EINTR, libc::EAGAIN].contains(&e.errno()) => {}
                Err(e) => {
                    self.exits.broken(self.id, format!("KVM_RUN failed: {e}"));
                    return;
                }
            }
        }
    }

    /// Let KVM finish the I/O whose data it has been given: afterwards the registers are those between two instructions.
    fn complete(&mut self) {
        self.kick.set();
        // Only a long string or misaligned access needs more than one round; the bound is for a KVM that ignores the flag.
        for _ in 0..4096 {
            match self.fd.run().map(|_| ()) {
                Ok(()) => {
                    self.exit();
                }
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(_) => break,
            }
        }
    }

    /// Handle one exit; false when this vCPU must not go on.
    fn exit(&mut self) -> bool {
        let action = match sys::exit(&mut self.fd) {
            Exit::Io { port, size, write, data } => {
                let mut action = Action::None;
                for access in data.chunks_mut(size) {
                    let asked = self.exits.io(port, write, access);
                    if asked != Action::None {
                        action = asked;
                    }
                }
                action
            }
            Exit::Mmio { addr, write, data } => self.exits.mmio(addr, write, data),
            Exit::Other(KVM_EXIT_SHUTDOWN) => Action::Reset, // triple fault
            Exit::Other(KVM_EXIT_SYSTEM_EVENT) => match sys::exit_detail(&mut self.fd) {
                KVM_SYSTEM_EVENT_RESET => Action::Reset,
                KVM_SYSTEM_EVENT_SHUTDOWN => Action::PowerOff,
                _ => Action::None,
            },
            Exit::Other(KVM_EXIT_HLT | KVM_EXIT_IRQ_WINDOW_OPEN) => Action::None,
            Exit::Other(reason) => {
                let why = match reason {
                    KVM_EXIT_INTERNAL_ERROR => {
                        format!("KVM internal error, sub-code {}", sys::exit_detail(&mut self.fd))
                    }
                    KVM_EXIT_FAIL_ENTRY => "the CPU refused to enter the guest".to_owned(),
                    other => format!("unexpected KVM exit {other}"),
                };
                let at = self.fd.get_regs().map(|r| r.rip).unwrap_or(0);
                self.exits.broken(self.id, format!("{why}, at rip {at:#x}"));
                return false;
            }
        };
        if action == Action::None {
            return true;
        }
        self.exits.asks(action);
        false
    }
}
