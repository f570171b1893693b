//! What the test files of this crate share.
#![allow(dead_code)] // Each test file uses its part.

pub mod guests;

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// Tests that need KVM end at once where there is none, and say so.
pub fn kvm_is_there() -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, so nothing was proven");
    }
    there
}

/// A directory of the test's own, in a tmpfs when there is one, as guest RAM and arena are in life.
pub fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap()
}

/// Longest wait for anything; a loaded build host is slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// Wait until `condition` holds.
pub fn wait(for_what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "gave up waiting until {for_what}");
        if since.elapsed() < Duration::from_millis(1) {
            std::thread::yield_now();
        } else {
            // The guest needs the processor more.
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
