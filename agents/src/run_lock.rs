//! Locks in a machine's run directory, for what two of our processes on one node must not do at once.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ocf::Deadline;
use rustix::fs::{FlockOperation, flock};

/// Take the lock `name`; it is free again when the result is dropped, or its holder ends in whatever way. `None` if it could not
/// be had before the deadline.
pub fn take(run_dir: &Path, name: &str, deadline: Deadline) -> Option<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(run_dir.join(name)).ok()?;
    deadline.wait_for(|| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(()))?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_at_a_time_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let soon = || Deadline::after(Duration::from_millis(50));
        let held = take(dir.path(), "a.lock", soon());
        assert!(held.is_some());
        assert!(take(dir.path(), "a.lock", soon()).is_none());
        assert!(take(dir.path(), "b.lock", soon()).is_some());
        drop(held);
        assert!(take(dir.path(), "a.lock", soon()).is_some());
        assert!(take(&dir.path().join("missing"), "a.lock", soon()).is_none());
    }
}
