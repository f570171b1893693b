//! The memory pattern: pages that know who and how old they are.
//!
//! A sweep goes through all pages in order, again and again. Each page holds its index, the round in which it was
//! written, and a fill that follows from the key, the index and the round. Before a page is rewritten it must hold
//! exactly the round before: a page that a takeover restored from another epoch than the rest shows a wrong round, a
//! half-copied page a wrong fill, a page at another page's place a wrong index.

use std::hint::black_box;

/// 64-bit words in a page of 4096 bytes.
pub const PAGE_WORDS: usize = 512;

/// One page, aligned as the machine's pages are, so that one pattern page is one page of RAM.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(pub [u64; PAGE_WORDS]);

/// A page that does not hold what was last written to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// Index of the page.
    pub page: u64,
    /// The round it had to hold.
    pub round: u64,
    /// What its first words say: index and round, unmasked with the expected key.
    pub found_page: u64,
    /// See `found_page`.
    pub found_round: u64,
    /// First word that differs.
    pub word: usize,
    /// Number of words that differ.
    pub words: usize,
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { page, round, found_page, found_round, word, words } = self;
        write!(f, "bad page={page} round={round} found_page={found_page} found_round={found_round} ")?;
        write!(f, "word={word} words={words}")
    }
}

/// The memory under test and the place of the sweep in it.
pub struct Sweep {
    pages: Vec<Page>,
    key: u64,
    round: u64,
    next: usize,
    written: u64,
    bad: u64,
}

impl Sweep {
    /// `pages` pages, all written in round 0. `key` should differ from boot to boot, so that an old machine's memory
    /// cannot pass for this one's.
    pub fn new(pages: usize, key: u64) -> Self {
        let mut sweep = Self { pages: vec![Page([0; PAGE_WORDS]); pages], key, round: 1, next: 0, written: 0, bad: 0 };
        for (index, page) in sweep.pages.iter_mut().enumerate() {
            write(page, key, index as u64, 0);
        }
        sweep
    }

    /// Verify the next page, then rewrite it. A bad page is counted, reported and healed, so that one fault is one report.
    pub fn step(&mut self) -> Option<Bad> {
        let page = self.pages.get_mut(self.next)?;
        let index = self.next as u64;
        // The compiler must not carry what was written in one round over to the next: the check reads RAM.
        let page = black_box(page);
        let bad = check(page, self.key, index, self.round - 1);
        write(page, self.key, index, self.round);
        self.bad += u64::from(bad.is_some());
        self.written += 1;
        self.next += 1;
        if self.next == self.pages.len() {
            self.next = 0;
            self.round += 1;
        }
        bad
    }

    /// Round that is being written, counted from 1.
    pub fn round(&self) -> u64 {
        self.round
    }
    /// Page that is next.
    pub fn position(&self) -> u64 {
        self.next as u64
    }
    /// Pages written since the start.
    pub fn written(&self) -> u64 {
        self.written
    }
    /// Pages found bad since the start.
    pub fn bad(&self) -> u64 {
        self.bad
    }
    /// Whether there is anything to sweep.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// SplitMix64's output function: any two seeds give unrelated streams, and it is cheap enough to fill at memory speed.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn words(key: u64, index: u64, round: u64) -> impl Iterator<Item = u64> {
    let seed = mix(key ^ mix(index ^ mix(round)));
    let fill = (0u64..).map(move |i| mix(seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
    [key ^ index, key ^ round].into_iter().chain(fill).take(PAGE_WORDS)
}

fn write(page: &mut Page, key: u64, index: u64, round: u64) {
    for (slot, word) in page.0.iter_mut().zip(words(key, index, round)) {
        *slot = word;
    }
}

fn check(page: &Page, key: u64, index: u64, round: u64) -> Option<Bad> {
    let mut wrong = page.0.iter().zip(words(key, index, round)).enumerate().filter(|(_, (have, want))| *have != want);
    let (word, _) = wrong.next()?;
    let words = 1 + wrong.count();
    Some(Bad { page: index, round, found_page: page.0[0] ^ key, found_round: page.0[1] ^ key, word, words })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_nobody_touched_passes_round_after_round() {
        let mut sweep = Sweep::new(5, 42);
        for _ in 0..23 {
            assert_eq!(sweep.step(), None);
        }
        assert_eq!((sweep.round(), sweep.position(), sweep.written(), sweep.bad()), (5, 3, 23, 0));
    }

    #[test]
    fn a_page_that_went_back_in_time_is_found() {
        let mut sweep = Sweep::new(3, 42);
        let old = sweep.pages[1].clone();
        for _ in 0..3 {
            assert_eq!(sweep.step(), None);
        }
        sweep.pages[1] = old;
        assert_eq!(sweep.step(), None);
        let bad = sweep.step().unwrap();
        assert_eq!((bad.page, bad.round, bad.found_page, bad.found_round), (1, 1, 1, 0));
        assert_eq!(sweep.step(), None);
        for _ in 0..3 {
            assert_eq!(sweep.step(), None, "one fault is one report");
        }
    }

    #[test]
    fn a_page_from_the_future_of_the_sweep_is_found() {
        let mut sweep = Sweep::new(3, 42);
        write(&mut sweep.pages[2], 42, 2, 1);
        assert_eq!(sweep.step(), None);
        assert_eq!(sweep.step(), None);
        assert_eq!(sweep.step().unwrap().found_round, 1);
    }

    #[test]
    fn a_half_copied_page_is_found() {
        let mut sweep = Sweep::new(1, 42);
        let old = sweep.pages[0].clone();
        assert_eq!(sweep.step(), None);
        sweep.pages[0].0[256..].copy_from_slice(&old.0[256..]);
        let bad = sweep.step().unwrap();
        assert_eq!((bad.found_round, bad.word, bad.words), (1, 256, 256));
    }

    #[test]
    fn a_page_at_another_pages_place_is_found() {
        let mut sweep = Sweep::new(2, 42);
        sweep.pages.swap(0, 1);
        assert_eq!(sweep.step().unwrap().found_page, 1);
    }

    #[test]
    fn a_single_flipped_bit_is_found() {
        let mut sweep = Sweep::new(1, 42);
        sweep.pages[0].0[511] ^= 1 << 63;
        assert_eq!(sweep.step().unwrap().words, 1);
    }
}
