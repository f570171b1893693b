//! Pages on the wire and in the stage: a *batch* is a run of records, each one page or a run of zero pages.
//!
//! ```text
//! record  = head, body          head = u64 LE: kind in the top 8 bits, page index in the lower 56
//! kind 0  raw page              body = 4096 bytes
//! kind 1  LZ4 block             body = u16 LE length n (1 ..= 4095), n bytes that decompress to 4096
//! kind 2  zero pages            body = u32 LE count (>= 1): pages index .. index + count are all zero
//! kind 3  (kept for deltas against the previous epoch's page)
//! ```
//! The sender encodes with [`BatchWriter`]; the receiver walks a batch with [`for_each_record`] twice: once to verify it
//! while it arrives, once to apply it after the commit. A batch is untrusted until both ends' [`EpochDigest`]s agree, so
//! the walk checks every length and index and never panics.

use thiserror::Error;

/// Bytes in a page: the unit of the dirty log and of the RAM file.
pub const PAGE: usize = 4096;

const KIND_SHIFT: u32 = 56;
const INDEX_MASK: u64 = (1 << KIND_SHIFT) - 1;
const RAW: u64 = 0;
const LZ4: u64 = 1;
const ZERO: u64 = 2;

/// Why a batch cannot be what a sender wrote.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BatchError {
    /// It ends inside a record.
    #[error("a batch of pages ends in the middle of a record")]
    Truncated,
    /// A record of a kind that this version does not know.
    #[error("a batch of pages holds a record of unknown kind {0}")]
    Kind(u64),
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
    /// LZ4 data that does not decompress to one page.
    #[error("compressed page {0} does not decompress to 4096 bytes")]
    Compression(u64),
}

/// One record of a batch, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record<'a> {
    /// The page `index` has this content (4096 bytes).
    Page {
        /// The page's offset in RAM divided by 4096.
        index: u64,
        /// Its 4096 bytes.
        bytes: &'a [u8],
    },
    /// `count` pages from `index` on are all zero.
    Zeros {
        /// The first page.
        index: u64,
        /// How many, at least 1.
        count: u64,
    },
}

/// Whether all of `page` is zero.
pub fn is_zero(page: &[u8]) -> bool {
    // A cache line at a time: the compiler turns this into vector instructions, and a page that is in use usually
    // differs within its first words.
    let blocks = page.chunks_exact(64);
    let rest = blocks.remainder();
    blocks.into_iter().all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

/// Encodes pages into a batch.
#[derive(Debug, Default)]
pub struct BatchWriter {
    bytes: Vec<u8>,
    /// The zero run that is still growing: where its count stands and the next page that would extend it.
    run: Option<(usize, u64)>,
    pages: u64,
}

impl BatchWriter {
    /// Add page `index` and take it into `digest`.
    ///
    /// `page` must be [`PAGE`] bytes long and `index` below 2^56 (RAM sizes are; it is masked otherwise).
    pub fn push(&mut self, index: u64, page: &[u8], digest: &mut EpochDigest) {
        debug_assert_eq!(page.len(), PAGE);
        let index = index & INDEX_MASK;
        self.pages += 1;
        if is_zero(page) {
            digest.zeros(index, 1);
            self.push_zero(index);
            return;
        }
        digest.page(index, page);
        self.run = None;
        let start = self.bytes.len();
        let head = 8 + 2;
        // The compressor refuses to begin in less room than incompressible content could need.
        self.bytes.resize(start + head + lz4_flex::block::get_maximum_output_size(PAGE), 0);
        let room = &mut self.bytes[start + head..];
        match lz4_flex::block::compress_into(page, room) {
            Ok(n) if n < PAGE - 64 => {
                self.bytes[start..start + 8].copy_from_slice(&(LZ4 << KIND_SHIFT | index).to_le_bytes());
                self.bytes[start + 8..start + head].copy_from_slice(&(n as u16).to_le_bytes());
                self.bytes.truncate(start + head + n);
            }
            _ => {
                self.bytes[start..start + 8].copy_from_slice(&(RAW << KIND_SHIFT | index).to_le_bytes());
                self.bytes[start + 8..start + 8 + PAGE].copy_from_slice(page);
                self.bytes.truncate(start + 8 + PAGE);
            }
        }
    }

    fn push_zero(&mut self, index: u64) {
        if let Some((count_at, next)) = &mut self.run {
            let (count_at, next) = (*count_at, next);
            let mut count = [0; 4];
            count.copy_from_slice(&self.bytes[count_at..count_at + 4]);
            let count = u32::from_le_bytes(count);
            if *next == index && count < u32::MAX {
                self.bytes[count_at..count_at + 4].copy_from_slice(&(count + 1).to_le_bytes());
                *next += 1;
                return;
            }
        }
        self.bytes.extend_from_slice(&(ZERO << KIND_SHIFT | index).to_le_bytes());
        self.run = Some((self.bytes.len(), index + 1));
        self.bytes.extend_from_slice(&1u32.to_le_bytes());
    }

    /// Bytes encoded so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added since [`Self::clear`].
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Pages added so far.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The batch.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Start the next batch in the same memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.run = None;
        self.pages = 0;
    }
}

/// Walk a batch, giving each record to `visit`; stops at the first error.
///
/// `ram_pages` is the size of RAM: a record outside is an error.
pub fn for_each_record<E: From<BatchError>>(
    mut batch: &[u8],
    ram_pages: u64,
    mut visit: impl FnMut(Record<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut scratch = [0u8; PAGE];
    while !batch.is_empty() {
        let head = u64::from_le_bytes(take(&mut batch)?);
        let (kind, index) = (head >> KIND_SHIFT, head & INDEX_MASK);
        let check = |count: u64| {
            if count == 0 || count > ram_pages || index > ram_pages - count {
                return Err(BatchError::Range { index, count, ram_pages });
            }
            Ok(())
        };
        match kind {
            RAW => {
                check(1)?;
                let page: [u8; PAGE] = take(&mut batch)?;
                visit(Record::Page { index, bytes: &page })?;
            }
            LZ4 => {
                check(1)?;
                let n = usize::from(u16::from_le_bytes(take(&mut batch)?));
                let Some((block, rest)) = batch.split_at_checked(n) else { return Err(BatchError::Truncated.into()) };
                batch = rest;
                match lz4_flex::block::decompress_into(block, &mut scratch) {
                    Ok(PAGE) => visit(Record::Page { index, bytes: &scratch })?,
                    _ => return Err(BatchError::Compression(index).into()),
                }
            }
            ZERO => {
                let count = u64::from(u32::from_le_bytes(take(&mut batch)?));
                check(count)?;
                visit(Record::Zeros { index, count })?;
            }
            other => return Err(BatchError::Kind(other).into()),
        }
    }
    Ok(())
}

fn take<const N: usize>(batch: &mut &[u8]) -> Result<[u8; N], BatchError> {
    let (front, rest) = batch.split_first_chunk::<N>().ok_or(BatchError::Truncated)?;
    *batch = rest;
    Ok(*front)
}

/// The digest over everything that a checkpoint consists of, as content, not as encoding: both ends compute it from the
/// pages themselves, so that a fault in the encoder, the wire, the stage or the decoder shows.
///
/// It is BLAKE3 over the digests of two streams: the contents of the pages in the order sent, and the *outline* (a
/// u64 LE for each page, top bit set for a zero page, which adds nothing to the contents; then the device state with its length).
/// Two streams, because BLAKE3 is several times faster when it is fed with whole pages.
#[derive(Debug, Clone, Default)]
pub struct EpochDigest {
    contents: blake3::Hasher,
    outline: blake3::Hasher,
    pages: u64,
}

impl EpochDigest {
    /// Take in one page with content.
    pub fn page(&mut self, index: u64, bytes: &[u8]) {
        self.contents.update(bytes);
        self.outline.update(&index.to_le_bytes());
        self.pages += 1;
    }

    /// Take in `count` zero pages from `index` on.
    pub fn zeros(&mut self, index: u64, count: u64) {
        for page in index..index + count {
            self.outline.update(&(page | 1 << 63).to_le_bytes());
        }
        self.pages += count;
    }

    /// Take in a decoded record.
    pub fn record(&mut self, record: Record<'_>) {
        match record {
            Record::Page { index, bytes } => self.page(index, bytes),
            Record::Zeros { index, count } => self.zeros(index, count),
        }
    }

    /// Take in a piece of the device state; pieces in order, after all pages.
    pub fn state(&mut self, piece: &[u8]) {
        self.outline.update(&(piece.len() as u64 | 1 << 62).to_le_bytes());
        self.outline.update(piece);
    }

    /// Pages taken in since the start.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The digest, and a fresh start for the next epoch.
    pub fn finish(&mut self) -> [u8; 32] {
        let mut all = blake3::Hasher::new();
        all.update(self.contents.finalize().as_bytes());
        all.update(self.outline.finalize().as_bytes());
        *self = Self::default();
        *all.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_that_compresses_travels_compressed() {
        let mut text = [0u8; PAGE];
        for (i, byte) in text.iter_mut().enumerate() {
            *byte = b"the quick brown fox "[i % 20];
        }
        let mut writer = BatchWriter::default();
        writer.push(7, &text, &mut EpochDigest::default());
        assert!(writer.bytes.len() < 200, "{} bytes for a page of repeated text", writer.bytes.len());
    }

    fn decode(batch: &[u8], ram_pages: u64) -> Result<Vec<(u64, Vec<u8>)>, BatchError> {
        let mut pages = Vec::new();
        for_each_record(batch, ram_pages, |record| {
            match record {
                Record::Page { index, bytes } => pages.push((index, bytes.to_vec())),
                Record::Zeros { index, count } => pages.extend((index..index + count).map(|i| (i, vec![0; PAGE]))),
            }
            Ok::<_, BatchError>(())
        })?;
        Ok(pages)
    }

    fn some_page() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            Just(vec![0; PAGE]),
            any::<u8>().prop_map(|byte| vec![byte; PAGE]),
            any::<u64>().prop_map(noise),
            (0..PAGE, 1u8..).prop_map(|(at, byte)| {
                let mut page = vec![0; PAGE];
                page[at] = byte;
                page
            }),
        ]
    }

    fn noise(seed: u64) -> Vec<u8> {
        let mut x = seed | 1;
        let step = |_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()
        };
        (0..PAGE / 8).flat_map(step).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_encoded_is_decoded_and_both_ends_compute_the_same_digest(
            pages in proptest::collection::vec((0u64..64, some_page()), 0..24),
        ) {
            let (mut writer, mut sent, mut received) = (BatchWriter::default(), EpochDigest::default(), EpochDigest::default());
            for (index, page) in &pages {
                writer.push(*index, page, &mut sent);
            }
            prop_assert_eq!(writer.pages(), pages.len() as u64);
            prop_assert_eq!(decode(writer.bytes(), 64).unwrap(), pages);
            for_each_record(writer.bytes(), 64, |record| { received.record(record); Ok::<_, BatchError>(()) }).unwrap();
            prop_assert_eq!(sent.pages(), received.pages());
            prop_assert_eq!(sent.finish(), received.finish());
        }

        #[test]
        fn any_bytes_are_refused_or_decoded_within_ram_but_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u64..4, index in 0u64..80,
        ) {
            let mut batch = (kind << KIND_SHIFT | index).to_le_bytes().to_vec();
            batch.extend(bytes);
            // (A visitor that does nothing: a lying zero run may be long.)
            let _ = for_each_record(&batch, 64, |record| {
                match record {
                    Record::Page { index, .. } => assert!(index < 64),
                    Record::Zeros { index, count } => assert!(index + count <= 64),
                }
                Ok::<_, BatchError>(())
            });
        }
    }

    #[test]
    fn a_run_of_zero_pages_takes_twelve_bytes() {
        let mut writer = BatchWriter::default();
        for index in 0..1000 {
            writer.push(index, &[0; PAGE], &mut EpochDigest::default());
        }
        assert_eq!(writer.len(), 12);
    }

    #[test]
    fn one_changed_bit_or_a_page_elsewhere_changes_the_digest() {
        let digest = |index, byte| {
            let mut digest = EpochDigest::default();
            digest.page(index, &[byte; PAGE]);
            digest.state(b"devices");
            digest.finish()
        };
        assert_eq!(digest(1, 1), digest(1, 1));
        assert_ne!(digest(1, 1), digest(1, 3));
        assert_ne!(digest(1, 1), digest(2, 1));
    }

    #[test]
    fn a_page_beyond_ram_is_refused() {
        let mut writer = BatchWriter::default();
        writer.push(8, &[7; PAGE], &mut EpochDigest::default());
        assert_eq!(decode(writer.bytes(), 8), Err(BatchError::Range { index: 8, count: 1, ram_pages: 8 }));
    }
}
