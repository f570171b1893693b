//! Mirrored disks compared with their copies while both are in use: the VMM's part, a step at a time. What must hold is said in
//! `understudy_disk::mirror::verify`; who drives it is the replicator.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use understudy_disk::mirror::{Content, Verify};
use understudy_protocol::control::{DiskCompared, DiskQuestion, DiskVerifyStep};

use super::Storage;

/// One comparison, of all mirrored disks. It ends when this is dropped.
#[derive(Default)]
pub struct DiskVerify {
    all: Vec<(String, Verify)>,
}

impl DiskVerify {
    /// Do a step; its reply.
    pub fn step(&mut self, storage: &Storage, step: DiskVerifyStep) -> Result<Value> {
        let (DiskVerifyStep::Pin { disk }
        | DiskVerifyStep::PinAt { disk, .. }
        | DiskVerifyStep::Ask { disk }
        | DiskVerifyStep::Result { disk, .. }
        | DiskVerifyStep::Unpin { disk }
        | DiskVerifyStep::Compared { disk }) = step
        else {
            return self.begin(storage);
        };
        let (name, verify) = self.all.get_mut(usize::from(disk)).context("there is no comparison of that disk")?;
        let name = name.clone();
        one(verify, step).with_context(|| format!("disk {name}"))
    }

    fn begin(&mut self, storage: &Storage) -> Result<Value> {
        self.all.clear();
        let disks = storage.mirrored_disks();
        let sizes: Vec<(String, u64)> =
            disks.iter().map(|(name, disk)| (name.clone(), understudy_disk::Block::size(&**disk))).collect();
        for (name, disk) in disks {
            let verify = disk.verify().with_context(|| format!("disk {name}"))?;
            self.all.push((name, verify));
        }
        Ok(serde_json::to_value(sizes)?)
    }
}

fn one(verify: &mut Verify, step: DiskVerifyStep) -> Result<Value> {
    Ok(match step {
        DiskVerifyStep::Begin => Value::Null,
        DiskVerifyStep::Pin { .. } => serde_json::to_value(verify.pin()?)?,
        DiskVerifyStep::PinAt { tag, .. } => {
            let tag = serde_json::from_value(tag).context("the copy's state is not understood")?;
            serde_json::to_value(verify.pin_at(tag)?)?
        }
        DiskVerifyStep::Ask { .. } => match verify.ask()? {
            None => Value::Null,
            Some(item) => {
                let Content::Hash(hash) = item.content else { bail!("there is a question without a hash") };
                serde_json::to_value(DiskQuestion { number: item.number, at: item.at, len: item.len, hash })?
            }
        },
        DiskVerifyStep::Result { number, same, .. } => serde_json::to_value(verify.result(number, same)?)?,
        DiskVerifyStep::Unpin { .. } => serde_json::to_value(verify.unpin())?,
        DiskVerifyStep::Compared { .. } => {
            let checked = verify.checked();
            let ranges = checked.ranges.iter().map(|range| (range.at, range.len)).collect();
            serde_json::to_value(DiskCompared { done: checked.done, differing: checked.differing, ranges })?
        }
    })
}
