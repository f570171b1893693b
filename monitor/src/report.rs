//! What a node's monitor tells whoever asks: people, the agent, the evacuation controller.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_protocol::control::{ControlError, call_once};

use crate::matrix::{Observation, Verdict};

/// In the place of a machine's name: the directory of the monitor below the run root. (No machine's name begins with a dot.)
pub const DIRECTORY: &str = ".monitor";

/// The monitor's control socket.
pub fn socket(run_root: &Path) -> PathBuf {
    run_root.join(DIRECTORY).join("monitor.sock")
}

/// A request, one JSON object a line (`protocol::control`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Request {
    /// Reply: [`Report`].
    Status,
    /// End the process. Reply: `null`.
    Quit,
}

/// How everything looks from one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// From which.
    pub node: String,
    /// It is the one that speaks for all: the first of those that are members and heard.
    pub speaks: bool,
    /// Why nothing is judged yet, if so.
    pub waits_for: Option<String>,
    /// Every node but those that left by themselves, and their machines.
    pub judged: Vec<Judged>,
    /// Datagrams that were no heartbeats of ours, since the process began.
    pub refused: u64,
    /// The last of them: from where, and why.
    pub last_refused: Option<String>,
}

/// What is seen of a node or one of its machines, and what follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// The node.
    pub node: String,
    /// The machine; `None` for the node itself (then the column `machine` is its monitor).
    pub machine: Option<String>,
    /// What is seen.
    pub observation: Observation,
    /// Name of the row that decides.
    pub row: String,
    /// What follows.
    pub verdict: Verdict,
    /// For how long it has been so, ms.
    pub for_ms: u64,
}

/// Ask the monitor of this node.
pub fn ask(run_root: &Path, patience: Duration) -> Result<Report, ControlError> {
    call_once(socket(run_root), &Request::Status, patience)
}
