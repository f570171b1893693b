//! How a disk is, also while its storage does not answer.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Disk, Mode};
use crate::mirror::MirrorStatus;

/// Locks are held for so long only by somebody who waits for the storage.
const PATIENCE: Duration = Duration::from_millis(100);

/// How a disk is.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The base.
    pub name: String,
    /// `direct`, `solo` or `protected`.
    pub mode: &'static str,
    /// Bytes in slices that are not merged.
    pub backlog_bytes: u64,
    /// Slices that are not merged.
    pub backlog_slices: usize,
    /// Bytes in the open slice: when they grow large, an earlier cut helps.
    pub open_bytes: u64,
    /// Extents in the index.
    pub index_extents: usize,
    /// Memory of the index.
    pub index_bytes: u64,
    /// Bytes merged since it was opened.
    pub merged_bytes: u64,
    /// Whether this process may write to the base.
    pub holds_base: bool,
    /// What the merger complains of, if it does.
    pub problem: Option<String>,
    /// What a device itself does against an earlier owner's writes: its reservation, or that it has none. `None`: it is no device.
    pub fence: Option<String>,
    /// Slices that were thrown away when it was opened.
    pub discarded: Vec<String>,
    /// What peers have, if it is mirrored.
    pub mirror: Option<MirrorStatus>,
    /// Something holds the disk's locks that waits for the storage: all this is as it was so many milliseconds ago.
    pub stale_ms: Option<u64>,
}

fn free<G>(attempt: Result<G, TryLockError<G>>) -> Option<G> {
    match attempt {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

fn try_lock<T>(lock: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    free(lock.try_lock())
}

fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
    free(lock.try_read())
}

impl Disk {
    /// How it is. Waits for nobody who waits for the storage: what is not known then is as it was, and said to be so.
    pub fn status(&self) -> Status {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.look() {
                *self.seen() = Some((Instant::now(), status.clone()));
                return status;
            }
            if Instant::now() >= until {
                return self.as_seen();
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn seen(&self) -> MutexGuard<'_, Option<(Instant, Status)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn as_seen(&self) -> Status {
        let age = |since: Instant| u64::try_from(since.elapsed().as_millis()).ok();
        if let Some((since, status)) = &*self.seen() {
            return Status { stale_ms: age(*since), ..status.clone() };
        }
        Status {
            name: self.base.name().to_owned(),
            mode: "unknown",
            backlog_bytes: self.waiting.load(Ordering::Relaxed),
            backlog_slices: 0,
            open_bytes: 0,
            index_extents: 0,
            index_bytes: 0,
            merged_bytes: self.merged_bytes.load(Ordering::Relaxed),
            holds_base: false,
            problem: None,
            fence: self.fence.clone(),
            discarded: self.discarded.clone(),
            mirror: None,
            stale_ms: Some(u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// `None`: somebody holds a lock.
    fn look(&self) -> Option<Status> {
        let mode = match *try_read(&self.mode)? {
            Mode::Direct => "direct",
            Mode::Solo => "solo",
            Mode::Protected { .. } => "protected",
            Mode::Follows => "follows",
        };
        let holds_base = try_lock(&self.base_lock)?.is_some();
        let mirror = match &self.mirror {
            Some(mirror) => Some(mirror.try_status()?),
            None => None,
        };
        let table = try_lock(&self.table)?;
        // Before the index is locked: see the order of locks.
        let open_bytes = match &table.open {
            Some(slice) => slice.try_bytes()?,
            None => 0,
        };
        let index = try_read(&self.index)?;
        Some(Status {
            name: self.base.name().to_owned(),
            mode,
            backlog_bytes: self.waiting.load(Ordering::Relaxed),
            backlog_slices: table.slices.len(),
            open_bytes,
            index_extents: index.len(),
            index_bytes: index.bytes(),
            merged_bytes: self.merged_bytes.load(Ordering::Relaxed),
            holds_base,
            problem: table.problem.clone(),
            fence: self.fence.clone(),
            discarded: self.discarded.clone(),
            mirror,
            stale_ms: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use understudy_protocol::ids::{Epoch, Generation};

    use super::*;
    use crate::{Block, Format, Identity, Limits, LocalDirectory, Memory, Options, Raw};

    /// A slice that is appended to, and the making of one, hold these locks as long as the storage takes.
    #[test]
    fn while_storage_does_not_answer_it_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            base: Arc::new(Raw::create(&dir.path().join("disk"), 1 << 20).unwrap()),
            format: Format::Raw,
            directory: Arc::new(LocalDirectory::make(&dir.path().join("row")).unwrap()),
            identity: Identity { machine: "m".into(), node: "n".into(), generation: Generation(1) },
            memory: Memory::None,
            limits: Limits::default(),
        };
        let disk = Arc::new(Disk::open(options).unwrap());
        disk.protect(Epoch(1)).unwrap();
        disk.write_at(0, &[1; 512]).unwrap();
        assert_eq!((disk.status().mode, disk.status().stale_ms), ("protected", None));
        let slice = disk.table().open.clone().unwrap();
        let ask = |disk: &Arc<Disk>| {
            let (say, said) = mpsc::channel();
            let disk = disk.clone();
            thread::spawn(move || drop(say.send(disk.status())));
            said.recv_timeout(Duration::from_secs(20)).expect("the status waits for the storage")
        };
        {
            let _appending = slice.appending();
            let status = ask(&disk);
            assert_eq!((status.mode, status.backlog_slices), ("protected", 1));
            assert!(status.stale_ms.is_some());
        }
        {
            let _making = disk.table();
            assert!(ask(&disk).stale_ms.is_some());
        }
        assert_eq!(disk.status().stale_ms, None);
    }
}
