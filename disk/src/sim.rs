//! Deterministic simulation: a machine with a disk, its standby's memory, power cuts, frozen processes and takeovers, all from one seed.
//!
//! The oracle knows every sector's value at every cut. After a takeover with a checkpoint the disk must be, sector by sector, what it was at that
//! checkpoint's cut. After a power cut of everything it must be what it was at one cut, not older than the newest commit that was answered (that
//! one the outside has seen). Unprotected, what was flushed must be there.
//!
//! [`mirror`] has two nodes with a disk each. `UNDERSTUDY_DISK_SEEDS=FROM..TO` tries other seeds, as many as one likes. A failure names its seed.
//!
//! That the simulation sees is proved by [`Sabotage`]: each breaks one thing that the design rests on, and must be noticed.

mod mirror;
mod world;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use understudy_protocol::ids::{Epoch, Generation};
use world::{Process, Stop, World};

use crate::block::{Block, Format, SECTOR};
use crate::disk::{Disk, Limits, Merged, Options};
use crate::error::Error;
use crate::owner::Identity;
use crate::record::Tag;
use crate::recover::Memory;

/// Ways to break the design.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sabotage {
    None,
    /// Damaged data in a committed slice is taken as it is.
    IgnoreCrc,
    /// A commit is answered before it is durable.
    CommitWithoutFlush,
    /// Merged slices are removed before the base is flushed.
    RemoveBeforeFlush,
    /// An older generation goes on.
    IgnoreGeneration,
    /// A frozen process's locks are given to another.
    IgnoreLocks,
    /// New files are not made durable in their directory.
    DirectoryNotFlushed,
    /// No redirection: the guest writes to the base while it is called protected.
    WithoutRedirect,
    /// A standby commits epochs that were not sealed.
    CommitUnsealed,
    /// A block is marked as different after it was written.
    MarkAfterWrite,
    /// Merges of what a peer has not are not marked.
    MergeUnmarked,
    /// A copy that is being synchronised is run from.
    UseUnfinished,
    /// A copy does not remember that it is being synchronised.
    BeginForgotten,
    /// Blocks count as sent before they are durable there.
    ClearedEarly,
    /// What the guest has not flushed counts as sent for good.
    SentUnflushed,
    /// A copy says that blocks are durable and they are not.
    CopyNotFlushed,
    /// A copy acknowledges an epoch whose slice is not durable.
    CopyNotSealed,
}

thread_local! {
    static CURRENT: Cell<Sabotage> = const { Cell::new(Sabotage::None) };
}

pub(crate) fn sabotaged(sabotage: Sabotage) -> bool {
    current() == sabotage
}

pub(crate) fn current() -> Sabotage {
    CURRENT.get()
}

pub(crate) fn set(sabotage: Sabotage) {
    CURRENT.set(sabotage);
}

/// xorshift*: repeatable, and good enough to choose.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        (0..4).for_each(|_| {
            random.next();
        });
        random
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn fork(&mut self) -> Self {
        Random::new(self.next())
    }
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        if all.is_empty() { None } else { all.get(self.below(all.len() as u64) as usize) }
    }
}

const SECTORS: u64 = 48;

type Content = Vec<u64>;

/// A checkpoint of the machine's memory, as far as the disk is concerned.
#[derive(Clone, Debug)]
struct Checkpoint {
    epoch: u64,
    tag: Tag,
    content: Content,
    sealed: bool,
}

/// One process with the disk open.
struct Node {
    process: Process,
    disk: Arc<Disk>,
    /// A call that froze.
    call: Option<JoinHandle<()>>,
}

struct Sim {
    seed: u64,
    random: Random,
    world: Arc<World>,
    /// Flushes fail now and then: whatever needs one may be refused.
    flaky: bool,
    generation: u64,
    processes: u32,
    active: Option<Node>,
    zombies: Vec<Node>,
    /// What the guest would read.
    content: Content,
    /// Values that a sector may have after a power cut of everything, while unprotected: the flushed one and those written since.
    possible: Vec<Vec<u64>>,
    value: u64,
    protected: bool,
    open: u64,
    /// Cut, not committed by the standby yet.
    flying: Vec<Checkpoint>,
    /// The standby's.
    image: Option<Checkpoint>,
    /// Of which the outside has seen something.
    released: Option<Checkpoint>,
    /// The committed ones since, which a cold boot may find.
    committed: Vec<Checkpoint>,
    trace: Vec<String>,
    counts: BTreeMap<&'static str, u64>,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Whole,
    /// A flipped bit was found, and named.
    Named,
}

impl Sim {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let full = if random.one_in(3) { 30 } else { 0 };
        let flaky = if random.one_in(4) { 40 } else { 0 };
        let world = World::new(random.fork(), SECTORS, full, flaky);
        Sim {
            seed,
            random,
            world,
            flaky: flaky > 0,
            generation: 0,
            processes: 0,
            active: None,
            zombies: Vec::new(),
            content: vec![0; SECTORS as usize],
            possible: vec![vec![0]; SECTORS as usize],
            value: 0,
            protected: false,
            open: 0,
            flying: Vec::new(),
            image: None,
            released: None,
            committed: Vec::new(),
            trace: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn note(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
    }

    /// An error that comes of a flush that failed.
    fn forgiven(&self, e: &Error) -> bool {
        self.flaky && matches!(e, Error::Io { .. } | Error::Refused(_))
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn identity(&self, generation: u64) -> Identity {
        Identity { machine: "m".into(), node: format!("n{}", generation % 3), generation: Generation(generation) }
    }

    fn options(&self, process: Process, memory: Memory) -> Options {
        Options {
            base: self.world.base(process),
            format: Format::Raw,
            directory: self.world.directory(process),
            identity: self.identity(self.generation),
            memory,
            limits: Limits { backlog: 24 << 10, extents: 60, batch: 4 << 10, solo: 8 << 10 },
        }
    }

    fn read_all(&self, disk: &Disk) -> crate::Result<Content> {
        let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
        disk.read_at(0, &mut bytes)?;
        let sector = |s: &[u8]| {
            let value = u64::from_le_bytes(s[..8].try_into().unwrap());
            // One value all over the sector, or it is torn.
            if s.chunks(8).all(|c| c == &s[..8]) { value } else { u64::MAX }
        };
        Ok(bytes.chunks(SECTOR as usize).map(sector).collect())
    }

    /// Open with the next generation until it works, through crashes in between.
    fn start(&mut self, mut memory: Memory, allowed: Allowed) -> Result<(), End> {
        for attempt in 0.. {
            assert!(attempt < 40, "opening never works");
            self.generation += 1;
            self.processes += 1;
            let process = self.processes;
            if attempt < 3 && self.random.one_in(3) {
                let after = self.random.below(25);
                self.world.plan(process, after, Stop::Die);
            }
            let opened = Disk::open(self.options(process, memory));
            self.world.unplan(process);
            self.note(format!(
                "open {memory:?} as {}: {:?}",
                self.generation,
                opened.as_ref().map(|_| ()).map_err(|e| e.to_string())
            ));
            match opened {
                Ok(disk) => {
                    let content = match self.read_all(&disk) {
                        Ok(content) => content,
                        Err(e) => panic!("reading after a takeover: {e}"),
                    };
                    let found = allowed.check(&content);
                    assert!(found, "after {memory:?} the disk has {content:?}, allowed is {allowed:?}");
                    self.content = content;
                    self.possible = self.content.iter().map(|v| vec![*v]).collect();
                    self.active = Some(Node { process, disk: Arc::new(disk), call: None });
                    return Ok(());
                }
                Err(Error::Corrupt { .. }) if self.counts.contains_key("flip") => return Err(End::Named),
                Err(Error::Owned(_)) if !self.zombies.is_empty() => {
                    // It must be fenced first, then.
                    self.count("fenced");
                    self.fence();
                }
                Err(_) if self.world.is_dead(process) => {
                    self.count("died in takeover");
                    if self.random.one_in(3) {
                        self.note("and all lose power");
                        self.cut_all();
                        if self.random.one_in(2) {
                            memory = Memory::None;
                        }
                    }
                }
                Err(Error::Full { .. }) => self.count("full"),
                Err(e) if self.forgiven(&e) => {
                    self.count("flush failed");
                    // The next process cannot know of this one's flush. (Said in decision 0013.)
                    self.world.evict();
                }
                Err(e) => panic!("opening with {memory:?}: {e}"),
            }
        }
        unreachable!()
    }

    /// Frozen calls go on when their process is dead, and end.
    fn fence(&mut self) {
        for zombie in self.zombies.drain(..) {
            self.world.cut_node(zombie.process);
            if let Some(call) = zombie.call {
                call.join().unwrap();
            }
        }
    }

    fn cut_all(&mut self) {
        self.world.cut_all(1..=self.processes);
        self.fence();
    }

    /// The guest writes.
    fn write(&mut self) {
        let Some(node) = &self.active else { return };
        let at = self.random.below(SECTORS);
        let sectors = 1 + self.random.below(8.min(SECTORS - at));
        let (start, len) = (at * SECTOR, sectors * SECTOR);
        let clears = self.random.one_in(6);
        let first = self.value + 1;
        let done = if clears {
            node.disk.write_zeroes(start, len, self.random.one_in(2))
        } else if self.protected && sabotaged(Sabotage::WithoutRedirect) {
            let bytes = Self::bytes(first, sectors);
            self.world.base(node.process).write_at(start, &bytes)
        } else {
            node.disk.write_at(start, &Self::bytes(first, sectors))
        };
        self.value += sectors;
        for i in 0..sectors {
            let value = if clears { 0 } else { first + i };
            let sector = (at + i) as usize;
            // Even of a request that failed something may be there, if it went to the base.
            self.possible[sector].push(value);
            if done.is_ok() {
                self.content[sector] = value;
            }
        }
        match done {
            Ok(()) => {}
            Err(Error::Backlog { .. }) => self.count("backlog"),
            Err(Error::Full { .. }) => self.count("full"),
            Err(_) if self.dead() => {}
            Err(e) if self.forgiven(&e) => self.count("flush failed"),
            Err(e) => panic!("writing: {e}"),
        }
    }

    fn bytes(first: u64, sectors: u64) -> Vec<u8> {
        (0..sectors).flat_map(|i| (first + i).to_le_bytes().repeat(SECTOR as usize / 8)).collect()
    }

    fn dead(&self) -> bool {
        self.active.as_ref().is_none_or(|node| self.world.is_dead(node.process))
    }

    fn event(&mut self) -> Result<(), End> {
        let Some(node) = &self.active else { panic!("nobody runs") };
        let (disk, process) = (node.disk.clone(), node.process);
        if self.random.one_in(25) {
            let after = self.random.below(20);
            self.world.plan(process, after, Stop::Die);
        }
        let step = self.random.below(100);
        let result = match step {
            0..40 => {
                self.write();
                Ok(())
            }
            // Reads of a slice are not verified again (as reads of the base are not); merging and taking over are.
            40..50 if self.counts.contains_key("flip") => Ok(()),
            40..50 => self.read_all(&disk).map(|content| assert_eq!(content, self.content, "a read while it runs")),
            50..55 => disk.flush().map(|()| {
                if !self.protected {
                    self.possible = self.content.iter().map(|v| vec![*v]).collect();
                }
            }),
            55..60 if !self.protected => {
                let done = disk.protect(Epoch(1));
                if done.is_ok() {
                    self.note("protected");
                    self.protected = true;
                    self.open = 1;
                    // The base is what a cold boot finds until the first commit.
                    let tag = Tag { serial: 0, generation: Generation(0), epoch: Epoch(0), records: 0, digest: 0 };
                    let start = Checkpoint { epoch: 0, tag, content: self.content.clone(), sealed: true };
                    self.committed = vec![start.clone()];
                    self.released = Some(start);
                }
                done
            }
            55..70 if self.protected => disk.cut(Epoch(self.open)).map(|tag| {
                let (epoch, content) = (self.open, self.content.clone());
                self.flying.push(Checkpoint { epoch, tag, content, sealed: false });
                self.open += 1;
            }),
            70..78 => match self.flying.iter_mut().find(|c| !c.sealed) {
                Some(next) if sabotaged(Sabotage::CommitUnsealed) => {
                    next.sealed = true;
                    Ok(())
                }
                Some(next) => disk.seal(Epoch(next.epoch)).map(|()| next.sealed = true),
                None => Ok(()),
            },
            78..84 => {
                if self.flying.first().is_some_and(|c| c.sealed) {
                    let image = self.flying.remove(0);
                    self.note(format!("the standby has epoch {}", image.epoch));
                    self.committed.push(image.clone());
                    self.image = Some(image);
                }
                Ok(())
            }
            84..90 => match self.image.clone() {
                Some(image) if !sabotaged(Sabotage::CommitUnsealed) => disk.commit(Epoch(image.epoch)).map(|()| {
                    self.note(format!("committed {}", image.epoch));
                    self.committed.retain(|c| c.epoch >= image.epoch);
                    self.released = Some(image);
                }),
                _ => Ok(()),
            },
            90..96 => {
                if self.random.one_in(4) {
                    return self.freeze_in_merge();
                }
                self.world.merging(true);
                let merged = disk.merge();
                self.world.merging(false);
                merged.map(|merged| {
                    if matches!(merged, Merged::Slices { .. }) {
                        self.count("merge");
                    }
                })
            }
            96 if !self.protected => disk.settle().map(|direct| {
                if direct {
                    self.count("direct");
                    self.possible.iter_mut().zip(&self.content).for_each(|(p, v)| {
                        p.push(*v);
                    });
                }
            }),
            99 if self.protected => {
                // The veto first; what was committed is what there is at least, everything up to now may be.
                self.give_up();
                disk.unprotect()
            }
            _ => {
                if self.random.one_in(30) {
                    self.flip();
                }
                Ok(())
            }
        };
        self.world.unplan(process);
        match result {
            Ok(()) => {}
            Err(_) if self.world.is_dead(process) => {}
            Err(Error::Corrupt { .. }) if self.counts.contains_key("flip") => return Err(End::Named),
            Err(Error::Full { .. }) => self.count("full"),
            Err(e) if self.forgiven(&e) => {
                self.count("flush failed");
                self.note(e.to_string());
                // A machine whose disk does not work any more is stopped.
                if self.random.one_in(3) {
                    self.world.cut_node(process);
                }
            }
            Err(e) => panic!("event {step}: {e}"),
        }
        if self.world.is_dead(process) || self.random.one_in(60) {
            self.takeover()?;
        }
        if !self.zombies.is_empty() {
            self.haunt();
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.note("unprotected");
        if let Some(released) = &self.released {
            let all = self.committed.iter().chain(&self.flying);
            self.possible = released.content.iter().map(|v| vec![*v]).collect();
            for checkpoint in all {
                self.possible.iter_mut().zip(&checkpoint.content).for_each(|(p, v)| p.push(*v));
            }
            self.possible.iter_mut().zip(&self.content).for_each(|(p, v)| p.push(*v));
        }
        self.protected = false;
        self.image = None;
        self.released = None;
        self.flying.clear();
        self.committed.clear();
    }

    /// A bit of something that counts turns over.
    fn flip(&mut self) {
        if let Some(name) = self.world.flip(|name| name.ends_with(".slice")) {
            self.note(format!("flip in {name}"));
            self.count("flip");
        }
    }

    fn freeze_in_merge(&mut self) -> Result<(), End> {
        let Some(node) = self.active.as_mut() else { return Ok(()) };
        let (disk, process) = (node.disk.clone(), node.process);
        let after = self.random.below(15);
        self.world.plan(process, after, Stop::Freeze);
        let result = Arc::new(Mutex::new(None));
        let out = result.clone();
        self.world.merging(true);
        let call = self.world.run(process, move || *out.lock().unwrap() = Some(disk.merge()));
        self.world.unplan(process);
        self.world.merging(false);
        if call.is_some() {
            self.note("frozen in a merge");
            self.count("frozen");
            if let Some(node) = self.active.as_mut() {
                node.call = call;
            }
            return self.takeover();
        }
        match result.lock().unwrap().take() {
            Some(Err(Error::Corrupt { .. })) if self.counts.contains_key("flip") => Err(End::Named),
            Some(Err(Error::Full { .. })) => {
                self.count("full");
                Ok(())
            }
            Some(Err(e)) if self.forgiven(&e) => {
                self.count("flush failed");
                Ok(())
            }
            Some(Err(e)) => panic!("merging: {e}"),
            _ => Ok(()),
        }
    }

    /// The machine goes on elsewhere.
    fn takeover(&mut self) -> Result<(), End> {
        let Some(node) = self.active.take() else { return Ok(()) };
        let everything = self.random.one_in(5);
        let dies = everything || self.world.is_dead(node.process) || self.random.one_in(3);
        self.note(format!("process {} {}", node.process, if dies { "dies" } else { "becomes a zombie" }));
        self.zombies.push(node);
        if everything {
            self.note("all lose power");
            self.cut_all();
        } else if dies {
            self.fence();
        }
        let image = self.image.take().filter(|_| self.protected);
        // The standby's memory survives what its node survives.
        let (memory, allowed) = match image {
            Some(image) if !everything => {
                self.count("takeover");
                // Until it works: that image. A power cut of everything in the middle leaves the disk, which is the same by then or an older commit.
                let mut any = vec![image.content.clone()];
                any.extend(self.committed.iter().map(|c| c.content.clone()));
                (Memory::Image(image.tag), Allowed::Image { exactly: image.content, or_cold: any })
            }
            _ if self.protected => {
                self.count("cold boot");
                (Memory::None, Allowed::One(self.committed.iter().map(|c| c.content.clone()).collect()))
            }
            _ => {
                self.count("cold boot");
                (Memory::None, Allowed::Sectors(self.possible.clone()))
            }
        };
        self.protected = false;
        self.flying.clear();
        self.released = None;
        self.committed.clear();
        self.start(memory, allowed)
    }

    /// What a zombie does when it wakes.
    fn haunt(&mut self) {
        let which = self.random.below(self.zombies.len() as u64) as usize;
        let zombie = &mut self.zombies[which];
        let process = zombie.process;
        let superseded = |e: &Error| matches!(e, Error::Superseded { .. });
        if let Some(call) = zombie.call.take() {
            if self.random.one_in(4) {
                self.world.thaw(process);
                call.join().unwrap();
                self.count("thawed");
            } else {
                zombie.call = Some(call);
            }
        } else {
            let at = self.random.below(SECTORS - 4) * SECTOR;
            match self.random.below(8) {
                0..3 => {
                    let _ = zombie
                        .disk
                        .write_at(at, &Self::bytes(1 << 40 | self.random.below(1 << 20), 1 + self.random.below(4)));
                }
                3 => {
                    for epoch in 1..60 {
                        let _ = zombie.disk.cut(Epoch(epoch));
                    }
                    let _ = zombie.disk.seal(Epoch(60));
                }
                4 => {
                    let answer = zombie.disk.commit(Epoch(60));
                    assert!(answer.as_ref().is_err_and(superseded), "a zombie's commit is answered: {answer:?}");
                }
                5 => {
                    let answer = zombie.disk.merge();
                    assert!(!matches!(answer, Ok(Merged::Slices { .. })), "a zombie merges: {answer:?}");
                }
                6 => {
                    let answer = zombie.disk.unprotect();
                    assert!(answer.as_ref().is_err_and(superseded), "a zombie goes on alone: {answer:?}");
                }
                _ => {
                    let _ = zombie.disk.settle();
                }
            }
        }
        if self.random.one_in(12) {
            let zombie = self.zombies.remove(which);
            self.world.cut_node(zombie.process);
            if let Some(call) = zombie.call {
                call.join().unwrap();
            }
        }
    }

    fn run(&mut self, events: usize) -> End {
        let zero = vec![0; SECTORS as usize];
        if let Err(end) = self.start(Memory::None, Allowed::One(vec![zero])) {
            return end;
        }
        for _ in 0..events {
            if let Err(end) = self.event() {
                return end;
            }
        }
        End::Whole
    }
}

/// What a disk may have after it was opened.
#[derive(Debug)]
enum Allowed {
    /// One of these, whole.
    One(Vec<Content>),
    /// Exactly this after a takeover; one of those if it became a cold boot.
    Image { exactly: Content, or_cold: Vec<Content> },
    /// Each sector one of its values.
    Sectors(Vec<Vec<u64>>),
}

impl Allowed {
    fn check(&self, content: &Content) -> bool {
        match self {
            Allowed::One(all) => all.contains(content),
            Allowed::Image { exactly, or_cold } => content == exactly || or_cold.contains(content),
            Allowed::Sectors(all) => content.iter().zip(all).all(|(v, allowed)| allowed.contains(v)),
        }
    }
}

/// One seed. What a panic says is returned.
fn seed(seed: u64, events: usize, sabotage: Sabotage) -> Result<(End, BTreeMap<&'static str, u64>, u64), String> {
    set(sabotage);
    let mut sim = Sim::new(seed);
    let end = catch_unwind(AssertUnwindSafe(|| sim.run(events)));
    // Nobody stays frozen.
    for process in 1..=sim.processes {
        sim.world.cut_node(process);
    }
    sim.zombies.extend(sim.active.take());
    for zombie in sim.zombies.drain(..) {
        if let Some(call) = zombie.call {
            let _ = call.join();
        }
    }
    set(Sabotage::None);
    let operations = sim.world.operations.load(std::sync::atomic::Ordering::Relaxed);
    match end {
        Ok(end) => Ok((end, sim.counts, operations)),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned();
            let said = said.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
            let trace = sim.trace.iter().rev().take(25).rev().cloned().collect::<Vec<_>>().join("\n  ");
            Err(format!("seed {}: {said}\n  {trace}", sim.seed))
        }
    }
}

fn quietly<R>(work: impl FnOnce() -> R) -> R {
    // Panics are caught and reported with their seed; the default hook would print hundreds of expected ones. Other tests' panics are
    // reported by the harness from their payload all the same.
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    QUIET.set(true);
    let result = work();
    QUIET.set(false);
    result
}

fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let asked = std::env::var("UNDERSTUDY_DISK_SEEDS").ok();
    let range = asked.as_deref().and_then(|text| text.split_once(".."));
    match range.map(|(from, to)| (from.parse(), to.parse())) {
        Some((Ok(from), Ok(to))) => from..to,
        _ => default,
    }
}

#[test]
fn after_any_crash_the_disk_is_exactly_a_committed_epoch() {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut operations, mut named, mut tried) = (0, 0, 0u64);
    for number in seeds(0..400) {
        match quietly(|| seed(number, 250, Sabotage::None)) {
            Ok((end, of_this, ops)) => {
                of_this.into_iter().for_each(|(what, n)| *counts.entry(what).or_default() += n);
                named += u64::from(end == End::Named);
                operations += ops;
            }
            Err(said) => panic!("{said}"),
        }
        tried += 1;
    }
    println!("{tried} seeds, {operations} operations of storage, damage named in {named} of them: {counts:?}");
    if tried >= 400 {
        // What never happens proves nothing.
        for what in [
            "takeover",
            "cold boot",
            "frozen",
            "thawed",
            "fenced",
            "merge",
            "direct",
            "full",
            "backlog",
            "flip",
            "flush failed",
            "died in takeover",
        ] {
            assert!(counts.get(what).is_some_and(|n| *n > 10), "{what} hardly ever happened: {counts:?}");
        }
    }
}

/// How many of so many seeds notice it.
fn noticed(sabotage: Sabotage, tries: u64) -> u64 {
    (0..tries).filter(|number| quietly(|| seed(*number, 250, sabotage)).is_err()).count() as u64
}

macro_rules! notices {
    ($($name:ident: $sabotage:ident;)*) => {$(
        #[test]
        fn $name() {
            let seen = noticed(Sabotage::$sabotage, 300);
            println!("{:?} is noticed by {seen} of 300 seeds", Sabotage::$sabotage);
            assert!(seen > 0, "{:?} goes unnoticed", Sabotage::$sabotage);
        }
    )*};
}

notices! {
    the_simulation_notices_when_checksums_are_ignored: IgnoreCrc;
    the_simulation_notices_when_a_commit_is_not_flushed: CommitWithoutFlush;
    the_simulation_notices_when_slices_go_before_the_base_is_flushed: RemoveBeforeFlush;
    the_simulation_notices_when_generations_are_ignored: IgnoreGeneration;
    the_simulation_notices_when_locks_do_not_hold: IgnoreLocks;
    the_simulation_notices_when_new_names_are_not_flushed: DirectoryNotFlushed;
    without_redirect_on_write_disk_and_memory_disagree: WithoutRedirect;
    the_simulation_notices_when_epochs_are_committed_unsealed: CommitUnsealed;
}
