//! One at a time decides a machine's promotion score on this node.
//!
//! The agent sets it on promote and demote, the hook whenever the replica changes, and a takeover makes both happen at once: a
//! hook that looked before the machine ran and wrote after would leave the running node with a standby's score, and the
//! cluster would move the machine. So looking and writing is one step, under this lock.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use ocf::Deadline;
use rustix::fs::{FlockOperation, flock};

/// Longest wait. Whoever holds it is itself bounded; going on without it is better than not setting the score.
const PATIENCE: Duration = Duration::from_secs(5);

/// Take the lock in the machine's run directory; it is free again when the result is dropped. `None` if it could not be had.
pub fn take(run_dir: &Path, deadline: Deadline) -> Option<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(run_dir.join("score.lock"))
        .ok()?;
    deadline
        .within(PATIENCE)
        .wait_for(|| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(()))?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let soon = || Deadline::after(Duration::from_millis(50));
        let held = take(dir.path(), soon());
        assert!(held.is_some());
        assert!(take(dir.path(), soon()).is_none());
        drop(held);
        assert!(take(dir.path(), soon()).is_some());
        assert!(take(&dir.path().join("missing"), soon()).is_none());
    }
}
