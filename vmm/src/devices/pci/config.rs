//! A type 0 configuration space (PCI Local Bus 3.0, chapter 6): 256 bytes, a mask of what the guest may write, memory
//! BARs, a list of capabilities.
//!
//! Sizing and relocating a BAR need no code of their own: the bits below a BAR's size are not writable.

use crate::devices::RestoreError;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// Capabilities start behind the header.
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_SERR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor and device id.
    pub id: (u16, u16),
    /// Subsystem vendor and subsystem id.
    pub subsystem: (u16, u16),
    /// Class, subclass, programming interface: 0xCCSSPP.
    pub class: u32,
    /// Revision id.
    pub revision: u8,
}

/// The configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// What `reset` returns to.
    initial: [u8; 256],
    /// Sizes of the memory BARs; 0 = not there.
    bar_sizes: [u32; 6],
    last_capability: usize,
    end_of_capabilities: usize,
}

impl ConfigSpace {
    /// A header without BARs, interrupt pin and capabilities.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; 256],
            writable: [0; 256],
            initial: [0; 256],
            bar_sizes: [0; 6],
            last_capability: 0,
            end_of_capabilities: FIRST_CAPABILITY,
        };
        let Identity { id, subsystem, class, revision } = identity;
        config.fix(0x00, &id.0.to_le_bytes());
        config.fix(0x02, &id.1.to_le_bytes());
        config.fix(0x08, &(class << 8 | u32::from(revision)).to_le_bytes());
        config.fix(0x2c, &subsystem.0.to_le_bytes());
        config.fix(0x2e, &subsystem.1.to_le_bytes());
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE;
        config.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        config.writable[0x0c] = 0xff; // cache line size
        config.writable[INTERRUPT_LINE] = 0xff;
        config
    }

    /// Set bytes that the guest finds at power-on.
    fn fix(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self.initial[at..at + value.len()].copy_from_slice(value);
    }

    /// A byte that the guest may write, and its value at power-on.
    pub fn add_register(&mut self, at: u8, value: u8, writable: u8) {
        self.fix(usize::from(at), &[value]);
        self.writable[usize::from(at)] = writable;
    }

    /// Interrupts go to INTA.
    pub fn use_inta(&mut self) {
        self.fix(INTERRUPT_PIN, &[1]);
    }

    /// Add 32-bit memory BAR `bar` (0 to 5) of `size` bytes, a power of two from 16 bytes to 1 GiB.
    pub fn add_memory_bar(&mut self, bar: usize, size: u32) {
        debug_assert!(size.is_power_of_two() && (0x10..=1 << 30).contains(&size));
        self.bar_sizes[bar] = size;
        let at = BAR0 + 4 * bar;
        self.writable[at..at + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Add a capability with `id` and what follows its two header bytes; `writable` masks the latter. Returns its
    /// offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.end_of_capabilities;
        let end = at + 2 + body.len();
        debug_assert!(end <= 256 && body.len() == writable.len());
        // Fits: `end` is at most 256 and a capability is longer than its header.
        let pointer = at as u8;
        match self.last_capability {
            0 => {
                self.fix(CAPABILITIES, &[pointer]);
                self.fix(STATUS, &[STATUS_CAPABILITIES]);
            }
            last => self.fix(last + 1, &[pointer]),
        }
        self.fix(at, &[id, 0]);
        self.fix(at + 2, body);
        self.writable[at + 2..end].copy_from_slice(writable);
        self.last_capability = at;
        self.end_of_capabilities = end.next_multiple_of(4);
        pointer
    }

    /// Read bytes; beyond the end is all ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        super::super::read_bytes(u16::from(offset), data, |o| self.bytes.get(usize::from(o)).copied().unwrap_or(0xff));
    }

    /// Write the writable bits.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for (at, value) in (usize::from(offset)..256).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }

    /// The 16-bit register at `at`.
    #[must_use]
    pub fn word(&self, at: u8) -> u16 {
        let mut data = [0; 2];
        self.read(at, &mut data);
        u16::from_le_bytes(data)
    }

    /// The 32-bit register at `at`.
    #[must_use]
    pub fn dword(&self, at: u8) -> u32 {
        let mut data = [0; 4];
        self.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Whether the guest has switched INTx off.
    #[must_use]
    pub fn intx_disabled(&self) -> bool {
        self.command() & COMMAND_INTX_DISABLE != 0
    }

    /// The interrupt pin, 0 = INTA.
    #[must_use]
    pub fn interrupt_pin(&self) -> Option<u8> {
        self.bytes[INTERRUPT_PIN].checked_sub(1)
    }

    /// Show in the status register whether an interrupt is pending.
    pub fn show_interrupt(&mut self, pending: bool) {
        self.bytes[STATUS] = self.bytes[STATUS] & !STATUS_INTERRUPT | if pending { STATUS_INTERRUPT } else { 0 };
    }

    fn bar_base(&self, bar: usize) -> u32 {
        let at = BAR0 + 4 * bar;
        u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]]) & !0xf
    }

    /// The BAR that decodes `addr` and the offset in it. A BAR at 0 decodes nothing: it has not been given an address.
    pub(super) fn decode_memory(&self, addr: u64) -> Option<(usize, u64)> {
        if self.command() & COMMAND_MEMORY == 0 {
            return None;
        }
        self.bar_sizes.iter().enumerate().find_map(|(bar, size)| {
            let base = self.bar_base(bar);
            let offset = addr.checked_sub(u64::from(base))?;
            (base != 0 && offset < u64::from(*size)).then_some((bar, offset))
        })
    }

    /// Index and size of every memory BAR.
    pub(super) fn memory_bars(&self) -> Vec<(usize, u64)> {
        self.bar_sizes.iter().enumerate().filter(|(_, size)| **size != 0).map(|(i, s)| (i, u64::from(*s))).collect()
    }

    pub(super) fn set_memory_bar(&mut self, bar: usize, base: u32) {
        self.write((BAR0 + 4 * bar) as u8, &base.to_le_bytes());
    }

    pub(super) fn enable_as_firmware_does(&mut self) {
        let command = self.command() | COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER;
        self.write(COMMAND as u8, &command.to_le_bytes());
    }

    /// Power-on values.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// All bytes, for the saved state.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        // Everything else is made by the constructor and never changes.
        let Self { bytes, writable: _, initial: _, bar_sizes: _, last_capability: _, end_of_capabilities: _ } = self;
        bytes.to_vec()
    }

    /// Take saved bytes; whatever the guest cannot write must be what this function has, or it is another function.
    pub fn restore(&mut self, kind: &'static str, saved: &[u8]) -> Result<(), RestoreError> {
        let saved: [u8; 256] = saved
            .try_into()
            .map_err(|_| RestoreError::invalid(kind, format!("its configuration space has {} bytes", saved.len())))?;
        for (at, value) in saved.iter().enumerate() {
            let mut may_differ = self.writable[at];
            if at == STATUS {
                may_differ |= STATUS_INTERRUPT;
            }
            if (value ^ self.initial[at]) & !may_differ != 0 {
                return Err(RestoreError::invalid(
                    kind,
                    format!("byte {at:#04x} of its configuration space is {value:#04x}"),
                ));
            }
        }
        self.bytes = saved;
        Ok(())
    }
}
