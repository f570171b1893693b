//! The two hosts, their cables, the clients, and what is done to them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use understudy_protocol::control::{
    HandedOver, PromoteFrom, ReplicatorRequest, ReplicatorStatus, Role, TakenOver, VmmRequest, call_once,
};
use understudy_protocol::ids::Generation;

use super::Mix;
use super::clients::{Clients, Kind, wait_for_servers};
use super::switch::{BRIDGE, Plane, Switch, guest_with_prefix, namespace};
use crate::bench::pair::{self, Linux, Setup, Side, keygen};
use crate::lab::host::{need_tools, need_tun, run_quiet};
use crate::lab::{guest_disk, places, wait_for};
use crate::power_cuts::veto;

/// RAM.
pub const MEMORY_MIB: u64 = 192;
/// Whatever an emulated processor does, it does within this time: a boot with the recovery of a database, a first copy, a connection's next try.
const BOUND: Duration = Duration::from_secs(300);
/// A host with other work may say nothing for a while; what is lost must be lost by the cut.
const PEER_TIMEOUT_MS: u64 = 15_000;
const NAMES: [&str; 2] = ["a", "b"];
/// Of the guest's card, and the tap that it is behind.
pub const MAC: &str = "52:54:00:78:00:05";
/// See [`MAC`].
pub const TAP: &str = "guest0";
const PORT: u16 = 7790;

/// Silence of each kind of client.
pub type Silences = [Duration; Kind::ALL.len()];

/// See the module.
pub struct World {
    // First, so that nobody complains about the end.
    clients: Option<Clients>,
    sides: [Side; 2],
    on: [bool; 2],
    primary: usize,
    generation: u64,
    setup: Setup,
    peers: String,
    switch: Switch,
    // Last, so that it outlives the processes.
    dir: tempfile::TempDir,
}

/// How the machine is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protection {
    /// Between two checkpoints, ms.
    pub interval_ms: u64,
    /// At least, when packets wait, ms.
    pub min_interval_ms: u64,
    /// Packets do not wait for their commit.
    pub leak: bool,
}

/// The guest's disk and a client's key are made in `dir`, by the names `disk` and `ssh`; what boots from that disk and serves.
pub fn guest_files(dir: &Path, kernel: Option<&Path>) -> Result<Linux> {
    run_quiet(Command::new("cp").arg("--sparse=always").arg(guest_disk::ensure()?).arg(dir.join("disk")))?;
    let key = dir.join("ssh");
    run_quiet(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-C", "client", "-f"]).arg(&key))?;
    let public = fs::read_to_string(key.with_extension("pub")).context("reading the client's key")?;
    let public = public.split(' ').nth(1).context("ssh-keygen wrote no key")?;
    let kernel = match kernel {
        Some(kernel) => kernel.to_owned(),
        None => places::root_dir()?.join("boot/vmlinuz"),
    };
    let initrd = places::lab_dir()?.join("guest/initrd-disk");
    ensure!(initrd.exists(), "the guest's initramfs is not at {}: `make lab-disk` builds it", initrd.display());
    let cmdline = format!(
        "console=ttyS1 quiet mitigations=off understudy.disk=/dev/vda understudy.net={} understudy.ssh={public}",
        guest_with_prefix()
    );
    Ok(Linux { kernel, initrd, cmdline })
}

impl World {
    /// Everything runs and is protected, and every client has got somewhere.
    pub fn new(mix: &Mix, say: &dyn Fn(&str)) -> Result<Self> {
        need_tools(&[("ssh", "openssh-client"), ("curl", "curl")])?;
        let Mix { interval_ms, min_interval_ms, leak, .. } = *mix;
        let mut this = Self::boot(mix.kernel.as_deref(), Protection { interval_ms, min_interval_ms, leak }, say)?;
        say("the standby comes");
        this.recover().map_err(|e| this.explain(e))?;
        say("clients connect");
        let clients = Clients::start(this.dir.path(), &mix.load, BOUND).map_err(|e| this.explain(e))?;
        this.clients = Some(clients);
        Ok(this)
    }

    /// The machine serves, without a standby and without clients. [`World::recover`] protects it.
    pub fn boot(kernel: Option<&Path>, protection: Protection, say: &dyn Fn(&str)) -> Result<Self> {
        need_tools(&[("/usr/lib/postgresql/17/bin/psql", "postgresql-client-17"), ("iperf3", "iperf3")])?;
        need_tun()?;
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let at = dir.path();
        say("copying the guest's disk");
        let linux = guest_files(at, kernel)?;
        keygen(&at.join("key"))?;
        let script = format!("case $1 in veto) : > {0};; clear-veto) rm -f {0};; esac\n", veto(at).display());
        fs::write(at.join("hook"), script).context("writing the hook")?;
        let disk = format!(
            "name=vda,file={},format=raw,mode=shared,slices={}",
            at.join("disk").display(),
            at.join("slices").display()
        );
        let nic = format!("name=net0,tap={TAP},bridge={BRIDGE},mac={MAC}");
        // Outputs may wait: a guest that is slowed down for emulated replication gets nothing done.
        let least = protection.min_interval_ms.to_string();
        let more = ["--pipeline", "3", "--slow-link", "stall", "--min-interval-ms", &least, "--peer-timeout-ms"];
        let more = more.map(str::to_owned);
        let setup = Setup {
            vcpus: 1,
            interval_ms: protection.interval_ms,
            leak: protection.leak,
            serial: Some(format!("file:{}", at.join("com1").display())),
            disk: Some(disk.parse().context("naming the disk")?),
            nic: Some(nic.parse().context("naming the card")?),
            hook: Some(format!("/bin/sh {}", at.join("hook").display())),
            replicator: more.into_iter().chain([PEER_TIMEOUT_MS.to_string()]).collect(),
            linux: Some(linux),
            ..Setup::new(MEMORY_MIB)
        };
        let peer = |side: u8| {
            let [one, two] = [Plane::Path1, Plane::Path2].map(|plane| format!("{}:{PORT}", plane.address(side + 1)));
            format!("{}={one},{two}", NAMES[usize::from(side)])
        };
        let peers = format!("{} {}", peer(0), peer(1));
        let mut sides = [Side::new(at, NAMES[0])?, Side::new(at, NAMES[1])?];
        for (number, side) in sides.iter_mut().enumerate() {
            side.namespace = Some(namespace(number));
        }
        let switch = Switch::new()?;
        let on = [false; 2];
        let mut this = Self { clients: None, sides, on, primary: 0, generation: 0, setup, peers, switch, dir };
        say("the guest boots");
        // Without a standby: that much is new in each moment of a boot.
        this.cold_boot().and_then(|()| wait_for_servers(BOUND)).map_err(|e| this.explain(e))?;
        Ok(this)
    }

    /// Who looks at it all.
    pub fn clients(&self) -> Result<&Clients> {
        self.clients.as_ref().context("there are no clients yet")
    }

    /// Under the machine.
    pub fn kvm_backend(&self) -> Result<String> {
        Ok(self.sides[self.primary].vmm()?.kvm_backend)
    }

    /// Every client has got somewhere; how long each had to wait since silences were forgotten.
    pub fn goes_on(&self) -> Result<Silences> {
        let clients = self.clients()?;
        clients.all_go_on(2, BOUND)?;
        Ok(clients.silences())
    }

    /// A host dies: its cables first, then its processes, `first` the VMM or else the replicator.
    fn cut(&mut self, side: usize, first: bool) -> Result<()> {
        self.on[side] = false;
        self.switch.unplug(side)?;
        self.sides[side].cut_power(first)
    }

    /// The machine's host dies, and the other takes over; how long that took.
    pub fn cut_primary(&mut self, first: bool) -> Result<Duration> {
        let began = Instant::now();
        self.cut(self.primary, first)?;
        self.take_over()?;
        Ok(began.elapsed())
    }

    /// The other host dies.
    pub fn cut_standby(&mut self, first: bool) -> Result<()> {
        self.cut(1 - self.primary, first)
    }

    /// The machine moves, with its last checkpoint. Its old host is off afterwards.
    pub fn hand_over(&mut self, first: bool) -> Result<()> {
        let old = self.primary;
        let _: HandedOver = self.sides[old].ask_replicator(&ReplicatorRequest::HandOver)?;
        self.cut(old, first)?;
        self.take_over()
    }

    /// The cable that carries the checkpoints is pulled at the standby, until the loss was noticed and all clients went on. Nobody loses protection. Returns their silences.
    pub fn cut_path(&mut self) -> Result<Silences> {
        let (before, plane) = wait_for("a path that carries the checkpoints", BOUND, || {
            let status = self.primary_status()?;
            let active = status.paths.iter().find(|path| path.active);
            Ok(active.and_then(|path| Plane::of(&path.address)).map(|plane| (status.clone(), plane)))
        })?;
        let standby = 1 - self.primary;
        self.switch.set(standby, plane, false)?;
        let silences = wait_for("the loss of a path noticed", BOUND, || {
            Ok((!self.primary_status()?.paths.iter().all(|path| path.works)).then_some(()))
        })
        .and_then(|()| self.goes_on());
        self.switch.set(standby, plane, true)?;
        let silences = silences?;
        wait_for("both paths again", BOUND, || {
            Ok(self.primary_status()?.paths.iter().all(|path| path.works).then_some(()))
        })?;
        let after = self.primary_status()?;
        ensure!(
            after.protected && after.losses == before.losses,
            "one of two paths was lost, and protection with it: {} losses before, {} after ({})",
            before.losses,
            after.losses,
            after.note
        );
        Ok(silences)
    }

    /// The cable to the guest's network is pulled at the standby, until all clients went on: nobody is to notice.
    pub fn cut_uplink(&mut self) -> Result<Silences> {
        let standby = 1 - self.primary;
        self.switch.set(standby, Plane::Business, false)?;
        let silences = self.goes_on();
        self.switch.set(standby, Plane::Business, true)?;
        silences
    }

    /// Of the replicator of the machine's host.
    pub fn primary_status(&self) -> Result<ReplicatorStatus> {
        self.sides[self.primary].replicator()
    }

    /// The standby becomes the machine, by the agents' rules.
    fn take_over(&mut self) -> Result<()> {
        ensure!(
            !veto(self.dir.path()).exists(),
            "the machine ran unprotected when it was cut (the veto stands): the host was too busy for this test"
        );
        self.generation += 1;
        let (generation, next) = (Generation(self.generation), &self.sides[1 - self.primary]);
        let taken: TakenOver = next.ask_replicator(&ReplicatorRequest::TakeOver { generation })?;
        let image = taken.image.context("the standby has no image of a protected machine")?;
        let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
        call_once::<_, ()>(next.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, pair::BOUND)?;
        next.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
        self.primary = 1 - self.primary;
        Ok(())
    }

    /// The machine boots on the first host.
    fn cold_boot(&mut self) -> Result<()> {
        self.start(self.primary)?;
        self.generation += 1;
        let (generation, from) = (Generation(self.generation), PromoteFrom::ColdBoot);
        let side = &self.sides[self.primary];
        call_once::<_, ()>(side.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, pair::BOUND)?;
        side.ask_replicator::<()>(&ReplicatorRequest::Promote)
    }

    /// The host that is off comes back, and the machine is protected again, over both paths.
    pub fn recover(&mut self) -> Result<()> {
        if !self.on[1 - self.primary] {
            self.start(1 - self.primary)?;
        }
        wait_for("the machine protected", BOUND, || {
            let wrong = self.clients.as_ref().and_then(Clients::wrong);
            if let Some(wrong) = wrong {
                return Ok(Some(Err(anyhow::anyhow!("{wrong}"))));
            }
            let status = self.primary_status()?;
            let well = status.role == Role::Sender && status.protected && status.paths.iter().all(|path| path.works);
            Ok((well && !veto(self.dir.path()).exists()).then_some(Ok(())))
        })?
    }

    fn start(&mut self, side: usize) -> Result<()> {
        self.switch.plug(side)?;
        let (dir, name) = (self.dir.path(), NAMES[side]);
        self.sides[side].start_vmm(dir, name, &self.setup, true)?;
        self.sides[side].start_replicator(dir, name, &self.peers, &self.setup)?;
        self.on[side] = true;
        Ok(())
    }

    /// With the end of everybody's log.
    pub fn explain(&self, e: anyhow::Error) -> anyhow::Error {
        let end = |name: &str| {
            let bytes = fs::read(self.dir.path().join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let from = text.lines().count().saturating_sub(12);
            format!("--- {name}\n{}", text.lines().skip(from).collect::<Vec<_>>().join("\n"))
        };
        let logs = ["a-vmm.log", "a-replicator.log", "b-vmm.log", "b-replicator.log", "com1"].map(end);
        let nics: Vec<_> = self.sides.iter().map(|side| side.vmm().map(|status| status.nics)).collect();
        let totals = self.clients.as_ref().map(Clients::totals);
        e.context(format!("{}\n--- network\n{nics:?}\n--- clients\n{totals:?}\n", logs.join("\n")))
    }
}
