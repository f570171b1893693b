//! The sender's decisions, without any I/O: events in, one *action* at a time out.
//!
//! ```text
//!  peer:  Away ─► Connecting ─► Greeting ─► Welcomed ─► Begun ─► Copying ─► Rounds ─► Streaming
//!          ▲                                   └── image continues this very dirty log ──────►│
//!          └──────────────────────────── lost, silent, failed ────────────────────────────────┘
//!  cycle (while Streaming):  Idle ─Cut─► Sending ⇄ CutContinue ─► AwaitAck ─► Acked ─Committed─► Idle
//! ```
//! Beside it runs the *veto*, the cluster's durable word that the standby must not be promoted. The rules that tie them:
//! * `GateOpen` only while a veto stands and no epochs stream.
//! * The veto is lifted only after the first commit of a stream and the standby's word that the cluster knows it.
//! * A veto that was asked for or lifted without a clear answer counts as neither standing nor lifted: it is asked for
//!   again before the gate opens, and lifted again before protection is claimed.
//! * A first copy destroys what the standby holds. If that is a whole image of this machine's present, the copy waits until
//!   the gate has been opened under a veto: until then the old image is what the cluster would fall back on.
//! * Once a newer generation has shown itself the only action left is to end the machine here.
//!
//! The caller performs each action to its end, reports with the matching [`Event`], and feeds in whatever else
//! happened, before it asks for the next.

use std::time::{Duration, Instant};

use understudy_protocol::control::{Attached, Captured, HandedOver, SourceState};
use understudy_protocol::ids::{Epoch, Generation};

use crate::message::{Hello, Message, VERSION, Welcome};

/// What the sender is given by its administrator.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// The machine's name.
    pub machine: String,
    /// This node's name.
    pub node: String,
    /// From cut to cut.
    pub interval: Duration,
    /// Silence after which the peer counts as lost.
    pub peer_timeout: Duration,
    /// There is a cluster behind the hook: a veto means something.
    pub clustered: bool,
}

/// What the hook is asked to do for the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VetoCall {
    /// Make durable that no other node is promoted.
    Veto,
    /// Lift that.
    ClearVeto,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Nothing until an event comes or the time is reached.
    Wait(Instant),
    /// Connect to the VMM and attach. → `Attached`, `VmmLost` or `VmmRefused`.
    Attach,
    /// Close the VMM's session (it resumes the guest by itself). No event.
    Detach,
    /// Tell the VMM to quit: the machine runs elsewhere. → `VmmDone` or `VmmLost`.
    Quit,
    /// → `VmmDone`, `VmmLost`, `VmmRefused`.
    DirtyLogStart,
    /// Fetch the dirty log; `send`: its pages are to be sent by later `SendDirty`. → `Harvested`.
    Harvest {
        /// Keep the bitmap.
        send: bool,
    },
    /// Send the next pages of the bitmap. → `DirtySent` or `PeerLost`.
    SendDirty,
    /// Send the next slice of RAM, from the start if `first`. → `Copied` or `PeerLost`.
    CopySlice {
        /// Begin at page zero.
        first: bool,
    },
    /// → `Captured`.
    Cut {
        /// Epoch that ends.
        epoch: Epoch,
        /// Gate to `Hold`.
        arm: bool,
        /// Stay stopped.
        last: bool,
    },
    /// → `Captured`.
    CutContinue,
    /// Encode and send the arena's content; after the last piece also the end of the epoch. → `PieceSent` in any
    /// case, then `PeerLost` if sending failed.
    SendPiece(Captured),
    /// Send the kept epoch again. → `Resent` or `PeerLost`.
    Resend,
    /// → `VmmDone`.
    Committed(Epoch),
    /// → `VmmDone`.
    GateOpen,
    /// Connect to the next peer, in the background. → `Connected` or `PeerLost` later.
    Connect,
    /// Send. → nothing, or `PeerLost`.
    Send(Epoch, Message<'static>),
    /// Close the connection with the peer. No event.
    Disconnect,
    /// Ask the hook, in the background. → `Hook` later.
    Hook(VetoCall),
    /// Answer the pending hand-over.
    AnswerHandOver(Result<HandedOver, String>),
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // Each is named at the action that it answers.
pub enum Event {
    Attached {
        attached: Attached,
        /// The last epoch that was cut in the machine's life here, as the VMM knows it.
        last_cut: Epoch,
        /// Random, new for every attachment.
        session: u64,
    },
    VmmLost(String),
    VmmRefused(String),
    VmmDone,
    Harvested {
        pages: u64,
    },
    DirtySent {
        done: bool,
    },
    Copied {
        done: bool,
    },
    Captured(Captured),
    /// `kept`: the whole epoch so far is kept for a resend.
    PieceSent {
        kept: bool,
    },
    Resent,
    Connected,
    PeerLost(String),
    /// The peer said something.
    Message(Generation, Epoch, Message<'static>),
    /// A sender of this generation has knocked at this node's door.
    NewerGeneration(Generation),
    Hook(VetoCall, Result<(), String>),
    /// Hand over the machine.
    HandOver,
}

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
    Committed,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cycle {
    Idle,
    /// The arena holds a piece to send.
    Sending(Captured),
    /// The arena was taken; more is to come.
    Continue,
    /// All of the epoch is on its way.
    AwaitAck {
        deadline: Instant,
    },
    Resend,
    /// The peer has committed; the VMM does not know yet.
    Acked,
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
#[derive(Debug, Clone, Copy)]
struct Base {
    committed: Epoch,
    /// A complete epoch after that is kept for sending again.
    kept: Option<Epoch>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HandOver {
    No,
    Wanted,
    /// The last cut was made.
    Cut,
    /// The VMM knows the commit; the peer is told.
    Telling {
        deadline: Option<Instant>,
    },
    Done,
}

/// How often an outdated picture is looked at again: reconnects, hook retries.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
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
    /// The peer was lost in the middle of an epoch that is still to be taken from the VMM.
    rest: Rest,
    base: Option<Base>,
    epoch: Epoch,
    committed: Epoch,
    next_cut: Instant,

    hand_over: HandOver,
    answer: Option<Result<HandedOver, String>>,
    detach: Option<String>,

    sync_started: Instant,
    facts: Facts,
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
            config,
            vmm: None,
            session: 0,
            log_on: false,
            gate_open: false,
            vmm_retry: now,
            asked: Asked::Nothing,
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
            rest: Rest::Nothing,
            base: None,
            epoch: Epoch::ZERO,
            committed: Epoch::ZERO,
            next_cut: now,
            hand_over: HandOver::No,
            answer: None,
            detach: None,
            sync_started: now,
            facts: Facts::default(),
        }
    }

    /// For the status.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }
    /// The machine's generation, zero while the VMM is not attached.
    pub fn generation(&self) -> Generation {
        self.vmm.as_ref().map_or(Generation::ZERO, |vmm| vmm.generation)
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
    /// Whether a first copy is under way.
    pub fn syncing(&self) -> bool {
        matches!(self.peer, Peer::Begun | Peer::Copying { .. } | Peer::Rounds { .. } | Peer::Arm)
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
        self.hand_over == HandOver::Done || self.stale.is_some() && self.vmm.is_none()
    }
    /// The source's state in S1's words.
    pub fn source(&self) -> SourceState {
        match (&self.vmm, self.peer, self.cycle) {
            (None, ..) => SourceState::Collapsed,
            (Some(_), Peer::Streaming, Cycle::Idle) => SourceState::Migrating,
            (Some(_), Peer::Streaming, _) => SourceState::Separating,
            (Some(_), Peer::Begun | Peer::Copying { .. } | Peer::Rounds { .. } | Peer::Arm, _) => SourceState::Startup,
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
        if self.vmm.is_none() {
            return if now >= self.vmm_retry { Action::Attach } else { Action::Wait(self.vmm_retry) };
        }
        match self.rest {
            Rest::Nothing => {}
            Rest::Keep(captured) => return Action::SendPiece(captured),
            Rest::KeepMore | Rest::Drop => return Action::CutContinue,
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

    fn next_for_veto(&mut self, now: Instant) -> Option<Action> {
        let streaming = self.peer == Peer::Streaming;
        match self.veto {
            Veto::Standing if !streaming && !self.gate_open => {
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

    fn next_for_peer(&mut self, now: Instant) -> Action {
        let silence = self.last_heard + self.config.peer_timeout;
        let ping = self.last_ping + self.config.peer_timeout / 4;
        if !matches!(self.peer, Peer::Away | Peer::Connecting | Peer::Greeting { sent: false }) {
            if now >= silence {
                let ms = self.config.peer_timeout.as_millis();
                self.lose_peer(now, format!("the standby has not answered for {ms} ms"));
                return self.next(now);
            }
            if now >= ping {
                self.last_ping = now;
                return Action::Send(Epoch::ZERO, Message::Ping);
            }
        }
        let wake = silence.min(ping).min(if self.veto_retry > now { self.veto_retry } else { silence });
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
            Peer::Copying { first } => Action::CopySlice { first },
            Peer::Rounds { sending: Some(_), .. } => Action::SendDirty,
            Peer::Rounds { sending: None, .. } => Action::Harvest { send: true },
            Peer::Arm => self.cut(now, true, false),
            Peer::Streaming => self.next_in_cycle(now, wake),
        }
    }

    fn next_in_cycle(&mut self, now: Instant, wake: Instant) -> Action {
        match self.cycle {
            Cycle::Idle => match self.hand_over {
                HandOver::Wanted => self.cut(now, false, true),
                HandOver::Telling { deadline: None } => {
                    self.hand_over = HandOver::Telling { deadline: Some(now + self.config.peer_timeout) };
                    Action::Send(self.committed, Message::HandedOver)
                }
                HandOver::Telling { deadline: Some(deadline) } if now < deadline => Action::Wait(wake.min(deadline)),
                HandOver::Telling { .. } => {
                    // It is committed there and stopped here: the word is a courtesy.
                    self.handed_over();
                    self.next(now)
                }
                HandOver::Cut | HandOver::Done => Action::Wait(wake),
                HandOver::No if now >= self.next_cut => self.cut(now, false, false),
                HandOver::No => Action::Wait(wake.min(self.next_cut)),
            },
            Cycle::Sending(captured) => Action::SendPiece(captured),
            Cycle::Continue => Action::CutContinue,
            Cycle::Resend => Action::Resend,
            Cycle::AwaitAck { deadline } if now >= deadline => {
                let ms = self.config.peer_timeout.as_millis();
                self.lose_peer(now, format!("the standby has not acknowledged epoch {} within {ms} ms", self.epoch));
                self.next(now)
            }
            Cycle::AwaitAck { deadline } => Action::Wait(wake.min(deadline)),
            Cycle::Acked => {
                self.asked = Asked::Committed;
                Action::Committed(self.epoch)
            }
        }
    }

    fn cut(&mut self, now: Instant, arm: bool, last: bool) -> Action {
        self.epoch = self.epoch.next();
        self.next_cut = now + self.config.interval;
        if last {
            self.hand_over = HandOver::Cut;
        }
        Action::Cut { epoch: self.epoch, arm, last }
    }

    fn hello(&self) -> Hello {
        Hello {
            version: VERSION,
            machine: self.config.machine.clone(),
            node: self.config.node.clone(),
            ram_bytes: self.vmm.as_ref().map_or(0, |vmm| vmm.ram_bytes),
            session: self.session,
            went_on: self.gate_open,
        }
    }

    /// Take in what happened.
    pub fn event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Attached { attached, last_cut, session } => {
                let generation = attached.generation;
                self.vmm = Some(attached);
                self.session = session;
                self.log_on = false;
                self.gate_open = false;
                self.rest = Rest::Nothing;
                self.base = None;
                self.cycle = Cycle::Idle;
                self.epoch = self.epoch.max(last_cut);
                self.veto_retry = now;
                self.peer_retry = now;
                self.stale = self.stale.filter(|newer| *newer > generation);
                if self.stale.is_none() {
                    self.note(format!("attached to the VMM, generation {generation}"));
                }
            }
            Event::VmmLost(why) => self.forget_vmm(now, format!("the VMM's session ended: {why}")),
            Event::VmmRefused(why) => self.vmm_refused(now, why),
            Event::VmmDone => self.vmm_done(now),
            Event::Harvested { pages } => self.harvested(pages),
            Event::DirtySent { done: true } => self.round_sent(),
            Event::DirtySent { done: false } => {}
            Event::Copied { done } => {
                if let Peer::Copying { first } = &mut self.peer {
                    *first = false;
                    if done {
                        self.peer = Peer::Rounds { round: 0, previous: u64::MAX, sending: None };
                    }
                }
            }
            Event::Captured(captured) => self.captured(captured),
            Event::PieceSent { kept } => self.piece_sent(kept, now),
            Event::Resent => {
                if self.cycle == Cycle::Resend {
                    self.cycle = Cycle::AwaitAck { deadline: now + self.config.peer_timeout };
                }
            }
            Event::Connected => {
                if self.peer == Peer::Connecting {
                    self.peer = Peer::Greeting { sent: false };
                    self.last_heard = now;
                    self.last_ping = now;
                } else {
                    // Nobody waits for it any more.
                    self.disconnect = true;
                }
            }
            Event::PeerLost(why) => self.lose_peer(now, why),
            Event::Message(generation, epoch, message) => self.message(generation, epoch, message, now),
            Event::NewerGeneration(generation) => {
                if generation > self.generation() {
                    self.found_stale(generation, now);
                }
            }
            Event::Hook(call, result) => self.hook_done(call, result, now),
            Event::HandOver => self.want_hand_over(),
        }
    }

    fn vmm_done(&mut self, now: Instant) {
        match std::mem::replace(&mut self.asked, Asked::Nothing) {
            Asked::Nothing => {}
            Asked::LogStart => {
                self.log_on = true;
                if let Peer::Welcomed { log_ready, .. } = &mut self.peer {
                    *log_ready = true;
                }
            }
            Asked::GateOpen => {
                // What the standby holds is the past from now on.
                self.gate_open = true;
                self.base = None;
                self.note(if self.config.clustered {
                    "runs unprotected: the veto against the standby is durable, outputs leave at once".into()
                } else {
                    "runs unprotected, without a durable record (there is no cluster): outputs leave at once".into()
                });
            }
            Asked::Committed => self.committed_told(now),
            Asked::Quit => self.forget_vmm(now, self.facts.note.clone()),
        }
    }

    fn committed_told(&mut self, now: Instant) {
        self.committed = self.epoch;
        self.base = Some(Base { committed: self.epoch, kept: None });
        self.cycle = Cycle::Idle;
        self.facts.epochs += 1;
        self.facts.committed_at = Some(now);
        self.peer_backoff = RETRY_MIN;
        if !self.peer_whole {
            self.peer_whole = true;
            self.facts.last_sync = now - self.sync_started;
            let (node, ms) = (self.peer_node.clone(), self.facts.last_sync.as_millis());
            self.note(format!("the first copy to {node} took {ms} ms; epoch {} is its first checkpoint", self.epoch));
        }
        if self.hand_over == HandOver::Cut {
            self.hand_over = HandOver::Telling { deadline: None };
        }
    }

    fn harvested(&mut self, pages: u64) {
        match &mut self.peer {
            Peer::Welcomed { log_ready, .. } => *log_ready = true,
            Peer::Rounds { sending, .. } => *sending = Some(pages),
            _ => {}
        }
    }

    fn round_sent(&mut self) {
        let Peer::Rounds { round, previous, sending: Some(pages) } = self.peer else { return };
        // When a round does not shrink to three quarters of the last, more rounds would only warm the network.
        let hopeless = round >= 1 && pages > previous / 4 * 3;
        self.peer = if pages <= FEW_PAGES || round + 1 >= MAX_ROUNDS || hopeless {
            Peer::Arm
        } else {
            Peer::Rounds { round: round + 1, previous: pages, sending: None }
        };
    }

    fn captured(&mut self, captured: Captured) {
        match self.rest {
            Rest::Nothing => {}
            Rest::Keep(_) | Rest::KeepMore => {
                self.rest = Rest::Keep(captured);
                return;
            }
            Rest::Drop => {
                self.rest = if captured.more { Rest::Drop } else { Rest::Nothing };
                return;
            }
        }
        if self.peer == Peer::Arm {
            self.peer = Peer::Streaming;
            // The cut switched the gate to hold.
            self.gate_open = false;
            self.promotable = false;
        }
        if self.peer == Peer::Streaming {
            self.cycle = Cycle::Sending(captured);
        } else {
            self.rest = if captured.more { Rest::Drop } else { Rest::Nothing };
            self.base = None;
        }
    }

    fn piece_sent(&mut self, kept: bool, now: Instant) {
        if let Rest::Keep(captured) = self.rest {
            self.rest = if captured.more { Rest::KeepMore } else { Rest::Nothing };
            if !captured.more {
                self.keep(kept);
            }
            return;
        }
        let Cycle::Sending(captured) = self.cycle else { return };
        if captured.more {
            self.cycle = Cycle::Continue;
            return;
        }
        self.cycle = Cycle::AwaitAck { deadline: now + self.config.peer_timeout };
        self.keep(kept);
    }

    /// All of the epoch is encoded; if it could be kept, a standby that lacks only it can be served after a broken link.
    fn keep(&mut self, kept: bool) {
        let epoch = self.epoch;
        self.base = self.base.filter(|_| kept).map(|base| Base { kept: Some(epoch), ..base });
    }

    fn message(&mut self, generation: Generation, epoch: Epoch, message: Message<'static>, now: Instant) {
        if matches!(self.peer, Peer::Away | Peer::Connecting) {
            return;
        }
        self.last_heard = now;
        match (message, self.peer) {
            (Message::Welcome(welcome), Peer::Greeting { .. }) => self.welcomed(welcome, now),
            (Message::Stale, _) => {
                if generation > self.generation() {
                    self.found_stale(generation, now);
                } else {
                    self.lose_peer(now, "the standby calls this generation old without knowing a newer one".into());
                }
            }
            (Message::Refused(why) | Message::Failed(why), _) => self.lose_peer(now, why),
            (Message::SyncReady, Peer::Begun) => self.peer = Peer::Copying { first: true },
            (Message::Ack, Peer::Streaming) => {
                if matches!(self.cycle, Cycle::AwaitAck { .. }) && epoch == self.epoch {
                    self.cycle = Cycle::Acked;
                }
            }
            (Message::Promotable, Peer::Streaming) => {
                self.promotable = true;
                self.veto_retry = now;
            }
            (Message::HandedOverAck, Peer::Streaming) => self.handed_over(),
            _ => {}
        }
    }

    fn welcomed(&mut self, welcome: Welcome, now: Instant) {
        self.peer_node = welcome.node.clone();
        let ours = welcome.whole && welcome.generation == self.generation();
        self.peer_whole = ours;
        if ours {
            self.epoch = self.epoch.max(welcome.epoch);
        }
        self.promotable = false;
        let resumable = self.base.filter(|_| ours && !self.gate_open && welcome.session == self.session);
        let cycle = match resumable {
            Some(Base { committed, kept: None }) if welcome.epoch == committed => Some(Cycle::Idle),
            Some(Base { kept: Some(kept), .. }) if welcome.epoch == kept => Some(Cycle::Acked),
            Some(Base { committed, kept: Some(_) }) if welcome.epoch == committed => Some(Cycle::Resend),
            _ => None,
        };
        if let Some(cycle) = cycle {
            self.peer = Peer::Streaming;
            self.cycle = cycle;
            self.next_cut = now;
            self.peer_backoff = RETRY_MIN;
            self.note(format!("{} is back with epoch {}; going on from there", welcome.node, welcome.epoch));
        } else {
            self.base = None;
            self.peer = Peer::Welcomed { wait: ours && self.config.clustered, log_ready: false };
            self.note(format!("connected to {}; a first copy is needed", welcome.node));
        }
    }

    fn vmm_refused(&mut self, now: Instant, why: String) {
        let pause = Duration::from_secs(1);
        if self.vmm.is_none() {
            self.vmm_retry = now + RETRY_MIN;
            self.note(format!("the VMM cannot be replicated yet: {why}"));
            return;
        }
        if self.hand_over == HandOver::Cut {
            self.fail_hand_over(format!("the VMM refused the last checkpoint: {why}"));
            self.detach = Some("the hand-over failed".into());
            return;
        }
        if self.peer == Peer::Streaming && self.cycle == Cycle::Idle {
            // It cannot be cut now (it shuts down, for example): the image stays what it is.
            self.next_cut = now + pause;
            self.note(format!("the VMM refused a checkpoint: {why}"));
            return;
        }
        // Anything else in the middle of something: begin again with a fresh session.
        self.detach = Some(format!("the VMM refused a request: {why}"));
    }

    fn forget_vmm(&mut self, now: Instant, why: String) {
        let had = self.vmm.take().is_some();
        self.vmm_retry = now + RETRY_MIN;
        self.base = None;
        self.rest = Rest::Nothing;
        self.gate_open = false;
        self.log_on = false;
        self.asked = Asked::Nothing;
        if had && self.peer != Peer::Away {
            self.lose_peer(now, why);
        } else {
            self.note(why);
        }
        self.cycle = Cycle::Idle;
        self.detach = None;
        if matches!(self.hand_over, HandOver::Wanted | HandOver::Cut) {
            self.fail_hand_over("the VMM's session ended during the hand-over".into());
        }
    }

    fn lose_peer(&mut self, now: Instant, why: String) {
        if self.peer == Peer::Away {
            return;
        }
        let was_protected = self.protected();
        if was_protected {
            self.facts.losses += 1;
        }
        self.disconnect = self.peer != Peer::Connecting;
        if self.peer == Peer::Streaming {
            match self.cycle {
                Cycle::Sending(captured) if self.base.is_some() => self.rest = Rest::Keep(captured),
                Cycle::Continue if self.base.is_some() => self.rest = Rest::KeepMore,
                Cycle::Sending(captured) if captured.more => self.rest = Rest::Drop,
                Cycle::Continue => self.rest = Rest::Drop,
                Cycle::Sending(_) => {}
                // Acknowledged, but the VMM was not told: the standby has it, and will say so when it is back.
                Cycle::Idle | Cycle::AwaitAck { .. } | Cycle::Resend | Cycle::Acked => {}
            }
            self.veto_retry = now;
            self.veto_backoff = RETRY_MIN;
        }
        match self.hand_over {
            HandOver::Telling { .. } => self.handed_over(),
            HandOver::Cut => {
                self.fail_hand_over(format!("the standby was lost during the hand-over: {why}"));
                // Only the end of the session makes the VMM run again.
                self.detach = Some("the hand-over failed; the machine runs on here".into());
            }
            HandOver::Wanted => self.fail_hand_over(format!("the standby was lost: {why}")),
            HandOver::No | HandOver::Done => {}
        }
        self.cycle = Cycle::Idle;
        self.peer = Peer::Away;
        self.promotable = false;
        self.peer_retry = now + self.peer_backoff;
        self.peer_backoff = (self.peer_backoff * 2).min(Duration::from_secs(1));
        self.note(if was_protected { format!("protection lost: {why}") } else { why });
    }

    fn hook_done(&mut self, call: VetoCall, result: Result<(), String>, now: Instant) {
        let ok = result.is_ok();
        if let Err(why) = result {
            self.veto_retry = now + self.veto_backoff;
            self.veto_backoff = (self.veto_backoff * 2).min(RETRY_MAX);
            let what = match call {
                VetoCall::Veto => "the veto against the standby is not durable; outputs wait",
                VetoCall::ClearVeto => "the veto against the standby could not be lifted; it cannot take over yet",
            };
            self.note(format!("{what}: {why}"));
        } else {
            self.veto_backoff = RETRY_MIN;
        }
        self.veto = match call {
            VetoCall::Veto if ok => Veto::Standing,
            VetoCall::ClearVeto if ok => Veto::Cleared,
            _ => Veto::Unknown,
        };
        if self.protected() {
            self.note(format!("protected: {} holds epoch {}", self.peer_node, self.committed));
        }
    }

    fn want_hand_over(&mut self) {
        if self.hand_over == HandOver::Done {
            self.answer = Some(Ok(HandedOver { epoch: self.committed }));
        } else if self.hand_over != HandOver::No {
            // Under way already: whoever asks again hears the same answer.
        } else if !self.protected() {
            let why = "the machine cannot be handed over: no standby is up to date (see the status)";
            self.answer = Some(Err(why.into()));
        } else {
            self.hand_over = HandOver::Wanted;
        }
    }

    fn handed_over(&mut self) {
        if matches!(self.hand_over, HandOver::Telling { .. }) {
            self.hand_over = HandOver::Done;
            self.answer = Some(Ok(HandedOver { epoch: self.committed }));
            self.note(format!("handed over at epoch {}; the machine is stopped here", self.committed));
        }
    }

    fn fail_hand_over(&mut self, why: String) {
        self.hand_over = HandOver::No;
        self.answer = Some(Err(format!("{why}; the machine runs on here")));
    }

    fn found_stale(&mut self, generation: Generation, now: Instant) {
        if matches!(self.hand_over, HandOver::Telling { .. } | HandOver::Done) {
            // As planned: the machine runs over there. Losing the peer completes the hand-over.
            return self.lose_peer(now, format!("generation {generation} has taken the machine over"));
        }
        let note = format!(
            "generation {generation} of the machine runs elsewhere; generation {} is ended here",
            self.generation()
        );
        self.stale = self.stale.max(Some(generation));
        self.lose_peer(now, note.clone());
        self.detach = None;
        self.note(note);
    }

    fn note(&mut self, note: String) {
        self.facts.note = note;
    }
}
