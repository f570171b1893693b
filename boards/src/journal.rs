//! What a board remembers across its own death: the highest generation, how far the line has taken output, and the input
//! that no committed checkpoint holds yet.
//!
//! One file per machine and device, its room reserved when it is made, so that a full disk is met at the start and not in
//! the middle of a takeover:
//!
//! ```text
//!   0  record A ┐ written in turn, each with a sequence number and a CRC-32: a torn one leaves the other
//! 512  record B ┘
//! 4096 input ring: the byte at offset `o` stands at 4096 + o mod capacity
//! ```
//! The record is written before and after each write to the line and each read from it, so that a killed service knows,
//! when it comes back, the one write or read (at most [`MAX_WRITE`], [`MAX_READ`] bytes) whose fate is open. These writes
//! go to the page cache only: they survive the process, and on a tmpfs cost next to nothing. A change of *owner* is forced
//! to the medium before anybody hears of it. After the board's host itself was down, only owner and lower bounds are known.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use understudy_protocol::board::{Direction, Event, MAX_OFFSET, Ownership, Saved};
use understudy_protocol::ids::Generation;

/// Most bytes given to the line in one write: what may be uncertain after a crash.
pub const MAX_WRITE: usize = 512;
/// Most bytes read from the line at once.
pub const MAX_READ: usize = 1024;

const MAGIC: &[u8; 8] = b"UsBoard1";
const RECORD_LEN: usize = 128;
const SLOTS: [u64; 2] = [0, 512];
const RING_AT: u64 = 4096;

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another service has it.
    #[error("another understudy-serial serves this device: it holds {file} locked")]
    Locked {
        /// The file.
        file: String,
    },
    /// It cannot be made, read or written.
    #[error("cannot {what} {file}: {cause}{hint}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The file.
        file: String,
        /// What the kernel said.
        cause: io::Error,
        /// What to do, if that is known.
        hint: &'static str,
    },
    /// It is not a journal, or of another size.
    #[error(
        "{file} is not the state of this device ({why}): if the machine is stopped everywhere, remove the file and start again"
    )]
    Foreign {
        /// The file.
        file: String,
        /// What is wrong.
        why: String,
    },
}

/// What happens to output whose fate is open after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum AfterCrash {
    /// Do not write it again: it may be missing.
    Skip,
    /// Write it again: it may appear twice.
    Repeat,
}

/// The open file.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    capacity: u64,
    sequence: u64,
    boot: [u8; 16],
    now: Record,
}

/// What stands in the file, and what is to be told about it.
#[derive(Debug)]
pub struct Found {
    /// `None` if the file is new.
    pub saved: Option<Saved>,
    /// What the former run left open.
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Record {
    sequence: u64,
    boot: [u8; 16],
    ownership: Ownership,
    /// Output up to here may have been written; equal to `applied` when nothing is open.
    writing: u64,
    reading: bool,
    clean: bool,
}

impl Journal {
    /// Open or make the journal of a device in `dir`, and read what a former run left.
    pub fn open(
        dir: &Path,
        machine: &str,
        device: &str,
        capacity: usize,
        policy: AfterCrash,
    ) -> Result<(Self, Found), JournalError> {
        let path = dir.join(format!("{machine}.{device}.board"));
        let io = |what, hint| {
            let file = path.display().to_string();
            move |cause| JournalError::Io { what, file, cause, hint }
        };
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(io("make the directory of", ": choose another --state-dir"))?;
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = open.map_err(io("open", ": choose another --state-dir"))?;
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|_| JournalError::Locked { file: path.display().to_string() })?;
        let mut journal = Self {
            file,
            capacity: capacity as u64,
            sequence: 0,
            boot: boot_id(),
            now: Record::default(),
            path: path.clone(),
        };
        let len = journal.file.metadata().map_err(io("read", ""))?.len();
        let whole = RING_AT + journal.capacity;
        let record = if len == 0 { None } else { journal.read_record(len)? };
        let Some(record) = record else {
            nix::fcntl::fallocate(&*journal.file, nix::fcntl::FallocateFlags::empty(), 0, whole as i64).map_err(
                |e| {
                    // Leave nothing half made: the next start must not take it for a foreign file.
                    let _ = journal.file.set_len(0);
                    io("reserve room for", ": make room, or choose another --state-dir")(e.into())
                },
            )?;
            journal.force().map_err(io("write", ": make room, or choose another --state-dir"))?;
            File::open(dir).and_then(|d| d.sync_all()).map_err(io("make the directory entry of", ""))?;
            return Ok((journal, Found { saved: None, events: Vec::new() }));
        };
        let found = journal.recover(&record, policy).map_err(io("read", ""))?;
        Ok((journal, found))
    }

    /// A new owner: on the medium when this returns.
    pub fn own(&mut self, ownership: &Ownership) -> Result<(), JournalError> {
        let former = self.now;
        self.now = Record { ownership: *ownership, writing: ownership.applied, ..self.now };
        self.force().map_err(|cause| {
            self.now = former;
            JournalError::Io {
                what: "make the new owner durable in",
                file: self.path.display().to_string(),
                cause,
                hint: "; the machine was not attached",
            }
        })
    }

    /// Output from `applied` on, `len` bytes, is about to be written to the line.
    pub fn will_write(&mut self, applied: u64, len: usize) -> io::Result<()> {
        self.now.writing = applied + len as u64;
        self.put()
    }

    /// The line is about to be read.
    pub fn will_read(&mut self) -> io::Result<()> {
        self.now.reading = true;
        self.put()
    }

    /// These bytes were read; `end` is the offset of the first.
    pub fn input(&mut self, end: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = end;
        let mut rest = bytes;
        while !rest.is_empty() {
            let place = at % self.capacity;
            let n = rest.len().min((self.capacity - place) as usize);
            self.file.write_all_at(&rest[..n], RING_AT + place)?;
            at += n as u64;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// The port stands here now, and nothing is open.
    pub fn settle(&mut self, ownership: &Ownership) -> io::Result<()> {
        self.now = Record { ownership: *ownership, writing: ownership.applied, reading: false, ..self.now };
        self.put()
    }

    /// The service ends in order.
    pub fn close(mut self, ownership: &Ownership) -> io::Result<()> {
        self.now =
            Record { ownership: *ownership, writing: ownership.applied, reading: false, clean: true, ..self.now };
        self.force()
    }

    fn put(&mut self) -> io::Result<()> {
        self.sequence += 1;
        self.now.sequence = self.sequence;
        self.now.boot = self.boot;
        let slot = SLOTS[(self.sequence % 2) as usize];
        self.file.write_all_at(&self.now.to_bytes(), slot)
    }

    fn force(&mut self) -> io::Result<()> {
        self.put()?;
        self.file.sync_data()
    }

    /// The newest whole record, `None` if there never was one.
    fn read_record(&self, len: u64) -> Result<Option<Record>, JournalError> {
        let foreign = |why: String| JournalError::Foreign { file: self.path.display().to_string(), why };
        let whole = RING_AT + self.capacity;
        if len != whole {
            return Err(foreign(format!("it has {len} bytes instead of {whole}")));
        }
        let mut best: Option<Record> = None;
        let mut blank = true;
        for slot in SLOTS {
            let mut bytes = [0; RECORD_LEN];
            self.file.read_exact_at(&mut bytes, slot).map_err(|cause| JournalError::Io {
                what: "read",
                file: self.path.display().to_string(),
                cause,
                hint: "",
            })?;
            blank &= bytes == [0; RECORD_LEN];
            if let Some(record) = Record::from_bytes(&bytes)
                && best.is_none_or(|b| b.sequence < record.sequence)
            {
                best = Some(record);
            }
        }
        match best {
            None if !blank => Err(foreign("neither of its records is whole".into())),
            Some(r) if r.ownership.in_end - r.ownership.in_base > self.capacity => {
                Err(foreign("it keeps more input than it has room for".into()))
            }
            best => Ok(best),
        }
    }

    fn recover(&mut self, record: &Record, policy: AfterCrash) -> io::Result<Found> {
        let mut ownership = record.ownership;
        let mut events = Vec::new();
        if record.boot != self.boot && !record.clean {
            events.push(Event::Uncertain {
                direction: Direction::Output,
                from: ownership.applied,
                to: ownership.applied,
                reason: "the board's host was down; what the line took after this offset is written again".into(),
            });
            events.push(Event::Gap {
                direction: Direction::Input,
                from: ownership.in_base,
                to: ownership.in_base,
                reason: "the board's host was down; input that was not committed then is lost".into(),
            });
            ownership.in_end = ownership.in_base;
        } else {
            if record.writing > ownership.applied {
                let done = match policy {
                    AfterCrash::Skip => "it is not written again",
                    AfterCrash::Repeat => "it is written again",
                };
                events.push(Event::Uncertain {
                    direction: Direction::Output,
                    from: ownership.applied,
                    to: record.writing,
                    reason: format!("the board service died while it wrote this; {done}"),
                });
                if policy == AfterCrash::Skip {
                    ownership.applied = record.writing;
                }
            }
            if record.reading {
                events.push(Event::Uncertain {
                    direction: Direction::Input,
                    from: ownership.in_end,
                    to: ownership.in_end,
                    reason: format!(
                        "the board service died while it read the line; up to {MAX_READ} bytes may be lost here"
                    ),
                });
            }
        }
        let mut input = vec![0; (ownership.in_end - ownership.in_base) as usize];
        let mut done = 0;
        while done < input.len() {
            let place = (ownership.in_base + done as u64) % self.capacity;
            let n = (input.len() - done).min((self.capacity - place) as usize);
            self.file.read_exact_at(&mut input[done..done + n], RING_AT + place)?;
            done += n;
        }
        self.sequence = record.sequence;
        self.now = Record { ownership, writing: ownership.applied, reading: false, clean: false, ..*record };
        self.put()?;
        Ok(Found { saved: Some(Saved { ownership, input }), events })
    }
}

impl Record {
    fn to_bytes(self) -> [u8; RECORD_LEN] {
        let Ownership { generation, life, applied, in_base, in_end } = self.ownership;
        let mut bytes = [0; RECORD_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..24].copy_from_slice(&self.boot);
        let numbers = [self.sequence, generation.0, life.0, applied, self.writing, in_base, in_end];
        for (i, number) in numbers.iter().enumerate() {
            bytes[24 + 8 * i..32 + 8 * i].copy_from_slice(&number.to_le_bytes());
        }
        bytes[80] = u8::from(self.reading);
        bytes[81] = u8::from(self.clean);
        let crc = crc32fast::hash(&bytes[..RECORD_LEN - 4]);
        bytes[RECORD_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD_LEN]) -> Option<Self> {
        let number = |at: usize| {
            let mut b = [0; 8];
            b.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(b)
        };
        let crc = crc32fast::hash(&bytes[..RECORD_LEN - 4]);
        if &bytes[..8] != MAGIC || bytes[RECORD_LEN - 4..] != crc.to_le_bytes() {
            return None;
        }
        let mut boot = [0; 16];
        boot.copy_from_slice(&bytes[8..24]);
        let ownership = Ownership {
            generation: Generation(number(32)),
            life: Generation(number(40)),
            applied: number(48),
            in_base: number(64),
            in_end: number(72),
        };
        // No stream ever comes so far, and a sum with one that has would not fit.
        let counters = [number(24), ownership.applied, number(56), ownership.in_base, ownership.in_end];
        if ownership.in_end < ownership.in_base || counters.iter().any(|n| *n > MAX_OFFSET) {
            return None;
        }
        Some(Self {
            sequence: number(24),
            boot,
            ownership,
            writing: number(56),
            reading: bytes[80] != 0,
            clean: bytes[81] != 0,
        })
    }
}

/// Names this run of the kernel; all zero where it does not say (then a restart of the host looks like one of the service,
/// which is right for a state directory that does not survive the host).
fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut id = [0; 16];
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = (pair[0] * 16 + pair[1]) as u8; // two digits below 16
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(dir: &Path, policy: AfterCrash) -> (Journal, Found) {
        Journal::open(dir, "m", "gps", 64, policy).unwrap()
    }

    fn at(applied: u64, in_base: u64, in_end: u64) -> Ownership {
        Ownership { generation: Generation(3), life: Generation(1), applied, in_base, in_end }
    }

    #[test]
    fn a_killed_service_finds_its_owner_offsets_and_input_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, found) = open(dir.path(), AfterCrash::Skip);
        assert!(found.saved.is_none());
        journal.own(&at(100, 40, 40)).unwrap();
        journal.will_read().unwrap();
        journal.input(40, &(0..50).collect::<Vec<u8>>()).unwrap();
        journal.settle(&at(100, 40, 90)).unwrap();
        drop(journal); // as a SIGKILL would
        let (_, found) = open(dir.path(), AfterCrash::Skip);
        assert_eq!(found.events, []);
        let saved = found.saved.unwrap();
        assert_eq!(saved.ownership, at(100, 40, 90));
        assert_eq!(saved.input, (0..50).collect::<Vec<u8>>(), "also where the ring wraps");
    }

    #[test]
    fn a_write_cut_short_by_a_crash_is_reported_and_skipped_or_repeated_as_configured() {
        for (policy, goes_on) in [(AfterCrash::Skip, 120), (AfterCrash::Repeat, 100)] {
            let dir = tempfile::tempdir().unwrap();
            let (mut journal, _) = open(dir.path(), policy);
            journal.settle(&at(100, 0, 0)).unwrap();
            journal.will_write(100, 20).unwrap();
            drop(journal);
            let (_, found) = open(dir.path(), policy);
            assert_eq!(found.saved.unwrap().ownership.applied, goes_on);
            assert!(matches!(found.events[..], [Event::Uncertain { from: 100, to: 120, .. }]), "{:?}", found.events);
        }
    }

    #[test]
    fn after_the_hosts_own_death_offsets_are_not_trusted_and_that_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), AfterCrash::Skip);
        journal.boot = [7; 16];
        journal.settle(&at(100, 10, 20)).unwrap();
        drop(journal);
        let (_, found) = open(dir.path(), AfterCrash::Skip);
        assert_eq!(found.events.len(), 2);
        assert_eq!(found.saved.unwrap().ownership, at(100, 10, 10));
    }

    #[test]
    fn after_a_clean_end_nothing_is_uncertain_even_across_a_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), AfterCrash::Skip);
        journal.boot = [7; 16];
        journal.close(&at(100, 10, 20)).unwrap();
        let (_, found) = open(dir.path(), AfterCrash::Skip);
        assert_eq!(found.events, []);
        assert_eq!(found.saved.unwrap().ownership, at(100, 10, 20));
    }

    #[test]
    fn a_torn_record_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), AfterCrash::Skip);
        journal.settle(&at(1, 0, 0)).unwrap();
        journal.settle(&at(2, 0, 0)).unwrap();
        let slot = SLOTS[(journal.sequence % 2) as usize];
        journal.file.write_all_at(b"torn", slot + 50).unwrap();
        drop(journal);
        let (_, found) = open(dir.path(), AfterCrash::Skip);
        assert_eq!(found.saved.unwrap().ownership, at(1, 0, 0));
    }

    #[test]
    fn a_second_service_for_the_same_device_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (_held, _) = open(dir.path(), AfterCrash::Skip);
        let error = Journal::open(dir.path(), "m", "gps", 64, AfterCrash::Skip).unwrap_err();
        assert!(matches!(error, JournalError::Locked { .. }), "{error}");
    }

    #[test]
    fn a_foreign_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gps.board");
        for content in [vec![b'x'; 100], vec![b'x'; 4096 + 64]] {
            fs::write(&path, &content).unwrap();
            let error = Journal::open(dir.path(), "m", "gps", 64, AfterCrash::Skip).unwrap_err();
            assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
            assert_eq!(fs::read(&path).unwrap(), content);
        }
    }

    proptest! {
        #[test]
        fn any_record_never_panics(bytes in proptest::collection::vec(any::<u8>(), RECORD_LEN)) {
            let mut bytes: [u8; RECORD_LEN] = bytes.try_into().unwrap();
            bytes[..8].copy_from_slice(MAGIC);
            let crc = crc32fast::hash(&bytes[..RECORD_LEN - 4]);
            bytes[RECORD_LEN - 4..].copy_from_slice(&crc.to_le_bytes());
            let _ = Record::from_bytes(&bytes);
        }
    }
}
