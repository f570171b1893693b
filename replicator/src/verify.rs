//! Verify: the standby's RAM is compared with the primary's, all of it, while the guest runs.
//!
//! Each epoch's digest proves that what was *sent* arrived. It says nothing of a page that was changed and not sent (a hole in
//! the dirty log), sent and then applied wrongly, or damaged later in the standby's memory. Those are what this finds.
//!
//! ```text
//! sender             cut a      hash chunk from RAM          cut b            End(b)  Check(b)
//! ───────────────────┬──────────┬─────────────┬──────────────┬────────────────┬───────┬──────►
//!                    since      └── window ───┘              closes: the chunk's pages that no epoch from a to b carried
//! receiver                                                                       Commit(b) Apply(b)  compare ─► Checked(b)
//! ```
//! **Why it is sound.** The window opens after a cut was asked for (`since`) and is complete before the next is (`closes`).
//! A page that is written between its hash and cut b is in the dirty log, so it is in the pages of an epoch up to b; so is one that was
//! written between the last completed cut and its hash. All pages that epochs from a to b carry, before their cut or at it, are left
//! out of the check. Every other page therefore had one content from cut a to cut b: the one that was hashed, and the one
//! that checkpoint b must have. The `Check` follows `End(b)` in the stream, and the receiver answers it after it has applied b and
//! before it takes in anything later, so it compares with exactly checkpoint b, however many epochs are in flight.
//!
//! **What is not compared** in one window is tried again in later rounds, [`ROUNDS`] at the most. A page that is written in every
//! window is never compared; but then an epoch has carried it each time, under that epoch's digest, and its standby
//! copy was overwritten. The result says how many there were.
//!
//! A *difference* makes the image unfit: the receiver says so durably before it answers, and ends the connection; a first copy
//! makes a new image. Nothing here does I/O: [`worker`] hashes, the driver sends, the image compares.

pub mod worker;

use std::time::{Duration, Instant};

use understudy_protocol::ids::Epoch;
use understudy_protocol::statistics::VerifyStatus;

/// Pages in one check: 2 MiB. Reading and hashing them on the standby holds up the acknowledgement of the following epoch, so it must
/// not be much; there is a check in each epoch at the most, so it must not be little.
pub const CHUNK: u64 = 512;
/// A check of more pages is malformed.
pub const MOST_PAGES: u64 = 4096;
/// How often a page that was being written is tried again before it counts as busy.
pub const ROUNDS: u32 = 8;
/// Differing pages that are named in the status.
const NAMED: usize = 64;

/// What a page's content is compared by: eight bytes of its BLAKE3 digest. (Two contents that nobody chose agree by chance once
/// in 2^64.)
pub fn hash(page: &[u8]) -> u64 {
    let digest = blake3::hash(page);
    let mut first = [0; 8];
    first.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// What the sender asks the receiver to compare with the checkpoint that it just committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Page index and hash, ascending.
    pages: Vec<(u64, u64)>,
}

impl Check {
    /// Of these pages: index and hash, ascending, at most [`MOST_PAGES`].
    pub fn new(pages: Vec<(u64, u64)>) -> Self {
        debug_assert!(pages.is_sorted_by(|a, b| a.0 < b.0) && pages.len() as u64 <= MOST_PAGES);
        Self { pages }
    }

    /// Index and hash of each page, ascending.
    pub fn pages(&self) -> &[(u64, u64)] {
        &self.pages
    }

    /// For the wire: 16 bytes a page, index and hash, little endian.
    pub fn payload(&self) -> Vec<u8> {
        self.pages.iter().flat_map(|(page, hash)| [page.to_le_bytes(), hash.to_le_bytes()]).flatten().collect()
    }

    /// From the wire; `None` if it is not what a sender writes.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let numbers = parse_numbers(payload)?;
        if numbers.len() % 2 != 0 || numbers.len() as u64 / 2 > MOST_PAGES {
            return None;
        }
        let pages: Vec<(u64, u64)> = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        pages.is_sorted_by(|a, b| a.0 < b.0).then_some(Self { pages })
    }
}

/// A list of page indices for the wire.
pub fn page_list(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

/// And from it.
pub fn parse_page_list(payload: &[u8]) -> Option<Vec<u64>> {
    parse_numbers(payload).filter(|pages| pages.len() as u64 <= MOST_PAGES)
}

fn parse_numbers(payload: &[u8]) -> Option<Vec<u64>> {
    let (numbers, rest) = payload.as_chunks::<8>();
    rest.is_empty().then(|| numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
}

/// The differing pages as people read them.
pub fn names(pages: &[u64]) -> String {
    let mut text: Vec<String> = pages.iter().take(16).map(u64::to_string).collect();
    if pages.len() > text.len() {
        text.push(format!("… {} more", pages.len() - text.len()));
    }
    text.join(", ")
}

/// A set of pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    fn all(pages: u64) -> Self {
        let mut words = vec![u64::MAX; pages.div_ceil(64) as usize];
        if let (Some(last), true) = (words.last_mut(), !pages.is_multiple_of(64)) {
            *last = (1 << (pages % 64)) - 1;
        }
        Self { words }
    }
    pub(crate) fn none(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize] }
    }
    pub(crate) fn has(&self, page: u64) -> bool {
        self.words.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }
    pub(crate) fn insert(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
    }
    fn remove(&mut self, page: u64) {
        if let Some(word) = self.words.get_mut((page / 64) as usize) {
            *word &= !(1 << (page % 64));
        }
    }
    pub(crate) fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
    /// The first member from `page` on.
    pub(crate) fn next(&self, page: u64) -> Option<u64> {
        let mut at = (page / 64) as usize;
        let mut word = self.words.get(at)? & (u64::MAX << (page % 64));
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }
}

/// One comparison of all of RAM.
#[derive(Debug)]
struct Pass {
    number: u64,
    started: Instant,
    round: u32,
    /// Where the next window may begin.
    cursor: u64,
    /// Pages that no check has covered.
    open: PageSet,
}

/// A chunk on its way.
#[derive(Debug)]
struct Window {
    ticket: u64,
    first: u64,
    count: u64,
    since: Epoch,
    /// Pages of the chunk that an epoch carried, relative to `first`.
    carried: PageSet,
    hashes: Option<Vec<u64>>,
    closes: Option<Epoch>,
    /// Asked of the receiver.
    asked: Option<Vec<(u64, u64)>>,
}

/// A chunk to hash: all its pages, from RAM as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Job {
    /// Names the window.
    pub ticket: u64,
    /// First page.
    pub first: u64,
    /// Pages.
    pub count: u64,
}

/// What a pass needs next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Hash this and report it with [`Verify::hashed`].
    Hash(Job),
    /// Nothing: it is over.
    Over(Outcome),
}

/// How a pass ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every page that held still agrees.
    Agreed {
        /// Pages compared.
        compared: u64,
        /// Pages that were being written each time.
        busy: u64,
        /// How long it took.
        took: Duration,
    },
    /// These pages differ.
    Differs(Vec<u64>),
}

impl Outcome {
    /// As a sentence.
    pub fn sentence(&self, pass: u64) -> String {
        match self {
            Self::Agreed { compared, busy, took } => format!(
                "verify {pass}: {compared} pages agree; {busy} were being written each time and are covered by the digests of \
                 their epochs; it took {} ms",
                took.as_millis()
            ),
            Self::Differs(pages) => format!(
                "VERIFY {pass} FAILED: {} pages of the standby's memory differ from the primary's: {}; that image is given up and \
                 copied again",
                pages.len(),
                names(pages)
            ),
        }
    }
}

/// The sender's side: decides what is hashed and what is asked.
#[derive(Debug, Default)]
pub struct Verify {
    ram_pages: u64,
    pass: Option<Pass>,
    window: Option<Window>,
    tickets: u64,
    last_pass: u64,
    /// For the status.
    report: VerifyStatus,
    ended: Option<Instant>,
}

impl Verify {
    /// Begin a pass, or join the one that is under way. The answer is its number.
    pub fn request(&mut self, now: Instant) -> u64 {
        if let Some(pass) = &self.pass {
            return pass.number;
        }
        self.last_pass += 1;
        let open = PageSet::all(self.ram_pages);
        self.pass = Some(Pass { number: self.last_pass, started: now, round: 0, cursor: 0, open });
        self.last_pass
    }

    /// Whether a pass is under way.
    pub fn running(&self) -> bool {
        self.pass.is_some()
    }

    /// RAM has so many pages. If that is news, a pass that is under way begins again.
    pub fn ram_pages(&mut self, pages: u64) {
        if self.ram_pages != pages {
            self.ram_pages = pages;
            self.begin_again();
        }
    }

    /// The standby's image is made anew: nothing that was compared counts.
    pub fn begin_again(&mut self) {
        self.interrupted();
        if let Some(pass) = &mut self.pass {
            (pass.round, pass.cursor, pass.open) = (0, 0, PageSet::all(self.ram_pages));
        }
    }

    /// The connection is gone: what was under way is tried again later.
    pub fn interrupted(&mut self) {
        self.window = None;
    }

    /// Open the next window, if there is none and a pass wants one. `since`: the newest epoch whose cut was asked for.
    /// Call it only while epochs stream.
    pub fn open(&mut self, since: Epoch, now: Instant) -> Option<Next> {
        if self.window.is_some() {
            return None;
        }
        let pass = self.pass.as_mut()?;
        let first = loop {
            match pass.open.next(pass.cursor) {
                Some(page) => break page,
                None if pass.round + 1 < ROUNDS && pass.open.len() > 0 => {
                    pass.round += 1;
                    pass.cursor = 0;
                }
                // What is still open does not hold still.
                None => return self.finish(now).map(Next::Over),
            }
        };
        let count = CHUNK.min(self.ram_pages - first);
        pass.cursor = first + count;
        self.tickets += 1;
        let ticket = self.tickets;
        let carried = PageSet::none(count);
        self.window = Some(Window { ticket, first, count, since, carried, hashes: None, closes: None, asked: None });
        Some(Next::Hash(Job { ticket, first, count }))
    }

    fn finish(&mut self, now: Instant) -> Option<Outcome> {
        let pass = self.pass.take()?;
        let busy = pass.open.len();
        let outcome = Outcome::Agreed { compared: self.ram_pages - busy, busy, took: now.duration_since(pass.started) };
        self.end(pass.number, &outcome, now);
        self.report.passes += 1;
        self.report.busy_pages = busy;
        Some(outcome)
    }

    fn end(&mut self, number: u64, outcome: &Outcome, now: Instant) {
        self.window = None;
        self.ended = Some(now);
        self.report.last = outcome.sentence(number);
        if let Outcome::Agreed { took, .. } = outcome {
            self.report.last_ms = took.as_millis() as u64;
        }
    }

    /// The chunk of `ticket` was hashed (`None`: it could not be read; it is tried again in the next round).
    pub fn hashed(&mut self, ticket: u64, hashes: Option<Vec<u64>>) {
        let Some(window) = self.window.as_mut().filter(|w| w.ticket == ticket) else { return };
        match hashes {
            Some(hashes) if hashes.len() as u64 == window.count => window.hashes = Some(hashes),
            _ => self.window = None,
        }
    }

    /// A cut is about to be asked for: what was hashed until now was hashed before it.
    pub fn cut(&mut self, epoch: Epoch) {
        if let Some(window) = &mut self.window
            && window.hashes.is_some()
            && window.closes.is_none()
        {
            window.closes = Some(epoch);
        }
    }

    /// `epoch` carries these pages: u64 LE indices.
    pub fn carried(&mut self, epoch: Epoch, indices: &[[u8; 8]]) {
        let Some(window) = &mut self.window else { return };
        if epoch < window.since || window.closes.is_some_and(|closes| epoch > closes) {
            return;
        }
        for index in indices {
            let relative = u64::from_le_bytes(*index).wrapping_sub(window.first);
            if relative < window.count {
                window.carried.insert(relative);
            }
        }
    }

    /// The end of `epoch` was sent: what is to be asked next in the stream.
    pub fn ended(&mut self, epoch: Epoch) -> Option<Check> {
        let window = self.window.as_mut().filter(|window| window.asked.is_none())?;
        let closes = window.closes.filter(|closes| epoch >= *closes)?;
        let hashes = window.hashes.take();
        if epoch > closes {
            // That cut came to nothing; what its pages were is not known for certain.
            self.window = None;
            return None;
        }
        let open = &self.pass.as_ref()?.open;
        let still = (0..window.count).zip(hashes?).filter(|(i, _)| !window.carried.has(*i));
        let pages = still.map(|(i, hash)| (window.first + i, hash)).filter(|(page, _)| open.has(*page));
        let pages: Vec<(u64, u64)> = pages.collect();
        if pages.is_empty() {
            self.window = None;
            return None;
        }
        window.asked = Some(pages.clone());
        Some(Check::new(pages))
    }

    /// The receiver has compared, and these pages differ. The outcome is that of a pass which ends by it.
    pub fn checked(&mut self, epoch: Epoch, differing: &[u64], now: Instant) -> Option<Outcome> {
        let asked = self.window.as_ref().is_some_and(|w| w.asked.is_some() && w.closes == Some(epoch));
        let window = self.window.take_if(|_| asked)?;
        let pass = self.pass.as_mut()?;
        let asked = window.asked.unwrap_or_default();
        self.report.compared_pages += asked.len() as u64;
        if !differing.is_empty() {
            let number = pass.number;
            self.pass = None;
            self.report.failures += 1;
            self.report.differing_pages += differing.len() as u64;
            self.report.differing = differing.iter().copied().take(NAMED).collect();
            let outcome = Outcome::Differs(differing.to_vec());
            self.end(number, &outcome, now);
            return Some(outcome);
        }
        for (page, _) in asked {
            pass.open.remove(page);
        }
        if pass.open.len() > 0 { None } else { self.finish(now) }
    }

    /// For the status.
    pub fn report(&self, now: Instant) -> VerifyStatus {
        let open = self.pass.as_ref().map_or(0, |pass| pass.open.len());
        VerifyStatus {
            running: self.running(),
            pass: self.last_pass,
            progress_percent: match self.ram_pages {
                0 => 0,
                pages => ((pages - open.min(pages)) * 100 / pages) as u8,
            },
            last_ended_s: self.ended.map(|ended| now.duration_since(ended).as_secs()),
            ..self.report.clone()
        }
    }
}

#[cfg(test)]
mod tests;
