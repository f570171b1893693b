//! One card of a machine under the device lock: between the device and its port, with the gate on the way out.
//!
//! ```text
//!  device ──take_packets()──► gate ──passes──────────────────────► port      gate open, nothing before it: at once, by the thread of the vCPU
//!                              │ held … commit … released ─► worker ─┘
//!  device ◄──receive()── arrived ◄── worker ◄──────────────── port
//! ```
//! [`Nic::settle`] is called after every access to the machine's devices, as for all of them. While the devices are frozen nobody calls it: what arrives waits
//! in `arrived`, and when that is full in the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use understudy_protocol::control::{Gate, NicStatus};
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::NicSpec;

use super::backend::Sent;
use super::gate::{AtBound, Bound, PacketGate};
use super::packet::{HEADER, Packet};
use super::port::NetPort;
use crate::devices::Ctx;
use crate::devices::virtio::net::{Offloads, Received};
use crate::devices::virtio::{Net, VirtioPci};

/// Rounds of work in one settling; what is left comes with the next access or tick.
const ROUNDS: usize = 16;
/// Bytes and packets that may have arrived and not be taken by the guest.
const ARRIVED_BYTES: usize = 1 << 20;
const ARRIVED_PACKETS: usize = 512;
/// Least that a waiting packet takes of the memory that the gate's bound stands for.
const LEAST: usize = 256;

/// Packets and bytes of frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    packets: u64,
    bytes: u64,
}

impl Count {
    fn add(&mut self, frame: usize) {
        self.packets += 1;
        self.bytes += frame as u64;
    }
}

/// See the module.
#[derive(Debug)]
pub struct Nic {
    /// Its slot on the bus.
    pub slot: u8,
    /// Where packets wait for their commit.
    pub gate: PacketGate,
    /// Its port, once the machine has one. Without, what is sent vanishes.
    pub port: Option<Arc<NetPort>>,
    arrived: VecDeque<(u16, Vec<u8>)>,
    arrived_bytes: usize,
    /// Threads wait until there is room in `arrived`.
    full: bool,
    /// What the port was told last.
    offloads: Option<Offloads>,
    since: Instant,
    sent: Count,
    received: Count,
    dropped: BTreeMap<&'static str, u64>,
}

impl Nic {
    /// Of the device in this slot, holding at most so many bytes.
    pub fn new(slot: u8) -> Self {
        Self {
            slot,
            gate: PacketGate::new(Bound::default()),
            port: None,
            arrived: VecDeque::new(),
            arrived_bytes: 0,
            full: false,
            offloads: None,
            since: Instant::now(),
            sent: Count::default(),
            received: Count::default(),
            dropped: BTreeMap::new(),
        }
    }

    /// It is configured so, with this port.
    pub fn connect(&mut self, spec: &NicSpec, port: Arc<NetPort>) {
        self.gate = PacketGate::new(bound(spec));
        self.port = Some(port);
    }

    fn drop(&mut self, why: &'static str) {
        *self.dropped.entry(why).or_default() += 1;
    }

    /// What the device has sent goes; what has arrived, it is given.
    pub fn settle(&mut self, device: &mut VirtioPci<Net>, ctx: &Ctx) {
        for _ in 0..ROUNDS {
            let room = self.gate.ask_room();
            let packets = device.take_packets(room, ctx);
            if packets.is_empty() {
                break;
            }
            for packet in packets {
                self.transmit(packet);
            }
        }
        let offloads = device.device().offloads();
        if self.offloads != Some(offloads)
            && let Some(port) = &self.port
        {
            port.set_offloads(offloads);
            self.offloads = Some(offloads);
        }
        self.deliver(device, ctx);
    }

    fn transmit(&mut self, packet: Packet) {
        let frame = packet.frame.len();
        let Some(port) = &self.port else { return };
        if self.gate.passes() {
            match port.send(&packet) {
                Some(Sent::Full) => {
                    // The first of a row: its worker waits until it can go.
                    self.gate.push(packet);
                    port.wake(0);
                    return;
                }
                Some(Sent::InPart) => port.wake(0),
                Some(Sent::Gone) => {}
                Some(Sent::Lost(_)) => return self.drop("refused by the host"),
                None => return self.drop("silent"),
            }
            self.gate.passed(1);
            self.sent.add(frame);
            return;
        }
        self.gate.set_time(self.since.elapsed());
        self.gate.push(packet);
        self.tell();
    }

    /// Wake the worker if packets may leave.
    fn tell(&self) {
        if self.gate.released_waiting() > 0
            && let Some(port) = &self.port
        {
            port.wake(0);
        }
    }

    fn deliver(&mut self, device: &mut VirtioPci<Net>, ctx: &Ctx) {
        let mut given = false;
        while let Some((pair, packet)) = self.arrived.front_mut() {
            let frame = packet.len().saturating_sub(HEADER);
            let why = match device.receive(*pair, packet, ctx) {
                Received::NoBuffers => break,
                Received::Taken => {
                    given = true;
                    self.received.add(frame);
                    None
                }
                Received::NoDriver => Some("no driver"),
                Received::Filtered => Some("not for the guest"),
                Received::Unfit => Some("does not fit"),
            };
            self.arrived_bytes -= frame + HEADER;
            self.arrived.pop_front();
            if let Some(why) = why {
                self.drop(why);
            }
        }
        if given {
            device.process(ctx.ram);
        }
        if self.full && self.arrived.is_empty() {
            self.full = false;
            if let Some(port) = &self.port {
                port.wake_all();
            }
        }
    }

    /// Packets arrived by this pair. False: no more until [`Nic::deliver`] wakes the threads.
    pub fn arrived(&mut self, pair: u16, packets: impl Iterator<Item = Vec<u8>>) -> bool {
        for packet in packets {
            self.arrived_bytes += packet.len().max(HEADER);
            self.arrived.push_back((pair, packet));
        }
        self.has_room()
    }

    /// Whether more may be taken from the port.
    pub fn has_room(&mut self) -> bool {
        self.full = self.arrived_bytes >= ARRIVED_BYTES || self.arrived.len() >= ARRIVED_PACKETS;
        !self.full
    }

    /// Released packets to be written, by the worker; those before have been.
    pub fn take_released(&mut self, bytes: usize) -> Vec<Packet> {
        self.gate.written();
        self.gate.take(bytes)
    }

    /// So much of it was written; the rest could not be, and some could never be.
    pub fn wrote(&mut self, packets: u64, bytes: u64, lost: u64, rest: Vec<Packet>) {
        self.sent.packets += packets;
        self.sent.bytes += bytes;
        if lost > 0 {
            *self.dropped.entry("refused by the host").or_default() += lost;
        }
        self.gate.put_back(rest);
    }

    /// Close or open the gate.
    pub fn set_gate(&mut self, gate: Gate) {
        self.gate.set_time(self.since.elapsed());
        match gate {
            Gate::Hold => self.gate.hold(),
            Gate::Open => self.gate.open(),
        }
        self.tell();
    }

    /// A checkpoint is committed.
    pub fn commit(&mut self, epoch: Epoch) {
        self.gate.set_time(self.since.elapsed());
        self.gate.commit(epoch);
        self.tell();
    }

    /// The machine begins, or begins with another state: nothing waits.
    pub fn begin(&mut self) {
        self.gate.discard();
        self.arrived.clear();
        self.arrived_bytes = 0;
        self.full = false;
        self.offloads = None;
    }

    /// The machine does not run here any more. What was released leaves now if it can (`polite`), and nothing after that.
    pub fn silence(&mut self, polite: bool) {
        if let (Some(port), true) = (&self.port, polite) {
            for packet in self.gate.take(usize::MAX) {
                if let Some(Sent::Gone) = port.send(&packet) {
                    self.sent.add(packet.frame.len());
                }
            }
        }
        self.gate.discard();
        if let Some(port) = &self.port {
            port.silence();
        }
        self.arrived.clear();
        self.arrived_bytes = 0;
    }

    /// For the status.
    pub fn status(&self, spec: &NicSpec, machine: &str, device: Option<&VirtioPci<Net>>) -> NicStatus {
        let stats = self.gate.stats();
        let mut dropped: BTreeMap<String, u64> = self.dropped.iter().map(|(why, n)| ((*why).to_owned(), *n)).collect();
        let refused = device.map(|device| device.device().refused()).unwrap_or_default();
        let others = [
            ("no frame", refused.size),
            ("offload fields", refused.offload),
            ("bound", stats.dropped),
            ("runs elsewhere", stats.discarded),
        ];
        dropped.extend(others.into_iter().filter(|(_, n)| *n > 0).map(|(why, n)| (why.to_owned(), n)));
        NicStatus {
            name: spec.name.clone(),
            mac: device.map_or_else(|| spec.address(machine), |device| device.device().mac()),
            spec: spec.to_string(),
            backend: self.port.as_ref().map_or_else(|| "none".into(), |port| port.backend().describe()),
            link: if self.port.as_ref().is_some_and(|port| port.live()) { "up" } else { "down" }.into(),
            out_packets: self.sent.packets,
            out_bytes: self.sent.bytes,
            in_packets: self.received.packets,
            in_bytes: self.received.bytes,
            held_packets: (self.gate.held_packets() + self.gate.released_waiting()) as u64,
            held_bytes: self.gate.held_bytes() as u64,
            held_limit: spec.hold,
            bound_reached: stats.waits + stats.dropped,
            dropped,
            problem: self.port.as_ref().and_then(|port| port.problem()),
        }
    }
}

/// The gate's bound as it is configured.
fn bound(spec: &NicSpec) -> Bound {
    let bytes = usize::try_from(spec.hold).unwrap_or(usize::MAX);
    let at = match spec.at_bound {
        understudy_protocol::nic::AtBound::Wait => AtBound::Wait,
        understudy_protocol::nic::AtBound::Drop => AtBound::Drop,
    };
    Bound { bytes, packets: bytes / LEAST, at }
}
