//! Threads that must not wait for a processor: those that stop a guest for a cut, and those on the way from an output to its release.
//!
//! On a host whose processors are all busy with vCPUs a thread that wakes up waits for the end of somebody's slice, some milliseconds;
//! a pause or an output then waits as long at every hop. A thread that asks for slices of 0.1 ms preempts at once (Linux 6.12:
//! `sched_runtime` of sched_setattr(2) for SCHED_OTHER; older kernels ignore it), and a higher weight keeps it there.
#![allow(unsafe_code)]

/// Nice value of such a thread.
const NICE: i32 = -15;
/// Its slice, ns; the shortest that Linux grants.
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr` of sched_setattr(2), first version.
#[repr(C)]
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

/// Make the calling thread one; threads that it starts from now on are too. Without the privilege (CAP_SYS_NICE) nothing changes.
pub fn this_thread() {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: 0,
        flags: 0,
        nice: NICE,
        priority: 0,
        runtime: SLICE_NS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of a structure that lives until the call returns; 0 is the calling thread.
    unsafe { nix::libc::syscall(nix::libc::SYS_sched_setattr, 0, &raw const attr, 0) };
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_thread_that_may_becomes_urgent_and_one_that_may_not_goes_on() {
        std::thread::spawn(|| {
            super::this_thread();
            // Field 19 of stat is the nice value.
            let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
            let nice = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().nth(16).unwrap().to_owned();
            let nice: i32 = nice.parse().unwrap();
            assert!(nice == super::NICE || nice >= 0, "{nice}");
        })
        .join()
        .unwrap();
    }
}
