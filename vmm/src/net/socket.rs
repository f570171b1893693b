//! Unix sockets behind a card: bare frames, for tests and for switches in user space. The framing is that of QEMU's `-netdev stream` ([`super::framed`])
//! and `-netdev dgram` (a datagram each).

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::backend::{NetBackend, Sent};
use super::framed::{Framed, prefix};
use super::packet::{HEADER, Packet};

/// Bytes that are read at once.
const PIECE: usize = 16 << 10;

/// Frames over a stream.
#[derive(Debug)]
pub struct Stream {
    path: String,
    socket: UnixStream,
    /// The rest of a frame that was sent in part.
    rest: Mutex<Vec<u8>>,
    arrived: Mutex<Framed>,
}

impl Stream {
    /// Connect to whoever listens at `path`.
    pub fn connect(path: &str) -> Result<Self> {
        let socket = UnixStream::connect(path).with_context(|| {
            format!("nobody listens at the socket {path}: start the switch that it belongs to first")
        })?;
        Self::new(path, socket)
    }

    fn new(path: &str, socket: UnixStream) -> Result<Self> {
        socket.set_nonblocking(true).context("the socket cannot be made one that does not wait")?;
        Ok(Self { path: path.to_owned(), socket, rest: Mutex::default(), arrived: Mutex::default() })
    }

    /// Write as much as goes. True: all of it.
    fn push(&self, rest: &mut Vec<u8>) -> io::Result<bool> {
        while !rest.is_empty() {
            match (&self.socket).write(rest) {
                Ok(n) => drop(rest.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => {
                    rest.clear();
                    return Err(e);
                }
            }
        }
        Ok(true)
    }
}

impl NetBackend for Stream {
    fn describe(&self) -> String {
        format!("stream {}", self.path)
    }

    fn send(&self, packet: &Packet) -> Sent {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        match self.push(&mut rest) {
            Ok(true) => {}
            Ok(false) => return Sent::Full,
            Err(e) => return Sent::Lost(e),
        }
        rest.extend(prefix(&packet.frame));
        rest.extend(&packet.frame);
        match self.push(&mut rest) {
            Ok(true) => Sent::Gone,
            Ok(false) => Sent::InPart,
            Err(e) => Sent::Lost(e),
        }
    }

    fn flush(&self) -> bool {
        let mut rest = self.rest.lock().unwrap_or_else(PoisonError::into_inner);
        self.push(&mut rest).unwrap_or(true)
    }

    fn receive(&self, _queue: u16, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let frame = arrived.pull().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            if let Some(frame) = frame {
                let Some((header, room)) = buffer.split_first_chunk_mut::<HEADER>() else { return Ok(None) };
                *header = [0; HEADER];
                let taken = frame.len().min(room.len());
                room[..taken].copy_from_slice(&frame[..taken]);
                return Ok(Some(HEADER + taken));
            }
            let mut piece = [0; PIECE];
            match (&self.socket).read(&mut piece) {
                Ok(0) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end has closed the socket"));
                }
                Ok(n) => arrived.push(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    fn waits_on(&self, _queue: u16) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn set_up(&self, _up: bool) -> io::Result<()> {
        Ok(())
    }
}

/// Frames as datagrams.
#[derive(Debug)]
pub struct Dgram {
    local: PathBuf,
    remote: PathBuf,
    socket: UnixDatagram,
}

impl Dgram {
    /// Receive at `local`, send to `remote` (which may come and go).
    pub fn open(local: &str, remote: &str) -> Result<Self> {
        // One that a process left that did not end in order.
        let is_socket = std::fs::symlink_metadata(local).is_ok_and(|file| file.file_type().is_socket());
        if is_socket && UnixDatagram::unbound().is_ok_and(|s| s.connect(local).is_err()) {
            let _ = std::fs::remove_file(local);
        }
        let socket = UnixDatagram::bind(local)
            .with_context(|| format!("cannot receive at the socket {local}: is somebody else there already?"))?;
        socket.set_nonblocking(true).context("the socket cannot be made one that does not wait")?;
        Ok(Self { local: local.into(), remote: remote.into(), socket })
    }
}

impl Drop for Dgram {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.local);
    }
}

impl NetBackend for Dgram {
    fn describe(&self) -> String {
        format!("dgram {} to {}", self.local.display(), self.remote.display())
    }

    fn send(&self, packet: &Packet) -> Sent {
        match self.socket.send_to(&packet.frame, &self.remote) {
            Ok(_) => Sent::Gone,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Sent::Full,
            Err(e) => Sent::Lost(e),
        }
    }

    fn receive(&self, _queue: u16, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let Some((header, frame)) = buffer.split_at_mut_checked(HEADER) else { return Ok(None) };
        header.fill(0);
        match self.socket.recv(frame) {
            Ok(n) => Ok(Some(HEADER + n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn waits_on(&self, _queue: u16) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn set_up(&self, _up: bool) -> io::Result<()> {
        Ok(())
    }
}
