//! Network cards: taps in a bridge in a network namespace of the test's own; and on real KVM a guest that asks and waits for its answer, held, released, handed
//! over, fenced.
//!
//! What needs /dev/kvm, or a namespace and /dev/net/tun, says `SKIPPED` without them.
#![allow(unsafe_code)] // The guest's machine code is found by its labels.

mod common;

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::guests::CODE_AT;
use common::{kvm_is_there, scratch, wait};
use nix::sched::{CloneFlags, unshare};
use understudy_protocol::control::{Gate, NicStatus, PromoteFrom, VmmState};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::nic::{Mac, NicSpec};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::devices::virtio::net::Offloads;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::Arena;
use understudy_vmm::net::backend::{self, NetBackend, Sent};
use understudy_vmm::net::packet::Packet;
use understudy_vmm::net::sys::Interfaces;
use understudy_vmm::session::{CutRequest, Session, SharedArena};
use vm_memory::{Bytes, GuestAddress};

core::arch::global_asm!(
    include_str!("common/virtio.s"),
    ".pushsection .rodata.understudy_net_guest, \"a\"",
    ".globl understudy_net_guest",
    "understudy_net_guest:",
    include_str!("common/net.s"),
    ".globl understudy_net_guest_end",
    "understudy_net_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    static understudy_net_guest: u8;
    static understudy_net_guest_end: u8;
}

fn guest() -> Vec<u8> {
    let (start, end) = (&raw const understudy_net_guest, &raw const understudy_net_guest_end);
    // SAFETY: both are labels in one section of read-only data, in this order, so everything between them is one allocation.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

const MIB: u64 = 16;
const NUMBER: u64 = 0x20_0000;
const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

// ---- taps

/// In a thread of its own, in a network namespace of its own. Where this host does not let us it says so and does nothing.
fn in_namespace(f: impl FnOnce() + Send + 'static) {
    let test = std::thread::spawn(move || {
        let there = Path::new("/dev/net/tun").exists()
            && unshare(CloneFlags::CLONE_NEWNET).is_ok()
            && ip(&["link", "add", "br0", "type", "bridge"]);
        if there {
            f();
        } else {
            eprintln!("SKIPPED: no namespace with taps and bridges here, so nothing was proven");
        }
    });
    test.join().unwrap();
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip").args(args).status().is_ok_and(|status| status.success())
}

fn open(spec: &str) -> anyhow::Result<Box<dyn NetBackend>> {
    backend::open(&spec.parse().unwrap(), MAC)
}

/// A frame of no protocol that the host's kernel knows.
fn frame(number: u8) -> Packet {
    let mut frame = [&[0xff; 6][..], &MAC.0, &[0x88, 0xb5]].concat();
    frame.resize(60, number);
    Packet { frame, ..Packet::default() }
}

/// The numbers of our frames that arrive until this one does (or for a moment, if it does not).
fn arrived(tap: &dyn NetBackend, last: Option<u8>) -> Vec<u8> {
    let mut numbers = Vec::new();
    let mut buffer = [0; 2048];
    let patience = if last.is_some() { Duration::from_secs(20) } else { Duration::from_millis(30) };
    let since = Instant::now();
    while since.elapsed() < patience && (last.is_none() || numbers.last() != last.as_ref()) {
        match tap.receive(0, &mut buffer) {
            Ok(Some(n)) if n == 72 && buffer[24..26] == [0x88, 0xb5] => numbers.push(buffer[30]),
            Ok(Some(_)) => {}
            _ => std::thread::yield_now(),
        }
    }
    numbers
}

fn gone(sent: &Sent) -> bool {
    matches!(sent, Sent::Gone)
}

#[test]
fn taps_are_made_put_into_a_bridge_and_silent_while_they_are_down() {
    in_namespace(|| {
        assert!(ip(&["link", "set", "br0", "up"]));
        let (a, b) = (open("name=a,tap=ta,bridge=br0").unwrap(), open("name=b,tap=tb,bridge=br0").unwrap());
        let here = Interfaces::here().unwrap();
        assert!(!here.is_up("ta").unwrap() && !here.is_up("tb").unwrap(), "until the machine runs");
        b.set_up(true).unwrap();
        assert!(!gone(&a.send(&frame(1))), "its own port is down");
        a.set_up(true).unwrap();
        assert!(gone(&a.send(&frame(2))));
        assert_eq!(arrived(&*b, Some(2)), [2]);
        a.set_up(false).unwrap();
        assert!(gone(&b.send(&frame(3))) && arrived(&*a, None).is_empty() && !gone(&a.send(&frame(4))));
        assert!(arrived(&*b, None).is_empty());
        drop(a);
        assert!(here.index("ta").is_err(), "what was made goes");
        open("name=a,tap=ta,bridge=br0").unwrap();
    });
}

#[test]
fn a_tap_that_is_there_is_used_and_stays() {
    in_namespace(|| {
        assert!(ip(&["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr", "multi_queue"]));
        assert!(ip(&["link", "set", "tap0", "master", "br0", "up"]));
        let here = Interfaces::here().unwrap();
        let tap = open("name=a,tap=tap0,bridge=br0,queues=2,mtu=9000").unwrap();
        assert!(!here.is_up("tap0").unwrap());
        tap.set_offloads(Offloads { csum: true, tso4: true, tso6: true, ecn: true }).unwrap();
        assert!(tap.waits_on(1).is_some() && tap.queues() == 2);
        drop(tap);
        assert!(here.index("tap0").is_ok());
    });
}

#[test]
fn what_cannot_be_opened_is_told_with_what_to_do() {
    in_namespace(|| {
        let why = |spec: &str| format!("{:#}", open(spec).unwrap_err());
        assert!(why("name=a,tap=ta,bridge=br9").contains("no bridge br9"));
        assert!(ip(&["tuntap", "add", "one", "mode", "tap", "vnet_hdr"]));
        // (Some kernels let an interface of one queue have another as long as nobody uses it.)
        if let Err(e) = open("name=a,tap=one,queues=2") {
            assert!(format!("{e:#}").contains("ip tuntap add one mode tap vnet_hdr multi_queue"), "{e:#}");
        }
        assert!(why("name=a,tap=br0").contains("does not fit"));
        let _taken = open("name=a,tap=taken").unwrap();
        assert!(why("name=a,tap=taken").contains("in use by somebody else"));
        assert!(why("name=a,macvtap=none").contains("no interface none"));
        assert!(why("name=a,stream=/nobody").contains("nobody listens"));
    });
}

// ---- a guest

/// Who answers: everything that comes to `outside` goes back, and the numbers are noted.
struct Echo {
    stop: Arc<AtomicBool>,
    /// Highest number seen, and how many frames.
    highest: Arc<AtomicU64>,
    frames: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Echo {
    fn start(dir: &Path, to: &Path) -> Self {
        let socket = UnixDatagram::bind(dir.join("outside")).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let (stop, highest, frames) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let theirs = (stop.clone(), highest.clone(), frames.clone(), to.to_owned());
        let thread = std::thread::spawn(move || {
            let (stop, highest, frames, to) = theirs;
            let mut buffer = [0; 2048];
            while !stop.load(Ordering::Relaxed) {
                let Ok(n) = socket.recv(&mut buffer) else { continue };
                // Not what the machine itself announces.
                let guests = n == 60 && buffer[12..14] == [0x88, 0xb5];
                let Some(number) = buffer.get(14..22).filter(|_| guests) else { continue };
                highest.fetch_max(u64::from_le_bytes(number.try_into().unwrap()), Ordering::SeqCst);
                frames.fetch_add(1, Ordering::SeqCst);
                let _ = socket.send_to(&buffer[..n], &to);
            }
        });
        Self { stop, highest, frames, thread: Some(thread) }
    }
    fn highest(&self) -> u64 {
        self.highest.load(Ordering::SeqCst)
    }
    fn frames(&self) -> u64 {
        self.frames.load(Ordering::SeqCst)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

struct Node {
    machine: Arc<Machine>,
    arena: SharedArena,
    dir: PathBuf,
}

impl Node {
    /// On a node of its own below `dir`; its frames go to `dir/outside`.
    fn new(dir: &Path, name: &str, ram: Option<&Path>) -> Self {
        let here = dir.join(name);
        std::fs::create_dir(&here).unwrap();
        if let Some(ram) = ram {
            std::fs::copy(ram, here.join("ram")).unwrap();
        }
        let nic: NicSpec = format!("name=net0,dgram={}:{}", here.join("net").display(), dir.join("outside").display())
            .parse()
            .unwrap();
        let config = MachineConfig {
            name: "test".into(),
            memory_mib: MIB,
            vcpus: 1,
            boot: BootSource::Flat { code: guest(), at: CODE_AT },
            serial: vec![BackendConfig::None],
            console: None,
            disks: Vec::new(),
            cdroms: Vec::new(),
            nics: vec![nic],
            watchdog: None,
            node: name.into(),
            ram_file: here.join("ram"),
        };
        let machine = Arc::new(Machine::build(config, channel().0).unwrap());
        let arena = Arc::new(Mutex::new(Arena::open(&here.join("arena"), 32 << 20).unwrap()));
        Self { machine, arena, dir: here }
    }
    fn socket(dir: &Path, name: &str) -> PathBuf {
        dir.join(name).join("net")
    }
    fn number(&self) -> u64 {
        self.machine.core.ram.mem.read_obj(GuestAddress(NUMBER)).unwrap()
    }
    fn status(&self) -> NicStatus {
        self.machine.status().nics[0].clone()
    }
    fn boot(&self, gate: Gate) {
        self.machine.promote(Generation(1), &PromoteFrom::ColdBoot, gate).unwrap();
    }
    fn passes(&self, number: u64) {
        wait("the guest has its answers", || self.number() > number);
    }
    fn holds_something(&self) {
        wait("a packet is held", || self.status().held_packets > 0);
    }
    fn attach(&self) -> Session {
        let mut session = Session::attach(self.machine.clone(), self.arena.clone()).unwrap().0;
        session.dirty_log_start().unwrap();
        session
    }
    fn cut(&self, session: &mut Session, epoch: u64, arm: bool, last: bool) -> Vec<u8> {
        let captured = session.cut(CutRequest { epoch: Epoch(epoch), arm, last, again: false }).unwrap();
        assert!(!captured.more);
        let mut state = vec![0; captured.state_len as usize];
        let arena = std::fs::File::open(self.dir.join("arena")).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&arena, &mut state, captured.state_offset).unwrap();
        state
    }
}

/// A guest on node n1 that has answers; epoch 1 is committed.
fn protected(dir: &Path) -> (Echo, Node, Session) {
    let echo = Echo::start(dir, &Node::socket(dir, "n1"));
    let node = Node::new(dir, "n1", None);
    node.boot(Gate::Open);
    node.passes(20);
    let mut session = node.attach();
    node.cut(&mut session, 1, true, false);
    session.committed(Epoch(1)).unwrap();
    (echo, node, session)
}

#[test]
fn an_unprotected_guest_has_its_answers_at_once() {
    if !kvm_is_there() {
        return;
    }
    let dir = scratch();
    let echo = Echo::start(dir.path(), &Node::socket(dir.path(), "n1"));
    let node = Node::new(dir.path(), "n1", None);
    assert_eq!(node.status().link, "down", "a standby has no voice");
    node.boot(Gate::Open);
    node.passes(200);
    let status = node.status();
    assert_eq!((status.link.as_str(), status.held_packets), ("up", 0));
    assert!(status.out_packets >= 200 && status.in_packets >= 200 && status.in_bytes >= 200 * 60, "{status:?}");
    // Stopped and gone on: nothing is lost that the guest would miss.
    node.machine.pause().unwrap();
    let stands = node.number();
    node.machine.resume().unwrap();
    node.passes(stands + 50);
    node.machine.halt();
    assert_eq!(node.status().link, "down");
    let seen = echo.frames();
    std::thread::park_timeout(Duration::from_millis(20));
    assert_eq!(echo.frames(), seen);
}

#[test]
fn while_it_is_protected_a_packet_leaves_with_its_checkpoint_and_not_before() {
    if !kvm_is_there() {
        return;
    }
    let dir = scratch();
    let (echo, node, mut session) = protected(dir.path());
    let heard = node.machine.core.await_output(0, Duration::from_secs(20));
    assert!(heard > 0, "a packet that is held asks for a cut");
    for epoch in 2..12 {
        node.holds_something();
        let (seen, asks) = (echo.highest(), node.number());
        node.cut(&mut session, epoch, false, false);
        assert_eq!(echo.highest(), seen, "cut, and not committed");
        assert!(seen < asks, "{asks} is asked, {seen} was seen");
        session.committed(Epoch(epoch)).unwrap();
        node.passes(asks);
        assert!(echo.highest() >= asks);
    }
    // Nobody commits any more: the guest asks on, and nothing of it is seen.
    node.holds_something();
    let (seen, asks) = (echo.highest(), node.number());
    drop(session);
    wait("it asks again", || node.status().held_packets > 1);
    assert_eq!((echo.highest(), node.number()), (seen, asks));
    node.machine.core.hardware().set_gate(Gate::Open);
    node.passes(asks);
    node.machine.halt();
}

#[test]
fn who_hands_over_is_silent_before_the_other_speaks_and_the_guest_goes_on_there() {
    if !kvm_is_there() {
        return;
    }
    let dir = scratch();
    let (echo, node, mut session) = protected(dir.path());
    node.holds_something();
    let state = node.cut(&mut session, 2, false, true);
    assert_eq!(node.status().link, "up", "until it is committed the machine is this node's");
    session.committed(Epoch(2)).unwrap();
    assert_eq!(node.machine.life().state, VmmState::HandedOver);
    assert_eq!((node.status().link.as_str(), node.status().held_packets), ("down", 0));
    let asks = node.number();
    wait("what the last checkpoint released has left", || echo.highest() >= asks);
    drop(echo);
    std::fs::remove_file(dir.path().join("outside")).unwrap();

    let echo = Echo::start(dir.path(), &Node::socket(dir.path(), "n2"));
    let other = Node::new(dir.path(), "n2", Some(&node.dir.join("ram")));
    let file = other.dir.join("state");
    std::fs::write(&file, state).unwrap();
    let from = PromoteFrom::Image { state_file: file.to_str().unwrap().into(), epoch: Epoch(2) };
    other.machine.promote(Generation(2), &from, Gate::Open).unwrap();
    other.passes(asks + 50);
    assert_eq!(node.number(), asks, "and stands still here");
    assert!(echo.highest() >= asks + 50);
    other.machine.halt();
    node.machine.halt();
}

#[test]
fn who_is_fenced_says_nothing_any_more_not_even_what_was_held() {
    if !kvm_is_there() {
        return;
    }
    let dir = scratch();
    let echo = Echo::start(dir.path(), &Node::socket(dir.path(), "n1"));
    let node = Node::new(dir.path(), "n1", None);
    node.boot(Gate::Hold);
    node.holds_something();
    node.machine.fence();
    // (Somebody who does not know of it yet.)
    node.machine.core.hardware().set_gate(Gate::Open);
    node.machine.core.settle();
    let status = node.status();
    assert_eq!((status.link.as_str(), status.held_packets, echo.frames()), ("down", 0, 0));
    assert!(status.dropped["runs elsewhere"] > 0);
    node.machine.halt();
}
