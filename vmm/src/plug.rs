//! What is plugged into the PCI bus: an entropy device, and a console if the machine has one.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result};

use crate::devices::Ctx;
use crate::devices::pci::PciBus;
use crate::devices::virtio::VirtioPci;
use crate::devices::virtio::console::Console;
use crate::devices::virtio::rng::Rng;
use crate::port::Port;

const RNG_SLOT: u8 = 1;
const CONSOLE_SLOT: u8 = 2;
/// Rounds of work for a device in one settling; what is left comes with the next access or tick.
const ROUNDS: usize = 16;

/// Plug the machine's PCI devices.
pub fn plug(pci: &mut PciBus, console: bool) -> Result<()> {
    pci.add(RNG_SLOT, Box::new(VirtioPci::new(Rng::new()))).context("plugging the entropy device")?;
    if console {
        pci.add(CONSOLE_SLOT, Box::new(VirtioPci::new(Console::new()))).context("plugging the console")?;
    }
    Ok(())
}

/// Give the devices what they ask for and take their outputs.
pub fn settle(pci: &mut PciBus, console: Option<&mut Port>, ctx: &Ctx) {
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
}

fn entropy(n: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
