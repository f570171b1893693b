//! The numbered serial port: one counter, one writer at a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use lab_guest::line;
use rustix::fs::OFlags;
use rustix::termios::{self, ControlModes, OptionalActions, QueueSelector};

/// Lock that survives a panic of another thread: the data here are counters, valid after every single statement.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tell the kernel's console. There may be none that works, which `eprintln!` would answer with a panic.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "init: {text}");
}

/// Open a serial port raw, 8N1, no flow control, and forget what it received while nobody listened (the device does not
/// send before it saw the first line).
pub fn open_port(path: &str, baud: u32) -> io::Result<File> {
    let port = OpenOptions::new().read(true).write(true).custom_flags(OFlags::NOCTTY.bits() as i32).open(path)?;
    let mut settings = termios::tcgetattr(&port)?;
    settings.make_raw();
    settings.control_modes.insert(ControlModes::CLOCAL | ControlModes::CREAD);
    settings.control_modes.remove(ControlModes::CRTSCTS | ControlModes::HUPCL | ControlModes::CSTOPB);
    settings.set_speed(baud)?;
    termios::tcsetattr(&port, OptionalActions::Now, &settings)?;
    termios::tcflush(&port, QueueSelector::IFlush)?;
    Ok(port)
}

/// The port and the number of its next line.
pub struct Output {
    port: File,
    next: Mutex<u64>,
}

impl Output {
    /// Lines to `port`, from number 1.
    pub fn new(port: File) -> Self {
        Self { port, next: Mutex::new(1) }
    }

    /// Write one line and say how many bytes it had. `fields` runs under the lock, so that what it measures (a
    /// clock) is in the order of the numbers.
    pub fn emit(&self, kind: char, fields: impl FnOnce() -> String) -> usize {
        self.write_line(&mut lock(&self.next), kind, fields)
    }

    /// End a line that a former life of this machine may have begun. No line was written yet.
    pub fn fresh_line(&self) {
        let _guard = lock(&self.next);
        let _ = (&self.port).write_all(b"\n");
    }

    /// Write the last line, wait until it has left the port, and let no other follow it: comes back with the lock held
    /// for good.
    pub fn finish(&self, kind: char, fields: &str) {
        let mut next = lock(&self.next);
        self.write_line(&mut next, kind, || fields.to_string());
        let _ = termios::tcdrain(&self.port);
        std::mem::forget(next);
    }

    fn write_line(&self, next: &mut u64, kind: char, fields: impl FnOnce() -> String) -> usize {
        let text = line::encode(kind, *next, &fields());
        *next += 1;
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match (&self.port).write(rest) {
                Ok(0) => thread::sleep(Duration::from_millis(10)),
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Nothing can be said over a port that refuses; the line is finished when it works again.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
        text.len()
    }

    /// Bytes that arrived, at least one.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.port).read(buffer)
    }
}
