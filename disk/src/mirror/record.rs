//! What stands of mirroring in the owner record.

use serde::{Deserialize, Serialize};
use understudy_protocol::ids::Generation;

/// A generation's turn in a disk's history: the slices from this one on, up to the next turn's, are of this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Whose.
    pub generation: Generation,
    /// The first serial number of its turn.
    pub from: u64,
}
