//! Power cuts of a Linux guest with databases: SQLite, PostgreSQL and files on ext4, on one disk that two hosts share, or of
//! which each has its own copy. Two hosts of real processes and this program in Pacemaker's place, as in [`crate::power_cuts`]; it runs where Linux does (in the lab VM, or on a host with full KVM).
//!
//! ```text
//!  guest: files, SQLite, PostgreSQL, ring ──serial──► board ──TCP──► books: what was seen outside
//!    │ one disk, redirected while protected                            ▲
//!    └─► after every boot, and after the end on a copy: journal replay, e2fsck -fn, integrity of both databases, no number missing
//! ```
//! While the guest's memory survives, the guest itself compares memory and disk, past the page cache. When both hosts die, together or one after the other, the machine
//! boots, and its disk must know every transaction that was seen. At the end both die once more and the disk is taken apart without the machine.
//!
//! A host's death is the death of its processes: what its kernel had not written to storage yet is not lost. `disk/src/sim.rs` loses that.

mod autopsy;
pub mod books;
mod storage;
mod world;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use self::world::World;
use crate::bench::Spread;
use crate::power_cuts::{Random, STANDBY, ms, seed_or_new};

/// A cut comes up to so long after everything is well: a few transactions, under software emulation.
const MOMENT: Duration = Duration::from_secs(4);

/// How much of what.
#[derive(Debug, Clone, clap::Args)]
pub struct Mix {
    /// Cuts of one host: three in four of the one that runs the machine
    #[arg(long, default_value_t = 4)]
    pub count: usize,
    /// Cuts of both hosts in one moment: the machine boots from its disk
    #[arg(long, default_value_t = 1)]
    pub both: usize,
    /// Cuts of the primary, and then of the host that took over before the machine is protected again
    #[arg(long, default_value_t = 1)]
    pub sequence: usize,
    /// Planned switchovers
    #[arg(long, default_value_t = 1)]
    pub moves: usize,
    /// Primary's cuts after which the disk's file is not there at first: the standby must refuse, say so, and take over when it is
    #[arg(long, default_value_t = 1)]
    pub missing: usize,
    /// Times that the slices' file system is full: the guest must wait and go on
    #[arg(long, default_value_t = 1)]
    pub full: usize,
    /// Of the random moments and their order [default: a new one]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Times that the storage does not answer for 30 s (not with `--storage local`)
    #[arg(long, default_value_t = 0)]
    pub gone: usize,
    /// What storage the disk is on
    #[arg(long, value_enum, default_value_t)]
    pub storage: storage::Kind,
    /// Each host has its own copy of the disk; both are compared before the end
    #[arg(long, conflicts_with = "storage")]
    pub mirrored: bool,
    /// Negative control: each takeover finds the disk as if writes were not redirected. The guest must notice, or this fails
    #[arg(long, conflicts_with = "mirrored")]
    pub unredirected: bool,
    /// Kernel of the guest [default: the lab root's]
    #[arg(long)]
    pub kernel: Option<PathBuf>,
}

/// What is done to the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Primary,
    Standby,
    Both,
    Sequence,
    Move,
    Missing,
    Full,
    Gone,
}

impl Mix {
    fn possible(&self) -> Result<()> {
        let storage = self.storage;
        ensure!(
            self.gone == 0 || storage != storage::Kind::Local,
            "local storage cannot be silent: --storage nfs or iscsi"
        );
        ensure!(self.full == 0 || storage != storage::Kind::Nfs, "the NFS server is not filled: --full 0");
        ensure!(self.missing == 0 || storage != storage::Kind::Iscsi, "an iSCSI disk is not taken away: --missing 0");
        Ok(())
    }

    fn shuffled(&self, random: &mut Random) -> Vec<Event> {
        let single = |random: &mut Random| if random.below(STANDBY) == 0 { Event::Standby } else { Event::Primary };
        let mut events: Vec<Event> = (0..self.count).map(|_| single(random)).collect();
        for (event, count) in [
            (Event::Both, self.both),
            (Event::Sequence, self.sequence),
            (Event::Move, self.moves),
            (Event::Missing, self.missing),
            (Event::Full, self.full),
            (Event::Gone, self.gone),
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
    /// What the random moments were made from.
    pub seed: u64,
    /// What the disk was on.
    pub storage: storage::Kind,
    /// Whether each host had its own copy of the disk.
    pub mirrored: bool,
    /// Whether this was the negative control.
    pub unredirected: bool,
    /// Cuts of the host that the machine ran on.
    pub primary_cuts: usize,
    /// Cuts of the other one.
    pub standby_cuts: usize,
    /// Cuts of both in one moment; the one at the end is not counted.
    pub both_cuts: usize,
    /// Cuts of both, one after the other.
    pub sequences: usize,
    /// Planned switchovers.
    pub moves: usize,
    /// Primary's cuts after which the disk was missing at first; they are among its cuts.
    pub missing: usize,
    /// Times that there was no room for slices.
    pub full: usize,
    /// Times that the storage did not answer.
    pub gone: usize,
    /// Boots after the first.
    pub boots: u32,
    /// Transactions whose numbers were seen outside.
    pub transactions: u64,
    /// Newest number in the ring that was seen.
    pub ring: u64,
    /// Most transactions that a disk knew at a boot and nobody had seen.
    pub unseen: u64,
    /// From a primary's cut until the machine runs elsewhere, ms.
    pub takeover_ms: Spread,
    /// From a cut until the machine is protected again, ms.
    pub protected_ms: Spread,
    /// What the disk was found to hold at the end.
    pub autopsy: String,
    /// How the negative control was noticed.
    pub noticed: Option<String>,
    /// What went wrong, if anything.
    pub failure: Option<String>,
}

/// Do all of `mix`.
pub fn run(mix: &Mix, say: &dyn Fn(&str)) -> Result<Report> {
    mix.possible()?;
    let seed = seed_or_new(mix.seed)?;
    let mut random = Random(seed | 1);
    let events = mix.shuffled(&mut random);
    say(&format!("{} events (--seed {seed})", events.len()));
    let (storage, mirrored, unredirected) = (mix.storage, mix.mirrored, mix.unredirected);
    let mut report = Report { seed, storage, mirrored, unredirected, ..Report::default() };
    let mut world = World::new(mix, say)?;
    let outcome = play(&mut world, &mut report, &events, &mut random, say);
    let books = world.books();
    (report.boots, report.transactions) = (books.boots.saturating_sub(1), books.told);
    (report.ring, report.unseen) = (books.seen.ring, books.unseen);
    if mix.unredirected {
        // Only the guest's own word counts: anything else may fail for any reason.
        match books.wrong.filter(|_| books.complained) {
            Some(why) => report.noticed = Some(why),
            None => {
                report.failure = Some("nobody noticed that writes were not redirected: this test sees nothing".into());
            }
        }
    } else if let Err(e) = outcome {
        report.failure = Some(format!("{:#}", world.explain(e)));
    }
    Ok(report)
}

fn play(
    world: &mut World,
    report: &mut Report,
    events: &[Event],
    random: &mut Random,
    say: &dyn Fn(&str),
) -> Result<()> {
    let (mut takeovers, mut protected) = (Vec::new(), Vec::new());
    report.kvm_backend = world.kvm_backend()?;
    let outcome = events.iter().enumerate().try_for_each(|(n, event)| {
        let what = format!("{} of {}: {event:?}", n + 1, events.len());
        let seen = world.books().seen;
        say(&format!("{what}, after transaction {}, ring {}", seen.transaction, seen.ring));
        std::thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
        let began = Instant::now();
        let first = random.below(2) == 0;
        match event {
            Event::Primary | Event::Missing => {
                world.cut(world.primary, first)?;
                world.take_over(report.unredirected, *event == Event::Missing)?;
                takeovers.push(ms(began.elapsed()));
                report.primary_cuts += 1;
                report.missing += usize::from(*event == Event::Missing);
            }
            Event::Full => {
                world.fill()?;
                report.full += 1;
            }
            Event::Gone => {
                world.go_silent()?;
                report.gone += 1;
            }
            Event::Standby => {
                world.cut(1 - world.primary, first)?;
                report.standby_cuts += 1;
            }
            Event::Both => {
                world.cut_both(first)?;
                report.both_cuts += 1;
            }
            Event::Sequence => {
                world.cut(world.primary, first)?;
                world.take_over(report.unredirected, false)?;
                if random.below(2) == 0 {
                    world.more(1)?;
                }
                world.cut_rest(first)?;
                report.sequences += 1;
            }
            Event::Move => {
                world.hand_over()?;
                report.moves += 1;
            }
        }
        world.recover().with_context(|| what.clone())?;
        protected.push(ms(began.elapsed()));
        world.more(2).with_context(|| what)
    });
    (report.takeover_ms, report.protected_ms) = (Spread::of(takeovers), Spread::of(protected));
    outcome?;
    world.compare()?;
    say("the end: both die, and the disk is taken apart");
    std::thread::sleep(MOMENT * u32::try_from(random.below(1000))? / 1000);
    world.cut_both(true)?;
    let books = world.books();
    if let Some(wrong) = books.wrong {
        bail!("{wrong}");
    }
    report.autopsy = autopsy::examine(&world.disk(), &world.slices(), world.dir())?;
    let line = lab_guest::line::Line { kind: 'B', number: 0, fields: &report.autopsy };
    books.agrees(&line).map_err(|why| anyhow::anyhow!("after the end: {why}"))?;
    let boots = report.both_cuts + report.sequences;
    ensure!(usize::try_from(books.boots)? == boots + 1, "the machine booted {} times, not {}", books.boots, boots + 1);
    Ok(())
}

/// For people.
pub fn table(report: &Report) -> String {
    let disk = match (report.storage, report.mirrored) {
        (_, true) => "mirrored",
        (storage::Kind::Local, false) => "shared, in memory",
        (storage::Kind::Nfs, false) => "shared, on an NFS server",
        (storage::Kind::Iscsi, false) => "shared, a unit of an iSCSI target",
    };
    let rows = [
        ("disk", disk.to_owned()),
        ("power cuts", format!("{} of the primary, {} of the standby", report.primary_cuts, report.standby_cuts)),
        ("of both hosts", format!("{} at once, {} one after the other", report.both_cuts, report.sequences)),
        ("planned switchovers", report.moves.to_string()),
        (
            "storage",
            format!(
                "{} times full, {} times missing at a takeover, {} times silent",
                report.full, report.missing, report.gone
            ),
        ),
        ("boots from the disk", format!("{}, which knew at most {} transactions unseen", report.boots, report.unseen)),
        ("transactions seen outside", format!("{} (ring: {} numbers)", report.transactions, report.ring)),
        ("machine runs elsewhere after", format!("{} ms", report.takeover_ms)),
        ("protected again after", format!("{} ms", report.protected_ms)),
        ("the disk at the end", report.autopsy.clone()),
    ];
    let mut text: String = rows.iter().map(|(name, value)| format!("  {name:<30} {value}\n")).collect();
    if let Some(noticed) = &report.noticed {
        text.push_str(&format!("  {:<30} {noticed}\n", "without redirection"));
    }
    text
}
