//! Records: what a batch says of each page.
//!
//! ```text
//! record = head, body       head = u64 LE: kind in the top 8 bits, page index in the lower 56
//! kind 0  raw               body = 4096 bytes
//! kind 2  zero pages        body = u32 LE count (>= 1): pages index .. index + count are all zero
//! kind 3  delta             body = as in `delta`: the words that differ from the page as it stood before
//! kind 4  same as           body = u64 LE: the page has the content that this other page has by now
//! kind 5  check             no body: the page is as it was; both ends take its content into the digest
//! kind 6  sparse            body = as in `delta`: the words that differ from a page of zeros
//! ```
//! (Kind 1 was a page compressed by itself; version 1 of the protocol sent it.) Records are decoded in order, each over what
//! all before it have made: "as it stood before" and "by now" mean that. A page may occur more than once; the last counts.
//! [`Records`] takes any bytes: what it gives lies within them and within RAM, and it ends after the first error.

use super::batch::BatchError;
use super::delta::Delta;
use super::{PAGE, Page};

/// Bytes of a record's head.
pub const HEAD: usize = 8;

const KIND_SHIFT: u32 = 56;
const INDEX_MASK: u64 = (1 << KIND_SHIFT) - 1;

/// Numbers of the kinds.
pub mod kind {
    #![allow(missing_docs)]
    pub const RAW: u8 = 0;
    pub const ZERO: u8 = 2;
    pub const DELTA: u8 = 3;
    pub const SAME: u8 = 4;
    pub const CHECK: u8 = 5;
    pub const SPARSE: u8 = 6;
}

/// A record's head. Page indices are below 2^56 (RAM sizes are); higher bits are cut off.
pub fn head(kind: u8, index: u64) -> [u8; HEAD] {
    (u64::from(kind) << KIND_SHIFT | index & INDEX_MASK).to_le_bytes()
}

/// One record, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The module doc says what they mean.
pub enum Record<'a> {
    Raw { index: u64, content: &'a Page },
    Zeros { index: u64, count: u64 },
    Delta { index: u64, delta: Delta<'a> },
    Same { index: u64, source: u64 },
    Check { index: u64 },
    Sparse { index: u64, delta: Delta<'a> },
}

/// The records of a batch's plain body.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    rest: &'a [u8],
    ram_pages: u64,
}

impl<'a> Records<'a> {
    /// Over a plain body; a page at or beyond `ram_pages` is an error.
    pub fn new(body: &'a [u8], ram_pages: u64) -> Self {
        Self { rest: body, ram_pages }
    }

    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], BatchError> {
        let (front, rest) = self.rest.split_first_chunk::<N>().ok_or(BatchError::Truncated)?;
        self.rest = rest;
        Ok(front)
    }

    fn check(&self, index: u64, count: u64) -> Result<(), BatchError> {
        if count == 0 || count > self.ram_pages || index > self.ram_pages - count {
            return Err(BatchError::Range { index, count, ram_pages: self.ram_pages });
        }
        Ok(())
    }

    fn record(&mut self) -> Result<Record<'a>, BatchError> {
        let head = u64::from_le_bytes(*self.take()?);
        let (kind, index) = ((head >> KIND_SHIFT) as u8, head & INDEX_MASK);
        if kind == kind::ZERO {
            let count = u64::from(u32::from_le_bytes(*self.take()?));
            self.check(index, count)?;
            return Ok(Record::Zeros { index, count });
        }
        self.check(index, 1)?;
        match kind {
            kind::RAW => Ok(Record::Raw { index, content: self.take::<PAGE>()? }),
            kind::DELTA | kind::SPARSE => {
                let (delta, rest) = Delta::parse(self.rest).ok_or(BatchError::Delta(index))?;
                self.rest = rest;
                let sparse = kind == kind::SPARSE;
                Ok(if sparse { Record::Sparse { index, delta } } else { Record::Delta { index, delta } })
            }
            kind::SAME => {
                let source = u64::from_le_bytes(*self.take()?);
                self.check(source, 1)?;
                Ok(Record::Same { index, source })
            }
            kind::CHECK => Ok(Record::Check { index }),
            other => Err(BatchError::Kind(other)),
        }
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Record<'a>, BatchError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let record = self.record();
        if record.is_err() {
            self.rest = &[];
        }
        Some(record)
    }
}
