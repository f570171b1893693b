//! Two nodes, each with storage of its own that tears and reorders; a link that drops at any message; crashes of either or both at any operation.
//!
//! The cluster around them is right: it never promotes what was vetoed, and a machine runs on one node. Except now and then, when somebody forces an old
//! copy to run (`forced`): then two disks are written, and the copy that comes back must be refused.
//!
//! The oracle: after a takeover the disk is exactly the checkpoint's; after a boot it is a state that was committed, not older than what the outside has
//! seen; a copy that is being synchronised is refused; copies that are pinned at one state are the same, byte for byte; what somebody wrote alone, and was told is
//! durable, is not overwritten without consent.

use super::*;
use crate::mirror::{Applied, Copy, CopyOptions, LogReader, Next, Plan, Range, Standing, Sync};

/// One node: its storage, and what is on it.
struct Node {
    world: Arc<World>,
    process: Process,
    runs: Option<Arc<Disk>>,
    copy: Option<Copy>,
    /// What it wrote alone since the other had the same, and was told is durable.
    alone: bool,
}

/// An epoch on its way.
#[derive(Clone, Debug)]
struct Flight {
    checkpoint: Checkpoint,
    stage: u8,
}

enum Session {
    None,
    Syncing { sync: Box<Sync>, held: bool },
    InStep { reader: LogReader },
}

struct Pair {
    random: Random,
    nodes: [Node; 2],
    /// The one that runs.
    at: usize,
    generation: u64,
    session: Session,
    content: Content,
    possible: Vec<Vec<u64>>,
    value: u64,
    protected: bool,
    open: u64,
    flying: Vec<Flight>,
    /// The standby's memory, which is durable.
    image: Option<Checkpoint>,
    released: Option<Checkpoint>,
    committed: Vec<Checkpoint>,
    /// The standby's copy may be booted from, as far as the cluster knows.
    good: bool,
    /// The guest wrote something while it was not protected.
    wrote: bool,
    flaky: bool,
    trace: Vec<String>,
    counts: BTreeMap<&'static str, u64>,
}

fn values(bytes: &[u8]) -> Content {
    let sector = |s: &[u8]| {
        let value = u64::from_le_bytes(s[..8].try_into().unwrap());
        if s.chunks(8).all(|c| c == &s[..8]) { value } else { u64::MAX }
    };
    bytes.chunks(SECTOR as usize).map(sector).collect()
}

fn read_all(disk: &dyn Block) -> crate::Result<Content> {
    let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
    disk.read_at(0, &mut bytes)?;
    Ok(values(&bytes))
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0xd15c);
        let full = if random.one_in(4) { 40 } else { 0 };
        let flaky = if random.one_in(4) { 60 } else { 0 };
        let node = |random: &mut Random| Node {
            world: World::new(random.fork(), SECTORS, full, flaky),
            process: 0,
            runs: None,
            copy: None,
            alone: false,
        };
        let nodes = [node(&mut random), node(&mut random)];
        Pair {
            random,
            nodes,
            at: 0,
            generation: 0,
            session: Session::None,
            content: vec![0; SECTORS as usize],
            possible: vec![vec![0]; SECTORS as usize],
            value: 0,
            protected: false,
            open: 1,
            flying: Vec::new(),
            image: None,
            released: None,
            committed: Vec::new(),
            good: false,
            wrote: false,
            flaky: flaky > 0,
            trace: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn note(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
    }
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
    fn disk(&self) -> Arc<Disk> {
        self.nodes[self.at].runs.clone().expect("one runs")
    }
    fn other(&self) -> usize {
        1 - self.at
    }
    fn limits() -> Limits {
        Limits { backlog: 24 << 10, extents: 60, batch: 4 << 10, solo: 8 << 10 }
    }
    fn dead(&self, node: usize) -> bool {
        self.nodes[node].world.is_dead(self.nodes[node].process)
    }

    fn forgiven(&self, e: &Error) -> bool {
        matches!(e, Error::Full { .. } | Error::Backlog { .. })
            || (self.flaky && matches!(e, Error::Io { .. } | Error::Refused(_)))
    }

    /// Open a disk for running, once.
    fn open(&mut self, node: usize, memory: Memory) -> crate::Result<Disk> {
        self.generation += 1;
        let generation = Generation(self.generation);
        let n = &mut self.nodes[node];
        n.process += 1;
        let identity = Identity { machine: "m".into(), node: format!("n{node}"), generation };
        let disk = Disk::open_mirrored(Options {
            base: n.world.base(n.process),
            format: Format::Raw,
            directory: n.world.directory(n.process),
            identity,
            memory,
            limits: Self::limits(),
        });
        self.note(format!("open on {node}, {memory:?}: {:?}", disk.as_ref().map(|_| ()).map_err(|e| e.to_string())));
        disk
    }

    /// All that a machine that ran has forgotten.
    fn fresh(&mut self) {
        self.session = Session::None;
        self.protected = false;
        self.open = 1;
        self.flying.clear();
        self.image = None;
        self.released = None;
        self.committed.clear();
        self.good = false;
        self.wrote = false;
    }

    /// Bring the machine up on a node, through crashes.
    fn start(&mut self, node: usize, mut memory: Memory, mut allowed: Allowed) {
        // Nobody reads its old processes' handles any more.
        self.nodes[node].copy = None;
        self.nodes[node].runs = None;
        for attempt in 0.. {
            assert!(attempt < 60, "opening never works");
            if attempt < 3 && self.random.one_in(3) {
                let after = self.random.below(30);
                self.nodes[node].world.plan(self.nodes[node].process + 1, after, Stop::Die);
            }
            let opened = self.open(node, memory);
            self.nodes[node].world.unplan(self.nodes[node].process);
            match opened {
                Ok(disk) => {
                    let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
                    disk.read_at(0, &mut bytes).unwrap();
                    let content = values(&bytes);
                    assert!(
                        allowed.check(&content),
                        "after {memory:?} node {node} has {content:?}, allowed is {allowed:?}"
                    );
                    self.content = content;
                    self.possible = self.content.iter().map(|v| vec![*v]).collect();
                    self.nodes[node].runs = Some(Arc::new(disk));
                    self.at = node;
                    self.fresh();
                    return;
                }
                Err(_) if self.dead(node) => {
                    self.count("died in takeover");
                    if self.random.one_in(2) {
                        self.cut_power(node);
                        // A checkpoint that was taken over may have been begun with; booting is always possible from then on.
                        if let (Allowed::Image { exactly, or_cold }, true) = (&allowed, self.random.one_in(2)) {
                            let mut all = or_cold.clone();
                            all.push(exactly.clone());
                            allowed = Allowed::One(all);
                            memory = Memory::None;
                        }
                    }
                }
                Err(Error::Full { .. }) => {}
                Err(e) if self.forgiven(&e) && !matches!(e, Error::Refused(_)) => self.nodes[node].world.evict(),
                Err(e) => panic!("opening node {node} with {memory:?}: {e}"),
            }
        }
    }

    fn cut_power(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.world.cut_all(1..=n.process);
        n.copy = None;
    }

    fn end_session(&mut self) {
        if let Some(disk) = &self.nodes[self.at].runs {
            disk.leave();
        }
        self.session = Session::None;
        let other = self.other();
        if let Some(copy) = &self.nodes[other].copy {
            copy.abandon();
        }
        // What the standby has not committed it does not have; what the primary cut is part of the next epoch.
        self.flying.clear();
    }

    fn link_drops(&mut self) {
        if !matches!(self.session, Session::None) {
            self.count("link dropped");
            self.note("the link drops");
            self.end_session();
        }
    }

    /// The cluster rules out that the standby goes on from what it has.
    fn veto(&mut self) {
        self.note("veto");
        self.end_session();
        if let Some(released) = &self.released {
            self.possible = released.content.iter().map(|v| vec![*v]).collect();
            for checkpoint in &self.committed {
                self.possible.iter_mut().zip(&checkpoint.content).for_each(|(p, v)| p.push(*v));
            }
            self.possible.iter_mut().zip(&self.content).for_each(|(p, v)| p.push(*v));
        }
        let other = self.other();
        if self.image.is_some()
            && let Some(copy) = &self.nodes[other].copy
        {
            match copy.outdate(&format!("n{}", self.at)) {
                Ok(()) => self.count("outdated"),
                Err(_) => self.nodes[other].copy = None,
            }
        }
        self.protected = false;
        self.image = None;
        self.released = None;
        self.committed.clear();
        self.good = false;
        let done = self.disk().unprotect();
        if done.is_err() && !self.dead(self.at) {
            // It is stopped, and boots.
            self.nodes[self.at].world.cut_node(self.nodes[self.at].process);
        }
    }

    fn allowed_cold(&self) -> Allowed {
        if self.protected {
            Allowed::One(self.committed.iter().map(|c| c.content.clone()).collect())
        } else {
            Allowed::Sectors(self.possible.clone())
        }
    }

    /// The machine does not run any more where it ran.
    fn takeover(&mut self) {
        let (at, other) = (self.at, self.other());
        let everything = self.random.one_in(4);
        if let Session::Syncing { .. } = self.session {
            self.count("died while syncing");
        }
        self.note(format!("node {at} ends{}", if everything { ", all lose power" } else { "" }));
        // A node that is only cut off goes on for a while.
        if self.protected && !everything && !self.dead(at) {
            for _ in 0..self.random.below(4) {
                self.write();
                if let Ok(tag) = self.disk().cut(Epoch(self.open)) {
                    let _ = self.disk().seal(Epoch(self.open));
                    self.open += 1;
                    self.note(format!("alone: {tag:?}"));
                }
            }
        }
        self.session = Session::None;
        self.nodes[at].runs = None;
        if everything || self.random.one_in(2) {
            self.cut_power(at);
        } else {
            self.nodes[at].world.cut_node(self.nodes[at].process);
        }
        if everything {
            self.cut_power(other);
        }
        let process = self.nodes[other].process;
        if self.nodes[other].copy.is_some() && self.random.one_in(2) {
            self.nodes[other].world.cut_node(process);
        }
        if let (Some(image), true) = (self.image.clone(), self.protected && self.random.below(4) > 0) {
            self.count("takeover");
            let mut or_cold: Vec<_> = self.committed.iter().map(|c| c.content.clone()).collect();
            or_cold.push(image.content.clone());
            self.nodes[at].alone = false;
            return self.start(other, Memory::Image(image.tag), Allowed::Image { exactly: image.content, or_cold });
        }
        let allowed = self.allowed_cold();
        if self.good && self.protected && self.random.one_in(2) {
            self.count("boot of the copy");
            self.nodes[at].alone = false;
            return self.start(other, Memory::None, allowed);
        }
        if !self.protected && self.random.one_in(6) {
            return self.force(allowed);
        }
        self.count("cold boot");
        self.start(at, Memory::None, allowed);
    }

    /// Somebody runs the copy although it is not the newest: a copy that knows that it is not usable refuses.
    fn force(&mut self, allowed: Allowed) {
        let (at, other) = (self.at, self.other());
        self.nodes[other].copy = None;
        let process = self.nodes[other].process;
        self.nodes[other].world.cut_node(process);
        let dir = self.nodes[other].world.directory(process + 1);
        let owner = crate::owner::Ownership::load(&*dir).ok().flatten();
        let role = owner.and_then(|owner| owner.mirror).map(|mirror| mirror.role);
        match self.open(other, Memory::None) {
            Ok(disk) => {
                use crate::mirror::record::Role;
                let unusable = matches!(role, Some(Role::Syncing { .. } | Role::Outdated { .. }));
                assert!(!unusable, "a copy was run from that is {role:?}");
                self.count("forced");
                self.content = read_all(&disk).unwrap();
                self.possible = self.content.iter().map(|v| vec![*v]).collect();
                self.nodes[other].runs = Some(Arc::new(disk));
                self.at = other;
                self.fresh();
            }
            Err(_) => {
                self.count("force refused");
                self.nodes[other].world.cut_node(self.nodes[other].process);
                self.start(at, Memory::None, allowed);
            }
        }
    }

    fn write(&mut self) {
        let disk = self.disk();
        let at = self.random.below(SECTORS);
        let sectors = 1 + self.random.below(8.min(SECTORS - at));
        let clears = self.random.one_in(6);
        let first = self.value + 1;
        self.value += sectors;
        let done = if clears {
            disk.write_zeroes(at * SECTOR, sectors * SECTOR, self.random.one_in(2))
        } else {
            disk.write_at(at * SECTOR, &Sim::bytes(first, sectors))
        };
        for i in 0..sectors {
            let value = if clears { 0 } else { first + i };
            self.possible[(at + i) as usize].push(value);
            if done.is_ok() {
                self.content[(at + i) as usize] = value;
            }
        }
        self.wrote |= done.is_ok() && !self.protected;
        match done {
            Ok(()) => {}
            Err(_) if self.dead(self.at) => {}
            Err(e) if self.forgiven(&e) => {}
            Err(e) => panic!("writing: {e}"),
        }
    }

    /// The standby's process with the copy, if its storage lets it.
    fn have_copy(&mut self) -> bool {
        let other = self.other();
        if self.nodes[other].copy.is_some() && !self.dead(other) {
            return true;
        }
        self.nodes[other].copy = None;
        let n = &mut self.nodes[other];
        n.world.cut_node(n.process);
        n.process += 1;
        let options = CopyOptions {
            base: n.world.base(n.process),
            format: Format::Raw,
            directory: n.world.directory(n.process),
            machine: "m".into(),
            node: format!("n{other}"),
            limits: Self::limits(),
        };
        match Copy::open(options) {
            Ok(copy) => n.copy = Some(copy),
            Err(e) if self.forgiven(&e) => self.nodes[other].world.evict(),
            Err(e) => panic!("opening the copy: {e}"),
        }
        self.nodes[other].copy.is_some()
    }

    /// A session begins.
    fn connect(&mut self) -> crate::Result<()> {
        if !self.have_copy() {
            return Ok(());
        }
        let other = self.other();
        let disk = self.disk();
        let copy = self.nodes[other].copy.as_ref().expect("it is there");
        let state = copy.state()?;
        let plan = disk.plan(&state)?;
        self.note(format!("plan {plan:?} for {:?}", state.standing));
        // (A copy that is being synchronised had consent, when that began.)
        if self.nodes[other].alone && state.discard.is_none() && !matches!(state.standing, Standing::Syncing { .. }) {
            // Of a disk whose owner was told that it is durable.
            let refused = matches!(plan, Plan::Refused { .. });
            assert!(refused, "node {other} wrote alone, and the plan is {plan:?} for {state:?}");
        }
        match plan {
            Plan::InStep => {
                let rejoin = disk.join(&state)?;
                let reader = LogReader::new(rejoin.at);
                self.nodes[other].copy.as_ref().expect("it is there").rejoin(&rejoin)?;
                self.session = Session::InStep { reader };
                self.good = true;
                self.nodes[self.at].alone = false;
                self.count("in step");
            }
            Plan::Refused { why } => {
                let diverged = matches!(state.standing, Standing::Ran { .. }) || self.counts.contains_key("forced");
                assert!(diverged, "refused without a reason: {why}");
                self.count("refused");
                if self.random.one_in(3) {
                    self.nodes[other].copy = None;
                    let process = self.nodes[other].process;
                    self.nodes[other].world.cut_node(process);
                    self.discard(other);
                }
            }
            Plan::Blocks { .. } | Plan::Full { .. } => {
                self.count(if matches!(plan, Plan::Full { .. }) { "full sync" } else { "blocks" });
                // The checkpoint there cannot be promoted any more; the cluster has vetoed it (or never had one).
                if self.protected && self.image.is_some() {
                    self.veto();
                    return Ok(());
                }
                let (sync, begin) = disk.sync(&state)?;
                self.good = false;
                if begin.resumed {
                    self.count("resumed");
                }
                self.session = Session::Syncing { sync: Box::new(sync), held: false };
                self.nodes[other].copy.as_ref().expect("it is there").begin(&begin)?;
                self.nodes[other].alone = false;
            }
        }
        Ok(())
    }

    fn discard(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        n.process += 1;
        let dir = n.world.directory(n.process);
        let Ok(claim) = crate::owner::claim(&*dir) else { return };
        let Ok(Some(mut owner)) = crate::owner::Ownership::load(&*dir) else { return };
        if let Some(mirror) = &mut owner.mirror {
            mirror.discard = Some(format!("n{}", self.at));
        }
        if owner.store(&*dir, &claim).is_ok() {
            self.count("discarded");
        }
    }

    /// A step of a synchronisation.
    fn sync_step(&mut self) -> crate::Result<()> {
        let other = self.other();
        let disk = self.disk();
        let copy = self.nodes[other].copy.as_ref();
        let Session::Syncing { sync, held } = &mut self.session else { return Ok(()) };
        let Some(copy) = copy else { return Ok(()) };
        let (mut last, mut differing) = (0, Vec::new());
        let end = loop {
            if last > 0 && self.random.one_in(4) {
                break None;
            }
            match sync.next(4096)? {
                Next::Item(item) => {
                    last = item.number;
                    if copy.apply(&item)? == Applied::Differs {
                        differing.push(Range { at: item.at, len: item.len });
                    }
                    // The guest goes on meanwhile, also while a block is on its way.
                    if self.random.one_in(8) {
                        break None;
                    }
                }
                end => break Some(end),
            }
        };
        if last > 0 {
            copy.flush()?;
            sync.acknowledge(last, &differing)?;
            return Ok(());
        }
        match end {
            Some(Next::Done(tag)) => {
                copy.into_step(tag)?;
                self.nodes[self.at].alone = false;
                if self.random.one_in(8) {
                    self.link_drops();
                    return Ok(());
                }
                let Session::Syncing { sync, .. } = std::mem::replace(&mut self.session, Session::None) else {
                    return Ok(());
                };
                sync.done(tag)?;
                self.session = Session::InStep { reader: LogReader::new(tag) };
                self.good = true;
                self.nodes[self.at].alone = false;
                self.count("synchronised");
            }
            _ if !*held && (self.protected || self.random.one_in(3)) => {
                if !self.protected {
                    disk.protect(Epoch(self.open))?;
                    self.protected = true;
                    self.note("protected");
                    let tag = Tag { serial: 0, generation: Generation(0), epoch: Epoch(0), records: 0, digest: 0 };
                    let start = Checkpoint { epoch: 0, tag, content: self.content.clone(), sealed: true };
                    self.committed = vec![start.clone()];
                    self.released = Some(start);
                    self.wrote = false;
                }
                if let Session::Syncing { sync, held } = &mut self.session {
                    sync.hold()?;
                    *held = true;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A step of the first epoch that is on its way.
    fn epoch_step(&mut self) -> crate::Result<()> {
        let other = self.other();
        let disk = self.disk();
        let Session::InStep { reader } = &mut self.session else { return Ok(()) };
        let Some(copy) = self.nodes[other].copy.as_ref() else { return Ok(()) };
        // The log goes early, also that of epochs that come later.
        for _ in 0..self.random.below(4) {
            let most = 1 + self.random.below(3000) as usize;
            if let Some(piece) = reader.next(&disk, most)? {
                copy.append(&piece)?;
            }
        }
        let Some(flight) = self.flying.first_mut() else { return Ok(()) };
        let Checkpoint { tag, epoch, .. } = flight.checkpoint;
        match flight.stage {
            0 => disk.seal(Epoch(epoch))?,
            1 => {
                while reader.after < tag.serial {
                    let Some(piece) = reader.next(&disk, 4096)? else { panic!("the log ends before {tag:?}") };
                    copy.append(&piece)?;
                }
                copy.seal(tag)?;
            }
            2 => {
                let image = flight.checkpoint.clone();
                self.trace.push(format!("the standby has epoch {epoch}"));
                self.committed.push(image.clone());
                self.image = Some(image);
            }
            3 => copy.commit(tag)?,
            _ => {
                disk.commit(Epoch(epoch))?;
                let flight = self.flying.remove(0);
                self.committed.retain(|c| c.epoch >= epoch);
                self.released = Some(flight.checkpoint);
                self.count("epochs");
                return Ok(());
            }
        }
        if let Some(flight) = self.flying.first_mut() {
            flight.stage += 1;
        }
        Ok(())
    }

    /// The bases are compared while both hold still.
    fn compare(&mut self) -> crate::Result<()> {
        let other = self.other();
        let disk = self.disk();
        if !matches!(self.session, Session::InStep { .. }) {
            return Ok(());
        }
        let Some(copy) = self.nodes[other].copy.as_ref() else { return Ok(()) };
        let mut verify = disk.verify()?;
        let mine = verify.pin()?;
        if let Some(theirs) = copy.pin(mine)?
            && verify.pin_at(theirs)? == Some(theirs)
        {
            let bases = [0, 1].map(|node| {
                let n = &self.nodes[node];
                read_all(&*n.world.base(n.process))
            });
            let [one, two] = bases;
            assert_eq!(one?, two?, "copies in step differ at {theirs:?}");
            while let Some(item) = verify.ask()? {
                verify.result(item.number, copy.compare(&item)?)?;
            }
            assert_eq!(verify.checked().differing, 0);
            *self.counts.entry("compared").or_default() += 1;
        }
        verify.unpin();
        copy.unpin();
        Ok(())
    }

    fn event(&mut self) {
        let (at, other) = (self.at, self.other());
        for node in [at, other] {
            if self.random.one_in(30) {
                let after = self.random.below(20);
                let process = self.nodes[node].process;
                self.nodes[node].world.plan(process, after, Stop::Die);
            }
        }
        let disk = self.disk();
        let step = self.random.below(100);
        let result = match step {
            0..25 => {
                self.write();
                Ok(())
            }
            25..30 => disk.flush().map(|()| {
                if !self.protected {
                    self.possible = self.content.iter().map(|v| vec![*v]).collect();
                    // The other has it only when it is in step again.
                    self.nodes[at].alone |= std::mem::take(&mut self.wrote);
                }
            }),
            30..36 => read_all(&*disk).map(|content| assert_eq!(content, self.content, "a read while it runs")),
            36..44 if matches!(self.session, Session::InStep { .. }) => disk.cut(Epoch(self.open)).map(|tag| {
                let checkpoint = Checkpoint { epoch: self.open, tag, content: self.content.clone(), sealed: false };
                self.flying.push(Flight { checkpoint, stage: 0 });
                self.open += 1;
            }),
            44..70 => match self.session {
                Session::None => {
                    if self.random.one_in(3) {
                        self.connect()
                    } else {
                        Ok(())
                    }
                }
                Session::Syncing { .. } => self.sync_step(),
                Session::InStep { .. } => self.epoch_step(),
            },
            70..78 => {
                self.nodes[at].world.merging(true);
                let merged = disk.merge();
                self.nodes[at].world.merging(false);
                merged.map(drop)
            }
            78..84 => match &self.nodes[other].copy {
                Some(copy) => copy.merge().map(drop),
                None => Ok(()),
            },
            84..87 => disk.settle().map(|direct| {
                if direct {
                    self.count("direct");
                }
            }),
            87..90 => self.compare(),
            90..92 => {
                self.link_drops();
                Ok(())
            }
            92 if self.protected && matches!(self.session, Session::None) => {
                self.veto();
                self.count("unprotected");
                Ok(())
            }
            93 => {
                // The standby's node loses its power; its memory's image is durable.
                if self.random.one_in(2) {
                    self.link_drops();
                    self.cut_power(other);
                    self.count("standby lost power");
                }
                Ok(())
            }
            _ => Ok(()),
        };
        for node in [at, other] {
            let process = self.nodes[node].process;
            self.nodes[node].world.unplan(process);
        }
        if let Err(e) = result {
            let dead = self.dead(at) || self.dead(other);
            assert!(dead || self.forgiven(&e), "event {step}: {e}");
            self.note(format!("event {step}: {e}"));
            // Whatever fails ends the session; a machine whose disk fails is stopped now and then.
            self.end_session();
            if self.random.one_in(4) {
                let process = self.nodes[at].process;
                self.nodes[at].world.cut_node(process);
            }
        }
        if self.dead(other) {
            self.end_session();
            self.nodes[other].copy = None;
        }
        if self.dead(self.at) || self.random.one_in(70) {
            self.takeover();
        }
    }

    fn run(&mut self, events: usize) {
        self.start(0, Memory::None, Allowed::One(vec![vec![0; SECTORS as usize]]));
        for _ in 0..events {
            self.event();
        }
    }
}

fn seed(seed: u64, events: usize, sabotage: Sabotage) -> Result<BTreeMap<&'static str, u64>, String> {
    set(sabotage);
    let mut pair = Pair::new(seed);
    let end = catch_unwind(AssertUnwindSafe(|| pair.run(events)));
    set(Sabotage::None);
    match end {
        Ok(()) => Ok(pair.counts),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned();
            let said = said.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
            let trace = pair.trace.iter().rev().take(40).rev().cloned().collect::<Vec<_>>().join("\n  ");
            Err(format!("seed {seed}: {said}\n  {trace}"))
        }
    }
}

#[test]
fn mirrored_disks_are_a_committed_epoch_on_whatever_node_they_are_opened() {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut tried = 0u64;
    for number in seeds(0..300) {
        match quietly(|| seed(number, 400, Sabotage::None)) {
            Ok(of_this) => of_this.into_iter().for_each(|(what, n)| *counts.entry(what).or_default() += n),
            Err(said) => panic!("{said}"),
        }
        tried += 1;
    }
    println!("{tried} seeds: {counts:?}");
    if tried >= 300 {
        // What never happens proves nothing.
        for what in [
            "blocks",
            "boot of the copy",
            "cold boot",
            "compared",
            "died in takeover",
            "died while syncing",
            "discarded",
            "epochs",
            "force refused",
            "forced",
            "full sync",
            "in step",
            "link dropped",
            "outdated",
            "refused",
            "resumed",
            "standby lost power",
            "synchronised",
            "takeover",
            "unprotected",
        ] {
            assert!(counts.get(what).is_some_and(|n| *n > 5), "{what} hardly ever happened: {counts:?}");
        }
    }
}

/// The first of so many seeds that notices it.
fn noticed(sabotage: Sabotage, tries: u64) -> Option<u64> {
    (0..tries).find(|number| quietly(|| seed(*number, 400, sabotage)).is_err())
}

macro_rules! notices {
    ($($name:ident: $sabotage:ident;)*) => {$(
        #[test]
        fn $name() {
            let seen = noticed(Sabotage::$sabotage, 2000);
            println!("{:?} is noticed by seed {seen:?}", Sabotage::$sabotage);
            assert!(seen.is_some(), "{:?} goes unnoticed", Sabotage::$sabotage);
        }
    )*};
}

notices! {
    the_mirrored_simulation_notices_when_blocks_are_marked_late: MarkAfterWrite;
    the_mirrored_simulation_notices_when_merges_are_not_marked: MergeUnmarked;
    the_mirrored_simulation_notices_when_an_unfinished_copy_is_used: UseUnfinished;
    the_mirrored_simulation_notices_when_the_beginning_is_forgotten: BeginForgotten;
    the_mirrored_simulation_notices_when_blocks_are_cleared_early: ClearedEarly;
    the_mirrored_simulation_notices_when_unflushed_content_counts_as_sent: SentUnflushed;
    the_mirrored_simulation_notices_when_a_copy_does_not_flush: CopyNotFlushed;
    the_mirrored_simulation_notices_when_a_copy_does_not_seal: CopyNotSealed;
}
