//! Debian's kernel on the machine, through takeovers without warning.
//!
//! Needs full KVM (`kvm_amd` or `kvm_intel`) and, in the environment, `UNDERSTUDY_TEST_KERNEL` (a bzImage) and
//! `UNDERSTUDY_TEST_INITRD` (its /init prints lines `tick N UPTIME` on the console, N = 1, 2, …). It is not run unless asked for (`--ignored`).

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use understudy_protocol::control::{Gate, PromoteFrom};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_vmm::backend::BackendConfig;
use understudy_vmm::machine::{BootSource, Machine, MachineConfig};
use understudy_vmm::memory::{Arena, PAGE};
use understudy_vmm::session::{CutRequest, Session, SharedArena};

const TAKEOVERS: u64 = 4;
const EPOCH: Duration = Duration::from_millis(100);

struct Host {
    machine: Arc<Machine>,
    arena: SharedArena,
    dir: tempfile::TempDir,
}

/// What a board does: takes each byte of the line once, by its offset.
#[derive(Default)]
struct Board(String);

impl Board {
    /// `bytes` is what a host has sent, from offset `start` on.
    fn take(&mut self, start: usize, bytes: &str) {
        let known = self.0.len().checked_sub(start).expect("a gap: bytes were lost");
        assert_eq!(
            &bytes[..known.min(bytes.len())],
            &self.0[start..][..known.min(bytes.len())],
            "history was rewritten"
        );
        self.0.push_str(bytes.get(known..).unwrap_or(""));
    }
}

fn host(kernel: &Path, initrd: &Path) -> Host {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = MachineConfig {
        name: "linux".into(),
        memory_mib: 256,
        vcpus: 2,
        boot: BootSource::Linux {
            kernel: kernel.into(),
            initrd: Some(initrd.into()),
            cmdline: "console=ttyS0 quiet ticks".into(),
        },
        serial: vec![BackendConfig::File(dir.path().join("com1"))],
        console: None,
        disks: Vec::new(),
        cdroms: Vec::new(),
        nics: Vec::new(),
        watchdog: None,
        node: String::new(),
        ram_file: dir.path().join("ram"),
    };
    let (events, _) = channel();
    let machine = Arc::new(Machine::build(config, events).unwrap());
    let arena = Arc::new(Mutex::new(Arena::open(&dir.path().join("arena"), 64 << 20).unwrap()));
    Host { machine, arena, dir }
}

impl Host {
    fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("com1")).unwrap()).into_owned()
    }
    fn wait_for_ticks(&self, n: usize) {
        let until = Instant::now() + Duration::from_secs(180);
        while self.console().matches("tick").count() < n {
            assert!(Instant::now() < until, "no {n} ticks in: {}", self.console());
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }
    fn arena_bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        std::fs::File::open(self.dir.path().join("arena")).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

#[test]
#[ignore = "needs full KVM, UNDERSTUDY_TEST_KERNEL and UNDERSTUDY_TEST_INITRD"]
fn a_debian_guest_counts_on_through_takeovers_without_gap_or_repetition() {
    let (Some(kernel), Some(initrd)) =
        (std::env::var_os("UNDERSTUDY_TEST_KERNEL"), std::env::var_os("UNDERSTUDY_TEST_INITRD"))
    else {
        panic!("set UNDERSTUDY_TEST_KERNEL and UNDERSTUDY_TEST_INITRD: without a guest nothing can be proven");
    };
    let (kernel, initrd) = (PathBuf::from(kernel), PathBuf::from(initrd));
    let mut primary = host(&kernel, &initrd);
    primary.machine.promote(Generation(1), &PromoteFrom::ColdBoot, Gate::Open).unwrap();
    primary.wait_for_ticks(2);
    let mut board = Board::default();
    let mut start = 0;
    for round in 1..=TAKEOVERS {
        let mut session = Session::attach(primary.machine.clone(), primary.arena.clone()).unwrap().0;
        session.dirty_log_start().unwrap();
        let standby = host(&kernel, &initrd);
        let image = std::fs::File::options().write(true).open(standby.dir.path().join("ram")).unwrap();
        std::io::copy(
            &mut std::fs::File::open(primary.dir.path().join("ram")).unwrap(),
            &mut std::fs::File::options().write(true).open(standby.dir.path().join("ram")).unwrap(),
        )
        .unwrap();
        let ticks = primary.console().matches("tick").count();
        let mut state = Vec::new();
        let (mut epoch, mut pages) = (0, 0);
        // Epochs until the guest has printed some more, then a power cut in the middle of one.
        while primary.console().matches("tick").count() < ticks + 2 || epoch < 10 {
            epoch += 1;
            let mut piece =
                session.cut(CutRequest { epoch: Epoch(epoch), arm: epoch == 1, last: false, again: false }).unwrap();
            loop {
                pages += piece.pages;
                let indices = primary.arena_bytes(piece.indices_offset, piece.pages * 8);
                let content = primary.arena_bytes(piece.pages_offset, piece.pages * PAGE as u64);
                for (index, page) in indices.chunks(8).zip(content.chunks(PAGE)) {
                    let at = u64::from_le_bytes(index.try_into().unwrap()) * PAGE as u64;
                    image.write_all_at(page, at).unwrap();
                }
                if !piece.more {
                    state = primary.arena_bytes(piece.state_offset, piece.state_len);
                    break;
                }
                piece = session.cut_continue().unwrap();
            }
            session.committed(Epoch(epoch)).unwrap();
            std::thread::park_timeout(EPOCH);
        }
        // What the last committed checkpoint released may still be on its way to the file.
        let until = Instant::now() + Duration::from_secs(10);
        while !primary.machine.drained() {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
        let before = primary.machine.status();
        primary.machine.fence();
        eprintln!(
            "round {round}: {epoch} epochs, {pages} pages, {} bytes of state, pauses {:?}",
            state.len(),
            &before.recent_pauses_us[before.recent_pauses_us.len().saturating_sub(10)..]
        );
        board.take(start, &primary.console());
        drop(session);
        let mut saved = understudy_vmm::container::decode(&state).unwrap();
        let streams: understudy_vmm::hardware::state::V1 =
            understudy_vmm::container::take(&mut saved, "streams", "all", 1).unwrap();
        start = streams.ports[0].acked as usize;
        let state_file = standby.dir.path().join("state");
        std::fs::write(&state_file, &state).unwrap();
        let from = PromoteFrom::Image { state_file: state_file.display().to_string(), epoch: Epoch(epoch) };
        standby.machine.promote(Generation(round + 1), &from, Gate::Hold).unwrap();
        standby.machine.open_gate_by_hand().unwrap();
        standby.wait_for_ticks(2);
        let after = standby.machine.status();
        assert!(after.vm_time_ns > before.vm_time_ns.saturating_sub(2_000_000_000));
        primary = standby;
    }
    board.take(start, &primary.console());
    println!("{}", board.0);
    let ticks: Vec<(u64, f64)> = board
        .0
        .lines()
        .filter_map(|l| {
            let mut words = l.strip_prefix("tick ")?.split(' ');
            Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        })
        .collect();
    for pair in ticks.windows(2) {
        let ((a, at), (b, bt)) = (pair[0], pair[1]);
        assert_eq!(b, a + 1, "tick {b} after tick {a}");
        assert!(bt >= at, "the guest's clock went back from {at} to {bt}");
    }
    assert!(ticks.len() as u64 > 2 * TAKEOVERS);
}
