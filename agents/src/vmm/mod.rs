//! `ocf:understudy:vmm`: one virtual machine.
//!
//! As a promotable clone: *start* prepares a standby, *promote* runs the machine ([`promote`]), *demote* hands it over or shuts
//! it down ([`leave`]), *stop* leaves nothing. As a plain primitive: *start* runs it, *stop* shuts it down, *migrate_to* and
//! *migrate_from* bring it to another node while it runs ([`migrate`]).
//!
//! The healthy `monitor` is one question on a unix socket: no other program, no other daemon.

mod leave;
pub(crate) mod machine;
mod migrate;
mod nics;
pub mod parameters;
mod promote;
pub mod room;

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::time::{Duration, SystemTime};

use ocf::action::{Action, ActionSpec, Role};
use ocf::{Agent, CheckLevel, Context, Description, Environment, ExitCode, Failure, Status};
use understudy_protocol::control::{VmmState, VmmStatus};

use crate::binaries;
use crate::cluster::Cluster;
use crate::machine_runs;
use crate::pacemaker::Pacemaker;
use crate::process::{remove, write_durably};
use crate::rules::Fitness;
use crate::service::Observed;
use machine::{Machine, PROGRAM};
use parameters::{INITRD, KERNEL, REPORT_DEGRADED, Run, SHUTDOWN_MODE, UNPROTECTED_AFTER};
use room::Sharing;

const LONG: &str = "\
A virtual machine that survives the death of its host: as a promotable clone, the promoted instance runs the machine and every \
other one is a standby that is built, holds the image which ocf:understudy:replicator keeps up to date, and goes on from \
the last checkpoint when it is promoted.

Configure it as a clone with promotable=true promoted-max=1 clone-node-max=1 interleave=true notify=true (without notify, a demote \
cannot see whether another node is to be promoted). Let the replicator's Promoted role follow this one's, never the other way \
round: a fault of the replicator must not stop the machine.

With load_sharing=pause a node whose processors are not enough for all machines that run there pauses those of lower priority \
(parameters priority and host_room).

The timeouts of demote and stop are the time that the guest has to shut down: ten seconds of them are kept for the agent.

As a plain primitive the machine is started, monitored and shut down without a standby. With the meta attribute allow-migrate=true, the \
parameter migration_peers and a clone of ocf:understudy:migrations it is moved while it runs. Give its operation migrate_to the \
property on-fail=block: a migration that fails leaves the machine running where it is, and Pacemaker would otherwise stop it on both \
nodes. (Never on-fail=ignore: it could run on both.) The timeout of migrate_to bounds the migration.";

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Vmm;

impl Vmm {
    /// Run `action` on the machine that the context is about.
    fn on<T>(context: &Context, action: impl FnOnce(&Machine<'_>) -> ocf::Result<T>) -> ocf::Result<T> {
        let pacemaker = Pacemaker::new(&context.environment);
        let cluster: &dyn Cluster = &pacemaker;
        action(&Machine::new(context, cluster)?)
    }

    /// The same for the actions that only a promotable clone has.
    fn on_promotable(context: &Context, action: impl FnOnce(&Machine<'_>) -> ocf::Result) -> ocf::Result {
        Self::on(context, |machine| {
            if machine.promotable { action(machine) } else { Err(Failure::unimplemented(context.action.name())) }
        })
    }
}

impl Vmm {
    /// The same for those that only a plain primitive has.
    fn on_primitive(context: &Context, action: impl FnOnce(&Machine<'_>) -> ocf::Result) -> ocf::Result {
        Self::on(context, |machine| {
            if machine.promotable { Err(Failure::unimplemented(context.action.name())) } else { action(machine) }
        })
    }
}

impl Agent for Vmm {
    fn description(&self) -> Description {
        Description {
            name: "vmm",
            version: env!("CARGO_PKG_VERSION"),
            short: "Runs a virtual machine, or its hot standby",
            long: LONG,
            parameters: parameters::declarations(),
            actions: vec![
                ActionSpec::new(Action::Start, "60s"),
                ActionSpec::new(Action::Stop, "90s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s").in_role(Role::Promoted),
                ActionSpec::new(Action::Monitor, "20s").every("11s").in_role(Role::Unpromoted),
                ActionSpec::new(Action::Monitor, "20s").every("12s"),
                ActionSpec::new(Action::Promote, "60s"),
                ActionSpec::new(Action::Demote, "90s"),
                ActionSpec::new(Action::Notify, "10s"),
                ActionSpec::new(Action::MigrateTo, "600s"),
                ActionSpec::new(Action::MigrateFrom, "60s"),
                ActionSpec::new(Action::ReloadAgent, "10s"),
            ],
        }
    }

    fn validate(&self, context: &Context, level: CheckLevel) -> ocf::Result {
        if level == CheckLevel::Parameters {
            let promotable = Self::on(context, |machine| Ok(machine.promotable))?;
            return parameters::check_watchdog(&context.parameters, promotable);
        }
        binaries::locate(&context.environment, PROGRAM)?;
        kvm_usable(&context.environment)?;
        for (name, path) in
            [("kernel", context.parameters.find(&KERNEL)?), ("initrd", context.parameters.find(&INITRD)?)]
        {
            if let Some(path) = path {
                File::open(&path).map_err(|e| {
                    Failure::arguments(format!("parameter {name}: {path} cannot be read on this node: {e}"))
                })?;
            }
        }
        nics::check(&parameters::cards(&context.parameters)?, Path::new("/"))
            .map_err(|why| Failure::arguments(format!("parameter nics: {why}")))
    }

    fn start(&self, context: &Context) -> ocf::Result {
        Self::on(context, |machine| {
            let wanted = if machine.promotable { VmmState::Standby } else { VmmState::Running };
            match machine.observe(context.deadline.within(Duration::from_secs(5))) {
                Observed::Answers(status) if status.state == wanted || machine_runs(status.state) => {
                    context.log.info(format!("{} is here already ({:?})", machine.name, status.state));
                    if status.state == wanted {
                        machine.set_score(own_score(machine, &status));
                    }
                    return Ok(());
                }
                Observed::Answers(status) => {
                    context.log.info(format!("replacing a VMM that has been used up ({:?})", status.state));
                    machine.end()?;
                }
                Observed::Silent(process, why) => {
                    context
                        .log
                        .warning(format!("replacing VMM process {}, which does not answer: {why}", process.pid()));
                    machine.end()?;
                }
                Observed::Gone => {}
            }
            machine.unmark_promoted();
            let sharing = Sharing::of(machine)?;
            if let Some(sharing) = &sharing {
                sharing.enter()?;
            }
            let launched = launch(machine, sharing.as_ref());
            if launched.is_err() {
                room::leave(machine);
            }
            launched?;
            let replicator = machine.replicator(Duration::from_secs(1));
            machine.set_score(Fitness::new(false, replicator.as_ref()).score());
            Ok(())
        })
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        match Self::on(context, leave::stop) {
            // Without a valid name nothing can have been started.
            Err(failure) if failure.code == ExitCode::Configured => {
                context.log.warning(format!("nothing to stop: {failure}"));
                Ok(())
            }
            done => done,
        }
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        Self::on(context, |machine| match machine.observe(context.deadline) {
            Observed::Answers(status) => judge(machine, &status),
            Observed::Silent(process, why) => {
                let reason =
                    format!("the VMM of {} (process {}) lives and does not answer: {why}", machine.name, process.pid());
                let code = if machine.marked_promoted() { ExitCode::FailedPromoted } else { ExitCode::Generic };
                Err(Failure::new(code, reason))
            }
            Observed::Gone => absent(machine),
        })
    }

    fn promote(&self, context: &Context) -> ocf::Result {
        Self::on_promotable(context, promote::promote)
    }

    fn demote(&self, context: &Context) -> ocf::Result {
        Self::on_promotable(context, leave::demote)
    }

    fn migrate_to(&self, context: &Context) -> ocf::Result {
        Self::on_primitive(context, migrate::migrate_to)
    }

    fn migrate_from(&self, context: &Context) -> ocf::Result {
        Self::on_primitive(context, migrate::migrate_from)
    }

    fn notify(&self, _context: &Context) -> ocf::Result {
        // Asked for because the lists then accompany demote.
        Ok(())
    }

    fn reload_agent(&self, context: &Context) -> ocf::Result {
        // The reloadable parameters are the agent's own: the next action reads them.
        context.parameters.get(&SHUTDOWN_MODE)?;
        Self::on(context, room::changed)
    }
}

fn launch(machine: &Machine<'_>, sharing: Option<&Sharing<'_>>) -> ocf::Result {
    if machine.promotable {
        return machine.launch(Run::Standby);
    }
    // Only migrate_from goes on from what was received here.
    migrate::discard_image(machine);
    let generation = promote::number(machine)?;
    if let Some(sharing) = sharing {
        sharing.arrive()?;
    }
    machine.launch(Run::Boot(generation))?;
    // It may be the one for whom there is no room.
    if let Some(sharing) = sharing {
        sharing.settle();
    }
    Ok(())
}

fn own_score(machine: &Machine<'_>, status: &VmmStatus) -> Option<i32> {
    let replicator = machine.replicator(Duration::from_secs(1));
    Fitness::new(machine_runs(status.state), replicator.as_ref()).score()
}

/// What a VMM that answers means to the cluster.
fn judge(machine: &Machine<'_>, status: &VmmStatus) -> ocf::Result<Status> {
    let name = &machine.name;
    let mut state = status.state;
    if state == VmmState::Running {
        room::catch_up(machine);
    }
    if state == VmmState::Paused && room::waits(machine) {
        state = room::look_again(machine);
        if state == VmmState::Paused && room::cluster_knows_degraded(machine) {
            return Ok(if machine.promotable { Status::DegradedPromoted } else { Status::Degraded });
        }
    }
    match (state, machine.promotable) {
        (VmmState::Standby, true) => Ok(Status::Running),
        (VmmState::Running, false) => hung(machine, status).map_or(Ok(Status::Running), Err),
        (VmmState::Paused, false) => {
            Ok(if report_degraded(machine.context) { Status::Degraded } else { Status::Running })
        }
        (VmmState::Running, true) => {
            let degraded = report_degraded(machine.context) && unprotected_too_long(machine);
            Ok(if degraded { Status::DegradedPromoted } else { Status::RunningPromoted })
        }
        (VmmState::Paused, true) => {
            Ok(if report_degraded(machine.context) { Status::DegradedPromoted } else { Status::RunningPromoted })
        }
        (VmmState::ShutDown, false) => {
            machine.context.log.warning(format!("the guest of {name} shut itself down"));
            Ok(Status::NotRunning)
        }
        (VmmState::ShutDown, true) => Err(Failure::new(
            ExitCode::FailedPromoted,
            format!("the guest of {name} shut itself down; the machine is booted again"),
        )),
        (VmmState::HandedOver, true) => Err(Failure::new(
            ExitCode::FailedPromoted,
            format!("{name} was handed over to another node; its VMM here is used up"),
        )),
        (VmmState::Fenced, true) => {
            machine.set_score(None);
            Err(Failure::new(
                ExitCode::FailedPromoted,
                format!(
                    "{name} runs elsewhere under a newer generation than {}; the machine here has stopped itself",
                    status.generation
                ),
            ))
        }
        // It waits for a migration, or has left in one.
        (VmmState::Standby | VmmState::HandedOver, false) => Ok(Status::NotRunning),
        (VmmState::Fenced, false) => {
            Err(Failure::generic(format!("the VMM of {name} is {:?}: it does not run the machine", status.state)))
        }
    }
}

/// The failure of a machine whose guest hangs, if the cluster is to start it again then.
fn hung(machine: &Machine<'_>, status: &VmmStatus) -> Option<Failure> {
    let watchdog = status.watchdog.filter(|watchdog| watchdog.hangs())?;
    parameters::restarts_hung_guests(&machine.context.parameters).then(|| {
        let unfed = watchdog.fed_ms_ago.unwrap_or(0) / 1000;
        Failure::generic(format!(
            "the guest of {} hangs: it has not fed its watchdog for {unfed} s; the machine is started again",
            machine.name
        ))
    })
}

/// What no VMM means to the cluster.
fn absent(machine: &Machine<'_>) -> ocf::Result<Status> {
    let context = machine.context;
    if machine.marked_promoted() && machine.promotable {
        // First the score, so that the standby is the better one when the cluster makes up its mind.
        machine.set_score(None);
        return Err(Failure::new(
            ExitCode::FailedPromoted,
            format!("the VMM of {} has gone while it ran the machine{}", machine.name, machine.last_words()),
        ));
    }
    if context.is_probe() {
        binaries::locate(&context.environment, PROGRAM)?;
        kvm_present(&context.environment)?;
        return Ok(Status::NotRunning);
    }
    if machine.recorded() {
        return Err(Failure::generic(format!("the VMM of {} has crashed{}", machine.name, machine.last_words())));
    }
    Ok(Status::NotRunning)
}

fn report_degraded(context: &Context) -> bool {
    context.parameters.get(&REPORT_DEGRADED).unwrap_or(false)
}

/// Whether the machine has been unprotected for longer than configured. A file's age remembers since when.
fn unprotected_too_long(machine: &Machine<'_>) -> bool {
    let since = machine.layout.run_dir().join("unprotected");
    if machine.replicator(Duration::from_millis(500)).is_some_and(|r| r.protected) {
        // A mark that stays makes one report too many, later; nothing else.
        let _ = remove(&since);
        return false;
    }
    let limit = machine.context.parameters.get(&UNPROTECTED_AFTER).unwrap_or(Duration::from_secs(60));
    match fs::metadata(&since).and_then(|m| m.modified()) {
        Ok(then) => SystemTime::now().duration_since(then).is_ok_and(|age| age > limit),
        Err(_) => {
            let _ = write_durably(&since, "");
            limit.is_zero()
        }
    }
}

/// Where KVM is; tests on hosts without it say otherwise.
fn kvm_device(environment: &Environment) -> &str {
    environment.variable("UNDERSTUDY_KVM_DEVICE").unwrap_or("/dev/kvm")
}

fn kvm_present(environment: &Environment) -> ocf::Result {
    let device = kvm_device(environment);
    if Path::new(device).exists() {
        return Ok(());
    }
    Err(Failure::not_installed(format!(
        "this node has no {device}: load kvm_intel or kvm_amd, or enable virtualisation in its firmware"
    )))
}

fn kvm_usable(environment: &Environment) -> ocf::Result {
    kvm_present(environment)?;
    let device = kvm_device(environment);
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map(drop)
        .map_err(|e| Failure::not_installed(format!("{device} cannot be used on this node: {e}")))
}
