//! Whether a batch is compressed: decided by what it costs to send a byte and what it costs to save one.
//!
//! The sender measures how long the stream takes each byte (`s`, ns: encryption, and waiting for a link that is full) and
//! for each method what compressing a byte takes (`c`, ns) and leaves (`r`, 0 to 1). Encoding and sending follow each other, so
//! a plain byte costs `c + r·s` in all, with `c = 0, r = 1` for none; the cheapest method wins. A fast link makes `s` small,
//! and nothing is compressed; a full one makes it large.
//!
//! [`Chooser`] holds the figures and decides. It has no clock and does not compress: the writer tells it what happened.

use std::fmt;

/// How a batch's body is compressed. The numbers are on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Method {
    /// Not at all.
    #[default]
    Plain = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame, level 1.
    Zstd = 2,
}

impl Method {
    /// Those that compress.
    pub const COMPRESSING: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// The method of a number on the wire.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Plain),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Its name in the status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Sends of fewer bytes say more of the fixed cost of a call than of the link.
const TELLING: usize = 16 << 10;
/// Share of a new measurement in the running figure.
const WEIGHT: f64 = 0.125;
/// A method must be cheaper by this factor to replace the one in use...
const MARGIN: f64 = 0.85;
/// ...which is used for at least so many batches, so that a figure from before the change does not decide.
const DWELL: u32 = 8;
/// A method that could win is tried on a sample once in so many batches.
const PROBE_EVERY: u32 = 64;

#[derive(Debug, Clone, Copy)]
struct Estimate {
    ns_per_byte: f64,
    ratio: f64,
    /// The first measurement replaces the assumption.
    measured: bool,
    since_probe: u32,
}

impl Estimate {
    fn assumed(ns_per_byte: f64, ratio: f64) -> Self {
        Self { ns_per_byte, ratio, measured: false, since_probe: PROBE_EVERY }
    }

    fn cost(&self, send: f64) -> f64 {
        self.ns_per_byte + self.ratio * send
    }
}

/// The state machine.
#[derive(Clone)]
pub struct Chooser {
    active: Method,
    used: u32,
    send: Option<f64>,
    estimates: [Estimate; 2],
}

impl Default for Chooser {
    fn default() -> Self {
        // Hopeful, so that each method is tried as soon as it could pay; the first trial puts what it measured in their place.
        let estimates = [Estimate::assumed(0.5, 0.5), Estimate::assumed(1.5, 0.35)];
        Self { active: Method::Plain, used: 0, send: None, estimates }
    }
}

impl fmt::Debug for Chooser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let send = self.send.unwrap_or(0.0);
        write!(f, "{} (sending {send:.2} ns/B", self.active.name())?;
        for (method, e) in Method::COMPRESSING.iter().zip(&self.estimates) {
            write!(f, ", {} {:.2} ns/B to {:.2}", method.name(), e.ns_per_byte, e.ratio)?;
        }
        write!(f, ")")
    }
}

impl Chooser {
    /// The method for the next batch.
    pub fn method(&self) -> Method {
        self.active
    }

    /// What sending a byte takes, ns, once that is known.
    pub fn send_ns_per_byte(&self) -> Option<f64> {
        self.send
    }

    /// `bytes` were given to the stream, which took `ns`.
    pub fn sent(&mut self, bytes: usize, ns: u64) {
        if bytes >= TELLING {
            let now = ns as f64 / bytes as f64;
            self.send = Some(self.send.map_or(now, |send| send + WEIGHT * (now - send)));
        }
        self.used = self.used.saturating_add(1);
        self.decide();
    }

    /// A method that should be tried on a sample of the next batch, because its figures are old and it might win.
    pub fn probe(&mut self) -> Option<Method> {
        let send = self.send?;
        for (method, estimate) in Method::COMPRESSING.into_iter().zip(&mut self.estimates) {
            estimate.since_probe = estimate.since_probe.saturating_add(1);
            if method != self.active && estimate.since_probe > PROBE_EVERY && estimate.ns_per_byte < send {
                estimate.since_probe = 0;
                return Some(method);
            }
        }
        None
    }

    /// `method` made `compressed` bytes of `plain` in `ns`.
    pub fn compressed(&mut self, method: Method, plain: usize, compressed: usize, ns: u64) {
        let Some(estimate) = (match method {
            Method::Plain => None,
            Method::Lz4 => self.estimates.get_mut(0),
            Method::Zstd => self.estimates.get_mut(1),
        }) else {
            return;
        };
        let plain = plain.max(1) as f64;
        let (cost, ratio) = (ns as f64 / plain, (compressed as f64 / plain).min(1.0));
        if estimate.measured {
            estimate.ns_per_byte += WEIGHT * (cost - estimate.ns_per_byte);
            estimate.ratio += WEIGHT * (ratio - estimate.ratio);
        } else {
            *estimate = Estimate { ns_per_byte: cost, ratio, measured: true, since_probe: 0 };
        }
    }

    fn cost(&self, method: Method, send: f64) -> f64 {
        match method {
            Method::Plain => send,
            Method::Lz4 => self.estimates[0].cost(send),
            Method::Zstd => self.estimates[1].cost(send),
        }
    }

    fn decide(&mut self) {
        let Some(send) = self.send else { return };
        if self.used < DWELL {
            return;
        }
        // Only what has been measured may win.
        let known = Method::COMPRESSING.iter().zip(&self.estimates).filter(|(_, e)| e.measured).map(|(m, _)| *m);
        let costs = std::iter::once(Method::Plain).chain(known).map(|m| (m, self.cost(m, send)));
        let best = costs.min_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((best, cost)) = best
            && best != self.active
            && cost < MARGIN * self.cost(self.active, send)
        {
            self.active = best;
            self.used = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of `send` ns per byte and data on which LZ4 and zstd do this, for `batches` of 100 KB.
    fn run(chooser: &mut Chooser, send: f64, lz4: (f64, f64), zstd: (f64, f64), batches: u32) -> Method {
        const BATCH: usize = 100_000;
        let figures = |method| if method == Method::Lz4 { lz4 } else { zstd };
        for _ in 0..batches {
            if let Some(method) = chooser.probe() {
                let (ns, ratio) = figures(method);
                chooser.compressed(method, 16_384, (16_384.0 * ratio) as usize, (16_384.0 * ns) as u64);
            }
            let wire = match chooser.method() {
                Method::Plain => BATCH,
                method => {
                    let (ns, ratio) = figures(method);
                    let out = (BATCH as f64 * ratio) as usize;
                    chooser.compressed(method, BATCH, out, (BATCH as f64 * ns) as u64);
                    out
                }
            };
            chooser.sent(wire, (wire as f64 * send) as u64);
        }
        chooser.method()
    }

    const LZ4: (f64, f64) = (1.2, 0.6);
    const ZSTD: (f64, f64) = (3.0, 0.4);

    #[test]
    fn a_link_that_is_faster_than_any_compression_gets_plain_batches() {
        assert_eq!(run(&mut Chooser::default(), 0.4, LZ4, ZSTD, 1000), Method::Plain);
    }

    #[test]
    fn a_full_gigabit_link_gets_lz4_and_a_slow_one_zstd() {
        assert_eq!(run(&mut Chooser::default(), 8.0, LZ4, ZSTD, 1000), Method::Lz4);
        assert_eq!(run(&mut Chooser::default(), 80.0, LZ4, ZSTD, 1000), Method::Zstd);
    }

    #[test]
    fn nothing_is_compressed_that_does_not_shrink() {
        assert_eq!(run(&mut Chooser::default(), 8.0, (0.3, 1.0), (0.5, 1.0), 1000), Method::Plain);
    }

    #[test]
    fn it_follows_a_link_that_changes_and_content_that_changes() {
        let mut chooser = Chooser::default();
        assert_eq!(run(&mut chooser, 0.4, LZ4, ZSTD, 100), Method::Plain);
        assert_eq!(run(&mut chooser, 20.0, LZ4, ZSTD, 300), Method::Zstd);
        assert_eq!(run(&mut chooser, 20.0, (0.3, 1.0), (6.0, 1.0), 300), Method::Plain, "random pages now");
        assert_eq!(run(&mut chooser, 20.0, LZ4, ZSTD, 3000), Method::Zstd, "and text again");
        assert_eq!(run(&mut chooser, 0.4, LZ4, ZSTD, 300), Method::Plain);
    }

    #[test]
    fn it_does_not_flap_between_methods_that_cost_nearly_the_same() {
        let mut chooser = Chooser::default();
        run(&mut chooser, 8.0, LZ4, ZSTD, 200);
        let mut changes = 0;
        for round in 0..200 {
            let before = chooser.method();
            // LZ4 and zstd break even at 9 ns per byte.
            let send = if round % 2 == 0 { 8.7 } else { 9.3 };
            changes += u32::from(run(&mut chooser, send, LZ4, ZSTD, 10) != before);
        }
        assert!(changes <= 1, "{changes} changes");
    }

    #[test]
    fn small_sends_say_nothing_of_the_link() {
        let mut chooser = Chooser::default();
        (0..1000).for_each(|_| chooser.sent(500, 50_000));
        assert_eq!((chooser.send_ns_per_byte(), chooser.probe()), (None, None));
    }
}
