//! Sense data: why a command was not done (SPC-4, 4.5), in the fixed format.

/// Bytes of fixed-format sense data.
pub const SENSE_BYTES: usize = 18;

/// Sense keys (SPC-4, table 48).
pub mod key {
    /// Nothing is wrong.
    pub const NO_SENSE: u8 = 0;
    /// It cannot be used now.
    pub const NOT_READY: u8 = 2;
    /// The medium is damaged, or cannot be read or written.
    pub const MEDIUM_ERROR: u8 = 3;
    /// The initiator's fault.
    pub const ILLEGAL_REQUEST: u8 = 5;
    /// Something changed that the initiator has to know.
    pub const UNIT_ATTENTION: u8 = 6;
    /// It may not be written.
    pub const DATA_PROTECT: u8 = 7;
    /// What was compared differs.
    pub const MISCOMPARE: u8 = 14;
}

/// Why a command was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// See [`key`].
    pub key: u8,
    /// Additional sense code.
    pub asc: u8,
    /// Its qualifier.
    pub ascq: u8,
}

impl Sense {
    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self { key, asc, ascq }
    }

    /// Nothing to tell.
    pub const NONE: Self = Self::new(key::NO_SENSE, 0, 0);
    /// INVALID COMMAND OPERATION CODE.
    pub const INVALID_OPCODE: Self = Self::new(key::ILLEGAL_REQUEST, 0x20, 0);
    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const OUT_OF_RANGE: Self = Self::new(key::ILLEGAL_REQUEST, 0x21, 0);
    /// INVALID FIELD IN CDB.
    pub const INVALID_FIELD: Self = Self::new(key::ILLEGAL_REQUEST, 0x24, 0);
    /// LOGICAL UNIT NOT SUPPORTED.
    pub const NO_UNIT: Self = Self::new(key::ILLEGAL_REQUEST, 0x25, 0);
    /// INVALID FIELD IN PARAMETER LIST.
    pub const INVALID_PARAMETER: Self = Self::new(key::ILLEGAL_REQUEST, 0x26, 0);
    /// PARAMETER LIST LENGTH ERROR.
    pub const PARAMETER_LENGTH: Self = Self::new(key::ILLEGAL_REQUEST, 0x1a, 0);
    /// SAVING PARAMETERS NOT SUPPORTED.
    pub const NOT_SAVED: Self = Self::new(key::ILLEGAL_REQUEST, 0x39, 0);
    /// INVALID MESSAGE ERROR: a task attribute that is not supported.
    pub const INVALID_ATTRIBUTE: Self = Self::new(key::ILLEGAL_REQUEST, 0x49, 0);
    /// MEDIUM REMOVAL PREVENTED.
    pub const REMOVAL_PREVENTED: Self = Self::new(key::ILLEGAL_REQUEST, 0x53, 2);
    /// WRITE PROTECTED.
    pub const WRITE_PROTECTED: Self = Self::new(key::DATA_PROTECT, 0x27, 0);
    /// MEDIUM NOT PRESENT - TRAY CLOSED.
    pub const NO_MEDIUM: Self = Self::new(key::NOT_READY, 0x3a, 1);
    /// MEDIUM NOT PRESENT - TRAY OPEN.
    pub const TRAY_OPEN: Self = Self::new(key::NOT_READY, 0x3a, 2);
    /// UNRECOVERED READ ERROR.
    pub const READ_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x11, 0);
    /// WRITE ERROR.
    pub const WRITE_ERROR: Self = Self::new(key::MEDIUM_ERROR, 0x0c, 0);
    /// MISCOMPARE DURING VERIFY OPERATION.
    pub const MISCOMPARE: Self = Self::new(key::MISCOMPARE, 0x1d, 0);

    /// As bytes (SPC-4, 4.5.3).
    #[must_use]
    pub fn bytes(self) -> [u8; SENSE_BYTES] {
        let mut bytes = [0; SENSE_BYTES];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = (SENSE_BYTES - 8) as u8;
        bytes[12] = self.asc;
        bytes[13] = self.ascq;
        bytes
    }

    /// In the format with descriptors, of which there are none (SPC-4, 4.5.2).
    #[must_use]
    pub fn descriptor_bytes(self) -> [u8; 8] {
        [0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0]
    }
}

/// What the initiator is told with the next command, instead of an answer (SPC-4, 5.14; SAM-5, 5.14).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Attention {
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED.
    PowerOn = 1,
    /// BUS DEVICE RESET FUNCTION OCCURRED.
    Reset = 2,
    /// NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED.
    Medium = 4,
    /// CAPACITY DATA HAS CHANGED.
    Capacity = 8,
}

impl Attention {
    /// All of them, in the order in which they are told.
    pub const ALL: [Self; 4] = [Self::PowerOn, Self::Reset, Self::Medium, Self::Capacity];

    /// Additional sense code and qualifier.
    #[must_use]
    pub fn codes(self) -> (u8, u8) {
        match self {
            Self::PowerOn => (0x29, 0),
            Self::Reset => (0x29, 3),
            Self::Medium => (0x28, 0),
            Self::Capacity => (0x2a, 9),
        }
    }

    /// As sense.
    #[must_use]
    pub fn sense(self) -> Sense {
        let (asc, ascq) = self.codes();
        Sense { key: key::UNIT_ATTENTION, asc, ascq }
    }
}
