//! Power cuts by the hundred in a real cluster, on this host itself: corosync, Pacemaker, our agents and fencing, two nodes and a board, and in
//! the machine the guest of [`crate::power_cuts`] as a kernel of its own. It needs no more of KVM than a few hundred instructions, so that this
//! runs where Linux as a guest does not, at the speed of real processors.
//!
//! ```text
//!  n1: corosync, Pacemaker, vmm, replicator ──► n2: the same         b1: pacemaker_remote, serial board
//!        └───────────── serial session ─────────────────────────────────────┘ │ TCP line
//!                                                          this program, at the lab's outer end: the device
//! ```
//! A cut is SIGKILL to a node's init, at a random moment; three in four hit the node that runs the machine. Whatever Pacemaker then does is
//! waited for. The device wants every record once and in order; the guest sees whether its memory is what it wrote, and whether its disk (shared
//! storage) holds what it said and nothing else.

use std::fs;
use std::net::{SocketAddrV4, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;

use crate::bench::{Spread, pair};
use crate::lab::Lab;
use crate::lab::net::{OUTSIDE, Plane};
use crate::lab::places::BMC_DIR;
use crate::power_cuts::device::Device;
use crate::power_cuts::{Random, STANDBY, guest, ms, seed_or_new};
use crate::scenario::World;
use crate::scenario::world::{BOUND, HOSTS};

/// RAM of the machine: the guest needs 6 MiB.
const MEMORY_MIB: u64 = 64;
/// Where the policy says the kernel is.
const KERNEL: &str = "/var/lib/understudy/demo/vmlinuz";
/// The same, on the node's disk.
const KERNEL_ON_DISK: &str = "understudy/demo";
/// A cut comes up to so long after everything is well.
const MOMENT: Duration = Duration::from_millis(2000);
/// The guest's disk: shared storage, in the one directory that all nodes see and no power cut takes away. It uses 64 sectors.
const DISK: &str = "vda.raw";
const DISK_BYTES: usize = 1 << 20;
/// Port of the device.
const PORT: u16 = 4001;

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Backend of the machine's KVM.
    pub kvm_backend: String,
    /// What the random moments were made from.
    pub seed: u64,
    /// Cuts of the node that the machine ran on.
    pub primary_cuts: usize,
    /// Cuts of the other one.
    pub standby_cuts: usize,
    /// Records that came, each exactly once and in order.
    pub records: u32,
    /// Bytes that the device wrote and the guest heard, each exactly once and in order.
    pub heard: u32,
    /// Longest silence at the device around a primary's cut, ms: detection, fencing, takeover.
    pub silence_ms: Spread,
    /// From a cut until the machine is protected again, ms: the node boots and joins the cluster in it.
    pub protected_ms: Spread,
    /// What went wrong, if anything.
    pub failure: Option<String>,
}

/// Cut `count` times.
pub fn run(count: usize, seed: Option<u64>, say: fn(&str)) -> Result<Report> {
    let seed = seed_or_new(seed)?;
    say(&format!("{count} power cuts of cluster nodes (--seed {seed})"));
    let world = match World::empty(say) {
        Ok(world) => world,
        Err(why) => {
            let _ = Lab::down();
            return Err(why);
        }
    };
    let mut report = Report {
        kvm_backend: String::new(),
        seed,
        primary_cuts: 0,
        standby_cuts: 0,
        records: 0,
        heard: 0,
        silence_ms: Spread::of(Vec::new()),
        protected_ms: Spread::of(Vec::new()),
        failure: None,
    };
    if let Err(why) = in_world(&world, &mut report, count, say) {
        report.failure = Some(format!("{why:#}"));
        eprintln!("{}", world.describe());
    }
    world.down()?;
    Ok(report)
}

fn in_world(world: &World, report: &mut Report, count: usize, say: fn(&str)) -> Result<()> {
    let line = listen(world)?;
    // Its number is in RDI for a flat guest; a kernel finds anything there.
    let code = [&[0x31, 0xff][..], guest::program()].concat();
    for node in HOSTS {
        let dir = world.lab.disk_file(node, KERNEL_ON_DISK)?;
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        fs::write(dir.join("vmlinuz"), pair::kernel(&code)).context("writing the guest's kernel")?;
    }
    fs::write(Path::new(BMC_DIR).join(DISK), vec![0; DISK_BYTES]).context("making the disk")?;
    let policy = tempfile::NamedTempFile::new().context("making a file")?;
    fs::write(policy.path(), policy_text()).context("writing the policy")?;
    world.configure(policy.path())?;
    let device = Device::start(line.accept().context("waiting for the board's line")?.0)?;
    let mut primary = world.wait_running(None)?;
    device.wait("records", BOUND, |seen| seen.number > 3)?;
    world.wait_protected()?;
    report.kvm_backend = world.vmm(primary)?.kvm_backend;

    let mut random = Random(report.seed | 1);
    let (mut silences, mut protected) = (Vec::new(), Vec::new());
    let outcome = (1..=count).try_for_each(|n| {
        thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
        let other = World::other(primary);
        let victim = if random.below(STANDBY) == 0 { other } else { primary };
        let seen = device.seen();
        say(&format!("power cut {n} of {count}: {victim}, after {} records", seen.number));
        device.take_silence();
        let began = Instant::now();
        world.lab.power_cut(victim)?;
        if victim == primary {
            ensure!(world.wait_running(Some(primary))? == other, "the machine runs on the node that was cut");
            primary = other;
        }
        device.wait("records after the cut", BOUND, |now| now.number > seen.number + 100)?;
        let silence = device.take_silence();
        world.boot(victim)?;
        ensure!(world.wait_protected()? == primary, "the machine moved by itself");
        protected.push(ms(began.elapsed()));
        if victim == other {
            report.standby_cuts += 1;
        } else {
            silences.push(ms(silence));
            report.primary_cuts += 1;
        }
        anyhow::Ok(())
    });
    let finished = outcome.and_then(|()| {
        device.be_quiet();
        device.wait("the guest has heard everything", BOUND, |seen| seen.heard == seen.written)
    });
    let seen = device.seen();
    (report.records, report.heard) = (seen.number, seen.heard);
    (report.silence_ms, report.protected_ms) = (Spread::of(silences), Spread::of(protected));
    finished
}

/// A listener at the lab's outer end. (A socket stays in the network namespace that it was made in.)
fn listen(world: &World) -> Result<TcpListener> {
    let lab = world.lab.status()?.pid;
    let address = SocketAddrV4::new(Plane::Business.address(OUTSIDE), PORT);
    let listening = thread::spawn(move || {
        let net = fs::File::open(format!("/proc/{lab}/ns/net")).context("opening the lab's network")?;
        setns(net.as_fd(), CloneFlags::CLONE_NEWNET).context("joining the lab's network")?;
        TcpListener::bind(address).with_context(|| format!("listening on {address}"))
    });
    listening.join().map_err(|_| anyhow::anyhow!("the thread that listens ended"))?
}

/// The demo's cluster, with this machine in it.
fn policy_text() -> String {
    let demo = include_str!("../demo/policy.toml");
    let nodes = demo.split("[[machines]]").next().unwrap_or_default();
    let address = Plane::Business.address(OUTSIDE);
    format!(
        "{nodes}[[machines]]\nname = \"demo\"\nmemory = {MEMORY_MIB}\nvcpus = 1\nkernel = \"{KERNEL}\"\n\
         disks = [\"name=vda,file={BMC_DIR}/{DISK},format=raw\"]\n\
         protection = \"protected\"\npeer_timeout_ms = 8000\nprimary = \"n1\"\nstandby = \"n2\"\n\n\
         [[machines.serial]]\nguest = \"com1\"\nboard = \"b1\"\ndevice = \"com1\"\nline = \"tcp:{address}:{PORT}\"\n"
    )
}

/// For people.
pub fn table(report: &Report) -> String {
    // What went wrong may be just that.
    let order = if report.failure.is_none() { ", every one once and in order" } else { " until it FAILED" };
    let rows = [
        ("power cuts", format!("{} of the primary, {} of the standby", report.primary_cuts, report.standby_cuts)),
        ("records from the guest", format!("{}{order}", report.records)),
        ("bytes to the guest", format!("{}{order}", report.heard)),
        ("silence at the device", format!("{} ms", report.silence_ms)),
        ("protected again after", format!("{} ms", report.protected_ms)),
    ];
    rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")).collect()
}
