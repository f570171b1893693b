//! A standby's copy of a mirrored disk.
//!
//! Between sessions it is a directory with a record; in a session in step it is a [`Disk`] that only follows, with the same slices, the same merging and the same
//! guards as any. While it is synchronised it is a base that is written here and there, and a record that says so.

use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use understudy_protocol::ids::{Epoch, Generation};

use super::record::{Mirror, Role, TURNS, on_history};
use super::sync::is_zero;
use super::{Begin, Content, Item, LogPiece, PeerState, Rejoin, Standing, Turn};
use crate::block::{Block, Format, admit};
use crate::disk::{Disk, Following, Incoming, Limits, Merged};
use crate::error::{Doing, Error, Result};
use crate::merger::Merger;
use crate::owner::{self, BASE_LOCK, Identity, Ownership};
use crate::record::Tag;
use crate::recover::{self, Examined, Memory};
use crate::slice::{Slice, SliceName};
use crate::store::{Directory, Lock};

/// Most bytes in an [`Item`] that has or compares content.
const ITEM: u64 = 16 << 20;
/// Before the first slice.
const NOTHING: Tag = Tag { serial: 0, generation: Generation::ZERO, epoch: Epoch::ZERO, records: 0, digest: 0 };

/// What to open.
pub struct CopyOptions {
    /// The copy's base; it may be smaller than the primary's disk, also empty: [`Copy::begin`] enlarges it.
    pub base: Arc<dyn Block>,
    /// Its format.
    pub format: Format,
    /// Where its slices are.
    pub directory: Arc<dyn Directory>,
    /// The machine.
    pub machine: String,
    /// This node.
    pub node: String,
    /// Bounds.
    pub limits: Limits,
}

/// What became of an [`Item`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is written, or what is there is the same.
    Done,
    /// What is there has another hash: to be said with the acknowledgement.
    Differs,
}

/// How a copy is.
#[derive(Debug, Clone, Serialize)]
pub struct CopyStatus {
    /// The base.
    pub name: String,
    /// `idle`, `syncing` or `follows`.
    pub standing: &'static str,
    /// Bytes in slices that are not merged.
    pub backlog_bytes: u64,
    /// What is wrong, if something is.
    pub problem: Option<String>,
}

/// What goes on.
enum Session {
    Idle,
    Syncing(Generation),
    Follows(Arc<Disk>),
}

struct Inner {
    session: Session,
    /// With the disk, while one follows.
    lock: Option<Box<dyn Lock>>,
    merger: Option<Merger>,
    incoming: Option<Incoming>,
    pinned: bool,
    /// See [`Role::Syncing`]. Kept here too, in case that it cannot be stored.
    distrust: bool,
}

/// See the [module](self).
pub struct Copy {
    with: CopyOptions,
    merging: bool,
    inner: Mutex<Inner>,
}

/// What is in a directory whose record is this.
fn standing(dir: &dyn Directory, owner: &Ownership) -> Result<Standing> {
    let role = owner.mirror.as_ref().map(|mirror| &mirror.role);
    if let Some(Role::Syncing { from, sync, .. }) = role {
        return Ok(Standing::Syncing { from: from.clone(), sync: *sync });
    }
    let (slices, _) = recover::examine(dir, owner, |_| {})?;
    let committed = recover::decide(dir, owner, &slices, Memory::None)?;
    let last = committed.checked_sub(1).map_or(owner.newest.serial, |i| slices[i].id.serial);
    let next = |(slice, serial): &(&Examined, u64)| slice.whole() && slice.id.serial == *serial;
    let sealed = slices[committed..].iter().zip(last + 1..).take_while(next).map(|(slice, _)| slice.tag()).collect();
    let committed: Vec<_> = slices[..committed].iter().map(Examined::tag).collect();
    let at = committed.last().copied().unwrap_or(owner.newest);
    Ok(match role {
        Some(Role::Follows { .. }) => Standing::Follows { at, sealed },
        Some(Role::Outdated { by, .. }) => Standing::Outdated { by: by.clone(), at, sealed },
        _ => Standing::Ran { direct: owner.direct, merged: owner.newest, committed, sealed },
    })
}

/// The states of a standing: what is committed, and what is sealed beyond that.
fn states(standing: &Standing) -> Option<(Tag, &[Tag], bool)> {
    match standing {
        Standing::Follows { at, sealed } | Standing::Outdated { at, sealed, .. } => Some((*at, sealed, false)),
        Standing::Ran { direct, merged, committed, sealed } => {
            Some((committed.last().copied().unwrap_or(*merged), sealed, *direct))
        }
        Standing::Empty | Standing::Syncing { .. } => None,
    }
}

impl Copy {
    /// Open it. It holds `base.lock` until it is dropped. A process that takes the machine over with a checkpoint does not wait for that; one that boots it
    /// does.
    ///
    /// # Errors
    /// Another process has it; it belongs to another machine.
    pub fn open(options: CopyOptions) -> Result<Copy> {
        Self::open_as(options, false)
    }

    /// Open it, with a thread that merges whenever it follows.
    ///
    /// # Errors
    /// As [`Copy::open`].
    pub fn open_merging(options: CopyOptions) -> Result<Copy> {
        Self::open_as(options, true)
    }

    fn open_as(with: CopyOptions, merging: bool) -> Result<Copy> {
        let dir = &*with.directory;
        if with.base.read_only() {
            return Err(Error::ReadOnly { disk: with.base.name().to_owned() });
        }
        let lock = dir.lock(BASE_LOCK, Duration::ZERO).doing(|| format!("locking {BASE_LOCK} in {}", dir.name()))?;
        let Some(lock) = lock else {
            return Err(Error::Owned(format!(
                "the copy {} is in use: another process holds {BASE_LOCK} in {}; end it, or wait for its end",
                with.base.name(),
                dir.name()
            )));
        };
        with.base.take_charge()?;
        // A process that was killed leaves writes in the kernel's cache.
        with.base.flush()?;
        let inner = Inner {
            session: Session::Idle,
            lock: Some(lock),
            merger: None,
            incoming: None,
            pinned: false,
            distrust: false,
        };
        let copy = Copy { with, merging, inner: Mutex::new(inner) };
        copy.record()?;
        Ok(copy)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dir(&self) -> &dyn Directory {
        &*self.with.directory
    }

    fn refuse<T>(&self, why: impl std::fmt::Display) -> Result<T> {
        Err(Error::Refused(format!("the copy {} on {} {why}", self.with.base.name(), self.with.node)))
    }

    /// The record, of this machine.
    fn record(&self) -> Result<Option<Ownership>> {
        let owner = Ownership::load(self.dir())?;
        if let Some(owner) = &owner
            && !owner.machine.is_empty()
            && owner.machine != self.with.machine
        {
            return Err(Error::Owned(format!(
                "{} belongs to the machine {} (last on {}, generation {}), not to {}; if that machine is gone for good: understudy-disk release",
                self.with.base.name(),
                owner.machine,
                owner.node,
                owner.generation,
                self.with.machine
            )));
        }
        Ok(owner)
    }

    /// What it is.
    ///
    /// # Errors
    /// It is damaged, or belongs to another machine; what the storage says.
    pub fn state(&self) -> Result<PeerState> {
        let inner = self.inner();
        let owner = self.record()?;
        let mut state = PeerState {
            node: self.with.node.clone(),
            machine: String::new(),
            disk: None,
            generation: Generation::ZERO,
            size: self.with.base.size(),
            format: self.with.format,
            standing: Standing::Empty,
            discard: None,
        };
        let Some(owner) = owner else { return Ok(state) };
        state.standing = match &inner.session {
            Session::Follows(disk) => {
                disk.check_owner()?;
                let (at, sealed) = disk.standing();
                Standing::Follows { at, sealed }
            }
            _ => standing(self.dir(), &owner)?,
        };
        (state.machine, state.disk, state.generation) = (owner.machine, Some(owner.disk), owner.generation);
        state.discard = owner.mirror.and_then(|mirror| mirror.discard);
        Ok(state)
    }

    /// No session any more; the lock is here again.
    fn stop(inner: &mut Inner) {
        inner.merger = None;
        inner.incoming = None;
        inner.pinned = false;
        if let Session::Follows(disk) = std::mem::replace(&mut inner.session, Session::Idle) {
            disk.hold_merging(None);
            inner.lock = disk.give_lock().or(inner.lock.take());
        }
    }

    /// Whether this sender may speak.
    fn admit(&self, machine: &str, from: &str, generation: Generation, owner: Option<&Ownership>) -> Result<()> {
        if generation == Generation::ZERO || from.is_empty() {
            return self.refuse("was sent something by nobody");
        }
        if machine != self.with.machine {
            return self.refuse(format!("is of the machine {}, and {from} sends that of {machine}", self.with.machine));
        }
        if from == self.with.node {
            return self.refuse("is to follow its own node: give the nodes names of their own");
        }
        let Some(owner) = owner else { return Ok(()) };
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::IgnoreGeneration) {
            return Ok(());
        }
        if owner.generation > generation {
            return Err(Error::Superseded {
                disk: self.with.base.name().to_owned(),
                node: owner.node.clone(),
                theirs: owner.generation,
                ours: generation,
            });
        }
        Ok(())
    }

    /// Numbers that can be counted on from, and a history that has room in the record.
    fn plausible(&self, tag: Tag, history: &[Turn]) -> Result<()> {
        if tag.serial > u64::MAX / 2 || history.len() > TURNS {
            return self.refuse("was sent numbers that no disk has");
        }
        Ok(())
    }

    /// The base is as large as the primary's disk.
    fn fit(&self, size: u64) -> Result<()> {
        let (name, is) = (self.with.base.name(), self.with.base.size());
        if is > size {
            return self.refuse(format!("has {is} bytes and the primary's disk {size}: make {name} as large"));
        }
        if is < size { self.with.base.resize(size) } else { Ok(()) }
    }

    /// Everything up to `at` counts, the rest is gone. The caller has made sure that nothing is lost by that.
    fn retake(&self, inner: &mut Inner, rejoin: &Rejoin) -> Result<Arc<Disk>> {
        let dir = self.dir();
        let claim = owner::claim(dir)?;
        let Some(before) = self.record()? else { return self.refuse("never had content, and cannot be in step") };
        self.admit(&rejoin.machine, &rejoin.from, rejoin.generation, Some(&before))?;
        let (mut slices, strays) = recover::examine(dir, &before, |_| {})?;
        let keep = match slices.iter().position(|slice| slice.tag() == rejoin.at) {
            Some(at) => at + 1,
            None if before.newest == rejoin.at => 0,
            None => {
                return self.refuse(format!(
                    "has not slice {}, up to which {} says it has all",
                    rejoin.at.serial, rejoin.from
                ));
            }
        };
        recover::chain(dir, &before, &slices[..keep])?;
        let forgotten: Vec<_> = slices.drain(keep..).map(|slice| slice.file_name).collect();
        // Slices of an earlier generation that are part of the new primary's history are committed, by that.
        let adopt = before.generation != rejoin.generation;
        // Accepted by name: a commit mark that is read may be only in the kernel's cache, if its flush failed.
        let counts = slices.iter().filter(|slice| adopt || slice.committed);
        let accepted = counts.map(|slice| slice.file_name.clone()).collect();
        let role = Role::Follows { of: rejoin.from.clone() };
        let owner = Ownership {
            machine: self.with.machine.clone(),
            node: self.with.node.clone(),
            generation: rejoin.generation,
            base: self.with.base.name().to_owned(),
            size: rejoin.size,
            direct: false,
            accepted,
            mirror: Some(Mirror { role, history: rejoin.history.clone(), peers: Vec::new(), discard: None }),
            ..before
        };
        owner.store(dir, &claim)?;
        for slice in &mut slices {
            let name = SliceName { owner: rejoin.generation, ..slice.name };
            if adopt && name != slice.name {
                dir.rename(&slice.file_name, &name.to_string())
                    .doing(|| format!("taking over the slice {} in {}", slice.file_name, dir.name()))?;
                slice.name = name;
            }
        }
        self.remove(&strays.iter().chain(&forgotten).collect::<Vec<_>>())?;
        drop(claim);
        let found = |s: Examined| Arc::new(Slice::found(s.id, s.name, s.file, &s.scan, s.committed || adopt));
        let (id, newest) = (owner.disk, owner.newest);
        Ok(self.follow(inner, rejoin.generation, id, slices.into_iter().map(found).collect(), newest))
    }

    /// Files that are of no use, and bitmaps of the time when the machine ran from here.
    fn remove(&self, names: &[&String]) -> Result<()> {
        let dir = self.dir();
        let all = dir.list().doing(|| format!("listing {}", dir.name()))?;
        let bitmaps = all.iter().filter(|name| name.starts_with("peer."));
        for name in names.iter().copied().chain(bitmaps) {
            match dir.remove(name) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::io(format!("throwing away {name} in {}", dir.name()), e));
                }
                _ => {}
            }
        }
        dir.sync().doing(|| format!("flushing the directory {}", dir.name()))
    }

    fn follow(
        &self,
        inner: &mut Inner,
        generation: Generation,
        id: u64,
        slices: Vec<Arc<Slice>>,
        at: Tag,
    ) -> Arc<Disk> {
        let me = Identity { machine: self.with.machine.clone(), node: self.with.node.clone(), generation };
        let with = Following {
            base: self.with.base.clone(),
            dir: self.with.directory.clone(),
            me,
            id,
            limits: self.with.limits,
            base_lock: inner.lock.take(),
        };
        Arc::new(Disk::follow(with, slices, at))
    }

    fn start(&self, inner: &mut Inner, disk: Arc<Disk>) -> Result<()> {
        if self.merging {
            inner.merger = Some(Merger::start(disk.clone())?);
        }
        inner.session = Session::Follows(disk);
        Ok(())
    }

    /// Whether anything that counted is beyond `keep`.
    fn would_lose(&self, owner: &Ownership, keep: Option<Tag>, history: &[Turn], from: &str) -> Result<()> {
        let consent = owner.mirror.as_ref().and_then(|mirror| mirror.discard.as_deref()) == Some(from);
        if consent {
            return Ok(());
        }
        let standing = match standing(self.dir(), owner) {
            Ok(standing) => standing,
            // Nothing that is damaged is used; what its record says is enough.
            Err(Error::Corrupt { .. }) if keep.is_none() => {
                let (merged, committed, sealed) = (owner.newest, Vec::new(), Vec::new());
                Standing::Ran { direct: owner.direct, merged, committed, sealed }
            }
            Err(e) => return Err(e),
        };
        let Some((at, sealed, direct)) = states(&standing) else { return Ok(()) };
        let fits = match keep {
            Some(keep) => keep == at || sealed.contains(&keep),
            None => on_history(history, at),
        };
        if fits && !direct {
            return Ok(());
        }
        self.refuse(format!(
            "was written alone ({}slice {}, generation {}), and {from} does not have that: it is not overwritten. If it is not needed: \
             understudy-disk discard DISK --in-favour-of {from}",
            if direct { "without protection, after " } else { "" },
            at.serial,
            at.generation
        ))
    }

    /// Go on in step: what is beyond the tag is thrown away, the log goes on behind it.
    ///
    /// # Errors
    /// The sender is of an older generation, or of another disk; it has not what the tag names; it would throw away what it wrote alone.
    pub fn rejoin(&self, rejoin: &Rejoin) -> Result<()> {
        let inner = &mut *self.inner();
        Self::stop(inner);
        self.plausible(rejoin.at, &rejoin.history)?;
        let Some(owner) = self.record()? else { return self.refuse("never had content, and cannot be in step") };
        self.admit(&rejoin.machine, &rejoin.from, rejoin.generation, Some(&owner))?;
        if owner.disk != rejoin.disk {
            return self.refuse(format!("is of the disk {:016x}, not of {:016x}", owner.disk, rejoin.disk));
        }
        if matches!(owner.mirror.as_ref().map(|m| &m.role), Some(Role::Syncing { .. })) {
            return self.refuse("is being synchronised, and is not in step");
        }
        self.would_lose(&owner, Some(rejoin.at), &rejoin.history, &rejoin.from)?;
        self.fit(rejoin.size)?;
        let disk = self.retake(inner, rejoin)?;
        self.start(inner, disk)
    }

    /// A synchronisation begins: from now on, durably, the copy is not usable.
    ///
    /// # Errors
    /// As [`Copy::rejoin`]; the base cannot be enlarged.
    pub fn begin(&self, begin: &Begin) -> Result<()> {
        let inner = &mut *self.inner();
        Self::stop(inner);
        self.plausible(begin.keep.unwrap_or(NOTHING), &begin.history)?;
        let owner = self.record()?;
        self.admit(&begin.machine, &begin.from, begin.generation, owner.as_ref())?;
        let role = owner.as_ref().and_then(|owner| owner.mirror.as_ref()).map(|mirror| &mirror.role);
        inner.distrust |= begin.resumed && matches!(role, Some(Role::Syncing { distrust: true, .. }));
        let distrust = inner.distrust;
        let ours = matches!(role, Some(Role::Syncing { from, sync, .. }) if *from == begin.from && *sync == begin.sync);
        if begin.resumed && !ours {
            return self.refuse(format!("knows nothing of the synchronisation with which {} goes on", begin.from));
        }
        if let Some(owner) = owner.as_ref().filter(|_| !begin.resumed) {
            if owner.disk != begin.disk
                && owner.mirror.as_ref().and_then(|m| m.discard.as_deref()) != Some(&*begin.from)
            {
                return self.refuse(format!(
                    "is of another disk ({:016x}) than {}'s ({:016x}): it is not overwritten. If it is not needed: \
                     understudy-disk discard DISK --in-favour-of {}",
                    owner.disk, begin.from, begin.disk, begin.from
                ));
            }
            self.would_lose(owner, begin.keep, &begin.history, &begin.from)?;
        }
        self.fit(begin.size)?;
        if let Some(at) = begin.keep {
            // Its own slices up to there go into its base while it is still whole.
            let Begin { machine, from, generation, disk, size, history, .. } = begin.clone();
            let disk = self.retake(inner, &Rejoin { machine, from, generation, disk, size, at, history })?;
            let merged = disk.commit_received(at).and_then(|()| {
                while let Merged::Slices { .. } = disk.merge()? {}
                Ok(())
            });
            inner.lock = disk.give_lock();
            merged?;
        }
        let dir = self.dir();
        let claim = owner::claim(dir)?;
        let me =
            Identity { machine: self.with.machine.clone(), node: self.with.node.clone(), generation: begin.generation };
        let mut record = Ownership::fresh(begin.disk, &me, self.with.base.name(), self.with.format, begin.size);
        record.newest = begin.keep.unwrap_or(record.newest);
        let role = Role::Syncing { from: begin.from.clone(), sync: begin.sync, distrust };
        record.mirror = Some(Mirror { role, history: begin.history.clone(), peers: Vec::new(), discard: None });
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::BeginForgotten) {
            inner.session = Session::Syncing(begin.generation);
            return Ok(());
        }
        record.store(dir, &claim)?;
        let names = dir.list().doing(|| format!("listing {}", dir.name()))?;
        self.remove(&names.iter().filter(|name| SliceName::parse(name).is_some()).collect::<Vec<_>>())?;
        inner.session = Session::Syncing(begin.generation);
        Ok(())
    }

    fn require_syncing(&self, inner: &Inner) -> Result<Generation> {
        match inner.session {
            Session::Syncing(generation) => Ok(generation),
            _ => self.refuse("is not being synchronised"),
        }
    }

    fn read(&self, item: &Item) -> Result<Vec<u8>> {
        if item.len > ITEM {
            return self.refuse(format!("was sent {} bytes in one piece", item.len));
        }
        admit(&*self.with.base, item.at, item.len)?;
        let mut bytes = vec![0; item.len as usize];
        self.with.base.read_at(item.at, &mut bytes)?;
        Ok(bytes)
    }

    /// A part of a synchronisation.
    ///
    /// # Errors
    /// None is going on; it is not for this disk; what the storage says.
    pub fn apply(&self, item: &Item) -> Result<Applied> {
        let inner = self.inner();
        self.require_syncing(&inner)?;
        admit(&*self.with.base, item.at, item.len)?;
        let trust = !inner.distrust;
        match &item.content {
            Content::Data(bytes) if bytes.len() as u64 == item.len => self.with.base.write_at(item.at, bytes)?,
            Content::Data(bytes) => return self.refuse(format!("was sent {} bytes for {}", bytes.len(), item.len)),
            // What is zero stays as it is: it may be a hole.
            Content::Zero => {
                if !trust || item.len > ITEM || !is_zero(&self.read(item)?) {
                    self.with.base.write_zeroes(item.at, item.len, true)?;
                }
            }
            Content::Hash(hash) => {
                if !trust || blake3::hash(&self.read(item)?) != *hash {
                    return Ok(Applied::Differs);
                }
            }
        }
        Ok(Applied::Done)
    }

    /// What was applied is durable: to be called before it is acknowledged.
    ///
    /// # Errors
    /// What the storage says. Then the session is to be given up: what was not acknowledged is sent again.
    pub fn flush(&self) -> Result<()> {
        let inner = &mut *self.inner();
        self.require_syncing(inner)?;
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::CopyNotFlushed) {
            return Ok(());
        }
        self.flush_base(inner)
    }

    fn flush_base(&self, inner: &mut Inner) -> Result<()> {
        self.with.base.flush().inspect_err(|_| {
            inner.distrust = true;
            // If that cannot be stored, a process that begins again cannot know it; as for any flush that failed.
            drop(self.store_distrust());
        })
    }

    fn store_distrust(&self) -> Result<()> {
        let claim = owner::claim(self.dir())?;
        let Some(mut owner) = self.record()? else { return Ok(()) };
        if let Some(Role::Syncing { distrust, .. }) = owner.mirror.as_mut().map(|mirror| &mut mirror.role) {
            *distrust = true;
        }
        owner.store(self.dir(), &claim)
    }

    /// The synchronisation is complete: the copy is exactly the disk as of this tag, durably.
    ///
    /// # Errors
    /// None is going on; what the storage says.
    pub fn into_step(&self, tag: Tag) -> Result<()> {
        let inner = &mut *self.inner();
        let generation = self.require_syncing(inner)?;
        self.plausible(tag, &[])?;
        self.flush_base(inner)?;
        let dir = self.dir();
        let claim = owner::claim(dir)?;
        let Some(mut owner) = self.record()? else { return self.refuse("has lost its record") };
        let syncing = owner.generation == generation && owner.node == self.with.node;
        let Some(mirror) = owner.mirror.as_mut().filter(|_| syncing) else {
            return self.refuse("is not being synchronised any more");
        };
        if let Role::Syncing { from, .. } = &mirror.role {
            mirror.role = Role::Follows { of: from.clone() };
        }
        owner.newest = tag;
        owner.store(dir, &claim)?;
        drop(claim);
        inner.distrust = false;
        let disk = self.follow(inner, generation, owner.disk, Vec::new(), tag);
        self.start(inner, disk)
    }

    fn following(&self, inner: &Inner) -> Result<Arc<Disk>> {
        match &inner.session {
            Session::Follows(disk) => Ok(disk.clone()),
            _ => self.refuse("is not in step"),
        }
    }

    /// A piece of the log. When too much waits to be merged, it waits for that.
    ///
    /// # Errors
    /// It is not the piece that comes next; it has a wrong checksum; what the storage says. Then the session is to be given up.
    pub fn append(&self, piece: &LogPiece) -> Result<()> {
        let inner = &mut *self.inner();
        let disk = self.following(inner)?;
        if disk.status().backlog_bytes > self.with.limits.backlog && !inner.pinned {
            disk.merge()?;
        }
        disk.receive(&mut inner.incoming, piece)
    }

    /// The epoch's end: everything up to this tag is here, complete and durable when this returns. Pieces of later slices may have come before.
    ///
    /// # Errors
    /// It is not here, or is something else; what the storage says.
    pub fn seal(&self, tag: Tag) -> Result<()> {
        let inner = self.inner();
        let disk = self.following(&inner)?;
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::CopyNotSealed) {
            return Ok(());
        }
        disk.seal_received(tag, inner.incoming.as_ref())
    }

    /// The epoch's memory was committed. Durable when it returns: then it may be acknowledged.
    ///
    /// # Errors
    /// It was not sealed; the copy was taken over; what the storage says.
    pub fn commit(&self, tag: Tag) -> Result<()> {
        let disk = self.following(&self.inner())?;
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::CopyNotSealed) {
            return Ok(());
        }
        disk.commit_received(tag)
    }

    /// Merge, as [`Disk::merge`]. [`Copy::open_merging`] has a thread that does it.
    ///
    /// # Errors
    /// As there.
    pub fn merge(&self) -> Result<Merged> {
        let disk = match &self.inner().session {
            Session::Follows(disk) => disk.clone(),
            _ => return Ok(Merged::Nothing),
        };
        disk.merge()
    }

    /// The session is over: what was not sealed is thrown away; what was sealed is kept, as the checkpoint may be promoted. Merging goes on.
    pub fn abandon(&self) {
        let inner = &mut *self.inner();
        inner.incoming = None;
        inner.pinned = false;
        match &inner.session {
            Session::Follows(disk) => {
                disk.forget_unsealed();
                disk.hold_merging(None);
            }
            _ => inner.session = Session::Idle,
        }
    }

    /// Somebody goes on without this copy, and has said so: it is durably not usable until it was synchronised, or a session begins in which it lacks nothing.
    ///
    /// # Errors
    /// The machine ran from it; what the storage says.
    pub fn outdate(&self, by: &str) -> Result<()> {
        let inner = &mut *self.inner();
        Self::stop(inner);
        outdate(self.dir(), by)
    }

    /// The primary's disk was enlarged.
    ///
    /// # Errors
    /// It would become smaller; what the storage says.
    pub fn resize(&self, size: u64) -> Result<()> {
        let _inner = self.inner();
        self.fit(size)
    }

    /// Hold the base still at this tag, or where it is if that is beyond. Says where it holds; `None`: that is not committed here yet.
    ///
    /// # Errors
    /// It is not in step, or has another history; what the storage says.
    pub fn pin(&self, tag: Tag) -> Result<Option<Tag>> {
        let inner = &mut *self.inner();
        let disk = self.following(inner)?;
        inner.pinned = true;
        let at = disk.hold_base_still()?;
        if at.serial > tag.serial { Ok(Some(at)) } else { disk.hold_base_at(tag) }
    }

    /// Merging may go on.
    pub fn unpin(&self) {
        let inner = &mut *self.inner();
        inner.pinned = false;
        if let Session::Follows(disk) = &inner.session {
            disk.hold_merging(None);
        }
    }

    /// Whether the base has what the item's hash says. Only while it is pinned.
    ///
    /// # Errors
    /// It is not pinned; what the storage says.
    pub fn compare(&self, item: &Item) -> Result<bool> {
        let pinned = self.inner().pinned;
        match &item.content {
            Content::Hash(hash) if pinned => Ok(blake3::hash(&self.read(item)?) == *hash),
            Content::Hash(_) => self.refuse("is to be compared while its base does not hold still"),
            _ => self.refuse("is to be compared with something that is no hash"),
        }
    }

    /// How it is.
    pub fn status(&self) -> CopyStatus {
        let inner = self.inner();
        let name = self.with.base.name().to_owned();
        match &inner.session {
            Session::Idle => CopyStatus { name, standing: "idle", backlog_bytes: 0, problem: None },
            Session::Syncing(_) => CopyStatus { name, standing: "syncing", backlog_bytes: 0, problem: None },
            Session::Follows(disk) => {
                let status = disk.status();
                CopyStatus { name, standing: "follows", backlog_bytes: status.backlog_bytes, problem: status.problem }
            }
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// Set the mark that a copy is outdated.
pub(crate) fn outdate(dir: &dyn Directory, by: &str) -> Result<()> {
    let claim = owner::claim(dir)?;
    let Some(mut owner) = Ownership::load(dir)? else { return Ok(()) };
    let role = owner.mirror.as_ref().map(|mirror| mirror.role.clone());
    let of = match role {
        Some(Role::Follows { of }) => of,
        // Not usable already.
        Some(Role::Syncing { .. } | Role::Outdated { .. }) => return Ok(()),
        Some(Role::Ran) | None => {
            return Err(Error::Refused(format!(
                "the machine ran from the disk in {} last, so it is nobody's copy and cannot be called outdated",
                dir.name()
            )));
        }
    };
    if let Some(mirror) = &mut owner.mirror {
        mirror.role = Role::Outdated { of, by: by.to_owned() };
    }
    owner.store(dir, &claim)
}
