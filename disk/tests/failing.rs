//! A base that fails: errors that come and go, requests that hang. What is protected goes on, what is read says what is wrong, nothing is lost.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use understudy_disk::{
    Block, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Merged, Options, Raw, Result,
};
use understudy_protocol::ids::{Epoch, Generation};

/// A raw file that fails or hangs when it is told to.
struct Failing {
    raw: Raw,
    reads: AtomicBool,
    writes: AtomicBool,
    flushes: AtomicBool,
    hangs: Mutex<bool>,
    goes_on: Condvar,
    hanging: AtomicU32,
}

impl Failing {
    fn check(&self, fails: &AtomicBool, doing: &str) -> Result<()> {
        let mut hangs = self.hangs.lock().unwrap();
        self.hanging.fetch_add(1, Ordering::AcqRel);
        while *hangs {
            hangs = self.goes_on.wait(hangs).unwrap();
        }
        self.hanging.fetch_sub(1, Ordering::AcqRel);
        if fails.load(Ordering::Acquire) {
            return Err(Error::io(
                format!("{doing} {}", self.name()),
                std::io::Error::from_raw_os_error(nix::libc::EIO),
            ));
        }
        Ok(())
    }
    fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.goes_on.notify_all();
    }
}

impl Block for Failing {
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
        self.check(&self.reads, "reading")?;
        self.raw.read_at(at, to)
    }
    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        self.check(&self.writes, "writing")?;
        self.raw.write_at(at, from)
    }
    fn write_zeroes(&self, at: u64, len: u64, unmap: bool) -> Result<()> {
        self.check(&self.writes, "clearing")?;
        self.raw.write_zeroes(at, len, unmap)
    }
    fn flush(&self) -> Result<()> {
        self.check(&self.flushes, "flushing")?;
        self.raw.flush()
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.raw.resize(size)
    }
    fn take_charge(&self) -> Result<()> {
        self.raw.take_charge()
    }
}

fn open(dir: &std::path::Path) -> (Disk, Arc<Failing>) {
    let base = Arc::new(Failing {
        raw: Raw::create(&dir.join("disk"), 1 << 20).unwrap(),
        reads: AtomicBool::default(),
        writes: AtomicBool::default(),
        flushes: AtomicBool::default(),
        hangs: Mutex::default(),
        goes_on: Condvar::new(),
        hanging: AtomicU32::default(),
    });
    let options = Options {
        base: base.clone(),
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&dir.join("row")).unwrap()),
        identity: Identity { machine: "m".into(), node: "n".into(), generation: Generation(1) },
        memory: Memory::None,
        limits: Limits::default(),
    };
    (Disk::open(options).unwrap(), base)
}

fn epoch(disk: &Disk, number: u64, fill: u8) {
    disk.write_at(0, &[fill; 4096]).unwrap();
    disk.cut(Epoch(number)).unwrap();
    disk.seal(Epoch(number)).unwrap();
    disk.commit(Epoch(number)).unwrap();
}

fn sector(disk: &dyn Block, at: u64) -> Result<u8> {
    let mut bytes = [0; 512];
    disk.read_at(at, &mut bytes).map(|()| bytes[0])
}

#[test]
fn errors_of_the_base_stop_merging_with_a_sentence_and_nothing_is_lost_when_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, base) = open(dir.path());
    disk.write_at(8192, &[9; 512]).unwrap();
    disk.protect(Epoch(1)).unwrap();
    let kinds = [(&base.writes, "writing"), (&base.flushes, "flushing"), (&base.reads, "reading")];
    for (i, (fails, which)) in kinds.into_iter().enumerate() {
        fails.store(true, Ordering::Release);
        epoch(&disk, i as u64 + 1, i as u8 + 1);
        assert_eq!(sector(&disk, 0).unwrap(), i as u8 + 1, "a slice has it");
        let merged = disk.merge();
        if which == "reading" {
            // Merging reads slices only; the guest is told what it is.
            assert!(matches!(merged, Ok(Merged::Slices { .. })));
            let e = sector(&disk, 8192).unwrap_err().to_string();
            assert!(e.contains("reading") && e.contains("Input/output error"), "{e}");
        } else {
            let e = merged.unwrap_err().to_string();
            assert!(e.contains(which) && disk.status().problem.as_deref() == Some(&*e), "{e}");
            assert_eq!(disk.status().backlog_slices, 1, "the slice stays");
        }
        fails.store(false, Ordering::Release);
        while matches!(disk.merge(), Ok(Merged::Slices { .. })) {}
        assert_eq!((disk.status().problem, disk.status().backlog_slices), (None, 0));
        assert_eq!(sector(&base.raw, 0).unwrap(), i as u8 + 1);
        assert_eq!(sector(&disk, 8192).unwrap(), 9);
    }
}

#[test]
fn while_the_base_hangs_protected_writes_cuts_and_commits_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, base) = open(dir.path());
    disk.protect(Epoch(1)).unwrap();
    epoch(&disk, 1, 1);
    base.hang(true);
    std::thread::scope(|scope| {
        let merger = scope.spawn(|| disk.merge());
        let reader = scope.spawn(|| sector(&disk, 65536));
        while base.hanging.load(Ordering::Acquire) < 2 {
            std::thread::yield_now();
        }
        for number in 2..20 {
            epoch(&disk, number, number as u8);
            assert_eq!(sector(&disk, 0).unwrap(), number as u8);
        }
        assert_eq!(disk.status().backlog_slices, 19);
        base.hang(false);
        assert!(matches!(merger.join().unwrap(), Ok(Merged::Slices { .. })));
        assert_eq!(reader.join().unwrap().unwrap(), 0);
    });
    while matches!(disk.merge(), Ok(Merged::Slices { .. })) {}
    assert_eq!(sector(&base.raw, 0).unwrap(), 19);
}
