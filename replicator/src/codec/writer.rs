//! Pages in, batches out: the sender's end. Called by the driver for every page that was written, after the guest has resumed.
//!
//! The writer owns the [`Shadow`]. It has no clock: whoever sends tells it how long that took ([`BatchWriter::sent`]), and how
//! long compressing took is measured in [`BatchWriter::seal`].

use std::fmt;
use std::time::Instant;

use super::batch::{self, Head};
use super::method::{Chooser, Method};
use super::record::{self, kind};
use super::{EpochDigest, PAGE, Page, PageHash, delta, is_zero, page_hash};
use crate::shadow::{Known, Shadow};

/// What an administrator may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodingConfig {
    /// Most memory for copies of what was sent.
    pub shadow: ShadowBudget,
    /// Whether batches are compressed.
    pub compression: Compression,
}

impl Default for EncodingConfig {
    fn default() -> Self {
        Self { shadow: ShadowBudget::Percent(25), compression: Compression::Auto }
    }
}

/// Most memory for copies of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShadowBudget {
    /// Of the machine's RAM; 0 to 100.
    Percent(u8),
    /// MiB.
    Mib(u64),
}

impl ShadowBudget {
    /// In pages, for a machine of so many.
    pub fn pages(self, ram_pages: u64) -> u64 {
        match self {
            Self::Percent(percent) => (u128::from(ram_pages) * u128::from(percent.min(100)) / 100) as u64,
            Self::Mib(mib) => mib.saturating_mul((1 << 20) / PAGE as u64).min(ram_pages),
        }
    }
}

/// Whether batches are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As the link demands.
    Auto,
    /// Always by this method.
    Always(Method),
}

/// Bytes at each stage, since the writer exists. (Records' heads count from `changed` on.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Pages given, in bytes.
    pub raw: u64,
    /// Without those that were unchanged or zero.
    pub changed: u64,
    /// After deltas and duplicates: what the batches' records take.
    pub encoded: u64,
    /// After compression, if any: the batches.
    pub batches: u64,
    /// Pages: as they were.
    pub unchanged_pages: u64,
    /// Pages: zero.
    pub zero_pages: u64,
    /// Pages: by what changed.
    pub delta_pages: u64,
    /// Pages: like another.
    pub same_pages: u64,
    /// Pages: whole.
    pub raw_pages: u64,
}

/// One in so many unchanged pages is named, so that the receiver looks at its own.
const CHECK_EVERY: u64 = 16;
/// A delta of at most so many bytes is not worth the look for a twin.
const SMALL_DELTA: usize = 64;
static ZEROS: Page = [0; PAGE];
/// Batches below this are not worth compressing.
const WORTH: usize = 1024;
/// What a method is tried on.
const SAMPLE: usize = 16 << 10;
/// Encodes pages into a batch.
#[derive(Default)]
pub struct BatchWriter {
    /// The batch: head, then records; after [`Self::seal`] perhaps compressed.
    bytes: Vec<u8>,
    spare: Vec<u8>,
    /// The zero run that is still growing: where its count stands and the next page that would extend it.
    run: Option<(usize, u64)>,
    /// Pages given since [`Self::clear`], and those that records name.
    pages: u64,
    named: u32,
    seed: u64,
    shadow: Option<Box<Shadow>>,
    compression: Option<Compression>,
    chooser: Chooser,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    statistics: Statistics,
}

impl fmt::Debug for BatchWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchWriter")
            .field("pages", &self.pages)
            .field("bytes", &self.bytes.len())
            .field("chooser", &self.chooser)
            .field("statistics", &self.statistics)
            .finish_non_exhaustive()
    }
}

impl BatchWriter {
    /// A first copy begins: the receiver of RAM of `ram_pages` has nothing. `seed` should be random.
    ///
    /// Without this nothing is known of the receiver, and pages travel whole.
    pub fn restart(&mut self, ram_pages: u64, config: &EncodingConfig, seed: u64) {
        self.clear();
        // Its memory goes before the next takes some.
        self.shadow = None;
        self.shadow = Some(Box::new(Shadow::new(ram_pages, config.shadow.pages(ram_pages))));
        self.seed = seed;
        self.compression = Some(config.compression);
    }

    /// The receiver has forgotten some of what it was sent: from here on nothing counts as known to it. What was encoded before keeps
    /// its meaning, and so does the seed.
    pub fn forget_receiver(&mut self) {
        self.clear();
        if let Some(shadow) = &mut self.shadow {
            shadow.forget_all();
        }
    }

    /// Add page `index` and take it into `digest`.
    ///
    /// `index` must be below 2^56 (RAM sizes are; it is masked otherwise).
    pub fn push(&mut self, index: u64, page: &Page, digest: &mut EpochDigest) {
        self.begin();
        self.pages += 1;
        self.statistics.raw += PAGE as u64;
        let known = self.shadow.as_ref().map_or(Known::Nothing, |shadow| shadow.known(index));
        if is_zero(page) {
            self.statistics.zero_pages += 1;
            if known == Known::Zero {
                return;
            }
            digest.zeros(index, 1);
            self.push_zero(index);
            if let Some(shadow) = &mut self.shadow {
                shadow.sent_zero(index);
            }
            return;
        }
        let hash = page_hash(self.seed, page);
        if known == Known::Hash(hash) {
            self.statistics.unchanged_pages += 1;
            if self.statistics.unchanged_pages.is_multiple_of(CHECK_EVERY) {
                digest.page(index, hash);
                self.record(kind::CHECK, index);
            }
            return;
        }
        self.statistics.changed += PAGE as u64;
        digest.page(index, hash);
        let start = self.bytes.len();
        let useful = self.push_changed(index, page, hash);
        self.statistics.encoded += (self.bytes.len() - start) as u64;
        if let Some(shadow) = &mut self.shadow {
            shadow.sent(index, hash, page, useful);
        }
    }

    /// True if the shadow's copy was of use, or there is none.
    fn push_changed(&mut self, index: u64, page: &Page, hash: PageHash) -> bool {
        let start = self.bytes.len();
        self.record(kind::RAW, index);
        let (mut tried, mut delta) = (false, false);
        if let Some(shadow) = &self.shadow {
            if let Some(old) = shadow.copy(index) {
                tried = true;
                delta = delta::encode(page, old, &mut self.bytes);
            }
            if self.bytes.len() - start <= SMALL_DELTA && delta {
                // Not worth the look for a twin.
            } else if let Some(twin) = shadow.twin(hash) {
                self.bytes.truncate(start);
                self.bytes.extend_from_slice(&record::head(kind::SAME, index));
                self.bytes.extend_from_slice(&twin.to_le_bytes());
                self.statistics.same_pages += 1;
                return true;
            }
        }
        let sparse = !delta && delta::encode(page, &ZEROS, &mut self.bytes);
        if delta || sparse {
            let kind = if delta { kind::DELTA } else { kind::SPARSE };
            self.bytes[start..start + record::HEAD].copy_from_slice(&record::head(kind, index));
            self.statistics.delta_pages += 1;
        } else {
            self.bytes.extend_from_slice(page);
            self.statistics.raw_pages += 1;
        }
        delta || !tried
    }

    fn begin(&mut self) {
        if self.bytes.is_empty() {
            self.bytes.resize(batch::HEAD, 0);
        }
    }

    fn record(&mut self, kind: u8, index: u64) {
        self.run = None;
        self.named += 1;
        self.bytes.extend_from_slice(&record::head(kind, index));
    }

    fn push_zero(&mut self, index: u64) {
        if let Some((count_at, next)) = &mut self.run
            && *next == index
            && let Some(count) = self.bytes.get_mut(*count_at..).and_then(<[u8]>::first_chunk_mut::<4>)
        {
            *count = (u32::from_le_bytes(*count) + 1).to_le_bytes();
            *next += 1;
            self.named += 1;
            return;
        }
        self.record(kind::ZERO, index);
        self.run = Some((self.bytes.len(), index + 1));
        self.bytes.extend_from_slice(&1u32.to_le_bytes());
        self.statistics.encoded += record::HEAD as u64 + 4;
    }

    /// Bytes encoded so far: when this is large the batch should go.
    pub fn len(&self) -> usize {
        self.bytes.len().saturating_sub(batch::HEAD)
    }

    /// Whether there is nothing to send. (Pages may have been given that need not be.)
    pub fn is_empty(&self) -> bool {
        self.named == 0
    }

    /// Pages given since the last batch, those that need not be sent too.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Compress the batch if that pays. Between the last page and [`Self::bytes`].
    pub fn seal(&mut self) {
        if self.is_empty() {
            return;
        }
        let plain_len = self.len();
        let mut method = match self.compression {
            Some(Compression::Always(method)) => method,
            Some(Compression::Auto) => self.chooser.method(),
            None => Method::Plain,
        };
        if self.compression == Some(Compression::Auto)
            && plain_len >= SAMPLE
            && let Some(probed) = self.chooser.probe()
        {
            self.compress(probed, SAMPLE);
        }
        if plain_len < WORTH {
            method = Method::Plain;
        }
        if method != Method::Plain {
            let made = self.compress(method, plain_len);
            if made.is_some_and(|made| made < plain_len) {
                std::mem::swap(&mut self.bytes, &mut self.spare);
            } else {
                method = Method::Plain;
            }
        }
        let head = Head { method, pages: self.named, plain_len: plain_len as u32, seed: self.seed };
        self.bytes[..batch::HEAD].copy_from_slice(&head.encode());
        self.statistics.batches += self.bytes.len() as u64;
    }

    /// Compress the first `len` bytes of records into `spare`, behind room for a head; how many bytes they became.
    fn compress(&mut self, method: Method, len: usize) -> Option<usize> {
        let plain = &self.bytes[batch::HEAD..batch::HEAD + len];
        let most = match method {
            Method::Plain => return None,
            Method::Lz4 => lz4_flex::block::get_maximum_output_size(len),
            Method::Zstd => zstd::zstd_safe::compress_bound(len),
        };
        self.spare.resize(batch::HEAD + most, 0);
        let room = &mut self.spare[batch::HEAD..];
        let begun = Instant::now();
        let made = if method == Method::Lz4 {
            lz4_flex::block::compress_into(plain, room).ok()?
        } else {
            if self.zstd.is_none() {
                self.zstd = zstd::bulk::Compressor::new(1).ok();
            }
            self.zstd.as_mut()?.compress_to_buffer(plain, room).ok()?
        };
        let ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.chooser.compressed(method, len, made, ns);
        self.spare.truncate(batch::HEAD + made);
        Some(made)
    }

    /// The batch. [`Self::seal`] comes first.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The batch of `bytes` bytes was given to the stream, which took `ns`.
    pub fn sent(&mut self, bytes: usize, ns: u64) {
        self.chooser.sent(bytes, ns);
    }

    /// Start the next batch in the same memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.run = None;
        (self.pages, self.named) = (0, 0);
    }

    /// Bytes and pages at each stage.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The method for the next batch.
    pub fn method(&self) -> Method {
        match self.compression {
            Some(Compression::Always(method)) => method,
            _ => self.chooser.method(),
        }
    }

    /// Memory that the shadow takes, and the pages that it has copies of.
    pub fn shadow(&self) -> (u64, u64) {
        self.shadow.as_ref().map_or((0, 0), |shadow| (shadow.bytes(), shadow.copies()))
    }
}
