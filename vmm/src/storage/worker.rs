//! The threads of a disk: each takes a request from the lane, does it, and leaves the outcome. What the storage can begin by itself (io_uring, iSCSI) is
//! only begun here; its outcome is left by whoever hears of it, and the thread takes the next request.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use understudy_disk::{Block, Buffer, Error, Op};
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

/// What a request needs until its outcome is handed in; those that end later take it along.
#[derive(Clone)]
pub struct Bench {
    /// Where requests come from.
    pub lane: Arc<Lane>,
    /// What they are for.
    pub disk: Arc<dyn Block>,
    /// What they meet.
    pub complaint: Arc<Complaint>,
    /// Where outcomes go.
    pub core: Arc<Core>,
}

impl Bench {
    /// Work until the lane is stopped.
    pub fn work(&self) {
        loop {
            // What was begun goes to the storage together, before this thread waits for anything.
            let next = self.lane.try_next().or_else(|| {
                self.disk.submit();
                self.lane.next()
            });
            let Some(job) = next else { return };
            if let Some(job) = self.begin(job) {
                self.disk.submit();
                let result = perform(&job, &self.lane, &*self.disk, &self.core.ram.mem);
                self.conclude(job, result);
            }
        }
    }

    /// Begin a plain read or write, if the storage can: then this thread is free for the next one.
    fn begin(&self, job: Job) -> Option<Job> {
        let op = match &job.request.kind {
            Kind::Read { at, len } if self.disk.begins(false) => Op::Read { at: *at, to: Buffer::new(*len) },
            Kind::Write { at, from, durable: false } if self.disk.begins(true) => {
                let mut data = Buffer::new(from.iter().map(|(_, len)| len).sum());
                if gather(&self.core.ram.mem, from, &mut data).is_err() || !self.lane.wanted(&job) {
                    return Some(job);
                }
                Op::Write { at: *at, from: data }
            }
            _ => return Some(job),
        };
        // Given back with what was not begun, so that the job is there whoever does it.
        let job = Arc::new(Mutex::new(Some(job)));
        let (theirs, bench) = (job.clone(), self.clone());
        let ended = Box::new(move |result: Result<Buffer, Error>| {
            let Some(job) = theirs.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
            let read = matches!(job.request.kind, Kind::Read { .. });
            bench.conclude(job, result.map(|bytes| Some(if read { bytes.to_vec() } else { Vec::new() })));
        });
        let _given_back = self.disk.begin(op, ended)?;
        job.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn conclude(&self, job: Job, result: Result<Option<Vec<u8>>, Error>) {
        let outcome = match result {
            Ok(None) => None,
            Ok(Some(bytes)) => {
                if !matches!(job.request.kind, Kind::Read { .. }) {
                    self.complaint.forget();
                }
                Some(Outcome::Done(bytes))
            }
            Err(e) if e.is_temporary() => {
                self.complaint.note(&self.lane.name, &format!("{e}; the guest's request waits"));
                self.lane.hold(job);
                return;
            }
            Err(Error::Superseded { theirs, .. }) => {
                self.core.tell(Event::Fenced(theirs));
                None
            }
            Err(e) => {
                self.complaint.note(&self.lane.name, &format!("{e}; the guest was told of an I/O error"));
                Some(Outcome::Failed)
            }
        };
        self.lane.finish(&job, outcome);
        self.core.settle();
    }
}

fn gather(ram: &GuestRam, from: &[(u64, usize)], mut to: &mut [u8]) -> Result<(), Error> {
    for (addr, len) in from {
        let (now, rest) = to.split_at_mut(*len);
        ram.read_slice(now, GuestAddress(*addr))
            .map_err(|e| Error::io("reading the guest's data", std::io::Error::other(e)))?;
        to = rest;
    }
    Ok(())
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
            let mut bytes = Buffer::new(from.iter().map(|(_, len)| len).sum());
            gather(ram, from, &mut bytes)?;
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
