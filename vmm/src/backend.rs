//! What is behind a serial port outside of the guest: a board, a file, a pseudo-terminal or nothing.
//!
//! A [`Backend`] is driven by its port's pump thread alone ([`crate::pump`]); it tells events through the [`Events`] it was given, from
//! whatever thread it likes. Only released output comes here.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use understudy_boards::client::{BoardLink, LinkConfig, LinkEvent};
use understudy_protocol::ids::Generation;

/// Where a backend tells what happened.
pub type Events = Arc<dyn Fn(LinkEvent) + Send + Sync>;

/// Positions and identity with which a port starts.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Generation under which the machine runs.
    pub generation: Generation,
    /// Generation of its cold boot.
    pub life: Generation,
    /// Output known to have arrived.
    pub tx_acked: u64,
    /// Input that the guest's UART has taken.
    pub rx_delivered: u64,
}

/// One end of a serial line outside of the machine.
pub trait Backend: Send {
    /// Send released output. Consecutive calls are contiguous. Returns the offset up to which it has certainly arrived, if that
    /// is known at once.
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Option<u64>;
    /// A committed checkpoint has taken all input before `upto`.
    fn acknowledge_input(&mut self, upto: u64);
    /// End it.
    fn stop(self: Box<Self>);
}

/// What `--serial0` and so on name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendConfig {
    /// A device at an interface board.
    Board {
        /// `HOST:PORT`.
        address: String,
        /// Device name.
        device: String,
        /// Key file.
        key: PathBuf,
    },
    /// Output is appended to a file; no input.
    File(PathBuf),
    /// A new pseudo-terminal; its name is in the log and in the status.
    Pty,
    /// Output vanishes; no input.
    None,
}

impl FromStr for BackendConfig {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        const HELP: &str = "use board:HOST:PORT/DEVICE,key=FILE or file:PATH or pty or none";
        match s.split_once(':') {
            None if s == "pty" => Ok(Self::Pty),
            None if s == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("board", rest)) => {
                let (target, key) = rest.split_once(",key=").ok_or(format!("\"{s}\" names no key file; {HELP}"))?;
                let (address, device) =
                    target.split_once('/').ok_or(format!("\"{s}\" names no device at the board; {HELP}"))?;
                if !address.contains(':') || device.is_empty() || key.is_empty() {
                    return Err(format!("\"{s}\" is incomplete; {HELP}"));
                }
                Ok(Self::Board { address: address.into(), device: device.into(), key: key.into() })
            }
            _ => Err(format!("\"{s}\" is no serial backend; {HELP}")),
        }
    }
}

impl BackendConfig {
    /// As the status shows it.
    pub fn describe(&self) -> String {
        match self {
            Self::Board { address, device, .. } => format!("board {address}/{device}"),
            Self::File(path) => format!("file {}", path.display()),
            Self::Pty => "pty".into(),
            Self::None => "none".into(),
        }
    }

    /// Check what can be checked before the machine runs.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Board { key, .. } if !key.exists() => {
                bail!("the key file {} does not exist; a board accepts nobody without the cluster's key", key.display())
            }
            Self::File(path) => {
                open_for_append(path)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Bring it up. Also returns what the status shows of it.
    pub fn start(&self, machine: &str, at: Start, events: Events) -> Result<(Box<dyn Backend>, String)> {
        let name = self.describe();
        Ok(match self {
            Self::None => (Box::new(Nothing), name),
            Self::File(path) => {
                (Box::new(FileEnd { file: open_for_append(path)?, path: path.clone(), failed: false }), name)
            }
            Self::Pty => {
                let pty = Pty::open(at.rx_delivered, events)?;
                let name = format!("pty {}", pty.name);
                (Box::new(pty), name)
            }
            Self::Board { address, device, key } => {
                let config = LinkConfig {
                    address: address.clone(),
                    device: device.clone(),
                    machine: machine.to_owned(),
                    key_file: key.clone(),
                };
                let link = BoardLink::start(
                    config,
                    at.generation,
                    at.life,
                    at.tx_acked,
                    at.rx_delivered,
                    Box::new(move |e| events(e)),
                );
                (Box::new(Board(link)), name)
            }
        })
    }
}

fn open_for_append(path: &PathBuf) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open {} for a port's output", path.display()))
}

struct Board(BoardLink);
impl Backend for Board {
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Option<u64> {
        self.0.send(offset, bytes);
        None
    }
    fn acknowledge_input(&mut self, upto: u64) {
        self.0.acknowledge_input(upto);
    }
    fn stop(self: Box<Self>) {
        self.0.stop();
    }
}

struct Nothing;
impl Backend for Nothing {
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Option<u64> {
        Some(offset + bytes.len() as u64)
    }
    fn acknowledge_input(&mut self, _upto: u64) {}
    fn stop(self: Box<Self>) {}
}

struct FileEnd {
    file: File,
    path: PathBuf,
    failed: bool,
}
impl Backend for FileEnd {
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let result = self.file.write_all(bytes);
        if let (Err(e), false) = (&result, self.failed) {
            eprintln!(
                "warning: cannot write a port's output to {}: {e}; output is lost until it can",
                self.path.display()
            );
        }
        self.failed = result.is_err();
        Some(offset + bytes.len() as u64)
    }
    fn acknowledge_input(&mut self, _upto: u64) {}
    fn stop(self: Box<Self>) {}
}

/// A pseudo-terminal, raw. Output that nobody reads is lost when the terminal's buffer is full, as on a line with nothing
/// attached.
struct Pty {
    master: File,
    /// Kept open, so that the master does not see a hang-up while nobody has the terminal open.
    _slave: File,
    name: String,
}

impl Pty {
    fn open(mut next: u64, events: Events) -> Result<Self> {
        let pty = nix::pty::openpty(None, None).context("cannot open a pseudo-terminal")?;
        let mut mode = nix::sys::termios::tcgetattr(&pty.slave).context("cannot read the terminal's mode")?;
        nix::sys::termios::cfmakeraw(&mut mode);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &mode)
            .context("cannot make the terminal raw")?;
        let name = nix::unistd::ttyname(&pty.slave).context("the terminal has no name")?.display().to_string();
        let master = File::from(pty.master);
        let mut reader = master.try_clone().context("cannot duplicate the terminal")?;
        std::thread::Builder::new()
            .name("pty".into())
            .stack_size(128 * 1024)
            .spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = reader.read(&mut buffer) {
                    events(LinkEvent::Input { offset: next, bytes: buffer[..n].to_vec() });
                    next += n as u64;
                }
            })
            .context("cannot start the terminal's thread")?;
        eprintln!("serial port on {name}");
        Ok(Self { master, _slave: File::from(pty.slave), name })
    }
}

impl Backend for Pty {
    fn send(&mut self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut fds =
                [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&self.master), nix::poll::PollFlags::POLLOUT)];
            let ready = nix::poll::poll(&mut fds, 100u16).unwrap_or(0);
            if ready == 0 {
                break;
            }
            let n = rest.len().min(256);
            match nix::unistd::write(&self.master, &rest[..n]) {
                Ok(n) if n > 0 => rest = &rest[n..],
                _ => break,
            }
        }
        let _ = self.master.as_raw_fd();
        Some(offset + bytes.len() as u64)
    }
    fn acknowledge_input(&mut self, _upto: u64) {}
    fn stop(self: Box<Self>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_written_as_the_help_says() {
        let parse = |s: &str| s.parse::<BackendConfig>();
        assert_eq!(
            parse("board:10.0.0.9:7701/gps,key=/etc/key"),
            Ok(BackendConfig::Board { address: "10.0.0.9:7701".into(), device: "gps".into(), key: "/etc/key".into() })
        );
        assert_eq!(parse("file:/tmp/x"), Ok(BackendConfig::File("/tmp/x".into())));
        assert_eq!(parse("pty"), Ok(BackendConfig::Pty));
        assert_eq!(parse("none"), Ok(BackendConfig::None));
        for bad in ["", "tty", "file:", "board:host/dev,key=k", "board:h:1,key=k", "board:h:1/d", "board:h:1/d,key="] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
