//! A replication session: the dirty log, early copies, the cut, the commit. Bound to one control connection; when that ends, the
//! session is dropped, and dropping puts the machine back: gate held, log off, an open cut aborted and the guest running. (A session that
//! was to migrate an unprotected machine puts the gate back as it was: open.)
//!
//! ```text
//!  attach ─► log off ── DirtyLogStart ──► logging ◄── Harvest (bitmap → arena)   ◄── Precopy (cold pages → arena, the guest runs)
//!                                          │   ▲
//!                                       Cut│   │last piece handed out
//!                                          ▼   │            ┌─ last: stays stopped until Committed ─► HandedOver
//!                                        cutting ── CutContinue (more)
//! ```
//! The cut ([`cut`]), without a hop to another process: signal all vCPUs, wait for all; freeze the devices; read vCPUs (in parallel on
//! their threads) and devices, seal the streams; read the dirty log; protect what must show its next write; copy what cannot wait; run on;
//! copy the rest. The state is read *before* the log, so that whatever reading it writes to guest RAM is in the log.
//!
//! What must hold: a page once taken from the log stays in `pending` until it was handed out in a piece of a *finished* cut (or in a
//! harvested bitmap), so that an aborted cut loses none. A page that is not protected again is copied while the guest stands still.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::storage::mirror::Mirrors;
use crate::storage::{DRAIN_PATIENCE, Tags};
use anyhow::{Context, Result, bail, ensure};
use understudy_protocol::control::{Attached, Captured, Gate, Harvested, MirrorBegun, Sealed, Strategy, VmmState};
use understudy_protocol::ids::Epoch;

use crate::capture::gather::Gather;
use crate::capture::hot::Hot;
use crate::capture::lock::Locker;
use crate::devices::VmTime;
use crate::machine::Machine;
use crate::memory::{Arena, PageSet, count, union};

mod cut;
mod slots;

pub use cut::CutRequest;
use cut::{Open, Scratch};
use slots::Slots;

/// How long the guest stands still for a replicator that does not fetch the next piece of a cut.
pub const PIECE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it stands still for the commit of its last cut. (Afterwards it runs on here with its outputs held: nothing leaves before the
/// cluster has decided.)
pub const LAST_PATIENCE: Duration = Duration::from_secs(60);
/// An early copy that was made in vain costs the guest a fault: with more than this share of them, none are made for a while.
const WASTE: f64 = 0.5;
/// … for so many cuts.
const NOT_EARLY_FOR: u32 = 32;

/// The arena, shared by consecutive sessions.
pub type SharedArena = Arc<std::sync::Mutex<Arena>>;

/// See the module.
pub struct Session {
    machine: Arc<Machine>,
    arena: SharedArena,
    logging: bool,
    /// Written since they were last handed out, and taken from the log.
    pending: PageSet,
    /// KVM's log as it was read last, and the VMM's own.
    log: PageSet,
    own: PageSet,
    /// Handed out early since the last cut.
    early: PageSet,
    /// Share of the early copies that were in vain, and the cuts for which none are made.
    waste: f64,
    not_early: u32,
    hot: Hot,
    gather: Gather,
    locker: Option<Locker>,
    /// This host cannot lock pages; it was said.
    no_lock: bool,
    /// A cut would have locked pages, had there been what locks them.
    wants_lock: bool,
    scratch: Scratch,
    /// This session slowed the guest down.
    throttled: bool,
    /// Nobody protects the machine: without a hand-over its gate is open again afterwards.
    unprotected: bool,
    /// A cut whose pieces are being handed out.
    open: Option<Open>,
    /// Epoch and VM time of a finished last cut that waits for its commit.
    last: Option<(Epoch, VmTime)>,
    /// Which number the disks gave to the cut of which epoch, and what they were then; those that are not committed.
    on_disk: VecDeque<OnDisk>,
    /// The copies of mirrored disks, as far as they were begun with.
    mirrors: Option<Mirrors>,
}

/// An epoch on the disks.
struct OnDisk {
    epoch: Epoch,
    number: Epoch,
    tags: Tags,
}

impl Session {
    /// Attach to `machine`; refused while another session lives or when there is nothing to replicate.
    pub fn attach(machine: Arc<Machine>, arena: SharedArena) -> Result<(Self, Attached)> {
        Self::begin(machine, arena, false)
    }

    /// Attach to bring a machine to another node that runs and that nobody protects; its end without a hand-over changes nothing.
    pub fn attach_to_migrate(machine: Arc<Machine>, arena: SharedArena) -> Result<(Self, Attached)> {
        Self::begin(machine, arena, true)
    }

    fn begin(machine: Arc<Machine>, arena: SharedArena, migrate: bool) -> Result<(Self, Attached)> {
        let gather = Gather::new()?;
        machine.calibrate();
        let mut life = machine.life();
        if life.session {
            bail!("a replicator is attached already; its connection must end first");
        }
        match life.state {
            VmmState::Running | VmmState::Paused | VmmState::ShutDown => {}
            VmmState::Standby => bail!("this is a standby; there is nothing to replicate before it is promoted"),
            VmmState::HandedOver => bail!("the machine was handed over to another node"),
            VmmState::Fenced => bail!("the machine is fenced; a newer generation of it runs elsewhere"),
        }
        if migrate {
            ensure!(
                !machine.storage.any(),
                "a machine with disks cannot be migrated live yet: protect it, and promote it on the other node"
            );
            ensure!(
                life.state == VmmState::Running,
                "only a machine that runs can be migrated; this one is {:?}",
                life.state
            );
            ensure!(
                machine.core.hardware().gate() == Gate::Open,
                "the machine's outputs wait for a standby: it is protected, and moves by being promoted elsewhere"
            );
        }
        // Epochs count on over all sessions of a generation; the standby compares them.
        life.session = true;
        drop(life);
        let attached = Attached {
            generation: machine.generation(),
            ram_bytes: machine.core.ram.bytes(),
            arena_bytes: arena.lock().map(|a| a.map.len() as u64).unwrap_or(0),
            disks: machine.storage.any_written(),
            mirrored: machine.storage.mirrored(),
        };
        let none = || machine.core.ram.no_pages();
        let session = Self {
            pending: none(),
            log: none(),
            own: none(),
            early: none(),
            hot: Hot::new(machine.core.ram.pages()),
            gather,
            arena,
            logging: false,
            waste: 0.0,
            not_early: 0,
            locker: None,
            no_lock: false,
            wants_lock: false,
            scratch: Scratch::default(),
            throttled: false,
            unprotected: migrate,
            open: None,
            last: None,
            on_disk: VecDeque::new(),
            mirrors: None,
            machine,
        };
        Ok((session, attached))
    }

    /// From now on every write to RAM is recorded.
    pub fn dirty_log_start(&mut self) -> Result<()> {
        let core = &self.machine.core;
        if !self.logging {
            // The VMM's record first: what it notes from here on is kept.
            core.ram.forget_own_writes();
            core.ram.attach(&core.vm, true)?;
            self.logging = true;
        }
        Ok(())
    }

    fn attached(&self) -> Result<()> {
        ensure!(self.logging, "start the dirty log first (dirty-log-start)");
        ensure!(self.open.is_none(), "a cut is under way: finish it with cut-continue first");
        ensure!(self.last.is_none(), "the last cut was taken; commit it or close the connection");
        Ok(())
    }

    /// Read both logs. Where KVM's is cleared by that, its pages go to `pending`; the VMM's own always do.
    fn read_logs(&mut self) -> Result<()> {
        let core = &self.machine.core;
        // Our own pages first: a device may write a page, then the guest, in this order; both are seen now or at the next reading.
        self.own.fill(0);
        core.ram.collect_own(&mut self.own);
        union(&mut self.pending, &self.own);
        core.ram.read_log(&core.vm, &mut self.log)?;
        if !core.manual_log {
            union(&mut self.pending, &self.log);
        }
        Ok(())
    }

    /// Protect the logged pages again but those that stay writable. (Where KVM has done it while reading: nothing.)
    fn protect_log(&mut self, leave_hot: bool) -> Result<u64> {
        let core = self.machine.core.clone();
        if !core.manual_log {
            return Ok(0);
        }
        union(&mut self.pending, &self.log);
        if leave_hot {
            for (i, word) in self.log.iter_mut().enumerate() {
                *word &= !self.hot.left_writable(i);
            }
        }
        core.ram.protect(&core.vm, &self.log)?;
        Ok(count(&self.log))
    }

    /// Hand out which pages were written, without stopping the guest.
    pub fn harvest(&mut self) -> Result<Harvested> {
        self.attached()?;
        self.read_logs()?;
        self.protect_log(false)?;
        let mut arena = self.arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let bytes: Vec<u8> = self.pending.iter().flat_map(|w| w.to_le_bytes()).collect();
        let len = (self.machine.core.ram.pages().div_ceil(8)) as usize;
        ensure!(
            arena.map.put(0, bytes.get(..len).unwrap_or(&bytes)),
            "the arena ({} bytes) is too small for the dirty bitmap: start the VMM with a larger --arena",
            arena.map.len()
        );
        drop(arena);
        let harvested = Harvested { dirty_pages: count(&self.pending), bitmap_bytes: len as u64 };
        self.pending.fill(0);
        // Whoever harvests begins a first copy: what was handed out early has no meaning any more.
        self.early.fill(0);
        Ok(harvested)
    }

    /// Copy pages that will probably stay as they are until the cut, while the guest runs. What is written again shows in the log,
    /// because the pages are protected before they are copied.
    pub fn precopy(&mut self, epoch: Epoch) -> Result<Captured> {
        self.attached()?;
        ensure!(epoch > self.machine.life().last_cut, "epoch {epoch} was cut already");
        let strategy = self.machine.capturing().strategy;
        if strategy == Strategy::Stop || self.not_early > 0 {
            return Ok(nothing(epoch));
        }
        self.read_logs()?;
        if self.machine.core.manual_log {
            for (i, word) in self.log.iter_mut().enumerate() {
                *word &= !self.hot.pages().get(i).copied().unwrap_or(0);
            }
        }
        let arena = self.arena.clone();
        let mut arena = arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let mut slots = Slots::new(&mut arena.map)?;
        limit(&mut self.log, slots.capacity());
        let core = self.machine.core.clone();
        // Until they are handed out they are pending: an error in between loses none.
        union(&mut self.pending, &self.log);
        if core.manual_log {
            core.ram.protect(&core.vm, &self.log)?;
        }
        indices_into(&self.log, &mut self.scratch.now);
        slots.copy(&self.gather, &core.ram, &self.scratch.now)?;
        let captured = slots.captured(epoch, 0);
        union(&mut self.early, &self.log);
        for (pending, handed) in self.pending.iter_mut().zip(&self.log) {
            *pending &= !handed;
        }
        Ok(captured)
    }

    /// After a cut: how many of the early copies were in vain.
    fn judge_early(&mut self, written: &PageSet) -> u64 {
        let early = count(&self.early);
        self.not_early = self.not_early.saturating_sub(1);
        if early >= 64 {
            let vain: u64 = self.early.iter().zip(written).map(|(e, w)| u64::from((e & w).count_ones())).sum();
            self.waste += (vain as f64 / early as f64 - self.waste) / 4.0;
            if self.waste > WASTE {
                self.waste = 0.0;
                self.not_early = NOT_EARLY_FOR;
            }
        }
        early
    }

    /// The disks' number for the newest cut up to that of `epoch`.
    fn on_disk(&self, epoch: Epoch) -> Option<&OnDisk> {
        self.on_disk.iter().rev().find(|cut| cut.epoch <= epoch)
    }

    /// What the disks have of `epoch` is durable when this returns.
    pub fn seal_disks(&mut self, epoch: Epoch) -> Result<Sealed> {
        let cut = self.on_disk(epoch).with_context(|| format!("epoch {epoch} was never cut, or has no disks"))?;
        self.machine.storage.seal(&self.machine.core, cut.number)?;
        let tags = self.machine.storage.tags_of_mirrored(&cut.tags)?;
        if let Some(mirrors) = &mut self.mirrors {
            mirrors.sealed(&tags);
        }
        let tags = tags.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        Ok(Sealed { tags })
    }

    /// Begin with the copies of the mirrored disks, which are so.
    pub fn mirror_begin(&mut self, states: &[serde_json::Value]) -> Result<MirrorBegun> {
        let storage = &self.machine.storage;
        ensure!(
            !storage.protected(),
            "the disks are protected: their copies can be brought into step when the gate was opened"
        );
        let arena = self.arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?.path.with_file_name("disks");
        if let Some(before) = self.mirrors.take() {
            before.leave();
        }
        let (mirrors, begun) = Mirrors::begin(storage.mirrored_disks(), states, &arena)?;
        self.mirrors = Some(mirrors);
        Ok(begun)
    }

    /// The copies of mirrored disks that were begun with.
    pub fn mirrors(&mut self) -> Result<&mut Mirrors> {
        self.mirrors.as_mut().context("begin with the copies of the mirrored disks first (mirror-begin)")
    }

    /// The standby holds the checkpoint of `epoch`.
    pub fn committed(&mut self, epoch: Epoch) -> Result<()> {
        {
            let life = self.machine.life();
            ensure!(epoch <= life.last_cut, "epoch {epoch} was never cut (the newest is {})", life.last_cut);
        }
        // Before anything leaves, and without keeping anybody from the machine.
        if let Some(number) = self.on_disk(epoch).map(|cut| cut.number) {
            self.machine.storage.commit(&self.machine.core, number)?;
            self.on_disk.retain(|cut| cut.epoch > epoch);
        }
        let mut life = self.machine.life();
        life.last_committed = life.last_committed.max(epoch);
        self.machine.core.hardware().commit(epoch);
        if let Some((_, at)) = self.last.take_if(|(last, _)| *last == epoch) {
            // It stood still since the cut; the standby goes on from there.
            self.machine.core.hardware().stopwatch.set(at);
            if life.state != VmmState::Fenced {
                life.state = VmmState::HandedOver;
                // Before anybody is told that the other node may run it: what this checkpoint released leaves, and the ports go down.
                self.machine.core.hardware().silence_nics(true);
                self.machine.retire();
            }
            life.cutting = false;
            self.machine.life_changed();
        }
        Ok(())
    }

    /// The machine is durably recorded as unprotected.
    pub fn gate_open(&mut self) -> Result<()> {
        let runs_elsewhere = |state| matches!(state, VmmState::Fenced | VmmState::HandedOver);
        let refusal = "the gate of a machine that runs elsewhere stays closed";
        ensure!(!runs_elsewhere(self.machine.life().state), refusal);
        // First: with an open gate a flush must be what it says.
        self.machine.storage.unprotect(&self.machine.core)?;
        let life = self.machine.life();
        ensure!(!runs_elsewhere(life.state), refusal);
        self.machine.core.hardware().set_gate(Gate::Open);
        Ok(())
    }

    /// Let the guest run for a share of the time, percent, until this session ends.
    pub fn throttle(&mut self, percent: u8) -> Result<()> {
        self.throttled = percent < 100;
        self.machine.vcpus.throttle(percent)
    }

    /// How long the guest may stand still for the next request of this session; `None` while it runs.
    pub fn patience(&self) -> Option<Duration> {
        match (&self.open, &self.last) {
            (Some(open), _) => open.stands_still().then_some(PIECE_PATIENCE),
            (None, Some(_)) => Some(LAST_PATIENCE),
            (None, None) => None,
        }
    }

    /// Give up an open cut or an uncommitted last one: the guest runs on. Its pages stay pending.
    fn abort(&mut self) {
        let stood_still = self.open.take().is_some_and(|open| open.stands_still());
        if !stood_still && self.last.take().is_none() {
            return;
        }
        let machine = self.machine.clone();
        let mut life = machine.life();
        if let Err(e) = machine.unfreeze(&mut life) {
            machine.core.tell(crate::core::Event::Broken(format!("cannot run on after an aborted cut: {e:#}")));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.abort();
        if let Some(mirrors) = self.mirrors.take() {
            mirrors.leave();
        }
        let machine = &self.machine;
        {
            let life = machine.life();
            let runs_on = matches!(life.state, VmmState::Running | VmmState::Paused | VmmState::ShutDown);
            let mut hardware = machine.core.hardware();
            hardware.unseal();
            hardware.set_gate(if self.unprotected && runs_on { Gate::Open } else { Gate::Hold });
        }
        if self.throttled {
            // Whoever slowed the guest down is not there to let it run again.
            let _ = machine.vcpus.throttle(100);
        }
        if self.logging
            && let Err(e) = machine.core.ram.attach(&machine.core.vm, false)
        {
            eprintln!("warning: the dirty log stays on: {e:#}");
        }
        machine.life().session = false;
    }
}

/// A piece without pages.
fn nothing(epoch: Epoch) -> Captured {
    Captured {
        epoch,
        pages: 0,
        indices_offset: 0,
        pages_offset: 0,
        state_offset: 0,
        state_len: 0,
        more: false,
        pause_us: 0,
        vm_time_ns: 0,
    }
}

/// Keep only the first so many pages of a set.
fn limit(set: &mut PageSet, mut pages: usize) {
    for word in set.iter_mut() {
        let here = word.count_ones() as usize;
        if here > pages {
            while word.count_ones() as usize > pages {
                *word &= !(1 << (63 - word.leading_zeros()));
            }
        }
        pages -= here.min(pages);
    }
}

/// The pages of a set, ascending, in place of what `pages` holds.
fn indices_into(set: &PageSet, pages: &mut Vec<u64>) {
    indices_from(set, 0, usize::MAX, pages);
}

/// At most `most` pages of a set from `first` on, ascending, in place of what `pages` holds.
fn indices_from(set: &PageSet, first: u64, most: usize, pages: &mut Vec<u64>) {
    pages.clear();
    for (word, bits) in (0u64..).zip(set).skip((first / 64) as usize) {
        let mut bits = *bits;
        if word == first / 64 {
            bits &= u64::MAX << (first % 64);
        }
        while bits != 0 {
            if pages.len() == most {
                return;
            }
            pages.push(word * 64 + u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indices(set: &PageSet) -> Vec<u64> {
        let mut pages = vec![99];
        indices_into(set, &mut pages);
        pages
    }

    #[test]
    fn the_pages_of_a_set_come_in_ascending_order() {
        let mut set = vec![0, 1 << 63 | 1, 0b1010];
        crate::memory::union(&mut set, &[1 << 5]);
        assert_eq!(indices(&set), [5, 64, 127, 129, 131]);
    }

    #[test]
    fn pieces_of_a_set_follow_each_other_without_a_gap() {
        let set = vec![1 << 5, 1 << 63 | 1, 0b1010];
        for most in 1..6 {
            let (mut all, mut piece, mut next) = (Vec::new(), Vec::new(), 0);
            loop {
                indices_from(&set, next, most, &mut piece);
                let Some(last) = piece.last() else { break };
                next = last + 1;
                all.extend_from_slice(&piece);
            }
            assert_eq!(all, indices(&set));
        }
    }

    #[test]
    fn a_limited_set_keeps_its_first_pages() {
        for keep in 0..7 {
            let mut set = vec![0b111, 0, 1 << 63 | 1, 1];
            let all = indices(&set);
            limit(&mut set, keep);
            assert_eq!(indices(&set), all[..keep.min(all.len())]);
        }
    }
}
