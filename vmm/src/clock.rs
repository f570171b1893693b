//! The machine's clocks: kvmclock, TSC and VM time advance together, and only while the machine runs.
//!
//! A short stop (a cut) lets them run on; an explicit pause, a save and a takeover stop them: the reading at the stop is kept and put
//! back, for the clock before the vCPUs and for all vCPUs the same TSC.

use std::time::Instant;

use anyhow::{Context, Result};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::devices::VmTime;
use crate::sys;
use crate::vcpu_state::{get_msr, set_msr};

/// Payload kind.
pub const KIND: &str = "clock";
/// Payload version.
pub const VERSION: u32 = 1;
const MSR_IA32_TSC: u32 = 0x10;

/// Saved state.
pub mod state {
    use super::*;

    /// A reading of all clocks at one instant.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
    pub struct V1 {
        /// kvmclock, ns since the machine's boot.
        pub kvmclock_ns: u64,
        /// The TSC as the guest reads it.
        pub guest_tsc: u64,
        /// Its frequency in kHz; 0 when it was not known.
        pub tsc_khz: u32,
        /// VM time, ns.
        pub vm_time_ns: u64,
    }
}

/// VM time: a stopwatch.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stopwatch {
    base: u64,
    since: Option<Instant>,
}

impl Stopwatch {
    /// The reading.
    pub fn now(&self) -> VmTime {
        let ran = self.since.map_or(0, |s| u64::try_from(s.elapsed().as_nanos()).unwrap_or(u64::MAX));
        VmTime(self.base.saturating_add(ran))
    }
    /// Run, from the reading at which it stopped.
    pub fn start(&mut self) {
        self.since.get_or_insert_with(Instant::now);
    }
    /// Stop.
    pub fn stop(&mut self) {
        self.base = self.now().0;
        self.since = None;
    }
    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.since.is_some()
    }
    /// Stand at `reading`, stopped.
    pub fn set(&mut self, reading: VmTime) {
        *self = Self { base: reading.0, since: None };
    }
    /// When (host time) VM time reaches `then`; `None` while it stands still.
    pub fn instant_of(&self, then: VmTime) -> Option<Instant> {
        let since = self.since?;
        Some(since + std::time::Duration::from_nanos(then.0.saturating_sub(self.base)))
    }
}

/// Read kvmclock and TSC. Runs on the thread of the first vCPU, which is stopped.
pub fn read(vm: &VmFd, vcpu: &VcpuFd, vm_time: VmTime) -> Result<state::V1> {
    let kvmclock_ns = vm.get_clock().context("KVM_GET_CLOCK")?.clock;
    let guest_tsc = match sys::tsc_offset(vcpu) {
        Ok(offset) => sys::host_tsc().wrapping_add(offset),
        Err(_) => get_msr(vcpu, MSR_IA32_TSC)?,
    };
    Ok(state::V1 { kvmclock_ns, guest_tsc, tsc_khz: vcpu.get_tsc_khz().unwrap_or(0), vm_time_ns: vm_time.0 })
}

/// Set kvmclock (once, before any vCPU gets its TSC).
pub fn set_kvmclock(vm: &VmFd, saved: &state::V1) -> Result<()> {
    // Without KVM_CLOCK_REALTIME in `flags`, KVM does not add the time that passed since the reading.
    let clock = kvm_clock_data { clock: saved.kvmclock_ns, ..Default::default() };
    vm.set_clock(&clock).context("KVM_SET_CLOCK")
}

/// The offset of the guest's TSC from the host's that all vCPUs get.
pub fn common_offset(saved: &state::V1) -> u64 {
    saved.guest_tsc.wrapping_sub(sys::host_tsc())
}

/// Give a vCPU its TSC, on its own thread: through the offset attribute where KVM has it (exactly equal on all vCPUs); else by
/// writing the MSR, which KVM recognises as a synchronising write when it comes within a second.
pub fn set_tsc(vcpu: &VcpuFd, saved: &state::V1, offset: u64) -> Result<()> {
    let here = vcpu.get_tsc_khz().unwrap_or(0);
    let mut scaled = false;
    if saved.tsc_khz != 0 && here != 0 && here.abs_diff(saved.tsc_khz) > here / 4000 {
        // More than 250 ppm: another kind of CPU. KVM scales if the CPU can; if not, the guest's kvmclock still holds.
        scaled = true;
        if vcpu.set_tsc_khz(saved.tsc_khz).is_err() {
            eprintln!(
                "note: the machine's TSC ran at {} kHz, this host's runs at {here} kHz and cannot be scaled",
                saved.tsc_khz
            );
        }
    }
    if !scaled && sys::set_tsc_offset(vcpu, offset).is_ok() {
        return Ok(());
    }
    set_msr(vcpu, MSR_IA32_TSC, saved.guest_tsc).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_time_stands_still_while_the_machine_does() {
        let mut w = Stopwatch::default();
        w.set(VmTime(1000));
        assert_eq!(w.now(), VmTime(1000));
        w.start();
        w.stop();
        let stopped = w.now();
        assert!(stopped >= VmTime(1000));
        assert_eq!(w.now(), stopped);
        assert_eq!(w.instant_of(VmTime(5000)), None);
    }
}
