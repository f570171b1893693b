//! The lab's parts; see the crate's documentation for the picture.

pub mod bmc;
pub mod channel;
pub mod cluster;
pub mod fence;
pub mod guest_disk;
pub mod host;
pub mod mail;
pub mod net;
pub mod node;
pub mod places;
pub mod processes;
pub mod root;
pub mod stall;
pub mod vm;
pub mod vm_agent;
pub mod vm_image;
pub mod vm_init;
pub mod wait;

pub use cluster::{Lab, LabOptions};
pub use net::Plane;
pub use wait::{wait_for, wait_until};
