//! Opening a disk: who may, what state it is in, and making that state the new owner's.
//!
//! ```text
//!            owner record: generation 7, merged up to slice 40
//!  41-7 sealed, committed ┐
//!  42-7 sealed, committed ├─ a checkpoint that says "slice 43, digest d" ──► kept, renamed to generation 8
//!  43-7 sealed            ┘
//!  44-7 open              ───────────────────────────────────────────────► thrown away
//! ```
//! Three rules, in this order: what the owner record says is merged is not looked at again; what was committed is kept, or the disk is not
//! opened; what a checkpoint says is in the disk is there exactly, or the disk is not opened.
//!
//! The record with the new generation and the names of what is kept is durable before anything is renamed or removed. So a crash in
//! between is a takeover like any other.

use std::sync::Arc;

use crate::block::{Block, Format, SECTOR};
use crate::error::{Doing, Error, Result};
use crate::mirror::bitmap::Bitmap;
use crate::mirror::peers::{self, Live};
use crate::mirror::record::{Mirror, Peer, Role, take_turn};
use crate::owner::{self, BASE_LOCK, Identity, Ownership};
use crate::record::{Scan, SliceId, Standing, Tag, scan};
use crate::slice::{RESCUE, Slice, SliceName};
use crate::store::{Directory, Lock};

/// What the opener knows of the machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// Nothing: the machine boots. The disk is taken as it was last committed.
    None,
    /// It continues from a checkpoint that was captured with this [`Tag`]; the disk must be exactly that.
    Image(Tag),
}

/// What a takeover found and did.
pub(crate) struct Recovered {
    pub owner: Ownership,
    /// Committed and not merged, in order.
    pub slices: Vec<(Arc<Slice>, Scan)>,
    /// Names of slices that were thrown away.
    pub discarded: Vec<String>,
    /// The right to write to the base, unless somebody still has it.
    pub base_lock: Option<Box<dyn Lock>>,
    /// Peers, if the disk is mirrored.
    pub peers: Vec<Live>,
}

/// A slice that counts, as far as names tell.
struct Found {
    name: SliceName,
    file_name: String,
    /// Its writer's successor has accepted it: it is committed whatever stands in it.
    adopted: bool,
}

/// All that is in the directory, sorted into what counts and what does not.
fn survey(dir: &dyn Directory, owner: &Ownership) -> Result<(Vec<Found>, Vec<String>)> {
    let mut live = Vec::new();
    let mut strays = Vec::new();
    for file_name in dir.list().doing(|| format!("listing the slices in {}", dir.name()))? {
        let Some(name) = SliceName::parse(&file_name) else {
            if file_name.strip_suffix(RESCUE).is_some_and(|name| SliceName::parse(name).is_some()) {
                strays.push(file_name);
            }
            continue;
        };
        let accepted = owner.accepted.contains(&file_name);
        let counts = accepted || name.owner == owner.generation;
        if !counts || name.serial <= owner.newest.serial {
            strays.push(file_name);
            continue;
        }
        live.push(Found { name, adopted: accepted || name.owner != name.generation, file_name });
    }
    live.sort_by_key(|found| found.name.serial);
    Ok((live, strays))
}

/// A slice with all that is in it.
pub(crate) struct Examined {
    pub name: SliceName,
    pub file_name: String,
    pub id: SliceId,
    pub file: Arc<dyn crate::store::LogFile>,
    pub scan: Scan,
    pub committed: bool,
}

impl Examined {
    pub fn tag(&self) -> Tag {
        self.scan.digest.tag(self.id)
    }
    pub fn whole(&self) -> bool {
        matches!(self.scan.standing, Standing::Sealed | Standing::Committed)
    }
}

/// Read every slice that counts. `progress` is told names.
pub(crate) fn examine(
    dir: &dyn Directory,
    owner: &Ownership,
    mut progress: impl FnMut(&str),
) -> Result<(Vec<Examined>, Vec<String>)> {
    let (live, mut strays) = survey(dir, owner)?;
    let mut all: Vec<Examined> = Vec::new();
    for found in live {
        progress(&found.file_name);
        let doing = || format!("reading the slice {} in {}", found.file_name, dir.name());
        let id = SliceId {
            disk: owner.disk,
            generation: found.name.generation,
            epoch: found.name.epoch,
            serial: found.name.serial,
        };
        let file = dir.open(&found.file_name).doing(doing)?;
        if file.size().doing(doing)? == 0 {
            // Made, and never written to; its number may have been given again.
            strays.push(found.file_name);
            continue;
        }
        if let Some(other) = all.last().filter(|other| other.name.serial == found.name.serial) {
            let (one, two) = (&other.file_name, &found.file_name);
            return Err(Error::Corrupt {
                what: format!("{one} and {two} in {} both claim to be slice {}", dir.name(), id.serial),
            });
        }
        let scan = scan(&*file, id).doing(doing)?;
        let committed = found.adopted || matches!(scan.standing, Standing::Committed | Standing::Corrupt { .. });
        all.push(Examined { name: found.name, file_name: found.file_name, id, file, scan, committed });
    }
    Ok((all, strays))
}

/// How many of the slices make up the state that is to be opened; an error if that state is not there.
pub(crate) fn decide(dir: &dyn Directory, owner: &Ownership, slices: &[Examined], memory: Memory) -> Result<usize> {
    let committed = slices.iter().rposition(|s| s.committed).map_or(0, |i| i + 1);
    // First what was committed: the tag of a damaged slice would say something else than that it is damaged.
    chain(dir, owner, &slices[..committed])?;
    let disk_at = committed.checked_sub(1).map_or(owner.newest, |i| slices[i].tag());
    let keep = match memory {
        Memory::None => committed,
        Memory::Image(_) if owner.direct => {
            return Err(Error::Refused(format!(
                "the disk in {} was written without protection by {} (generation {}): no checkpoint fits it any more; \
                 the machine can only be booted from it",
                dir.name(),
                owner.node,
                owner.generation
            )));
        }
        Memory::Image(tag) if tag.serial < disk_at.serial => {
            return Err(Error::Refused(format!(
                "the disk in {} is ahead of the checkpoint: it has the committed slice {} (epoch {} of generation {}), the checkpoint \
                 ends with slice {}; a newer checkpoint is somewhere, use that one",
                dir.name(),
                disk_at.serial,
                disk_at.epoch,
                disk_at.generation,
                tag.serial
            )));
        }
        Memory::Image(tag) if tag.serial == disk_at.serial && tag != disk_at => {
            return Err(diverged(dir, tag, disk_at));
        }
        Memory::Image(tag) => {
            let keep = slices.partition_point(|s| s.id.serial <= tag.serial);
            let last = keep.checked_sub(1).map_or(owner.newest, |i| slices[i].tag());
            if last.serial != tag.serial {
                return Err(Error::Corrupt {
                    what: format!(
                        "the slice {} (epoch {} of generation {}), which the checkpoint refers to, is missing in {}",
                        tag.serial,
                        tag.epoch,
                        tag.generation,
                        dir.name()
                    ),
                });
            }
            // Before the digest is compared: a damaged slice has another one.
            if let Some(last) = keep.checked_sub(1).map(|i| &slices[i]).filter(|s| s.whole())
                && last.tag() != tag
            {
                return Err(diverged(dir, tag, last.tag()));
            }
            keep
        }
    };
    chain(dir, owner, &slices[..keep])?;
    Ok(keep)
}

/// Nothing missing, nothing damaged.
pub(crate) fn chain(dir: &dyn Directory, owner: &Ownership, slices: &[Examined]) -> Result<()> {
    let mut expected = owner.newest.serial;
    for slice in slices {
        expected += 1;
        if slice.id.serial != expected {
            return Err(Error::Corrupt {
                what: format!("slice {expected} is missing in {}, and slice {} is there", dir.name(), slice.id.serial),
            });
        }
        match &slice.scan.standing {
            Standing::Sealed | Standing::Committed => {}
            Standing::Open { ends: what } | Standing::Corrupt { what } => {
                return Err(Error::Corrupt { what: format!("in {}/{}: {what}", dir.name(), slice.file_name) });
            }
        }
    }
    Ok(())
}

fn diverged(dir: &dyn Directory, wants: Tag, has: Tag) -> Error {
    Error::Refused(format!(
        "the disk in {} and the checkpoint have different histories: slice {} is epoch {} of generation {} (digest {:08x}) on the disk and \
         epoch {} of generation {} (digest {:08x}) in the checkpoint; do not run the machine from this pair",
        dir.name(),
        wants.serial,
        has.epoch,
        has.generation,
        has.digest,
        wants.epoch,
        wants.generation,
        wants.digest
    ))
}

/// Whether `me` may have it, going by the record alone.
fn admit(disk: &str, owner: &Ownership, me: &Identity, alone: bool) -> Result<()> {
    if !owner.machine.is_empty() && owner.machine != me.machine {
        return Err(Error::Owned(format!(
            "{disk} belongs to the machine {} (last on {}, generation {}), not to {}; if that machine is gone for good: \
             understudy-disk release",
            owner.machine, owner.node, owner.generation, me.machine
        )));
    }
    if owner.machine.is_empty() {
        return Ok(());
    }
    if owner.generation > me.generation {
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::IgnoreGeneration) {
            return Ok(());
        }
        return Err(Error::Superseded {
            disk: disk.to_owned(),
            node: owner.node.clone(),
            theirs: owner.generation,
            ours: me.generation,
        });
    }
    if owner.generation == me.generation && owner.node != me.node {
        return Err(Error::Owned(format!(
            "{disk} is owned by {} on {} in the same generation {}: two nodes were given one generation, and the first one keeps it",
            owner.machine, owner.node, owner.generation
        )));
    }
    if owner.generation == me.generation && !alone {
        return Err(Error::Owned(format!(
            "{disk} is in use by {} on {} (generation {}): its process still runs, and a second one would destroy the disk",
            owner.machine, owner.node, owner.generation
        )));
    }
    Ok(())
}

/// A copy that is part this and part that, or known to be old, is not run from.
pub(crate) fn usable(dir: &dyn Directory, owner: &Ownership) -> Result<()> {
    #[cfg(test)]
    if crate::sim::sabotaged(crate::sim::Sabotage::UseUnfinished) {
        return Ok(());
    }
    match owner.mirror.as_ref().map(|mirror| &mirror.role) {
        Some(Role::Syncing { from, .. }) => Err(Error::Refused(format!(
            "the copy in {} is being synchronised from {from} and is not complete: it is part old and part new, and no machine can run from it. \
             Run the machine on {from}, and let the synchronisation end; if {from}'s disk is lost, restore this one from a backup",
            dir.name()
        ))),
        Some(Role::Outdated { of, by }) => Err(Error::Refused(format!(
            "the copy in {} is outdated: {by} said that the machine went on without it; it followed {of}. Run the machine where it ran last, and \
             this copy is synchronised from there; if that disk is lost and this old state is to be used: understudy-disk outdate --clear",
            dir.name()
        ))),
        _ => Ok(()),
    }
}

/// What a mirrored disk remembers of others when its machine begins to run from it.
fn mirror(
    dir: &Arc<dyn Directory>,
    before: &Ownership,
    discarded: &[Examined],
    me: &Identity,
    size: u64,
    kept: Tag,
) -> Result<(Mirror, Vec<Live>)> {
    let mut mirror = before.mirror.clone().unwrap_or_else(|| {
        let mut history = Vec::new();
        take_turn(&mut history, before.newest.generation, before.newest.serial);
        Mirror { role: Role::Ran, history, peers: Vec::new(), discard: None }
    });
    let peers = match &mirror.role {
        // It sent what is here, so it has it. Nothing was written here meanwhile but what it sent.
        Role::Follows { of } | Role::Outdated { of, .. } => {
            let peer = Peer { node: of.clone(), has: Some(kept), also: Vec::new(), sync: None, full: false };
            vec![Live { bits: Bitmap::create(dir, of, before.disk, size, false)?, peer, lost: None }]
        }
        Role::Ran | Role::Syncing { .. } => {
            let mut peers = peers::load(dir, &mirror, before.disk, size)?;
            // A peer may have (and have merged) what was sealed here and does not count.
            for slice in discarded.iter().filter(|slice| slice.whole()) {
                let records = &slice.scan.records;
                for live in &mut peers {
                    let ranges =
                        records.iter().map(|(record, _)| (record.sector * SECTOR, u64::from(record.sectors) * SECTOR));
                    live.bits.mark_durably(ranges)?;
                    live.also(slice.tag());
                }
            }
            peers
        }
    };
    take_turn(&mut mirror.history, me.generation, kept.serial + 1);
    mirror.role = Role::Ran;
    mirror.discard = None;
    mirror.peers = peers.iter().map(|live| live.peer.clone()).collect();
    Ok((mirror, peers))
}

/// Take the disk over.
pub(crate) fn take(
    base: &dyn Block,
    dir: &Arc<dyn Directory>,
    format: Format,
    me: &Identity,
    memory: Memory,
    mirrored: bool,
) -> Result<Recovered> {
    let shared = dir;
    let dir = &**dir;
    if me.machine.is_empty() || me.node.is_empty() || me.generation.0 == 0 {
        return Err(Error::Refused("a disk is opened by a machine on a node in a generation above zero".into()));
    }
    let disk = base.name();
    let claim = owner::claim(dir)?;
    let base_lock =
        dir.lock(BASE_LOCK, std::time::Duration::ZERO).doing(|| format!("locking {} in {}", BASE_LOCK, dir.name()))?;
    let alone = base_lock.is_some();
    let before = match Ownership::load(dir)? {
        Some(owner) => owner,
        None => {
            let names = dir.list().doing(|| format!("listing {}", dir.name()))?;
            if let Some(slice) = names.iter().find(|name| SliceName::parse(name).is_some()) {
                return Err(Error::Corrupt {
                    what: format!("{} has slices ({slice}) and no record of whose disk it is", dir.name()),
                });
            }
            if let Memory::Image(tag) = memory
                && tag.serial != 0
            {
                return Err(Error::Corrupt {
                    what: format!(
                        "{} knows nothing of slice {}, which the checkpoint refers to",
                        dir.name(),
                        tag.serial
                    ),
                });
            }
            let mut id = [0; 8];
            getrandom::fill(&mut id).map_err(|e| Error::io("drawing an id for the disk", std::io::Error::other(e)))?;
            // As if released: nobody's yet.
            let nobody = Identity { machine: String::new(), ..me.clone() };
            Ownership::fresh(u64::from_le_bytes(id), &nobody, disk, format, base.size())
        }
    };
    admit(disk, &before, me, alone)?;
    if !alone && (before.direct || memory == Memory::None || before.machine.is_empty()) {
        return Err(Error::Owned(format!(
            "{disk} is in use by {} on {} (generation {}): a process there still holds it; it must end, or its node be fenced, before \
             the machine can boot here",
            if before.machine.is_empty() { "somebody" } else { &before.machine },
            before.node,
            before.generation
        )));
    }
    if before.format != format {
        return Err(Error::Refused(format!("{disk} is to be opened as {format} and was made as {}", before.format)));
    }
    if base.size() < before.size {
        return Err(Error::Shrank { path: disk.to_owned(), was: before.size, is: base.size() });
    }
    usable(dir, &before)?;
    let (mut slices, strays) = examine(dir, &before, |_| {})?;
    let keep = decide(dir, &before, &slices, memory)?;
    let discarded: Vec<_> = slices.drain(keep..).collect();
    let kept = slices.last().map_or(before.newest, Examined::tag);
    let (mirror, peers) = match &before.mirror {
        _ if mirrored => {
            let (mirror, peers) = mirror(shared, &before, &discarded, me, base.size(), kept)?;
            (Some(mirror), peers)
        }
        // Not mirrored any more: what peers have is not kept account of.
        Some(mirror) => {
            let mut mirror = Mirror { role: Role::Ran, peers: Vec::new(), ..mirror.clone() };
            take_turn(&mut mirror.history, me.generation, kept.serial + 1);
            (Some(mirror), Vec::new())
        }
        None => (None, Vec::new()),
    };
    let discarded: Vec<_> = discarded.into_iter().map(|s| s.file_name).collect();

    let mut owner = Ownership {
        machine: me.machine.clone(),
        node: me.node.clone(),
        generation: me.generation,
        base: disk.to_owned(),
        size: base.size(),
        // Nothing to merge and nobody else there: a machine that boots writes the base at once, without slices. After a takeover that waits:
        // the checkpoint can be tried again as long as nothing was committed since.
        direct: memory == Memory::None && keep == 0,
        accepted: slices.iter().map(|s| s.file_name.clone()).collect(),
        mirror,
        ..before
    };
    // Direct writes are a state of their own, that no older tag names.
    if owner.direct {
        owner.newest = Tag {
            serial: owner.newest.serial + 1,
            generation: me.generation,
            epoch: Default::default(),
            records: 0,
            digest: 0,
        };
    }
    owner.store(dir, &claim)?;

    for slice in &mut slices {
        let name = SliceName { owner: me.generation, ..slice.name };
        if name != slice.name {
            dir.rename(&slice.file_name, &name.to_string())
                .doing(|| format!("taking over the slice {} in {}", slice.file_name, dir.name()))?;
            slice.name = name;
        }
    }
    for name in strays.iter().chain(&discarded) {
        match dir.remove(name) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("throwing away the slice {name} in {}", dir.name()), e));
            }
            _ => {}
        }
    }
    dir.sync().doing(|| format!("flushing the directory {}", dir.name()))?;
    drop(claim);
    let slices =
        slices.into_iter().map(|s| (Arc::new(Slice::found(s.id, s.name, s.file, &s.scan, true)), s.scan)).collect();
    Ok(Recovered { owner, slices, discarded, base_lock, peers })
}
