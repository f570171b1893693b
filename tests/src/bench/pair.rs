//! Two replicators and two VMMs on this machine, joined over 127.0.0.1, with a guest of the benchmark's.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use understudy_protocol::control::{
    ReplicatorRequest, ReplicatorStatus, Role, VmmRequest, VmmState, VmmStatus, call_once,
};
use understudy_protocol::disk::DiskSpec;
use understudy_protocol::layout::Layout;
use understudy_protocol::nic::NicSpec;
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::machine::{BootSource, MachineConfig};
use understudy_vmm::run::{RunConfig, run};

use super::guest::{self, Guest};
use super::memory;
use crate::lab::{places, wait_for};

/// The machine's name.
pub const MACHINE: &str = "bench";
/// Most time that any one answer takes.
pub const BOUND: Duration = Duration::from_secs(60);

/// A kernel and what it needs.
#[derive(Debug, Clone)]
pub struct Linux {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
}

/// How to build a pair.
#[derive(Debug, Clone)]
pub struct Setup {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// The guest does nothing: one vCPU halted, the others never started. Otherwise it is [`guest`]'s.
    pub idle: bool,
    /// It runs Linux instead.
    pub linux: Option<Linux>,
    /// Milliseconds between two checkpoints.
    pub interval_ms: u64,
    /// More arguments for `understudy-replicator run`.
    pub replicator: Vec<String>,
    /// Where COM1 goes, as `understudy-vmm --serial0` takes it.
    pub serial: Option<String>,
    /// Its disk, as `understudy-vmm --disk` takes it.
    pub disk: Option<DiskSpec>,
    /// Its network card, as `understudy-vmm --nic` takes it.
    pub nic: Option<NicSpec>,
    /// Negative control: packets do not wait for their commit.
    pub leak: bool,
    /// The cluster's arm; without it replicators get `--no-cluster`.
    pub hook: Option<String>,
}

impl Setup {
    /// The benchmark's guest with two vCPUs, a checkpoint every 25 ms, nothing else.
    pub fn new(memory_mib: u64) -> Self {
        Self {
            memory_mib,
            vcpus: 2,
            idle: false,
            linux: None,
            interval_ms: 25,
            replicator: Vec::new(),
            serial: None,
            disk: None,
            nic: None,
            leak: false,
            hook: None,
        }
    }
}

/// The hidden command's arguments: one VMM, as a process of its own.
#[derive(Debug, clap::Args)]
pub struct FlatVmm {
    run_root: PathBuf,
    shm_root: PathBuf,
    #[arg(long)]
    memory: u64,
    #[arg(long)]
    vcpus: u32,
    /// What it runs: flat code in ring 3, or with --idle a kernel image
    #[arg(long)]
    code: PathBuf,
    #[arg(long)]
    idle: bool,
    /// Initramfs of Linux; --code is the kernel then
    #[arg(long)]
    initrd: Option<PathBuf>,
    #[arg(long, default_value = "")]
    cmdline: String,
    #[arg(long)]
    serial: Option<BackendConfig>,
    #[arg(long)]
    disk: Vec<DiskSpec>,
    #[arg(long)]
    nic: Vec<NicSpec>,
    #[arg(long)]
    leak: bool,
    #[arg(long, default_value = "")]
    node: String,
    #[arg(long)]
    standby: bool,
}

/// Run it.
pub fn flat_vmm(args: FlatVmm) -> Result<i32> {
    let layout = Layout::new(&args.run_root, &args.shm_root, MACHINE);
    let boot = if args.idle || args.initrd.is_some() {
        BootSource::Linux { kernel: args.code, initrd: args.initrd, cmdline: args.cmdline }
    } else {
        let code = fs::read(&args.code).with_context(|| format!("reading {}", args.code.display()))?;
        BootSource::Flat { code, at: guest::LOAD_AT }
    };
    let machine = MachineConfig {
        name: MACHINE.into(),
        memory_mib: args.memory,
        vcpus: args.vcpus,
        boot,
        serial: vec![args.serial.unwrap_or(BackendConfig::None)],
        console: None,
        disks: args.disk,
        cdroms: Vec::new(),
        nics: args.nic,
        watchdog: None,
        node: args.node,
        ram_file: layout.ram(),
    };
    let capture = understudy_protocol::control::Strategy::Auto;
    let generation = understudy_protocol::ids::Generation(1);
    run(RunConfig { machine, layout, arena_mib: None, standby: args.standby, generation, capture, leak: args.leak })
}

/// The smallest kernel by the Linux boot protocol: it halts.
pub fn halting_kernel() -> Vec<u8> {
    kernel(&[0xf4, 0xeb, 0xfd]) // again: hlt; jmp again
}

/// A kernel by the Linux boot protocol: `code` is entered in 64-bit mode, at any address, without a stack.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; (5 * 512 + 0x200 + code.len()).next_multiple_of(16 * 512)];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]); // setup sectors
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x201, &[0x6a]); // the header's end
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version 2.15
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest initrd address
    put(0x230, &0x20_0000u32.to_le_bytes()); // alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1u16.to_le_bytes()); // has the 64-bit entry point
    put(0x238, &2047u32.to_le_bytes()); // longest command line
    put(0x258, &0x100_0000u64.to_le_bytes()); // preferred address
    put(0x260, &0x1_0000u32.to_le_bytes()); // memory that it takes
    put(5 * 512 + 0x200, code);
    image
}

/// One side of the pair; everything it started ends with it.
#[derive(Debug)]
pub struct Side {
    /// Its files.
    pub layout: Layout,
    /// Parent of its run directory.
    pub run_root: PathBuf,
    /// Parent of its shared-memory directory.
    pub shm_root: PathBuf,
    /// The network namespace that its processes start in, if not this process's own.
    pub namespace: Option<String>,
    vmm: Option<Child>,
    replicator: Option<Child>,
}

impl Drop for Side {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Side {
    /// Nothing runs yet; its files go below `dir`.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        let (run_root, shm_root) = (dir.join(name).join("run"), dir.join(name).join("shm"));
        for root in [&run_root, &shm_root] {
            fs::create_dir_all(root).with_context(|| format!("creating {}", root.display()))?;
        }
        let layout = Layout::new(&run_root, &shm_root, MACHINE);
        Ok(Self { layout, run_root, shm_root, namespace: None, vmm: None, replicator: None })
    }

    /// Start its VMM; its log is `dir`/`name`-vmm.log.
    pub fn start_vmm(&mut self, dir: &Path, name: &str, setup: &Setup, standby: bool) -> Result<()> {
        let log = dir.join(format!("{name}-vmm.log"));
        let mut vmm = Command::new(std::env::current_exe()?);
        vmm.arg("flat-vmm").arg(&self.run_root).arg(&self.shm_root);
        vmm.arg("--memory").arg(setup.memory_mib.to_string()).arg("--vcpus").arg(setup.vcpus.to_string());
        match &setup.linux {
            None => vmm.arg("--code").arg(dir.join("code")),
            Some(Linux { kernel, initrd, cmdline }) => {
                vmm.arg("--code").arg(kernel).arg("--initrd").arg(initrd).arg("--cmdline").arg(cmdline)
            }
        };
        if setup.idle {
            vmm.arg("--idle");
        }
        if let Some(serial) = &setup.serial {
            vmm.arg("--serial").arg(serial);
        }
        if let Some(disk) = &setup.disk {
            vmm.arg("--disk").arg(disk.to_string()).arg("--node").arg(name);
        }
        if let Some(nic) = &setup.nic {
            vmm.arg("--nic").arg(nic.to_string());
        }
        if setup.leak {
            vmm.arg("--leak");
        }
        if standby {
            vmm.arg("--standby");
        }
        let vmm = self.at_home(vmm);
        let child = self.vmm.insert(spawn(&vmm, &log)?);
        up("the benchmark's VMM", child, &log, || vmm_status(&self.layout).is_ok())
    }

    /// Start its replicator; its log is `dir`/`name`-replicator.log.
    pub fn start_replicator(&mut self, dir: &Path, name: &str, peers: &str, setup: &Setup) -> Result<()> {
        let log = dir.join(format!("{name}-replicator.log"));
        let mut replicator = Command::new(places::bin_dir()?.join("understudy-replicator"));
        replicator.args(["run", "--machine", MACHINE, "--node", name, "--peers", peers]);
        match &setup.hook {
            Some(hook) => replicator.arg("--hook").arg(hook),
            None => replicator.arg("--no-cluster"),
        };
        replicator.arg("--run-root").arg(&self.run_root).arg("--shm-root").arg(&self.shm_root);
        replicator.arg("--key").arg(dir.join("key")).arg("--interval-ms").arg(setup.interval_ms.to_string());
        replicator.args(&setup.replicator);
        let replicator = self.at_home(replicator);
        let child = self.replicator.insert(spawn(&replicator, &log)?);
        up("the benchmark's replicator", child, &log, || replicator_status(&self.layout).is_ok())
    }

    fn at_home(&self, command: Command) -> Command {
        match &self.namespace {
            Some(namespace) => in_namespace(namespace, &command),
            None => command,
        }
    }

    /// Status of its VMM.
    pub fn vmm(&self) -> Result<VmmStatus> {
        vmm_status(&self.layout)
    }

    /// Any request to its VMM, by its name on the wire: the benchmark also measures releases that do not know it.
    pub fn ask_vmm(&self, request: &Value) -> Result<Value> {
        Ok(call_once(self.layout.vmm_socket(), request, BOUND)?)
    }

    /// Status of its replicator.
    pub fn replicator(&self) -> Result<ReplicatorStatus> {
        replicator_status(&self.layout)
    }

    /// A request to its replicator.
    pub fn ask_replicator<R: serde::de::DeserializeOwned>(&self, request: &ReplicatorRequest) -> Result<R> {
        Ok(call_once(self.layout.replicator_socket(), request, BOUND)?)
    }

    /// Process ids: VMM, replicator.
    pub fn pids(&self) -> Result<(u32, u32)> {
        let pid = |child: &Option<Child>| child.as_ref().map(Child::id).context("a process was not started");
        Ok((pid(&self.vmm)?, pid(&self.replicator)?))
    }

    /// CPU time that both processes have used for replication, s: everything but the vCPUs' own threads.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let (vmm, replicator) = self.pids()?;
        Ok(cpu_seconds(vmm, false)? + cpu_seconds(replicator, false)?)
    }

    /// CPU time of the vCPUs' threads, s.
    pub fn guest_cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(self.pids()?.0, true)
    }

    /// Memory beyond the guest's RAM, KiB: both processes' own, and their files in shared memory but the RAM.
    pub fn memory_beyond_guest_kib(&self) -> Result<f64> {
        let (vmm, replicator) = self.pids()?;
        let own = memory::of(vmm)?.own_kib + memory::of(replicator)?.own_kib;
        let mut files = 0;
        for entry in fs::read_dir(self.layout.shm_dir()).context("reading the shared-memory directory")? {
            let entry = entry.context("reading the shared-memory directory")?;
            if entry.path() != self.layout.ram() {
                files += allocated_kib(&entry.path())?;
            }
        }
        Ok((own + files) as f64)
    }

    /// Kill both processes in one moment, `first` the VMM or else the replicator, and take away what a reboot does.
    pub fn cut_power(&mut self, first: bool) -> Result<()> {
        let (vmm, replicator) = self.pids()?;
        let order = if first { [vmm, replicator] } else { [replicator, vmm] };
        for pid in order {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL).context("cutting the power")?;
        }
        self.kill();
        (self.vmm, self.replicator) = (None, None);
        for root in [&self.run_root, &self.shm_root] {
            fs::remove_dir_all(root)
                .and_then(|()| fs::create_dir_all(root))
                .with_context(|| format!("emptying {}", root.display()))?;
        }
        Ok(())
    }

    /// End its processes at once, as a power cut would.
    pub fn kill(&mut self) {
        for child in [&mut self.replicator, &mut self.vmm].into_iter().filter_map(Option::as_mut) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A process that ends with this value.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Start it, its standard error in `log`.
    pub fn start(command: &Command, log: &Path) -> Result<Self> {
        Ok(Self(spawn(command, log)?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Make a key file.
pub fn keygen(file: &Path) -> Result<()> {
    let made = Command::new(places::bin_dir()?.join("understudy-replicator")).arg("keygen").arg(file).output();
    let made = made.context("starting understudy-replicator")?;
    ensure!(made.status.success(), "making a key failed: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

fn vmm_status(layout: &Layout) -> Result<VmmStatus> {
    Ok(call_once(layout.vmm_socket(), &VmmRequest::Status, BOUND)?)
}

fn replicator_status(layout: &Layout) -> Result<ReplicatorStatus> {
    Ok(call_once(layout.replicator_socket(), &ReplicatorRequest::Status, BOUND)?)
}

/// The same command as a process that ends with this one, however that ends. To be started by the main thread.
pub fn tied(command: &Command) -> Command {
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "SIGKILL"]);
    before(tied, command)
}

/// The same command in a network namespace that has a name, in the same process.
pub fn in_namespace(namespace: &str, command: &Command) -> Command {
    let mut inside = Command::new("nsenter");
    inside.arg(format!("--net=/run/netns/{namespace}"));
    before(inside, command)
}

fn before(mut wrapper: Command, command: &Command) -> Command {
    wrapper.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapper.env(name, value),
            None => wrapper.env_remove(name),
        };
    }
    wrapper
}

fn spawn(command: &Command, log: &Path) -> Result<Child> {
    let mut command = tied(command);
    let log = fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    child.with_context(|| format!("starting {command:?}"))
}

/// Wait until a process answers, and no longer once it has ended.
fn up(what: &str, child: &mut Child, log: &Path, answers: impl Fn() -> bool) -> Result<()> {
    let said = || fs::read_to_string(log).unwrap_or_default().trim().to_owned();
    let up = wait_for(what, BOUND, || match child.try_wait()? {
        Some(status) => Ok(Some(Err(anyhow::anyhow!("{what} ended ({status}): {}", said())))),
        None => Ok(answers().then_some(Ok(()))),
    });
    up.with_context(said)?
}

/// Room that a file, or all files below a directory, take in memory.
fn allocated_kib(path: &Path) -> Result<u64> {
    let meta = fs::symlink_metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(meta.blocks() / 2);
    }
    let entries = fs::read_dir(path).with_context(|| format!("reading {}", path.display()))?;
    entries.flatten().try_fold(0, |sum, entry| Ok(sum + allocated_kib(&entry.path())?))
}

/// Of a process's threads: the vCPUs', or all others.
fn cpu_seconds(pid: u32, vcpus: bool) -> Result<f64> {
    let mut ticks = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/task")).context("reading a process's threads")?.flatten() {
        // A thread may end in between.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        ticks += ticks_of(&stat, vcpus).unwrap_or(0);
    }
    // USER_HZ is 100 on every Linux on x86.
    Ok(ticks as f64 / 100.0)
}

/// utime + stime of a thread's `stat` line; `None` if it is of the other sort.
fn ticks_of(stat: &str, vcpus: bool) -> Option<u64> {
    let (head, rest) = stat.rsplit_once(')')?;
    if head.split_once('(')?.1.starts_with("vcpu") != vcpus {
        return None;
    }
    let mut fields = rest.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// A machine and its standby.
#[derive(Debug)]
pub struct Pair {
    /// The primary.
    pub a: Side,
    /// The standby.
    pub b: Side,
    setup: Setup,
    // Last, so that it outlives the processes.
    _dir: tempfile::TempDir,
}

impl Pair {
    /// Start both; the machine runs, unprotected. `code` is what it runs, except when idle.
    pub fn start(setup: &Setup, code: &[u8]) -> Result<Self> {
        // Guest RAM belongs into a tmpfs.
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let kernel = halting_kernel();
        let code = if setup.idle { kernel.as_slice() } else { code };
        fs::write(dir.path().join("code"), code).context("writing the guest's program")?;
        keygen(&dir.path().join("key"))?;
        let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
        let (mut a, mut b) = (Side::new(dir.path(), "a")?, Side::new(dir.path(), "b")?);
        b.start_vmm(dir.path(), "b", setup, true)?;
        b.start_replicator(dir.path(), "b", &peers, setup)?;
        a.start_vmm(dir.path(), "a", setup, false)?;
        a.start_replicator(dir.path(), "a", &peers, setup)?;
        let state = a.vmm()?.state;
        if state != VmmState::Running {
            bail!("the benchmark's machine is {state:?}");
        }
        Ok(Self { a, b, setup: setup.clone(), _dir: dir })
    }

    /// Begin replication and wait for the end of the first copy.
    pub fn protect(&self) -> Result<()> {
        self.a.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
        // A busy host that encrypts copies some tens of MiB a second.
        let bound = BOUND * 2 + Duration::from_secs(self.setup.memory_mib / 32);
        wait_for("the first copy", bound, || {
            let s = self.a.replicator()?;
            Ok((s.role == Role::Sender && s.protected).then_some(()))
        })
    }

    /// vCPUs of the machine.
    pub fn vcpus(&self) -> u32 {
        self.setup.vcpus
    }

    /// The guest on the primary.
    pub fn guest(&self) -> Result<Guest> {
        Guest::open(&self.a.layout.ram(), self.setup.vcpus)
    }

    /// Choose a capture strategy; false if this release's VMM has no choice of it.
    pub fn choose(&self, strategy: &str) -> bool {
        self.a.ask_vmm(&json!({"cmd": "set-capture", "strategy": strategy})).is_ok()
    }
}

/// A port on which nobody listens.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}

/// Which of these arguments `understudy-replicator run` has.
pub fn replicator_has(argument: &str) -> Result<bool> {
    let help = Command::new(places::bin_dir()?.join("understudy-replicator")).args(["run", "--help"]).output();
    Ok(String::from_utf8_lossy(&help.context("starting understudy-replicator")?.stdout).contains(argument))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_vcpus_is_not_counted_as_replications() {
        let stat = |name: &str| format!("7 ({name}) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0 1 0 100");
        assert_eq!(ticks_of(&stat("main) loop"), false), Some(42));
        assert_eq!((ticks_of(&stat("vcpu1"), false), ticks_of(&stat("vcpu1"), true)), (None, Some(42)));
        assert_eq!(ticks_of("garbage", false), None);
    }

    #[test]
    fn files_are_counted_by_the_room_that_they_take() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("stage")).unwrap();
        fs::File::create(dir.path().join("hole")).unwrap().set_len(1 << 20).unwrap();
        let empty = allocated_kib(dir.path()).unwrap();
        fs::write(dir.path().join("stage/1"), vec![1; 64 << 10]).unwrap();
        assert!((64..1024).contains(&(allocated_kib(dir.path()).unwrap() - empty)));
    }
}
