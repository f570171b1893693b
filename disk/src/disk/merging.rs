//! Merging: committed slices go into the base, oldest first, and away. [`crate::merger`] calls it in the background, a takeover and the end of a
//! machine until nothing is left.

use super::*;

impl Disk {
    /// Merge the oldest committed slices into the base, one batch: verified, written, flushed, recorded, removed, in this order. Repeating it after a
    /// crash at any point gives the same base.
    ///
    /// What is merged is read from the base afterwards.
    ///
    /// # Errors
    /// A slice is damaged (then what is in it cannot be read any more either); the disk is not ours any more; what the storage says.
    /// Nothing is lost by an error: the slices stay.
    pub fn merge(&self) -> Result<Merged> {
        let one = self.merging.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.merge_batch();
        if let (Err(_), Some(mirror)) = (&result, &self.mirror) {
            mirror.merge_ended();
        }
        drop(one);
        self.table().problem = match &result {
            Ok(Merged::Waiting(why)) => Some(why.clone()),
            Ok(_) => None,
            Err(e) => Some(e.to_string()),
        };
        result
    }

    fn merge_batch(&self) -> Result<Merged> {
        self.alive()?;
        let mut batch = Vec::new();
        let mut bytes = 0;
        let limit = self.limit.load(Ordering::Acquire);
        for slice in self.table().slices.values() {
            if slice.id.serial > limit
                || !slice.is_committed()
                || (bytes > 0 && bytes + slice.bytes() > self.limits.batch)
            {
                break;
            }
            bytes += slice.bytes();
            batch.push(slice.clone());
        }
        let Some(last) = batch.last() else { return Ok(Merged::Nothing) };
        let last = last.clone();
        if !self.hold_base()? {
            return Ok(Merged::Waiting(format!(
                "{} cannot be merged yet: an earlier owner still holds {BASE_LOCK} in {}; it must end, or its node be fenced",
                self.base.name(),
                self.dir.name()
            )));
        }
        self.check_owner()?;
        // Newest wins within the batch: nothing is written twice.
        let mut content = Index::default();
        for slice in &batch {
            let doing = || format!("reading the slice {} in {}", slice.name, self.dir.name());
            let scan = crate::record::scan(&*slice.file(), slice.id).doing(doing)?;
            if scan.digest.finish() != slice.tag().digest || scan.end != slice.bytes() {
                let what = match scan.standing {
                    crate::record::Standing::Open { ends } => ends,
                    crate::record::Standing::Corrupt { what } => what,
                    _ => "its content is not what was written".into(),
                };
                let what = format!("in {}/{}: {what}", self.dir.name(), slice.name);
                slice.fail(what.clone());
                return Err(Error::Corrupt { what });
            }
            for (record, data) in &scan.records {
                content.insert(piece(slice.id.serial, record.kind, record.sector, record.sectors, *data));
            }
        }
        if let Some(mirror) = &self.mirror {
            let piece = |piece: Piece| match piece.source {
                Source::Base => None,
                Source::Slice { serial, .. } | Source::Zero { serial, .. } => {
                    Some((serial, piece.sector * SECTOR, piece.sectors * SECTOR))
                }
            };
            mirror.before_merge(&content.pieces().filter_map(piece).collect::<Vec<_>>())?;
        }
        self.begun.fetch_max(last.id.serial, Ordering::AcqRel);
        self.write_base(&batch, &content)?;
        self.flush_base()?;
        if let Some(mirror) = &self.mirror {
            mirror.after_merge(&batch.iter().map(|slice| slice.tag()).collect::<Vec<_>>());
        }
        let newest = last.tag();
        self.owner_update(|owner| {
            owner.newest = newest;
            owner.size = self.base.size();
        })?;
        {
            let mut table = self.table();
            let mut index = write(&self.index);
            for piece in content.pieces() {
                index.merged(piece.sector, piece.sectors, newest.serial);
            }
            for slice in &batch {
                table.slices.remove(&slice.id.serial);
            }
            table.merged = newest;
        }
        for slice in &batch {
            match self.dir.remove(&slice.name.to_string()) {
                // It is merged: the next opening removes it.
                Err(_) | Ok(()) => {}
            }
        }
        self.waiting.fetch_sub(bytes, Ordering::Relaxed);
        self.merged_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.room.notify_all();
        Ok(Merged::Slices { slices: batch.len(), bytes })
    }

    /// Merge nothing above this slice from now on (`None`: everything again). What is being merged ends first.
    pub(crate) fn hold_merging(&self, above: Option<u64>) -> Tag {
        self.limit.store(above.unwrap_or(u64::MAX), Ordering::Release);
        drop(self.merging.lock().unwrap_or_else(PoisonError::into_inner));
        self.room.notify_all();
        self.table().merged
    }

    /// Hold the base still at exactly one state, and say at which.
    pub(crate) fn hold_base_still(&self) -> Result<Tag> {
        let tag = self.hold_merging(Some(0));
        // A batch that was merged in part, by this process or by one that died, is merged to its end.
        let begun = self.begun.load(Ordering::Acquire);
        if tag.serial >= begun {
            return Ok(self.hold_merging(Some(tag.serial)));
        }
        self.hold_merging(Some(begun));
        loop {
            match self.merge()? {
                Merged::Slices { .. } => {}
                Merged::Nothing => return Ok(self.table().merged),
                Merged::Waiting(why) => return Err(Error::Owned(why)),
            }
        }
    }

    /// Merge up to this state and hold there; `None`: it is not committed yet.
    pub(crate) fn hold_base_at(&self, tag: Tag) -> Result<Option<Tag>> {
        let still = self.hold_base_still()?;
        if still.serial < tag.serial {
            self.hold_merging(Some(tag.serial));
            while let Merged::Slices { .. } = self.merge()? {}
        }
        let merged = self.table().merged;
        if merged.serial < tag.serial {
            return Ok(None);
        }
        if merged != tag {
            return Err(Error::Refused(format!(
                "{} is at slice {} (digest {:08x}), its peer at slice {} (digest {:08x}): they do not agree at one state",
                self.base.name(),
                merged.serial,
                merged.digest,
                tag.serial,
                tag.digest
            )));
        }
        Ok(Some(merged))
    }

    #[cfg(not(test))]
    fn flush_base(&self) -> Result<()> {
        self.base.flush()
    }

    #[cfg(test)]
    fn flush_base(&self) -> Result<()> {
        if crate::sim::sabotaged(crate::sim::Sabotage::RemoveBeforeFlush) { Ok(()) } else { self.base.flush() }
    }

    fn write_base(&self, batch: &[Arc<Slice>], content: &Index) -> Result<()> {
        let mut buffer = vec![0; 1 << 20];
        for piece in content.pieces() {
            let (mut at, mut left) = (piece.sector * SECTOR, piece.sectors * SECTOR);
            let end = at + left;
            if end > self.base.size() {
                let (path, was, is) = (self.base.name().to_owned(), end, self.base.size());
                return Err(Error::Shrank { path, was, is });
            }
            match piece.source {
                Source::Base => {}
                Source::Zero { unmap, .. } => self.base.write_zeroes(at, left, unmap)?,
                Source::Slice { serial, mut data } => {
                    // The index was made from this batch.
                    let Some(slice) = batch.iter().find(|s| s.id.serial == serial) else { continue };
                    while left > 0 {
                        let now = &mut buffer[..left.min(1 << 20) as usize];
                        read_slice(slice, data, now, &self.dir.name())?;
                        self.base.write_at(at, now)?;
                        at += now.len() as u64;
                        data += now.len() as u64;
                        left -= now.len() as u64;
                    }
                }
            }
        }
        Ok(())
    }
}
