//! What the guest's CPUID says: the host's KVM's offer, with the topology of this machine and without what cannot be moved to
//! another host.
//!
//! KVM offers the *host's* topology leaves; APIC ids must be patched in leaves 1, 0xB, 0x1F and AMD's 0x8000001E, or the guest finds
//! all its vCPUs to be the same one.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const ECX1_TSC_DEADLINE: u32 = 1 << 24;
const ECX1_HYPERVISOR: u32 = 1 << 31;
const EDX1_HTT: u32 = 1 << 28;
/// Invariant TSC: promises a frequency that another host may not have.
const EDX_8000_0007_INVARIANT_TSC: u32 = 1 << 8;
/// AMD "CmpLegacy": with HTT, says that the logical processors are cores.
const ECX_8000_0001_CMP_LEGACY: u32 = 1 << 1;
/// KVM features that keep host-side state in guest RAM at times of the host's choosing (asynchronous page faults: 4, 10, 14) or
/// need a handshake with the VMM (17, migration control).
const KVM_FEATURES_OFF: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 17;

/// Bits of the APIC id that number the cores of a machine with `vcpus` vCPUs.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.max(1).next_power_of_two().trailing_zeros()
}

/// The CPUID of vCPU `id` out of what KVM offers. One package, one thread a core.
pub fn for_vcpu(offered: &[kvm_cpuid_entry2], id: u32, vcpus: u32, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let bits = core_bits(vcpus);
    let amd = offered.iter().any(|e| e.function == 0 && e.ebx == u32::from_le_bytes(*b"Auth"));
    let mut entries = Vec::with_capacity(offered.len() + 4);
    for e in offered {
        let mut e = *e;
        match e.function {
            1 => {
                e.ebx = (e.ebx & 0x0000_ffff) | vcpus.min(255) << 16 | id << 24;
                e.ecx |= ECX1_HYPERVISOR;
                if tsc_deadline {
                    e.ecx |= ECX1_TSC_DEADLINE;
                } else {
                    e.ecx &= !ECX1_TSC_DEADLINE;
                }
                if vcpus > 1 {
                    e.edx |= EDX1_HTT;
                } else {
                    e.edx &= !EDX1_HTT;
                }
            }
            // Intel's cache leaf: cores in the package and sharers of the last level.
            4 if e.eax & 0x1f != 0 => {
                let level = (e.eax >> 5) & 7;
                let sharers = if level >= 3 { (1 << bits) - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | sharers << 14 | ((1u32 << bits) - 1).min(63) << 26;
            }
            // Topology: written below.
            0xb | 0x1f => continue,
            0x4000_0001 => e.eax &= !KVM_FEATURES_OFF,
            0x8000_0001 if amd => {
                if vcpus > 1 {
                    e.ecx |= ECX_8000_0001_CMP_LEGACY;
                } else {
                    e.ecx &= !ECX_8000_0001_CMP_LEGACY;
                }
            }
            0x8000_0007 => e.edx &= !EDX_8000_0007_INVARIANT_TSC,
            0x8000_0008 if amd => e.ecx = (e.ecx & !0xf0ff) | bits << 12 | (vcpus - 1).min(255),
            0x8000_001e => {
                e.eax = id;
                e.ebx = (e.ebx & !0xffff) | (id & 0xff);
                e.ecx &= !0x7ff;
            }
            _ => {}
        }
        entries.push(e);
    }
    let max_leaf = offered.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for leaf in [0xb, 0x1f].into_iter().filter(|l| *l <= max_leaf) {
        for (index, (kind, shift, count)) in [(1, 0, 1), (2, bits, vcpus), (0, 0, 0)].into_iter().enumerate() {
            let index = index as u32;
            entries.push(kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: index | kind << 8,
                edx: id,
                ..Default::default()
            });
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Vec<kvm_cpuid_entry2> {
        let e = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() };
        vec![
            e(0, 0x1f, u32::from_le_bytes(*b"Auth"), 0, 0),
            e(1, 0, 0x0500_1234, 0, 0),
            e(0xb, 9, 9, 9, 9),
            e(0x4000_0001, 0xffff_ffff, 0, 0, 0),
            e(0x8000_0007, 0, 0, 0, 0x100),
            e(0x8000_0008, 0, 0, 0xffff, 0),
            e(0x8000_001e, 7, 7, 7, 0),
        ]
    }

    #[test]
    fn every_vcpu_says_its_own_apic_id_in_every_leaf() {
        for id in [0, 1, 5, 31] {
            let c = for_vcpu(&offer(), id, 32, true);
            let leaf = |f: u32| c.iter().filter(move |e| e.function == f);
            assert!(leaf(1).all(|e| e.ebx >> 24 == id && (e.ebx >> 16) & 0xff == 32));
            assert_eq!(leaf(0xb).count(), 3);
            assert_eq!(leaf(0x1f).count(), 3);
            assert!(leaf(0xb).chain(leaf(0x1f)).all(|e| e.edx == id));
            assert!(leaf(0x8000_001e).all(|e| e.eax == id));
            assert!(leaf(0x8000_0008).all(|e| e.ecx & 0xff == 31 && (e.ecx >> 12) & 0xf == 5));
        }
    }

    #[test]
    fn what_cannot_move_to_another_host_is_not_offered() {
        let c = for_vcpu(&offer(), 0, 1, false);
        assert!(c.iter().filter(|e| e.function == 0x8000_0007).all(|e| e.edx == 0));
        assert!(c.iter().filter(|e| e.function == 0x4000_0001).all(|e| e.eax & (1 << 4) == 0));
    }
}
