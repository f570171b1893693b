//! A copy of the standby's image, exactly one committed epoch, made while epochs go on arriving.
//!
//! ```text
//! all of RAM │ pages that epochs changed meanwhile │ … again … │ lock: the last ones, the device state │
//! ───────────┴──────── epochs are committed and applied ───────┴── arriving epochs wait ───────────────┴──► they go on
//! ```
//! Nothing that arrives can be held back for as long as a copy of RAM takes: the primary's outputs would wait, and soon it
//! would take the standby for lost. So RAM is copied like the first copy of a running machine: all of it beside the arriving epochs, while
//! the image notes which pages they change, then those, until few are left. Only those last ones and the device state are copied under the
//! standby's lock, when RAM is one committed epoch by the rules of [`crate::image`]. How long that took is part of the answer.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use understudy_protocol::control::CopiedImage;

use crate::codec::PAGE;
use crate::standby::Standby;
use crate::verify::PageSet;

/// Pages in one read: short enough not to hog the memory's bandwidth for long.
const SLICE: u64 = 256;
/// When no more pages than this were left in a round, the next is the last, with epochs waiting.
const FEW: u64 = 2048;
/// More rounds would only copy the same pages again.
const ROUNDS: u32 = 8;
/// Names of the files.
pub const RAM: &str = "ram";
/// See [`RAM`].
pub const STATE: &str = "state";

/// Copy the image to `dir`. The error is a sentence; what is in `dir` then is of no use.
pub fn copy(standby: &Mutex<Standby>, dir: &Path) -> Result<CopiedImage, String> {
    let began = Instant::now();
    let (ram, bytes) = lock(standby).begin_copy()?;
    let end = EndCopy(standby);
    let path = dir.join(RAM);
    let mut copier = Copier { to: create(&path, bytes)?, from: ram, name: path.display().to_string(), pages: 0 };
    let pages = bytes / PAGE as u64;
    copier.range(0, pages)?;
    let (mut rounds, mut before) = (1, pages);
    loop {
        let changed = lock(standby).changed_since()?;
        let count = changed.len();
        copier.set(&changed)?;
        rounds += 1;
        if count <= FEW || count > before / 4 * 3 || rounds >= ROUNDS {
            break;
        }
        before = count;
    }
    let mut standby = lock(standby);
    let held = Instant::now();
    let changed = standby.changed_since()?;
    copier.set(&changed)?;
    let (generation, epoch, state) = standby.copied_epoch()?;
    let to = dir.join(STATE);
    fs::copy(&state, &to).map_err(|e| format!("cannot copy {} to {}: {e}", state.display(), to.display()))?;
    let held_us = held.elapsed().as_micros() as u64;
    drop(standby);
    drop(end);
    let took_ms = began.elapsed().as_millis() as u64;
    Ok(CopiedImage { epoch, generation, pages: copier.pages, rounds: rounds + 1, took_ms, held_us })
}

/// The image need not note changes any more.
struct EndCopy<'a>(&'a Mutex<Standby>);

impl Drop for EndCopy<'_> {
    fn drop(&mut self) {
        lock(self.0).end_copy();
    }
}

struct Copier {
    from: File,
    to: File,
    name: String,
    pages: u64,
}

impl Copier {
    fn range(&mut self, mut page: u64, end: u64) -> Result<(), String> {
        let mut slice = vec![0; (SLICE.min(end - page) as usize) * PAGE];
        while page < end {
            let n = SLICE.min(end - page);
            let (bytes, at) = (&mut slice[..n as usize * PAGE], page * PAGE as u64);
            let copied = self.from.read_exact_at(bytes, at).and_then(|()| self.to.write_all_at(bytes, at));
            copied.map_err(|e| format!("cannot copy the image to {}: {e}", self.name))?;
            self.pages += n;
            page += n;
        }
        Ok(())
    }

    fn set(&mut self, pages: &PageSet) -> Result<(), String> {
        let mut at = 0;
        while let Some(first) = pages.next(at) {
            at = first + 1;
            while pages.has(at) {
                at += 1;
            }
            self.range(first, at)?;
        }
        Ok(())
    }
}

/// The copy's file, with all its room taken: a full file system says so now.
fn create(path: &Path, bytes: u64) -> Result<File, String> {
    let make = || -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        file.set_len(bytes)?;
        match fallocate(&file, FallocateFlags::empty(), 0, bytes as i64) {
            // Then there is no room taken in advance, and a full file system says so later.
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(file),
            Err(e) => Err(e.into()),
        }
    };
    make().map_err(|e| format!("cannot make room for a copy of the image at {}: {e}", path.display()))
}

fn lock(standby: &Mutex<Standby>) -> MutexGuard<'_, Standby> {
    // As everywhere in the process: each holder leaves the data usable at every step.
    standby.lock().unwrap_or_else(PoisonError::into_inner)
}
