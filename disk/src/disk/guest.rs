//! The guest's side: what devices do with a disk. Reads find the newest slice over older ones over the base; writes go where the disk's mode says.

use super::*;
use crate::block::{After, Buffer, Ended, How, Op};

impl Block for Disk {
    fn name(&self) -> &str {
        self.base.name()
    }

    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        admit(self, at, to.len() as u64)?;
        self.alive()?;
        let (first, sectors) = (at / SECTOR, to.len() as u64 / SECTOR);
        loop {
            let pieces = read(&self.index).lookup(first, sectors);
            let Some(slices) = self.slices_of(&pieces) else { continue };
            for piece in pieces {
                let from = ((piece.sector - first) * SECTOR) as usize;
                let to = &mut to[from..from + (piece.sectors * SECTOR) as usize];
                match piece.source {
                    Source::Base => self.base.read_at(piece.sector * SECTOR, to)?,
                    Source::Zero { .. } => to.fill(0),
                    // All of them were found above.
                    Source::Slice { serial, data } => read_slice(&slices[&serial], data, to, &self.dir.name())?,
                }
            }
            return Ok(());
        }
    }

    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        {
            let mode = read(&self.mode);
            if self.plainly_direct(*mode) {
                // Neither copied nor checksummed.
                admit(self, at, from.len() as u64)?;
                self.alive()?;
                return self.base.write_at(at, from);
            }
        }
        self.write(at, &from)
    }

    fn write(&self, at: u64, from: &dyn Gather) -> Result<()> {
        let len = from.len();
        admit(self, at, len as u64)?;
        if len == 0 {
            return Ok(());
        }
        let most = DATA_SECTORS as usize * SECTOR as usize;
        if len <= most {
            // The record and its data in one piece, copied once: what is checksummed is what is written.
            let mut bytes = Buffer::new(RECORD + len);
            bytes[..RECORD].fill(0);
            from.gather(&mut bytes[RECORD..]);
            self.redirect(Kind::Data, at, len as u64, &mut bytes)?;
        } else {
            let mut all = vec![0; len];
            from.gather(&mut all);
            let mut at = at;
            for part in all.chunks(most) {
                let mut bytes = vec![0; RECORD + part.len()];
                bytes[RECORD..].copy_from_slice(part);
                self.redirect(Kind::Data, at, part.len() as u64, &mut bytes)?;
                at += part.len() as u64;
            }
        }
        self.solo_bound();
        Ok(())
    }

    fn read(&self, at: u64, to: &mut dyn Scatter) -> Result<()> {
        let mut bytes = vec![0; to.len()];
        self.read_at(at, &mut bytes)?;
        to.scatter(&bytes);
        Ok(())
    }

    fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        self.begin_in_base(op, ended)
    }

    fn after_ended(&self, after: After) -> bool {
        self.base.after_ended(after)
    }

    fn submit(&self) {
        self.base.submit();
    }

    fn begins(&self, write: bool) -> bool {
        (!write || self.plainly_direct(*read(&self.mode))) && self.base.begins(write)
    }

    fn quick(&self, write: bool) -> bool {
        match (write, *read(&self.mode)) {
            (true, Mode::Protected { .. }) => true,
            // What has come to its bound is made durable by the writer.
            (true, Mode::Solo | Mode::Follows) => false,
            (true, Mode::Direct) | (false, _) => self.base.quick(write),
        }
    }

    fn read_now(&self, at: u64, to: &mut [u8]) -> bool {
        let (first, sectors) = (at / SECTOR, to.len() as u64 / SECTOR);
        let in_base = |pieces: Vec<Piece>| pieces.iter().all(|piece| matches!(piece.source, Source::Base));
        admit(self, at, to.len() as u64).is_ok()
            && self.alive().is_ok()
            && in_base(read(&self.index).lookup(first, sectors))
            && self.base.read_now(at, to)
    }

    fn how(&self) -> How {
        self.base.how()
    }

    fn trouble(&self) -> Option<String> {
        self.base.trouble()
    }

    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.redirect_zeroes(at, len, if unmap { Kind::Discard } else { Kind::Zero })
    }

    fn flush(&self) -> Result<()> {
        self.alive()?;
        let mode = *read(&self.mode);
        match mode {
            Mode::Direct => self.flush_direct(),
            Mode::Solo => self.commit_solo(),
            // See the module: it is durable with its epoch, and nobody outside learns of it before.
            Mode::Protected { .. } | Mode::Follows => Ok(()),
        }
    }

    fn resize(&self, size: u64) -> Result<()> {
        // Writes wait, as they might be for what goes away.
        let _mode = write(&self.mode);
        if size < self.base.size() {
            return Err(Error::Refused(format!(
                "{} has {} bytes and cannot be made smaller while it is in use",
                self.base.name(),
                self.base.size()
            )));
        }
        if !self.hold_base()? {
            return Err(Error::Owned(format!(
                "{} cannot be enlarged yet: an earlier owner still holds {BASE_LOCK}",
                self.base.name()
            )));
        }
        self.base.resize(size)?;
        if let Some(mirror) = &self.mirror {
            mirror.resize(size)?;
        }
        self.owner_update(|owner| owner.size = size).map(|_| ())
    }

    fn take_charge(&self) -> Result<()> {
        self.hold_base().map(|_| ())
    }
}
