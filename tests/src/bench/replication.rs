//! `understudy-bench replication`: the replication engine's figures, and the bars that they are held against.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::pair::{Pair, Setup};
use super::pauses::{self, Plan};
use super::rows::{Bar, Report, number};
use super::{contents, flow, guest, output, takeover};

/// The parts, by the names that `--only` takes.
pub const PARTS: [&str; 6] = ["pauses", "idle", "output", "sustained", "wire", "takeover"];

/// How thorough.
#[derive(Debug, Clone)]
pub struct Extent {
    /// Two minutes instead of a quarter of an hour: fewer cases, fewer samples, the same rows where they are measured.
    pub quick: bool,
    /// Only these of [`PARTS`]; all if empty.
    pub only: Vec<String>,
    /// Only these capture strategies, and then no peer; all and COLO if empty.
    pub strategies: Vec<String>,
}

/// Measure; parts that fail are said and left out, so that one broken peer does not cost all other figures.
pub fn measure(extent: &Extent, say: &dyn Fn(&str)) -> Result<(Report, Vec<Bar>)> {
    let corpus = contents::corpus(Path::new("."), 1 << 20)?;
    let code = guest::load_image(&corpus);
    let kvm_backend = {
        // It ends here: its vCPUs would compete with everything that is measured.
        let pair = Pair::start(&Setup::new(64 + 32), &code).context("the benchmark's machine does not start")?;
        pair.a.vmm()?.kvm_backend
    };
    say(&format!("KVM backend: {kvm_backend}"));
    let mut report = Report::new(kvm_backend);
    // Whatever else runs here takes from both sides of each row, but not alike.
    let load = fs::read_to_string("/proc/loadavg").context("reading the load")?;
    let load = load.split_ascii_whitespace().next().and_then(|l| l.parse().ok()).unwrap_or(f64::NAN);
    let cores = std::thread::available_parallelism().map_or(0.0, |n| n.get() as f64);
    report.beside("host/load-before-the-run", load, "runnable", "processors", cores);
    let quick = extent.quick;
    let seconds = |full: u64, short: u64| Duration::from_secs(if quick { short } else { full });
    for part in PARTS {
        if !extent.only.is_empty() && !extent.only.iter().any(|p| p == part) {
            continue;
        }
        let report = &mut report;
        let done = match part {
            "pauses" => {
                let strategies = extent.strategies.clone();
                let all = vec![0, 1000, 4096, 16_384, 50_000];
                let pages = if quick { vec![4096, 50_000] } else { all };
                let bound = seconds(480, 90);
                let plan =
                    Plan { pages, each: seconds(13, 3), colo_each: seconds(6, 3), cold: !quick, bound, strategies };
                pauses::measure(report, &plan, &code, say)
            }
            "idle" => flow::idle(report, seconds(6, 3), say),
            "output" => output::measure(report, seconds(10, 3), &code, say),
            "sustained" => flow::sustained(report, seconds(10, 3), &code, say),
            "wire" => flow::wire(report, seconds(4, 1), &code, say),
            _ => {
                let sizes = if quick { vec![(256, 1)] } else { vec![(256, 3), (1024, 2), (4096, 1), (8192, 1)] };
                takeover::measure(report, &sizes, seconds(150, 30), &code, say)
            }
        };
        if let Err(e) = done {
            say(&format!("FAILED: {part}: {e:#}"));
            report.alone(format!("{part}/failed"), 1.0, "").note = Some(format!("{e:#}"));
        }
    }
    let bars = bars(&report);
    Ok((report, bars))
}

/// The goals for the two-core test host.
fn bars(report: &Report) -> Vec<Bar> {
    let get = |name: &str| report.value(name);
    let beside = |name: &str| {
        let row = report.rows.iter().find(|r| r.name == name)?;
        Some((row.value, row.peer_or_limit.as_ref()?.value))
    };
    let strategy = if get("pause/auto/4096/p50").is_some() { "auto" } else { "stop" };
    let mut bars = Vec::new();
    let mut bar = |bar: &str, wanted: &str, got: Option<(bool, String)>| {
        let (reached, got) = match got {
            Some((reached, got)) => (Some(reached), got),
            None => (None, String::new()),
        };
        bars.push(Bar { bar: bar.into(), wanted: wanted.into(), got, reached });
    };
    bar(
        "4,096 pages: median pause against COLO's over TCP",
        "20 times shorter",
        beside(&format!("pause/{strategy}/4096/p50")).map(|(ours, colos)| {
            let ratio = colos / ours.max(1.0);
            let mut got =
                format!("{} times ({strategy}: {} µs, COLO: {} µs", number(ratio), number(ours), number(colos));
            if let Some(best) = get(&format!("{}/4096/p50", pauses::COLO_AT_BEST)) {
                got += &format!("; over a unix socket {} µs, {} times", number(best), number(best / ours.max(1.0)));
            }
            got.push(')');
            (ratio >= 20.0, got)
        }),
    );
    bar(
        "4,096 pages: share of the time that the guest runs",
        "at least 85 %",
        beside(&format!("pause/{strategy}/4096/runs")).map(|(ours, colos)| {
            (ours >= 0.85, format!("{:.1} % ({strategy}), COLO {:.1} %", ours * 100.0, colos * 100.0))
        }),
    );
    let tails = get("pause/auto/4096/p99").zip(get("pause/auto/50000/p99"));
    bar(
        "auto: p99 at 50,000 pages against that at 4,096",
        "at most 3 times",
        tails.map(|(small, large)| {
            let ratio = large / small.max(1.0);
            (ratio <= 3.0, format!("{} times ({} and {} µs)", number(ratio), number(large), number(small)))
        }),
    );
    let idle = [get("idle/0-ms/checkpoints"), get("idle/1-ms/checkpoints")].into_iter().flatten().reduce(f64::max);
    bar(
        "checkpoints of an idle guest",
        "at least 1,000 per s",
        idle.map(|rate| (rate >= 1000.0, format!("{} per s", number(rate)))),
    );
    bar(
        "output release, p50",
        "at most 2 ms",
        get("output/0/release-p50").map(|ms| (ms <= 2.0, format!("{} ms", number(ms)))),
    );
    let flow = beside("sustained/plain/replicated").map(|f| (f, "plain"));
    let flow = flow.or_else(|| beside("sustained/encrypted/replicated").map(|f| (f, "encrypted")));
    bar(
        "replicated bytes, unencrypted, against a plain TCP stream",
        "at least half",
        flow.map(|((ours, tcp), way)| {
            let mut got = format!("{:.2} of it ({way}: {} of {} MiB/s", ours / tcp, number(ours), number(tcp));
            if let Some((_, possible)) = beside(&format!("sustained/{way}/of-the-possible")) {
                got += &format!("; possible {} = {:.2} of it", number(possible), possible / tcp);
            }
            got.push(')');
            (way == "plain" && ours >= tcp / 2.0, got)
        }),
    );
    let takeovers: Vec<f64> = report
        .rows
        .iter()
        .filter(|r| r.name.starts_with("takeover/") && r.name.ends_with("/longest"))
        .map(|r| r.value)
        .collect();
    bar(
        "takeover, whatever the size of RAM",
        "under 50 ms",
        takeovers.iter().copied().reduce(f64::max).map(|longest| {
            (longest < 50.0, format!("{} ms at the longest, {} sizes", number(longest), takeovers.len()))
        }),
    );
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_reached_missed_or_not_measured() {
        let mut report = Report::new("kvm_amd".into());
        report.beside("pause/auto/4096/p50", 300.0, "µs", "COLO", 9000.0);
        report.beside("pause/auto/4096/runs", 0.8, "of time", "COLO", 0.1);
        let bars = bars(&report);
        assert_eq!(
            bars.iter().map(|b| b.reached).collect::<Vec<_>>(),
            [Some(true), Some(false), None, None, None, None, None]
        );
        assert!(bars[0].got.starts_with("30.00 times"), "{}", bars[0].got);
    }

    #[test]
    fn encrypted_bytes_do_not_reach_the_bar_for_unencrypted_ones() {
        let mut report = Report::new("kvm_amd".into());
        report.beside("sustained/encrypted/replicated", 900.0, "MiB/s", "a plain TCP stream", 1000.0);
        assert_eq!(bars(&report)[5].reached, Some(false));
    }
}
