//! Bringing the peer's copies of mirrored disks into step: before the first copy of RAM, because it takes longer than that, and once more before the arming
//! cut, so that little is left for the time in which outputs wait.
//!
//! ```text
//!  SyncReady ─► Begin ─► Reading ─► Flush ─► Flushing ─► Copying … Rounds ─► Reading ─► Flush ─► Flushing ─► Arm
//!                          ▲  │ as long as it gets less
//!                          └──┘
//! ```

use std::time::Instant;

use understudy_protocol::ids::Epoch;

use super::{Action, Peer, Sender};
use crate::message::Message;

/// So little may be left for the first epoch.
const FEW_BYTES: u64 = 4 << 20;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CopyStage {
    /// The copies' standing is known, nothing was done.
    Begin,
    /// As much was missing when this round began, if that is known, and so much was sent since.
    Reading {
        missing: Option<u64>,
        sent: u64,
    },
    /// The same, and the peer is to say first what is durable.
    Waiting {
        missing: Option<u64>,
        sent: u64,
    },
    /// What was sent is to become durable.
    Flush,
    Flushing,
}

impl Sender {
    /// Whether the machine has mirrored disks.
    pub(super) fn mirrors(&self) -> bool {
        self.vmm.as_ref().is_some_and(|vmm| !vmm.mirrored.is_empty())
    }

    pub(super) fn next_for_copies(&mut self, arm: bool, stage: CopyStage, wake: Instant) -> Action {
        match stage {
            CopyStage::Begin => Action::BeginCopies,
            CopyStage::Reading { .. } => Action::CopyDisks,
            CopyStage::Flush => {
                self.peer = Peer::Disks { arm, stage: CopyStage::Flushing };
                Action::Send(Epoch::ZERO, Message::Flush)
            }
            CopyStage::Waiting { .. } | CopyStage::Flushing => Action::Wait(wake),
        }
    }

    /// The copies were sent something, or looked at for the first time.
    pub(super) fn copies_read(&mut self, sent: u64, left: u64, wait: bool) {
        let Peer::Disks { arm, stage } = self.peer else { return };
        let (missing, before) = match stage {
            CopyStage::Reading { missing, sent } => (missing, sent),
            CopyStage::Begin => (None, 0),
            CopyStage::Flush | CopyStage::Flushing | CopyStage::Waiting { .. } => return,
        };
        let sent_now = before + sent;
        // When a round leaves more than three quarters of what it began with, the guest writes as fast as the link carries: the rest comes with
        // the first epoch, however long outputs wait for that.
        let (round_over, hopeless) =
            missing.map_or((false, false), |missing| (sent_now >= missing, left > missing / 4 * 3));
        let stage = match (left, round_over) {
            (0, _) if !wait => CopyStage::Flush,
            (1..=FEW_BYTES, _) if missing.is_some() || arm => CopyStage::Flush,
            _ if wait => CopyStage::Waiting { missing, sent: sent_now },
            (_, true) if hopeless => CopyStage::Flush,
            (_, true) => CopyStage::Reading { missing: Some(left), sent: 0 },
            (_, false) => CopyStage::Reading { missing: missing.or(Some(left)), sent: sent_now },
        };
        self.peer = Peer::Disks { arm, stage };
    }

    /// The peer has said what is durable. (Of several such questions the last was answered.)
    pub(super) fn copies_flushed(&mut self) {
        self.disks_wait = false;
        let Peer::Disks { arm, stage } = self.peer else { return };
        self.peer = match stage {
            CopyStage::Flushing if arm => Peer::Arm,
            CopyStage::Flushing => Peer::Copying { first: true },
            CopyStage::Waiting { missing, sent } => Peer::Disks { arm, stage: CopyStage::Reading { missing, sent } },
            _ => return,
        };
    }

    /// What comes after the rounds over RAM.
    pub(super) fn copies_again(&self) -> Peer {
        match self.mirrors() {
            true => Peer::Disks { arm: true, stage: CopyStage::Reading { missing: None, sent: 0 } },
            false => Peer::Arm,
        }
    }
}
