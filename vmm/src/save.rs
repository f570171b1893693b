//! A saved machine on disk: `state` (see [`crate::container`]) and `ram`, a sparse copy of the RAM file.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::memory::{PAGE, Ram};

/// Name of the device state in a saved machine's directory.
pub const STATE: &str = "state";
/// Name of the RAM copy.
pub const RAM: &str = "ram";

/// Write both, RAM first, each under a temporary name until it is whole.
pub fn write(ram: &Ram, state: &[u8], dir: &Path) -> Result<()> {
    publish(dir, RAM, |file| {
        let mut page = vec![0; 256 * PAGE];
        let mut at = 0;
        while at < ram.bytes() {
            // RAM is a whole number of MiB.
            ram.read_file_offset(at, &mut page)?;
            if page.iter().any(|b| *b != 0) {
                file.seek(SeekFrom::Start(at))?;
                file.write_all(&page)?;
            }
            at += page.len() as u64;
        }
        file.set_len(ram.bytes())?;
        Ok(())
    })?;
    publish(dir, STATE, |file| Ok(file.write_all(state)?))
}

fn publish(dir: &Path, name: &str, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let temporary = dir.join(format!(".{name}.new"));
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(|| format!("cannot create {}", temporary.display()))?;
    let result = fill(&mut file).and_then(|()| Ok(file.sync_all()?));
    if let Err(e) = result {
        let _ = std::fs::remove_file(&temporary);
        return Err(e.context(format!("cannot write {} (is the disk full?)", dir.join(name).display())));
    }
    std::fs::rename(&temporary, dir.join(name)).with_context(|| format!("cannot name {}", dir.join(name).display()))
}

/// Copy a saved machine's RAM into a standby's RAM file.
pub fn restore_ram(dir: &Path, ram_file: &Path) -> Result<()> {
    let mut from = File::open(dir.join(RAM)).with_context(|| format!("{} is no saved machine", dir.display()))?;
    let mut to = OpenOptions::new()
        .write(true)
        .open(ram_file)
        .with_context(|| format!("there is no standby with RAM in {}", ram_file.display()))?;
    let (have, want) = (from.metadata()?.len(), to.metadata()?.len());
    ensure!(have == want, "the saved machine has {} MiB of RAM, the standby {}", have >> 20, want >> 20);
    std::io::copy(&mut from, &mut to).with_context(|| format!("cannot copy RAM to {}", ram_file.display()))?;
    Ok(())
}
