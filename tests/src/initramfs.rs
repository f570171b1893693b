//! Initramfs images: the `newc` cpio writer, a kernel's modules in load order, and the image of the demo guest.
//!
//! ```text
//! <root>/boot/vmlinuz-RELEASE                      ─► Kernel { release, vmlinuz }
//! <root>/lib/modules/RELEASE/modules.dep           ─► which modules, in which order
//! <root>/lib/modules/RELEASE/kernel/….ko[.xz]      ─► decompressed into the image
//! understudy-lab-guest (static)                    ─► /init
//! ```
//! The kernel takes an uncompressed archive as well as a compressed one; uncompressed is quicker to make and to boot.

use std::collections::BTreeSet;
use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

/// Modules that the demo guest uses when its kernel has them: virtio devices, the power button, its key events.
pub const GUEST_MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "virtio-rng", "button", "evdev"];

/// What a guest with a disk, and a network card, needs beside them. (ext4 asks for crc32c by algorithm, which modules.dep does not show.)
pub const DISK_MODULES: [&str; 4] = ["virtio_blk", "crc32c_generic", "ext4", "virtio_net"];

/// The triple of the static guest program.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// A cpio archive in the kernel's `newc` format (kernel documentation, `driver-api/early-userspace/buffer-format.rst`).
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory, with its parents, mode 0755. Asking for it again is no error.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let part = &path[..at];
            if !part.is_empty() && self.directories.insert(part.to_string()) {
                self.entry(part, 0o040_755, (0, 0), &[]);
            }
        }
    }

    /// A regular file with its parent directories; `mode` are the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path.trim_matches('/'), 0o100_000 | mode, (0, 0), content);
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path.trim_matches('/'), 0o120_777, (0, 0), target.as_bytes());
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path.trim_matches('/'), 0o020_000 | mode, (major, minor), &[]);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.trim_matches('/').rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let name_size = name.len() as u32 + 1;
        let fields = [self.inode, mode, 0, 0, links, 0, content.len() as u32, 0, 0, major, minor, name_size, 0];
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
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A kernel as Debian's packages install it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// E.g. `6.12.48+deb13-amd64`.
    pub release: String,
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// Where its modules are.
    pub modules: PathBuf,
}

/// The newest kernel installed below `root`.
pub fn find_kernel(root: &Path) -> Result<Kernel> {
    let boot = root.join("boot");
    let entries = fs::read_dir(&boot).with_context(|| format!("looking for a kernel in {}", boot.display()))?;
    let mut releases: Vec<String> = entries
        .flatten()
        .filter_map(|e| Some(e.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_string()))
        .filter(|r| root.join("lib/modules").join(r).join("modules.dep").exists())
        .collect();
    releases.sort_by_key(|r| version_key(r));
    let Some(release) = releases.pop() else {
        bail!("{} holds no kernel with modules; install the package linux-image-amd64 there", root.display());
    };
    let vmlinuz = boot.join(format!("vmlinuz-{release}"));
    let modules = root.join("lib/modules").join(&release);
    Ok(Kernel { release, vmlinuz, modules })
}

/// Numbers compare as numbers: 6.12.9 is older than 6.12.48.
fn version_key(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// What became of the modules that were asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Resolved {
    /// Paths below the kernel's module directory, in load order, dependencies included.
    pub load: Vec<String>,
    /// Compiled into the kernel: nothing to load.
    pub built_in: Vec<String>,
    /// The kernel does not have them.
    pub missing: Vec<String>,
}

/// Find `names` and what they need in `modules.dep` and `modules.builtin` (their contents are given).
pub fn resolve_modules(dep: &str, builtin: &str, names: &[&str]) -> Resolved {
    let lines: Vec<(&str, Vec<&str>)> = dep
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(module, needs)| (module.trim(), needs.split_whitespace().collect()))
        .collect();
    let mut resolved = Resolved::default();
    for name in names {
        let wanted = module_name(name);
        if let Some((module, needs)) = lines.iter().find(|(m, _)| module_name(m) == wanted) {
            // modules.dep lists all dependencies, each behind those that need it: load from the right to the left.
            for path in needs.iter().rev().chain([module]) {
                if !resolved.load.iter().any(|p| p == path) {
                    resolved.load.push((*path).to_string());
                }
            }
        } else if builtin.lines().any(|l| module_name(l) == wanted) {
            resolved.built_in.push((*name).to_string());
        } else {
            resolved.missing.push((*name).to_string());
        }
    }
    resolved
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` and `virtio_rng` are the same module.
fn module_name(path: &str) -> String {
    let file = path.trim().rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// A module's content, decompressed.
pub fn read_module(path: &Path) -> Result<Vec<u8>> {
    let name = path.to_string_lossy();
    if name.ends_with(".ko") {
        return fs::read(path).with_context(|| format!("reading {name}"));
    }
    ensure!(name.ends_with(".ko.xz"), "{name}: only plain and xz-compressed modules can be read");
    let mut input = BufReader::new(fs::File::open(path).with_context(|| format!("reading {name}"))?);
    let mut content = Vec::new();
    lzma_rs::xz_decompress(&mut input, &mut content).map_err(|why| anyhow::anyhow!("decompressing {name}: {why:?}"))?;
    Ok(content)
}

/// What [`build_guest_image`] did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuestImage {
    /// The kernel that the image belongs to.
    pub kernel: Kernel,
    /// The image.
    pub initrd: PathBuf,
    /// Its modules.
    pub modules: Resolved,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Write the demo guest's initramfs: `program` as /init, `modules` of the newest kernel below `root`.
pub fn build_guest_image(root: &Path, program: &Path, modules: &[&str], output: &Path) -> Result<GuestImage> {
    let kernel = find_kernel(root)?;
    let read = |name: &str| {
        let path = kernel.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let resolved = resolve_modules(&read("modules.dep")?, &read("modules.builtin").unwrap_or_default(), modules);

    let mut cpio = Cpio::new();
    for directory in ["dev", "proc", "sys", "run", "tmp"] {
        cpio.directory(directory);
    }
    // Without it the kernel starts /init with no standard streams at all.
    cpio.character_device("dev/console", 0o600, 5, 1);
    // And when there is no console to open, Rust's start-up code opens this in their place, or aborts.
    cpio.character_device("dev/null", 0o666, 1, 3);
    let init = fs::read(program).with_context(|| format!("reading the guest's program {}", program.display()))?;
    ensure!(is_static(&init), "{} is not statically linked; the guest has no loader for it", program.display());
    cpio.file("init", 0o755, &init);
    let mut list = String::new();
    for path in &resolved.load {
        let content = read_module(&kernel.modules.join(path))?;
        let inside = format!("/lib/modules/{}.ko", module_name(path));
        cpio.file(&inside, 0o644, &content);
        list.push_str(&inside);
        list.push('\n');
    }
    cpio.file("modules", 0o644, list.as_bytes());
    let image = cpio.finish();
    if let Some(parent) = output.parent() {
        fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    }
    fs::write(output, &image).with_context(|| format!("writing {}", output.display()))?;
    Ok(GuestImage { kernel, initrd: output.to_path_buf(), modules: resolved, bytes: image.len() as u64 })
}

/// Whether an ELF file needs no loader: no PT_INTERP program header.
fn is_static(elf: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let word = |at: usize, len: usize| -> Option<u64> {
        let bytes = elf.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0, |value, b| value << 8 | u64::from(*b)))
    };
    // ELF64: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let (Some(true), Some(offset), Some(size), Some(count)) =
        (elf.get(..5).map(|magic| magic == b"\x7fELF\x02"), word(32, 8), word(54, 2), word(56, 2))
    else {
        return false;
    };
    (0..count).all(|i| word((offset + i * size) as usize, 4).is_some_and(|kind| kind != u64::from(PT_INTERP)))
}

/// Build the guest's program with cargo, statically linked, and say where it is.
///
/// It is built for an explicit target, so that the static flags reach neither build scripts nor the other crates' builds
/// in the same `target_dir`.
pub fn build_guest_program(workspace: &Path, target_dir: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .current_dir(workspace)
        .args(["build", "--quiet", "--package", "understudy-lab-guest", "--target", GUEST_TARGET, "--target-dir"])
        .arg(target_dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .status()
        .with_context(|| format!("running {}", cargo.to_string_lossy()))?;
    ensure!(status.success(), "the guest's program could not be built ({status}); cargo's messages stand above");
    Ok(target_dir.join(GUEST_TARGET).join("debug").join("understudy-lab-guest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_what_cpio_expects() {
        let mut cpio = Cpio::new();
        cpio.file("a/b/c", 0o644, b"hello");
        cpio.file("a/b/d", 0o755, b"");
        cpio.symlink("a/l", "b/c");
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 4, 0);
        let mut names = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * i..at + 14 + 8 * i]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (size, name_size) = (field(6), field(11));
            names.push(String::from_utf8(bytes[at + 110..at + 110 + name_size - 1].to_vec()).unwrap());
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d", "a/l", "TRAILER!!!"]);
    }

    #[test]
    fn modules_come_in_load_order_and_once() {
        let dep = "kernel/x/virtio_pci.ko.xz: kernel/x/modern.ko.xz kernel/x/ring.ko.xz kernel/x/virtio.ko.xz\n\
                   kernel/x/virtio-rng.ko.xz: kernel/x/virtio.ko.xz\nkernel/x/virtio.ko.xz:\n";
        let builtin = "kernel/d/button.ko\n";
        let r = resolve_modules(dep, builtin, &["virtio_pci", "virtio_rng", "button", "evdev"]);
        let load: Vec<String> = r.load.iter().map(|p| module_name(p)).collect();
        assert_eq!(load, ["virtio", "ring", "modern", "virtio_pci", "virtio_rng"]);
        assert_eq!((r.built_in, r.missing), (vec!["button".to_string()], vec!["evdev".to_string()]));
    }

    #[test]
    fn the_newest_kernel_is_chosen_by_number_not_by_spelling() {
        let root = tempfile::tempdir().unwrap();
        for release in ["6.12.9-amd64", "6.12.48-amd64", "6.13-no-modules"] {
            fs::create_dir_all(root.path().join("boot")).unwrap();
            fs::write(root.path().join(format!("boot/vmlinuz-{release}")), "").unwrap();
            if !release.contains("no-modules") {
                let dir = root.path().join("lib/modules").join(release);
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("modules.dep"), "").unwrap();
            }
        }
        assert_eq!(find_kernel(root.path()).unwrap().release, "6.12.48-amd64");
        assert!(find_kernel(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn a_program_that_needs_a_loader_is_refused() {
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(!is_static(&own), "test programs are dynamically linked");
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(b""));
    }
}
