//! One card of a machine under the device lock: between the device and its port, with the gate on the way out.
//!
//! ```text
//!  device ──take_packets()──► filter ─► gate ──passes──────────────────────► port      gate open, nothing before it: at once, by the thread of the vCPU
//!                              │ held … commit … released ─► worker ─┘
//!         ──take_deferred()─► filter ─► gate ─► released ──► worker ─┘                 gate open, and the guest sends much: all by the worker
//!  device ◄──receive()── arrived ◄── filter ◄── worker ◄──── port
//! ```
//! On the way what the guest's addresses are is learnt ([`Addresses`]); when the machine begins to run here the network is told ([`Nic::announce`]), before
//! anything of the guest's leaves.
//!
//! [`Nic::settle`] is called after every access to the machine's devices, as for all of them. While the devices are frozen nobody calls it: what arrives waits
//! in [`Arrived`], and when that is full in the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_protocol::control::{Gate, NicStatus};
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::{Mac, NicSpec};
use understudy_protocol::nic_filter::FilterSpec;

use super::addresses::Addresses;
use super::announce::Announcer;
use super::arrived::Arrived;
use super::backend::Sent;
use super::burst::Written;
use super::filter::Filter;
use super::gate::{Bound, PacketGate};
use super::packet::{HEADER, Packet};
use super::pool::SMALLEST;
use super::port::NetPort;
use crate::devices::virtio::net::{Offloads, Received};
use crate::devices::virtio::{Net, VirtioPci};
use crate::devices::{Ctx, VmTime};

/// A notification that brings so many packets, or bytes, is much: the worker takes the next ones.
const MUCH: Count = Count { packets: 2, bytes: 4 << 10 };
/// Rounds of work in one settling; what is left comes with the next access or tick.
const ROUNDS: usize = 16;

/// Packets and bytes of frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    packets: u64,
    bytes: u64,
}

impl Count {
    fn is_much(self) -> bool {
        self.packets >= MUCH.packets || self.bytes >= MUCH.bytes
    }

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
    /// Which addresses its guest uses.
    pub addresses: Addresses,
    mac: Mac,
    filter: Filter,
    announcer: Announcer,
    /// Since when the machine runs here.
    began: Instant,
    /// The worker knows that a rate keeps packets.
    timed: bool,
    /// See [`Nic::leak`].
    leaks: bool,
    /// The guest sends much: see [`Nic::defers`].
    busy: bool,
    /// What the worker took since it was woken.
    took: Count,
    /// The worker is to be woken ([`Nic::late_wake`]).
    late: bool,
    arrived: Arrived,
    /// Buffers of packets that the guest has taken, for those who read.
    taken: Vec<Vec<u8>>,
    /// Buffers of packets that have left, for the device.
    spent: Vec<Vec<u8>>,
    /// What the port was told last.
    offloads: Option<Offloads>,
    since: Instant,
    sent: Count,
    received: Count,
    dropped: BTreeMap<&'static str, u64>,
}

impl Nic {
    /// Of the device in this slot; nothing is behind it until [`Nic::connect`].
    pub fn new(slot: u8) -> Self {
        Self {
            slot,
            gate: PacketGate::new(Bound::default()),
            port: None,
            addresses: Addresses::default(),
            mac: Mac([0; 6]),
            filter: Filter::new(&FilterSpec::default(), [0; 6]),
            announcer: Announcer::default(),
            began: Instant::now(),
            timed: false,
            leaks: false,
            busy: false,
            took: Count::default(),
            late: false,
            arrived: Arrived::default(),
            taken: Vec::new(),
            spent: Vec::new(),
            offloads: None,
            since: Instant::now(),
            sent: Count::default(),
            received: Count::default(),
            dropped: BTreeMap::new(),
        }
    }

    /// It is configured so, with this address and port.
    pub fn connect(&mut self, spec: &NicSpec, mac: Mac, port: Arc<NetPort>) {
        self.gate = PacketGate::new(bound(spec));
        self.mac = mac;
        self.filter = Filter::new(&spec.filter, mac.0);
        self.port = Some(port);
    }

    fn drop(&mut self, why: &'static str) {
        *self.dropped.entry(why).or_default() += 1;
    }

    /// What the device has sent goes; what has arrived, it is given.
    pub fn settle(&mut self, device: &mut VirtioPci<Net>, ctx: &Ctx) {
        self.send(device, ctx);
        let offloads = device.device().offloads();
        if self.offloads != Some(offloads)
            && let Some(port) = &self.port
        {
            port.set_offloads(offloads);
            self.offloads = Some(offloads);
        }
        self.deliver(device, ctx);
        // While it was given something it may have seen that the guest had sent something: nobody will say so again.
        if device.has_packets() {
            self.send(device, ctx);
        }
        // The next notification comes before the next settling.
        device.defer(self.defers());
    }

    /// Whether the worker takes what the guest sends, and not the vCPU that notifies. The vCPU goes on, and what it sends meanwhile makes no exits; a packet
    /// that comes alone is quicker without another thread. While packets wait for a commit the worker would only make a copy later.
    fn defers(&self) -> bool {
        self.busy && self.gate.is_open() && self.port.is_some()
    }

    fn send(&mut self, device: &mut VirtioPci<Net>, ctx: &Ctx) {
        let defers = self.defers();
        device.defer(defers);
        if defers {
            self.late |= device.has_packets();
            return;
        }
        let mut sent = Count::default();
        for _ in 0..ROUNDS {
            let now = self.since.elapsed();
            let room = self.gate.ask_room() && !self.must_wait(now);
            device.device_mut().give_back(self.spent.drain(..));
            let packets = device.take_packets(room, ctx);
            if packets.is_empty() {
                break;
            }
            self.gate.set_time(now);
            for packet in packets {
                sent.add(packet.frame.len());
                if let Some(Packet { frame, .. }) = self.transmit(packet, now, ctx.now) {
                    self.spent.push(frame);
                }
            }
        }
        self.busy = sent.is_much();
    }

    /// By the worker: some of what the guest has sent goes into the open gate, and from there into bursts ([`Nic::take_released`]). False: there is no more now.
    pub fn take_deferred(&mut self, device: &mut VirtioPci<Net>, ctx: &Ctx) -> bool {
        if !self.defers() {
            return false;
        }
        let now = self.since.elapsed();
        if !self.gate.ask_room() || self.must_wait(now) {
            return false;
        }
        device.device_mut().give_back(self.spent.drain(..));
        let packets = device.take_deferred(ctx);
        self.gate.set_time(now);
        let some = !packets.is_empty();
        for packet in packets {
            self.took.add(packet.frame.len());
            if let Some(packet) = self.outbound(packet, now, ctx.now) {
                self.gate.push(packet);
            }
        }
        if !some {
            let took = std::mem::take(&mut self.took);
            // Nothing at all says nothing: somebody was quicker.
            self.busy = took.packets == 0 || took.is_much();
        }
        some
    }

    /// Whether the worker is to be woken, which then has to be done at once. Not while the devices are locked, if that can be helped: it would wait for them.
    pub fn late_wake(&mut self) -> Option<Arc<NetPort>> {
        std::mem::take(&mut self.late).then(|| self.port.clone()).flatten()
    }

    /// Whether a rate keeps the guest's next packet; then the worker comes back when it does not.
    fn must_wait(&mut self, now: Duration) -> bool {
        let waits = !self.filter.is_idle() && self.filter.wait_out(now).is_some();
        if waits
            && !self.timed
            && let Some(port) = &self.port
        {
            self.timed = true;
            port.wake(0);
        }
        waits
    }

    /// The guest sent this. As it leaves, if it may.
    fn outbound(&mut self, mut packet: Packet, now: Duration, vm_time: VmTime) -> Option<Packet> {
        if let Err(reason) = self.filter.outbound(&packet.frame, now) {
            self.drop(reason.name());
            self.spent.push(packet.frame);
            return None;
        }
        self.addresses.sent(&packet.frame, vm_time);
        self.filter.tag(&mut packet);
        Some(packet)
    }

    /// The guest sent this. What comes back is done with: it has left, or never will.
    fn transmit(&mut self, packet: Packet, now: Duration, vm_time: VmTime) -> Option<Packet> {
        let packet = self.outbound(packet, now, vm_time)?;
        let Some(port) = &self.port else { return Some(packet) };
        if !self.gate.passes() {
            self.gate.push(packet);
            self.tell();
            return None;
        }
        match port.send(&packet) {
            Some(Sent::Full) => {
                // The first of a row: its worker waits until it can go.
                port.wake(0);
                self.gate.push(packet);
                return None;
            }
            Some(Sent::InPart) => port.wake(0),
            Some(Sent::Gone) => {}
            Some(Sent::Lost(_)) => {
                self.drop("refused by the host");
                return Some(packet);
            }
            None => {
                self.drop("silent");
                return Some(packet);
            }
        }
        self.gate.passed(1);
        self.sent.add(packet.frame.len());
        Some(packet)
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
        for pair in 0..self.arrived.pairs() {
            while let Some(packet) = self.arrived.front(pair) {
                let frame = packet.len().saturating_sub(HEADER);
                let why = match device.receive(pair, packet, ctx) {
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
                self.taken.extend(self.arrived.pop(pair));
                if let Some(why) = why {
                    self.drop(why);
                }
            }
            if self.arrived.drained(pair)
                && let Some(port) = &self.port
            {
                port.wake(pair);
            }
        }
        if given {
            device.process(ctx.ram);
        }
    }

    /// Packets arrived by this pair.
    pub fn arrived(&mut self, pair: u16, packets: impl Iterator<Item = Vec<u8>>) {
        let now = self.since.elapsed();
        for mut packet in packets {
            if let Err(reason) = self.filter.inbound(&mut packet, now) {
                self.drop(reason.name());
                self.taken.push(packet);
                continue;
            }
            self.addresses.heard(packet.get(HEADER..).unwrap_or_default());
            self.arrived.push(pair, packet);
        }
    }

    /// Whether more may be taken from the port for this pair. False: no more until its thread is woken, or what is due next ([`Nic::next_due`]).
    pub fn has_room(&mut self, pair: u16) -> bool {
        let waits = !self.filter.is_idle() && self.filter.wait_in(self.since.elapsed()).is_some();
        self.arrived.has_room(pair) && !waits
    }

    /// Buffers of packets that had arrived and are not needed any more.
    pub fn taken(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.taken)
    }

    /// After how long the threads have to look at it again, if nothing else wakes them: an announcement, or a rate.
    pub fn next_due(&mut self) -> Option<Duration> {
        self.timed = false;
        let announcement = self.announcer.next().map(|at| at.saturating_sub(self.began.elapsed()));
        if self.filter.is_idle() {
            return announcement;
        }
        let now = self.since.elapsed();
        let rates = [self.filter.wait_out(now), self.filter.wait_in(now)];
        self.timed = rates[0].is_some();
        rates.into_iter().chain([announcement]).flatten().min()
    }

    /// The machine begins to run here, and the port is up: the network is told, now and some times more ([`Nic::announce_due`]).
    pub fn announce(&mut self, now: VmTime) {
        self.announcer = Announcer::new(&self.addresses, self.mac.0, now);
        self.began = Instant::now();
        self.announce_due();
    }

    /// Announce what is due. It is no output of the guest's that would wait for a commit: the image that runs here has all of it.
    pub fn announce_due(&mut self) {
        let Some(port) = &self.port else { return };
        for frame in self.announcer.due(self.began.elapsed()) {
            let mut packet = Packet { frame: frame.clone(), ..Packet::default() };
            self.filter.tag(&mut packet);
            // One that has no room is made up for by the next.
            let _ = port.send(&packet);
        }
    }

    /// Packets do not wait for their commit from now on: the negative control of tests, which must notice it. No command line says this.
    pub fn leak(&mut self) {
        self.leaks = true;
    }

    /// Released packets to be written, by the worker; those before have been.
    pub fn take_released(&mut self, bytes: usize) -> Vec<Packet> {
        self.gate.take(bytes)
    }

    /// What became of them.
    pub fn wrote(&mut self, written: Written) {
        let Written { packets, bytes, lost, why: _, rest, spent } = written;
        self.sent.packets += packets;
        self.sent.bytes += bytes;
        if lost > 0 {
            *self.dropped.entry("refused by the host").or_default() += lost;
        }
        self.gate.put_back(rest);
        self.spent.extend(spent);
    }

    /// Close or open the gate.
    pub fn set_gate(&mut self, gate: Gate) {
        self.gate.set_time(self.since.elapsed());
        let gate = if self.leaks { Gate::Open } else { gate };
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
        self.announcer = Announcer::default();
        self.arrived.clear();
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
        self.announcer = Announcer::default();
        if let Some(port) = &self.port {
            port.silence();
        }
        self.arrived.clear();
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
            held_us: stats.held.histogram(),
            bound_reached: stats.waits + stats.dropped,
            dropped,
            problem: self.port.as_ref().and_then(|port| port.problem()),
        }
    }
}

/// The gate's bound as it is configured.
fn bound(spec: &NicSpec) -> Bound {
    let bytes = usize::try_from(spec.hold).unwrap_or(usize::MAX);
    Bound { bytes, packets: bytes / SMALLEST, at: spec.at_bound }
}

#[cfg(test)]
mod tests;
