//! A disk byte for byte in a file or on a block device.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::{Block, SECTOR, admit};
use crate::error::{Doing, Error, Result};

/// A raw disk.
#[derive(Debug)]
pub struct Raw {
    path: PathBuf,
    name: String,
    file: File,
    device: bool,
    read_only: bool,
    size: AtomicU64,
}

impl Raw {
    /// Open an existing file or block device.
    ///
    /// # Errors
    /// It does not exist, may not be opened, or is no whole number of sectors long.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        let name = path.display().to_string();
        let file =
            OpenOptions::new().read(true).write(!read_only).open(path).doing(|| format!("opening the disk {name}"))?;
        let kind = file.metadata().doing(|| format!("asking for the size of {name}"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Refused(format!("{name} is neither a file nor a block device")));
        }
        let size = (&file).seek(SeekFrom::End(0)).doing(|| format!("asking for the size of {name}"))?;
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::Refused(format!(
                "{name} is {size} bytes long, which is no whole number of sectors: the last one would be lost or grow; \
                 lengthen it first (truncate -s %512 {name})"
            )));
        }
        let device = kind.is_block_device();
        Ok(Raw { path: path.to_owned(), name, file, device, read_only, size: AtomicU64::new(size) })
    }

    /// Make a new file of zeroes, which takes no room yet.
    ///
    /// # Errors
    /// It exists already; what the file system says.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        let doing = || format!("making the disk {}", path.display());
        let file = OpenOptions::new().write(true).create_new(true).open(path).doing(doing)?;
        file.set_len(size).doing(doing)?;
        file.sync_all().doing(doing)?;
        crate::store::sync_parent(path).doing(doing)?;
        Self::open(path, false)
    }

    fn may_write(&self, at: u64, len: u64) -> Result<()> {
        admit(self, at, len)?;
        if self.read_only { Err(Error::ReadOnly { disk: self.name.clone() }) } else { Ok(()) }
    }

    fn zeroes_by_hand(&self, mut at: u64, len: u64) -> Result<()> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let end = at + len;
        while at < end {
            let now = (end - at).min(ZEROES.len() as u64);
            self.write_at(at, &ZEROES[..now as usize])?;
            at += now;
        }
        Ok(())
    }
}

impl Block for Raw {
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
        match self.file.read_exact_at(to, at) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                let is =
                    (&self.file).seek(SeekFrom::End(0)).doing(|| format!("asking for the size of {}", self.name))?;
                Err(Error::Shrank { path: self.name.clone(), was: self.size(), is })
            }
            Err(e) => Err(Error::io(format!("reading {} bytes at {at} of {}", to.len(), self.name), e)),
        }
    }

    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.may_write(at, from.len() as u64)?;
        self.file.write_all_at(from, at).doing(|| format!("writing {} bytes at {at} of {}", from.len(), self.name))
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.may_write(at, len)?;
        if len == 0 {
            return Ok(());
        }
        let how = if unmap { FallocateFlags::FALLOC_FL_PUNCH_HOLE } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
        match fallocate(&self.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, at as i64, len as i64) {
            Ok(()) => Ok(()),
            // Many file systems have neither; zeroes can always be written.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::EPERM) => self.zeroes_by_hand(at, len),
            Err(e) => Err(Error::io(format!("clearing {len} bytes at {at} of {}", self.name), e.into())),
        }
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().doing(|| format!("flushing {}", self.name))
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.may_write(0, 0)?;
        if self.device {
            let is = (&self.file).seek(SeekFrom::End(0)).doing(|| format!("asking for the size of {}", self.name))?;
            if is < size {
                return Err(Error::Refused(format!(
                    "the device {} has {is} bytes; enlarge it first, then resize the disk to at most that",
                    self.name
                )));
            }
        } else {
            self.file.set_len(size).doing(|| format!("resizing {} to {size} bytes", self.path.display()))?;
            self.file.sync_all().doing(|| format!("flushing {}", self.name))?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn take_charge(&self) -> Result<()> {
        // Nothing is cached here that the kernel does not keep coherent.
        self.may_write(0, 0)
    }
}

/// Whether `path` may become a new file: never over something that exists.
///
/// # Errors
/// It exists.
pub fn overwrite_check(path: &Path) -> Result<()> {
    if path.exists() {
        return Err(Error::Refused(format!(
            "{} exists already and is not overwritten: choose another name, or remove it yourself",
            path.display()
        )));
    }
    Ok(())
}
