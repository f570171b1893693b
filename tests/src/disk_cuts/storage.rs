//! Where the guest's disk is: in this host's memory, on an NFS server, or on an iSCSI target that the host's own initiator attaches.
//!
//! ```text
//!  understudy-host-a ── cable ──┐   ┌ understudy-store ┐
//!                               ├───┤ nfsd             │      each host mounts it in a namespace of its own
//!  understudy-host-b ── cable ──┘   └──────────────────┘
//!
//!  both ───────────── cable ──── tgtd in understudy-store      /dev/sdX, attached by ocf:heartbeat:iscsi; slices in this host's memory
//! ```
//! Server, target, initiator and resource agent are the real ones, from the lab root; cables can be pulled. Both hosts are processes of one kernel. NFS's clients are one for each
//! network namespace, with their own caches, delegations and locks, so that both hosts meet as two hosts do; a block device has one page cache, which is not used.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::world::NAMES;
use crate::bench::pair::Process;
use crate::lab::host::run_quiet;
use crate::lab::wait_for;

/// The server's namespace.
const NAMESPACE: &str = "understudy-store";
const TARGET: &str = "iqn.2026-11.test.understudy:disk";
/// It starts, or attaches, within this time.
const BOUND: Duration = Duration::from_secs(60);

/// What kind of storage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// In this host's memory.
    #[default]
    Local,
    /// Disk and slices on a real NFS 4.2 server.
    Nfs,
    /// The disk is a unit of a real iSCSI target; its slices are on a file system of this host.
    Iscsi,
}

/// Serves NFS 4 from the directory `$1` until it is killed. Without version 3 it needs no port mapper. The first 10 s are for clients from before to come back.
const NFSD: &str = r#"set -e
mount -t nfsd nfsd /proc/fs/nfsd
exportfs -o rw,sync,no_root_squash,no_subtree_check,fsid=0 "*:$1"
rpc.nfsd -N 3 -G 10 -L 60 4
exec rpc.mountd -N 2 -N 3 -F
"#;
/// Its kernel threads outlive their script.
const NFSD_ENDS: &str = "mount -t nfsd nfsd /proc/fs/nfsd; exportfs -ua; rpc.nfsd 0";

/// See the module. The kernel's side ends with it: mounts, sessions, the namespace.
pub struct Storage {
    kind: Kind,
    dir: PathBuf,
    /// The iSCSI disk.
    device: Option<PathBuf>,
    daemons: Vec<Process>,
    cables: Vec<Cable>,
}

/// A veth pair into the server's namespace.
#[derive(Debug)]
struct Cable {
    number: usize,
    /// Where its other end is, if not in this process's.
    namespace: Option<String>,
}

impl Cable {
    fn new(number: usize, namespace: Option<String>) -> Result<Self> {
        let this = Self { number, namespace };
        if let Some(namespace) = &this.namespace {
            // Of a run that was killed.
            let _ = Command::new("ip").args(["netns", "del", namespace]).stderr(Stdio::null()).status();
            ip(&format!("netns add {namespace}"))?;
        }
        ip(&format!("link add {} type veth peer name store{number} netns {NAMESPACE}", this.end()))?;
        if let Some(namespace) = &this.namespace {
            ip(&format!("link set {} netns {namespace}", this.end()))?;
        }
        this.ours(&format!("addr add 10.77.{}.1/24 dev {}", 90 + number, this.end()))?;
        this.ours(&format!("link set {} up", this.end()))?;
        ip(&format!("-n {NAMESPACE} addr add {}/24 dev store{number}", this.server()))?;
        ip(&format!("-n {NAMESPACE} link set store{number} up"))?;
        Ok(this)
    }

    fn end(&self) -> String {
        format!("us-store{}", self.number)
    }

    fn server(&self) -> String {
        format!("10.77.{}.2", 90 + self.number)
    }

    fn ours(&self, words: &str) -> Result<()> {
        match &self.namespace {
            Some(namespace) => ip(&format!("-n {namespace} {words}")),
            None => ip(words),
        }
    }

    fn set(&self, state: &str) -> Result<()> {
        self.ours(&format!("link set {} {state}", self.end()))
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        if let Some(namespace) = &self.namespace {
            put_away(ip(&format!("netns del {namespace}")));
        }
    }
}

fn put_away<T>(result: Result<T>) {
    if let Err(why) = result {
        eprintln!("understudy-bench: the storage is not put away: {why:#}");
    }
}

impl Storage {
    /// Brought up, below `dir`, with a disk that is a copy of `image`.
    pub fn new(kind: Kind, dir: &Path, image: &Path) -> Result<Self> {
        let mut this = Self { kind, dir: dir.to_owned(), device: None, daemons: Vec::new(), cables: Vec::new() };
        match kind {
            Kind::Local => copy(image, &this.dir.join("disk"))?,
            Kind::Nfs => this.nfs(image).context("bringing up an NFS server and two clients")?,
            Kind::Iscsi => this.iscsi(image).context("bringing up an iSCSI target and its initiator")?,
        }
        Ok(this)
    }

    /// What a host knows the disk by.
    pub fn disk(&self, side: usize) -> PathBuf {
        match self.kind {
            Kind::Local => self.dir.join("disk"),
            Kind::Nfs => self.mount(side).join("disk"),
            Kind::Iscsi => self.device.clone().unwrap_or_default(),
        }
    }

    /// What a host knows its slices' directory by; `room` is a file system of this host.
    pub fn slices(&self, side: usize, room: &Path) -> PathBuf {
        if self.kind == Kind::Nfs { self.mount(side).join("slices") } else { room.join("slices") }
    }

    /// Pull the cable: whatever is sent to the storage vanishes.
    pub fn pull(&self) -> Result<()> {
        ensure!(self.kind != Kind::Local, "storage in this host's memory has no cable (--storage nfs or iscsi)");
        self.cables.iter().try_for_each(|cable| cable.set("down"))
    }

    /// Plug it in again.
    pub fn plug(&self) -> Result<()> {
        self.cables.iter().try_for_each(|cable| cable.set("up"))
    }

    fn portal(&self) -> String {
        let server = self.cables.first().map(Cable::server);
        format!("{}:3260", server.unwrap_or_default())
    }

    /// The distribution's resource agent, as Pacemaker calls it. (`udev=no`: nobody makes links under /dev/disk here.)
    fn agent(&self, action: &str) -> Result<String> {
        let mut command = Command::new("/usr/lib/ocf/resource.d/heartbeat/iscsi");
        command.arg(action).env("OCF_ROOT", "/usr/lib/ocf").env("OCF_RESOURCE_INSTANCE", "san");
        command.env("OCF_RESKEY_portal", self.portal()).env("OCF_RESKEY_target", TARGET);
        run_quiet(command.env("OCF_RESKEY_udev", "no"))
    }

    fn mount(&self, side: usize) -> PathBuf {
        self.dir.join(format!("nfs-{}", NAMES[side]))
    }

    fn nfs(&mut self, image: &Path) -> Result<()> {
        modules(&["nfsd", "nfsv4"])?;
        namespace()?;
        let export = self.dir.join("export");
        fs::create_dir(&export).context("making the exported directory")?;
        copy(image, &export.join("disk"))?;
        let mut server = inside();
        server.args(["sh", "-c", NFSD, "sh"]).arg(&export);
        self.daemons.push(Process::start(&server, &self.dir.join("nfsd.log"))?);
        for (side, name) in NAMES.iter().enumerate() {
            let host = format!("understudy-host-{name}");
            let cable = Cable::new(side, Some(host.clone()))?;
            let server = cable.server();
            self.cables.push(cable);
            // Both hosts have one name, so the client's must differ.
            let named = format!("echo {host} > /sys/fs/nfs/net/nfs_client/identifier");
            run_quiet(Command::new("ip").args(["netns", "exec", &host, "sh", "-c", &named]))?;
            let at = self.mount(side);
            fs::create_dir(&at).context("making the mount points")?;
            patiently("an NFS mount", || {
                let mut mount = Command::new("nsenter");
                mount.arg(format!("--net=/run/netns/{host}"));
                mount.args(["mount", "-t", "nfs4", "-o", "vers=4.2,hard,proto=tcp,timeo=50,retrans=2"]);
                run_quiet(mount.arg(format!("{server}:/")).arg(&at))
            })?;
        }
        Ok(())
    }

    fn iscsi(&mut self, image: &Path) -> Result<()> {
        modules(&["iscsi_tcp", "sd_mod"])?;
        namespace()?;
        self.cables.push(Cable::new(0, None)?);
        let unit = self.dir.join("unit");
        copy(image, &unit)?;
        let mut target = inside();
        target.env("TGT_IPC_SOCKET", self.dir.join("tgt"));
        target.args(["tgtd", "-f", "--iscsi", &format!("portal={}", self.portal())]);
        self.daemons.push(Process::start(&target, &self.dir.join("tgtd.log"))?);
        let admin = |words: &str| {
            let mut command = Command::new("tgtadm");
            command.env("TGT_IPC_SOCKET", self.dir.join("tgt")).args(["--lld", "iscsi"]).args(words.split(' '));
            run_quiet(&mut command)
        };
        patiently("the target daemon", || admin("--op show --mode sys"))?;
        admin(&format!("--mode target --op new --tid 1 -T {TARGET}"))?;
        admin(&format!("--mode logicalunit --op new --tid 1 --lun 1 -b {}", unit.display()))?;
        admin("--mode target --op bind --tid 1 -I ALL")?;

        fs::write("/etc/iscsi/initiatorname.iscsi", "InitiatorName=iqn.2026-11.test.understudy:host\n")
            .context("naming the initiator")?;
        fs::create_dir_all("/run/lock/iscsi").context("making the initiator's lock directory")?;
        let mut initiator = Command::new("iscsid");
        initiator.arg("-f");
        self.daemons.push(Process::start(&initiator, &self.dir.join("iscsid.log"))?);
        patiently("the initiator", || self.agent("start"))?;
        self.agent("monitor").context("ocf:heartbeat:iscsi has started and its monitor says otherwise")?;
        self.device = Some(wait_for("the iSCSI disk", BOUND, iscsi_disk)?);
        Ok(())
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if self.kind == Kind::Local {
            return;
        }
        // What waits for the server would wait for ever.
        put_away(self.plug());
        if self.kind == Kind::Nfs {
            for side in 0..self.cables.len() {
                put_away(run_quiet(Command::new("umount").arg(self.mount(side))));
            }
            put_away(run_quiet(inside().args(["sh", "-c", NFSD_ENDS])));
        } else {
            put_away(self.agent("stop"));
        }
        self.daemons.clear();
        self.cables.clear();
        put_away(ip(&format!("netns del {NAMESPACE}")));
    }
}

/// What does not succeed at once, with its last complaint.
fn patiently(what: &str, attempt: impl Fn() -> Result<String>) -> Result<()> {
    let mut said = None;
    let result = wait_for(what, BOUND, || Ok(attempt().map_err(|e| said = Some(e)).ok()));
    match (result, said) {
        (Err(late), Some(why)) => Err(why.context(late)),
        (result, _) => result.map(drop),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    run_quiet(Command::new("cp").arg("--sparse=always").arg(from).arg(to)).map(drop)
}

fn modules(names: &[&str]) -> Result<()> {
    run_quiet(Command::new("modprobe").arg("--all").args(names)).map(drop)
}

fn ip(words: &str) -> Result<()> {
    run_quiet(Command::new("ip").args(words.split(' '))).map(drop)
}

/// A command in the server's namespace, with mounts of its own.
fn inside() -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", NAMESPACE]);
    command
}

fn namespace() -> Result<()> {
    // Of a run that was killed.
    let _ = Command::new("ip").args(["netns", "del", NAMESPACE]).stderr(Stdio::null()).status();
    ip(&format!("netns add {NAMESPACE}"))?;
    ip(&format!("-n {NAMESPACE} link set lo up"))
}

/// The disk that came with the session.
fn iscsi_disk() -> Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block").context("looking for the iSCSI disk")? {
        let entry = entry?;
        let device = entry.path().join("device");
        if fs::canonicalize(&device).is_ok_and(|path| path.to_string_lossy().contains("/session")) {
            let node = Path::new("/dev").join(entry.file_name());
            return Ok(File::open(&node).is_ok().then_some(node));
        }
    }
    Ok(None)
}
