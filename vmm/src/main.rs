//! `understudy-vmm`: run one machine, and talk to one that runs.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Args, Parser, Subcommand};
use serde::de::DeserializeOwned;
use understudy_protocol::cdrom::CdromSpec;
use understudy_protocol::control::{
    ControlError, MachineShape, PromoteFrom, Strategy, VmmRequest, VmmState, VmmStatus, call_once,
};
use understudy_protocol::disk::DiskSpec;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, DEFAULT_SHM_ROOT, Layout, valid_machine_name};
use understudy_protocol::nic::NicSpec;
use understudy_protocol::watchdog::{WatchdogAction, WatchdogModel, WatchdogSpec, WatchdogState, WatchdogStatus};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::machine::{BootSource, MachineConfig};
use understudy_vmm::run::{self, RunConfig};
use understudy_vmm::save;

/// Run one machine on KVM, and talk to one that runs.
///
/// A machine is named; everything else finds it by its name. `run` stays in the foreground and writes what it has to say to standard
/// error. Without --standby the machine boots at once and its outputs leave at once; with --standby it is built, its vCPUs never
/// start, and it waits to be promoted (by the cluster's agent, or by `promote` and `restore`).
#[derive(Parser)]
#[command(name = "understudy-vmm", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  understudy-vmm run --machine demo --memory 512 --vcpus 2 --kernel /boot/vmlinuz-6.12 --initrd initrd.img \\
                     --cmdline 'console=ttyS0' --serial0 file:/tmp/console
  understudy-vmm status --machine demo
  understudy-vmm power-button --machine demo

Exit codes of run: 0 ended as asked; 1 could not start; 2 wrong usage; 3 fenced, a newer generation runs elsewhere;
  4 KVM could not run the machine any further; 5 the machine has a VMM on this node already.";

#[derive(Args, Clone)]
struct Which {
    /// The machine's name: letters, digits, - and _.
    #[arg(long, value_name = "NAME")]
    machine: String,
    /// Parent of the machine's run directory (socket, pid file, logs).
    #[arg(long, value_name = "DIR", default_value = DEFAULT_RUN_ROOT)]
    run_root: PathBuf,
    /// Parent of the machine's shared-memory directory (RAM, arena); a tmpfs.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_SHM_ROOT)]
    shm_root: PathBuf,
}

impl Which {
    fn layout(&self) -> Result<Layout> {
        ensure!(
            valid_machine_name(&self.machine),
            "\"{}\" is no machine name: use up to 63 letters, digits, - and _, starting with a letter or digit",
            self.machine
        );
        Ok(Layout::new(&self.run_root, &self.shm_root, &self.machine))
    }
}

#[derive(Subcommand)]
enum Command {
    /// Run a machine (or stand by to run it) until it ends.
    Run(Box<Run>),
    /// Show a machine's state.
    Status {
        #[command(flatten)]
        which: Which,
        /// As JSON, one line.
        #[arg(long)]
        json: bool,
    },
    /// Stop a machine's vCPUs and clocks.
    Pause(Which),
    /// Let a paused machine go on.
    Resume(Which),
    /// Press the ACPI power button: the guest is asked to shut down.
    PowerButton(Which),
    /// Let outputs leave without waiting for a standby. Only for a machine that no cluster protects (restored or promoted by hand): its
    /// standby, if there is one, must never run afterwards.
    OpenGate(Which),
    /// Make a standby the running machine by booting it. Its outputs wait: for a replicator, or for open-gate.
    Promote {
        #[command(flatten)]
        which: Which,
        /// Generation under which it runs; boards refuse lower ones than they have seen.
        #[arg(long, default_value_t = 1)]
        generation: u64,
        /// Run from the RAM in place and this device state instead of booting.
        #[arg(long, value_name = "FILE")]
        state: Option<PathBuf>,
    },
    /// Write a machine's RAM and state to a directory; it is paused meanwhile.
    Save {
        #[command(flatten)]
        which: Which,
        /// Directory, created if missing.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Let a standby continue from a directory that `save` wrote. Its outputs wait: for a replicator, or for open-gate.
    Restore {
        #[command(flatten)]
        which: Which,
        /// The directory.
        #[arg(long)]
        dir: PathBuf,
        /// Generation under which it runs.
        #[arg(long, default_value_t = 1)]
        generation: u64,
    },
    /// Choose how checkpoints are captured, from the next one on, while the machine runs.
    ///
    /// stop: pages are copied while the guest stands still. lock: they are write-protected, the guest runs on, a write to one traps
    /// until its old content is copied. validate: they are copied while the guest runs on, and a copy counts only if the page was not
    /// written meanwhile. auto (the default): chosen at every cut from costs that are measured on this host.
    Capture {
        #[command(flatten)]
        which: Which,
        /// stop, lock, validate or auto.
        strategy: Strategy,
    },
    /// Let the vCPUs run only for a share of the time.
    Throttle {
        #[command(flatten)]
        which: Which,
        /// Share, percent, 1 to 100; 100 ends the throttling.
        #[arg(value_parser = clap::value_parser!(u8).range(1..=100))]
        percent: u8,
    },
    /// Enlarge a disk while the machine runs. The guest is told; what is on the disk stays as it is.
    Resize {
        #[command(flatten)]
        which: Which,
        /// The disk's name.
        disk: String,
        /// Its new size: bytes, or with K, M, G or T (multiples of 1024), e.g. 20G. Not smaller than it is.
        #[arg(value_parser = size)]
        size: u64,
    },
    /// Take the medium out of a CD-ROM drive. Refused while the guest has locked the drive; then the guest is asked to let it go.
    Eject {
        #[command(flatten)]
        which: Which,
        /// The drive's name.
        drive: String,
        /// Also when the guest has locked it: as with a paper clip.
        #[arg(long)]
        force: bool,
    },
    /// Put a medium into a CD-ROM drive, instead of what lies in it. The standby finds the same file, or the drive is empty after a takeover.
    Insert {
        #[command(flatten)]
        which: Which,
        /// The drive's name.
        drive: String,
        /// An ISO image.
        file: PathBuf,
        /// Also when the guest has locked the drive.
        #[arg(long)]
        force: bool,
    },
    /// Build a machine of the given shape, connected to nothing, that waits to run from an image: what a drill runs.
    ///
    /// It ends when its standard input is closed, and with exit code 6 when its guest resets or switches itself off.
    StandIn {
        #[command(flatten)]
        which: Which,
        /// Guest RAM in MiB.
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..))]
        memory: u64,
        /// Number of vCPUs.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
        vcpus: u32,
        /// Number of serial ports.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4))]
        serial_ports: u32,
        /// With a virtio console.
        #[arg(long)]
        console: bool,
        /// A network card, as run's --nic, with nothing behind it: none, or none=offloads.
        #[arg(long, value_name = "NIC")]
        nic: Vec<NicSpec>,
        /// With this watchdog: i6300esb.
        #[arg(long, value_name = "MODEL")]
        watchdog: Option<WatchdogModel>,
    },
    /// End a machine at once, without asking the guest.
    Quit(Which),
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    which: Which,
    /// Guest RAM in MiB.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..))]
    memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    vcpus: u32,
    /// Linux kernel (bzImage).
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0")]
    cmdline: String,
    /// COM1: board:HOST:PORT/DEVICE,key=FILE | file:PATH | pty | none.
    #[arg(long, value_name = "BACKEND", default_value = "none")]
    serial0: BackendConfig,
    /// COM2, as --serial0. Without it there is no COM2.
    #[arg(long, value_name = "BACKEND")]
    serial1: Option<BackendConfig>,
    /// Virtio console: file:PATH.
    #[arg(long, value_name = "BACKEND")]
    console: Option<BackendConfig>,
    /// A disk, as often as there are disks: name=NAME,file=PATH|iscsi://HOST[:PORT]/TARGET/LUN,format=raw|qcow2[,bus=virtio|scsi][,slices=DIR][,mode=mirrored][,queues=N][,cache=none|writeback]
    /// [,aio=auto|io_uring|threads][,chap=FILE][,readonly]. NAME is what status and guest call
    /// it, DIR (default: PATH.row) is where writes wait until their checkpoint is committed; both must be the same files on every node.
    #[arg(long, value_name = "DISK")]
    disk: Vec<DiskSpec>,
    /// A CD-ROM drive, as often as there are drives: name=NAME[,file=ISO][,bus=scsi]. ISO is what lies in it when the machine is switched on; the same
    /// file on every node.
    #[arg(long, value_name = "DRIVE")]
    cdrom: Vec<CdromSpec>,
    /// A network card, as often as there are cards: name=NAME,tap=INTERFACE[,bridge=BRIDGE]|macvtap=INTERFACE|stream=PATH|dgram=PATH:PATH[,mac=ADDRESS][,queues=N]
    /// [,mtu=N][,hold=BYTES][,at-bound=wait|drop]. A tap that is not there is made. Without mac the address follows from the machine's and the card's names.
    /// At most hold bytes of packets wait for their checkpoint; then the guest waits, or packets are dropped.
    #[arg(long, value_name = "NIC")]
    nic: Vec<NicSpec>,
    /// A watchdog, which the guest arms and feeds: i6300esb. What becomes of it is in the status.
    #[arg(long, value_name = "MODEL")]
    watchdog: Option<WatchdogModel>,
    /// What follows when the guest has armed its watchdog and does not feed it: report (it stands in the status, and nothing else happens), reset (the
    /// machine is reset where it is) or off (it is switched off).
    #[arg(long, value_name = "ACTION", default_value_t, requires = "watchdog")]
    watchdog_action: WatchdogAction,
    /// This node's name in the cluster: it stands in the records of whose the disks are [default: the host's name].
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Build the machine and wait for a promotion.
    #[arg(long)]
    standby: bool,
    /// Generation that the machine boots as: higher than any before, or boards refuse it.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "standby", value_parser = clap::value_parser!(u64).range(1..))]
    generation: u64,
    /// Size of the capture arena in MiB [default: a quarter of RAM, at least 64].
    #[arg(long, value_name = "MIB")]
    arena: Option<u64>,
    /// How checkpoints are captured: stop, lock, validate or auto (see the command capture).
    #[arg(long, value_name = "STRATEGY", default_value = "auto")]
    capture: Strategy,
}

fn main() -> ExitCode {
    let code = match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            if e.downcast_ref::<run::RunsAlready>().is_some() { run::EXIT_RUNS_ALREADY } else { run::EXIT_CANNOT_START }
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn dispatch(command: Command) -> Result<i32> {
    // Saving writes all of RAM; everything else is quick.
    const QUICK: Duration = Duration::from_secs(10);
    const SLOW: Duration = Duration::from_secs(600);
    match command {
        Command::Run(run) => return start(*run),
        Command::StandIn { which, memory, vcpus, serial_ports, console, nic, watchdog } => {
            let shape = MachineShape {
                memory_mib: memory,
                vcpus,
                serial_ports,
                console,
                disks: Vec::new(),
                cdroms: Vec::new(),
                nics: understudy_vmm::net::shapes(&which.machine, &nic),
                watchdog,
            };
            return run::stand_in(&which.machine, &shape, which.layout()?);
        }
        Command::Status { which, json } => {
            let status: VmmStatus = call(&which.layout()?, &VmmRequest::Status, QUICK)?;
            if json {
                println!("{}", serde_json::to_string(&status).context("cannot write the status")?);
            } else {
                print!("{}", readable(&status));
            }
        }
        Command::Pause(which) => ask(&which, &VmmRequest::Pause, QUICK)?,
        Command::Resume(which) => ask(&which, &VmmRequest::Resume, QUICK)?,
        Command::OpenGate(which) => ask(&which, &VmmRequest::GateOpen, QUICK)?,
        Command::Capture { which, strategy } => ask(&which, &VmmRequest::SetCapture { strategy }, QUICK)?,
        Command::Throttle { which, percent } => ask(&which, &VmmRequest::Throttle { percent }, QUICK)?,
        Command::Resize { which, disk, size } => ask(&which, &VmmRequest::ResizeDisk { disk, bytes: size }, SLOW)?,
        Command::Eject { which, drive, force } => ask(&which, &VmmRequest::Eject { drive, force }, SLOW)?,
        Command::Insert { which, drive, file, force } => {
            let file = absolute(&file)?;
            ask(&which, &VmmRequest::Insert { drive, file, force }, SLOW)?;
        }
        Command::PowerButton(which) => ask(&which, &VmmRequest::PowerButton, QUICK)?,
        Command::Quit(which) => ask(&which, &VmmRequest::Quit, QUICK)?,
        Command::Promote { which, generation, state } => {
            let from = match state {
                None => PromoteFrom::ColdBoot,
                Some(file) => PromoteFrom::Image { state_file: absolute(&file)?, epoch: Epoch::ZERO },
            };
            ask(&which, &VmmRequest::Promote { generation: Generation(generation), from }, QUICK)?;
        }
        Command::Save { which, dir } => ask(&which, &VmmRequest::Save { dir: absolute(&dir)? }, SLOW)?,
        Command::Restore { which, dir, generation } => {
            let layout = which.layout()?;
            let status: VmmStatus = call(&layout, &VmmRequest::Status, QUICK)?;
            ensure!(
                status.state == VmmState::Standby,
                "only a standby can be restored into; start one with: understudy-vmm run --standby …"
            );
            save::restore_ram(&dir, &layout.ram())?;
            let from = PromoteFrom::Image { state_file: absolute(&dir.join(save::STATE))?, epoch: Epoch::ZERO };
            ask(&which, &VmmRequest::Promote { generation: Generation(generation), from }, SLOW)?;
        }
    }
    Ok(0)
}

/// A size as people write it.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        unit => return Err(format!("{unit:?} is no unit; there are K, M, G and T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no size"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is too large"))
}

/// The VMM has a working directory of its own.
fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("cannot make {} absolute", path.display()))?;
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not valid UTF-8", path.display()))
}

fn ask(which: &Which, request: &VmmRequest, timeout: Duration) -> Result<()> {
    call(&which.layout()?, request, timeout)
}

/// One request to the machine's VMM.
fn call<R: DeserializeOwned>(layout: &Layout, request: &VmmRequest, timeout: Duration) -> Result<R> {
    call_once(layout.vmm_socket(), request, timeout).map_err(|e| match &e {
        ControlError::Io { socket, source } if source.kind() == ErrorKind::NotFound => {
            anyhow!("no VMM of this machine runs on this node ({socket} does not exist)")
        }
        ControlError::Io { socket, source } if source.kind() == ErrorKind::ConnectionRefused => {
            anyhow!("the VMM of this machine has died (nobody listens on {socket})")
        }
        // Its sentence names its cause already.
        other => anyhow!("{other}"),
    })
}

fn start(run: Run) -> Result<i32> {
    let layout = run.which.layout()?;
    let mut serial = vec![run.serial0];
    serial.extend(run.serial1);
    let machine = MachineConfig {
        name: run.which.machine.clone(),
        memory_mib: run.memory,
        vcpus: run.vcpus,
        boot: BootSource::Linux { kernel: run.kernel, initrd: run.initrd, cmdline: run.cmdline },
        serial,
        console: run.console,
        disks: run.disk,
        cdroms: run.cdrom,
        nics: run.nic,
        watchdog: run.watchdog.map(|model| WatchdogSpec { model, action: run.watchdog_action }),
        node: run.node.map_or_else(hostname, Ok)?,
        ram_file: layout.ram(),
    };
    run::run(RunConfig {
        machine,
        layout,
        arena_mib: run.arena,
        standby: run.standby,
        generation: Generation(run.generation),
        capture: run.capture,
        leak: false,
    })
}

fn hostname() -> Result<String> {
    let name = nix::unistd::gethostname().context("cannot tell the host's name; give --node")?;
    name.into_string().map_err(|_| anyhow!("the host's name is not valid UTF-8; give --node"))
}

fn watched(w: &WatchdogStatus) -> String {
    let seconds = |ms: Option<u64>| ms.unwrap_or(0) as f64 / 1e3;
    let state = match w.state {
        WatchdogState::NotArmed => "not armed by the guest".into(),
        WatchdogState::Fed => {
            format!("fed {:.1} s ago, expires after {:.1} s", seconds(w.fed_ms_ago), seconds(w.timeout_ms))
        }
        WatchdogState::Expired => format!("EXPIRED {:.1} s ago: the guest hangs", seconds(w.expired_ms_ago)),
    };
    format!("{state} (then: {}); expired {} times", w.action, w.expirations)
}

fn readable(s: &VmmStatus) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let ms = |ns: u64| ns as f64 / 1e6;
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{}: {:?}, generation {}, gate {:?}", s.machine, s.state, s.generation, s.gate);
    let _ = writeln!(
        out,
        "  {} vCPUs, {} MiB RAM, {}, ran {:.3} s, {} resets",
        s.vcpus,
        s.ram_bytes >> 20,
        s.kvm_backend,
        ms(s.vm_time_ns) / 1e3,
        s.resets
    );
    if s.replicated {
        let _ = writeln!(out, "  replicated: cut {}, committed {}", s.last_cut, s.last_committed);
    }
    if !s.recent_pauses_us.is_empty() {
        let mut p = s.recent_pauses_us.clone();
        p.sort_unstable();
        let at = |q: usize| p[(p.len() - 1) * q / 100];
        let _ =
            writeln!(out, "  pauses: p50 {} µs, p99 {} µs, max {} µs ({} newest)", at(50), at(99), at(100), p.len());
    }
    if s.replicated {
        let c = &s.capture;
        let _ = writeln!(out, "  capture: {}; last cut: {}", c.strategy, c.choice);
        let _ = writeln!(
            out,
            "    {} pages in the last cut, {} copied while it stood still ({} stay writable), {} copied before; {} of {} cuts repeated",
            c.pages, c.stopped_pages, c.hot_pages, c.early_pages, c.repeated, c.cuts
        );
        let _ = writeln!(
            out,
            "    costs here: fault {} ns, copy {} ns, protect {} ns a page; stop {} µs, state {} µs, locked page's fault {} µs",
            c.fault_ns,
            c.copy_ns,
            c.protect_ns,
            c.kick_ns / 1000,
            c.state_ns / 1000,
            c.lock_fault_ns / 1000
        );
    }
    if s.capture.throttle_percent < 100 {
        let _ = writeln!(out, "  throttled: the vCPUs run {} % of the time", s.capture.throttle_percent);
    }
    if let Some(watchdog) = &s.watchdog {
        let _ = writeln!(out, "  watchdog {}: {}", watchdog.model, watched(watchdog));
    }
    for p in &s.serial {
        let _ = writeln!(
            out,
            "  {}: {} ({}), out {} (acknowledged {}, held {}), in {}",
            p.port, p.backend, p.link, p.tx_bytes, p.tx_acked, p.tx_held, p.rx_bytes
        );
    }
    for d in &s.disks {
        let _ = writeln!(
            out,
            "  disk {}: {} ({} MiB), {}, {} requests under way, {} KiB to merge",
            d.name,
            d.file,
            d.size_bytes >> 20,
            d.mode,
            d.in_flight,
            d.backlog_bytes >> 10
        );
        let how = [&d.io, &d.fence].into_iter().filter(|text| !text.is_empty());
        for text in how.chain(&d.problem) {
            let _ = writeln!(out, "    {text}");
        }
    }
    for n in &s.nics {
        let _ = writeln!(
            out,
            "  nic {}: {}, {}, {}, out {} packets ({} KiB), in {} ({} KiB), {} held ({} of {} KiB), bound reached {} times",
            n.name,
            n.mac,
            n.backend,
            n.link,
            n.out_packets,
            n.out_bytes >> 10,
            n.in_packets,
            n.in_bytes >> 10,
            n.held_packets,
            n.held_bytes >> 10,
            n.held_limit >> 10,
            n.bound_reached
        );
        if n.held_us.count > 0 {
            let [half, most] = [0.5, 0.99].map(|rank| n.held_us.quantile(rank));
            let (all, packets) = (n.held_us.max, n.held_us.count);
            let _ = writeln!(
                out,
                "    waited for their checkpoint: {packets} packets, half of them up to {half} µs, 99 of 100 up to {most} µs, all up to {all} µs"
            );
        }
        if !n.dropped.is_empty() {
            let dropped: Vec<_> = n.dropped.iter().map(|(why, packets)| format!("{packets} {why}")).collect();
            let _ = writeln!(out, "    dropped: {}", dropped.join(", "));
        }
        if let Some(problem) = &n.problem {
            let _ = writeln!(out, "    {problem}");
        }
    }
    for c in &s.cdroms {
        let holds = c.file.as_ref().map_or("empty".into(), |file| format!("{file} ({} MiB)", c.size_bytes >> 20));
        let tray = if c.open { ", tray open" } else { "" };
        let _ =
            writeln!(out, "  cdrom {}: {holds}{tray}{}", c.name, if c.locked { ", locked by the guest" } else { "" });
        if let Some(problem) = &c.problem {
            let _ = writeln!(out, "    {problem}");
        }
    }
    out
}
