//! The output gate of one NIC: packets wait here until the checkpoint that contains what produced them is committed (Remus' network
//! buffer; invariant 1, output commit).
//!
//! ```text
//!   gone ............ limit ................ seal ............. end
//!    │ released: may be │ sealed: their cut is  │ uncovered: no cut
//!    │ written          │ made, not committed   │ has them yet
//! ```
//! The words are those of [`crate::gate`], which does the same for byte streams. It differs in one thing: a packet may be lost, a byte of a stream not.
//! So nothing in here is saved in a checkpoint. What is held when a node dies was never seen by anybody, and is lost as on a wire; whoever needs
//! it sends it again (TCP does). To keep and send it after a takeover would be right as well, and would cost each checkpoint its packets.
//!
//! Called under the device lock, and by the thread that writes; no thread, clock or descriptor in here: time is passed in ([`PacketGate::set_time`]).
//!
//! What must hold:
//! * While the gate is [`Gate::Hold`], a packet is handed out only if a committed cut contains it, or it was released before the gate was closed.
//! * Packets leave once and in their order. What could not be written comes back to the front ([`PacketGate::put_back`]).
//! * What is kept is bounded: at the bound the guest waits, or what is newest is dropped, as configured; both are counted.
//! * After [`PacketGate::discard`] nothing that was there before leaves, not even if it had been handed out and comes back.

use std::collections::VecDeque;
use std::time::Duration;

use understudy_protocol::control::Gate;
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::AtBound;
use understudy_protocol::statistics::Recorder;

use super::packet::Packet;

/// How much a gate keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Bytes of packets with their headers.
    pub bytes: usize,
    /// Packets.
    pub packets: usize,
    /// Whether the guest waits then (the device takes no more out of its rings), or the newest packet is lost, as in a switch whose queue is full.
    pub at: AtBound,
}

impl Default for Bound {
    /// 25 ms of 10 Gbit/s.
    fn default() -> Self {
        Self { bytes: 32 << 20, packets: 65536, at: AtBound::Wait }
    }
}

/// What a gate has done since it is there.
#[derive(Debug, Clone)]
pub struct Stats {
    /// Packets taken from the guest.
    pub pushed: u64,
    /// Packets handed out and not given back.
    pub sent: u64,
    /// Packets lost at the bound.
    pub dropped: u64,
    /// How often the guest had to wait at the bound.
    pub waits: u64,
    /// Packets that must not leave any more: the machine runs elsewhere.
    pub discarded: u64,
    /// Most bytes that were ever kept.
    pub most_bytes: usize,
    /// How long packets waited for a commit, in µs.
    pub held: Recorder,
}

impl Default for Stats {
    fn default() -> Self {
        Self { pushed: 0, sent: 0, dropped: 0, waits: 0, discarded: 0, most_bytes: 0, held: Recorder::times() }
    }
}

#[derive(Debug)]
struct Waiting {
    packet: Packet,
    since: Duration,
}

/// A cut whose commit is awaited.
#[derive(Debug, Clone, Copy)]
struct Seal {
    epoch: Epoch,
    end: u64,
}

/// See the module.
#[derive(Debug)]
pub struct PacketGate {
    bound: Bound,
    gate: Gate,
    /// Packets `gone..end`, numbered since the gate is there.
    queue: VecDeque<Waiting>,
    gone: u64,
    /// Packets before this one are released.
    limit: u64,
    seals: VecDeque<Seal>,
    /// Bytes of all in `queue`, and of those that are not released.
    bytes: usize,
    held: usize,
    /// Bytes of each packet that was handed out last and may come back, and of all of them.
    lent: VecDeque<usize>,
    lent_bytes: usize,
    /// There was no room when it was asked last.
    full: bool,
    now: Duration,
    stats: Stats,
}

impl PacketGate {
    /// Nothing kept, and held.
    pub fn new(bound: Bound) -> Self {
        Self {
            bound,
            gate: Gate::Hold,
            queue: VecDeque::new(),
            gone: 0,
            limit: 0,
            seals: VecDeque::new(),
            bytes: 0,
            held: 0,
            lent: VecDeque::new(),
            lent_bytes: 0,
            full: false,
            now: Duration::ZERO,
            stats: Stats::default(),
        }
    }

    fn end(&self) -> u64 {
        self.gone + self.queue.len() as u64
    }

    fn at_bound(&self) -> bool {
        self.bytes + self.lent_bytes >= self.bound.bytes || self.queue.len() + self.lent.len() >= self.bound.packets
    }

    /// What time it is, on any clock that does not go back; for the statistics only.
    pub fn set_time(&mut self, now: Duration) {
        self.now = now;
    }

    /// Whether the device may take one more packet out of its rings. (Of a gate that drops: always.)
    pub fn room(&self) -> bool {
        self.bound.at == AtBound::Drop || !self.at_bound()
    }

    /// As [`PacketGate::room`], by the device that is about to wait if there is none: counted.
    pub fn ask_room(&mut self) -> bool {
        let full = !self.room();
        self.stats.waits += u64::from(full && !self.full);
        self.full = full;
        !full
    }

    /// Whether a packet need not be given to the gate at all: nothing is held, nothing is before it.
    pub fn passes(&self) -> bool {
        self.gate == Gate::Open && self.queue.is_empty() && self.lent.is_empty()
    }

    /// Whether packets do not wait for a commit.
    pub fn is_open(&self) -> bool {
        self.gate == Gate::Open
    }

    /// A packet went by without being given to the gate ([`PacketGate::passes`]).
    pub fn passed(&mut self, packets: u64) {
        self.stats.pushed += packets;
        self.stats.sent += packets;
    }

    /// The guest sent a packet. False: it is lost.
    pub fn push(&mut self, packet: Packet) -> bool {
        self.stats.pushed += 1;
        if self.bound.at == AtBound::Drop && self.at_bound() {
            self.stats.dropped += 1;
            return false;
        }
        let bytes = packet.bytes();
        self.bytes += bytes;
        self.queue.push_back(Waiting { packet, since: self.now });
        match self.gate {
            Gate::Open => self.limit = self.end(),
            Gate::Hold => self.held += bytes,
        }
        self.stats.most_bytes = self.stats.most_bytes.max(self.bytes);
        true
    }

    /// Packets wait from now on. What was released stays released.
    pub fn hold(&mut self) {
        self.gate = Gate::Hold;
    }

    /// Packets do not wait any more.
    pub fn open(&mut self) {
        self.gate = Gate::Open;
        self.seals.clear();
        self.release(self.end());
    }

    /// A cut was made: its checkpoint contains what sent everything up to here.
    pub fn seal(&mut self, epoch: Epoch) {
        self.seals.push_back(Seal { epoch, end: self.end() });
    }

    /// Forget seals: the session that made them is gone and will commit nothing.
    pub fn unseal(&mut self) {
        self.seals.clear();
    }

    /// The checkpoint of `epoch` is committed: release what it covers. An epoch that was not sealed releases only what older seals cover.
    pub fn commit(&mut self, epoch: Epoch) {
        while let Some(seal) = self.seals.front().copied().filter(|seal| seal.epoch <= epoch) {
            self.seals.pop_front();
            self.release(seal.end);
        }
    }

    fn release(&mut self, end: u64) {
        // Both are within the queue: the limit never falls behind what is gone, a seal never before it (nothing leaves that is not released).
        let from = (self.limit - self.gone) as usize;
        let to = end.saturating_sub(self.gone) as usize;
        for waiting in self.queue.range(from..to.max(from)) {
            self.held -= waiting.packet.bytes();
            self.stats.held.time(self.now.saturating_sub(waiting.since));
        }
        self.limit = self.limit.max(end);
    }

    /// Whether packets wait that no cut covers yet.
    pub fn uncovered(&self) -> bool {
        self.end() > self.seals.back().map_or(self.limit, |seal| seal.end.max(self.limit))
    }

    /// Released packets in their order: one, and more of them up to `max_bytes` in all. Whoever takes them has written (or given back) those before.
    pub fn take(&mut self, max_bytes: usize) -> Vec<Packet> {
        self.written();
        let mut taken = Vec::new();
        let mut bytes = 0;
        while self.gone < self.limit {
            let Some(next) = self.queue.front().map(|waiting| waiting.packet.bytes()) else { break };
            if !taken.is_empty() && bytes + next > max_bytes {
                break;
            }
            let Some(waiting) = self.queue.pop_front() else { break };
            bytes += next;
            self.gone += 1;
            self.bytes -= next;
            self.lent.push_back(next);
            self.lent_bytes += next;
            taken.push(waiting.packet);
        }
        self.stats.sent += taken.len() as u64;
        taken
    }

    /// The last of those that were taken: they could not be written yet. They are the next again.
    pub fn put_back(&mut self, packets: Vec<Packet>) {
        for packet in packets.into_iter().rev() {
            // Nothing is lent after a discard: what comes back then is of another life.
            let Some(bytes) = self.lent.pop_back() else { break };
            self.stats.sent -= 1;
            self.gone -= 1;
            self.bytes += bytes;
            self.queue.push_front(Waiting { packet, since: self.now });
        }
        self.written();
    }

    /// All that were taken are written.
    pub fn written(&mut self) {
        self.lent.clear();
        self.lent_bytes = 0;
    }

    /// The machine runs elsewhere, or does not know any more that it runs here: nothing of this leaves, ever. Returns how many are lost.
    pub fn discard(&mut self) -> u64 {
        self.gate = Gate::Hold;
        let lost = self.queue.len() as u64;
        self.gone = self.end();
        self.limit = self.gone;
        self.queue.clear();
        self.seals.clear();
        self.written();
        self.bytes = 0;
        self.held = 0;
        self.stats.discarded += lost;
        lost
    }

    /// Bytes that wait for a commit.
    pub fn held_bytes(&self) -> usize {
        self.held
    }

    /// Packets that wait for a commit.
    pub fn held_packets(&self) -> usize {
        (self.end() - self.limit) as usize
    }

    /// Packets that are released and not taken.
    pub fn released_waiting(&self) -> usize {
        (self.limit - self.gone) as usize
    }

    /// What it has done.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

#[cfg(test)]
mod tests;
