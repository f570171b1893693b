//! A guest's disk: our virtio-blk beside QEMU's, with the same kernel, program and file in the same run; and ours while protected beside ours while not.
//!
//! The file is in a tmpfs, so that the road to it is measured and no storage. In the lab VM everything is software-emulated: the figures compare things with each other, and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab_guest::line::parse;
use serde::Serialize;
use understudy_protocol::control::{ReplicatorRequest, Role};

use super::Spread;
use super::pair::{self, Linux, Setup, Side, free_port, keygen};
use crate::lab::{host, places, wait_for, wait_until};

const MEMORY_MIB: u64 = 256;
const DISK_BYTES: usize = 192 << 20;
/// A boot and all cases, under software emulation.
const BOUND: Duration = Duration::from_secs(300);
/// Between two checkpoints.
const INTERVAL_MS: u64 = 100;
const CMDLINE: &str = "console=ttyS1 quiet mitigations=off understudy.bench=/dev/vda";

/// One way to use a disk.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Case {
    /// `read` or `write`.
    pub op: String,
    /// `sequential` or `random`.
    pub order: String,
    /// Of a request.
    pub bytes: u64,
    /// Requests under way.
    pub depth: u64,
}

/// What came of it, MiB/s.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Which.
    #[serde(flatten)]
    pub case: Case,
    /// Ours.
    pub understudy: Spread,
    /// QEMU's.
    pub qemu: Spread,
    /// Ours, while a checkpoint is made every 100 ms.
    pub protected: Spread,
    /// Medians: ours by QEMU's.
    pub by_qemu: f64,
    /// Medians: protected by unprotected.
    pub protected_by_unprotected: f64,
}

/// The key `guest` of `disk.json`.
#[derive(Debug, Clone, Serialize)]
pub struct GuestDisk {
    /// Host or lab VM, and why.
    pub where_it_ran: String,
    /// The peer.
    pub qemu: String,
    /// All cases.
    pub rows: Vec<Row>,
}

type Rates = BTreeMap<Case, Vec<f64>>;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots the guest three times.
pub fn measure(say: &dyn Fn(&str)) -> Result<GuestDisk> {
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    let linux = Linux {
        kernel: places::root_dir()?.join("boot/vmlinuz"),
        initrd: places::lab_dir()?.join("guest/initrd-disk"),
        cmdline: CMDLINE.into(),
    };
    say("our virtio-blk");
    let understudy = ours(dir.path(), &linux)?;
    say("QEMU's virtio-blk");
    let qemu = qemus(dir.path(), &linux)?;
    say("our virtio-blk, protected");
    let protected = protected(dir.path(), linux)?;
    let rate = |of: &Rates, case: &Case| Spread::of(of.get(case).cloned().unwrap_or_default());
    let ratio = |a: &Spread, b: &Spread| if b.median > 0.0 { a.median / b.median } else { 0.0 };
    let rows = understudy.keys().map(|case| {
        let (understudy, qemu, protected) = (rate(&understudy, case), rate(&qemu, case), rate(&protected, case));
        let (by_qemu, kept) = (ratio(&understudy, &qemu), ratio(&protected, &understudy));
        Row { case: case.clone(), understudy, qemu, protected, by_qemu, protected_by_unprotected: kept }
    });
    Ok(GuestDisk { where_it_ran: host::choose()?.1, qemu: super::qemu::version()?, rows: rows.collect() })
}

/// A disk without holes, of which nothing was read yet.
fn fresh_disk(dir: &Path) -> Result<PathBuf> {
    let disk = dir.join("disk");
    let _ = fs::remove_dir_all(dir.join("disk.row"));
    fs::write(&disk, vec![0x5a; DISK_BYTES]).context("making the disk")?;
    Ok(disk)
}

fn ours(dir: &Path, linux: &Linux) -> Result<Rates> {
    let (disk, serial) = (fresh_disk(dir)?, dir.join("understudy"));
    let mut command = Command::new(places::bin_dir()?.join("understudy-vmm"));
    command.args(["run", "--machine", "disk", "--vcpus", "1", "--memory", &MEMORY_MIB.to_string()]);
    command.arg("--kernel").arg(&linux.kernel).arg("--initrd").arg(&linux.initrd).args(["--cmdline", &linux.cmdline]);
    command.arg("--run-root").arg(dir.join("run")).arg("--shm-root").arg(dir.join("shm"));
    command.arg("--disk").arg(format!("name=vda,file={},format=raw", disk.display()));
    command.arg("--serial0").arg(format!("file:{}", serial.display()));
    rates_of(command, &serial)
}

/// As one would configure it for speed: a thread of its own for the disk, the host's page cache as in ours.
fn qemus(dir: &Path, linux: &Linux) -> Result<Rates> {
    let (disk, serial) = (fresh_disk(dir)?, dir.join("qemu"));
    let mut command = super::qemu::command()?;
    command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-no-reboot", "-append", &linux.cmdline]);
    command.arg("-kernel").arg(&linux.kernel).arg("-initrd").arg(&linux.initrd);
    command.arg("-serial").arg(format!("file:{}", serial.display()));
    let drive = format!("if=none,id=vda,format=raw,cache=writeback,aio=threads,file={}", disk.display());
    command.args(["-object", "iothread,id=io", "-drive", &drive]);
    command.args(["-device", "virtio-blk-pci,drive=vda,iothread=io"]);
    rates_of(command, &serial)
}

fn rates_of(mut command: Command, serial: &Path) -> Result<Rates> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = Killed(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let rates = wait_for("the guest's figures", BOUND, || {
        if let Some(status) = child.0.try_wait()? {
            let mut said = String::new();
            if let Some(mut stderr) = child.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut said)?;
            }
            return Ok(Some(Err(anyhow::anyhow!("it ended ({status}): {said}"))));
        }
        rates(serial).map(|rates| rates.map(Ok))
    });
    rates?
}

fn protected(dir: &Path, linux: Linux) -> Result<Rates> {
    let (disk, serial) = (fresh_disk(dir)?, dir.join("protected"));
    keygen(&dir.join("key"))?;
    let disk = format!("name=vda,file={},format=raw", disk.display());
    let setup = Setup {
        vcpus: 1,
        interval_ms: INTERVAL_MS,
        serial: Some(format!("file:{}", serial.display())),
        disk: Some(disk.parse().context("naming the disk")?),
        // As much as storage and replication carry, not what throttling leaves of it.
        replicator: ["--pipeline", "3", "--slow-link", "stall", "--peer-timeout-ms", "15000"].map(str::to_owned).into(),
        linux: Some(linux),
        ..Setup::new(MEMORY_MIB)
    };
    let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
    let mut sides = [Side::new(dir, "a")?, Side::new(dir, "b")?];
    for (side, name) in sides.iter_mut().zip(["a", "b"]).rev() {
        side.start_vmm(dir, name, &setup, name == "b")?;
        side.start_replicator(dir, name, &peers, &setup)?;
    }
    let primary = &sides[0];
    primary.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
    let is_protected = || {
        let status = primary.replicator()?;
        anyhow::Ok(status.role == Role::Sender && status.protected)
    };
    wait_until("protection", pair::BOUND * 2, is_protected)?;
    let before = primary.replicator()?;
    let rates = wait_for("the protected guest's figures", BOUND, || rates(&serial))?;
    let after = primary.replicator()?;
    ensure!(
        after.protected && after.losses == before.losses && after.committed > before.committed,
        "the machine was not protected all the time: {after:?}"
    );
    Ok(rates)
}

/// MiB/s of every case, when the guest is done.
fn rates(serial: &Path) -> Result<Option<Rates>> {
    let text = fs::read(serial).unwrap_or_default();
    let (mut rates, mut done) = (Rates::new(), false);
    for line in text.split(|b| *b == b'\n').filter_map(|line| parse(line.strip_suffix(b"\r").unwrap_or(line)).ok()) {
        match line.kind {
            'E' => bail!("the guest says: {}", line.fields),
            'Q' if line.fields == "done" => done = true,
            'Q' => {
                let text =
                    |key| line.field(key).map(str::to_owned).with_context(|| format!("no {key}: {}", line.fields));
                let number = |key| line.count(key).with_context(|| format!("no {key}: {}", line.fields));
                let (bytes, depth) = (number("bytes")?, number("depth")?);
                let case = Case { op: text("op")?, order: text("order")?, bytes, depth };
                let mib = (number("count")? * bytes) as f64 / f64::from(1 << 20);
                rates.entry(case).or_default().push(mib * 1e6 / number("us")?.max(1) as f64);
            }
            _ => {}
        }
    }
    Ok(done.then_some(rates))
}

/// For people.
pub fn table(measured: &GuestDisk) -> String {
    let mut text = format!(
        "{}; beside QEMU {}; MiB/s, medians\n  {:<34} {:>11} {:>9} {:>9} {:>10} {:>8}\n",
        measured.where_it_ran, measured.qemu, "", "understudy", "QEMU", "ratio", "protected", "ratio"
    );
    for row in &measured.rows {
        let Case { op, order, bytes, depth } = &row.case;
        let size = if *bytes >= 1 << 20 { format!("{} MiB", bytes >> 20) } else { format!("{} KiB", bytes >> 10) };
        let name = format!("{order} {op}, {size}, depth {depth}");
        text.push_str(&format!(
            "  {name:<34} {:>11.1} {:>9.1} {:>9.2} {:>10.1} {:>8.2}\n",
            row.understudy.median, row.qemu.median, row.by_qemu, row.protected.median, row.protected_by_unprotected
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_count_when_the_guest_is_done() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let line = lab_guest::line::encode;
        let one = "round=0 op=read order=random bytes=1048576 depth=32 count=50 us=500000";
        fs::write(file.path(), line('Q', 1, one)).unwrap();
        assert!(rates(file.path()).unwrap().is_none());
        fs::write(file.path(), line('Q', 1, one) + &line('Q', 2, "done")).unwrap();
        let all = rates(file.path()).unwrap().unwrap();
        assert_eq!(all.values().collect::<Vec<_>>(), [&vec![100.0]]);
        fs::write(file.path(), line('E', 1, "disk bad")).unwrap();
        assert!(rates(file.path()).is_err());
    }
}
