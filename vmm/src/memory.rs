//! Guest RAM: a file in a tmpfs, mapped shared, that outlives this process; and the record of which pages were written.
//!
//! The file holds all RAM contiguously in ascending guest-physical order; the hole between 3 and 4 GiB (devices) takes no room in
//! it. A *page index* is an offset in that file divided by 4096. Who writes pages: the guest (KVM's dirty log), the VMM and its
//! devices (the mapping's own bitmap). [`Ram::collect_dirty`] takes both.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

use crate::devices::GuestRam;
use crate::sys::{self, SharedMap};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Where RAM below 4 GiB ends at the latest: above are PCI, IOAPIC and LAPIC.
pub const LOW_END: u64 = 0xc000_0000;
/// Where RAM above the hole starts.
pub const HIGH_START: u64 = 1 << 32;
const MIB: u64 = 1 << 20;
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// One contiguous piece of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    slot: u32,
    guest: u64,
    size: u64,
    /// Offset in the RAM file.
    file: u64,
    /// Address of the mapping.
    host: u64,
}

impl Piece {
    /// Its words in a page set. (Pieces are multiples of 1 MiB: 256 pages, 4 words.)
    fn words(&self) -> std::ops::Range<usize> {
        let first = (self.file / PAGE as u64 / 64) as usize;
        first..first + (self.size / PAGE as u64 / 64) as usize
    }
}

/// All of a machine's RAM.
#[derive(Debug)]
pub struct Ram {
    /// The RAM as devices and loaders see it.
    pub mem: GuestRam,
    pieces: Vec<Piece>,
    bytes: u64,
}

/// A set of pages: one bit a page, 64 a word.
pub type PageSet = Vec<u64>;

/// Pages in a set.
pub fn count(set: &[u64]) -> u64 {
    set.iter().map(|w| u64::from(w.count_ones())).sum()
}

/// Add all of `more` to `set`.
pub fn union(set: &mut PageSet, more: &[u64]) {
    for (word, more) in set.iter_mut().zip(more) {
        *word |= more;
    }
}

impl Ram {
    /// Map `mib` MiB of RAM from `path`, which is created, or resized if it has another size.
    pub fn open(path: &Path, mib: u64) -> Result<Self> {
        Self::open_split(path, mib, LOW_END)
    }

    /// As [`Ram::open`], with the hole beginning at `low_end`.
    fn open_split(path: &Path, mib: u64, low_end: u64) -> Result<Self> {
        let bytes = mib.checked_mul(MIB).filter(|b| *b > 0 && *b <= 1 << 42);
        let Some(bytes) = bytes else { bail!("a machine cannot have {mib} MiB of RAM; give it 16 MiB to 4 TiB") };
        let file = private_file(path, "RAM file")?;
        reserve(&file, path, bytes).with_context(|| format!("no room for {mib} MiB of guest RAM"))?;
        let mut regions = Vec::new();
        let mut pieces = Vec::new();
        for (slot, (guest, size, offset)) in (0u32..).zip(layout(bytes, low_end)) {
            let file = file.try_clone().context("cannot duplicate the RAM file's descriptor")?;
            let map = MmapRegion::build(
                Some(FileOffset::new(file, offset)),
                usize::try_from(size)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
            .with_context(|| format!("cannot map the RAM file {}", path.display()))?;
            pieces.push(Piece { slot, guest, size, file: offset, host: map.as_ptr() as u64 });
            let region = GuestRegionMmap::new(map, GuestAddress(guest)).context("RAM wraps the address space")?;
            regions.push(region);
        }
        let mem = GuestRegionCollection::from_regions(regions).context("RAM pieces overlap")?;
        Ok(Self { mem, pieces, bytes })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE as u64
    }
    /// An empty set of pages.
    pub fn no_pages(&self) -> PageSet {
        vec![0; self.pages().div_ceil(64) as usize]
    }
    /// RAM as `(guest address, size)`, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.pieces.iter().map(|p| (p.guest, p.size))
    }
    /// End of RAM below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.pieces.first().map_or(0, |p| p.guest + p.size)
    }

    /// Give the RAM to `vm`, with or without KVM's log of written pages.
    pub fn attach(&self, vm: &VmFd, log: bool) -> Result<()> {
        for p in &self.pieces {
            let region = kvm_userspace_memory_region {
                slot: p.slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: p.guest,
                memory_size: p.size,
                userspace_addr: p.host,
            };
            sys::set_memory_slot(vm, region).with_context(|| {
                format!("KVM refuses the RAM at {:#x} (dirty log {})", p.guest, if log { "on" } else { "off" })
            })?;
        }
        Ok(())
    }

    /// Forget what the VMM has written so far.
    pub fn forget_own_writes(&self) {
        for region in self.mem.iter() {
            region.get_mmap().bitmap().reset();
        }
    }

    /// Pages written since the last call by the VMM only.
    pub fn collect_own(&self, set: &mut PageSet) {
        for (region, p) in self.mem.iter().zip(&self.pieces) {
            let base = (p.file / PAGE as u64 / 64) as usize;
            union_at(set, base, &region.get_mmap().bitmap().get_and_reset());
        }
    }

    /// KVM's log of what the guest wrote, into `set` (which is overwritten). The log must be on. Whether reading also clears it
    /// depends on [`crate::sys::manual_dirty_log`].
    pub fn read_log(&self, vm: &VmFd, set: &mut PageSet) -> Result<()> {
        for p in &self.pieces {
            let words = set.get_mut(p.words()).context("the page set is too small")?;
            sys::get_dirty_log(vm, p.slot, p.size, words).context("KVM does not give its dirty log")?;
        }
        Ok(())
    }

    /// Protect the pages of `set` again, so that the next write to each shows in the log.
    pub fn protect(&self, vm: &VmFd, set: &PageSet) -> Result<()> {
        for p in &self.pieces {
            let words = set.get(p.words()).context("the page set is too small")?;
            let Some(first) = words.iter().position(|w| *w != 0) else { continue };
            let end = words.iter().rposition(|w| *w != 0).map_or(first, |last| last + 1);
            sys::clear_dirty_log(vm, p.slot, first as u64 * 64, &words[first..end])
                .context("KVM does not protect pages again")?;
        }
        Ok(())
    }

    /// Where a page is in this process; `None` beyond RAM. Valid as long as `self`; what it holds changes while the guest runs.
    pub fn page_address(&self, index: u64) -> Option<*const u8> {
        let at = index.checked_mul(PAGE as u64)?;
        let p = self.pieces.iter().find(|p| at >= p.file && at - p.file < p.size)?;
        Some((p.host + (at - p.file)) as *const u8)
    }

    /// The mappings: host address, bytes, index of the first page.
    pub fn mappings(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.pieces.iter().map(|p| (p.host, p.size, p.file / PAGE as u64))
    }

    /// Read RAM by its offset in the file.
    pub fn read_file_offset(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        let p = self.pieces.iter().find(|p| offset >= p.file && offset - p.file < p.size).context("beyond RAM")?;
        Ok(self.mem.read_slice(data, GuestAddress(p.guest + (offset - p.file)))?)
    }
}

fn union_at(set: &mut PageSet, base: usize, more: &[u64]) {
    if let Some(tail) = set.get_mut(base..) {
        for (word, more) in tail.iter_mut().zip(more) {
            *word |= more;
        }
    }
}

/// `(guest address, size, file offset)` of the pieces of `bytes` of RAM with a hole from `low_end` to 4 GiB.
fn layout(bytes: u64, low_end: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(low_end);
    let mut pieces = vec![(0, low, 0)];
    if bytes > low {
        pieces.push((HIGH_START, bytes - low, low));
    }
    pieces
}

/// Open or create a file that only we may read, and leave what it holds; `what` is its name for people.
/// A file that only this user reads, created if it is not there.
pub fn private_file(path: &Path, what: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).with_context(|| format!("cannot create the {what} {}", path.display()))
}

/// Give `file` exactly `bytes` with their memory behind them, so that the guest never meets a full tmpfs (which would be a SIGBUS).
pub fn reserve(file: &File, path: &Path, bytes: u64) -> Result<()> {
    let fs = nix::sys::statfs::fstatfs(file).with_context(|| format!("cannot examine {}", path.display()))?;
    let kind = fs.filesystem_type().0;
    if kind != TMPFS_MAGIC && kind != HUGETLBFS_MAGIC {
        eprintln!(
            "warning: {} is not on a tmpfs; guest RAM on a disk is slow, and survives a power cut in an unusable state",
            path.display()
        );
    }
    let meta = file.metadata().with_context(|| format!("cannot examine {}", path.display()))?;
    if meta.len() != bytes {
        file.set_len(bytes).with_context(|| format!("cannot set the size of {}", path.display()))?;
    }
    let present = meta.blocks() * 512;
    let missing = bytes.saturating_sub(present);
    let free = fs.blocks_available().saturating_mul(fs.block_size().max(0) as u64);
    if kind == TMPFS_MAGIC && fs.blocks() > 0 && missing > free {
        bail!(
            "{} needs {} MiB more, and its tmpfs has {} MiB left: enlarge it (mount -o remount,size=…) or give the machine less",
            path.display(),
            missing.div_ceil(MIB),
            free / MIB
        );
    }
    // The page table entries come later, on first use; the memory is accounted for now.
    match nix::fcntl::posix_fallocate(file, 0, i64::try_from(bytes)?) {
        Ok(()) => Ok(()),
        Err(e) => bail!(
            "cannot reserve {} MiB in {} ({e}): free memory or enlarge the tmpfs",
            bytes.div_ceil(MIB),
            path.display()
        ),
    }
}

/// The capture arena: a file of `bytes` beside the RAM.
#[derive(Debug)]
pub struct Arena {
    /// Its mapping.
    pub map: SharedMap,
    /// Its path, for messages.
    pub path: PathBuf,
}

impl Arena {
    /// Create (or resize) and map it.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let file = private_file(path, "capture arena")?;
        reserve(&file, path, bytes).context("no room for the capture arena")?;
        let map = SharedMap::new(file.as_raw_fd(), usize::try_from(bytes)?)
            .with_context(|| format!("cannot map the capture arena {}", path.display()))?;
        Ok(Self { map, path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_above_three_gib_goes_above_the_hole() {
        assert_eq!(layout(512 * MIB, LOW_END), [(0, 512 * MIB, 0)]);
        assert_eq!(layout(LOW_END, LOW_END), [(0, LOW_END, 0)]);
        assert_eq!(layout(4096 * MIB, LOW_END), [(0, LOW_END, 0), (HIGH_START, 1024 * MIB, LOW_END)]);
    }

    #[test]
    fn the_vmms_own_writes_are_recorded_by_page() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::open(&dir.path().join("ram"), 16).unwrap();
        ram.mem.write_slice(&[1; 10], GuestAddress(4096 * 5 - 5)).unwrap();
        ram.mem.write_obj(7u8, GuestAddress(4096 * 64)).unwrap();
        let mut set = ram.no_pages();
        ram.collect_own(&mut set);
        assert_eq!(set[..3], [1 << 4 | 1 << 5, 1, 0]);
        assert_eq!(count(&set), 3);
        let mut again = ram.no_pages();
        ram.collect_own(&mut again);
        assert_eq!(count(&again), 0);
    }

    #[test]
    fn pages_above_the_hole_have_their_index_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let ram = Ram::open_split(&dir.path().join("ram"), 32, 16 * MIB).unwrap();
        ram.mem.write_slice(b"high", GuestAddress(HIGH_START + 3 * 4096)).unwrap();
        ram.mem.write_slice(b"low", GuestAddress(16 * MIB - 3)).unwrap();
        assert!(ram.mem.write_slice(b"hole", GuestAddress(16 * MIB)).is_err());
        let mut set = ram.no_pages();
        ram.collect_own(&mut set);
        let last_low = 16 * MIB / 4096 - 1;
        let dirty: Vec<u64> = (0..ram.pages()).filter(|p| set[(p / 64) as usize] >> (p % 64) & 1 == 1).collect();
        assert_eq!(dirty, [last_low, last_low + 1 + 3]);
        assert!(ram.page_address(last_low + 4).is_some());
        assert!(ram.page_address(ram.pages()).is_none());
        assert!(ram.page_address(u64::MAX).is_none());
    }

    #[test]
    fn ram_survives_the_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ram");
        Ram::open(&path, 16).unwrap().mem.write_slice(b"kept", GuestAddress(0x1234)).unwrap();
        let mut back = [0; 4];
        Ram::open(&path, 16).unwrap().mem.read_slice(&mut back, GuestAddress(0x1234)).unwrap();
        assert_eq!(&back, b"kept");
    }
}
