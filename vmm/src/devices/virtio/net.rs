//! virtio-net, a network card (virtio 1.2, 5.1): several pairs of queues, checksum and segmentation offloads, mergeable buffers, the control queue.
//!
//! It has no network of its own. What the guest sends comes out as [`Packet`]s, whose offload fields were checked ([`offload`]); what arrives goes in by
//! [`VirtioPci::receive`], if the guest wants it ([`filters`]) and has buffers.
//!
//! ```text
//!  transmitq ─► header, frame ─► checked ─► out ──take_packets()──► filter, gate, back end
//!  receiveq  ◄─ as many buffers as it needs, at once ◄── wanted ◄──receive()── back end
//!  controlq  ─► filters, pairs, offloads
//! ```
//! Not there: UDP segmentation (UFO, USO), RSS and hash reports, notification coalescing.
//!
//! Saved: what the driver has set. No packet is: the owner takes what came out before the lock is let go, and a packet that waits elsewhere may be
//! lost as on a wire.

use serde::{Deserialize, Serialize};
use understudy_protocol::nic::Mac;
use virtio_bindings::virtio_net as spec;

use super::super::{Ctx, GuestRam, RestoreError, Snapshot};
use super::{Broken, CHAINS_PER_CALL, Chain, Progress, VirtQueue, VirtioDevice, VirtioPci};
use crate::net::packet::{HEADER, Packet};
use crate::net::pool::Pool;
use filters::{Filters, Modes, Table};
pub use offload::Offloads;

mod control;
pub mod filters;
pub mod offload;

/// Most pairs of queues.
pub const MAX_PAIRS: u16 = understudy_protocol::nic::MAX_QUEUES;
const QUEUE_SIZE: u16 = 1024;
/// A pair each, and the control queue.
const SIZES: [u16; 2 * MAX_PAIRS as usize + 1] = [QUEUE_SIZE; 2 * MAX_PAIRS as usize + 1];
/// Longest frame: 64 KiB of IP, addresses and type, two VLAN tags.
pub const FRAME: usize = 65_535 + offload::ETHERNET + 8;
/// Packets and bytes that may have come out before the owner takes them.
const OUT_PACKETS: usize = 64;
const OUT_BYTES: usize = 512 << 10;
/// Bytes that one pair may send before it is another's turn, and what a packet counts at least: its work is not its bytes alone.
const TURN: usize = 64 << 10;
const LEAST: usize = 2 << 10;
/// What the guest is told of a card that has no speed: 10 Gbit/s, full duplex.
const SPEED: u32 = 10_000;
const FULL_DUPLEX: u8 = 1;

/// Features of the offloads that the guest takes, and that it can change while it runs.
const GUEST_OFFLOADS: u64 = 1 << spec::VIRTIO_NET_F_GUEST_CSUM
    | 1 << spec::VIRTIO_NET_F_GUEST_TSO4
    | 1 << spec::VIRTIO_NET_F_GUEST_TSO6
    | 1 << spec::VIRTIO_NET_F_GUEST_ECN;

/// What a card is built with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: Mac,
    /// Pairs of queues, 1 to [`MAX_PAIRS`].
    pub pairs: u16,
    /// Whether checksums and segmentation can be left to whatever is behind it.
    pub offloads: bool,
    /// The MTU that the guest is told.
    pub mtu: Option<u16>,
}

/// What came of a packet from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// The guest has it.
    Taken,
    /// The guest has no buffers now: it can be tried again.
    NoBuffers,
    /// No driver is at work.
    NoDriver,
    /// The guest does not want it.
    Filtered,
    /// It is no frame, or the guest does not take its offloads, or has no buffer that it fits into.
    Unfit,
}

/// Packets of the guest that were none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Shorter than a header and a frame's addresses and type, or longer than a frame can be.
    pub size: u64,
    /// Their offload fields do not fit their frames, or what was agreed on.
    pub offload: u64,
}

/// The card.
#[derive(Debug)]
pub struct Net {
    config: NetConfig,
    /// What the driver agreed on.
    features: u64,
    filters: Filters,
    /// Pairs that the driver uses.
    pairs: u16,
    /// What it takes of the offloads that it agreed on; `None`: all.
    guest_offloads: Option<u64>,
    link_up: bool,
    /// The driver is asked to announce itself.
    announce: bool,
    out: Vec<Packet>,
    out_bytes: usize,
    /// The owner's wish; not part of the machine's state.
    room: bool,
    /// Packets wait in the rings, for room or for the owner's thread.
    waiting: bool,
    /// The owner's wish too: see [`VirtioPci::defer`].
    deferred: bool,
    /// The pair whose turn it is, and how many bytes of its turn are used.
    turn: u16,
    used: usize,
    /// Memory for `out`; whoever took a packet gives it back.
    pool: Pool,
    refused: Refused,
}

impl Net {
    /// A card that nobody uses yet.
    #[must_use]
    pub fn new(config: NetConfig) -> Self {
        let config = NetConfig { pairs: config.pairs.clamp(1, MAX_PAIRS), ..config };
        Self {
            config,
            features: 0,
            filters: Filters::new(config.mac),
            pairs: 1,
            guest_offloads: None,
            link_up: true,
            announce: false,
            out: Vec::new(),
            out_bytes: 0,
            room: true,
            waiting: false,
            deferred: false,
            turn: 0,
            used: 0,
            pool: Pool::default(),
            refused: Refused::default(),
        }
    }

    fn agreed_on(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Its address as the guest has set it.
    pub fn mac(&self) -> Mac {
        self.filters.mac
    }

    /// What the guest takes from whatever is behind the card.
    pub fn offloads(&self) -> Offloads {
        Offloads::taken(self.guest_offloads.unwrap_or(self.features) & self.features)
    }

    /// Packets of the guest that were none, since the card is there.
    pub fn refused(&self) -> Refused {
        self.refused
    }

    /// Buffers of packets that were taken ([`VirtioPci::take_packets`]) and are not needed any more.
    pub fn give_back(&mut self, buffers: impl Iterator<Item = Vec<u8>>) {
        buffers.for_each(|buffer| self.pool.give(buffer));
    }

    /// Pairs take turns, of [`TURN`] bytes each: one that always has something to send keeps no other waiting.
    fn transmit(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        self.waiting = false;
        if self.deferred {
            // (As long as they are there the driver is not asked to notify: with EVENT_IDX it does not.)
            for queue in queues.iter().skip(1).step_by(2).take(usize::from(self.pairs)) {
                self.waiting |= queue.has_some(ram)?;
            }
            return Ok(Progress::Idle);
        }
        let mut left = CHAINS_PER_CALL;
        let mut empty = 0;
        while empty < self.pairs {
            let pair = self.turn % self.pairs;
            let Some(queue) = queues.get_mut(usize::from(2 * pair + 1)) else { return Ok(Progress::Idle) };
            while self.used < TURN {
                if !self.room || self.out.len() >= OUT_PACKETS || self.out_bytes >= OUT_BYTES {
                    // The owner takes what is there and comes again; without room that may be long.
                    self.waiting = true;
                    return Ok(if self.room { Progress::More } else { Progress::Idle });
                }
                if left == 0 {
                    return Ok(Progress::More);
                }
                let Some(chain) = queue.next_chain(ram)? else {
                    empty += 1;
                    break;
                };
                left -= 1;
                empty = 0;
                self.used += chain.readable_len().max(LEAST);
                self.send(pair, &chain, ram)?;
                queue.complete(ram, &chain, 0)?;
            }
            self.turn = (pair + 1) % self.pairs;
            self.used = 0;
        }
        Ok(Progress::Idle)
    }

    fn send(&mut self, pair: u16, chain: &Chain, ram: &GuestRam) -> Result<(), Broken> {
        if chain.writable_len() > 0 {
            return Err(Broken("a transmit queue holds a buffer that the device cannot read"));
        }
        let len = chain.readable_len();
        if !(HEADER + offload::ETHERNET..=HEADER + FRAME).contains(&len) {
            self.refused.size += 1;
            return Ok(());
        }
        let mut header = [0; HEADER];
        chain.read_into(ram, 0, &mut header)?;
        let mut frame = self.pool.take(len - HEADER);
        chain.read_into(ram, HEADER, &mut frame)?;
        match offload::checked(header, &frame, Offloads::given(self.features)) {
            Some(header) => {
                let packet = Packet { header, frame, queue: pair };
                self.out_bytes += packet.bytes();
                self.out.push(packet);
            }
            None => {
                self.refused.offload += 1;
                self.pool.give(frame);
            }
        }
        Ok(())
    }

    /// A packet (header and frame) for the guest, into this receive queue.
    fn deliver(&self, queue: &mut VirtQueue, ram: &GuestRam, packet: &mut [u8]) -> Result<Received, Broken> {
        let merge = self.agreed_on(spec::VIRTIO_NET_F_MRG_RXBUF);
        let mut used: Vec<(Chain, usize)> = Vec::new();
        let mut room = 0;
        while room < packet.len() {
            let chain = queue.next_chain(ram)?;
            // (A frame can need no more buffers than the queue has.)
            let Some(chain) = chain.filter(|_| used.len() < usize::from(QUEUE_SIZE)) else {
                used.iter().for_each(|_| queue.put_back());
                return Ok(Received::NoBuffers);
            };
            let here = chain.writable_len();
            if chain.readable_len() > 0 || here < HEADER {
                return Err(Broken("a receive queue holds a buffer that is too small or cannot be written"));
            }
            if !merge && here < packet.len() {
                // Too small for it; the next packet may fit.
                queue.put_back();
                return Ok(Received::Unfit);
            }
            let len = here.min(packet.len() - room);
            room += here;
            used.push((chain, len));
        }
        // Without mergeable buffers it is 1 (5.1.6.4.1).
        let buffers = used.len() as u16;
        packet[HEADER - 2..HEADER].copy_from_slice(&buffers.to_le_bytes());
        let mut at = 0;
        for (chain, len) in &used {
            chain.write(ram, &packet[at..at + len])?;
            at += len;
        }
        queue.complete_all(ram, &used)?;
        Ok(Received::Taken)
    }

    /// The place of the control queue: behind all pairs only if the driver knows of them (5.1.2).
    fn control_at(&self) -> usize {
        usize::from(if self.agreed_on(spec::VIRTIO_NET_F_MQ) { 2 * self.config.pairs } else { 2 })
    }
}

impl VirtioDevice for Net {
    const DEVICE_ID: u16 = 1;
    const PCI_CLASS: u32 = 0x02_00_00;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE; 3];

    fn queue_sizes(&self) -> &[u16] {
        &SIZES[..2 * usize::from(self.config.pairs) + 1]
    }

    fn features(&self) -> u64 {
        let always = [
            spec::VIRTIO_NET_F_MAC,
            spec::VIRTIO_NET_F_MRG_RXBUF,
            spec::VIRTIO_NET_F_STATUS,
            spec::VIRTIO_NET_F_CTRL_VQ,
            spec::VIRTIO_NET_F_CTRL_RX,
            spec::VIRTIO_NET_F_CTRL_RX_EXTRA,
            spec::VIRTIO_NET_F_CTRL_VLAN,
            spec::VIRTIO_NET_F_CTRL_MAC_ADDR,
            spec::VIRTIO_NET_F_GUEST_ANNOUNCE,
            spec::VIRTIO_NET_F_SPEED_DUPLEX,
        ];
        let offloads = [
            spec::VIRTIO_NET_F_CSUM,
            spec::VIRTIO_NET_F_HOST_TSO4,
            spec::VIRTIO_NET_F_HOST_TSO6,
            spec::VIRTIO_NET_F_HOST_ECN,
            spec::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ];
        let bits = |all: &[u32]| all.iter().fold(0, |all, bit| all | 1u64 << bit);
        let mut features = bits(&always);
        if self.config.offloads {
            features |= bits(&offloads) | GUEST_OFFLOADS;
        }
        if self.config.pairs > 1 {
            features |= 1 << spec::VIRTIO_NET_F_MQ;
        }
        if self.config.mtu.is_some() {
            features |= 1 << spec::VIRTIO_NET_F_MTU;
        }
        features
    }

    fn agreed(&mut self, features: u64) {
        self.features = features;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0u8; 17];
        let status = if self.link_up { spec::VIRTIO_NET_S_LINK_UP } else { 0 }
            | if self.announce { spec::VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        put(0, &self.filters.mac.0);
        put(6, &(status as u16).to_le_bytes());
        put(8, &self.config.pairs.to_le_bytes());
        put(10, &self.config.mtu.unwrap_or(0).to_le_bytes());
        put(12, &SPEED.to_le_bytes());
        put(16, &[FULL_DUPLEX]);
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|at| at.checked_add(i));
            *byte = at.and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        let commands = match queues.get_mut(self.control_at()) {
            Some(queue) if self.agreed_on(spec::VIRTIO_NET_F_CTRL_VQ) => self.control(queue, ram)?,
            _ => Progress::Idle,
        };
        let sent = self.transmit(queues, ram)?;
        Ok(if commands == Progress::More { commands } else { sent })
    }

    fn reset(&mut self) {
        // What came out has been sent.
        self.features = 0;
        self.filters = Filters::new(self.config.mac);
        self.pairs = 1;
        self.guest_offloads = None;
        self.announce = false;
        self.waiting = false;
        (self.turn, self.used) = (0, 0);
    }
}

impl VirtioPci<Net> {
    /// What the guest has sent, in order; some of it, to be called until there is no more. With `room` false nothing more is taken out of the rings.
    pub fn take_packets(&mut self, room: bool, ctx: &Ctx) -> Vec<Packet> {
        self.device_mut().room = room;
        if room && self.device().waiting && self.device().out.is_empty() {
            self.process(ctx.ram);
        }
        let device = self.device_mut();
        device.out_bytes = 0;
        std::mem::take(&mut device.out)
    }

    /// Whether notifications take nothing out of the rings: the owner has a thread for that, which calls [`VirtioPci::take_deferred`].
    pub fn defer(&mut self, deferred: bool) {
        self.device_mut().deferred = deferred;
    }

    /// As [`VirtioPci::take_packets`] with room, by that thread, whether or not anything was notified.
    pub fn take_deferred(&mut self, ctx: &Ctx) -> Vec<Packet> {
        let device = self.device_mut();
        device.waiting = true;
        let deferred = std::mem::take(&mut device.deferred);
        let packets = self.take_packets(true, ctx);
        self.device_mut().deferred = deferred;
        packets
    }

    /// Whether anything waits to be taken, out of the device or out of its rings.
    pub fn has_packets(&self) -> bool {
        self.device().waiting || !self.device().out.is_empty()
    }

    /// A packet for the guest, header and frame, that came by this pair. The interrupt is left to [`VirtioPci::process`], so that a burst makes one.
    pub fn receive(&mut self, pair: u16, packet: &mut [u8], ctx: &Ctx) -> Received {
        if !self.running() {
            return Received::NoDriver;
        }
        let Some((header, frame)) = packet.split_first_chunk::<HEADER>() else { return Received::Unfit };
        let device = self.device();
        let (addresses, vlans) =
            (device.agreed_on(spec::VIRTIO_NET_F_CTRL_RX), device.agreed_on(spec::VIRTIO_NET_F_CTRL_VLAN));
        if frame.len() < offload::ETHERNET || !device.offloads().cover(*header) {
            return Received::Unfit;
        }
        if !device.filters.want(frame, addresses, vlans) {
            return Received::Filtered;
        }
        let queue = usize::from(2 * (pair % device.pairs));
        self.work(|device, queues| match queues.get_mut(queue) {
            Some(queue) if queue.enabled() => device.deliver(queue, ctx.ram, packet),
            _ => Ok(Received::NoDriver),
        })
        .unwrap_or(Received::NoDriver)
    }

    /// The cable is in, or not; a driver that is at work is told.
    pub fn set_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.device_mut().link_up, up) != up {
            self.config_changed();
        }
    }

    /// Ask the driver to tell the network where the guest is (VIRTIO_NET_S_ANNOUNCE, 5.1.6.5.4). False: it has not agreed to that.
    pub fn ask_to_announce(&mut self) -> bool {
        let device = self.device();
        let agreed = [spec::VIRTIO_NET_F_GUEST_ANNOUNCE, spec::VIRTIO_NET_F_CTRL_VQ, spec::VIRTIO_NET_F_STATUS];
        if !self.running() || !agreed.into_iter().all(|bit| device.agreed_on(bit)) {
            return false;
        }
        self.device_mut().announce = true;
        self.config_changed();
        true
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Mac, Modes, Serialize, Table};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Its address, as the guest has set it.
        pub mac: [u8; 6],
        /// The guest's switches.
        pub modes: Modes,
        /// Other addresses.
        pub unicast: (Vec<[u8; 6]>, bool),
        /// Groups.
        pub multicast: (Vec<[u8; 6]>, bool),
        /// A bit a VLAN.
        pub vlans: Vec<u64>,
        /// Pairs in use.
        pub pairs: u16,
        /// What the guest takes of the offloads that it agreed on.
        pub guest_offloads: Option<u64>,
        /// The cable is in.
        pub link_up: bool,
        /// The driver has been asked to announce itself and has not said that it did.
        pub announce: bool,
    }

    pub(super) fn saved(table: &Table) -> (Vec<[u8; 6]>, bool) {
        (table.addresses.iter().map(|mac| mac.0).collect(), table.overflow)
    }

    pub(super) fn table((addresses, overflow): (Vec<[u8; 6]>, bool)) -> Table {
        Table { addresses: addresses.into_iter().map(Mac).collect(), overflow }
    }
}

impl Snapshot for Net {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self {
            config: _,
            features: _, // the transport has them
            filters,
            pairs,
            guest_offloads,
            link_up,
            announce,
            out: _, // taken before the lock was let go; see the module
            out_bytes: _,
            room: _,    // the owner's
            waiting: _, // after a restore the transport has the queues looked at
            deferred: _,
            turn: _, // any order is fair to begin with
            used: _,
            pool: _,
            refused: _, // a count of this process
        } = self;
        state::V1 {
            mac: filters.mac.0,
            modes: filters.modes,
            unicast: state::saved(&filters.unicast),
            multicast: state::saved(&filters.multicast),
            vlans: filters.vlans().to_vec(),
            pairs: *pairs,
            guest_offloads: *guest_offloads,
            link_up: *link_up,
            announce: *announce,
        }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { mac, modes, unicast, multicast, vlans, pairs, guest_offloads, link_up, announce } = state;
        let invalid = |what: &str| RestoreError::invalid(Self::KIND, what);
        let (unicast, multicast) = (state::table(unicast), state::table(multicast));
        let filters = Filters::restored(Mac(mac), modes, unicast, multicast, &vlans)
            .ok_or_else(|| invalid("a table has another size"))?;
        if !(1..=self.config.pairs).contains(&pairs) {
            return Err(invalid("it uses another number of queues"));
        }
        if guest_offloads.is_some_and(|offloads| offloads & !GUEST_OFFLOADS != 0) {
            return Err(invalid("it takes offloads that there are not"));
        }
        let (features, room, deferred, refused) = (self.features, self.room, self.deferred, self.refused);
        *self = Self {
            filters,
            pairs,
            guest_offloads,
            link_up,
            announce,
            features,
            room,
            deferred,
            refused,
            ..Self::new(self.config)
        };
        Ok(())
    }
}
