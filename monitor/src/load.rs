//! How busy this node's processors are, for whoever places machines: the node attribute [`ATTRIBUTE`].
//!
//! Each change of an attribute makes Pacemaker think its whole plan over. So what is published is the mean of a minute, and only when it has moved by [`STEP`].

use std::collections::VecDeque;

/// A node's attribute: how busy its processors were in the last minute, percent of all of them, a whole number from 0 to 100. Transient.
pub const ATTRIBUTE: &str = "understudy-load";
/// Over what is averaged, ms.
const WINDOW: u64 = 60_000;
/// Shorter than this nothing is said of it, ms.
const LEAST: u64 = 10_000;
/// What is published again, percent.
const STEP: u32 = 5;

/// Time of all processors since the boot, in whatever unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    busy: u64,
    all: u64,
}

impl Times {
    /// From the text of `/proc/stat` (proc_stat(5)): its first line is `cpu user nice system idle iowait irq softirq steal …`; guests' time is part of `user`.
    pub fn parse(stat: &str) -> Option<Self> {
        let mut words = stat.lines().next()?.split_ascii_whitespace();
        if words.next()? != "cpu" {
            return None;
        }
        let times = words.take(8).map(str::parse).collect::<Result<Vec<u64>, _>>().ok()?;
        let idle = times.get(3)?.saturating_add(times.get(4).copied().unwrap_or(0));
        let all = times.iter().copied().fold(0, u64::saturating_add);
        Some(Self { busy: all.saturating_sub(idle), all })
    }
}

/// What was seen in the last minute, and what was published.
#[derive(Debug, Default)]
pub struct Load {
    seen: VecDeque<(u64, Times)>,
    told: Option<u32>,
}

impl Load {
    /// The processors as they are at `now` (ms of any clock that does not go back). Percent, if that is to be published.
    pub fn look(&mut self, now: u64, times: Times) -> Option<u32> {
        self.seen.push_back((now, times));
        // The newest that is as old as the window stays: from it is counted.
        while self.seen.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= WINDOW) {
            self.seen.pop_front();
        }
        let (since, before) = *self.seen.front()?;
        let all = times.all.saturating_sub(before.all);
        if now.saturating_sub(since) < LEAST || all == 0 {
            return None;
        }
        let percent = times.busy.saturating_sub(before.busy).min(all) as f64 * 100.0 / all as f64;
        let percent = percent.round() as u32;
        self.told.is_none_or(|told| told.abs_diff(percent) >= STEP).then_some(percent)
    }

    /// It was published.
    pub fn told(&mut self, percent: u32) {
        self.told = Some(percent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_and_stolen_time_are_busy_and_waiting_for_disks_is_not() {
        let stat = "cpu  100 10 50 700 40 5 5 90 80 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        assert_eq!(Times::parse(stat), Some(Times { busy: 260, all: 1000 }));
        for bad in ["", "cpu", "cpu0 1 2 3 4", "cpu a b c d", "intr 1 2 3 4"] {
            assert_eq!(Times::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn it_is_a_minute_s_mean_and_said_again_only_when_it_has_moved() {
        let mut load = Load::default();
        let (mut busy, mut all, mut said) = (0, 0, Vec::new());
        // Two minutes of 20 %, then 100 %.
        for second in 0..300u64 {
            all += 200;
            busy += if second < 120 { 40 } else { 200 };
            if let Some(percent) = load.look(second * 1000, Times { busy, all }) {
                load.told(percent);
                said.push((second, percent));
            }
        }
        assert_eq!(said.first(), Some(&(10, 20)));
        assert!(said.windows(2).all(|pair| pair[0].1.abs_diff(pair[1].1) >= STEP), "{said:?}");
        assert!(said.last().unwrap().1 >= 96, "{said:?}");
        // What could not be published comes again.
        let mut lost = Load::default();
        lost.look(0, Times { busy: 0, all: 0 });
        assert_eq!(lost.look(10_000, Times { busy: 50, all: 100 }), Some(50));
        assert_eq!(lost.look(11_000, Times { busy: 55, all: 110 }), Some(50));
    }
}
