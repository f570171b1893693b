//! `understudy-replicator serve-migrations`: receives machines that move to this node. One process a node, for all machines.
//!
//! ```text
//!  hello ─► claim, lock ─► room? ─► hook: its VMM stands by ─► Standby: first copy, rounds, last checkpoint ─► "it is yours", recorded
//!             │ taken: refused        │ no: refused, with its sentence                    │ ended before that
//!             ▼                       ▼                                                   ▼
//!                         nothing of it is left: image discarded, hook: forget
//! ```
//! It is a receiver as a standby's is ([`crate::standby`]), without a cluster behind it. What it has recorded as handed over stays for
//! `take-over --handed-over` (the agent's `migrate_from`); it never runs a machine by itself: the record says that the machine's old
//! VMM *may* have been told to give it up, not that it was.
//!
//! Which files the machine's VMM opens is said by the hook, from this cluster's configuration; the sender names the machine and nothing
//! else.

use std::collections::HashMap;
use std::fs;
use std::io::{BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use understudy_protocol::control::{
    IncomingStatus, MigrationsStatus, ReplicatorRequest, Reply, encode_line, read_line,
};
use understudy_protocol::frame::{self, Header};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;
use understudy_protocol::layout::{Layout, MIGRATIONS, valid_machine_name};

use crate::drill::check_room;
use crate::hook::MigrationHook;
use crate::image::FRAME_LIMIT;
use crate::link::{self, Acceptor, Closer, Encryption, Link, Reader, Writer};
use crate::local::local_vmm;
use crate::log;
use crate::message::{Hello, Message, VERSION};
use crate::process::{self, CONTROL_IDLE, Place, StartError, answer, io_error, listen_control, lock_machine};
use crate::receiver::LocalVmm;
use crate::standby::{Line, Standby};

/// How long the end of the process waits for what it receives to be discarded.
const END_PATIENCE: Duration = Duration::from_secs(15);

/// What `serve-migrations` is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node.
    pub node: String,
    /// `host:port` to listen on, or several with commas between.
    pub listen: String,
    /// The cluster's key.
    pub key: Arc<Key>,
    /// Parent of the machines' run directories.
    pub run_root: PathBuf,
    /// Parent of the machines' shared-memory directories.
    pub shm_root: PathBuf,
    /// Prepares and forgets.
    pub hook: MigrationHook,
    /// Silence after which a sender counts as lost (twice this, here: it may be busy cutting).
    pub peer_timeout: Duration,
    /// Most bytes that a last checkpoint may take while it arrives; `None` = as much as the file system gives.
    pub stage_limit: Option<u64>,
}

/// A running process. Dropping it stops it.
pub struct Incoming {
    shared: Arc<Shared>,
    _lock: Flock<fs::File>,
    listen: Vec<SocketAddr>,
}

struct Shared {
    config: Config,
    acceptor: Acceptor,
    layout: Layout,
    address: String,
    /// Machines that are arriving.
    arriving: Mutex<HashMap<String, Arriving>>,
    handed_over: AtomicU64,
    note: Mutex<String>,
    stop: AtomicBool,
    stopped: (Mutex<bool>, Condvar),
    next_conn: AtomicU64,
    connections: Arc<AtomicUsize>,
    control_connections: Arc<AtomicUsize>,
}

struct Arriving {
    from: String,
    closer: Option<Closer>,
    standby: Option<Arc<Mutex<Standby>>>,
}

impl Incoming {
    /// Lock, listen, and discard what a process before this one left half received.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let layout = Layout::new(&config.run_root, &config.shm_root, MIGRATIONS);
        let lock = lock_machine(&layout)?;
        let (listeners, listen) = process::listen(&config.listen)?;
        let control = listen_control(&layout.replicator_socket())?;
        let pid = layout.replicator_pid();
        fs::write(&pid, format!("{}\n", std::process::id())).map_err(|e| io_error("write", &pid, e))?;
        let acceptor = Acceptor::new(config.key.clone(), Encryption::On, config.peer_timeout);
        let shared = Arc::new(Shared {
            config,
            acceptor,
            layout,
            address: process::names(&listen),
            arriving: Mutex::default(),
            handed_over: AtomicU64::new(0),
            note: Mutex::default(),
            stop: AtomicBool::new(false),
            stopped: (Mutex::new(false), Condvar::new()),
            next_conn: AtomicU64::new(1),
            connections: Arc::default(),
            control_connections: Arc::default(),
        });
        let for_sweep = shared.clone();
        thread::spawn(move || for_sweep.sweep());
        for listener in listeners {
            let for_peers = shared.clone();
            thread::spawn(move || for_peers.accept(&listener));
        }
        let for_control = shared.clone();
        thread::spawn(move || for_control.accept_control(&control));
        log::line(&format!("{} receives migrations, listening on {}", shared.config.node, shared.address));
        Ok(Self { shared, _lock: lock, listen })
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

impl Drop for Incoming {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for arriving in lock(&self.shared.arriving).values() {
            if let Some(closer) = &arriving.closer {
                closer.close();
            }
        }
        let until = Instant::now() + END_PATIENCE;
        while !lock(&self.shared.arriving).is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        let layout = &self.shared.layout;
        // The accepting threads see the flag with one last connection each.
        let _ = UnixStream::connect(layout.replicator_socket());
        process::knock(&self.listen);
        let _ = fs::remove_file(layout.replicator_socket());
        let _ = fs::remove_file(layout.replicator_pid());
        log::line("migrations are not received any more");
    }
}

/// A machine's place among those that are arriving.
struct Claim<'a> {
    shared: &'a Shared,
    machine: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(&self.shared.arriving).remove(&self.machine);
    }
}

impl Shared {
    fn quit(&self) {
        let (stopped, changed) = &self.stopped;
        *lock(stopped) = true;
        changed.notify_all();
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn note(&self, note: String) {
        log::line(&note);
        *lock(&self.note) = note;
    }

    fn machine_layout(&self, machine: &str) -> Layout {
        Layout::new(&self.config.run_root, &self.config.shm_root, machine)
    }

    /// What an earlier process was receiving when it ended has no sender any more. What was handed over to it stays.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(&self.config.run_root) else { return };
        for entry in entries.flatten() {
            let Ok(machine) = entry.file_name().into_string() else { continue };
            let layout = self.machine_layout(&machine);
            if !valid_machine_name(&machine) || !layout.incoming_mark().exists() {
                continue;
            }
            let Ok(_lock) = lock_machine(&layout) else { continue };
            match Standby::open(&machine, &self.config.node, &layout, None) {
                Ok(standby) if standby.was_given_the_machine() => {
                    self.note(format!("machine {machine} was handed over to this node and waits to be run"));
                }
                Ok(mut standby) => self.discard(&machine, &mut standby),
                Err(e) => self.note(format!("what was received of machine {machine} cannot be looked at: {e}")),
            }
        }
    }

    // Senders.

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            if self.stopping() {
                return;
            }
            match stream {
                Ok(stream) => {
                    let Some(place) = Place::take(&self.connections) else { continue };
                    let shared = self.clone();
                    thread::spawn(move || {
                        shared.serve(stream);
                        drop(place);
                    });
                }
                // Out of file descriptors, for example: it may pass.
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    fn serve(&self, stream: TcpStream) {
        let timeout = self.config.peer_timeout;
        let link = match self.acceptor.accept(stream) {
            Ok(Some(link)) => link,
            Ok(None) => return,
            Err(e) => return self.note(format!("a connection was refused: {e}")),
        };
        let Link { mut reader, mut writer, closer, address } = link;
        if writer.set_timeout(Some(timeout)).is_err() || reader.set_timeout(Some(timeout * 2)).is_err() {
            return;
        }
        let mut payload = Vec::new();
        let Ok(Some(header)) = frame::read_record(&mut reader, FRAME_LIMIT, &mut payload) else { return };
        let Ok(Message::Hello(hello)) = Message::parse(header.kind, &payload) else { return };
        let mut writer = Some(writer);
        if let Err(why) = self.receive(&hello, (&header, &payload), (reader, &mut writer), closer, address) {
            self.note(format!("the migration of {} from {} was refused: {why}", hello.machine, hello.node));
            let refused = Message::Refused(format!("{}: {why}", self.config.node));
            if let Some(mut writer) = writer {
                let _ = link::send(&mut writer, header.generation, Epoch::ZERO, &refused);
            }
        }
    }

    /// One migration from the hello to its end. The error is a sentence for the sender, and `writer` is still there for it; nothing was
    /// received then.
    fn receive(
        &self,
        hello: &Hello,
        first: (&Header, &[u8]),
        (reader, writer): (Reader, &mut Option<Writer>),
        closer: Closer,
        address: String,
    ) -> Result<(), String> {
        let machine = hello.machine.as_str();
        if !hello.migration || hello.version != VERSION {
            return Err(format!(
                "migrations are received here (protocol {VERSION}), not the checkpoints of a protected machine (protocol {})",
                hello.version
            ));
        }
        if !valid_machine_name(machine) {
            return Err(format!("{machine:?} cannot be a machine's name"));
        }
        let _claim = self.claim(machine, &hello.node, closer.twin().ok())?;
        let layout = self.machine_layout(machine);
        let _lock = lock_machine(&layout).map_err(|e| match e {
            StartError::AlreadyRuns(_) => format!("a replicator of {machine} runs here: the machine is protected"),
            other => other.to_string(),
        })?;
        if let LocalVmm::InUse(generation) = local_vmm(&layout, Duration::from_secs(2)) {
            return Err(format!(
                "{machine} has a VMM here that runs it, or ran it (generation {generation}); stop that first"
            ));
        }
        // On a node that never ran a machine it is not there yet.
        let shm = &self.config.shm_root;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(shm);
        made.map_err(|e| format!("cannot create {}: {e}", shm.display()))?;
        check_room(&format!("machine {machine}"), &self.config.shm_root, hello.ram_bytes)?;
        self.prepare(machine, &hello.node, first.0.generation, writer)?;
        let opened = Standby::open(machine, &self.config.node, &layout, self.config.stage_limit);
        let standby = match opened {
            Ok(mut standby) => {
                standby.receive_migration();
                Arc::new(Mutex::new(standby))
            }
            Err(e) => {
                self.forget(machine);
                return Err(e.to_string());
            }
        };
        if let Some(arriving) = lock(&self.arriving).get_mut(machine) {
            arriving.standby = Some(standby.clone());
        }
        // (It is always there: only this takes it.)
        let Some(writer) = writer.take() else { return Ok(()) };
        self.note(format!("machine {machine} is arriving from {}", hello.node));
        let conn = self.next_conn.fetch_add(1, Ordering::SeqCst);
        lock(&standby).connected(conn, Line { writer, closer, heard: Instant::now(), address });
        lock(&standby).frame(conn, first.0, first.1);
        let why = read(&standby, conn, reader);
        let mut standby = lock(&standby);
        standby.lost(conn, &why);
        if standby.was_given_the_machine() {
            self.handed_over.fetch_add(1, Ordering::SeqCst);
            self.note(format!("machine {machine} was handed over to this node by {} and waits to be run", hello.node));
        } else {
            let word = standby.counters.note.clone();
            self.discard(machine, &mut standby);
            self.note(format!("the migration of {machine} from {} has ended before its hand-over: {word}", hello.node));
        }
        Ok(())
    }

    fn claim(&self, machine: &str, from: &str, closer: Option<Closer>) -> Result<Claim<'_>, String> {
        let mut arriving = lock(&self.arriving);
        if self.stopping() {
            return Err("no migrations are received any more: the process ends".into());
        }
        if let Some(other) = arriving.get(machine) {
            return Err(format!("{machine} is arriving already, from {}", other.from));
        }
        arriving.insert(machine.to_owned(), Arriving { from: from.to_owned(), closer, standby: None });
        Ok(Claim { shared: self, machine: machine.to_owned() })
    }

    /// Have the hook make the machine's VMM stand by; meanwhile the sender hears that somebody is there.
    fn prepare(
        &self,
        machine: &str,
        from: &str,
        generation: Generation,
        writer: &mut Option<Writer>,
    ) -> Result<(), String> {
        let (done, prepared) = mpsc::channel();
        let (hook, name, node) = (self.config.hook.clone(), machine.to_owned(), from.to_owned());
        thread::spawn(move || {
            let _ = done.send(hook.prepare(&name, &node));
        });
        let mut gone = None;
        loop {
            match prepared.recv_timeout(self.config.peer_timeout / 4) {
                Ok(result) => {
                    if let (Ok(()), Some(e)) = (&result, &gone) {
                        self.forget(machine);
                        return Err(format!("the sender has gone: {e}"));
                    }
                    return result;
                }
                Err(RecvTimeoutError::Disconnected) => return Err("the hook was lost".into()),
                Err(RecvTimeoutError::Timeout) => {
                    let sent = writer.as_mut().map(|w| link::send(w, generation, Epoch::ZERO, &Message::Pong));
                    gone = gone.or(sent.and_then(Result::err));
                }
            }
        }
    }

    fn discard(&self, machine: &str, standby: &mut Standby) {
        if let Err(e) = standby.discard() {
            self.note(format!("the image of {machine} cannot be discarded: {e}"));
        }
        self.forget(machine);
    }

    fn forget(&self, machine: &str) {
        if let Err(why) = self.config.hook.forget(machine) {
            self.note(format!("what was prepared for {machine} is still there: {why}"));
        }
    }

    // Control.

    fn accept_control(self: Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            if self.stopping() {
                return;
            }
            let Ok(stream) = stream else { continue };
            let Some(place) = Place::take(&self.control_connections) else { continue };
            let shared = self.clone();
            thread::spawn(move || {
                shared.serve_control(stream);
                drop(place);
            });
        }
    }

    fn serve_control(&self, stream: UnixStream) {
        let Ok(mut writer) = stream.try_clone() else { return };
        if stream.set_read_timeout(Some(CONTROL_IDLE)).is_err() {
            return;
        }
        let mut reader = BufReader::new(stream);
        while let Ok(Some(line)) = read_line(&mut reader) {
            let request = serde_json::from_slice::<ReplicatorRequest>(&line);
            let reply = match &request {
                Ok(ReplicatorRequest::Status) => encode_line(&Reply::Ok(self.status())),
                Ok(ReplicatorRequest::Quit) => answer(Ok(())),
                Ok(_) => answer::<()>(Err("this process receives migrations; it knows status and quit".into())),
                Err(e) => answer::<()>(Err(format!("this is not a request: {e}"))),
            };
            let written = writer.write_all(&reply);
            if matches!(request, Ok(ReplicatorRequest::Quit)) {
                self.quit();
            }
            if written.is_err() {
                return;
            }
        }
    }

    fn status(&self) -> MigrationsStatus {
        let arriving = lock(&self.arriving);
        let of = |(machine, arriving): (&String, &Arriving)| IncomingStatus {
            machine: machine.clone(),
            from: arriving.from.clone(),
            progress: arriving.standby.as_ref().map_or(0.0, |standby| lock(standby).core().sync_progress()),
        };
        MigrationsStatus {
            node: self.config.node.clone(),
            listen: self.address.clone(),
            incoming: arriving.iter().map(of).collect(),
            handed_over: self.handed_over.load(Ordering::SeqCst),
            note: lock(&self.note).clone(),
        }
    }
}

/// Read until the connection ends; says why it did.
fn read(standby: &Mutex<Standby>, conn: u64, mut reader: Reader) -> String {
    let mut payload = Vec::new();
    loop {
        match frame::read_record(&mut reader, FRAME_LIMIT, &mut payload) {
            Ok(None) => return "it closed the connection".into(),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return "it was silent for too long".into();
            }
            Err(e) => return e.to_string(),
            Ok(Some(header)) => {
                let mut standby = lock(standby);
                standby.frame(conn, &header, &payload);
                if !standby.listens_to(conn) {
                    return "it was turned away".into();
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in another thread must not take the others with it; each holder leaves the data usable at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
