//! The cables: two hosts and a client, each a network namespace, at three switches.
//!
//! ```text
//!  understudy-a  br0 ── business ─┐                    ┌─ business ── br0  understudy-b
//!  (tap of the VMM)               ├─ switch: business ─┤                  (tap of the VMM)
//!                                 │       └── client ──┼── eth0  understudy-client
//!                path1 ───────────┼─ switch: path1 ────┤
//!                path2 ───────────┴─ switch: path2 ────┘
//! ```
//! Switches are bridges in a namespace of their own. A cable is pulled at the switch, so the host sees its carrier go. A host that loses its power loses all its
//! cables first, in one call: what its kernel would still say for its dead processes (resets) is not heard, as from a real one. It gets a new namespace when it returns.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::lab::host::run_quiet;

/// Where clients are.
pub const CLIENT: &str = "understudy-client";
/// The bridge on each host that guests' taps are in.
pub const BRIDGE: &str = "br0";
const SWITCH: &str = "understudy-switch";
/// Prefix length of all networks here.
const PREFIX: u8 = 24;

/// A switch, and a host's cable to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plane {
    /// The guest and its clients.
    Business,
    /// Replication.
    Path1,
    /// Replication.
    Path2,
}

impl Plane {
    const ALL: [Self; 3] = [Self::Business, Self::Path1, Self::Path2];

    fn name(self) -> &'static str {
        match self {
            Self::Business => "business",
            Self::Path1 => "path1",
            Self::Path2 => "path2",
        }
    }

    /// The address of side 0 or 1 on it; guest and client are behind the business plane with 5 and 9.
    pub fn address(self, last: u8) -> String {
        let third = match self {
            Self::Business => 78,
            Self::Path1 => 79,
            Self::Path2 => 80,
        };
        format!("10.{third}.0.{last}")
    }
}

impl Plane {
    /// The replication path that an address with its port belongs to.
    pub fn of(address: &str) -> Option<Self> {
        let (host, _) = address.rsplit_once(':')?;
        [Self::Path1, Self::Path2].into_iter().find(|plane| [1, 2].iter().any(|last| plane.address(*last) == host))
    }
}

/// Address of the guest.
pub fn guest() -> String {
    Plane::Business.address(5)
}

/// The same with its prefix length.
pub fn guest_with_prefix() -> String {
    format!("{}/{PREFIX}", guest())
}

/// Name of a host's namespace.
pub fn namespace(side: usize) -> String {
    format!("understudy-{}", if side == 0 { "a" } else { "b" })
}

fn port(side: usize, plane: Plane) -> String {
    format!("{}-{}", if side == 0 { "a" } else { "b" }, plane.name())
}

/// See the module; everything goes with it.
#[derive(Debug)]
pub struct Switch(());

impl Switch {
    /// Switches and the client, and no hosts yet.
    pub fn new() -> Result<Self> {
        let this = Self(());
        this.take_away();
        ip(None, &format!("netns add {SWITCH}\nnetns add {CLIENT}\n"))?;
        let mut lines: String = Plane::ALL
            .iter()
            .enumerate()
            .map(|(n, plane)| {
                let name = plane.name();
                format!(
                    "link add {name} address 02:00:00:78:0{n}:fe type bridge forward_delay 0 stp_state 0\nlink set {name} up\n"
                )
            })
            .collect();
        lines += &format!("link add client type veth peer name eth0 address 02:00:00:78:00:09 netns {CLIENT}\n");
        lines += "link set client master business\nlink set client up\n";
        ip(Some(SWITCH), &lines)?;
        let address = Plane::Business.address(9);
        ip(Some(CLIENT), &format!("link set lo up\naddr add {address}/{PREFIX} dev eth0\nlink set eth0 up\n"))?;
        Ok(this)
    }

    /// A host gets its cables; whatever it was before is gone.
    pub fn plug(&self, side: usize) -> Result<()> {
        let host = namespace(side);
        let last = u8::try_from(side + 1)?;
        quietly(&["netns", "del", &host]);
        ip(None, &format!("netns add {host}\n"))?;
        for plane in Plane::ALL {
            // The old end vanishes with its namespace, a moment after that.
            quietly(&["-n", SWITCH, "link", "del", &port(side, plane)]);
        }
        let cable = |(n, plane): (usize, &Plane)| {
            let (port, name) = (port(side, *plane), plane.name());
            format!(
                "link add {port} type veth peer name {name} address 02:00:00:78:0{n}:0{last} netns {host}\n\
                 link set {port} master {name}\nlink set {port} up\n"
            )
        };
        ip(Some(SWITCH), &Plane::ALL.iter().enumerate().map(cable).collect::<String>())?;
        let mut lines = format!(
            "link set lo up\nlink add {BRIDGE} address 02:00:00:78:0a:0{last} type bridge forward_delay 0 stp_state 0\n\
             link set business master {BRIDGE}\nlink set business up\nlink set {BRIDGE} up\n"
        );
        for plane in [Plane::Path1, Plane::Path2] {
            let (address, name) = (plane.address(last), plane.name());
            lines += &format!("addr add {address}/{PREFIX} dev {name}\nlink set {name} up\n");
        }
        ip(Some(&host), &lines)
    }

    /// All cables of a host, in one call.
    pub fn unplug(&self, side: usize) -> Result<()> {
        let lines: String = Plane::ALL.iter().map(|plane| format!("link set {} down\n", port(side, *plane))).collect();
        ip(Some(SWITCH), &lines)
    }

    /// One cable of a host.
    pub fn set(&self, side: usize, plane: Plane, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        ip(Some(SWITCH), &format!("link set {} {state}\n", port(side, plane)))
    }

    fn take_away(&self) {
        for namespace in [&namespace(0), &namespace(1), CLIENT, SWITCH] {
            quietly(&["netns", "del", namespace]);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.take_away();
    }
}

/// What is perhaps not there.
fn quietly(words: &[&str]) {
    let _ = Command::new("ip").args(words).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Commands for `ip`, one a line, in one process.
fn ip(namespace: Option<&str>, lines: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new().context("making a file for ip's commands")?;
    fs::write(file.path(), lines).context("writing ip's commands")?;
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    run_quiet(command.arg("-batch").arg(file.path())).map(drop).with_context(|| format!("ip was told: {lines}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_known_by_its_address() {
        assert_eq!(Plane::of("10.79.0.2:7790"), Some(Plane::Path1));
        assert_eq!(Plane::of("10.80.0.1:1"), Some(Plane::Path2));
        assert_eq!(Plane::of("10.78.0.1:7790").or(Plane::of("10.80.0.1")).or(Plane::of("")), None);
    }

    #[test]
    fn interface_names_fit_into_the_kernels_fifteen_bytes() {
        for (side, plane) in Plane::ALL.into_iter().flat_map(|plane| [(0, plane), (1, plane)]) {
            assert!(port(side, plane).len() <= 15);
        }
    }
}
