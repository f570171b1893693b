//! The benchmark's guest: a program in ring 3 that writes to a given number of pages in each period, paced by the time stamp
//! counter, with given locality and content, and counts what it got done. The same program runs under `understudy-vmm`
//! (as flat code) and under QEMU (behind [`reset_image`]).
//!
//! It is steered and read from outside, through the file that its RAM is ([`Guest`]): every vCPU has a block of one page.
//!
//! ```text
//! 0x100000 program   0x110000 block of vCPU 0, 1, …   0x200000 contents, 1 MiB each   64 MiB pages that are written to
//! ```
//! The load is an *offered* one, like that of a real program: a guest that was stopped makes up for what it missed, at most one
//! period of it. What it really wrote is [`Counters::pages`]; what it could do beside that is [`Counters::progress`], in turns of its
//! waiting loop, which is comparable between guests of the same number of vCPUs only.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::contents::{self, Content};

mod code;

pub use code::{program, reset_image};

/// Where the program is loaded and entered.
pub const LOAD_AT: u64 = 0x10_0000;
const BLOCKS: u64 = 0x11_0000;
/// Bytes between two contents.
const POOL_STRIDE: u64 = 1 << 20;
const POOLS: u64 = 0x20_0000;
/// Where the pages begin that are written to.
pub const PAGES_AT: u64 = 64 << 20;
/// Pages for writing, all vCPUs together, a power of two.
const REGION_PAGES: u64 = 1 << 16;
/// A period: what the number of pages refers to.
pub const PERIOD: Duration = Duration::from_millis(25);
/// A turn that takes longer was interrupted.
const GAP: Duration = Duration::from_micros(20);
/// Births of bytes that are remembered.
pub const BIRTHS: u64 = 128;

/// Everything of the guest's that is loaded at [`LOAD_AT`]: program and contents.
pub fn load_image(corpus: &[u8]) -> Vec<u8> {
    let mut image = vec![0; (POOLS - LOAD_AT) as usize];
    let program = program();
    image[..program.len()].copy_from_slice(program);
    for content in Content::ALL {
        image.extend_from_slice(&contents::pool(content, POOL_STRIDE as usize, corpus));
    }
    // The last pool is read a little beyond its end.
    image.resize(image.len() + 4096, 0);
    image
}

/// Where in the region a period's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locality {
    /// The same pages in every period, one after the other.
    Hot,
    /// Other pages in every period, strewn over the whole region.
    Cold,
}

/// How much of a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// Eight bytes somewhere in the page.
    Word,
    /// Three records of 128 bytes, each somewhere in the page.
    Records,
    /// All of it.
    Page,
}

/// What the guest is to do.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Pages to write to in each [`PERIOD`], all vCPUs together.
    pub pages: u64,
    /// Which.
    pub locality: Locality,
    /// What it writes.
    pub content: Content,
    /// How much of it.
    pub write: Write,
    /// Not paced: as fast as it can, round and round over `pages`.
    pub unpaced: bool,
    /// The first vCPU sends a byte on COM1 so often.
    pub byte_every: Option<Duration>,
}

impl Work {
    /// `pages` hot pages in each period, a word of noise in each.
    pub fn hot(pages: u64) -> Self {
        Self {
            pages,
            locality: Locality::Hot,
            content: Content::Noise,
            write: Write::Word,
            unpaced: false,
            byte_every: None,
        }
    }
}

/// Words of the block that tell the guest what to do: offsets in bytes.
mod order {
    pub const PAGES: u64 = 0x00;
    pub const STEP: u64 = 0x08;
    pub const BACKLOG: u64 = 0x10;
    pub const BASE: u64 = 0x18;
    pub const MASK: u64 = 0x20;
    pub const STRIDE: u64 = 0x28;
    pub const DRIFT: u64 = 0x30;
    pub const POOL: u64 = 0x38;
    pub const POOL_MASK: u64 = 0x40;
    pub const WORDS: u64 = 0x48;
    pub const PATCHES: u64 = 0x50;
    pub const GAP: u64 = 0x58;
    pub const BYTE_STEP: u64 = 0x60;
}

/// Words of the block in which the guest counts.
mod count {
    pub const NOW: u64 = 0x100;
    pub const PROGRESS: u64 = 0x108;
    pub const PAGES: u64 = 0x110;
    pub const GAPS: u64 = 0x118;
    pub const LONGEST: u64 = 0x128;
    pub const BIRTHS: u64 = 0x200;
}

/// What a guest did, from some moment on or since it started; all vCPUs together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    /// Wall time, s.
    pub seconds: f64,
    /// Turns of the waiting loop.
    pub progress: f64,
    /// Pages written to.
    pub pages: f64,
    /// Time in which the vCPUs did not run, as the guest itself saw it, s, summed over vCPUs: pauses, and whatever else had
    /// the processors.
    pub gaps: f64,
}

impl Counters {
    fn since(self, earlier: Self) -> Self {
        Self {
            seconds: self.seconds - earlier.seconds,
            progress: self.progress - earlier.progress,
            pages: self.pages - earlier.pages,
            gaps: self.gaps - earlier.gaps,
        }
    }

    /// Pages written to in each period.
    pub fn pages_per_period(&self) -> f64 {
        self.pages / self.seconds * PERIOD.as_secs_f64()
    }
    /// Turns in a second.
    pub fn progress_per_s(&self) -> f64 {
        self.progress / self.seconds
    }
}

/// A running guest, seen through its RAM file.
#[derive(Debug)]
pub struct Guest {
    ram: File,
    vcpus: u64,
    /// Ticks of the time stamp counter in a second, as the guest sees it.
    hz: f64,
    born: Instant,
}

impl Guest {
    /// The guest in the RAM file `ram`, whether it runs or not: orders that mean a time cannot be given to it.
    pub fn asleep(ram: &Path, vcpus: u32) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(ram);
        let ram = file.with_context(|| format!("opening the guest's RAM {}", ram.display()))?;
        Ok(Self { ram, vcpus: u64::from(vcpus), hz: 0.0, born: Instant::now() })
    }

    /// The guest of `vcpus` vCPUs that runs in the RAM file `ram`.
    pub fn open(ram: &Path, vcpus: u32) -> Result<Self> {
        let mut guest = Self::asleep(ram, vcpus)?;
        let (from, to) = (guest.clock(1.0)?, {
            std::thread::sleep(Duration::from_millis(200));
            guest.clock(1.0)?
        });
        guest.hz = (to.1 - from.1) as f64 / (to.0 - from.0).as_secs_f64();
        // One that begins only now has come from 0 to wherever its clock stands.
        ensure!(from.1 > 0 && to.1 > from.1, "the benchmark's guest does not run (yet)");
        for vcpu in 0..guest.vcpus {
            guest.set(vcpu, order::GAP, guest.ticks(GAP))?;
        }
        Ok(guest)
    }

    fn at(vcpu: u64, offset: u64) -> u64 {
        BLOCKS + vcpu * 4096 + offset
    }

    fn get(&self, vcpu: u64, offset: u64) -> io::Result<u64> {
        let mut word = [0; 8];
        self.ram.read_exact_at(&mut word, Self::at(vcpu, offset))?;
        Ok(u64::from_le_bytes(word))
    }

    fn set(&self, vcpu: u64, offset: u64, value: u64) -> io::Result<()> {
        self.ram.write_all_at(&value.to_le_bytes(), Self::at(vcpu, offset))
    }

    fn ticks(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * self.hz) as u64
    }

    /// A moment on both clocks: the host's, and the guest's time stamp counter. Many readings are taken for longer than a slice of the processor and the
    /// freshest counts; `hz` may be a guess.
    pub fn clock(&self, hz: f64) -> Result<(Instant, u64)> {
        let began = Instant::now();
        let mut best: Option<(f64, Instant, u64)> = None;
        while began.elapsed() < Duration::from_millis(30) {
            for vcpu in 0..self.vcpus {
                let at = Instant::now();
                let now = self.get(vcpu, count::NOW)?;
                // The reading that is furthest ahead of the host's clock was the least stale.
                let ahead = now as f64 - (at - began).as_secs_f64() * hz.max(1.0);
                if best.is_none_or(|(b, ..)| ahead > b) {
                    best = Some((ahead, at, now));
                }
            }
        }
        best.map(|(_, at, now)| (at, now)).context("the guest has no vCPU")
    }

    /// Ticks of its time stamp counter in a second.
    pub fn hz(&self) -> f64 {
        self.hz
    }

    /// Newest reading of any vCPU's time stamp counter: it changes when and only when the guest runs.
    pub fn now(&self) -> Result<u64> {
        (0..self.vcpus).map(|v| Ok(self.get(v, count::NOW)?)).try_fold(0, |most, now: Result<u64>| Ok(most.max(now?)))
    }

    /// When the byte of this number was born, on the guest's time stamp counter; only the newest [`BIRTHS`] are known.
    pub fn birth(&self, number: u8) -> Result<u64> {
        Ok(self.get(0, count::BIRTHS + u64::from(number) % BIRTHS * 8)?)
    }

    /// Let it do `work` from now on.
    pub fn order(&self, work: &Work) -> Result<()> {
        let (words, patches) = match work.write {
            Write::Word => (1, 1),
            Write::Records => (16, 3),
            Write::Page => (512, 1),
        };
        let region = REGION_PAGES / self.vcpus.next_power_of_two();
        for vcpu in 0..self.vcpus {
            let pages = work.pages / self.vcpus + u64::from(vcpu < work.pages % self.vcpus);
            ensure!(pages <= region, "a vCPU of the benchmark's guest has {region} pages for writing, not {pages}");
            // Nothing is written while the orders are incomplete.
            self.set(vcpu, order::PAGES, 0)?;
            std::thread::sleep(Duration::from_millis(2));
            let period = self.ticks(PERIOD);
            let step = if work.unpaced { 0 } else { period / pages.max(1) };
            self.set(vcpu, order::STEP, step)?;
            self.set(vcpu, order::BACKLOG, if work.unpaced { u64::MAX } else { period })?;
            self.set(vcpu, order::BASE, PAGES_AT + vcpu * region * 4096)?;
            self.set(vcpu, order::MASK, region - 1)?;
            // Any odd number makes a walk that meets every page once before it meets one again.
            let (stride, drift) = match work.locality {
                Locality::Hot => (1, 0),
                Locality::Cold => (12_289, pages),
            };
            self.set(vcpu, order::STRIDE, stride)?;
            self.set(vcpu, order::DRIFT, drift)?;
            self.set(vcpu, order::POOL, POOLS + work.content.number() * POOL_STRIDE)?;
            // Contents are taken from anywhere in the pool, so that pages are alike but not the same.
            self.set(vcpu, order::POOL_MASK, (POOL_STRIDE - 1) & !(work.content.grain() - 1))?;
            self.set(vcpu, order::WORDS, words)?;
            self.set(vcpu, order::PATCHES, patches)?;
            let byte = work.byte_every.filter(|_| vcpu == 0).map_or(0, |every| self.ticks(every));
            self.set(vcpu, order::BYTE_STEP, byte)?;
            self.set(vcpu, order::PAGES, pages)?;
        }
        Ok(())
    }

    /// What it has done since it started.
    pub fn counters(&self) -> Result<Counters> {
        let sum =
            |offset| -> Result<f64> { (0..self.vcpus).try_fold(0.0, |sum, v| Ok(sum + self.get(v, offset)? as f64)) };
        Ok(Counters {
            seconds: self.born.elapsed().as_secs_f64(),
            progress: sum(count::PROGRESS)?,
            pages: sum(count::PAGES)?,
            gaps: sum(count::GAPS)? / self.hz,
        })
    }

    /// What it does while `meanwhile` lasts; and the longest time that one of its vCPUs stood still.
    pub fn watch<T>(&self, meanwhile: impl FnOnce() -> Result<T>) -> Result<(Counters, Duration, T)> {
        for vcpu in 0..self.vcpus {
            self.set(vcpu, count::LONGEST, 0)?;
        }
        let before = self.counters()?;
        let result = meanwhile()?;
        let did = self.counters()?.since(before);
        let longest = (0..self.vcpus).try_fold(0, |most, v| anyhow::Ok(most.max(self.get(v, count::LONGEST)?)))?;
        Ok((did, Duration::from_secs_f64(longest as f64 / self.hz), result))
    }

    /// Some of the pages that it writes to under `work`, as they are now.
    pub fn sample(&self, work: &Work, most: usize) -> Result<Vec<[u8; 4096]>> {
        let pages = (work.pages / self.vcpus).min(most as u64);
        let read = |i: u64| -> Result<[u8; 4096]> {
            let mut page = [0; 4096];
            self.ram.read_exact_at(&mut page, PAGES_AT + i * 4096)?;
            Ok(page)
        };
        (0..pages).map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_and_contents_stand_where_the_guest_looks_for_them() {
        let image = load_image(b"some text");
        assert!(program().len() < (BLOCKS - LOAD_AT) as usize);
        assert_eq!(&image[..program().len()], program());
        assert!(image.len() as u64 + LOAD_AT < PAGES_AT);
        let text = (POOLS - LOAD_AT + Content::Text.number() * POOL_STRIDE) as usize;
        assert_eq!(&image[text..text + 9], b"some text");
    }

    #[test]
    fn the_reset_vector_jumps_to_the_start_of_the_image() {
        let image = reset_image();
        assert_eq!(image.len(), 0x1_0000);
        assert_eq!(image[0], 0xfa, "the first instruction is cli");
        let jump = i16::from_le_bytes([image[0xfff1], image[0xfff2]]);
        assert_eq!((image[0xfff0], (0xfff3u16).wrapping_add_signed(jump)), (0xe9, 0));
    }

    #[test]
    fn orders_reach_every_vcpu_and_divide_the_pages_among_them() {
        let ram = tempfile::NamedTempFile::new().unwrap();
        ram.as_file().set_len(PAGES_AT).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(ram.path()).unwrap();
        let guest = Guest { ram: file, vcpus: 2, hz: 1e9, born: Instant::now() };
        guest.order(&Work::hot(1001)).unwrap();
        assert_eq!((guest.get(0, order::PAGES).unwrap(), guest.get(1, order::PAGES).unwrap()), (501, 500));
        assert_eq!(guest.get(1, order::STEP).unwrap(), 25_000_000 / 500);
        assert!(guest.order(&Work::hot(100_000)).unwrap_err().to_string().contains("32768"));
    }
}
