//! What is behind a network card: a way for packets out of this process, and in.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result};
use understudy_protocol::nic::{Mac, NicBackend, NicSpec};

use super::packet::Packet;
use super::socket::{Dgram, Stream};
use super::tap::Tap;
use crate::devices::virtio::net::Offloads;

/// What became of a packet.
#[derive(Debug)]
pub enum Sent {
    /// It has left.
    Gone,
    /// It will leave; the rest of it goes with [`NetBackend::flush`].
    InPart,
    /// There is no room now: again, when [`NetBackend::waits_on`] can be written to.
    Full,
    /// It cannot be sent, and never will be.
    Lost(io::Error),
}

/// A back end. Nothing of it waits; packets go and come on several threads.
pub trait NetBackend: Send + Sync + Debug {
    /// What it is, for status and errors: `tap vm1n0 in bridge br0`.
    fn describe(&self) -> String;
    /// Pairs of queues, 1 to 8.
    fn queues(&self) -> u16 {
        1
    }
    /// Send a packet by its queue. One back end keeps the order of what it is given for one queue.
    fn send(&self, packet: &Packet) -> Sent;
    /// What of a packet could not be sent at once ([`Sent::InPart`]). False: there is still something.
    fn flush(&self) -> bool {
        true
    }
    /// The next packet that arrived at a queue (0 to one less than [`NetBackend::queues`]) into `buffer`, which has room for [`super::packet::HEADER`] and
    /// the longest frame: the header, then the frame; how many bytes that is. `None`: there is none now.
    ///
    /// # Errors
    /// The queue cannot be read: for a tap whose port is down EIO, until it is up; otherwise never again.
    fn receive(&self, queue: u16, buffer: &mut [u8]) -> io::Result<Option<usize>>;
    /// What can be waited for, to read or to write.
    fn waits_on(&self, queue: u16) -> Option<BorrowedFd<'_>>;
    /// Switch the port on or off. After it was switched off nothing leaves.
    ///
    /// # Errors
    /// The interface is gone, or may not be switched (CAP_NET_ADMIN).
    fn set_up(&self, up: bool) -> io::Result<()>;
    /// What the guest takes. Of a back end that carries bare frames: nothing to be said, it never leaves anything to the guest.
    ///
    /// # Errors
    /// The kernel does not know one of them.
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}

/// Open what is behind a card; its port is down.
pub fn open(spec: &NicSpec, mac: Mac) -> Result<Box<dyn NetBackend>> {
    let opened: Result<Box<dyn NetBackend>> = match &spec.backend {
        NicBackend::Tap { name, bridge } => {
            Tap::open(name, bridge.as_deref(), spec.queues, mac, spec.mtu).map(|tap| Box::new(tap) as _)
        }
        NicBackend::Macvtap(name) => Tap::open_macvtap(name, spec.queues).map(|tap| Box::new(tap) as _),
        NicBackend::Stream(path) => Stream::connect(path).map(|socket| Box::new(socket) as _),
        NicBackend::Dgram { local, remote } => Dgram::open(local, remote).map(|socket| Box::new(socket) as _),
        NicBackend::None { .. } => Ok(Box::new(Nothing)),
    };
    opened.with_context(|| format!("the network card {}", spec.name))
}

/// Behind it there is nothing.
#[derive(Debug)]
pub struct Nothing;

impl NetBackend for Nothing {
    fn describe(&self) -> String {
        "none".into()
    }
    fn send(&self, _packet: &Packet) -> Sent {
        Sent::Gone
    }
    fn receive(&self, _queue: u16, _buffer: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(None)
    }
    fn waits_on(&self, _queue: u16) -> Option<BorrowedFd<'_>> {
        None
    }
    fn set_up(&self, _up: bool) -> io::Result<()> {
        Ok(())
    }
}
