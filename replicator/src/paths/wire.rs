//! What travels on one path: frames of a session, in both directions.
//!
//! ```text
//!  0      1       2      4              8             16            24      28       32
//! ┌──────┬───────┬──────┬──────────────┬─────────────┬─────────────┬───────┬────────┬───────────┐
//! │ kind │ ver=1 │ 0    │ payload len  │ a           │ b           │ 0     │ CRC-32 │ payload … │
//! │ u8   │ u8    │ u16  │ u32          │ u64         │ u64         │ u32   │ u32    │           │
//! └──────┴───────┴──────┴──────────────┴─────────────┴─────────────┴───────┴────────┴───────────┘
//! ```
//! All numbers are little endian. The CRC-32 covers the header before it. Payloads are covered by what carries them: the path's
//! encryption, and the CRC-32 of each record inside the stream ([`understudy_protocol::frame`]).

/// Bytes before a payload.
pub const HEADER_LEN: usize = 32;
/// Most bytes of the stream in one frame: with its header it is one write of an encrypted path.
pub const MAX_DATA: usize = 4 * understudy_protocol::secure::MAX_CONTENT - HEADER_LEN;
/// Most bytes of a sentence that is sent.
const MAX_TEXT: usize = 512;

const VERSION: u8 = 1;

const OPEN: u8 = 1;
const JOIN: u8 = 2;
const ACCEPT: u8 = 3;
const REJECT: u8 = 4;
const DATA: u8 = 5;
const ACK: u8 = 6;
const UPDATE: u8 = 7;
const PING: u8 = 8;
const PONG: u8 = 9;
const CLOSE: u8 = 10;

/// Two sessions never have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub [u8; 16]);

/// How far the stream has come at the side that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Level {
    /// Everything before this offset has arrived.
    pub received: u64,
    /// Nothing from this offset on may be sent yet.
    pub limit: u64,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// This path begins a session that has `paths` paths; it is path number `path`.
    Open {
        /// The new session.
        session: SessionId,
        /// Number of this path, from 0.
        path: usize,
        /// How many paths there are to be.
        paths: usize,
    },
    /// This path belongs to a session that exists, as number `path`.
    Join {
        /// Which.
        session: SessionId,
        /// Number of this path, from 0.
        path: usize,
    },
    /// The path is part of the session from here on.
    Accept,
    /// It is not, and why.
    Reject(String),
    /// Bytes of the stream from this offset on; never empty.
    Data(u64, Vec<u8>),
    /// The answer to [`Frame::Data`] on this path.
    Ack(Level),
    /// The same without having been asked.
    Update(Level),
    /// "Do you hear me on this path?" The answer repeats the number.
    Ping(u64),
    /// The answer.
    Pong(u64, Level),
    /// The stream ends at this offset.
    Close(u64),
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The header is not what it was, or never was one.
    #[error("a path's frame was damaged on its way (CRC-32 of its header)")]
    Header,
    /// Another release.
    #[error(
        "the peer sends path frames of version {0}, this side knows version {VERSION}: install the same release on both"
    )]
    Version(u8),
    /// A kind that there is not, or numbers that it cannot have.
    #[error("the peer sends a path frame that makes no sense (kind {kind}, {len} bytes)")]
    Nonsense {
        /// Its kind.
        kind: u8,
        /// Bytes of its payload.
        len: u32,
    },
}

/// A header that was looked at: how many bytes follow, and what it then is.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    kind: u8,
    len: u32,
    a: u64,
    b: u64,
}

impl Head {
    /// Look at a header. One that announces more than a frame can have is refused here, before anything is kept for it.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, WireError> {
        let four = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let eight = |at: usize| u64::from(four(at)) | u64::from(four(at + 4)) << 32;
        if crc32fast::hash(&bytes[..28]) != four(28) {
            return Err(WireError::Header);
        }
        if bytes[1] != VERSION {
            return Err(WireError::Version(bytes[1]));
        }
        let this = Self { kind: bytes[0], len: four(4), a: eight(8), b: eight(16) };
        let fits = match this.kind {
            OPEN | JOIN => this.len == 16,
            REJECT => this.len as usize <= MAX_TEXT,
            DATA => (1..=MAX_DATA).contains(&(this.len as usize)) && this.a.checked_add(this.len.into()).is_some(),
            PONG => this.len == 8,
            ACCEPT | ACK | UPDATE | PING | CLOSE => this.len == 0,
            _ => false,
        };
        if fits { Ok(this) } else { Err(this.nonsense()) }
    }

    /// Bytes that follow.
    pub fn payload_len(&self) -> usize {
        self.len as usize
    }

    /// The frame, of a payload of [`Head::payload_len`] bytes.
    pub fn frame(&self, payload: Vec<u8>) -> Result<Frame, WireError> {
        if payload.len() != self.payload_len() {
            return Err(self.nonsense());
        }
        let (level, a) = (Level { received: self.a, limit: self.b }, self.a);
        let number = |n: u64| usize::try_from(n).map_err(|_| self.nonsense());
        let session = || payload.first_chunk::<16>().map(|id| SessionId(*id)).ok_or(self.nonsense());
        Ok(match self.kind {
            OPEN => Frame::Open { session: session()?, path: number(self.a)?, paths: number(self.b)? },
            JOIN => Frame::Join { session: session()?, path: number(self.a)? },
            ACCEPT => Frame::Accept,
            REJECT => Frame::Reject(String::from_utf8_lossy(&payload).into_owned()),
            DATA => Frame::Data(a, payload),
            ACK => Frame::Ack(level),
            UPDATE => Frame::Update(level),
            PING => Frame::Ping(a),
            PONG => {
                let number = payload.first_chunk::<8>().ok_or(self.nonsense())?;
                Frame::Pong(u64::from_le_bytes(*number), level)
            }
            CLOSE => Frame::Close(a),
            _ => return Err(self.nonsense()),
        })
    }

    fn nonsense(&self) -> WireError {
        WireError::Nonsense { kind: self.kind, len: self.len }
    }

    fn bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        (bytes[0], bytes[1]) = (self.kind, VERSION);
        bytes[4..8].copy_from_slice(&self.len.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.a.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.b.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..28]);
        bytes[28..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// A data frame's bytes. They are made once, and sent as they are however often; at most [`MAX_DATA`] of `content` are taken.
pub fn encode_data(offset: u64, content: &[u8]) -> Vec<u8> {
    let content = &content[..content.len().min(MAX_DATA)];
    let head = Head { kind: DATA, len: content.len() as u32, a: offset, b: 0 }.bytes();
    let mut bytes = Vec::with_capacity(HEADER_LEN + content.len());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(content);
    bytes
}

impl Frame {
    /// As it travels.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, a, b) = match self {
            Self::Open { path, paths, .. } => (OPEN, *path as u64, *paths as u64),
            Self::Join { path, .. } => (JOIN, *path as u64, 0),
            Self::Accept => (ACCEPT, 0, 0),
            Self::Reject(_) => (REJECT, 0, 0),
            Self::Data(offset, content) => return encode_data(*offset, content),
            Self::Ack(level) => (ACK, level.received, level.limit),
            Self::Update(level) => (UPDATE, level.received, level.limit),
            Self::Ping(number) => (PING, *number, 0),
            Self::Pong(_, level) => (PONG, level.received, level.limit),
            Self::Close(end) => (CLOSE, *end, 0),
        };
        let number;
        let payload: &[u8] = match self {
            Self::Open { session, .. } | Self::Join { session, .. } => &session.0,
            Self::Reject(why) => &why.as_bytes()[..why.len().min(MAX_TEXT)],
            Self::Pong(n, _) => {
                number = n.to_le_bytes();
                &number
            }
            _ => &[],
        };
        let mut bytes = Head { kind, len: payload.len() as u32, a, b }.bytes().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    /// The frame at the beginning of `bytes` and how long it is; `None` if it is not all there.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, WireError> {
        let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let head = Head::parse(head)?;
        let Some(payload) = rest.get(..head.payload_len()) else { return Ok(None) };
        Ok(Some((head.frame(payload.to_vec())?, HEADER_LEN + head.payload_len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Frame> {
        let (session, level) = (SessionId([7; 16]), Level { received: 5, limit: u64::MAX });
        vec![
            Frame::Open { session, path: 1, paths: 2 },
            Frame::Join { session, path: 1 },
            Frame::Accept,
            Frame::Reject("no".into()),
            Frame::Data(9, vec![1, 2, 3]),
            Frame::Ack(level),
            Frame::Update(level),
            Frame::Ping(3),
            Frame::Pong(3, level),
            Frame::Close(77),
        ]
    }

    #[test]
    fn every_frame_comes_back_as_it_was() {
        for frame in all() {
            let bytes = frame.encode();
            assert_eq!(Frame::parse(&bytes), Ok(Some((frame.clone(), bytes.len()))));
            assert_eq!(Frame::parse(&bytes[..bytes.len() - 1]), Ok(None), "{frame:?} is not all there");
        }
    }

    #[test]
    fn a_flipped_bit_in_a_header_is_seen() {
        for frame in all() {
            for bit in 0..HEADER_LEN * 8 {
                let mut bytes = frame.encode();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Frame::parse(&bytes), Err(WireError::Header), "bit {bit} of {frame:?}");
            }
        }
    }

    #[test]
    fn a_header_that_announces_too_much_is_refused_before_its_payload() {
        let head = |kind, len, a| Head { kind, len, a, b: 0 }.bytes();
        assert!(Head::parse(&head(DATA, MAX_DATA as u32, 0)).is_ok());
        for bad in [
            head(DATA, MAX_DATA as u32 + 1, 0),
            head(DATA, 0, 0),
            head(DATA, 1, u64::MAX),
            head(ACK, 1, 0),
            head(REJECT, 513, 0),
            head(0, 0, 0),
            head(11, 0, 0),
        ] {
            assert!(matches!(Head::parse(&bad), Err(WireError::Nonsense { .. })));
        }
        assert_eq!(Frame::parse(&Frame::Reject("é".repeat(400)).encode()).unwrap().unwrap().1, HEADER_LEN + 512);
    }
}
