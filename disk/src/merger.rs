//! The thread that merges.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::disk::{Disk, Merged};
use crate::error::{Error, Result};

/// Merges a disk's committed slices in the background until it is dropped. What goes wrong stands in [`crate::Status::problem`] and is tried
/// again; the backlog grows meanwhile, up to its bound.
pub struct Merger {
    disk: Arc<Disk>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Between two attempts at what did not work.
const PAUSE: Duration = Duration::from_millis(500);

impl Merger {
    /// Start it.
    ///
    /// # Errors
    /// No thread.
    pub fn start(disk: Arc<Disk>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopped) = (disk.clone(), stop.clone());
        let thread = thread::Builder::new()
            .name("disk-merge".into())
            .spawn(move || run(&theirs, &stopped))
            .map_err(|e| Error::io("starting the thread that merges", e))?;
        Ok(Merger { disk, stop, thread: Some(thread) })
    }
}

fn run(disk: &Disk, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        match disk.merge() {
            Ok(Merged::Slices { .. }) => continue,
            // Whether the disk is direct now is seen in its status.
            Ok(Merged::Nothing) => drop(disk.settle()),
            Err(Error::Superseded { .. }) => return,
            Ok(Merged::Waiting(_)) | Err(_) => {
                // Committed slices are there, so waiting for work would not wait.
                thread::park_timeout(PAUSE);
                continue;
            }
        }
        if stop.load(Ordering::Acquire) {
            return;
        }
        disk.wait_for_work(PAUSE);
    }
}

impl Drop for Merger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.disk.wake();
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panics only if the merge does, which is reported by the panic itself.
            let _ = thread.join();
        }
    }
}
