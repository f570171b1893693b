//! The block layer alone, on this host: beside plain file I/O on the same file with the same flags; writes with and without protection; merging, recovery, the
//! index's memory. No guest and no KVM. `target/bench/disk.json` has it under `block_layer`; what a guest sees stands beside it.
//!
//! Plain is the better of two: one thread with an io_uring of 32 requests, and 32 threads with `pread` and `pwrite`. The layer is a [`Disk`] as the VMM opens it,
//! in direct mode: requests that are begun, each outcome beginning the next, and 32 threads (a VMM has 4 for a disk). All take turns, several times; medians count.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use understudy_disk::block::{self, Aio, Cache, Tuning};
use understudy_disk::{
    Block, Buffer, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Merged, Merger, Op, Options, Tag,
};
use understudy_hostio::plain;
use understudy_protocol::ids::{Epoch, Generation};

use super::rows::{Bar, Report, Row, number};

const DEPTH: usize = 32;
/// Between two cuts of a protected machine.
const INTERVAL: Duration = Duration::from_millis(25);

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Extent {
    file: u64,
    time: Duration,
    turns: usize,
    unmerged: u64,
}

impl Extent {
    fn of(quick: bool) -> Self {
        if quick {
            Extent { file: 256 << 20, time: Duration::from_millis(120), turns: 3, unmerged: 256 << 20 }
        } else {
            Extent { file: 1 << 30, time: Duration::from_millis(400), turns: 5, unmerged: 1 << 30 }
        }
    }
}

/// What goes into the report.
#[derive(Debug, Serialize)]
pub struct BlockLayer {
    /// Figures.
    pub rows: Vec<Row>,
    /// Goals.
    pub bars: Vec<Bar>,
}

/// Measure on the file system of this directory.
pub fn measure(quick: bool, place: &Path, say: &dyn Fn(&str)) -> Result<BlockLayer> {
    let extent = Extent::of(quick);
    std::fs::create_dir_all(place).with_context(|| format!("creating {}", place.display()))?;
    let dir = tempfile::tempdir_in(place).context("making a directory for the disks")?;
    let mut report = Report::new("none: the block layer alone".into());
    let mut bars = Vec::new();
    let file = dir.path().join("disk");
    fill(&file, extent.file)?;
    for (cache, name) in [(Cache::None, "none"), (Cache::Writeback, "writeback")] {
        let lowest = beside_plain(&mut report, &file, dir.path(), cache, name, &extent, say)?;
        bars.push(Bar {
            bar: format!("block layer beside plain file I/O, 32 requests under way, cache={name}"),
            wanted: "at least 0.90 of it in every case".into(),
            got: lowest
                .as_ref()
                .map_or_else(|| "not possible here".into(), |(case, ratio)| format!("lowest {ratio:.2} ({case})")),
            reached: lowest.map(|(_, ratio)| ratio >= 0.9),
        });
    }
    protected(&mut report, &mut bars, dir.path(), &extent, say)?;
    recovery(&mut report, dir.path(), &extent, say)?;
    Ok(BlockLayer { rows: report.rows, bars })
}

/// For people.
pub fn table(measured: &BlockLayer) -> String {
    let width = measured.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for row in &measured.rows {
        let beside = row.peer_or_limit.as_ref().map_or_else(String::new, |b| {
            format!("   {}: {} ({:.2} of it)", b.name, number(b.value), row.value / b.value)
        });
        text.push_str(&format!("  {:<width$} {:>9} {}{beside}\n", row.name, number(row.value), row.unit));
    }
    text + &super::rows::bars_table(&measured.bars)
}

fn fill(path: &Path, size: u64) -> Result<()> {
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut piece = vec![0; 1 << 20];
    for i in 0..size >> 20 {
        // Nothing that a storage could leave out.
        piece.iter_mut().enumerate().for_each(|(j, b)| *b = (j as u64 * 31 + i * 17 + (j as u64 >> 8)) as u8);
        file.write_all_at(&piece, i << 20).context("filling a disk")?;
    }
    file.sync_all().context("filling a disk")
}

/// Places of requests: one after the other, or anywhere.
#[derive(Clone)]
struct Places {
    random: bool,
    len: u64,
    count: u64,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        if self.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            (self.state >> 11) % self.count * self.len
        } else {
            self.state += 1;
            self.state % self.count * self.len
        }
    }
}

#[derive(Clone, Copy)]
struct Case {
    random: bool,
    write: bool,
    len: usize,
}

impl Case {
    fn name(&self) -> String {
        let Case { random, write, len } = self;
        let size = if *len >= 1 << 20 { "1MiB" } else { "4KiB" };
        format!("{}-{}-{size}", if *random { "random" } else { "sequential" }, if *write { "write" } else { "read" })
    }

    fn places(&self, size: u64) -> Places {
        Places {
            random: self.random,
            len: self.len as u64,
            count: size / self.len as u64,
            state: 0x1234_5678_9abc_def1,
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn open_disk(file: &Path, dir: &Path, tuning: Tuning, memory: Memory, generation: u64, limits: Limits) -> Result<Disk> {
    let base = block::open_with(file, Format::Raw, false, tuning)?;
    let slices = dir.join(format!("{}.row", file.file_name().unwrap_or_default().to_string_lossy()));
    Ok(Disk::open(Options {
        base,
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&slices)?),
        identity: Identity { machine: "bench".into(), node: "here".into(), generation: Generation(generation) },
        memory,
        limits,
    })?)
}

/// `DEPTH` threads that each do one request after the other. Requests per second.
fn with_threads(
    time: Duration,
    places: &Places,
    request: impl Fn(u64, &mut Buffer) -> Result<()> + Sync,
) -> Result<f64> {
    let places = Mutex::new(places.clone());
    let (done, len) = (AtomicU64::new(0), places.lock().map_or(0, |p| p.len as usize));
    let started = Instant::now();
    let next = || places.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        let one = || -> Result<()> {
            let mut buffer = Buffer::new(len);
            while started.elapsed() < time {
                request(next(), &mut buffer)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let threads: Vec<_> = (0..DEPTH).map(|_| scope.spawn(one)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    })?;
    Ok(done.into_inner() as f64 / started.elapsed().as_secs_f64())
}

/// Requests that keep themselves under way: each outcome begins the next one, in the thread that hears of it. (A VMM hands it to the guest there.)
struct Chain {
    disk: Arc<Disk>,
    case: Case,
    until: Instant,
    places: Mutex<Places>,
    done: AtomicU64,
    ended: Sender<understudy_disk::Result<()>>,
}

impl Chain {
    fn begin(self: &Arc<Self>, buffer: Buffer) {
        let at = self.places.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
        let op = if self.case.write { Op::Write { at, from: buffer } } else { Op::Read { at, to: buffer } };
        let this = self.clone();
        let ended = Box::new(move |result: understudy_disk::Result<Buffer>| match result {
            Ok(buffer) => {
                this.done.fetch_add(1, Ordering::Relaxed);
                if Instant::now() < this.until {
                    this.begin(buffer);
                } else {
                    drop(this.ended.send(Ok(())));
                }
            }
            Err(e) => drop(this.ended.send(Err(e))),
        });
        if let Some((_, ended)) = self.disk.begin(op, ended) {
            ended(Err(Error::Refused("a request was not begun".into())));
        }
    }
}

/// `DEPTH` chains of requests. `None`: this disk's requests cannot be begun.
fn with_begin(disk: &Arc<Disk>, case: Case, time: Duration, places: Places) -> Result<Option<f64>> {
    if !disk.begins(case.write) {
        return Ok(None);
    }
    let (sender, ended) = channel();
    let started = Instant::now();
    let chain = Arc::new(Chain {
        disk: disk.clone(),
        case,
        until: started + time,
        places: Mutex::new(places),
        done: AtomicU64::new(0),
        ended: sender,
    });
    for _ in 0..DEPTH {
        chain.begin(Buffer::new(case.len));
    }
    disk.submit();
    for _ in 0..DEPTH {
        ended.recv().context("a request has no end")??;
    }
    Ok(Some(chain.done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()))
}

fn beside_plain(
    report: &mut Report,
    file: &Path,
    dir: &Path,
    cache: Cache,
    name: &str,
    extent: &Extent,
    say: &dyn Fn(&str),
) -> Result<Option<(String, f64)>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if cache == Cache::None {
        options.custom_flags(nix::libc::O_DIRECT);
    }
    let Ok(plain_file) = options.open(file) else { return Ok(None) };
    let size = extent.file;
    let disks: Vec<(&str, Arc<Disk>)> = [("threads", Aio::Threads), ("io_uring", Aio::IoUring)]
        .into_iter()
        .enumerate()
        .map(|(i, (aio, kind))| {
            // Each has a record of its own: a disk has one owner.
            let own = dir.join(format!("{name}-{i}"));
            std::fs::create_dir_all(&own)?;
            let disk = open_disk(file, &own, Tuning { cache, aio: kind }, Memory::None, 1, Limits::default())?;
            Ok((aio, Arc::new(disk)))
        })
        .collect::<Result<_>>()?;
    for (aio, disk) in &disks {
        if disk.how().io != format!("cache={name},aio={aio}") {
            report.alone(format!("block/{name}/{aio}/not-possible"), 0.0, "requests/s").note = disk.how().note;
        }
    }
    // As `aio=auto` chooses.
    let usual = if cache == Cache::None && disks[1].1.begins(false) { "io_uring" } else { "threads" };
    let mut lowest: Option<(String, f64)> = None;
    for len in [4096, 1 << 20] {
        for (random, write) in [(true, false), (true, true), (false, false), (false, true)] {
            let case = Case { random, write, len };
            say(&format!("block layer, cache={name}: {}", case.name()));
            let mut rates: [Vec<f64>; 4] = Default::default();
            for _ in 0..extent.turns {
                let mut places = case.places(size);
                rates[0].push(plain::rate(&plain_file, write, len, DEPTH, extent.time, || places.next())?);
                let plainly = |at: u64, buffer: &mut Buffer| -> Result<()> {
                    let result =
                        if write { plain_file.write_all_at(buffer, at) } else { plain_file.read_exact_at(buffer, at) };
                    result.context("plain file I/O")
                };
                rates[1].push(with_threads(extent.time, &case.places(size), plainly)?);
                for (i, (aio, disk)) in disks.iter().enumerate() {
                    let layered = |at: u64, buffer: &mut Buffer| -> Result<()> {
                        if write {
                            disk.write_at(at, buffer)?
                        } else {
                            disk.read_at(at, buffer)?
                        }
                        Ok(())
                    };
                    let rate = match *aio {
                        "threads" => Some(with_threads(extent.time, &case.places(size), layered)?),
                        _ => with_begin(disk, case, extent.time, case.places(size))?,
                    };
                    rates[2 + i].extend(rate);
                }
            }
            let [ring, threads, ours_threads, ours_ring] = rates.map(median);
            let (peer, plain) = if ring >= threads { ("plain io_uring", ring) } else { ("plain threads", threads) };
            for (aio, rate) in [("threads", ours_threads), ("io_uring", ours_ring)] {
                if rate == 0.0 {
                    continue;
                }
                let row = report.beside(format!("block/{name}/{}/{aio}", case.name()), rate, "requests/s", peer, plain);
                if aio == usual {
                    row.note = Some("as aio=auto chooses".into());
                    let ratio = rate / plain;
                    if lowest.as_ref().is_none_or(|(_, least)| ratio < *least) {
                        lowest = Some((case.name(), ratio));
                    }
                }
            }
        }
    }
    Ok(lowest)
}

/// One writer writes as much as the file has, durably, in MB/s; protected with cuts, seals and commits as a session makes them, and the merger at work.
fn write_rate(disk: &Arc<Disk>, protected: bool, case: Case, size: u64) -> Result<f64> {
    let stop = AtomicBool::new(false);
    let merger = Merger::start(disk.clone())?;
    if protected {
        disk.protect(Epoch(1))?;
    }
    let rate = std::thread::scope(|scope| -> Result<f64> {
        let epochs = scope.spawn(|| -> Result<()> {
            let mut epoch = Epoch(1);
            if !protected {
                return Ok(());
            }
            loop {
                let last = stop.load(Ordering::Acquire);
                disk.cut(epoch)?;
                disk.seal(epoch)?;
                disk.commit(epoch)?;
                epoch = epoch.next();
                if last {
                    return Ok(());
                }
                std::thread::sleep(INTERVAL);
            }
        });
        let mut places = case.places(size);
        let buffer = Buffer::copy(&vec![7; case.len]);
        let (started, mut result) = (Instant::now(), Ok(()));
        for _ in 0..places.count {
            let at = places.next();
            result = loop {
                match disk.write_at(at, &buffer) {
                    Err(Error::Backlog { .. }) => drop(disk.wait_for_room(Duration::from_secs(1))),
                    other => break other,
                }
            };
            if result.is_err() {
                break;
            }
        }
        // What is counted is durable: by a flush without protection, with the last epoch with it.
        stop.store(true, Ordering::Release);
        epochs.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))?;
        if !protected {
            disk.flush()?;
        }
        result?;
        Ok(size as f64 / started.elapsed().as_secs_f64() / 1e6)
    })?;
    if protected {
        disk.unprotect()?;
    }
    drop(merger);
    disk.finish()?;
    Ok(rate)
}

fn protected(report: &mut Report, bars: &mut Vec<Bar>, dir: &Path, extent: &Extent, say: &dyn Fn(&str)) -> Result<()> {
    let file = dir.join("written");
    let mut generation = 1;
    for case in [Case { random: false, write: true, len: 1 << 20 }, Case { random: true, write: true, len: 4096 }] {
        say(&format!("protected beside unprotected: {}", case.name()));
        let mut rates = [Vec::new(), Vec::new()];
        for _ in 0..3 {
            for (protected, rates) in [false, true].into_iter().zip(&mut rates) {
                if !file.exists() {
                    fill(&file, extent.file)?;
                }
                let disk = open_disk(&file, dir, Tuning::default(), Memory::None, generation, Limits::default())?;
                generation += 1;
                rates.push(write_rate(&Arc::new(disk), protected, case, extent.file)?);
            }
        }
        let [direct, with] = rates.map(median);
        report.beside(format!("protected/{}", case.name()), with, "MB/s", "unprotected", direct);
        if case.len == 1 << 20 {
            bars.push(Bar {
                bar: "protected sequential writes beside unprotected, of the disk alone (25 ms epochs, flushed)".into(),
                wanted: "at least 0.70 of it".into(),
                got: format!("{:.2} ({} of {} MB/s)", with / direct, number(with), number(direct)),
                reached: Some(with >= 0.7 * direct),
            });
        }
    }
    Ok(())
}

/// Leave so many bytes in slices, committed and not merged. Their tag.
fn leave_unmerged(disk: &Disk, case: Case, size: u64, bytes: u64) -> Result<Tag> {
    disk.protect(Epoch(1))?;
    let (mut places, mut epoch, mut left) = (case.places(size), Epoch(1), bytes / case.len as u64);
    let buffer = vec![5; case.len];
    let mut tag = disk.cut(epoch)?;
    epoch = epoch.next();
    while left > 0 {
        // 16 MiB an epoch.
        let now = left.min((16 << 20) / case.len as u64);
        for _ in 0..now {
            disk.write_at(places.next(), &buffer)?;
        }
        left -= now;
        tag = disk.cut(epoch)?;
        disk.seal(epoch)?;
        disk.commit(epoch)?;
        epoch = epoch.next();
    }
    Ok(tag)
}

fn recovery(report: &mut Report, dir: &Path, extent: &Extent, say: &dyn Fn(&str)) -> Result<()> {
    let limits = Limits { backlog: 4 << 30, extents: 1 << 22, ..Limits::default() };
    let file = dir.join("disk");
    let per_gib = (1_u64 << 30) as f64 / extent.unmerged as f64;
    for case in [Case { random: false, write: true, len: 1 << 20 }, Case { random: true, write: true, len: 4096 }] {
        say(&format!("recovery and merging: {}", case.name()));
        let own = dir.join(format!("recovery-{}", case.name()));
        std::fs::create_dir_all(&own)?;
        let disk = open_disk(&file, &own, Tuning::default(), Memory::None, 1, limits)?;
        let tag = leave_unmerged(&disk, case, extent.file, extent.unmerged)?;
        let index = disk.status().index_bytes as f64 / (1 << 20) as f64 * per_gib;
        report.alone(format!("index/{}", case.name()), index, "MiB/GiB of writes that wait");
        drop(disk);
        let slices = own.join("disk.row");
        let started = Instant::now();
        let mut bytes = 0;
        for entry in std::fs::read_dir(&slices).context("reading the slices")? {
            bytes += std::fs::read(entry?.path()).context("reading a slice")?.len();
        }
        let plain = started.elapsed().as_secs_f64() * 1e3 * per_gib;
        let started = Instant::now();
        let disk = open_disk(&file, &own, Tuning::default(), Memory::Image(tag), 2, limits)?;
        let opened = started.elapsed().as_secs_f64() * 1e3 * per_gib;
        report.beside(format!("recovery/{}", case.name()), opened, "ms/GiB", "reading the slices", plain).note =
            Some(format!("{} MiB of slices, in the page cache", bytes >> 20));
        let started = Instant::now();
        let mut merged = 0;
        loop {
            match disk.merge()? {
                Merged::Slices { bytes, .. } => merged += bytes,
                Merged::Nothing => break,
                Merged::Waiting(why) => anyhow::bail!("{why}"),
            }
        }
        let rate = merged as f64 / started.elapsed().as_secs_f64() / 1e6;
        // The same bytes, to the same places, and durable.
        let base = OpenOptions::new().write(true).open(&file)?;
        let (buffer, mut places) = (vec![6; case.len], case.places(extent.file));
        let started = Instant::now();
        for i in 0..extent.unmerged / case.len as u64 {
            base.write_all_at(&buffer, places.next())?;
            if ((i + 1) * case.len as u64).is_multiple_of(limits.batch) {
                base.sync_data()?;
            }
        }
        base.sync_data()?;
        let plain = extent.unmerged as f64 / started.elapsed().as_secs_f64() / 1e6;
        report.beside(format!("merge/{}", case.name()), rate, "MB/s", "writing the same to the file", plain);
    }
    Ok(())
}
