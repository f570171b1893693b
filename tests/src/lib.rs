//! The lab: real clusters on one host, for tests, demonstrations and people.
//!
//! ```text
//! host ──► lab root (a private Debian, built once)          lab::root
//!   └─► lab VM (only where the host's KVM is not full)      lab::vm, vm_init, vm_agent, channel
//!         └─► lab network, nodes n1 n2 b1, simulated BMC    lab::net, node, bmc, fence
//!               └─► corosync + pacemakerd, or pacemaker-remoted on the board
//! ```
//! [`lab::Lab`] is what a test holds. The same operations are commands of `understudy-lab` for people.

pub mod bench;
pub mod cluster_cuts;
pub mod connections;
pub mod disk_cuts;
pub mod field_device;
pub mod initramfs;
pub mod iso;
pub mod lab;
pub mod lab_tests;
mod machine_code;
pub mod net_cuts;
pub mod power_cuts;
pub mod scenario;
