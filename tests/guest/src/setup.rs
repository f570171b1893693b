//! What process 1 finds missing: mounted file systems and loaded modules. Complaints go to standard error (the
//! kernel's console); nothing here is fatal.

use std::fs::File;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::system::finit_module;

use crate::output::complain;

/// Mount /proc, /sys and /dev.
pub fn mount_kernel_file_systems() {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = std::fs::create_dir_all(at);
        match mount(kind, at, kind, MountFlags::NOSUID, None) {
            // EBUSY: the kernel has mounted devtmpfs by itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(why) => complain(&format!("cannot mount {kind} on {at}: {why}")),
        }
    }
}

/// Load the modules that `list` names, one path a line, in that order.
pub fn load_modules(list: &str) {
    let Ok(text) = std::fs::read_to_string(list) else {
        complain(&format!("no {list}, no modules are loaded"));
        return;
    };
    for path in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        match File::open(path).map_err(|e| e.to_string()).and_then(|file| match finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(why) => Err(why.to_string()),
        }) {
            Ok(()) => {}
            Err(why) => complain(&format!("module {path} is not loaded: {why}")),
        }
    }
}
