//! The stage: the pages of the epoch that is arriving, decoded, beside the image until they are committed.
//!
//! ```text
//! stage         slots of 4096 bytes, in the order in which pages first arrived
//! stage.index   "UndStg2\n", u64 LE hash seed, then for each page: u64 LE index, u64 LE slot (all ones = zeros), u128 LE hash
//! ```
//! Whole pages, not records: a record may be a change to what RAM held, and RAM is half overwritten when an interrupted apply
//! is done again. Applying is therefore a plain copy, as often as need be.
//!
//! `stage` is written through a mapping, so that a page is copied once on its way. `stage.index` is written when the epoch is
//! complete; its CRC-32 stands in the commit record, and the hashes in it vouch for the slots. The room of earlier epochs is used
//! again; what was not needed for a while is given back.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;

use crate::codec::{PAGE, Page, PageHash, Target, page_hash};
use crate::durable::Pending;
use crate::image::{ImageError, io_error};
use crate::mapping::WriteMap;

const MAGIC: &[u8; 8] = b"UndStg2\n";
const HEAD: usize = 16;
const ENTRY: usize = 32;
/// Slots in one mapping.
const CHUNK: u32 = 1024;
/// Slots for which room is taken at once: little, as what else is on the file system may need it.
const STEP: u32 = 32;
/// Room that was not needed in so many epochs is given back.
const PATIENCE: u32 = 128;
/// Pieces in one write; the kernel takes 1024.
const PIECES: usize = 512;

static ZEROS: Page = [0; PAGE];

/// Where a page's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Slot(u32),
    Zeros,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    page: u64,
    place: Place,
    hash: PageHash,
}

/// See the module.
#[derive(Debug)]
pub struct Stage {
    path: PathBuf,
    file: File,
    index: File,
    chunks: Vec<WriteMap>,
    entries: Vec<Entry>,
    /// For each page of RAM the number of its entry plus one.
    by_page: Vec<u32>,
    slots: u32,
    /// Slots that the file has room for; the mappings reach beyond.
    allocated: u32,
    limit: u64,
    /// The most slots since room was last given back, and the epochs since then.
    peak: u32,
    epochs: u32,
    bytes: Vec<u8>,
    order: Vec<u32>,
}

impl Stage {
    /// Open the files in `dir`. Nothing is read yet.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let open = |name: &str| {
            let path = dir.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(&path).map_err(|e| io_error("open", &path, e))
        };
        Ok(Self {
            file: open("stage")?,
            index: open("stage.index")?,
            path: dir.join("stage"),
            chunks: Vec::new(),
            entries: Vec::new(),
            by_page: Vec::new(),
            slots: 0,
            allocated: 0,
            limit: u64::MAX,
            peak: 0,
            epochs: 0,
            bytes: Vec::new(),
            order: Vec::new(),
        })
    }

    /// Let no epoch take more than `bytes`.
    pub fn limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    /// Bytes that the epoch takes so far.
    pub fn len(&self) -> u64 {
        u64::from(self.slots) * PAGE as u64 + (HEAD + self.entries.len() * ENTRY) as u64
    }

    /// Whether no page has arrived.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pages that have arrived.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().map(|entry| entry.page)
    }

    /// Begin an epoch.
    pub fn reset(&mut self) -> Result<(), ImageError> {
        self.forget();
        self.epochs += 1;
        if self.epochs >= PATIENCE {
            let keep = self.peak.div_ceil(CHUNK).max(1);
            if (keep as usize) < self.chunks.len() {
                self.chunks.truncate(keep as usize);
                let len = u64::from(keep) * u64::from(CHUNK) * PAGE as u64;
                self.file.set_len(len).map_err(|e| io_error("shorten", &self.path, e))?;
                self.allocated = self.allocated.min(keep * CHUNK);
            }
            (self.peak, self.epochs) = (0, 0);
        }
        Ok(())
    }

    /// Empty, and give all room back.
    pub fn release(&mut self) -> Result<(), ImageError> {
        self.forget();
        self.chunks.clear();
        self.allocated = 0;
        self.by_page = Vec::new();
        (self.peak, self.epochs) = (0, 0);
        let emptied = self.file.set_len(0).and_then(|()| self.index.set_len(0));
        emptied.map_err(|e| io_error("empty", &self.path, e))
    }

    fn forget(&mut self) {
        for entry in self.entries.drain(..) {
            if let Some(number) = self.by_page.get_mut(entry.page as usize) {
                *number = 0;
            }
        }
        self.peak = self.peak.max(self.slots);
        self.slots = 0;
    }

    /// The content of page `index`, if it has arrived.
    pub fn page(&self, index: u64) -> Option<&Page> {
        let number = self.by_page.get(index as usize)?.checked_sub(1)?;
        match self.entries.get(number as usize)?.place {
            Place::Zeros => Some(&ZEROS),
            Place::Slot(slot) => self.slot(slot),
        }
    }

    /// Page `index`, below `ram_pages`, has arrived.
    pub fn put(&mut self, index: u64, ram_pages: u64, content: &Page, hash: PageHash) -> Result<(), ImageError> {
        let number = self.entry(index, ram_pages)?;
        let slot = match self.entries[number].place {
            Place::Slot(slot) => slot,
            Place::Zeros => self.grow()?,
        };
        self.entries[number] = Entry { page: index, place: Place::Slot(slot), hash };
        let at = (slot % CHUNK) as usize * PAGE;
        self.chunks[(slot / CHUNK) as usize].bytes_mut()[at..at + PAGE].copy_from_slice(content);
        Ok(())
    }

    /// Page `index`, below `ram_pages`, has arrived as zeros.
    pub fn put_zeros(&mut self, index: u64, ram_pages: u64) -> Result<(), ImageError> {
        let number = self.entry(index, ram_pages)?;
        self.entries[number] = Entry { page: index, place: Place::Zeros, hash: 0 };
        Ok(())
    }

    fn slot(&self, slot: u32) -> Option<&Page> {
        let chunk = self.chunks.get((slot / CHUNK) as usize)?.bytes();
        chunk.get((slot % CHUNK) as usize * PAGE..)?.first_chunk()
    }

    /// The number of the page's entry, a new one if it has none.
    fn entry(&mut self, index: u64, ram_pages: u64) -> Result<usize, ImageError> {
        if self.by_page.len() < ram_pages as usize {
            self.by_page.resize(ram_pages as usize, 0);
        }
        let number = &mut self.by_page[index as usize];
        if *number == 0 {
            self.entries.push(Entry { page: index, place: Place::Zeros, hash: 0 });
            *number = self.entries.len() as u32;
            if self.len() > self.limit {
                return Err(ImageError::StageFull { limit: self.limit });
            }
        }
        Ok(self.by_page[index as usize] as usize - 1)
    }

    fn grow(&mut self) -> Result<u32, ImageError> {
        let slot = self.slots;
        self.slots += 1;
        if self.len() > self.limit {
            return Err(ImageError::StageFull { limit: self.limit });
        }
        if slot >= self.allocated {
            let (offset, len) = (u64::from(slot) * PAGE as u64, u64::from(STEP) * PAGE as u64);
            self.allocate(offset, len).map_err(|e| io_error("write", &self.path, e))?;
            self.allocated = slot + STEP;
        }
        if (slot / CHUNK) as usize >= self.chunks.len() {
            self.map(u64::from(slot) * PAGE as u64, CHUNK as usize * PAGE)?;
        }
        Ok(slot)
    }

    fn map(&mut self, offset: u64, len: usize) -> Result<(), ImageError> {
        let map = WriteMap::new(&self.file, offset, len).map_err(|e| io_error("map", &self.path, e))?;
        self.chunks.push(map);
        Ok(())
    }

    /// A full file system says so here, and not by a signal when the mapping is written.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::empty(), offset as i64, len as i64) {
            Ok(()) => Ok(()),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                // Slower: have every page written once.
                let zeros = [0; STEP as usize * PAGE];
                let mut at = offset;
                while at < offset + len {
                    self.file.write_all_at(&zeros, at)?;
                    at += zeros.len() as u64;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Make the epoch durable as far as the file system is: write the index. What the commit record needs to know it again.
    pub fn finish(&mut self, seed: u64) -> Result<Pending, ImageError> {
        self.bytes.clear();
        self.bytes.extend_from_slice(MAGIC);
        self.bytes.extend_from_slice(&seed.to_le_bytes());
        for entry in &self.entries {
            let slot = match entry.place {
                Place::Slot(slot) => u64::from(slot),
                Place::Zeros => u64::MAX,
            };
            self.bytes.extend_from_slice(&entry.page.to_le_bytes());
            self.bytes.extend_from_slice(&slot.to_le_bytes());
            self.bytes.extend_from_slice(&entry.hash.to_le_bytes());
        }
        let (bytes, index, file) = (&self.bytes, &self.index, &self.file);
        let written = index.write_all_at(bytes, 0).and_then(|()| index.set_len(bytes.len() as u64));
        let synced = written.and_then(|()| file.sync_data()).and_then(|()| index.sync_data());
        synced.map_err(|e| io_error("write", &self.path, e))?;
        Ok(Pending { stage_len: bytes.len() as u64, stage_crc: crc32fast::hash(bytes) })
    }

    /// After a restart: take the stage for the one that was committed, if it is.
    pub fn load(&mut self, pending: Pending, ram_pages: u64) -> Result<(), ImageError> {
        self.forget();
        self.chunks.clear();
        self.allocated = 0;
        let unreadable = |e| io_error("read", &self.path, e);
        let damaged = |why: &str| ImageError::Stage { file: self.path.display().to_string(), why: why.to_owned() };
        let len = self.index.metadata().map_err(unreadable)?.len();
        if len != pending.stage_len || len < HEAD as u64 {
            return Err(damaged("the length of its index is wrong"));
        }
        let mut bytes = vec![0; len as usize];
        self.index.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
        if crc32fast::hash(&bytes) != pending.stage_crc {
            return Err(damaged("its index has a wrong checksum"));
        }
        let Some((head, entries)) = bytes.split_first_chunk::<HEAD>().filter(|(head, _)| head.starts_with(MAGIC))
        else {
            return Err(damaged("it is not of this version of Understudy"));
        };
        let (_, seed) = u64s(head);
        let mut parsed = Vec::with_capacity(entries.len() / ENTRY);
        let mut slots = 0u64;
        for entry in entries.as_chunks::<ENTRY>().0 {
            let (place, hash) = entry.split_at(16);
            let (page, slot) = place.first_chunk().map_or((u64::MAX, 0), u64s);
            let hash = hash.first_chunk().map_or(0, |hash| u128::from_le_bytes(*hash));
            let place = match u32::try_from(slot) {
                Ok(slot) => Place::Slot(slot),
                Err(_) if slot == u64::MAX => Place::Zeros,
                Err(_) => return Err(damaged("it names a page that it cannot have")),
            };
            if page >= ram_pages {
                return Err(damaged("it names a page beyond RAM"));
            }
            if let Place::Slot(slot) = place {
                slots = slots.max(u64::from(slot) + 1);
            }
            parsed.push(Entry { page, place, hash });
        }
        let chunks = slots.div_ceil(u64::from(CHUNK));
        let chunk_len = CHUNK as usize * PAGE;
        let room = slots * PAGE as u64;
        if self.file.metadata().map_err(unreadable)?.len() < room {
            return Err(damaged("it is too short"));
        }
        for chunk in 0..chunks {
            self.map(chunk * chunk_len as u64, chunk_len)?;
        }
        for entry in &parsed {
            let good = match entry.place {
                Place::Zeros => true,
                Place::Slot(slot) => self.slot(slot).is_some_and(|page| page_hash(seed, page) == entry.hash),
            };
            if !good {
                return Err(ImageError::Stage {
                    file: self.path.display().to_string(),
                    why: format!("page {} is not what was committed", entry.page),
                });
            }
        }
        // (The file has room for all of them, so there are fewer than 2^32.)
        (self.entries, self.slots) = (parsed, slots as u32);
        Ok(())
    }

    /// Write all pages to RAM, in the order of RAM, as few writes as that takes. Idempotent.
    pub fn apply(&mut self, ram: &File) -> io::Result<()> {
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend(0..self.entries.len() as u32);
        // Nearly sorted as a rule: the dirty log is in the order of RAM.
        order.sort_by_key(|number| self.entries[*number as usize].page);
        let mut pieces: Vec<IoSlice<'_>> = Vec::with_capacity(PIECES);
        let (mut begin, mut next) = (0, 0);
        for number in &order {
            let entry = &self.entries[*number as usize];
            let content = match entry.place {
                Place::Zeros => &ZEROS,
                // Only slots that were mapped are given out.
                Place::Slot(slot) => self.slot(slot).ok_or(io::ErrorKind::InvalidData)?,
            };
            if entry.page != next || pieces.len() == PIECES {
                write_pieces(ram, &mut pieces, begin)?;
                begin = entry.page;
            }
            pieces.push(IoSlice::new(content));
            next = entry.page + 1;
        }
        write_pieces(ram, &mut pieces, begin)?;
        drop(pieces);
        self.order = order;
        Ok(())
    }
}

/// The stage over the RAM that it will be applied to: where an epoch's batches are decoded.
#[derive(Debug)]
pub struct OverRam<'a> {
    /// Takes the pages.
    pub stage: &'a mut Stage,
    /// Has those that have not arrived in this epoch.
    pub ram: &'a File,
    /// Its path, for messages.
    pub ram_path: &'a Path,
    /// Its size.
    pub ram_pages: u64,
}

impl Target for OverRam<'_> {
    type Error = ImageError;

    fn read(&mut self, index: u64, page: &mut Page) -> Result<(), ImageError> {
        match self.stage.page(index) {
            Some(staged) => *page = *staged,
            None => read_page(self.ram, self.ram_path, index, page)?,
        }
        Ok(())
    }

    fn page(&mut self, index: u64, content: &Page, hash: PageHash) -> Result<(), ImageError> {
        self.stage.put(index, self.ram_pages, content, hash)
    }

    fn zeros(&mut self, index: u64, count: u64) -> Result<(), ImageError> {
        (index..index + count).try_for_each(|index| self.stage.put_zeros(index, self.ram_pages))
    }
}

/// One page of RAM, by a read and not through a mapping.
pub(crate) fn read_page(ram: &File, path: &Path, index: u64, page: &mut Page) -> Result<(), ImageError> {
    ram.read_exact_at(page, index * PAGE as u64).map_err(|e| io_error("read", path, e))
}

/// Write the pieces from page `begin` on, and empty the list.
fn write_pieces(ram: &File, pieces: &mut Vec<IoSlice<'_>>, begin: u64) -> io::Result<()> {
    let mut at = begin * PAGE as u64;
    let mut rest = &mut pieces[..];
    while !rest.is_empty() {
        match pwritev(ram, rest, at as i64) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                at += n as u64;
                IoSlice::advance_slices(&mut rest, n);
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    pieces.clear();
    Ok(())
}

fn u64s(bytes: &[u8; 16]) -> (u64, u64) {
    let both = u128::from_le_bytes(*bytes);
    (both as u64, (both >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 4096;

    fn page(fill: u8) -> Page {
        [fill; PAGE]
    }

    fn put(stage: &mut Stage, index: u64, fill: u8) {
        stage.put(index, PAGES, &page(fill), page_hash(3, &page(fill))).unwrap();
    }

    fn ram(dir: &Path) -> File {
        let ram = File::options().read(true).write(true).create(true).truncate(false).open(dir.join("ram")).unwrap();
        ram.set_len(PAGES * PAGE as u64).unwrap();
        ram
    }

    fn read(ram: &File, index: u64) -> u8 {
        let mut content = page(0);
        ram.read_exact_at(&mut content, index * PAGE as u64).unwrap();
        assert!(content.iter().all(|byte| *byte == content[0]), "page {index} is torn");
        content[0]
    }

    #[test]
    fn what_was_finished_is_found_and_applied_after_a_restart_however_often() {
        let dir = tempfile::tempdir().unwrap();
        let ram = ram(dir.path());
        let mut stage = Stage::open(dir.path()).unwrap();
        // More than one chunk, backwards and with a hole; some twice.
        (0..1500u64).rev().for_each(|i| put(&mut stage, i * 2 % 1501, (i % 200) as u8 + 1));
        stage.put_zeros(7, PAGES).unwrap();
        put(&mut stage, 7, 77);
        stage.put_zeros(9, PAGES).unwrap();
        let pending = stage.finish(3).unwrap();
        let expected: Vec<u8> = (0..1501).map(|i| stage.page(i).map_or(0, |page| page[0])).collect();
        assert_eq!((expected[7], expected[9]), (77, 0));
        drop(stage);
        let mut stage = Stage::open(dir.path()).unwrap();
        stage.load(pending, PAGES).unwrap();
        for round in 0..3 {
            if round == 1 {
                // As if the last time had died in the middle.
                ram.write_all_at(&[9; 200 * PAGE], 0).unwrap();
            }
            stage.apply(&ram).unwrap();
            for (index, fill) in (0u64..).zip(&expected) {
                assert_eq!(read(&ram, index), *fill, "page {index}");
            }
        }
    }

    #[test]
    fn a_stage_that_is_not_the_one_that_was_committed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Stage::open(dir.path()).unwrap();
        put(&mut stage, 1, 1);
        put(&mut stage, 2, 2);
        let pending = stage.finish(3).unwrap();
        drop(stage);
        let load = |pending| Stage::open(dir.path()).unwrap().load(pending, PAGES);
        load(pending).unwrap();
        for wrong in [Pending { stage_len: pending.stage_len + 1, ..pending }, Pending { stage_crc: 1, ..pending }] {
            assert!(matches!(load(wrong), Err(ImageError::Stage { .. })));
        }
        assert!(matches!(Stage::open(dir.path()).unwrap().load(pending, 2), Err(ImageError::Stage { .. })));
        let slots = File::options().write(true).open(dir.path().join("stage")).unwrap();
        slots.write_all_at(&[9], PAGE as u64 + 5).unwrap();
        assert!(load(pending).unwrap_err().to_string().contains("page 2"));
        slots.set_len(0).unwrap();
        assert!(load(pending).unwrap_err().to_string().contains("too short"));
    }

    #[test]
    fn an_epoch_takes_no_more_than_its_limit_and_room_that_is_not_needed_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut stage = Stage::open(dir.path()).unwrap();
        stage.limit(3000 * 5000);
        (0..3000).for_each(|index| put(&mut stage, index, 1));
        let len = || std::fs::metadata(dir.path().join("stage")).unwrap().len();
        assert!((3000..3000 + u64::from(STEP)).contains(&(len() / PAGE as u64)), "{}", len());
        let full = (3000..PAGES).find_map(|index| stage.put(index, PAGES, &page(1), 0).err());
        assert!(matches!(full, Some(ImageError::StageFull { limit: 15_000_000 })), "{full:?}");
        for _ in 0..2 * PATIENCE {
            stage.reset().unwrap();
            put(&mut stage, 5, 5);
        }
        assert_eq!(len(), u64::from(CHUNK) * PAGE as u64);
        assert_eq!(stage.page(5), Some(&page(5)));
        stage.release().unwrap();
        assert_eq!((len(), stage.page(5)), (0, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_index_is_a_stage_or_refused_but_never_panics(
            body in proptest::collection::vec(prop_oneof![0u64..6, Just(u64::MAX), any::<u64>()], 0..24), cut in 0usize..40,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut bytes = MAGIC.to_vec();
            bytes.extend_from_slice(&3u64.to_le_bytes());
            bytes.extend(body.iter().flat_map(|word| word.to_le_bytes()));
            bytes.truncate(bytes.len().saturating_sub(cut / 4));
            std::fs::write(dir.path().join("stage.index"), &bytes).unwrap();
            std::fs::write(dir.path().join("stage"), vec![0; 4 << 20]).unwrap();
            let pending = Pending { stage_len: bytes.len() as u64, stage_crc: crc32fast::hash(&bytes) };
            let mut stage = Stage::open(dir.path()).unwrap();
            if stage.load(pending, PAGES).is_ok() {
                let ram = ram(dir.path());
                stage.apply(&ram).unwrap();
            }
        }
    }
}
