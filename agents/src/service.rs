//! What the agents have in common: a process that is started, asked and ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ocf::{Context, Deadline, Failure, Status};
use serde::de::DeserializeOwned;
use understudy_protocol::control::{ControlError, call_once};

use crate::binaries;
use crate::daemon;
use crate::process::{Identity, Process, remove};

/// How long one question on a control socket may take.
pub const ANSWER: Duration = Duration::from_secs(3);

/// A process of ours and where its traces are.
#[derive(Debug, Clone)]
pub struct Service {
    /// How it is recognised.
    pub identity: Identity,
    /// Its log.
    pub log: PathBuf,
}

/// What a look at a service found.
#[derive(Debug)]
pub enum Observed<S> {
    /// It answers.
    Answers(S),
    /// It lives and does not answer: frozen, or busy beyond belief. The sentence says what happened.
    Silent(Process, String),
    /// It does not run.
    Gone,
}

/// The key file can be read `here`: "this node", "this board".
pub fn check_key(file: &str, here: &str) -> ocf::Result {
    fs::File::open(file).map(drop).map_err(|e| {
        Failure::arguments(format!(
            "parameter key: {file} cannot be read on {here}: {e}; create it once and copy it to every node and board"
        ))
    })
}

/// What `start` does about a process as it was observed: nothing, if it answers; one that does not is ended first.
pub fn bring_up<S>(
    context: &Context,
    observed: Observed<S>,
    already: &str,
    end: impl FnOnce() -> ocf::Result,
    launch: impl FnOnce() -> ocf::Result,
) -> ocf::Result {
    match observed {
        Observed::Answers(_) => {
            context.log.info(already);
            return Ok(());
        }
        Observed::Silent(process, why) => {
            context.log.warning(format!("replacing process {}, which does not answer: {why}", process.pid()));
            end()?;
        }
        Observed::Gone => {}
    }
    launch()
}

/// `stop` succeeds where the parameters do not even say what to stop: nothing of it can run there.
pub fn stop<T>(context: &Context, found: ocf::Result<T>, end: impl FnOnce(T) -> ocf::Result) -> ocf::Result {
    match found {
        Ok(found) => end(found),
        Err(failure) => {
            context.log.warning(format!("nothing to stop: {failure}"));
            Ok(())
        }
    }
}

impl Service {
    /// What `monitor` says of a process that is gone. On a node without the software a probe says so. `crashed` is for one that was not stopped.
    pub fn absent(&self, context: &Context, crashed: &str) -> ocf::Result<Status> {
        if context.is_probe() {
            binaries::locate(&context.environment, self.identity.program)?;
            return Ok(Status::NotRunning);
        }
        if self.identity.recorded() {
            return Err(Failure::generic(crashed));
        }
        Ok(Status::NotRunning)
    }

    /// Ask `status` until it answers, is gone, or the deadline passes. The healthy path is one round trip.
    pub fn observe<S>(&self, status: impl Fn(Duration) -> Result<S, ControlError>, deadline: Deadline) -> Observed<S> {
        loop {
            let error = match status(ANSWER.min(deadline.remaining().max(Duration::from_millis(100)))) {
                Ok(status) => return Observed::Answers(status),
                Err(error) => error,
            };
            let Some(process) = self.identity.find() else {
                return Observed::Gone;
            };
            // It may be starting, or ending.
            if process.wait(deadline.within(Duration::from_millis(100))) {
                continue;
            }
            if deadline.passed() {
                return Observed::Silent(process, error.to_string());
            }
        }
    }

    /// Start `program` and wait until `ready`. If it does not come up, nothing is left of it.
    pub fn launch(
        &self,
        context: &Context,
        program: &Path,
        arguments: &[String],
        ready: impl Fn(Duration) -> Result<(), ControlError>,
    ) -> Result<(), Failure> {
        let what = self.identity.program;
        let failed = |why: String| Failure::generic(format!("{what} did not start: {why}"));
        if let Some(dir) = self.log.parent() {
            make_private_dir(dir).map_err(|e| failed(format!("cannot create {}: {e}", dir.display())))?;
        }
        remove(&self.identity.socket).map_err(|e| failed(format!("cannot remove a stale socket: {e}")))?;
        let mut child = daemon::spawn(program, arguments, &self.log).map_err(|e| failed(e.to_string()))?;
        if let Err(e) = self.identity.record(child.id()) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!("cannot write {}: {e}", self.identity.pid_file.display())));
        }
        let mut last = String::from("it did not answer in time");
        let up = context.deadline.leaving(Duration::from_secs(1)).wait_for(|| {
            if let Ok(Some(status)) = child.try_wait() {
                let words = daemon::last_words(&self.log).unwrap_or_else(|| "it said nothing".into());
                return Some(Err(format!("it ended at once ({status}): {words}")));
            }
            match ready(Duration::from_secs(1)) {
                Ok(()) => Some(Ok(())),
                Err(error) => {
                    last = error.to_string();
                    None
                }
            }
        });
        match up {
            Some(Ok(())) => {
                context.log.info(format!("started {what}, process {}", child.id()));
                return Ok(());
            }
            Some(Err(why)) => last = why,
            None => {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        self.forget(context);
        Err(failed(format!("{last}; its log is {}", self.log.display())))
    }

    /// End the process: ask it by `quit`, then SIGTERM, then SIGKILL. Fails only if it survives all that, i.e. hangs in the
    /// kernel: then it is right that the node is fenced.
    pub fn end(&self, context: &Context, quit: impl Fn(Duration) -> Result<(), ControlError>) -> Result<(), Failure> {
        if let Some(process) = self.identity.find() {
            let deadline = context.deadline;
            let third = deadline.remaining() / 3;
            if let Err(error) = quit(third.min(Duration::from_secs(1))) {
                context.log.debug(format!("{} was not to be asked to quit: {error}", self.identity.program));
            }
            let patience = third.min(Duration::from_secs(3));
            if !process.wait(deadline.within(patience)) {
                context.log.warning(format!(
                    "{} does not quit, ending process {}",
                    self.identity.program,
                    process.pid()
                ));
                if !process.end(patience, deadline) {
                    return Err(Failure::generic(format!(
                        "process {} ({}) survives SIGKILL: it hangs in the kernel; only a reboot of this node ends it",
                        process.pid(),
                        self.identity.program
                    )));
                }
            }
        }
        self.forget(context);
        Ok(())
    }

    /// Remove the pid file and the socket of a process that is gone.
    pub fn forget(&self, context: &Context) {
        for path in [&self.identity.pid_file, &self.identity.socket] {
            if let Err(e) = remove(path) {
                context.log.warning(format!("cannot remove {}: {e}", path.display()));
            }
        }
    }
}

/// One question on a control socket.
pub fn ask<Q: serde::Serialize, R: DeserializeOwned>(
    socket: &Path,
    request: &Q,
    patience: Duration,
) -> Result<R, ControlError> {
    call_once(socket, request, patience)
}

/// A directory for root alone, with its parents.
pub fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}
