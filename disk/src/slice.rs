//! One slice while it is written: an epoch's log, from its first record to its commit mark.
//!
//! Appends are one at a time: the log has no gaps, and the order of the log is the order in which the index sees the writes. What
//! costs time (copying, the checksum of the data) happens before.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use understudy_protocol::ids::{Epoch, Generation};

use crate::block::SECTOR;
use crate::error::{Doing, Error, Result};
use crate::record::{Digest, Kind, RECORD, Record, Scan, SliceId, Tag};
use crate::store::LogFile;

/// What a slice's file is called: which slice it is, and under which generation it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceName {
    /// Its serial number.
    pub serial: u64,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
    /// The generation in whose name it counts: the writer's at first; whoever takes over renames what he accepts. A node that was left behind
    /// knows only the old names, so that it cannot remove or replace what is in use.
    pub owner: Generation,
}

impl SliceName {
    /// From a file name; `None`: it is no slice.
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_suffix(".slice")?.split('-');
        let mut next = || {
            let part = parts.next()?;
            let plain = part.len() <= 16 && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            plain.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        let name = SliceName {
            serial: next()?,
            generation: Generation(next()?),
            epoch: Epoch(next()?),
            owner: Generation(next()?),
        };
        parts.next().is_none().then_some(name)
    }
}

impl std::fmt::Display for SliceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{:x}-{:x}-{:x}.slice", self.serial, self.generation.0, self.epoch.0, self.owner.0)
    }
}

/// A slice.
pub(crate) struct Slice {
    pub id: SliceId,
    pub name: SliceName,
    pub file: Arc<dyn LogFile>,
    log: Mutex<Log>,
    committed: AtomicBool,
    /// Why it may not be read any more.
    failed: OnceLock<String>,
}

#[derive(Default)]
struct Log {
    end: u64,
    digest: Digest,
    sealed: bool,
    /// A write, a truncation or a flush failed: what is in the file is not known.
    broken: Option<String>,
}

/// The log of a slice between two records.
pub(crate) struct Appending<'a> {
    slice: &'a Slice,
    log: MutexGuard<'a, Log>,
}

impl Slice {
    pub fn new(id: SliceId, name: SliceName, file: Arc<dyn LogFile>) -> Self {
        Slice { id, name, file, log: Mutex::default(), committed: AtomicBool::new(false), failed: OnceLock::new() }
    }

    /// One that was found, complete and accepted.
    pub fn found(id: SliceId, name: SliceName, file: Arc<dyn LogFile>, scan: &Scan) -> Self {
        let log = Log { end: scan.end, digest: scan.digest.clone(), sealed: true, broken: None };
        Slice { id, name, file, log: Mutex::new(log), committed: AtomicBool::new(true), failed: OnceLock::new() }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bytes(&self) -> u64 {
        self.log().end
    }

    pub fn tag(&self) -> Tag {
        self.log().digest.tag(self.id)
    }

    pub fn is_sealed(&self) -> bool {
        self.log().sealed
    }

    pub fn is_committed(&self) -> bool {
        self.committed.load(Ordering::Acquire)
    }

    /// It turned out to be damaged: reads of what is in it fail from now on.
    pub fn fail(&self, why: String) {
        let _ = self.failed.set(why);
    }

    /// The sentence, if it failed.
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Hold the end of the log still.
    pub fn appending(&self) -> Appending<'_> {
        Appending { slice: self, log: self.log() }
    }

    /// Close it: all that is in it is durable, and says that it is all.
    pub fn seal(&self) -> Result<()> {
        let mut log = self.log();
        if log.sealed {
            return Ok(());
        }
        if let Some(why) = &log.broken {
            return Err(Error::Refused(why.clone()));
        }
        let seal = self.mark(Kind::Seal, &log.digest).encode();
        let doing = || format!("sealing the slice {}", self.name);
        let done = self.file.write_at(log.end, &seal).and_then(|()| self.file.sync());
        if let Err(e) = done {
            if !is_full(&e) {
                // After a flush that failed nothing says what is on the disk; a second one would succeed and prove nothing.
                log.broken = Some(format!("{}: {e}; its epoch cannot be committed any more", doing()));
            }
            return Err(Error::io(doing(), e));
        }
        log.sealed = true;
        Ok(())
    }

    /// Mark it committed, durably.
    pub fn commit(&self) -> Result<()> {
        let log = self.log();
        if self.is_committed() {
            return Ok(());
        }
        if !log.sealed {
            return Err(Error::Refused(format!("the slice {} is to be committed and was not sealed", self.name)));
        }
        let mark = self.mark(Kind::Commit, &log.digest).encode();
        self.file
            .write_at(log.end + RECORD as u64, &mark)
            .and_then(|()| self.sync_commit())
            .doing(|| format!("committing the slice {}", self.name))?;
        self.committed.store(true, Ordering::Release);
        Ok(())
    }

    #[cfg(not(test))]
    fn sync_commit(&self) -> io::Result<()> {
        self.file.sync()
    }

    #[cfg(test)]
    fn sync_commit(&self) -> io::Result<()> {
        if crate::sim::sabotaged(crate::sim::Sabotage::CommitWithoutFlush) { Ok(()) } else { self.file.sync() }
    }

    fn mark(&self, kind: Kind, digest: &Digest) -> Record {
        Record { kind, slice: self.id, sector: 0, sectors: 0, number: digest.records(), crc: digest.finish() }
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

impl Appending<'_> {
    /// Append one record. `bytes` begins with room for the record; its data follows, whose CRC-32 is `crc`. Returns where in the file the data
    /// is. When it fails the log is as before.
    pub fn append(&mut self, kind: Kind, sector: u64, sectors: u32, crc: u32, bytes: &mut [u8]) -> Result<u64> {
        if let Some(why) = &self.log.broken {
            return Err(Error::Refused(why.clone()));
        }
        let number = self.log.digest.records();
        let record = Record { kind, slice: self.slice.id, sector, sectors, number, crc };
        let head = record.encode();
        bytes[..RECORD].copy_from_slice(&head);
        let (at, file) = (self.log.end, &self.slice.file);
        if let Err(e) = file.write_at(at, bytes) {
            let doing = format!("writing {} bytes to the slice {}", u64::from(sectors) * SECTOR, self.slice.name);
            // What was written of it must not be behind the seal later.
            if let Err(again) = file.truncate(at) {
                self.log.broken = Some(format!("{doing}: {e}; cutting it off again: {again}"));
            }
            return Err(Error::io(doing, e));
        }
        self.log.digest.add(&head);
        self.log.end += bytes.len() as u64;
        Ok(at + RECORD as u64)
    }
}
