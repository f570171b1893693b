//! Verification: whether a copy in step has what its primary has, while both run. The primary's side.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Content, Item, Range};
use crate::block::Block;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::record::Tag;

/// Compared at once.
const WINDOW: u64 = 1 << 20;
/// Ranges that are remembered.
const NAMED: usize = 64;

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
    disk: Arc<Disk>,
    node: String,
    next: u64,
    number: u64,
    pinned: Option<Tag>,
    asked: BTreeMap<u64, Range>,
    checked: Checked,
}

impl Verify {
    /// Hold the base still, and say where.
    ///
    /// # Errors
    /// The disk is not protected, or no peer is joined.
    pub fn pin(&mut self) -> Result<Tag> {
        self.require()?;
        let tag = self.disk.hold_base_still()?;
        self.pinned = Some(tag);
        Ok(tag)
    }

    /// The copy holds at this tag: merge up to it, and hold there. `None`: it is not committed here yet; call it again later, or [`Verify::unpin`].
    ///
    /// # Errors
    /// What the storage says; the copy's tag is not one of this disk's.
    pub fn pin_at(&mut self, tag: Tag) -> Result<Option<Tag>> {
        self.require()?;
        self.pinned = self.disk.hold_base_at(tag)?;
        Ok(self.pinned)
    }

    fn require(&self) -> Result<()> {
        self.disk.check_owner()?;
        let joined = self.disk.mirroring()?.state().joined.clone();
        if joined.as_ref() != Some(&self.node) || !self.disk.is_protected() {
            return Err(Error::Refused(format!(
                "the copy of {} on {} is not in step any more; verify it again when it is",
                self.disk.name(),
                self.node
            )));
        }
        Ok(())
    }

    /// The next range; `None`: everything was asked. Only while both are pinned at the same tag.
    ///
    /// # Errors
    /// It is not pinned; what the storage says.
    pub fn ask(&mut self) -> Result<Option<Item>> {
        if self.pinned.is_none() {
            return Err(Error::Refused(format!("the base of {} is not held still", self.disk.name())));
        }
        let len = self.disk.size().saturating_sub(self.next).min(WINDOW);
        if len == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        self.disk.base.read_at(self.next, &mut bytes)?;
        self.number += 1;
        let item =
            Item { number: self.number, at: self.next, len, content: Content::Hash(blake3::hash(&bytes).into()) };
        self.asked.insert(self.number, Range { at: self.next, len });
        self.next += len;
        Ok(Some(item))
    }

    /// The copy's answer. A range that differs is marked, durably, so that the next synchronisation mends it.
    ///
    /// # Errors
    /// It was not asked; what the storage says.
    pub fn result(&mut self, number: u64, same: bool) -> Result<()> {
        let Some(range) = self.asked.remove(&number) else {
            let name = self.disk.name();
            return Err(Error::Refused(format!(
                "the copy of {name} answers for item {number}, which it was not asked"
            )));
        };
        self.checked.done += range.len;
        if same {
            return Ok(());
        }
        self.checked.differing += range.len;
        if self.checked.ranges.len() < NAMED {
            self.checked.ranges.push(range);
        }
        let state = &mut *self.disk.mirroring()?.state();
        match state.find(&self.node) {
            Some(live) => live.bits.mark_durably(std::iter::once((range.at, range.len))),
            None => Ok(()),
        }
    }

    /// Merging may go on. All answers have come.
    pub fn unpin(&mut self) {
        self.pinned = None;
        self.disk.hold_merging(None);
    }

    /// How far it is.
    pub fn checked(&self) -> Checked {
        self.checked.clone()
    }
}

impl Drop for Verify {
    fn drop(&mut self) {
        self.disk.hold_merging(None);
        if let Ok(mirror) = self.disk.mirroring() {
            mirror.state().busy = None;
        }
    }
}

impl Disk {
    /// Begin to verify the peer that is joined.
    ///
    /// # Errors
    /// None is, or a verification or synchronisation is going on.
    pub fn verify(self: &Arc<Self>) -> Result<Verify> {
        let state = &mut *self.mirroring()?.state();
        if let Some(busy) = state.busy {
            return Err(Error::Refused(format!("{busy} of {} is going on; wait for its end", self.name())));
        }
        let Some(node) = state.joined.clone() else {
            return Err(Error::Refused(format!(
                "no copy of {} is in step, so there is nothing to compare it with",
                self.name()
            )));
        };
        state.busy = Some("a verification");
        let checked = Checked { done: 0, total: self.size(), differing: 0, ranges: Vec::new() };
        Ok(Verify { disk: self.clone(), node, next: 0, number: 0, pinned: None, asked: BTreeMap::new(), checked })
    }
}
