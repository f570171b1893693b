//! Scenes with a sender whose VMM, storage and standby answer when they are told to.

use std::time::{Duration, Instant};

use understudy_protocol::control::{Attached, Captured};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::message::{Message, Welcome};
use understudy_replicator::sender::{Action, Event, Sender, SenderConfig, VetoCall};

struct Scene {
    sender: Sender,
    now: Instant,
    /// Hooks that nobody has answered.
    hooks: Vec<VetoCall>,
    answers_hooks: bool,
    acknowledges: bool,
    /// The standby lives.
    alive: bool,
    disks: bool,
    storage_answers: bool,
    /// What the VMM's storage was asked for and has not answered.
    storage: Option<Action>,
    gate_opened: bool,
    /// The newest epoch that was sent.
    sent: Epoch,
}

impl Scene {
    fn new() -> Self {
        let now = Instant::now();
        let sender = Sender::new(SenderConfig::new("m", "n1", true), now);
        Self {
            sender,
            now,
            hooks: Vec::new(),
            answers_hooks: true,
            acknowledges: true,
            alive: true,
            disks: false,
            storage_answers: true,
            storage: None,
            gate_opened: false,
            sent: Epoch::ZERO,
        }
    }

    /// A machine with disks, protected.
    fn with_disks() -> Self {
        let mut scene = Self { disks: true, ..Self::new() };
        scene.run_until("a first commit", |s| s.sender.facts().epochs > 0);
        scene.says(Epoch::ZERO, Message::Promotable);
        scene.run_until("protection", |s| s.sender.protected());
        scene.gate_opened = false;
        scene
    }

    fn storage_answers(&mut self) {
        self.storage_answers = true;
        assert!(self.storage.take().is_some(), "it was asked for nothing");
        self.tell(Event::VmmDone);
    }

    fn tell(&mut self, event: Event) {
        self.sender.event(event, self.now);
    }

    fn says(&mut self, epoch: Epoch, message: Message<'static>) {
        self.tell(Event::Message(Generation(1), epoch, message));
    }

    fn run_until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) {
        for _ in 0..100_000 {
            if reached(self) {
                return;
            }
            self.step();
        }
        panic!("{what} never happens: {:?}", self.sender.facts());
    }

    fn step(&mut self) {
        let captured = |epoch, more: bool| Captured {
            epoch,
            pages: 0,
            indices_offset: 0,
            pages_offset: 0,
            state_offset: 0,
            state_len: u64::from(!more),
            more,
            pause_us: 0,
            vm_time_ns: 0,
        };
        match self.sender.next(self.now) {
            Action::Wait(until) => self.now = until.min(self.now + Duration::from_millis(5)),
            Action::Attach => {
                let attached = Attached {
                    generation: Generation(1),
                    ram_bytes: 1 << 20,
                    arena_bytes: 1 << 20,
                    disks: self.disks,
                    mirrored: Vec::new(),
                };
                self.tell(Event::Attached { attached, last_cut: Epoch::ZERO, session: 7 });
            }
            action @ (Action::SealDisks(_) | Action::Committed(_)) if self.disks && !self.storage_answers => {
                assert_eq!(self.storage, None, "it has not answered yet, and is asked for {action:?}");
                self.storage = Some(action);
            }
            Action::GateOpen => {
                assert_eq!(self.storage, None, "the VMM waits for its storage");
                self.gate_opened = true;
                self.tell(Event::VmmDone);
            }
            Action::DirtyLogStart
            | Action::Throttle(_)
            | Action::SealDisks(_)
            | Action::Committed(_)
            | Action::Quit => self.tell(Event::VmmDone),
            Action::Send(_, Message::Ping) if self.alive => self.says(Epoch::ZERO, Message::Pong),
            Action::Harvest { .. } => self.tell(Event::Harvested { pages: 0 }),
            Action::SendDirty => self.tell(Event::DirtySent { done: true }),
            Action::CopySlice { .. } => self.tell(Event::Copied { done: true }),
            Action::Cut { epoch, .. } => self.tell(Event::Captured(captured(epoch, false))),
            Action::Precopy(epoch) => self.tell(Event::Precopied(captured(epoch, true))),
            Action::SendPiece(piece) => {
                self.tell(Event::PieceSent { kept: true });
                if !piece.more {
                    self.sent = piece.epoch;
                    if self.acknowledges {
                        self.says(piece.epoch, Message::Ack);
                    }
                }
            }
            Action::Connect => self.tell(Event::Connected),
            Action::Send(_, Message::Hello(_)) => {
                let node = "n2".to_owned();
                let nothing = Welcome {
                    node,
                    whole: false,
                    generation: Generation::ZERO,
                    epoch: Epoch::ZERO,
                    session: 0,
                    copies: Vec::new(),
                };
                self.says(Epoch::ZERO, Message::Welcome(nothing));
            }
            Action::Send(_, Message::SyncBegin) => self.says(Epoch::ZERO, Message::SyncReady),
            Action::Hook(call) if self.answers_hooks => self.tell(Event::Hook(call, Ok(()))),
            Action::Hook(call) => self.hooks.push(call),
            Action::Send(..) | Action::Disconnect | Action::Detach => {}
            other => panic!("nobody asked for {other:?}"),
        }
    }
}

/// `docs/decisions/0010-takeover-is-model-checked.md`, finding 2.
#[test]
fn a_lift_that_is_answered_after_its_stream_has_ended_does_not_make_the_next_stream_a_protection() {
    let mut scene = Scene::new();
    scene.run_until("a first commit", |s| s.sender.facts().epochs > 0);
    scene.answers_hooks = false;
    scene.says(Epoch::ZERO, Message::Promotable);
    scene.run_until("the lift", |s| s.hooks == [VetoCall::ClearVeto]);

    // The standby loses its power and is back with nothing; its first copy is cut, and not committed.
    let before = scene.sent;
    scene.acknowledges = false;
    scene.tell(Event::PeerLost("power cut".into()));
    scene.run_until("the next first copy", |s| s.sent > before);
    scene.tell(Event::Hook(VetoCall::ClearVeto, Ok(())));
    assert!(!scene.sender.protected(), "the standby holds nothing yet");

    // Once it holds something the lift is asked for again.
    scene.hooks.clear();
    scene.acknowledges = true;
    scene.says(scene.sent, Message::Ack);
    scene.says(Epoch::ZERO, Message::Promotable);
    scene.run_until("the second lift", |s| s.hooks == [VetoCall::ClearVeto]);
    assert!(!scene.sender.protected());
    scene.tell(Event::Hook(VetoCall::ClearVeto, Ok(())));
    assert!(scene.sender.protected());
}

/// To give the standby up would help nobody: without protection too the machine waits for its storage.
#[test]
fn storage_that_is_silent_for_a_minute_costs_no_protection() {
    for commit in [false, true] {
        let mut scene = Scene::with_disks();
        if commit {
            scene.run_until("a checkpoint on its way", |s| s.sender.epochs().0 < s.sender.epochs().1);
        }
        scene.storage_answers = false;
        scene.run_until("a question", |s| s.storage.is_some());
        let end = scene.now + Duration::from_secs(60);
        scene.run_until("a minute", |s| s.now >= end);
        assert!(scene.sender.waits_for_storage());
        assert!(scene.sender.protected(), "{:?}", scene.sender.facts());
        let epochs = scene.sender.facts().epochs;
        scene.storage_answers();
        scene.run_until("commits", |s| s.sender.facts().epochs > epochs + 3);
        assert_eq!((scene.sender.facts().losses, scene.hooks.len(), scene.gate_opened), (0, 0, false));
        assert_eq!(scene.sender.share(), 100, "a slow guest makes no storage faster");
    }
}

#[test]
fn a_standby_that_is_lost_while_the_storage_is_silent_is_lost() {
    let mut scene = Scene::with_disks();
    scene.storage_answers = false;
    scene.run_until("a question", |s| s.storage.is_some());
    scene.answers_hooks = false;
    scene.alive = false;
    scene.run_until("the veto", |s| s.hooks == [VetoCall::Veto]);
    assert!(!scene.sender.protected());
    scene.tell(Event::Hook(VetoCall::Veto, Ok(())));
    let end = scene.now + Duration::from_secs(5);
    scene.run_until("a while", |s| s.now >= end);
    assert!(!scene.gate_opened);
    scene.storage_answers();
    scene.run_until("the gate", |s| s.gate_opened);
}
