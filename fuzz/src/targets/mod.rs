//! The functions behind [`crate::TARGETS`].

pub mod alerts;
pub mod cluster;
pub mod disk;
pub mod estate;
pub mod machine;
pub mod net;
pub mod paths;
pub mod protocol;
pub mod replication;

use std::path::Path;

use tempfile::TempDir;

/// A directory for inputs that are read from files; one a thread, in memory where there is a tmpfs.
fn with_dir<R>(work: impl FnOnce(&Path) -> R) -> R {
    thread_local! {
        static DIR: TempDir = {
            let shm = Path::new("/dev/shm");
            let made = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
            // Without a place for files nothing can be fuzzed.
            made.expect("a temporary directory")
        };
    }
    DIR.with(|dir| work(dir.path()))
}
