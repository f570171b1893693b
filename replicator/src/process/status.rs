//! What the process tells of itself.

use std::time::Instant;

use understudy_protocol::control::{ReplicaState, ReplicatorStatus, Role, SourceState};
use understudy_protocol::statistics::DiskVerifyStatus;

use super::{Shared, lock};
use crate::driver::{SenderHandle, SenderView};
use crate::receiver::Standing;

impl Shared {
    pub(super) fn status(&self) -> ReplicatorStatus {
        let view = lock(&self.sender).as_ref().map(SenderHandle::view);
        match view {
            Some(view) => self.sender_status(view),
            None => self.receiver_status(),
        }
    }

    fn sender_status(&self, view: SenderView) -> ReplicatorStatus {
        let replica = match (view.syncing, view.peer_whole, view.peer_up_to_date) {
            (true, ..) => ReplicaState::Syncing,
            (false, true, true) => ReplicaState::UpToDate,
            (false, true, false) => ReplicaState::Outdated,
            (false, false, _) => ReplicaState::Inconsistent,
        };
        let (p50, p99, max) = percentiles(&view.pauses);
        let mut statistics = view.stats.report(view.raw_bytes, view.wire_bytes);
        let (encoded, encoding) = view.encoding;
        statistics.bytes.changed = encoded.changed;
        statistics.bytes.encoded = encoded.encoded;
        statistics.bytes.compressed = encoded.batches;
        statistics.encoding = encoding;
        ReplicatorStatus {
            machine: self.config.machine.clone(),
            role: Role::Sender,
            replica,
            source: view.source.unwrap_or(SourceState::Collapsed),
            connected: view.connected,
            peer: view.peer,
            generation: view.generation,
            committed: view.committed,
            current: view.current,
            lag_ms: since(view.facts.committed_at),
            vetoed: view.vetoed,
            protected: view.protected,
            sync_progress: view.progress,
            last_sync_ms: view.facts.last_sync.as_millis() as u64,
            raw_bytes: view.raw_bytes,
            wire_bytes: view.wire_bytes,
            epochs: view.facts.epochs,
            losses: view.facts.losses,
            pause_p50_us: p50,
            pause_p99_us: p99,
            pause_max_us: max,
            note: view.facts.note,
            statistics,
            verify: view.verify,
            disk_verify: view.disk_verify,
            paths: view.paths,
        }
    }

    fn receiver_status(&self) -> ReplicatorStatus {
        let standby = self.standby();
        let (core, counters) = (standby.core(), &standby.counters);
        let record = &core.durable().record;
        let standing = core.standing();
        ReplicatorStatus {
            machine: self.config.machine.clone(),
            role: Role::Receiver,
            replica: match standing {
                Standing::Inconsistent => ReplicaState::Inconsistent,
                Standing::Syncing => ReplicaState::Syncing,
                Standing::UpToDate | Standing::Disconnected => ReplicaState::UpToDate,
                Standing::Outdated => ReplicaState::Outdated,
            },
            source: match (core.sender(), standing) {
                (None, _) => SourceState::Collapsed,
                (Some(_), Standing::Syncing) => SourceState::Startup,
                (Some(_), _) => SourceState::Migrating,
            },
            connected: core.sender().is_some(),
            peer: core.sender().map(|(_, _, node)| format!("{node} {}", standby.sender_address().unwrap_or("(gone)"))),
            generation: core.durable().newest(),
            committed: record.epoch,
            current: core.current(),
            lag_ms: since(counters.committed_at),
            vetoed: false,
            protected: false,
            sync_progress: core.sync_progress(),
            last_sync_ms: counters.last_sync.as_millis() as u64,
            raw_bytes: counters.raw_bytes,
            wire_bytes: counters.wire_bytes,
            epochs: counters.epochs,
            losses: counters.losses,
            pause_p50_us: 0,
            pause_p99_us: 0,
            pause_max_us: 0,
            note: counters.note.clone(),
            statistics: counters.stats.report(counters.raw_bytes, counters.wire_bytes),
            verify: counters.verify.clone(),
            disk_verify: DiskVerifyStatus::default(),
            paths: standby.paths(),
        }
    }
}

fn since(time: Option<Instant>) -> u64 {
    time.map_or(0, |time| time.elapsed().as_millis() as u64)
}

/// Nearest-rank percentiles.
fn percentiles(values: &[u64]) -> (u64, u64, u64) {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(0);
    (rank(50), rank(99), sorted.last().copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        assert_eq!(percentiles(&[]), (0, 0, 0));
        assert_eq!(percentiles(&[7]), (7, 7, 7));
        let hundred: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(percentiles(&hundred), (50, 99, 100));
    }
}
