//! Power cuts by the hundred in a real cluster, on this host itself: corosync, Pacemaker, our agents and fencing, two nodes and a board, and in
//! the machine the guest of [`crate::power_cuts`] as a kernel of its own. It needs no more of KVM than a few hundred instructions, so that this
//! runs where Linux as a guest does not, at the speed of real processors.
//!
//! ```text
//!  n1: corosync, Pacemaker, vmm, replicator ──► n2: the same         b1: pacemaker_remote, serial board
//!        └───────────── serial session ─────────────────────────────────────┘ │ TCP line
//!                                                          this program, at the lab's outer end: the device
//! ```
//! A cut is SIGKILL to a node's init, at a random moment. Whatever Pacemaker then does is waited for. The device wants every record once and in
//! order; the guest sees whether its memory is what it wrote, and whether its disk holds what it said and nothing else.
//!
//! | [`Event`] | | the machine |
//! |---|---|---|
//! | `Primary`, `Standby` | one node dies, and returns | goes on |
//! | `Both` | both die in one moment | boots from its disk |
//! | `Sequence` | the primary dies, then the one that took over, before it is protected again | boots from its disk |
//! | `Move` | `crm resource move` | goes on |
//!
//! A machine that boots knows nothing but its disk: it must hold every record that the device has seen. What a node's kernel had not written to its
//! disk yet is not lost here, as the kernel is this host's; `disk/src/sim.rs` loses that.

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
use crate::scenario::world::{BOUND, HOSTS, VMM_CLONE};

/// RAM of the machine: the guest needs 6 MiB.
const MEMORY_MIB: u64 = 64;
/// Kernel and mirrored disk, as a node sees them: on what a power cut does not take away.
const ON_NODE: &str = "/var/lib/understudy/demo";
/// The same directory on the node's disk.
const KERNEL_ON_DISK: &str = "understudy/demo";
/// A cut comes up to so long after everything is well.
const MOMENT: Duration = Duration::from_millis(2000);
/// The guest's disk. Shared, it is in the one directory that all nodes see and no power cut takes away. The guest uses 64 sectors.
const DISK: &str = "vda.raw";
const DISK_BYTES: usize = 1 << 20;
/// Port of the device.
const PORT: u16 = 4001;

/// What is done to the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Primary,
    Standby,
    Both,
    Sequence,
    Move,
}

/// How much of what, and on which storage.
#[derive(Debug, Clone, clap::Args)]
pub struct Mix {
    /// Cuts of one node: three in four of the one that runs the machine
    #[arg(long, default_value_t = 100)]
    pub count: usize,
    /// Cuts of both nodes in one moment: the machine boots from its disk
    #[arg(long, default_value_t = 0)]
    pub both: usize,
    /// Cuts of the primary, and then of the node that took over before the machine is protected again
    #[arg(long, default_value_t = 0)]
    pub sequence: usize,
    /// Planned moves
    #[arg(long, default_value_t = 0)]
    pub moves: usize,
    /// Storage of the disk: one that both nodes see, or one in each
    #[arg(long, value_enum, default_value = "shared")]
    pub disks: Disks,
    /// Of the random moments and their order [default: a new one]
    #[arg(long)]
    pub seed: Option<u64>,
}

/// Where the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Disks {
    /// One file that both nodes see.
    Shared,
    /// A file in each node.
    Mirrored,
}

impl Mix {
    /// All of it, in an order that `random` makes.
    fn shuffled(&self, random: &mut Random) -> Vec<Event> {
        let single = |random: &mut Random| if random.below(STANDBY) == 0 { Event::Standby } else { Event::Primary };
        let mut events: Vec<Event> = (0..self.count).map(|_| single(random)).collect();
        for (event, count) in [(Event::Both, self.both), (Event::Sequence, self.sequence), (Event::Move, self.moves)] {
            events.extend(std::iter::repeat_n(event, count));
        }
        random.shuffle(&mut events);
        events
    }
}

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Backend of the machine's KVM.
    pub kvm_backend: String,
    /// What the random moments were made from.
    pub seed: u64,
    /// Where the disk was.
    pub disks: Disks,
    /// Cuts of the node that the machine ran on.
    pub primary_cuts: usize,
    /// Cuts of the other one.
    pub standby_cuts: usize,
    /// Cuts of both in one moment.
    pub both_cuts: usize,
    /// Cuts of both, one after the other.
    pub sequences: usize,
    /// Planned moves.
    pub moves: usize,
    /// Boots after the first, each from a disk that held every record that had been seen.
    pub boots: u32,
    /// Most records that the disk held at a boot and nobody had seen.
    pub unseen: u32,
    /// Records that came, each exactly once and in order.
    pub records: u32,
    /// Bytes that the device wrote and the guest heard, each exactly once and in order.
    pub heard: u32,
    /// Longest silence at the device around a primary's cut, ms: detection, fencing, takeover.
    pub silence_ms: Spread,
    /// The same when both were cut: the nodes' boot and the machine's are in it.
    pub boot_silence_ms: Spread,
    /// The same around a planned move.
    pub move_silence_ms: Spread,
    /// From a cut until the machine is protected again, ms: the node boots and joins the cluster in it.
    pub protected_ms: Spread,
    /// What went wrong, if anything.
    pub failure: Option<String>,
}

impl Report {
    fn new(seed: u64, disks: Disks) -> Self {
        let none = || Spread::of(Vec::new());
        Self {
            kvm_backend: String::new(),
            seed,
            disks,
            primary_cuts: 0,
            standby_cuts: 0,
            both_cuts: 0,
            sequences: 0,
            moves: 0,
            boots: 0,
            unseen: 0,
            records: 0,
            heard: 0,
            silence_ms: none(),
            boot_silence_ms: none(),
            move_silence_ms: none(),
            protected_ms: none(),
            failure: None,
        }
    }
}

/// Do all of `mix`.
pub fn run(mix: &Mix, say: fn(&str)) -> Result<Report> {
    let seed = seed_or_new(mix.seed)?;
    let mut random = Random(seed | 1);
    let events = mix.shuffled(&mut random);
    say(&format!("{} events, {:?} disk (--seed {seed})", events.len(), mix.disks));
    let world = match World::empty(say) {
        Ok(world) => world,
        Err(why) => {
            let _ = Lab::down();
            return Err(why);
        }
    };
    let mut report = Report::new(seed, mix.disks);
    if let Err(why) = in_world(&world, &mut report, &events, random, say) {
        report.failure = Some(format!("{why:#}"));
        eprintln!("{}", world.describe());
    }
    world.down()?;
    Ok(report)
}

fn in_world(world: &World, report: &mut Report, events: &[Event], random: Random, say: fn(&str)) -> Result<()> {
    let line = listen(world)?;
    // Its number is in RDI for a flat guest; a kernel finds anything there.
    let code = [&[0x31, 0xff][..], guest::program()].concat();
    for node in HOSTS {
        let dir = world.lab.disk_file(node, KERNEL_ON_DISK)?;
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        fs::write(dir.join("vmlinuz"), pair::kernel(&code)).context("writing the guest's kernel")?;
        if report.disks == Disks::Mirrored {
            fs::write(dir.join(DISK), vec![0; DISK_BYTES]).context("making the disk")?;
        }
    }
    fs::write(Path::new(BMC_DIR).join(DISK), vec![0; DISK_BYTES]).context("making the disk")?;
    let policy = tempfile::NamedTempFile::new().context("making a file")?;
    fs::write(policy.path(), policy_text(report.disks)).context("writing the policy")?;
    world.configure(policy.path())?;
    let device = Device::start(line.accept().context("waiting for the board's line")?.0)?;
    let primary = world.wait_running(None)?;
    device.wait("records", BOUND, |seen| seen.number > 3)?;
    world.wait_protected()?;
    report.kvm_backend = world.vmm(primary)?.kvm_backend;

    let mut run = Run { world, device, primary, random, protected: Vec::new(), silences: Default::default() };
    let outcome = events.iter().enumerate().try_for_each(|(n, event)| {
        let what = format!("{} of {}: {event:?}, on {}", n + 1, events.len(), run.primary);
        say(&format!("{what}, after {} records", run.device.seen().number));
        run.event(*event).with_context(|| what)?;
        match event {
            Event::Primary => report.primary_cuts += 1,
            Event::Standby => report.standby_cuts += 1,
            Event::Both => report.both_cuts += 1,
            Event::Sequence => report.sequences += 1,
            Event::Move => report.moves += 1,
        }
        anyhow::Ok(())
    });
    let finished = outcome.and_then(|()| {
        run.device.be_quiet();
        run.device.wait("the guest has heard everything", BOUND, |seen| seen.heard == seen.written)
    });
    let seen = run.device.seen();
    (report.records, report.heard, report.boots, report.unseen) = (seen.number, seen.heard, seen.boots, seen.unseen);
    let [takeovers, boots, moves] = run.silences.map(Spread::of);
    (report.silence_ms, report.boot_silence_ms, report.move_silence_ms) = (takeovers, boots, moves);
    report.protected_ms = Spread::of(run.protected);
    finished?;
    let wanted = report.both_cuts + report.sequences;
    ensure!(usize::try_from(seen.boots)? == wanted, "the machine booted {} times again, not {wanted}", seen.boots);
    Ok(())
}

/// Where things stand between two events.
struct Run<'a> {
    world: &'a World,
    device: Device,
    primary: &'static str,
    random: Random,
    protected: Vec<f64>,
    /// Of takeovers, boots, moves.
    silences: [Vec<f64>; 3],
}

impl Run<'_> {
    fn event(&mut self, event: Event) -> Result<()> {
        let (world, primary, other) = (self.world, self.primary, World::other(self.primary));
        if matches!(event, Event::Both | Event::Sequence) {
            // What is under way to a machine that loses its memory is lost, and nobody promised otherwise.
            self.device.expect_boot(BOUND)?;
        }
        thread::sleep(MOMENT * u32::try_from(self.random.below(1000))? / 1000);
        self.device.take_silence();
        let seen = self.device.seen();
        let began = Instant::now();
        match event {
            Event::Primary => {
                world.lab.power_cut(primary)?;
                ensure!(world.wait_running(Some(primary))? == other, "the machine runs on the node that was cut");
            }
            Event::Standby => world.lab.power_cut(other)?,
            Event::Both => {
                let first = if self.random.below(2) == 0 { primary } else { other };
                self.cut_both(first)?;
            }
            Event::Sequence => {
                world.lab.power_cut(primary)?;
                world.wait_running(Some(primary))?;
                if self.random.below(2) == 0 {
                    self.device.wait("records after the first cut", BOUND, |now| now.number > seen.number + 100)?;
                }
                world.lab.power_cut(other)?;
            }
            Event::Move => {
                world.lab.run(primary, &["crm", "resource", "move", VMM_CLONE, other, "force"])?;
                let moved = world.wait_running(Some(primary));
                world.lab.run(other, &["crm", "resource", "clear", VMM_CLONE])?;
                ensure!(moved? == other, "the machine did not move");
            }
        }
        match event {
            Event::Both | Event::Sequence => {
                HOSTS.into_iter().try_for_each(|node| world.lab.boot(node))?;
                self.device.wait("the machine boots again", BOUND, |now| now.boots > seen.boots)?;
            }
            _ => {
                self.device.wait("records after it", BOUND, |now| now.number > seen.number + 100)?;
            }
        }
        let silence = ms(self.device.take_silence());
        match event {
            Event::Primary => self.silences[0].push(silence),
            Event::Standby => {}
            Event::Both | Event::Sequence => self.silences[1].push(silence),
            Event::Move => self.silences[2].push(silence),
        }
        match event {
            Event::Primary => world.boot(primary)?,
            Event::Standby => world.boot(other)?,
            _ => world.lab.wait_online(&HOSTS, BOUND)?,
        }
        self.primary = world.wait_protected()?;
        self.protected.push(ms(began.elapsed()));
        match event {
            Event::Primary | Event::Move => ensure!(self.primary == other, "the machine moved back by itself"),
            Event::Standby => ensure!(self.primary == primary, "the machine moved by itself"),
            // It boots wherever the cluster likes.
            Event::Both | Event::Sequence => {}
        }
        Ok(())
    }

    /// In one moment, as far as two threads go.
    fn cut_both(&self, first: &str) -> Result<()> {
        let lab = &self.world.lab;
        thread::scope(|scope| {
            let one = scope.spawn(|| lab.power_cut(first));
            let other = lab.power_cut(World::other(first));
            one.join().map_err(|_| anyhow::anyhow!("the thread that cuts the power ended"))?.and(other)
        })
    }
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
fn policy_text(disks: Disks) -> String {
    let demo = include_str!("../demo/policy.toml");
    let nodes = demo.split("[[machines]]").next().unwrap_or_default();
    let address = Plane::Business.address(OUTSIDE);
    let disk = match disks {
        Disks::Shared => format!("name=vda,file={BMC_DIR}/{DISK},format=raw"),
        Disks::Mirrored => {
            format!("name=vda,file={ON_NODE}/{DISK},format=raw,slices={ON_NODE}/{DISK}.row,mode=mirrored")
        }
    };
    format!(
        "{nodes}[[machines]]\nname = \"demo\"\nmemory = {MEMORY_MIB}\nvcpus = 1\nkernel = \"{ON_NODE}/vmlinuz\"\n\
         disks = [\"{disk}\"]\n\
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
        ("of both nodes", format!("{} at once, {} one after the other", report.both_cuts, report.sequences)),
        ("planned moves", report.moves.to_string()),
        ("boots from the disk", format!("{}, which held at most {} records unseen", report.boots, report.unseen)),
        ("records from the guest", format!("{}{order}", report.records)),
        ("bytes to the guest", format!("{}{order}", report.heard)),
        ("silence at the device", format!("{} ms", report.silence_ms)),
        ("  when both were cut", format!("{} ms", report.boot_silence_ms)),
        ("  around a move", format!("{} ms", report.move_silence_ms)),
        ("protected again after", format!("{} ms", report.protected_ms)),
    ];
    rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")).collect()
}
