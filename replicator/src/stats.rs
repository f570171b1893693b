//! Histograms and counters of both roles. The driver and the standby record, the status reports; `show` and `metrics`
//! turn the report into text.
//!
//! Recording is on the way of every checkpoint, so it neither allocates nor locks ([`Recorder`]).

use std::time::{Duration, Instant};

use understudy_protocol::control::Captured;
use understudy_protocol::ids::Epoch;
use understudy_protocol::statistics::{Recorder, StageBytes, Statistics};

use crate::codec::PAGE;
use crate::message::Message;
use crate::sender::Event;

/// An epoch whose acknowledgement is awaited.
#[derive(Debug, Clone, Copy)]
struct Flight {
    epoch: Epoch,
    cut: Instant,
    bytes: u64,
}

/// More epochs than are ever in flight at once; should there be more, the oldest goes unmeasured.
const FLIGHTS: usize = 64;

/// What the sender measures.
#[derive(Debug, Clone)]
pub struct SenderStats {
    pause: Recorder,
    epoch: Recorder,
    commit: Recorder,
    epoch_bytes: Recorder,
    captured: u64,
    committed: u64,
    /// Wire bytes when the last epoch had been sent.
    sent_before: u64,
    last_cut: Option<(Epoch, Instant)>,
    flights: [Option<Flight>; FLIGHTS],
    /// Where the next one is noted.
    next: usize,
}

impl Default for SenderStats {
    fn default() -> Self {
        Self {
            pause: Recorder::times(),
            epoch: Recorder::times(),
            commit: Recorder::times(),
            epoch_bytes: Recorder::sizes(),
            captured: 0,
            committed: 0,
            sent_before: 0,
            last_cut: None,
            flights: [None; FLIGHTS],
            next: 0,
        }
    }
}

impl SenderStats {
    /// A cut is about to be asked for. The first one of a stream (`arm`) ends no epoch of normal length.
    pub fn cut(&mut self, epoch: Epoch, arm: bool, now: Instant) {
        if self.last_cut.is_some_and(|(last, _)| last == epoch) {
            // Made again: its time runs since the first.
            return;
        }
        if let (false, Some((_, last))) = (arm, self.last_cut) {
            self.epoch.time(now.duration_since(last));
        }
        self.last_cut = Some((epoch, now));
        self.flights[self.next] = Some(Flight { epoch, cut: now, bytes: 0 });
        self.next = (self.next + 1) % FLIGHTS;
    }

    /// The arena was filled with a piece of a checkpoint, or with pages that go before it.
    pub fn captured(&mut self, captured: &Captured) {
        self.captured += captured.pages * PAGE as u64 + captured.state_len;
    }

    /// The guest stood still for so long.
    pub fn pause(&mut self, us: u64) {
        self.pause.record(us);
    }

    /// All of an epoch is on its way; `wire` is what has been sent since the start.
    pub fn sent(&mut self, epoch: Epoch, wire: u64) {
        let bytes = wire.saturating_sub(self.sent_before);
        self.sent_before = wire;
        if let Some(flight) = self.flights.iter_mut().flatten().find(|flight| flight.epoch == epoch) {
            flight.bytes = bytes;
        }
    }

    /// A first copy begins: what has been sent is no epoch's, and nothing is in flight any more.
    pub fn first_copy(&mut self, wire: u64) {
        self.sent_before = wire;
        self.last_cut = None;
        self.flights = [None; FLIGHTS];
    }

    /// The peer has said something.
    pub fn heard(&mut self, event: &Event, now: Instant) {
        let Event::Message(_, acknowledged, Message::Ack) = event else { return };
        for place in &mut self.flights {
            let Some(flight) = *place else { continue };
            // An acknowledgement covers all that went before.
            if flight.epoch <= *acknowledged {
                self.commit.time(now.duration_since(flight.cut));
                self.epoch_bytes.record(flight.bytes);
                self.committed += flight.bytes;
                *place = None;
            }
        }
    }

    /// For the status. `raw`: bytes given to the encoder; `wire`: bytes sent.
    pub fn report(&self, raw: u64, wire: u64) -> Statistics {
        Statistics {
            pause_us: self.pause.histogram(),
            epoch_us: self.epoch.histogram(),
            commit_us: self.commit.histogram(),
            epoch_bytes: self.epoch_bytes.histogram(),
            bytes: StageBytes {
                captured: self.captured,
                raw,
                wire,
                committed: self.committed,
                ..StageBytes::default()
            },
            in_flight: self.flights.iter().flatten().count() as u64,
            ..Statistics::default()
        }
    }
}

/// What the receiver measures.
#[derive(Debug, Clone)]
pub struct ReceiverStats {
    commit: Recorder,
    epoch_bytes: Recorder,
    committed: u64,
    received_before: u64,
}

impl Default for ReceiverStats {
    fn default() -> Self {
        Self { commit: Recorder::times(), epoch_bytes: Recorder::sizes(), committed: 0, received_before: 0 }
    }
}

impl ReceiverStats {
    /// An epoch was committed and applied, which took `took`; `wire` has been received since the start.
    pub fn committed(&mut self, took: Duration, wire: u64) {
        let bytes = wire.saturating_sub(self.received_before);
        self.received_before = wire;
        self.commit.time(took);
        self.epoch_bytes.record(bytes);
        self.committed += bytes;
    }

    /// What has come so far is no epoch's: a first copy, or the beginning of an epoch that was never ended.
    pub fn forget(&mut self, wire: u64) {
        self.received_before = wire;
    }

    /// For the status. `raw`: bytes received, decoded; `wire`: as they came.
    pub fn report(&self, raw: u64, wire: u64) -> Statistics {
        Statistics {
            commit_us: self.commit.histogram(),
            epoch_bytes: self.epoch_bytes.histogram(),
            bytes: StageBytes { raw, wire, committed: self.committed, ..StageBytes::default() },
            ..Statistics::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_protocol::ids::Generation;

    fn ack(epoch: u64) -> Event {
        Event::Message(Generation(1), Epoch(epoch), Message::Ack)
    }

    #[test]
    fn latency_runs_from_the_cut_to_the_acknowledgement_that_covers_it() {
        let (mut stats, start) = (SenderStats::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        stats.first_copy(5_000);
        stats.cut(Epoch(1), true, at(0));
        stats.sent(Epoch(1), 5_100);
        stats.cut(Epoch(2), false, at(20));
        stats.cut(Epoch(2), false, at(21));
        stats.sent(Epoch(2), 5_400);
        assert_eq!(stats.report(0, 0).in_flight, 2);
        stats.heard(&ack(1), at(30));
        stats.cut(Epoch(3), false, at(40));
        stats.sent(Epoch(3), 5_500);
        // The acknowledgement of 2 was lost with a connection; that of 3 says as much.
        stats.heard(&ack(3), at(90));
        stats.heard(&ack(3), at(95));
        let report = stats.report(9_000, 5_500);
        assert_eq!(report.in_flight, 0);
        assert_eq!((report.epoch_us.count, report.epoch_us.sum), (2, 40_000), "the first cut ends no epoch");
        assert_eq!((report.commit_us.count, report.commit_us.sum), (3, 30_000 + 70_000 + 50_000));
        assert_eq!((report.epoch_bytes.count, report.epoch_bytes.sum, report.bytes.committed), (3, 500, 500));
        assert_eq!((report.bytes.raw, report.bytes.wire), (9_000, 5_500));
    }

    #[test]
    fn a_first_copy_is_no_epochs() {
        let mut stats = ReceiverStats::default();
        stats.forget(1_000_000);
        stats.committed(Duration::from_millis(1), 1_000_200);
        assert_eq!(stats.report(0, 0).epoch_bytes.sum, 200);
    }
}
