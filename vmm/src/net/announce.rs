//! After a takeover: the network is told where the guest's addresses are now.
//!
//! | whom | what |
//! |---|---|
//! | switches and bridges | RARP request of each card and VLAN (as QEMU and VMware do): their tables point to the port that it came by |
//! | IPv4 neighbours | gratuitous ARP as request and as reply (RFC 5227 §3, RFC 826; some listen to only one of them) |
//! | IPv6 neighbours | unsolicited neighbour advertisement with override (RFC 4861 §7.2.6) to all nodes |
//!
//! Repeated at [`TIMES`], because a switch may still be busy with a port that has just come up. The frames contain nothing but what the committed image
//! knows; so they wait for no commit, and leave before anything that the guest sends in its new life.
//!
//! Pure: the caller says how long ago the takeover was, and sends.

use std::net::IpAddr;
use std::time::Duration;

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, EtherType, Ethernet2Header, Icmpv6Type, PacketBuilder, SingleVlanHeader, VlanId,
    VlanPcp, ether_type,
};

use super::addresses::{Addresses, Entry};
use super::frame::{BROADCAST, Mac, ND_HOPS};
use crate::devices::VmTime;

/// When announcements are made, after the machine began to run here.
pub const TIMES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(350),
    Duration::from_millis(750),
];

/// RFC 903.
const RARP: EtherType = EtherType(0x8035);
const REVERSE_REQUEST: ArpOperation = ArpOperation(3);
/// Shortest frame, without the check sequence (IEEE 802.3).
const SHORTEST: usize = 60;
/// Option of neighbour discovery: target link-layer address, in units of 8 bytes: 1.
const TARGET_LINK_LAYER: [u8; 2] = [2, 1];

/// What a NIC still has to announce.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announcer {
    frames: Vec<Vec<u8>>,
    made: usize,
}

impl Announcer {
    /// The guest with these addresses begins to run here; `mac` is its card, should it never have sent anything.
    pub fn new(addresses: &Addresses, mac: Mac, now: VmTime) -> Self {
        let own = Entry { mac, vlan: 0, address: None, told: false, router: false, seen: now };
        let mut entries: Vec<&Entry> = addresses.to_announce(now).collect();
        if !entries.iter().any(|entry| entry.mac == mac) {
            entries.insert(0, &own);
        }
        // Switches first: they carry the rest.
        entries.sort_by_key(|entry| entry.address);
        Self { frames: entries.iter().flat_map(|entry| frames(entry)).collect(), made: 0 }
    }

    /// When the next ones are due, after the machine began to run; `None`: all are made.
    pub fn next(&self) -> Option<Duration> {
        TIMES.get(self.made).copied().filter(|_| !self.frames.is_empty())
    }

    /// What is to be sent now, once for all times that have passed.
    pub fn due(&mut self, since: Duration) -> &[Vec<u8>] {
        if self.next().is_none_or(|next| next > since) {
            return &[];
        }
        self.made = TIMES.iter().filter(|time| **time <= since).count();
        &self.frames
    }
}

fn frames(entry: &Entry) -> Vec<Vec<u8>> {
    let mac = entry.mac;
    match entry.address {
        None => {
            let rarp = ArpEthIpv4Packet {
                operation: REVERSE_REQUEST,
                sender_mac: mac,
                sender_ipv4: [0; 4],
                target_mac: mac,
                target_ipv4: [0; 4],
            };
            vec![ethernet(entry, RARP, &rarp.to_bytes())]
        }
        Some(IpAddr::V4(address)) => {
            let form = |operation, target_mac| {
                let arp = ArpEthIpv4Packet {
                    operation,
                    sender_mac: mac,
                    sender_ipv4: address.octets(),
                    target_mac,
                    target_ipv4: address.octets(),
                };
                ethernet(entry, ether_type::ARP, &arp.to_bytes())
            };
            vec![form(ArpOperation::REQUEST, [0; 6]), form(ArpOperation::REPLY, BROADCAST)]
        }
        Some(IpAddr::V6(address)) => {
            let flags = NeighborAdvertisementHeader { router: entry.router, solicited: false, r#override: true };
            let all_nodes = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
            let body = [&address.octets()[..], &TARGET_LINK_LAYER, &mac].concat();
            let link = PacketBuilder::ethernet2(mac, [0x33, 0x33, 0, 0, 0, 1]);
            let kind = Icmpv6Type::NeighborAdvertisement(flags);
            let mut frame = Vec::new();
            let source = address.octets();
            let written = match vlan(entry) {
                Some(id) => link.single_vlan(id).ipv6(source, all_nodes, ND_HOPS).icmpv6(kind).write(&mut frame, &body),
                None => link.ipv6(source, all_nodes, ND_HOPS).icmpv6(kind).write(&mut frame, &body),
            };
            // Into memory, and of a length that always fits.
            if written.is_ok() { vec![frame] } else { Vec::new() }
        }
    }
}

fn vlan(entry: &Entry) -> Option<VlanId> {
    VlanId::try_new(entry.vlan).ok().filter(|id| id.value() != 0)
}

/// A broadcast of `payload`.
fn ethernet(entry: &Entry, ether_type: EtherType, payload: &[u8]) -> Vec<u8> {
    let vlan = vlan(entry);
    let outer = vlan.map_or(ether_type, |_| ether_type::VLAN_TAGGED_FRAME);
    let header = Ethernet2Header { source: entry.mac, destination: BROADCAST, ether_type: outer };
    let mut frame = header.to_bytes().to_vec();
    if let Some(vlan_id) = vlan {
        let tag = SingleVlanHeader { pcp: VlanPcp::ZERO, drop_eligible_indicator: false, vlan_id, ether_type };
        frame.extend(tag.to_bytes());
    }
    frame.extend(payload);
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

#[cfg(test)]
mod tests {
    use etherparse::{LaxSlicedPacket, TransportSlice};

    use super::super::addresses::state;
    use super::super::frame::{Says, Seen, look};
    use super::*;
    use crate::devices::Snapshot;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn knows(entries: &[(u16, Option<&str>, bool)]) -> Addresses {
        let entry = |(vlan, address, router): &(u16, Option<&str>, bool)| Entry {
            mac: MAC,
            vlan: *vlan,
            address: address.map(|a| a.parse().unwrap()),
            told: address.is_some(),
            router: *router,
            seen: VmTime(0),
        };
        let mut addresses = Addresses::default();
        addresses.restore(state::V1 { entries: entries.iter().map(entry).collect() }).unwrap();
        addresses
    }

    #[test]
    fn switches_are_told_of_a_card_even_if_it_never_sent_anything() {
        let mut a = Announcer::new(&Addresses::default(), MAC, VmTime(0));
        let frames = a.due(Duration::ZERO);
        assert_eq!(frames.len(), 1);
        let mut rarp = [[0xff; 6], MAC].concat();
        rarp.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        rarp.extend([&MAC[..], &[0; 4], &MAC, &[0; 4]].concat());
        rarp.resize(60, 0);
        assert_eq!(frames[0], rarp);
    }

    #[test]
    fn ipv4_neighbours_are_told_by_request_and_by_reply() {
        let mut a = Announcer::new(&knows(&[(0, Some("10.0.0.1"), false)]), MAC, VmTime(0));
        let frames = a.due(Duration::ZERO);
        let says = Says::Arp { mac: MAC, address: [10, 0, 0, 1].into() };
        assert_eq!(frames.len(), 2);
        for (frame, operation) in frames.iter().zip([1, 2]) {
            assert_eq!(look(frame), Some(Seen { source: MAC, vlan: None, says }));
            assert_eq!((frame[21], &frame[38..42]), (operation, &[10, 0, 0, 1][..]));
        }
    }

    #[test]
    fn ipv6_neighbours_are_told_to_override_and_whether_it_is_a_router() {
        for router in [false, true] {
            let mut a = Announcer::new(&knows(&[(9, Some("fd00::1"), router)]), MAC, VmTime(0));
            let frame = &a.due(Duration::ZERO)[0];
            let address = "fd00::1".parse().unwrap();
            let says = Says::Advertised { address, router };
            assert_eq!(look(frame), Some(Seen { source: MAC, vlan: Some(9), says }));
            let sliced = LaxSlicedPacket::from_ethernet(frame).unwrap();
            let Some(TransportSlice::Icmpv6(icmp)) = sliced.transport else { panic!("no ICMPv6") };
            let Icmpv6Type::NeighborAdvertisement(flags) = icmp.icmp_type() else { panic!("no advertisement") };
            assert!(flags.r#override && !flags.solicited);
            let to = "ff02::1".parse::<std::net::Ipv6Addr>().unwrap();
            assert!(icmp.is_checksum_valid(address.octets(), to.octets()));
            assert_eq!(icmp.slice()[24..], [2, 1, 2, 0, 0, 0, 0, 1]);
        }
    }

    #[test]
    fn they_are_repeated_at_their_times_and_not_made_up_for() {
        let mut a = Announcer::new(&knows(&[(0, None, false)]), MAC, VmTime(0));
        let ms = Duration::from_millis;
        let times = [0, 1, 49, 50, 400, 749, 750, 9000];
        let made = times.map(|at| a.due(ms(at)).len());
        assert_eq!(made, [1, 0, 0, 1, 1, 0, 1, 0], "150 and 350 ms are one at 400");
        assert_eq!(a.next(), None);
    }
}
