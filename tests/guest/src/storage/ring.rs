//! A ring of numbers, read and written past the page cache: what the disk itself holds, not what memory remembers of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;

use super::{Result, told};

/// Slots.
pub const SLOTS: u64 = 64;
/// Bytes of a slot: every device accepts it as a unit of direct I/O.
const SLOT: usize = 4096;

/// See the module.
pub struct Ring {
    file: File,
    room: Vec<u8>,
    newest: u64,
}

impl Ring {
    /// Open it, or make it; the newest number in it. Numbers that cannot stand beside each other are an error.
    pub fn open(path: &str) -> Result<Self> {
        if !std::fs::exists(path).unwrap_or(false) {
            let temporary = format!("{path}.new");
            told("making the ring", std::fs::write(&temporary, vec![0; SLOT * SLOTS as usize]))?;
            told("making the ring", File::open(&temporary).and_then(|file| file.sync_all()))?;
            told("naming the ring", std::fs::rename(&temporary, path))?;
            told("naming the ring", File::open("/work").and_then(|dir| dir.sync_all()))?;
        }
        let flags = (OFlags::DIRECT | OFlags::DSYNC).bits() as i32;
        let file = told("opening the ring", OpenOptions::new().read(true).write(true).custom_flags(flags).open(path))?;
        let mut ring = Self { file, room: vec![0; 2 * SLOT], newest: 0 };
        ring.newest = (0..SLOTS).try_fold(0, |newest, slot| Ok::<_, String>(ring.get(slot)?.max(newest)))?;
        ring.check()?;
        Ok(ring)
    }

    /// The newest number.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// Put the next number in its slot, which must hold what memory says; now and then look at all of them.
    pub fn next(&mut self) -> Result<u64> {
        let number = self.newest + 1;
        let (slot, before) = (number % SLOTS, number.saturating_sub(SLOTS));
        let found = self.get(slot)?;
        if found != before {
            return Err(format!("the disk has {found} in slot {slot} of the ring where memory knows {before}"));
        }
        let at = self.aligned();
        for word in self.room[at..at + SLOT].chunks_exact_mut(8) {
            word.copy_from_slice(&number.to_le_bytes());
        }
        told("writing to the ring", self.file.write_all_at(&self.room[at..at + SLOT], slot * SLOT as u64))?;
        self.newest = number;
        if slot == 0 {
            self.check()?;
        }
        Ok(number)
    }

    /// Whether every slot holds what it must.
    fn check(&mut self) -> Result<()> {
        let newest = self.newest;
        for slot in 0..SLOTS {
            let (found, expected) = (self.get(slot)?, expected(slot, newest));
            if found != expected {
                return Err(format!(
                    "slot {slot} of the ring has {found} instead of {expected}; the newest is {newest}"
                ));
            }
        }
        Ok(())
    }

    fn get(&mut self, slot: u64) -> Result<u64> {
        let at = self.aligned();
        told("reading the ring", self.file.read_exact_at(&mut self.room[at..at + SLOT], slot * SLOT as u64))?;
        let mut words = self.room[at..at + SLOT].chunks_exact(8).map(|w| {
            let mut word = [0; 8];
            word.copy_from_slice(w);
            u64::from_le_bytes(word)
        });
        let first = words.next().unwrap_or(0);
        match words.find(|word| *word != first) {
            None => Ok(first),
            Some(other) => Err(format!("slot {slot} of the ring holds both {first} and {other}")),
        }
    }

    /// Direct I/O wants its buffer on a boundary.
    fn aligned(&self) -> usize {
        self.room.as_ptr().align_offset(SLOT)
    }
}

/// The newest number up to `newest` that belongs into `slot`; 0 for none.
fn expected(slot: u64, newest: u64) -> u64 {
    let behind = (newest + SLOTS - slot) % SLOTS;
    newest.saturating_sub(behind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_the_newest_number_that_belongs_there() {
        assert_eq!((expected(0, 0), expected(5, 0), expected(1, 1), expected(2, 1)), (0, 0, 1, 0));
        assert_eq!((expected(0, 64), expected(1, 64), expected(63, 64), expected(1, 65)), (64, 1, 63, 65));
        assert_eq!((expected(10, 1000), expected(40, 1000), expected(41, 1000)), (970, 1000, 937));
    }
}
