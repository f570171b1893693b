//! What the process that receives migrations asks of this node: the VMM of a machine that stands by, and its end.
//!
//! What the machine is like is read from this node's copy of the CIB: the sender names it, and nothing else. Only a plain primitive whose
//! meta attribute `allow-migrate` is true is made ready.

use std::fs;
use std::time::Duration;

use ocf::action::Action;
use ocf::{Agent, CheckLevel, Context, Deadline, Environment};
use understudy_protocol::control::VmmState;

use crate::cluster::Cluster;
use crate::process::write_durably;
use crate::service::Observed;
use crate::vmm::Vmm;
use crate::vmm::machine::Machine;
use crate::vmm::room::{self, Sharing};

/// The listener's directories.
#[derive(Debug, Clone, Copy)]
pub struct Roots<'a> {
    /// Parent of the run directories.
    pub run: &'a str,
    /// Parent of the shared-memory directories.
    pub shm: &'a str,
}

/// The environment of an action of the machine's vmm agent with these parameters.
fn environment(base: &Environment, resource: &str, parameters: &[(String, String)], limit: Duration) -> Environment {
    let own = base.with_prefix("").filter(|(name, _)| !name.starts_with("OCF_RESKEY_"));
    let mut pairs: Vec<(String, String)> = own.map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    pairs.extend(parameters.iter().map(|(k, v)| (format!("OCF_RESKEY_{k}"), v.clone())));
    pairs.push(("OCF_RESOURCE_INSTANCE".into(), resource.to_owned()));
    pairs.push(("OCF_RESKEY_CRM_meta_timeout".into(), limit.as_millis().to_string()));
    Environment::from_pairs(pairs)
}

/// Have a VMM of `machine` stand by on this node. The error says what is missing.
pub fn prepare(
    cluster: &dyn Cluster,
    base: &Environment,
    machine: &str,
    roots: Roots<'_>,
    limit: Duration,
) -> Result<(), String> {
    let cib = cluster.cib(Deadline::after(limit)).map_err(|e| e.to_string())?;
    let (resource, parameters) = cib.migratable(machine)?;
    let vmm = Vmm;
    let description = vmm.description();
    let context = Context::new(&description, Action::Start, environment(base, &resource, &parameters, limit));
    context.parameters.validate(&description.parameters).map_err(|e| e.to_string())?;
    vmm.validate(&context, CheckLevel::Host).map_err(|e| e.to_string())?;
    let place = Machine::new(&context, cluster).map_err(|e| e.to_string())?;
    if place.layout != understudy_protocol::layout::Layout::new(roots.run, roots.shm, machine) {
        return Err(format!(
            "{resource} keeps its files below other directories than the process that receives migrations ({}, {}): give both the same \
             run_root and shm_root",
            roots.run, roots.shm
        ));
    }
    match place.observe(context.deadline.within(Duration::from_secs(2))) {
        Observed::Gone => {}
        // From a migration that never came to its end, or a life that is over.
        Observed::Answers(status) if !crate::machine_runs(status.state) => {}
        Observed::Answers(_) => return Err(format!("{machine} runs on this node")),
        Observed::Silent(process, why) => {
            return Err(format!(
                "{machine} has a VMM on this node (process {}) that does not answer: {why}",
                process.pid()
            ));
        }
    }
    place.end().map_err(|e| e.to_string())?;
    if let Some(sharing) = Sharing::of(&place).map_err(|e| e.to_string())? {
        sharing.enter().map_err(|e| e.to_string())?;
    }
    place.launch(super::vmm::parameters::Run::Standby).map_err(|e| {
        room::forget(&place);
        e.to_string()
    })?;
    let pid = place.pid().ok_or_else(|| format!("the VMM of {machine} has ended as soon as it was started"))?;
    let mark = place.layout.incoming_mark();
    write_durably(&mark, &format!("{pid}\n")).map_err(|e| format!("cannot write {}: {e}", mark.display()))
}

/// Undo that, unless the machine runs by now or the VMM is another one.
pub fn forget(
    cluster: &dyn Cluster,
    base: &Environment,
    machine: &str,
    roots: Roots<'_>,
    limit: Duration,
) -> Result<(), String> {
    let parameters = [("name", machine), ("run_root", roots.run), ("shm_root", roots.shm), ("mode", "primitive")];
    let parameters = parameters.map(|(k, v)| (k.to_owned(), v.to_owned()));
    let context = Context::new(&Vmm.description(), Action::Stop, environment(base, machine, &parameters, limit));
    let place = Machine::new(&context, cluster).map_err(|e| e.to_string())?;
    let mark = place.layout.incoming_mark();
    let Ok(text) = fs::read_to_string(&mark) else { return Ok(()) };
    let started: Option<i32> = text.trim().parse().ok();
    let ours = match place.observe(context.deadline.within(Duration::from_secs(2))) {
        Observed::Answers(status) => status.state == VmmState::Standby && place.pid() == started,
        Observed::Gone => place.recorded_pid() == started,
        Observed::Silent(process, _) => Some(process.pid()) == started,
    };
    if ours {
        place.end().map_err(|e| e.to_string())?;
        room::forget(&place);
    }
    crate::process::remove(&mark).map_err(|e| format!("cannot remove {}: {e}", mark.display()))
}
