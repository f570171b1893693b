//! Packets that have arrived and that the guest has not taken: a queue for each pair of the card's queues.
//!
//! Each has its own bound, and stops only the thread that fills it: a pair whose driver takes nothing keeps no other waiting.

use std::collections::VecDeque;

/// Bytes that may wait in one pair's queue.
const BYTES: usize = 1 << 20;
/// Packets that may.
const PACKETS: usize = 512;

/// See the module.
#[derive(Debug, Default)]
pub struct Arrived {
    pairs: Vec<Pair>,
}

#[derive(Debug, Default)]
struct Pair {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Its thread waits until there is room.
    stopped: bool,
}

impl Arrived {
    fn pair(&mut self, pair: u16) -> &mut Pair {
        let pair = usize::from(pair);
        if self.pairs.len() <= pair {
            self.pairs.resize_with(pair + 1, Pair::default);
        }
        &mut self.pairs[pair]
    }

    /// A packet arrived by this pair.
    pub fn push(&mut self, pair: u16, packet: Vec<u8>) {
        let pair = self.pair(pair);
        pair.bytes += packet.len();
        pair.packets.push_back(packet);
    }

    /// Whether more may be taken for this pair. False: its thread waits until [`Arrived::drained`].
    pub fn has_room(&mut self, pair: u16) -> bool {
        let pair = self.pair(pair);
        pair.stopped = pair.bytes >= BYTES || pair.packets.len() >= PACKETS;
        !pair.stopped
    }

    /// Pairs by which something has ever come.
    pub fn pairs(&self) -> u16 {
        self.pairs.len() as u16
    }

    /// The next of a pair's, which stays here until [`Arrived::pop`].
    pub fn front(&mut self, pair: u16) -> Option<&mut Vec<u8>> {
        self.pair(pair).packets.front_mut()
    }

    /// The next of a pair's goes.
    pub fn pop(&mut self, pair: u16) -> Option<Vec<u8>> {
        let pair = self.pair(pair);
        let packet = pair.packets.pop_front()?;
        pair.bytes -= packet.len();
        Some(packet)
    }

    /// Whether this pair's thread has waited and can go on. True once.
    pub fn drained(&mut self, pair: u16) -> bool {
        let pair = self.pair(pair);
        pair.packets.is_empty() && std::mem::take(&mut pair.stopped)
    }

    /// Nothing waits any more.
    pub fn clear(&mut self) {
        self.pairs.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_that_is_full_stops_only_itself() {
        let mut arrived = Arrived::default();
        (0..PACKETS).for_each(|_| arrived.push(1, vec![0; 60]));
        assert!(!arrived.has_room(1) && arrived.has_room(0) && arrived.has_room(2));
        arrived.push(0, vec![7; 60]);
        assert_eq!(arrived.front(0).map(|packet| packet[0]), Some(7));
        while arrived.pop(1).is_some() {}
        assert!(arrived.drained(1) && !arrived.drained(1) && !arrived.drained(0));
        assert!(arrived.has_room(1));
    }

    #[test]
    fn a_few_large_packets_are_as_many_as_may_wait() {
        let mut arrived = Arrived::default();
        let fit = (0..).take_while(|_| {
            arrived.push(0, vec![0; 65_000]);
            arrived.has_room(0)
        });
        assert_eq!(fit.count(), BYTES / 65_000);
    }
}
