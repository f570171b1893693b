//! Promote: a new generation, stored; the image, if there is one; then the machine runs.
//!
//! ```text
//! generation = highest seen + 1 ─► CIB (durable) ─► replicator: TakeOver ─► image? ─► VMM: Promote ─► score 10001
//!                                                          └ no process: take-over --offline
//! ```
//! The generation is stored *before* anything runs: a machine that runs under a generation that nobody remembers could be followed by
//! another one under the same.

use std::time::Duration;

use ocf::command;
use ocf::{Deadline, Failure};
use understudy_protocol::control::{
    ControlError, PromoteFrom, ReplicatorRequest, Role, TakenImage, TakenOver, VmmRequest, VmmState,
};
use understudy_protocol::ids::Generation;

use super::machine::Machine;
use super::room::Sharing;
use crate::binaries;
use crate::cluster::{Cib, ClusterError, ended_attribute, generation_attribute};
use crate::process::Identity;
use crate::rules::{self, Origin, SCORE_RUNS};
use crate::service::{Observed, ask};
use crate::veto::{self, Subject, VetoError};

/// How long promote looks for the proof that lets outputs go before the replicator's turn.
const VETO_PATIENCE: Duration = Duration::from_secs(15);
/// The replicator's executable.
pub(super) const REPLICATOR: &str = "understudy-replicator";

/// The whole action.
pub fn promote(machine: &Machine<'_>) -> ocf::Result {
    let context = machine.context;
    match machine.observe(context.deadline.within(Duration::from_secs(5))) {
        Observed::Answers(status) => match status.state {
            VmmState::Standby => {}
            VmmState::Running | VmmState::Paused => {
                context.log.info(format!("{} already runs here, generation {}", machine.name, status.generation));
                machine.mark_promoted(status.generation)?;
                machine.set_score(Some(SCORE_RUNS));
                return Ok(());
            }
            VmmState::HandedOver | VmmState::ShutDown | VmmState::Fenced => {
                return Err(Failure::generic(format!(
                    "the VMM of {} has been used up ({:?}); it must be stopped and started before it can be promoted",
                    machine.name, status.state
                )));
            }
        },
        Observed::Silent(process, why) => {
            return Err(Failure::generic(format!(
                "the VMM of {} (process {}) does not answer: {why}",
                machine.name,
                process.pid()
            )));
        }
        Observed::Gone => {
            return Err(Failure::new(
                ocf::ExitCode::NotRunning,
                format!("the VMM of {} does not run here; it must be started before it can be promoted", machine.name),
            ));
        }
    }

    let cib = cluster_view(machine)?;
    let generations = cib.as_ref().map(|c| c.generations(&generation_attribute(&machine.name))).unwrap_or_default();
    let replicator = machine.replicator(Duration::from_secs(2));
    let seen = generations
        .iter()
        .map(|(_, g)| *g)
        .chain(replicator.as_ref().map(|r| r.generation))
        .chain([machine.noted_generation()]);
    let highest = seen.max().unwrap_or_default();
    let generation = rules::next_generation([highest]);
    store(machine, cib.is_some(), generation)?;

    // After a recovery in place it may still be the sender that it was: the cluster sees no reason to demote it.
    let sends = replicator.is_some_and(|r| r.role == Role::Sender);
    if sends {
        change_replicator(machine, &ReplicatorRequest::Demote);
    }
    let image = take_over(machine, generation)?;
    let ended = cib.as_ref().and_then(|c| c.generations(&ended_attribute(&machine.name)).first().map(|(_, g)| *g));
    let node = context.environment.node();
    let mut others = cib.as_ref().map(|c| c.promotion_scores(context.environment.resource())).unwrap_or_default();
    others.retain(|(other, _)| *other != node);
    if cib.as_ref().and_then(|c| c.veto(&machine.name)).is_some_and(|veto| veto.only == node) {
        // While the veto stands the others' images cannot run, and may lack what has left the machine since: nobody waits for them.
        others.clear();
    }
    let from = match rules::origin(image, ended.unwrap_or_default(), highest, &others) {
        Origin::Image(image) => {
            context.log.info(format!(
                "{} continues from epoch {} of generation {}",
                machine.name, image.epoch, image.generation
            ));
            PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch }
        }
        Origin::ColdBoot => {
            forget_images(machine, cib.is_some(), highest)?;
            context.log.info(format!("{} boots: there is no image to continue from", machine.name));
            PromoteFrom::ColdBoot
        }
        Origin::Refuse { holder } => {
            machine.set_score(None);
            return Err(Failure::generic(format!(
                "node {holder} holds an image of {}; booting it here would lose that machine's memory. Promote it on {holder}, \
                 or stop the resource there to give the image up",
                machine.name
            )));
        }
    };
    run(machine, generation, from)?;
    if sends {
        change_replicator(machine, &ReplicatorRequest::Promote);
    } else if cib.is_some() && machine.promotable && context.environment.under_pacemaker() {
        let_outputs_go(machine, generation);
    }
    Ok(())
}

/// Before a cold boot: images of the generations up to now are of a past life, wherever they turn up. (A standby may have committed its
/// first checkpoint after we looked at its score.)
fn forget_images(machine: &Machine<'_>, in_cluster: bool, highest: Generation) -> ocf::Result {
    if !in_cluster || !machine.promotable || highest == Generation::ZERO {
        return Ok(());
    }
    let node =
        machine.cluster.node_name(machine.context.deadline).unwrap_or_else(|_| machine.context.environment.node());
    machine
        .cluster
        .set_node_attribute(&node, &ended_attribute(&machine.name), &highest.to_string(), machine.context.deadline)
        .map_err(|e| {
            let what = "that no older image of it may run could not be stored";
            Failure::generic(format!("{} does not boot: {what}: {e}", machine.name))
        })
}

/// Open the gate if it is certain already that no other node can be promoted: after a power cut the old primary has been
/// fenced, or we would not be here. The replicator does the same when its turn comes, which on a busy cluster is seconds
/// later; if there is no proof within a moment it is left to it.
fn let_outputs_go(machine: &Machine<'_>, runs_as: Generation) {
    let deadline = machine.context.deadline.within(VETO_PATIENCE);
    let resource = machine.context.environment.resource();
    let subject = Subject { machine: &machine.name, resource: Some(resource), runs_as };
    let proven = machine.cluster.node_name(deadline).map_err(VetoError::from).and_then(|node| {
        let _lock = veto::lock(machine.layout.run_dir(), &machine.name, deadline)?;
        let members = machine.cluster.members(deadline)?;
        let mut others = members.iter().filter(|m| m.name != node);
        others.try_for_each(|m| veto::impose(machine.cluster, &subject, &m.name, deadline))
    });
    let opened = proven
        .map_err(|e| e.to_string())
        .and_then(|()| machine.tell::<()>(&VmmRequest::GateOpen, Duration::from_secs(2)).map_err(|e| e.to_string()));
    match opened {
        Ok(()) => {
            machine.context.log.info(format!("no other node can run {}: its outputs leave at once", machine.name))
        }
        Err(why) => machine.context.log.info(format!("the outputs of {} wait for its replicator: {why}", machine.name)),
    }
}

/// Change the replicator's role on the cluster's behalf. Should it fail, the cluster sees that when it monitors the replicator.
fn change_replicator(machine: &Machine<'_>, request: &ReplicatorRequest) {
    let patience = (machine.context.deadline.remaining() / 4).max(Duration::from_millis(500));
    if let Err(error) = ask::<_, ()>(&machine.layout.replicator_socket(), request, patience) {
        machine.context.log.warning(format!("the replicator of {} did not change its role: {error}", machine.name));
    }
}

fn run(machine: &Machine<'_>, generation: Generation, from: PromoteFrom) -> ocf::Result {
    let sharing = Sharing::of(machine)?;
    if let Some(sharing) = &sharing {
        sharing.arrive()?;
    }
    let done = run_now(machine, generation, from);
    // It may be the one for whom there is no room; or, if it did not come up, those that were paused for it go on.
    if let Some(sharing) = &sharing {
        sharing.settle();
    }
    done
}

fn run_now(machine: &Machine<'_>, generation: Generation, from: PromoteFrom) -> ocf::Result {
    machine.mark_promoted(generation)?;
    // Before the machine runs: the scheduler looks at the scores as soon as this action has ended, and must not find another
    // node's initial preference higher than that of the node which runs it. After the mark, by which a hook that comes now
    // knows not to write a lower one.
    machine.set_score(Some(SCORE_RUNS));
    let patience = machine.context.deadline.remaining().max(Duration::from_secs(1));
    if let Err(error) = machine.tell::<()>(&VmmRequest::Promote { generation, from }, patience) {
        if matches!(error, ControlError::Refused(_)) {
            machine.unmark_promoted();
        }
        machine.set_score(None);
        return Err(Failure::generic(format!("{} could not be made to run: {error}", machine.name)));
    }
    machine.context.log.info(format!("{} runs here as generation {generation}", machine.name));
    Ok(())
}

/// The next generation of a plain primitive, stored before anything runs under it. (As a clone's, but no replicator counts along.)
pub(super) fn number(machine: &Machine<'_>) -> ocf::Result<Generation> {
    let cib = cluster_view(machine)?;
    let stored = cib.as_ref().map(|c| c.generations(&generation_attribute(&machine.name))).unwrap_or_default();
    let generation = rules::next_generation(stored.iter().map(|(_, g)| *g).chain([machine.noted_generation()]));
    store(machine, cib.is_some(), generation)?;
    Ok(generation)
}

/// The CIB. Where Pacemaker runs us there must be one; by hand or under `ocf-tester` there may be none.
pub(super) fn cluster_view(machine: &Machine<'_>) -> ocf::Result<Option<Cib>> {
    match machine.cluster.cib(machine.context.deadline.within(Duration::from_secs(5))) {
        Ok(cib) => Ok(Some(cib)),
        Err(e) if machine.context.environment.under_pacemaker() => {
            Err(Failure::generic(format!("cannot tell the newest generation of {}: {e}", machine.name)))
        }
        Err(e) => {
            machine.context.log.info(format!("counting generations of {} on this node only: {e}", machine.name));
            Ok(None)
        }
    }
}

/// Note it in the cluster, if there is one, and on this node.
pub(super) fn store(machine: &Machine<'_>, in_cluster: bool, generation: Generation) -> ocf::Result {
    if in_cluster {
        // A wrong guess cannot do harm: the cluster refuses attributes of nodes that it does not know.
        let node =
            machine.cluster.node_name(machine.context.deadline).unwrap_or_else(|_| machine.context.environment.node());
        let attribute = generation_attribute(&machine.name);
        machine
            .cluster
            .set_node_attribute(&node, &attribute, &generation.to_string(), machine.context.deadline)
            .map_err(|e| not_stored(machine, generation, &e))?;
    }
    machine.note_generation(generation)
}

fn not_stored(machine: &Machine<'_>, generation: Generation, why: &ClusterError) -> Failure {
    Failure::generic(format!("{} does not run: its generation {generation} could not be stored: {why}", machine.name))
}

/// Have the replicator finish the image and never receive for an older generation again.
fn take_over(machine: &Machine<'_>, generation: Generation) -> ocf::Result<Option<TakenImage>> {
    let socket = machine.layout.replicator_socket();
    let deadline = machine.context.deadline.leaving(Duration::from_secs(3));
    let patience = (deadline.remaining() / 2).max(Duration::from_millis(500));
    match ask::<_, TakenOver>(&socket, &ReplicatorRequest::TakeOver { generation }, patience) {
        Ok(taken) => return Ok(taken.image),
        Err(ControlError::Refused(why)) => {
            return Err(Failure::generic(format!("the replicator of {} refuses the takeover: {why}", machine.name)));
        }
        Err(error) => machine.context.log.info(format!("taking over without the replicator's process: {error}")),
    }
    if !machine.layout.image_dir().exists() {
        return Ok(None);
    }
    // One that lives and does not answer must not write to the image any more. The cluster starts it again.
    let identity = Identity {
        pid_file: machine.layout.replicator_pid(),
        socket,
        program: REPLICATOR,
        words: vec![machine.name.clone()],
    };
    if let Some(process) = identity.find() {
        machine
            .context
            .log
            .warning(format!("ending the replicator (process {}), which does not answer", process.pid()));
        if !process.end(Duration::from_millis(500), deadline) {
            return Err(Failure::generic(format!("the replicator (process {}) can not be ended", process.pid())));
        }
    }
    take_over_offline(machine, generation, Whose::Any, deadline)
}

/// Which image may be taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// What a standby holds.
    Any,
    /// Only one that the machine's old node has handed over.
    HandedOver,
}

/// The same while no replicator process runs.
pub(super) fn take_over_offline(
    machine: &Machine<'_>,
    generation: Generation,
    whose: Whose,
    deadline: Deadline,
) -> ocf::Result<Option<TakenImage>> {
    let environment = &machine.context.environment;
    let program = binaries::locate(environment, REPLICATOR)?;
    let parameters = &machine.context.parameters;
    let (run_root, shm_root) = (parameters.get(&crate::paths::RUN_ROOT)?, parameters.get(&crate::paths::SHM_ROOT)?);
    let generation = generation.to_string();
    let mut arguments = vec![
        "take-over",
        "--offline",
        "--machine",
        &machine.name,
        "--generation",
        &generation,
        "--run-root",
        &run_root,
        "--shm-root",
        &shm_root,
    ];
    if whose == Whose::HandedOver {
        arguments.push("--handed-over");
    }
    let failed =
        |why: String| Failure::generic(format!("the image of {} could not be made whole: {why}", machine.name));
    let output = command::run(environment, &program.to_string_lossy(), &arguments, deadline)
        .map_err(|e| failed(e.to_string()))?;
    if !output.success() {
        return Err(failed(output.complaint()));
    }
    serde_json::from_str::<TakenOver>(output.stdout.trim())
        .map(|taken| taken.image)
        .map_err(|e| failed(format!("{REPLICATOR} answered {:?}: {e}", output.stdout.trim())))
}
