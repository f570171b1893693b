//! What is plugged into the PCI bus: an entropy device, a console if the machine has one, its disks.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use anyhow::{Context, Result};
use understudy_protocol::control::DiskShape;

use crate::devices::Ctx;
use crate::devices::pci::PciBus;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::{Block, VirtioPci};
use crate::port::Port;
use crate::storage::lane::Lane;

const RNG_SLOT: u8 = 1;
const CONSOLE_SLOT: u8 = 2;
/// The first disk's; the others follow.
const DISK_SLOT: u8 = 3;
/// Rounds of work for a device in one settling; what is left comes with the next access or tick.
const ROUNDS: usize = 16;

/// Plug the machine's PCI devices.
pub fn plug(pci: &mut PciBus, console: bool, disks: &[DiskShape]) -> Result<()> {
    pci.add(RNG_SLOT, Box::new(VirtioPci::new(Rng::new()))).context("plugging the entropy device")?;
    if console {
        pci.add(CONSOLE_SLOT, Box::new(VirtioPci::new(Console::new()))).context("plugging the console")?;
    }
    for (slot, disk) in (DISK_SLOT..).zip(disks) {
        let device = Block::new(disk.queues, disk.read_only, &disk.name);
        pci.add(slot, Box::new(VirtioPci::new(device))).with_context(|| format!("plugging the disk {}", disk.name))?;
    }
    Ok(())
}

/// Give the devices what they ask for and take their outputs.
pub fn settle(pci: &mut PciBus, console: Option<&mut Port>, disks: &[Arc<Lane>], ctx: &Ctx) {
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
    for (slot, lane) in (DISK_SLOT..).zip(disks) {
        let Some(device) = pci.get_mut::<VirtioPci<Block>>(slot) else { continue };
        for _ in 0..ROUNDS {
            let requests = device.take_requests(ctx);
            let done = lane.exchange(device.life(), requests);
            if done.is_empty() {
                break;
            }
            device.complete(done, ctx);
        }
    }
}

/// The devices were reset: what is under way for them is of no use any more. RAM may be written over after this.
pub fn forget(pci: &mut PciBus, disks: &[Arc<Lane>]) {
    for (slot, lane) in (DISK_SLOT..).zip(disks) {
        if let Some(device) = pci.get_mut::<VirtioPci<Block>>(slot) {
            lane.exchange(device.life(), Vec::new());
        }
    }
}

/// A disk has so many sectors.
pub fn resize(pci: &mut PciBus, disk: u8, sectors: u64) {
    if let Some(device) = pci.get_mut::<VirtioPci<Block>>(DISK_SLOT.saturating_add(disk)) {
        device.set_sectors(sectors);
    }
}

fn entropy(n: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
