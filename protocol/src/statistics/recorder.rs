//! Counting values for a [`Histogram`].
//!
//! Recording is on the way of every checkpoint and every packet, so it neither allocates nor locks: all ranges are fixed in advance, six to a decade, which
//! tells values apart that differ by two thirds or more over eight decades.

use std::time::Duration;

use super::{Bucket, Histogram};

/// Bounded ranges of a recorder; one more is above all of them.
pub const RANGES: usize = 48;

/// The upper bounds of the ranges that begin at `first`: 1, 1.5, 2, 3, 5, 7, 10, … times as much.
const fn bounds(first: u64) -> [u64; RANGES] {
    let mut bounds = [0; RANGES];
    let (mut i, mut decade) = (0, first);
    while i < RANGES {
        let tenths = match i % 6 {
            0 => 10,
            1 => 15,
            2 => 20,
            3 => 30,
            4 => 50,
            _ => 70,
        };
        bounds[i] = decade * tenths / 10;
        if i % 6 == 5 {
            decade *= 10;
        }
        i += 1;
    }
    bounds
}

/// Bounds for times: 10 µs to 700 s.
pub const TIMES_US: [u64; RANGES] = bounds(10);
/// Bounds for sizes: 100 B to 7 GB.
pub const SIZES: [u64; RANGES] = bounds(100);

/// Counts values by range.
#[derive(Debug, Clone)]
pub struct Recorder {
    bounds: &'static [u64; RANGES],
    counts: [u64; RANGES + 1],
    sum: u64,
    max: u64,
}

impl Recorder {
    /// For times in µs.
    pub const fn times() -> Self {
        Self { bounds: &TIMES_US, counts: [0; RANGES + 1], sum: 0, max: 0 }
    }

    /// For sizes in bytes.
    pub const fn sizes() -> Self {
        Self { bounds: &SIZES, counts: [0; RANGES + 1], sum: 0, max: 0 }
    }

    /// Count one value.
    pub fn record(&mut self, value: u64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += 1;
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    /// Count a time, which its recorder keeps in µs.
    pub fn time(&mut self, time: Duration) {
        self.record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// For the status.
    pub fn histogram(&self) -> Histogram {
        let up_to = self.bounds.iter().copied().map(Some).chain([None]);
        let buckets = up_to.zip(self.counts).filter(|(_, count)| *count > 0);
        Histogram {
            count: self.counts.iter().sum(),
            sum: self.sum,
            max: self.max,
            buckets: buckets.map(|(up_to, count)| Bucket { up_to, count }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_ascend_and_a_value_falls_into_the_first_range_that_holds_it() {
        assert!(TIMES_US.is_sorted_by(|a, b| a < b) && SIZES.is_sorted_by(|a, b| a < b));
        assert_eq!((TIMES_US[0], TIMES_US[1], TIMES_US[RANGES - 1]), (10, 15, 700_000_000));
        let mut recorder = Recorder::times();
        for value in [0, 10, 11, 15, 16, u64::MAX] {
            recorder.record(value);
        }
        let histogram = recorder.histogram();
        let buckets: Vec<_> = histogram.buckets.iter().map(|b| (b.up_to, b.count)).collect();
        assert_eq!(buckets, [(Some(10), 2), (Some(15), 2), (Some(20), 1), (None, 1)]);
        assert_eq!((histogram.count, histogram.sum, histogram.max), (6, u64::MAX, u64::MAX));
    }
}
