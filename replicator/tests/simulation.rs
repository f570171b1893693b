//! Both state machines in a simulated world: a guest that writes and speaks, a wire that breaks, a standby that crashes
//! between (and inside) any two of its steps, a hook that fails or lies, a cluster that takes over when it may.
//! Everything follows from a seed.
//!
//! What is checked after every event:
//! 1. *Whole images*: what a restarted standby would find is nothing, or exactly one cut of the primary.
//! 2. *Output commit and no stale takeover*: everything that has left the machine is in that image, or the veto stands.
//! 3. The floor of generations never goes down.
//!
//! After a take-over: the image does not change any more, nothing more leaves the old machine, and it ends itself as soon
//! as it can hear. Without one: when the troubles end, the machine is protected again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use understudy_protocol::control::{Attached, Captured};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::state::{self, StateEncoder};
use understudy_replicator::codec::writer::{Compression, ShadowBudget};
use understudy_replicator::codec::{
    BatchError, BatchWriter, Decoder, EncodingConfig, EpochDigest, PAGE, Page, PageHash, Target,
};
use understudy_replicator::durable::{Durable, ImageKind, Pending, RamIdentity, Record};
use understudy_replicator::message::{End, Envelope, Message};
use understudy_replicator::receiver::{Conn, LocalVmm, Receiver, Standing, Step, Surroundings};
use understudy_replicator::sender::{Action, Event, Sender, SenderConfig, SlowLink, SlowPolicy, VetoCall};

const PAGES: u64 = 8;
const ARENA: usize = 3;
const IDENTITY: RamIdentity = RamIdentity { dev: 1, ino: 1, bytes: PAGES * PAGE as u64 };

/// Faults put in on purpose, to see that the checks see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sabotage {
    None,
    SkipCommitRecord,
    ApplyBeforeCommit,
    AckBeforeCommit,
    SkipInconsistentRecord,
    ForgetRepair,
    VetoNotAwaited,
    /// A new first copy refers to what an earlier one had sent.
    KeepShadow,
    /// The same for the device state.
    KeepStateBase,
    /// What is sent again is encoded anew, against what the sender has become meanwhile.
    ResendIsNotTheSame,
    ForgetEarly,
    /// What a lost standby was sent early counts as known to it.
    KeepShadowOfLost,
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone)]
struct Frame {
    generation: Generation,
    epoch: Epoch,
    kind: u8,
    payload: Vec<u8>,
}

impl Frame {
    fn new(generation: Generation, epoch: Epoch, message: &Message<'_>) -> Self {
        Self { generation, epoch, kind: message.kind(), payload: message.payload().into_owned() }
    }
}

/// What survives a crash of the standby's process.
#[derive(Clone, Default)]
struct Disk {
    durable: Durable,
    ram: Vec<u64>,
    /// Decoded pages of the epoch that is arriving, in the order of their first arrival.
    stage: Vec<(u64, u64)>,
    states: BTreeMap<(u64, u64), Vec<u8>>,
}

/// What does not.
#[derive(Default)]
struct Volatile {
    decoder: Decoder,
    encoded_state: Vec<u8>,
    state: Vec<u8>,
}

fn crc(stage: &[(u64, u64)]) -> Pending {
    let mut hasher = crc32fast::Hasher::new();
    stage.iter().for_each(|(index, seed)| hasher.update(&[index.to_le_bytes(), seed.to_le_bytes()].concat()));
    Pending { stage_len: stage.len() as u64, stage_crc: hasher.finalize() }
}

/// A page that eight bytes describe: each stands in a line of its own, so that a change of some of them is a small delta.
fn page(seed: u64) -> Page {
    let mut page = [if seed == 0 { 0 } else { 0xA5 }; PAGE];
    for (byte, line) in seed.to_le_bytes().into_iter().zip(page.as_chunks_mut::<512>().0) {
        line[64] = byte;
    }
    page
}

/// Back; a page that no guest wrote is marked as such.
fn seed(content: &Page) -> u64 {
    let mut bytes = [0; 8];
    for (byte, line) in bytes.iter_mut().zip(content.as_chunks::<512>().0) {
        *byte = line[64];
    }
    let seed = u64::from_le_bytes(bytes);
    if page(seed) == *content { seed } else { u64::MAX }
}

/// The device state: long enough that a change of it is much smaller.
fn device_state(epoch: Epoch) -> Vec<u8> {
    let mut state: Vec<u8> = (0..200).collect();
    state.splice(100..100, epoch.0.to_string().into_bytes());
    state
}

/// Why the standby's process stopped in a step.
enum Stop {
    Crash,
    /// What arrived is not what the primary captured: the wire does not lie here, so that is a fault of ours.
    Content(String),
}

impl From<BatchError> for Stop {
    fn from(e: BatchError) -> Self {
        Self::Content(e.to_string())
    }
}

/// Where a batch is decoded to: the stage over RAM, or RAM itself; it stops after `limit` pages, as a crash would.
struct Onto<'a> {
    disk: &'a mut Disk,
    staged: bool,
    limit: u64,
}

impl Target for Onto<'_> {
    type Error = Stop;

    fn read(&mut self, index: u64, content: &mut Page) -> Result<(), Stop> {
        let staged = self.disk.stage.iter().find(|(staged, _)| self.staged && *staged == index);
        *content = page(staged.map_or(self.disk.ram[index as usize], |(_, seed)| *seed));
        Ok(())
    }

    fn page(&mut self, index: u64, content: &Page, _: PageHash) -> Result<(), Stop> {
        self.limit = self.limit.checked_sub(1).ok_or(Stop::Crash)?;
        let seed = seed(content);
        if !self.staged {
            self.disk.ram[index as usize] = seed;
        } else if let Some(staged) = self.disk.stage.iter_mut().find(|(staged, _)| *staged == index) {
            staged.1 = seed;
        } else {
            self.disk.stage.push((index, seed));
        }
        Ok(())
    }

    fn zeros(&mut self, index: u64, count: u64) -> Result<(), Stop> {
        (index..index + count).try_for_each(|index| self.page(index, &[0; PAGE], 0))
    }
}

impl Disk {
    /// Write the stage to RAM; false if the process died after `limit` pages.
    fn apply(&mut self, limit: u64) -> bool {
        for (index, seed) in self.stage.iter().take(usize::try_from(limit).unwrap_or(usize::MAX)) {
            self.ram[*index as usize] = *seed;
        }
        limit >= self.stage.len() as u64
    }

    /// What a take-over after a restart would find.
    fn recovered(&self) -> Option<(Generation, Epoch, Vec<u64>, Vec<u8>)> {
        let mut disk = self.clone();
        let record = disk.durable.record.clone();
        if record.image == ImageKind::Inconsistent {
            return None;
        }
        if let Some(pending) = record.pending {
            assert_eq!(crc(&disk.stage), pending, "the committed stage is gone");
            disk.apply(u64::MAX);
        }
        let state = disk.states.get(&(record.generation.0, record.epoch.0)).cloned().unwrap_or_default();
        Some((record.generation, record.epoch, disk.ram, state))
    }
}

#[derive(Default)]
struct Vmm {
    ram: Vec<u64>,
    log: Option<BTreeSet<u64>>,
    gate_open: bool,
    stopped: bool,
    rest: Vec<u64>,
    cut: Epoch,
    committed: Epoch,
    /// Share of the time that the guest runs; 0 = as nobody has said anything.
    share: u8,
    /// Copied early since the last cut.
    early: BTreeSet<u64>,
    arena: Vec<(u64, u64)>,
    last: bool,
    /// Numbered outputs: made, and let out.
    made: u64,
    released: u64,
    snapshots: BTreeMap<u64, (Vec<u64>, u64)>,
    quit: bool,
    handed_over: bool,
}

struct World {
    random: Random,
    sabotage: Sabotage,
    troubled: bool,
    now: Instant,

    vmm: Vmm,
    sender: Sender,
    batch: BatchWriter,
    state: StateEncoder,
    digest: EpochDigest,
    kept: Vec<Frame>,
    cursor: u64,
    bitmap: BTreeSet<u64>,
    hooks: VecDeque<VetoCall>,
    sessions: u64,

    receiver: Receiver,
    disk: Disk,
    volatile: Volatile,
    reports: VecDeque<Standing>,
    conn: Option<Conn>,
    conns: Conn,
    /// The connection that the sender listens to: what a dead standby had said may still arrive.
    listening: Option<Conn>,
    /// The standby has not yet noticed that these are gone.
    ghosts: Vec<Conn>,
    to_receiver: VecDeque<(Conn, Frame)>,
    to_sender: VecDeque<(Conn, Frame)>,
    connecting: bool,

    veto: bool,
    score: Standing,
    taken: Option<(Vec<u64>, u64)>,
    floor: Generation,
    trace: Vec<String>,
}

type Check = Result<(), String>;

impl World {
    fn new(seed: u64, sabotage: Sabotage) -> Self {
        let now = Instant::now();
        let policy = [SlowPolicy::Stall, SlowPolicy::Throttle, SlowPolicy::Solo][seed as usize % 3];
        let config = SenderConfig {
            pipeline: 1 + seed as usize % 4,
            slow: SlowLink { policy, max_lag: Duration::from_millis(300) },
            ..SenderConfig::new("m", "n1", true)
        };
        let disk = Disk { ram: vec![0; PAGES as usize], ..Disk::default() };
        let receiver = Receiver::recover("m", "n2", Durable::default(), Some(IDENTITY), &mut Vec::new());
        Self {
            random: Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            sabotage,
            troubled: true,
            now,
            vmm: Vmm { ram: vec![0; PAGES as usize], ..Vmm::default() },
            sender: Sender::new(config, now),
            batch: BatchWriter::default(),
            state: StateEncoder::default(),
            digest: EpochDigest::default(),
            kept: Vec::new(),
            cursor: 0,
            bitmap: BTreeSet::new(),
            hooks: VecDeque::new(),
            sessions: 0,
            receiver,
            disk,
            volatile: Volatile::default(),
            reports: VecDeque::new(),
            conn: None,
            conns: 0,
            listening: None,
            ghosts: Vec::new(),
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            connecting: false,
            veto: false,
            score: Standing::Inconsistent,
            taken: None,
            floor: Generation::ZERO,
            trace: Vec::new(),
        }
    }

    fn say(&mut self, what: String) {
        self.trace.push(what);
        if self.trace.len() > 60 {
            self.trace.remove(0);
        }
    }

    // The guest.

    fn guest(&mut self) {
        if self.vmm.stopped || self.vmm.quit || self.vmm.handed_over {
            return;
        }
        for _ in 0..self.random.below(3) {
            let page = self.random.below(PAGES);
            let (old, other) = (self.vmm.ram[page as usize], self.vmm.ram[self.random.below(PAGES) as usize]);
            self.vmm.ram[page as usize] = match self.random.below(8) {
                0 => 0,
                1 => old,
                2 => other,
                // (The highest value marks what no guest wrote.)
                3 | 4 => self.random.next() >> 1,
                _ => (old ^ (self.random.next() & 0xFF) << (8 * self.random.below(8))) & (u64::MAX >> 1),
            };
            if let Some(log) = &mut self.vmm.log {
                log.insert(page);
            }
        }
        self.vmm.made += 1;
        self.release();
        if self.random.one_in(2) {
            self.event(Event::OutputWaits);
        }
    }

    fn release(&mut self) {
        if self.vmm.gate_open && !self.vmm.quit {
            self.vmm.released = self.vmm.made;
        }
    }

    // The sender's side.

    fn event(&mut self, event: Event) {
        self.sender.event(event, self.now);
    }

    fn transmit(&mut self, frame: Frame) -> bool {
        match self.conn {
            Some(conn) => {
                self.to_receiver.push_back((conn, frame));
                true
            }
            None => false,
        }
    }

    fn detach(&mut self) {
        self.vmm.gate_open = false;
        self.vmm.early.clear();
        self.vmm.share = 100;
        self.kept.clear();
        self.vmm.log = None;
        self.vmm.rest.clear();
        if !self.vmm.handed_over {
            self.vmm.stopped = false;
        }
    }

    fn sender_step(&mut self) -> Check {
        let mut action = self.sender.next(self.now);
        self.sender.take_notes();
        if let Action::Wait(until) = action {
            let limit = self.now + Duration::from_millis(self.random.below(60));
            self.now = until.min(limit).max(self.now + Duration::from_millis(1));
            return Ok(());
        }
        self.say(format!("sender: {action:?}"));
        if self.sabotage == Sabotage::VetoNotAwaited && action == Action::Hook(VetoCall::Veto) {
            self.event(Event::Hook(VetoCall::Veto, Ok(())));
            action = Action::Wait(self.now);
        }
        match action {
            Action::Wait(_) => {}
            Action::Attach => {
                if self.vmm.quit || self.vmm.handed_over {
                    self.event(Event::VmmRefused("it does not run".into()));
                    return Ok(());
                }
                self.sessions += 1;
                let bytes = PAGES * PAGE as u64;
                let attached = Attached { generation: Generation(1), ram_bytes: bytes, arena_bytes: bytes };
                self.event(Event::Attached { attached, last_cut: self.vmm.cut, session: self.sessions });
            }
            Action::Detach => self.detach(),
            Action::Quit => {
                self.vmm.quit = true;
                self.detach();
                self.event(Event::VmmDone);
            }
            Action::DirtyLogStart => {
                if self.vmm.log.replace(BTreeSet::new()).is_some() {
                    return Err("the dirty log was started twice".into());
                }
                self.event(Event::VmmDone);
            }
            Action::Harvest { send } => {
                let Some(log) = &mut self.vmm.log else { return Err("harvest without a dirty log".into()) };
                let log = std::mem::take(log);
                self.vmm.early.clear();
                let pages = log.len() as u64;
                if send {
                    (self.bitmap, self.cursor) = (log, 0);
                }
                self.event(Event::Harvested { pages });
            }
            Action::CopySlice { first } => {
                if first {
                    self.cursor = 0;
                    self.first_copy();
                }
                let end = (self.cursor + 3).min(PAGES);
                for index in self.cursor..end {
                    self.batch.push(index, &page(self.vmm.ram[index as usize]), &mut self.digest);
                }
                self.cursor = end;
                self.send_sync(Event::Copied { done: end == PAGES });
            }
            Action::SendDirty => {
                for index in std::mem::take(&mut self.bitmap) {
                    self.batch.push(index, &page(self.vmm.ram[index as usize]), &mut self.digest);
                }
                self.send_sync(Event::DirtySent { done: true });
            }
            Action::Cut { epoch, arm, last, again } => {
                if self.troubled && self.random.one_in(30) {
                    self.say("the VMM refuses the cut".into());
                    self.event(Event::VmmRefused("busy".into()));
                    return Ok(());
                }
                return self.cut(epoch, arm, last, again);
            }
            Action::Precopy(epoch) => return self.precopy(epoch),
            Action::Throttle(share) => {
                self.vmm.share = share;
                self.event(Event::VmmDone);
            }
            Action::CutContinue => {
                if self.vmm.rest.is_empty() {
                    return Err("nothing to continue".into());
                }
                let captured = self.piece();
                self.event(Event::Captured(captured));
            }
            Action::SendPiece(captured) => self.send_piece(captured),
            Action::Resend { after } => {
                let frames = match self.sabotage {
                    Sabotage::ResendIsNotTheSame => self.encoded_again(),
                    _ => self.kept.clone(),
                };
                let frames: Vec<Frame> =
                    frames.into_iter().filter(|frame| frame.epoch > after && frame.epoch <= self.vmm.cut).collect();
                let sent = frames.into_iter().all(|frame| self.transmit(frame));
                self.event(if sent { Event::Resent } else { Event::PeerLost("broken".into()) });
            }
            Action::Committed(epoch) => {
                if epoch > self.vmm.cut || epoch <= self.vmm.committed {
                    let (cut, committed) = (self.vmm.cut, self.vmm.committed);
                    return Err(format!("epoch {epoch} is called committed, {cut} was cut, {committed} committed"));
                }
                self.vmm.committed = epoch;
                self.kept.retain(|frame| frame.epoch > epoch);
                self.vmm.released = self.vmm.released.max(self.vmm.snapshots[&epoch.0].1);
                self.vmm.handed_over |= self.vmm.last && epoch == self.vmm.cut;
                self.event(Event::VmmDone);
            }
            Action::GateOpen => {
                if !matches!(self.vmm.share, 0 | 100) {
                    return Err(format!("nobody waits for the guest, and it runs for {} %", self.vmm.share));
                }
                self.vmm.gate_open = true;
                self.release();
                self.event(Event::VmmDone);
            }
            Action::Connect => self.connecting = true,
            Action::Send(epoch, message) => {
                if message == Message::SyncBegin {
                    self.digest = EpochDigest::default();
                    self.kept.clear();
                }
                if !self.transmit(Frame::new(Generation(1), epoch, &message)) {
                    self.event(Event::PeerLost("broken".into()));
                }
            }
            Action::Disconnect => {
                self.listening = None;
                self.break_link();
            }
            Action::Hook(call) => self.hooks.push_back(call),
            Action::AnswerHandOver(Ok(done)) => {
                let image = self.disk.recovered().map(|(_, epoch, ..)| epoch);
                if self.taken.is_none() && (image != Some(done.epoch) || !self.vmm.handed_over) {
                    return Err(format!("handed over at {}, but the image is {image:?}", done.epoch));
                }
            }
            Action::AnswerHandOver(Err(why)) => {
                if self.vmm.handed_over {
                    return Err(format!("the machine was handed over, but the answer is: {why}"));
                }
            }
        }
        Ok(())
    }

    /// As the driver does.
    fn first_copy(&mut self) {
        if self.sabotage != Sabotage::KeepShadow || self.sessions == 1 && self.vmm.cut == Epoch::ZERO {
            self.restart_encoding();
        }
        if self.sabotage != Sabotage::KeepStateBase {
            self.state.restart();
        }
    }

    fn send_sync(&mut self, event: Event) {
        self.batch.seal();
        let frame = Frame::new(Generation(1), Epoch::ZERO, &Message::SyncPages(self.batch.bytes()));
        let sent = self.batch.is_empty() || self.transmit(frame);
        self.batch.clear();
        self.event(if sent { event } else { Event::PeerLost("broken".into()) });
    }

    /// Some of the pages that were written, while the guest runs.
    fn precopy(&mut self, epoch: Epoch) -> Check {
        if epoch <= self.vmm.cut {
            return Err(format!("early pages for {epoch} after {} was cut", self.vmm.cut));
        }
        let Some(log) = &mut self.vmm.log else { return Err("early copies without a dirty log".into()) };
        let some: Vec<u64> = log.iter().copied().filter(|_| self.random.one_in(2)).take(ARENA).collect();
        log.retain(|page| !some.contains(page));
        self.vmm.early.extend(&some);
        self.vmm.arena = some.iter().map(|page| (*page, self.vmm.ram[*page as usize])).collect();
        self.begin(epoch, false);
        let captured = Captured { epoch, more: true, state_len: 0, ..self.captured(some.len()) };
        self.event(Event::Precopied(captured));
        Ok(())
    }

    /// The frames of an epoch begin, unless they have begun before.
    fn begin(&mut self, epoch: Epoch, again: bool) {
        if again {
            self.kept.retain(|frame| frame.epoch < epoch);
            self.digest = EpochDigest::default();
            if self.sabotage == Sabotage::KeepShadowOfLost {
                self.batch.clear();
            } else {
                self.batch.forget_receiver();
            }
        }
    }

    /// Nothing is known of the receiver any more.
    fn restart_encoding(&mut self) {
        // Room for copies of half of the pages, so that some are evicted.
        let config = EncodingConfig { shadow: ShadowBudget::Percent(50), compression: Compression::Auto };
        self.batch.restart(PAGES, &config, self.random.next());
    }

    fn cut(&mut self, epoch: Epoch, arm: bool, last: bool, again: bool) -> Check {
        if epoch <= self.vmm.cut || self.vmm.stopped {
            return Err(format!("cut {epoch} after {} (stopped: {})", self.vmm.cut, self.vmm.stopped));
        }
        let Some(log) = &mut self.vmm.log else { return Err("a cut without a dirty log".into()) };
        let mut log = std::mem::take(log);
        let early = std::mem::take(&mut self.vmm.early);
        if again && self.sabotage != Sabotage::ForgetEarly {
            log.extend(early);
        }
        self.vmm.rest = log.into_iter().collect();
        self.vmm.cut = epoch;
        self.vmm.last = last;
        self.vmm.stopped = true;
        if arm {
            self.vmm.gate_open = false;
        }
        self.vmm.snapshots.insert(epoch.0, (self.vmm.ram.clone(), self.vmm.made));
        self.begin(epoch, again);
        let captured = self.piece();
        self.event(Event::Captured(captured));
        Ok(())
    }

    fn piece(&mut self) -> Captured {
        let n = self.vmm.rest.len().min(ARENA);
        self.vmm.arena = self.vmm.rest.drain(..n).map(|page| (page, self.vmm.ram[page as usize])).collect();
        let more = !self.vmm.rest.is_empty();
        self.vmm.stopped = more || self.vmm.last;
        Captured { more, state_len: if more { 0 } else { 8 }, ..self.captured(n) }
    }

    fn captured(&self, pages: usize) -> Captured {
        Captured {
            epoch: self.vmm.cut,
            // What is sent early must be worth it, or the sender would not ask for more.
            pages: if pages > 0 { 1024 } else { 0 },
            indices_offset: 0,
            pages_offset: 0,
            state_offset: 0,
            state_len: 0,
            more: false,
            pause_us: 1,
            vm_time_ns: 0,
        }
    }

    fn send_piece(&mut self, captured: Captured) {
        for (index, seed) in std::mem::take(&mut self.vmm.arena) {
            self.batch.push(index, &page(seed), &mut self.digest);
        }
        self.batch.seal();
        let epoch = captured.epoch;
        let mut frames = Vec::new();
        if !self.batch.is_empty() {
            frames.push(Frame::new(Generation(1), epoch, &Message::Pages(self.batch.bytes())));
            self.batch.clear();
        }
        if !captured.more {
            let (state, mut encoded) = (device_state(epoch), Vec::new());
            self.digest.state(&state);
            self.state.encode(epoch, &state, &mut encoded);
            for piece in encoded.chunks(150) {
                frames.push(Frame::new(Generation(1), epoch, &Message::State(piece)));
            }
            let pages = self.digest.pages();
            let end = End { pages, state_len: state.len() as u64, digest: self.digest.finish() };
            frames.push(Frame::new(Generation(1), epoch, &Message::End(end)));
        }
        let mut sent = true;
        for frame in frames {
            self.kept.push(frame.clone());
            sent = sent && self.transmit(frame);
        }
        self.event(Event::PieceSent { kept: true });
        if !sent {
            self.event(Event::PeerLost("broken".into()));
        }
    }

    /// What a sender would send that keeps an epoch's pages instead of its frames.
    fn encoded_again(&mut self) -> Vec<Frame> {
        let mut frames = self.kept.clone();
        let (snapshot, _) = self.vmm.snapshots[&self.vmm.cut.0].clone();
        let Some(pages) =
            frames.iter_mut().find(|frame| matches!(Message::parse(frame.kind, &[]), Ok(Message::Pages(_))))
        else {
            return frames;
        };
        (0..PAGES)
            .for_each(|index| self.batch.push(index, &page(snapshot[index as usize]), &mut EpochDigest::default()));
        self.batch.seal();
        if !self.batch.is_empty() {
            pages.payload = self.batch.bytes().to_vec();
        }
        self.batch.clear();
        frames
    }

    // The wire and the cluster.

    fn connect(&mut self) {
        self.connecting = false;
        if self.conn.is_some() || self.troubled && self.random.one_in(4) {
            self.event(Event::PeerLost("no route".into()));
            return;
        }
        self.conns += 1;
        self.conn = Some(self.conns);
        self.listening = self.conn;
        self.event(Event::Connected);
    }

    fn break_link(&mut self) {
        let Some(conn) = self.conn.take() else { return };
        // What was under way may still arrive, up to some point.
        let arrive = self.random.below(self.to_receiver.len() as u64 + 1) as usize;
        self.to_receiver.truncate(arrive);
        let arrive = self.random.below(self.to_sender.len() as u64 + 1) as usize;
        self.to_sender.truncate(arrive);
        self.ghosts.push(conn);
    }

    fn hook_done(&mut self) {
        let Some(call) = self.hooks.pop_front() else { return };
        // After a take-over the rest of the cluster has quorum without this node: nothing it asks for happens.
        let works = self.taken.is_none() && !(self.troubled && self.random.one_in(3));
        // A hook that was ended by its deadline may have done its work.
        let done = works || self.taken.is_none() && self.random.one_in(2);
        if done {
            self.veto = call == VetoCall::Veto;
        }
        self.say(format!("hook {call:?}: done {done}, says {works}"));
        self.event(Event::Hook(call, if works { Ok(()) } else { Err("no quorum".into()) }));
    }

    // The standby.

    fn deliver(&mut self) -> Check {
        let Some((conn, frame)) = self.to_receiver.pop_front() else { return Ok(()) };
        let message = Message::parse(frame.kind, &frame.payload).map_err(|e| e.to_string())?;
        let envelope = Envelope { generation: frame.generation, epoch: frame.epoch, message };
        let mut steps = Vec::new();
        let around = || Surroundings { vmm: LocalVmm::Standby(None), ram: Some(IDENTITY) };
        self.receiver.message(conn, &envelope, around, &mut steps);
        if steps.iter().any(|step| matches!(step, Step::Commit(_) | Step::SaveRecord(_))) {
            self.say(format!("standby: kind {} → {steps:?}", frame.kind));
        }
        self.standby_steps(steps, Some(&frame))
    }

    fn standby_steps(&mut self, mut steps: Vec<Step>, frame: Option<&Frame>) -> Check {
        let commit = steps.iter().position(|step| matches!(step, Step::Commit(_)));
        if let Some(at) = commit {
            let find = |wanted: fn(&Step) -> bool| steps.iter().position(wanted);
            let (ack, apply) = (find(|s| matches!(s, Step::Send(_, _, _, Message::Ack))), find(|s| *s == Step::Apply));
            match self.sabotage {
                Sabotage::SkipCommitRecord => drop(steps.remove(at)),
                Sabotage::ApplyBeforeCommit => steps.swap(at, apply.unwrap()),
                Sabotage::AckBeforeCommit => steps.swap(at, ack.unwrap()),
                _ => {}
            }
        } else if self.sabotage == Sabotage::SkipInconsistentRecord {
            steps.retain(|step| !matches!(step, Step::SaveRecord(record) if record.image == ImageKind::Inconsistent));
        } else if self.sabotage == Sabotage::ForgetRepair && frame.is_none() {
            steps.retain(|step| *step != Step::Apply);
        }
        for step in steps {
            if self.troubled && self.random.one_in(40) {
                return self.crash();
            }
            match self.perform(&step, frame) {
                Ok(()) => {}
                Err(Stop::Crash) => return self.crash(),
                Err(Stop::Content(why)) => return Err(format!("what arrived is not what was captured: {why}")),
            }
            self.check()?;
        }
        Ok(())
    }

    fn perform(&mut self, step: &Step, frame: Option<&Frame>) -> Result<(), Stop> {
        let limit = if self.troubled && self.random.one_in(20) { self.random.below(PAGES) } else { u64::MAX };
        let payload = frame.map_or(&[][..], |frame| &frame.payload);
        match step {
            Step::SaveFloor(floor) => self.disk.durable.floor = *floor,
            Step::SaveRecord(record) => self.disk.durable.record = record.clone(),
            Step::BeginDigest => {
                self.volatile.decoder.begin();
                self.volatile.encoded_state.clear();
            }
            Step::WriteSync | Step::AppendStage => {
                let staged = *step == Step::AppendStage;
                let mut onto = Onto { disk: &mut self.disk, staged, limit };
                self.volatile.decoder.batch(payload, PAGES, &mut onto)?;
            }
            Step::ResetStage => {
                self.disk.stage.clear();
                self.volatile.encoded_state.clear();
            }
            Step::AppendState => self.volatile.encoded_state.extend_from_slice(payload),
            Step::Verify { epoch, end, base } => {
                let base = base.and_then(|(generation, epoch)| {
                    Some((epoch, &self.disk.states.get(&(generation.0, epoch.0))?[..]))
                });
                let decoded = state::decode(&self.volatile.encoded_state, base);
                self.volatile.state = decoded.map_err(|e| Stop::Content(e.to_string()))?;
                let digest = self.volatile.decoder.digest();
                let (pages, len) = (digest.pages(), self.volatile.state.len() as u64);
                digest.state(&self.volatile.state);
                if (pages, len, digest.finish()) != (end.pages, end.state_len, end.digest) {
                    return Err(Stop::Content(format!("epoch {epoch}: the digest")));
                }
            }
            Step::Commit(record) => {
                let state = std::mem::take(&mut self.volatile.state);
                self.disk.states.insert((record.generation.0, record.epoch.0), state);
                if limit < 3 {
                    return Err(Stop::Crash);
                }
                self.disk.durable.record = Record { pending: Some(crc(&self.disk.stage)), ..record.clone() };
            }
            Step::Apply if !self.disk.apply(limit) => return Err(Stop::Crash),
            Step::Apply => {}
            Step::Send(conn, generation, epoch, message) => {
                if self.conn == Some(*conn) {
                    self.to_sender.push_back((*conn, Frame::new(*generation, *epoch, message)));
                }
            }
            Step::Close(conn) => {
                if self.conn == Some(*conn) {
                    // What was said before arrives.
                    self.conn = None;
                    self.to_receiver.clear();
                }
            }
            Step::Report(standing) => self.reports.push_back(*standing),
            // Nobody asks for it here: what is compared, and when, is tested beside it (verify/tests.rs).
            Step::Compare => {}
        }
        Ok(())
    }

    /// The standby's process dies and is started again.
    fn crash(&mut self) -> Check {
        self.say("standby: crash".into());
        self.to_receiver.clear();
        self.conn = None;
        self.ghosts.clear();
        self.reports.clear();
        self.volatile = Volatile::default();
        let mut steps = Vec::new();
        let durable = self.disk.durable.clone();
        self.receiver = Receiver::recover("m", "n2", durable, Some(IDENTITY), &mut steps);
        self.check()?;
        self.standby_steps(steps, None)
    }

    fn reported(&mut self) -> Check {
        let Some(standing) = self.reports.pop_front() else { return Ok(()) };
        if !self.reports.is_empty() {
            return Ok(()); // only the newest is told
        }
        if self.troubled && self.random.one_in(4) {
            self.reports.push_front(standing); // a failed one is told again
            return Ok(());
        }
        self.score = standing;
        let mut steps = Vec::new();
        self.receiver.reported(standing, &mut steps);
        self.standby_steps(steps, None)
    }

    /// The cluster believes the primary dead.
    fn take_over(&mut self) -> Check {
        let may = !self.veto && matches!(self.score, Standing::UpToDate | Standing::Disconnected);
        if !may || self.taken.is_some() {
            return Ok(());
        }
        let Some((generation, epoch, ram, state)) = self.disk.recovered() else { return Ok(()) };
        let mut steps = Vec::new();
        let around = Surroundings { vmm: LocalVmm::Standby(None), ram: Some(IDENTITY) };
        let taking = self.receiver.take_over(Generation(2), around, &mut steps)?;
        self.say(format!("take-over: {taking:?}, {steps:?}"));
        if taking.image != Some((epoch, generation)) {
            return Err(format!("the take-over gave {:?} instead of epoch {epoch}", taking.image));
        }
        let troubled = std::mem::replace(&mut self.troubled, false);
        self.standby_steps(steps, None)?;
        self.troubled = troubled;
        if self.disk.ram != ram || state.is_empty() {
            return Err("the image was not made whole by the take-over".into());
        }
        // An acknowledgement that was under way may still let out what the image covers; the boards know by then that a
        // newer generation owns them.
        let covered = self.vmm.snapshots.get(&epoch.0).map_or(0, |(_, made)| *made);
        self.taken = Some((ram, covered.max(self.vmm.released)));
        Ok(())
    }

    // The checks.

    fn check(&mut self) -> Check {
        let durable = &self.disk.durable;
        if durable.newest() < self.floor {
            return Err(format!("the floor went from {} to {}", self.floor, durable.newest()));
        }
        self.floor = self.floor.max(durable.newest());
        if let Some((ram, covered)) = &self.taken {
            if self.disk.ram != *ram {
                return Err("the image changed after the take-over".into());
            }
            if self.vmm.released > *covered {
                return Err("the old machine let out more than the image that was taken over covers".into());
            }
            return Ok(());
        }
        let found = self.disk.recovered();
        let mut covered = None;
        if let Some((generation, epoch, ram, state)) = found {
            let Some((snapshot, made)) = self.vmm.snapshots.get(&epoch.0) else {
                return Err(format!("the image claims epoch {epoch}, which was never cut"));
            };
            if generation != Generation(1) || *snapshot != ram {
                return Err(format!("the image is not epoch {epoch}: {ram:x?} instead of {snapshot:x?}"));
            }
            if state != device_state(epoch) {
                return Err(format!("the device state is not epoch {epoch}'s"));
            }
            covered = Some(*made);
        }
        if self.vmm.handed_over && (self.veto || self.vmm.gate_open) {
            return Err("the old primary acts after the hand-over".into());
        }
        if !self.veto && self.vmm.released > covered.unwrap_or(0) {
            return Err(format!(
                "output {} has left the machine, the image covers {covered:?}, and no veto stands",
                self.vmm.released
            ));
        }
        Ok(())
    }

    // The schedule.

    fn step(&mut self, take_overs: bool) -> Check {
        match self.random.below(100) {
            0..25 => self.sender_step()?,
            25..55 => self.deliver()?,
            55..75 => {
                if let Some((conn, frame)) = self.to_sender.pop_front() {
                    let message = Message::parse(frame.kind, &frame.payload).map_err(|e| e.to_string())?;
                    let small = message.small().ok_or("the standby sent pages")?;
                    if self.listening == Some(conn) {
                        self.event(Event::Message(frame.generation, frame.epoch, small));
                    }
                } else if self.conn.is_none() && self.random.one_in(3) {
                    self.event(Event::PeerLost("closed".into()));
                }
            }
            75..82 => self.guest(),
            82..86 => self.hook_done(),
            86..90 => self.reported()?,
            90..94 if self.connecting => self.connect(),
            94 if !self.ghosts.is_empty() => {
                let ghost = self.ghosts.remove(0);
                let mut steps = Vec::new();
                self.receiver.lost(ghost, &mut steps);
                self.standby_steps(steps, None)?;
            }
            95 if self.troubled && self.random.one_in(8) => {
                self.say("link breaks".into());
                self.break_link();
            }
            96 if self.troubled && self.random.one_in(10) => self.crash()?,
            97 if self.troubled && self.random.one_in(30) => {
                self.say("VMM session breaks".into());
                self.detach();
                self.event(Event::VmmLost("broken".into()));
            }
            97 if take_overs && self.random.one_in(6) => self.event(Event::HandOver),
            98 if take_overs && self.random.one_in(10) => self.take_over()?,
            _ => {}
        }
        self.check()
    }

    fn run(seed: u64, sabotage: Sabotage, take_overs: bool) -> Result<Tally, String> {
        let mut world = Self::new(seed, sabotage);
        let fail = |world: &World, why: String| format!("seed {seed}: {why}\n{}", world.trace.join("\n"));
        for _ in 0..3000 {
            world.step(take_overs).map_err(|why| fail(&world, why))?;
        }
        world.troubled = false;
        let epochs = world.sender.facts().epochs;
        for round in 0.. {
            world.step(false).map_err(|why| fail(&world, why))?;
            // (Not the very first moment of calm: everything has to work for a while.)
            let calm = match world.taken {
                _ if world.vmm.handed_over => world.sender.finished(),
                Some(_) => world.vmm.quit,
                None => world.sender.protected() && world.sender.facts().epochs > epochs + 5,
            };
            if calm && round > 100 {
                break;
            }
            if round > 30_000 {
                let state = format!("{:?}", world.sender);
                return Err(fail(
                    &world,
                    format!("no calm after the troubles (taken: {}): {state}", world.taken.is_some()),
                ));
            }
        }
        let facts = world.sender.facts();
        Ok(Tally {
            epochs: facts.epochs,
            losses: facts.losses,
            taken: u64::from(world.taken.is_some()),
            handed_over: u64::from(world.vmm.handed_over),
        })
    }
}

#[derive(Default, Debug)]
struct Tally {
    epochs: u64,
    losses: u64,
    taken: u64,
    handed_over: u64,
}

fn seeds() -> u64 {
    std::env::var("UNDERSTUDY_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(400)
}

#[test]
fn whatever_breaks_the_image_is_whole_and_covers_what_has_left_the_machine() {
    let mut sum = Tally::default();
    for seed in 0..seeds() {
        let tally = World::run(seed, Sabotage::None, seed % 2 == 0).unwrap_or_else(|why| panic!("{why}"));
        sum.epochs += tally.epochs;
        sum.losses += tally.losses;
        sum.taken += tally.taken;
        sum.handed_over += tally.handed_over;
    }
    println!("{} seeds: {sum:?}", seeds());
    // The schedule must reach what it is meant to try.
    assert!(
        sum.epochs > seeds() * 10 && sum.losses > seeds() / 2 && sum.taken > seeds() / 40 && sum.handed_over > 3,
        "{sum:?}"
    );
}

fn is_noticed(sabotage: Sabotage) {
    // Some faults show only after a rare chain of events.
    let noticed = (0..seeds() * 10).find_map(|seed| {
        std::panic::catch_unwind(|| World::run(seed, sabotage, true)).unwrap_or_else(|_| Err("panic".into())).err()
    });
    assert!(noticed.is_some(), "{sabotage:?} was not noticed in {} seeds", seeds() * 10);
}

#[test]
fn the_simulation_notices_a_missing_commit_record() {
    is_noticed(Sabotage::SkipCommitRecord);
}

#[test]
fn the_simulation_notices_an_apply_before_the_commit() {
    is_noticed(Sabotage::ApplyBeforeCommit);
}

#[test]
fn the_simulation_notices_an_acknowledgement_before_the_commit() {
    is_noticed(Sabotage::AckBeforeCommit);
}

#[test]
fn the_simulation_notices_a_first_copy_into_an_image_that_still_counts_as_whole() {
    is_noticed(Sabotage::SkipInconsistentRecord);
}

#[test]
fn the_simulation_notices_a_restart_without_repair() {
    is_noticed(Sabotage::ForgetRepair);
}

#[test]
fn the_simulation_notices_a_gate_that_does_not_wait_for_the_veto() {
    is_noticed(Sabotage::VetoNotAwaited);
}

#[test]
fn the_simulation_notices_a_first_copy_that_refers_to_the_one_before() {
    is_noticed(Sabotage::KeepShadow);
}

#[test]
fn the_simulation_notices_a_device_state_that_refers_to_one_from_before_the_first_copy() {
    is_noticed(Sabotage::KeepStateBase);
}

#[test]
fn the_simulation_notices_an_epoch_that_is_encoded_again_instead_of_sent_again() {
    is_noticed(Sabotage::ResendIsNotTheSame);
}

#[test]
fn the_simulation_notices_early_pages_that_a_lost_standby_had_and_nobody_sends_again() {
    is_noticed(Sabotage::ForgetEarly);
}

#[test]
fn the_simulation_notices_changes_against_early_pages_that_a_lost_standby_has_forgotten() {
    is_noticed(Sabotage::KeepShadowOfLost);
}
