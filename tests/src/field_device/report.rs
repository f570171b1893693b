//! What the device tells: events while it runs, a verdict at any time. Both are JSON; `demo` reads them back.

use serde::{Deserialize, Serialize};

/// One instant on both of the host's clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct At {
    /// Milliseconds since 1970.
    pub wall_ms: u64,
    /// CLOCK_MONOTONIC of the host (the same in all its namespaces), ms.
    pub mono_ms: u64,
}

/// One line of the event file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When.
    #[serde(flatten)]
    pub at: At,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The port is open (again).
    Connected {
        /// The port as it was named.
        port: String,
    },
    /// The port closed or failed; it is opened again.
    Disconnected {
        /// Why.
        why: String,
    },
    /// The first whole line was accepted.
    Started {
        /// Its number.
        line: u64,
        /// Bytes that were skipped to get there (resync only).
        skipped: u64,
    },
    /// The device begins to write, from this number on.
    Sending {
        /// Number of its first line.
        from: u64,
    },
    /// Nothing has arrived for longer than the threshold.
    Silence {
        /// Number of the last line before it.
        after_line: u64,
        /// How long already, ms.
        ms: u64,
    },
    /// The first byte after a silence.
    FirstByte {
        /// How long the silence was, ms.
        after_silence_ms: u64,
    },
    /// The first line after a silence: how far the guest's clock moved meanwhile.
    Outage(Outage),
    /// The rule was broken.
    Violation(Violation),
    /// How things are, once in a while.
    Tick {
        /// Valid lines received.
        lines: u64,
        /// Bytes received.
        bytes: u64,
        /// Number of the last line that was written whole.
        sent: u64,
        /// Number of the last line that the guest has reported.
        reported: u64,
    },
    /// The guest announced an orderly power-off.
    PowerOff,
    /// The device stopped writing and waits until the guest has reported everything.
    Draining,
}

/// A time without a byte, longer than the threshold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    /// When the last byte before it arrived.
    pub from: At,
    /// Length, ms.
    pub ms: u64,
    /// Number of the last line before it.
    pub after_line: u64,
    /// By how much the guest's monotonic clock moved between the last stamped line before and the first after, ms.
    pub guest_ms: Option<u64>,
}

/// The ways in which a line can differ from a cable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The stream does not begin at line 1.
    Start,
    /// Bytes that are not a line.
    Corrupt,
    /// Line numbers were skipped.
    Lost,
    /// A line came again, or late.
    Repeated,
    /// Another boot id.
    BootId,
    /// A clock of the guest went back.
    ClockBack,
    /// The guest found a page that does not hold what was written, or its sweep went back.
    Memory,
    /// The guest missed, repeated or could not read device lines.
    GuestInput,
    /// The guest reported something else that is wrong.
    GuestError,
    /// The guest reports a line that was never sent, or less than before.
    Reported,
    /// Lines that were sent were not reported as received in the end.
    Undelivered,
}

/// One break of the rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// Which rule.
    pub kind: Kind,
    /// A sentence.
    pub what: String,
    /// Offset in the byte stream from the guest, of the end of the line that shows it.
    pub offset: u64,
    /// Number of the last good line before it.
    pub after_line: u64,
    /// The line itself, unprintable bytes escaped.
    pub context: String,
}

/// A violation with its time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatedViolation {
    /// When it was seen.
    pub at: At,
    /// What it was.
    #[serde(flatten)]
    pub violation: Violation,
}

/// The state of the case.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// Lines came and nothing broke the rule. (`undelivered` counts only after a drain.)
    pub ok: bool,
    /// How many violations.
    pub violations: u64,
    /// The first of them, at most [`Verdict::SHOWN`].
    pub first_violations: Vec<DatedViolation>,
    /// Bytes received.
    pub bytes: u64,
    /// Valid lines received.
    pub lines: u64,
    /// Highest line number.
    pub last_line: u64,
    /// Bytes of a line that has not ended yet.
    pub pending_bytes: u64,
    /// All boot ids seen, first eight characters; one if all is well.
    pub boot_ids: Vec<String>,
    /// The whole boot id, once it was told.
    pub boot_id: String,
    /// Guest's monotonic clock: first and newest value seen, ms.
    pub guest_clock_ms: (u64, u64),
    /// Pages that the guest found bad.
    pub memory_bad: u64,
    /// Pages that the guest has verified and rewritten, and rounds through all memory.
    pub memory_pages: u64,
    /// See `memory_pages`.
    pub memory_rounds: u64,
    /// Bytes that the guest read from its virtio random number generator.
    pub rng_bytes: u64,
    /// Lines that the guest wrote to its virtio console.
    pub hvc_lines: u64,
    /// Device lines that the guest missed, got twice, could not read.
    pub guest_gaps: u64,
    /// See `guest_gaps`.
    pub guest_repeats: u64,
    /// See `guest_gaps`.
    pub guest_bad: u64,
    /// Device lines written whole.
    pub sent: u64,
    /// Number of the last one, and of the last one that the guest reported.
    pub last_sent: u64,
    /// See `last_sent`.
    pub last_reported: u64,
    /// Sent and not reported yet.
    pub undelivered: u64,
    /// The device has stopped writing and everything that was sent was reported.
    pub drained: bool,
    /// The guest announced an orderly power-off.
    pub power_off: bool,
    /// Silences longer than the threshold, oldest first.
    pub outages: Vec<Outage>,
    /// Time of the first and of the newest byte.
    pub first_byte: Option<At>,
    /// See `first_byte`.
    pub last_byte: Option<At>,
}

impl Verdict {
    /// Violations that are kept word for word.
    pub const SHOWN: usize = 50;
}
