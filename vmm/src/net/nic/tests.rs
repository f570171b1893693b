//! A card under the device lock, with a wire behind it that notes what happens.

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
