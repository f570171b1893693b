//! The services of the interface boards, and the machine's end of their sessions.
//!
//! | module | is | used by |
//! |---|---|---|
//! | [`client`] | a serial port's link to its board: connects, attaches, replays, reconnects | `understudy-vmm` |

#![forbid(unsafe_code)]

pub mod client;
