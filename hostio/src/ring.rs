//! io_uring for reads and writes: one queue a disk, its submitters never wait, one thread hands in what has ended.
//!
//! ```text
//!  queue(op, done) ─► slot (owns buffer, file, done) ─► submission queue ── submit() ─► kernel
//!  done(result, buffer) ◄── reaper, or the submitter itself ◄── completion queue
//!  after()              ◄── the same, when it has called `done` of everything that had ended together
//! ```
//! What must hold: a buffer and its file belong to the slot from before the kernel hears of them until it said that it is through with them. So nothing that
//! is called from outside can free them, and [`Ring`] does not go away before everything has ended.
//!
//! The kernel may forbid io_uring (`kernel.io_uring_disabled`, seccomp): then [`Ring::new`] is an error, and the caller goes on with threads.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use io_uring::{IoUring, opcode, squeue, types};

use crate::Buffer;

/// Requests that may be under way in one ring.
pub const DEPTH: usize = 256;

/// What is to be done.
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer from here.
    Read {
        /// First byte.
        at: u64,
        /// Where it goes.
        to: Buffer,
    },
    /// Write the buffer to here.
    Write {
        /// First byte.
        at: u64,
        /// What.
        from: Buffer,
    },
}

/// What is called when it has ended, from a thread of the ring's or a submitter: how many bytes were read or written (fewer than asked for is possible), and
/// the buffer.
pub type Done = Box<dyn FnOnce(io::Result<usize>, Buffer) + Send>;

/// See [`Ring::after`].
pub type After = Arc<dyn Fn() + Send + Sync>;

/// What the kernel has.
struct Slot {
    buffer: Buffer,
    _file: Arc<File>,
    done: Done,
}

struct Slots {
    used: Vec<Option<Slot>>,
    free: Vec<usize>,
    stop: bool,
}

struct Shared {
    ring: IoUring,
    /// Also the right to push to the submission queue.
    slots: Mutex<Slots>,
    /// The right to take from the completion queue.
    reaping: Mutex<()>,
    /// There is something under way, or the ring is to end.
    begun: Condvar,
    under_way: AtomicUsize,
    /// There is something of which the kernel has not heard.
    queued: AtomicBool,
    after: OnceLock<After>,
}

/// See the [module](self).
pub struct Ring {
    shared: Arc<Shared>,
    reaper: Option<JoinHandle<()>>,
}

/// Of the request that ends the reaper's wait.
const WAKE: u64 = u64::MAX;

impl Ring {
    /// Make one, with its thread.
    ///
    /// # Errors
    /// The kernel has no io_uring, or forbids it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(DEPTH as u32)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring cannot read and write"));
        }
        let slots = Slots { used: (0..DEPTH).map(|_| None).collect(), free: (0..DEPTH).collect(), stop: false };
        let shared = Arc::new(Shared {
            ring,
            slots: Mutex::new(slots),
            reaping: Mutex::new(()),
            begun: Condvar::new(),
            under_way: AtomicUsize::new(0),
            queued: AtomicBool::new(false),
            after: OnceLock::new(),
        });
        let theirs = shared.clone();
        let reaper = std::thread::Builder::new().name("disk-ring".into()).spawn(move || theirs.run())?;
        Ok(Self { shared, reaper: Some(reaper) })
    }

    /// Call this whenever something has ended, after the `done` of each: what costs the same for one and for many is done once. False: another was said before, which
    /// stays.
    pub fn after(&self, after: After) -> bool {
        self.shared.after.set(after).is_ok()
    }

    /// Queue it. The kernel hears of it at the next [`Ring::submit`]: of many at once, which costs one call and lets neighbours be merged. What cannot be queued
    /// (all slots are taken) is given back, for the caller to do in another way.
    ///
    /// # Errors
    /// What was given back.
    #[allow(clippy::result_large_err, reason = "it is the request itself")]
    pub fn queue(&self, file: &Arc<File>, op: Op, done: Done) -> Result<(), (Op, Done)> {
        let shared = &*self.shared;
        let mut slots = shared.slots();
        let Some(slot) = slots.free.pop() else { return Err((op, done)) };
        let (read, at, mut buffer) = match op {
            Op::Read { at, to } => (true, at, to),
            Op::Write { at, from } => (false, at, from),
        };
        let fd = types::Fd(file.as_raw_fd());
        // Longer ones would be cut short, which the caller copes with.
        let len = u32::try_from(buffer.len()).unwrap_or(!4095);
        let entry = if read {
            opcode::Read::new(fd, buffer.as_mut_ptr(), len).offset(at).build()
        } else {
            opcode::Write::new(fd, buffer.as_ptr(), len).offset(at).build()
        };
        // A moved Buffer's bytes stay where they are: they are on the heap.
        slots.used[slot] = Some(Slot { buffer, _file: file.clone(), done });
        if !shared.push(&entry.user_data(slot as u64)) {
            // As many entries as slots, and each is taken by the kernel before the next: there is always room. If not, nothing has happened.
            slots.free.push(slot);
            let Some(Slot { buffer, done, .. }) = slots.used[slot].take() else { return Ok(()) };
            let op = if read { Op::Read { at, to: buffer } } else { Op::Write { at, from: buffer } };
            return Err((op, done));
        }
        shared.under_way.fetch_add(1, Ordering::AcqRel);
        shared.queued.store(true, Ordering::Release);
        Ok(())
    }

    /// Tell the kernel of everything that was queued.
    pub fn submit(&self) {
        let shared = &*self.shared;
        // What callbacks queue meanwhile belongs to it: the reaper may be waiting for requests of which the kernel has not heard.
        while shared.queued.swap(false, Ordering::AcqRel) {
            let slots = shared.slots();
            shared.enter_submit();
            drop(slots);
            // What a page cache answered has ended already: no other thread need wake for it.
            if let Ok(reaping) = shared.reaping.try_lock() {
                shared.reap(reaping);
            }
        }
        if shared.under_way.load(Ordering::Acquire) > 0 {
            shared.begun.notify_one();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut slots = self.shared.slots();
        slots.stop = true;
        self.shared.push(&opcode::Nop::new().build().user_data(WAKE));
        self.shared.enter_submit();
        drop(slots);
        self.shared.begun.notify_all();
        if let Some(reaper) = self.reaper.take() {
            // It panics only if a callback does, which is reported by the panic itself. A callback that owns the ring ends it in the reaper.
            if reaper.thread().id() != std::thread::current().id() {
                let _ = reaper.join();
            }
        }
    }
}

impl Shared {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slots are locked.
    fn push(&self, entry: &squeue::Entry) -> bool {
        // SAFETY: only who has the slots' lock pushes. What the entry points to is in a slot, which is emptied only when the kernel said that the request
        // has ended (or here, if it never heard of it).
        unsafe { self.ring.submission_shared().push(entry).is_ok() }
    }

    /// The slots are locked. What cannot be told now the kernel is told by the next call, the reaper's at the latest.
    fn enter_submit(&self) {
        while let Err(e) = self.ring.submit() {
            match e.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                _ => break,
            }
        }
    }

    /// Hand in what has ended.
    fn reap(&self, reaping: MutexGuard<'_, ()>) {
        // SAFETY: only who holds `reaping` looks at the completion queue.
        let ended: Vec<(u64, i32)> =
            unsafe { self.ring.completion_shared() }.map(|entry| (entry.user_data(), entry.result())).collect();
        drop(reaping);
        let mut any = false;
        for (slot, result) in ended {
            if slot == WAKE {
                continue;
            }
            let slot = slot as usize;
            let mut slots = self.slots();
            let Some(Slot { buffer, done, _file }) = slots.used.get_mut(slot).and_then(Option::take) else { continue };
            slots.free.push(slot);
            drop(slots);
            let result = if result < 0 {
                Err(io::Error::from_raw_os_error(-result))
            } else {
                Ok(result.unsigned_abs() as usize)
            };
            done(result, buffer);
            any = true;
            self.under_way.fetch_sub(1, Ordering::AcqRel);
        }
        if let Some(after) = self.after.get().filter(|_| any) {
            after();
        }
    }

    fn run(&self) {
        loop {
            let mut slots = self.slots();
            while self.under_way.load(Ordering::Acquire) == 0 && !slots.stop {
                slots = self.begun.wait(slots).unwrap_or_else(PoisonError::into_inner);
            }
            if slots.stop && self.under_way.load(Ordering::Acquire) == 0 {
                return;
            }
            drop(slots);
            // (What callbacks have queued goes with it.)
            self.queued.store(false, Ordering::Release);
            // SAFETY: no argument is passed.
            let waited = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(
                    DEPTH as u32,
                    1,
                    io_uring::EnterFlags::GETEVENTS.bits(),
                    None,
                )
            };
            match waited {
                Err(e) if e.raw_os_error() != Some(libc::EINTR) => std::thread::yield_now(),
                _ => {}
            }
            self.reap(self.reaping.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn ring() -> Option<Ring> {
        Ring::new().inspect_err(|e| eprintln!("SKIPPED: this host has no io_uring: {e}")).ok()
    }

    #[test]
    fn what_was_written_is_read_with_many_under_way_and_the_ring_ends_after_the_last() {
        let Some(ring) = ring() else { return };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let (sender, ended) = mpsc::channel();
        const COUNT: u64 = 2 * DEPTH as u64;
        let mut begun = 0;
        for i in 0..COUNT {
            let mut op = Op::Write { at: i * 4096, from: Buffer::copy(&[i as u8; 4096]) };
            let mut done: Done = {
                let sender = sender.clone();
                Box::new(move |result, _| sender.send(result.unwrap()).unwrap())
            };
            while let Err(back) = ring.queue(&file, op, done) {
                (op, done) = back;
                ring.submit();
                assert_eq!(ended.recv().unwrap(), 4096, "all slots are taken, so one ends");
                begun -= 1;
            }
            begun += 1;
        }
        ring.submit();
        for _ in 0..begun {
            assert_eq!(ended.recv().unwrap(), 4096);
        }
        let (sender, read) = mpsc::channel();
        for i in 0..COUNT {
            let sender = sender.clone();
            let done: Done =
                Box::new(move |result, buffer| sender.send((i, result.unwrap(), buffer[0], buffer[4095])).unwrap());
            if let Err((_, done)) = ring.queue(&file, Op::Read { at: i * 4096, to: Buffer::new(4096) }, done) {
                done(Ok(4096), Buffer::copy(&[i as u8; 4096]));
            }
        }
        drop(sender);
        drop(ring);
        let all: Vec<_> = read.try_iter().collect();
        assert_eq!(all.len() as u64, COUNT, "dropping the ring waits for all");
        assert!(all.iter().all(|&(i, n, first, last)| n == 4096 && first == i as u8 && last == i as u8));
    }

    #[test]
    fn after_what_has_ended_somebody_is_told_once() {
        let Some(ring) = ring() else { return };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let (done, (sender, told)) = (Arc::new(AtomicUsize::new(0)), mpsc::channel());
        let seen = done.clone();
        assert!(ring.after(Arc::new(move || sender.send(seen.load(Ordering::SeqCst)).unwrap())));
        assert!(!ring.after(Arc::new(|| ())), "it stays");
        for i in 0..32 {
            let done = done.clone();
            let op = Op::Write { at: i * 4096, from: Buffer::new(4096) };
            let count: Done = Box::new(move |_, _| {
                done.fetch_add(1, Ordering::SeqCst);
            });
            assert!(ring.queue(&file, op, count).is_ok());
        }
        ring.submit();
        assert!(told.iter().any(|done| done == 32), "the last is told of");
    }

    #[test]
    fn an_error_and_a_short_read_are_said() {
        let Some(ring) = ring() else { return };
        let (sender, ended) = mpsc::channel();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 100]).unwrap();
        let only_read = Arc::new(File::open(file.path()).unwrap());
        for op in [Op::Read { at: 0, to: Buffer::new(512) }, Op::Write { at: 0, from: Buffer::new(512) }] {
            let sender = sender.clone();
            assert!(ring.queue(&only_read, op, Box::new(move |result, _| sender.send(result).unwrap())).is_ok());
        }
        ring.submit();
        let (read, write) = (ended.recv().unwrap(), ended.recv().unwrap());
        assert_eq!(read.unwrap(), 100);
        assert_eq!(write.unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
