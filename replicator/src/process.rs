//! The process: listens for peers and on the control socket, and is sender or receiver as it is told.
//!
//! [`Replicator::start`] does everything that `understudy-replicator run` does apart from waiting for signals, so that tests
//! can run several in one process.

mod status;

use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;
use understudy_protocol::control::{
    CopiedImage, ReplicatorRequest, Reply, TakenOver, VerifyStarted, encode_line, read_line,
};
use understudy_protocol::frame;
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;
use understudy_protocol::urgent;

use crate::codec::EncodingConfig;
use crate::driver::{DriverConfig, SenderHandle};
use crate::hook::{Arm, Hook, Reporter};
use crate::image::{FRAME_LIMIT, ImageError};
use crate::link::{self, Acceptor, Encryption, Link, Reader};
use crate::log;
use crate::message::Message;
use crate::receiver::Conn;
use crate::sender::{SenderConfig, SlowLink};
use crate::snapshot;
use crate::standby::{Line, Standby};

/// Connections that may be in their handshake or idle at once, from peers and on the control socket.
pub(crate) const MAX_CONNECTIONS: usize = 32;
/// A control connection that is idle for so long is closed.
pub(crate) const CONTROL_IDLE: Duration = Duration::from_secs(300);
/// A hand-over that takes longer is reported as failed (the sender itself gives up earlier, bounded by its timeouts).
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(60);
/// Decoding a frame of so many bytes takes less than a millisecond.
const SHORT_FRAME: usize = 256 << 10;
/// The sender looks at its requests between two actions; one that takes longer hangs.
const VERIFY_TIMEOUT: Duration = Duration::from_secs(15);

/// What `run` is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// The machine.
    pub machine: String,
    /// This node.
    pub node: String,
    /// All nodes, this one included: name and `host:port`, or several with commas between.
    pub peers: Vec<(String, String)>,
    /// The cluster's key.
    pub key: Arc<Key>,
    /// Of the streams between the nodes.
    pub encryption: Encryption,
    /// From cut to cut.
    pub interval: Duration,
    /// From cut to cut when outputs wait.
    pub min_interval: Duration,
    /// Epochs that may be on their way at once.
    pub pipeline: usize,
    /// What to do with a standby that is too slow.
    pub slow: SlowLink,
    /// Silence after which a peer counts as lost.
    pub peer_timeout: Duration,
    /// The cluster's arm.
    pub arm: Arm,
    /// Files.
    pub layout: Layout,
    /// How the sender encodes pages.
    pub encoding: EncodingConfig,
    /// Most bytes of one epoch's stage; `None` = as much as the file system gives.
    pub stage_limit: Option<u64>,
    /// From one comparison of all RAM to the next; zero = only on request.
    pub verify_every: Duration,
}

/// Why it cannot run.
#[derive(Debug, Error)]
pub enum StartError {
    /// A second one.
    #[error("a replicator for this machine runs already on this node (it holds {0})")]
    AlreadyRuns(String),
    /// This node's own address is not among the peers, or cannot be used.
    #[error("{0}")]
    Address(String),
    /// A file or socket.
    #[error("cannot {what} {file}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        file: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The image directory.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// A running replicator. Dropping it stops it.
pub struct Replicator {
    shared: Arc<Shared>,
    _lock: Flock<File>,
    listen: Vec<SocketAddr>,
}

struct Shared {
    config: Config,
    acceptor: Acceptor,
    standby: Mutex<Standby>,
    sender: Mutex<Option<SenderHandle>>,
    /// Role changes and take-overs one at a time.
    roles: Mutex<()>,
    sending: AtomicBool,
    stop: AtomicBool,
    stopped: (Mutex<bool>, Condvar),
    next_conn: AtomicU64,
    peer_connections: Arc<AtomicUsize>,
    control_connections: Arc<AtomicUsize>,
}

impl Replicator {
    /// Lock, repair the image, listen; a receiver from here on.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let lock = lock_machine(&config.layout)?;
        let own = config.peers.iter().find(|(name, _)| *name == config.node);
        let Some((_, own)) = own else {
            return Err(StartError::Address(format!("--peers does not name this node, {}", config.node)));
        };
        let (listeners, listen) = listen(own)?;
        let control = listen_control(&config.layout.replicator_socket())?;
        let pid = config.layout.replicator_pid();
        fs::write(&pid, format!("{}\n", std::process::id())).map_err(|e| io_error("write", &pid, e))?;

        let standby = Standby::open(&config.machine, &config.node, &config.layout, config.stage_limit)?;
        let hook = Hook::new(config.arm.clone(), &config.machine);
        let acceptor = Acceptor::new(config.key.clone(), config.encryption, config.peer_timeout);
        let shared = Arc::new(Shared {
            config,
            acceptor,
            standby: Mutex::new(standby),
            sender: Mutex::new(None),
            roles: Mutex::new(()),
            sending: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            stopped: (Mutex::new(false), Condvar::new()),
            next_conn: AtomicU64::new(1),
            peer_connections: Arc::default(),
            control_connections: Arc::default(),
        });
        let (told, failed) = (Arc::downgrade(&shared), Arc::downgrade(&shared));
        let reporter = Reporter::start(
            hook,
            move |standing| {
                if let Some(shared) = told.upgrade() {
                    shared.standby().reported(standing);
                }
            },
            move |why| {
                if let Some(shared) = failed.upgrade() {
                    shared.standby().note(why);
                }
            },
        );
        let for_copies = Arc::downgrade(&shared);
        shared.standby().on_copies_answered(Arc::new(move |conn, answer| {
            if let Some(shared) = for_copies.upgrade() {
                shared.standby().copies_answered(conn, answer);
            }
        }));
        shared.standby().set_reporter(reporter);

        for listener in listeners {
            let for_peers = shared.clone();
            thread::spawn(move || for_peers.accept_peers(&listener));
        }
        let for_control = shared.clone();
        thread::spawn(move || for_control.accept_control(&control));
        let for_watch = shared.clone();
        thread::spawn(move || for_watch.watch());
        log::line(&format!(
            "replicator of machine {} on {} is ready, receiver, listening on {}",
            shared.config.machine,
            shared.config.node,
            names(&listen)
        ));
        Ok(Self { shared, _lock: lock, listen })
    }

    /// The addresses that it listens on.
    pub fn listen_addresses(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Wait until it was told to quit.
    pub fn wait(&self) {
        let (stopped, changed) = &self.shared.stopped;
        let mut stopped = lock(stopped);
        while !*stopped {
            stopped = changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Something that ends it from another thread.
    pub fn stopper(&self) -> impl Fn() + Send + 'static {
        let shared = self.shared.clone();
        move || shared.quit()
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        let sender = lock(&self.shared.sender).take();
        drop(sender);
        self.shared.standby().close_all();
        let layout = &self.shared.config.layout;
        // The accepting threads see the flag with one last connection each.
        let _ = UnixStream::connect(layout.replicator_socket());
        knock(&self.listen);
        let _ = fs::remove_file(layout.replicator_socket());
        let _ = fs::remove_file(layout.replicator_pid());
        log::line("replicator stopped");
    }
}

impl Shared {
    fn standby(&self) -> MutexGuard<'_, Standby> {
        lock(&self.standby)
    }

    fn quit(&self) {
        let (stopped, changed) = &self.stopped;
        *lock(stopped) = true;
        changed.notify_all();
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    // Peers.

    fn accept_peers(self: Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.stopping() {
                return;
            }
            match stream {
                Ok(stream) => {
                    let Some(place) = Place::take(&self.peer_connections) else { continue };
                    let shared = self.clone();
                    thread::spawn(move || {
                        // What it receives is what outputs wait for.
                        urgent::this_thread();
                        shared.serve_peer(stream);
                        drop(place);
                    });
                }
                // Out of file descriptors, for example: it may pass.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn serve_peer(&self, stream: TcpStream) {
        let link = match self.acceptor.accept(stream) {
            Ok(Some(link)) => link,
            Ok(None) => return,
            Err(e) => return self.standby().note(format!("a connection was refused: {e}")),
        };
        let Link { reader, mut writer, closer, address } = link;
        let conn = self.next_conn.fetch_add(1, Ordering::SeqCst);
        if writer.set_timeout(Some(self.config.peer_timeout)).is_err() {
            return;
        }
        self.standby().connected(conn, Line { writer, closer, heard: Instant::now(), address });
        let why = self.read_peer(conn, reader);
        self.standby().lost(conn, &why);
    }

    fn read_peer(&self, conn: Conn, mut reader: Reader) -> String {
        let mut payload = Vec::new();
        loop {
            urgent::pace();
            match frame::read_record(&mut reader, FRAME_LIMIT, &mut payload) {
                Ok(None) => return "it closed the connection".into(),
                Err(e) => return e.to_string(),
                Ok(Some(header)) if self.sending.load(Ordering::SeqCst) => {
                    self.answer_as_sender(conn, header.generation);
                    return "this node is a sender".into();
                }
                Ok(Some(header)) => {
                    urgent::heavy(payload.len() > SHORT_FRAME, || self.standby().frame(conn, &header, &payload));
                }
            }
            if self.stopping() {
                return "the replicator stops".into();
            }
        }
    }

    /// Two primaries: the older generation must end.
    fn answer_as_sender(&self, conn: Conn, theirs: Generation) {
        let running = lock(&self.sender).as_ref().map_or(Generation::ZERO, |s| s.view().generation);
        let ours = running.max(self.standby().core().durable().newest());
        if theirs > ours
            && let Some(sender) = lock(&self.sender).as_ref()
        {
            sender.newer_generation(theirs);
        }
        let mut standby = self.standby();
        if theirs > ours {
            let why = format!("{} is still the sender of generation {ours}, which ends now", self.config.node);
            standby.turn_away(conn, ours, Message::Refused(why));
        } else if theirs < ours {
            standby.turn_away(conn, ours, Message::Stale);
        } else {
            let why = format!("{} is a sender itself", self.config.node);
            standby.turn_away(conn, ours, Message::Refused(why));
        }
    }

    /// Ends silent connections and retries repairs.
    fn watch(&self) {
        // The sender pings four times in a timeout; twice the time is for its own stalls.
        let limit = self.config.peer_timeout * 2;
        while !self.stopping() {
            thread::sleep(Duration::from_millis(100));
            let mut standby = self.standby();
            standby.end_silent(limit);
            standby.retry();
        }
    }

    // Control.

    fn accept_control(self: Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.stopping() {
                return;
            }
            match stream {
                Ok(stream) => {
                    let Some(place) = Place::take(&self.control_connections) else { continue };
                    let shared = self.clone();
                    thread::spawn(move || {
                        shared.serve_control(stream);
                        drop(place);
                    });
                }
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn serve_control(self: &Arc<Self>, stream: UnixStream) {
        let Ok(reading) = stream.try_clone() else { return };
        // Somebody who connects and says nothing gives the place back.
        let _ = stream.set_read_timeout(Some(CONTROL_IDLE));
        let _ = stream.set_write_timeout(Some(CONTROL_IDLE));
        let (mut reader, mut writer) = (BufReader::new(reading), stream);
        while let Ok(Some(line)) = read_line(&mut reader) {
            let request = serde_json::from_slice(&line);
            let reply = match &request {
                Ok(request) => self.control(request),
                Err(e) => encode_line(&Reply::<()>::Error(format!("the request is not understood: {e}"))),
            };
            let written = writer.write_all(&reply);
            if matches!(request, Ok(ReplicatorRequest::Quit)) {
                // Not before the reply is out: the process ends as soon as it knows.
                self.quit();
            }
            if written.is_err() {
                break;
            }
        }
    }

    fn control(self: &Arc<Self>, request: &ReplicatorRequest) -> Vec<u8> {
        match request {
            ReplicatorRequest::Status => encode_line(&Reply::Ok(self.status())),
            ReplicatorRequest::Promote => answer(self.promote()),
            ReplicatorRequest::Demote => answer(self.demote()),
            ReplicatorRequest::HandOver => answer(self.hand_over()),
            ReplicatorRequest::TakeOver { generation } => answer(self.take_over(*generation)),
            ReplicatorRequest::CopyImage { dir } => answer(self.copy_image(Path::new(dir))),
            ReplicatorRequest::Verify => answer(self.verify()),
            ReplicatorRequest::VerifyDisks => answer(self.verify_disks()),
            ReplicatorRequest::Quit => answer(Ok(())),
        }
    }

    fn promote(self: &Arc<Self>) -> Result<(), String> {
        let _roles = lock(&self.roles);
        let finished = lock(&self.sender).as_ref().map(|sender| sender.view().finished);
        if finished == Some(false) {
            return Ok(());
        }
        // A sender that handed over, or was ended by a newer generation, has nothing more to say: begin afresh.
        let old = lock(&self.sender).take();
        drop(old);
        let mut standby = self.standby();
        standby.may_send()?;
        standby.stop_reporting();
        self.sending.store(true, Ordering::SeqCst);
        standby.note("promoted: sender from here on".into());
        drop(standby);
        *lock(&self.sender) = Some(SenderHandle::start(self.driver_config()));
        Ok(())
    }

    fn demote(&self) -> Result<(), String> {
        let _roles = lock(&self.roles);
        let sender = lock(&self.sender).take();
        let was = sender.is_some();
        drop(sender);
        self.sending.store(false, Ordering::SeqCst);
        if was {
            let mut standby = self.standby();
            standby.note("demoted: receiver from here on".into());
            standby.report_again();
        }
        Ok(())
    }

    fn hand_over(&self) -> Result<understudy_protocol::control::HandedOver, String> {
        let answer = match lock(&self.sender).as_ref() {
            Some(sender) => sender.hand_over(),
            None => return Err("this replicator is a receiver: there is nothing to hand over".into()),
        };
        let late = "the hand-over was not finished in time; see the status of both nodes";
        answer.recv_timeout(HAND_OVER_TIMEOUT).unwrap_or_else(|_| Err(late.into()))
    }

    fn copy_image(&self, dir: &Path) -> Result<CopiedImage, String> {
        if self.sending.load(Ordering::SeqCst) {
            return Err("this replicator is the sender: the image is on the other node, ask there".into());
        }
        snapshot::copy(&self.standby, dir)
    }

    fn verify(&self) -> Result<VerifyStarted, String> {
        let started = match lock(&self.sender).as_ref() {
            Some(sender) => sender.verify(),
            None => {
                let standby = self.standby();
                let sender = standby.core().sender().map_or_else(String::new, |(_, _, node)| format!(", {node}"));
                return Err(format!(
                    "this replicator is a receiver: ask that of the node that runs the machine{sender}"
                ));
            }
        };
        let late = "the sender does not answer in time; see its status";
        let pass = started.recv_timeout(VERIFY_TIMEOUT).map_err(|_| late.to_owned())?;
        Ok(VerifyStarted { pass })
    }

    fn verify_disks(&self) -> Result<VerifyStarted, String> {
        match lock(&self.sender).as_ref() {
            Some(sender) => sender.verify_disks().map(|pass| VerifyStarted { pass }),
            None => Err("this replicator is a receiver: ask that of the node that runs the machine".into()),
        }
    }

    fn take_over(&self, generation: Generation) -> Result<TakenOver, String> {
        let _roles = lock(&self.roles);
        if self.sending.load(Ordering::SeqCst) {
            return Err("this replicator is the sender: demote it before its image can be taken over".into());
        }
        self.standby().take_over(generation)
    }

    fn driver_config(self: &Arc<Self>) -> DriverConfig {
        let config = &self.config;
        let hook = Hook::new(config.arm.clone(), &config.machine);
        let shared = Arc::downgrade(self);
        let attached = move |generation| match shared.upgrade() {
            Some(shared) => shared.standby().in_use(generation),
            None => generation,
        };
        DriverConfig {
            attached: Box::new(attached),
            sender: SenderConfig {
                machine: config.machine.clone(),
                node: config.node.clone(),
                interval: config.interval,
                min_interval: config.min_interval,
                pipeline: config.pipeline,
                slow: config.slow,
                peer_timeout: config.peer_timeout,
                clustered: hook.clustered(),
                migration: None,
            },
            peers: config.peers.iter().filter(|(name, _)| *name != config.node).cloned().collect(),
            encoding: config.encoding,
            key: config.key.clone(),
            encryption: config.encryption,
            layout: config.layout.clone(),
            hook,
            verify_every: config.verify_every,
        }
    }
}

/// Holds a place among the connections of a kind: strangers at the peers' door must not keep the agents from theirs.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    pub(crate) fn take(count: &Arc<AtomicUsize>) -> Option<Self> {
        let before = count.fetch_add(1, Ordering::SeqCst);
        let place = Self(count.clone());
        (before < MAX_CONNECTIONS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Make the image whole and take it over while no replicator process runs. As [`ReplicatorRequest::TakeOver`].
pub fn take_over_offline(layout: &Layout, machine: &str, generation: Generation) -> Result<TakenOver, String> {
    let _lock = lock_machine(layout).map_err(|e| format!("{e}; ask that replicator instead"))?;
    let mut standby = Standby::open(machine, "this node", layout, None).map_err(|e| e.to_string())?;
    standby.take_over(generation)
}

/// The same at the end of a migration: only an image that the source has handed over is given out, because it has gone on without any
/// other. Waits up to `patience` for the process that received it to let go of it.
pub fn take_over_handed_over(
    layout: &Layout,
    machine: &str,
    generation: Generation,
    patience: Duration,
) -> Result<TakenOver, String> {
    let until = Instant::now() + patience;
    let _lock = loop {
        match lock_machine(layout) {
            Ok(lock) => break lock,
            Err(StartError::AlreadyRuns(_)) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            Err(e) => return Err(e.to_string()),
        }
    };
    let mut standby = Standby::open(machine, "this node", layout, None).map_err(|e| e.to_string())?;
    let record = &standby.core().durable().record;
    let again = record.handed_over && record.taken.is_some_and(|taken| taken.generation == generation);
    if !standby.was_given_the_machine() && !again {
        return Err(format!(
            "no image of {machine} on this node was handed over by the node that ran it: the machine went on there, and must not be \
             continued from anything here"
        ));
    }
    standby.take_over(generation)
}

/// Give the image up while no replicator process runs: the machine can only be booted cold here afterwards. The highest
/// generation stays known.
pub fn discard_offline(layout: &Layout, machine: &str) -> Result<(), String> {
    let _lock = lock_machine(layout).map_err(|e| format!("{e}; stop that replicator first"))?;
    let mut standby = Standby::open(machine, "this node", layout, None).map_err(|e| e.to_string())?;
    standby.discard().map_err(|e| e.to_string())
}

/// Hold the machine's replicator lock: at most one process touches the image.
pub(crate) fn lock_machine(layout: &Layout) -> Result<Flock<File>, StartError> {
    let dir = layout.run_dir();
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| io_error("create", dir, e))?;
    let path = dir.join("replicator.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| io_error("open", &path, e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => StartError::AlreadyRuns(path.display().to_string()),
        other => io_error("lock", &path, other.into()),
    })
}

/// Listen on this node's own addresses.
pub(crate) fn listen(own: &str) -> Result<(Vec<TcpListener>, Vec<SocketAddr>), StartError> {
    let cannot = |e: std::io::Error| {
        StartError::Address(format!("cannot listen on this node's own address {own} (from --peers): {e}"))
    };
    let listeners = link::listen(own).map_err(cannot)?;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>().map_err(cannot)?;
    Ok((listeners, addresses))
}

/// Addresses in one line.
pub(crate) fn names(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
}

/// The accepting threads see that they are to end with one last connection each.
pub(crate) fn knock(addresses: &[SocketAddr]) {
    for address in addresses {
        let _ = TcpStream::connect_timeout(address, Duration::from_millis(200));
    }
}

pub(crate) fn listen_control(path: &Path) -> Result<UnixListener, StartError> {
    // The lock is ours: a socket that is there belongs to a process that is gone.
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|e| io_error("listen on", path, e))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(|e| io_error("protect", path, e))?;
    Ok(listener)
}

pub(crate) fn io_error(what: &'static str, file: &Path, source: std::io::Error) -> StartError {
    StartError::Io { what, file: file.display().to_string(), source }
}

pub(crate) fn answer<T: serde::Serialize>(result: Result<T, String>) -> Vec<u8> {
    match result {
        Ok(value) => encode_line(&Reply::Ok(value)),
        Err(why) => encode_line(&Reply::<()>::Error(why)),
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in another thread must not take the others with it; each holder leaves the data usable at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
