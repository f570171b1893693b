//! What can go wrong, as sentences for the person who has to act.

use std::io;

use understudy_protocol::ids::Generation;

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a disk did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system or device is full. Nothing of the request counts; it can be repeated when there is room.
    #[error("no space left while {doing}: free some or enlarge the file system, then go on")]
    Full {
        /// What was being done, to what.
        doing: String,
    },
    /// The operating system refused.
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, to what.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// A write to something that is read-only.
    #[error("{disk} is read-only")]
    ReadOnly {
        /// Its name.
        disk: String,
    },
    /// A request that no disk could serve: misaligned or beyond the end.
    #[error("a request for {len} bytes at {at} of {disk}: {why}")]
    Request {
        /// The disk's name.
        disk: String,
        /// First byte.
        at: u64,
        /// How many.
        len: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A file became shorter than what was read from it before.
    #[error("{path} shrank from {was} to {is} bytes: somebody truncated it; its end is lost, restore it from a copy")]
    Shrank {
        /// The file.
        path: String,
        /// Bytes that it had.
        was: u64,
        /// Bytes that it has.
        is: u64,
    },
    /// Bytes on storage are not what was written, in a place that counts.
    #[error(
        "{what}; it belongs to a committed epoch, so nothing was used and nothing thrown away: \
         check the storage under it, and restore the disk from a copy if it stays so"
    )]
    Corrupt {
        /// Where, and how it shows.
        what: String,
    },
    /// A higher generation owns the disk. This process must stop using it.
    #[error(
        "{disk} is owned by generation {theirs} on {node} now; this is generation {ours}, which may not write any more"
    )]
    Superseded {
        /// The disk.
        disk: String,
        /// Who has it.
        node: String,
        /// Its generation.
        theirs: Generation,
        /// Ours.
        ours: Generation,
    },
    /// The device refused a write: it is reserved by another, or has forgotten our registration.
    #[error("{disk}: the device is reserved by somebody else, and refuses what this node writes")]
    Preempted {
        /// The disk.
        disk: String,
    },
    /// The disk is somebody else's.
    #[error("{0}")]
    Owned(String),
    /// It cannot be done without losing something, or the caller's and the disk's ideas differ.
    #[error("{0}")]
    Refused(String),
    /// Too much waits to be merged. Nothing of the request counts; repeat it when [`crate::Disk::wait_for_room`] says so.
    #[error("{disk}: {waiting} bytes wait to be merged, the bound is {bound}: the guest waits")]
    Backlog {
        /// The disk.
        disk: String,
        /// Bytes in slices.
        waiting: u64,
        /// The bound.
        bound: u64,
    },
}

impl Error {
    /// An [`io::Error`] with what was being done.
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let doing = doing.into();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Error::Full { doing },
            // What Linux makes of RESERVATION CONFLICT.
            Some(libc::EBADE) => Error::Preempted { disk: doing },
            _ => Error::Io { doing, source },
        }
    }

    /// Whether the same request may succeed later without anybody's doing anything wrong.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Error::Full { .. } | Error::Backlog { .. } | Error::Preempted { .. })
    }
}

/// `result.doing(|| "reading x")`.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|e| Error::io(what(), e))
    }
}
