//! A board service as a process of its own, and a link that records what it is told.
#![allow(dead_code)] // each test file uses a part of it

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy_boards::client::{BoardLink, LinkConfig, LinkEvent};
use understudy_protocol::control::{BoardRequest, BoardStatus, call_once};
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// Wait for a condition, with a bound.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begun.elapsed() < PATIENCE, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A device behind a tty: both ends of a pty are held here, so that nothing is lost while no service has it open.
pub struct Device {
    pub master: File,
    pub slave: OwnedFd,
    pub path: PathBuf,
    pub heard: Vec<u8>,
}

impl Device {
    pub fn new() -> Self {
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
        let path = nix::unistd::ttyname(pty.slave.as_fd()).unwrap();
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(pty.master.as_fd(), flags).unwrap();
        Self { master: pty.master.into(), slave: pty.slave, path, heard: Vec::new() }
    }

    pub fn line(&self) -> String {
        format!("tty:{},115200", self.path.display())
    }

    /// Take what has come.
    pub fn listen(&mut self) -> &[u8] {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = self.master.read(&mut buf) {
            self.heard.extend_from_slice(&buf[..n]);
        }
        &self.heard
    }

    /// Say as much as the line takes; how much that was.
    pub fn say(&mut self, bytes: &[u8]) -> usize {
        self.master.write(bytes).unwrap_or(0)
    }

    pub fn expect(&mut self, expected: &[u8]) {
        until("the device has heard it all", || (self.listen().len() >= expected.len()).then_some(()));
        assert!(self.heard == expected, "heard {:?}", String::from_utf8_lossy(&self.heard));
    }
}

pub struct Board {
    pub dir: tempfile::TempDir,
    pub line: String,
    pub child: Option<Child>,
    pub address: String,
}

impl Board {
    /// A service on an ephemeral port, with a new key.
    pub fn start(line: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Key::generate(dir.path().join("key")).unwrap();
        let mut board = Self { dir, line: line.into(), child: None, address: "127.0.0.1:0".into() };
        board.run();
        board.address = board.status().listen;
        board
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-serial"));
        command.args(["run", "--machine", "m", "--device", "gps"]);
        command.args(["--listen", &self.address, "--line", &self.line]);
        command.arg("--key").arg(self.path("key"));
        command.arg("--state-dir").arg(self.path("state"));
        command.arg("--run-dir").arg(self.path("run"));
        command
    }

    /// Start the process and wait until it serves.
    pub fn run(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        self.child = Some(self.command().stderr(log).stdin(Stdio::null()).spawn().unwrap());
        let log = self.path("log");
        until("the service answers", || {
            let child = self.child.as_mut().unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the service ended: {status}: {}", fs::read_to_string(&log).unwrap());
            }
            let id = child.id().to_string();
            let pid = fs::read_to_string(self.path("run/serial-gps.pid")).ok()?;
            (pid.trim() == id).then(|| self.try_status())?
        });
    }

    pub fn signal(&mut self, signal: Signal) {
        kill(Pid::from_raw(self.child.as_ref().unwrap().id() as i32), signal).unwrap();
    }

    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    pub fn try_status(&self) -> Option<BoardStatus> {
        let socket = Layout::in_run_dir(self.path("run")).serial_socket("gps");
        call_once(socket, &BoardRequest::Status, Duration::from_secs(5)).ok()
    }

    pub fn status(&self) -> BoardStatus {
        self.try_status().unwrap()
    }

    pub fn config(&self) -> LinkConfig {
        LinkConfig {
            address: self.address.clone(),
            device: "gps".into(),
            machine: "m".into(),
            key_file: self.path("key"),
        }
    }

    pub fn link(&self, generation: u64, life: u64, tx_acked: u64, rx_delivered: u64) -> Link {
        Link::start(self.config(), generation, life, tx_acked, rx_delivered)
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub struct Link {
    pub link: Option<BoardLink>,
    events: Receiver<LinkEvent>,
    /// Input as handed over; its first byte is at `rx_from`.
    pub input: Vec<u8>,
    pub rx_from: u64,
    pub applied: u64,
    pub seen: Vec<LinkEvent>,
}

impl Link {
    pub fn start(config: LinkConfig, generation: u64, life: u64, tx_acked: u64, rx_delivered: u64) -> Self {
        let (send, events) = mpsc::channel();
        let handler = Box::new(move |event| drop(send.send(event)));
        let link = BoardLink::start(config, Generation(generation), Generation(life), tx_acked, rx_delivered, handler);
        Self { link: Some(link), events, input: Vec::new(), rx_from: rx_delivered, applied: tx_acked, seen: Vec::new() }
    }

    pub fn send(&self, offset: u64, bytes: &[u8]) {
        self.link.as_ref().unwrap().send(offset, bytes);
    }

    /// Take in what has happened, checking that input comes in order and once.
    pub fn take(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            match &event {
                LinkEvent::Input { offset, bytes } => {
                    assert_eq!(*offset, self.rx_from + self.input.len() as u64, "input in order and once");
                    self.input.extend_from_slice(bytes);
                }
                LinkEvent::OutputApplied { upto } => {
                    assert!(*upto > self.applied);
                    self.applied = *upto;
                }
                _ => self.seen.push(event),
            }
        }
    }

    pub fn wait<T>(&mut self, what: &str, find: impl Fn(&LinkEvent) -> Option<T>) -> T {
        until(what, || {
            self.take();
            let at = self.seen.iter().position(|e| find(e).is_some())?;
            find(&self.seen.remove(at))
        })
    }

    pub fn attached(&mut self) -> u64 {
        self.wait("the link is attached", |e| match e {
            LinkEvent::Attached { applied } => Some(*applied),
            _ => None,
        })
    }

    pub fn refused(&mut self) -> String {
        self.wait("the link is refused", |e| match e {
            LinkEvent::Refused { why } => Some(why.clone()),
            _ => None,
        })
    }

    pub fn fenced(&mut self) -> u64 {
        self.wait("the link is fenced", |e| match e {
            LinkEvent::Fenced { newer } => Some(newer.0),
            _ => None,
        })
    }

    pub fn applied_upto(&mut self, upto: u64) {
        until("the output is applied", || {
            self.take();
            (self.applied >= upto).then_some(())
        });
        assert_eq!(self.applied, upto);
    }

    pub fn expect_input(&mut self, expected: &[u8]) {
        until("the input has come", || {
            self.take();
            (self.input.len() >= expected.len()).then_some(())
        });
        assert_eq!(String::from_utf8_lossy(&self.input), String::from_utf8_lossy(expected));
    }

    pub fn stop(mut self) {
        self.link.take().unwrap().stop();
    }
}

/// Numbered lines, as many bytes as asked for.
pub fn numbered(from: usize, bytes: usize) -> Vec<u8> {
    let mut text = Vec::new();
    let mut n = from;
    while text.len() < bytes {
        text.extend_from_slice(format!("line {n:08}\n").as_bytes());
        n += 1;
    }
    text.truncate(bytes);
    text
}

pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
