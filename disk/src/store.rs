//! The directory beside a disk in which slices and the ownership record are kept, seen through a trait: the real one, and one in memory that tears
//! and forgets ([`crate::sim`] in the tests).
//!
//! What is asked of a file system: what was synced stays; an entry of a directory that was synced stays; a rename shows the old or the new
//! file; a lock is held by one open file at a time, on all nodes that mount it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A file that is written here and there and read here and there.
pub trait LogFile: Send + Sync {
    /// Read up to `to.len()` bytes; fewer only at the end of the file.
    ///
    /// # Errors
    /// What the storage says.
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<usize>;
    /// Write all of `from`.
    ///
    /// # Errors
    /// What the storage says; any part may have been written.
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()>;
    /// All writes so far are durable, and the length is.
    ///
    /// # Errors
    /// What the storage says. What was written before must then be taken for lost.
    fn sync(&self) -> io::Result<()>;
    /// Bytes in it.
    ///
    /// # Errors
    /// What the storage says.
    fn size(&self) -> io::Result<u64>;
    /// Cut off what is behind `len`.
    ///
    /// # Errors
    /// What the storage says.
    fn truncate(&self, len: u64) -> io::Result<()>;
}

/// Holds a lock until it is dropped.
pub trait Lock: Send + Sync {}

/// A directory of log files.
pub trait Directory: Send + Sync {
    /// What sentences call it.
    fn name(&self) -> String;
    /// Make a file that must not exist.
    ///
    /// # Errors
    /// It exists; what the storage says.
    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// Open a file, for reading and, where that is allowed, writing.
    ///
    /// # Errors
    /// It does not exist; what the storage says.
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// Give a file another name. What had that name is gone.
    ///
    /// # Errors
    /// It does not exist; what the storage says.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Remove a file.
    ///
    /// # Errors
    /// It does not exist; what the storage says.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Names of all files, in any order.
    ///
    /// # Errors
    /// What the storage says.
    fn list(&self) -> io::Result<Vec<String>>;
    /// All names are durable as they are now.
    ///
    /// # Errors
    /// What the storage says.
    fn sync(&self) -> io::Result<()>;
    /// Take a lock of that name, exclusively; `None` if another has had it all the time. One that its holder's death did not release
    /// (its host is frozen, or a server still grants it) is another's.
    ///
    /// # Errors
    /// Locks do not work here.
    fn lock(&self, name: &str, patience: Duration) -> io::Result<Option<Box<dyn Lock>>>;

    /// All of a small file; `None` if there is none.
    ///
    /// # Errors
    /// What the storage says.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(name) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = vec![0; usize::try_from(file.size()?.min(1 << 20)).unwrap_or(0)];
        let got = file.read_at(0, &mut bytes)?;
        bytes.truncate(got);
        Ok(Some(bytes))
    }

    /// Put `bytes` into a file of that name: durably, and at no time something between old and new.
    ///
    /// # Errors
    /// What the storage says; the file is then the old or the new one.
    fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let temporary = format!("{name}.new");
        match self.remove(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = self.create(&temporary)?;
        file.write_at(0, bytes)?;
        file.sync()?;
        self.rename(&temporary, name)?;
        self.sync()
    }
}

/// A directory of a file system, local or shared (NFS, a cluster file system).
#[derive(Debug)]
pub struct LocalDirectory {
    path: PathBuf,
    writable: bool,
}

impl LocalDirectory {
    /// Where the slices of the disk at `disk` are kept unless it is said otherwise: `<disk>.row` beside it.
    pub fn beside(disk: &Path) -> PathBuf {
        let mut name = disk.as_os_str().to_owned();
        name.push(".row");
        name.into()
    }

    /// Use a directory; it is made if it is missing (its parent is not).
    ///
    /// # Errors
    /// What the file system says.
    pub fn make(path: &Path) -> io::Result<Self> {
        match fs::create_dir(path) {
            Ok(()) => sync_parent(path)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            Err(e) => return Err(e),
        }
        Ok(LocalDirectory { path: path.to_owned(), writable: true })
    }

    /// Use a directory for looking only.
    ///
    /// # Errors
    /// There is none.
    pub fn look(path: &Path) -> io::Result<Self> {
        fs::read_dir(path)?;
        Ok(LocalDirectory { path: path.to_owned(), writable: false })
    }
}

/// The directory in which `path` is remembers its entries durably.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

impl LogFile for File {
    fn read_at(&self, mut at: u64, mut to: &mut [u8]) -> io::Result<usize> {
        let mut got = 0;
        while !to.is_empty() {
            match FileExt::read_at(self, to, at) {
                Ok(0) => break,
                Ok(n) => {
                    got += n;
                    at += n as u64;
                    to = &mut to[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(got)
    }
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.write_all_at(from, at)
    }
    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

/// Held by an open file description: neither a thread nor a second opening of the file in this process can give it away by accident.
struct FileLock(#[expect(dead_code, reason = "closing it releases the lock")] File);

impl Lock for FileLock {}

impl Directory for LocalDirectory {
    fn name(&self) -> String {
        self.path.display().to_string()
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(true).create_new(true).open(self.path.join(name))?))
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(OpenOptions::new().read(true).write(self.writable).open(self.path.join(name))?))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }
    fn list(&self) -> io::Result<Vec<String>> {
        // A name that is not UTF-8 is none of ours.
        fs::read_dir(&self.path)?.filter_map(|e| e.map(|e| e.file_name().into_string().ok()).transpose()).collect()
    }
    fn sync(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
    fn lock(&self, name: &str, patience: Duration) -> io::Result<Option<Box<dyn Lock>>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(self.path.join(name))?;
        let whole = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        let until = Instant::now() + patience;
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
                Ok(_) => return Ok(Some(Box::new(FileLock(file)))),
                Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() >= until => return Ok(None),
                // The kernel can wait, but not for so long and no longer.
                Err(Errno::EAGAIN | Errno::EACCES) => thread::sleep(Duration::from_millis(5)),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
