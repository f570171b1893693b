//! Live migration between two nodes: `migrate` and `serve-migrations` as processes, fake VMMs, a link that breaks.
//!
//! After every failure the same is asked of both nodes ([`Place::stayed`]): the machine runs on where it was with its gate open, and the
//! other node has nothing that could be run.

mod common;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::fake_vmm::{FakeVmm, Load};
use common::relay::Relay;
use common::*;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy_protocol::control::*;
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::{Layout, MIGRATIONS};

/// n1 runs the machine as generation 3 without protection, n2 listens; n2's hook has a standby VMM ready.
struct Place {
    pair: Pair,
    source: Arc<FakeVmm>,
    target: Option<Arc<FakeVmm>>,
    listener: Option<Child>,
    /// A second path to n2.
    second: Option<Relay>,
    load: Load,
}

const GENERATION: u64 = 3;

impl Place {
    fn new(load: Load) -> Self {
        Self::over(load, Pair::new(&Options::default()), None)
    }

    /// n2 is reached over two paths.
    fn doubled(load: Load) -> Self {
        let mut pair = Pair::new(&Options::default());
        let another = format!("{}:7002", own_address());
        let second = Relay::start(another.clone());
        pair.n2.peers = format!("{},{another}", pair.n2.peers);
        Self::over(load, pair, Some(second))
    }

    fn over(load: Load, pair: Pair, second: Option<Relay>) -> Self {
        let source = pair.n1.vmm(load, VmmState::Running, GENERATION);
        source.machine().gate_open = true;
        let target = Some(pair.n2.vmm(load, VmmState::Standby, 0));
        let mut place = Self { pair, source, target, listener: None, second, load };
        place.listen();
        place
    }

    fn command(&self, node: &Node, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"));
        command.args(arguments).arg("--run-root").arg(node.dir.join("run")).arg("--shm-root").arg(node.dir.join("shm"));
        command
    }

    fn listen(&mut self) {
        let node = &self.pair.n2;
        let address = node.peers.split_once("n2=").unwrap().1.to_owned();
        let hook = format!("/bin/sh {}", node.dir.join("hook").display());
        let mut command = self.command(node, &["serve-migrations", "--node", "n2", "--peer-timeout-ms", "5000"]);
        command.args(["--listen", &address, "--hook", &hook, "--key"]).arg(&node.key);
        let log = File::options().create(true).append(true).open(node.dir.join("log")).unwrap();
        let child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        self.listener = Some(child);
        wait_until("the listener answers", || self.listener_status().is_some());
    }

    fn listener_status(&self) -> Option<MigrationsStatus> {
        let node = &self.pair.n2;
        let layout = Layout::new(node.dir.join("run"), node.dir.join("shm"), MIGRATIONS);
        call_once(layout.replicator_socket(), &ReplicatorRequest::Status, Duration::from_secs(5)).ok()
    }

    fn kill_listener(&mut self) {
        let mut child = self.listener.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn migrate(&self, more: &[&str]) -> Migration {
        let node = &self.pair.n1;
        let second = self.second.as_ref().map_or(String::new(), |relay| format!(",127.0.0.1:{}", relay.port()));
        let to = format!("n2=127.0.0.1:{}{second}", self.pair.link.port());
        let mut command = self.command(node, &["migrate", "--machine", MACHINE, "--node", "n1", "--json"]);
        command.args(["--to", &to, "--peer-timeout-ms", "5000", "--key"]).arg(&node.key).args(more);
        let out = node.dir.join("progress");
        let file = File::create(&out).unwrap();
        let log = File::options().create(true).append(true).open(node.dir.join("log")).unwrap();
        Migration { child: command.stdin(Stdio::piped()).stdout(file).stderr(log).spawn().unwrap(), out }
    }

    fn take_over(&self, generation: u64) -> Result<TakenOver, String> {
        let generation = generation.to_string();
        let arguments = ["take-over", "--offline", "--handed-over", "--machine", MACHINE, "--generation", &generation];
        let out = self.command(&self.pair.n2, &arguments).output().unwrap();
        if out.status.success() {
            Ok(serde_json::from_slice(&out.stdout).unwrap())
        } else {
            Err(String::from_utf8_lossy(&out.stderr).into_owned())
        }
    }

    /// Nothing was moved: the machine runs on, speaks, and nowhere is anything of it left that could be run.
    fn stayed(&self) {
        wait_until("the session has ended", || !self.source.machine().attached);
        {
            let machine = self.source.machine();
            assert_eq!(machine.state, Some(VmmState::Running), "it runs on where it was");
            assert!(machine.gate_open, "it may speak");
        }
        let before = self.source.machine().bursts;
        wait_until("the guest writes", || self.source.machine().bursts > before + 2);
        if self.listener.is_some() {
            wait_until("the listener has let go", || self.listener_status().is_some_and(|s| s.incoming.is_empty()));
        }
        let why = self.take_over(GENERATION + 1).unwrap_err();
        assert!(why.contains("was handed over by the node"), "{why}");
    }

    /// The machine is the target's, byte for byte as it stood.
    fn arrived(&self) {
        wait_until("the session has ended", || !self.source.machine().attached);
        assert_eq!(self.source.machine().state, Some(VmmState::HandedOver));
        assert!(!self.source.machine().gate_open);
        let taken = self.take_over(GENERATION + 1).unwrap();
        assert_image(&self.pair.n2, &taken, &self.source);
        assert_eq!(taken.image.as_ref().unwrap().generation, Generation(GENERATION));
        assert_eq!(self.take_over(GENERATION + 1).unwrap(), taken, "asking again changes nothing");
    }

    fn forgotten(&self) -> usize {
        self.pair.n2.hook_calls().iter().filter(|call| call.starts_with("forget-migration")).count()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mut child) = self.listener.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Migration {
    child: Child,
    out: std::path::PathBuf,
}

impl Migration {
    fn said(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(&self.out).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn phase(&self, phase: &str) -> bool {
        self.said().iter().any(|line| line["phase"] == phase)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Its exit status, and the last thing it said.
    fn end(mut self) -> (bool, serde_json::Value) {
        let mut status = None;
        wait_until("migrate ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        (status.unwrap().success(), self.said().pop().unwrap_or_default())
    }

    fn fails(self) -> String {
        let (success, last) = self.end();
        assert!(!success && last["phase"] == "failed", "{last}");
        last["why"].as_str().unwrap().to_owned()
    }
}

/// On a slow link there is always more to copy than fits a millisecond.
const ENDLESS: [&str; 4] = ["--max-pause-ms", "1", "--max-rounds", "1000"];

fn calm() -> Load {
    Load { pause: Some(Duration::from_millis(5)), burst: 20, ..Load::default() }
}

#[test]
fn a_running_machine_moves_byte_for_byte_and_its_old_vmm_never_runs_again() {
    let place = Place::new(calm());
    let migration = place.migrate(&[]);
    let (success, last) = migration.end();
    assert!(success && last["phase"] == "done", "{last}");
    assert!(last["rounds"].as_u64().unwrap() >= 1);
    place.arrived();
    let calls = place.pair.n2.hook_calls();
    assert!(calls[0].starts_with("prepare-migration --machine m --from n1 --run-root "), "{calls:?}");
    assert_eq!(place.forgotten(), 0);
    let why = place.migrate(&[]).fails();
    assert!(why.contains("this one is HandedOver"), "{why}");
}

#[test]
fn a_machine_moves_over_the_path_that_is_left() {
    let place = Place::doubled(calm());
    for relay in [&place.pair.link, place.second.as_ref().unwrap()] {
        relay.slow_down(5);
    }
    let migration = place.migrate(&[]);
    wait_until("something arrives", || {
        place.listener_status().is_some_and(|s| s.incoming.iter().any(|i| i.progress > 0.0))
    });
    place.pair.link.go_silent();
    let (success, last) = migration.end();
    assert!(success && last["phase"] == "done", "{last}");
    place.arrived();
}

#[test]
fn a_cancelled_migration_leaves_the_machine_where_it_is_in_every_phase() {
    // While the target prepares itself.
    let place = Place::new(calm());
    let hook = place.pair.n2.dir.join("hook");
    let script = fs::read_to_string(&hook).unwrap();
    fs::write(&hook, format!("{script}if [ $1 = prepare-migration ]; then sleep 1; fi\n")).unwrap();
    let migration = place.migrate(&[]);
    wait_until("the hook was called", || !place.pair.n2.hook_calls().is_empty());
    migration.signal(Signal::SIGTERM);
    assert!(migration.fails().contains("cancelled; the machine runs on here"));
    place.stayed();
    fs::write(&hook, script).unwrap();
    for phase in ["copying", "rounds"] {
        place.pair.link.slow_down(20);
        let migration = place.migrate(&ENDLESS);
        wait_until("it has come so far", || migration.phase(phase));
        assert!(place.source.machine().gate_open, "nothing is held back while it copies");
        migration.signal(Signal::SIGTERM);
        assert!(migration.fails().contains("cancelled; the machine runs on here"), "{phase}");
        place.pair.link.slow_down(0);
        place.stayed();
    }
    assert!(place.migrate(&[]).end().0, "and then it can be migrated");
    place.arrived();
}

#[test]
fn a_migration_that_is_killed_after_the_last_cut_leaves_the_machine_running() {
    let place = Place::new(calm());
    place.pair.link.slow_down(40);
    let mut migration = place.migrate(&[]);
    wait_until("the last cut is made", || place.source.machine().last_cut.0 > 0);
    let listener = Pid::from_raw(place.listener.as_ref().unwrap().id() as i32);
    kill(listener, Signal::SIGSTOP).unwrap();
    assert!(!place.source.machine().gate_open, "the machine stands still, and what it said last waits");
    migration.signal(Signal::SIGKILL);
    migration.child.wait().unwrap();
    kill(listener, Signal::SIGCONT).unwrap();
    place.stayed();
}

#[test]
fn a_link_that_falls_silent_after_the_last_cut_lets_the_machine_run_on() {
    let place = Place::new(calm());
    place.pair.link.slow_down(40);
    let migration = place.migrate(&[]);
    wait_until("the last cut is made", || place.source.machine().last_cut.0 > 0);
    place.pair.link.go_silent();
    let why = migration.fails();
    assert!(why.contains("the machine runs on here"), "{why}");
    place.pair.link.heal();
    place.stayed();
}

#[test]
fn whoever_started_a_migration_and_ends_takes_it_along() {
    let place = Place::new(calm());
    place.pair.link.slow_down(20);
    let mut migration = place.migrate(&[&ENDLESS[..], &["--until-stdin-closes"]].concat());
    wait_until("it has begun", || place.source.machine().attached);
    drop(migration.child.stdin.take());
    assert!(migration.fails().contains("cancelled"));
    place.stayed();
}

#[test]
fn a_link_that_breaks_after_any_number_of_bytes_leaves_exactly_one_machine() {
    let mut lengths = vec![0, 60, 300, 1000];
    let mut random = 88_172_645_463_325_252_u64;
    for _ in 0..10 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        lengths.push(random % 600_000);
    }
    let mut moved = 0;
    for bytes in lengths {
        let place = Place::new(calm());
        place.pair.link.break_after(bytes);
        let (success, last) = place.migrate(&[]).end();
        println!("cut after {bytes} bytes: {last}");
        if success {
            moved += 1;
            place.arrived();
        } else {
            place.stayed();
        }
    }
    assert!(moved < 14, "no link was ever cut in time");
}

#[test]
fn a_target_that_is_killed_leaves_the_machine_running_and_is_swept_when_it_is_back() {
    let mut place = Place::new(calm());
    place.pair.link.slow_down(20);
    let migration = place.migrate(&ENDLESS);
    wait_until("something arrives", || {
        place.listener_status().is_some_and(|s| s.incoming.iter().any(|i| i.progress > 0.0))
    });
    fs::write(place.pair.n2.layout.incoming_mark(), "1\n").unwrap();
    place.kill_listener();
    let why = migration.fails();
    assert!(why.ends_with("the machine runs on here"), "{why}");
    place.stayed();
    place.listen();
    wait_until("what was left is forgotten", || place.forgotten() == 1);
    place.stayed();
    fs::remove_file(place.pair.n2.layout.incoming_mark()).unwrap();
    place.pair.link.slow_down(0);
    // And it can be tried again.
    assert!(place.migrate(&[]).end().0);
    place.arrived();
}

#[test]
fn a_machine_that_was_handed_over_survives_the_end_of_the_listener() {
    let mut place = Place::new(calm());
    assert!(place.migrate(&[]).end().0);
    place.kill_listener();
    fs::write(place.pair.n2.layout.incoming_mark(), "1\n").unwrap();
    place.listen();
    assert_eq!(place.forgotten(), 0);
    place.arrived();
}

#[test]
fn the_source_is_told_last_a_target_that_records_and_is_never_heard_leaves_it_running() {
    // Everything reaches the target, and nothing of its last words comes back: the VMM here refuses to be told, as if the sender had been
    // ended between the record and the telling.
    let place = Place::new(calm());
    place.source.machine().refuses_commits = true;
    let why = place.migrate(&[]).fails();
    assert!(why.contains("it will not hear of it"), "{why}");
    wait_until("the session has ended", || !place.source.machine().attached);
    assert_eq!(place.source.machine().state, Some(VmmState::Running));
    assert!(place.source.machine().gate_open);
    // The target was told first: it has recorded an image that the machine goes on without, and waits for `migrate_from`.
    wait_until("the target has recorded it", || place.listener_status().is_some_and(|s| s.handed_over == 1));
    // Any plain start discards it.
    let out = place.command(&place.pair.n2, &["discard", "--machine", MACHINE]).output().unwrap();
    assert!(out.status.success());
    place.stayed();
    // The next attempt begins afresh.
    place.source.machine().refuses_commits = false;
    assert!(place.migrate(&[]).end().0);
    place.arrived();
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_slowed_down_and_then_stays() {
    let place = Place::new(calm());
    place.pair.link.slow_down(20);
    let why = place.migrate(&["--max-pause-ms", "1", "--max-rounds", "25"]).fails();
    assert!(why.contains("writes faster than its memory can be sent: after 25 rounds"), "{why}");
    assert!(why.contains("running for 10 % of the time"), "{why}");
    place.stayed();
    assert_eq!(place.source.machine().slowest, 10);
}

#[test]
fn what_the_target_lacks_is_refused_with_its_sentence_before_a_page_is_sent() {
    let place = Place::new(calm());
    let hook = place.pair.n2.dir.join("hook");
    fs::write(&hook, "if [ $1 = prepare-migration ]; then echo there is no kernel at /boot/x >&2; exit 1; fi\n")
        .unwrap();
    let why = place.migrate(&[]).fails();
    assert!(why.contains("n2: ") && why.contains("there is no kernel at /boot/x"), "{why}");
    place.stayed();
}

#[test]
fn a_protected_machine_is_not_migrated_and_a_migration_is_no_checkpoint() {
    let mut place = Place::new(calm());
    // Its outputs wait for a standby.
    place.source.machine().gate_open = false;
    let why = place.migrate(&[]).fails();
    assert!(why.contains("protected"), "{why}");
    // A replicator runs.
    place.source.machine().gate_open = true;
    place.pair.n1.start();
    let why = place.migrate(&[]).fails();
    assert!(why.contains("a replicator of this machine runs on this node"), "{why}");
    // And one that protects is not heard by the process that receives migrations.
    place.pair.n1.promote();
    wait_until("it is refused", || place.pair.n1.status().note.contains("migrations are received here"));
    assert!(place.pair.n2.hook_calls().is_empty());
}

#[test]
fn a_node_that_never_had_a_machine_receives_one() {
    let place = Place::new(calm());
    let shm = place.pair.n2.layout.shm_dir().to_owned();
    let (root, aside) = (shm.parent().unwrap(), place.pair.n2.dir.join("aside"));
    fs::rename(root, &aside).unwrap();
    // The hook would make the directory of the machine; this one's VMM has its files open already.
    let hook = place.pair.n2.dir.join("hook");
    let script = fs::read_to_string(&hook).unwrap();
    let back = format!("if [ $1 = prepare-migration ]; then mv {}/m {}/; fi\n", aside.display(), root.display());
    fs::write(&hook, format!("{script}{back}")).unwrap();
    assert!(place.migrate(&[]).end().0);
    place.arrived();
}

#[test]
fn a_target_on_which_the_machine_runs_refuses_it() {
    let mut place = Place::new(calm());
    place.target.take().unwrap().kill();
    let other = place.pair.n2.vmm(place.load, VmmState::Running, 9);
    let why = place.migrate(&[]).fails();
    assert!(why.contains("has a VMM here that runs it"), "{why}");
    assert!(place.pair.n2.hook_calls().is_empty());
    other.kill();
    // Nobody listens at all.
    place.kill_listener();
    let why = place.migrate(&[]).fails();
    assert!(why.contains("n2") && why.contains("the machine runs on here"), "{why}");
    let _ = UnixStream::connect(place.pair.n1.layout.vmm_socket());
}
