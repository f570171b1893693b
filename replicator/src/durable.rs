//! What a receiver knows for certain about its image, in a form that survives the process: the *record* and the *floor*.
//!
//! Both are small text files in the image directory, replaced as a whole (written beside, fsync, names exchanged). A line of JSON
//! is followed by its CRC-32, so that a file which is not what was written is never believed.
//!
//! * The **record** says what RAM file and stage together are: nothing usable, or exactly one committed epoch. While
//!   `pending` stands, the epoch is RAM *with the stage applied over it*; applying is idempotent, so a crash in the
//!   middle is repaired by applying again.
//! * The **floor** is the highest generation that was accepted or taken over on this node. It is written before
//!   anything is done under the new generation and never goes down.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use understudy_protocol::ids::{Epoch, Generation};

/// How far the image can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageKind {
    /// RAM holds nothing usable: never filled, being filled, or in use by a running machine.
    #[default]
    Inconsistent,
    /// Exactly the committed epoch.
    Whole,
    /// Exactly the committed epoch, but the machine has gone on without it.
    Outdated,
}

/// Which RAM file it was: the image is lost when another one stands at the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamIdentity {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// The stage that belongs to the record and may not have been applied yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Bytes of stage file.
    pub stage_len: u64,
    /// CRC-32 over these bytes.
    pub stage_crc: u32,
}

/// A process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start: u64,
}

/// The image was given to a machine that runs, or will run, from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// The generation of that machine.
    pub generation: Generation,
    /// The VMM that stood by when it was taken: as long as that very process says that its vCPUs never ran, RAM is
    /// untouched.
    pub vmm: Option<ProcessId>,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Record {
    /// What the image is.
    pub image: ImageKind,
    /// The generation of the machine that made it.
    pub generation: Generation,
    /// The committed epoch; zero while inconsistent.
    pub epoch: Epoch,
    /// The sender's session ([`crate::message::Hello::session`]).
    pub session: u64,
    /// The RAM file it is in.
    pub ram: Option<RamIdentity>,
    /// The stage to apply over it.
    pub pending: Option<Pending>,
    /// Given to a machine here.
    pub taken: Option<Taken>,
    /// The primary handed over in a planned switch: the image is the newest there will be.
    pub handed_over: bool,
}

/// Both.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Durable {
    /// See the module.
    pub floor: Generation,
    /// See the module.
    pub record: Record,
}

impl Durable {
    /// The highest generation that this node has seen, wherever it was noted first.
    pub fn newest(&self) -> Generation {
        let taken = self.record.taken.map_or(Generation::ZERO, |taken| taken.generation);
        self.floor.max(self.record.generation).max(taken)
    }
}

/// Why a file could not be read or written.
#[derive(Debug, Error)]
pub enum DurableError {
    /// The file system said no.
    #[error("cannot {what} {file}: {source}")]
    Io {
        /// `read`, `write`.
        what: &'static str,
        /// The file.
        file: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{file} is damaged ({why}); the image on this node cannot be trusted")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong.
        why: String,
    },
}

/// Read a checked line; `None` if there is no such file.
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<Option<T>, DurableError> {
    let name = || file.display().to_string();
    let text = match fs::read(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DurableError::Io { what: "read", file: name(), source }),
    };
    let damaged = |why: &str| DurableError::Damaged { file: name(), why: why.to_owned() };
    let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it ends too early"))?;
    let (line, rest) = text.split_at(end);
    if rest != format!("\n{:08x}\n", crc32fast::hash(line)).as_bytes() {
        return Err(damaged("its checksum is wrong"));
    }
    serde_json::from_slice(line).map(Some).map_err(|e| damaged(&e.to_string()))
}

/// Replace a checked line: after a crash the file holds the old or the new one.
pub fn store<T: Serialize>(file: &Path, value: &T) -> Result<(), DurableError> {
    let line = serde_json::to_vec(value).map_err(io::Error::other);
    let written = line.and_then(|mut text| {
        let crc = crc32fast::hash(&text);
        text.extend_from_slice(format!("\n{crc:08x}\n").as_bytes());
        replace(file, &text)
    });
    written.map_err(|source| DurableError::Io { what: "write", file: file.display().to_string(), source })
}

/// Replace a file's content as a whole: after a crash it is the old or the new.
///
/// The new content is written to a spare file beside it, and the two exchange their names. The spare stays, with its
/// room: on a file system that has become full a small file can still be replaced.
fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let spare = file.with_extension("spare");
    let write_spare = || {
        let new = File::options().write(true).create(true).truncate(false).open(&spare)?;
        new.write_all_at(content, 0)?;
        new.set_len(content.len() as u64)?;
        new.sync_all()
    };
    write_spare()?;
    match renameat2(AT_FDCWD, &spare, AT_FDCWD, file, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => {}
        // The first time there is nothing to exchange with (and some file systems cannot).
        Err(_) => {
            fs::rename(&spare, file)?;
            write_spare()?;
        }
    }
    match file.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_damaged_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("record");
        assert!(load::<Record>(&file).unwrap().is_none());
        let taken = Some(Taken { generation: Generation(4), vmm: Some(ProcessId { pid: 1, start: 2 }) });
        let pending = Some(Pending { stage_len: 3, stage_crc: 4 });
        let record = Record { image: ImageKind::Whole, epoch: Epoch(7), taken, pending, ..Record::default() };
        store(&file, &record).unwrap();
        assert_eq!(load(&file).unwrap().as_ref(), Some(&record));
        store(&file, &record).unwrap();
        assert_eq!(load(&file).unwrap(), Some(record), "the second time too");
        let good = fs::read(&file).unwrap();
        for end in 0..good.len() {
            fs::write(&file, &good[..end]).unwrap();
            assert!(load::<Record>(&file).is_err(), "cut at {end}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file, bad).unwrap();
            assert!(load::<Record>(&file).is_err(), "flipped at {at}");
        }
    }
}
