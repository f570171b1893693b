//! The primary's side of mirrored disks: what the copies on another node need goes into the disk arena, from which the replicator sends it.
//!
//! ```text
//!  begin(states)   plan ─► syncing ─ parts, acknowledgements ─┐    while the machine runs unprotected
//!  hold()          protection begins: what is left is of that instant
//!                  syncing ─ done(tag) ─► joined ◄────────────┘    the log is read from there on
//!  log()           slices while they are written; after a seal: to the end of the epoch
//!  leave()         the session is over: what is committed from now on the copies do not have
//! ```

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use understudy_disk::mirror::{Begin, Content, LogReader, Next, PeerState, Plan, Range, Sync};
use understudy_disk::{Disk, Tag};
use understudy_protocol::control::{MirrorBegun, MirrorDurable, MirrorPiece, MirrorPieces, MirrorWhat};

/// Bytes of the disk arena.
const ARENA: u64 = 2 << 20;
/// Most bytes of one piece: it goes into one message.
const PIECE: usize = 512 << 10;
/// Most pieces of one reply.
const PIECES: usize = 256;

enum Peer {
    Syncing(Sync),
    /// It has everything up to this tag; that was not confirmed.
    Stepping(Sync, Tag),
    Joined(LogReader),
}

struct Mirrored {
    name: String,
    disk: Arc<Disk>,
    peer: Peer,
    /// The log is read up to this slice: what is beyond is another epoch's.
    upto: u64,
}

/// The copies of one session, in the order of the machine's mirrored disks.
pub struct Mirrors {
    all: Vec<Mirrored>,
    arena: File,
}

/// Puts bytes into the arena, one piece behind the other.
struct Room<'a> {
    arena: &'a File,
    used: u64,
}

impl Room<'_> {
    fn left(&self) -> usize {
        usize::try_from(ARENA - self.used).unwrap_or(0)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.used;
        self.arena.write_all_at(bytes, at).context("no room for the disk arena: free memory or enlarge the tmpfs")?;
        self.used += bytes.len() as u64;
        Ok(at)
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(value).context("what is said of a mirrored disk cannot be written down")
}

impl Mirrors {
    /// Begin with copies that are like this. `disks` with their names.
    pub fn begin(disks: Vec<(String, Arc<Disk>)>, states: &[Value], arena: &Path) -> Result<(Self, MirrorBegun)> {
        ensure!(
            disks.len() == states.len(),
            "the machine has {} mirrored disks, and the standby speaks of {}",
            disks.len(),
            states.len()
        );
        let arena = arena_file(arena)?;
        let (mut all, mut begun) = (Vec::new(), MirrorBegun { begins: Vec::new(), left: 0 });
        for ((name, disk), state) in disks.into_iter().zip(states) {
            let state = PeerState::deserialize(state).context("what a copy says of itself is not understood")?;
            let (sync, begin) = start(&disk, &state).with_context(|| format!("disk {name}"))?;
            begun.begins.push(to_json(&begin)?);
            begun.left += sync.progress().left;
            all.push(Mirrored { name, disk, peer: Peer::Syncing(sync), upto: 0 });
        }
        Ok((Self { all, arena }, begun))
    }

    /// Protection has begun: what is left is of this instant.
    pub fn hold(&mut self) -> Result<()> {
        for mirrored in &mut self.all {
            if let Peer::Syncing(sync) = &mut mirrored.peer {
                sync.hold().with_context(|| format!("disk {}", mirrored.name))?;
            }
        }
        Ok(())
    }

    /// The next parts for copies that are not in step.
    pub fn read(&mut self) -> Result<MirrorPieces> {
        let mut room = Room { arena: &self.arena, used: 0 };
        let mut reply = MirrorPieces::default();
        for (i, mirrored) in self.all.iter_mut().enumerate() {
            let mut done = None;
            let Peer::Syncing(sync) = &mut mirrored.peer else { continue };
            while reply.pieces.len() < PIECES && room.left() >= PIECE {
                let next = sync.next(PIECE).with_context(|| format!("disk {}", mirrored.name))?;
                let item = match next {
                    Next::Item(item) => item,
                    Next::Wait => break,
                    Next::Done(tag) => {
                        done = Some(tag);
                        break;
                    }
                };
                let (bytes, hash): (&[u8], bool) = match &item.content {
                    Content::Data(bytes) => (bytes, false),
                    Content::Zero => (&[], false),
                    Content::Hash(hash) => (hash, true),
                };
                let what = MirrorWhat::Part { number: item.number, at: item.at, len: item.len, hash };
                let offset = room.put(bytes)?;
                reply.pieces.push(MirrorPiece { disk: i as u16, what, offset, bytes: bytes.len() as u64 });
            }
            let progress = sync.progress();
            reply.left += progress.left;
            reply.flying += progress.flying;
            if let Some(tag) = done {
                mirrored.step(tag);
            }
        }
        let in_step = |mirrored: &Mirrored| match &mirrored.peer {
            Peer::Syncing(_) => None,
            Peer::Stepping(_, tag) => Some(to_json(tag)),
            Peer::Joined(_) => None,
        };
        let in_step: Option<Vec<Result<Value>>> = self.all.iter().map(in_step).collect();
        reply.in_step = in_step.map(|tags| tags.into_iter().collect()).transpose()?;
        Ok(reply)
    }

    /// What the copies say of the parts that they were sent.
    pub fn durable(&mut self, copies: &[MirrorDurable]) -> Result<()> {
        for (mirrored, copy) in self.all.iter_mut().zip(copies) {
            if let Peer::Syncing(sync) = &mut mirrored.peer
                && copy.upto > 0
            {
                let differing: Vec<Range> =
                    copy.differing.iter().map(|(at, len)| Range { at: *at, len: *len }).collect();
                sync.acknowledge(copy.upto, &differing).with_context(|| format!("disk {}", mirrored.name))?;
            }
        }
        Ok(())
    }

    /// All of them have confirmed that they are in step.
    pub fn done(&mut self) -> Result<()> {
        let mut all = Vec::new();
        for Mirrored { name, disk, peer, upto } in std::mem::take(&mut self.all) {
            let peer = match peer {
                Peer::Stepping(sync, tag) => {
                    sync.done(tag).with_context(|| format!("disk {name}"))?;
                    Peer::Joined(LogReader::new(tag))
                }
                Peer::Syncing(_) => bail!("disk {name}: its copy is not in step yet"),
                joined => joined,
            };
            all.push(Mirrored { name, disk, peer, upto });
        }
        self.all = all;
        Ok(())
    }

    /// The disks are sealed up to these tags.
    pub fn sealed(&mut self, tags: &[Tag]) {
        self.all.iter_mut().zip(tags).for_each(|(mirrored, tag)| mirrored.upto = tag.serial);
    }

    /// What of the slices was not read yet, up to what is sealed.
    pub fn log(&mut self) -> Result<MirrorPieces> {
        let mut room = Room { arena: &self.arena, used: 0 };
        let mut reply = MirrorPieces::default();
        for (i, mirrored) in self.all.iter_mut().enumerate() {
            let Peer::Joined(reader) = &mut mirrored.peer else { continue };
            while reader.after < mirrored.upto && reply.pieces.len() < PIECES && room.left() >= PIECE {
                let next = reader.next(&mirrored.disk, PIECE).with_context(|| format!("disk {}", mirrored.name))?;
                let Some(piece) = next else { break };
                let closed = piece.closed.as_ref().map(to_json).transpose()?;
                let what = MirrorWhat::Log {
                    serial: piece.slice.serial,
                    generation: piece.slice.generation,
                    epoch: piece.slice.epoch,
                    at: piece.offset,
                    closed,
                };
                let offset = room.put(&piece.bytes)?;
                reply.pieces.push(MirrorPiece { disk: i as u16, what, offset, bytes: piece.bytes.len() as u64 });
            }
        }
        Ok(reply)
    }

    /// The session with the copies is over.
    pub fn leave(self) {
        for Mirrored { disk, peer, .. } in self.all {
            drop(peer);
            disk.leave();
        }
    }
}

impl Mirrored {
    fn step(&mut self, tag: Tag) {
        // (The reader stands in for a moment only.)
        if let Peer::Syncing(sync) = std::mem::replace(&mut self.peer, Peer::Joined(LogReader::new(tag))) {
            self.peer = Peer::Stepping(sync, tag);
        }
    }
}

fn start(disk: &Arc<Disk>, state: &PeerState) -> Result<(Sync, Begin)> {
    match disk.plan(state)? {
        Plan::Refused { why } => bail!(why),
        Plan::Full { why } => {
            eprintln!("note: {} is copied whole to {}: {why}", understudy_disk::Block::name(&**disk), state.node);
        }
        Plan::Blocks { .. } => {}
        // Only a protected disk says that.
        Plan::InStep => bail!("the copy on {} is in step already", state.node),
    }
    Ok(disk.sync(state)?)
}

fn arena_file(path: &Path) -> Result<File> {
    let file = crate::memory::private_file(path, "disk arena")?;
    file.set_len(ARENA).with_context(|| format!("cannot make the disk arena {}", path.display()))?;
    Ok(file)
}
