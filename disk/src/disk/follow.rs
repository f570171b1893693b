//! A disk as a standby's copy has it: slices are appended as they come from the primary, and nobody reads or writes. [`crate::mirror::Copy`] is made
//! of this.

use super::*;
use crate::mirror::LogPiece;

/// What is needed for it.
pub(crate) struct Following {
    pub base: Arc<dyn Block>,
    pub dir: Arc<dyn Directory>,
    pub me: Identity,
    pub id: u64,
    pub limits: Limits,
    pub base_lock: Option<Box<dyn Lock>>,
}

/// A slice that comes in.
pub(crate) struct Incoming {
    slice: Arc<Slice>,
    /// The beginning of a record whose end has not come.
    pending: Vec<u8>,
}

impl Disk {
    pub(crate) fn follow(with: Following, slices: Vec<Arc<Slice>>, merged: Tag) -> Disk {
        let Following { base, dir, me, id, limits, base_lock } = with;
        let opened = Opened { base, dir, me, id, limits, mirror: None, base_lock };
        Disk::with(opened, Mode::Follows, Index::default(), slices, merged)
    }

    /// It is another's now: the right to write to the base goes with it.
    pub(crate) fn give_lock(&self) -> Option<Box<dyn Lock>> {
        self.base_lock.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What is committed, and what is sealed beyond it.
    pub(crate) fn standing(&self) -> (Tag, Vec<Tag>) {
        let table = self.table();
        // The mark of one commits what is before it.
        let newest = table.slices.values().rev().find(|slice| slice.is_committed());
        let at = newest.map_or(table.merged, |slice| slice.tag());
        let beyond = table.slices.range(at.serial + 1..).map(|(_, slice)| slice);
        (at, beyond.take_while(|slice| slice.is_sealed()).map(|slice| slice.tag()).collect())
    }

    /// The next piece of the log.
    pub(crate) fn receive(&self, incoming: &mut Option<Incoming>, piece: &LogPiece) -> Result<()> {
        self.alive()?;
        let label = piece.slice;
        let id = SliceId { disk: self.id, generation: label.generation, epoch: label.epoch, serial: label.serial };
        let refuse = |why: &str| {
            Err(Error::Refused(format!(
                "what came for slice {} of the copy {} {why}; the session has to begin again",
                label.serial,
                self.base.name()
            )))
        };
        let into = match incoming {
            Some(into) if into.slice.id == id => into,
            Some(_) => return refuse("came before the slice before it was closed"),
            None if piece.offset != 0 => return refuse("does not begin at its beginning"),
            None if label.generation > self.me.generation => return refuse("is of a generation that is yet to come"),
            None => {
                let next = self.table().next;
                if label.serial != next {
                    return refuse(&format!("does not come next: that is slice {next}"));
                }
                incoming.insert(Incoming { slice: self.receive_slice(id)?, pending: Vec::new() })
            }
        };
        let mut log = into.slice.appending();
        let (mut number, end) = log.position();
        if piece.offset != end + into.pending.len() as u64 {
            return refuse("does not go on where the last piece ended");
        }
        into.pending.extend_from_slice(&piece.bytes);
        let (mut heads, mut done) = (Vec::new(), 0);
        while let Some(head) = into.pending[done..].first_chunk::<RECORD>() {
            let record = match crate::record::Record::decode(head) {
                Ok(record) => record,
                Err(why) => return refuse(why),
            };
            let len = RECORD + record.data_len() as usize;
            let within = (record.sector + u64::from(record.sectors)) * SECTOR <= self.base.size();
            if record.slice != id || record.number != number || matches!(record.kind, Kind::Seal | Kind::Commit) {
                return refuse("is not the record that comes next");
            }
            if !within {
                return refuse("is for sectors that the copy has not");
            }
            if into.pending.len() - done < len {
                break;
            }
            if record.kind == Kind::Data && crc32fast::hash(&into.pending[done + RECORD..done + len]) != record.crc {
                return refuse("has a wrong checksum");
            }
            heads.push(*head);
            number += 1;
            done += len;
        }
        if done > 0 {
            log.append_encoded(&heads, &into.pending[..done])?;
            into.pending.drain(..done);
            self.waiting.fetch_add(done as u64, Ordering::Relaxed);
        }
        drop(log);
        if let Some(tag) = piece.closed {
            if !into.pending.is_empty() || into.slice.tag() != tag {
                return refuse("is not what its end says that it is");
            }
            self.table().closed = tag;
            *incoming = None;
        }
        Ok(())
    }

    /// A file for a slice that comes.
    fn receive_slice(&self, id: SliceId) -> Result<Arc<Slice>> {
        let slice = self.make_slice(id)?;
        let mut table = self.table();
        table.next = id.serial + 1;
        table.slices.insert(id.serial, slice.clone());
        Ok(slice)
    }

    /// All that came up to this state is durable. More may have come already.
    pub(crate) fn seal_received(&self, tag: Tag, incoming: Option<&Incoming>) -> Result<()> {
        let (upto, found) = {
            let table = self.table();
            let found = table.slices.get(&tag.serial).map(|slice| slice.tag());
            let upto: Vec<_> = table.slices.range(..=tag.serial).map(|(_, slice)| slice.clone()).collect();
            (upto, found.unwrap_or(table.merged))
        };
        let open = incoming.is_some_and(|incoming| incoming.slice.id.serial <= tag.serial);
        if open || found != tag {
            return Err(Error::Refused(format!(
                "the epoch ends with slice {} (digest {:08x}) of {}, and {} slice {} (digest {:08x}); the session has to begin again",
                tag.serial,
                tag.digest,
                self.base.name(),
                if open { "what came ends in the middle of" } else { "what came is" },
                found.serial,
                found.digest
            )));
        }
        self.seal_these(upto.into_iter().filter(|slice| !slice.is_sealed()).collect())
    }

    /// Mark everything up to this state, durably.
    pub(crate) fn commit_received(&self, tag: Tag) -> Result<()> {
        self.check_owner()?;
        let (upto, known) = {
            let table = self.table();
            let known = table.slices.get(&tag.serial).map(|slice| slice.tag());
            let upto: Vec<_> = table.slices.range(..=tag.serial).map(|(_, slice)| slice.clone()).collect();
            (upto, known.or_else(|| (table.merged.serial == tag.serial).then_some(table.merged)))
        };
        if known.is_some_and(|known| known != tag) || (known.is_none() && self.table().merged.serial < tag.serial) {
            return Err(Error::Refused(format!(
                "slice {} (digest {:08x}) is to be committed, and the copy {} has something else there",
                tag.serial,
                tag.digest,
                self.base.name()
            )));
        }
        // The newest first: its mark commits what is before it, so that no state between two epochs ever counts.
        upto.iter().rev().filter(|slice| !slice.is_committed()).try_for_each(|slice| slice.commit())?;
        self.room.notify_all();
        Ok(())
    }

    /// What is not sealed is thrown away.
    pub(crate) fn forget_unsealed(&self) {
        let mut table = self.table();
        let unsealed: Vec<_> = table.slices.values().filter(|s| !s.is_sealed()).cloned().collect();
        for slice in unsealed {
            table.slices.remove(&slice.id.serial);
            self.waiting.fetch_sub(slice.bytes(), Ordering::Relaxed);
            // If it stays it is not sealed: the next opening removes it.
            let _ = self.dir.remove(&slice.name.to_string());
        }
        table.closed = table.slices.values().next_back().map_or(table.merged, |slice| slice.tag());
        table.next = table.closed.serial + 1;
    }
}
