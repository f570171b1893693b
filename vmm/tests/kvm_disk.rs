//! Disks that agree with memory, on real KVM: a guest that compares what it knows with what its disk holds, cut, taken over, left behind.
//!
//! Needs /dev/kvm. Without it every test says `SKIPPED`.
#![allow(unsafe_code)] // The guest's machine code is found by its labels.

mod common;
#[path = "../../disk/tests/common/mod.rs"]
mod target;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::guests::CODE_AT;
use common::{kvm_is_there, scratch, wait};
use understudy_disk::{Block, Disk, Format, Identity, Limits, LocalDirectory, Memory, Options, Tag, block};
use understudy_protocol::cdrom::CdromSpec;
use understudy_protocol::control::{Captured, Gate, PromoteFrom, VmmState};
use understudy_protocol::disk::{DiskBus, DiskSpec};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::container;
use understudy_vmm::core::Event;
use understudy_vmm::devices::Payload;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::{Arena, PAGE};
use understudy_vmm::session::{CutRequest, Session, SharedArena};
use vm_memory::{Bytes, GuestAddress};

core::arch::global_asm!(
    include_str!("common/virtio.s"),
    ".pushsection .rodata.understudy_disk_guest, \"a\"",
    ".globl understudy_disk_guest",
    "understudy_disk_guest:",
    ".set SCSI, 0",
    include_str!("common/disk.s"),
    ".globl understudy_disk_guest_end",
    "understudy_disk_guest_end:",
    ".globl understudy_scsi_guest",
    "understudy_scsi_guest:",
    ".set SCSI, 1",
    include_str!("common/disk.s"),
    ".globl understudy_scsi_guest_end",
    "understudy_scsi_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static understudy_disk_guest: u8;
    static understudy_disk_guest_end: u8;
    static understudy_scsi_guest: u8;
    static understudy_scsi_guest_end: u8;
}

fn guest(bus: DiskBus) -> Vec<u8> {
    let (start, end) = match bus {
        DiskBus::Virtio => (&raw const understudy_disk_guest, &raw const understudy_disk_guest_end),
        DiskBus::Scsi => (&raw const understudy_scsi_guest, &raw const understudy_scsi_guest_end),
    };
    // SAFETY: both are labels in one section of read-only data, in this order, so everything between them is one allocation.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

const MIB: u64 = 16;
const NUMBER: u64 = 0x20_0000;
const WRONG: u64 = 0x20_0008;
/// Sectors that the guest goes round in.
const ROUND: u64 = 64;

/// What both nodes see.
struct Shared {
    dir: tempfile::TempDir,
    nodes: u32,
    bus: DiskBus,
    cdroms: Vec<CdromSpec>,
    tuning: &'static str,
    /// Another base than the file.
    base: Option<String>,
}

thread_local! {
    /// How the disks of this thread's tests are read and written.
    static TUNING: std::cell::Cell<&'static str> = const { std::cell::Cell::new("") };
}

impl Shared {
    fn new() -> Self {
        Self::with(DiskBus::Virtio)
    }
    fn with(bus: DiskBus) -> Self {
        let dir = scratch();
        std::fs::write(dir.path().join("disk"), vec![0; 1 << 20]).unwrap();
        Self { dir, nodes: 0, bus, cdroms: Vec::new(), tuning: TUNING.get(), base: None }
    }
    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
    fn slices(&self) -> PathBuf {
        self.dir.path().join("disk.row")
    }
    fn spec(&self) -> DiskSpec {
        let bus = if self.bus == DiskBus::Scsi { ",bus=scsi" } else { "" };
        let slices = self.slices().display().to_string();
        match &self.base {
            Some(base) => format!("name=vda,file={base},format=raw,slices={slices}").parse().unwrap(),
            None => format!("name=vda,file={},format=raw{bus}{}", self.disk().display(), self.tuning).parse().unwrap(),
        }
    }
    /// A machine on a node of its own, its RAM holding this image.
    fn node(&mut self, image: Option<&[u8]>) -> Node {
        self.nodes += 1;
        let dir = self.dir.path().join(format!("n{}", self.nodes));
        std::fs::create_dir(&dir).unwrap();
        if let Some(image) = image {
            std::fs::write(dir.join("ram"), image).unwrap();
        }
        let (sender, events) = channel();
        let config = MachineConfig {
            name: "test".into(),
            memory_mib: MIB,
            vcpus: 1,
            boot: BootSource::Flat { code: guest(self.bus), at: CODE_AT },
            serial: vec![BackendConfig::File(dir.join("com1"))],
            console: None,
            disks: vec![self.spec()],
            cdroms: self.cdroms.clone(),
            nics: Vec::new(),
            watchdog: None,
            node: format!("n{}", self.nodes),
            ram_file: dir.join("ram"),
        };
        let machine = Arc::new(Machine::build(config, sender).unwrap());
        let arena = Arc::new(Mutex::new(Arena::open(&dir.join("arena"), 16 << 20).unwrap()));
        Node { machine, arena, dir, events }
    }
}

struct Node {
    machine: Arc<Machine>,
    arena: SharedArena,
    dir: PathBuf,
    events: Receiver<Event>,
}

/// A whole image as a standby holds it.
#[derive(Clone)]
struct Image {
    ram: Vec<u8>,
    state: Vec<u8>,
}

impl Node {
    fn boot(self, generation: u64, gate: Gate) -> Self {
        self.machine.promote(Generation(generation), &PromoteFrom::ColdBoot, gate).unwrap();
        self
    }
    fn take_over(&self, generation: u64, state: &[u8]) -> anyhow::Result<()> {
        let file = self.dir.join("state");
        std::fs::write(&file, state).unwrap();
        let from = PromoteFrom::Image { state_file: file.to_str().unwrap().into(), epoch: Epoch(1) };
        self.machine.promote(Generation(generation), &from, Gate::Hold)
    }
    fn word(&self, at: u64) -> u64 {
        self.machine.core.ram.mem.read_obj(GuestAddress(at)).unwrap()
    }
    fn number(&self) -> u64 {
        self.word(NUMBER)
    }
    fn agrees(&self) -> bool {
        self.word(WRONG) == 0
    }
    /// The guest goes on so far, and disk and memory agree.
    fn goes_on(&self, by: u64) {
        let from = self.number();
        wait("the guest goes on, or finds that disk and memory differ", || {
            // A machine whose gate is held can say no more than 64 KiB, and then waits: it has gone round often enough.
            !self.agrees() || self.number() >= from + by || self.machine.status().serial[0].tx_held > 60_000
        });
        assert!(self.agrees(), "the guest at {} finds something else on its disk", self.number());
    }
    fn attach(&self) -> Session {
        let mut session = Session::attach(self.machine.clone(), self.arena.clone()).unwrap().0;
        session.dirty_log_start().unwrap();
        session
    }
    fn ram(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("ram")).unwrap()
    }
    fn arena_bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        std::fs::File::open(self.dir.join("arena")).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
    /// Cut; the image becomes that of the cut.
    fn cut(&self, session: &mut Session, epoch: u64, arm: bool, last: bool, image: &mut Image) {
        let request = CutRequest { epoch: Epoch(epoch), arm, last, again: false };
        let mut piece: Captured = session.cut(request).unwrap();
        loop {
            let indices = self.arena_bytes(piece.indices_offset, piece.pages * 8);
            let pages = self.arena_bytes(piece.pages_offset, piece.pages * PAGE as u64);
            for (index, page) in indices.chunks(8).zip(pages.chunks(PAGE)) {
                let at = u64::from_le_bytes(index.try_into().unwrap()) as usize * PAGE;
                image.ram[at..at + PAGE].copy_from_slice(page);
            }
            if !piece.more {
                image.state = self.arena_bytes(piece.state_offset, piece.state_len);
                return;
            }
            piece = session.cut_continue().unwrap();
        }
    }
    /// Cut, sealed and committed.
    fn checkpoint(&self, session: &mut Session, epoch: u64, arm: bool, image: &mut Image) {
        self.cut(session, epoch, arm, false, image);
        session.seal_disks(Epoch(epoch)).unwrap();
        session.committed(Epoch(epoch)).unwrap();
    }
    /// The numbers that were seen outside.
    fn outside(&self) -> Vec<u32> {
        let bytes = std::fs::read(self.dir.join("com1")).unwrap_or_default();
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }
    fn mode(&self) -> String {
        self.machine.status().disks[0].mode.clone()
    }
    fn is_fenced_by(&self, generation: u64) {
        let event = self.events.recv_timeout(Duration::from_secs(20)).expect("an event");
        assert_eq!(event, Event::Fenced(Generation(generation)));
    }
    /// The process ends.
    fn end(self) {
        self.machine.halt();
    }
}

fn number_of(image: &Image) -> u64 {
    u64::from_le_bytes(image.ram[NUMBER as usize..][..8].try_into().unwrap())
}

/// A little chance, the same each time.
struct Random(u64);
impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }
}

#[test]
fn an_unprotected_machine_writes_its_disk_and_says_only_what_is_on_it() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Open);
    node.goes_on(3 * ROUND);
    assert_eq!(node.mode(), "direct");
    node.machine.pause().unwrap();
    let (said, disk) = (node.outside(), std::fs::read(shared.disk()).unwrap());
    let last = *said.last().unwrap();
    assert!(said.len() as u64 > ROUND && said.iter().copied().eq(64..=last));
    for number in said.iter().rev().take(ROUND as usize - 1) {
        let at = (*number as usize % ROUND as usize) * 512;
        let held = u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
        // The one after the last may have been written.
        assert!(held == u64::from(*number) || held == u64::from(*number) + ROUND, "{number}: {held}");
    }
    node.machine.resume().unwrap();
    node.goes_on(ROUND);
    node.end();
}

#[test]
fn the_same_holds_with_io_uring_past_the_page_cache() {
    if !kvm_is_there() {
        return;
    }
    TUNING.set(",cache=none,aio=io_uring");
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Open);
    let io = node.machine.status().disks[0].io.clone();
    node.end();
    if io != "cache=none,aio=io_uring" {
        println!("SKIPPED: this host gives {io} instead");
        return;
    }
    an_unprotected_machine_writes_its_disk_and_says_only_what_is_on_it();
    while_the_machine_stands_still_its_disk_writes_nothing_into_its_ram();
    after_every_takeover_disk_and_memory_agree_and_who_was_left_behind_is_fenced();
    sessions_that_come_and_go_at_any_stage_of_an_epoch_leave_a_whole_disk();
    the_last_cut_hands_the_disk_over();
}

#[test]
fn while_the_machine_stands_still_its_disk_writes_nothing_into_its_ram() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Open);
    let (mut caught, since) = (0, Instant::now());
    while caught < 5 && since.elapsed() < Duration::from_secs(30) {
        node.machine.pause().unwrap();
        let under_way = node.machine.status().disks[0].in_flight;
        if under_way > 0 {
            let ram = node.ram();
            caught += 1;
            // What was asked is done meanwhile, and waits to be handed in.
            let until = Instant::now() + Duration::from_millis(5);
            while Instant::now() < until {
                std::thread::yield_now();
            }
            assert!(node.ram() == ram, "RAM has changed while the machine stood still");
            assert_eq!(node.machine.status().disks[0].in_flight, under_way);
        }
        node.machine.resume().unwrap();
    }
    assert_eq!(caught, 5, "too few pauses met a request that was under way");
    node.goes_on(ROUND);
    node.end();
}

/// Where a primary is cut off, and what its standby holds then.
#[test]
fn after_every_takeover_disk_and_memory_agree_and_who_was_left_behind_is_fenced() {
    if !kvm_is_there() {
        return;
    }
    take_over_again_and_again(Shared::new(), Random(0x1234_5678_9abc_def1));
}

#[test]
fn after_every_takeover_a_scsi_disk_and_memory_agree() {
    if !kvm_is_there() {
        return;
    }
    take_over_again_and_again(Shared::with(DiskBus::Scsi), Random(0x0fed_cba9_8765_4321));
}

fn take_over_again_and_again(mut shared: Shared, mut random: Random) {
    let mut node = shared.node(None).boot(1, Gate::Hold);
    let mut stages = [0; 4];
    for generation in 1..=12 {
        let mut session = node.attach();
        let mut image = Image { ram: node.ram(), state: Vec::new() };
        let mut held = None;
        let epochs = 2 + random.below(6);
        for epoch in 1..=epochs {
            node.goes_on(random.below(2 * ROUND));
            node.cut(&mut session, epoch, epoch == 1, false, &mut image);
            assert_eq!(node.mode(), "protected");
            // The first epoch at least is committed; the last gets only so far.
            let stage = if epoch == 1 || epoch < epochs { 3 } else { random.below(4) };
            if stage >= 1 {
                session.seal_disks(Epoch(epoch)).unwrap();
            }
            if stage >= 2 {
                held = Some(image.clone());
            }
            if stage >= 3 {
                session.committed(Epoch(epoch)).unwrap();
            }
            if epoch == epochs {
                stages[stage as usize] += 1;
            }
        }
        let held = held.unwrap();
        // What left the machine by now is in what the standby holds.
        wait("outputs have arrived", || node.machine.drained());
        let most = 63 + node.machine.status().serial[0].tx_acked / 4;
        assert!(most <= number_of(&held), "{most} was seen outside, the image is at {}", number_of(&held));

        let next = shared.node(Some(&held.ram));
        if random.below(2) == 0 {
            // Its power is cut: nothing of it happens any more.
            node.machine.vcpus.stop_all();
            next.take_over(generation + 1, &held.state).unwrap();
            drop(session);
            node.machine.vcpus.stop_all();
            node.end();
        } else {
            // It is left behind, and goes on as if nothing had happened.
            next.take_over(generation + 1, &held.state).unwrap();
            next.goes_on(random.below(ROUND));
            drop(session);
            let mut session = node.attach();
            assert!(session.gate_open().is_err(), "a veto that cannot be, and a disk that is another's");
            node.is_fenced_by(generation + 1);
            node.machine.fence();
            drop(session);
            node.end();
        }
        next.goes_on(ROUND + random.below(ROUND));
        assert_eq!(next.machine.status().problem(), None);
        node = next;
    }
    assert!(stages.iter().filter(|n| **n > 0).count() >= 3, "{stages:?}");
    node.end();
}

trait Problem {
    fn problem(&self) -> Option<String>;
}
impl Problem for understudy_protocol::control::VmmStatus {
    /// Of its disks.
    fn problem(&self) -> Option<String> {
        // That an earlier owner still holds the base is none of its own.
        self.disks
            .iter()
            .find_map(|disk| disk.problem.clone())
            .filter(|problem| !problem.contains("cannot be merged yet"))
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Tags {
    tags: Vec<(String, Tag)>,
}

/// The saved state with another tag.
fn with_tag(state: &[u8], tag: Tag) -> Vec<u8> {
    let mut payloads = container::decode(state).unwrap().into_vec();
    let disks = payloads.iter_mut().find(|payload| payload.kind == "disks").unwrap();
    let tags = Tags { tags: vec![("vda".into(), tag)] };
    *disks = Payload { bytes: postcard::to_allocvec(&tags).unwrap(), ..disks.clone() };
    container::encode(&payloads)
}

#[test]
fn without_redirection_the_guest_notices_that_its_disk_is_ahead() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Hold);
    let mut session = node.attach();
    let mut image = Image { ram: node.ram(), state: Vec::new() };
    node.goes_on(ROUND);
    node.checkpoint(&mut session, 1, true, &mut image);
    // From here on everything counts at once, as if it were written to the disk itself.
    session.gate_open().unwrap();
    node.goes_on(2 * ROUND);
    node.machine.vcpus.stop_all();
    drop(session);
    node.machine.vcpus.stop_all();
    wait("all is merged", || node.machine.status().disks[0].backlog_bytes == 0);
    node.end();

    let next = shared.node(Some(&image.ram));
    let refused = format!("{:#}", next.take_over(2, &image.state).unwrap_err());
    assert!(refused.contains("disk vda") && refused.contains("the disk in"), "{refused}");
    assert_eq!((next.machine.status().state, next.mode().as_str()), (VmmState::Standby, "closed"), "nothing ran");

    // What a takeover would find had the writes gone to the disk itself: the guest sees it.
    let mut without = Shared::new();
    std::fs::copy(shared.disk(), without.disk()).unwrap();
    let never = Tag { serial: 0, generation: Generation::ZERO, epoch: Epoch::ZERO, records: 0, digest: 0 };
    let next = without.node(Some(&image.ram));
    next.take_over(2, &with_tag(&image.state, never)).unwrap();
    wait("the guest sees it", || !next.agrees());
    next.end();
}

#[test]
fn when_everything_has_lost_its_power_what_was_seen_outside_is_on_the_disk() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Hold);
    let mut session = node.attach();
    let mut image = Image { ram: node.ram(), state: Vec::new() };
    for epoch in 1..=5 {
        node.goes_on(2 * ROUND);
        node.cut(&mut session, epoch, epoch == 1, false, &mut image);
        session.seal_disks(Epoch(epoch)).unwrap();
        session.committed(Epoch(epoch)).unwrap();
    }
    node.goes_on(2 * ROUND);
    wait("outputs have arrived", || node.machine.drained());
    let most = 63 + node.machine.status().serial[0].tx_acked / 4;
    assert!(most >= 64 + 5 * ROUND);
    node.machine.vcpus.stop_all();
    drop(session);
    node.machine.vcpus.stop_all();
    node.end();

    // No checkpoint is left: the machine boots from what the disk has by itself.
    let disk = Disk::open(Options {
        base: block::open(&shared.disk(), Format::Raw, false).unwrap(),
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&shared.slices()).unwrap()),
        identity: Identity { machine: "test".into(), node: "n2".into(), generation: Generation(2) },
        memory: Memory::None,
        limits: Limits::default(),
    })
    .unwrap();
    let held: Vec<u64> = (0..ROUND)
        .map(|sector| {
            let mut bytes = [0; 512];
            disk.read_at(sector * 512, &mut bytes).unwrap();
            u64::from_le_bytes(bytes[..8].try_into().unwrap())
        })
        .collect();
    let newest = *held.iter().max().unwrap();
    assert!(newest >= most, "{most} was seen outside, the newest on the disk is {newest}");
    assert!(held.iter().all(|number| newest - number < ROUND), "{held:?}");
}

#[test]
fn the_last_cut_hands_the_disk_over() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Hold);
    let mut session = node.attach();
    let mut image = Image { ram: node.ram(), state: Vec::new() };
    for epoch in 1..=3 {
        node.goes_on(30);
        node.cut(&mut session, epoch, epoch == 1, epoch == 3, &mut image);
        session.seal_disks(Epoch(epoch)).unwrap();
        session.committed(Epoch(epoch)).unwrap();
    }
    assert_eq!(node.machine.status().state, VmmState::HandedOver);
    let next = shared.node(Some(&image.ram));
    next.take_over(2, &image.state).unwrap();
    next.goes_on(2 * ROUND);
    wait("the old one has let go, so everything can be merged", || node.mode() == "closed" && next.mode() == "direct");
    assert_eq!(number_of(&image), node.number(), "it stood still");
    next.goes_on(ROUND);
    next.end();
    node.end();
}

#[test]
fn sessions_that_come_and_go_at_any_stage_of_an_epoch_leave_a_whole_disk() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Open);
    let mut image = Image { ram: node.ram(), state: Vec::new() };
    // Sessions come and go: armed, cut and not sealed, sealed and not committed, opened again.
    for round in 0..6 {
        let mut session = node.attach();
        image.ram = node.ram();
        node.cut(&mut session, 10 * round + 1, true, false, &mut image);
        assert_eq!((node.mode().as_str(), node.machine.status().gate), ("protected", Gate::Hold));
        if round % 3 > 0 {
            session.seal_disks(Epoch(10 * round + 1)).unwrap();
        }
        if round % 3 > 1 {
            session.committed(Epoch(10 * round + 1)).unwrap();
        }
        drop(session);
        assert_eq!(node.mode(), "protected", "nobody has said that the standby is out of it");
        if round % 2 == 0 {
            let mut session = node.attach();
            session.gate_open().unwrap();
            assert_ne!(node.mode(), "protected");
            node.goes_on(ROUND);
        }
    }
    let mut session = node.attach();
    session.gate_open().unwrap();
    wait("it is direct again", || node.mode() == "direct");
    node.goes_on(2 * ROUND);
    drop(session);
    node.end();
    // What it said is there when it boots: everything is in the base.
    let still = understudy_disk::inspect::inspect(&shared.disk(), Format::Raw, &shared.slices(), |_| {}).unwrap();
    assert_eq!((still.slices.len(), still.problem), (0, None));
}

/// A small file system of its own for the slices, seen by this thread and those that it starts. `false`: that is not allowed here.
fn small_file_system(at: &Path, bytes: u64) -> bool {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    let made = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, private, none))
        .and_then(|()| mount(Some("slices"), at, Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={bytes}"))));
    if let Err(e) = made {
        eprintln!("SKIPPED: no file system can be mounted here ({e}), so nothing was proven");
    }
    made.is_ok()
}

#[test]
fn when_the_file_system_is_full_the_guests_write_waits_cuts_are_made_and_it_goes_on_when_there_is_room() {
    if !kvm_is_there() {
        return;
    }
    let body = || {
        let mut shared = Shared::new();
        std::fs::create_dir(shared.slices()).unwrap();
        if !small_file_system(&shared.slices(), 128 << 10) {
            return;
        }
        let node = shared.node(None).boot(1, Gate::Hold);
        let mut session = node.attach();
        let mut image = Image { ram: node.ram(), state: Vec::new() };
        node.checkpoint(&mut session, 1, true, &mut image);
        wait("a write finds no room", || node.machine.status().disks[0].held > 0);
        let status = node.machine.status().disks[0].clone();
        assert!(status.problem.as_ref().is_some_and(|why| why.contains("no space left")), "{status:?}");
        let number = node.number();
        // A cut is made all the same: only the storage waits.
        node.cut(&mut session, 2, false, false, &mut image);
        assert_eq!(number_of(&image), number, "the guest waits for its write");
        let room = nix::mount::MsFlags::MS_REMOUNT;
        nix::mount::mount(None::<&str>, &shared.slices(), None::<&str>, room, Some("size=16777216")).unwrap();
        node.goes_on(2 * ROUND);
        assert_eq!(node.machine.status().disks[0].problem, None);
        node.checkpoint(&mut session, 3, false, &mut image);
        let next = shared.node(Some(&image.ram));
        next.take_over(2, &image.state).unwrap();
        next.goes_on(2 * ROUND);
        next.end();
        drop(session);
        node.end();
        nix::mount::umount2(&shared.slices(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    };
    // (The mount ends with this thread and those that it starts.)
    std::thread::scope(|scope| scope.spawn(body).join().unwrap());
}

/// The storage under it goes away for as long as it likes: here an iSCSI target that is killed, as an NFS server or a path that is gone would be.
#[test]
fn when_an_iscsi_target_is_gone_requests_wait_cuts_are_made_and_nothing_is_lost_and_a_takeover_shuts_the_old_owner_out()
{
    if !kvm_is_there() {
        return;
    }
    let Some(mut tgt) = target::Tgt::start(false) else { return };
    let mut shared = Shared::new();
    shared.base = Some(tgt.url().to_string());
    std::fs::create_dir(shared.slices()).unwrap();
    let first = shared.node(None).boot(1, Gate::Hold);
    first.goes_on(ROUND + 1);
    let status = |node: &Node| node.machine.status().disks[0].clone();
    assert!(status(&first).fence.contains("persistent reservation, key 0x"), "{:?}", status(&first));
    assert_eq!((status(&first).mode.as_str(), status(&first).io.as_str()), ("direct", "cache=none,aio=libiscsi"));

    // Unprotected, it waits for its writes.
    tgt.kill();
    let gone = |node: &Node| {
        status(node)
            .problem
            .is_some_and(|why| why.contains("has not been reachable for") && why.contains("nothing is lost"))
    };
    wait("the status says that the target is gone", || gone(&first));
    let stands = first.number();
    tgt.run();
    wait("it is heard again", || !gone(&first));
    first.goes_on(ROUND);
    assert!(first.number() > stands);

    // Protected, checkpoints are made meanwhile.
    let mut session = first.attach();
    let mut image = Image { ram: first.ram(), state: Vec::new() };
    first.checkpoint(&mut session, 1, true, &mut image);
    first.goes_on(ROUND);
    tgt.kill();
    wait("the status says that the target is gone", || gone(&first));
    first.checkpoint(&mut session, 2, false, &mut image);
    tgt.run();
    first.goes_on(ROUND);
    first.checkpoint(&mut session, 3, false, &mut image);

    // The first is left behind.
    let next = shared.node(Some(&image.ram));
    next.take_over(2, &image.state).unwrap();
    next.goes_on(ROUND);
    drop(session);
    let mut session = first.attach();
    assert!(session.gate_open().is_err());
    first.is_fenced_by(2);
    first.machine.fence();
    drop(session);
    first.end();
    next.goes_on(2 * ROUND);
    assert_eq!(next.machine.status().problem(), None);
    next.end();
}

#[test]
fn a_machine_is_not_promoted_without_its_disk_and_can_be_when_it_is_free() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let first = shared.node(None).boot(1, Gate::Open);
    let second = shared.node(None);
    let refused = second.machine.promote(Generation(2), &PromoteFrom::ColdBoot, Gate::Open).unwrap_err();
    let refused = format!("{refused:#}");
    assert!(refused.contains("disk vda") && refused.contains("on n1"), "{refused}");
    assert_eq!(second.machine.status().state, VmmState::Standby);
    first.goes_on(ROUND);
    let number = first.number();
    let since = Instant::now();
    first.end();
    assert!(since.elapsed() < Duration::from_secs(20));
    // Its guest boots from nothing and finds what the other has written: that is not what it expects of an empty disk.
    second.machine.promote(Generation(2), &PromoteFrom::ColdBoot, Gate::Open).unwrap();
    wait("it reads", || !second.agrees());
    assert!(number > 64 + ROUND && second.number() == 64);
    second.end();
}

#[test]
fn what_cannot_be_done_with_disks_yet_is_refused_with_a_sentence() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::new();
    let node = shared.node(None).boot(1, Gate::Open);
    let migrate = Session::attach_to_migrate(node.machine.clone(), node.arena.clone()).err().unwrap().to_string();
    assert!(migrate.contains("migrated live yet"), "{migrate}");
    let save = node.machine.save(&node.dir.join("saved")).unwrap_err().to_string();
    assert!(save.contains("saved to a directory yet"), "{save}");
    let mut session = node.attach();
    let plain = CutRequest { epoch: Epoch(1), arm: false, last: false, again: false };
    let open = session.cut(plain).unwrap_err().to_string();
    assert!(open.contains("a cut that arms"), "{open}");
    node.goes_on(ROUND);
    drop(session);
    node.end();
}

/// A disc of so many blocks, each of them of this byte.
fn burn(at: &Path, blocks: usize, byte: u8) -> String {
    std::fs::write(at, vec![byte; blocks * 2048]).unwrap();
    at.to_str().unwrap().into()
}

#[test]
fn a_drive_holds_after_a_takeover_what_it_held_or_is_empty_and_says_why() {
    if !kvm_is_there() {
        return;
    }
    let mut shared = Shared::with(DiskBus::Scsi);
    let (first, second) = (shared.dir.path().join("1.iso"), shared.dir.path().join("2.iso"));
    let (first_name, second_name) = (burn(&first, 20, 1), burn(&second, 30, 2));
    shared.cdroms = vec![format!("name=cd0,file={first_name}").parse().unwrap(), "name=cd1".parse().unwrap()];
    let drive = |node: &Node, i: usize| node.machine.status().cdroms[i].clone();
    let node = shared.node(None).boot(1, Gate::Hold);
    assert_eq!((drive(&node, 0).file, drive(&node, 0).size_bytes), (Some(first_name.clone()), 20 * 2048));
    assert_eq!(drive(&node, 1).file, None);
    let mut session = node.attach();
    let mut image = Image { ram: node.ram(), state: Vec::new() };
    node.checkpoint(&mut session, 1, true, &mut image);
    node.machine.insert("cd1", &second_name, false).unwrap();
    node.machine.eject("cd0", false).unwrap();
    node.goes_on(ROUND);
    let before = image.clone();
    node.checkpoint(&mut session, 2, false, &mut image);
    // What cannot be is refused, and changes nothing.
    std::fs::write(shared.dir.path().join("odd"), vec![0; 2048 + 512]).unwrap();
    let odd = shared.dir.path().join("odd");
    for (refused, why) in [
        (node.machine.insert("cd1", odd.to_str().unwrap(), false), "multiple of 2048"),
        (node.machine.insert("cd9", &second_name, false), "it has cd0, cd1"),
        (node.machine.insert("cd1", "/nowhere", false), "/nowhere"),
        (node.machine.eject("vda", true), "no drive"),
    ] {
        let refused = format!("{:#}", refused.unwrap_err());
        assert!(refused.contains(why), "{refused}");
    }
    assert_eq!((drive(&node, 0).file, drive(&node, 1).file), (None, Some(second_name.clone())));
    node.machine.vcpus.stop_all();

    let next = shared.node(Some(&image.ram));
    next.take_over(2, &image.state).unwrap();
    next.goes_on(2 * ROUND);
    assert_eq!((drive(&next, 0).file, drive(&next, 1).file), (None, Some(second_name.clone())));
    assert_eq!((drive(&next, 0).problem, drive(&next, 1).problem), (None, None));
    // The next one finds another disc under the same name, and its own configured one not used.
    let mut session_ = next.attach();
    let mut image = Image { ram: next.ram(), state: Vec::new() };
    next.checkpoint(&mut session_, 1, true, &mut image);
    next.machine.vcpus.stop_all();
    burn(&second, 30, 3);
    let last = shared.node(Some(&image.ram));
    last.take_over(3, &image.state).unwrap();
    last.goes_on(2 * ROUND);
    let empty = drive(&last, 1);
    assert_eq!(empty.file, None);
    assert!(empty.problem.is_some_and(|why| why.contains("another image here")), "{:?}", drive(&last, 1).problem);
    last.machine.insert("cd1", &second_name, false).unwrap();
    assert_eq!((drive(&last, 1).file, drive(&last, 1).problem), (Some(second_name), None));
    assert_ne!(before.state, image.state);
    for (node, session) in [(node, Some(session)), (next, Some(session_)), (last, None)] {
        drop(session);
        node.machine.vcpus.stop_all();
        node.end();
    }
}

#[test]
fn a_disk_grows_while_it_is_protected_and_is_as_large_after_a_takeover() {
    if !kvm_is_there() {
        return;
    }
    for bus in [DiskBus::Virtio, DiskBus::Scsi] {
        let mut shared = Shared::with(bus);
        let size = |node: &Node| node.machine.status().disks[0].size_bytes;
        let node = shared.node(None).boot(1, Gate::Hold);
        let mut session = node.attach();
        let mut image = Image { ram: node.ram(), state: Vec::new() };
        node.checkpoint(&mut session, 1, true, &mut image);
        node.goes_on(ROUND);
        node.machine.resize_disk("vda", 3 << 20).unwrap();
        assert_eq!(size(&node), 3 << 20);
        if bus == DiskBus::Virtio {
            // The checkpoint is older than the new size.
            node.goes_on(ROUND);
        }
        for (refused, why) in [
            (node.machine.resize_disk("vda", 2 << 20), "cannot be made smaller"),
            (node.machine.resize_disk("vda", (4 << 20) + 1), "whole number of sectors"),
            (node.machine.resize_disk("vdb", 4 << 20), "it has vda"),
        ] {
            let refused = format!("{:#}", refused.unwrap_err());
            assert!(refused.contains(why), "{refused}");
        }
        if bus == DiskBus::Scsi {
            // (The guest takes a unit attention for an error: it is cut before its next command, or after that one.)
            node.machine.vcpus.stop_all();
        }
        let next = shared.node(Some(&image.ram));
        next.take_over(2, &image.state).unwrap();
        assert_eq!(size(&next), 3 << 20);
        if bus == DiskBus::Virtio {
            next.goes_on(2 * ROUND);
        } else {
            wait("the guest is told, and takes it for an error", || !next.agrees());
        }
        for (node, session) in [(node, Some(session)), (next, None)] {
            node.machine.vcpus.stop_all();
            drop(session);
            node.machine.vcpus.stop_all();
            node.end();
        }
    }
}

#[test]
fn a_base_that_shrank_is_the_guests_error_and_a_sentence_in_the_status() {
    if !kvm_is_there() {
        return;
    }
    for bus in [DiskBus::Virtio, DiskBus::Scsi] {
        let mut shared = Shared::with(bus);
        let node = shared.node(None).boot(1, Gate::Open);
        node.goes_on(2 * ROUND);
        std::fs::File::options().write(true).open(shared.disk()).unwrap().set_len(8 * 512).unwrap();
        wait("the guest is told", || !node.agrees());
        let problem = node.machine.status().disks[0].problem.clone().unwrap();
        assert!(problem.contains("shrank from 1048576") && problem.contains("I/O error"), "{problem}");
        node.end();
    }
}
