//! Which addresses a guest uses, learnt from what it sends: after a takeover the network is told where they are now ([`super::announce`]).
//!
//! ```text
//!  ARP's sender, neighbour advertisement, solicitation ──► told   what the guest itself claims: announced
//!  source of other IP packets                          ──► used   announced only where nothing was told: it may be another's, forwarded
//!  anything                                            ──► its card and VLAN, for the switches
//! ```
//! What somebody else claims afterwards is the guest's no more (a floating address that moved on must not be pulled back by a takeover). So is what the
//! guest has not used for [`STALE_NS`] of its time.
//!
//! Pure. Part of the checkpoint, so that whoever takes over knows it; bounded, whatever the guest sends.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::frame::{Mac, Says, look};
use crate::devices::{RestoreError, Snapshot, VmTime};

/// Most entries; the one that was not seen for longest makes room.
pub const MOST: usize = 64;
/// What was not used for so long of the guest's time is forgotten: 30 minutes.
pub const STALE_NS: u64 = 30 * 60 * 1_000_000_000;
/// An entry's time is kept only to this (most packets then change nothing, and need not be read to their end).
const FRESH_NS: u64 = 1_000_000_000;

/// Saved state.
pub mod state {
    use super::{Deserialize, IpAddr, Serialize, VmTime};

    /// What a checkpoint holds.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Not sorted.
        pub entries: Vec<Entry>,
    }

    /// One of them.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Entry {
        /// The card's address.
        pub mac: [u8; 6],
        /// The guest's own tag; 0: none.
        pub vlan: u16,
        /// `None`: card and VLAN alone.
        pub address: Option<IpAddr>,
        /// The guest has said that it is its own.
        pub told: bool,
        /// It said that it is a router (IPv6).
        pub router: bool,
        /// When it was used last.
        pub seen: VmTime,
    }
}

pub use state::Entry;

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    entries: Vec<Entry>,
    /// The sender that was learnt from last ([`same`]), and when.
    last: Option<([u8; 24], VmTime)>,
}

impl Addresses {
    /// The guest sent this.
    pub fn sent(&mut self, frame: &[u8], now: VmTime) {
        // Most packets are of the same sender as the one before.
        let sender = same(frame);
        if let (Some(sender), Some((last, at))) = (sender, self.last)
            && last == sender
            && now.since(at) < FRESH_NS
        {
            return;
        }
        let Some(seen) = look(frame) else { return };
        if seen.source[0] & 1 != 0 {
            return;
        }
        self.entries.retain(|entry| now.since(entry.seen) < STALE_NS);
        let vlan = seen.vlan.unwrap_or(0);
        let mut learn = |address, told, router| self.learn(seen.source, vlan, address, told, router, now);
        learn(None, false, false);
        match seen.says {
            Says::Arp { mac, address } if mac == seen.source => learn(Some(address.into()), true, false),
            Says::Advertised { address, router } => learn(Some(address.into()), true, router),
            Says::Solicits(address) => learn(Some(address.into()), true, false),
            Says::Routes(address) => learn(Some(address.into()), true, true),
            Says::Ipv4(address) => learn(Some(address.into()), false, false),
            Says::Ipv6(address) => learn(Some(address.into()), false, false),
            Says::Arp { .. } | Says::Other => {}
        }
        self.last = sender.map(|sender| (sender, now));
    }

    fn learn(&mut self, mac: Mac, vlan: u16, address: Option<IpAddr>, told: bool, router: bool, now: VmTime) {
        if address.is_some_and(|address| !is_somebodys(address)) {
            return;
        }
        let known = self.entries.iter_mut().find(|e| (e.mac, e.vlan, e.address) == (mac, vlan, address));
        if let Some(entry) = known {
            entry.told |= told;
            entry.router |= router;
            entry.seen = now;
            return;
        }
        if self.entries.len() >= MOST {
            // Of those that nobody claims first.
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, e)| (e.told, e.seen)).map(|(at, _)| at);
            if let Some(at) = oldest {
                self.entries.swap_remove(at);
            }
        }
        self.entries.push(Entry { mac, vlan, address, told, router, seen: now });
    }

    /// Somebody outside sent this: what it claims is not the guest's any more.
    pub fn heard(&mut self, frame: &[u8]) {
        if !may_claim(frame) {
            return;
        }
        let Some(seen) = look(frame) else { return };
        let claimed = match seen.says {
            Says::Arp { mac, address } if mac == seen.source => IpAddr::from(address),
            Says::Advertised { address, .. } => IpAddr::from(address),
            _ => return,
        };
        let vlan = seen.vlan.unwrap_or(0);
        let before = self.entries.len();
        let theirs = |e: &Entry| e.vlan == vlan && e.address == Some(claimed) && e.mac != seen.source;
        self.entries.retain(|entry| !theirs(entry));
        if self.entries.len() != before {
            self.last = None;
        }
    }

    /// What the network has to be told of.
    pub fn to_announce(&self, now: VmTime) -> impl Iterator<Item = &Entry> {
        let fresh = move |e: &&Entry| now.since(e.seen) < STALE_NS;
        self.entries.iter().filter(fresh).filter(|entry| match entry.address {
            None => true,
            Some(_) if entry.told => true,
            Some(address) => {
                let of_its_kind = |e: &Entry| e.told && e.address.is_some_and(|a| a.is_ipv4() == address.is_ipv4());
                !self.entries.iter().any(|e| (e.mac, e.vlan) == (entry.mac, entry.vlan) && of_its_kind(e))
            }
        })
    }

    /// The guest was switched on anew.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// What packets of one sender have in common that say nothing but whose they are: card, protocol, IP source. (TCP and UDP without a tag: neighbour
/// discovery has to be read.)
fn same(frame: &[u8]) -> Option<[u8; 24]> {
    let mut same = [0; 24];
    same[..8].copy_from_slice(frame.get(6..14)?);
    match same[6..8] {
        [0x08, 0x00] => same[8..12].copy_from_slice(frame.get(26..30)?),
        [0x86, 0xdd] if matches!(frame.get(20), Some(6 | 17)) => same[8..].copy_from_slice(frame.get(22..38)?),
        _ => return None,
    }
    Some(same)
}

/// Whether a frame is ARP or perhaps ICMPv6, so that most others are not read.
fn may_claim(frame: &[u8]) -> bool {
    let at = match frame.get(12..14) {
        Some([0x81, 0x00]) => 16,
        Some(_) => 12,
        None => return false,
    };
    match frame.get(at..at + 2) {
        Some([0x08, 0x06]) => true,
        Some([0x86, 0xdd]) => !matches!(frame.get(at + 8), Some(6 | 17)),
        _ => false,
    }
}

/// Whether an address can be one node's.
fn is_somebodys(address: IpAddr) -> bool {
    let unusable = match address {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(_) => false,
    };
    !(unusable || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

impl Snapshot for Addresses {
    const KIND: &'static str = "nic-addresses";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        // `last` only spares work.
        let Self { entries, last: _ } = self;
        state::V1 { entries: entries.clone() }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { entries } = state;
        let invalid = |what: &str| Err(RestoreError::invalid(Self::KIND, what));
        if entries.len() > MOST {
            return invalid("more addresses than are kept");
        }
        for (n, entry) in entries.iter().enumerate() {
            if entry.mac[0] & 1 != 0 || entry.vlan > 4095 || entry.address.is_some_and(|a| !is_somebodys(a)) {
                return invalid("an address that cannot be one node's");
            }
            let same = |e: &Entry| (e.mac, e.vlan, e.address) == (entry.mac, entry.vlan, entry.address);
            if entries[..n].iter().any(same) {
                return invalid("an address twice");
            }
        }
        *self = Self { entries, last: None };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use etherparse::icmpv6::NeighborAdvertisementHeader;
    use etherparse::{ArpEthIpv4Packet, ArpOperation, Icmpv6Type, PacketBuilder, VlanId};
    use proptest::prelude::*;

    use super::super::frame::{BROADCAST, ND_HOPS};
    use super::*;

    const GUEST: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const NOW: VmTime = VmTime(5_000_000_000);

    fn arp(mac: Mac, address: [u8; 4]) -> Vec<u8> {
        let arp = ArpEthIpv4Packet {
            operation: ArpOperation::REQUEST,
            sender_mac: mac,
            sender_ipv4: address,
            target_mac: [0; 6],
            target_ipv4: [10, 0, 0, 9],
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(mac, BROADCAST).arp(arp.into()).write(&mut frame).unwrap();
        frame
    }
    fn udp(mac: Mac, source: [u8; 4]) -> Vec<u8> {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(mac, OTHER).ipv4(source, [10, 0, 0, 9], 64).udp(1, 2).write(&mut frame, b"x").unwrap();
        frame
    }
    fn advertisement(mac: Mac, address: Ipv6Addr, router: bool) -> Vec<u8> {
        let flags = NeighborAdvertisementHeader { router, solicited: true, r#override: false };
        let builder = PacketBuilder::ethernet2(mac, OTHER).ipv6(address.octets(), [0xff; 16], ND_HOPS);
        let mut frame = Vec::new();
        let builder = builder.icmpv6(Icmpv6Type::NeighborAdvertisement(flags));
        builder.write(&mut frame, &address.octets()).unwrap();
        frame
    }
    fn announced(addresses: &Addresses) -> Vec<(u16, String)> {
        let text = |e: &Entry| (e.vlan, e.address.map_or("-".into(), |a| a.to_string()));
        addresses.to_announce(NOW).map(text).collect()
    }

    #[test]
    fn what_the_guest_claims_is_announced_and_what_it_forwards_is_not() {
        let mut a = Addresses::default();
        a.sent(&udp(GUEST, [8, 8, 8, 8]), NOW);
        assert_eq!(announced(&a), [(0, "-".into()), (0, "8.8.8.8".into())], "nothing better is known");
        a.sent(&arp(GUEST, [10, 0, 0, 1]), NOW);
        a.sent(&udp(GUEST, [10, 0, 0, 1]), NOW);
        assert_eq!(announced(&a), [(0, "-".into()), (0, "10.0.0.1".into())]);
    }

    #[test]
    fn a_routers_advertisement_is_remembered_as_one() {
        let (mut a, address) = (Addresses::default(), "fe80::1".parse().unwrap());
        a.sent(&advertisement(GUEST, address, true), NOW);
        let router = a.to_announce(NOW).find(|e| e.address == Some(address.into())).unwrap();
        assert!(router.router && router.told);
    }

    #[test]
    fn each_vlan_of_the_guest_is_known_apart() {
        let mut a = Addresses::default();
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(GUEST, OTHER).single_vlan(VlanId::try_new(12).unwrap());
        builder.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 64).udp(1, 2).write(&mut frame, b"x").unwrap();
        a.sent(&frame, NOW);
        a.sent(&udp(GUEST, [10, 0, 0, 1]), NOW);
        let both = [(12, "-"), (12, "10.0.0.1"), (0, "-"), (0, "10.0.0.1")];
        assert_eq!(announced(&a), both.map(|(vlan, address)| (vlan, address.to_owned())));
    }

    #[test]
    fn probes_and_what_is_nobodys_address_are_not_learnt() {
        let mut a = Addresses::default();
        a.sent(&arp(GUEST, [0, 0, 0, 0]), NOW);
        a.sent(&udp(GUEST, [127, 0, 0, 1]), NOW);
        a.sent(&udp(GUEST, [224, 0, 0, 1]), NOW);
        a.sent(&advertisement(GUEST, Ipv6Addr::UNSPECIFIED, false), NOW);
        assert_eq!(announced(&a), [(0, "-".into())]);
    }

    #[test]
    fn an_address_that_moved_on_to_somebody_else_is_not_pulled_back() {
        let (mut a, v6) = (Addresses::default(), "fd00::7".parse().unwrap());
        a.sent(&arp(GUEST, [10, 0, 0, 1]), NOW);
        a.sent(&advertisement(GUEST, v6, false), NOW);
        a.heard(&arp(OTHER, [10, 0, 0, 2]));
        a.heard(&arp(GUEST, [10, 0, 0, 1]));
        a.heard(&udp(OTHER, [10, 0, 0, 1]));
        assert_eq!(announced(&a).len(), 3, "another address, an echo of its own, and what claims nothing");
        a.heard(&arp(OTHER, [10, 0, 0, 1]));
        a.heard(&advertisement(OTHER, v6, false));
        assert_eq!(announced(&a), [(0, "-".into())]);
    }

    #[test]
    fn what_was_not_used_for_long_is_forgotten() {
        let mut a = Addresses::default();
        a.sent(&arp(GUEST, [10, 0, 0, 1]), VmTime(0));
        assert_eq!(a.to_announce(VmTime(STALE_NS)).count(), 0);
        a.sent(&arp(GUEST, [10, 0, 0, 2]), VmTime(STALE_NS));
        assert_eq!(a.save().entries.len(), 2, "the card, and its new address");
    }

    #[test]
    fn packets_of_one_sender_keep_it_fresh() {
        let mut a = Addresses::default();
        for second in 0..3600 {
            a.sent(&udp(GUEST, [10, 0, 0, 1]), VmTime(second * FRESH_NS));
        }
        assert_eq!(a.to_announce(VmTime(3600 * FRESH_NS)).count(), 2);
    }

    #[test]
    fn a_guest_that_claims_everything_costs_no_more_than_the_bound() {
        let mut a = Addresses::default();
        a.sent(&arp(GUEST, [10, 0, 0, 1]), NOW);
        for n in 0..2000u32 {
            a.sent(&udp(GUEST, Ipv4Addr::from(0x0b00_0000 + n).octets()), NOW);
        }
        assert_eq!(a.save().entries.len(), MOST);
        assert!(announced(&a).contains(&(0, "10.0.0.1".into())), "what it claims outlives what it forwards");
    }

    #[test]
    fn the_bytes_of_version_1_stay_what_they_are() {
        let mut a = Addresses::default();
        a.sent(&arp(GUEST, [10, 0, 0, 1]), VmTime(7));
        let bytes = postcard::to_allocvec(&a.save()).unwrap();
        let golden = [2, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 7, 2, 0, 0, 0, 0, 1, 0, 1, 0, 10, 0, 0, 1, 1, 0, 7];
        assert_eq!(bytes, golden);
        let mut b = Addresses::default();
        b.restore(postcard::from_bytes(&golden).unwrap()).unwrap();
        assert_eq!(b.save(), a.save());
    }

    #[test]
    fn impossible_states_are_refused() {
        let entry = Entry { mac: GUEST, vlan: 0, address: None, told: false, router: false, seen: NOW };
        let refused = |entries| Addresses::default().restore(state::V1 { entries }).is_err();
        assert!(!refused(vec![entry.clone()]));
        assert!(refused(vec![entry.clone(); 2]));
        assert!(refused(vec![Entry { vlan: 4096, ..entry.clone() }]));
        assert!(refused(vec![Entry { mac: BROADCAST, ..entry.clone() }]));
        assert!(refused(vec![Entry { address: Some("ff02::1".parse().unwrap()), ..entry.clone() }]));
        let many = (0..=MOST as u16).map(|vlan| Entry { vlan, ..entry.clone() }).collect();
        assert!(refused(many));
    }

    proptest! {
        #[test]
        fn whatever_is_sent_and_heard_can_be_saved_and_restored(
            frames in proptest::collection::vec((any::<bool>(), proptest::collection::vec(any::<u8>(), 0..100)), 0..50)
        ) {
            let mut a = Addresses::default();
            for (sent, frame) in &frames {
                if *sent { a.sent(frame, NOW) } else { a.heard(frame) }
            }
            Addresses::default().restore(a.save()).unwrap();
        }
    }
}
