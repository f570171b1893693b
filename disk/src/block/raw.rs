//! A disk byte for byte in a file or on a block device.
//!
//! Through the host's page cache or past it ([`Cache`]), with io_uring or with the callers' own threads ([`Aio`]). What cannot be had is not an error: the
//! disk works the other way, and [`Block::how`] says how and why.
//!
//! A block device that several nodes see is never read through this node's page cache: what it cached of the time when another node wrote would be stale.
//! [`Block::take_charge`] also empties what others on this node (udev, LVM) had cached.
//!
//! Zeroes and discards are `fallocate`'s on files and devices alike: the kernel turns it into `BLKZEROOUT`, with or without deallocation. `BLKDISCARD`
//! itself is not used: what reads back after it is the device's choice, and must be the same on every node.

use std::fs::{File, OpenOptions};
use std::io::{IoSliceMut, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use rustix::io::ReadWriteFlags;
use understudy_hostio::{Buffer, Op, Ring, device};

use super::{After, Aio, Block, Cache, Ended, How, SECTOR, Tuning, admit, scsi};
use crate::error::{Doing, Error, Result};
use crate::reservation::{Held, Key, Reservations, parse_held, parse_keys};

/// A raw disk.
pub struct Raw {
    path: PathBuf,
    name: String,
    file: Arc<File>,
    device: bool,
    /// Opened with `O_DIRECT`.
    direct: bool,
    /// Its file system has no storage (and no `RWF_NOWAIT`).
    in_memory: bool,
    ring: Option<Ring>,
    /// Why it is not as it was to be.
    note: Option<String>,
    read_only: bool,
    size: Arc<AtomicU64>,
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").field("path", &self.path).field("how", &self.how()).finish_non_exhaustive()
    }
}

/// Past the page cache, if requests of one sector are possible that way: guests ask for sectors, and a larger one would have to be read, changed and
/// written, with whatever a neighbour writes meanwhile.
fn open_direct(options: &OpenOptions, path: &Path) -> std::result::Result<File, String> {
    let mut options = options.clone();
    let file = options.custom_flags(nix::libc::O_DIRECT).open(path).map_err(|e| format!("O_DIRECT is refused: {e}"))?;
    let mut sector = Buffer::new(SECTOR as usize);
    match file.read_at(&mut sector, SECTOR) {
        Ok(_) => Ok(file),
        Err(e) if e.raw_os_error() == Some(nix::libc::EINVAL) => {
            Err("O_DIRECT is not possible in sectors of 512 bytes there".into())
        }
        // That is for the guest's own read to find.
        Err(_) => Ok(file),
    }
}

impl Raw {
    /// Open an existing file or block device as is usual for it.
    ///
    /// # Errors
    /// As [`Raw::open_with`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        Self::open_with(path, read_only, Tuning::default())
    }

    /// Open an existing file or block device.
    ///
    /// # Errors
    /// It does not exist, may not be opened, or is no whole number of sectors long.
    pub fn open_with(path: &Path, read_only: bool, tuning: Tuning) -> Result<Self> {
        let name = path.display().to_string();
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        let mut file = options.open(path).doing(|| format!("opening the disk {name}"))?;
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
        let (mut direct, mut notes) = (false, Vec::new());
        if tuning.cache == Cache::None || tuning.cache == Cache::Auto && device {
            match open_direct(&options, path) {
                Ok(without_cache) => (file, direct) = (without_cache, true),
                Err(why) => notes.push(format!("it is read and written through the page cache: {why}")),
            }
        }
        let mut ring = None;
        if tuning.aio == Aio::IoUring || tuning.aio == Aio::Auto && direct {
            match Ring::new() {
                Ok(made) => ring = Some(made),
                Err(e) => notes.push(format!("it is served by threads: this host allows no io_uring ({e})")),
            }
        }
        let note = (!notes.is_empty()).then(|| format!("{name}: {}", notes.join("; ")));
        let size = Arc::new(AtomicU64::new(size));
        let in_memory = fstatfs(&file).is_ok_and(|on| on.filesystem_type() == TMPFS_MAGIC);
        Ok(Raw {
            path: path.to_owned(),
            name,
            file: Arc::new(file),
            device,
            direct,
            in_memory,
            ring,
            note,
            read_only,
            size,
        })
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
        let mut zeroes = Buffer::new(1 << 16);
        zeroes.fill(0);
        let end = at + len;
        while at < end {
            let now = (end - at).min(zeroes.len() as u64);
            self.write_at(at, &zeroes[..now as usize])?;
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
        if self.direct && !Buffer::aligned(to) {
            let mut aligned = Buffer::new(to.len());
            read_exact(&self.file, &self.name, &self.size, at, &mut aligned)?;
            to.copy_from_slice(&aligned);
            return Ok(());
        }
        read_exact(&self.file, &self.name, &self.size, at, to)
    }

    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.may_write(at, from.len() as u64)?;
        if self.direct && !Buffer::aligned(from) {
            return write_all(&self.file, &self.name, at, &Buffer::copy(from));
        }
        write_all(&self.file, &self.name, at, from)
    }

    fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        let Some(ring) = &self.ring else { return Some((op, ended)) };
        let (write, at, wanted) = match &op {
            Op::Read { at, to } => (false, *at, to.len()),
            Op::Write { at, from } => (true, *at, from.len()),
        };
        // What is refused is refused in one place, by the blocking call.
        if wanted == 0 || admit(self, at, wanted as u64).is_err() || write && self.read_only {
            return Some((op, ended));
        }
        // The ring keeps its own handle of the file as long as the kernel has it.
        let (file, name, size) = (self.file.clone(), self.name.clone(), self.size.clone());
        // Whichever of the two is called has it: what the ring gives back is called by nobody else.
        let ended = Arc::new(std::sync::Mutex::new(Some(ended)));
        let theirs = ended.clone();
        let take =
            |of: &std::sync::Mutex<Option<Ended>>| of.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let done = Box::new(move |result: std::io::Result<usize>, mut buffer: Buffer| {
            let Some(ended) = take(&theirs) else { return };
            let result = match result {
                Ok(n) if n == wanted => Ok(()),
                // A signal, the end of an extent: rare, so the rest in the plain way.
                Ok(n) if write => write_all(&file, &name, at + n as u64, &buffer[n.min(wanted)..]),
                Ok(n) => read_exact(&file, &name, &size, at + n as u64, &mut buffer[n.min(wanted)..]),
                Err(e) => Err(Error::io(doing(write, wanted, at, &name), e)),
            };
            ended(result.map(|()| buffer));
        });
        match ring.queue(&self.file, op, done) {
            Ok(()) => None,
            Err((op, _)) => take(&ended).map(|ended| (op, ended)),
        }
    }

    fn after_ended(&self, after: After) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.after(after))
    }

    fn submit(&self) {
        if let Some(ring) = &self.ring {
            ring.submit();
        }
    }

    fn begins(&self, _write: bool) -> bool {
        self.ring.is_some()
    }

    fn quick(&self, _write: bool) -> bool {
        !self.direct && !self.device
    }

    fn read_now(&self, at: u64, to: &mut [u8]) -> bool {
        let flags = if self.in_memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
        let wanted = to.len();
        let mut read = || rustix::io::preadv2(&*self.file, &mut [IoSliceMut::new(to)], at, flags);
        self.quick(false) && admit(self, at, wanted as u64).is_ok() && read() == Ok(wanted)
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        if !self.device || self.read_only {
            return None;
        }
        let device = Arc::new(DeviceReservations { file: self.file.clone(), name: self.name.clone() });
        // A device that cannot tell its keys has none for us.
        device.keys().is_ok().then_some(device as Arc<dyn Reservations>)
    }

    fn shared_device(&self) -> bool {
        self.device
    }

    fn how(&self) -> How {
        let (cache, aio) =
            (if self.direct { "none" } else { "writeback" }, if self.ring.is_some() { "io_uring" } else { "threads" });
        How { io: format!("cache={cache},aio={aio}"), note: self.note.clone() }
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.may_write(at, len)?;
        if len == 0 {
            return Ok(());
        }
        let punch = unmap.then_some(FallocateFlags::FALLOC_FL_PUNCH_HOLE);
        for how in punch.into_iter().chain([FallocateFlags::FALLOC_FL_ZERO_RANGE]) {
            match fallocate(&self.file, how | FallocateFlags::FALLOC_FL_KEEP_SIZE, at as i64, len as i64) {
                Ok(()) => return Ok(()),
                // Many file systems and devices have neither.
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL | Errno::EPERM) => {}
                Err(e) => return Err(Error::io(format!("clearing {len} bytes at {at} of {}", self.name), e.into())),
            }
        }
        // Zeroes can always be written.
        self.zeroes_by_hand(at, len)
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
            let is = (&*self.file).seek(SeekFrom::End(0)).doing(|| format!("asking for the size of {}", self.name))?;
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
        self.may_write(0, 0)?;
        if self.device {
            // Of the time when another node wrote it. (Of a file, the shared file system takes care.)
            device::forget_cache(&self.file).doing(|| format!("emptying this node's cache of {}", self.name))?;
        }
        Ok(())
    }
}

/// What the kernel does for a device with persistent reservations.
struct DeviceReservations {
    file: Arc<File>,
    name: String,
}

impl DeviceReservations {
    fn read<T>(&self, action: u8, parse: impl Fn(&[u8]) -> std::result::Result<T, &'static str>) -> Result<T> {
        let mut data = vec![0; 8 << 10];
        let doing = || format!("reading the reservations of {}", self.name);
        let got =
            device::scsi_read(&self.file, &scsi::reserve_in(action, data.len()), &mut data, PATIENCE).doing(doing)?;
        parse(&data[..got]).map_err(|why| Error::Io { doing: doing(), source: std::io::Error::other(why) })
    }
    /// Register; whether that survives the device's loss of power.
    fn enrol(&self, key: u64, doing: &str) -> Result<bool> {
        match device::register(&self.file, key) {
            // The kernel asks for APTPL, and it cannot keep registrations beyond a loss of power.
            Err(e) if refused(&e) => {
                let (cdb, parameters) = scsi::reserve_out(scsi::REGISTER_AND_IGNORE, 0, key, false);
                let done = device::scsi_write(&self.file, &cdb, &parameters, PATIENCE);
                self.conflict(done, doing).map(|()| false)
            }
            result => self.conflict(result, doing).map(|()| true),
        }
    }
    fn conflict(&self, result: std::io::Result<()>, doing: &str) -> Result<()> {
        result.map_err(|e| match e.raw_os_error() {
            Some(nix::libc::EBADE) => Error::Preempted { disk: self.name.clone() },
            _ => Error::io(format!("{doing} {}", self.name), e),
        })
    }
}

/// What the kernel makes of a field that the device does not know.
fn refused(e: &std::io::Error) -> bool {
    e.raw_os_error() == Some(nix::libc::EINVAL)
}

impl Reservations for DeviceReservations {
    fn keys(&self) -> Result<Vec<Key>> {
        self.read(scsi::READ_KEYS, parse_keys)
    }
    fn held(&self) -> Result<Option<Held>> {
        self.read(scsi::READ_RESERVATION, parse_held)
    }
    fn register(&self, key: Key) -> Result<bool> {
        self.enrol(key.0, "registering with")
    }
    fn reserve(&self, key: Key) -> Result<()> {
        self.conflict(device::reserve(&self.file, key.0), "reserving")
    }
    fn preempt_and_abort(&self, key: Key, other: Key) -> Result<()> {
        let preempted = match device::preempt_and_abort(&self.file, key.0, other.0) {
            // A target that has only half of it (tgt) does the other half when it is asked for it.
            Err(e) if refused(&e) => {
                device::preempt(&self.file, key.0, other.0).and_then(|()| device::reset_unit(&self.file))
            }
            other => other,
        };
        self.conflict(preempted, "preempting an earlier owner of")
    }
    fn unregister(&self, _: Key) -> Result<()> {
        self.enrol(0, "withdrawing from").map(drop)
    }
}

/// How long a device may take to tell its reservations.
const PATIENCE: Duration = Duration::from_secs(30);

fn doing(write: bool, len: usize, at: u64, name: &str) -> String {
    format!("{} {len} bytes at {at} of {name}", if write { "writing" } else { "reading" })
}

fn read_exact(file: &File, name: &str, size: &AtomicU64, at: u64, to: &mut [u8]) -> Result<()> {
    match file.read_exact_at(to, at) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
            let mut file = file;
            let is = file.seek(SeekFrom::End(0)).doing(|| format!("asking for the size of {name}"))?;
            Err(Error::Shrank { path: name.to_owned(), was: size.load(Ordering::Acquire), is })
        }
        Err(e) => Err(Error::io(doing(false, to.len(), at, name), e)),
    }
}

fn write_all(file: &File, name: &str, at: u64, from: &[u8]) -> Result<()> {
    file.write_all_at(from, at).doing(|| doing(true, from.len(), at, name))
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
