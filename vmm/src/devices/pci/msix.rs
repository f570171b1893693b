//! MSI-X (PCI Local Bus 3.0, 6.8.2): the capability, the vector table and the pending bits, in one BAR of the function.
//!
//! [`Msix::signal`] turns a vector into a message in the outbox, or into a pending bit while the vector is masked;
//! unmasking sends what is pending. While the guest has not enabled MSI-X nothing is sent and nothing becomes pending:
//! the function uses INTx.

use serde::{Deserialize, Serialize};

use super::config::ConfigSpace;
use crate::devices::{MsiMessage, RestoreError};

const CAPABILITY_ID: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_BYTES: u64 = 16;
const VECTOR_MASKED: u32 = 1;

/// A table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control, bit 0: masked.
    pub masked: bool,
}

const ENTRY_RESET: Entry = Entry { address: 0, data: 0, masked: true };

/// MSI-X of one function.
#[derive(Debug, Clone)]
pub struct Msix {
    /// Offset of the capability.
    capability: u8,
    entries: Vec<Entry>,
    /// Bit `i`: vector `i` is pending.
    pending: u64,
    enabled: bool,
    masked: bool,
    outbox: Vec<MsiMessage>,
}

impl Msix {
    /// Add the capability for `vectors` (1 to 64) vectors to `config`; table and pending bits lie at the given offsets
    /// of `bar`.
    pub fn new(config: &mut ConfigSpace, vectors: u16, bar: u8, table_offset: u32, pending_offset: u32) -> Self {
        debug_assert!((1..=64).contains(&vectors) && (table_offset | pending_offset) & 7 == 0);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending_offset | u32::from(bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes());
        let capability = config.add_capability(CAPABILITY_ID, &body, &writable);
        let entries = vec![ENTRY_RESET; usize::from(vectors)];
        Self { capability, entries, pending: 0, enabled: false, masked: false, outbox: Vec::new() }
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        // At most 64.
        self.entries.len() as u16
    }

    /// Whether the guest uses MSI-X (and not INTx).
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// `config` may have been written: take over the control word.
    pub fn sync(&mut self, config: &ConfigSpace) {
        let control = config.word(self.capability + 2);
        self.enabled = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_MASK_ALL != 0;
        self.send_pending();
    }

    /// Vector `vector` has something to say. Out of range (as the virtio "no vector") is nothing.
    pub fn signal(&mut self, vector: u16) {
        if self.enabled && vector < self.vectors() {
            self.pending |= 1 << vector;
            self.send_pending();
        }
    }

    fn send_pending(&mut self) {
        if !self.enabled || self.masked {
            return;
        }
        for (vector, entry) in self.entries.iter().enumerate() {
            if self.pending & 1 << vector == 0 || entry.masked {
                continue;
            }
            self.pending &= !(1 << vector);
            let message = MsiMessage { address: entry.address, data: entry.data };
            // Two of the same are one: they would merge in the interrupt controller. It also bounds the outbox.
            if !self.outbox.contains(&message) {
                self.outbox.push(message);
            }
        }
    }

    /// Move the messages to `out`.
    pub fn take(&mut self, out: &mut Vec<MsiMessage>) {
        out.append(&mut self.outbox);
    }

    /// Read the table; `offset` counts from its start.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let entry = usize::try_from(at / ENTRY_BYTES).ok().and_then(|i| self.entries.get(i));
            *byte = entry.map_or(0, |e| e.to_bytes()[(at % ENTRY_BYTES) as usize]);
        }
    }

    /// Write the table: aligned dwords and qwords; anything else is undefined for the guest and ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Some(entry) = usize::try_from(offset / ENTRY_BYTES).ok().and_then(|i| self.entries.get_mut(i)) else {
            return;
        };
        let mut bytes = entry.to_bytes();
        let at = (offset % ENTRY_BYTES) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        *entry = Entry::from_bytes(bytes);
        self.send_pending();
    }

    /// Read the pending bits; `offset` counts from their start. Writes have no effect.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let pending = self.pending.to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| pending.get(at)).copied().unwrap_or(0);
        }
    }

    /// Power-on state. The owner resets the configuration space as well.
    pub fn reset(&mut self) {
        self.entries.fill(ENTRY_RESET);
        self.pending = 0;
        self.enabled = false;
        self.masked = false;
        self.outbox.clear();
    }

    /// The state apart from the configuration space.
    #[must_use]
    pub fn save(&self) -> V1 {
        // The control word is in the configuration space.
        let Self { capability: _, entries, pending, enabled: _, masked: _, outbox } = self;
        V1 { entries: entries.clone(), pending: *pending, outbox: outbox.clone() }
    }

    /// Take a saved state, after `config` has been restored.
    pub fn restore(&mut self, kind: &'static str, state: V1, config: &ConfigSpace) -> Result<(), RestoreError> {
        let V1 { entries, pending, outbox } = state;
        if entries.len() != self.entries.len() {
            return Err(RestoreError::invalid(kind, format!("it has {} MSI-X vectors", entries.len())));
        }
        if pending & !(u64::MAX >> (64 - entries.len())) != 0 || outbox.len() > 2 * entries.len() {
            return Err(RestoreError::invalid(kind, "more interrupts wait than there are vectors"));
        }
        self.entries = entries;
        self.pending = pending;
        self.outbox = outbox;
        let control = config.word(self.capability + 2);
        self.enabled = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_MASK_ALL != 0;
        Ok(())
    }
}

/// Saved state of a function's MSI-X, version 1; part of the function's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct V1 {
    /// The vector table.
    pub entries: Vec<Entry>,
    /// The pending bits.
    pub pending: u64,
    /// Messages that have not been taken.
    pub outbox: Vec<MsiMessage>,
}

impl Entry {
    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }

    fn from_bytes(bytes: [u8; 16]) -> Self {
        let bits = u128::from_le_bytes(bytes);
        // Truncation picks the fields. The address' low two bits are always 0 (6.8.2.9).
        Self { address: bits as u64 & !3, data: (bits >> 64) as u32, masked: (bits >> 96) as u32 & VECTOR_MASKED != 0 }
    }
}
