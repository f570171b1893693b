//! The ACPI tables: what the guest's kernel needs to find CPUs, interrupt controllers, ports, the PCI bus and the off switch.
//!
//! A classic (not hardware-reduced) PC with fixed PM1 registers; see [`crate::devices`] for the ports. Rebuilt at every power on and reset;
//! the same for the same configuration on every host.

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package, PackageBuilder, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use anyhow::{Context, Result, ensure};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{ACPI_START, BIOS_END};
use crate::devices::{self, acpi_pm, rtc};
use crate::memory::Ram;

const OEM: [u8; 6] = *b"UNDSTY";
const OEM_TABLE: [u8; 8] = *b"UNDERSTY";
/// I/O APIC address, as KVM's.
const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC address.
const LAPIC: u32 = 0xfee0_0000;
/// Memory window of the PCI bus: from the end of low RAM's largest extent to the I/O APIC.
pub const PCI_WINDOW: std::ops::Range<u32> = 0xc000_0000..0xfec0_0000;

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Platform {
    /// Number of vCPUs; their APIC ids are 0, 1, ….
    pub vcpus: u32,
    /// Serial ports, COM1 first.
    pub serial_ports: usize,
}

/// Write the tables into the BIOS area; returns the RSDP's address.
pub fn write(ram: &Ram, platform: Platform) -> Result<u64> {
    let mut next = ACPI_START + 64;
    let mut place = |bytes: &[u8]| -> Result<u64> {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(64);
        ensure!(next <= BIOS_END, "the ACPI tables do not fit below 1 MiB");
        ram.mem.write_slice(bytes, GuestAddress(at)).context("writing an ACPI table")?;
        Ok(at)
    };
    let dsdt = place(dsdt(platform).as_slice())?;
    let facs = place(&facs())?;
    let fadt = place(fadt(dsdt, facs).as_slice())?;
    let madt = place(madt(platform.vcpus).as_slice())?;
    let mut xsdt = Sdt::new(*b"XSDT", 36, 1, OEM, OEM_TABLE, 1);
    for table in [fadt, madt] {
        xsdt.append_slice(&table.to_le_bytes());
    }
    xsdt.update_checksum();
    let xsdt = place(xsdt.as_slice())?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    ram.mem.write_slice(&rsdp, GuestAddress(ACPI_START)).context("writing the RSDP")?;
    Ok(ACPI_START)
}

/// ACPI 6.5, 5.2.10.
fn facs() -> Vec<u8> {
    let mut t = vec![0; 64];
    t[..4].copy_from_slice(b"FACS");
    t[4] = 64;
    t[32] = 2;
    t
}

/// ACPI 6.5, 5.2.9, by offset.
fn fadt(dsdt: u64, facs: u64) -> Sdt {
    const FLAGS: u32 = 1 // WBINVD works
        | 1 << 2         // C1 on all processors
        | 1 << 5         // no fixed sleep button
        | 1 << 8         // PM timer has 32 bits
        | 1 << 10; // reset register
    let pm = u64::from(devices::PM_PORT);
    let mut t = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    t.write_u32(36, facs as u32);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, devices::SCI_IRQ as u16);
    t.write_u32(48, u32::from(devices::SMI_CMD_PORT));
    t.write_u8(52, acpi_pm::ACPI_ENABLE);
    t.write_u8(53, acpi_pm::ACPI_DISABLE);
    t.write_u32(56, pm as u32); // PM1a event block
    t.write_u32(64, pm as u32 + 4); // PM1a control block
    t.write_u32(76, pm as u32 + 8); // PM timer
    t.write_u8(88, 4);
    t.write_u8(89, 2);
    t.write_u8(91, 4);
    t.write_u16(96, 0xfff); // no C2
    t.write_u16(98, 0xfff); // no C3
    t.write_u8(108, rtc::CENTURY);
    t.write_u16(109, 1 << 0 | 1 << 2); // legacy devices, no VGA
    t.write_u32(112, FLAGS);
    gas(&mut t, 116, 8, 1, 0xcf9);
    t.write_u8(128, 6);
    t.write_u8(131, 5); // FADT minor version
    t.write_u64(132, facs);
    t.write_u64(140, dsdt);
    gas(&mut t, 148, 32, 2, pm);
    gas(&mut t, 172, 16, 2, pm + 4);
    gas(&mut t, 208, 32, 3, pm + 8);
    t.update_checksum();
    t
}

/// A generic address structure in I/O space.
fn gas(t: &mut Sdt, at: usize, bits: u8, access: u8, port: u64) {
    t.write_u8(at, 1);
    t.write_u8(at + 1, bits);
    t.write_u8(at + 3, access);
    t.write_u64(at + 4, port);
}

/// ACPI 6.5, 5.2.12. vCPUs (APIC ids below 255), one I/O APIC, IRQ 0 on pin 2, the SCI level-triggered and active high.
fn madt(vcpus: u32) -> Sdt {
    let mut t = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, 1);
    t.write_u32(36, LAPIC);
    t.write_u32(40, 1); // also has 8259s
    for id in 0..vcpus.min(255) as u8 {
        t.append_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    let mut ioapic = [1, 12, vcpus.min(254) as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ioapic[4..8].copy_from_slice(&IOAPIC.to_le_bytes());
    t.append_slice(&ioapic);
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    let sci = devices::SCI_IRQ as u8;
    t.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, 0xd, 0]);
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]); // NMI on LINT1 of all
    t.update_checksum();
    t
}

fn aml(parts: &[&dyn Aml]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        part.to_aml_bytes(&mut bytes);
    }
    bytes
}

/// Finished AML.
struct Done(Vec<u8>);
impl Aml for Done {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn com_port(index: usize) -> Done {
    let port = devices::COM_PORTS[index];
    let name = format!("COM{}", index + 1);
    let device = aml(&[&Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &(index as u8 + 1)),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(port, port, 1, 8),
                    &Interrupt::new(true, true, false, false, devices::COM_IRQS[index]),
                ]),
            ),
        ],
    )]);
    Done(device)
}

fn dsdt(platform: Platform) -> Sdt {
    let mut routes = PackageBuilder::new();
    for slot in 0..32u32 {
        for pin in 0..4u32 {
            let gsi = 16 + (slot + pin) % 8;
            routes.add_element(&Package::new(vec![&(slot << 16 | 0xffff), &(pin as u8), &0u8, &(gsi as u8)]));
        }
    }
    let crs = Done(aml(&[&ResourceTemplate::new(vec![
        &AddressSpace::new_bus_number(0x0u16, 0xffu16),
        &IO::new(0xcf8, 0xcf8, 1, 8),
        &AddressSpace::new_io(0x0u16, 0xcf7u16, None),
        &AddressSpace::new_io(0xd00u16, 0xffffu16, None),
        &AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            PCI_WINDOW.start,
            PCI_WINDOW.end - 1,
            None,
        ),
    ])]));
    let pci = Done(aml(&[&Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_ADR".into(), &0u8),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &crs),
            &Name::new("_PRT".into(), &routes),
        ],
    )]));
    let rtc = Done(aml(&[&Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(devices::RTC_PORT, devices::RTC_PORT, 1, 2),
                    &Interrupt::new(true, true, false, false, devices::RTC_IRQ),
                ]),
            ),
        ],
    )]));
    let ports: Vec<Done> = (0..platform.serial_ports.min(devices::COM_PORTS.len())).map(com_port).collect();
    let mut in_sb: Vec<&dyn Aml> = vec![&pci, &rtc];
    in_sb.extend(ports.iter().map(|p| p as &dyn Aml));
    let off = acpi_pm::SLP_TYP_S5;
    let code = aml(&[
        &Scope::new(Path::new("_SB_"), in_sb),
        &Name::new("_S5_".into(), &Package::new(vec![&off, &off, &aml::ZERO, &aml::ZERO])),
    ]);
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    t.append_slice(&code);
    t.update_checksum();
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |s, b| s.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::open(&dir.path().join("ram"), 16).unwrap();
        let rsdp = write(&ram, Platform { vcpus: 32, serial_ports: 2 }).unwrap();
        let read = |at: u64, len: usize| {
            let mut b = vec![0; len];
            ram.mem.read_slice(&mut b, GuestAddress(at)).unwrap();
            b
        };
        let table = |at: u64| {
            let len = u32::from_le_bytes(read(at + 4, 4).try_into().unwrap()) as usize;
            let t = read(at, len);
            assert_eq!(sum(&t), 0, "{:?}", std::str::from_utf8(&t[..4]));
            t
        };
        let r = read(rsdp, 36);
        assert_eq!(&r[..8], b"RSD PTR ");
        assert_eq!((sum(&r[..20]), sum(&r)), (0, 0));
        let xsdt = table(u64::from_le_bytes(r[24..32].try_into().unwrap()));
        let names: Vec<_> = xsdt[36..].chunks(8).map(|a| table(u64::from_le_bytes(a.try_into().unwrap()))).collect();
        assert_eq!(names.iter().map(|t| &t[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC"]);
        let dsdt = table(u64::from_le_bytes(names[0][140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        let lapics = names[1][44..].chunks(8).take(32).filter(|e| e[0] == 0 && e[1] == 8).count();
        assert_eq!(lapics, 32);
    }
}
