//! The image on disk: performs the receiver's steps on real files.
//!
//! ```text
//! SHM/MACHINE/ram               guest RAM, created by the VMM
//! SHM/MACHINE/image/record      what RAM and stage together are      (durable.rs)
//! SHM/MACHINE/image/floor       highest generation seen
//! SHM/MACHINE/image/stage       pages of the epoch that is arriving, as checked records
//! SHM/MACHINE/image/state.new   device state of the epoch that is arriving
//! SHM/MACHINE/image/state-G-E   device state of the committed epoch E of generation G
//! ```
//! RAM is written with `pwrite`, not through a mapping: a full tmpfs is then an error, not a signal. Every page is written
//! at least once in a first copy, zero pages too, so applying a committed epoch later never needs new memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::layout::Layout;

use crate::codec::{BatchError, PAGE, Record as PageRecord, for_each_record};
use crate::durable::{self, Durable, DurableError, Pending, RamIdentity, Record};
use crate::receiver::Step;

/// Most payload bytes of one frame between replicators and in the stage.
pub const FRAME_LIMIT: usize = 1 << 20;

/// Why the image could not be read or written.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Record or floor.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// RAM, stage or state.
    #[error("cannot {what} {file}: {source}{}", advice(.source))]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        file: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The stage is not what was committed.
    #[error("the committed stage {file} is damaged: {why}")]
    Stage {
        /// The file.
        file: String,
        /// What is wrong.
        why: String,
    },
    /// The RAM file was replaced while it was being filled.
    #[error("{0} is not the file that was being filled any more: the VMM has made a new one")]
    RamReplaced(String),
    /// One epoch needs more room than it may take.
    #[error("the epoch needs more than the {limit} bytes that its stage may take on this node")]
    StageFull {
        /// The limit.
        limit: u64,
    },
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (the shared-memory file system is full: make it larger or remove what else is in it)"
        }
        _ => "",
    }
}

/// The files of one machine's image.
#[derive(Debug)]
pub struct Image {
    dir: PathBuf,
    ram_path: PathBuf,
    ram: Option<(File, RamIdentity)>,
    stage: File,
    stage_len: u64,
    stage_crc: crc32fast::Hasher,
    stage_limit: u64,
    state: File,
}

impl Image {
    /// Open the image directory, creating it if needed.
    pub fn open(layout: &Layout) -> Result<Self, ImageError> {
        let dir = layout.image_dir();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| io_error("create", &dir, e))?;
        let open = |name: &str| {
            let path = dir.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(&path).map_err(|e| io_error("open", &path, e))
        };
        Ok(Self {
            stage: open("stage")?,
            state: open("state.new")?,
            ram_path: layout.ram(),
            ram: None,
            stage_len: 0,
            stage_crc: crc32fast::Hasher::new(),
            stage_limit: u64::MAX,
            dir,
        })
    }

    /// Let no epoch's stage grow beyond `bytes`.
    pub fn limit_stage(&mut self, bytes: u64) {
        self.stage_limit = bytes;
    }

    /// Read record and floor. A damaged record means that the image is lost, not that the node is: it reads as
    /// inconsistent, with the reason. A damaged floor is an error, because an old primary could slip in.
    pub fn load(&self) -> Result<(Durable, Option<String>), ImageError> {
        let floor = durable::load::<Generation>(&self.dir.join("floor"))?.unwrap_or(Generation::ZERO);
        Ok(match durable::load::<Record>(&self.dir.join("record")) {
            Ok(record) => (Durable { floor, record: record.unwrap_or_default() }, None),
            Err(e) => (Durable { floor, record: Record::default() }, Some(e.to_string())),
        })
    }

    /// Which RAM file stands at its path now.
    pub fn ram_identity(&self) -> Option<RamIdentity> {
        fs::metadata(&self.ram_path).ok().filter(fs::Metadata::is_file).map(|m| identity(&m))
    }

    /// The device state of a committed epoch.
    pub fn state_file(&self, generation: Generation, epoch: Epoch) -> PathBuf {
        self.dir.join(format!("state-{generation}-{epoch}"))
    }

    /// Perform a step that concerns files; `frame` is the message that it came from. Steps that concern connections or the
    /// cluster are not its business.
    pub fn perform(&mut self, step: &Step, frame: Option<(&Header, &[u8])>) -> Result<(), ImageError> {
        let payload = frame.map_or(&[][..], |(_, payload)| payload);
        match step {
            Step::SaveFloor(generation) => Ok(durable::store(&self.dir.join("floor"), generation)?),
            Step::SaveRecord(record) => {
                durable::store(&self.dir.join("record"), record)?;
                Ok(())
            }
            Step::WriteSync => self.write_pages(payload),
            Step::ResetStage => self.reset_stage(),
            Step::AppendStage => match frame {
                Some((header, payload)) => self.append_stage(header, payload),
                None => Ok(()),
            },
            Step::AppendState => self.state.write_all(payload).map_err(|e| self.error("write", "state.new", e)),
            Step::Commit(record) => self.commit(record),
            Step::Apply => self.apply(),
            Step::Send(..) | Step::Close(_) | Step::Report(_) => Ok(()),
        }
    }

    /// Empty the stage: it belongs to no commit record any more.
    pub fn reset_stage(&mut self) -> Result<(), ImageError> {
        self.stage_len = 0;
        self.stage_crc = crc32fast::Hasher::new();
        let reset = |file: &mut File| file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0)));
        let done = reset(&mut self.stage).and_then(|_| reset(&mut self.state));
        done.map(|_| ()).map_err(|e| self.error("empty", "stage", e))
    }

    fn append_stage(&mut self, header: &Header, payload: &[u8]) -> Result<(), ImageError> {
        let full = |_| ImageError::StageFull { limit: u64::from(u32::MAX) };
        let head = frame::encode_header(header, &[payload]).map_err(full)?;
        self.stage_len += (head.len() + payload.len()) as u64;
        if self.stage_len > self.stage_limit {
            return Err(ImageError::StageFull { limit: self.stage_limit });
        }
        self.stage_crc.update(&head);
        self.stage_crc.update(payload);
        let written = self.stage.write_all(&head).and_then(|()| self.stage.write_all(payload));
        written.map_err(|e| self.error("write", "stage", e))
    }

    fn commit(&mut self, record: &Record) -> Result<(), ImageError> {
        // The image would be lost with a RAM file that nobody can open any more.
        if self.ram_identity() != record.ram || self.open_ram()?.1 != record.ram {
            return Err(ImageError::RamReplaced(self.ram_path.display().to_string()));
        }
        self.stage.sync_data().map_err(|e| self.error("write", "stage", e))?;
        self.state.sync_data().map_err(|e| self.error("write", "state.new", e))?;
        let state = self.state_file(record.generation, record.epoch);
        fs::rename(self.dir.join("state.new"), &state).map_err(|e| io_error("rename to", &state, e))?;
        let pending = Pending { stage_len: self.stage_len, stage_crc: self.stage_crc.clone().finalize() };
        let path = self.dir.join("state.new");
        self.state = File::create(&path).map_err(|e| io_error("create", &path, e))?;
        durable::store(&self.dir.join("record"), &Record { pending: Some(pending), ..record.clone() })?;
        self.remove_other_states(&state);
        Ok(())
    }

    /// Device states of epochs that are not the committed one only take room.
    fn remove_other_states(&self, keep: &Path) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_state = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("state-"));
            if is_state && path != keep {
                // It is in nobody's way except by its size; the next commit tries again.
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Check that the stage is the one that was committed: needed before applying it after a restart.
    pub fn verify_stage(&mut self, pending: Pending) -> Result<(), ImageError> {
        let damaged =
            |why: &str| ImageError::Stage { file: self.dir.join("stage").display().to_string(), why: why.to_owned() };
        let mut stage = &self.stage;
        stage.seek(SeekFrom::Start(0)).map_err(|e| self.error("read", "stage", e))?;
        let (mut crc, mut len, mut buffer) = (crc32fast::Hasher::new(), 0, vec![0; 1 << 16]);
        loop {
            let n = stage.read(&mut buffer).map_err(|e| self.error("read", "stage", e))?;
            if n == 0 {
                break;
            }
            crc.update(&buffer[..n]);
            len += n as u64;
        }
        if len != pending.stage_len {
            return Err(damaged("its length is wrong"));
        }
        if crc.finalize() != pending.stage_crc {
            return Err(damaged("its checksum is wrong"));
        }
        Ok(())
    }

    fn apply(&mut self) -> Result<(), ImageError> {
        self.open_ram()?;
        self.stage.seek(SeekFrom::Start(0)).map_err(|e| self.error("read", "stage", e))?;
        let stage = self.stage.try_clone().map_err(|e| self.error("read", "stage", e))?;
        let mut reader = BufReader::with_capacity(1 << 18, stage);
        let mut payload = Vec::new();
        loop {
            match frame::read_record(&mut reader, FRAME_LIMIT, &mut payload) {
                Ok(Some(_)) => self.write_pages(&payload)?,
                Ok(None) => return Ok(()),
                Err(e) => return Err(self.error("read", "stage", e)),
            }
        }
    }

    fn open_ram(&mut self) -> Result<(&File, Option<RamIdentity>), ImageError> {
        let current = self.ram_identity();
        if self.ram.as_ref().map(|(_, identity)| *identity) != current {
            let opened = OpenOptions::new().read(true).write(true).open(&self.ram_path);
            let file = opened.map_err(|e| io_error("open", &self.ram_path, e))?;
            let metadata = file.metadata().map_err(|e| io_error("look at", &self.ram_path, e))?;
            self.ram = Some((file, identity(&metadata)));
        }
        match &self.ram {
            Some((file, identity)) => Ok((file, Some(*identity))),
            None => Err(ImageError::RamReplaced(self.ram_path.display().to_string())),
        }
    }

    fn write_pages(&mut self, batch: &[u8]) -> Result<(), ImageError> {
        static ZEROS: [u8; 64 * PAGE] = [0; 64 * PAGE];
        if self.ram.is_none() {
            self.open_ram()?;
        }
        let Some((ram, identity)) = &self.ram else { return Ok(()) };
        enum Fault {
            Batch(BatchError),
            Io(io::Error),
        }
        impl From<BatchError> for Fault {
            fn from(e: BatchError) -> Self {
                Self::Batch(e)
            }
        }
        let written = for_each_record(batch, identity.bytes / PAGE as u64, |record| {
            match record {
                PageRecord::Page { index, bytes } => ram.write_all_at(bytes, index * PAGE as u64).map_err(Fault::Io)?,
                PageRecord::Zeros { index, count } => {
                    let (mut at, end) = (index * PAGE as u64, (index + count) * PAGE as u64);
                    while at < end {
                        let n = (end - at).min(ZEROS.len() as u64);
                        ram.write_all_at(&ZEROS[..n as usize], at).map_err(Fault::Io)?;
                        at += n;
                    }
                }
            }
            Ok(())
        });
        written.map_err(|fault| match fault {
            Fault::Io(e) => io_error("write", &self.ram_path, e),
            Fault::Batch(e) => self.error("read", "stage", io::Error::other(e)),
        })
    }

    /// Make sure that the next access opens the RAM file that is at its path then.
    pub fn forget_ram(&mut self) {
        self.ram = None;
    }

    fn error(&self, what: &'static str, name: &str, source: io::Error) -> ImageError {
        io_error(what, &self.dir.join(name), source)
    }
}

fn identity(metadata: &fs::Metadata) -> RamIdentity {
    RamIdentity { dev: metadata.dev(), ino: metadata.ino(), bytes: metadata.len() }
}

fn io_error(what: &'static str, file: &Path, source: io::Error) -> ImageError {
    ImageError::Io { what, file: file.display().to_string(), source }
}
