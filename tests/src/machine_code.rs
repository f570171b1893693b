//! Guests' machine code: assembled with this crate, found by its labels.

/// A function `$name` that returns the code of the file `$file` (beside the file that says this), which may use the macros of virtio drivers
/// (`vmm/tests/common/virtio.s`). `$start` and `$end` are labels of its own.
macro_rules! machine_code {
    ($(#[$doc:meta])* $vis:vis fn $name:ident, $file:literal, $start:ident, $end:ident) => {
        core::arch::global_asm!(
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../vmm/tests/common/virtio.s")),
            concat!(".pushsection .rodata.", stringify!($start), ", \"a\""),
            concat!(".globl ", stringify!($start)),
            concat!(".hidden ", stringify!($start)),
            concat!(stringify!($start), ":"),
            include_str!($file),
            concat!(".globl ", stringify!($end)),
            concat!(".hidden ", stringify!($end)),
            concat!(stringify!($end), ":"),
            ".popsection",
            // The next one brings them again.
            ".purgem virtio_plug",
            ".purgem virtio_begin",
            ".purgem virtio_queue",
            ".purgem virtio_ready",
        );

        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }

        $(#[$doc])*
        $vis fn $name() -> &'static [u8] {
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both are labels in one section of read-only data, in this order, so everything between them is one allocation that lives
            // and stays as it is while the program runs.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

pub(crate) use machine_code;
