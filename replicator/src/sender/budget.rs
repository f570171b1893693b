//! What cuts for waiting outputs may cost: one part in [`SHARE`] of the guest's time. Pure.
//!
//! An output now and then is let out at once even if one pause was long, since unused time is saved up (a little); a guest that
//! says something all the time is not stopped more than its share.

use std::time::{Duration, Instant};

/// The guest stands still for such cuts at most one part in so many of the time.
const SHARE: u32 = 10;
/// Standstill that may be saved up.
const MOST: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Debug)]
pub(super) struct Budget {
    saved: Duration,
    debt: Duration,
    at: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { saved: MOST, debt: Duration::ZERO, at: now }
    }

    /// When the next such cut may be made: now, or later.
    pub(super) fn next(&mut self, now: Instant) -> Instant {
        let earned = now.saturating_duration_since(self.at) / SHARE;
        self.at = now;
        let paid = earned.min(self.debt);
        self.debt -= paid;
        self.saved = (self.saved + earned - paid).min(MOST);
        now + self.debt * SHARE
    }

    /// Such a cut has stopped the guest for so long.
    pub(super) fn spend(&mut self, pause: Duration) {
        self.debt += pause.saturating_sub(self.saved);
        self.saved = self.saved.saturating_sub(pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_output_now_and_then_never_waits_even_after_a_long_pause() {
        let mut now = Instant::now();
        let mut budget = Budget::new(now);
        for n in 0..1000 {
            assert_eq!(budget.next(now), now);
            budget.spend(if n % 10 == 0 { 9 * MS } else { MS });
            now += 20 * MS;
        }
    }

    #[test]
    fn a_guest_that_talks_all_the_time_is_stopped_no_more_than_its_share() {
        let begin = Instant::now();
        let (mut now, mut stood) = (begin, Duration::ZERO);
        let mut budget = Budget::new(now);
        while now < begin + 10_000 * MS {
            now = now.max(budget.next(now)) + 3 * MS;
            budget.spend(3 * MS);
            stood += 3 * MS;
        }
        assert!(stood <= MOST + (now - begin) / SHARE + 3 * MS, "{stood:?}");
        assert!(stood >= (now - begin) / SHARE / 2, "{stood:?}");
    }

    #[test]
    fn what_is_saved_is_bounded() {
        let now = Instant::now();
        let mut budget = Budget::new(now);
        let later = now + Duration::from_secs(3600);
        assert_eq!(budget.next(later), later);
        budget.spend(MOST + MS);
        assert_eq!(budget.next(later), later + SHARE * MS);
    }
}
