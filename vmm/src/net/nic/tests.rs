//! A card under the device lock, with a wire behind it that notes what happens.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use etherparse::PacketBuilder;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::net::NetConfig;
use crate::devices::virtio::testing::{EVENT_IDX, Guest, SIZE, VERSION_1, ring};
use crate::net::backend::NetBackend;
use crate::net::burst;

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

fn send(nic: &mut Nic, number: u8) {
    let now = nic.since.elapsed();
    nic.transmit(packet(number), now, NOW);
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
    send(&mut a, 1);
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
    send(&mut n, 1);
    n.gate.seal(Epoch(1));
    send(&mut n, 2);
    n.commit(Epoch(1));
    assert_eq!((n.gate.released_waiting(), n.gate.held_packets()), (1, 1));
    n.announce(NOW);
    wire.happened();
    n.silence(false);
    assert_eq!(wire.happened(), ["down"]);
    n.set_gate(Gate::Open);
    send(&mut n, 3);
    work(&mut n);
    n.announce_due();
    assert_eq!(wire.happened(), [""; 0]);
    assert_eq!(n.next_due(), None);
}

#[test]
fn a_machine_that_was_handed_over_says_what_its_last_checkpoint_released_and_no_more() {
    let (mut n, wire) = nic("");
    send(&mut n, 1);
    n.gate.seal(Epoch(1));
    send(&mut n, 2);
    n.commit(Epoch(1));
    n.silence(true);
    assert_eq!(wire.happened(), ["up", "packet 1", "down"]);
}

#[test]
fn a_rate_keeps_the_guest_waiting_and_the_worker_comes_back_for_it() {
    let (mut n, _wire) = nic(",rate-out=131072,burst=1514");
    let now = n.since.elapsed();
    assert!(!n.must_wait(now));
    (0..60).for_each(|number| send(&mut n, number));
    assert!(n.must_wait(now) && n.timed);
    assert!(n.next_due().is_some_and(|due| due < Duration::from_secs(1)));
}

const TX: u16 = 1;

/// A guest at a card with an open gate.
fn guest() -> (Guest<Net>, Nic, Wire) {
    let config = NetConfig { mac: MAC, pairs: 1, offloads: false, mtu: None };
    let (mut nic, wire) = nic("");
    nic.set_gate(Gate::Open);
    wire.happened();
    (Guest::ready(Net::new(config), VERSION_1 | EVENT_IDX), nic, wire)
}

/// The guest makes a packet available. Whether it notifies, by what the device asked for (virtio 1.2, 2.7.10).
fn offer(guest: &mut Guest<Net>, number: u8) -> bool {
    let bytes = [&[0; HEADER][..], &packet(number).frame].concat();
    let (_, driver, device) = ring(TX);
    let before: u16 = guest.ram.read_obj(GuestAddress(driver + 2)).unwrap();
    guest.send(TX, 0x5000 + 0x100 * u64::from(number), &bytes);
    let event: u16 = guest.ram.read_obj(GuestAddress(device + 4 + 8 * u64::from(SIZE))).unwrap();
    before == event
}

/// An exit of the vCPU: the worker is to be woken if true.
fn exit(guest: &mut Guest<Net>, nic: &mut Nic) -> bool {
    guest.kick(TX);
    guest.with(|device, ctx| nic.settle(device, ctx));
    nic.late_wake().is_some()
}

/// What the worker does when it is woken.
fn worker(guest: &mut Guest<Net>, nic: &mut Nic) {
    while guest.with(|device, ctx| nic.take_deferred(device, ctx)) {
        let port = nic.port.clone().unwrap();
        while !nic.gate.passes() {
            let written = burst::write(&port, nic.take_released(burst::BURST));
            nic.wrote(written);
        }
    }
}

#[test]
fn a_packet_that_comes_alone_leaves_in_the_exit_and_a_stream_by_the_worker_without_exits() {
    let (mut guest, mut nic, wire) = guest();
    assert!(offer(&mut guest, 1));
    assert!(!exit(&mut guest, &mut nic));
    assert_eq!(wire.happened(), ["packet 1"]);
    // Two at once: from now on it is much.
    assert!(offer(&mut guest, 2));
    offer(&mut guest, 3);
    assert!(!exit(&mut guest, &mut nic));
    assert_eq!(wire.happened(), ["packet 2", "packet 3"]);
    assert!(offer(&mut guest, 4));
    assert!(exit(&mut guest, &mut nic), "the worker is wanted");
    assert!(wire.happened().is_empty());
    assert!(!offer(&mut guest, 5) && !offer(&mut guest, 6), "while they wait the guest need not notify");
    worker(&mut guest, &mut nic);
    assert_eq!(wire.happened(), ["packet 4", "packet 5", "packet 6"]);
    // The worker saw an empty ring: the guest notifies again. One alone is not much.
    assert!(offer(&mut guest, 7));
    assert!(exit(&mut guest, &mut nic));
    worker(&mut guest, &mut nic);
    assert!(offer(&mut guest, 8));
    assert!(!exit(&mut guest, &mut nic));
    assert_eq!(wire.happened(), ["packet 7", "packet 8"]);
}

#[test]
fn what_waits_for_the_worker_when_the_gate_closes_is_held_with_the_rest() {
    let (mut guest, mut nic, wire) = guest();
    (1..=2).for_each(|number| _ = offer(&mut guest, number));
    exit(&mut guest, &mut nic);
    wire.happened();
    offer(&mut guest, 3);
    assert!(exit(&mut guest, &mut nic));
    nic.set_gate(Gate::Hold);
    worker(&mut guest, &mut nic);
    offer(&mut guest, 4);
    assert!(!exit(&mut guest, &mut nic));
    assert_eq!((nic.gate.held_packets(), wire.happened().len()), (2, 0));
    nic.gate.seal(Epoch(1));
    nic.commit(Epoch(1));
    work(&mut nic);
    assert_eq!(wire.happened(), ["packet 3", "packet 4"]);
}

#[test]
fn what_the_guest_sends_while_it_is_given_something_leaves_at_once() {
    let (mut guest, mut nic, wire) = guest();
    guest.add(0, &[(0x9000, 2048, true)]);
    // Its notification is still to come, and the device looks at all queues when it is given something: the guest sees that and need not notify any more.
    nic.arrived(0, std::iter::once([&[0; HEADER][..], &packet(1).frame].concat()));
    offer(&mut guest, 9);
    guest.with(|device, ctx| nic.settle(device, ctx));
    assert_eq!(wire.happened(), ["packet 9"]);
}
