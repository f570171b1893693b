//! The control socket of the evacuation controller: who asks whether it works, and how it answers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layout::DEFAULT_RUN_ROOT;

/// In the place of a machine's name: the controller's run directory. (No machine's name begins with a dot.)
pub const DIRECTORY: &str = ".evacuator";

/// A request to `understudy-evacuator`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum EvacuatorRequest {
    /// Reply: [`EvacuatorStatus`].
    Status,
    /// End the process. Reply: `null`, then the socket closes.
    Quit,
}

/// Reply to [`EvacuatorRequest::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvacuatorStatus {
    /// The node that it runs on.
    pub node: String,
    /// Rounds that came to their end since it started.
    pub rounds: u64,
    /// Time since the last of them, in ms; since the start, if there was none.
    pub last_round_ms: u64,
    /// Plans that are not closed.
    pub open_plans: u64,
    /// Machines that should run and do not.
    pub without_host: u64,
    /// What does not work, as of the newest round; empty if all does.
    pub trouble: String,
}

/// Where its files are on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvacuatorFiles {
    dir: PathBuf,
}

impl Default for EvacuatorFiles {
    fn default() -> Self {
        Self::below(DEFAULT_RUN_ROOT)
    }
}

impl EvacuatorFiles {
    /// Below this parent of all run directories.
    pub fn below(run_root: impl Into<PathBuf>) -> Self {
        Self { dir: run_root.into().join(DIRECTORY) }
    }
    /// The directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone()
    }
    /// Control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("evacuator.sock")
    }
    /// Process id, decimal, one line. Present while it should be running.
    pub fn pid(&self) -> PathBuf {
        self.dir.join("evacuator.pid")
    }
    /// Log.
    pub fn log(&self) -> PathBuf {
        self.dir.join("evacuator.log")
    }
}
