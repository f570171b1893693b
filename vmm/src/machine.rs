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
use understudy_protocol::cdrom::{CdromSpec, check_list as check_cdroms};
use understudy_protocol::control::{Gate, MachineShape, PromoteFrom, SerialStatus, VcpuPosition, VmmState, VmmStatus};
use understudy_protocol::disk::DiskSpec;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::nic::{self, NicSpec};
use understudy_protocol::watchdog::WatchdogSpec;

use crate::acpi::{self, Platform};
use crate::backend::{BackendConfig, Start};
use crate::boot::{self, Entry, LinuxBoot};
use crate::capture::{Record, calibrate};
use crate::clock;
use crate::container;
use crate::core::{Core, Event};
use crate::cpuid;
use crate::devices::{Payload, VmTime};
use crate::hardware::{Asked, Hardware, HardwareConfig};
use crate::memory::Ram;
use crate::net;
use crate::net::worker::Workers;
use crate::pump::Pump;
use crate::routing;
use crate::storage::media::Drives;
use crate::storage::{self, Storage};
use crate::vcpu_state::{self, Abilities};
use crate::vcpus::Vcpus;
use crate::vm_state;

mod build;
mod disks;
mod end;
mod start;
mod stop;

pub use stop::RawState;

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
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// Its CD-ROM drives.
    pub cdroms: Vec<CdromSpec>,
    /// Its network cards.
    pub nics: Vec<NicSpec>,
    /// Its watchdog, if it has one.
    pub watchdog: Option<WatchdogSpec>,
    /// This node's name: the disks' owner records have it.
    pub node: String,
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
    /// The threads of its network cards.
    nic_workers: Mutex<Vec<Workers>>,
    /// Its disks.
    pub storage: Storage,
    /// Its CD-ROM drives.
    drives: Drives,
    kvm_backend: String,
    /// How checkpoints are captured.
    capture: Mutex<Record>,
}

impl Machine {
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
        let disks = self.storage.status();
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
            capture: {
                let mut capture = self.capturing().status(self.core.cannot_lock.get().map(String::as_str));
                capture.throttle_percent = self.vcpus.share();
                capture
            },
            disks,
            cdroms: self.drives.status(|name| hardware.drive(name).cloned()),
            nics: hardware.nics_status(&self.config.nics, &self.config.name),
            watchdog: hardware.watchdog_status(),
        }
    }

    /// What another machine must agree in to run from this one's image.
    pub fn shape(&self) -> MachineShape {
        MachineShape {
            memory_mib: self.config.memory_mib,
            vcpus: self.config.vcpus,
            serial_ports: self.config.serial.len() as u32,
            console: self.config.console.is_some(),
            disks: storage::shapes(&self.config.disks, self.config.vcpus),
            cdroms: storage::media::shapes(&self.config.cdroms),
            nics: net::shapes(&self.config.name, &self.config.nics),
            watchdog: self.config.watchdog.map(|watchdog| watchdog.model),
        }
    }

    /// How checkpoints are captured.
    pub fn capturing(&self) -> MutexGuard<'_, Record> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Find out what capturing costs on this host, once.
    pub fn calibrate(&self) {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| match calibrate::measure(&self.config.ram_file.with_extension("calibrate")) {
            Ok(costs) => self.capturing().costs = costs,
            Err(e) => eprintln!("note: the costs of capturing could not be measured in advance: {e:#}"),
        });
    }

    /// MSRs that the host refused so far.
    pub fn refused_msrs(&self) -> Vec<u32> {
        self.can.refused()
    }
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
