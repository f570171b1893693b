//! Which blocks of this disk a peer may lack: a bitmap in memory, and a file that never says less than it.
//!
//! A bit is for a *block* of 64 KiB (larger on disks above 2 TiB, so that the map stays below 4 MiB). A write to the base waits until the file says
//! that its block may differ. Merges have many blocks and one flush. A guest's direct writes would have to pay for a flush each, so
//! they mark a whole *region* (a 4096th of the disk, at least 16 MiB) as *hot*, once: after a crash all blocks of a hot region count as different.
//! When nobody writes directly any more, the exact blocks are stored and the regions cool. (DRBD's activity log is the same idea.)
//!
//! The file is made of pages of 512 bytes, which storage writes whole or not at all. Each has its number, the file's nonce and a CRC-32. A page that is
//! damaged counts as full of ones; a damaged first page makes the file worthless.
//!
//! | page | content (little endian, from byte 16 on) |
//! |---|---|
//! | each | at 0: nonce (8), at 8: page number (4), at 12: CRC-32 of the page with zeroes here (4) |
//! | 0 | `UsBm`, version 1 (4), the disk's id (8), bytes of the disk (8), of a block (8), of a region (8) |
//! | then | hot regions, 3968 bits a page |
//! | then | blocks, 3968 bits a page |

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use crate::error::{Doing, Error, Result};
use crate::store::{Directory, LogFile};

const PAGE: usize = 512;
const HEAD: usize = 16;
const BITS: u64 = ((PAGE - HEAD) * 8) as u64;
const MAGIC: [u8; 4] = *b"UsBm";
/// Most blocks in a map.
const BLOCKS: u64 = 1 << 25;
/// Largest file that is read: what the largest map needs, and room.
const LARGEST: u64 = 16 << 20;

/// How a disk is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a block.
    pub block: u64,
    /// Bytes of a region; a multiple of a block's.
    pub region: u64,
}

impl Geometry {
    /// For a disk of so many bytes.
    pub fn of(size: u64) -> Self {
        // Tiny disks have tiny blocks, so that there is something to choose from.
        let smallest = (size / 16).next_power_of_two().clamp(1 << 10, 1 << 16);
        let block = size.div_ceil(BLOCKS).next_power_of_two().max(smallest);
        let least = (size / 4).next_power_of_two().min(16 << 20);
        let region = (size / 4096).next_power_of_two().max(least).max(block);
        Geometry { size, block, region }
    }

    /// Blocks in it.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    fn regions(&self) -> u64 {
        self.size.div_ceil(self.region)
    }

    fn valid(&self) -> bool {
        self.block.is_power_of_two()
            && self.region.is_power_of_two()
            && (1 << 10..=1 << 40).contains(&self.block)
            && self.region >= self.block
            && self.blocks() <= BLOCKS
    }

    /// The blocks that bytes are in.
    pub fn blocks_of(&self, at: u64, len: u64) -> std::ops::Range<u64> {
        at / self.block..at.saturating_add(len).min(self.size).div_ceil(self.block)
    }

    /// Bytes of these blocks: the last one may be short.
    pub fn bytes_of(&self, blocks: std::ops::Range<u64>) -> (u64, u64) {
        let at = blocks.start * self.block;
        (at, (blocks.end * self.block).min(self.size).saturating_sub(at))
    }

    fn hot_pages(&self) -> u64 {
        self.regions().div_ceil(BITS)
    }

    fn pages(&self) -> u64 {
        1 + self.hot_pages() + self.blocks().div_ceil(BITS)
    }
}

/// Bits with their number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bits {
    words: Vec<u64>,
    len: u64,
    ones: u64,
}

impl Bits {
    pub fn new(len: u64) -> Self {
        Bits { words: vec![0; len.div_ceil(64) as usize], len, ones: 0 }
    }
    pub fn full(len: u64) -> Self {
        let mut bits = Bits::new(len);
        (0..len).for_each(|at| bits.set(at));
        bits
    }
    pub fn ones(&self) -> u64 {
        self.ones
    }
    pub fn get(&self, at: u64) -> bool {
        at < self.len && self.words[(at / 64) as usize] >> (at % 64) & 1 == 1
    }
    pub fn set(&mut self, at: u64) {
        if at < self.len && !self.get(at) {
            self.words[(at / 64) as usize] |= 1 << (at % 64);
            self.ones += 1;
        }
    }
    pub fn clear(&mut self, at: u64) {
        if self.get(at) {
            self.words[(at / 64) as usize] &= !(1 << (at % 64));
            self.ones -= 1;
        }
    }
    /// The first one from `at` on.
    pub fn next(&self, at: u64) -> Option<u64> {
        let mut word = (at / 64) as usize;
        let mut bits = *self.words.get(word)? & (!0u64 << (at % 64));
        loop {
            if bits != 0 {
                return Some(word as u64 * 64 + u64::from(bits.trailing_zeros()));
            }
            word += 1;
            bits = *self.words.get(word)?;
        }
    }
}

/// See the [module](self).
pub(crate) struct Bitmap {
    dir: Arc<dyn Directory>,
    name: String,
    file: Arc<dyn LogFile>,
    disk: u64,
    nonce: u64,
    pub geometry: Geometry,
    /// To be sent.
    pub dirty: Bits,
    /// Sent, and not known to be durable there.
    pub flying: Bits,
    /// About to be written into the base.
    writing: BTreeSet<u64>,
    /// What the file says: blocks and regions.
    stored: Bits,
    hot: Bits,
    /// A write or flush of the file failed: what is in it is not known.
    broken: bool,
    /// Pages that were damaged when it was loaded.
    pub damaged: u64,
}

/// The file of a peer's bitmap.
pub(crate) fn file_name(peer: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let name = peer.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02x}") });
    format!("peer.{}.bits", name.collect::<String>())
}

fn page(nonce: u64, number: u64, payload: &[u8]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    page[..8].copy_from_slice(&nonce.to_le_bytes());
    page[8..12].copy_from_slice(&(number as u32).to_le_bytes());
    page[HEAD..HEAD + payload.len()].copy_from_slice(payload);
    let crc = crc32fast::hash(&page);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
    page
}

fn payload(bytes: &[u8], nonce: u64, number: u64) -> Option<&[u8]> {
    let mut copy: [u8; PAGE] = bytes.try_into().ok()?;
    copy[12..16].fill(0);
    let right = bytes[..8] == nonce.to_le_bytes()
        && bytes[8..12] == (number as u32).to_le_bytes()
        && bytes[12..16] == crc32fast::hash(&copy).to_le_bytes();
    right.then_some(&bytes[HEAD..])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| Error::io("drawing a random number", io::Error::other(e)))?;
    Ok(u64::from_le_bytes(bytes))
}

/// What a file says: the geometry, and a bit for each block that may differ.
struct Read {
    nonce: u64,
    geometry: Geometry,
    blocks: Bits,
    hot: Bits,
    damaged: u64,
}

/// Read a bitmap's file, whatever is in it.
fn decode(bytes: &[u8], disk: u64) -> std::result::Result<Read, &'static str> {
    let first = bytes.get(..PAGE).ok_or("is too short")?;
    let nonce = word(first, 0);
    let head = payload(first, nonce, 0).ok_or("has a damaged first page")?;
    if head[..4] != MAGIC || head[4..8] != 1u32.to_le_bytes() {
        return Err("is of a version that this program does not know");
    }
    if word(head, 8) != disk {
        return Err("is another disk's");
    }
    let geometry = Geometry { size: word(head, 16), block: word(head, 24), region: word(head, 32) };
    if !geometry.valid() {
        return Err("has an impossible geometry");
    }
    let (mut blocks, mut hot, mut damaged) = (Bits::new(geometry.blocks()), Bits::new(geometry.regions()), 0);
    for number in 1..geometry.pages() {
        let at = number as usize * PAGE;
        let found = bytes.get(at..at + PAGE).and_then(|page| payload(page, nonce, number));
        damaged += u64::from(found.is_none());
        let (bits, first) = match number.checked_sub(1 + geometry.hot_pages()) {
            Some(of_blocks) => (&mut blocks, of_blocks * BITS),
            None => (&mut hot, (number - 1) * BITS),
        };
        for bit in 0..BITS.min(bits.len.saturating_sub(first)) {
            if found.is_none_or(|page| page[(bit / 8) as usize] >> (bit % 8) & 1 == 1) {
                bits.set(first + bit);
            }
        }
    }
    Ok(Read { nonce, geometry, blocks, hot, damaged })
}

/// For inspection and fuzzing: the disk's division, how many blocks may differ, and how many pages were damaged.
///
/// # Errors
/// What is wrong, as the rest of a sentence.
pub fn summary(bytes: &[u8], disk: u64) -> std::result::Result<(Geometry, u64, u64), &'static str> {
    let mut read = decode(bytes, disk)?;
    heat(&mut read.blocks, &read.hot, read.geometry);
    Ok((read.geometry, read.blocks.ones(), read.damaged))
}

/// All of a bitmap's file; `None`: there is none.
///
/// # Errors
/// What the storage says.
pub fn load_file(dir: &dyn Directory, peer: &str) -> io::Result<Option<Vec<u8>>> {
    let file = match dir.open(&file_name(peer)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = vec![0; file.size()?.min(LARGEST) as usize];
    let got = file.read_at(0, &mut bytes)?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

/// All blocks of hot regions.
fn heat(blocks: &mut Bits, hot: &Bits, geometry: Geometry) {
    let mut region = hot.next(0);
    while let Some(at) = region {
        geometry.blocks_of(at * geometry.region, geometry.region).for_each(|block| blocks.set(block));
        region = hot.next(at + 1);
    }
}

impl Bitmap {
    /// A new one, durably; `full`: everything may differ.
    pub fn create(dir: &Arc<dyn Directory>, peer: &str, disk: u64, size: u64, full: bool) -> Result<Self> {
        let geometry = Geometry::of(size);
        let blocks = geometry.blocks();
        let dirty = if full { Bits::full(blocks) } else { Bits::new(blocks) };
        Self::with(dir, peer, disk, geometry, dirty)
    }

    fn with(dir: &Arc<dyn Directory>, peer: &str, disk: u64, geometry: Geometry, dirty: Bits) -> Result<Self> {
        let name = file_name(peer);
        let temporary = format!("{name}.new");
        let file = write_new(&**dir, &temporary, &[]).doing(|| format!("making {temporary} in {}", dir.name()))?;
        let mut bitmap = Bitmap {
            dir: dir.clone(),
            name,
            file,
            disk,
            nonce: 0,
            geometry,
            flying: Bits::new(geometry.blocks()),
            writing: BTreeSet::new(),
            stored: Bits::new(geometry.blocks()),
            hot: Bits::new(geometry.regions()),
            dirty,
            broken: true,
            damaged: 0,
        };
        bitmap.rewrite()?;
        Ok(bitmap)
    }

    /// The one that is there, with every block that may differ; the sentence says why there is none.
    pub fn load(
        dir: &Arc<dyn Directory>,
        peer: &str,
        disk: u64,
        size: u64,
    ) -> Result<std::result::Result<Self, String>> {
        let name = file_name(peer);
        let doing = || format!("reading {name} in {}", dir.name());
        let Some(bytes) = load_file(&**dir, peer).doing(doing)? else {
            return Ok(Err(format!("{name} in {} is gone", dir.name())));
        };
        let mut read = match decode(&bytes, disk) {
            Ok(read) => read,
            Err(why) => return Ok(Err(format!("{name} in {} {why}", dir.name()))),
        };
        heat(&mut read.blocks, &read.hot, read.geometry);
        let damaged = read.damaged;
        if read.geometry.size != size || damaged > 0 {
            let mut bitmap = Self::with(dir, peer, disk, read.geometry, read.blocks)?;
            bitmap.resize(size)?;
            bitmap.damaged = damaged;
            return Ok(Ok(bitmap));
        }
        let Read { nonce, geometry, blocks, hot, .. } = read;
        let file = dir.open(&name).doing(doing)?;
        let mut bitmap = Bitmap {
            dir: dir.clone(),
            name,
            file,
            disk,
            nonce,
            geometry,
            flying: Bits::new(geometry.blocks()),
            writing: BTreeSet::new(),
            // Those of hot regions are stored only by the region's bit, so far.
            stored: Bits::new(geometry.blocks()),
            hot,
            dirty: blocks,
            broken: false,
            damaged,
        };
        let exact = decode(&bytes, disk).map(|read| read.blocks);
        bitmap.stored = exact.unwrap_or(bitmap.stored);
        // A process that died may have left pages in the kernel's cache that are not on the storage.
        bitmap.file.sync().doing(|| format!("flushing {} in {}", bitmap.name, dir.name()))?;
        bitmap.cool()?;
        Ok(Ok(bitmap))
    }

    fn wanted(&self, block: u64) -> bool {
        self.dirty.get(block) || self.flying.get(block) || self.writing.contains(&block)
    }

    fn blocks_page(&self, number: u64) -> [u8; PAGE] {
        let mut bits = [0; PAGE - HEAD];
        for bit in 0..BITS {
            if self.wanted(number * BITS + bit) {
                bits[(bit / 8) as usize] |= 1 << (bit % 8);
            }
        }
        page(self.nonce, 1 + self.geometry.hot_pages() + number, &bits)
    }

    fn hot_page(&self, number: u64) -> [u8; PAGE] {
        let mut bits = [0; PAGE - HEAD];
        for bit in 0..BITS {
            if self.hot.get(number * BITS + bit) {
                bits[(bit / 8) as usize] |= 1 << (bit % 8);
            }
        }
        page(self.nonce, 1 + number, &bits)
    }

    /// A whole new file, durably. Everything in it is exact.
    fn rewrite(&mut self) -> Result<()> {
        self.broken = true;
        self.nonce = random()?;
        let mut head = [0; 40];
        head[..4].copy_from_slice(&MAGIC);
        head[4..8].copy_from_slice(&1u32.to_le_bytes());
        let Geometry { size, block, region } = self.geometry;
        for (i, word) in [self.disk, size, block, region].into_iter().enumerate() {
            head[8 + i * 8..16 + i * 8].copy_from_slice(&word.to_le_bytes());
        }
        let mut bytes = page(self.nonce, 0, &head).to_vec();
        (0..self.geometry.hot_pages()).for_each(|number| bytes.extend(self.hot_page(number)));
        (0..self.geometry.blocks().div_ceil(BITS)).for_each(|number| bytes.extend(self.blocks_page(number)));
        let temporary = format!("{}.new", self.name);
        let written = write_new(&*self.dir, &temporary, &bytes).and_then(|file| {
            self.dir.rename(&temporary, &self.name)?;
            self.dir.sync()?;
            Ok(file)
        });
        self.file = written.doing(|| format!("writing {} in {}", self.name, self.dir.name()))?;
        for at in 0..self.geometry.blocks() {
            if self.wanted(at) {
                self.stored.set(at);
            } else {
                self.stored.clear(at);
            }
        }
        self.broken = false;
        Ok(())
    }

    /// Write these pages, durably.
    fn write(&mut self, pages: Vec<(u64, [u8; PAGE])>) -> Result<()> {
        if self.broken {
            return self.rewrite();
        }
        let mut at = 0;
        let mut result = Ok(());
        while at < pages.len() && result.is_ok() {
            // Neighbours in one write.
            let mut end = at + 1;
            while end < pages.len() && pages[end].0 == pages[end - 1].0 + 1 {
                end += 1;
            }
            let bytes: Vec<u8> = pages[at..end].iter().flat_map(|(_, page)| *page).collect();
            result = self.file.write_at(pages[at].0 * PAGE as u64, &bytes);
            at = end;
        }
        if let Err(e) = result.and_then(|()| self.file.sync()) {
            // A flush that failed is not believed the second time: a new file is, or nothing.
            self.broken = true;
            return self.rewrite().map_err(|again| match again {
                full @ Error::Full { .. } => full,
                _ => Error::io(format!("writing {} in {}", self.name, self.dir.name()), e),
            });
        }
        Ok(())
    }

    /// Make the file say what memory says of the pages for which `which` holds. Says whether there was anything to write.
    fn store_if(&mut self, which: impl Fn(&Self, u64) -> bool) -> Result<bool> {
        let pages = self.geometry.blocks().div_ceil(BITS);
        let first = 1 + self.geometry.hot_pages();
        let changed: Vec<u64> = (0..pages).filter(|number| which(self, *number)).collect();
        if changed.is_empty() && !self.broken {
            return Ok(false);
        }
        let written = changed.iter().map(|number| (first + number, self.blocks_page(*number))).collect();
        self.write(written)?;
        for number in changed {
            for at in number * BITS..((number + 1) * BITS).min(self.geometry.blocks()) {
                if self.wanted(at) {
                    self.stored.set(at)
                } else {
                    self.stored.clear(at)
                };
            }
        }
        Ok(true)
    }

    fn page_differs(&self, number: u64) -> bool {
        (number * BITS..((number + 1) * BITS).min(self.geometry.blocks()))
            .any(|at| self.wanted(at) != self.stored.get(at))
    }

    /// The file says exactly what memory says.
    pub fn store(&mut self) -> Result<()> {
        self.store_if(|this, number| this.page_differs(number)).map(drop)
    }

    /// Nobody writes directly: the exact blocks are stored, then regions need not be hot any more.
    pub fn cool(&mut self) -> Result<()> {
        self.store()?;
        if self.hot.ones() == 0 {
            return Ok(());
        }
        let hot = std::mem::replace(&mut self.hot, Bits::new(self.geometry.regions()));
        let pages = (0..self.geometry.hot_pages()).map(|number| (1 + number, self.hot_page(number))).collect();
        self.write(pages).inspect_err(|_| self.hot = hot)
    }

    /// A direct write is about to begin: its regions are hot, durably. Says whether that took a flush.
    pub fn before_direct(&mut self, at: u64, len: u64) -> Result<bool> {
        let regions =
            at / self.geometry.region..at.saturating_add(len).min(self.geometry.size).div_ceil(self.geometry.region);
        let cold: Vec<u64> = regions.filter(|region| !self.hot.get(*region)).collect();
        let flushed = !cold.is_empty() || self.broken;
        if flushed {
            let changed: BTreeSet<u64> = cold.iter().map(|region| region / BITS).collect();
            cold.iter().for_each(|region| self.hot.set(*region));
            #[cfg(test)]
            if crate::sim::sabotaged(crate::sim::Sabotage::MarkAfterWrite) {
                return Ok(true);
            }
            let pages = changed.into_iter().map(|number| (1 + number, self.hot_page(number))).collect();
            if let Err(e) = self.write(pages) {
                cold.iter().for_each(|region| self.hot.clear(*region));
                return Err(e);
            }
        }
        self.mark(at, len);
        Ok(flushed)
    }

    /// In memory only.
    pub fn mark(&mut self, at: u64, len: u64) {
        self.geometry.blocks_of(at, len).for_each(|block| self.dirty.set(block));
    }

    /// These bytes may differ, durably.
    pub fn mark_durably(&mut self, ranges: impl Iterator<Item = (u64, u64)>) -> Result<()> {
        ranges.for_each(|(at, len)| self.mark(at, len));
        // Only what is missing there: what it says too much does no harm.
        self.store_if(|this, number| {
            (number * BITS..((number + 1) * BITS).min(this.geometry.blocks()))
                .any(|at| this.wanted(at) && !this.stored.get(at))
        })
        .map(drop)
    }

    /// A merge is about to write these bytes: as [`Bitmap::mark_durably`], and the file says so until [`Bitmap::written`], whatever is sent meanwhile.
    pub fn before_merge(&mut self, ranges: &[(u64, u64)]) -> Result<()> {
        for (at, len) in ranges {
            self.writing.extend(self.geometry.blocks_of(*at, *len));
        }
        self.mark_durably(ranges.iter().copied())
    }

    /// The merge is over. What was sent while it wrote is to be sent again.
    pub fn written(&mut self) {
        for block in std::mem::take(&mut self.writing) {
            self.dirty.set(block);
        }
    }

    /// What was sent and not acknowledged is to be sent again.
    pub fn broke_off(&mut self) {
        let mut at = self.flying.next(0);
        while let Some(block) = at {
            self.flying.clear(block);
            self.dirty.set(block);
            at = self.flying.next(block + 1);
        }
    }

    /// The disk has another size. What is new may differ.
    pub fn resize(&mut self, size: u64) -> Result<()> {
        let (old, new) = (self.geometry, Geometry::of(size));
        if old == new {
            return Ok(());
        }
        let mut dirty = Bits::new(new.blocks());
        for block in (0..old.blocks()).filter(|block| self.wanted(*block)) {
            let (at, len) = old.bytes_of(block..block + 1);
            new.blocks_of(at, len).for_each(|block| dirty.set(block));
        }
        if size > old.size {
            new.blocks_of(old.size, size - old.size).for_each(|block| dirty.set(block));
        }
        let hot: Vec<_> = (0..old.regions()).filter(|region| self.hot.get(*region)).collect();
        self.geometry = new;
        self.dirty = dirty;
        self.flying = Bits::new(new.blocks());
        self.stored = Bits::new(new.blocks());
        self.hot = Bits::new(new.regions());
        for region in hot {
            let regions = region * old.region / new.region..((region + 1) * old.region).min(size).div_ceil(new.region);
            regions.for_each(|region| self.hot.set(region));
        }
        self.rewrite()
    }

    /// Bytes that may differ.
    pub fn bytes(&self) -> u64 {
        (self.dirty.ones() + self.flying.ones()).saturating_mul(self.geometry.block).min(self.geometry.size)
    }
}

fn write_new(dir: &dyn Directory, name: &str, bytes: &[u8]) -> io::Result<Arc<dyn LogFile>> {
    match dir.remove(name) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let file = dir.create(name)?;
    if !bytes.is_empty() {
        file.write_at(0, bytes)?;
        file.sync()?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LocalDirectory;

    const MIB: u64 = 1 << 20;

    fn directory() -> (tempfile::TempDir, Arc<dyn Directory>) {
        let place = tempfile::tempdir().unwrap();
        let dir = Arc::new(LocalDirectory::make(&place.path().join("row")).unwrap());
        (place, dir)
    }

    fn loaded(dir: &Arc<dyn Directory>, size: u64) -> Bitmap {
        Bitmap::load(dir, "n2", 7, size).unwrap().unwrap()
    }

    #[test]
    fn maps_stay_small_whatever_the_disk_is() {
        for size in [512, 24 << 10, MIB, 10 << 30, 1 << 40, 64 << 40, 1 << 60] {
            let geometry = Geometry::of(size);
            assert!(geometry.valid(), "{geometry:?}");
            assert!(geometry.regions() <= 8192 && geometry.blocks() <= BLOCKS, "{geometry:?}");
        }
        assert_eq!(Geometry::of(1 << 40).block, 64 << 10);
    }

    #[test]
    fn after_a_crash_a_hot_region_counts_as_different_and_after_cooling_only_its_blocks() {
        let (_place, dir) = directory();
        let size = 256 * MIB;
        let mut bitmap = Bitmap::create(&dir, "n2", 7, size, false).unwrap();
        assert!(bitmap.before_direct(MIB, 4096).unwrap(), "the first write to a region waits for a flush");
        assert!(!bitmap.before_direct(3 * MIB, 4096).unwrap(), "the second does not");
        assert_eq!(bitmap.dirty.ones(), 2);
        assert_eq!(loaded(&dir, size).dirty.ones(), 16 * MIB / (64 << 10), "the region");

        let mut bitmap = Bitmap::create(&dir, "n2", 7, size, false).unwrap();
        bitmap.before_direct(MIB, 4096).unwrap();
        bitmap.cool().unwrap();
        assert_eq!(loaded(&dir, size).dirty.ones(), 1);
        assert!(bitmap.before_direct(MIB, 4096).unwrap(), "it is cold again");
    }

    #[test]
    fn a_block_that_is_written_while_it_is_sent_stays_in_the_file() {
        let (_place, dir) = directory();
        let mut bitmap = Bitmap::create(&dir, "n2", 7, 64 * MIB, false).unwrap();
        bitmap.before_merge(&[(0, 512)]).unwrap();
        // Sent and acknowledged before the merge has written it.
        bitmap.dirty.clear(0);
        bitmap.store().unwrap();
        assert_eq!(loaded(&dir, 64 * MIB).dirty.ones(), 1);
        bitmap.written();
        assert!(bitmap.dirty.get(0), "and is sent again");
    }

    #[test]
    fn what_was_sent_and_not_acknowledged_is_in_the_file() {
        let (_place, dir) = directory();
        let mut bitmap = Bitmap::create(&dir, "n2", 7, 64 * MIB, true).unwrap();
        assert_eq!(bitmap.bytes(), 64 * MIB);
        for block in 0..10 {
            bitmap.dirty.clear(block);
            bitmap.flying.set(block);
        }
        bitmap.flying.clear(0);
        bitmap.store().unwrap();
        let again = loaded(&dir, 64 * MIB);
        assert_eq!(again.dirty.next(0), Some(1));
        assert_eq!(again.dirty.ones(), 1023);
    }

    #[test]
    fn damage_makes_it_say_more_never_less() {
        let (place, dir) = directory();
        let size = 1 << 30;
        let mut bitmap = Bitmap::create(&dir, "n2", 7, size, false).unwrap();
        bitmap.mark_durably([(0, 512), (1 << 29, 512)].into_iter()).unwrap();
        assert_eq!(loaded(&dir, size).dirty.ones(), 2);
        let path = place.path().join("row").join(file_name("n2"));
        let good = std::fs::read(&path).unwrap();
        for at in (0..good.len()).step_by(97) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            match decode(&bad, 7) {
                Err(_) => assert!(at < PAGE),
                Ok(mut read) => {
                    heat(&mut read.blocks, &read.hot, read.geometry);
                    assert_eq!(read.damaged, 1);
                    assert!(read.blocks.get(0) && read.blocks.get(1 << 13), "byte {at}");
                }
            }
        }
        assert!(decode(&good, 8).is_err(), "another disk's");
        assert!(decode(&good[..700], 7).unwrap().blocks.ones() > 10_000, "cut off");
        std::fs::write(&path, &good[..100]).unwrap();
        assert!(Bitmap::load(&dir, "n2", 7, size).unwrap().is_err_and(|why| why.contains("too short")));
    }

    #[test]
    fn a_larger_disk_keeps_its_marks_and_its_new_end_may_differ() {
        let (_place, dir) = directory();
        let mut bitmap = Bitmap::create(&dir, "n2", 7, 64 * MIB, false).unwrap();
        bitmap.mark_durably([(5 * MIB, 512)].into_iter()).unwrap();
        bitmap.resize(96 * MIB).unwrap();
        let again = loaded(&dir, 96 * MIB);
        assert_eq!(again.dirty.ones(), 1 + 512);
        assert!(again.dirty.get(80));
    }

    #[test]
    fn names_of_peers_are_names_of_files() {
        assert_eq!(file_name("vm-2"), "peer.vm-2.bits");
        assert_eq!(file_name("../x.y"), "peer.%2e%2e%2fx%2ey.bits");
    }
}
