//! Makes a session's paths, and makes them again when they break, on the side that connects.
//!
//! ```text
//!  dial ──► Noise ──► nobody has opened the session yet? ── yes: Open ──► Accept: it is there
//!    ▲                   │ no                             └─ no answer: the next path opens another session
//!    │                   └─► Join ──► Accept ──► a path until it breaks ──┐
//!    └──────────────────────────── after a while ◄────────────────────────┘
//! ```
//! All paths are dialled at once, so that a plane that is dead at the beginning costs no time. Each has a thread, until the session ends.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use understudy_protocol::secure::SecureStream;
use understudy_protocol::urgent;

use super::core::Settings;
use super::session::{Session, read_frame};
use super::wire::{Frame, SessionId};

/// From a path's end to the next attempt.
const RETRY: Duration = Duration::from_millis(200);
/// For the answer to the first frame of a path.
const ANSWER: Duration = Duration::from_secs(1);

/// Connects to an address and proves the key.
pub type Dial = dyn Fn(&str) -> Result<SecureStream, String> + Send + Sync;

/// Where the session stands before it is there.
enum Stage {
    Nobody,
    /// A path is about to open it.
    Opening,
    Open(Arc<Session>),
    /// Nobody waits for it any more.
    GivenUp,
}

struct Meeting {
    peer: String,
    addresses: Vec<String>,
    settings: Settings,
    dial: Box<Dial>,
    /// With what has gone wrong on each path so far.
    stage: Mutex<(Stage, Vec<Option<String>>)>,
    changed: Condvar,
}

/// What a path that is connected may do.
enum Turn {
    Open,
    Join(Arc<Session>),
    Leave,
}

/// A session with the peer at these addresses, as soon as one path is there. The error is what went wrong on each.
pub fn connect(
    peer: &str,
    addresses: Vec<String>,
    settings: Settings,
    patience: Duration,
    dial: Box<Dial>,
) -> Result<Arc<Session>, String> {
    let paths = addresses.len();
    let stage = Mutex::new((Stage::Nobody, vec![None; paths]));
    let meeting =
        Arc::new(Meeting { peer: peer.to_owned(), addresses, settings, dial, stage, changed: Condvar::new() });
    for path in 0..paths {
        let meeting = meeting.clone();
        thread::spawn(move || {
            urgent::this_thread();
            meeting.keep(path);
        });
    }
    let until = Instant::now() + patience;
    let mut stage = lock(&meeting.stage);
    loop {
        if let (Stage::Open(session), _) = &*stage {
            return Ok(session.clone());
        }
        let left = until.saturating_duration_since(Instant::now());
        let failed = matches!(stage.0, Stage::Nobody) && stage.1.iter().all(Option::is_some);
        if failed || left.is_zero() {
            stage.0 = Stage::GivenUp;
            meeting.changed.notify_all();
            let each = meeting.addresses.iter().zip(&stage.1);
            let each =
                each.map(|(address, why)| format!("{address}: {}", why.as_deref().unwrap_or("no answer in time")));
            return Err(each.collect::<Vec<_>>().join("; "));
        }
        stage = meeting.changed.wait_timeout(stage, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Meeting {
    /// Make the path and keep it until the session ends.
    fn keep(&self, path: usize) {
        let Some(address) = self.addresses.get(path) else { return };
        loop {
            match (self.dial)(address) {
                Ok(stream) => match self.turn() {
                    Turn::Open => self.open(path, stream),
                    Turn::Join(session) => join(&session, path, stream),
                    Turn::Leave => return,
                },
                Err(why) => self.failed(path, why),
            }
            if self.pause() {
                return;
            }
        }
    }

    /// Wait while another path opens the session.
    fn turn(&self) -> Turn {
        let stage = lock(&self.stage);
        let waiting = |stage: &mut (Stage, _)| matches!(stage.0, Stage::Opening);
        let mut stage = self.changed.wait_while(stage, waiting).unwrap_or_else(PoisonError::into_inner);
        match &stage.0 {
            Stage::Open(session) => Turn::Join(session.clone()),
            Stage::Nobody => {
                stage.0 = Stage::Opening;
                Turn::Open
            }
            Stage::Opening | Stage::GivenUp => Turn::Leave,
        }
    }

    /// Open the session on this path, and be that path until it breaks.
    fn open(&self, path: usize, mut stream: SecureStream) {
        // A new number for each attempt: whether an attempt without an answer has opened a session does not matter.
        let opened = random().and_then(|session| {
            greet(&mut stream, &Frame::Open { session, path, paths: self.addresses.len() })?;
            Ok(session)
        });
        let mut stage = lock(&self.stage);
        let given_up = matches!(stage.0, Stage::GivenUp);
        match opened {
            Ok(_) if given_up => return,
            Ok(id) => {
                let session = Session::start(id, &self.peer, self.addresses.clone(), self.settings);
                stage.0 = Stage::Open(session.clone());
                self.changed.notify_all();
                drop(stage);
                return session.run_path(path, stream);
            }
            Err(_) if given_up => {}
            Err(e) => {
                stage.0 = Stage::Nobody;
                if let Some(place) = stage.1.get_mut(path) {
                    *place = Some(e.to_string());
                }
            }
        }
        self.changed.notify_all();
    }

    fn failed(&self, path: usize, why: String) {
        let mut stage = lock(&self.stage);
        if let Stage::Open(session) = &stage.0 {
            session.failed(path, &why);
        }
        if let Some(place) = stage.1.get_mut(path) {
            *place = Some(why);
        }
        self.changed.notify_all();
    }

    /// A while; whether nothing is to be made any more.
    fn pause(&self) -> bool {
        let session = match &lock(&self.stage).0 {
            Stage::Open(session) => Some(session.clone()),
            Stage::GivenUp => return true,
            Stage::Nobody | Stage::Opening => None,
        };
        match session {
            Some(session) => session.wait_over(RETRY),
            None => {
                let stage = lock(&self.stage);
                let waiting = |stage: &mut (Stage, _)| matches!(stage.0, Stage::Nobody | Stage::Opening);
                let waited = self.changed.wait_timeout_while(stage, RETRY, waiting);
                let (stage, _) = waited.unwrap_or_else(PoisonError::into_inner);
                matches!(stage.0, Stage::GivenUp)
            }
        }
    }
}

fn join(session: &Arc<Session>, path: usize, mut stream: SecureStream) {
    match greet(&mut stream, &Frame::Join { session: session.id(), path }) {
        Ok(()) => session.run_path(path, stream),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => session.refused(&e.to_string()),
        Err(e) => session.failed(path, &e.to_string()),
    }
}

/// Say what the path is for, and hear whether it may be. A refusal is [`io::ErrorKind::ConnectionRefused`].
fn greet(stream: &mut SecureStream, first: &Frame) -> io::Result<()> {
    stream.socket()?.set_read_timeout(Some(ANSWER))?;
    stream.write_all(&first.encode())?;
    match read_frame(stream)? {
        Some(Frame::Accept) => Ok(()),
        Some(Frame::Reject(why)) => Err(io::Error::new(io::ErrorKind::ConnectionRefused, why)),
        _ => Err(io::Error::other("the peer does not answer as a path's end does")),
    }
}

fn random() -> io::Result<SessionId> {
    let mut id = [0; 16];
    getrandom::fill(&mut id).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(SessionId(id))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
