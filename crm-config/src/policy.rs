//! The policy file: what an administrator says. Every field that can have a sensible default has one.
//!
//! ```toml
//! [[nodes]]
//! name = "n1"
//! storage = "10.77.1.1"
//!
//! [[machines]]
//! name = "demo"
//! kernel = "/srv/demo/vmlinuz"
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};
use understudy_monitor::matrix::Row;
use understudy_protocol::key::DEFAULT_KEY_FILE;

pub use crate::alerts::{Hooks, Mail, Sms};
pub use crate::controller::Rules;
pub use crate::estate::{
    Alert, AlertKind, Approval, Automation, Evacuation, LoadSharing, Mode, Monitoring, Network, Performance, Plane,
};
pub use crate::span::Spanned;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// What concerns the cluster as a whole.
    #[serde(default)]
    pub cluster: Cluster,
    /// The hosts.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Interface boards: hosts of physical peripherals, Pacemaker remote nodes.
    #[serde(default)]
    pub boards: Vec<Board>,
    /// Fencing devices.
    #[serde(default)]
    pub fencing: Vec<Fencing>,
    /// The virtual machines.
    #[serde(default)]
    pub machines: Vec<Machine>,
    /// The networks.
    #[serde(default)]
    pub networks: Vec<Network>,
    /// Who is told when something happens.
    #[serde(default)]
    pub alerts: Vec<Alert>,
    /// The mail server.
    pub mail: Option<Mail>,
    /// The way to telephones.
    pub sms: Option<Sms>,
    /// What webhooks need.
    pub hooks: Option<Hooks>,
    /// What semi-automatic evacuation does with answers.
    pub approval: Option<Approval>,
    /// Heartbeats of nodes and machines in two networks. Without it there are none.
    pub monitoring: Option<Spanned<Monitoring>>,
    /// Rows of the fault matrix: what follows from what is seen of a machine and its host.
    #[serde(default)]
    pub matrix: Vec<Spanned<Row>>,
    /// The evacuation controller's rules. With this section it also decides about automatic machines that are started again elsewhere.
    pub evacuation: Option<Rules>,
}

/// `[cluster]`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// The cluster's name; for people only.
    pub name: String,
    /// What a partition without quorum does.
    pub no_quorum: NoQuorum,
    /// How strongly resources stay where they are (Pacemaker's `resource-stickiness`), 0 to 100000.
    pub stickiness: u32,
    /// Key file by which nodes and boards know each other, the same path everywhere.
    pub key: Spanned<String>,
    /// First TCP port for replication; each machine without a `port` of its own takes the next.
    pub replication_port: u16,
    /// First TCP port of serial lines; each line without a `port` of its own takes the next.
    pub serial_port: u16,
    /// TCP port on which every node receives live migrations.
    pub migration_port: u16,
    /// Who decides that machines are started elsewhere when their host has died.
    pub automation: Option<Spanned<Automation>>,
    /// What happens where the machines that run on a node have more vCPUs than it has processors.
    pub load_sharing: Option<Spanned<LoadSharing>>,
    /// How many nodes of each tier a machine may go to besides its home, 1 to 64. Only where the policy places machines.
    pub candidates: Spanned<usize>,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            name: String::new(),
            no_quorum: NoQuorum::Freeze,
            stickiness: 100,
            key: Spanned::new(0..0, DEFAULT_KEY_FILE.into()),
            replication_port: 7790,
            serial_port: 7800,
            migration_port: 7780,
            automation: None,
            load_sharing: None,
            candidates: Spanned::new(0..0, 8),
        }
    }
}

/// Pacemaker's `no-quorum-policy`. (`ignore` is missing on purpose: two halves would run the same machine.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NoQuorum {
    /// What runs goes on, nothing is started: the machine's own rules see to it that no output leaves unprotected.
    Freeze,
    /// Everything is stopped.
    Stop,
    /// Everything is demoted.
    Demote,
    /// Nodes fence themselves.
    Suicide,
}

impl NoQuorum {
    /// As Pacemaker writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Stop => "stop",
            Self::Demote => "demote",
            Self::Suicide => "suicide",
        }
    }
}

/// `[[nodes]]`: a host that can run machines. Corosync's own configuration names the same nodes.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node's name as Corosync and `uname -n` have it.
    pub name: Spanned<String>,
    /// Address in the storage network: checkpoints travel here.
    pub storage: Option<Spanned<String>>,
    /// Its second address for checkpoints, in a network of its own: replication goes on while one of the two works.
    pub storage2: Option<Spanned<String>>,
    /// Address in the management network (Corosync's; for reference).
    pub management: Option<Spanned<String>>,
    /// Address in the business network.
    pub business: Option<Spanned<String>>,
    /// Memory for machines, MiB; if given, `check` warns about machines that cannot fit. Where the policy places machines
    /// and every node has it, no node is given more than that.
    pub memory: Option<u64>,
    /// Processors for machines. Orders targets by load; never forbids one.
    pub cpus: Option<u32>,
    /// The rack that it is in: what loses power together. Machines of one business type are spread over racks.
    pub rack: Option<Spanned<String>>,
    /// The cluster that it belongs to, as evacuation policies understand it.
    pub cluster: Option<Spanned<String>>,
    /// Id of the dedicated high-performance cluster that it belongs to.
    pub high_performance: Option<Spanned<String>>,
}

impl Node {
    /// Where checkpoints go: storage, else management.
    pub fn replication_address(&self) -> Option<&str> {
        self.storage.as_ref().or(self.management.as_ref()).map(|a| a.get_ref().as_str())
    }

    /// All addresses to which checkpoints go: that one, and storage2.
    pub fn replication_addresses(&self) -> Vec<&str> {
        let second = self.storage2.as_ref().map(|a| a.get_ref().as_str());
        self.replication_address().into_iter().chain(second).collect()
    }
}

/// `[[boards]]`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Board {
    /// The remote node's name.
    pub name: Spanned<String>,
    /// Address at which pacemaker-remoted answers.
    pub server: Spanned<String>,
    /// Its port.
    #[serde(default = "default_remote_port")]
    pub port: u16,
    /// Address at which peripherals are offered to the machines; as `server` if not given.
    pub business: Option<Spanned<String>>,
    /// How long to wait before a lost connection is tried again.
    #[serde(default = "default_reconnect")]
    pub reconnect: Seconds,
}

impl Board {
    /// Where the machines reach it.
    pub fn peripheral_address(&self) -> &str {
        self.business.as_ref().unwrap_or(&self.server).get_ref()
    }
}

/// `[[fencing]]`: one device.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fencing {
    /// The resource's name.
    pub name: Spanned<String>,
    /// Fence agent, e.g. `fence_ipmilan`.
    pub agent: Spanned<String>,
    /// The nodes and boards that it can switch off.
    pub nodes: Vec<Spanned<String>>,
    /// Order among several devices of one node: 1 is tried first. Devices of the same level must all succeed.
    #[serde(default = "default_level")]
    pub level: u8,
    /// The agent's parameters.
    #[serde(default)]
    pub parameters: BTreeMap<String, Scalar>,
    /// How often the device is checked.
    #[serde(default = "default_fencing_interval")]
    pub interval: Seconds,
}

/// `[[machines]]`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The machine's name.
    pub name: Spanned<String>,
    /// Memory, MiB.
    #[serde(default = "default_memory")]
    pub memory: u64,
    /// Virtual CPUs, 1 to 32.
    #[serde(default = "default_vcpus")]
    pub vcpus: Spanned<u32>,
    /// The kernel to boot, the same content on every node.
    pub kernel: Spanned<String>,
    /// Initial RAM disk.
    pub initrd: Option<Spanned<String>>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// What happens when its host dies: `protected`, `restart` or `none`. Without it, `protection` says it.
    pub mode: Option<Spanned<Mode>>,
    /// The older way to say it: `protected`, or `none` for what `mode` calls `restart`.
    #[serde(default)]
    pub protection: Protection,
    /// What it is for. Machines of one business type are spread over racks.
    pub business: Option<Spanned<String>>,
    /// How much it needs: only `high` may go to the dedicated cluster.
    pub performance: Option<Spanned<Performance>>,
    /// Where it may go.
    pub evacuation: Option<Spanned<Evacuation>>,
    /// Its own cluster, if neither its primary nor the nodes say which that is.
    pub cluster: Option<Spanned<String>>,
    /// The dedicated cluster that it may go to; without it, any.
    pub high_performance: Option<Spanned<String>>,
    /// Who decides that it is started elsewhere; as `cluster.automation` if not given.
    pub automation: Option<Spanned<Automation>>,
    /// Higher is placed first, 0 to 10000. Where memory is short, a machine of lower priority is stopped for it.
    pub priority: Option<Spanned<i32>>,
    /// Without protection: it is moved while it runs.
    pub migrate: Option<Spanned<bool>>,
    /// Node that should run it when there is a choice.
    pub primary: Option<Spanned<String>>,
    /// Node or nodes that may take over. Without it, every other node may.
    pub standby: Option<Spanned<OneOrMany>>,
    /// TCP port of its replication; chosen if not given.
    pub port: Option<Spanned<u16>>,
    /// Checkpoint every so many ms.
    pub interval_ms: Option<u64>,
    /// Silence after which the standby counts as lost, ms.
    pub peer_timeout_ms: Option<u64>,
    /// How the guest is shut down when nobody takes over.
    pub shutdown: Option<Shutdown>,
    /// How often the machine is looked at.
    #[serde(default)]
    pub monitor: Monitor,
    /// How long a failed node is passed over.
    #[serde(default = "default_failure_timeout")]
    pub failure_timeout: Seconds,
    /// Disks: `name=vda,file=/path,format=raw[,bus=scsi][,slices=/directory][,queues=N][,readonly]`, the same files on every node that may run it.
    #[serde(default)]
    pub disks: Vec<Spanned<String>>,
    /// CD-ROM drives: `name=cd0[,file=/image.iso]`, the same files on every node that may run it.
    #[serde(default)]
    pub cdroms: Vec<Spanned<String>>,
    /// Network cards: `name=net0,tap=vm1n0,bridge=br0[,mac=52:54:00:12:34:56][,vlan=12][,spoof=deny]…`, with bridges that every node has.
    #[serde(default)]
    pub nics: Vec<Spanned<String>>,
    /// A watchdog that the guest can arm and then has to feed. Without it there is none.
    pub watchdog: Option<Spanned<Watchdog>>,
    /// What follows when the guest does not feed it; `reset` if not given.
    pub watchdog_action: Option<Spanned<WatchdogAction>>,
    /// Serial ports.
    #[serde(default)]
    pub serial: Vec<Serial>,
}

/// `watchdog = …`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Watchdog {
    /// Intel 6300ESB, a PCI device that Linux has a driver for.
    I6300esb,
}

impl Watchdog {
    /// As the agent's parameter has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::I6300esb => "i6300esb",
        }
    }
}

/// `watchdog_action = …`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// The machine is reset where it is.
    Reset,
    /// The cluster starts the machine again; not for protected machines.
    Restart,
    /// Status and monitors say it, and nothing else happens.
    Report,
}

impl WatchdogAction {
    /// As the agent's parameter has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Restart => "restart",
            Self::Report => "report",
        }
    }
}

/// What happens to a machine when its host dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protection {
    /// A hot standby goes on from the last checkpoint.
    #[default]
    Protected,
    /// It is started again elsewhere.
    None,
}

/// `shutdown = …`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Shutdown {
    /// Power button, then wait.
    Acpi,
    /// At once.
    Off,
}

impl Shutdown {
    /// As the agent's parameter has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acpi => "acpi",
            Self::Off => "off",
        }
    }
}

/// `[machines.monitor]`. The two must differ: Pacemaker tells operations of one name apart by their interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Monitor {
    /// On the node that runs it.
    pub primary: Seconds,
    /// On the standby.
    pub standby: Seconds,
}

impl Default for Monitor {
    fn default() -> Self {
        Self { primary: Seconds(5), standby: Seconds(7) }
    }
}

/// `[[machines.serial]]`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// The guest's port.
    #[serde(default)]
    pub guest: GuestPort,
    /// The board that has the line.
    pub board: Spanned<String>,
    /// The line's name on the board.
    pub device: Spanned<String>,
    /// What the board opens: `tty:/dev/ttyS0,115200`, `pty:/LINK`, `tcp:HOST:PORT` or `tcp-listen:ADDRESS:PORT`.
    pub line: Spanned<String>,
    /// TCP port at which the board offers it; chosen if not given.
    pub port: Option<Spanned<u16>>,
}

/// The guest's serial ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GuestPort {
    /// COM1, `/dev/ttyS0`.
    #[default]
    Com1,
    /// COM2, `/dev/ttyS1`.
    Com2,
}

impl GuestPort {
    /// The vmm agent's parameter.
    pub fn parameter(self) -> &'static str {
        match self {
            Self::Com1 => "serial0",
            Self::Com2 => "serial1",
        }
    }
}

/// A time as Pacemaker writes them: `"5s"`, `"2min"`, or a number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(pub u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}s", self.0)
    }
}

impl JsonSchema for Seconds {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Seconds".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A time: \"5s\", \"2min\", \"1h\" or a whole number of seconds.",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+ *(s|sec|m|min|h|hr)?$" }
            ]
        })
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a time such as \"5s\", \"2min\" or a whole number of seconds")]
        enum Form {
            Number(u64),
            Text(String),
        }
        let wrong = |text: &str| {
            serde::de::Error::custom(format!(
                "{text:?} is not a time: write \"5s\", \"2min\", \"1h\" or a whole number of seconds"
            ))
        };
        match Form::deserialize(deserializer)? {
            Form::Number(seconds) => Ok(Self(seconds)),
            Form::Text(text) => {
                let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
                let number: u64 = digits.parse().map_err(|_| wrong(&text))?;
                let factor = match text[digits.len()..].trim() {
                    "" | "s" | "sec" => 1,
                    "m" | "min" => 60,
                    "h" | "hr" => 3600,
                    _ => return Err(wrong(&text)),
                };
                number.checked_mul(factor).map(Self).ok_or_else(|| wrong(&text))
            }
        }
    }
}

/// One name or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a node's name or a list of names")]
pub enum OneOrMany {
    /// `standby = "n2"`
    One(String),
    /// `standby = ["n2", "n3"]`
    Many(Vec<String>),
}

impl OneOrMany {
    /// All names.
    pub fn names(&self) -> &[String] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Many(names) => names,
        }
    }
}

/// An agent's parameter: text, number or truth value, handed on as text.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "a text, a whole number, true or false")]
pub enum Scalar {
    /// `"text"`
    Text(String),
    /// `17`
    Number(i64),
    /// `true`
    Truth(bool),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) => write!(f, "{number}"),
            Self::Truth(truth) => write!(f, "{truth}"),
        }
    }
}

fn default_remote_port() -> u16 {
    3121
}
fn default_reconnect() -> Seconds {
    Seconds(10)
}
fn default_level() -> u8 {
    1
}
fn default_fencing_interval() -> Seconds {
    Seconds(120)
}
fn default_memory() -> u64 {
    512
}
fn default_vcpus() -> Spanned<u32> {
    Spanned::new(0..0, 1)
}
fn default_failure_timeout() -> Seconds {
    Seconds(60)
}

/// What cannot be read as a policy: the place in the text, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Bytes of the text, if known.
    pub span: Option<Range<usize>>,
    /// A sentence.
    pub why: String,
}

impl Policy {
    /// Read a policy's text.
    pub fn parse(text: &str) -> Result<Self, Unreadable> {
        toml::from_str(text).map_err(|e| Unreadable { span: e.span(), why: e.message().trim().replace('\n', "; ") })
    }

    /// The JSON schema of a policy, for editors and for programs that write policies.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }
}

impl Machine {
    /// What happens to it when its host dies.
    pub fn mode(&self) -> Mode {
        match (&self.mode, self.protection) {
            (Some(mode), _) => *mode.get_ref(),
            (None, Protection::Protected) => Mode::Protected,
            (None, Protection::None) => Mode::Restart,
        }
    }

    /// Whether it has a standby.
    pub fn protected(&self) -> bool {
        self.mode() == Mode::Protected
    }
}
