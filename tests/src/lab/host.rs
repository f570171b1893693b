//! What the host can do, and getting the tools that the lab needs from it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Where the cluster lab runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// On this machine: either its KVM runs whole operating systems, or this *is* the lab VM.
    Here,
    /// In the lab VM.
    Vm,
}

/// Choose, and say why in one line. `UNDERSTUDY_LAB_WHERE=host|vm` overrides.
pub fn choose() -> Result<(Where, String)> {
    if super::places::in_vm() {
        return Ok((Where::Here, "inside the lab VM".into()));
    }
    match std::env::var("UNDERSTUDY_LAB_WHERE").as_deref() {
        Ok("host") => return Ok((Where::Here, "the lab runs on this host, as UNDERSTUDY_LAB_WHERE asks".into())),
        Ok("vm") => return Ok((Where::Vm, "the lab runs in the lab VM, as UNDERSTUDY_LAB_WHERE asks".into())),
        Ok(other) => bail!("UNDERSTUDY_LAB_WHERE is \"{other}\"; it can be \"host\" or \"vm\""),
        Err(_) => {}
    }
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    Ok(judge(&cpuinfo, Path::new("/dev/kvm").exists(), Path::new("/sys/module/kvm_pvm").exists()))
}

/// The decision itself: full KVM is a virtualisation extension that the CPU shows, the device, and no software paging.
fn judge(cpuinfo: &str, dev_kvm: bool, pvm: bool) -> (Where, String) {
    let extension = cpuinfo
        .lines()
        .find(|l| l.starts_with("flags"))
        .and_then(|l| l.split_ascii_whitespace().find(|f| matches!(*f, "vmx" | "svm")));
    let vm = |why: &str| {
        (Where::Vm, format!("{why}: the lab runs in the lab VM (QEMU software emulation with nested AMD-V; slow)"))
    };
    match (extension, dev_kvm, pvm) {
        (_, false, _) => vm("this host has no /dev/kvm"),
        (_, true, true) => vm("this host's KVM is software-paged (kvm_pvm) and cannot run Linux"),
        (None, true, false) => vm("this host's CPU shows neither VT-x nor AMD-V"),
        (Some(ext), true, false) => {
            (Where::Here, format!("this host has full KVM ({ext}): the lab runs directly on it"))
        }
    }
}

/// Fail with a sentence unless root.
pub fn need_root(what: &str) -> Result<()> {
    if nix::unistd::Uid::effective().is_root() {
        return Ok(());
    }
    bail!("{what} needs root: it makes namespaces, mounts and network bridges of its own. Run it again with sudo.")
}

/// Make sure that each executable (or file, by absolute path) exists, installing the Debian package that has it.
pub fn need_tools(tools: &[(&str, &str)]) -> Result<()> {
    // Joining an absolute path replaces the directory, so both forms are covered.
    let missing = |tool: &str| {
        !["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"].iter().any(|d| Path::new(d).join(tool).exists())
    };
    let mut packages: Vec<&str> = tools.iter().filter(|(tool, _)| missing(tool)).map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !nix::unistd::Uid::effective().is_root() || missing("apt-get") {
        bail!("missing on this host: {list}. Install with: apt-get install --no-install-recommends {list}");
    }
    eprintln!("lab: installing {list} (host tools; no cluster software)");
    let install = || -> Result<bool> {
        let status = Command::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&packages)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("running apt-get install")?;
        Ok(status.success())
    };
    // A fresh machine has no package lists yet; a machine that has them is not made to wait for new ones.
    if install()? {
        return Ok(());
    }
    let _ = Command::new("apt-get").args(["update", "-qq"]).stdin(Stdio::null()).status();
    if install()? {
        return Ok(());
    }
    bail!("apt-get could not install {list}; its own words are above")
}

/// Make sure that taps can be made. (Where no udev makes device nodes ahead, the module has to be loaded by name.)
pub fn need_tun() -> Result<()> {
    let node = Path::new("/dev/net/tun");
    if !node.exists() {
        let _ = Command::new("modprobe").args(["-q", "tun"]).status();
    }
    if node.exists() {
        return Ok(());
    }
    bail!("there is no {}: this kernel has no module tun, or it is not installed", node.display())
}

/// Run a command, its output only shown when it fails.
pub fn run_quiet(command: &mut Command) -> Result<String> {
    let name = format!("{command:?}");
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("starting {name}"))?;
    if !out.status.success() {
        bail!(
            "{name} failed ({}): {}{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim_end(),
            String::from_utf8_lossy(&out.stdout).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_kvm_runs_the_lab_on_the_host() {
        let amd = "processor : 0\nflags\t\t: fpu svm sse2\n";
        let none = "flags\t\t: fpu sse2\n";
        assert_eq!(judge(amd, true, false).0, Where::Here);
        assert_eq!(judge(amd, true, true).0, Where::Vm);
        assert_eq!(judge(amd, false, false).0, Where::Vm);
        assert_eq!(judge(none, true, false).0, Where::Vm);
    }
}
