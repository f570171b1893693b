//! The sender's hands for [`crate::verify`]: a thread that hashes, a schedule, a log line for each outcome.
//!
//! The driver's thread calls everything here; nothing blocks it. Chunks are read from the RAM file with `pread`, beside the
//! running guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use understudy_protocol::ids::Epoch;
use understudy_protocol::statistics::VerifyStatus;

use super::{Check, Job, Next, Outcome, Verify, hash};
use crate::codec::PAGE;
use crate::log;
use crate::message::Message;
use crate::sender::Event;

/// The first scheduled pass does not wait longer than this for its turn: a replicator that is restarted often is verified too.
const FIRST: Duration = Duration::from_secs(600);
/// Pages read at once.
const BLOCK: u64 = 64;

/// The thread that hashes: what it is given, and what it made of the job with that ticket.
type Worker = (mpsc::Sender<(Job, File)>, mpsc::Receiver<(u64, io::Result<Vec<u64>>)>);

/// One sender's verification.
#[derive(Debug)]
pub struct Verifier {
    core: Verify,
    every: Duration,
    due: Option<Instant>,
    /// It ends with this.
    worker: Option<Worker>,
}

impl Verifier {
    /// A pass on its own `every` so often; zero = only on request.
    pub fn new(every: Duration, now: Instant) -> Self {
        let due = (!every.is_zero()).then(|| now + every.min(FIRST));
        Self { core: Verify::default(), every, due, worker: None }
    }

    /// Begin a pass, or join the one that is under way; its number.
    pub fn request(&mut self, now: Instant) -> u64 {
        let running = self.core.running();
        let pass = self.core.request(now);
        if !running {
            log::line(&format!("sender: verify {pass}: all of RAM is compared with the standby's"));
        }
        pass
    }

    /// See [`Verify::cut`].
    pub fn cut(&mut self, epoch: Epoch) {
        if let Some((_, results)) = &self.worker {
            for (ticket, hashes) in results.try_iter() {
                if let Err(e) = &hashes {
                    log::line(&format!("sender: verify: RAM cannot be read: {e}"));
                }
                self.core.hashed(ticket, hashes.ok());
            }
        }
        self.core.cut(epoch);
    }

    /// See [`Verify::carried`].
    pub fn carried(&mut self, epoch: Epoch, indices: &[[u8; 8]]) {
        self.core.carried(epoch, indices);
    }

    /// See [`Verify::ended`].
    pub fn ended(&mut self, epoch: Epoch) -> Option<Check> {
        self.core.ended(epoch)
    }

    /// The peer has said something.
    pub fn heard(&mut self, event: &Event, now: Instant) {
        if let Event::Message(_, epoch, Message::Checked(differing)) = event
            && let Some(outcome) = self.core.checked(*epoch, differing, now)
        {
            self.tell(&outcome, now);
        }
    }

    /// See [`Verify::interrupted`].
    pub fn interrupted(&mut self) {
        self.core.interrupted();
    }

    /// See [`Verify::begin_again`].
    pub fn first_copy(&mut self) {
        self.core.begin_again();
    }

    /// Go on with what there is to do; `streaming`: epochs flow to a whole image, the newest that was cut is `current`.
    pub fn step(&mut self, streaming: bool, current: Epoch, ram: Option<&File>, ram_pages: u64) {
        let Some(ram) = ram.filter(|_| streaming) else { return };
        let now = Instant::now();
        self.core.ram_pages(ram_pages);
        if self.due.is_some_and(|due| now >= due) {
            self.due = Some(now + self.every);
            self.request(now);
        }
        match self.core.open(current, now) {
            None => {}
            Some(Next::Over(outcome)) => self.tell(&outcome, now),
            Some(Next::Hash(job)) => {
                let (jobs, _) = self.worker.get_or_insert_with(start);
                let sent = ram.try_clone().is_ok_and(|ram| jobs.send((job, ram)).is_ok());
                if !sent {
                    // Out of file descriptors, for example. The chunk gets its turn in the next round.
                    self.core.hashed(job.ticket, None);
                }
            }
        }
    }

    /// For the status.
    pub fn report(&self, now: Instant) -> VerifyStatus {
        self.core.report(now)
    }

    fn tell(&mut self, outcome: &Outcome, now: Instant) {
        let pass = self.core.report(now).pass;
        log::line(&format!("sender: {}", outcome.sentence(pass)));
        if !self.every.is_zero() {
            self.due = Some(now + self.every);
        }
    }
}

fn start() -> Worker {
    let (jobs, to_do) = mpsc::channel::<(Job, File)>();
    let (done, results) = mpsc::channel();
    thread::spawn(move || {
        for (job, ram) in to_do {
            if done.send((job.ticket, hash_chunk(job, &ram))).is_err() {
                return;
            }
        }
    });
    (jobs, results)
}

fn hash_chunk(job: Job, ram: &File) -> io::Result<Vec<u64>> {
    let mut hashes = Vec::with_capacity(job.count as usize);
    let mut block = vec![0; BLOCK as usize * PAGE];
    let mut at = 0;
    while at < job.count {
        let pages = BLOCK.min(job.count - at);
        let bytes = &mut block[..pages as usize * PAGE];
        ram.read_exact_at(bytes, (job.first + at) * PAGE as u64)?;
        hashes.extend(bytes.chunks_exact(PAGE).map(hash));
        at += pages;
    }
    Ok(hashes)
}
