//! The board's side: who owns the line, what it has taken, what it has said.
//!
//! The board service calls in with what it received and read, and takes out what is to be sent ([`BoardPort::poll`]) and
//! written to the line ([`BoardPort::output`], [`BoardPort::written`]). It must do the two latter and the write itself
//! under one lock with everything else: that is what makes "is this still the owner?" and "write it" one step.

use std::collections::VecDeque;

use super::message::{Attach, Attached, Cell, Direction, Event, MAX_DATA, MAX_OFFSET, Message};
use crate::ids::Generation;

/// One connection, numbered by the service; never used twice in one run.
pub type SessionId = u64;

/// Most events kept for the next session.
const MAX_UNREPORTED: usize = 64;

/// What a port is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// The machine that may attach.
    pub machine: String,
    /// The device's name.
    pub device: String,
    /// Which run of the service this is.
    pub incarnation: u64,
    /// Output bytes accepted and not yet written, at most.
    pub window: u32,
    /// Input bytes kept, at most. Then the device is not read any more.
    pub input_capacity: usize,
}

/// What must be durable before a new owner hears that it is the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ownership {
    /// Highest generation seen.
    pub generation: Generation,
    /// The life that the offsets count in.
    pub life: Generation,
    /// Output offset from which the line goes on.
    pub applied: u64,
    /// Oldest input offset kept.
    pub in_base: u64,
    /// Offset after the newest input.
    pub in_end: u64,
}

/// What survives a restart of the service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Saved {
    /// Owner and offsets.
    pub ownership: Ownership,
    /// Input from `in_base` to `in_end`.
    pub input: Vec<u8>,
}

/// What the service is to do with a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Send it this.
    Send(SessionId, Message),
    /// Close it once that is sent.
    Close(SessionId),
}

/// What became of an attach, for logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The message was no attach, or it was refused.
    Nothing,
    /// This session owns the line now.
    Owner,
}

#[derive(Debug)]
struct Owner {
    id: SessionId,
    /// Input has been sent up to here.
    sent: u64,
}

/// One device of a board.
#[derive(Debug)]
pub struct BoardPort {
    config: PortConfig,
    generation: Generation,
    life: Generation,
    owner: Option<Owner>,
    /// Output offset from which the line goes on.
    applied: u64,
    /// Output from `applied` on that the *current owner* sent and the line has not taken.
    pending: VecDeque<u8>,
    in_base: u64,
    input: VecDeque<u8>,
    busy: bool,
    cells: Vec<(Cell, u32)>,
    changed: Vec<(Cell, u32)>,
    unreported: VecDeque<Event>,
    history: VecDeque<Event>,
    outbox: VecDeque<Output>,
}

impl BoardPort {
    /// A port, new or as a former run of the service left it.
    pub fn new(config: PortConfig, saved: Option<Saved>) -> Self {
        let kept = saved.is_some();
        let Saved { ownership, input } = saved.unwrap_or_default();
        let mut port = Self {
            generation: ownership.generation,
            life: ownership.life,
            owner: None,
            applied: ownership.applied,
            pending: VecDeque::new(),
            in_base: ownership.in_base,
            input: input.into(),
            busy: false,
            cells: Vec::new(),
            changed: Vec::new(),
            unreported: VecDeque::new(),
            history: VecDeque::new(),
            outbox: VecDeque::new(),
            config,
        };
        let incarnation = port.config.incarnation;
        port.report(Event::Reset { incarnation, kept });
        port
    }

    /// Owner and offsets as they are.
    pub fn ownership(&self) -> Ownership {
        Ownership {
            generation: self.generation,
            life: self.life,
            applied: self.applied,
            in_base: self.in_base,
            in_end: self.in_end(),
        }
    }

    /// All that a restart needs.
    pub fn saved(&self) -> Saved {
        Saved { ownership: self.ownership(), input: self.input.iter().copied().collect() }
    }

    /// The session that owns the line, if one is connected.
    pub fn owner(&self) -> Option<SessionId> {
        self.owner.as_ref().map(|o| o.id)
    }

    /// Output bytes accepted and not yet written.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Input bytes kept.
    pub fn input_len(&self) -> usize {
        self.input.len()
    }

    /// The newest events, oldest first, at most 64.
    pub fn history(&self) -> impl Iterator<Item = &Event> {
        self.history.iter()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<Output> {
        self.outbox.pop_front()
    }

    /// A peer has proved that it holds the key.
    pub fn opened(&mut self, id: SessionId) {
        let PortConfig { incarnation, machine, device, .. } = &self.config;
        let hello = Message::Hello { incarnation: *incarnation, machine: machine.clone(), device: device.clone() };
        self.outbox.push_back(Output::Send(id, hello));
    }

    /// A connection is gone, for whatever reason. What its owner sent and the line has not taken is forgotten: the next
    /// attach says where the line stands, and the rest is sent again.
    pub fn closed(&mut self, id: SessionId) {
        if self.owner() == Some(id) {
            self.owner = None;
            self.pending.clear();
        }
    }

    /// A message came in. `store` makes a change of ownership durable; if it cannot, it says so in a sentence, and
    /// nothing has changed.
    pub fn received(
        &mut self,
        id: SessionId,
        generation: Generation,
        message: Message,
        store: &mut dyn FnMut(&Ownership) -> Result<(), String>,
    ) -> Verdict {
        match message {
            Message::Attach(attach) => return self.attach(id, generation, &attach, store),
            Message::Ping { token } => self.outbox.push_back(Output::Send(id, Message::Pong { token })),
            Message::Detach => {
                self.closed(id);
                self.outbox.push_back(Output::Close(id));
            }
            // Only the owner may go on from here, and only under the newest generation. A session that lost the line was
            // told so and closed; what it had in the pipe ends here.
            _ if self.owner() != Some(id) || generation != self.generation => {
                if self.owner() == Some(id) || generation >= self.generation {
                    self.refuse(id, "it is not attached".into());
                } else {
                    self.outbox.push_back(Output::Send(id, Message::Stale { current: self.generation }));
                    self.outbox.push_back(Output::Close(id));
                }
            }
            Message::Out { offset, bytes } => self.out(id, offset, &bytes),
            Message::InAck { upto } => self.in_ack(id, upto),
            Message::Set { cell, value } => self.set(cell, value),
            Message::Hello { .. }
            | Message::Attached(_)
            | Message::Stale { .. }
            | Message::Refused { .. }
            | Message::Fenced { .. }
            | Message::OutAck { .. }
            | Message::In { .. }
            | Message::Event(_)
            | Message::Pong { .. } => self.refuse(id, "a machine does not send this message".into()),
        }
        Verdict::Nothing
    }

    /// What the line is to take next: committed output of the current owner, contiguous, at most what there is.
    pub fn output(&self) -> &[u8] {
        self.pending.as_slices().0
    }

    /// The line has taken the first `n` bytes of [`Self::output`].
    pub fn written(&mut self, n: usize) {
        let n = n.min(self.pending.len());
        self.pending.drain(..n);
        self.applied += n as u64;
        if let (Some(id), true) = (self.owner(), n > 0) {
            self.outbox.push_back(Output::Send(id, Message::OutAck { applied: self.applied }));
        }
    }

    /// How many input bytes may be read from the device now. Zero holds the device back (or makes it overrun: the line's
    /// flow control decides).
    pub fn room(&self) -> usize {
        self.config.input_capacity.saturating_sub(self.input.len())
    }

    /// The device sent this. What exceeds [`Self::room`] is lost, and reported.
    pub fn device_read(&mut self, bytes: &[u8]) {
        let (kept, lost) = bytes.split_at(bytes.len().min(self.room()));
        self.input.extend(kept);
        if !lost.is_empty() {
            let reason = "the input log is full and the device could not be held back".to_owned();
            // Lost bytes have no offsets: the stream goes on without them, and this says where they would have been.
            let at = self.in_end();
            self.report(Event::Gap { direction: Direction::Input, from: at, to: at, reason });
        }
        self.send_input();
        if self.room() == 0 && !self.busy {
            self.busy = true;
            self.report(Event::Busy);
        }
    }

    /// Tell the owner (the next one, if there is none now) and remember it for the status.
    pub fn report(&mut self, event: Event) {
        if self.history.len() == MAX_UNREPORTED {
            self.history.pop_front();
        }
        self.history.push_back(event.clone());
        match self.owner() {
            Some(id) => self.outbox.push_back(Output::Send(id, Message::Event(event))),
            None => {
                if self.unreported.len() == MAX_UNREPORTED {
                    self.unreported.pop_front();
                }
                self.unreported.push_back(event);
            }
        }
    }

    /// The line's states as they are, for the next owner.
    pub fn set_cells(&mut self, cells: Vec<(Cell, u32)>) {
        self.cells = cells;
    }

    /// States that the owner wants changed, since the last call.
    pub fn take_changed_cells(&mut self) -> Vec<(Cell, u32)> {
        std::mem::take(&mut self.changed)
    }

    /// Close a session with a sentence.
    pub fn refuse(&mut self, id: SessionId, why: String) {
        self.closed(id);
        self.outbox.push_back(Output::Send(id, Message::Refused { why }));
        self.outbox.push_back(Output::Close(id));
    }

    fn in_end(&self) -> u64 {
        self.in_base + self.input.len() as u64
    }

    fn attach(
        &mut self,
        id: SessionId,
        generation: Generation,
        attach: &Attach,
        store: &mut dyn FnMut(&Ownership) -> Result<(), String>,
    ) -> Verdict {
        let PortConfig { machine, device, .. } = &self.config;
        if attach.machine != *machine || attach.device != *device {
            let (m, d) = (&attach.machine, &attach.device);
            let why = format!("this board serves device {device} of machine {machine}, not device {d} of machine {m}");
            self.refuse(id, why);
            return Verdict::Nothing;
        }
        if generation < self.generation {
            self.outbox.push_back(Output::Send(id, Message::Stale { current: self.generation }));
            self.outbox.push_back(Output::Close(id));
            return Verdict::Nothing;
        }
        let sane = generation > Generation::ZERO
            && (Generation(1)..=generation).contains(&attach.life)
            && attach.rx_acked <= attach.rx_next
            && attach.rx_next.max(attach.tx_acked) <= MAX_OFFSET;
        if !sane {
            self.refuse(id, "its attach contradicts itself".into());
            return Verdict::Nothing;
        }
        if generation == self.generation && attach.life != self.life {
            let why = format!("generation {generation} has attached before, with another life of the machine");
            self.refuse(id, why);
            return Verdict::Nothing;
        }

        let place = self.place(attach);
        let ownership = Ownership {
            generation,
            life: attach.life,
            applied: place.applied,
            in_base: place.in_base,
            in_end: place.in_base + place.keep.len() as u64,
        };
        if ownership != self.ownership()
            && let Err(why) = store(&ownership)
        {
            self.refuse(id, why);
            return Verdict::Nothing;
        }

        if let Some(old) = self.owner.take().filter(|old| old.id != id) {
            if generation > self.generation {
                self.outbox.push_back(Output::Send(old.id, Message::Fenced { newer: generation }));
            }
            self.outbox.push_back(Output::Close(old.id));
        }
        self.generation = generation;
        self.life = attach.life;
        self.applied = place.applied;
        self.pending.clear();
        self.in_base = place.in_base;
        self.input.truncate(place.keep.end);
        self.input.drain(..place.keep.start);
        self.busy = self.busy && self.room() == 0;
        self.owner = Some(Owner { id, sent: attach.rx_next.max(self.in_base) });
        let attached = Attached {
            incarnation: self.config.incarnation,
            applied: self.applied,
            in_base: self.in_base,
            in_end: self.in_end(),
            window: self.config.window,
            cells: self.cells.clone(),
        };
        self.outbox.push_back(Output::Send(id, Message::Attached(attached)));
        for event in std::mem::take(&mut self.unreported) {
            self.outbox.push_back(Output::Send(id, Message::Event(event)));
        }
        for event in place.events {
            self.report(event);
        }
        self.send_input();
        Verdict::Owner
    }

    /// Where the streams go on for this attach.
    fn place(&self, attach: &Attach) -> Place {
        let len = self.input.len();
        let mut events = Vec::new();
        if self.life == Generation::ZERO {
            // Nobody was ever attached: what the device sent so far is the first that this machine sees of it.
            return Place { applied: attach.tx_acked, in_base: attach.rx_next, keep: 0..len, events };
        }
        if attach.life != self.life {
            events.push(Event::NewLife { dropped: len as u64 });
            return Place { applied: attach.tx_acked, in_base: attach.rx_next, keep: 0..0, events };
        }
        if attach.tx_acked > self.applied {
            events.push(Event::Uncertain {
                direction: Direction::Output,
                from: self.applied,
                to: attach.tx_acked,
                reason: "the board remembers less than it had acknowledged; nothing of this is written again".into(),
            });
        }
        let applied = self.applied.max(attach.tx_acked);
        if attach.rx_next > self.in_end() {
            events.push(Event::Gap {
                direction: Direction::Input,
                from: attach.rx_next,
                to: attach.rx_next,
                reason: "the board remembers less input than it had delivered, and may have lost what came since"
                    .into(),
            });
            return Place { applied, in_base: attach.rx_next, keep: 0..0, events };
        }
        if attach.rx_next < self.in_base {
            events.push(Event::Gap {
                direction: Direction::Input,
                from: attach.rx_next,
                to: self.in_base,
                reason: "it was acknowledged before, and is not kept any more".into(),
            });
        }
        // Within the log, or before it: at most `len`.
        let drop = attach.rx_acked.saturating_sub(self.in_base) as usize;
        Place { applied, in_base: self.in_base + drop as u64, keep: drop..len, events }
    }

    fn out(&mut self, id: SessionId, offset: u64, bytes: &[u8]) {
        let next = self.applied + self.pending.len() as u64;
        if offset > next {
            self.refuse(id, format!("it sent output from offset {offset} on, but {next} is next"));
            return;
        }
        // What the line has taken, or is about to, is not taken twice.
        let known = usize::try_from(next - offset).unwrap_or(usize::MAX).min(bytes.len());
        let new = &bytes[known..];
        if self.pending.len() + new.len() > self.config.window as usize {
            self.refuse(id, format!("it sent more than the window of {} bytes", self.config.window));
            return;
        }
        self.pending.extend(new);
        if new.is_empty() {
            // All of it was known: say so again, the acknowledgement may have been lost with a connection.
            self.outbox.push_back(Output::Send(id, Message::OutAck { applied: self.applied }));
        }
    }

    fn in_ack(&mut self, id: SessionId, upto: u64) {
        let sent = self.owner.as_ref().map_or(0, |o| o.sent);
        if upto > sent {
            self.refuse(id, format!("it acknowledged input up to {upto}, but was sent only {sent}"));
            return;
        }
        let n = upto.saturating_sub(self.in_base) as usize; // at most the log's length, as `sent` is within it
        self.input.drain(..n);
        self.in_base += n as u64;
        if self.room() * 2 >= self.config.input_capacity {
            self.busy = false;
        }
    }

    fn set(&mut self, cell: Cell, value: u32) {
        if self.cells.contains(&(cell, value)) {
            return;
        }
        self.cells.retain(|(c, _)| *c != cell);
        self.cells.push((cell, value));
        self.changed.push((cell, value));
    }

    fn send_input(&mut self) {
        let end = self.in_end();
        let Some(owner) = &mut self.owner else { return };
        while owner.sent < end {
            let from = (owner.sent - self.in_base) as usize;
            let len = ((end - owner.sent) as usize).min(MAX_DATA);
            let bytes: Vec<u8> = self.input.range(from..from + len).copied().collect();
            self.outbox.push_back(Output::Send(owner.id, Message::In { offset: owner.sent, bytes }));
            owner.sent += len as u64;
        }
    }
}

/// Where the streams go on after an attach.
struct Place {
    applied: u64,
    in_base: u64,
    /// Which part of the input log stays.
    keep: std::ops::Range<usize>,
    events: Vec<Event>,
}
