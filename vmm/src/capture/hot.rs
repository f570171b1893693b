//! Which pages are written in nearly every epoch, and are therefore left writable: protecting such a page again costs a fault in
//! every epoch, copying it once more at the cut costs less.
//!
//! ```text
//!  cold ── written in HOT_AFTER epochs in a row ──► hot (left writable: always in the log, always copied at the cut)
//!    ▲                                                │ every TEST_EVERY cuts protected for one epoch
//!    └────────────── not written in that epoch ───────┘
//! ```
//! Called by the cut with what was written; pure.

use crate::memory::PageSet;

/// Epochs in a row after which a page counts as hot.
const HOT_AFTER: u8 = 4;
/// A hot page is put to the test at every so many cuts; the pages take turns, 64 neighbours together.
const TEST_EVERY: usize = 16;

/// See the module. Takes two bytes and a bit a page.
#[derive(Debug)]
pub struct Hot {
    cut: u64,
    /// Epochs in a row, up to [`HOT_AFTER`].
    streak: Vec<u8>,
    /// Low byte of the newest cut that found the page written.
    seen: Vec<u8>,
    hot: PageSet,
    count: u64,
}

impl Hot {
    /// For so many pages, all cold.
    pub fn new(pages: u64) -> Self {
        let n = pages as usize;
        Self { cut: 0, streak: vec![0; n], seen: vec![0; n], hot: vec![0; n.div_ceil(64)], count: 0 }
    }

    /// Hot pages.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// All hot pages: their content is copied while the guest stands still.
    pub fn pages(&self) -> &PageSet {
        &self.hot
    }

    /// Whether the hot pages of this word of the set stay writable until the next cut.
    pub fn left_writable(&self, word: usize) -> u64 {
        if self.under_test(word, self.cut) { 0 } else { self.hot.get(word).copied().unwrap_or(0) }
    }

    fn under_test(&self, word: usize, cut: u64) -> bool {
        word % TEST_EVERY == (cut % TEST_EVERY as u64) as usize
    }

    /// A cut found these pages written; at most `limit` pages may be hot.
    pub fn at_cut(&mut self, written: &PageSet, limit: u64) {
        let tested = self.cut;
        self.cut += 1;
        let now = self.cut as u8;
        for word in 0..self.hot.len() {
            let (mut bits, hot) = (written.get(word).copied().unwrap_or(0), self.hot[word]);
            if hot != 0 {
                let mut stays = hot;
                if self.under_test(word, tested) {
                    stays &= bits;
                }
                if self.count > limit {
                    // Too many (the limit fell): whole words go, until it holds.
                    stays = 0;
                }
                self.count -= u64::from((hot & !stays).count_ones());
                self.hot[word] = stays;
                bits &= !hot;
            }
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                let page = word * 64 + bit as usize;
                let (Some(streak), Some(seen)) = (self.streak.get_mut(page), self.seen.get_mut(page)) else { return };
                *streak = if *seen == now.wrapping_sub(1) { (*streak + 1).min(HOT_AFTER) } else { 1 };
                *seen = now;
                if *streak == HOT_AFTER && self.count < limit {
                    self.hot[word] |= 1 << bit;
                    self.count += 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(pages: &[usize]) -> PageSet {
        let mut set = vec![0; 32];
        pages.iter().for_each(|p| set[p / 64] |= 1 << (p % 64));
        set
    }

    #[test]
    fn a_page_that_is_written_in_every_epoch_becomes_hot_and_others_do_not() {
        let mut hot = Hot::new(2048);
        for cut in 0..8 {
            hot.at_cut(&if cut % 2 == 0 { set(&[3, 70]) } else { set(&[3]) }, 100);
        }
        assert_eq!((hot.count(), hot.pages().clone()), (1, set(&[3])));
    }

    #[test]
    fn a_hot_page_that_is_not_written_any_more_is_found_out_within_a_turn() {
        let mut hot = Hot::new(2048);
        for _ in 0..HOT_AFTER {
            hot.at_cut(&set(&[3, 1000]), 100);
        }
        assert_eq!(hot.count(), 2);
        for _ in 0..=TEST_EVERY {
            // What is left writable stands in the log, written or not.
            let written = (0..32).map(|word| hot.left_writable(word) | set(&[1000])[word]).collect();
            hot.at_cut(&written, 100);
        }
        assert_eq!(hot.pages().clone(), set(&[1000]));
    }

    #[test]
    fn the_limit_holds_also_when_it_falls() {
        let mut hot = Hot::new(2048);
        let all: Vec<usize> = (0..500).collect();
        for _ in 0..HOT_AFTER {
            hot.at_cut(&set(&all), 300);
        }
        assert_eq!(hot.count(), 300);
        hot.at_cut(&set(&all), 100);
        assert!(hot.count() <= 100, "{}", hot.count());
        assert_eq!(crate::memory::count(hot.pages()), hot.count());
    }
}
