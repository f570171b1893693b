//! `understudy-disk`: make, look at, check, merge, copy and release disks by hand.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use serde::Serialize;
use understudy_disk::block::{Format, open, overwrite_check};
use understudy_disk::inspect::{self, Inspection};
use understudy_disk::mirror::record::Role;
use understudy_disk::{Block, LocalDirectory, Qcow2, Raw};

/// Disks of protected machines: the disk itself (the base), and beside it the slices, in which writes wait until their epoch is committed.
///
/// A disk /vm/m.raw has its slices and the record of whose it is in /vm/m.raw.row (or where --slices says). Both belong together: copy or
/// move them together, and only while the machine is stopped. While slices wait to be merged the base alone is an old disk with new parts;
/// 'inspect' says whether that is so and 'merge' ends it.
///
/// Examples:
///   understudy-disk create /vm/m.raw --size 20G
///   understudy-disk create /vm/m.qcow2 --format qcow2 --backing debian.qcow2 --backing-format qcow2 --size 20G
///   understudy-disk inspect /vm/m.raw
///   understudy-disk check /vm/m.raw
///   understudy-disk merge /vm/m.raw
///   understudy-disk convert /vm/m.raw /backup/m.qcow2 --to qcow2
///
/// Nothing here overwrites a file, throws away what was committed, or touches a disk that a running machine holds.
#[derive(Parser)]
#[command(name = "understudy-disk", version, verbatim_doc_comment)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args)]
struct Disk {
    /// The disk: a file or a block device
    disk: PathBuf,
    /// How it is laid out: raw or qcow2. Never guessed, as a guest could make its raw disk look like something else
    #[arg(long, default_value = "raw")]
    format: Format,
    /// Where its slices are [default: DISK.row]. Those of a block device need a directory on a file system that every node sees: say which
    #[arg(long)]
    slices: Option<PathBuf>,
}

impl Disk {
    fn directory(&self) -> PathBuf {
        self.slices.clone().unwrap_or_else(|| LocalDirectory::beside(&self.disk))
    }
}

#[derive(Subcommand)]
enum Command {
    /// Make a new, empty disk (takes no room until it is written)
    Create {
        /// Its file, which must not exist
        disk: PathBuf,
        /// How large: bytes, or with K, M, G, T (powers of 1024)
        #[arg(long, value_parser = size)]
        size: u64,
        /// raw or qcow2
        #[arg(long, default_value = "raw")]
        format: Format,
        /// A disk that this one begins as a copy of, without copying (qcow2 only). Relative names are relative to the new disk
        #[arg(long, requires = "backing_format")]
        backing: Option<PathBuf>,
        /// The backing disk's format
        #[arg(long)]
        backing_format: Option<Format>,
    },
    /// Whose disk it is, what waits to be merged, what would be thrown away. Changes nothing; may be used while the machine runs
    #[command(alias = "info")]
    Inspect {
        #[command(flatten)]
        disk: Disk,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every slice and verify it; follow every table of a qcow2 disk; read a raw disk whole with --read. Changes nothing
    ///
    /// Exit status 0: all is well. 1: something is wrong, and the last line says what.
    Check {
        #[command(flatten)]
        disk: Disk,
        /// Read all of the disk too, to find sectors that cannot be read
        #[arg(long)]
        read: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Merge committed slices into the disk, as the machine would when it boots. Refused while a process holds the disk
    ///
    /// Slices that were never committed stay where they are. Afterwards the disk is complete by itself.
    Merge {
        #[command(flatten)]
        disk: Disk,
    },
    /// Copy a disk into a new file, in either format. Holes stay holes. Refused while slices wait to be merged
    Convert {
        #[command(flatten)]
        disk: Disk,
        /// The new file, which must not exist
        target: PathBuf,
        /// Its format
        #[arg(long, default_value = "raw")]
        to: Format,
    },
    /// Make it longer. Shorter is not offered: what is behind the new end would be lost. Refused while a process holds the disk
    Resize {
        #[command(flatten)]
        disk: Disk,
        /// The new size
        #[arg(value_parser = size)]
        size: u64,
    },
    /// Compare two copies of a disk, each with what is committed in its slices. Refused while a process holds one of them
    ///
    /// Both must be reachable from here. Copies of a mirrored disk are the same only if they are at the same slice ('inspect' says it); while machine and
    /// standby run, the standby's verification compares them at one state instead. Exit status 1: they differ, and the last line says where.
    Verify {
        #[command(flatten)]
        disk: Disk,
        /// The other copy
        other: PathBuf,
        /// Its format
        #[arg(long, default_value = "raw")]
        other_format: Format,
        /// Where its slices are [default: OTHER.row]
        #[arg(long)]
        other_slices: Option<PathBuf>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Give up what this copy of a mirrored disk wrote alone, so that another node's disk may overwrite it, once
    ///
    /// After both nodes wrote (a split brain), the node that runs refuses to synchronise the other's copy and names it. Decide which one is needed; on the OTHER
    /// node, with the machine stopped there, say this. Nothing is overwritten before the next session.
    Discard {
        #[command(flatten)]
        disk: Disk,
        /// The node whose disk is needed
        #[arg(long, value_name = "NODE")]
        in_favour_of: String,
    },
    /// Mark a standby's copy of a mirrored disk as outdated, so that no machine is booted from it until it was synchronised; or clear the mark
    Outdate {
        #[command(flatten)]
        disk: Disk,
        /// This old state is what is wanted: what was written elsewhere since will be lost
        #[arg(long)]
        clear: bool,
    },
    /// Take the disk away from its machine, so that another one can claim it. Refused while a process holds it or slices wait
    Release {
        #[command(flatten)]
        disk: Disk,
        /// The machine that it belongs to now, so that nobody else's disk is released by mistake
        #[arg(long)]
        machine: String,
    },
}

/// `20G` and the like.
fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (&text[..at], unit.to_ascii_uppercase()),
        _ => (text, 'B'),
    };
    let shift = match unit {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return Err("sizes are bytes, or end in K, M, G or T".into()),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no size, such as 20G"))?;
    let bytes = number.checked_mul(1 << shift).filter(|b| *b <= i64::MAX as u64).ok_or("that is too large")?;
    if bytes == 0 || bytes % 512 != 0 {
        return Err("a disk has a whole number of sectors of 512 bytes, at least one".into());
    }
    Ok(bytes)
}

/// Bytes for people.
fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A line that is written over, on a terminal only.
struct Progress {
    what: &'static str,
    of: u64,
    shown: Instant,
    terminal: bool,
    began: Instant,
}

impl Progress {
    fn new(what: &'static str, of: u64) -> Self {
        let now = Instant::now();
        Progress { what, of, shown: now, terminal: io::stderr().is_terminal(), began: now }
    }
    fn at(&mut self, done: u64) {
        // Also without a terminal, now and then: a log should show that it lives.
        let pause = Duration::from_millis(if self.terminal { 200 } else { 10_000 });
        if self.shown.elapsed() < pause {
            return;
        }
        self.shown = Instant::now();
        let percent = if self.of == 0 { 100.0 } else { done as f64 * 100.0 / self.of as f64 };
        let rate = bytes((done as f64 / self.began.elapsed().as_secs_f64()) as u64);
        let end = if self.terminal { "\r" } else { "\n" };
        eprint!("{}: {percent:5.1} % of {}, {rate}/s    {end}", self.what, bytes(self.of));
        let _ = io::stderr().flush();
    }
    fn done(self) {
        if self.terminal {
            eprint!("\r{:60}\r", "");
        }
    }
}

fn json<T: Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("understudy-disk: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Create { disk, size, format, backing, backing_format } => {
            overwrite_check(&disk)?;
            match (format, backing, backing_format) {
                (Format::Raw, None, _) => drop(Raw::create(&disk, size)?),
                (Format::Raw, Some(_), _) => {
                    bail!("a raw disk has no backing disk; use --format qcow2, or convert the other disk")
                }
                (Format::Qcow2, Some(backing), Some(of)) => drop(Qcow2::create(&disk, size, Some((&backing, of)))?),
                (Format::Qcow2, ..) => drop(Qcow2::create(&disk, size, None)?),
            }
            println!("{}: {format}, {}", disk.display(), bytes(size));
            Ok(())
        }
        Command::Inspect { disk, json: as_json } => {
            let inspection = inspect::inspect(&disk.disk, disk.format, &disk.directory(), |_| {})?;
            if as_json { json(&inspection) } else { show(&inspection) }
        }
        Command::Check { disk, read, json: as_json } => check(&disk, read, as_json),
        Command::Merge { disk } => {
            let mut progress = None;
            let merged = inspect::merge(&disk.disk, disk.format, &disk.directory(), |done, of| {
                progress.get_or_insert_with(|| Progress::new("merging", of)).at(done);
            })?;
            if let Some(progress) = progress {
                progress.done();
            }
            match merged {
                0 => println!("{}: nothing to merge", disk.disk.display()),
                n => println!("{}: merged {n} slices; the disk is complete", disk.disk.display()),
            }
            Ok(())
        }
        Command::Convert { disk, target, to } => convert(&disk, &target, to),
        Command::Resize { disk, size } => {
            let was = inspect::resize(&disk.disk, disk.format, &disk.directory(), size)?;
            println!("{}: {} before, {} now", disk.disk.display(), bytes(was), bytes(size));
            Ok(())
        }
        Command::Verify { disk, other, other_format, other_slices, json: as_json } => {
            let theirs = other_slices.unwrap_or_else(|| LocalDirectory::beside(&other));
            let mut progress = None;
            let found = inspect::compare(
                (&disk.disk, disk.format, &disk.directory()),
                (&other, other_format, &theirs),
                |done, of| progress.get_or_insert_with(|| Progress::new("comparing", of)).at(done),
            )?;
            if let Some(progress) = progress {
                progress.done();
            }
            if as_json {
                json(&found)?;
            }
            match found.at.first() {
                None if as_json => Ok(()),
                None => {
                    println!("{} and {} are the same: {}", disk.disk.display(), other.display(), bytes(found.bytes));
                    Ok(())
                }
                Some(at) => bail!(
                    "{} and {} differ in {} of {}, first in the mebibyte at {at}",
                    disk.disk.display(),
                    other.display(),
                    bytes(found.differing),
                    bytes(found.bytes)
                ),
            }
        }
        Command::Discard { disk, in_favour_of } => {
            inspect::discard(&disk.directory(), &in_favour_of)?;
            println!("what {} has of its own may be overwritten by {in_favour_of}'s disk", disk.disk.display());
            Ok(())
        }
        Command::Outdate { disk, clear } => {
            inspect::outdate(&disk.directory(), (!clear).then_some("an administrator"))?;
            println!("{} is {}", disk.disk.display(), if clear { "not outdated any more" } else { "outdated" });
            Ok(())
        }
        Command::Release { disk, machine } => {
            inspect::release(&disk.directory(), &machine)?;
            println!("{} belongs to no machine now", disk.disk.display());
            Ok(())
        }
    }
}

fn show(i: &Inspection) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}: {}, {}", i.disk, i.format, bytes(i.size))?;
    let Some(owner) = &i.owner else {
        writeln!(out, "  claimed by no machine yet; no slices")?;
        return Ok(());
    };
    if owner.machine.is_empty() {
        writeln!(out, "  released: the next machine that opens it owns it (last on {})", owner.node)?;
    } else {
        writeln!(out, "  owner: {} on {}, generation {}", owner.machine, owner.node, owner.generation)?;
    }
    writeln!(
        out,
        "  {}",
        if i.held { "a process holds it: the machine runs, or is frozen" } else { "no process holds it" }
    )?;
    if owner.direct {
        writeln!(out, "  written without protection: no checkpoint fits it, the machine can only boot from it")?;
    }
    writeln!(
        out,
        "  merged up to slice {}; waiting: {} slices, {}",
        owner.newest.serial,
        i.slices.len(),
        bytes(i.waiting)
    )?;
    for s in &i.slices {
        writeln!(
            out,
            "    slice {} (generation {}, epoch {}): {}, {} requests, {}",
            s.serial,
            s.generation,
            s.epoch,
            bytes(s.bytes),
            s.records,
            s.standing
        )?;
    }
    if let Some(mirror) = &owner.mirror {
        let is = match &mirror.role {
            Role::Ran => "the machine ran from this copy last".into(),
            Role::Follows { of } => format!("a copy that follows {of}"),
            Role::Syncing { from, .. } => format!("being synchronised from {from}: not complete"),
            Role::Outdated { of, by } => format!("outdated, as {by} said; it followed {of}"),
        };
        writeln!(out, "  mirrored: {is}")?;
        if let Some(node) = &mirror.discard {
            writeln!(out, "    what it has of its own may be overwritten by {node}'s disk")?;
        }
    }
    for peer in &i.peers {
        let has = peer.has.map_or("not known".into(), |serial| format!("up to slice {serial}"));
        let differ = peer.differing.map_or("not known, everything will be compared".into(), bytes);
        let syncing = if peer.syncing { ", a synchronisation has begun and not ended" } else { "" };
        writeln!(out, "    {}: has {has}; may differ: {differ}{syncing}", peer.node)?;
    }
    for name in &i.strays {
        writeln!(out, "    {name}: of no consequence; removed when the disk is opened")?;
    }
    if let Some(problem) = &i.problem {
        writeln!(out, "  PROBLEM: {problem}")?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Checked {
    #[serde(flatten)]
    inspection: Inspection,
    qcow2: Option<understudy_disk::block::Report>,
    read: Option<u64>,
}

fn check(disk: &Disk, read: bool, as_json: bool) -> Result<()> {
    let inspection = inspect::inspect(&disk.disk, disk.format, &disk.directory(), |_| {})?;
    let mut checked = Checked { inspection, qcow2: None, read: None };
    if disk.format == Format::Qcow2 {
        let image = Qcow2::open(&disk.disk, true)?;
        let mut progress = Progress::new("checking tables", image.size());
        checked.qcow2 = Some(image.check(|at| progress.at(at))?);
        progress.done();
    }
    if read {
        let base = open(&disk.disk, disk.format, true)?;
        let mut progress = Progress::new("reading", base.size());
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < base.size() {
            let now = buffer.len().min((base.size() - at) as usize);
            base.read_at(at, &mut buffer[..now])?;
            at += now as u64;
            progress.at(at);
        }
        progress.done();
        checked.read = Some(at);
    }
    let problem = checked.inspection.problem.clone();
    if as_json {
        json(&checked)?;
    } else {
        show(&checked.inspection)?;
        if let Some(report) = checked.qcow2 {
            println!(
                "  tables: {} of data, {} compressed, {} of zeroes",
                bytes(report.data),
                bytes(report.compressed),
                bytes(report.zero)
            );
        }
        if let Some(read) = checked.read {
            println!("  read: {}", bytes(read));
        }
    }
    match problem {
        None => Ok(()),
        Some(problem) => bail!("{problem}"),
    }
}

fn convert(disk: &Disk, target: &Path, to: Format) -> Result<()> {
    overwrite_check(target)?;
    let source = inspect::source(&disk.disk, disk.format, &disk.directory())?;
    let size = source.base.size();
    let made: Box<dyn Block> = match to {
        Format::Raw => Box::new(Raw::create(target, size)?),
        Format::Qcow2 => Box::new(Qcow2::create(target, size, None)?),
    };
    let copied = copy(&*source.base, &*made);
    if copied.is_err() {
        // Half a copy would be taken for a disk; that this file was not there before was made sure above.
        std::fs::remove_file(target).with_context(|| format!("removing the unfinished {}", target.display()))?;
    }
    println!("{}: {to}, {}, of which {} were not zero", target.display(), bytes(size), bytes(copied?));
    Ok(())
}

fn copy(from: &dyn Block, to: &dyn Block) -> Result<u64> {
    to.take_charge()?;
    let mut progress = Progress::new("copying", from.size());
    let mut buffer = vec![0; 1 << 20];
    let (mut at, mut written) = (0, 0);
    while at < from.size() {
        let now = buffer.len().min((from.size() - at) as usize);
        let bytes = &mut buffer[..now];
        from.read_at(at, bytes)?;
        // In pieces, so that holes stay holes.
        for (i, piece) in bytes.chunks(1 << 16).enumerate() {
            if piece.iter().any(|b| *b != 0) {
                to.write_at(at + ((i as u64) << 16), piece)?;
                written += piece.len() as u64;
            }
        }
        at += now as u64;
        progress.at(at);
    }
    to.flush()?;
    progress.done();
    Ok(written)
}
