//! What [`crate::mirror`] needs to see of a disk.

use super::*;
use crate::mirror::{LogPiece, LogReader, SliceLabel};

impl Disk {
    pub(crate) fn mirroring(&self) -> Result<&Mirroring> {
        self.mirror.as_ref().ok_or_else(|| {
            Error::Refused(format!(
                "{} was not opened as a mirrored disk: say so in the machine's configuration",
                self.base.name()
            ))
        })
    }

    pub(crate) fn disk_id(&self) -> u64 {
        self.id
    }

    pub(crate) fn is_protected(&self) -> bool {
        matches!(*read(&self.mode), Mode::Protected { .. })
    }

    /// The state that the base is in; `None` while it is written directly.
    pub(crate) fn merged_at(&self) -> Option<Tag> {
        let mode = read(&self.mode);
        (*mode != Mode::Direct).then(|| self.table().merged)
    }

    /// The newest state that counts; `None` while the base is written directly.
    pub(crate) fn committed_at(&self) -> Option<Tag> {
        let mode = read(&self.mode);
        let table = self.table();
        let newest = table.slices.values().rev().find(|s| s.is_committed()).map_or(table.merged, |s| s.tag());
        (*mode != Mode::Direct).then_some(newest)
    }

    /// The states of closed slices that are not merged, and the newest closed state.
    pub(crate) fn waiting_states(&self) -> (Vec<Tag>, Tag) {
        let table = self.table();
        let open = table.open.as_ref().map(|s| s.id.serial);
        let closed = table.slices.values().filter(|s| Some(s.id.serial) != open);
        (closed.map(|s| s.tag()).collect(), table.closed)
    }

    /// Where slices have content, in bytes.
    pub(crate) fn waiting_ranges(&self) -> Vec<(u64, u64)> {
        read(&self.index).pieces().map(|piece| (piece.sector * SECTOR, piece.sectors * SECTOR)).collect()
    }

    pub(crate) fn require_alive(&self) -> Result<()> {
        self.alive()
    }

    /// Write the owner record with what is known of peers now.
    pub(crate) fn store_peers(&self) -> Result<()> {
        self.owner_update(|_| {}).map(drop)
    }

    /// What was read from the base is durable here.
    pub(crate) fn flush_content(&self) -> Result<()> {
        let direct = *read(&self.mode) == Mode::Direct;
        #[cfg(test)]
        if crate::sim::sabotaged(crate::sim::Sabotage::SentUnflushed) {
            return Ok(());
        }
        // Merges flush by themselves before their blocks are cleared.
        if direct { self.flush_direct() } else { Ok(()) }
    }

    /// Whether the base is this process's alone; a sentence if not.
    pub(crate) fn require_base(&self) -> Result<()> {
        if self.hold_base()? {
            return Ok(());
        }
        Err(Error::Owned(format!(
            "{} cannot be synchronised from yet: an earlier process still holds {BASE_LOCK} in {}; it must end first",
            self.base.name(),
            self.dir.name()
        )))
    }

    /// See [`LogReader::next`].
    pub(crate) fn read_log(&self, reader: &mut LogReader, most: usize) -> Result<Option<LogPiece>> {
        self.alive()?;
        let (slice, open) = {
            let table = self.table();
            let open = table.open.as_ref().map(|s| s.id.serial);
            match table.slices.range(reader.after + 1..).next() {
                Some((_, slice)) if slice.id.serial == reader.after + 1 => {
                    (slice.clone(), open == Some(slice.id.serial))
                }
                None if table.merged.serial <= reader.after => return Ok(None),
                _ => {
                    return Err(Error::Refused(format!(
                        "slice {} of {} was merged before it was sent; the session has to begin again",
                        reader.after + 1,
                        self.base.name()
                    )));
                }
            }
        };
        // Looked at first: when it is closed the end does not move any more.
        let end = slice.bytes();
        let len = most.min(end.saturating_sub(reader.offset) as usize);
        let last = !open && reader.offset + len as u64 == end;
        if len == 0 && !last {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        read_slice(&slice, reader.offset, &mut bytes, &self.dir.name())?;
        let label = SliceLabel { serial: slice.id.serial, generation: slice.id.generation, epoch: slice.id.epoch };
        let piece = LogPiece { slice: label, offset: reader.offset, bytes, closed: last.then(|| slice.tag()) };
        if last {
            (reader.after, reader.offset) = (slice.id.serial, 0);
        } else {
            reader.offset += len as u64;
        }
        Ok(Some(piece))
    }
}
