//! The guest's machine code, the frames that it sends, and what they mean.
#![allow(unsafe_code)]

use anyhow::{Context, Result};
use etherparse::PacketBuilder;

use crate::bench::guest::LOAD_AT;
use crate::machine_code::machine_code;

machine_code!(fn code, "witness.s", understudy_net_cuts_witness, understudy_net_cuts_end);

/// The guest's card, and who asks.
pub const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 1];
/// See [`GUEST`].
pub const CLIENT: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 2];
const GUEST_IP: [u8; 4] = [10, 77, 0, 1];
const CLIENT_IP: [u8; 4] = [10, 77, 0, 2];
const PORT: u16 = 7077;
/// Where the guest keeps its witness, and the number of questions that it has answered.
pub const WITNESS_AT: u64 = 0x11_0000;

/// Where the frames are, from [`LOAD_AT`] on.
const FRAMES: [usize; 3] = [0x800, 0x900, 0xa00];
/// The header that virtio-net puts in front.
const HEADER: usize = 12;
/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;
const PAYLOAD: usize = 40;
const TELLS: u64 = u64::from_le_bytes(*b"TELLTELL");
const ANSWERS: u64 = u64::from_le_bytes(*b"REPLREPL");
const COMPLAINS: u64 = u64::from_le_bytes(*b"BAD!BAD!");
const ASKS: u64 = u64::from_le_bytes(*b"KAS!KAS!");

fn frame(source: ([u8; 6], [u8; 4]), to: ([u8; 6], [u8; 4]), payload: &[u8]) -> Result<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(source.0, to.0).ipv4(source.1, to.1, 64).udp(PORT, PORT);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).context("building a frame")?;
    // The guest fills in its numbers and makes no checksum: 0 is none (RFC 768).
    frame[HEADERS - 2..HEADERS].fill(0);
    Ok(frame)
}

/// The program with its frames, to be loaded at [`LOAD_AT`].
pub fn program() -> Result<Vec<u8>> {
    let _ = LOAD_AT;
    let mut image = code().to_vec();
    anyhow::ensure!(image.len() <= FRAMES[0], "the program of {} bytes reaches into its frames", image.len());
    let everybody = ([0xff; 6], [10, 77, 0, 255]);
    for (at, (what, to)) in
        FRAMES.into_iter().zip([(TELLS, everybody), (ANSWERS, (CLIENT, CLIENT_IP)), (COMPLAINS, everybody)])
    {
        let mut payload = [0; PAYLOAD];
        payload[..8].copy_from_slice(&what.to_le_bytes());
        let frame = frame((GUEST, GUEST_IP), to, &payload)?;
        image.resize(at + HEADER, 0);
        image.extend(frame);
    }
    // It copies whole words.
    image.resize(FRAMES[2] + 0x100, 0);
    Ok(image)
}

/// A question.
pub fn question(number: u64) -> Result<Vec<u8>> {
    let mut payload = [0; PAYLOAD];
    payload[..8].copy_from_slice(&ASKS.to_le_bytes());
    payload[8..16].copy_from_slice(&number.to_le_bytes());
    frame((CLIENT, CLIENT_IP), (GUEST, GUEST_IP), &payload)
}

/// What a frame of the guest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// Where it stands: steps, and questions answered.
    State {
        /// Raised by each frame.
        witness: u64,
        /// Raised by each answer.
        answered: u64,
        /// The question that this answers.
        question: Option<u64>,
    },
    /// Its memory is not as it left it.
    Complaint,
    /// It is at this place of the network: ARP, RARP or neighbour discovery.
    Announcement,
    /// None of that.
    Other,
}

/// Read a frame from the guest's card.
pub fn read(frame: &[u8]) -> Says {
    let word = |at: usize| {
        let bytes = frame.get(HEADERS + at..HEADERS + at + 8)?;
        bytes.try_into().ok().map(u64::from_le_bytes)
    };
    if matches!(frame.get(12..14), Some([0x08, 0x06] | [0x80, 0x35])) {
        return Says::Announcement;
    }
    let (Some(what), Some(witness), Some(answered), Some(question)) = (word(0), word(8), word(16), word(24)) else {
        return Says::Other;
    };
    match what {
        TELLS => Says::State { witness, answered, question: None },
        ANSWERS => Says::State { witness, answered, question: Some(question) },
        COMPLAINS => Says::Complaint,
        _ => Says::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_holds_its_frames_and_they_are_read_as_what_they_are() {
        let image = program().unwrap();
        let says = FRAMES.map(|at| read(&image[at + HEADER..at + 94]));
        let state = |question| Says::State { witness: 0, answered: 0, question };
        assert_eq!(says, [state(None), state(Some(0)), Says::Complaint]);
        assert_eq!(image[FRAMES[0] + 94..FRAMES[0] + 96], [0, 0]);
    }

    #[test]
    fn the_guest_looks_for_questions_where_they_stand() {
        let question = question(7).unwrap();
        assert_eq!(question[42..50], [0x2153_414bu32.to_le_bytes(), 0x2153_414bu32.to_le_bytes()].concat()[..]);
        assert_eq!(question[50..58], 7u64.to_le_bytes());
    }
}
