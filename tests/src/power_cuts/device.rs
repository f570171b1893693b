//! The device at the far end of the serial line: it writes bytes that count up, and wants every record once and in order.
//!
//! A machine that both hosts' power took away boots again, if that was announced ([`Device::expect_boot`]). It counts on from the newest number on its disk, and
//! that must not be older than what was seen here.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::guest::{RECORD, Record};

/// A byte for the guest so often.
const BYTE_EVERY: Duration = Duration::from_millis(4);
/// It writes on only while fewer bytes than this are not confirmed: a guest that is away for long is not drowned.
const UNCONFIRMED: u32 = 200;

/// What the guest says when something is wrong.
const COMPLAINT: [u8; RECORD] = [0xff; RECORD];

/// What it has seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Newest record.
    pub number: u32,
    /// Bytes that it wrote, and that the guest says it has heard.
    pub written: u32,
    pub heard: u32,
    /// When the newest record came.
    pub at: Option<Instant>,
    /// Longest time without a record since it was last taken.
    pub silence: Duration,
    /// Boots after the first.
    pub boots: u32,
    /// Most that the disk knew at a boot and nobody had seen.
    pub unseen: u32,
    /// The first thing that was wrong.
    pub wrong: Option<String>,
    quiet: bool,
    may_boot: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Device {
    seen: Arc<(Mutex<Seen>, Condvar)>,
    line: TcpStream,
}

impl Device {
    /// Talk on this line.
    pub fn start(line: TcpStream) -> Result<Self> {
        let seen = Arc::new((Mutex::new(Seen { may_boot: true, quiet: true, ..Seen::default() }), Condvar::new()));
        let (mut from, mut to) = (line.try_clone()?, line.try_clone()?);
        let told = seen.clone();
        thread::spawn(move || {
            let why = listen(&mut from, &told).unwrap_or_else(|e| format!("{e:#}"));
            told.lock().wrong.get_or_insert(why);
            told.1.notify_all();
        });
        let telling = seen.clone();
        thread::spawn(move || {
            loop {
                let mut seen = telling.lock();
                if seen.wrong.is_some() {
                    return;
                }
                if !seen.quiet && seen.written - seen.heard < UNCONFIRMED {
                    let byte = seen.written as u8;
                    seen.written += 1;
                    drop(seen);
                    if to.write_all(&[byte]).is_err() {
                        return;
                    }
                } else {
                    drop(seen);
                }
                thread::sleep(BYTE_EVERY);
            }
        });
        Ok(Self { seen, line })
    }

    /// What it has seen by now.
    pub fn seen(&self) -> Seen {
        self.seen.lock().clone()
    }

    /// The longest silence since the last call.
    pub fn take_silence(&self) -> Duration {
        std::mem::take(&mut self.seen.lock().silence)
    }

    /// Write no more.
    pub fn be_quiet(&self) {
        self.seen.lock().quiet = true;
    }

    /// The machine will lose its memory: the next thing it says may be that it booted. Nothing may be under way to it; the device is
    /// quiet until then.
    pub fn expect_boot(&self, bound: Duration) -> Result<()> {
        self.be_quiet();
        self.wait("the guest has heard everything", bound, |seen| seen.heard == seen.written)?;
        self.seen.lock().may_boot = true;
        Ok(())
    }

    /// Wait until `holds`; fails at once when anything is wrong.
    pub fn wait(&self, what: &str, bound: Duration, mut holds: impl FnMut(&Seen) -> bool) -> Result<()> {
        let end = Instant::now() + bound;
        let mut seen = self.seen.lock();
        loop {
            if let Some(wrong) = &seen.wrong {
                bail!("{wrong}");
            }
            if holds(&seen) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what}: not within {} s ({seen:?})", bound.as_secs());
            }
            seen = self.seen.1.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.line.shutdown(Shutdown::Both);
    }
}

trait Locked {
    fn lock(&self) -> MutexGuard<'_, Seen>;
}

impl Locked for (Mutex<Seen>, Condvar) {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Until something is wrong: that is what it returns.
fn listen(from: &mut TcpStream, told: &(Mutex<Seen>, Condvar)) -> Result<String> {
    loop {
        let mut bytes = [0; RECORD];
        from.read_exact(&mut bytes).context("the line ended")?;
        let mut record = Record::parse(&bytes);
        // The machine may have died in the middle of a record, and boots then in the middle of it.
        for _ in 1..RECORD {
            if record.is_some() || bytes == COMPLAINT || !told.lock().may_boot {
                break;
            }
            bytes.rotate_left(1);
            from.read_exact(&mut bytes[RECORD - 1..]).context("the line ended")?;
            record = Record::parse(&bytes).filter(|record| record.boot);
        }
        let mut seen = told.lock();
        if let Some(wrong) = seen.judge(&bytes, record) {
            return Ok(wrong);
        }
        let now = Instant::now();
        let silence = seen.at.map_or(Duration::ZERO, |at| now - at);
        seen.silence = seen.silence.max(silence);
        seen.at = Some(now);
        drop(seen);
        told.1.notify_all();
    }
}

impl Seen {
    /// What is wrong with this record, or note it.
    fn judge(&mut self, bytes: &[u8; RECORD], record: Option<Record>) -> Option<String> {
        let wanted = self.number + 1;
        let Some(record) = record else {
            return Some(if *bytes == COMPLAINT {
                "the guest found its memory changed, its disk not as it knows it, or a byte lost or repeated on its way in".into()
            } else {
                format!("instead of record {wanted} came {bytes:02x?}")
            });
        };
        if record.boot {
            if !self.may_boot {
                return Some(format!("after record {} the machine booted again", self.number));
            }
            if record.number < self.number {
                let (seen, known) = (self.number, record.number);
                return Some(format!("record {seen} was seen, and after the boot the disk knows only {known}"));
            }
            self.boots += u32::from(self.at.is_some());
            self.unseen = self.unseen.max(record.number - self.number);
            (self.number, self.written, self.heard) = (record.number, 0, 0);
            (self.may_boot, self.quiet) = (false, false);
        } else if record.number != wanted {
            return Some(format!("instead of record {wanted} came record {}", record.number));
        } else if record.heard < self.heard || record.heard > self.written {
            return Some(format!(
                "the guest has heard {} bytes after {} of {}",
                record.heard, self.heard, self.written
            ));
        } else {
            (self.number, self.heard) = (record.number, record.heard);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(number: u32, may_boot: bool) -> Seen {
        Seen { number, written: 9, heard: 5, may_boot, at: Some(Instant::now()), ..Seen::default() }
    }

    fn boot(number: u32) -> Option<Record> {
        Some(Record { number, heard: 0, boot: true })
    }

    #[test]
    fn a_machine_that_boots_knows_what_was_seen_and_maybe_more() {
        for (knows, unseen) in [(7, 0), (9, 2)] {
            let mut seen = seen(7, true);
            assert_eq!(seen.judge(&[0; RECORD], boot(knows)), None);
            assert_eq!((seen.number, seen.written, seen.heard, seen.boots, seen.unseen), (knows, 0, 0, 1, unseen));
            assert!(seen.judge(&[0; RECORD], boot(knows)).is_some(), "it may boot once");
        }
    }

    #[test]
    fn a_record_that_was_seen_and_is_not_on_the_disk_after_a_boot_is_lost() {
        assert!(seen(7, true).judge(&[0; RECORD], boot(6)).is_some());
    }

    #[test]
    fn a_boot_that_nobody_expects_is_wrong() {
        assert!(seen(7, false).judge(&[0; RECORD], boot(7)).is_some());
    }

    #[test]
    fn a_boot_in_the_middle_of_a_record_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut line = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let device = Device::start(listener.accept().unwrap().0).unwrap();
        let record = |number: u32, check: u32| [number, 0, check].map(u32::to_le_bytes).concat();
        let first = 1u32.wrapping_mul(0x61c8_8647);
        line.write_all(&record(0, !0)).unwrap();
        line.write_all(&record(1, first)).unwrap();
        device.wait("a record", Duration::from_secs(10), |seen| seen.number == 1).unwrap();
        device.seen.lock().may_boot = true;
        line.write_all(&record(2, first.wrapping_mul(2))[..5]).unwrap();
        line.write_all(&record(3, !first.wrapping_mul(3))).unwrap();
        line.write_all(&record(4, first.wrapping_mul(4))).unwrap();
        device.wait("the record after the boot", Duration::from_secs(10), |seen| seen.number == 4).unwrap();
        assert_eq!((device.seen().boots, device.seen().unseen), (1, 2));
    }
}
