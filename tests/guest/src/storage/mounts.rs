//! From the disk to a root directory: the file system's journal is replayed, the whole of it checked, and then it is the root.

use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::{chdir, chroot};

use super::{Result, told};

/// Where it is mounted first.
const AT: &str = "/disk";

/// Mount the ext4 on `device`, check it, make it this program's root. The result of `e2fsck -fn`, which must be 0; its words go to standard error.
pub fn enter(device: &str) -> Result<i32> {
    let _ = std::fs::create_dir_all(AT);
    let on = |flags| told(&format!("mounting {device}"), mount(device, AT, "ext4", flags, None));
    // The kernel replays the journal and tidies up deleted files that were open; a read-only mount of what is whole changes nothing any more.
    on(MountFlags::empty())?;
    told("unmounting after the journal's replay", unmount(AT, UnmountFlags::empty()))?;
    on(MountFlags::RDONLY)?;
    for (kind, name) in [("devtmpfs", "dev"), ("proc", "proc"), ("tmpfs", "run"), ("tmpfs", "tmp")] {
        let at = format!("{AT}/{name}");
        told(&format!("mounting {at}"), mount(kind, &at, kind, MountFlags::NOSUID, None))?;
    }
    told("entering the disk", chroot(AT).and_then(|()| chdir("/")))?;
    // Databases share memory through files there, and talk through sockets.
    let _ = std::fs::create_dir("/dev/shm");
    let _ = mount("tmpfs", "/dev/shm", "tmpfs", MountFlags::NOSUID, Some(c"mode=1777"));
    for dir in ["/run", "/tmp"] {
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        told("opening a directory to everybody", std::fs::set_permissions(dir, everybody))?;
    }
    let check = told("starting e2fsck", Command::new("/usr/sbin/e2fsck").args(["-f", "-n", device]).output())?;
    let said = [check.stdout, check.stderr].concat();
    crate::output::complain(&format!("e2fsck: {}", String::from_utf8_lossy(&said).trim()));
    told("mounting the disk for writing", mount_remount("/", MountFlags::NOATIME, ""))?;
    Ok(check.status.code().unwrap_or(-1))
}
