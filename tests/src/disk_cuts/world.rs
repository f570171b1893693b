//! The two hosts, the board and the books.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab_guest::line::Splitter;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use understudy_protocol::control::{
    HandedOver, PromoteFrom, ReplicatorRequest, Role, TakenOver, VmmRequest, call_once,
};
use understudy_protocol::ids::Generation;

use super::Mix;
use super::books::Books;
use super::storage::Storage;
use crate::bench::pair::{self, Linux, Process, Setup, Side, free_port, keygen};
use crate::lab::{guest_disk, places, wait_for, wait_until};
use crate::power_cuts::unredirected::forget_redirection;
use crate::power_cuts::{start_board, verified, veto};

/// RAM.
const MEMORY_MIB: u64 = 192;
/// The slices' own file system.
const ROOM_MIB: u64 = 96;
/// A machine whose disk is full for so long must live.
const FULL_FOR: Duration = Duration::from_secs(10);
/// Storage that does not answer for so long is waited for.
const GONE_FOR: Duration = Duration::from_secs(30);
/// Whatever an emulated processor does, it does within this time: a boot with the recovery of both databases, or a first copy.
const BOUND: Duration = Duration::from_secs(300);
/// A host with other work may say nothing for a while; what is lost must be lost by the cut.
const PEER_TIMEOUT_MS: u64 = 15_000;
/// Between two checkpoints: emulated processors have little time for them.
const INTERVAL_MS: u64 = 400;
pub const NAMES: [&str; 2] = ["a", "b"];

/// A file system of its own; it goes with this value.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: PathBuf) -> Result<Self> {
        fs::create_dir(&at).with_context(|| format!("creating {}", at.display()))?;
        let size = format!("mode=755,size={ROOM_MIB}m");
        mount(Some("room"), &at, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .with_context(|| format!("mounting a file system on {} (root can)", at.display()))?;
        Ok(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// See the module.
pub struct World {
    books: Arc<Mutex<Books>>,
    sides: [Side; 2],
    on: [bool; 2],
    /// Which side runs the machine, or ran it last.
    pub primary: usize,
    generation: u64,
    setup: Setup,
    peers: String,
    mirrored: bool,
    storage: Storage,
    _board: Process,
    _rooms: Vec<Mounted>,
    // Last, so that it outlives the processes.
    dir: tempfile::TempDir,
}

impl World {
    /// Everything runs and is protected, and the guest's first transactions have been seen.
    pub fn new(mix: &Mix, say: &dyn Fn(&str)) -> Result<Self> {
        let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
        let at = dir.path();
        say("copying the guest's disk");
        let image = guest_disk::ensure()?;
        let storage = Storage::new(mix.storage, at, &image)?;
        if mix.mirrored {
            // (The other copy does not exist yet: the first copy makes it.)
            fs::rename(at.join("disk"), at.join(format!("disk-{}", NAMES[0]))).context("naming the disk")?;
        }
        keygen(&at.join("key"))?;
        let script = format!("case $1 in veto) : > {0};; clear-veto) rm -f {0};; esac\n", veto(at).display());
        fs::write(at.join("hook"), script).context("writing the hook")?;
        let line = TcpListener::bind("127.0.0.1:0").context("listening for the board's line")?;
        let port = free_port()?;
        let board = start_board(at, port, line.local_addr()?.port())?;
        let books = Arc::new(Mutex::new(Books::new()));
        let told = books.clone();
        let line = line.accept().context("waiting for the board's line")?.0;
        thread::spawn(move || listen(line, &told));
        let kernel = match &mix.kernel {
            Some(kernel) => kernel.clone(),
            None => places::root_dir()?.join("boot/vmlinuz"),
        };
        let initrd = places::lab_dir()?.join("guest/initrd-disk");
        ensure!(initrd.exists(), "the guest's initramfs is not at {}: `make lab-disk` builds it", initrd.display());
        let cmdline = "console=ttyS1 quiet mitigations=off understudy.disk=/dev/vda understudy.mem_mib=8 \
                       understudy.mem_pause_us=50000";
        let rooms = if mix.mirrored { 0..2 } else { 0..1 };
        let rooms = rooms.map(|side| Mounted::new(room(at, mix.mirrored, side))).collect::<Result<_>>()?;
        // Outputs may wait: a guest that is slowed down for emulated replication gets nothing done.
        let more = ["--pipeline", "3", "--slow-link", "stall", "--peer-timeout-ms"].map(str::to_owned);
        let setup = Setup {
            vcpus: 1,
            interval_ms: INTERVAL_MS,
            serial: Some(format!("board:127.0.0.1:{port}/com1,key={}", at.join("key").display())),
            hook: Some(format!("/bin/sh {}", at.join("hook").display())),
            replicator: more.into_iter().chain([PEER_TIMEOUT_MS.to_string()]).collect(),
            linux: Some(Linux { kernel, initrd, cmdline: cmdline.into() }),
            ..Setup::new(MEMORY_MIB)
        };
        let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
        let sides = [Side::new(at, NAMES[0])?, Side::new(at, NAMES[1])?];
        let on = [false; 2];
        let mirrored = mix.mirrored;
        let mut this = Self {
            books,
            sides,
            on,
            primary: 0,
            generation: 0,
            setup,
            peers,
            mirrored,
            storage,
            _board: board,
            _rooms: rooms,
            dir,
        };
        say("the guest boots, and its databases start");
        this.recover().map_err(|e| this.explain(e))?;
        this.more(2).map_err(|e| this.explain(e))?;
        Ok(this)
    }

    /// The books as they are.
    pub fn books(&self) -> Books {
        self.books.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The file of the disk that the machine runs on, or ran on last.
    pub fn disk(&self) -> PathBuf {
        self.disk_of(self.primary)
    }

    /// Where its writes wait.
    pub fn slices(&self) -> PathBuf {
        self.slices_of(self.primary)
    }

    fn disk_of(&self, side: usize) -> PathBuf {
        if self.mirrored { self.dir.path().join(format!("disk-{}", NAMES[side])) } else { self.storage.disk(side) }
    }

    fn slices_of(&self, side: usize) -> PathBuf {
        self.storage.slices(side, &room(self.dir.path(), self.mirrored, side))
    }

    /// A mirrored disk and its copy, while the guest runs: the same.
    pub fn compare(&self) -> Result<()> {
        if !self.mirrored {
            return Ok(());
        }
        let same = verified(&self.sides[self.primary], BOUND)?;
        ensure!(
            same.differing_bytes == 0 && same.done_bytes == same.total_bytes && same.done_bytes > 0,
            "the disk and its copy were compared: {}",
            same.last
        );
        Ok(())
    }

    /// Where everything is.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Under the machine.
    pub fn kvm_backend(&self) -> Result<String> {
        Ok(self.sides[self.primary].vmm()?.kvm_backend)
    }

    fn expect_boot(&self) {
        self.books.lock().unwrap_or_else(PoisonError::into_inner).expect_boot();
    }

    /// Wait for `count` more transactions.
    pub fn more(&self, count: u64) -> Result<()> {
        let from = self.books().told;
        self.wait(&format!("{count} more transactions"), |books| books.told >= from + count)
    }

    /// Ends at once when anything is wrong.
    fn wait(&self, what: &str, holds: impl Fn(&Books) -> bool) -> Result<()> {
        let wrong = wait_for(what, BOUND, || {
            let books = self.books();
            Ok(if books.wrong.is_some() { Some(books.wrong) } else { holds(&books).then_some(None) })
        })?;
        wrong.map_or(Ok(()), |wrong| bail!("{wrong}"))
    }

    /// A host dies.
    pub fn cut(&mut self, side: usize, first: bool) -> Result<()> {
        self.on[side] = false;
        self.sides[side].cut_power(first)
    }

    /// Both die, as nearly in one moment as two calls are.
    pub fn cut_both(&mut self, first: bool) -> Result<()> {
        self.expect_boot();
        self.cut(usize::from(first), first)?;
        self.cut(usize::from(!first), !first)
    }

    /// The one that is left dies too.
    pub fn cut_rest(&mut self, first: bool) -> Result<()> {
        self.expect_boot();
        self.cut(self.primary, first)
    }

    /// The standby becomes the machine, by the agents' rules. `missing`: its disk is not there at first, and that must be said.
    pub fn take_over(&mut self, unredirected: bool, missing: bool) -> Result<()> {
        ensure!(
            !veto(self.dir.path()).exists(),
            "the machine ran unprotected when it was cut (the veto stands): the host was too busy for this test"
        );
        self.generation += 1;
        let (generation, next) = (Generation(self.generation), &self.sides[1 - self.primary]);
        let taken: TakenOver = next.ask_replicator(&ReplicatorRequest::TakeOver { generation })?;
        let image = taken.image.context("the standby has no image of a protected machine")?;
        if unredirected {
            forget_redirection(&self.disk(), &self.slices(), Path::new(&image.state_file))?;
        }
        let from = PromoteFrom::Image { state_file: image.state_file, epoch: image.epoch };
        if missing {
            let disk = self.disk_of(1 - self.primary);
            let away = disk.with_extension("away");
            fs::rename(&disk, &away).context("taking the disk away")?;
            let request = VmmRequest::Promote { generation, from: from.clone() };
            let answer = call_once::<_, ()>(next.layout.vmm_socket(), &request, pair::BOUND);
            fs::rename(&away, &disk).context("bringing the disk back")?;
            let said = answer.err().context("a machine without its disk was promoted")?.to_string();
            ensure!(
                said.contains("vda") && said.contains(&disk.display().to_string()),
                "of the missing disk it says: {said}"
            );
        }
        call_once::<_, ()>(next.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, pair::BOUND)?;
        next.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
        self.primary = 1 - self.primary;
        Ok(())
    }

    /// The machine moves, with its last checkpoint.
    pub fn hand_over(&mut self) -> Result<()> {
        let old = self.primary;
        let _: HandedOver = self.sides[old].ask_replicator(&ReplicatorRequest::HandOver)?;
        self.cut(old, true)?;
        self.take_over(false, false)
    }

    /// The slices' file system has no room for a while. The guest waits, and nothing else happens to it.
    pub fn fill(&mut self) -> Result<()> {
        let ballast = self.slices().with_file_name("ballast");
        let status = |this: &Self| -> Result<_> {
            let disk = this.sides[this.primary].vmm()?.disks.into_iter().next();
            disk.context("the machine shows no disk")
        };
        // Merging makes room meanwhile: until requests wait.
        let mut file = fs::File::create(&ballast).context("filling the file system")?;
        let waits = wait_for("requests that wait for room", BOUND, || {
            while file.write_all(&[0; 64 << 10]).is_ok() {}
            let disk = status(self)?;
            Ok((disk.held > 0).then_some(disk))
        });
        thread::sleep(if waits.is_ok() { FULL_FOR } else { Duration::ZERO });
        let meanwhile = status(self);
        // A file that is open keeps its room.
        drop(file);
        fs::remove_file(&ballast).context("making room")?;
        let (waits, meanwhile) = (waits?, meanwhile?);
        ensure!(meanwhile.held > 0, "requests did not wait for {} s: {meanwhile:?}", FULL_FOR.as_secs());
        ensure!(waits.problem.is_some() || meanwhile.problem.is_some(), "the status names no problem: {meanwhile:?}");
        self.wait("nothing waits any more", |_| status(self).is_ok_and(|disk| disk.held == 0))
    }

    /// The storage does not answer for a while. The guest's requests wait, the status says so, and nothing else happens to it: it stays protected.
    pub fn go_silent(&mut self) -> Result<()> {
        let problem = |this: &Self| -> Result<_> {
            let disk = this.sides[this.primary].vmm()?.disks.into_iter().next().context("the machine shows no disk")?;
            Ok(disk.problem.filter(|_| disk.in_flight > 0))
        };
        let losses = self.sides[self.primary].replicator()?.losses;
        self.storage.pull()?;
        let said = wait_for("requests that wait for the storage", BOUND, || problem(self));
        if said.is_ok() {
            thread::sleep(GONE_FOR);
        }
        let meanwhile = problem(self);
        self.storage.plug()?;
        let (said, meanwhile) = (said?, meanwhile?);
        ensure!(meanwhile.is_some(), "first the status says \"{said}\", and {} s later nothing", GONE_FOR.as_secs());
        self.wait("nothing waits any more", |_| problem(self).is_ok_and(|said| said.is_none()))?;
        let status = self.sides[self.primary].replicator()?;
        ensure!(status.losses == losses, "the silence of the storage cost protection: {}", status.note);
        Ok(())
    }

    /// Hosts that are off come back, and the machine is protected again. If it ran nowhere it boots first, without a standby.
    pub fn recover(&mut self) -> Result<()> {
        if !self.on[self.primary] {
            self.start(self.primary)?;
            self.generation += 1;
            let (generation, from) = (Generation(self.generation), PromoteFrom::ColdBoot);
            let side = &self.sides[self.primary];
            call_once::<_, ()>(side.layout.vmm_socket(), &VmmRequest::Promote { generation, from }, pair::BOUND)?;
            side.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
            let boots = self.books().boots;
            self.wait("the guest boots and looks at its disk", |books| books.boots > boots)?;
        }
        let standby = 1 - self.primary;
        if !self.on[standby] {
            self.start(standby)?;
        }
        wait_until("the machine protected", BOUND, || {
            let status = self.sides[self.primary].replicator()?;
            Ok(status.role == Role::Sender && status.protected && !veto(self.dir.path()).exists())
        })
    }

    fn start(&mut self, side: usize) -> Result<()> {
        let (dir, name) = (self.dir.path(), NAMES[side]);
        let (disk, slices) = (self.disk_of(side), self.slices_of(side));
        let mode = if self.mirrored { "mirrored" } else { "shared" };
        let disk = format!("name=vda,file={},format=raw,mode={mode},slices={}", disk.display(), slices.display());
        self.setup.disk = Some(disk.parse().context("naming the disk")?);
        self.sides[side].start_vmm(dir, name, &self.setup, true)?;
        self.sides[side].start_replicator(dir, name, &self.peers, &self.setup)?;
        self.on[side] = true;
        Ok(())
    }

    /// With the end of everybody's log.
    pub fn explain(&self, e: anyhow::Error) -> anyhow::Error {
        let logs = ["a-vmm", "a-replicator", "b-vmm", "b-replicator", "board"].map(|name| {
            let text = fs::read_to_string(self.dir.path().join(format!("{name}.log"))).unwrap_or_default();
            let from = text.lines().count().saturating_sub(12);
            format!("--- {name}\n{}", text.lines().skip(from).collect::<Vec<_>>().join("\n"))
        });
        e.context(format!("{}\n--- books\n{:?}\n", logs.join("\n"), self.books()))
    }
}

/// A file system of this host for slices; of mirrored disks each host has its own.
fn room(dir: &Path, mirrored: bool, side: usize) -> PathBuf {
    dir.join(if mirrored { format!("room-{}", NAMES[side]) } else { "room".to_owned() })
}

fn listen(mut line: TcpStream, books: &Mutex<Books>) {
    let (mut splitter, mut bytes) = (Splitter::default(), [0; 4096]);
    loop {
        let read = line.read(&mut bytes);
        let mut books = books.lock().unwrap_or_else(PoisonError::into_inner);
        match read {
            Ok(n) if n > 0 => splitter.feed(&bytes[..n], |piece| books.take(piece)),
            _ => {
                books.wrong.get_or_insert("the board's line ended".into());
                return;
            }
        }
    }
}
