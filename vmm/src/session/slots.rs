//! The arena as a cut fills it: slots for pages from the start, their indices and the device state behind.
//!
//! ```text
//! 0            capacity × 4096     + capacity × 8        end
//! │ page │ page │ … │ index, index, …  │ device state …  │
//! ```
//! The same page may have several slots: the last one counts.

use anyhow::{Result, ensure};
use understudy_protocol::control::Captured;
use understudy_protocol::ids::Epoch;

use crate::capture::gather::Gather;
use crate::memory::{PAGE, Ram};
use crate::sys::SharedMap;

/// Bytes kept free for the device state: 32 vCPUs need about 400 KiB.
const STATE_ROOM: usize = 512 << 10;

/// See the module.
pub struct Slots<'a> {
    map: &'a mut SharedMap,
    capacity: usize,
    used: usize,
}

impl<'a> Slots<'a> {
    /// An empty arena.
    pub fn new(map: &'a mut SharedMap) -> Result<Self> {
        let capacity = Self::capacity_of(map.len());
        ensure!(
            capacity > 0,
            "the arena ({} bytes) cannot hold a page and the device state: start the VMM with a larger --arena",
            map.len()
        );
        Ok(Self { map, capacity, used: 0 })
    }

    /// Pages that an arena of `bytes` bytes holds beside the device state.
    pub fn capacity_of(bytes: usize) -> usize {
        bytes.saturating_sub(STATE_ROOM) / (PAGE + 8)
    }

    /// How many more pages fit.
    pub fn capacity(&self) -> usize {
        self.capacity - self.used
    }

    /// Give each of these pages the next slot: the part of the arena for their content.
    pub fn reserve(&mut self, pages: &[u64]) -> Result<&mut [u8]> {
        ensure!(pages.len() <= self.capacity(), "the arena is too small for {} more pages", pages.len());
        let (capacity, used) = (self.capacity, self.used);
        self.used += pages.len();
        let bytes = self.map.bytes_mut();
        let (content, rest) = bytes.split_at_mut(capacity * PAGE);
        for (index, word) in pages.iter().zip(rest[used * 8..].chunks_exact_mut(8)) {
            word.copy_from_slice(&index.to_le_bytes());
        }
        Ok(&mut content[used * PAGE..(used + pages.len()) * PAGE])
    }

    /// The newest `n` slots' content.
    pub fn again(&mut self, n: usize) -> &mut [u8] {
        let used = self.used;
        &mut self.map.bytes_mut()[(used - n.min(used)) * PAGE..used * PAGE]
    }

    /// Copy these pages to the next slots.
    pub fn copy(&mut self, gather: &Gather, ram: &Ram, pages: &[u64]) -> Result<()> {
        let to = self.reserve(pages)?;
        gather.copy(ram, pages, to)
    }

    /// Put the device state behind the indices.
    pub fn put_state(&mut self, state: &[u8]) -> Result<()> {
        let at = self.state_offset();
        ensure!(
            self.map.put(at, state),
            "the arena ({} bytes) cannot hold the device state ({} bytes): start the VMM with a larger --arena",
            self.map.len(),
            state.len()
        );
        Ok(())
    }

    fn state_offset(&self) -> usize {
        self.capacity * (PAGE + 8)
    }

    /// What the arena holds now.
    pub fn captured(&self, epoch: Epoch, state_len: usize) -> Captured {
        Captured {
            epoch,
            pages: self.used as u64,
            indices_offset: (self.capacity * PAGE) as u64,
            pages_offset: 0,
            state_offset: self.state_offset() as u64,
            state_len: state_len as u64,
            more: false,
            pause_us: 0,
            vm_time_ns: 0,
        }
    }
}
