//! The devices of the machine: pure state machines.
//!
//! A device has no thread, no file descriptor and no clock. Guest accesses and VM time go in; values, interrupt-line
//! levels, MSI messages, output bytes and [`Action`]s come out. Whoever owns the devices (the machine, under one lock)
//! moves these between KVM, the output gate and the devices:
//!
//! ```text
//!  vCPU exit ──read/write(offset, data, now)──► device ──value, Action──► vCPU, machine
//!  timer ─────────tick(now) at deadline()─────►        ──irq_level()────► KVM_IRQ_LINE
//!  board, gate ───receive(), set_output_room()►        ──take_output()──► gate
//!  getrandom ─────fill()──────────────────────►        ──take_msi()─────► KVM_SIGNAL_MSI
//! ```
//!
//! **After every guest access and every tick** the owner
//! 1. compares the level of each interrupt line with the last one told to KVM and tells KVM about a change,
//! 2. drains outputs (`take_output`, [`pci::PciBus::take_msi`]) and hands in what is asked for (`want_entropy`,
//!    `rx_room`, `set_output_room`); these are calls too, so the lines are compared once more,
//! 3. arms its timer for the earliest [`PioDevice::deadline`].
//!
//! Within one call a line may rise and fall again, never fall and rise: that is why it is enough to look after each
//! call, and why the look between 1 and 2 must not be left out. An edge-triggered line (UART, RTC) that fell in the
//! access and rises with the input that is handed in afterwards has made an edge, and a guest that serves one cause an
//! interrupt waits for it for ever.
//!
//! What must hold: any access of any width at any offset with any data is answered (unclaimed bits read as ones) and
//! never panics; work per call is bounded; the state after [`Snapshot::save`] and [`Snapshot::restore`] into a device
//! that was built with the same configuration is the same state; every write to guest RAM goes through [`GuestRam`], so
//! that its bitmap logs it.
//!
//! Where things are on this machine:
//!
//! | ports | device | interrupt |
//! |---|---|---|
//! | [`COM_PORTS`], 8 each | [`uart16550::Uart16550`] | [`COM_IRQS`] (edge) |
//! | [`RTC_PORT`], 2 | [`rtc::Rtc`] | [`RTC_IRQ`] (edge) |
//! | [`I8042_PORT`], 5 | [`i8042::I8042`] | none (no keyboard, no mouse) |
//! | [`PORT92`], 1 | [`i8042::Port92`] | |
//! | [`PM_PORT`], 16 | [`acpi_pm::AcpiPm`]: PM1a event block at +0 (4), PM1a control at +4 (2), PM timer at +8 (4) | [`SCI_IRQ`] (level) |
//! | [`SMI_CMD_PORT`], 2 | [`acpi_pm::AcpiPm::smi_write`]/[`acpi_pm::AcpiPm::smi_read`]: SMI command, status | |
//! | [`PCI_CONFIG_PORT`], 8 | [`pci::PciBus`]: address, data; reset control at 0xcf9 | |
//!
//! PCI INTx: slot `s`, pin `p` (0 = INTA) is GSI `16 + (s + p) % 8`, level, active low ([`pci::intx_gsi`]): the DSDT's
//! `_PRT` has `Package { (s << 16) | 0xffff, p, 0, 16 + (s + p) % 8 }` for every slot and pin.
//!
//! The owner's side at a glance (`now: VmTime`, `ctx: &Ctx`), beyond [`PioDevice`] and [`Snapshot`]:
//!
//! * UART, `Uart16550::new()`: `take_output() -> Vec<u8>`, `set_output_room(bytes, now)`, `rx_room(now) -> usize`,
//!   `receive(&[u8], now) -> usize`, `set_input_waiting(bytes)`, `tx_total()`, `rx_total()`, `reset(now)`.
//! * RTC, `Rtc::new(base_unix_seconds, ram_below_4g, ram_above_4g)` (bytes): `reset(now)`.
//! * `I8042::new()`, `Port92::new()`.
//! * ACPI PM, `AcpiPm::new()`: `press_power_button() -> bool`, `smi_read(offset, data)`, `smi_write(offset, data)`.
//! * PCI, `PciBus::new()`, `add(slot, Box<dyn PciFunction>)`: `io_read(offset, data, ctx)`,
//!   `io_write(offset, data, ctx) -> Action`, `mmio_read(addr, data, ctx) -> bool`, `mmio_write(addr, data, ctx) -> bool`,
//!   `intx_levels() -> [bool; 8]` (GSI 16 …), `take_msi() -> Vec<MsiMessage>`, `deadline()`, `tick(ctx) -> Action`,
//!   `get::<T>(slot)`, `get_mut::<T>(slot)`, `assign_bars(window)` (direct boot: at first and after each reset), `reset()`,
//!   `save_payloads() -> Vec<Payload>`, `restore_payloads(&mut Payloads)`.
//! * Watchdog, `bus.add(slot, Box::new(I6300esb::new(spec)))`: `status(now)`, and `stood_still(ns)` after each stop of the vCPUs in which
//!   VM time went on.
//! * virtio-rng, `bus.add(slot, Box::new(VirtioPci::new(Rng::new())))`, reached as `bus.get_mut::<VirtioPci<Rng>>(slot)`:
//!   while `want_entropy()` is n > 0, `fill(&n_random_bytes, ctx)`.
//! * virtio-console, the same with `Console`: `take_output() -> Vec<u8>`, then `set_output_room(bytes, ctx)`;
//!   `input_room() -> usize`, `receive(&[u8], ctx) -> usize`.
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod i6300esb;
pub mod i8042;
pub mod pci;
pub mod rtc;
pub mod saved;
pub mod scsi;
#[cfg(test)]
mod testing;
pub mod uart16550;
pub mod virtio;

pub use saved::{Payload, Payloads, RestoreError, Snapshot};

use serde::{Deserialize, Serialize};

/// Guest RAM as the devices see it. All writes through it are marked in its bitmap.
pub type GuestRam = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// First ports of COM1 … COM4; each UART has eight.
pub const COM_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];
/// Interrupt lines of COM1 … COM4. COM3 and COM4 share COM1's and COM2's: the owner tells KVM the OR of the levels.
pub const COM_IRQS: [u32; 4] = [4, 3, 4, 3];
/// First port of the real-time clock.
pub const RTC_PORT: u16 = 0x70;
/// Interrupt line of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// First port of the keyboard controller; offset 0 is data (0x60), offset 4 status and command (0x64). Offsets 1 to 3
/// belong to others (0x61 is the PIT's, in KVM).
pub const I8042_PORT: u16 = 0x60;
/// System control port A.
pub const PORT92: u16 = 0x92;
/// First port of the ACPI power management block.
pub const PM_PORT: u16 = 0x600;
/// Interrupt line of the ACPI SCI.
pub const SCI_IRQ: u32 = 9;
/// ACPI SMI command port; the next one is the APM status (scratch) port.
pub const SMI_CMD_PORT: u16 = 0xb2;
/// First port of PCI configuration mechanism #1.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;

/// VM time: nanoseconds that the machine has run, over all its hosts. It never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct VmTime(pub u64);

impl VmTime {
    /// This time plus `ns` nanoseconds; stays at the end of time instead of wrapping.
    #[must_use]
    pub fn plus(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }

    /// Nanoseconds since `earlier`; 0 if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// What a guest's write, or a watchdog that it does not feed, asks the machine to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub enum Action {
    /// Nothing beyond the write.
    #[default]
    None,
    /// Reset the machine (all vCPUs to their start state, all devices rebuilt except totals and the clock).
    Reset,
    /// The guest has shut itself down (ACPI S5).
    PowerOff,
}

/// A message-signalled interrupt to deliver: a write of `data` to `address`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsiMessage {
    /// Guest physical address (0xfee…).
    pub address: u64,
    /// Vector, delivery mode and trigger.
    pub data: u32,
}

/// What surrounds an access to a device that also reaches into guest RAM.
#[derive(Debug, Clone, Copy)]
pub struct Ctx<'a> {
    /// VM time of the access.
    pub now: VmTime,
    /// The guest's RAM.
    pub ram: &'a GuestRam,
}

/// A device behind I/O ports. `offset` counts from its first port; `data` is one access of 1, 2 or 4 bytes (the
/// repetitions of a string instruction come one by one), but any length is survived.
pub trait PioDevice {
    /// The guest reads; fill all of `data`.
    fn read(&mut self, offset: u16, data: &mut [u8], now: VmTime);
    /// The guest writes.
    fn write(&mut self, offset: u16, data: &[u8], now: VmTime) -> Action;
    /// Level of the device's interrupt line.
    fn irq_level(&self) -> bool {
        false
    }
    /// When the device wants [`PioDevice::tick`]; may change with every call into the device. `None`: not before
    /// something else happens.
    fn deadline(&self) -> Option<VmTime> {
        None
    }
    /// Time has passed. Earlier or later than the deadline is allowed; so is never, as long as the guest only polls.
    fn tick(&mut self, _now: VmTime) {}
}

/// The bytes of a write with the byte-wide register that each goes to; what lies beyond the last offset goes nowhere.
fn written_bytes(offset: u16, data: &[u8]) -> impl Iterator<Item = (u16, &u8)> {
    // (`(offset..).zip(data)` would compute one offset too many, and that overflows at the end of the range.)
    data.iter().enumerate().map_while(move |(i, byte)| Some((offset.checked_add(u16::try_from(i).ok()?)?, byte)))
}

/// Calls `f(offset, byte)` for each byte of a read of byte-wide registers.
fn read_bytes(offset: u16, data: &mut [u8], mut f: impl FnMut(u16) -> u8) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = u16::try_from(i).ok().and_then(|i| offset.checked_add(i)).map_or(0xff, &mut f);
    }
}
