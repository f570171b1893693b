//! `understudy-ocf hook …`: what the replicator asks of the cluster. It knows no cluster; this does.
//!
//! Exit codes: 0 done and proven; 1 not (yet), ask again; 2 this node has been superseded, stop the machine.

use std::fs::File;
use std::io::ErrorKind;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use ocf::{Deadline, Environment};
use understudy_protocol::control::{ControlError, ReplicaState, VmmRequest, VmmState, VmmStatus};
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, DEFAULT_SHM_ROOT, Layout, valid_machine_name};

use crate::cluster::{Cluster, ClusterError};
use crate::incoming::{self, Roots};
use crate::machine_runs;
use crate::pacemaker::Pacemaker;
use crate::rules::Fitness;
use crate::score_lock;
use crate::service::ask;
use crate::veto::{self, Subject, VetoError};

/// A hook ends within this time, whatever the cluster does; the replicator gives it ten seconds. A membership that is being
/// formed anew takes most of it: until that is done nothing can be stored.
const LIMIT: Duration = Duration::from_secs(9);

/// For a VMM that is started; the caller gives it thirty seconds.
const PREPARE_LIMIT: Duration = Duration::from_secs(28);

/// Options of all hooks.
#[derive(Debug, Args)]
pub struct Hook {
    /// The vmm primitive; looked for in the cluster's configuration if not given
    #[arg(long, global = true)]
    vmm_resource: Option<String>,
    /// This node's name; asked of the cluster if not given
    #[arg(long, global = true)]
    node: Option<String>,
    /// Parent of the run directories
    #[arg(long, global = true, default_value = DEFAULT_RUN_ROOT)]
    run_root: String,
    /// What to do
    #[command(subcommand)]
    call: Call,
}

#[derive(Debug, Subcommand)]
enum Call {
    /// Forbid the Promoted role everywhere but here, and prove that PEER knows or is down
    Veto {
        /// The machine
        #[arg(long)]
        machine: String,
        /// Node that must not be promoted
        #[arg(long)]
        peer: String,
    },
    /// Lift the veto
    ClearVeto {
        /// The machine
        #[arg(long)]
        machine: String,
        /// Even if another node imposed it (for a person who knows that that node is gone for good)
        #[arg(long)]
        force: bool,
    },
    /// Have the VMM of a machine that is migrated to this node stand by
    PrepareMigration {
        /// The machine
        #[arg(long)]
        machine: String,
        /// Node that sends it
        #[arg(long)]
        from: String,
        /// Parent of the shared-memory directories
        #[arg(long, default_value = DEFAULT_SHM_ROOT)]
        shm_root: String,
    },
    /// Undo that, unless the machine runs
    ForgetMigration {
        /// The machine
        #[arg(long)]
        machine: String,
        /// Parent of the shared-memory directories
        #[arg(long, default_value = DEFAULT_SHM_ROOT)]
        shm_root: String,
    },
    /// Tell the cluster how good this node's replica is
    ReplicaState {
        /// The machine
        #[arg(long)]
        machine: String,
        /// State of the replica
        #[arg(long, value_enum, ignore_case = true)]
        state: Standing,
    },
}

/// What the replicator says of the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Standing {
    /// No usable image
    Inconsistent,
    /// Being filled
    Syncing,
    /// The newest committed epoch
    #[value(name = "uptodate", alias = "up-to-date")]
    UpToDate,
    /// Whole, and the machine has gone on without it
    Outdated,
    /// Whole and perhaps the newest; the primary is not connected
    Disconnected,
}

impl Standing {
    fn replica(self) -> (ReplicaState, bool) {
        match self {
            Self::Inconsistent => (ReplicaState::Inconsistent, true),
            Self::Syncing => (ReplicaState::Syncing, true),
            Self::UpToDate => (ReplicaState::UpToDate, true),
            Self::Outdated => (ReplicaState::Outdated, true),
            Self::Disconnected => (ReplicaState::UpToDate, false),
        }
    }
}

/// Carry out a hook; what went wrong is said on stderr.
pub fn run(hook: &Hook, environment: &Environment) -> ExitCode {
    crate::daemon::raise_priority();
    let cluster = Pacemaker::new(environment).on_node(hook.node.clone());
    if let Some(done) = carry_out_locally(hook, &cluster, environment) {
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("{why}");
                ExitCode::FAILURE
            }
        };
    }
    match carry_out(hook, &cluster, Deadline::after(LIMIT)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(if matches!(error, VetoError::Superseded { .. }) { 2 } else { 1 })
        }
    }
}

/// What concerns only this node's VMM.
fn carry_out_locally(hook: &Hook, cluster: &dyn Cluster, environment: &Environment) -> Option<Result<(), String>> {
    let roots = |shm| Roots { run: &hook.run_root, shm };
    Some(match &hook.call {
        Call::PrepareMigration { machine, shm_root, .. } => {
            incoming::prepare(cluster, environment, machine, roots(shm_root), PREPARE_LIMIT)
        }
        Call::ForgetMigration { machine, shm_root } => {
            incoming::forget(cluster, environment, machine, roots(shm_root), LIMIT)
        }
        Call::Veto { .. } | Call::ClearVeto { .. } | Call::ReplicaState { .. } => return None,
    })
}

fn carry_out(hook: &Hook, cluster: &dyn Cluster, deadline: Deadline) -> Result<(), VetoError> {
    let resource = hook.vmm_resource.as_deref();
    match &hook.call {
        Call::Veto { machine, peer } => {
            let (runs_as, _lock) = exclusively(hook, machine, deadline)?;
            veto::impose(cluster, &Subject { machine, resource, runs_as }, peer, deadline)
        }
        Call::ClearVeto { machine, force: true } => {
            // A person may do so on any node.
            veto::lift(cluster, &Subject { machine, resource, runs_as: Generation::ZERO }, true, deadline)
        }
        Call::ClearVeto { machine, force: false } => {
            let (runs_as, _lock) = exclusively(hook, machine, deadline)?;
            veto::lift(cluster, &Subject { machine, resource, runs_as }, false, deadline)
        }
        // (Done above.)
        Call::PrepareMigration { .. } | Call::ForgetMigration { .. } => Ok(()),
        Call::ReplicaState { machine, state } => {
            if !valid_machine_name(machine) {
                return Err(VetoError::NoClone(machine.clone()));
            }
            let resource = match resource {
                Some(resource) => resource.to_owned(),
                None => cluster.cib(deadline)?.vmm_of(machine).ok_or_else(|| VetoError::NoClone(machine.clone()))?,
            };
            let layout = Layout::new(&hook.run_root, DEFAULT_SHM_ROOT, machine);
            let _lock = score_lock::take(layout.run_dir(), deadline);
            let score = match vmm_here(&layout)? {
                Vmm::Runs => Fitness { runs_here: true, replica: None }.score(),
                Vmm::Other => Fitness { runs_here: false, replica: Some(state.replica()) }.score(),
                // Its agent will ask the replicator when it starts. Until then "never" is all there is to say.
                Vmm::Absent => match (Fitness { runs_here: false, replica: Some(state.replica()) }).score() {
                    Some(_) => return Ok(()),
                    None => None,
                },
            };
            cluster.set_score(&resource, score, deadline)?;
            Ok(())
        }
    }
}

/// The machine's generation here, and the lock that its veto is changed under.
fn exclusively(hook: &Hook, machine: &str, deadline: Deadline) -> Result<(Generation, File), VetoError> {
    if !valid_machine_name(machine) {
        return Err(VetoError::NoClone(machine.to_owned()));
    }
    let layout = Layout::new(&hook.run_root, DEFAULT_SHM_ROOT, machine);
    let lock = veto::lock(layout.run_dir(), machine, deadline)?;
    let runs_as = match ask::<_, VmmStatus>(&layout.vmm_socket(), &VmmRequest::Status, Duration::from_secs(2)) {
        Ok(status) if machine_runs(status.state) => status.generation,
        _ => Generation::ZERO,
    };
    Ok((runs_as, lock))
}

/// What this node's VMM does.
#[derive(Debug, PartialEq, Eq)]
enum Vmm {
    /// It runs the machine, or is being promoted.
    Runs,
    /// It stands by, or has been used up.
    Other,
    /// There is none.
    Absent,
}

fn vmm_here(layout: &Layout) -> Result<Vmm, VetoError> {
    match ask::<_, VmmStatus>(&layout.vmm_socket(), &VmmRequest::Status, Duration::from_secs(2)) {
        Ok(status) if machine_runs(status.state) => Ok(Vmm::Runs),
        // The agent leaves the mark before it makes the machine run.
        Ok(status) if status.state == VmmState::Standby && layout.promoted_mark().exists() => Ok(Vmm::Runs),
        Ok(_) => Ok(Vmm::Other),
        Err(ControlError::Io { source, .. })
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
        {
            Ok(Vmm::Absent)
        }
        Err(error) => Err(ClusterError::Failed(format!("cannot tell whether the machine runs here: {error}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        hook: Hook,
    }

    #[test]
    fn the_resource_may_stand_before_or_after_what_the_replicator_appends() {
        for line in [
            "hook --vmm-resource vm veto --machine m1 --peer n2",
            "hook veto --machine m1 --peer n2 --vmm-resource vm",
            "hook --vmm-resource vm replica-state --machine m1 --state uptodate",
            "hook replica-state --machine m1 --state Outdated --vmm-resource vm",
            "hook clear-veto --machine m1 --vmm-resource vm",
        ] {
            let parsed = Line::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(parsed.hook.vmm_resource.as_deref(), Some("vm"), "{line}");
        }
    }

    #[test]
    fn every_word_of_the_replicator_has_its_tier() {
        let score = |word: &str| {
            let standing = Standing::from_str(word, true).unwrap();
            Fitness { runs_here: false, replica: Some(standing.replica()) }.score()
        };
        let words = ["inconsistent", "syncing", "uptodate", "outdated", "disconnected", "UpToDate"];
        assert_eq!(words.map(score), [Some(5), Some(5), Some(10_000), None, Some(1000), Some(10_000)]);
    }
}
