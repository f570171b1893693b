//! The machine's end of a serial line: a [`BoardLink`] keeps one port of one machine attached to its board.
//!
//! The VMM starts a link when the machine runs (never on a standby), hands it output bytes *after* their checkpoint was
//! committed, and tells it which inputs are contained in a committed checkpoint. Everything else is the link's: connecting
//! and reconnecting, attaching under the machine's generation, sending again what the board has not applied, dropping
//! inputs that were handed over already.

//!
//! ```text
//! VMM threads ── send, acknowledge_input ──► MachinePort (mutex) ◄── reader thread: messages from the board
//!                                                 │
//!                 event callback ◄── link thread: connects, writes, pings, calls back ──► socket
//! ```

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use understudy_protocol::board::{MAX_PAYLOAD, MachineEvent, MachinePort, Message};
use understudy_protocol::frame::{self, Record};
use understudy_protocol::ids::Generation;
use understudy_protocol::key::Key;
use understudy_protocol::secure::{BOARD, SecureReader, SecureStream, SecureWriter, Timeouts};

/// First and longest pause between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// For the TCP connection and for the handshake, each.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1000);
/// How often an idle board is asked whether it is there.
const PING_EVERY: Duration = Duration::from_millis(300);
/// A board that was not heard for so long is given up, and connected to anew.
const DEAD_AFTER: Duration = Duration::from_millis(1500);
/// Most bytes put into one write.
const BATCH: usize = 128 * 1024;

/// Where the board is, and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// `HOST:PORT` of the board service.
    pub address: String,
    /// The device's name at the board.
    pub device: String,
    /// The machine's name.
    pub machine: String,
    /// The cluster's key.
    pub key_file: PathBuf,
}

/// What a link tells the VMM. Offsets are bytes since the machine's cold boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The session is up; the board's line has taken all output before `applied`.
    Attached {
        /// Offset of the first output byte that the line has not taken.
        applied: u64,
    },
    /// The line has taken all output before `upto`: it need not be kept any more.
    OutputApplied {
        /// Offset of the first output byte that the line has not taken.
        upto: u64,
    },
    /// Input. Each offset is handed over once per link, in order. An `offset` beyond the end of the previous input means
    /// that the board lost the bytes between (a [`LinkEvent::Notice`] said so): go on counting from `offset`.
    Input {
        /// Offset of the first of `bytes`.
        offset: u64,
        /// At least one byte.
        bytes: Vec<u8>,
    },
    /// The board belongs to a newer generation: stop the machine. The link has ended.
    Fenced {
        /// The generation that owns the line now.
        newer: Generation,
    },
    /// The board does not want this machine (wrong key, wrong device, …); the link goes on trying.
    Refused {
        /// A sentence for the administrator.
        why: String,
    },
    /// There is no session; the link goes on trying.
    Disconnected {
        /// A sentence for the administrator.
        why: String,
    },
    /// Something that an administrator wants to read in the log: bytes lost at the board, a board that restarted, ….
    Notice {
        /// A sentence.
        what: String,
    },
}

/// What a link tells, and on which thread: its own. The callback must not wait for the link.
pub type EventHandler = Box<dyn Fn(LinkEvent) + Send>;

/// One port's link to its board. Dropping it ends the link without waiting.
#[derive(Debug)]
pub struct BoardLink {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    core: Mutex<Core>,
    /// Something for the link's thread to do.
    wake: Condvar,
}

#[derive(Debug)]
struct Core {
    port: MachinePort,
    stop: bool,
    /// The caller broke the rules of `send`; the link cannot go on.
    fault: Option<String>,
    /// Why the present connection ended, if it has.
    ended: Option<String>,
    heard: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // No code that can panic runs under the lock; if it did, the port's own checks still hold.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BoardLink {
    /// Start linking, in the background.
    ///
    /// * `generation`: under which the machine runs.
    /// * `life`: the generation under which the machine was cold-booted. Part of the checkpointed state; equal to
    ///   `generation` at a cold boot. A life that the board does not know starts both streams anew at the offsets given.
    /// * `tx_acked`: offset up to which the checkpointed state knows output as applied.
    /// * `rx_delivered`: offset up to which the checkpointed state has taken input.
    pub fn start(
        config: LinkConfig,
        generation: Generation,
        life: Generation,
        tx_acked: u64,
        rx_delivered: u64,
        events: EventHandler,
    ) -> Self {
        let port = MachinePort::new(&config.machine, &config.device, generation, life, tx_acked, rx_delivered);
        let core = Core { port, stop: false, fault: None, ended: None, heard: Instant::now() };
        let shared = Arc::new(Shared { core: Mutex::new(core), wake: Condvar::new() });
        let link = Link { config, shared: shared.clone(), events, told: None };
        let thread = thread::Builder::new().name("board-link".into()).spawn(move || link.run());
        // A process that cannot have one more thread cannot have a serial line; the VMM sees a link that never attaches.
        Self { shared, thread: thread.ok() }
    }

    /// Output of a committed checkpoint. `offset` must be where the previous call ended or before (what is known already
    /// is skipped); the first call starts at or before `tx_acked`. Never waits. The link keeps the bytes until the line
    /// took them, so at most what the VMM itself keeps.
    pub fn send(&self, offset: u64, bytes: &[u8]) {
        let mut core = self.shared.lock();
        if let Err(why) = core.port.queue_output(offset, bytes) {
            core.fault.get_or_insert(why);
        }
        drop(core);
        self.shared.wake.notify_all();
    }

    /// A committed checkpoint has taken all input before `upto`: the board may forget it. Never waits.
    pub fn acknowledge_input(&self, upto: u64) {
        self.shared.lock().port.acknowledge_input(upto);
        self.shared.wake.notify_all();
    }

    /// Write out what may be sent, end the session and the threads (at most about a second if the board is dead). The
    /// board holds the line as it is. Do not call it from the event callback: drop the link there.
    pub fn stop(mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            // It can only have panicked in the callback, which has said so on stderr.
            let _ = thread.join();
        }
    }

    fn ask_to_stop(&self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
    }
}

impl Drop for BoardLink {
    fn drop(&mut self) {
        self.ask_to_stop();
    }
}

/// What the link's thread owns.
struct Link {
    config: LinkConfig,
    shared: Arc<Shared>,
    events: EventHandler,
    /// The last reason given for having no session, so that each is given once.
    told: Option<LinkEvent>,
}

/// Whether the link goes on.
enum Next {
    Again,
    End,
}

impl Link {
    fn run(mut self) {
        let mut pause = RETRY.0;
        loop {
            match self.open() {
                Ok(stream) => match self.session(stream) {
                    Ok((Next::End, _)) => return,
                    Ok((Next::Again, attached)) if attached => pause = RETRY.0,
                    Ok(_) => {}
                    Err(e) => self.tell(LinkEvent::Disconnected { why: self.sentence(&e.to_string()) }),
                },
                Err(event) => self.tell(event),
            }
            let core = self.shared.lock();
            let waited = self.shared.wake.wait_timeout_while(core, pause, |c| !c.stop && c.fault.is_none());
            let (mut core, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if let Some(why) = core.fault.take() {
                drop(core);
                (self.events)(LinkEvent::Refused { why });
                return;
            }
            if core.stop {
                return;
            }
            pause = (pause * 2).min(RETRY.1);
        }
    }

    /// A reason for having no session: told when it is new.
    fn tell(&mut self, event: LinkEvent) {
        if self.told.as_ref() != Some(&event) {
            (self.events)(event.clone());
            self.told = Some(event);
        }
    }

    fn sentence(&self, what: &str) -> String {
        let LinkConfig { address, device, .. } = &self.config;
        format!("no session with device {device} at board {address}: {what}")
    }

    /// Connect and authenticate.
    fn open(&self) -> Result<SecureStream, LinkEvent> {
        let refused = |e: String| LinkEvent::Refused { why: self.sentence(&e) };
        let failed = |e: io::Error| LinkEvent::Disconnected { why: self.sentence(&e.to_string()) };
        let key = Key::load(&self.config.key_file).map_err(|e| refused(e.to_string()))?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.config.address.to_socket_addrs().map_err(failed)? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(tcp) => {
                    let timeouts = Timeouts { handshake: CONNECT_TIMEOUT, dead_peer: DEAD_AFTER };
                    return SecureStream::connect(tcp, &key, BOARD, timeouts).map_err(|e| match e {
                        e @ (understudy_protocol::secure::SecureError::Timeout { .. }
                        | understudy_protocol::secure::SecureError::Io { .. }) => {
                            LinkEvent::Disconnected { why: self.sentence(&e.to_string()) }
                        }
                        e => refused(e.to_string()),
                    });
                }
                Err(e) => last = e,
            }
        }
        Err(failed(last))
    }

    /// One connection, from handshake to end. The flag says whether it ever was attached.
    fn session(&mut self, stream: SecureStream) -> io::Result<(Next, bool)> {
        let socket = stream.socket()?;
        let (reader, mut writer) = stream.split();
        writer.set_timeout(Some(CONNECT_TIMEOUT))?;
        {
            let mut core = self.shared.lock();
            core.port.connected();
            core.ended = None;
            core.heard = Instant::now();
        }
        let shared = self.shared.clone();
        let reading = thread::Builder::new().name("board-reader".into()).spawn(move || {
            let why = read_all(&shared, reader);
            shared.lock().ended.get_or_insert(why);
            shared.wake.notify_all();
        })?;
        let (next, attached) = self.pump(&mut writer);
        // Ends the reader, and tells the board.
        let _ = socket.shutdown(Shutdown::Both);
        let _ = reading.join(); // it has no reason to panic, and nothing to say if it did
        self.shared.lock().port.disconnected();
        Ok((next, attached))
    }

    /// Write, ping and call back until the connection ends.
    fn pump(&mut self, writer: &mut SecureWriter) -> (Next, bool) {
        let mut attached = false;
        let mut refused = false;
        let mut next_ping = Instant::now() + PING_EVERY;
        let mut token = 0;
        loop {
            let mut core = self.shared.lock();
            let now = Instant::now();
            if now >= next_ping {
                token += 1;
                core.port.ping(token);
                next_ping = now + PING_EVERY;
            }
            if core.stop {
                core.port.detach();
            }
            if core.fault.is_some() {
                return (Next::Again, attached); // `run` reports it
            }
            let events: Vec<_> = std::iter::from_fn(|| core.port.poll_event()).collect();
            let bytes = take_messages(&mut core.port);
            let idle = events.is_empty() && bytes.is_empty();
            if idle {
                if core.stop {
                    return (Next::End, attached);
                }
                if core.ended.is_none() && core.heard.elapsed() >= DEAD_AFTER {
                    core.ended = Some(format!("the board was not heard for {} ms", DEAD_AFTER.as_millis()));
                }
                if let Some(why) = core.ended.clone() {
                    drop(core);
                    if !refused {
                        self.tell(LinkEvent::Disconnected { why: self.sentence(&why) });
                    }
                    return (Next::Again, attached);
                }
                // Poisoning is dealt with by the next `lock`.
                drop(self.shared.wake.wait_timeout(core, next_ping.saturating_duration_since(now)));
                continue;
            }
            let leaving = core.stop;
            drop(core);
            for event in events {
                attached |= matches!(event, MachineEvent::Attached { .. });
                refused |= matches!(event, MachineEvent::Refused { .. });
                if self.call_back(event) {
                    return (Next::End, attached);
                }
            }
            if let Err(e) = writer.write_all(&bytes) {
                self.shared.lock().ended.get_or_insert(e.to_string());
            } else if leaving {
                return (Next::End, attached);
            }
        }
    }

    /// Hand an event over; true if it was the last.
    fn call_back(&mut self, event: MachineEvent) -> bool {
        let fenced = matches!(event, MachineEvent::Fenced { .. });
        match event {
            MachineEvent::Attached { applied } => {
                self.told = None;
                (self.events)(LinkEvent::Attached { applied });
            }
            MachineEvent::OutputApplied { upto } => (self.events)(LinkEvent::OutputApplied { upto }),
            MachineEvent::Input { offset, bytes } => (self.events)(LinkEvent::Input { offset, bytes }),
            MachineEvent::Fenced { newer } => (self.events)(LinkEvent::Fenced { newer }),
            MachineEvent::Refused { why } => {
                let why = self.sentence(&why);
                self.tell(LinkEvent::Refused { why });
            }
            MachineEvent::Notice { what } => (self.events)(LinkEvent::Notice { what }),
        }
        fenced
    }
}

/// The messages that wait, as bytes, at most about [`BATCH`] of them.
fn take_messages(port: &mut MachinePort) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < BATCH {
        let Some(message) = port.poll_message() else { break };
        // Only a payload of 4 GiB cannot be written; the port cuts data at MAX_DATA.
        let _ = message.encode(port.generation(), &mut bytes);
    }
    bytes
}

/// Feed the port from the socket until it ends; says why it did.
fn read_all(shared: &Shared, reader: SecureReader) -> String {
    let mut reader = io::BufReader::with_capacity(64 * 1024, reader);
    let mut record = Record::default();
    loop {
        match frame::read_record(&mut reader, MAX_PAYLOAD, &mut record.payload) {
            Ok(Some(header)) => record.header = header,
            Ok(None) => return "the board closed the connection".into(),
            Err(e) => return e.to_string(),
        }
        let message = match Message::from_record(&record) {
            Ok(message) => message,
            Err(e) => return e.to_string(),
        };
        let mut core = shared.lock();
        core.heard = Instant::now();
        let taken = core.port.received(message);
        drop(core);
        shared.wake.notify_all();
        if let Err(why) = taken {
            return why;
        }
    }
}
