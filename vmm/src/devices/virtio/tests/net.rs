//! The network card, driven as a guest drives it.

use understudy_protocol::nic::Mac;
use virtio_bindings::virtio_net as spec;
use vm_memory::{Bytes, GuestAddress};

use super::super::net::{Net, NetConfig, Received};
use super::super::testing::{Guest, RAM_SIZE, VERSION_1, ring};
use super::super::{VirtioDevice, VirtioPci};
use super::*;
use crate::devices::testing::snapshot_tests;
use crate::net::nic::Nic;

const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const CONFIG: NetConfig = NetConfig { mac: MAC, pairs: 2, offloads: true, mtu: Some(9000) };
const MERGE: u64 = 1 << spec::VIRTIO_NET_F_MRG_RXBUF;
const CTRL: u64 = 1 << spec::VIRTIO_NET_F_CTRL_VQ
    | 1 << spec::VIRTIO_NET_F_CTRL_RX
    | 1 << spec::VIRTIO_NET_F_CTRL_VLAN
    | 1 << spec::VIRTIO_NET_F_STATUS
    | 1 << spec::VIRTIO_NET_F_GUEST_ANNOUNCE;
const OFFLOADS: u64 = 1 << spec::VIRTIO_NET_F_GUEST_CSUM
    | 1 << spec::VIRTIO_NET_F_GUEST_TSO4
    | 1 << spec::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << spec::VIRTIO_NET_F_CSUM
    | 1 << spec::VIRTIO_NET_F_HOST_TSO4;
const MQ: u64 = 1 << spec::VIRTIO_NET_F_MQ;
/// Without MQ the control queue is the third.
const CONTROL: u16 = 2;

fn card(features: u64) -> Guest<Net> {
    Guest::ready(Net::new(CONFIG), VERSION_1 | features)
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = [&MAC.0[..], &[2, 0, 0, 0, 0, 9, 8, 0]].concat();
    frame.resize(len, fill);
    frame
}

fn with_header(header: &[u8], frame: &[u8]) -> Vec<u8> {
    let mut packet = header.to_vec();
    packet.resize(12, 0);
    packet.extend(frame);
    packet
}

fn receive(guest: &mut Guest<Net>, pair: u16, packet: &[u8]) -> Received {
    let mut packet = packet.to_vec();
    guest.with(|d, ctx| {
        let received = d.receive(pair, &mut packet, ctx);
        d.process(ctx.ram);
        received
    })
}

/// The acknowledgement of a command.
fn command(guest: &mut Guest<Net>, at: u16, class: u32, what: u32, data: &[u8]) -> u8 {
    let text = [&[class as u8, what as u8], data].concat();
    guest.ram.write_slice(&text, GuestAddress(0xa000)).unwrap();
    guest.ram.write_obj(0x77u8, GuestAddress(0xb000)).unwrap();
    guest.add(at, &[(0xa000, text.len() as u32, false), (0xb000, 1, true)]);
    guest.kick(at);
    guest.bytes(0xb000, 1)[0]
}

#[test]
fn it_says_what_it_is() {
    let mut guest = Guest::new(Net::new(CONFIG));
    assert_eq!(guest.config_read(0x00), 0x1041_1af4);
    assert_eq!(guest.config_read(0x08) >> 8, 0x02_00_00, "an Ethernet controller");
    assert_eq!(guest.read::<2>(0x12), [5, 0], "two pairs and the control queue");
    assert_eq!(guest.read::<6>(0x2000), MAC.0);
    assert_eq!(guest.read::<2>(0x2006), [1, 0], "the cable is in");
    assert_eq!(guest.read::<2>(0x2008), [2, 0]);
    assert_eq!(guest.read::<2>(0x200a), 9000u16.to_le_bytes());
    assert_eq!(guest.read::<4>(0x2014), [0; 4], "and nothing behind its end");
    let bare = Net::new(NetConfig { pairs: 1, offloads: false, mtu: None, mac: MAC });
    let bits = [spec::VIRTIO_NET_F_MQ, spec::VIRTIO_NET_F_MTU, spec::VIRTIO_NET_F_CSUM, spec::VIRTIO_NET_F_GUEST_TSO6];
    assert_eq!(bits.map(|bit| bare.features() >> bit & 1), [0; 4], "a socket takes no offloads");
}

#[test]
fn what_the_guest_sends_comes_out_with_a_header_that_was_checked() {
    let mut guest = card(0);
    guest.send(1, 0x5000, &with_header(&[], &frame(60, 7)));
    guest.kick(1);
    let out = guest.with(|d, ctx| d.take_packets(true, ctx));
    assert_eq!(out.len(), 1);
    assert_eq!((out[0].frame.clone(), out[0].header, out[0].queue), (frame(60, 7), [0; 12], 0));
    assert_eq!(guest.used(1), (1, (0, 0)));
    // Not agreed on: a checksum. Too short, too long: no frames. None of it breaks the machine.
    guest.send(1, 0x5000, &with_header(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0], &frame(60, 7)));
    guest.send(1, 0x6000, &[0; 25]);
    guest.add(1, &[(0, RAM_SIZE as u32, false)]);
    guest.kick(1);
    assert!(guest.with(|d, ctx| d.take_packets(true, ctx)).is_empty() && !guest.broken());
    let refused = guest.device().device().refused();
    assert_eq!((refused.offload, refused.size), (1, 2));
    assert_eq!(guest.used(1).0, 4, "their buffers are the driver's again");
}

#[test]
fn without_room_packets_stay_in_the_ring_and_none_is_lost() {
    let mut guest = card(0);
    guest.with(|d, ctx| d.take_packets(false, ctx));
    guest.send(1, 0x5000, &with_header(&[], &frame(60, 1)));
    guest.kick(1);
    assert!(guest.with(|d, ctx| d.take_packets(false, ctx)).is_empty());
    assert_eq!(guest.used(1).0, 0);
    assert_eq!(guest.with(|d, ctx| d.take_packets(true, ctx)).len(), 1);
    assert_eq!(guest.used(1).0, 1);
}

#[test]
fn a_packet_fills_as_many_buffers_as_it_needs_and_the_driver_sees_them_at_once() {
    let mut guest = card(MERGE);
    guest.enable_msix();
    let packet = with_header(&[], &frame(100, 5));
    (0..2).for_each(|i| _ = guest.add(0, &[(0x5000 + 0x100 * i, 48, true)]));
    assert_eq!(receive(&mut guest, 0, &packet), Received::NoBuffers);
    assert_eq!(guest.used(0).0, 0);
    (2..4).for_each(|i| _ = guest.add(0, &[(0x5000 + 0x100 * i, 48, true)]));
    guest.clean();
    assert_eq!(receive(&mut guest, 0, &packet), Received::Taken);
    assert_eq!(guest.used(0), (3, (2, 16)), "48 + 48 + 16 bytes");
    let first = ring(0).2 + 4;
    assert_eq!(guest.bytes(first, 16), [0, 0, 0, 0, 48, 0, 0, 0, 1, 0, 0, 0, 48, 0, 0, 0]);
    assert_eq!(guest.bytes(0x5000 + 10, 2), [3, 0], "num_buffers");
    let got = [guest.bytes(0x5000, 48), guest.bytes(0x5100, 48), guest.bytes(0x5200, 16)].concat();
    assert_eq!(got[12..], packet[12..]);
    assert!(guest.dirty(0x5000) && guest.dirty(ring(0).2) && !guest.dirty(0x6000));
    assert_eq!(guest.msi_data(), [0x41]);
    // Nothing of the last buffer was lost: the next packet gets it.
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(20, 5))), Received::Taken);
    assert_eq!(guest.used(0), (4, (3, 32)));
}

#[test]
fn with_event_index_a_packet_in_several_buffers_interrupts_if_any_of_them_is_waited_for() {
    for (event, interrupts) in [(0u16, true), (1, true), (2, true), (3, false), (u16::MAX, false)] {
        let mut guest = card(MERGE | EVENT_IDX);
        guest.enable_msix();
        (0..3).for_each(|i| _ = guest.add(0, &[(0x5000 + 0x100 * i, 48, true)]));
        // used_event stands behind the available ring.
        guest.ram.write_obj(event, GuestAddress(ring(0).1 + 4 + 2 * u64::from(SIZE))).unwrap();
        assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(100, 5))), Received::Taken);
        assert_eq!(guest.msi_data() == [0x41], interrupts, "used_event {event}");
    }
}

#[test]
fn without_merging_a_packet_has_one_buffer_or_none() {
    let mut guest = card(0);
    guest.add(0, &[(0x5000, 12, true), (0x6000, 30, true)]);
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(31, 5))), Received::Unfit, "never cut off");
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(30, 5))), Received::Taken);
    assert_eq!(guest.bytes(0x500a, 2), [1, 0], "num_buffers");
    assert_eq!(guest.bytes(0x6000, 30), frame(30, 5));
    assert_eq!(guest.used(0), (1, (0, 42)));
    guest.add(0, &[(0x5000, 11, true)]);
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(30, 5))), Received::NoDriver);
    assert!(guest.broken(), "not even a header fits");
}

#[test]
fn the_guest_gets_only_offloads_that_it_takes_at_the_moment() {
    let mut guest = card(CTRL | OFFLOADS);
    let tso = with_header(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0], &frame(3000, 5));
    guest.add(0, &[(0x5000, 4096, true)]);
    assert_eq!(receive(&mut guest, 0, &tso), Received::Taken);
    let (class, set) = (spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS, spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET);
    assert_eq!(command(&mut guest, CONTROL, class, set, &2u64.to_le_bytes()), 0);
    let now = guest.device().device().offloads();
    assert!(now.csum && !now.tso4);
    assert_eq!(receive(&mut guest, 0, &tso), Received::Unfit);
    assert_eq!(command(&mut guest, CONTROL, class, set, &(1u64 << 8).to_le_bytes()), 1, "TSO6 was not agreed on");
    assert_eq!(receive(&mut card(0), 0, &tso), Received::Unfit);
}

#[test]
fn the_control_queue_does_what_it_is_asked_and_refuses_the_rest() {
    let mut guest = card(CTRL);
    assert_eq!(command(&mut guest, CONTROL, 0, 0, &[0]), 0, "promiscuous no more");
    let other = [&[2, 0, 0, 0, 0, 5], &frame(30, 0)[6..]].concat();
    guest.add(0, &[(0x5000, 2048, true)]);
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &other)), Received::Filtered);
    let tables = [&1u32.to_le_bytes()[..], &[2, 0, 0, 0, 0, 5], &0u32.to_le_bytes()].concat();
    assert_eq!(command(&mut guest, CONTROL, 1, 0, &tables), 0);
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &other)), Received::Taken);
    assert_eq!(command(&mut guest, CONTROL, 1, 1, &[2, 0, 0, 0, 0, 7]), 0);
    assert_eq!(guest.device().device().mac(), Mac([2, 0, 0, 0, 0, 7]));
    assert_eq!(guest.read::<6>(0x2000), [2, 0, 0, 0, 0, 7]);
    assert_eq!(command(&mut guest, CONTROL, 2, 0, &[5, 0]), 0);
    for (what, class, cmd, data) in [
        ("a class that there is not", 77, 0, &[][..]),
        ("a table that is cut off", 1, 0, &[2, 0, 0, 0, 1, 2, 3]),
        ("a table as large as numbers go", 1, 0, &[0xff, 0xff, 0xff, 0xff]),
        ("a table with something behind it", 1, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ("a group's address for its own", 1, 1, &[1, 0, 0, 0, 0, 7]),
        ("a VLAN that there is not", 2, 0, &[0, 0x10]),
        ("a switch without its position", 0, 1, &[]),
        ("extra switches that were not agreed on", 0, 3, &[1]),
        ("an announcement that nobody asked for", 3, 0, &[]),
        ("queues that were not agreed on", 4, 0, &[1, 0]),
    ] {
        assert_eq!(command(&mut guest, CONTROL, class, cmd, data), 1, "{what}");
    }
    assert!(!guest.broken());
    guest.add(CONTROL, &[(0xa000, 2, false)]);
    guest.kick(CONTROL);
    assert!(guest.broken(), "no room for the acknowledgement");
}

#[test]
fn several_pairs_are_used_when_the_driver_says_so() {
    let mut guest = card(CTRL | MQ);
    guest.send(3, 0x5000, &with_header(&[], &frame(60, 1)));
    guest.kick(3);
    assert!(guest.with(|d, ctx| d.take_packets(true, ctx)).is_empty(), "one pair at first");
    guest.add(0, &[(0x6000, 2048, true)]);
    assert_eq!(receive(&mut guest, 1, &with_header(&[], &frame(60, 1))), Received::Taken);
    assert_eq!(guest.used(0).0, 1);
    // With MQ the control queue is behind all pairs.
    assert_eq!(command(&mut guest, 4, 4, 0, &[3, 0]), 1);
    assert_eq!(command(&mut guest, 4, 4, 0, &[2, 0]), 0);
    assert_eq!(guest.with(|d, ctx| d.take_packets(true, ctx)).first().map(|p| p.queue), Some(1));
    guest.add(2, &[(0x7000, 2048, true)]);
    assert_eq!(receive(&mut guest, 1, &with_header(&[], &frame(60, 1))), Received::Taken);
    assert_eq!(guest.used(2).0, 1);
}

/// A chain of this many bytes from one buffer, again and again: as much as a driver that never stops would send.
fn flood(guest: &mut Guest<Net>, queue: u16, frames: usize, len: usize) {
    let packet = with_header(&[], &frame(len, 7));
    guest.ram.write_slice(&packet, GuestAddress(0x5000)).unwrap();
    (0..frames).for_each(|_| _ = guest.add(queue, &[(0x5000, packet.len() as u32, false)]));
    guest.kick(queue);
}

#[test]
fn a_pair_that_always_has_something_to_send_keeps_no_other_waiting() {
    let mut guest = card(CTRL | MQ);
    assert_eq!(command(&mut guest, 4, 4, 0, &[2, 0]), 0);
    guest.with(|d, ctx| d.take_packets(false, ctx));
    // As many of the largest as come out in one go: its ring is never seen empty.
    let (many, largest) = (usize::from(SIZE), 65_550);
    flood(&mut guest, 1, many, largest);
    guest.send(3, 0x3_0000, &with_header(&[], &frame(60, 1)));
    guest.kick(3);
    let mut before = 0;
    while before <= 2 * many {
        let out = guest.with(|d, ctx| d.take_packets(true, ctx));
        if let Some(at) = out.iter().position(|packet| packet.queue == 1) {
            assert!(before + at <= 1, "{} packets went before the other pair's only one", before + at);
            return;
        }
        before += out.len();
        flood(&mut guest, 1, out.len(), largest);
    }
    panic!("the other pair's packet never left");
}

#[test]
fn a_pair_whose_driver_takes_nothing_holds_up_no_other() {
    let mut guest = card(CTRL | MQ);
    assert_eq!(command(&mut guest, 4, 4, 0, &[2, 0]), 0);
    let mut nic = Nic::new(SLOT);
    nic.arrived(0, std::iter::once(with_header(&[], &frame(60, 1))));
    nic.arrived(1, std::iter::once(with_header(&[], &frame(60, 2))));
    guest.add(2, &[(0x7000, 2048, true)]);
    guest.with(|d, ctx| nic.settle(d, ctx));
    assert_eq!((guest.used(0).0, guest.used(2).0), (0, 1));
    guest.add(0, &[(0x6000, 2048, true)]);
    guest.with(|d, ctx| nic.settle(d, ctx));
    assert_eq!((guest.used(0).0, guest.bytes(0x6000 + 12 + 59, 1)[0]), (1, 1), "and nothing of its own is lost");
}

#[test]
fn the_driver_is_told_of_the_cable_and_asked_to_announce_itself() {
    let mut guest = card(CTRL);
    guest.enable_msix();
    guest.with(|d, _| d.set_link(false));
    assert_eq!((guest.msi_data(), guest.read::<1>(0x2006)), (vec![0x40], [0]));
    guest.with(|d, _| d.set_link(true));
    assert!(guest.with(|d, _| d.ask_to_announce()));
    assert_eq!(guest.read::<1>(0x2006), [3]);
    assert_eq!(command(&mut guest, CONTROL, 3, 0, &[]), 0);
    assert_eq!(guest.read::<1>(0x2006), [1]);
    assert!(!card(0).with(|d, _| d.ask_to_announce()), "it has not agreed to that");
}

#[test]
fn nothing_is_given_to_a_driver_that_is_not_there() {
    let mut guest = Guest::new(Net::new(CONFIG));
    assert_eq!(receive(&mut guest, 0, &with_header(&[], &frame(60, 1))), Received::NoDriver);
}

mod state {
    use super::*;

    fn used() -> Net {
        let mut guest = card(CTRL | OFFLOADS | MQ);
        for (class, what, data) in [
            (0, 0, &[0][..]),
            (1, 0, &[1, 0, 0, 0, 2, 0, 0, 0, 0, 5, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1]),
            (1, 1, &[2, 0, 0, 0, 0, 7]),
            (2, 0, &[65, 0]),
            (4, 0, &[2, 0]),
            (5, 0, &[2, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            assert_eq!(command(&mut guest, 4, class, what, data), 0);
        }
        guest.with(|d, _| d.ask_to_announce());
        let saved = guest.device().device().save();
        let mut net = Net::new(CONFIG);
        net.restore(saved).unwrap();
        net
    }

    snapshot_tests! {
        fresh: Net::new(CONFIG),
        used: used(),
        exercise: |device| {
            let guest = Guest::new(Rng::new());
            let mut queues: Vec<_> = device.queue_sizes().iter().map(|n| super::super::super::VirtQueue::new(*n)).collect();
            let _ = device.process(&mut queues, &guest.ram);
            device.read_config(0, &mut [0; 64]);
        },
        golden: "02000000000700000000000001020000000005000101005e0000010040000200000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000201020101",
    }

    #[test]
    fn what_can_never_have_been_is_refused() {
        let good = used().save();
        let bad: [fn(&mut super::super::super::net::state::V1); 5] = [
            |s| s.pairs = 3,
            |s| s.pairs = 0,
            |s| s.vlans.truncate(63),
            |s| s.unicast.0 = vec![[2; 6]; 65],
            |s| s.guest_offloads = Some(1),
        ];
        for spoil in bad {
            let mut state = good.clone();
            spoil(&mut state);
            assert!(Net::new(CONFIG).restore(state).is_err());
        }
    }

    #[test]
    fn after_a_takeover_the_guest_takes_what_it_took_before() {
        let mut guest = card(CTRL | OFFLOADS);
        command(&mut guest, CONTROL, 5, 0, &2u64.to_le_bytes());
        let saved = guest.bus.save_payloads();
        let mut bus = crate::devices::pci::PciBus::new();
        bus.add(SLOT, Box::new(VirtioPci::new(Net::new(CONFIG)))).unwrap();
        bus.restore_payloads(&mut Payloads::new(saved).unwrap()).unwrap();
        let other = bus.get::<VirtioPci<Net>>(SLOT).unwrap().device();
        assert_eq!(other.offloads(), guest.device().device().offloads());
        assert!(other.offloads().csum && !other.offloads().tso4);
    }
}
