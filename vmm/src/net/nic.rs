//! One card of a machine under the device lock: between the device and its port, with the gate on the way out.
//!
//! ```text
//!  device ──take_packets()──► filter ─► gate ──passes──────────────────────► port      gate open, nothing before it: at once, by the thread of the vCPU
//!                              │ held … commit … released ─► worker ─┘
//!  device ◄──receive()── arrived ◄── filter ◄── worker ◄──── port
//! ```
//! On the way what the guest's addresses are is learnt ([`Addresses`]); when the machine begins to run here the network is told ([`Nic::announce`]), before
//! anything of the guest's leaves.
//!
//! [`Nic::settle`] is called after every access to the machine's devices, as for all of them. While the devices are frozen nobody calls it: what arrives waits
//! in `arrived`, and when that is full in the kernel.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_protocol::control::{Gate, NicStatus};
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::{Mac, NicSpec};
use understudy_protocol::nic_filter::FilterSpec;

use super::addresses::Addresses;
use super::announce::Announcer;
use super::backend::Sent;
use super::filter::Filter;
use super::gate::{AtBound, Bound, PacketGate};
use super::packet::{HEADER, Packet};
use super::port::NetPort;
use crate::devices::virtio::net::{Offloads, Received};
use crate::devices::virtio::{Net, VirtioPci};
use crate::devices::{Ctx, VmTime};

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
            addresses: Addresses::default(),
            mac: Mac([0; 6]),
            filter: Filter::new(&FilterSpec::default(), [0; 6]),
            announcer: Announcer::default(),
            began: Instant::now(),
            timed: false,
            leaks: false,
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
        for _ in 0..ROUNDS {
            let room = self.gate.ask_room() && !self.must_wait();
            let packets = device.take_packets(room, ctx);
            if packets.is_empty() {
                break;
            }
            for packet in packets {
                self.transmit(packet, ctx.now);
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

    /// Whether a rate keeps the guest's next packet; then the worker comes back when it does not.
    fn must_wait(&mut self) -> bool {
        let waits = !self.filter.is_idle() && self.filter.wait_out(self.since.elapsed()).is_some();
        if waits
            && !self.timed
            && let Some(port) = &self.port
        {
            self.timed = true;
            port.wake(0);
        }
        waits
    }

    fn transmit(&mut self, mut packet: Packet, now: VmTime) {
        if let Err(reason) = self.filter.outbound(&packet.frame, self.since.elapsed()) {
            return self.drop(reason.name());
        }
        self.addresses.sent(&packet.frame, now);
        self.filter.tag(&mut packet);
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
        for mut packet in packets {
            if let Err(reason) = self.filter.inbound(&mut packet, self.since.elapsed()) {
                self.drop(reason.name());
                continue;
            }
            self.addresses.heard(packet.get(HEADER..).unwrap_or_default());
            self.arrived_bytes += packet.len().max(HEADER);
            self.arrived.push_back((pair, packet));
        }
        self.has_room()
    }

    /// Whether more may be taken from the port.
    pub fn has_room(&mut self) -> bool {
        self.full = self.arrived_bytes >= ARRIVED_BYTES || self.arrived.len() >= ARRIVED_PACKETS;
        let waits = !self.filter.is_idle() && self.filter.wait_in(self.since.elapsed()).is_some();
        !self.full && !waits
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
        self.announcer = Announcer::default();
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;

    use etherparse::PacketBuilder;

    use super::*;
    use crate::net::backend::NetBackend;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const NOW: VmTime = VmTime(0);

    /// What has happened behind the card.
    #[derive(Debug, Default, Clone)]
    struct Wire(Arc<Mutex<Vec<String>>>);

    impl Wire {
        fn note(&self, what: String) {
            self.0.lock().unwrap().push(what);
        }
        fn happened(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl NetBackend for Wire {
        fn describe(&self) -> String {
            "wire".into()
        }
        fn queues(&self) -> u16 {
            1
        }
        fn send(&self, packet: &Packet) -> Sent {
            let frame = &packet.frame;
            self.note(match frame[12..14] {
                [0x08, 0x00] => format!("packet {}", frame[frame.len() - 1]),
                [0x81, 0x00] => format!("tag {} of {:02x}{:02x}", frame[15], frame[16], frame[17]),
                _ => format!("{:02x}{:02x}", frame[12], frame[13]),
            });
            Sent::Gone
        }
        fn receive(&self, _queue: u16, _buffer: &mut [u8]) -> io::Result<Option<usize>> {
            Ok(None)
        }
        fn waits_on(&self, _queue: u16) -> Option<BorrowedFd<'_>> {
            None
        }
        fn set_up(&self, up: bool) -> io::Result<()> {
            self.note(if up { "up" } else { "down" }.into());
            Ok(())
        }
        fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
            Ok(())
        }
    }

    /// A card that runs here, as after a takeover.
    fn nic(words: &str) -> (Nic, Wire) {
        let wire = Wire::default();
        let port = Arc::new(NetPort::new(Box::new(wire.clone())).unwrap());
        let mut nic = Nic::new(17);
        nic.connect(&format!("name=net0,tap=t{words}").parse().unwrap(), MAC, port.clone());
        nic.begin();
        nic.set_gate(Gate::Hold);
        port.speak().unwrap();
        (nic, wire)
    }

    fn packet(number: u8) -> Packet {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(MAC.0, [9; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2);
        builder.write(&mut frame, &[number]).unwrap();
        Packet { frame, ..Packet::default() }
    }

    fn work(nic: &mut Nic) {
        for packet in nic.take_released(usize::MAX) {
            let port = nic.port.clone().unwrap();
            port.send(&packet);
        }
    }

    #[test]
    fn the_network_is_told_before_anything_of_the_guests_leaves_and_in_the_cards_vlan() {
        let (mut a, wire) = nic("");
        a.announce(NOW);
        a.set_gate(Gate::Open);
        a.transmit(packet(1), NOW);
        assert_eq!(wire.happened(), ["up", "8035", "packet 1"]);
        let (mut b, wire) = nic(",vlan=12");
        b.addresses = a.addresses.clone();
        b.announce(NOW);
        assert_eq!(wire.happened(), ["up", "tag 12 of 8035", "tag 12 of 0806", "tag 12 of 0806"]);
        assert!(b.next_due().is_some_and(|due| due <= Duration::from_millis(50)));
    }

    #[test]
    fn a_fenced_machine_says_nothing_more_whether_held_or_released() {
        let (mut n, wire) = nic("");
        n.transmit(packet(1), NOW);
        n.gate.seal(Epoch(1));
        n.transmit(packet(2), NOW);
        n.commit(Epoch(1));
        assert_eq!((n.gate.released_waiting(), n.gate.held_packets()), (1, 1));
        n.announce(NOW);
        wire.happened();
        n.silence(false);
        assert_eq!(wire.happened(), ["down"]);
        n.set_gate(Gate::Open);
        n.transmit(packet(3), NOW);
        work(&mut n);
        n.announce_due();
        assert_eq!(wire.happened(), [""; 0]);
        assert_eq!(n.next_due(), None);
    }

    #[test]
    fn a_machine_that_was_handed_over_says_what_its_last_checkpoint_released_and_no_more() {
        let (mut n, wire) = nic("");
        n.transmit(packet(1), NOW);
        n.gate.seal(Epoch(1));
        n.transmit(packet(2), NOW);
        n.commit(Epoch(1));
        n.silence(true);
        assert_eq!(wire.happened(), ["up", "packet 1", "down"]);
    }

    #[test]
    fn a_rate_keeps_the_guest_waiting_and_the_worker_comes_back_for_it() {
        let (mut n, _wire) = nic(",rate-out=131072,burst=1514");
        assert!(!n.must_wait());
        (0..60).for_each(|number| n.transmit(packet(number), NOW));
        assert!(n.must_wait() && n.timed);
        assert!(n.next_due().is_some_and(|due| due < Duration::from_secs(1)));
    }
}
