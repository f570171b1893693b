//! The lab's parts; see the crate's documentation for the picture.

pub mod channel;
pub mod host;
pub mod initramfs;
pub mod places;
pub mod root;
pub mod vm;
pub mod vm_agent;
pub mod vm_init;
