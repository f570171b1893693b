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
    /// Whether a write goes to the base as it is, with nothing to be done before or after it.
    pub(super) fn plainly_direct(&self, mode: Mode) -> bool {
        // (A mirrored disk notes what its copies will lack before each direct write, and afterwards.)
        mode == Mode::Direct && self.mirror.is_none()
    }

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
                if !self.plainly_direct(*mode) {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use understudy_protocol::ids::Generation;

    use super::*;
    use crate::block::{Buffer, Raw};
    use crate::store::LocalDirectory;

    /// A base whose writes end when the test says so.
    struct Slow {
        raw: Raw,
        begun: Mutex<Option<(Op, Ended)>>,
    }

    impl Slow {
        fn end(&self) {
            let (op, ended) = self.begun.lock().unwrap().take().expect("one is under way");
            let Op::Write { at, from } = op else { panic!("only writes are kept") };
            ended(self.raw.write_at(at, &from).map(|()| from));
        }
    }

    impl Block for Slow {
        fn name(&self) -> &str {
            self.raw.name()
        }
        fn size(&self) -> u64 {
            self.raw.size()
        }
        fn read_only(&self) -> bool {
            false
        }
        fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
            self.raw.read_at(at, to)
        }
        fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
            self.raw.write_at(at, from)
        }
        fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
            self.raw.write_zeroes(at, len, unmap)
        }
        fn flush(&self) -> Result<()> {
            self.raw.flush()
        }
        fn resize(&self, size: u64) -> Result<()> {
            self.raw.resize(size)
        }
        fn take_charge(&self) -> Result<()> {
            self.raw.take_charge()
        }
        fn begin(&self, op: Op, ended: Ended) -> Option<(Op, Ended)> {
            *self.begun.lock().unwrap() = Some((op, ended));
            None
        }
    }

    fn open(dir: &std::path::Path) -> (Arc<Disk>, Arc<Slow>) {
        let raw = Raw::create(&dir.join("disk"), 1 << 20).unwrap();
        let base = Arc::new(Slow { raw, begun: Mutex::default() });
        let options = Options {
            base: base.clone(),
            format: Format::Raw,
            directory: Arc::new(LocalDirectory::make(&dir.join("row")).unwrap()),
            identity: Identity { machine: "m".into(), node: "n".into(), generation: Generation(1) },
            memory: Memory::None,
            limits: Limits::default(),
        };
        (Arc::new(Disk::open(options).unwrap()), base)
    }

    const MOMENT: Duration = Duration::from_millis(50);

    #[test]
    fn protection_begins_when_direct_writes_that_were_begun_have_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, base) = open(dir.path());
        assert_eq!(disk.status().mode, "direct");
        let (sender, ended) = mpsc::channel();
        let op = Op::Write { at: 512, from: Buffer::copy(&[7; 512]) };
        assert!(disk.begin(op, Box::new(move |result| sender.send(result.is_ok()).unwrap())).is_none());
        let (sender, protected) = mpsc::channel();
        let theirs = disk.clone();
        let protect = std::thread::spawn(move || sender.send(theirs.protect(Epoch(1)).is_ok()).unwrap());
        assert!(protected.recv_timeout(MOMENT).is_err(), "a direct write is still under way");
        base.end();
        assert!(protected.recv().unwrap() && ended.recv().unwrap());
        protect.join().unwrap();
        let op = Op::Write { at: 512, from: Buffer::copy(&[8; 512]) };
        assert!(disk.begin(op, Box::new(|_| {})).is_some(), "what goes to a slice is done with the blocking call");
        disk.write_at(512, &[8; 512]).unwrap();
        let mut sector = [0; 512];
        base.read_at(512, &mut sector).unwrap();
        assert_eq!(sector, [7; 512]);
        assert!(disk.begin(Op::Read { at: 512, to: Buffer::new(512) }, Box::new(|_| {})).is_some(), "a slice has it");
        assert!(disk.begin(Op::Read { at: 0, to: Buffer::new(512) }, Box::new(|_| {})).is_none(), "the base has it");
    }

    #[test]
    fn the_right_to_write_is_given_up_only_when_nothing_is_under_way() {
        let dir = tempfile::tempdir().unwrap();
        let (disk, base) = open(dir.path());
        let op = Op::Write { at: 0, from: Buffer::copy(&[7; 512]) };
        assert!(disk.begin(op, Box::new(|_| {})).is_none());
        let (sender, gone) = mpsc::channel();
        let theirs = std::thread::spawn(move || {
            drop(disk);
            sender.send(()).unwrap();
        });
        assert!(gone.recv_timeout(MOMENT).is_err(), "it is still to be written under this lock");
        base.end();
        gone.recv().unwrap();
        theirs.join().unwrap();
    }
}
