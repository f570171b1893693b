//! What block devices are asked with ioctls.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod sys {
    // BLKFLSBUF, linux/fs.h: write back and forget what this node's page cache has of a block device.
    nix::ioctl_none_bad!(flush_buffers, 0x1261);
}

/// Forget what this node's page cache has of a block device, after writing what is dirty.
///
/// # Errors
/// It needs CAP_SYS_ADMIN; what the device says.
pub fn forget_cache(device: &File) -> io::Result<()> {
    // SAFETY: it takes no argument, and changes no memory of this process.
    unsafe { sys::flush_buffers(device.as_raw_fd()) }?;
    Ok(())
}
