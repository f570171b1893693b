//! One at a time decides a machine's promotion score on this node.
//!
//! The agent sets it on promote and demote, the hook whenever the replica changes, and a takeover makes both happen at once: a
//! hook that looked before the machine ran and wrote after would leave the running node with a standby's score, and the
//! cluster would move the machine. So looking and writing is one step, under this lock.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use ocf::Deadline;

use crate::run_lock;

/// Longest wait. Whoever holds it is itself bounded; going on without it is better than not setting the score.
const PATIENCE: Duration = Duration::from_secs(5);

/// Take the lock in the machine's run directory; it is free again when the result is dropped. `None` if it could not be had.
pub fn take(run_dir: &Path, deadline: Deadline) -> Option<File> {
    run_lock::take(run_dir, "score.lock", deadline.within(PATIENCE))
}
