//! How a checkpoint's pages are captured: what is measured, what is chosen, who copies, what is locked.
//!
//! | what | where |
//! |---|---|
//! | pages that are written in every epoch | [`hot`] |
//! | what capturing costs here, and the choice that follows | [`costs`] |
//! | the costs before the first cut | [`calibrate`] |
//! | copying by several threads | [`gather`] |
//! | locked pages (userfaultfd write protection) | [`lock`] |
//!
//! The cut itself, which ties them together, is [`crate::session`]'s; why a copy that was made while the guest runs can be trusted is
//! argued in `docs/decisions/0008-capture-strategies.md`.

pub mod calibrate;
pub mod costs;
pub mod gather;
pub mod hot;
pub mod lock;

use understudy_protocol::control::{CaptureStatus, Strategy};

use self::costs::{Choice, Costs};

/// What outlives a session: the administrator's choice, what was measured, what is counted.
#[derive(Debug, Clone)]
pub struct Record {
    /// What was asked for.
    pub strategy: Strategy,
    /// What was measured.
    pub costs: Costs,
    /// What the last cut did.
    pub choice: Choice,
    /// Counters; the fields that follow from the others are filled in by [`Record::status`].
    pub counts: CaptureStatus,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            strategy: Strategy::Auto,
            costs: Costs::default(),
            choice: Choice::default(),
            counts: CaptureStatus { throttle_percent: 100, ..Default::default() },
        }
    }
}

impl Record {
    /// For people; `cannot_lock` is why this host cannot lock pages, if it was tried.
    pub fn status(&self, cannot_lock: Option<&str>) -> CaptureStatus {
        let ns = |value: f64| value.round() as u64;
        CaptureStatus {
            strategy: self.strategy.name().into(),
            choice: match self.counts.cuts {
                0 => "no cut was made yet".into(),
                _ => self.choice.sentence(cannot_lock),
            },
            fault_ns: ns(self.costs.fault),
            copy_ns: ns(self.costs.copy),
            protect_ns: ns(self.costs.protect),
            kick_ns: ns(self.costs.kick),
            state_ns: ns(self.costs.state),
            lock_fault_ns: ns(self.costs.lock_fault),
            ..self.counts.clone()
        }
    }
}
