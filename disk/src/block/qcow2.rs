//! qcow2 files with their backing files, through `imago`.
//!
//! A qcow2 file has tables, and imago caches them. So only whoever has the right to write may open one for writing, and must open it afresh when
//! it gets that right ([`Block::take_charge`]): what it knew before may be what somebody else has changed since.
//!
//! imago writes its tables in the right order, but without flushes in between, so that a power cut could leave a table that refers to
//! what never reached the disk. Therefore files are opened for writing with `O_DSYNC`: what was written first is durable first. That costs
//! speed; raw disks do not pay it.
//!
//! imago reads zeroes behind the end of a file, which is right for a file that never was longer, and wrong for one that was. Lengths of all
//! files of the chain are remembered and compared around every read ([`Lengths`]).

use std::fs::{self, File as StdFile, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use imago::file::File;
use imago::format::PreallocateMode;
use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2 as Image;
use imago::{FormatAccess, Mapping, Storage, StorageOpenOptions};

use super::{Block, Format, SECTOR, admit};
use crate::error::{Doing, Error, Result};

/// A qcow2 disk.
pub struct Qcow2 {
    path: PathBuf,
    name: String,
    read_only: bool,
    writable: AtomicBool,
    size: AtomicU64,
    image: RwLock<FormatAccess<File>>,
    lengths: Mutex<Lengths>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("path", &self.path).field("size", &self.size).finish_non_exhaustive()
    }
}

/// The files of a chain, each with the greatest length that it has had.
#[derive(Debug, Default)]
struct Lengths(Vec<(String, StdFile, u64)>);

impl Lengths {
    fn add(&mut self, path: &Path) -> io::Result<()> {
        let file = OpenOptions::new().read(true).open(path)?;
        let len = file.metadata()?.len();
        self.0.push((path.display().to_string(), file, len));
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        for (path, file, longest) in &mut self.0 {
            let is = file.metadata().doing(|| format!("asking for the size of {path}"))?.len();
            if is < *longest {
                return Err(Error::Shrank { path: path.clone(), was: *longest, is });
            }
            *longest = is;
        }
        Ok(())
    }
}

/// Opens what an image refers to, read-only, and remembers the files. Bounded: a chain may be made to refer to itself.
struct Chain<'a> {
    lengths: &'a mut Lengths,
    depth: usize,
}

const DEEPEST: usize = 32;

impl ImplicitOpenGate<File> for Chain<'_> {
    fn open_format<F: FormatDriverBuilder<File>>(&mut self, builder: F) -> io::Result<FormatAccess<File>> {
        if self.depth >= DEEPEST {
            return Err(io::Error::other(format!(
                "the chain of backing files is longer than {DEEPEST}; does one of them refer back to itself?"
            )));
        }
        let inner = Chain { lengths: &mut *self.lengths, depth: self.depth + 1 };
        Ok(FormatAccess::new(builder.open(inner)?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<File> {
        let path = options.get_filename().map(Path::to_owned);
        let file = File::open(options).map_err(|e| match &path {
            Some(path) if e.kind() == io::ErrorKind::NotFound => io::Error::new(
                e.kind(),
                format!("{} is missing: bring it back to this place, nothing can be read without it", path.display()),
            ),
            _ => e,
        })?;
        if let Some(path) = &path {
            self.lengths.add(path)?;
        }
        Ok(file)
    }
}

fn open_image(path: &Path, write: bool) -> Result<(FormatAccess<File>, Lengths)> {
    let name = path.display();
    let mut lengths = Lengths::default();
    let chain = Chain { lengths: &mut lengths, depth: 0 };
    let doing = || format!("opening the qcow2 disk {name}");
    let mut open = OpenOptions::new();
    open.read(true).write(write);
    if write {
        open.custom_flags(libc::O_DSYNC);
    }
    let file = open.open(path).doing(doing)?;
    chain.lengths.add(path).doing(doing)?;
    let file = File::from_open_file(file, StorageOpenOptions::new().filename(path).write(write)).doing(doing)?;
    let image = Image::<File>::builder(file).write(write).open(chain).doing(doing)?;
    Ok((FormatAccess::new(image), lengths))
}

impl Qcow2 {
    /// Open an existing image and its backing files, for reading.
    ///
    /// # Errors
    /// It or a backing file is missing, is no qcow2, uses what is not supported, or has no whole number of sectors.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        let (image, lengths) = open_image(path, false)?;
        let (name, size) = (path.display().to_string(), image.size());
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::Refused(format!("{name} has {size} bytes, which is no whole number of sectors")));
        }
        Ok(Qcow2 {
            path: path.to_owned(),
            name,
            read_only,
            writable: AtomicBool::new(false),
            size: AtomicU64::new(size),
            image: RwLock::new(image),
            lengths: Mutex::new(lengths),
        })
    }

    /// Make a new image, empty or over a backing file, which is named in it by the path that is given here (relative: to the new image).
    ///
    /// # Errors
    /// It exists already; the backing file cannot be opened; what the file system says.
    pub fn create(path: &Path, size: u64, backing: Option<(&Path, Format)>) -> Result<Self> {
        let doing = || format!("making the qcow2 disk {}", path.display());
        super::overwrite_check(path)?;
        if let Some((backing, format)) = backing {
            // Opened once now, so that a wrong name shows now.
            let from = path.parent().unwrap_or(Path::new(".")).join(backing);
            super::open(&from, format, true)?;
        }
        fs::File::create_new(path).doing(doing)?;
        let file = File::open(StorageOpenOptions::new().filename(path).write(true)).doing(doing)?;
        let mut builder = Image::<File>::create_builder(file).size(size);
        if let Some((backing, format)) = backing {
            builder = builder.backing(backing.display().to_string(), format.to_string());
        }
        let made = builder.create().doing(doing).and_then(|()| {
            StdFile::open(path).and_then(|f| f.sync_all()).and_then(|()| crate::store::sync_parent(path)).doing(doing)
        });
        if let Err(e) = made {
            // Half an image is of no use; that it was not there before was made sure above.
            let _ = fs::remove_file(path);
            return Err(e);
        }
        Self::open(path, false)
    }

    /// The files of the chain, the image itself first.
    pub fn files(&self) -> Vec<String> {
        let lengths = self.lengths.lock().unwrap_or_else(PoisonError::into_inner);
        lengths.0.iter().map(|(path, ..)| path.clone()).collect()
    }

    fn image(&self) -> RwLockReadGuard<'_, FormatAccess<File>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn whole(&self) -> Result<()> {
        self.lengths.lock().unwrap_or_else(PoisonError::into_inner).check()
    }

    fn may_write(&self, at: u64, len: u64) -> Result<()> {
        admit(self, at, len)?;
        if self.read_only || !self.writable.load(Ordering::Acquire) {
            return Err(Error::ReadOnly { disk: self.name.clone() });
        }
        self.whole()
    }

    /// Follow every mapping of the image. `progress` is told how far it is, in bytes.
    ///
    /// # Errors
    /// A mapping cannot be read, or points behind the end of its file.
    pub fn check(&self, mut progress: impl FnMut(u64)) -> Result<Report> {
        let image = self.image();
        let mut report = Report::default();
        let mut at = 0;
        while at < image.size() {
            let doing = || format!("looking where byte {at} of {} is kept", self.name);
            let (mapping, len) = image.get_mapping(at, image.size() - at).doing(doing)?;
            if len == 0 {
                break;
            }
            match mapping {
                Mapping::Raw { storage, offset, .. } => {
                    let end = storage.size().doing(doing)?;
                    if offset >= end {
                        return Err(Error::Refused(format!(
                            "{}: byte {at} is kept at {offset} of {}, which ends at {end}: the file was cut off",
                            self.name,
                            storage.get_filename().map_or("a file".into(), |f| f.display().to_string())
                        )));
                    }
                    report.data += len;
                }
                Mapping::Special { .. } => report.compressed += len,
                _ => report.zero += len,
            }
            at += len;
            progress(at);
        }
        Ok(report)
    }
}

/// What is in an image, in guest bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Kept as they are, here or in a backing file.
    pub data: u64,
    /// Read as zeroes.
    pub zero: u64,
    /// Kept compressed.
    pub compressed: u64,
}

impl Block for Qcow2 {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        admit(self, at, to.len() as u64)?;
        let len = to.len();
        self.image().read(&mut *to, at).doing(|| format!("reading {len} bytes at {at} of {}", self.name))?;
        self.whole()
    }

    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.may_write(at, from.len() as u64)?;
        self.image().write(from, at).doing(|| format!("writing {} bytes at {at} of {}", from.len(), self.name))
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.may_write(at, len)?;
        let doing = || format!("clearing {len} bytes at {at} of {}", self.name);
        if unmap {
            // Frees clusters: nobody may be reading them meanwhile.
            self.image.write().unwrap_or_else(PoisonError::into_inner).discard_to_zero(at, len).doing(doing)
        } else {
            self.image().write_zeroes(at, len).doing(doing)
        }
    }

    fn flush(&self) -> Result<()> {
        if !self.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        let image = self.image();
        // First the tables out of imago's cache, then all of it out of the kernel's.
        image.flush().and_then(|()| image.sync()).doing(|| format!("flushing {}", self.name))?;
        self.whole()
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.may_write(0, 0)?;
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        image
            .resize(size, PreallocateMode::None)
            .and_then(|()| image.flush())
            .and_then(|()| image.sync())
            .doing(|| format!("resizing {} to {size} bytes", self.name))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn take_charge(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly { disk: self.name.clone() });
        }
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        let (fresh, lengths) = open_image(&self.path, true)?;
        self.size.store(fresh.size(), Ordering::Release);
        *image = fresh;
        *self.lengths.lock().unwrap_or_else(PoisonError::into_inner) = lengths;
        self.writable.store(true, Ordering::Release);
        Ok(())
    }
}
