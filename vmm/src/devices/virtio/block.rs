//! virtio-blk, a disk (virtio 1.2, 5.2): several queues, read, write, flush, identify, discard, write zeroes.
//!
//! The device has no disk of its own. What the guest asks for comes out as a [`Request`]; whoever has the disk does it, in any order and however long it
//! takes, and hands the [`Outcome`] in:
//!
//! ```text
//!  ring ─► process ─► take_requests() ─► the owner: reads the data from RAM, does it
//!                                             │
//!  ring ◄─ data, status, interrupt ◄─ complete(id, outcome)
//! ```
//! A request that is out is part of the saved state, and comes out again after a restore: its data still stands in RAM, because a driver may not
//! touch a buffer that the device has. So whoever restores does again what was not completed, and doing it twice must not hurt.
//!
//! After a reset ([`VirtioPci::<Block>::life`] changes) outcomes of older requests are ignored. That they are not *done* any later than requests
//! of the next life is the owner's business.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as spec;

use super::super::{Ctx, GuestRam, RestoreError, Snapshot};
use super::queue::{self, Segment};
use super::{Broken, CHAINS_PER_CALL, Chain, Progress, VirtQueue, VirtioDevice, VirtioPci};

/// Bytes in a sector.
pub const SECTOR: u64 = 512;
/// Size of each queue.
const QUEUE_SIZE: u16 = 128;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 32;
const SIZES: &[u16] = &[QUEUE_SIZE; MAX_QUEUES as usize];
/// Most buffers with data in a request: header and status have one each.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in a buffer.
const SEGMENT_BYTES: u32 = 64 << 10;
/// Most bytes of data in a request.
pub const REQUEST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Most requests that are out at once. More stay in their rings.
pub const OUT_MAX: usize = 256;
/// Most ranges in one discard or write-zeroes request, and most sectors in each.
const RANGES: u32 = 16;
const RANGE_SECTORS: u32 = 1 << 22;
/// What the owner works with: 4 KiB.
const PHYSICAL_EXPONENT: u8 = 3;
const ID_BYTES: usize = spec::VIRTIO_BLK_ID_BYTES as usize;

const HEADER: usize = 16;
const RANGE: usize = 16;
const OK: u8 = spec::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = spec::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = spec::VIRTIO_BLK_S_UNSUPP as u8;

/// A run of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// Their storage may be given back.
    pub unmap: bool,
}

/// What is to be done. All sectors are on the disk, and a read-only disk is asked only to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Read into the outcome.
    Read {
        /// First byte.
        at: u64,
        /// How many.
        len: usize,
    },
    /// Write what stands in these runs of guest RAM (address, bytes).
    Write {
        /// First byte.
        at: u64,
        /// The data, in order.
        from: Vec<(u64, usize)>,
        /// The driver knows no flush: what it is told is written must be durable.
        durable: bool,
    },
    /// Make durable what was completed before.
    Flush,
    /// These sectors are of no interest any more.
    Discard(Vec<Range>),
    /// These sectors read as zeroes afterwards.
    WriteZeroes(Vec<Range>),
}

/// Something that the guest asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// For [`VirtioPci::<Block>::complete`].
    pub id: u64,
    /// What.
    pub kind: Kind,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done; what was read.
    Done(Vec<u8>),
    /// Not done.
    Failed,
}

/// A request that is out.
#[derive(Debug)]
struct Out {
    queue: u16,
    chain: Chain,
    /// Bytes that the outcome has.
    reads: usize,
}

/// The disk device.
#[derive(Debug)]
pub struct Block {
    queues: u16,
    read_only: bool,
    id: [u8; ID_BYTES],
    sectors: u64,
    config_generation: u8,
    /// The driver did not agree on flushes.
    write_through: bool,
    /// With the owner, or about to be.
    out: BTreeMap<u64, Out>,
    next_id: u64,
    /// For the owner to take.
    fresh: Vec<Request>,
    /// Restored; to come out again.
    again: VecDeque<(u16, Chain)>,
    /// Handed in; only within a call.
    done: Vec<(u64, Outcome)>,
    life: u64,
    /// The queue that is looked at first, so that none waits for ever.
    turn: usize,
}

impl Block {
    /// A disk of no sectors yet. `id` is what the guest can ask for, at most 20 bytes of it.
    #[must_use]
    pub fn new(queues: u16, read_only: bool, id: &str) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            queues: queues.clamp(1, MAX_QUEUES),
            read_only,
            id: bytes,
            sectors: 0,
            config_generation: 0,
            write_through: true,
            out: BTreeMap::new(),
            next_id: 0,
            fresh: Vec::new(),
            again: VecDeque::new(),
            done: Vec::new(),
            life: 0,
            turn: 0,
        }
    }

    /// Sectors that the guest sees.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// What the driver put into a ring: answered at once, or out.
    fn enter(&mut self, at: u16, chain: Chain, queue: &mut VirtQueue, ram: &GuestRam) -> Result<(), Broken> {
        if self.out.values().filter(|out| out.queue == at).count() >= usize::from(queue.size()) {
            return Err(Broken("more requests are under way than the queue can hold"));
        }
        match self.parse(&chain, ram)? {
            Err(status) => answer(queue, ram, &chain, status, &[]),
            Ok(Asked::Now(bytes)) => answer(queue, ram, &chain, OK, &bytes),
            Ok(Asked::Out(kind)) => {
                let reads = if let Kind::Read { len, .. } = &kind { *len } else { 0 };
                let id = self.next_id;
                self.next_id += 1;
                self.out.insert(id, Out { queue: at, chain, reads });
                self.fresh.push(Request { id, kind });
                Ok(())
            }
        }
    }

    /// What a chain asks for, or the status that refuses it.
    fn parse(&self, chain: &Chain, ram: &GuestRam) -> Result<Result<Asked, u8>, Broken> {
        if chain.readable_len() < HEADER {
            return Err(Broken("a request without a header"));
        }
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return Err(Broken("a request without room for its status"));
        };
        let mut header = Vec::with_capacity(HEADER);
        chain.read(ram, 0, HEADER, &mut header)?;
        let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header.get(at + i).copied().unwrap_or(0)));
        let (what, sector) = (field(0) as u32, field(8));
        let data = chain.readable_len() - HEADER;
        Ok(match what {
            spec::VIRTIO_BLK_T_IN => self.span(sector, room).map(|at| match room {
                0 => Asked::Now(Vec::new()),
                len => Asked::Out(Kind::Read { at, len }),
            }),
            spec::VIRTIO_BLK_T_OUT if self.read_only => Err(IOERR),
            spec::VIRTIO_BLK_T_OUT => self.span(sector, data).map(|at| match data {
                0 => Asked::Now(Vec::new()),
                len => {
                    let from = chain.readable_runs(HEADER, len).map(Segment::into).collect();
                    Asked::Out(Kind::Write { at, from, durable: self.write_through })
                }
            }),
            spec::VIRTIO_BLK_T_FLUSH => Ok(Asked::Out(Kind::Flush)),
            spec::VIRTIO_BLK_T_GET_ID if room >= ID_BYTES => Ok(Asked::Now(self.id.to_vec())),
            spec::VIRTIO_BLK_T_GET_ID => Err(IOERR),
            spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => Err(IOERR),
            spec::VIRTIO_BLK_T_DISCARD | spec::VIRTIO_BLK_T_WRITE_ZEROES => {
                if data > RANGES as usize * RANGE {
                    return Ok(Err(IOERR));
                }
                let mut bytes = Vec::with_capacity(data);
                chain.read(ram, HEADER, data, &mut bytes)?;
                let zeroes = what == spec::VIRTIO_BLK_T_WRITE_ZEROES;
                self.ranges(&bytes, zeroes)
                    .map(|ranges| Asked::Out(if zeroes { Kind::WriteZeroes(ranges) } else { Kind::Discard(ranges) }))
            }
            _ => Err(UNSUPP),
        })
    }

    /// First byte of so many bytes at a sector, if they are on the disk.
    fn span(&self, sector: u64, len: usize) -> Result<u64, u8> {
        let len = len as u64;
        let end = sector.checked_add(len / SECTOR).filter(|end| *end <= self.sectors).ok_or(IOERR)?;
        let fits = len.is_multiple_of(SECTOR) && len <= REQUEST_BYTES;
        // A disk's bytes can be counted: its size came as bytes.
        end.checked_mul(SECTOR).filter(|_| fits).map(|end| end - len).ok_or(IOERR)
    }

    fn ranges(&self, bytes: &[u8], zeroes: bool) -> Result<Vec<Range>, u8> {
        let (ranges, rest) = bytes.as_chunks::<RANGE>();
        if !rest.is_empty() || ranges.is_empty() {
            return Err(IOERR);
        }
        let parse = |range: &[u8; RANGE]| {
            let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *range;
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let sectors = u32::from_le_bytes([i, j, k, l]);
            let flags = u32::from_le_bytes([m, n, o, p]);
            let known = if zeroes { spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(UNSUPP);
            }
            let on_disk = sector.checked_add(u64::from(sectors)).is_some_and(|end| end <= self.sectors);
            let range = Range { sector, sectors, unmap: !zeroes || flags != 0 };
            if on_disk && sectors <= RANGE_SECTORS { Ok(range) } else { Err(IOERR) }
        };
        ranges.iter().map(parse).collect()
    }

    fn finish(&mut self, id: u64, outcome: Outcome, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        // Unknown: of another life.
        let Some(out) = self.out.remove(&id) else { return Ok(()) };
        let Some(queue) = queues.get_mut(usize::from(out.queue)) else { return Ok(()) };
        match outcome {
            Outcome::Done(bytes) if bytes.len() == out.reads => answer(queue, ram, &out.chain, OK, &bytes),
            _ => answer(queue, ram, &out.chain, IOERR, &[]),
        }
    }
}

enum Asked {
    /// Answered at once with these bytes.
    Now(Vec<u8>),
    Out(Kind),
}

/// Data, then status, then the used ring. The status is the last byte that the device may write.
fn answer(queue: &mut VirtQueue, ram: &GuestRam, chain: &Chain, status: u8, data: &[u8]) -> Result<(), Broken> {
    let last = chain.writable_len().saturating_sub(1);
    chain.write(ram, data)?;
    chain.write_at(ram, last, &[status])?;
    queue.complete(ram, chain, data.len().min(last) + 1)
}

impl VirtioDevice for Block {
    const DEVICE_ID: u16 = 2;
    const PCI_CLASS: u32 = 0x01_80_00;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];

    fn queue_sizes(&self) -> &[u16] {
        &SIZES[..usize::from(self.queues)]
    }

    fn features(&self) -> u64 {
        let always = [
            spec::VIRTIO_BLK_F_SIZE_MAX,
            spec::VIRTIO_BLK_F_SEG_MAX,
            spec::VIRTIO_BLK_F_BLK_SIZE,
            spec::VIRTIO_BLK_F_TOPOLOGY,
            spec::VIRTIO_BLK_F_FLUSH,
            spec::VIRTIO_BLK_F_MQ,
        ];
        let (ro, rw) = ([spec::VIRTIO_BLK_F_RO], [spec::VIRTIO_BLK_F_DISCARD, spec::VIRTIO_BLK_F_WRITE_ZEROES]);
        let more: &[u32] = if self.read_only { &ro } else { &rw };
        always.iter().chain(more).fold(0, |all, bit| all | 1 << bit)
    }

    fn agreed(&mut self, features: u64) {
        self.write_through = features & 1 << spec::VIRTIO_BLK_F_FLUSH == 0;
    }

    fn config_generation(&self) -> u8 {
        self.config_generation
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0u8; 60];
        let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES.to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[PHYSICAL_EXPONENT, 0]);
        put(26, &(1u16 << PHYSICAL_EXPONENT).to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        if !self.read_only {
            put(36, &RANGE_SECTORS.to_le_bytes());
            put(40, &RANGES.to_le_bytes());
            put(44, &(1u32 << PHYSICAL_EXPONENT).to_le_bytes());
            put(48, &RANGE_SECTORS.to_le_bytes());
            put(52, &RANGES.to_le_bytes());
            put(56, &[1]);
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|at| at.checked_add(i));
            *byte = at.and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        while let Some((at, chain)) = self.again.pop_front() {
            chain.check(ram)?;
            if let Some(queue) = queues.get_mut(usize::from(at)) {
                self.enter(at, chain, queue, ram)?;
            }
        }
        for (id, outcome) in std::mem::take(&mut self.done) {
            self.finish(id, outcome, queues, ram)?;
        }
        let mut left = CHAINS_PER_CALL;
        self.turn = (self.turn + 1) % queues.len().max(1);
        for i in (self.turn..queues.len()).chain(0..self.turn) {
            loop {
                if self.out.len() >= OUT_MAX {
                    // A completion is what makes room, and looks again.
                    return Ok(Progress::Idle);
                }
                if left == 0 {
                    return Ok(Progress::More);
                }
                let Some(chain) = queues[i].next_chain(ram)? else { break };
                left -= 1;
                // There are at most MAX_QUEUES.
                self.enter(i as u16, chain, &mut queues[i], ram)?;
            }
        }
        Ok(Progress::Idle)
    }

    fn reset(&mut self) {
        self.life += 1;
        self.out.clear();
        self.fresh.clear();
        self.again.clear();
        self.done.clear();
        self.write_through = true;
    }
}

impl VirtioPci<Block> {
    /// What the guest has asked for since the last call.
    pub fn take_requests(&mut self, ctx: &Ctx) -> Vec<Request> {
        if !self.device().again.is_empty() {
            self.process(ctx.ram);
        }
        std::mem::take(&mut self.device_mut().fresh)
    }

    /// What became of requests. One that the device does not know any more is ignored.
    pub fn complete(&mut self, outcomes: Vec<(u64, Outcome)>, ctx: &Ctx) {
        if self.running() {
            self.device_mut().done = outcomes;
            self.process(ctx.ram);
        }
    }

    /// Changes with every reset: requests of another life are forgotten.
    pub fn life(&self) -> u64 {
        self.device().life
    }

    /// Requests that are out.
    pub fn out(&self) -> usize {
        self.device().out.len() + self.device().again.len()
    }

    /// The disk has so many sectors; a driver that is at work is told.
    pub fn set_sectors(&mut self, sectors: u64) {
        let device = self.device_mut();
        if device.sectors != sectors {
            device.sectors = sectors;
            device.config_generation = device.config_generation.wrapping_add(1);
            self.config_changed();
        }
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Serialize, queue};

    /// A request that is out.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Out {
        /// Its queue.
        pub queue: u16,
        /// Its buffers; what it asks for stands in them.
        pub chain: queue::ChainV1,
    }

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// As the guest sees it.
        pub sectors: u64,
        /// Counts changes of the configuration.
        pub config_generation: u8,
        /// What is out, oldest first.
        pub out: Vec<Out>,
    }
}

impl Snapshot for Block {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self {
            queues: _, // configuration
            read_only: _,
            id: _,
            sectors,
            config_generation,
            write_through: _, // from the features, which the transport has
            out,
            next_id: _, // of this process only, like life and turn
            fresh: _,   // in `out` too
            again,
            done: _, // empty between calls
            life: _,
            turn: _,
        } = self;
        let restored = again.iter().map(|(queue, chain)| (*queue, chain));
        let out = restored.chain(out.values().map(|out| (out.queue, &out.chain)));
        state::V1 {
            sectors: *sectors,
            config_generation: *config_generation,
            out: out.map(|(queue, chain)| state::Out { queue, chain: chain.save() }).collect(),
        }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { sectors, config_generation, out } = state;
        if out.len() > OUT_MAX || sectors.checked_mul(SECTOR).is_none() {
            return Err(RestoreError::invalid(
                Self::KIND,
                "more requests are under way than can be, or it has no size",
            ));
        }
        let restore = |out: state::Out| {
            if out.queue >= self.queues {
                return Err(RestoreError::invalid(Self::KIND, format!("it has a request in queue {}", out.queue)));
            }
            Ok((out.queue, Chain::restore(Self::KIND, out.chain, QUEUE_SIZE)?))
        };
        let again = out.into_iter().map(restore).collect::<Result<_, _>>()?;
        let write_through = self.write_through;
        VirtioDevice::reset(self);
        (self.sectors, self.config_generation) = (sectors, config_generation);
        (self.again, self.write_through) = (again, write_through);
        Ok(())
    }
}
