//! `understudy-evacuator`: the evacuation controller, and what an operator tells it.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use understudy_crm::records::{Kind, Order, Plan, Progress, What, time};
use understudy_evacuation::daemon::{self, Config};
use understudy_evacuation::orders;
use understudy_evacuation::people::People;
use understudy_protocol::control::call_once;
use understudy_protocol::evacuator::{EvacuatorFiles, EvacuatorRequest, EvacuatorStatus};
use understudy_protocol::layout::DEFAULT_RUN_ROOT;

/// Brings machines elsewhere whose hosts have died, as the cluster's policy says.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Run in the foreground until SIGTERM. Pacemaker does that: one instance in the cluster, ocf:understudy:evacuator.
    Run {
        /// This node, as the cluster names it.
        #[arg(long)]
        node: String,
        /// Parent of run directories.
        #[arg(long, default_value = DEFAULT_RUN_ROOT)]
        run_root: PathBuf,
        /// The journal.
        #[arg(long, default_value = "/var/log/understudy/evacuation.journal")]
        journal: PathBuf,
    },
    /// Show what the controller on this node does, as JSON.
    Status {
        /// Parent of run directories.
        #[arg(long, default_value = DEFAULT_RUN_ROOT)]
        run_root: PathBuf,
    },
    /// List the plans, from any node.
    Plans {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Carry a plan out, past its brakes. (Never past quorum, maintenance mode and fencing.)
    Release {
        /// The plan, e.g. p3.
        plan: String,
        /// Only these machines of it.
        machines: Vec<String>,
    },
    /// Leave the machines of a plan where they are.
    Cancel {
        /// The plan.
        plan: String,
        /// Only these machines of it.
        machines: Vec<String>,
    },
    /// Empty a host: machines that migrate live leave it while they run, in batches. The others stay, and an alarm names them.
    Drain {
        /// The host.
        node: String,
    },
    /// Have another plan made for machines that were left without a host, or that stay on one that they should leave.
    Retry {
        /// The machines; all if none is named.
        machines: Vec<String>,
    },
    /// Bring a machine that was evacuated back to its home in the policy.
    Return {
        /// The machine.
        machine: String,
    },
}

fn main() -> ExitCode {
    match act(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("understudy-evacuator: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(command: Cmd) -> Result<()> {
    let order = |plan: String, what, machines| orders::order(&Order { plan, what, machines, by: whoami() });
    match command {
        Cmd::Run { node, run_root, journal } => {
            let config = Config { node, files: EvacuatorFiles::below(&run_root), run_root, journal };
            daemon::run(&config, &mut People)
        }
        Cmd::Status { run_root } => {
            let socket = EvacuatorFiles::below(run_root).socket();
            let status: EvacuatorStatus = call_once(socket, &EvacuatorRequest::Status, Duration::from_secs(5))
                .context("no controller answers on this node; crm_mon says where it runs")?;
            println!("{}", serde_json::to_string_pretty(&status)?);
            Ok(())
        }
        Cmd::Plans { json } => {
            let plans = orders::plans()?;
            if json {
                println!("{}", serde_json::to_string_pretty(&plans)?);
            } else {
                plans.iter().for_each(|p| print!("{}", table(p)));
            }
            Ok(())
        }
        Cmd::Release { plan, machines } => order(plan, What::Release, machines),
        Cmd::Cancel { plan, machines } => order(plan, What::Cancel, machines),
        Cmd::Drain { node } => order(node, What::Drain, Vec::new()),
        Cmd::Retry { machines } => order(String::new(), What::Retry, machines),
        Cmd::Return { machine } => {
            let home = orders::go_home(&machine)?;
            println!("{machine} goes to {home}");
            Ok(())
        }
    }
}

/// Who gives the order, for the journal.
fn whoami() -> String {
    let user = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| "somebody".into());
    let host = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_default();
    format!("{user}@{host}")
}

fn table(plan: &Plan) -> String {
    let state = match (&plan.closed, &plan.held) {
        (Some(why), _) => format!("over: {why}"),
        (None, Some(hold)) => format!("held: {}", hold.why()),
        (None, None) => "open".into(),
    };
    let what = if plan.kind == Kind::Drain { " to be left" } else { "" };
    let mut out = format!(
        "{} of {}, {}{what} ({:?}): {state}\n",
        plan.id,
        time(plan.made),
        plan.lost.join(", "),
        plan.automation
    );
    for m in &plan.moves {
        let progress = match &m.progress {
            Progress::Waiting => "waits for a decision".into(),
            Progress::Ready { .. } => "waits for its batch".into(),
            Progress::Released { batch, .. } => {
                format!("{} (batch {batch})", if plan.kind == Kind::Drain { "moves" } else { "starts" })
            }
            Progress::Runs => "runs".into(),
            Progress::Failed { why } => format!("FAILED: {why}"),
            Progress::Dropped { why } => format!("was not moved: {why}"),
        };
        out.push_str(&format!("  {:<20} {:<12} to {:<12} {progress}\n", m.machine, m.from, m.to));
    }
    out
}
