//! The network: what is between a machine's virtio-net device and the node's networks.
//!
//! | what | module |
//! |---|---|
//! | one packet with its offload fields | [`packet`] |
//! | what passes: senders, VLAN, rates, storms (pure) | [`filter`] |
//! | output commit of packets (pure) | [`gate`] |
//! | what the guest's addresses are, and telling the network after a takeover (pure) | [`addresses`], [`announce`], [`frame`] |

pub mod addresses;
pub mod announce;
pub mod filter;
pub mod frame;
pub mod gate;
pub mod packet;
