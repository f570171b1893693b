//! What stands of mirroring in the owner record: it changes together with what is merged and whose the disk is, or not at all.

use serde::{Deserialize, Serialize};
use understudy_protocol::ids::Generation;

use crate::record::Tag;

/// Most turns that are remembered.
pub const TURNS: usize = 256;
/// Most states at which a peer may be, beside the one at which it is known to be.
pub const ALSO: usize = 64;

/// A generation's turn in a disk's history: the slices from this one on, up to the next turn's, are of this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Whose.
    pub generation: Generation,
    /// The first serial number of its turn.
    pub from: u64,
}

/// Whether a state is one that a disk with this history went through. `false` also if that was too long ago to be known.
pub fn on_history(history: &[Turn], tag: Tag) -> bool {
    let turn = history.iter().rev().find(|turn| turn.from <= tag.serial);
    turn.is_some_and(|turn| turn.generation == tag.generation)
}

/// Another generation writes from `from` on.
pub(crate) fn take_turn(history: &mut Vec<Turn>, generation: Generation, from: u64) {
    // Whoever wrote nothing had no turn.
    while history.last().is_some_and(|last| last.from >= from) {
        history.pop();
    }
    if history.last().is_none_or(|last| last.generation != generation) {
        history.push(Turn { generation, from });
    }
    let extra = history.len().saturating_sub(TURNS);
    history.drain(..extra);
}

/// The part of [`crate::Ownership`] that mirrored disks have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// What this copy is.
    pub role: Role,
    /// Which generations wrote which slices.
    pub history: Vec<Turn>,
    /// What others have.
    pub peers: Vec<Peer>,
    /// The node in whose favour an administrator gave up what this copy wrote alone.
    #[serde(default)]
    pub discard: Option<String>,
}

/// What a copy is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The machine ran from it last.
    Ran,
    /// It follows a primary.
    Follows {
        /// The primary's node.
        of: String,
    },
    /// A synchronisation has begun and not ended: not usable.
    Syncing {
        /// The primary's node.
        from: String,
        /// Which synchronisation.
        sync: u64,
        /// A flush failed: what is read there may be only in the kernel's cache, so nothing is taken for the same.
        #[serde(default)]
        distrust: bool,
    },
    /// It followed, and somebody went on without it: not usable.
    Outdated {
        /// Whom it followed.
        of: String,
        /// Who said so.
        by: String,
    },
}

/// What another node has. Where its content may differ from this one's stands in its bitmap: in blocks that are marked there, and in slices above
/// [`Peer::has`] that are not merged here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its node.
    pub node: String,
    /// Everything up to here. Older than it really is does no harm. `None`: not known.
    pub has: Option<Tag>,
    /// Or it is at one of these: its difference from them is in the bitmap as well.
    pub also: Vec<Tag>,
    /// A synchronisation of it was begun: while its copy says so too, only the bitmap counts.
    pub sync: Option<u64>,
    /// That one compares.
    #[serde(default)]
    pub full: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(serial: u64, generation: u64) -> Tag {
        Tag { serial, generation: Generation(generation), epoch: Default::default(), records: 1, digest: 1 }
    }

    #[test]
    fn a_history_knows_which_states_are_its_own() {
        let mut history = Vec::new();
        take_turn(&mut history, Generation(1), 0);
        take_turn(&mut history, Generation(2), 13);
        take_turn(&mut history, Generation(3), 20);
        // Generation 3 wrote nothing.
        take_turn(&mut history, Generation(5), 20);
        for (serial, generation, own) in
            [(0, 1, true), (12, 1, true), (13, 1, false), (13, 2, true), (19, 2, true), (20, 3, false), (20, 5, true)]
        {
            assert_eq!(on_history(&history, tag(serial, generation)), own, "{serial} of {generation}");
        }
        for turn in 0..1000 {
            take_turn(&mut history, Generation(10 + turn), 30 + turn);
        }
        assert_eq!(history.len(), TURNS);
        assert!(!on_history(&history, tag(12, 1)), "too long ago");
    }
}
