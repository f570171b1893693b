//! What must hold, whatever happens: see the list in the main file.

use understudy_protocol::ids::Generation;
use understudy_replicator::receiver::{LocalVmm, Standing, Surroundings};

use super::content::device_state;
use super::world::{Check, IDENTITY, World};

impl World {
    /// The cluster believes the primary dead.
    pub fn take_over(&mut self) -> Check {
        let may = !self.veto && matches!(self.score, Standing::UpToDate | Standing::Disconnected);
        if !may || self.taken.is_some() {
            return Ok(());
        }
        let Some((generation, epoch, ram, state)) = self.disk.recovered() else { return Ok(()) };
        let mut steps = Vec::new();
        let around = Surroundings { vmm: LocalVmm::Standby(None), ram: Some(IDENTITY) };
        let taking = self.receiver.take_over(Generation(2), around, &mut steps)?;
        self.say(format!("take-over: {taking:?}, {steps:?}"));
        if taking.image != Some((epoch, generation)) {
            return Err(format!("the take-over gave {:?} instead of epoch {epoch}", taking.image));
        }
        let troubled = std::mem::replace(&mut self.troubled, false);
        self.standby_steps(steps, None)?;
        self.troubled = troubled;
        if self.disk.ram != ram || state.is_empty() {
            return Err("the image was not made whole by the take-over".into());
        }
        // An acknowledgement that was under way may still let out what the image covers; the boards know by then that a
        // newer generation owns them.
        let covered = self.vmm.snapshots.get(&epoch.0).map_or(0, |(_, made)| *made);
        self.taken = Some((ram, covered.max(self.vmm.released)));
        Ok(())
    }

    /// After every event.
    pub fn check(&mut self) -> Check {
        let durable = &self.disk.durable;
        if durable.newest() < self.floor {
            return Err(format!("the floor went from {} to {}", self.floor, durable.newest()));
        }
        self.floor = self.floor.max(durable.newest());
        if let Some((ram, covered)) = &self.taken {
            if self.disk.ram != *ram {
                return Err("the image changed after the take-over".into());
            }
            if self.vmm.released > *covered {
                return Err("the old machine let out more than the image that was taken over covers".into());
            }
            return Ok(());
        }
        let found = self.disk.recovered();
        let mut covered = None;
        if let Some((generation, epoch, ram, state)) = found {
            let Some((snapshot, made)) = self.vmm.snapshots.get(&epoch.0) else {
                return Err(format!("the image claims epoch {epoch}, which was never cut"));
            };
            if generation != Generation(1) || *snapshot != ram {
                return Err(format!("the image is not epoch {epoch}: {ram:x?} instead of {snapshot:x?}"));
            }
            if self.vmm.disks && !self.vmm.sealed.contains(&epoch.0) {
                return Err(format!("the image is epoch {epoch}, and the disks are not sealed for it"));
            }
            self.check_copy(epoch)?;
            if state != device_state(epoch) {
                return Err(format!("the device state is not epoch {epoch}'s"));
            }
            covered = Some(*made);
        }
        if self.vmm.handed_over && (self.veto || self.vmm.gate_open) {
            return Err("the old primary acts after the hand-over".into());
        }
        if !self.veto && self.vmm.released > covered.unwrap_or(0) {
            return Err(format!(
                "output {} has left the machine, the image covers {covered:?}, and no veto stands",
                self.vmm.released
            ));
        }
        Ok(())
    }
}
