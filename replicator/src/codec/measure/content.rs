//! Made-up guests: what they hold and what they write. Everything follows from a fixed seed.

use crate::codec::{PAGE, Page};

/// What a guest's memory is full of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// English text: lines appended to pages, words exchanged in the middle, whole pages read anew.
    Text,
    /// Database pages: rows changed in place under a new log position, entries moved to make room, a log of fresh pages.
    Database,
    /// Memory freed and taken again: mostly zero pages, small structures, single words.
    ZeroHeavy,
    /// Noise in every byte: nothing helps.
    Random,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Text, Self::Database, Self::ZeroHeavy, Self::Random];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Database => "database",
            Self::ZeroHeavy => "zero-heavy",
            Self::Random => "random",
        }
    }
}

/// The corpus.
static CORPUS: &str = include_str!("../../../../LICENSE");

/// A guest's RAM and what drives it.
#[derive(Debug)]
pub struct Guest {
    /// Its pages.
    pub ram: Vec<Page>,
    content: Content,
    random: u64,
    words: Vec<&'static str>,
    /// Bytes of text on each page; the next page of the log.
    filled: Vec<u16>,
    log: usize,
    position: u64,
}

impl Guest {
    /// A guest with pages of the content.
    pub fn new(content: Content, pages: usize) -> Self {
        let words = CORPUS.split_inclusive(char::is_whitespace).collect();
        let ram = vec![[0; PAGE]; pages];
        let mut guest =
            Self { ram, content, random: 0x9E37_79B9_7F4A_7C15, words, filled: vec![0; pages], log: 0, position: 1 };
        for index in 0..pages {
            match content {
                Content::Text => guest.text_page(index),
                Content::Database => guest.rows(index),
                Content::ZeroHeavy if index % 3 == 0 => guest.structure(index),
                Content::ZeroHeavy => {}
                Content::Random => guest.noise(index, 0, PAGE),
            }
        }
        guest
    }

    /// One epoch: `count` different pages are written (some with what they held); their numbers, ascending.
    pub fn run(&mut self, count: u64) -> Vec<u64> {
        let pages = self.ram.len();
        let mut dirty = std::collections::BTreeSet::new();
        let count = (count as usize).min(pages / 2);
        while dirty.len() < count {
            // Four fifths of the writes go to an eighth of the pages.
            let index = if self.below(5) == 0 { self.below(pages) } else { self.below(pages / 8) };
            let index = if self.content == Content::Database && self.below(8) == 0 {
                // The log goes through the upper half, page by page.
                self.log = (self.log + 1) % (pages / 2);
                pages / 2 + self.log
            } else {
                index
            };
            if dirty.insert(index as u64) {
                self.write(index);
            }
        }
        dirty.into_iter().collect()
    }

    fn write(&mut self, index: usize) {
        match (self.content, self.below(20)) {
            (Content::Text, 0..4) => self.text_page(index),
            (Content::Text, 4..8) => self.exchange_words(index),
            (Content::Text, 8..10) => {}
            (Content::Text, _) => self.append_line(index),
            (Content::Database, _) if index == self.ram.len() / 2 + self.log => self.rows(index),
            (Content::Database, 0..2) => {}
            (Content::Database, 2..7) => self.insert_entry(index),
            (Content::Database, _) => self.update_row(index),
            (Content::ZeroHeavy, 0..12) => self.ram[index] = [0; PAGE],
            (Content::ZeroHeavy, 12..16) => self.structure(index),
            (Content::ZeroHeavy, _) => self.store(index, 64),
            (Content::Random, _) => self.noise(index, 0, PAGE),
        }
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 32) % n.max(1) as u64) as usize
    }

    fn noise(&mut self, index: usize, from: usize, to: usize) {
        for at in (from..to).step_by(8) {
            let word = self.next().to_le_bytes();
            let n = (to - at).min(8);
            self.ram[index][at..at + n].copy_from_slice(&word[..n]);
        }
    }

    fn store(&mut self, index: usize, at: usize) {
        let word = self.next().to_le_bytes();
        self.ram[index][at..at + 8].copy_from_slice(&word);
    }

    /// Text from `from` up to `to` at most: runs of the corpus of a sentence's length, from anywhere.
    fn text(&mut self, index: usize, from: usize, to: usize) -> usize {
        let mut at = from;
        while at < to {
            let first = self.below(self.words.len());
            for word in 0..4 + self.below(12) {
                let word = self.words[(first + word) % self.words.len()].as_bytes();
                let n = word.len().min(to - at);
                self.ram[index][at..at + n].copy_from_slice(&word[..n]);
                at += n;
            }
        }
        at
    }

    fn text_page(&mut self, index: usize) {
        self.text(index, 0, PAGE);
        self.filled[index] = 0;
    }

    fn append_line(&mut self, index: usize) {
        let from = usize::from(self.filled[index]);
        let to = (from + 40 + self.below(160)).min(PAGE);
        self.text(index, from, to);
        self.filled[index] = if to == PAGE { 0 } else { to as u16 };
    }

    /// A word of another length: the rest of the paragraph moves.
    fn exchange_words(&mut self, index: usize) {
        let (at, by) = (self.below(PAGE - 600), 1 + self.below(8));
        self.ram[index].copy_within(at..at + 500, at + by);
        self.text(index, at, at + by);
    }

    /// A page of rows: a header, then keys, numbers, short names.
    fn rows(&mut self, index: usize) {
        self.ram[index] = [0; PAGE];
        self.log_position(index);
        for row in (64..PAGE - 96).step_by(96) {
            let key = (index * 1000 + row) as u64;
            self.ram[index][row..row + 8].copy_from_slice(&key.to_be_bytes());
            self.noise(index, row + 8, row + 24);
            self.ram[index][row + 24..row + 28].copy_from_slice(&(key as u32 % 5).to_le_bytes());
            self.text(index, row + 32, row + 72);
        }
    }

    fn log_position(&mut self, index: usize) {
        self.position += 300;
        let position = self.position.to_le_bytes();
        self.ram[index][..8].copy_from_slice(&position);
    }

    fn update_row(&mut self, index: usize) {
        for _ in 0..1 + self.below(4) {
            let row = 64 + 96 * self.below(40);
            self.noise(index, row + 8, row + 16);
            let at = row + 32 + self.below(20);
            let to = at + 4 + self.below(16);
            self.text(index, at, to);
        }
        self.log_position(index);
    }

    /// An entry of an index goes between two others.
    fn insert_entry(&mut self, index: usize) {
        let at = 64 + 16 * self.below(200);
        let end = (at + 512).min(PAGE - 16);
        self.ram[index].copy_within(at..end, at + 16);
        self.noise(index, at, at + 16);
        self.log_position(index);
    }

    fn structure(&mut self, index: usize) {
        self.ram[index] = [0; PAGE];
        let len = 64 + 8 * self.below(64);
        self.noise(index, 0, len);
    }
}
