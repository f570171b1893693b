//! Starting a process that outlives the agent: its own session, no inherited descriptors, ordinary priority, stdio to a log.
//!
//! Pacemaker waits for everybody who holds the agent's stdout, so nothing may keep it.
#![allow(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A log longer than this is set aside (as `NAME.old`) when a process is started.
const LOG_LIMIT: u64 = 4 << 20;

/// Raise this process to where cluster daemons commonly run: a hook decides about the guests that compete with it for the CPU.
pub fn raise_priority() {
    // Without the privilege it runs as it is.
    let _ = rustix::process::setpriority_process(None, -10);
}

/// Start `program`; what it prints is appended to `log`. The child belongs to the agent until the agent ends.
pub fn spawn(program: &Path, arguments: &[String], log: &Path) -> io::Result<Child> {
    if fs::metadata(log).is_ok_and(|m| m.len() > LOG_LIMIT) {
        // Losing the old log is better than not starting.
        let _ = fs::rename(log, log.with_extension("log.old"));
    }
    let out = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
    let err = out.try_clone()?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").stdin(Stdio::null()).stdout(out).stderr(err);
    // The cluster's variables are none of its business (and may hold secrets of other resources' parameters).
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("OCF_") || text.starts_with("HA_") || text.starts_with("PCMK_") {
            command.env_remove(&name);
        }
    }
    // SAFETY: between fork and exec only setsid(2) and setpriority(2) are called, which are async-signal-safe and allocate
    // nothing.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            // Where the cluster's daemons run at a raised priority, machines must not inherit it: a busy guest would
            // starve those who watch it. (Not being allowed to is no reason not to start.)
            let _ = rustix::process::setpriority_process(None, 0);
            Ok(())
        });
    }
    command.spawn()
}

/// The last line of a log, for the sentence that says why a process did not come up.
pub fn last_words(log: &Path) -> Option<String> {
    let text = fs::read(log).ok()?;
    let tail = &text[text.len().saturating_sub(4096)..];
    String::from_utf8_lossy(tail).lines().rev().map(str::trim).find(|l| !l.is_empty()).map(str::to_owned)
}
