//! Mirrored disks: every node has its own base, slices and owner record, and the epoch's writes travel with the epoch.
//!
//! **The slice is the unit of replication.** The standby keeps a [`Copy`]: it appends the same records to slices of the same serial number, generation
//! and epoch, so that they have the same digest and the checkpoint's [`Tag`](crate::Tag) means the same on both nodes. A takeover there is an ordinary
//! [`Disk::open_mirrored`](crate::Disk::open_mirrored).
//!
//! ```text
//!  primary                                        standby
//!  Disk                                           Copy::open
//!                ◄───── PeerState ────────────────  .state()
//!  .plan(&state)
//!   InStep:    .join(&state)  ── Rejoin ─────────► .rejoin()
//!   Blocks,    .sync(&state)  ── Begin ──────────► .begin()     durably: not usable
//!   Full:      Sync::next()   ── Item ───────────► .apply()
//!              ::acknowledge() ◄─ number, differing ─ .flush()   what was applied is durable
//!              … the guest runs; gate held; Disk::protect(); Sync::hold() …
//!              ::next() = Done(tag) ─────────────► .into_step(tag)  durable, usable
//!              ::done(tag) ◄────────────────────────
//!  LogReader::next() ── LogPiece ────────────────► .append()    early, while the epoch runs
//!  cut, seal, rest of the log, End(tag) ─────────► .seal(tag)   durable
//!                                                   …memory committed…
//!                                                  .commit(tag) durable; then the acknowledgement
//!  .commit(epoch) ◄─────────────────────────────── merge in the background, on both sides
//!  .leave() at the session's end                   .abandon()
//! ```
//! What must hold: the standby acknowledges an epoch only after [`Copy::seal`] *and* [`Copy::commit`] returned; the primary commits (so merges) only
//! what was acknowledged. So a primary never has in its base what its standby in step has not. Which blocks differ from a peer that is away stands in
//! a bitmap beside the slices ([`bitmap`]), marked before the base changes. `docs/decisions/0016` has the reasons.

pub mod bitmap;
pub mod copy;
pub mod log;
pub(crate) mod peers;
mod plan;
pub mod record;
pub mod sync;
pub mod verify;

use serde::{Deserialize, Serialize};
use understudy_protocol::ids::{Epoch, Generation};

pub use copy::{Applied, Copy, CopyOptions, CopyStatus};
pub use log::{LogPiece, LogReader};
pub use peers::{MirrorStatus, PeerStatus};
pub use record::Turn;
pub use sync::{Next, Progress, Sync};
pub use verify::{Checked, Verify};

use crate::block::Format;
use crate::record::Tag;

/// What a copy is, as it says itself: to be sent to the primary when a session begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerState {
    /// The node that it is on: the primary's bitmaps have peers' names.
    pub node: String,
    /// The machine that it belongs to; empty: to none.
    pub machine: String,
    /// The disk's id; `None`: it never had content.
    pub disk: Option<u64>,
    /// The newest generation that it knows: an older sender is refused.
    pub generation: Generation,
    /// Bytes of its base.
    pub size: u64,
    /// Its format, for messages only: each node may have its own.
    pub format: Format,
    /// What it has.
    pub standing: Standing,
    /// The node in whose favour an administrator gave up what this copy wrote alone.
    pub discard: Option<String>,
}

/// What a copy has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// Nobody knows what is in it.
    Empty,
    /// A synchronisation of it has begun and not ended: it is part this and part that, and not usable.
    Syncing {
        /// From which node.
        from: String,
        /// Which synchronisation: drawn at random when it began.
        sync: u64,
    },
    /// It follows a primary and wrote nothing of its own.
    Follows {
        /// Everything up to here is committed.
        at: Tag,
        /// Complete and durable beyond that, in order.
        sealed: Vec<Tag>,
    },
    /// The machine ran from it last.
    Ran {
        /// Without slices: what it has is no state that a tag names.
        direct: bool,
        /// Everything up to here is in its base.
        merged: Tag,
        /// Committed beyond that, in order.
        committed: Vec<Tag>,
        /// Complete and durable beyond that, in order.
        sealed: Vec<Tag>,
    },
    /// As [`Standing::Follows`], but somebody went on without it: it is not used until it was synchronised.
    Outdated {
        /// Who said so.
        by: String,
        /// Everything up to here is committed.
        at: Tag,
        /// Complete and durable beyond that, in order.
        sealed: Vec<Tag>,
    },
}

/// What is to be done with a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Nothing: what it lacks is in slices. [`crate::Disk::join`].
    InStep,
    /// So many bytes may differ, and where is known. [`crate::Disk::sync`].
    Blocks {
        /// Of blocks.
        bytes: u64,
    },
    /// Everything is compared, and what differs is copied. [`crate::Disk::sync`].
    Full {
        /// A sentence.
        why: String,
    },
    /// Its content must not be overwritten, or cannot be; somebody has to act.
    Refused {
        /// A sentence that says who, and how.
        why: String,
    },
}

/// The beginning of a synchronisation, for [`Copy::begin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Whose disk it will be.
    pub machine: String,
    /// The sender's node.
    pub from: String,
    /// The sender's generation.
    pub generation: Generation,
    /// The disk's id.
    pub disk: u64,
    /// Bytes of the primary's disk: the copy is enlarged to that.
    pub size: u64,
    /// Which synchronisation.
    pub sync: u64,
    /// It goes on where it broke off.
    pub resumed: bool,
    /// The copy's newest state that is of one history with the primary: what it has up to there goes into its base first, what it has beyond never
    /// counted. `None`: nothing of it is used but as something to compare with.
    pub keep: Option<Tag>,
    /// Which generations wrote which slices.
    pub history: Vec<Turn>,
}

/// The beginning of a session with a copy that lacks nothing that is not in slices, for [`Copy::rejoin`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejoin {
    /// Whose disk it is.
    pub machine: String,
    /// The sender's node.
    pub from: String,
    /// The sender's generation.
    pub generation: Generation,
    /// The disk's id.
    pub disk: u64,
    /// Bytes of the primary's disk: the copy is enlarged to that.
    pub size: u64,
    /// Everything up to here counts on the copy, what is beyond does not; the log goes on from there.
    pub at: Tag,
    /// Which generations wrote which slices.
    pub history: Vec<Turn>,
}

/// A part of a synchronisation or a verification, for [`Copy::apply`] or [`Copy::compare`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// They are numbered: an acknowledgement is for all up to a number.
    pub number: u64,
    /// First byte.
    pub at: u64,
    /// How many.
    pub len: u64,
    /// What is there.
    pub content: Content,
}

/// What an [`Item`] says of its range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// These bytes.
    Data(Vec<u8>),
    /// Zeroes.
    Zero,
    /// Something with this BLAKE3 hash: compare.
    Hash([u8; 32]),
}

/// A stretch of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// First byte.
    pub at: u64,
    /// How many.
    pub len: u64,
}

/// Names a slice on the way: its number, who wrote it, in which epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceLabel {
    /// Serial number.
    pub serial: u64,
    /// Who wrote it.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
}
