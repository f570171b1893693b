//! Waiting for a condition, with a bound.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Ask `condition` until it gives a value; fail with `what` after `bound`. A condition's own error is kept for the
/// message and asked again: a cluster in the middle of a takeover refuses many a question.
pub fn wait_for<T>(what: &str, bound: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + bound;
    let mut pause = Duration::from_millis(20);
    loop {
        let last = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => String::new(),
            Err(e) => format!(" (last answer: {e:#})"),
        };
        if Instant::now() >= deadline {
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
