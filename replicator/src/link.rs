//! Messages over the secure stream: thin functions that both sides share.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::Duration;

use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;
use understudy_protocol::secure::{REPLICATION, REPLICATION_IN_CLEAR, SecureError, SecureStream, Timeouts};

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

/// Whether what is replicated is encrypted. Both sides must have the same, and say so when they have not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Encryption {
    /// Nobody on the way can read or change it.
    #[default]
    On,
    /// For a link that nobody else can reach: both sides prove that they hold the key, then memory travels in clear.
    Off,
}

impl Encryption {
    /// The connecting side's handshake.
    pub fn connect(self, stream: TcpStream, key: &Key, timeouts: Timeouts) -> Result<SecureStream, SecureError> {
        Ok(self.go_on(SecureStream::connect(stream, key, self.protocol(), timeouts)?))
    }

    /// The accepting side's handshake.
    pub fn accept(self, stream: TcpStream, key: &Key, timeouts: Timeouts) -> Result<SecureStream, SecureError> {
        Ok(self.go_on(SecureStream::accept(stream, key, self.protocol(), timeouts)?))
    }

    fn protocol(self) -> &'static str {
        match self {
            Self::On => REPLICATION,
            Self::Off => REPLICATION_IN_CLEAR,
        }
    }

    fn go_on(self, stream: SecureStream) -> SecureStream {
        match self {
            Self::On => stream,
            Self::Off => stream.in_clear(),
        }
    }
}

/// Timeouts of the stream for a given peer timeout.
pub fn timeouts(peer_timeout: Duration) -> Timeouts {
    Timeouts { handshake: peer_timeout.max(Duration::from_secs(1)), dead_peer: peer_timeout }
}
