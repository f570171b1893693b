//! The receiver's hands: performs the steps of [`crate::receiver::Receiver`] on the image, the connections and the hook.
//!
//! Everything that decides or writes runs under one lock, in the order of the steps: what a take-over finds is never half
//! of anything. A failed step is treated as a crash would be: the connection goes, and the receiver begins again from what is on disk.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_protocol::control::{PathStatus, TakenImage, TakenOver};
use understudy_protocol::frame::Header;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::VerifyStatus;

use crate::codec::PAGE;
use crate::copies::{self, Copies};
use crate::durable::ImageKind;
use crate::hook::Reporter;
use crate::image::{Image, ImageError};
use crate::link::{self, Closer, Writer};
use crate::local::local_vmm;
use crate::log;
use crate::message::{DiskChecked, Envelope, Flushed, Message, Welcome};
use crate::receiver::{Conn, Receiver, Standing, Step, Surroundings};
use crate::stats::ReceiverStats;
use crate::verify::{self, Check, PageSet};

/// How long the local VMM may think about a status request before it counts as using its RAM.
const VMM_TIMEOUT: Duration = Duration::from_secs(1);

/// Is told what was done with the copies, for which connection.
pub type OnCopiesAnswered = Arc<dyn Fn(Conn, Result<CopyAnswer, String>) + Send + Sync>;

/// What was done with the copies of mirrored disks.
#[derive(Debug, Clone)]
pub enum CopyAnswer {
    /// What was sent is durable.
    Flushed(Vec<Flushed>),
    /// A step of a comparison.
    Checked(DiskChecked),
}

/// One connection as the standby needs it.
#[derive(Debug)]
pub struct Line {
    /// For replies.
    pub writer: Writer,
    /// For ending it.
    pub closer: Closer,
    /// When it said something last.
    pub heard: Instant,
    /// Address, for people.
    pub address: String,
}

/// Counters for the status.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Pages and state received, before encoding.
    pub raw_bytes: u64,
    /// As they came.
    pub wire_bytes: u64,
    /// Epochs committed.
    pub epochs: u64,
    /// When the last one was.
    pub committed_at: Option<Instant>,
    /// Senders lost.
    pub losses: u64,
    /// When the current first copy began, and how long the last one took.
    pub sync_began: Option<Instant>,
    /// See there.
    pub last_sync: Duration,
    /// The last thing worth telling.
    pub note: String,
    /// Histograms.
    pub stats: ReceiverStats,
    /// Comparisons with the primary's RAM.
    pub verify: VerifyStatus,
}

/// The receiving side of one machine on this node.
pub struct Standby {
    machine: String,
    node: String,
    layout: Layout,
    core: Receiver,
    image: Image,
    lines: HashMap<Conn, Line>,
    reporter: Option<Reporter>,
    /// Recovery failed; nothing is received until it succeeds.
    broken: Option<String>,
    state_bytes: u64,
    /// Somebody copies the image.
    copying: bool,
    /// It receives a machine that moves here.
    migration: bool,
    /// Copies of mirrored disks, and who is told of what is done with them in other threads.
    copies: Copies,
    answer: Option<OnCopiesAnswered>,
    /// For the status.
    pub counters: Counters,
}

impl Standby {
    /// Open the image and repair it.
    pub fn open(machine: &str, node: &str, layout: &Layout, stage_limit: Option<u64>) -> Result<Self, ImageError> {
        let mut image = Image::open(layout)?;
        if let Some(limit) = stage_limit {
            image.limit_stage(limit);
        }
        let (durable, _) = image.load()?;
        let mut this = Self {
            core: Receiver::recover(machine, node, durable, None, &mut Vec::new()),
            machine: machine.to_owned(),
            node: node.to_owned(),
            layout: layout.clone(),
            image,
            lines: HashMap::new(),
            reporter: None,
            broken: None,
            state_bytes: 0,
            copying: false,
            migration: false,
            copies: Copies::default(),
            answer: None,
            counters: Counters::default(),
        };
        this.recover()?;
        Ok(this)
    }

    /// Begin again from what is on disk.
    fn recover(&mut self) -> Result<(), ImageError> {
        self.broken = Some("the image is being repaired".into());
        self.image.forget_ram();
        let (durable, damage) = self.image.load()?;
        let pending = durable.record.pending;
        let mut steps = Vec::new();
        let ram = self.image.ram_identity();
        self.core = Receiver::recover(&self.machine, &self.node, durable, ram, &mut steps);
        if self.migration {
            self.core.receive_migration();
        }
        if let Some(damage) = damage {
            self.note(format!("{damage}; it counts as empty"));
            self.core.give_up_image(&mut steps);
        }
        if let (Some(pending), true) = (pending, steps.contains(&Step::Apply)) {
            match self.image.verify_stage(pending) {
                Ok(()) => self
                    .note(format!("the committed epoch {} is being applied again", self.core.durable().record.epoch)),
                Err(why @ ImageError::Stage { .. }) => {
                    self.note(format!("{why}; the image is lost"));
                    steps.clear();
                    self.core.give_up_image(&mut steps);
                }
                Err(e) => return Err(e),
            }
        }
        self.perform(&steps, None)?;
        // Half an epoch means nothing, and takes room that a full file system needs.
        self.image.reset_stage()?;
        self.broken = None;
        Ok(())
    }

    /// Try again to repair, if an earlier attempt failed.
    pub fn retry(&mut self) {
        if self.broken.is_some()
            && let Err(e) = self.recover()
        {
            self.note(format!("the image cannot be repaired: {e}"));
        }
    }

    /// Receive a machine that moves here, not checkpoints of one that is protected.
    pub fn receive_migration(&mut self) {
        self.migration = true;
        self.core.receive_migration();
    }

    /// Whether this connection is still listened to.
    pub fn listens_to(&self, conn: Conn) -> bool {
        self.lines.contains_key(&conn)
    }

    /// Whether the image is a whole machine that was handed over to this node, and that nobody has run yet.
    pub fn was_given_the_machine(&self) -> bool {
        let record = &self.core.durable().record;
        record.image == ImageKind::Whole && record.handed_over && record.taken.is_none()
    }

    /// A connection has proved that it holds the key.
    pub fn connected(&mut self, conn: Conn, line: Line) {
        self.lines.insert(conn, line);
    }

    /// A frame came.
    pub fn frame(&mut self, conn: Conn, header: &Header, payload: &[u8]) {
        if let Some(line) = self.lines.get_mut(&conn) {
            line.heard = Instant::now();
        }
        self.counters.wire_bytes += payload.len() as u64;
        let message = match Message::parse(header.kind, payload) {
            Ok(message) => message,
            Err(e) => return self.turn_away(conn, self.core.durable().newest(), Message::Failed(e.to_string())),
        };
        if matches!(message, Message::Hello(_)) {
            if let Some(why) = &self.broken {
                let why = format!("{} cannot receive: {why}", self.node);
                return self.turn_away(conn, self.core.durable().newest(), Message::Refused(why));
            }
            self.image.forget_ram();
        }
        let envelope = Envelope { generation: header.generation, epoch: header.epoch, message };
        let (layout, image) = (&self.layout, &self.image);
        let around = || surroundings(layout, image);
        let before = self.core.durable().record.epoch;
        let mut steps = Vec::new();
        self.core.message(conn, &envelope, around, &mut steps);
        match &envelope.message {
            Message::SyncBegin => self.counters.sync_began = Some(Instant::now()),
            // What has come so far is no part of an epoch.
            Message::Hello(_) | Message::SyncPages(_) => self.counters.stats.forget(self.counters.wire_bytes),
            Message::End(end) => self.state_bytes += end.state_len,
            _ => {}
        }
        let began = Instant::now();
        let compare = steps.contains(&Step::Compare);
        self.run(steps, Some((header, payload)));
        if let (true, Message::Check(check)) = (compare, &envelope.message) {
            self.compare(conn, header.epoch, check);
        }
        self.counters.raw_bytes = self.state_bytes + self.core.pages_received() * PAGE as u64;
        if self.core.durable().record.epoch != before && self.core.durable().record.epoch > Epoch::ZERO {
            self.counters.epochs += 1;
            self.counters.committed_at = Some(Instant::now());
            self.counters.stats.committed(began.elapsed(), self.counters.wire_bytes);
            if let Some(began) = self.counters.sync_began.take() {
                self.counters.last_sync = began.elapsed();
                let (epoch, ms) = (self.core.durable().record.epoch, self.counters.last_sync.as_millis());
                self.note(format!("the first copy took {ms} ms; epoch {epoch} is committed"));
            }
        }
    }

    fn compare(&mut self, conn: Conn, epoch: Epoch, check: &Check) {
        let differing = match self.image.compare(check) {
            Ok(differing) => differing,
            Err(e) => return self.start_over(&e.to_string()),
        };
        let counts = &mut self.counters.verify;
        counts.compared_pages += check.pages().len() as u64;
        if !differing.is_empty() {
            counts.failures += 1;
            counts.differing_pages += differing.len() as u64;
            counts.differing = differing.iter().copied().take(64).collect();
            let (n, names) = (differing.len(), verify::names(&differing));
            self.note(format!("VERIFY FAILED: {n} pages differ from the primary's in epoch {epoch}: {names}"));
        }
        let mut steps = Vec::new();
        self.core.compared(conn, epoch, differing, &mut steps);
        self.run(steps, None);
    }

    /// A connection ended.
    pub fn lost(&mut self, conn: Conn, why: &str) {
        self.lines.remove(&conn);
        if self.core.sender().is_some_and(|(c, ..)| c == conn) {
            self.counters.losses += 1;
            let epoch = self.core.durable().record.epoch;
            self.note(format!("the primary is not connected any more ({why}); the newest committed epoch is {epoch}"));
        }
        let mut steps = Vec::new();
        self.core.lost(conn, &mut steps);
        self.run(steps, None);
    }

    /// End connections that have been silent for `timeout`.
    pub fn end_silent(&mut self, timeout: Duration) {
        for line in self.lines.values() {
            if line.heard.elapsed() > timeout {
                // Its reader notices and reports the loss.
                line.closer.close();
            }
        }
    }

    /// Say no and close.
    pub fn turn_away(&mut self, conn: Conn, generation: Generation, message: Message<'static>) {
        let mut steps = Vec::new();
        self.core.lost(conn, &mut steps);
        steps.push(Step::Send(conn, generation, Epoch::ZERO, message));
        steps.push(Step::Close(conn));
        self.run(steps, None);
    }

    /// The cluster has been told.
    pub fn reported(&mut self, standing: Standing) {
        let mut steps = Vec::new();
        self.core.reported(standing, &mut steps);
        self.run(steps, None);
    }

    /// Somebody copies the image: RAM to read from, and its size in bytes. Changes are noted until [`Standby::end_copy`].
    pub fn begin_copy(&mut self) -> Result<(File, u64), String> {
        if self.copying {
            return Err("the image is being copied already".into());
        }
        self.copied_epoch()?;
        let (ram, identity) = self.image.begin_copy().map_err(|e| e.to_string())?;
        self.copying = true;
        Ok((ram, identity.bytes))
    }

    /// The pages that were written since the last call.
    pub(crate) fn changed_since(&mut self) -> Result<PageSet, String> {
        let changed = self.image.changed_since();
        changed.ok_or_else(|| {
            "a first copy or a new connection of the primary came in between (see the status); try again".into()
        })
    }

    /// The epoch that RAM is now, and the file with its device state.
    pub(crate) fn copied_epoch(&self) -> Result<(Generation, Epoch, PathBuf), String> {
        let record = &self.core.durable().record;
        if let Some(why) = &self.broken {
            return Err(format!("the image on {} cannot be used: {why}", self.node));
        }
        if let Some(taken) = &record.taken {
            return Err(format!("the image on {} was taken over by generation {}", self.node, taken.generation));
        }
        if record.image == ImageKind::Inconsistent {
            let standing = self.core.standing().word();
            return Err(format!(
                "there is no whole image on {} (it is {standing}); wait for its first copy",
                self.node
            ));
        }
        Ok((record.generation, record.epoch, self.image.state_file(record.generation, record.epoch)))
    }

    /// Nobody copies any more.
    pub fn end_copy(&mut self) {
        self.copying = false;
        self.image.end_copy();
    }

    /// Make the image a running machine's.
    pub fn take_over(&mut self, generation: Generation) -> Result<TakenOver, String> {
        if self.broken.is_some() {
            self.recover().map_err(|e| format!("the image cannot be made whole: {e}"))?;
        }
        let around = surroundings(&self.layout, &self.image);
        let mut steps = Vec::new();
        let taking = self.core.take_over(generation, around, &mut steps)?;
        if let Err(e) = self.perform(&steps, None) {
            let why = format!("the take-over could not be made durable: {e}");
            self.start_over(&why);
            return Err(why);
        }
        let image = taking.image.map(|(epoch, generation)| TakenImage {
            epoch,
            generation,
            state_file: self.image.state_file(generation, epoch).display().to_string(),
        });
        self.note(match &image {
            Some(image) => format!("taken over by generation {generation} at epoch {}", image.epoch),
            None => format!("taken over by generation {generation}; there is no image to run from"),
        });
        Ok(TakenOver { image })
    }

    /// Whether this process may become the sender.
    pub fn may_send(&self) -> Result<(), String> {
        match self.core.sender() {
            Some((_, generation, node)) => Err(format!(
                "{node} is connected as the primary of generation {generation}; take over from it before promoting this replicator"
            )),
            None => Ok(()),
        }
    }

    /// A machine of `generation` runs on this node's RAM: there is no image any more. Answers the newest generation known.
    pub fn in_use(&mut self, generation: Generation) -> Generation {
        let mut steps = Vec::new();
        self.core.become_sender(&mut steps);
        self.core.note_generation(generation, &mut steps);
        self.run(steps, None);
        self.core.durable().newest()
    }

    /// From here on the cluster is told, beginning with how it stands now.
    pub fn set_reporter(&mut self, reporter: Reporter) {
        self.reporter = Some(reporter);
        self.report_again();
    }

    /// Tell the cluster where the replica stands, from the start.
    pub fn report_again(&mut self) {
        let mut steps = Vec::new();
        self.core.report_again(&mut steps);
        self.run(steps, None);
    }

    /// Stop telling the cluster (a sender has nothing to say about its own image).
    pub fn stop_reporting(&mut self) {
        if let Some(reporter) = &self.reporter {
            reporter.cancel();
        }
    }

    /// Give the image up.
    pub fn discard(&mut self) -> Result<(), ImageError> {
        let mut steps = Vec::new();
        self.core.give_up_image(&mut steps);
        self.perform(&steps, None)
    }

    /// End all connections.
    pub fn close_all(&mut self) {
        let all: Vec<Conn> = self.lines.keys().copied().collect();
        for conn in all {
            self.close(conn);
        }
    }

    /// The decisions, for the status.
    pub fn core(&self) -> &Receiver {
        &self.core
    }

    /// Address of the connected sender.
    pub fn sender_address(&self) -> Option<&str> {
        let (conn, ..) = self.core.sender()?;
        self.lines.get(&conn).map(|line| line.address.as_str())
    }

    /// The paths to the connected sender, if there are several.
    pub fn paths(&self) -> Vec<PathStatus> {
        let line = self.core.sender().and_then(|(conn, ..)| self.lines.get(&conn));
        line.map(|line| line.closer.paths()).unwrap_or_default()
    }

    /// Remember and log something worth telling.
    pub fn note(&mut self, note: String) {
        if self.counters.note != note {
            log::line(&format!("receiver: {note}"));
            self.counters.note = note;
        }
    }

    fn run(&mut self, steps: Vec<Step>, frame: Option<(&Header, &[u8])>) {
        if let Err(e) = self.perform(&steps, frame) {
            self.start_over(&e.to_string());
            if matches!(e, ImageError::Content(_)) {
                self.core.distrust();
            }
        }
    }

    fn start_over(&mut self, why: &str) {
        self.note(why.to_owned());
        if let Some((conn, generation, _)) = self.core.sender() {
            let why = format!("{}: {why}", self.node);
            self.send(conn, generation, Epoch::ZERO, &Message::Failed(why));
            self.close(conn);
        }
        self.copies.close();
        if let Err(e) = self.recover() {
            self.note(format!("the image cannot be repaired: {e}"));
        }
    }

    fn perform(&mut self, steps: &[Step], frame: Option<(&Header, &[u8])>) -> Result<(), ImageError> {
        for step in steps {
            match step {
                Step::Send(conn, generation, epoch, message) => self.send(*conn, *generation, *epoch, message),
                Step::Close(conn) => self.close(*conn),
                Step::Report(standing) => {
                    if let Some(reporter) = &self.reporter {
                        reporter.report(*standing);
                    }
                }
                Step::OpenCopies { .. }
                | Step::CloseCopies
                | Step::BeginCopies
                | Step::ApplyPart
                | Step::CheckCopy
                | Step::FlushCopies
                | Step::StepCopies
                | Step::AppendLog
                | Step::SealCopies
                | Step::CommitCopies => self.copy_step(step, frame).map_err(ImageError::Copy)?,
                _ => self.image.perform(step, frame)?,
            }
        }
        Ok(())
    }

    fn copy_step(&mut self, step: &Step, frame: Option<(&Header, &[u8])>) -> Result<(), String> {
        let message = frame.map(|(header, payload)| Message::parse(header.kind, payload));
        // (It was parsed before the step followed from it.)
        let message = message.transpose().map_err(|e| e.to_string())?;
        match (step, message) {
            (Step::OpenCopies { disks }, _) => {
                let specs = copies::local_disks(&self.layout, VMM_TIMEOUT)?;
                self.copies.open(&self.machine, &self.node, disks, &specs)
            }
            (Step::CloseCopies, _) => {
                self.copies.close();
                Ok(())
            }
            (Step::BeginCopies, Some(Message::CopyBegin(begins))) => self.copies.begin(&begins),
            (Step::ApplyPart, Some(Message::Part(part))) => self.copies.apply(&part),
            (Step::FlushCopies, _) => {
                if let (Some(tell), Some((conn, ..))) = (self.answer.clone(), self.core.sender()) {
                    self.copies.flush(move |copies| tell(conn, copies.map(CopyAnswer::Flushed)));
                }
                Ok(())
            }
            (Step::CheckCopy, Some(Message::DiskCheck(check))) => {
                if let (Some(tell), Some((conn, ..))) = (self.answer.clone(), self.core.sender()) {
                    self.copies.check(check, move |checked| tell(conn, Ok(CopyAnswer::Checked(checked))))?;
                }
                Ok(())
            }
            (Step::StepCopies, Some(Message::InStep(tags))) => self.copies.into_step(&tags),
            (Step::AppendLog, Some(Message::Log(log))) => self.copies.append(&log),
            (Step::SealCopies, Some(Message::Seal(tags))) => self.copies.seal(&tags),
            (Step::CommitCopies, _) => self.copies.commit(),
            (step, _) => Err(format!("{step:?} does not fit what arrived")),
        }
    }

    /// Whoever is to be told what was done with the copies of mirrored disks, from other threads; it comes back with [`Standby::copies_answered`].
    pub fn on_copies_answered(&mut self, answer: OnCopiesAnswered) {
        self.answer = Some(answer);
    }

    /// Something was done with the copies, or could not be done.
    pub fn copies_answered(&mut self, conn: Conn, answer: Result<CopyAnswer, String>) {
        if self.core.sender().is_none_or(|(current, ..)| current != conn) {
            return;
        }
        let mut steps = Vec::new();
        match answer {
            Ok(CopyAnswer::Flushed(copies)) => self.core.flushed(conn, copies, &mut steps),
            Ok(CopyAnswer::Checked(checked)) => self.core.copy_checked(conn, checked, &mut steps),
            Err(why) => return self.start_over(&why),
        }
        self.run(steps, None);
    }

    fn send(&mut self, conn: Conn, generation: Generation, epoch: Epoch, message: &Message<'_>) {
        let filled = match message {
            Message::Welcome(welcome) => match self.copies.states() {
                Ok(copies) => Message::Welcome(Welcome { copies, ..welcome.clone() }),
                Err(why) => Message::Failed(why),
            },
            other => other.clone(),
        };
        let message = &filled;
        let Some(line) = self.lines.get_mut(&conn) else { return };
        if link::send(&mut line.writer, generation, epoch, message).is_err() {
            // Its reader notices and reports the loss.
            line.closer.close();
        }
    }

    fn close(&mut self, conn: Conn) {
        if let Some(line) = self.lines.remove(&conn) {
            // The last words arrive; the reader ends with the peer or the silence.
            line.closer.finish();
        }
    }
}

fn surroundings(layout: &Layout, image: &Image) -> Surroundings {
    Surroundings { vmm: local_vmm(layout, VMM_TIMEOUT), ram: image.ram_identity() }
}
