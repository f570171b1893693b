//! The image on disk: performs the receiver's steps on real files.
//!
//! ```text
//! SHM/MACHINE/ram               guest RAM, created by the VMM
//! SHM/MACHINE/image/record      what RAM and stage together are      (durable.rs)
//! SHM/MACHINE/image/floor       highest generation seen
//! SHM/MACHINE/image/stage       pages of the epoch that is arriving    (stage.rs)
//! SHM/MACHINE/image/stage.index which pages, and their hashes
//! SHM/MACHINE/image/state.new   device state of an epoch that is about to be committed
//! SHM/MACHINE/image/state-G-E   device state of the committed epoch E of generation G
//! ```
//! RAM is written with `pwrite`, not through a mapping: a full tmpfs is then an error, not a signal. Every page is written
//! at least once in a first copy, zero pages too, so applying a committed epoch later never needs new memory.
//!
//! What arrives is decoded here ([`crate::codec`]): pages over those of the stage or of RAM, the device state over the committed
//! one. [`Step::Verify`] compares the result with what the sender says of it. Anything that is wrong with it is an
//! [`ImageError::Content`]: sending the same again would not help.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use understudy_protocol::frame::Header;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::layout::Layout;

use crate::codec::state::{self, STATE_LIMIT};
use crate::codec::{BatchError, Decoder, PAGE, Page, PageHash, Target};
use crate::durable::{self, Durable, DurableError, Pending, RamIdentity, Record};
use crate::message::End;
use crate::receiver::Step;
use crate::stage::{OverRam, Stage, read_page};
use crate::verify::{self, Check, PageSet};

/// Most payload bytes of one frame between replicators and in the stage.
pub const FRAME_LIMIT: usize = 1 << 20;

/// Pages that a comparison reads at once.
const COMPARED_AT_ONCE: usize = 64;

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
    /// What the sender sent is not what it says, or cannot be made whole with what is here.
    #[error("{0}")]
    Content(String),
    /// A copy of a mirrored disk could not be read or written.
    #[error("{0}")]
    Copy(String),
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

impl From<BatchError> for ImageError {
    fn from(e: BatchError) -> Self {
        Self::Content(e.to_string())
    }
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
    stage: Stage,
    decoder: Decoder,
    /// Encoded device state of the epoch that is arriving, and the same decoded.
    encoded_state: Vec<u8>,
    state: Vec<u8>,
    /// Device state of the epoch that was committed last.
    committed: Option<(Generation, Epoch, Vec<u8>)>,
    /// What an earlier process may have left behind is gone.
    swept: bool,
    /// Pages on their way to RAM in a first copy.
    run: Vec<u8>,
    /// While somebody copies the image: pages of RAM that were written since.
    changed: Option<PageSet>,
}

impl Image {
    /// Open the image directory, creating it if needed.
    pub fn open(layout: &Layout) -> Result<Self, ImageError> {
        let dir = layout.image_dir();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| io_error("create", &dir, e))?;
        Ok(Self {
            stage: Stage::open(&dir)?,
            ram_path: layout.ram(),
            ram: None,
            decoder: Decoder::default(),
            encoded_state: Vec::new(),
            state: Vec::new(),
            committed: None,
            swept: false,
            run: Vec::new(),
            changed: None,
            dir,
        })
    }

    /// Let no epoch's stage grow beyond `bytes`.
    pub fn limit_stage(&mut self, bytes: u64) {
        self.stage.limit(bytes);
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
            Step::BeginDigest => {
                self.decoder.begin();
                self.encoded_state.clear();
                Ok(())
            }
            Step::WriteSync => self.write_sync(payload),
            Step::ResetStage => {
                self.encoded_state.clear();
                self.stage.reset()
            }
            Step::AppendStage => self.append_stage(payload),
            Step::AppendState => {
                if self.encoded_state.len() + payload.len() > STATE_LIMIT {
                    return Err(ImageError::Content("the device state is larger than any machine's".into()));
                }
                self.encoded_state.extend_from_slice(payload);
                Ok(())
            }
            Step::Verify { epoch, end, base } => self.verify(*epoch, end, *base),
            Step::Commit(record) => self.commit(record),
            Step::Apply => self.apply(),
            Step::Send(..) | Step::Close(_) | Step::Report(_) | Step::Compare => Ok(()),
            // Whoever has the copies does these.
            Step::OpenCopies { .. } | Step::CloseCopies | Step::BeginCopies | Step::ApplyPart => Ok(()),
            Step::CheckCopy => Ok(()),
            Step::FlushCopies | Step::StepCopies | Step::AppendLog | Step::SealCopies | Step::CommitCopies => Ok(()),
        }
    }

    /// Empty the stage and give its room back: it belongs to no commit record any more.
    pub fn reset_stage(&mut self) -> Result<(), ImageError> {
        self.encoded_state = Vec::new();
        // A state that was not committed takes room too; there may be none.
        let _ = fs::remove_file(self.dir.join("state.new"));
        self.stage.release()
    }

    fn append_stage(&mut self, batch: &[u8]) -> Result<(), ImageError> {
        self.open_ram_once()?;
        let Some((ram, identity)) = &self.ram else { return Ok(()) };
        let ram_pages = identity.bytes / PAGE as u64;
        let mut target = OverRam { stage: &mut self.stage, ram, ram_path: &self.ram_path, ram_pages };
        self.decoder.batch(batch, ram_pages, &mut target)
    }

    /// Pages of a first copy go straight to RAM, which is nobody's image meanwhile.
    fn write_sync(&mut self, batch: &[u8]) -> Result<(), ImageError> {
        self.open_ram_once()?;
        // Whoever copies has to begin again: RAM is no epoch's now.
        self.changed = None;
        let Some((ram, identity)) = &self.ram else { return Ok(()) };
        self.run.clear();
        let mut target = Straight { ram, ram_path: &self.ram_path, begin: 0, run: &mut self.run };
        self.decoder.batch(batch, identity.bytes / PAGE as u64, &mut target)?;
        target.flush()
    }

    /// Whether what has arrived is what the sender captured.
    fn verify(&mut self, epoch: Epoch, end: &End, base: Option<(Generation, Epoch)>) -> Result<(), ImageError> {
        let content = |why: String| Err(ImageError::Content(why));
        self.load_state(base);
        let held = self.committed.as_ref().map(|(_, epoch, state)| (*epoch, &state[..])).filter(|_| base.is_some());
        self.state = match state::decode(&self.encoded_state, held) {
            Ok(state) => state,
            Err(e) => return content(format!("epoch {epoch} has no device state: {e}")),
        };
        let (pages, len) = (self.decoder.digest().pages(), self.state.len() as u64);
        if (pages, len) != (end.pages, end.state_len) {
            return content(format!(
                "epoch {epoch} arrived with {pages} pages and {len} bytes of device state instead of {} and {}",
                end.pages, end.state_len
            ));
        }
        self.decoder.digest().state(&self.state);
        if self.decoder.digest().finish() != end.digest {
            return content(format!("epoch {epoch} differs from what the primary captured (its digest is wrong)"));
        }
        Ok(())
    }

    /// Have the device state of the committed epoch at hand; after a restart it is in its file.
    fn load_state(&mut self, base: Option<(Generation, Epoch)>) {
        let Some((generation, epoch)) = base else { return };
        if self.committed.as_ref().is_none_or(|(g, e, _)| (*g, *e) != (generation, epoch)) {
            // A state that cannot be read is a base that is not here: the sender begins again.
            let state = fs::read(self.state_file(generation, epoch)).ok();
            self.committed = state.map(|state| (generation, epoch, state));
        }
    }

    fn commit(&mut self, record: &Record) -> Result<(), ImageError> {
        // The image would be lost with a RAM file that nobody can open any more.
        if self.ram_identity() != record.ram || self.open_ram()?.1 != record.ram {
            return Err(ImageError::RamReplaced(self.ram_path.display().to_string()));
        }
        let pending = self.stage.finish(self.decoder.seed())?;
        let new = self.dir.join("state.new");
        let write = || {
            let mut options = OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all_at(&self.state, 0)?;
            file.sync_data()
        };
        write().map_err(|e| io_error("write", &new, e))?;
        let file = self.state_file(record.generation, record.epoch);
        fs::rename(&new, &file).map_err(|e| io_error("rename to", &file, e))?;
        durable::store(&self.dir.join("record"), &Record { pending: Some(pending), ..record.clone() })?;
        let (mut spare, old) = match self.committed.take() {
            Some((generation, epoch, state)) => (state, Some(self.state_file(generation, epoch))),
            None => (Vec::new(), None),
        };
        match old {
            // The only other one is the epoch's before. It is in nobody's way except by its size.
            Some(old) if old != file && self.swept => drop(fs::remove_file(old)),
            _ => self.remove_other_states(&file),
        }
        self.swept = true;
        std::mem::swap(&mut spare, &mut self.state);
        self.committed = Some((record.generation, record.epoch, spare));
        Ok(())
    }

    /// Device states of epochs that are not the committed one only take room.
    fn remove_other_states(&self, keep: &Path) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_state = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("state-"));
            if is_state && path != keep {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Check that the stage is the one that was committed: needed before applying it after a restart.
    pub fn verify_stage(&mut self, pending: Pending) -> Result<(), ImageError> {
        let ram_pages = self.ram_identity().map_or(0, |ram| ram.bytes / PAGE as u64);
        self.stage.load(pending, ram_pages)
    }

    fn apply(&mut self) -> Result<(), ImageError> {
        self.open_ram()?;
        let Some((ram, _)) = &self.ram else { return Ok(()) };
        if let Some(changed) = &mut self.changed {
            self.stage.pages().for_each(|page| changed.insert(page));
        }
        self.stage.apply(ram).map_err(|e| io_error("write", &self.ram_path, e))
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

    fn open_ram_once(&mut self) -> Result<(), ImageError> {
        if self.ram.is_none() {
            self.open_ram()?;
        }
        Ok(())
    }

    /// Note from now on which pages of RAM are written: somebody copies it. RAM to read from, and its identity.
    pub fn begin_copy(&mut self) -> Result<(File, RamIdentity), ImageError> {
        self.open_ram()?;
        let Some((ram, identity)) = &self.ram else {
            return Err(ImageError::RamReplaced(self.ram_path.display().to_string()));
        };
        let file = ram.try_clone().map_err(|e| io_error("open", &self.ram_path, e))?;
        self.changed = Some(PageSet::none(identity.bytes / PAGE as u64));
        Ok((file, *identity))
    }

    /// The pages written since [`Image::begin_copy`] or the last call; `None` if what was copied is of no use any more.
    pub(crate) fn changed_since(&mut self) -> Option<PageSet> {
        let (_, identity) = self.ram.as_ref()?;
        let none = PageSet::none(identity.bytes / PAGE as u64);
        self.changed.as_mut().map(|changed| std::mem::replace(changed, none))
    }

    /// Stop noting.
    pub fn end_copy(&mut self) {
        self.changed = None;
    }

    /// The pages of `check` whose content in RAM is another one.
    pub fn compare(&mut self, check: &Check) -> Result<Vec<u64>, ImageError> {
        self.open_ram()?;
        let Some((ram, _)) = &self.ram else { return Ok(Vec::new()) };
        let mut differing = Vec::new();
        let mut block = vec![0; COMPARED_AT_ONCE * PAGE];
        // Runs of neighbours are read at once.
        for run in check.pages().chunk_by(|a, b| a.0 + 1 == b.0).flat_map(|run| run.chunks(COMPARED_AT_ONCE)) {
            let bytes = &mut block[..run.len() * PAGE];
            ram.read_exact_at(bytes, run[0].0 * PAGE as u64).map_err(|e| io_error("read", &self.ram_path, e))?;
            let pages = run.iter().zip(bytes.chunks_exact(PAGE));
            differing.extend(pages.filter(|((_, hash), page)| verify::hash(page) != *hash).map(|((page, _), _)| page));
        }
        Ok(differing)
    }

    /// Make sure that the next access opens the RAM file that is at its path then.
    pub fn forget_ram(&mut self) {
        self.ram = None;
        // It may be another one.
        self.changed = None;
    }
}

/// Pages to RAM, neighbours together.
struct Straight<'a> {
    ram: &'a File,
    ram_path: &'a Path,
    /// Page number of the first of `run`.
    begin: u64,
    run: &'a mut Vec<u8>,
}

/// Most bytes in one write.
const RUN: usize = 64 * PAGE;

impl Straight<'_> {
    fn flush(&mut self) -> Result<(), ImageError> {
        let written = self.ram.write_all_at(self.run, self.begin * PAGE as u64);
        self.run.clear();
        written.map_err(|e| io_error("write", self.ram_path, e))
    }
}

impl Target for Straight<'_> {
    type Error = ImageError;

    fn read(&mut self, index: u64, page: &mut Page) -> Result<(), ImageError> {
        self.flush()?;
        read_page(self.ram, self.ram_path, index, page)
    }

    fn page(&mut self, index: u64, content: &Page, _hash: PageHash) -> Result<(), ImageError> {
        if self.run.len() >= RUN || self.begin + (self.run.len() / PAGE) as u64 != index {
            self.flush()?;
            self.begin = index;
        }
        self.run.extend_from_slice(content);
        Ok(())
    }

    fn zeros(&mut self, index: u64, count: u64) -> Result<(), ImageError> {
        (index..index + count).try_for_each(|index| self.page(index, &[0; PAGE], 0))
    }
}

fn identity(metadata: &fs::Metadata) -> RamIdentity {
    RamIdentity { dev: metadata.dev(), ino: metadata.ino(), bytes: metadata.len() }
}

pub(crate) fn io_error(what: &'static str, file: &Path, source: io::Error) -> ImageError {
    ImageError::Io { what, file: file.display().to_string(), source }
}
