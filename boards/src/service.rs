//! The serial board service: one line, owned by one machine at a time, for as long as the process lives.
//!
//! ```text
//! accept thread ─► session threads (reader, writer) ─┐
//! control thread (status, quit) ─────────────────────┤ Core (one mutex): BoardPort + Journal
//! line thread: poll, write, read, reopen ────────────┘
//! ```
//! The line is written while the mutex is held, without waiting: whether a session still owns the line and the write that
//! relies on it are one step. Nothing else that can wait happens under it, except forcing a new owner to the medium,
//! which must come before anything of that owner.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use understudy_protocol::board::{BoardPort, Event, MAX_PAYLOAD, Message, Output, PortConfig, SessionId, Verdict};
use understudy_protocol::control::{self, BoardRequest, BoardStatus, Reply};
use understudy_protocol::frame::{self, Record};
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::layout::Layout;
use understudy_protocol::secure::{BOARD, SecureReader, SecureStream, SecureWriter, Timeouts};

use crate::journal::{AfterCrash, Journal, MAX_READ, MAX_WRITE};
use crate::line::{Line, LineSpec};

/// Output bytes that may wait at the board.
const WINDOW: u32 = 64 * 1024;
/// Input bytes kept until a committed checkpoint has taken them.
const INPUT_CAPACITY: usize = 256 * 1024;
/// Connections at one time that have not proved yet that they hold the key.
const MAX_HANDSHAKES: usize = 32;
/// Connections at one time that have, attached or not.
const MAX_SESSIONS: usize = 32;
/// Messages that wait for a connection; one that takes them so slowly is closed.
const MAX_QUEUED: usize = 4096;
/// A connection that has not attached after so long is closed.
const ATTACH_WITHIN: Duration = Duration::from_secs(5);
/// An owner's host that acknowledges nothing for so long is taken for dead (its connection, not its ownership).
const DEAD_PEER: Duration = Duration::from_secs(5);
/// How long an orderly end waits for a pty's reader.
const LINGER: Duration = Duration::from_millis(500);

/// What to serve, and where.
#[derive(Debug, Clone)]
pub struct ServiceConfig {
    /// The machine that may attach.
    pub machine: String,
    /// The device's name.
    pub device: String,
    /// `ADDR:PORT` for sessions.
    pub listen: String,
    /// The cluster's key.
    pub key_file: PathBuf,
    /// The line.
    pub line: LineSpec,
    /// Directory of the journal.
    pub state_dir: PathBuf,
    /// Where socket and pid file are.
    pub layout: Layout,
    /// For output whose fate is open after a crash.
    pub after_crash: AfterCrash,
}

struct Session {
    queue: SyncSender<Vec<u8>>,
    socket: TcpStream,
    peer: String,
    heard: Instant,
}

struct Core {
    port: BoardPort,
    journal: Option<Journal>,
    sessions: HashMap<SessionId, Session>,
    next_id: SessionId,
    line_open: bool,
    attaches: u64,
    refusals: u64,
    stopping: bool,
}

struct Shared {
    config: ServiceConfig,
    listen: String,
    incarnation: u64,
    core: Mutex<Core>,
    handshakes: AtomicUsize,
    /// Wakes the line thread.
    wake: EventFd,
    exit: mpsc::Sender<Exit>,
}

/// Why the service ends.
enum Exit {
    /// SIGTERM, SIGINT or `Quit`.
    Asked(&'static str),
    /// It cannot go on.
    Fatal(String),
}

/// Serve until asked to end, in the foreground.
pub fn run(config: ServiceConfig) -> Result<()> {
    // Before any thread is made, so that all of them inherit it and only the one below is told.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;

    let (shared, line, listener, control, exits) = prepare(config)?;
    let socket_path = shared.config.layout.serial_socket(&shared.config.device);
    let pid_path = shared.config.layout.serial_pid(&shared.config.device);

    let asked = shared.exit.clone();
    spawn("signals", move || {
        let name = signals.wait().map_or("a signal", Signal::as_str);
        let _ = asked.send(Exit::Asked(name)); // the receiver lives until the process ends
    })?;
    let for_line = shared.clone();
    let line_thread = spawn("line", move || drive_line(&for_line, line))?;
    let for_accept = shared.clone();
    spawn("accept", move || accept_sessions(&for_accept, &listener))?;
    let for_control = shared.clone();
    spawn("control", move || serve_control(&for_control, &control))?;
    fs::write(&pid_path, format!("{}\n", std::process::id()))
        .with_context(|| format!("cannot write the pid file {}", pid_path.display()))?;
    say(&format!(
        "serving {} as device {} of machine {} on {}",
        shared.config.line, shared.config.device, shared.config.machine, shared.listen
    ));

    let why = exits.recv().unwrap_or(Exit::Asked("its end")); // `shared` holds a sender
    shared.lock().stopping = true;
    shared.wake_line();
    let _ = line_thread.join(); // if it panicked it has said so, and the journal is as after a crash
    let mut core = shared.lock();
    for session in core.sessions.values() {
        let _ = session.socket.shutdown(Shutdown::Both);
    }
    let _ = fs::remove_file(&socket_path);
    match why {
        Exit::Asked(name) => {
            let ownership = core.port.ownership();
            if let Some(journal) = core.journal.take() {
                journal.close(&ownership).context("cannot write the journal at the end")?;
            }
            // Last: as long as it stands, a monitor takes a missing process for a crash.
            let _ = fs::remove_file(&pid_path);
            say(&format!("ended on {name}; output applied up to {}", ownership.applied));
            Ok(())
        }
        Exit::Fatal(why) => Err(anyhow!(why)),
    }
}

type Prepared = (Arc<Shared>, Line, TcpListener, UnixListener, Receiver<Exit>);

/// Everything that can fail for a reason that an administrator must hear at once.
fn prepare(config: ServiceConfig) -> Result<Prepared> {
    let key = Key::load(&config.key_file)?; // read again for each session; here to fail early
    drop(key);
    let (journal, found) =
        Journal::open(&config.state_dir, &config.machine, &config.device, INPUT_CAPACITY, config.after_crash)?;
    let line = Line::open(config.line.clone()).with_context(|| match &config.line {
        LineSpec::Tty { path, .. } => {
            format!(
                "cannot open the line {}: check that the device is plugged in and the path is right",
                path.display()
            )
        }
        LineSpec::Pty { link } => format!("cannot make a pty with the link {}", link.display()),
        other => format!("cannot open the line {other}"),
    })?;
    let listener = TcpListener::bind(&config.listen).with_context(|| match config.listen.rsplit_once(':') {
        Some(_) => format!(
            "cannot listen on {}: check that the address is this host's and that no other program uses the port \
             (`ss -ltnp`)",
            config.listen
        ),
        None => format!("cannot listen on {:?}: give ADDRESS:PORT", config.listen),
    })?;
    let listen = listener.local_addr().map_or_else(|_| config.listen.clone(), |a| a.to_string());
    let run_dir = config.layout.run_dir();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(run_dir)
        .with_context(|| format!("cannot make the run directory {}", run_dir.display()))?;
    let control = bind_control(&config.layout.serial_socket(&config.device))?;

    let incarnation = {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|e| anyhow!("the kernel gives no random numbers: {e}"))?;
        u64::from_le_bytes(bytes)
    };
    let port_config = PortConfig {
        machine: config.machine.clone(),
        device: config.device.clone(),
        incarnation,
        window: WINDOW,
        input_capacity: INPUT_CAPACITY,
    };
    let mut port = BoardPort::new(port_config, found.saved);
    for event in found.events {
        say(&event.to_string());
        port.report(event);
    }
    port.set_cells(line.cells());
    if !line.is_open() {
        // Only a TCP line can be late; it says `LineBack` when it is there.
        port.report(Event::LineLost { why: "it is not connected yet".into() });
    }
    let core = Core {
        port,
        journal: Some(journal),
        sessions: HashMap::new(),
        next_id: 1,
        line_open: line.is_open(),
        attaches: 0,
        refusals: 0,
        stopping: false,
    };
    let (exit, exits) = mpsc::channel();
    let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
        .context("cannot make an eventfd")?;
    let shared = Arc::new(Shared {
        config,
        listen,
        incarnation,
        core: Mutex::new(core),
        handshakes: AtomicUsize::new(0),
        wake,
        exit,
    });
    Ok((shared, line, listener, control, exits))
}

fn bind_control(path: &Path) -> Result<UnixListener> {
    // The journal's lock is ours, so a socket that stands here is a dead service's.
    let _ = fs::remove_file(path);
    let context = || format!("cannot make the control socket {}", path.display());
    let control = UnixListener::bind(path).with_context(context)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(context)?;
    Ok(control)
}

fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> Result<thread::JoinHandle<T>> {
    thread::Builder::new().name(name.into()).spawn(body).with_context(|| format!("cannot start the {name} thread"))
}

/// One line of log. The agent that starts the service sends stderr where it wants it.
fn say(what: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "understudy-serial: {what}");
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock is a bug; the journal and the port's own checks limit what it can do.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_line(&self) {
        // Only a counter at 2^64 - 2 could make it fail.
        let _ = self.wake.write(1);
    }

    fn fatal(&self, why: String) {
        let _ = self.exit.send(Exit::Fatal(why)); // the receiver lives until the process ends
    }

    fn status(&self) -> BoardStatus {
        let core = self.lock();
        let ownership = core.port.ownership();
        let owner = core.port.owner().and_then(|id| core.sessions.get(&id));
        BoardStatus {
            machine: self.config.machine.clone(),
            device: self.config.device.clone(),
            line: self.config.line.to_string(),
            line_open: core.line_open,
            listen: self.listen.clone(),
            incarnation: self.incarnation,
            generation: ownership.generation,
            life: ownership.life,
            owner: owner.map(|s| s.peer.clone()),
            last_heard_ms: owner.map(|s| s.heard.elapsed().as_millis() as u64),
            applied: ownership.applied,
            pending: core.port.pending() as u64,
            input_base: ownership.in_base,
            input_end: ownership.in_end,
            input_capacity: INPUT_CAPACITY as u64,
            sessions: core.sessions.len() as u64,
            attaches: core.attaches,
            refusals: core.refusals,
            events: core.port.history().map(ToString::to_string).collect(),
        }
    }
}

impl Core {
    /// Give the sessions what the port has for them.
    fn flush(&mut self) {
        while let Some(output) = self.port.poll() {
            match output {
                Output::Send(id, message) => {
                    if matches!(message, Message::Refused { .. } | Message::Stale { .. } | Message::Fenced { .. }) {
                        self.refusals += 1;
                        say(&format!(
                            "session {id} ({}): {message:?}",
                            self.sessions.get(&id).map_or("gone", |s| &s.peer)
                        ));
                    }
                    let generation = self.port.ownership().generation;
                    let Some(session) = self.sessions.get(&id) else { continue };
                    let mut bytes = Vec::new();
                    // Only a payload of 4 GiB cannot be written; the port cuts data at MAX_DATA.
                    let _ = message.encode(generation, &mut bytes);
                    if session.queue.try_send(bytes).is_err() {
                        say(&format!("session {id} ({}) takes nothing any more, closing it", session.peer));
                        self.drop_session(id);
                    }
                }
                Output::Close(id) => {
                    // Its writer sends what is queued, then closes.
                    self.sessions.remove(&id);
                }
            }
        }
    }

    fn drop_session(&mut self, id: SessionId) {
        self.port.closed(id);
        if let Some(session) = self.sessions.remove(&id) {
            let _ = session.socket.shutdown(Shutdown::Both);
        }
    }

    /// Let the journal say what the port says.
    fn settle(&mut self) -> io::Result<()> {
        match &mut self.journal {
            Some(journal) => journal.settle(&self.port.ownership()),
            None => Ok(()),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- line

fn drive_line(shared: &Shared, mut line: Line) {
    let mut buf = [0; MAX_READ];
    loop {
        let (want_out, room) = {
            let core = shared.lock();
            if core.stopping {
                break;
            }
            (!core.port.output().is_empty(), core.port.room())
        };
        let Some(ready) = wait_for_line(shared, &line, want_out, room > 0) else { continue };
        if !line.is_open() {
            if line.reopen() {
                let mut core = shared.lock();
                core.line_open = true;
                say("the line is back");
                core.port.report(Event::LineBack);
                core.flush();
            }
            continue;
        }
        let mut core = shared.lock();
        let moved = pump(&mut core, &mut line, &mut buf, ready);
        core.flush();
        match moved {
            Ok(()) => {}
            Err(Trouble::Line(e)) => {
                line.lose();
                core.line_open = false;
                let why = match shared.config.line {
                    LineSpec::Tty { .. } | LineSpec::Pty { .. } => e.to_string(),
                    LineSpec::Tcp { .. } | LineSpec::TcpListen { .. } => {
                        format!("{e}; what was under way in the network then may not have arrived")
                    }
                };
                say(&format!("the line was lost: {why}"));
                core.port.report(Event::LineLost { why });
                core.flush();
            }
            Err(Trouble::Journal(e)) => {
                drop(core);
                shared.fatal(format!("cannot write the journal in {}: {e}", shared.config.state_dir.display()));
                break;
            }
        }
    }
    line.linger(LINGER);
}

/// Wait until the line can move something that is wanted, or somebody wakes us. `None`: look again.
fn wait_for_line(shared: &Shared, line: &Line, want_out: bool, want_in: bool) -> Option<PollFlags> {
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::POLLOUT, want_out && line.is_open());
    wanted.set(PollFlags::POLLIN, want_in || !line.is_open());
    let mut fds = vec![PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
    if let Some(fd) = line.fd() {
        fds.push(PollFd::new(fd, wanted));
    }
    let timeout = line.retry_in().map_or(PollTimeout::NONE, |t| {
        // Rounded up, lest the last millisecond be spent in a loop.
        PollTimeout::try_from(t + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
    });
    if poll(&mut fds, timeout).is_err() {
        return None; // EINTR
    }
    let woken = fds[0].any().unwrap_or(false);
    let ready = fds.get(1).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
    if woken {
        let _ = shared.wake.read();
    }
    Some(ready)
}

enum Trouble {
    Line(io::Error),
    Journal(io::Error),
}

/// Move bytes: what the owner has for the line, then what the line has for the owner.
fn pump(core: &mut Core, line: &mut Line, buf: &mut [u8], ready: PollFlags) -> Result<(), Trouble> {
    for (cell, value) in core.port.take_changed_cells() {
        if let Err(e) = line.set(cell, value) {
            say(&format!("the line does not take {cell:?} {value:#x}: {e}"));
        }
        let cells = line.cells();
        core.port.set_cells(cells);
    }
    let Core { port, journal, .. } = core;
    let Some(journal) = journal else { return Ok(()) };
    loop {
        let output = port.output();
        let output = &output[..output.len().min(MAX_WRITE)];
        if output.is_empty() {
            break;
        }
        journal.will_write(port.ownership().applied, output.len()).map_err(Trouble::Journal)?;
        let written = line.write(output);
        port.written(*written.as_ref().unwrap_or(&0));
        journal.settle(&port.ownership()).map_err(Trouble::Journal)?;
        if written.map_err(Trouble::Line)? == 0 {
            break;
        }
    }
    let trouble = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    if ready.intersects(PollFlags::POLLIN | trouble) {
        let room = port.room().min(buf.len());
        if room == 0 {
            if ready.intersects(trouble) {
                return Err(Trouble::Line(io::Error::new(io::ErrorKind::UnexpectedEof, "its other end closed it")));
            }
            return Ok(());
        }
        journal.will_read().map_err(Trouble::Journal)?;
        let read = line.read(&mut buf[..room]);
        let bytes = &buf[..*read.as_ref().unwrap_or(&0)];
        if !bytes.is_empty() {
            journal.input(port.ownership().in_end, bytes).map_err(Trouble::Journal)?;
            port.device_read(bytes);
        }
        journal.settle(&port.ownership()).map_err(Trouble::Journal)?;
        read.map_err(Trouble::Line)?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------------------ sessions

fn accept_sessions(shared: &Arc<Shared>, listener: &TcpListener) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, most likely: it will not get better by asking at once.
                say(&format!("cannot accept a connection: {e}"));
                thread::sleep(Duration::from_millis(200));
                continue;
            }
        };
        let shaking = shared.handshakes.load(Ordering::Relaxed);
        if shaking >= MAX_HANDSHAKES || shared.lock().sessions.len() >= MAX_SESSIONS {
            say("too many connections, closing the newest");
            continue;
        }
        shared.handshakes.fetch_add(1, Ordering::Relaxed);
        let for_session = shared.clone();
        if let Err(e) = spawn("session", move || serve_session(&for_session, stream)) {
            shared.handshakes.fetch_sub(1, Ordering::Relaxed);
            say(&e.to_string());
        }
    }
}

fn serve_session(shared: &Arc<Shared>, stream: TcpStream) {
    let peer = stream.peer_addr().map_or_else(|_| "(gone)".to_owned(), |a| a.to_string());
    // Read each time: a replaced key holds from the next connection on.
    let timeouts = Timeouts { handshake: ATTACH_WITHIN, dead_peer: DEAD_PEER };
    let opened = Key::load(&shared.config.key_file)
        .map_err(anyhow::Error::from)
        .and_then(|key| Ok(SecureStream::accept(stream, &key, BOARD, timeouts)?))
        .and_then(|stream| Ok((stream.socket()?, stream.socket()?, stream.split())));
    shared.handshakes.fetch_sub(1, Ordering::Relaxed);
    let (socket, for_writer, (reader, writer)) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            say(&e.to_string());
            shared.lock().refusals += 1;
            return;
        }
    };
    let (queue, queued) = mpsc::sync_channel(MAX_QUEUED);
    let id = {
        let mut core = shared.lock();
        let id = core.next_id;
        core.next_id += 1;
        core.sessions.insert(id, Session { queue, socket, peer: peer.clone(), heard: Instant::now() });
        core.port.opened(id);
        core.flush();
        id
    };
    let why = match spawn("session-writer", move || write_session(writer, &for_writer, &queued)) {
        Ok(_) => read_session(shared, id, reader),
        Err(e) => e.to_string(),
    };
    let mut core = shared.lock();
    if core.port.owner() == Some(id) {
        say(&format!("session {id} ({peer}) ended while it owned the line, which is held: {why}"));
    }
    core.drop_session(id);
    core.flush();
}

/// Send what is queued until the session is dropped from the table, then close.
fn write_session(mut writer: SecureWriter, socket: &TcpStream, queued: &Receiver<Vec<u8>>) {
    while let Ok(mut bytes) = queued.recv() {
        while bytes.len() < 64 * 1024 {
            let Ok(more) = queued.try_recv() else { break };
            bytes.extend_from_slice(&more);
        }
        if writer.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = socket.shutdown(Shutdown::Both);
}

/// Feed the port; says why the session ended.
fn read_session(shared: &Shared, id: SessionId, reader: SecureReader) -> String {
    if let Err(e) = reader.set_timeout(Some(ATTACH_WITHIN)) {
        return e.to_string();
    }
    let mut reader = BufReader::with_capacity(64 * 1024, reader);
    let mut record = Record::default();
    let mut attached = false;
    loop {
        match frame::read_record(&mut reader, MAX_PAYLOAD, &mut record.payload) {
            Ok(Some(header)) => record.header = header,
            Ok(None) => return "the machine closed the connection".into(),
            Err(e) => return e.to_string(),
        }
        let message = Message::from_record(&record);
        let mut core = shared.lock();
        if core.stopping {
            return "the service ends".into();
        }
        let Some(session) = core.sessions.get_mut(&id) else { return "it was closed by this side".into() };
        session.heard = Instant::now();
        let verdict = match message {
            Ok(message) => take_message(&mut core, id, record.header.generation, message),
            Err(e) => {
                core.port.refuse(id, e.to_string());
                Ok(Verdict::Nothing)
            }
        };
        core.flush();
        drop(core);
        shared.wake_line();
        match verdict {
            Ok(Verdict::Owner) if !attached => {
                attached = true;
                // From now on the keepalive tells a dead host from a quiet one.
                if let Err(e) = reader.get_ref().set_timeout(None) {
                    return e.to_string();
                }
            }
            Ok(_) => {}
            Err(e) => {
                shared.fatal(format!("cannot write the journal in {}: {e}", shared.config.state_dir.display()));
                return e.to_string();
            }
        }
    }
}

fn take_message(core: &mut Core, id: SessionId, generation: Generation, message: Message) -> io::Result<Verdict> {
    let before = core.port.ownership();
    let Core { port, journal, .. } = core;
    let mut store = |ownership: &_| match journal {
        Some(journal) => journal.own(ownership).map_err(|e| {
            say(&e.to_string());
            e.to_string()
        }),
        None => Err("the board service ends".to_owned()),
    };
    let verdict = port.received(id, generation, message, &mut store);
    if verdict == Verdict::Owner {
        core.attaches += 1;
        let peer = core.sessions.get(&id).map_or("gone", |s| &s.peer);
        let now = core.port.ownership();
        say(&format!(
            "session {id} ({peer}) owns the line as generation {}, output goes on at {}",
            now.generation, now.applied
        ));
    }
    if core.port.ownership() != before {
        core.settle()?;
    }
    Ok(verdict)
}

// ------------------------------------------------------------------------------------------------------------- control

fn serve_control(shared: &Arc<Shared>, listener: &UnixListener) {
    loop {
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(Duration::from_millis(200));
            continue;
        };
        let for_client = shared.clone();
        if let Err(e) = spawn("control-client", move || answer(&for_client, &stream)) {
            say(&e.to_string());
        }
    }
}

fn answer(shared: &Shared, stream: &UnixStream) {
    let mut reader = BufReader::new(stream);
    while let Ok(Some(line)) = control::read_line(&mut reader) {
        let (reply, quit) = match serde_json::from_slice(&line) {
            Ok(BoardRequest::Status) => (control::encode_line(&Reply::Ok(shared.status())), false),
            Ok(BoardRequest::Quit) => (control::encode_line(&Reply::Ok(())), true),
            Err(e) => {
                let why = format!("not a request of this service ({e}); known are status and quit");
                (control::encode_line(&Reply::<()>::Error(why)), false)
            }
        };
        let mut stream = stream;
        if stream.write_all(&reply).is_err() {
            return;
        }
        if quit {
            let _ = shared.exit.send(Exit::Asked("quit")); // the receiver lives until the process ends
        }
    }
}
