//! The disk without its machine: what waits is merged, and then Linux's own tools look at it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::lab::{host, places};

/// Mounts in a namespace of their own, so that nothing is left mounted. The kernel replays the journal, e2fsck (the disk's own: not every host has one) wants everything whole after it,
/// and the guest's own program opens the databases and says what is in them.
const SCRIPT: &str = r#"set -e
mkdir -p "$2"
loop=$(losetup --find --show "$1")
trap 'losetup --detach "$loop"' EXIT
mount "$loop" "$2"
umount "$2"
mount -o ro "$loop" "$2"
for at in run tmp; do mount -t tmpfs -o mode=1777 tmpfs "$2/$at"; done
mount -t devtmpfs devtmpfs "$2/dev"
mkdir -p "$2/dev/shm"
mount -t proc proc "$2/proc"
chroot "$2" /usr/sbin/e2fsck -f -n "$loop" >&2
mount -o remount,rw "$2"
cp "$3" "$2/tmp/look"
chroot "$2" /tmp/look
umount "$2/run" "$2/tmp" "$2/dev" "$2/proc" "$2"
"#;

/// What is on `disk`, as the guest's line would say it; an error if anything is damaged. The disk itself is examined: it has served its time.
pub fn examine(disk: &Path, slices: &Path, dir: &Path) -> Result<String> {
    let tool = places::bin_dir()?.join("understudy-disk");
    host::run_quiet(Command::new(tool).arg("merge").arg(disk).arg("--slices").arg(slices))
        .context("merging what waits")?;
    let _ = Command::new("modprobe").args(["-q", "loop"]).status();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT, "sh"]);
    command.arg(disk).arg(dir.join("look")).arg(places::bin_dir()?.join("understudy-lab-guest"));
    let said = host::run_quiet(&mut command).context("the disk after the end")?;
    Ok(said.lines().last().unwrap_or_default().to_string())
}
