//! Helper programs: found without `PATH`, bounded in time, and never a shell.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::deadline::Deadline;
use crate::environment::Environment;

/// Why a helper program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not on this node.
    #[error("{program} is not installed")]
    Missing {
        /// Its name.
        program: String,
    },
    /// It could not be run.
    #[error("{program} could not be run: {source}")]
    Spawn {
        /// Its name.
        program: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{program} did not answer within {} ms and was killed", limit.as_millis())]
    TimedOut {
        /// Its name.
        program: String,
        /// Time that it had.
        limit: Duration,
    },
}

/// What a program said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Whether it exited with 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }

    /// The last line that it said about what went wrong, or its exit code.
    pub fn complaint(&self) -> String {
        let said = |text: &str| text.lines().rev().map(str::trim).find(|l| !l.is_empty()).map(str::to_owned);
        said(&self.stderr).or_else(|| said(&self.stdout)).unwrap_or_else(|| match self.code {
            Some(code) => format!("exit code {code}"),
            None => "killed by a signal".to_owned(),
        })
    }
}

/// Where an executable of this name is. `None` too when `ocf-tester` asks to pretend that there is none.
pub fn find(env: &Environment, program: &str) -> Option<PathBuf> {
    if env.pretend_binaries_missing() {
        return None;
    }
    if program.contains('/') {
        return is_executable(Path::new(program)).then(|| PathBuf::from(program));
    }
    env.search_path().split(':').map(|dir| Path::new(dir).join(program)).find(|p| is_executable(p))
}

/// Whether there is an executable file at `path`.
pub fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Run `program` with `arguments` and no input; kill it when the deadline passes.
pub fn run(env: &Environment, program: &str, arguments: &[&str], deadline: Deadline) -> Result<Output, CommandError> {
    let name = || program.to_owned();
    let path = find(env, program).ok_or_else(|| CommandError::Missing { program: name() })?;
    let limit = deadline.remaining();
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if env.variable("PATH").is_none() {
        command.env("PATH", env.search_path());
    }
    let mut child = command.spawn().map_err(|source| CommandError::Spawn { program: name(), source })?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let ended = deadline.wait_for(|| child.try_wait().transpose());
    let status = match ended {
        Some(Ok(status)) => status,
        Some(Err(source)) => return Err(CommandError::Spawn { program: name(), source }),
        None => {
            // Both may fail only if it ended this moment; then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
            return Err(CommandError::TimedOut { program: name(), limit });
        }
    };
    // A grandchild may hold the pipes open for ever: what came until shortly after the end is what it said.
    let patience = Duration::from_millis(500);
    let text = |receiver: mpsc::Receiver<Vec<u8>>| {
        String::from_utf8_lossy(&receiver.recv_timeout(patience).unwrap_or_default()).into_owned()
    };
    Ok(Output { code: status.code(), stdout: text(stdout), stderr: text(stderr) })
}

/// Read a pipe to its end on a thread of its own, so that a full pipe never blocks the program.
fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is still worth having; a receiver that has gone does not want it.
            let _ = pipe.read_to_end(&mut bytes);
            let _ = sender.send(bytes);
        });
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    #[test]
    fn a_program_is_found_without_path_and_its_words_come_back() {
        let out = run(&Environment::default(), "ls", &["/nonexistent-directory"], soon()).unwrap();
        assert!(!out.success());
        assert!(out.complaint().contains("/nonexistent-directory"), "{out:?}");
    }

    #[test]
    fn a_program_that_hangs_is_killed_at_the_deadline() {
        let started = Instant::now();
        let limit = Deadline::after(Duration::from_millis(100));
        let error = run(&Environment::default(), "sleep", &["60"], limit).unwrap_err();
        assert!(matches!(error, CommandError::TimedOut { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_program_that_is_not_there_is_said_to_be_missing() {
        let error = run(&Environment::default(), "no-such-program", &[], soon()).unwrap_err();
        assert_eq!(error.to_string(), "no-such-program is not installed");
        let tester = Environment::from_pairs([("OCF_TESTER_FAIL_HAVE_BINARY", "1")]);
        assert_eq!(find(&tester, "ls"), None);
    }
}
