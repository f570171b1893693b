//! Connections of real clients to a Linux guest, through a few events; `understudy-bench connections` is the long version.

use std::process::Command;

use anyhow::{Context, Result};

use crate::lab::{host, places};

/// What [`live_on`] proves. It needs no cluster and brings two hosts of its own.
pub const LIVE_ON: &str = "ssh, curl, psql in a transaction, iperf3 and UDP to a Linux guest live through a power cut, a switchover and a cut replication path";

/// See [`LIVE_ON`].
pub fn live_on() -> Result<()> {
    // Its hidden command is the VMM of such a host, so it is a process of its own.
    let mut command = Command::new(places::bin_dir()?.join("understudy-bench"));
    let events = "connections --primary 1 --standby 0 --moves 1 --paths 1 --uplinks 0 --transfer-mib 1 --rate-kib 12 --iperf-kbit 64 --pause-ms 400";
    command.args(events.split(' '));
    command.arg("--report").arg(places::out_dir()?.join("connections.json"));
    host::run_quiet(&mut command).map(drop).context("understudy-bench connections")
}
