//! Packets by the burst, between a card's port and its thread: what the gate released is written, what arrived is read.
//!
//! Used by the card's threads ([`super::worker`]) and measured without them (`understudy-bench net`).

use std::io;

use super::backend::{NetBackend, Sent};
use super::packet::{HEADER, Packet};
use super::pool::Pool;
use super::port::NetPort;
use crate::devices::virtio::net::FRAME;

/// Bytes that are taken from the gate at once: a burst, after which others have their turn.
pub const BURST: usize = 256 << 10;
/// Packets and bytes that are taken from the port before the device is given them.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 << 10;
/// A packet of more bytes goes on in the buffer that it was read into; a smaller one is copied into one of its size.
const COPIED: usize = 32 << 10;
/// Bytes of buffers that a reader keeps: what may wait for the guest, and a batch.
const READ_KEPT: usize = 2 << 20;

/// What became of a burst.
#[derive(Debug, Default)]
pub struct Written {
    /// Packets that have left, or will ([`Sent::InPart`]).
    pub packets: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// Packets that the host refuses.
    pub lost: u64,
    /// The last reason for that.
    pub why: Option<io::Error>,
    /// There was no room for these; the first of them is the next.
    pub rest: Vec<Packet>,
    /// Buffers that are not needed any more.
    pub spent: Vec<Vec<u8>>,
}

/// Write a burst until the port takes no more. A port that is silent takes none, and none comes back: the gate has discarded them.
pub fn write(port: &NetPort, packets: Vec<Packet>) -> Written {
    let mut written = Written::default();
    let mut packets = packets.into_iter();
    while let Some(packet) = packets.next() {
        match port.send(&packet) {
            Some(Sent::Gone | Sent::InPart) => {
                written.packets += 1;
                written.bytes += packet.frame.len() as u64;
            }
            Some(Sent::Full) => {
                written.rest.push(packet);
                written.rest.extend(packets);
                break;
            }
            Some(Sent::Lost(e)) => {
                written.lost += 1;
                written.why = Some(e);
            }
            None => break,
        }
        written.spent.push(packet.frame);
    }
    written
}

/// Reads what arrives at one queue of a port.
#[derive(Debug)]
pub struct Reader {
    queue: u16,
    buffer: Vec<u8>,
    pool: Pool,
}

impl Reader {
    /// Of this queue.
    pub fn new(queue: u16) -> Self {
        let mut pool = Pool::new(READ_KEPT);
        Self { queue, buffer: pool.take(HEADER + FRAME), pool }
    }

    /// What has arrived, header and frame of each, onto the end of `batch`. Whether there may be more.
    ///
    /// # Errors
    /// What the back end says; what was read before is in `batch`.
    pub fn read(&mut self, backend: &dyn NetBackend, batch: &mut Vec<Vec<u8>>) -> io::Result<bool> {
        let mut bytes = 0;
        for _ in 0..BATCH {
            let Some(len) = backend.receive(self.queue, &mut self.buffer)? else { return Ok(false) };
            bytes += len;
            batch.push(self.packet(len));
            if bytes >= BATCH_BYTES {
                break;
            }
        }
        Ok(true)
    }

    fn packet(&mut self, len: usize) -> Vec<u8> {
        if len > COPIED {
            let mut packet = std::mem::replace(&mut self.buffer, self.pool.take(HEADER + FRAME));
            packet.truncate(len);
            return packet;
        }
        let mut packet = self.pool.take(len);
        packet.copy_from_slice(&self.buffer[..len]);
        packet
    }

    /// These are not needed any more.
    pub fn give_back(&mut self, spent: impl Iterator<Item = Vec<u8>>) {
        spent.for_each(|buffer| self.pool.give(buffer));
    }
}
