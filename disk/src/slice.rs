//! One slice while it is written: an epoch's log, from its first record to its commit mark.
//!
//! Appends are one at a time: the log has no gaps, and the order of the log is the order in which the index sees the writes. What
//! costs time (copying, the checksum of the data) happens before.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, TryLockError};

use understudy_protocol::ids::{Epoch, Generation};

use crate::block::SECTOR;
use crate::error::{Doing, Error, Result};
use crate::record::{Digest, Kind, RECORD, Record, Scan, SliceId, Tag, scan};
use crate::store::{Directory, LogFile};

/// Behind a slice's name: its copy after a failure, until it takes the slice's place.
pub(crate) const RESCUE: &str = ".new";

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
    file: RwLock<Arc<dyn LogFile>>,
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
        let file = RwLock::new(file);
        Slice { id, name, file, log: Mutex::default(), committed: AtomicBool::new(false), failed: OnceLock::new() }
    }

    /// One that was found, complete.
    pub fn found(id: SliceId, name: SliceName, file: Arc<dyn LogFile>, scan: &Scan, committed: bool) -> Self {
        let log = Log { end: scan.end, digest: scan.digest.clone(), sealed: true, broken: None };
        let file = RwLock::new(file);
        Slice { id, name, file, log: Mutex::new(log), committed: AtomicBool::new(committed), failed: OnceLock::new() }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bytes(&self) -> u64 {
        self.log().end
    }

    /// The same; `None`: somebody appends to it.
    pub fn try_bytes(&self) -> Option<u64> {
        match self.log.try_lock() {
            Ok(log) => Some(log.end),
            Err(TryLockError::Poisoned(log)) => Some(log.into_inner().end),
            Err(TryLockError::WouldBlock) => None,
        }
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

    /// Its file.
    pub fn file(&self) -> Arc<dyn LogFile> {
        self.file.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Close it: all that is in it is durable, and says that it is all.
    pub fn seal(&self, dir: &dyn Directory) -> Result<()> {
        let mut log = self.log();
        if log.sealed {
            return Ok(());
        }
        if log.broken.is_some() {
            self.rescue(&mut log, dir)?;
        } else {
            let seal = self.mark(Kind::Seal, &log.digest).encode();
            let doing = || format!("sealing the slice {}", self.name);
            let file = self.file();
            if let Err(e) = file.write_at(log.end, &seal).and_then(|()| file.sync()) {
                if !is_full(&e) {
                    // After a flush that failed nothing says what is on the disk; a second one would succeed and prove nothing.
                    log.broken = Some(format!("{}: {e}", doing()));
                }
                return Err(Error::io(doing(), e));
            }
        }
        log.sealed = true;
        Ok(())
    }

    /// A flush failed, or what a write left could not be cut off. What the kernel still has of the slice goes to a new file, if it is all of it.
    fn rescue(&self, log: &mut Log, dir: &dyn Directory) -> Result<()> {
        let (name, old) = (format!("{}{RESCUE}", self.name), self.file());
        let doing = || {
            let why = log.broken.as_deref().unwrap_or_default();
            format!("copying the slice {} after a failure ({why})", self.name)
        };
        match dir.remove(&name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(doing(), e)),
            _ => {}
        }
        let new = dir.create(&name).doing(doing)?;
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < log.end {
            let part = &mut buffer[..(log.end - at).min(1 << 20) as usize];
            if old.read_at(at, part).doing(doing)? != part.len() {
                break;
            }
            new.write_at(at, part).doing(doing)?;
            at += part.len() as u64;
        }
        let copied = scan(&*new, self.id).doing(doing)?;
        if copied.end != log.end || copied.digest.finish() != log.digest.finish() {
            return Err(Error::Refused(format!(
                "{}: its content is lost, so its epoch cannot be committed; let the standby take over",
                doing()
            )));
        }
        let seal = self.mark(Kind::Seal, &log.digest).encode();
        new.write_at(log.end, &seal).and_then(|()| new.sync()).doing(doing)?;
        dir.rename(&name, &self.name.to_string()).doing(doing)?;
        *self.file.write().unwrap_or_else(PoisonError::into_inner) = new;
        log.broken = None;
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
        self.file()
            .write_at(log.end + RECORD as u64, &mark)
            .and_then(|()| self.sync_commit())
            .doing(|| format!("committing the slice {}", self.name))?;
        self.committed.store(true, Ordering::Release);
        Ok(())
    }

    #[cfg(not(test))]
    fn sync_commit(&self) -> io::Result<()> {
        self.file().sync()
    }

    #[cfg(test)]
    fn sync_commit(&self) -> io::Result<()> {
        if crate::sim::sabotaged(crate::sim::Sabotage::CommitWithoutFlush) { Ok(()) } else { self.file().sync() }
    }

    fn mark(&self, kind: Kind, digest: &Digest) -> Record {
        Record { kind, slice: self.id, sector: 0, sectors: 0, number: digest.records(), crc: digest.finish() }
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

impl Appending<'_> {
    /// Records so far, and bytes.
    pub fn position(&self) -> (u32, u64) {
        (self.log.digest.records(), self.log.end)
    }

    /// Append records that another node's slice has: they were checked. When it fails the log is as before.
    pub fn append_encoded(&mut self, heads: &[[u8; RECORD]], bytes: &[u8]) -> Result<()> {
        if let Some(why) = &self.log.broken {
            return Err(Error::Refused(why.clone()));
        }
        let (at, file) = (self.log.end, self.slice.file());
        if let Err(e) = file.write_at(at, bytes) {
            let doing = format!("writing {} bytes to the slice {}", bytes.len(), self.slice.name);
            if let Err(again) = file.truncate(at) {
                self.log.broken = Some(format!("{doing}: {e}; cutting it off again: {again}"));
            }
            return Err(Error::io(doing, e));
        }
        heads.iter().for_each(|head| self.log.digest.add(head));
        self.log.end += bytes.len() as u64;
        Ok(())
    }

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
        let (at, file) = (self.log.end, self.slice.file());
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
