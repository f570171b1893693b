//! Who may be in the lab and how they are wired: nodes, three planes.
//!
//! ```text
//!             storage 10.77.1.0/24   management 10.77.2.0/24   business 10.77.3.0/24
//! n1  .1      replication            corosync link 0           boards, corosync link 1
//! n2  .2      replication            corosync link 0           boards, corosync link 1
//! n3 n4       as n1 and n2, where a lab has more than two hosts
//! b1  .10                            pacemaker_remote          serial sessions
//! mail .20                           SMTP                      (in place of the board, where somebody is told)
//! lab .254    (the outer end, where test programs may sit)
//! ```
//! Each plane is a bridge in a network namespace of the lab's own, each node a veth to every bridge. The host's network is
//! never touched.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::host::run_quiet;

/// A network plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Plane {
    /// Replication between the nodes.
    Storage,
    /// Corosync link 0, pacemaker_remote.
    Management,
    /// Boards; corosync link 1.
    Business,
}

impl Plane {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Storage, Self::Management, Self::Business];

    /// Its name: also the interface's name inside nodes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Storage => "storage",
            Self::Management => "management",
            Self::Business => "business",
        }
    }

    /// The address of host number `host` on it.
    pub fn address(self, host: u8) -> Ipv4Addr {
        let third = match self {
            Self::Storage => 1,
            Self::Management => 2,
            Self::Business => 3,
        };
        Ipv4Addr::new(10, 77, third, host)
    }

    fn bridge(self) -> String {
        format!("br-{}", self.name())
    }
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// corosync and pacemakerd.
    Cluster,
    /// An interface board: pacemaker-remoted.
    Board,
    /// A host that is no part of the cluster and runs what a test starts on it.
    Server,
}

/// One node of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Its host name and its name in Pacemaker.
    pub name: &'static str,
    /// Last byte of its addresses.
    pub host: u8,
    /// What it is.
    pub kind: Kind,
}

/// All nodes that a lab can have. Which of them one has: [`super::node::Settings`].
pub const NODES: [Node; 6] = [
    Node { name: "n1", host: 1, kind: Kind::Cluster },
    Node { name: "n2", host: 2, kind: Kind::Cluster },
    Node { name: "n3", host: 3, kind: Kind::Cluster },
    Node { name: "n4", host: 4, kind: Kind::Cluster },
    Node { name: "b1", host: 10, kind: Kind::Board },
    Node { name: MAIL, host: 20, kind: Kind::Server },
];

/// The host that takes mail.
pub const MAIL: &str = "mail";

/// The node of that name.
pub fn node(name: &str) -> Result<Node> {
    match NODES.into_iter().find(|n| n.name == name) {
        Some(node) => Ok(node),
        None => bail!("there is no node \"{name}\"; a lab has n1 to n4 (cluster), b1 (board) and mail"),
    }
}

/// Last byte of the lab's own addresses.
pub const OUTSIDE: u8 = 254;

/// Make the bridges in the current network namespace.
pub fn make_planes() -> Result<()> {
    ip("link set lo up")?;
    for plane in Plane::ALL {
        let bridge = plane.bridge();
        // An address of its own: a bridge without takes that of a port, which changes when nodes come and go, and whoever talks to the
        // outer end then talks to nobody for a minute.
        let [_, b, c, d] = plane.address(OUTSIDE).octets();
        ip(&format!(
            "link add {bridge} address 02:00:0a:{b:02x}:{c:02x}:{d:02x} type bridge forward_delay 0 stp_state 0"
        ))?;
        ip(&format!("addr add {}/24 dev {bridge}", plane.address(OUTSIDE)))?;
        ip(&format!("link set {bridge} up"))?;
    }
    Ok(())
}

/// A locally administered address for a node's card on a plane.
fn mac(node: Node, plane: Plane) -> String {
    let [_, _, third, host] = plane.address(node.host).octets();
    format!("02:75:73:00:{third:02x}:{host:02x}")
}

/// Plug `node`, whose network namespace is that of process `pid`, into all planes; those in `cut` stay unplugged.
pub fn plug(node: Node, pid: u32, cut: &[Plane]) -> Result<()> {
    for plane in Plane::ALL {
        let port = port(node, plane);
        // The last life's port vanishes with its namespace, a moment after the node's death.
        let _ = ip(&format!("link del {port}"));
        // The card's address stays the same over all lives of the node, as a real card's does: peers that have it in their ARP
        // tables find the node at once when it returns.
        let mac = mac(node, plane);
        ip(&format!("link add {port} type veth peer name {} address {mac} netns {pid}", plane.name()))?;
        ip(&format!("link set {port} master {}", plane.bridge()))?;
        if !cut.contains(&plane) {
            ip(&format!("link set {port} up"))?;
        }
    }
    Ok(())
}

/// Pull or plug one cable of a node. Both ends see the carrier go and come.
pub fn set_link(node: Node, plane: Plane, up: bool) -> Result<()> {
    ip(&format!("link set {} {}", port(node, plane), if up { "up" } else { "down" }))
}

/// Pull all cables of a node with one call, so that nothing that its processes do while they die is seen outside.
pub fn unplug_all(node: Node) -> Result<()> {
    let batch: String = Plane::ALL.iter().map(|p| format!("link set {} down\n", port(node, *p))).collect();
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), batch)?;
    run_quiet(Command::new("ip").args(["-force", "-batch"]).arg(file.path()))?;
    Ok(())
}

/// Inside a node: names and addresses of its interfaces.
pub fn configure_inside(node: Node) -> Result<()> {
    ip("link set lo up")?;
    for plane in Plane::ALL {
        ip(&format!("addr add {}/24 dev {}", plane.address(node.host), plane.name()))?;
        ip(&format!("link set {} up", plane.name()))?;
    }
    Ok(())
}

fn port(node: Node, plane: Plane) -> String {
    format!("{}-{}", node.name, plane.name())
}

fn ip(arguments: &str) -> Result<()> {
    run_quiet(Command::new("ip").args(arguments.split(' '))).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_fit_into_the_kernels_fifteen_bytes() {
        for plane in Plane::ALL {
            assert!(plane.bridge().len() <= 15);
            for node in NODES {
                assert!(port(node, plane).len() <= 15);
            }
        }
    }
}
