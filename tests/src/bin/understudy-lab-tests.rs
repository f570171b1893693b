//! `understudy-lab-tests`: the lab tier. Runs where the nodes run (`understudy-lab vm run -- understudy-lab-tests`).
//!
//! One cluster, one protected guest, one device at its serial line; every test does something bad to them, waits until
//! protection is back, and then asks the device: a single byte lost, doubled or out of place anywhere fails the test that
//! did it. A test that fails after the whole machine stood still (its emulator does that, see [`understudy_tests::lab::stall`]) is run once
//! more, unless the device saw anything wrong. Evacuation has an estate of its own, before all that. Prints `ok` or `FAILED` a test and `N passed, N failed` at the end.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use understudy_tests::lab::Lab;
use understudy_tests::lab::stall::StallWatch;
use understudy_tests::lab_tests::{agents, bad_days, connections, disks, evacuation, migration, scsi, tools};
use understudy_tests::scenario::World;

#[derive(Parser)]
struct Arguments {
    /// The policy file
    #[arg(long, default_value = "tests/demo/policy.toml")]
    policy: PathBuf,
    /// Only tests whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Leave the lab up at the end
    #[arg(long)]
    keep: bool,
}

/// Tests wait for minutes; a standstill shorter than this makes none of them fail.
const STALL: Duration = Duration::from_secs(20);

struct Tally {
    only: String,
    passed: usize,
    failed: Vec<String>,
    repeated: Vec<String>,
}

impl Tally {
    fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    fn run(&mut self, name: &str, body: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        let result = body();
        let seconds = start.elapsed().as_secs();
        match result {
            Ok(()) => {
                println!("ok      {name} ({seconds} s)");
                self.passed += 1;
                true
            }
            Err(why) => {
                println!("FAILED  {name} ({seconds} s)\n        {why:#}");
                self.failed.push(name.into());
                false
            }
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut tally = Tally { only: arguments.only.clone(), passed: 0, failed: Vec::new(), repeated: Vec::new() };
    play(&arguments, &mut tally);
    let end = if arguments.keep { Lab::running().and_then(|lab| lab.keep()) } else { Lab::down() };
    if let Err(why) = end {
        eprintln!("understudy-lab-tests: {why:#}");
    }
    for name in &tally.repeated {
        println!("repeated, since the whole machine stood still the first time: {name}");
    }
    for name in &tally.failed {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed.len());
    if tally.failed.is_empty() && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn play(arguments: &Arguments, tally: &mut Tally) {
    if tally.wants(scsi::LINUX) {
        tally.run(scsi::LINUX, scsi::linux);
        if scsi::LINUX == arguments.only {
            // It needs no cluster.
            return;
        }
    }
    if tally.wants(disks::POWER_CUTS) {
        tally.run(disks::POWER_CUTS, disks::power_cuts);
    }
    if tally.wants(connections::LIVE_ON) {
        tally.run(connections::LIVE_ON, connections::live_on);
        if !arguments.only.is_empty() && connections::LIVE_ON.starts_with(&arguments.only) {
            // It brings hosts of its own.
            return;
        }
    }
    evacuation::play(&arguments.only, &mut |name, body| tally.run(name, body));
    if arguments.only.starts_with(evacuation::PREFIX) {
        return;
    }
    let mut started = None;
    if !tally.run("two cluster nodes and a board come up", || {
        started = Some(World::bare(|_| {})?);
        Ok(())
    }) {
        return;
    }
    let Some(world) = started else { return };
    for (name, test) in tools::TESTS.iter().chain(agents::TESTS).chain(migration::TESTS) {
        if tally.wants(name) {
            tally.run(name, || test(&world));
        }
    }
    if !tally.run("a policy file of one page configures the cluster", || world.configure(&arguments.policy)) {
        println!("{}", world.describe());
        return;
    }
    let watch = StallWatch::start();
    let mut healthy = tally
        .run("the machine comes up without its standby, and is protected when the standby comes", || {
            bad_days::start_without_standby(&world)
        });
    for (name, test) in bad_days::TESTS {
        if !tally.wants(name) {
            continue;
        }
        if !healthy {
            println!("FAILED  {name}\n        not tried: the machine was not whole after the test before");
            tally.failed.push((*name).into());
            continue;
        }
        let before = world.verdict().map_or(0, |v| v.violations);
        let mut whole = false;
        let mut attempt = || {
            test(&world)?;
            bad_days::whole(&world, before)?;
            whole = true;
            Ok(())
        };
        watch.take_longest();
        let mut repeated = false;
        tally.run(name, || match attempt() {
            Err(why) if watch.take_longest() > STALL && bad_days::whole(&world, before).is_ok() => {
                println!("note    {name}: this whole machine stood still in the middle of it; once more ({why:#})");
                repeated = true;
                attempt()
            }
            result => result,
        });
        if repeated {
            tally.repeated.push((*name).into());
        }
        if !whole {
            println!("{}", world.describe());
            healthy = bad_days::whole(&world, before).is_ok();
        }
    }
    if healthy {
        tally.run("the device's books and the guest's agree to the last line", || bad_days::books_agree(&world));
        tally.run("a frozen primary that wakes up after the takeover is refused and stops itself", || {
            bad_days::zombie(&world)
        });
    }
    if !arguments.keep {
        tally.run("everything goes down without a trace", || world.down());
    }
}
