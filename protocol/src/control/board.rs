//! Requests to a board's service, e.g. `understudy-serial`, and its status.

use serde::{Deserialize, Serialize};

use crate::ids::Generation;

/// A request to a board service, e.g. `understudy-serial`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum BoardRequest {
    /// Reply: [`BoardStatus`].
    Status,
    /// End the service in order: nothing is uncertain afterwards. Reply: `null`, then the socket closes.
    Quit,
}

/// Reply to [`BoardRequest::Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardStatus {
    /// The machine that it serves.
    pub machine: String,
    /// The device's name.
    pub device: String,
    /// What the line is, as on the command line: `tty:/dev/ttyS0,115200`.
    pub line: String,
    /// Whether the line is open. While it is not, output waits.
    pub line_open: bool,
    /// Address and port that sessions are accepted on.
    pub listen: String,
    /// Which run of the service this is.
    pub incarnation: u64,
    /// Highest generation seen; lower ones are refused.
    pub generation: Generation,
    /// The generation that booted the machine whose streams these are.
    pub life: Generation,
    /// Address of the owner's host, if one is attached.
    pub owner: Option<String>,
    /// Time since the owner was last heard, ms; `None` if none is attached.
    pub last_heard_ms: Option<u64>,
    /// Output bytes that the line has taken, since the machine's cold boot.
    pub applied: u64,
    /// Output bytes that wait for the line.
    pub pending: u64,
    /// Oldest input offset kept for the machine.
    pub input_base: u64,
    /// Input bytes read from the line, since the machine's cold boot.
    pub input_end: u64,
    /// Most input bytes kept.
    pub input_capacity: u64,
    /// Connections, attached or not.
    pub sessions: u64,
    /// Attaches agreed to since the service started.
    pub attaches: u64,
    /// Connections refused since the service started: stale generation, wrong key, ….
    pub refusals: u64,
    /// The newest events, oldest first, as sentences.
    pub events: Vec<String>,
}
