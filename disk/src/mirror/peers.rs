//! What a running disk knows of its peers, and how its writes and merges keep that true.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use serde::Serialize;
use understudy_protocol::ids::Epoch;

use super::bitmap::Bitmap;
use super::record::{ALSO, Mirror, Peer, Turn};
use crate::error::Result;
use crate::owner::Ownership;
use crate::record::Tag;
use crate::store::Directory;

/// Cuts that are remembered until they are committed.
const CUTS: usize = 4096;

/// A peer with its bitmap.
pub(crate) struct Live {
    pub peer: Peer,
    pub bits: Bitmap,
    /// Why everything has to be compared: the bitmap was lost.
    pub lost: Option<String>,
}

impl Live {
    /// Slices above this number are not what the peer has.
    pub fn has_serial(&self) -> Option<u64> {
        if self.peer.sync.is_some() { None } else { self.peer.has.map(|tag| tag.serial) }
    }

    pub fn lacks(&self, serial: u64) -> bool {
        self.has_serial().is_none_or(|has| serial > has)
    }

    /// The peer may be at this state too; how it differs is in the bitmap.
    pub fn also(&mut self, tag: Tag) {
        if !self.peer.also.contains(&tag) {
            self.peer.also.push(tag);
        }
        let extra = self.peer.also.len().saturating_sub(ALSO);
        self.peer.also.drain(..extra);
    }
}

/// Of one disk.
pub(crate) struct State {
    pub peers: Vec<Live>,
    pub history: Vec<Turn>,
    /// The peer that is in step.
    pub joined: Option<String>,
    /// Cuts that are not committed.
    pub cuts: VecDeque<(Epoch, Tag)>,
    /// What goes on with a peer's blocks.
    pub busy: Option<&'static str>,
}

impl State {
    pub fn find(&mut self, node: &str) -> Option<&mut Live> {
        self.peers.iter_mut().find(|live| live.peer.node == node)
    }
}

/// Of one disk, shared.
pub(crate) struct Mirroring(Mutex<State>);

/// How mirroring goes.
#[derive(Debug, Clone, Serialize)]
pub struct MirrorStatus {
    /// Peers that are known.
    pub peers: Vec<PeerStatus>,
}

/// How one peer is.
#[derive(Debug, Clone, Serialize)]
pub struct PeerStatus {
    /// Its node.
    pub node: String,
    /// It is in step.
    pub joined: bool,
    /// A synchronisation of it was begun and has not ended.
    pub syncing: bool,
    /// It has everything up to this slice, as far as is known.
    pub has: Option<u64>,
    /// Bytes of blocks that may differ.
    pub differing_bytes: u64,
    /// Why all of it will have to be compared, if so.
    pub lost: Option<String>,
}

impl Mirroring {
    pub fn new(peers: Vec<Live>, history: Vec<Turn>) -> Self {
        let cuts = VecDeque::new();
        Mirroring(Mutex::new(State { peers, history, joined: None, cuts, busy: None }))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Into the record that is about to be written.
    pub fn record(&self, owner: &mut Ownership) {
        if let Some(mirror) = &mut owner.mirror {
            let state = self.state();
            mirror.peers = state.peers.iter().map(|live| live.peer.clone()).collect();
            mirror.history.clone_from(&state.history);
        }
    }

    pub fn before_direct(&self, at: u64, len: u64) -> Result<()> {
        self.state().peers.iter_mut().try_for_each(|live| live.bits.before_direct(at, len).map(drop))
    }

    /// Again: what was sent while it was written is to be sent again.
    pub fn after_direct(&self, at: u64, len: u64) {
        self.state().peers.iter_mut().for_each(|live| live.bits.mark(at, len));
    }

    pub fn cool(&self) -> Result<()> {
        self.state().peers.iter_mut().try_for_each(|live| live.bits.cool())
    }

    /// The pieces of a merge with the slices that they are of.
    pub fn before_merge(&self, pieces: &[(u64, u64, u64)]) -> Result<()> {
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::MergeUnmarked) {
            return Ok(());
        }
        for live in &mut self.state().peers {
            let lacks = pieces.iter().filter(|(serial, ..)| live.lacks(*serial));
            let ranges: Vec<_> = lacks.map(|(_, at, len)| (*at, *len)).collect();
            if !ranges.is_empty() {
                live.bits.before_merge(&ranges)?;
            }
        }
        Ok(())
    }

    pub fn after_merge(&self, slices: &[Tag]) {
        for live in &mut self.state().peers {
            live.bits.written();
            for tag in slices {
                // What was written without protection was never sent.
                if live.lacks(tag.serial) && tag.epoch != Epoch::ZERO {
                    live.also(*tag);
                }
            }
        }
    }

    pub fn merge_ended(&self) {
        self.state().peers.iter_mut().for_each(|live| live.bits.written());
    }

    pub fn cut(&self, epoch: Epoch, tag: Tag) {
        let mut state = self.state();
        if state.cuts.len() >= CUTS {
            state.cuts.pop_front();
        }
        state.cuts.push_back((epoch, tag));
    }

    /// The standby has committed an epoch.
    pub fn commit(&self, epoch: Epoch) {
        let state = &mut *self.state();
        let mut has = None;
        while state.cuts.front().is_some_and(|(cut, _)| *cut <= epoch) {
            has = state.cuts.pop_front().map(|(_, tag)| tag);
        }
        let joined = state.joined.clone();
        if let (Some(tag), Some(live)) = (has, joined.and_then(|node| state.find(&node)))
            && live.peer.has.is_none_or(|before| before.serial < tag.serial)
        {
            live.peer.has = Some(tag);
        }
    }

    pub fn resize(&self, size: u64) -> Result<()> {
        self.state().peers.iter_mut().try_for_each(|live| live.bits.resize(size))
    }

    pub fn try_status(&self) -> Option<MirrorStatus> {
        let state = match self.0.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(state)) => state.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let peer = |live: &Live| PeerStatus {
            node: live.peer.node.clone(),
            joined: state.joined.as_ref() == Some(&live.peer.node),
            syncing: live.peer.sync.is_some(),
            has: live.peer.has.map(|tag| tag.serial),
            differing_bytes: live.bits.bytes(),
            lost: live.lost.clone(),
        };
        Some(MirrorStatus { peers: state.peers.iter().map(peer).collect() })
    }
}

/// The peers of a record, with their bitmaps. One whose bitmap is gone or worthless gets a new one, full of ones.
pub(crate) fn load(dir: &Arc<dyn Directory>, mirror: &Mirror, disk: u64, size: u64) -> Result<Vec<Live>> {
    let mut all = Vec::new();
    for peer in &mirror.peers {
        let mut peer = peer.clone();
        let (bits, lost) = match Bitmap::load(dir, &peer.node, disk, size)? {
            Ok(bits) => (bits, None),
            Err(why) => {
                (peer.has, peer.also, peer.sync) = (None, Vec::new(), None);
                (Bitmap::create(dir, &peer.node, disk, size, true)?, Some(why))
            }
        };
        all.push(Live { peer, bits, lost });
    }
    Ok(all)
}
