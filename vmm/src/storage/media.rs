//! What lies in a machine's CD-ROM drives: files that are opened when the machine begins to run, and changed while it runs.
//!
//! ```text
//!  virtio-scsi ◄─► lane ◄─► worker ─► Tray ─► the file of now, or nothing
//!   (what the guest sees, saved)        ▲
//!   insert, eject: opened first, then both changed under the device lock
//! ```
//! What a drive holds is part of the checkpoint: path, size and a digest. A takeover opens the same path and compares. If the file is not there or is another,
//! the drive is empty, the guest is told so, and the status says why: a machine does not stay down for want of an installation disc.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use understudy_disk::{Block, Error, Format, block};
use understudy_protocol::cdrom::CdromSpec;
use understudy_protocol::control::{CdromShape, CdromStatus};

use super::lane::Lane;
use super::worker::{Bench, Complaint};
use crate::core::Core;
use crate::devices::scsi::{self, Medium};
use crate::devices::virtio::Scsi;
use crate::devices::virtio::scsi::state;
use crate::devices::{Payload, Snapshot};

/// Threads of a drive.
const WORKERS: usize = 1;
/// What of a file's beginning and end goes into its digest. A volume descriptor, with its dates, is in the first 64 KiB.
const HEAD: usize = 1 << 20;
const TAIL: usize = 64 << 10;

/// A drive's place for a medium. Empty it reads nothing.
struct Tray {
    name: String,
    medium: RwLock<Option<Arc<dyn Block>>>,
}

impl Tray {
    fn medium(&self) -> Option<Arc<dyn Block>> {
        self.medium.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put(&self, medium: Option<Arc<dyn Block>>) {
        *self.medium.write().unwrap_or_else(PoisonError::into_inner) = medium;
    }

    fn refuse<T>(&self) -> understudy_disk::Result<T> {
        Err(Error::ReadOnly { disk: self.name.clone() })
    }
}

impl Block for Tray {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> u64 {
        self.medium().map_or(0, |medium| medium.size())
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read_at(&self, at: u64, to: &mut [u8]) -> understudy_disk::Result<()> {
        // The device answers for a drive that is empty; this is a read that was overtaken.
        let none = || Error::Refused(format!("the drive {} is empty", self.name));
        self.medium().ok_or_else(none)?.read_at(at, to)
    }
    fn write_at(&self, _at: u64, _from: &[u8]) -> understudy_disk::Result<()> {
        self.refuse()
    }
    fn write_zeroes(&self, _at: u64, _len: u64, _unmap: bool) -> understudy_disk::Result<()> {
        self.refuse()
    }
    fn flush(&self) -> understudy_disk::Result<()> {
        Ok(())
    }
    fn resize(&self, _size: u64) -> understudy_disk::Result<()> {
        self.refuse()
    }
    fn take_charge(&self) -> understudy_disk::Result<()> {
        self.refuse()
    }
}

struct Drive {
    spec: CdromSpec,
    lane: Arc<Lane>,
    tray: Arc<Tray>,
    complaint: Arc<Complaint>,
    /// Why it is empty and should not be.
    missing: Mutex<Option<String>>,
}

impl Drive {
    fn missing(&self) -> MutexGuard<'_, Option<String>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine's drives.
pub struct Drives {
    drives: Vec<Drive>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// A file that could lie in a drive.
pub struct Disc {
    medium: Medium,
    file: Arc<dyn Block>,
}

impl Disc {
    /// Open an ISO image.
    ///
    /// # Errors
    /// It is not there, or has no size that a CD can have.
    pub fn open(path: &str) -> Result<Self> {
        ensure!(path.starts_with('/'), "{path:?} must be an absolute path");
        let file = block::open(Path::new(path), Format::Raw, true)?;
        let bytes = file.size();
        ensure!(
            scsi::whole(bytes),
            "{path} has {bytes} bytes, and an ISO image has a multiple of {} (at least one): it is damaged or something else",
            scsi::CD_BLOCK
        );
        let identity = digest(path, bytes).with_context(|| format!("reading {path}"))?;
        Ok(Self { medium: Medium { file: path.to_owned(), bytes, identity }, file })
    }

    /// What the device and the checkpoint know of it.
    pub fn medium(&self) -> &Medium {
        &self.medium
    }
}

/// Tells an image from another by accident in its place, not from one that was made to look the same: beginning and end.
fn digest(path: &str, bytes: u64) -> std::io::Result<u64> {
    let file = File::open(path)?;
    let crc = |at: u64, len: usize| {
        let mut part = vec![0; len.min(usize::try_from(bytes - at).unwrap_or(len))];
        file.read_exact_at(&mut part, at).map(|()| u64::from(crc32fast::hash(&part)))
    };
    Ok(crc(0, HEAD)? << 32 | crc(bytes.saturating_sub(TAIL as u64), TAIL)?)
}

/// What the drives of a saved machine held, by name.
///
/// # Errors
/// It is damaged, or of another version.
pub fn saved(payloads: &[Payload]) -> Result<Vec<(String, Option<Medium>)>> {
    let Some(payload) = payloads.iter().find(|payload| payload.kind == Scsi::KIND) else { return Ok(Vec::new()) };
    ensure!(
        payload.version == Scsi::VERSION,
        "the SCSI controller was saved in version {}, this program knows {}",
        payload.version,
        Scsi::VERSION
    );
    let state: state::V1 = postcard::from_bytes(&payload.bytes).context("the SCSI controller's state is damaged")?;
    let drives = state.units.into_iter().filter_map(|unit| Some((unit.name, unit.drive?.medium)));
    Ok(drives.collect())
}

/// What is in a drive when the machine begins to run.
pub enum Found {
    /// This, or nothing: as it was, or as it is switched on.
    There(Option<Medium>),
    /// What the guest knows is not there any more.
    Lost,
}

/// What a machine's drives are to another machine that is to run from its image.
pub fn shapes(specs: &[CdromSpec]) -> Vec<CdromShape> {
    specs.iter().map(|spec| CdromShape { name: spec.name.clone() }).collect()
}

impl Drives {
    /// Drives that nothing lies in. `lanes` are the devices', in the same order.
    pub fn new(specs: &[CdromSpec], lanes: Vec<Arc<Lane>>) -> Self {
        let drive = |(spec, lane): (&CdromSpec, Arc<Lane>)| Drive {
            spec: spec.clone(),
            lane,
            tray: Arc::new(Tray { name: spec.name.clone(), medium: RwLock::new(None) }),
            complaint: Arc::default(),
            missing: Mutex::new(None),
        };
        Self { drives: specs.iter().zip(lanes).map(drive).collect(), workers: Mutex::new(Vec::new()) }
    }

    /// Whether there is any.
    pub fn any(&self) -> bool {
        !self.drives.is_empty()
    }

    /// Open what lies in them: what a checkpoint says (`held`), or at power on what the configuration says. Never fails for want of a file.
    ///
    /// # Errors
    /// No threads can be started.
    pub fn open(&self, core: &Arc<Core>, held: Option<&[(String, Option<Medium>)]>) -> Result<Vec<(String, Found)>> {
        let mut all = Vec::new();
        for drive in &self.drives {
            let name = &drive.spec.name;
            // (The checkpoint's units are compared with this machine's when it is loaded.)
            let wanted =
                held.map(|held| held.iter().find(|(of, _)| of == name).and_then(|(_, medium)| medium.as_ref()));
            let disc = match wanted {
                Some(None) => Ok(None),
                Some(Some(medium)) => Disc::open(&medium.file).and_then(|disc| {
                    ensure!(
                        disc.medium == *medium,
                        "{} is another image here than the one that the guest had in its drive: put the same on every node",
                        medium.file
                    );
                    Ok(Some(disc))
                }),
                None => drive.spec.file.as_deref().map(Disc::open).transpose(),
            };
            let found = match disc {
                Ok(disc) => {
                    *drive.missing() = None;
                    drive.tray.put(disc.as_ref().map(|disc| disc.file.clone()));
                    Found::There(disc.map(|disc| disc.medium))
                }
                Err(e) => {
                    let why = format!("it is empty: {e:#}; insert it when it is there");
                    eprintln!("warning: drive {name}: {why}");
                    *drive.missing() = Some(why);
                    drive.tray.put(None);
                    if wanted.is_some() { Found::Lost } else { Found::There(None) }
                }
            };
            all.push((name.clone(), found));
            drive.lane.start();
            let served: Arc<dyn Block> = drive.tray.clone();
            let bench = Bench::new(drive.lane.clone(), served, drive.complaint.clone(), core.clone());
            let workers = super::start_workers(WORKERS, &bench)?;
            self.workers().extend(workers);
        }
        Ok(all)
    }

    fn workers(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a drive of this name.
    ///
    /// # Errors
    /// There is none; the sentence names those that there are.
    pub fn find(&self, name: &str) -> Result<()> {
        let names: Vec<_> = self.drives.iter().map(|drive| drive.spec.name.as_str()).collect();
        ensure!(names.contains(&name), "this machine has no drive {name:?}; it has {}", list(&names));
        Ok(())
    }

    /// The device knows of it already, under the same lock.
    pub fn put(&self, name: &str, disc: Option<Disc>) {
        if let Some(drive) = self.drives.iter().find(|drive| drive.spec.name == name) {
            drive.tray.put(disc.map(|disc| disc.file));
            *drive.missing() = None;
            drive.complaint.forget();
        }
    }

    /// The machine runs elsewhere, or has ended.
    pub fn let_go(&self) {
        self.drives.iter().for_each(|drive| drive.lane.stop());
        for worker in std::mem::take(&mut *self.workers()) {
            // It panics only if a disk does, which is reported by the panic itself.
            let _ = worker.join();
        }
        self.drives.iter().for_each(|drive| drive.tray.put(None));
    }

    /// What the status command shows. `units` are the devices as the guest sees them.
    pub fn status(&self, unit: impl Fn(&str) -> Option<scsi::Unit>) -> Vec<CdromStatus> {
        let status = |drive: &Drive| {
            let unit = unit(&drive.spec.name);
            let medium = unit.as_ref().and_then(|unit| unit.medium().cloned());
            let (locked, open) = unit.and_then(|unit| unit.tray()).unwrap_or_default();
            CdromStatus {
                name: drive.spec.name.clone(),
                size_bytes: medium.as_ref().map_or(0, |medium| medium.bytes),
                file: medium.map(|medium| medium.file),
                locked,
                open,
                problem: drive.missing().clone().or_else(|| drive.complaint.now()),
            }
        };
        self.drives.iter().map(status).collect()
    }
}

/// `a, b`, or `none`.
pub fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}
