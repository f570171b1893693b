//! The registers' bits (PC16550D data sheet, table II).

pub mod ier {
    pub const RX_AVAILABLE: u8 = 0x01;
    pub const THR_EMPTY: u8 = 0x02;
    pub const LINE_STATUS: u8 = 0x04;
    pub const MODEM_STATUS: u8 = 0x08;
    pub const ALL: u8 = 0x0f;
}
pub mod iir {
    pub const MODEM_STATUS: u8 = 0x00;
    pub const NONE: u8 = 0x01;
    pub const THR_EMPTY: u8 = 0x02;
    pub const RX_AVAILABLE: u8 = 0x04;
    pub const LINE_STATUS: u8 = 0x06;
    pub const RX_TIMEOUT: u8 = 0x0c;
    pub const FIFOS_ENABLED: u8 = 0xc0;
}
pub mod fcr {
    pub const ENABLE: u8 = 0x01;
    pub const CLEAR_RX: u8 = 0x02;
    pub const CLEAR_TX: u8 = 0x04;
    pub const TRIGGER: u8 = 0xc0;
    /// The bits that last.
    pub const KEPT: u8 = ENABLE | TRIGGER;
}
pub mod lcr {
    pub const WORD_LENGTH: u8 = 0x03;
    pub const TWO_STOP: u8 = 0x04;
    pub const PARITY: u8 = 0x08;
    pub const BREAK: u8 = 0x40;
    pub const DLAB: u8 = 0x80;
}
pub mod mcr {
    pub const DTR: u8 = 0x01;
    pub const RTS: u8 = 0x02;
    pub const OUT1: u8 = 0x04;
    pub const OUT2: u8 = 0x08;
    pub const LOOPBACK: u8 = 0x10;
    pub const ALL: u8 = 0x1f;
}
pub mod lsr {
    pub const DATA_READY: u8 = 0x01;
    pub const OVERRUN: u8 = 0x02;
    pub const BREAK: u8 = 0x10;
    pub const THR_EMPTY: u8 = 0x20;
    pub const TRANSMITTER_EMPTY: u8 = 0x40;
    /// The latched bits that this device can set.
    pub const LATCHED: u8 = OVERRUN | BREAK;
}
pub mod msr {
    pub const CTS: u8 = 0x10;
    pub const DSR: u8 = 0x20;
    pub const RI: u8 = 0x40;
    pub const DCD: u8 = 0x80;
    /// RI has only a trailing-edge delta.
    pub const DELTA_RI: u8 = 0x04;
    pub const DELTAS: u8 = 0x0f;
}
