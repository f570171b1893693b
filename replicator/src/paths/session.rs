//! The session with its sockets and threads.
//!
//! Each path has a thread that reads and one that writes; one thread more looks at the clock. They meet in [`Core`], under one lock that is
//! held for no longer than it takes to copy a frame, never across a system call.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use understudy_protocol::control::PathStatus;
use understudy_protocol::secure::{SecureReader, SecureStream, SecureWriter};
use understudy_protocol::urgent;

use super::core::{Core, End, Incarnation, News, Next, Outgoing, Settings};
use super::wire::{Frame, HEADER_LEN, Head, SessionId};
use crate::log;

/// How often the clock is looked at.
const TICK: Duration = Duration::from_millis(10);
/// How long a session that was closed here may still send what was written.
const LINGER: Duration = Duration::from_millis(300);
/// What the kernel holds of a path and has not sent: what lies there cannot take another path.
const NOT_SENT: u32 = 512 << 10;
/// Encrypting so much takes less than a millisecond.
const SHORT_DATA: usize = 64 << 10;

/// One end of a session. It lives as long as one of its paths or its user does.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    /// The other side, for people.
    peer: String,
    began: Instant,
    core: Mutex<Core>,
    /// For each path: its writer has something to do.
    wake: Vec<Condvar>,
    /// Something can be read, or never will.
    readable: Condvar,
    /// Something can be written, or never will.
    writable: Condvar,
    /// It has ended.
    over: Condvar,
    sockets: Mutex<Vec<Option<(Incarnation, TcpStream)>>>,
    addresses: Mutex<Vec<String>>,
}

impl Session {
    /// A session without paths; `addresses` as far as they are known.
    pub fn start(id: SessionId, peer: &str, addresses: Vec<String>, settings: Settings) -> Arc<Self> {
        let paths = addresses.len();
        let this = Arc::new(Self {
            id,
            peer: peer.to_owned(),
            began: Instant::now(),
            core: Mutex::new(Core::new(settings, paths)),
            wake: (0..paths).map(|_| Condvar::new()).collect(),
            readable: Condvar::new(),
            writable: Condvar::new(),
            over: Condvar::new(),
            sockets: Mutex::new((0..paths).map(|_| None).collect()),
            addresses: Mutex::new(addresses),
        });
        let watched = this.clone();
        thread::spawn(move || {
            urgent::this_thread();
            watched.watch();
        });
        this
    }

    /// Its name.
    pub fn id(&self) -> SessionId {
        self.id
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Let go of the core, and wake whoever has something to do.
    fn let_go(&self, core: MutexGuard<'_, Core>) {
        let over = core.is_over().is_some();
        for (path, wake) in self.wake.iter().enumerate() {
            if core.wants(path) {
                wake.notify_all();
            }
        }
        if over || core.has_data() || core.ended().is_some() {
            self.readable.notify_all();
        }
        if over || core.has_room() {
            self.writable.notify_all();
        }
        if over {
            self.over.notify_all();
        }
    }

    // Paths.

    /// Be a path until its connection ends.
    pub fn run_path(self: &Arc<Self>, path: usize, stream: SecureStream) {
        let Ok(socket) = stream.socket() else { return };
        // Best effort: it makes a change of path cheaper.
        let _ = socket2::SockRef::from(&socket).set_tcp_notsent_lowat(NOT_SENT);
        if let (Ok(address), Some(place)) = (stream.peer_addr(), lock(&self.addresses).get_mut(path)) {
            *place = address.to_string();
        }
        let (reader, writer) = stream.split();
        if reader.set_timeout(None).is_err() {
            return;
        }
        let mut core = lock(&self.core);
        let Some(incarnation) = core.attach(path, self.now()) else { return };
        let old = match (socket.try_clone(), lock(&self.sockets).get_mut(path)) {
            (Ok(twin), Some(place)) => place.replace((incarnation, twin)),
            _ => None,
        };
        self.let_go(core);
        if let Some((_, old)) = old {
            let _ = old.shutdown(Shutdown::Both);
        }
        let sender = self.clone();
        let writing = thread::spawn(move || {
            urgent::this_thread();
            sender.write_path(path, incarnation, writer);
        });
        let why = self.read_path(path, incarnation, reader);
        let mut core = lock(&self.core);
        core.detach(path, incarnation, &why, self.now());
        self.let_go(core);
        let _ = socket.shutdown(Shutdown::Both);
        let _ = writing.join();
    }

    fn read_path(&self, path: usize, incarnation: Incarnation, mut reader: SecureReader) -> String {
        loop {
            urgent::pace();
            let frame = match read_frame(&mut reader) {
                Ok(Some(frame)) => frame,
                Ok(None) => return "the peer closed it".into(),
                Err(e) => return e.to_string(),
            };
            let mut core = lock(&self.core);
            let heard = core.heard(path, incarnation, frame, self.now());
            self.let_go(core);
            if let Err(why) = heard {
                return why;
            }
        }
    }

    fn write_path(&self, path: usize, incarnation: Incarnation, mut writer: SecureWriter) {
        loop {
            urgent::pace();
            let mut core = lock(&self.core);
            let next = core.next(path, incarnation, self.now());
            let written = match next {
                Next::Wait => {
                    let Some(wake) = self.wake.get(path) else { return };
                    // (Spurious ends of the wait are as good as any.)
                    drop(wake.wait(core));
                    continue;
                }
                Next::End => {
                    drop(core);
                    // What was sent arrives; the reading thread ends with the peer's end, or with the session.
                    let _ = writer.socket().and_then(|socket| socket.shutdown(Shutdown::Write));
                    return;
                }
                Next::Send(Outgoing::Data(bytes)) => {
                    drop(core);
                    urgent::heavy(bytes.len() > SHORT_DATA, || writer.write_all(&bytes))
                }
                Next::Send(Outgoing::Control(frame)) => {
                    drop(core);
                    writer.write_all(&frame.encode())
                }
            };
            if let Err(e) = written {
                let mut core = lock(&self.core);
                core.detach(path, incarnation, &format!("it broke: {e}"), self.now());
                self.let_go(core);
                let _ = writer.socket().and_then(|socket| socket.shutdown(Shutdown::Both));
                return;
            }
        }
    }

    /// A path could not be connected.
    pub fn failed(&self, path: usize, why: &str) {
        let mut core = lock(&self.core);
        core.failed(path, why, self.now());
        self.let_go(core);
    }

    /// The peer does not know this session.
    pub fn refused(&self, why: &str) {
        let mut core = lock(&self.core);
        core.refused(why);
        self.let_go(core);
    }

    /// Wait for the session's end, at most so long; whether it has ended.
    pub fn wait_over(&self, limit: Duration) -> bool {
        let core = lock(&self.core);
        let waited = self.over.wait_timeout_while(core, limit, |core| core.is_over().is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.is_over().is_some()
    }

    fn watch(&self) {
        loop {
            thread::sleep(TICK);
            let mut core = lock(&self.core);
            core.tick(self.now());
            let news = core.take_news();
            let report = if news.is_empty() { Vec::new() } else { self.status_of(&core) };
            let current: Vec<_> = (0..self.wake.len()).map(|path| core.incarnation(path)).collect();
            let lost = core.is_over().is_some();
            self.let_go(core);
            for news in &news {
                log::line(&self.tell(news, &report));
            }
            for (place, current) in lock(&self.sockets).iter_mut().zip(current) {
                if place.as_ref().is_some_and(|(incarnation, _)| Some(*incarnation) != current)
                    && let Some((_, socket)) = place.take()
                {
                    let _ = socket.shutdown(Shutdown::Both);
                }
            }
            if lost {
                break;
            }
        }
        // (The peer's end is not ours: somebody may still read.)
        thread::sleep(LINGER);
        for (_, socket) in lock(&self.sockets).iter_mut().filter_map(Option::take) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    // The stream.

    fn read(&self, buf: &mut [u8], timeout: Option<Duration>) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut core = lock(&self.core);
        loop {
            let n = core.read(buf);
            if n > 0 {
                self.let_go(core);
                return Ok(n);
            }
            match core.ended() {
                Some(End::Closed) => return Ok(0),
                Some(other) => return Err(io::Error::new(ErrorKind::ConnectionReset, other)),
                None => core = wait(&self.readable, core, until, ErrorKind::WouldBlock)?,
            }
        }
    }

    fn write(&self, bytes: &[u8], timeout: Option<Duration>) -> io::Result<usize> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let mut core = lock(&self.core);
        loop {
            if let Some(end) = core.is_over() {
                return Err(io::Error::new(ErrorKind::BrokenPipe, end));
            }
            let n = core.write(bytes);
            if n > 0 || bytes.is_empty() {
                self.let_go(core);
                return Ok(n);
            }
            core = wait(&self.writable, core, until, ErrorKind::TimedOut)?;
        }
    }

    /// End it. What was written is still sent, if the peer takes it at once.
    pub fn close(&self) {
        let mut core = lock(&self.core);
        core.close();
        self.let_go(core);
    }

    // For people.

    /// Each path.
    pub fn status(&self) -> Vec<PathStatus> {
        self.status_of(&lock(&self.core))
    }

    fn status_of(&self, core: &Core) -> Vec<PathStatus> {
        let addresses = lock(&self.addresses);
        let of = |(address, path): (&String, super::core::PathReport)| PathStatus {
            address: address.clone(),
            works: path.works,
            active: path.active,
            since_ms: path.since.as_millis() as u64,
            why: path.why,
            losses: path.losses,
            sent_bytes: path.sent_bytes,
            received_bytes: path.received_bytes,
            again_bytes: path.again_bytes,
            rtt_us: path.rtt.as_micros() as u64,
        };
        addresses.iter().zip(core.report(self.now())).map(of).collect()
    }

    fn tell(&self, news: &News, report: &[PathStatus]) -> String {
        let name = |path: &usize| report.get(*path).map_or("?", |p| p.address.as_str());
        match news {
            News::Missing { path, why } => {
                let left: Vec<_> = report.iter().filter(|p| p.works).map(|p| p.address.as_str()).collect();
                let left = match left[..] {
                    [] => "no other path works".to_owned(),
                    [last] => format!("replication goes on over {last} alone"),
                    _ => format!("replication goes on over {}", left.join(", ")),
                };
                format!("ALARM: the path {} with {} is missing: {why}; {left}", name(path), self.peer)
            }
            News::Back { path, after } => {
                format!("the path {} with {} works again, after {} ms", name(path), self.peer, after.as_millis())
            }
            News::Switched { path, again } => {
                format!("the path {} with {} carries the data now; {again} bytes are sent again", name(path), self.peer)
            }
        }
    }
}

/// The next frame of a path; `None` at its end.
pub fn read_frame(reader: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut header = [0; HEADER_LEN];
    let mut have = 0;
    while have < HEADER_LEN {
        match reader.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let bad = |e| io::Error::new(ErrorKind::InvalidData, e);
    let head = Head::parse(&header).map_err(bad)?;
    let mut payload = Vec::with_capacity(head.payload_len());
    let n = reader.take(head.payload_len() as u64).read_to_end(&mut payload)?;
    if n < head.payload_len() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    head.frame(payload).map(Some).map_err(bad)
}

fn wait<'a>(
    condition: &Condvar,
    core: MutexGuard<'a, Core>,
    until: Option<Instant>,
    late: ErrorKind,
) -> io::Result<MutexGuard<'a, Core>> {
    let Some(until) = until else { return Ok(condition.wait(core).unwrap_or_else(PoisonError::into_inner)) };
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(late.into());
    }
    Ok(condition.wait_timeout(core, left).unwrap_or_else(PoisonError::into_inner).0)
}

/// The reading half of the stream. Dropping it closes the session.
#[derive(Debug)]
pub struct Reader {
    session: Arc<Session>,
    timeout: Option<Duration>,
}

/// The writing half of the stream. Dropping it closes the session.
#[derive(Debug)]
pub struct Writer {
    session: Arc<Session>,
    timeout: Option<Duration>,
}

/// The two halves of a session's stream.
pub fn halves(session: &Arc<Session>) -> (Reader, Writer) {
    (Reader { session: session.clone(), timeout: None }, Writer { session: session.clone(), timeout: None })
}

impl Reader {
    /// Let reads fail with [`ErrorKind::WouldBlock`] when nothing came for so long.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }
}

impl Writer {
    /// Let writes fail with [`ErrorKind::TimedOut`] when there was no room for so long.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.timeout = timeout;
    }
}

impl Read for Reader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.session.read(buf, self.timeout)
    }
}

impl Write for Writer {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.session.write(buf, self.timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.session.close();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.session.close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in another thread must not take the others with it; each holder leaves the data usable at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
