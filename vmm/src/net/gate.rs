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

use serde::{Deserialize, Serialize};
use understudy_protocol::control::Gate;
use understudy_protocol::ids::Epoch;

use super::packet::Packet;

/// What happens at the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtBound {
    /// The device takes no more packets out of its rings: the guest waits, nothing is lost.
    #[default]
    Wait,
    /// The packet is lost, as in a switch whose queue is full.
    Drop,
}

/// How much a gate keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Bytes of packets with their headers.
    pub bytes: usize,
    /// Packets.
    pub packets: usize,
    /// What happens then.
    pub at: AtBound,
}

impl Default for Bound {
    /// 25 ms of 10 Gbit/s.
    fn default() -> Self {
        Self { bytes: 32 << 20, packets: 65536, at: AtBound::Wait }
    }
}

/// Held times are counted in classes: class n holds those below 2ⁿ µs.
const CLASSES: usize = 24;

/// What a gate has done since it is there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
    /// Packets that waited for a commit, by how long.
    held: [u64; CLASSES],
    /// The longest of those waits.
    pub longest: Duration,
}

impl Stats {
    fn waited(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let class = (u64::BITS - us.leading_zeros()) as usize;
        self.held[class.min(CLASSES - 1)] += 1;
        self.longest = self.longest.max(time);
    }

    /// Packets that waited for a commit.
    pub fn waited_packets(&self) -> u64 {
        self.held.iter().sum()
    }

    /// A time that so many percent of the packets did not wait longer than, to the next power of two. `None`: none has waited.
    pub fn held_percentile(&self, percent: u64) -> Option<Duration> {
        let wanted = (self.waited_packets() * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let class = self.held.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(Duration::from_micros(1 << class).min(self.longest))
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
    /// Packets handed out last, which may come back, and their bytes.
    lent: VecDeque<usize>,
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
            full: false,
            now: Duration::ZERO,
            stats: Stats::default(),
        }
    }

    fn end(&self) -> u64 {
        self.gone + self.queue.len() as u64
    }

    fn at_bound(&self) -> bool {
        let lent: usize = self.lent.iter().sum();
        self.bytes + lent >= self.bound.bytes || self.queue.len() + self.lent.len() >= self.bound.packets
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
            self.stats.waited(self.now.saturating_sub(waiting.since));
        }
        self.limit = self.limit.max(end);
    }

    /// Whether packets wait that no cut covers yet.
    pub fn uncovered(&self) -> bool {
        self.end() > self.seals.back().map_or(self.limit, |seal| seal.end.max(self.limit))
    }

    /// Released packets in their order: one, and more of them up to `max_bytes` in all. Whoever takes them has written (or given back) those before.
    pub fn take(&mut self, max_bytes: usize) -> Vec<Packet> {
        self.lent.clear();
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
        self.lent.clear();
    }

    /// All that were taken are written.
    pub fn written(&mut self) {
        self.lent.clear();
    }

    /// The machine runs elsewhere, or does not know any more that it runs here: nothing of this leaves, ever. Returns how many are lost.
    pub fn discard(&mut self) -> u64 {
        self.gate = Gate::Hold;
        let lost = self.queue.len() as u64;
        self.gone = self.end();
        self.limit = self.gone;
        self.queue.clear();
        self.seals.clear();
        self.lent.clear();
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SMALL: Bound = Bound { bytes: 400, packets: 8, at: AtBound::Wait };

    fn packet(n: u64, len: usize) -> Packet {
        let mut frame = n.to_le_bytes().to_vec();
        frame.resize(len.max(8), 0);
        Packet { frame, ..Packet::default() }
    }
    fn number(packet: &Packet) -> u64 {
        u64::from_le_bytes(packet.frame[..8].try_into().unwrap())
    }
    fn numbers(packets: &[Packet]) -> Vec<u64> {
        packets.iter().map(number).collect()
    }

    #[test]
    fn nothing_leaves_before_its_commit_and_then_in_its_order() {
        let mut g = PacketGate::new(SMALL);
        g.push(packet(0, 8));
        g.push(packet(1, 8));
        assert!(g.uncovered());
        g.seal(Epoch(1));
        assert!(!g.uncovered());
        g.push(packet(2, 8));
        assert!(g.uncovered() && g.take(9999).is_empty());
        g.commit(Epoch(1));
        assert_eq!((g.released_waiting(), g.held_packets(), g.held_bytes()), (2, 1, 20));
        assert_eq!(numbers(&g.take(9999)), [0, 1]);
        g.seal(Epoch(2));
        g.commit(Epoch(2));
        assert_eq!(numbers(&g.take(9999)), [2]);
    }

    #[test]
    fn a_session_that_is_gone_commits_nothing() {
        let mut g = PacketGate::new(SMALL);
        g.push(packet(0, 8));
        g.seal(Epoch(1));
        g.unseal();
        g.commit(Epoch(1));
        assert!(g.take(9999).is_empty());
        assert!(g.uncovered(), "the next session has to cut for it");
    }

    #[test]
    fn an_open_gate_is_passed_by_unless_something_waits_before() {
        let mut g = PacketGate::new(SMALL);
        assert!(!g.passes());
        g.push(packet(0, 8));
        g.open();
        assert!(!g.passes(), "number 0 is before");
        g.push(packet(1, 8));
        assert_eq!(numbers(&g.take(1)), [0], "one at least, whatever the size of a burst");
        assert_eq!(numbers(&g.take(1)), [1]);
        assert!(!g.passes(), "number 1 may come back");
        g.written();
        assert!(g.passes());
    }

    #[test]
    fn what_the_tap_does_not_take_is_the_next_again() {
        let mut g = PacketGate::new(SMALL);
        g.open();
        (0..4).for_each(|n| assert!(g.push(packet(n, 8))));
        let mut burst = g.take(60);
        assert_eq!(numbers(&burst), [0, 1, 2]);
        g.put_back(burst.split_off(1));
        assert_eq!(g.stats().sent, 1);
        assert_eq!(numbers(&g.take(9999)), [1, 2, 3]);
    }

    #[test]
    fn at_the_bound_the_guest_waits_and_that_is_counted_once_each_time() {
        let mut g = PacketGate::new(Bound { packets: 2, ..SMALL });
        (0..2).for_each(|n| assert!(g.push(packet(n, 8))));
        assert!(!g.ask_room() && !g.ask_room());
        assert_eq!((g.stats().waits, g.stats().dropped), (1, 0));
        g.open();
        assert!(!g.room(), "released, and not yet written");
        g.take(9999);
        assert!(!g.room(), "taken, and not yet written: it may come back");
        g.written();
        assert!(g.ask_room());
    }

    #[test]
    fn or_the_newest_packet_is_dropped() {
        let mut g = PacketGate::new(Bound { at: AtBound::Drop, ..SMALL });
        let taken = (0..20).filter(|n| g.push(packet(*n, 80))).count();
        assert!(g.room());
        assert_eq!((taken, g.stats().dropped), (5, 15));
        g.open();
        assert_eq!(numbers(&g.take(9999)), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn after_the_machine_has_gone_not_even_a_packet_leaves_that_was_handed_out_before() {
        let mut g = PacketGate::new(SMALL);
        g.open();
        g.push(packet(0, 8));
        g.push(packet(1, 8));
        let burst = g.take(1);
        assert_eq!(g.discard(), 1);
        g.put_back(burst);
        g.open();
        assert!(g.take(9999).is_empty());
        assert_eq!(g.stats().discarded, 1);
    }

    #[test]
    fn how_long_packets_were_held_is_known() {
        let mut g = PacketGate::new(SMALL);
        assert_eq!(g.stats().held_percentile(50), None);
        g.set_time(Duration::from_millis(1));
        g.push(packet(0, 8));
        g.seal(Epoch(1));
        g.set_time(Duration::from_millis(4));
        g.push(packet(1, 8));
        g.commit(Epoch(1));
        assert_eq!(g.stats().waited_packets(), 1);
        assert_eq!(g.stats().longest, Duration::from_millis(3));
        assert_eq!(g.stats().held_percentile(99), Some(Duration::from_millis(3)));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize),
        Seal,
        Commit(usize),
        Write { bytes: usize, refused: usize },
        Gate(bool),
        SessionEnds,
        Failover,
        Fenced,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (1usize..120).prop_map(Step::Push),
            3 => Just(Step::Seal),
            3 => (0usize..4).prop_map(Step::Commit),
            4 => ((1usize..300), (0usize..3)).prop_map(|(bytes, refused)| Step::Write { bytes, refused }),
            1 => any::<bool>().prop_map(Step::Gate),
            1 => Just(Step::SessionEnds),
            1 => Just(Step::Failover),
            1 => Just(Step::Fenced),
        ];
        proptest::collection::vec(step, 1..300)
    }

    proptest! {
        /// Whatever the order of packets, cuts, commits, bursts that the tap takes in part, gates that open and close, sessions that end,
        /// takeovers and fencing: packets leave once, in order, and none that the newest committed image has not sent (unless the
        /// gate was open). Of what was not lost with a machine or at the bound none is missing. The guest's own count goes back
        /// with its image; so a number may be seen again only if it was never seen.
        #[test]
        fn packets_leave_once_in_order_and_none_uncommitted(steps in steps(), drops in any::<bool>()) {
            let bound = Bound { at: if drops { AtBound::Drop } else { AtBound::Wait }, ..SMALL };
            let mut g = PacketGate::new(bound);
            let mut epoch = 0u64;
            let mut next = 0u64;                           // the guest's state: number of its next packet
            let mut images: Vec<(Epoch, u64)> = vec![];    // cuts not yet committed: state in each
            let mut allowed = 0u64;                        // state of the newest committed image, or of the present if open
            let mut open = false;
            let mut expected: VecDeque<u64> = VecDeque::new();  // what the gate has taken and not written, in order
            let mut seen: Option<u64> = None;
            for step in steps {
                match step {
                    Step::Push(len) => if g.ask_room() {
                        let taken = g.push(packet(next, len));
                        prop_assert!(taken || drops);
                        if taken { expected.push_back(next); }
                        next += 1;
                    },
                    Step::Seal => { epoch += 1; g.seal(Epoch(epoch)); images.push((Epoch(epoch), next)); }
                    Step::Commit(n) => if n > 0 && n <= images.len() {
                        let (committed, state) = images[n - 1];
                        images.drain(..n);
                        g.commit(committed);
                        allowed = allowed.max(state);
                    },
                    Step::Write { bytes, refused } => {
                        let mut burst = g.take(bytes);
                        prop_assert!(burst.len() <= 1 || burst.iter().map(Packet::bytes).sum::<usize>() <= bytes);
                        let back = burst.split_off(burst.len().saturating_sub(refused));
                        for p in &burst {
                            let n = number(p);
                            prop_assert_eq!(Some(n), expected.pop_front());
                            prop_assert!(n < allowed, "packet {} left, {} allowed", n, allowed);
                            prop_assert!(seen.is_none_or(|seen| n > seen), "packet {} after {:?}", n, seen);
                            seen = Some(n);
                        }
                        g.put_back(back);
                    }
                    Step::Gate(to) => {
                        open = to;
                        if to { g.open(); images.clear() } else { g.hold() }
                    }
                    Step::SessionEnds => { g.unseal(); images.clear(); }
                    Step::Failover => if !open {
                        // Another VMM begins from the image. (With an open gate there is none that may: it is outdated.)
                        g = PacketGate::new(bound);
                        next = allowed;
                        images.clear();
                        expected.clear();
                    },
                    Step::Fenced => { g.discard(); open = false; images.clear(); expected.clear(); }
                }
                if open { allowed = next; }
                let kept: usize = expected.len();
                prop_assert_eq!(kept, g.held_packets() + g.released_waiting());
                prop_assert!(kept <= bound.packets && g.stats().most_bytes < bound.bytes + 120 + 12);
                prop_assert_eq!(g.held_bytes() == 0, g.held_packets() == 0);
            }
        }
    }
}
