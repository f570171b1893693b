//! The threads of a disk: each takes a request from the lane, does it, and leaves the outcome.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use understudy_disk::{Block, Error};
use vm_memory::{Bytes, GuestAddress};

use super::lane::{Job, Lane};
use crate::core::{Core, Event};
use crate::devices::GuestRam;
use crate::devices::virtio::block::{Kind, Outcome, SECTOR};

/// The same complaint is not written to the log again within this time.
const LOG_AGAIN: Duration = Duration::from_secs(30);

/// A pattern is written in pieces of about this size.
const FILL_BYTES: usize = 256 << 10;

/// What a disk's requests meet last, for status and log.
#[derive(Debug, Default)]
pub struct Complaint(Mutex<Said>);

#[derive(Debug, Default)]
struct Said {
    /// As it is now.
    now: Option<String>,
    /// In the log, and when.
    logged: Option<(String, Instant)>,
}

impl Complaint {
    /// What it is, if it still is.
    pub fn now(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now.clone()
    }

    /// It is over.
    pub fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).now = None;
    }

    fn note(&self, disk: &str, what: &str) {
        let mut complaint = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        complaint.now = Some(what.to_owned());
        // (How much waits is another number each time.)
        let same = |said: &(String, Instant)| said.0.split(':').next() == what.split(':').next();
        if !complaint.logged.as_ref().is_some_and(|said| same(said) && said.1.elapsed() < LOG_AGAIN) {
            eprintln!("disk {disk}: {what}");
            complaint.logged = Some((what.to_owned(), Instant::now()));
        }
    }
}

/// Work until the lane is stopped.
pub fn work(lane: &Lane, disk: &dyn Block, complaint: &Complaint, core: &Arc<Core>) {
    while let Some(job) = lane.next() {
        let outcome = match perform(&job, lane, disk, &core.ram.mem) {
            Ok(None) => None,
            Ok(Some(bytes)) => {
                if !matches!(job.request.kind, Kind::Read { .. }) {
                    complaint.forget();
                }
                Some(Outcome::Done(bytes))
            }
            Err(e) if e.is_temporary() => {
                complaint.note(&lane.name, &format!("{e}; the guest's request waits"));
                lane.hold(job);
                continue;
            }
            Err(Error::Superseded { theirs, .. }) => {
                core.tell(Event::Fenced(theirs));
                None
            }
            Err(e) => {
                complaint.note(&lane.name, &format!("{e}; the guest was told of an I/O error"));
                Some(Outcome::Failed)
            }
        };
        lane.finish(&job, outcome);
        core.settle();
    }
}

/// Do it; `None`: it is not wanted any more.
fn perform(job: &Job, lane: &Lane, disk: &dyn Block, ram: &GuestRam) -> Result<Option<Vec<u8>>, Error> {
    match &job.request.kind {
        Kind::Read { at, len } => {
            let mut bytes = vec![0; *len];
            disk.read_at(*at, &mut bytes)?;
            return Ok(Some(bytes));
        }
        Kind::Write { at, from, durable } => {
            let mut bytes = vec![0; from.iter().map(|(_, len)| len).sum()];
            let mut to = &mut bytes[..];
            for (addr, len) in from {
                let (now, rest) = to.split_at_mut(*len);
                ram.read_slice(now, GuestAddress(*addr))
                    .map_err(|e| Error::io("reading the guest's data", std::io::Error::other(e)))?;
                to = rest;
            }
            // A reset in the meantime gave the memory to somebody else.
            if !lane.wanted(job) {
                return Ok(None);
            }
            disk.write_at(*at, &bytes)?;
            if *durable {
                disk.flush()?;
            }
        }
        Kind::Fill { at, len, pattern } => {
            let piece = pattern.repeat((FILL_BYTES / pattern.len().max(1)).max(1));
            let (mut at, mut left) = (*at, *len);
            while left > 0 {
                let now = left.min(piece.len() as u64);
                disk.write_at(at, &piece[..now as usize])?;
                (at, left) = (at + now, left - now);
            }
        }
        Kind::Flush => disk.flush()?,
        Kind::Discard(ranges) | Kind::WriteZeroes(ranges) => {
            for range in ranges {
                disk.write_zeroes(range.sector * SECTOR, u64::from(range.sectors) * SECTOR, range.unmap)?;
            }
        }
    }
    Ok(Some(Vec::new()))
}
