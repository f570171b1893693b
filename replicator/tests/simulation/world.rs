//! The world: a guest, the two state machines, the wire between them, and the cluster that may take over.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::state::StateEncoder;
use understudy_replicator::codec::{BatchWriter, EpochDigest, PAGE};
use understudy_replicator::durable::{Durable, RamIdentity};
use understudy_replicator::message::Message;
use understudy_replicator::receiver::{Conn, Receiver, Standing};
use understudy_replicator::sender::{Action, Event, Sender, SenderConfig, SlowLink, SlowPolicy, VetoCall};

use super::content::PAGES;
use super::disk::{Disk, Volatile};
use super::mirror::{BLOCKS, Mirror};
use super::sabotage::Sabotage;

/// The standby's RAM file, which is never replaced.
pub const IDENTITY: RamIdentity = RamIdentity { dev: 1, ino: 1, bytes: PAGES * PAGE as u64 };

pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone)]
pub struct Frame {
    pub generation: Generation,
    pub epoch: Epoch,
    pub kind: u8,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn new(generation: Generation, epoch: Epoch, message: &Message<'_>) -> Self {
        Self { generation, epoch, kind: message.kind(), payload: message.payload().into_owned() }
    }
}

#[derive(Default)]
pub struct Vmm {
    pub ram: Vec<u64>,
    pub log: Option<BTreeSet<u64>>,
    pub gate_open: bool,
    pub stopped: bool,
    pub rest: Vec<u64>,
    pub cut: Epoch,
    pub committed: Epoch,
    /// Share of the time that the guest runs; 0 = as nobody has said anything.
    pub share: u8,
    /// Copied early since the last cut.
    pub early: BTreeSet<u64>,
    pub arena: Vec<(u64, u64)>,
    pub last: bool,
    /// Numbered outputs: made, and let out.
    pub made: u64,
    pub released: u64,
    pub snapshots: BTreeMap<u64, (Vec<u64>, u64)>,
    pub quit: bool,
    pub handed_over: bool,
    /// Whether it has disks, and for which epochs they are durable.
    pub disks: bool,
    pub sealed: BTreeSet<u64>,
    /// One of them is mirrored.
    pub mirror: Option<Mirror>,
}

pub struct World {
    pub random: Random,
    pub sabotage: Sabotage,
    pub troubled: bool,
    pub now: Instant,

    pub vmm: Vmm,
    pub sender: Sender,
    pub batch: BatchWriter,
    pub state: StateEncoder,
    pub digest: EpochDigest,
    pub kept: Vec<Frame>,
    pub cursor: u64,
    pub bitmap: BTreeSet<u64>,
    pub hooks: VecDeque<VetoCall>,
    /// The VMM waits for its storage until then, with this.
    pub storage: Option<(Instant, Action)>,
    pub sessions: u64,
    /// The copy was brought into step once: the VMM knows what it lacks.
    pub copy_known: bool,
    /// Answers that the peer owes.
    pub flushes: u32,

    pub receiver: Receiver,
    pub disk: Disk,
    pub volatile: Volatile,
    pub reports: VecDeque<Standing>,
    pub conn: Option<Conn>,
    pub conns: Conn,
    /// The connection that the sender listens to: what a dead standby had said may still arrive.
    pub listening: Option<Conn>,
    /// The standby has not yet noticed that these are gone.
    pub ghosts: Vec<Conn>,
    pub to_receiver: VecDeque<(Conn, Frame)>,
    pub to_sender: VecDeque<(Conn, Frame)>,
    pub connecting: bool,

    pub veto: bool,
    pub score: Standing,
    pub taken: Option<(Vec<u64>, u64)>,
    pub floor: Generation,
    pub trace: Vec<String>,
}

pub type Check = Result<(), String>;

impl World {
    pub fn new(seed: u64, sabotage: Sabotage) -> Self {
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
            vmm: Vmm {
                ram: vec![0; PAGES as usize],
                disks: seed % 4 < 3,
                mirror: matches!(seed % 4, 1 | 2).then(Mirror::default),
                ..Vmm::default()
            },
            sender: Sender::new(config, now),
            batch: BatchWriter::default(),
            state: StateEncoder::default(),
            digest: EpochDigest::default(),
            kept: Vec::new(),
            cursor: 0,
            bitmap: BTreeSet::new(),
            hooks: VecDeque::new(),
            storage: None,
            sessions: 0,
            copy_known: false,
            flushes: 0,
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

    pub fn say(&mut self, what: String) {
        self.trace.push(what);
        if self.trace.len() > 60 {
            self.trace.remove(0);
        }
    }

    // The guest.

    pub fn guest(&mut self) {
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
        for _ in 0..self.random.below(3) {
            let (block, content) = (self.random.below(BLOCKS), self.random.below(4));
            if let Some(mirror) = &mut self.vmm.mirror {
                mirror.write(block, content);
            }
        }
        self.vmm.made += 1;
        self.release();
        if self.random.one_in(2) {
            self.event(Event::OutputWaits);
        }
    }

    pub fn release(&mut self) {
        if self.vmm.gate_open && !self.vmm.quit {
            self.vmm.released = self.vmm.made;
        }
    }

    // The wire and the cluster.

    pub fn connect(&mut self) {
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

    pub fn break_link(&mut self) {
        let Some(conn) = self.conn.take() else { return };
        // What was under way may still arrive, up to some point.
        let arrive = self.random.below(self.to_receiver.len() as u64 + 1) as usize;
        self.to_receiver.truncate(arrive);
        let arrive = self.random.below(self.to_sender.len() as u64 + 1) as usize;
        self.to_sender.truncate(arrive);
        self.ghosts.push(conn);
    }

    pub fn hook_done(&mut self) {
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
}
