//! Where the nodes run: the whole road, with a Linux guest under Pacemaker.
//!
//! In the lab VM everything is software-emulated: these figures compare things with each other, and their absolute values say
//! nothing about a host with full KVM.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::memory::VmmMemory;
use super::{Spread, memory, time_process};
use crate::lab::vm::random_token;
use crate::lab::{Lab, host, places};
use crate::scenario::world::MACHINE;
use crate::scenario::{Outage, World};

/// Most time to a first byte.
const FIRST_BYTE_BOUND: Duration = Duration::from_secs(120);

/// The lab part of the report.
#[derive(Debug, Default, Serialize)]
pub struct LabReport {
    /// Host or lab VM, and why.
    pub where_it_ran: String,
    /// KVM flavour under the protected machine.
    pub kvm_backend: String,
    /// From the start of the process to the guest kernel's first byte on its serial port, ms.
    pub first_byte_understudy_ms: Spread,
    /// The same kernel and initrd under QEMU in the same place.
    pub first_byte_qemu_ms: Spread,
    /// `ocf:understudy:vmm monitor` on the node that runs the machine, whole process, ms.
    pub monitor_understudy_ms: Spread,
    /// `ocf:pacemaker:Dummy monitor`, a shell agent, in the same place.
    pub monitor_dummy_ms: Spread,
    /// Memory of the primary's VMM with the Linux guest.
    pub memory: VmmMemory,
    /// First copy of the Linux guest, ms.
    pub first_copy_ms: u64,
    /// One for each power cut.
    pub power_cuts: Vec<Outage>,
    /// What went wrong, if anything: the figures after it are missing.
    pub failure: Option<String>,
}

/// Measure everything of this part; `cuts` power cuts. What was measured before something failed is in the report too.
pub fn measure(policy: &Path, cuts: usize, say: fn(&str)) -> Result<LabReport> {
    let mut report = LabReport { where_it_ran: host::choose()?.1, ..LabReport::default() };
    say("first serial byte, beside QEMU");
    (report.first_byte_understudy_ms, report.first_byte_qemu_ms) = first_bytes(5)?;
    let mut world = match World::up(policy, say) {
        Ok(world) => world,
        Err(why) => {
            let _ = Lab::down();
            return Err(why);
        }
    };
    if let Err(why) = in_world(&mut world, &mut report, cuts, say) {
        report.failure = Some(format!("{why:#}"));
        eprintln!("{}", world.describe());
    }
    world.down()?;
    Ok(report)
}

fn in_world(world: &mut World, report: &mut LabReport, cuts: usize, say: fn(&str)) -> Result<()> {
    let mut primary = world.wait_running(None)?;
    world.wait_lines(20)?;
    world.wait_protected()?;
    report.kvm_backend = world.vmm(primary)?.kvm_backend;
    report.first_copy_ms = world.replicator(primary)?.last_sync_ms;
    say("an agent's monitor, beside a shell agent");
    let (ours, code) = time_process(20, || agent(world, primary, "understudy/vmm"))?;
    ensure!(code == 0 || code == 8, "the monitor of the running machine returned {code}");
    report.monitor_understudy_ms = ours;
    report.monitor_dummy_ms = time_process(20, || agent(world, primary, "pacemaker/Dummy"))?.0;
    report.memory = vmm_memory(world, primary)?;
    for n in 1..=cuts {
        say(&format!("power cut {n} of {cuts}: {primary}"));
        thread::sleep(random_moment()?);
        let other = World::other(primary);
        let mut outage = Outage::begin(format!("power cut {n}: {primary}"));
        world.lab.power_cut(primary)?;
        ensure!(world.wait_running(Some(primary))? == other, "the machine runs on the node that was cut");
        world.wait_lines(20)?;
        outage.collect(world, other)?;
        // Measured already, whatever the node's return brings.
        report.power_cuts.push(outage);
        world.boot(primary)?;
        primary = world.wait_protected()?;
        ensure!(primary == other, "the machine moved back to {primary} by itself");
        if let Some(outage) = report.power_cuts.last_mut() {
            outage.protected_ms = places::now_ms().checked_sub(outage.at_ms);
        }
        world.wait_lines(50)?;
    }
    let verdict = world.final_verdict()?;
    ensure!(verdict.ok, "the device saw violations, so these figures are worth nothing: {verdict:?}");
    Ok(())
}

/// An agent's monitor as Pacemaker calls it, with the parameters that the cluster has for it.
fn agent(world: &World, node: &str, agent: &str) -> Result<Command> {
    let mut command = world.lab.command(node, &format!("/usr/lib/ocf/resource.d/{agent}"))?;
    command.arg("monitor").env("OCF_ROOT", "/usr/lib/ocf").env("OCF_RESOURCE_INSTANCE", "bench");
    command.env("OCF_RESKEY_name", MACHINE).env("OCF_RESKEY_kernel", "/var/lib/understudy/demo/vmlinuz");
    command.env("OCF_RESKEY_memory", "512").env("OCF_RESKEY_vcpus", "2").env("OCF_RESKEY_CRM_meta_timeout", "20000");
    Ok(command)
}

/// Up to a second: cuts must not fall on the beat of the polls before them.
fn random_moment() -> Result<Duration> {
    let token = random_token()?;
    Ok(Duration::from_millis(u64::from_str_radix(&token[..8], 16)? % 1000))
}

fn vmm_memory(world: &World, node: &str) -> Result<VmmMemory> {
    let script = format!("cat /proc/$(cat /run/understudy/{MACHINE}/vmm.pid)/smaps");
    Ok(memory::parse(&world.lab.run(node, &["sh", "-c", &script])?))
}

/// Start the demo guest under both VMMs in turn.
fn first_bytes(runs: usize) -> Result<(Spread, Spread)> {
    let kernel = places::root_dir()?.join("boot/vmlinuz");
    let initrd = places::lab_dir()?.join("guest/initrd");
    let cmdline = "console=ttyS0";
    let (mut ours, mut qemus) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let dir = tempfile::tempdir_in("/dev/shm")?;
        let serial = dir.path().join("serial");
        let mut command = Command::new(places::bin_dir()?.join("understudy-vmm"));
        command.args(["run", "--machine", "first-byte", "--memory", "512", "--vcpus", "2", "--cmdline", cmdline]);
        command.arg("--kernel").arg(&kernel).arg("--initrd").arg(&initrd);
        command.arg("--run-root").arg(dir.path().join("run")).arg("--shm-root").arg(dir.path().join("shm"));
        command.arg("--serial0").arg(format!("file:{}", serial.display()));
        ours.push(first_byte(command, &serial).context("the first byte under understudy-vmm")?);

        let serial = dir.path().join("qemu");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "kvm", "-cpu", "host", "-m", "512", "-smp", "2", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-append", cmdline, "-no-reboot"]);
        command.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initrd);
        command.arg("-serial").arg(format!("file:{}", serial.display()));
        qemus.push(first_byte(command, &serial).context("the first byte under QEMU")?);
    }
    Ok((Spread::of(ours), Spread::of(qemus)))
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn first_byte(mut command: Command, serial: &Path) -> Result<f64> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = Killed(command.spawn().with_context(|| format!("starting {command:?}"))?);
    // Not `wait_for`, whose questions become rare: the answer is a measurement.
    while !fs::metadata(serial).is_ok_and(|m| m.len() > 0) {
        ensure!(started.elapsed() < FIRST_BYTE_BOUND, "not within {} s", FIRST_BYTE_BOUND.as_secs());
        if let Some(status) = child.0.try_wait()? {
            let mut said = String::new();
            if let Some(mut stderr) = child.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut said)?;
            }
            bail!("it ended ({status}): {said}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(started.elapsed().as_secs_f64() * 1000.0)
}
