//! Starting a machine: promotion from power on or from an image, and the reset that the guest asks for.
//!
//! What must hold: interrupt controllers before LAPICs, clock and TSC before the vCPUs' states, all of them before anything runs.

use super::disks::Opened;
use super::*;

impl Machine {
    /// Make a standby the running machine. `gate`: whether its outputs wait.
    pub fn promote(&self, generation: Generation, from: &PromoteFrom, gate: Gate) -> Result<()> {
        let mut life = self.quiet_life()?;
        match life.state {
            VmmState::Standby => {}
            VmmState::Running | VmmState::Paused => {
                bail!("the machine already runs as generation {}", life.generation)
            }
            other => bail!("the machine cannot be promoted any more here ({other:?}); stop and start it"),
        }
        ensure!(generation > Generation::ZERO, "a machine runs under a generation of 1 or higher");
        let image = match from {
            PromoteFrom::ColdBoot => None,
            PromoteFrom::Image { state_file, .. } => {
                let bytes = std::fs::read(state_file)
                    .with_context(|| format!("cannot read the machine's saved state {state_file}"))?;
                Some((state_file, bytes))
            }
        };
        if !self.storage.any() && !self.drives.any() {
            return self.run_from(life, generation, image, gate, Opened::default());
        }
        // Storage can be slow. Nobody else starts the machine meanwhile, and its status can still be asked for.
        life.cutting = true;
        drop(life);
        let opened = self.open_disks(generation, image.as_ref().map(|(_, bytes)| &bytes[..]));
        let mut life = self.life();
        life.cutting = false;
        self.life_changed();
        let opened = opened.inspect_err(|_| self.let_go_of_disks())?;
        let promoted = if life.state == VmmState::Standby {
            self.run_from(life, generation, image, gate, opened)
        } else {
            drop(life);
            Err(anyhow::anyhow!("the machine was ended while its disks were opened"))
        };
        promoted.inspect_err(|_| self.let_go_of_disks())
    }

    /// The disks are open; the rest of a promotion.
    fn run_from(
        &self,
        mut life: MutexGuard<'_, Life>,
        generation: Generation,
        image: Option<(&String, Vec<u8>)>,
        gate: Gate,
        opened: Opened,
    ) -> Result<()> {
        let mut hardware = self.core.hardware();
        let taken_over = image.is_some();
        match image {
            None => {
                life.born = generation;
                let start = clock::state::V1::default();
                hardware.cold();
                self.power_on(&mut hardware, Some(start))?;
            }
            Some((state_file, bytes)) => self
                .load_image(&mut life, &mut hardware, &bytes)
                .with_context(|| format!("cannot load the machine from {state_file}"))?,
        }
        self.show(&mut hardware, opened);
        hardware.set_gate(gate);
        self.start_pumps(&mut hardware, generation, life.born)?;
        self.start_nics(&mut hardware).inspect_err(|_| hardware.silence_nics(false))?;
        if taken_over {
            hardware.ask_to_announce();
        }
        life.generation = generation;
        life.state = VmmState::Running;
        self.go(&mut hardware)
    }

    pub(super) fn start_pumps(&self, hardware: &mut Hardware, generation: Generation, life: Generation) -> Result<()> {
        let mut pumps = Vec::new();
        let backends = self.config.serial.iter().chain(&self.config.console);
        for (i, (port, backend)) in hardware.ports_mut().zip(backends).enumerate() {
            let (tx_acked, rx_delivered) = (port.stream.acked(), port.stream.rx_delivered());
            let at = Start { generation, life, tx_acked, rx_delivered };
            let pump = Pump::start(&self.core, i, port.name.clone(), backend, at)
                .with_context(|| format!("port {}", port.name))?;
            port.pump = Some(pump.inbox());
            pumps.push(pump);
        }
        *self.pumps.lock().unwrap_or_else(PoisonError::into_inner) = pumps;
        Ok(())
    }

    /// The network cards' ports come up: from here on this node is where the guest is.
    fn start_nics(&self, hardware: &mut Hardware) -> Result<()> {
        let now = hardware.stopwatch.now();
        for (i, (nic, spec)) in hardware.nics.iter_mut().zip(&self.config.nics).enumerate() {
            let Some(port) = nic.port.clone() else { continue };
            port.speak().with_context(|| format!("the network card {}", spec.name))?;
            nic.announce(now);
            let workers = Workers::start(&self.core, i, &spec.name, port)?;
            // One by one: should another fail, they are not ended here, where they might wait for the device lock.
            self.nic_workers.lock().unwrap_or_else(PoisonError::into_inner).push(workers);
        }
        Ok(())
    }

    /// Let vCPUs, devices and VM time run. Clocks and vCPU states have been set. What was asked for before it stopped is asked for again.
    pub(super) fn go(&self, hardware: &mut Hardware) -> Result<()> {
        hardware.stopwatch.start();
        self.core.thaw(hardware);
        self.vcpus.run_all()?;
        if let Some(asked) = hardware.asked {
            self.core.tell(match asked {
                Asked::Reset => Event::Reset,
                Asked::PowerOff => Event::PowerOff,
            });
        }
        Ok(())
    }

    /// Power-on (or reset) state of everything, boot program in RAM. `clock`: set the clocks too.
    pub(super) fn power_on(&self, hardware: &mut Hardware, clock: Option<clock::state::V1>) -> Result<()> {
        vm_state::load(&self.core.vm, &self.pristine.vm)?;
        let ram = &self.core.ram;
        let entry = match &self.config.boot {
            BootSource::Linux { kernel, initrd, cmdline } => {
                let linux = LinuxBoot::open(kernel, initrd.as_deref(), cmdline)?;
                hardware.as_firmware_leaves_it()?;
                let serial_ports = self.config.serial.len();
                let rsdp = acpi::write(ram, Platform { vcpus: self.config.vcpus, serial_ports })?;
                linux.load(ram, rsdp)?
            }
            BootSource::Flat { code, at } => boot::flat_start(ram, code, *at)?,
        };
        let states = self.pristine.vcpus.iter().enumerate().map(|(id, s)| start_state(s.clone(), id, entry)).collect();
        self.load_vcpus(states, clock, false)
    }

    /// Put states into all (parked) vCPUs; with `clock`, kvmclock and TSC before.
    pub(super) fn load_vcpus(
        &self,
        states: Vec<vcpu_state::state::V1>,
        clock: Option<clock::state::V1>,
        new_cpuid: bool,
    ) -> Result<()> {
        let mut offset = 0;
        if let Some(clock) = &clock {
            clock::set_kvmclock(&self.core.vm, clock)?;
            offset = clock::common_offset(clock);
        }
        let can = self.can.clone();
        self.vcpus.on_all(move |id, fd| {
            if let Some(clock) = &clock {
                clock::set_tsc(fd, clock, offset)?;
            }
            vcpu_state::load(fd, &can, &states[id], new_cpuid)
        })?;
        Ok(())
    }

    pub(super) fn load_image(&self, life: &mut Life, hardware: &mut Hardware, bytes: &[u8]) -> Result<()> {
        let mut from = container::decode(bytes)?;
        let machine: state::V1 = container::take(&mut from, KIND, "this", VERSION)?;
        ensure!(
            machine.vcpus == self.config.vcpus && machine.ram_bytes == self.core.ram.bytes(),
            "it was saved with {} vCPUs and {} MiB of RAM, this machine has {} and {}: give both the same",
            machine.vcpus,
            machine.ram_bytes >> 20,
            self.config.vcpus,
            self.core.ram.bytes() >> 20
        );
        let vm: vm_state::state::V1 = container::take(&mut from, vm_state::KIND, "this", vm_state::VERSION)?;
        let clock: clock::state::V1 = container::take(&mut from, clock::KIND, "this", clock::VERSION)?;
        let vcpus = (0..self.config.vcpus)
            .map(|id| container::take(&mut from, vcpu_state::KIND, &id.to_string(), vcpu_state::VERSION))
            .collect::<Result<Vec<vcpu_state::state::V1>>>()?;
        hardware.restore(&mut from)?;
        // Used already: the disks are open.
        self.storage.tags(&mut from)?;
        from.finish()?;

        hardware.stopwatch.set(VmTime(clock.vm_time_ns));
        vm_state::load(&self.core.vm, &vm)?;
        let cpuids = vcpus.iter().map(|v| v.cpuid.clone()).collect();
        self.load_vcpus(vcpus, Some(clock), true)?;
        hardware.assert_lines(&self.core.vm);
        *self.cpuids.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(cpuids);
        life.born = machine.life;
        life.resets = machine.resets;
        Ok(())
    }

    /// The guest asked for a reset: power-on state, boot program loaded again. Clocks go on.
    pub fn reset(&self) -> Result<()> {
        let mut life = self.settled_life();
        // Where the machine was paused in between it is asked for twice, and given once.
        if life.state != VmmState::Running || self.core.hardware().asked != Some(Asked::Reset) {
            return Ok(());
        }
        self.vcpus.stop_all();
        let mut hardware = self.core.hardware();
        hardware.frozen = true;
        life.resets += 1;
        hardware.reset();
        self.power_on(&mut hardware, None).context("cannot reset the machine")?;
        self.core.thaw(&mut hardware);
        self.vcpus.run_all()
    }
}

/// The start state of vCPU `id`: the first one enters the boot program, the others wait for INIT and SIPI; in a flat guest all enter.
fn start_state(mut s: vcpu_state::state::V1, id: usize, entry: Entry) -> vcpu_state::state::V1 {
    if id == 0 || entry.user {
        boot::set_entry(&mut s.sregs, &mut s.regs, entry);
        s.regs.rdi = id as u64;
        s.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_RUNNABLE;
    } else {
        s.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_UNINITIALIZED;
    }
    s
}
