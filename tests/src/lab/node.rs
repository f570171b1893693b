//! A node: namespaces around a Debian of its own, with an init that can be killed like a machine that loses its power.
//!
//! ```text
//! bmc ──spawns──► `node-start NAME`   unshares, spawns init, prints its process id, waits for its death
//!                     └─► `node-init NAME`   process 1: waits for its cables, builds its root, starts services, reaps
//! ```
//! What survives a power cut is what a disk would keep: Pacemaker's and Corosync's state, `/etc/understudy`,
//! `/var/lib/understudy` and the logs, in the node's *disk* directory outside. Everything else is a tmpfs of this one boot.

use std::fs;
use std::io::{BufRead, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Gid, Group, Pid, Uid, User, chown, pivot_root, sethostname};

use super::net::{self, Kind, NODES, Node, Plane};
use super::places;

/// What a node's processes find on their path.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Size of a node's /dev/shm: guests' RAM, capture arena, images.
const SHM: &str = "4g";
/// What a disk would keep: (directory on the node's disk, where the node sees it).
const DISK: &[(&str, &str)] = &[
    ("pacemaker", "/var/lib/pacemaker"),
    ("corosync", "/var/lib/corosync"),
    ("etc-understudy", "/etc/understudy"),
    ("understudy", "/var/lib/understudy"),
    ("log-corosync", "/var/log/corosync"),
    ("log-pacemaker", "/var/log/pacemaker"),
    ("spool-understudy", "/var/spool/understudy"),
];

/// Settings common to all nodes, in the run directory's `settings.json`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Settings {
    /// Corosync's token timeout in ms.
    pub token_ms: u32,
    /// The Debian root.
    pub root: PathBuf,
    /// Secret shared by Pacemaker and its remote nodes.
    pub authkey: String,
    /// The cluster's nodes.
    pub hosts: Vec<String>,
    /// Planes that Corosync has a link in, the first of them link 0.
    pub links: Vec<Plane>,
}

impl Settings {
    fn file() -> PathBuf {
        places::run_dir().join("settings.json")
    }

    /// Write down for nodes to come.
    pub fn store(&self) -> Result<()> {
        fs::write(Self::file(), serde_json::to_vec(self)?).context("writing the lab's settings")
    }

    /// Read what [`Self::store`] wrote.
    pub fn load() -> Result<Self> {
        Ok(serde_json::from_slice(&fs::read(Self::file()).context("reading the lab's settings")?)?)
    }
}

/// The directory that holds what survives the node's power cuts.
pub fn disk_dir(node: Node) -> PathBuf {
    places::run_dir().join("nodes").join(node.name).join("disk")
}

/// `node-start NAME`: make the namespaces. Single-threaded, so that `unshare` works without any unsafe code.
pub fn start(name: &str) -> Result<()> {
    let node = net::node(name)?;
    unshare(
        CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )
    .context("making the node's namespaces")?;
    let mut init = Command::new(std::env::current_exe()?)
        .args(["node-init", node.name])
        .stdin(Stdio::inherit())
        .stdout(Stdio::from(fs::OpenOptions::new().append(true).open("/dev/stderr").context("opening the console")?))
        .spawn()
        .context("starting the node's init")?;
    println!("{}", init.id());
    std::io::stdout().flush()?;
    init.wait().context("waiting for the node's init")?;
    Ok(())
}

/// `node-init NAME`: process 1 of the node.
pub fn init(name: &str) -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("tying this process to node-start's life")?;
    let node = net::node(name)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("waiting for the network")?;
    if line.trim() != "go" {
        return Ok(()); // the BMC gave up
    }
    let settings = Settings::load()?;
    build_root(node, &settings)?;
    sethostname(node.name).context("setting the host name")?;
    net::configure_inside(node)?;
    configure(node, &settings)?;
    log(node, "booted");
    let services = Services::start(node)?;
    obey_power_button(node, services.clone());
    reap(node, &services)
}

fn log(node: Node, text: &str) {
    eprintln!("{} {}: {text}", places::now_ms(), node.name);
}

// ---------------------------------------------------------------------------------------------------------------- root

fn mounted(source: &str, target: &Path, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("creating {}", target.display()))?;
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} on {}", target.display()))
}

fn bound(source: &Path, target: &Path) -> Result<()> {
    if source.is_dir() {
        fs::create_dir_all(target).with_context(|| format!("creating {}", target.display()))?;
    }
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("binding {} to {}", source.display(), target.display()))
}

fn build_root(node: Node, settings: &Settings) -> Result<()> {
    let none = MsFlags::empty();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("making mounts private")?;
    let base = places::run_dir().join("nodes").join(node.name);
    let boot = base.join("boot");
    mounted("boot", &boot, "tmpfs", none, "mode=755")?;
    for dir in ["upper", "work", "root"] {
        fs::create_dir(boot.join(dir))?;
    }
    let root = boot.join("root");
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        settings.root.display(),
        boot.join("upper").display(),
        boot.join("work").display()
    );
    mounted("node", &root, "overlay", none, &layers)?;
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    mounted("proc", &inside("/proc"), "proc", none, "")?;
    mounted("sysfs", &inside("/sys"), "sysfs", MsFlags::MS_RDONLY, "")?;
    mounted("run", &inside("/run"), "tmpfs", none, "mode=755")?;
    mounted("tmp", &inside("/tmp"), "tmpfs", none, "mode=1777")?;
    build_dev(&inside("/dev"))?;
    // Pacemaker's last resort is sysrq: in here it would restart the whole host.
    if inside("/proc/sysrq-trigger").exists() {
        bound(&inside("/dev/null"), &inside("/proc/sysrq-trigger"))?;
    }
    for (name, target) in DISK {
        let on_disk = disk_dir(node).join(name);
        if !on_disk.exists() {
            fs::create_dir_all(disk_dir(node))?;
            let fresh = inside(target);
            fs::create_dir_all(&fresh)?;
            // With `cp -a` owner and mode are those that the packages chose.
            super::host::run_quiet(Command::new("cp").arg("-a").arg(&fresh).arg(&on_disk))?;
        }
        bound(&on_disk, &inside(target))?;
    }
    bound(&places::run_dir().join("bin"), &inside(places::NODE_BIN_DIR))?;
    bound(Path::new(places::BMC_DIR), &inside(places::BMC_DIR))?;
    // (pivot_root(".", ".") stacks the old root on the new one, from where it is detached: pivot_root(2), NOTES.)
    std::env::set_current_dir(&root)?;
    pivot_root(".", ".").context("moving into the node's root")?;
    umount2(".", MntFlags::MNT_DETACH).context("letting go of the outer root")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

fn build_dev(dev: &Path) -> Result<()> {
    let none = MsFlags::empty();
    mounted("dev", dev, "tmpfs", MsFlags::MS_NOSUID, "mode=755")?;
    let character = |name: &str, major, minor, mode| {
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(mode), makedev(major, minor))
            .and_then(|()| {
                // The umask has had its say; the mode is meant.
                nix::sys::stat::fchmodat(
                    nix::fcntl::AT_FDCWD,
                    &dev.join(name),
                    Mode::from_bits_truncate(mode),
                    nix::sys::stat::FchmodatFlags::FollowSymlink,
                )
            })
            .with_context(|| format!("making /dev/{name}"))
    };
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        character(name, major, minor, 0o666)?;
    }
    // Made even where KVM is absent: opening it then fails as it does on a host without the module.
    character("kvm", 10, 232, 0o660)?;
    fs::create_dir(dev.join("net"))?;
    character("net/tun", 10, 200, 0o666)?;
    mounted("shm", &dev.join("shm"), "tmpfs", none, &format!("mode=1777,size={SHM}"))?;
    mounted("devpts", &dev.join("pts"), "devpts", none, "newinstance,gid=5,mode=620,ptmxmode=666")?;
    for (link, target) in
        [("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        symlink(target, dev.join(link))?;
    }
    Ok(())
}

// -------------------------------------------------------------------------------------------------------- configuration

fn configure(node: Node, settings: &Settings) -> Result<()> {
    fs::write("/etc/hostname", format!("{}\n", node.name))?;
    let mut hosts = String::from("127.0.0.1 localhost\n");
    for n in NODES {
        hosts.push_str(&format!("{} {}\n", Plane::Management.address(n.host), n.name));
    }
    fs::write("/etc/hosts", hosts)?;
    fs::write("/etc/corosync/corosync.conf", corosync_conf(settings))?;
    let cluster_user = User::from_name("hacluster")?.context("the lab root has no user hacluster")?;
    let cluster_group = Group::from_name("haclient")?.context("the lab root has no group haclient")?;
    let (uid, gid) = (cluster_user.uid, cluster_group.gid);
    let owned_dir = |path: &str, mode: u32, uid: Uid, gid: Gid| -> Result<()> {
        fs::create_dir_all(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        chown(path, Some(uid), Some(gid))?;
        Ok(())
    };
    owned_dir("/run/crm", 0o750, uid, gid)?;
    owned_dir("/var/spool/understudy/alerts", 0o770, uid, gid)?;
    for dir in ["/run/resource-agents", "/run/corosync", "/run/lock", "/run/understudy"] {
        owned_dir(dir, 0o755, Uid::from_raw(0), Gid::from_raw(0))?;
    }
    fs::create_dir_all("/etc/pacemaker")?;
    fs::write("/etc/pacemaker/authkey", &settings.authkey)?;
    fs::set_permissions("/etc/pacemaker/authkey", fs::Permissions::from_mode(0o640))?;
    chown("/etc/pacemaker/authkey", Some(Uid::from_raw(0)), Some(gid))?;
    fs::write("/usr/local/sbin/systemctl", SYSTEMCTL)?;
    fs::set_permissions("/usr/local/sbin/systemctl", fs::Permissions::from_mode(0o755))?;
    install_links()
}

/// crmsh asks systemd whether the cluster runs, and works on files instead of the cluster when it does not.
const SYSTEMCTL: &str = r#"#!/bin/sh
# There is no systemd in the lab's nodes; this answers the one question that crmsh has for it.
case "$1 ${2%.service}" in
"is-active corosync") daemon=corosync ;;
"is-active pacemaker") daemon=pacemakerd ;;
"is-active pacemaker_remote") daemon=pacemaker-remoted ;;
*) echo "there is no systemd in the lab's nodes" >&2; exit 1 ;;
esac
if pidof "$daemon" >/dev/null; then echo active; else echo inactive; exit 3; fi
"#;

/// The lab's node is what `make install` makes of a real one: executables in one place, links where they are looked for.
fn install_links() -> Result<()> {
    let executable = Path::new(places::NODE_BIN_DIR);
    let link = |target: &Path, at: &Path| -> Result<()> {
        let _ = fs::remove_file(at);
        symlink(target, at).with_context(|| format!("linking {}", at.display()))
    };
    let ocf = executable.join("understudy-ocf");
    if ocf.exists() {
        super::host::run_quiet(Command::new(&ocf).arg("install")).context("linking the agents")?;
    }
    for entry in fs::read_dir(executable)? {
        let entry = entry?;
        link(&entry.path(), &Path::new("/usr/local/bin").join(entry.file_name()))?;
    }
    link(&executable.join("understudy-lab"), Path::new("/usr/sbin/fence_lab"))
}

/// The cluster's corosync.conf: knet, timings for the lab.
fn corosync_conf(settings: &Settings) -> String {
    let quorum = match settings.hosts.len() {
        2 => "two_node: 1\n  wait_for_all: 0",
        // Half of an even number goes on if the first node is in it.
        n if n % 2 == 0 => "auto_tie_breaker: 1\n  wait_for_all: 0",
        _ => "wait_for_all: 0",
    };
    let mut conf = format!(
        "totem {{\n  version: 2\n  cluster_name: understudy-lab\n  transport: knet\n  link_mode: passive\n  \
         crypto_cipher: none\n  crypto_hash: none\n  token: {}\n}}\n\
         system {{\n  sched_rr: no\n  move_to_root_cgroup: no\n  allow_knet_handle_fallback: yes\n}}\n\
         quorum {{\n  provider: corosync_votequorum\n  {quorum}\n}}\n\
         logging {{\n  to_logfile: yes\n  logfile: /var/log/corosync/corosync.log\n  to_syslog: no\n  to_stderr: no\n  \
         timestamp: hires\n}}\nnodelist {{\n",
        settings.token_ms
    );
    for n in NODES.iter().filter(|n| settings.hosts.iter().any(|host| host == n.name)) {
        conf.push_str(&format!("  node {{\n    name: {}\n    nodeid: {}\n", n.name, n.host));
        for (link, plane) in settings.links.iter().enumerate() {
            conf.push_str(&format!("    ring{link}_addr: {}\n", plane.address(n.host)));
        }
        conf.push_str("  }\n");
    }
    conf.push_str("}\n");
    conf
}

// ------------------------------------------------------------------------------------------------------------- services

/// The node's daemons, in the order in which they were started.
#[derive(Clone, Default)]
struct Services(Arc<Mutex<Vec<(&'static str, Pid)>>>);

impl Services {
    fn start(node: Node) -> Result<Self> {
        let services = Self::default();
        match node.kind {
            Kind::Cluster => {
                // Corosync would ask for real-time priority, which containers and some kernels refuse; niceness is always
                // to be had, and keeps a busy node from being taken for a dead one.
                services.spawn("corosync", &["nice", "-n", "-15", "corosync", "-f"])?;
                wait_for_corosync()?;
                log(node, "corosync is up");
                // Pacemaker has no priority of its own; here every guest of the estate shares two emulated CPUs with it.
                services.spawn("pacemakerd", &["nice", "-n", "-10", "pacemakerd", "-f"])?;
            }
            Kind::Board => services.spawn("pacemaker-remoted", &["nice", "-n", "-10", "pacemaker-remoted"])?,
            Kind::Server => {}
        }
        Ok(services)
    }

    fn spawn(&self, program: &'static str, argv: &[&str]) -> Result<()> {
        let child: Child = Command::new(argv[0])
            .args(&argv[1..])
            .env_clear()
            .env("PATH", PATH)
            .env("LANG", "C.UTF-8")
            .env("HOME", "/root")
            .env("PCMK_logfile", "/var/log/pacemaker/pacemaker.log")
            .env("PCMK_logfacility", "none")
            .env("PCMK_stderr", "no")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {program}"))?;
        let pid = Pid::from_raw(i32::try_from(child.id()).context("a process id out of range")?);
        self.list().push((program, pid));
        Ok(())
    }

    fn list(&self) -> std::sync::MutexGuard<'_, Vec<(&'static str, Pid)>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn wait_for_corosync() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answered = Command::new("corosync-cmapctl")
            .args(["-g", "runtime.votequorum.this_node_id"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if answered.is_ok_and(|s| s.success()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("corosync is not up after 60 s; its words are in /var/log/corosync/corosync.log");
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// A line on standard input is the power button: an orderly shutdown, as systemd would do it.
fn obey_power_button(node: Node, services: Services) {
    thread::spawn(move || {
        let mut line = String::new();
        if !matches!(std::io::stdin().lock().read_line(&mut line), Ok(1..)) {
            std::process::exit(1); // the BMC is gone; a node does not outlive its power supply
        }
        log(node, "shutting down");
        loop {
            let Some((name, pid)) = services.list().last().copied() else { break };
            log(node, &format!("stopping {name}"));
            let _ = kill(pid, Signal::SIGTERM);
            while services.list().iter().any(|(_, p)| *p == pid) {
                thread::sleep(Duration::from_millis(50));
            }
        }
        log(node, "off");
        std::process::exit(0);
    });
}

/// Process 1's duty. A service that ends is not started again: what follows is the cluster's decision.
fn reap(node: Node, services: &Services) -> Result<()> {
    loop {
        let ended = match wait() {
            Ok(WaitStatus::Exited(pid, code)) => (pid, format!("exited with {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, format!("was killed by {signal}")),
            Err(Errno::ECHILD) => {
                thread::sleep(Duration::from_millis(100));
                continue;
            }
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(e) => return Err(e).context("waiting for processes"),
        };
        let mut list = services.list();
        if let Some(at) = list.iter().position(|(_, pid)| *pid == ended.0) {
            let (name, _) = list.remove(at);
            log(node, &format!("{name} {}", ended.1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(hosts: &[&str], links: &[Plane]) -> Settings {
        Settings {
            token_ms: 1000,
            root: PathBuf::new(),
            authkey: String::new(),
            hosts: hosts.iter().map(ToString::to_string).collect(),
            links: links.to_vec(),
        }
    }

    #[test]
    fn corosync_gets_the_labs_hosts_on_their_links_and_no_board() {
        let conf = corosync_conf(&settings(&["n1", "n2"], &[Plane::Management, Plane::Business]));
        assert!(conf.contains("ring0_addr: 10.77.2.1\n    ring1_addr: 10.77.3.1"));
        assert!(conf.contains("ring0_addr: 10.77.2.2") && conf.contains("two_node: 1"));
        assert!(!conf.contains("b1") && !conf.contains("n3"));
        assert_eq!(conf.matches('{').count(), conf.matches('}').count());
        let conf = corosync_conf(&settings(&["n1", "n2", "n3", "n4"], &[Plane::Management]));
        assert!(conf.contains("ring0_addr: 10.77.2.4") && !conf.contains("ring1_addr") && !conf.contains("two_node"));
    }
}
