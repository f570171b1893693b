//! Messages over the secure stream: thin functions that both sides share.

use std::io::{self, Write};
use std::time::Duration;

use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::secure::Timeouts;

use crate::message::Message;

/// The header of a message's frame.
pub fn header(generation: Generation, epoch: Epoch, message: &Message<'_>) -> Header {
    Header { kind: message.kind(), flags: 0, epoch, generation }
}

/// Append a message's frame to `out`.
pub fn encode(generation: Generation, epoch: Epoch, message: &Message<'_>, out: &mut Vec<u8>) -> io::Result<()> {
    Ok(frame::encode(&header(generation, epoch, message), &message.payload(), out)?)
}

/// Send one small message.
pub fn send(writer: &mut impl Write, generation: Generation, epoch: Epoch, message: &Message<'_>) -> io::Result<()> {
    let mut bytes = Vec::new();
    encode(generation, epoch, message, &mut bytes)?;
    writer.write_all(&bytes)
}

/// Timeouts of the stream for a given peer timeout.
pub fn timeouts(peer_timeout: Duration) -> Timeouts {
    Timeouts { handshake: peer_timeout.max(Duration::from_secs(1)), dead_peer: peer_timeout }
}
