//! A VMM without a machine: speaks the session of `VmmRequest` over its socket, and has a "guest" that keeps writing to
//! the RAM file. It remembers what RAM looked like at every cut, and what left through the gate.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use understudy_protocol::control::*;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::layout::Layout;

pub const PAGE: usize = 4096;

/// How much the guest writes, and how small the arena is.
#[derive(Clone, Copy)]
pub struct Load {
    pub ram_pages: u64,
    /// Pages that a piece of the arena holds.
    pub arena_pages: u64,
    /// Pages written per burst of the guest.
    pub burst: u64,
    /// Between bursts; `None` = only at cuts.
    pub pause: Option<Duration>,
    /// Remember what RAM looked like at each cut.
    pub snapshots: bool,
}

impl Default for Load {
    fn default() -> Self {
        Self { ram_pages: 512, arena_pages: 64, burst: 100, pause: Some(Duration::from_millis(2)), snapshots: true }
    }
}

#[derive(Default)]
pub struct Machine {
    pub state: Option<VmmState>,
    pub generation: Generation,
    pub gate_open: bool,
    pub last_cut: Epoch,
    pub last_committed: Epoch,
    pub attached: bool,
    pub attaches: u64,
    pub quit: bool,
    pub gate_opened: u64,
    /// Epoch → digest of all of RAM at its cut.
    pub snapshots: BTreeMap<u64, [u8; 32]>,
    /// A stopped guest does not write.
    stopped: bool,
    log: Option<BTreeSet<u64>>,
    /// Pages of the cut that have not been put in the arena.
    rest: Vec<u64>,
    captured: Option<(Epoch, bool)>,
    random: u64,
    pub hang: bool,
    /// The session is to migrate it: without a hand-over its gate is open again afterwards.
    migrates: bool,
    /// Bursts that the guest wrote: how one sees that it runs.
    pub bursts: u64,
    /// Share of its time for which it runs, and the lowest that it ever was.
    share: u8,
    pub slowest: u8,
    /// Refuses to be told of a commit.
    pub refuses_commits: bool,
}

pub struct FakeVmm {
    pub layout: Layout,
    pub load: Load,
    machine: Mutex<Machine>,
    ram: File,
    arena: File,
    stop: AtomicBool,
}

impl FakeVmm {
    /// Start over the RAM file that is there, or a new one of zeros.
    pub fn start(layout: &Layout, load: Load, state: VmmState, generation: u64) -> Arc<Self> {
        fs::create_dir_all(layout.run_dir()).unwrap();
        fs::create_dir_all(layout.shm_dir()).unwrap();
        let open = |path| File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        let (ram, arena) = (open(layout.ram()), open(layout.arena()));
        ram.set_len(load.ram_pages * PAGE as u64).unwrap();
        arena.set_len(Self::arena_len(load)).unwrap();
        let machine = Machine {
            state: Some(state),
            generation: Generation(generation),
            random: 0x9E37_79B9_7F4A_7C15 ^ generation,
            share: 100,
            slowest: 100,
            ..Machine::default()
        };
        let _ = fs::remove_file(layout.vmm_socket());
        let listener = UnixListener::bind(layout.vmm_socket()).unwrap();
        let this = Arc::new(Self {
            layout: layout.clone(),
            load,
            machine: Mutex::new(machine),
            ram,
            arena,
            stop: AtomicBool::new(false),
        });
        let server = this.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                if server.stop.load(Ordering::SeqCst) {
                    return;
                }
                let server = server.clone();
                thread::spawn(move || server.serve(stream.unwrap()));
            }
        });
        if let Some(pause) = load.pause {
            let guest = this.clone();
            thread::spawn(move || {
                while !guest.stop.load(Ordering::SeqCst) {
                    thread::sleep(pause);
                    let mut machine = guest.machine();
                    if machine.state == Some(VmmState::Running) && !machine.stopped {
                        guest.run(&mut machine);
                    }
                }
            });
        }
        this
    }

    fn arena_len(load: Load) -> u64 {
        let piece = load.arena_pages * (8 + PAGE as u64) + 65536;
        piece.max(load.ram_pages.div_ceil(8))
    }

    pub fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// The process dies.
    pub fn kill(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(self.layout.vmm_socket());
        let _ = fs::remove_file(self.layout.vmm_socket());
    }

    pub fn ram_digest(&self) -> [u8; 32] {
        digest_of(&self.ram)
    }

    /// The guest writes noise to its first pages.
    pub fn write_noise(&self, pages: u64) {
        let mut machine = self.machine();
        for page in 0..pages {
            let mut content = [0; PAGE];
            content.chunks_exact_mut(8).zip(1u64..).for_each(|(chunk, i)| {
                let mixed = (page << 32 | i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                chunk.copy_from_slice(&(mixed ^ mixed >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9).to_le_bytes());
            });
            self.ram.write_all_at(&content, page * PAGE as u64).unwrap();
            if let Some(log) = &mut machine.log {
                log.insert(page);
            }
        }
    }

    /// The guest writes a burst: noise, repeated bytes and zero pages.
    fn run(&self, machine: &mut Machine) {
        machine.bursts += 1;
        self.write(machine, self.load.burst * u64::from(machine.share) / 100);
    }

    fn write(&self, machine: &mut Machine, pages: u64) {
        for _ in 0..pages {
            machine.random ^= machine.random << 13;
            machine.random ^= machine.random >> 7;
            machine.random ^= machine.random << 17;
            let random = machine.random;
            let page = random % self.load.ram_pages;
            let mut content = [(random >> 32) as u8; PAGE];
            match random >> 60 {
                0..4 => content = [0; PAGE],
                4..8 => content.chunks_exact_mut(8).zip(0u64..).for_each(|(chunk, i)| {
                    chunk.copy_from_slice(&(random ^ i.wrapping_mul(0xD134_2543_DE82_EF95)).to_le_bytes());
                }),
                _ => {}
            }
            self.ram.write_all_at(&content, page * PAGE as u64).unwrap();
            if let Some(log) = &mut machine.log {
                log.insert(page);
            }
        }
    }

    fn serve(&self, stream: UnixStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut writer = stream;
        let mut session = false;
        while let Ok(Some(line)) = read_line(&mut reader) {
            while self.machine().hang {
                thread::sleep(Duration::from_millis(10));
            }
            if self.stop.load(Ordering::SeqCst) {
                break;
            }
            let request: VmmRequest = serde_json::from_slice(&line).unwrap();
            let reply = self.answer(&request, &mut session);
            let line = match reply {
                Ok(value) => encode_line(&Reply::Ok(value)),
                Err(why) => encode_line(&Reply::<()>::Error(why)),
            };
            if writer.write_all(&line).is_err() {
                break;
            }
            if request == VmmRequest::Quit {
                break;
            }
        }
        if session {
            let mut machine = self.machine();
            machine.attached = false;
            machine.log = None;
            machine.rest.clear();
            machine.share = 100;
            let runs = machine.state == Some(VmmState::Running);
            machine.gate_open = runs && std::mem::take(&mut machine.migrates);
            if runs {
                machine.stopped = false;
            }
        }
    }

    fn answer(&self, request: &VmmRequest, session: &mut bool) -> Result<serde_json::Value, String> {
        let mut machine = self.machine();
        let machine = &mut *machine;
        let json = |value: &dyn Fn() -> serde_json::Value| Ok(value());
        match request {
            VmmRequest::Status => {
                let status = VmmStatus {
                    cdroms: Vec::new(),
                    nics: Vec::new(),
                    watchdog: None,
                    machine: "m".into(),
                    state: machine.state.unwrap(),
                    generation: machine.generation,
                    gate: if machine.gate_open { Gate::Open } else { Gate::Hold },
                    vcpus: 1,
                    ram_bytes: self.load.ram_pages * PAGE as u64,
                    vm_time_ns: 0,
                    last_cut: machine.last_cut,
                    last_committed: machine.last_committed,
                    replicated: machine.attached,
                    kvm_backend: "none".into(),
                    resets: 0,
                    serial: Vec::new(),
                    recent_pauses_us: Vec::new(),
                    capture: understudy_protocol::control::CaptureStatus::default(),
                    disks: Vec::new(),
                };
                json(&|| serde_json::to_value(&status).unwrap())
            }
            VmmRequest::Attach | VmmRequest::AttachToMigrate => {
                if machine.attached {
                    return Err("a replication session is attached already".into());
                }
                if machine.state != Some(VmmState::Running) {
                    return Err("the machine does not run here".into());
                }
                machine.migrates = *request == VmmRequest::AttachToMigrate;
                if machine.migrates && !machine.gate_open {
                    return Err("the machine is protected".into());
                }
                *session = true;
                machine.attached = true;
                machine.attaches += 1;
                machine.gate_open = machine.migrates;
                let attached = Attached {
                    mirrored: Vec::new(),
                    generation: machine.generation,
                    ram_bytes: self.load.ram_pages * PAGE as u64,
                    arena_bytes: Self::arena_len(self.load),
                    disks: false,
                };
                json(&|| serde_json::to_value(&attached).unwrap())
            }
            VmmRequest::Quit => {
                machine.quit = true;
                machine.state = Some(VmmState::Fenced);
                Ok(serde_json::Value::Null)
            }
            _ if !*session => Err("this belongs to a replication session: attach first".into()),
            VmmRequest::DirtyLogStart => {
                if machine.log.replace(BTreeSet::new()).is_some() {
                    return Err("the dirty log runs already".into());
                }
                Ok(serde_json::Value::Null)
            }
            VmmRequest::Harvest => {
                if machine.migrates {
                    // However slow this host is: something was written since the last time.
                    self.write(machine, self.load.burst);
                }
                let log = std::mem::take(machine.log.as_mut().ok_or("the dirty log is off")?);
                let mut bitmap = vec![0u8; self.load.ram_pages.div_ceil(8) as usize];
                for page in &log {
                    bitmap[(page / 8) as usize] |= 1 << (page % 8);
                }
                self.arena.write_all_at(&bitmap, 0).unwrap();
                let harvested = Harvested { dirty_pages: log.len() as u64, bitmap_bytes: bitmap.len() as u64 };
                json(&|| serde_json::to_value(harvested).unwrap())
            }
            VmmRequest::Cut { epoch, arm, last, .. } => {
                if machine.log.is_none() {
                    return Err("the dirty log is off".into());
                }
                if machine.stopped {
                    return Err("a cut is under way".into());
                }
                assert!(*epoch > machine.last_cut, "epoch {epoch} was cut before");
                self.run(machine);
                machine.stopped = true;
                machine.last_cut = *epoch;
                if *arm {
                    machine.gate_open = false;
                }
                machine.rest = machine.log.replace(BTreeSet::new()).unwrap().into_iter().collect();
                if self.load.snapshots {
                    let digest = self.ram_digest();
                    machine.snapshots.insert(epoch.0, digest);
                }
                machine.captured = Some((*epoch, *last));
                let captured = self.piece(machine);
                json(&|| serde_json::to_value(captured).unwrap())
            }
            VmmRequest::CutContinue => {
                if machine.rest.is_empty() {
                    return Err("there is nothing to continue".into());
                }
                let captured = self.piece(machine);
                json(&|| serde_json::to_value(captured).unwrap())
            }
            VmmRequest::Throttle { percent } => {
                machine.share = *percent;
                machine.slowest = machine.slowest.min(*percent);
                Ok(serde_json::Value::Null)
            }
            VmmRequest::Committed { .. } if machine.refuses_commits => Err("it will not hear of it".into()),
            VmmRequest::Committed { epoch } => {
                assert!(machine.captured.is_some_and(|c| c.0 >= *epoch), "an epoch was committed before it was cut");
                assert!(*epoch > machine.last_committed);
                machine.last_committed = *epoch;
                if machine.captured.is_some_and(|c| c.1 && c.0 == *epoch) {
                    machine.state = Some(VmmState::HandedOver);
                }
                Ok(serde_json::Value::Null)
            }
            VmmRequest::GateOpen => {
                machine.gate_open = true;
                machine.gate_opened += 1;
                Ok(serde_json::Value::Null)
            }
            other => Err(format!("not here: {other:?}")),
        }
    }

    /// Put the next pages in the arena; with the last, the device state.
    fn piece(&self, machine: &mut Machine) -> Captured {
        let (epoch, last) = machine.captured.unwrap();
        let n = machine.rest.len().min(self.load.arena_pages as usize);
        let pages: Vec<u64> = machine.rest.drain(..n).collect();
        let pages_offset = 8 * self.load.arena_pages;
        for (i, page) in (0u64..).zip(&pages) {
            self.arena.write_all_at(&page.to_le_bytes(), 8 * i).unwrap();
            let mut content = [0; PAGE];
            self.ram.read_exact_at(&mut content, page * PAGE as u64).unwrap();
            self.arena.write_all_at(&content, pages_offset + PAGE as u64 * i).unwrap();
        }
        let more = !machine.rest.is_empty();
        let state = format!("devices at epoch {epoch} of generation {}", machine.generation);
        let state_offset = pages_offset + self.load.arena_pages * PAGE as u64;
        if !more {
            self.arena.write_all_at(state.as_bytes(), state_offset).unwrap();
            machine.stopped = last;
        }
        Captured {
            epoch,
            pages: pages.len() as u64,
            indices_offset: 0,
            pages_offset,
            state_offset,
            state_len: if more { 0 } else { state.len() as u64 },
            more,
            pause_us: 100,
            vm_time_ns: 0,
        }
    }
}

/// BLAKE3 over a whole file.
pub fn digest_of(file: &File) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let (mut buffer, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let n = file.read_at(&mut buffer, at).unwrap();
        if n == 0 {
            return *hasher.finalize().as_bytes();
        }
        hasher.update(&buffer[..n]);
        at += n as u64;
    }
}
