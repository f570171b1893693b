//! The cluster's arm: a command that makes a veto durable, lifts it, and sets the standby's promotion score.
//!
//! ```text
//! CMD veto          --machine M --peer NODE     exit 0: no node but this one will be promoted, durably
//!                                              exit 2: this node has been superseded, the machine must end here
//! CMD clear-veto    --machine M
//! CMD replica-state --machine M --state inconsistent|syncing|uptodate|outdated|disconnected
//! ```
//! Calls run in threads of their own, each with a deadline, never on the data path. Without a command nothing can be
//! made durable: a veto counts as refused, unless the administrator has said that there is no cluster.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::receiver::Standing;
use crate::sender::VetoCall;

/// How long a call may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// What stands behind the hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arm {
    /// A command and its first arguments.
    Command(Vec<String>),
    /// No command was given: vetoes are refused, scores are nobody's business.
    Nothing,
    /// The administrator said that there is no cluster: everything is granted, nothing is durable.
    NoCluster,
}

/// Why a call did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A sentence.
    pub why: String,
    /// The cluster has given the machine to another node.
    pub superseded: bool,
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self { why, superseded: false }
    }
}

/// Exit code that says so.
const SUPERSEDED: i32 = 2;

/// The hook of one machine.
#[derive(Debug, Clone)]
pub struct Hook {
    arm: Arm,
    machine: String,
}

impl Hook {
    /// A hook for `machine`.
    pub fn new(arm: Arm, machine: &str) -> Self {
        Self { arm, machine: machine.to_owned() }
    }

    /// Whether there is a cluster that could promote somebody.
    pub fn clustered(&self) -> bool {
        matches!(self.arm, Arm::Command(_))
    }

    /// Set or lift the veto against `peer`. Blocks up to [`DEADLINE`].
    pub fn veto(&self, call: VetoCall, peer: &str) -> Result<(), Refusal> {
        match (&self.arm, call) {
            (Arm::Command(command), VetoCall::Veto) => {
                run(command, &["veto", "--machine", &self.machine, "--peer", peer], DEADLINE)
            }
            (Arm::Command(command), VetoCall::ClearVeto) => {
                run(command, &["clear-veto", "--machine", &self.machine], DEADLINE)
            }
            (Arm::NoCluster, _) | (Arm::Nothing, VetoCall::ClearVeto) => Ok(()),
            (Arm::Nothing, VetoCall::Veto) => {
                let why =
                    "no hook is configured that could make it durable (see --hook, or --no-cluster for trials by hand)";
                Err(Refusal { why: why.into(), superseded: false })
            }
        }
    }

    /// Tell the cluster where the replica on this node stands. Blocks up to [`DEADLINE`].
    pub fn replica_state(&self, standing: Standing) -> Result<(), String> {
        match &self.arm {
            Arm::Command(command) => {
                let arguments = ["replica-state", "--machine", &self.machine, "--state", standing.word()];
                run(command, &arguments, DEADLINE).map_err(|refusal| refusal.why)
            }
            Arm::NoCluster | Arm::Nothing => Ok(()),
        }
    }
}

/// How long the target's node may take to make a machine's standby ready.
const PREPARE_DEADLINE: Duration = Duration::from_secs(30);

/// The arm of the process that receives migrations:
///
/// ```text
/// CMD prepare-migration --machine M --from NODE --run-root DIR --shm-root DIR     exit 0: its VMM stands by here
/// CMD forget-migration  --machine M --run-root DIR --shm-root DIR                 exit 0: what was prepared is gone
/// ```
/// What the machine is like it knows from the cluster's configuration, never from the node that sends.
#[derive(Debug, Clone)]
pub struct MigrationHook {
    command: Vec<String>,
    places: [String; 4],
}

impl MigrationHook {
    /// With the command and its first arguments, and the parents of the machines' directories.
    pub fn new(command: Vec<String>, run_root: &str, shm_root: &str) -> Self {
        let places = ["--run-root", run_root, "--shm-root", shm_root].map(str::to_owned);
        Self { command, places }
    }

    /// Have the VMM of `machine` stand by for what `from` sends. Blocks up to 30 s.
    pub fn prepare(&self, machine: &str, from: &str) -> Result<(), String> {
        self.call(&["prepare-migration", "--machine", machine, "--from", from], PREPARE_DEADLINE)
    }

    /// Undo that, unless the machine runs. Blocks up to [`DEADLINE`].
    pub fn forget(&self, machine: &str) -> Result<(), String> {
        self.call(&["forget-migration", "--machine", machine], DEADLINE)
    }

    fn call(&self, what: &[&str], deadline: Duration) -> Result<(), String> {
        let arguments: Vec<&str> = what.iter().copied().chain(self.places.iter().map(String::as_str)).collect();
        run(&self.command, &arguments, deadline).map_err(|refusal| refusal.why)
    }
}

/// Run to the end or to the deadline; the error says how it ended and what it said last.
fn run(command: &[String], arguments: &[&str], deadline: Duration) -> Result<(), Refusal> {
    let Some((program, first)) = command.split_first() else {
        return Err("the hook's command is empty".to_owned().into());
    };
    let shown = format!("hook `{program} {}`", arguments.join(" "));
    let mut child = Command::new(program)
        .args(first)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{shown} cannot be started: {e}"))?;
    // What it says is read beside, so that a talkative hook is not stopped by a full pipe.
    let said = Arc::new(Mutex::new(Vec::new()));
    if let Some(mut stderr) = child.stderr.take() {
        let said = said.clone();
        thread::spawn(move || {
            let mut piece = [0; 512];
            while let Ok(n @ 1..) = stderr.read(&mut piece) {
                let mut said = lock(&said);
                said.extend_from_slice(&piece[..n]);
                let excess = said.len().saturating_sub(2048);
                said.drain(..excess);
            }
        });
    }
    let end = Instant::now() + deadline;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
            Ok(None) => {
                // The whole group: a shell's children too.
                if let Ok(group) = i32::try_from(child.id()) {
                    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
                }
                let _ = child.wait();
                return Err(format!("{shown} was ended after {} s", deadline.as_secs()).into());
            }
            Err(e) => return Err(format!("{shown} was lost: {e}").into()),
        }
    };
    if status.success() {
        return Ok(());
    }
    thread::sleep(Duration::from_millis(10)); // let the last words arrive; they are only for people
    let said = String::from_utf8_lossy(&lock(&said)).trim().replace('\n', "; ");
    let why = format!("{shown} ended with {status}");
    let why = if said.is_empty() { why } else { format!("{why}: {said}") };
    Err(Refusal { why, superseded: status.code() == Some(SUPERSEDED) })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here can be left half done by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the cluster about the replica from a thread of its own; only the newest state counts, and it is told until it
/// is heard.
#[derive(Debug)]
pub struct Reporter {
    slot: Arc<(Mutex<Slot>, Condvar)>,
}

#[derive(Debug, Default)]
struct Slot {
    wanted: Option<Standing>,
    /// Counts the changes, so that a repeated state is told again.
    change: u64,
    stop: bool,
}

impl Reporter {
    /// `told` is called, from the reporter's thread, after the cluster has been told; `failed` with a sentence when not.
    pub fn start(
        hook: Hook,
        told: impl Fn(Standing) + Send + 'static,
        failed: impl Fn(String) + Send + 'static,
    ) -> Self {
        let slot = Arc::new((Mutex::new(Slot::default()), Condvar::new()));
        let shared = slot.clone();
        thread::spawn(move || {
            let (mutex, changed) = &*shared;
            let (mut done, mut pause) = (0, Duration::from_millis(200));
            loop {
                let (standing, change) = {
                    let mut slot = lock(mutex);
                    loop {
                        if slot.stop {
                            return;
                        }
                        match slot.wanted {
                            Some(standing) if slot.change != done => break (standing, slot.change),
                            _ => slot = changed.wait(slot).unwrap_or_else(PoisonError::into_inner),
                        }
                    }
                };
                match hook.replica_state(standing) {
                    Ok(()) => {
                        (done, pause) = (change, Duration::from_millis(200));
                        told(standing);
                    }
                    Err(why) => {
                        failed(why);
                        let slot = lock(mutex);
                        if slot.change == change && !slot.stop {
                            drop(changed.wait_timeout(slot, pause));
                        }
                        pause = (pause * 2).min(Duration::from_secs(5));
                    }
                }
            }
        });
        Self { slot }
    }

    /// This is how it stands now.
    pub fn report(&self, standing: Standing) {
        let (mutex, changed) = &*self.slot;
        let mut slot = lock(mutex);
        slot.wanted = Some(standing);
        slot.change += 1;
        changed.notify_all();
    }

    /// Nothing is to be told any more.
    pub fn cancel(&self) {
        let (mutex, changed) = &*self.slot;
        lock(mutex).wanted = None;
        changed.notify_all();
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        let (mutex, changed) = &*self.slot;
        lock(mutex).stop = true;
        changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::sync::mpsc::{Receiver, channel};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    fn shell(script: &str) -> Vec<String> {
        vec!["/bin/sh".into(), "-c".into(), script.into()]
    }

    #[test]
    fn a_hook_that_fails_says_what_it_said_last() {
        assert_eq!(run(&shell("exit 0"), &[], DEADLINE), Ok(()));
        let Refusal { why, superseded } = run(&shell("echo no quorum >&2; exit 3"), &["veto"], DEADLINE).unwrap_err();
        assert!(!superseded);
        assert!(run(&shell("exit 2"), &[], DEADLINE).unwrap_err().superseded);
        assert!(why.contains("no quorum") && why.contains('3'), "{why}");
        assert!(run(&["/nonexistent".into()], &[], DEADLINE).unwrap_err().why.contains("cannot be started"));
    }

    #[test]
    fn a_hook_that_hangs_is_ended_with_its_children() {
        let started = Instant::now();
        let why = run(&shell("sleep 60 & sleep 60"), &[], Duration::from_millis(100)).unwrap_err().why;
        assert!(why.contains("was ended"), "{why}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    /// A reporter whose hook runs `script` ($0 to $4: `replica-state --machine M --state WORD`); everything that was told or failed.
    fn reporter(arm: Arm) -> (Reporter, Receiver<Result<Standing, String>>) {
        let (tell, heard) = channel();
        let tell_failed = tell.clone();
        let told = move |standing| drop(tell.send(Ok(standing)));
        let failed = move |why| drop(tell_failed.send(Err(why)));
        (Reporter::start(Hook::new(arm, "m"), told, failed), heard)
    }

    const STANDINGS: [Standing; 5] =
        [Standing::Inconsistent, Standing::Syncing, Standing::UpToDate, Standing::Outdated, Standing::Disconnected];

    /// A hook that waits, after it has noted its state, for a line in a pipe, and ends with that line as its code.
    struct Slow {
        dir: tempfile::TempDir,
        gate: File,
    }

    impl Slow {
        fn new() -> (Self, Arm) {
            let dir = tempfile::tempdir().unwrap();
            let gate = dir.path().join("gate");
            mkfifo(&gate, Mode::S_IRWXU).unwrap();
            let at = dir.path().display();
            let script = format!("echo $4 >> {at}/called; read code < {at}/gate; exit $code");
            let arm = Arm::Command(shell(&script));
            // Open for both, so that nobody waits for the other to open it.
            let gate = File::options().read(true).write(true).open(gate).unwrap();
            (Self { dir, gate }, arm)
        }

        /// Until the hook has been called with these states.
        fn called(&self, words: &[&str]) {
            let until = Instant::now() + DEADLINE;
            let called = || fs::read_to_string(self.dir.path().join("called")).unwrap_or_default();
            while called().split_ascii_whitespace().ne(words.iter().copied()) {
                assert!(Instant::now() < until, "the hook was called with {} instead of {words:?}", called());
                thread::park_timeout(Duration::from_millis(2));
            }
        }

        /// The call that waits ends.
        fn end(&mut self, code: u8) {
            writeln!(self.gate, "{code}").unwrap();
        }
    }

    #[test]
    fn states_in_quick_succession_may_be_overtaken_but_the_last_is_told() {
        let (mut hook, arm) = Slow::new();
        let (reporter, heard) = reporter(arm);
        reporter.report(Standing::Inconsistent);
        hook.called(&["inconsistent"]);
        // The cluster is busy with the first one.
        reporter.report(Standing::Syncing);
        reporter.report(Standing::UpToDate);
        hook.end(0);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Ok(Standing::Inconsistent)));
        hook.called(&["inconsistent", "uptodate"]);
        hook.end(0);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Ok(Standing::UpToDate)));
        // The same state once more is news: somebody may have changed what the cluster knows.
        reporter.report(Standing::UpToDate);
        hook.called(&["inconsistent", "uptodate", "uptodate"]);
        hook.end(0);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Ok(Standing::UpToDate)));
    }

    #[test]
    fn a_state_that_the_cluster_did_not_take_is_told_again_unless_there_is_a_newer_one() {
        let (mut hook, arm) = Slow::new();
        let (reporter, heard) = reporter(arm);
        let refused = |heard: &Receiver<_>| matches!(heard.recv_timeout(DEADLINE), Ok(Err(_)));
        reporter.report(Standing::Syncing);
        hook.called(&["syncing"]);
        hook.end(1);
        assert!(refused(&heard));
        hook.called(&["syncing", "syncing"]);
        reporter.report(Standing::UpToDate);
        hook.end(1);
        assert!(refused(&heard));
        hook.called(&["syncing", "syncing", "uptodate"]);
        hook.end(0);
        assert_eq!(heard.recv_timeout(DEADLINE), Ok(Ok(Standing::UpToDate)));
    }

    #[test]
    fn the_last_state_of_every_burst_is_told_whenever_it_falls() {
        // Without a command a call takes next to nothing, so that reports fall into every moment of the reporter's loop.
        let (reporter, heard) = reporter(Arm::NoCluster);
        for burst in 0..5000usize {
            let states: Vec<_> = STANDINGS.iter().cycle().skip(burst).take(1 + burst % 5).copied().collect();
            let (last, before) = states.split_last().unwrap();
            before.iter().for_each(|state| reporter.report(*state));
            if burst % 3 == 0 {
                reporter.cancel();
            }
            reporter.report(*last);
            // Those before it, all of them others, may arrive, but never instead of it.
            while heard.recv_timeout(DEADLINE).unwrap_or_else(|e| panic!("burst {burst}: {last:?}: {e}")) != Ok(*last) {
            }
            assert!(heard.try_recv().is_err(), "burst {burst}: something older was told after {last:?}");
        }
    }

    #[test]
    fn without_a_hook_a_veto_is_refused_unless_there_is_no_cluster() {
        assert!(Hook::new(Arm::Nothing, "m").veto(VetoCall::Veto, "n2").is_err());
        assert_eq!(Hook::new(Arm::NoCluster, "m").veto(VetoCall::Veto, "n2"), Ok(()));
    }
}
