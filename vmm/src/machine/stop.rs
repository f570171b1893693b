//! Stopping a machine and letting it go on: capture, pause and resume, save, and the short stop of a cut.

use kvm_bindings::KVM_MP_STATE_HALTED;
use kvm_ioctls::VcpuFd;

use super::*;

/// A machine's state as it was read, before it becomes bytes.
pub struct RawState {
    machine: state::V1,
    vm: vm_state::state::V1,
    /// The first one's comes with the clock.
    vcpus: Vec<(vcpu_state::state::V1, Option<clock::state::V1>)>,
    devices: Vec<Payload>,
}

impl RawState {
    /// With what is not the hardware's.
    pub fn add(&mut self, payload: Payload) {
        self.devices.push(payload);
    }

    /// As bytes.
    pub fn encode(self) -> Result<Vec<u8>> {
        let mut payloads: Vec<Payload> = vec![
            container::payload(KIND, "this", VERSION, &self.machine)?,
            container::payload(vm_state::KIND, "this", vm_state::VERSION, &self.vm)?,
        ];
        for (id, (vcpu, clock)) in self.vcpus.iter().enumerate() {
            if let Some(clock) = clock {
                payloads.push(container::payload(clock::KIND, "this", clock::VERSION, clock)?);
            }
            payloads.push(container::payload(vcpu_state::KIND, &id.to_string(), vcpu_state::VERSION, vcpu)?);
        }
        payloads.extend(self.devices);
        Ok(container::encode(&payloads))
    }
}

impl Machine {
    /// Everything but RAM, as bytes. The vCPUs are parked and the devices frozen.
    /// `at` is the VM time that the state carries.
    pub fn capture(&self, life: &Life, hardware: &Hardware, at: VmTime) -> Result<Vec<u8>> {
        self.capture_raw(life, hardware, at)?.encode()
    }

    /// As [`Machine::capture`], not yet as bytes: a cut does that when the guest runs again.
    pub fn capture_raw(&self, life: &Life, hardware: &Hardware, at: VmTime) -> Result<RawState> {
        let can = self.can.clone();
        let cpuids = self.cpuids.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let core = self.core.clone();
        let save = move |id: usize, fd: &mut VcpuFd| {
            let clock = if id == 0 { Some(clock::read(&core.vm, fd, at)?) } else { None };
            anyhow::Ok((vcpu_state::save(fd, &can, &cpuids[id])?, clock))
        };
        let rest = || anyhow::Ok((vm_state::save(&self.core.vm)?, hardware.save()?));
        let (vcpus, rest) = self.vcpus.on_all_meanwhile(save, rest)?;
        let (vm, devices) = rest?;
        let machine = state::V1 {
            vcpus: self.config.vcpus,
            ram_bytes: self.core.ram.bytes(),
            life: life.born,
            resets: life.resets,
        };
        Ok(RawState { machine, vm, vcpus, devices })
    }

    /// The state that a paused machine was captured with.
    pub fn paused_state(life: &Life) -> Option<&[u8]> {
        life.paused.as_deref()
    }

    /// Stop the vCPUs and the guest's clocks.
    pub fn pause(&self) -> Result<()> {
        let mut life = self.quiet_life()?;
        match life.state {
            VmmState::Running => {}
            VmmState::Paused => return Ok(()),
            other => bail!("there is nothing to pause: the machine is {}", name(other)),
        }
        self.vcpus.stop_all();
        let mut hardware = self.core.hardware();
        hardware.frozen = true;
        hardware.stopwatch.stop();
        match self.capture(&life, &hardware, hardware.stopwatch.now()) {
            Ok(state) => {
                life.paused = Some(state);
                life.state = VmmState::Paused;
                Ok(())
            }
            Err(e) => {
                self.go(&mut hardware)?;
                Err(e.context("the machine runs on"))
            }
        }
    }

    /// Go on after [`Machine::pause`]: timers, clocks and TSC as they stood at the pause.
    pub fn resume(&self) -> Result<()> {
        let mut life = self.quiet_life()?;
        match life.state {
            VmmState::Paused => {}
            VmmState::Running => return Ok(()),
            other => bail!("there is nothing to resume: the machine is {}", name(other)),
        }
        let state = life.paused.clone().context("the paused machine has no saved state")?;
        let mut from = container::decode(&state)?;
        let vm: vm_state::state::V1 = container::take(&mut from, vm_state::KIND, "this", vm_state::VERSION)?;
        let clock: clock::state::V1 = container::take(&mut from, clock::KIND, "this", clock::VERSION)?;
        let vcpus = (0..self.config.vcpus)
            .map(|id| container::take(&mut from, vcpu_state::KIND, &id.to_string(), vcpu_state::VERSION))
            .collect::<Result<Vec<vcpu_state::state::V1>>>()?;
        let mut hardware = self.core.hardware();
        vm_state::load(&self.core.vm, &vm)?;
        clock::set_kvmclock(&self.core.vm, &clock)?;
        let offset = clock::common_offset(&clock);
        let can = self.can.clone();
        self.vcpus.on_all(move |id, fd| {
            clock::set_tsc(fd, &clock, offset)?;
            vcpu_state::load_timers(fd, &can, &vcpus[id])?;
            // Tells a guest with kvmclock that it was stopped, so that its watchdogs do not bark. Guests without refuse it.
            let _ = fd.kvmclock_ctrl();
            Ok(())
        })?;
        hardware.assert_lines(&self.core.vm);
        life.paused = None;
        life.state = VmmState::Running;
        self.go(&mut hardware)
    }

    /// Open the gate of a machine that nobody replicates (one that was restored or promoted by hand).
    pub fn open_gate_by_hand(&self) -> Result<()> {
        {
            let life = self.quiet_life()?;
            ensure!(!life.session, "a replicator protects this machine; only it may open the gate");
        }
        self.storage.unprotect(&self.core)?;
        let life = self.quiet_life()?;
        ensure!(!life.session, "a replicator protects this machine; only it may open the gate");
        ensure!(
            matches!(life.state, VmmState::Running | VmmState::Paused | VmmState::ShutDown),
            "there is no output to let out: the machine is {}",
            name(life.state)
        );
        self.core.hardware().set_gate(Gate::Open);
        Ok(())
    }

    /// Press the ACPI power button.
    pub fn power_button(&self) -> Result<()> {
        let life = self.quiet_life()?;
        ensure!(life.state == VmmState::Running, "the machine is {}: its power button does nothing", name(life.state));
        let mut hardware = self.core.hardware();
        hardware.press_power_button(self.core.env());
        Ok(())
    }

    /// Write RAM and device state to `dir`; the machine is paused for it and left as it was.
    pub fn save(&self, dir: &Path) -> Result<()> {
        ensure!(
            !self.storage.any(),
            "a machine with disks cannot be saved to a directory yet: its disks would go on without what was saved"
        );
        let was_running = self.life().state == VmmState::Running;
        self.pause()?;
        let state = {
            let mut life = self.quiet_life()?;
            let state = Self::paused_state(&life).context("the machine is not paused")?.to_vec();
            // Nobody lets it run meanwhile, and its status can still be asked for.
            life.cutting = true;
            state
        };
        let result = std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot create {}", dir.display()))
            .and_then(|()| crate::save::write(&self.core.ram, &state, dir));
        self.life().cutting = false;
        self.life_changed();
        if was_running {
            self.resume()?;
        }
        result
    }

    /// Where the vCPUs are. They are stopped for it as for a cut, and no longer.
    pub fn positions(&self) -> Result<Vec<VcpuPosition>> {
        let mut life = self.quiet_life()?;
        ensure!(life.state == VmmState::Running, "its vCPUs are nowhere: the machine is {}", name(life.state));
        drop(self.freeze(&life));
        let positions = self.vcpus.on_all(|_, fd| {
            let rip = fd.get_regs().context("KVM_GET_REGS")?.rip;
            let halted = fd.get_mp_state().context("KVM_GET_MP_STATE")?.mp_state == KVM_MP_STATE_HALTED;
            Ok(VcpuPosition { rip, halted })
        });
        self.unfreeze(&mut life)?;
        positions
    }

    /// Stop the machine for a cut, whatever it does (running, paused, shut down). The caller holds the life lock and has seen that no
    /// cut is under way; it sets [`Life::cutting`].
    pub fn freeze(&self, life: &Life) -> MutexGuard<'_, Hardware> {
        if life.state == VmmState::Running {
            self.vcpus.stop_all();
        }
        let mut hardware = self.core.hardware();
        hardware.freeze();
        hardware
    }

    /// Go on after a cut as before it.
    pub fn unfreeze(&self, life: &mut Life) -> Result<()> {
        let result = match life.state {
            VmmState::Running => {
                let mut hardware = self.core.hardware();
                self.core.thaw(&mut hardware);
                self.vcpus.run_all()
            }
            VmmState::ShutDown => {
                self.core.hardware().frozen = false;
                Ok(())
            }
            _ => Ok(()),
        };
        life.cutting = false;
        self.life_changed();
        result
    }
}
