//! The PCI bus: configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2), bus 0, single-function devices.
//!
//! The bus owns its functions and routes to them: configuration accesses (ports 0xcf8 to 0xcff) by slot, memory
//! accesses by the BARs that the guest has programmed. Port 0xcf9, the PC's reset control register, lies inside 0xcf8's
//! dword and lives here.
//!
//! ```text
//!  ports 0xcf8…0xcff ─► PciBus ─config_read/write─► PciFunction (header, BARs, capabilities)
//!  MMIO exits ────────►        ─bar_read/write────►      │
//!                              ◄─ intx_level, MSI ───────┘
//! ```
//! INTx is wired as in the module doc of [`super`]: [`intx_gsi`]. Slot 0 is the host bridge.

use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;

use super::{Action, Ctx, MsiMessage, Payload, Payloads, RestoreError, Snapshot, VmTime};

pub mod config;
pub mod host_bridge;
pub mod msix;
#[cfg(test)]
mod tests;

pub use config::ConfigSpace;
pub use host_bridge::HostBridge;

/// First GSI of the INTx lines.
pub const INTX_GSI_BASE: u32 = 16;
/// Number of INTx lines.
pub const INTX_LINES: usize = 8;
/// Slots on a bus.
pub const SLOTS: u8 = 32;

/// The GSI of `slot`'s interrupt pin (0 = INTA … 3 = INTD).
#[must_use]
pub fn intx_gsi(slot: u8, pin: u8) -> u32 {
    INTX_GSI_BASE + (u32::from(slot) + u32::from(pin)) % INTX_LINES as u32
}

/// A PCI function: its configuration space and what is behind its BARs.
pub trait PciFunction: Any + Send {
    /// Its configuration space.
    fn config(&self) -> &ConfigSpace;
    /// Its configuration space.
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// Read configuration space; `offset` + length is at most 256 and inside one dword.
    fn config_read(&mut self, offset: u8, data: &mut [u8], _ctx: &Ctx) {
        self.config().read(offset, data);
    }
    /// Write configuration space.
    fn config_write(&mut self, offset: u8, data: &[u8], _ctx: &Ctx) {
        self.config_mut().write(offset, data);
    }
    /// Read `data.len()` bytes at `offset` in `bar`. Only the offset is sure to be inside.
    fn bar_read(&mut self, _bar: usize, _offset: u64, data: &mut [u8], _ctx: &Ctx) {
        data.fill(0xff);
    }
    /// Write at `offset` in `bar`.
    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8], _ctx: &Ctx) {}
    /// Level of the interrupt pin that the header names.
    fn intx_level(&self) -> bool {
        false
    }
    /// Append the messages to deliver, and forget them.
    fn take_msi(&mut self, _out: &mut Vec<MsiMessage>) {}
    /// When [`PciFunction::tick`] is wanted, as [`super::PioDevice::deadline`].
    fn deadline(&self) -> Option<VmTime> {
        None
    }
    /// Time has passed, or there is work left from an earlier call.
    fn tick(&mut self, _ctx: &Ctx) -> Action {
        Action::None
    }
    /// Power-on state.
    fn reset(&mut self);
    /// The payloads of the function, all called `name`.
    fn save_payloads(&self, name: &str) -> Vec<Payload>;
    /// Take the payloads called `name` and restore them.
    fn restore_payloads(&mut self, payloads: &mut Payloads, name: &str) -> Result<(), RestoreError>;
    /// For [`PciBus::get`].
    fn as_any(&self) -> &dyn Any;
    /// For [`PciBus::get_mut`].
    fn as_any_mut(&mut self) -> &mut dyn Any;
}

/// Why the bus could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// The slot number is taken or does not exist.
    #[error("PCI slot {0} is taken or does not exist: use a free one from 1 to 31")]
    Slot(u8),
    /// The window for BARs is too small.
    #[error("the PCI memory window has no room for a BAR of {size:#x} bytes of slot {slot}: use fewer devices")]
    NoRoom {
        /// Slot of the function.
        slot: u8,
        /// Size of its BAR.
        size: u64,
    },
}

/// Bus 0.
pub struct PciBus {
    functions: BTreeMap<u8, Box<dyn PciFunction>>,
    address: u32,
    reset_control: u8,
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, slot, function, register.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
const RESET_CPU: u8 = 0x04;
/// System reset, CPU reset, full reset.
const RESET_CONTROL_MASK: u8 = 0x0e;

impl PciBus {
    /// A bus with the host bridge in slot 0.
    #[must_use]
    pub fn new() -> Self {
        let bridge: Box<dyn PciFunction> = Box::new(HostBridge::new());
        Self { functions: BTreeMap::from([(0, bridge)]), address: 0, reset_control: 0 }
    }

    /// Plug `function` into `slot` (1 to 31) before the machine starts.
    pub fn add(&mut self, slot: u8, function: Box<dyn PciFunction>) -> Result<(), PciError> {
        if slot >= SLOTS || self.functions.contains_key(&slot) {
            return Err(PciError::Slot(slot));
        }
        self.functions.insert(slot, function);
        Ok(())
    }

    /// The function in `slot`, if it is a `T`.
    #[must_use]
    pub fn get<T: PciFunction>(&self, slot: u8) -> Option<&T> {
        self.functions.get(&slot)?.as_any().downcast_ref()
    }

    /// The function in `slot`, if it is a `T`.
    pub fn get_mut<T: PciFunction>(&mut self, slot: u8) -> Option<&mut T> {
        self.functions.get_mut(&slot)?.as_any_mut().downcast_mut()
    }

    /// Give every BAR an address in `window` and switch memory decoding and bus mastering on, as firmware does. For a
    /// kernel that is booted directly. `window` is to lie below 4 GiB and outside RAM.
    pub fn assign_bars(&mut self, window: Range<u64>) -> Result<(), PciError> {
        let mut next = window.start;
        for (slot, function) in &mut self.functions {
            let config = function.config_mut();
            for (bar, size) in config.memory_bars() {
                let base = next.next_multiple_of(size);
                let end = base.saturating_add(size);
                let (Ok(base), true) = (u32::try_from(base), end <= window.end) else {
                    return Err(PciError::NoRoom { slot: *slot, size });
                };
                config.set_memory_bar(bar, base);
                next = end;
            }
            config.enable_as_firmware_does();
        }
        Ok(())
    }

    /// Read `data.len()` bytes from port 0xcf8 + `offset`.
    pub fn io_read(&mut self, offset: u16, data: &mut [u8], ctx: &Ctx) {
        data.fill(0xff);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.to_le_bytes()),
            (1, 1) => data[0] = self.reset_control,
            (4..=7, 1..) => {
                let (register, len) = self.register(offset, data.len());
                if let Some(function) = self.selected() {
                    function.config_read(register, &mut data[..len], ctx);
                }
            }
            _ => {}
        }
    }

    /// Write `data` to port 0xcf8 + `offset`.
    pub fn io_write(&mut self, offset: u16, data: &[u8], ctx: &Ctx) -> Action {
        match (offset, data) {
            (0, [a, b, c, d]) => self.address = u32::from_le_bytes([*a, *b, *c, *d]) & ADDRESS_MASK,
            (1, [value]) => {
                let rises = value & !self.reset_control & RESET_CPU != 0;
                self.reset_control = value & RESET_CONTROL_MASK;
                if rises {
                    return Action::Reset;
                }
            }
            (4..=7, [_, ..]) => {
                let (register, len) = self.register(offset, data.len());
                if let Some(function) = self.selected() {
                    function.config_write(register, &data[..len], ctx);
                }
            }
            // Narrower accesses to the address port are not configuration accesses (Linux probes with one).
            _ => {}
        }
        Action::None
    }

    /// The register that an access to the data port means, and how many of its bytes lie in the same dword.
    fn register(&self, offset: u16, len: usize) -> (u8, usize) {
        let within = (offset & 3) as u8;
        ((self.address & 0xfc) as u8 + within, len.min(4 - usize::from(within)))
    }

    /// The function that the address port selects.
    fn selected(&mut self) -> Option<&mut Box<dyn PciFunction>> {
        let enabled = self.address & ADDRESS_ENABLE != 0;
        let (bus, slot, function) = (self.address >> 16 & 0xff, self.address >> 11 & 0x1f, self.address >> 8 & 0x7);
        if !enabled || bus != 0 || function != 0 {
            return None;
        }
        // Five bits.
        self.functions.get_mut(&(slot as u8))
    }

    /// The function and BAR that decode `addr`, and the offset in it.
    fn decode(&mut self, addr: u64) -> Option<(&mut Box<dyn PciFunction>, usize, u64)> {
        self.functions.values_mut().find_map(|function| {
            let (bar, offset) = function.config().decode_memory(addr)?;
            Some((function, bar, offset))
        })
    }

    /// The guest reads memory that is not RAM. Returns whether a function decodes `addr`; `data` is all ones if none
    /// does.
    pub fn mmio_read(&mut self, addr: u64, data: &mut [u8], ctx: &Ctx) -> bool {
        data.fill(0xff);
        let Some((function, bar, offset)) = self.decode(addr) else { return false };
        function.bar_read(bar, offset, data, ctx);
        true
    }

    /// The guest writes memory that is not RAM. Returns whether a function decodes `addr`.
    pub fn mmio_write(&mut self, addr: u64, data: &[u8], ctx: &Ctx) -> bool {
        let Some((function, bar, offset)) = self.decode(addr) else { return false };
        function.bar_write(bar, offset, data, ctx);
        true
    }

    /// Levels of the INTx lines; index `i` is GSI [`INTX_GSI_BASE`] + `i`.
    #[must_use]
    pub fn intx_levels(&self) -> [bool; INTX_LINES] {
        let mut levels = [false; INTX_LINES];
        for (slot, function) in &self.functions {
            if let Some(pin) = function.config().interrupt_pin() {
                levels[(intx_gsi(*slot, pin) - INTX_GSI_BASE) as usize] |= function.intx_level();
            }
        }
        levels
    }

    /// The messages to deliver, in order.
    pub fn take_msi(&mut self) -> Vec<MsiMessage> {
        let mut out = Vec::new();
        for function in self.functions.values_mut() {
            function.take_msi(&mut out);
        }
        out
    }

    /// When [`PciBus::tick`] is wanted. A time that has passed means at once.
    #[must_use]
    pub fn deadline(&self) -> Option<VmTime> {
        self.functions.values().filter_map(|f| f.deadline()).min()
    }

    /// Time has passed. Of several functions that ask for something the first is heard.
    pub fn tick(&mut self, ctx: &Ctx) -> Action {
        let mut asked = Action::None;
        for function in self.functions.values_mut() {
            if function.deadline().is_some_and(|at| at <= ctx.now) {
                let action = function.tick(ctx);
                asked = if asked == Action::None { action } else { asked };
            }
        }
        asked
    }

    /// The machine was reset: every function is as after power-on, BARs included.
    pub fn reset(&mut self) {
        self.address = 0;
        self.reset_control = 0;
        for function in self.functions.values_mut() {
            function.reset();
        }
    }

    /// The state of the bus and of every function on it.
    #[must_use]
    pub fn save_payloads(&self) -> Vec<Payload> {
        let mut payloads = vec![Payload::of(self, BUS_NAME)];
        for (slot, function) in &self.functions {
            payloads.extend(function.save_payloads(&slot_name(*slot)));
        }
        payloads
    }

    /// Restore the bus and every function on it; the functions are those of the machine that was saved.
    pub fn restore_payloads(&mut self, payloads: &mut Payloads) -> Result<(), RestoreError> {
        payloads.restore(self, BUS_NAME)?;
        for (slot, function) in &mut self.functions {
            function.restore_payloads(payloads, &slot_name(*slot))?;
        }
        Ok(())
    }
}

const BUS_NAME: &str = "pci0";

/// The name under which a slot's payloads go, as `lspci` writes it.
fn slot_name(slot: u8) -> String {
    format!("00:{slot:02x}.0")
}

/// Saved state of the bus itself.
pub mod state {
    use serde::{Deserialize, Serialize};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// The configuration address port.
        pub address: u32,
        /// Port 0xcf9.
        pub reset_control: u8,
        /// The slots in use.
        pub slots: Vec<u8>,
    }
}

impl Snapshot for PciBus {
    const KIND: &'static str = "pci-bus";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        // The functions' states go into payloads of their own.
        let Self { functions, address, reset_control } = self;
        state::V1 { address: *address, reset_control: *reset_control, slots: functions.keys().copied().collect() }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { address, reset_control, slots } = state;
        if !slots.iter().eq(self.functions.keys()) {
            return Err(RestoreError::invalid(Self::KIND, format!("its slots in use are {slots:?}")));
        }
        if address & !ADDRESS_MASK != 0 || reset_control & !RESET_CONTROL_MASK != 0 {
            return Err(RestoreError::invalid(Self::KIND, "reserved bits are set"));
        }
        self.address = address;
        self.reset_control = reset_control;
        Ok(())
    }
}
