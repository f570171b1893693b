//! Direct boot of a Linux bzImage by its 64-bit entry point (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
//!
//! ```text
//! 0x00500 GDT         0x07000 boot_params (zero page)      0x09000 page tables: 4 GiB identity, 2 MiB pages
//! 0x20000 command line     0xe0000 ACPI     16 MiB (or where the kernel prefers) kernel     top of low RAM: initrd
//! ```
//! The same page tables and GDT serve flat guests ([`flat_start`]), which tests and benchmarks use.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{HIGH_START, Ram};

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PML4: u64 = 0x9000;
const CMDLINE: u64 = 0x20000;
/// Where ACPI tables go: RSDP first. Reserved in the memory map up to 1 MiB.
pub const ACPI_START: u64 = 0xe0000;
/// Where the BIOS area ends.
pub const BIOS_END: u64 = 0x10_0000;
const EBDA: u64 = 0x9fc00;
/// How much of the kernel is looked at for its header.
const HEAD: usize = 4096;
const KERNEL_DEFAULT: u64 = 0x100_0000;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const CR0_PE: u64 = 1;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR0_ET: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// A kernel and initrd on disk, checked. They are copied to guest RAM piece by piece and never held in this process.
#[derive(Debug)]
pub struct LinuxBoot {
    kernel: Source,
    initrd: Option<Source>,
    cmdline: Vec<u8>,
    /// The kernel's first bytes: boot sector and setup header.
    head: Vec<u8>,
}

/// An open file with its length.
#[derive(Debug)]
struct Source {
    file: File,
    len: u64,
    name: String,
}

impl Source {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok(Self { file, len, name: path.display().to_string() })
    }

    /// Copy everything from `offset` on to guest RAM at `to`.
    fn copy(&self, offset: u64, ram: &Ram, to: u64) -> Result<()> {
        let mut piece = vec![0; 256 * 1024];
        let mut at = offset;
        while at < self.len {
            let n = piece.len().min(usize::try_from(self.len - at).unwrap_or(usize::MAX));
            self.file.read_exact_at(&mut piece[..n], at).with_context(|| format!("cannot read {}", self.name))?;
            ram.mem.write_slice(&piece[..n], GuestAddress(to + (at - offset))).context("loading into guest RAM")?;
            at += n as u64;
        }
        Ok(())
    }
}

/// Where a vCPU starts.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// Linux: `boot_params`.
    pub rsi: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Run in ring 3 with I/O privilege (flat guests).
    pub user: bool,
}

/// The setup header's fields that a loader reads, by their offset in the file (boot.rst, "The Real-Mode Kernel Header").
struct Header<'a>(&'a [u8]);

impl Header<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let end = at + N;
        self.0.get(at..end).and_then(|s| s.try_into().ok()).context("the kernel image is truncated")
    }
    fn u8(&self, at: usize) -> Result<u64> {
        Ok(u64::from(u8::from_le_bytes(self.bytes(at)?)))
    }
    fn u16(&self, at: usize) -> Result<u64> {
        Ok(u64::from(u16::from_le_bytes(self.bytes(at)?)))
    }
    fn u32(&self, at: usize) -> Result<u64> {
        Ok(u64::from(u32::from_le_bytes(self.bytes(at)?)))
    }
    fn u64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(at)?))
    }
}

impl LinuxBoot {
    /// Open and check the files.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self> {
        let source = Source::open(kernel).with_context(|| {
            format!("cannot read the kernel {}; give --kernel a Linux bzImage, e.g. /boot/vmlinuz-…", kernel.display())
        })?;
        let mut head = vec![0; HEAD.min(usize::try_from(source.len).unwrap_or(HEAD))];
        source.file.read_exact_at(&mut head, 0).with_context(|| format!("cannot read {}", source.name))?;
        check(&head, cmdline).with_context(|| format!("cannot boot {}", source.name))?;
        let initrd = initrd
            .map(|path| Source::open(path).with_context(|| format!("cannot read the initrd {}", path.display())))
            .transpose()?;
        Ok(Self { kernel: source, initrd, cmdline: cmdline.as_bytes().to_vec(), head })
    }

    /// Put kernel, initrd, command line, boot parameters, page tables and GDT into `ram`.
    pub fn load(&self, ram: &Ram, rsdp: u64) -> Result<Entry> {
        let h = Header(&self.head);
        let setup_sectors = match h.u8(0x1f1)? {
            0 => 4,
            n => n,
        };
        let payload = (setup_sectors + 1) * 512;
        ensure!(payload < self.kernel.len, "the kernel {} is truncated", self.kernel.name);
        let initrd_len = self.initrd.as_ref().map_or(0, |i| i.len);
        let low_end = ram.low_end();
        let preferred = h.u64(0x258)?;
        let start = if h.u8(0x234)? != 0 { KERNEL_DEFAULT.max(preferred) } else { preferred };
        let needs = (self.kernel.len - payload).max(h.u32(0x260)?);
        let place = start.checked_next_multiple_of(h.u32(0x230)?.max(1)).and_then(|s| Some((s, s.checked_add(needs)?)));
        let Some((start, kernel_end)) = place else {
            bail!("the kernel {} asks for an address that no memory has ({preferred:#x})", self.kernel.name)
        };
        let initrd_max = low_end.min(h.u32(0x22c)? + 1);
        let initrd_at = initrd_max.saturating_sub(initrd_len) & !0xfff;
        if kernel_end > low_end || (initrd_len > 0 && initrd_at < kernel_end) {
            bail!(
                "the kernel (up to {} MiB) and its initrd ({} MiB) do not fit into {} MiB of RAM: raise --memory",
                kernel_end >> 20,
                initrd_len.div_ceil(1 << 20),
                ram.bytes() >> 20
            );
        }
        let mem = &ram.mem;
        self.kernel.copy(payload, ram, start)?;
        if let Some(initrd) = &self.initrd {
            initrd.copy(0, ram, initrd_at)?;
        }
        let mut cmdline = self.cmdline.clone();
        cmdline.push(0);
        mem.write_slice(&cmdline, GuestAddress(CMDLINE)).context("loading the command line")?;

        // boot_params: zero, then the kernel's own setup header, then what the loader fills in.
        let mut zero = vec![0u8; 4096];
        let header_end = (0x202 + h.u8(0x201)? as usize).min(0x290);
        let header = self.head.get(0x1f1..header_end).context("the kernel image is truncated")?;
        put(&mut zero, 0x1f1, header);
        put(&mut zero, 0x210, &[0xff]); // type_of_loader: none of the registered ones
        put(&mut zero, 0x228, &(CMDLINE as u32).to_le_bytes());
        if initrd_len > 0 {
            put(&mut zero, 0x218, &(initrd_at as u32).to_le_bytes());
            put(&mut zero, 0x21c, &(initrd_len as u32).to_le_bytes());
        }
        put(&mut zero, 0x070, &rsdp.to_le_bytes()); // acpi_rsdp_addr
        let map = e820(ram);
        put(&mut zero, 0x1e8, &[map.len() as u8]);
        for (i, (addr, size, kind)) in map.iter().enumerate() {
            let at = 0x2d0 + i * 20;
            put(&mut zero, at, &addr.to_le_bytes());
            put(&mut zero, at + 8, &size.to_le_bytes());
            put(&mut zero, at + 16, &kind.to_le_bytes());
        }
        mem.write_slice(&zero, GuestAddress(ZERO_PAGE)).context("writing the boot parameters")?;
        write_tables(ram, false)?;
        Ok(Entry { rip: start + 0x200, rsi: ZERO_PAGE, rsp: 0x8ff0, user: false })
    }
}

/// Whether `head` begins a kernel that can be booted with `cmdline`.
fn check(head: &[u8], cmdline: &str) -> Result<()> {
    let h = Header(head);
    let magic = (h.u16(0x1fe), h.bytes::<4>(0x202));
    ensure!(matches!(magic, (Ok(0xaa55), Ok(hdrs)) if &hdrs == b"HdrS"), "it is not a Linux bzImage");
    ensure!(h.u16(0x206)? >= 0x20c, "its boot protocol is older than 2.12; it lacks the 64-bit entry point");
    ensure!(h.u16(0x236)? & 1 != 0, "it has no 64-bit entry point");
    ensure!(!cmdline.as_bytes().contains(&0), "the command line contains a NUL");
    let max = h.u32(0x238)?;
    ensure!(cmdline.len() as u64 <= max, "the command line is {} bytes long, this kernel takes {max}", cmdline.len());
    Ok(())
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(target) = page.get_mut(at..at + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

/// The memory map: `(address, size, type)`.
fn e820(ram: &Ram) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, EBDA, E820_RAM), (EBDA, 0xa0000 - EBDA, E820_RESERVED)];
    map.push((ACPI_START, BIOS_END - ACPI_START, E820_RESERVED));
    for (start, size) in ram.ranges() {
        if start == 0 {
            map.push((BIOS_END, size.saturating_sub(BIOS_END), E820_RAM));
        } else if start >= HIGH_START {
            map.push((start, size, E820_RAM));
        }
    }
    map
}

/// GDT and identity page tables for the first 4 GiB, for ring 0 (Linux replaces them soon) or open to ring 3.
fn write_tables(ram: &Ram, user: bool) -> Result<()> {
    // null, unused, 0x10 code, 0x18 data, 0x20 user data, 0x28 user code: flat, present.
    let gdt: [u64; 6] =
        [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    let mem = &ram.mem;
    for (i, d) in gdt.iter().enumerate() {
        mem.write_obj(*d, GuestAddress(GDT + 8 * i as u64))?;
    }
    let flags: u64 = if user { 0x7 } else { 0x3 };
    let pdpt = PML4 + 0x1000;
    mem.write_slice(&[0; 6 * 4096], GuestAddress(PML4))?;
    mem.write_obj(pdpt | flags, GuestAddress(PML4))?;
    for gib in 0..4u64 {
        let pd = pdpt + 0x1000 * (gib + 1);
        mem.write_obj(pd | flags, GuestAddress(pdpt + 8 * gib))?;
        for i in 0..512u64 {
            let page = (gib << 30) | (i << 21);
            mem.write_obj(page | 0x80 | flags, GuestAddress(pd + 8 * i))?;
        }
    }
    Ok(())
}

/// Load `code` at `at` for a flat guest in ring 3: identity-mapped first 4 GiB, all of it writable and executable by the guest.
pub fn flat_start(ram: &Ram, code: &[u8], at: u64) -> Result<Entry> {
    ensure!(at >= 0x10000, "flat code belongs above the page tables, at 0x10000 or higher");
    write_tables(ram, true)?;
    ram.mem.write_slice(code, GuestAddress(at)).context("loading the flat code")?;
    Ok(Entry { rip: at, rsi: 0, rsp: 0x8ff0, user: true })
}

/// Put a vCPU's registers to `entry`: 64-bit mode, flat segments, interrupts off.
pub fn set_entry(sregs: &mut kvm_sregs, regs: &mut kvm_regs, entry: Entry) {
    let segment = |selector: u16, code: bool| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: selector | if entry.user { 3 } else { 0 },
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: if entry.user { 3 } else { 0 },
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let (code, data) = if entry.user { (0x28, 0x20) } else { (0x10, 0x18) };
    sregs.cs = segment(code, true);
    let data = segment(data, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR;
    sregs.efer |= EFER_LME | EFER_LMA;
    let iopl = if entry.user { 3 << 12 } else { 0 };
    *regs = kvm_regs { rip: entry.rip, rsi: entry.rsi, rsp: entry.rsp, rflags: 2 | iopl, ..Default::default() };
}

/// The head of a kernel that is taken for one and does nothing, with 1.5 KiB behind it: what tests change, and fuzzing starts from.
pub fn least_bzimage() -> Vec<u8> {
    let mut image = vec![0; 8 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]); // setup sectors
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x201, &[0x6a]); // where the header ends
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version 2.15
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest address of an initrd
    put(0x230, &0x20_0000u32.to_le_bytes()); // alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &[1]); // with a 64-bit entry
    put(0x238, &2047u32.to_le_bytes()); // longest command line
    put(0x258, &0x100_0000u64.to_le_bytes()); // where it prefers to be
    image
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn loaded(image: &[u8], initrd: &[u8], mib: u64) -> Result<(Ram, Entry)> {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("kernel"), image).unwrap();
        std::fs::write(path("initrd"), initrd).unwrap();
        let ram = Ram::open(&path("ram"), mib).unwrap();
        let linux = LinuxBoot::open(&path("kernel"), Some(&path("initrd")), "quiet")?;
        let entry = linux.load(&ram, ACPI_START)?;
        Ok((ram, entry))
    }

    #[test]
    fn the_kernel_finds_itself_its_initrd_its_command_line_and_its_memory() {
        let mut image = least_bzimage();
        image.extend_from_slice(b"kernel code");
        // The payload begins behind the boot sector and four setup sectors.
        let (ram, entry) = loaded(&image, b"initrd content", 32).unwrap();
        assert_eq!((entry.rip, entry.rsi, entry.user), (0x100_0200, ZERO_PAGE, false));
        let mut code = vec![0; 3 * 512 + 11];
        ram.mem.read_slice(&mut code, GuestAddress(0x100_0000)).unwrap();
        assert!(code.ends_with(b"kernel code"));
        let word = |at: u64| -> u32 { ram.mem.read_obj(GuestAddress(ZERO_PAGE + at)).unwrap() };
        let mut initrd = vec![0; word(0x21c) as usize];
        ram.mem.read_slice(&mut initrd, GuestAddress(u64::from(word(0x218)))).unwrap();
        assert_eq!(initrd, b"initrd content");
        let mut cmdline = [0; 6];
        ram.mem.read_slice(&mut cmdline, GuestAddress(u64::from(word(0x228)))).unwrap();
        assert_eq!(&cmdline, b"quiet\0");
        assert_eq!(word(0x70), ACPI_START as u32);
        let usable: u64 = e820(&ram).iter().filter(|(_, _, kind)| *kind == E820_RAM).map(|(_, size, _)| size).sum();
        assert_eq!(usable, (32 << 20) - BIOS_END + EBDA);
    }

    #[test]
    fn a_kernel_that_does_not_fit_is_refused_with_what_to_do() {
        let mut image = least_bzimage();
        image[0x260..0x264].copy_from_slice(&(64u32 << 20).to_le_bytes());
        let refused = loaded(&image, b"", 32).unwrap_err().to_string();
        assert!(refused.contains("raise --memory"), "{refused}");
    }

    proptest! {
        #[test]
        fn any_header_is_survived(noise in proptest::collection::vec(any::<u8>(), 0x80), len in 0usize..4096) {
            let mut image = least_bzimage();
            image[0x206..0x286].copy_from_slice(&noise);
            image.truncate(len);
            let _ = loaded(&image, b"initrd", 16);
        }
    }
}
