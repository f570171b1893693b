//! A split virtqueue (virtio 1.2, 2.7) as devices use it: whole, verified chains in, used elements out, and when to
//! interrupt.
//!
//! The ring's arithmetic is crate `virtio-queue`'s. On top of it this module refuses what that crate lets pass: chains
//! that loop or run out of the table, buffers outside RAM, device-readable buffers after writable ones, an available
//! index that goes back or too far.

use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::{GuestRam, RestoreError};

/// "No MSI-X vector" (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Layout of the rings (2.7.6, 2.7.8).
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAIL_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;

/// The driver broke the rules of its rings; the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest's driver broke its virtqueue: {0}")]
pub struct Broken(pub &'static str);

/// A run of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    addr: GuestAddress,
    len: usize,
}

/// A chain of buffers. All of it lies in RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl From<Segment> for (u64, usize) {
    fn from(segment: Segment) -> Self {
        (segment.addr.0, segment.len)
    }
}

fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.len).sum()
}

/// The parts of `segments` from byte `skip` on, at most `len` bytes.
fn window(segments: &[Segment], mut skip: usize, mut len: usize) -> impl Iterator<Item = Segment> {
    segments.iter().filter_map(move |segment| {
        let start = skip.min(segment.len);
        skip -= start;
        let take = len.min(segment.len - start);
        len -= take;
        // Cannot overflow: the whole segment lies in RAM.
        (take > 0).then(|| Segment { addr: GuestAddress(segment.addr.0 + start as u64), len: take })
    })
}

impl Chain {
    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        total(&self.readable)
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        total(&self.writable)
    }

    /// Append to `out` up to `len` of the readable bytes from `skip` on; returns how many.
    pub fn read(&self, ram: &GuestRam, skip: usize, len: usize, out: &mut Vec<u8>) -> Result<usize, Broken> {
        let start = out.len();
        for segment in window(&self.readable, skip, len) {
            let at = out.len();
            out.resize(at + segment.len, 0);
            ram.read_slice(&mut out[at..], segment.addr).map_err(|_| Broken("a buffer vanished from RAM"))?;
        }
        Ok(out.len() - start)
    }

    /// All of `out` from the readable bytes from `skip` on.
    ///
    /// # Errors
    /// There are not as many.
    pub fn read_into(&self, ram: &GuestRam, skip: usize, out: &mut [u8]) -> Result<(), Broken> {
        let mut rest = &mut *out;
        for segment in window(&self.readable, skip, rest.len()) {
            let (here, behind) = rest.split_at_mut(segment.len);
            ram.read_slice(here, segment.addr).map_err(|_| Broken("a buffer vanished from RAM"))?;
            rest = behind;
        }
        if rest.is_empty() { Ok(()) } else { Err(Broken("a chain is shorter than it was")) }
    }

    /// The runs of memory that hold the readable bytes from `skip` on, at most `len` of them.
    pub(super) fn readable_runs(&self, skip: usize, len: usize) -> impl Iterator<Item = Segment> {
        window(&self.readable, skip, len)
    }

    /// Write `data` to the start of the writable buffers; returns how much fitted.
    pub fn write(&self, ram: &GuestRam, data: &[u8]) -> Result<usize, Broken> {
        self.write_at(ram, 0, data)
    }

    /// As [`Chain::write`], from byte `skip` of the writable buffers on.
    pub fn write_at(&self, ram: &GuestRam, skip: usize, data: &[u8]) -> Result<usize, Broken> {
        let mut done = 0;
        for segment in window(&self.writable, skip, data.len()) {
            ram.write_slice(&data[done..done + segment.len], segment.addr)
                .map_err(|_| Broken("a buffer vanished from RAM"))?;
            done += segment.len;
        }
        Ok(done)
    }
}

impl Chain {
    /// For a saved state, of a device that has taken the chain and not completed it.
    pub(super) fn save(&self) -> ChainV1 {
        let Self { head, readable, writable } = self;
        // A chain is shorter than 4 GiB.
        let runs = |all: &[Segment]| all.iter().map(|s| (s.addr.0, s.len as u32)).collect();
        ChainV1 { head: *head, readable: runs(readable), writable: runs(writable) }
    }

    /// Back from a saved state. Whether it lies in RAM is for [`Chain::check`] to say.
    pub(super) fn restore(kind: &'static str, saved: ChainV1, limit: u16) -> Result<Self, RestoreError> {
        let ChainV1 { head, readable, writable } = saved;
        let bytes: u64 = readable.iter().chain(&writable).map(|(_, len)| u64::from(*len)).sum();
        if head >= limit || readable.len() + writable.len() > usize::from(limit) || bytes > u64::from(u32::MAX) {
            return Err(RestoreError::invalid(kind, "a chain is longer than its queue"));
        }
        let runs = |all: Vec<(u64, u32)>| -> Vec<Segment> {
            all.into_iter().map(|(addr, len)| Segment { addr: GuestAddress(addr), len: len as usize }).collect()
        };
        Ok(Self { head, readable: runs(readable), writable: runs(writable) })
    }

    /// Whether all of it lies in RAM: one that was restored need not.
    pub(super) fn check(&self, ram: &GuestRam) -> Result<(), Broken> {
        let mut all = self.readable.iter().chain(&self.writable).filter(|s| s.len > 0);
        let inside = all.all(|s| GuestMemoryBackend::check_range(ram, s.addr, s.len));
        if inside { Ok(()) } else { Err(Broken("a buffer lies outside RAM")) }
    }
}

/// What the driver programs while it sets the queue up; taken over when it enables the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Size, a power of two up to the largest.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub driver: u64,
    /// Device area (used ring).
    pub device: u64,
    /// MSI-X vector.
    pub vector: u16,
}

/// One queue.
#[derive(Debug)]
pub struct VirtQueue {
    max_size: u16,
    pub(super) setup: Setup,
    /// The ring, once enabled.
    ring: Option<Queue>,
    /// Elements put into the used ring since the driver was last told.
    added: u16,
    /// Some of them the ring has not counted ([`VirtQueue::complete_all`]).
    uncounted: bool,
}

impl VirtQueue {
    /// A queue that has not been set up. `max_size` is a power of two.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        let setup = Setup { size: max_size, descriptors: 0, driver: 0, device: 0, vector: NO_VECTOR };
        Self { max_size, setup, ring: None, added: 0, uncounted: false }
    }

    /// Whether the driver has enabled it.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.ring.is_some()
    }

    /// As the driver set it.
    pub(super) fn size(&self) -> u16 {
        self.setup.size
    }

    /// Back to what `new` made.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// The driver enables the queue with what it has programmed.
    pub(super) fn enable(&mut self, event_idx: bool, ram: &GuestRam) -> Result<(), Broken> {
        let ring = self.ring_at(0, 0, event_idx).map_err(|_| Broken("size or addresses of a queue are not aligned"))?;
        if !ring.is_valid(ram) {
            return Err(Broken("a queue lies outside RAM"));
        }
        self.ring = Some(ring);
        Ok(())
    }

    fn ring_at(&self, next_avail: u16, next_used: u16, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size: self.setup.size,
            ready: true,
            desc_table: self.setup.descriptors,
            avail_ring: self.setup.driver,
            used_ring: self.setup.device,
        })
    }

    /// The next chain that the driver has made available, if any; none from a queue that is not enabled. When there is
    /// none the driver has been asked to notify.
    pub fn next_chain(&mut self, ram: &GuestRam) -> Result<Option<Chain>, Broken> {
        let Some(ring) = &mut self.ring else { return Ok(None) };
        if !available(ring, ram)? {
            // With EVENT_IDX the driver must be told from where on to notify; look again after that.
            let more = ring.enable_notification(ram).map_err(|_| Broken("the used ring is not writable"))?;
            if !more {
                return Ok(None);
            }
        }
        let chain = ring
            .iter(ram)
            .map_err(|_| Broken("the available index is out of range"))?
            .next()
            .ok_or(Broken("the available index went back"))?;
        collect(chain, ram, self.setup.size).map(Some)
    }

    /// Whether the driver has made a chain available that was not taken yet. It is not asked to notify.
    pub fn has_some(&self, ram: &GuestRam) -> Result<bool, Broken> {
        self.ring.as_ref().map_or(Ok(false), |ring| available(ring, ram))
    }

    /// Put the chain that [`VirtQueue::next_chain`] returned last back: it will come again.
    pub fn put_back(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.go_to_previous_position();
        }
    }

    /// The device is done with `chain` and has written `written` bytes to it.
    pub fn complete(&mut self, ram: &GuestRam, chain: &Chain, written: usize) -> Result<(), Broken> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let written = u32::try_from(written).map_err(|_| Broken("a chain is longer than 4 GiB"))?;
        ring.add_used(ram, chain.head, written).map_err(|_| Broken("the used ring is not writable"))?;
        self.added = self.added.wrapping_add(1);
        Ok(())
    }

    /// As [`VirtQueue::complete`] of several chains that belong together: the driver sees all of them at once, or none (5.1.6.4.2 demands it of a packet in
    /// several buffers).
    pub fn complete_all(&mut self, ram: &GuestRam, chains: &[(Chain, usize)]) -> Result<(), Broken> {
        let Some(((last, written), first)) = chains.split_last() else { return Ok(()) };
        if let (Some(ring), false) = (&mut self.ring, first.is_empty()) {
            // The ring makes each element visible as it is added: those before the last are written behind its index, and it is told of them first.
            let next = ring.next_used();
            for (i, (chain, written)) in (0..).zip(first) {
                let at = u64::from(next.wrapping_add(i) % ring.size());
                let written = u32::try_from(*written).map_err(|_| Broken("a chain is longer than 4 GiB"))?;
                let element = [u32::from(chain.head).to_le_bytes(), written.to_le_bytes()];
                let addr = ring.used_ring().checked_add(USED_HEADER + at * USED_ELEMENT);
                let wrote = addr.map(|addr| ram.write_slice(element.as_flattened(), GuestAddress(addr)));
                wrote.and_then(Result::ok).ok_or(Broken("the used ring is not writable"))?;
            }
            // A packet has fewer buffers than the queue.
            let more = first.len() as u16;
            ring.set_next_used(next.wrapping_add(more));
            self.added = self.added.wrapping_add(more);
            self.uncounted = true;
        }
        self.complete(ram, last, *written)
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    pub(super) fn take_interrupt(&mut self, ram: &GuestRam) -> Result<bool, Broken> {
        let (added, uncounted) = (std::mem::take(&mut self.added), std::mem::take(&mut self.uncounted));
        let Some(ring) = self.ring.as_mut().filter(|_| added > 0) else { return Ok(false) };
        const UNREADABLE: Broken = Broken("the available ring is not readable");
        let wants = ring.needs_notification(ram).map_err(|_| UNREADABLE)?;
        if wants || !uncounted {
            return Ok(wants);
        }
        // With EVENT_IDX, and it counted fewer than there are: whether the index that the driver waits for is among all of them (2.7.7.2). The fence that must
        // come before was in the call above.
        let at =
            ring.avail_ring().checked_add(AVAIL_HEADER + AVAIL_ELEMENT * u64::from(ring.size())).ok_or(UNREADABLE)?;
        let event: u16 = ram.load(GuestAddress(at), Ordering::Relaxed).map_err(|_| UNREADABLE)?;
        Ok(ring.next_used().wrapping_sub(u16::from_le(event)).wrapping_sub(1) < added)
    }

    /// The saved state; between calls there is nothing else.
    pub(super) fn save(&self) -> V1 {
        let Self { max_size: _, setup, ring, added: _, uncounted: _ } = self;
        let position = ring.as_ref().map(|r| Position { next_avail: r.next_avail(), next_used: r.next_used() });
        V1 { setup: *setup, position }
    }

    /// Take a saved state. Where its addresses lie is checked when the ring is used.
    pub(super) fn restore(&mut self, kind: &'static str, state: V1, event_idx: bool) -> Result<(), RestoreError> {
        let V1 { setup, position } = state;
        if !valid_size(setup.size, self.max_size) {
            return Err(RestoreError::invalid(kind, format!("a queue has size {}", setup.size)));
        }
        self.setup = setup;
        (self.added, self.uncounted) = (0, false);
        self.ring = match position {
            None => None,
            Some(Position { next_avail, next_used }) => {
                let ring = self.ring_at(next_avail, next_used, event_idx);
                Some(ring.map_err(|e| RestoreError::invalid(kind, format!("a queue cannot be: {e}")))?)
            }
        };
        Ok(())
    }

    /// The driver programs the size; what is not a size is ignored.
    pub(super) fn set_size(&mut self, size: u16) {
        if valid_size(size, self.max_size) {
            self.setup.size = size;
        }
    }
}

fn valid_size(size: u16, max_size: u16) -> bool {
    size.is_power_of_two() && size <= max_size
}

fn available(ring: &Queue, ram: &GuestRam) -> Result<bool, Broken> {
    let index = ring.avail_idx(ram, Ordering::Acquire).map_err(|_| Broken("the available ring is not readable"))?;
    Ok(index.0 != ring.next_avail())
}

/// Walk a chain once and check it.
fn collect(descriptors: virtio_queue::DescriptorChain<&GuestRam>, ram: &GuestRam, limit: u16) -> Result<Chain, Broken> {
    let mut chain = Chain { head: descriptors.head_index(), readable: Vec::new(), writable: Vec::new() };
    let mut ends = false;
    let mut bytes = 0u64;
    for (i, descriptor) in descriptors.enumerate() {
        // An indirect table could hold more (2.7.5.3.1 forbids it); the limit bounds the work.
        if i >= usize::from(limit) {
            return Err(Broken("a chain is longer than its queue"));
        }
        ends = !descriptor.has_next();
        let segment = Segment { addr: descriptor.addr(), len: descriptor.len() as usize };
        bytes += u64::from(descriptor.len());
        if bytes > u64::from(u32::MAX) {
            return Err(Broken("a chain is longer than 4 GiB"));
        }
        if segment.len > 0 && !GuestMemoryBackend::check_range(ram, segment.addr, segment.len) {
            return Err(Broken("a buffer lies outside RAM"));
        }
        if descriptor.is_write_only() {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(Broken("a readable buffer follows a writable one"));
        }
    }
    // The walk also stops at a descriptor that is out of range, and after as many as the queue has.
    if ends { Ok(chain) } else { Err(Broken("a chain loops or leaves its table")) }
}

/// Where a ring stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Next entry of the available ring.
    pub next_avail: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
}

/// Saved state of a queue, version 1; part of the transport's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct V1 {
    /// What the driver programmed.
    pub setup: Setup,
    /// Present once it is enabled.
    pub position: Option<Position>,
}

/// Saved state of a chain that a device has taken, version 1; part of the device's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainV1 {
    /// Its first descriptor.
    pub head: u16,
    /// Runs of memory that the device reads: address, bytes.
    pub readable: Vec<(u64, u32)>,
    /// Runs of memory that the device writes.
    pub writable: Vec<(u64, u32)>,
}
