//! virtio-blk, a disk (virtio 1.2, 5.2): several queues, read, write, flush, identify, discard, write zeroes.
//!
//! It has no disk of its own: what the guest asks for goes out, and stays part of the saved state until it is done ([`super::requests`]).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as spec;

use super::super::{GuestRam, RestoreError, Snapshot};
use super::queue::Segment;
use super::requests::{self, Disks, QUEUE_SIZE, Requests, SEGMENT_BYTES, SEGMENTS};
use super::{Broken, Chain, Progress, VirtQueue, VirtioDevice, VirtioPci};

pub use super::requests::{Kind, OUT_MAX, Out, Outcome, REQUEST_BYTES, Range, Request, SECTOR};

/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 32;
const SIZES: &[u16] = &[QUEUE_SIZE; MAX_QUEUES as usize];
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
    requests: Requests<()>,
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
            requests: Requests::default(),
        }
    }

    /// Sectors that the guest sees.
    pub fn sectors(&self) -> u64 {
        self.sectors
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
}

impl Disks for Block {
    type What = ();

    fn requests(&self) -> &Requests<()> {
        &self.requests
    }

    fn requests_mut(&mut self) -> &mut Requests<()> {
        &mut self.requests
    }

    fn enter(&mut self, at: u16, chain: Chain, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        let Some(queue) = queues.get_mut(usize::from(at)) else { return Ok(()) };
        self.requests.admit(at, queue)?;
        match self.parse(&chain, ram)? {
            Err(status) => answer(queue, ram, &chain, status, &[]),
            Ok(Asked::Now(bytes)) => answer(queue, ram, &chain, OK, &bytes),
            Ok(Asked::Out(kind)) => {
                self.requests.give(at, chain, 0, kind, ());
                Ok(())
            }
        }
    }

    fn finish(
        &mut self,
        _id: u64,
        out: Out<()>,
        outcome: Outcome,
        queues: &mut [VirtQueue],
        ram: &GuestRam,
    ) -> Result<(), Broken> {
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
        requests::work(self, queues, ram)
    }

    fn reset(&mut self) {
        self.requests.forget();
        self.write_through = true;
    }
}

impl VirtioPci<Block> {
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
    use super::{Deserialize, Serialize};

    pub use super::requests::state::Out;

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
            requests,
        } = self;
        state::V1 { sectors: *sectors, config_generation: *config_generation, out: requests.save() }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { sectors, config_generation, out } = state;
        if sectors.checked_mul(SECTOR).is_none() {
            return Err(RestoreError::invalid(Self::KIND, "it has no size"));
        }
        let again = Requests::<()>::restored(Self::KIND, out, self.queue_sizes(), OUT_MAX)?;
        let write_through = self.write_through;
        VirtioDevice::reset(self);
        (self.sectors, self.config_generation) = (sectors, config_generation);
        self.write_through = write_through;
        self.requests.repeat(again);
        Ok(())
    }
}
