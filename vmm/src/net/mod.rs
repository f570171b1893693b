//! The network: what is between a machine's virtio-net device and the node's networks.
//!
//! | what | module |
//! |---|---|
//! | one packet with its offload fields | [`packet`] |
//! | output commit of packets (pure) | [`gate`] |

pub mod gate;
pub mod packet;
