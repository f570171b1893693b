//! One machine on this node, as the agent's actions see it: its VMM process, its replicator, its score, its marks.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ocf::{Context, Deadline, Failure};
use understudy_protocol::control::{ControlError, ReplicatorRequest, ReplicatorStatus, VmmRequest, VmmStatus};
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::Layout;

use super::parameters::{self, MODE, Run};
use crate::binaries;
use crate::cluster::Cluster;
use crate::paths;
use crate::process::{Identity, remove, write_durably};
use crate::score_lock;
use crate::service::{Observed, Service, ask, make_private_dir};

/// The VMM's executable.
pub const PROGRAM: &str = "understudy-vmm";
/// Longest that a score may take to be written: it is advice, not a condition.
const SCORE_PATIENCE: Duration = Duration::from_secs(5);

/// The machine that a call is about.
pub struct Machine<'a> {
    /// The call.
    pub context: &'a Context,
    /// The cluster.
    pub cluster: &'a dyn Cluster,
    /// Its name.
    pub name: String,
    /// Where its files are.
    pub layout: Layout,
    /// Whether it is a clone with roles.
    pub promotable: bool,
    service: Service,
}

impl<'a> Machine<'a> {
    /// From the parameters. Needs `name`, the two roots and `mode` to be right, nothing else.
    pub fn new(context: &'a Context, cluster: &'a dyn Cluster) -> ocf::Result<Self> {
        let (name, layout) = paths::layout(&context.parameters)?;
        let promotable = match context.parameters.get(&MODE)?.as_str() {
            "promotable" => true,
            "primitive" => false,
            _ => context.environment.is_clone(),
        };
        let identity = Identity {
            pid_file: layout.vmm_pid(),
            socket: layout.vmm_socket(),
            program: PROGRAM,
            words: vec![name.clone()],
        };
        let service = Service { identity, log: layout.vmm_log() };
        Ok(Self { context, cluster, name, layout, promotable, service })
    }

    /// How the VMM is.
    pub fn observe(&self, deadline: Deadline) -> Observed<VmmStatus> {
        self.service.observe(|patience| self.status(patience), deadline)
    }

    /// Ask the VMM once.
    pub fn status(&self, patience: Duration) -> Result<VmmStatus, ControlError> {
        self.tell(&VmmRequest::Status, patience)
    }

    /// Tell the VMM something.
    pub fn tell<R: serde::de::DeserializeOwned>(
        &self,
        request: &VmmRequest,
        patience: Duration,
    ) -> Result<R, ControlError> {
        ask(&self.layout.vmm_socket(), request, patience)
    }

    /// What the local replicator says of itself, if it answers.
    pub fn replicator(&self, patience: Duration) -> Option<ReplicatorStatus> {
        ask(&self.layout.replicator_socket(), &ReplicatorRequest::Status, patience).ok()
    }

    /// Start a VMM, as standby or running at once.
    pub fn launch(&self, run: Run) -> ocf::Result {
        let program = binaries::locate(&self.context.environment, PROGRAM)?;
        let node = self.context.environment.node();
        let arguments = parameters::command_line(&self.context.parameters, &node, run)?;
        self.service.launch(self.context, &program, &arguments, |patience| self.status(patience).map(drop))
    }

    /// The last thing that the VMM said, as the end of a sentence.
    pub fn last_words(&self) -> String {
        crate::daemon::last_words(&self.layout.vmm_log())
            .map(|words| format!("; the last it said was: {words}"))
            .unwrap_or_default()
    }

    /// Whether a pid file says that the VMM should be running.
    pub fn recorded(&self) -> bool {
        self.service.identity.recorded()
    }

    /// Process id of the VMM, if it lives.
    pub fn pid(&self) -> Option<i32> {
        self.service.identity.find().map(|process| process.pid())
    }

    /// Process id in the pid file, whether that process lives or not.
    pub fn recorded_pid(&self) -> Option<i32> {
        fs::read_to_string(self.layout.vmm_pid()).ok()?.trim().parse().ok()
    }

    /// End the VMM and remove what only it used: after this the node holds nothing of the machine's memory.
    pub fn end(&self) -> ocf::Result {
        let quit = |patience| self.tell::<()>(&VmmRequest::Quit, patience);
        self.service.end(self.context, quit)?;
        for path in [self.layout.ram(), self.layout.arena()] {
            if let Err(e) = remove(&path) {
                self.context.log.warning(format!("cannot remove {}: {e}", path.display()));
            }
        }
        Ok(())
    }

    /// Whether the last that was heard is that this node runs the machine.
    pub fn marked_promoted(&self) -> bool {
        self.layout.promoted_mark().exists()
    }

    /// Note that this node runs the machine, before it does.
    pub fn mark_promoted(&self, generation: Generation) -> ocf::Result {
        let path = self.layout.promoted_mark();
        write_durably(&path, &format!("{generation}\n"))
            .map_err(|e| Failure::generic(format!("cannot write {}: {e}", path.display())))
    }

    /// Forget it.
    pub fn unmark_promoted(&self) {
        if let Err(e) = remove(&self.layout.promoted_mark()) {
            self.context.log.warning(format!("cannot remove the mark of the promoted role: {e}"));
        }
    }

    /// File with the newest generation that this node has seen: the only record there is without a cluster.
    fn generation_file(&self) -> PathBuf {
        self.layout.run_dir().join("generation")
    }

    /// Newest generation that this node has noted.
    pub fn noted_generation(&self) -> Generation {
        let text = fs::read_to_string(self.generation_file()).unwrap_or_default();
        Generation(text.trim().parse().unwrap_or(0))
    }

    /// Note it.
    pub fn note_generation(&self, generation: Generation) -> ocf::Result {
        let path = self.generation_file();
        make_private_dir(self.layout.run_dir())
            .map_err(|e| Failure::generic(format!("cannot create {}: {e}", self.layout.run_dir().display())))?;
        write_durably(&path, &format!("{generation}\n"))
            .map_err(|e| Failure::generic(format!("cannot write {}: {e}", path.display())))
    }

    /// Tell the cluster how good a primary this node would be. Without one nobody minds.
    pub fn set_score(&self, score: Option<i32>) {
        if !self.promotable {
            return;
        }
        let deadline = self.context.deadline.within(SCORE_PATIENCE.min(self.context.deadline.remaining() / 3));
        let resource = self.context.environment.resource();
        let _lock = score_lock::take(self.layout.run_dir(), deadline);
        match self.cluster.set_score(resource, score, deadline) {
            Ok(()) => self.context.log.debug(format!("promotion score {score:?}")),
            Err(crate::cluster::ClusterError::Absent(why)) => self.context.log.debug(why),
            Err(e) if self.context.environment.under_pacemaker() => {
                self.context.log.warning(format!("the promotion score stays as it was: {e}"));
            }
            Err(e) => self.context.log.debug(e.to_string()),
        }
    }
}
