//! The lab root: a private Debian with the cluster stack, built once with mmdebstrap and shared read-only by all nodes.
//!
//! Nothing is installed on the host for it but build tools, and nothing in it is started while it is made (mmdebstrap puts
//! a policy-rc.d in place). It is made beside its final place and renamed, so an aborted attempt leaves nothing that
//! looks finished. The stamp names what it was made of; a changed list makes a new root.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use nix::fcntl::{Flock, FlockArg};

use super::{host, places};

/// The release: Pacemaker 3.0, Corosync 3.1.9, crmsh 5, kernel 6.12.
const SUITE: &str = "trixie";

/// What is installed in it. `ocf-tester` comes with resource-agents; the kernel serves the lab VM and the protected
/// machines alike; QEMU is what `make bench` is compared with; an NFS server, an iSCSI target and the host's initiator are storage for disks; Exim
/// takes the mails of alerts; the last four are clients of a protected guest's services.
const PACKAGES: &[&str] = &[
    "corosync",
    "pacemaker",
    "pacemaker-cli-utils",
    "crmsh",
    "pcs",
    "resource-agents",
    "iproute2",
    "nftables",
    "linux-image-amd64",
    "kmod",
    "procps",
    "python3",
    "libxml2-utils",
    "socat",
    "xz-utils",
    "qemu-system-x86",
    "seabios",
    "nfs-kernel-server",
    "tgt",
    "open-iscsi",
    "exim4-daemon-light",
    "openssh-client",
    "curl",
    "postgresql-client-17",
    "iperf3",
];

/// pacemaker-remote conflicts with pacemaker as a package (one host is one or the other); our one root serves both kinds of
/// host, so only its daemon is taken. The rest of what it needs comes with pacemaker.
const ADD_REMOTED: &str = r#"set -e
rm -rf "$1/tmp/remoted"; mkdir "$1/tmp/remoted"
chroot "$1" sh -c 'cd /tmp/remoted && apt-get -qq download pacemaker-remote && dpkg-deb -x pacemaker-remote_*.deb x && cp -a x/usr/sbin/pacemaker-remoted /usr/sbin/'
rm -rf "$1/tmp/remoted"
kernel=$(basename "$(ls "$1"/boot/vmlinuz-* | sort -V | tail -n 1)")
ln -sf "$kernel" "$1/boot/vmlinuz"
mkdir -p "$1/usr/libexec/understudy" "$1/usr/lib/ocf/resource.d/understudy" "$1/etc/understudy" "$1/var/lib/understudy"
rm -f "$1"/etc/corosync/corosync.conf "$1"/etc/pacemaker/authkey "$1"/boot/initrd.img-*
"#;

fn stamp() -> String {
    format!("{SUITE}\n{}\n{ADD_REMOTED}", PACKAGES.join(" "))
}

/// Make sure that the root exists and is current; its path.
pub fn ensure() -> Result<PathBuf> {
    let root = places::root_dir()?;
    if is_current(&root) {
        return Ok(root);
    }
    if places::in_vm() {
        bail!("the lab VM has no lab root at {}: run `understudy-lab root` on the host", root.display());
    }
    let _one_at_a_time = lock()?;
    if !is_current(&root) {
        build(&root)?;
    }
    Ok(root)
}

/// Two builds at once would tear each other's trees down.
pub(super) fn lock() -> Result<Flock<fs::File>> {
    let dir = places::lab_dir()?;
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let file = fs::File::create(dir.join("lock")).with_context(|| format!("creating the lock in {}", dir.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            eprintln!("lab: waiting for another process that builds the lab root");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).context("waiting for the lock")
        }
    }
}

fn stamp_file(root: &Path) -> PathBuf {
    root.with_extension("stamp")
}

fn is_current(root: &Path) -> bool {
    // Inside the lab VM the root came in as an image: its presence is its stamp.
    root.join("usr/sbin/pacemakerd").exists()
        && (places::in_vm() || fs::read_to_string(stamp_file(root)).is_ok_and(|s| s == stamp()))
}

fn build(root: &Path) -> Result<()> {
    let _ = fs::remove_file(stamp_file(root));
    bootstrap("the lab root", root, PACKAGES, ADD_REMOTED)?;
    fs::write(stamp_file(root), stamp()).context("writing the lab root's stamp")
}

/// Make a Debian in the directory `root`, in place of what is there: `packages`, and then what `hook` does to it.
pub(super) fn bootstrap(name: &str, root: &Path, packages: &[&str], hook: &str) -> Result<()> {
    host::need_root("Building a private Debian")?;
    host::need_tools(&[
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("unshare", "util-linux"),
        ("gpgv", "gpgv"),
        ("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    ])?;
    let started = Instant::now();
    let mirror = mirror()?;
    let parent = root.parent().with_context(|| format!("{name} has no parent directory"))?;
    fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let fresh = root.with_extension("new");
    for old in [&fresh, root] {
        remove_tree(old)?;
    }
    eprintln!("lab: building {name}: Debian {SUITE} from {mirror} (once; about two minutes)");

    let log_path = root.with_extension("log");
    let mut command = Command::new("unshare");
    // In a mount namespace of its own, so that an aborted run cannot leave /proc or /sys mounted inside the tree.
    command.args(["--mount", "--propagation", "private", "mmdebstrap"]);
    command.args(["--variant=minbase", "--mode=root", "--architectures=amd64"]);
    command.arg(format!("--include={}", packages.join(",")));
    command.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"]);
    for excluded in ["man", "locale", "doc", "info", "help"] {
        command.arg(format!("--dpkgopt=path-exclude=/usr/share/{excluded}/*"));
    }
    for option in apt_acquire_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(format!("--customize-hook={hook}"));
    command.arg(SUITE).arg(&fresh).arg(&mirror);
    // The lab has initramfs images of its own making: update-initramfs would only cost half a minute.
    command.env("INITRD", "No").env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting mmdebstrap")?;
    let mut log = fs::File::create(&log_path).with_context(|| format!("creating {}", log_path.display()))?;
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n') {
            use std::io::Write as _;
            let line = String::from_utf8_lossy(&line.context("reading mmdebstrap's output")?).into_owned();
            let _ = writeln!(log, "{line}");
            if let Some(step) = line.strip_prefix("I: ") {
                eprintln!("lab:   {:>4} s  {step}", started.elapsed().as_secs());
            }
        }
    }
    let status = child.wait().context("waiting for mmdebstrap")?;
    if !status.success() {
        bail!("mmdebstrap failed ({status}); the end of {}:\n{}", log_path.display(), tail(&log_path, 15));
    }
    fs::rename(&fresh, root).with_context(|| format!("renaming {} to {}", fresh.display(), root.display()))?;
    eprintln!("lab: {name} is ready after {} s", started.elapsed().as_secs());
    Ok(())
}

/// The root as an ext4 image, for the lab VM: a block device with a page cache is many times faster under software
/// emulation than a shared directory.
pub fn ensure_image() -> Result<PathBuf> {
    let root = ensure()?;
    let image = root.with_extension("img");
    let newer = |a: &Path, b: &Path| -> bool {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
        matches!((time(a), time(b)), (Some(a), Some(b)) if a >= b)
    };
    if newer(&image, &stamp_file(&root)) {
        return Ok(image);
    }
    let _one_at_a_time = lock()?;
    if newer(&image, &stamp_file(&root)) {
        return Ok(image);
    }
    host::need_tools(&[("mke2fs", "e2fsprogs")])?;
    let mib = host::run_quiet(Command::new("du").args(["-sm", "--apparent-size"]).arg(&root))?
        .split_ascii_whitespace()
        .next()
        .and_then(|n| n.parse::<u64>().ok())
        .context("du did not print a size")?;
    let fresh = root.with_extension("img.new");
    let _ = fs::remove_file(&fresh);
    eprintln!("lab: making the lab VM's disk image from the lab root");
    host::run_quiet(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-L", "lab-root", "-d"])
            .arg(&root)
            .arg(&fresh)
            .arg(format!("{}M", mib + mib / 4 + 128)),
    )?;
    fs::rename(&fresh, &image).context("renaming the lab VM's disk image")?;
    Ok(image)
}

/// The mirror that the host itself uses: the user (or the network) has chosen it for a reason.
fn mirror() -> Result<String> {
    if let Ok(mirror) = std::env::var("UNDERSTUDY_MIRROR") {
        return Ok(mirror);
    }
    let targets = |field: &str| {
        host::run_quiet(Command::new("apt-get").args(["indextargets", "--format", field, "Created-By: Packages"]))
    };
    let listed = targets("$(REPO_URI) $(ORIGIN) $(CODENAME)").unwrap_or_default();
    pick_mirror(&listed).with_context(|| {
        format!(
            "no Debian mirror found in this host's apt sources; name one: \
             UNDERSTUDY_MIRROR=http://MIRROR/debian (apt listed: {listed:?})"
        )
    })
}

fn pick_mirror(listed: &str) -> Option<String> {
    let usable = |uri: &&str| {
        ["http://", "https://", "file:/"].iter().any(|s| uri.starts_with(s))
            && !uri.contains("security")
            && !uri.contains("snapshot")
    };
    let rows = || listed.lines().map(|l| l.split_ascii_whitespace().collect::<Vec<_>>());
    let by_origin = rows().find(|r| r.get(1) == Some(&"Debian") && r.first().is_some_and(&usable));
    // Before the first `apt-get update` apt does not know origins; Debian mirrors end in /debian by convention.
    let by_name =
        || rows().find(|r| r.first().is_some_and(|u| usable(u) && u.trim_end_matches('/').ends_with("/debian")));
    by_origin.or_else(by_name)?.first().map(|u| u.trim_end_matches('/').to_string())
}

/// The host's settings for reaching the mirror (proxies, date checks) hold for the lab root too.
fn apt_acquire_options() -> Vec<String> {
    let Ok(dump) = host::run_quiet(Command::new("apt-config").arg("dump")) else { return Vec::new() };
    let wanted = |l: &&str| {
        ["Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::Retries"].iter().any(|p| l.starts_with(p))
            && !l.contains("User-Agent")
    };
    dump.lines().filter(wanted).map(|l| l.trim_end_matches(';').to_string()).collect()
}

/// Delete a tree, refusing as long as something is mounted in it (it might be the host's /dev).
pub(super) fn remove_tree(tree: &Path) -> Result<()> {
    if !tree.exists() {
        return Ok(());
    }
    let tree = tree.canonicalize().with_context(|| format!("resolving {}", tree.display()))?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    if let Some(mount) = mounts.lines().filter_map(|l| l.split(' ').nth(4)).find(|m| Path::new(m).starts_with(&tree)) {
        bail!("{mount} is still mounted inside the old lab root: unmount it (umount {mount}) and run this again");
    }
    fs::remove_dir_all(&tree).with_context(|| format!("deleting the old {}", tree.display()))
}

/// The last lines of a text file, for error messages.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_hosts_own_debian_archive() {
        let listed = "http://packages.example/tool Tool stable\n\
                      http://mirror.example/debian-security/ Debian bookworm-security\n\
                      http://mirror.example/debian/ Debian bookworm\n";
        assert_eq!(pick_mirror(listed).as_deref(), Some("http://mirror.example/debian"));
        let before_update = "http://mirror.example/debian/ $(ORIGIN) $(CODENAME)\n";
        assert_eq!(pick_mirror(before_update).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(pick_mirror("http://packages.example/tool Tool stable\n"), None);
    }
}
