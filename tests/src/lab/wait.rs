//! Waiting for a condition, with a bound.
//!
//! Time in which the whole machine stood still ([`super::stall`]) does not count: nothing could happen in it.

use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::stall::StallWatch;

/// Since the first wait.
static STOOD_STILL: LazyLock<StallWatch> = LazyLock::new(StallWatch::start);

/// Ask `condition` until it gives a value; fail with `what` after `bound`. A condition's own error is kept for the
/// message and asked again: a cluster in the middle of a takeover refuses many a question.
pub fn wait_for<T>(what: &str, bound: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (began, stood_still) = (Instant::now(), STOOD_STILL.total());
    let over = || began.elapsed() >= bound + STOOD_STILL.total().saturating_sub(stood_still);
    let mut pause = Duration::from_millis(20);
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => String::new(),
            Err(e) => format!(" (last answer: {e:#})"),
        };
        if over() && !bound.is_zero() {
            // Whoever just woke up with the whole machine: a standstill is known a moment later.
            thread::sleep(StallWatch::LATE);
        }
        if over() {
            bail!("{what}: not within {} s{last}", bound.as_secs());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

/// [`wait_for`] for a plain yes or no.
pub fn wait_until(what: &str, bound: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, bound, || Ok(condition()?.then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_condition_or_says_what_it_waited_for() {
        let mut left = 3;
        let counted = wait_for("counting", Duration::from_secs(5), || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(counted.unwrap(), "done");
        let error = wait_until("the moon", Duration::ZERO, || bail!("cloudy")).unwrap_err().to_string();
        assert_eq!(error, "the moon: not within 0 s (last answer: cloudy)");
    }
}
