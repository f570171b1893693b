//! The session without I/O: one stream of bytes each way over several paths, any of which may fall silent, break, come back.
//!
//! ```text
//!           write ─► chunks, numbered by offset ─► next(active path) ══► heard ─► in order? ready ─► read
//!                      │ kept until acknowledged                            │ early: kept, behind: dropped
//!                      └──── again on another path when this one ◄══ Ack ◄──┘
//!                            is silent, slow or gone
//! ```
//! Exactly one path, the *active* one, carries data; all are asked all the time whether they work. A path that owes an answer for
//! [`Settings::silent_after`] is *silent*: if another is not, that one becomes active and everything that is not acknowledged goes out on
//! it again. That costs some bytes if the path was only slow, so it is done early. What arrives twice is recognised by its offset.
//!
//! Only an answer proves that a path works: that the peer can be heard on it does not say that it hears us.
//!
//! What always holds: the bytes read are the bytes written, once each, in order; at most [`Settings::window`] bytes are kept each way.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::wire::{self, Frame, HEADER_LEN, Level};

/// Most paths of a session.
pub const MAX_PATHS: usize = 8;

/// When what is done.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Bytes that may be on their way, or arrived and not read, in each direction.
    pub window: u64,
    /// From one question on a path to the next.
    pub ping_every: Duration,
    /// A path that owes an answer for so long is silent.
    pub silent_after: Duration,
    /// The active path is slow when a chunk is not acknowledged for so long, and another path answers four times as fast.
    pub slow_after: Duration,
    /// A path that is silent for so long, while another is not, is given up; it may be connected again.
    pub give_up_after: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: 8 << 20,
            ping_every: Duration::from_millis(40),
            silent_after: Duration::from_millis(80),
            slow_after: Duration::from_millis(150),
            give_up_after: Duration::from_secs(1),
        }
    }
}

impl Settings {
    /// A path must be left before the peer counts as lost.
    pub fn within(peer_timeout: Duration) -> Self {
        let usual = Self::default();
        Self {
            ping_every: usual.ping_every.min(peer_timeout / 8),
            silent_after: usual.silent_after.min(peer_timeout / 4),
            slow_after: usual.slow_after.min(peer_timeout / 2),
            give_up_after: usual.give_up_after.min(peer_timeout),
            ..usual
        }
    }
}

/// From one switch because of slowness to the next.
const SLOW_AGAIN: Duration = Duration::from_secs(1);

/// Which connection of a path: what an older one still says belongs to the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Incarnation(u64);

/// What a path's writer does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Send this.
    Send(Outgoing),
    /// Nothing for now.
    Wait,
    /// This connection has nothing to send any more.
    End,
}

/// Bytes to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outgoing {
    /// A data frame, as it travels.
    Data(Arc<Vec<u8>>),
    /// Anything else.
    Control(Frame),
}

/// Why a session has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// In order: everything that was written has been read.
    #[error("the peer closed it")]
    Closed,
    /// By this side.
    #[error("it was closed here")]
    Here,
    /// No path is left.
    #[error("{0}")]
    Lost(String),
}

/// Something worth telling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// A path does not answer, or broke, or could not be made.
    Missing {
        /// Which.
        path: usize,
        /// A few words.
        why: String,
    },
    /// It works again.
    Back {
        /// Which.
        path: usize,
        /// How long it was missing.
        after: Duration,
    },
    /// Another path carries the data from here on.
    Switched {
        /// This one.
        path: usize,
        /// Bytes that are sent again.
        again: u64,
    },
}

/// A path as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathReport {
    /// It is connected and answers.
    pub works: bool,
    /// It carries the data.
    pub active: bool,
    /// For how long it has worked, or has been missing.
    pub since: Duration,
    /// Why it is missing.
    pub why: String,
    /// Times that it went missing.
    pub losses: u64,
    /// Bytes of the stream and of control frames.
    pub sent_bytes: u64,
    /// The same from the peer.
    pub received_bytes: u64,
    /// Bytes of the stream that were sent on it, and before on another path (or on an earlier connection).
    pub again_bytes: u64,
    /// Round trip, smoothed; zero until known.
    pub rtt: Duration,
}

#[derive(Debug)]
struct Chunk {
    offset: u64,
    /// With its header.
    bytes: Arc<Vec<u8>>,
    /// Where and when it was sent last.
    sent: Option<(usize, Duration)>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.offset + (self.bytes.len() - HEADER_LEN) as u64
    }
}

#[derive(Debug, Default)]
struct Path {
    /// `None` = not connected.
    up: Option<Incarnation>,
    silent: bool,
    /// When it began to work, or went missing.
    since: Duration,
    /// It was said that it is missing.
    missed: bool,
    why: String,
    losses: u64,
    /// Next offset to send on it, while it is active.
    cursor: u64,
    /// End of what was sent on this connection.
    flight_end: u64,
    /// An answer is owed since.
    owed: Option<Duration>,
    ping_due: bool,
    /// Number of the ping that was not answered yet, and when it was sent.
    ping: Option<(u64, Duration)>,
    pinged: Duration,
    pong_due: Option<u64>,
    ack_due: bool,
    update_due: bool,
    closed: bool,
    sent_bytes: u64,
    received_bytes: u64,
    again_bytes: u64,
    rtt: Option<Duration>,
}

impl Path {
    fn usable(&self) -> bool {
        self.up.is_some() && !self.silent
    }
}

/// One end of a session.
#[derive(Debug)]
pub struct Core {
    settings: Settings,
    paths: Vec<Path>,
    active: usize,
    incarnations: u64,
    pings: u64,
    slow_switch: Option<Duration>,
    news: Vec<News>,
    // What is sent.
    unacked: VecDeque<Chunk>,
    acked: u64,
    written: u64,
    limit: u64,
    closing: bool,
    // What arrives.
    ready: VecDeque<Vec<u8>>,
    /// Bytes of the first of `ready` that were read.
    ready_at: usize,
    early: BTreeMap<u64, Vec<u8>>,
    early_bytes: u64,
    received: u64,
    read: u64,
    /// As the peer last was told.
    told_limit: u64,
    /// Where the peer's stream ends.
    end: Option<u64>,
    lost: Option<End>,
}

impl Core {
    /// A session with so many paths, none connected yet.
    pub fn new(settings: Settings, paths: usize) -> Self {
        let path = |_| Path { why: "it was not connected yet".into(), ..Path::default() };
        Self {
            settings,
            paths: (0..paths.clamp(1, MAX_PATHS)).map(path).collect(),
            active: 0,
            incarnations: 0,
            pings: 0,
            slow_switch: None,
            news: Vec::new(),
            unacked: VecDeque::new(),
            acked: 0,
            written: 0,
            // Both sides of a session have the same window.
            limit: settings.window,
            closing: false,
            ready: VecDeque::new(),
            ready_at: 0,
            early: BTreeMap::new(),
            early_bytes: 0,
            received: 0,
            read: 0,
            told_limit: settings.window,
            end: None,
            lost: None,
        }
    }

    // Paths.

    /// A path is connected. An earlier connection of it is not listened to any more. `None`: there is no such path, or the session has ended.
    pub fn attach(&mut self, path: usize, now: Duration) -> Option<Incarnation> {
        if self.lost.is_some() || self.closing {
            return None;
        }
        self.incarnations += 1;
        let incarnation = Incarnation(self.incarnations);
        let slot = self.paths.get_mut(path)?;
        *slot = Path {
            up: Some(incarnation),
            since: slot.since,
            missed: slot.missed,
            losses: slot.losses,
            why: std::mem::take(&mut slot.why),
            sent_bytes: slot.sent_bytes,
            received_bytes: slot.received_bytes,
            again_bytes: slot.again_bytes,
            cursor: self.acked,
            pinged: now,
            ping_due: true,
            // What this side has received may have been said on a path that is gone.
            update_due: true,
            ..Path::default()
        };
        self.works(path, now);
        self.choose();
        Some(incarnation)
    }

    /// A path's connection has ended.
    pub fn detach(&mut self, path: usize, incarnation: Incarnation, why: &str, now: Duration) {
        if self.paths.get(path).is_none_or(|slot| slot.up != Some(incarnation)) {
            return;
        }
        self.paths[path].up = None;
        self.missing(path, why, now);
        self.choose();
        if self.paths.iter().all(|slot| slot.up.is_none()) {
            let many = self.paths.len() > 1;
            let each = self.paths.iter().enumerate().map(|(i, slot)| format!("path {}: {}", i + 1, slot.why));
            let why = if many { each.collect::<Vec<_>>().join("; ") } else { why.to_owned() };
            self.lose(End::Lost(why));
        }
    }

    /// A path could not be connected.
    pub fn failed(&mut self, path: usize, why: &str, now: Duration) {
        if self.paths.get(path).is_some_and(|slot| slot.up.is_none()) {
            self.missing(path, why, now);
        }
    }

    /// The peer does not know this session: it has ended there, or the peer is another process by now.
    pub fn refused(&mut self, why: &str) {
        self.lose(End::Lost(why.to_owned()));
    }

    /// The connection that counts for a path now.
    pub fn incarnation(&self, path: usize) -> Option<Incarnation> {
        self.paths.get(path)?.up
    }

    fn works(&mut self, path: usize, now: Duration) {
        let slot = &mut self.paths[path];
        slot.silent = false;
        let after = now.saturating_sub(slot.since);
        if std::mem::take(&mut slot.missed) {
            self.news.push(News::Back { path, after });
        }
        (slot.since, slot.why) = (now, String::new());
    }

    fn missing(&mut self, path: usize, why: &str, now: Duration) {
        let slot = &mut self.paths[path];
        why.clone_into(&mut slot.why);
        if !slot.missed {
            (slot.missed, slot.since) = (true, now);
            slot.losses += 1;
            // (A peer that goes takes its paths along; that is not worth an alarm.)
            if self.end.is_none() && self.lost.is_none() {
                self.news.push(News::Missing { path, why: why.to_owned() });
            }
        }
    }

    /// Which path carries the data: the present one as long as it works, else the fastest of those that do.
    fn choose(&mut self) {
        let present = &self.paths[self.active];
        if present.usable() {
            return;
        }
        let fastest = |usable: fn(&Path) -> bool| {
            let candidates = self.paths.iter().enumerate().filter(move |(_, path)| usable(path));
            candidates.min_by_key(|(_, path)| path.rtt.unwrap_or(Duration::MAX)).map(|(i, _)| i)
        };
        // All are silent: it is not the path. Moving on would only send everything once more.
        let next =
            fastest(Path::usable).or_else(|| if present.up.is_none() { fastest(|p| p.up.is_some()) } else { None });
        if let Some(next) = next {
            self.switch(next);
        }
    }

    fn switch(&mut self, path: usize) {
        let again = self.unacked.iter().take_while(|c| c.sent.is_some()).map(|c| c.end() - c.offset).sum();
        self.active = path;
        self.paths[path].cursor = self.acked;
        self.news.push(News::Switched { path, again });
    }

    /// Time has passed. To be called every few milliseconds.
    pub fn tick(&mut self, now: Duration) {
        for path in 0..self.paths.len() {
            let slot = &mut self.paths[path];
            if slot.up.is_none() {
                continue;
            }
            if slot.ping.is_none() && now.saturating_sub(slot.pinged) >= self.settings.ping_every {
                slot.ping_due = true;
            }
            let owed = slot.owed.map_or(Duration::ZERO, |since| now.saturating_sub(since));
            if !slot.silent && owed > self.settings.silent_after {
                slot.silent = true;
            }
        }
        let any = self.paths.iter().any(Path::usable);
        for path in 0..self.paths.len() {
            let slot = &self.paths[path];
            let (true, true, Some(since), Some(incarnation)) = (any, slot.silent, slot.owed, slot.up) else { continue };
            self.missing(path, "it is silent", now);
            if now.saturating_sub(since) > self.settings.give_up_after {
                self.detach(path, incarnation, "it is silent", now);
            }
        }
        self.choose();
        self.look_for_slowness(now);
    }

    fn look_for_slowness(&mut self, now: Duration) {
        let Some(Chunk { sent: Some((path, at)), .. }) = self.unacked.front() else { return };
        let age = now.saturating_sub(*at);
        let lately = self.slow_switch.is_some_and(|last| now.saturating_sub(last) < SLOW_AGAIN);
        if *path != self.active || age < self.settings.slow_after || lately {
            return;
        }
        let fast = |slot: &Path| slot.usable() && slot.rtt.is_some_and(|rtt| rtt < age / 4);
        let other = (0..self.paths.len()).filter(|i| *i != self.active).find(|i| fast(&self.paths[*i]));
        if let Some(other) = other {
            self.slow_switch = Some(now);
            self.switch(other);
        }
    }

    // Frames.

    /// A frame came on a path. The error is a peer that breaks the rules; the connection must end.
    pub fn heard(&mut self, path: usize, incarnation: Incarnation, frame: Frame, now: Duration) -> Result<(), String> {
        if self.incarnation(path) != Some(incarnation) || self.lost.is_some() {
            return Ok(());
        }
        let slot = &mut self.paths[path];
        slot.received_bytes += HEADER_LEN as u64;
        match frame {
            Frame::Data(offset, content) => {
                slot.received_bytes += content.len() as u64;
                slot.ack_due = true;
                self.arrived(offset, content)
            }
            Frame::Ack(level) => {
                self.level(level)?;
                let slot = &mut self.paths[path];
                let more = slot.flight_end > level.received || slot.ping.is_some();
                slot.owed = more.then_some(now);
                self.answered(path, now);
                Ok(())
            }
            Frame::Update(level) => self.level(level),
            Frame::Ping(number) => {
                slot.pong_due = Some(number);
                Ok(())
            }
            Frame::Pong(number, level) => {
                self.level(level)?;
                let slot = &mut self.paths[path];
                if let Some((asked, at)) = slot.ping
                    && asked == number
                {
                    let rtt = now.saturating_sub(at);
                    slot.rtt = Some(slot.rtt.map_or(rtt, |smooth| (smooth * 7 + rtt) / 8));
                    slot.ping = None;
                    let more = slot.flight_end > level.received.max(self.acked);
                    slot.owed = more.then_some(now);
                    self.answered(path, now);
                }
                Ok(())
            }
            Frame::Close(end) => {
                if end < self.received || self.end.is_some_and(|known| known != end) {
                    return Err("the peer ends its stream before what it has sent".into());
                }
                self.end = Some(end);
                Ok(())
            }
            Frame::Reject(why) => Err(why),
            Frame::Open { .. } | Frame::Join { .. } | Frame::Accept => {
                Err("the peer shakes hands in the middle of a session".into())
            }
        }
    }

    /// The peer hears us on this path.
    fn answered(&mut self, path: usize, now: Duration) {
        if self.paths[path].silent {
            self.works(path, now);
            self.choose();
        }
    }

    fn arrived(&mut self, offset: u64, content: Vec<u8>) -> Result<(), String> {
        let end = offset + content.len() as u64;
        if end > self.told_limit || self.end.is_some_and(|known| end > known) {
            return Err("the peer sends more than it was allowed to".into());
        }
        if offset > self.received {
            let kept = content.len() as u64;
            if let std::collections::btree_map::Entry::Vacant(place) = self.early.entry(offset) {
                self.early_bytes += kept;
                place.insert(content);
            }
            return if self.early_bytes > self.settings.window {
                Err("the peer sends pieces that overlap".into())
            } else {
                Ok(())
            };
        }
        self.take(offset, content);
        while let Some(entry) = self.early.first_entry() {
            if *entry.key() > self.received {
                break;
            }
            let (offset, content) = entry.remove_entry();
            self.early_bytes -= content.len() as u64;
            self.take(offset, content);
        }
        Ok(())
    }

    /// Append what of it is new.
    fn take(&mut self, offset: u64, mut content: Vec<u8>) {
        let end = offset + content.len() as u64;
        if end <= self.received {
            return;
        }
        let known = (self.received - offset) as usize;
        if known > 0 {
            content.drain(..known);
        }
        self.received = end;
        self.ready.push_back(content);
    }

    fn level(&mut self, level: Level) -> Result<(), String> {
        if level.received > self.written || level.limit > level.received.saturating_add(self.settings.window) {
            return Err("the peer acknowledges what was not sent".into());
        }
        self.acked = self.acked.max(level.received);
        self.limit = self.limit.max(level.limit);
        while self.unacked.front().is_some_and(|chunk| chunk.end() <= self.acked) {
            self.unacked.pop_front();
        }
        Ok(())
    }

    /// What to send next on a path.
    pub fn next(&mut self, path: usize, incarnation: Incarnation, now: Duration) -> Next {
        if self.incarnation(path) != Some(incarnation) || self.lost.is_some() && !self.closing {
            return Next::End;
        }
        let level = self.own_level();
        let ends = self.closing;
        let slot = &mut self.paths[path];
        let frame = if ends {
            None
        } else if let Some(number) = slot.pong_due.take() {
            Some(Frame::Pong(number, level))
        } else if std::mem::take(&mut slot.ack_due) {
            slot.update_due = false;
            Some(Frame::Ack(level))
        } else if std::mem::take(&mut slot.update_due) {
            Some(Frame::Update(level))
        } else if std::mem::take(&mut slot.ping_due) {
            self.pings += 1;
            (slot.ping, slot.pinged) = (Some((self.pings, now)), now);
            slot.owed.get_or_insert(now);
            Some(Frame::Ping(self.pings))
        } else {
            None
        };
        if let Some(frame) = frame {
            if matches!(frame, Frame::Pong(..) | Frame::Ack(_) | Frame::Update(_)) {
                self.told_limit = self.told_limit.max(level.limit);
            }
            slot.sent_bytes += HEADER_LEN as u64;
            return Next::Send(Outgoing::Control(frame));
        }
        if let Some(data) = self.next_data(path, now) {
            return Next::Send(Outgoing::Data(data));
        }
        match (ends, std::mem::replace(&mut self.paths[path].closed, ends)) {
            (true, false) => Next::Send(Outgoing::Control(Frame::Close(self.written))),
            (true, true) => Next::End,
            (false, _) => Next::Wait,
        }
    }

    fn next_data(&mut self, path: usize, now: Duration) -> Option<Arc<Vec<u8>>> {
        if path != self.active {
            return None;
        }
        let slot = &mut self.paths[path];
        slot.cursor = slot.cursor.max(self.acked);
        let index = self.unacked.partition_point(|chunk| chunk.end() <= slot.cursor);
        let chunk = self.unacked.get_mut(index).filter(|chunk| chunk.end() <= self.limit)?;
        let (len, end) = (chunk.end() - chunk.offset, chunk.end());
        if chunk.sent.replace((path, now)).is_some() {
            slot.again_bytes += len;
        }
        (slot.cursor, slot.flight_end) = (end, slot.flight_end.max(end));
        slot.owed.get_or_insert(now);
        slot.sent_bytes += chunk.bytes.len() as u64;
        Some(chunk.bytes.clone())
    }

    /// Whether [`Core::next`] has something for this path.
    pub fn wants(&self, path: usize) -> bool {
        let Some(slot) = self.paths.get(path) else { return false };
        if slot.up.is_none() || self.closing || self.lost.is_some() {
            return true;
        }
        let data = || {
            let index = self.unacked.partition_point(|chunk| chunk.end() <= slot.cursor.max(self.acked));
            self.unacked.get(index).is_some_and(|chunk| chunk.end() <= self.limit)
        };
        let control = slot.pong_due.is_some() || slot.ack_due || slot.update_due || slot.ping_due;
        control || path == self.active && data()
    }

    // The stream.

    fn own_level(&self) -> Level {
        Level { received: self.received, limit: self.read + self.settings.window }
    }

    /// Take as much of `bytes` as there is room for; 0 = wait.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let room = (self.acked + self.settings.window).saturating_sub(self.written);
        let n = bytes.len().min(wire::MAX_DATA).min(usize::try_from(room).unwrap_or(usize::MAX));
        if n > 0 {
            self.unacked.push_back(Chunk {
                offset: self.written,
                bytes: Arc::new(wire::encode_data(self.written, &bytes[..n])),
                sent: None,
            });
            self.written += n as u64;
        }
        n
    }

    /// Whether [`Core::write`] would take something.
    pub fn has_room(&self) -> bool {
        self.written < self.acked + self.settings.window
    }

    /// What has arrived in order; 0 = nothing yet.
    pub fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut n = 0;
        while let Some(first) = self.ready.front().filter(|_| n < buf.len()) {
            let rest = &first[self.ready_at..];
            let now = rest.len().min(buf.len() - n);
            buf[n..n + now].copy_from_slice(&rest[..now]);
            (n, self.ready_at) = (n + now, self.ready_at + now);
            if self.ready_at == first.len() {
                self.ready.pop_front();
                self.ready_at = 0;
            }
        }
        self.read += n as u64;
        // Whoever may send is told so before it has to stop.
        if self.own_level().limit - self.told_limit >= self.settings.window / 4 {
            for path in self.paths.iter_mut().filter(|path| path.usable()) {
                path.update_due = true;
            }
        }
        n
    }

    /// Whether [`Core::read`] has something.
    pub fn has_data(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Why nothing more will be read.
    pub fn ended(&self) -> Option<End> {
        match (&self.lost, self.end) {
            (_, Some(end)) if end == self.received => Some(End::Closed),
            (Some(lost), _) => Some(lost.clone()),
            (None, _) => None,
        }
    }

    /// Why nothing more can be written.
    pub fn is_over(&self) -> Option<End> {
        self.lost.clone().or_else(|| self.end.map(|_| End::Closed))
    }

    /// Nothing more is written or read here; what was written is still sent as far as the peer takes it at once.
    pub fn close(&mut self) {
        self.closing = self.lost.is_none();
        self.lose(End::Here);
        self.ready.clear();
        self.early.clear();
    }

    fn lose(&mut self, end: End) {
        self.lost.get_or_insert(end);
    }

    // For people.

    /// What has happened since the last call.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Each path.
    pub fn report(&self, now: Duration) -> Vec<PathReport> {
        let of = |(i, path): (usize, &Path)| PathReport {
            works: path.usable(),
            active: i == self.active && path.up.is_some(),
            since: now.saturating_sub(path.since),
            why: path.why.clone(),
            losses: path.losses,
            sent_bytes: path.sent_bytes,
            received_bytes: path.received_bytes,
            again_bytes: path.again_bytes,
            rtt: path.rtt.unwrap_or_default(),
        };
        self.paths.iter().enumerate().map(of).collect()
    }
}
