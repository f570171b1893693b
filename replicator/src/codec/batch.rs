//! A batch: the payload of one message with pages.
//!
//! ```text
//! 0        1        4          8            12       16          24
//! ┌────────┬────────┬──────────┬────────────┬────────┬───────────┬────────┐
//! │ method │ 0 0 0  │ pages    │ plain len  │ 0      │ hash seed │ body … │
//! │ u8     │        │ u32      │ u32        │ u32    │ u64       │        │
//! └────────┴────────┴──────────┴────────────┴────────┴───────────┴────────┘
//! method 0  body = records ([`super::record`])
//! method 1  body = one LZ4 block of them        plain len = bytes of records in either case,
//! method 2  body = one zstd frame of them                   at most [`PLAIN_LIMIT`]
//! ```
//! All numbers are little endian. `pages` is how many pages the records name; the decoder compares it. The seed is the one of the
//! page hashes: random, told to the receiver, never seen by the guest, so that nobody inside can make two pages of
//! one hash. Bytes of a batch are not believed before the epoch's digest agrees: every length and index is checked.

use thiserror::Error;

use super::method::Method;

/// Bytes before the body.
pub const HEAD: usize = 24;
/// Most bytes of records in one batch: what one frame can carry when nothing compresses.
pub const PLAIN_LIMIT: usize = (1 << 20) - HEAD;

/// Why a batch cannot be what a sender wrote.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BatchError {
    /// It ends inside its head or a record.
    #[error("a batch of pages ends in the middle of a record")]
    Truncated,
    /// A record of a kind that this version does not know.
    #[error("a batch of pages holds a record of unknown kind {0}")]
    Kind(u8),
    /// A page beyond the end of RAM, or an empty run.
    #[error("a batch of pages names {count} pages from {index}, but RAM has {ram_pages}")]
    Range {
        /// First page.
        index: u64,
        /// Number of pages.
        count: u64,
        /// Pages in RAM.
        ram_pages: u64,
    },
    /// A delta that changes nothing, or says so of a part.
    #[error("the delta of page {0} is malformed")]
    Delta(u64),
    /// A compression that this version does not know.
    #[error("a batch of pages is compressed by unknown method {0}")]
    Method(u8),
    /// Compressed data that is not what its head says.
    #[error("a batch of pages does not decompress to the {0} bytes that it announces")]
    Compression(u32),
    /// The head's page count is wrong.
    #[error("a batch of pages announces {announced} pages and holds {found}")]
    Count {
        /// In the head.
        announced: u32,
        /// In the records.
        found: u64,
    },
    /// The seed changed within an epoch.
    #[error("a batch of pages has another hash seed than those before it")]
    Seed,
}

/// A batch's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// How the body is compressed.
    pub method: Method,
    /// Pages named by the records (a run counts each of its pages).
    pub pages: u32,
    /// Bytes of records.
    pub plain_len: u32,
    /// Seed of the page hashes.
    pub seed: u64,
}

impl Head {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[0] = self.method as u8;
        bytes[4..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.plain_len.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seed.to_le_bytes());
        bytes
    }

    /// Split a batch into head and body. Looks at nothing but the head.
    pub fn parse(batch: &[u8]) -> Result<(Self, &[u8]), BatchError> {
        let (head, body) = batch.split_first_chunk::<HEAD>().ok_or(BatchError::Truncated)?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let method = Method::from_byte(head[0]).ok_or(BatchError::Method(head[0]))?;
        let plain_len = word(8);
        let fits = match method {
            Method::Plain => plain_len as usize == body.len(),
            Method::Lz4 | Method::Zstd => plain_len as usize <= PLAIN_LIMIT,
        };
        if !fits {
            return Err(BatchError::Compression(plain_len));
        }
        let seed = u64::from(word(16)) | u64::from(word(20)) << 32;
        Ok((Self { method, pages: word(4), plain_len, seed }, body))
    }
}

/// How many pages a batch names, by its head: for those who count without decoding.
pub fn pages(batch: &[u8]) -> Result<u64, BatchError> {
    Head::parse(batch).map(|(head, _)| u64::from(head.pages))
}
