//! Connections live on: power cuts, switchovers and cut cables of a Linux guest with servers, seen by real clients on a machine that is none of the hosts. It runs where Linux
//! does (in the lab VM, or on a host with full KVM); two hosts of real processes and this program in Pacemaker's place, as in [`crate::net_cuts`].
//!
//! ```text
//!  guest: sshd, httpd, PostgreSQL, iperf3, echoes     one card, on the disk that both hosts see
//!     │
//!  host a ══ two replication paths ══ host b          each a network namespace with cables that can be pulled
//!     └──────────── switch ──────────────┘
//!                      │
//!  client: ssh, curl down and up, psql in a transaction, iperf3, UDP with counters
//! ```
//! One SSH session, one database session and one iperf3 stream live from the first event to the last; every event falls into an open transaction, a download and an upload. A
//! connection that ends, a byte, line or row that is not as it must be, or an answer that the guest forgot after it had left, ends the campaign ([`judge`]). How long each client
//! had to wait is measured from before an event until it got somewhere twice afterwards, before the dead host comes back.

pub mod clients;
pub mod judge;
pub mod switch;
pub mod world;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use self::clients::{Kind, Load, Totals};
use self::world::{Silences, World};
use crate::bench::Spread;
use crate::lab::host;
use crate::net_cuts::Percentiles;
use crate::power_cuts::{Random, ms, seed_or_new};

/// An event comes up to so long after everything is well.
const MOMENT: Duration = Duration::from_secs(2);

/// How much of what.
#[derive(Debug, Clone, clap::Args)]
pub struct Mix {
    /// Power cuts of the host that runs the machine
    #[arg(long, default_value_t = 4)]
    pub primary: usize,
    /// Power cuts of the other one
    #[arg(long, default_value_t = 1)]
    pub standby: usize,
    /// Planned switchovers
    #[arg(long, default_value_t = 2)]
    pub moves: usize,
    /// Times that the replication path that carries the checkpoints is cut
    #[arg(long, default_value_t = 1)]
    pub paths: usize,
    /// Times that the standby's cable to the guest's network is cut
    #[arg(long, default_value_t = 1)]
    pub uplinks: usize,
    /// No event begins after so many seconds
    #[arg(long)]
    pub seconds: Option<u64>,
    /// Of the random moments and their order [default: a new one]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Milliseconds between two checkpoints
    #[arg(long, default_value_t = 400)]
    pub interval_ms: u64,
    /// Milliseconds at least, when packets wait
    #[arg(long, default_value_t = 100)]
    pub min_interval_ms: u64,
    /// What clients do
    #[command(flatten)]
    pub load: Load,
    /// Negative control: packets do not wait for their commit. A client must notice, or this fails
    #[arg(long)]
    pub leak: bool,
    /// Kernel of the guest [default: the lab root's]
    #[arg(long)]
    pub kernel: Option<PathBuf>,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The machine's host loses its power.
    PowerCut,
    /// The other host does.
    StandbyPowerCut,
    /// The machine moves.
    Switchover,
    /// A cable of the replication.
    PathCut,
    /// The standby's cable to the guest's network.
    UplinkCut,
    /// Nothing: what clients wait for by themselves, on this host.
    Nothing,
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Self::PowerCut => "power cut",
            Self::StandbyPowerCut => "power cut of the standby",
            Self::Switchover => "planned switchover",
            Self::PathCut => "replication path cut",
            Self::UplinkCut => "standby's uplink cut",
            Self::Nothing => "(nothing, up to 2 s)",
        }
    }
}

impl Mix {
    fn shuffled(&self, random: &mut Random) -> Vec<Event> {
        let mut events = Vec::new();
        for (event, count) in [
            (Event::PowerCut, self.primary),
            (Event::StandbyPowerCut, self.standby),
            (Event::Switchover, self.moves),
            (Event::PathCut, self.paths),
            (Event::UplinkCut, self.uplinks),
        ] {
            events.extend(std::iter::repeat_n(event, count));
        }
        random.shuffle(&mut events);
        events
    }
}

/// What was seen.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Backend of the machine's KVM.
    pub kvm_backend: String,
    /// Host or lab VM, and why.
    pub where_it_ran: String,
    /// What the random moments were made from.
    pub seed: u64,
    /// Between two checkpoints, ms.
    pub interval_ms: u64,
    /// At least, when packets wait, ms.
    pub min_interval_ms: u64,
    /// Whether this was the negative control.
    pub leak: bool,
    /// Events that everything lived through.
    pub events: usize,
    /// From before an event until a client got somewhere twice after it, its longest wait, ms.
    pub silence_ms: BTreeMap<Event, BTreeMap<Kind, Percentiles>>,
    /// From a power cut until the standby's VMM says that the machine runs there, ms.
    pub takeover_ms: Spread,
    /// From an event until the machine is protected again, ms.
    pub protected_ms: Spread,
    /// From a question by UDP to its answer while nothing happens, ms.
    pub udp_answer_ms: Percentiles,
    /// All that clients did.
    pub totals: Totals,
    /// How the negative control was noticed.
    pub noticed: Option<String>,
    /// What went wrong, if anything.
    pub failure: Option<String>,
}

/// Do all of `mix`.
pub fn run(mix: &Mix, say: &dyn Fn(&str)) -> Result<Report> {
    let seed = seed_or_new(mix.seed)?;
    let mut random = Random(seed | 1);
    let events = mix.shuffled(&mut random);
    ensure!(!events.is_empty(), "no events");
    say(&format!("{} events (--seed {seed})", events.len()));
    let mut report = Report {
        seed,
        interval_ms: mix.interval_ms,
        min_interval_ms: mix.min_interval_ms,
        leak: mix.leak,
        where_it_ran: host::choose()?.1,
        ..Report::default()
    };
    let mut world = World::new(mix, say)?;
    report.kvm_backend = world.kvm_backend()?;
    let mut seen = Seen::default();
    let outcome = play(mix, &mut world, &events, &mut random, &mut seen, say);
    report.totals = world.clients()?.totals();
    let wrong = world.clients()?.wrong();
    seen.into_report(&mut report);
    if mix.leak {
        // Only a client's own word counts: anything else may fail for any reason.
        report.noticed = wrong;
        if report.noticed.is_none() {
            report.failure =
                Some("no client noticed that packets did not wait for their commit: this test sees nothing".into());
        }
    } else if let Err(e) = outcome {
        report.failure = Some(format!("{:#}", world.explain(e)));
    }
    Ok(report)
}

#[derive(Default)]
struct Seen {
    events: usize,
    silences: BTreeMap<Event, Vec<Silences>>,
    takeovers: Vec<f64>,
    protected: Vec<f64>,
    udp: Vec<f64>,
}

impl Seen {
    fn into_report(self, report: &mut Report) {
        report.events = self.events;
        for (event, silences) in self.silences {
            let of = |kind: Kind| Percentiles::of(silences.iter().map(|all| ms(all[kind as usize])).collect());
            report.silence_ms.insert(event, Kind::ALL.into_iter().map(|kind| (kind, of(kind))).collect());
        }
        (report.takeover_ms, report.protected_ms) = (Spread::of(self.takeovers), Spread::of(self.protected));
        report.udp_answer_ms = Percentiles::of(self.udp);
    }
}

fn play(
    mix: &Mix,
    world: &mut World,
    events: &[Event],
    random: &mut Random,
    seen: &mut Seen,
    say: &dyn Fn(&str),
) -> Result<()> {
    let started = Instant::now();
    for (n, event) in events.iter().enumerate() {
        if mix.seconds.is_some_and(|seconds| started.elapsed() > Duration::from_secs(seconds)) {
            say(&format!("time is up, after {n} events"));
            break;
        }
        let what = format!("event {} of {}: {}", n + 1, events.len(), event.name());
        one(world, *event, random, seen, &what, say).with_context(|| what.clone())?;
        seen.events += 1;
    }
    world.clients()?.check_database()
}

/// An event, until everything is well again and the transaction that it fell into is committed.
fn one(
    world: &mut World,
    event: Event,
    random: &mut Random,
    seen: &mut Seen,
    what: &str,
    say: &dyn Fn(&str),
) -> Result<()> {
    world.clients()?.forget_silences();
    std::thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
    let clients = world.clients()?;
    seen.silences.entry(Event::Nothing).or_default().push(clients.silences());
    seen.udp.extend(clients.udp_times().into_iter().map(ms));
    clients.forget_silences();
    let (began, first) = (Instant::now(), random.below(2) == 0);
    let silences = match event {
        Event::PowerCut => {
            seen.takeovers.push(ms(world.cut_primary(first)?));
            world.goes_on()?
        }
        Event::StandbyPowerCut => {
            world.cut_standby(first)?;
            world.goes_on()?
        }
        Event::Switchover => {
            world.hand_over(first)?;
            world.goes_on()?
        }
        Event::PathCut => world.cut_path()?,
        Event::UplinkCut => world.cut_uplink()?,
        Event::Nothing => Silences::default(),
    };
    world.recover()?;
    let protected = ms(began.elapsed());
    seen.protected.push(protected);
    let words = Kind::ALL.map(|kind| format!("{} {:.1}", kind.name(), silences[kind as usize].as_secs_f64()));
    say(&format!("{what}; silent for s: {}; protected after {:.1} s", words.join(", "), protected / 1e3));
    seen.silences.entry(event).or_default().push(silences);
    world.clients()?.commit(Duration::from_secs(300))
}

/// For people.
pub fn table(report: &Report) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let totals = &report.totals;
    let mut text = format!("  {} events; each client's longest wait, ms: p50, p99, max\n  {:<26}", report.events, "");
    for kind in Kind::ALL {
        text += &format!(" {:>21}", kind.name());
    }
    text += "\n";
    for (event, kinds) in &report.silence_ms {
        let count = kinds.values().next().map_or(0, |p| p.runs);
        text += &format!("  {:<26}", format!("{count} × {}", event.name()));
        for p in Kind::ALL.iter().filter_map(|kind| kinds.get(kind)) {
            text += &format!(" {:>21}", format!("{:.0} {:.0} {:.0}", p.p50, p.p99, p.max));
        }
        text += "\n";
    }
    let lost = totals.udp_asked.saturating_sub(totals.udp_answered);
    let rows = [
        ("one SSH session", format!("{} lines said back, {} said by itself", totals.ssh_echoes, totals.ssh_ticks)),
        ("downloads", format!("{} whole, {} in all", totals.downloads, mib(totals.downloaded_bytes))),
        ("uploads", format!("{} whole, {} in all", totals.uploads, mib(totals.uploaded_bytes))),
        ("one psql session", format!("{} transactions across events, {} rows", totals.transactions, totals.rows)),
        ("one iperf3 stream", mib(totals.iperf3_bytes)),
        ("UDP", format!("{} of {} questions answered, {lost} lost", totals.udp_answered, totals.udp_asked)),
        (
            "question to answer, protected",
            format!(
                "{} ms; checkpoints every {} ms, {} ms when packets wait",
                report.udp_answer_ms, report.interval_ms, report.min_interval_ms
            ),
        ),
        ("machine runs elsewhere after", format!("{} ms", report.takeover_ms)),
        ("protected again after", format!("{} ms", report.protected_ms)),
    ];
    text.extend(rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")));
    if let Some(noticed) = &report.noticed {
        text += &format!("  {:<30} {noticed}\n", "without a gate");
    }
    text
}
