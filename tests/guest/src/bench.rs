//! How fast a disk is: direct I/O on the raw device, as many threads as requests are to be under way. One `Q` line a case, `Q n done` at the end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::Guest;
use crate::storage::{Result, told};

/// How long a case takes.
const CASE: Duration = Duration::from_millis(600);
/// How often all cases are measured.
const ROUNDS: u32 = 3;
/// Requests that are under way at most, and bytes of the largest.
const DEEPEST: u64 = 32;
const LARGEST: usize = 1 << 20;
/// Direct I/O wants its buffers on such a boundary.
const BOUNDARY: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Case {
    write: bool,
    random: bool,
    bytes: usize,
    depth: u64,
}

/// Measure `device`, then be idle.
pub fn measure(guest: &Guest) {
    match all(guest) {
        Ok(()) => drop(guest.output.emit('Q', || "done".into())),
        Err(why) => guest.error(&format!("disk {why}")),
    }
    loop {
        thread::park();
    }
}

fn all(guest: &Guest) -> Result<()> {
    let flags = OFlags::DIRECT.bits() as i32;
    let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&guest.params.bench);
    let device = told("opening the device", device)?;
    let size = told("looking for its size", rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0)))?;
    // Made and touched once: a checkpoint would carry fresh memory, and that is not the disk's.
    let mut rooms: Vec<Vec<u8>> = (0..DEEPEST).map(|number| vec![number as u8 + 1; LARGEST + BOUNDARY]).collect();
    for round in 0..ROUNDS {
        for (write, random) in [(false, false), (false, true), (true, false), (true, true)] {
            for (bytes, depth) in [(4096, 1), (4096, DEEPEST), (LARGEST, 1), (LARGEST, DEEPEST)] {
                let case = Case { write, random, bytes, depth };
                let (count, time) = one(&device, size, case, &mut rooms)?;
                guest.output.emit('Q', || {
                    let (op, order) =
                        (if write { "write" } else { "read" }, if random { "random" } else { "sequential" });
                    let us = time.as_micros();
                    format!("round={round} op={op} order={order} bytes={bytes} depth={depth} count={count} us={us}")
                });
            }
        }
    }
    Ok(())
}

/// How many requests were done, in which time.
fn one(device: &File, size: u64, case: Case, rooms: &mut [Vec<u8>]) -> Result<(u64, Duration)> {
    let (next, count) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let done = thread::scope(|scope| {
        let work = |number, room| worker(device, size, case, number, room, began, (&next, &count));
        let threads: Vec<_> =
            rooms.iter_mut().zip(0..case.depth).map(|(room, number)| scope.spawn(move || work(number, room))).collect();
        threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into())))
    });
    let time = began.elapsed();
    done.map(|()| (count.load(Relaxed), time))
}

fn worker(
    device: &File,
    size: u64,
    case: Case,
    number: u64,
    room: &mut [u8],
    began: Instant,
    (next, count): (&AtomicU64, &AtomicU64),
) -> Result<()> {
    let blocks = (size / case.bytes as u64).max(1);
    let from = room.as_ptr().align_offset(BOUNDARY);
    let buffer = &mut room[from..from + case.bytes];
    let mut state = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while began.elapsed() < CASE {
        let block = if case.random {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % blocks
        } else {
            next.fetch_add(1, Relaxed) % blocks
        };
        let at = block * case.bytes as u64;
        if case.write {
            told("writing", device.write_all_at(buffer, at))?;
        } else {
            told("reading", device.read_exact_at(buffer, at))?;
        }
        count.fetch_add(1, Relaxed);
    }
    Ok(())
}
