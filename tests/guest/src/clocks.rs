//! The guest's clocks, and the proof that CLOCK_MONOTONIC never goes back, on no CPU and for no thread.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// Highest time any thread has seen, and how often one saw less.
#[derive(Default)]
pub struct Clocks {
    latest_ns: AtomicU64,
    went_back: AtomicU64,
}

impl Clocks {
    /// CLOCK_MONOTONIC, ns; counts it when it is below what any thread saw before.
    pub fn monotonic_ns(&self) -> u64 {
        // Read the mark before the clock: whatever was marked by then had been read from the clock earlier.
        let mark = self.latest_ns.load(Ordering::SeqCst);
        let now = read(ClockId::Monotonic);
        if now < mark {
            self.went_back.fetch_add(1, Ordering::SeqCst);
        }
        self.latest_ns.fetch_max(now, Ordering::SeqCst);
        now
    }

    /// How often CLOCK_MONOTONIC went back.
    pub fn went_back(&self) -> u64 {
        self.went_back.load(Ordering::SeqCst)
    }

    /// CLOCK_BOOTTIME, ns.
    pub fn boottime_ns(&self) -> u64 {
        read(ClockId::Boottime)
    }

    /// CLOCK_REALTIME, ns since 1970.
    pub fn realtime_ns(&self) -> u64 {
        read(ClockId::Realtime)
    }
}

fn read(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    (time.tv_sec as u64).saturating_mul(1_000_000_000) + time.tv_nsec as u64
}
