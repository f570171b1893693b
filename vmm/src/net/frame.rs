//! What a frame says about addresses: for what is learnt from the guest ([`super::addresses`]) and for what it may not say ([`super::filter`]).
//!
//! Any bytes are survived; what is damaged or unknown says nothing. Parsing is `etherparse`'s.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::Icmpv6PayloadSlice;
use etherparse::{Icmpv6Type, LaxLinkExtSlice, LaxNetSlice, LaxSlicedPacket, LinkSlice, TransportSlice};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The address of everybody.
pub const BROADCAST: Mac = [0xff; 6];

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// From whom.
    pub source: Mac,
    /// The VLAN of its tag; `None`: it has none. Of a frame with several tags nothing more is known.
    pub vlan: Option<u16>,
    /// What is in it.
    pub says: Says,
}

/// See [`Seen`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// ARP, request or reply: this address is that card's.
    Arp {
        /// The sender's card.
        mac: Mac,
        /// The sender's address; 0.0.0.0 in a probe.
        address: Ipv4Addr,
    },
    /// A neighbour advertisement (RFC 4861 §4.4): this address is mine.
    Advertised {
        /// It.
        address: Ipv6Addr,
        /// And I am a router.
        router: bool,
    },
    /// A neighbour solicitation (§4.3) from this address.
    Solicits(Ipv6Addr),
    /// A router advertisement (§4.2) from this address.
    Routes(Ipv6Addr),
    /// Other IPv4 from this address.
    Ipv4(Ipv4Addr),
    /// Other IPv6 from this address.
    Ipv6(Ipv6Addr),
    /// Something else.
    Other,
}

/// Hop limit of neighbour discovery: what has passed a router is none (RFC 4861 §7.1).
pub const ND_HOPS: u8 = 255;

/// Read a frame; `None`: it is none.
pub fn look(frame: &[u8]) -> Option<Seen> {
    let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &sliced.link else { return None };
    let (source, mut vlan) = (ethernet.source(), None);
    for (n, tag) in sliced.link_exts.iter().enumerate() {
        match tag {
            LaxLinkExtSlice::Vlan(tag) if n == 0 => vlan = Some(tag.vlan_identifier().value()),
            _ => return Some(Seen { source, vlan, says: Says::Other }),
        }
    }
    let says = match &sliced.net {
        Some(LaxNetSlice::Arp(arp)) => arp
            .to_packet()
            .try_eth_ipv4()
            .map_or(Says::Other, |arp| Says::Arp { mac: arp.sender_mac, address: arp.sender_ipv4_addr() }),
        Some(LaxNetSlice::Ipv4(ip)) => Says::Ipv4(ip.header().source_addr()),
        Some(LaxNetSlice::Ipv6(ip)) => {
            let source = ip.header().source_addr();
            let discovery = ip.header().hop_limit() == ND_HOPS;
            match &sliced.transport {
                Some(TransportSlice::Icmpv6(icmp)) if discovery => match (icmp.icmp_type(), icmp.payload_slice()) {
                    (Icmpv6Type::NeighborAdvertisement(flags), Ok(Icmpv6PayloadSlice::NeighborAdvertisement(body))) => {
                        Says::Advertised { address: body.target_address(), router: flags.router }
                    }
                    (Icmpv6Type::NeighborSolicitation, _) => Says::Solicits(source),
                    (Icmpv6Type::RouterAdvertisement(_), _) => Says::Routes(source),
                    _ => Says::Ipv6(source),
                },
                _ => Says::Ipv6(source),
            }
        }
        None => Says::Other,
    };
    Some(Seen { source, vlan, says })
}

#[cfg(test)]
mod tests {
    use etherparse::{PacketBuilder, VlanId};

    use super::*;

    const A: Mac = [2, 0, 0, 0, 0, 1];

    #[test]
    fn ip_is_read_through_one_tag_and_not_through_two() {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(A, BROADCAST).single_vlan(VlanId::try_new(7).unwrap());
        builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64).udp(1, 2).write(&mut frame, &[]).unwrap();
        let seen = look(&frame).unwrap();
        assert_eq!(seen, Seen { source: A, vlan: Some(7), says: Says::Ipv4(Ipv4Addr::new(10, 0, 0, 1)) });
        let mut double = frame[..12].to_vec();
        double.extend([0x88, 0xa8, 0, 9]);
        double.extend(&frame[12..]);
        assert_eq!(look(&double).unwrap().says, Says::Other);
    }

    #[test]
    fn a_frame_that_ends_early_says_less_and_never_something_else() {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(A, BROADCAST).ipv6([1; 16], [2; 16], ND_HOPS);
        builder.icmpv6(Icmpv6Type::NeighborSolicitation).write(&mut frame, &[9; 16]).unwrap();
        assert_eq!(look(&frame).unwrap().says, Says::Solicits([1; 16].into()));
        for len in 0..frame.len() {
            let says = look(&frame[..len]).map(|seen| seen.says);
            let less =
                [None, Some(Says::Other), Some(Says::Ipv6([1; 16].into())), Some(Says::Solicits([1; 16].into()))];
            assert!(less.contains(&says), "{len}: {says:?}");
        }
    }
}
