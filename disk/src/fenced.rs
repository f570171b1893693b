//! A base on a device that has persistent reservations, reserved for one owner of the disk.
//!
//! What the device refuses may have been taken away by a successor, or only forgotten by the device. [`Fence::again`] finds out which, and the request is made once
//! more or never again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{Block, Ended, Guard, How, Op};
use crate::error::{Error, Result};
use crate::owner::{Identity, Ownership};
use crate::reservation::{Fence, Key, Reservations};
use crate::store::Directory;

pub(crate) struct Fenced {
    inner: Arc<dyn Block>,
    fence: Arc<Fence>,
    renew: Guard,
    /// A request that was begun was refused: find out why, with the blocking calls.
    suspect: Arc<AtomicBool>,
}

/// Reserve the device that the base is on, if it is on one. The disk is `me`'s by its record. Returns the base to use from now on, and a sentence for the status.
pub(crate) fn fence(
    base: Arc<dyn Block>,
    dir: &Arc<dyn Directory>,
    me: &Identity,
) -> Result<(Arc<dyn Block>, Option<String>)> {
    let Some(device) = base.reservations() else {
        let only = "it has no persistent reservations: against writes that arrive late only fencing protects";
        let said = base.shared_device().then(|| only.to_owned());
        return Ok((base, said));
    };
    let key = Key::of(&me.machine, &me.node, me.generation);
    let fence = Arc::new(Fence::take(device, base.name(), key)?);
    let lasts = if fence.persistent() {
        "it survives a power loss of the device"
    } else {
        "not beyond a power loss of the device"
    };
    let said = format!("persistent reservation, key {}, {lasts}", fence.key());
    let (theirs, dir, me, name) = (fence.clone(), dir.clone(), me.clone(), base.name().to_owned());
    let one_at_a_time = Mutex::new(());
    let renew: Guard = Arc::new(move || {
        let _alone = one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        theirs.again(|| still_ours(&*dir, &me, &name))
    });
    base.guard(renew.clone());
    let fenced = Fenced { inner: base, fence, renew, suspect: Arc::default() };
    Ok((Arc::new(fenced), Some(said)))
}

fn still_ours(dir: &dyn Directory, me: &Identity, name: &str) -> Result<()> {
    match Ownership::load(dir)? {
        Some(owner) if owner.machine == me.machine && owner.node == me.node && owner.generation == me.generation => {
            Ok(())
        }
        Some(owner) => Err(Error::Superseded {
            disk: name.to_owned(),
            node: owner.node,
            theirs: owner.generation,
            ours: me.generation,
        }),
        None => Err(Error::Corrupt { what: format!("the record of whose disk it is in {} is gone", dir.name()) }),
    }
}

impl Fenced {
    fn again<T>(&self, request: impl Fn() -> Result<T>) -> Result<T> {
        match request() {
            Err(Error::Preempted { .. }) => {}
            other => return other,
        }
        (self.renew)()?;
        self.suspect.store(false, Ordering::Release);
        request()
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        self.fence.withdraw();
    }
}

impl Block for Fenced {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn read_only(&self) -> bool {
        self.inner.read_only()
    }
    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        // Reads are not refused.
        self.inner.read_at(at, to)
    }
    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.again(|| self.inner.write_at(at, from))
    }
    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.again(|| self.inner.write_zeroes(at, len, unmap))
    }
    fn flush(&self) -> Result<()> {
        self.again(|| self.inner.flush())
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.inner.resize(size)
    }
    fn take_charge(&self) -> Result<()> {
        self.inner.take_charge()
    }
    fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        if matches!(op, Op::Read { .. }) {
            return self.inner.begin(op, ended);
        }
        if self.suspect.load(Ordering::Acquire) {
            return Some((op, ended));
        }
        // Whoever asked does it again, then with the blocking call.
        let suspect = self.suspect.clone();
        let ended = Arc::new(Mutex::new(Some(ended)));
        let take = |of: &Mutex<Option<Ended>>| of.lock().unwrap_or_else(PoisonError::into_inner).take();
        let theirs = ended.clone();
        let watched: Ended = Box::new(move |result| {
            if matches!(result, Err(Error::Preempted { .. })) {
                suspect.store(true, Ordering::Release);
            }
            if let Some(ended) = take(&theirs) {
                ended(result);
            }
        });
        let (op, _) = self.inner.begin(op, watched)?;
        take(&ended).map(|ended| (op, ended))
    }
    fn submit(&self) {
        self.inner.submit();
    }

    fn begins(&self, write: bool) -> bool {
        !(write && self.suspect.load(Ordering::Acquire)) && self.inner.begins(write)
    }
    fn how(&self) -> How {
        self.inner.how()
    }
    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        self.inner.reservations()
    }
    fn shared_device(&self) -> bool {
        self.inner.shared_device()
    }
    fn trouble(&self) -> Option<String> {
        self.inner.trouble()
    }
}
