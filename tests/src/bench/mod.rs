//! `make bench`: figures, each beside a peer or a physical limit from the same run, and never without the KVM flavour.
//!
//! | where | what | modules |
//! |---|---|---|
//! | on the host's own KVM, with ring-3 guests | the replication engine beside COLO, a plain copy, a plain TCP stream | [`replication`] and what it calls |
//! | on the host's own KVM | pauses of the fastest writer, first copy, the VMM's own memory, an agent's monitor | [`host`] |
//! | where the nodes run | first serial byte beside QEMU, monitor beside a shell agent, memory with Linux, power cuts | [`lab`] |
//! | where the nodes run | virtio-blk beside QEMU's, and protected | [`disk_guest`] |
//! | where the nodes run | virtio-net beside QEMU's, and protected | [`net_guest`] |
//! | on the host's own kernel, no guest | the network back end beside plain reads and writes of taps | [`net`] |
//! | nowhere | size of the code | [`size`] |
//!
//! ```text
//! replication ─► pauses ──────┐            pair: two VMMs, two replicators over loopback
//!             ├► flow         ├─► guest ──► qemu: COLO, XBZRLE
//!             ├► output       │            limits: copy, TCP, LZ4, Zstandard
//!             └► takeover ────┘            rows: the report
//! ```

pub mod contents;
pub mod disk;
pub mod disk_guest;
pub mod flow;
pub mod guest;
pub mod host;
pub mod lab;
pub mod limits;
pub mod memory;
pub mod net;
pub mod net_guest;
pub mod output;
pub mod pair;
pub mod pauses;
pub mod qemu;
pub mod replication;
pub mod rows;
pub mod size;
pub mod takeover;

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

/// Some measurements of the same thing.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Spread {
    /// How many.
    pub runs: usize,
    /// Smallest.
    pub min: f64,
    /// Middle.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value; of none it is all zero.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
        Self { runs: values.len(), min: at(0), median: at(values.len() / 2), max: at(values.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} (min {:.1}, max {:.1}, {} runs)", self.median, self.min, self.max, self.runs)
    }
}

/// How long a command takes as a whole process, in ms, over `runs` runs after one that is not counted; and its exit code.
pub fn time_process(runs: usize, mut command: impl FnMut() -> Result<Command>) -> Result<(Spread, i32)> {
    let mut times = Vec::new();
    let mut code = -1;
    for run in 0..=runs {
        let mut command = command()?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let status = command.status().with_context(|| format!("running {command:?}"))?;
        if run > 0 {
            times.push(started.elapsed().as_secs_f64() * 1000.0);
        }
        code = status.code().unwrap_or(-1);
    }
    Ok((Spread::of(times), code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_the_sorted_values() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((spread.min, spread.median, spread.max, spread.runs), (1.0, 2.0, 3.0, 3));
        assert_eq!(Spread::of(Vec::new()).runs, 0);
    }
}
