//! The sender's hands: performs the actions of [`crate::sender::Sender`] on the VMM's socket, RAM, the arena and the
//! stream to the peer.
//!
//! One thread runs the loop: take in what has happened, ask for the next action, do it. Four kinds of helpers post
//! into its queue: a thread that connects, a thread that reads from the peer, a thread that calls the hook, a thread that waits for the VMM's storage. Encoding and
//! sending happen after the VMM has resumed the guest.

mod copies;
mod disk_verify;
mod pages;
mod peer;
mod storage;

use std::collections::VecDeque;
use std::fs::File;
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use understudy_protocol::control::{
    Attached, Captured, ControlClient, ControlError, HandedOver, Harvested, OutputHeld, PathStatus, VmmRequest,
    VmmStatus,
};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::VerifyStatus;
use understudy_protocol::statistics::{DiskVerifyStatus, Encoding};
use understudy_protocol::urgent;

use self::copies::Copies;
use self::disk_verify::DiskVerifier;
use self::pages::Pages;
use self::storage::{Answered, Question};
use crate::codec::{BatchWriter, EncodingConfig, EpochDigest, PAGE};
use crate::hook::Hook;
use crate::link::{Closer, Encryption, Link, Writer};
use crate::log;
use crate::message::Message;
use crate::sender::{Action, Event, Facts, MigrationView, Sender, SenderConfig};
use crate::stats::SenderStats;
use crate::verify::worker::Verifier;

/// A VMM that has not answered for so long is lost.
const VMM_TIMEOUT: Duration = Duration::from_secs(10);
/// What the driver is told from outside and by its helpers.
enum Input {
    Event(Event),
    /// From the reader of connection `.0`.
    Peer(u64, Event),
    /// The connection attempt `.0` ended.
    Connect(u64, Result<Box<Link>, String>),
    HandOver(mpsc::Sender<Result<HandedOver, String>>),
    /// Compare all of RAM; the answer is the pass's number.
    Verify(mpsc::Sender<u64>),
    /// Compare all mirrored disks.
    VerifyDisks(mpsc::Sender<Result<u64, String>>),
    /// Send this, if it is still this connection.
    Say(u64, Message<'static>),
    /// What the VMM answered, if it is still this attachment.
    Answered(u64, Answered),
    Stop,
}

/// What the sender needs.
pub struct DriverConfig {
    /// Decisions.
    pub sender: SenderConfig,
    /// Other nodes: name and `host:port`, or several with commas between.
    pub peers: Vec<(String, String)>,
    /// The cluster's key.
    pub key: Arc<Key>,
    /// Of the stream to the peer.
    pub encryption: Encryption,
    /// Files.
    pub layout: Layout,
    /// How pages are encoded.
    pub encoding: EncodingConfig,
    /// The cluster's arm.
    pub hook: Hook,
    /// From one comparison of all RAM to the next; zero = only on request.
    pub verify_every: Duration,
    /// Called once the VMM is attached: notes its generation here, and says the newest that this node knows.
    pub attached: Box<dyn Fn(Generation) -> Generation + Send>,
}

/// The sender as others see it.
#[derive(Debug, Clone, Default)]
pub struct SenderView {
    /// See [`Sender`]'s getters.
    pub facts: Facts,
    /// The machine's generation.
    pub generation: Generation,
    /// Committed.
    pub committed: Epoch,
    /// Cut.
    pub current: Epoch,
    /// A veto stands.
    pub vetoed: bool,
    /// See [`Sender::protected`].
    pub protected: bool,
    /// Peer accepted us.
    pub connected: bool,
    /// See [`Sender::finished`].
    pub finished: bool,
    /// First copy under way.
    pub syncing: bool,
    /// Peer's image is whole.
    pub peer_whole: bool,
    /// Peer's image is the newest.
    pub peer_up_to_date: bool,
    /// S1's word, as text would lose the type.
    pub source: Option<understudy_protocol::control::SourceState>,
    /// Peer's name and address.
    pub peer: Option<String>,
    /// 0.0 to 1.0.
    pub progress: f64,
    /// Payload before encoding.
    pub raw_bytes: u64,
    /// After.
    pub wire_bytes: u64,
    /// Newest pauses, µs.
    pub pauses: Vec<u64>,
    /// Histograms.
    pub stats: SenderStats,
    /// How pages were encoded: bytes and pages, and what the shadow takes.
    pub encoding: (crate::codec::writer::Statistics, Encoding),
    /// Comparisons of RAM.
    pub verify: VerifyStatus,
    /// Comparisons of mirrored disks.
    pub disk_verify: DiskVerifyStatus,
    /// The paths to the peer, if it has several addresses.
    pub paths: Vec<PathStatus>,
    /// The migration, if it is one.
    pub migration: Option<MigrationView>,
}

/// A running sender.
pub struct SenderHandle {
    inputs: mpsc::Sender<Input>,
    view: Arc<Mutex<SenderView>>,
    stop: Arc<AtomicBool>,
    /// A twin of the VMM's connection, to end a call that hangs.
    vmm: Arc<Mutex<Option<UnixStream>>>,
    /// A twin of the peer's connection, for the same.
    peer: Arc<Mutex<Option<Closer>>>,
    thread: Option<JoinHandle<()>>,
}

impl SenderHandle {
    /// Start it.
    pub fn start(config: DriverConfig) -> Self {
        let (inputs, receiver) = mpsc::channel();
        let view = Arc::new(Mutex::new(SenderView::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (vmm, peer) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(None)));
        let driver = Driver {
            core: Sender::new(config.sender.clone(), Instant::now()),
            inputs: receiver,
            post: inputs.clone(),
            view: view.clone(),
            stop: stop.clone(),
            vmm_twin: vmm.clone(),
            peer_twin: peer.clone(),
            vmm: None,
            storage: storage::start(inputs.clone()),
            attachment: 0,
            arena: None,
            ram: None,
            ram_pages: 0,
            writer: None,
            connection: 0,
            next_peer: 0,
            peer_name: None,
            answers: Vec::new(),
            batch: BatchWriter::default(),
            digest: EpochDigest::default(),
            pages: Pages::default(),
            copies: Copies::default(),
            block: Vec::new(),
            kept: VecDeque::new(),
            spare: Vec::new(),
            frame: Vec::new(),
            output_twin: None,
            epoch: Epoch::ZERO,
            bitmap: Vec::new(),
            cursor: 0,
            raw_bytes: 0,
            wire_bytes: 0,
            pauses: Vec::new(),
            stats: SenderStats::default(),
            verify: Verifier::new(config.verify_every, Instant::now()),
            disk_verify: DiskVerifier::default(),
            published: Instant::now(),
            logged: Vec::new(),
            config,
        };
        let thread = thread::spawn(move || {
            urgent::this_thread();
            driver.run();
        });
        Self { inputs, view, stop, vmm, peer, thread: Some(thread) }
    }

    /// A copy of what it looks like now.
    pub fn view(&self) -> SenderView {
        lock(&self.view).clone()
    }

    /// Someone of a newer generation has shown itself.
    pub fn newer_generation(&self, generation: Generation) {
        let _ = self.inputs.send(Input::Event(Event::NewerGeneration(generation)));
    }

    /// Ask for the hand-over; the answer comes through the channel.
    pub fn hand_over(&self) -> mpsc::Receiver<Result<HandedOver, String>> {
        let (answer, receiver) = mpsc::channel();
        let _ = self.inputs.send(Input::HandOver(answer));
        receiver
    }

    /// Ask for a comparison of all mirrored disks: the pass's number.
    pub fn verify_disks(&self) -> Result<u64, String> {
        let (answer, receiver) = mpsc::channel();
        let _ = self.inputs.send(Input::VerifyDisks(answer));
        let late = "the sender does not answer in time; see its status";
        receiver.recv_timeout(VMM_TIMEOUT).map_err(|_| late.to_owned())?
    }

    /// Ask for a comparison of all RAM; the number of the pass comes through the channel.
    pub fn verify(&self) -> mpsc::Receiver<u64> {
        let (answer, receiver) = mpsc::channel();
        let _ = self.inputs.send(Input::Verify(answer));
        receiver
    }

    /// End it: the VMM's session and the connection are closed when this returns.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = self.inputs.send(Input::Stop);
        if let Some(vmm) = lock(&self.vmm).take() {
            let _ = vmm.shutdown(Shutdown::Both);
        }
        if let Some(peer) = lock(&self.peer).take() {
            peer.close();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SenderHandle {
    fn drop(&mut self) {
        self.end();
    }
}

struct Driver {
    config: DriverConfig,
    core: Sender,
    inputs: mpsc::Receiver<Input>,
    post: mpsc::Sender<Input>,
    view: Arc<Mutex<SenderView>>,
    stop: Arc<AtomicBool>,
    vmm_twin: Arc<Mutex<Option<UnixStream>>>,
    peer_twin: Arc<Mutex<Option<Closer>>>,

    /// Not here while it waits for its storage: `storage` has it then.
    vmm: Option<ControlClient>,
    storage: mpsc::Sender<Question>,
    /// Number of the attachment; answers to earlier ones are not heard.
    attachment: u64,
    /// A twin of the connection that waits for outputs.
    output_twin: Option<UnixStream>,
    arena: Option<File>,
    ram: Option<File>,
    ram_pages: u64,

    writer: Option<Writer>,
    /// Number of the newest connection attempt; what older ones say is not heard.
    connection: u64,
    next_peer: usize,
    peer_name: Option<String>,
    /// Everybody who waits for the hand-over.
    answers: Vec<mpsc::Sender<Result<HandedOver, String>>>,

    batch: BatchWriter,
    digest: EpochDigest,
    pages: Pages,
    copies: Copies,
    block: Vec<u8>,
    /// Frames of epochs that are on their way or being made, oldest first.
    kept: VecDeque<Kept>,
    /// Room of frames that need not be kept any more: the kernel clears fresh memory page by page.
    spare: Vec<Vec<u8>>,
    /// Frames that need no keeping.
    frame: Vec<u8>,
    epoch: Epoch,
    bitmap: Vec<u8>,
    /// Next page of the first copy or of the bitmap.
    cursor: u64,

    raw_bytes: u64,
    wire_bytes: u64,
    pauses: Vec<u64>,
    stats: SenderStats,
    verify: Verifier,
    disk_verify: DiskVerifier,
    published: Instant,
    /// What was logged lately.
    logged: Vec<(String, Instant)>,
}

/// An epoch's frames, for sending them again.
struct Kept {
    epoch: Epoch,
    bytes: Vec<u8>,
    /// Too large to be kept: `bytes` is not all of it.
    partial: bool,
    /// Its end is in it.
    ended: bool,
}

/// Epochs' frames whose room is used again,
const SPARES: usize = 2;
/// and room that is kept however little of it was needed.
const SPARE_FLOOR: usize = 256 << 10;
/// What others see is brought up to date when nothing has happened for so long,
const SOON: Duration = Duration::from_micros(500);
/// and at least this often.
const SHOW_EVERY: Duration = Duration::from_millis(20);
/// Encoding and sending so many pages takes less than a millisecond.
const SHORT_PIECE: u64 = 512;
/// The same sentence is not logged again within this time.
const LOG_AGAIN: Duration = Duration::from_secs(30);

/// Why sending stopped.
enum Trouble {
    /// Our own side: RAM or arena could not be read.
    Vmm(String),
    Peer(String),
}

impl Driver {
    fn run(mut self) {
        while !self.stop.load(Ordering::SeqCst) {
            while let Ok(input) = self.inputs.try_recv() {
                self.take(input);
            }
            urgent::pace();
            let action = self.core.next(Instant::now());
            // While one thing follows the other at once nobody needs to see each.
            if self.published.elapsed() > SHOW_EVERY {
                self.publish();
            }
            if let Action::Wait(until) = action {
                self.watch_memory();
                match self.inputs.recv_timeout(until.saturating_duration_since(Instant::now()).min(SOON)) {
                    Ok(input) => {
                        self.take(input);
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => self.publish(),
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                match self.inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Ok(input) => self.take(input),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                self.perform(action);
            }
        }
    }

    fn take(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Stop => {}
            Input::Event(event) => self.core.event(event, now),
            Input::Peer(connection, event) if connection == self.connection => {
                self.stats.heard(&event, now);
                self.verify.heard(&event, now);
                self.copies.heard(&event);
                if let Event::Message(_, _, Message::DiskChecked(checked)) = &event {
                    self.disk_verify.heard(checked);
                }
                if matches!(event, Event::Message(_, _, Message::Flushed(_))) && self.copies.flushing() {
                    // Another one was asked for meanwhile: the sender waits for that.
                    return;
                }
                self.core.event(event, now);
            }
            Input::Peer(..) => {}
            Input::Connect(connection, _) if connection != self.connection => {}
            Input::Connect(_, Err(why)) => self.core.event(Event::PeerLost(why), now),
            Input::Connect(connection, Ok(link)) => match self.adopt(connection, *link) {
                Ok(()) => self.core.event(Event::Connected, now),
                Err(e) => self.core.event(Event::PeerLost(format!("the connection broke at once: {e}")), now),
            },
            Input::Verify(answer) => {
                let pass = self.verify.request(now);
                // Whoever asked looks at the status next.
                lock(&self.view).verify = self.verify.report(now);
                let _ = answer.send(pass);
            }
            Input::VerifyDisks(answer) => {
                let result = match (self.copies.joined(), self.core.streaming()) {
                    (true, true) => {
                        Ok(self.disk_verify.request(&self.config.layout, self.connection, self.post.clone()))
                    }
                    _ => Err("the machine has no mirrored disk whose copy is in step (see the status)".into()),
                };
                lock(&self.view).disk_verify = self.disk_verify.report();
                let _ = answer.send(result);
            }
            Input::Say(connection, _) if connection != self.connection => {}
            Input::Say(_, message) => {
                if let Err(trouble) = self.send_message(Epoch::ZERO, &message) {
                    self.core.event(trouble.event(), now);
                }
            }
            Input::Answered(attachment, _) if attachment != self.attachment => {}
            Input::Answered(_, answered) => {
                let event = self.answered(answered);
                self.happened(event);
            }
            Input::HandOver(answer) => {
                self.answers.push(answer);
                self.core.event(Event::HandOver, now);
            }
        }
    }

    fn perform(&mut self, action: Action) {
        let event = match action {
            Action::Wait(_) => None,
            Action::Attach => Some(self.attach()),
            Action::Detach => {
                self.detach();
                None
            }
            Action::Quit => Some(self.quit()),
            Action::DirtyLogStart => Some(self.done(&VmmRequest::DirtyLogStart)),
            Action::Committed(epoch) => {
                self.forget_kept(|kept| kept.epoch <= epoch);
                self.ask(VmmRequest::Committed { epoch })
            }
            Action::SealDisks(epoch) => self.ask(VmmRequest::SealDisks { epoch }),
            Action::BeginCopies => Some(self.begin_copies().unwrap_or_else(Trouble::event)),
            Action::CopyDisks => Some(urgent::heavy(true, || self.copy_disks().unwrap_or_else(Trouble::event))),
            Action::SendDisks => {
                let now = Instant::now();
                self.send_disks().into_iter().for_each(|event| self.core.event(event, now));
                None
            }
            Action::GateOpen => Some(self.done(&VmmRequest::GateOpen)),
            Action::Harvest { send } => Some(self.harvest(send)),
            Action::SendDirty => Some(urgent::heavy(true, || self.send_dirty().unwrap_or_else(Trouble::event))),
            Action::CopySlice { first } => {
                Some(urgent::heavy(true, || self.copy_slice(first).unwrap_or_else(Trouble::event)))
            }
            Action::Precopy(epoch) => {
                self.begin_epoch(epoch, false);
                Some(match self.call::<Captured>(&VmmRequest::Precopy { epoch }) {
                    Ok(captured) => {
                        self.stats.captured(&captured);
                        Event::Precopied(Captured { more: true, ..captured })
                    }
                    Err(event) => event,
                })
            }
            Action::Throttle(percent) => Some(self.done(&VmmRequest::Throttle { percent })),
            Action::Cut { epoch, arm, last, again } => {
                self.stats.cut(epoch, arm, Instant::now());
                self.verify.cut(epoch);
                self.begin_epoch(epoch, again);
                Some(self.captured(&VmmRequest::Cut { epoch, arm, last, again }))
            }
            Action::CutContinue => Some(self.captured(&VmmRequest::CutContinue)),
            Action::SendPiece(captured) => {
                urgent::heavy(captured.pages > SHORT_PIECE, || self.send_piece(captured));
                None
            }
            Action::Resend { after } => Some(match urgent::heavy(true, || self.resend(after)) {
                Ok(()) => Event::Resent,
                Err(trouble) => trouble.event(),
            }),
            Action::Connect => {
                self.connect();
                None
            }
            Action::Send(_, Message::Flush) => self.send_flush().err().map(Trouble::event),
            Action::Send(epoch, message) => {
                if message == Message::SyncBegin {
                    self.kept.clear();
                    self.digest = EpochDigest::default();
                    self.batch.clear();
                    self.stats.first_copy(self.wire_bytes);
                    self.verify.first_copy();
                }
                self.send_message(epoch, &message).err().map(Trouble::event)
            }
            Action::Disconnect => {
                self.disconnect();
                None
            }
            Action::Hook(call) => {
                let (hook, post) = (self.config.hook.clone(), self.post.clone());
                let peer = self.peer_name.clone().or_else(|| self.config.peers.first().map(|(name, _)| name.clone()));
                let generation = self.core.generation();
                thread::spawn(move || {
                    let result = hook.veto(call, peer.as_deref().unwrap_or("none"));
                    let superseded = result.as_ref().is_err_and(|refusal| refusal.superseded);
                    let result = result.map_err(|refusal| refusal.why);
                    let _ = post.send(Input::Event(Event::Hook(call, result)));
                    if superseded {
                        let _ = post.send(Input::Event(Event::NewerGeneration(generation.next())));
                    }
                });
                None
            }
            Action::AnswerHandOver(result) => {
                // Whoever is answered looks at the view next.
                self.publish();
                for answer in self.answers.drain(..) {
                    let _ = answer.send(result.clone());
                }
                None
            }
        };
        if let Some(event) = event {
            self.happened(event);
        }
    }

    fn happened(&mut self, event: Event) {
        // Whoever lost the VMM has no use for its files.
        if matches!(event, Event::VmmLost(_)) {
            self.detach();
        }
        self.core.event(event, Instant::now());
    }

    // The VMM.

    fn attach(&mut self) -> Event {
        let connected = ControlClient::connect(self.config.layout.vmm_socket(), VMM_TIMEOUT);
        let client = match connected {
            Ok(client) => client,
            Err(e) => return Event::VmmRefused(e.to_string()),
        };
        *lock(&self.vmm_twin) = client.stream().try_clone().ok();
        if self.stop.load(Ordering::SeqCst) {
            return Event::VmmRefused("the replicator is stopping".into());
        }
        self.vmm = Some(client);
        let request = if self.core.migrates() { VmmRequest::AttachToMigrate } else { VmmRequest::Attach };
        let attached: Attached = match self.call(&request) {
            Ok(attached) => attached,
            Err(Event::VmmLost(why) | Event::VmmRefused(why)) => {
                self.detach();
                return Event::VmmRefused(why);
            }
            Err(other) => return other,
        };
        // Not every VMM answers this on the session's connection; zero then means that epochs begin at 1.
        let last_cut = self.call::<VmmStatus>(&VmmRequest::Status).map_or(Epoch::ZERO, |status| status.last_cut);
        let open =
            |path: std::path::PathBuf| File::open(&path).map_err(|e| format!("cannot open {}: {e}", path.display()));
        match (open(self.config.layout.ram()), open(self.config.layout.arena())) {
            (Ok(ram), Ok(arena)) => (self.ram, self.arena) = (Some(ram), Some(arena)),
            (Err(why), _) | (_, Err(why)) => {
                self.detach();
                return Event::VmmRefused(why);
            }
        }
        self.ram_pages = attached.ram_bytes / PAGE as u64;
        let newest = (self.config.attached)(attached.generation);
        if newest > attached.generation {
            let _ = self.post.send(Input::Event(Event::NewerGeneration(newest)));
        }
        let session = random();
        if !self.core.migrates() {
            self.watch_outputs();
        }
        Event::Attached { attached, last_cut, session }
    }

    /// Frames of `epoch` come now, unless they began before; `afresh`: those that did are forgotten.
    fn begin_epoch(&mut self, epoch: Epoch, afresh: bool) {
        let begun = self.kept.back().is_some_and(|kept| kept.epoch == epoch);
        if begun && !afresh {
            return;
        }
        if afresh {
            self.forget_kept(|kept| kept.epoch >= epoch);
            // What was sent early counts as known to the standby, and it has forgotten it.
            self.batch.forget_receiver();
            self.digest = EpochDigest::default();
        }
        self.epoch = epoch;
        let bytes = self.spare.pop().unwrap_or_default();
        self.kept.push_back(Kept { epoch, bytes, partial: false, ended: false });
    }

    /// Frames that nobody will ask for again.
    fn forget_kept(&mut self, which: impl Fn(&Kept) -> bool) {
        while let Some(at) = self.kept.iter().position(&which) {
            let Some(Kept { mut bytes, .. }) = self.kept.remove(at) else { return };
            // A burst's room is not kept when epochs are small again.
            if self.spare.len() < SPARES && bytes.capacity() / 8 <= bytes.len() + SPARE_FLOOR {
                bytes.clear();
                self.spare.push(bytes);
            }
        }
    }

    /// A thread that hears from the VMM when outputs begin to wait.
    fn watch_outputs(&mut self) {
        let Ok(mut client) = ControlClient::connect(self.config.layout.vmm_socket(), VMM_TIMEOUT * 2) else { return };
        self.output_twin = client.stream().try_clone().ok();
        let post = self.post.clone();
        thread::spawn(move || {
            urgent::this_thread();
            let mut seen = 0;
            loop {
                let request = VmmRequest::AwaitOutput { seen, timeout_ms: VMM_TIMEOUT.as_millis() as u64 };
                match client.call::<_, OutputHeld>(&request) {
                    Ok(OutputHeld { number }) if number > seen => {
                        seen = number;
                        if post.send(Input::Event(Event::OutputWaits)).is_err() {
                            return;
                        }
                    }
                    Ok(_) => {}
                    // The VMM is gone, or too old to tell: cuts come at their interval then.
                    Err(_) => return,
                }
            }
        });
    }

    fn detach(&mut self) {
        if let Some(twin) = self.output_twin.take() {
            let _ = twin.shutdown(Shutdown::Both);
        }
        self.kept.clear();
        self.spare.clear();
        self.vmm = None;
        self.attachment += 1;
        // Also of a client that waits for its storage.
        if let Some(twin) = lock(&self.vmm_twin).take() {
            let _ = twin.shutdown(Shutdown::Both);
        }
        (self.ram, self.arena) = (None, None);
        self.copies.forget();
    }

    fn call<R: serde::de::DeserializeOwned>(&mut self, request: &VmmRequest) -> Result<R, Event> {
        let Some(client) = &mut self.vmm else { return Err(Event::VmmLost("it is not attached".into())) };
        client.call(request).map_err(trouble)
    }

    fn done(&mut self, request: &VmmRequest) -> Event {
        match self.call::<()>(request) {
            Ok(()) => Event::VmmDone,
            Err(event) => event,
        }
    }

    fn captured(&mut self, request: &VmmRequest) -> Event {
        match self.call::<Captured>(request) {
            Ok(captured) => {
                self.stats.captured(&captured);
                if !captured.more {
                    self.stats.pause(captured.pause_us);
                    self.pauses.push(captured.pause_us);
                    let excess = self.pauses.len().saturating_sub(512);
                    self.pauses.drain(..excess);
                }
                Event::Captured(captured)
            }
            Err(event) => event,
        }
    }

    fn harvest(&mut self, send: bool) -> Event {
        let harvested: Harvested = match self.call(&VmmRequest::Harvest) {
            Ok(harvested) => harvested,
            Err(event) => return event,
        };
        if send {
            self.bitmap.resize(self.ram_pages.div_ceil(8) as usize, 0);
            let n = self.bitmap.len();
            if harvested.bitmap_bytes < n as u64 {
                return Event::VmmLost(format!(
                    "it gave a dirty log of {} bytes where {n} are needed",
                    harvested.bitmap_bytes
                ));
            }
            let Some(arena) = &self.arena else { return Event::VmmLost("it is not attached".into()) };
            if let Err(e) = arena.read_exact_at(&mut self.bitmap, 0) {
                return Event::VmmLost(format!("its arena cannot be read: {e}"));
            }
            self.cursor = 0;
        }
        Event::Harvested { pages: harvested.dirty_pages }
    }

    // What others see.

    /// Nothing is to be done: time for the comparison of memories.
    fn watch_memory(&mut self) {
        let (_, current) = self.core.epochs();
        self.verify.step(self.core.streaming(), current, self.ram.as_ref(), self.ram_pages);
    }

    fn publish(&mut self) {
        self.published = Instant::now();
        let (committed, current) = self.core.epochs();
        // What is tried again and again fails the same way again and again: once in a while is enough.
        let now = Instant::now();
        self.logged.retain(|(_, time)| now.duration_since(*time) < LOG_AGAIN);
        for note in self.core.take_notes() {
            if !self.logged.iter().any(|(logged, _)| *logged == note) {
                log::line(&format!("sender: {note}"));
                self.logged.push((note, now));
            }
        }
        let facts = self.core.facts();
        let (copied, missing) = self.copies.progress();
        let progress = match (self.core.syncing(), self.core.peer_whole()) {
            (true, _) if missing > 0 => (copied as f64 / (copied + missing) as f64).min(0.999),
            (true, _) => (self.cursor as f64 / self.ram_pages.max(1) as f64).min(0.999),
            (false, true) => 1.0,
            (false, false) => 0.0,
        };
        let peer = self.peer_name.as_ref().and_then(|name| {
            let (_, address) = self.config.peers.iter().find(|(n, _)| n == name)?;
            Some(format!("{name} {address}"))
        });
        let encoding = self.encoding();
        let paths = self.paths();
        let mut view = lock(&self.view);
        view.facts = facts.clone();
        view.generation = self.core.generation();
        (view.committed, view.current) = (committed, current);
        view.vetoed = self.core.vetoed();
        view.protected = self.core.protected();
        view.connected = self.core.connected();
        view.finished = self.core.finished();
        view.syncing = self.core.syncing();
        view.peer_whole = self.core.peer_whole();
        view.peer_up_to_date = self.core.peer_up_to_date();
        view.source = Some(self.core.source());
        view.peer = peer;
        view.progress = progress;
        view.raw_bytes = self.raw_bytes;
        view.wire_bytes = self.wire_bytes;
        view.pauses.clone_from(&self.pauses);
        view.stats.clone_from(&self.stats);
        view.encoding = (self.batch.statistics(), encoding);
        view.verify = self.verify.report(now);
        view.disk_verify = self.disk_verify.report();
        view.migration = self.core.migration();
        view.paths = paths;
    }
}

/// What a call of the VMM ended with.
fn trouble(e: ControlError) -> Event {
    match e {
        ControlError::Refused(why) => Event::VmmRefused(why),
        other => Event::VmmLost(other.to_string()),
    }
}

impl Trouble {
    fn event(self) -> Event {
        match self {
            Self::Vmm(why) => Event::VmmLost(why),
            Self::Peer(why) => Event::PeerLost(why),
        }
    }
}

/// A number that two attachments do not share.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's hasher keys are random per process and differ for each state.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // The data behind these locks is replaced as a whole: a panic elsewhere cannot leave it half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
