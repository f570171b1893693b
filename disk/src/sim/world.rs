//! Storage in memory that may forget, tear and reorder whatever was not flushed; processes that die or freeze at any operation.
//!
//! A *process* is a number. Everything it does goes through [`World::step`], where it may be stopped: killed, or frozen until it is thawed. A frozen
//! process is a thread that waits there, with all its locks and with the operation not done yet: when it wakes it goes on as if nothing had
//! happened.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::{Random, Sabotage, sabotaged};
use crate::block::{Block, SECTOR};
use crate::error::{Doing, Error, Result};
use crate::store::{Directory, Lock, LogFile};

pub type Process = u32;

/// What a process does when it comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Die,
    Freeze,
}

#[derive(Clone)]
struct Pending {
    by: Process,
    at: usize,
    bytes: Vec<u8>,
}

/// Bytes with what may still be lost.
#[derive(Default, Clone)]
struct Content {
    durable: Vec<u8>,
    /// A flush of these failed: they can be read, and no later flush makes them durable.
    doomed: Vec<Pending>,
    pending: Vec<Pending>,
    current: Vec<u8>,
}

fn put(to: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if to.len() < at + bytes.len() {
        to.resize(at + bytes.len(), 0);
    }
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Content {
    fn write(&mut self, by: Process, at: usize, bytes: &[u8]) {
        put(&mut self.current, at, bytes);
        self.pending.push(Pending { by, at, bytes: bytes.to_vec() });
    }
    fn sync(&mut self) {
        for p in self.pending.drain(..) {
            put(&mut self.durable, p.at, &p.bytes);
            // Written again: that one counts.
            self.doomed.retain(|d| d.at + d.bytes.len() <= p.at || p.at + p.bytes.len() <= d.at);
        }
        // The length is durable whatever became of the data.
        if self.durable.len() < self.current.len() {
            self.durable.resize(self.current.len(), 0);
        }
    }
    /// The flush fails, and the kernel forgets that there was something to write.
    fn sync_fails(&mut self) {
        for p in self.pending.drain(..) {
            let (mut at, end) = (p.at, p.at + p.bytes.len());
            while at < end {
                let stop = (at / SECTOR as usize + 1).saturating_mul(SECTOR as usize).min(end);
                self.doomed.retain(|d| d.at + d.bytes.len() <= at || stop <= d.at);
                self.doomed.push(Pending { by: p.by, at, bytes: p.bytes[at - p.at..stop - p.at].to_vec() });
                at = stop;
            }
        }
    }
    /// What a power cut leaves of one process's writes (or all): any subset of sectors.
    fn cut(&mut self, whose: Option<Process>, random: &mut Random) {
        let mut survivors = Vec::new();
        for p in std::mem::take(&mut self.pending) {
            if whose.is_some_and(|w| w != p.by) {
                survivors.push(p);
                continue;
            }
            // Often all or nothing, sometimes in pieces.
            let mood = random.below(4);
            let mut at = p.at;
            let end = p.at + p.bytes.len();
            while at < end {
                let stop = (at / SECTOR as usize + 1).saturating_mul(SECTOR as usize).min(end);
                let part = &p.bytes[at - p.at..stop - p.at];
                match mood {
                    0 => {}
                    1 => survivors.push(Pending { by: 0, at, bytes: part.to_vec() }),
                    _ if random.below(2) == 0 => survivors.push(Pending { by: 0, at, bytes: part.to_vec() }),
                    // The length got there, the data did not.
                    _ if random.below(4) == 0 && self.durable.len() < stop => {
                        survivors.push(Pending { by: 0, at, bytes: vec![0; stop - at] });
                    }
                    _ => {}
                }
                at = stop;
            }
        }
        // Whatever failed is gone with the cache, if it is this cache.
        self.doomed.retain(|p| whose.is_some_and(|w| w != p.by));
        self.current.clone_from(&self.durable);
        for p in self.doomed.iter().chain(&survivors) {
            put(&mut self.current, p.at, &p.bytes);
        }
        self.pending = survivors;
    }
}

#[derive(Clone)]
enum Naming {
    Set(String, u64),
    Move(String, String),
    Unset(String),
}

fn apply(names: &mut BTreeMap<String, u64>, naming: &Naming) {
    match naming {
        Naming::Set(name, file) => {
            names.insert(name.clone(), *file);
        }
        Naming::Move(from, to) => {
            if let Some(file) = names.remove(from) {
                names.insert(to.clone(), file);
            }
        }
        Naming::Unset(name) => {
            names.remove(name);
        }
    }
}

struct State {
    random: Random,
    base: Content,
    files: BTreeMap<u64, Content>,
    durable_names: BTreeMap<String, u64>,
    names: BTreeMap<String, u64>,
    namings: Vec<Naming>,
    next_file: u64,
    locks: BTreeMap<String, Process>,
    dead: BTreeSet<Process>,
    frozen: BTreeSet<Process>,
    /// After so many further operations this process stops.
    plans: BTreeMap<Process, (u64, Stop)>,
    /// One in so many writes to a slice finds the file system full.
    full: u64,
    /// Files of which a bit turned over. Two in one file may hide that it was committed.
    flipped: BTreeSet<u64>,
    /// One in so many flushes fails.
    flaky: u64,
    /// So does one in so many writes to the base, while this is set.
    merging: bool,
}

pub struct World {
    state: Mutex<State>,
    thaw: Condvar,
    pub operations: std::sync::atomic::AtomicU64,
}

impl World {
    pub fn new(random: Random, sectors: u64, full: u64, flaky: u64) -> Arc<Self> {
        let zero = vec![0; (sectors * SECTOR) as usize];
        Arc::new(World {
            state: Mutex::new(State {
                random,
                base: Content { durable: zero.clone(), current: zero, ..Content::default() },
                files: BTreeMap::new(),
                durable_names: BTreeMap::new(),
                names: BTreeMap::new(),
                namings: Vec::new(),
                next_file: 1,
                locks: BTreeMap::new(),
                dead: BTreeSet::new(),
                frozen: BTreeSet::new(),
                plans: BTreeMap::new(),
                full,
                flipped: BTreeSet::new(),
                flaky,
                merging: false,
            }),
            thaw: Condvar::new(),
            operations: Default::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// This process stops after so many more operations.
    pub fn plan(&self, process: Process, after: u64, stop: Stop) {
        self.state().plans.insert(process, (after, stop));
    }

    /// What a failed flush left unwritten goes out of the cache: it reads as what is on the storage.
    pub fn evict(&self) {
        let base = &mut self.state().base;
        base.doomed.clear();
        base.current.clone_from(&base.durable);
        for p in &base.pending {
            put(&mut base.current, p.at, &p.bytes);
        }
    }

    /// From now on (or not any more) the base may be found full.
    pub fn merging(&self, merging: bool) {
        self.state().merging = merging;
    }

    pub fn unplan(&self, process: Process) {
        self.state().plans.remove(&process);
    }

    pub fn is_dead(&self, process: Process) -> bool {
        self.state().dead.contains(&process)
    }

    pub fn thaw(&self, process: Process) {
        self.state().frozen.remove(&process);
        self.thaw.notify_all();
    }

    /// The node of this process loses its power: what it had not flushed is there in part. Nothing of it runs again.
    pub fn cut_node(&self, process: Process) {
        let state = &mut *self.state();
        state.dead.insert(process);
        state.frozen.remove(&process);
        state.locks.retain(|_, holder| *holder != process);
        let mut random = state.random.fork();
        state.base.cut(Some(process), &mut random);
        for file in state.files.values_mut() {
            file.cut(Some(process), &mut random);
        }
        self.thaw.notify_all();
    }

    /// Everything loses its power, the storage too.
    pub fn cut_all(&self, processes: impl IntoIterator<Item = Process>) {
        let state = &mut *self.state();
        state.dead.extend(processes);
        state.frozen.clear();
        state.locks.clear();
        let mut random = state.random.fork();
        state.base.cut(None, &mut random);
        state.base.sync();
        for file in state.files.values_mut() {
            file.cut(None, &mut random);
            file.sync();
        }
        // The file system's journal is replayed up to some point.
        let upto = random.below(state.namings.len() as u64 + 1) as usize;
        for naming in state.namings.drain(..).take(upto).collect::<Vec<_>>() {
            apply(&mut state.durable_names, &naming);
        }
        state.names.clone_from(&state.durable_names);
        self.thaw.notify_all();
    }

    /// A bit of one slice turns over. Says in which.
    pub fn flip(&self, which: impl Fn(&str) -> bool) -> Option<String> {
        let state = &mut *self.state();
        let names: Vec<_> = state.names.iter().filter(|(name, _)| which(name)).map(|(n, f)| (n.clone(), *f)).collect();
        let (name, file) = state.random.pick(&names)?.clone();
        let content = state.files.get_mut(&file)?;
        if content.current.is_empty() || !state.flipped.insert(file) {
            return None;
        }
        let at = state.random.below(content.current.len() as u64) as usize;
        let bit = 1 << state.random.below(8);
        content.current[at] ^= bit;
        if let Some(byte) = content.durable.get_mut(at) {
            *byte ^= bit;
        }
        Some(name)
    }

    fn step(&self, process: Process) -> io::Result<MutexGuard<'_, State>> {
        self.operations.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut state = self.state();
        let dead = || Err(io::Error::other("this process is dead"));
        if state.dead.contains(&process) {
            return dead();
        }
        if let Some((left, stop)) = state.plans.get_mut(&process) {
            if *left > 0 {
                *left -= 1;
            } else {
                let stop = *stop;
                state.plans.remove(&process);
                match stop {
                    Stop::Die => {
                        // Died, not cut: what it wrote is in somebody's cache.
                        state.dead.insert(process);
                        state.locks.retain(|_, holder| *holder != process);
                        return dead();
                    }
                    Stop::Freeze => {
                        state.frozen.insert(process);
                        self.thaw.notify_all();
                        while state.frozen.contains(&process) {
                            state = self.thaw.wait(state).unwrap();
                        }
                        if state.dead.contains(&process) {
                            return dead();
                        }
                    }
                }
            }
        }
        Ok(state)
    }

    /// Run something as a process that may freeze in it. True: it is frozen now, and the thread goes on when it is thawed.
    pub fn run(
        self: &Arc<Self>,
        process: Process,
        work: impl FnOnce() + Send + 'static,
    ) -> Option<std::thread::JoinHandle<()>> {
        let sabotage = super::current();
        let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (world, finished) = (self.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            super::set(sabotage);
            work();
            let state = world.state();
            finished.store(true, std::sync::atomic::Ordering::SeqCst);
            world.thaw.notify_all();
            drop(state);
        });
        let mut state = self.state();
        loop {
            if done.load(std::sync::atomic::Ordering::SeqCst) {
                drop(state);
                thread.join().unwrap();
                return None;
            }
            if state.frozen.contains(&process) {
                return Some(thread);
            }
            state = self.thaw.wait(state).unwrap();
        }
    }

    pub fn directory(self: &Arc<Self>, process: Process) -> Arc<dyn Directory> {
        Arc::new(Dir { world: self.clone(), process })
    }

    pub fn base(self: &Arc<Self>, process: Process) -> Arc<dyn Block> {
        Arc::new(Base { world: self.clone(), process })
    }
}

struct Dir {
    world: Arc<World>,
    process: Process,
}

struct Open {
    world: Arc<World>,
    process: Process,
    file: u64,
}

struct Base {
    world: Arc<World>,
    process: Process,
}

struct Held {
    world: Arc<World>,
    process: Process,
    name: String,
}

impl Lock for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.world.state();
        if state.locks.get(&self.name) == Some(&self.process) {
            state.locks.remove(&self.name);
        }
    }
}

impl LogFile for Open {
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<usize> {
        let state = self.world.step(self.process)?;
        let from = &state.files[&self.file].current;
        let from = from.get(at as usize..).unwrap_or_default();
        let n = from.len().min(to.len());
        to[..n].copy_from_slice(&from[..n]);
        Ok(n)
    }
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        let short = state.full > 0 && from.len() > 64 && state.random.below(state.full) == 0;
        let n = if short { state.random.below(from.len() as u64) as usize } else { from.len() };
        let by = self.process;
        state.files.get_mut(&self.file).unwrap().write(by, at as usize, &from[..n]);
        if short { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }
    fn sync(&self) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        let file = state.files.get_mut(&self.file).unwrap();
        if state.flaky > 0 && state.random.below(state.flaky) == 0 {
            file.sync_fails();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        file.sync();
        Ok(())
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.world.step(self.process)?.files[&self.file].current.len() as u64)
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        let content = state.files.get_mut(&self.file).unwrap();
        // At once in all views; it happens only to what failed.
        let len = len as usize;
        content.current.truncate(len);
        content.durable.truncate(len);
        for list in [&mut content.pending, &mut content.doomed] {
            list.retain_mut(|p| {
                p.bytes.truncate(len.saturating_sub(p.at));
                !p.bytes.is_empty()
            });
        }
        Ok(())
    }
}

impl Directory for Dir {
    fn name(&self) -> String {
        "slices".into()
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let state = &mut *self.world.step(self.process)?;
        if state.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.next_file;
        state.next_file += 1;
        state.files.insert(file, Content::default());
        state.names.insert(name.into(), file);
        state.namings.push(Naming::Set(name.into(), file));
        Ok(Arc::new(Open { world: self.world.clone(), process: self.process, file }))
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let state = self.world.step(self.process)?;
        let file = *state.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Open { world: self.world.clone(), process: self.process, file }))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        if !state.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let naming = Naming::Move(from.into(), to.into());
        apply(&mut state.names, &naming);
        state.namings.push(naming);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        if !state.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let naming = Naming::Unset(name.into());
        apply(&mut state.names, &naming);
        state.namings.push(naming);
        Ok(())
    }
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.world.step(self.process)?.names.keys().cloned().collect())
    }
    fn sync(&self) -> io::Result<()> {
        let state = &mut *self.world.step(self.process)?;
        if sabotaged(Sabotage::DirectoryNotFlushed) {
            return Ok(());
        }
        if state.flaky > 0 && state.random.below(state.flaky) == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        state.durable_names.clone_from(&state.names);
        state.namings.clear();
        Ok(())
    }
    fn lock(&self, name: &str, _: Duration) -> io::Result<Option<Box<dyn Lock>>> {
        let state = &mut *self.world.step(self.process)?;
        if state.locks.get(name).is_some_and(|holder| *holder != self.process) && !sabotaged(Sabotage::IgnoreLocks) {
            return Ok(None);
        }
        state.locks.insert(name.into(), self.process);
        Ok(Some(Box::new(Held { world: self.world.clone(), process: self.process, name: name.into() })))
    }
}

impl Block for Base {
    fn name(&self) -> &str {
        "base"
    }
    fn size(&self) -> u64 {
        self.world.state().base.durable.len() as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        let state = self.world.step(self.process).doing(|| "reading the base".into())?;
        to.copy_from_slice(&state.base.current[at as usize..at as usize + to.len()]);
        Ok(())
    }
    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        let state = &mut *self.world.step(self.process).doing(|| "writing the base".into())?;
        let full = state.merging && state.full > 0 && state.random.below(state.full) == 0;
        let n = if full { from.len() / 2 / 512 * 512 } else { from.len() };
        state.base.write(self.process, at as usize, &from[..n]);
        if full { Err(Error::Full { doing: "writing the base".into() }) } else { Ok(()) }
    }
    fn write_zeroes(&self, at: u64, len: u64, _: bool) -> Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }
    fn flush(&self) -> Result<()> {
        let state = &mut *self.world.step(self.process).doing(|| "flushing the base".into())?;
        if state.flaky > 0 && state.random.below(state.flaky) == 0 {
            state.base.sync_fails();
            return Err(io::Error::from_raw_os_error(libc::EIO)).doing(|| "flushing the base".into());
        }
        state.base.sync();
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<()> {
        Err(Error::Refused("not here".into()))
    }
    fn take_charge(&self) -> Result<()> {
        Ok(())
    }
}
