//! The lab VM's initramfs: this executable as `/init`, the C library it needs, and the kernel modules that lead to the root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::initramfs::{Cpio, find_kernel, read_module, resolve_modules};

/// Modules needed before the root is mounted; dependencies are added. (ext4 asks for crc32c by algorithm, which modules.dep
/// does not show.)
const MODULES: &[&str] =
    &["crc32c_generic", "virtio_blk", "ext4", "overlay", "9p", "9pnet_virtio", "virtio_net", "virtio_rng"];

/// Where in the initramfs the modules' load order is written: one path a line.
pub const MODULE_LIST: &str = "/modules.order";

/// The token that proves a client's right to give commands (see [`super::channel`]).
pub const TOKEN: &str = "/token";

/// Build the archive for `root`'s kernel with `exe` as first process.
pub fn build(root: &Path, exe: &Path, token: &str) -> Result<Vec<u8>> {
    let mut archive = Cpio::new();
    for dir in ["dev", "proc", "sys", "root", "lower", "upper"] {
        archive.directory(dir);
    }
    archive.file("init", 0o755, &fs::read(exe).with_context(|| format!("reading {}", exe.display()))?);
    archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &read_following(root, "lib64/ld-linux-x86-64.so.2")?);
    for lib in ["libc.so.6", "libgcc_s.so.1", "libm.so.6"] {
        let content = read_following(root, &format!("usr/lib/x86_64-linux-gnu/{lib}"))?;
        archive.file(&format!("lib/x86_64-linux-gnu/{lib}"), 0o755, &content);
    }
    let kernel = find_kernel(root)?;
    let read = |name: &str| {
        let path = kernel.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let resolved = resolve_modules(&read("modules.dep")?, &read("modules.builtin")?, MODULES);
    if !resolved.missing.is_empty() {
        bail!("kernel {} in the lab root has no module {}", kernel.release, resolved.missing.join(", "));
    }
    let mut order = String::new();
    for module in &resolved.load {
        let name = module.rsplit('/').next().unwrap_or_default().trim_end_matches(".xz");
        archive.file(&format!("modules/{name}"), 0o644, &read_module(&kernel.modules.join(module))?);
        order.push_str(&format!("/modules/{name}\n"));
    }
    archive.file(TOKEN, 0o600, token.as_bytes());
    archive.file(MODULE_LIST, 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// Read a file of the root, following symbolic links inside the root (they may be absolute).
fn read_following(root: &Path, path: &str) -> Result<Vec<u8>> {
    let mut path = PathBuf::from(path);
    for _ in 0..8 {
        let full = root.join(&path);
        match fs::read_link(&full) {
            Ok(target) if target.is_absolute() => path = target.strip_prefix("/").unwrap_or(&target).to_path_buf(),
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return fs::read(&full).with_context(|| format!("reading {}", full.display())),
        }
    }
    bail!("{}: too many symbolic links in the lab root", path.display())
}
