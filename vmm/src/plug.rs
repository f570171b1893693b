//! What is plugged into the PCI bus: an entropy device, a console if the machine has one, its disks, its network cards, a SCSI
//! controller if a disk or a drive needs it, and a watchdog if the machine has one.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, Result};
use understudy_protocol::control::NicShape;
use understudy_protocol::disk::DiskBus;
use understudy_protocol::watchdog::WatchdogModel;

use crate::devices::Ctx;
use crate::devices::i6300esb::I6300esb;
use crate::devices::pci::PciBus;
use crate::devices::scsi::Unit;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::net::{Net, NetConfig};
use crate::devices::virtio::requests::Disks;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::{Block, Scsi, VirtioPci};
use crate::hardware::HardwareConfig;
use crate::net::nic::Nic;
use crate::port::Port;
use crate::storage::lane::Lane;

const RNG_SLOT: u8 = 1;
const CONSOLE_SLOT: u8 = 2;
/// The first disk's; the others follow.
const DISK_SLOT: u8 = 3;
/// The SCSI controller's.
const SCSI_SLOT: u8 = 16;
/// The first network card's; the others follow.
const NIC_SLOT: u8 = 17;
/// The watchdog's: the last one, out of everybody's way.
const WATCHDOG_SLOT: u8 = 31;
/// Rounds of work for a device in one settling; what is left comes with the next access or tick.
const ROUNDS: usize = 16;

/// Where a disk or a drive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A device of its own, in this slot.
    Block(u8),
    /// This target of the SCSI controller.
    Scsi(usize),
}

/// A disk or a drive, and the way to what is behind it.
#[derive(Debug)]
pub struct Plugged {
    /// Where.
    pub place: Place,
    /// Requests go, outcomes come.
    pub lane: Arc<Lane>,
}

/// Plug the machine's PCI devices. Returns its disks, then its drives.
pub fn plug(pci: &mut PciBus, config: &HardwareConfig) -> Result<Vec<Plugged>> {
    pci.add(RNG_SLOT, Box::new(VirtioPci::new(Rng::new()))).context("plugging the entropy device")?;
    if config.console {
        pci.add(CONSOLE_SLOT, Box::new(VirtioPci::new(Console::new()))).context("plugging the console")?;
    }
    let (mut plugged, mut units, mut slots, mut queues) = (Vec::new(), Vec::new(), DISK_SLOT.., config.scsi_queues);
    for disk in &config.disks {
        let place = match disk.bus {
            DiskBus::Virtio => {
                let slot = slots.next().context("too many disks")?;
                let device = Block::new(disk.queues, disk.read_only, &disk.name);
                pci.add(slot, Box::new(VirtioPci::new(device)))
                    .with_context(|| format!("plugging the disk {}", disk.name))?;
                Place::Block(slot)
            }
            DiskBus::Scsi => {
                units.push(Unit::disk(&disk.name, disk.read_only));
                queues = disk.queues;
                Place::Scsi(units.len() - 1)
            }
        };
        plugged.push(Plugged { place, lane: Arc::new(Lane::new(&disk.name)) });
    }
    for drive in &config.cdroms {
        units.push(Unit::cdrom(&drive.name));
        plugged.push(Plugged { place: Place::Scsi(units.len() - 1), lane: Arc::new(Lane::new(&drive.name)) });
    }
    if !units.is_empty() {
        pci.add(SCSI_SLOT, Box::new(VirtioPci::new(Scsi::new(queues, units))))
            .context("plugging the SCSI controller")?;
    }
    if let Some(spec) = config.watchdog {
        match spec.model {
            WatchdogModel::I6300esb => pci.add(WATCHDOG_SLOT, Box::new(I6300esb::new(spec))),
        }
        .context("plugging the watchdog")?;
    }
    Ok(plugged)
}

/// The watchdog, if there is one.
pub fn watchdog(pci: &PciBus) -> Option<&I6300esb> {
    pci.get(WATCHDOG_SLOT)
}

/// The vCPUs did not run for `ns` nanoseconds of VM time.
pub fn stood_still(pci: &mut PciBus, ns: u64) {
    if let Some(watchdog) = pci.get_mut::<I6300esb>(WATCHDOG_SLOT) {
        watchdog.stood_still(ns);
    }
}

/// Plug the machine's network cards.
pub fn plug_nics(pci: &mut PciBus, config: &HardwareConfig) -> Result<Vec<Nic>> {
    let plug = |(slot, nic): (u8, &NicShape)| {
        let config = NetConfig { mac: nic.mac, pairs: nic.queues, offloads: nic.offloads, mtu: nic.mtu };
        pci.add(slot, Box::new(VirtioPci::new(Net::new(config))))
            .with_context(|| format!("plugging the network card {}", nic.name))?;
        Ok(Nic::new(slot))
    };
    (NIC_SLOT..).zip(&config.nics).map(plug).collect()
}

/// As [`settle`], of the network cards.
pub fn settle_nics(pci: &mut PciBus, nics: &mut [Nic], ctx: &Ctx) {
    for nic in nics {
        if let Some(device) = pci.get_mut::<VirtioPci<Net>>(nic.slot) {
            nic.settle(device, ctx);
        }
    }
}

/// A card's worker takes what the guest has sent. False: there is no more now.
pub fn take_deferred(pci: &mut PciBus, nic: &mut Nic, ctx: &Ctx) -> bool {
    pci.get_mut::<VirtioPci<Net>>(nic.slot).is_some_and(|device| nic.take_deferred(device, ctx))
}

/// The device of a network card.
pub fn card(pci: &PciBus, slot: u8) -> Option<&VirtioPci<Net>> {
    pci.get(slot)
}

/// Give the devices what they ask for and take their outputs.
pub fn settle(pci: &mut PciBus, console: Option<&mut Port>, disks: &[Plugged], ctx: &Ctx) {
    if let Some(rng) = pci.get_mut::<VirtioPci<Rng>>(RNG_SLOT) {
        for _ in 0..ROUNDS {
            match rng.want_entropy() {
                0 => break,
                n => match entropy(n) {
                    Ok(bytes) => rng.fill(&bytes, ctx),
                    // The guest waits, and asks again with its next access.
                    Err(_) => break,
                },
            }
        }
    }
    if let (Some(device), Some(port)) = (pci.get_mut::<VirtioPci<Console>>(CONSOLE_SLOT), console) {
        for _ in 0..ROUNDS {
            device.set_output_room(port.stream.room(), ctx);
            let out = device.take_output();
            if out.is_empty() {
                break;
            }
            port.stream.write(&out);
        }
        port.feed(|bytes| device.receive(bytes, ctx));
        port.tell_pump();
    }
    for disk in disks {
        match disk.place {
            Place::Block(slot) => exchange(pci.get_mut::<VirtioPci<Block>>(slot), 0, &disk.lane, ctx),
            Place::Scsi(unit) => exchange(controller(pci), unit, &disk.lane, ctx),
        }
    }
}

/// What a disk or drive asks for goes, what was done comes.
fn exchange<D: Disks>(device: Option<&mut VirtioPci<D>>, unit: usize, lane: &Lane, ctx: &Ctx) {
    let Some(device) = device else { return };
    for _ in 0..ROUNDS {
        let requests = device.take_requests_of(unit, ctx);
        let done = lane.exchange(device.life(), requests);
        if done.is_empty() {
            break;
        }
        device.complete(done, ctx);
    }
}

/// The driver of the card in this slot is asked to tell the network where the guest is, if it has agreed to that.
pub fn ask_to_announce(pci: &mut PciBus, slot: u8) {
    if let Some(device) = pci.get_mut::<VirtioPci<Net>>(slot) {
        device.ask_to_announce();
    }
}

/// The SCSI controller, if there is one.
pub fn controller(pci: &mut PciBus) -> Option<&mut VirtioPci<Scsi>> {
    pci.get_mut(SCSI_SLOT)
}

/// The SCSI controller's disks and drives.
pub fn units(pci: &PciBus) -> &[Unit] {
    pci.get::<VirtioPci<Scsi>>(SCSI_SLOT).map_or(&[], |device| device.device().units())
}

/// The devices were reset: what is under way for them is of no use any more. RAM may be written over after this.
pub fn forget(pci: &mut PciBus, disks: &[Plugged]) {
    for disk in disks {
        let life = match disk.place {
            Place::Block(slot) => pci.get::<VirtioPci<Block>>(slot).map(VirtioPci::life),
            Place::Scsi(_) => pci.get::<VirtioPci<Scsi>>(SCSI_SLOT).map(VirtioPci::life),
        };
        if let Some(life) = life {
            disk.lane.exchange(life, Vec::new());
        }
    }
}

/// A disk has so many sectors.
pub fn resize(pci: &mut PciBus, disk: Place, sectors: u64, ctx: &Ctx) {
    match disk {
        Place::Block(slot) => {
            if let Some(device) = pci.get_mut::<VirtioPci<Block>>(slot) {
                device.set_sectors(sectors);
            }
        }
        Place::Scsi(unit) => {
            if let Some(device) = controller(pci) {
                device.set_sectors(unit, sectors, ctx);
            }
        }
    }
}

fn entropy(n: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
