//! Records: how every network protocol of Understudy cuts its byte stream into messages.
//!
//! ```text
//!  0        4       5      6       8              12        16            24            32
//! ┌────────┬───────┬──────┬───────┬──────────────┬─────────┬─────────────┬─────────────┬───────────┐
//! │ "USty" │ ver=1 │ kind │ flags │ payload len  │ CRC-32  │ epoch       │ generation  │ payload … │
//! │ 4 B    │ u8    │ u8   │ u16   │ u32          │ u32     │ u64         │ u64         │           │
//! └────────┴───────┴──────┴───────┴──────────────┴─────────┴─────────────┴─────────────┴───────────┘
//! ```
//! All numbers are little endian. The CRC-32 (IEEE 802.3, the one of zlib) covers the header with its CRC field taken as
//! zero, then the payload. What `kind` and `flags` mean is the business of the protocol above.
//!
//! Two ways in: [`Decoder`] takes bytes as they come (sans-I/O), [`read_record`] blocks on a reader and spares one copy.
//! Both refuse a record above the limit as soon as its header is there, before any memory is spent on it. Once a stream
//! has shown one bad record nothing after it is believed.

use std::io::{self, Read, Write};

use crate::ids::{Epoch, Generation};

/// First bytes of every record.
pub const MAGIC: [u8; 4] = *b"USty";
/// Version of the record layout.
pub const VERSION: u8 = 1;
/// Bytes of a record before its payload.
pub const HEADER_LEN: usize = 32;

/// What stands before a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Type of the record, numbered by the protocol above.
    pub kind: u8,
    /// Bits defined by `kind`; zero where it defines none.
    pub flags: u16,
    /// The epoch that the record belongs to; zero where that has no meaning.
    pub epoch: Epoch,
    /// The sender's generation.
    pub generation: Generation,
}

/// A whole record.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Type and owner.
    pub header: Header,
    /// Content, at most the decoder's limit.
    pub payload: Vec<u8>,
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Something else talks on this connection.
    #[error("the peer sends something that is not an Understudy record (it begins {0:02x?})")]
    Magic([u8; 4]),
    /// A release that this one does not know.
    #[error(
        "the peer sends records of version {0}, this side knows version {VERSION}: install the same release on both"
    )]
    Version(u8),
    /// Larger than agreed.
    #[error("a record of {len} bytes exceeds the limit of {limit}")]
    TooLong {
        /// Announced payload bytes.
        len: u64,
        /// Bytes that would have been taken.
        limit: u64,
    },
    /// Damaged on its way.
    #[error("a record of kind {kind} was damaged on its way (CRC-32 {found:08x}, expected {expected:08x})")]
    Crc {
        /// The record's type.
        kind: u8,
        /// Calculated here.
        found: u32,
        /// Carried in the header.
        expected: u32,
    },
}

impl From<FrameError> for io::Error {
    fn from(e: FrameError) -> Self {
        Self::new(io::ErrorKind::InvalidData, e)
    }
}

/// Header bytes for a payload that stands in several pieces. A payload of 4 GiB or more is refused.
pub fn encode_header(header: &Header, payload: &[&[u8]]) -> Result<[u8; HEADER_LEN], FrameError> {
    let len: u64 = payload.iter().map(|p| p.len() as u64).sum();
    let Ok(len) = u32::try_from(len) else {
        return Err(FrameError::TooLong { len, limit: u64::from(u32::MAX) });
    };
    let mut bytes = [0; HEADER_LEN];
    bytes[0..4].copy_from_slice(&MAGIC);
    bytes[4] = VERSION;
    bytes[5] = header.kind;
    bytes[6..8].copy_from_slice(&header.flags.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[16..24].copy_from_slice(&header.epoch.0.to_le_bytes());
    bytes[24..32].copy_from_slice(&header.generation.0.to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes);
    for piece in payload {
        crc.update(piece);
    }
    bytes[12..16].copy_from_slice(&crc.finalize().to_le_bytes());
    Ok(bytes)
}

/// Append one record to `out`.
pub fn encode(header: &Header, payload: &[u8], out: &mut Vec<u8>) -> Result<(), FrameError> {
    let head = encode_header(header, &[payload])?;
    out.reserve(HEADER_LEN + payload.len());
    out.extend_from_slice(&head);
    out.extend_from_slice(payload);
    Ok(())
}

/// Write one record. Header and payload are two writes: give a buffered writer when payloads are small.
pub fn write_record(writer: &mut impl Write, header: &Header, payload: &[u8]) -> io::Result<()> {
    writer.write_all(&encode_header(header, &[payload])?)?;
    writer.write_all(payload)
}

/// A header that has been looked at, with what is needed to check the payload.
struct Parsed {
    header: Header,
    len: usize,
    expected: u32,
    crc: crc32fast::Hasher,
}

impl Parsed {
    fn new(bytes: &[u8; HEADER_LEN], limit: usize) -> Result<Self, FrameError> {
        let four = |at: usize| [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        let eight = |at: usize| {
            let mut b = [0; 8];
            b.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(b)
        };
        if four(0) != MAGIC {
            return Err(FrameError::Magic(four(0)));
        }
        if bytes[4] != VERSION {
            return Err(FrameError::Version(bytes[4]));
        }
        let len = u32::from_le_bytes(four(8));
        if u64::from(len) > limit as u64 {
            return Err(FrameError::TooLong { len: u64::from(len), limit: limit as u64 });
        }
        let header = Header {
            kind: bytes[5],
            flags: u16::from_le_bytes([bytes[6], bytes[7]]),
            epoch: Epoch(eight(16)),
            generation: Generation(eight(24)),
        };
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..12]);
        crc.update(&[0; 4]);
        crc.update(&bytes[16..]);
        Ok(Self { header, len: len as usize, expected: u32::from_le_bytes(four(12)), crc })
    }

    fn check(mut self, payload: &[u8]) -> Result<Header, FrameError> {
        self.crc.update(payload);
        let found = self.crc.finalize();
        if found != self.expected {
            return Err(FrameError::Crc { kind: self.header.kind, found, expected: self.expected });
        }
        Ok(self.header)
    }
}

/// Bytes in, records out.
///
/// It keeps what was pushed and not yet taken: a caller that takes all records after every push makes it hold at most one
/// incomplete record beside the last push.
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    bytes: Vec<u8>,
    /// Start of what has not been taken.
    at: usize,
    broken: Option<FrameError>,
}

impl Decoder {
    /// A decoder that refuses payloads above `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, bytes: Vec::new(), at: 0, broken: None }
    }

    /// Take in bytes as they came. After an error they are dropped.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken.is_some() {
            return;
        }
        if self.at == self.bytes.len() {
            self.bytes.clear();
            self.at = 0;
        } else if self.at > self.bytes.len() / 2 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole record, `None` until more bytes come. An error repeats for ever.
    pub fn next_record(&mut self) -> Result<Option<Record>, FrameError> {
        if let Some(e) = &self.broken {
            return Err(e.clone());
        }
        self.take().inspect_err(|e| {
            self.broken = Some(e.clone());
            self.bytes = Vec::new();
            self.at = 0;
        })
    }

    /// Whether a record has begun and is not complete: the stream may not end here.
    pub fn is_mid_record(&self) -> bool {
        self.at < self.bytes.len()
    }

    fn take(&mut self) -> Result<Option<Record>, FrameError> {
        let rest = &self.bytes[self.at..];
        let Some((head, rest)) = rest.split_first_chunk::<HEADER_LEN>() else {
            // Say at once that something else talks here, it may never send a whole header.
            let known = rest.len().min(MAGIC.len());
            if rest[..known] != MAGIC[..known] {
                let mut begin = [0; 4];
                begin[..known].copy_from_slice(&rest[..known]);
                return Err(FrameError::Magic(begin));
            }
            return Ok(None);
        };
        let parsed = Parsed::new(head, self.limit)?;
        let Some(payload) = rest.get(..parsed.len) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        let header = parsed.check(&payload)?;
        self.at += HEADER_LEN + payload.len();
        Ok(Some(Record { header, payload }))
    }
}

/// Read one record from a blocking reader; its payload replaces the content of `payload`. `None` at the end of the stream
/// between two records; an end within one is [`io::ErrorKind::UnexpectedEof`]; a bad record is
/// [`io::ErrorKind::InvalidData`] with the [`FrameError`] inside.
///
/// A reader with a timeout may lose bytes when the timeout strikes: use [`Decoder`] there.
pub fn read_record(reader: &mut impl Read, limit: usize, payload: &mut Vec<u8>) -> io::Result<Option<Header>> {
    let mut head = [0; HEADER_LEN];
    let first = loop {
        match reader.read(&mut head) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut head[first..])?;
    let parsed = Parsed::new(&head, limit)?;
    payload.resize(parsed.len, 0);
    reader.read_exact(payload)?;
    Ok(Some(parsed.check(payload)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (Header, Vec<u8>) {
        let header = Header { kind: 7, flags: 0x0102, epoch: Epoch(25), generation: Generation(3) };
        (header, b"register file".to_vec())
    }

    fn encoded(header: &Header, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(header, payload, &mut out).unwrap();
        out
    }

    #[test]
    fn the_layout_of_version_1_never_changes() {
        let (header, payload) = sample();
        let bytes = encoded(&header, &payload);
        let mut golden = b"USty\x01\x07\x02\x01\x0d\0\0\0".to_vec();
        golden.extend_from_slice(&0xb9ee_b90cu32.to_le_bytes());
        golden.extend_from_slice(b"\x19\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0register file");
        assert_eq!(bytes, golden, "{bytes:02x?}");
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (header, payload) = sample();
        let good = encoded(&header, &payload);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let mut decoder = Decoder::new(1024);
            decoder.push(&bad);
            // A longer length makes it wait for more; everything else is an error.
            assert!(!matches!(decoder.next_record(), Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn a_record_above_the_limit_is_refused_at_its_header() {
        let bytes = encoded(&Header::default(), &[0; 100]);
        let mut decoder = Decoder::new(99);
        decoder.push(&bytes[..HEADER_LEN]);
        let expected = FrameError::TooLong { len: 100, limit: 99 };
        assert_eq!(decoder.next_record(), Err(expected.clone()));
        decoder.push(&encoded(&Header::default(), b""));
        assert_eq!(decoder.next_record(), Err(expected), "nothing after a bad record is believed");
        let error = read_record(&mut &bytes[..], 99, &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn another_protocol_is_told_by_its_first_byte() {
        let mut decoder = Decoder::new(99);
        decoder.push(b"G");
        assert!(matches!(decoder.next_record(), Err(FrameError::Magic(_))));
    }

    #[test]
    fn a_stream_that_ends_within_a_record_is_an_error() {
        let (header, payload) = sample();
        let bytes = encoded(&header, &payload);
        let mut buffer = Vec::new();
        assert_eq!(read_record(&mut &bytes[..0], 99, &mut buffer).unwrap(), None);
        for end in 1..bytes.len() {
            let error = read_record(&mut &bytes[..end], 99, &mut buffer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
        assert_eq!(read_record(&mut &bytes[..], 99, &mut buffer).unwrap(), Some(header));
        assert_eq!(buffer, payload);
    }

    proptest! {
        #[test]
        fn any_bytes_never_panic(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..8), valid_start: bool) {
            let mut decoder = Decoder::new(64);
            if valid_start {
                decoder.push(b"USty\x01");
            }
            for chunk in &chunks {
                decoder.push(chunk);
                while let Ok(Some(_)) = decoder.next_record() {}
            }
            let all: Vec<u8> = chunks.concat();
            let _ = read_record(&mut &all[..], 64, &mut Vec::new());
        }

        #[test]
        fn records_survive_any_chunking(
            records in proptest::collection::vec((any::<u8>(), any::<u16>(), any::<u64>(), any::<u64>(), proptest::collection::vec(any::<u8>(), 0..200)), 0..12),
            chunk in 1usize..70,
        ) {
            let records: Vec<Record> = records
                .into_iter()
                .map(|(kind, flags, e, g, payload)| Record {
                    header: Header { kind, flags, epoch: Epoch(e), generation: Generation(g) },
                    payload,
                })
                .collect();
            let mut bytes = Vec::new();
            for r in &records {
                write_record(&mut bytes, &r.header, &r.payload).unwrap();
            }
            let mut decoder = Decoder::new(200);
            let mut seen = Vec::new();
            for piece in bytes.chunks(chunk) {
                decoder.push(piece);
                while let Some(record) = decoder.next_record().unwrap() {
                    seen.push(record);
                }
            }
            prop_assert!(!decoder.is_mid_record());
            prop_assert_eq!(seen, records);
        }
    }
}
