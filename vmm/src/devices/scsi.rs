//! SCSI logical units: a disk (SPC-4, SBC-3) and a CD-ROM drive (SPC-4, MMC-6). Pure: commands go in, [`Reply`]s come out.
//!
//! ```text
//!  CDB, parameter list ─► Unit::command ─► Data: done, this is for the initiator
//!                             │          ─► Check: not done, and why                    (sense.rs)
//!                             │          ─► Do: storage has to read, write, flush …
//!                             ├─ every unit's: INQUIRY, MODE SENSE, what is supported … (primary.rs)
//!                             ├─ a disk's: READ, WRITE, UNMAP, WRITE SAME …             (disk.rs)
//!                             └─ a drive's: tray, TOC, medium events …                  (cdrom.rs)
//! ```
//! A unit knows no transport: [`super::virtio::scsi`] brings commands and carries away the answers.
//!
//! Which commands there are stands in one table ([`cdb::COMMANDS`]); the unit refuses the others, and reports the table when it is asked. Not
//! there: reservations, ordered tasks, protection information, READ CD and audio, writing to optical media.

use serde::{Deserialize, Serialize};

pub mod cdb;
mod cdrom;
mod disk;
mod primary;
pub mod sense;
#[cfg(test)]
mod tests;

use cdb::{COMMANDS, Cdb, Of, op};
pub use cdrom::Refused;
pub use sense::{Attention, Sense};

/// Bytes in a disk's block.
pub const DISK_BLOCK: u64 = 512;
/// Bytes in a block of a CD or DVD.
pub const CD_BLOCK: u64 = 2048;
/// Most blocks that one WRITE SAME writes.
pub const WRITE_SAME_BLOCKS: u64 = 1 << 16;
/// Most descriptors in one UNMAP, and most blocks in all of them.
pub const UNMAP_RANGES: usize = 16;
/// See [`UNMAP_RANGES`].
pub const UNMAP_BLOCKS: u64 = 1 << 22;
/// Longest parameter list that a command brings.
pub const PARAMETER_BYTES: usize = 8 + 16 * UNMAP_RANGES;

/// What storage has to do. All of it is on the unit's medium, and may be done there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Read for the initiator.
    Read {
        /// First byte.
        at: u64,
        /// How many.
        len: u64,
    },
    /// Write what the initiator sends.
    Write {
        /// First byte.
        at: u64,
        /// How many.
        len: u64,
        /// It is done when it is durable (FUA).
        durable: bool,
    },
    /// Read, and perhaps compare with what the initiator sends.
    Verify {
        /// First byte.
        at: u64,
        /// How many.
        len: u64,
        /// Compare.
        compare: bool,
    },
    /// Make durable what was written.
    Flush,
    /// Write a block again and again.
    Fill {
        /// First byte.
        at: u64,
        /// How many in all.
        len: u64,
        /// The block.
        block: Vec<u8>,
    },
    /// These runs of blocks (first, how many) read as zeroes afterwards.
    Zero {
        /// They.
        runs: Vec<(u64, u64)>,
        /// Their storage may be given back.
        unmap: bool,
    },
}

/// What becomes of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// GOOD, with this data, not longer than the CDB allows.
    Data(Vec<u8>),
    /// CHECK CONDITION.
    Check(Sense),
    /// Storage has to do something first.
    Do(Work),
}

/// What lies in a drive, so that another node can find the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Medium {
    /// Its file.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// A digest of what tells it from others.
    pub identity: u64,
}

/// What happened to a drive's medium since GET EVENT STATUS NOTIFICATION was last asked (MMC-6, table 281).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MediaEvent {
    /// Nothing.
    None,
    /// Somebody wants it out: the initiator may release and eject it.
    EjectRequest,
    /// There is another one.
    New,
    /// It went.
    Removal,
}

/// A CD-ROM drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    medium: Option<Medium>,
    open: bool,
    locked: bool,
    event: MediaEvent,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Class {
    Disk { read_only: bool, blocks: u64 },
    Cdrom(Drive),
}

/// A logical unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    name: String,
    class: Class,
    /// Set of [`Attention`]s that the initiator has not been told.
    attentions: u8,
}

impl Unit {
    /// A disk of no blocks yet.
    #[must_use]
    pub fn disk(name: &str, read_only: bool) -> Self {
        Self::new(name, Class::Disk { read_only, blocks: 0 })
    }

    /// An empty drive.
    #[must_use]
    pub fn cdrom(name: &str) -> Self {
        Self::new(name, Class::Cdrom(Drive { medium: None, open: false, locked: false, event: MediaEvent::None }))
    }

    fn new(name: &str, class: Class) -> Self {
        Self { name: name.to_owned(), class, attentions: Attention::PowerOn as u8 }
    }

    /// Its name, which is its serial number.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Power was switched on, or the machine was reset. What lies in a drive stays there.
    pub fn power_on(&mut self) {
        self.attentions = Attention::PowerOn as u8;
        if let Class::Cdrom(drive) = &mut self.class {
            (drive.open, drive.locked, drive.event) = (false, false, MediaEvent::None);
        }
    }

    /// LOGICAL UNIT RESET (SAM-5, 6.3.3).
    pub fn reset(&mut self) {
        self.attend(Attention::Reset);
        if let Class::Cdrom(drive) = &mut self.class {
            drive.locked = false;
        }
    }

    /// The initiator is told of this with its next command.
    fn attend(&mut self, attention: Attention) {
        self.attentions |= attention as u8;
    }

    /// Blocks that can be read now.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        match &self.class {
            Class::Disk { blocks, .. } => *blocks,
            Class::Cdrom(drive) => drive.present().map_or(0, |medium| medium.bytes / CD_BLOCK),
        }
    }

    /// Bytes in a block.
    #[must_use]
    pub fn block(&self) -> u64 {
        if let Class::Disk { .. } = self.class { DISK_BLOCK } else { CD_BLOCK }
    }

    /// A disk has so many blocks. Says what the initiator is to be told: nothing where it never saw another size.
    pub fn set_blocks(&mut self, to: u64) -> Option<Attention> {
        let Class::Disk { blocks, .. } = &mut self.class else { return None };
        let was = std::mem::replace(blocks, to);
        if was == to || was == 0 {
            return None;
        }
        self.attend(Attention::Capacity);
        Some(Attention::Capacity)
    }

    /// Bytes of parameter list that [`Unit::command`] needs of this command.
    #[must_use]
    pub fn parameters(&self, cdb: &[u8]) -> usize {
        let cdb = Cdb(cdb);
        match (&self.class, cdb.opcode()) {
            (Class::Disk { .. }, op::UNMAP) => (cdb.number(7, 2) as usize).min(PARAMETER_BYTES),
            (Class::Disk { .. }, op::WRITE_SAME_10) => DISK_BLOCK as usize,
            (Class::Disk { .. }, op::WRITE_SAME_16) if !cdb.bit(1, 1) => DISK_BLOCK as usize,
            _ => 0,
        }
    }

    /// The initiator sends a command, with as much of a parameter list as there is.
    pub fn command(&mut self, cdb: &[u8], parameters: &[u8]) -> Reply {
        let cdb = Cdb(cdb);
        let opcode = cdb.opcode();
        // These tell of what happened by themselves, or have nothing to do with it (SPC-4, 5.14; MMC-6, 4.1.6.1).
        let spared = [op::INQUIRY, op::REPORT_LUNS, op::REQUEST_SENSE, op::GET_EVENT_STATUS, op::GET_CONFIGURATION];
        if !spared.contains(&opcode)
            && let Some(sense) = self.take_attention()
        {
            return Reply::Check(sense);
        }
        let mut known = COMMANDS.iter().filter(|entry| entry.opcode == opcode && self.has(entry.of)).peekable();
        if known.peek().is_none() {
            return Reply::Check(Sense::INVALID_OPCODE);
        }
        if !known.any(|entry| entry.action.is_none_or(|action| action == cdb.byte(1) & 0x1f)) {
            return Reply::Check(Sense::INVALID_FIELD);
        }
        let reply = match self.primary(cdb) {
            Some(reply) => reply,
            None => match &mut self.class {
                Class::Disk { read_only, blocks } => disk::command(cdb, parameters, *read_only, *blocks),
                Class::Cdrom(_) => self.cdrom_command(cdb),
            },
        };
        reply.unwrap_or_else(Reply::Check)
    }

    /// A command for a logical unit of this unit's target that does not exist (SPC-4, 6.6.2, 6.33; SAM-5, 5.12).
    #[must_use]
    pub fn absent(cdb: &[u8]) -> Reply {
        primary::absent(Cdb(cdb)).unwrap_or_else(Reply::Check)
    }

    fn has(&self, of: Of) -> bool {
        match of {
            Of::All => true,
            Of::Disk => matches!(self.class, Class::Disk { .. }),
            Of::Cdrom => matches!(self.class, Class::Cdrom(_)),
        }
    }

    fn take_attention(&mut self) -> Option<Sense> {
        let first = Attention::ALL.into_iter().find(|a| self.attentions & *a as u8 != 0)?;
        self.attentions &= !(first as u8);
        // Power on tells all that came before it.
        if first == Attention::PowerOn {
            self.attentions &= !(Attention::Reset as u8);
        }
        Some(first.sense())
    }
}

/// At most as much as the CDB allows.
fn limited(mut data: Vec<u8>, allocation: u64) -> Result<Reply, Sense> {
    data.truncate(usize::try_from(allocation).unwrap_or(usize::MAX));
    Ok(Reply::Data(data))
}

/// Where a run of blocks is in bytes, if it is on a medium of so many blocks and not longer than one command may be.
fn span(first: u64, blocks: u64, medium: u64, block: u64) -> Result<(u64, u64), Sense> {
    if first.checked_add(blocks).is_none_or(|end| end > medium) {
        return Err(Sense::OUT_OF_RANGE);
    }
    // A medium's bytes can be counted.
    match (first.checked_mul(block), blocks.checked_mul(block)) {
        (Some(at), Some(len)) => Ok((at, len)),
        _ => Err(Sense::OUT_OF_RANGE),
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, MediaEvent, Medium, Serialize};

    /// A drive, version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[allow(missing_docs)]
    pub struct DriveV1 {
        pub medium: Option<Medium>,
        pub open: bool,
        pub locked: bool,
        pub event: MediaEvent,
    }

    /// A unit, version 1; part of its controller's.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Its name.
        pub name: String,
        /// A disk's blocks; 0 of a drive.
        pub blocks: u64,
        /// What the initiator has not been told.
        pub attentions: u8,
        /// Present if it is a drive.
        pub drive: Option<DriveV1>,
    }
}

impl Unit {
    /// For a saved state.
    #[must_use]
    pub fn save(&self) -> state::V1 {
        let Self { name, class, attentions } = self;
        let (blocks, drive) = match class {
            Class::Disk { read_only: _, blocks } => (*blocks, None),
            Class::Cdrom(Drive { medium, open, locked, event }) => {
                (0, Some(state::DriveV1 { medium: medium.clone(), open: *open, locked: *locked, event: *event }))
            }
        };
        state::V1 { name: name.clone(), blocks, attentions: *attentions, drive }
    }

    /// Become what was saved; the sentence says why that cannot be.
    ///
    /// # Errors
    /// It is another unit, or was never like this.
    pub fn restore(&mut self, saved: state::V1) -> Result<(), String> {
        let state::V1 { name, blocks, attentions, drive } = saved;
        if name != self.name {
            return Err(format!(
                "its unit {name:?} is {:?} here: give both machines the same disks and drives",
                self.name
            ));
        }
        let all = Attention::ALL.into_iter().fold(0, |all, a| all | a as u8);
        if attentions & !all != 0 {
            return Err(format!("{name} has attentions that do not exist"));
        }
        match (&mut self.class, drive) {
            (Class::Disk { blocks: here, .. }, None) if blocks.checked_mul(DISK_BLOCK).is_some() => *here = blocks,
            (Class::Cdrom(here), Some(drive)) => {
                let state::DriveV1 { medium, open, locked, event } = drive;
                if medium.as_ref().is_some_and(|medium| !whole(medium.bytes)) {
                    return Err(format!("what lies in {name} has no size that a CD can have"));
                }
                *here = Drive { medium, open, locked, event };
            }
            _ => return Err(format!("{name} is a disk on one machine and a drive on the other, or has no size")),
        }
        self.attentions = attentions;
        Ok(())
    }
}

/// Whether a medium can have so many bytes.
#[must_use]
pub fn whole(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(CD_BLOCK) && bytes / CD_BLOCK <= u64::from(u32::MAX)
}
