//! The threads of a disk: each takes a request from the lane, does it, and leaves the outcome. What the storage can begin by itself (io_uring, iSCSI) is
//! only begun here; its outcome is left by whoever hears of it, and the thread takes the next request.
//!
//! To hand an outcome in means to take the device lock, and perhaps an interrupt: as much work as a request that the host's memory answers. So the outcomes
//! of several such requests are handed in together; but nothing waits for somebody who waits for storage.

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

/// What was done and the device was not told of.
#[derive(Default)]
struct Untold {
    /// Of the first.
    since: Option<Instant>,
    /// How long it took to tell, last time.
    telling: Duration,
}

/// Untold outcomes wait so many times as long as it takes to tell of them,
const PATIENCE: u32 = 4;
/// and no shorter and no longer than this.
const PATIENCE_BOUNDS: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(1));

impl Untold {
    fn tell(&mut self, core: &Core) {
        if self.since.take().is_some() {
            let begun = Instant::now();
            core.settle();
            self.telling = begun.elapsed();
        }
    }

    /// One more; tell if the first has waited long enough.
    fn add(&mut self, core: &Core) {
        let since = *self.since.get_or_insert_with(Instant::now);
        let (least, most) = PATIENCE_BOUNDS;
        if since.elapsed() >= (self.telling * PATIENCE).clamp(least, most) {
            self.tell(core);
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
    /// The disk says when the device is to be told of what was begun and has ended.
    batched: bool,
}

impl Bench {
    /// Of a disk that was just opened.
    pub fn new(lane: Arc<Lane>, disk: Arc<dyn Block>, complaint: Arc<Complaint>, core: Arc<Core>) -> Self {
        let theirs = core.clone();
        let batched = disk.after_ended(Arc::new(move || theirs.settle()));
        Self { lane, disk, complaint, core, batched }
    }

    /// Work until the lane is stopped.
    pub fn work(&self) {
        let mut untold = Untold::default();
        loop {
            // What was begun goes to the storage together, before this thread waits for anything.
            let next = self.lane.try_next().or_else(|| {
                self.disk.submit();
                untold.tell(&self.core);
                self.lane.next()
            });
            let Some(job) = next else { return };
            let Some(job) = self.begin(job) else { continue };
            self.disk.submit();
            let result = self.at_once(&job).unwrap_or_else(|| {
                untold.tell(&self.core);
                self.lane.share();
                perform(&job, &self.lane, &*self.disk, &self.core.ram.mem)
            });
            if self.conclude(&job, result) {
                untold.add(&self.core);
            } else {
                self.lane.hold(job);
            }
        }
    }

    /// Do it, if nothing need be waited for.
    fn at_once(&self, job: &Job) -> Option<Result<Option<Vec<u8>>, Error>> {
        match &job.request.kind {
            Kind::Read { at, len } if self.disk.quick(false) => {
                let mut bytes = vec![0; *len];
                self.disk.read_now(*at, &mut bytes).then_some(Ok(Some(bytes)))
            }
            Kind::Write { durable: false, .. } if self.disk.quick(true) => {
                Some(perform(job, &self.lane, &*self.disk, &self.core.ram.mem))
            }
            _ => None,
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
            let concluded =
                bench.conclude(&job, result.map(|bytes| Some(if read { bytes.to_vec() } else { Vec::new() })));
            match (concluded, bench.batched) {
                (true, true) => {}
                (true, false) => bench.core.settle(),
                (false, _) => bench.lane.hold(job),
            }
        });
        let _given_back = self.disk.begin(op, ended)?;
        job.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Leave the outcome, of which the device is still to be told. False: it cannot be done now.
    fn conclude(&self, job: &Job, result: Result<Option<Vec<u8>>, Error>) -> bool {
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
                return false;
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
        self.lane.finish(job, outcome);
        true
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
