//! The lab VM's initramfs: this executable as `/init`, the C library it needs, and the kernel modules that lead to the root.
//!
//! Written by hand (the "newc" cpio format is a page long) and left uncompressed: under software emulation reading is
//! cheap and unpacking is not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Modules needed before the root is mounted; dependencies are added. (ext4 asks for crc32c by algorithm, which modules.dep
/// does not show.)
const MODULES: &[&str] =
    &["crc32c_generic", "virtio_blk", "ext4", "overlay", "9p", "9pnet_virtio", "virtio_net", "virtio_rng"];

/// Where in the initramfs the modules' load order is written.
pub const MODULE_LIST: &str = "modules.order";

/// Build the archive for `root`'s kernel with `exe` as first process.
pub fn build(root: &Path, exe: &Path) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for dir in ["dev", "proc", "sys", "lib64", "lib", "lib/x86_64-linux-gnu", "modules", "root", "lower", "upper"] {
        archive.dir(dir);
    }
    archive.file("init", 0o755, &fs::read(exe).with_context(|| format!("reading {}", exe.display()))?);
    archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &read_following(root, "lib64/ld-linux-x86-64.so.2")?);
    for lib in ["libc.so.6", "libgcc_s.so.1", "libm.so.6"] {
        let path = format!("usr/lib/x86_64-linux-gnu/{lib}");
        archive.file(&format!("lib/x86_64-linux-gnu/{lib}"), 0o755, &read_following(root, &path)?);
    }
    let mut order = String::new();
    for module in load_order(root)? {
        let name = module.file_name().context("a module without a name")?.to_string_lossy().into_owned();
        archive.file(
            &format!("modules/{name}"),
            0o644,
            &fs::read(&module).with_context(|| format!("reading {}", module.display()))?,
        );
        order.push_str(&name);
        order.push('\n');
    }
    archive.file(MODULE_LIST, 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// The module files for [`MODULES`], dependencies first.
fn load_order(root: &Path) -> Result<Vec<PathBuf>> {
    let modules = root.join("usr/lib/modules");
    let kernel = kernel_release(root)?;
    let base = modules.join(&kernel);
    let dep = fs::read_to_string(base.join("modules.dep"))
        .with_context(|| format!("reading the module dependencies of kernel {kernel}"))?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for wanted in MODULES {
        // modules.dep: `path: dep dep …`, the nearest dependency first, so loading goes from the end.
        let is_wanted = |path: &str| {
            Path::new(path)
                .file_name()
                .is_some_and(|n| n.to_string_lossy().split('.').next().is_some_and(|n| n.replace('-', "_") == *wanted))
        };
        let Some((path, deps)) = dep.lines().filter_map(|l| l.split_once(':')).find(|(p, _)| is_wanted(p)) else {
            continue; // built into this kernel
        };
        for module in deps.split_ascii_whitespace().rev().chain([path]) {
            if seen.insert(module.to_string()) {
                order.push(base.join(module));
            }
        }
    }
    if order.is_empty() {
        bail!("kernel {kernel} in the lab root has none of the modules that the lab VM needs");
    }
    Ok(order)
}

/// The version of the kernel that `boot/vmlinuz` points to.
fn kernel_release(root: &Path) -> Result<String> {
    let link = fs::read_link(root.join("boot/vmlinuz")).context("reading the lab root's boot/vmlinuz link")?;
    let name = link.to_string_lossy().into_owned();
    Ok(name.strip_prefix("vmlinuz-").context("the lab root's kernel has an unexpected name")?.to_string())
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

/// A "newc" cpio archive under construction (the kernel's Documentation/driver-api/early-userspace/buffer-format).
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    /// Add a directory.
    pub fn dir(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Add a regular file with permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, content);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        // magic, then 13 fields of 8 hex digits: ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor
        // rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        while self.bytes.len() % 4 != 0 {
            self.bytes.push(0);
        }
    }

    /// Close the archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_starts_on_a_four_byte_border_with_its_length_in_hex() {
        let mut archive = Cpio::default();
        archive.dir("dev");
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = text.find("init\0").unwrap() - 110;
        assert_eq!(at % 4, 0);
        assert_eq!(&text[at..at + 6], "070701");
        assert_eq!(&text[at + 6 + 6 * 8..at + 6 + 7 * 8], "00000005");
        assert!(text.contains("TRAILER!!!"));
    }
}
