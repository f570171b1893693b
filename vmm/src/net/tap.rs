//! Tap and macvtap interfaces: packets with their virtio-net header, a file descriptor for each pair of queues.
//!
//! A tap that is not there is made, and goes when the process does; the one that an administrator made (`ip tuntap add … vnet_hdr`) stays. Either way its
//! port is down unless the machine runs here: a bridge sends nothing to a port that is down, and takes nothing from it.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use understudy_protocol::nic::Mac;

use super::backend::{NetBackend, Sent};
use super::packet::{HEADER, Packet};
use super::sys::{self, Interfaces};
use crate::devices::virtio::net::Offloads;

/// A tap or macvtap.
#[derive(Debug)]
pub struct Tap {
    name: String,
    described: String,
    /// One a pair.
    queues: Vec<File>,
    interfaces: Interfaces,
}

impl Tap {
    /// Open the tap `name`, its port down, in this bridge; `mac` is the guest's.
    pub fn open(name: &str, bridge: Option<&str>, queues: u16, mac: Mac, mtu: Option<u16>) -> Result<Self> {
        let interfaces = Interfaces::here().context("cannot ask for the host's interfaces")?;
        if let Some(bridge) = bridge
            && interfaces.index(bridge).is_err()
        {
            bail!(
                "there is no bridge {bridge} on this node: make it (ip link add {bridge} type bridge), or name another"
            );
        }
        let was_there = interfaces.index(name).is_ok();
        let mut files = Vec::new();
        for _ in 0..queues {
            let file = sys::open("/dev/net/tun").map_err(cannot_open)?;
            sys::tap(&file, name, queues > 1).map_err(|e| cannot_attach(name, queues, was_there, &e))?;
            files.push(file);
        }
        let tap = Self {
            name: name.to_owned(),
            described: bridge.map_or_else(|| format!("tap {name}"), |bridge| format!("tap {name} in bridge {bridge}")),
            queues: files,
            interfaces,
        };
        tap.prepare()?;
        tap.set_up(false).with_context(|| format!("cannot switch {name} off"))?;
        if !was_there {
            // A bridge takes the lowest address of its ports for its own, unless it was given one: this is none of the low ones.
            let [_, rest @ ..] = mac.0;
            let [a, b, c, d, e] = rest;
            let host = Mac([0xfe, a, b, c, d, e]);
            tap.interfaces.set_address(name, host).with_context(|| format!("cannot give {name} the address {host}"))?;
            // The host itself has no business on this wire. (Where there is no IPv6, there is nothing to switch off.)
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        }
        if let Some(mtu) = mtu {
            tap.interfaces.set_mtu(name, mtu).with_context(|| format!("{name} does not take an MTU of {mtu}"))?;
        }
        if let Some(bridge) = bridge {
            match tap.interfaces.enslave(name, bridge) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                    // In that bridge already, or in another.
                    if !tap.interfaces.in_bridge(name, bridge).unwrap_or(false) {
                        bail!(
                            "{name} is in another bridge than {bridge}: take it out there (ip link set {name} nomaster), or name that one"
                        );
                    }
                }
                Err(e) => bail!("cannot put {name} into {bridge}, which may not be a bridge: {e}"),
            }
        }
        Ok(tap)
    }

    /// Open the macvtap interface `name`, which is there, its port down.
    pub fn open_macvtap(name: &str, queues: u16) -> Result<Self> {
        let interfaces = Interfaces::here().context("cannot ask for the host's interfaces")?;
        let index = interfaces.index(name).with_context(|| {
            format!("there is no interface {name} on this node: make it (ip link add link eth0 name {name} type macvtap mode bridge)")
        })?;
        let node = format!("/dev/tap{index}");
        let mut files = Vec::new();
        for _ in 0..queues {
            let file = sys::open(&node)
                .with_context(|| format!("cannot open {node}, the device of {name}: is {name} a macvtap interface?"))?;
            sys::macvtap(&file, queues > 1)
                .with_context(|| format!("{name} refuses packets with a virtio-net header, or {queues} queues"))?;
            files.push(file);
        }
        let tap = Self { name: name.to_owned(), described: format!("macvtap {name}"), queues: files, interfaces };
        tap.prepare()?;
        tap.set_up(false).with_context(|| format!("cannot switch {name} off"))?;
        Ok(tap)
    }

    fn prepare(&self) -> Result<()> {
        for queue in &self.queues {
            sys::set_header(queue, HEADER)
                .with_context(|| format!("{} has no virtio-net header of {HEADER} bytes", self.name))?;
        }
        self.set_offloads(Offloads::default()).with_context(|| format!("{} has no offloads", self.name))
    }

    fn queue(&self, pair: u16) -> Option<&File> {
        // The guest may have more pairs than were opened only if it was restored into another machine, which is refused before.
        self.queues.get(usize::from(pair) % self.queues.len().max(1))
    }
}

fn cannot_open(e: io::Error) -> anyhow::Error {
    let why = match e.raw_os_error() {
        Some(libc::ENOENT) => "there is no /dev/net/tun on this node: load the module tun (modprobe tun)",
        Some(libc::EACCES | libc::EPERM) => {
            "/dev/net/tun may not be opened: the VMM needs to be root, or CAP_NET_ADMIN"
        }
        _ => "cannot open /dev/net/tun",
    };
    anyhow::Error::from(e).context(why)
}

fn cannot_attach(name: &str, queues: u16, was_there: bool, e: &io::Error) -> anyhow::Error {
    let kind = if queues > 1 { " multi_queue" } else { "" };
    let why = match e.raw_os_error() {
        Some(libc::EBUSY) => {
            format!("the tap {name} is in use by somebody else: give each card an interface of its own")
        }
        Some(libc::EPERM) => {
            format!("the tap {name} may not be used or made: the VMM needs CAP_NET_ADMIN, or to be {name}'s owner")
        }
        Some(libc::EINVAL) if was_there => format!(
            "the interface {name} that is there does not fit: it must be made by ip tuntap add {name} mode tap vnet_hdr{kind}, or not be there"
        ),
        _ => format!("cannot use the tap {name}"),
    };
    anyhow::anyhow!("{why} ({e})")
}

impl NetBackend for Tap {
    fn describe(&self) -> String {
        self.described.clone()
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn send(&self, packet: &Packet) -> Sent {
        let Some(mut queue) = self.queue(packet.queue) else { return Sent::Gone };
        match queue.write_vectored(&[IoSlice::new(&packet.header), IoSlice::new(&packet.frame)]) {
            Ok(_) => Sent::Gone,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            Err(e) => Sent::Lost(e),
        }
    }

    fn receive(&self, queue: u16, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some(mut queue) = self.queue(queue) else { return Ok(None) };
        match queue.read(buffer) {
            Ok(n) => Ok(Some(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn waits_on(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.queue(queue).map(AsFd::as_fd)
    }

    fn set_up(&self, up: bool) -> io::Result<()> {
        self.interfaces.set_up(&self.name, up)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // They are the interface's, whichever queue they are said by.
        self.queues.first().map_or(Ok(()), |queue| sys::set_offloads(queue, offloads))
    }
}
