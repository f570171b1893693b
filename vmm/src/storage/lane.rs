//! Between a disk device and the threads that do what it asks for: requests wait here to be begun, outcomes to be handed in.
//!
//! ```text
//!  device lock held:  exchange(life, requests) ──► jobs ──► a worker ──► done ──► exchange(…) → outcomes
//!                                                   ▲           │
//!                                                  held ◄── no room: again, a moment later
//! ```
//! Nothing here does I/O, and nobody waits here while holding the device lock.
//!
//! What must hold:
//! * *After a reset of the device* (its life is another one) nothing of the old life is begun or handed in, and nothing of the new one is begun before
//!   what was under way has ended: an old write must not come after a new one.
//! * *While the intake is closed* no request that changes the disk is under way: a cut can be made without waiting for storage.
//! * What waits to be handed in is bounded; workers wait, and hold nothing meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::devices::virtio::block::{Kind, Outcome, Request};

/// Bytes that may wait to be handed in before workers wait.
const DONE_BYTES: usize = 16 << 20;
/// What is still not possible is tried again after so long.
const AGAIN: Duration = Duration::from_millis(20);

/// Something to do, of one life of the device.
#[derive(Debug)]
pub struct Job {
    /// What.
    pub request: Request,
    life: u64,
    number: u64,
}

impl Job {
    /// Whether it changes the disk, or makes changes durable.
    fn changes(&self) -> bool {
        !matches!(self.request.kind, Kind::Read { .. })
    }

    fn what(&self) -> &'static str {
        match self.request.kind {
            Kind::Read { .. } => "read",
            Kind::Write { .. } => "write",
            Kind::Flush => "flush",
            Kind::Discard(_) => "discard",
            Kind::WriteZeroes(_) => "write of zeroes",
            Kind::Fill { .. } => "write of a pattern",
        }
    }
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// There was no room for them; from when on they are tried again.
    held: VecDeque<(Instant, Job)>,
    done: Vec<(u64, Outcome)>,
    done_bytes: usize,
    life: u64,
    /// When each was begun that has not ended, and what it is.
    begun: BTreeMap<u64, (Instant, &'static str)>,
    /// Number of the next.
    next: u64,
    /// Begun and not ended: of this life, of earlier ones.
    running: usize,
    before: usize,
    /// Of both, those that change the disk.
    changing: usize,
    /// Workers that wait for something to do.
    idle: usize,
    closed: bool,
    stop: bool,
}

impl State {
    fn may_begin(&self) -> bool {
        self.before == 0 && self.done_bytes < DONE_BYTES
    }
    fn ready(&self, job: &Job) -> bool {
        !(self.closed && job.changes())
    }
    /// Somebody could do something who does nothing.
    fn wants_worker(&self) -> bool {
        let mut waiting = self.held.iter().map(|(_, job)| job).chain(&self.jobs);
        self.idle > 0 && self.may_begin() && waiting.any(|job| self.ready(job))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Lane {
    /// The disk's name.
    pub name: String,
    state: Mutex<State>,
    /// A worker may have something to do.
    work: Condvar,
    /// Somebody who waits for what is under way may have waited long enough.
    ended: Condvar,
}

/// The intake is closed as long as this lives.
#[derive(Debug)]
pub struct Closed<'a>(&'a Lane);

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.state().closed = false;
        self.0.work.notify_all();
    }
}

/// How much is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Requests, with those that wait for room.
    pub in_flight: usize,
    /// Those that wait for room.
    pub held: usize,
    /// The one that was begun first of those that have not ended: for how long, and what it is.
    pub slowest: Option<(Duration, &'static str)>,
}

impl Lane {
    /// An empty one.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), state: Mutex::default(), work: Condvar::new(), ended: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device, in this life, asks for these; what is done is returned. Called under the device lock.
    pub fn exchange(&self, life: u64, requests: Vec<Request>) -> Vec<(u64, Outcome)> {
        let mut state = self.state();
        if state.life != life {
            state.life = life;
            state.jobs.clear();
            state.held.clear();
            state.done.clear();
            state.done_bytes = 0;
            state.before += std::mem::take(&mut state.running);
        }
        state.jobs.extend(requests.into_iter().map(|request| Job { request, life, number: 0 }));
        state.done_bytes = 0;
        let done = std::mem::take(&mut state.done);
        self.wake_worker(state);
        done
    }

    /// One is enough: it wakes the next before it does anything that takes long ([`Lane::share`]).
    fn wake_worker(&self, state: MutexGuard<'_, State>) {
        let wanted = state.wants_worker();
        drop(state);
        if wanted {
            self.work.notify_one();
        }
    }

    /// This worker will be away: what else there is to do is for another.
    pub fn share(&self) {
        self.wake_worker(self.state());
    }

    /// The next thing to do, if there is one now.
    pub fn try_next(&self) -> Option<Job> {
        Self::take(&mut self.state(), Instant::now())
    }

    /// The next thing to do; waits for it. `None`: the worker is to end.
    pub fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if state.stop {
                return None;
            }
            let now = Instant::now();
            if let Some(job) = Self::take(&mut state, now) {
                return Some(job);
            }
            let may_begin = state.may_begin();
            let due = state.held.iter().map(|(at, _)| *at).min().filter(|_| may_begin && !state.closed);
            state.idle += 1;
            state = match due {
                Some(at) => {
                    let wait = at.saturating_duration_since(now).max(Duration::from_millis(1));
                    self.work.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.idle -= 1;
        }
    }

    fn take(state: &mut State, now: Instant) -> Option<Job> {
        if state.stop || !state.may_begin() {
            return None;
        }
        let mut job = match state.held.iter().position(|(at, job)| *at <= now && state.ready(job)) {
            Some(at) => state.held.remove(at).map(|(_, job)| job),
            None => state.jobs.iter().position(|job| state.ready(job)).and_then(|at| state.jobs.remove(at)),
        }?;
        job.number = state.next;
        state.next += 1;
        state.begun.insert(job.number, (now, job.what()));
        state.running += 1;
        state.changing += usize::from(job.changes());
        Some(job)
    }

    /// Whether what a job is about to do is still wanted. Its data was read before: RAM belonged to the request all the time if it is.
    pub fn wanted(&self, job: &Job) -> bool {
        self.state().life == job.life
    }

    fn ended(state: &mut State, job: &Job) -> bool {
        let current = state.life == job.life;
        state.begun.remove(&job.number);
        if current {
            state.running -= 1;
        } else {
            state.before -= 1;
        }
        state.changing -= usize::from(job.changes());
        current
    }

    /// A job has ended; `None`: nobody is told.
    pub fn finish(&self, job: &Job, outcome: Option<Outcome>) {
        let mut state = self.state();
        let current = Self::ended(&mut state, job);
        if let Some(outcome) = outcome.filter(|_| current) {
            state.done_bytes += if let Outcome::Done(bytes) = &outcome { bytes.len() } else { 0 };
            state.done.push((job.request.id, outcome));
        }
        let (closed, last_of_before) = (state.closed, state.before == 0 && !current);
        drop(state);
        if closed {
            self.ended.notify_all();
        }
        if last_of_before {
            self.work.notify_all();
        }
    }

    /// There is no room for it now: it waits, and is begun again.
    pub fn hold(&self, job: Job) {
        let mut state = self.state();
        if Self::ended(&mut state, &job) {
            state.held.push_back((Instant::now() + AGAIN, job));
        }
        drop(state);
        self.ended.notify_all();
        self.work.notify_all();
    }

    /// Let nothing more begin that changes the disk, and wait until what was begun has ended. `None`: that took longer than `patience`.
    pub fn close(&self, patience: Duration) -> Option<Closed<'_>> {
        let mut state = self.state();
        state.closed = true;
        let closed = Closed(self);
        let until = Instant::now() + patience;
        while state.changing > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Opening it takes the lock.
                drop(state);
                return None;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        Some(closed)
    }

    /// How much is under way.
    pub fn load(&self) -> Load {
        let state = self.state();
        let waiting = state.jobs.len() + state.held.len();
        let slowest = state.begun.values().next().map(|(since, what)| (since.elapsed(), *what));
        let in_flight = waiting + state.running + state.before + state.done.len();
        Load { in_flight, held: state.held.len(), slowest }
    }

    /// Workers may work.
    pub fn start(&self) {
        self.state().stop = false;
    }

    /// End the workers; what they have begun they end.
    pub fn stop(&self) {
        self.state().stop = true;
        self.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(30);

    fn flush(id: u64) -> Request {
        Request { id, kind: Kind::Flush }
    }
    fn read(id: u64) -> Request {
        Request { id, kind: Kind::Read { at: 0, len: 512 } }
    }
    fn done() -> Option<Outcome> {
        Some(Outcome::Done(Vec::new()))
    }

    /// What a worker gets, if it gets something.
    fn try_next(lane: &Arc<Lane>) -> Option<Job> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let theirs = lane.clone();
        let worker = std::thread::spawn(move || drop(sender.send(theirs.next())));
        let got = receiver.recv_timeout(SHORT * 4).ok().flatten();
        if got.is_none() {
            lane.stop();
            worker.join().unwrap();
            lane.state().stop = false;
            // It may have got something before it saw the stop.
            assert!(receiver.try_recv().ok().flatten().is_none());
        }
        got
    }

    #[test]
    fn what_is_asked_is_begun_and_what_is_done_is_handed_in() {
        let lane = Arc::new(Lane::new("a"));
        assert_eq!(lane.exchange(0, vec![read(1), flush(2)]), []);
        let (first, second) = (lane.next().unwrap(), lane.next().unwrap());
        assert_eq!((first.request.id, second.request.id), (1, 2));
        lane.finish(&second, done());
        assert_eq!(lane.exchange(0, vec![]), [(2, Outcome::Done(vec![]))]);
        lane.finish(&first, Some(Outcome::Failed));
        assert_eq!(lane.exchange(0, vec![]), [(1, Outcome::Failed)]);
        assert_eq!(lane.load(), Load { in_flight: 0, held: 0, slowest: None });
    }

    /// One worker is woken for any number of requests, and shares before it is away.
    #[test]
    fn who_is_away_leaves_the_rest_to_others() {
        let lane = Arc::new(Lane::new("a"));
        let (sender, got) = std::sync::mpsc::channel();
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (lane, sender) = (lane.clone(), sender.clone());
                std::thread::spawn(move || {
                    while let Some(job) = lane.next() {
                        lane.share();
                        sender.send(job).unwrap();
                        // Away until the test ends it.
                        while !lane.state().stop {
                            std::thread::park_timeout(SHORT);
                        }
                    }
                })
            })
            .collect();
        while lane.state().idle < 2 {
            std::thread::yield_now();
        }
        lane.exchange(0, vec![read(1), read(2)]);
        let mut ids = [(); 2].map(|()| got.recv_timeout(Duration::from_secs(10)).unwrap().request.id);
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
        lane.stop();
        for worker in workers {
            worker.join().unwrap();
        }
    }

    #[test]
    fn a_new_life_begins_nothing_before_the_old_one_has_ended() {
        let lane = Arc::new(Lane::new("a"));
        lane.exchange(0, vec![flush(1), flush(2), flush(3)]);
        let (old, finished) = (lane.next().unwrap(), lane.next().unwrap());
        lane.finish(&finished, done());
        assert_eq!(lane.exchange(1, vec![flush(4)]), [], "what was done is forgotten");
        assert!(!lane.wanted(&old));
        assert!(try_next(&lane).is_none());
        lane.finish(&old, done());
        let new = try_next(&lane).expect("the old one has ended");
        assert_eq!(new.request.id, 4, "what had not begun never does");
        assert!(lane.wanted(&new));
        assert_eq!(lane.exchange(1, vec![]), []);
    }

    #[test]
    fn a_closed_intake_lets_reads_begin_and_waits_for_what_changes_the_disk() {
        let lane = Arc::new(Lane::new("a"));
        lane.exchange(0, vec![flush(1), flush(2), read(3)]);
        let first = lane.next().unwrap();
        assert!(lane.close(SHORT).is_none(), "one is under way");
        assert!(lane.load().slowest.is_some_and(|(since, what)| since >= SHORT && what == "flush"));
        let ends = std::thread::spawn({
            let lane = lane.clone();
            move || {
                std::thread::sleep(SHORT);
                lane.finish(&first, done());
            }
        });
        let closed = lane.close(Duration::from_secs(10)).expect("it ends");
        ends.join().unwrap();
        assert_eq!(try_next(&lane).unwrap().request.id, 3);
        assert!(try_next(&lane).is_none());
        drop(closed);
        assert_eq!(try_next(&lane).unwrap().request.id, 2);
    }

    #[test]
    fn what_finds_no_room_waits_and_is_begun_again() {
        let lane = Arc::new(Lane::new("a"));
        lane.exchange(0, vec![flush(1), flush(2)]);
        let job = lane.next().unwrap();
        lane.hold(job);
        assert_eq!(lane.load(), Load { in_flight: 2, held: 1, slowest: None });
        assert!(lane.close(Duration::ZERO).is_some(), "it holds up no cut");
        let mut ids = [lane.next().unwrap().request.id, lane.next().unwrap().request.id];
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn outcomes_that_nobody_takes_stop_the_workers() {
        let lane = Arc::new(Lane::new("a"));
        lane.exchange(0, vec![read(1), read(2)]);
        let job = lane.next().unwrap();
        lane.finish(&job, Some(Outcome::Done(vec![0; DONE_BYTES])));
        assert!(try_next(&lane).is_none());
        assert_eq!(lane.exchange(0, vec![]).len(), 1);
        assert!(try_next(&lane).is_some());
    }
}
