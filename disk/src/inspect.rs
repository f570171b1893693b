//! What an administrator does with a disk whose machine does not run: look, merge, resize, release. `understudy-disk` is made of this.
//!
//! Looking takes no lock and changes nothing, so what it says of a running machine's disk may be of a moment ago. Everything else takes both locks
//! first and leaves the generation alone: it acts in its owner's place, not as a new one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use understudy_protocol::ids::{Epoch, Generation};

use crate::block::{Block, Format, SECTOR, open};
use crate::error::{Doing, Error, Result};
use crate::index::{Index, Piece, Source as IndexSource};
use crate::mirror::bitmap;
use crate::mirror::record::{Mirror, Role, Turn};
use crate::owner::{self, BASE_LOCK, Claim, Ownership};
use crate::record::{Kind, Standing, scan};
use crate::recover::{self, Examined, Memory};
use crate::store::{Directory, LocalDirectory, Lock};

/// What is there.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The base.
    pub disk: String,
    /// Its format.
    pub format: Format,
    /// Its bytes.
    pub size: u64,
    /// Whose it is; `None`: it was never claimed.
    pub owner: Option<Ownership>,
    /// A process holds it.
    pub held: bool,
    /// What is not merged.
    pub slices: Vec<SliceReport>,
    /// Bytes of that.
    pub waiting: u64,
    /// Files that do not count.
    pub strays: Vec<String>,
    /// What would keep the machine from booting from it.
    pub problem: Option<String>,
    /// What a mirrored disk's peers may lack.
    pub peers: Vec<PeerReport>,
}

/// One peer of a mirrored disk.
#[derive(Debug, Clone, Serialize)]
pub struct PeerReport {
    /// Its node.
    pub node: String,
    /// It has everything up to this slice, and all that is not in `differing`; `None`: not known.
    pub has: Option<u64>,
    /// A synchronisation of it was begun and has not ended.
    pub syncing: bool,
    /// Bytes of blocks that may differ, beside those in slices; `None`: not known, so everything will be compared.
    pub differing: Option<u64>,
}

fn peers(dir: &dyn Directory, owner: &Ownership) -> Result<Vec<PeerReport>> {
    let mut all = Vec::new();
    for peer in owner.mirror.iter().flat_map(|mirror| &mirror.peers) {
        let bytes = bitmap::load_file(dir, &peer.node).doing(|| format!("reading the bitmap of {}", peer.node))?;
        let read = bytes.and_then(|bytes| bitmap::summary(&bytes, owner.disk).ok());
        all.push(PeerReport {
            node: peer.node.clone(),
            has: peer.has.map(|tag| tag.serial),
            syncing: peer.sync.is_some(),
            differing: read.map(|(geometry, blocks, _)| blocks.saturating_mul(geometry.block).min(geometry.size)),
        });
    }
    Ok(all)
}

/// One slice.
#[derive(Debug, Clone, Serialize)]
pub struct SliceReport {
    /// Its number.
    pub serial: u64,
    /// Who wrote it.
    pub generation: Generation,
    /// Its epoch; 0: written while the machine was not protected.
    pub epoch: Epoch,
    /// Bytes of log.
    pub bytes: u64,
    /// Requests in it.
    pub records: u32,
    /// `committed`, `sealed` (whether it counts depends on the standby's checkpoint), `open: …`, `corrupt: …`.
    pub standing: String,
}

fn report(slice: &Examined) -> SliceReport {
    let standing = match &slice.scan.standing {
        Standing::Corrupt { what } => format!("corrupt: {what}"),
        Standing::Open { ends } => format!("open: {ends}"),
        _ if slice.committed => "committed".into(),
        _ => "sealed".into(),
    };
    SliceReport {
        serial: slice.id.serial,
        generation: slice.id.generation,
        epoch: slice.id.epoch,
        bytes: slice.scan.end,
        records: slice.scan.digest.records(),
        standing,
    }
}

/// Look at a disk. `progress` is told the name of each slice that is read.
///
/// # Errors
/// The disk or its slices cannot be read. What is wrong *in* them is said in the result.
pub fn inspect(disk: &Path, format: Format, slices: &Path, progress: impl FnMut(&str)) -> Result<Inspection> {
    let base = open(disk, format, true)?;
    let mut inspection = Inspection {
        disk: base.name().to_owned(),
        format,
        size: base.size(),
        owner: None,
        held: false,
        slices: Vec::new(),
        waiting: 0,
        strays: Vec::new(),
        problem: None,
        peers: Vec::new(),
    };
    if !slices.exists() {
        return Ok(inspection);
    }
    let dir = LocalDirectory::look(slices).doing(|| format!("looking into {}", slices.display()))?;
    let owner = match Ownership::load(&dir) {
        Ok(Some(owner)) => owner,
        Ok(None) => return Ok(inspection),
        Err(e) => {
            inspection.problem = Some(e.to_string());
            return Ok(inspection);
        }
    };
    // Taken for a moment, to see whether another has it. A disk that may only be read shows nothing.
    inspection.held = dir.lock(BASE_LOCK, Duration::ZERO).is_ok_and(|lock| lock.is_none());
    if owner.size > base.size() {
        let was = owner.size;
        inspection.problem = Some(Error::Shrank { path: inspection.disk.clone(), was, is: base.size() }.to_string());
    }
    inspection.peers = peers(&dir, &owner)?;
    if let Err(e) = recover::usable(&dir, &owner) {
        inspection.problem.get_or_insert(e.to_string());
    }
    match recover::examine(&dir, &owner, progress) {
        Ok((found, strays)) => {
            if let Err(e) = recover::decide(&dir, &owner, &found, Memory::None) {
                inspection.problem.get_or_insert(e.to_string());
            }
            inspection.slices = found.iter().map(report).collect();
            inspection.waiting = inspection.slices.iter().map(|s| s.bytes).sum();
            inspection.strays = strays;
        }
        Err(e) => {
            inspection.problem.get_or_insert(e.to_string());
        }
    }
    inspection.owner = Some(owner);
    Ok(inspection)
}

/// A disk that nobody uses, for as long as this is held.
pub struct Still {
    /// The base, as far as it is merged.
    pub base: Arc<dyn Block>,
    dir: LocalDirectory,
    owner: Ownership,
    claim: Claim,
    _lock: Box<dyn Lock>,
}

/// Make sure that nobody uses it. `None`: it was never claimed.
fn still(base: Option<Arc<dyn Block>>, slices: &Path) -> Result<Option<Still>> {
    if !slices.exists() {
        return Ok(None);
    }
    let dir = LocalDirectory::make(slices).doing(|| format!("opening {}", slices.display()))?;
    let claim = owner::claim(&dir)?;
    let Some(owner) = Ownership::load(&dir)? else { return Ok(None) };
    let lock = dir.lock(BASE_LOCK, Duration::ZERO).doing(|| format!("locking {BASE_LOCK} in {}", dir.name()))?;
    let Some(lock) = lock else {
        return Err(Error::Owned(format!(
            "{} is in use by {} on {} (generation {}): stop the machine first",
            owner.base, owner.machine, owner.node, owner.generation
        )));
    };
    let base = match base {
        Some(base) => base,
        None => open(Path::new(&owner.base), owner.format, true)?,
    };
    if base.size() < owner.size {
        return Err(Error::Shrank { path: base.name().to_owned(), was: owner.size, is: base.size() });
    }
    Ok(Some(Still { base, dir, owner, claim, _lock: lock }))
}

impl Still {
    /// Slices that count and are committed.
    fn committed(&self) -> Result<Vec<Examined>> {
        let (mut slices, _) = recover::examine(&self.dir, &self.owner, |_| {})?;
        let keep = recover::decide(&self.dir, &self.owner, &slices, Memory::None)?;
        slices.truncate(keep);
        Ok(slices)
    }

    /// The disk is more than the base.
    fn refuse_waiting(&self, what: &str) -> Result<()> {
        let (slices, _) = recover::examine(&self.dir, &self.owner, |_| {})?;
        if slices.is_empty() {
            return Ok(());
        }
        let committed = self.committed()?.len();
        let advice = if committed == slices.len() {
            "merge them first (understudy-disk merge)"
        } else {
            "some are not committed, and whether they count is known to the standby's checkpoint: start the machine once, or merge what is \
             committed (understudy-disk merge) and give up the rest by booting it"
        };
        Err(Error::Refused(format!(
            "{} has {} slices that are not merged, so {what} would lose them: {advice}",
            self.base.name(),
            slices.len()
        )))
    }
}

/// Merge all committed slices. Slices that are not committed stay. Returns how many were merged. `progress` is told bytes, of so many.
///
/// # Errors
/// A process holds the disk; a slice is damaged; what the storage says. It may be repeated.
pub fn merge(disk: &Path, format: Format, slices: &Path, mut progress: impl FnMut(u64, u64)) -> Result<usize> {
    let base = open(disk, format, false)?;
    let Some(mut still) = still(Some(base), slices)? else { return Ok(0) };
    still.base.take_charge()?;
    let found = still.committed()?;
    let of = found.iter().map(|s| s.scan.end).sum();
    let mut done = 0;
    for slice in &found {
        let doing = || format!("reading the slice {} in {}", slice.file_name, still.dir.name());
        for (record, data) in &slice.scan.records {
            let (at, len) = (record.sector * SECTOR, u64::from(record.sectors) * SECTOR);
            if at + len > still.base.size() {
                let (path, is) = (still.base.name().to_owned(), still.base.size());
                return Err(Error::Shrank { path, was: at + len, is });
            }
            match record.kind {
                Kind::Data => {
                    let mut bytes = vec![0; len as usize];
                    let got = slice.file.read_at(*data, &mut bytes).doing(doing)?;
                    if got != bytes.len() || crc32fast::hash(&bytes) != record.crc {
                        return Err(Error::Corrupt { what: format!("{}: it changed while it was read", doing()) });
                    }
                    still.base.write_at(at, &bytes)?;
                }
                Kind::Zero | Kind::Discard => still.base.write_zeroes(at, len, record.kind == Kind::Discard)?,
                Kind::Seal | Kind::Commit => {}
            }
            done += crate::record::RECORD as u64 + record.data_len();
            progress(done, of);
        }
    }
    still.base.flush()?;
    if let Some(last) = found.last() {
        still.owner.newest =
            scan(&*last.file, last.id).doing(|| format!("reading {}", last.file_name))?.digest.tag(last.id);
        still.owner.size = still.base.size();
        still.owner.store(&still.dir, &still.claim)?;
    }
    for slice in &found {
        let name = &slice.file_name;
        still.dir.remove(name).doing(|| format!("removing the merged slice {name} in {}", still.dir.name()))?;
    }
    Ok(found.len())
}

/// Open a disk for copying: it is complete, and stays as it is until this is dropped.
///
/// # Errors
/// A process holds it; slices wait to be merged.
pub fn source(disk: &Path, format: Format, slices: &Path) -> Result<Source> {
    let base = open(disk, format, true)?;
    let still = still(Some(base.clone()), slices)?;
    if let Some(still) = &still {
        still.refuse_waiting("copying the disk without them")?;
    }
    Ok(Source { base, _still: still })
}

/// See [`source`].
pub struct Source {
    /// To be read.
    pub base: Arc<dyn Block>,
    _still: Option<Still>,
}

/// Enlarge a disk. Returns the size before.
///
/// # Errors
/// It would shrink; a process holds it; what the storage says.
pub fn resize(disk: &Path, format: Format, slices: &Path, size: u64) -> Result<u64> {
    let base = open(disk, format, false)?;
    let was = base.size();
    if size < was {
        return Err(Error::Refused(format!(
            "{} has {was} bytes; making it {size} would lose what is behind, and a guest that has not made its file systems smaller would \
             lose all. Nothing was done",
            base.name()
        )));
    }
    let still = still(Some(base.clone()), slices)?;
    base.take_charge()?;
    base.resize(size)?;
    if let Some(mut still) = still {
        still.owner.size = size;
        still.owner.store(&still.dir, &still.claim)?;
    }
    Ok(was)
}

/// The disk belongs to no machine any more.
///
/// # Errors
/// It belongs to another machine than was said; a process holds it; slices wait.
pub fn release(slices: &Path, machine: &str) -> Result<()> {
    let Some(mut still) = still(None, slices)? else {
        return Err(Error::Refused(format!("nobody has claimed the disk of {}", slices.display())));
    };
    if still.owner.machine != machine {
        return Err(Error::Refused(format!(
            "{} belongs to {:?}, not to {machine:?}; nothing was done",
            still.owner.base, still.owner.machine
        )));
    }
    still.refuse_waiting("releasing it")?;
    still.owner.machine = String::new();
    still.owner.store(&still.dir, &still.claim)
}

/// What this copy wrote alone may be overwritten by another node's disk, once.
///
/// # Errors
/// It was never claimed, or a process holds it.
pub fn discard(slices: &Path, in_favour_of: &str) -> Result<()> {
    let Some(mut still) = still(None, slices)? else {
        return Err(Error::Refused(format!(
            "nobody has claimed the disk of {}: there is nothing to give up",
            slices.display()
        )));
    };
    if still.owner.node == in_favour_of {
        return Err(Error::Refused(format!(
            "{} is {in_favour_of}'s own copy: say the node whose disk is to overwrite it; nothing was done",
            still.owner.base
        )));
    }
    let newest = still.owner.newest;
    let mirror = still.owner.mirror.get_or_insert_with(|| {
        let history = vec![Turn { generation: newest.generation, from: newest.serial }];
        Mirror { role: Role::Ran, history, peers: Vec::new(), discard: None }
    });
    mirror.discard = Some(in_favour_of.to_owned());
    still.owner.store(&still.dir, &still.claim)
}

/// Set or clear the mark that a copy is outdated. Clearing it means: this old state is what is wanted.
///
/// # Errors
/// It is nobody's copy, or is incomplete; a process holds it.
pub fn outdate(slices: &Path, by: Option<&str>) -> Result<()> {
    let Some(mut still) = still(None, slices)? else {
        return Err(Error::Refused(format!("nobody has claimed the disk of {}", slices.display())));
    };
    let role = still.owner.mirror.as_ref().map(|mirror| mirror.role.clone());
    let role = match (role, by) {
        (Some(Role::Follows { of }), Some(by)) => Role::Outdated { of, by: by.to_owned() },
        (Some(Role::Outdated { of, .. }), None) => Role::Follows { of },
        (Some(Role::Follows { .. }), None) | (Some(Role::Outdated { .. }), Some(_)) => return Ok(()),
        (Some(Role::Syncing { from, .. }), _) => {
            return Err(Error::Refused(format!(
                "{} is being synchronised from {from} and is not complete: no mark makes it usable or less so",
                still.owner.base
            )));
        }
        (Some(Role::Ran) | None, _) => {
            return Err(Error::Refused(format!(
                "the machine ran from {} last, so it is nobody's copy; nothing was done",
                still.owner.base
            )));
        }
    };
    if let Some(mirror) = &mut still.owner.mirror {
        mirror.role = role;
    }
    still.owner.store(&still.dir, &still.claim)
}

/// What [`compare`] found.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Bytes compared.
    pub bytes: u64,
    /// Bytes of pieces of a mebibyte that differ.
    pub differing: u64,
    /// Where the first of them are (at most 64).
    pub at: Vec<u64>,
}

/// Compare two disks that nobody uses, each with what is committed in its slices. `progress` is told bytes, of so many.
///
/// # Errors
/// A process holds one; their sizes differ; one is not usable, or damaged; what the storage says.
pub fn compare(
    one: (&Path, Format, &Path),
    two: (&Path, Format, &Path),
    mut progress: impl FnMut(u64, u64),
) -> Result<Comparison> {
    let open = |(disk, format, slices): (&Path, Format, &Path)| -> Result<Whole> {
        let base = open(disk, format, true)?;
        let still = still(Some(base.clone()), slices)?;
        let mut whole = Whole { base, index: Index::default(), slices: Vec::new(), _still: None };
        if let Some(still) = still {
            recover::usable(&still.dir, &still.owner)?;
            for (serial, slice) in (0..).zip(still.committed()?) {
                for (record, data) in &slice.scan.records {
                    let source = match record.kind {
                        Kind::Data => IndexSource::Slice { serial, data: *data },
                        _ => IndexSource::Zero { serial, unmap: false },
                    };
                    whole.index.insert(Piece { sector: record.sector, sectors: record.sectors.into(), source });
                }
                whole.slices.push(slice);
            }
            whole._still = Some(still);
        }
        Ok(whole)
    };
    let (one, two) = (open(one)?, open(two)?);
    if one.base.size() != two.base.size() {
        return Err(Error::Refused(format!(
            "{} has {} bytes and {} has {}: they are not copies of one disk",
            one.base.name(),
            one.base.size(),
            two.base.name(),
            two.base.size()
        )));
    }
    let mut found = Comparison { bytes: 0, differing: 0, at: Vec::new() };
    let (mut first, mut second) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while found.bytes < one.base.size() {
        let now = (one.base.size() - found.bytes).min(1 << 20) as usize;
        one.read(found.bytes, &mut first[..now])?;
        two.read(found.bytes, &mut second[..now])?;
        if first[..now] != second[..now] {
            found.differing += now as u64;
            if found.at.len() < 64 {
                found.at.push(found.bytes);
            }
        }
        found.bytes += now as u64;
        progress(found.bytes, one.base.size());
    }
    Ok(found)
}

/// A disk as a boot would find it.
struct Whole {
    base: Arc<dyn Block>,
    index: Index,
    /// By the index's numbers.
    slices: Vec<Examined>,
    _still: Option<Still>,
}

impl Whole {
    fn read(&self, at: u64, to: &mut [u8]) -> Result<()> {
        let first = at / SECTOR;
        for piece in self.index.lookup(first, to.len() as u64 / SECTOR) {
            let from = ((piece.sector - first) * SECTOR) as usize;
            let to = &mut to[from..from + (piece.sectors * SECTOR) as usize];
            match piece.source {
                IndexSource::Base => self.base.read_at(piece.sector * SECTOR, to)?,
                IndexSource::Zero { .. } => to.fill(0),
                IndexSource::Slice { serial, data } => {
                    let slice = &self.slices[serial as usize];
                    let got = slice.file.read_at(data, to).doing(|| format!("reading {}", slice.file_name))?;
                    if got != to.len() {
                        return Err(Error::Corrupt { what: format!("{} became shorter", slice.file_name) });
                    }
                }
            }
        }
        Ok(())
    }
}
