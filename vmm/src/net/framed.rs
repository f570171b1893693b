//! Frames in a stream of bytes, each with its length in front (4 bytes, big endian): the framing of QEMU's `-netdev stream`.
//!
//! Pure: bytes go in as they come, in pieces of any size; whole frames come out. What is kept is bounded by one frame and one piece, whatever the other
//! end says.

use std::ops::Range;

use crate::devices::virtio::net::FRAME;

const LENGTH: usize = 4;

/// The other end says that it sends a frame which is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the other end announces a frame of {0} bytes, and none is longer than {FRAME}: it does not speak frames with their length in front"
)]
pub struct TooLong(u32);

/// See the module.
#[derive(Debug, Default)]
pub struct Framed {
    bytes: Vec<u8>,
    /// Of `bytes`, what was handed out.
    gone: usize,
}

impl Framed {
    /// This came.
    pub fn push(&mut self, piece: &[u8]) {
        // At most once a piece, so that a frame costs no move of all that is behind it.
        self.bytes.drain(..std::mem::take(&mut self.gone));
        self.bytes.extend(piece);
    }

    /// The next whole frame; `None`: it is not all here.
    ///
    /// # Errors
    /// What comes next is no frame. Nothing will come any more.
    pub fn pull(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let Some(frame) = self.whole()? else { return Ok(None) };
        self.gone = frame.end;
        Ok(self.bytes.get(frame))
    }

    fn whole(&self) -> Result<Option<Range<usize>>, TooLong> {
        let Some(length) = self.bytes[self.gone..].first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length);
        if length as usize > FRAME {
            return Err(TooLong(length));
        }
        let start = self.gone + LENGTH;
        let frame = start..start + length as usize;
        Ok((frame.end <= self.bytes.len()).then_some(frame))
    }

    /// Bytes that were not handed out.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.bytes.len() - self.gone
    }
}

/// What stands in front of a frame of this length.
#[must_use]
pub fn prefix(frame: &[u8]) -> [u8; LENGTH] {
    // A frame is shorter than 4 GiB.
    (frame.len() as u32).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_endless_frame_is_refused_before_it_is_kept() {
        let mut framed = Framed::default();
        framed.push(&(FRAME as u32 + 1).to_be_bytes());
        assert_eq!(framed.pull(), Err(TooLong(FRAME as u32 + 1)));
        let mut framed = Framed::default();
        framed.push(b"GET / HTTP/1.1\r\n");
        assert!(framed.pull().unwrap_err().to_string().contains("does not speak frames"));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..20),
            cuts in proptest::collection::vec(1usize..70, 1..50),
        ) {
            let all: Vec<u8> = frames.iter().flat_map(|frame| [&prefix(frame)[..], frame].concat()).collect();
            let (mut framed, mut rest, mut out) = (Framed::default(), &all[..], Vec::new());
            for cut in cuts.iter().cycle() {
                let (piece, behind) = rest.split_at((*cut).min(rest.len()));
                framed.push(piece);
                while let Some(frame) = framed.pull().unwrap() {
                    out.push(frame.to_vec());
                }
                rest = behind;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(out, frames);
            prop_assert_eq!(framed.kept(), 0);
        }
    }
}
