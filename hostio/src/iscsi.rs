//! SCSI commands to a logical unit of an iSCSI target (RFC 7143), over libiscsi.
//!
//! ```text
//!  send(command) ─► queue ─► session thread ─► connection ─► target
//!  done(outcome) ◄──────────────────┘   lost? connect again, and send again what has no answer
//! ```
//! One thread and one connection a logical unit. While the target does not answer, commands wait; nothing is lost, and [`Session::trouble`] says since
//! when. A session keeps its name (initiator and ISID) for as long as it lives, so a new connection *reinstates* it: the target ends what the old connection had
//! under way before it accepts the new one (RFC 7143 §6.3.5). So a command that is sent again never meets itself.
//!
//! After a new connection the target may have forgotten this initiator's registration. With a [guard](Session::guard) nothing but urgent commands is sent
//! until somebody has looked after it and said so.

mod library;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, recv};

use crate::Buffer;
use library::{ALIVE, CONNECTED, Connection, Said};
pub use library::{ENV_LIBRARY, load_from, present};

/// A logical unit, and as whom to log in.
#[derive(Clone, PartialEq, Eq)]
pub struct Target {
    /// `host:port`.
    pub portal: String,
    /// The target's name: `iqn.…`.
    pub name: String,
    /// Its logical unit.
    pub lun: u16,
    /// This initiator's name.
    pub initiator: String,
    /// Part of the ISID: another number is another session, and another nexus.
    pub session: u32,
    /// CHAP's user and secret.
    pub chap: Option<(String, String)>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the secret.
        write!(f, "iscsi://{}/{}/{} as {}", self.portal, self.name, self.lun, self.initiator)
    }
}

/// A command's data.
#[derive(Debug)]
pub enum Data {
    /// None.
    None,
    /// To be filled by the target.
    In(Buffer),
    /// For the target.
    Out(Buffer),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// GOOD; so many bytes of the data were not used.
    Good {
        /// Bytes.
        residual: usize,
    },
    /// RESERVATION CONFLICT.
    Conflict,
    /// CHECK CONDITION: sense key and additional sense code with qualifier.
    Check {
        /// Sense key.
        key: u8,
        /// Additional sense code and qualifier.
        ascq: u16,
    },
    /// Another status.
    Other(i32),
    /// The session was ended first.
    Ended,
}

/// Called from the session's thread; it must not wait for other commands.
pub type Done = Box<dyn FnOnce(Status, Data) + Send>;

/// What a target is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A command: its descriptor block, 6 to 16 bytes.
    Cdb(Vec<u8>),
    /// End what anybody has under way in the logical unit (LOGICAL UNIT RESET). What this session itself has under way is sent again.
    ResetUnit,
}

/// A command.
pub struct Command {
    /// What.
    pub what: What,
    /// Its data.
    pub data: Data,
    /// It is sent while the guard has not yet answered, too.
    pub urgent: bool,
    /// Who hears of its end.
    pub done: Done,
}

/// How patient a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// Between two attempts to connect.
    pub again: Duration,
    /// After so long without a word from the target it is asked for a sign of life.
    pub ask: Duration,
    /// After so long without an answer (to that, or to an attempt to connect) the connection is taken for lost.
    pub lost: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { again: Duration::from_secs(1), ask: Duration::from_secs(5), lost: Duration::from_secs(10) }
    }
}

type Guard = Arc<dyn Fn(u64) + Send + Sync>;

#[derive(Default)]
struct State {
    arrived: VecDeque<Command>,
    /// Connections made so far.
    connections: u64,
    /// The one on which ordinary commands may be sent.
    admitted: u64,
    guard: Option<Guard>,
    /// The guard has said no, for good.
    refused: bool,
    /// Since when there is no connection, and why.
    lost: Option<(Instant, String)>,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn wake(&self) {
        // It can only be full, and then it wakes.
        let _ = self.wake.write(1);
    }
}

/// See the [module](self).
pub struct Session {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Log in. Returns when that is done.
    ///
    /// # Errors
    /// libiscsi is missing; the target is not there or refuses: a sentence.
    pub fn start(target: Target, patience: Patience) -> Result<Self, String> {
        present()?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map_err(|e| e.to_string())?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), wake });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("disk-iscsi".into())
            .spawn(move || {
                Run {
                    shared: theirs,
                    target,
                    patience,
                    connection: None,
                    queue: VecDeque::new(),
                    sent: BTreeMap::new(),
                    next: 0,
                }
                .run()
            })
            .map_err(|e| format!("no thread: {e}"))?;
        let session = Self { shared, thread: Some(thread) };
        let mut state = session.shared.state();
        while state.connections == 0 {
            if let Some((_, why)) = &state.lost {
                let why = why.clone();
                drop(state);
                return Err(why);
            }
            state = session.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Ok(session)
    }

    /// Send a command.
    pub fn send(&self, command: Command) {
        self.shared.state().arrived.push_back(command);
        self.shared.wake();
    }

    /// From now on ordinary commands are not sent on a new connection before [`Session::admit`] was called with its number, which the guard
    /// is called with. It is called on the session's thread and must not wait.
    pub fn guard(&self, guard: Arc<dyn Fn(u64) + Send + Sync>) {
        self.shared.state().guard = Some(guard);
    }

    /// Ordinary commands may be sent on this connection.
    pub fn admit(&self, connection: u64) {
        let mut state = self.shared.state();
        state.admitted = state.admitted.max(connection);
        drop(state);
        self.shared.wake();
    }

    /// Ordinary commands are not sent any more: each ends as if the target had refused it with RESERVATION CONFLICT.
    pub fn refuse(&self) {
        self.shared.state().refused = true;
        self.shared.wake();
    }

    /// The connection's number: how many there have been.
    pub fn connection(&self) -> u64 {
        self.shared.state().connections
    }

    /// Since when there has been no connection, and why; `None`: there is one.
    pub fn trouble(&self) -> Option<(Duration, String)> {
        self.shared.state().lost.as_ref().map(|(since, why)| (since.elapsed(), why.clone()))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // It panics only if a callback does, which is reported by the panic itself.
            let _ = thread.join();
        }
    }
}

/// Commands under way at once; more wait here. (The target's own window is smaller, most often; libiscsi keeps to it.)
const FLYING: usize = 64;
/// UNIT ATTENTION says something once, instead of doing the command.
const ATTENTIONS: u32 = 8;
const UNIT_ATTENTION: i32 = 6;

struct Sent {
    what: What,
    urgent: bool,
    done: Done,
    attentions: u32,
}

struct Waiting {
    id: usize,
    sent: Sent,
    data: Data,
}

struct Live {
    connection: Connection,
    /// It is logged in.
    ready: bool,
    number: u64,
    /// When the target was heard last, or the attempt began.
    heard: Instant,
    /// When it was asked for a sign of life that has not come.
    asked: Option<Instant>,
}

struct Run {
    shared: Arc<Shared>,
    target: Target,
    patience: Patience,
    connection: Option<Live>,
    queue: VecDeque<Waiting>,
    sent: BTreeMap<usize, Sent>,
    next: usize,
}

impl Run {
    fn run(mut self) {
        let mut again = Instant::now();
        loop {
            let (admitted, refused, stop) = {
                let mut state = self.shared.state();
                for Command { what, data, urgent, done } in state.arrived.drain(..) {
                    self.queue.push_back(Waiting {
                        id: self.next,
                        sent: Sent { what, urgent, done, attentions: 0 },
                        data,
                    });
                    self.next += 1;
                }
                (state.admitted, state.refused, state.stop)
            };
            if stop {
                return self.end();
            }
            if refused {
                let (urgent, others) = self.queue.drain(..).partition(|waiting| waiting.sent.urgent);
                self.queue = urgent;
                let others: VecDeque<Waiting> = others;
                others.into_iter().for_each(|Waiting { sent, data, .. }| (sent.done)(Status::Conflict, data));
            }
            let now = Instant::now();
            if self.connection.is_none() && now >= again {
                match Connection::begin(&self.target) {
                    Ok(connection) => {
                        self.connection = Some(Live { connection, ready: false, number: 0, heard: now, asked: None });
                    }
                    Err(why) => self.lose(why),
                }
            }
            if let Err(why) = self.send(admitted).and_then(|()| self.keep_alive()).and_then(|()| self.wait(again)) {
                self.lose(why);
            }
            if self.connection.is_none() && again <= now {
                again = Instant::now() + self.patience.again;
            }
        }
    }

    fn send(&mut self, admitted: u64) -> Result<(), String> {
        let Some(live) = self.connection.as_mut().filter(|live| live.ready) else { return Ok(()) };
        let may = |waiting: &Waiting| waiting.sent.urgent || live.number <= admitted;
        while self.sent.len() < FLYING
            && let Some(at) = self.queue.iter().position(may)
            && let Some(Waiting { id, sent, data }) = self.queue.remove(at)
        {
            let begun = match &sent.what {
                What::Cdb(cdb) => live.connection.send(id, cdb, data),
                What::ResetUnit => live.connection.reset_unit(id).map_err(|why| (why, data)),
            };
            match begun {
                Ok(()) => drop(self.sent.insert(id, sent)),
                Err((why, data)) => {
                    self.queue.push_front(Waiting { id, sent, data });
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    fn keep_alive(&mut self) -> Result<(), String> {
        let Patience { ask, lost, .. } = self.patience;
        let Some(live) = self.connection.as_mut() else { return Ok(()) };
        let silent = |for_: Duration| format!("it has not answered for {} s", for_.as_secs_f32().round());
        match live.asked {
            _ if !live.ready && live.heard.elapsed() >= lost => Err(silent(live.heard.elapsed())),
            Some(asked) if asked.elapsed() >= lost => Err(silent(live.heard.elapsed())),
            None if live.ready && live.heard.elapsed() >= ask => {
                live.asked = Some(Instant::now());
                live.connection.ask()
            }
            _ => Ok(()),
        }
    }

    fn wait(&mut self, again: Instant) -> Result<(), String> {
        let Patience { ask, lost, .. } = self.patience;
        let now = Instant::now();
        let until = match &self.connection {
            None => again,
            Some(live) if !live.ready => live.heard + lost,
            Some(live) => live.asked.map_or(live.heard + ask, |asked| asked + lost),
        };
        let left = until.saturating_duration_since(now).as_millis() as u64 + 1;
        let timeout = PollTimeout::try_from(left.min(60_000) as i32).unwrap_or(PollTimeout::ZERO);
        let wake = PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN);
        let socket = self.connection.as_ref().and_then(|live| {
            let events = PollFlags::from_bits_truncate(live.connection.events());
            live.connection.fd().map(|fd| PollFd::new(fd, events))
        });
        let mut fds: Vec<PollFd<'_>> = [Some(wake), socket].into_iter().flatten().collect();
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(format!("waiting for it: {e}")),
        }
        let events = fds.get(1).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        drop(fds);
        // Nothing in it matters but that it is empty again.
        let _ = self.shared.wake.read();
        let Some(live) = self.connection.as_mut() else { return Ok(()) };
        if events.is_empty() {
            return Ok(());
        }
        if live.ready && events.contains(PollFlags::POLLIN) {
            // libiscsi would defer what follows from it: look first.
            let fd = live.connection.fd().map_or(-1, |fd| fd.as_raw_fd());
            match recv(fd, &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err("the target closed the connection".into()),
                Ok(_) | Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(format!("the connection broke: {e}")),
            }
        }
        if live.ready && events.intersects(PollFlags::POLLERR | PollFlags::POLLHUP) {
            return Err("the connection broke".into());
        }
        if events.contains(PollFlags::POLLIN) {
            (live.heard, live.asked) = (Instant::now(), None);
        }
        let ready = live.ready;
        live.connection.service(events.bits()).map_err(|why| match ready {
            true => why,
            // Of a connection that was refused libiscsi says only that it cannot make another.
            false if why.contains("reconnect") => format!("nobody answers at {}", self.target.portal),
            false => why,
        })?;
        self.answered()
    }

    fn answered(&mut self) -> Result<(), String> {
        let Some(live) = self.connection.as_mut() else { return Ok(()) };
        let mut broken = None;
        for (id, said, data) in live.connection.ended() {
            match id {
                CONNECTED if said.status == 0 => {
                    live.ready = true;
                    let mut state = self.shared.state();
                    state.connections += 1;
                    live.number = state.connections;
                    state.lost = None;
                    let guard = state.guard.clone().filter(|_| live.number > 1);
                    if guard.is_none() {
                        state.admitted = live.number;
                    }
                    drop(state);
                    self.shared.changed.notify_all();
                    if let Some(guard) = guard {
                        guard(live.number);
                    }
                }
                CONNECTED => broken = Some(live.connection.error()),
                ALIVE if said.status == 0 => {}
                ALIVE => broken = Some("the connection broke".into()),
                id => {
                    let Some(mut sent) = self.sent.remove(&id) else { continue };
                    match judge(&said) {
                        None => {
                            broken = broken.or(Some(live.connection.error()));
                            self.queue.push_front(Waiting { id, sent, data });
                        }
                        Some(Status::Check { key: 6, .. }) if sent.attentions < ATTENTIONS => {
                            sent.attentions += 1;
                            self.queue.push_front(Waiting { id, sent, data });
                        }
                        // BUSY, TASK SET FULL: it was not done; those before it are.
                        Some(Status::Other(8 | 0x28)) => self.queue.push_front(Waiting { id, sent, data }),
                        Some(status) => (sent.done)(status, data),
                    }
                }
            }
        }
        // Callbacks may have taken a while; what was asked to be sent meanwhile is in the queue.
        broken.map_or(Ok(()), Err)
    }

    /// The connection is gone: what has no answer is sent again, in the order in which it came.
    fn lose(&mut self, why: String) {
        let live = self.connection.take();
        if let Some(live) = live {
            for (id, data) in live.connection.close() {
                if let Some(sent) = self.sent.remove(&id) {
                    self.queue.push_back(Waiting { id, sent, data });
                }
            }
            // What has no data: resets.
            for (id, sent) in std::mem::take(&mut self.sent) {
                self.queue.push_back(Waiting { id, sent, data: Data::None });
            }
        }
        self.queue.make_contiguous().sort_by_key(|waiting| waiting.id);
        let mut state = self.shared.state();
        let since = state.lost.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        state.lost = Some((since, why));
        drop(state);
        self.shared.changed.notify_all();
    }

    fn end(mut self) {
        self.lose("the session was ended".into());
        let arrived = std::mem::take(&mut self.shared.state().arrived);
        for Waiting { sent, data, .. } in self.queue.drain(..) {
            (sent.done)(Status::Ended, data);
        }
        for command in arrived {
            (command.done)(Status::Ended, command.data);
        }
    }
}

/// `None`: it says nothing of the command, only that the connection is no good.
fn judge(said: &Said) -> Option<Status> {
    Some(match said.status {
        0 => Status::Good { residual: said.residual },
        2 if said.key == UNIT_ATTENTION => Status::Check { key: 6, ascq: said.ascq as u16 },
        2 => Status::Check { key: said.key as u8, ascq: said.ascq as u16 },
        0x18 => Status::Conflict,
        // libiscsi's own: cancelled, error, timeout.
        0x0f00_0000.. => return None,
        other => Status::Other(other),
    })
}
