//! Debian's QEMU with the benchmark's guest: COLO, the only other continuous replication that one can install today, and
//! migration with XBZRLE.
//!
//! One vCPU, which the reset image takes to ring 3; no disk, no network card: COLO then has only memory and devices to carry, which is
//! its best case. Its pauses are from the STOP to the RESUME event of the primary, by QEMU's own clock.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::guest::{self, Guest};
use super::pair::{free_port, tied};
use crate::lab::{places, vm, wait_for};

const BOUND: Duration = Duration::from_secs(60);

/// The QEMU that is at hand: the lab root's (Debian 13), else the host's.
pub fn command() -> Result<Command> {
    let root = places::root_dir()?;
    if root.join("usr/bin/qemu-system-x86_64").exists() {
        return Ok(vm::qemu_command(&root));
    }
    Ok(Command::new("qemu-system-x86_64"))
}

/// Its version, as it says it.
pub fn version() -> Result<String> {
    let said = command()?.arg("--version").output().context("starting QEMU")?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.split_ascii_whitespace().skip_while(|w| *w != "version").nth(1);
    version
        .map(str::to_owned)
        .context("there is no QEMU: `make lab-root` brings one, `apt-get install qemu-system-x86` another")
}

/// One QEMU process; it ends with this.
struct Qemu {
    child: Child,
    monitor: Monitor,
    ram: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    fn start(dir: &Path, name: &str, memory_mib: u64, more: &[&str]) -> Result<Self> {
        let (ram, socket) = (dir.join(format!("{name}.ram")), dir.join(format!("{name}.qmp")));
        let log = dir.join(format!("{name}.log"));
        let mut command = tied(&command()?);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"]);
        command.args(["-machine", "pc,graphics=off,memory-backend=ram", "-cpu", "kvm64,check=off"]);
        command.arg("-m").arg(memory_mib.to_string());
        let size = format!("size={memory_mib}M,mem-path={}", ram.display());
        command.arg("-object").arg(format!("memory-backend-file,id=ram,share=on,{size}"));
        command.arg("-bios").arg(dir.join("reset"));
        let code = dir.join("code");
        let at = guest::LOAD_AT;
        command.arg("-device").arg(format!("loader,file={},addr={at:#x},force-raw=on", code.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&log).context("creating QEMU's log")?);
        let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let monitor = wait_for("QEMU's monitor", BOUND, || {
            if let Some(status) = child.try_wait()? {
                return Ok(Some(Err(anyhow::anyhow!(
                    "QEMU ended ({status}): {}",
                    fs::read_to_string(&log).unwrap_or_default().trim()
                ))));
            }
            Ok(UnixStream::connect(&socket).ok().map(Monitor::greet))
        });
        match monitor.and_then(|m| m) {
            Ok(monitor) => Ok(Self { child, monitor, ram }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }
}

/// QEMU's machine protocol.
struct Monitor {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    events: Vec<Value>,
    /// A STOP whose RESUME is still to come, µs since 1970.
    stopped: Option<i64>,
}

impl Monitor {
    fn greet(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(BOUND)).context("setting a timeout")?;
        let reader = BufReader::new(stream.try_clone().context("sharing a socket")?);
        let mut monitor = Self { stream, reader, events: Vec::new(), stopped: None };
        monitor.line()?;
        monitor.call("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).context("listening to QEMU")?;
        ensure!(n > 0, "QEMU has ended");
        serde_json::from_str(&line).context("QEMU's monitor said something that is no JSON")
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.stream, "{request}").context("asking QEMU")?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"]);
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    fn capability(&mut self, name: &str) -> Result<()> {
        let on = json!({"capabilities": [{"capability": name, "state": true}]});
        self.call("migrate-set-capabilities", on).map(|_| ())
    }

    /// Durations from each STOP to its RESUME, µs, since the last call.
    fn pauses(&mut self) -> Result<Vec<f64>> {
        self.call("query-status", json!({}))?;
        Ok(pauses(&std::mem::take(&mut self.events), &mut self.stopped))
    }
}

fn pauses(events: &[Value], stopped: &mut Option<i64>) -> Vec<f64> {
    let mut pauses = Vec::new();
    for event in events {
        let stamp = &event["timestamp"];
        let (Some(s), Some(us)) = (stamp["seconds"].as_i64(), stamp["microseconds"].as_i64()) else { continue };
        let at = s * 1_000_000 + us;
        match event["event"].as_str() {
            Some("STOP") => *stopped = Some(at),
            Some("RESUME") => pauses.extend(stopped.take().map(|s| (at - s) as f64)),
            _ => {}
        }
    }
    pauses
}

/// How the two QEMUs are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// 127.0.0.1, as between two hosts.
    Tcp,
    /// A unix socket. On TCP COLO's small messages wait for acknowledgements that the other side delays for 40 ms, here not: what it
    /// could reach.
    Unix,
}

impl Transport {
    /// As figures are named.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Unix => "unix socket",
        }
    }
}

/// A machine under COLO, primary and secondary.
pub struct Colo {
    primary: Qemu,
    _secondary: Qemu,
    guest: Guest,
    uri: String,
    _dir: tempfile::TempDir,
}

fn workshop(code: &[u8]) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    fs::write(dir.path().join("code"), code).context("writing the guest's program")?;
    fs::write(dir.path().join("reset"), guest::reset_image()).context("writing the guest's reset image")?;
    Ok(dir)
}

impl Colo {
    /// Start both with `memory_mib` of RAM; the guest runs, unprotected.
    pub fn start(memory_mib: u64, code: &[u8], transport: Transport) -> Result<Self> {
        let dir = workshop(code)?;
        let uri = match transport {
            Transport::Tcp => format!("tcp:127.0.0.1:{}", free_port()?),
            Transport::Unix => format!("unix:{}", dir.path().join("link").display()),
        };
        let mut secondary = Qemu::start(dir.path(), "secondary", memory_mib, &["-incoming", "defer"])?;
        secondary.monitor.capability("x-colo")?;
        secondary.monitor.call("migrate-incoming", json!({"uri": uri}))?;
        let primary = Qemu::start(dir.path(), "primary", memory_mib, &[])?;
        let guest = wait_for("the guest in QEMU", BOUND, || Guest::open(&primary.ram, 1).map(Some))?;
        Ok(Self { primary, _secondary: secondary, guest, uri, _dir: dir })
    }

    /// Begin replication, a checkpoint every 25 ms, and wait for the end of the first copy.
    pub fn protect(&mut self) -> Result<()> {
        let monitor = &mut self.primary.monitor;
        monitor.capability("x-colo")?;
        let limits = json!({"x-checkpoint-delay": 25, "max-bandwidth": 10u64 << 30, "downtime-limit": 2000});
        monitor.call("migrate-set-parameters", limits)?;
        monitor.call("migrate", json!({"uri": self.uri}))?;
        wait_for("COLO's first copy", BOUND, || {
            let migration = monitor.call("query-migrate", json!({}))?;
            match migration["status"].as_str() {
                Some("colo") => Ok(Some(Ok(()))),
                Some("failed" | "cancelled") => Ok(Some(Err(anyhow::anyhow!("COLO does not start: {migration}")))),
                _ => Ok(None),
            }
        })??;
        // The state is called so while the guest still stands still for the first checkpoint, on a busy host for seconds.
        monitor.pauses()?;
        let mut seen = 0;
        wait_for("COLO's first checkpoints", BOUND, || {
            seen += monitor.pauses()?.len();
            Ok((seen >= 3).then_some(()))
        })
    }

    /// Its guest.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Pauses since the last call, µs. An error if COLO has ended: it gives up without a word to the guest.
    pub fn pauses(&mut self) -> Result<Vec<f64>> {
        let pauses = self.primary.monitor.pauses()?;
        let migration = self.primary.monitor.call("query-migrate", json!({}))?;
        ensure!(migration["status"] == "colo", "COLO has ended: {migration}");
        Ok(pauses)
    }
}

/// What a migration with XBZRLE made of dirty pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xbzrle {
    /// Bytes on the wire for each byte of dirty pages, over all pages whose last content was in the cache (which is as large as
    /// RAM).
    pub wire_share: f64,
    /// How many pages that were.
    pub pages: f64,
}

/// Migrate a guest that does what `prepare` tells it into nothing, with XBZRLE, until it ends or for `time`.
///
/// Its rounds are shorter than the guest's period, so that a page is written once between two rounds, as it is between two of our
/// checkpoints.
pub fn xbzrle(memory_mib: u64, code: &[u8], prepare: impl Fn(&Guest) -> Result<()>, time: Duration) -> Result<Xbzrle> {
    let dir = workshop(code)?;
    let mut qemu = Qemu::start(dir.path(), "source", memory_mib, &[])?;
    let guest = wait_for("the guest in QEMU", BOUND, || Guest::open(&qemu.ram, 1).map(Some))?;
    prepare(&guest)?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let port = listener.local_addr().context("listening on loopback")?.port();
    let sink = thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut buffer = vec![0; 256 << 10];
        while matches!(stream.read(&mut buffer), Ok(1..)) {}
    });
    let monitor = &mut qemu.monitor;
    monitor.capability("xbzrle")?;
    // With a downtime of 0 ms QEMU does not look at what was dirtied in the first round.
    let limits = json!({"max-bandwidth": 10u64 << 30, "downtime-limit": 1, "xbzrle-cache-size": memory_mib << 20});
    monitor.call("migrate-set-parameters", limits)?;
    monitor.call("migrate", json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
    let end = Instant::now() + BOUND;
    let mut rounds_since = None;
    let migration = loop {
        let m = monitor.call("query-migrate", json!({}))?;
        match m["status"].as_str() {
            Some("completed") => break m,
            Some("failed" | "cancelled") => bail!("the migration failed: {m}"),
            _ => {}
        }
        if m["ram"]["dirty-sync-count"].as_u64() > Some(1) {
            let since = *rounds_since.get_or_insert_with(Instant::now);
            if since.elapsed() > time {
                break m;
            }
        }
        ensure!(Instant::now() < end, "the migration does not get through its first round: {m}");
        thread::sleep(Duration::from_millis(20));
    };
    drop(qemu);
    let _ = sink.join();
    Xbzrle::from(&migration).context("the migration met no page whose last content it had")
}

impl Xbzrle {
    fn from(migration: &Value) -> Option<Self> {
        let get = |group: &str, key: &str| migration[group][key].as_f64().unwrap_or(0.0);
        let (misses, overflows) = (get("xbzrle-cache", "cache-miss"), get("xbzrle-cache", "overflow"));
        let encoded = get("xbzrle-cache", "pages");
        // All pages once in the first round, then those that missed the cache, those that did not shrink, and zero pages: a mark and
        // an address each.
        let first = get("ram", "total") / 4096.0;
        let zeros = (get("ram", "normal") + get("ram", "duplicate") - first - misses - overflows).max(0.0);
        let pages = encoded + overflows + zeros;
        let bytes = get("xbzrle-cache", "bytes") + overflows * 4096.0 + zeros * 9.0;
        (pages > 0.0).then(|| Self { wire_share: bytes / (pages * 4096.0), pages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_from_a_stop_to_the_next_resume() {
        let event = |name: &str, us: u64| json!({"event": name, "timestamp": {"seconds": 7, "microseconds": us}});
        let events =
            [event("RESUME", 5), event("STOP", 100), event("OTHER", 120), event("RESUME", 350), event("STOP", 400)];
        let mut stopped = None;
        assert_eq!(pauses(&events, &mut stopped), [250.0]);
        // One that lasts when it is asked belongs to the next answer.
        assert_eq!(pauses(&[event("RESUME", 900)], &mut stopped), [500.0]);
    }

    #[test]
    fn xbzrle_is_judged_by_the_pages_that_it_could_encode() {
        let migration = json!({
            "ram": {"total": 4096 * 100, "normal": 70, "duplicate": 48},
            "xbzrle-cache": {"pages": 20, "bytes": 4096 * 5, "cache-miss": 8, "overflow": 6}
        });
        // 4 zero pages beyond the first round's 100 pages.
        let x = Xbzrle::from(&migration).unwrap();
        assert_eq!(x.pages, 30.0);
        assert!((x.wire_share - (5.0 + 6.0 + 4.0 * 9.0 / 4096.0) / 30.0).abs() < 1e-9);
        assert_eq!(Xbzrle::from(&json!({})), None);
    }
}
