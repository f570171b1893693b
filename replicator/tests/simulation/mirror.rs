//! A mirrored disk: the primary's, with what the VMM knows of it, and the standby's copy. (How a copy is kept on real storage is simulated in the crate
//! `understudy-disk`; here it is what the two state machines make of it that counts.)

use std::collections::{BTreeMap, BTreeSet};

use understudy_disk::mirror::{Begin, SliceLabel};
use understudy_disk::{SECTOR, Tag};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::message::{Log, Message, Part, PartContent};
use understudy_replicator::sender::{DisksSent, Event};

use super::disk::Stop;
use super::sabotage::Sabotage;
use super::world::{Check, Frame, World};

/// Blocks of the disk; a block's content is a number.
pub const BLOCKS: u64 = 5;
/// What the sender is told that a block has, so that it makes rounds.
const BLOCK_BYTES: u64 = 3 << 20;

type Write = (u64, u64);

/// The primary's.
pub struct Mirror {
    pub blocks: Vec<u64>,
    /// What the copy may lack.
    missing: BTreeSet<u64>,
    /// Sent, and not said to be durable; the peer was asked up to that number.
    flying: Vec<(u64, u64)>,
    number: u64,
    asked: u64,
    /// The copy was told that it is in step.
    stepping: bool,
    protected: bool,
    /// What it was when protection began, as long as the copy was not sent that.
    base: Option<(u64, Vec<u64>)>,
    /// Since the last cut.
    log: Vec<Write>,
    /// Cut, not sent; sent, not committed.
    unsent: BTreeMap<u64, Vec<Write>>,
    sent: BTreeMap<u64, Vec<Write>>,
    /// As of every cut.
    pub snapshots: BTreeMap<u64, Vec<u64>>,
}

/// The standby's.
#[derive(Clone)]
pub struct Copy {
    base: Vec<u64>,
    /// `None`: it is being brought into step.
    at: Option<u64>,
    sealed: BTreeMap<u64, Vec<Write>>,
    /// Gone with the process.
    open: BTreeMap<u64, Vec<Write>>,
}

impl Default for Mirror {
    fn default() -> Self {
        Self {
            blocks: vec![0; BLOCKS as usize],
            missing: BTreeSet::new(),
            flying: Vec::new(),
            number: 0,
            asked: 0,
            stepping: false,
            protected: false,
            base: None,
            log: Vec::new(),
            unsent: BTreeMap::new(),
            sent: BTreeMap::new(),
            snapshots: BTreeMap::new(),
        }
    }
}

impl Default for Copy {
    fn default() -> Self {
        // What no guest wrote.
        Self { base: vec![u64::MAX; BLOCKS as usize], at: None, sealed: BTreeMap::new(), open: BTreeMap::new() }
    }
}

fn apply(to: &mut [u64], writes: &[Write]) {
    writes.iter().for_each(|(block, content)| to[*block as usize] = *content);
}

fn tag(serial: u64) -> Tag {
    Tag { serial, generation: Generation(1), epoch: Epoch(serial), records: 0, digest: 0 }
}

fn begin() -> Begin {
    Begin {
        machine: "m".into(),
        from: "n1".into(),
        generation: Generation(1),
        disk: 1,
        size: BLOCKS * SECTOR,
        sync: 1,
        resumed: false,
        keep: None,
        history: Vec::new(),
    }
}

impl Mirror {
    pub fn write(&mut self, block: u64, content: u64) {
        self.blocks[block as usize] = content;
        if self.protected {
            self.log.push((block, content));
        } else {
            self.missing.insert(block);
        }
    }

    pub fn cut(&mut self, epoch: u64, arm: bool) {
        if arm && !self.protected {
            self.protected = true;
            self.base = Some((epoch - 1, self.blocks.clone()));
        }
        self.unsent.insert(epoch, std::mem::take(&mut self.log));
        self.snapshots.insert(epoch, self.blocks.clone());
    }

    /// Nobody will go on from a checkpoint.
    pub fn unprotect(&mut self, forgets: bool) {
        let slices = std::mem::take(&mut self.sent).into_values().chain(std::mem::take(&mut self.unsent).into_values());
        let log = std::mem::take(&mut self.log);
        if !forgets {
            self.missing.extend(slices.flatten().chain(log).map(|(block, _)| block));
        }
        (self.protected, self.base) = (false, None);
    }

    pub fn committed(&mut self, epoch: u64) {
        self.sent.retain(|sent, _| *sent > epoch);
    }
}

impl Copy {
    /// What a takeover at this epoch would find.
    pub fn at(&self, epoch: u64) -> Option<Vec<u64>> {
        self.at.filter(|at| *at <= epoch)?;
        let mut blocks = self.base.clone();
        self.sealed.range(..=epoch).for_each(|(_, writes)| apply(&mut blocks, writes));
        Some(blocks)
    }

    pub fn crashed(&mut self) {
        self.open.clear();
    }

    pub fn begin(&mut self) {
        self.at = None;
        self.sealed.clear();
        self.open.clear();
    }

    pub fn step_into(&mut self, tags: &[Tag]) {
        self.at = Some(tags[0].serial);
    }

    pub fn apply(&mut self, part: &Part<'_>) {
        let content = match part.content {
            PartContent::Zero => 0,
            PartContent::Data(bytes) => bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)),
            PartContent::Hash(_) => u64::MAX,
        };
        self.base[(part.at / SECTOR) as usize] = content;
    }

    pub fn append(&mut self, log: &Log<'_>) -> Result<(), Stop> {
        let open = self.open.entry(log.slice.serial).or_default();
        open.truncate(log.offset as usize / 16);
        if open.len() != log.offset as usize / 16 {
            return Err(Stop::Content(format!("a piece of the slice {} is missing", log.slice.serial)));
        }
        let numbers = log.bytes.as_chunks::<8>().0.as_chunks::<2>().0;
        open.extend(numbers.iter().map(|[block, content]| (u64::from_le_bytes(*block), u64::from_le_bytes(*content))));
        Ok(())
    }

    pub fn seal(&mut self, tags: &[Tag]) {
        let open = std::mem::take(&mut self.open);
        self.sealed.extend(open.into_iter().filter(|(serial, _)| *serial <= tags[0].serial));
    }

    pub fn commit(&mut self) {
        for (serial, writes) in std::mem::take(&mut self.sealed) {
            apply(&mut self.base, &writes);
            self.at = Some(serial);
        }
    }
}

impl World {
    pub fn begin_copies(&mut self) -> Check {
        let Some(mirror) = &mut self.vmm.mirror else { return Err("there is no mirrored disk".into()) };
        if mirror.protected {
            return Err("a copy is brought into step while the disk is protected".into());
        }
        if !std::mem::replace(&mut self.copy_known, true) {
            mirror.missing = (0..BLOCKS).collect();
        }
        mirror.missing.extend(std::mem::take(&mut mirror.flying).into_iter().map(|(_, block)| block));
        mirror.stepping = false;
        self.flushes = 0;
        let left = mirror.missing.len() as u64 * BLOCK_BYTES;
        let sent = self.transmit(Frame::new(Generation(1), Epoch::ZERO, &Message::CopyBegin(vec![begin()])));
        let event = Event::CopiesRead { sent: 0, left, wait: false };
        self.event(if sent { event } else { Event::PeerLost("broken".into()) });
        Ok(())
    }

    /// The peer says that all it was sent before is durable.
    pub fn flushed(&mut self) {
        self.flushes = self.flushes.saturating_sub(1);
        if let Some(mirror) = self.vmm.mirror.as_mut().filter(|_| self.flushes == 0) {
            mirror.flying.retain(|(number, _)| *number > mirror.asked);
        }
    }

    pub fn send_flush(&mut self) -> bool {
        self.flushes += 1;
        if let Some(mirror) = &mut self.vmm.mirror {
            mirror.asked = mirror.number;
        }
        self.transmit(Frame::new(Generation(1), Epoch::ZERO, &Message::Flush))
    }

    /// Some blocks that the copy lacks: whether they could be sent, and how many there were.
    fn send_blocks(&mut self, epoch: Epoch) -> (bool, usize) {
        let Some(mirror) = &mut self.vmm.mirror else { return (true, 0) };
        let some: Vec<u64> = mirror.missing.iter().copied().take(2).collect();
        mirror.missing.retain(|block| !some.contains(block));
        // Lost with the connection, they are missing again.
        for block in &some {
            mirror.number += 1;
            mirror.flying.push((mirror.number, *block));
        }
        let from = mirror.base.as_ref().map_or(&mirror.blocks, |(_, base)| base);
        let contents: Vec<Write> = some.iter().map(|block| (*block, from[*block as usize])).collect();
        let mut sent = true;
        for (number, (block, content)) in contents.iter().enumerate() {
            let data = content.to_le_bytes().repeat(SECTOR as usize / 8);
            let content = if *content == 0 { PartContent::Zero } else { PartContent::Data(&data) };
            let part = Part { disk: 0, number: number as u64, at: block * SECTOR, len: SECTOR, content };
            sent = sent && self.transmit(Frame::new(Generation(1), epoch, &Message::Part(part)));
        }
        (sent, some.len())
    }

    pub fn copy_disks(&mut self) {
        let (mut sent, n) = self.send_blocks(Epoch::ZERO);
        let Some(mirror) = &self.vmm.mirror else { return };
        let left = mirror.missing.len() as u64 * BLOCK_BYTES;
        let wait = n == 0 && !mirror.flying.is_empty();
        if wait && self.flushes == 0 {
            sent = sent && self.send_flush();
        }
        let event = Event::CopiesRead { sent: n as u64 * BLOCK_BYTES, left, wait };
        self.event(if sent { event } else { Event::PeerLost("broken".into()) });
    }

    /// All that the copy needs of the epoch that was sealed, in parts.
    pub fn send_disks(&mut self) -> Check {
        let epoch = self.vmm.cut;
        let Some(mirror) = &mut self.vmm.mirror else { return Err("there is no mirrored disk".into()) };
        if let Some((serial, _)) = mirror.base {
            if mirror.stepping {
                if self.flushes > 0 {
                    return self.disks_sent(DisksSent::Wait, true);
                }
                (mirror.base, mirror.stepping) = (None, false);
                return self.disks_sent(DisksSent::More, true);
            }
            let (mut sent, n) = self.send_blocks(epoch);
            if n > 0 {
                return self.disks_sent(if sent { DisksSent::More } else { DisksSent::All }, sent);
            }
            let Some(mirror) = &mut self.vmm.mirror else { return Ok(()) };
            if mirror.flying.is_empty() {
                mirror.stepping = true;
                sent = self.transmit(Frame::new(Generation(1), epoch, &Message::InStep(vec![tag(serial)])));
            }
            sent = sent && (self.flushes > 0 || self.send_flush());
            return self.disks_sent(if sent { DisksSent::Wait } else { DisksSent::All }, sent);
        }
        let unsent = std::mem::take(&mut mirror.unsent);
        let mut frames = Vec::new();
        for (serial, writes) in &unsent {
            let slice = SliceLabel { serial: *serial, generation: Generation(1), epoch: Epoch(*serial) };
            for (i, two) in writes.chunks(2).enumerate() {
                let numbers = two.iter().flat_map(|(block, content)| [block.to_le_bytes(), content.to_le_bytes()]);
                let bytes: Vec<u8> = numbers.flatten().collect();
                let log = Log { disk: 0, slice, offset: i as u64 * 32, closed: None, bytes: &bytes };
                frames.push(Frame::new(Generation(1), epoch, &Message::Log(log)));
            }
        }
        frames.push(Frame::new(Generation(1), epoch, &Message::Seal(vec![tag(epoch.0)])));
        mirror.sent.extend(unsent);
        let mut sent = true;
        for frame in frames {
            self.kept.push(frame.clone());
            sent = sent && self.transmit(frame);
        }
        self.disks_sent(DisksSent::All, sent)
    }

    fn disks_sent(&mut self, what: DisksSent, sent: bool) -> Check {
        self.event(Event::DisksSent(what));
        if !sent {
            self.event(Event::PeerLost("broken".into()));
        }
        Ok(())
    }

    /// The image is of this epoch: so is the copy.
    pub fn check_copy(&self, epoch: Epoch) -> Check {
        let Some(mirror) = &self.vmm.mirror else { return Ok(()) };
        let (found, snapshot) = (self.disk.copy.at(epoch.0), mirror.snapshots.get(&epoch.0));
        if found.as_ref() != snapshot {
            return Err(format!("the copy is not of epoch {epoch}: {found:x?} instead of {snapshot:x?}"));
        }
        Ok(())
    }

    pub fn sabotages_copies(&self) -> bool {
        self.sabotage == Sabotage::SealOfCopiesLate
    }
}
