//! A TCP stream whose two ends have proved to each other that they hold the same key, and which nobody between them can
//! read or change.
//!
//! The Noise protocol framework (revision 34), pattern `NNpsk0`: ephemeral X25519 keys give forward secrecy, the
//! pre-shared key gives authentication. The handshake:
//!
//! ```text
//! connect                                              accept
//!   "USTYhs1\n" · u8 len · protocol name   ──────►     (in clear, so that a version mismatch can be named)
//!   u16 len · Noise message 1 (psk, e)     ──────►     wrong key: it does not decrypt
//!                                          ◄──────     u8 verdict (0 go on, 1 wrong key, 2 other protocol) ·
//!                                                      u16 len · Noise message 2 (e, ee), or the protocol spoken here
//!   u16 len · first transport message      ──────►     proves that message 1 was not a replay
//! ```
//! The clear parts are bound into the handshake as its prologue: whoever changes them makes it fail. A verdict other than 0
//! is not authenticated; it can only spoil a connection, which whoever can forge it can do anyway.
//!
//! Afterwards each direction is a sequence of `u16 len (big endian) · ciphertext` with 1 to 65519 bytes of content and a
//! 16-byte tag, numbered by an implicit 64-bit counter as nonce. The two directions share nothing that changes, so
//! [`SecureStream::split`] gives two halves for two threads.
//!
//! On a link that nobody else can reach, two ends may agree to go on in clear after the handshake ([`SecureStream::in_clear`], under a
//! protocol name of its own): it is still proved who is there, but whoever can change the link's bytes can change memory.
//!
//! An end of stream is not authenticated: the protocol above must know whether it may end here (records do).

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use snow::{HandshakeState, StatelessTransportState};

use crate::key::Key;

/// Protocol name of replication between `understudy-replicator` processes.
pub const REPLICATION: &str = "understudy-replication/1";
/// The same with everything after the handshake in clear: [`SecureStream::in_clear`].
pub const REPLICATION_IN_CLEAR: &str = "understudy-replication/1-unencrypted";
/// Replication over several paths, each of which is such a stream.
pub const REPLICATION_PATHS: &str = "understudy-replication/1-paths";
/// The same in clear.
pub const REPLICATION_PATHS_IN_CLEAR: &str = "understudy-replication/1-paths-unencrypted";
/// Protocol name of the sessions between a machine and a board.
pub const BOARD: &str = "understudy-board/1";

/// Most content bytes of one encrypted message: Noise's limit of 65535 less the tag.
pub const MAX_CONTENT: usize = 65535 - TAG;

// AES-256-GCM with ring is twice as fast as ChaCha20-Poly1305 on processors with AES-NI, which KVM hosts are.
const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// Messages under one key: the Noise specification (§ 14) advises against more than 2^56 bytes of AES-GCM. At 10 Gbit/s that
/// is nearly two years; the stream then fails, and reconnecting makes new keys.
const MAX_MESSAGES: u64 = 1 << 40;
const HELLO: &[u8; 8] = b"USTYhs1\n";
const TAG: usize = 16;
const MAX_NAME: usize = 64;
/// Handshake messages of NNpsk0 are 48 bytes; nothing larger is read before the peer has proved the key.
const MAX_HANDSHAKE: usize = 256;
/// Content that one `write` call encrypts before it goes to the socket: four messages.
const BATCH: usize = 4 * MAX_CONTENT;

const GO_ON: u8 = 0;
const WRONG_KEY: u8 = 1;
const OTHER_PROTOCOL: u8 = 2;

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For the whole handshake.
    pub handshake: Duration,
    /// A peer that has not acknowledged sent data (or a keepalive probe) for so long is dead: reads and writes fail with
    /// [`io::ErrorKind::TimedOut`]. The kernel looks at idle connections once a second, so below 2 s only connections that
    /// carry data (or the protocol's own pings) are noticed that early.
    pub dead_peer: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(5), dead_peer: Duration::from_secs(3) }
    }
}

/// Why there is no secure stream.
#[derive(Debug, thiserror::Error)]
pub enum SecureError {
    /// The keys differ (or somebody changes the bytes on their way).
    #[error("the peer {peer} does not hold the same key: compare {file} on both sides")]
    WrongKey {
        /// The other side.
        peer: String,
        /// This side's key file.
        file: String,
    },
    /// Another protocol, or another version of it.
    #[error(
        "the peer {peer} speaks {theirs}, this side speaks {ours}: check address and port, and give both sides the same release and the \
         same choice of encryption"
    )]
    OtherProtocol {
        /// The other side.
        peer: String,
        /// What it speaks.
        theirs: String,
        /// What was asked of it.
        ours: String,
    },
    /// Not Understudy.
    #[error("the peer {peer} does not answer as Understudy does: check address and port")]
    NotUnderstudy {
        /// The other side.
        peer: String,
    },
    /// It took too long.
    #[error("the peer {peer} did not finish the handshake within {} ms", .timeout.as_millis())]
    Timeout {
        /// The other side.
        peer: String,
        /// The limit.
        timeout: Duration,
    },
    /// The connection broke.
    #[error("the connection with {peer} broke during the handshake: {cause}")]
    Io {
        /// The other side.
        peer: String,
        /// What the kernel said.
        cause: io::Error,
    },
}

/// An authenticated, encrypted stream.
#[derive(Debug)]
pub struct SecureStream {
    reader: SecureReader,
    writer: SecureWriter,
}

/// The receiving half: [`io::Read`]. A read timeout set on it loses nothing: the next read goes on where this one stopped.
#[derive(Debug)]
pub struct SecureReader {
    stream: TcpStream,
    state: Arc<StatelessTransportState>,
    nonce: u64,
    /// Ciphertext as it came; `cipher_at..cipher_end` is not yet decrypted.
    cipher: Box<[u8]>,
    cipher_at: usize,
    cipher_end: usize,
    /// Content of the message that is being handed out; `plain_at..plain_end` is left.
    plain: Box<[u8]>,
    plain_at: usize,
    plain_end: usize,
    /// What comes is the content itself.
    clear: bool,
    broken: bool,
}

/// The sending half: [`io::Write`]. Every `write` goes to the socket at once (there is nothing to flush): write whole
/// records. After an error it stays broken, since half a message may have left.
#[derive(Debug)]
pub struct SecureWriter {
    stream: TcpStream,
    state: Arc<StatelessTransportState>,
    nonce: u64,
    cipher: Vec<u8>,
    clear: bool,
    broken: bool,
}

impl SecureStream {
    /// The connecting side's handshake. `protocol` is e.g. [`BOARD`], at most 64 bytes.
    pub fn connect(stream: TcpStream, key: &Key, protocol: &str, timeouts: Timeouts) -> Result<Self, SecureError> {
        let mut shake = Shake::new(stream, key, timeouts)?;
        let mut noise = shake.noise(key, protocol, true)?;
        let mut first = HELLO.to_vec();
        first.push(protocol.len() as u8); // at most MAX_NAME, checked by `noise`
        first.extend_from_slice(protocol.as_bytes());
        let mut message = [0; MAX_HANDSHAKE];
        let n = shake.crypto(noise.write_message(&[], &mut message))?;
        append_message(&mut first, &message[..n]);
        shake.send(&first)?;

        let [verdict] = shake.receive::<1>()?;
        let answer = shake.receive_message()?;
        match verdict {
            GO_ON => {}
            WRONG_KEY => return Err(shake.wrong_key()),
            OTHER_PROTOCOL => return Err(shake.other_protocol(&answer, protocol)),
            _ => return Err(SecureError::NotUnderstudy { peer: shake.peer }),
        }
        // The peer has accepted our key, so a failure here is an attacker or damage; for a person it is the same advice.
        noise.read_message(&answer, &mut message).map_err(|_| shake.wrong_key())?;
        let mut this = shake.finish(noise)?;
        let confirm = this.writer.send(&[]);
        confirm.map_err(|cause| SecureError::Io { peer: this.peer_name(), cause })?;
        Ok(this)
    }

    /// The accepting side's handshake.
    pub fn accept(stream: TcpStream, key: &Key, protocol: &str, timeouts: Timeouts) -> Result<Self, SecureError> {
        Self::accept_one_of(stream, key, &[protocol], timeouts).map(|(this, _)| this)
    }

    /// The same where several protocols are spoken; tells which the peer asked for. It is told of the first if it asks for none of them.
    pub fn accept_one_of(
        stream: TcpStream,
        key: &Key,
        protocols: &[&str],
        timeouts: Timeouts,
    ) -> Result<(Self, usize), SecureError> {
        let mut shake = Shake::new(stream, key, timeouts)?;
        if &shake.receive::<8>()? != HELLO {
            return Err(SecureError::NotUnderstudy { peer: shake.peer });
        }
        let [len] = shake.receive::<1>()?;
        if usize::from(len) > MAX_NAME {
            return Err(SecureError::NotUnderstudy { peer: shake.peer });
        }
        let mut theirs = vec![0; usize::from(len)];
        shake.receive_into(&mut theirs)?;
        let offer = shake.receive_message()?;
        let Some(which) = protocols.iter().position(|protocol| theirs == protocol.as_bytes()) else {
            let ours = protocols.first().copied().unwrap_or_default();
            shake.refuse(OTHER_PROTOCOL, ours.as_bytes());
            return Err(shake.other_protocol(&theirs, ours));
        };
        let mut noise = shake.noise(key, protocols[which], false)?;
        let mut message = [0; MAX_HANDSHAKE];
        if noise.read_message(&offer, &mut message).is_err() {
            shake.refuse(WRONG_KEY, &[]);
            return Err(shake.wrong_key());
        }
        let n = shake.crypto(noise.write_message(&[], &mut message))?;
        let mut answer = vec![GO_ON];
        append_message(&mut answer, &message[..n]);
        shake.send(&answer)?;

        let confirm = shake.receive_message()?;
        let wrong = shake.wrong_key();
        let mut this = shake.finish(noise)?;
        if this.reader.state.read_message(0, &confirm, &mut message) != Ok(0) {
            return Err(wrong);
        }
        this.reader.nonce = 1;
        Ok((this, which))
    }

    /// From here on neither side encrypts. Both must do it, right after the handshake; a protocol name of its own makes sure of that.
    pub fn in_clear(mut self) -> Self {
        (self.reader.clear, self.writer.clear) = (true, true);
        self
    }

    /// Two halves for two threads.
    pub fn split(self) -> (SecureReader, SecureWriter) {
        (self.reader, self.writer)
    }

    /// The other side's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.reader.stream.peer_addr()
    }

    /// A handle on the socket for [`TcpStream::shutdown`] from another thread (reading or writing it breaks the stream).
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.reader.stream.try_clone()
    }

    fn peer_name(&self) -> String {
        name_of(&self.reader.stream)
    }
}

impl Read for SecureStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buf)
    }
}

impl Write for SecureStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.writer.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SecureReader {
    /// Let reads fail with [`io::ErrorKind::WouldBlock`] when nothing came for so long; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// See [`SecureStream::socket`].
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Large reads go past the buffer, which is empty.
    fn read_clear(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = if buf.len() >= self.plain.len() {
                self.stream.read(buf)
            } else {
                self.stream.read(&mut self.plain).map(|n| {
                    let now = n.min(buf.len());
                    buf[..now].copy_from_slice(&self.plain[..now]);
                    (self.plain_at, self.plain_end) = (now, n);
                    now
                })
            };
            match read {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Decrypt the next message if all of it is here.
    fn decrypt(&mut self) -> io::Result<bool> {
        let have = &self.cipher[self.cipher_at..self.cipher_end];
        let Some((len, rest)) = have.split_first_chunk::<2>() else {
            return Ok(false);
        };
        let len = usize::from(u16::from_be_bytes(*len));
        let Some(message) = rest.get(..len) else {
            return Ok(false);
        };
        let n = self.state.read_message(self.nonce, message, &mut self.plain).map_err(|_| {
            self.broken = true;
            io::Error::new(io::ErrorKind::InvalidData, "the encrypted stream was changed on its way")
        })?;
        self.nonce += 1;
        self.cipher_at += 2 + len;
        (self.plain_at, self.plain_end) = (0, n);
        Ok(true)
    }
}

impl Read for SecureReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if self.broken {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the encrypted stream is broken"));
            }
            if self.plain_at < self.plain_end {
                let n = buf.len().min(self.plain_end - self.plain_at);
                buf[..n].copy_from_slice(&self.plain[self.plain_at..self.plain_at + n]);
                self.plain_at += n;
                return Ok(n);
            }
            if self.clear {
                return self.read_clear(buf);
            }
            if self.decrypt()? {
                continue;
            }
            // Only an incomplete message is left: move it to the front, so that the rest of it always fits.
            self.cipher.copy_within(self.cipher_at..self.cipher_end, 0);
            self.cipher_end -= self.cipher_at;
            self.cipher_at = 0;
            match self.stream.read(&mut self.cipher[self.cipher_end..]) {
                Ok(0) if self.cipher_end == 0 => return Ok(0),
                Ok(0) => {
                    self.broken = true;
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended within a message"));
                }
                Ok(n) => self.cipher_end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

impl SecureWriter {
    /// Let writes fail when the peer has not taken the data for so long; `None` waits for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }

    /// See [`SecureStream::socket`].
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// Encrypt `content` in as many messages as it takes (one, if empty) and send them.
    fn send(&mut self, content: &[u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the encrypted stream is broken"));
        }
        self.broken = true;
        if self.clear {
            self.stream.write_all(content)?;
            self.broken = false;
            return Ok(());
        }
        let messages = content.len().div_ceil(MAX_CONTENT).max(1);
        if self.nonce + messages as u64 > MAX_MESSAGES {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the stream's keys are used up: connect again"));
        }
        self.cipher.resize(content.len() + messages * (2 + TAG), 0);
        let mut at = 0;
        for i in 0..messages {
            let piece = &content[i * MAX_CONTENT..content.len().min((i + 1) * MAX_CONTENT)];
            let len = piece.len() + TAG;
            self.cipher[at..at + 2].copy_from_slice(&(len as u16).to_be_bytes()); // at most 65535
            at += 2;
            self.state
                .write_message(self.nonce, piece, &mut self.cipher[at..at + len])
                .map_err(|e| io::Error::other(format!("cannot encrypt: {e}")))?;
            self.nonce += 1;
            at += len;
        }
        self.stream.write_all(&self.cipher)?;
        self.broken = false;
        Ok(())
    }
}

impl Write for SecureWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let n = if self.clear { buf.len() } else { buf.len().min(BATCH) };
        self.send(&buf[..n])?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A handshake under way.
struct Shake {
    stream: TcpStream,
    peer: String,
    file: String,
    timeouts: Timeouts,
    deadline: Instant,
}

impl Shake {
    fn new(stream: TcpStream, key: &Key, timeouts: Timeouts) -> Result<Self, SecureError> {
        let peer = name_of(&stream);
        let this = Self {
            peer,
            file: key.file().display().to_string(),
            deadline: Instant::now() + timeouts.handshake,
            timeouts,
            stream,
        };
        tune(&this.stream, timeouts.dead_peer).map_err(|e| this.broken(e))?;
        Ok(this)
    }

    fn noise(&self, key: &Key, protocol: &str, initiator: bool) -> Result<HandshakeState, SecureError> {
        if protocol.len() > MAX_NAME {
            return Err(self.broken(io::Error::other(format!("the protocol name {protocol} is too long"))));
        }
        let mut prologue = HELLO.to_vec();
        prologue.extend_from_slice(protocol.as_bytes());
        let built = PATTERN.parse().and_then(|params| {
            let builder = snow::Builder::new(params).prologue(&prologue)?.psk(0, key.bytes())?;
            if initiator { builder.build_initiator() } else { builder.build_responder() }
        });
        self.crypto(built)
    }

    fn crypto<T>(&self, result: Result<T, snow::Error>) -> Result<T, SecureError> {
        result.map_err(|e| self.broken(io::Error::other(format!("the Noise handshake failed: {e}"))))
    }

    fn broken(&self, cause: io::Error) -> SecureError {
        let peer = self.peer.clone();
        match cause.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                SecureError::Timeout { peer, timeout: self.timeouts.handshake }
            }
            _ => SecureError::Io { peer, cause },
        }
    }

    fn wrong_key(&self) -> SecureError {
        SecureError::WrongKey { peer: self.peer.clone(), file: self.file.clone() }
    }

    fn other_protocol(&self, theirs: &[u8], ours: &str) -> SecureError {
        // It comes from somebody who has proved nothing: make it harmless for terminals and logs.
        let theirs = theirs.iter().take(MAX_NAME).map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '?' });
        SecureError::OtherProtocol { peer: self.peer.clone(), theirs: theirs.collect(), ours: ours.to_owned() }
    }

    /// Time left, an error when there is none.
    fn left(&self) -> Result<Duration, SecureError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(SecureError::Timeout { peer: self.peer.clone(), timeout: self.timeouts.handshake });
        }
        Ok(left)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), SecureError> {
        let left = self.left()?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|e| self.broken(e))
    }

    /// Say why, if the peer still listens; the error that is returned matters more.
    fn refuse(&mut self, verdict: u8, detail: &[u8]) {
        let mut answer = vec![verdict];
        append_message(&mut answer, detail);
        let _ = self.send(&answer);
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// As `read_exact`, but within the deadline of the whole handshake however slowly the bytes drip.
    fn receive_into(&mut self, mut buf: &mut [u8]) -> Result<(), SecureError> {
        while !buf.is_empty() {
            let left = self.left()?;
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(buf));
            match read {
                Ok(0) => {
                    return Err(self.broken(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed it")));
                }
                Ok(n) => buf = &mut buf[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
        Ok(())
    }

    fn receive<const N: usize>(&mut self) -> Result<[u8; N], SecureError> {
        let mut buf = [0; N];
        self.receive_into(&mut buf)?;
        Ok(buf)
    }

    fn receive_message(&mut self) -> Result<Vec<u8>, SecureError> {
        let len = usize::from(u16::from_be_bytes(self.receive::<2>()?));
        if len > MAX_HANDSHAKE {
            return Err(SecureError::NotUnderstudy { peer: self.peer.clone() });
        }
        let mut message = vec![0; len];
        self.receive_into(&mut message)?;
        Ok(message)
    }

    fn finish(self, noise: HandshakeState) -> Result<SecureStream, SecureError> {
        let state = Arc::new(self.crypto(noise.into_stateless_transport_mode())?);
        let twin = self.stream.set_read_timeout(None).and_then(|()| self.stream.set_write_timeout(None));
        let twin = twin.and_then(|()| self.stream.try_clone()).map_err(|e| self.broken(e))?;
        let reader = SecureReader {
            stream: twin,
            state: state.clone(),
            nonce: 0,
            cipher: vec![0; 4 * (2 + 65535)].into_boxed_slice(),
            cipher_at: 0,
            cipher_end: 0,
            plain: vec![0; 65535].into_boxed_slice(),
            plain_at: 0,
            plain_end: 0,
            clear: false,
            broken: false,
        };
        let writer =
            SecureWriter { stream: self.stream, state, nonce: 0, cipher: Vec::new(), clear: false, broken: false };
        Ok(SecureStream { reader, writer })
    }
}

fn append_message(out: &mut Vec<u8>, message: &[u8]) {
    out.extend_from_slice(&(message.len() as u16).to_be_bytes()); // at most MAX_HANDSHAKE
    out.extend_from_slice(message);
}

fn name_of(stream: &TcpStream) -> String {
    stream.peer_addr().map_or_else(|_| "(gone)".to_owned(), |a| a.to_string())
}

/// No Nagle delay; a dead peer is noticed after `dead`, whether data is under way (TCP_USER_TIMEOUT) or not (keepalive).
fn tune(stream: &TcpStream, dead: Duration) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let second = Duration::from_secs(1);
    let idle = (dead / 2).max(second);
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(idle).with_interval(second).with_retries(3))?;
    socket.set_tcp_user_timeout(Some(dead))
}
