//! Requests that are begun and end later: those that the base answers alone. Everything else (slices, pieces of both) is done with the blocking
//! calls, which write to a page cache and seldom wait.
//!
//! A direct write that was begun holds no lock while it is under way. So whoever ends direct mode, or lets go of the disk and of its right to write to the
//! base, waits for them: [`Flying::land`].

use super::*;
use crate::block::{Ended, Op};

/// How many direct writes are under way.
#[derive(Debug, Default)]
pub(super) struct Flying {
    count: Mutex<usize>,
    none: Condvar,
}

impl Flying {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>) -> Flight {
        *self.count() += 1;
        Flight(self.clone())
    }

    /// Wait until none is under way. Nobody begins one meanwhile: the mode is held for writing, or the disk is going away.
    pub(super) fn land(&self) {
        let mut count = self.count();
        while *count > 0 {
            count = self.none.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One of them, until it is dropped.
struct Flight(Arc<Flying>);

impl Drop for Flight {
    fn drop(&mut self) {
        let mut count = self.0.count();
        *count -= 1;
        if *count == 0 {
            self.0.none.notify_all();
        }
    }
}

impl Disk {
    pub(super) fn begin_in_base(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
        if self.alive().is_err() {
            // The blocking call says it.
            return Some((op, ended));
        }
        match &op {
            Op::Read { at, to } => {
                if admit(self, *at, to.len() as u64).is_err() {
                    return Some((op, ended));
                }
                let (first, sectors) = (at / SECTOR, to.len() as u64 / SECTOR);
                // What comes from the base now still does when it is read, or was overwritten while the read was under way.
                let pieces = read(&self.index).lookup(first, sectors);
                if pieces.iter().any(|piece| piece.source != Source::Base) {
                    return Some((op, ended));
                }
                self.base.begin(op, ended)
            }
            Op::Write { .. } => {
                let mode = read(&self.mode);
                if *mode != Mode::Direct {
                    return Some((op, ended));
                }
                let flight = self.flying.begin();
                // The outcome may be handed in from here, to somebody who holds what a cut needs: not under the mode's lock.
                drop(mode);
                let ended = Arc::new(Mutex::new(Some(ended)));
                let theirs = ended.clone();
                let landed: Ended = Box::new(move |result| {
                    drop(flight);
                    if let Some(ended) = theirs.lock().unwrap_or_else(PoisonError::into_inner).take() {
                        ended(result);
                    }
                });
                let (op, _) = self.base.begin(op, landed)?;
                let ended = ended.lock().unwrap_or_else(PoisonError::into_inner).take()?;
                Some((op, ended))
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The right to write to the base goes with this: nothing that was begun under it may be on its way.
        self.flying.land();
    }
}
