//! What replicator and VMM have measured, as it stands in their status.
//!
//! A histogram travels as its non-empty buckets with their upper bounds, so that a reader of another version, which may
//! know other bounds, still counts right.

use serde::{Deserialize, Serialize};

mod recorder;

pub use recorder::{RANGES, Recorder, SIZES, TIMES_US};

/// How often a value fell into which range, since the process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Histogram {
    /// Values recorded.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
    /// The largest.
    pub max: u64,
    /// The ranges in which there are any, ascending.
    pub buckets: Vec<Bucket>,
}

/// One range of a [`Histogram`]: above the bound before it (which need not be listed), up to its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    /// Largest value of the range; `None` for the last, which has no upper bound.
    pub up_to: Option<u64>,
    /// Values in this range alone.
    pub count: u64,
}

impl Histogram {
    /// Values up to `bound`, if `bound` is one of the recorder's bounds.
    pub fn count_up_to(&self, bound: u64) -> u64 {
        self.buckets.iter().filter(|b| b.up_to.is_some_and(|up_to| up_to <= bound)).map(|b| b.count).sum()
    }

    /// The upper bound of the range in which the value of the given rank (0.0 to 1.0) lies, at most the largest value;
    /// 0 without values.
    pub fn quantile(&self, rank: f64) -> u64 {
        let wanted = ((self.count as f64 * rank).ceil() as u64).clamp(1, self.count.max(1));
        let mut below = 0;
        for bucket in &self.buckets {
            below += bucket.count;
            if below >= wanted {
                return bucket.up_to.unwrap_or(self.max).min(self.max);
            }
        }
        self.max
    }

    /// The mean, 0 without values.
    pub fn mean(&self) -> u64 {
        self.sum / self.count.max(1)
    }
}

/// Bytes at each stage of their way, since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageBytes {
    /// (sender) Pages and device state taken from the VMM's arena: what the guest wrote.
    pub captured: u64,
    /// Pages and device state before encoding, those of first copies included.
    pub raw: u64,
    /// (sender) Of the pages in `raw`, those that were neither zero nor as the standby has them.
    pub changed: u64,
    /// (sender) What of these is left as changes, references to other pages, and whole pages.
    pub encoded: u64,
    /// (sender) The same after compression, if the link made that worth while.
    pub compressed: u64,
    /// As encoded and framed, before encryption: sent by the sender, received by the receiver.
    pub wire: u64,
    /// Of `wire`, what belongs to epochs that the standby has committed.
    pub committed: u64,
}

/// How the sender has encoded pages, since the process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Encoding {
    /// Pages that were as the standby has them.
    pub unchanged_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages sent as what changed in them.
    pub delta_pages: u64,
    /// Pages sent as a reference to another page of the same content.
    pub same_pages: u64,
    /// Pages sent whole.
    pub raw_pages: u64,
    /// Pages whose last sent content is kept, now.
    pub shadow_pages: u64,
    /// Memory for that, with its tables, now.
    pub shadow_bytes: u64,
    /// Compression of what is sent now: `none`, `lz4`, `zstd`.
    pub compression: String,
}

/// The measurements in [`crate::control::ReplicatorStatus`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Statistics {
    /// (sender) How long the vCPUs stood still for a cut, µs.
    pub pause_us: Histogram,
    /// (sender) From one cut to the next, µs.
    pub epoch_us: Histogram,
    /// Sender: from the request for the cut to the standby's acknowledgement, µs. Receiver: from the end of the epoch's
    /// arrival to its being committed and applied, µs.
    pub commit_us: Histogram,
    /// Bytes of an epoch as encoded and framed.
    pub epoch_bytes: Histogram,
    /// Bytes at each stage.
    pub bytes: StageBytes,
    /// (sender) Epochs cut and not yet acknowledged.
    pub in_flight: u64,
    /// (sender) How pages were encoded.
    pub encoding: Encoding,
}

/// The comparison of RAM between primary and standby, since the process started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VerifyStatus {
    /// (sender) A pass is under way.
    pub running: bool,
    /// (sender) Number of the newest pass, 0 if there was none.
    pub pass: u64,
    /// (sender) How much of it is done.
    pub progress_percent: u8,
    /// (sender) Passes that found no difference.
    pub passes: u64,
    /// Checks that found one. Each costs the standby's image.
    pub failures: u64,
    /// Pages compared.
    pub compared_pages: u64,
    /// (sender) Pages that the last pass did not compare, because each time they were being written.
    pub busy_pages: u64,
    /// Pages that differed.
    pub differing_pages: u64,
    /// The newest of these, at most 64: offset in RAM divided by 4096.
    pub differing: Vec<u64>,
    /// (sender) The last pass in a sentence.
    pub last: String,
    /// (sender) How long the last pass without a difference took, ms.
    pub last_ms: u64,
    /// (sender) Seconds since the last pass ended.
    pub last_ended_s: Option<u64>,
}

/// The comparison of mirrored disks with their copies, since the process started (sender).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskVerifyStatus {
    /// A pass is under way.
    pub running: bool,
    /// Number of the newest pass, 0 if there was none.
    pub pass: u64,
    /// Bytes that it has compared, of all disks.
    pub done_bytes: u64,
    /// Bytes that are to be compared.
    pub total_bytes: u64,
    /// Bytes in ranges that differ: the next time that the copies are brought into step these are copied.
    pub differing_bytes: u64,
    /// The first of these ranges, at most 64: disk, first byte, bytes.
    pub differing: Vec<(String, u64, u64)>,
    /// The last pass in a sentence.
    pub last: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_bounds_of_their_ranges_and_never_above_the_largest_value() {
        let bucket = |up_to, count| Bucket { up_to, count };
        let all = Histogram {
            count: 10,
            sum: 400,
            max: 130,
            buckets: vec![bucket(Some(10), 5), bucket(Some(100), 4), bucket(None, 1)],
        };
        assert_eq!((all.quantile(0.0), all.quantile(0.5), all.quantile(0.51)), (10, 10, 100));
        assert_eq!((all.quantile(0.9), all.quantile(1.0), all.mean()), (100, 130, 40));
        assert_eq!((all.count_up_to(10), all.count_up_to(100), all.count_up_to(9)), (5, 9, 0));
        let one = Histogram { count: 1, sum: 7, max: 7, buckets: vec![bucket(Some(10), 1)] };
        assert_eq!(one.quantile(0.99), 7);
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }
}
