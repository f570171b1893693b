//! The machine on real KVM, with small ring-3 guests: what a cut captures, what a restore continues, what the gate lets out.
//!
//! Needs /dev/kvm (any flavour: ring-3 code runs natively even where ring 0 is interpreted). Without it every test says `SKIPPED`.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::guests::{CODE_AT, COUNT, COUNTER, MASK, TALK};
use common::{kvm_is_there, scratch, wait};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use understudy_protocol::control::{
    Attached, Captured, ControlClient, Gate, OutputHeld, PromoteFrom, Strategy, VmmRequest, VmmState, VmmStatus,
    call_once,
};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::core::Event;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::{Arena, PAGE};
use understudy_vmm::session::{CutRequest, Session, SharedArena};
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 64;

struct Rig {
    machine: Arc<Machine>,
    arena: SharedArena,
    dir: tempfile::TempDir,
    _events: Receiver<Event>,
}

/// A plain cut of `epoch`.
fn cut_of(epoch: u64) -> CutRequest {
    CutRequest { epoch: Epoch(epoch), arm: false, last: false, again: false }
}

fn rig(code: &[u8], vcpus: u32, arena_bytes: u64) -> Rig {
    let dir = scratch();
    let (sender, events) = channel();
    let config = MachineConfig {
        name: "test".into(),
        memory_mib: MIB,
        vcpus,
        boot: BootSource::Flat { code: code.to_vec(), at: CODE_AT },
        serial: vec![BackendConfig::File(dir.path().join("com1"))],
        console: None,
        disks: Vec::new(),
        cdroms: Vec::new(),
        nics: Vec::new(),
        watchdog: None,
        node: String::new(),
        ram_file: dir.path().join("ram"),
    };
    let machine = Arc::new(Machine::build(config, sender).unwrap());
    let arena = Arc::new(Mutex::new(Arena::open(&dir.path().join("arena"), arena_bytes).unwrap()));
    Rig { machine, arena, dir, _events: events }
}

impl Rig {
    fn boot(self, mask: u64, gate: Gate) -> Self {
        self.machine.core.ram.mem.write_obj(mask, GuestAddress(MASK)).unwrap();
        self.machine.promote(Generation(1), &PromoteFrom::ColdBoot, gate).unwrap();
        self
    }
    fn counter(&self, vcpu: u64) -> u64 {
        self.machine.core.ram.mem.read_obj(GuestAddress(COUNTER + 64 * vcpu)).unwrap()
    }
    fn counts_on(&self, vcpu: u64) {
        let before = self.counter(vcpu);
        wait("the guest counts on", || self.counter(vcpu) > before + 10);
    }
    fn stands_still(&self) {
        let state = |r: &Rig| (0..4).map(|v| r.counter(v)).collect::<Vec<_>>();
        let before = state(self);
        let until = Instant::now() + Duration::from_millis(20);
        while Instant::now() < until {
            assert_eq!(state(self), before, "the guest runs");
        }
    }
    fn ram_file(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("ram")).unwrap()
    }
    fn attach(&self) -> Session {
        let mut s = Session::attach(self.machine.clone(), self.arena.clone()).unwrap().0;
        s.dirty_log_start().unwrap();
        s
    }
    fn arena_bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        std::fs::File::open(self.dir.path().join("arena")).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
    /// Put the pages of a piece into `image`.
    fn apply(&self, piece: &Captured, image: &mut [u8]) {
        let indices = self.arena_bytes(piece.indices_offset, piece.pages * 8);
        let pages = self.arena_bytes(piece.pages_offset, piece.pages * PAGE as u64);
        for (index, page) in indices.chunks(8).zip(pages.chunks(PAGE)) {
            let at = u64::from_le_bytes(index.try_into().unwrap()) as usize * PAGE;
            image[at..at + PAGE].copy_from_slice(page);
        }
    }
    /// Cut, take all pieces; returns the state.
    fn cut(&self, session: &mut Session, epoch: u64, last: bool, image: &mut [u8]) -> Vec<u8> {
        let mut piece = session.cut(CutRequest { last, ..cut_of(epoch) }).unwrap();
        loop {
            self.apply(&piece, image);
            if !piece.more {
                return self.arena_bytes(piece.state_offset, piece.state_len);
            }
            piece = session.cut_continue().unwrap();
        }
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    assert_eq!(a.len(), b.len());
    a.chunks(PAGE).zip(b.chunks(PAGE)).position(|(a, b)| a != b)
}

#[test]
fn cuts_of_a_running_machine_capture_exactly_its_ram() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 2, 16 << 20).boot(0xff, Gate::Hold);
    rig.counts_on(0);
    rig.counts_on(1);
    for round in 0..3 {
        let mut session = rig.attach();
        let mut image = rig.ram_file();
        // Pages that changed while they were copied.
        let harvested = session.harvest().unwrap();
        assert!(harvested.dirty_pages > 0);
        let bitmap = rig.arena_bytes(0, harvested.bitmap_bytes);
        let ram = rig.ram_file();
        for page in (0..MIB as usize * 256).filter(|p| bitmap[p / 8] >> (p % 8) & 1 == 1) {
            image[page * PAGE..][..PAGE].copy_from_slice(&ram[page * PAGE..][..PAGE]);
        }
        for epoch in (1..=30).map(|e| 100 * round + e) {
            rig.cut(&mut session, epoch, false, &mut image);
            session.committed(Epoch(epoch)).unwrap();
        }
        assert!(session.cut(cut_of(100 * round + 30)).is_err(), "an epoch was cut twice");
        rig.cut(&mut session, 100 * round + 31, true, &mut image);
        rig.stands_still();
        assert_eq!(first_difference(&image, &rig.ram_file()), None, "round {round}: page differs");
        drop(session);
        rig.counts_on(0);
        rig.counts_on(1);
    }
    let status = rig.machine.status();
    assert!(status.recent_pauses_us.len() >= 93);
    eprintln!("pauses (µs): {:?}", status.recent_pauses_us);
}

/// What RAM must hold at any instant, given the guest's counts: page `p` of a vCPU's ring holds the newest count that went to it.
fn is_one_instant(image: &[u8], vcpus: u64, mask: u64) {
    let word = |at: u64| u64::from_le_bytes(image[at as usize..][..8].try_into().unwrap());
    for vcpu in 0..vcpus {
        let count = word(COUNTER + 64 * vcpu);
        for page in 0..=mask {
            let held = word((4 << 20) * (vcpu + 1) + page * PAGE as u64);
            let newest = if count & mask >= page {
                (count & !mask) + page
            } else {
                (count & !mask).wrapping_sub(mask + 1) + page
            };
            // The count is written first; its page may still hold the round before.
            let before = newest.wrapping_sub(mask + 1);
            let fits = |v: u64| held == v || v > count && held == 0;
            assert!(
                fits(newest) || newest == count && fits(before),
                "vCPU {vcpu}, page {page}: holds {held} where the count is {count}: not the RAM of one instant"
            );
        }
    }
}

/// A device that keeps writing the same number to two pages, as devices do: under the device lock, never while they are frozen.
fn dma(machine: &Arc<Machine>, end: &Arc<std::sync::atomic::AtomicBool>) -> std::thread::JoinHandle<u64> {
    let (machine, end) = (machine.clone(), end.clone());
    std::thread::spawn(move || {
        let mut n = 0u64;
        while !end.load(std::sync::atomic::Ordering::Relaxed) {
            let hardware = machine.core.hardware();
            if !hardware.frozen {
                n += 1;
                for at in DMA {
                    machine.core.ram.mem.write_obj(n, GuestAddress(at + (n % 8) * 4096)).unwrap();
                }
            }
            drop(hardware);
            std::thread::yield_now();
        }
        n
    })
}
const DMA: [u64; 2] = [0x280_0000, 0x2c0_0000];

#[test]
fn every_checkpoint_of_every_strategy_is_the_ram_of_one_instant() {
    if !kvm_is_there() {
        return;
    }
    for (mask, vcpus) in [(0x3ff, 1), (0x1f, 2)] {
        for strategy in Strategy::ALL {
            let rig = rig(COUNT, vcpus, 32 << 20).boot(mask, Gate::Hold);
            rig.machine.capturing().strategy = strategy;
            if strategy == Strategy::Lock
                && let Err(e) = understudy_vmm::capture::lock::Locker::new(rig.machine.core.clone())
            {
                eprintln!("SKIPPED: pages cannot be locked here, so nothing was proven of `lock`: {e:#}");
                continue;
            }
            let mut copied_while_it_ran = false;
            rig.counts_on(0);
            let end = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let device = dma(&rig.machine, &end);
            let mut session = rig.attach();
            // The log runs; a copy made now is completed by the first cut.
            let mut image = rig.ram_file();
            for epoch in 1..=120 {
                // Some epochs are long, some have early copies, one or several.
                let from = rig.counter(0);
                wait("the guest counts on", || rig.counter(0) > from + [1, 300, 3000][epoch as usize % 3]);
                for _ in 0..epoch % 4 {
                    let piece = session.precopy(Epoch(epoch)).unwrap();
                    rig.apply(&piece, &mut image);
                }
                let again = epoch % 7 == 0;
                let piece = session.cut(CutRequest { again, ..cut_of(epoch) }).unwrap();
                assert!(!piece.more && piece.state_len > 0);
                rig.apply(&piece, &mut image);
                session.committed(Epoch(epoch)).unwrap();
                let counts = rig.machine.status().capture;
                copied_while_it_ran |= counts.stopped_pages < counts.pages;
                is_one_instant(&image, u64::from(vcpus), mask);
                for page in 0..8 {
                    let [a, b] = DMA.map(|at| &image[(at + page * 4096) as usize..][..8]);
                    assert_eq!(a, b, "{strategy:?}: half of a device's work is in epoch {epoch}");
                }
            }
            end.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(device.join().unwrap() > 100);
            match strategy {
                Strategy::Stop => assert!(!copied_while_it_ran),
                Strategy::Lock | Strategy::Validate => assert!(copied_while_it_ran, "{strategy:?} was not tried"),
                Strategy::Auto => {}
            }
            rig.cut(&mut session, 121, true, &mut image);
            assert_eq!(first_difference(&image, &rig.ram_file()), None, "{strategy:?}: a page differs");
            let c = rig.machine.status().capture;
            eprintln!(
                "{:>8}, {vcpus} vCPUs: {} cuts, {} repeated, {} hot; fault {} copy {} protect {} ns, kick {} state {} lock fault {} µs; {}",
                c.strategy,
                c.cuts,
                c.repeated,
                c.hot_pages,
                c.fault_ns,
                c.copy_ns,
                c.protect_ns,
                c.kick_ns / 1000,
                c.state_ns / 1000,
                c.lock_fault_ns / 1000,
                c.choice
            );
            let mut pauses = rig.machine.status().recent_pauses_us;
            pauses.sort_unstable();
            eprintln!("          pauses: p50 {} max {} µs", pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
        }
    }
}

/// From here on this thread, and those that it starts, see a host without userfaultfd, as in many containers.
fn lose_userfaultfd() {
    let refused = [(libc::SYS_userfaultfd, vec![])].into();
    let refusal = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(refused, SeccompAction::Allow, refusal, TargetArch::x86_64).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

#[test]
fn a_host_that_cannot_lock_pages_copies_them_in_the_pause_and_says_so() {
    if !kvm_is_there() {
        return;
    }
    let with_lock_demanded = || {
        lose_userfaultfd();
        let mask = 0xff;
        let rig = rig(COUNT, 1, 16 << 20).boot(mask, Gate::Hold);
        rig.machine.capturing().strategy = Strategy::Lock;
        let mut session = rig.attach();
        let mut image = rig.ram_file();
        for epoch in 1..=20 {
            let from = rig.counter(0);
            wait("pages were written", || rig.counter(0) > from + mask);
            rig.cut(&mut session, epoch, false, &mut image);
            is_one_instant(&image, 1, mask);
            let said = rig.machine.status().capture;
            assert!(said.pages > 0 && said.stopped_pages == said.pages, "{said:?}");
            assert_eq!(said.strategy, "lock");
            assert!(said.choice.contains("stop instead of lock") && said.choice.contains("userfaultfd"), "{said:?}");
        }
        // Whoever demands what is done has nothing to be told.
        rig.machine.capturing().strategy = Strategy::Stop;
        rig.cut(&mut session, 21, false, &mut image);
        let said = rig.machine.status().capture.choice;
        assert!(said.starts_with("stop, as configured"), "{said}");
        rig.cut(&mut session, 22, true, &mut image);
        assert_eq!(first_difference(&image, &rig.ram_file()), None);
    };
    // (A filter cannot be taken away again: it ends with this thread.)
    std::thread::scope(|scope| scope.spawn(with_lock_demanded).join().unwrap());
}

#[test]
fn the_strategy_can_be_changed_while_the_machine_is_replicated() {
    if !kvm_is_there() {
        return;
    }
    let mask = 0xff;
    let rig = rig(COUNT, 2, 32 << 20).boot(mask, Gate::Hold);
    rig.counts_on(0);
    rig.counts_on(1);
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    for epoch in 1..=100 {
        rig.machine.capturing().strategy = Strategy::ALL[(epoch as usize / 9) % 4];
        let piece = session.precopy(Epoch(epoch)).unwrap();
        rig.apply(&piece, &mut image);
        rig.cut(&mut session, epoch, false, &mut image);
        is_one_instant(&image, 2, mask);
    }
}

#[test]
fn more_pages_than_the_arena_holds_are_handed_out_while_the_guest_runs_until_the_rest_fits() {
    if !kvm_is_there() {
        return;
    }
    for strategy in [Strategy::Lock, Strategy::Validate, Strategy::Auto] {
        let rig = rig(COUNT, 1, 3 << 19).boot(0x3ff, Gate::Hold);
        rig.machine.capturing().strategy = strategy;
        rig.counts_on(0);
        let mut session = rig.attach();
        let mut image = rig.ram_file();
        for epoch in 1..=10 {
            let from = rig.counter(0);
            wait("all pages were written", || rig.counter(0) > from + 1100);
            rig.cut(&mut session, epoch, false, &mut image);
            is_one_instant(&image, 1, 0x3ff);
        }
        rig.cut(&mut session, 11, true, &mut image);
        assert_eq!(first_difference(&image, &rig.ram_file()), None);
    }
}

#[test]
fn whoever_waits_for_output_hears_of_it_once_for_every_cut() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(TALK, 1, 16 << 20).boot(0, Gate::Hold);
    let socket = rig.dir.path().join("vmm.sock");
    understudy_vmm::control::serve(socket.clone(), rig.machine.clone(), rig.arena.clone()).unwrap();
    let mut watcher = ControlClient::connect(&socket, Duration::from_secs(20)).unwrap();
    let mut heard = |seen, timeout_ms| -> u64 {
        watcher.call::<_, OutputHeld>(&VmmRequest::AwaitOutput { seen, timeout_ms }).unwrap().number
    };
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    let first = heard(0, 10_000);
    assert!(first >= 1);
    // No cut was made: there is nothing new to hear, however much more the guest says.
    assert_eq!(heard(first, 50), first);
    rig.cut(&mut session, 1, false, &mut image);
    assert_eq!(heard(first, 10_000), first + 1);
}

#[test]
fn a_throttled_guest_runs_for_its_share_and_can_be_stopped_at_any_time() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 16 << 20).boot(0xf, Gate::Open);
    rig.counts_on(0);
    rig.machine.pause().unwrap();
    let thread = rig.machine.vcpus.on_first(|_| Ok(nix::unistd::gettid())).unwrap();
    rig.machine.resume().unwrap();
    // Time in which the vCPU's thread had a processor, and in which it waited for one. A busy host gives it less and lets it wait
    // longer; it never lets it sleep.
    let used = || {
        let schedstat = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
        let mut fields = schedstat.split_ascii_whitespace().map(|ns| Duration::from_nanos(ns.parse().unwrap()));
        (fields.next().unwrap(), fields.next().unwrap())
    };
    let ran_and_slept = || {
        let ((ran, queued), since) = (used(), Instant::now());
        wait("the guest has run for a while", || used().0 >= ran + Duration::from_millis(50));
        let (in_all, upto) = (since.elapsed(), used().0);
        // The time for which it waits at this moment counts as soon as it runs again.
        wait("the guest runs on", || used().0 > upto);
        let (ran, queued) = (upto - ran, used().1 - queued);
        (ran, in_all.saturating_sub(ran + queued))
    };
    wait("a guest that nobody throttles hardly sleeps", || {
        let (ran, slept) = ran_and_slept();
        slept < ran / 2
    });
    rig.machine.vcpus.throttle(10).unwrap();
    rig.counts_on(0);
    // Nine times as long. On a host so busy that the naps are over before the guest gets a processor again, they are shorter.
    wait("it sleeps for longer than it runs", || {
        let (ran, slept) = ran_and_slept();
        slept > 2 * ran
    });
    assert_eq!(rig.machine.status().capture.throttle_percent, 10);
    for _ in 0..20 {
        rig.machine.pause().unwrap();
        rig.stands_still();
        rig.machine.resume().unwrap();
    }
    rig.machine.vcpus.throttle(100).unwrap();
    rig.counts_on(0);
}

#[test]
fn a_cut_larger_than_the_arena_comes_in_pieces_while_the_machine_stands() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 3 << 19).boot(0x3ff, Gate::Hold);
    rig.machine.capturing().strategy = Strategy::Stop;
    rig.counts_on(0);
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    let from = rig.counter(0);
    wait("all pages were written", || rig.counter(0) > from + 5000);
    let mut piece = session.cut(CutRequest { last: true, ..cut_of(1) }).unwrap();
    let mut pieces = 1;
    while piece.more {
        assert_eq!(piece.state_len, 0);
        rig.stands_still();
        rig.apply(&piece, &mut image);
        piece = session.cut_continue().unwrap();
        pieces += 1;
    }
    rig.apply(&piece, &mut image);
    assert!(pieces >= 4, "{pieces} pieces");
    assert!(piece.state_len > 0);
    assert_eq!(first_difference(&image, &rig.ram_file()), None);
}

#[test]
fn an_aborted_cut_loses_no_page_and_the_machine_runs_on() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 3 << 19).boot(0x3ff, Gate::Hold);
    rig.machine.capturing().strategy = Strategy::Stop;
    rig.counts_on(0);
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    let from = rig.counter(0);
    wait("all pages were written", || rig.counter(0) > from + 5000);
    assert!(session.cut(cut_of(1)).unwrap().more);
    // Nothing but the connection's end aborts an open cut; then a new session starts over from a full copy. Within the session:
    assert!(session.cut(cut_of(9)).unwrap_err().to_string().contains("cut-continue"));
    while session.cut_continue().unwrap().more {}
    rig.counts_on(0);
    drop(session);
    let mut session = rig.attach();
    image.copy_from_slice(&rig.ram_file());
    let _ = session.cut(cut_of(2)).unwrap();
    drop(session);
    rig.counts_on(0);
}

#[test]
fn a_second_machine_continues_from_the_captured_state() {
    if !kvm_is_there() {
        return;
    }
    let first = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Hold);
    first.counts_on(0);
    first.counts_on(1);
    let mut session = first.attach();
    let mut image = first.ram_file();
    let state = first.cut(&mut session, 1, true, &mut image);
    session.committed(Epoch(1)).unwrap();
    assert_eq!(first.machine.life().state, VmmState::HandedOver);
    let counts = (first.counter(0), first.counter(1));
    let time = first.machine.status().vm_time_ns;
    drop(session);
    first.stands_still();
    assert!(first.machine.resume().is_err(), "a machine that was handed over must not run again");

    let second = rig(COUNT, 2, 16 << 20);
    std::fs::write(second.dir.path().join("state"), &state).unwrap();
    std::fs::File::options().write(true).open(second.dir.path().join("ram")).unwrap().write_all_at(&image, 0).unwrap();
    let state_file = second.dir.path().join("state").display().to_string();
    let from = PromoteFrom::Image { state_file, epoch: Epoch(1) };
    second.machine.promote(Generation(2), &from, Gate::Hold).unwrap();
    wait("both vCPUs count on", || second.counter(0) > counts.0 && second.counter(1) > counts.1);
    let status = second.machine.status();
    assert!(status.vm_time_ns >= time, "VM time went back");
    assert_eq!((status.generation, status.state), (Generation(2), VmmState::Running));
}

/// Continue `state` with RAM `image` in a new machine.
fn continued(like: &[u8], vcpus: u32, image: &[u8], state: &[u8], generation: u64) -> Rig {
    let rig = rig(like, vcpus, 16 << 20);
    let file = rig.dir.path().join("state");
    std::fs::write(&file, state).unwrap();
    std::fs::File::options().write(true).open(rig.dir.path().join("ram")).unwrap().write_all_at(image, 0).unwrap();
    let from = PromoteFrom::Image { state_file: file.display().to_string(), epoch: Epoch(1) };
    rig.machine.promote(Generation(generation), &from, Gate::Hold).unwrap();
    rig
}

#[test]
fn clocks_timers_and_cpuid_survive_two_restores_in_a_row() {
    const LVT_TIMER: usize = 0x320;
    const SPURIOUS: usize = 0xf0;
    const TSC_DEADLINE: u32 = 0x6e0;
    if !kvm_is_there() {
        return;
    }
    let mut host = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Hold);
    host.counts_on(0);
    host.machine.pause().unwrap();
    // A guest that sleeps until a time far away, as an idle kernel does.
    let far = u64::MAX / 4;
    let armed = host
        .machine
        .vcpus
        .on_all(move |_, fd| {
            let mut lapic = fd.get_lapic()?;
            for (at, value) in [(SPURIOUS, 0x1ffu32), (LVT_TIMER, 2 << 17 | 0x40)] {
                for (i, b) in value.to_le_bytes().into_iter().enumerate() {
                    lapic.regs[at + i] = b as _;
                }
            }
            fd.set_lapic(&lapic)?;
            understudy_vmm::vcpu_state::set_msr(fd, TSC_DEADLINE, far)
        })
        .unwrap();
    let cpuid = |rig: &Rig| rig.machine.vcpus.on_all(|_, fd| understudy_vmm::vcpu_state::get_cpuid(fd)).unwrap();
    let topology = |rig: &Rig| {
        let leaf = |e: &kvm_bindings::kvm_cpuid_entry2| (e.function == 1).then_some(e.ebx >> 24);
        cpuid(rig).iter().map(|c| c.iter().find_map(leaf)).collect::<Vec<_>>()
    };
    assert_eq!(topology(&host), [Some(0), Some(1)], "each vCPU has its own APIC id");
    let before: Vec<_> = cpuid(&host).iter().map(Vec::len).collect();
    for generation in 2..=3 {
        let mut image = vec![0; (MIB << 20) as usize];
        let (state, time) = {
            let life = host.machine.life();
            let mut hardware = host.machine.core.hardware();
            hardware.frozen = true;
            let at = hardware.stopwatch.now();
            (host.machine.capture(&life, &hardware, at).unwrap(), at)
        };
        image.copy_from_slice(&host.ram_file());
        let mut saved = understudy_vmm::container::decode(&state).unwrap();
        let clock: understudy_vmm::clock::state::V1 =
            understudy_vmm::container::take(&mut saved, "clock", "this", 1).unwrap();
        let next = continued(COUNT, 2, &image, &state, generation);
        next.counts_on(0);
        next.counts_on(1);
        next.machine.pause().unwrap();
        assert!(next.machine.status().vm_time_ns >= time.0);
        if armed.iter().all(|a| *a) {
            let deadlines =
                next.machine.vcpus.on_all(|_, fd| understudy_vmm::vcpu_state::get_msr(fd, TSC_DEADLINE)).unwrap();
            assert_eq!(deadlines, [far, far], "an armed timer was dropped");
        } else {
            eprintln!("SKIPPED: this KVM has no TSC deadline timer");
        }
        match next.machine.vcpus.on_all(|_, fd| Ok(understudy_vmm::sys::tsc_offset(fd)?)) {
            Ok(offsets) => assert_eq!(offsets[0], offsets[1], "the vCPUs' TSCs differ"),
            Err(_) => eprintln!("SKIPPED: this KVM does not tell TSC offsets"),
        }
        if next.machine.status().kvm_backend == "kvm_pvm" {
            eprintln!("SKIPPED: kvm_pvm lets guests see the host's TSC, so that it cannot continue");
        } else {
            let tsc = next.machine.vcpus.on_all(|_, fd| understudy_vmm::vcpu_state::get_msr(fd, 0x10)).unwrap();
            let minute = u64::from(clock.tsc_khz) * 60_000;
            eprintln!("TSC {} continues at {tsc:?}", clock.guest_tsc);
            for t in tsc {
                assert!(t >= clock.guest_tsc && t - clock.guest_tsc < minute, "{} became {t}", clock.guest_tsc);
            }
        }
        assert_eq!(cpuid(&next).iter().map(Vec::len).collect::<Vec<_>>(), before, "CPUID changed");
        assert_eq!(topology(&next), [Some(0), Some(1)]);
        host = next;
    }
}

#[test]
fn thirty_two_vcpus_run_stop_and_are_cut_together() {
    if !kvm_is_there() {
        return;
    }
    let spin = [0xeb, 0xfe]; // jmp .
    let rig = rig(&spin, 32, 16 << 20).boot(0, Gate::Hold);
    rig.machine.pause().unwrap();
    let at = rig.machine.vcpus.on_all(|_, fd| Ok((fd.get_regs()?.rip, fd.get_regs()?.rdi))).unwrap();
    assert_eq!(at, (0..32).map(|id| (CODE_AT, id)).collect::<Vec<_>>());
    rig.machine.resume().unwrap();
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    for epoch in 1..=5 {
        assert!(!rig.cut(&mut session, epoch, false, &mut image).is_empty());
    }
    eprintln!("pauses with 32 vCPUs (µs): {:?}", rig.machine.status().recent_pauses_us);
}

#[test]
fn damaged_states_are_refused_with_a_sentence_and_a_whole_one_still_works_afterwards() {
    if !kvm_is_there() {
        return;
    }
    let first = rig(COUNT, 1, 16 << 20).boot(0xf, Gate::Hold);
    first.counts_on(0);
    let mut session = first.attach();
    let mut image = first.ram_file();
    let state = first.cut(&mut session, 1, true, &mut image);

    let second = rig(COUNT, 1, 16 << 20);
    let file = second.dir.path().join("state");
    let from = PromoteFrom::Image { state_file: file.display().to_string(), epoch: Epoch(1) };
    let promote = || second.machine.promote(Generation(2), &from, Gate::Hold);
    assert!(format!("{:#}", promote().unwrap_err()).contains("cannot read"));
    for cut in [0, 7, 15, 16, 100, state.len() - 1] {
        std::fs::write(&file, &state[..cut]).unwrap();
        assert!(promote().is_err(), "{cut} bytes were taken");
    }
    let other = rig(COUNT, 2, 16 << 20);
    std::fs::write(&file, &state).unwrap();
    let refused = other.machine.promote(Generation(2), &from, Gate::Hold).unwrap_err();
    assert!(format!("{refused:#}").contains("vCPUs"), "{refused:#}");
    std::fs::File::options().write(true).open(second.dir.path().join("ram")).unwrap().write_all_at(&image, 0).unwrap();
    promote().unwrap();
    second.counts_on(0);
}

#[test]
fn the_gate_holds_output_until_its_checkpoint_is_committed() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(TALK, 1, 16 << 20).boot(0, Gate::Hold);
    let out = || std::fs::read(rig.dir.path().join("com1")).unwrap();
    wait("the guest talks", || rig.machine.status().serial[0].tx_bytes > 100);
    assert!(out().is_empty(), "uncommitted output left");
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    for epoch in 1..=5 {
        rig.cut(&mut session, epoch, false, &mut image);
        let sealed = rig.machine.status().serial[0].tx_bytes;
        let before = out().len();
        wait("the guest talks on", || rig.machine.status().serial[0].tx_bytes > sealed + 10);
        assert_eq!(out().len(), before, "uncommitted output left");
        session.committed(Epoch(epoch)).unwrap();
        wait("committed output arrives", || out().len() > before);
        wait("it is acknowledged", || {
            let s = &rig.machine.status().serial[0];
            s.tx_acked + s.tx_held == s.tx_bytes
        });
        assert!(out().len() as u64 <= sealed + 16, "more than the checkpoint's output left");
    }
    session.gate_open().unwrap();
    let before = out().len();
    wait("an open gate lets output out", || out().len() > before + 50);
    drop(session);
    wait("the gate is held again", || rig.machine.status().gate == Gate::Hold);
    for (i, b) in out().iter().enumerate() {
        assert_eq!(*b, i as u8, "byte {i} out of order");
    }
}

#[test]
fn a_guest_whose_output_nobody_takes_waits_instead_of_filling_memory() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(TALK, 1, 1 << 20).boot(0, Gate::Hold);
    // At 115200 baud 64 KiB take 5.7 s; on a loaded host, or under software emulation, the guest is slower than the line.
    let held = || rig.machine.status().serial[0].tx_held;
    while held() < 64 * 1024 {
        let before = held();
        wait("the guest fills the buffer", || held() > before || before >= 64 * 1024);
    }
    let full = rig.machine.status().serial[0].tx_bytes;
    let until = Instant::now() + Duration::from_millis(50);
    while Instant::now() < until {
        assert!(rig.machine.status().serial[0].tx_bytes <= full + 32);
    }
}

#[test]
fn pausing_stops_guest_and_vm_time_and_resuming_continues_both() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Open);
    rig.counts_on(0);
    for _ in 0..20 {
        rig.machine.pause().unwrap();
        let time = rig.machine.status().vm_time_ns;
        rig.stands_still();
        assert_eq!(rig.machine.status().vm_time_ns, time);
        rig.machine.resume().unwrap();
        rig.counts_on(0);
        rig.counts_on(1);
        assert!(rig.machine.status().vm_time_ns > time);
    }
}

#[test]
fn a_paused_machine_can_be_cut_and_stays_paused() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 16 << 20).boot(0xff, Gate::Hold);
    rig.counts_on(0);
    let mut session = rig.attach();
    let mut image = rig.ram_file();
    rig.machine.pause().unwrap();
    rig.cut(&mut session, 1, false, &mut image);
    rig.stands_still();
    assert_eq!(first_difference(&image, &rig.ram_file()), None);
    rig.machine.resume().unwrap();
    rig.counts_on(0);
}

#[test]
fn one_session_at_a_time_and_its_end_frees_the_machine() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 16 << 20).boot(0xf, Gate::Hold);
    let mut session = rig.attach();
    assert!(Session::attach(rig.machine.clone(), rig.arena.clone()).is_err());
    let mut image = rig.ram_file();
    rig.cut(&mut session, 1, false, &mut image);
    // The last cut leaves the machine stopped; without a commit it runs on when the session ends.
    rig.cut(&mut session, 2, true, &mut image);
    rig.stands_still();
    drop(session);
    rig.counts_on(0);
    let mut session = rig.attach();
    rig.cut(&mut session, 3, false, &mut image);
}

#[test]
fn the_end_of_a_replicators_connection_lets_the_machine_run_on_with_its_outputs_held() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Open);
    let socket = rig.dir.path().join("vmm.sock");
    understudy_vmm::control::serve(socket.clone(), rig.machine.clone(), rig.arena.clone()).unwrap();
    let status = || -> VmmStatus { call_once(&socket, &VmmRequest::Status, Duration::from_secs(5)).unwrap() };
    for epoch in 1..=3 {
        let mut replicator = ControlClient::connect(&socket, Duration::from_secs(5)).unwrap();
        let attached: Attached = replicator.call(&VmmRequest::Attach).unwrap();
        assert_eq!((attached.generation, attached.ram_bytes), (Generation(1), MIB << 20));
        let () = replicator.call(&VmmRequest::DirtyLogStart).unwrap();
        let () = replicator.call(&VmmRequest::GateOpen).unwrap();
        let epoch = Epoch(epoch);
        let captured: Captured =
            replicator.call(&VmmRequest::Cut { epoch, arm: false, last: true, again: false }).unwrap();
        assert_eq!((captured.epoch, captured.more), (epoch, false));
        rig.stands_still();
        let now = status();
        assert!(now.replicated && now.gate == Gate::Open && now.last_cut == epoch);
        drop(replicator);
        wait("the session ends", || !status().replicated);
        rig.counts_on(0);
        rig.counts_on(1);
        assert_eq!((status().gate, status().state), (Gate::Hold, VmmState::Running));
    }
}

#[test]
fn a_migration_that_fails_leaves_an_unprotected_machine_running_with_its_gate_open() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Open);
    let socket = rig.dir.path().join("vmm.sock");
    understudy_vmm::control::serve(socket.clone(), rig.machine.clone(), rig.arena.clone()).unwrap();
    let status = || -> VmmStatus { call_once(&socket, &VmmRequest::Status, Duration::from_secs(5)).unwrap() };
    let attach = || {
        let mut sender = ControlClient::connect(&socket, Duration::from_secs(5)).unwrap();
        let attached: Result<Attached, _> = sender.call(&VmmRequest::AttachToMigrate);
        (sender, attached)
    };
    for epoch in 1..=3 {
        let (mut sender, attached) = attach();
        attached.unwrap();
        let () = sender.call(&VmmRequest::DirtyLogStart).unwrap();
        assert_eq!(status().gate, Gate::Open, "copying holds nothing back");
        let epoch = Epoch(epoch);
        let _: Captured = sender.call(&VmmRequest::Cut { epoch, arm: true, last: true, again: false }).unwrap();
        rig.stands_still();
        assert_eq!(status().gate, Gate::Hold, "from the last cut on outputs wait");
        drop(sender);
        wait("the session ends", || !status().replicated);
        assert_eq!((status().gate, status().state), (Gate::Open, VmmState::Running));
        rig.counts_on(0);
        rig.counts_on(1);
    }
    // One that is handed over neither runs nor speaks.
    let (mut sender, attached) = attach();
    attached.unwrap();
    let () = sender.call(&VmmRequest::DirtyLogStart).unwrap();
    let epoch = Epoch(4);
    let _: Captured = sender.call(&VmmRequest::Cut { epoch, arm: true, last: true, again: false }).unwrap();
    let () = sender.call(&VmmRequest::Committed { epoch }).unwrap();
    drop(sender);
    wait("the session ends", || !status().replicated);
    assert_eq!((status().gate, status().state), (Gate::Hold, VmmState::HandedOver));
    rig.stands_still();
    assert!(attach().1.is_err());
}

#[test]
fn a_machine_whose_outputs_wait_is_not_migrated() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 1, 16 << 20).boot(0xf, Gate::Hold);
    let why = Session::attach_to_migrate(rig.machine.clone(), rig.arena.clone()).err().unwrap().to_string();
    assert!(why.contains("protected"), "{why}");
    drop(rig.attach());
    rig.counts_on(0);
}

#[test]
fn a_fenced_machine_never_runs_again() {
    if !kvm_is_there() {
        return;
    }
    let rig = rig(COUNT, 2, 16 << 20).boot(0xf, Gate::Hold);
    rig.counts_on(0);
    let mut session = rig.attach();
    rig.machine.fence();
    rig.stands_still();
    assert!(session.cut(cut_of(1)).is_err());
    assert!(session.gate_open().is_err());
    drop(session);
    assert!(rig.machine.resume().is_err());
    assert!(rig.machine.promote(Generation(9), &PromoteFrom::ColdBoot, Gate::Open).is_err());
    rig.stands_still();
    assert_eq!(rig.machine.status().state, VmmState::Fenced);
}

#[test]
fn a_save_in_the_middle_leaves_the_machine_running_and_can_be_restored() {
    if !kvm_is_there() {
        return;
    }
    let first = rig(COUNT, 1, 1 << 20).boot(0xff, Gate::Open);
    first.counts_on(0);
    let saved = first.dir.path().join("saved");
    first.machine.save(&saved).unwrap();
    first.counts_on(0);
    let second = rig(COUNT, 1, 1 << 20);
    understudy_vmm::save::restore_ram(&saved, &second.dir.path().join("ram")).unwrap();
    let at = second.counter(0);
    assert!(at > 0);
    let from = PromoteFrom::Image { state_file: saved.join("state").display().to_string(), epoch: Epoch::ZERO };
    second.machine.promote(Generation(1), &from, Gate::Open).unwrap();
    second.counts_on(0);
}
