//! The sender's side of mirrored disks: what the VMM reads from them into the disk arena goes to the peer's copies.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use understudy_disk::Tag;
use understudy_disk::mirror::{Begin, PeerState, SliceLabel};
use understudy_protocol::control::{
    MirrorBegun, MirrorDurable, MirrorPiece, MirrorPieces, MirrorWhat, Sealed, VmmRequest,
};
use understudy_protocol::ids::Epoch;

use super::{Driver, Trouble};
use crate::message::{Flushed, Log, Message, Part, PartContent};
use crate::sender::{DisksSent, Event};

/// So many bytes are written to the copies, and then made durable there while more come.
const FLUSH_EVERY: u64 = 32 << 20;

/// What is known of the copies.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// How the peer says that they are.
    states: Vec<PeerState>,
    /// The disk arena.
    arena: Option<File>,
    /// What was read from it into.
    buffer: Vec<u8>,
    /// Answers that the peer owes.
    flushes: u32,
    unflushed: u64,
    /// What it answered, and the VMM was not told.
    durable: VecDeque<Vec<Flushed>>,
    /// For the progress.
    sent: u64,
    left: u64,
    /// They are in step: their logs go on.
    joined: bool,
    /// The peer was told that they are, and has not answered.
    stepping: bool,
    /// What the disks are at the end of the epoch that is being sent.
    tags: Vec<Tag>,
}

impl Copies {
    /// The peer said something.
    pub(super) fn heard(&mut self, event: &Event) {
        match event {
            Event::Message(_, _, Message::Welcome(welcome)) => {
                self.states.clone_from(&welcome.copies);
                self.durable.clear();
                (self.flushes, self.unflushed, self.stepping) = (0, 0, false);
            }
            Event::Message(_, _, Message::Flushed(flushed)) => {
                self.flushes = self.flushes.saturating_sub(1);
                self.durable.push_back(flushed.clone());
            }
            _ => {}
        }
    }

    /// Whether the peer has still to say that something is durable.
    pub(super) fn flushing(&self) -> bool {
        self.flushes > 0
    }

    /// Whether they are in step.
    pub(super) fn joined(&self) -> bool {
        self.joined
    }

    /// The connection or the VMM is gone.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// What was sent, and what is missing, in bytes.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.sent, self.left)
    }
}

fn unknown(e: serde_json::Error) -> Trouble {
    Trouble::Vmm(format!("it speaks of mirrored disks in a way that is not understood: {e}"))
}

impl Driver {
    /// As [`Driver::call`], with what the peer has said told to the VMM before.
    fn call_for_copies<R: serde::de::DeserializeOwned>(&mut self, request: &VmmRequest) -> Result<R, Trouble> {
        while let Some(flushed) = self.copies.durable.pop_front() {
            let copy = |copy: Flushed| MirrorDurable {
                upto: copy.upto,
                differing: copy.differing.iter().map(|range| (range.at, range.len)).collect(),
            };
            let copies = flushed.into_iter().map(copy).collect();
            self.call::<()>(&VmmRequest::MirrorDurable { copies }).map_err(lost)?;
        }
        self.call(request).map_err(lost)
    }

    /// The VMM says what has to be done with each copy; a copy that must not be touched ends the connection, with its sentence.
    pub(super) fn begin_copies(&mut self) -> Result<Event, Trouble> {
        let states: Result<Vec<_>, _> = self.copies.states.iter().map(serde_json::to_value).collect();
        let request = VmmRequest::MirrorBegin { copies: states.map_err(unknown)? };
        let begun: MirrorBegun = match self.call(&request) {
            Ok(begun) => begun,
            Err(Event::VmmRefused(why)) => return Err(Trouble::Peer(why)),
            Err(event) => return Ok(event),
        };
        let begins: Result<Vec<Begin>, _> = begun.begins.into_iter().map(serde_json::from_value).collect();
        let arena = self.config.layout.disk_arena();
        let opened = File::open(&arena);
        self.copies.arena = Some(opened.map_err(|e| Trouble::Vmm(format!("{} cannot be read: {e}", arena.display())))?);
        (self.copies.sent, self.copies.left, self.copies.unflushed) = (0, begun.left, 0);
        (self.copies.joined, self.copies.stepping) = (false, false);
        self.copies.durable.clear();
        self.send_message(Epoch::ZERO, &Message::CopyBegin(begins.map_err(unknown)?))?;
        Ok(Event::CopiesRead { sent: 0, left: begun.left, wait: false })
    }

    /// The next parts, before the first epoch.
    pub(super) fn copy_disks(&mut self) -> Result<Event, Trouble> {
        let (sent, read) = self.send_parts(Epoch::ZERO)?;
        let wait = sent == 0 && read.flying > 0;
        if wait && !self.copies.flushing() {
            self.send_flush()?;
        }
        self.publish();
        Ok(Event::CopiesRead { sent, left: read.left, wait })
    }

    /// Ask the peer to make durable what it was sent.
    pub(super) fn send_flush(&mut self) -> Result<(), Trouble> {
        self.copies.unflushed = 0;
        self.copies.flushes += 1;
        self.send_message(Epoch::ZERO, &Message::Flush)
    }

    fn send_parts(&mut self, epoch: Epoch) -> Result<(u64, MirrorPieces), Trouble> {
        let read: MirrorPieces = self.call_for_copies(&VmmRequest::MirrorRead)?;
        let mut sent = 0;
        for piece in &read.pieces {
            let MirrorWhat::Part { number, at, len, hash } = piece.what else { continue };
            let buffer = self.copies.bytes(piece)?;
            let content = match buffer.first_chunk::<32>() {
                Some(bytes) if hash => PartContent::Hash(*bytes),
                _ if buffer.is_empty() => PartContent::Zero,
                _ => PartContent::Data(&buffer),
            };
            let told = self.send_message(epoch, &Message::Part(Part { disk: piece.disk, number, at, len, content }));
            self.raw_bytes += piece.bytes;
            self.copies.buffer = buffer;
            told?;
            sent += len;
        }
        self.copies.left = read.left;
        self.copies.sent += sent;
        self.copies.unflushed += sent;
        if self.copies.unflushed >= FLUSH_EVERY && !self.copies.flushing() {
            self.send_flush()?;
        }
        Ok((sent, read))
    }

    /// The disks are sealed for the epoch.
    pub(super) fn sealed(&mut self, sealed: Sealed) -> Event {
        let tags: Result<Vec<Tag>, _> = sealed.tags.into_iter().map(serde_json::from_value).collect();
        match tags {
            Ok(tags) => {
                self.copies.tags = tags;
                Event::VmmDone
            }
            Err(e) => unknown(e).event(),
        }
    }

    /// A part of what the copies need of the epoch. As with pages, an epoch whose peer is gone is encoded to its end: it may come back for it.
    pub(super) fn send_disks(&mut self) -> Vec<Event> {
        let mut trouble = None;
        let sent = if self.copies.joined { self.send_log(&mut trouble) } else { self.step() };
        match sent {
            Ok(sent) => [Event::DisksSent(sent)].into_iter().chain(trouble.map(Event::PeerLost)).collect(),
            Err(Trouble::Vmm(why)) => {
                self.detach();
                vec![Event::VmmLost(why)]
            }
            // A first epoch: nobody can go on from half of it.
            Err(Trouble::Peer(why)) => vec![Event::DisksSent(DisksSent::All), Event::PeerLost(why)],
        }
    }

    /// In the first epoch: what the copies lack of the instant at which protection began.
    fn step(&mut self) -> Result<DisksSent, Trouble> {
        if self.copies.stepping {
            if self.copies.flushing() {
                return Ok(DisksSent::Wait);
            }
            // The answer came after the copies had noted that they are in step.
            self.call_for_copies::<()>(&VmmRequest::MirrorDone)?;
            (self.copies.joined, self.copies.stepping) = (true, false);
            return Ok(DisksSent::More);
        }
        let (sent, read) = self.send_parts(self.epoch)?;
        if let Some(tags) = read.in_step {
            let tags: Result<Vec<Tag>, _> = tags.into_iter().map(serde_json::from_value).collect();
            self.send_message(self.epoch, &Message::InStep(tags.map_err(unknown)?))?;
            self.send_flush()?;
            self.copies.stepping = true;
            return Ok(DisksSent::Wait);
        }
        if sent > 0 {
            return Ok(DisksSent::More);
        }
        if !self.copies.flushing() {
            self.send_flush()?;
        }
        Ok(DisksSent::Wait)
    }

    /// The slices, as they were written.
    fn send_log(&mut self, trouble: &mut Option<String>) -> Result<DisksSent, Trouble> {
        let read: MirrorPieces = self.call_for_copies(&VmmRequest::MirrorLog)?;
        let mut note = |sent: Result<(), Trouble>| match sent {
            Ok(()) => {}
            Err(Trouble::Peer(why) | Trouble::Vmm(why)) => *trouble = trouble.take().or(Some(why)),
        };
        if read.pieces.is_empty() {
            let tags = std::mem::take(&mut self.copies.tags);
            note(self.send_epoch_message(&Message::Seal(tags)));
            return Ok(DisksSent::All);
        }
        for piece in &read.pieces {
            let MirrorWhat::Log { serial, generation, epoch, at, closed } = &piece.what else { continue };
            let closed = closed.clone().map(serde_json::from_value).transpose().map_err(unknown)?;
            let slice = SliceLabel { serial: *serial, generation: *generation, epoch: *epoch };
            let buffer = self.copies.bytes(piece)?;
            let log = Log { disk: piece.disk, slice, offset: *at, closed, bytes: &buffer };
            note(self.send_epoch_message(&Message::Log(log)));
            self.copies.buffer = buffer;
            self.raw_bytes += piece.bytes;
        }
        Ok(DisksSent::More)
    }
}

impl Copies {
    /// A piece's bytes, in the buffer, which is to be given back.
    fn bytes(&mut self, piece: &MirrorPiece) -> Result<Vec<u8>, Trouble> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let len = usize::try_from(piece.bytes).ok().filter(|len| *len <= crate::image::FRAME_LIMIT);
        let Some(len) = len else { return Err(Trouble::Vmm(format!("it gave a piece of {} bytes", piece.bytes))) };
        buffer.resize(len, 0);
        let Some(arena) = &self.arena else { return Err(Trouble::Vmm("it is not attached".into())) };
        let read = arena.read_exact_at(&mut buffer, piece.offset);
        read.map_err(|e| Trouble::Vmm(format!("its disk arena cannot be read: {e}")))?;
        Ok(buffer)
    }
}

fn lost(event: Event) -> Trouble {
    match event {
        Event::VmmLost(why) | Event::VmmRefused(why) => Trouble::Vmm(why),
        _ => Trouble::Vmm("it gave no answer".into()),
    }
}
