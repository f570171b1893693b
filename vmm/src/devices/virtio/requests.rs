//! Requests of a disk device that are *out*: with whoever has the disk. What `virtio-blk` and `virtio-scsi` have in common.
//!
//! A device has no disk of its own. What the guest asks for comes out as a [`Request`]; whoever has the disk does it, in any order and however long it
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
//! After a reset ([`VirtioPci::life`] changes) outcomes of older requests are ignored. That they are not *done* any later than requests
//! of the next life is the owner's business.

use std::collections::{BTreeMap, VecDeque};

use super::super::{Ctx, GuestRam, RestoreError};
use super::{Broken, CHAINS_PER_CALL, Chain, Progress, VirtQueue, VirtioDevice, VirtioPci};

/// Bytes in a sector, whatever a device's blocks are.
pub const SECTOR: u64 = 512;
/// Size of each queue with requests.
pub(super) const QUEUE_SIZE: u16 = 128;
/// Most buffers with data in a request: what leads and what follows have one each.
pub(super) const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in a buffer.
pub(super) const SEGMENT_BYTES: u32 = 64 << 10;
/// Most bytes of data in a request.
pub const REQUEST_BYTES: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;
/// Most requests of a device that are out at once. More stay in their rings.
pub const OUT_MAX: usize = 256;

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
        /// The driver knows no flush, or wants this one durable: what it is told is written must be durable.
        durable: bool,
    },
    /// Write these bytes again and again.
    Fill {
        /// First byte.
        at: u64,
        /// How many in all, a multiple of the pattern's.
        len: u64,
        /// What.
        pattern: Vec<u8>,
    },
    /// Make durable what was completed before.
    Flush,
    /// These sectors are of no interest any more.
    Discard(Vec<Range>),
    /// These sectors read as zeroes afterwards.
    WriteZeroes(Vec<Range>),
}

impl Kind {
    /// Bytes that its outcome has.
    pub fn reads(&self) -> usize {
        if let Self::Read { len, .. } = self { *len } else { 0 }
    }
}

/// Something that the guest asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// For [`VirtioPci::complete`].
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
pub struct Out<T> {
    pub(super) queue: u16,
    pub(super) chain: Chain,
    /// Bytes that the outcome has.
    pub(super) reads: usize,
    /// What else the device must know of it.
    pub(super) what: T,
}

/// See the module.
#[derive(Debug)]
pub struct Requests<T> {
    /// With the owner, or about to be.
    pub(super) out: BTreeMap<u64, Out<T>>,
    /// How many of them each queue has.
    of_queue: BTreeMap<u16, usize>,
    next_id: u64,
    /// For the owner of this unit to take.
    fresh: Vec<(usize, Request)>,
    /// Restored; to come out again.
    again: VecDeque<(u16, Chain)>,
    /// Handed in; only within a call.
    done: Vec<(u64, Outcome)>,
    life: u64,
    /// The queue that is looked at first, so that none waits for ever.
    turn: usize,
}

impl<T> Default for Requests<T> {
    fn default() -> Self {
        Self {
            out: BTreeMap::new(),
            of_queue: BTreeMap::new(),
            next_id: 0,
            fresh: Vec::new(),
            again: VecDeque::new(),
            done: Vec::new(),
            life: 0,
            turn: 0,
        }
    }
}

impl<T> Requests<T> {
    /// A driver cannot have more under way in a queue than the queue holds.
    pub(super) fn admit(&self, at: u16, queue: &VirtQueue) -> Result<(), Broken> {
        if self.of_queue.get(&at).is_some_and(|out| *out >= usize::from(queue.size())) {
            return Err(Broken("more requests are under way than the queue can hold"));
        }
        Ok(())
    }

    /// This is for the owner of `unit` to do.
    pub(super) fn give(&mut self, queue: u16, chain: Chain, unit: usize, kind: Kind, what: T) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        *self.of_queue.entry(queue).or_default() += 1;
        self.out.insert(id, Out { queue, chain, reads: kind.reads(), what });
        self.fresh.push((unit, Request { id, kind }));
        id
    }

    /// It is out no more, and its owner need not do it if it has not been taken.
    pub(super) fn recall(&mut self, id: u64) -> Option<Out<T>> {
        self.fresh.retain(|(_, request)| request.id != id);
        self.remove(id)
    }

    fn remove(&mut self, id: u64) -> Option<Out<T>> {
        let out = self.out.remove(&id)?;
        if let Some(left) = self.of_queue.get_mut(&out.queue) {
            *left -= 1;
        }
        Some(out)
    }

    fn take(&mut self, unit: usize) -> Vec<Request> {
        self.fresh.extract_if(.., |(of, _)| *of == unit).map(|(_, request)| request).collect()
    }

    /// The device was reset.
    pub(super) fn forget(&mut self) {
        self.life += 1;
        self.out.clear();
        self.of_queue.clear();
        self.fresh.clear();
        self.again.clear();
        self.done.clear();
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.out.len() + self.again.len()
    }

    /// For a saved state, oldest first. (`fresh` is in `out` too; `done` is empty between calls; the rest is of this process only.)
    pub(super) fn save(&self) -> Vec<state::Out> {
        let restored = self.again.iter().map(|(queue, chain)| (*queue, chain));
        let out = restored.chain(self.out.values().map(|out| (out.queue, &out.chain)));
        out.map(|(queue, chain)| state::Out { queue, chain: chain.save() }).collect()
    }

    /// What a saved state has, at most so many, to come out again. `sizes` are the queues'.
    pub(super) fn restored(
        kind: &'static str,
        out: Vec<state::Out>,
        sizes: &[u16],
        most: usize,
    ) -> Result<VecDeque<(u16, Chain)>, RestoreError> {
        if out.len() > most {
            return Err(RestoreError::invalid(kind, "more requests are under way than can be"));
        }
        let restore = |out: state::Out| {
            let Some(size) = sizes.get(usize::from(out.queue)) else {
                return Err(RestoreError::invalid(kind, format!("it has a request in queue {}", out.queue)));
            };
            Ok((out.queue, Chain::restore(kind, out.chain, *size)?))
        };
        out.into_iter().map(restore).collect()
    }

    /// Let it come out again.
    pub(super) fn repeat(&mut self, again: VecDeque<(u16, Chain)>) {
        self.again = again;
    }
}

/// A device whose requests go out.
pub trait Disks: VirtioDevice {
    /// What it must know of a request that is out.
    type What: Send;
    /// They.
    fn requests(&self) -> &Requests<Self::What>;
    /// They.
    fn requests_mut(&mut self) -> &mut Requests<Self::What>;
    /// Whether the driver puts requests into this queue.
    fn asks(&self, _queue: usize) -> bool {
        true
    }
    /// What the driver put into a queue: answered at once, or out.
    fn enter(&mut self, at: u16, chain: Chain, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken>;
    /// What became of a request that was out.
    fn finish(
        &mut self,
        id: u64,
        out: Out<Self::What>,
        outcome: Outcome,
        queues: &mut [VirtQueue],
        ram: &GuestRam,
    ) -> Result<(), Broken>;
}

/// What [`VirtioDevice::process`] does of such a device.
pub(super) fn work<D: Disks>(device: &mut D, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
    while let Some((at, chain)) = device.requests_mut().again.pop_front() {
        chain.check(ram)?;
        if usize::from(at) < queues.len() {
            device.enter(at, chain, queues, ram)?;
        }
    }
    for (id, outcome) in std::mem::take(&mut device.requests_mut().done) {
        // Unknown: of another life.
        if let Some(out) = device.requests_mut().remove(id) {
            device.finish(id, out, outcome, queues, ram)?;
        }
    }
    let mut left = CHAINS_PER_CALL;
    let turn = (device.requests().turn + 1) % queues.len().max(1);
    device.requests_mut().turn = turn;
    for i in (turn..queues.len()).chain(0..turn) {
        if !device.asks(i) {
            continue;
        }
        loop {
            if device.requests().out.len() >= OUT_MAX {
                // A completion is what makes room, and looks again.
                return Ok(Progress::Idle);
            }
            if left == 0 {
                return Ok(Progress::More);
            }
            let Some(chain) = queues[i].next_chain(ram)? else { break };
            left -= 1;
            // A device has few queues.
            device.enter(i as u16, chain, queues, ram)?;
        }
    }
    Ok(Progress::Idle)
}

impl<D: Disks> VirtioPci<D> {
    /// What the guest has asked of the device's first unit since the last call.
    pub fn take_requests(&mut self, ctx: &Ctx) -> Vec<Request> {
        self.take_requests_of(0, ctx)
    }

    /// What the guest has asked of this unit since the last call.
    pub fn take_requests_of(&mut self, unit: usize, ctx: &Ctx) -> Vec<Request> {
        if !self.device().requests().again.is_empty() {
            self.process(ctx.ram);
        }
        self.device_mut().requests_mut().take(unit)
    }

    /// What became of requests. One that the device does not know any more is ignored.
    pub fn complete(&mut self, outcomes: Vec<(u64, Outcome)>, ctx: &Ctx) {
        if self.running() {
            self.device_mut().requests_mut().done = outcomes;
            self.process(ctx.ram);
        }
    }

    /// Changes with every reset: requests of another life are forgotten.
    pub fn life(&self) -> u64 {
        self.device().requests().life
    }

    /// Requests that are out.
    pub fn out(&self) -> usize {
        self.device().requests().len()
    }
}

/// Saved state.
pub mod state {
    use serde::{Deserialize, Serialize};

    use super::super::queue;

    /// A request that is out.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Out {
        /// Its queue.
        pub queue: u16,
        /// Its buffers; what it asks for stands in them.
        pub chain: queue::ChainV1,
    }
}
