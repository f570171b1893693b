//! The log on its way: read from the primary's slices while they grow, and checked record by record where it arrives.

use serde::{Deserialize, Serialize};

use super::SliceLabel;
use crate::disk::Disk;
use crate::error::Result;
use crate::record::Tag;

/// A piece of a slice's log; pieces of one disk are to arrive in the order in which they were read. Records may be split anywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPiece {
    /// Of which slice.
    pub slice: SliceLabel,
    /// Where in its log.
    pub offset: u64,
    /// What stands there.
    pub bytes: Vec<u8>,
    /// The slice is closed, and this was the last of it.
    pub closed: Option<Tag>,
}

/// Reads what a copy lacks, slice by slice, also from the one that is being written.
#[derive(Debug, Clone)]
pub struct LogReader {
    /// Everything up to this slice was read whole.
    pub after: u64,
    /// So much of the next one was read.
    pub offset: u64,
}

impl LogReader {
    /// From the slice behind `after` on.
    pub fn new(after: Tag) -> Self {
        LogReader { after: after.serial, offset: 0 }
    }

    /// The next piece, of at most `most` bytes; `None`: there is nothing more now. Never waits for a write, never makes one wait for storage.
    ///
    /// After a cut all pieces up to it must have been read (until `None`, or until one is closed with the cut's tag) before the epoch's end is sent.
    ///
    /// # Errors
    /// What the storage says; what is wanted was merged already.
    pub fn next(&mut self, disk: &Disk, most: usize) -> Result<Option<LogPiece>> {
        disk.read_log(self, most)
    }
}
