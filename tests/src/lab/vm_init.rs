//! The lab VM's first process: from the initramfs to the agent.
//!
//! Loads the modules in the order that [`super::vm_image`] wrote down, mounts the lab root read-only with a tmpfs on top,
//! moves into it, brings up the network towards the host and serves [`super::vm_agent`]. Everything that goes wrong here
//! is a line on the console, which `understudy-lab vm up` shows when the VM does not answer.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::wait;

use super::{places, vm_agent, vm_image};

/// The lab directory inside the VM.
pub const LAB_DIR: &str = "/lab";
/// Where the host's directory of executables appears.
pub const BIN_DIR: &str = "/lab/bin";
/// Where the host's lab directory appears, writable.
const HOST_LAB_DIR: &str = "/lab/host";
/// Where the workspace appears, writable; commands start in it, as on the host.
const WORKSPACE_DIR: &str = "/lab/workspace";

/// Run as process 1 of the initramfs. Never returns: the VM powers off when this ends.
pub fn main() -> ! {
    match stage_one() {
        Ok(never) => match never {},
        Err(e) => eprintln!("lab VM: {e:#}"),
    }
    power_off()
}

fn power_off() -> ! {
    let _ = reboot(RebootMode::RB_POWER_OFF);
    loop {
        thread::park();
    }
}

fn stage_one() -> Result<std::convert::Infallible> {
    let none = MsFlags::empty();
    filesystem("devtmpfs", "/dev", "devtmpfs", none, "")?;
    filesystem("proc", "/proc", "proc", none, "")?;
    filesystem("sysfs", "/sys", "sysfs", none, "")?;
    let order = fs::read_to_string(vm_image::MODULE_LIST).context("reading the module list")?;
    for module in order.lines() {
        let file = fs::File::open(module).with_context(|| format!("opening {module}"))?;
        match finit_module(file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(e) => eprintln!("lab VM: module {module}: {e}"),
        }
    }
    filesystem("/dev/vda", "/lower", "ext4", MsFlags::MS_RDONLY | MsFlags::MS_NOATIME, "")?;
    filesystem("upper", "/upper", "tmpfs", none, "mode=755")?;
    for dir in ["/upper/up", "/upper/work"] {
        fs::create_dir(dir).with_context(|| format!("creating {dir}"))?;
    }
    filesystem("lab", "/root", "overlay", none, "lowerdir=/lower,upperdir=/upper/up,workdir=/upper/work")?;
    for dir in ["lab/root", "lab/bin", "lab/host", "lab/workspace"] {
        fs::create_dir_all(Path::new("/root").join(dir)).with_context(|| format!("creating {dir}"))?;
    }
    // Nodes take the read-only file system itself as their lower layer, not this VM's overlay of it.
    for (from, to) in
        [("/lower", "/root/lab/root"), ("/dev", "/root/dev"), ("/proc", "/root/proc"), ("/sys", "/root/sys")]
    {
        moved(from, to)?;
    }
    for file in ["/init", vm_image::TOKEN] {
        fs::copy(file, format!("/root/lab{file}")).with_context(|| format!("copying {file} into the root"))?;
    }
    std::env::set_current_dir("/root").context("entering the root")?;
    moved(".", "/")?;
    nix::unistd::chroot(".").context("changing to the root")?;
    std::env::set_current_dir("/").context("entering the root")?;
    let error = std::os::unix::process::CommandExt::exec(Command::new("/lab/init").arg("vm-init").arg("second"));
    Err(error).context("starting the second stage")
}

fn filesystem(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    mount(Some(source), target, Some(kind), flags, Some(options))
        .with_context(|| format!("mounting {kind} on {target}"))
}

fn moved(from: &str, to: &str) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .with_context(|| format!("moving {from} to {to}"))
}

/// Run as process 1 of the real root.
pub fn second() -> ! {
    if let Err(e) = stage_two() {
        eprintln!("lab VM: {e:#}");
        power_off();
    }
    // Process 1 is everybody's last parent.
    loop {
        if wait() == Err(Errno::ECHILD) {
            thread::sleep(std::time::Duration::from_millis(200));
        }
    }
}

fn stage_two() -> Result<()> {
    let none = MsFlags::empty();
    for dir in ["/run", "/tmp", "/dev/shm", "/dev/pts"] {
        fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    }
    filesystem("run", "/run", "tmpfs", none, "mode=755")?;
    filesystem("tmp", "/tmp", "tmpfs", none, "mode=1777")?;
    filesystem("shm", "/dev/shm", "tmpfs", none, "mode=1777,size=80%")?;
    filesystem("devpts", "/dev/pts", "devpts", none, "gid=5,mode=620,ptmxmode=666")?;
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        let _ = symlink(target, link);
    }
    nix::unistd::sethostname("lab").context("naming the VM")?;
    let share = "trans=virtio,version=9p2000.L,msize=512000";
    filesystem("bin", BIN_DIR, "9p", MsFlags::MS_RDONLY, &format!("{share},cache=mmap"))?;
    let writable = format!("{share},cache=none");
    filesystem("lab", HOST_LAB_DIR, "9p", none, &writable)?;
    // Without a workspace (the tools were installed) there is no such share, and commands start in an empty directory.
    if let Err(e) = filesystem("workspace", WORKSPACE_DIR, "9p", none, &writable) {
        eprintln!("lab VM: {e:#}");
    }
    let parameters: HashMap<String, String> = fs::read_to_string("/proc/cmdline")
        .context("reading the kernel command line")?
        .split_ascii_whitespace()
        .filter_map(|w| w.strip_prefix("lab.")?.split_once('='))
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    let vm = parameters.get("vm").context("no lab.vm on the kernel command line")?;
    for (name, at) in [("guest", "guest".to_string()), ("out", format!("vm-{vm}/out"))] {
        symlink(Path::new(HOST_LAB_DIR).join(at), Path::new(LAB_DIR).join(name)).context("linking the lab's parts")?;
    }
    for command in
        ["ip link set lo up", "ip link set eth0 up", "ip addr add 10.0.2.15/24 dev eth0", "modprobe kvm_amd nested=1"]
    {
        let mut words = command.split(' ');
        let status = Command::new(words.next().unwrap_or_default()).args(words).env("PATH", PATH).status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            eprintln!("lab VM: `{command}`: {status:?}");
        }
    }
    let exe = std::env::current_exe().context("finding this executable")?;
    Command::new(exe)
        .arg("vm-agent")
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env(places::ENV_IN_VM, "1")
        .env(places::ENV_LAB_DIR, LAB_DIR)
        .env(places::ENV_BIN_DIR, BIN_DIR)
        .current_dir(WORKSPACE_DIR)
        .spawn()
        .context("starting the agent")?;
    eprintln!("lab VM: ready");
    Ok(())
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/lab/bin";

/// What `vm-agent` does.
pub fn agent() -> Result<()> {
    let token = fs::read_to_string(format!("{LAB_DIR}{}", vm_image::TOKEN)).context("reading the VM's token")?;
    let _steady = steady_kvm();
    vm_agent::serve(&token)
}

/// A virtual machine that never runs, held for the life of the lab VM.
///
/// KVM patches its own code when the first vCPU of a host appears, when the last one vanishes, and when the number of vCPUs with
/// a software-disabled APIC leaves or reaches zero (its static keys). QEMU's multi-threaded emulation may execute code while it is
/// being patched: the lab VM's kernel dies of a stray `int3`. With this vCPU about, no key ever changes.
fn steady_kvm() -> Option<(kvm_ioctls::VmFd, kvm_ioctls::VcpuFd)> {
    let made = || -> Result<_, kvm_ioctls::Error> {
        let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
        vm.create_irq_chip()?;
        let vcpu = vm.create_vcpu(0)?;
        Ok((vm, vcpu))
    };
    made().inspect_err(|e| eprintln!("lab VM: no steady vCPU: {e}")).ok()
}
