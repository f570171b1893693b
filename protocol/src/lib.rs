//! What Understudy's processes say to each other.
//!
//! | module | between | over |
//! |---|---|---|
//! | [`control`] | agents, people, replicator → vmm, replicator, board service | local unix sockets, one JSON object a line |
//! | [`layout`]  | vmm ↔ replicator on one node | files in the machine's run and shared-memory directories |
//! | [`ids`]     | everybody | types that keep an epoch from being taken for a generation |
//!
//! Nothing here knows Pacemaker, KVM or a device: it is the one crate that both sides of every boundary depend on.

pub mod control;
pub mod ids;
pub mod layout;
