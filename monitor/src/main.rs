//! `understudy-monitor`: the monitor of one node, and what it says.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use understudy_monitor::bmc;
use understudy_monitor::daemon::{Daemon, Settings};
use understudy_monitor::matrix::Matrix;
use understudy_monitor::report::{self, Report};
use understudy_monitor::watch::Config;
use understudy_monitor::wire::Plane;
use understudy_protocol::key::{DEFAULT_KEY_FILE, Key};
use understudy_protocol::layout::DEFAULT_RUN_ROOT;

/// Watches nodes and machines over two networks, and says what is wrong with which.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run until told to end. (ocf:understudy:monitor does this.)
    Serve(Box<Serve>),
    /// Print how everything looks from this node. Exit status 1 if something is wrong, 2 if nothing can be said.
    Status {
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
        /// Parent of run directories.
        #[arg(long, default_value = DEFAULT_RUN_ROOT)]
        run_root: PathBuf,
    },
}

#[derive(Args)]
struct Serve {
    /// This node's name, as the cluster has it.
    #[arg(long)]
    node: String,
    /// Every node's address in the production network: NODE=HOST:PORT, separated by blanks.
    #[arg(long)]
    production: String,
    /// Every node's address in the management network, in the same way.
    #[arg(long, default_value = "")]
    management: String,
    /// Nodes' racks: NODE=RACK, separated by blanks.
    #[arg(long, default_value = "")]
    racks: String,
    /// File with the key that nodes know each other by.
    #[arg(long, default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
    /// A heartbeat every so many ms.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(20..=60_000))]
    interval_ms: u64,
    /// So many heartbeats that do not come are silence.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=100))]
    missed: u32,
    /// So many times in a row something must be seen before it counts.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    samples: u32,
    /// For so long the cluster may restart what is wrong on its node before that counts as failed, ms.
    #[arg(long, default_value_t = 60_000)]
    restart_ms: u64,
    /// Rows of the fault matrix besides the default ones: matrix = [{ name = …, verdict = … }, …] in TOML.
    #[arg(long, default_value = "")]
    matrix: String,
    /// Tell Pacemaker's node health that this node is cut off from the production network (#health-understudy).
    #[arg(long)]
    health: bool,
    /// Do not ask the management controllers (fencing devices) of hosts that are gone for their power state.
    #[arg(long)]
    no_bmc: bool,
    /// Parent of run directories.
    #[arg(long, default_value = DEFAULT_RUN_ROOT)]
    run_root: PathBuf,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Serve(serve) => run(&serve),
        Command::Status { json, run_root } => status(&run_root, json),
    };
    match done {
        Ok(code) => code,
        Err(why) => {
            eprintln!("understudy-monitor: {why:#}");
            ExitCode::from(2)
        }
    }
}

/// `NODE=VALUE`, separated by blanks.
fn pairs(option: &str, text: &str) -> Result<BTreeMap<String, String>> {
    let mut pairs = BTreeMap::new();
    for word in text.split_whitespace() {
        let (node, value) = word.split_once('=').with_context(|| format!("--{option}: {word:?} is not NODE=…"))?;
        if pairs.insert(node.to_owned(), value.to_owned()).is_some() {
            bail!("--{option} has {node} twice");
        }
    }
    Ok(pairs)
}

fn run(serve: &Serve) -> Result<ExitCode> {
    let production = pairs("production", &serve.production)?;
    let mut racks = pairs("racks", &serve.racks)?;
    let nodes = production.keys().map(|node| (node.clone(), racks.remove(node))).collect();
    let matrix = Matrix::read_line(&serve.matrix).map_err(|why| anyhow::anyhow!("--matrix: {why}"))?;
    let management = pairs("management", &serve.management)?;
    let settings = Settings {
        config: Config {
            node: serve.node.clone(),
            nodes,
            interval_ms: serve.interval_ms,
            missed: serve.missed,
            samples: serve.samples,
            restart_ms: serve.restart_ms,
            matrix,
        },
        addresses: [(Plane::Production, production), (Plane::Management, management)].into(),
        key: Key::load(&serve.key)?,
        run_root: serve.run_root.clone(),
        crm_mon: ["crm_mon", "--one-shot", "--output-as=xml"].map(str::to_owned).to_vec(),
        attrd_updater: "attrd_updater".into(),
        cibadmin: ["cibadmin", "--query"].map(str::to_owned).to_vec(),
        fence_agents: bmc::AGENTS.into(),
        bmc: !serve.no_bmc,
        health: serve.health,
    };
    let daemon = Daemon::start(settings)?;
    eprintln!("INFO: monitoring from node {}", serve.node);
    while !daemon.ends() {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(ExitCode::SUCCESS)
}

fn status(run_root: &std::path::Path, json: bool) -> Result<ExitCode> {
    let report = report::ask(run_root, Duration::from_secs(5))
        .context("asking this node's monitor (is ocf:understudy:monitor configured and running?)")?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(match &report.waits_for {
        Some(_) => ExitCode::from(2),
        None if report.judged.iter().any(|j| j.verdict.alarms()) => ExitCode::from(1),
        None => ExitCode::SUCCESS,
    })
}

fn table(report: &Report) -> String {
    let mut text = format!("seen from {}{}\n", report.node, if report.speaks { ", which speaks for all" } else { "" });
    if let Some(why) = &report.waits_for {
        text.push_str(&format!("nothing is judged: {why}\n"));
    }
    for j in &report.judged {
        let subject = j.machine.as_ref().map_or_else(|| j.node.clone(), |m| format!("{}/{m}", j.node));
        text.push_str(&format!(
            "{subject:24} {:20} {:20} {:>8} s  {}\n",
            j.verdict.to_string(),
            j.row,
            j.for_ms / 1000,
            j.observation
        ));
    }
    if let Some(last) = &report.last_refused {
        text.push_str(&format!("{} datagrams were not taken; the last: {last}\n", report.refused));
    }
    text
}
