//! A guest's network card: our virtio-net beside QEMU's in user space (`vhost=off`), with the same kernel, disk and bridge in the same run; and ours while protected beside ours
//! while not.
//!
//! iperf3 each way between the guest and this host, and one question at a time, a byte (TCP) or sixteen (UDP) each way, as netperf's TCP_RR and UDP_RR ask. The guest is that of
//! [`crate::connections`]. In the lab VM everything is software-emulated: the figures compare things with each other, and nothing else.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use serde_json::Value;
use understudy_protocol::control::{ReplicatorRequest, Role};

use super::Spread;
use super::pair::{self, Linux, Setup, Side, free_port, keygen};
use crate::lab::host::{self, need_tools, need_tun, run_quiet};
use crate::lab::{guest_disk, places, wait_until};

const MEMORY_MIB: u64 = 192;
/// A boot, under software emulation.
const BOUND: Duration = Duration::from_secs(300);
/// Between two checkpoints.
const INTERVAL_MS: u64 = 100;
const ROUNDS: usize = 3;
/// How long a case takes, s.
const CASE: u64 = 3;
const BRIDGE: &str = "br0";
const HERE: &str = "10.78.0.9/24";
const GUEST: &str = "10.78.0.5";
const MAC: &str = "52:54:00:78:00:05";
/// The echo protocol's.
const ECHO: u16 = 7;
/// A question that has no answer after this time was lost.
const LOST: Duration = Duration::from_secs(20);

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Of what.
    pub case: String,
    /// Mbit/s, or questions a second.
    pub unit: String,
    /// Ours.
    pub understudy: Spread,
    /// QEMU's.
    pub qemu: Spread,
    /// Ours, while a checkpoint is made every 100 ms, and earlier when packets wait.
    pub protected: Spread,
    /// Medians: ours by QEMU's.
    pub by_qemu: f64,
    /// Medians: protected by unprotected.
    pub protected_by_unprotected: f64,
}

/// The key `guest` of `net.json`.
#[derive(Debug, Clone, Serialize)]
pub struct GuestNet {
    /// Host or lab VM, and why.
    pub where_it_ran: String,
    /// The peer.
    pub qemu: String,
    /// All cases.
    pub rows: Vec<Row>,
}

const CASES: [(&str, &str); 4] = [
    ("TCP from the guest", "Mbit/s"),
    ("TCP to the guest", "Mbit/s"),
    ("TCP, a byte there and back", "1/s"),
    ("UDP, 16 bytes there and back", "1/s"),
];

type Figures = BTreeMap<usize, Vec<f64>>;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the guest three times. The calling thread is in another network namespace afterwards.
pub fn measure(say: &dyn Fn(&str)) -> Result<GuestNet> {
    need_tools(&[("iperf3", "iperf3")])?;
    need_tun()?;
    let where_it_ran = host::choose()?.1;
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of its own is not allowed here: run it as root")?;
    ip("link set lo up")?;
    ip(&format!("link add {BRIDGE} address 02:00:00:78:00:fe type bridge forward_delay 0 stp_state 0"))?;
    ip(&format!("addr add {HERE} dev {BRIDGE}"))?;
    ip(&format!("link set {BRIDGE} up"))?;
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    let linux = Linux {
        kernel: places::root_dir()?.join("boot/vmlinuz"),
        initrd: places::lab_dir()?.join("guest/initrd-disk"),
        cmdline: format!("console=ttyS1 quiet mitigations=off understudy.disk=/dev/vda understudy.net={GUEST}/24"),
    };
    say("our virtio-net");
    let understudy = ours(dir.path(), &linux)?;
    say("QEMU's virtio-net");
    let qemu = qemus(dir.path(), &linux)?;
    say("our virtio-net, protected");
    let protected = protected(dir.path(), linux)?;
    let spread = |of: &Figures, case: usize| Spread::of(of.get(&case).cloned().unwrap_or_default());
    let ratio = |a: &Spread, b: &Spread| if b.median > 0.0 { a.median / b.median } else { 0.0 };
    let rows = CASES.iter().enumerate().map(|(n, (case, unit))| {
        let (understudy, qemu, protected) = (spread(&understudy, n), spread(&qemu, n), spread(&protected, n));
        let (by_qemu, kept) = (ratio(&understudy, &qemu), ratio(&protected, &understudy));
        let (case, unit) = ((*case).to_owned(), (*unit).to_owned());
        Row { case, unit, understudy, qemu, protected, by_qemu, protected_by_unprotected: kept }
    });
    Ok(GuestNet { where_it_ran, qemu: super::qemu::version()?, rows: rows.collect() })
}

fn ip(words: &str) -> Result<()> {
    run_quiet(Command::new("ip").args(words.split(' '))).map(drop)
}

fn fresh_disk(dir: &Path) -> Result<PathBuf> {
    let disk = dir.join("disk");
    run_quiet(Command::new("cp").arg("--sparse=always").arg(guest_disk::ensure()?).arg(&disk))?;
    let _ = std::fs::remove_dir_all(dir.join("disk.row"));
    Ok(disk)
}

fn nic(tap: &str) -> String {
    format!("name=net0,tap={tap},bridge={BRIDGE},mac={MAC}")
}

fn ours(dir: &Path, linux: &Linux) -> Result<Figures> {
    let disk = fresh_disk(dir)?;
    let mut command = Command::new(places::bin_dir()?.join("understudy-vmm"));
    command.args(["run", "--machine", "net", "--vcpus", "1", "--memory", &MEMORY_MIB.to_string()]);
    command.arg("--kernel").arg(&linux.kernel).arg("--initrd").arg(&linux.initrd).args(["--cmdline", &linux.cmdline]);
    command.arg("--run-root").arg(dir.join("run")).arg("--shm-root").arg(dir.join("shm"));
    command.arg("--disk").arg(format!("name=vda,file={},format=raw", disk.display()));
    command.arg("--serial0").arg(format!("file:{}", dir.join("understudy").display()));
    command.args(["--nic", &nic("ours")]);
    figures_of(command)
}

/// As QEMU comes: the device in its main thread, offloads on both sides.
fn qemus(dir: &Path, linux: &Linux) -> Result<Figures> {
    let disk = fresh_disk(dir)?;
    ip("tuntap add qemus mode tap vnet_hdr")?;
    ip(&format!("link set qemus master {BRIDGE} up"))?;
    let mut command = super::qemu::command()?;
    command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-no-reboot", "-append", &linux.cmdline]);
    command.arg("-kernel").arg(&linux.kernel).arg("-initrd").arg(&linux.initrd);
    command.arg("-serial").arg(format!("file:{}", dir.join("qemu").display()));
    let drive = format!("if=none,id=vda,format=raw,cache=writeback,aio=threads,file={}", disk.display());
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=vda"]);
    command.args(["-netdev", "tap,id=net0,ifname=qemus,script=no,downscript=no,vhost=off"]);
    command.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={MAC},romfile=")]);
    let figures = figures_of(command);
    ip("link del qemus")?;
    figures
}

fn figures_of(mut command: Command) -> Result<Figures> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let figures = figures();
    if let Some(status) = child.0.try_wait()? {
        let mut said = String::new();
        if let Some(mut stderr) = child.0.stderr.take() {
            stderr.read_to_string(&mut said)?;
        }
        bail!("it ended ({status}): {said}");
    }
    figures
}

fn protected(dir: &Path, linux: Linux) -> Result<Figures> {
    let disk = fresh_disk(dir)?;
    keygen(&dir.join("key"))?;
    let disk = format!("name=vda,file={},format=raw", disk.display());
    let mut setup = Setup {
        vcpus: 1,
        interval_ms: INTERVAL_MS,
        serial: Some(format!("file:{}", dir.join("protected").display())),
        disk: Some(disk.parse().context("naming the disk")?),
        // As much as network and replication carry, not what throttling leaves of it.
        replicator: ["--pipeline", "3", "--slow-link", "stall", "--peer-timeout-ms", "15000"].map(str::to_owned).into(),
        linux: Some(linux),
        ..Setup::new(MEMORY_MIB)
    };
    let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
    let mut sides = [Side::new(dir, "a")?, Side::new(dir, "b")?];
    for (side, name) in sides.iter_mut().zip(["a", "b"]).rev() {
        setup.nic = Some(nic(&format!("side-{name}")).parse().context("naming the card")?);
        side.start_vmm(dir, name, &setup, name == "b")?;
        side.start_replicator(dir, name, &peers, &setup)?;
    }
    let primary = &sides[0];
    primary.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
    wait_until("protection", pair::BOUND * 2, || {
        let status = primary.replicator()?;
        Ok(status.role == Role::Sender && status.protected)
    })?;
    let before = primary.replicator()?;
    let figures = figures()?;
    let after = primary.replicator()?;
    ensure!(
        after.protected && after.losses == before.losses && after.committed > before.committed,
        "the machine was not protected all the time: {after:?}"
    );
    Ok(figures)
}

/// All cases, some rounds, when the guest serves.
fn figures() -> Result<Figures> {
    let address: SocketAddr = format!("{GUEST}:{ECHO}").parse().context("the guest's address")?;
    wait_until("the guest's echo", BOUND, || {
        Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(|_| true)?)
    })?;
    wait_until("the guest's iperf3", BOUND, || iperf3(&["--bytes", "1K"]).map(|_| true))?;
    let mut figures = Figures::new();
    let seconds = CASE.to_string();
    for _ in 0..ROUNDS {
        let round =
            [iperf3(&["--reverse", "--time", &seconds])?, iperf3(&["--time", &seconds])?, tcp(address)?, udp(address)?];
        for (case, figure) in round.into_iter().enumerate() {
            figures.entry(case).or_default().push(figure);
        }
    }
    Ok(figures)
}

/// Mbit/s that arrived.
fn iperf3(words: &[&str]) -> Result<f64> {
    let said = run_quiet(Command::new("iperf3").args(["--client", GUEST, "--json"]).args(words))?;
    let said: Value = serde_json::from_str(&said).context("reading iperf3's report")?;
    let rate = said["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(rate.with_context(|| format!("iperf3 says no rate: {}", said["error"]))? / 1e6)
}

fn tcp(address: SocketAddr) -> Result<f64> {
    let mut stream = TcpStream::connect(address).context("connecting to the echo")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOST))?;
    let mut byte = [0x5a];
    asked(|| {
        stream.write_all(&byte).context("asking by TCP")?;
        stream.read_exact(&mut byte).context("an answer by TCP")
    })
}

fn udp(address: SocketAddr) -> Result<f64> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("opening a socket")?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LOST))?;
    let mut buffer = [0; 64];
    asked(|| {
        socket.send(&[0; 16]).context("asking by UDP")?;
        socket.recv(&mut buffer).context("an answer by UDP").map(drop)
    })
}

/// Questions a second, one at a time.
fn asked(mut once: impl FnMut() -> Result<()>) -> Result<f64> {
    once()?;
    let (began, mut count) = (Instant::now(), 0u32);
    while began.elapsed() < Duration::from_secs(CASE) {
        once()?;
        count += 1;
    }
    Ok(f64::from(count) / began.elapsed().as_secs_f64())
}

/// For people.
pub fn table(measured: &GuestNet) -> String {
    let mut text = format!(
        "{}; beside QEMU {}; medians\n  {:<38} {:>11} {:>9} {:>9} {:>10} {:>8}\n",
        measured.where_it_ran, measured.qemu, "", "understudy", "QEMU", "ratio", "protected", "ratio"
    );
    for row in &measured.rows {
        text += &format!(
            "  {:<38} {:>11.1} {:>9.1} {:>9.2} {:>10.1} {:>8.2}\n",
            format!("{}, {}", row.case, row.unit),
            row.understudy.median,
            row.qemu.median,
            row.by_qemu,
            row.protected.median,
            row.protected_by_unprotected
        );
    }
    text
}
