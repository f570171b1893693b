//! One iperf3 stream, from the guest.

use std::io::{BufRead, BufReader};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Home, Kind};
use crate::connections::switch::guest;

/// Until the end.
pub fn run(home: &Home) -> Result<()> {
    let mut iperf3 = Command::new("iperf3");
    iperf3.args(["--client", &guest(), "--reverse", "--json-stream", "--forceflush", "--interval", "0.2"]);
    // The longest that it takes; in small pieces, so that a low rate is no bursts.
    // (By itself it wakes up every millisecond to look whether it may send.)
    iperf3.args(["--pacing-timer", "50000"]);
    iperf3.args(["--time", "86400", "--length", "4K", "--bitrate", &format!("{}K", home.load.iperf_kbit)]);
    let mut program = home.program(&iperf3)?;
    let output = program.output.take().context("iperf3 without output")?;
    for line in BufReader::new(output).lines() {
        let line = line.context("listening to iperf3")?;
        let said: Value = serde_json::from_str(&line).with_context(|| format!("iperf3 said {line:?}"))?;
        match said["event"].as_str() {
            Some("interval") => match said["data"]["sum"]["bytes"].as_u64() {
                Some(0) => {}
                Some(bytes) => home.beat_and(Kind::Iperf3, |state| state.totals.iperf3_bytes += bytes),
                None => bail!("iperf3 said {line:?}"),
            },
            Some("error") => bail!("iperf3 says: {}", said["data"]),
            _ => {}
        }
    }
    program.end()
}
