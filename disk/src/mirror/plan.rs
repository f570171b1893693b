//! What a peer needs: its state compared with what this disk knows of it, and of its own history. Decides, does nothing.
//!
//! A peer's content is *known* when it is at a state for which the differences are known: the one that it was last known to have, one that is not merged here
//! yet, or one whose blocks were marked ([`super::record::Peer`]). Content of a state that this disk went through long ago is *old*:
//! compared and overwritten. Everything else was written by somebody of whom this disk knows nothing, and is overwritten only with consent.

use super::peers::{Live, State};
use super::record::on_history;
use super::{PeerState, Plan, Standing};
use crate::disk::Disk;
use crate::error::Result;
use crate::record::Tag;

/// A plan, with what is needed to carry it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// Its content is known to be this, but for blocks that are marked.
    At(Tag),
    /// The synchronisation that was begun goes on.
    Resume(u64),
    /// Compare everything.
    Compare(String),
    /// A sentence.
    Refused(String),
}

/// What this disk is, seen once.
struct Mine {
    merged: Option<Tag>,
    waiting: Vec<Tag>,
    closed: Tag,
}

impl Mine {
    fn known(&self, live: Option<&Live>, tag: Tag) -> bool {
        let recorded = live.is_some_and(|live| live.peer.has == Some(tag) || live.peer.also.contains(&tag));
        recorded || self.merged == Some(tag) || self.waiting.contains(&tag)
    }
}

impl Disk {
    pub(crate) fn find(&self, peer: &PeerState, state: &State) -> Found {
        let (waiting, closed) = self.waiting_states();
        let mine = Mine { merged: self.merged_at(), waiting, closed };
        let name = crate::block::Block::name(self).to_owned();
        let PeerState { node, .. } = peer;
        let refuse = |why: String| Found::Refused(format!("the copy of {name} on {node} {why}"));
        if *node == self.me.node {
            return refuse("is said to be on this node: give the nodes names of their own".into());
        }
        if !peer.machine.is_empty() && peer.machine != self.me.machine {
            return refuse(format!("belongs to the machine {}, not to {}", peer.machine, self.me.machine));
        }
        if peer.generation > self.me.generation {
            return refuse(format!(
                "knows generation {}, and this is {}: the machine ran elsewhere since; stop it here",
                peer.generation, self.me.generation
            ));
        }
        let size = crate::block::Block::size(self);
        if peer.size > size {
            return refuse(format!(
                "has {} bytes, this disk has {size}: make the copy's file or device as large",
                peer.size
            ));
        }
        let consent = peer.discard.as_ref() == Some(&self.me.node);
        let foreign = |what: String| {
            if consent {
                return Found::Compare(format!("{what}; what it has of its own was given up by an administrator"));
            }
            refuse(format!(
                "{what}. It is neither used nor overwritten. If what it has of its own is not needed, say so on {node}: \
                 understudy-disk discard DISK --in-favour-of {}. If it is what is needed, run the machine there",
                self.me.node
            ))
        };
        if let Some(disk) = peer.disk
            && disk != self.disk_id()
        {
            return foreign(format!("was made of another disk ({disk:016x}, this one is {:016x})", self.disk_id()));
        }
        let history = &state.history;
        let old = |tag: Tag| tag.serial <= mine.closed.serial && on_history(history, tag);
        let live = state.peers.iter().find(|live| live.peer.node == *node);
        if let Some(why) = live.and_then(|live| live.lost.as_ref())
            && !matches!(peer.standing, Standing::Ran { .. })
        {
            return Found::Compare(format!("it is not known any more where the copies differ: {why}"));
        }
        let describe = |tag: Tag| format!("slice {} (epoch {}, generation {})", tag.serial, tag.epoch, tag.generation);
        match &peer.standing {
            Standing::Empty => Found::Compare("the copy never had this disk's content".into()),
            Standing::Syncing { from, sync } => match live.and_then(|live| live.peer.sync) {
                Some(ours) if ours == *sync && *from == self.me.node => Found::Resume(ours),
                _ => {
                    Found::Compare(format!("a synchronisation from {from} broke off, of which this disk knows nothing"))
                }
            },
            Standing::Follows { at, sealed } | Standing::Outdated { at, sealed, .. } => {
                let found = sealed.iter().rev().chain([at]).find(|tag| mine.known(live, **tag));
                match found {
                    Some(tag) => Found::At(*tag),
                    None if old(*at) => {
                        Found::Compare(format!("the copy is at {}, which was too long ago", describe(*at)))
                    }
                    None => foreign(format!("has {}, which is not in this disk's history", describe(*at))),
                }
            }
            Standing::Ran { direct, merged, committed, sealed } => {
                let last = committed.last().copied().unwrap_or(*merged);
                if *direct {
                    return foreign("wrote alone, without protection".into());
                }
                // What it committed counted, somewhere.
                let found = sealed.iter().rev().chain([&last]).find(|tag| mine.known(live, **tag));
                match found {
                    Some(tag) if live.is_none_or(|live| live.lost.is_none()) => Found::At(*tag),
                    Some(_) => Found::Compare("it is not known any more where the copies differ".into()),
                    None if old(last) => {
                        Found::Compare(format!("the copy is at {}, which was too long ago", describe(last)))
                    }
                    None => foreign(format!("committed {}, which is not in this disk's history", describe(last))),
                }
            }
        }
    }

    pub(crate) fn judge(&self, found: &Found, node: &str, state: &mut State) -> Plan {
        let live = state.find(node);
        let (marked, total) = match &live {
            Some(live) => (live.bits.bytes(), live.bits.geometry.size),
            None => (0, crate::block::Block::size(self)),
        };
        match found {
            Found::Refused(why) => Plan::Refused { why: why.clone() },
            Found::Compare(why) => Plan::Full { why: why.clone() },
            Found::Resume(_) => Plan::Blocks { bytes: marked },
            Found::At(tag) => {
                // All that counts here it has: so it may be used at any time from the beginning of the session on.
                let complete = self.committed_at().is_some_and(|committed| committed.serial <= tag.serial);
                if complete && marked == 0 && self.is_protected() {
                    return Plan::InStep;
                }
                if marked >= total {
                    return Plan::Full { why: "every block may differ".into() };
                }
                let waiting: u64 = self.waiting_ranges().iter().map(|(_, len)| len).sum();
                Plan::Blocks { bytes: marked.saturating_add(waiting).min(total) }
            }
        }
    }

    /// What a peer needs.
    ///
    /// # Errors
    /// The disk was not opened as a mirrored one; it is not ours any more.
    pub fn plan(&self, peer: &PeerState) -> Result<Plan> {
        self.require_alive()?;
        let state = &mut *self.mirroring()?.state();
        let found = self.find(peer, state);
        Ok(self.judge(&found, &peer.node, state))
    }
}
