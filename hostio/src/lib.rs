//! What the host offers for block I/O beyond plain files, as safe calls: the only place under `disk/` with `unsafe` in it.
//!
//! ```text
//!  buffer   memory that O_DIRECT accepts, used again          (buffer.rs)
//!  ring     io_uring: reads and writes without a thread each  (ring.rs)
//!  device   block devices: ioctls                              (device.rs)
//!  iscsi    SCSI commands to an iSCSI target over libiscsi    (iscsi.rs, iscsi/library.rs)
//!  plain    what measurements are compared with           (plain.rs)
//! ```
//! Nothing here decides anything: what is read, written, reserved or tried again is for `understudy-disk` to say.

pub mod buffer;
pub mod device;
pub mod iscsi;
pub mod plain;
pub mod ring;

pub use buffer::Buffer;
pub use ring::{After, Op, Ring};
