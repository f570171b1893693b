//! `understudy-ocf`: the agents by the name they are called by, and subcommands for people.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use ocf::Environment;
use understudy_agents::{AGENTS, agent, hook, install};

/// Understudy's resource agents
#[derive(Debug, Parser)]
#[command(version, about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// An action of ocf:understudy:vmm (parameters come from OCF_RESKEY_*)
    Vmm(Call),
    /// An action of ocf:understudy:replicator
    Replicator(Call),
    /// An action of ocf:understudy:serial
    Serial(Call),
    /// An action of ocf:understudy:migrations
    Migrations(Call),
    /// An action of ocf:understudy:evacuator
    Evacuator(Call),
    /// An action of ocf:understudy:monitor
    Monitor(Call),
    /// Make the links by which the cluster finds the agents
    Install {
        /// Parent of resource.d
        #[arg(long, default_value = "/usr/lib/ocf")]
        ocf_root: PathBuf,
        /// What the links point to; this executable if not given
        #[arg(long)]
        executable: Option<PathBuf>,
    },
    /// Print an agent's metadata, or write that of all agents to files
    Metadata {
        /// Which agent
        #[arg(required_unless_present = "all", value_parser = AGENTS)]
        agent: Option<String>,
        /// All of them, as DIR/AGENT.xml
        #[arg(long, requires = "dir", conflicts_with = "agent")]
        all: bool,
        /// Directory for --all
        #[arg(long)]
        dir: Option<PathBuf>,
    },
    /// What the replicator asks of the cluster
    Hook(hook::Hook),
}

#[derive(Debug, Args)]
struct Call {
    /// start, stop, monitor, promote, demote, notify, validate-all, meta-data, …
    action: String,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let called = arguments.next().unwrap_or_default();
    let name = Path::new(&called).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if AGENTS.contains(&name) {
        // The standard: the first argument is the action, the rest is ignored; no action is an unknown one.
        return act(name, &arguments.next().unwrap_or_default());
    }
    match Cli::parse().command {
        Command::Vmm(call) => act("vmm", &call.action),
        Command::Replicator(call) => act("replicator", &call.action),
        Command::Serial(call) => act("serial", &call.action),
        Command::Migrations(call) => act("migrations", &call.action),
        Command::Evacuator(call) => act("evacuator", &call.action),
        Command::Monitor(call) => act("monitor", &call.action),
        Command::Hook(hook) => hook::run(&hook, &Environment::from_process()),
        Command::Install { ocf_root, executable } => report(make_links(&ocf_root, executable)),
        Command::Metadata { agent, dir, .. } => match (agent, dir) {
            (Some(name), _) => act(&name, "meta-data"),
            (None, Some(dir)) => report(write_metadata(&dir)),
            (None, None) => report(Err(anyhow::anyhow!("say which agent, or --all --dir DIR"))),
        },
    }
}

fn act(name: &str, action: &str) -> ExitCode {
    match agent(name) {
        Some(agent) => ocf::run(agent.as_ref(), action, Environment::from_process()).into(),
        None => ocf::ExitCode::NotInstalled.into(),
    }
}

fn make_links(ocf_root: &Path, executable: Option<PathBuf>) -> Result<()> {
    let executable = match executable {
        Some(given) => given,
        None => std::env::current_exe().context("cannot tell where this executable is; use --executable")?,
    };
    for link in install::install(ocf_root, &executable)? {
        println!("{} -> {}", link.display(), executable.display());
    }
    Ok(())
}

fn write_metadata(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    for name in AGENTS {
        let Some(agent) = agent(name) else { continue };
        let file = dir.join(format!("{name}.xml"));
        std::fs::write(&file, ocf::metadata::document(&agent.description()))
            .with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", file.display());
    }
    Ok(())
}

fn report(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("understudy-ocf: {error:#}");
            ExitCode::FAILURE
        }
    }
}
