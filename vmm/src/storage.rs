//! A machine's disks behind their devices: opened when the machine begins to run, cut with its memory, let go of when it runs elsewhere.
//!
//! ```text
//!  virtio-blk ◄─► lane ◄─► workers ─► understudy_disk::Disk ─► base, slices
//!  (device lock)  (lane.rs) (worker.rs)      ▲
//!  session ── protect, close, cut, seal, commit, unprotect (here)
//! ```
//! A standby has lanes and nothing behind them: it opens nothing before it is promoted. `docs/decisions/0014` says when what is called and why.
//!
//! What must hold: [`Storage::cut`] does no I/O and is called while the devices are frozen and the intake is closed; everything else that is called here may
//! take as long as storage takes, and is called without the device lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use understudy_disk::{Block, Disk, Error, Identity, Limits, Memory, Merger, Options, Tag, configured};
use understudy_protocol::control::{DiskShape, DiskStatus};
use understudy_protocol::disk::{DiskSpec, check_list};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::iscsi;

use crate::core::{Core, Event};
use crate::devices::{Payload, Payloads};

pub mod lane;
pub mod media;
pub mod mirror;
pub mod verify;
mod worker;

use lane::{Closed, Lane};
use worker::{Bench, Complaint};

/// Threads of a disk.
const WORKERS: usize = 4;
/// How long a cut waits for writes that are under way, while the guest runs; then it is refused.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// The same where protection begins: a flush of the base may be under way.
pub const PROTECT_PATIENCE: Duration = Duration::from_secs(5);
/// A request that is under way for so long is worth a sentence in the status.
const SLOW: Duration = Duration::from_secs(2);
/// A machine that was switched off merges so much before its process ends; more waits for the next opening.
const FINISH_BYTES: u64 = 64 << 20;

/// Saved state.
mod state {
    use super::*;

    /// The state of each disk that can be written, by name.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        pub tags: Vec<(String, Tag)>,
    }
}
const KIND: &str = "disks";
const VERSION: u32 = 1;

/// What the disks were at a cut. Goes into the checkpoint.
#[derive(Debug, Clone)]
pub struct Tags(state::V1);

impl Tags {
    /// As part of the saved state.
    pub fn payload(&self) -> Result<Payload> {
        crate::container::payload(KIND, "all", VERSION, &self.0)
    }

    fn of(&self, disk: &str) -> Result<Tag> {
        let found = self.0.tags.iter().find(|(name, _)| name == disk);
        let tag = found.map(|(_, tag)| *tag);
        tag.with_context(|| format!("the checkpoint knows no disk {disk}: give both machines the same disks"))
    }

    fn take(from: &mut Payloads) -> Result<Self> {
        Ok(Self(crate::container::take(from, KIND, "all", VERSION)?))
    }
}

/// A disk that is open.
struct Open {
    /// `None`: it is only read.
    disk: Option<Arc<Disk>>,
    base: Arc<dyn Block>,
    complaint: Arc<Complaint>,
    workers: Vec<JoinHandle<()>>,
    merger: Option<Merger>,
}

/// A disk that can be written, and its base; a disk that is only read is its base.
type Opened = (Option<Arc<Disk>>, Arc<dyn Block>);

struct Set {
    open: Vec<Open>,
    /// The disks' own number for the next cut.
    next: Epoch,
    protection: Protection,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protection {
    No,
    /// Of some disks: beginning it or ending it failed half way.
    Part,
    All,
}

/// See the module.
pub struct Storage {
    machine: String,
    node: String,
    specs: Vec<DiskSpec>,
    lanes: Vec<Arc<Lane>>,
    set: Mutex<Option<Set>>,
}

/// What a machine's disks are to another machine that is to run from its image.
pub fn shapes(specs: &[DiskSpec], vcpus: u32) -> Vec<DiskShape> {
    let queues = u16::try_from(vcpus).unwrap_or(1).clamp(1, understudy_protocol::disk::MAX_QUEUES);
    let shape = |spec: &DiskSpec| DiskShape {
        name: spec.name.clone(),
        bus: spec.bus,
        queues: spec.queues.unwrap_or(queues),
        read_only: spec.read_only,
    };
    specs.iter().map(shape).collect()
}

/// Whether they can be a machine's disks. Opens nothing.
pub fn validate(specs: &[DiskSpec]) -> Result<()> {
    check_list(specs)?;
    for spec in specs {
        if spec.file.starts_with(iscsi::SCHEME) {
            if let Err(why) = understudy_disk::block::iscsi_is_possible() {
                eprintln!("warning: disk {}: {why}", spec.name);
            }
            continue;
        }
        let file = match std::fs::metadata(&spec.file) {
            Ok(file) => file,
            Err(e) => {
                // A standby needs it only when it takes over.
                eprintln!("warning: disk {}: {}: {e}", spec.name, spec.file);
                continue;
            }
        };
        configured::check_file(spec, &file).with_context(|| format!("disk {}", spec.name))?;
    }
    Ok(())
}

impl Storage {
    /// Disks that are not open. `lanes` are the devices', in the same order.
    pub fn new(machine: &str, node: &str, specs: &[DiskSpec], lanes: Vec<Arc<Lane>>) -> Self {
        Self { machine: machine.into(), node: node.into(), specs: specs.to_vec(), lanes, set: Mutex::new(None) }
    }

    fn set(&self) -> MutexGuard<'_, Option<Set>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is any disk at all.
    pub fn any(&self) -> bool {
        !self.specs.is_empty()
    }

    /// Whether there is one that can be written, and so is part of a checkpoint.
    pub fn any_written(&self) -> bool {
        self.specs.iter().any(|spec| !spec.read_only)
    }

    /// Find the disks' tags in a saved state; none if this machine has no disks.
    pub fn tags(&self, from: &mut Payloads) -> Result<Option<Tags>> {
        if self.any_written() { Tags::take(from).map(Some) } else { Ok(None) }
    }

    /// Open all disks for a machine of this generation that goes on from `tags`, or boots. Returns their sizes in sectors. Nothing is open after an error.
    pub fn open(&self, core: &Arc<Core>, generation: Generation, tags: Option<&Tags>) -> Result<Vec<u64>> {
        if let Some(tags) = tags {
            // Before any of them is claimed.
            let written = self.specs.iter().filter(|spec| !spec.read_only);
            written.clone().try_for_each(|spec| tags.of(&spec.name).map(drop))?;
            let known = |name: &str| written.clone().any(|spec| spec.name == name);
            if let Some((name, _)) = tags.0.tags.iter().find(|(name, _)| !known(name)) {
                bail!("the checkpoint has a disk {name} and this machine has none: give both machines the same disks");
            }
        }
        let mut open = Vec::new();
        self.lanes.iter().for_each(|lane| lane.start());
        for (spec, lane) in self.specs.iter().zip(&self.lanes) {
            let opened = self.open_one(spec, generation, tags).and_then(|(disk, base)| {
                let served: Arc<dyn Block> = match &disk {
                    Some(disk) => disk.clone(),
                    None => base.clone(),
                };
                let complaint = Arc::new(Complaint::default());
                let how = served.how();
                if let Some(note) = how.note {
                    eprintln!("note: disk {}: {note}", spec.name);
                }
                let bench = Bench::new(lane.clone(), served, complaint.clone(), core.clone());
                let workers = start_workers(WORKERS, &bench)?;
                let merger = disk.clone().map(Merger::start).transpose()?;
                Ok(Open { disk, base, complaint, workers, merger })
            });
            match opened {
                Ok(opened) => open.push(opened),
                Err(e) => {
                    self.end(open);
                    return Err(e.context(format!("disk {}", spec.name)));
                }
            }
        }
        let sectors = open.iter().map(|open| open.base.size() / understudy_disk::SECTOR).collect();
        *self.set() = Some(Set { open, next: Epoch(1), protection: Protection::No });
        Ok(sectors)
    }

    fn open_one(&self, spec: &DiskSpec, generation: Generation, tags: Option<&Tags>) -> Result<Opened> {
        let base = configured::open_base(spec, &self.node)?;
        if spec.read_only {
            return Ok((None, base));
        }
        let memory = match tags {
            None => Memory::None,
            Some(tags) => Memory::Image(tags.of(&spec.name)?),
        };
        let directory = configured::open_slices(spec)?;
        let identity = Identity { machine: self.machine.clone(), node: self.node.clone(), generation };
        let open = if spec.mirrored { Disk::open_mirrored } else { Disk::open };
        let disk = open(Options {
            base: base.clone(),
            format: configured::format(spec),
            directory,
            identity,
            memory,
            limits: Limits::default(),
        })?;
        Ok((Some(Arc::new(disk)), base))
    }

    /// Names of the mirrored disks.
    pub fn mirrored(&self) -> Vec<String> {
        self.specs.iter().filter(|spec| spec.mirrored).map(|spec| spec.name.clone()).collect()
    }

    /// The mirrored disks with their names; none if nothing is open.
    pub fn mirrored_disks(&self) -> Vec<(String, Arc<Disk>)> {
        let set = self.set();
        let open = set.iter().flat_map(|set| &set.open).zip(&self.specs);
        let mirrored = open.filter(|(_, spec)| spec.mirrored);
        mirrored.filter_map(|(open, spec)| Some((spec.name.clone(), open.disk.clone()?))).collect()
    }

    /// What the mirrored disks were at a cut.
    pub fn tags_of_mirrored(&self, tags: &Tags) -> Result<Vec<Tag>> {
        self.mirrored().iter().map(|name| tags.of(name)).collect()
    }

    /// Every disk that can be written, with its lane; none if nothing is open.
    fn written(&self) -> Vec<(Arc<Disk>, &Arc<Lane>)> {
        let set = self.set();
        let open = set.iter().flat_map(|set| &set.open).zip(&self.lanes);
        open.filter_map(|(open, lane)| Some((open.disk.clone()?, lane))).collect()
    }

    /// What a newer owner means for this machine.
    fn judge<T>(core: &Core, name: &str, result: Result<T, Error>) -> Result<T> {
        if let Err(Error::Superseded { theirs, .. }) = &result {
            core.tell(Event::Fenced(*theirs));
        }
        result.with_context(|| format!("disk {name}"))
    }

    fn protection(&self) -> Protection {
        self.set().as_ref().map_or(Protection::No, |set| set.protection)
    }

    fn set_protection(&self, to: Protection) {
        if let Some(set) = &mut *self.set() {
            set.protection = to;
        }
    }

    /// Whether all writes go to slices that only a checkpoint commits.
    pub fn protected(&self) -> bool {
        self.protection() == Protection::All
    }

    /// Begin protection. The gate is held already: from here on a flush promises nothing to anybody outside.
    /// `then`, before any write is admitted again: what is in front of these writes has to be told from them.
    pub fn protect(&self, core: &Core, then: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(next) = self.set().as_ref().map(|set| set.next) else { return Ok(()) };
        let disks = self.written();
        // A flush that began unprotected must not end protected.
        let _closed = self.close(PROTECT_PATIENCE)?;
        self.set_protection(Protection::Part);
        for (disk, lane) in disks {
            // After an attempt that failed half way some are protected already.
            if disk.status().mode != "protected" {
                Self::judge(core, &lane.name, disk.protect(next))?;
            }
        }
        then()?;
        self.set_protection(Protection::All);
        Ok(())
    }

    /// End protection: what was written counts, durably. The standby will not be promoted, durably, before this is called.
    pub fn unprotect(&self, core: &Core) -> Result<()> {
        if self.protection() == Protection::No {
            return Ok(());
        }
        let _closed = self.close(PROTECT_PATIENCE)?;
        self.set_protection(Protection::Part);
        for (disk, lane) in self.written() {
            Self::judge(core, &lane.name, disk.unprotect())?;
        }
        self.set_protection(Protection::No);
        Ok(())
    }

    /// Let no write begin and wait for those under way, so that [`Storage::cut`] waits for nothing. While the guest runs.
    pub fn close(&self, patience: Duration) -> Result<Vec<Closed<'_>>> {
        let close = |lane: &'_ Arc<Lane>| -> Result<()> {
            bail!(
                "disk {}: its storage has not ended a write within {} ms; no checkpoint can be made before it has",
                lane.name,
                patience.as_millis()
            )
        };
        let mut all = Vec::new();
        for (lane, spec) in self.lanes.iter().zip(&self.specs) {
            if spec.read_only {
                continue;
            }
            match lane.close(patience) {
                Some(closed) => all.push(closed),
                None => close(lane)?,
            }
        }
        Ok(all)
    }

    /// The instant between two epochs, of all disks. The number is the disks' own: for [`Storage::seal`] and [`Storage::commit`].
    /// `None` if there is no disk that can be written.
    pub fn cut(&self, core: &Core) -> Result<Option<(Epoch, Tags)>> {
        if !self.any_written() {
            return Ok(None);
        }
        let mut set = self.set();
        let set = set.as_mut().context("the disks are not open")?;
        let number = set.next;
        let mut tags = Vec::new();
        for ((open, spec), lane) in set.open.iter().zip(&self.specs).zip(&self.lanes) {
            if let Some(disk) = &open.disk {
                tags.push((spec.name.clone(), Self::judge(core, &lane.name, disk.cut(number))?));
            }
        }
        set.next = number.next();
        Ok(Some((number, Tags(state::V1 { tags }))))
    }

    /// Everything up to this cut is durable and complete when this returns.
    pub fn seal(&self, core: &Core, number: Epoch) -> Result<()> {
        self.written().iter().try_for_each(|(disk, lane)| Self::judge(core, &lane.name, disk.seal(number)))
    }

    /// The standby has everything up to this cut; so does everybody who opens the disks from now on, when this returns.
    pub fn commit(&self, core: &Core, number: Epoch) -> Result<()> {
        self.written().iter().try_for_each(|(disk, lane)| Self::judge(core, &lane.name, disk.commit(number)))
    }

    /// Enlarge a disk. Returns its place among the disks and its size in sectors, for the device: the base has it already, durably, so that whoever
    /// opens it next sees a disk that is not smaller than what its guest knows.
    pub fn resize(&self, core: &Core, name: &str, bytes: u64) -> Result<(usize, u64)> {
        let names: Vec<_> = self.specs.iter().map(|spec| spec.name.as_str()).collect();
        let at = names.iter().position(|known| *known == name);
        let at = at.with_context(|| format!("this machine has no disk {name:?}; it has {}", media::list(&names)))?;
        ensure!(
            bytes.is_multiple_of(understudy_disk::SECTOR) && bytes > 0,
            "a disk has a whole number of sectors of {} bytes, and {bytes} bytes are none",
            understudy_disk::SECTOR
        );
        ensure!(
            !(self.specs[at].mirrored && self.protected()),
            "the mirrored disk {name} has a copy in step, which would stay smaller: resize it while the machine is unprotected; the copy follows then"
        );
        let disk = self.set().as_ref().and_then(|set| set.open.get(at)).map(|open| open.disk.clone());
        let disk = disk.context("the disks are not open: resize a disk on the node where its machine runs")?;
        let disk = disk.with_context(|| format!("the disk {name} is read-only"))?;
        Self::judge(core, name, disk.resize(bytes))?;
        Ok((at, disk.size() / understudy_disk::SECTOR))
    }

    /// The machine runs elsewhere, or has ended: end the threads and close everything. What they are doing they do to its end.
    pub fn let_go(&self) {
        let Some(Set { open, .. }) = self.set().take() else { return };
        self.end(open);
    }

    fn end(&self, open: Vec<Open>) {
        self.lanes.iter().for_each(|lane| lane.stop());
        for open in open {
            let Open { workers, merger, .. } = open;
            drop(merger);
            for worker in workers {
                // It panics only if a disk does, which is reported by the panic itself.
                let _ = worker.join();
            }
        }
    }

    /// A machine that was switched off leaves its disks whole, if that is quick; what is not done here the next opening does.
    pub fn finish(&self) {
        for (disk, lane) in self.written() {
            let status = disk.status();
            if status.mode == "protected" || status.backlog_bytes > FINISH_BYTES {
                continue;
            }
            if let Err(e) = disk.finish() {
                eprintln!("note: disk {}: {e}; the next start goes on from there", lane.name);
            }
        }
    }

    /// What the status command shows.
    pub fn status(&self) -> Vec<DiskStatus> {
        // Not under the lock: a cut takes it in the pause.
        let all: Vec<_> = {
            let set = self.set();
            let open = set.iter().flat_map(|set| &set.open);
            open.map(|open| (open.disk.clone(), open.base.clone(), open.complaint.clone())).collect()
        };
        let open = |i: usize| all.get(i);
        let specs = self.specs.iter().zip(&self.lanes).enumerate();
        let status = |(i, (spec, lane)): (usize, (&DiskSpec, &Arc<Lane>))| {
            let load = lane.load();
            let disk = open(i).and_then(|open| open.0.as_ref()).map(|disk| disk.status());
            let mode = match (&disk, open(i)) {
                (Some(disk), _) => disk.mode,
                (None, Some(_)) => "read-only",
                (None, None) => "closed",
            };
            let complaint = open(i).and_then(|(_, _, complaint)| complaint.now());
            let waits = open(i).and_then(|(_, base, _)| base.trouble()).or_else(|| {
                let (since, what) = load.slowest.filter(|(since, _)| *since >= SLOW)?;
                Some(format!(
                    "the storage of {} has not answered a {what} for {} s: the guest's request waits, nothing is lost",
                    spec.file,
                    since.as_secs()
                ))
            });
            let stale = disk.as_ref().and_then(|disk| disk.stale_ms).map(Duration::from_millis);
            let waits = waits.or_else(|| {
                let since = stale.filter(|since| *since >= SLOW)?;
                Some(format!(
                    "the storage of {} or of its slices has not answered for {} s: checkpoints wait, nothing is lost",
                    spec.file,
                    since.as_secs()
                ))
            });
            DiskStatus {
                name: spec.name.clone(),
                file: spec.file.clone(),
                spec: spec.to_string(),
                mode: mode.into(),
                io: open(i).map_or_else(String::new, |(_, base, _)| base.how().io),
                fence: disk.as_ref().and_then(|disk| disk.fence.clone()).unwrap_or_default(),
                size_bytes: open(i).map_or(0, |(_, base, _)| base.size()),
                backlog_bytes: disk.as_ref().map_or(0, |disk| disk.backlog_bytes),
                in_flight: load.in_flight as u64,
                held: load.held as u64,
                problem: waits.or(complaint).or(disk.and_then(|disk| disk.problem)),
            }
        };
        specs.map(status).collect()
    }
}

fn start_workers(how_many: usize, bench: &Bench) -> Result<Vec<JoinHandle<()>>> {
    let mut workers = Vec::new();
    for _ in 0..how_many {
        let theirs = bench.clone();
        let spawned = std::thread::Builder::new()
            .name(format!("disk-{}", bench.lane.name.chars().take(10).collect::<String>()))
            .stack_size(512 * 1024)
            .spawn(move || theirs.work());
        match spawned {
            Ok(worker) => workers.push(worker),
            Err(e) => {
                bench.lane.stop();
                return Err(e).context("cannot start a disk's thread");
            }
        }
    }
    Ok(workers)
}
