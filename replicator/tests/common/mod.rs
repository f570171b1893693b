//! Two nodes on one host: replicator processes, fake VMMs, a hook that writes down its calls, a link that can be cut.
#![allow(dead_code)] // Each test file uses its part.

pub mod fake_vmm;
pub mod relay;

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fake_vmm::{FakeVmm, Load, digest_of};
use relay::Relay;
use understudy_protocol::control::*;
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;

pub const MACHINE: &str = "m";
/// Longest wait for anything; a loaded build host is slow.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Wait until `what` holds.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// One node.
pub struct Node {
    pub name: &'static str,
    pub dir: PathBuf,
    pub layout: Layout,
    pub process: Option<Child>,
    pub peers: String,
    pub key: PathBuf,
    pub extra: Vec<String>,
    /// Program and arguments that start the replicator.
    pub wrapper: Vec<String>,
    pub hooked: bool,
}

impl Node {
    /// Start the replicator and wait for its socket.
    pub fn start(&mut self) {
        self.spawn();
        wait_until("the replicator answers", || {
            if let Some(status) = self.process.as_mut().unwrap().try_wait().unwrap() {
                panic!("{} ended with {status}: {}", self.name, self.log());
            }
            self.try_status().is_some()
        });
    }

    pub fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let program = env!("CARGO_BIN_EXE_understudy-replicator");
        let mut command = match self.wrapper.split_first() {
            Some((wrapper, arguments)) => {
                let mut command = Command::new(wrapper);
                command.args(arguments).arg(program);
                command
            }
            None => Command::new(program),
        };
        command
            .args(["run", "--machine", MACHINE, "--node", self.name, "--peers", &self.peers, "--key"])
            .arg(&self.key);
        command.arg("--run-root").arg(self.dir.join("run")).arg("--shm-root").arg(self.dir.join("shm"));
        if self.hooked {
            command.arg("--hook").arg(format!("/bin/sh {}", self.dir.join("hook").display()));
        }
        command.args(&self.extra).stdin(Stdio::null()).stderr(log);
        self.process = Some(command.spawn().unwrap());
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    pub fn call<R: serde::de::DeserializeOwned>(&self, request: &ReplicatorRequest) -> Result<R, String> {
        call_once(self.layout.replicator_socket(), request, PATIENCE).map_err(|e| e.to_string())
    }

    pub fn try_status(&self) -> Option<ReplicatorStatus> {
        self.call(&ReplicatorRequest::Status).ok()
    }

    pub fn status(&self) -> ReplicatorStatus {
        self.call(&ReplicatorRequest::Status).unwrap()
    }

    pub fn promote(&self) {
        self.call::<()>(&ReplicatorRequest::Promote).unwrap();
    }

    pub fn take_over(&self, generation: u64) -> Result<TakenOver, String> {
        self.call(&ReplicatorRequest::TakeOver { generation: Generation(generation) })
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// First copies that it received. (Calls of the hook do not tell: a short copy's "syncing" is overtaken by "uptodate".)
    pub fn first_copies(&self) -> usize {
        self.log().matches("the first copy took").count()
    }

    /// The hook's calls so far, one a line.
    pub fn hook_calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Let vetoes fail, or succeed again.
    pub fn refuse_vetoes(&self, refuse: bool) {
        let mark = self.dir.join("refuse");
        if refuse {
            fs::write(mark, "").unwrap();
        } else {
            fs::remove_file(mark).unwrap();
        }
    }

    pub fn vmm(&self, load: Load, state: VmmState, generation: u64) -> Arc<FakeVmm> {
        FakeVmm::start(&self.layout, load, state, generation)
    }

    pub fn ram_digest(&self) -> [u8; 32] {
        digest_of(&File::open(self.layout.ram()).unwrap())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if thread::panicking() {
            eprintln!("--- log of {}\n{}--- hook calls\n{:#?}", self.name, self.log(), self.hook_calls());
        }
    }
}

/// Two nodes and the link between them.
pub struct Pair {
    pub n1: Node,
    pub n2: Node,
    /// From n1 to n2.
    pub link: Relay,
    pub dir: tempfile::TempDir,
}

pub struct Options {
    pub load: Load,
    pub extra: &'static [&'static str],
    pub hooked: bool,
}

impl Options {
    /// For tests of what happens when a peer falls silent.
    pub fn impatient() -> Self {
        Self { extra: &["--interval-ms", "10", "--peer-timeout-ms", "1000"], ..Self::default() }
    }
}

impl Default for Options {
    fn default() -> Self {
        // (On a loaded build host everything stands still for a second now and then; that must not look like a lost peer.)
        Self { load: Load::default(), extra: &["--interval-ms", "10", "--peer-timeout-ms", "10000"], hooked: true }
    }
}

/// A directory in shared memory where there is one.
pub fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// A loopback address that no other test has, so that no port there is taken meanwhile, not even by a connection's near end.
pub fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high, low, NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Pair {
    /// Both nodes prepared, nothing started.
    pub fn new(options: &Options) -> Self {
        let dir = scratch();
        let key = dir.path().join("key");
        Key::generate(&key).unwrap();
        let address = own_address();
        let (at1, at2) = (format!("{address}:7001"), format!("{address}:7002"));
        let link = Relay::start(at2.clone());
        let node = |name: &'static str, peers: String| {
            let home = dir.path().join(name);
            fs::create_dir(&home).unwrap();
            let script = format!(
                "echo \"$@\" >> {0}/calls\nif [ \"$1\" = veto ] && [ -e {0}/refuse ]; then echo no quorum >&2; exit 1; fi\n",
                home.display()
            );
            fs::write(home.join("hook"), script).unwrap();
            Node {
                name,
                layout: Layout::new(home.join("run"), home.join("shm"), MACHINE),
                dir: home,
                process: None,
                peers,
                key: key.clone(),
                wrapper: Vec::new(),
                extra: options.extra.iter().map(|s| s.to_string()).collect(),
                hooked: options.hooked,
            }
        };
        let n1 = node("n1", format!("n1={at1} n2=127.0.0.1:{}", link.port()));
        let n2 = node("n2", format!("n1={at1} n2={at2}"));
        Self { n1, n2, link, dir }
    }

    /// n1 runs generation 1, n2 stands by, both replicators started, n1's promoted.
    pub fn started(options: &Options) -> (Self, Arc<FakeVmm>, Arc<FakeVmm>) {
        let mut pair = Self::new(options);
        let primary = pair.n1.vmm(options.load, VmmState::Running, 1);
        let standby = pair.n2.vmm(options.load, VmmState::Standby, 0);
        pair.n1.start();
        pair.n2.start();
        pair.n1.promote();
        (pair, primary, standby)
    }

    pub fn wait_protected(&self) {
        wait_until("the machine is protected", || self.n1.try_status().is_some_and(|s| s.protected));
    }

    /// Wait until at least `count` more epochs are committed.
    pub fn wait_epochs(&self, count: u64) {
        let end = self.n1.status().committed.0 + count;
        wait_until("epochs are committed", || self.n1.status().committed.0 >= end);
    }
}

/// The standby's image after a take-over is what the primary's RAM was at that epoch's cut.
pub fn assert_image(node: &Node, taken: &TakenOver, primary: &FakeVmm) -> u64 {
    assert_image_below("", node, taken, primary)
}

/// The same for a node whose files are below `root`.
pub fn assert_image_below(root: &str, node: &Node, taken: &TakenOver, primary: &FakeVmm) -> u64 {
    let ram = File::open(format!("{root}{}", node.layout.ram().display())).unwrap();
    let image = taken.image.as_ref().expect("there is an image");
    let machine = primary.machine();
    assert_eq!(Some(&digest_of(&ram)), machine.snapshots.get(&image.epoch.0), "RAM of epoch {}", image.epoch);
    let state = fs::read_to_string(format!("{root}{}", image.state_file)).unwrap();
    assert_eq!(state, format!("devices at epoch {} of generation {}", image.epoch, image.generation));
    assert!(image.epoch >= machine.last_committed, "an epoch that the VMM was told of is lost");
    image.epoch.0
}
