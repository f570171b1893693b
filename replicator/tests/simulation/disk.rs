//! The standby's files and memory: what a crash of its process leaves, and what it takes.

use std::collections::BTreeMap;

use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::{BatchError, Decoder, PAGE, Page, PageHash, Target};
use understudy_replicator::durable::{Durable, ImageKind, Pending};

use super::content::{page, seed};
use super::mirror::Copy;

/// What survives a crash of the standby's process.
#[derive(Clone, Default)]
pub struct Disk {
    pub durable: Durable,
    pub ram: Vec<u64>,
    /// Decoded pages of the epoch that is arriving, in the order of their first arrival.
    pub stage: Vec<(u64, u64)>,
    pub states: BTreeMap<(u64, u64), Vec<u8>>,
    /// Its copy of the mirrored disk.
    pub copy: Copy,
}

/// What does not.
#[derive(Default)]
pub struct Volatile {
    pub decoder: Decoder,
    pub encoded_state: Vec<u8>,
    pub state: Vec<u8>,
}

pub fn crc(stage: &[(u64, u64)]) -> Pending {
    let mut hasher = crc32fast::Hasher::new();
    stage.iter().for_each(|(index, seed)| hasher.update(&[index.to_le_bytes(), seed.to_le_bytes()].concat()));
    Pending { stage_len: stage.len() as u64, stage_crc: hasher.finalize() }
}

/// Why the standby's process stopped in a step.
pub enum Stop {
    Crash,
    /// What arrived is not what the primary captured: the wire does not lie here, so that is a fault of ours.
    Content(String),
}

impl From<BatchError> for Stop {
    fn from(e: BatchError) -> Self {
        Self::Content(e.to_string())
    }
}

/// Where a batch is decoded to: the stage over RAM, or RAM itself; it stops after `limit` pages, as a crash would.
pub struct Onto<'a> {
    pub disk: &'a mut Disk,
    pub staged: bool,
    pub limit: u64,
}

impl Target for Onto<'_> {
    type Error = Stop;

    fn read(&mut self, index: u64, content: &mut Page) -> Result<(), Stop> {
        let staged = self.disk.stage.iter().find(|(staged, _)| self.staged && *staged == index);
        *content = page(staged.map_or(self.disk.ram[index as usize], |(_, seed)| *seed));
        Ok(())
    }

    fn page(&mut self, index: u64, content: &Page, _: PageHash) -> Result<(), Stop> {
        self.limit = self.limit.checked_sub(1).ok_or(Stop::Crash)?;
        let seed = seed(content);
        if !self.staged {
            self.disk.ram[index as usize] = seed;
        } else if let Some(staged) = self.disk.stage.iter_mut().find(|(staged, _)| *staged == index) {
            staged.1 = seed;
        } else {
            self.disk.stage.push((index, seed));
        }
        Ok(())
    }

    fn zeros(&mut self, index: u64, count: u64) -> Result<(), Stop> {
        (index..index + count).try_for_each(|index| self.page(index, &[0; PAGE], 0))
    }
}

impl Disk {
    /// Write the stage to RAM; false if the process died after `limit` pages.
    pub fn apply(&mut self, limit: u64) -> bool {
        for (index, seed) in self.stage.iter().take(usize::try_from(limit).unwrap_or(usize::MAX)) {
            self.ram[*index as usize] = *seed;
        }
        limit >= self.stage.len() as u64
    }

    /// What a take-over after a restart would find.
    pub fn recovered(&self) -> Option<(Generation, Epoch, Vec<u64>, Vec<u8>)> {
        let mut disk = self.clone();
        let record = disk.durable.record.clone();
        if record.image == ImageKind::Inconsistent {
            return None;
        }
        if let Some(pending) = record.pending {
            assert_eq!(crc(&disk.stage), pending, "the committed stage is gone");
            disk.apply(u64::MAX);
        }
        let state = disk.states.get(&(record.generation.0, record.epoch.0)).cloned().unwrap_or_default();
        Some((record.generation, record.epoch, disk.ram, state))
    }
}
