//! The offload fields of a packet (`struct virtio_net_hdr`, virtio 1.2, 5.1.6): what a guest may say, and what reaches the host's kernel of it.
//!
//! A guest is hostile: what it says is checked against its own frame and against what it agreed on, and the header that goes on is made anew from the
//! fields that were understood. What does not fit together is no packet.

use virtio_bindings::virtio_net as spec;

use crate::net::packet::HEADER;

/// Offloads, by the numbers of the guest's features: what the guest lets the device do, or takes from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// A checksum may be left to the other side.
    pub csum: bool,
    /// So may the segmentation of TCP over IPv4.
    pub tso4: bool,
    /// And over IPv6.
    pub tso6: bool,
    /// Also with ECN bits set.
    pub ecn: bool,
}

impl Offloads {
    const fn has(features: u64, bit: u32) -> bool {
        features & 1 << bit != 0
    }

    /// What a driver that agreed on these features takes from the device. (Segmentation without checksums is none: 5.1.3.1.)
    pub fn taken(features: u64) -> Self {
        let csum = Self::has(features, spec::VIRTIO_NET_F_GUEST_CSUM);
        Self {
            csum,
            tso4: csum && Self::has(features, spec::VIRTIO_NET_F_GUEST_TSO4),
            tso6: csum && Self::has(features, spec::VIRTIO_NET_F_GUEST_TSO6),
            ecn: csum && Self::has(features, spec::VIRTIO_NET_F_GUEST_ECN),
        }
    }

    /// What such a driver may leave to the device.
    pub fn given(features: u64) -> Self {
        let csum = Self::has(features, spec::VIRTIO_NET_F_CSUM);
        Self {
            csum,
            tso4: csum && Self::has(features, spec::VIRTIO_NET_F_HOST_TSO4),
            tso6: csum && Self::has(features, spec::VIRTIO_NET_F_HOST_TSO6),
            ecn: csum && Self::has(features, spec::VIRTIO_NET_F_HOST_ECN),
        }
    }

    /// Whether a packet with this header, made by the host's kernel, is one that the guest takes.
    pub fn cover(self, header: [u8; HEADER]) -> bool {
        let flags = u32::from(header[0]);
        let gso = u32::from(header[1]);
        let checksum = flags & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || self.csum;
        let ecn = gso & spec::VIRTIO_NET_HDR_GSO_ECN == 0 || self.ecn;
        let segments = match gso & !spec::VIRTIO_NET_HDR_GSO_ECN {
            spec::VIRTIO_NET_HDR_GSO_NONE => true,
            spec::VIRTIO_NET_HDR_GSO_TCPV4 => self.tso4,
            spec::VIRTIO_NET_HDR_GSO_TCPV6 => self.tso6,
            _ => false,
        };
        checksum && ecn && segments
    }
}

/// Least bytes of an Ethernet frame that has a type: two addresses and the type.
pub const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const TYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
/// Where the checksum is in a TCP header, and how long that is at least.
const TCP_CHECKSUM: usize = 16;
const TCP: usize = 20;

/// The frame's type behind its VLAN tags (at most two), and where its payload begins.
pub fn payload(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = ETHERNET;
    for _ in 0..=2 {
        let kind = u16::from_be_bytes(frame.get(at - 2..at)?.try_into().ok()?);
        if !TYPE_VLAN.contains(&kind) {
            return Some((kind, at));
        }
        at += VLAN_TAG;
    }
    None
}

/// The header for the host's kernel, of a guest's frame that came with this one; `None`: no packet.
pub fn checked(header: [u8; HEADER], frame: &[u8], agreed: Offloads) -> Option<[u8; HEADER]> {
    let [flags, gso_type, ..] = header;
    let field = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (hdr_len, gso_size, csum_start, csum_offset) = (field(2), field(4), field(6), field(8));
    let mut good = [0; HEADER];
    let mut put = |at: usize, value: u16| good[at..at + 2].copy_from_slice(&value.to_le_bytes());
    let needs_csum = u32::from(flags) & spec::VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let (start, offset) = (usize::from(csum_start), usize::from(csum_offset));
    if needs_csum {
        if !agreed.csum || start < ETHERNET || start + offset + 2 > frame.len() {
            return None;
        }
        put(6, csum_start);
        put(8, csum_offset);
    }
    let ecn = u32::from(gso_type) & spec::VIRTIO_NET_HDR_GSO_ECN != 0;
    let gso = u32::from(gso_type) & !spec::VIRTIO_NET_HDR_GSO_ECN;
    if gso == spec::VIRTIO_NET_HDR_GSO_NONE {
        if ecn {
            return None;
        }
    } else {
        let (kind, network) = payload(frame)?;
        let least = match gso {
            spec::VIRTIO_NET_HDR_GSO_TCPV4 if agreed.tso4 && kind == TYPE_IPV4 => 20,
            spec::VIRTIO_NET_HDR_GSO_TCPV6 if agreed.tso6 && kind == TYPE_IPV6 => 40,
            _ => return None,
        };
        let headers = start + tcp_header(frame, start)?;
        let fits = needs_csum && offset == TCP_CHECKSUM && start >= network + least && headers <= frame.len();
        if !fits || gso_size == 0 || ecn && !agreed.ecn {
            return None;
        }
        // A hint only (5.1.6.2): our own count is right whatever it said.
        let _ = hdr_len;
        put(2, u16::try_from(headers).ok()?);
        put(4, gso_size);
        good[1] = gso_type;
    }
    if needs_csum {
        good[0] = spec::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    }
    Some(good)
}

/// Bytes of the TCP header at `start`.
fn tcp_header(frame: &[u8], start: usize) -> Option<usize> {
    let words = frame.get(start + 12)? >> 4;
    let bytes = usize::from(words) * 4;
    (bytes >= TCP).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true };

    fn header(flags: u8, gso: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16) -> [u8; HEADER] {
        let mut h = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7];
        for (at, value) in [(2, hdr_len), (4, gso_size), (6, start), (8, offset)] {
            h[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        h
    }

    /// TCP over IPv4 or IPv6 with so many VLAN tags, and where TCP begins.
    fn tcp(v6: bool, tags: usize) -> (Vec<u8>, u16) {
        let mut frame = vec![2; 12];
        (0..tags).for_each(|_| frame.extend([0x81, 0, 0, 5]));
        frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
        frame.resize(frame.len() + if v6 { 40 } else { 20 }, 0);
        let start = frame.len();
        frame.resize(start + 12, 0);
        frame.extend([0x50, 0]);
        frame.resize(start + 4000, 0xaa);
        (frame, start as u16)
    }

    #[test]
    fn what_fits_together_goes_on_with_our_own_count_of_headers_and_nothing_else() {
        for (v6, gso, tags) in [(false, 1, 0), (true, 4, 0), (false, 1, 1), (true, 4 | 0x80, 2)] {
            let (frame, start) = tcp(v6, tags);
            for hint in [0, 54, 0xffff] {
                let out = checked(header(1, gso, hint, 1448, start, 16), &frame, ALL).unwrap();
                let mut expected = header(1, gso, start + 20, 1448, start, 16);
                expected[10..].fill(0);
                assert_eq!(out, expected);
            }
        }
        let (frame, start) = tcp(false, 0);
        assert_eq!(checked(header(0, 0, 9, 9, 9, 9), &frame, Offloads::default()), Some([0; HEADER]), "plain");
        assert_eq!(checked(header(2 | 4, 0, 0, 0, 0, 0), &frame, ALL), Some([0; HEADER]), "not a driver's flags");
        assert_eq!(checked(header(1, 0, 0, 0, start, 16), &frame, ALL).map(|h| h[0]), Some(1), "checksum alone");
    }

    #[test]
    fn what_does_not_fit_together_is_no_packet() {
        let (frame, start) = tcp(false, 0);
        let len = frame.len() as u16;
        let bad = [
            ("a checksum that ends behind the frame", header(1, 0, 0, 0, len - 1, 0)),
            ("a checksum far away", header(1, 0, 0, 0, 0xffff, 0xffff)),
            ("a checksum of the addresses", header(1, 0, 0, 0, 0, 0)),
            ("segments without a checksum", header(0, 1, 54, 1448, start, 16)),
            ("segments of nothing", header(1, 1, 54, 0, start, 16)),
            ("IPv6 that is IPv4", header(1, 4, 54, 1448, start, 16)),
            ("segments of UDP", header(1, 3, 54, 1448, start, 6)),
            ("USO", header(1, 5, 54, 1448, start, 6)),
            ("unknown segments", header(1, 0x7f, 54, 1448, start, 16)),
            ("ECN of nothing", header(0, 0x80, 0, 0, 0, 0)),
            ("another checksum than TCP's", header(1, 1, 54, 1448, start, 6)),
            ("TCP inside the IP header", header(1, 1, 54, 1448, start - 8, 16)),
            ("TCP whose header has no length", header(1, 1, 54, 1448, start + 100, 16)),
        ];
        for (what, h) in bad {
            if what.contains("no length") {
                let mut frame = frame.clone();
                frame[usize::from(start) + 112] = 0x10;
                assert_eq!(checked(h, &frame, ALL), None, "{what}");
            } else {
                assert_eq!(checked(h, &frame, ALL), None, "{what}");
            }
        }
        let good = header(1, 1, 54, 1448, start, 16);
        for lacks in [Offloads { csum: false, ..ALL }, Offloads { tso4: false, ..ALL }] {
            assert_eq!(checked(good, &frame, lacks), None, "{lacks:?}");
        }
        assert_eq!(checked(header(1, 0x81, 54, 1448, start, 16), &frame, Offloads { ecn: false, ..ALL }), None);
    }

    #[test]
    fn a_guest_is_given_only_what_it_takes() {
        let none = Offloads::default();
        assert!(none.cover([0; HEADER]) && !none.cover(header(1, 0, 0, 0, 34, 16)));
        assert!(ALL.cover(header(1, 1, 54, 1448, 34, 16)) && !ALL.cover(header(1, 5, 42, 1448, 34, 6)));
        assert!(!Offloads { tso6: false, ..ALL }.cover(header(1, 4, 54, 1448, 34, 16)));
        let tso_without_csum = 1 << spec::VIRTIO_NET_F_GUEST_TSO4 | 1 << spec::VIRTIO_NET_F_HOST_TSO4;
        assert_eq!(Offloads::taken(tso_without_csum), none);
        assert_eq!(Offloads::given(tso_without_csum), none);
    }
}
