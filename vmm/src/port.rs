//! The host's side of a character device, under the device lock: its stream with the gate, input on its way to the guest, and whom
//! to tell.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;

use crate::gate::Stream;
use crate::pump::PumpMsg;

/// Input bytes that a port keeps for its guest; more than a board sends without an acknowledgement.
pub const INPUT_CAPACITY: usize = 4 << 20;

/// The host's side of a character device: stream with its gate, input that waits for the guest, the pump to tell.
pub struct Port {
    /// `com1` …, `hvc0`.
    pub name: String,
    /// Its output and positions.
    pub stream: Stream,
    /// Input that the guest's device has not taken: pieces with the offset of their first byte.
    input: VecDeque<(u64, VecDeque<u8>)>,
    input_bytes: usize,
    /// Where the next input piece is expected.
    input_end: u64,
    /// Told when there is something to send.
    pub pump: Option<Sender<PumpMsg>>,
    told: (u64, u64),
}

impl Port {
    /// A port called `name` whose guest has neither sent nor taken anything.
    pub fn new(name: String) -> Self {
        Self {
            name,
            stream: Stream::new(),
            input: VecDeque::new(),
            input_bytes: 0,
            input_end: 0,
            pump: None,
            told: (0, 0),
        }
    }

    /// Input arrived. What is known already is skipped; a gap is a loss that the board has reported, and is counted over.
    /// False when the port keeps too much already (the other end does not keep to its window).
    pub fn queue_input(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let end = offset.saturating_add(bytes.len() as u64);
        if end <= self.input_end {
            return true;
        }
        if self.input_bytes + bytes.len() > INPUT_CAPACITY {
            return false;
        }
        let known = usize::try_from(self.input_end.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fresh = bytes.get(known..).unwrap_or_default();
        self.input_bytes += fresh.len();
        self.input.push_back((offset.max(self.input_end), fresh.iter().copied().collect()));
        self.input_end = end;
        true
    }

    /// Bytes that wait for the guest.
    pub fn input_waiting(&self) -> usize {
        self.input_bytes
    }

    /// Hand waiting input to the guest's device: `take` takes the first so many of the bytes that it is shown.
    pub fn feed(&mut self, mut take: impl FnMut(&[u8]) -> usize) {
        while let Some((offset, piece)) = self.input.front_mut() {
            let taken = take(piece.as_slices().0);
            if taken == 0 {
                break;
            }
            piece.drain(..taken);
            *offset += taken as u64;
            self.input_bytes -= taken;
            self.stream.delivered(*offset);
            if piece.is_empty() {
                self.input.pop_front();
            }
        }
    }

    /// The streams' positions have been set (start, restore): input continues there.
    pub fn begin(&mut self) {
        self.input.clear();
        self.input_bytes = 0;
        self.input_end = self.stream.rx_delivered();
        self.told = (0, 0);
    }

    /// Wake the pump if there is something new for it.
    pub fn tell_pump(&mut self) {
        let news = (self.stream.limit(), self.stream.rx_covered());
        if news != self.told
            && let Some(pump) = &self.pump
        {
            self.told = news;
            let _ = pump.send(PumpMsg::Work);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fed(port: &mut Port, room: usize) -> Vec<u8> {
        let mut got = Vec::new();
        port.feed(|bytes| {
            let n = bytes.len().min(room - got.len());
            got.extend_from_slice(&bytes[..n]);
            n
        });
        got
    }

    #[test]
    fn input_that_is_known_is_skipped_and_the_rest_arrives_in_order() {
        let mut p = Port::new("com1".into());
        assert!(p.queue_input(0, b"abc"));
        assert!(p.queue_input(0, b"ab"));
        assert!(p.queue_input(1, b"bcde"));
        assert_eq!(fed(&mut p, 2), b"ab");
        assert_eq!((p.stream.rx_delivered(), p.input_waiting()), (2, 3));
        assert_eq!(fed(&mut p, 100), b"cde");
        assert_eq!((p.stream.rx_delivered(), p.input_waiting()), (5, 0));
    }

    #[test]
    fn what_the_board_has_lost_is_counted_over() {
        let mut p = Port::new("com1".into());
        p.queue_input(0, b"ab");
        p.queue_input(10, b"xy");
        assert_eq!(fed(&mut p, 3), b"abx");
        assert_eq!(p.stream.rx_delivered(), 11);
    }

    #[test]
    fn a_board_that_does_not_keep_to_its_window_is_refused() {
        let mut p = Port::new("com1".into());
        assert!(p.queue_input(0, &vec![0; INPUT_CAPACITY]));
        assert!(!p.queue_input(INPUT_CAPACITY as u64, b"x"));
    }
}
