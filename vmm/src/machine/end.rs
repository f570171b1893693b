//! The ends of a machine: switched off, handed over, fenced, halted with its process.

use super::*;

impl Machine {
    /// The guest switched itself off.
    pub fn shut_down(&self) -> Result<()> {
        let mut life = self.settled_life();
        if life.state != VmmState::Running {
            return Ok(());
        }
        self.vcpus.stop_all();
        let mut hardware = self.core.hardware();
        hardware.stopwatch.stop();
        life.state = VmmState::ShutDown;
        Ok(())
    }

    /// Somebody newer runs the machine: never run again here. At once, also in the middle of a cut.
    pub fn fence(&self) {
        self.vcpus.stop_all();
        let mut life = self.life();
        // Once more: whoever held the lock may have let them run again.
        self.vcpus.stop_all();
        let mut hardware = self.core.hardware();
        hardware.frozen = true;
        hardware.stopwatch.stop();
        hardware.set_gate(Gate::Hold);
        hardware.silence_nics(false);
        life.state = VmmState::Fenced;
        self.life_changed();
    }

    /// The machine runs elsewhere: end the links to the boards and let go of the disks, which belong to the other one now. Never waits for them.
    pub fn retire(self: &Arc<Self>) {
        let machine = self.clone();
        let spawned = std::thread::Builder::new().name("retire".into()).spawn(move || {
            machine.stop_pumps();
            machine.stop_nics();
            machine.storage.let_go();
            machine.drives.let_go();
        });
        if let Err(e) = spawned {
            eprintln!("warning: the links to the boards and the disks stay until the process ends: {e}");
        }
    }

    pub(super) fn stop_pumps(&self) {
        let pumps = std::mem::take(&mut *self.pumps.lock().unwrap_or_else(PoisonError::into_inner));
        drop(pumps);
    }

    /// End the cards' threads. Not under the device lock, which they take.
    pub(super) fn stop_nics(&self) {
        let workers = std::mem::take(&mut *self.nic_workers.lock().unwrap_or_else(PoisonError::into_inner));
        drop(workers);
    }

    /// Stop everything for the end of the process.
    pub fn halt(&self) {
        self.vcpus.stop_all();
        {
            let mut hardware = self.core.hardware();
            hardware.frozen = true;
            hardware.silence_nics(true);
        }
        self.stop_pumps();
        self.stop_nics();
        if self.life().state == VmmState::ShutDown {
            self.storage.finish();
        }
        self.storage.let_go();
        self.drives.let_go();
    }

    /// Whether all released output has arrived at the other end; for a polite end after a power-off.
    pub fn drained(&self) -> bool {
        self.core.hardware().ports().all(|p| p.stream.acked() == p.stream.limit())
    }
}
