//! The process: sockets, threads and the clock around [`Watch`].
//!
//! ```text
//!   a thread a plane: datagrams ─┐
//!   a thread: this node's VMMs ──┼─► Watch (one lock) ◄── the loop: tick, send, write down
//!   a thread: crm_mon, attributes┤         ▲
//!   a thread: fence agents ──────┘         │
//!   a thread: control socket ──────────────┘
//! ```
//! No answer of anybody is waited for under the lock; whoever hangs makes its own part old, and nothing else.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use understudy_protocol::control::{encode_line, read_line};
use understudy_protocol::key::Key;

use crate::bmc::{self, Fencing};
use crate::load::{self, Load, Times};
use crate::local::Machines;
use crate::matrix::{Bmc, Production, Verdict};
use crate::members;
use crate::report::{DIRECTORY, Report, Request, socket};
use crate::watch::{Config, Event, Watch};
use crate::wire::{Heartbeat, MAX_DATAGRAM, Plane};

/// How often the membership is asked for.
const MEMBERSHIP: Duration = Duration::from_secs(2);
/// Longest that a tool of the cluster may take.
const TOOL: Duration = Duration::from_secs(8);
/// How often threads look whether they are to end.
const LOOK: Duration = Duration::from_millis(200);
/// A control connection that says nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(10);
/// Node attribute that says how this node is connected to the production network.
pub const PRODUCTION_ATTRIBUTE: &str = "understudy-production";
/// Node health attribute (Pacemaker's `node-health-strategy`), where wanted.
pub const HEALTH_ATTRIBUTE: &str = "#health-understudy";

/// What the process is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For the state machine.
    pub config: Config,
    /// Every node's address in each plane, `HOST:PORT`; nodes may lack one in the management plane.
    pub addresses: BTreeMap<Plane, BTreeMap<String, String>>,
    /// The key that nodes know each other by.
    pub key: Key,
    /// Parent of run directories.
    pub run_root: PathBuf,
    /// Program and first words of what prints the membership.
    pub crm_mon: Vec<String>,
    /// Program that sets node attributes.
    pub attrd_updater: String,
    /// Program and words of what prints the CIB, for the fencing devices in it.
    pub cibadmin: Vec<String>,
    /// Where fence agents are.
    pub fence_agents: PathBuf,
    /// Whether management controllers of hosts that are gone are asked.
    pub bmc: bool,
    /// Whether Pacemaker's node health is told that this node is cut off.
    pub health: bool,
}

struct Shared {
    watch: Mutex<Watch>,
    refused: Mutex<(u64, Option<String>)>,
    quit: AtomicBool,
    began: Instant,
}

impl Shared {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        // Whoever panicked has left numbers behind, no half-made promise.
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn ends(&self) -> bool {
        self.quit.load(Ordering::Relaxed)
    }

    fn refuse(&self, from: &SocketAddr, why: &str) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.0 = refused.0.saturating_add(1);
        refused.1 = Some(format!("{from}: {why}"));
    }

    fn report(&self) -> Report {
        let mut report = self.watch().report(self.now());
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        (report.refused, report.last_refused) = refused.clone();
        report
    }
}

/// A monitor that runs.
pub struct Daemon {
    shared: Arc<Shared>,
    _lock: Flock<std::fs::File>,
}

impl Daemon {
    /// Open the sockets and begin.
    pub fn start(settings: Settings) -> Result<Self> {
        let dir = settings.run_root.join(DIRECTORY);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .with_context(|| format!("creating {}", dir.display()))?;
        let file =
            std::fs::File::create(dir.join("lock")).with_context(|| format!("creating a lock in {}", dir.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| anyhow::anyhow!("another monitor uses {}: {e}", dir.display()))?;
        let began = SystemTime::now().duration_since(UNIX_EPOCH).context("this host's clock is before 1970")?;
        let shared = Arc::new(Shared {
            watch: Mutex::new(Watch::new(
                settings.config.clone(),
                u64::try_from(began.as_millis()).unwrap_or(u64::MAX),
            )),
            refused: Mutex::default(),
            quit: AtomicBool::new(false),
            began: Instant::now(),
        });
        let mut planes = Vec::new();
        for (plane, addresses) in &settings.addresses {
            if let Some(own) = addresses.get(&settings.config.node) {
                let bound = UdpSocket::bind(own)
                    .with_context(|| format!("listening on {own} ({} network) for heartbeats", plane.as_str()))?;
                bound.set_read_timeout(Some(LOOK)).context("setting a timeout")?;
                let others = addresses.iter().filter(|(node, _)| **node != settings.config.node);
                let others = others.map(|(_, address)| resolve(address)).collect::<Result<Vec<_>>>()?;
                planes.push((*plane, Arc::new(bound), others));
            }
        }
        if planes.is_empty() {
            bail!("no network has an address of this node ({})", settings.config.node);
        }
        let control = listen(&settings)?;
        for (plane, receiver, _) in &planes {
            let (plane, receiver, shared, key) = (*plane, receiver.clone(), shared.clone(), settings.key.clone());
            thread::spawn(move || receive(plane, &receiver, &shared, &key));
        }
        let (tell, told) = channel();
        let also = shared.clone();
        let at_cluster = settings.clone();
        thread::spawn(move || cluster(&at_cluster, &also, &told));
        let (also, root, interval) =
            (shared.clone(), settings.run_root.clone(), Duration::from_millis(settings.config.interval_ms));
        thread::spawn(move || {
            let mut machines = Machines::below(&root);
            while !also.ends() {
                let seen = machines.look();
                also.watch().own(seen);
                thread::sleep(interval);
            }
        });
        if settings.bmc {
            let (also, at_bmcs) = (shared.clone(), settings.clone());
            thread::spawn(move || controllers(&at_bmcs, &also));
        }
        let also = shared.clone();
        thread::spawn(move || serve(&control, &also));
        let also = shared.clone();
        thread::spawn(move || beat(&settings, &planes, &also, &tell));
        Ok(Self { shared, _lock: lock })
    }

    /// Whether somebody has asked the process to end.
    pub fn ends(&self) -> bool {
        self.shared.ends()
    }

    /// How everything looks from here.
    pub fn report(&self) -> Report {
        self.shared.report()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Relaxed);
    }
}

fn resolve(address: &str) -> Result<SocketAddr> {
    let mut found =
        address.to_socket_addrs().with_context(|| format!("{address} is no HOST:PORT that can be resolved"))?;
    found.next().with_context(|| format!("{address} has no address"))
}

type Planes = [(Plane, Arc<UdpSocket>, Vec<SocketAddr>)];

/// The loop. What cannot be sent is not heard: that is what heartbeats are for, so it is no error here.
fn beat(settings: &Settings, planes: &Planes, shared: &Shared, tell: &Sender<Production>) {
    let interval = Duration::from_millis(settings.config.interval_ms.max(1));
    let mut next = Instant::now();
    while !shared.ends() {
        let events = shared.watch().tick(shared.now());
        for event in events {
            match event {
                Event::Beat(beat) => {
                    for (plane, from, others) in planes {
                        let sealed = Heartbeat { plane: *plane, ..beat.clone() }.seal(settings.key.bytes());
                        for to in others {
                            let _ = from.send_to(&sealed, to);
                        }
                    }
                }
                Event::Changed { now, was, speaks } if speaks || now.node == settings.config.node => {
                    let subject = now.machine.as_ref().map(|m| format!("machine {m} on ")).unwrap_or_default();
                    let level = if now.verdict == Verdict::Nothing { "INFO" } else { "WARNING" };
                    eprintln!(
                        "{level}: {subject}node {}: {} (row {}; before: {was}): {}",
                        now.node, now.verdict, now.row, now.observation
                    );
                }
                Event::Changed { .. } => {}
                // The thread ends with the process.
                Event::Connected(production) => drop(tell.send(production)),
            }
        }
        next += interval;
        let now = Instant::now();
        if next < now {
            // It stood still; beats that were missed are not sent all at once.
            next = now;
        }
        thread::sleep(next - now);
    }
}

fn receive(plane: Plane, socket: &UdpSocket, shared: &Shared, key: &Key) {
    let mut buffer = vec![0; MAX_DATAGRAM + 1];
    while !shared.ends() {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            // A peer that is not there yet may show as an error of the socket (ICMP).
            Err(_) => {
                thread::sleep(LOOK);
                continue;
            }
        };
        match Heartbeat::open(&buffer[..length], key.bytes()) {
            Ok(beat) => {
                let (node, now) = (beat.node.clone(), shared.now());
                if !shared.watch().heard(now, plane, beat) {
                    shared.refuse(
                        &from,
                        &format!(
                            "an old heartbeat, one of another network, or of a node that is not monitored ({node})"
                        ),
                    );
                }
            }
            Err(why) => shared.refuse(&from, &why.to_string()),
        }
    }
}

/// What the cluster is asked and told; it may take its time.
fn cluster(settings: &Settings, shared: &Shared, told: &Receiver<Production>) {
    let mut complained = None;
    let mut publish: Option<Production> = None;
    let mut load = Load::default();
    while !shared.ends() {
        let asked = match settings.crm_mon.split_first() {
            Some((program, words)) => output(Command::new(program).args(words), TOOL),
            None => Err("no program says who is a member".into()),
        };
        let found = asked.and_then(|text| members::members(&text));
        if let Err(why) = &found
            && complained.as_ref() != Some(why)
        {
            eprintln!("WARNING: nothing is judged while the membership is not known: {why}");
        }
        complained = found.as_ref().err().cloned();
        shared.watch().members(found.ok());
        let until =
            Instant::now() + MEMBERSHIP.min(Duration::from_millis(settings.config.interval_ms.saturating_mul(2)));
        while let Ok(production) = told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            publish = Some(production);
        }
        if let Some(production) = publish
            && tell_cluster(settings, production)
        {
            publish = None;
        }
        let times = std::fs::read_to_string("/proc/stat").ok().and_then(|stat| Times::parse(&stat));
        if let Some(percent) = times.and_then(|times| load.look(shared.now(), times))
            && set_attribute(settings, load::ATTRIBUTE, &percent.to_string())
        {
            load.told(percent);
        }
    }
}

/// Ask the management controllers of hosts that are gone, each again some seconds after its last answer.
fn controllers(settings: &Settings, shared: &Shared) {
    let mut asked: BTreeMap<String, Instant> = BTreeMap::new();
    let mut complained = None;
    while !shared.ends() {
        let lost = shared.watch().to_ask(shared.now());
        asked.retain(|node, _| lost.contains(node));
        let due: Vec<&String> =
            lost.iter().filter(|node| asked.get(*node).is_none_or(|at| at.elapsed() >= bmc::AGAIN)).collect();
        if due.is_empty() {
            thread::sleep(LOOK);
            continue;
        }
        let fencing = match settings.cibadmin.split_first() {
            Some((program, words)) => output(Command::new(program).args(words), TOOL),
            None => Err("no program prints the fencing devices".into()),
        };
        let fencing = fencing.and_then(|cib| Fencing::read(&cib));
        if let Err(why) = &fencing
            && complained.as_ref() != Some(why)
        {
            eprintln!("WARNING: no management controller is asked: {why}");
        }
        complained = fencing.as_ref().err().cloned();
        let ask = |node: &str| match &fencing {
            Ok(fencing) => fencing.ask(node, &settings.fence_agents),
            Err(_) => Bmc::Unknown,
        };
        let ask = &ask;
        // One question a host at any time; hosts that were lost together do not wait for each other.
        let answers: Vec<(String, Bmc)> = thread::scope(|scope| {
            let asking: Vec<_> = due.iter().map(|node| scope.spawn(move || ((*node).clone(), ask(node)))).collect();
            asking.into_iter().filter_map(|of| of.join().ok()).collect()
        });
        for (node, answer) in answers {
            // It may be back by now.
            if shared.watch().to_ask(shared.now()).contains(&node) {
                shared.watch().bmc(&node, answer);
            }
            asked.insert(node, Instant::now());
        }
    }
}

/// Publish how this node is connected. False: try again.
fn tell_cluster(settings: &Settings, production: Production) -> bool {
    let set = |name: &str, value: &str| set_attribute(settings, name, value);
    // Where everything is cut off no node is worse than another.
    let cut_off = matches!(production, Production::Node | Production::Rack);
    set(PRODUCTION_ATTRIBUTE, production.as_str())
        && (!settings.health || set(HEALTH_ATTRIBUTE, if cut_off { "red" } else { "green" }))
}

/// Set a transient attribute of this node. False: try again.
fn set_attribute(settings: &Settings, name: &str, value: &str) -> bool {
    let mut command = Command::new(&settings.attrd_updater);
    match output(command.args(["--name", name, "--update", value]), TOOL) {
        Ok(_) => true,
        Err(why) => {
            eprintln!("WARNING: {name}={value} is not published: {why}");
            false
        }
    }
}

/// Run a tool, with a bound. What it prints may be large, so it is read while it runs.
fn output(command: &mut Command, limit: Duration) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| format!("{name} cannot be run: {e}"))?;
    let read = |from: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut text = Vec::new();
            // What was read until an error is all that there is.
            let _ = from.map(|mut from| from.read_to_end(&mut text));
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|o| Box::new(o) as Box<dyn Read + Send>));
    let err = read(child.stderr.take().map(|o| Box::new(o) as Box<dyn Read + Send>));
    let status = wait(&mut child, limit).ok_or_else(|| format!("{name} took longer than {} s", limit.as_secs()))?;
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if status.success() { Ok(out) } else { Err(format!("{name} failed ({status}): {}", err.trim())) }
}

fn wait(child: &mut Child, limit: Duration) -> Option<std::process::ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(10)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn listen(settings: &Settings) -> Result<UnixListener> {
    let path = socket(&settings.run_root);
    // We hold the lock: whoever left it is gone.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .with_context(|| format!("protecting {}", path.display()))?;
    Ok(listener)
}

fn serve(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming() {
        if shared.ends() {
            return;
        }
        let Ok(stream) = stream else { continue };
        let shared = shared.clone();
        thread::spawn(move || {
            // Whoever does not listen any more has hung up.
            let _ = converse(stream, &shared);
        });
    }
}

fn converse(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(line) = read_line(&mut reader)? {
        let reply = match serde_json::from_slice(&line) {
            Ok(Request::Status) => serde_json::json!({ "ok": shared.report() }),
            Ok(Request::Quit) => {
                shared.quit.store(true, Ordering::Relaxed);
                serde_json::json!({ "ok": null })
            }
            Err(e) => serde_json::json!({ "error": format!("this is no request: {e}") }),
        };
        stream.write_all(&encode_line(&reply))?;
    }
    Ok(())
}
