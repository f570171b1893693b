//! How much flows: checkpoints of an idle guest, dirty bytes of one that writes as fast as it can, and what of them is on the wire.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::contents::Content;
use super::guest::{Guest, Work, Write};
use super::pair::{BOUND, Pair, Setup, replicator_has};
use super::rows::Report;
use super::{limits, qemu};
use crate::lab::wait_for;

/// RAM of the machines here.
const RAM_MIB: u64 = 512;
const GIB: f64 = (1u64 << 30) as f64;
const MIB: f64 = (1u64 << 20) as f64;

/// Checkpoints per second and bytes per checkpoint of a guest that does nothing, with the shortest interval that this release has.
pub fn idle(report: &mut Report, time: Duration, say: &dyn Fn(&str)) -> Result<()> {
    for interval_ms in [0, 1] {
        say(&format!("an idle guest, a checkpoint every {interval_ms} ms"));
        let setup = Setup { idle: true, interval_ms, ..Setup::new(256) };
        let pair = match Pair::start(&setup, &[]) {
            Ok(pair) => pair,
            Err(e) if interval_ms == 0 => {
                say(&format!(
                    "this release has no interval of 0 ms: {}",
                    e.to_string().lines().next().unwrap_or_default()
                ));
                continue;
            }
            Err(e) => return Err(e),
        };
        pair.protect()?;
        std::thread::sleep(Duration::from_secs(1));
        let (before, started) = (pair.a.replicator()?, Instant::now());
        std::thread::sleep(time);
        let (after, seconds) = (pair.a.replicator()?, started.elapsed().as_secs_f64());
        let epochs = (after.epochs - before.epochs) as f64;
        ensure!(epochs > 0.0, "an idle guest is not checkpointed");
        let name = format!("idle/{interval_ms}-ms");
        report.alone(format!("{name}/checkpoints"), epochs / seconds, "per s");
        let bytes = (after.wire_bytes - before.wire_bytes) as f64 / epochs;
        report.alone(format!("{name}/wire"), bytes, "B per cut");
        report.alone(format!("{name}/pause-p50"), after.pause_p50_us as f64, "µs");
    }
    Ok(())
}

/// Dirty bytes replicated per second, sustained, beside a copy and a TCP stream; CPU time; memory beyond the guest's.
pub fn sustained(report: &mut Report, time: Duration, code: &[u8], say: &dyn Fn(&str)) -> Result<()> {
    say("a plain TCP stream");
    let (tcp, tcp_cpu) = limits::tcp_stream(time / 4)?;
    let (tcp, tcp_cpu) = (tcp / MIB, tcp_cpu * GIB);
    let processors = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    let copy_pages = 16_384;
    let copy = copy_pages as f64 * 4096.0 / MIB / (limits::copy_us(copy_pages) / 1e6);
    report.alone("limit/tcp-stream", tcp, "MiB/s");
    report.alone("limit/tcp-stream-cpu", tcp_cpu, "s per GiB");
    report.alone("limit/memcpy", copy, "MiB/s");
    let mut ways = vec![("encrypted", Vec::new())];
    if replicator_has("--encryption")? {
        ways.push(("plain", vec!["--encryption".to_owned(), "off".to_owned()]));
    } else {
        say("this release always encrypts");
    }
    for (way, replicator) in ways {
        let pair = Pair::start(&Setup { replicator, ..Setup::new(RAM_MIB) }, code)?;
        let guest = pair.guest()?;
        pair.protect()?;
        say(&format!("4096 pages every 25 ms, {way}: memory"));
        guest.order(&Work::hot(4096))?;
        std::thread::sleep(time / 4);
        if way == "encrypted" {
            for (side, name) in [(&pair.a, "primary"), (&pair.b, "standby")] {
                let kib = side.memory_beyond_guest_kib()?;
                report.beside(
                    format!("memory/{name}/beyond-guest"),
                    kib / 1024.0,
                    "MiB",
                    "the guest's RAM",
                    RAM_MIB as f64,
                );
            }
        }
        say(&format!("random pages as fast as the guest can, {way}"));
        guest.order(&Work { unpaced: true, write: Write::Page, ..Work::hot(16_384) })?;
        std::thread::sleep(Duration::from_secs(2));
        let cpu = || anyhow::Ok((pair.a.cpu_seconds()?, pair.b.cpu_seconds()?, pair.a.guest_cpu_seconds()?));
        let (before, cpu_before, started) = (pair.a.replicator()?, cpu()?, Instant::now());
        std::thread::sleep(time);
        let (after, cpu_after, seconds) = (pair.a.replicator()?, cpu()?, started.elapsed().as_secs_f64());
        let bytes = (after.raw_bytes - before.raw_bytes) as f64;
        ensure!(bytes > 0.0, "nothing was replicated");
        let name = format!("sustained/{way}");
        let rate = bytes / MIB / seconds;
        report.beside(format!("{name}/replicated"), rate, "MiB/s", "a plain TCP stream", tcp);
        report.beside(format!("{name}/replicated-over-memcpy"), rate, "MiB/s", "memcpy", copy);
        report.alone(format!("{name}/cpu-primary"), (cpu_after.0 - cpu_before.0) / (bytes / GIB), "s per GiB");
        report.alone(format!("{name}/cpu-standby"), (cpu_after.1 - cpu_before.1) / (bytes / GIB), "s per GiB");
        // The guest's own writes (each with its fault in the dirty log), the bare stream, and two copies: a checkpoint's page is copied because the
        // guest goes on, and on the standby because half an epoch must never show. Nobody replicates whole pages for less.
        let guest = (cpu_after.2 - cpu_before.2) / (bytes / GIB);
        report.alone(format!("{name}/cpu-guest"), guest, "s per GiB");
        let floor = processors / (guest + tcp_cpu + 2.0 * 1024.0 / copy) * 1024.0;
        report
            .beside(format!("{name}/of-the-possible"), rate, "MiB/s", "guest, bare stream and two copies alone", floor)
            .note = Some("what the processors would carry if replication were nothing else".into());
    }
    Ok(())
}

/// Bytes on the wire for each dirty byte, by content, beside LZ4 and Zstandard on whole pages and QEMU's XBZRLE.
pub fn wire(report: &mut Report, time: Duration, code: &[u8], say: &dyn Fn(&str)) -> Result<()> {
    let pair = Pair::start(&Setup::new(RAM_MIB), code)?;
    let guest = pair.guest()?;
    pair.protect()?;
    for content in Content::ALL {
        say(&format!("{} on the wire", content.name()));
        let work = write_content(&guest, content)?;
        std::thread::sleep(Duration::from_secs(1));
        let before = pair.a.replicator()?;
        std::thread::sleep(time);
        // On a busy host a checkpoint can take longer than that.
        let after = wait_for("checkpoints", BOUND, || {
            let now = pair.a.replicator()?;
            Ok((now.raw_bytes > before.raw_bytes && now.epochs >= before.epochs + 3).then_some(now))
        })?;
        let raw = (after.raw_bytes - before.raw_bytes) as f64;
        let share = (after.wire_bytes - before.wire_bytes) as f64 / raw;
        let pages = guest.sample(&work, 2048)?;
        let name = format!("wire/{}", content.name());
        let compression = after.statistics.encoding.compression.clone();
        let row = report.beside(name.clone(), share, "B per B", "LZ4 on whole pages", limits::lz4_share(&pages));
        row.note = Some(format!("compression: {compression}"));
        report.beside(
            format!("{name}/zstd"),
            share,
            "B per B",
            "Zstandard 1 on whole pages",
            limits::zstd_share(&pages)?,
        );
        let prepare = |guest: &Guest| write_content(guest, content).map(|_| ());
        match qemu::xbzrle(RAM_MIB, code, prepare, time) {
            Ok(x) => {
                let row = report.beside(format!("{name}/xbzrle"), share, "B per B", "QEMU's XBZRLE", x.wire_share);
                row.note = Some(format!("{:.0} pages with XBZRLE", x.pages));
            }
            Err(e) => say(&format!("XBZRLE could not be measured: {e:#}")),
        }
    }
    Ok(())
}

/// 4,096 pages in each period: whole pages of it, or records in pages that are full of it.
fn write_content(guest: &Guest, content: Content) -> Result<Work> {
    let whole = Work { content, write: Write::Page, ..Work::hot(4096) };
    guest.order(&whole)?;
    if content != Content::Database {
        return Ok(whole);
    }
    // All pages once, then records.
    std::thread::sleep(Duration::from_secs(1));
    let records = Work { write: Write::Records, ..whole };
    guest.order(&records)?;
    Ok(records)
}
