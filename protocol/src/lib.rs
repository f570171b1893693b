//! What Understudy's processes say to each other.
//!
//! | module | between | over |
//! |---|---|---|
//! | [`control`] | agents, people, replicator → vmm, replicator, board service | local unix sockets, one JSON object a line |
//! | [`layout`]  | vmm ↔ replicator on one node | files in the machine's run and shared-memory directories |
//! | [`secure`]  | replicator ↔ replicator, vmm ↔ board | TCP, authenticated and encrypted with the cluster's [`key`] |
//! | [`frame`]   | the same, inside | records with type, epoch, generation and CRC-32 |
//! | [`board`]   | vmm ↔ board service | those records: sessions of a line of bytes |
//! | [`statistics`] | replicator → people and monitoring | a part of its status |
//! | [`urgent`]  | nobody | threads of all of them that must not wait for a processor |
//! | [`disk`]    | administrators → agents, vmm | how a machine's disks are written |
//! | [`cdrom`]   | administrators → agents, vmm | how its CD-ROM drives are written |
//! | [`nic`]     | administrators → agents, vmm | how its network cards are written |
//! | [`watchdog`] | administrators → agents, vmm → monitor | its watchdog |
//! | [`ids`]     | everybody | types that keep an epoch from being taken for a generation |
//!
//! Nothing here knows Pacemaker, KVM or a device: it is the one crate that both sides of every boundary depend on.

pub mod board;
pub mod cdrom;
pub mod control;
pub mod disk;
pub mod evacuator;
pub mod frame;
pub mod ids;
pub mod iscsi;
pub mod key;
pub mod layout;
pub mod nic;
pub mod nic_filter;
pub mod secure;
pub mod statistics;
pub mod urgent;
pub mod watchdog;
