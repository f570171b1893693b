//! The lab's daemon: it holds the nodes' power switches and cables, and plays the base management controller (BMC) that
//! fencing talks to.
//!
//! One unix socket, reachable from outside and inside every node (a path socket crosses network namespaces); requests and
//! replies as `understudy_protocol::control` has them. Its answers must be true, whatever they cost: "off" is said only
//! when the node's process 1, and with it every process of the node, has been reaped.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use understudy_protocol::control::{Reply, encode_line, read_line};

use super::net::{self, NODES, Node, Plane};
use super::places;

/// Longest wait for a killed node to be gone.
const OFF_BOUND: Duration = Duration::from_secs(20);

/// A request to the daemon. `by` says who asks, for the event log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case")]
pub enum BmcRequest {
    /// Reply: [`LabStatus`].
    Status,
    /// Reply: all [`Event`]s so far.
    Events,
    /// Switch a node on; nothing if it is. Reply: `null` once its init runs.
    On { node: String, by: String },
    /// Cut a node's power. Reply: `null` once every process of it is gone.
    Off { node: String, by: String },
    /// Press a node's power button: orderly shutdown. Reply: `null` at once.
    Shutdown { node: String },
    /// Stop every process of a node (SIGSTOP): a hang. Its kernel still answers pings and acknowledges TCP.
    Freeze { node: String },
    /// Let a frozen node go on.
    Thaw { node: String },
    /// Pull a node's cable of one plane.
    Cut { node: String, plane: Plane },
    /// Plug all cables of a node (or of all nodes) in again.
    Heal { node: Option<String> },
    /// Choose what fencing "off" does.
    SetFenceMode { mode: FenceMode },
    /// Fencing of `node`, asked for by the node `from`: `on`, `off`, `reboot` as the mode says. The BMC sits on the management
    /// plane: whoever is cut off from that does not reach it.
    Fence { action: String, node: String, from: String },
    /// Write a line of the caller's into the event log.
    Note { text: String },
    /// Do not end with the program that brought the lab up.
    Keep,
    /// Kill all nodes and end.
    Quit,
}

/// What fencing "off" does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FenceMode {
    /// Cuts the power.
    Power,
    /// Pulls all cables and leaves the node running: it may wake up later, as a zombie.
    Fabric,
}

/// Reply to [`BmcRequest::Status`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabStatus {
    /// The daemon's process; its network namespace is the outer end of the planes.
    pub pid: u32,
    /// What fencing does.
    pub fence_mode: FenceMode,
    /// By name.
    pub nodes: BTreeMap<String, NodeStatus>,
}

impl LabStatus {
    /// Whether `node` is cut off from the BMC.
    pub fn is_deaf(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|n| n.cut.contains(&Plane::Management))
    }
}

/// One node in [`LabStatus`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Whether it is on.
    pub on: bool,
    /// Its process 1, as seen from outside.
    pub pid: Option<u32>,
    /// Whether it is frozen.
    pub frozen: bool,
    /// Cables that are pulled.
    pub cut: BTreeSet<Plane>,
    /// How often it was switched on.
    pub boots: u32,
}

/// One line of the event log.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// Wall clock, ms since 1970.
    pub t_ms: u64,
    /// The node it happened to; empty for notes.
    pub node: String,
    /// `on`, `power-cut`, `off`, `went-off`, `shutdown`, `freeze`, `thaw`, `cut PLANE`, `heal`, `fence-request ACTION`,
    /// `fence-refused ACTION`, `fence-done ACTION`, `note TEXT`.
    pub event: String,
    /// Who caused it.
    pub by: String,
}

#[derive(Default)]
struct NodeState {
    pid: Option<u32>,
    button: Option<ChildStdin>,
    frozen: bool,
    cut: BTreeSet<Plane>,
    boots: u32,
    /// Off was asked for: its end is no surprise.
    ending: bool,
}

struct State {
    mode: FenceMode,
    kept: bool,
    nodes: BTreeMap<&'static str, NodeState>,
    events: Vec<Event>,
}

/// The daemon.
pub struct Bmc {
    state: Mutex<State>,
    changed: Condvar,
    log: Mutex<fs::File>,
}

/// Run the daemon until `Quit`, or, when `tied`, until its standard input ends: the program that started it holds the other
/// end. Called single-threaded: it moves into a network namespace of its own first.
pub fn serve(tied: bool) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making the lab's network namespace")?;
    net::make_planes()?;
    let socket = places::bmc_socket();
    fs::create_dir_all(places::BMC_DIR)?;
    let _ = fs::remove_file(&socket);
    let out = places::out_dir()?;
    fs::create_dir_all(&out)?;
    let log = fs::File::create(out.join("events.jsonl")).context("creating the event log")?;
    let bmc = Arc::new(Bmc {
        state: Mutex::new(State {
            mode: FenceMode::Power,
            kept: !tied,
            nodes: NODES.iter().map(|n| (n.name, NodeState::default())).collect(),
            events: Vec::new(),
        }),
        changed: Condvar::new(),
        log: Mutex::new(log),
    });
    let listener = UnixListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let holder = bmc.clone();
    thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        if !holder.lock().kept {
            // The nodes' inits see their power supply go and end too.
            let _ = fs::remove_file(places::bmc_socket());
            std::process::exit(0);
        }
    });
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let bmc = bmc.clone();
        thread::spawn(move || bmc.session(stream));
    }
    Ok(())
}

impl Bmc {
    fn session(self: &Arc<Self>, stream: UnixStream) {
        let Ok(mut writer) = stream.try_clone() else { return };
        let mut reader = BufReader::new(stream);
        while let Ok(Some(line)) = read_line(&mut reader) {
            let reply = match serde_json::from_slice::<BmcRequest>(&line) {
                Ok(request) => {
                    let last = request == BmcRequest::Quit;
                    let reply = match self.handle(request) {
                        Ok(value) => Reply::Ok(value),
                        Err(e) => Reply::Error(format!("{e:#}")),
                    };
                    if last {
                        let _ = writer.write_all(&encode_line(&reply));
                        let _ = fs::remove_file(places::bmc_socket());
                        std::process::exit(0);
                    }
                    reply
                }
                Err(e) => Reply::Error(format!("not a request: {e}")),
            };
            if writer.write_all(&encode_line(&reply)).is_err() {
                return;
            }
        }
    }

    fn handle(self: &Arc<Self>, request: BmcRequest) -> Result<serde_json::Value> {
        match request {
            BmcRequest::Status => return Ok(serde_json::to_value(self.status())?),
            BmcRequest::Events => return Ok(serde_json::to_value(&self.lock().events)?),
            BmcRequest::On { node, by } => self.on(net::node(&node)?, &by)?,
            BmcRequest::Off { node, by } => self.off(net::node(&node)?, "power-cut", &by)?,
            BmcRequest::Shutdown { node } => self.shutdown(net::node(&node)?)?,
            BmcRequest::Freeze { node } => self.freeze(net::node(&node)?)?,
            BmcRequest::Thaw { node } => self.thaw(net::node(&node)?)?,
            BmcRequest::Cut { node, plane } => self.cut(net::node(&node)?, plane)?,
            BmcRequest::Heal { node: Some(node) } => self.heal(net::node(&node)?)?,
            BmcRequest::Heal { node: None } => NODES.into_iter().try_for_each(|n| self.heal(n))?,
            BmcRequest::SetFenceMode { mode } => self.lock().mode = mode,
            BmcRequest::Fence { action, node, from } => self.fence(&action, net::node(&node)?, &from)?,
            BmcRequest::Note { text } => self.record("", &format!("note {text}"), ""),
            BmcRequest::Keep => self.lock().kept = true,
            BmcRequest::Quit => NODES.into_iter().try_for_each(|n| self.off(n, "off", "lab"))?,
        }
        Ok(serde_json::Value::Null)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, node: &str, event: &str, by: &str) {
        self.record_at(places::now_ms(), node, event, by);
    }

    fn record_at(&self, t_ms: u64, node: &str, event: &str, by: &str) {
        let event = Event { t_ms, node: node.into(), event: event.into(), by: by.into() };
        if let Ok(mut log) = self.log.lock() {
            let _ = log.write_all(&encode_line(&event));
        }
        self.lock().events.push(event);
    }

    fn status(&self) -> LabStatus {
        let state = self.lock();
        let nodes = state.nodes.iter().map(|(name, n)| {
            let status =
                NodeStatus { on: n.pid.is_some(), pid: n.pid, frozen: n.frozen, cut: n.cut.clone(), boots: n.boots };
            (name.to_string(), status)
        });
        LabStatus { pid: std::process::id(), fence_mode: state.mode, nodes: nodes.collect() }
    }

    // ------------------------------------------------------------------------------------------------------------ power

    fn on(self: &Arc<Self>, node: Node, by: &str) -> Result<()> {
        // The lock is held throughout: nobody sees a node that is half on. (Fork, a few `ip` calls.)
        let mut state = self.lock();
        let entry = state.nodes.entry(node.name).or_default();
        if entry.pid.is_some() {
            return Ok(());
        }
        let base = places::run_dir().join("nodes").join(node.name);
        fs::create_dir_all(&base)?;
        let console = fs::OpenOptions::new().create(true).append(true).open(base.join("console.log"))?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["node-start", node.name])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(console)
            .spawn()
            .context("starting the node")?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let Ok(pid) = line.trim().parse::<u32>() else {
            let _ = child.wait();
            bail!("{} did not start; its console: {}", node.name, base.join("console.log").display());
        };
        let cut: Vec<Plane> = entry.cut.iter().copied().collect();
        let mut button = child.stdin.take().context("the node has no power button")?;
        let plugged = net::plug(node, pid, &cut).and_then(|()| Ok(button.write_all(b"go\n")?));
        if let Err(e) = plugged {
            let _ = child.kill();
            let _ = child.wait();
            return Err(e.context(format!("plugging {} in", node.name)));
        }
        *entry = NodeState {
            pid: Some(pid),
            button: Some(button),
            frozen: false,
            cut: std::mem::take(&mut entry.cut),
            boots: entry.boots + 1,
            ending: false,
        };
        drop(state);
        self.record(node.name, "on", by);
        let bmc = self.clone();
        thread::spawn(move || {
            // node-start ends when it has reaped process 1, that is when no process of the node is left.
            let _ = child.wait();
            let mut state = bmc.lock();
            let mut surprise = false;
            if let Some(entry) = state.nodes.get_mut(node.name) {
                surprise = !entry.ending;
                entry.pid = None;
                entry.button = None;
                entry.frozen = false;
            }
            drop(state);
            if surprise {
                bmc.record(node.name, "went-off", "");
            }
            bmc.changed.notify_all();
        });
        Ok(())
    }

    fn off(&self, node: Node, event: &str, by: &str) -> Result<()> {
        let mut state = self.lock();
        let Some(entry) = state.nodes.get_mut(node.name) else { return Ok(()) };
        let Some(pid) = entry.pid else { return Ok(()) };
        entry.ending = true;
        drop(state);
        // First the cables: a dying process's sockets would say goodbye to their peers, which a power cut does not.
        // (A cable that cannot be pulled, because the node is dying already, must not save its life.)
        if let Err(e) = net::unplug_all(node) {
            eprintln!("{} {}: {e:#}", places::now_ms(), node.name);
        }
        let t_ms = places::now_ms();
        kill(raw(pid), Signal::SIGKILL).with_context(|| format!("cutting {}'s power", node.name))?;
        self.record_at(t_ms, node.name, event, by);
        let state = self.lock();
        let still_on = |s: &mut State| s.nodes.get(node.name).is_some_and(|n| n.pid == Some(pid));
        let (_state, timeout) =
            self.changed.wait_timeout_while(state, OFF_BOUND, still_on).unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            bail!("{} was killed {} s ago and is still there", node.name, OFF_BOUND.as_secs());
        }
        Ok(())
    }

    fn shutdown(&self, node: Node) -> Result<()> {
        let mut state = self.lock();
        let Some(entry) = state.nodes.get_mut(node.name) else { return Ok(()) };
        if let Some(button) = &mut entry.button {
            entry.ending = true;
            button.write_all(b"shutdown\n").with_context(|| format!("pressing {}'s power button", node.name))?;
        }
        drop(state);
        self.record(node.name, "shutdown", "lab");
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------- freezing and thawing

    fn freeze(&self, node: Node) -> Result<()> {
        let pid = self.pid_of(node)?;
        // New processes may appear while we go round; a round that finds nothing running ends it.
        let deadline = Instant::now() + OFF_BOUND;
        loop {
            let running: Vec<Pid> =
                processes(pid)?.into_iter().filter(|(_, stopped)| !stopped).map(|(p, _)| p).collect();
            if running.is_empty() {
                break;
            }
            for process in running {
                let _ = kill(process, Signal::SIGSTOP); // it may have ended meanwhile
            }
            if Instant::now() > deadline {
                bail!("{} does not freeze", node.name);
            }
            thread::sleep(Duration::from_millis(2));
        }
        if let Some(entry) = self.lock().nodes.get_mut(node.name) {
            entry.frozen = true;
        }
        self.record(node.name, "freeze", "lab");
        Ok(())
    }

    fn thaw(&self, node: Node) -> Result<()> {
        let pid = self.pid_of(node)?;
        self.record(node.name, "thaw", "lab");
        for (process, _) in processes(pid)? {
            let _ = kill(process, Signal::SIGCONT);
        }
        if let Some(entry) = self.lock().nodes.get_mut(node.name) {
            entry.frozen = false;
        }
        Ok(())
    }

    fn pid_of(&self, node: Node) -> Result<u32> {
        self.lock().nodes.get(node.name).and_then(|n| n.pid).with_context(|| format!("{} is off", node.name))
    }

    // ----------------------------------------------------------------------------------------------------------- cables

    fn cut(&self, node: Node, plane: Plane) -> Result<()> {
        self.set_cable(node, plane, false)?;
        self.record(node.name, &format!("cut {}", plane.name()), "lab");
        Ok(())
    }

    fn heal(&self, node: Node) -> Result<()> {
        let cut: Vec<Plane> =
            self.lock().nodes.get(node.name).map(|n| n.cut.iter().copied().collect()).unwrap_or_default();
        for plane in &cut {
            self.set_cable(node, *plane, true)?;
        }
        if !cut.is_empty() {
            self.record(node.name, "heal", "lab");
        }
        Ok(())
    }

    fn set_cable(&self, node: Node, plane: Plane, up: bool) -> Result<()> {
        let mut state = self.lock();
        let Some(entry) = state.nodes.get_mut(node.name) else { return Ok(()) };
        if entry.pid.is_some() {
            net::set_link(node, plane, up)?;
        }
        if up {
            entry.cut.remove(&plane);
        } else {
            entry.cut.insert(plane);
        }
        Ok(())
    }

    // ---------------------------------------------------------------------------------------------------------- fencing

    fn fence(self: &Arc<Self>, action: &str, node: Node, from: &str) -> Result<()> {
        let by = &format!("fencing from {from}");
        self.record(node.name, &format!("fence-request {action}"), by);
        if self.status().is_deaf(from) {
            self.record(node.name, &format!("fence-refused {action}"), by);
            bail!("{from} cannot reach the BMC: its management cable is pulled");
        }
        let mode = self.lock().mode;
        match (action, mode) {
            ("off", FenceMode::Power) => self.off(node, "off", by)?,
            ("reboot", FenceMode::Power) => {
                self.off(node, "off", by)?;
                self.on(node, by)?;
            }
            ("off" | "reboot", FenceMode::Fabric) => {
                for plane in Plane::ALL {
                    self.set_cable(node, plane, false)?;
                }
            }
            ("on", _) => {
                self.heal(node)?;
                self.on(node, by)?;
            }
            (other, _) => bail!("the simulated BMC does not know the action \"{other}\""),
        }
        self.record(node.name, &format!("fence-done {action}"), by);
        Ok(())
    }
}

fn raw(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

/// All processes in the process namespace whose process 1 is `init`, and whether each is stopped.
fn processes(init: u32) -> Result<Vec<(Pid, bool)>> {
    let namespace = |pid: &str| fs::read_link(Path::new("/proc").join(pid).join("ns/pid")).ok();
    let wanted = namespace(&init.to_string()).context("the node is gone")?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Ok(pid) = name.parse::<i32>() else { continue };
        if namespace(&name).as_ref() != Some(&wanted) {
            continue;
        }
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // pid (comm) state: comm may hold anything, so the state is what follows the last parenthesis.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X');
        if !matches!(state, 'Z' | 'X') {
            found.push((Pid::from_raw(pid), state == 'T' || state == 't'));
        }
    }
    Ok(found)
}
