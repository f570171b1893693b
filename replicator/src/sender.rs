//! The sender's decisions, without any I/O: events in, one *action* at a time out.
//!
//! ```text
//!  peer:  Away ─► Connecting ─► Greeting ─► Welcomed ─► Begun ─► Copying ─► Rounds ─► Streaming
//!                                                             (mirrored disks: before Copying, and after Rounds)
//!          ▲                                   └── image continues this very dirty log ──────►│
//!          └──────────────────────────── lost, silent, failed ────────────────────────────────┘
//!  cycle (while Streaming):  Idle ─Cut─► Sending ⇄ CutContinue ─► Idle        (Precopy ─► Early ─► Idle in between)
//!  epochs:                   cut ─► in flight (up to `pipeline` of them) ─Ack─► acknowledged ─Committed─► told
//! ```
//! *When to cut*: after `interval`; sooner if the machine waits to say something, but never so soon that the cuts' standstill takes
//! more than a tenth of its time; never while `pipeline` epochs are in flight (the guest runs on, its epoch grows).
//!
//! Beside it runs the *veto*, the cluster's durable word that the standby must not be promoted. The rules that tie them:
//! * `GateOpen` only while a veto stands and no epochs stream.
//! * The veto is lifted only after the first commit of a stream and the standby's word that the cluster knows it.
//! * A veto that was asked for or lifted without a clear answer counts as neither standing nor lifted: it is asked for
//!   again before the gate opens, and lifted again before protection is claimed.
//! * A first copy destroys what the standby holds. If that is a whole image of this machine's present, the copy waits until
//!   the gate has been opened under a veto: until then the old image is what the cluster would fall back on.
//! * The end of an epoch is sent only when the machine's disks are sealed for it, if it has disks: a checkpoint that is committed anywhere finds them.
//!   What the copies of mirrored disks need of it is sent before that end.
//! * Copies of mirrored disks are brought into step only while the gate is open: the disks' content is then nobody's secret, and what the
//!   copies lack at the arming cut is what the disks were when protection began.
//! * Once a newer generation has shown itself the only action left is to end the machine here.
//!
//! The caller performs each action to its end, reports with the matching [`Event`], and feeds in whatever else
//! happened, before it asks for the next.

mod action;
mod budget;
mod copies;
mod migrate;
mod react;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use understudy_protocol::control::{Attached, Captured, HandedOver, SourceState};
use understudy_protocol::ids::{Epoch, Generation};

pub use self::action::{Action, DisksSent, Event, VetoCall};
use self::budget::Budget;
use self::copies::CopyStage;
use self::migrate::Migration;
pub use self::migrate::{MigrationPolicy, MigrationView, Phase};
use crate::message::{Hello, Message, VERSION};

/// What the sender is given by its administrator.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// The machine's name.
    pub machine: String,
    /// This node's name.
    pub node: String,
    /// From cut to cut.
    pub interval: Duration,
    /// From cut to cut when outputs wait.
    pub min_interval: Duration,
    /// Epochs that may be on their way at once, at least 1.
    pub pipeline: usize,
    /// What to do with a standby that is too slow.
    pub slow: SlowLink,
    /// Silence after which the peer counts as lost.
    pub peer_timeout: Duration,
    /// There is a cluster behind the hook: a veto means something.
    pub clustered: bool,
    /// Do not protect the machine, but bring it to the other node, once.
    pub migration: Option<MigrationPolicy>,
}

impl SenderConfig {
    /// The defaults, for a machine on a node: 25 ms from cut to cut, 1 ms when outputs wait.
    pub fn new(machine: &str, node: &str, clustered: bool) -> Self {
        Self {
            machine: machine.into(),
            node: node.into(),
            interval: Duration::from_millis(25),
            min_interval: Duration::from_millis(1),
            pipeline: 2,
            slow: SlowLink::default(),
            peer_timeout: Duration::from_secs(2),
            clustered,
            migration: None,
        }
    }
}

/// What happens when a checkpoint takes too long to be committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowLink {
    /// How.
    pub policy: SlowPolicy,
    /// Time from a cut to its commit that is too long.
    pub max_lag: Duration,
}

impl Default for SlowLink {
    fn default() -> Self {
        Self { policy: SlowPolicy::Throttle, max_lag: Duration::from_millis(500) }
    }
}

/// See [`SlowLink`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SlowPolicy {
    /// Outputs wait as long as it takes.
    Stall,
    /// The guest runs slower, down to a tenth of its speed, until the commits keep up.
    Throttle,
    /// The standby is given up: the machine runs on unprotected, after the veto.
    Solo,
}

/// Shares of its time for which a throttled guest runs, percent.
const SHARES: [u8; 5] = [100, 60, 35, 20, 10];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Veto {
    /// Neither known to stand nor known to be lifted.
    Unknown,
    Asking,
    Standing,
    Clearing,
    Cleared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Away,
    Connecting,
    Greeting {
        sent: bool,
    },
    /// Accepted; wants a first copy. `wait`: not before the gate is open.
    Welcomed {
        wait: bool,
        log_ready: bool,
    },
    Begun,
    /// Its copies of the mirrored disks are brought into step; `arm`: for the second time, the arming cut comes next.
    Disks {
        arm: bool,
        stage: CopyStage,
    },
    Copying {
        first: bool,
    },
    Rounds {
        round: u32,
        previous: u64,
        sending: Option<u64>,
    },
    Arm,
    Streaming,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nothing,
    LogStart,
    GateOpen,
    SealDisks(Epoch),
    Committed(Epoch),
    Throttle,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cycle {
    Idle,
    /// The arena holds pages that were copied before the cut.
    Early(Captured),
    /// The arena holds a piece to send.
    Sending(Captured),
    /// The arena was taken; more is to come.
    Continue,
    /// The peer is back and lacks what is kept.
    Resend {
        after: Epoch,
    },
}

/// What the VMM is doing for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Busy {
    No,
    Cutting { again: bool },
    Copying,
}

/// An epoch that is on its way as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct InFlight {
    epoch: Epoch,
    /// When it was cut.
    cut: Instant,
    deadline: Instant,
}

/// What is left of a cut whose peer is gone. The VMM resumes the guest only when all of it was taken.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rest {
    Nothing,
    /// Encode and keep it: the peer may come back for it.
    Keep(Captured),
    /// Fetch the next piece to keep.
    KeepMore,
    /// Fetch the next piece; nobody can use it.
    Drop,
}

/// What a reconnecting standby must hold for the stream to go on without a first copy.
#[derive(Debug, Clone)]
struct Base {
    committed: Epoch,
    /// Complete epochs after that, kept for sending again.
    kept: Vec<Epoch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HandOver {
    No,
    Wanted,
    /// The last cut was made.
    Cut,
    /// The VMM knows the commit; the peer is told. (In a migration the VMM does not know yet.)
    Telling {
        deadline: Option<Instant>,
    },
    /// In a migration: the peer has recorded it, the VMM is to be told.
    Recorded,
    Done,
}

/// How often an outdated picture is looked at again: reconnects, hook retries.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// An epoch with fewer pages needs no early copies.
const WORTH_EARLY: u64 = 512;
/// A harvest of no more pages ends the rounds: the rest fits the pause.
const FEW_PAGES: u64 = 1024;
const MAX_ROUNDS: u32 = 8;

/// The state machine.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    vmm: Option<Attached>,
    session: u64,
    log_on: bool,
    gate_open: bool,
    vmm_retry: Instant,
    /// What the VMM was asked last, for its `VmmDone`.
    asked: Asked,
    /// It waits for its storage meanwhile, however long that takes, and can be asked for nothing else.
    storage: Option<Instant>,
    stale: Option<Generation>,

    veto: Veto,
    veto_retry: Instant,
    veto_backoff: Duration,

    peer: Peer,
    peer_node: String,
    disconnect: bool,
    peer_retry: Instant,
    peer_backoff: Duration,
    last_heard: Instant,
    last_ping: Instant,
    promotable: bool,
    peer_whole: bool,

    cycle: Cycle,
    busy: Busy,
    /// The peer was lost in the middle of an epoch that is still to be taken from the VMM.
    rest: Rest,
    base: Option<Base>,
    epoch: Epoch,
    /// The newest epoch for which the disks are sealed, how long that took, and the newest for which the copies were sent what they need.
    sealed: Epoch,
    sealing: Duration,
    mirrored: Epoch,
    /// The peer is to say first what of its copies is durable.
    disks_wait: bool,
    committed: Epoch,
    next_cut: Instant,
    in_flight: VecDeque<InFlight>,
    /// Newest epoch that the peer holds and the VMM has not been told of.
    acked: Option<Epoch>,
    last_cut: Instant,
    /// For cuts that come early because an output waits.
    budget: Budget,
    /// The cut that is being made came before its time.
    hurried: bool,
    /// The guest waits to say something.
    output: bool,
    /// Pages of the epoch that is being cut, and of the one before.
    pages: u64,
    pages_before: u64,
    /// When the next early copy is due.
    early_at: Option<Instant>,
    /// Early pages of the coming epoch are on their way (or in the kept frames).
    early: bool,
    /// … but the peer that they went to is gone.
    again: bool,
    /// Index into [`SHARES`]: what it should be, what the VMM was told, and when it may change again.
    share: usize,
    share_told: usize,
    share_next: Instant,

    hand_over: HandOver,
    answer: Option<Result<HandedOver, String>>,
    detach: Option<String>,

    migration: Option<Migration>,
    sync_started: Instant,
    facts: Facts,
    /// For the log.
    notes: Vec<String>,
}

/// What the status tells of the sender.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The last thing worth telling.
    pub note: String,
    /// Times that protection was lost.
    pub losses: u64,
    /// Epochs committed.
    pub epochs: u64,
    /// Duration of the last first copy.
    pub last_sync: Duration,
    /// When an epoch was last committed.
    pub committed_at: Option<Instant>,
}

impl Sender {
    /// A sender that has done nothing yet.
    pub fn new(config: SenderConfig, now: Instant) -> Self {
        Self {
            migration: config.migration.map(|policy| Migration::new(policy, now)),
            config,
            vmm: None,
            session: 0,
            log_on: false,
            gate_open: false,
            vmm_retry: now,
            asked: Asked::Nothing,
            storage: None,
            stale: None,
            veto: Veto::Unknown,
            veto_retry: now,
            veto_backoff: RETRY_MIN,
            peer: Peer::Away,
            peer_node: String::new(),
            disconnect: false,
            peer_retry: now,
            peer_backoff: RETRY_MIN,
            last_heard: now,
            last_ping: now,
            promotable: false,
            peer_whole: false,
            cycle: Cycle::Idle,
            busy: Busy::No,
            rest: Rest::Nothing,
            base: None,
            epoch: Epoch::ZERO,
            sealed: Epoch::ZERO,
            sealing: Duration::ZERO,
            mirrored: Epoch::ZERO,
            disks_wait: false,
            committed: Epoch::ZERO,
            next_cut: now,
            in_flight: VecDeque::new(),
            acked: None,
            last_cut: now,
            budget: Budget::new(now),
            hurried: false,
            output: false,
            pages: 0,
            pages_before: 0,
            early_at: None,
            early: false,
            again: false,
            share: 0,
            share_told: 0,
            share_next: now,
            hand_over: HandOver::No,
            answer: None,
            detach: None,
            sync_started: now,
            facts: Facts::default(),
            notes: Vec::new(),
        }
    }

    /// Share of its time for which the guest runs, percent.
    pub fn share(&self) -> u8 {
        SHARES[self.share]
    }
    /// For the status.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
    /// What was worth telling since the last call, oldest first.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }
    /// The machine's generation, zero while the VMM is not attached.
    pub fn generation(&self) -> Generation {
        self.vmm.as_ref().map_or(Generation::ZERO, |vmm| vmm.generation)
    }
    /// Whether the VMM was asked for what may have to wait for its storage, and has not answered.
    pub fn waits_for_storage(&self) -> bool {
        self.storage.is_some()
    }
    /// Newest committed and newest cut epoch.
    pub fn epochs(&self) -> (Epoch, Epoch) {
        (self.committed, self.epoch)
    }
    /// Whether a veto is known to stand.
    pub fn vetoed(&self) -> bool {
        self.veto == Veto::Standing
    }
    /// Gate held, peer up to date, no veto.
    pub fn protected(&self) -> bool {
        self.peer == Peer::Streaming && self.veto == Veto::Cleared && !self.gate_open && self.vmm.is_some()
    }
    /// Whether the peer has accepted us.
    pub fn connected(&self) -> bool {
        !matches!(self.peer, Peer::Away | Peer::Connecting | Peer::Greeting { .. })
    }
    /// Whether epochs stream, and the peer's image is whole.
    pub fn streaming(&self) -> bool {
        self.peer == Peer::Streaming && self.peer_whole
    }
    /// Whether a first copy is under way.
    pub fn syncing(&self) -> bool {
        matches!(self.peer, Peer::Begun | Peer::Disks { .. } | Peer::Copying { .. } | Peer::Rounds { .. } | Peer::Arm)
            || self.peer == Peer::Streaming && self.base.is_none()
    }
    /// Whether the peer holds a whole image that is the newest committed epoch.
    pub fn peer_up_to_date(&self) -> bool {
        self.peer_whole && !self.gate_open
    }
    /// Whether the peer holds a whole image.
    pub fn peer_whole(&self) -> bool {
        self.peer_whole
    }
    /// The generation that ended this one.
    pub fn stale(&self) -> Option<Generation> {
        self.stale
    }
    /// Whether it has nothing more to do: handed over, or ended by a newer generation.
    pub fn finished(&self) -> bool {
        self.hand_over == HandOver::Done || self.migration_ended() || self.stale.is_some() && self.vmm.is_none()
    }
    /// The source's state in S1's words.
    pub fn source(&self) -> SourceState {
        match (&self.vmm, self.peer, self.cycle) {
            (None, ..) => SourceState::Collapsed,
            (Some(_), Peer::Streaming, Cycle::Idle | Cycle::Early(_)) => SourceState::Migrating,
            (Some(_), Peer::Streaming, _) => SourceState::Separating,
            (Some(_), Peer::Begun | Peer::Disks { .. } | Peer::Copying { .. } | Peer::Rounds { .. } | Peer::Arm, _) => {
                SourceState::Startup
            }
            (Some(_), ..) => SourceState::Running,
        }
    }

    /// The next thing to do. Never blocks, never repeats an action that was not answered.
    pub fn next(&mut self, now: Instant) -> Action {
        if let Some(answer) = self.answer.take() {
            return Action::AnswerHandOver(answer);
        }
        if std::mem::take(&mut self.disconnect) {
            return Action::Disconnect;
        }
        if let Some(why) = self.detach.take() {
            self.forget_vmm(now, why);
            return Action::Detach;
        }
        if self.stale.is_some() {
            return self.next_when_stale(now);
        }
        if self.hand_over == HandOver::Done && self.peer != Peer::Streaming {
            // The machine belongs to the other node now: no veto, no gate, no new connection. Demote ends this.
            return Action::Wait(now + RETRY_MAX);
        }
        if self.migration_ended() {
            return Action::Wait(now + RETRY_MAX);
        }
        if self.vmm.is_none() {
            return if now >= self.vmm_retry { Action::Attach } else { Action::Wait(self.vmm_retry) };
        }
        if self.storage.is_some() {
            return self.next_beside_storage(now);
        }
        if self.hand_over == HandOver::Recorded {
            return self.ask_storage(Asked::Committed(self.epoch), Action::Committed(self.epoch), now);
        }
        match self.rest {
            Rest::Nothing => {}
            Rest::Keep(captured) => return self.seal_or_send(captured, now),
            Rest::KeepMore | Rest::Drop => return Action::CutContinue,
        }
        if self.share_told != self.share {
            self.share_told = self.share;
            self.asked = Asked::Throttle;
            return Action::Throttle(self.share());
        }
        if let Some(action) = self.next_for_veto(now) {
            return action;
        }
        self.next_for_peer(now)
    }

    fn next_when_stale(&mut self, now: Instant) -> Action {
        if self.vmm.is_some() {
            self.asked = Asked::Quit;
            return Action::Quit;
        }
        // A VMM of an old generation that appears later must be ended just as well.
        if now >= self.vmm_retry { Action::Attach } else { Action::Wait(self.vmm_retry) }
    }

    /// The VMM is asked for what may have to wait for its storage.
    fn ask_storage(&mut self, asked: Asked, action: Action, now: Instant) -> Action {
        self.asked = asked;
        self.storage = self.has_disks().then_some(now);
        action
    }

    /// The VMM waits for its storage: what needs no VMM goes on, so that the standby is still there when the storage answers.
    fn next_beside_storage(&mut self, now: Instant) -> Action {
        if let Some(action) = self.next_for_veto(now) {
            return action;
        }
        match self.peer {
            Peer::Away | Peer::Connecting | Peer::Greeting { sent: false } => Action::Wait(now + RETRY_MIN),
            _ => self.keep_in_touch(now).unwrap_or_else(Action::Wait),
        }
    }

    fn has_disks(&self) -> bool {
        self.vmm.as_ref().is_some_and(|vmm| vmm.disks)
    }

    fn next_for_veto(&mut self, now: Instant) -> Option<Action> {
        if self.migrates() {
            return None;
        }
        let streaming = self.peer == Peer::Streaming;
        match self.veto {
            Veto::Standing if !streaming && !self.gate_open && self.storage.is_none() => {
                self.asked = Asked::GateOpen;
                Some(Action::GateOpen)
            }
            Veto::Unknown | Veto::Cleared if !streaming && !self.gate_open && now >= self.veto_retry => {
                self.veto = Veto::Asking;
                Some(Action::Hook(VetoCall::Veto))
            }
            Veto::Unknown | Veto::Standing if streaming && self.promotable && now >= self.veto_retry => {
                self.veto = Veto::Clearing;
                Some(Action::Hook(VetoCall::ClearVeto))
            }
            _ => None,
        }
    }

    /// Listen for the peer's signs of life and give ours. `Err`: nothing is due before then.
    fn keep_in_touch(&mut self, now: Instant) -> Result<Action, Instant> {
        let silence = self.last_heard + self.config.peer_timeout;
        let ping = self.last_ping + self.config.peer_timeout / 4;
        if !matches!(self.peer, Peer::Away | Peer::Connecting | Peer::Greeting { sent: false }) {
            if now >= silence {
                let ms = self.config.peer_timeout.as_millis();
                self.lose_peer(now, format!("the standby has not answered for {ms} ms"));
                return Ok(self.next(now));
            }
            if now >= ping {
                self.last_ping = now;
                return Ok(Action::Send(Epoch::ZERO, Message::Ping));
            }
        }
        Err(silence.min(ping).min(if self.veto_retry > now { self.veto_retry } else { silence }))
    }

    fn next_for_peer(&mut self, now: Instant) -> Action {
        let wake = match self.keep_in_touch(now) {
            Ok(action) => return action,
            Err(wake) => wake,
        };
        match self.peer {
            Peer::Away if now >= self.peer_retry => {
                self.peer = Peer::Connecting;
                Action::Connect
            }
            Peer::Away => {
                Action::Wait(if self.veto_retry > now { self.peer_retry.min(self.veto_retry) } else { self.peer_retry })
            }
            Peer::Connecting => Action::Wait(now + Duration::from_millis(100)),
            Peer::Greeting { sent: false } => {
                self.peer = Peer::Greeting { sent: true };
                Action::Send(Epoch::ZERO, Message::Hello(self.hello()))
            }
            Peer::Greeting { sent: true } | Peer::Begun => Action::Wait(wake),
            Peer::Welcomed { wait: true, .. } if !self.gate_open => Action::Wait(wake),
            Peer::Welcomed { log_ready: false, .. } if self.log_on => Action::Harvest { send: false },
            Peer::Welcomed { log_ready: false, .. } => {
                self.asked = Asked::LogStart;
                Action::DirtyLogStart
            }
            Peer::Welcomed { log_ready: true, .. } => {
                self.peer = Peer::Begun;
                self.peer_whole = false;
                self.base = None;
                self.sync_started = now;
                Action::Send(Epoch::ZERO, Message::SyncBegin)
            }
            Peer::Disks { arm, stage } => self.next_for_copies(arm, stage, wake),
            Peer::Copying { first } => Action::CopySlice { first },
            Peer::Rounds { sending: Some(_), .. } => Action::SendDirty,
            Peer::Rounds { sending: None, .. } => self.next_for_arrival(wake).unwrap_or(Action::Harvest { send: true }),
            // A migration's only cut is its last.
            Peer::Arm => self.cut(now, true, self.migrates()),
            Peer::Streaming => self.next_in_cycle(now, wake),
        }
    }

    fn next_in_cycle(&mut self, now: Instant, wake: Instant) -> Action {
        // The guest stands still until all of its cut is taken: that is not to wait for storage.
        let stands_still = match self.cycle {
            Cycle::Continue => true,
            Cycle::Sending(captured) => captured.more,
            Cycle::Idle | Cycle::Early(_) | Cycle::Resend { .. } => false,
        };
        let may_wait = !(self.has_disks() && stands_still);
        if let Some(epoch) = self.acked.take_if(|_| may_wait) {
            if !self.migrates() {
                return self.ask_storage(Asked::Committed(epoch), Action::Committed(epoch), now);
            }
            // The VMM is told last: until the target has recorded it, nobody could run what the VMM gave away.
            self.hand_over = HandOver::Telling { deadline: None };
        }
        match self.cycle {
            Cycle::Early(captured) => return Action::SendPiece(captured),
            Cycle::Sending(_) if self.disks_wait => return Action::Wait(wake),
            Cycle::Sending(captured) => return self.seal_or_send(captured, now),
            Cycle::Continue => return Action::CutContinue,
            Cycle::Resend { after } => return Action::Resend { after },
            Cycle::Idle => {}
        }
        let oldest = self.in_flight.front().copied();
        if let Some(late) = oldest.filter(|oldest| now >= oldest.deadline) {
            let ms = self.config.peer_timeout.as_millis();
            self.lose_peer(now, format!("the standby has not acknowledged epoch {} within {ms} ms", late.epoch));
            return self.next(now);
        }
        let wake = oldest.map_or(wake, |oldest| wake.min(oldest.deadline));
        match self.hand_over {
            HandOver::Wanted if oldest.is_none() => self.cut(now, false, true),
            HandOver::Telling { deadline: None } => {
                self.hand_over = HandOver::Telling { deadline: Some(now + self.config.peer_timeout) };
                Action::Send(if self.migrates() { self.epoch } else { self.committed }, Message::HandedOver)
            }
            HandOver::Telling { deadline: Some(deadline) } if now < deadline => Action::Wait(wake.min(deadline)),
            HandOver::Telling { .. } if self.migrates() => {
                let ms = self.config.peer_timeout.as_millis();
                self.lose_peer(now, format!("the target has not confirmed the hand-over within {ms} ms"));
                self.next(now)
            }
            HandOver::Telling { .. } => {
                // It is committed there and stopped here: the word is a courtesy.
                self.handed_over();
                self.next(now)
            }
            HandOver::Wanted | HandOver::Cut | HandOver::Recorded | HandOver::Done => Action::Wait(wake),
            HandOver::No => self.next_cut_or_wait(now, wake, oldest),
        }
    }

    /// A piece of a cut is in the arena: with the last the epoch ends.
    fn seal_or_send(&mut self, captured: Captured, now: Instant) -> Action {
        if captured.more || !self.has_disks() || self.mirrored == self.epoch {
            return Action::SendPiece(captured);
        }
        if self.sealed == self.epoch {
            return if self.mirrors() { Action::SendDisks } else { Action::SendPiece(captured) };
        }
        self.ask_storage(Asked::SealDisks(self.epoch), Action::SealDisks(self.epoch), now)
    }

    fn next_cut_or_wait(&mut self, now: Instant, mut wake: Instant, oldest: Option<InFlight>) -> Action {
        if let Some(action) = self.next_for_slow_link(now, &mut wake, oldest) {
            return action;
        }
        // Until the first commit there is nothing to go on from after a broken link: one epoch at a time.
        let depth = if self.base.is_some() { self.config.pipeline.max(1) } else { 1 };
        if self.in_flight.len() >= depth {
            return Action::Wait(wake);
        }
        let due = if self.output {
            self.next_cut.min(self.budget.next(now).max(self.last_cut + self.config.min_interval))
        } else {
            self.next_cut
        };
        if now >= due {
            return self.cut(now, false, false);
        }
        match self.early_at {
            Some(at) if now >= at && !self.again => {
                self.early_at = None;
                self.busy = Busy::Copying;
                Action::Precopy(self.epoch.next())
            }
            Some(at) if !self.again => Action::Wait(wake.min(due).min(at)),
            _ => Action::Wait(wake.min(due)),
        }
    }

    /// The oldest checkpoint that is not committed is too old for a standby that may be given up.
    fn next_for_slow_link(&mut self, now: Instant, wake: &mut Instant, oldest: Option<InFlight>) -> Option<Action> {
        let SlowLink { policy: SlowPolicy::Solo, max_lag } = self.config.slow else { return None };
        let oldest = oldest?;
        let lag = now.saturating_duration_since(oldest.cut);
        if lag < max_lag {
            *wake = (*wake).min(oldest.cut + max_lag);
            return None;
        }
        self.lose_peer(now, format!("the standby is too slow: a checkpoint has waited for {} ms", lag.as_millis()));
        Some(self.next(now))
    }

    /// A checkpoint was acknowledged after so long: does the guest have to run slower, or may it run faster? (A standby that says nothing
    /// is not slow but lost: that slows nobody down.)
    fn judge_lag(&mut self, now: Instant, lag: Duration) {
        let SlowLink { policy, max_lag } = self.config.slow;
        let slower = lag >= max_lag && policy == SlowPolicy::Throttle && self.share + 1 < SHARES.len();
        let faster = lag < max_lag / 4 && self.share > 0;
        if now < self.share_next || !(slower || faster) {
            return;
        }
        self.share = if slower { self.share + 1 } else { self.share - 1 };
        self.share_next = now + max_lag;
        let ms = lag.as_millis();
        self.note(format!(
            "a checkpoint was committed after {ms} ms: the guest runs for {} % of the time",
            self.share()
        ));
    }

    fn cut(&mut self, now: Instant, arm: bool, last: bool) -> Action {
        self.epoch = self.epoch.next();
        self.hurried = now < self.next_cut && !last;
        self.next_cut = now + self.config.interval;
        self.last_cut = now;
        self.output = false;
        self.early_at = None;
        if last {
            self.hand_over = HandOver::Cut;
        }
        let again = std::mem::take(&mut self.again);
        self.busy = Busy::Cutting { again };
        Action::Cut { epoch: self.epoch, arm, last, again }
    }

    fn hello(&self) -> Hello {
        Hello {
            version: VERSION,
            machine: self.config.machine.clone(),
            node: self.config.node.clone(),
            ram_bytes: self.vmm.as_ref().map_or(0, |vmm| vmm.ram_bytes),
            session: self.session,
            went_on: self.gate_open,
            migration: self.migrates(),
            disks: self.vmm.as_ref().map_or_else(Vec::new, |vmm| vmm.mirrored.clone()),
        }
    }
}
