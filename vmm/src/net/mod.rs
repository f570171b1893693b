//! The network: what is between a machine's virtio-net device and the node's networks.
//!
//! | what | module |
//! |---|---|
//! | one packet with its offload fields | [`packet`] |
//! | what passes: senders, VLAN, rates, storms (pure) | [`filter`] |
//! | output commit of packets (pure) | [`gate`] |
//! | what the guest's addresses are, and telling the network after a takeover (pure) | [`addresses`], [`announce`], [`frame`] |
//! | a card under the device lock: device, gate, port | [`nic`], [`arrived`] |
//! | whether the machine may speak; its threads | [`port`], [`worker`], [`burst`] |
//! | memory of packets, used again | [`pool`] |
//! | what is behind a card | [`backend`], [`tap`], [`socket`] with [`framed`]; system calls in [`sys`] |
//!
//! A packet that the guest sends goes: vCPU exit → [`crate::hardware`] → device ([`crate::devices::virtio::net`]) → [`nic`] → [`gate`] → (cut, commit) → [`worker`] → [`port`] → [`backend`];
//! with an open gate from [`nic`] straight to the [`port`].

pub mod addresses;
pub mod announce;
pub mod arrived;
pub mod backend;
pub mod burst;
pub mod filter;
pub mod frame;
pub mod framed;
pub mod gate;
pub mod nic;
pub mod packet;
pub mod pool;
pub mod port;
pub mod socket;
pub mod sys;
pub mod tap;
pub mod worker;

use std::sync::Arc;

use anyhow::Result;
use understudy_protocol::control::NicShape;
use understudy_protocol::nic::NicSpec;

/// The cards' shapes, in which two machines must agree for one to run from the other's image.
pub fn shapes(machine: &str, nics: &[NicSpec]) -> Vec<NicShape> {
    let shape = |nic: &NicSpec| NicShape {
        name: nic.name.clone(),
        mac: nic.address(machine),
        queues: nic.queues,
        offloads: nic.backend.offloads(),
        mtu: nic.mtu,
    };
    nics.iter().map(shape).collect()
}

/// Open what is behind the cards; all ports are down.
pub fn open(machine: &str, nics: &[NicSpec]) -> Result<Vec<Arc<port::NetPort>>> {
    let one = |nic: &NicSpec| Ok(Arc::new(port::NetPort::new(backend::open(nic, nic.address(machine))?)?));
    nics.iter().map(one).collect()
}
