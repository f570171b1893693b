//! The machine's side: what was committed and not yet taken by the line, and how far input has come.

use std::collections::VecDeque;

use super::message::{Attach, Attached, Cell, MAX_DATA, MAX_OFFSET, Message};
use crate::ids::Generation;

/// What the machine's owner has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    /// The session is up; the line has taken all output before this offset.
    Attached {
        /// Offset.
        applied: u64,
    },
    /// The line has taken all output before this offset.
    OutputApplied {
        /// Offset.
        upto: u64,
    },
    /// Input, each offset once, in order. A jump forward is a loss that a notice has told of.
    Input {
        /// Offset of the first byte.
        offset: u64,
        /// At least one.
        bytes: Vec<u8>,
    },
    /// The board belongs to a newer generation. The port is dead from here on.
    Fenced {
        /// That generation.
        newer: Generation,
    },
    /// The board does not agree.
    Refused {
        /// A sentence.
        why: String,
    },
    /// For the log.
    Notice {
        /// A sentence.
        what: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// No connection.
    Apart,
    /// Connected; the board speaks first.
    Greeting,
    /// `Attach` is sent.
    Asking,
    /// The session is up.
    Attached,
    /// A newer generation exists.
    Fenced,
}

/// One port of a machine.
#[derive(Debug)]
pub struct MachinePort {
    machine: String,
    device: String,
    generation: Generation,
    life: Generation,
    state: State,
    /// Output from `tx_base` on: committed, not known to be applied.
    tx_base: u64,
    tx: VecDeque<u8>,
    /// Sent in this session up to here.
    tx_sent: u64,
    window: u64,
    rx_acked: u64,
    /// Acknowledged in this session up to here.
    rx_acked_sent: u64,
    rx_next: u64,
    outbox: VecDeque<Message>,
    events: VecDeque<MachineEvent>,
}

impl MachinePort {
    /// A port of a machine that runs under `generation`; see [`Attach`] for the offsets.
    pub fn new(
        machine: &str,
        device: &str,
        generation: Generation,
        life: Generation,
        tx_acked: u64,
        rx_delivered: u64,
    ) -> Self {
        Self {
            machine: machine.to_owned(),
            device: device.to_owned(),
            generation,
            life,
            state: State::Apart,
            tx_base: tx_acked,
            tx: VecDeque::new(),
            tx_sent: tx_acked,
            window: 0,
            rx_acked: rx_delivered,
            rx_acked_sent: rx_delivered,
            rx_next: rx_delivered,
            outbox: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The machine's generation.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Whether the session is up.
    pub fn is_attached(&self) -> bool {
        self.state == State::Attached
    }

    /// Whether a newer generation was seen: nothing will ever come of this port again.
    pub fn is_fenced(&self) -> bool {
        self.state == State::Fenced
    }

    /// A new connection stands.
    pub fn connected(&mut self) {
        if self.state != State::Fenced {
            self.state = State::Greeting;
        }
        self.outbox.clear();
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        if self.state != State::Fenced {
            self.state = State::Apart;
        }
        self.outbox.clear();
    }

    /// Committed output. What is known already is skipped; an error is a gap, after which the stream cannot go on.
    pub fn queue_output(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let end = self.tx_base + self.tx.len() as u64;
        if offset > end {
            return Err(format!("output from offset {offset} on was handed over, but {end} is next"));
        }
        let known = usize::try_from(end - offset).unwrap_or(usize::MAX).min(bytes.len());
        self.tx.extend(&bytes[known..]);
        self.send_output();
        Ok(())
    }

    /// A committed checkpoint has taken all input before `upto`.
    pub fn acknowledge_input(&mut self, upto: u64) {
        // More than was ever handed over cannot have been taken.
        self.rx_acked = self.rx_acked.max(upto.min(self.rx_next));
        self.send_ack();
    }

    /// Set a state of the line (only while attached; the caller sets them again after each [`MachineEvent::Attached`]).
    pub fn set(&mut self, cell: Cell, value: u32) {
        if self.is_attached() {
            self.outbox.push_back(Message::Set { cell, value });
        }
    }

    /// Ask whether the board is there.
    pub fn ping(&mut self, token: u64) {
        if matches!(self.state, State::Greeting | State::Asking | State::Attached) {
            self.outbox.push_back(Message::Ping { token });
        }
    }

    /// Leave in order.
    pub fn detach(&mut self) {
        if self.is_attached() {
            self.outbox.push_back(Message::Detach);
        }
    }

    /// The next message to send.
    pub fn poll_message(&mut self) -> Option<Message> {
        self.outbox.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<MachineEvent> {
        self.events.pop_front()
    }

    /// A message came in. On an error close the connection; the sentence says why.
    pub fn received(&mut self, message: Message) -> Result<(), String> {
        match (self.state, message) {
            (State::Fenced | State::Apart, _) => {}
            (_, Message::Pong { .. }) => {}
            (_, Message::Stale { current: newer } | Message::Fenced { newer }) => {
                if newer <= self.generation {
                    return Err(format!("the board claims that generation {newer} is newer than {}", self.generation));
                }
                self.state = State::Fenced;
                self.outbox.clear();
                self.events.push_back(MachineEvent::Fenced { newer });
            }
            (_, Message::Refused { why }) => {
                self.events.push_back(MachineEvent::Refused { why: why.clone() });
                return Err(format!("the board refused: {why}"));
            }
            (State::Greeting, Message::Hello { .. }) => {
                // The board compares names itself, and refuses with a sentence that it can word better.
                self.outbox.push_back(Message::Attach(Attach {
                    machine: self.machine.clone(),
                    device: self.device.clone(),
                    life: self.life,
                    tx_acked: self.tx_base,
                    rx_acked: self.rx_acked,
                    rx_next: self.rx_next,
                }));
                self.rx_acked_sent = self.rx_acked;
                self.state = State::Asking;
            }
            (State::Asking, Message::Attached(attached)) => self.attached(&attached)?,
            (State::Attached, Message::OutAck { applied }) => {
                if applied > self.tx_sent.max(self.tx_base) {
                    return Err(format!(
                        "the board acknowledged output up to {applied}, only {} was sent",
                        self.tx_sent
                    ));
                }
                self.applied(applied);
                self.send_output();
            }
            (State::Attached, Message::In { offset, bytes }) => self.input(offset, bytes),
            (State::Attached, Message::Event(event)) => {
                self.events.push_back(MachineEvent::Notice { what: event.to_string() });
            }
            (_, other) => return Err(format!("the board sent a message out of turn ({})", kind_of(&other))),
        }
        Ok(())
    }

    fn attached(&mut self, attached: &Attached) -> Result<(), String> {
        let Attached { applied, in_base, in_end, .. } = *attached;
        if applied < self.tx_base || in_base > in_end || applied.max(in_end) > MAX_OFFSET {
            return Err("the board contradicts what it acknowledged before".into());
        }
        self.state = State::Attached;
        self.window = u64::from(attached.window);
        self.events.push_back(MachineEvent::Attached { applied: attached.applied });
        self.applied(attached.applied);
        self.tx_sent = attached.applied;
        self.send_output();
        self.send_ack();
        Ok(())
    }

    fn applied(&mut self, upto: u64) {
        if upto <= self.tx_base {
            return;
        }
        // The line may be ahead of what was handed over so far (after a takeover): those bytes will be skipped.
        let n = usize::try_from(upto - self.tx_base).unwrap_or(usize::MAX).min(self.tx.len());
        self.tx.drain(..n);
        self.tx_base = upto;
        self.events.push_back(MachineEvent::OutputApplied { upto });
    }

    fn input(&mut self, offset: u64, mut bytes: Vec<u8>) {
        let end = offset + bytes.len() as u64; // checked when the message was decoded
        if end <= self.rx_next {
            return;
        }
        let from = offset.max(self.rx_next);
        bytes.drain(..(from - offset) as usize);
        self.rx_next = end;
        self.events.push_back(MachineEvent::Input { offset: from, bytes });
    }

    fn send_output(&mut self) {
        if !self.is_attached() {
            return;
        }
        let end = self.tx_base + self.tx.len() as u64;
        while self.tx_sent < end {
            let open = (self.tx_base + self.window).saturating_sub(self.tx_sent);
            let len = (end - self.tx_sent).min(open).min(MAX_DATA as u64) as usize;
            if len == 0 {
                return;
            }
            let from = (self.tx_sent - self.tx_base) as usize;
            let bytes = self.tx.range(from..from + len).copied().collect();
            self.outbox.push_back(Message::Out { offset: self.tx_sent, bytes });
            self.tx_sent += len as u64;
        }
    }

    fn send_ack(&mut self) {
        if self.is_attached() && self.rx_acked > self.rx_acked_sent {
            self.rx_acked_sent = self.rx_acked;
            self.outbox.push_back(Message::InAck { upto: self.rx_acked });
        }
    }
}

fn kind_of(message: &Message) -> u8 {
    message.to_record(Generation::ZERO).header.kind
}
