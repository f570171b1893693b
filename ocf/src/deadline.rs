//! Deadlines: an action ends by itself before the cluster kills it.
//!
//! Pacemaker enforces an operation's timeout from outside, with SIGTERM and then SIGKILL to the agent. An agent that is
//! killed has not cleaned up, and for `stop` the node is fenced. So the agent's own deadline lies a margin before the cluster's.

use std::thread;
use std::time::{Duration, Instant};

/// A point in time by which something must be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    end: Instant,
}

impl Deadline {
    /// `span` from now.
    pub fn after(span: Duration) -> Self {
        Self { end: Instant::now() + span }
    }

    /// The agent's deadline for an operation that the cluster allows `timeout` for: a tenth earlier, at least 0.5 s and at
    /// most 5 s, but never less than half of the timeout.
    pub fn for_operation(timeout: Duration) -> Self {
        let margin = (timeout / 10).clamp(Duration::from_millis(500), Duration::from_secs(5));
        Self::after(timeout.saturating_sub(margin).max(timeout / 2))
    }

    /// Time left; zero when it has passed.
    pub fn remaining(&self) -> Duration {
        self.end.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// The earlier one of this deadline and `span` from now: one step's share.
    #[must_use]
    pub fn within(&self, span: Duration) -> Self {
        Self { end: self.end.min(Instant::now() + span) }
    }

    /// A deadline that leaves `reserve` of this one for what comes after.
    #[must_use]
    pub fn leaving(&self, reserve: Duration) -> Self {
        let now = Instant::now();
        Self { end: self.end.checked_sub(reserve).unwrap_or(now).max(now.min(self.end)) }
    }

    /// Ask `condition` again and again, at least once, until it gives a value or the deadline passes. Waits 2 ms at first and up to
    /// 50 ms between questions.
    pub fn wait_for<T>(&self, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
        let mut pause = Duration::from_millis(2);
        loop {
            if let Some(value) = condition() {
                return Some(value);
            }
            let left = self.remaining();
            if left.is_zero() {
                return None;
            }
            thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_deadline_lies_before_the_clusters() {
        for (timeout, at_most) in [(1000, 500), (5000, 4500), (20_000, 18_000), (120_000, 115_000)] {
            let left = Deadline::for_operation(Duration::from_millis(timeout)).remaining();
            assert!(left <= Duration::from_millis(at_most), "{timeout}: {left:?}");
            assert!(left > Duration::from_millis(at_most - 400), "{timeout}: {left:?}");
        }
    }

    #[test]
    fn a_condition_is_asked_once_even_when_the_time_is_over() {
        assert_eq!(Deadline::after(Duration::ZERO).wait_for(|| Some(7)), Some(7));
        assert_eq!(Deadline::after(Duration::ZERO).wait_for(|| None::<()>), None);
    }

    #[test]
    fn a_reserve_that_is_larger_than_the_rest_leaves_nothing() {
        assert!(Deadline::after(Duration::from_secs(1)).leaving(Duration::from_secs(5)).passed());
        assert!(!Deadline::after(Duration::from_secs(10)).leaving(Duration::from_secs(5)).passed());
    }
}
