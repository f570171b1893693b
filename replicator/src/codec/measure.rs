//! How fast encoding and decoding are, and what they leave: for `cargo run --release --example encode_throughput`, and for
//! `make bench`, which puts the figures beside others.
//!
//! A made-up guest ([`content`]) writes to its pages, epoch after epoch; what it wrote goes through the writer, the decoder, a real
//! [`Stage`] and into a RAM file, which must equal the guest's RAM in the end. Nothing is sent. The yardsticks are LZ4 and zstd (level
//! 1) on the same pages, each page by itself, as a checkpointer without shadow copies would use them.
//!
//! Times are processor time of the one thread that does it all, so that what else runs on the host counts little.

pub mod content;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

pub use self::content::Content;
use self::content::Guest;
use super::{BatchWriter, Decoder, EncodingConfig, EpochDigest, PAGE, Page};
use crate::image::ImageError;
use crate::stage::{OverRam, Stage};

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// What the guest writes.
    pub content: Content,
    /// The guest's RAM.
    pub ram_pages: u64,
    /// Pages that it writes in an epoch.
    pub dirty_pages: u64,
    /// Epochs measured; a quarter as many run before, so that the shadow has settled.
    pub epochs: u64,
    /// How it is encoded.
    pub encoding: EncodingConfig,
}

impl Default for Plan {
    fn default() -> Self {
        let encoding = EncodingConfig::default();
        Self { content: Content::Text, ram_pages: 64 << 10, dirty_pages: 4096, epochs: 40, encoding }
    }
}

/// What came out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Pages that the guest wrote, in bytes.
    pub dirty_bytes: u64,
    /// Batches made of them.
    pub wire_bytes: u64,
    /// The same pages by LZ4, each by itself.
    pub lz4_bytes: u64,
    /// The same pages by zstd level 1, each by itself.
    pub zstd_bytes: u64,
    /// Time spent encoding, digest included.
    pub encode: Duration,
    /// Time spent decoding, digesting and staging.
    pub decode: Duration,
    /// Time spent writing the stage to RAM.
    pub apply: Duration,
    /// Time that copying the pages took, once, in blocks of 64.
    pub copy: Duration,
    /// Time that LZ4 took.
    pub lz4: Duration,
    /// Time that zstd took.
    pub zstd: Duration,
    /// Memory of the shadow at the end.
    pub shadow_bytes: u64,
}

impl Figures {
    /// Bytes on the wire per byte that the guest wrote.
    pub fn ratio(&self, bytes: u64) -> f64 {
        bytes as f64 / self.dirty_bytes.max(1) as f64
    }

    /// ns for each page that the guest wrote.
    pub fn ns_per_page(&self, time: Duration) -> f64 {
        time.as_nanos() as f64 / (self.dirty_bytes / PAGE as u64).max(1) as f64
    }

    /// GB of dirty pages per second.
    pub fn gb_per_second(&self, time: Duration) -> f64 {
        self.dirty_bytes as f64 / time.as_nanos().max(1) as f64
    }
}

/// Processor time of this thread.
struct Timer(Duration);

impl Timer {
    fn now() -> Duration {
        // Linux has had this clock since 2.6.12; without it all times are zero.
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
    }

    fn start() -> Self {
        Self(Self::now())
    }

    fn elapsed(&self) -> Duration {
        Self::now().saturating_sub(self.0)
    }
}

/// Batches go when they are so large, as the driver's do.
const BATCH: usize = 192 << 10;

/// Measure. `dir` must be on the file system where images are (a tmpfs); three files are made there.
///
/// The error is that of the files, or of an encoding that did not lead to the guest's RAM.
pub fn run(plan: &Plan, dir: &Path) -> Result<Figures, ImageError> {
    let io_error = |source| ImageError::Io { what: "measure in", file: dir.display().to_string(), source };
    let ram_path = dir.join("ram");
    let mut options = File::options();
    let ram = options.read(true).write(true).create(true).truncate(true).open(&ram_path).map_err(io_error)?;
    ram.set_len(plan.ram_pages * PAGE as u64).map_err(io_error)?;

    let mut guest = Guest::new(plan.content, plan.ram_pages as usize);
    let (mut writer, mut digest) = (BatchWriter::default(), EpochDigest::default());
    let (mut decoder, mut stage) = (Decoder::default(), Stage::open(dir)?);
    writer.restart(plan.ram_pages, &plan.encoding, 0x5EED);
    let mut batches = Batches::default();
    let mut figures = Figures::default();
    // What the VMM's arena would hold: captured pages one after the other.
    let mut arena: Vec<Page> = Vec::new();
    let settle = plan.epochs.div_ceil(4);
    for epoch in 0..=settle + plan.epochs {
        // Epoch zero is the first copy.
        let dirty: Vec<u64> = if epoch == 0 { (0..plan.ram_pages).collect() } else { guest.run(plan.dirty_pages) };
        arena.clear();
        arena.extend(dirty.iter().map(|index| guest.ram[*index as usize]));

        batches.count = 0;
        let mut encode = Duration::ZERO;
        let mut begun = Timer::start();
        for (number, (index, page)) in dirty.iter().zip(&arena).enumerate() {
            writer.push(*index, page, &mut digest);
            if writer.len() >= BATCH || number + 1 == dirty.len() {
                writer.seal();
                encode += begun.elapsed();
                batches.take(&mut writer);
                begun = Timer::start();
            }
        }
        let sent = digest.finish();
        encode += begun.elapsed();

        let begun = Timer::start();
        stage.reset()?;
        for batch in batches.all() {
            let mut target = OverRam { stage: &mut stage, ram: &ram, ram_path: &ram_path, ram_pages: plan.ram_pages };
            decoder.batch(batch, plan.ram_pages, &mut target)?;
        }
        let arrived = decoder.digest().finish();
        let decode = begun.elapsed();
        if sent != arrived {
            return Err(ImageError::Content(format!(
                "epoch {epoch} of {} was not decoded to what was encoded",
                plan.content.name()
            )));
        }
        let begun = Timer::start();
        stage.apply(&ram).map_err(io_error)?;
        let apply = begun.elapsed();

        if epoch > settle {
            figures.dirty_bytes += (dirty.len() * PAGE) as u64;
            figures.wire_bytes += batches.all().iter().map(|batch| batch.len() as u64).sum::<u64>();
            figures.encode += encode;
            figures.decode += decode;
            figures.apply += apply;
            whole_pages(&arena, &mut figures).map_err(io_error)?;
        }
    }
    figures.shadow_bytes = writer.shadow().0;
    let mut page = [0; PAGE];
    for (index, content) in (0u64..).zip(&guest.ram) {
        ram.read_exact_at(&mut page, index * PAGE as u64).map_err(io_error)?;
        if page != *content {
            return Err(ImageError::Content(format!("page {index} of {} is not the guest's", plan.content.name())));
        }
    }
    Ok(figures)
}

/// The batches of an epoch, in memory that is used again, as the sender's kept frames are.
#[derive(Default)]
struct Batches {
    memory: Vec<Vec<u8>>,
    count: usize,
}

impl Batches {
    fn all(&self) -> &[Vec<u8>] {
        &self.memory[..self.count]
    }

    /// What sending would do; not part of encoding.
    fn take(&mut self, writer: &mut BatchWriter) {
        if !writer.is_empty() {
            if self.count == self.memory.len() {
                self.memory.push(Vec::new());
            }
            let room = &mut self.memory[self.count];
            room.clear();
            room.extend_from_slice(writer.bytes());
            self.count += 1;
        }
        writer.clear();
    }
}

/// The yardsticks.
fn whole_pages(pages: &[Page], figures: &mut Figures) -> io::Result<()> {
    let mut room = vec![0; lz4_flex::block::get_maximum_output_size(PAGE).max(zstd::zstd_safe::compress_bound(PAGE))];
    let mut block = vec![0; 64 * PAGE];
    let begun = Timer::start();
    for pages in pages.chunks(64) {
        let pages = pages.as_flattened();
        block[..pages.len()].copy_from_slice(pages);
        std::hint::black_box(&block);
    }
    figures.copy += begun.elapsed();
    // A page that does not shrink travels as it is.
    let least = |made: usize| made.min(PAGE) as u64;
    let begun = Timer::start();
    for page in pages {
        let made = lz4_flex::block::compress_into(page, &mut room).map_err(io::Error::other)?;
        figures.lz4_bytes += least(made);
    }
    figures.lz4 += begun.elapsed();
    let mut zstd = zstd::bulk::Compressor::new(1)?;
    let begun = Timer::start();
    for page in pages {
        figures.zstd_bytes += least(zstd.compress_to_buffer(page, &mut room)?);
    }
    figures.zstd += begun.elapsed();
    Ok(())
}
