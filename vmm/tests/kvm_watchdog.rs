//! A watchdog on real KVM: a guest that arms it, feeds it and stops; whose time it counts, and what follows.
//!
//! Needs /dev/kvm (any flavour). Without it every test says `SKIPPED`.

mod common;

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::guests::CODE_AT;
use common::{kvm_is_there, scratch, wait};
use understudy_protocol::control::{Gate, PromoteFrom};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::watchdog::{WatchdogAction, WatchdogModel, WatchdogSpec, WatchdogState, WatchdogStatus};
use understudy_vmm::core::Event;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::Arena;
use understudy_vmm::save::restore_ram;
use understudy_vmm::session::{CutRequest, Session};
use vm_memory::{Bytes, GuestAddress};

core::arch::global_asm!(
    ".pushsection .rodata.understudy_watchdog_guest, \"a\"",
    ".globl understudy_watchdog_guest",
    "understudy_watchdog_guest:",
    include_str!("common/watchdog.s"),
    ".globl understudy_watchdog_guest_end",
    "understudy_watchdog_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static understudy_watchdog_guest: u8;
    static understudy_watchdog_guest_end: u8;
}

fn guest() -> Vec<u8> {
    let (start, end) = (&raw const understudy_watchdog_guest, &raw const understudy_watchdog_guest_end);
    // SAFETY: both are labels in one section of read-only data, in this order, so everything between them is one allocation.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

const FEEDS: GuestAddress = GuestAddress(0x1f_0000);
const PRELOAD: GuestAddress = GuestAddress(0x1f_0008);
const COUNT: GuestAddress = GuestAddress(0x20_0000);
/// Ticks of a stage, just below 1 ms each. Long enough for a vCPU that waits for a processor.
const STAGE: u32 = 1500;
/// Both stages.
const TIMEOUT: Duration = Duration::from_millis(2979);

struct Rig {
    machine: Arc<Machine>,
    dir: tempfile::TempDir,
    events: Receiver<Event>,
}

impl Rig {
    fn new(action: WatchdogAction) -> Self {
        let dir = scratch();
        let (sender, events) = channel();
        let config = MachineConfig {
            name: "test".into(),
            memory_mib: 16,
            vcpus: 1,
            boot: BootSource::Flat { code: guest(), at: CODE_AT },
            serial: Vec::new(),
            console: None,
            disks: Vec::new(),
            cdroms: Vec::new(),
            nics: Vec::new(),
            watchdog: Some(WatchdogSpec { model: WatchdogModel::I6300esb, action }),
            node: String::new(),
            ram_file: dir.path().join("ram"),
        };
        let machine = Arc::new(Machine::build(config, sender).unwrap());
        Self { machine, dir, events }
    }

    /// Switched on; feeds.
    fn boot(action: WatchdogAction) -> Self {
        let rig = Self::new(action);
        assert_eq!(rig.status().state, WatchdogState::NotArmed);
        rig.machine.core.ram.mem.write_obj(STAGE, PRELOAD).unwrap();
        rig.feeds(true);
        rig.machine.promote(Generation(1), &PromoteFrom::ColdBoot, Gate::Open).unwrap();
        rig.is_fed_on();
        rig
    }

    fn feeds(&self, feeds: bool) {
        self.machine.core.ram.mem.write_obj(u64::from(feeds), FEEDS).unwrap();
    }

    fn count(&self) -> u64 {
        self.machine.core.ram.mem.read_obj(COUNT).unwrap()
    }

    fn status(&self) -> WatchdogStatus {
        self.machine.status().watchdog.unwrap()
    }

    fn ran(&self) -> Duration {
        Duration::from_nanos(self.machine.status().vm_time_ns)
    }

    fn is_fed_on(&self) {
        let before = self.count();
        wait("the guest feeds its watchdog", || self.count() > before + 3);
        assert_eq!(self.status().state, WatchdogState::Fed);
    }

    /// Time that it was not fed.
    fn unfed(&self) -> Duration {
        Duration::from_millis(self.status().fed_ms_ago.unwrap())
    }

    fn expires(&self) {
        wait("the watchdog expires", || self.status().state == WatchdogState::Expired);
        let status = self.status();
        let unfed = status.fed_ms_ago.unwrap() - status.expired_ms_ago.unwrap();
        assert!(unfed.abs_diff(TIMEOUT.as_millis() as u64) < 1000, "it expired after {unfed} ms");
    }
}

/// Wall clock time that passes for the host and not for the guest.
fn longer_than_the_timeout() {
    let until = Instant::now() + TIMEOUT + Duration::from_millis(300);
    wait("the host's time passes", || Instant::now() > until);
}

#[test]
fn a_guest_that_feeds_is_up_and_one_that_stops_is_found_hung_and_one_that_goes_on_is_up_again() {
    if !kvm_is_there() {
        return;
    }
    let rig = Rig::boot(WatchdogAction::Report);
    wait("more than the timeout passes", || rig.ran() > TIMEOUT + TIMEOUT / 2);
    let status = rig.status();
    assert_eq!((status.state, status.expirations), (WatchdogState::Fed, 0));
    assert_eq!(status.timeout_ms, Some(TIMEOUT.as_millis() as u64 - 1));
    rig.feeds(false);
    rig.expires();
    assert!(rig.status().hangs());
    assert!(rig.events.try_recv().is_err(), "reported, and nothing else");
    rig.feeds(true);
    wait("the guest feeds its watchdog", || rig.status().state == WatchdogState::Fed);
    assert_eq!(rig.status().expirations, 1);
}

#[test]
fn what_was_left_is_left_after_a_pause_and_after_a_takeover_and_a_guest_that_hangs_is_reset() {
    if !kvm_is_there() {
        return;
    }
    let first = Rig::boot(WatchdogAction::Report);
    first.feeds(false);
    wait("half of the timeout passes", || first.unfed() > TIMEOUT / 2);
    first.machine.pause().unwrap();
    let (before, unfed) = (first.status(), first.unfed());
    longer_than_the_timeout();
    assert_eq!(first.status(), before, "it counts while the machine is paused");
    let saved = first.dir.path().join("saved");
    first.machine.save(&saved).unwrap();

    let second = Rig::new(WatchdogAction::Reset);
    restore_ram(&saved, &second.dir.path().join("ram")).unwrap();
    let from = PromoteFrom::Image { state_file: saved.join("state").display().to_string(), epoch: Epoch::ZERO };
    second.machine.promote(Generation(2), &from, Gate::Open).unwrap();
    let status = second.status();
    assert_eq!((status.state, status.expirations), (WatchdogState::Fed, 0));
    assert!(second.unfed() >= unfed);
    let event = second.events.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_eq!(event, Event::Reset);
    second.expires();
    // Paused before anybody got to it: it is asked for again, and given once.
    second.machine.pause().unwrap();
    second.machine.reset().unwrap();
    second.machine.resume().unwrap();
    assert_eq!(second.events.recv_timeout(Duration::from_secs(60)).unwrap(), Event::Reset);
    // As the supervisor does. The guest begins anew, and arms it again.
    second.feeds(true);
    second.machine.reset().unwrap();
    second.machine.reset().unwrap();
    second.is_fed_on();
    assert_eq!((second.machine.status().resets, second.status().expirations), (1, 1));

    first.machine.resume().unwrap();
    first.expires();
}

#[test]
fn a_last_cut_that_nobody_commits_does_not_make_a_guest_hang() {
    if !kvm_is_there() {
        return;
    }
    let rig = Rig::boot(WatchdogAction::Reset);
    let arena = Arc::new(Mutex::new(Arena::open(&rig.dir.path().join("arena"), 1 << 20).unwrap()));
    let (mut session, _) = Session::attach(rig.machine.clone(), arena).unwrap();
    session.dirty_log_start().unwrap();
    let mut piece = session.cut(CutRequest { epoch: Epoch(1), arm: false, last: true, again: false }).unwrap();
    while piece.more {
        piece = session.cut_continue().unwrap();
    }
    longer_than_the_timeout();
    drop(session);
    rig.is_fed_on();
    assert_eq!(rig.status().expirations, 0);
    assert!(rig.events.try_recv().is_err());
}
