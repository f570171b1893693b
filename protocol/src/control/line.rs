//! How requests and replies travel: as lines of JSON, and who calls with them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 1 << 20;

/// A reply as it stands on the line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply<T> {
    /// Done; what was asked for.
    Ok(T),
    /// Not done; a sentence that says why and what to do.
    Error(String),
}

/// Why a control call failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nothing answers on the socket.
    #[error("cannot talk to {socket}: {source}")]
    Io {
        /// The socket's path.
        socket: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other side answered with something else than the protocol.
    #[error("{socket} answered something that is not a reply: {why}")]
    Garbled {
        /// The socket's path.
        socket: String,
        /// What was wrong.
        why: String,
    },
    /// The other side said no.
    #[error("{0}")]
    Refused(String),
}

/// A connection to a control socket.
#[derive(Debug)]
pub struct ControlClient {
    socket: String,
    reader: BufReader<UnixStream>,
}

impl ControlClient {
    /// Connect; every later call takes at most `timeout` for writing and for reading.
    pub fn connect(socket: impl AsRef<Path>, timeout: Duration) -> Result<Self, ControlError> {
        let name = socket.as_ref().display().to_string();
        let io_error = |source| ControlError::Io { socket: name.clone(), source };
        let stream = UnixStream::connect(socket.as_ref()).map_err(io_error)?;
        stream.set_read_timeout(Some(timeout)).map_err(io_error)?;
        stream.set_write_timeout(Some(timeout)).map_err(io_error)?;
        Ok(Self { reader: BufReader::new(stream), socket: name })
    }

    /// Change the timeout of later calls.
    pub fn set_timeout(&mut self, timeout: Duration) -> Result<(), ControlError> {
        let io_error = |source| ControlError::Io { socket: self.socket.clone(), source };
        self.reader.get_ref().set_read_timeout(Some(timeout)).map_err(io_error)?;
        self.reader.get_ref().set_write_timeout(Some(timeout)).map_err(io_error)
    }

    /// A handle whose `shutdown` ends a call that waits in another thread.
    pub fn stream(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Send one request and wait for its reply.
    pub fn call<Q: Serialize, R: DeserializeOwned>(&mut self, request: &Q) -> Result<R, ControlError> {
        let line = encode_line(request);
        let timeout = self.reader.get_ref().read_timeout().ok().flatten();
        let io_error = |mut source: io::Error| {
            if let (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(after)) = (source.kind(), timeout) {
                let why = format!(
                    "no answer for {} s: it waits for something itself, its status says for what",
                    after.as_secs()
                );
                source = io::Error::new(source.kind(), why);
            }
            ControlError::Io { socket: self.socket.clone(), source }
        };
        self.reader.get_mut().write_all(&line).map_err(io_error)?;
        let reply = read_line(&mut self.reader).map_err(io_error)?;
        let Some(reply) = reply else {
            return Err(io_error(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection")));
        };
        let garbled = |why: String| ControlError::Garbled { socket: self.socket.clone(), why };
        match serde_json::from_slice::<Reply<R>>(&reply).map_err(|e| garbled(e.to_string()))? {
            Reply::Ok(value) => Ok(value),
            Reply::Error(why) => Err(ControlError::Refused(why)),
        }
    }
}

/// Connect, call once, close.
pub fn call_once<Q: Serialize, R: DeserializeOwned>(
    socket: impl AsRef<Path>,
    request: &Q,
    timeout: Duration,
) -> Result<R, ControlError> {
    ControlClient::connect(socket, timeout)?.call(request)
}

/// One message as a line, newline included. (Types that serde_json cannot write are a bug of ours; they become an error
/// reply rather than a panic.)
pub fn encode_line<T: Serialize>(message: &T) -> Vec<u8> {
    let mut line = serde_json::to_vec(message)
        .unwrap_or_else(|e| format!("{{\"error\":\"unwritable message: {e}\"}}").into_bytes());
    line.push(b'\n');
    line
}

/// Read one line of at most [`MAX_LINE`] bytes, without its newline; `None` at end of stream.
pub fn read_line(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = reader.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
    if n == 0 {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        let kind = if n > MAX_LINE { io::ErrorKind::InvalidData } else { io::ErrorKind::UnexpectedEof };
        return Err(io::Error::new(kind, format!("a control line ended after {n} bytes without a newline")));
    }
    line.pop();
    Ok(Some(line))
}
