//! Disks that agree with memory.
//!
//! A protected machine's disk writes go to *slices*, one an epoch, beside the disk; a slice counts when its epoch is committed, and only then is it
//! merged into the disk. When the node dies, open slices are thrown away with the memory that was not committed: memory and disk are
//! of the same instant, always.
//!
//! ```text
//!  configured  how a disk of a configuration is opened           (configured.rs)
//!  block    raw and qcow2: arrays of bytes                        (block.rs, block/raw.rs, block/qcow2.rs)
//!  record   the log's format; scan() reads what a crash left      (record.rs)
//!  slice    one epoch's log while it is written                   (slice.rs)
//!  index    where the newest content of a sector is               (index.rs)
//!  owner    whose disk it is, and the two locks                   (owner.rs)
//!  recover  takeover: what counts, what is thrown away            (recover.rs)
//!  reservation  the device's own fence, where it has one           (reservation.rs, fenced.rs)
//!  disk     all of it together: read, write, cut, seal, commit    (disk.rs), merged in the background (merger.rs)
//!  mirror   each node has its own: the standby's copy, synchronisation  (mirror.rs)
//!  inspect  by hand, with the machine stopped: understudy-disk      (inspect.rs, main.rs)
//! ```
//! Who uses it: the VMM's device threads call [`Block`]; whoever drives epochs calls [`Disk::cut`], [`Disk::seal`], [`Disk::commit`]; a takeover
//! calls [`Disk::open`] with the checkpoint's [`Tag`]. What is guaranteed, and what only fencing can: `docs/decisions/0013`.
#![forbid(unsafe_code)]

pub mod block;
pub mod configured;
pub mod disk;
pub mod error;
mod fenced;
pub mod index;
pub mod inspect;
pub mod merger;
pub mod mirror;
pub mod owner;
pub mod record;
pub mod recover;
pub mod reservation;
#[cfg(test)]
mod sim;
pub mod slice;
pub mod store;

pub use block::{Aio, Block, Buffer, Cache, Format, Gather, Iscsi, Op, Qcow2, Raw, SECTOR, Scatter, Tuning};
pub use disk::{Disk, Limits, Merged, Options, Status};
pub use error::{Error, Result};
pub use merger::Merger;
pub use owner::{Identity, Ownership};
pub use record::Tag;
pub use recover::Memory;
pub use store::{Directory, LocalDirectory};
