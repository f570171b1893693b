//! On the host's own KVM: two replicators and two VMMs on this machine, joined over 127.0.0.1, with a guest in ring 3 that does
//! nothing but write to memory.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::guest::{self, Work};
use super::memory::VmmMemory;
use super::pair::{MACHINE, Pair, Setup, Side};
use super::pauses::collect;
use super::rows::percentile;
use super::{Spread, limits, memory, time_process};
use crate::lab::places;

const RAM_MIB: u64 = 256;
const VCPUS: u32 = 2;
/// How long each working set is measured.
const MEASURE: Duration = Duration::from_secs(12);

/// The host part of the report.
#[derive(Debug, Serialize)]
pub struct HostReport {
    /// E.g. `kvm_amd`; pauses of different flavours are not comparable.
    pub kvm_backend: String,
    /// Size of the machine.
    pub ram_mib: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// By working set.
    pub pauses: Vec<Pauses>,
    /// Memory of the primary's VMM after the smallest working set.
    pub memory: VmmMemory,
    /// `understudy-ocf` as `ocf:understudy:vmm monitor` on the running machine, whole process, ms.
    pub monitor_ms: Spread,
}

/// Replication of a guest that rewrites a working set as fast as it can.
#[derive(Debug, Serialize)]
pub struct Pauses {
    /// Pages that each vCPU rewrites.
    pub working_set_pages_per_vcpu: u32,
    /// Checkpoints committed per second (25 ms apart at the most).
    pub epochs_per_s: f64,
    /// Dirty pages per checkpoint.
    pub pages_per_epoch: f64,
    /// The vCPUs stood still, µs.
    pub pause_p50_us: u64,
    /// See `pause_p50_us`.
    pub pause_p99_us: u64,
    /// See `pause_p50_us`.
    pub pause_max_us: u64,
    /// The physical limit: copying as many pages once, µs, in this run.
    pub copy_limit_us: f64,
    /// First copy of all RAM while the guest ran, ms.
    pub first_copy_ms: u64,
    /// Bytes on the wire per byte of pages.
    pub wire_ratio: f64,
}

/// Measure everything of this part.
pub fn measure(say: &dyn Fn(&str)) -> Result<HostReport> {
    let code = guest::load_image(&[]);
    let pair = Pair::start(&Setup::new(RAM_MIB), &code)?;
    let guest = pair.guest()?;
    pair.protect()?;
    let mut pauses = Vec::new();
    let mut rest = None;
    for pages in [16, 512, 4096] {
        say(&format!("replicating a guest that rewrites {VCPUS} × {pages} pages"));
        guest.order(&Work { unpaced: true, ..Work::hot(u64::from(VCPUS * pages)) })?;
        pauses.push(one(&pair.a, pages)?);
        if rest.is_none() {
            let (vmm, _) = pair.a.pids()?;
            rest = Some((pair.a.vmm()?.kvm_backend, memory::of(vmm)?, monitor(&pair.a)?));
        }
    }
    let (kvm_backend, memory, monitor_ms) = rest.context("nothing was measured")?;
    Ok(HostReport { kvm_backend, ram_mib: RAM_MIB, vcpus: VCPUS, pauses, memory, monitor_ms })
}

fn one(a: &Side, pages: u32) -> Result<Pauses> {
    let before = a.replicator()?;
    let started = Instant::now();
    let mut taken = collect(a, MEASURE)?;
    let after = a.replicator()?;
    let seconds = started.elapsed().as_secs_f64();
    let raw = (after.raw_bytes - before.raw_bytes) as f64;
    let wire = (after.wire_bytes - before.wire_bytes) as f64;
    taken.pauses.sort_by(f64::total_cmp);
    let pause = |share| percentile(&taken.pauses, share) as u64;
    Ok(Pauses {
        working_set_pages_per_vcpu: pages,
        epochs_per_s: (after.epochs - before.epochs) as f64 / seconds,
        pages_per_epoch: taken.pages,
        pause_p50_us: pause(0.5),
        pause_p99_us: pause(0.99),
        pause_max_us: pause(1.0),
        copy_limit_us: limits::copy_us(taken.pages as usize),
        first_copy_ms: after.last_sync_ms,
        wire_ratio: wire / raw.max(1.0),
    })
}

fn monitor(a: &Side) -> Result<Spread> {
    let agent = places::bin_dir()?.join("understudy-ocf");
    let (spread, _code) = time_process(30, || {
        let mut command = Command::new(&agent);
        command.args(["vmm", "monitor"]).env("OCF_ROOT", "/usr/lib/ocf").env("OCF_RESOURCE_INSTANCE", "bench");
        command.env("OCF_RESKEY_name", MACHINE).env("OCF_RESKEY_kernel", "/dev/null");
        command.env("OCF_RESKEY_run_root", &a.run_root).env("OCF_RESKEY_shm_root", &a.shm_root);
        command.env("OCF_RESKEY_memory", RAM_MIB.to_string()).env("OCF_RESKEY_CRM_meta_timeout", "20000");
        Ok(command)
    })?;
    Ok(spread)
}
