//! A machine's devices in [`super::VmmStatus`]: disks, CD-ROM drives, network cards, serial ports.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::nic::Mac;
use crate::statistics::Histogram;

/// One disk in [`super::VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// Its base.
    pub file: String,
    /// All of its configuration, as in [`crate::disk`].
    #[serde(default)]
    pub spec: String,
    /// `direct`: unprotected, writes go to the base. `solo`: to slices that count at the guest's flush. `protected`: to slices that count with their
    /// checkpoint. `read-only`; `closed` on a standby.
    pub mode: String,
    /// How the base is read and written: `cache=none,aio=io_uring`; empty if it is not open.
    #[serde(default)]
    pub io: String,
    /// What a shared device itself does against an earlier owner's writes; empty: it is no device, or not open.
    #[serde(default)]
    pub fence: String,
    /// Its size, 0 while it is closed.
    pub size_bytes: u64,
    /// Bytes in slices that are not merged into the base.
    pub backlog_bytes: u64,
    /// Requests that are under way.
    pub in_flight: u64,
    /// Of these, those that wait until there is room.
    pub held: u64,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// A CD-ROM drive in [`super::VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdromStatus {
    /// Its name.
    pub name: String,
    /// What lies in it.
    pub file: Option<String>,
    /// Its size.
    pub size_bytes: u64,
    /// The guest has locked it.
    pub locked: bool,
    /// The guest has opened its tray.
    pub open: bool,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// A network card in [`super::VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicStatus {
    /// Its name.
    pub name: String,
    /// Its address, as the machine is configured.
    pub mac: Mac,
    /// All of its configuration, as in [`crate::nic`].
    pub spec: String,
    /// What is behind it.
    pub backend: String,
    /// `up`: packets come and go. `down`: the machine has no authority to speak here (standby, handed over, fenced, switched off), and the port is down.
    pub link: String,
    /// Packets and bytes (frames, without the virtio header) that left, and that the guest was given.
    pub out_packets: u64,
    /// See `out_packets`.
    pub out_bytes: u64,
    /// See `out_packets`.
    pub in_packets: u64,
    /// See `out_packets`.
    pub in_bytes: u64,
    /// Packets that wait: for their commit, or for room behind the card.
    pub held_packets: u64,
    /// Their bytes.
    pub held_bytes: u64,
    /// Most bytes that may wait.
    pub held_limit: u64,
    /// How long packets waited for their commit, µs, since the process started. Those that did not have to wait are not in it.
    #[serde(default)]
    pub held_us: Histogram,
    /// Times that the bound was reached, and the guest had to wait or packets were dropped.
    pub bound_reached: u64,
    /// Packets that were dropped: reason and number.
    #[serde(default)]
    pub dropped: BTreeMap<String, u64>,
    /// What is wrong with it.
    pub problem: Option<String>,
}

/// One serial port in [`super::VmmStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialStatus {
    /// `com1` … `com4`.
    pub port: String,
    /// What is behind it: `board ADDRESS/DEVICE`, `file PATH`, `none`.
    pub backend: String,
    /// `connected`, `connecting`, `fenced`, `local`.
    pub link: String,
    /// Bytes that the guest has sent since it was first booted.
    pub tx_bytes: u64,
    /// Of these, acknowledged by the board.
    pub tx_acked: u64,
    /// Bytes not yet released by the gate.
    pub tx_held: u64,
    /// Bytes delivered into the guest's UART since it was first booted.
    pub rx_bytes: u64,
}
