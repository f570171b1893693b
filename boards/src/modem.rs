//! Modem control lines of a tty: the few ioctls (`tty_ioctl(4)`) that nix has no safe function for.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc::{self, c_int};

nix::ioctl_write_ptr_bad!(tiocmbis, libc::TIOCMBIS, c_int);
nix::ioctl_write_ptr_bad!(tiocmbic, libc::TIOCMBIC, c_int);
nix::ioctl_read_bad!(fionread, libc::FIONREAD, c_int);
nix::ioctl_none_bad!(tiocsbrk, libc::TIOCSBRK);
nix::ioctl_none_bad!(tioccbrk, libc::TIOCCBRK);

/// Raise or drop data terminal ready.
pub fn set_dtr(tty: &File, on: bool) -> io::Result<()> {
    set(tty, libc::TIOCM_DTR, on)
}

/// Raise or drop request to send.
pub fn set_rts(tty: &File, on: bool) -> io::Result<()> {
    set(tty, libc::TIOCM_RTS, on)
}

/// Begin or end a break.
pub fn set_break(tty: &File, on: bool) -> io::Result<()> {
    let fd = tty.as_raw_fd();
    // SAFETY: `fd` is open as long as `tty` is borrowed; these two requests have no argument.
    let done = unsafe { if on { tiocsbrk(fd) } else { tioccbrk(fd) } };
    done.map(drop).map_err(io::Error::from)
}

/// Bytes that wait to be read from this end.
pub fn unread(tty: &File) -> io::Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: `fd` is open as long as `tty` is borrowed; the request writes one int, which lives across the call.
    unsafe { fionread(tty.as_raw_fd(), &mut count) }?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn set(tty: &File, bit: c_int, on: bool) -> io::Result<()> {
    let fd = tty.as_raw_fd();
    // SAFETY: `fd` is open as long as `tty` is borrowed; both requests read one int, which lives across the call.
    let done = unsafe { if on { tiocmbis(fd, &bit) } else { tiocmbic(fd, &bit) } };
    done.map(drop).map_err(io::Error::from)
}
