//! The guest's machine code, from assembly text.
#![allow(unsafe_code)]

use core::arch::global_asm;

global_asm!(
    ".pushsection .rodata.understudy_bench_guest, \"a\"",
    ".globl understudy_bench_dirty",
    ".hidden understudy_bench_dirty",
    "understudy_bench_dirty:",
    include_str!("dirty.s"),
    ".globl understudy_bench_reset",
    ".hidden understudy_bench_reset",
    "understudy_bench_reset:",
    include_str!("reset.s"),
    ".globl understudy_bench_end",
    ".hidden understudy_bench_end",
    "understudy_bench_end:",
    ".popsection",
);

unsafe extern "C" {
    static understudy_bench_dirty: u8;
    static understudy_bench_reset: u8;
    static understudy_bench_end: u8;
}

/// The program in ring 3.
pub fn program() -> &'static [u8] {
    between(&raw const understudy_bench_dirty, &raw const understudy_bench_reset)
}

/// What QEMU gets in place of a BIOS, to start it.
pub fn reset_image() -> &'static [u8] {
    between(&raw const understudy_bench_reset, &raw const understudy_bench_end)
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both are labels in one section of read-only data, in this order (only the two functions above call this), so
    // everything between them is one allocation that lives and stays as it is while the program runs.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}
