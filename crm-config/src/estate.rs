//! The words in which a policy describes the estate: what racks and clusters there are, what a machine is for, and where
//! it may go when its host dies.
//!
//! [`crate::placement`] turns them into scores. A policy that uses none of them is compiled as if they did not exist.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::alerts::{Severity, default_window};
use crate::policy::{Seconds, Spanned};

/// What happens to a machine when its host dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A hot standby goes on from the last checkpoint.
    Protected,
    /// It is started again elsewhere.
    Restart,
    /// It waits for its host: restarted there if it fails, never started elsewhere.
    None,
}

/// Where a machine may go when its host dies. *Own* is the machine's cluster, *dedicated* the nodes with a
/// `high_performance` id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Evacuation {
    /// Only within the machine's own cluster.
    #[default]
    Own,
    /// Own cluster first; what finds no room there goes to the dedicated one.
    OwnThenDedicated,
    /// Only to the dedicated cluster.
    Dedicated,
    /// To the dedicated cluster first, then to its own.
    DedicatedThenOwn,
}

impl Evacuation {
    /// All four.
    pub const ALL: [Self; 4] = [Self::Own, Self::OwnThenDedicated, Self::Dedicated, Self::DedicatedThenOwn];

    /// As the policy file has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::OwnThenDedicated => "own-then-dedicated",
            Self::Dedicated => "dedicated",
            Self::DedicatedThenOwn => "dedicated-then-own",
        }
    }

    /// 0 for the nodes that are tried first, 1 for those that come after; `None` for those that the policy excludes.
    pub fn tier(self, dedicated: bool) -> Option<u8> {
        match (self, dedicated) {
            (Self::Own | Self::OwnThenDedicated, false) | (Self::Dedicated | Self::DedicatedThenOwn, true) => Some(0),
            (Self::OwnThenDedicated, true) | (Self::DedicatedThenOwn, false) => Some(1),
            (Self::Own, true) | (Self::Dedicated, false) => None,
        }
    }

    /// Whether it speaks of the dedicated cluster at all.
    pub fn uses_dedicated(self) -> bool {
        self.tier(true).is_some()
    }
}

/// How much a machine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Performance {
    /// Any host of its cluster will do; it never goes to the dedicated cluster.
    #[default]
    Normal,
    /// It may go to the dedicated cluster, if its evacuation policy says so.
    High,
}

/// Who decides that machines are started elsewhere. Does not concern protected machines: a takeover by the standby is
/// always automatic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Automation {
    /// The operator: nothing leaves its home by itself.
    Manual,
    /// The operator, whom the evacuation controller asks.
    Semi,
    /// Pacemaker, at once; with `[evacuation]` the controller, batch by batch.
    #[default]
    Automatic,
}

/// What happens where the machines that run on a node have more vCPUs than it has processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LoadSharing {
    /// They share them, whatever their priority.
    #[default]
    Off,
    /// Machines of lower priority are paused until there is room. They keep their memory, and are degraded, not failed.
    Pause,
}

/// `[monitoring]`: every node runs a monitor, which hears all others in the production and in the management network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Monitoring {
    /// UDP port of heartbeats, in both networks.
    pub port: u16,
    /// A heartbeat every so many ms, 20 to 60000.
    pub interval_ms: u64,
    /// So many heartbeats that do not come are silence, 2 to 100.
    pub missed: u64,
    /// For so long the cluster may restart on its node what does not answer.
    pub restart_after: Seconds,
    /// The fencing devices of hosts that are gone are asked for their power state.
    pub bmc: bool,
    /// A node that is cut off from production is red to Pacemaker, and everything leaves it (`node-health-strategy=migrate-on-red`).
    pub health: bool,
}

impl Default for Monitoring {
    fn default() -> Self {
        Self { port: 7789, interval_ms: 1000, missed: 4, restart_after: Seconds(60), bmc: true, health: false }
    }
}

/// What a network is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Plane {
    /// Corosync, fencing devices, administrators.
    Management,
    /// What the machines serve; also called production network.
    Business,
    /// Checkpoints, migrations, storage.
    Storage,
}

/// `[[networks]]`: a network of the estate. For reference and for checks; nothing is configured on the hosts from it.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: Spanned<String>,
    /// What it is for.
    pub plane: Plane,
    /// Its addresses, as `10.77.1.0/24`: every node's address in that plane must be one of them.
    pub subnet: Option<Spanned<String>>,
}

/// How an alert reaches its recipient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AlertKind {
    /// Mail to an address.
    Mail,
    /// A short message to a telephone number.
    Sms,
    /// An HTTP POST to an address.
    Webhook,
    /// A command with the alert in its environment.
    Command,
}

/// `[[alerts]]`: who is told.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Alert {
    /// The recipient's name.
    pub name: Spanned<String>,
    /// By what.
    pub kind: AlertKind,
    /// Address, number, URL or absolute path.
    pub to: Spanned<String>,
    /// Whether this recipient may answer questions of semi-automatic evacuation.
    #[serde(default)]
    pub approves: bool,
    /// He is told what is at least as bad.
    #[serde(default)]
    pub severity: Severity,
    /// The same alarm is told once in this time, then once more with the number of those in between; 0 tells each.
    #[serde(default = "default_window")]
    pub window: Seconds,
}

/// `[approval]`: what semi-automatic evacuation does with the answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Approval {
    /// How long a question stands.
    pub expires: Seconds,
    /// What happens when nobody has answered by then.
    pub unanswered: Unanswered,
}

impl Default for Approval {
    fn default() -> Self {
        Self { expires: Seconds(900), unanswered: Unanswered::Refuse }
    }
}

/// `unanswered = …`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unanswered {
    /// Nothing is moved.
    Refuse,
    /// As if it had been approved.
    Approve,
}
