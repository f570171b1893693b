//! virtio-scsi, a SCSI host controller (virtio 1.2, 5.6): a control queue, an event queue, several queues of commands; each target has one logical
//! unit ([`crate::devices::scsi`]): a disk or a CD-ROM drive.
//!
//! ```text
//!  request queues ─► header, CDB ─► Unit::command ─► answered at once, or out (super::requests)
//!  control queue  ─► task management: answered when the tasks that it concerns have ended
//!  event queue    ◄─ capacity changed, medium changed
//! ```
//! **Task management.** A task that storage is at cannot be called back, and data may still be written while it lasts. So ABORT TASK, LOGICAL UNIT
//! RESET and the like wait until the tasks have ended by themselves, answer these (`ABORTED`, `RESET`), and then themselves: whoever hears that
//! a task was aborted knows that it does nothing any more. While they wait they are part of the saved state, behind the tasks.
//!
//! A medium that is taken out while it is read ends the reads at once: nothing is lost by a read.
//!
//! Not offered: T10 protection information, bidirectional commands, hot plug of units (the feature is, because Linux listens to events only
//! then). Task attributes other than SIMPLE are refused.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_scsi as spec;

use super::super::scsi::{self, Attention, Medium, Reply, Sense, Unit, Work};
use super::super::{Ctx, GuestRam, RestoreError, Snapshot};
use super::queue::Segment;
use super::requests::{
    self, Disks, Kind, OUT_MAX, Out, Outcome, QUEUE_SIZE, REQUEST_BYTES, Range, Requests, SECTOR, SEGMENTS,
};
use super::{Broken, Chain, Progress, VirtQueue, VirtioDevice, VirtioPci};

pub use super::super::scsi::state as unit_state;

/// Most queues of commands.
pub const MAX_QUEUES: u16 = 32;
/// Most targets.
pub const MAX_TARGETS: usize = 32;
const CONTROL: u16 = 0;
const EVENTS: usize = 1;
/// The first queue of commands.
const FIRST: u16 = 2;
/// Size of the control queue and of the event queue.
const SMALL_QUEUE: u16 = 16;
const SIZES: &[u16] = &{
    let mut sizes = [QUEUE_SIZE; (FIRST + MAX_QUEUES) as usize];
    sizes[0] = SMALL_QUEUE;
    sizes[1] = SMALL_QUEUE;
    sizes
};

/// Before the CDB: LUN, tag, attribute, priority, CRN.
const HEADER: usize = 19;
/// Before the sense data: its length, residual, qualifier, status, response.
const RESPONSE: usize = 12;
/// A task management request, and an asynchronous notification request.
const TASK: usize = 24;
const NOTIFICATION: usize = 16;
const EVENT: usize = 16;
/// Most events that wait for the driver's buffers. More are missed, and the driver is told so.
const EVENTS_MAX: usize = 16;
/// Largest CDB and sense data that a driver can choose.
const CDB_MAX: u32 = 256;
const SENSE_MAX: u32 = 256;

const GOOD: u8 = 0;
const CHECK_CONDITION: u8 = 2;
const OK: u8 = spec::VIRTIO_SCSI_S_OK as u8;

/// What follows when storage has done its part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// What was read is for the initiator.
    Read,
    /// So many bytes were written for the initiator.
    Written(usize),
    /// What was read is compared with what the initiator sent, or is of no interest.
    Verify { compare: bool },
}

/// A command that is out.
#[derive(Debug)]
pub struct Command {
    unit: usize,
    tag: u64,
    after: After,
    /// It was aborted: how it is answered.
    ended: Option<u8>,
}

/// Task management that waits for tasks to end.
#[derive(Debug)]
struct Task {
    chain: Chain,
    waits: BTreeSet<u64>,
    /// The unit that is reset then.
    resets: Option<usize>,
}

/// Something that the driver is to hear (5.6.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub event: u32,
    /// Of which unit.
    pub lun: [u8; 8],
    /// Why.
    pub reason: u32,
}

/// The controller.
#[derive(Debug)]
pub struct Scsi {
    queues: u16,
    units: Vec<Unit>,
    sense_size: u32,
    cdb_size: u32,
    /// The driver wants to hear of changes.
    hears: bool,
    requests: Requests<Command>,
    tasks: Vec<Task>,
    events: VecDeque<Event>,
    missed: bool,
    /// Units whose medium went; only within a call.
    gone: Vec<usize>,
}

/// Where a request goes.
enum Address {
    Unit(usize),
    /// The target is there, the logical unit is not.
    NoUnit,
    NoTarget,
}

impl Scsi {
    /// A controller with these units, each a target of its own: the first is target 0.
    #[must_use]
    pub fn new(queues: u16, mut units: Vec<Unit>) -> Self {
        units.truncate(MAX_TARGETS);
        Self {
            queues: queues.clamp(1, MAX_QUEUES),
            units,
            sense_size: spec::VIRTIO_SCSI_SENSE_DEFAULT_SIZE,
            cdb_size: spec::VIRTIO_SCSI_CDB_DEFAULT_SIZE,
            hears: false,
            requests: Requests::default(),
            tasks: Vec::new(),
            events: VecDeque::new(),
            missed: false,
            gone: Vec::new(),
        }
    }

    /// Its units, by target.
    #[must_use]
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// 5.6.6.1: first byte 1, target, then a logical unit in flat addressing.
    fn address(&self, lun: &[u8]) -> Address {
        match *lun {
            [1, target, high, low, 0, 0, 0, 0] if usize::from(target) < self.units.len() => match (high, low) {
                (0x00 | 0x40, 0) => Address::Unit(target.into()),
                _ => Address::NoUnit,
            },
            [1, target, ..] if usize::from(target) < self.units.len() => Address::NoUnit,
            _ => Address::NoTarget,
        }
    }

    fn sense_bytes(&self) -> usize {
        self.sense_size as usize
    }

    /// Bytes that the driver has room for.
    fn room(&self, chain: &Chain) -> usize {
        chain.writable_len().saturating_sub(RESPONSE + self.sense_bytes())
    }

    fn command(&mut self, at: u16, chain: Chain, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        let head = HEADER + self.cdb_size as usize;
        let Some(sent) = chain.readable_len().checked_sub(head) else {
            return Err(Broken("a command that is shorter than its header"));
        };
        if chain.writable_len() < RESPONSE + self.sense_bytes() {
            return Err(Broken("a command without room for its response"));
        }
        let room = self.room(&chain);
        let mut header = Vec::with_capacity(head);
        chain.read(ram, 0, head, &mut header)?;
        let (lun, cdb) = (&header[..8], &header[HEADER..]);
        let tag = u64::from_le_bytes(std::array::from_fn(|i| header[8 + i]));
        let answer = Answer { chain: &chain, sense_size: self.sense_bytes(), buffer: sent.max(room) };
        let target = self.address(lun);
        let queue = queue(queues, at)?;
        if sent > 0 && room > 0 {
            // Bidirectional commands were not offered.
            return answer.response(queue, ram, spec::VIRTIO_SCSI_S_FAILURE);
        }
        let reply = match target {
            Address::NoTarget => return answer.response(queue, ram, spec::VIRTIO_SCSI_S_BAD_TARGET),
            _ if u32::from(header[16]) != spec::VIRTIO_SCSI_S_SIMPLE => Reply::Check(Sense::INVALID_ATTRIBUTE),
            Address::NoUnit => Unit::absent(cdb),
            Address::Unit(unit) => {
                let wanted = self.units[unit].parameters(cdb).min(sent);
                let mut parameters = Vec::with_capacity(wanted);
                chain.read(ram, head, wanted, &mut parameters)?;
                let was = self.units[unit].blocks();
                let reply = self.units[unit].command(cdb, &parameters);
                if self.units[unit].blocks() < was {
                    self.gone.push(unit);
                }
                reply
            }
        };
        let (work, Address::Unit(unit)) = (
            match reply {
                Reply::Data(data) if data.len() > room => {
                    return answer.response(queue, ram, spec::VIRTIO_SCSI_S_OVERRUN);
                }
                Reply::Data(data) => {
                    let moved = if sent > 0 { self.units_parameters(&target, cdb).min(sent) } else { data.len() };
                    return answer.good(queue, ram, &data, moved);
                }
                Reply::Check(sense) => return answer.check(queue, ram, sense),
                Reply::Do(work) => work,
            },
            target,
        ) else {
            return answer.check(queue, ram, Sense::NO_UNIT);
        };
        let runs = |len| chain.readable_runs(head, len).map(Segment::into).collect();
        let (needs, kind, after) = match work {
            // Not longer than REQUEST_BYTES.
            Work::Read { at, len } => (Way::In(len), Kind::Read { at, len: len as usize }, After::Read),
            Work::Write { at, len, durable } => {
                let len = len as usize;
                (Way::Out(len), Kind::Write { at, from: runs(len), durable }, After::Written(len))
            }
            Work::Verify { at, len, compare } => {
                let way = Way::Out(if compare { len as usize } else { 0 });
                (way, Kind::Read { at, len: len as usize }, After::Verify { compare })
            }
            Work::Flush => (Way::Out(0), Kind::Flush, After::Written(0)),
            Work::Fill { at, len, block } => {
                let moved = block.len();
                (Way::Out(moved), Kind::Fill { at, len, pattern: block }, After::Written(moved))
            }
            Work::Zero { runs, unmap } => {
                let per_block = self.units[unit].block() / SECTOR;
                let range = |(first, number): (u64, u64)| Range {
                    sector: first * per_block,
                    // Bounded by UNMAP_BLOCKS and WRITE_SAME_BLOCKS.
                    sectors: (number * per_block) as u32,
                    unmap,
                };
                let ranges = runs.into_iter().map(range).collect();
                let kind = if unmap { Kind::Discard(ranges) } else { Kind::WriteZeroes(ranges) };
                (Way::Out(0), kind, After::Written(self.units[unit].parameters(cdb).min(sent)))
            }
        };
        let fits = match needs {
            Way::In(len) => len <= room as u64,
            Way::Out(len) => len <= sent,
        };
        if !fits {
            return answer.response(queue, ram, spec::VIRTIO_SCSI_S_OVERRUN);
        }
        self.requests.give(at, chain, unit, kind, Command { unit, tag, after, ended: None });
        Ok(())
    }

    fn units_parameters(&self, target: &Address, cdb: &[u8]) -> usize {
        if let Address::Unit(unit) = target { self.units[*unit].parameters(cdb) } else { 0 }
    }

    /// 5.6.6.2.
    fn control(&mut self, chain: Chain, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        let mut request = Vec::with_capacity(TASK);
        chain.read(ram, 0, TASK, &mut request)?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| request.get(at + i).copied().unwrap_or(0)));
        let control = queue(queues, CONTROL)?;
        match word(0) {
            spec::VIRTIO_SCSI_T_TMF if request.len() == TASK && chain.writable_len() >= 1 => {}
            spec::VIRTIO_SCSI_T_AN_QUERY | spec::VIRTIO_SCSI_T_AN_SUBSCRIBE
                if request.len() >= NOTIFICATION && chain.writable_len() >= 5 =>
            {
                // There are none.
                chain.write(ram, &[0, 0, 0, 0, OK])?;
                return control.complete(ram, &chain, 5);
            }
            _ => return Err(Broken("a control request that is none")),
        }
        let unit = match self.address(&request[8..16]) {
            Address::Unit(unit) => unit,
            Address::NoUnit => return tell(control, ram, &chain, spec::VIRTIO_SCSI_S_INCORRECT_LUN),
            Address::NoTarget => return tell(control, ram, &chain, spec::VIRTIO_SCSI_S_BAD_TARGET),
        };
        let tag = u64::from_le_bytes(std::array::from_fn(|i| request[16 + i]));
        let what = word(4);
        let one = matches!(what, spec::VIRTIO_SCSI_T_TMF_ABORT_TASK | spec::VIRTIO_SCSI_T_TMF_QUERY_TASK);
        let concerned =
            self.requests.out.iter_mut().filter(|(_, out)| out.what.unit == unit && (!one || out.what.tag == tag));
        let (how, resets) = match what {
            spec::VIRTIO_SCSI_T_TMF_QUERY_TASK | spec::VIRTIO_SCSI_T_TMF_QUERY_TASK_SET => {
                let any = concerned.count() > 0;
                let found = if any { spec::VIRTIO_SCSI_S_FUNCTION_SUCCEEDED } else { spec::VIRTIO_SCSI_S_OK };
                return tell(control, ram, &chain, found);
            }
            spec::VIRTIO_SCSI_T_TMF_ABORT_TASK
            | spec::VIRTIO_SCSI_T_TMF_ABORT_TASK_SET
            | spec::VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET => (spec::VIRTIO_SCSI_S_ABORTED, None),
            spec::VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET | spec::VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET => {
                (spec::VIRTIO_SCSI_S_RESET, Some(unit))
            }
            _ => return tell(control, ram, &chain, spec::VIRTIO_SCSI_S_FUNCTION_REJECTED),
        };
        let mut waits = BTreeSet::new();
        for (id, out) in concerned {
            // Who came first says how it ends.
            out.what.ended.get_or_insert(how as u8);
            waits.insert(*id);
        }
        if self.tasks.len() >= usize::from(control.size()) {
            return Err(Broken("more requests are under way than the queue can hold"));
        }
        self.tasks.push(Task { chain, waits, resets });
        self.end_tasks(queues, ram)
    }

    /// Answer the task management whose tasks have ended.
    fn end_tasks(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        for task in self.tasks.extract_if(.., |task| task.waits.is_empty()) {
            if let Some(unit) = task.resets {
                self.units[unit].reset();
            }
            tell(queue(queues, CONTROL)?, ram, &task.chain, spec::VIRTIO_SCSI_S_OK)?;
        }
        Ok(())
    }

    /// This command has been answered.
    fn answered(&mut self, id: u64, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        if self.tasks.is_empty() {
            return Ok(());
        }
        for task in &mut self.tasks {
            task.waits.remove(&id);
        }
        self.end_tasks(queues, ram)
    }

    /// The medium of this unit went: nothing more comes from it.
    fn end_reads(&mut self, unit: usize, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        let sense = match self.units[unit].tray() {
            Some((_, true)) => Sense::TRAY_OPEN,
            _ if self.units[unit].medium().is_none() => Sense::NO_MEDIUM,
            _ => Attention::Medium.sense(),
        };
        let ids: Vec<u64> =
            self.requests.out.iter().filter(|(_, out)| out.what.unit == unit).map(|(id, _)| *id).collect();
        for id in ids {
            let Some(out) = self.requests.recall(id) else { continue };
            let sent = out.chain.readable_len().saturating_sub(HEADER + self.cdb_size as usize);
            let buffer = sent.max(self.room(&out.chain));
            let answer = Answer { chain: &out.chain, sense_size: self.sense_bytes(), buffer };
            let queue = queue(queues, out.queue)?;
            match out.what.ended {
                Some(how) => answer.response(queue, ram, how.into())?,
                None => answer.check(queue, ram, sense)?,
            }
            self.answered(id, queues, ram)?;
        }
        Ok(())
    }

    /// The driver is to hear of a change (5.6.6.3, parameter change).
    fn tell_change(&mut self, unit: usize, attention: Attention) {
        if !self.hears {
            return;
        }
        if self.events.len() >= EVENTS_MAX {
            self.missed = true;
            return;
        }
        let (asc, ascq) = attention.codes();
        // There are at most MAX_TARGETS. (Not in flat addressing: Linux takes its 0x40 for a part of the number here.)
        let lun = [1, unit as u8, 0, 0, 0, 0, 0, 0];
        let reason = u32::from(asc) | u32::from(ascq) << 8;
        self.events.push_back(Event { event: spec::VIRTIO_SCSI_T_PARAM_CHANGE, lun, reason });
    }

    fn send_events(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        let Some(queue) = queues.get_mut(EVENTS) else { return Ok(()) };
        while self.missed || !self.events.is_empty() {
            let Some(chain) = queue.next_chain(ram)? else { break };
            if chain.writable_len() < EVENT {
                return Err(Broken("a buffer for events that holds none"));
            }
            let none = Event { event: spec::VIRTIO_SCSI_T_NO_EVENT, lun: [0; 8], reason: 0 };
            let Event { event, lun, reason } = self.events.pop_front().unwrap_or(none);
            let missed = if std::mem::take(&mut self.missed) { spec::VIRTIO_SCSI_T_EVENTS_MISSED } else { 0 };
            let bytes = [&(event | missed).to_le_bytes()[..], &lun, &reason.to_le_bytes()].concat();
            chain.write(ram, &bytes)?;
            queue.complete(ram, &chain, EVENT)?;
        }
        Ok(())
    }
}

/// Data that storage needs, or has.
enum Way {
    In(u64),
    Out(usize),
}

fn queue(queues: &mut [VirtQueue], at: u16) -> Result<&mut VirtQueue, Broken> {
    queues.get_mut(usize::from(at)).ok_or(Broken("a request of a queue that is not there"))
}

/// Answer a control request.
fn tell(queue: &mut VirtQueue, ram: &GuestRam, chain: &Chain, response: u32) -> Result<(), Broken> {
    chain.write(ram, &[response as u8])?;
    queue.complete(ram, chain, 1)
}

/// A command's answer (5.6.6.1): response, sense, data, in this order.
struct Answer<'a> {
    chain: &'a Chain,
    sense_size: usize,
    /// Bytes of data that the driver has sent or has room for.
    buffer: usize,
}

impl Answer<'_> {
    fn write(
        &self,
        queue: &mut VirtQueue,
        ram: &GuestRam,
        (status, response): (u8, u32),
        sense: &[u8],
        data: &[u8],
        moved: usize,
    ) -> Result<(), Broken> {
        let residual = u32::try_from(self.buffer.saturating_sub(moved)).unwrap_or(u32::MAX);
        let sense = &sense[..sense.len().min(self.sense_size)];
        let mut head = Vec::with_capacity(RESPONSE + sense.len());
        head.extend((sense.len() as u32).to_le_bytes());
        head.extend(residual.to_le_bytes());
        // No status qualifier.
        head.extend([0, 0, status, response as u8]);
        head.extend(sense);
        let front = RESPONSE + self.sense_size;
        self.chain.write_at(ram, front, data)?;
        self.chain.write(ram, &head)?;
        queue.complete(ram, self.chain, (front + data.len()).min(self.chain.writable_len()))
    }

    /// No answer of a unit.
    fn response(&self, queue: &mut VirtQueue, ram: &GuestRam, response: u32) -> Result<(), Broken> {
        self.write(queue, ram, (GOOD, response), &[], &[], 0)
    }

    fn good(&self, queue: &mut VirtQueue, ram: &GuestRam, data: &[u8], moved: usize) -> Result<(), Broken> {
        self.write(queue, ram, (GOOD, spec::VIRTIO_SCSI_S_OK), &[], data, moved)
    }

    fn check(&self, queue: &mut VirtQueue, ram: &GuestRam, sense: Sense) -> Result<(), Broken> {
        self.write(queue, ram, (CHECK_CONDITION, spec::VIRTIO_SCSI_S_OK), &sense.bytes(), &[], 0)
    }
}

impl Disks for Scsi {
    type What = Command;

    fn requests(&self) -> &Requests<Command> {
        &self.requests
    }

    fn requests_mut(&mut self) -> &mut Requests<Command> {
        &mut self.requests
    }

    fn asks(&self, queue: usize) -> bool {
        queue != EVENTS
    }

    fn enter(&mut self, at: u16, chain: Chain, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<(), Broken> {
        match at {
            CONTROL => self.control(chain, queues, ram),
            at if usize::from(at) == EVENTS => Err(Broken("a request in the event queue")),
            at => {
                self.requests.admit(at, queue(queues, at)?)?;
                self.command(at, chain, queues, ram)?;
                while let Some(unit) = self.gone.pop() {
                    self.end_reads(unit, queues, ram)?;
                }
                Ok(())
            }
        }
    }

    fn finish(
        &mut self,
        id: u64,
        out: Out<Command>,
        outcome: Outcome,
        queues: &mut [VirtQueue],
        ram: &GuestRam,
    ) -> Result<(), Broken> {
        let Out { queue: at, chain, reads, what } = out;
        let head = HEADER + self.cdb_size as usize;
        let sent = chain.readable_len().saturating_sub(head);
        let answer = Answer { chain: &chain, sense_size: self.sense_bytes(), buffer: sent.max(self.room(&chain)) };
        let queue = queue(queues, at)?;
        match (what.ended, outcome, what.after) {
            (Some(how), ..) => answer.response(queue, ram, how.into())?,
            (None, Outcome::Done(data), After::Read) if data.len() == reads => {
                answer.good(queue, ram, &data, data.len())?;
            }
            (None, Outcome::Done(data), After::Verify { compare }) if data.len() == reads => {
                let mut theirs = Vec::new();
                if compare {
                    chain.read(ram, head, reads, &mut theirs)?;
                }
                if compare && theirs != data {
                    answer.check(queue, ram, Sense::MISCOMPARE)?;
                } else {
                    answer.good(queue, ram, &[], theirs.len())?;
                }
            }
            (None, Outcome::Done(_), After::Written(moved)) => answer.good(queue, ram, &[], moved)?,
            (None, _, After::Written(_)) => answer.check(queue, ram, Sense::WRITE_ERROR)?,
            (None, _, _) => answer.check(queue, ram, Sense::READ_ERROR)?,
        }
        self.answered(id, queues, ram)
    }
}

impl VirtioDevice for Scsi {
    const DEVICE_ID: u16 = 8;
    const PCI_CLASS: u32 = 0x01_00_00;
    const QUEUE_SIZES: &'static [u16] = SIZES;

    fn queue_sizes(&self) -> &[u16] {
        &SIZES[..usize::from(FIRST + self.queues)]
    }

    fn features(&self) -> u64 {
        1 << spec::VIRTIO_SCSI_F_HOTPLUG | 1 << spec::VIRTIO_SCSI_F_CHANGE
    }

    fn agreed(&mut self, features: u64) {
        self.hears = features & 1 << spec::VIRTIO_SCSI_F_CHANGE != 0;
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let last_target = u16::try_from(self.units.len().saturating_sub(1)).unwrap_or(u16::MAX);
        let words = [
            u32::from(self.queues),
            SEGMENTS,
            // Bounded by the largest request.
            (REQUEST_BYTES / SECTOR) as u32,
            u32::from(QUEUE_SIZE),
            EVENT as u32,
            self.sense_size,
            self.cdb_size,
            // One channel, so many targets, one logical unit each.
            u32::from(last_target) << 16,
            0,
        ];
        let image = words.map(u32::to_le_bytes).concat();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).ok().and_then(|at| at.checked_add(i));
            *byte = at.and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        match offset {
            20 if value <= SENSE_MAX => self.sense_size = value,
            24 if (1..=CDB_MAX).contains(&value) => self.cdb_size = value,
            _ => {}
        }
    }

    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        for unit in std::mem::take(&mut self.gone) {
            self.end_reads(unit, queues, ram)?;
        }
        let progress = requests::work(self, queues, ram)?;
        self.send_events(queues, ram)?;
        Ok(progress)
    }

    fn reset(&mut self) {
        self.requests.forget();
        self.tasks.clear();
        self.events.clear();
        (self.missed, self.hears) = (false, false);
        self.gone.clear();
        self.sense_size = spec::VIRTIO_SCSI_SENSE_DEFAULT_SIZE;
        self.cdb_size = spec::VIRTIO_SCSI_CDB_DEFAULT_SIZE;
        self.units.iter_mut().for_each(Unit::power_on);
    }
}

impl VirtioPci<Scsi> {
    /// A disk has so many sectors; a driver that is at work is told.
    pub fn set_sectors(&mut self, unit: usize, sectors: u64, ctx: &Ctx) {
        let running = self.running();
        let device = self.device_mut();
        let Some(target) = device.units.get_mut(unit) else { return };
        let blocks = sectors / (target.block() / SECTOR);
        if let Some(attention) = target.set_blocks(blocks)
            && running
        {
            device.tell_change(unit, attention);
            self.process(ctx.ram);
        }
    }

    /// What lies in a drive when the machine begins to run: nobody is told.
    pub fn load_medium(&mut self, unit: usize, medium: Option<Medium>) {
        if let Some(unit) = self.device_mut().units.get_mut(unit) {
            unit.load_medium(medium);
        }
    }

    /// Somebody at the drive takes the medium out or puts one in; a driver that is at work is told.
    ///
    /// # Errors
    /// The guest has locked it.
    pub fn change_medium(
        &mut self,
        unit: usize,
        medium: Option<Medium>,
        force: bool,
        ctx: &Ctx,
    ) -> Result<(), scsi::Refused> {
        let running = self.running();
        let device = self.device_mut();
        let target = device.units.get_mut(unit).ok_or(scsi::Refused::NoDrive)?;
        target.change_medium(medium, force)?;
        if running {
            device.gone.push(unit);
            device.tell_change(unit, Attention::Medium);
            self.process(ctx.ram);
        }
        Ok(())
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Event, Serialize, unit_state};

    pub use super::requests::state::Out;

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// As the driver chose them.
        pub sense_size: u32,
        /// See `sense_size`.
        pub cdb_size: u32,
        /// By target.
        pub units: Vec<unit_state::V1>,
        /// What the driver has not heard.
        pub events: Vec<Event>,
        /// It has missed some.
        pub missed: bool,
        /// Commands that are out, oldest first, then task management that waits.
        pub out: Vec<Out>,
    }
}

impl Snapshot for Scsi {
    const KIND: &'static str = "virtio-scsi";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self {
            queues: _, // configuration
            units,
            sense_size,
            cdb_size,
            hears: _, // from the features, which the transport has
            requests,
            tasks,
            events,
            missed,
            gone: _, // empty between calls
        } = self;
        let mut out = requests.save();
        // What they wait for is found again when they come in again, behind it.
        out.extend(tasks.iter().map(|task| state::Out { queue: CONTROL, chain: task.chain.save() }));
        state::V1 {
            sense_size: *sense_size,
            cdb_size: *cdb_size,
            units: units.iter().map(Unit::save).collect(),
            events: events.iter().copied().collect(),
            missed: *missed,
            out,
        }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { sense_size, cdb_size, units, events, missed, out } = state;
        let invalid = |what: String| RestoreError::invalid(Self::KIND, what);
        if sense_size > SENSE_MAX || !(1..=CDB_MAX).contains(&cdb_size) || events.len() > EVENTS_MAX {
            return Err(invalid("its sizes are none that a driver can choose".into()));
        }
        if units.len() != self.units.len() {
            let (there, here) = (units.len(), self.units.len());
            return Err(invalid(format!("it has {there} disks and drives, and {here} here: give both the same")));
        }
        if out.iter().any(|out| usize::from(out.queue) == EVENTS) {
            return Err(invalid("it has a request in its event queue".into()));
        }
        let most = OUT_MAX + usize::from(SMALL_QUEUE);
        let again = Requests::<Command>::restored(Self::KIND, out, self.queue_sizes(), most)?;
        let hears = self.hears;
        VirtioDevice::reset(self);
        for (unit, saved) in self.units.iter_mut().zip(units) {
            unit.restore(saved).map_err(invalid)?;
        }
        (self.sense_size, self.cdb_size, self.hears) = (sense_size, cdb_size, hears);
        (self.events, self.missed) = (events.into(), missed);
        self.requests.repeat(again);
        Ok(())
    }
}
