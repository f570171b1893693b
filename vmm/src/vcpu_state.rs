//! The architectural state of one vCPU: saved on its own thread, restored on its own thread.
//!
//! Order matters, and is KVM's, not ours:
//! * saving: `mp_state` first (reading it lets KVM settle pending INIT/SIPI), events last (nothing after it may inject);
//! * loading: CPUID before everything (it decides which MSRs exist), sregs (APIC base, EFER) before the LAPIC, the LAPIC before the
//!   MSRs, the TSC deadline as the last MSR (KVM drops it silently while the LAPIC timer is in another mode), regs before events;
//! * the TSC is not here but in [`crate::clock`]: all vCPUs get the same one, together with the clock.

use std::collections::BTreeSet;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::raw;
use crate::sys;

/// Payload kind.
pub const KIND: &str = "kvm-vcpu";
/// Payload version.
pub const VERSION: u32 = 1;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Saved state.
pub mod state {
    use super::*;

    /// One vCPU, in KVM's own structures (stable ABI), each checked for its exact size when it is read.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    pub struct V1 {
        /// `KVM_GET_CPUID2`.
        #[serde(with = "raw::list")]
        pub cpuid: Vec<kvm_cpuid_entry2>,
        /// `KVM_GET_MP_STATE`.
        #[serde(with = "raw::one")]
        pub mp_state: kvm_mp_state,
        /// `KVM_GET_REGS`.
        #[serde(with = "raw::one")]
        pub regs: kvm_regs,
        /// `KVM_GET_SREGS`.
        #[serde(with = "raw::one")]
        pub sregs: kvm_sregs,
        /// `KVM_GET_XSAVE2`.
        #[serde(with = "raw::bytes")]
        pub xsave: Vec<u8>,
        /// `KVM_GET_XCRS`.
        #[serde(with = "raw::one")]
        pub xcrs: kvm_xcrs,
        /// `KVM_GET_DEBUGREGS`.
        #[serde(with = "raw::one")]
        pub debugregs: kvm_debugregs,
        /// `KVM_GET_LAPIC`.
        #[serde(with = "raw::one")]
        pub lapic: kvm_lapic_state,
        /// Index and value of every MSR that KVM gives, TSC excepted.
        pub msrs: Vec<(u32, u64)>,
        /// `MSR_IA32_TSC_DEADLINE`, if the vCPU has one; 0 = not armed.
        pub tsc_deadline: Option<u64>,
        /// `KVM_GET_VCPU_EVENTS`.
        #[serde(with = "raw::one")]
        pub events: kvm_vcpu_events,
    }
}

/// What the host's KVM can give of a vCPU; found out once.
#[derive(Debug)]
pub struct Abilities {
    /// MSRs to save, without TSC and TSC deadline.
    msrs: Vec<u32>,
    deadline: bool,
    xsave_size: usize,
    refused: Mutex<BTreeSet<u32>>,
}

impl Abilities {
    /// Try every MSR that KVM lists on `vcpu` (CPUID set): some are listed and cannot be read.
    pub fn probe(listed: &[u32], xsave_size: usize, vcpu: &VcpuFd) -> Self {
        let readable = |index: u32| get_msrs(vcpu, &[index]).is_ok_and(|v| v.len() == 1);
        let msrs = listed
            .iter()
            .copied()
            .filter(|i| *i != MSR_IA32_TSC && *i != MSR_TSC_DEADLINE)
            .filter(|i| readable(*i))
            .collect();
        Self { msrs, deadline: readable(MSR_TSC_DEADLINE), xsave_size, refused: Mutex::new(BTreeSet::new()) }
    }

    /// MSRs that this host's KVM refused to load so far.
    pub fn refused(&self) -> Vec<u32> {
        self.refused.lock().map(|r| r.iter().copied().collect()).unwrap_or_default()
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    let entries: Vec<_> = indices.iter().map(|i| entry(*i, 0)).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| anyhow::anyhow!("too many MSRs: {e:?}"))?;
    let n = vcpu.get_msrs(&mut msrs).context("KVM_GET_MSRS")?;
    Ok(msrs.as_slice().iter().take(n).map(|e| (e.index, e.data)).collect())
}

/// One MSR of a vCPU.
pub fn get_msr(vcpu: &VcpuFd, index: u32) -> Result<u64> {
    get_msrs(vcpu, &[index])?.first().map(|(_, v)| *v).with_context(|| format!("KVM does not give MSR {index:#x}"))
}

/// Set one MSR of a vCPU; false if KVM refuses it.
pub fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool> {
    let msrs = Msrs::from_entries(&[entry(index, data)]).map_err(|e| anyhow::anyhow!("{e:?}"))?;
    Ok(vcpu.set_msrs(&msrs).is_ok_and(|n| n == 1))
}

/// Give the vCPU its CPUID.
pub fn set_cpuid(vcpu: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<()> {
    let cpuid = CpuId::from_entries(entries).map_err(|e| anyhow::anyhow!("too many CPUID entries: {e:?}"))?;
    vcpu.set_cpuid2(&cpuid).context("KVM refuses the machine's CPUID: this host's CPU lacks something that it has")
}

/// The CPUID that the vCPU has now.
pub fn get_cpuid(vcpu: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>> {
    Ok(vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).context("KVM_GET_CPUID2")?.as_slice().to_vec())
}

/// Save a stopped vCPU. Pending I/O must have been completed. `cpuid` is passed in because it cannot change while a machine runs.
pub fn save(vcpu: &VcpuFd, can: &Abilities, cpuid: &[kvm_cpuid_entry2]) -> Result<state::V1> {
    let mp_state = vcpu.get_mp_state().context("KVM_GET_MP_STATE")?;
    let regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    let sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let xsave = sys::get_xsave(vcpu, can.xsave_size).context("KVM_GET_XSAVE2")?;
    let xcrs = vcpu.get_xcrs().context("KVM_GET_XCRS")?;
    let debugregs = vcpu.get_debug_regs().context("KVM_GET_DEBUGREGS")?;
    let lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    let tsc_deadline = if can.deadline { Some(get_msr(vcpu, MSR_TSC_DEADLINE)?) } else { None };
    let msrs = get_msrs(vcpu, &can.msrs)?;
    if let Some(missing) = can.msrs.get(msrs.len()) {
        bail!("KVM gave MSR {missing:#x} before and does not now");
    }
    let events = vcpu.get_vcpu_events().context("KVM_GET_VCPU_EVENTS")?;
    let cpuid = cpuid.to_vec();
    Ok(state::V1 { cpuid, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, tsc_deadline, events })
}

/// Load a state into a vCPU that does not run. `new_cpuid`: the vCPU never ran, so it takes the saved CPUID (always the saved one,
/// never this host's: a guest that was restored twice must still find what it booted with).
///
/// MSRs that this host refuses are reported once each and skipped.
pub fn load(vcpu: &VcpuFd, can: &Abilities, saved: &state::V1, new_cpuid: bool) -> Result<()> {
    let state::V1 { cpuid, mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, msrs, tsc_deadline, events } = saved;
    if new_cpuid {
        set_cpuid(vcpu, cpuid)?;
    }
    vcpu.set_mp_state(*mp_state).context("KVM_SET_MP_STATE")?;
    vcpu.set_regs(regs).context("KVM_SET_REGS")?;
    vcpu.set_sregs(sregs).context("KVM_SET_SREGS")?;
    vcpu.set_xcrs(xcrs).context("KVM_SET_XCRS")?;
    sys::set_xsave(vcpu, can.xsave_size, xsave).context("KVM_SET_XSAVE")?;
    vcpu.set_debug_regs(debugregs).context("KVM_SET_DEBUGREGS")?;
    vcpu.set_lapic(lapic).context("KVM_SET_LAPIC")?;
    load_msrs(vcpu, can, msrs)?;
    if let Some(deadline) = tsc_deadline {
        load_msrs(vcpu, can, &[(MSR_TSC_DEADLINE, *deadline)])?;
    }
    vcpu.set_vcpu_events(events).context("KVM_SET_VCPU_EVENTS")?;
    Ok(())
}

/// Load only what KVM itself changes while the vCPU is stopped: the LAPIC with its timer.
pub fn load_timers(vcpu: &VcpuFd, can: &Abilities, saved: &state::V1) -> Result<()> {
    vcpu.set_lapic(&saved.lapic).context("KVM_SET_LAPIC")?;
    if let Some(deadline) = saved.tsc_deadline {
        load_msrs(vcpu, can, &[(MSR_TSC_DEADLINE, deadline)])?;
    }
    Ok(())
}

fn load_msrs(vcpu: &VcpuFd, can: &Abilities, msrs: &[(u32, u64)]) -> Result<()> {
    let mut rest: Vec<_> = msrs.iter().map(|(i, v)| entry(*i, *v)).collect();
    while !rest.is_empty() {
        let batch = Msrs::from_entries(&rest).map_err(|e| anyhow::anyhow!("too many MSRs: {e:?}"))?;
        // KVM stops at the first MSR that it refuses and says how many it took.
        let taken = vcpu.set_msrs(&batch).unwrap_or(0);
        if let Some(refused) = rest.get(taken) {
            let first_time = can.refused.lock().map(|mut r| r.insert(refused.index)).unwrap_or(false);
            if first_time {
                eprintln!(
                    "note: this host's KVM refuses MSR {:#x} (value {:#x}); the guest goes on without it",
                    refused.index, refused.data
                );
            }
        }
        rest.drain(..(taken + 1).min(rest.len()));
    }
    Ok(())
}
