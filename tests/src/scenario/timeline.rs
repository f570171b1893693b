//! What an outage consisted of, from the logs of those who know: the BMC, corosync, the agent, the field device.

use std::fs;

use anyhow::Result;
use serde::Serialize;

use super::world::{MACHINE, World};

/// One outage, in milliseconds after its cause. A stage that did not take place (a planned switchover has no fencing) or
/// left no trace is `None`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outage {
    /// What happened.
    pub what: String,
    /// Wall clock of the cause, ms since 1970.
    pub at_ms: u64,
    /// The survivor's corosync noticed.
    pub detected_ms: Option<u64>,
    /// The BMC confirmed the fencing.
    pub fenced_ms: Option<u64>,
    /// The machine ran on the other node.
    pub promoted_ms: Option<u64>,
    /// The device saw a byte again.
    pub first_output_ms: Option<u64>,
    /// The longest time without a byte that contains the cause, as the device saw it.
    pub silence_ms: Option<u64>,
    /// Protected again.
    pub protected_ms: Option<u64>,
}

impl Outage {
    /// Begin: the cause happens now.
    pub fn begin(what: impl Into<String>) -> Self {
        Self { what: what.into(), at_ms: crate::lab::places::now_ms(), ..Self::default() }
    }

    fn since(&self, t_ms: u64) -> Option<u64> {
        t_ms.checked_sub(self.at_ms)
    }

    /// Fill in what is known once the machine runs on `survivor`.
    pub fn collect(&mut self, world: &World, survivor: &str) -> Result<()> {
        let events = world.lab.events()?;
        self.fenced_ms = events
            .iter()
            .find(|e| e.t_ms >= self.at_ms && e.event.starts_with("fence-done"))
            .and_then(|e| self.since(e.t_ms));
        self.detected_ms = detected(world, survivor, self.at_ms);
        let mark = format!("/run/understudy/{MACHINE}/promoted");
        self.promoted_ms = world
            .lab
            .run(survivor, &["stat", "-c", "%.3Y", &mark])
            .ok()
            .and_then(|text| text.trim().parse::<f64>().ok())
            .and_then(|seconds| self.since((seconds * 1000.0) as u64));
        self.first_output_ms = world.first_byte_after(self.at_ms)?.and_then(|t| self.since(t));
        let verdict = world.verdict()?;
        self.silence_ms = verdict.outages.iter().filter(|o| o.from.wall_ms + o.ms >= self.at_ms).map(|o| o.ms).max();
        Ok(())
    }
}

/// When the survivor's corosync formed a membership without the dead node: the first such line after `at_ms`.
fn detected(world: &World, survivor: &str, at_ms: u64) -> Option<u64> {
    let log = world.lab.disk_file(survivor, "log-corosync/corosync.log").ok()?;
    let text = fs::read_to_string(log).ok()?;
    text.lines()
        .filter(|l| l.contains("A processor failed") || l.contains("A new membership"))
        .filter_map(time_of_day_ms)
        .map(|t| {
            // The line has no date; it is within half a day of the cause.
            let day = 86_400_000;
            (t + day - at_ms % day) % day
        })
        .filter(|after| *after < 43_200_000)
        .min()
}

/// `Nov 22 10:35:18.123 …` or `Nov 22 10:35:18 [12] …` → ms since midnight.
fn time_of_day_ms(line: &str) -> Option<u64> {
    let clock = line.split_whitespace().nth(2)?;
    let (hms, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut parts = hms.split(':').map(str::parse::<u64>);
    let (h, m, s) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    let millis: u64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    Some(((h * 60 + m) * 60 + s) * 1000 + millis)
}

/// A table of outages for people; `-` where a stage did not take place.
pub fn table(outages: &[Outage]) -> String {
    let mut text = format!(
        "  {:<34} {:>9} {:>9} {:>9} {:>13} {:>9} {:>10}\n",
        "outage (ms after the cause)", "detected", "fenced", "promoted", "first output", "silence", "protected"
    );
    let cell = |v: Option<u64>| v.map_or_else(|| "-".to_string(), |v| v.to_string());
    for o in outages {
        text.push_str(&format!(
            "  {:<34} {:>9} {:>9} {:>9} {:>13} {:>9} {:>10}\n",
            o.what,
            cell(o.detected_ms),
            cell(o.fenced_ms),
            cell(o.promoted_ms),
            cell(o.first_output_ms),
            cell(o.silence_ms),
            cell(o.protected_ms)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corosyncs_clock_is_read_with_and_without_fractions() {
        assert_eq!(time_of_day_ms("Nov 22 10:35:18.123 [9] n2 corosync notice"), Some(38_118_123));
        assert_eq!(time_of_day_ms("Nov 22 00:00:01 [9] n2 corosync notice"), Some(1000));
        assert_eq!(time_of_day_ms("garbage"), None);
    }

    #[test]
    fn a_stage_that_did_not_happen_is_a_dash() {
        let outage = Outage { what: "move".into(), promoted_ms: Some(7), ..Outage::default() };
        let table = table(&[outage]);
        let last = table.lines().last().unwrap();
        assert_eq!(last.split_whitespace().collect::<Vec<_>>(), ["move", "-", "-", "7", "-", "-", "-"]);
    }
}
