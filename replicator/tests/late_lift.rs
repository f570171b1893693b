//! A lift of the veto that is answered after its stream has ended (`docs/decisions/0010-takeover-is-model-checked.md`, finding 2).

use std::time::{Duration, Instant};

use understudy_protocol::control::{Attached, Captured};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::message::{Message, Welcome};
use understudy_replicator::sender::{Action, Event, Sender, SenderConfig, VetoCall};

/// A sender with a VMM and a standby that do what they are asked.
struct Scene {
    sender: Sender,
    now: Instant,
    /// Hooks that nobody has answered.
    hooks: Vec<VetoCall>,
    answers_hooks: bool,
    acknowledges: bool,
    /// The newest epoch that was sent.
    sent: Epoch,
}

impl Scene {
    fn new() -> Self {
        let now = Instant::now();
        let sender = Sender::new(SenderConfig::new("m", "n1", true), now);
        Self { sender, now, hooks: Vec::new(), answers_hooks: true, acknowledges: true, sent: Epoch::ZERO }
    }

    fn tell(&mut self, event: Event) {
        self.sender.event(event, self.now);
    }

    fn says(&mut self, epoch: Epoch, message: Message<'static>) {
        self.tell(Event::Message(Generation(1), epoch, message));
    }

    fn run_until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) {
        for _ in 0..10_000 {
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
                    disks: false,
                    mirrored: Vec::new(),
                };
                self.tell(Event::Attached { attached, last_cut: Epoch::ZERO, session: 7 });
            }
            Action::DirtyLogStart | Action::GateOpen | Action::Throttle(_) | Action::Committed(_) | Action::Quit => {
                self.tell(Event::VmmDone);
            }
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
