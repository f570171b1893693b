//! Drill and verify on real KVM: a protected machine, its standby, two replicators, and a stand-in process that runs from a copy of the
//! image.
//!
//! Needs /dev/kvm (any flavour). Without it every test says `SKIPPED`.

mod common;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::guests::{CODE_AT, COUNT, MASK, talk_and_count};
use common::{kvm_is_there, scratch, wait};
use understudy_protocol::control::{
    Gate, PromoteFrom, ReplicaState, ReplicatorRequest, ReplicatorStatus, Strategy, VerifyStarted, VmmRequest,
    VmmState, call_once,
};
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::VerifyStatus;
use understudy_replicator::codec::EncodingConfig;
use understudy_replicator::drill::verdict::Report;
use understudy_replicator::drill::{Drill, hold};
use understudy_replicator::hook::Arm;
use understudy_replicator::link::Encryption;
use understudy_replicator::process::{Config, Replicator};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::control;
use understudy_vmm::core::Event;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::Arena;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 64;
/// Pages that each vCPU of [`COUNT`] writes.
const WRITTEN_PAGES: u64 = 64;
const MACHINE: &str = "m";
const PATIENCE: Duration = Duration::from_secs(60);

/// One node: the machine's VMM and its replicator, both in this process.
struct Node {
    layout: Layout,
    shm_root: PathBuf,
    machine: Arc<Machine>,
    replicator: Option<Replicator>,
    _events: Mutex<Receiver<Event>>,
}

impl Node {
    fn start(dir: &Path, name: &str, peers: &[(String, String)], key: &Arc<Key>, code: &[u8]) -> Self {
        let dir = dir.join(name);
        let (run_root, shm_root) = (dir.join("run"), dir.join("shm"));
        let layout = Layout::new(&run_root, &shm_root, MACHINE);
        fs::create_dir_all(layout.run_dir()).unwrap();
        fs::create_dir_all(layout.shm_dir()).unwrap();
        let (sender, events) = channel();
        let config = MachineConfig {
            name: MACHINE.into(),
            memory_mib: MIB,
            vcpus: 2,
            boot: BootSource::Flat { code: code.to_vec(), at: CODE_AT },
            serial: vec![BackendConfig::File(dir.join("com1")), BackendConfig::None],
            console: Some(BackendConfig::None),
            disks: Vec::new(),
            cdroms: Vec::new(),
            nics: Vec::new(),
            watchdog: None,
            node: String::new(),
            ram_file: layout.ram(),
        };
        let machine = Arc::new(Machine::build(config, sender).unwrap());
        let arena = Arc::new(Mutex::new(Arena::open(&layout.arena(), 16 << 20).unwrap()));
        control::serve(layout.vmm_socket(), machine.clone(), arena).unwrap();
        let replicator = Replicator::start(Config {
            machine: MACHINE.into(),
            node: name.into(),
            peers: peers.to_vec(),
            key: key.clone(),
            encryption: Encryption::On,
            interval: Duration::from_millis(10),
            min_interval: Duration::from_millis(1),
            pipeline: 2,
            slow: understudy_replicator::sender::SlowLink::default(),
            // (On a loaded host everything stands still for a second now and then.)
            peer_timeout: Duration::from_secs(10),
            arm: Arm::NoCluster,
            layout: layout.clone(),
            encoding: EncodingConfig::default(),
            stage_limit: None,
            verify_every: Duration::ZERO,
        });
        Self { layout, shm_root, machine, replicator: Some(replicator.unwrap()), _events: Mutex::new(events) }
    }

    fn status(&self) -> ReplicatorStatus {
        call_once(self.layout.replicator_socket(), &ReplicatorRequest::Status, PATIENCE).unwrap()
    }

    /// Compare all of RAM, and wait for the result.
    fn verify(&self) -> VerifyStatus {
        let socket = self.layout.replicator_socket();
        let VerifyStarted { pass } = call_once(&socket, &ReplicatorRequest::Verify, PATIENCE).unwrap();
        // However long it takes, as long as it gets on.
        loop {
            let before = self.status().verify;
            assert_eq!(before.pass, pass);
            if !before.running {
                return before;
            }
            wait("the comparison gets on", || {
                let now = self.status().verify;
                !now.running || now.progress_percent > before.progress_percent
            });
        }
    }

    fn drill(&self, watch: Duration, stop: &AtomicBool) -> Result<Report, String> {
        hold(&Drill {
            machine: MACHINE,
            layout: self.layout.clone(),
            shm_root: self.shm_root.clone(),
            vmm: env!("CARGO_BIN_EXE_understudy-vmm").into(),
            watch,
            stop,
        })
    }

    /// Files of the machine here, and of nothing else.
    fn is_as_before(&self) {
        let names = |dir: &Path| {
            let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(&self.shm_root), [MACHINE], "the drill left something behind");
        assert_eq!(names(self.shm_root.parent().unwrap().join("run").as_path()), [MACHINE]);
        assert_eq!(self.machine.status().state, VmmState::Standby);
    }
}

/// A loopback address that no other test has, so that no port there is taken meanwhile, not even by a connection's near end.
fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high, low, NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A machine that runs on `a` and is protected by `b`.
struct Pair {
    a: Node,
    b: Node,
    dir: tempfile::TempDir,
}

impl Pair {
    fn protected(code: &[u8]) -> Self {
        let dir = scratch();
        Key::generate(dir.path().join("key")).unwrap();
        let key = Arc::new(Key::load(dir.path().join("key")).unwrap());
        let address = own_address();
        let peers = [("a", 7001), ("b", 7002)].map(|(name, port)| (name.to_owned(), format!("{address}:{port}")));
        let (a, b) = ["a", "b"].map(|name| Node::start(dir.path(), name, &peers, &key, code)).into();
        a.machine.core.ram.mem.write_obj(WRITTEN_PAGES - 1, GuestAddress(MASK)).unwrap();
        a.machine.promote(Generation(1), &PromoteFrom::ColdBoot, Gate::Hold).unwrap();
        call_once::<_, ()>(a.layout.replicator_socket(), &ReplicatorRequest::Promote, PATIENCE).unwrap();
        let pair = Self { a, b, dir };
        pair.wait_protected();
        pair
    }

    fn wait_protected(&self) {
        wait("the machine is protected", || self.a.status().protected);
    }

    /// The primary's output so far: every byte in order, and none twice.
    fn output(&self) -> usize {
        let out = fs::read(self.dir.path().join("a/com1")).unwrap();
        let wrong = out.iter().enumerate().find(|(i, byte)| **byte != *i as u8);
        assert_eq!(wrong, None, "the primary's output is out of order");
        out.len()
    }

    /// Change a byte of the standby's memory.
    fn damage(&self, at: u64) {
        let ram = fs::File::options().write(true).open(self.b.layout.ram()).unwrap();
        ram.write_all_at(&[0; 64], at).unwrap();
    }
}

#[test]
fn a_drill_shows_that_the_guest_lives_while_protection_goes_on_and_leaves_nothing_behind() {
    if !kvm_is_there() {
        return;
    }
    let pair = Pair::protected(&talk_and_count());
    let (before, sent) = (pair.a.status(), pair.output());
    let report = pair.b.drill(Duration::from_secs(1), &AtomicBool::new(false)).unwrap();
    let (after, sent_meanwhile) = (pair.a.status(), pair.output());
    println!("{}", report.text());
    assert!(report.alive, "{report:?}");
    assert_eq!((report.moved, report.vcpus), (2, 2), "{report:?}");
    assert!(report.pages_written > 0 && report.ran_ns > 500_000_000, "{report:?}");
    assert_eq!(report.outputs.iter().map(|(port, _)| port.as_str()).collect::<Vec<_>>(), ["com1", "com2", "hvc0"]);
    assert!(report.outputs[0].1 > 0, "what it would have sent is counted: {report:?}");
    assert!(report.copied.epoch >= before.committed && report.copied.epoch <= after.committed, "{report:?}");

    assert!(after.committed.0 > before.committed.0 + 10, "epochs went on: {} to {}", before.committed, after.committed);
    assert!(after.protected && after.losses == before.losses, "{after:?}");
    wait("the primary's outputs go on", || pair.output() > sent_meanwhile.max(sent) + 100);
    assert!(fs::read(pair.dir.path().join("b/com1")).unwrap().is_empty(), "the drill's output has left");
    pair.b.is_as_before();

    let why = pair.a.drill(Duration::from_secs(1), &AtomicBool::new(false)).unwrap_err();
    assert!(why.contains("is the sender"), "{why}");
}

#[test]
fn an_image_whose_guest_crashes_or_whose_state_is_damaged_does_not_live() {
    if !kvm_is_there() {
        return;
    }
    let mut pair = Pair::protected(&talk_and_count());
    // The guest's code is gone; no epoch brings it again, because the primary does not write to it.
    pair.damage(CODE_AT);
    let report = pair.b.drill(Duration::from_secs(2), &AtomicBool::new(false)).unwrap();
    assert!(!report.alive, "{report:?}");
    let findings = report.findings.join("; ");
    // (What a triple fault is called depends on the KVM.)
    assert!(["has reset the machine", "cannot run any further"].iter().any(|s| findings.contains(s)), "{findings}");
    pair.b.is_as_before();
    assert!(pair.a.status().protected);

    // Without a primary the image stays as it is; then its state is damaged.
    drop(pair.a.replicator.take());
    wait("the standby is alone", || !pair.b.status().connected);
    let image = pair.b.layout.image_dir();
    let state = fs::read_dir(&image).unwrap().map(|e| e.unwrap().path());
    let state: Vec<_> =
        state.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("state-")).collect();
    assert_eq!(state.len(), 1, "{state:?}");
    let mut bytes = fs::read(&state[0]).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state[0], bytes).unwrap();
    let report = pair.b.drill(Duration::from_secs(2), &AtomicBool::new(false)).unwrap();
    let findings = report.findings.join("; ");
    assert!(!report.alive && findings.contains("cannot be started from the copy"), "{findings}");
    pair.b.is_as_before();
}

#[test]
fn a_drill_that_is_interrupted_leaves_nothing_behind() {
    if !kvm_is_there() {
        return;
    }
    let pair = Pair::protected(&talk_and_count());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let drill = scope.spawn(|| pair.b.drill(Duration::from_secs(600), &stop));
        let socket = pair.b.shm_root.join(".drill-m/run/drill/vmm.sock");
        wait("the stand-in runs", || socket.exists());
        let second = pair.b.drill(Duration::from_secs(1), &AtomicBool::new(false)).unwrap_err();
        assert!(second.contains("under way"), "{second}");
        stop.store(true, Ordering::SeqCst);
        let why = drill.join().unwrap().unwrap_err();
        assert!(why.contains("interrupted"), "{why}");
    });
    pair.b.is_as_before();
    assert_eq!(pair.b.status().replica, ReplicaState::UpToDate);
}

#[test]
fn the_memories_agree_for_every_strategy_while_the_guest_writes_and_a_lost_write_is_named() {
    if !kvm_is_there() {
        return;
    }
    let pair = Pair::protected(COUNT);
    let tell = |request: VmmRequest| call_once::<_, ()>(pair.a.layout.vmm_socket(), &request, PATIENCE).unwrap();
    // Two vCPUs that do nothing but write would leave no processor to those who compare.
    tell(VmmRequest::Throttle { percent: 20 });
    for strategy in Strategy::ALL {
        tell(VmmRequest::SetCapture { strategy });
        let result = pair.a.verify();
        println!("{}: {}", strategy.name(), result.last);
        assert_eq!(result.failures, 0, "{}: {}", strategy.name(), result.last);
        // Both vCPUs' pages and their counters' page may be written in every window.
        assert!(result.busy_pages <= 2 * WRITTEN_PAGES + 8, "{result:?}");
    }
    assert!(pair.b.status().verify.compared_pages >= 4 * (MIB * 256 - 2 * WRITTEN_PAGES - 8));
    // A write that no dirty log knows of, as a forgotten DMA would be.
    let page = 5000;
    let ram = fs::File::options().write(true).open(pair.a.layout.ram()).unwrap();
    ram.write_all_at(b"nobody saw this", page * 4096 + 7).unwrap();
    let result = pair.a.verify();
    assert_eq!((result.failures, &result.differing[..]), (1, &[page][..]), "{result:?}");
    pair.wait_protected();
    assert_eq!(pair.a.verify().failures, 1, "the new copy has it");
}
