//! What the guest does all the time, each a function that never returns, run in a thread of its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use lab_guest::line::Splitter;
use lab_guest::pattern::Sweep;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Guest;
use crate::output::lock;

/// Between two writes to the ring: an epoch has several, and other work some of the processor.
const RING_PAUSE: Duration = Duration::from_millis(5);

/// Errors are counted without end but described only so often, so that a broken line cannot drown the port.
const DESCRIBED: u64 = 50;

/// Run `activity` in a thread, on `cpu` if the machine has it, again whenever it ends.
pub fn run_for_ever(guest: &Arc<Guest>, name: &'static str, cpu: Option<usize>, activity: fn(&Guest)) {
    let shared = Arc::clone(guest);
    let body = move || {
        if let Some(cpu) = cpu {
            pin_to(cpu);
        }
        loop {
            if catch_unwind(AssertUnwindSafe(|| activity(&shared))).is_err() {
                shared.error(&format!("the {name} panicked and is started again"));
            }
            thread::sleep(Duration::from_secs(1));
        }
    };
    if let Err(why) = thread::Builder::new().name(name.into()).spawn(body) {
        guest.error(&format!("the {name} could not be started: {why}"));
    }
}

fn pin_to(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    // A machine with one vCPU refuses the second; the thread then runs where there is room.
    let _ = sched_setaffinity(None, &cpus);
}

/// Fill the line: `L` lines at the pace that its speed allows.
pub fn write_lines(guest: &Guest) {
    let rate = guest.params.bytes_per_second().max(1);
    // A bucket of a tenth of a second: the pace is right on average, and a pause is not made up for by a flood.
    let bucket = (rate / 10).max(64) as i64;
    let mut credit = bucket;
    let mut before = guest.clocks.monotonic_ns();
    loop {
        while credit > 0 {
            let sent = guest
                .output
                .emit('L', || format!("{} {}", guest.short_boot_id(), guest.clocks.monotonic_ns() / 1_000_000));
            credit -= sent as i64;
        }
        let wait_ns = ((-credit) as u64 + 64) * 1_000_000_000 / rate;
        thread::sleep(Duration::from_nanos(wait_ns.max(2_000_000)));
        let now = guest.clocks.monotonic_ns();
        // The fraction of a byte that rounding drops here is not worth carrying.
        credit += (now.saturating_sub(before) as u128 * u128::from(rate) / 1_000_000_000) as i64;
        credit = credit.min(bucket);
        before = now;
    }
}

/// Check what arrives from the device.
pub fn read_lines(guest: &Guest) {
    let mut splitter = Splitter::default();
    let mut buffer = [0u8; 4096];
    let mut described = 0;
    loop {
        let n = match guest.output.read(&mut buffer) {
            Ok(n) if n > 0 => n,
            _ => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        let mut complaints = Vec::new();
        splitter.feed(&buffer[..n], |bytes| complaints.extend(lock(&guest.received).take(bytes)));
        for complaint in complaints {
            if described < DESCRIBED {
                guest.error(&complaint);
            }
            described += 1;
        }
    }
}

/// Rewrite and verify memory.
pub fn sweep_memory(guest: &Guest) {
    let params = &guest.params;
    // The boot id is as good a key as any: different in every boot.
    let key = guest.boot_id.bytes().fold(0u64, |k, b| k.rotate_left(7) ^ u64::from(b));
    let mut sweep = Sweep::new((params.mem_mib * 256) as usize, key);
    if sweep.is_empty() {
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    }
    loop {
        for _ in 0..params.mem_batch {
            if let Some(bad) = sweep.step()
                && sweep.bad() <= DESCRIBED
            {
                guest.error(&format!("memory {bad}"));
            }
        }
        guest.memory.round.store(sweep.round(), Relaxed);
        guest.memory.position.store(sweep.position(), Relaxed);
        guest.memory.written.store(sweep.written(), Relaxed);
        guest.memory.bad.store(sweep.bad(), Relaxed);
        guest.clocks.monotonic_ns();
        if params.mem_pause_us > 0 {
            thread::sleep(Duration::from_micros(params.mem_pause_us));
        }
    }
}

/// Say now and then how things are.
pub fn report(guest: &Guest) {
    loop {
        guest.output.emit('C', || {
            let clocks = &guest.clocks;
            let (mono, boot, real) = (clocks.monotonic_ns(), clocks.boottime_ns(), clocks.realtime_ns());
            let (back, id) = (clocks.went_back(), &guest.boot_id);
            let (rng, hvc) = (guest.rng_bytes.load(Relaxed), guest.hvc_lines.load(Relaxed));
            format!("boot={id} mono_ns={mono} boottime_ns={boot} real_ns={real} back={back} rng={rng} hvc={hvc}")
        });
        guest.output.emit('R', || {
            let r = guest.received();
            format!("last={} gaps={} repeats={} bad={}", r.last, r.gaps, r.repeats, r.bad)
        });
        guest.output.emit('M', || {
            let m = &guest.memory;
            let (round, page) = (m.round.load(Relaxed), m.position.load(Relaxed));
            format!("round={round} page={page} written={} bad={}", m.written.load(Relaxed), m.bad.load(Relaxed))
        });
        thread::sleep(Duration::from_millis(guest.params.report_ms));
    }
}

/// Keep the virtio random number generator busy; its count in the `C` lines shows whether it still answers.
pub fn use_rng(guest: &Guest) {
    let mut bytes = [0u8; 16];
    loop {
        if let Ok(n) = File::open("/dev/hwrng").and_then(|mut rng| rng.read(&mut bytes)) {
            guest.rng_bytes.fetch_add(n as u64, Relaxed);
        }
        thread::sleep(Duration::from_millis(250));
    }
}

/// Write a line to the virtio console now and then.
pub fn use_console(guest: &Guest) {
    loop {
        if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/hvc0") {
            let number = guest.hvc_lines.load(Relaxed) + 1;
            if writeln!(console, "{} line {number}", guest.short_boot_id()).is_ok() {
                guest.hvc_lines.store(number, Relaxed);
            }
        }
        thread::sleep(Duration::from_millis(1000));
    }
}

/// Transactions on the disk, one after the other. The first thing that is wrong is the end of them.
pub fn use_disk(guest: &Guest) {
    guest.output.fresh_line();
    let wrong = match transactions(guest) {
        Ok(never) => match never {},
        Err(why) => why,
    };
    loop {
        guest.error(&format!("disk {wrong}"));
        thread::sleep(Duration::from_secs(5));
    }
}

fn transactions(guest: &Guest) -> crate::storage::Result<std::convert::Infallible> {
    let fsck = crate::storage::enter(&guest.params.disk)?;
    let mut ring = crate::storage::Ring::open(crate::storage::RING)?;
    let mut work = crate::storage::Work::open()?;
    let (boot, checks, known, newest) = (&guest.boot_id, &work.checks, work.known(), ring.newest());
    guest.output.emit('B', || format!("boot={boot} fsck={fsck} {checks} ring={newest} {known}"));
    let reached = AtomicU64::new(newest);
    thread::scope(|scope| {
        let turning = scope.spawn(|| -> crate::storage::Result<std::convert::Infallible> {
            loop {
                reached.store(ring.next()?, Relaxed);
                thread::sleep(RING_PAUSE);
            }
        });
        while !turning.is_finished() {
            let number = work.next()?;
            // Read before the line has its place: whoever reads it later may trust the number.
            let ring = reached.load(Relaxed);
            guest.output.emit('T', || format!("tx={number} ring={ring}"));
        }
        turning.join().unwrap_or_else(|_| Err("the thread of the ring panicked".into()))
    })
}
