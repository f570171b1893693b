//! Demote and stop: how a machine leaves this node.

use std::time::Duration;

use ocf::Deadline;
use ocf::notify::Members;
use understudy_protocol::control::{ControlError, HandedOver, ReplicatorRequest, VmmRequest, VmmState, VmmStatus};

use super::machine::Machine;
use super::migrate;
use super::parameters::{Run, SHUTDOWN_MODE};
use super::room::{self, Sharing};
use crate::cluster::{ended_attribute, veto_id};
use crate::machine_runs as runs;
use crate::rules::{self, Leaving, SCORE_COLD};
use crate::service::{Observed, ask};

/// Kept back from an operation's time for ending the process and starting a fresh standby.
const RESERVE: Duration = Duration::from_secs(10);

/// Promoted to unpromoted: the machine is handed over or shut down, and a fresh standby takes the VMM's place.
pub fn demote(machine: &Machine<'_>) -> ocf::Result {
    match machine.observe(machine.context.deadline.within(Duration::from_secs(5))) {
        Observed::Answers(status) if status.state == VmmState::Standby => {
            machine.unmark_promoted();
            return Ok(());
        }
        Observed::Answers(status) if runs(status.state) => leave(machine, &status),
        Observed::Answers(status) if status.state == VmmState::ShutDown => record_ended(machine, &status),
        Observed::Answers(status) => {
            machine.context.log.info(format!("the machine has left already ({:?})", status.state))
        }
        Observed::Silent(process, why) => {
            machine
                .context
                .log
                .error(format!("the VMM (process {}) does not answer and is ended: {why}", process.pid()));
        }
        Observed::Gone => machine.context.log.info("the VMM has gone already"),
    }
    machine.end()?;
    machine.unmark_promoted();
    machine.set_score(Some(SCORE_COLD));
    let launched = machine.launch(Run::Standby);
    if let Ok(Some(sharing)) = Sharing::of(machine) {
        sharing.settle();
    }
    launched
}

fn leave(machine: &Machine<'_>, status: &VmmStatus) {
    let context = machine.context;
    let replicator = machine.replicator(Duration::from_secs(1));
    let members = Members::from_environment(&context.environment);
    let node = context.environment.node();
    match rules::leaving(members.as_ref(), &node, replicator.as_ref()) {
        Leaving::HandOver => match hand_over(machine) {
            Ok(done) => context.log.info(format!("{} handed over at epoch {}", machine.name, done.epoch)),
            // Everything that left the machine is in a checkpoint that the standby holds: ending it here is a takeover as
            // after a power cut. A shutdown would only send the standby the image of a machine that is going down.
            Err(error) if replicator.as_ref().is_some_and(|r| r.protected) => {
                context.log.warning(format!(
                    "no last checkpoint ({error}); the standby continues from the last committed one"
                ));
            }
            Err(error) => {
                context.log.warning(format!("{} cannot be handed over ({error}) and is shut down", machine.name));
                shut_down(machine, status);
            }
        },
        Leaving::ShutDown => shut_down(machine, status),
    }
}

fn hand_over(machine: &Machine<'_>) -> Result<HandedOver, ControlError> {
    let patience = shutdown_deadline(machine.context.deadline).remaining().max(Duration::from_secs(1));
    ask(&machine.layout.replicator_socket(), &ReplicatorRequest::HandOver, patience)
}

/// Shut the guest down as configured, within the deadline. It is not asked twice, and what does not go in time is cut off later.
pub fn shut_down(machine: &Machine<'_>, status: &VmmStatus) {
    let context = machine.context;
    // A wrong value must not keep a machine from being stopped.
    if context.parameters.get(&SHUTDOWN_MODE).is_ok_and(|mode| mode == "off") {
        record_ended(machine, status);
        return;
    }
    if status.watchdog.is_some_and(|watchdog| watchdog.hangs()) {
        context
            .log
            .warning(format!("the guest of {} hangs (watchdog) and is switched off without being asked", machine.name));
        return record_ended(machine, status);
    }
    if status.state == VmmState::Paused
        && let Err(e) = machine.tell::<()>(&VmmRequest::Resume, Duration::from_secs(1))
    {
        context.log.warning(format!("{} is paused and cannot be resumed to shut down: {e}", machine.name));
    }
    let deadline = shutdown_deadline(context.deadline);
    match machine.tell::<()>(&VmmRequest::PowerButton, Duration::from_secs(1)) {
        Ok(()) => context.log.info(format!(
            "power button pressed; {} has {:.0?} to shut down",
            machine.name,
            deadline.remaining()
        )),
        Err(e) => {
            context.log.warning(format!("the power button of {} cannot be pressed: {e}", machine.name));
            return record_ended(machine, status);
        }
    }
    let gone = deadline.wait_for(|| match machine.status(Duration::from_secs(1)) {
        Ok(now) => (!runs(now.state)).then_some(()),
        Err(ControlError::Io { .. }) => {
            matches!(machine.observe(Deadline::after(Duration::ZERO)), Observed::Gone).then_some(())
        }
        Err(_) => None,
    });
    match gone {
        Some(()) => context.log.info(format!("the guest of {} has shut down", machine.name)),
        None => {
            context.log.warning(format!("the guest of {} did not shut down in time and is switched off", machine.name))
        }
    }
    record_ended(machine, status);
}

/// Leaves enough of the operation's time for the rest, but at least half of it to the guest.
fn shutdown_deadline(deadline: Deadline) -> Deadline {
    let left = deadline.remaining();
    deadline.leaving(RESERVE.min(left / 2))
}

/// Say durably that this generation was shut down on purpose: images of it that lie about are not to be resumed, and a veto
/// that stands for it protects nothing any more.
fn record_ended(machine: &Machine<'_>, status: &VmmStatus) {
    if !machine.promotable || status.generation.0 == 0 {
        return;
    }
    let deadline = machine.context.deadline.within(Duration::from_secs(3));
    let stored = machine.cluster.node_name(deadline).and_then(|node| {
        let value = status.generation.to_string();
        machine.cluster.set_node_attribute(&node, &ended_attribute(&machine.name), &value, deadline)
    });
    if stored.is_ok()
        && let Err(e) = machine
            .cluster
            .delete_constraint(&veto_id(&machine.name), machine.context.deadline.within(Duration::from_secs(3)))
    {
        machine.context.log.warning(format!("the veto for {} still stands: {e}", machine.name));
    }
    if let Err(e) = stored {
        let level = format!("that generation {} was shut down is not stored: {e}", status.generation);
        if machine.context.environment.under_pacemaker() {
            machine.context.log.warning(level);
        } else {
            machine.context.log.debug(level);
        }
    }
}

/// Gone, whatever it takes. Depends on no other daemon: scores and shutdown are attempts with bounds of their own.
pub fn stop(machine: &Machine<'_>) -> ocf::Result {
    let context = machine.context;
    match machine.observe(context.deadline.within(Duration::from_secs(2))) {
        Observed::Answers(status) if !machine.promotable && runs(status.state) => shut_down(machine, &status),
        Observed::Answers(status) if status.state == VmmState::ShutDown => record_ended(machine, &status),
        Observed::Answers(status) if runs(status.state) => {
            context.log.warning(format!("{} is stopped while promoted; it is switched off", machine.name));
        }
        Observed::Answers(_) | Observed::Gone => {}
        Observed::Silent(process, why) => {
            context.log.warning(format!("VMM process {} does not answer: {why}", process.pid()))
        }
    }
    machine.end()?;
    if !machine.promotable {
        migrate::discard_image(machine);
    }
    machine.unmark_promoted();
    machine.set_score(None);
    room::leave(machine);
    context.log.info(format!("{} is not on this node", machine.name));
    Ok(())
}
