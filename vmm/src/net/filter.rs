//! What a NIC lets through: sender addresses, VLAN, rates, storms.
//!
//! ```text
//!   guest ──► [sender] ──► [storm] ──► [+ tag] ──► gate ──► bridge      rate: the guest's queue waits (ask `wait_out`)
//!   guest ◄── [storm] ◄── [− tag] ◄────────────────────── bridge        rate: the kernel's queue waits, and drops when it is full (`wait_in`)
//! ```
//! A rate is a token bucket that may go into debt: a packet passes when there is any token, and takes as many as it has bytes. So the largest packets
//! pass with the smallest burst, and the rate is right over time. What exceeds a storm limit is dropped, as a switch does it.
//!
//! Pure; time is passed in, on any clock that does not go back. Who asks counts what does not pass, by its [`Reason`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use understudy_protocol::nic_filter::{BURST, FilterSpec};

use super::frame::{Mac, Says, look};
use super::packet::{HEADER, Packet};

/// Why a packet does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Shorter than an Ethernet header.
    Runt,
    /// The guest sent from an address that is not its card's.
    SpoofedMac,
    /// The guest said that it has an address which it was not given.
    SpoofedAddress,
    /// The guest sent a tag of its own on a card that is in a VLAN.
    GuestTag,
    /// It is of another VLAN than the card.
    OtherVlan,
    /// Too many broadcasts from the guest.
    BroadcastOut,
    /// Too many multicasts from the guest.
    MulticastOut,
    /// Too many broadcasts to the guest.
    BroadcastIn,
    /// Too many multicasts to the guest.
    MulticastIn,
    /// Too many packets to addresses that are not the card's.
    UnknownIn,
}

impl Reason {
    /// As the status names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runt => "runt",
            Self::SpoofedMac => "spoofed-mac",
            Self::SpoofedAddress => "spoofed-address",
            Self::GuestTag => "guest-tag",
            Self::OtherVlan => "other-vlan",
            Self::BroadcastOut => "storm-broadcast-out",
            Self::MulticastOut => "storm-multicast-out",
            Self::BroadcastIn => "storm-broadcast-in",
            Self::MulticastIn => "storm-multicast-in",
            Self::UnknownIn => "storm-unknown-in",
        }
    }
}

/// A token bucket (in debt: negative).
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    burst: i64,
    /// Billionths, so that no rate loses to rounding.
    tokens: i128,
    at: Duration,
}

const WHOLE: i128 = 1_000_000_000;

impl Bucket {
    fn new(per_second: u64, burst: u64) -> Self {
        let burst = i64::try_from(burst).unwrap_or(i64::MAX);
        Self { per_second, burst, tokens: i128::from(burst) * WHOLE, at: Duration::ZERO }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_nanos().min(u128::from(u64::MAX)) as i128;
        self.at = self.at.max(now);
        let full = i128::from(self.burst) * WHOLE;
        self.tokens = (self.tokens + passed * i128::from(self.per_second)).min(full);
    }

    /// How long there is no token.
    fn wait(&mut self, now: Duration) -> Option<Duration> {
        self.fill(now);
        // One whole token, so that there is progress.
        let missing = WHOLE - self.tokens;
        let ns = missing.max(0).div_euclid(i128::from(self.per_second.max(1))) + 1;
        (missing > 0).then(|| Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, amount: u64) {
        self.tokens -= i128::from(amount) * WHOLE;
    }

    /// One, if there is one.
    fn admits(&mut self, now: Duration) -> bool {
        let admits = self.wait(now).is_none();
        if admits {
            self.take(1);
        }
        admits
    }
}

/// See the module.
#[derive(Debug)]
pub struct Filter {
    mac: Mac,
    deny_spoof: bool,
    addresses: Vec<IpAddr>,
    vlan: Option<u16>,
    rate_out: Option<Bucket>,
    rate_in: Option<Bucket>,
    /// By [`Reason`]s of storms.
    storms: BTreeMap<Reason, Bucket>,
    /// Nothing of all that.
    idle: bool,
}

const STORMS: [Reason; 5] =
    [Reason::BroadcastOut, Reason::MulticastOut, Reason::BroadcastIn, Reason::MulticastIn, Reason::UnknownIn];

/// The length of a tag (IEEE 802.1Q).
const TAG: usize = 4;
/// Where it stands: behind both addresses.
const TAG_AT: usize = 12;

impl Filter {
    /// For the card with this address.
    pub fn new(spec: &FilterSpec, mac: Mac) -> Self {
        let FilterSpec { deny_spoof, addresses, vlan, rate_out, rate_in, burst, storm } = spec;
        let rate = |rate: &Option<u64>| rate.map(|rate| Bucket::new(rate, burst.unwrap_or(BURST)));
        // A tenth of a second at once.
        let storm = |reason| storm.map(|n| (reason, Bucket::new(n.into(), u64::from(n / 10).max(1))));
        Self {
            mac,
            deny_spoof: *deny_spoof,
            addresses: addresses.clone(),
            vlan: *vlan,
            rate_out: rate(rate_out),
            rate_in: rate(rate_in),
            storms: STORMS.into_iter().filter_map(storm).collect(),
            idle: *spec == FilterSpec { burst: *burst, ..FilterSpec::default() },
        }
    }

    /// Whether it lets everything through as it is: then nobody needs to ask.
    pub fn is_idle(&self) -> bool {
        self.idle
    }

    /// How long the guest's next packet has to wait.
    pub fn wait_out(&mut self, now: Duration) -> Option<Duration> {
        self.rate_out.as_mut()?.wait(now)
    }

    /// How long the next packet for the guest has to wait.
    pub fn wait_in(&mut self, now: Duration) -> Option<Duration> {
        self.rate_in.as_mut()?.wait(now)
    }

    /// The guest sent this. What passes is to be tagged ([`Filter::tag`]).
    pub fn outbound(&mut self, frame: &[u8], now: Duration) -> Result<(), Reason> {
        if self.idle {
            return Ok(());
        }
        self.judge_out(frame, now)?;
        if let Some(bucket) = &mut self.rate_out {
            bucket.take(frame.len() as u64);
        }
        Ok(())
    }

    /// Towards the bridge: in the card's VLAN, if it is in one.
    pub fn tag(&self, packet: &mut Packet) {
        if let Some(vlan) = self.vlan
            && packet.frame.len() >= TAG_AT
        {
            let [high, low] = vlan.to_be_bytes();
            packet.frame.splice(TAG_AT..TAG_AT, [0x81, 0x00, high, low]);
            shift(&mut packet.header, |at| at.saturating_add(TAG as u16));
        }
    }

    fn judge_out(&mut self, frame: &[u8], now: Duration) -> Result<(), Reason> {
        let (Some(to), Some(from), Some(kind)) = (frame.get(..6), frame.get(6..12), frame.get(12..14)) else {
            return Err(Reason::Runt);
        };
        if self.deny_spoof && from != self.mac {
            return Err(Reason::SpoofedMac);
        }
        if self.vlan.is_some() && is_tag(kind) {
            return Err(Reason::GuestTag);
        }
        if !self.addresses.is_empty() && !self.may_say(frame) {
            return Err(Reason::SpoofedAddress);
        }
        match to {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => self.storm(Reason::BroadcastOut, now),
            [group, ..] if group & 1 != 0 => self.storm(Reason::MulticastOut, now),
            _ => Ok(()),
        }
    }

    /// Whether the guest has the address that it says it has.
    fn may_say(&self, frame: &[u8]) -> bool {
        let Some(seen) = look(frame) else { return false };
        let has = |address: IpAddr| address.is_unspecified() || self.addresses.contains(&address);
        match seen.says {
            Says::Arp { mac, address } => has(address.into()) && (!self.deny_spoof || mac == self.mac),
            Says::Advertised { address, .. } => has(address.into()),
            Says::Solicits(a) | Says::Routes(a) | Says::Ipv6(a) => has(a.into()),
            Says::Ipv4(address) => has(address.into()),
            // What is no IP says nothing; damaged IP and what hides behind two tags is not let through.
            Says::Other => !matches!(
                frame.get(12..14),
                Some([0x08, 0x00 | 0x06] | [0x86, 0xdd] | [0x81, 0x00] | [0x88, 0xa8] | [0x91, 0x00])
            ),
        }
    }

    /// This is for the guest: header and frame. What passes has no tag of the card's any more.
    pub fn inbound(&mut self, packet: &mut Vec<u8>, now: Duration) -> Result<(), Reason> {
        if self.idle {
            return Ok(());
        }
        let frame = packet.get(HEADER..).unwrap_or_default();
        if let Some(bucket) = &mut self.rate_in {
            bucket.take(frame.len() as u64);
        }
        self.judge_in(frame, now)?;
        if self.vlan.is_some() {
            packet.drain(HEADER + TAG_AT..HEADER + TAG_AT + TAG);
            if let Some(header) = packet.first_chunk_mut() {
                shift(header, |at| at.saturating_sub(TAG as u16));
            }
        }
        Ok(())
    }

    fn judge_in(&mut self, frame: &[u8], now: Duration) -> Result<(), Reason> {
        let (Some(to), Some(kind)) = (frame.get(..6), frame.get(12..14)) else { return Err(Reason::Runt) };
        if let Some(vlan) = self.vlan {
            let (Some(tag), Some(inner)) = (frame.get(14..16), frame.get(16..18)) else {
                return Err(if is_tag(kind) { Reason::Runt } else { Reason::OtherVlan });
            };
            let id = u16::from_be_bytes([tag[0], tag[1]]) & 0x0fff;
            if kind != [0x81, 0x00] || id != vlan || is_tag(inner) {
                return Err(Reason::OtherVlan);
            }
        }
        match to {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => self.storm(Reason::BroadcastIn, now),
            [group, ..] if group & 1 != 0 => self.storm(Reason::MulticastIn, now),
            to if to != self.mac => self.storm(Reason::UnknownIn, now),
            _ => Ok(()),
        }
    }

    fn storm(&mut self, reason: Reason, now: Duration) -> Result<(), Reason> {
        let admits = self.storms.get_mut(&reason).is_none_or(|bucket| bucket.admits(now));
        if admits { Ok(()) } else { Err(reason) }
    }
}

fn is_tag(kind: &[u8]) -> bool {
    matches!(kind, [0x81, 0x00] | [0x88, 0xa8] | [0x91, 0x00])
}

/// Move what counts from the frame's start in a `struct virtio_net_hdr_v1` (virtio 1.2 §5.1.6): `hdr_len` of a segmented packet, `csum_start` of one whose
/// checksum is still to be made.
fn shift(header: &mut [u8; HEADER], by: impl Fn(u16) -> u16) {
    const NEEDS_CSUM: u8 = 1;
    let (segmented, unsummed) = (header[1] != 0, header[0] & NEEDS_CSUM != 0);
    for (at, counts) in [(2, segmented), (6, unsummed)] {
        if counts {
            let moved = by(u16::from_le_bytes([header[at], header[at + 1]]));
            header[at..at + 2].copy_from_slice(&moved.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use etherparse::{ArpEthIpv4Packet, ArpOperation, PacketBuilder};
    use proptest::prelude::*;

    use super::super::frame::BROADCAST;
    use super::*;

    const GUEST: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];
    const NOW: Duration = Duration::from_secs(1);

    fn filter(words: &str) -> Filter {
        let mut spec = FilterSpec::default();
        for word in words.split(',').filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap();
            spec.word(key, value).unwrap().unwrap();
        }
        Filter::new(&spec, GUEST)
    }
    fn udp(from: Mac, to: Mac, source: [u8; 4], len: usize) -> Packet {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(from, to)
            .ipv4(source, [10, 0, 0, 9], 64)
            .udp(1, 2)
            .write(&mut frame, &vec![7; len])
            .unwrap();
        Packet { frame, ..Packet::default() }
    }
    fn arp(from: Mac, claims: (Mac, [u8; 4])) -> Packet {
        let arp = ArpEthIpv4Packet {
            operation: ArpOperation::REPLY,
            sender_mac: claims.0,
            sender_ipv4: claims.1,
            target_mac: OTHER,
            target_ipv4: [10, 0, 0, 9],
        };
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(from, OTHER).arp(arp.into()).write(&mut frame).unwrap();
        Packet { frame, ..Packet::default() }
    }
    fn tagged(vlan: u16, packet: &Packet) -> Packet {
        let mut packet = packet.clone();
        let [high, low] = vlan.to_be_bytes();
        packet.frame.splice(12..12, [0x81, 0, high, low]);
        packet
    }
    const MINE: [u8; 4] = [10, 0, 0, 1];

    impl Filter {
        fn out(&mut self, packet: &mut Packet, now: Duration) -> Result<(), Reason> {
            self.outbound(&packet.frame, now)?;
            self.tag(packet);
            Ok(())
        }
        fn inward(&mut self, packet: &mut Packet, now: Duration) -> Result<(), Reason> {
            let mut whole = [&packet.header[..], &packet.frame].concat();
            self.inbound(&mut whole, now)?;
            packet.frame = whole.split_off(HEADER);
            packet.header = whole.try_into().unwrap();
            Ok(())
        }
    }

    #[test]
    fn without_a_word_everything_passes_as_it_is() {
        let mut f = filter("");
        assert!(f.is_idle());
        let mut packet = Packet { frame: vec![1; 3], ..Packet::default() };
        assert_eq!((f.out(&mut packet, NOW), f.inward(&mut packet, NOW)), (Ok(()), Ok(())));
        assert_eq!(packet.frame, [1; 3]);
    }

    #[test]
    fn a_guest_cannot_send_as_another_card() {
        let mut f = filter("spoof=deny");
        assert_eq!(f.out(&mut udp(GUEST, OTHER, MINE, 1), NOW), Ok(()));
        assert_eq!(f.out(&mut udp(OTHER, GUEST, MINE, 1), NOW), Err(Reason::SpoofedMac));
        assert_eq!(f.inward(&mut udp(OTHER, GUEST, MINE, 1), NOW), Ok(()));
    }

    #[test]
    fn nor_claim_an_address_that_it_was_not_given() {
        let mut f = filter("spoof=deny,addresses=10.0.0.1+fd00::1");
        assert_eq!(f.out(&mut udp(GUEST, OTHER, MINE, 1), NOW), Ok(()));
        assert_eq!(f.out(&mut arp(GUEST, (GUEST, MINE)), NOW), Ok(()));
        assert_eq!(f.out(&mut arp(GUEST, (GUEST, [0; 4])), NOW), Ok(()), "a probe");
        let no = Err(Reason::SpoofedAddress);
        assert_eq!(f.out(&mut udp(GUEST, OTHER, [10, 0, 0, 2], 1), NOW), no);
        assert_eq!(f.out(&mut arp(GUEST, (GUEST, [10, 0, 0, 2])), NOW), no);
        assert_eq!(f.out(&mut arp(GUEST, (OTHER, MINE)), NOW), no, "its address on another's card");
        let double = tagged(3, &tagged(4, &udp(GUEST, OTHER, [10, 0, 0, 2], 1)));
        assert_eq!(f.out(&mut double.clone(), NOW), no, "hidden behind two tags");
        let mut cut = udp(GUEST, OTHER, MINE, 1);
        cut.frame.truncate(20);
        assert_eq!(f.out(&mut cut, NOW), no);
    }

    #[test]
    fn a_card_in_a_vlan_is_tagged_outside_and_untagged_inside() {
        let mut f = filter("vlan=12");
        let plain = udp(GUEST, OTHER, MINE, 100);
        let mut packet = plain.clone();
        packet.header = [1, 1, 54, 0, 0, 4, 34, 0, 16, 0, 0, 0];
        f.out(&mut packet, NOW).unwrap();
        assert_eq!(packet.frame, tagged(12, &plain).frame);
        assert_eq!(packet.header, [1, 1, 58, 0, 0, 4, 38, 0, 16, 0, 0, 0]);
        f.inward(&mut packet, NOW).unwrap();
        assert_eq!((packet.frame, packet.header), (plain.frame.clone(), [1, 1, 54, 0, 0, 4, 34, 0, 16, 0, 0, 0]));
        assert_eq!(f.out(&mut tagged(13, &plain), NOW), Err(Reason::GuestTag));
        for other in [plain.clone(), tagged(13, &plain), tagged(12, &tagged(13, &plain))] {
            assert_eq!(f.inward(&mut other.clone(), NOW), Err(Reason::OtherVlan));
        }
    }

    #[test]
    fn a_rate_is_kept_over_time_and_a_burst_passes_at_once() {
        let mut f = filter("rate-out=1M,burst=10K");
        let mut now = Duration::ZERO;
        let mut sent = 0;
        while now < Duration::from_secs(10) {
            match f.wait_out(now) {
                Some(wait) => now += wait,
                None => {
                    let mut packet = udp(GUEST, OTHER, MINE, 60_000);
                    sent += packet.frame.len();
                    f.out(&mut packet, now).unwrap();
                }
            }
        }
        assert!((10_000_000..10_080_000).contains(&sent), "{sent}");
        assert_eq!(f.wait_in(now), None, "the other direction has none");
    }

    #[test]
    fn a_storm_is_cut_down_and_others_pass() {
        let mut f = filter("storm=100");
        let dropped = |f: &mut Filter, to: Mac, inside: bool| -> Vec<Reason> {
            let packets = (0..1000u64).filter_map(|n| {
                let (now, mut packet) = (NOW + Duration::from_millis(n), udp(OTHER, to, MINE, 1));
                if inside { f.inward(&mut packet, now) } else { f.out(&mut packet, now) }.err()
            });
            packets.collect()
        };
        assert_eq!(dropped(&mut f, GUEST, true), []);
        for (to, inside, reason) in [
            (BROADCAST, true, Reason::BroadcastIn),
            ([1, 0, 0x5e, 0, 0, 1], true, Reason::MulticastIn),
            ([2, 9, 9, 9, 9, 9], true, Reason::UnknownIn),
            (BROADCAST, false, Reason::BroadcastOut),
            ([0x33, 0x33, 0, 0, 0, 1], false, Reason::MulticastOut),
        ] {
            let dropped = dropped(&mut f, to, inside);
            assert!((889..=900).contains(&dropped.len()), "{reason:?}: {}", dropped.len());
            assert!(dropped.iter().all(|why| *why == reason));
        }
    }

    proptest! {
        #[test]
        fn any_frame_is_survived(frame in proptest::collection::vec(any::<u8>(), 0..80), header in any::<[u8; 12]>()) {
            for words in ["spoof=deny,addresses=10.0.0.1", "vlan=12", "storm=1", "rate-in=131072"] {
                let mut f = filter(words);
                let mut packet = Packet { header, frame: frame.clone(), queue: 0 };
                let _ = f.out(&mut packet, NOW);
                let _ = f.inward(&mut packet, NOW);
            }
        }
    }
}
