//! Sessions between a machine and an interface board, for devices that are a line of bytes.
//!
//! ```text
//! machine (MachinePort)                                    board (BoardPort)
//!        ◄── Hello{incarnation, machine, device} ────────     on connect
//!   Attach{device, life, tx_acked, rx_acked, rx_next} ──►     higher generation: made durable, older session
//!                                                             gets Fenced and is closed
//!        ◄── Attached{applied, in_base, in_end, window} ──    or Stale{current}, or Refused{why}
//!   Out{offset, bytes} ──────────────────────────────────►    written to the line iff this session is still the
//!        ◄── OutAck{applied} ─────────────────────────────    owner at that very moment, and each offset once
//!        ◄── In{offset, bytes} ───────────────────────────    as the device sends; kept until …
//!   InAck{upto} ─────────────────────────────────────────►    … a committed checkpoint has taken it
//!   Set{cell, value}, Ping{token} ───────────────────────►
//!        ◄── Pong{token}, Event, Fenced{newer} ───────────
//! ```
//!
//! Both directions are streams of bytes, numbered by their offset since the machine's cold boot (its *life*, named by the
//! generation that booted it). An owner that attaches says where its checkpoint stands in both streams; the board
//! says where the line stands; both go on from there: output before `applied` is skipped, input after `rx_next` is sent
//! again. Since output leaves a machine only when its checkpoint is committed, and input stays at the board until then, the
//! line sees each byte of the committed history once and in order, and the committed history sees each input byte once and
//! in order, however often hosts and connections die. What a dying *board* may have lost or done twice is an
//! [`Event`], never silence.
//!
//! Everything here is sans-I/O: messages in, messages out, no clock, no thread. `understudy_boards` drives it on sockets,
//! `protocol/tests/board_simulation.rs` drives it through random disasters.

mod machine;
mod message;
mod port;

pub use machine::{MachineEvent, MachinePort};
pub use message::{Attach, Attached, Cell, Direction, Event, MAX_DATA, MAX_OFFSET, MAX_PAYLOAD, Message, MessageError};
pub use port::{BoardPort, Output, Ownership, PortConfig, Saved, SessionId, Verdict};
