//! The device at the far end of the serial line: it writes bytes that count up, and wants every record once and in order.

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
    /// The first thing that was wrong.
    pub wrong: Option<String>,
    quiet: bool,
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
        let seen = Arc::new((Mutex::new(Seen::default()), Condvar::new()));
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
        let now = Instant::now();
        let record = Record::parse(&bytes);
        let mut seen = told.lock();
        let wanted = seen.number + 1;
        match record {
            None if bytes == [0xff; RECORD] => {
                return Ok("the guest found its memory changed, its disk not as it knows it, or a byte lost or repeated on its way in".into());
            }
            None => return Ok(format!("instead of record {wanted} came {bytes:02x?}")),
            Some(record) if record.number != wanted => {
                return Ok(format!("instead of record {wanted} came record {}", record.number));
            }
            Some(record) if record.heard < seen.heard || record.heard > seen.written => {
                return Ok(format!(
                    "the guest has heard {} bytes after {} of {}",
                    record.heard, seen.heard, seen.written
                ));
            }
            Some(record) => {
                (seen.number, seen.heard) = (record.number, record.heard);
                let silence = seen.at.map_or(Duration::ZERO, |at| now - at);
                seen.silence = seen.silence.max(silence);
                seen.at = Some(now);
            }
        }
        drop(seen);
        told.1.notify_all();
    }
}
