//! A machine's disks and drives over its life: opened when it begins to run, changed by whoever looks after it while it runs.

use super::*;
use crate::devices::scsi::Refused;
use crate::storage::media::{Disc, Found, saved};

/// What was opened, for the devices.
#[derive(Default)]
pub(super) struct Opened {
    /// Sizes of the disks.
    sectors: Vec<u64>,
    drives: Vec<(String, Found)>,
}

impl Machine {
    /// Open disks and drives, to go on from this image or to boot.
    pub(super) fn open_disks(&self, generation: Generation, image: Option<&[u8]>) -> Result<Opened> {
        let (mut tags, mut held) = (None, None);
        if let Some(bytes) = image {
            let mut payloads = container::decode(bytes)?;
            tags = self.storage.tags(&mut payloads)?;
            held = Some(saved(&payloads.into_vec())?);
        }
        let sectors = self.storage.open(&self.core, generation, tags.as_ref())?;
        Ok(Opened { sectors, drives: self.drives.open(&self.core, held.as_deref())? })
    }

    pub(super) fn let_go_of_disks(&self) {
        self.storage.let_go();
        self.drives.let_go();
    }

    /// Let the devices know; before the machine runs.
    pub(super) fn show(&self, hardware: &mut Hardware, opened: Opened) {
        let Opened { sectors, drives } = opened;
        hardware.resize_disks(&sectors, self.core.env());
        for (name, found) in drives {
            match found {
                Found::There(medium) => hardware.load_medium(&name, medium),
                // Nobody can hold it there.
                Found::Lost => _ = hardware.change_medium(&name, None, true, self.core.env()),
            }
        }
    }

    /// Enlarge a disk while the machine runs; the guest is told.
    pub fn resize_disk(&self, name: &str, bytes: u64) -> Result<()> {
        // Storage can be slow: not under the life lock.
        let (disk, sectors) = self.storage.resize(&self.core, name, bytes)?;
        let life = self.quiet_life()?;
        ensure!(
            life.state == VmmState::Running,
            "the disk is larger now, but the machine is {}: its guest learns of it when the machine runs again and the disk is resized once more",
            super::name(life.state)
        );
        self.core.hardware().resize_disk(disk, sectors, self.core.env());
        drop(life);
        self.core.settle();
        Ok(())
    }

    /// Put a medium into a drive, instead of what lies in it.
    pub fn insert(&self, drive: &str, file: &str, force: bool) -> Result<()> {
        self.drives.find(drive)?;
        let disc = Disc::open(file)?;
        self.change_medium(drive, Some(disc), force)
    }

    /// Take out what lies in a drive.
    pub fn eject(&self, drive: &str, force: bool) -> Result<()> {
        self.drives.find(drive)?;
        self.change_medium(drive, None, force)
    }

    fn change_medium(&self, drive: &str, disc: Option<Disc>, force: bool) -> Result<()> {
        let life = self.quiet_life()?;
        ensure!(
            life.state == VmmState::Running,
            "nothing can be done at the drive {drive}: the machine is {}",
            super::name(life.state)
        );
        let medium = disc.as_ref().map(|disc| disc.medium().clone());
        let mut hardware = self.core.hardware();
        let changed = hardware.change_medium(drive, medium, force, self.core.env());
        if changed.is_ok() {
            // Under the same lock: no read of the one is answered from the other.
            self.drives.put(drive, disc);
        }
        drop(hardware);
        drop(life);
        self.core.settle();
        match changed {
            Ok(()) => Ok(()),
            Err(Refused::Locked) => bail!(
                "the guest has locked the drive {drive}, as it does while the medium is mounted; it was asked to let it go: \
                 try again in a moment, unmount it in the guest, or take it out with --force"
            ),
            Err(Refused::NoDrive) => bail!("this machine has no drive {drive:?}"),
        }
    }
}
