//! The places where a board's line can end: a tty, a pty of our own, a socket. All non-blocking.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{BaudRate, SetArg, cfmakeraw, cfsetspeed, tcgetattr, tcsetattr};

/// Where the line is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortName {
    /// `PATH`: a tty or the slave of a pty; set to raw, 115200 baud.
    Tty(PathBuf),
    /// `pty:LINK`: make a pty and a symbolic link to its slave, for a board that expects a tty.
    Pty(PathBuf),
    /// `tcp:HOST:PORT`.
    Tcp(String),
    /// `tcp-listen:ADDRESS:PORT`: one connection at a time.
    TcpListen(String),
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `unix-listen:PATH`: one connection at a time.
    UnixListen(PathBuf),
}

impl FromStr for PortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = match text.split_once(':') {
            Some(("pty", path)) => Self::Pty(path.into()),
            Some(("tcp", address)) => Self::Tcp(address.into()),
            Some(("tcp-listen", address)) => Self::TcpListen(address.into()),
            Some(("unix", path)) => Self::Unix(path.into()),
            Some(("unix-listen", path)) => Self::UnixListen(path.into()),
            _ if text.starts_with('/') => Self::Tty(text.into()),
            _ => {
                return Err(format!(
                    "{text:?} is not a port; give a tty's absolute path, pty:LINK, tcp:HOST:PORT, tcp-listen:ADDRESS:PORT, \
                     unix:PATH or unix-listen:PATH"
                ));
            }
        };
        Ok(port)
    }
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tty(path) => write!(f, "{}", path.display()),
            Self::Pty(path) => write!(f, "pty:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::TcpListen(address) => write!(f, "tcp-listen:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::UnixListen(path) => write!(f, "unix-listen:{}", path.display()),
        }
    }
}

/// What keeps the place alive between two connections.
#[derive(Debug)]
pub enum Place {
    /// Nothing: every opening starts from the name.
    Name(PortName),
    /// A pty: the master is the line. We hold the slave open as well, so that bytes wait while no board has it.
    Pty {
        /// Our end.
        master: OwnedFd,
        /// Kept open.
        slave: OwnedFd,
    },
    /// A listening TCP socket.
    TcpListen(TcpListener),
    /// A listening unix socket.
    UnixListen(UnixListener),
}

impl Place {
    /// Prepare the place; makes ptys and listening sockets.
    pub fn prepare(name: &PortName) -> io::Result<Self> {
        Ok(match name {
            PortName::Pty(link) => {
                let pty = openpty(None, None)?;
                make_raw(pty.slave.as_fd())?;
                let slave_path = nix::unistd::ttyname(pty.slave.as_fd())?;
                match std::fs::remove_file(link) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
                std::os::unix::fs::symlink(slave_path, link)?;
                Self::Pty { master: pty.master, slave: pty.slave }
            }
            PortName::TcpListen(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Self::TcpListen(listener)
            }
            PortName::UnixListen(path) => {
                let _ = std::fs::remove_file(path);
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Self::UnixListen(listener)
            }
            other => Self::Name(other.clone()),
        })
    }

    /// Open the line; `WouldBlock` when nobody has connected yet.
    pub fn open(&self) -> io::Result<Port> {
        let fd: OwnedFd = match self {
            Self::Pty { master, .. } => master.try_clone()?,
            Self::TcpListen(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Self::UnixListen(listener) => listener.accept()?.0.into(),
            Self::Name(PortName::Tcp(address)) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Self::Name(PortName::Unix(path)) => UnixStream::connect(path)?.into(),
            Self::Name(PortName::Tty(path)) => {
                let flags = (OFlag::O_NOCTTY | OFlag::O_NONBLOCK).bits();
                let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
                make_raw(file.as_fd())?;
                file.into()
            }
            Self::Name(name) => return Err(io::Error::other(format!("{name} was not prepared"))),
        };
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Port { fd })
    }
}

fn make_raw(tty: BorrowedFd) -> io::Result<()> {
    let mut settings = tcgetattr(tty)?;
    cfmakeraw(&mut settings);
    cfsetspeed(&mut settings, BaudRate::B115200)?;
    tcsetattr(tty, SetArg::TCSANOW, &settings)?;
    Ok(())
}

/// An open line.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
}

impl Port {
    /// Wait for bytes, or for room when `for_room`, at most `ms`; also wakes for `others`. Says which of them are ready.
    pub fn wait(&self, for_room: bool, others: &[BorrowedFd], ms: u16) -> Vec<bool> {
        let mut interest = PollFlags::POLLIN;
        if for_room {
            interest |= PollFlags::POLLOUT;
        }
        let mut fds = vec![PollFd::new(self.fd.as_fd(), interest)];
        fds.extend(others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
        // An interrupted wait is a short wait.
        let _ = poll(&mut fds, PollTimeout::from(ms));
        fds[1..].iter().map(|fd| fd.any().unwrap_or(false)).collect()
    }

    /// Bytes that are there; `Ok(None)` when there are none, an error when the line ended.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.fd, buffer) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side closed the line")),
            Ok(n) => Ok(Some(n)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Write what fits.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match nix::unistd::write(&self.fd, bytes) {
            Ok(n) => Ok(n),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_names_read_back_as_they_are_written() {
        for text in
            ["/dev/ttyS0", "pty:/run/line", "tcp:127.0.0.1:4000", "tcp-listen:[::1]:1", "unix:/a", "unix-listen:/b"]
        {
            assert_eq!(text.parse::<PortName>().unwrap().to_string(), text);
        }
        assert!("ttyS0".parse::<PortName>().is_err());
    }
}
