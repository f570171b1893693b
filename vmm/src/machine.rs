//! One machine: what it is built of, and its life.
//!
//! ```text
//!              promote (cold boot, image)            pause
//!   Standby ──────────────────────────────► Running ◄──────► Paused
//!                                            │  │  resume
//!                          guest power-off   │  │  last cut, committed
//!                                ShutDown ◄──┘  └──► HandedOver          any ──► Fenced (a board shows a newer generation)
//! ```
//! Called by the control socket's threads, by the supervisor (resets, power-off, fencing) and by a replication session
//! ([`crate::session`]). One lock, `life`, serialises what changes the state; a cut that takes several requests holds it logically
//! ([`Life::cutting`]).
//!
//! What must hold: clocks are set before vCPUs run; a machine that was handed over or fenced never runs again here.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};
use understudy_protocol::control::{Gate, PromoteFrom, SerialStatus, VmmState, VmmStatus};
use understudy_protocol::ids::{Epoch, Generation};

use crate::acpi::{self, Platform};
use crate::backend::{BackendConfig, Start};
use crate::boot::{self, Entry, LinuxBoot};
use crate::clock;
use crate::container;
use crate::core::{Core, Event};
use crate::cpuid;
use crate::devices::{Payload, Payloads};
use crate::hardware::{Asked, Hardware, HardwareConfig};
use crate::memory::Ram;
use crate::pump::Pump;
use crate::routing;
use crate::vcpu_state::{self, Abilities};
use crate::vcpus::Vcpus;
use crate::vm_state;

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 32;
/// How many pauses the status remembers.
const PAUSES: usize = 512;

/// What a machine runs from when it is powered on.
#[derive(Debug, Clone)]
pub enum BootSource {
    /// Linux, directly. The files are read at power on and at every reset, and not kept in memory.
    Linux {
        /// bzImage.
        kernel: PathBuf,
        /// Initial RAM disk.
        initrd: Option<PathBuf>,
        /// Command line.
        cmdline: String,
    },
    /// Flat 64-bit code in ring 3, on all vCPUs, for tests and benchmarks: RDI is the vCPU's number.
    Flat {
        /// The code.
        code: Vec<u8>,
        /// Where it is loaded and entered.
        at: u64,
    },
}

/// How a machine is built. Primary and standby must agree in all of it but `serial` and the paths.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// Its name.
    pub name: String,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// What it boots.
    pub boot: BootSource,
    /// What is behind the serial ports, COM1 first.
    pub serial: Vec<BackendConfig>,
    /// What is behind the virtio console, if there is one.
    pub console: Option<BackendConfig>,
    /// The RAM file.
    pub ram_file: PathBuf,
}

/// Saved state of the machine as a whole.
mod state {
    use super::*;

    /// Configuration to compare, and what outlives a host.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        pub vcpus: u32,
        pub ram_bytes: u64,
        pub life: Generation,
        pub resets: u64,
    }
}
const KIND: &str = "machine";
const VERSION: u32 = 1;

/// The machine's life; see the module.
pub struct Life {
    /// State as the status shows it.
    pub state: VmmState,
    generation: Generation,
    /// Generation of the cold boot.
    born: Generation,
    /// A cut is under way, or a last cut waits for its commit: nobody else may start, stop or change the machine.
    pub cutting: bool,
    /// A session is attached.
    pub session: bool,
    /// Newest cut, counted on over the sessions.
    pub last_cut: Epoch,
    /// Newest commit.
    pub last_committed: Epoch,
    resets: u64,
    /// Durations of the newest pauses, µs.
    pub pauses: VecDeque<u32>,
    /// State of the stopped vCPUs and clocks, while explicitly paused.
    paused: Option<Vec<u8>>,
}

/// Power-on state of what KVM keeps, to return to at a reset.
struct Pristine {
    vcpus: Vec<vcpu_state::state::V1>,
    vm: vm_state::state::V1,
}

/// A machine. See the module.
pub struct Machine {
    /// What its threads share.
    pub core: Arc<Core>,
    /// Its vCPUs.
    pub vcpus: Vcpus,
    config: MachineConfig,
    can: Arc<Abilities>,
    cpuids: Mutex<Arc<Vec<Vec<kvm_cpuid_entry2>>>>,
    pristine: Pristine,
    life: Mutex<Life>,
    life_changed: Condvar,
    pumps: Mutex<Vec<Pump>>,
    kvm_backend: String,
}

impl Machine {
    /// Build everything; nothing runs. Events go to `events`.
    pub fn build(config: MachineConfig, events: Sender<Event>) -> Result<Self> {
        ensure!((1..=MAX_VCPUS).contains(&config.vcpus), "a machine has 1 to {MAX_VCPUS} vCPUs, not {}", config.vcpus);
        config.serial.iter().chain(&config.console).try_for_each(BackendConfig::validate)?;
        ensure!(config.serial.len() <= 4, "a machine has at most 4 serial ports");
        if let BootSource::Linux { kernel, initrd, cmdline } = &config.boot {
            LinuxBoot::open(kernel, initrd.as_deref(), cmdline)?;
        }
        let kvm = open_kvm()?;
        let ram = Ram::open(&config.ram_file, config.memory_mib)?;
        let vm = kvm.create_vm().context("KVM refuses to create a machine")?;
        // Three pages that Intel's virtualisation needs, out of the guest's way, below the BIOS at 4 GiB.
        vm.set_identity_map_address(0xfffb_c000).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.set_tss_address(0xfffb_d000).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM does not offer its interrupt controllers")?;
        vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })
            .context("KVM does not offer its timer (PIT)")?;
        routing::set(&vm)?;
        ram.attach(&vm, false)?;

        let offered = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .context("KVM does not say which CPU features it supports")?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let cpuids: Vec<_> =
            (0..config.vcpus).map(|id| cpuid::for_vcpu(offered.as_slice(), id, config.vcpus, deadline)).collect();
        let mut fds = Vec::new();
        for (id, cpuid) in (0u64..).zip(&cpuids) {
            let fd = vm.create_vcpu(id).with_context(|| format!("KVM refuses to create vCPU {id}"))?;
            vcpu_state::set_cpuid(&fd, cpuid)?;
            fds.push(fd);
        }
        let listed = kvm.get_msr_index_list().context("KVM does not list its MSRs")?;
        let xsave = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let can = Arc::new(Abilities::probe(listed.as_slice(), xsave, &fds[0]));

        let hardware = Hardware::new(
            HardwareConfig { serial_ports: config.serial.len(), console: config.console.is_some() },
            &ram,
        )?;
        let core = Arc::new(Core::new(config.name.clone(), vm, ram, hardware, events));
        let vcpus = Vcpus::start(fds, &core)?;
        let cpuids = Arc::new(cpuids);
        let pristine = {
            let (can, cpuids) = (can.clone(), cpuids.clone());
            Pristine {
                vcpus: vcpus.on_all(move |id, fd| vcpu_state::save(fd, &can, &cpuids[id]))?,
                vm: vm_state::save(&core.vm)?,
            }
        };
        core.start_timer()?;
        let life = Life {
            state: VmmState::Standby,
            generation: Generation::ZERO,
            born: Generation::ZERO,
            cutting: false,
            session: false,
            last_cut: Epoch::ZERO,
            last_committed: Epoch::ZERO,
            resets: 0,
            pauses: VecDeque::new(),
            paused: None,
        };
        Ok(Self {
            core,
            vcpus,
            config,
            can,
            cpuids: Mutex::new(cpuids),
            pristine,
            life: Mutex::new(life),
            life_changed: Condvar::new(),
            pumps: Mutex::new(Vec::new()),
            kvm_backend: kvm_backend(),
        })
    }

    /// The life, also in the middle of a cut.
    pub fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life when no cut is under way; waits for the end of one, however long.
    fn settled_life(&self) -> MutexGuard<'_, Life> {
        self.life_changed.wait_while(self.life(), |l| l.cutting).unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Machine::settled_life`], for callers who cannot wait for ever.
    pub fn quiet_life(&self) -> Result<MutexGuard<'_, Life>> {
        const AT_MOST: Duration = Duration::from_secs(30);
        let (life, timeout) = self
            .life_changed
            .wait_timeout_while(self.life(), AT_MOST, |l| l.cutting)
            .unwrap_or_else(PoisonError::into_inner);
        ensure!(!timeout.timed_out(), "the machine is being captured or saved and that does not end; try again later");
        Ok(life)
    }

    /// Tell waiters that the life changed.
    pub fn life_changed(&self) {
        self.life_changed.notify_all();
    }

    // ------------------------------------------------------------------------------------------------ start

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
        let mut hardware = self.core.hardware();
        match from {
            PromoteFrom::ColdBoot => {
                life.born = generation;
                let start = clock::state::V1::default();
                hardware.cold();
                self.power_on(&mut hardware, Some(start))?;
            }
            PromoteFrom::Image { state_file, .. } => {
                let bytes = std::fs::read(state_file)
                    .with_context(|| format!("cannot read the machine's saved state {state_file}"))?;
                self.load_image(&mut life, &mut hardware, &bytes)
                    .with_context(|| format!("cannot load the machine from {state_file}"))?;
            }
        }
        hardware.set_gate(gate);
        self.start_pumps(&mut hardware, generation, life.born)?;
        life.generation = generation;
        life.state = VmmState::Running;
        self.go(&mut hardware)?;
        if let Some(asked) = hardware.asked {
            self.core.tell(match asked {
                Asked::Reset => Event::Reset,
                Asked::PowerOff => Event::PowerOff,
            });
        }
        Ok(())
    }

    fn start_pumps(&self, hardware: &mut Hardware, generation: Generation, life: Generation) -> Result<()> {
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

    /// Let vCPUs, devices and VM time run. Clocks and vCPU states have been set.
    fn go(&self, hardware: &mut Hardware) -> Result<()> {
        hardware.stopwatch.start();
        self.core.thaw(hardware);
        self.vcpus.run_all()
    }

    /// Power-on (or reset) state of everything, boot program in RAM. `clock`: set the clocks too.
    fn power_on(&self, hardware: &mut Hardware, clock: Option<clock::state::V1>) -> Result<()> {
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
    fn load_vcpus(
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

    fn load_image(&self, life: &mut Life, hardware: &mut Hardware, bytes: &[u8]) -> Result<()> {
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
        from.finish()?;

        hardware.stopwatch.set(crate::devices::VmTime(clock.vm_time_ns));
        vm_state::load(&self.core.vm, &vm)?;
        let cpuids = vcpus.iter().map(|v| v.cpuid.clone()).collect();
        self.load_vcpus(vcpus, Some(clock), true)?;
        hardware.assert_lines(&self.core.vm);
        *self.cpuids.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(cpuids);
        life.born = machine.life;
        life.resets = machine.resets;
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------ stop and go

    /// Everything but RAM, as bytes. The vCPUs are parked and the devices frozen.
    pub fn capture(&self, life: &Life, hardware: &Hardware) -> Result<Vec<u8>> {
        let can = self.can.clone();
        let cpuids = self.cpuids.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let vcpus = self.vcpus.on_all(move |id, fd| {
            let state = vcpu_state::save(fd, &can, &cpuids[id])?;
            container::payload(vcpu_state::KIND, &id.to_string(), vcpu_state::VERSION, &state)
        })?;
        let machine = state::V1 {
            vcpus: self.config.vcpus,
            ram_bytes: self.core.ram.bytes(),
            life: life.born,
            resets: life.resets,
        };
        let vm_time = hardware.stopwatch.now();
        let core = self.core.clone();
        let clock = self.vcpus.on_first(move |fd| clock::read(&core.vm, fd, vm_time))?;
        let mut payloads: Vec<Payload> = vec![
            container::payload(KIND, "this", VERSION, &machine)?,
            container::payload(vm_state::KIND, "this", vm_state::VERSION, &vm_state::save(&self.core.vm)?)?,
            container::payload(clock::KIND, "this", clock::VERSION, &clock)?,
        ];
        payloads.extend(vcpus);
        payloads.extend(hardware.save()?);
        Ok(container::encode(&payloads))
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
        match self.capture(&life, &hardware) {
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

    // ------------------------------------------------------------------------------------------------ supervisor

    /// The guest asked for a reset: power-on state, boot program loaded again. Clocks go on.
    pub fn reset(&self) -> Result<()> {
        let mut life = self.settled_life();
        if life.state != VmmState::Running {
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
        life.state = VmmState::Fenced;
        self.life_changed();
    }

    /// The machine runs elsewhere: end the links to the boards, which belong to the other one now. Never waits for them.
    pub fn retire(self: &Arc<Self>) {
        let machine = self.clone();
        let spawned = std::thread::Builder::new().name("retire".into()).spawn(move || machine.stop_pumps());
        if let Err(e) = spawned {
            eprintln!("warning: the links to the boards stay until the process ends: {e}");
        }
    }

    fn stop_pumps(&self) {
        let pumps = std::mem::take(&mut *self.pumps.lock().unwrap_or_else(PoisonError::into_inner));
        drop(pumps);
    }

    /// Stop everything for the end of the process.
    pub fn halt(&self) {
        self.vcpus.stop_all();
        self.core.hardware().frozen = true;
        self.stop_pumps();
    }

    /// Whether all released output has arrived at the other end; for a polite end after a power-off.
    pub fn drained(&self) -> bool {
        self.core.hardware().ports().all(|p| p.stream.acked() == p.stream.limit())
    }

    // ------------------------------------------------------------------------------------------------ cut

    /// Stop the machine for a cut, whatever it does (running, paused, shut down). The caller holds the life lock and has seen that no
    /// cut is under way; it sets [`Life::cutting`].
    pub fn freeze(&self, life: &Life) -> MutexGuard<'_, Hardware> {
        if life.state == VmmState::Running {
            self.vcpus.stop_all();
        }
        let mut hardware = self.core.hardware();
        hardware.frozen = true;
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

    /// Remember a pause.
    pub fn note_pause(life: &mut Life, since: Instant) -> u64 {
        let us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        if life.pauses.len() == PAUSES {
            life.pauses.pop_front();
        }
        life.pauses.push_back(u32::try_from(us).unwrap_or(u32::MAX));
        us
    }

    /// The generation under which it runs.
    pub fn generation(&self) -> Generation {
        self.life().generation
    }

    /// What the status command shows.
    pub fn status(&self) -> VmmStatus {
        let (state, generation, last_cut, last_committed, replicated, resets, recent) = {
            let l = self.life();
            let recent = l.pauses.iter().copied().collect();
            (l.state, l.generation, l.last_cut, l.last_committed, l.session, l.resets, recent)
        };
        let links: Vec<_> = {
            let pumps = self.pumps.lock().unwrap_or_else(PoisonError::into_inner);
            pumps.iter().map(|p| p.status.lock().map(|s| s.clone()).unwrap_or_default()).collect()
        };
        let hardware = self.core.hardware();
        let serial = hardware
            .ports()
            .enumerate()
            .map(|(i, s)| SerialStatus {
                port: s.name.clone(),
                backend: links
                    .get(i)
                    .map(|l| l.backend.clone())
                    .or_else(|| {
                        self.config.serial.iter().chain(&self.config.console).nth(i).map(BackendConfig::describe)
                    })
                    .unwrap_or_default(),
                link: links.get(i).map_or_else(|| "local".into(), |l| l.link.clone()),
                tx_bytes: s.stream.end(),
                tx_acked: s.stream.acked(),
                tx_held: s.stream.held(),
                rx_bytes: s.stream.rx_delivered(),
            })
            .collect();
        VmmStatus {
            machine: self.config.name.clone(),
            state,
            generation,
            gate: hardware.gate(),
            vcpus: self.config.vcpus,
            ram_bytes: self.core.ram.bytes(),
            vm_time_ns: hardware.stopwatch.now().0,
            last_cut,
            last_committed,
            replicated,
            kvm_backend: self.kvm_backend.clone(),
            resets,
            serial,
            recent_pauses_us: recent,
        }
    }

    /// MSRs that the host refused so far.
    pub fn refused_msrs(&self) -> Vec<u32> {
        self.can.refused()
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

fn name(state: VmmState) -> &'static str {
    match state {
        VmmState::Standby => "a standby that never ran",
        VmmState::Running => "running",
        VmmState::Paused => "paused (resume it first)",
        VmmState::HandedOver => "handed over to another node",
        VmmState::ShutDown => "switched off",
        VmmState::Fenced => "fenced: a newer generation of it runs elsewhere",
    }
}

fn open_kvm() -> Result<Kvm> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) if e.errno() == libc::ENOENT => {
            bail!("/dev/kvm does not exist: load kvm_intel or kvm_amd, and enable virtualisation in the firmware")
        }
        Err(e) if e.errno() == libc::EACCES => {
            bail!("/dev/kvm may not be opened: run as root or as a member of the group kvm")
        }
        Err(e) => return Err(anyhow::Error::from(e).context("cannot open /dev/kvm")),
    };
    ensure!(kvm.get_api_version() == 12, "/dev/kvm is not KVM (API version {}, not 12)", kvm.get_api_version());
    Ok(kvm)
}

/// Which KVM module is in use.
fn kvm_backend() -> String {
    ["kvm_amd", "kvm_intel", "kvm_pvm"]
        .into_iter()
        .find(|m| Path::new("/sys/module").join(m).exists())
        .unwrap_or("kvm")
        .to_owned()
}

/// Payloads of a captured machine, for tests and tools that look into one.
pub fn payloads(state: &[u8]) -> Result<Payloads> {
    Ok(container::decode(state)?)
}
