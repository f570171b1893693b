//! Synchronisation of a peer: the primary's side.

use std::sync::Arc;

use serde::Serialize;

use super::{Begin, Item, PeerState, Plan, Range, Rejoin};
use crate::disk::Disk;
use crate::error::Result;
use crate::record::Tag;

/// What [`Sync::next`] has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// To be sent.
    Item(Item),
    /// Nothing now: what was sent is to be acknowledged first, or (before [`Sync::hold`]) the guest may write something again.
    Wait,
    /// Everything is there and acknowledged as durable. To be sent for [`super::Copy::into_step`], then [`Sync::done`].
    Done(Tag),
}

/// How far a synchronisation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Bytes that are to be sent (or compared) as of now.
    pub left: u64,
    /// Bytes on their way: not acknowledged.
    pub flying: u64,
    /// Bytes sent or compared so far, blocks that were written again each time.
    pub done: u64,
    /// Of those, content that travelled.
    pub sent: u64,
}

/// One synchronisation of one peer. Dropping it breaks it off; what was acknowledged need not be sent again.
pub struct Sync {
    _disk: Arc<Disk>,
}

impl Sync {
    /// What to send next, content of at most `most` bytes (at least 64 KiB are sent at once).
    ///
    /// # Errors
    /// What the storage says; the disk is not ours any more.
    pub fn next(&mut self, _most: usize) -> Result<Next> {
        todo!()
    }

    /// The copy says that everything up to this item is durable, and which of the ranges it was asked to compare differ.
    ///
    /// # Errors
    /// It speaks of what it was not sent; what the storage says.
    pub fn acknowledge(&mut self, _upto: u64, _differing: &[Range]) -> Result<()> {
        todo!()
    }

    /// The second phase: nothing is merged from now on until this is dropped or done, so what is left is of exactly one state. [`Disk::protect`] was
    /// called before.
    ///
    /// # Errors
    /// The disk is not protected.
    pub fn hold(&mut self) -> Result<()> {
        todo!()
    }

    /// The copy is in step, durably: the peer has everything up to this tag, and is joined. The log goes on from there.
    ///
    /// # Errors
    /// What the storage says.
    pub fn done(self, _tag: Tag) -> Result<()> {
        todo!()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        todo!()
    }
}

impl Disk {
    /// What a peer needs.
    ///
    /// # Errors
    /// The disk was not opened as a mirrored one; what the storage says.
    pub fn plan(&self, _peer: &PeerState) -> Result<Plan> {
        todo!()
    }

    /// The peer is in step ([`Plan::InStep`]): from now on what is committed counts as what it has, until [`Disk::leave`].
    ///
    /// # Errors
    /// It is not; what the storage says.
    pub fn join(&self, _peer: &PeerState) -> Result<Rejoin> {
        todo!()
    }

    /// Begin to synchronise a peer, or go on ([`Plan::Blocks`], [`Plan::Full`]).
    ///
    /// # Errors
    /// The plan is another one; a synchronisation is going on; what the storage says.
    pub fn sync(self: &Arc<Self>, _peer: &PeerState) -> Result<(Sync, Begin)> {
        todo!()
    }

    /// The session with the peer is over (none: nothing happens). What is committed from now on it does not have.
    pub fn leave(&self) {
        todo!()
    }
}
