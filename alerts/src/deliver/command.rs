//! Commands: an administrator's own way to tell somebody.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::alarm::{Alarm, Sink, Trouble, cut};

/// A command: the text on its standard input, the rest in its environment as `UNDERSTUDY_ALERT_…`.
pub struct Command<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [String],
    /// Whether it gets only the short message.
    pub short: bool,
    /// When it is killed, with all that it started.
    pub timeout: Duration,
}

impl Sink for Command<'_> {
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble> {
        let name = self.program.display();
        let Alarm { severity, subject, text, machine, node, key, short: _ } = alarm;
        let mut command = std::process::Command::new(self.program);
        command.args(self.arguments).env("UNDERSTUDY_ALERT_SEVERITY", severity.as_str());
        let words =
            [("SUBJECT", Some(subject)), ("MACHINE", machine.as_ref()), ("NODE", node.as_ref()), ("KEY", Some(key))];
        for (variable, value) in words {
            // A null byte cannot stand in an environment.
            let value = value.map(String::as_str).unwrap_or_default().replace('\0', " ");
            command.env(format!("UNDERSTUDY_ALERT_{variable}"), value);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|e| {
            Trouble::passing(format!(
                "cannot start {name}: {e}. The user hacluster must be able to run it on every node"
            ))
        })?;
        if let Some(mut input) = child.stdin.take() {
            // Shorter than a pipe holds: this does not wait. A command that does not read it is content without.
            let _ = input.write_all(if self.short { alarm.in_short() } else { text }.as_bytes());
        }
        let Some(status) = wait(&mut child, self.timeout) else {
            return Err(Trouble::passing(format!(
                "{name} did not end within {} s and was killed",
                self.timeout.as_secs()
            )));
        };
        if status.success() {
            return Ok(());
        }
        let said = child.stderr.take().map(what_is_there).unwrap_or_default();
        let said = cut(String::from_utf8_lossy(&said).trim().replace('\n', "; "), 300);
        Err(Trouble::passing(format!("{name} failed ({status}): {said}")))
    }
}

/// What a command that has ended has said. Something that it left behind may hold the pipe open: nobody waits for that.
fn what_is_there(errors: ChildStderr) -> Vec<u8> {
    let mut said = Vec::new();
    if fcntl(&errors, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).is_ok() {
        let _ = errors.take(4096).read_to_end(&mut said);
    }
    said
}

/// Its end, or `None` after it was killed.
fn wait(child: &mut Child, timeout: Duration) -> Option<std::process::ExitStatus> {
    let until = Instant::now() + timeout;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            // Not reaped yet: the group is still its.
            Ok(None) | Err(_) => {
                let group = i32::try_from(child.id()).unwrap_or(i32::MAX);
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
                let _ = child.wait();
                return None;
            }
        }
    }
}
