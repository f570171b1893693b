//! What a guest's disk is read from and written to: an array of bytes in sectors of 512.
//!
//! [`Block`] is implemented by [`Raw`], [`Qcow2`] and [`Iscsi`] (the *base*) and by [`crate::Disk`], which redirects writes in front of one. A
//! device holds an `Arc<dyn Block>` and need not know which it is.
//!
//! Calls block, and may come from several threads at once. Requests that overlap and are in flight together take effect in some order, as on
//! a real disk; when a write has returned, every later read sees it.

mod iscsi;
mod qcow2;
mod raw;
pub mod scsi;

use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use iscsi::{Iscsi, read_chap};
pub use qcow2::{Qcow2, Report};
pub use raw::{Raw, overwrite_check};

use crate::error::{Error, Result};
use crate::reservation::Reservations;

pub use understudy_hostio::iscsi::present as iscsi_is_possible;
pub use understudy_hostio::{After, Buffer, Op};

/// Called with the outcome of what was begun: the buffer, of a read with what was read.
pub type Ended = Box<dyn FnOnce(Result<Buffer>) + Send>;

/// See [`Block::guard`].
pub type Guard = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// How a disk is read and written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct How {
    /// As it is configured, most often: `cache=none,aio=io_uring`.
    pub io: String,
    /// Why it is not as it was to be.
    pub note: Option<String>,
}

/// Whether the host's page cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// Files: yes. Block devices: no.
    #[default]
    Auto,
    /// No (`O_DIRECT`), where that is possible.
    None,
    /// Yes. A guest's flush is a flush all the same.
    Writeback,
}

/// Who waits for reads and writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Aio {
    /// io_uring without the page cache, threads with it: what a cache has takes no waiting.
    #[default]
    Auto,
    /// io_uring, where the host allows it.
    IoUring,
    /// The threads that call.
    Threads,
}

/// How a base is to be read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tuning {
    /// See there.
    pub cache: Cache,
    /// See there.
    pub aio: Aio,
}

/// Bytes in a sector: what offsets and lengths are multiples of.
pub const SECTOR: u64 = 512;

/// Where a write's bytes come from: pieces of the guest's memory, most often.
///
/// A guest may change its memory while it is read. So an implementor is asked once, and what it gave is what gets checksummed and written.
pub trait Gather {
    /// How many bytes.
    fn len(&self) -> usize;
    /// Copy all of them. `to` is exactly [`Gather::len`] long.
    fn gather(&self, to: &mut [u8]);
    /// No bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a read's bytes go.
pub trait Scatter {
    /// How many bytes are wanted.
    fn len(&self) -> usize;
    /// Take all of them. `from` is exactly [`Scatter::len`] long.
    fn scatter(&mut self, from: &[u8]);
    /// No bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Gather for &[u8] {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn gather(&self, to: &mut [u8]) {
        to.copy_from_slice(self);
    }
}

impl Gather for &[IoSlice<'_>] {
    fn len(&self) -> usize {
        self.iter().map(|piece| piece.len()).sum()
    }
    fn gather(&self, mut to: &mut [u8]) {
        for piece in self.iter() {
            let (now, rest) = to.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            to = rest;
        }
    }
}

impl Scatter for &mut [u8] {
    fn len(&self) -> usize {
        (**self).len()
    }
    fn scatter(&mut self, from: &[u8]) {
        self.copy_from_slice(from);
    }
}

impl Scatter for &mut [IoSliceMut<'_>] {
    fn len(&self) -> usize {
        self.iter().map(|piece| piece.len()).sum()
    }
    fn scatter(&mut self, mut from: &[u8]) {
        for piece in self.iter_mut() {
            let (now, rest) = from.split_at(piece.len());
            piece.copy_from_slice(now);
            from = rest;
        }
    }
}

/// An array of bytes that survives power cuts as far as [`Block::flush`] says.
pub trait Block: Send + Sync {
    /// What sentences call it: a path, as a rule.
    fn name(&self) -> &str;

    /// Bytes; a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Whether every write is refused.
    fn read_only(&self) -> bool;

    /// Read all of `to`.
    ///
    /// # Errors
    /// Beyond the end or misaligned; what the storage says; a file that shrank.
    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()>;

    /// Write all of `from`. It need not be durable when this returns.
    ///
    /// # Errors
    /// As for reads; [`Error::Full`] and [`Error::Backlog`] may be repeated.
    fn write_at(&self, at: u64, from: &[u8]) -> Result<()>;

    /// Make `len` bytes read as zeroes; with `unmap` their storage may be given back.
    ///
    /// # Errors
    /// As for writes.
    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()>;

    /// The guest no longer cares for these bytes. They read as zeroes afterwards, so that they read the same on every node.
    ///
    /// # Errors
    /// As for writes.
    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.write_zeroes(at, len, true)
    }

    /// The guest's flush. For a base: everything that was written before is durable when this returns. For what it means in front of
    /// a base, see [`crate::Disk`].
    ///
    /// # Errors
    /// What the storage says. What was written before must then be taken for lost: a second flush proves nothing.
    fn flush(&self) -> Result<()>;

    /// Change the size. Growing adds zeroes; shrinking loses what is behind the new end.
    ///
    /// # Errors
    /// What the storage says; not possible here.
    fn resize(&self, size: u64) -> Result<()>;

    /// This process has the exclusive right to write from now on: open for writing, and forget whatever was cached of the time before.
    ///
    /// # Errors
    /// It cannot be opened for writing.
    fn take_charge(&self) -> Result<()>;

    /// Begin a read or a write and return at once; `ended` is called when it has ended, from any thread, perhaps before this returns. What cannot be begun
    /// that way is given back: the caller does it with the blocking calls. (So an implementor with blocking calls only has nothing to do.)
    fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        Some((op, ended))
    }

    /// `after` is called when what was begun has ended, after each `ended`, or once after several. False: nobody does that here; it is kept only the first time.
    fn after_ended(&self, _after: After) -> bool {
        false
    }

    /// The storage need hear of what was begun only now: many requests at once cost less. To be called after the last one, before waiting for anything.
    fn submit(&self) {}

    /// Whether [`Block::begin`] is worth a try now, for a read or for a write. Cheap.
    fn begins(&self, _write: bool) -> bool {
        false
    }

    /// Whether a read (with [`Block::read_now`]) or a write needs no more than this host's memory, as a rule. Cheap.
    fn quick(&self, _write: bool) -> bool {
        false
    }

    /// Read all of `to` if that is to be had without waiting for storage. False: it is not, or not as a whole; what is in `to` then means nothing, and
    /// [`Block::read_at`] reads it, or says why not.
    fn read_now(&self, _at: u64, _to: &mut [u8]) -> bool {
        false
    }

    /// How it is read and written, for the status.
    fn how(&self) -> How {
        How::default()
    }

    /// Its persistent reservations, if it is a device that has them.
    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        None
    }

    /// Whether other nodes may see the same device, past every file system's locks.
    fn shared_device(&self) -> bool {
        false
    }

    /// `check` is called before anything is written over a new connection to a device, as that may have forgotten our registration; from any thread, and it may take
    /// its time. If it says no, nothing is written any more.
    fn guard(&self, _check: Guard) {}

    /// What its requests wait for, and since when, if they do: a sentence for the status.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Read into pieces of memory.
    ///
    /// # Errors
    /// As [`Block::read_at`].
    fn read(&self, at: u64, to: &mut dyn Scatter) -> Result<()> {
        let mut bytes = vec![0; to.len()];
        self.read_at(at, &mut bytes)?;
        to.scatter(&bytes);
        Ok(())
    }

    /// Write from pieces of memory.
    ///
    /// # Errors
    /// As [`Block::write_at`].
    fn write(&self, at: u64, from: &dyn Gather) -> Result<()> {
        let mut bytes = vec![0; from.len()];
        from.gather(&mut bytes);
        self.write_at(at, &bytes)
    }
}

/// Whether a request makes sense on a disk of this size.
pub(crate) fn admit(disk: &dyn Block, at: u64, len: u64) -> Result<()> {
    let refuse = |why| Err(Error::Request { disk: disk.name().to_owned(), at, len, why });
    if !at.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
        return refuse("it does not begin and end at sectors of 512 bytes");
    }
    match at.checked_add(len) {
        Some(end) if end <= disk.size() => Ok(()),
        _ => refuse("it goes beyond the end of the disk"),
    }
}

/// How the bytes of a disk are laid out in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Byte for byte: a file or a block device.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3, with backing files.
    Qcow2,
}

impl FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(format!("{text:?} is no format; there are raw and qcow2")),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// Open a base. It is opened for reading until [`Block::take_charge`]; with `read_only` for good.
///
/// The format is always said, never guessed: a guest can write a qcow2 header to the first sector of its raw disk, and whoever guessed would
/// open any file of the host as its backing file.
///
/// # Errors
/// It is missing, not of this format, or its backing file is missing.
pub fn open(path: &Path, format: Format, read_only: bool) -> Result<Arc<dyn Block>> {
    open_with(path, format, read_only, Tuning::default())
}

/// The same, and how. (A qcow2 file is always read and written through the page cache, by threads.)
///
/// # Errors
/// As [`open`].
pub fn open_with(path: &Path, format: Format, read_only: bool, tuning: Tuning) -> Result<Arc<dyn Block>> {
    Ok(match format {
        Format::Raw => Arc::new(Raw::open_with(path, read_only, tuning)?),
        Format::Qcow2 => Arc::new(Qcow2::open(path, read_only)?),
    })
}
