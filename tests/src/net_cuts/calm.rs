//! A protected machine that nobody cuts: how long an answer takes, beside what its replication takes.
//!
//! The client asks every 5 ms, whether the answer before has come or not. An answer waits for the checkpoint that contains it; so it takes what the guest
//! needs, the time until that checkpoint is cut, and the way to the standby and back. The last of these is in the same run's report of the sender: from the
//! cut to the standby's acknowledgement. A third run lets packets go without waiting (the negative control of the campaigns): what the gate costs is the
//! difference.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{Options, Percentiles, World};
use crate::bench::rows::{Bar, Report, Row};
use crate::power_cuts::ms;

/// Asked beyond this, an answer may take so much longer than one replication round trip.
const BEYOND_MS: f64 = 2.0;

/// What goes into the report.
#[derive(Debug, Serialize)]
pub struct Answers {
    /// Figures.
    pub rows: Vec<Row>,
    /// Goals.
    pub bars: Vec<Bar>,
}

struct Calm {
    kvm_backend: String,
    answers: Percentiles,
    /// From cut to acknowledgement, ms: half of them and 99 of 100.
    commit: [f64; 2],
}

fn run(interval_ms: u64, min_interval_ms: u64, leak: bool, time: Duration) -> Result<Calm> {
    let options = Options { count: 0, seed: None, leak, interval_ms, min_interval_ms };
    let world = World::start(&options)?;
    world.network.judge().latencies.clear();
    // As long as is measured.
    std::thread::sleep(time);
    let latencies = std::mem::take(&mut world.network.judge().latencies);
    world.network.wait("nothing wrong on the network", Duration::from_secs(1), |_| true)?;
    let status = world.sides[world.primary].replicator()?;
    ensure!(status.protected && status.losses == 0, "protection was lost while it was measured: {}", status.note);
    ensure!(latencies.len() > 50, "only {} answers in {} ms", latencies.len(), time.as_millis());
    let commit = [0.5, 0.99].map(|rank| status.statistics.commit_us.quantile(rank) as f64 / 1e3);
    let kvm_backend = world.sides[world.primary].vmm()?.kvm_backend;
    Ok(Calm { kvm_backend, answers: Percentiles::of(latencies.into_iter().map(ms).collect()), commit })
}

/// Measure, each for so long. The calling thread is in another network namespace afterwards.
pub fn measure(time: Duration, say: &dyn Fn(&str)) -> Result<Answers> {
    let without = run(25, 1, true, time).context("packets that do not wait")?;
    let mut report = Report::new(without.kvm_backend.clone());
    let mut bars = Vec::new();
    for (case, least) in [("event-driven", 1), ("every-25ms", 25)] {
        let calm = run(25, least, false, time).with_context(|| format!("checkpoints {case}"))?;
        say(&format!(
            "answers, checkpoints {case}: {} ms; from cut to acknowledgement p50 {:.1}",
            calm.answers, calm.commit[0]
        ));
        let peer = "the same machine, packets do not wait";
        report.beside(format!("net/answer/{case}/p50"), calm.answers.p50, "ms", peer, without.answers.p50);
        report.beside(format!("net/answer/{case}/p99"), calm.answers.p99, "ms", peer, without.answers.p99);
        report.alone(format!("net/answer/{case}/round_trip_p50"), calm.commit[0], "ms");
        report.alone(format!("net/answer/{case}/round_trip_p99"), calm.commit[1], "ms");
        if case == "event-driven" {
            let wanted = BEYOND_MS + calm.commit[0];
            bars.push(Bar {
                bar: "answer of a protected machine, p50, event-driven".into(),
                wanted: format!("within 2 ms plus one replication round trip ({:.1} ms in this run)", calm.commit[0]),
                got: format!("{:.1} ms", calm.answers.p50),
                reached: Some(calm.answers.p50 <= wanted),
            });
        }
    }
    Ok(Answers { rows: report.rows, bars })
}

/// For people.
pub fn table(measured: &Answers) -> String {
    let mut text = String::new();
    for row in &measured.rows {
        let beside =
            row.peer_or_limit.as_ref().map_or_else(String::new, |peer| format!("{:.2} {}", peer.value, peer.name));
        text += &format!("  {:<36} {:>8.2} {:<4} {beside}\n", row.name, row.value, row.unit);
    }
    text + &crate::bench::rows::bars_table(&measured.bars)
}
