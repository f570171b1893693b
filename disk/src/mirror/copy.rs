//! A standby's copy of a mirrored disk.

use std::sync::Arc;

use serde::Serialize;

use super::{Begin, Item, LogPiece, PeerState, Rejoin};
use crate::block::{Block, Format};
use crate::disk::{Limits, Merged};
use crate::error::Result;
use crate::record::Tag;
use crate::store::Directory;

/// What to open.
pub struct CopyOptions {
    /// The copy's base; it may be smaller than the primary's disk, also empty: [`Copy::begin`] enlarges it.
    pub base: Arc<dyn Block>,
    /// Its format.
    pub format: Format,
    /// Where its slices are.
    pub directory: Arc<dyn Directory>,
    /// The machine.
    pub machine: String,
    /// This node.
    pub node: String,
    /// Bounds.
    pub limits: Limits,
}

/// What became of an [`Item`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is written, or what is there is the same.
    Done,
    /// What is there has another hash: to be said with the acknowledgement.
    Differs,
}

/// How a copy is.
#[derive(Debug, Clone, Serialize)]
pub struct CopyStatus {
    /// The base.
    pub name: String,
    /// `empty`, `syncing`, `follows`, `ran` or `outdated`.
    pub standing: &'static str,
    /// Bytes in slices that are not merged.
    pub backlog_bytes: u64,
    /// What is wrong, if something is.
    pub problem: Option<String>,
}

/// See the [module](self).
pub struct Copy {}

impl Copy {
    /// Open it. It holds `base.lock` until it is dropped; a process that opens the disk to run the machine does not wait for that.
    ///
    /// # Errors
    /// Another process has it; it belongs to another machine; it is damaged.
    pub fn open(_options: CopyOptions) -> Result<Copy> {
        todo!()
    }

    /// What it is.
    ///
    /// # Errors
    /// It was taken over; what the storage says.
    pub fn state(&self) -> Result<PeerState> {
        todo!()
    }

    /// Go on in step: what is beyond the tag is thrown away, the log goes on behind it.
    ///
    /// # Errors
    /// The sender is of an older generation, or of another disk; it has not what the tag names; it would throw away what it wrote alone.
    pub fn rejoin(&self, _rejoin: &Rejoin) -> Result<()> {
        todo!()
    }

    /// A synchronisation begins: from now on, durably, the copy is not usable.
    ///
    /// # Errors
    /// As [`Copy::rejoin`]; the base cannot be enlarged.
    pub fn begin(&self, _begin: &Begin) -> Result<()> {
        todo!()
    }

    /// A part of a synchronisation.
    ///
    /// # Errors
    /// None is going on; it is not for this disk; what the storage says.
    pub fn apply(&self, _item: &Item) -> Result<Applied> {
        todo!()
    }

    /// What was applied is durable: to be called before it is acknowledged.
    ///
    /// # Errors
    /// What the storage says.
    pub fn flush(&self) -> Result<()> {
        todo!()
    }

    /// The synchronisation is complete: the copy is exactly the disk as of this tag, durably.
    ///
    /// # Errors
    /// None is going on; what the storage says.
    pub fn into_step(&self, _tag: Tag) -> Result<()> {
        todo!()
    }

    /// A piece of the log.
    ///
    /// # Errors
    /// It is not the piece that comes next; it has a wrong checksum; what the storage says. Then the session is to be given up.
    pub fn append(&self, _piece: &LogPiece) -> Result<()> {
        todo!()
    }

    /// The epoch's end: everything up to this tag is here, complete and durable when this returns.
    ///
    /// # Errors
    /// It is not here, or is something else; what the storage says.
    pub fn seal(&self, _tag: Tag) -> Result<()> {
        todo!()
    }

    /// The epoch's memory was committed. Durable when it returns: then it may be acknowledged.
    ///
    /// # Errors
    /// It was not sealed; the copy was taken over; what the storage says.
    pub fn commit(&self, _tag: Tag) -> Result<()> {
        todo!()
    }

    /// Merge, as [`crate::Disk::merge`]. [`Copy::open_merging`] has a thread that does it.
    ///
    /// # Errors
    /// As there.
    pub fn merge(&self) -> Result<Merged> {
        todo!()
    }

    /// Open it, with a thread that merges.
    ///
    /// # Errors
    /// As [`Copy::open`].
    pub fn open_merging(_options: CopyOptions) -> Result<Copy> {
        todo!()
    }

    /// The session is over: what was not sealed is thrown away; what was sealed is kept, as the checkpoint may be promoted.
    ///
    /// # Errors
    /// What the storage says.
    pub fn abandon(&self) -> Result<()> {
        todo!()
    }

    /// Somebody goes on without this copy, and has said so: it is durably not usable until it was synchronised.
    ///
    /// # Errors
    /// The machine ran from it; what the storage says.
    pub fn outdate(&self, _by: &str) -> Result<()> {
        todo!()
    }

    /// Hold the base still at this tag, or where it is if that is beyond. Says where it holds; `None`: that is not committed here yet.
    ///
    /// # Errors
    /// What the storage says.
    pub fn pin(&self, _tag: Tag) -> Result<Option<Tag>> {
        todo!()
    }

    /// Merging may go on.
    pub fn unpin(&self) {
        todo!()
    }

    /// Whether the base has what the item's hash says. Only while it is pinned.
    ///
    /// # Errors
    /// It is not pinned; what the storage says.
    pub fn compare(&self, _item: &Item) -> Result<bool> {
        todo!()
    }

    /// How it is.
    pub fn status(&self) -> CopyStatus {
        todo!()
    }
}
