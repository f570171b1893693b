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

    #[test]
    fn without_a_hook_a_veto_is_refused_unless_there_is_no_cluster() {
        assert!(Hook::new(Arm::Nothing, "m").veto(VetoCall::Veto, "n2").is_err());
        assert_eq!(Hook::new(Arm::NoCluster, "m").veto(VetoCall::Veto, "n2"), Ok(()));
    }
}
