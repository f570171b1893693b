//! A sample as a few lines for people, and numbers in their units.

use std::fmt::Write;

use understudy_protocol::control::{CaptureStatus, PathStatus, ReplicatorStatus, Role, VmmStatus};
use understudy_protocol::statistics::{Histogram, VerifyStatus};

use crate::verify::names;

/// The answer to `status`, lines with newlines.
pub fn status(status: &ReplicatorStatus, vmm: Option<&VmmStatus>) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    let statistics = &status.statistics;
    line(format!("{}: {}, generation {}", status.machine, role(status.role), status.generation));
    line(format!("  replica    {:?}, source {:?}", status.replica, status.source));
    let peer = status.peer.as_deref().unwrap_or("none");
    line(format!("  peer       {peer} ({})", if status.connected { "connected" } else { "not connected" }));
    for text in path_lines(&status.paths) {
        line(text);
    }
    if status.role == Role::Sender {
        let protected = if status.protected { "yes" } else { "NO" };
        line(format!(
            "  protected  {protected}{}",
            if status.vetoed { ", a veto against the standby stands" } else { "" }
        ));
        if let Some(capture) = vmm.map(|vmm| &vmm.capture).filter(|capture| !capture.strategy.is_empty()) {
            line(format!("  capture    {}", capture_line(capture)));
        }
    }
    line(format!(
        "  epochs     committed {}, current {}, {} in flight, the last {} ms ago",
        status.committed, status.current, statistics.in_flight, status.lag_ms
    ));
    if status.role == Role::Sender {
        let newest = [status.pause_p50_us, status.pause_p99_us, status.pause_max_us].map(time);
        line(format!("  pauses     p50 {}, p99 {}, max {} (the newest 512)", newest[0], newest[1], newest[2]));
        line(format!("             {} (since start)", quantiles(&statistics.pause_us, time)));
        line(format!("  length     {} (from cut to cut)", quantiles(&statistics.epoch_us, time)));
        line(format!("  commit     {} (from cut to acknowledgement)", quantiles(&statistics.commit_us, time)));
    } else {
        line(format!("  commit     {} (from arrival to applied)", quantiles(&statistics.commit_us, time)));
    }
    line(format!("  epoch size {} (on the wire)", quantiles(&statistics.epoch_bytes, size)));
    line(format!("  first copy {:.0} %, the last took {} ms", status.sync_progress * 100.0, status.last_sync_ms));
    let ratio = status.raw_bytes as f64 / status.wire_bytes.max(1) as f64;
    let mut bytes = String::new();
    if status.role == Role::Sender {
        let _ = write!(bytes, "{} captured, ", size(statistics.bytes.captured));
    }
    if status.role == Role::Sender {
        let stages =
            [statistics.bytes.raw, statistics.bytes.changed, statistics.bytes.encoded, statistics.bytes.compressed];
        let [raw, changed, encoded, compressed] = stages.map(size);
        let _ = write!(bytes, "{raw} before encoding, {changed} changed, {encoded} encoded, {compressed} compressed, ");
    } else {
        let _ = write!(bytes, "{} decoded, ", size(status.raw_bytes));
    }
    let _ = write!(
        bytes,
        "{} on the wire ({ratio:.1} : 1), {} of it in committed epochs",
        size(status.wire_bytes),
        size(statistics.bytes.committed)
    );
    line(format!("  bytes      {bytes}"));
    line(format!("  verify     {}", verify(&status.verify, status.role)));
    if status.disk_verify.pass > 0 {
        let verify = &status.disk_verify;
        line(match verify.running {
            true => format!(
                "  disks      comparing with the copies: {} of {} MiB, {} bytes differ",
                verify.done_bytes >> 20,
                verify.total_bytes >> 20,
                verify.differing_bytes
            ),
            false => format!("  disks      {}", verify.last),
        });
    }
    line(format!("  since start {} epochs, {} losses", status.epochs, status.losses));
    line(format!("  note       {}", status.note));
    out
}

/// The network paths to the peer, one a line, and an alarm while one is missing.
fn path_lines(paths: &[PathStatus]) -> Vec<String> {
    let mut lines = Vec::new();
    for path in paths {
        lines.push(format!(
            "  path       {} {}; round trip {}, {} sent, {} of it again, {} received, {} losses",
            path.address,
            path_state(path),
            time(path.rtt_us),
            size(path.sent_bytes),
            size(path.again_bytes),
            size(path.received_bytes),
            path.losses
        ));
    }
    lines.extend(path_alarm(paths).map(|alarm| format!("  ALARM      {alarm}")));
    lines
}

/// Whether a path works, what it does, and since when.
pub fn path_state(path: &PathStatus) -> String {
    let since = time(path.since_ms * 1000);
    match (path.works, path.active) {
        (true, true) => format!("carries the data, up for {since}"),
        (true, false) => format!("ready, up for {since}"),
        (false, _) => format!("MISSING for {since}: {}", path.why),
    }
}

/// What there is to be alarmed about, if a path is missing.
pub fn path_alarm(paths: &[PathStatus]) -> Option<String> {
    let missing = paths.iter().filter(|path| !path.works).count();
    (missing > 0).then(|| format!("{missing} of {} paths to the other node missing", paths.len()))
}

/// How checkpoints are captured: what was asked for, what the last cut chose and why.
pub fn capture_line(capture: &CaptureStatus) -> String {
    let throttle = match capture.throttle_percent {
        0 | 100 => String::new(),
        percent => format!("; the guest may run {percent} % of the time"),
    };
    let choice = if capture.choice.is_empty() { String::new() } else { format!(": {}", capture.choice) };
    format!("{}{choice}{throttle}", capture.strategy)
}

/// What came of comparing RAM.
pub fn verify(verify: &VerifyStatus, role: Role) -> String {
    let found = match verify.failures {
        0 => "never a difference".to_owned(),
        times => format!("{times} TIMES A DIFFERENCE, the last in pages {}", names(&verify.differing)),
    };
    match (role, verify.running, verify.last_ended_s) {
        (Role::Receiver, ..) => format!("{} pages compared, {found}", verify.compared_pages),
        (Role::Sender, true, _) => format!("pass {} is at {} %; {found}", verify.pass, verify.progress_percent),
        (Role::Sender, false, Some(ago)) => format!("{}, {ago} s ago; {found}", verify.last),
        (Role::Sender, false, None) => "not yet".to_owned(),
    }
}

/// The role as a word.
pub fn role(role: Role) -> &'static str {
    match role {
        Role::Sender => "sender",
        Role::Receiver => "receiver",
    }
}

/// `p50 …, p99 …, max …`. (A quantile is the upper bound of the range that it lies in.)
fn quantiles(histogram: &Histogram, unit: fn(u64) -> String) -> String {
    if histogram.count == 0 {
        return "none yet".into();
    }
    let [p50, p99] = [0.5, 0.99].map(|rank| unit(histogram.quantile(rank)));
    format!("p50 ≤ {p50}, p99 ≤ {p99}, max {}", unit(histogram.max))
}

/// Microseconds in the unit that fits: `70 µs`, `1.5 ms`, `20 s`.
pub fn time(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{} ms", three_digits(us as f64 / 1e3)),
        _ => format!("{} s", three_digits(us as f64 / 1e6)),
    }
}

/// Bytes in the unit that fits: `700 B`, `1.5 kB`, `20 MB`.
pub fn size(bytes: u64) -> String {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    match units.iter().find(|(unit, _)| bytes as f64 >= *unit) {
        Some((unit, name)) => format!("{} {name}", three_digits(bytes as f64 / unit)),
        None => format!("{bytes} B"),
    }
}

fn three_digits(value: f64) -> String {
    let text = if value < 9.995 {
        format!("{value:.2}")
    } else if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_at_most_three_digits_and_the_unit_that_fits() {
        assert_eq!(
            [0, 70, 1_000, 1_500, 20_000, 999_400, 3_210_000].map(time),
            ["0 µs", "70 µs", "1 ms", "1.5 ms", "20 ms", "999 ms", "3.21 s"]
        );
        assert_eq!([0, 999, 1_500, 20_000_000, 7_000_000_000].map(size), ["0 B", "999 B", "1.5 kB", "20 MB", "7 GB"]);
    }

    #[test]
    fn a_missing_path_is_an_alarm_and_two_that_work_are_none() {
        let good = PathStatus { address: "10.0.0.2:7790".into(), works: true, active: true, ..PathStatus::default() };
        let bad =
            PathStatus { address: "10.0.1.2:7790".into(), why: "it is silent".into(), since_ms: 3000, ..good.clone() };
        let bad = PathStatus { works: false, ..bad };
        assert!(path_lines(&[]).is_empty());
        let lines = path_lines(&[good.clone(), bad]);
        assert!(lines[0].starts_with("  path       10.0.0.2:7790 carries the data"), "{lines:?}");
        assert!(lines[1].contains("10.0.1.2:7790 MISSING for 3 s: it is silent"), "{lines:?}");
        assert_eq!(lines[2], "  ALARM      1 of 2 paths to the other node missing");
        assert_eq!(path_lines(&[good.clone(), good]).len(), 2);
    }
}
