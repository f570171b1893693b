//! What a machine must be like to run from another one's image: the reply to [`super::VmmRequest::Shape`].
//!
//! What is behind the devices is not part of it: files, interfaces and boards may differ from node to node.

use serde::{Deserialize, Serialize};

use crate::disk::DiskBus;
use crate::nic::Mac;
use crate::watchdog::WatchdogModel;

/// Reply to [`super::VmmRequest::Shape`]: all in which two machines must agree for one to run from the other's image. What is behind the
/// devices is not part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u32,
    /// Serial ports, 0 to 4.
    pub serial_ports: u32,
    /// Whether there is a virtio console.
    pub console: bool,
    /// Disks, in the order of their places on the bus.
    #[serde(default)]
    pub disks: Vec<DiskShape>,
    /// CD-ROM drives.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdroms: Vec<CdromShape>,
    /// Network cards, in the order of their places on the bus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicShape>,
    /// Its watchdog, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogModel>,
}

/// A disk in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskShape {
    /// Its name, which the guest sees as its id.
    pub name: String,
    /// How the guest sees it.
    #[serde(default, skip_serializing_if = "DiskBus::is_default")]
    pub bus: DiskBus,
    /// Its queues, or its controller's.
    pub queues: u16,
    /// The guest can only read it.
    pub read_only: bool,
}

/// A CD-ROM drive in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdromShape {
    /// Its name, which the guest sees as its serial number.
    pub name: String,
}

/// A network card in [`MachineShape`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicShape {
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// Pairs of queues.
    pub queues: u16,
    /// The guest may leave checksums and segmentation to it.
    pub offloads: bool,
    /// The MTU that the guest is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}
