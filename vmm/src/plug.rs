//! What is plugged into the PCI bus.

use anyhow::Result;

use crate::devices::Ctx;
use crate::devices::pci::PciBus;

/// Plug the machine's PCI devices.
pub fn plug(_pci: &mut PciBus) -> Result<()> {
    Ok(())
}

/// Give the devices what they ask for and take their outputs.
pub fn settle(_pci: &mut PciBus, _ctx: &Ctx) {}
