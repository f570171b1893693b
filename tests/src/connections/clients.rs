//! The clients: one connection of each kind that lives from the first event to the last, and downloads and uploads one after the other.
//!
//! Each is a real program (ssh, curl, psql, iperf3) in the client's network namespace, with a thread that feeds and hears it; UDP is asked by this process itself. A thread
//! *beats* whenever its client got somewhere. The longest time without a beat is what a person or a program at that client had to wait. A program that ends, a reset
//! among the reasons, or anything that cannot be true, is the end of the campaign.

mod database;
mod http;
mod shell;
mod stream;
mod udp;

use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;

use super::switch::{CLIENT, guest};
use crate::bench::pair::{in_namespace, tied};
use crate::lab::host::run_quiet;
use crate::lab::wait_until;

/// A kind of client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A shell that counts and says back what it is told.
    Ssh,
    /// curl, what arrives.
    Download,
    /// curl, what it takes from us. What its own buffer and the kernel's hold shortens the wait that is seen.
    Upload,
    /// psql, a row for each round trip.
    Database,
    /// iperf3, from the guest.
    Iperf3,
    /// Questions and answers.
    Udp,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Ssh, Self::Download, Self::Upload, Self::Database, Self::Iperf3, Self::Udp];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ssh => "ssh",
            Self::Download => "download",
            Self::Upload => "upload",
            Self::Database => "psql",
            Self::Iperf3 => "iperf3",
            Self::Udp => "udp",
        }
    }
}

/// How the clients work.
#[derive(Debug, Clone, clap::Args)]
pub struct Load {
    /// A download or an upload, MiB
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub transfer_mib: u64,
    /// Downloads and uploads, KiB a second each
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
    pub rate_kib: u64,
    /// The iperf3 stream, Kbit a second
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub iperf_kbit: u64,
    /// Between two questions by UDP, two lines of the shell and two rows of a transaction, ms
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub pause_ms: u64,
}

/// What came of all of them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Totals {
    /// Lines that the one shell said back, and that it said by itself.
    pub ssh_echoes: u64,
    /// See `ssh_echoes`.
    pub ssh_ticks: u64,
    /// Downloads whose SHA-256 was right.
    pub downloads: u64,
    /// Bytes that came, those of the unfinished last one included.
    pub downloaded_bytes: u64,
    /// Uploads whose SHA-256 was right, as the guest made it.
    pub uploads: u64,
    /// Bytes that went.
    pub uploaded_bytes: u64,
    /// Transactions of the one session that were committed, each begun before an event and committed after it.
    pub transactions: u64,
    /// Rows that they wrote.
    pub rows: u64,
    /// Bytes of the one stream.
    pub iperf3_bytes: u64,
    /// Questions by UDP.
    pub udp_asked: u64,
    /// Answers.
    pub udp_answered: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Beats {
    count: u64,
    last: Option<Instant>,
    longest: Duration,
}

/// What is shared with the threads.
#[derive(Debug, Default)]
struct State {
    beats: [Beats; Kind::ALL.len()],
    totals: Totals,
    udp_times: Vec<Duration>,
    /// The first thing that was wrong.
    wrong: Option<String>,
    /// Programs that run, to be killed at the end.
    programs: Vec<u32>,
}

/// What a client's thread knows.
#[derive(Debug)]
struct Home {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
    /// How many transactions are to be committed until now.
    commits: AtomicU64,
    load: Load,
    dir: PathBuf,
}

impl Home {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of whoever asks again and again.
    fn pause(&self) -> Duration {
        Duration::from_millis(self.load.pause_ms)
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// A client got somewhere.
    fn beat(&self, kind: Kind) {
        self.beat_and(kind, |_| ());
    }

    fn beat_and(&self, kind: Kind, count: impl FnOnce(&mut State)) {
        let (mut state, now) = (self.state(), Instant::now());
        count(&mut state);
        let beats = &mut state.beats[kind as usize];
        beats.count += 1;
        if let Some(last) = beats.last.replace(now) {
            beats.longest = beats.longest.max(now.saturating_duration_since(last));
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Start a program in the client's namespace.
    fn program(&self, command: &Command) -> Result<Program<'_>> {
        let mut command = tied(&in_namespace(CLIENT, command));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let log = tempfile::tempfile_in(&self.dir).context("making a file for complaints")?;
        command.stderr(log.try_clone().context("sharing a file for complaints")?);
        // (Under the lock: what is started after the end would live on.)
        let mut state = self.state();
        if self.stopping() {
            bail!("this is the end");
        }
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        state.programs.push(child.id());
        drop(state);
        let (input, output) = (child.stdin.take(), child.stdout.take());
        Ok(Program { home: self, child, input, output, log, name: format!("{:?}", command.get_program()) })
    }
}

/// A program that ends with this value.
struct Program<'a> {
    home: &'a Home,
    child: Child,
    input: Option<ChildStdin>,
    output: Option<ChildStdout>,
    log: File,
    name: String,
}

impl Program<'_> {
    /// Wait for its end. What it complained about is the error, unless all is well.
    fn end(&mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait().with_context(|| format!("waiting for {}", self.name))?;
        if status.success() {
            return Ok(());
        }
        bail!("it ended ({status}): {}", self.complaints())
    }

    fn complaints(&mut self) -> String {
        use std::io::{Read, Seek};
        let mut said = String::new();
        let _ = self.log.rewind().and_then(|()| self.log.read_to_string(&mut said));
        said.trim().to_owned()
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        let id = self.child.id();
        self.home.state().programs.retain(|program| *program != id);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// See the module. All of them end with this value.
#[derive(Debug)]
pub struct Clients {
    home: Arc<Home>,
    threads: Vec<JoinHandle<()>>,
}

type Run = fn(&Home) -> Result<()>;

const RUNS: [(Kind, Run); 6] = [
    (Kind::Ssh, shell::run),
    (Kind::Download, http::download),
    (Kind::Upload, http::upload),
    (Kind::Database, database::run),
    (Kind::Iperf3, stream::run),
    (Kind::Udp, udp::run),
];

impl Clients {
    /// Start them all, and wait until each has got somewhere. `dir` has the private key for ssh, by the name `ssh`, and takes files.
    pub fn start(dir: &Path, load: &Load, bound: Duration) -> Result<Self> {
        let home = Arc::new(Home {
            state: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            commits: AtomicU64::new(0),
            load: load.clone(),
            dir: dir.to_owned(),
        });
        let threads = RUNS.into_iter().map(|(kind, run)| {
            let home = home.clone();
            thread::spawn(move || {
                let why = match run(&home) {
                    Ok(()) => "ended by itself".to_owned(),
                    Err(why) => format!("{why:#}"),
                };
                if !home.stopping() {
                    home.state().wrong.get_or_insert(format!("{}: {why}", kind.name()));
                }
                home.changed.notify_all();
            })
        });
        let this = Self { threads: threads.collect(), home };
        this.all_go_on(2, bound)?;
        Ok(this)
    }

    /// Wait until every client has got somewhere so many times; fails at once when anything is wrong.
    pub fn all_go_on(&self, times: u64, bound: Duration) -> Result<()> {
        let from = self.home.state().beats.map(|beats| beats.count);
        self.wait("clients that go on", bound, |state| {
            state.beats.iter().zip(from).all(|(beats, from)| beats.count >= from + times)
        })
    }

    /// Commit the open transaction, and wait until the next is begun.
    pub fn commit(&self, bound: Duration) -> Result<()> {
        let wanted = self.home.commits.fetch_add(1, Ordering::AcqRel) + 1;
        self.wait("a commit", bound, |state| state.totals.transactions >= wanted)
    }

    fn wait(&self, what: &str, bound: Duration, mut holds: impl FnMut(&State) -> bool) -> Result<()> {
        let end = Instant::now() + bound;
        let mut state = self.home.state();
        loop {
            if let Some(wrong) = &state.wrong {
                bail!("{wrong}");
            }
            if holds(&state) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let now = Instant::now();
                let silent = Kind::ALL.map(|kind| {
                    let last = state.beats[kind as usize].last;
                    let since = last.map(|last| now.saturating_duration_since(last).as_secs());
                    format!("{} silent for {since:?} s", kind.name())
                });
                bail!("{what}: not within {} s; {}", bound.as_secs(), silent.join(", "));
            }
            state = self.home.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// From now on.
    pub fn forget_silences(&self) {
        let mut state = self.home.state();
        state.udp_times.clear();
        for beats in &mut state.beats {
            beats.longest = Duration::ZERO;
        }
    }

    /// The longest of each kind since they were forgotten.
    pub fn silences(&self) -> [Duration; Kind::ALL.len()] {
        self.home.state().beats.map(|beats| beats.longest)
    }

    /// How long answers by UDP took since silences were forgotten.
    pub fn udp_times(&self) -> Vec<Duration> {
        std::mem::take(&mut self.home.state().udp_times)
    }

    /// The first thing that was wrong.
    pub fn wrong(&self) -> Option<String> {
        self.home.state().wrong.clone()
    }

    /// Until now.
    pub fn totals(&self) -> Totals {
        self.home.state().totals.clone()
    }

    /// What was committed is there, and nothing else, as another session sees it.
    pub fn check_database(&self) -> Result<()> {
        let totals = self.totals();
        database::check(&totals)
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.home.stop.store(true, Ordering::Release);
        for program in &self.home.state().programs {
            let pid = i32::try_from(*program).map(nix::unistd::Pid::from_raw);
            // It is not reaped yet: whoever does takes it from the list before.
            let _ = pid.map(|pid| nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Wait until the guest serves.
pub fn wait_for_servers(bound: Duration) -> Result<()> {
    for port in [22, 80] {
        let address: SocketAddr = format!("{}:{port}", guest()).parse().context("the guest's address")?;
        in_client(|| {
            wait_until(&format!("the guest's port {port}"), bound, || {
                Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(|_| true)?)
            })
        })?;
    }
    wait_until("the guest's PostgreSQL", bound, || {
        run_quiet(&mut in_namespace(CLIENT, database::psql().args(["-c", "SELECT 1"]))).map(|_| true)
    })
}

/// Run something in the client's network namespace: in a thread of its own, since a namespace is a thread's.
pub fn in_client<T: Send>(run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter_client()?;
            run()
        });
        thread.join().unwrap_or_else(|_| bail!("a thread in the client's namespace panicked"))
    })
}

/// The calling thread is in the client's network namespace from now on.
pub fn enter_client() -> Result<()> {
    let namespace = File::open(Path::new("/run/netns").join(CLIENT)).context("opening the client's namespace")?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).context("entering the client's namespace")
}
