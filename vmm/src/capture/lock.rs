//! Locked pages: S1's *lock and copy*. At the cut the pages that are still to be copied are write-protected; the guest runs on; a
//! write to a locked page traps, the old content is copied first, then the write goes on.
//!
//! ```text
//!  lock(pages) ──► copy_all: page by page, unlocking behind itself ──► done
//!                     ▲ a guest (or device) writes a page that is still locked: the handler copies it, unlocks it, wakes the writer
//! ```
//! With userfaultfd's write protection for shared memory (Linux 5.19; ioctl_userfaultfd(2)). The handler thread takes no lock that anybody
//! holds while writing to guest RAM, so that every trapped writer goes on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::memory::{PAGE, Ram};

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
#[derive(Default)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}
nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, WriteProtect);

/// Locked stretches with at most so many other pages between them are locked as one: an ioctl costs more than a few needless traps.
const GAP: u64 = 8;
/// The copier unlocks at least so many pages at a time.
const UNLOCK: u64 = 64;

const WAITS: u8 = 0;
const COPYING: u8 = 1;
const COPIED: u8 = 2;

/// A stretch of neighbouring pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u64,
    count: u64,
}

/// The pages as few stretches, in place of what `runs` holds; `pages` ascend.
fn find_runs(pages: &[u64], runs: &mut Vec<Run>) {
    runs.clear();
    for page in pages {
        match runs.last_mut() {
            Some(run) if *page - run.first < run.count + GAP => run.count = *page - run.first + 1,
            _ => runs.push(Run { first: *page, count: 1 }),
        }
    }
}

/// What is being copied: slots of the arena for pages.
struct Job {
    pages: Vec<u64>,
    states: Vec<AtomicU8>,
    to: *mut u8,
}
// SAFETY: `to` points to `pages.len()` slots in the arena's mapping. A slot is written only by whoever moved its state from WAITS to
// COPYING, and the job is withdrawn, with every state COPIED, before the arena can be used for something else (see `copy_all`).
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// Make sure that slot `i` holds the content of now, whoever copies it.
    fn copy(&self, ram: &Ram, i: usize) {
        let state = &self.states[i];
        if state.compare_exchange(WAITS, COPYING, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            if let Some(page) = ram.page_address(self.pages[i]) {
                // SAFETY: the page lies in RAM's mapping; the slot is ours alone (the state just changed) and inside of the arena.
                unsafe { std::ptr::copy_nonoverlapping(page, self.to.add(i * PAGE), PAGE) };
            }
            state.store(COPIED, Ordering::Release);
        } else {
            // A page's copy takes less than a microsecond; but its copier may have lost its processor to us.
            let mut rounds = 0u32;
            while state.load(Ordering::Acquire) != COPIED {
                rounds += 1;
                if rounds.is_multiple_of(64) {
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
                std::hint::spin_loop();
            }
        }
    }
}

/// The lists of an earlier job, for the next: locking takes place while the guest stands still.
#[derive(Default)]
struct Spare {
    pages: Vec<u64>,
    states: Vec<AtomicU8>,
    runs: Vec<Run>,
}

struct Shared {
    uffd: OwnedFd,
    ram: Arc<crate::core::Core>,
    job: Mutex<Option<Arc<Job>>>,
    spare: Mutex<Spare>,
    end: AtomicBool,
    faults: AtomicU64,
    fault_ns: AtomicU64,
}

/// See the module.
pub struct Locker {
    shared: Arc<Shared>,
    wake: Arc<EventFd>,
    handler: Option<JoinHandle<()>>,
}

impl Locker {
    /// Prepare to lock pages of this machine's RAM; an error says what this host lacks, and the machine's status says it too.
    pub fn new(core: Arc<crate::core::Core>) -> Result<Self> {
        Self::prepare(core.clone()).inspect_err(|e| {
            core.cannot_lock.get_or_init(|| format!("{e:#}"));
        })
    }

    fn prepare(core: Arc<crate::core::Core>) -> Result<Self> {
        // SAFETY: a plain system call; the descriptor that it returns is owned by nobody else.
        let uffd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            if fd < 0 {
                return Err(anyhow::Error::from(io::Error::last_os_error()).context("this host offers no userfaultfd"));
            }
            OwnedFd::from_raw_fd(i32::try_from(fd)?)
        };
        let wanted = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = Api { api: UFFD_API, features: wanted | FEATURE_WP_UNPOPULATED, ioctls: 0 };
        // SAFETY: `api` is the structure that UFFDIO_API reads and writes.
        if unsafe { uffdio_api(uffd.as_raw_fd(), &raw mut api) }.is_err() {
            api = Api { api: UFFD_API, features: wanted, ioctls: 0 };
            // SAFETY: as above. (A failed handshake leaves the descriptor as it was.)
            unsafe { uffdio_api(uffd.as_raw_fd(), &raw mut api) }
                .context("this kernel cannot write-protect shared memory with userfaultfd (Linux 5.19 can)")?;
        }
        for (host, bytes, _) in core.ram.mappings() {
            let mut register = Register { start: host, len: bytes, mode: REGISTER_MODE_WP, ioctls: 0 };
            // SAFETY: the range is a mapping of ours that lives as long as `core`; the structure is the one of UFFDIO_REGISTER.
            unsafe { uffdio_register(uffd.as_raw_fd(), &raw mut register) }
                .context("the guest's RAM cannot be registered with userfaultfd")?;
        }
        let shared = Arc::new(Shared {
            uffd,
            ram: core,
            job: Mutex::new(None),
            spare: Mutex::default(),
            end: AtomicBool::new(false),
            faults: AtomicU64::new(0),
            fault_ns: AtomicU64::new(0),
        });
        let wake = Arc::new(EventFd::new().context("cannot create an eventfd")?);
        let handler = {
            let (shared, wake) = (shared.clone(), wake.clone());
            std::thread::Builder::new()
                .name("lock-faults".into())
                .stack_size(128 * 1024)
                .spawn(move || shared.handle(&wake))
                .context("cannot start the thread that handles locked pages")?
        };
        Ok(Self { shared, wake, handler: Some(handler) })
    }

    /// Lock `pages` (ascending), with `to` for their copies. The guest stands still. On an error nothing is locked.
    pub fn lock(&self, pages: &[u64], to: &mut [u8]) -> Result<Locked> {
        ensure!(to.len() >= pages.len() * PAGE, "the arena is too small for {} pages", pages.len());
        let Spare { pages: mut listed, states: mut waiting, mut runs } =
            std::mem::take(&mut *self.shared.spare.lock().unwrap_or_else(PoisonError::into_inner));
        listed.clear();
        listed.extend_from_slice(pages);
        waiting.clear();
        waiting.extend(pages.iter().map(|_| AtomicU8::new(WAITS)));
        find_runs(pages, &mut runs);
        let job = Arc::new(Job { pages: listed, states: waiting, to: to.as_mut_ptr() });
        *self.shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job.clone());
        // From here on dropping it unlocks and withdraws the job.
        let locked = Locked { shared: self.shared.clone(), job: Some(job), runs, unlocked: 0 };
        for run in &locked.runs {
            if let Err(e) = self.shared.protect(*run, WRITEPROTECT_MODE_WP) {
                return Err(anyhow::Error::from(e).context("pages cannot be locked"));
            }
        }
        Ok(locked)
    }

    /// Traps handled since the last call, and the time that they took in all, ns.
    pub fn take_faults(&self) -> (u64, u64) {
        (self.shared.faults.swap(0, Ordering::Relaxed), self.shared.fault_ns.swap(0, Ordering::Relaxed))
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::SeqCst);
        let _ = self.wake.write(1);
        if let Some(handler) = self.handler.take() {
            let _ = handler.join();
        }
        // Closing the descriptor (with the last reference to `shared`) lifts every protection and wakes whoever waits.
    }
}

/// Pages that are locked; dropping it copies and unlocks what is left.
pub struct Locked {
    shared: Arc<Shared>,
    /// Until it is finished.
    job: Option<Arc<Job>>,
    runs: Vec<Run>,
    /// Runs that are unlocked.
    unlocked: usize,
}

impl Locked {
    /// Copy everything that no trap has copied, and unlock it. The guest runs.
    pub fn copy_all(mut self) {
        self.finish();
    }

    fn finish(&mut self) {
        let Some(job) = self.job.take() else { return };
        let shared = &self.shared;
        let mut i = 0;
        while let Some(run) = self.runs.get(self.unlocked).copied() {
            let end = run.first + run.count;
            let mut from = run.first;
            while from < end {
                let upto = end.min(from + UNLOCK);
                while i < job.pages.len() && job.pages[i] < upto {
                    job.copy(&shared.ram.ram, i);
                    i += 1;
                }
                // It can only fail for a range that is not ours or a process that is dying.
                if let Err(e) = shared.protect(Run { first: from, count: upto - from }, 0) {
                    eprintln!("warning: pages {from} to {upto} cannot be unlocked: {e}");
                }
                from = upto;
            }
            self.unlocked += 1;
        }
        shared.job.lock().unwrap_or_else(PoisonError::into_inner).take();
        // (The handler may still hold it for a moment: then the next job makes new lists.)
        if let Some(Job { pages, states, .. }) = Arc::into_inner(job) {
            let spare = Spare { pages, states, runs: std::mem::take(&mut self.runs) };
            *shared.spare.lock().unwrap_or_else(PoisonError::into_inner) = spare;
        }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Shared {
    fn protect(&self, run: Run, mode: u64) -> io::Result<()> {
        // A run may cross the border between two mappings.
        for (host, bytes, first) in self.ram.ram.mappings() {
            let (from, end) = (run.first.max(first), (run.first + run.count).min(first + bytes / PAGE as u64));
            if from >= end {
                continue;
            }
            let start = host + (from - first) * PAGE as u64;
            loop {
                let mut range = WriteProtect { start, len: (end - from) * PAGE as u64, mode };
                // SAFETY: the range lies in a registered mapping; the structure is the one of UFFDIO_WRITEPROTECT.
                match unsafe { uffdio_writeprotect(self.uffd.as_raw_fd(), &raw mut range) } {
                    Ok(_) => break,
                    Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
                    Err(e) => return Err(e.into()),
                }
            }
        }
        Ok(())
    }

    fn handle(&self, wake: &EventFd) {
        use std::os::fd::AsFd;
        let mut message = [0u8; 32];
        while !self.end.load(Ordering::SeqCst) {
            let mut fds =
                [PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN), PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            while let Ok(n) = nix::unistd::read(&self.uffd, &mut message) {
                if n == message.len() && message[0] == EVENT_PAGEFAULT {
                    let mut address = [0; 8];
                    address.copy_from_slice(&message[16..24]);
                    self.fault(u64::from_le_bytes(address));
                }
            }
        }
    }

    /// A write was trapped at this host address.
    fn fault(&self, address: u64) {
        let since = Instant::now();
        let found = self.ram.ram.mappings().find(|(host, bytes, _)| (*host..host + bytes).contains(&address));
        let Some((host, _, first)) = found else { return };
        let page = first + (address - host) / PAGE as u64;
        let job = self.job.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(job) = job
            && let Ok(i) = job.pages.binary_search(&page)
        {
            job.copy(&self.ram.ram, i);
        }
        if let Err(e) = self.protect(Run { first: page, count: 1 }, 0) {
            eprintln!("warning: page {page} cannot be unlocked: {e}");
        }
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.fault_ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_locked_together_and_far_pages_apart() {
        let run = |first, count| Run { first, count };
        let runs = |pages: &[u64]| {
            let mut runs = vec![run(9, 9)];
            find_runs(pages, &mut runs);
            runs
        };
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[5, 6, 7]), [run(5, 3)]);
        assert_eq!(runs(&[5, 9, 30, 1000]), [run(5, 5), run(30, 1), run(1000, 1)]);
        let mut count = 0;
        for r in runs(&[1, 2, 3, 12, 40, 41]) {
            count += r.count;
        }
        assert_eq!(count, 3 + 1 + 2, "a gap of nine pages was locked too");
    }
}
