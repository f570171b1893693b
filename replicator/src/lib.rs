//! Epochs to the standby, commit, takeover image.
//!
//! One process per machine and node. On the primary it is the *sender*: it takes checkpoints from the VMM and brings them to
//! the other node. On the standby it is the *receiver*: it keeps an image that is exactly one committed epoch, and gives
//! it to a machine when the cluster says so. It knows neither KVM nor devices nor Pacemaker.
//!
//! ```text
//!                     sender                                             receiver
//!  VMM ── driver ── sender.rs (decisions)      peer ── process ── receiver.rs (decisions) ── standby ── image
//!           │          link, message, codec ───TCP───► link, message, codec                      │        │
//!           └── hook: veto, clear-veto                                        hook: replica-state ┘    RAM, stage,
//!                                                                                                     record, floor
//! ```
//! `sender` and `receiver` are state machines without I/O (see `tests/simulation`); `driver`, `standby` and `image` perform
//! what they decide; `process` ties both to sockets and the control protocol.
// (`mapping` is the one place where it is allowed.)
#![deny(unsafe_code)]
#![warn(missing_docs)]

mod background;
pub mod codec;
pub mod copies;
pub mod drill;
pub mod driver;
pub mod durable;
pub mod hook;
pub mod image;
pub mod incoming;
pub mod link;
pub mod local;
pub mod log;
pub mod mapping;
pub mod message;
pub mod migrate;
pub mod paths;
pub mod process;
pub mod receiver;
pub mod report;
pub mod sender;
pub mod shadow;
pub mod snapshot;
pub mod stage;
pub mod standby;
pub mod stats;
pub mod verify;
