//! What changed in a page, in words of 8 bytes.
//!
//! ```text
//! delta = u64 LE lines (not 0)       bit i: the i-th 64 bytes of the page differ
//!         for each such line:        u8 words (not 0), bit j: its j-th 8 bytes differ
//!                                    8 bytes for each such word: old XOR new
//! ```
//! Words, because that is what programs store, and because finding them costs little more than comparing. XOR, because a
//! counter or a pointer that moved a little then is mostly zero bytes, which LZ4 and zstd use when they run at all.

use super::{PAGE, Page};

const LINE: usize = 64;
const LINES: usize = PAGE / LINE;
/// A delta longer than this is not worth the receiver's base: the page travels raw.
const LIMIT: usize = PAGE - PAGE / 8;
/// Of a page that was written from end to end every one of a few words has changed; its other words are not even looked at.
const SAMPLES: usize = 32;

/// A delta whose form has been checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta<'a> {
    lines: u64,
    body: &'a [u8],
}

impl<'a> Delta<'a> {
    /// Take a delta from the front; `None` if there is none.
    pub fn parse(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (lines, all) = bytes.split_first_chunk::<8>()?;
        let lines = u64::from_le_bytes(*lines);
        if lines == 0 {
            return None;
        }
        let mut at = 0;
        for _ in 0..lines.count_ones() {
            let words = *all.get(at)?;
            if words == 0 {
                return None;
            }
            at += 1 + 8 * words.count_ones() as usize;
        }
        let (body, rest) = all.split_at_checked(at)?;
        Some((Self { lines, body }, rest))
    }

    /// Make the new page of the old one.
    pub fn apply(&self, page: &mut Page) {
        let mut body = self.body;
        for line in bits(self.lines) {
            // `parse` has seen that all of them are there.
            let Some((words, rest)) = body.split_first() else { return };
            body = rest;
            for word in bits(u64::from(*words)) {
                let Some((change, rest)) = body.split_first_chunk::<8>() else { return };
                body = rest;
                let at = line * LINE + word * 8;
                for (byte, change) in page[at..at + 8].iter_mut().zip(change) {
                    *byte ^= change;
                }
            }
        }
    }
}

/// Append the delta from `old` to `new` to `out`; false, and nothing is appended, if the page had better travel raw.
/// The pages must differ.
pub fn encode(new: &Page, old: &Page, out: &mut Vec<u8>) -> bool {
    // (Not at a constant distance: what fills pages is regular.)
    let at = |i: usize| i * (PAGE / SAMPLES) + (i * 56 + 8) % (PAGE / SAMPLES);
    let sample = |page: &Page, i: usize| page[at(i)..].first_chunk::<8>().copied();
    if (0..SAMPLES).all(|i| sample(new, i) != sample(old, i)) {
        return false;
    }
    let (new, old) = (new.as_chunks::<LINE>().0, old.as_chunks::<LINE>().0);
    let mut lines = 0u64;
    for (i, (a, b)) in new.iter().zip(old).enumerate() {
        lines |= u64::from(differ(a, b)) << i;
    }
    let mut masks = [0u8; LINES];
    let mut len = 8;
    for line in bits(lines) {
        let (a, b) = (new[line].as_chunks::<8>().0, old[line].as_chunks::<8>().0);
        let mut mask = 0;
        for (j, (a, b)) in a.iter().zip(b).enumerate() {
            mask |= u8::from(a != b) << j;
        }
        masks[line] = mask;
        len += 1 + 8 * mask.count_ones() as usize;
    }
    if lines == 0 || len > LIMIT {
        return false;
    }
    out.reserve(len);
    out.extend_from_slice(&lines.to_le_bytes());
    for line in bits(lines) {
        out.push(masks[line]);
        let (a, b) = (new[line].as_chunks::<8>().0, old[line].as_chunks::<8>().0);
        for word in bits(u64::from(masks[line])) {
            let change = u64::from_le_bytes(a[word]) ^ u64::from_le_bytes(b[word]);
            out.extend_from_slice(&change.to_le_bytes());
        }
    }
    true
}

/// (A comparison of arrays is a call for each line; this is a few vector instructions.)
fn differ(a: &[u8; LINE], b: &[u8; LINE]) -> bool {
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0);
    words.fold(0, |all, (a, b)| all | u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b)) != 0
}

/// The numbers of the bits that are set, lowest first.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (bit < 64).then_some(bit as usize)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_delta_over_the_old_page_gives_the_new_one(
            changes in proptest::collection::vec((0..PAGE, any::<u8>()), 1..64), fill in any::<u8>(),
        ) {
            let old = [fill; PAGE];
            let mut new = old;
            changes.iter().for_each(|(at, byte)| new[*at] = *byte);
            prop_assume!(new != old);
            let mut bytes = Vec::new();
            prop_assert!(encode(&new, &old, &mut bytes));
            prop_assert!(bytes.len() <= 8 + 9 * changes.len());
            bytes.extend_from_slice(b"rest");
            let (delta, rest) = Delta::parse(&bytes).unwrap();
            let mut page = old;
            delta.apply(&mut page);
            prop_assert!(page == new && rest == b"rest");
        }

        #[test]
        fn any_bytes_are_a_delta_or_not_but_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some((delta, rest)) = Delta::parse(&bytes) {
                prop_assert!(rest.len() < bytes.len());
                delta.apply(&mut [0; PAGE]);
            }
        }
    }

    #[test]
    fn a_page_that_changed_everywhere_travels_raw() {
        let mut bytes = vec![7];
        assert!(!encode(&[1; PAGE], &[0; PAGE], &mut bytes));
        assert_eq!(bytes, [7]);
    }

    #[test]
    fn one_changed_word_takes_seventeen_bytes() {
        let (old, mut new) = ([9; PAGE], [9; PAGE]);
        new[100] = 1;
        let mut bytes = Vec::new();
        assert!(encode(&new, &old, &mut bytes));
        assert_eq!(bytes.len(), 17);
    }
}
