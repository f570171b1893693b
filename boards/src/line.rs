//! The physical line: a tty, a pty of our own, or a TCP connection to a device (server). All non-blocking.
//!
//! A tty is set raw, and so that closing it does not drop DTR: a machine, a session, even this service may come and go
//! without the device noticing. A line that is lost (unplugged, closed by its other end) is opened again every half second
//! for as long as it takes; output waits meanwhile.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::termios::{self, BaudRate, ControlFlags, SetArg};
use understudy_protocol::board::Cell;

use crate::modem;

/// Between two attempts to open a lost line.
const RETRY: Duration = Duration::from_millis(500);
/// For a TCP connection to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// 8 data bits, no parity, 1 stop bit, as [`Cell::Format`] counts them.
const FORMAT_8N1: u32 = 0x108;

/// Which line; its text is what `--line` takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LineSpec {
    /// `tty:PATH[,BAUD]`: an existing terminal device.
    Tty {
        /// Device file.
        path: PathBuf,
        /// Bits per second.
        baud: u32,
    },
    /// `pty:LINK`: a new pseudo-terminal; LINK becomes a symbolic link to its other end.
    Pty {
        /// The link.
        link: PathBuf,
    },
    /// `tcp:HOST:PORT`: connect to a raw TCP port.
    Tcp {
        /// `HOST:PORT`.
        address: String,
    },
    /// `tcp-listen:ADDR:PORT`: let the device connect; one at a time.
    TcpListen {
        /// `ADDR:PORT`.
        address: String,
    },
}

impl FromStr for LineSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("tty", rest)) if rest.starts_with('/') => {
                let (path, baud) = rest.split_once(',').unwrap_or((rest, "115200"));
                let baud = baud.parse().ok().filter(|b| baud_rate(*b).is_some());
                let baud =
                    baud.ok_or(format!("{text:?} has a speed that ttys do not have; usual are 9600 and 115200"))?;
                Ok(Self::Tty { path: path.into(), baud })
            }
            Some(("pty", link)) if link.starts_with('/') => Ok(Self::Pty { link: link.into() }),
            Some(("tcp", address)) if address.contains(':') => Ok(Self::Tcp { address: address.into() }),
            Some(("tcp-listen", address)) if address.contains(':') => Ok(Self::TcpListen { address: address.into() }),
            _ => Err(format!(
                "{text:?} is not a line: give tty:/dev/ttyS0,115200 or pty:/path/of/link or tcp:HOST:PORT or \
                 tcp-listen:ADDRESS:PORT"
            )),
        }
    }
}

impl fmt::Display for LineSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tty { path, baud } => write!(f, "tty:{},{baud}", path.display()),
            Self::Pty { link } => write!(f, "pty:{}", link.display()),
            Self::Tcp { address } => write!(f, "tcp:{address}"),
            Self::TcpListen { address } => write!(f, "tcp-listen:{address}"),
        }
    }
}

/// A line, open or waiting to be.
#[derive(Debug)]
pub struct Line {
    spec: LineSpec,
    wire: Wire,
    listener: Option<TcpListener>,
    retry_at: Instant,
    cells: Vec<(Cell, u32)>,
}

#[derive(Debug)]
enum Wire {
    Lost,
    Tty(File),
    /// The other end is held open too: what is written waits there for whoever opens it, and its closing is no hang-up.
    Pty {
        master: File,
        slave: File,
    },
    Tcp(TcpStream),
}

impl Line {
    /// Open the line for the first time. What can only be a mistake in the configuration (no such tty, no right to listen)
    /// is an error; a TCP device that does not answer yet is not.
    pub fn open(spec: LineSpec) -> io::Result<Self> {
        let baud = if let LineSpec::Tty { baud, .. } = spec { baud } else { 115_200 };
        let cells = vec![(Cell::Baud, baud), (Cell::Format, FORMAT_8N1)];
        let mut line = Self { spec, wire: Wire::Lost, listener: None, retry_at: Instant::now(), cells };
        match &line.spec {
            LineSpec::Tcp { .. } => {}
            LineSpec::TcpListen { address } => {
                let listener = TcpListener::bind(address.as_str())?;
                listener.set_nonblocking(true)?;
                line.listener = Some(listener);
            }
            LineSpec::Tty { .. } | LineSpec::Pty { .. } => line.wire = line.make()?,
        }
        Ok(line)
    }

    /// Whether bytes can pass.
    pub fn is_open(&self) -> bool {
        !matches!(self.wire, Wire::Lost)
    }

    /// The states of the line.
    pub fn cells(&self) -> Vec<(Cell, u32)> {
        self.cells.clone()
    }

    /// What to poll: the wire, or what tells of a new one.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.wire {
            Wire::Lost => self.listener.as_ref().map(AsFd::as_fd),
            Wire::Tty(file) | Wire::Pty { master: file, .. } => Some(file.as_fd()),
            Wire::Tcp(stream) => Some(stream.as_fd()),
        }
    }

    /// When to call [`Self::reopen`]; `None` while the line is open.
    pub fn retry_in(&self) -> Option<Duration> {
        (!self.is_open()).then(|| self.retry_at.saturating_duration_since(Instant::now()))
    }

    /// Try to open a lost line again, when it is time. True when it is back.
    pub fn reopen(&mut self) -> bool {
        let due = self.listener.is_some() || Instant::now() >= self.retry_at;
        if self.is_open() || !due {
            return false;
        }
        self.retry_at = Instant::now() + RETRY;
        match self.make() {
            Ok(wire) => {
                self.wire = wire;
                true
            }
            Err(_) => false,
        }
    }

    /// Give up a wire that failed.
    pub fn lose(&mut self) {
        self.wire = Wire::Lost;
        self.retry_at = Instant::now() + RETRY;
    }

    /// Write what the line takes now; 0 when it takes nothing.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.wire {
            Wire::Lost => return Ok(0),
            Wire::Tty(file) | Wire::Pty { master: file, .. } => file.write(bytes),
            Wire::Tcp(stream) => stream.write(bytes),
        };
        match written {
            Err(e) if is_later(&e) => Ok(0),
            other => other,
        }
    }

    /// Read what is there; 0 when nothing is. The end of the stream is an error.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.wire {
            Wire::Lost => return Ok(0),
            Wire::Tty(file) | Wire::Pty { master: file, .. } => file.read(buf),
            Wire::Tcp(stream) => stream.read(buf),
        };
        match read {
            Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its other end closed it")),
            Err(e) if is_later(&e) => Ok(0),
            other => other,
        }
    }

    /// Before an orderly end: give whoever holds the other end of a pty, which ends with us, time to read what was
    /// written. (A tty's driver and a socket go on sending by themselves.)
    pub fn linger(&self, limit: Duration) {
        let Wire::Pty { slave, .. } = &self.wire else { return };
        let begun = Instant::now();
        while begun.elapsed() < limit && modem::unread(slave).is_ok_and(|n| n > 0) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Change a state of the line. Lines without that state (a pty has no DTR) remember it and do nothing.
    pub fn set(&mut self, cell: Cell, value: u32) -> io::Result<()> {
        self.cells.retain(|(c, _)| *c != cell);
        self.cells.push((cell, value));
        match &self.wire {
            Wire::Tty(file) => apply(file, cell, value),
            _ => Ok(()),
        }
    }

    fn make(&self) -> io::Result<Wire> {
        match &self.spec {
            LineSpec::Tty { path, .. } => {
                let flags = (nix::fcntl::OFlag::O_NOCTTY | nix::fcntl::OFlag::O_NONBLOCK).bits();
                let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
                make_raw(file.as_fd())?;
                for (cell, value) in &self.cells {
                    apply(&file, *cell, *value)?;
                }
                Ok(Wire::Tty(file))
            }
            LineSpec::Pty { link } => {
                let pty = nix::pty::openpty(None, None)?;
                make_raw(pty.slave.as_fd())?;
                let name = nix::unistd::ttyname(pty.slave.as_fd())?;
                replace_link(link, &name)?;
                let flags = nix::fcntl::OFlag::O_NONBLOCK;
                nix::fcntl::fcntl(pty.master.as_fd(), nix::fcntl::FcntlArg::F_SETFL(flags))?;
                Ok(Wire::Pty { master: pty.master.into(), slave: pty.slave.into() })
            }
            LineSpec::Tcp { address } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in address.to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                        Ok(stream) => return tcp_wire(stream),
                        Err(e) => last = e,
                    }
                }
                Err(last)
            }
            LineSpec::TcpListen { .. } => match &self.listener {
                Some(listener) => tcp_wire(listener.accept()?.0),
                None => Err(io::Error::other("it does not listen")),
            },
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let (LineSpec::Pty { link }, Wire::Pty { slave, .. }) = (&self.spec, &self.wire) {
            // A link to a pty that is gone would make the next program wonder. Anything but our own link stays.
            let ours = nix::unistd::ttyname(slave.as_fd()).ok();
            if ours.is_some() && fs::read_link(link).ok() == ours {
                let _ = fs::remove_file(link);
            }
        }
    }
}

fn is_later(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn tcp_wire(stream: TcpStream) -> io::Result<Wire> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(10));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(Wire::Tcp(stream))
}

/// Put the link in place in one step, over a former one of ours, but not over a file.
fn replace_link(link: &Path, target: &Path) -> io::Result<()> {
    if fs::symlink_metadata(link).is_ok_and(|m| !m.is_symlink()) {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no symbolic link stands there"));
    }
    let mut fresh = link.as_os_str().to_owned();
    fresh.push(".new");
    let _ = fs::remove_file(&fresh); // left over from a run that was killed in between
    std::os::unix::fs::symlink(target, &fresh)?;
    fs::rename(&fresh, link)
}

fn make_raw(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut settings = termios::tcgetattr(fd)?;
    termios::cfmakeraw(&mut settings);
    settings.control_flags.insert(ControlFlags::CLOCAL | ControlFlags::CREAD);
    settings.control_flags.remove(ControlFlags::HUPCL);
    Ok(termios::tcsetattr(fd, SetArg::TCSANOW, &settings)?)
}

/// Drive one state of a tty.
fn apply(tty: &File, cell: Cell, value: u32) -> io::Result<()> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{cell:?} cannot be {value:#x}"));
    let mut settings = termios::tcgetattr(tty)?;
    let flags = &mut settings.control_flags;
    match cell {
        Cell::Baud => {
            termios::cfsetspeed(&mut settings, baud_rate(value).ok_or_else(invalid)?)?;
        }
        Cell::Format => {
            flags.remove(ControlFlags::CSIZE | ControlFlags::PARENB | ControlFlags::PARODD | ControlFlags::CSTOPB);
            flags.insert(match value & 0xf {
                5 => ControlFlags::CS5,
                6 => ControlFlags::CS6,
                7 => ControlFlags::CS7,
                8 => ControlFlags::CS8,
                _ => return Err(invalid()),
            });
            flags.insert(match value >> 4 & 0xf {
                0 => ControlFlags::empty(),
                1 => ControlFlags::PARENB | ControlFlags::PARODD,
                2 => ControlFlags::PARENB,
                _ => return Err(invalid()),
            });
            match value >> 8 {
                1 => {}
                2 => flags.insert(ControlFlags::CSTOPB),
                _ => return Err(invalid()),
            }
        }
        Cell::Dtr => return modem::set_dtr(tty, value != 0),
        Cell::Rts => return modem::set_rts(tty, value != 0),
        Cell::Break => return modem::set_break(tty, value != 0),
    }
    Ok(termios::tcsetattr(tty, SetArg::TCSADRAIN, &settings)?)
}

fn baud_rate(baud: u32) -> Option<BaudRate> {
    Some(match baud {
        50 => BaudRate::B50,
        75 => BaudRate::B75,
        110 => BaudRate::B110,
        134 => BaudRate::B134,
        150 => BaudRate::B150,
        200 => BaudRate::B200,
        300 => BaudRate::B300,
        600 => BaudRate::B600,
        1200 => BaudRate::B1200,
        1800 => BaudRate::B1800,
        2400 => BaudRate::B2400,
        4800 => BaudRate::B4800,
        9600 => BaudRate::B9600,
        19_200 => BaudRate::B19200,
        38_400 => BaudRate::B38400,
        57_600 => BaudRate::B57600,
        115_200 => BaudRate::B115200,
        230_400 => BaudRate::B230400,
        460_800 => BaudRate::B460800,
        500_000 => BaudRate::B500000,
        576_000 => BaudRate::B576000,
        921_600 => BaudRate::B921600,
        1_000_000 => BaudRate::B1000000,
        1_152_000 => BaudRate::B1152000,
        1_500_000 => BaudRate::B1500000,
        2_000_000 => BaudRate::B2000000,
        2_500_000 => BaudRate::B2500000,
        3_000_000 => BaudRate::B3000000,
        3_500_000 => BaudRate::B3500000,
        4_000_000 => BaudRate::B4000000,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_written_as_it_is_read() {
        for text in ["tty:/dev/ttyS0,9600", "pty:/run/gps", "tcp:10.0.0.7:4001", "tcp-listen:[::]:4001"] {
            assert_eq!(text.parse::<LineSpec>().unwrap().to_string(), text);
        }
        assert_eq!("tty:/dev/ttyS0".parse::<LineSpec>().unwrap().to_string(), "tty:/dev/ttyS0,115200");
        for bad in ["", "tty:ttyS0", "tty:/dev/ttyS0,9601", "tty:/dev/ttyS0,x", "pty:x", "tcp:host", "usb:1"] {
            assert!(bad.parse::<LineSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pty_keeps_bytes_for_whoever_opens_it_later_and_survives_its_closing() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("gps");
        std::os::unix::fs::symlink("/nonexistent", &link).unwrap();
        let mut line = Line::open(LineSpec::Pty { link: link.clone() }).unwrap();
        assert_eq!(line.write(b"\x03\r\nraw").unwrap(), 6);
        for _ in 0..2 {
            let mut device = OpenOptions::new().read(true).write(true).open(&link).unwrap();
            device.write_all(b"x").unwrap();
        }
        let mut buf = [0; 16];
        // The kernel moves bytes from one end of a pty to the other in the background.
        let (mut got, until) = (0, std::time::Instant::now() + std::time::Duration::from_secs(10));
        while got < 2 {
            match line.read(&mut buf) {
                Ok(n) => got += n,
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock, "a closed device is no hang-up"),
            }
            assert!(std::time::Instant::now() < until, "{got} of 2 bytes arrived");
            std::thread::yield_now();
        }
        let mut device = File::open(&link).unwrap();
        device.read_exact(&mut buf[..6]).unwrap();
        assert_eq!(&buf[..6], b"\x03\r\nraw");
        drop(line);
        assert!(fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn a_file_in_the_links_place_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("gps");
        fs::write(&link, "precious").unwrap();
        assert!(Line::open(LineSpec::Pty { link: link.clone() }).is_err());
        assert_eq!(fs::read(&link).unwrap(), b"precious");
    }

    #[test]
    fn a_missing_tty_is_an_error() {
        let spec = LineSpec::Tty { path: "/dev/no-such-tty".into(), baud: 9600 };
        assert_eq!(Line::open(spec).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_tty_takes_every_format_and_refuses_impossible_ones() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(pty.slave.as_fd()).unwrap();
        let mut line = Line::open(LineSpec::Tty { path, baud: 9600 }).unwrap();
        line.set(Cell::Baud, 115_200).unwrap();
        line.set(Cell::Format, 0x227).unwrap();
        let set = termios::tcgetattr(pty.slave.as_fd()).unwrap();
        assert_eq!(termios::cfgetospeed(&set), BaudRate::B115200);
        for (cell, value) in [(Cell::Baud, 7), (Cell::Format, 0x109), (Cell::Format, 0x308), (Cell::Format, 0x138)] {
            assert!(line.set(cell, value).is_err(), "{cell:?} {value:#x}");
        }
    }
}
