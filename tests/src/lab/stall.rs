//! Whether the whole machine stood still: both nodes, their clocks' readers, everything.
//!
//! The lab VM's emulator does that once in some hours: its kernel then reports a soft lockup, corosync that it was not scheduled, and no
//! process of any node ran for minutes. What a test waited for meanwhile says nothing about the cluster; what must never happen is looked
//! for all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(250);

/// Watches until it is dropped.
pub struct StallWatch {
    longest_ms: Arc<AtomicU64>,
    total_ms: Arc<AtomicU64>,
    end: Arc<AtomicBool>,
}

/// Shorter than this it was busy.
const STANDSTILL_MS: u64 = 5_000;

impl StallWatch {
    /// A standstill is known so long after its end.
    pub const LATE: Duration = Duration::from_millis(600);

    /// Begin.
    pub fn start() -> Self {
        let (longest_ms, end) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let total_ms = Arc::new(AtomicU64::new(0));
        let (longest, total, ended) = (longest_ms.clone(), total_ms.clone(), end.clone());
        thread::spawn(move || {
            let mut last = Instant::now();
            while !ended.load(Ordering::Relaxed) {
                thread::sleep(TICK);
                let still = beyond(last.elapsed());
                longest.fetch_max(still, Ordering::Relaxed);
                if still >= STANDSTILL_MS {
                    total.fetch_add(still, Ordering::Relaxed);
                }
                last = Instant::now();
            }
        });
        Self { longest_ms, total_ms, end }
    }

    /// All standstills together, since the beginning.
    pub fn total(&self) -> Duration {
        Duration::from_millis(self.total_ms.load(Ordering::Relaxed))
    }

    /// The longest time since the last call that nothing ran.
    pub fn take_longest(&self) -> Duration {
        Duration::from_millis(self.longest_ms.swap(0, Ordering::Relaxed))
    }
}

impl Drop for StallWatch {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn beyond(tick: Duration) -> u64 {
    u64::try_from(tick.saturating_sub(TICK).as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_goes_beyond_a_tick_is_a_standstill() {
        assert_eq!(beyond(TICK), 0);
        assert_eq!(beyond(Duration::from_millis(100)), 0);
        assert_eq!(beyond(TICK + Duration::from_secs(218)), 218_000);
    }

    #[test]
    fn a_standstill_is_told_once() {
        let watch = StallWatch::start();
        watch.longest_ms.fetch_max(218_000, Ordering::Relaxed);
        assert!(watch.take_longest() >= Duration::from_secs(218));
        assert!(watch.take_longest() < Duration::from_secs(218));
    }
}
