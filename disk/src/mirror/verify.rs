//! Verification: whether a copy in step has what its primary has, while both run. The primary's side.

use std::sync::Arc;

use super::{Item, Range};
use crate::disk::Disk;
use crate::error::Result;
use crate::record::Tag;

/// How far a verification is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Bytes compared.
    pub done: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes in ranges that differ.
    pub differing: u64,
    /// The first of them (at most 64).
    pub ranges: Vec<Range>,
}

/// One verification. Bases are compared while both hold still at the same tag; between two windows they may merge.
///
/// ```text
///  Verify::pin() = P ────────► Copy::pin(P) merges up to P, holds   answers Some(P)
///                 ◄──────────  or holds at C > P                    answers Some(C); Verify::pin_at(C)
///                 ◄──────────  or cannot yet                        answers None; later again
///  Verify::ask() = Item  ────► Copy::compare(item)
///  Verify::result(n, same) ◄──
///  Verify::unpin() ──────────► Copy::unpin()     after a second or some 256 MiB; then pin() again, until ask() has no more
/// ```
pub struct Verify {
    _disk: Arc<Disk>,
}

impl Verify {
    /// Hold the base still, and say where.
    ///
    /// # Errors
    /// The disk is not protected, or no peer is joined.
    pub fn pin(&mut self) -> Result<Tag> {
        todo!()
    }
    /// The copy holds at this tag: merge up to it, and hold there. `None`: it is not committed here yet; call it again later, or [`Verify::unpin`].
    ///
    /// # Errors
    /// What the storage says; the copy's tag is not one of this disk's.
    pub fn pin_at(&mut self, _tag: Tag) -> Result<Option<Tag>> {
        todo!()
    }
    /// The next range; `None`: everything was asked. Only while both are pinned at the same tag.
    ///
    /// # Errors
    /// It is not pinned; what the storage says.
    pub fn ask(&mut self) -> Result<Option<Item>> {
        todo!()
    }
    /// The copy's answer. A range that differs is marked, durably, so that the next synchronisation mends it.
    ///
    /// # Errors
    /// It was not asked; what the storage says.
    pub fn result(&mut self, _number: u64, _same: bool) -> Result<()> {
        todo!()
    }
    /// Merging may go on.
    pub fn unpin(&mut self) {
        todo!()
    }
    /// How far it is.
    pub fn checked(&self) -> Checked {
        todo!()
    }
}

impl Disk {
    /// Begin to verify the peer that is joined.
    ///
    /// # Errors
    /// None is, or a verification or synchronisation is going on.
    pub fn verify(self: &Arc<Self>) -> Result<Verify> {
        todo!()
    }
}
