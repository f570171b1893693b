//! The services of the interface boards, and the machine's end of their sessions.
//!
//! | module | is | used by |
//! |---|---|---|
//! | [`client`]  | a serial port's link to its board: connects, attaches, replays, reconnects | `understudy-vmm` |
//! | [`service`] | the serial board service: sockets and threads around `protocol::board::BoardPort` | `understudy-serial` |
//! | [`journal`] | what the service remembers across its own death | `service` |
//! | [`line`]    | the physical line: tty, pty or TCP | `service` |

#![deny(unsafe_code)]

pub mod client;
pub mod journal;
pub mod line;
mod modem;
pub mod service;
