//! Live migration of a plain primitive: `migrate_to` on the node that the machine leaves, `migrate_from` on the one that it comes to.
//!
//! ```text
//!  migrate_to:    understudy-replicator migrate ──► the other node's listener (ocf:understudy:migrations) ──► its VMM stands by
//!                   └─ however it ended: the VMM here says HandedOver, or the action has failed
//!  migrate_from:  next generation, stored ─► take-over --handed-over ─► VMM: promote, from the image ─► gate open
//!  start, stop:   discard whatever image lies about
//! ```
//! Pacemaker learns nothing of a migration but exit codes, so each says what *is*: success of `migrate_to` means that the machine can
//! never run here again, and nothing else may run the image than the `migrate_from` that follows (decision 0011).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ocf::command;
use ocf::{Deadline, Failure};
use understudy_protocol::control::{PromoteFrom, VmmRequest, VmmState, VmmStatus};

use super::machine::Machine;
use super::parameters::{MIGRATION_KEY, MIGRATION_PAUSE_MS, MIGRATION_PEERS};
use super::promote::{self, REPLICATOR, Whose};
use super::room::{self, Sharing};
use crate::binaries;
use crate::cluster::generation_attribute;
use crate::daemon;
use crate::paths::{RUN_ROOT, SHM_ROOT};
use crate::process::remove;
use crate::service::Observed;

/// Kept back from the operation's time for ending the migration and asking what has become of the machine.
const RESERVE: Duration = Duration::from_secs(15);
/// How long the VMM may take to notice that its session has ended.
const JUDGE: Duration = Duration::from_secs(8);

/// The source's half.
pub fn migrate_to(machine: &Machine<'_>) -> ocf::Result {
    let context = machine.context;
    let Some(target) = context.environment.meta("migrate_target") else {
        return Err(Failure::arguments("migrate_to was called without a target (CRM_meta_migrate_target)"));
    };
    let status = match machine.observe(context.deadline.within(Duration::from_secs(5))) {
        Observed::Answers(status) => status,
        Observed::Silent(process, why) => {
            let (name, pid) = (&machine.name, process.pid());
            return Err(Failure::generic(format!("the VMM of {name} (process {pid}) does not answer: {why}")));
        }
        Observed::Gone => return Err(Failure::generic(format!("{} does not run here", machine.name))),
    };
    match status.state {
        VmmState::Running => {}
        // It may have room where it goes.
        VmmState::Paused if room::waits(machine) => room::go_on(machine),
        // An earlier call was cut off after the machine had left.
        VmmState::HandedOver if !status.replicated => return Ok(()),
        state => {
            return Err(Failure::generic(format!(
                "only a machine that runs can be migrated; {} is {state:?}",
                machine.name
            )));
        }
    }
    let address = address_of(machine, target)?;
    remember(machine, &status)?;
    let said = send(machine, target, &address)?;
    match judge(machine) {
        Some(VmmState::HandedOver) => {
            context.log.info(format!("{} was handed over to {target}", machine.name));
            Ok(())
        }
        Some(state) => {
            Err(Failure::generic(format!("{} ({state:?} here) was not migrated to {target}: {said}", machine.name)))
        }
        None => Err(Failure::generic(format!(
            "the VMM of {} does not say whether the machine was handed over to {target}: {said}",
            machine.name
        ))),
    }
}

/// Where `target` receives migrations.
fn address_of(machine: &Machine<'_>, target: &str) -> ocf::Result<String> {
    let peers = machine.context.parameters.find(&MIGRATION_PEERS)?.ok_or_else(|| {
        Failure::arguments("parameter migration_peers is not set: it says where other nodes receive migrations")
    })?;
    let found = peers.split_whitespace().find_map(|peer| peer.split_once('=').filter(|(node, _)| *node == target));
    found
        .map(|(_, address)| address.to_owned())
        .ok_or_else(|| Failure::arguments(format!("parameter migration_peers has no address for {target}")))
}

/// The target counts on from this machine's generation: it has to find it in the CIB.
fn remember(machine: &Machine<'_>, status: &VmmStatus) -> ocf::Result {
    let cib = promote::cluster_view(machine)?;
    let stored =
        cib.as_ref().and_then(|c| c.generations(&generation_attribute(&machine.name)).first().map(|(_, g)| *g));
    if stored.is_some_and(|stored| stored >= status.generation) {
        return Ok(());
    }
    promote::store(machine, cib.is_some(), status.generation)
}

/// Run the migration to its end, or until the operation's time is nearly over. What it said last, for the reason.
fn send(machine: &Machine<'_>, target: &str, address: &str) -> ocf::Result<String> {
    let context = machine.context;
    let program = binaries::locate(&context.environment, REPLICATOR)?;
    let p = &context.parameters;
    let log = machine.layout.migration_log();
    let failed = |what: &str, e: std::io::Error| Failure::generic(format!("the migration cannot {what}: {e}"));
    let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&log);
    let file = file.map_err(|e| failed("be logged", e))?;
    let twin = file.try_clone().map_err(|e| failed("be logged", e))?;
    let mut child = Command::new(program)
        // If this action is killed, its standard input closes, and with that it ends too.
        .args(["migrate", "--json", "--until-stdin-closes", "--machine", &machine.name])
        .args(["--node", &context.environment.node(), "--to", &format!("{target}={address}")])
        .args(["--key", &p.get(&MIGRATION_KEY)?, "--max-pause-ms", &p.get(&MIGRATION_PAUSE_MS)?.to_string()])
        .args(["--run-root", &p.get(&RUN_ROOT)?, "--shm-root", &p.get(&SHM_ROOT)?])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(file)
        .stderr(twin)
        .spawn()
        .map_err(|e| failed("be started", e))?;
    let reserve = RESERVE.min(context.deadline.remaining() / 2);
    if !ended(&mut child, context.deadline.leaving(reserve)) {
        context.log.warning(format!("{} is not at {target} when the operation's time is nearly over", machine.name));
        drop(child.stdin.take());
        if !ended(&mut child, context.deadline.leaving(reserve / 2)) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
    Ok(last_said(&log))
}

fn ended(child: &mut Child, deadline: Deadline) -> bool {
    deadline.wait_for(|| (!matches!(child.try_wait(), Ok(None))).then_some(())).is_some()
}

/// The reason that the migration gave, or its last words.
fn last_said(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let why = text.lines().rev().find_map(|line| {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        value["why"].as_str().map(str::to_owned)
    });
    why.or_else(|| daemon::last_words(log)).unwrap_or_else(|| "it said nothing".into())
}

/// What has become of the machine, once its VMM has noticed that the session has ended.
fn judge(machine: &Machine<'_>) -> Option<VmmState> {
    let deadline = machine.context.deadline.within(JUDGE);
    deadline.wait_for(|| {
        machine.status(Duration::from_secs(2)).ok().filter(|status| !status.replicated).map(|status| status.state)
    })
}

/// The target's half.
pub fn migrate_from(machine: &Machine<'_>) -> ocf::Result {
    let context = machine.context;
    let name = &machine.name;
    match machine.observe(context.deadline.within(Duration::from_secs(5))) {
        Observed::Answers(status) => match status.state {
            VmmState::Standby => {}
            VmmState::Running | VmmState::Paused => {
                context.log.info(format!("{name} runs here already, generation {}", status.generation));
                return Ok(());
            }
            state => return Err(Failure::generic(format!("the VMM of {name} has been used up ({state:?})"))),
        },
        Observed::Silent(process, why) => {
            let pid = process.pid();
            return Err(Failure::generic(format!("the VMM of {name} (process {pid}) does not answer: {why}")));
        }
        Observed::Gone => {
            return Err(Failure::generic(format!("nothing of {name} has arrived here: no VMM stands by")));
        }
    }
    let generation = promote::number(machine)?;
    let deadline = context.deadline.leaving(Duration::from_secs(3));
    let image = promote::take_over_offline(machine, generation, Whose::HandedOver, deadline)?
        .ok_or_else(|| Failure::generic(format!("the image of {name} is not in its VMM's memory any more")))?;
    context.log.info(format!("{name} goes on from epoch {} of generation {}", image.epoch, image.generation));
    let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
    let sharing = Sharing::of(machine)?;
    if let Some(sharing) = &sharing {
        sharing.arrive()?;
    }
    let patience = context.deadline.remaining().max(Duration::from_secs(1));
    machine
        .tell::<()>(&VmmRequest::Promote { generation, from }, patience)
        .map_err(|e| Failure::generic(format!("{name} could not be made to run: {e}")))?;
    // Nobody protects it: nothing that it says has to wait.
    machine
        .tell::<()>(&VmmRequest::GateOpen, patience)
        .map_err(|e| Failure::generic(format!("{name} runs, but its outputs cannot leave: {e}")))?;
    machine.unmark_incoming();
    if let Some(sharing) = &sharing {
        sharing.settle();
    }
    context.log.info(format!("{name} runs here as generation {generation}"));
    Ok(())
}

/// Whatever was received here is not what the machine goes on from. An attempt with a bound: the image's memory is gone with its VMM,
/// so nothing could run from it even if this fails.
pub fn discard_image(machine: &Machine<'_>) {
    machine.unmark_incoming();
    if !machine.layout.image_dir().exists() {
        return;
    }
    let context = machine.context;
    let discarded = (|| {
        let program = binaries::locate(&context.environment, REPLICATOR)?;
        let (run_root, shm_root) = (context.parameters.get(&RUN_ROOT)?, context.parameters.get(&SHM_ROOT)?);
        let arguments = ["discard", "--machine", &machine.name, "--run-root", &run_root, "--shm-root", &shm_root];
        let deadline = context.deadline.within(Duration::from_secs(5));
        let output = command::run(&context.environment, &program.to_string_lossy(), &arguments, deadline)
            .map_err(|e| Failure::generic(e.to_string()))?;
        if output.success() { Ok(()) } else { Err(Failure::generic(output.complaint())) }
    })();
    if let Err(why) = discarded {
        context.log.warning(format!("what was received of {} is not discarded: {why}", machine.name));
    }
}

impl Machine<'_> {
    /// The VMM on this node does not wait for a migration (any more).
    pub(super) fn unmark_incoming(&self) {
        if let Err(e) = remove(&self.layout.incoming_mark()) {
            self.context.log.warning(format!("cannot remove the mark of a migration: {e}"));
        }
    }
}
