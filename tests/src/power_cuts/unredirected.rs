//! The negative control: what a takeover would find had the machine's writes gone to its disk itself. The guest must see it, or the power
//! cuts prove nothing about disks.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use understudy_disk::record::{Kind, SliceId, scan};
use understudy_disk::slice::SliceName;
use understudy_disk::{Directory, LocalDirectory, Ownership, SECTOR, Tag};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_vmm::container;

/// Everything that any slice has is in the disk, committed or not, and the saved state says so.
pub fn forget_redirection(disk: &Path, slices: &Path, state: &Path) -> Result<()> {
    let directory = LocalDirectory::look(slices).context("looking at the slices")?;
    let owner = Ownership::load(&directory)?.context("the disk has no owner")?;
    let names = directory.list().context("listing the slices")?;
    let named = names.iter().filter_map(|name| Some((SliceName::parse(name)?, name)));
    let base = OpenOptions::new().write(true).open(disk).context("opening the disk")?;
    for (slice, name) in named.map(|(slice, name)| (slice.serial, (slice, name))).collect::<BTreeMap<_, _>>().values() {
        let id = SliceId { disk: owner.disk, generation: slice.generation, epoch: slice.epoch, serial: slice.serial };
        let file = directory.open(name).context("opening a slice")?;
        for (record, at) in scan(&*file, id).context("reading a slice")?.records {
            if record.kind == Kind::Data {
                let mut bytes = vec![0; usize::try_from(record.data_len())?];
                file.read_at(at, &mut bytes).context("reading a slice")?;
                base.write_all_at(&bytes, record.sector * SECTOR).context("writing the disk")?;
            }
        }
    }
    fs::remove_dir_all(slices).context("removing the slices")?;

    let mut payloads = container::decode(&fs::read(state).context("reading the saved state")?)?.into_vec();
    let disks = payloads.iter_mut().find(|payload| payload.kind == "disks").context("the saved state has no disks")?;
    let never = Tag { serial: 0, generation: Generation::ZERO, epoch: Epoch::ZERO, records: 0, digest: 0 };
    disks.bytes = postcard::to_allocvec(&vec![("vda", never)]).context("writing the tags")?;
    fs::write(state, container::encode(&payloads)).context("writing the saved state")
}
