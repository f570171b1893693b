//! What the sender does differently when it brings a machine that nobody protects to another node, once.
//!
//! ```text
//!  first copy ─► round ─► round ─► … ─► last cut ─► acknowledged ─► "it is yours" ─► recorded there ─► the VMM here is told
//!                  └─ estimated pause too long: another; it does not shrink: throttle; too many: give up
//! ```
//! No veto, no hook, no second attempt: whatever fails ends the migration, the end of the session with the VMM lets the machine run on
//! here, and what the target holds is discarded there. Only the target's word that the hand-over is *recorded* makes the sender tell
//! the VMM that it is over: before that the target may not run the image, afterwards nobody else may (`tests/migration_model.rs`).
//!
//! After the first copy and after each round the target is asked whether all of it has arrived (a ping with the round's number), so that the
//! rate is that of the whole way, not that of filling a socket's buffer.

use std::time::{Duration, Instant};

use understudy_protocol::control::HandedOver;
use understudy_protocol::ids::Epoch;

use super::*;

/// When the last cut is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationPolicy {
    /// The last copy may stop the machine for so long.
    pub max_pause: Duration,
    /// Rounds after which a machine that writes too fast stays where it is.
    pub max_rounds: u32,
}

/// How far a migration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// The target is being reached and prepares itself.
    #[default]
    Connecting,
    /// The first copy.
    Copying,
    /// What was written meanwhile, again and again.
    Rounds,
    /// The machine stands still.
    LastCopy,
    /// It is over, one way or the other.
    Ended,
}

/// A migration as others see it.
#[derive(Debug, Clone, Copy, Default)]
pub struct MigrationView {
    /// Where it is.
    pub phase: Phase,
    /// The round under way, from 1.
    pub round: u32,
    /// Pages of the newest round.
    pub round_pages: u64,
    /// Pages a second that arrive, zero before it is known.
    pub rate: f64,
    /// How long the last copy would stop the machine, if it began now.
    pub pause: Option<Duration>,
    /// Share of its time for which the machine runs, percent.
    pub share: u8,
    /// From the last cut to the VMM's knowledge that it is over.
    pub stood_still: Option<Duration>,
}

/// Fewer pages than this say nothing about the rate.
const TELLING: u64 = 256;
/// So many rounds that do not shrink, and the machine is slowed down.
const STUBBORN: u32 = 2;

/// See the module.
#[derive(Debug)]
pub(super) struct Migration {
    policy: MigrationPolicy,
    round: u32,
    /// What is being sent: since when, and how many pages.
    since: Instant,
    pages: u64,
    /// When the dirty log was read last, and the time that it had covered.
    harvested: Instant,
    covered: Duration,
    /// The target is to say that everything has arrived; whether it was asked.
    awaited: Option<bool>,
    rate: f64,
    pause: Option<Duration>,
    stubborn: u32,
    stood_still: Option<Duration>,
    end: Option<Result<HandedOver, String>>,
}

impl Migration {
    pub(super) fn new(policy: MigrationPolicy, now: Instant) -> Self {
        Self {
            policy,
            round: 0,
            since: now,
            pages: 0,
            harvested: now,
            covered: Duration::ZERO,
            awaited: None,
            rate: 0.0,
            pause: None,
            stubborn: 0,
            stood_still: None,
            end: None,
        }
    }
}

impl Sender {
    /// Whether it migrates a machine rather than protecting it.
    pub fn migrates(&self) -> bool {
        self.migration.is_some()
    }

    /// How far the migration has come; `None` if this is none.
    pub fn migration(&self) -> Option<MigrationView> {
        let migration = self.migration.as_ref()?;
        let phase = match self.peer {
            _ if migration.end.is_some() => Phase::Ended,
            Peer::Away | Peer::Connecting | Peer::Greeting { .. } | Peer::Welcomed { .. } => Phase::Connecting,
            Peer::Begun | Peer::Disks { .. } | Peer::Copying { .. } => Phase::Copying,
            Peer::Rounds { .. } => Phase::Rounds,
            Peer::Arm | Peer::Streaming => Phase::LastCopy,
        };
        Some(MigrationView {
            phase,
            round: migration.round,
            round_pages: migration.pages,
            rate: migration.rate,
            pause: migration.pause,
            share: self.share(),
            stood_still: migration.stood_still,
        })
    }

    /// Whether it is over.
    pub(super) fn migration_ended(&self) -> bool {
        self.migration.as_ref().is_some_and(|migration| migration.end.is_some())
    }

    /// How it ended, for those who ask late.
    pub(super) fn migration_end(&self) -> Option<Result<HandedOver, String>> {
        self.migration.as_ref()?.end.clone()
    }

    /// The first copy begins.
    pub(super) fn migration_copies(&mut self, now: Instant) {
        if let (Some(migration), Some(vmm)) = (&mut self.migration, &self.vmm) {
            migration.since = now;
            migration.pages = vmm.ram_bytes / crate::codec::PAGE as u64;
        }
    }

    /// The dirty log was begun, or read: it covers what is written from here on.
    pub(super) fn migration_harvests(&mut self, now: Instant) {
        if let Some(migration) = &mut self.migration {
            migration.covered = now.saturating_duration_since(migration.harvested);
            migration.harvested = now;
        }
    }

    /// A round's pages are about to be sent.
    pub(super) fn migration_round(&mut self, pages: u64, now: Instant) {
        if let Some(migration) = &mut self.migration {
            (migration.round, migration.pages, migration.since) = (migration.round + 1, pages, now);
        }
    }

    /// All of it was sent: has it arrived?
    pub(super) fn migration_sent(&mut self) {
        if let Some(migration) = &mut self.migration {
            migration.awaited = Some(false);
        }
    }

    /// What to do before the next round may begin.
    pub(super) fn next_for_arrival(&mut self, wake: Instant) -> Option<Action> {
        let migration = self.migration.as_mut()?;
        let asked = migration.awaited.as_mut()?;
        if std::mem::replace(asked, true) {
            return Some(Action::Wait(wake));
        }
        Some(Action::Send(Epoch(u64::from(migration.round) + 1), Message::Ping))
    }

    /// The target has everything that was sent before the ping of this number.
    pub(super) fn arrived(&mut self, number: Epoch, now: Instant) {
        let Some(migration) = &mut self.migration else { return };
        if migration.awaited != Some(true) || number.0 != u64::from(migration.round) + 1 {
            return;
        }
        migration.awaited = None;
        let took = now.saturating_duration_since(migration.since).as_secs_f64().max(1e-6);
        if migration.pages >= TELLING || migration.rate == 0.0 {
            migration.rate = migration.pages as f64 / took;
        }
        if migration.round == 0 {
            return;
        }
        let all = self.vmm.as_ref().map_or(0, |vmm| vmm.ram_bytes / crate::codec::PAGE as u64) as f64;
        let written = migration.pages as f64 / migration.covered.as_secs_f64().max(1e-6);
        let left = (written * now.saturating_duration_since(migration.harvested).as_secs_f64()).min(all);
        let pause = Duration::try_from_secs_f64(left / migration.rate.max(1.0)).unwrap_or(Duration::MAX);
        migration.pause = Some(pause);
        if pause <= migration.policy.max_pause {
            self.peer = Peer::Arm;
            return;
        }
        let mib = |pages: f64| pages * crate::codec::PAGE as f64 / f64::from(1 << 20);
        if migration.round >= migration.policy.max_rounds {
            let why = format!(
                "the guest writes faster than its memory can be sent: after {} rounds a last copy would still stop it for {} ms \
                 (it writes {:.0} MiB/s running for {} % of the time, {:.0} MiB/s arrive); use a faster link or a longer --max-pause-ms",
                migration.round,
                pause.as_millis(),
                mib(written),
                SHARES[self.share],
                mib(migration.rate)
            );
            return self.end_migration(Err(why));
        }
        migration.stubborn = if left > migration.pages as f64 * 0.75 { migration.stubborn + 1 } else { 0 };
        if migration.stubborn >= STUBBORN && self.share + 1 < SHARES.len() {
            migration.stubborn = 0;
            self.share += 1;
            self.note(format!("the guest writes too fast and runs for {} % of the time", SHARES[self.share]));
        }
    }

    /// The VMM knows that the machine is the target's.
    pub(super) fn migrated(&mut self, now: Instant) {
        let stood_still = now.saturating_duration_since(self.last_cut);
        if let Some(migration) = &mut self.migration {
            migration.stood_still = Some(stood_still);
        }
        self.hand_over = HandOver::Done;
        self.end_migration(Ok(HandedOver { epoch: self.epoch }));
    }

    /// It is over. After a failure the session with the VMM ends, and with that the machine runs on here.
    pub(super) fn end_migration(&mut self, end: Result<HandedOver, String>) {
        let Some(migration) = self.migration.as_mut().filter(|migration| migration.end.is_none()) else { return };
        migration.end = Some(end.clone());
        if let Err(why) = &end {
            self.hand_over = HandOver::No;
            self.disconnect = !matches!(self.peer, Peer::Away | Peer::Connecting);
            self.peer = Peer::Away;
            self.cycle = Cycle::Idle;
            self.rest = Rest::Nothing;
            self.detach = self.vmm.is_some().then(|| why.clone());
            self.note(format!("the migration has failed: {why}"));
        }
        self.answer = Some(end);
    }
}
