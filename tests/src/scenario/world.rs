//! The lab with the demo machine in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use understudy_protocol::control::{ReplicatorStatus, Role, VmmState, VmmStatus, call_once};

use crate::field_device::report::{Event, Record, Verdict};
use crate::field_device::run::Request;
use crate::lab::places;
use crate::lab::{Lab, LabOptions, wait_for, wait_until};

/// The machine's name in `tests/demo/policy.toml`.
pub const MACHINE: &str = "demo";
/// The vmm's resource.
pub const VMM: &str = "vm-demo";
/// The vmm's clone.
pub const VMM_CLONE: &str = "vm-demo-clone";
/// The nodes that can run it.
pub const HOSTS: [&str; 2] = ["n1", "n2"];
/// The board.
pub const BOARD: &str = "b1";
/// The tty that the board owns, as the policy names it: the device's end of it is held by the field device, as a cable is
/// held by the device and not by the board.
const LINE: &str = "pty:/run/understudy-bmc/demo-com1";

/// Bytes a second that the guest writes in the lab VM.
const EMULATED_RATE: u32 = 2000;

/// Bounds of waits, long enough for software emulation on a busy host. Nothing is measured by them.
pub const BOUND: Duration = Duration::from_secs(240);

/// The lab, the machine, the device.
pub struct World {
    /// The cluster under it.
    pub lab: Lab,
    device: Option<Child>,
    /// Told what is being waited for; prints or not.
    pub progress: fn(&str),
}

impl World {
    /// Bring up the lab, plug the device in and configure the machine as `policy` says; returns when the cluster has taken the
    /// configuration.
    pub fn up(policy: &Path, progress: fn(&str)) -> Result<Self> {
        let world = Self::bare(progress)?;
        world.configure(policy)?;
        Ok(world)
    }

    /// The lab alone: no device, no guest, an empty configuration.
    pub fn empty(progress: fn(&str)) -> Result<Self> {
        progress("starting two cluster nodes and a board");
        let lab = Lab::up(&LabOptions { bare: true, ..LabOptions::default() })?;
        Ok(Self { lab, device: None, progress })
    }

    /// The lab with the device plugged in and the guest's files in place; the cluster's configuration is empty.
    pub fn bare(progress: fn(&str)) -> Result<Self> {
        let mut world = Self::empty(progress)?;
        world.plug_device()?;
        world.give_guest_files()?;
        Ok(world)
    }

    /// Kernel and initramfs lie on each node's disk, as an administrator would have put them there.
    fn give_guest_files(&self) -> Result<()> {
        let kernel = places::root_dir()?.join("boot/vmlinuz");
        let initrd = places::lab_dir()?.join("guest/initrd");
        ensure!(
            initrd.exists(),
            "the demo guest's initramfs is not at {}: `make lab-guest` builds it",
            initrd.display()
        );
        for node in HOSTS {
            let dir = self.lab.disk_file(node, "understudy/demo")?;
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
            fs::copy(&kernel, dir.join("vmlinuz")).with_context(|| format!("copying {}", kernel.display()))?;
            fs::copy(&initrd, dir.join("initrd")).with_context(|| format!("copying {}", initrd.display()))?;
        }
        Ok(())
    }

    /// `understudy-crm apply`, as an administrator would.
    pub fn configure(&self, policy: &Path) -> Result<()> {
        (self.progress)("configuring the cluster from the policy file");
        let mut text = fs::read_to_string(policy).with_context(|| format!("reading {}", policy.display()))?;
        if places::in_vm() {
            // Every byte on the line is an exit from a guest inside an emulated CPU, which it shares with two hosts and their
            // clusters: at full rate nothing else would run. On real KVM the guest writes as fast as 115200 baud allow.
            text = text.replace("understudy.rate=11520", &format!("understudy.rate={EMULATED_RATE}"));
        }
        for node in HOSTS {
            fs::write(self.lab.disk_file(node, "etc-understudy/policy.toml")?, &text)
                .with_context(|| format!("writing the policy for {node}"))?;
        }
        self.lab.run("n1", &["understudy-crm", "apply", "/etc/understudy/policy.toml"])?;
        Ok(())
    }

    // ------------------------------------------------------------------------------------------------------ the device

    fn device_file(name: &str) -> PathBuf {
        // The one directory that every node shares with the outside.
        Path::new(places::BMC_DIR).join(name)
    }

    /// Plug the device into the board.
    fn plug_device(&mut self) -> Result<()> {
        (self.progress)("plugging a device into the board's serial line");
        for name in ["field.jsonl", "field.sock", "verdict.json"] {
            let _ = fs::remove_file(Self::device_file(name));
        }
        let mut command = self.lab.command(BOARD, "understudy-field-device")?;
        command.arg(LINE).args(["--interval-us", "50000", "--silence-ms", "500", "--tick-ms", "1000"]);
        command.arg("--events").arg(Self::device_file("field.jsonl"));
        command.arg("--verdict").arg(Self::device_file("verdict.json"));
        command.arg("--control").arg(Self::device_file("field.sock"));
        command.arg("--until-stdin-closes");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        self.device = Some(command.spawn().context("starting the field device")?);
        wait_until("the field device", BOUND, || Ok(Self::device_file("field.sock").exists()))
    }

    fn ask_device(request: &Request, timeout: Duration) -> Result<Verdict> {
        Ok(call_once(Self::device_file("field.sock"), request, timeout)?)
    }

    /// The device's judgement so far.
    pub fn verdict(&self) -> Result<Verdict> {
        Self::ask_device(&Request::Status, Duration::from_secs(20))
    }

    /// Stop writing until the guest has reported all that was sent, then go on. The judgement in between.
    pub fn drain(&self) -> Result<Verdict> {
        let bound = Duration::from_secs(90);
        let request = Request::Drain { timeout_ms: bound.as_millis() as u64 };
        let verdict = Self::ask_device(&request, bound + Duration::from_secs(20))?;
        Self::ask_device(&Request::Resume, Duration::from_secs(20))?;
        Ok(verdict)
    }

    /// Stop writing, wait until the guest has reported all that was sent, end the device. The last word.
    pub fn final_verdict(&mut self) -> Result<Verdict> {
        let drain = Duration::from_secs(60);
        let request = Request::Stop { drain_ms: drain.as_millis() as u64 };
        let verdict = Self::ask_device(&request, drain + Duration::from_secs(20))?;
        if let Some(mut child) = self.device.take() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
        Ok(verdict)
    }

    /// What the device has seen so far.
    pub fn device_events(&self) -> Result<Vec<Record>> {
        let text = fs::read_to_string(Self::device_file("field.jsonl")).context("reading the field device's events")?;
        // The last line may be half written at this moment.
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// First byte from the guest at or after `since_ms`, wall clock.
    pub fn first_byte_after(&self, since_ms: u64) -> Result<Option<u64>> {
        Ok(self
            .device_events()?
            .into_iter()
            .find(|r| r.at.wall_ms >= since_ms && matches!(r.event, Event::FirstByte { .. } | Event::Started { .. }))
            .map(|r| r.at.wall_ms))
    }

    /// Wait until the guest has written `more` lines that the device accepted.
    pub fn wait_lines(&self, more: u64) -> Result<()> {
        let from = self.verdict().map_or(0, |v| v.lines);
        wait_until(&format!("{more} more lines from the guest"), BOUND, || Ok(self.verdict()?.lines >= from + more))
    }

    // ----------------------------------------------------------------------------------------------------- the machine

    /// A status with `--json` from a tool in a node.
    fn status<T: DeserializeOwned>(&self, node: &str, tool: &str) -> Result<T> {
        let text = self.lab.run(node, &[tool, "status", "--machine", MACHINE, "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("reading the status that {tool} printed: {text}"))
    }

    /// The VMM's status in `node`.
    pub fn vmm(&self, node: &str) -> Result<VmmStatus> {
        self.status(node, "understudy-vmm")
    }

    /// The replicator's status in `node`.
    pub fn replicator(&self, node: &str) -> Result<ReplicatorStatus> {
        self.status(node, "understudy-replicator")
    }

    /// The nodes in which the machine runs by its VMM's own account, not by Pacemaker's. More than one is the worst of all.
    pub fn running_on(&self) -> Vec<&'static str> {
        HOSTS
            .into_iter()
            .filter(|n| self.vmm(n).is_ok_and(|s| matches!(s.state, VmmState::Running | VmmState::Paused)))
            .collect()
    }

    /// The one node that runs it.
    pub fn primary(&self) -> Result<&'static str> {
        match self.running_on()[..] {
            [node] => Ok(node),
            [] => bail!("the machine runs nowhere"),
            _ => bail!("the machine runs on both nodes"),
        }
    }

    /// Wait until it runs somewhere, other than on `not`.
    pub fn wait_running(&self, not: Option<&str>) -> Result<&'static str> {
        let what = not.map_or("the machine running".into(), |n| format!("the machine running elsewhere than on {n}"));
        wait_for(&what, BOUND, || match self.running_on()[..] {
            [node] if Some(node) != not => Ok(Some(node)),
            [_] => Ok(None),
            [] => bail!("it runs nowhere"),
            _ => bail!("it runs on both nodes"),
        })
    }

    /// Wait until the primary's replicator says that the machine is protected; that node.
    pub fn wait_protected(&self) -> Result<&'static str> {
        (self.progress)("waiting for protection");
        wait_for("the machine protected", BOUND, || {
            let node = self.primary()?;
            let status = self.replicator(node)?;
            if status.role == Role::Sender && status.protected {
                return Ok(Some(node));
            }
            bail!(
                "on {node}: {:?}, replica {:?}, copied {:.0} %, vetoed {}: {}",
                status.role,
                status.replica,
                status.sync_progress * 100.0,
                status.vetoed,
                status.note
            )
        })
    }

    /// The other host.
    pub fn other(node: &str) -> &'static str {
        if node == HOSTS[0] { HOSTS[1] } else { HOSTS[0] }
    }

    /// Switch a node on and wait until the cluster has it.
    pub fn boot(&self, node: &str) -> Result<()> {
        (self.progress)(&format!("{node} returns"));
        self.lab.boot(node)?;
        self.lab.wait_online(&HOSTS, BOUND)
    }

    /// Kill one of the machine's processes on a node with SIGKILL. `what` is `vmm` or `replicator`.
    pub fn kill_process(&self, node: &str, what: &str) -> Result<u32> {
        let pid: u32 = self
            .lab
            .run(node, &["cat", &format!("/run/understudy/{MACHINE}/{what}.pid")])?
            .trim()
            .parse()
            .with_context(|| format!("reading the process id of the {what} on {node}"))?;
        self.lab.run(node, &["kill", "-KILL", &pid.to_string()])?;
        Ok(pid)
    }

    /// Text of everything that could explain a failure, for the end of a failed run.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for node in HOSTS {
            for argv in [
                &["crm_mon", "-1", "-r", "-n", "-f", "-A"][..],
                &["tail", "-n", "25", &format!("/run/understudy/{MACHINE}/vmm.log")],
                &["tail", "-n", "25", &format!("/run/understudy/{MACHINE}/replicator.log")],
                &["understudy-replicator", "status", "--machine", MACHINE],
                &["understudy-vmm", "status", "--machine", MACHINE],
            ] {
                let Ok(out) = self.lab.output(node, argv) else { continue };
                text.push_str(&format!("--- {node}: {}\n", argv.join(" ")));
                text.push_str(&String::from_utf8_lossy(&out.stdout));
                text.push_str(&String::from_utf8_lossy(&out.stderr));
            }
        }
        if let Ok(verdict) = self.verdict() {
            text.push_str(&format!("--- field device: {}\n", serde_json::to_string(&verdict).unwrap_or_default()));
        }
        text
    }

    /// Take everything down.
    pub fn down(mut self) -> Result<()> {
        if let Some(mut child) = self.device.take() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
        for name in ["field.jsonl", "verdict.json"] {
            if let Ok(out) = places::out_dir() {
                let _ = fs::create_dir_all(&out);
                let _ = fs::copy(Self::device_file(name), out.join(name));
            }
        }
        self.keep_machine_logs();
        Lab::down()
    }

    fn keep_machine_logs(&self) {
        let Ok(out) = places::out_dir() else { return };
        for node in HOSTS {
            for log in ["vmm.log", "replicator.log"] {
                if let Ok(text) = self.lab.run(node, &["cat", &format!("/run/understudy/{MACHINE}/{log}")]) {
                    let _ = fs::create_dir_all(out.join(node));
                    let _ = fs::write(out.join(node).join(log), text);
                }
            }
        }
    }
}
