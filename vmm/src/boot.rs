//! Direct boot of a Linux bzImage by its 64-bit entry point (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
//!
//! ```text
//! 0x00500 GDT         0x07000 boot_params (zero page)      0x09000 page tables: 4 GiB identity, 2 MiB pages
//! 0x20000 command line     0xe0000 ACPI     16 MiB (or where the kernel prefers) kernel     top of low RAM: initrd
//! ```
//! The same page tables and GDT serve flat guests ([`flat_start`]), which tests and benchmarks use.

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

/// A kernel and initrd in this process's memory, to be loaded at power on and at every reset.
#[derive(Debug, Clone)]
pub struct LinuxBoot {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    cmdline: Vec<u8>,
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

fn align_up(x: u64, to: u64) -> u64 {
    x.div_ceil(to.max(1)) * to.max(1)
}

impl LinuxBoot {
    /// Read and check the files.
    pub fn read(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self> {
        let image = std::fs::read(kernel).with_context(|| {
            format!("cannot read the kernel {}; give --kernel a Linux bzImage, e.g. /boot/vmlinuz-…", kernel.display())
        })?;
        let initrd = match initrd {
            Some(path) => std::fs::read(path).with_context(|| format!("cannot read the initrd {}", path.display()))?,
            None => Vec::new(),
        };
        Self::new(image, initrd, cmdline).with_context(|| format!("cannot boot {}", kernel.display()))
    }

    /// From bytes.
    pub fn new(kernel: Vec<u8>, initrd: Vec<u8>, cmdline: &str) -> Result<Self> {
        let h = Header(&kernel);
        ensure!(h.u16(0x1fe)? == 0xaa55 && &h.bytes::<4>(0x202)? == b"HdrS", "it is not a Linux bzImage");
        ensure!(h.u16(0x206)? >= 0x20c, "its boot protocol is older than 2.12; it lacks the 64-bit entry point");
        ensure!(h.u16(0x236)? & 1 != 0, "it has no 64-bit entry point");
        ensure!(!cmdline.as_bytes().contains(&0), "the command line contains a NUL");
        let max = h.u32(0x238)?;
        ensure!(
            cmdline.len() as u64 <= max,
            "the command line is {} bytes long, this kernel takes {max}",
            cmdline.len()
        );
        Ok(Self { kernel, initrd, cmdline: cmdline.as_bytes().to_vec() })
    }

    /// Put kernel, initrd, command line, boot parameters, page tables and GDT into `ram`.
    pub fn load(&self, ram: &Ram, rsdp: u64) -> Result<Entry> {
        let h = Header(&self.kernel);
        let setup_sectors = match h.u8(0x1f1)? {
            0 => 4,
            n => n,
        };
        let payload =
            self.kernel.get(((setup_sectors + 1) * 512) as usize..).context("the kernel image is truncated")?;
        let low_end = ram.low_end();
        let preferred = h.u64(0x258)?;
        let start = if h.u8(0x234)? != 0 { KERNEL_DEFAULT.max(preferred) } else { preferred };
        let start = align_up(start, h.u32(0x230)?);
        let kernel_end = start + (payload.len() as u64).max(h.u32(0x260)?);
        let initrd_max = low_end.min(h.u32(0x22c)? + 1);
        let initrd_at = initrd_max.saturating_sub(self.initrd.len() as u64) & !0xfff;
        if kernel_end > low_end || (!self.initrd.is_empty() && initrd_at < kernel_end) {
            bail!(
                "the kernel (up to {} MiB) and its initrd ({} MiB) do not fit into {} MiB of RAM: raise --memory",
                kernel_end >> 20,
                (self.initrd.len() as u64).div_ceil(1 << 20),
                ram.bytes() >> 20
            );
        }
        let mem = &ram.mem;
        mem.write_slice(payload, GuestAddress(start)).context("loading the kernel")?;
        mem.write_slice(&self.initrd, GuestAddress(initrd_at)).context("loading the initrd")?;
        let mut cmdline = self.cmdline.clone();
        cmdline.push(0);
        mem.write_slice(&cmdline, GuestAddress(CMDLINE)).context("loading the command line")?;

        // boot_params: zero, then the kernel's own setup header, then what the loader fills in.
        let mut zero = vec![0u8; 4096];
        let header_end = (0x202 + h.u8(0x201)? as usize).min(0x290);
        let header = self.kernel.get(0x1f1..header_end).context("the kernel image is truncated")?;
        put(&mut zero, 0x1f1, header);
        put(&mut zero, 0x210, &[0xff]); // type_of_loader: none of the registered ones
        put(&mut zero, 0x228, &(CMDLINE as u32).to_le_bytes());
        if !self.initrd.is_empty() {
            put(&mut zero, 0x218, &(initrd_at as u32).to_le_bytes());
            put(&mut zero, 0x21c, &(self.initrd.len() as u32).to_le_bytes());
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
