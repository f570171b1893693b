//! Synchronisation of a peer: the primary's side.
//!
//! ```text
//!  dirty ──sent──► flying ──acknowledged as durable──► clear (in memory; in the file soon after)
//!    ▲  ▲             │
//!    │  └─────────────┴ broken off; or compared and different
//!    └ written again, by the guest or by a merge
//! ```
//! All content is read from the base. While the guest runs, the base changes under the reader: a write marks its blocks before *and* after, so what was read
//! in between is sent again. [`Sync::hold`] ends that: nothing is merged, and a protected disk writes nothing to its base, so the base is of one
//! state, by whose tag the copy is called when it has it all. What is newer stands in slices and follows as log.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use serde::Serialize;

use super::bitmap::{Bitmap, Bits};
use super::peers::Live;
use super::plan::Found;
use super::record::Peer;
use super::{Begin, Content, Item, PeerState, Plan, Range, Rejoin};
use crate::block::Block;
use crate::disk::{Disk, Merged};
use crate::error::{Error, Result};
use crate::record::Tag;

/// Most that is sent and not acknowledged.
const FLYING: u64 = 64 << 20;
/// Most in one item.
const ITEM: u64 = 4 << 20;
/// Compared at once.
const COMPARED: u64 = 1 << 20;
/// Blocks' bits are cleared in the file after so much was acknowledged.
const CLEARED: u64 = 32 << 20;

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
    /// Bytes acknowledged so far, blocks that were written again each time.
    pub done: u64,
    /// Bytes of content that travelled.
    pub sent: u64,
}

struct Sent {
    number: u64,
    blocks: std::ops::Range<u64>,
    compared: bool,
}

/// One synchronisation of one peer. Dropping it breaks it off; what was acknowledged need not be sent again.
pub struct Sync {
    disk: Arc<Disk>,
    node: String,
    number: u64,
    window: VecDeque<Sent>,
    /// Compared and different: to be sent as they are.
    again: BTreeSet<u64>,
    /// Not compared yet, if this one compares.
    unknown: Option<Bits>,
    cursor: u64,
    held: Option<Tag>,
    announced: bool,
    /// The record says that what the peer had is not its state any more.
    forgotten: bool,
    uncleared: u64,
    done: u64,
    sent: u64,
    finished: bool,
}

pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// What is decided at the beginning.
struct Prepared {
    keep: Option<Tag>,
    number: u64,
    resumed: bool,
    unknown: Option<Bits>,
    forgotten: bool,
    history: Vec<super::Turn>,
}

impl Sync {
    fn live<R>(&self, work: impl FnOnce(&mut Live) -> R) -> Result<R> {
        let state = &mut *self.disk.mirroring()?.state();
        let gone = || Error::Refused(format!("{} is no peer of {} any more", self.node, self.disk.name()));
        state.find(&self.node).map(work).ok_or_else(gone)
    }

    /// The next run of blocks that are alike, taken out of what is to be sent.
    fn pick(&mut self, most: u64) -> Result<Option<(std::ops::Range<u64>, bool)>> {
        let (cursor, again, unknown) = (self.cursor, &self.again, &self.unknown);
        let compares =
            |block: u64| unknown.as_ref().is_some_and(|unknown| unknown.get(block)) && !again.contains(&block);
        let state = &mut *self.disk.mirroring()?.state();
        let Some(live) = state.find(&self.node) else { return Ok(None) };
        let bits: &mut Bitmap = &mut live.bits;
        // One that is flying is sent again only when it is known to have arrived: two in flight could not be told apart.
        let ready = |bits: &Bitmap, block: u64| bits.dirty.get(block) && !bits.flying.get(block);
        let from = |mut at: u64| {
            while let Some(block) = bits.dirty.next(at) {
                if !bits.flying.get(block) {
                    return Some(block);
                }
                at = block + 1;
            }
            None
        };
        let first = again.iter().copied().find(|block| ready(bits, *block));
        let Some(first) = first.or_else(|| from(cursor)).or_else(|| from(0)) else { return Ok(None) };
        let compared = compares(first);
        let most = if compared { COMPARED } else { most.clamp(bits.geometry.block, ITEM) };
        let mut end = first + 1;
        while (end - first + 1) * bits.geometry.block <= most && ready(bits, end) && compares(end) == compared {
            end += 1;
        }
        for block in first..end {
            bits.dirty.clear(block);
            bits.flying.set(block);
        }
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::ClearedEarly) {
            (first..end).for_each(|block| bits.flying.clear(block));
            bits.store()?;
            (first..end).for_each(|block| bits.flying.set(block));
        }
        self.cursor = end;
        Ok(Some((first..end, compared)))
    }

    /// These are to be sent again.
    fn put_back(&self, blocks: std::ops::Range<u64>) -> Result<()> {
        self.live(|live| {
            for block in blocks {
                live.bits.flying.clear(block);
                live.bits.dirty.set(block);
            }
        })
    }

    /// What to send next, content of at most `most` bytes (a block of 64 KiB or more is sent at once all the same).
    ///
    /// # Errors
    /// What the storage says; the disk is not ours any more.
    pub fn next(&mut self, most: usize) -> Result<Next> {
        self.disk.require_alive()?;
        let (geometry, flying) = self.live(|live| (live.bits.geometry, live.bits.flying.ones()))?;
        if flying * geometry.block >= FLYING {
            return Ok(Next::Wait);
        }
        let Some((mut blocks, compared)) = self.pick(most as u64)? else { return self.idle() };
        let (at, len) = geometry.bytes_of(blocks.clone());
        let mut bytes = vec![0; len as usize];
        if let Err(e) = self.disk.base.read_at(at, &mut bytes) {
            self.put_back(blocks)?;
            return Err(e);
        }
        // As much as is alike: zeroes travel as their length.
        let mut parts = bytes.chunks(geometry.block as usize).map(is_zero);
        let zero = parts.next().unwrap_or(true);
        let alike = 1 + parts.take_while(|part| *part == zero).count() as u64;
        if blocks.start + alike < blocks.end {
            self.put_back(blocks.start + alike..blocks.end)?;
            blocks.end = blocks.start + alike;
            self.cursor = blocks.end;
        }
        let (at, len) = geometry.bytes_of(blocks.clone());
        bytes.truncate(len as usize);
        let compared = compared && !zero;
        for block in blocks.clone() {
            self.again.remove(&block);
            if let Some(unknown) = &mut self.unknown {
                unknown.clear(block);
            }
        }
        let content = match (zero, compared) {
            (true, _) => Content::Zero,
            (false, true) => Content::Hash(blake3::hash(&bytes).into()),
            (false, false) => {
                self.sent += len;
                Content::Data(bytes)
            }
        };
        self.number += 1;
        self.window.push_back(Sent { number: self.number, blocks, compared });
        Ok(Next::Item(Item { number: self.number, at, len, content }))
    }

    /// There is nothing to send.
    fn idle(&mut self) -> Result<Next> {
        if self.window.is_empty() {
            self.clear()?;
        }
        let Some(tag) = self.held.filter(|_| self.window.is_empty()) else { return Ok(Next::Wait) };
        if !self.announced {
            // From now on the copy may say that it has this, though nobody here hears it.
            self.forget()?;
            self.live(|live| live.also(tag))?;
            self.disk.store_peers()?;
            self.announced = true;
        }
        Ok(Next::Done(tag))
    }

    /// What the peer had before is overwritten by now.
    fn forget(&mut self) -> Result<()> {
        if !self.forgotten {
            self.live(|live| (live.peer.has, live.peer.also) = (None, Vec::new()))?;
            self.disk.store_peers()?;
            self.forgotten = true;
        }
        Ok(())
    }

    /// The copy says that everything up to this item is durable, and which of the ranges that it was asked to compare differ.
    ///
    /// # Errors
    /// It speaks of what it was not sent; what the storage says.
    pub fn acknowledge(&mut self, upto: u64, differing: &[Range]) -> Result<()> {
        let nonsense = |what: &str| {
            Err(Error::Refused(format!(
                "the copy of {} on {} answers for {what}, which it was not sent",
                self.disk.name(),
                self.node
            )))
        };
        if upto > self.number {
            return nonsense(&format!("item {upto}"));
        }
        let ended = self.window.iter().take_while(|sent| sent.number <= upto).count();
        let geometry = self.live(|live| live.bits.geometry)?;
        let mut differ = BTreeSet::new();
        for range in differing {
            let blocks = geometry.blocks_of(range.at, range.len);
            let asked =
                |sent: &Sent| sent.compared && sent.blocks.start <= blocks.start && blocks.end <= sent.blocks.end;
            if blocks.is_empty() || !self.window.iter().take(ended).any(asked) {
                return nonsense(&format!("{} bytes at {}", range.len, range.at));
            }
            differ.extend(blocks);
        }
        let mut cleared = 0;
        for sent in self.window.drain(..ended).collect::<Vec<_>>() {
            self.live(|live| {
                for block in sent.blocks {
                    live.bits.flying.clear(block);
                    if differ.contains(&block) {
                        live.bits.dirty.set(block);
                    } else {
                        cleared += geometry.block;
                    }
                }
            })?;
        }
        self.again.extend(differ);
        self.done += cleared;
        self.uncleared += cleared;
        if self.uncleared >= CLEARED { self.clear() } else { Ok(()) }
    }

    /// What was acknowledged need not be sent again, also after a crash.
    fn clear(&mut self) -> Result<()> {
        if self.uncleared == 0 {
            return Ok(());
        }
        // What the guest wrote and has not flushed was sent like anything else. It must not be lost here and stay there.
        self.disk.flush_content()?;
        self.forget()?;
        self.live(|live| live.bits.store())??;
        self.uncleared = 0;
        Ok(())
    }

    /// The second phase: nothing is merged from now on until this is dropped or done, so what is left is of exactly one state. [`Disk::protect`] was
    /// called before.
    ///
    /// # Errors
    /// The disk is not protected; as [`Disk::merge`], as what was committed is merged first.
    pub fn hold(&mut self) -> Result<()> {
        if !self.disk.is_protected() {
            return Err(Error::Refused(format!(
                "{} is not protected, so its content does not hold still; protect it before the synchronisation ends",
                self.disk.name()
            )));
        }
        // What counts already is to be in what the copy gets: it may be used as soon as it has it.
        loop {
            match self.disk.merge()? {
                Merged::Slices { .. } => {}
                Merged::Nothing => break,
                Merged::Waiting(why) => return Err(Error::Owned(why)),
            }
        }
        self.held = Some(self.disk.hold_base_still()?);
        Ok(())
    }

    /// The copy is in step, durably: the peer has everything up to this tag, and is joined. The log goes on from there.
    ///
    /// # Errors
    /// It is not the tag that it was to have; what the storage says.
    pub fn done(mut self, tag: Tag) -> Result<()> {
        if !self.announced || self.held != Some(tag) {
            return Err(Error::Refused(format!("the synchronisation of {} has not come to its end", self.disk.name())));
        }
        self.live(|live| live.bits.store())??;
        {
            let state = &mut *self.disk.mirroring()?.state();
            if let Some(live) = state.find(&self.node) {
                live.peer = Peer { node: self.node.clone(), has: Some(tag), also: Vec::new(), sync: None, full: false };
                live.lost = None;
            }
        }
        self.disk.store_peers()?;
        self.disk.mirroring()?.state().joined = Some(self.node.clone());
        self.finished = true;
        Ok(())
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let counted = self.live(|live| {
            let bytes = |bits: &Bits| (bits.ones() * live.bits.geometry.block).min(live.bits.geometry.size);
            (bytes(&live.bits.dirty), bytes(&live.bits.flying))
        });
        let (left, flying) = counted.unwrap_or_default();
        Progress { left, flying, done: self.done, sent: self.sent }
    }
}

impl Drop for Sync {
    fn drop(&mut self) {
        // If it cannot be stored it is sent again.
        drop(self.clear());
        if let Ok(mirror) = self.disk.mirroring() {
            let mut state = mirror.state();
            state.busy = None;
            if let Some(live) = state.find(&self.node).filter(|_| !self.finished) {
                live.bits.broke_off();
            }
        }
        if self.held.is_some() {
            self.disk.hold_merging(None);
        }
    }
}

impl Disk {
    /// The peer is in step ([`Plan::InStep`]): from now on what is committed counts as what it has, until [`Disk::leave`].
    ///
    /// # Errors
    /// It is not; what the storage says.
    pub fn join(&self, peer: &PeerState) -> Result<Rejoin> {
        self.require_alive()?;
        let (at, history) = {
            let state = &mut *self.mirroring()?.state();
            let found = self.find(peer, state);
            let (Found::At(at), Plan::InStep) = (&found, self.judge(&found, &peer.node, state)) else {
                return Err(Error::Refused(format!(
                    "the copy of {} on {} is not in step any more",
                    self.name(),
                    peer.node
                )));
            };
            self.know(state, peer, *at)?;
            if let Some(live) = state.find(&peer.node) {
                live.peer = Peer { node: peer.node.clone(), has: Some(*at), also: Vec::new(), sync: None, full: false };
            }
            (*at, state.history.clone())
        };
        self.store_peers()?;
        self.mirroring()?.state().joined = Some(peer.node.clone());
        Ok(Rejoin {
            machine: self.me.machine.clone(),
            from: self.me.node.clone(),
            generation: self.me.generation,
            disk: self.disk_id(),
            size: self.size(),
            at,
            history,
        })
    }

    /// A peer that was not known is known, at this state.
    fn know(&self, state: &mut super::peers::State, peer: &PeerState, at: Tag) -> Result<()> {
        if state.find(&peer.node).is_none() {
            let bits = Bitmap::create(&self.dir, &peer.node, self.disk_id(), self.size(), false)?;
            let peer = Peer { node: peer.node.clone(), has: Some(at), also: Vec::new(), sync: None, full: false };
            state.peers.push(Live { peer, bits, lost: None });
        }
        Ok(())
    }

    /// Begin to synchronise a peer, or go on ([`Plan::Blocks`], [`Plan::Full`]).
    ///
    /// # Errors
    /// The plan is another one; a synchronisation is going on; an earlier process still holds the base; what the storage says.
    pub fn sync(self: &Arc<Self>, peer: &PeerState) -> Result<(Sync, Begin)> {
        self.require_alive()?;
        self.require_base()?;
        let Prepared { keep, number, resumed, unknown, forgotten, history } = self.prepare(peer)?;
        // From here on dropping it puts everything back.
        let sync = Sync {
            disk: self.clone(),
            node: peer.node.clone(),
            number: 0,
            window: VecDeque::new(),
            again: BTreeSet::new(),
            unknown,
            cursor: 0,
            held: None,
            announced: false,
            forgotten,
            uncleared: 0,
            done: 0,
            sent: 0,
            finished: false,
        };
        // Before the copy begins: when it says that it is being synchronised, this disk knows by what.
        self.store_peers()?;
        let begin = Begin {
            machine: self.me.machine.clone(),
            from: self.me.node.clone(),
            generation: self.me.generation,
            disk: self.disk_id(),
            size: self.size(),
            sync: number,
            resumed,
            keep,
            history,
        };
        Ok((sync, begin))
    }

    /// Make the peer's bitmap what the synchronisation begins with.
    fn prepare(&self, peer: &PeerState) -> Result<Prepared> {
        let waiting = self.waiting_ranges();
        let merged = self.merged_at();
        let mut number = [0; 8];
        getrandom::fill(&mut number).map_err(|e| Error::io("drawing a number", std::io::Error::other(e)))?;
        let number = u64::from_le_bytes(number);
        let state = &mut *self.mirroring()?.state();
        if let Some(busy) = state.busy {
            return Err(Error::Refused(format!("{busy} of {} is going on; wait for its end", self.name())));
        }
        let found = self.find(peer, state);
        let plan = self.judge(&found, &peer.node, state);
        let mut prepared = Prepared {
            keep: None,
            number,
            resumed: false,
            unknown: None,
            forgotten: false,
            history: state.history.clone(),
        };
        match (found, plan) {
            (Found::Refused(why), _) => return Err(Error::Refused(why)),
            (Found::Resume(number), _) => {
                (prepared.number, prepared.resumed) = (number, true);
                if let Some(live) = state.find(&peer.node) {
                    prepared.forgotten = live.peer.has.is_none() && live.peer.also.is_empty();
                    prepared.unknown = live.peer.full.then(|| live.bits.dirty.clone());
                }
            }
            (Found::At(tag), Plan::Blocks { .. } | Plan::InStep) => {
                self.know(state, peer, tag)?;
                if let Some(live) = state.find(&peer.node) {
                    // The copy will be at the state of this base: what it has of slices that wait here goes back to that.
                    if merged.is_none_or(|merged| merged.serial < tag.serial) {
                        waiting.iter().for_each(|(at, len)| live.bits.mark(*at, *len));
                    }
                    (live.peer.sync, live.peer.full) = (Some(number), false);
                    live.bits.store()?;
                }
                prepared.keep = Some(tag);
            }
            (found @ (Found::Compare(_) | Found::At(_)), _) => {
                if let Found::At(tag) = found {
                    prepared.keep = Some(tag);
                }
                let bits = Bitmap::create(&self.dir, &peer.node, self.disk_id(), self.size(), true)?;
                prepared.unknown = Some(bits.dirty.clone());
                // Until something was sent it is what it was, if it does not begin at all.
                let before = state.find(&peer.node).map(|live| live.peer.clone());
                let (has, also) = before.map_or((None, Vec::new()), |before| (before.has, before.also));
                let peer = Peer { node: peer.node.clone(), has, also, sync: Some(number), full: true };
                state.peers.retain(|live| live.peer.node != peer.node);
                state.peers.push(Live { peer, bits, lost: None });
            }
        }
        state.busy = Some("a synchronisation");
        state.joined = None;
        Ok(prepared)
    }

    /// The session with the peer is over. What is committed from now on it does not have. Without a session nothing happens.
    pub fn leave(&self) {
        if let Ok(mirror) = self.mirroring() {
            mirror.state().joined = None;
        }
    }
}
