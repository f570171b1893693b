//! The cut: one checkpoint, however often the guest has to be stopped for it.
//!
//! ```text
//!         ┌────────────────────── a copy does not count: again, and what collided is copied in the pause ─┐
//!         ▼                                                                                               │
//!  stop ─► state, seal ─► log ─► protect ─► copy hot ─► run on ─► copy the rest ─► (validate) written since? ┴─► done
//!                                                                  (lock) writers wait for their page
//! ```
//! More pages than the arena holds: with `stop` the guest stands still until all pieces are fetched; otherwise pieces are handed out
//! while it runs, as early copies, until the rest fits (a few times; then it stands still as well).
//!
//! `docs/decisions/0008-capture-strategies.md` argues why the copies are those of the cut.

use super::*;
use crate::capture::costs::{Choice, Way, learn};
use crate::machine::RawState;
use understudy_protocol::urgent;

/// Cuts of one checkpoint before everything is copied in the pause.
const ATTEMPTS: u32 = 3;
/// Pieces that are handed out while the guest runs before it has to stand still for the rest.
const EARLY_PIECES: u32 = 8;
/// Time in which all hot pages must be copied, ns: it bounds the pause.
const HOT_BUDGET: f64 = 1_500_000.0;

/// What is asked for; see [`understudy_protocol::control::VmmRequest::Cut`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutRequest {
    /// The epoch that ends.
    pub epoch: Epoch,
    /// Hold the gate from this cut on.
    pub arm: bool,
    /// Stay stopped.
    pub last: bool,
    /// With the pages that were handed out early.
    pub again: bool,
}

/// A cut of which pieces are still to be fetched.
#[expect(clippy::large_enum_variant, reason = "a session has one, and a box would be allocated in the pause")]
pub(super) enum Open {
    /// The guest runs; this many pieces may still be handed out before it is stopped.
    Running { request: CutRequest, pieces: u32 },
    /// The guest stands still.
    Stopped(Stopped),
}

impl Open {
    pub(super) fn stands_still(&self) -> bool {
        matches!(self, Self::Stopped(_))
    }
}

pub(super) struct Stopped {
    request: CutRequest,
    since: Instant,
    /// Encoded when the guest runs on.
    state: Taken,
    at: VmTime,
    /// Pages that are pending and have a lower index were handed out.
    next: u64,
    done: u64,
}

/// State that was read: of vCPUs and devices, or that of a machine that was paused before.
#[expect(clippy::large_enum_variant, reason = "a session has one, and a box would be allocated in the pause")]
enum Taken {
    Raw(RawState),
    Paused(Vec<u8>, Option<Tags>),
}

impl Taken {
    fn encode(self) -> Result<Vec<u8>> {
        match self {
            Self::Raw(raw) => raw.encode(),
            Self::Paused(state, None) => Ok(state),
            Self::Paused(state, Some(tags)) => Ok(crate::container::append(&state, tags.payload()?)?),
        }
    }

    /// With the state of the disks.
    fn with(self, tags: Tags) -> Result<Self> {
        match self {
            Self::Raw(mut raw) => {
                raw.add(tags.payload()?);
                Ok(Self::Raw(raw))
            }
            Self::Paused(state, _) => Ok(Self::Paused(state, Some(tags))),
        }
    }
}

/// What every cut needs and what grows with RAM: kept, so that nothing of the kind is allocated while the guest stands still. (What is,
/// is the vCPUs' and devices' own state: a few KiB each.)
#[derive(Default)]
pub(super) struct Scratch {
    written: PageSet,
    at_once: PageSet,
    rest: PageSet,
    pub(super) now: Vec<u64>,
    later: Vec<u64>,
}

impl Scratch {
    /// For RAM of so many words of pages, and an arena with so many slots.
    fn reserve(&mut self, words: usize, slots: usize) {
        for set in [&mut self.written, &mut self.at_once, &mut self.rest] {
            set.resize(words, 0);
        }
        for pages in [&mut self.now, &mut self.later] {
            pages.clear();
            pages.reserve(slots);
        }
    }
}

/// How one attempt ended.
enum Attempt {
    Done(Captured),
    /// Some pages were written before their copies were made.
    Collided {
        /// These.
        pages: PageSet,
        /// Everything that has a slot by now.
        taken: PageSet,
    },
}

/// What an attempt does in addition to what the strategy says.
struct Terms<'a> {
    /// Copy everything in the pause.
    all: bool,
    /// Pages that collided before: copied in the pause.
    collided: &'a PageSet,
    /// Pages that have a slot from earlier attempts.
    taken: &'a PageSet,
    number: u32,
    since: Instant,
}

impl Session {
    /// Cut: see the module.
    pub fn cut(&mut self, request: CutRequest) -> Result<Captured> {
        let since = Instant::now();
        self.attached()?;
        let CutRequest { epoch, again, .. } = request;
        {
            let life = self.machine.quiet_life()?;
            ensure!(
                matches!(life.state, VmmState::Running | VmmState::Paused | VmmState::ShutDown),
                "the machine cannot be cut any more ({:?})",
                life.state
            );
            ensure!(epoch > life.last_cut, "epoch {epoch} was cut already (the newest is {})", life.last_cut);
        }
        if again {
            union(&mut self.pending, &self.early);
            self.early.fill(0);
        }
        self.cut_or_piece(request, EARLY_PIECES, since)
    }

    /// The next piece of a cut that was larger than the arena.
    pub fn cut_continue(&mut self) -> Result<Captured> {
        match self.open.take() {
            None => bail!("there is no cut to continue"),
            Some(Open::Running { request, pieces }) => self.cut_or_piece(request, pieces, Instant::now()),
            Some(Open::Stopped(stopped)) => {
                self.open = Some(Open::Stopped(stopped));
                self.stopped_piece()
            }
        }
    }

    fn cut_or_piece(&mut self, request: CutRequest, pieces: u32, since: Instant) -> Result<Captured> {
        let strategy = self.machine.capturing().strategy;
        if strategy != Strategy::Stop && pieces > 0 && self.too_much()? {
            let mut piece = self.early_piece(request.epoch)?;
            piece.more = true;
            self.open = Some(Open::Running { request, pieces: pieces - 1 });
            return Ok(piece);
        }
        self.protect_disks(request)?;
        let arena = self.arena.clone();
        let mut arena = arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let mut slots = Slots::new(&mut arena.map)?;
        self.scratch.reserve(self.pending.len(), slots.capacity());
        if strategy == Strategy::Lock || self.wants_lock {
            self.prepare_lock();
        }
        let (mut collided, mut taken) = (self.machine.core.ram.no_pages(), self.machine.core.ram.no_pages());
        let mut number = 1;
        let mut since = since;
        loop {
            let all = strategy == Strategy::Stop || request.last || number >= ATTEMPTS;
            let terms = Terms { all, collided: &collided, taken: &taken, number, since };
            match self.attempt(request, strategy, &mut slots, terms) {
                Ok(Some(Attempt::Done(captured))) => return Ok(captured),
                Ok(Some(Attempt::Collided { pages, taken: more })) => {
                    union(&mut collided, &pages);
                    union(&mut taken, &more);
                    number += 1;
                    since = Instant::now();
                }
                Ok(None) => {
                    drop(arena);
                    return self.stopped_piece();
                }
                Err(e) => {
                    // Nothing of it was handed out.
                    union(&mut self.pending, &taken);
                    return Err(e);
                }
            }
        }
    }

    /// Before the first cut, while the guest runs: from here on the disks' writes belong to checkpoints. The gate is held first, because a flush
    /// promises nothing any more.
    fn protect_disks(&mut self, request: CutRequest) -> Result<()> {
        let machine = &self.machine;
        if !machine.storage.any_written() || machine.storage.protected() {
            return Ok(());
        }
        {
            let mut hardware = machine.core.hardware();
            ensure!(
                request.arm || hardware.gate() == Gate::Hold,
                "the machine's outputs do not wait: a machine with disks is protected by a cut that arms"
            );
            hardware.set_gate(Gate::Hold);
        }
        let mirrors = self.mirrors.as_mut();
        ensure!(
            mirrors.is_some() || machine.storage.mirrored().is_empty(),
            "the mirrored disks have no copies to go with this checkpoint"
        );
        let hold = || mirrors.map_or(Ok(()), Mirrors::hold);
        machine.storage.protect(&machine.core, hold).context("the disks cannot be protected")
    }

    /// Whether what was written by now is more than the arena holds.
    fn too_much(&mut self) -> Result<bool> {
        self.read_logs()?;
        let room = self.arena.lock().map(|a| Slots::capacity_of(a.map.len())).unwrap_or(0) as u64;
        let pages: u64 =
            self.log.iter().zip(&self.pending).map(|(log, pending)| u64::from((log | pending).count_ones())).sum();
        Ok(pages > room)
    }

    /// As many pages as fit, hot or not, copied while the guest runs. Both logs were just read.
    fn early_piece(&mut self, epoch: Epoch) -> Result<Captured> {
        self.protect_log(false)?;
        let arena = self.arena.clone();
        let mut arena = arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let mut slots = Slots::new(&mut arena.map)?;
        let mut handed = self.pending.clone();
        limit(&mut handed, slots.capacity());
        indices_into(&handed, &mut self.scratch.now);
        slots.copy(&self.gather, &self.machine.core.ram, &self.scratch.now)?;
        for (pending, handed) in self.pending.iter_mut().zip(&handed) {
            *pending &= !handed;
        }
        union(&mut self.early, &handed);
        Ok(slots.captured(epoch, 0))
    }

    /// Stop the guest and copy; `None` if it now stands still for pieces.
    fn attempt(
        &mut self,
        request: CutRequest,
        strategy: Strategy,
        slots: &mut Slots<'_>,
        terms: Terms<'_>,
    ) -> Result<Option<Attempt>> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.attempt_with(&mut scratch, request, strategy, slots, terms);
        self.scratch = scratch;
        result
    }

    fn attempt_with(
        &mut self,
        scratch: &mut Scratch,
        request: CutRequest,
        strategy: Strategy,
        slots: &mut Slots<'_>,
        terms: Terms<'_>,
    ) -> Result<Option<Attempt>> {
        let machine = self.machine.clone();
        let CutRequest { epoch, arm, last, .. } = request;
        // Before the pause: in it nobody waits for storage.
        let mut intake = machine.storage.close(DRAIN_PATIENCE)?;
        let mut life = machine.quiet_life()?;
        let asked = Instant::now();
        // Until the guest runs on.
        let urgent = urgent::hold();
        life.cutting = true;
        let taken = (|| {
            let mut hardware = machine.freeze(&life);
            let stopped = Instant::now();
            let at = hardware.stopwatch.now();
            // A paused machine's streams may have been acknowledged since the pause, nothing else can have changed.
            let raw = match Machine::paused_state(&life) {
                Some(paused) => Taken::Paused(paused.to_vec(), None),
                None => Taken::Raw(machine.capture_raw(&life, &hardware, at)?),
            };
            let raw = match machine.storage.cut(&machine.core)? {
                Some((number, tags)) => {
                    self.on_disk.retain(|cut| cut.epoch < epoch);
                    self.on_disk.push_back(OnDisk { epoch, number, tags: tags.clone() });
                    raw.with(tags)?
                }
                None => raw,
            };
            intake.clear();
            hardware.seal(epoch);
            if arm {
                hardware.set_gate(Gate::Hold);
            }
            anyhow::Ok((raw, at, stopped))
        })();
        let prepared =
            taken.and_then(|taken| self.prepare(scratch, strategy, &terms).map(|prepared| (taken, prepared)));
        let ((raw, at, stopped), prepared) = match prepared {
            Ok(both) => both,
            Err(e) => {
                machine.unfreeze(&mut life)?;
                return Err(e.context("no cut was made; the machine runs on"));
            }
        };
        let Prepared { choice, hot, cold, protected, threads, read_at } = prepared;
        if hot + cold > slots.capacity() as u64 {
            // It stands still until all pieces are fetched.
            union(&mut self.pending, terms.taken);
            life.last_cut = epoch;
            let stopped = Stopped { request, since: terms.since, state: raw, at, next: 0, done: 0 };
            self.open = Some(Open::Stopped(stopped));
            return Ok(None);
        }
        indices_into(&scratch.at_once, &mut scratch.now);
        indices_into(&scratch.rest, &mut scratch.later);
        let (now, later) = (&scratch.now, &scratch.later);
        let before_copy = Instant::now();
        let copied = slots.copy(&self.gather, &machine.core.ram, now);
        let copy_time = before_copy.elapsed();
        let mut locked = None;
        let mut lock_time = Duration::ZERO;
        let mut refused = None;
        let copied = copied.and_then(|()| {
            let to = slots.reserve(later)?;
            if choice.way == Way::Lock && !later.is_empty() {
                let since = Instant::now();
                match self.locker.as_ref().map(|locker| locker.lock(later, to)) {
                    Some(Ok(held)) => locked = Some(held),
                    not_locked => {
                        refused = not_locked.and_then(Result::err);
                        self.gather.copy(&machine.core.ram, later, to)?;
                    }
                }
                lock_time = since.elapsed();
            } else if choice.way != Way::Validate {
                self.gather.copy(&machine.core.ram, later, to)?;
            }
            Ok(())
        });
        if let Err(e) = copied {
            drop(locked);
            machine.unfreeze(&mut life)?;
            return Err(e.context("the cut was aborted; the machine runs on"));
        }
        if !last {
            machine.unfreeze(&mut life)?;
        }
        let pause = Machine::note_pause(&mut life, terms.since);
        drop(life);
        drop(urgent);

        // The guest runs (but after a last cut, which leaves nothing to copy). All that follows costs it no standstill.
        if let Some(e) = refused {
            eprintln!("warning: pages were copied while the guest stood still: {e:#}");
        }
        let unlock_since = Instant::now();
        let was_locked = locked.is_some();
        if let Some(locked) = locked {
            locked.copy_all();
        }
        let unlock_time = unlock_since.elapsed();
        let collided = if choice.way == Way::Validate && !later.is_empty() {
            let to = slots.again(later.len());
            self.gather.copy(&machine.core.ram, later, to)?;
            Some(self.written_since(later)?)
        } else {
            None
        };
        self.count_cut(
            &terms,
            &Measured {
                kick: stopped - asked,
                state: read_at - stopped,
                copied: (now.len(), copy_time, threads),
                protected,
                locked: was_locked.then_some((later.len(), lock_time + unlock_time)),
                collided: collided.as_ref().map(|set| count(set)),
                hot,
                choice,
                pages: (now.len() + later.len()) as u64,
                in_pause: if choice.way == Way::Stop { now.len() + later.len() } else { now.len() } as u64,
                pause,
            },
        );
        if let Some(pages) = collided.filter(|set| count(set) > 0) {
            // What was copied and not written since is handed out with the next attempt: its slot stays.
            let taken = self.pending.clone();
            for ((pending, written), own) in self.pending.iter_mut().zip(&pages).zip(&self.own) {
                *pending = written | own;
            }
            if !machine.core.manual_log {
                union(&mut self.pending, &self.log);
            }
            return Ok(Some(Attempt::Collided { pages, taken }));
        }
        let state = raw.encode().and_then(|state| slots.put_state(&state).map(|()| state));
        let state = match state {
            Ok(state) => state,
            Err(e) => {
                if last {
                    machine.unfreeze(&mut machine.life())?;
                }
                return Err(e);
            }
        };
        self.finish_pending(choice.way);
        machine.life().last_cut = epoch;
        if last {
            self.last = Some((epoch, at));
        }
        let mut captured = slots.captured(epoch, state.len());
        captured.pause_us = pause;
        captured.vm_time_ns = at.0;
        Ok(Some(Attempt::Done(captured)))
    }

    /// Everything of the cut has been copied: nothing is pending but what was written since.
    fn finish_pending(&mut self, way: Way) {
        self.early.fill(0);
        self.pending.fill(0);
        if way == Way::Validate {
            // The logs were read once more, after the guest had gone on.
            union(&mut self.pending, &self.own);
            if !self.machine.core.manual_log {
                union(&mut self.pending, &self.log);
            }
        }
    }

    /// The guest stands still: read the logs, decide, protect. What is to be copied is in `scratch` afterwards.
    fn prepare(&mut self, scratch: &mut Scratch, strategy: Strategy, terms: &Terms<'_>) -> Result<Prepared> {
        let read_at = Instant::now();
        self.read_logs()?;
        let manual = self.machine.core.manual_log;
        let Scratch { written, at_once: now, rest: later, .. } = scratch;
        written.copy_from_slice(&self.log);
        union(written, &self.pending);
        if terms.number == 1 {
            let early = self.judge_early(written);
            self.machine.capturing().counts.early_pages = early;
            let record = self.machine.capturing().costs;
            let limit = if manual && strategy == Strategy::Auto {
                record.hot_limit(HOT_BUDGET, self.gather.threads_for(u64::MAX))
            } else {
                0
            };
            self.hot.at_cut(written, limit);
        }
        let since = Instant::now();
        let protected = self.protect_log(true)?;
        let protect_time = since.elapsed();
        // All of it is pending now. What stays writable, and what collided before, is copied at once.
        for (i, pending) in self.pending.iter().enumerate() {
            let at_once = self.hot.pages().get(i).copied().unwrap_or(0) | terms.collided.get(i).copied().unwrap_or(0);
            now[i] = pending & at_once;
            later[i] = pending & !at_once;
        }
        let (hot, cold) = (count(now), count(later));
        let threads = self.gather.threads_for(cold);
        let demanded = if terms.all { Strategy::Stop } else { strategy };
        let mut choice = self.machine.capturing().costs.choose(demanded, cold, threads);
        choice.demanded = strategy != Strategy::Auto;
        if choice.way == Way::Lock && self.locker.is_none() {
            // The next cut finds one, if this host has it.
            self.wants_lock = true;
            choice.way = Way::Stop;
        }
        if choice.way == Way::Stop {
            union(now, later);
            later.fill(0);
        }
        let threads = self.gather.threads_for(count(now));
        Ok(Prepared { choice, hot, cold, protected: (protected, protect_time), threads, read_at })
    }

    /// Make what locks pages, if there is none. A host that cannot lock copies pages in the pause: a checkpoint that costs more is
    /// better than none, for which the outputs would wait for ever.
    fn prepare_lock(&mut self) {
        if self.locker.is_none() && !self.no_lock {
            match Locker::new(self.machine.core.clone()) {
                Ok(locker) => self.locker = Some(locker),
                Err(e) => {
                    eprintln!("warning: pages are copied while the guest stands still instead of being locked: {e:#}");
                    self.no_lock = true;
                }
            }
        }
    }

    /// Of `pages`, those that guest or devices have written since the cut. Every write that a copy can have seen is found: see the
    /// document named above.
    fn written_since(&mut self, pages: &[u64]) -> Result<PageSet> {
        let machine = self.machine.clone();
        machine.vcpus.touch();
        {
            // A device marks a page after it has written it, both under this lock.
            let _devices = machine.core.hardware();
            self.own.fill(0);
            machine.core.ram.collect_own(&mut self.own);
            // Should the log not be given, they are not forgotten.
            union(&mut self.pending, &self.own);
        }
        machine.core.ram.read_log(&machine.core.vm, &mut self.log)?;
        let mut set = machine.core.ram.no_pages();
        for page in pages {
            let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
            set[word] |= (self.log[word] | self.own[word]) & bit;
        }
        Ok(set)
    }

    fn count_cut(&self, terms: &Terms<'_>, m: &Measured) {
        let mut record = self.machine.capturing();
        let ns = |d: Duration| d.as_nanos() as f64;
        let costs = &mut record.costs;
        learn(&mut costs.kick, ns(m.kick));
        learn(&mut costs.state, ns(m.state));
        let (pages, time, threads) = m.copied;
        if pages >= 64 {
            learn(&mut costs.copy, ns(time) * threads as f64 / pages as f64);
        }
        let (pages, time) = m.protected;
        if pages >= 64 {
            learn(&mut costs.protect, ns(time) / pages as f64);
        }
        if let Some((pages, time)) = m.locked {
            let (faults, fault_ns) = self.locker.as_ref().map_or((0, 0), Locker::take_faults);
            if pages > 0 {
                learn(&mut costs.lock, ns(time) / pages as f64);
            }
            if faults > 0 {
                learn(&mut costs.lock_fault, fault_ns as f64 / faults as f64);
            }
            learn(&mut costs.collisions, faults as f64);
        }
        if let Some(collided) = m.collided {
            learn(&mut costs.collisions, collided as f64);
        }
        record.choice = m.choice;
        let counts = &mut record.counts;
        if terms.number == 1 {
            counts.cuts += 1;
            (counts.pages, counts.stopped_pages) = (0, 0);
        } else {
            counts.repeated += 1;
        }
        counts.pages += m.pages;
        counts.stopped_pages += m.in_pause;
        counts.hot_pages = m.hot;
        counts.stood_still_us += m.pause;
    }

    /// Fill the arena; at the last piece let the guest go.
    fn stopped_piece(&mut self) -> Result<Captured> {
        let piece = self.fill().and_then(|piece| if piece.more { Ok(piece) } else { self.last_piece(piece) });
        piece.map_err(|e| {
            self.abort();
            e.context("the cut was aborted; the machine runs on")
        })
    }

    fn fill(&mut self) -> Result<Captured> {
        let Some(Open::Stopped(open)) = &mut self.open else { bail!("there is no cut to continue") };
        let mut arena = self.arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let mut slots = Slots::new(&mut arena.map)?;
        let pages = &mut self.scratch.now;
        indices_from(&self.pending, open.next, slots.capacity(), pages);
        slots.copy(&self.gather, &self.machine.core.ram, pages)?;
        open.next = pages.last().map_or(open.next, |last| last + 1);
        open.done += pages.len() as u64;
        let mut captured = slots.captured(open.request.epoch, 0);
        captured.more = open.done < count(&self.pending);
        captured.vm_time_ns = open.at.0;
        Ok(captured)
    }

    /// All pages are in the arena: the guest runs on, and the state joins them.
    fn last_piece(&mut self, mut captured: Captured) -> Result<Captured> {
        let Some(Open::Stopped(open)) = self.open.take() else { bail!("there is no cut to continue") };
        let machine = self.machine.clone();
        let last = open.request.last;
        {
            let mut life = machine.life();
            if !last {
                machine.unfreeze(&mut life)?;
            }
            captured.pause_us = Machine::note_pause(&mut life, open.since);
        }
        let put = open.state.encode().and_then(|state| {
            let mut arena = self.arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
            Slots::new(&mut arena.map)?.put_state(&state)?;
            Ok(state.len() as u64)
        });
        captured.state_len = match put {
            Ok(len) => len,
            Err(e) => {
                if last {
                    machine.unfreeze(&mut machine.life())?;
                }
                return Err(e);
            }
        };
        // Handed out completely.
        self.pending.fill(0);
        self.early.fill(0);
        if last {
            self.last = Some((open.request.epoch, open.at));
        }
        let mut record = machine.capturing();
        record.counts.cuts += 1;
        record.counts.stood_still_us += captured.pause_us;
        record.counts.pages = open.done;
        record.counts.stopped_pages = open.done;
        record.choice = Choice { pages: open.done, ..Choice::default() };
        Ok(captured)
    }
}

/// What [`Session::prepare`] found and did.
struct Prepared {
    choice: Choice,
    hot: u64,
    cold: u64,
    protected: (u64, Duration),
    threads: usize,
    read_at: Instant,
}

/// What an attempt took.
struct Measured {
    kick: Duration,
    state: Duration,
    copied: (usize, Duration, usize),
    protected: (u64, Duration),
    locked: Option<(usize, Duration)>,
    collided: Option<u64>,
    hot: u64,
    choice: Choice,
    pages: u64,
    in_pause: u64,
    pause: u64,
}
