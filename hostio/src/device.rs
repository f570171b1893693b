//! What block devices are asked with ioctls: their node's cache, and SCSI persistent reservations.
//!
//! Reservations are *changed* through the kernel's own calls (`linux/pr.h`), which are there for SCSI disks, NVMe namespaces and device-mapper alike: for a
//! multipath device they register every path, which a command sent down one path would not. The kernel asks for APTPL by itself. There is no such call to
//! *read* them, so that is a SCSI command (`SG_IO`), which multipath passes to one of its paths. A device that does not take it (NVMe) counts as one
//! without reservations. A SCSI device that cannot keep registrations beyond a loss of power refuses the kernel's APTPL: it is registered with by `SG_IO` too.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc::{c_int, c_uchar, c_uint, c_ushort, c_void};

mod sys {
    use super::{Preempt, Registration, Reservation, SgHeader, c_int};
    // BLKFLSBUF, linux/fs.h: write back and forget what this node's page cache has of a block device.
    nix::ioctl_none_bad!(flush_buffers, 0x1261);
    // linux/pr.h
    nix::ioctl_write_ptr!(pr_register, b'p', 200, Registration);
    nix::ioctl_write_ptr!(pr_reserve, b'p', 201, Reservation);
    nix::ioctl_write_ptr!(pr_preempt, b'p', 203, Preempt);
    nix::ioctl_write_ptr!(pr_preempt_abort, b'p', 204, Preempt);
    // scsi/sg.h
    nix::ioctl_readwrite_bad!(sg_io, 0x2285, SgHeader);
    nix::ioctl_readwrite_bad!(sg_scsi_reset, 0x2284, c_int);
}

/// `struct pr_registration`
#[repr(C)]
struct Registration {
    old: u64,
    new: u64,
    flags: u32,
    pad: u32,
}

/// `struct pr_reservation`
#[repr(C)]
struct Reservation {
    key: u64,
    kind: u32,
    flags: u32,
}

/// `struct pr_preempt`. The kernel's documents call `old` the key that goes; its drivers for SCSI and NVMe send it as the sender's own, and `new` as the one that goes.
#[repr(C)]
struct Preempt {
    old: u64,
    new: u64,
    kind: u32,
    flags: u32,
}

/// `struct sg_io_hdr`
#[repr(C)]
struct SgHeader {
    interface_id: c_int,
    dxfer_direction: c_int,
    cmd_len: c_uchar,
    mx_sb_len: c_uchar,
    iovec_count: c_ushort,
    dxfer_len: c_uint,
    dxferp: *mut c_void,
    cmdp: *const c_uchar,
    sbp: *mut c_uchar,
    timeout: c_uint,
    flags: c_uint,
    pack_id: c_int,
    usr_ptr: *mut c_void,
    status: c_uchar,
    masked_status: c_uchar,
    msg_status: c_uchar,
    sb_len_wr: c_uchar,
    host_status: c_ushort,
    driver_status: c_ushort,
    resid: c_int,
    duration: c_uint,
    info: c_uint,
}

/// `PR_WRITE_EXCLUSIVE_REG_ONLY`
const WRITE_EXCLUSIVE_REGISTRANTS_ONLY: u32 = 3;
/// `PR_FL_IGNORE_KEY`
const IGNORE_KEY: u32 = 1;

/// The calls return an errno, or what the device answered: a SCSI status.
fn answered(result: nix::Result<c_int>) -> io::Result<()> {
    match result? {
        0 => Ok(()),
        // RESERVATION CONFLICT.
        0x18 => Err(io::Error::from_raw_os_error(nix::libc::EBADE)),
        other => Err(io::Error::other(format!("the device answered with status {other:#x}"))),
    }
}

/// REGISTER AND IGNORE EXISTING KEY; zero unregisters.
///
/// # Errors
/// The device has no reservations; what it says.
pub fn register(device: &File, key: u64) -> io::Result<()> {
    let argument = Registration { old: 0, new: key, flags: IGNORE_KEY, pad: 0 };
    // SAFETY: the argument has the call's layout and lives through it.
    answered(unsafe { sys::pr_register(device.as_raw_fd(), &argument) })
}

/// RESERVE: write exclusive, registrants only.
///
/// # Errors
/// `EBADE`: another has it; what the device says.
pub fn reserve(device: &File, key: u64) -> io::Result<()> {
    let argument = Reservation { key, kind: WRITE_EXCLUSIVE_REGISTRANTS_ONLY, flags: 0 };
    // SAFETY: the argument has the call's layout and lives through it.
    answered(unsafe { sys::pr_reserve(device.as_raw_fd(), &argument) })
}

/// PREEMPT AND ABORT.
///
/// # Errors
/// `EBADE`: this node or the other key is not registered; what the device says.
pub fn preempt_and_abort(device: &File, key: u64, other: u64) -> io::Result<()> {
    let argument = Preempt { old: key, new: other, kind: WRITE_EXCLUSIVE_REGISTRANTS_ONLY, flags: 0 };
    // SAFETY: the argument has the call's layout and lives through it.
    answered(unsafe { sys::pr_preempt_abort(device.as_raw_fd(), &argument) })
}

/// PREEMPT alone: what the other has under way goes on.
///
/// # Errors
/// As [`preempt_and_abort`].
pub fn preempt(device: &File, key: u64, other: u64) -> io::Result<()> {
    let argument = Preempt { old: key, new: other, kind: WRITE_EXCLUSIVE_REGISTRANTS_ONLY, flags: 0 };
    // SAFETY: the argument has the call's layout and lives through it.
    answered(unsafe { sys::pr_preempt(device.as_raw_fd(), &argument) })
}

/// LOGICAL UNIT RESET: ends what anybody has under way at a SCSI device.
///
/// # Errors
/// It needs CAP_SYS_ADMIN and CAP_SYS_RAWIO; what the device says.
pub fn reset_unit(device: &File) -> io::Result<()> {
    // SG_SCSI_RESET_DEVICE, and not more when that fails (SG_SCSI_RESET_NO_ESCALATE).
    let mut what: c_int = 1 | 0x100;
    // SAFETY: the argument is an int and lives through the call.
    unsafe { sys::sg_scsi_reset(device.as_raw_fd(), &mut what) }?;
    Ok(())
}

/// A SCSI command that sends `from`.
///
/// # Errors
/// The device takes no SCSI commands; it did not do it.
pub fn scsi_write(device: &File, cdb: &[u8], from: &[u8], patience: Duration) -> io::Result<()> {
    // SG_DXFER_TO_DEV
    // SAFETY: these are the slice's bytes, which in this direction nobody writes to.
    unsafe { scsi(device, cdb, -2, from.as_ptr().cast_mut(), from.len(), patience) }.map(drop)
}

/// A SCSI command that reads up to `to.len()` bytes. Returns how many came.
///
/// # Errors
/// The device takes no SCSI commands; it did not do it.
pub fn scsi_read(device: &File, cdb: &[u8], to: &mut [u8], patience: Duration) -> io::Result<usize> {
    // SG_DXFER_FROM_DEV
    // SAFETY: these are the slice's bytes, borrowed for writing.
    unsafe { scsi(device, cdb, -3, to.as_mut_ptr(), to.len(), patience) }
}

const CHECK_CONDITION: c_uchar = 2;
const UNIT_ATTENTION: u8 = 6;

/// In fixed or descriptor format (SPC-4 §4.5).
fn sense_key(sense: &[u8; 64]) -> u8 {
    (if sense[0] & 0x7f >= 0x72 { sense[1] } else { sense[2] }) & 0xf
}

/// # Safety
/// `data` has `len` bytes that live through the call, and may be written to unless the direction is to the device.
unsafe fn scsi(
    device: &File,
    cdb: &[u8],
    direction: c_int,
    data: *mut u8,
    len: usize,
    patience: Duration,
) -> io::Result<usize> {
    let mut attempts = 0;
    loop {
        let mut sense = [0; 64];
        let too_long = || io::Error::from(io::ErrorKind::InvalidInput);
        let mut header = SgHeader {
            interface_id: c_int::from(b'S'),
            dxfer_direction: direction,
            cmd_len: c_uchar::try_from(cdb.len()).map_err(|_| too_long())?,
            mx_sb_len: 64,
            iovec_count: 0,
            dxfer_len: c_uint::try_from(len).map_err(|_| too_long())?,
            dxferp: data.cast(),
            cmdp: cdb.as_ptr(),
            sbp: sense.as_mut_ptr(),
            timeout: c_uint::try_from(patience.as_millis()).unwrap_or(c_uint::MAX),
            flags: 0,
            pack_id: 0,
            usr_ptr: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sb_len_wr: 0,
            host_status: 0,
            driver_status: 0,
            resid: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: command, data and sense are as long as the header says and live through the call.
        unsafe { sys::sg_io(device.as_raw_fd(), &mut header) }?;
        match (header.status, header.host_status) {
            // Something happened to the device since it was asked last, such as a reset: it says so once to each who asks.
            (CHECK_CONDITION, _) if attempts < 4 && sense_key(&sense) == UNIT_ATTENTION => attempts += 1,
            (0, 0) => return Ok(len.saturating_sub(usize::try_from(header.resid).unwrap_or(0))),
            (0x18, _) => return Err(io::Error::from_raw_os_error(nix::libc::EBADE)),
            (status, host) => {
                let text = format!(
                    "a SCSI command ended with status {status:#x}, host status {host:#x}, sense {:02x?}",
                    &sense[..18]
                );
                return Err(io::Error::other(text));
            }
        }
    }
}

/// Forget what this node's page cache has of a block device, after writing what is dirty.
///
/// # Errors
/// It needs CAP_SYS_ADMIN; what the device says.
pub fn forget_cache(device: &File) -> io::Result<()> {
    // SAFETY: it takes no argument, and changes no memory of this process.
    unsafe { sys::flush_buffers(device.as_raw_fd()) }?;
    Ok(())
}
