//! `understudy-replicator migrate`: brings a machine that nobody protects to another node while it runs. One process, one migration.
//!
//! ```text
//!  this process ── sender (driver, sender.rs with a MigrationPolicy) ──► the target's `serve-migrations` (incoming.rs)
//!       └── asks the VMM at the end what has become of the machine: its word alone counts
//! ```
//! The machine runs on here whatever fails, also when this process is killed: its session with the VMM ends with it, and the VMM goes on
//! unless it was told that the machine is the target's. What the target holds then is discarded there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use understudy_protocol::control::{ControlError, HandedOver, VmmRequest, VmmState, VmmStatus, call_once};
use understudy_protocol::ids::Epoch;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;

use crate::codec::{EncodingConfig, PAGE};
use crate::driver::{DriverConfig, SenderHandle, SenderView};
use crate::hook::{Arm, Hook};
use crate::link::Encryption;
use crate::process::{StartError, lock_machine};
use crate::sender::{MigrationPolicy, Phase, SenderConfig};

/// Progress is told this often.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// How soon an end or an interruption is noticed.
const LOOK: Duration = Duration::from_millis(20);
/// How long the VMM may take to notice that its session has ended.
const JUDGE_PATIENCE: Duration = Duration::from_secs(15);

/// What to do.
#[derive(Debug)]
pub struct Migrate {
    /// The machine.
    pub machine: String,
    /// This node.
    pub node: String,
    /// The target: name, `host:port`.
    pub to: (String, String),
    /// Files.
    pub layout: Layout,
    /// The cluster's key.
    pub key: Arc<Key>,
    /// When the rounds end.
    pub policy: MigrationPolicy,
    /// Silence after which the target counts as lost.
    pub peer_timeout: Duration,
    /// How pages are encoded.
    pub encoding: EncodingConfig,
}

/// One thing to tell whoever waits.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Report {
    /// The target is being reached and prepares itself.
    Connecting,
    /// The first copy.
    Copying {
        /// Of the machine's memory.
        percent: f64,
        /// Memory that arrives.
        mib_per_s: f64,
    },
    /// What was written meanwhile.
    Rounds {
        /// From 1.
        round: u32,
        /// Memory of this round.
        mib: f64,
        /// Memory that arrives.
        mib_per_s: f64,
        /// How long a last copy would have stopped the machine at the end of the last round.
        pause_ms: Option<u64>,
        /// Share of its time for which the machine runs.
        speed_percent: u8,
    },
    /// The machine stands still.
    LastCopy,
    /// It is the target's.
    Done {
        /// Its last checkpoint.
        epoch: Epoch,
        /// Rounds that it took.
        rounds: u32,
        /// From the last cut to the VMM's knowledge that it is over; the target's own start comes on top.
        stood_still_ms: u64,
    },
    /// It is not.
    Failed {
        /// A sentence.
        why: String,
    },
}

impl Report {
    /// As a line for people.
    pub fn text(&self) -> String {
        match self {
            Self::Connecting => "connecting; the target prepares itself".into(),
            Self::Copying { percent, mib_per_s } => format!("first copy: {percent:.0} %, {mib_per_s:.0} MiB/s"),
            Self::Rounds { round, mib, mib_per_s, pause_ms, speed_percent } => {
                let mut line = format!("round {round}: {mib:.1} MiB written meanwhile, {mib_per_s:.0} MiB/s");
                if let Some(ms) = pause_ms {
                    line += &format!(", a last copy would stop the machine for {ms} ms");
                }
                if *speed_percent < 100 {
                    line += &format!("; it is slowed down to {speed_percent} %");
                }
                line
            }
            Self::LastCopy => "last copy: the machine stands still".into(),
            Self::Done { epoch, rounds, stood_still_ms } => {
                format!("handed over at epoch {epoch} after {rounds} rounds and {stood_still_ms} ms of standstill here")
            }
            Self::Failed { why } => format!("not migrated: {why}"),
        }
    }

    fn of(view: &SenderView, began: Instant) -> Option<Self> {
        let migration = view.migration?;
        let mib = |pages: f64| pages * PAGE as f64 / f64::from(1 << 20);
        Some(match migration.phase {
            Phase::Connecting => Self::Connecting,
            Phase::Copying => {
                let arrived = view.raw_bytes as f64 / f64::from(1 << 20);
                let mib_per_s = arrived / began.elapsed().as_secs_f64().max(1e-3);
                Self::Copying { percent: view.progress * 100.0, mib_per_s }
            }
            Phase::Rounds => Self::Rounds {
                round: migration.round.max(1),
                mib: if migration.round == 0 { 0.0 } else { mib(migration.round_pages as f64) },
                mib_per_s: mib(migration.rate),
                pause_ms: migration.pause.map(|pause| pause.as_millis() as u64),
                speed_percent: migration.share,
            },
            Phase::LastCopy => Self::LastCopy,
            Phase::Ended => return None,
        })
    }
}

/// Migrate, telling `tell` how it goes; set `stop` and it ends soon, with the machine running on here. The last report is
/// [`Report::Done`] or [`Report::Failed`]; true if the machine is the target's.
pub fn run(config: Migrate, stop: &AtomicBool, mut tell: impl FnMut(&Report)) -> bool {
    let layout = config.layout.clone();
    let last = match lock_machine(&layout) {
        Ok(_lock) => match ask(&layout) {
            Ok(status) if status.state == VmmState::Running => send(config, stop, &mut tell),
            Ok(status) => Report::Failed {
                why: format!("only a machine that runs can be migrated; this one is {:?}", status.state),
            },
            Err(e) => Report::Failed { why: format!("the machine has no VMM on this node: {e}") },
        },
        Err(StartError::AlreadyRuns(_)) => Report::Failed {
            why:
                "a replicator of this machine runs on this node: a protected machine moves by being promoted elsewhere"
                    .into(),
        },
        Err(e) => Report::Failed { why: e.to_string() },
    };
    tell(&last);
    matches!(last, Report::Done { .. })
}

fn send(config: Migrate, stop: &AtomicBool, tell: &mut impl FnMut(&Report)) -> Report {
    let sender = SenderHandle::start(DriverConfig {
        sender: SenderConfig {
            peer_timeout: config.peer_timeout,
            migration: Some(config.policy),
            ..SenderConfig::new(&config.machine, &config.node, false)
        },
        peers: vec![config.to],
        key: config.key,
        encryption: Encryption::On,
        layout: config.layout.clone(),
        encoding: config.encoding,
        hook: Hook::new(Arm::Nothing, &config.machine),
        verify_every: Duration::ZERO,
        attached: Box::new(|generation| generation),
    });
    let end = sender.hand_over();
    let (mut told, mut said, mut copying) = (Instant::now(), None, None);
    let ended: Result<HandedOver, String> = loop {
        match end.recv_timeout(LOOK) {
            Ok(ended) => break ended,
            Err(RecvTimeoutError::Disconnected) => break Err("the sender has ended".into()),
            Err(RecvTimeoutError::Timeout) if stop.load(Ordering::SeqCst) => break Err("it was cancelled".into()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let view = sender.view();
        let phase = view.migration.map(|migration| migration.phase);
        if phase == Some(Phase::Copying) {
            copying.get_or_insert_with(Instant::now);
        }
        if (said != phase || told.elapsed() >= TELL_EVERY)
            && let Some(report) = Report::of(&view, copying.unwrap_or(told))
        {
            (told, said) = (Instant::now(), phase);
            tell(&report);
        }
    };
    let view = sender.view();
    // The session with the VMM ends here, at the latest: it runs on, unless it was told.
    sender.stop();
    match (judge(&config.layout), ended) {
        (Ok(VmmState::HandedOver), ended) => {
            let migration = view.migration.unwrap_or_default();
            Report::Done {
                epoch: ended.map_or(view.current, |done| done.epoch),
                rounds: migration.round,
                stood_still_ms: migration.stood_still.unwrap_or_default().as_millis() as u64,
            }
        }
        (Ok(state), ended) => {
            let why = ended.err().unwrap_or_else(|| "the VMM does not know that the machine was handed over".into());
            let stands = match state {
                VmmState::Running => "the machine runs on here",
                VmmState::Paused => "the machine is paused here",
                _ => "the machine does not run here any more, and was not handed over",
            };
            Report::Failed { why: format!("{why}; {stands}") }
        }
        (Err(e), ended) => {
            let why = ended.err().unwrap_or_else(|| "the hand-over was complete".into());
            Report::Failed { why: format!("{why}; the machine's VMM does not say what has become of it: {e}") }
        }
    }
}

fn ask(layout: &Layout) -> Result<VmmStatus, ControlError> {
    call_once(layout.vmm_socket(), &VmmRequest::Status, Duration::from_secs(5))
}

/// What has become of the machine, once its VMM has noticed the end of the session. (What was sent to it before that end it may
/// still act on.)
fn judge(layout: &Layout) -> Result<VmmState, ControlError> {
    let until = Instant::now() + JUDGE_PATIENCE;
    loop {
        match ask(layout) {
            Ok(status) if !status.replicated || Instant::now() >= until => return Ok(status.state),
            Err(e) if Instant::now() >= until || matches!(e, ControlError::Io { .. }) => return Err(e),
            Ok(_) | Err(_) => thread::sleep(LOOK),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_a_sentence_for_people_and_an_object_for_machines() {
        let round = Report::Rounds { round: 2, mib: 1.5, mib_per_s: 100.0, pause_ms: Some(30), speed_percent: 60 };
        assert_eq!(
            round.text(),
            "round 2: 1.5 MiB written meanwhile, 100 MiB/s, a last copy would stop the machine for 30 ms; it is slowed down to 60 %"
        );
        let json = serde_json::to_string(&Report::Failed { why: "no".into() }).unwrap();
        assert_eq!(json, r#"{"phase":"failed","why":"no"}"#);
        assert!(serde_json::to_string(&round).unwrap().contains(r#""phase":"rounds","round":2"#));
    }
}
