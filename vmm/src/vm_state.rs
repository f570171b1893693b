//! The state that KVM keeps for the whole machine: both PICs, the IOAPIC, the PIT.

use anyhow::{Context, Result};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::raw;

/// Payload kind.
pub const KIND: &str = "kvm-irqchip";
/// Payload version.
pub const VERSION: u32 = 1;

/// Saved state.
pub mod state {
    use super::*;

    /// KVM's own structures.
    #[derive(Debug, Clone, Serialize, Deserialize)]
    pub struct V1 {
        /// Master PIC.
        #[serde(with = "raw::one")]
        pub pic_master: kvm_irqchip,
        /// Slave PIC.
        #[serde(with = "raw::one")]
        pub pic_slave: kvm_irqchip,
        /// IOAPIC.
        #[serde(with = "raw::one")]
        pub ioapic: kvm_irqchip,
        /// PIT.
        #[serde(with = "raw::one")]
        pub pit: kvm_pit_state2,
    }
}

/// Read it; all vCPUs and all device work are stopped.
pub fn save(vm: &VmFd) -> Result<state::V1> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).with_context(|| format!("KVM_GET_IRQCHIP {chip_id}"))?;
        anyhow::Ok(chip)
    };
    Ok(state::V1 {
        pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
        pit: vm.get_pit2().context("KVM_GET_PIT2")?,
    })
}

/// Load it; before the vCPUs' LAPICs.
pub fn load(vm: &VmFd, saved: &state::V1) -> Result<()> {
    let state::V1 { pic_master, pic_slave, ioapic, pit } = saved;
    for (chip, id) in
        [(pic_master, KVM_IRQCHIP_PIC_MASTER), (pic_slave, KVM_IRQCHIP_PIC_SLAVE), (ioapic, KVM_IRQCHIP_IOAPIC)]
    {
        anyhow::ensure!(chip.chip_id == id, "the saved interrupt controllers are mixed up ({} for {id})", chip.chip_id);
        vm.set_irqchip(chip).with_context(|| format!("KVM_SET_IRQCHIP {id}"))?;
    }
    vm.set_pit2(pit).context("KVM_SET_PIT2")
}
