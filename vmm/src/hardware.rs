//! All devices of a machine behind one lock: dispatch of guest accesses, interrupt lines, outputs to the gate, inputs from the boards.
//!
//! vCPU threads enter by [`Hardware::io`] and [`Hardware::mmio`], the timer thread by [`Hardware::tick`], ports' pumps by
//! [`crate::port::Port::queue_input`] and the stream. After every entry [`Hardware::settle`] moves what came out of the devices to where it belongs.
//!
//! What must hold: while [`Hardware::frozen`] is set, no device is touched (the machine is being captured, or stands still); so
//! neither guest RAM nor any state that a checkpoint contains changes.

use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use understudy_protocol::control::{CdromShape, DiskShape, Gate, NicShape, NicStatus};
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::NicSpec;
use understudy_protocol::watchdog::{WatchdogSpec, WatchdogStatus};

use crate::clock::Stopwatch;
use crate::devices::acpi_pm::AcpiPm;
use crate::devices::i8042::{I8042, Port92};
use crate::devices::pci::PciBus;
use crate::devices::rtc::Rtc;
use crate::devices::scsi::{Medium, Refused, Unit};
use crate::devices::uart16550::Uart16550;
use crate::devices::{
    self, Action, COM_IRQS, COM_PORTS, Ctx, GuestRam, I8042_PORT, PCI_CONFIG_PORT, PM_PORT, PORT92, Payload, Payloads,
    PioDevice, RTC_IRQ, RTC_PORT, SCI_IRQ, SMI_CMD_PORT, VmTime,
};
use crate::gate::{self, Stream};
use crate::memory::Ram;
use crate::net::nic::Nic;
use crate::net::port::NetPort;
use crate::plug::Plugged;
use crate::port::Port;

/// Interrupt lines of the I/O APIC.
const LINES: usize = 24;
/// What the guest asked for and has not been given yet. Part of a checkpoint: the takeover may come in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// Reset.
    Reset,
    /// Power off.
    PowerOff,
}

/// A serial port.
pub struct SerialPort {
    /// The device.
    pub uart: Uart16550,
    /// The host's side.
    pub port: Port,
}

impl SerialPort {
    fn settle(&mut self, now: VmTime) {
        let Self { uart, port } = self;
        loop {
            uart.set_output_room(port.stream.room(), now);
            let out = uart.take_output();
            if out.is_empty() {
                break;
            }
            port.stream.write(&out);
        }
        port.feed(|bytes| uart.receive(bytes, now));
        uart.set_input_waiting(port.input_waiting());
        port.tell_pump();
    }
}

/// What surrounds the devices.
#[derive(Clone, Copy)]
pub struct Env<'a> {
    /// The machine in KVM.
    pub vm: &'a VmFd,
    /// Its RAM.
    pub ram: &'a GuestRam,
}

/// What a machine consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardwareConfig {
    /// Number of serial ports, 0 to 4.
    pub serial_ports: usize,
    /// Whether there is a virtio console.
    pub console: bool,
    /// Its disks.
    pub disks: Vec<DiskShape>,
    /// Its CD-ROM drives.
    pub cdroms: Vec<CdromShape>,
    /// Queues of its SCSI controller, if it needs one.
    pub scsi_queues: u16,
    /// Its network cards.
    pub nics: Vec<NicShape>,
    /// Its watchdog, if it has one.
    pub watchdog: Option<WatchdogSpec>,
}

/// The devices. See the module.
pub struct Hardware {
    /// VM time.
    pub stopwatch: Stopwatch,
    /// Serial ports, COM1 first.
    pub serial: Vec<SerialPort>,
    /// The virtio console's port, if there is one.
    pub console: Option<Port>,
    /// Its disks, then its CD-ROM drives.
    pub disks: Vec<Plugged>,
    /// Its network cards.
    pub nics: Vec<Nic>,
    /// What the guest asked for.
    pub asked: Option<Asked>,
    /// No device may be touched.
    pub frozen: bool,
    /// Since when the vCPUs stand still for a cut.
    still_since: Option<VmTime>,
    /// When the timer thread wakes by itself; `None` while it stands still.
    pub armed: Option<VmTime>,
    /// Rings when output begins to wait for a cut.
    pub bell: std::sync::Arc<crate::core::Bell>,
    /// Output waits that no cut covers.
    uncovered: bool,
    /// The gate of all outputs.
    gate: Gate,
    rtc: Rtc,
    i8042: I8042,
    port92: Port92,
    pm: AcpiPm,
    pci: PciBus,
    lines: [bool; LINES],
}

/// Saved state of what is not a device.
pub mod state {
    use super::*;

    /// Streams and open wishes.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// One a port.
        pub ports: Vec<gate::state::V1>,
        /// See [`Asked`].
        pub asked: Option<Asked>,
    }
}
/// Kind of [`state::V1`].
const KIND: &str = "streams";
const VERSION: u32 = 1;

impl Hardware {
    /// Devices after power on, frozen.
    pub fn new(config: HardwareConfig, ram: &Ram) -> Result<Self> {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let low = ram.low_end();
        let mut pci = PciBus::new();
        let disks = crate::plug::plug(&mut pci, &config)?;
        let nics = crate::plug::plug_nics(&mut pci, &config)?;
        let serial = |i| SerialPort { uart: Uart16550::new(), port: Port::new(format!("com{}", i + 1)) };
        Ok(Self {
            stopwatch: Stopwatch::default(),
            serial: (0..config.serial_ports.min(COM_PORTS.len())).map(serial).collect(),
            console: config.console.then(|| Port::new("hvc0".into())),
            disks,
            nics,
            asked: None,
            frozen: true,
            still_since: None,
            armed: None,
            bell: std::sync::Arc::default(),
            uncovered: false,
            gate: Gate::Hold,
            rtc: Rtc::new(since_1970.as_secs(), low, ram.bytes() - low),
            i8042: I8042::new(),
            port92: Port92::new(),
            pm: AcpiPm::new(),
            pci,
            lines: [false; LINES],
        })
    }

    /// All character devices' host sides: serial ports, then the console. A port's index is its place here.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.serial.iter().map(|s| &s.port).chain(&self.console)
    }

    /// As [`Hardware::ports`].
    pub fn ports_mut(&mut self) -> impl Iterator<Item = &mut Port> {
        self.serial.iter_mut().map(|s| &mut s.port).chain(&mut self.console)
    }

    /// The guest accesses a port.
    pub fn io(&mut self, port: u16, write: bool, data: &mut [u8], env: Env) -> Action {
        let now = self.stopwatch.now();
        let ctx = Ctx { now, ram: env.ram };
        let mut access = |device: &mut dyn PioDevice, base: u16| {
            if write {
                device.write(port - base, data, now)
            } else {
                device.read(port - base, data, now);
                Action::None
            }
        };
        let com = |port: u16| COM_PORTS.iter().position(|base| (*base..*base + 8).contains(&port));
        let action = match port {
            p if com(p).is_some_and(|i| i < self.serial.len()) => {
                let i = com(p).unwrap_or(0);
                match self.serial.get_mut(i) {
                    Some(s) => access(&mut s.uart, COM_PORTS[i]),
                    None => Action::None,
                }
            }
            RTC_PORT | 0x71 => access(&mut self.rtc, RTC_PORT),
            I8042_PORT | 0x64 => access(&mut self.i8042, I8042_PORT),
            PORT92 => access(&mut self.port92, PORT92),
            p if (PM_PORT..PM_PORT + 16).contains(&p) => access(&mut self.pm, PM_PORT),
            p if (SMI_CMD_PORT..SMI_CMD_PORT + 2).contains(&p) => {
                if write {
                    self.pm.smi_write(port - SMI_CMD_PORT, data);
                } else {
                    self.pm.smi_read(port - SMI_CMD_PORT, data);
                }
                Action::None
            }
            p if (PCI_CONFIG_PORT..PCI_CONFIG_PORT + 8).contains(&p) => {
                if write {
                    self.pci.io_write(port - PCI_CONFIG_PORT, data, &ctx)
                } else {
                    self.pci.io_read(port - PCI_CONFIG_PORT, data, &ctx);
                    Action::None
                }
            }
            _ => {
                if !write {
                    data.fill(0xff);
                }
                Action::None
            }
        };
        self.work(env);
        action
    }

    /// The guest accesses memory that is not RAM.
    pub fn mmio(&mut self, addr: u64, write: bool, data: &mut [u8], env: Env) -> Action {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        if write {
            self.pci.mmio_write(addr, data, &ctx);
        } else {
            self.pci.mmio_read(addr, data, &ctx);
        }
        self.work(env);
        Action::None
    }

    /// The vCPUs have stopped for a cut: no device may be touched until [`Hardware::thaw`]. VM time goes on.
    pub fn freeze(&mut self) {
        self.frozen = true;
        self.still_since.get_or_insert(self.stopwatch.now());
    }

    /// They are about to run again.
    pub fn thaw(&mut self, env: Env) {
        self.frozen = false;
        if let Some(since) = self.still_since.take() {
            crate::plug::stood_still(&mut self.pci, self.stopwatch.now().since(since));
        }
        self.settle(env);
    }

    /// Time has passed.
    pub fn tick(&mut self, env: Env) -> Action {
        let now = self.stopwatch.now();
        for s in &mut self.serial {
            s.uart.tick(now);
        }
        self.rtc.tick(now);
        self.pm.tick(now);
        let expirations = |h: &Self| h.watchdog_status().map_or(0, |watchdog| watchdog.expirations);
        let before = expirations(self);
        let action = self.pci.tick(&Ctx { now, ram: env.ram });
        if expirations(self) != before {
            self.say_expired(action);
        }
        self.settle(env);
        action
    }

    /// For the log.
    fn say_expired(&self, action: Action) {
        let unfed = self.watchdog_status().and_then(|watchdog| watchdog.fed_ms_ago).unwrap_or(0);
        let follows = match action {
            Action::None => "it is reported",
            Action::Reset => "the machine is reset",
            Action::PowerOff => "the machine is switched off",
        };
        eprintln!("warning: the guest has not fed its watchdog for {:.1} s: {follows}", unfed as f64 / 1e3);
    }

    /// When [`Hardware::tick`] is wanted.
    pub fn deadline(&self) -> Option<VmTime> {
        let serial = self.serial.iter().filter_map(|s| s.uart.deadline());
        serial.chain(self.rtc.deadline()).chain(self.pm.deadline()).chain(self.pci.deadline()).min()
    }

    /// The power button.
    pub fn press_power_button(&mut self, env: Env) {
        self.pm.press_power_button();
        self.settle(env);
    }

    /// Move what came out of the devices: bytes to the streams, input to the UARTs, levels and messages to KVM.
    pub fn settle(&mut self, env: Env) {
        self.work(env);
        self.late_wakes().for_each(|port| port.wake(0));
    }

    /// Ports whose threads are to be woken now that a vCPU's exit is over ([`Nic::late_wake`]).
    pub fn late_wakes(&mut self) -> impl Iterator<Item = Arc<NetPort>> + use<> {
        self.nics.iter_mut().filter_map(Nic::late_wake).collect::<Vec<_>>().into_iter()
    }

    /// What the guest has sent by this card, as far as it is deferred, goes into the gate. False: there is no more now.
    pub fn take_deferred(&mut self, nic: usize, env: Env) -> bool {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        let Some(nic) = self.nics.get_mut(nic) else { return false };
        let some = crate::plug::take_deferred(&mut self.pci, nic, &ctx);
        if some {
            self.settle(env);
        }
        some
    }

    fn work(&mut self, env: Env) {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        for s in &mut self.serial {
            s.settle(ctx.now);
        }
        crate::plug::settle(&mut self.pci, self.console.as_mut(), &self.disks, &ctx);
        crate::plug::settle_nics(&mut self.pci, &mut self.nics, &ctx);
        let waits = |h: &Self| h.ports().any(|p| p.stream.uncovered()) || h.nics.iter().any(|nic| nic.gate.uncovered());
        if self.gate == Gate::Hold && !self.uncovered && waits(self) {
            self.uncovered = true;
            self.bell.ring();
        }
        for (line, level) in self.levels().into_iter().enumerate() {
            if level != self.lines[line] {
                self.lines[line] = level;
                tell_line(env.vm, line, level);
            }
        }
        for msi in self.pci.take_msi() {
            let message = kvm_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                ..Default::default()
            };
            // A message that nobody accepts (the guest masked its LAPIC) is lost on hardware too.
            let _ = env.vm.signal_msi(message);
        }
    }

    fn levels(&self) -> [bool; LINES] {
        let mut levels = [false; LINES];
        for (s, irq) in self.serial.iter().zip(COM_IRQS) {
            levels[irq as usize] |= s.uart.irq_level();
        }
        levels[RTC_IRQ as usize] |= self.rtc.irq_level();
        levels[SCI_IRQ as usize] |= self.pm.irq_level();
        for (level, pci) in levels[devices::pci::INTX_GSI_BASE as usize..].iter_mut().zip(self.pci.intx_levels()) {
            *level |= pci;
        }
        levels
    }

    /// Before a cold boot: empty streams, VM time 0, devices as after power on.
    pub fn cold(&mut self) {
        self.stopwatch.set(VmTime(0));
        for port in self.ports_mut() {
            port.stream = Stream::new();
            port.begin();
        }
        for nic in &mut self.nics {
            nic.begin();
            nic.addresses.forget();
        }
        self.reset();
    }

    /// The machine was reset: devices as after power on; the streams go on.
    pub fn reset(&mut self) {
        let now = self.stopwatch.now();
        for s in &mut self.serial {
            s.uart.reset(now);
        }
        self.rtc.reset(now);
        self.i8042 = I8042::new();
        self.port92 = Port92::new();
        self.pm = AcpiPm::new();
        self.pci.reset();
        crate::plug::forget(&mut self.pci, &self.disks);
        self.asked = None;
        self.lines = [false; LINES];
    }

    /// The disks have these sizes, in sectors. Where a driver is at work it is told of a new one.
    pub fn resize_disks(&mut self, sectors: &[u64], env: Env) {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        for (disk, sectors) in self.disks.iter().zip(sectors) {
            crate::plug::resize(&mut self.pci, disk.place, *sectors, &ctx);
        }
    }

    /// The same of one disk, by its place among the disks.
    pub fn resize_disk(&mut self, disk: usize, sectors: u64, env: Env) {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        if let Some(disk) = self.disks.get(disk) {
            crate::plug::resize(&mut self.pci, disk.place, sectors, &ctx);
        }
    }

    /// What a CD-ROM drive is like now.
    pub fn drive(&self, name: &str) -> Option<&Unit> {
        crate::plug::units(&self.pci).iter().find(|unit| unit.name() == name && unit.tray().is_some())
    }

    /// What lies in a CD-ROM drive before the machine begins to run: nobody is told.
    pub fn load_medium(&mut self, drive: &str, medium: Option<Medium>) {
        if let Some(unit) = crate::plug::units(&self.pci).iter().position(|unit| unit.name() == drive)
            && let Some(device) = crate::plug::controller(&mut self.pci)
        {
            device.load_medium(unit, medium);
        }
    }

    /// Somebody takes a medium out of a drive, or puts one in. The guest is told.
    pub fn change_medium(&mut self, drive: &str, medium: Option<Medium>, force: bool, env: Env) -> Result<(), Refused> {
        let ctx = Ctx { now: self.stopwatch.now(), ram: env.ram };
        let unit = crate::plug::units(&self.pci).iter().position(|unit| unit.name() == drive);
        match (unit, crate::plug::controller(&mut self.pci)) {
            (Some(unit), Some(device)) => device.change_medium(unit, medium, force, &ctx),
            _ => Err(Refused::NoDrive),
        }
    }

    /// A direct kernel boot follows: what firmware would have set up.
    pub fn as_firmware_leaves_it(&mut self) -> Result<()> {
        let window = crate::acpi::PCI_WINDOW;
        self.pci
            .assign_bars(u64::from(window.start)..u64::from(window.end))
            .context("the PCI devices do not fit into their memory window")
    }

    /// Everything, for a checkpoint. The devices are frozen.
    pub fn save(&self) -> Result<Vec<Payload>> {
        // `stopwatch` goes with the clock; `gate`, `bell` and `uncovered` belong to the session; `lines` follow from the devices; `pci` has its own payloads.
        let Self {
            stopwatch: _,
            serial,
            console: _,
            nics,     // a packet may be lost; what the guest has set is in its device's state
            disks: _, // a request is in its device's state until it is done
            asked,
            frozen: _,
            still_since: _, // the state is that of the instant since when
            armed: _,
            bell: _,
            uncovered: _,
            gate: _,
            rtc,
            i8042,
            port92,
            pm,
            pci,
            lines: _,
        } = self;
        let streams = state::V1 { ports: self.ports().map(|p| p.stream.save()).collect(), asked: *asked };
        let mut payloads = vec![crate::container::payload(KIND, "all", VERSION, &streams)?];
        payloads.extend(serial.iter().map(|s| Payload::of(&s.uart, &s.port.name)));
        payloads.push(Payload::of(rtc, "rtc"));
        payloads.push(Payload::of(i8042, "i8042"));
        payloads.push(Payload::of(port92, "port92"));
        payloads.push(Payload::of(pm, "pm"));
        payloads.extend(nics.iter().map(|nic| Payload::of(&nic.addresses, &nic.slot.to_string())));
        payloads.extend(pci.save_payloads());
        Ok(payloads)
    }

    /// Become what was saved; frozen. The interrupt controllers are restored apart (KVM's state has them).
    pub fn restore(&mut self, from: &mut Payloads) -> Result<()> {
        let saved: state::V1 = crate::container::take(from, KIND, "all", VERSION)?;
        let here = self.ports().count();
        anyhow::ensure!(
            saved.ports.len() == here,
            "the saved machine has {} serial ports and consoles, this one has {here}: give both the same --serial and --console options",
            saved.ports.len(),
        );
        for (port, stream) in self.ports_mut().zip(saved.ports) {
            port.stream = Stream::restore(stream).with_context(|| format!("port {}", port.name))?;
            port.begin();
        }
        for nic in &mut self.nics {
            nic.begin();
            from.restore(&mut nic.addresses, &nic.slot.to_string())?;
        }
        for s in &mut self.serial {
            from.restore(&mut s.uart, &s.port.name)?;
        }
        self.asked = saved.asked;
        from.restore(&mut self.rtc, "rtc")?;
        from.restore(&mut self.i8042, "i8042")?;
        from.restore(&mut self.port92, "port92")?;
        from.restore(&mut self.pm, "pm")?;
        self.pci.restore_payloads(from)?;
        Ok(())
    }

    /// KVM's interrupt controllers were loaded: tell it again which lines are high. (It keeps a line's level apart from the
    /// controllers' registers and does not save it; a line that was high makes no new edge, because the registers remember it.)
    pub fn assert_lines(&mut self, vm: &VmFd) {
        self.lines = self.levels();
        for (line, level) in self.lines.iter().enumerate() {
            if *level {
                tell_line(vm, line, true);
            }
        }
    }

    /// The gate of all outputs.
    pub fn gate(&self) -> Gate {
        self.gate
    }

    /// Close or open it.
    pub fn set_gate(&mut self, gate: Gate) {
        self.gate = gate;
        for port in self.ports_mut() {
            match gate {
                Gate::Hold => port.stream.hold(),
                Gate::Open => port.stream.open(),
            }
            port.tell_pump();
        }
        self.nics.iter_mut().for_each(|nic| nic.set_gate(gate));
    }

    /// The network cards are configured so, with these ports.
    pub fn connect_nics(&mut self, machine: &str, specs: &[NicSpec], ports: Vec<Arc<NetPort>>) {
        for ((nic, spec), port) in self.nics.iter_mut().zip(specs).zip(ports) {
            nic.connect(spec, spec.address(machine), port);
        }
    }

    /// The machine goes on here from another node's image: drivers that announce addresses themselves are asked to.
    pub fn ask_to_announce(&mut self) {
        for nic in &self.nics {
            crate::plug::ask_to_announce(&mut self.pci, nic.slot);
        }
    }

    /// No packet leaves any more: the machine does not run here. What was released still does if it can at once (`polite`).
    pub fn silence_nics(&mut self, polite: bool) {
        self.nics.iter_mut().for_each(|nic| nic.silence(polite));
    }

    /// The watchdog, for the status.
    pub fn watchdog_status(&self) -> Option<WatchdogStatus> {
        crate::plug::watchdog(&self.pci).map(|watchdog| watchdog.status(self.stopwatch.now()))
    }

    /// The network cards, for the status.
    pub fn nics_status(&self, specs: &[NicSpec], machine: &str) -> Vec<NicStatus> {
        let one = |(nic, spec): (&Nic, &NicSpec)| nic.status(spec, machine, crate::plug::card(&self.pci, nic.slot));
        self.nics.iter().zip(specs).map(one).collect()
    }

    /// A cut: what was written until now is covered by the checkpoint of `epoch`.
    pub fn seal(&mut self, epoch: Epoch) {
        self.ports_mut().for_each(|p| p.stream.seal(epoch));
        self.nics.iter_mut().for_each(|nic| nic.gate.seal(epoch));
        self.uncovered = false;
    }

    /// That checkpoint is committed.
    pub fn commit(&mut self, epoch: Epoch) {
        for port in self.ports_mut() {
            port.stream.commit(epoch);
            port.tell_pump();
        }
        self.nics.iter_mut().for_each(|nic| nic.commit(epoch));
    }

    /// The session is gone: its cuts will never be committed.
    pub fn unseal(&mut self) {
        self.ports_mut().for_each(|p| p.stream.unseal());
        self.nics.iter_mut().for_each(|nic| nic.gate.unseal());
        self.uncovered = false;
    }
}

fn tell_line(vm: &VmFd, line: usize, level: bool) {
    // Cannot fail with an in-kernel irqchip and a line below 24; there is nothing that the guest or we could do.
    if let Err(e) = vm.set_irq_line(line as u32, level) {
        eprintln!("warning: KVM refuses interrupt line {line}: {e}");
    }
}
