//! Packets never lie: power cuts and switchovers by the hundred on the host's own KVM, seen from the network. Two hosts of real processes as in
//! [`crate::power_cuts`], each with a tap on one bridge, and a client there that is neither.
//!
//! The guest counts in its memory, and every packet that it sends carries the count ([`guest`]). Whoever goes on from an image that had not sent what was
//! seen tells a number again ([`judge`]). After each host's death the image that takes over is also asked itself: nothing that was seen may be beyond it. The
//! first packets of a new life tell the network where the guest is now.

pub mod bulk;
pub mod calm;
pub mod guest;
pub mod judge;
mod network;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use understudy_protocol::control::{
    HandedOver, PromoteFrom, ReplicatorRequest, Role, TakenOver, VmmRequest, VmmState, call_once,
};
use understudy_protocol::ids::Generation;
use understudy_protocol::nic::Mac;

use self::network::{BRIDGE, Network};
use crate::bench::Spread;
use crate::bench::pair::{BOUND, Setup, Side, free_port};
use crate::lab::wait_for;
use crate::power_cuts::{Random, STANDBY, key_and_hook, ms, seed_or_new, veto};

/// RAM.
const MEMORY_MIB: u64 = 32;
/// A cut comes up to so long after everything is well.
const MOMENT: Duration = Duration::from_millis(400);
/// One event in so many is a planned switchover.
const MOVE: u64 = 4;
/// A machine on a host with other work may say nothing for a while; what is lost must be lost by the cut.
const PEER_TIMEOUT_MS: u64 = 15_000;
const NAMES: [&str; 2] = ["a", "b"];

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Cuts and switchovers.
    pub count: usize,
    /// Of the random moments.
    pub seed: Option<u64>,
    /// Negative control: packets do not wait for their commit.
    pub leak: bool,
    /// Between two checkpoints, ms.
    pub interval_ms: u64,
    /// At least, when packets wait, ms.
    pub min_interval_ms: u64,
}

/// What was seen.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Backend of the machine's KVM.
    pub kvm_backend: String,
    /// What the random moments were made from.
    pub seed: u64,
    /// Between two checkpoints, ms.
    pub interval_ms: u64,
    /// At least, when packets wait, ms.
    pub min_interval_ms: u64,
    /// Cuts of the host that the machine ran on.
    pub primary_cuts: usize,
    /// Cuts of the other one.
    pub standby_cuts: usize,
    /// Planned switchovers.
    pub moves: usize,
    /// Packets with the guest's witness.
    pub packets: u64,
    /// Questions that were answered.
    pub answers: u64,
    /// Announcements.
    pub announcements: u64,
    /// From a primary's cut until the standby's VMM says that the machine runs there, ms.
    pub takeover_ms: Spread,
    /// Longest silence of the guest around a primary's cut, ms.
    pub gap_ms: Percentiles,
    /// The same around a switchover, ms.
    pub move_gap_ms: Percentiles,
    /// From a question to its answer while the machine is protected, ms.
    pub answer_ms: Percentiles,
}

/// Of a number of values.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Percentiles {
    /// How many.
    pub runs: usize,
    /// Half of them are below.
    pub p50: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// All are.
    pub max: f64,
}

impl Percentiles {
    /// Of none it is all zero.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            values.get((values.len() * percent).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Self { runs: values.len(), p50: at(50), p99: at(99), max: at(100) }
    }
}

impl std::fmt::Display for Percentiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {:.1}, p99 {:.1}, max {:.1} ({})", self.p50, self.p99, self.max, self.runs)
    }
}

/// Cut and move.
pub fn run(options: &Options, say: &dyn Fn(&str)) -> Result<Report> {
    let seed = seed_or_new(options.seed)?;
    let mut random = Random(seed | 1);
    say(&format!("{} cuts and switchovers (--seed {seed})", options.count));
    let mut world = World::start(options)?;
    let mut report = Report {
        kvm_backend: world.sides[0].vmm()?.kvm_backend,
        seed,
        interval_ms: options.interval_ms,
        min_interval_ms: options.min_interval_ms,
        primary_cuts: 0,
        standby_cuts: 0,
        moves: 0,
        packets: 0,
        answers: 0,
        announcements: 0,
        takeover_ms: Spread::of(Vec::new()),
        gap_ms: Percentiles::default(),
        move_gap_ms: Percentiles::default(),
        answer_ms: Percentiles::default(),
    };
    let (mut takeovers, mut gaps, mut moves, mut answers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for n in 1..=options.count {
        let event = world.event(&mut random, &mut answers);
        let event = event
            .with_context(|| format!("event {n} of {} (--seed {seed})", options.count))
            .map_err(|e| world.explain(e))?;
        match event {
            Event::Primary { takeover, gap } => {
                report.primary_cuts += 1;
                takeovers.push(ms(takeover));
                gaps.push(ms(gap));
            }
            Event::Standby => report.standby_cuts += 1,
            Event::Move { gap } => {
                report.moves += 1;
                moves.push(ms(gap));
            }
        }
    }
    let judge = world.network.judge();
    (report.packets, report.answers, report.announcements) = (judge.frames, judge.answered, judge.announcements);
    report.takeover_ms = Spread::of(takeovers);
    report.gap_ms = Percentiles::of(gaps);
    report.move_gap_ms = Percentiles::of(moves);
    report.answer_ms = Percentiles::of(answers.into_iter().map(ms).collect());
    Ok(report)
}

/// For people.
pub fn table(report: &Report) -> String {
    let rows = [
        ("power cuts", format!("{} of the primary, {} of the standby", report.primary_cuts, report.standby_cuts)),
        ("planned switchovers", report.moves.to_string()),
        ("packets with the witness", format!("{}, none contradicts what survived", report.packets)),
        ("questions answered", report.answers.to_string()),
        ("announcements", report.announcements.to_string()),
        ("machine runs elsewhere after", format!("{} ms", report.takeover_ms)),
        ("guest silent around a cut", format!("{} ms", report.gap_ms)),
        ("… around a switchover", format!("{} ms", report.move_gap_ms)),
        (
            "question to answer, protected",
            format!(
                "{} ms; checkpoints every {} ms, {} ms when packets wait",
                report.answer_ms, report.interval_ms, report.min_interval_ms
            ),
        ),
    ];
    rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")).collect()
}

enum Event {
    Primary { takeover: Duration, gap: Duration },
    Standby,
    Move { gap: Duration },
}

struct World {
    network: Network,
    sides: [Side; 2],
    primary: usize,
    generation: u64,
    setup: Setup,
    peers: String,
    // Last, so that it outlives the processes.
    dir: tempfile::TempDir,
}

fn tap_of(side: usize) -> String {
    format!("tap-{}", NAMES[side])
}

impl World {
    fn start(options: &Options) -> Result<Self> {
        let network = Network::new()?;
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let at = dir.path();
        fs::write(at.join("code"), guest::program()?).context("writing the guest's program")?;
        let hook = key_and_hook(at)?;
        let least = options.min_interval_ms.to_string();
        let more = ["--pipeline", "3", "--min-interval-ms", &least, "--peer-timeout-ms"].map(str::to_owned);
        let setup = Setup {
            vcpus: 1,
            interval_ms: options.interval_ms,
            leak: options.leak,
            hook: Some(hook),
            replicator: more.into_iter().chain([PEER_TIMEOUT_MS.to_string()]).collect(),
            ..Setup::new(MEMORY_MIB)
        };
        let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
        let sides = [Side::new(at, NAMES[0])?, Side::new(at, NAMES[1])?];
        let mut this = Self { network, sides, primary: 0, generation: 1, setup, peers, dir };
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
        let nic = format!("name=net0,tap={},bridge={BRIDGE},mac={}", tap_of(side), Mac(guest::GUEST));
        self.setup.nic = Some(nic.parse().context("naming the card")?);
        self.sides[side].start_vmm(dir, name, &self.setup, side != self.primary)?;
        if side != self.primary {
            ensure!(!up(side)?, "the port of a standby is up");
        }
        self.sides[side].start_replicator(dir, name, &self.peers, &self.setup)
    }

    fn wait_protected(&self) -> Result<()> {
        wait_for("the machine protected", BOUND * 2, || {
            let status = self.sides[self.primary].replicator()?;
            let well = status.role == Role::Sender && status.protected && !veto(self.dir.path()).exists();
            Ok(well.then_some(()))
        })?;
        self.goes_on()
    }

    /// The guest tells and answers.
    fn goes_on(&self) -> Result<()> {
        let (frames, answered) = {
            let judge = self.network.judge();
            (judge.frames, judge.answered)
        };
        self.network.wait("packets of the guest", BOUND, |judge| judge.frames > frames + 3 && judge.answered > answered)
    }

    fn event(&mut self, random: &mut Random, answers: &mut Vec<Duration>) -> Result<Event> {
        // What is measured is a protected machine.
        self.network.judge().latencies.clear();
        std::thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
        answers.append(&mut self.network.judge().latencies);
        self.network.judge().silence = Duration::ZERO;
        let (primary, standby) = (self.primary, 1 - self.primary);
        let first = random.below(2) == 0;
        let kind = random.below(MOVE * STANDBY);
        let began = Instant::now();
        let event = if kind.is_multiple_of(STANDBY) && kind > 0 {
            self.sides[standby].cut_power(first)?;
            self.goes_on()?;
            self.boot(standby)?;
            Event::Standby
        } else {
            let moves = kind % MOVE == 1;
            if moves {
                let _: HandedOver = self.sides[primary].ask_replicator(&ReplicatorRequest::HandOver)?;
                ensure!(!up(primary)?, "the machine was handed over, and its port here is still up");
            }
            // Of a switchover's old host too: whoever is off says nothing.
            self.sides[primary].cut_power(first)?;
            let takeover = self.take_over(began)?;
            self.goes_on()?;
            let gap = self.network.judge().silence;
            self.boot(primary)?;
            if moves { Event::Move { gap } } else { Event::Primary { takeover, gap } }
        };
        self.wait_protected()?;
        let state = self.sides[self.primary].vmm()?.state;
        ensure!(state == VmmState::Running, "the machine is {state:?}");
        Ok(event)
    }

    fn take_over(&mut self, began: Instant) -> Result<Duration> {
        ensure!(
            !veto(self.dir.path()).exists(),
            "the machine ran unprotected when it was cut (the veto stands): the host was too busy for this test"
        );
        self.network.drain(BOUND)?;
        self.generation += 1;
        let generation = Generation(self.generation);
        let next = &self.sides[1 - self.primary];
        let taken: TakenOver = next.ask_replicator(&ReplicatorRequest::TakeOver { generation })?;
        let image = taken.image.context("the standby has no image of a protected machine")?;
        let ram = File::open(next.layout.ram()).context("opening the survivor's memory")?;
        let word = |at: u64| -> Result<u64> {
            let mut bytes = [0; 8];
            ram.read_exact_at(&mut bytes, at).context("reading the survivor's memory")?;
            Ok(u64::from_le_bytes(bytes))
        };
        {
            let mut judge = self.network.judge();
            judge.survives(word(guest::WITNESS_AT)?, word(guest::WITNESS_AT + 8)?);
            judge.expect_announcement();
        }
        let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
        call_once::<_, ()>(next.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, BOUND)?;
        let takeover = began.elapsed();
        next.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
        self.primary = 1 - self.primary;
        Ok(takeover)
    }

    /// With the end of everybody's log.
    fn explain(&self, e: anyhow::Error) -> anyhow::Error {
        let logs = ["a-vmm", "a-replicator", "b-vmm", "b-replicator"].map(|name| {
            let text = fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
            let from = text.lines().count().saturating_sub(12);
            format!("--- {name}\n{}", text.lines().skip(from).collect::<Vec<_>>().join("\n"))
        });
        let nics: Vec<_> = self.sides.iter().map(|side| side.vmm().map(|status| status.nics)).collect();
        let judge = self.network.judge();
        let seen = format!("witness {}, {} answers, {} packets", judge.witness, judge.answered, judge.frames);
        e.context(format!("{}\n--- network\n{seen}\n{nics:?}\n", logs.join("\n")))
    }
}

/// Whether a side's port is up: in this process's network namespace, which /sys may not show.
fn up(side: usize) -> Result<bool> {
    let words = ["-br", "link", "show", "dev", &tap_of(side)];
    let shown = crate::lab::host::run_quiet(std::process::Command::new("ip").args(words))?;
    let flags = shown.split_once('<').and_then(|(_, rest)| rest.split_once('>')).context("ip shows no flags")?.0;
    Ok(flags.split(',').any(|flag| flag == "UP"))
}
