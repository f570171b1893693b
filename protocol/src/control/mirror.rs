//! What VMM and replicator say to each other about mirrored disks: what the standby's copy lacks, the log of an epoch, and the comparison of both.

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use super::{Attached, VmmRequest};
use crate::ids::{Epoch, Generation};

/// Reply to [`VmmRequest::MirrorBegin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorBegun {
    /// What each copy is to be told, as `understudy_disk::mirror::Begin`.
    pub begins: Vec<serde_json::Value>,
    /// Bytes that have to be looked at, in all.
    pub left: u64,
}

/// Reply to [`VmmRequest::MirrorRead`] and [`VmmRequest::MirrorLog`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorPieces {
    /// What was read. None: there is nothing (more) for now.
    pub pieces: Vec<MirrorPiece>,
    /// Bytes that the copies still lack, as far as is known.
    pub left: u64,
    /// Bytes that they were sent and have not said to be durable.
    pub flying: u64,
    /// The copies have everything up to these tags (as `understudy_disk::Tag`). One for each mirrored disk; only when that is so of all.
    #[serde(default)]
    pub in_step: Option<Vec<serde_json::Value>>,
}

/// A piece of a mirrored disk, or of its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorPiece {
    /// Place in [`Attached::mirrored`].
    pub disk: u16,
    /// What it is.
    pub what: MirrorWhat,
    /// Where its bytes begin in the disk arena.
    pub offset: u64,
    /// How many bytes there are.
    pub bytes: u64,
}

/// What a [`MirrorPiece`] is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorWhat {
    /// A part of the disk: the bytes are its content; none: it is zeroes; 32 bytes with `hash`: its BLAKE3 hash.
    Part {
        /// Its number.
        number: u64,
        /// First byte.
        at: u64,
        /// Bytes of the disk.
        len: u64,
        /// The bytes are a hash.
        hash: bool,
    },
    /// A piece of a slice's log.
    Log {
        /// The slice's serial number.
        serial: u64,
        /// Under which generation it was written.
        generation: Generation,
        /// The disk's number for the epoch.
        epoch: Epoch,
        /// Where in the log.
        at: u64,
        /// The slice is closed, and this was the last of it: its tag, as `understudy_disk::Tag`.
        closed: Option<serde_json::Value>,
    },
}

/// What one copy says, in [`VmmRequest::MirrorDurable`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorDurable {
    /// Number of the last part that is durable.
    pub upto: u64,
    /// First byte and length of what differs.
    pub differing: Vec<(u64, u64)>,
}

/// A step of a comparison. Disks are numbered as in [`Attached::mirrored`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum DiskVerifyStep {
    /// Begin. Reply: the disks' names and sizes, a list of pairs.
    Begin,
    /// Hold a base still. Reply: where, as `understudy_disk::Tag`.
    Pin {
        /// Which.
        disk: u16,
    },
    /// The copy holds still here: hold at the same. Reply: that tag, or `null` when it is not committed here yet.
    PinAt {
        /// Which.
        disk: u16,
        /// Where, as `understudy_disk::Tag`.
        tag: serde_json::Value,
    },
    /// What to compare next. Reply: [`DiskQuestion`], or `null` at the end.
    Ask {
        /// Which.
        disk: u16,
    },
    /// What the copy says. Reply: `null`.
    Result {
        /// Which.
        disk: u16,
        /// [`DiskQuestion::number`].
        number: u64,
        /// Whether it is the same.
        same: bool,
    },
    /// Merging may go on. Reply: `null`.
    Unpin {
        /// Which.
        disk: u16,
    },
    /// Reply: [`DiskCompared`].
    Compared {
        /// Which.
        disk: u16,
    },
}

/// Reply to [`DiskVerifyStep::Ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskQuestion {
    /// Of the question.
    pub number: u64,
    /// First byte.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// BLAKE3.
    pub hash: [u8; 32],
}

/// Reply to [`DiskVerifyStep::Compared`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCompared {
    /// Bytes compared.
    pub done: u64,
    /// Bytes in ranges that differ.
    pub differing: u64,
    /// First byte and length of the first of them.
    pub ranges: Vec<(u64, u64)>,
}

/// Reply to [`VmmRequest::SealDisks`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// What each mirrored disk is at the end of the epoch (as `understudy_disk::Tag`), in the order of [`Attached::mirrored`].
    pub tags: Vec<serde_json::Value>,
}
