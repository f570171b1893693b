//! The few system calls and shared words that no crate wraps: KVM ioctls with raw buffers, the exit record of a vCPU, the kick.
//!
//! This module and [`crate::memory`] (mapping) are the only ones with `unsafe`.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_EXIT_IO, KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};

const KVMIO: u8 = 0xAE;
nix::ioctl_write_ptr!(kvm_get_device_attr, KVMIO, 0xe2, kvm_device_attr);
nix::ioctl_write_ptr!(kvm_set_device_attr, KVMIO, 0xe1, kvm_device_attr);

/// Size of `struct kvm_xsave` without its flexible tail.
pub const XSAVE_LEN: usize = 4096;
const KVM_GET_XSAVE: libc::c_ulong = nix::request_code_read!(KVMIO, 0xa4, XSAVE_LEN) as libc::c_ulong;
const KVM_SET_XSAVE: libc::c_ulong = nix::request_code_write!(KVMIO, 0xa5, XSAVE_LEN) as libc::c_ulong;
const KVM_GET_XSAVE2: libc::c_ulong = nix::request_code_read!(KVMIO, 0xcf, XSAVE_LEN) as libc::c_ulong;

/// The extended FPU state of a vCPU, `size` bytes as `KVM_CAP_XSAVE2` says (0 when the capability is absent).
pub fn get_xsave(vcpu: &VcpuFd, size: usize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; size.max(XSAVE_LEN)];
    let request = if size == 0 { KVM_GET_XSAVE } else { KVM_GET_XSAVE2 };
    // SAFETY: KVM_GET_XSAVE writes 4096 bytes, KVM_GET_XSAVE2 as many as KVM_CAP_XSAVE2 says; the buffer has the larger of both.
    let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), request, buffer.as_mut_ptr()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(buffer) }
}

/// Load extended FPU state. `size` as in [`get_xsave`]; a shorter state is padded, a longer one is refused.
pub fn set_xsave(vcpu: &VcpuFd, size: usize, state: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0u8; size.max(XSAVE_LEN)];
    let Some(head) = buffer.get_mut(..state.len()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} bytes of FPU state, this host's KVM takes {}", state.len(), buffer.len()),
        ));
    };
    head.copy_from_slice(state);
    // SAFETY: KVM_SET_XSAVE reads at most as many bytes as KVM_CAP_XSAVE2 says (4096 without it); the buffer has them.
    let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, buffer.as_ptr()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn tsc_offset_attr(value: *const u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr: value as u64 }
}

/// The offset that KVM adds to the host's TSC for this vCPU; an error where KVM does not offer it (before Linux 5.16).
pub fn tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&raw mut value);
    // SAFETY: `attr.addr` points to a u64 that lives until the call returns; KVM writes exactly that.
    unsafe { kvm_get_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(value)
}

/// Set what [`tsc_offset`] reads.
pub fn set_tsc_offset(vcpu: &VcpuFd, value: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&raw const value);
    // SAFETY: `attr.addr` points to a u64 that lives until the call returns; KVM only reads it.
    unsafe { kvm_set_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(())
}

/// The host's time-stamp counter.
#[allow(unused_unsafe, reason = "the intrinsic became safe in a later compiler than the oldest supported one")]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 has RDTSC, and Linux leaves it to user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Tell KVM about a piece of guest RAM, or change its flags.
pub fn set_memory_slot(vm: &VmFd, region: kvm_userspace_memory_region) -> io::Result<()> {
    // SAFETY: the caller is crate::memory, whose mappings live as long as the VM that they are given to.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

const KVM_GET_DIRTY_LOG: libc::c_ulong =
    nix::request_code_write!(KVMIO, 0x42, size_of::<kvm_dirty_log>()) as libc::c_ulong;
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong =
    nix::request_code_readwrite!(KVMIO, 0xc0, size_of::<kvm_clear_dirty_log>()) as libc::c_ulong;

/// Read the dirty log of a slot of `bytes` bytes into `words` (one bit a page, 64 pages a word), without allocating. With
/// [`manual_dirty_log`] it is only read, without it is cleared and the pages are protected again.
pub fn get_dirty_log(vm: &VmFd, slot: u32, bytes: u64, words: &mut [u64]) -> io::Result<()> {
    if words.len() as u64 != (bytes / 4096).div_ceil(64) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the dirty bitmap has the wrong size"));
    }
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit a page of the slot, rounded up to whole longs: exactly `words` (just checked).
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const log) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Protect the pages that are set in `words` again and clear them in KVM's log; `words` begins at the slot's page `first` (a
/// multiple of 64). Only after [`manual_dirty_log`].
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first: u64, words: &[u64]) -> io::Result<()> {
    let mut clear = kvm_clear_dirty_log { slot, first_page: first, ..Default::default() };
    clear.num_pages = u32::try_from(words.len() * 64).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    clear.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: KVM reads `num_pages` bits from the bitmap, which are `words`, and does not write there.
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const clear) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Make reading the dirty log and protecting pages again two different things (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`); false where KVM
/// does not offer it (before Linux 5.1).
pub fn manual_dirty_log(vm: &VmFd) -> bool {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
    vm.enable_cap(&cap).is_ok()
}

/// What a vCPU came back with.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Port I/O; `data` holds `data.len() / size` accesses to the same port.
    Io {
        /// Port.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: usize,
        /// Guest → device, or device → guest (to be filled).
        write: bool,
        /// The data.
        data: &'a mut [u8],
    },
    /// Memory-mapped I/O.
    Mmio {
        /// Guest physical address.
        addr: u64,
        /// Guest → device.
        write: bool,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// Anything else: `KVM_EXIT_…`.
    Other(u32),
}

/// Decode the exit record after a successful `KVM_RUN`. (kvm-ioctls hides the access size of string I/O.)
pub fn exit(vcpu: &mut VcpuFd) -> Exit<'_> {
    let run: *mut kvm_run = vcpu.get_kvm_run();
    // SAFETY: `run` is the vCPU's mapping of its kvm_run page(s), exclusively borrowed through `vcpu` for the result's lifetime. The
    // union member that is read is the one that `exit_reason` names. `data_offset`, `size` and `count` were written by the kernel,
    // which keeps the data within the mapping (one page at KVM_PIO_PAGE_OFFSET).
    unsafe {
        match (*run).exit_reason {
            KVM_EXIT_IO => {
                let io = (*run).__bindgen_anon_1.io;
                let size = usize::from(io.size);
                let data = (run.cast::<u8>()).add(io.data_offset as usize);
                Exit::Io {
                    port: io.port,
                    size: size.max(1),
                    write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
                    data: std::slice::from_raw_parts_mut(data, size * io.count as usize),
                }
            }
            KVM_EXIT_MMIO => {
                let mmio = &mut (*run).__bindgen_anon_1.mmio;
                let len = (mmio.len as usize).min(mmio.data.len());
                Exit::Mmio { addr: mmio.phys_addr, write: mmio.is_write != 0, data: &mut mmio.data[..len] }
            }
            reason => Exit::Other(reason),
        }
    }
}

/// The sub-code of a `KVM_EXIT_INTERNAL_ERROR`, and the code of a `KVM_EXIT_SYSTEM_EVENT` (`type`), whichever applies.
pub fn exit_detail(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: both union members start with a u32; the kernel has written it for these exits, and stale bytes do no harm.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}

/// Makes a vCPU thread leave (or not enter) `KVM_RUN`.
#[derive(Debug)]
pub struct Kick {
    immediate_exit: *const AtomicU8,
    thread: std::sync::OnceLock<libc::pthread_t>,
}

// SAFETY: the pointer is only used for atomic accesses to a byte in a mapping that outlives every Kick (see `Kick::new`).
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// For the vCPU behind `vcpu`. The caller keeps the `VcpuFd`, and so its mapping, until the `Kick` is not used any more: the vCPU's
    /// thread is joined first, and its handle owns both.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        let byte: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        Self { immediate_exit: byte.cast(), thread: std::sync::OnceLock::new() }
    }

    /// Called once by the vCPU's thread.
    pub fn this_is_the_thread(&self) {
        // SAFETY: pthread_self has no preconditions.
        let _ = self.thread.set(unsafe { libc::pthread_self() });
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: see `new`; the kernel reads the byte once at entry, AtomicU8 has the layout of u8.
        unsafe { &*self.immediate_exit }
    }

    /// Allow `KVM_RUN` again. The vCPU's thread calls it *before* it looks at the stop flag: a kick that comes later stands.
    pub fn clear(&self) {
        self.byte().store(0, Ordering::SeqCst);
    }

    /// The next `KVM_RUN` completes what is pending and returns at once.
    pub fn set(&self) {
        self.byte().store(1, Ordering::SeqCst);
    }

    /// Get the thread out of the guest. The caller has set the stop flag before.
    pub fn kick(&self) {
        self.set();
        if let Some(thread) = self.thread.get() {
            // SAFETY: the thread is joined only by the owner of this Kick, after the last kick.
            unsafe { libc::pthread_kill(*thread, kick_signal()) };
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_: libc::c_int) {}

/// Install the handler of the kick signal: it does nothing, but it interrupts system calls.
pub fn install_kick_handler() -> io::Result<()> {
    // (nix knows no real-time signals.)
    // SAFETY: an all-zero sigaction is valid (no flags, empty mask); the handler only returns, which is async-signal-safe.
    let ret = unsafe {
        let mut raw: libc::sigaction = std::mem::zeroed();
        raw.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(kick_signal(), &raw const raw, std::ptr::null_mut())
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A shared, writable mapping of a file's first `len` bytes.
#[derive(Debug)]
pub struct SharedMap {
    base: *mut u8,
    len: usize,
}

// SAFETY: it is memory; who writes where and when is decided by the methods' `&mut self`.
unsafe impl Send for SharedMap {}

impl SharedMap {
    /// Map `len` bytes of `fd`.
    pub fn new(fd: RawFd, len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping chosen by the kernel; nothing else refers to it.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it. (Another process maps the file too, and only reads.)
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes are mapped as long as `self` lives, and `&mut self` makes this the only reference in this process.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }

    /// Copy `bytes` to `offset`; false if they do not fit.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) -> bool {
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        // SAFETY: the target lies within the mapping (just checked) and cannot overlap a Rust slice, which never points into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
        true
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
