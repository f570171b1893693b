//! Drill: the standby's image is tried out, while protection goes on.
//!
//! ```text
//!  replicator ──CopyImage──► SHM_ROOT/.drill-M/{ram,state}      one committed epoch ([`crate::snapshot`])
//!  standby VMM ──Shape─────► understudy-vmm stand-in            same vCPUs, RAM and devices, connected to nothing
//!                            promote from the copy, watch for some seconds ([`verdict`]), quit
//!                            SHM_ROOT/.drill-M is removed
//! ```
//! What must hold:
//! * Nothing of the machine is touched: its directories, sockets, RAM, image and boards, and the cluster's idea of it, are those of the
//!   processes that protect it. The stand-in has directories of its own and not one backend.
//! * Nothing is left behind: the directory goes when the drill ends, however it ends; the stand-in ends with the drill's end of its
//!   standard input, so even a drill that is killed leaves only a directory, which the next one removes.
//! * The node is not put at risk: a drill that does not fit into the tmpfs and the memory that is available does not begin.

pub mod verdict;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use understudy_protocol::control::{
    Attached, ControlClient, CopiedImage, Harvested, MachineShape, PromoteFrom, ReplicatorRequest, VmmRequest,
    call_once,
};
use understudy_protocol::layout::Layout;
use understudy_protocol::nic::NicSpec;

use self::verdict::{End, Look, Report, judge};
use crate::snapshot;

/// The stand-in's name: it needs none of the machine's.
const NAME: &str = "drill";
/// A request to a VMM takes at most so long.
const PATIENCE: Duration = Duration::from_secs(20);
/// Copying an image takes as long as memory takes; this is for one that hangs.
const COPY_PATIENCE: Duration = Duration::from_secs(900);
/// From one look at the guest to the next. Often, because a vCPU in a short loop is at the same place every other time.
const LOOK: Duration = Duration::from_millis(100);
/// Room that is left to others, beside the copy.
const SPARE: u64 = 64 << 20;

/// What a drill is told.
#[derive(Debug)]
pub struct Drill<'a> {
    /// The machine.
    pub machine: &'a str,
    /// Its files here.
    pub layout: Layout,
    /// The tmpfs that its image is in; the copy goes there too.
    pub shm_root: PathBuf,
    /// `understudy-vmm`.
    pub vmm: PathBuf,
    /// How long the guest is watched.
    pub watch: Duration,
    /// Set it and the drill ends soon, cleaning up.
    pub stop: &'a AtomicBool,
}

/// Hold the drill. `Ok` is its result, good or bad; an error says why it could not be held.
pub fn hold(drill: &Drill<'_>) -> Result<Report, String> {
    let socket = drill.layout.vmm_socket();
    let shape: MachineShape = call_once(&socket, &VmmRequest::Shape, PATIENCE)
        .map_err(|e| format!("the standby's VMM does not say what the machine is like: {e}"))?;
    if !shape.disks.is_empty() || !shape.cdroms.is_empty() {
        return Err("the machine has disks or CD-ROM drives, and a drill of such a machine is not possible yet: its stand-in must not write to them".into());
    }
    let bytes = shape.memory_mib << 20;
    let place = Place::make(&drill.shm_root, drill.machine)?;
    check_room("a drill", &drill.shm_root, bytes)?;
    let files = place.layout();
    let request = ReplicatorRequest::CopyImage { dir: text(files.shm_dir())? };
    let copied: CopiedImage = call_once(drill.layout.replicator_socket(), &request, COPY_PATIENCE)
        .map_err(|e| format!("the image cannot be copied: {e}"))?;
    let mut stand_in = StandIn::start(&drill.vmm, &place, &shape)?;
    let mut looks = Vec::new();
    let mut promote_ms = 0;
    let end = match run(drill, &files, &mut stand_in, copied, &mut looks, &mut promote_ms) {
        Ok(()) => End::Watched,
        Err(Broken::Stopped) => return Err("the drill was interrupted; nothing of it is left".into()),
        Err(Broken::Died(why)) => End::Died(why),
    };
    stand_in.end(&files);
    Ok(judge(drill.machine, copied, promote_ms, &looks, end))
}

/// Why watching ended early.
enum Broken {
    Stopped,
    Died(String),
}

fn run(
    drill: &Drill<'_>,
    files: &Layout,
    stand_in: &mut StandIn,
    copied: CopiedImage,
    looks: &mut Vec<Look>,
    promote_ms: &mut u64,
) -> Result<(), Broken> {
    let mut vmm = stand_in.connect(files, drill.stop)?;
    let began = Instant::now();
    let state_file = text(&files.shm_dir().join(snapshot::STATE)).map_err(Broken::Died)?;
    let from = PromoteFrom::Image { state_file, epoch: copied.epoch };
    let mut call = |request: &VmmRequest, what: &str| {
        vmm.call::<_, ()>(request).map_err(|e| Broken::Died(stand_in.last_words(&format!("{what}: {e}"))))
    };
    call(&VmmRequest::Promote { generation: copied.generation, from }, "the machine cannot be started from the copy")?;
    *promote_ms = began.elapsed().as_millis() as u64;
    let lost = |e: understudy_protocol::control::ControlError| format!("its VMM cannot be asked any more: {e}");
    // A session of its own: for the record of written pages, and to let outputs run into the void.
    let _: Attached = vmm.call(&VmmRequest::Attach).map_err(|e| Broken::Died(stand_in.last_words(&lost(e))))?;
    for request in [VmmRequest::DirtyLogStart, VmmRequest::GateOpen] {
        vmm.call::<_, ()>(&request).map_err(|e| Broken::Died(stand_in.last_words(&lost(e))))?;
    }
    let until = Instant::now() + drill.watch;
    loop {
        let mut look = || {
            let dirty = vmm.call::<_, Harvested>(&VmmRequest::Harvest)?.dirty_pages;
            let positions = vmm.call(&VmmRequest::Positions)?;
            Ok(Look { status: vmm.call(&VmmRequest::Status)?, positions, dirty })
        };
        match look() {
            Ok(look) => looks.push(look),
            Err(e) => return Err(Broken::Died(stand_in.last_words(&lost(e)))),
        }
        let now = Instant::now();
        if now >= until && looks.len() > 1 {
            return Ok(());
        }
        pause(LOOK.min(until.saturating_duration_since(now)).max(Duration::from_millis(20)), drill.stop)?;
    }
}

/// Let time pass, unless the drill is to stop.
fn pause(time: Duration, stop: &AtomicBool) -> Result<(), Broken> {
    let until = Instant::now() + time;
    loop {
        if stop.load(Ordering::SeqCst) {
            return Err(Broken::Stopped);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(Duration::from_millis(50)));
    }
}

/// The drill's own directory.
struct Place {
    dir: PathBuf,
    /// Held as long as the drill lasts.
    _lock: Flock<File>,
}

impl Place {
    fn make(shm_root: &Path, machine: &str) -> Result<Self, String> {
        // No machine's name begins with a dot.
        let dir = shm_root.join(format!(".drill-{machine}"));
        let cannot = |what: &str, e: io::Error| format!("cannot {what} the drill's directory {}: {e}", dir.display());
        loop {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(|e| cannot("create", e))?;
            let path = dir.join("lock");
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
            let file = file.map_err(|e| cannot("lock", e))?;
            let made = file.metadata().map_err(|e| cannot("lock", e))?.ino();
            let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
                format!("a drill of {machine} is under way on this node ({} is locked)", path.display())
            })?;
            if fs::metadata(&path).map(|m| m.ino()).ok() != Some(made) {
                // It went with the end of another drill in this moment.
                continue;
            }
            let place = Self { dir: dir.clone(), _lock: lock };
            for name in ["run", "shm"] {
                // What a killed drill has left.
                let _ = fs::remove_dir_all(dir.join(name));
            }
            let shm = place.layout().shm_dir().to_owned();
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&shm).map_err(|e| cannot("create", e))?;
            return Ok(place);
        }
    }

    fn run_root(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn shm_root(&self) -> PathBuf {
        self.dir.join("shm")
    }

    fn layout(&self) -> Layout {
        Layout::new(self.run_root(), self.shm_root(), NAME)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.dir) {
            eprintln!("warning: {} cannot be removed: {e}", self.dir.display());
        }
    }
}

/// Refuse what does not fit: a full tmpfs would stop the replicator, and missing memory could cost the node.
pub(crate) fn check_room(what: &str, shm_root: &Path, bytes: u64) -> Result<(), String> {
    let stat = statvfs(shm_root).map_err(|e| format!("cannot look at {}: {e}", shm_root.display()))?;
    let free = stat.blocks_available() * stat.fragment_size();
    let mib = |bytes: u64| bytes >> 20;
    if free < bytes + SPARE {
        return Err(format!(
            "{what} needs {} MiB in {}, which has {} MiB free: make that file system larger",
            mib(bytes + SPARE),
            shm_root.display(),
            mib(free)
        ));
    }
    let available = available_memory().map_err(|e| format!("cannot read /proc/meminfo: {e}"))?;
    if available < bytes + SPARE {
        return Err(format!(
            "{what} needs {} MiB of memory, and {} MiB are available on this node",
            mib(bytes + SPARE),
            mib(available)
        ));
    }
    Ok(())
}

fn available_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other("it has no MemAvailable"))
}

/// The VMM of the copy. Its standard input is its life line.
struct StandIn {
    child: Child,
    log: PathBuf,
}

impl StandIn {
    fn start(program: &Path, place: &Place, shape: &MachineShape) -> Result<Self, String> {
        let log = place.dir.join("log");
        let file = File::create(&log).map_err(|e| format!("cannot create {}: {e}", log.display()))?;
        let mut command = Command::new(program);
        command.args(["stand-in", "--machine", NAME, "--memory", &shape.memory_mib.to_string()]);
        command.args(["--vcpus", &shape.vcpus.to_string(), "--serial-ports", &shape.serial_ports.to_string()]);
        for nic in &shape.nics {
            command.args(["--nic", &NicSpec::disconnected(nic).to_string()]);
        }
        if let Some(watchdog) = shape.watchdog {
            command.args(["--watchdog", watchdog.name()]);
        }
        if shape.console {
            command.arg("--console");
        }
        command.arg("--run-root").arg(place.run_root()).arg("--shm-root").arg(place.shm_root());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(file);
        let child = command.spawn().map_err(|e| format!("cannot start {}: {e}", program.display()))?;
        Ok(Self { child, log })
    }

    fn connect(&mut self, files: &Layout, stop: &AtomicBool) -> Result<ControlClient, Broken> {
        let until = Instant::now() + PATIENCE;
        loop {
            match ControlClient::connect(files.vmm_socket(), PATIENCE) {
                Ok(client) => return Ok(client),
                Err(_) if Instant::now() < until && matches!(self.child.try_wait(), Ok(None)) => {
                    pause(Duration::from_millis(20), stop)?;
                }
                Err(e) => return Err(Broken::Died(self.last_words(&format!("its VMM does not start: {e}")))),
            }
        }
    }

    /// `what`, and what the VMM said about it, if it did.
    fn last_words(&self, what: &str) -> String {
        let mut text = String::new();
        let read = File::open(&self.log).and_then(|mut log| log.read_to_string(&mut text));
        let words = text.lines().rev().find(|line| line.starts_with("error: "));
        match (read, words) {
            (Ok(_), Some(words)) => format!("{what}; its VMM said: {}", words.trim_start_matches("error: ")),
            _ => what.to_owned(),
        }
    }

    fn end(&mut self, files: &Layout) {
        let _ = call_once::<_, ()>(files.vmm_socket(), &VmmRequest::Quit, Duration::from_secs(2));
        drop(self.child.stdin.take());
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        // Already gone, in general.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &Path) -> Result<String, String> {
    let path = std::path::absolute(path).map_err(|e| format!("cannot make {} absolute: {e}", path.display()))?;
    path.to_str().map(str::to_owned).ok_or_else(|| format!("{} is not valid UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_drill_at_a_time_and_its_directory_goes_with_it() {
        let root = tempfile::tempdir().unwrap();
        let left = root.path().join(".drill-m/shm/drill/ram");
        fs::create_dir_all(left.parent().unwrap()).unwrap();
        fs::write(&left, "left behind by a killed one").unwrap();
        let first = Place::make(root.path(), "m").unwrap();
        assert!(!left.exists() && left.parent().unwrap().is_dir());
        let second = Place::make(root.path(), "m").err().unwrap();
        assert!(second.contains("under way"), "{second}");
        drop(first);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        drop(Place::make(root.path(), "m").unwrap());
    }

    #[test]
    fn what_does_not_fit_is_refused_in_a_sentence() {
        let root = tempfile::tempdir().unwrap();
        assert!(check_room("a drill", root.path(), 1 << 20).is_ok());
        let why = check_room("a drill", root.path(), 1 << 60).unwrap_err();
        assert!(why.contains("make that file system larger"), "{why}");
    }
}
