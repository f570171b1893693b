//! The receiver's decisions, without any I/O: messages in, *steps* out.
//!
//! ```text
//!            SyncBegin                 first End verified            End verified
//! (any) ──────────────► Inconsistent ─────────────────────► Whole ◄──────────────┐
//!                                                             │  └───────────────┘
//!                       newer generation, or `went_on`        ▼
//!                                                          Outdated ──SyncBegin──► Inconsistent
//! ```
//! The caller performs the steps strictly in order, and may die between (or inside) any two of them: what is on disk is
//! then still one committed epoch, or says that it is none. If a step fails, the rest must not be performed; the caller treats
//! it as if the process had crashed and builds a new core with [`Receiver::recover`] from what is on disk.
//!
//! What must hold, and is checked by `tests/simulation`:
//! * `Ack(e)` is sent only after the record that makes `e` the committed epoch is written; RAM changes only after that.
//! * The record says `Inconsistent` before the first page of a first copy reaches RAM.
//! * No message of a generation below [`Durable::newest`] changes anything; [`Receiver::take_over`] raises it for ever.

use understudy_protocol::ids::{Epoch, Generation};

use crate::codec::{PAGE, batch};
use crate::durable::{Durable, ImageKind, RamIdentity, Record, Taken};
use crate::message::{DiskChecked, End, Envelope, Flushed, Hello, Message, VERSION, Welcome};
use crate::verify::names;

/// Names a connection; never used twice in a process.
pub type Conn = u64;

/// What the cluster should be told of the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing usable.
    Inconsistent,
    /// Being filled.
    Syncing,
    /// The newest committed epoch, primary connected (or it handed over).
    UpToDate,
    /// Whole, but the machine has gone on without it.
    Outdated,
    /// Whole and perhaps newest; the primary is not connected.
    Disconnected,
}

impl Standing {
    /// The word for the hook's command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Inconsistent => "inconsistent",
            Self::Syncing => "syncing",
            Self::UpToDate => "uptodate",
            Self::Outdated => "outdated",
            Self::Disconnected => "disconnected",
        }
    }
}

/// One thing for the caller to do. "The message" is the one that was given to [`Receiver::message`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the floor durable.
    SaveFloor(Generation),
    /// Make the record durable.
    SaveRecord(Record),
    /// Forget what has come of an epoch or first copy: what follows is digested from the start.
    BeginDigest,
    /// Decode the message's pages over RAM into RAM, and digest them.
    WriteSync,
    /// Have this node's copies of these disks open; [`Message::Welcome`] says how they are.
    OpenCopies {
        /// Their names.
        disks: Vec<String>,
    },
    /// Nothing may write to the copies any more.
    CloseCopies,
    /// The message says how the copies are brought into step.
    BeginCopies,
    /// Write the message's part of a disk to its copy, or compare.
    ApplyPart,
    /// Make durable what was written to the copies, and answer with [`Receiver::flushed`].
    FlushCopies,
    /// The copies have everything up to the message's tags: make that durable.
    StepCopies,
    /// Do what the message says with a copy, and answer with [`Receiver::copy_checked`].
    CheckCopy,
    /// Append the message's piece to a slice of a copy.
    AppendLog,
    /// Make the slices durable, up to the message's tags.
    SealCopies,
    /// The epoch is committed: so are the slices of the copies that were sealed for it.
    CommitCopies,
    /// Begin an empty stage.
    ResetStage,
    /// Decode the message's pages over the stage and RAM into the stage, and digest them.
    AppendStage,
    /// Append the message to the epoch's encoded device state.
    AppendState,
    /// Decode the device state over the one of epoch `base`, and compare everything digested with `end`. Fails if it differs.
    Verify {
        /// The epoch that ends.
        epoch: Epoch,
        /// What the sender says of it.
        end: End,
        /// The committed epoch that it follows, if it is of the same generation; none after a first copy.
        base: Option<(Generation, Epoch)>,
    },
    /// Finish the stage's files, then make the record durable, with what names and checks them filled in.
    Commit(Record),
    /// Write the stage's pages to RAM. Idempotent.
    Apply,
    /// Compare the message's pages with RAM and answer with [`Receiver::compared`].
    Compare,
    /// Send to the connection.
    Send(Conn, Generation, Epoch, Message<'static>),
    /// Close the connection, after what was sent.
    Close(Conn),
    /// Tell the cluster.
    Report(Standing),
}

/// What the VMM on this node says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalVmm {
    /// It does not run.
    Absent,
    /// It stands by: its vCPUs never ran.
    Standby(Option<crate::durable::ProcessId>),
    /// It runs, ran, or does not say: RAM is its own.
    InUse(Generation),
}

/// The node's state at the moment of a decision.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings {
    /// The VMM.
    pub vmm: LocalVmm,
    /// The RAM file at its path, if there is one.
    pub ram: Option<RamIdentity>,
}

#[derive(Debug)]
struct Stage {
    epoch: Epoch,
    /// Device state has come.
    state: bool,
    /// The copies are sealed.
    sealed: bool,
}

#[derive(Debug)]
struct Session {
    conn: Conn,
    generation: Generation,
    id: u64,
    node: String,
    /// A first copy is under way: RAM may be written directly.
    syncing: bool,
    /// Epochs may follow: the image is whole and of this session, or the first copy has begun.
    based: bool,
    stage: Option<Stage>,
    ram: RamIdentity,
    /// Mirrored disks, and whether their copies are in step (or will be with the epoch that arrives).
    disks: usize,
    in_step: bool,
    /// 0 = nothing to tell, 1 = tell when the cluster knows, 2 = told.
    promotable: u8,
}

/// The state machine.
#[derive(Debug)]
pub struct Receiver {
    machine: String,
    node: String,
    durable: Durable,
    session: Option<Session>,
    /// What the caller was last asked to tell the cluster, and what the cluster last confirmed.
    reported: Option<Standing>,
    told: Option<Standing>,
    /// Pages received in the current first copy, for the progress.
    sync_pages: u64,
    /// Pages received since the start, for the status.
    pages: u64,
    /// What a sender sent did not fit what is here: only a first copy can be trusted.
    distrusted: bool,
    /// It receives a machine that moves here, not checkpoints of one that is protected.
    migration: bool,
}

/// The answer to a take-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taking {
    /// The image, if there is one: its epoch and the generation that made it.
    pub image: Option<(Epoch, Generation)>,
}

impl Receiver {
    /// Go on from what is on disk. The steps repair it; until they are done nothing may be received.
    pub fn recover(
        machine: &str,
        node: &str,
        durable: Durable,
        ram: Option<RamIdentity>,
        steps: &mut Vec<Step>,
    ) -> Self {
        let mut this = Self {
            machine: machine.to_owned(),
            node: node.to_owned(),
            durable,
            session: None,
            reported: None,
            told: None,
            sync_pages: 0,
            pages: 0,
            distrusted: false,
            migration: false,
        };
        let record = &this.durable.record;
        if record.image != ImageKind::Inconsistent && (record.ram.is_none() || record.ram != ram) {
            // Another RAM file, or none: the image went with the old one.
            this.give_up_image(steps);
        } else if record.pending.is_some() {
            steps.push(Step::Apply);
            this.durable.record.pending = None;
            steps.push(Step::SaveRecord(this.durable.record.clone()));
        }
        this.report(steps);
        this
    }

    /// Receive a machine that moves here. (Who protects a machine, and who migrates one, must not be mistaken for the other.)
    pub fn receive_migration(&mut self) {
        self.migration = true;
    }

    /// What is durable, as far as all steps given out so far were performed.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// The connected sender: connection, generation, node.
    pub fn sender(&self) -> Option<(Conn, Generation, &str)> {
        self.session.as_ref().map(|s| (s.conn, s.generation, s.node.as_str()))
    }

    /// The newest epoch that has begun to arrive.
    pub fn current(&self) -> Epoch {
        let stage = self.session.as_ref().and_then(|s| s.stage.as_ref());
        stage.map_or(self.durable.record.epoch, |stage| stage.epoch)
    }

    /// Where the replica stands.
    pub fn standing(&self) -> Standing {
        let record = &self.durable.record;
        match (record.image, &self.session) {
            (ImageKind::Inconsistent, Some(session)) if session.syncing => Standing::Syncing,
            (ImageKind::Inconsistent, _) => Standing::Inconsistent,
            (ImageKind::Outdated, _) => Standing::Outdated,
            (ImageKind::Whole, Some(session)) if session.based => Standing::UpToDate,
            (ImageKind::Whole, _) if record.handed_over => Standing::UpToDate,
            (ImageKind::Whole, _) => Standing::Disconnected,
        }
    }

    /// Pages received since the start.
    pub fn pages_received(&self) -> u64 {
        self.pages
    }

    /// Progress of the first copy, 0.0 to 1.0.
    pub fn sync_progress(&self) -> f64 {
        match &self.session {
            Some(s) if s.syncing => (self.sync_pages as f64 / (s.ram.bytes / PAGE as u64).max(1) as f64).min(0.999),
            _ if self.durable.record.image == ImageKind::Inconsistent => 0.0,
            _ => 1.0,
        }
    }

    /// A message came. `around` is asked for only by [`Message::Hello`].
    pub fn message(
        &mut self,
        conn: Conn,
        envelope: &Envelope<'_>,
        around: impl FnOnce() -> Surroundings,
        steps: &mut Vec<Step>,
    ) {
        if let Message::Hello(hello) = &envelope.message {
            self.hello(conn, envelope.generation, hello, around(), steps);
            return;
        }
        let Some(session) = self.session.as_mut().filter(|s| s.conn == conn) else {
            // It was replaced by a newer connection, or never introduced itself.
            steps.push(Step::Close(conn));
            return;
        };
        let reply = |message| Step::Send(conn, session.generation, envelope.epoch, message);
        if envelope.generation != session.generation {
            self.fail(conn, "the sender changed its generation within a connection".into(), steps);
            return;
        }
        match &envelope.message {
            Message::Ping => steps.push(reply(Message::Pong)),
            Message::SyncBegin => self.sync_begin(steps),
            Message::SyncPages(batch) if session.syncing && session.stage.is_none() => match batch::pages(batch) {
                Ok(pages) => {
                    steps.push(Step::WriteSync);
                    self.sync_pages += pages;
                    self.pages += pages;
                }
                Err(e) => self.fail(conn, e.to_string(), steps),
            },
            Message::CopyBegin(begins)
                if session.syncing && session.stage.is_none() && begins.len() == session.disks =>
            {
                steps.push(Step::BeginCopies);
            }
            Message::Part(part) if session.syncing && usize::from(part.disk) < session.disks => {
                steps.push(Step::ApplyPart);
            }
            Message::DiskCheck(check) if session.in_step && usize::from(check.disk()) < session.disks => {
                steps.push(Step::CheckCopy);
            }
            Message::Flush if session.disks > 0 => steps.push(Step::FlushCopies),
            Message::InStep(tags) if session.syncing && tags.len() == session.disks => {
                session.in_step = true;
                steps.push(Step::StepCopies);
            }
            Message::Log(log) if session.in_step && usize::from(log.disk) < session.disks => {
                if let Err(why) = self.begin_stage(envelope.epoch, steps) {
                    return self.fail(conn, why, steps);
                }
                steps.push(Step::AppendLog);
            }
            Message::Seal(tags) if session.in_step && tags.len() == session.disks => {
                if let Err(why) = self.begin_stage(envelope.epoch, steps) {
                    return self.fail(conn, why, steps);
                }
                if let Some(stage) = self.session.as_mut().and_then(|session| session.stage.as_mut()) {
                    stage.sealed = true;
                }
                steps.push(Step::SealCopies);
            }
            Message::Pages(batch) => {
                if let Err(why) = self.begin_stage(envelope.epoch, steps) {
                    return self.fail(conn, why, steps);
                }
                match batch::pages(batch) {
                    Ok(pages) => {
                        steps.push(Step::AppendStage);
                        self.pages += pages;
                    }
                    Err(e) => self.fail(conn, e.to_string(), steps),
                }
            }
            Message::State(_) => {
                if let Err(why) = self.begin_stage(envelope.epoch, steps) {
                    return self.fail(conn, why, steps);
                }
                if let Some(stage) = self.session.as_mut().and_then(|session| session.stage.as_mut()) {
                    stage.state = true;
                }
                steps.push(Step::AppendState);
            }
            Message::End(end) => {
                if let Err(why) = self.end(envelope.epoch, end, steps) {
                    self.fail(conn, why, steps);
                }
            }
            Message::Check(check) => {
                let record = &self.durable.record;
                let pages = session.ram.bytes / PAGE as u64;
                if record.image != ImageKind::Whole || record.epoch != envelope.epoch || !session.based {
                    let why = format!("a check of epoch {} came, but epoch {} is here", envelope.epoch, record.epoch);
                    return self.fail(conn, why, steps);
                }
                if check.pages().last().is_some_and(|(page, _)| *page >= pages) {
                    return self.fail(conn, "a check names pages beyond the end of RAM".into(), steps);
                }
                steps.push(Step::Compare);
            }
            Message::HandedOver => {
                if self.durable.record.image != ImageKind::Whole || self.durable.record.epoch != envelope.epoch {
                    let why = format!("epoch {} was handed over, but it is not the one committed here", envelope.epoch);
                    return self.fail(conn, why, steps);
                }
                let acknowledge = reply(Message::HandedOverAck);
                self.durable.record.handed_over = true;
                steps.push(Step::SaveRecord(self.durable.record.clone()));
                steps.push(acknowledge);
                self.report(steps);
            }
            other => {
                let why = format!("a message of kind {} is out of place here", other.kind());
                self.fail(conn, why, steps);
            }
        }
    }

    fn hello(
        &mut self,
        conn: Conn,
        generation: Generation,
        hello: &Hello,
        around: Surroundings,
        steps: &mut Vec<Step>,
    ) {
        let newest = self.durable.newest();
        let taken = self.durable.record.taken.map(|taken| taken.generation);
        let mut refuse = |generation, message| {
            steps.push(Step::Send(conn, generation, Epoch::ZERO, message));
            steps.push(Step::Close(conn));
        };
        if generation < newest || taken.is_some_and(|taken| generation <= taken) {
            return refuse(newest, Message::Stale);
        }
        if hello.version != VERSION || hello.machine != self.machine {
            let why = format!(
                "this is the standby of machine {} (protocol {VERSION}), not of {} (protocol {})",
                self.machine, hello.machine, hello.version
            );
            return refuse(newest, Message::Refused(why));
        }
        if hello.migration != self.migration {
            let why = match hello.migration {
                true => format!("{} protects machine {} here: it does not receive migrations", self.node, self.machine),
                false => format!("{} receives machine {} in a migration, not its checkpoints", self.node, self.machine),
            };
            return refuse(newest, Message::Refused(why));
        }
        match around.vmm {
            LocalVmm::InUse(running) if running > generation => return refuse(running, Message::Stale),
            LocalVmm::InUse(running) => {
                let why = format!(
                    "the machine's memory on {} is in use by its VMM (generation {running}); stop that VMM first",
                    self.node
                );
                return refuse(newest, Message::Refused(why));
            }
            LocalVmm::Absent | LocalVmm::Standby(_) => {}
        }
        let Some(ram) = around.ram else {
            let why = format!("{} has no memory for the machine yet: its standby VMM has not been started", self.node);
            return refuse(newest, Message::Refused(why));
        };
        if ram.bytes != hello.ram_bytes || ram.bytes % PAGE as u64 != 0 {
            let why = format!(
                "the machine has {} bytes of memory, its standby on {} has {}: configure both alike",
                hello.ram_bytes, self.node, ram.bytes
            );
            return refuse(newest, Message::Refused(why));
        }
        if let Some(old) = self.end_session(steps) {
            steps.push(Step::Close(old.conn));
        }
        if generation > self.durable.floor {
            self.durable.floor = generation;
            steps.push(Step::SaveFloor(generation));
        }
        let record = &mut self.durable.record;
        if record.image != ImageKind::Inconsistent && record.ram != Some(ram) {
            self.give_up_image(steps);
        } else if record.image == ImageKind::Whole && (hello.went_on || record.generation < generation) {
            record.image = ImageKind::Outdated;
            record.handed_over = false;
            steps.push(Step::SaveRecord(record.clone()));
        }
        let record = &self.durable.record;
        let whole = record.image == ImageKind::Whole;
        let welcome = Welcome {
            node: self.node.clone(),
            whole,
            generation: record.generation,
            epoch: record.epoch,
            // Another session than the sender's: it begins with a first copy. (A sender draws 0 once in 2^64.)
            session: if self.distrusted { 0 } else { record.session },
            // Filled in by whoever has them open.
            copies: Vec::new(),
        };
        // The sender may go on where it stopped only if nothing of its dirty log is missing.
        let based = whole && record.generation == generation && record.session == hello.session && !record.handed_over;
        // (Copies of disks can have more than the image: they are always begun with.)
        let based = based && !self.distrusted && hello.disks.is_empty();
        self.session = Some(Session {
            conn,
            generation,
            id: hello.session,
            node: hello.node.clone(),
            syncing: false,
            based,
            stage: None,
            ram,
            disks: hello.disks.len(),
            in_step: false,
            promotable: u8::from(based),
        });
        if !hello.disks.is_empty() {
            steps.push(Step::OpenCopies { disks: hello.disks.clone() });
        }
        steps.push(Step::BeginDigest);
        steps.push(Step::Send(conn, generation, Epoch::ZERO, Message::Welcome(welcome)));
        self.report(steps);
        if let Some(told) = self.told {
            // If nothing changed for the cluster (the link came back at once), no report will answer.
            self.reported(told, steps);
        }
    }

    fn sync_begin(&mut self, steps: &mut Vec<Step>) {
        let Some(session) = &mut self.session else { return };
        self.distrusted = false;
        session.syncing = true;
        session.in_step = false;
        session.based = true;
        session.stage = None;
        session.promotable = 0;
        self.sync_pages = 0;
        let ready = Step::Send(session.conn, session.generation, Epoch::ZERO, Message::SyncReady);
        // From here on RAM is no epoch's; that must be known before the first page is overwritten. What was taken over here
        // before has ended, or the hello would have been refused.
        self.durable.record = Record::default();
        steps.push(Step::SaveRecord(Record::default()));
        steps.push(Step::ResetStage);
        steps.push(Step::BeginDigest);
        steps.push(ready);
        self.report(steps);
    }

    fn begin_stage(&mut self, epoch: Epoch, steps: &mut Vec<Step>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Err("nobody is connected".into()) };
        if !session.based {
            return Err("an epoch arrived before its first copy".into());
        }
        match &session.stage {
            Some(stage) if stage.epoch == epoch => Ok(()),
            Some(stage) => Err(format!("epoch {epoch} arrived before epoch {} had ended", stage.epoch)),
            None if epoch <= self.durable.record.epoch => {
                Err(format!("epoch {epoch} arrived after epoch {} was committed", self.durable.record.epoch))
            }
            None => {
                session.stage = Some(Stage { epoch, state: false, sealed: false });
                steps.push(Step::ResetStage);
                Ok(())
            }
        }
    }

    fn end(&mut self, epoch: Epoch, end: &End, steps: &mut Vec<Step>) -> Result<(), String> {
        let Some(session) = &mut self.session else { return Err("nobody is connected".into()) };
        let Some(stage) = session.stage.take().filter(|stage| stage.epoch == epoch) else {
            return Err(format!("the end of epoch {epoch} arrived without the epoch"));
        };
        if session.disks > 0 && !stage.sealed {
            return Err(format!("epoch {epoch} arrived without its disks"));
        }
        if !stage.state || end.state_len == 0 {
            return Err(format!("epoch {epoch} arrived without device state"));
        }
        let committed = &self.durable.record;
        let follows = committed.image == ImageKind::Whole && committed.generation == session.generation;
        let base = follows.then_some((committed.generation, committed.epoch));
        steps.push(Step::Verify { epoch, end: *end, base });
        session.syncing = false;
        if session.promotable == 0 {
            session.promotable = 1;
        }
        let record = Record {
            image: ImageKind::Whole,
            generation: session.generation,
            epoch,
            session: session.id,
            ram: Some(session.ram),
            pending: None,
            taken: None,
            handed_over: false,
        };
        steps.push(Step::Commit(record.clone()));
        if session.disks > 0 {
            // Before the primary may write it to its own base: a copy in step is never behind that.
            steps.push(Step::CommitCopies);
        }
        steps.push(Step::Send(session.conn, session.generation, epoch, Message::Ack));
        steps.push(Step::Apply);
        steps.push(Step::SaveRecord(record.clone()));
        self.durable.record = record;
        self.report(steps);
        Ok(())
    }

    /// The answer to [`Step::Compare`]: these pages differ from the primary's. An image with such pages is given up, durably, before
    /// the primary hears of it.
    pub fn compared(&mut self, conn: Conn, epoch: Epoch, differing: Vec<u64>, steps: &mut Vec<Step>) {
        let Some(session) = self.session.as_ref().filter(|s| s.conn == conn) else { return };
        let generation = session.generation;
        let node = self.node.clone();
        let why = format!(
            "{} pages of the memory on {node} differ from the primary's in epoch {epoch}: {}; its image is given up",
            differing.len(),
            names(&differing)
        );
        let fit = differing.is_empty();
        if !fit {
            self.give_up_image(steps);
        }
        steps.push(Step::Send(conn, generation, epoch, Message::Checked(differing)));
        if !fit {
            self.fail(conn, why, steps);
        }
    }

    /// The answer to [`Step::CheckCopy`].
    pub fn copy_checked(&self, conn: Conn, checked: DiskChecked, steps: &mut Vec<Step>) {
        if let Some(session) = self.session.as_ref().filter(|s| s.conn == conn) {
            steps.push(Step::Send(conn, session.generation, Epoch::ZERO, Message::DiskChecked(checked)));
        }
    }

    /// The answer to [`Step::FlushCopies`].
    pub fn flushed(&self, conn: Conn, copies: Vec<Flushed>, steps: &mut Vec<Step>) {
        if let Some(session) = self.session.as_ref().filter(|s| s.conn == conn) {
            steps.push(Step::Send(conn, session.generation, Epoch::ZERO, Message::Flushed(copies)));
        }
    }

    /// The session is over, and with it what it wrote to the copies.
    fn end_session(&mut self, steps: &mut Vec<Step>) -> Option<Session> {
        let session = self.session.take()?;
        if session.disks > 0 {
            steps.push(Step::CloseCopies);
        }
        Some(session)
    }

    /// The connection ended, or its peer is silent for too long.
    pub fn lost(&mut self, conn: Conn, steps: &mut Vec<Step>) {
        if self.session.as_ref().is_some_and(|s| s.conn == conn) {
            // Half an epoch goes with the session: the stage means nothing without a commit record.
            self.end_session(steps);
            self.report(steps);
        }
    }

    /// The cluster has been told.
    pub fn reported(&mut self, standing: Standing, steps: &mut Vec<Step>) {
        self.told = Some(standing);
        let Some(session) = &mut self.session else { return };
        let current = self.reported == Some(Standing::UpToDate) && standing == Standing::UpToDate;
        if current && session.promotable == 1 && self.durable.record.image == ImageKind::Whole {
            session.promotable = 2;
            steps.push(Step::Send(session.conn, session.generation, self.durable.record.epoch, Message::Promotable));
        }
    }

    /// Make the image the property of a machine of `generation`, which will run here. After the steps no sender of a lower
    /// generation can change it any more. The error is a sentence; nothing was done then.
    pub fn take_over(
        &mut self,
        generation: Generation,
        around: Surroundings,
        steps: &mut Vec<Step>,
    ) -> Result<Taking, String> {
        let newest = self.durable.newest();
        let record = &self.durable.record;
        let again = record.taken.is_some_and(|taken| taken.generation == generation) && generation == newest;
        if generation <= newest && !again {
            return Err(format!("generation {generation} cannot take over: generation {newest} is known on this node"));
        }
        let vmm = match around.vmm {
            LocalVmm::InUse(running) if !(again && running == generation) => {
                return Err(format!("the VMM on this node already runs the machine as generation {running}"));
            }
            LocalVmm::Standby(process) => process,
            LocalVmm::InUse(_) | LocalVmm::Absent => None,
        };
        if record.image == ImageKind::Outdated {
            return Err(format!(
                "the image on {} is outdated: the machine went on without it after epoch {}. Let the replica of the other node \
                 run; to give this image up and boot cold, stop the replicator and run `understudy-replicator discard`",
                self.node, record.epoch
            ));
        }
        // RAM is untouched if nobody took it before, or the one who did is the same VMM process and never ran.
        let untouched = match record.taken {
            None => true,
            Some(taken) if taken.vmm.is_some() && taken.vmm == vmm => true,
            // The same question again, after the machine was started or before there is a VMM at all.
            Some(taken) => again && (around.vmm != LocalVmm::Absent || taken.vmm.is_none()) && vmm.is_none(),
        };
        let there = record.ram.is_some() && record.ram == around.ram;
        let image =
            (record.image == ImageKind::Whole && untouched && there).then_some((record.epoch, record.generation));
        let unused = image.is_none() && record.image == ImageKind::Whole;
        if let Some(session) = self.end_session(steps) {
            steps.push(Step::Send(session.conn, generation, Epoch::ZERO, Message::Stale));
            steps.push(Step::Close(session.conn));
        }
        if !again || unused {
            let record = &mut self.durable.record;
            if image.is_none() {
                *record = Record::default();
            }
            record.taken = Some(Taken { generation, vmm });
            steps.push(Step::SaveRecord(record.clone()));
        }
        if self.durable.floor < generation {
            self.durable.floor = generation;
            steps.push(Step::SaveFloor(generation));
        }
        self.report(steps);
        Ok(Taking { image })
    }

    /// The process becomes the sender: RAM is the running machine's, there is no image here any more.
    pub fn become_sender(&mut self, steps: &mut Vec<Step>) {
        if let Some(session) = self.end_session(steps) {
            steps.push(Step::Close(session.conn));
        }
        if self.durable.record.image != ImageKind::Inconsistent {
            self.give_up_image(steps);
        }
    }

    /// Tell the cluster once more where the replica stands (after a restart, or when it became a receiver again).
    pub fn report_again(&mut self, steps: &mut Vec<Step>) {
        self.reported = None;
        self.told = None;
        self.report(steps);
    }

    /// A generation was seen elsewhere (the local VMM's): note it, so that older senders are refused.
    pub fn note_generation(&mut self, generation: Generation, steps: &mut Vec<Step>) {
        if generation > self.durable.newest() {
            self.durable.floor = generation;
            steps.push(Step::SaveFloor(generation));
        }
    }

    /// What the sender sent does not fit what is here: it must not go on from there, nor send the same again. The image stays
    /// what it is until the first copy begins.
    pub fn distrust(&mut self) {
        self.distrusted = true;
    }

    /// The image turned out to be unusable.
    pub fn give_up_image(&mut self, steps: &mut Vec<Step>) {
        let taken = self.durable.record.taken;
        self.durable.record = Record { taken, ..Record::default() };
        steps.push(Step::SaveRecord(self.durable.record.clone()));
    }

    fn fail(&mut self, conn: Conn, why: String, steps: &mut Vec<Step>) {
        let generation = self.durable.newest();
        steps.push(Step::Send(conn, generation, Epoch::ZERO, Message::Failed(why)));
        steps.push(Step::Close(conn));
        self.lost(conn, steps);
    }

    fn report(&mut self, steps: &mut Vec<Step>) {
        if self.durable.record.taken.is_some() && self.durable.record.image == ImageKind::Whole {
            // The image is about to run here: from now on the machine speaks for itself.
            return;
        }
        let standing = self.standing();
        if self.reported != Some(standing) {
            self.reported = Some(standing);
            steps.push(Step::Report(standing));
        }
    }
}
