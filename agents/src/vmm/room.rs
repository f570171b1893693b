//! Load sharing by priority on this node: machines' claims in their run directories, and who is paused because of them.
//!
//! ```text
//!  start, promote, migrate_from:  claim (memory must fit) ─► pause whom this one displaces ─► it runs
//!  demote, stop:                  it has gone ─► resume who fits now
//!  monitor of a paused machine:   does it fit now? (whoever displaced it may have crashed)
//! ```
//! One lock for the node's machines, held for a moment. A machine that was paused for others has the mark `paused-for` with their names;
//! one that somebody paused by hand has none, is not resumed, and takes no processors. Nothing here makes an action fail but memory
//! that is not there: what could not be paused or resumed now is tried again by the next monitor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ocf::Failure;
use understudy_protocol::control::{VmmRequest, VmmState, VmmStatus};
use understudy_protocol::layout::Layout;

use super::machine::Machine;
use super::parameters::{HOST_ROOM, LOAD_SHARING, MEMORY, PRIORITY, VCPUS};
use crate::cluster::ClusterError;
use crate::paths::RUN_ROOT;
use crate::process::{remove, write_durably};
use crate::run_lock;
use crate::service::{ask, make_private_dir};
use crate::sharing::{self, Claim, Room, Share};

/// Longest that one machine may take to say how it is. (It is on this node; who is silent for longer is counted as gone.)
const ANSWER: Duration = Duration::from_millis(500);
/// Longest that it may take to be paused or resumed.
const CHANGE: Duration = Duration::from_secs(3);
/// Longest that the lock may take.
const LOCK: Duration = Duration::from_secs(5);
/// Pacemaker 2.0, the oldest that is known to count the degraded exit codes as running.
const KNOWS_DEGRADED: (u32, u32) = (3, 1);

/// File name of a machine's claim in its run directory.
const CLAIM: &str = "claim";
/// In the root of run directories: somebody could not be paused or resumed, and whoever is monitored next tries again.
const AGAIN: &str = "room.again";
/// File name of the mark of a machine that is paused for others: their names.
const MARK: &str = "paused-for";

/// Name of the transient node attribute that says for whom a machine is paused there.
pub fn attribute(machine: &str) -> String {
    format!("understudy-paused-{machine}")
}

/// This node's part in the load sharing of one machine.
pub struct Sharing<'a> {
    machine: &'a Machine<'a>,
    root: PathBuf,
    room: Room,
    priority: u64,
    vcpus: u64,
    memory: u64,
}

/// A machine of this node that takes part.
struct Neighbour {
    claim: Claim,
    run: PathBuf,
    /// `None`: nobody answers.
    state: Option<VmmState>,
    marked: bool,
}

impl Neighbour {
    /// It runs, or would if it were not paused for others.
    fn wants(&self) -> bool {
        self.state == Some(VmmState::Running) || (self.state == Some(VmmState::Paused) && self.marked)
    }

    fn tell(&self, request: &VmmRequest) -> Result<(), String> {
        let socket = Layout::in_run_dir(&self.run).vmm_socket();
        ask::<_, ()>(&socket, request, CHANGE).map_err(|e| e.to_string())
    }
}

impl<'a> Sharing<'a> {
    /// `None` if the machine takes no part.
    pub fn of(machine: &'a Machine<'a>) -> ocf::Result<Option<Self>> {
        let p = &machine.context.parameters;
        if p.get(&LOAD_SHARING)? != "pause" {
            return Ok(None);
        }
        let rooms = sharing::rooms(&p.find(&HOST_ROOM)?.unwrap_or_default())
            .map_err(|why| Failure::arguments(format!("parameter host_room {why}")))?;
        let node = machine.context.environment.node();
        let named = rooms.into_iter().find(|(name, _)| *name == node).map(|(_, room)| room);
        let room = named.unwrap_or_else(|| {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            Room { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory: None }
        });
        let root = PathBuf::from(p.get(&RUN_ROOT)?);
        let (priority, vcpus, memory) = (p.get(&PRIORITY)?, p.get(&VCPUS)?, p.get(&MEMORY)?);
        Ok(Some(Self { machine, root, room, priority, vcpus, memory }))
    }

    fn lock(&self) -> Option<File> {
        let deadline = self.machine.context.deadline;
        // Without the directory there is nobody to share with, and taking the lock says so.
        let _ = make_private_dir(&self.root);
        run_lock::take(&self.root, "room.lock", deadline.within(LOCK.min(deadline.remaining() / 4)))
    }

    fn own_claim(&self) -> Claim {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Claim {
            name: self.machine.name.clone(),
            priority: self.priority,
            vcpus: self.vcpus,
            memory: self.memory,
            since: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// The machine's memory is to be taken on this node: refused if it is not there.
    pub fn enter(&self) -> ocf::Result {
        let _lock = self.lock();
        let others: Vec<Claim> =
            claims(&self.root).into_iter().map(|(_, c)| c).filter(|c| c.name != self.machine.name).collect();
        let own = self.own_claim();
        if let Some(missing) = sharing::lacks_memory(self.room, &others, &own) {
            return Err(Failure::arguments(format!(
                "{} needs {} MiB, {missing} more than {} has left of its {} MiB for machines; paused machines keep their memory",
                self.machine.name,
                self.memory,
                self.machine.context.environment.node(),
                self.room.memory.unwrap_or_default()
            )));
        }
        self.write(&own)
    }

    fn write(&self, claim: &Claim) -> ocf::Result {
        let dir = self.machine.layout.run_dir();
        let file = dir.join(CLAIM);
        let failed = |why: String| Failure::generic(format!("cannot write {}: {why}", file.display()));
        make_private_dir(dir).map_err(|e| failed(e.to_string()))?;
        let text = serde_json::to_string(claim).map_err(|e| failed(e.to_string()))?;
        write_durably(&file, &text).map_err(|e| failed(e.to_string()))
    }

    /// The machine is about to run here: whoever it displaces is paused first.
    pub fn arrive(&self) -> ocf::Result {
        let lock = self.lock();
        self.write(&self.own_claim())?;
        self.spread(lock, true);
        Ok(())
    }

    /// Who fits runs, who does not is paused.
    pub fn settle(&self) {
        self.spread(self.lock(), false);
    }

    fn spread(&self, lock: Option<File>, arriving: bool) {
        let log = &self.machine.context.log;
        if lock.is_none() {
            self.try_again();
            return log.warning("pauses stay as they are for now: another action is looking at them");
        }
        let mut all: Vec<Neighbour> = claims(&self.root).into_iter().map(|(run, claim)| look(run, claim)).collect();
        let own = |n: &Neighbour| n.claim.name == self.machine.name;
        let candidates: Vec<Claim> =
            all.iter().filter(|n| n.wants() || (arriving && own(n))).map(|n| n.claim.clone()).collect();
        let shares = sharing::share(self.room, &candidates);
        let _ = remove(&self.root.join(AGAIN));
        // First room is made, then it is taken.
        for pauses in [true, false] {
            for (claim, share) in &shares {
                let Some(neighbour) = all.iter_mut().find(|n| n.claim.name == claim.name) else { continue };
                match share {
                    Share::Waits(whom) if pauses && neighbour.state == Some(VmmState::Running) => {
                        self.pause(neighbour, whom);
                    }
                    Share::Runs if !pauses && neighbour.state == Some(VmmState::Paused) && neighbour.marked => {
                        self.resume(neighbour);
                    }
                    _ => {}
                }
            }
        }
    }

    fn pause(&self, neighbour: &Neighbour, whom: &[String]) {
        let (log, name) = (&self.machine.context.log, &neighbour.claim.name);
        let whom = whom.join(" ");
        // Before it is paused: without the mark nobody would resume it.
        let marked = write_durably(&neighbour.run.join(MARK), &whom).map_err(|e| e.to_string());
        match marked.and_then(|()| neighbour.tell(&VmmRequest::Pause)) {
            Ok(()) => {
                log.info(format!(
                    "{name} is paused for {whom}: this node has {} processors for machines",
                    self.room.cpus
                ));
                self.publish(name, Some(&whom));
            }
            Err(why) => {
                unmark(&neighbour.run);
                self.try_again();
                log.warning(format!("{name} should be paused for {whom} and is not: {why}"));
            }
        }
    }

    fn resume(&self, neighbour: &Neighbour) {
        let (log, name) = (&self.machine.context.log, &neighbour.claim.name);
        match neighbour.tell(&VmmRequest::Resume) {
            Ok(()) => {
                unmark(&neighbour.run);
                log.info(format!("{name} goes on: there is room again"));
                self.publish(name, None);
            }
            // Its own monitor tries again: it has the mark.
            Err(why) => log.warning(format!("{name} should go on and does not: {why}")),
        }
    }

    fn try_again(&self) {
        if let Err(e) = write_durably(&self.root.join(AGAIN), "") {
            self.machine.context.log.warning(format!("nobody will try again: {e}"));
        }
    }

    fn publish(&self, name: &str, whom: Option<&str>) {
        let deadline = self.machine.context.deadline.within(Duration::from_secs(3));
        match self.machine.cluster.set_transient_attribute(&attribute(name), whom, deadline) {
            Ok(()) => {}
            Err(ClusterError::Absent(why)) => self.machine.context.log.debug(why),
            Err(why) => {
                self.machine.context.log.warning(format!("that {name} is paused or not is not published: {why}"))
            }
        }
    }
}

/// The machine is gone from this node, or about to be: whoever fits now goes on. Never fails: `stop` calls it.
pub fn leave(machine: &Machine<'_>) {
    forget(machine);
    if let Ok(Some(sharing)) = Sharing::of(machine) {
        sharing.settle();
    }
}

/// Without its memory it has no claim.
pub fn forget(machine: &Machine<'_>) {
    let run = machine.layout.run_dir();
    let marked = run.join(MARK).exists();
    unmark(run);
    if let Err(e) = remove(&run.join(CLAIM)) {
        machine.context.log.warning(format!("cannot remove the claim of {}: {e}", machine.name));
    }
    if marked && let Ok(Some(sharing)) = Sharing::of(machine) {
        sharing.publish(&machine.name, None);
    }
}

/// Whether the machine is paused for others.
pub fn waits(machine: &Machine<'_>) -> bool {
    machine.layout.run_dir().join(MARK).exists()
}

/// Look again at a machine that is paused for others. Its state afterwards.
pub fn look_again(machine: &Machine<'_>) -> VmmState {
    match Sharing::of(machine) {
        Ok(Some(sharing)) => sharing.settle(),
        // It takes no part any more.
        Ok(None) => go_on(machine),
        Err(why) => machine.context.log.warning(format!("{} stays paused: {why}", machine.name)),
    }
    machine.status(ANSWER).map_or(VmmState::Paused, |status| status.state)
}

/// Have a machine that is paused for others run, whoever it is in the way of: it is about to leave.
pub fn go_on(machine: &Machine<'_>) {
    match machine.tell::<()>(&VmmRequest::Resume, CHANGE) {
        Ok(()) => unmark(machine.layout.run_dir()),
        Err(why) => machine.context.log.warning(format!("{} is paused and does not go on: {why}", machine.name)),
    }
}

/// The parameters have changed while the machine may be running.
pub fn changed(machine: &Machine<'_>) -> ocf::Result {
    let Some(sharing) = Sharing::of(machine)? else {
        if waits(machine) {
            go_on(machine);
        }
        forget(machine);
        return Ok(());
    };
    match machine.status(ANSWER).map(|status| status.state) {
        Ok(VmmState::Running | VmmState::Paused) => sharing.arrive()?,
        Ok(VmmState::Standby) => sharing.write(&sharing.own_claim())?,
        Ok(_) | Err(_) => return Ok(()),
    }
    sharing.settle();
    Ok(())
}

/// A monitor of a machine that runs: what another action could not do is done now.
pub fn catch_up(machine: &Machine<'_>) {
    if let Ok(Some(sharing)) = Sharing::of(machine)
        && sharing.root.join(AGAIN).exists()
    {
        sharing.settle();
    }
}

/// Whether the cluster that called takes the degraded exit codes for what they are. Nobody who calls by hand minds.
pub fn cluster_knows_degraded(machine: &Machine<'_>) -> bool {
    let Some(version) = machine.context.environment.parameter("crm_feature_set") else { return true };
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= KNOWS_DEGRADED
}

fn unmark(run: &Path) {
    // A mark that stays has its machine resumed once more; nothing else.
    let _ = remove(&run.join(MARK));
}

/// The claims on this node, with their machines' run directories. What is not readable is nobody's.
fn claims(root: &Path) -> Vec<(PathBuf, Claim)> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let read = |run: PathBuf| {
        let claim: Claim = serde_json::from_str(&fs::read_to_string(run.join(CLAIM)).ok()?).ok()?;
        run.file_name().is_some_and(|name| name.to_string_lossy() == claim.name).then_some((run, claim))
    };
    entries.flatten().filter_map(|entry| read(entry.path())).collect()
}

fn look(run: PathBuf, claim: Claim) -> Neighbour {
    let socket = Layout::in_run_dir(&run).vmm_socket();
    let state = ask::<_, VmmStatus>(&socket, &VmmRequest::Status, ANSWER).ok().map(|status| status.state);
    let marked = run.join(MARK).exists();
    Neighbour { claim, run, state, marked }
}
