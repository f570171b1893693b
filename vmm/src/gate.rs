//! The output gate of one byte stream: what a port's guest has sent, how much of it may leave, how much has arrived.
//!
//! ```text
//!   0 ........ acked ............ limit ............... end
//!     gone,      │ may be sent      │ written by the guest,
//!     arrived    │ (and re-sent)    │ waits for its checkpoint
//!                └── kept in the checkpointed state ────┘
//! ```
//! Called by the machine under its device lock; no thread, clock or descriptor in here.
//!
//! What must hold (invariant 1): while the gate is [`Gate::Hold`], no byte at or above the end that was sealed by a
//! *committed* cut is ever handed out, unless it had been handed out before the gate was closed. Commits come in the order
//! of their cuts; a commit covers every older cut.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use understudy_protocol::control::Gate;
use understudy_protocol::ids::Epoch;

/// Most bytes that a stream keeps (written, not yet acknowledged by the other end). Beyond it the guest has to wait.
pub const CAPACITY: usize = 64 * 1024;

/// Saved state.
pub mod state {
    use super::{Deserialize, Serialize};

    /// What a checkpoint holds of a stream. All of it counts as released after a restore: the checkpoint that holds it is
    /// committed, else nobody would restore it.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Offset of the first byte in `unacked`; everything before has arrived at the other end.
        pub acked: u64,
        /// Bytes written by the guest and not known to have arrived.
        pub unacked: Vec<u8>,
        /// Input bytes that the guest's device has taken.
        pub rx_delivered: u64,
    }
}

/// A cut whose commit is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seal {
    epoch: Epoch,
    tx_end: u64,
    rx_delivered: u64,
}

/// One stream with both directions' positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    gate: Gate,
    acked: u64,
    limit: u64,
    bytes: VecDeque<u8>,
    seals: VecDeque<Seal>,
    rx_delivered: u64,
    rx_covered: u64,
}

/// The other end claims something that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It has more than was ever released.
    #[error(
        "the other end has taken output up to byte {applied}, this machine has released only up to {limit}: it belongs to another history of the machine"
    )]
    Ahead {
        /// Its position.
        applied: u64,
        /// Ours.
        limit: u64,
    },
    /// It has forgotten bytes that it had acknowledged.
    #[error(
        "the other end stands at output byte {applied}, but had acknowledged up to {acked}: what lies between is lost"
    )]
    Behind {
        /// Its position.
        applied: u64,
        /// What it had acknowledged.
        acked: u64,
    },
    /// A saved state with more bytes than a stream can keep or with offsets that overflow.
    #[error("the saved stream is impossible: {0}")]
    Impossible(&'static str),
}

impl Default for Stream {
    fn default() -> Self {
        Self::new()
    }
}

impl Stream {
    /// An empty stream at offset 0 with the gate held.
    pub fn new() -> Self {
        Self {
            gate: Gate::Hold,
            acked: 0,
            limit: 0,
            bytes: VecDeque::new(),
            seals: VecDeque::new(),
            rx_delivered: 0,
            rx_covered: 0,
        }
    }

    /// Continue a saved stream: gate held, but everything that the checkpoint contains is released.
    pub fn restore(saved: state::V1) -> Result<Self, StreamError> {
        let state::V1 { acked, unacked, rx_delivered } = saved;
        if unacked.len() > 2 * CAPACITY {
            return Err(StreamError::Impossible("it keeps more bytes than fit"));
        }
        let end = acked.checked_add(unacked.len() as u64).ok_or(StreamError::Impossible("its end overflows"))?;
        Ok(Self {
            gate: Gate::Hold,
            acked,
            limit: end,
            bytes: unacked.into(),
            seals: VecDeque::new(),
            rx_delivered,
            rx_covered: rx_delivered,
        })
    }

    /// What a checkpoint keeps.
    pub fn save(&self) -> state::V1 {
        // `gate`, `limit` and `seals` belong to the session that takes the checkpoint; `rx_covered` follows from it.
        let Self { gate: _, acked, limit: _, bytes, seals: _, rx_delivered, rx_covered: _ } = self;
        state::V1 { acked: *acked, unacked: bytes.iter().copied().collect(), rx_delivered: *rx_delivered }
    }

    /// Offset behind the last byte that the guest wrote.
    pub fn end(&self) -> u64 {
        self.acked + self.bytes.len() as u64
    }
    /// Offset up to which the other end has the bytes.
    pub fn acked(&self) -> u64 {
        self.acked
    }
    /// Offset up to which bytes may leave.
    pub fn limit(&self) -> u64 {
        self.limit
    }
    /// Bytes that wait for a commit.
    pub fn held(&self) -> u64 {
        self.end() - self.limit
    }
    /// Whether bytes wait that no cut covers yet.
    pub fn uncovered(&self) -> bool {
        self.end() > self.seals.back().map_or(self.limit, |seal| seal.tx_end.max(self.limit))
    }
    /// How many more bytes the guest may write now.
    pub fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.bytes.len())
    }
    /// Input bytes that the guest's device has taken.
    pub fn rx_delivered(&self) -> u64 {
        self.rx_delivered
    }
    /// Input bytes that need not be kept by the sender: a committed checkpoint covers them (or outputs do not wait at all).
    pub fn rx_covered(&self) -> u64 {
        self.rx_covered
    }

    /// The guest wrote bytes. More than [`Stream::room`] are taken too (the device may have had some in flight when it was
    /// told); the room is then zero.
    pub fn write(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        if self.gate == Gate::Open {
            self.limit = self.end();
        }
    }

    /// The guest's device has taken all input before `upto`.
    pub fn delivered(&mut self, upto: u64) {
        self.rx_delivered = self.rx_delivered.max(upto);
        if self.gate == Gate::Open {
            self.rx_covered = self.rx_delivered;
        }
    }

    /// Outputs wait from now on. What was released stays released.
    pub fn hold(&mut self) {
        self.gate = Gate::Hold;
    }

    /// Outputs do not wait any more.
    pub fn open(&mut self) {
        self.gate = Gate::Open;
        self.seals.clear();
        self.limit = self.end();
        self.rx_covered = self.rx_delivered;
    }

    /// A cut was made: its checkpoint contains everything up to here.
    pub fn seal(&mut self, epoch: Epoch) {
        self.seals.push_back(Seal { epoch, tx_end: self.end(), rx_delivered: self.rx_delivered });
    }

    /// Forget seals: the session that made them is gone and will commit nothing.
    pub fn unseal(&mut self) {
        self.seals.clear();
    }

    /// The checkpoint of `epoch` is committed: release what it covers. An epoch that was not sealed releases only what older
    /// seals cover.
    pub fn commit(&mut self, epoch: Epoch) {
        while let Some(seal) = self.seals.front().copied() {
            if seal.epoch > epoch {
                break;
            }
            self.seals.pop_front();
            self.limit = self.limit.max(seal.tx_end);
            self.rx_covered = self.rx_covered.max(seal.rx_delivered);
        }
    }

    /// The other end (re)connected and says up to where it has the output.
    pub fn join(&mut self, applied: u64) -> Result<(), StreamError> {
        if applied < self.acked {
            return Err(StreamError::Behind { applied, acked: self.acked });
        }
        self.acknowledge(applied)
    }

    /// The other end has everything up to `upto`.
    pub fn acknowledge(&mut self, upto: u64) -> Result<(), StreamError> {
        if upto > self.limit {
            return Err(StreamError::Ahead { applied: upto, limit: self.limit });
        }
        if upto > self.acked {
            // At most `bytes.len()`, because upto <= limit <= end.
            self.bytes.drain(..(upto - self.acked) as usize);
            self.acked = upto;
        }
        Ok(())
    }

    /// Released bytes from `from` on, at most `max` of them. Empty when there are none.
    pub fn released(&self, from: u64, max: usize) -> Vec<u8> {
        let from = from.max(self.acked);
        if from >= self.limit {
            return Vec::new();
        }
        // Both differences are at most `bytes.len()`.
        let start = (from - self.acked) as usize;
        let count = ((self.limit - from) as usize).min(max);
        self.bytes.iter().skip(start).take(count).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_leaves_before_its_commit() {
        let mut s = Stream::new();
        s.write(b"abc");
        assert!(s.released(0, 100).is_empty());
        s.seal(Epoch(1));
        s.write(b"def");
        assert!(s.released(0, 100).is_empty());
        s.commit(Epoch(1));
        assert_eq!(s.released(0, 100), b"abc");
        s.seal(Epoch(2));
        s.commit(Epoch(2));
        assert_eq!(s.released(3, 100), b"def");
    }

    #[test]
    fn an_open_gate_lets_everything_out_and_closing_it_takes_nothing_back() {
        let mut s = Stream::new();
        s.write(b"abc");
        s.open();
        s.write(b"d");
        assert_eq!(s.released(0, 100), b"abcd");
        s.hold();
        s.write(b"e");
        assert_eq!(s.released(0, 100), b"abcd");
        assert_eq!(s.held(), 1);
    }

    #[test]
    fn input_is_covered_when_the_checkpoint_that_saw_it_is_committed() {
        let mut s = Stream::new();
        s.delivered(5);
        s.seal(Epoch(1));
        s.delivered(7);
        s.commit(Epoch(1));
        assert_eq!((s.rx_delivered(), s.rx_covered()), (7, 5));
    }

    #[test]
    fn a_restored_stream_may_send_exactly_what_its_checkpoint_held() {
        let mut s = Stream::new();
        s.write(b"hello");
        s.open();
        s.acknowledge(2).unwrap();
        s.hold();
        s.write(b" world");
        let mut r = Stream::restore(s.save()).unwrap();
        assert_eq!(r.released(0, 100), b"llo world");
        r.write(b"!");
        assert_eq!(r.released(0, 100), b"llo world");
        assert_eq!(r.save(), {
            let mut t = s.save();
            t.unacked.push(b'!');
            t
        });
    }

    #[test]
    fn a_board_that_is_ahead_or_has_forgotten_is_reported() {
        let mut s = Stream::restore(state::V1 { acked: 10, unacked: b"abc".to_vec(), rx_delivered: 0 }).unwrap();
        assert_eq!(s.join(14), Err(StreamError::Ahead { applied: 14, limit: 13 }));
        assert_eq!(s.join(9), Err(StreamError::Behind { applied: 9, acked: 10 }));
        assert_eq!(s.join(12), Ok(()));
        assert_eq!(s.released(12, 9), b"c");
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u8),
        Seal,
        Commit(u8),
        Send(u8),
        Ack,
        Failover,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1u8..20).prop_map(Step::Write),
            Just(Step::Seal),
            (0u8..4).prop_map(Step::Commit),
            (1u8..30).prop_map(Step::Send),
            Just(Step::Ack),
            Just(Step::Failover),
        ];
        proptest::collection::vec(step, 1..200)
    }

    proptest! {
        /// The board receives 0, 1, 2, … (mod 256) without gap or repetition, whatever the order of cuts, commits, sends,
        /// acknowledgements and takeovers, and never a byte that no committed checkpoint holds.
        #[test]
        fn the_board_sees_every_byte_once_and_none_uncommitted(steps in steps()) {
            let mut s = Stream::new();
            let mut epoch = 0u64;
            let mut images: Vec<(Epoch, state::V1)> = Vec::new();   // cuts not yet committed
            let mut committed = s.save();
            let mut board: u64 = 0;                                 // bytes that the board has applied
            for step in steps {
                match step {
                    Step::Write(n) => {
                        let n = usize::from(n).min(s.room());
                        let bytes: Vec<u8> = (0..n as u64).map(|i| (s.end() + i) as u8).collect();
                        s.write(&bytes);
                    }
                    Step::Seal => { epoch += 1; s.seal(Epoch(epoch)); images.push((Epoch(epoch), s.save())); }
                    Step::Commit(n) => {
                        let n = usize::from(n).min(images.len());
                        if n > 0 {
                            let (e, image) = images[n - 1].clone();
                            images.drain(..n);
                            s.commit(e);
                            committed = image;
                        }
                    }
                    Step::Send(max) => {
                        let bytes = s.released(board, usize::from(max));
                        for b in bytes {
                            prop_assert_eq!(b, board as u8);
                            board += 1;
                        }
                        let end = committed.acked + committed.unacked.len() as u64;
                        prop_assert!(board <= end, "byte {} left, committed end {}", board, end);
                    }
                    Step::Ack => s.acknowledge(board).unwrap(),
                    Step::Failover => {
                        s = Stream::restore(committed.clone()).unwrap();
                        images.clear();
                        prop_assert_eq!(s.join(board), Ok(()));
                    }
                }
            }
        }
    }
}
