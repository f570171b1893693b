//! What people and monitoring see of a machine's replication: one *sample* is what the replicator and the VMM on this node
//! say of themselves; [`text`] prints it once, [`top`] again and again, [`metrics`] for Prometheus.
//!
//! All of this runs in the process of whoever asks. Neither the replicator nor the VMM does more for it than answer a status
//! request on its control socket.

pub mod metrics;
pub mod text;
pub mod top;

use std::time::{Duration, Instant};

use understudy_protocol::control::{
    ControlError, ReplicatorRequest, ReplicatorStatus, VmmRequest, VmmStatus, call_once,
};
use understudy_protocol::layout::Layout;

/// How long either process may think about its status.
const PATIENCE: Duration = Duration::from_secs(5);

/// One look at a machine on this node.
#[derive(Debug)]
pub struct Sample {
    /// When.
    pub at: Instant,
    /// The replicator, or why it does not say.
    pub replicator: Result<ReplicatorStatus, String>,
    /// The VMM, or why it does not say.
    pub vmm: Result<VmmStatus, String>,
}

impl Sample {
    /// Ask both.
    pub fn take(layout: &Layout) -> Self {
        let text = |e: ControlError| e.to_string();
        let replicator = call_once(layout.replicator_socket(), &ReplicatorRequest::Status, PATIENCE);
        let vmm = call_once(layout.vmm_socket(), &VmmRequest::Status, PATIENCE);
        Self { at: Instant::now(), replicator: replicator.map_err(text), vmm: vmm.map_err(text) }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::stats::{ReceiverStats, SenderStats};
    use understudy_protocol::control::{Gate, ReplicaState, Role, SerialStatus, SourceState, VmmState};
    use understudy_protocol::ids::{Epoch, Generation};
    use understudy_protocol::statistics::VerifyStatus;

    /// A node that runs the machine: 100 pauses, 99 of 100 µs and one of 2 ms.
    pub(crate) fn sender() -> Sample {
        let mut stats = SenderStats::default();
        for _ in 0..99 {
            stats.pause(100);
        }
        stats.pause(2000);
        let statistics = stats.report(4096, 100);
        let replicator = ReplicatorStatus {
            machine: "m".into(),
            role: Role::Sender,
            replica: ReplicaState::UpToDate,
            source: SourceState::Migrating,
            connected: true,
            peer: Some("n2 10.0.0.2:7790".into()),
            generation: Generation(3),
            committed: Epoch(99),
            current: Epoch(100),
            lag_ms: 12,
            vetoed: false,
            protected: true,
            sync_progress: 1.0,
            last_sync_ms: 800,
            raw_bytes: 4096,
            wire_bytes: 100,
            epochs: 99,
            losses: 1,
            pause_p50_us: 100,
            pause_p99_us: 100,
            pause_max_us: 2000,
            note: "protected: n2 holds epoch 1".into(),
            statistics,
            disk_verify: Default::default(),
            paths: Vec::new(),
            verify: VerifyStatus {
                pass: 2,
                passes: 2,
                compared_pages: 130_000,
                last_ended_s: Some(60),
                ..VerifyStatus::default()
            },
        };
        let vmm = serde_json::json!({
            "machine": "m", "state": VmmState::Running, "generation": 3, "gate": Gate::Hold, "vcpus": 2, "ram_bytes": 1 << 28,
            "vm_time_ns": 1_500_000_000u64, "last_cut": 100, "last_committed": 99, "replicated": true, "kvm_backend": "none",
            "resets": 0, "recent_pauses_us": [],
            "capture": {"strategy": "auto", "choice": "copied in the pause: few pages", "cuts": 100, "hot_pages": 3},
            "serial": [SerialStatus {
                port: "com1".into(),
                backend: "none".into(),
                link: "local".into(),
                tx_bytes: 7,
                tx_acked: 6,
                tx_held: 1,
                rx_bytes: 5,
            }],
            "watchdog": {
                "model": "i6300esb", "action": "reset", "state": "fed", "timeout_ms": 30_504, "fed_ms_ago": 3000, "expired_ms_ago": null, "expirations": 2,
            },
            "nics": [{
                "name": "net0", "mac": "02:00:00:00:00:01", "spec": "", "backend": "none", "link": "up", "out_packets": 0, "out_bytes": 0,
                "in_packets": 0, "in_bytes": 0, "held_packets": 0, "held_bytes": 0, "held_limit": 0, "bound_reached": 0, "problem": null,
            }],
        });
        Sample { at: Instant::now(), replicator: Ok(replicator), vmm: Ok(serde_json::from_value(vmm).unwrap()) }
    }

    /// The other node.
    pub(crate) fn receiver() -> Sample {
        let mut sample = sender();
        let statistics = ReceiverStats::default().report(4096, 100);
        sample.replicator = sample.replicator.map(|s| ReplicatorStatus { role: Role::Receiver, statistics, ..s });
        sample
    }
}
