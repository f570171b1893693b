//! One stream between two replicators over several network paths: the loss of one of them is not the loss of the peer.
//!
//! ```text
//!  sender                                                          receiver
//!   Writer ─► ┌─────────┐ ═══ path 1: TCP, Noise ═══ plane 1 ═══ ┌─────────┐ ─► Reader
//!             │ session │                                        │ session │
//!   Reader ◄─ └─────────┘ ═══ path 2: TCP, Noise ═══ plane 2 ═══ └─────────┘ ◄─ Writer
//! ```
//! Each path is a connection of its own that proves the key by itself ([`understudy_protocol::secure`]). The first that comes about
//! *opens* the session: it names it by a random number that no other session has; the others *join* it by that number, as often as
//! they have to be connected again. A receiver that does not know the number (any more) refuses: what was sent to a process that has
//! ended, or in a session that was given up, never gets into another one.
//!
//! [`core`] decides what travels where and is the whole of it without I/O (`tests/paths_model.rs` attacks it); [`wire`] is how it is written;
//! [`door`] tells sessions apart; [`session`] has the sockets and threads; [`connect`] makes and mends the paths. Why not MPTCP:
//! `docs/decisions/0021-replication-over-several-paths.md`.

pub mod connect;
pub mod core;
pub mod door;
pub mod session;
pub mod wire;
