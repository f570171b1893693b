//! Pages from RAM and from the arena, encoded into batches; the device state, encoded against the last one.
//!
//! In a first copy pages are read from RAM; those of an epoch (and of its beginning, sent before the cut) stand in the arena, which
//! is mapped: every byte of it is looked at once or twice anyway. The same page may come more than once in an epoch.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use understudy_protocol::control::Captured;
use understudy_protocol::ids::Epoch;
use understudy_protocol::statistics::Encoding;

use super::{Driver, Trouble, random};
use crate::codec::state::{STATE_LIMIT, StateEncoder};
use crate::codec::{PAGE, Page};
use crate::mapping::ReadMap;
use crate::message::{End, Message};
use crate::sender::Event;

/// Pages in one slice of the first copy: short enough for the gate to be opened between two.
const SLICE: u64 = 1024;
/// Pages read from RAM at once.
const BLOCK: u64 = 64;
/// A batch goes out when it has reached this size: with its last page it still fits four messages of the secure stream.
const BATCH_BYTES: usize = 192 << 10;
/// Encoded device state travels in pieces of this size.
const STATE_PIECE: usize = 256 << 10;

/// What encoding keeps beside the batch.
#[derive(Debug, Default)]
pub(super) struct Pages {
    state: StateEncoder,
    encoded_state: Vec<u8>,
    /// The arena as it was mapped: device, inode, length.
    map: Option<(ReadMap, (u64, u64, u64))>,
}

impl Driver {
    pub(super) fn copy_slice(&mut self, first: bool) -> Result<Event, Trouble> {
        if first {
            self.cursor = 0;
            // The standby's RAM holds nothing that could be relied on: not even what it was sent before.
            self.batch.restart(self.ram_pages, &self.config.encoding, random());
            self.pages.state.restart();
        }
        let end = (self.cursor + SLICE).min(self.ram_pages);
        while self.cursor < end {
            let pages = BLOCK.min(end - self.cursor);
            self.read_ram(self.cursor, pages)?;
            let block = std::mem::take(&mut self.block);
            let pushed = block.as_chunks::<PAGE>().0.iter().zip(self.cursor..self.cursor + pages);
            let pushed: Result<(), Trouble> = pushed.into_iter().try_for_each(|(page, index)| {
                self.batch.push(index, page, &mut self.digest);
                self.ship_when_full(Epoch::ZERO, false)
            });
            self.block = block;
            pushed?;
            self.cursor += pages;
        }
        if self.cursor == self.ram_pages {
            self.ship(Epoch::ZERO, false)?;
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
                if let Some(page) = self.block.first_chunk::<PAGE>() {
                    self.batch.push(self.cursor, page, &mut self.digest);
                }
                sent += 1;
                self.ship_when_full(Epoch::ZERO, false)?;
            }
            self.cursor += 1;
        }
        let done = self.cursor >= self.ram_pages;
        if done {
            self.ship(Epoch::ZERO, false)?;
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
            Ok(()) => self.core.event(Event::PieceSent { kept: self.keeps_all() }, now),
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
        let Some(arena) = &self.arena else { return Err("it is not attached".into()) };
        let identity = self.pages.map_arena(arena).map_err(|e| format!("its arena cannot be mapped: {e}"))?;
        // Taken out while it is read, so that nothing else can be asked of the VMM in between.
        let Some((map, _)) = self.pages.map.take() else { return Err("its arena is not mapped".into()) };
        let encoded = self.encode_mapped(captured, map.bytes(), trouble);
        self.pages.map = Some((map, identity));
        encoded
    }

    fn encode_mapped(&mut self, captured: Captured, arena: &[u8], trouble: &mut Option<String>) -> Result<(), String> {
        let mut note = |sent: Result<(), Trouble>| match sent {
            Ok(()) => {}
            Err(Trouble::Peer(why) | Trouble::Vmm(why)) => *trouble = trouble.take().or(Some(why)),
        };
        let part = |offset: u64, len: Option<u64>| {
            let end = len.and_then(|len| offset.checked_add(len)).and_then(|end| usize::try_from(end).ok());
            let part = end.and_then(|end| arena.get(usize::try_from(offset).ok()?..end));
            part.ok_or_else(|| {
                format!("it says that something is at {offset} of its arena, which ends at {}", arena.len())
            })
        };
        let (indices, _) = part(captured.indices_offset, captured.pages.checked_mul(8))?.as_chunks::<8>();
        self.verify.carried(self.epoch, indices);
        let (pages, _) = part(captured.pages_offset, captured.pages.checked_mul(PAGE as u64))?.as_chunks::<PAGE>();
        for (index, page) in indices.iter().zip(pages) {
            let page: &Page = page;
            self.batch.push(u64::from_le_bytes(*index), page, &mut self.digest);
            note(self.ship_when_full(self.epoch, true));
        }
        note(self.ship(self.epoch, true));
        if !captured.more {
            let state = part(captured.state_offset, Some(captured.state_len))?;
            if state.len() > STATE_LIMIT {
                return Err(format!("its device state of {} bytes is larger than any machine's", state.len()));
            }
            self.digest.state(state);
            let mut encoded = std::mem::take(&mut self.pages.encoded_state);
            self.pages.state.encode(self.epoch, state, &mut encoded);
            for piece in encoded.chunks(STATE_PIECE) {
                note(self.send_epoch_message(&Message::State(piece)));
            }
            self.pages.encoded_state = encoded;
            self.raw_bytes += captured.state_len;
            let pages = self.digest.pages();
            let digest = self.digest.finish();
            note(self.send_epoch_message(&Message::End(End { pages, state_len: captured.state_len, digest })));
            self.stats.sent(self.epoch, self.wire_bytes);
            if let Some(check) = self.verify.ended(self.epoch) {
                note(self.send_message(self.epoch, &Message::Check(check)));
            }
        }
        Ok(())
    }

    fn ship_when_full(&mut self, epoch: Epoch, keep: bool) -> Result<(), Trouble> {
        if self.batch.len() >= BATCH_BYTES { self.ship(epoch, keep) } else { Ok(()) }
    }

    /// Send the batch, and note how long the stream took it: from that follows whether the next is compressed.
    fn ship(&mut self, epoch: Epoch, keep: bool) -> Result<(), Trouble> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.batch.seal();
        let (before, begun) = (self.wire_bytes, Instant::now());
        self.send_batch(epoch, keep)?;
        let ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.batch.sent((self.wire_bytes - before) as usize, ns);
        Ok(())
    }

    pub(super) fn encoding(&self) -> Encoding {
        let pages = self.batch.statistics();
        let (shadow_bytes, shadow_pages) = self.batch.shadow();
        Encoding {
            unchanged_pages: pages.unchanged_pages,
            zero_pages: pages.zero_pages,
            delta_pages: pages.delta_pages,
            same_pages: pages.same_pages,
            raw_pages: pages.raw_pages,
            shadow_pages,
            shadow_bytes,
            compression: self.batch.method().name().to_owned(),
        }
    }
}

impl Pages {
    /// Have the arena mapped as the file is now.
    fn map_arena(&mut self, arena: &File) -> std::io::Result<(u64, u64, u64)> {
        let metadata = arena.metadata()?;
        let identity = (metadata.dev(), metadata.ino(), metadata.len());
        if self.map.as_ref().is_none_or(|(_, mapped)| *mapped != identity) {
            self.map = None;
            self.map = Some((ReadMap::new(arena)?, identity));
        }
        Ok(identity)
    }
}
