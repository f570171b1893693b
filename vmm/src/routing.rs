//! Which interrupt line reaches which pin: the PC's wiring, line 0 on the I/O APIC's pin 2.

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip,
};
use kvm_ioctls::VmFd;

fn route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

/// Tell KVM.
pub fn set(vm: &VmFd) -> Result<()> {
    let mut routes = Vec::new();
    for line in 0..8 {
        routes.push(route(line, KVM_IRQCHIP_PIC_MASTER, line));
        routes.push(route(line + 8, KVM_IRQCHIP_PIC_SLAVE, line));
    }
    for line in (0..24).filter(|l| *l != 2) {
        routes.push(route(line, KVM_IRQCHIP_IOAPIC, if line == 0 { 2 } else { line }));
    }
    let routes = KvmIrqRouting::from_entries(&routes).map_err(|e| anyhow::anyhow!("too many routes: {e:?}"))?;
    vm.set_gsi_routing(&routes).context("KVM refuses the interrupt routing")
}
