//! The messages of a board session, and their bytes inside records.
//!
//! A record's kind is the message's type, its generation the sender's (on the board's side: the highest it has seen), its
//! epoch and flags are zero. Payload fields stand in the order of the structs: integers little endian, texts as u16 length
//! and UTF-8, byte strings to the end of the payload. An unknown kind is an error, so is anything left over.

use crate::frame::{self, FrameError, Header, Record};
use crate::ids::{Epoch, Generation};

/// Most data bytes in one `Out` or `In`.
pub const MAX_DATA: usize = 16 * 1024;
/// Offsets above this are nonsense: a gigabit line reaches it after a thousand years. (So sums cannot overflow.)
pub const MAX_OFFSET: u64 = 1 << 62;
/// Largest payload of any message: the limit for the frame decoder.
pub const MAX_PAYLOAD: usize = MAX_DATA + 1024;

/// Longest text in a message; longer ones are cut.
const MAX_TEXT: usize = 480;
/// Most cells in `Attached`.
const MAX_CELLS: usize = 32;

/// One state of the line that is set rather than sent. Setting the same value again changes nothing on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Cell {
    /// Bits per second, e.g. 115200.
    Baud = 1,
    /// Data bits 5 to 8 in bits 0-3; parity in bits 4-7 (0 none, 1 odd, 2 even); stop bits 1 or 2 in bits 8-11. 8N1 is
    /// `0x108`.
    Format = 2,
    /// Data terminal ready: 0 or 1.
    Dtr = 3,
    /// Request to send: 0 or 1.
    Rts = 4,
    /// Break condition: 0 or 1.
    Break = 5,
}

impl Cell {
    fn from_u8(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Baud,
            2 => Self::Format,
            3 => Self::Dtr,
            4 => Self::Rts,
            5 => Self::Break,
            _ => return None,
        })
    }
}

/// A machine asks for a device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attach {
    /// Machine name.
    pub machine: String,
    /// Device name.
    pub device: String,
    /// The generation under which the machine was cold-booted: names the pair of streams that the offsets count in.
    pub life: Generation,
    /// The machine knows all output before this offset as applied.
    pub tx_acked: u64,
    /// A committed checkpoint has taken all input before this offset.
    pub rx_acked: u64,
    /// Input is to be sent from this offset on.
    pub rx_next: u64,
}

/// The board accepts an [`Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attached {
    /// Which run of the board service this is.
    pub incarnation: u64,
    /// Offset of the first output byte that the line has not taken.
    pub applied: u64,
    /// Offset of the oldest input byte that the board still has.
    pub in_base: u64,
    /// Offset after the newest input byte.
    pub in_end: u64,
    /// Output bytes that may be under way without acknowledgement.
    pub window: u32,
    /// The line's states.
    pub cells: Vec<(Cell, u32)>,
}

/// One of the two streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Machine to device.
    Output,
    /// Device to machine.
    Input,
}

/// What a board reports beside the streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a stream are lost for good.
    Gap {
        /// Which stream.
        direction: Direction,
        /// First lost offset.
        from: u64,
        /// Offset after the last lost byte; equal to `from` when the number is not known.
        to: u64,
        /// A sentence.
        reason: String,
    },
    /// Whether these bytes passed the line is not known: the board died while it moved them.
    Uncertain {
        /// Which stream.
        direction: Direction,
        /// First uncertain offset.
        from: u64,
        /// Offset after the last.
        to: u64,
        /// A sentence that says what was done about it.
        reason: String,
    },
    /// The board service has been started anew.
    Reset {
        /// Its new number.
        incarnation: u64,
        /// Whether offsets and retained input survived.
        kept: bool,
    },
    /// Another life of the machine began; retained input of the old one was dropped.
    NewLife {
        /// Input bytes dropped.
        dropped: u64,
    },
    /// The input log is full: the device is being held back (or will overrun, if it cannot be).
    Busy,
    /// The line was lost (unplugged, closed by its other end). Output waits.
    LineLost {
        /// A sentence.
        why: String,
    },
    /// The line is back.
    LineBack,
}

/// One message of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Board's first words.
    Hello {
        /// Which run of the board service this is.
        incarnation: u64,
        /// The machine that it serves.
        machine: String,
        /// The device that it serves.
        device: String,
    },
    /// Machine asks for the device.
    Attach(Attach),
    /// Board agrees.
    Attached(Attached),
    /// Board belongs to a newer generation than the one that asked.
    Stale {
        /// The newest generation that it knows.
        current: Generation,
    },
    /// Board does not agree, for another reason.
    Refused {
        /// A sentence.
        why: String,
    },
    /// A newer generation has taken over while this session lived.
    Fenced {
        /// That generation.
        newer: Generation,
    },
    /// Output.
    Out {
        /// Offset of the first byte.
        offset: u64,
        /// 1 to [`MAX_DATA`] bytes.
        bytes: Vec<u8>,
    },
    /// The line has taken all output before this offset.
    OutAck {
        /// Offset.
        applied: u64,
    },
    /// Input.
    In {
        /// Offset of the first byte.
        offset: u64,
        /// 1 to [`MAX_DATA`] bytes.
        bytes: Vec<u8>,
    },
    /// A committed checkpoint has taken all input before this offset.
    InAck {
        /// Offset.
        upto: u64,
    },
    /// Set a state of the line.
    Set {
        /// Which.
        cell: Cell,
        /// To what.
        value: u32,
    },
    /// A report.
    Event(Event),
    /// Are you there?
    Ping {
        /// Comes back.
        token: u64,
    },
    /// Yes.
    Pong {
        /// From the ping.
        token: u64,
    },
    /// The machine leaves in order.
    Detach,
}

/// Why a record is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A type that this side does not know.
    #[error("the peer sent a board message of unknown kind {0}")]
    Unknown(u8),
    /// Too short, too long, or a value out of range.
    #[error("the peer sent a malformed board message of kind {kind}: {what}")]
    Malformed {
        /// The type.
        kind: u8,
        /// What is wrong.
        what: &'static str,
    },
}

const HELLO: u8 = 1;
const ATTACH: u8 = 2;
const ATTACHED: u8 = 3;
const STALE: u8 = 4;
const REFUSED: u8 = 5;
const FENCED: u8 = 6;
const OUT: u8 = 7;
const OUT_ACK: u8 = 8;
const IN: u8 = 9;
const IN_ACK: u8 = 10;
const SET: u8 = 11;
const EVENT: u8 = 12;
const PING: u8 = 13;
const PONG: u8 = 14;
const DETACH: u8 = 15;

impl Message {
    /// The record that carries this message.
    pub fn to_record(&self, generation: Generation) -> Record {
        let mut payload = Vec::new();
        let out = &mut payload;
        let kind = match self {
            Self::Hello { incarnation, machine, device } => {
                put_u64(out, *incarnation);
                put_text(out, machine);
                put_text(out, device);
                HELLO
            }
            Self::Attach(Attach { machine, device, life, tx_acked, rx_acked, rx_next }) => {
                put_text(out, machine);
                put_text(out, device);
                [life.0, *tx_acked, *rx_acked, *rx_next].iter().for_each(|v| put_u64(out, *v));
                ATTACH
            }
            Self::Attached(Attached { incarnation, applied, in_base, in_end, window, cells }) => {
                [*incarnation, *applied, *in_base, *in_end].iter().for_each(|v| put_u64(out, *v));
                put_u32(out, *window);
                let cells = &cells[..cells.len().min(MAX_CELLS)];
                out.push(cells.len() as u8); // at most MAX_CELLS
                for (cell, value) in cells {
                    out.push(*cell as u8);
                    put_u32(out, *value);
                }
                ATTACHED
            }
            Self::Stale { current } => {
                put_u64(out, current.0);
                STALE
            }
            Self::Refused { why } => {
                put_text(out, why);
                REFUSED
            }
            Self::Fenced { newer } => {
                put_u64(out, newer.0);
                FENCED
            }
            Self::Out { offset, bytes } => {
                put_u64(out, *offset);
                out.extend_from_slice(bytes);
                OUT
            }
            Self::OutAck { applied } => {
                put_u64(out, *applied);
                OUT_ACK
            }
            Self::In { offset, bytes } => {
                put_u64(out, *offset);
                out.extend_from_slice(bytes);
                IN
            }
            Self::InAck { upto } => {
                put_u64(out, *upto);
                IN_ACK
            }
            Self::Set { cell, value } => {
                out.push(*cell as u8);
                put_u32(out, *value);
                SET
            }
            Self::Event(event) => {
                put_event(out, event);
                EVENT
            }
            Self::Ping { token } => {
                put_u64(out, *token);
                PING
            }
            Self::Pong { token } => {
                put_u64(out, *token);
                PONG
            }
            Self::Detach => DETACH,
        };
        Record { header: Header { kind, flags: 0, epoch: Epoch::ZERO, generation }, payload }
    }

    /// The bytes of that record, appended to `out`. Only data above [`MAX_DATA`] can make it fail, at 4 GiB.
    pub fn encode(&self, generation: Generation, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let record = self.to_record(generation);
        frame::encode(&record.header, &record.payload, out)
    }

    /// The message in a record.
    pub fn from_record(record: &Record) -> Result<Self, MessageError> {
        let kind = record.header.kind;
        let mut take = Take { kind, rest: &record.payload };
        let message = match kind {
            HELLO => Self::Hello { incarnation: take.u64()?, machine: take.text()?, device: take.text()? },
            ATTACH => Self::Attach(Attach {
                machine: take.text()?,
                device: take.text()?,
                life: Generation(take.u64()?),
                tx_acked: take.u64()?,
                rx_acked: take.u64()?,
                rx_next: take.u64()?,
            }),
            ATTACHED => Self::Attached(Attached {
                incarnation: take.u64()?,
                applied: take.u64()?,
                in_base: take.u64()?,
                in_end: take.u64()?,
                window: take.u32()?,
                cells: take.cells()?,
            }),
            STALE => Self::Stale { current: Generation(take.u64()?) },
            REFUSED => Self::Refused { why: take.text()? },
            FENCED => Self::Fenced { newer: Generation(take.u64()?) },
            OUT => Self::Out { offset: take.u64()?, bytes: take.data()? },
            OUT_ACK => Self::OutAck { applied: take.u64()? },
            IN => Self::In { offset: take.u64()?, bytes: take.data()? },
            IN_ACK => Self::InAck { upto: take.u64()? },
            SET => Self::Set { cell: take.cell()?, value: take.u32()? },
            EVENT => Self::Event(take.event()?),
            PING => Self::Ping { token: take.u64()? },
            PONG => Self::Pong { token: take.u64()? },
            DETACH => Self::Detach,
            other => return Err(MessageError::Unknown(other)),
        };
        if let Self::Out { offset, bytes } | Self::In { offset, bytes } = &message
            && offset.checked_add(bytes.len() as u64).is_none_or(|end| end > MAX_OFFSET)
        {
            return Err(take.bad("its offsets are out of range"));
        }
        if !take.rest.is_empty() {
            return Err(take.bad("bytes are left over"));
        }
        Ok(message)
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let mut len = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out.extend_from_slice(&(len as u16).to_le_bytes()); // at most MAX_TEXT
    out.extend_from_slice(&text.as_bytes()[..len]);
}

fn put_direction(out: &mut Vec<u8>, direction: Direction) {
    out.push(match direction {
        Direction::Output => 0,
        Direction::Input => 1,
    });
}

fn put_event(out: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Gap { direction, from, to, reason } | Event::Uncertain { direction, from, to, reason } => {
            out.push(if matches!(event, Event::Gap { .. }) { 1 } else { 2 });
            put_direction(out, *direction);
            put_u64(out, *from);
            put_u64(out, *to);
            put_text(out, reason);
        }
        Event::Reset { incarnation, kept } => {
            out.push(3);
            put_u64(out, *incarnation);
            out.push(u8::from(*kept));
        }
        Event::NewLife { dropped } => {
            out.push(4);
            put_u64(out, *dropped);
        }
        Event::Busy => out.push(5),
        Event::LineLost { why } => {
            out.push(6);
            put_text(out, why);
        }
        Event::LineBack => out.push(7),
    }
}

/// A payload being read.
struct Take<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl Take<'_> {
    fn bad(&self, what: &'static str) -> MessageError {
        MessageError::Malformed { kind: self.kind, what }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.bad("it is too short"))?;
        self.rest = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, MessageError> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, MessageError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, MessageError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn flag(&mut self) -> Result<bool, MessageError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad("a flag is neither 0 nor 1")),
        }
    }

    fn text(&mut self) -> Result<String, MessageError> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        if len > MAX_TEXT {
            return Err(self.bad("a text is too long"));
        }
        let (text, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.bad("it is too short"))?;
        self.rest = rest;
        let text = std::str::from_utf8(text).map_err(|_| self.bad("a text is not UTF-8"))?;
        Ok(text.to_owned())
    }

    fn data(&mut self) -> Result<Vec<u8>, MessageError> {
        if self.rest.is_empty() || self.rest.len() > MAX_DATA {
            return Err(self.bad("the amount of data is out of range"));
        }
        Ok(std::mem::take(&mut self.rest).to_vec())
    }

    fn cell(&mut self) -> Result<Cell, MessageError> {
        let number = self.u8()?;
        Cell::from_u8(number).ok_or_else(|| self.bad("a cell is unknown"))
    }

    fn cells(&mut self) -> Result<Vec<(Cell, u32)>, MessageError> {
        let count = usize::from(self.u8()?);
        if count > MAX_CELLS {
            return Err(self.bad("there are too many cells"));
        }
        (0..count).map(|_| Ok((self.cell()?, self.u32()?))).collect()
    }

    fn direction(&mut self) -> Result<Direction, MessageError> {
        Ok(if self.flag()? { Direction::Input } else { Direction::Output })
    }

    fn event(&mut self) -> Result<Event, MessageError> {
        let which = self.u8()?;
        Ok(match which {
            1 | 2 => {
                let (direction, from, to, reason) = (self.direction()?, self.u64()?, self.u64()?, self.text()?);
                match which {
                    1 => Event::Gap { direction, from, to, reason },
                    _ => Event::Uncertain { direction, from, to, reason },
                }
            }
            3 => Event::Reset { incarnation: self.u64()?, kept: self.flag()? },
            4 => Event::NewLife { dropped: self.u64()? },
            5 => Event::Busy,
            6 => Event::LineLost { why: self.text()? },
            7 => Event::LineBack,
            _ => return Err(self.bad("an event is unknown")),
        })
    }
}

impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |d: &Direction| match d {
            Direction::Output => "output",
            Direction::Input => "input",
        };
        match self {
            Self::Gap { direction, from, to, reason } if from == to => {
                write!(f, "{} was lost at offset {from}, it is not known how much: {reason}", name(direction))
            }
            Self::Gap { direction, from, to, reason } => {
                write!(f, "{} {from}..{to} is lost: {reason}", name(direction))
            }
            Self::Uncertain { direction, from, to, reason } => {
                write!(f, "it is not known whether {} {from}..{to} passed the line: {reason}", name(direction))
            }
            Self::Reset { incarnation, kept: true } => {
                write!(
                    f,
                    "the board service was started anew (incarnation {incarnation:x}), offsets and input were kept"
                )
            }
            Self::Reset { incarnation, kept: false } => {
                write!(
                    f,
                    "the board service was started anew (incarnation {incarnation:x}) and knows nothing of before"
                )
            }
            Self::NewLife { dropped } => {
                write!(f, "the machine was cold-booted, {dropped} bytes of input for its former life were dropped")
            }
            Self::Busy => write!(f, "the input log is full, the device is being held back"),
            Self::LineLost { why } => write!(f, "the line was lost: {why}"),
            Self::LineBack => write!(f, "the line is back"),
        }
    }
}
