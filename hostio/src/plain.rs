//! The plainest way to keep a file busy, for measurements to be compared with: one thread, one io_uring, as many requests under way as asked for, no layer.
//! Nothing else uses it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use crate::Buffer;

/// Read (or write) pieces of `len` bytes for this long. Returns requests per second.
///
/// # Errors
/// No io_uring; what the file says; a request that ended early.
pub fn rate(
    file: &File,
    write: bool,
    len: usize,
    depth: usize,
    time: Duration,
    mut place: impl FnMut() -> u64,
) -> io::Result<f64> {
    let mut ring = IoUring::new(u32::try_from(depth).unwrap_or(32))?;
    let mut buffers: Vec<Buffer> = (0..depth).map(|_| Buffer::new(len)).collect();
    let size = u32::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let fd = types::Fd(file.as_raw_fd());
    let started = Instant::now();
    let (mut done, mut under_way) = (0_u64, 0);
    let mut free: Vec<usize> = (0..depth).collect();
    let mut failed = None;
    loop {
        let go_on = failed.is_none() && started.elapsed() < time;
        while go_on && let Some(slot) = free.pop() {
            let at = place();
            let pointer = buffers[slot].as_mut_ptr();
            let entry = if write {
                opcode::Write::new(fd, pointer, size).offset(at).build()
            } else {
                opcode::Read::new(fd, pointer, size).offset(at).build()
            };
            // SAFETY: the buffer is not touched and not freed before its request has ended: the loop ends only when none is under way.
            let pushed = unsafe { ring.submission().push(&entry.user_data(slot as u64)) };
            if pushed.is_err() {
                free.push(slot);
                break;
            }
            under_way += 1;
        }
        if under_way == 0 {
            break;
        }
        match ring.submit_and_wait(1) {
            Err(e) if e.raw_os_error() != Some(libc::EINTR) => {
                // What the kernel has it would still write to.
                std::mem::forget(buffers);
                return Err(e);
            }
            _ => {}
        }
        for entry in ring.completion() {
            under_way -= 1;
            free.push(entry.user_data() as usize);
            match entry.result() {
                result if result == size as i32 => done += 1,
                result if result < 0 => failed = Some(io::Error::from_raw_os_error(-result)),
                _ => failed = Some(io::Error::from(io::ErrorKind::UnexpectedEof)),
            }
        }
    }
    let rate = done as f64 / started.elapsed().as_secs_f64();
    failed.map_or(Ok(rate), Err)
}
