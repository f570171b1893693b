//! The first copy, and a takeover: from the request, with the primary dead and the image there, to the guest's first write.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use understudy_protocol::control::{PromoteFrom, ReplicatorRequest, TakenOver, VmmRequest, call_once};
use understudy_protocol::ids::Generation;

use super::Spread;
use super::contents::{self, Content};
use super::guest::{Guest, Work};
use super::pair::{BOUND, Pair, Setup};
use super::rows::Report;

/// Below this, RAM holds the guest's program and its orders.
const FILL_FROM_MIB: u64 = 8;
/// What the rest of the machine needs beside two guests, MiB.
const BESIDE_MIB: u64 = 3072;

/// For each RAM size in MiB, `runs` times; sizes whose turn comes after `bound` are left out.
pub fn measure(
    report: &mut Report,
    sizes: &[(u64, usize)],
    bound: Duration,
    code: &[u8],
    say: &dyn Fn(&str),
) -> Result<()> {
    let begun = Instant::now();
    for (mib, runs) in sizes {
        if begun.elapsed() > bound {
            say(&format!("takeover of {mib} MiB: left out, the time is up"));
            continue;
        }
        let available = available_mib()?;
        if 2 * mib + BESIDE_MIB > available {
            say(&format!(
                "{mib} MiB of RAM twice do not fit into the {available} MiB that are available: not measured"
            ));
            continue;
        }
        let (mut totals, mut images, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        for run in 1..=*runs {
            say(&format!("takeover of {mib} MiB, run {run} of {runs}"));
            let one = take_over(*mib, code)?;
            say(&format!("  {:.1} ms; the first copy took {:.1} s", one.total_ms, one.first_copy_s));
            totals.push(one.total_ms);
            images.push(one.image_ms);
            rates.push(*mib as f64 / one.first_copy_s);
        }
        let (totals, images, rates) = (Spread::of(totals), Spread::of(images), Spread::of(rates));
        let note =
            format!("{} runs, {:.1} to {:.1} ms; RAM full of database pages", totals.runs, totals.min, totals.max);
        report.alone(format!("takeover/{mib}-MiB/first-instruction"), totals.median, "ms").note = Some(note.clone());
        report.alone(format!("takeover/{mib}-MiB/longest"), totals.max, "ms").note = Some(note);
        report.alone(format!("takeover/{mib}-MiB/image-whole"), images.median, "ms");
        report.alone(format!("first-copy/{mib}-MiB"), rates.median, "MiB/s");
    }
    Ok(())
}

struct One {
    total_ms: f64,
    image_ms: f64,
    first_copy_s: f64,
}

fn take_over(mib: u64, code: &[u8]) -> Result<One> {
    let mut pair = Pair::start(&Setup::new(mib), code)?;
    let guest = pair.guest()?;
    guest.order(&Work::hot(0))?;
    fill(&pair, mib)?;
    pair.protect()?;
    guest.order(&Work::hot(500))?;
    std::thread::sleep(Duration::from_millis(500));
    let generation = Generation(pair.a.vmm()?.generation.0 + 1);
    let first_copy_s = pair.a.replicator()?.last_sync_ms as f64 / 1e3;
    pair.a.kill();
    let standby = Guest::asleep(&pair.b.layout.ram(), pair.vcpus())?;

    let asked = Instant::now();
    let taken: TakenOver = pair.b.ask_replicator(&ReplicatorRequest::TakeOver { generation })?;
    let image = taken.image.context("the standby has no image to run from")?;
    let whole = asked.elapsed();
    let before = standby.now()?;
    let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
    let over = AtomicBool::new(false);
    let (first, promoted) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| -> Result<Option<Instant>> {
            while !over.load(Ordering::Relaxed) {
                if standby.now()? != before {
                    return Ok(Some(Instant::now()));
                }
            }
            Ok(None)
        });
        let request = VmmRequest::Promote { generation, from };
        let promoted = call_once::<_, ()>(pair.b.layout.vmm_socket(), &request, BOUND);
        // It runs, or never will.
        let grace = Instant::now() + Duration::from_secs(5);
        while promoted.is_ok() && !watch.is_finished() && Instant::now() < grace {
            std::thread::sleep(Duration::from_millis(1));
        }
        over.store(true, Ordering::Relaxed);
        (watch.join(), promoted)
    });
    promoted.context("promoting the standby")?;
    let first = first.map_err(|_| anyhow::anyhow!("the watching thread ended"))??;
    let first = first.context("the guest did not write to memory within 5 s after its promotion")?;
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    ensure!(first_copy_s > 0.0, "the first copy took no time");
    Ok(One { total_ms: ms(first - asked), image_ms: ms(whole), first_copy_s })
}

/// Fill the machine's RAM before it is replicated: nothing of it is zero, as in a machine that has run for a while.
fn fill(pair: &Pair, mib: u64) -> Result<()> {
    let ram = OpenOptions::new().write(true).open(pair.a.layout.ram()).context("opening the guest's RAM")?;
    let mut piece = contents::pool(Content::Database, 1 << 20, &[]);
    for at in FILL_FROM_MIB..mib {
        // No two pieces are the same.
        piece.chunks_exact_mut(4096).for_each(|page| page[..8].copy_from_slice(&at.to_le_bytes()));
        ram.write_all_at(&piece, at << 20).context("filling the guest's RAM")?;
    }
    Ok(())
}

fn available_mib() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let kib = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_ascii_whitespace().next()?.parse().ok());
    Ok(kib.unwrap_or(0u64) / 1024)
}
