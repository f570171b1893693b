//! The only program in the demo guest: Debian's kernel starts it as process 1 from an initramfs.
//!
//! It writes numbered lines to the serial port, checks the lines that come back, keeps rewriting and verifying memory,
//! watches its clocks and obeys the power button. Everything runs at once and for ever: process 1 must not end, so every
//! activity is a thread that is started again, with an `E` line, should it ever panic.
//!
//! ```text
//!   CPU 0: serial writer, serial reader          CPU 1: memory sweep
//!   any:   reports, power button, virtio devices, reaper (the main thread)
//! ```
//! The kernel's own messages belong on another port (`console=ttyS1`); this program's complaints about its
//! environment go there too (standard error), so that the numbered port carries nothing but lines.
#![forbid(unsafe_code)]

mod activities;
mod bench;
mod clocks;
mod output;
mod power;
mod services;
mod setup;
mod storage;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use lab_guest::line::Received;
use lab_guest::params::Params;
use rustix::process::{WaitOptions, wait};

use crate::clocks::Clocks;
use crate::output::{Output, complain, lock};

/// What the activities share.
struct Guest {
    params: Params,
    boot_id: String,
    output: Output,
    clocks: Clocks,
    received: std::sync::Mutex<Received>,
    memory: MemoryCounts,
    /// Bytes read from the virtio random number generator.
    rng_bytes: AtomicU64,
    /// Lines written to the virtio console.
    hvc_lines: AtomicU64,
}

/// The sweep's state as the reports show it.
#[derive(Default)]
struct MemoryCounts {
    round: AtomicU64,
    position: AtomicU64,
    written: AtomicU64,
    bad: AtomicU64,
}

impl Guest {
    /// The first eight characters of the boot id.
    fn short_boot_id(&self) -> &str {
        self.boot_id.get(..8).unwrap_or(&self.boot_id)
    }

    /// Something is wrong: tell the far end.
    fn error(&self, text: &str) {
        self.output.emit('E', || text.to_string());
    }

    fn received(&self) -> Received {
        lock(&self.received).clone()
    }
}

fn main() -> ExitCode {
    if std::process::id() != 1 {
        return check();
    }
    machine()
}

/// Not as process 1: the root directory is a copy of the disk; say what is in it.
fn check() -> ExitCode {
    let looked = storage::Ring::open(storage::RING).and_then(|ring| Ok((ring, storage::Work::open()?)));
    match looked {
        Ok((ring, work)) => {
            println!("{} ring={} {}", work.checks, ring.newest(), work.known());
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn machine() -> ! {
    let pid = std::process::id();
    setup::mount_kernel_file_systems();
    let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let params = Params::parse(&cmdline);
    for complaint in &params.complaints {
        complain(complaint);
    }
    setup::load_modules("/modules");
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string();

    // Without its port the program is useless, and there is nobody to tell but the console: keep trying.
    let port = loop {
        match output::open_port(&params.serial, params.baud) {
            Ok(port) => break port,
            Err(why) => complain(&format!("cannot open {}: {why}; trying again", params.serial)),
        }
        thread::sleep(Duration::from_secs(1));
    };
    let guest = Arc::new(Guest {
        output: Output::new(port),
        clocks: Clocks::default(),
        received: std::sync::Mutex::default(),
        memory: MemoryCounts::default(),
        rng_bytes: AtomicU64::new(0),
        hvc_lines: AtomicU64::new(0),
        params,
        boot_id,
    });
    complain(&format!("process {pid}, boot {}, lines on {}", guest.boot_id, guest.params.serial));

    if !guest.params.bench.is_empty() {
        activities::run_for_ever(&guest, "benchmark", None, bench::measure);
        loop {
            thread::park();
        }
    }
    if !guest.params.net.is_empty() {
        activities::run_for_ever(&guest, "services", None, services::serve);
        loop {
            thread::park();
        }
    }
    activities::run_for_ever(&guest, "memory sweep", Some(1), activities::sweep_memory);
    activities::run_for_ever(&guest, "power button", None, power::watch_buttons);
    if !guest.params.disk.is_empty() {
        activities::run_for_ever(&guest, "databases", None, activities::use_disk);
        // It waits for its own processes, and leaves none behind.
        loop {
            thread::park();
        }
    }
    activities::run_for_ever(&guest, "serial reader", Some(0), activities::read_lines);
    activities::run_for_ever(&guest, "serial writer", Some(0), activities::write_lines);
    activities::run_for_ever(&guest, "reports", None, activities::report);
    activities::run_for_ever(&guest, "random numbers", None, activities::use_rng);
    activities::run_for_ever(&guest, "virtio console", None, activities::use_console);

    reap()
}

/// Process 1's duty.
fn reap() -> ! {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => thread::sleep(Duration::from_secs(1)),
        }
    }
}
