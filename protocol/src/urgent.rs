//! Threads that must not wait for a processor: those that stop a guest for a cut, and those on the way from an output to its release.
//!
//! On a host whose processors are all busy with vCPUs a thread that wakes up waits for the end of somebody's slice, some milliseconds;
//! a pause or an output then waits as long at every hop. Kernels that preempt lazily (`CONFIG_PREEMPT_LAZY`, Linux 6.13) let every
//! SCHED_OTHER thread wait for the next tick, however short its slice; only real-time threads preempt at once. So these threads are
//! SCHED_FIFO, of the lowest priority: corosync stays above them. What they do then is short; for what takes long they step back
//! ([`heavy`]), and whoever took more than a quarter of the time is not urgent for a while ([`pace`]): the guest comes first. Threads and
//! processes that a real-time thread starts begin as ordinary ones.
//!
//! A thread that somebody urgent is about to wait for, as a vCPU's that is to stop, is lifted by that somebody ([`Standing::lift`]) and steps back
//! by itself when nobody waits for it any more: else it could stand in the queue of its processor behind others, for as long as they like.
//!
//! On a host with one processor, and without the privilege (CAP_SYS_NICE), they only get more weight and short slices.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// sched(7): not shared out, first come first served.
const SCHED_OTHER: u32 = 0;
const SCHED_FIFO: u32 = 1;
/// Children are ordinary again.
const RESET_ON_FORK: u64 = 1;
/// The lowest of 1 to 99.
const PRIORITY: u32 = 1;
/// Nice value of a brisk thread, and of an urgent one where real-time threads are not allowed.
const NICE: i32 = -15;
/// Its slice, ns; the shortest that Linux grants (6.12; older kernels ignore it).
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of sched_setattr(2), first version.
#[repr(C)]
#[derive(Debug, Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    Ordinary,
    Brisk,
    Urgent,
}

/// [`pace`] looks back so far.
const WINDOW: Duration = Duration::from_millis(50);
/// An urgent thread uses at most one part in so many of it.
const SHARE: u32 = 4;

thread_local! {
    /// Nice value of this thread when it is ordinary.
    static USUAL: Cell<i32> = const { Cell::new(0) };
    static LEVEL: Cell<Level> = const { Cell::new(Level::Ordinary) };
    /// Beginning of the window, and the thread's processor time then.
    static SINCE: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
}
/// The host does not allow real-time threads; it need not be asked again. Where there is one processor they are not tried: whatever
/// they wait for would never run.
static REFUSED: LazyLock<AtomicBool> =
    LazyLock::new(|| AtomicBool::new(std::thread::available_parallelism().is_ok_and(|n| n.get() == 1)));

/// The calling thread preempts whatever is not real-time. For threads that wait most of the time and do little at once.
pub fn this_thread() {
    set(Level::Urgent);
}

/// The calling thread gets more of the processor than others and need not wait long for it. For work that somebody waits for.
pub fn brisk() {
    set(Level::Brisk);
}

/// The calling thread is what it was before it was urgent or brisk.
pub fn ordinary() {
    set(Level::Ordinary);
}

/// Do something; if it `takes_long`, not as an urgent thread.
pub fn heavy<T>(takes_long: bool, work: impl FnOnce() -> T) -> T {
    let before = LEVEL.get();
    if !takes_long || before != Level::Urgent {
        return work();
    }
    set(Level::Brisk);
    let result = work();
    set(before);
    result
}

/// The calling thread is urgent until this is dropped, however much it did before. For the time in which a guest stands still: nobody can be
/// waiting for the processor more than that.
#[derive(Debug)]
pub struct Held {
    before: Level,
    /// It belongs to its thread.
    _here: std::marker::PhantomData<*const ()>,
}

/// See [`Held`].
pub fn hold() -> Held {
    let before = LEVEL.get();
    set(Level::Urgent);
    Held { before, _here: std::marker::PhantomData }
}

impl Drop for Held {
    fn drop(&mut self) {
        set(self.before);
    }
}

/// Whether the calling thread is urgent now.
pub fn is_urgent() -> bool {
    LEVEL.get() == Level::Urgent
}

/// To be called now and then by an urgent thread whose work may become much: it is urgent while it takes little of the time.
pub fn pace() {
    if LEVEL.get() == Level::Ordinary || REFUSED.load(Ordering::Relaxed) {
        return;
    }
    let now = Instant::now();
    let Some((since, before)) = SINCE.get() else {
        return SINCE.set(Some((now, processor_time())));
    };
    let window = now.duration_since(since);
    if window >= WINDOW {
        let used = processor_time();
        SINCE.set(Some((now, used)));
        set(after(used.saturating_sub(before), window));
    }
}

/// What a thread that used so much of a window is next.
fn after(used: Duration, window: Duration) -> Level {
    if used * SHARE > window { Level::Brisk } else { Level::Urgent }
}

fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn set(level: Level) {
    if LEVEL.get() == level {
        return;
    }
    if LEVEL.get() == Level::Ordinary {
        USUAL.set(nice());
    }
    LEVEL.set(level);
    if level == Level::Urgent && !REFUSED.load(Ordering::Relaxed) {
        let fifo = SchedAttr { policy: SCHED_FIFO, flags: RESET_ON_FORK, priority: PRIORITY, ..Default::default() };
        if apply(fifo) {
            return;
        }
        REFUSED.store(true, Ordering::Relaxed);
    }
    if level == Level::Ordinary {
        apply(SchedAttr { policy: SCHED_OTHER, flags: RESET_ON_FORK, nice: USUAL.get(), ..Default::default() });
        return;
    }
    // Refused without the privilege: the thread stays as it is.
    apply(SchedAttr { policy: SCHED_OTHER, flags: RESET_ON_FORK, nice: NICE, runtime: SLICE_NS, ..Default::default() });
}

/// The calling thread's.
fn nice() -> i32 {
    // SAFETY: it takes numbers only. (It cannot fail for the calling thread.)
    unsafe { nix::libc::getpriority(nix::libc::PRIO_PROCESS, 0) }
}

fn apply(attr: SchedAttr) -> bool {
    apply_to(0, attr)
}

/// `thread` is a thread's id, or 0 for the calling one.
fn apply_to(thread: i32, attr: SchedAttr) -> bool {
    let attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..attr };
    // SAFETY: the kernel reads `size` bytes of a structure that lives until the call returns. (A thread that is no more is an error.)
    unsafe { nix::libc::syscall(nix::libc::SYS_sched_setattr, thread, &raw const attr, 0) == 0 }
}

fn attr_of(thread: i32) -> Option<SchedAttr> {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    // SAFETY: the kernel writes at most `size` bytes to a structure of that size.
    let done = unsafe { nix::libc::syscall(nix::libc::SYS_sched_getattr, thread, &raw mut attr, size, 0) == 0 };
    done.then_some(attr)
}

/// How a thread stands that others may lift.
#[derive(Debug, Default)]
pub struct Standing {
    /// The thread's id, and how it was scheduled before it was lifted.
    thread: OnceLock<i32>,
    before: Mutex<Option<SchedAttr>>,
    lifted: AtomicBool,
}

impl Standing {
    /// The calling thread is the one.
    pub fn this_is_the_thread(&self) {
        let _ = self.thread.set(nix::unistd::gettid().as_raw());
    }

    /// The caller is about to wait for the thread, which **is on its way already** to where it sleeps, and from there comes by
    /// [`Standing::step_back`] before it goes on: a lifted thread that works on takes a processor away from everybody, the caller
    /// included. A thread that is real-time by an administrator's will stays as it is.
    pub fn lift(&self) {
        if REFUSED.load(Ordering::Relaxed) {
            return;
        }
        let Some(thread) = self.thread.get() else { return };
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        if before.is_some() {
            return;
        }
        let Some(attr) = attr_of(*thread).filter(|attr| attr.policy == SCHED_OTHER) else { return };
        // Before it is so, and under the lock: who sees this waits here until there is something to step back from.
        self.lifted.store(true, Ordering::SeqCst);
        let fifo = SchedAttr { policy: SCHED_FIFO, flags: RESET_ON_FORK, priority: PRIORITY, ..Default::default() };
        if apply_to(*thread, fifo) {
            *before = Some(attr);
        } else {
            self.lifted.store(false, Ordering::SeqCst);
            REFUSED.store(true, Ordering::Relaxed);
        }
    }

    /// By the thread itself: nobody waits for it any more.
    pub fn step_back(&self) {
        if !self.lifted.load(Ordering::SeqCst) {
            return;
        }
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        self.lifted.store(false, Ordering::SeqCst);
        if let Some(before) = before.take() {
            apply(before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Policy and nice value of the calling thread: fields 41 and 19 of its `stat`.
    fn standing() -> (u32, i32) {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
        (fields[38].parse().unwrap(), fields[16].parse().unwrap())
    }

    fn policy() -> u32 {
        standing().0
    }

    /// Until it is told to end, a thread that steps back whenever it is asked to look.
    fn looker(
        standing: &std::sync::Arc<Standing>,
    ) -> (std::sync::mpsc::Sender<()>, std::sync::mpsc::Receiver<(u32, u32)>, std::thread::JoinHandle<()>) {
        let (ask, asked) = std::sync::mpsc::channel();
        let (answer, answers) = std::sync::mpsc::channel();
        let standing = standing.clone();
        let thread = std::thread::spawn(move || {
            standing.this_is_the_thread();
            answer.send((policy(), policy())).unwrap();
            while asked.recv().is_ok() {
                let lifted = policy();
                standing.step_back();
                answer.send((lifted, policy())).unwrap();
            }
        });
        (ask, answers, thread)
    }

    #[test]
    fn a_lifted_thread_steps_back_to_where_it_was() {
        let standing = std::sync::Arc::new(Standing::default());
        let (ask, answers, thread) = looker(&standing);
        assert_eq!(answers.recv().unwrap(), (SCHED_OTHER, SCHED_OTHER));
        ask.send(()).unwrap();
        assert_eq!(answers.recv().unwrap(), (SCHED_OTHER, SCHED_OTHER), "nobody has lifted it");
        let allowed = std::thread::spawn(|| {
            let _held = hold();
            policy() == SCHED_FIFO
        });
        let lifted = if allowed.join().unwrap() { SCHED_FIFO } else { SCHED_OTHER };
        for _ in 0..2 {
            standing.lift();
            standing.lift();
            ask.send(()).unwrap();
            assert_eq!(answers.recv().unwrap(), (lifted, SCHED_OTHER), "twice lifted is lifted once");
        }
        drop(ask);
        thread.join().unwrap();
    }

    #[test]
    fn who_was_held_urgent_is_what_it_was_before() {
        std::thread::spawn(|| {
            let before = standing();
            {
                let _held = hold();
                assert!(is_urgent());
            }
            assert!(!is_urgent());
            assert_eq!(standing(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_quarter_of_the_time_is_what_an_urgent_thread_may_use() {
        assert_eq!(after(WINDOW / 4, WINDOW), Level::Urgent);
        assert_eq!(after(WINDOW / 4 + Duration::from_micros(1), WINDOW), Level::Brisk);
        assert_eq!(after(Duration::from_millis(200), Duration::from_secs(1)), Level::Urgent);
    }

    #[test]
    fn a_thread_that_takes_too_much_is_not_urgent_until_it_takes_little() {
        std::thread::spawn(|| {
            this_thread();
            if standing().0 != SCHED_FIFO {
                eprintln!("SKIPPED: no real-time threads here, so nothing was proven");
                return;
            }
            pace();
            let begin = Instant::now();
            while standing().0 == SCHED_FIFO {
                pace();
                assert!(begin.elapsed() < Duration::from_secs(20), "it worked all the time and is still urgent");
            }
            while standing().0 != SCHED_FIFO {
                std::thread::park_timeout(WINDOW * 2);
                pace();
                assert!(begin.elapsed() < Duration::from_secs(40), "it slept all the time and is not urgent again");
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_that_may_becomes_urgent_steps_back_for_long_work_and_starts_ordinary_threads() {
        std::thread::spawn(|| {
            let ordinary = standing();
            this_thread();
            let urgent = standing();
            heavy(true, || {
                let (policy, nice) = standing();
                assert_eq!(policy, SCHED_OTHER);
                assert!(nice == NICE || nice >= 0, "{nice}");
            });
            // (A real-time thread's nice value means nothing.)
            assert_eq!(standing().0, urgent.0);
            heavy(false, || assert_eq!(standing().0, urgent.0));
            if urgent.0 == SCHED_FIFO {
                std::thread::spawn(move || assert_eq!(standing(), (SCHED_OTHER, 0))).join().unwrap();
                let child = std::process::Command::new("cat").arg("/proc/self/stat").output().unwrap();
                let stat = String::from_utf8(child.stdout).unwrap();
                let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
                assert_eq!((fields[38], fields[16]), ("0", "0"), "a program that it starts is an ordinary one");
            } else {
                // Without the privilege, or a little of it.
                assert!(urgent.1 == NICE || urgent == ordinary, "{urgent:?}");
            }
        })
        .join()
        .unwrap();
    }
}
