//! `understudy-demo`: what `make demo` shows. Runs where the nodes run (the lab VM, or a host with full KVM).
//!
//! Exit status: 0 when every byte and every promise was kept, 1 when one was not or a step failed.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use understudy_tests::field_device::report::Verdict;
use understudy_tests::lab::host;
use understudy_tests::scenario::timeline::table;
use understudy_tests::scenario::world::VMM_CLONE;
use understudy_tests::scenario::{Outage, World};

/// A protected Linux guest, its serial line, and a week of bad luck in a few minutes.
#[derive(Parser)]
struct Arguments {
    /// The policy file
    #[arg(long, default_value = "tests/demo/policy.toml")]
    policy: PathBuf,
    /// Where the report goes (JSON)
    #[arg(long, default_value = "target/demo/report.json")]
    report: PathBuf,
    /// Leave the lab up at the end, to look around with `understudy-lab exec`
    #[arg(long)]
    keep: bool,
}

/// `target/demo/report.json`.
#[derive(Serialize)]
struct Report {
    ok: bool,
    failure: Option<String>,
    kvm_backend: String,
    where_it_ran: String,
    outages: Vec<Outage>,
    promises: Vec<Promise>,
    device: Option<Verdict>,
    seconds: u64,
}

/// One line of the verdict.
#[derive(Debug, Clone, Serialize)]
struct Promise {
    what: String,
    kept: bool,
    shown_by: String,
}

static START: OnceLock<Instant> = OnceLock::new();

fn say(text: &str) {
    let seconds = START.get_or_init(Instant::now).elapsed().as_secs();
    println!("  {:>3}:{:02}  {text}", seconds / 60, seconds % 60);
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    START.get_or_init(Instant::now);
    println!("\n  Understudy: a Linux guest survives the death of its host\n");
    let mut report = Report {
        ok: false,
        failure: None,
        kvm_backend: String::new(),
        where_it_ran: host::choose().map(|w| w.1).unwrap_or_default(),
        outages: Vec::new(),
        promises: Vec::new(),
        device: None,
        seconds: 0,
    };
    let mut world = match World::up(&arguments.policy, say) {
        Ok(world) => world,
        Err(why) => {
            eprintln!("understudy-demo: {why:#}");
            let _ = understudy_tests::lab::Lab::down();
            return ExitCode::FAILURE;
        }
    };
    let result = play(&mut world, &mut report);
    if let Err(why) = &result {
        report.failure = Some(format!("{why:#}"));
        eprintln!("{}", world.describe());
    }
    if arguments.keep {
        match world.lab.keep() {
            Ok(()) => say("the lab stays up: `understudy-lab status`, `understudy-lab down`"),
            Err(why) => eprintln!("understudy-demo: {why:#}"),
        }
    } else {
        say("taking everything down");
        if let Err(why) = world.down() {
            eprintln!("understudy-demo: {why:#}");
        }
    }
    report.seconds = START.get_or_init(Instant::now).elapsed().as_secs();
    report.ok = result.is_ok() && !report.promises.is_empty() && report.promises.iter().all(|p| p.kept);
    print_end(&report);
    if let Err(why) = write_report(&arguments.report, &report) {
        eprintln!("understudy-demo: {why:#}");
        return ExitCode::FAILURE;
    }
    println!("  The whole report: {}\n", arguments.report.display());
    if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The play, act by act.
fn play(world: &mut World, report: &mut Report) -> Result<()> {
    say("waiting for the machine to be started by Pacemaker");
    let mut primary = world.wait_running(None)?;
    report.kvm_backend = world.vmm(primary)?.kvm_backend;
    say(&format!("it runs on {primary} ({}); the guest boots", report.kvm_backend));
    world.wait_lines(20)?;
    say("the guest's lines arrive at the device, the device's lines at the guest");
    primary = protect(world, None)?;

    for n in 1..=2 {
        let other = World::other(primary);
        let mut outage = Outage::begin(format!("power cut {n}: {primary} dies"));
        say(&format!("CUT the power of {primary}, which runs the machine"));
        world.lab.power_cut(primary)?;
        survive(world, &mut outage, other)?;
        world.boot(primary)?;
        report.outages.push(outage);
        primary = rearm(world, report)?;
        ensure!(primary == other, "the machine moved back to {primary} by itself");
        world.wait_lines(100)?;
    }

    let other = World::other(primary);
    let mut outage = Outage::begin(format!("planned: {primary} → {other}"));
    say(&format!("MOVE the machine to {other} (crm resource move)"));
    world.lab.run(primary, &["crm", "resource", "move", VMM_CLONE, other, "force"])?;
    survive(world, &mut outage, other)?;
    // The command waits for the cluster, and the old primary is heard meanwhile: only the silence tells something.
    (outage.promoted_ms, outage.first_output_ms) = (None, None);
    world.lab.run(other, &["crm", "resource", "clear", VMM_CLONE])?;
    report.outages.push(outage);
    primary = rearm(world, report)?;
    world.wait_lines(100)?;

    let resets_before = world.vmm(primary)?;
    let mut outage = Outage::begin(format!("replicator on {primary} killed"));
    say(&format!("KILL the replicator on {primary}; the guest must not notice"));
    let old = world.kill_process(primary, "replicator")?;
    world.wait_lines(50)?;
    let now = protect(world, Some(&mut outage))?;
    outage.collect(world, primary)?;
    (outage.promoted_ms, outage.first_output_ms, outage.detected_ms) = (None, None, None);
    let after = world.vmm(primary)?;
    report.promises.push(Promise {
        what: "the death of the replicator left the guest alone".into(),
        kept: now == primary && after.generation == resets_before.generation && after.resets == resets_before.resets,
        shown_by: format!("still on {now}, generation {}, process {old} replaced", after.generation),
    });
    report.outages.push(outage);
    world.wait_lines(100)?;

    let other = World::other(primary);
    let mut outage = Outage::begin(format!("VMM on {primary} killed"));
    say(&format!("KILL the VMM on {primary}"));
    world.kill_process(primary, "vmm")?;
    survive(world, &mut outage, other)?;
    report.outages.push(outage);
    rearm(world, report)?;
    world.wait_lines(200)?;

    say("the device stops writing and compares its books with the guest's");
    let verdict = world.final_verdict()?;
    judge(&verdict, report);
    report.device = Some(verdict);
    Ok(())
}

/// The machine runs on `survivor` and is heard again.
fn survive(world: &World, outage: &mut Outage, survivor: &'static str) -> Result<()> {
    say("waiting for the standby to take over");
    let node = world.wait_running(Some(World::other(survivor)))?;
    ensure!(node == survivor, "it runs on {node} instead of {survivor}");
    world.wait_lines(20)?;
    outage.collect(world, survivor)?;
    let after = |v: Option<u64>| v.map_or("?".into(), |v| v.to_string());
    say(&format!(
        "it runs on {survivor}: promoted after {} ms, heard again after {} ms",
        after(outage.promoted_ms),
        after(outage.first_output_ms)
    ));
    Ok(())
}

/// Protection is back; noted in the newest outage.
fn rearm(world: &World, report: &mut Report) -> Result<&'static str> {
    let mut last = report.outages.pop().context("no outage to re-arm after")?;
    let node = protect(world, Some(&mut last));
    report.outages.push(last);
    node
}

fn protect(world: &World, outage: Option<&mut Outage>) -> Result<&'static str> {
    let node = world.wait_protected()?;
    let status = world.replicator(node)?;
    say(&format!(
        "PROTECTED: {} holds epoch {} (first copy {} ms, pause p50 {} µs)",
        World::other(node),
        status.committed,
        status.last_sync_ms,
        status.pause_p50_us
    ));
    if let Some(outage) = outage {
        outage.protected_ms = understudy_tests::lab::places::now_ms().checked_sub(outage.at_ms);
    }
    Ok(node)
}

/// What was promised, against what the device saw.
fn judge(v: &Verdict, report: &mut Report) {
    let mut promise = |what: &str, kept: bool, shown_by: String| {
        report.promises.push(Promise { what: what.into(), kept, shown_by });
    };
    promise(
        "one boot: the guest never restarted",
        v.boot_ids.len() == 1,
        format!("boot ids seen: {}", v.boot_ids.join(", ")),
    );
    promise(
        "the guest's clock never went back",
        !v.first_violations.iter().any(|f| f.violation.kind == understudy_tests::field_device::report::Kind::ClockBack)
            && v.guest_clock_ms.1 > v.guest_clock_ms.0,
        format!("{} ms to {} ms", v.guest_clock_ms.0, v.guest_clock_ms.1),
    );
    promise(
        "memory intact",
        v.memory_bad == 0 && v.memory_pages > 0,
        format!("{} pages verified and rewritten in {} rounds, {} bad", v.memory_pages, v.memory_rounds, v.memory_bad),
    );
    promise(
        "every line from the guest exactly once and in order",
        v.violations == 0 && v.lines == v.last_line,
        format!("{} lines, {} bytes, {} violations", v.lines, v.bytes, v.violations),
    );
    promise(
        "every line to the guest exactly once and in order",
        v.drained && v.undelivered == 0 && v.guest_gaps == 0 && v.guest_repeats == 0 && v.guest_bad == 0 && v.sent > 0,
        format!(
            "{} lines, {} not reported, {} gaps, {} repeats, {} unreadable",
            v.sent, v.undelivered, v.guest_gaps, v.guest_repeats, v.guest_bad
        ),
    );
    promise("the field device found nothing else wrong", v.ok, format!("{} violations in all", v.violations));
}

fn print_end(report: &Report) {
    println!("\n{}", table(&report.outages));
    for p in &report.promises {
        println!("  {}  {:<58} {}", if p.kept { "kept  " } else { "BROKEN" }, p.what, p.shown_by);
    }
    for violation in report.device.iter().flat_map(|d| &d.first_violations).take(10) {
        println!("          {:?}: {}", violation.violation.kind, violation.violation.what);
    }
    if let Some(why) = &report.failure {
        println!("\n  FAILED: {why}");
    }
    let verdict = if report.ok { "NOTHING WAS LOST" } else { "A PROMISE WAS BROKEN" };
    println!("\n  {verdict} ({} s, {})\n", report.seconds, report.where_it_ran);
}

fn write_report(path: &std::path::Path, report: &Report) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    fs::write(path, serde_json::to_string_pretty(report)?).with_context(|| format!("writing {}", path.display()))
}
