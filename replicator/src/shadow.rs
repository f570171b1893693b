//! What the receiver holds, as the sender knows it: for every page the hash of what was sent last, and for the pages that are sent
//! again and again that very content.
//!
//! The *shadow* is exact for one point of the stream: the end of what has been encoded. It may be, because everything that is
//! encoded arrives in that order, or nothing after it counts (see [`crate::codec`]); who breaks that rule must begin again with
//! [`Shadow::new`]. It is the encoder's alone.
//!
//! Memory is bounded: 24 bytes for each page of RAM (hash, place, time), at most 4 more in the table of duplicates,
//! and the copies' budget. Which pages have a copy:
//! * One whose last sending lies no more sendings back than there are copies: such a page would have been found in a cache of that
//!   size that drops the oldest. A page that is written once, or swept over, is not let in while the room is full.
//! * Not one whose copy was of no use: of a page that is written anew from end to end the next change cannot be told either. Such a
//!   page gets another trial now and then.
//! * It replaces one that the clock's hand finds unused since it came by last. The hand looks at a few at most; if
//!   all of them are in use, the newcomer waits.

use crate::codec::{PAGE, Page, PageHash};

/// What the receiver has of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// Nothing that can be relied on.
    Nothing,
    /// Zeros.
    Zero,
    /// Content of this hash.
    Hash(PageHash),
}

/// Not a hash: these two values are given to no page.
const NOTHING: PageHash = 0;
const ZERO: PageHash = 1;
const NO_COPY: u32 = u32::MAX;
/// Pages in one allocation of copies: a large arena is never moved.
const CHUNK: u32 = 1024;
/// Steps of the clock's hand for one newcomer.
const SWEEP: u32 = 16;
const HOTTEST: u8 = 3;
/// So often in a row a copy may be of no use.
const USELESS: u8 = 4;
/// In place of a place: the page had a copy that was of no use.
const SHUNNED: u32 = u32::MAX;
/// A shunned page is tried again at one in so many sendings.
const TRIAL: u32 = 16;

#[derive(Debug, Clone, Copy)]
struct Copy {
    page: u32,
    heat: u8,
    useless: u8,
}

/// A page: all that is looked at for it stands in one cache line as a rule.
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The hash's low and high half.
    hash: [u64; 2],
    /// Place of its copy plus one; 0 = none.
    place: u32,
    /// When it was sent last, counted in sendings; 0 = never.
    time: u32,
}

impl Entry {
    fn hash(&self) -> PageHash {
        u128::from(self.hash[0]) | u128::from(self.hash[1]) << 64
    }

    fn set_hash(&mut self, hash: PageHash) {
        self.hash = [hash as u64, (hash >> 64) as u64];
    }
}

/// See the module.
#[derive(Debug)]
pub struct Shadow {
    pages: Vec<Entry>,
    now: u32,
    copies: Vec<Copy>,
    memory: Vec<Box<[u8]>>,
    free: Vec<u32>,
    capacity: u32,
    hand: u32,
    /// By hash: a page that had this content when it was sent, and another part of the hash, which spares the look at most pages
    /// that had not.
    twins: Vec<(u32, u32)>,
}

impl Shadow {
    /// A receiver of whom nothing is known, with room for `copies` pages' content.
    ///
    /// A machine of 2^32 - 1 pages (16 TiB) or more gets no shadow: its pages travel whole.
    pub fn new(ram_pages: u64, copies: u64) -> Self {
        let pages = if ram_pages < u64::from(u32::MAX) { ram_pages as usize } else { 0 };
        let twins = (pages / 4).next_power_of_two().clamp(1 << 8, 1 << 21);
        Self {
            pages: vec![Entry { hash: [0; 2], place: 0, time: 0 }; pages],
            now: 0,
            copies: Vec::new(),
            memory: Vec::new(),
            free: Vec::new(),
            capacity: copies.min(pages as u64) as u32,
            hand: 0,
            twins: vec![(0, 0); twins],
        }
    }

    /// Nothing is known of the receiver any more.
    pub fn forget_all(&mut self) {
        let (pages, capacity) = (self.pages.len() as u64, u64::from(self.capacity));
        // The old memory goes before the next takes some.
        *self = Self::new(0, 0);
        *self = Self::new(pages, capacity);
    }

    /// What the receiver has of page `index`.
    pub fn known(&self, index: u64) -> Known {
        match self.pages.get(index as usize).map(Entry::hash) {
            None | Some(NOTHING) => Known::Nothing,
            Some(ZERO) => Known::Zero,
            Some(hash) => Known::Hash(hash),
        }
    }

    /// The content that the receiver has of page `index`, if there is a copy.
    pub fn copy(&self, index: u64) -> Option<&Page> {
        let place = self.place(index)?;
        let chunk = self.memory.get((place / CHUNK) as usize)?;
        chunk.get((place % CHUNK) as usize * PAGE..)?.first_chunk()
    }

    /// Another page that the receiver has with content of this hash.
    pub fn twin(&self, hash: PageHash) -> Option<u64> {
        let (page, tag) = *self.twins.get(self.twin_slot(hash))?;
        (tag == twin_tag(hash) && self.pages.get(page as usize)?.hash() == hash).then_some(u64::from(page))
    }

    /// Page `index` is sent with this content. `useful`: it has no copy, or that has made it shorter.
    pub fn sent(&mut self, index: u64, hash: PageHash, content: &Page, useful: bool) {
        let at = index as usize;
        let Some(entry) = self.pages.get_mut(at) else { return };
        let first = entry.hash() == NOTHING;
        // (One hash in 2^127 is taken for another; the digest would show it.)
        entry.set_hash(hash.max(ZERO + 1));
        let slot = self.twin_slot(hash);
        self.twins[slot] = (index as u32, twin_tag(hash));
        let last = self.tick(at);
        if let Some(place) = self.place(index) {
            let copy = &mut self.copies[place as usize];
            copy.heat = (copy.heat + 1).min(HOTTEST);
            copy.useless = if useful { 0 } else { copy.useless + 1 };
            if copy.useless >= USELESS {
                self.drop_copy(at, place);
                self.pages[at].place = SHUNNED;
            } else {
                self.store(place, content);
            }
        } else if self.pages[at].place == SHUNNED && !self.now.is_multiple_of(TRIAL) {
            // Its time will come.
        } else if let Some(place) = self.admit(first, last) {
            // (One that was shunned has a single trial.)
            let useless = if self.pages[at].place == SHUNNED { USELESS - 1 } else { 0 };
            self.copies[place as usize] = Copy { page: index as u32, heat: 1, useless };
            self.pages[at].place = place + 1;
            self.store(place, content);
        }
    }

    /// Page `index` is sent as zeros.
    pub fn sent_zero(&mut self, index: u64) {
        let at = index as usize;
        let Some(entry) = self.pages.get_mut(at) else { return };
        entry.set_hash(ZERO);
        self.tick(at);
        if let Some(place) = self.place(index) {
            self.drop_copy(at, place);
        }
    }

    fn drop_copy(&mut self, at: usize, place: u32) {
        self.pages[at].place = 0;
        self.copies[place as usize].page = NO_COPY;
        self.free.push(place);
    }

    /// Pages with a copy.
    pub fn copies(&self) -> u64 {
        (self.copies.len() - self.free.len()) as u64
    }

    /// Memory that is or may be in use, without the copies' unused budget.
    pub fn bytes(&self) -> u64 {
        let tables =
            self.pages.len() * size_of::<Entry>() + self.twins.len() * 8 + self.copies.len() * size_of::<Copy>();
        (tables + self.memory.len() * CHUNK as usize * PAGE) as u64
    }

    fn place(&self, index: u64) -> Option<u32> {
        self.pages.get(index as usize).filter(|entry| entry.place != SHUNNED)?.place.checked_sub(1)
    }

    fn twin_slot(&self, hash: PageHash) -> usize {
        hash as usize & (self.twins.len() - 1)
    }

    fn store(&mut self, place: u32, content: &Page) {
        let at = (place % CHUNK) as usize * PAGE;
        if let Some(room) = self.memory.get_mut((place / CHUNK) as usize) {
            room[at..at + PAGE].copy_from_slice(content);
        }
    }

    /// Count a sending of page `at`; how many sendings ago the one before was.
    fn tick(&mut self, at: usize) -> u32 {
        self.now = self.now.wrapping_add(1).max(1);
        self.now.wrapping_sub(std::mem::replace(&mut self.pages[at].time, self.now))
    }

    /// A place for a page that is sent for the first time (`first`), or was `last` sendings ago.
    fn admit(&mut self, first: bool, last: u32) -> Option<u32> {
        // A first copy says nothing about what will be written; it is kept only where there is room for all.
        if first && (self.capacity as usize) < self.pages.len() {
            return None;
        }
        if let Some(place) = self.free.pop() {
            return Some(place);
        }
        let new = self.copies.len() as u32;
        if new < self.capacity {
            if new.is_multiple_of(CHUNK) {
                let pages = CHUNK.min(self.capacity - new);
                self.memory.push(vec![0; pages as usize * PAGE].into_boxed_slice());
            }
            self.copies.push(Copy { page: NO_COPY, heat: 0, useless: 0 });
            return Some(new);
        }
        if last > self.capacity {
            return None;
        }
        for _ in 0..SWEEP.min(self.capacity) {
            let place = self.hand;
            self.hand = (self.hand + 1) % self.capacity;
            let copy = &mut self.copies[place as usize];
            if copy.heat == 0 {
                if let Some(old) = self.pages.get_mut(copy.page as usize) {
                    old.place = 0;
                }
                return Some(place);
            }
            copy.heat -= 1;
        }
        None
    }
}

fn twin_tag(hash: PageHash) -> u32 {
    (hash >> 64) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::page_hash;

    fn page(fill: u64) -> Page {
        let mut page = [0; PAGE];
        page.as_chunks_mut::<8>().0.fill((fill + 1).to_le_bytes());
        page
    }

    fn send(shadow: &mut Shadow, index: u64, fill: u64) {
        let content = page(fill);
        shadow.sent(index, page_hash(1, &content), &content, fill % 8 != 7);
    }

    #[test]
    fn a_page_that_is_sent_again_gets_a_copy_and_its_hash_is_known_at_once() {
        let mut shadow = Shadow::new(100, 10);
        assert_eq!(shadow.known(3), Known::Nothing);
        send(&mut shadow, 3, 7);
        assert_eq!(shadow.known(3), Known::Hash(page_hash(1, &page(7))));
        assert!(shadow.copy(3).is_none(), "a first copy does not fill the room");
        send(&mut shadow, 3, 8);
        assert!(shadow.copy(3) == Some(&page(8)));
        shadow.sent_zero(3);
        assert_eq!((shadow.known(3), shadow.copy(3)), (Known::Zero, None));
    }

    #[test]
    fn a_page_whose_copy_is_never_of_use_keeps_none() {
        let mut shadow = Shadow::new(100, 10);
        let mut with = 0;
        for round in 0..1000 {
            shadow.sent(3, u128::from(round) + 2, &page(round), shadow.copy(3).is_none());
            with += u32::from(shadow.copy(3).is_some());
        }
        assert!(with < 100, "it had a copy {with} times of 1000");
        (0..100).for_each(|round| shadow.sent(3, u128::from(round) + 2, &page(round), true));
        assert!(shadow.copy(3).is_some(), "and has one again since that is of use");
    }

    #[test]
    fn without_a_budget_there_are_hashes_only() {
        let mut shadow = Shadow::new(100, 0);
        (0..5).for_each(|round| send(&mut shadow, 3, round));
        assert!(shadow.copy(3).is_none() && shadow.known(3) != Known::Nothing);
        assert_eq!(shadow.copies(), 0);
    }

    #[test]
    fn pages_that_are_written_all_the_time_stay_while_others_are_swept_over() {
        let mut shadow = Shadow::new(10_000, 64);
        (0..10_000).for_each(|index| send(&mut shadow, index, 0));
        let hot: Vec<u64> = (0..32).map(|i| i * 300).collect();
        let mut round = 0;
        for sweep in 0..200u64 {
            for _ in 0..2 {
                round += 1;
                hot.iter().for_each(|index| send(&mut shadow, *index, round));
            }
            (0..100).for_each(|i| send(&mut shadow, (sweep * 100 + i) % 10_000, round));
        }
        let kept = hot.iter().filter(|index| shadow.copy(**index).is_some()).count();
        assert!(kept >= 28, "{kept} of 32 hot pages have a copy");
        assert!(shadow.copies() <= 64);
    }

    #[test]
    fn a_new_working_set_replaces_the_old_one() {
        let mut shadow = Shadow::new(1000, 50);
        (0..1000).for_each(|index| send(&mut shadow, index, 0));
        for set in [0u64, 500] {
            (0..50).for_each(|round| (0..40).for_each(|i| send(&mut shadow, set + i, round)));
        }
        let kept = (500..540).filter(|index| shadow.copy(*index).is_some()).count();
        assert!(kept >= 38, "{kept} of 40");
    }

    #[test]
    fn a_twin_is_a_page_that_still_has_that_content() {
        let mut shadow = Shadow::new(10, 10);
        send(&mut shadow, 1, 5);
        let hash = page_hash(1, &page(5));
        assert_eq!(shadow.twin(hash), Some(1));
        send(&mut shadow, 1, 6);
        assert_eq!(shadow.twin(hash), None);
    }

    proptest! {
        #[test]
        fn whatever_is_sent_every_copy_and_every_hash_is_what_was_sent_last(
            sends in proptest::collection::vec((0u64..24, 0u64..10), 0..400), capacity in 0u64..30,
        ) {
            let mut shadow = Shadow::new(20, capacity);
            let mut truth = [None; 24];
            for (index, fill) in sends {
                truth[index as usize] = Some(fill);
                if fill == 0 { shadow.sent_zero(index) } else { send(&mut shadow, index, fill) }
            }
            let mut copies = 0;
            for (index, fill) in (0u64..20).zip(truth) {
                let known = match fill {
                    None => Known::Nothing,
                    Some(0) => Known::Zero,
                    Some(fill) => Known::Hash(page_hash(1, &page(fill))),
                };
                prop_assert_eq!(shadow.known(index), known);
                if let Some(copy) = shadow.copy(index) {
                    copies += 1;
                    prop_assert!(*copy == page(fill.unwrap()));
                }
            }
            prop_assert_eq!(shadow.copies(), copies);
            prop_assert!(copies <= capacity);
            for fill in 1..10 {
                if let Some(twin) = shadow.twin(page_hash(1, &page(fill))) {
                    prop_assert_eq!(truth[twin as usize], Some(fill));
                }
            }
            prop_assert_eq!(shadow.known(22), Known::Nothing, "beyond RAM nothing is known");
        }
    }
}
