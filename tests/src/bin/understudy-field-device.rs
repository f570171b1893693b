//! `understudy-field-device`: the device at the far end of a board's serial line. See `understudy_tests::field_device`.
//!
//! Exit status: 0 when nothing broke the rule, 1 when something did, 2 when it could not run.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use understudy_tests::field_device::oracle::Settings;
use understudy_tests::field_device::port::PortName;
use understudy_tests::field_device::report::Verdict;
use understudy_tests::field_device::run::{Configuration, run};

/// Writes numbered lines to a serial line and judges what comes back.
#[derive(Parser)]
struct Arguments {
    /// The line: a tty's path, pty:LINK, tcp:HOST:PORT, tcp-listen:ADDRESS:PORT, unix:PATH or unix-listen:PATH.
    port: PortName,
    /// Time between two lines that are written, in microseconds; 0: as fast as the line takes them.
    #[arg(long, default_value_t = 10_000)]
    interval_us: u64,
    /// A silence longer than this is an outage, in milliseconds.
    #[arg(long, default_value_t = 300)]
    silence_ms: u64,
    /// The guest already runs: accept whatever line comes first.
    #[arg(long)]
    resync: bool,
    /// File for events, one JSON object a line; appended to.
    #[arg(long)]
    events: Option<PathBuf>,
    /// File for the last verdict (JSON).
    #[arg(long)]
    verdict: Option<PathBuf>,
    /// Control socket: status, drain, resume, stop.
    #[arg(long)]
    control: Option<PathBuf>,
    /// At the end, wait so long for the guest's last report, in milliseconds; 0: do not.
    #[arg(long, default_value_t = 10_000)]
    drain_ms: u64,
    /// Time between two tick events, in milliseconds.
    #[arg(long, default_value_t = 1000)]
    tick_ms: u64,
    /// End when standard input closes, as on SIGTERM.
    #[arg(long)]
    until_stdin_closes: bool,
    /// Print the last verdict as JSON instead of a sentence.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let a = Arguments::parse();
    let configuration = Configuration {
        port: a.port,
        settings: Settings { silence_ms: a.silence_ms, resync: a.resync },
        interval_us: a.interval_us,
        events: a.events,
        verdict: a.verdict,
        control: a.control,
        drain_ms: a.drain_ms,
        tick_ms: a.tick_ms,
        until_stdin_closes: a.until_stdin_closes,
    };
    match run(&configuration) {
        Ok(verdict) => {
            print(&verdict, a.json);
            if verdict.ok { ExitCode::SUCCESS } else { ExitCode::from(1) }
        }
        Err(why) => {
            eprintln!("understudy-field-device: {why:#}");
            ExitCode::from(2)
        }
    }
}

fn print(verdict: &Verdict, json: bool) {
    if json {
        match serde_json::to_string_pretty(verdict) {
            Ok(text) => println!("{text}"),
            Err(why) => eprintln!("understudy-field-device: {why}"),
        }
        return;
    }
    let Verdict { lines, sent, undelivered, violations, .. } = verdict;
    let outages: Vec<String> = verdict.outages.iter().map(|o| format!("{} ms", o.ms)).collect();
    println!("{lines} lines received, {sent} sent ({undelivered} not reported), {violations} violations");
    println!("silences: {}", if outages.is_empty() { "none".into() } else { outages.join(", ") });
    for found in &verdict.first_violations {
        println!("  {:?} after line {}: {}", found.violation.kind, found.violation.after_line, found.violation.what);
    }
}
