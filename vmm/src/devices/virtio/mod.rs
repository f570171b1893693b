//! Virtio devices (virtio 1.2), modern only.
//!
//! The transport ([`VirtioPci`]) and the device ([`VirtioDevice`]: [`Rng`], [`Console`], [`Block`], [`Scsi`], [`Net`]) know nothing of each other's
//! registers:
//!
//! ```text
//!  configuration space, BAR 0 ─► VirtioPci: status, features, queue set-up, ISR, MSI-X
//!                                   │ process(queues, ram)
//!                                   ▼
//!                                VirtioDevice ──► VirtQueue: next_chain, complete ──► guest RAM
//! ```
//! Everything a driver puts into RAM is hostile. A ring or a chain that breaks the rules ([`Broken`]) makes the device
//! ask to be reset (DEVICE_NEEDS_RESET) and touch nothing until then. Work per call is bounded by [`CHAINS_PER_CALL`];
//! what is left is done at the next tick.

use super::{GuestRam, Snapshot};

pub mod block;
pub mod console;
pub mod net;
pub mod queue;
pub mod requests;
pub mod rng;
pub mod scsi;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod transport;

pub use block::Block;
pub use console::Console;
pub use net::Net;
pub use queue::{Broken, Chain, VirtQueue};
pub use rng::Rng;
pub use scsi::Scsi;
pub use transport::VirtioPci;

/// Most chains that a device works on in one call, all its queues together. Without a bound another vCPU could feed a
/// queue for ever while the machine's lock is held.
pub const CHAINS_PER_CALL: usize = 256;

/// What a device says about how much it has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All that can be done for now; the driver will notify when there is more.
    Idle,
    /// [`CHAINS_PER_CALL`] was reached.
    More,
}

/// A virtio device without its transport.
pub trait VirtioDevice: Snapshot + Send + 'static {
    /// Device id (virtio 1.2, chapter 5).
    const DEVICE_ID: u16;
    /// PCI class of a function that carries it: 0xCCSSPP.
    const PCI_CLASS: u32;
    /// Largest size of each queue, a power of two.
    const QUEUE_SIZES: &'static [u16];

    /// The size of each queue that this one has.
    fn queue_sizes(&self) -> &[u16] {
        Self::QUEUE_SIZES
    }

    /// The device's own feature bits (the transport adds its own).
    fn features(&self) -> u64 {
        0
    }
    /// The driver has agreed on these features.
    fn agreed(&mut self, _features: u64) {}
    /// Counts changes of the device's configuration, so that a driver does not read half of one.
    fn config_generation(&self) -> u8 {
        0
    }
    /// Read the device's configuration.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    /// Write the device's configuration.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// The driver is ready and something may have changed: do what can be done on all queues.
    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken>;
    /// The driver resets the device. What has already left or come in for the host's side stays.
    fn reset(&mut self);
}
