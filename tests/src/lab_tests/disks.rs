//! A guest with databases on a disk on a real NFS server that is silent for a while, in short; `understudy-bench disk-cuts` is the long version.

use std::process::Command;

use anyhow::{Context, Result};

use crate::lab::{host, places};

/// What [`power_cuts`] proves. It needs no cluster and brings two hosts of its own.
pub const POWER_CUTS: &str = "SQLite, PostgreSQL and ext4 lose nothing that was seen outside, whichever host dies, when both do, and when the storage is silent";

/// See [`POWER_CUTS`].
pub fn power_cuts() -> Result<()> {
    // Its hidden command is the VMM of such a host, so it is a process of its own.
    let mut command = Command::new(places::bin_dir()?.join("understudy-bench"));
    let mut events = "disk-cuts --count 1 --both 1 --sequence 0 --moves 0 --full 0 --missing 0".to_owned();
    if places::in_vm() {
        // The VM's kernel and root have an NFS server. On a host of one's own nothing is exported.
        events += " --storage nfs --gone 1";
    }
    command.args(events.split(' '));
    command.arg("--report").arg(places::out_dir()?.join("disk-cuts.json"));
    host::run_quiet(&mut command).map(drop).context("understudy-bench disk-cuts")
}
