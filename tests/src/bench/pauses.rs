//! Pauses and the share of time that the guest runs, by capture strategy and dirty pages, beside COLO and a plain copy.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;

use super::guest::{Counters, Guest, Locality, Work};
use super::pair::{BOUND, Pair, Setup, Side};
use super::qemu::{Colo, Transport};
use super::rows::{Report, number, percentile};
use super::{limits, qemu};
use crate::lab::wait_for;

/// RAM of the machine: 50,000 pages are a fifth of it, and fit into the capture arena of a machine of this size.
const RAM_MIB: u64 = 1024;
/// By their names in `SetCapture`; the default first, should the time run out.
pub const STRATEGIES: [&str; 4] = ["auto", "stop", "lock", "validate"];

/// Rows of COLO without TCP's timers, see [`Transport::Unix`].
pub const COLO_AT_BEST: &str = "pause/COLO-over-a-unix-socket";

/// What to measure, and for how long.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Dirty pages per period.
    pub pages: Vec<u64>,
    /// Each strategy with each number of pages.
    pub each: Duration,
    /// COLO with each number of pages.
    pub colo_each: Duration,
    /// Other pages in every period too, at 4,096.
    pub cold: bool,
    /// Cases that have not begun by then are left out.
    pub bound: Duration,
    /// Only these of [`STRATEGIES`], and then without COLO; all of them if empty.
    pub strategies: Vec<String>,
}

/// The pauses of one case.
#[derive(Debug, Clone, Default)]
struct Case {
    /// Sorted, µs.
    pauses: Vec<f64>,
    /// Share of the time in which the vCPUs were not stopped by the VMM.
    runs: f64,
    /// Share of its unprotected progress.
    progress: f64,
    /// Share of the time in which the guest saw itself run.
    seen: f64,
    /// The longest gap that the guest saw, µs.
    longest_us: f64,
    /// Pages that it wrote to in a period.
    wrote: f64,
    /// Pages in a checkpoint; not known of COLO.
    captured: Option<f64>,
}

impl Case {
    fn at(&self, share: f64) -> f64 {
        percentile(&self.pauses, share)
    }
}

/// All of it into `report`.
pub fn measure(report: &mut Report, plan: &Plan, code: &[u8], say: &dyn Fn(&str)) -> Result<()> {
    let begun = Instant::now();
    let peer_wanted = plan.strategies.is_empty();
    let colo = |transport| if peer_wanted { colo(plan, code, transport, say) } else { Ok(Vec::new()) };
    let (colo, best) = (colo(Transport::Tcp), colo(Transport::Unix));
    let peer = format!("QEMU {} COLO over TCP", qemu::version().unwrap_or_else(|_| "(none)".into()));
    if let Err(e) = &colo {
        say(&format!("COLO could not be measured: {e:#}"));
    }
    let (colo, best) = (colo.unwrap_or_default(), best.unwrap_or_default());
    let colo = |i: usize| colo.get(i).and_then(Option::as_ref);
    for ((i, pages), case) in plan.pages.iter().enumerate().zip(&best) {
        if let Some(case) = case {
            rows(report, &format!("{COLO_AT_BEST}/{pages}"), case, &peer, colo(i));
        }
    }

    let mut alone = Vec::new();
    {
        let pair = Pair::start(&Setup::new(RAM_MIB), code)?;
        let guest = pair.guest()?;
        for pages in &plan.pages {
            say(&format!("{pages} pages unprotected"));
            guest.order(&Work::hot(*pages))?;
            std::thread::sleep(Duration::from_millis(500));
            let (did, ..) = guest.watch(|| nap(plan.each / 4))?;
            alone.push(did);
        }
    }
    for strategy in STRATEGIES.into_iter().filter(|s| peer_wanted || plan.strategies.iter().any(|wanted| wanted == s)) {
        if begun.elapsed() > plan.bound {
            say(&format!("{strategy}: left out, the time is up"));
            continue;
        }
        // A machine for each: whatever one strategy leaves behind is not the next one's.
        let done = Pair::start(&Setup::new(RAM_MIB), code).and_then(|pair| {
            if !pair.choose(strategy) && strategy != "stop" {
                say(&format!("this release has no capture strategy {strategy}"));
                return Ok(());
            }
            let guest = pair.guest()?;
            pair.protect()?;
            for ((i, pages), alone) in plan.pages.iter().enumerate().zip(&alone) {
                for locality in [Locality::Hot, Locality::Cold] {
                    // Where the pages are matters to a strategy that tells them apart; one number of pages shows by how much.
                    if locality == Locality::Cold && (*pages != 4096 || !plan.cold) {
                        continue;
                    }
                    if begun.elapsed() > plan.bound {
                        say(&format!("{strategy}, {pages} pages: left out, the time is up"));
                        continue;
                    }
                    guest.order(&Work::hot(0))?;
                    recovered(&pair)?;
                    say(&format!("{strategy}, {pages} pages, {locality:?}"));
                    let work = Work { locality, ..Work::hot(*pages) };
                    let Some(case) = case(&pair, &guest, &work, alone, plan.each)? else {
                        say("  not one checkpoint in this time");
                        continue;
                    };
                    let cold = if locality == Locality::Cold { "-cold" } else { "" };
                    let name = format!("pause/{strategy}/{pages}{cold}");
                    rows(report, &name, &case, &peer, colo(i));
                    let limit = limits::copy_us(case.captured.unwrap_or(0.0) as usize);
                    report.beside(
                        format!("{name}/p50-over-copy"),
                        case.at(0.5),
                        "µs",
                        "memcpy of as many pages",
                        limit,
                    );
                }
            }
            Ok(())
        });
        if let Err(e) = done {
            say(&format!("FAILED: {strategy}: {e:#}"));
            report.alone(format!("pause/{strategy}/failed"), 1.0, "").note = Some(format!("{e:#}"));
        }
    }
    Ok(())
}

/// One number of pages under the strategy that was chosen; `None` if no checkpoint was made in this time.
fn case(pair: &Pair, guest: &Guest, work: &Work, alone: &Counters, time: Duration) -> Result<Option<Case>> {
    guest.order(work)?;
    std::thread::sleep(Duration::from_secs(1));
    let (did, longest, taken) = guest.watch(|| collect(&pair.a, time))?;
    let mut pauses = taken.pauses;
    pauses.sort_by(f64::total_cmp);
    Ok((!pauses.is_empty()).then(|| Case {
        pauses,
        runs: 1.0 - taken.stood_still_s / did.seconds,
        progress: did.progress_per_s() / alone.progress_per_s().max(1.0),
        seen: (1.0 - did.gaps / did.seconds / f64::from(pair.vcpus())).max(0.0),
        longest_us: longest.as_secs_f64() * 1e6,
        wrote: did.pages_per_period(),
        captured: Some(taken.pages),
    }))
}

fn rows(report: &mut Report, name: &str, case: &Case, peer: &str, its: Option<&Case>) {
    let mut add = |what: &str, unit, get: &dyn Fn(&Case) -> f64| match its {
        Some(its) => report.beside(format!("{name}/{what}"), get(case), unit, peer, get(its)),
        None => report.alone(format!("{name}/{what}"), get(case), unit),
    }
    .note = None;
    add("p50", "µs", &|c| c.at(0.5));
    add("p99", "µs", &|c| c.at(0.99));
    add("p99.9", "µs", &|c| c.at(0.999));
    add("max", "µs", &|c| c.at(1.0));
    add("runs", "of time", &|c| c.runs);
    add("guest-saw-itself-run", "of time", &|c| c.seen);
    add("longest-gap-seen", "µs", &|c| c.longest_us);
    add("progress", "of alone", &|c| c.progress);
    add("pages-written", "per 25 ms", &|c| c.wrote);
    let note = format!("{} pauses", case.pauses.len());
    if let Some(captured) = case.captured {
        report.alone(format!("{name}/pages-captured"), captured, "per cut").note = Some(note);
    }
}

/// The rows that [`measure`] made, a line for each case.
pub fn table(report: &Report) -> String {
    let mut cases: Vec<(&str, &str)> = Vec::new();
    for row in &report.rows {
        if let Some(("pause", rest)) = row.name.split_once('/')
            && let Some((case, _)) = rest.rsplit_once('/')
            && let Some(case) = case.split_once('/')
            && !row.name.ends_with("/failed")
            && !cases.contains(&case)
        {
            cases.push(case);
        }
    }
    if cases.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "  {:<27}{:>11} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>9} {:>8} {:>8} {:>8} {:>6}\n",
        "pause, µs (shares in %)",
        "pages",
        "p50",
        "p99",
        "p99.9",
        "max",
        "runs",
        "seen",
        "progress",
        "written",
        "per cut",
        "memcpy",
        "COLO"
    );
    for (strategy, pages) in cases {
        let find = |what: &str| {
            let name = format!("pause/{strategy}/{pages}/{what}");
            report.rows.iter().find(|r| r.name == name)
        };
        let beside = |what: &str| find(what).and_then(|r| r.peer_or_limit.as_ref()).map(|b| b.value);
        let show = |v: Option<f64>| v.map_or_else(|| "-".into(), |v| format!("{v:.0}"));
        let value = |what: &str| show(find(what).map(|r| r.value));
        let share = |what: &str| show(find(what).map(|r| r.value * 100.0));
        text.push_str(&format!(
            "  {strategy:<27}{pages:>11} {:>8} {:>8} {:>8} {:>8} {:>6} {:>6} {:>9} {:>8} {:>8} {:>8} {:>6}\n",
            value("p50"),
            value("p99"),
            value("p99.9"),
            value("max"),
            share("runs"),
            share("guest-saw-itself-run"),
            share("progress"),
            value("pages-written"),
            value("pages-captured"),
            show(beside("p50-over-copy")),
            show(beside("p50")),
        ));
    }
    text.push_str(
        "  runs: not stopped for a checkpoint. seen: the guest saw itself run (pauses and everything else that had the processors).\n  \
         progress: of what it does unprotected. written: pages in 25 ms. memcpy: as many pages. COLO: its p50 over TCP, µs.\n",
    );
    text
}

/// Wait until checkpoints are as frequent again as they can be.
fn recovered(pair: &Pair) -> Result<()> {
    let mut last = (Instant::now(), pair.a.replicator()?.epochs);
    wait_for("checkpoints of a guest that rests", BOUND, || {
        std::thread::sleep(Duration::from_millis(200));
        let now = (Instant::now(), pair.a.replicator()?.epochs);
        let rate = (now.1 - last.1) as f64 / (now.0 - last.0).as_secs_f64();
        last = now;
        Ok((rate > 20.0).then_some(()))
    })
}

fn nap(time: Duration) -> Result<()> {
    // A measurement is a stretch of time; nothing is waited for.
    std::thread::sleep(time);
    Ok(())
}

/// What a VMM and its replicator tell of a stretch of time.
pub struct Taken {
    /// µs, in order.
    pub pauses: Vec<f64>,
    /// Time in which the vCPUs were stopped.
    pub stood_still_s: f64,
    /// Pages in a checkpoint.
    pub pages: f64,
}

/// Watch `side`, the primary, for `time`.
pub fn collect(side: &Side, time: Duration) -> Result<Taken> {
    let mut cuts = Cuts::default();
    cuts.ask(side)?;
    cuts.pauses.clear();
    let before = side.replicator()?;
    let still_before = cuts.stood_still_us;
    let started = Instant::now();
    while started.elapsed() < time {
        // The VMM remembers 512 pauses: asked in time, it forgets none.
        std::thread::sleep(Duration::from_millis(2000).min(time.saturating_sub(started.elapsed())));
        cuts.ask(side)?;
    }
    let after = side.replicator()?;
    let epochs = (after.epochs - before.epochs).max(1) as f64;
    let stood_still_s = match (still_before, cuts.stood_still_us) {
        (Some(before), Some(after)) => (after - before) / 1e6,
        _ => cuts.pauses.iter().sum::<f64>() / 1e6,
    };
    let pages = (after.raw_bytes - before.raw_bytes) as f64 / epochs / 4096.0;
    Ok(Taken { pauses: cuts.pauses, stood_still_s, pages })
}

#[derive(Default)]
struct Cuts {
    seen: u64,
    pauses: Vec<f64>,
    stood_still_us: Option<f64>,
}

impl Cuts {
    fn ask(&mut self, side: &Side) -> Result<()> {
        let status = side.ask_vmm(&serde_json::json!({"cmd": "status"}))?;
        self.take(&status)
    }

    fn take(&mut self, status: &Value) -> Result<()> {
        let capture = &status["capture"];
        let cuts = capture["cuts"].as_u64().or_else(|| status["last_cut"].as_u64());
        let cuts = cuts.context("the VMM's status does not count cuts")?;
        let recent = status["recent_pauses_us"].as_array().context("the VMM's status has no pauses")?;
        let new = usize::try_from(cuts.saturating_sub(self.seen)).unwrap_or(usize::MAX).min(recent.len());
        self.pauses.extend(recent[recent.len() - new..].iter().filter_map(Value::as_f64));
        self.seen = cuts;
        self.stood_still_us = capture["stood_still_us"].as_f64();
        Ok(())
    }
}

fn colo(plan: &Plan, code: &[u8], transport: Transport, say: &dyn Fn(&str)) -> Result<Vec<Option<Case>>> {
    say(&format!("QEMU's COLO over {}", transport.name()));
    let mut colo = Colo::start(RAM_MIB, code, transport)?;
    let mut alone = Vec::new();
    for pages in &plan.pages {
        colo.guest().order(&Work::hot(*pages))?;
        std::thread::sleep(Duration::from_millis(500));
        let (did, ..) = colo.guest().watch(|| nap(plan.colo_each / 4))?;
        alone.push(did);
    }
    colo.guest().order(&Work::hot(0))?;
    colo.protect()?;
    let mut cases = Vec::new();
    for (pages, alone) in plan.pages.iter().zip(alone) {
        say(&format!("COLO over {}, {pages} pages", transport.name()));
        colo.guest().order(&Work::hot(*pages))?;
        std::thread::sleep(Duration::from_secs(1));
        colo.pauses()?;
        let (did, longest, ()) = colo.guest().watch(|| nap(plan.colo_each))?;
        let mut pauses = colo.pauses()?;
        pauses.sort_by(f64::total_cmp);
        if pauses.is_empty() {
            say("  not one checkpoint in this time");
            cases.push(None);
            continue;
        }
        let case = Case {
            runs: 1.0 - pauses.iter().sum::<f64>() / 1e6 / did.seconds,
            progress: did.progress_per_s() / alone.progress_per_s().max(1.0),
            seen: (1.0 - did.gaps / did.seconds).max(0.0),
            longest_us: longest.as_secs_f64() * 1e6,
            wrote: did.pages_per_period(),
            captured: None,
            pauses,
        };
        say(&format!("  p50 {} µs, runs {}", number(case.at(0.5)), number(case.runs)));
        cases.push(Some(case));
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_pause_is_counted_once_though_the_status_repeats_them() {
        let mut cuts = Cuts::default();
        cuts.take(&json!({"last_cut": 3, "recent_pauses_us": [1, 2, 3]})).unwrap();
        cuts.take(&json!({"last_cut": 5, "recent_pauses_us": [1, 2, 3, 4, 5]})).unwrap();
        assert_eq!(cuts.pauses, [1.0, 2.0, 3.0, 4.0, 5.0]);
        let status = json!({"last_cut": 9, "capture": {"cuts": 6, "stood_still_us": 70}, "recent_pauses_us": [5, 6]});
        cuts.take(&status).unwrap();
        assert_eq!((cuts.pauses.last(), cuts.stood_still_us), (Some(&6.0), Some(70.0)));
    }
}
