//! Page hashes, and the digest over everything that a checkpoint consists of.
//!
//! The digest is over content, not encoding: both ends compute it from whole pages, so that a fault in the encoder, the
//! wire, a base, the stage or the decoder shows. It is BLAKE3 over an *outline*: for a page its u64 LE index and its 16-byte
//! hash, for a zero page its index with the top bit set, in the order sent; then the device state with its length.
//!
//! A page's hash is XXH3-128 under a random seed: the stream is authenticated already, the hash has to find faults. It takes
//! a fifteenth of BLAKE3's time on a page (docs/decisions/0009). The same hash recognises unchanged and duplicate pages, where the
//! seed, which the guest cannot know, keeps programs inside from making two pages of one hash.

use super::Page;

/// A page's hash; see [`page_hash`].
pub type PageHash = u128;

/// XXH3-128 of a page.
pub fn page_hash(seed: u64, page: &Page) -> PageHash {
    twox_hash::XxHash3_128::oneshot_with_seed(seed, page)
}

const ZERO: u64 = 1 << 63;
const STATE: u64 = 1 << 62;
/// BLAKE3 is several times faster when it is not fed 24 bytes at a time.
const BUFFER: usize = 4096;

/// The digest while it grows.
#[derive(Debug, Clone, Default)]
pub struct EpochDigest {
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    pages: u64,
}

impl EpochDigest {
    /// Take in one page with content.
    pub fn page(&mut self, index: u64, hash: PageHash) {
        self.buffer.extend_from_slice(&index.to_le_bytes());
        self.buffer.extend_from_slice(&hash.to_le_bytes());
        self.pages += 1;
        self.flush(BUFFER);
    }

    /// Take in `count` zero pages from `index` on.
    pub fn zeros(&mut self, index: u64, count: u64) {
        for page in index..index + count {
            self.buffer.extend_from_slice(&(page | ZERO).to_le_bytes());
            self.flush(BUFFER);
        }
        self.pages += count;
    }

    /// Take in the device state, after all pages.
    pub fn state(&mut self, state: &[u8]) {
        self.buffer.extend_from_slice(&(state.len() as u64 | STATE).to_le_bytes());
        self.flush(0);
        self.hasher.update(state);
    }

    /// Pages taken in since the start.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The digest, and a fresh start for the next epoch.
    pub fn finish(&mut self) -> [u8; 32] {
        self.flush(0);
        let digest = *self.hasher.finalize().as_bytes();
        self.hasher.reset();
        self.pages = 0;
        digest
    }

    fn flush(&mut self, above: usize) {
        if self.buffer.len() > above {
            self.hasher.update(&self.buffer);
            self.buffer.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::PAGE;
    use super::*;

    #[test]
    fn one_changed_bit_or_a_page_elsewhere_or_another_state_changes_the_digest() {
        let digest = |index, byte, state: &[u8]| {
            let mut digest = EpochDigest::default();
            digest.page(index, page_hash(1, &[byte; PAGE]));
            digest.zeros(7, 2);
            digest.state(state);
            assert_eq!(digest.pages(), 3);
            digest.finish()
        };
        let good = digest(1, 1, b"devices");
        assert_eq!(good, digest(1, 1, b"devices"));
        for other in [digest(1, 3, b"devices"), digest(2, 1, b"devices"), digest(1, 1, b"device")] {
            assert_ne!(good, other);
        }
    }

    #[test]
    fn runs_and_single_zero_pages_are_the_same_and_finish_starts_afresh() {
        let (mut run, mut single) = (EpochDigest::default(), EpochDigest::default());
        run.zeros(5, 1000);
        (5..1005).for_each(|index| single.zeros(index, 1));
        assert_eq!(run.finish(), single.finish());
        assert_eq!(run.finish(), EpochDigest::default().finish());
    }
}
