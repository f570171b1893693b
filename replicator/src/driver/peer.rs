//! The connection with the peer: making it, writing to it, reading from it.

use std::io::Write;
use std::sync::mpsc;
use std::thread;

use understudy_protocol::control::PathStatus;
use understudy_protocol::frame;
use understudy_protocol::ids::Epoch;
use understudy_protocol::urgent;

use super::{Driver, Input, Trouble, lock};
use crate::codec::PAGE;
use crate::image::FRAME_LIMIT;
use crate::link::{self, Link, Reader};
use crate::message::Message;
use crate::sender::Event;

/// An epoch that takes more encoded bytes is not kept for sending again; a lost link then costs a first copy.
const KEEP_LIMIT: usize = 64 << 20;

impl Driver {
    pub(super) fn send_batch(&mut self, epoch: Epoch, keep: bool) -> Result<(), Trouble> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        self.raw_bytes += batch.pages() * PAGE as u64;
        let sent = if keep {
            self.send_epoch_message(&Message::Pages(batch.bytes()))
        } else {
            self.send_message(epoch, &Message::SyncPages(batch.bytes()))
        };
        self.batch = batch;
        self.batch.clear();
        sent
    }

    /// Encode into the kept frames, and send from there.
    pub(super) fn send_epoch_message(&mut self, message: &Message<'_>) -> Result<(), Trouble> {
        let all: usize = self.kept.iter().map(|kept| kept.bytes.len()).sum();
        let (generation, epoch) = (self.core.generation(), self.epoch);
        if let Some(kept) = self.kept.back_mut().filter(|_| all > KEEP_LIMIT) {
            (kept.partial, kept.bytes) = (true, Vec::new());
        }
        if let (Message::End(_), Some(kept)) = (message, self.kept.back_mut()) {
            kept.ended = true;
        }
        let bytes = match self.kept.back_mut() {
            Some(kept) if !kept.partial => &mut kept.bytes,
            _ => {
                self.frame.clear();
                &mut self.frame
            }
        };
        let start = bytes.len();
        link::encode(generation, epoch, message, bytes).map_err(|e| Trouble::Peer(e.to_string()))?;
        let Some(writer) = &mut self.writer else { return Err(Trouble::Peer("it is not connected".into())) };
        self.wire_bytes += (bytes.len() - start) as u64;
        writer.write_all(&bytes[start..]).map_err(|e| {
            self.writer = None;
            Trouble::Peer(format!("the connection with the standby broke: {e}"))
        })
    }

    /// Whether all of the epoch's frames are kept.
    pub(super) fn keeps_all(&self) -> bool {
        self.kept.back().is_some_and(|kept| !kept.partial)
    }

    pub(super) fn send_message(&mut self, epoch: Epoch, message: &Message<'_>) -> Result<(), Trouble> {
        let mut bytes = Vec::new();
        let encoded = link::encode(self.core.generation(), epoch, message, &mut bytes);
        encoded.map_err(|e| Trouble::Peer(e.to_string()))?;
        let Some(writer) = &mut self.writer else { return Err(Trouble::Peer("it is not connected".into())) };
        self.wire_bytes += bytes.len() as u64;
        writer.write_all(&bytes).map_err(|e| {
            self.writer = None;
            Trouble::Peer(format!("the connection with the standby broke: {e}"))
        })
    }

    pub(super) fn resend(&mut self, after: Epoch) -> Result<(), Trouble> {
        let Some(writer) = &mut self.writer else { return Err(Trouble::Peer("it is not connected".into())) };
        // (Not the beginning of an epoch that was not cut: that is in the next cut again.)
        for kept in self.kept.iter().filter(|kept| kept.epoch > after && kept.ended) {
            self.wire_bytes += kept.bytes.len() as u64;
            let sent = writer.write_all(&kept.bytes);
            sent.map_err(|e| Trouble::Peer(format!("the connection with the standby broke: {e}")))?;
        }
        Ok(())
    }

    pub(super) fn connect(&mut self) {
        self.connection += 1;
        let connection = self.connection;
        let count = self.config.peers.len();
        if count == 0 {
            let why = "no other node is configured (see --peers)".to_owned();
            let _ = self.post.send(Input::Connect(connection, Err(why)));
            return;
        }
        let (name, address) = self.config.peers[self.next_peer % count].clone();
        self.next_peer += 1;
        self.peer_name = Some(name.clone());
        let (post, key, timeout) = (self.post.clone(), self.config.key.clone(), self.config.sender.peer_timeout);
        let encryption = self.config.encryption;
        thread::spawn(move || {
            let result = link::connect(&name, &address, &key, encryption, timeout)
                .map(Box::new)
                .map_err(|why| format!("cannot reach {name} at {address}: {why}"));
            let _ = post.send(Input::Connect(connection, result));
        });
    }

    pub(super) fn adopt(&mut self, connection: u64, link: Link) -> std::io::Result<()> {
        let Link { reader, mut writer, closer, .. } = link;
        writer.set_timeout(Some(self.config.sender.peer_timeout))?;
        *lock(&self.peer_twin) = Some(closer);
        let post = self.post.clone();
        thread::spawn(move || {
            urgent::this_thread();
            read_peer(connection, reader, &post);
        });
        self.writer = Some(writer);
        Ok(())
    }

    /// The paths to the peer; none where it has one address.
    pub(super) fn paths(&self) -> Vec<PathStatus> {
        let peer = self.config.peers.iter().find(|(name, _)| Some(name) == self.peer_name.as_ref());
        let several = peer.map(|(_, list)| link::addresses(list)).filter(|all| all.len() > 1);
        match (&*lock(&self.peer_twin), several) {
            (_, None) => Vec::new(),
            (Some(closer), _) => closer.paths(),
            (None, Some(all)) => {
                let of = |address: &str| PathStatus {
                    address: address.to_owned(),
                    why: "there is no connection".into(),
                    ..PathStatus::default()
                };
                all.into_iter().map(of).collect()
            }
        }
    }

    pub(super) fn disconnect(&mut self) {
        // What its reader and its connector still say belongs to the past.
        self.connection += 1;
        self.writer = None;
        self.verify.interrupted();
        self.disk_verify.interrupted();
        if let Some(peer) = lock(&self.peer_twin).take() {
            peer.close();
        }
    }
}

fn read_peer(connection: u64, mut reader: Reader, post: &mpsc::Sender<Input>) {
    let mut payload = Vec::new();
    let why = loop {
        match frame::read_record(&mut reader, FRAME_LIMIT, &mut payload) {
            Ok(Some(header)) => match Message::parse(header.kind, &payload) {
                Ok(message) => {
                    let Some(message) = message.small() else { break "the standby sent pages".to_owned() };
                    let event = Event::Message(header.generation, header.epoch, message);
                    if post.send(Input::Peer(connection, event)).is_err() {
                        return;
                    }
                }
                Err(e) => break e.to_string(),
            },
            Ok(None) => break "the standby closed the connection".to_owned(),
            Err(e) => break format!("the connection with the standby broke: {e}"),
        }
    };
    let _ = post.send(Input::Peer(connection, Event::PeerLost(why)));
}
