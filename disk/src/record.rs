//! The log that a slice is: records of 64 bytes, each with its data behind it.
//!
//! ```text
//!  record, data │ record, data │ zeroes │ discard │ … │ seal │ commit
//!  └────── the guest's requests of one epoch ──────┘    │      └ the epoch is committed: merge it
//!                                                       └ all of it is here: so many records, with this digest
//! ```
//! Every record says which disk, generation, epoch and slice it belongs to and the how-manieth it is, under a CRC-32 of itself; data has another.
//! So a block that a file system hands out again after a crash is never taken for one of this slice.
//!
//! **Torn or corrupt?** A log that ends in something else than a seal was being written when its writer died: a *torn* tail, which nobody was told
//! is durable. But a bad record in the middle of a log that was committed must not look like that. So the end is looked at first: a commit mark
//! is the last thing in a file, and the seal stands before it. And the commit mark is written only behind a seal that is durable, when the epoch was committed
//! everywhere else: *anything* behind a good seal, though it be torn, therefore says that the epoch is committed.
//!
//! All numbers are little endian:
//!
//! | at | bytes | |
//! |---|---|---|
//! | 0 | 4 | `UsSl` |
//! | 4 | 1 | version, 2 |
//! | 5 | 1 | kind: 1 data, 2 zeroes, 3 discard, 4 seal, 5 commit |
//! | 6 | 2 | zero |
//! | 8 | 8 | the disk's id |
//! | 16 | 8 | generation |
//! | 24 | 8 | epoch |
//! | 32 | 8 | the slice's serial number |
//! | 40 | 8 | first sector |
//! | 48 | 4 | sectors; with kind 1 so many times 512 bytes follow |
//! | 52 | 4 | records before this one |
//! | 56 | 4 | data: CRC-32 of what follows; seal and commit: the digest; otherwise zero |
//! | 60 | 4 | CRC-32 of the 60 bytes before |

use std::io;

use serde::{Deserialize, Serialize};
use understudy_protocol::ids::{Epoch, Generation};

use crate::block::SECTOR;
use crate::store::LogFile;

/// Bytes of a record without its data.
pub const RECORD: usize = 64;
/// Most sectors in one record with data: 4 MiB. Longer requests become several.
pub const DATA_SECTORS: u32 = 8192;
const MAGIC: [u8; 4] = *b"UsSl";
const VERSION: u8 = 2;
/// In which the digest was over whole records. A CRC over something that ends with its own CRC is the same whatever it is: that digest told only how
/// many records there were. Such slices are still read.
const OLD_DIGEST: u8 = 1;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// These sectors have the content that follows.
    Data,
    /// These sectors are zeroes, and keep their room.
    Zero,
    /// These sectors are of no interest any more; they read as zeroes.
    Discard,
    /// The slice is closed, and this is all of it.
    Seal,
    /// The slice's epoch is committed.
    Commit,
}

/// Which slice of which disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceId {
    /// The disk's id, drawn at random when it was made.
    pub disk: u64,
    /// Under which generation it was written.
    pub generation: Generation,
    /// The epoch whose writes these are.
    pub epoch: Epoch,
    /// The how-manieth slice of this disk it is, ever; slices are merged in this order.
    pub serial: u64,
}

/// Names the state of a disk exactly: all slices up to this one, and this one with that content. It is captured at a cut, travels with the
/// checkpoint, and must be what is found at a takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    /// Serial number of the newest slice that is not empty; 0: none ever.
    pub serial: u64,
    /// The generation that wrote it.
    pub generation: Generation,
    /// Its epoch.
    pub epoch: Epoch,
    /// Records in it.
    pub records: u32,
    /// CRC-32 over all of its records (which have the CRC-32 of their data), each without its own CRC-32.
    pub digest: u32,
}

/// One record, without its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What it says.
    pub kind: Kind,
    /// Whose it is.
    pub slice: SliceId,
    /// First sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// Records before it.
    pub number: u32,
    /// CRC-32 of the data, or the digest.
    pub crc: u32,
}

impl Record {
    /// Bytes of data behind it.
    pub fn data_len(&self) -> u64 {
        if self.kind == Kind::Data { u64::from(self.sectors) * SECTOR } else { 0 }
    }

    /// As it stands in the log.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4] = VERSION;
        bytes[5] = match self.kind {
            Kind::Data => 1,
            Kind::Zero => 2,
            Kind::Discard => 3,
            Kind::Seal => 4,
            Kind::Commit => 5,
        };
        bytes[8..16].copy_from_slice(&self.slice.disk.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.slice.generation.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.slice.epoch.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.slice.serial.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.sector.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.number.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Read one back.
    ///
    /// # Errors
    /// What is wrong with it, as the rest of a sentence.
    pub fn decode(bytes: &[u8; RECORD]) -> Result<Self, &'static str> {
        // The slices below have the right lengths by construction.
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if bytes[..4] != MAGIC {
            return Err("is no record");
        }
        if crc32fast::hash(&bytes[..60]) != u32_at(60) {
            return Err("has a wrong checksum");
        }
        if !matches!(bytes[4], VERSION | OLD_DIGEST) || bytes[6] != 0 || bytes[7] != 0 {
            return Err("is of a version that this program does not know");
        }
        let kind = match bytes[5] {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::Discard,
            4 => Kind::Seal,
            5 => Kind::Commit,
            _ => return Err("is of a kind that this program does not know"),
        };
        let record = Record {
            kind,
            slice: SliceId {
                disk: u64_at(8),
                generation: Generation(u64_at(16)),
                epoch: Epoch(u64_at(24)),
                serial: u64_at(32),
            },
            sector: u64_at(40),
            sectors: u32_at(48),
            number: u32_at(52),
            crc: u32_at(56),
        };
        let range = record.sector.checked_add(u64::from(record.sectors));
        match kind {
            Kind::Data if record.sectors == 0 || record.sectors > DATA_SECTORS => Err("has an impossible length"),
            Kind::Zero | Kind::Discard if record.sectors == 0 => Err("has an impossible length"),
            Kind::Seal | Kind::Commit if record.sector != 0 || record.sectors != 0 => Err("has an impossible length"),
            _ if range.is_none_or(|end| end > u64::MAX / SECTOR) => Err("is for sectors that no disk has"),
            _ => Ok(record),
        }
    }
}

/// Counts and digests the records of a slice, on writing as on reading.
#[derive(Debug, Clone, Default)]
pub struct Digest {
    records: u32,
    crc: crc32fast::Hasher,
}

impl Digest {
    /// Records so far.
    pub fn records(&self) -> u32 {
        self.records
    }
    /// One more.
    pub fn add(&mut self, encoded: &[u8; RECORD]) {
        self.records += 1;
        let counted = if encoded[4] == OLD_DIGEST { RECORD } else { RECORD - 4 };
        self.crc.update(&encoded[..counted]);
    }
    /// Over all so far.
    pub fn finish(&self) -> u32 {
        self.crc.clone().finalize()
    }
    /// The state of a disk whose newest slice this is.
    pub fn tag(&self, slice: SliceId) -> Tag {
        Tag {
            serial: slice.serial,
            generation: slice.generation,
            epoch: slice.epoch,
            records: self.records,
            digest: self.finish(),
        }
    }
}

/// How far a slice came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No seal: it was being written. Says how it ends.
    Open {
        /// Where the good part ends, and what is there.
        ends: String,
    },
    /// Closed, not committed.
    Sealed,
    /// Committed.
    Committed,
    /// It was committed and is damaged. Says where and how.
    Corrupt {
        /// The rest of a sentence.
        what: String,
    },
}

/// What [`scan`] found.
#[derive(Debug, Clone)]
pub struct Scan {
    /// Records other than seal and commit with the position of their data, in order, up to the first bad one.
    pub records: Vec<(Record, u64)>,
    /// How far it came.
    pub standing: Standing,
    /// Content so far.
    pub digest: Digest,
    /// Bytes up to the end of the last good record before the seal.
    pub end: u64,
}

/// Reads a file front to back in large pieces.
struct Reader<'a> {
    file: &'a dyn LogFile,
    /// Where in the file the buffer begins.
    at: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl Reader<'_> {
    /// The next `n` bytes; `None` when the file ends before.
    fn take(&mut self, n: usize) -> io::Result<Option<&[u8]>> {
        if self.buffer.len() - self.used < n {
            self.buffer.drain(..self.used);
            self.at += self.used as u64;
            self.used = 0;
            let have = self.buffer.len();
            let want = n.max(1 << 20);
            self.buffer.resize(want, 0);
            let got = self.file.read_at(self.at + have as u64, &mut self.buffer[have..])?;
            self.buffer.truncate(have + got);
            if self.buffer.len() < n {
                return Ok(None);
            }
        }
        let from = self.used;
        self.used += n;
        Ok(Some(&self.buffer[from..from + n]))
    }
}

/// Whether a file ends as only a committed slice does: with a commit mark, or with a seal and something of a mark's length behind it. Either may
/// be damaged, as long as it is not both.
fn ends_committed(file: &dyn LogFile, len: u64, slice: SliceId) -> io::Result<bool> {
    let mark = |from_end: u64, kind: Kind| {
        let Some(at) = len.checked_sub(from_end) else { return Ok(false) };
        let mut bytes = [0; RECORD];
        let whole = file.read_at(at, &mut bytes)? == RECORD;
        Ok::<_, io::Error>(whole && Record::decode(&bytes).is_ok_and(|r| r.slice == slice && r.kind == kind))
    };
    Ok(mark(RECORD as u64, Kind::Commit)? || mark(2 * RECORD as u64, Kind::Seal)?)
}

/// Read a slice, verifying every byte of it. Takes memory for the records only, not for their data.
///
/// # Errors
/// The file cannot be read. Anything that is *in* it is no error here but a [`Standing`].
pub fn scan(file: &dyn LogFile, slice: SliceId) -> io::Result<Scan> {
    let len = file.size()?;
    let committed = ends_committed(file, len, slice)?;
    let mut reader = Reader { file, at: 0, buffer: Vec::new(), used: 0 };
    let mut scan = Scan { records: Vec::new(), standing: Standing::Sealed, digest: Digest::default(), end: 0 };
    // What is wrong at `scan.end`: of no consequence in a log that was never finished.
    let bad = |scan: &mut Scan, why: &str| {
        let what = format!("what stands at byte {} {why}", scan.end);
        // Without a commit mark: a seal may reach the disk before what it seals; nobody was told that it is there until both were.
        scan.standing = if committed { Standing::Corrupt { what } } else { Standing::Open { ends: what } };
    };
    loop {
        let head: [u8; RECORD] = match reader.take(RECORD)? {
            Some(bytes) => {
                let mut head = [0; RECORD];
                head.copy_from_slice(bytes);
                head
            }
            None => {
                let why = if len == scan.end { "is the end of the file" } else { "is less than a record" };
                bad(&mut scan, why);
                return Ok(scan);
            }
        };
        let record = match Record::decode(&head) {
            Ok(record) if record.slice != slice => Err("belongs to another slice"),
            Ok(record) if record.number != scan.digest.records() => Err("is not the record that comes next"),
            other => other,
        };
        let record = match record {
            Ok(record) => record,
            Err(why) => {
                bad(&mut scan, why);
                return Ok(scan);
            }
        };
        match record.kind {
            Kind::Commit => {
                bad(&mut scan, "is a commit mark before any seal");
                return Ok(scan);
            }
            Kind::Seal if record.crc != scan.digest.finish() => {
                bad(&mut scan, "is a seal with another digest");
                return Ok(scan);
            }
            Kind::Seal => {
                // Whatever is behind a good seal was begun after the commit was decided.
                let committed = len > scan.end + RECORD as u64;
                scan.standing = if committed { Standing::Committed } else { Standing::Sealed };
                return Ok(scan);
            }
            Kind::Data => match reader.take(record.data_len() as usize)? {
                None => {
                    bad(&mut scan, "is a record whose data is cut off");
                    return Ok(scan);
                }
                Some(data) if crc32fast::hash(data) != record.crc && verifying() => {
                    bad(&mut scan, "is a record whose data has a wrong checksum");
                    return Ok(scan);
                }
                Some(_) => {}
            },
            Kind::Zero | Kind::Discard => {}
        }
        scan.records.push((record, scan.end + RECORD as u64));
        scan.digest.add(&head);
        scan.end += RECORD as u64 + record.data_len();
    }
}

#[cfg(not(test))]
fn verifying() -> bool {
    true
}

/// The simulation switches it off once, to see that it would notice.
#[cfg(test)]
fn verifying() -> bool {
    !crate::sim::sabotaged(crate::sim::Sabotage::IgnoreCrc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_with_other_content_have_another_digest() {
        let slice = SliceId { disk: 1, generation: Generation(2), epoch: Epoch(3), serial: 4 };
        let digest = |records: &[(u64, u32)]| {
            let mut digest = Digest::default();
            for (number, (sector, crc)) in records.iter().enumerate() {
                let number = number as u32;
                digest
                    .add(&Record { kind: Kind::Data, slice, sector: *sector, sectors: 1, number, crc: *crc }.encode());
            }
            digest.finish()
        };
        let one = digest(&[(0, 5), (8, 6)]);
        for other in [&[(0, 5), (8, 7)], &[(0, 4), (8, 6)], &[(1, 5), (8, 6)], &[(8, 6), (0, 5)]] {
            assert_ne!(one, digest(other), "{other:?}");
        }
    }

    #[test]
    fn slices_of_the_old_version_are_read_with_their_digest() {
        let slice = SliceId { disk: 1, generation: Generation(2), epoch: Epoch(3), serial: 4 };
        let old = |kind, number, crc| {
            let mut bytes =
                Record { kind, slice, sector: 0, sectors: u32::from(kind == Kind::Zero), number, crc }.encode();
            bytes[4] = OLD_DIGEST;
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..].copy_from_slice(&crc.to_le_bytes());
            bytes
        };
        let zero = old(Kind::Zero, 0, 0);
        let log = [zero, old(Kind::Seal, 1, crc32fast::hash(&zero))].concat();
        let file = tempfile::tempfile().unwrap();
        LogFile::write_at(&file, 0, &log).unwrap();
        assert_eq!(scan(&file, slice).unwrap().standing, Standing::Sealed);
    }
}
