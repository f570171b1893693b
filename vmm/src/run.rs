//! The process of one machine: its files, its control socket, and the supervisor that acts on what the machine and people ask for.
//!
//! Files (see [`Layout`]): a lock that a second `run` meets, the pid file and the socket (removed at a clean end; a pid file without a
//! process means a crash), the RAM and the arena (left behind: they outlive the process on purpose).

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use understudy_protocol::control::{Gate, MachineShape, PromoteFrom, Strategy, VmmState};
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::Layout;
use understudy_protocol::nic::NicSpec;
use understudy_protocol::watchdog::{WatchdogAction, WatchdogSpec};

use crate::backend::BackendConfig;
use crate::control;
use crate::core::Event;
use crate::machine::{BootSource, Machine, MachineConfig};
use crate::memory::Arena;
use crate::net::nic::Nic;

/// Exit code: the machine could not be built or started.
pub const EXIT_CANNOT_START: i32 = 1;
/// Exit code: a newer generation runs elsewhere.
pub const EXIT_FENCED: i32 = 3;
/// Exit code: KVM could not run the machine any further.
pub const EXIT_BROKEN: i32 = 4;
/// Exit code: this machine runs already on this node.
pub const EXIT_RUNS_ALREADY: i32 = 5;

/// What `run` is given.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The machine.
    pub machine: MachineConfig,
    /// Its files.
    pub layout: Layout,
    /// Arena size in MiB; `None`: a quarter of RAM, at least 64.
    pub arena_mib: Option<u64>,
    /// Wait for a promotion instead of booting.
    pub standby: bool,
    /// The generation that it boots as.
    pub generation: Generation,
    /// How checkpoints are captured.
    pub capture: Strategy,
    /// Packets do not wait for their commit: for the negative control of tests ([`crate::net::nic::Nic::leak`]).
    pub leak: bool,
}

/// Exit code: the guest of a stand-in reset itself or switched itself off.
pub const EXIT_GUEST_ENDED: i32 = 6;

/// What becomes of the process when the guest wants something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It runs, or stands by to run.
    Machine { standby: bool },
    /// It only shows whether an image lives: a guest that resets itself does not.
    StandIn,
}

/// This machine has a process on this node already.
#[derive(Debug, thiserror::Error)]
#[error(
    "machine {machine} has a VMM on this node already ({lock} is locked); end it with: understudy-vmm quit --machine {machine}"
)]
pub struct RunsAlready {
    machine: String,
    lock: String,
}

/// Removes what must not outlive a clean end.
struct Cleanup {
    files: Vec<PathBuf>,
    keep: bool,
}
impl Drop for Cleanup {
    fn drop(&mut self) {
        if !self.keep {
            for file in &self.files {
                let _ = fs::remove_file(file);
            }
        }
    }
}

/// Run a machine until its end; the result is the process's exit code.
pub fn run(config: RunConfig) -> Result<i32> {
    let way = Way::Machine { standby: config.standby };
    run_as(config, way)
}

/// A machine of the given shape (and without disks) that waits to run from an image, connected to nothing: whatever it puts out vanishes. It ends with the
/// first thing that its guest asks for, and when its standard input is closed, so that it does not outlive whoever started it.
pub fn stand_in(name: &str, shape: &MachineShape, layout: Layout) -> Result<i32> {
    let machine = MachineConfig {
        name: name.to_owned(),
        memory_mib: shape.memory_mib,
        vcpus: shape.vcpus,
        // It never boots.
        boot: BootSource::Flat { code: Vec::new(), at: 0 },
        serial: vec![BackendConfig::None; shape.serial_ports as usize],
        console: shape.console.then_some(BackendConfig::None),
        disks: Vec::new(),
        cdroms: Vec::new(),
        nics: shape.nics.iter().map(NicSpec::disconnected).collect(),
        // Whether its guest hangs is for others to say.
        watchdog: shape.watchdog.map(|model| WatchdogSpec { model, action: WatchdogAction::Report }),
        node: String::new(),
        ram_file: layout.ram(),
    };
    // The arena holds no more than a dirty log: a bit a page.
    let arena_mib = Some(shape.memory_mib / (8 * 4096) + 1);
    let generation = Generation::ZERO;
    run_as(
        RunConfig { machine, layout, arena_mib, standby: true, generation, capture: Strategy::Auto, leak: false },
        Way::StandIn,
    )
}

fn run_as(config: RunConfig, way: Way) -> Result<i32> {
    let layout = &config.layout;
    for dir in [layout.run_dir(), layout.shm_dir()] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot create the directory {}", dir.display()))?;
    }
    let _lock = lock(layout, &config.machine.name)?;
    let (events, inbox) = channel();
    on_signals(events.clone())?;
    if way == Way::StandIn {
        on_closed_input(events.clone())?;
    }
    let mib = config.arena_mib.unwrap_or((config.machine.memory_mib / 4).max(64));
    let machine = Arc::new(Machine::build(config.machine.clone(), events)?);
    machine.capturing().strategy = config.capture;
    if config.leak {
        machine.core.hardware().nics.iter_mut().for_each(Nic::leak);
    }
    let arena = Arena::open(&layout.arena(), mib.saturating_mul(1 << 20))?;

    let mut cleanup = Cleanup { files: vec![layout.vmm_pid(), layout.vmm_socket()], keep: false };
    write_pid(&layout.vmm_pid())?;
    if !config.standby {
        machine.promote(config.generation, &PromoteFrom::ColdBoot, Gate::Open)?;
    }
    control::serve(layout.vmm_socket(), machine.clone(), Arc::new(Mutex::new(arena)))?;
    eprintln!(
        "machine {}: {} vCPUs, {} MiB, {}",
        config.machine.name,
        config.machine.vcpus,
        config.machine.memory_mib,
        if config.standby { "standing by" } else { "running" }
    );
    let code = supervise(&machine, &inbox, way);
    if code == EXIT_BROKEN {
        // For whoever monitors it: this was no clean end.
        cleanup.keep = true;
    }
    machine.halt();
    Ok(code)
}

/// Act on events until one of them ends the process. What the guest asks for is done on a thread of its own, because it may have to wait
/// for the end of a cut, and fencing must not.
fn supervise(machine: &Arc<Machine>, inbox: &Receiver<Event>, way: Way) -> i32 {
    let standby = way != Way::Machine { standby: false };
    let (wishes, granted) = channel::<Event>();
    let worker = {
        let machine = machine.clone();
        std::thread::Builder::new().name("supervisor".into()).spawn(move || {
            for wish in granted {
                grant(&machine, &wish, standby);
            }
        })
    };
    if let Err(e) = worker {
        eprintln!("error: cannot start the supervisor's thread: {e}");
        return EXIT_BROKEN;
    }
    while let Ok(event) = inbox.recv() {
        match event {
            Event::Reset | Event::PowerOff if way == Way::StandIn => {
                let what = if event == Event::Reset { "reset the machine" } else { "switched the machine off" };
                eprintln!("error: the guest has {what}");
                return EXIT_GUEST_ENDED;
            }
            Event::Reset | Event::PowerOff => {
                let _ = wishes.send(event);
            }
            Event::Fenced(newer) if machine.life().state == VmmState::HandedOver => {
                eprintln!("the boards belong to generation {newer} now, to which this machine was handed over");
            }
            Event::Fenced(newer) => {
                machine.fence();
                eprintln!("error: generation {newer} of this machine runs elsewhere; this one has been stopped");
                return EXIT_FENCED;
            }
            Event::Broken(why) => {
                eprintln!("error: the machine cannot run any further: {why}");
                return EXIT_BROKEN;
            }
            Event::Quit | Event::Ended => return 0,
        }
    }
    0
}

fn grant(machine: &Machine, wish: &Event, standby: bool) {
    let result = match wish {
        Event::Reset => {
            eprintln!("the machine is reset");
            machine.reset()
        }
        _ => {
            eprintln!("the machine is switched off");
            machine.shut_down()
        }
    };
    match result {
        Err(e) => machine.core.tell(Event::Broken(format!("{e:#}"))),
        Ok(()) if *wish == Event::PowerOff && !standby => {
            drain(machine);
            machine.core.tell(Event::Ended);
        }
        Ok(()) => {}
    }
}

/// Give the last output a little time to arrive.
fn drain(machine: &Machine) {
    let until = Instant::now() + Duration::from_secs(2);
    while !machine.drained() && Instant::now() < until {
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

fn lock(layout: &Layout, machine: &str) -> Result<Flock<File>> {
    let path = layout.run_dir().join("vmm.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot create the lock {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            Err(RunsAlready { machine: machine.into(), lock: path.display().to_string() }.into())
        }
        Err((_, e)) => bail!("cannot lock {}: {e}", path.display()),
    }
}

fn write_pid(path: &Path) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let temporary = path.with_extension("pid.new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o644).open(&temporary)?;
        writeln!(file, "{}", std::process::id())?;
        fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write the pid file {}", path.display()))
}

/// The end of standard input ends the process cleanly.
fn on_closed_input(events: Sender<Event>) -> Result<()> {
    let wait = move || {
        // Nothing is ever said there; an error is as good as an end.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = events.send(Event::Quit);
    };
    std::thread::Builder::new()
        .name("input".into())
        .spawn(wait)
        .context("cannot start the thread that watches the input")?;
    Ok(())
}

/// SIGTERM, SIGINT and SIGHUP end the process cleanly.
fn on_signals(events: Sender<Event>) -> Result<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    // Blocked in all threads that are started from here on; one waits for them.
    set.thread_block().context("cannot block signals")?;
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            while let Ok(signal) = set.wait() {
                eprintln!("{signal}: the machine ends");
                let _ = events.send(Event::Quit);
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}
