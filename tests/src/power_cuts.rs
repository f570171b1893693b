//! Power cuts by the hundred, on the host's own KVM: two hosts of real processes (VMM and replicator), a real serial board between the
//! machine and a device, and this program in Pacemaker's place. What the lab does with a whole cluster in a minute or two a cut,
//! without the cluster in about a second.
//!
//! ```text
//!  a: understudy-vmm + understudy-replicator ──epochs──► b: the same, standing by
//!        └──── serial session ────► understudy-serial ◄────┘ (after a takeover)
//!                                        │ TCP line
//!                                     device: every record once and in order, or it is over
//!  a, b ──► one disk and its slices, or each its own (mirrored); the guest says nothing that is not on it, and compares what it holds with what
//!           it knows
//! ```
//! A cut kills both processes of a host in one moment, at a random one, and takes away what a reboot takes away (its tmpfs). If the machine
//! ran there the other side takes over, unless the veto stands: this program keeps the rules that the agents keep. The host comes back
//! empty, and protection must return.

pub(crate) mod device;
pub(crate) mod guest;
pub(crate) mod unredirected;

use std::fs::{self, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use understudy_disk::LocalDirectory;
use understudy_protocol::control::{
    PromoteFrom, ReplicatorRequest, Role, TakenOver, VerifyStarted, VmmRequest, VmmState, call_once,
};
use understudy_protocol::ids::Generation;
use understudy_protocol::statistics::DiskVerifyStatus;

use self::device::Device;
use crate::bench::Spread;
use crate::bench::pair::{BOUND, Process, Setup, Side, free_port, keygen};
use crate::lab::vm::random_token;
use crate::lab::{places, wait_for};

/// RAM: the guest has 2 MiB for each vCPU, from 4 MiB on.
const MEMORY_MIB: u64 = 32;
/// The guest's disk, which both hosts see and no power cut takes away: it uses 64 sectors.
const DISK_BYTES: usize = 1 << 20;
/// A cut comes up to so long after everything is well.
const MOMENT: Duration = Duration::from_millis(400);
/// One cut in so many is the standby's.
pub(crate) const STANDBY: u64 = 4;
/// A machine on a host with other work may say nothing for a while; what is lost must be lost by the cut.
const PEER_TIMEOUT_MS: u64 = 15_000;

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Backend of the machine's KVM.
    pub kvm_backend: String,
    /// What the random moments were made from.
    pub seed: u64,
    /// Cuts of the host that the machine ran on.
    pub primary_cuts: usize,
    /// Cuts of the other one.
    pub standby_cuts: usize,
    /// Records that came, each exactly once and in order.
    pub records: u32,
    /// Bytes that the device wrote and the guest heard, each exactly once and in order.
    pub heard: u32,
    /// From a primary's cut until the standby's VMM says that the machine runs there, ms.
    pub takeover_ms: Spread,
    /// Longest silence at the device around a primary's cut, ms.
    pub silence_ms: Spread,
    /// From a cut until the machine is protected again, ms.
    pub protected_ms: Spread,
}

/// How the guest's disk is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disks {
    /// Both hosts see one disk.
    Shared,
    /// Each has its own. One cut in [`LOST`] takes the disk of the host away too.
    Mirrored,
    /// Shared, and after each cut as if writes had gone to the disk itself, which must be noticed.
    Unredirected,
}

/// See [`Disks::Mirrored`].
const LOST: u64 = 5;

/// Cut `count` times.
pub fn run(count: usize, seed: Option<u64>, disks: Disks, say: &dyn Fn(&str)) -> Result<Report> {
    let seed = seed_or_new(seed)?;
    let mut random = Random(seed | 1);
    say(&format!("{count} power cuts (--seed {seed})"));
    let mut world = World::start(disks)?;
    let (mut takeovers, mut silences, mut protected) = (Vec::new(), Vec::new(), Vec::new());
    let (mut primary_cuts, mut standby_cuts) = (0, 0);
    let mut said = Instant::now();
    for cut in 1..=count {
        let one = world.cut(&mut random);
        let one =
            one.with_context(|| format!("power cut {cut} of {count} (--seed {seed})")).map_err(|e| world.explain(e))?;
        match one.takeover {
            Some(takeover) => {
                primary_cuts += 1;
                takeovers.push(ms(takeover));
                silences.push(ms(one.silence));
            }
            None => standby_cuts += 1,
        }
        protected.push(ms(one.protected));
        if said.elapsed() > Duration::from_secs(5) {
            said = Instant::now();
            say(&format!("{cut} of {count} cuts, {} records", world.device.seen().number));
        }
    }
    world.finish().map_err(|e| world.explain(e))?;
    let seen = world.device.seen();
    Ok(Report {
        kvm_backend: world.sides[world.primary].vmm()?.kvm_backend,
        seed,
        primary_cuts,
        standby_cuts,
        records: seen.number,
        heard: seen.heard,
        takeover_ms: Spread::of(takeovers),
        silence_ms: Spread::of(silences),
        protected_ms: Spread::of(protected),
    })
}

pub(crate) fn seed_or_new(seed: Option<u64>) -> Result<u64> {
    seed.map_or_else(|| Ok(u64::from_str_radix(&random_token()?[..16], 16)?), Ok)
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// xorshift64*: a seed makes a run again, as far as processes allow.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Any order is as likely as any other.
    pub(crate) fn shuffle<T>(&mut self, all: &mut [T]) {
        for at in (1..all.len()).rev() {
            all.swap(at, self.below(at as u64 + 1) as usize);
        }
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound.max(1)
    }
}

/// One cut.
struct One {
    /// Not for a standby's.
    takeover: Option<Duration>,
    silence: Duration,
    protected: Duration,
}

const NAMES: [&str; 2] = ["a", "b"];

struct World {
    device: Device,
    sides: [Side; 2],
    primary: usize,
    generation: u64,
    setup: Setup,
    disks: Disks,
    peers: String,
    _board: Process,
    // Last, so that it outlives the processes.
    dir: tempfile::TempDir,
}

impl World {
    fn start(disks: Disks) -> Result<Self> {
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let at = dir.path();
        fs::write(at.join("code"), guest::program()).context("writing the guest's program")?;
        let hook = key_and_hook(at)?;
        let line = TcpListener::bind("127.0.0.1:0").context("listening for the board's line")?;
        let port = free_port()?;
        let board = start_board(at, port, line.local_addr()?.port())?;
        let device = Device::start(line.accept().context("waiting for the board's line")?.0)?;
        let serial = format!("board:127.0.0.1:{port}/com1,key={}", at.join("key").display());
        fs::write(disk_of(at, disks, 0), vec![0; DISK_BYTES]).context("making the disk")?;
        let more = ["--pipeline", "3", "--peer-timeout-ms"].map(str::to_owned);
        let setup = Setup {
            serial: Some(serial),
            hook: Some(hook),
            replicator: more.into_iter().chain([PEER_TIMEOUT_MS.to_string()]).collect(),
            ..Setup::new(MEMORY_MIB)
        };
        let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
        let sides = [Side::new(at, NAMES[0])?, Side::new(at, NAMES[1])?];
        let mut this = Self { device, sides, primary: 0, generation: 1, setup, disks, peers, _board: board, dir };
        this.boot(1)?;
        this.boot(0)?;
        this.generation = this.sides[0].vmm()?.generation.0;
        this.sides[0].ask_replicator::<()>(&ReplicatorRequest::Promote)?;
        this.wait_protected().map_err(|e| this.explain(e))?;
        Ok(this)
    }

    /// Start what runs on a host; as a standby, unless it is the primary.
    fn boot(&mut self, side: usize) -> Result<()> {
        let (dir, name) = (self.dir.path(), NAMES[side]);
        let mode = if self.disks == Disks::Mirrored { ",mode=mirrored" } else { "" };
        let disk = disk_of(dir, self.disks, side);
        let disk = format!("name=vda,file={},format=raw{mode}", disk.display());
        self.setup.disk = Some(disk.parse().context("naming the disk")?);
        self.sides[side].start_vmm(dir, name, &self.setup, side != self.primary)?;
        self.sides[side].start_replicator(dir, name, &self.peers, &self.setup)
    }

    fn wait_protected(&self) -> Result<()> {
        wait_for("the machine protected", BOUND * 2, || {
            let status = self.sides[self.primary].replicator()?;
            let well = status.role == Role::Sender && status.protected && !veto(self.dir.path()).exists();
            Ok(well.then_some(()))
        })?;
        let from = self.device.seen().number;
        self.device.wait("records while protected", BOUND, |seen| seen.number > from + 3)
    }

    fn cut(&mut self, random: &mut Random) -> Result<One> {
        std::thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
        self.device.take_silence();
        let (primary, standby) = (self.primary, 1 - self.primary);
        let victim = if random.below(STANDBY) == 0 { standby } else { primary };
        let began = Instant::now();
        self.sides[victim].cut_power(random.below(2) == 0)?;
        let mut takeover = None;
        if victim == primary {
            ensure!(
                !veto(self.dir.path()).exists(),
                "the machine ran unprotected when it was cut (the veto stands): the host was too busy for this test"
            );
            self.generation += 1;
            let generation = Generation(self.generation);
            let next = &self.sides[standby];
            let taken: TakenOver = next.ask_replicator(&ReplicatorRequest::TakeOver { generation })?;
            let image = taken.image.context("the standby has no image of a protected machine")?;
            if self.disks == Disks::Unredirected {
                let disk = disk_of(self.dir.path(), self.disks, standby);
                let slices = LocalDirectory::beside(&disk);
                unredirected::forget_redirection(&disk, &slices, Path::new(&image.state_file))?;
            }
            let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
            call_once::<_, ()>(next.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, BOUND)?;
            takeover = Some(began.elapsed());
            next.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
            self.primary = standby;
        }
        let from = self.device.seen().number;
        self.device.wait("records after the cut", BOUND, |seen| seen.number > from + 3)?;
        let silence = self.device.take_silence();
        if self.disks == Disks::Mirrored && random.below(LOST) == 0 {
            let disk = disk_of(self.dir.path(), self.disks, victim);
            fs::remove_file(&disk).context("taking a disk away")?;
            fs::remove_dir_all(LocalDirectory::beside(&disk)).context("taking its slices away")?;
        }
        self.boot(victim)?;
        self.wait_protected()?;
        let state = self.sides[self.primary].vmm()?.state;
        ensure!(state == VmmState::Running, "the machine is {state:?}");
        Ok(One { takeover, silence, protected: began.elapsed() })
    }

    /// Nothing is under way any more: what was written must have been heard.
    fn finish(&self) -> Result<()> {
        self.device.be_quiet();
        self.device.wait("the guest has heard everything", BOUND, |seen| seen.heard == seen.written)?;
        if self.disks == Disks::Mirrored { self.compare() } else { Ok(()) }
    }

    /// The disk and its copy are the same; and a byte that is not is found.
    fn compare(&self) -> Result<()> {
        let same = verified(&self.sides[self.primary], BOUND)?;
        let whole = DISK_BYTES as u64;
        ensure!(
            same.differing_bytes == 0 && (same.done_bytes, same.total_bytes) == (whole, whole),
            "the disk and its copy were compared: {}",
            same.last
        );
        let copy = disk_of(self.dir.path(), self.disks, 1 - self.primary);
        let copy = OpenOptions::new().read(true).write(true).open(copy).context("opening the copy")?;
        let mut byte = [0];
        copy.read_exact_at(&mut byte, whole - 1)?;
        copy.write_all_at(&[byte[0] ^ 1], whole - 1)?;
        let differs = verified(&self.sides[self.primary], BOUND)?;
        ensure!(
            differs.last.contains("FAILED") && differs.differing_bytes > 0,
            "a byte of the copy was changed, and the comparison says: {}",
            differs.last
        );
        Ok(())
    }

    /// With the end of everybody's log.
    fn explain(&self, e: anyhow::Error) -> anyhow::Error {
        let logs = ["a-vmm", "a-replicator", "b-vmm", "b-replicator", "board"].map(|name| {
            let text = fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
            let from = text.lines().count().saturating_sub(12);
            format!("--- {name}\n{}", text.lines().skip(from).collect::<Vec<_>>().join("\n"))
        });
        let seen = self.device.seen();
        e.context(format!("{}\n--- device\n{seen:?}\n", logs.join("\n")))
    }
}

/// The file of a host's disk.
fn disk_of(dir: &Path, disks: Disks, side: usize) -> PathBuf {
    dir.join(if disks == Disks::Mirrored { format!("disk-{}", NAMES[side]) } else { "disk".to_owned() })
}

/// Compare the mirrored disks of the machine that `primary` runs with their copies, and wait for the result.
pub(crate) fn verified(primary: &Side, bound: Duration) -> Result<DiskVerifyStatus> {
    let VerifyStarted { pass } = primary.ask_replicator(&ReplicatorRequest::VerifyDisks)?;
    wait_for("the disk compared with its copy", bound, || {
        let verify = primary.replicator()?.disk_verify;
        Ok((verify.pass == pass && !verify.running).then_some(verify))
    })
}

/// Write the key that both hosts have, and what records a veto: it is durable here while its file is there. The replicator's hook.
pub(crate) fn key_and_hook(dir: &Path) -> Result<String> {
    keygen(&dir.join("key"))?;
    let hook = dir.join("hook");
    let script = format!("case $1 in veto) : > {0};; clear-veto) rm -f {0};; esac\n", veto(dir).display());
    fs::write(&hook, script).context("writing the hook")?;
    Ok(format!("/bin/sh {}", hook.display()))
}

pub(crate) fn veto(dir: &Path) -> PathBuf {
    dir.join("veto")
}

pub(crate) fn start_board(dir: &Path, port: u16, line: u16) -> Result<Process> {
    let mut board = Command::new(places::bin_dir()?.join("understudy-serial"));
    board.args(["run", "--machine", crate::bench::pair::MACHINE, "--device", "com1"]);
    board.arg("--run-dir").arg(dir.join("board")).arg("--state-dir").arg(dir.join("board-state"));
    board.arg("--listen").arg(format!("127.0.0.1:{port}")).arg("--key").arg(dir.join("key"));
    board.arg("--line").arg(format!("tcp:127.0.0.1:{line}"));
    for made in ["board", "board-state"] {
        fs::create_dir(dir.join(made)).context("making the board's directories")?;
    }
    Process::start(&board, &dir.join("board.log"))
}

/// For people.
pub fn table(report: &Report) -> String {
    let rows = [
        ("power cuts", format!("{} of the primary, {} of the standby", report.primary_cuts, report.standby_cuts)),
        ("records from the guest", format!("{}, every one once and in order", report.records)),
        ("bytes to the guest", format!("{}, every one once and in order", report.heard)),
        ("machine runs elsewhere after", format!("{} ms", report.takeover_ms)),
        ("silence at the device", format!("{} ms", report.silence_ms)),
        ("protected again after", format!("{} ms", report.protected_ms)),
    ];
    rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")).collect()
}
