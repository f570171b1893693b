//! What the sender and the receiver say to each other. Each message is one frame (`understudy_protocol::frame`: length,
//! kind, generation, epoch, CRC-32) on the authenticated, encrypted stream.
//!
//! ```text
//! sender                                   receiver
//! Hello ───────────────────────────────►   generation checked, durably noted
//!       ◄─────────── Welcome | Stale | Refused
//! SyncBegin ───────────────────────────►   image := Inconsistent (durable)
//!       ◄─────────────────────── SyncReady
//! CopyBegin, Part … ───────────────────►   mirrored disks: what differs, written to their copies here
//! Flush ───────────────────────────────►   ◄ Flushed: it is durable
//! SyncPages … ─────────────────────────►   written straight to RAM
//! Part …, InStep ──────────────────────►   with the first epoch: the copies are of one instant
//! Pages(e) … State(e) … Log(e) … Seal(e)   slices of the copies: durable when sealed
//! End(e) ──────────────────────────────►   staged, verified, commit record written
//!       ◄────────────────────────── Ack(e)   … then applied to RAM
//!       ◄────────────────────── Promotable   the cluster knows (once, after the first Ack)
//! Pages(e+1) … State … End(e+1) ───────►
//!       ◄──────────────────────── Ack(e+1)
//! Check(e+1) ──────────────────────────►   compared with the image
//!       ◄──────────────────── Checked(e+1)
//! DiskCheck ───────────────────────────►   a copy held still and compared, while epochs go on
//!       ◄────────────────────── DiskChecked
//! HandedOver ──────────────────────────►   ◄ HandedOverAck
//! Ping ────────────────────────────────►   ◄ Pong        (at any time)
//!       ◄───────────────── Failed | Stale    and the connection closes
//! ```

use serde::{Deserialize, Serialize};
use thiserror::Error;
use understudy_protocol::ids::{Epoch, Generation};

use understudy_disk::mirror::{Begin, PeerState, Range, SliceLabel};
use understudy_disk::{SECTOR, Tag};

use crate::verify::{Check, page_list, parse_page_list};

/// Version of this conversation; both sides must have the same.
pub const VERSION: u32 = 3;

/// How the sender introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// Machine that it protects.
    pub machine: String,
    /// Its node, for the status.
    pub node: String,
    /// Size of the machine's RAM in bytes.
    pub ram_bytes: u64,
    /// Random number of the sender's stretch of uninterrupted dirty logging; the receiver repeats it in later
    /// [`Welcome`]s, which tells the sender whether the image belongs to that stretch.
    pub session: u64,
    /// The machine has released outputs that no replica holds: an image of its past is outdated.
    pub went_on: bool,
    /// The machine is not to be protected but to move: after its last checkpoint it runs on the receiver's node.
    #[serde(default)]
    pub migration: bool,
    /// Its mirrored disks, by name. Their places in this list are their numbers in later messages.
    #[serde(default)]
    pub disks: Vec<String>,
}

/// What the receiver holds when it accepts a sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The receiver's node, for the status.
    pub node: String,
    /// Whether the image is whole and as far as the receiver knows not outdated.
    pub whole: bool,
    /// The generation that made it.
    pub generation: Generation,
    /// The committed epoch.
    pub epoch: Epoch,
    /// The [`Hello::session`] it was made in.
    pub session: u64,
    /// How its copies of the mirrored disks are, in the order of [`Hello::disks`].
    #[serde(default)]
    pub copies: Vec<PeerState>,
}

/// A part of a mirrored disk, to be written to its copy or compared with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part<'a> {
    /// Place in [`Hello::disks`].
    pub disk: u16,
    /// Parts of a disk are numbered.
    pub number: u64,
    /// First byte, a multiple of 512.
    pub at: u64,
    /// Bytes, a multiple of 512.
    pub len: u64,
    /// What is there.
    pub content: PartContent<'a>,
}

/// What is in a [`Part`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartContent<'a> {
    /// These bytes.
    Data(&'a [u8]),
    /// Zeroes.
    Zero,
    /// Something with this BLAKE3 hash.
    Hash([u8; 32]),
}

/// A copy's answer to [`Message::Flush`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flushed {
    /// Number of the last part that is durable; 0: there was none.
    pub upto: u64,
    /// What differs of that which was to be compared.
    pub differing: Vec<Range>,
}

/// A step of a comparison of a mirrored disk with its copy, while both are in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskCheck {
    /// Hold the copy's base still at this tag, or where it is if that is beyond. → [`DiskChecked::Pinned`]
    Pin {
        /// Place in [`Hello::disks`].
        disk: u16,
        /// The primary's.
        tag: Tag,
    },
    /// Compare. → [`DiskChecked::Compared`]
    Compare {
        /// Place in [`Hello::disks`].
        disk: u16,
        /// Of this question.
        number: u64,
        /// What.
        range: Range,
        /// BLAKE3.
        hash: [u8; 32],
    },
    /// Merging may go on. No answer.
    Unpin {
        /// Place in [`Hello::disks`].
        disk: u16,
    },
}

impl DiskCheck {
    /// Place in [`Hello::disks`].
    pub fn disk(&self) -> u16 {
        match self {
            Self::Pin { disk, .. } | Self::Compare { disk, .. } | Self::Unpin { disk } => *disk,
        }
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskChecked {
    /// Where it holds; `None`: the tag is not committed here yet.
    Pinned {
        /// Place in [`Hello::disks`].
        disk: u16,
        /// Where.
        at: Option<Tag>,
    },
    /// Whether it is the same.
    Compared {
        /// Place in [`Hello::disks`].
        disk: u16,
        /// The question's.
        number: u64,
        /// It is.
        same: bool,
    },
    /// It could not be done. The session goes on: a comparison costs no protection.
    Failed {
        /// Place in [`Hello::disks`].
        disk: u16,
        /// A sentence.
        why: String,
    },
}

/// A piece of a slice's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log<'a> {
    /// Place in [`Hello::disks`].
    pub disk: u16,
    /// The slice.
    pub slice: SliceLabel,
    /// Where in the slice's log.
    pub offset: u64,
    /// The slice is closed, and this is the last of it.
    pub closed: Option<Tag>,
    /// Bytes of the log.
    pub bytes: &'a [u8],
}

/// End of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Pages since the previous commit, those of a first copy included; a zero page counts.
    pub pages: u64,
    /// Bytes of device state.
    pub state_len: u64,
    /// [`crate::codec::EpochDigest`] over the same.
    pub digest: [u8; 32],
}

/// A message; payloads are borrowed from the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The module doc has the conversation; the variants' contents are documented at their types.
pub enum Message<'a> {
    Hello(Hello),
    SyncBegin,
    /// How each copy is to be brought into step.
    CopyBegin(Vec<Begin>),
    Part(Part<'a>),
    Flush,
    /// The copies are complete up to these tags; the logs go on from there.
    InStep(Vec<Tag>),
    Log(Log<'a>),
    /// What the disks are at the end of the epoch.
    Seal(Vec<Tag>),
    SyncPages(&'a [u8]),
    Pages(&'a [u8]),
    State(&'a [u8]),
    End(End),
    HandedOver,
    Check(Check),
    DiskCheck(DiskCheck),
    Ping,
    Welcome(Welcome),
    Stale,
    Refused(String),
    SyncReady,
    Ack,
    Promotable,
    Failed(String),
    Pong,
    HandedOverAck,
    /// The pages that differ.
    Checked(Vec<u64>),
    /// One for each copy.
    Flushed(Vec<Flushed>),
    DiskChecked(DiskChecked),
}

/// A message with the two numbers that every frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope<'a> {
    /// The sender's generation; in [`Message::Stale`] the newest that the receiver knows.
    pub generation: Generation,
    /// The epoch that the message is about, zero if none.
    pub epoch: Epoch,
    /// The message.
    pub message: Message<'a>,
}

/// Why a frame is not a message.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MessageError {
    /// A kind that this version does not know.
    #[error("the peer sent a message of unknown kind {0}; do both nodes run the same version of Understudy?")]
    Kind(u8),
    /// The payload does not fit the kind.
    #[error("the peer sent a malformed message of kind {kind}: {why}")]
    Payload {
        /// The kind.
        kind: u8,
        /// What is wrong.
        why: String,
    },
}

/// Numbers of the kinds on the wire and in the stage file.
pub mod kind {
    #![allow(missing_docs)]
    pub const HELLO: u8 = 1;
    pub const SYNC_BEGIN: u8 = 2;
    pub const SYNC_PAGES: u8 = 3;
    pub const PAGES: u8 = 4;
    pub const STATE: u8 = 5;
    pub const END: u8 = 6;
    pub const HANDED_OVER: u8 = 7;
    pub const PING: u8 = 8;
    pub const CHECK: u8 = 9;
    pub const COPY_BEGIN: u8 = 10;
    pub const PART: u8 = 11;
    pub const FLUSH: u8 = 12;
    pub const IN_STEP: u8 = 13;
    pub const LOG: u8 = 14;
    pub const SEAL: u8 = 15;
    pub const WELCOME: u8 = 16;
    pub const STALE: u8 = 17;
    pub const REFUSED: u8 = 18;
    pub const SYNC_READY: u8 = 19;
    pub const ACK: u8 = 20;
    pub const PROMOTABLE: u8 = 21;
    pub const FAILED: u8 = 22;
    pub const PONG: u8 = 23;
    pub const HANDED_OVER_ACK: u8 = 24;
    pub const CHECKED: u8 = 25;
    pub const FLUSHED: u8 = 26;
    pub const DISK_CHECKED: u8 = 27;
    pub const DISK_CHECK: u8 = 32;
}

impl<'a> Message<'a> {
    /// The kind's number.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::SyncBegin => kind::SYNC_BEGIN,
            Self::CopyBegin(_) => kind::COPY_BEGIN,
            Self::Part(_) => kind::PART,
            Self::Flush => kind::FLUSH,
            Self::InStep(_) => kind::IN_STEP,
            Self::Log(_) => kind::LOG,
            Self::Seal(_) => kind::SEAL,
            Self::Flushed(_) => kind::FLUSHED,
            Self::DiskCheck(_) => kind::DISK_CHECK,
            Self::DiskChecked(_) => kind::DISK_CHECKED,
            Self::SyncPages(_) => kind::SYNC_PAGES,
            Self::Pages(_) => kind::PAGES,
            Self::State(_) => kind::STATE,
            Self::End(_) => kind::END,
            Self::HandedOver => kind::HANDED_OVER,
            Self::Ping => kind::PING,
            Self::Check(_) => kind::CHECK,
            Self::Welcome(_) => kind::WELCOME,
            Self::Stale => kind::STALE,
            Self::Refused(_) => kind::REFUSED,
            Self::SyncReady => kind::SYNC_READY,
            Self::Ack => kind::ACK,
            Self::Promotable => kind::PROMOTABLE,
            Self::Failed(_) => kind::FAILED,
            Self::Pong => kind::PONG,
            Self::HandedOverAck => kind::HANDED_OVER_ACK,
            Self::Checked(_) => kind::CHECKED,
        }
    }

    /// The payload, borrowed for page data, built for the small messages.
    pub fn payload(&self) -> std::borrow::Cow<'a, [u8]> {
        // Plain structs of numbers and strings: serde_json has no way to fail on them.
        fn json(value: &impl Serialize) -> Vec<u8> {
            serde_json::to_vec(value).unwrap_or_default()
        }
        match self {
            Self::SyncPages(bytes) | Self::Pages(bytes) | Self::State(bytes) => (*bytes).into(),
            Self::CopyBegin(plans) => json(plans).into(),
            Self::InStep(tags) | Self::Seal(tags) => json(tags).into(),
            Self::Flushed(flushed) => json(flushed).into(),
            Self::DiskCheck(check) => json(check).into(),
            Self::DiskChecked(checked) => json(checked).into(),
            Self::Part(part) => part.payload().into(),
            Self::Log(log) => log.payload().into(),
            Self::Hello(hello) => json(hello).into(),
            Self::Welcome(welcome) => json(welcome).into(),
            Self::Refused(why) | Self::Failed(why) => why.clone().into_bytes().into(),
            Self::Check(check) => check.payload().into(),
            Self::Checked(pages) => page_list(pages).into(),
            Self::End(end) => {
                let mut bytes = Vec::with_capacity(48);
                bytes.extend_from_slice(&end.pages.to_le_bytes());
                bytes.extend_from_slice(&end.state_len.to_le_bytes());
                bytes.extend_from_slice(&end.digest);
                bytes.into()
            }
            Self::SyncBegin | Self::HandedOver | Self::Ping | Self::Stale | Self::SyncReady => Vec::new().into(),
            Self::Ack | Self::Promotable | Self::Pong | Self::HandedOverAck => Vec::new().into(),
            Self::Flush => Vec::new().into(),
        }
    }

    /// The same message without borrowed data; `None` for those that carry pages or device state.
    pub fn small(self) -> Option<Message<'static>> {
        Some(match self {
            Self::SyncPages(_) | Self::Pages(_) | Self::State(_) | Self::Part(_) | Self::Log(_) => return None,
            Self::CopyBegin(plans) => Message::CopyBegin(plans),
            Self::Flush => Message::Flush,
            Self::InStep(tags) => Message::InStep(tags),
            Self::Seal(tags) => Message::Seal(tags),
            Self::Flushed(flushed) => Message::Flushed(flushed),
            Self::DiskCheck(check) => Message::DiskCheck(check),
            Self::DiskChecked(checked) => Message::DiskChecked(checked),
            Self::Hello(hello) => Message::Hello(hello),
            Self::SyncBegin => Message::SyncBegin,
            Self::End(end) => Message::End(end),
            Self::HandedOver => Message::HandedOver,
            Self::Ping => Message::Ping,
            Self::Welcome(welcome) => Message::Welcome(welcome),
            Self::Stale => Message::Stale,
            Self::Refused(why) => Message::Refused(why),
            Self::SyncReady => Message::SyncReady,
            Self::Ack => Message::Ack,
            Self::Promotable => Message::Promotable,
            Self::Failed(why) => Message::Failed(why),
            Self::Pong => Message::Pong,
            Self::HandedOverAck => Message::HandedOverAck,
            Self::Check(check) => Message::Check(check),
            Self::Checked(pages) => Message::Checked(pages),
        })
    }

    /// Take a frame's kind and payload for a message.
    pub fn parse(number: u8, payload: &'a [u8]) -> Result<Self, MessageError> {
        let malformed = |why: String| MessageError::Payload { kind: number, why };
        let text = || String::from_utf8_lossy(payload).into_owned();
        Ok(match number {
            kind::SYNC_PAGES => Self::SyncPages(payload),
            kind::PAGES => Self::Pages(payload),
            kind::STATE => Self::State(payload),
            kind::HELLO => Self::Hello(json(number, payload)?),
            kind::WELCOME => Self::Welcome(json(number, payload)?),
            kind::COPY_BEGIN => Self::CopyBegin(json(number, payload)?),
            kind::IN_STEP => Self::InStep(json(number, payload)?),
            kind::SEAL => Self::Seal(json(number, payload)?),
            kind::PART => Self::Part(Part::parse(payload).ok_or_else(|| malformed("it is no part of a disk".into()))?),
            kind::LOG => Self::Log(Log::parse(payload).ok_or_else(|| malformed("it is no piece of a slice".into()))?),
            kind::FLUSH => Self::Flush,
            kind::DISK_CHECK => Self::DiskCheck(json(number, payload)?),
            kind::DISK_CHECKED => Self::DiskChecked(json(number, payload)?),
            kind::FLUSHED => Self::Flushed(json(number, payload)?),
            kind::REFUSED => Self::Refused(text()),
            kind::FAILED => Self::Failed(text()),
            kind::END => Self::End(parse_end(payload).ok_or_else(|| malformed("it must have 48 bytes".into()))?),
            kind::SYNC_BEGIN => Self::SyncBegin,
            kind::HANDED_OVER => Self::HandedOver,
            kind::PING => Self::Ping,
            kind::STALE => Self::Stale,
            kind::SYNC_READY => Self::SyncReady,
            kind::ACK => Self::Ack,
            kind::PROMOTABLE => Self::Promotable,
            kind::PONG => Self::Pong,
            kind::HANDED_OVER_ACK => Self::HandedOverAck,
            kind::CHECK => {
                Self::Check(Check::parse(payload).ok_or_else(|| malformed("it is no list of pages".into()))?)
            }
            kind::CHECKED => {
                Self::Checked(parse_page_list(payload).ok_or_else(|| malformed("it is no list of pages".into()))?)
            }
            other => return Err(MessageError::Kind(other)),
        })
    }
}

fn json<T: serde::de::DeserializeOwned>(kind: u8, payload: &[u8]) -> Result<T, MessageError> {
    serde_json::from_slice(payload).map_err(|e| MessageError::Payload { kind, why: e.to_string() })
}

/// Take a little-endian number off the front.
fn number<'a, const N: usize>(bytes: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (number, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(number)
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    number(bytes).map(|n| u64::from_le_bytes(*n))
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    number(bytes).map(|n| u32::from_le_bytes(*n))
}

fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    number(bytes).map(|n| u16::from_le_bytes(*n))
}

impl<'a> Part<'a> {
    /// Disk, kind (1 data, 2 zeroes, 3 hash; 2 bytes each), number, first byte, bytes (8 each), then the data or the hash.
    fn payload(&self) -> Vec<u8> {
        let (kind, data): (u16, &[u8]) = match &self.content {
            PartContent::Data(bytes) => (1, bytes),
            PartContent::Zero => (2, &[]),
            PartContent::Hash(hash) => (3, hash),
        };
        let mut bytes = Vec::with_capacity(28 + data.len());
        bytes.extend_from_slice(&self.disk.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        for number in [self.number, self.at, self.len] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(data);
        bytes
    }

    fn parse(mut bytes: &'a [u8]) -> Option<Self> {
        let (disk, kind) = (take_u16(&mut bytes)?, take_u16(&mut bytes)?);
        let (number, at, len) = (take_u64(&mut bytes)?, take_u64(&mut bytes)?, take_u64(&mut bytes)?);
        let content = match kind {
            1 if bytes.len() as u64 == len => PartContent::Data(bytes),
            2 if bytes.is_empty() => PartContent::Zero,
            3 => PartContent::Hash(bytes.try_into().ok()?),
            _ => return None,
        };
        let sane = len > 0 && at % SECTOR == 0 && len % SECTOR == 0 && at.checked_add(len).is_some();
        sane.then_some(Self { disk, number, at, len, content })
    }
}

impl<'a> Log<'a> {
    /// Disk (2 bytes), 1 if a tag follows (2), serial number, generation, epoch, offset (8 each), the tag's serial number, generation, epoch (8 each),
    /// records, digest (4 each), bytes.
    fn payload(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(68 + self.bytes.len());
        bytes.extend_from_slice(&self.disk.to_le_bytes());
        bytes.extend_from_slice(&u16::from(self.closed.is_some()).to_le_bytes());
        for number in [self.slice.serial, self.slice.generation.0, self.slice.epoch.0, self.offset] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        if let Some(tag) = &self.closed {
            for number in [tag.serial, tag.generation.0, tag.epoch.0] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&tag.records.to_le_bytes());
            bytes.extend_from_slice(&tag.digest.to_le_bytes());
        }
        bytes.extend_from_slice(self.bytes);
        bytes
    }

    fn parse(mut bytes: &'a [u8]) -> Option<Self> {
        let (disk, closed) = (take_u16(&mut bytes)?, take_u16(&mut bytes)?);
        let slice = SliceLabel {
            serial: take_u64(&mut bytes)?,
            generation: Generation(take_u64(&mut bytes)?),
            epoch: Epoch(take_u64(&mut bytes)?),
        };
        let offset = take_u64(&mut bytes)?;
        let closed = match closed {
            0 => None,
            1 => Some(Tag {
                serial: take_u64(&mut bytes)?,
                generation: Generation(take_u64(&mut bytes)?),
                epoch: Epoch(take_u64(&mut bytes)?),
                records: take_u32(&mut bytes)?,
                digest: take_u32(&mut bytes)?,
            }),
            _ => return None,
        };
        offset.checked_add(bytes.len() as u64)?;
        Some(Self { disk, slice, offset, closed, bytes })
    }
}

fn parse_end(payload: &[u8]) -> Option<End> {
    let (pages, rest) = payload.split_first_chunk::<8>()?;
    let (state_len, rest) = rest.split_first_chunk::<8>()?;
    let digest = rest.try_into().ok()?;
    Some(End { pages: u64::from_le_bytes(*pages), state_len: u64::from_le_bytes(*state_len), digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_reads_back_as_it_was_written() {
        let hello = Hello {
            version: 1,
            machine: "m".into(),
            node: "n1".into(),
            ram_bytes: 8192,
            session: u64::MAX,
            went_on: true,
            migration: false,
            disks: vec!["vda".into()],
        };
        let tag = Tag { serial: 5, generation: Generation(2), epoch: Epoch(4), records: 3, digest: 1 };
        let copy = PeerState {
            node: "n2".into(),
            machine: "m".into(),
            disk: Some(7),
            generation: Generation(2),
            size: 1 << 20,
            format: understudy_disk::Format::Raw,
            standing: understudy_disk::mirror::Standing::Follows { at: tag, sealed: vec![tag] },
            discard: None,
        };
        let welcome = Welcome {
            node: "n2".into(),
            whole: true,
            generation: Generation(3),
            epoch: Epoch(9),
            session: u64::MAX,
            copies: vec![copy],
        };
        let begin = Begin {
            machine: "m".into(),
            from: "n1".into(),
            generation: Generation(2),
            disk: 7,
            size: 1 << 20,
            sync: 9,
            resumed: false,
            keep: Some(tag),
            history: Vec::new(),
        };
        let slice = SliceLabel { serial: 5, generation: Generation(2), epoch: Epoch(4) };
        let part = |content| Part { disk: 1, number: 2, at: 512, len: 1024, content };
        let all = [
            Message::Hello(hello),
            Message::SyncBegin,
            Message::CopyBegin(vec![begin]),
            Message::Part(part(PartContent::Data(&[1; 1024]))),
            Message::Part(part(PartContent::Zero)),
            Message::Part(part(PartContent::Hash([2; 32]))),
            Message::Flush,
            Message::Flushed(vec![Flushed { upto: 2, differing: vec![Range { at: 0, len: 512 }] }]),
            Message::InStep(vec![tag]),
            Message::Log(Log { disk: 1, slice, offset: 64, closed: None, bytes: b"records" }),
            Message::Log(Log { disk: 1, slice, offset: 71, closed: Some(tag), bytes: b"" }),
            Message::Seal(vec![tag]),
            Message::DiskCheck(DiskCheck::Pin { disk: 0, tag }),
            Message::DiskCheck(DiskCheck::Compare {
                disk: 0,
                number: 1,
                range: Range { at: 0, len: 512 },
                hash: [3; 32],
            }),
            Message::DiskCheck(DiskCheck::Unpin { disk: 0 }),
            Message::DiskChecked(DiskChecked::Pinned { disk: 0, at: Some(tag) }),
            Message::DiskChecked(DiskChecked::Compared { disk: 0, number: 1, same: false }),
            Message::DiskChecked(DiskChecked::Failed { disk: 0, why: "the disk cannot be read".into() }),
            Message::SyncPages(b"batch"),
            Message::Pages(b"batch"),
            Message::State(b"state"),
            Message::End(End { pages: 1, state_len: 2, digest: [3; 32] }),
            Message::HandedOver,
            Message::Ping,
            Message::Welcome(welcome),
            Message::Stale,
            Message::Refused("no".into()),
            Message::SyncReady,
            Message::Ack,
            Message::Promotable,
            Message::Failed("disk full".into()),
            Message::Pong,
            Message::HandedOverAck,
            Message::Check(Check::new(vec![(3, u64::MAX), (9, 0)])),
            Message::Checked(vec![9]),
        ];
        for message in all {
            let payload = message.payload().into_owned();
            assert_eq!(Message::parse(message.kind(), &payload), Ok(message));
        }
    }

    #[test]
    fn garbage_is_an_error_for_every_kind() {
        assert!(Message::parse(99, b"").is_err());
        assert!(Message::parse(kind::HELLO, b"{").is_err());
        assert!(Message::parse(kind::END, &[0; 47]).is_err());
        assert!(Message::parse(kind::CHECK, &[0; 24]).is_err(), "a page without a hash");
        assert!(Message::parse(kind::CHECK, &[0; 32]).is_err(), "a page twice");
        assert!(Message::parse(kind::CHECK, &Check::new(vec![(1, 2)]).payload()[1..]).is_err());
        assert!(Message::parse(kind::CHECKED, &[0; 7]).is_err());
        let part = Message::Part(Part { disk: 0, number: 1, at: 0, len: 512, content: PartContent::Data(&[0; 512]) });
        let payload = part.payload().into_owned();
        for end in 0..payload.len() {
            assert!(Message::parse(kind::PART, &payload[..end]).is_err(), "{end}");
        }
        let odd = Part { disk: 0, number: 1, at: 1, len: 512, content: PartContent::Zero };
        assert!(Message::parse(kind::PART, &Message::Part(odd).payload()).is_err(), "not a sector's first byte");
        let slice = SliceLabel { serial: 1, generation: Generation(1), epoch: Epoch(1) };
        let log = Message::Log(Log { disk: 0, slice, offset: u64::MAX, closed: None, bytes: b"x" });
        assert!(Message::parse(kind::LOG, &log.payload()).is_err(), "behind the end of everything");
        assert!(Message::parse(kind::LOG, &[0; 35]).is_err());
    }
}
