//! A machine's disk: a base, and in front of it the slices of epochs that are not merged yet.
//!
//! ```text
//!  device threads            replicator                       merger
//!  read ── newest slice      cut(N)    slice N closed, N+1 open   │ oldest committed slices ──► base
//!        └ … oldest slice    seal(N)   slice N durable            │ flush the base
//!        └ base              …the standby commits epoch N…        │ owner record: merged up to N
//!  write ─► open slice       commit(N) marked, durable ───────────┘ remove the slices
//! ```
//! **Modes.** *Direct*: writes go to the base; the machine is unprotected. *Protected*: writes go to the slice of the open epoch, which the
//! replicator cuts, seals and commits; several may be on their way. *Solo*: writes go to slices that this disk commits by itself, at the
//! guest's flushes: after a takeover, until everything is merged and the base is this process's, and after protection ended.
//!
//! **What a guest's flush means.** Direct and solo: what was written before is durable when it returns. Protected: it returns at once, and
//! what was written before is durable when its epoch is committed. That is enough: whatever the guest does *because* the flush returned
//! is part of the same or a later epoch, and leaves the machine only when that is committed. After a takeover the guest is as of a cut at which,
//! to itself, the flush had returned and the data is there, or had not been asked for yet. If both nodes lose their power at once, the machine
//! boots from the newest committed epoch: what the outside saw is in it. (The output gate therefore opens only when
//! [`Disk::commit`] has returned.) So a flush costs nothing while protected, and lies to nobody who could tell.
//!
//! **Agreement with memory.** [`Disk::cut`] returns a [`Tag`] that goes into the checkpoint. [`Disk::seal`] must return before the standby is told the
//! end of the epoch; then a committed checkpoint finds its slices durable, whatever dies when. A takeover with a checkpoint takes exactly what the tag
//! names and throws the rest away.
//!
//! Locks are taken in this order: mode, table, a slice's log, index.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use understudy_protocol::ids::Epoch;

use crate::block::{Block, Format, Gather, SECTOR, Scatter, admit};
use crate::error::{Doing, Error, Result};
use crate::fenced;
use crate::index::{Index, Piece, Source};
use crate::mirror::peers::Mirroring;
use crate::owner::{self, BASE_LOCK, Identity, Ownership};
use crate::record::{DATA_SECTORS, Kind, RECORD, SliceId, Tag};
use crate::recover::{self, Memory};
use crate::slice::{Slice, SliceName};
use crate::store::{Directory, Lock};

mod begun;
mod follow;
mod guest;
mod merging;
mod mirrored;
mod status;

pub use status::Status;

pub(crate) use follow::{Following, Incoming};

/// Bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in slices that are not merged; beyond it writes are refused with [`Error::Backlog`]. A takeover reads them all, so it is also a bound
    /// for that.
    pub backlog: u64,
    /// Extents in the index (about 40 bytes of memory each).
    pub extents: usize,
    /// Bytes of slices that are merged before the base is flushed once.
    pub batch: u64,
    /// Bytes after which a solo slice is committed without being asked.
    pub solo: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { backlog: 512 << 20, extents: 1 << 20, batch: 64 << 20, solo: 32 << 20 }
    }
}

/// What to open, as whom.
pub struct Options {
    /// Where the merged content is.
    pub base: Arc<dyn Block>,
    /// Its format, for the record.
    pub format: Format,
    /// Where slices are kept; every node that may run the machine sees the same directory.
    pub directory: Arc<dyn Directory>,
    /// Who opens it.
    pub identity: Identity,
    /// With what memory the machine goes on.
    pub memory: Memory,
    /// Bounds.
    pub limits: Limits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Direct,
    Solo,
    Protected {
        open: Epoch,
    },
    /// A standby's copy ([`crate::mirror::Copy`]).
    Follows,
}

/// Slices that are not merged.
struct Table {
    slices: BTreeMap<u64, Arc<Slice>>,
    /// The one that is written to; it is in `slices` too.
    open: Option<Arc<Slice>>,
    /// The number for the next one.
    next: u64,
    /// As of the last cut.
    closed: Tag,
    /// Everything up to this one is merged.
    merged: Tag,
    /// The last one of which the owner record may speak.
    problem: Option<String>,
}

/// Why a disk does nothing any more.
enum Halt {
    /// A newer generation owns it.
    Superseded { node: String, theirs: understudy_protocol::ids::Generation },
    /// What the owner record says on storage is not known.
    Unknown(String),
}

/// See the [module](self). Share it in an [`Arc`].
pub struct Disk {
    pub(crate) base: Arc<dyn Block>,
    pub(crate) dir: Arc<dyn Directory>,
    pub(crate) me: Identity,
    id: u64,
    limits: Limits,
    mode: RwLock<Mode>,
    table: Mutex<Table>,
    room: Condvar,
    index: RwLock<Index>,
    base_lock: Mutex<Option<Box<dyn Lock>>>,
    /// Bytes in slices.
    waiting: AtomicU64,
    /// Bytes ever merged.
    merged_bytes: AtomicU64,
    /// Nothing is done any more, and why.
    halted: OnceLock<Halt>,
    /// Names of slices made so far, and how many of them are durable.
    names_made: AtomicU64,
    names_durable: Mutex<u64>,
    /// A flush of what was written directly failed: no later one proves anything.
    unflushed: OnceLock<String>,
    /// Direct writes that were begun and have not ended.
    flying: Arc<begun::Flying>,
    fence: Option<String>,
    discarded: Vec<String>,
    /// What peers have, if it is mirrored.
    pub(crate) mirror: Option<Mirroring>,
    /// Held while a batch is merged.
    merging: Mutex<()>,
    /// Nothing above this slice is merged now.
    limit: AtomicU64,
    /// Slices up to this one may be in the base in part.
    begun: AtomicU64,
    /// For those who look while the storage does not answer.
    seen: Mutex<Option<(Instant, Status)>>,
}

/// What [`Disk::merge`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Merged {
    /// Nothing is committed that is not merged.
    Nothing,
    /// So many slices, with so many bytes of log.
    Slices {
        /// How many.
        slices: usize,
        /// Of log.
        bytes: u64,
    },
    /// Somebody else still has the right to write to the base; a sentence that says who.
    Waiting(String),
}

/// What a [`Disk`] is made of, whoever makes it.
struct Opened {
    base: Arc<dyn Block>,
    dir: Arc<dyn Directory>,
    me: Identity,
    id: u64,
    limits: Limits,
    mirror: Option<Mirroring>,
    base_lock: Option<Box<dyn Lock>>,
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    /// Open it: claim it for the identity's generation, bring it to the state that fits the memory. After a takeover reads and writes work at once;
    /// merging goes on from [`Disk::merge`].
    ///
    /// # Errors
    /// It is somebody else's; it is not in the state that the memory needs; it is damaged. Each says what and why.
    pub fn open(options: Options) -> Result<Disk> {
        Self::open_as(options, false)
    }

    /// As [`Disk::open`], of a disk of which every node has its own copy: see [`crate::mirror`].
    ///
    /// # Errors
    /// As there; and this copy is not usable: it was being synchronised, or somebody went on without it.
    pub fn open_mirrored(options: Options) -> Result<Disk> {
        Self::open_as(options, true)
    }

    fn open_as(options: Options, mirrored: bool) -> Result<Disk> {
        let Options { base, format, directory: dir, identity: me, memory, limits } = options;
        if base.read_only() {
            return Err(Error::ReadOnly { disk: base.name().to_owned() });
        }
        let found = recover::take(&*base, &dir, format, &me, memory, mirrored)?;
        // The record is ours; before the first write, so is the device.
        let (base, fence) = fenced::fence(base, &dir, &me)?;
        if found.base_lock.is_some() {
            base.take_charge()?;
            // A process that was killed leaves writes in the kernel's cache. What the machine boots from must not vanish later.
            base.flush()?;
        }
        let mode = if found.owner.direct { Mode::Direct } else { Mode::Solo };
        let (mut index, mut slices) = (Index::default(), Vec::new());
        for (slice, scan) in found.slices {
            for (record, data) in &scan.records {
                index.insert(piece(slice.id.serial, record.kind, record.sector, record.sectors, *data));
            }
            slices.push(slice);
        }
        let mirror = found.owner.mirror.filter(|_| mirrored).map(|mirror| Mirroring::new(found.peers, mirror.history));
        let merged = found.owner.newest;
        let opened = Opened { base, dir, me, id: found.owner.disk, limits, mirror, base_lock: found.base_lock };
        let mut disk = Disk::with(opened, mode, index, slices, merged);
        (disk.discarded, disk.fence) = (found.discarded, fence);
        Ok(disk)
    }

    /// From what was found.
    fn with(opened: Opened, mode: Mode, index: Index, slices: Vec<Arc<Slice>>, merged: Tag) -> Disk {
        let Opened { base, dir, me, id, limits, mirror, base_lock } = opened;
        let closed = slices.last().map_or(merged, |slice| slice.tag());
        let waiting = slices.iter().map(|slice| slice.bytes()).sum();
        let begun = slices.iter().rev().find(|s| s.is_committed()).map_or(0, |s| s.id.serial);
        let slices = slices.into_iter().map(|slice| (slice.id.serial, slice)).collect();
        Disk {
            base,
            dir,
            me,
            id,
            limits,
            mode: RwLock::new(mode),
            table: Mutex::new(Table { slices, open: None, next: closed.serial + 1, closed, merged, problem: None }),
            room: Condvar::new(),
            index: RwLock::new(index),
            base_lock: Mutex::new(base_lock),
            waiting: AtomicU64::new(waiting),
            merged_bytes: AtomicU64::new(0),
            halted: OnceLock::new(),
            names_made: AtomicU64::new(0),
            names_durable: Mutex::new(0),
            unflushed: OnceLock::new(),
            flying: Arc::default(),
            fence: None,
            discarded: Vec::new(),
            mirror,
            merging: Mutex::new(()),
            limit: AtomicU64::new(u64::MAX),
            begun: AtomicU64::new(begun),
            seen: Mutex::new(None),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing more once a newer generation was seen.
    fn alive(&self) -> Result<()> {
        match self.halted.get() {
            None => Ok(()),
            Some(Halt::Superseded { node, theirs }) => Err(Error::Superseded {
                disk: self.base.name().to_owned(),
                node: node.clone(),
                theirs: *theirs,
                ours: self.me.generation,
            }),
            Some(Halt::Unknown(why)) => Err(Error::Refused(why.clone())),
        }
    }

    /// Look whether the disk is still ours, in the record itself.
    ///
    /// # Errors
    /// It is not; then nothing works on this [`Disk`] any more. The record cannot be read.
    pub fn check_owner(&self) -> Result<Ownership> {
        self.alive()?;
        let owner = Ownership::load(&*self.dir)?.ok_or_else(|| Error::Corrupt {
            what: format!("the record of whose disk it is in {} is gone", self.dir.name()),
        })?;
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::IgnoreGeneration) {
            return Ok(owner);
        }
        if owner.generation != self.me.generation || owner.machine != self.me.machine || owner.node != self.me.node {
            let (node, theirs) = (owner.node.clone(), owner.generation);
            let _ = self.halted.set(Halt::Superseded { node, theirs });
            self.room.notify_all();
            self.alive()?;
        }
        Ok(owner)
    }

    /// The open slice; made by the first write into it.
    fn open_slice(&self, mode: Mode) -> Result<Arc<Slice>> {
        let mut table = self.table();
        if let Some(open) = &table.open {
            return Ok(open.clone());
        }
        let epoch = match mode {
            Mode::Protected { open } => open,
            Mode::Direct | Mode::Solo | Mode::Follows => Epoch::ZERO,
        };
        let id = SliceId { disk: self.id, generation: self.me.generation, epoch, serial: table.next };
        let slice = self.make_slice(id)?;
        table.next += 1;
        table.slices.insert(id.serial, slice.clone());
        table.open = Some(slice.clone());
        Ok(slice)
    }

    /// A new slice with its file.
    fn make_slice(&self, id: SliceId) -> Result<Arc<Slice>> {
        let name =
            SliceName { serial: id.serial, generation: id.generation, epoch: id.epoch, owner: self.me.generation };
        let file_name = name.to_string();
        let made = self.dir.create(&file_name).or_else(|e| match e.kind() {
            // One of our own to which nothing could be written.
            std::io::ErrorKind::AlreadyExists => {
                self.dir.open(&file_name).and_then(|file| file.truncate(0).map(|()| file))
            }
            _ => Err(e),
        });
        let file = made.doing(|| format!("making the slice {name} in {}", self.dir.name()))?;
        self.names_made.fetch_add(1, Ordering::AcqRel);
        Ok(Arc::new(Slice::new(id, name, file)))
    }

    /// One request into the log and the index, or straight into the base.
    fn redirect(&self, kind: Kind, at: u64, len: u64, bytes: &mut [u8]) -> Result<()> {
        self.alive()?;
        let crc = if kind == Kind::Data { crc32fast::hash(&bytes[RECORD..]) } else { 0 };
        let mode = read(&self.mode);
        if *mode == Mode::Follows {
            return Err(Error::ReadOnly { disk: self.base.name().to_owned() });
        }
        if *mode == Mode::Direct {
            if let Some(mirror) = &self.mirror {
                mirror.before_direct(at, len)?;
            }
            let written = match kind {
                Kind::Data => self.base.write_at(at, &bytes[RECORD..]),
                _ => self.base.write_zeroes(at, len, kind == Kind::Discard),
            };
            if let Some(mirror) = &self.mirror {
                mirror.after_direct(at, len);
            }
            return written;
        }
        let waiting = self.waiting.load(Ordering::Relaxed);
        if waiting >= self.limits.backlog || read(&self.index).len() >= self.limits.extents {
            let disk = self.base.name().to_owned();
            return Err(Error::Backlog { disk, waiting, bound: self.limits.backlog });
        }
        let (sector, sectors) = (at / SECTOR, (len / SECTOR) as u32);
        let slice = self.open_slice(*mode)?;
        // Held until the index knows: log and index must see overlapping writes in the same order.
        let mut log = slice.appending();
        let data = log.append(kind, sector, sectors, crc, bytes)?;
        write(&self.index).insert(piece(slice.id.serial, kind, sector, sectors, data));
        drop(log);
        self.waiting.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn redirect_zeroes(&self, at: u64, len: u64, kind: Kind) -> Result<()> {
        admit(self, at, len)?;
        let most = u64::from(u32::MAX) * SECTOR;
        let (mut at, mut left) = (at, len);
        while left > 0 {
            let now = left.min(most);
            self.redirect(kind, at, now, &mut [0; RECORD])?;
            at += now;
            left -= now;
        }
        self.solo_bound();
        Ok(())
    }

    /// A solo slice that is large enough is committed, so that it can be merged. If that fails the write that made it so large is done all the
    /// same; the next one, or the guest's flush, tries again.
    fn solo_bound(&self) {
        if self.waiting.load(Ordering::Relaxed) < self.limits.solo || *read(&self.mode) != Mode::Solo {
            return;
        }
        let large = self.table().open.as_ref().is_some_and(|s| s.bytes() >= self.limits.solo);
        if large && let Err(e) = self.commit_solo() {
            self.table().problem = Some(e.to_string());
        }
    }

    /// Begin protection: writes go to the slice of `epoch` from now on. What the base has by then is durable first, so that the first checkpoint
    /// can rely on it. The guest should stand still only for a moment: flush before calling it when much was written.
    ///
    /// # Errors
    /// It is protected already; what the storage says.
    pub fn protect(&self, epoch: Epoch) -> Result<()> {
        self.check_owner()?;
        if *read(&self.mode) == Mode::Direct {
            // Most of it, while writes go on.
            self.flush_direct()?;
        }
        let mut mode = write(&self.mode);
        match *mode {
            Mode::Protected { open } => {
                return Err(Error::Refused(format!("{} is protected already, epoch {open} is open", self.base.name())));
            }
            Mode::Follows => return Err(Error::ReadOnly { disk: self.base.name().to_owned() }),
            Mode::Solo => {
                self.close();
                self.seal_upto(None)?;
                self.mark_upto(None)?;
            }
            Mode::Direct => {
                self.flying.land();
                self.flush_direct()?;
                if let Some(mirror) = &self.mirror {
                    mirror.cool()?;
                }
                let newest = self.owner_update(|owner| {
                    owner.direct = false;
                    // What was written directly is a state of its own.
                    owner.newest.serial += 1;
                    owner.newest.generation = self.me.generation;
                    owner.newest.epoch = Epoch::ZERO;
                })?;
                let mut table = self.table();
                table.next = newest.serial + 1;
                (table.closed, table.merged) = (newest, newest);
            }
        }
        *mode = Mode::Protected { open: epoch };
        Ok(())
    }

    /// End protection: everything that was written counts from now on. The caller must have made sure, durably, that no standby will be
    /// promoted from an older checkpoint.
    ///
    /// # Errors
    /// What the storage says. Calling it again is right.
    pub fn unprotect(&self) -> Result<()> {
        self.check_owner()?;
        let mut mode = write(&self.mode);
        if matches!(*mode, Mode::Protected { .. }) {
            self.close();
            *mode = Mode::Solo;
        }
        drop(mode);
        self.commit_solo()
    }

    /// Read-modify-write of the owner record, if it is still ours. Returns its [`Ownership::newest`].
    fn owner_update(&self, change: impl FnOnce(&mut Ownership)) -> Result<Tag> {
        let claim = owner::claim(&*self.dir)?;
        let before = self.check_owner()?;
        let mut owner = before.clone();
        change(&mut owner);
        if let Some(mirror) = &self.mirror {
            mirror.record(&mut owner);
        }
        if let Err(e) = owner.store(&*self.dir, &claim) {
            // It may have changed all the same, if only its last flush failed. This process goes on from the old one, so that must be what
            // stands there. (Most often it does: a file system that is full refuses before anything is renamed.)
            let unchanged = Ownership::load(&*self.dir).is_ok_and(|now| now.as_ref() == Some(&before));
            if !unchanged && let Err(again) = before.store(&*self.dir, &claim) {
                let _ = self.halted.set(Halt::Unknown(format!(
                    "{e}; and putting the old one back: {again}. What was written since the last commit cannot be kept apart any more; \
                     the machine must be started again"
                )));
            }
            return Err(e);
        }
        Ok(owner.newest)
    }

    /// Close the open slice. The mode is held for writing.
    fn close(&self) -> Tag {
        let mut table = self.table();
        if let Some(open) = table.open.take() {
            // Nothing can be appended any more: appending needs the mode.
            if open.bytes() == 0 {
                // Its only write failed; the number is given again. An empty file that stays is taken for nothing.
                table.slices.remove(&open.id.serial);
                table.next = open.id.serial;
                let _ = self.dir.remove(&open.name.to_string());
            } else {
                table.closed = open.tag();
            }
        }
        table.closed
    }

    /// The cut between two epochs: what was written so far is `epoch`'s, what comes is the next one's. No write is in flight afterwards
    /// that began before. No I/O: this is in the pause. The tag belongs into the checkpoint.
    ///
    /// # Errors
    /// Another epoch is open, or none.
    pub fn cut(&self, epoch: Epoch) -> Result<Tag> {
        self.alive()?;
        let mut mode = write(&self.mode);
        match *mode {
            Mode::Protected { open } if open == epoch => {
                let tag = self.close();
                if let Some(mirror) = &self.mirror {
                    mirror.cut(epoch, tag);
                }
                *mode = Mode::Protected { open: epoch.next() };
                Ok(tag)
            }
            Mode::Protected { open } => Err(Error::Refused(format!(
                "epoch {epoch} of {} is to be cut while epoch {open} is open",
                self.base.name()
            ))),
            _ => Err(Error::Refused(format!(
                "epoch {epoch} of {} is to be cut, and the disk is not protected",
                self.base.name()
            ))),
        }
    }

    /// Closed slices up to an epoch (or all) for which `pending` holds, oldest first.
    fn closed_upto(&self, epoch: Option<Epoch>, pending: impl Fn(&Slice) -> bool) -> Vec<Arc<Slice>> {
        let table = self.table();
        let open = table.open.as_ref().map(|s| s.id.serial);
        table
            .slices
            .values()
            .filter(|s| Some(s.id.serial) != open && s.id.generation == self.me.generation)
            .filter(|s| epoch.is_none_or(|e| s.id.epoch <= e) && pending(s))
            .cloned()
            .collect()
    }

    fn seal_upto(&self, epoch: Option<Epoch>) -> Result<()> {
        self.seal_these(self.closed_upto(epoch, |s| !s.is_committed() && !s.is_sealed()))
    }

    fn seal_these(&self, slices: Vec<Arc<Slice>>) -> Result<()> {
        for slice in slices {
            // It may take a new file.
            self.names_made.fetch_add(1, Ordering::AcqRel);
            slice.seal(&*self.dir)?;
        }
        // Also when there was nothing to seal: it may have failed here the last time.
        let mut durable = self.names_durable.lock().unwrap_or_else(PoisonError::into_inner);
        let made = self.names_made.load(Ordering::Acquire);
        if *durable < made {
            self.dir.sync().doing(|| format!("flushing the directory {}", self.dir.name()))?;
            *durable = made;
        }
        Ok(())
    }

    fn mark_upto(&self, epoch: Option<Epoch>) -> Result<()> {
        // The newest first: its mark commits what is before it, so that of cuts that were aborted none counts by itself.
        for slice in self.closed_upto(epoch, |s| !s.is_committed()).iter().rev() {
            slice.commit()?;
        }
        self.room.notify_all();
        Ok(())
    }

    /// Everything up to `epoch` is durable, and says that it is complete. To be called after its cut, and to have returned before the standby is told
    /// the end of the epoch.
    ///
    /// # Errors
    /// What the storage says; then this epoch must not be committed.
    pub fn seal(&self, epoch: Epoch) -> Result<()> {
        self.alive()?;
        self.seal_upto(Some(epoch))
    }

    /// The standby has committed `epoch`. Durable when it returns; only then may what the machine said leave.
    ///
    /// # Errors
    /// It was not sealed; the disk is not ours any more; what the storage says.
    pub fn commit(&self, epoch: Epoch) -> Result<()> {
        self.check_owner()?;
        if let Some(mirror) = &self.mirror {
            // First, so that what is merged then is not marked.
            mirror.commit(epoch);
        }
        self.mark_upto(Some(epoch))
    }

    /// What solo mode does at a flush.
    fn commit_solo(&self) -> Result<()> {
        {
            let mode = write(&self.mode);
            if *mode == Mode::Solo {
                self.close();
            }
        }
        self.check_owner()?;
        self.seal_upto(None)?;
        self.mark_upto(None)
    }

    /// Flush what was written to the base directly.
    fn flush_direct(&self) -> Result<()> {
        if let Some(why) = self.unflushed.get() {
            return Err(Error::Refused(format!(
                "{why}: what was written before may be lost, and no later flush can tell; boot the machine again"
            )));
        }
        self.base.flush().inspect_err(|e| drop(self.unflushed.set(e.to_string())))
    }

    /// Whether this process may write to the base; gets the right if it is free.
    fn hold_base(&self) -> Result<bool> {
        let mut lock = self.base_lock.lock().unwrap_or_else(PoisonError::into_inner);
        if lock.is_none() {
            let doing = || format!("locking {BASE_LOCK} in {}", self.dir.name());
            let Some(got) = self.dir.lock(BASE_LOCK, Duration::ZERO).doing(doing)? else { return Ok(false) };
            self.base.take_charge()?;
            self.base.flush()?;
            *lock = Some(got);
        }
        Ok(true)
    }

    /// If nothing waits any more and this process has the base to itself, a solo disk goes back to writing it directly. Says whether it is direct
    /// now. The guest's writes wait meanwhile, for at most a mebibyte to be merged.
    ///
    /// # Errors
    /// As [`Disk::merge`]; it stays solo.
    pub fn settle(&self) -> Result<bool> {
        match *read(&self.mode) {
            Mode::Direct => return Ok(true),
            Mode::Protected { .. } | Mode::Follows => return Ok(false),
            Mode::Solo => {}
        }
        if self.waiting.load(Ordering::Relaxed) > 1 << 20 || !self.hold_base()? {
            return Ok(false);
        }
        let mut mode = write(&self.mode);
        if *mode != Mode::Solo {
            return Ok(*mode == Mode::Direct);
        }
        self.close();
        self.seal_upto(None)?;
        self.mark_upto(None)?;
        while self.merge()? != Merged::Nothing {}
        if self.waiting.load(Ordering::Relaxed) > 0 {
            // Merging is held for a while.
            return Ok(false);
        }
        let newest = self.owner_update(|owner| {
            owner.direct = true;
            owner.newest.serial += 1;
            owner.newest.generation = self.me.generation;
            (owner.newest.epoch, owner.newest.records, owner.newest.digest) = (Epoch::ZERO, 0, 0);
        })?;
        let mut table = self.table();
        table.next = newest.serial + 1;
        (table.closed, table.merged) = (newest, newest);
        *mode = Mode::Direct;
        Ok(true)
    }

    /// Before a machine that was shut down lets go of its disk: all that it wrote is in the base, durably. What is protected must be committed (or
    /// given up with [`Disk::unprotect`]) first.
    ///
    /// # Errors
    /// It is protected; an earlier owner holds the base; as [`Disk::merge`]. What is not merged then waits for the next opening.
    pub fn finish(&self) -> Result<()> {
        if matches!(*read(&self.mode), Mode::Protected { .. }) {
            return Err(Error::Refused(format!("{} is still protected", self.base.name())));
        }
        self.commit_solo()?;
        loop {
            match self.merge()? {
                Merged::Slices { .. } => {}
                Merged::Nothing => {
                    self.flush_direct()?;
                    // The guest has ended: nobody writes.
                    return self.mirror.as_ref().map_or(Ok(()), Mirroring::cool);
                }
                Merged::Waiting(why) => return Err(Error::Owned(why)),
            }
        }
    }

    /// Wait until writes are admitted again, at most so long. Says whether they are. Device threads call it holding nothing that a cut waits for:
    /// room comes only from commits, and commits only from cuts.
    pub fn wait_for_room(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut table = self.table();
        loop {
            let room = self.waiting.load(Ordering::Relaxed) < self.limits.backlog
                && read(&self.index).len() < self.limits.extents;
            let left = until.saturating_duration_since(Instant::now());
            if room || left.is_zero() || self.halted.get().is_some() {
                return room;
            }
            table = self.room.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Wait for something to merge, at most so long.
    pub(crate) fn wait_for_work(&self, patience: Duration) {
        let table = self.table();
        let limit = self.limit.load(Ordering::Acquire);
        if table.slices.values().next().is_some_and(|s| s.is_committed() && s.id.serial <= limit) {
            return;
        }
        drop(self.room.wait_timeout(table, patience));
    }

    /// Let whoever waits look again.
    pub(crate) fn wake(&self) {
        self.room.notify_all();
    }

    /// The slices of these pieces; `None` if one was merged meanwhile.
    fn slices_of(&self, pieces: &[Piece]) -> Option<BTreeMap<u64, Arc<Slice>>> {
        let mut all = BTreeMap::new();
        let table = self.table();
        for piece in pieces {
            if let Source::Slice { serial, .. } = piece.source
                && !all.contains_key(&serial)
            {
                all.insert(serial, table.slices.get(&serial)?.clone());
            }
        }
        Some(all)
    }
}

fn piece(serial: u64, kind: Kind, sector: u64, sectors: u32, data: u64) -> Piece {
    let source = match kind {
        Kind::Data => Source::Slice { serial, data },
        _ => Source::Zero { serial, unmap: kind == Kind::Discard },
    };
    Piece { sector, sectors: sectors.into(), source }
}

fn read_slice(slice: &Slice, at: u64, to: &mut [u8], dir: &str) -> Result<()> {
    if let Some(why) = slice.failure() {
        return Err(Error::Corrupt { what: why.to_owned() });
    }
    let doing = || format!("reading {} bytes at {at} of the slice {} in {dir}", to.len(), slice.name);
    let doing = doing();
    match slice.file().read_at(at, to) {
        Ok(n) if n == to.len() => Ok(()),
        Ok(_) => Err(Error::Corrupt { what: format!("{doing}: the file is shorter than what was written to it") }),
        Err(e) => Err(Error::io(doing, e)),
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("name", &self.base.name()).field("me", &self.me).finish_non_exhaustive()
    }
}
