//! What the sender and the receiver say to each other. Each message is one frame (`understudy_protocol::frame`: length,
//! kind, generation, epoch, CRC-32) on the authenticated, encrypted stream.
//!
//! ```text
//! sender                                   receiver
//! Hello ───────────────────────────────►   generation checked, durably noted
//!       ◄─────────── Welcome | Stale | Refused
//! SyncBegin ───────────────────────────►   image := Inconsistent (durable)
//!       ◄─────────────────────── SyncReady
//! SyncPages … ─────────────────────────►   written straight to RAM
//! Pages(e) … State(e) … End(e) ────────►   staged, verified, commit record written
//!       ◄────────────────────────── Ack(e)   … then applied to RAM
//!       ◄────────────────────── Promotable   the cluster knows (once, after the first Ack)
//! Pages(e+1) … State … End(e+1) ───────►
//!       ◄──────────────────────── Ack(e+1)
//! Check(e+1) ──────────────────────────►   compared with the image
//!       ◄──────────────────── Checked(e+1)
//! HandedOver ──────────────────────────►   ◄ HandedOverAck
//! Ping ────────────────────────────────►   ◄ Pong        (at any time)
//!       ◄───────────────── Failed | Stale    and the connection closes
//! ```

use serde::{Deserialize, Serialize};
use thiserror::Error;
use understudy_protocol::ids::{Epoch, Generation};

use crate::verify::{Check, page_list, parse_page_list};

/// Version of this conversation; both sides must have the same.
pub const VERSION: u32 = 2;

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
    SyncPages(&'a [u8]),
    Pages(&'a [u8]),
    State(&'a [u8]),
    End(End),
    HandedOver,
    Check(Check),
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
}

impl<'a> Message<'a> {
    /// The kind's number.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => kind::HELLO,
            Self::SyncBegin => kind::SYNC_BEGIN,
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
        }
    }

    /// The same message without borrowed data; `None` for those that carry pages or device state.
    pub fn small(self) -> Option<Message<'static>> {
        Some(match self {
            Self::SyncPages(_) | Self::Pages(_) | Self::State(_) => return None,
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
            kind::HELLO => Self::Hello(serde_json::from_slice(payload).map_err(|e| malformed(e.to_string()))?),
            kind::WELCOME => Self::Welcome(serde_json::from_slice(payload).map_err(|e| malformed(e.to_string()))?),
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
        };
        let welcome =
            Welcome { node: "n2".into(), whole: true, generation: Generation(3), epoch: Epoch(9), session: u64::MAX };
        let all = [
            Message::Hello(hello),
            Message::SyncBegin,
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
    }
}
