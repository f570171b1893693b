//! Batches in, whole pages out: the receiver's end.

use std::fmt;

use super::batch::{BatchError, Head};
use super::method::Method;
use super::record::{Record, Records};
use super::{EpochDigest, PAGE, Page, PageHash, page_hash};

/// Where decoded pages go, and where earlier ones are: a stage over RAM, or RAM itself in a first copy.
pub trait Target {
    /// What can go wrong there; also carries what is wrong with a batch.
    type Error: From<BatchError>;
    /// The content of page `index` as all pages given so far have made it.
    fn read(&mut self, index: u64, page: &mut Page) -> Result<(), Self::Error>;
    /// Page `index` has this content now.
    fn page(&mut self, index: u64, content: &Page, hash: PageHash) -> Result<(), Self::Error>;
    /// `count` pages from `index` on are zero now.
    fn zeros(&mut self, index: u64, count: u64) -> Result<(), Self::Error>;
}

/// Decodes the batches of one epoch after the other.
#[derive(Default)]
pub struct Decoder {
    digest: EpochDigest,
    seed: Option<u64>,
    plain: Vec<u8>,
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("digest", &self.digest).field("seed", &self.seed).finish_non_exhaustive()
    }
}

impl Decoder {
    /// Forget what has come of an epoch.
    pub fn begin(&mut self) {
        self.digest = EpochDigest::default();
        self.seed = None;
    }

    /// The digest over what has come since [`Self::begin`] or its last `finish`.
    pub fn digest(&mut self) -> &mut EpochDigest {
        &mut self.digest
    }

    /// The seed of the page hashes; zero before the first batch.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(0)
    }

    /// Decode one batch into `target`. After an error the epoch is lost.
    pub fn batch<T: Target>(&mut self, batch: &[u8], ram_pages: u64, target: &mut T) -> Result<(), T::Error> {
        let (head, body) = Head::parse(batch)?;
        if *self.seed.get_or_insert(head.seed) != head.seed {
            return Err(BatchError::Seed.into());
        }
        let mut plain = std::mem::take(&mut self.plain);
        let decoded = match head.method {
            Method::Plain => self.records(head, body, ram_pages, target),
            Method::Lz4 | Method::Zstd => match self.decompress(head, body, &mut plain) {
                Ok(()) => self.records(head, &plain, ram_pages, target),
                Err(e) => Err(e.into()),
            },
        };
        self.plain = plain;
        decoded
    }

    fn decompress(&mut self, head: Head, body: &[u8], plain: &mut Vec<u8>) -> Result<(), BatchError> {
        // `parse` has bounded it.
        let len = head.plain_len as usize;
        plain.resize(len, 0);
        let made = if head.method == Method::Lz4 {
            lz4_flex::block::decompress_into(body, plain).ok()
        } else {
            if self.zstd.is_none() {
                self.zstd = zstd::bulk::Decompressor::new().ok();
            }
            self.zstd.as_mut().and_then(|zstd| zstd.decompress_to_buffer(body, &mut plain[..]).ok())
        };
        if made == Some(len) { Ok(()) } else { Err(BatchError::Compression(head.plain_len)) }
    }

    fn records<T: Target>(&mut self, head: Head, body: &[u8], ram_pages: u64, target: &mut T) -> Result<(), T::Error> {
        let mut page = [0; PAGE];
        let mut found = 0;
        for record in Records::new(body, ram_pages) {
            found += 1;
            match record? {
                Record::Raw { index, content } => self.page(index, content, head.seed, target)?,
                Record::Zeros { index, count } => {
                    found += count - 1;
                    self.digest.zeros(index, count);
                    target.zeros(index, count)?;
                }
                Record::Delta { index, delta } => {
                    target.read(index, &mut page)?;
                    delta.apply(&mut page);
                    self.page(index, &page, head.seed, target)?;
                }
                Record::Sparse { index, delta } => {
                    page.fill(0);
                    delta.apply(&mut page);
                    self.page(index, &page, head.seed, target)?;
                }
                Record::Same { index, source } => {
                    target.read(source, &mut page)?;
                    self.page(index, &page, head.seed, target)?;
                }
                Record::Check { index } => {
                    target.read(index, &mut page)?;
                    self.digest.page(index, page_hash(head.seed, &page));
                }
            }
        }
        if found != u64::from(head.pages) {
            return Err(BatchError::Count { announced: head.pages, found }.into());
        }
        Ok(())
    }

    fn page<T: Target>(&mut self, index: u64, content: &Page, seed: u64, target: &mut T) -> Result<(), T::Error> {
        let hash = page_hash(seed, content);
        self.digest.page(index, hash);
        target.page(index, content, hash)
    }
}
