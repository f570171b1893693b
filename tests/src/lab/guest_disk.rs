//! The disk of the guests with databases and with clients: a small Debian with SQLite, PostgreSQL and a few servers on ext4, made once without mounting anything.
//!
//! The databases' files are made here too, so that the guest only has to start them. The image is beside its stamp in `target/lab/guest`; whoever uses it works on a
//! copy.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{host, places, root};

/// e2fsck checks the disk from itself. From `openssh-server` on: what a guest with clients serves (`tests/guest/src/services.sh`).
const PACKAGES: &[&str] =
    &["sqlite3", "postgresql-17", "e2fsprogs", "openssh-server", "iperf3", "busybox", "pv", "iproute2"];
/// Room for what the guest writes.
const FREE_MIB: u64 = 96;
/// Journal, MiB: the least that mke2fs makes, so that it wraps around often.
const JOURNAL_MIB: u64 = 4;

/// What databases do not need goes; then PostgreSQL's cluster and its one table are made, with small logs and frequent checkpoints, as a guest that is cut every few
/// seconds must live through all that they do. (The host's /dev, /proc and /sys are mounted in the tree meanwhile: nothing there is touched.)
const HOOK: &str = r#"set -e
cd "$1"
chroot . install -d -o postgres -g postgres -m 700 work/postgres
data=/work/postgres bin=/usr/lib/postgresql/17/bin
as_postgres() { chroot . setpriv --reuid=postgres --regid=postgres --clear-groups env LC_ALL=C "$@"; }
as_postgres $bin/initdb -D $data --auth=trust --locale=C --encoding=UTF8 --wal-segsize=1 --no-sync \
  -c shared_memory_type=mmap -c dynamic_shared_memory_type=mmap -c timezone=GMT -c log_timezone=GMT
cat >> .$data/postgresql.conf <<END
listen_addresses = ''
max_connections = 5
shared_buffers = 8MB
fsync = on
synchronous_commit = on
full_page_writes = on
checkpoint_timeout = 30s
min_wal_size = 2MB
max_wal_size = 4MB
max_worker_processes = 0
max_parallel_workers = 0
jit = off
END
printf '%s\n' 'CREATE EXTENSION amcheck;' 'CREATE TABLE t (n bigint PRIMARY KEY, note text);' 'CREATE INDEX notes ON t (note);' \
  | as_postgres $bin/postgres --single -D $data postgres > /dev/null
rm -rf usr/lib/x86_64-linux-gnu/libLLVM* usr/lib/x86_64-linux-gnu/libz3* usr/lib/llvm* usr/lib/postgresql/17/lib/bitcode usr/lib/postgresql/17/lib/llvmjit*
rm -rf usr/lib/x86_64-linux-gnu/perl* usr/share/perl* usr/lib/x86_64-linux-gnu/gconv usr/share/zoneinfo usr/share/i18n usr/share/doc usr/share/bash-completion
rm -rf var/cache var/lib/apt var/lib/dpkg var/log boot usr/lib/systemd usr/lib/udev usr/lib/locale
"#;

fn stamp() -> String {
    format!("{}\n{FREE_MIB} {JOURNAL_MIB}\n{HOOK}", PACKAGES.join(" "))
}

/// The image; made first if it is not there or was made of something else.
pub fn ensure() -> Result<PathBuf> {
    let image = places::lab_dir()?.join("guest/disk.img");
    let stamp_file = image.with_extension("stamp");
    let current = || image.exists() && fs::read_to_string(&stamp_file).is_ok_and(|s| s == stamp());
    if current() {
        return Ok(image);
    }
    if places::in_vm() {
        anyhow::bail!("the guest's disk is not at {}: run `understudy-lab guest-disk` on the host", image.display());
    }
    let _one_at_a_time = root::lock()?;
    if current() {
        return Ok(image);
    }
    let tree = image.with_extension("root");
    root::bootstrap("the guest's disk", &tree, PACKAGES, HOOK)?;
    let fresh = image.with_extension("img.new");
    let made = make_image(&tree, &fresh);
    root::remove_tree(&tree)?;
    made?;
    fs::rename(&fresh, &image).context("renaming the guest's disk")?;
    fs::write(&stamp_file, stamp()).context("writing the stamp of the guest's disk")?;
    Ok(image)
}

fn make_image(tree: &Path, image: &Path) -> Result<()> {
    host::need_tools(&[("mke2fs", "e2fsprogs")])?;
    let used = host::run_quiet(Command::new("du").args(["-sm"]).arg(tree))?;
    let used: u64 = used.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).context("du printed no size")?;
    let _ = fs::remove_file(image);
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-m", "0", "-L", "guest", "-J", &format!("size={JOURNAL_MIB}"), "-d"]);
    command.arg(tree).arg(image).arg(format!("{}M", used + used / 8 + FREE_MIB));
    host::run_quiet(&mut command).map(drop)
}
