//! On the host's own KVM: two replicators and two VMMs on this machine, joined over 127.0.0.1, with a guest in ring 3 that does
//! nothing but write to memory.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use understudy_protocol::control::{
    ReplicatorRequest, ReplicatorStatus, Role, VmmRequest, VmmState, VmmStatus, call_once,
};
use understudy_protocol::layout::Layout;
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::machine::{BootSource, MachineConfig};
use understudy_vmm::run::{RunConfig, run};

use super::memory::VmmMemory;
use super::{Spread, memory, time_process};
use crate::lab::{places, wait_for, wait_until};

const MACHINE: &str = "bench";
const RAM_MIB: u64 = 256;
const VCPUS: u32 = 2;
const BOUND: Duration = Duration::from_secs(60);
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

/// Rewrites pages from 64 MiB · (vCPU + 1) for ever.
fn writer(pages: u32) -> Vec<u8> {
    let mask = (pages.next_power_of_two() - 1).to_le_bytes();
    let mut code = vec![
        0x48, 0x89, 0xf9, // mov rcx, rdi
        0x48, 0xff, 0xc1, // inc rcx
        0x48, 0xc1, 0xe1, 0x1a, // shl rcx, 26
        0x31, 0xc0, // xor eax, eax
        0x48, 0x89, 0xc2, // again: mov rdx, rax
        0x48, 0x81, 0xe2, mask[0], mask[1], mask[2], mask[3], // and rdx, mask
        0x48, 0xc1, 0xe2, 0x0c, // shl rdx, 12
        0x48, 0x89, 0x04, 0x11, // mov [rcx+rdx], rax
        0x48, 0xff, 0xc0, // inc rax
    ];
    let back = -(3 + 7 + 4 + 4 + 3 + 2i8);
    code.extend_from_slice(&[0xeb, back.to_le_bytes()[0]]); // jmp again
    code
}

/// `understudy-bench flat-vmm`: the VMM of the benchmark's machine, as a process of its own.
pub fn flat_vmm(run_root: &Path, shm_root: &Path, pages: u32, standby: bool) -> Result<i32> {
    let layout = Layout::new(run_root, shm_root, MACHINE);
    let machine = MachineConfig {
        name: MACHINE.into(),
        memory_mib: RAM_MIB,
        vcpus: VCPUS,
        boot: BootSource::Flat { code: writer(pages), at: 0x10_0000 },
        serial: vec![BackendConfig::None],
        console: None,
        ram_file: layout.ram(),
    };
    run(RunConfig { machine, layout, arena_mib: None, standby })
}

/// One side of the pair; everything it started ends with it.
struct Side {
    layout: Layout,
    run_root: PathBuf,
    shm_root: PathBuf,
    children: Vec<Child>,
}

impl Drop for Side {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Side {
    fn start(dir: &Path, name: &str, peers: &str, key: &Path, pages: u32) -> Result<Self> {
        let (run_root, shm_root) = (dir.join(name).join("run"), dir.join(name).join("shm"));
        for root in [&run_root, &shm_root] {
            fs::create_dir_all(root).with_context(|| format!("creating {}", root.display()))?;
        }
        let layout = Layout::new(&run_root, &shm_root, MACHINE);
        let mut side = Self { layout, run_root, shm_root, children: Vec::new() };
        let log = |what: &str| fs::File::create(dir.join(format!("{name}-{what}.log"))).context("creating a log");
        let mut vmm = Command::new(std::env::current_exe()?);
        vmm.arg("flat-vmm").arg(&side.run_root).arg(&side.shm_root).arg(pages.to_string());
        if name == "b" {
            vmm.arg("--standby");
        }
        side.spawn(vmm.stderr(log("vmm")?))?;
        wait_until("the benchmark's VMM", BOUND, || Ok(side.vmm().is_ok()))
            .with_context(|| fs::read_to_string(dir.join(format!("{name}-vmm.log"))).unwrap_or_default())?;
        let mut replicator = Command::new(places::bin_dir()?.join("understudy-replicator"));
        replicator.args(["run", "--machine", MACHINE, "--node", name, "--peers", peers, "--no-cluster"]);
        replicator.arg("--run-root").arg(&side.run_root).arg("--shm-root").arg(&side.shm_root).arg("--key").arg(key);
        side.spawn(replicator.stderr(log("replicator")?))?;
        wait_until("the benchmark's replicator", BOUND, || Ok(side.replicator().is_ok()))
            .with_context(|| fs::read_to_string(dir.join(format!("{name}-replicator.log"))).unwrap_or_default())?;
        Ok(side)
    }

    fn spawn(&mut self, command: &mut Command) -> Result<()> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        self.children.push(child.with_context(|| format!("starting {command:?}"))?);
        Ok(())
    }

    fn vmm(&self) -> Result<VmmStatus> {
        Ok(call_once(self.layout.vmm_socket(), &VmmRequest::Status, BOUND)?)
    }

    fn replicator(&self) -> Result<ReplicatorStatus> {
        Ok(call_once(self.layout.replicator_socket(), &ReplicatorRequest::Status, BOUND)?)
    }
}

/// Measure everything of this part.
pub fn measure(say: &dyn Fn(&str)) -> Result<HostReport> {
    let mut pauses = Vec::new();
    let mut rest = None;
    for pages in [16, 512, 4096] {
        say(&format!("replicating a guest that rewrites {VCPUS} × {pages} pages"));
        // Guest RAM belongs into a tmpfs.
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let key = dir.path().join("key");
        let keygen = Command::new(places::bin_dir()?.join("understudy-replicator")).arg("keygen").arg(&key).output()?;
        if !keygen.status.success() {
            bail!("making a key failed: {}", String::from_utf8_lossy(&keygen.stderr));
        }
        let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
        let b = Side::start(dir.path(), "b", &peers, &key, pages)?;
        let a = Side::start(dir.path(), "a", &peers, &key, pages)?;
        call_once::<_, ()>(a.layout.replicator_socket(), &ReplicatorRequest::Promote, BOUND)?;
        wait_for("the first copy", BOUND * 2, || {
            let s = a.replicator()?;
            Ok((s.role == Role::Sender && s.protected).then_some(()))
        })?;
        pauses.push(one(&a, pages)?);
        if rest.is_none() {
            let status = a.vmm()?;
            if status.state != VmmState::Running {
                bail!("the benchmark's machine is {:?}", status.state);
            }
            let pid: u32 =
                fs::read_to_string(a.layout.vmm_pid())?.trim().parse().context("reading the VMM's pid file")?;
            rest = Some((status.kvm_backend, memory::of(pid)?, monitor(&a)?));
        }
        drop(b);
    }
    let (kvm_backend, memory, monitor_ms) = rest.context("nothing was measured")?;
    Ok(HostReport { kvm_backend, ram_mib: RAM_MIB, vcpus: VCPUS, pauses, memory, monitor_ms })
}

fn one(a: &Side, pages: u32) -> Result<Pauses> {
    let before = a.replicator()?;
    let started = Instant::now();
    // The measurement itself is a stretch of time; nothing is waited for.
    std::thread::sleep(MEASURE);
    let after = a.replicator()?;
    let seconds = started.elapsed().as_secs_f64();
    let epochs = (after.epochs - before.epochs).max(1) as f64;
    let raw = (after.raw_bytes - before.raw_bytes) as f64;
    let wire = (after.wire_bytes - before.wire_bytes) as f64;
    let pages_per_epoch = raw / epochs / 4096.0;
    Ok(Pauses {
        working_set_pages_per_vcpu: pages,
        epochs_per_s: epochs / seconds,
        pages_per_epoch,
        pause_p50_us: after.pause_p50_us,
        pause_p99_us: after.pause_p99_us,
        pause_max_us: after.pause_max_us,
        copy_limit_us: copy_limit_us(pages_per_epoch as usize),
        first_copy_ms: after.last_sync_ms,
        wire_ratio: wire / raw.max(1.0),
    })
}

/// How long the memory of this machine takes to copy that many pages: the median of some copies.
fn copy_limit_us(pages: usize) -> f64 {
    let from = vec![1u8; pages.max(1) * 4096];
    let mut to = vec![0u8; from.len()];
    let times = (0..32).map(|_| {
        let started = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        started.elapsed().as_secs_f64() * 1e6
    });
    Spread::of(times.collect()).median
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

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}
