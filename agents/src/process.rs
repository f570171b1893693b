//! A process that the agents started: found again by its pid file or its socket, ended for certain.
//!
//! Process ids are used again by the kernel. A process is therefore opened first (pidfd) and looked at afterwards: what was
//! checked is what will be signalled.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ocf::Deadline;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How one of our processes is recognised.
#[derive(Debug, Clone)]
pub struct Identity {
    /// File with its process id.
    pub pid_file: PathBuf,
    /// Its control socket.
    pub socket: PathBuf,
    /// File name of its executable.
    pub program: &'static str,
    /// Words of its command line: the machine's name, and whatever else tells it from others.
    pub words: Vec<String>,
}

/// A live process, held by a descriptor.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Identity {
    /// The process, if it lives: from the pid file, or else from whoever listens on the socket (an agent that was
    /// killed between starting it and writing the file).
    pub fn find(&self) -> Option<Process> {
        self.recorded_pid().or_else(|| self.listener()).and_then(|pid| self.open(pid)).or_else(|| {
            // A stale file must not hide a live listener.
            self.listener().and_then(|pid| self.open(pid))
        })
    }

    /// Whether the pid file exists: the process should be running.
    pub fn recorded(&self) -> bool {
        self.pid_file.exists()
    }

    /// Write the pid file; a reader never sees half of it.
    pub fn record(&self, pid: u32) -> io::Result<()> {
        write_durably(&self.pid_file, &format!("{pid}\n"))
    }

    fn recorded_pid(&self) -> Option<i32> {
        fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()
    }

    fn listener(&self) -> Option<i32> {
        let stream = UnixStream::connect(&self.socket).ok()?;
        let credentials = rustix::net::sockopt::socket_peercred(&stream).ok()?;
        Some(credentials.pid.as_raw_nonzero().get())
    }

    fn open(&self, pid: i32) -> Option<Process> {
        let pidfd = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let process = Process { pid, pidfd };
        (self.describes(pid) && !process.ended()).then_some(process)
    }

    /// Whether the command line of `pid` is that of our program for our machine. A zombie's is empty.
    fn describes(&self, pid: i32) -> bool {
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
            return false;
        };
        let words: Vec<_> = line.split(|b| *b == 0).map(String::from_utf8_lossy).collect();
        let is_program =
            |w: &std::borrow::Cow<'_, str>| Path::new(w.as_ref()).file_name().is_some_and(|f| f == self.program);
        words.iter().take(1).any(is_program) && self.words.iter().all(|own| words.iter().skip(1).any(|w| w == own))
    }
}

impl Process {
    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.wait(Deadline::after(Duration::ZERO))
    }

    /// Wait until it has ended; false when the deadline passes first.
    pub fn wait(&self, deadline: Deadline) -> bool {
        loop {
            let left = deadline.remaining();
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                // Cannot happen for a pidfd; believing that it lives is the safe side.
                Err(_) => return false,
            }
        }
    }

    /// SIGTERM, and after `patience` SIGKILL; false when it is still there at the deadline.
    pub fn end(&self, patience: Duration, deadline: Deadline) -> bool {
        // A signal that cannot be sent finds no process; the wait will tell.
        let _ = pidfd_send_signal(&self.pidfd, Signal::TERM);
        if self.wait(deadline.within(patience)) {
            return true;
        }
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        self.wait(deadline)
    }
}

/// Replace a file's content so that it is whole after a crash.
pub fn write_durably(path: &Path, text: &str) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Remove a file; one that is not there is fine.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn identity(dir: &Path, word: &str) -> Identity {
        Identity {
            pid_file: dir.join("pid"),
            socket: dir.join("socket"),
            program: "sleep",
            words: vec![word.to_owned()],
        }
    }

    #[test]
    fn a_process_is_found_by_its_file_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("/bin/sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let ours = identity(dir.path(), "1000");
        assert!(ours.find().is_none());
        ours.record(child.id()).unwrap();
        // exec may not have happened yet: until then it is still called as we are.
        let process = Deadline::after(Duration::from_secs(10)).wait_for(|| ours.find()).unwrap();
        assert_eq!(process.pid(), child.id() as i32);
        assert!(!process.ended());
        assert!(process.end(Duration::from_secs(10), Deadline::after(Duration::from_secs(10))));
        child.wait().unwrap();
        assert!(ours.find().is_none());
    }

    #[test]
    fn a_recycled_process_id_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("/bin/sleep").arg("1001").stdin(Stdio::null()).spawn().unwrap();
        let right = identity(dir.path(), "1001");
        right.record(child.id()).unwrap();
        assert!(Deadline::after(Duration::from_secs(10)).wait_for(|| right.find()).is_some());
        assert!(identity(dir.path(), "another-machine").find().is_none());
        let other_program = Identity { program: "understudy-vmm", ..right };
        assert!(other_program.find().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_zombie_does_not_live() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("/bin/sleep").arg("0").stdin(Stdio::null()).spawn().unwrap();
        let ours = identity(dir.path(), "0");
        ours.record(child.id()).unwrap();
        let gone = Deadline::after(Duration::from_secs(10)).wait_for(|| ours.find().is_none().then_some(()));
        assert!(gone.is_some());
        child.wait().unwrap();
    }
}
