//! Whose disk it is: a small record beside the slices, changed by compare-and-swap under a lock.
//!
//! Two locks, both on files in the slice directory:
//! * `claim.lock` is held for moments, by whoever reads the record in order to change it.
//! * `base.lock` is held for as long as its holder lives, and only its holder writes to the base. A process that is frozen keeps it, so that nothing that
//!   it has in flight can hit a base that somebody else writes to. Who takes over needs it not to *run* (writes go to slices), but to *merge*.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_protocol::ids::Generation;

use crate::block::Format;
use crate::error::{Doing, Error, Result};
use crate::mirror::record::Mirror;
use crate::record::Tag;
use crate::store::{Directory, Lock};

/// The record's file.
pub const RECORD_FILE: &str = "owner";
/// Held while the record is changed.
pub const CLAIM_LOCK: &str = "claim.lock";
/// Held by the one who may write the base.
pub const BASE_LOCK: &str = "base.lock";

const VERSION: u32 = 1;
/// Of a mirrored disk: a program that does not know what [`Mirror`] is must not open it.
const MIRRORED: u32 = 2;

/// How long a claim is waited for: whoever holds it has a few small writes to do.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who opens a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The machine whose disk it is.
    pub machine: String,
    /// The node that this process is on.
    pub node: String,
    /// The machine's generation that this process runs.
    pub generation: Generation,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ownership {
    /// Of this structure: 1, or 2 with [`Ownership::mirror`].
    pub version: u32,
    /// Drawn at random when the disk was first claimed; stands in every record of its slices.
    pub disk: u64,
    /// The machine whose disk it is; empty: nobody's, it was released.
    pub machine: String,
    /// The node that claimed it last.
    pub node: String,
    /// Under which generation. An older one may not write.
    pub generation: Generation,
    /// The base, as its owner called it.
    pub base: String,
    /// The base's format.
    pub format: Format,
    /// Bytes that the base has.
    pub size: u64,
    /// The owner writes to the base without slices (or did when it died): no checkpoint fits this disk.
    pub direct: bool,
    /// Everything up to this slice is in the base.
    pub newest: Tag,
    /// File names of an earlier owner's slices that count. Every other file of an earlier owner is to be thrown away.
    #[serde(default)]
    pub accepted: Vec<String>,
    /// Only of a mirrored disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
}

impl Ownership {
    /// As it stands in its file: one line of JSON, one with the CRC-32 of the first.
    pub fn encode(&self) -> Vec<u8> {
        let version = if self.mirror.is_some() { MIRRORED } else { VERSION };
        // Plain data: it serialises.
        let mut line = serde_json::to_vec(&Ownership { version, ..self.clone() }).unwrap_or_default();
        line.push(b'\n');
        let crc = crc32fast::hash(&line);
        line.extend(format!("{crc:08x}\n").into_bytes());
        line
    }

    /// Read it back.
    ///
    /// # Errors
    /// What is wrong, as the rest of a sentence.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let end = bytes.iter().position(|&b| b == b'\n').ok_or("is not complete")? + 1;
        let (line, crc) = bytes.split_at(end);
        if crc != format!("{:08x}\n", crc32fast::hash(line)).as_bytes() {
            return Err("has a wrong checksum".into());
        }
        let record: Ownership = serde_json::from_slice(line).map_err(|e| format!("cannot be understood: {e}"))?;
        let expected = if record.mirror.is_some() { MIRRORED } else { VERSION };
        if record.version != expected {
            return Err(format!("is of version {}, this program knows {VERSION} and {MIRRORED}", record.version));
        }
        // Written back it has its own version again; in memory all are alike.
        Ok(Ownership { version: VERSION, ..record })
    }

    /// A record for a disk that has none.
    pub fn fresh(disk: u64, me: &Identity, base: &str, format: Format, size: u64) -> Self {
        Ownership {
            version: VERSION,
            disk,
            machine: me.machine.clone(),
            node: me.node.clone(),
            generation: me.generation,
            base: base.to_owned(),
            format,
            size,
            direct: false,
            newest: Tag { serial: 0, generation: Generation::ZERO, epoch: Default::default(), records: 0, digest: 0 },
            accepted: Vec::new(),
            mirror: None,
        }
    }

    /// The record in a directory; `None`: there is none.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub fn load(dir: &dyn Directory) -> Result<Option<Self>> {
        let doing = || format!("reading whose disk it is from {}", dir.name());
        let Some(bytes) = dir.read(RECORD_FILE).doing(doing)? else { return Ok(None) };
        Self::decode(&bytes)
            .map(Some)
            .map_err(|why| Error::Corrupt { what: format!("the record of ownership in {} {why}", dir.name()) })
    }

    /// Write it, durably. The claim is held, so that nobody changes it meanwhile.
    ///
    /// # Errors
    /// What the storage says.
    pub fn store(&self, dir: &dyn Directory, _claim: &Claim) -> Result<()> {
        dir.replace(RECORD_FILE, &self.encode()).doing(|| format!("writing whose disk it is to {}", dir.name()))
    }
}

/// The right to change the record, until it is dropped.
pub struct Claim(#[expect(dead_code, reason = "dropping it releases the lock")] Box<dyn Lock>);

/// Wait for the right to change the record.
///
/// # Errors
/// Somebody has had it for too long; locks do not work there.
pub fn claim(dir: &dyn Directory) -> Result<Claim> {
    match dir.lock(CLAIM_LOCK, PATIENCE).doing(|| format!("locking {} in {}", CLAIM_LOCK, dir.name()))? {
        Some(lock) => Ok(Claim(lock)),
        None => {
            let owner = Ownership::load(dir).ok().flatten().map(|o| o.node);
            Err(Error::Owned(format!(
                "the disk in {} has been about to change its owner for more than {} s ({}): a process there is frozen while it holds {}; \
                 fence that node, or end that process",
                dir.name(),
                PATIENCE.as_secs(),
                owner.map_or("its owner is not known".into(), |node| format!("its owner is on {node}")),
                CLAIM_LOCK
            )))
        }
    }
}
