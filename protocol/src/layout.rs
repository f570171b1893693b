//! Where one machine's files are on a node.
//!
//! Two directories: the *run* directory (small: sockets, pid files, logs, state records) and the *shared-memory*
//! directory (a tmpfs: guest RAM, the capture arena, the standby's stages). Both vanish with the node, which is what
//! makes "the node lost power" and "the image is gone" the same event.

use std::path::{Path, PathBuf};

/// Default parent of all run directories.
pub const DEFAULT_RUN_ROOT: &str = "/run/understudy";
/// In the place of a machine's name: the directory of the process that receives migrations. (No machine's name begins with a dot.)
pub const MIGRATIONS: &str = ".migrations";
/// Default parent of all shared-memory directories. Must be a tmpfs (or hugetlbfs).
pub const DEFAULT_SHM_ROOT: &str = "/dev/shm/understudy";

/// The file names of one machine on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    run: PathBuf,
    shm: PathBuf,
}

impl Layout {
    /// The same names in a run directory that is given itself (nothing of the machine is in shared memory there).
    pub fn in_run_dir(run: impl Into<PathBuf>) -> Self {
        let run = run.into();
        Self { shm: run.clone(), run }
    }

    /// Names for `machine` below the two roots. The machine's name must satisfy [`valid_machine_name`].
    pub fn new(run_root: impl AsRef<Path>, shm_root: impl AsRef<Path>, machine: &str) -> Self {
        Self { run: run_root.as_ref().join(machine), shm: shm_root.as_ref().join(machine) }
    }

    /// Directory of sockets, pid files, logs and state records.
    pub fn run_dir(&self) -> &Path {
        &self.run
    }
    /// Directory of RAM, arena and stages.
    pub fn shm_dir(&self) -> &Path {
        &self.shm
    }
    /// Control socket of `understudy-vmm`.
    pub fn vmm_socket(&self) -> PathBuf {
        self.run.join("vmm.sock")
    }
    /// Control socket of `understudy-replicator`.
    pub fn replicator_socket(&self) -> PathBuf {
        self.run.join("replicator.sock")
    }
    /// Process id of the VMM, decimal, one line. Present while it should be running: a pid file whose process is gone
    /// means a crash, no pid file means stopped.
    pub fn vmm_pid(&self) -> PathBuf {
        self.run.join("vmm.pid")
    }
    /// Process id of the replicator, as [`Self::vmm_pid`].
    pub fn replicator_pid(&self) -> PathBuf {
        self.run.join("replicator.pid")
    }
    /// The agent's note that this node was promoted, kept until demote: tells "crashed while promoted" (9) from
    /// "crashed as standby" (1).
    pub fn promoted_mark(&self) -> PathBuf {
        self.run.join("promoted")
    }
    /// Note that the VMM on this node was started to receive a migration: its process id. Removed when the machine runs here, or when
    /// nothing is to be received any more.
    pub fn incoming_mark(&self) -> PathBuf {
        self.run.join("incoming")
    }
    /// Log of the newest migration away from this node.
    pub fn migration_log(&self) -> PathBuf {
        self.run.join("migration.log")
    }
    /// Log of the VMM process.
    pub fn vmm_log(&self) -> PathBuf {
        self.run.join("vmm.log")
    }
    /// Log of the replicator process.
    pub fn replicator_log(&self) -> PathBuf {
        self.run.join("replicator.log")
    }
    /// Control socket of the serial board service for `device`.
    pub fn serial_socket(&self, device: &str) -> PathBuf {
        self.run.join(format!("serial-{device}.sock"))
    }
    /// Process id of the serial board service for `device`, as [`Self::vmm_pid`].
    pub fn serial_pid(&self, device: &str) -> PathBuf {
        self.run.join(format!("serial-{device}.pid"))
    }
    /// Log of the serial board service for `device`.
    pub fn serial_log(&self, device: &str) -> PathBuf {
        self.run.join(format!("serial-{device}.log"))
    }
    /// Guest RAM: all of it, contiguous, in ascending guest-physical order (a hole below 4 GiB takes no room here).
    /// Created by the VMM, mapped shared by the VMM and the replicator.
    pub fn ram(&self) -> PathBuf {
        self.shm.join("ram")
    }
    /// Capture arena: created by the VMM, read by the replicator. What is where in it is said by each
    /// [`crate::control::Captured`].
    pub fn arena(&self) -> PathBuf {
        self.shm.join("arena")
    }
    /// Pieces of mirrored disks on their way to copies: created by the VMM, read by the replicator. What is where in it is said by each
    /// [`crate::control::MirrorPieces`].
    pub fn disk_arena(&self) -> PathBuf {
        self.shm.join("disks")
    }
    /// The standby's image: what the replicator keeps beside RAM (record, stages, device state).
    pub fn image_dir(&self) -> PathBuf {
        self.shm.join("image")
    }
}

/// Whether `name` can be a machine's name: 1 to 63 of `a-z A-Z 0-9 - _`, starting with a letter or digit. (It becomes
/// a directory, a resource id and an attribute name.)
pub fn valid_machine_name(name: &str) -> bool {
    let ok = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    !name.is_empty()
        && name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_names_cannot_leave_their_directory() {
        assert!(valid_machine_name("dispatch-1"));
        for bad in ["", "..", "a/b", "-x", "a b", "ä", &"x".repeat(64)] {
            assert!(!valid_machine_name(bad), "{bad:?}");
        }
    }
}
