//! Command descriptor blocks: which commands there are, how long each is and which of its bits are looked at.
//!
//! The table is what [`super::Unit`] accepts, and what REPORT SUPPORTED OPERATION CODES tells (SPC-4, 6.35).

/// Operation codes (SPC-4, SBC-3, MMC-6).
pub mod op {
    #![allow(missing_docs)]
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const MAINTENANCE_IN: u8 = 0xa3;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const VERIFY_12: u8 = 0xaf;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    /// Of [`SERVICE_ACTION_IN_16`].
    pub const READ_CAPACITY_16: u8 = 0x10;
    /// Of [`MAINTENANCE_IN`].
    pub const REPORT_OPCODES: u8 = 0x0c;
}

/// Whose command it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Every unit's.
    All,
    /// A disk's.
    Disk,
    /// A drive's.
    Cdrom,
}

/// A command.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Operation code.
    pub opcode: u8,
    /// Service action, for operation codes that have some.
    pub action: Option<u8>,
    /// Whose.
    pub of: Of,
    /// CDB usage data: the operation code, then which bits of each byte are looked at.
    pub usage: &'static [u8],
}

const fn plain(of: Of, usage: &'static [u8]) -> Entry {
    Entry { opcode: usage[0], action: None, of, usage }
}

/// All of them.
pub const COMMANDS: &[Entry] = &[
    plain(Of::All, &[op::TEST_UNIT_READY, 0, 0, 0, 0, 0]),
    plain(Of::All, &[op::REQUEST_SENSE, 0x01, 0, 0, 0xff, 0]),
    plain(Of::Disk, &[op::READ_6, 0x1f, 0xff, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::WRITE_6, 0x1f, 0xff, 0xff, 0xff, 0]),
    plain(Of::All, &[op::INQUIRY, 0x01, 0xff, 0xff, 0xff, 0]),
    plain(Of::All, &[op::MODE_SENSE_6, 0x08, 0xff, 0xff, 0xff, 0]),
    plain(Of::All, &[op::START_STOP_UNIT, 0x01, 0, 0x0f, 0xf7, 0]),
    plain(Of::All, &[op::PREVENT_ALLOW, 0, 0, 0, 0x03, 0]),
    plain(Of::All, &[op::READ_CAPACITY_10, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    plain(Of::All, &[op::READ_10, 0xf8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::WRITE_10, 0xf8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::VERIFY_10, 0xf6, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::SYNCHRONIZE_CACHE_10, 0x02, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::WRITE_SAME_10, 0xf8, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::UNMAP, 0x01, 0, 0, 0, 0, 0, 0xff, 0xff, 0]),
    plain(Of::Cdrom, &[op::READ_TOC, 0x02, 0x0f, 0, 0, 0, 0xff, 0xff, 0xff, 0]),
    plain(Of::Cdrom, &[op::GET_CONFIGURATION, 0x03, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0]),
    plain(Of::Cdrom, &[op::GET_EVENT_STATUS, 0x01, 0, 0, 0xff, 0, 0, 0xff, 0xff, 0]),
    plain(Of::Cdrom, &[op::READ_DISC_INFORMATION, 0x07, 0, 0, 0, 0, 0, 0xff, 0xff, 0]),
    plain(Of::All, &[op::MODE_SENSE_10, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0]),
    plain(Of::Disk, &[op::READ_16, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
    plain(
        Of::Disk,
        &[op::WRITE_16, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ),
    plain(
        Of::Disk,
        &[op::VERIFY_16, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ),
    plain(
        Of::Disk,
        &[op::SYNCHRONIZE_CACHE_16, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ),
    plain(
        Of::Disk,
        &[op::WRITE_SAME_16, 0xf9, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    ),
    Entry {
        opcode: op::SERVICE_ACTION_IN_16,
        action: Some(op::READ_CAPACITY_16),
        of: Of::Disk,
        usage: &[op::SERVICE_ACTION_IN_16, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
    },
    plain(Of::All, &[op::REPORT_LUNS, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]),
    Entry {
        opcode: op::MAINTENANCE_IN,
        action: Some(op::REPORT_OPCODES),
        of: Of::All,
        usage: &[op::MAINTENANCE_IN, 0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    },
    plain(Of::All, &[op::READ_12, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
    plain(Of::Disk, &[op::WRITE_12, 0xf8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
    plain(Of::Disk, &[op::VERIFY_12, 0xf6, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
    plain(Of::Cdrom, &[op::MECHANISM_STATUS, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]),
];

/// A command descriptor block. What lies beyond its end reads as zero.
#[derive(Debug, Clone, Copy)]
pub struct Cdb<'a>(pub &'a [u8]);

impl Cdb<'_> {
    /// A byte.
    #[must_use]
    pub fn byte(self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    /// Whether these bits of a byte are set.
    #[must_use]
    pub fn bit(self, at: usize, mask: u8) -> bool {
        self.byte(at) & mask != 0
    }

    /// A big-endian number of at most eight bytes.
    #[must_use]
    pub fn number(self, at: usize, bytes: usize) -> u64 {
        (at..at + bytes.min(8)).fold(0, |n, at| n << 8 | u64::from(self.byte(at)))
    }

    /// Operation code.
    #[must_use]
    pub fn opcode(self) -> u8 {
        self.byte(0)
    }

    /// First block and number of blocks of a command that names a run of them: the group of the operation code says where they stand.
    #[must_use]
    pub fn run(self) -> (u64, u64) {
        match self.opcode() >> 5 {
            // 0 means 256 (SBC-3, 5.10).
            0 => (
                self.number(1, 3) & 0x1f_ffff,
                match self.number(4, 1) {
                    0 => 256,
                    n => n,
                },
            ),
            1 | 2 => (self.number(2, 4), self.number(7, 2)),
            4 => (self.number(2, 8), self.number(10, 4)),
            _ => (self.number(2, 4), self.number(6, 4)),
        }
    }
}
