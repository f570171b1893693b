//! The device as a process: the loop around the oracle, its event file, its control socket, its end.
//!
//! Control socket (`understudy_protocol::control`: one JSON object a line):
//! ```text
//! {"cmd":"status"}                     the verdict so far
//! {"cmd":"drain","timeout_ms":5000}    stop writing, wait until the guest has reported every line; the verdict
//! {"cmd":"resume"}                     write again
//! {"cmd":"stop","drain_ms":5000}       end: the last verdict comes back when everything is written down
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use lab_guest::line;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use understudy_protocol::control::{Reply, encode_line, read_line};

use super::oracle::{Oracle, Settings};
use super::port::{Place, Port, PortName};
use super::report::{At, Event, Record, Verdict};

/// How the device behaves.
#[derive(Debug, Clone)]
pub struct Configuration {
    /// The line.
    pub port: PortName,
    /// How to judge.
    pub settings: Settings,
    /// Time between two lines that it writes, µs; 0: as fast as the line takes them.
    pub interval_us: u64,
    /// Where events go, one JSON object a line.
    pub events: Option<PathBuf>,
    /// Where the last verdict goes.
    pub verdict: Option<PathBuf>,
    /// Control socket.
    pub control: Option<PathBuf>,
    /// How long the end may wait for the guest's last report, ms; 0: do not drain at all.
    pub drain_ms: u64,
    /// Time between two `tick` events, ms.
    pub tick_ms: u64,
    /// End when standard input closes.
    pub until_stdin_closes: bool,
}

/// A request on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum Request {
    /// Reply: [`Verdict`].
    Status,
    /// Stop writing and wait for the guest's reports. Reply: [`Verdict`]; see its `drained`.
    Drain {
        /// Bound of the wait, ms.
        timeout_ms: u64,
    },
    /// Write again after `Drain`. Reply: [`Verdict`].
    Resume,
    /// End the process. Reply: [`Verdict`], the last one.
    Stop {
        /// As [`Configuration::drain_ms`].
        drain_ms: u64,
    },
}

/// What the loop and the control connections share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    oracle: Oracle,
    writing: bool,
    /// A line was begun and not written to its end yet.
    unfinished: bool,
    /// The end was asked for, with this bound for the drain.
    stop: Option<u64>,
    /// Set when everything is written down.
    last: Option<Verdict>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves counters that are still true.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until `done`, at most `timeout`.
    fn wait(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, |state| !done(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn set_writing(&self, writing: bool) {
        let mut state = self.lock();
        state.writing = writing;
        state.oracle.stop_writing(!writing);
    }
}

/// Run until SIGTERM, SIGINT, `stop`, or the end of standard input. The calling thread's SIGTERM and SIGINT are blocked.
pub fn run(configuration: &Configuration) -> Result<Verdict> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("blocking SIGTERM")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).context("making a signal descriptor")?;

    let mut events = match &configuration.events {
        Some(path) => Some(
            File::options()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("opening {}", path.display()))?,
        ),
        None => None,
    };
    let state =
        State { oracle: Oracle::new(configuration.settings), writing: true, unfinished: false, stop: None, last: None };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
    if let Some(path) = &configuration.control {
        serve_control(path, &shared)?;
    }
    let place = Place::prepare(&configuration.port).with_context(|| format!("preparing {}", configuration.port))?;
    Device {
        configuration,
        shared: &shared,
        place,
        port: None,
        outgoing: VecDeque::new(),
        next: None,
        due_us: 0,
        tick_ms: now().mono_ms,
        failure: String::new(),
    }
    .run(&mut events, &signals)
}

/// The loop's own state.
struct Device<'a> {
    configuration: &'a Configuration,
    shared: &'a Arc<Shared>,
    place: Place,
    port: Option<Port>,
    /// What of the current line has not been written yet.
    outgoing: VecDeque<u8>,
    /// Number of the line in `outgoing`, or of the next one.
    next: Option<u64>,
    due_us: u64,
    tick_ms: u64,
    /// The last reason why the port could not be opened, told once.
    failure: String,
}

impl Device<'_> {
    fn run(mut self, events: &mut Option<File>, signals: &SignalFd) -> Result<Verdict> {
        let mut end_ms: Option<u64> = None;
        let stdin = std::io::stdin();
        let mut watched = vec![signals.as_fd()];
        if self.configuration.until_stdin_closes {
            watched.push(stdin.as_fd());
        }
        loop {
            let mut records = Vec::new();
            let ready = self.exchange(&watched, &mut records);
            let signalled = ready.first() == Some(&true);
            let closed = ready.get(1) == Some(&true) && stdin_closed(stdin.as_fd());

            let at = now();
            let mut state = self.shared.lock();
            records.extend(state.oracle.tick(at));
            if at.mono_ms.saturating_sub(self.tick_ms) >= self.configuration.tick_ms {
                self.tick_ms = at.mono_ms;
                let v = state.oracle.verdict();
                let (lines, bytes, sent, reported) = (v.lines, v.bytes, v.last_sent, v.last_reported);
                records.push(Record { at, event: Event::Tick { lines, bytes, sent, reported } });
            }
            if (signalled || closed) && state.stop.is_none() {
                state.stop = Some(self.configuration.drain_ms);
            }
            if let (Some(drain_ms), None) = (state.stop, end_ms) {
                state.writing = false;
                state.oracle.stop_writing(true);
                end_ms = Some(at.mono_ms + drain_ms);
                records.push(Record { at, event: Event::Draining });
            }
            let ended = end_ms.is_some_and(|end| {
                let drained = state.oracle.all_reported() && self.outgoing.is_empty();
                drained || at.mono_ms >= end || signalled && state.stop == Some(0)
            });
            if ended {
                if state.stop != Some(0) {
                    records.extend(state.oracle.close(at));
                }
                let verdict = state.oracle.verdict();
                drop(state);
                write_events(events, &records)?;
                self.write_verdict(&verdict)?;
                self.shared.lock().last = Some(verdict.clone());
                self.shared.changed.notify_all();
                return Ok(verdict);
            }
            drop(state);
            self.shared.changed.notify_all();
            write_events(events, &records)?;
        }
    }

    /// One round: wait, read, write.
    fn exchange(&mut self, watched: &[BorrowedFd], records: &mut Vec<Record>) -> Vec<bool> {
        let Some(port) = self.connected(records) else {
            // No line: wait a moment for the others.
            return wait_for(watched, 50);
        };
        let now_us = now_us();
        let may_write = {
            let state = self.shared.lock();
            if self.next.is_none() {
                self.next = state.oracle.send_from();
                self.due_us = now_us;
            }
            // A line that was begun is finished in any case.
            !self.outgoing.is_empty() || state.writing && self.next.is_some()
        };
        if may_write && self.outgoing.is_empty() && now_us >= self.due_us {
            self.shared.lock().unfinished = true;
            self.outgoing.extend(line::encode('D', self.next.unwrap_or(1), "").bytes());
            // Lines that fell behind for more than a second are not caught up with.
            self.due_us = (self.due_us + self.configuration.interval_us).max(now_us.saturating_sub(1_000_000));
        }
        let wait_us = if may_write && self.outgoing.is_empty() { self.due_us.saturating_sub(now_us) } else { 20_000 };
        let ready = port.wait(!self.outgoing.is_empty(), watched, wait_us.div_ceil(1000).min(20) as u16);

        let result = self.pump(&port, records);
        match result {
            Ok(()) => self.port = Some(port),
            Err(why) => records.push(Record { at: now(), event: Event::Disconnected { why: why.to_string() } }),
        }
        ready
    }

    fn pump(&mut self, port: &Port, records: &mut Vec<Record>) -> std::io::Result<()> {
        let mut buffer = [0u8; 16 * 1024];
        if let Some(n) = port.read(&mut buffer)? {
            records.extend(self.shared.lock().oracle.receive(now(), &buffer[..n]));
        }
        if !self.outgoing.is_empty() {
            let n = port.write(self.outgoing.make_contiguous())?;
            self.outgoing.drain(..n);
            if self.outgoing.is_empty()
                && let Some(number) = self.next
            {
                let mut state = self.shared.lock();
                state.oracle.sent(number);
                state.unfinished = false;
                self.next = Some(number + 1);
            }
        }
        Ok(())
    }

    fn connected(&mut self, records: &mut Vec<Record>) -> Option<Port> {
        if let Some(port) = self.port.take() {
            return Some(port);
        }
        match self.place.open() {
            Ok(port) => {
                self.failure.clear();
                let port_name = self.configuration.port.to_string();
                records.push(Record { at: now(), event: Event::Connected { port: port_name } });
                Some(port)
            }
            Err(why) if why.kind() == std::io::ErrorKind::WouldBlock => None,
            Err(why) => {
                let why = format!("cannot open it: {why}");
                if self.failure != why {
                    self.failure.clone_from(&why);
                    records.push(Record { at: now(), event: Event::Disconnected { why } });
                }
                None
            }
        }
    }

    fn write_verdict(&self, verdict: &Verdict) -> Result<()> {
        let Some(path) = &self.configuration.verdict else { return Ok(()) };
        let text = serde_json::to_string_pretty(verdict)? + "\n";
        let part = path.with_extension("part");
        std::fs::write(&part, text).with_context(|| format!("writing {}", part.display()))?;
        std::fs::rename(&part, path).with_context(|| format!("renaming {}", part.display()))
    }
}

fn write_events(events: &mut Option<File>, records: &[Record]) -> Result<()> {
    let Some(file) = events else { return Ok(()) };
    let mut text = Vec::new();
    for record in records {
        serde_json::to_writer(&mut text, record)?;
        text.push(b'\n');
    }
    file.write_all(&text).context("writing the event file")
}

fn wait_for(watched: &[BorrowedFd], ms: u16) -> Vec<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds: Vec<PollFd> = watched.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PollTimeout::from(ms));
    fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
}

fn stdin_closed(stdin: BorrowedFd) -> bool {
    matches!(nix::unistd::read(stdin, &mut [0u8; 512]), Ok(0) | Err(_))
}

/// This instant.
pub fn now() -> At {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    At { wall_ms: wall.as_millis() as u64, mono_ms: now_us() / 1000 }
}

fn now_us() -> u64 {
    // CLOCK_MONOTONIC always exists.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000)
}

fn serve_control(path: &Path, shared: &Arc<Shared>) -> Result<()> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))?;
    let shared = Arc::clone(shared);
    thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = Arc::clone(&shared);
            let _ = thread::Builder::new().name("control connection".into()).spawn(move || serve(stream, &shared));
        }
    })?;
    Ok(())
}

fn serve(stream: UnixStream, shared: &Shared) {
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    while let Ok(Some(request)) = read_line(&mut reader) {
        let reply = match serde_json::from_slice(&request) {
            Ok(request) => Reply::Ok(answer(&request, shared)),
            Err(why) => Reply::Error(format!("not a request: {why}")),
        };
        if writer.write_all(&encode_line(&reply)).is_err() {
            return;
        }
    }
}

fn answer(request: &Request, shared: &Shared) -> Verdict {
    match request {
        Request::Status => shared.lock().oracle.verdict(),
        Request::Drain { timeout_ms } => {
            shared.set_writing(false);
            let reported = |state: &State| !state.unfinished && state.oracle.all_reported();
            shared.wait(Duration::from_millis(*timeout_ms), reported).oracle.verdict()
        }
        Request::Resume => {
            shared.set_writing(true);
            shared.lock().oracle.verdict()
        }
        Request::Stop { drain_ms } => {
            shared.lock().stop.get_or_insert(*drain_ms);
            let ended = |state: &State| state.last.is_some();
            let state = shared.wait(Duration::from_millis(drain_ms + 5000), ended);
            state.last.clone().unwrap_or_else(|| state.oracle.verdict())
        }
    }
}

#[cfg(test)]
mod tests;
