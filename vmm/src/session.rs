//! A replication session: the dirty log, the cut, the commit. Bound to one control connection; when that ends, the session is
//! dropped, and dropping puts the machine back: gate held, log off, an open cut aborted and the guest running.
//!
//! ```text
//!  attach ─► log off ── DirtyLogStart ──► logging ◄── Harvest (bitmap → arena)
//!                                          │   ▲
//!                                       Cut│   │last piece handed out
//!                                          ▼   │            ┌─ last: stays stopped until Committed ─► HandedOver
//!                                        cutting ── CutContinue (more)
//! ```
//! The cut, without a hop to another process: signal all vCPUs, wait for all; freeze the devices; save vCPUs (in parallel on their
//! threads), devices, seal the streams; read the dirty log; copy pages to the arena; run on. The state is saved *before* the log is read, so
//! that whatever saving writes to guest RAM is in the log.
//!
//! What must hold: a page once taken from the log stays in `pending` until it was handed out in a piece of a *finished* cut (or in a
//! harvested bitmap), so that an aborted cut loses none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use understudy_protocol::control::{Attached, Captured, Gate, Harvested, VmmState};
use understudy_protocol::ids::Epoch;

use crate::devices::VmTime;
use crate::machine::Machine;
use crate::memory::{Arena, PAGE, PageSet, count};

/// How long the guest stands still for a replicator that does not fetch the next piece of a cut.
pub const PIECE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it stands still for the commit of its last cut. (Afterwards it runs on here with its outputs held: nothing leaves before the
/// cluster has decided.)
pub const LAST_PATIENCE: Duration = Duration::from_secs(60);

/// The arena, shared by consecutive sessions.
pub type SharedArena = Arc<std::sync::Mutex<Arena>>;

/// See the module.
pub struct Session {
    machine: Arc<Machine>,
    arena: SharedArena,
    logging: bool,
    /// Written since they were last handed out.
    pending: PageSet,
    /// A cut whose pieces are being handed out.
    open: Option<Open>,
    /// Epoch and VM time of a finished last cut that waits for its commit.
    last: Option<(Epoch, VmTime)>,
}

struct Open {
    epoch: Epoch,
    last: bool,
    since: Instant,
    state: Vec<u8>,
    vm_time_ns: u64,
    /// Pages still to be copied, ascending.
    pages: Vec<u64>,
    done: usize,
}

impl Session {
    /// Attach to `machine`; refused while another session lives or when there is nothing to replicate.
    pub fn attach(machine: Arc<Machine>, arena: SharedArena) -> Result<(Self, Attached)> {
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
        // Epochs count on over all sessions of a generation; the standby compares them.
        life.session = true;
        drop(life);
        let attached = Attached {
            generation: machine.generation(),
            ram_bytes: machine.core.ram.bytes(),
            arena_bytes: arena.lock().map(|a| a.map.len() as u64).unwrap_or(0),
        };
        let pending = machine.core.ram.no_pages();
        Ok((Self { machine, arena, logging: false, pending, open: None, last: None }, attached))
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

    fn collect(&mut self) -> Result<()> {
        ensure!(self.logging, "start the dirty log first (dirty-log-start)");
        let core = self.machine.core.clone();
        core.ram.collect_dirty(&core.vm, &mut self.pending)
    }

    /// Hand out which pages were written, without stopping the guest.
    pub fn harvest(&mut self) -> Result<Harvested> {
        ensure!(self.open.is_none(), "a cut is under way: finish it with cut-continue first");
        self.collect()?;
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
        Ok(harvested)
    }

    /// Cut: see the module.
    pub fn cut(&mut self, epoch: Epoch, arm: bool, last: bool) -> Result<Captured> {
        let since = Instant::now();
        ensure!(self.logging, "start the dirty log first (dirty-log-start)");
        ensure!(self.open.is_none(), "a cut is under way: finish it with cut-continue first");
        ensure!(self.last.is_none(), "the last cut was taken; commit it or close the connection");
        let machine = self.machine.clone();
        {
            let mut life = machine.quiet_life()?;
            ensure!(
                matches!(life.state, VmmState::Running | VmmState::Paused | VmmState::ShutDown),
                "the machine cannot be cut any more ({:?})",
                life.state
            );
            ensure!(epoch > life.last_cut, "epoch {epoch} was cut already (the newest is {})", life.last_cut);
            life.cutting = true;
            let taken = (|| {
                let mut hardware = machine.freeze(&life);
                let at = hardware.stopwatch.now();
                let state = match Machine::paused_state(&life) {
                    // Streams may have been acknowledged since the pause, nothing else can have changed.
                    Some(paused) => paused.to_vec(),
                    None => machine.capture(&life, &hardware, at)?,
                };
                hardware.seal(epoch);
                if arm {
                    hardware.set_gate(Gate::Hold);
                }
                anyhow::Ok((state, at.0))
            })();
            let taken = taken.and_then(|taken| self.collect().map(|()| taken));
            match taken {
                Ok((state, vm_time_ns)) => {
                    life.last_cut = epoch;
                    let pages = indices(&self.pending);
                    self.open = Some(Open { epoch, last, since, state, vm_time_ns, pages, done: 0 });
                }
                Err(e) => {
                    machine.unfreeze(&mut life)?;
                    return Err(e.context("no cut was made; the machine runs on"));
                }
            }
        }
        self.piece()
    }

    /// The next piece of a cut that was larger than the arena.
    pub fn cut_continue(&mut self) -> Result<Captured> {
        ensure!(self.open.is_some(), "there is no cut to continue");
        self.piece()
    }

    /// Fill the arena; at the last piece let the guest go.
    fn piece(&mut self) -> Result<Captured> {
        match self.fill() {
            Ok(captured) if captured.more => Ok(captured),
            Ok(mut captured) => {
                // Handed out completely.
                self.pending.fill(0);
                let Some(open) = self.open.take() else { bail!("there is no cut to continue") };
                let machine = self.machine.clone();
                let mut life = machine.life();
                if open.last {
                    self.last = Some((open.epoch, VmTime(open.vm_time_ns)));
                } else {
                    machine.unfreeze(&mut life)?;
                }
                captured.pause_us = Machine::note_pause(&mut life, open.since);
                Ok(captured)
            }
            Err(e) => {
                self.abort();
                Err(e.context("the cut was aborted; the machine runs on"))
            }
        }
    }

    fn fill(&mut self) -> Result<Captured> {
        let Some(open) = &mut self.open else { bail!("there is no cut to continue") };
        let mut arena = self.arena.lock().map_err(|_| anyhow::anyhow!("the arena is lost"))?;
        let size = arena.map.len();
        let fits = |pages: usize, state: usize| (pages * 8).next_multiple_of(PAGE) + pages * PAGE + state <= size;
        ensure!(
            fits(1, open.state.len()),
            "the arena ({size} bytes) cannot hold the device state ({} bytes): start the VMM with a larger --arena",
            open.state.len()
        );
        let rest = &open.pages[open.done..];
        let more = !fits(rest.len(), open.state.len());
        let n = if more { rest.len().min(size.saturating_sub(PAGE) / (PAGE + 8)) } else { rest.len() };
        let pages_offset = (n * 8).next_multiple_of(PAGE);
        let indices: Vec<u8> = rest[..n].iter().flat_map(|i| i.to_le_bytes()).collect();
        let mut ok = arena.map.put(0, &indices);
        for (i, index) in rest[..n].iter().enumerate() {
            ok &= self.machine.core.ram.copy_page(*index, &mut arena.map, pages_offset + i * PAGE);
        }
        let state_offset = pages_offset + n * PAGE;
        let state: &[u8] = if more { &[] } else { &open.state };
        ok &= arena.map.put(state_offset, state);
        ensure!(ok, "a dirty page lies outside of RAM or the arena");
        open.done += n;
        Ok(Captured {
            epoch: open.epoch,
            pages: n as u64,
            indices_offset: 0,
            pages_offset: pages_offset as u64,
            state_offset: state_offset as u64,
            state_len: state.len() as u64,
            more,
            pause_us: 0,
            vm_time_ns: open.vm_time_ns,
        })
    }

    /// The standby holds the checkpoint of `epoch`.
    pub fn committed(&mut self, epoch: Epoch) -> Result<()> {
        let mut life = self.machine.life();
        ensure!(epoch <= life.last_cut, "epoch {epoch} was never cut (the newest is {})", life.last_cut);
        life.last_committed = life.last_committed.max(epoch);
        self.machine.core.hardware().commit(epoch);
        if let Some((_, at)) = self.last.take_if(|(last, _)| *last == epoch) {
            // It stood still since the cut; the standby goes on from there.
            self.machine.core.hardware().stopwatch.set(at);
            if life.state != VmmState::Fenced {
                life.state = VmmState::HandedOver;
                self.machine.retire();
            }
            life.cutting = false;
            self.machine.life_changed();
        }
        Ok(())
    }

    /// The machine is durably recorded as unprotected.
    pub fn gate_open(&mut self) -> Result<()> {
        let life = self.machine.life();
        ensure!(
            !matches!(life.state, VmmState::Fenced | VmmState::HandedOver),
            "the gate of a machine that runs elsewhere stays closed"
        );
        self.machine.core.hardware().set_gate(Gate::Open);
        Ok(())
    }

    /// How long the guest may stand still for the next request of this session; `None` while it runs.
    pub fn patience(&self) -> Option<Duration> {
        match (&self.open, &self.last) {
            (Some(_), _) => Some(PIECE_PATIENCE),
            (None, Some(_)) => Some(LAST_PATIENCE),
            (None, None) => None,
        }
    }

    /// Give up an open cut or an uncommitted last one: the guest runs on. Its pages stay pending.
    fn abort(&mut self) {
        if self.open.take().is_none() && self.last.take().is_none() {
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
        let machine = &self.machine;
        {
            let mut hardware = machine.core.hardware();
            hardware.unseal();
            hardware.set_gate(Gate::Hold);
        }
        if self.logging
            && let Err(e) = machine.core.ram.attach(&machine.core.vm, false)
        {
            eprintln!("warning: the dirty log stays on: {e:#}");
        }
        machine.life().session = false;
    }
}

/// The pages of a set, ascending.
fn indices(set: &PageSet) -> Vec<u64> {
    let mut pages = Vec::with_capacity(count(set) as usize);
    for (word, bits) in (0u64..).zip(set) {
        let mut bits = *bits;
        while bits != 0 {
            pages.push(word * 64 + u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_of_a_set_come_in_ascending_order() {
        let mut set = vec![0, 1 << 63 | 1, 0b1010];
        crate::memory::union(&mut set, &[1 << 5]);
        assert_eq!(indices(&set), [5, 64, 127, 129, 131]);
    }
}
