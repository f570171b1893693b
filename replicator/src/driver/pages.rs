//! Pages from RAM and from the arena, encoded into batches.

use std::os::unix::fs::FileExt;
use std::time::Instant;

use understudy_protocol::control::Captured;
use understudy_protocol::ids::Epoch;

use super::{Driver, Trouble};
use crate::codec::PAGE;
use crate::message::{End, Message};
use crate::sender::Event;

/// Pages in one slice of the first copy: short enough for the gate to be opened between two.
const SLICE: u64 = 1024;
/// Pages read at once.
const BLOCK: u64 = 64;
/// A batch goes out when it has reached this size: with its last page it still fits four messages of the secure stream.
const BATCH_BYTES: usize = 192 << 10;
/// Device state travels in pieces of this size.
const STATE_PIECE: usize = 256 << 10;
impl Driver {
    pub(super) fn copy_slice(&mut self, first: bool) -> Result<Event, Trouble> {
        if first {
            self.cursor = 0;
        }
        let end = (self.cursor + SLICE).min(self.ram_pages);
        while self.cursor < end {
            let pages = BLOCK.min(end - self.cursor);
            self.read_ram(self.cursor, pages)?;
            for i in 0..pages {
                let page = &self.block[i as usize * PAGE..][..PAGE];
                self.batch.push(self.cursor + i, page, &mut self.digest);
            }
            self.cursor += pages;
            if self.batch.len() >= BATCH_BYTES {
                self.send_batch(Epoch::ZERO, false)?;
            }
        }
        if self.cursor == self.ram_pages {
            self.send_batch(Epoch::ZERO, false)?;
        }
        self.publish();
        Ok(Event::Copied { done: self.cursor == self.ram_pages })
    }

    pub(super) fn send_dirty(&mut self) -> Result<Event, Trouble> {
        let mut sent = 0;
        while self.cursor < self.ram_pages && sent < SLICE {
            let byte = self.bitmap[(self.cursor / 8) as usize];
            if byte == 0 {
                self.cursor = (self.cursor / 8 + 1) * 8;
                continue;
            }
            if byte >> (self.cursor % 8) & 1 == 1 {
                self.read_ram(self.cursor, 1)?;
                self.batch.push(self.cursor, &self.block[..PAGE], &mut self.digest);
                sent += 1;
                if self.batch.len() >= BATCH_BYTES {
                    self.send_batch(Epoch::ZERO, false)?;
                }
            }
            self.cursor += 1;
        }
        let done = self.cursor >= self.ram_pages;
        if done {
            self.send_batch(Epoch::ZERO, false)?;
        }
        Ok(Event::DirtySent { done })
    }

    fn read_ram(&mut self, page: u64, pages: u64) -> Result<(), Trouble> {
        let Some(ram) = &self.ram else { return Err(Trouble::Vmm("it is not attached".into())) };
        self.block.resize((BLOCK as usize) * PAGE, 0);
        let room = &mut self.block[..pages as usize * PAGE];
        ram.read_exact_at(room, page * PAGE as u64).map_err(|e| Trouble::Vmm(format!("RAM cannot be read: {e}")))
    }

    /// Encode everything even if the peer is gone: the kept epoch can then be sent to it when it is back.
    pub(super) fn send_piece(&mut self, captured: Captured) {
        let mut trouble = None;
        let encoded = self.encode_piece(captured, &mut trouble);
        let now = Instant::now();
        match encoded {
            Ok(()) => self.core.event(Event::PieceSent { kept: self.keeping }, now),
            Err(why) => {
                self.detach();
                self.core.event(Event::VmmLost(why), now);
            }
        }
        if let Some(why) = trouble {
            self.core.event(Event::PeerLost(why), now);
        }
    }

    fn encode_piece(&mut self, captured: Captured, trouble: &mut Option<String>) -> Result<(), String> {
        let unreadable = |e: std::io::Error| format!("its arena cannot be read: {e}");
        let Some(arena) = self.arena.take() else { return Err("it is not attached".into()) };
        let mut note = |sent: Result<(), Trouble>| match sent {
            Ok(()) => {}
            Err(Trouble::Peer(why) | Trouble::Vmm(why)) => *trouble = trouble.take().or(Some(why)),
        };
        let mut indices = [0; 8 * BLOCK as usize];
        let mut at = 0;
        while at < captured.pages {
            let pages = BLOCK.min(captured.pages - at);
            let indices = &mut indices[..8 * pages as usize];
            arena.read_exact_at(indices, captured.indices_offset + 8 * at).map_err(unreadable)?;
            self.block.resize((BLOCK as usize) * PAGE, 0);
            let block = &mut self.block[..pages as usize * PAGE];
            arena.read_exact_at(block, captured.pages_offset + PAGE as u64 * at).map_err(unreadable)?;
            for (index, page) in indices.chunks_exact(8).zip(block.chunks_exact(PAGE)) {
                let mut number = [0; 8];
                number.copy_from_slice(index);
                self.batch.push(u64::from_le_bytes(number), page, &mut self.digest);
            }
            if self.batch.len() >= BATCH_BYTES {
                note(self.send_batch(self.epoch, true));
            }
            at += pages;
        }
        note(self.send_batch(self.epoch, true));
        if !captured.more {
            let mut at = 0;
            let mut piece = vec![0; STATE_PIECE.min(captured.state_len as usize)];
            while at < captured.state_len {
                let n = (STATE_PIECE as u64).min(captured.state_len - at) as usize;
                arena.read_exact_at(&mut piece[..n], captured.state_offset + at).map_err(unreadable)?;
                self.digest.state(&piece[..n]);
                note(self.send_epoch_message(&Message::State(&piece[..n])));
                self.raw_bytes += n as u64;
                at += n as u64;
            }
            let pages = self.digest.pages();
            let digest = self.digest.finish();
            note(self.send_epoch_message(&Message::End(End { pages, state_len: captured.state_len, digest })));
            self.stats.sent(self.epoch, self.wire_bytes);
        }
        self.arena = Some(arena);
        Ok(())
    }
}
