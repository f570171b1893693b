//! The costs of this host's KVM before the first cut: a throw-away machine writes to some pages, with and without the dirty log.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kvm_ioctls::{Kvm, VcpuFd};

use super::costs::Costs;
use crate::boot;
use crate::memory::{PAGE, Ram};
use crate::sys::{self, Exit};
use crate::vcpu_state;

const MIB: u64 = 8;
const CODE_AT: u64 = 0x10_0000;
const FIRST: u64 = 0x40_0000;
const PAGES: u32 = 256;

/// Writes a byte to each of [`PAGES`] pages from [`FIRST`] on, then to port 0x80, for ever.
fn code() -> Vec<u8> {
    let (first, pages) = ((FIRST as u32).to_le_bytes(), PAGES.to_le_bytes());
    let mut code = vec![0xb9, pages[0], pages[1], pages[2], pages[3]]; // again: mov ecx, PAGES
    code.extend([0xbb, first[0], first[1], first[2], first[3]]); // mov ebx, FIRST
    code.extend([0x88, 0x0b]); // next: mov [rbx], cl
    code.extend([0x81, 0xc3, 0x00, 0x10, 0x00, 0x00]); // add ebx, 4096
    code.extend([0xff, 0xc9]); // dec ecx
    code.extend([0x75, 0xf4]); // jnz next
    code.extend([0xe6, 0x80]); // out 0x80, al
    code.extend([0xeb, 0xe6]); // jmp again
    code
}

/// Measure; `scratch` is a file that may be created for it, in the file system of guest RAM. It is removed.
pub fn measure(scratch: &Path) -> Result<Costs> {
    let measured = measure_with(scratch);
    let _ = std::fs::remove_file(scratch);
    measured
}

fn measure_with(scratch: &Path) -> Result<Costs> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM refuses a machine to measure with")?;
    let ram = Ram::open(scratch, MIB)?;
    let manual = sys::manual_dirty_log(&vm);
    ram.attach(&vm, false)?;
    let entry = boot::flat_start(&ram, &code(), CODE_AT)?;
    let mut vcpu = vm.create_vcpu(0).context("KVM refuses a vCPU to measure with")?;
    let offered = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu_state::set_cpuid(&vcpu, offered.as_slice())?;
    let (mut sregs, mut regs) = (vcpu.get_sregs().context("KVM_GET_SREGS")?, vcpu.get_regs().context("KVM_GET_REGS")?);
    boot::set_entry(&mut sregs, &mut regs, entry);
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;

    let mut costs = Costs::default();
    let n = f64::from(PAGES);
    for _ in 0..2 {
        pass(&mut vcpu)?;
    }
    let plain = best(3, || pass(&mut vcpu))?;
    ram.attach(&vm, true)?;
    let mut log = ram.no_pages();
    let mut traps = f64::MAX;
    for _ in 0..3 {
        traps = traps.min(pass(&mut vcpu)?);
        ram.read_log(&vm, &mut log)?;
        if manual {
            let since = Instant::now();
            ram.protect(&vm, &log)?;
            costs.protect = since.elapsed().as_nanos() as f64 / n;
        }
    }
    costs.fault = ((traps - plain) / n).max(1.0);
    let mut to = vec![0u8; PAGES as usize * PAGE];
    let gather = super::gather::Gather::new()?;
    let pages: Vec<u64> = (0..u64::from(PAGES)).map(|i| FIRST / PAGE as u64 + i).collect();
    let copy = best(3, || {
        let since = Instant::now();
        gather.copy(&ram, &pages, &mut to)?;
        Ok(since.elapsed().as_nanos() as f64)
    })?;
    costs.copy = (copy / n).max(1.0);
    Ok(costs)
}

fn best(times: usize, mut f: impl FnMut() -> Result<f64>) -> Result<f64> {
    (0..times).try_fold(f64::MAX, |best, _| Ok(best.min(f()?)))
}

/// Let the guest write all its pages once; the time that it took, ns.
fn pass(vcpu: &mut VcpuFd) -> Result<f64> {
    let since = Instant::now();
    vcpu.run().map(|_| ()).context("KVM_RUN")?;
    ensure!(matches!(sys::exit(vcpu), Exit::Io { port: 0x80, .. }), "the measuring guest did something else");
    Ok(since.elapsed().as_nanos() as f64)
}
