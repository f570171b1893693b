//! The process: a round every few seconds. Read the cluster, decide, tell, write, ask; remember nothing.
//!
//! A round that fails (no cluster, a tool that is missing) is tried again with the next; `ocf:understudy:evacuator` sees by the status for
//! how long none has come to its end, and Pacemaker then starts the controller elsewhere.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Error, Result, bail};
use understudy_crm::live::{self, Swapped};
use understudy_crm::policy::Policy;
use understudy_crm::records;
use understudy_protocol::control::{Reply, encode_line, read_line};
use understudy_protocol::evacuator::{EvacuatorFiles, EvacuatorRequest, EvacuatorStatus};

use crate::cluster::{self, Beside};
use crate::core::decide;
use crate::journal::Journal;
use crate::outside::Outside;

/// How often a change is tried that others were faster with, before the next round.
const TRIES: u32 = 5;

/// Longest that this node's monitor may take to answer.
const MONITOR: Duration = Duration::from_secs(1);

/// What the daemon is told.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node, as the cluster names it.
    pub node: String,
    /// Its files.
    pub files: EvacuatorFiles,
    /// Parent of run directories, where this node's monitor is asked.
    pub run_root: PathBuf,
    /// The journal.
    pub journal: PathBuf,
}

#[derive(Debug)]
struct Shared {
    status: Mutex<(EvacuatorStatus, Instant)>,
}

impl Shared {
    fn update(&self, f: impl FnOnce(&mut EvacuatorStatus, &mut Instant)) {
        let mut guard = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, last) = &mut *guard;
        f(status, last);
    }

    fn status(&self) -> EvacuatorStatus {
        let guard = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let last_round_ms = u64::try_from(guard.1.elapsed().as_millis()).unwrap_or(u64::MAX);
        EvacuatorStatus { last_round_ms, ..guard.0.clone() }
    }
}

/// Run until SIGTERM or a request to quit.
pub fn run(config: &Config, outside: &mut dyn Outside) -> Result<()> {
    let mut journal =
        Journal::open(&config.journal).with_context(|| format!("opening the journal {}", config.journal.display()))?;
    let status = EvacuatorStatus {
        node: config.node.clone(),
        rounds: 0,
        last_round_ms: 0,
        open_plans: 0,
        without_host: 0,
        trouble: String::new(),
    };
    let shared = Arc::new(Shared { status: Mutex::new((status, Instant::now())) });
    let (quit, quits) = mpsc::channel();
    serve(config, &shared, quit.clone())?;
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])
        .context("waiting for signals")?;
    thread::spawn(move || {
        for _ in signals.forever() {
            let _ = quit.send(());
        }
    });
    let mut seen = Seen::default();
    loop {
        let interval = match round(config, outside, &mut journal, &mut seen) {
            Ok(done) => {
                shared.update(|status, last| {
                    status.rounds += 1;
                    if !done.trouble.is_empty() && status.trouble != done.trouble {
                        eprintln!("understudy-evacuator: {}", done.trouble);
                    }
                    (status.open_plans, status.without_host, status.trouble) =
                        (done.open_plans, done.without_host, done.trouble);
                    *last = Instant::now();
                });
                done.interval
            }
            Err(why) => {
                let why = format!("{why:#}");
                // Once, not every two seconds.
                shared.update(|status, _| {
                    if status.trouble != why {
                        eprintln!("understudy-evacuator: {why}");
                    }
                    status.trouble.clone_from(&why);
                });
                Duration::from_secs(2)
            }
        };
        match quits.recv_timeout(interval) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let _ = fs::remove_file(config.files.socket());
    Ok(())
}

/// The policy's record as it was last read: it seldom changes, and reading hundreds of machines takes longer than comparing two texts.
#[derive(Default)]
struct Seen {
    text: String,
    policy: Option<Policy>,
}

struct Done {
    interval: Duration,
    open_plans: u64,
    without_host: u64,
    /// What does not work, though the round came to its end.
    trouble: String,
}

fn round(config: &Config, outside: &mut dyn Outside, journal: &mut Journal, seen: &mut Seen) -> Result<Done> {
    for _ in 0..TRIES {
        let cib = live::query()?;
        live::ensure_cib(&cib)?;
        let text = records::property(&cib, records::POLICY).unwrap_or_default();
        if seen.policy.is_none() || seen.text != text {
            (seen.policy, seen.text) = (cluster::policy(&cib).map_err(Error::msg)?, text.to_string());
        }
        let Some(policy) = &seen.policy else {
            bail!("the cluster has no record of a policy that needs a controller: run understudy-crm apply");
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let beside = Beside {
            now,
            here: config.node.clone(),
            links: links(),
            approvals: outside.approvals(policy, &cib, now),
            // No monitor, or none that answers: nobody can tell.
            report: understudy_monitor::report::ask(&config.run_root, MONITOR).ok(),
        };
        let status = live::status(&cib)?;
        let snapshot = cluster::read(policy, &cib, &status, beside).map_err(Error::msg)?;
        let decided = decide(policy, &snapshot);
        if let Err(why) = outside.tell(&decided.alarms) {
            eprintln!("understudy-evacuator: {why}");
        }
        if let Some(wanted) = cluster::wanted(policy, &cib, &snapshot, &decided)
            && live::apply_if_unchanged(&cib, &wanted)? == Swapped::Stale
        {
            continue;
        }
        let mut trouble = String::new();
        journal.append(&decided.records.state.events).context("writing the journal")?;
        for plan in decided.records.plans.iter().filter(|p| decided.ask.contains(&p.id)) {
            // Another node could not ask either; the plan's alarm says how else to decide.
            if let Err(why) = outside.ask(policy, plan, now) {
                trouble = why;
            }
        }
        let open = decided.records.plans.iter().filter(|p| p.closed.is_none()).count();
        return Ok(Done {
            interval: Duration::from_secs(policy.rules().interval.0.max(1)),
            open_plans: u64::try_from(open).unwrap_or(u64::MAX),
            without_host: u64::try_from(decided.records.state.idle.len()).unwrap_or(u64::MAX),
            trouble,
        });
    }
    bail!("the cluster changed {TRIES} times while a change was made; trying again")
}

/// This node's links, if Corosync's tool can tell.
fn links() -> Option<(usize, usize)> {
    let output = Command::new("corosync-cfgtool").arg("-s").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    cluster::links(&String::from_utf8_lossy(&output.stdout))
}

fn serve(config: &Config, shared: &Arc<Shared>, quit: mpsc::Sender<()>) -> Result<()> {
    let (dir, socket) = (config.files.dir(), config.files.socket());
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&dir)
        .with_context(|| format!("creating {}", dir.display()))?;
    if UnixStream::connect(&socket).is_ok() {
        bail!("a controller runs on this node already: {} is answered", socket.display());
    }
    let _ = fs::remove_file(&socket);
    let context = || format!("making the control socket {}", socket.display());
    let listener = UnixListener::bind(&socket).with_context(context)?;
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).with_context(context)?;
    let shared = shared.clone();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (shared, quit) = (shared.clone(), quit.clone());
            thread::spawn(move || answer(&shared, &quit, &stream));
        }
    });
    Ok(())
}

fn answer(shared: &Shared, quit: &mpsc::Sender<()>, mut stream: &UnixStream) {
    let mut reader = BufReader::new(stream);
    while let Ok(Some(line)) = read_line(&mut reader) {
        let request = serde_json::from_slice::<EvacuatorRequest>(&line);
        let reply = match &request {
            Ok(EvacuatorRequest::Status) => encode_line(&Reply::Ok(shared.status())),
            Ok(EvacuatorRequest::Quit) => encode_line(&Reply::Ok(())),
            Err(e) => encode_line(&Reply::<()>::Error(format!("not a request ({e}); known are status and quit"))),
        };
        if stream.write_all(&reply).is_err() {
            return;
        }
        if matches!(request, Ok(EvacuatorRequest::Quit)) {
            let _ = quit.send(());
        }
    }
}
