//! What the core is given and what it answers.

use std::collections::BTreeMap;

use understudy_crm::records::Records;
use understudy_monitor::matrix::{Observation, Verdict};

/// A host, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// A member that takes machines.
    Up,
    /// It is about to become one, or nothing is known of it yet: nothing is concluded.
    Joining,
    /// A member that gives machines away or leaves them alone: standby, maintenance, shutting down.
    Leaving,
    /// Lost, and nobody has confirmed that it is dead. What ran there may run.
    Unclean,
    /// Not a member, and certainly dead: fenced, or stopped in order.
    Down,
}

/// A machine, as the cluster sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MachineNow {
    /// The cluster has it, manages it, and nobody wants it stopped.
    pub wanted: bool,
    /// Nodes on which something of it is, or may be: starting, running, standing by, stopping, on a host that is not known to be dead.
    pub on: Vec<usize>,
    /// The node on which it runs (of a protected one: the promoted instance), if that host is not unclean.
    pub runs: Option<usize>,
    /// It is being migrated.
    pub migrating: bool,
    /// Its scores.
    pub wishes: Vec<(usize, i32)>,
    /// Nodes on which it has failed so often that the cluster does not start it there.
    pub failed: Vec<usize>,
}

impl MachineNow {
    /// Where it is at home: the node with the highest score.
    pub fn home(&self) -> Option<usize> {
        self.wishes.iter().max_by_key(|(node, score)| (*score, std::cmp::Reverse(*node))).map(|(node, _)| *node)
    }
}

/// What the monitors find of a host, or of a machine on it, and what follows by the fault matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The host.
    pub node: usize,
    /// The machine; `None` for the host itself.
    pub machine: Option<usize>,
    /// What is seen.
    pub seen: Observation,
    /// Name of the row of the matrix that decides.
    pub row: String,
    /// What follows.
    pub verdict: Verdict,
    /// For how long it has been so, seconds.
    pub lasts: u64,
}

/// Whether somebody has agreed to a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApprovalState {
    /// Nobody has been asked.
    NotAsked,
    /// Somebody has, until then (seconds since 1970).
    Waiting {
        /// When the question expires.
        expires: u64,
    },
    /// Yes.
    Approved {
        /// Who.
        by: String,
    },
    /// No.
    Refused {
        /// Who.
        by: String,
    },
    /// Nobody has answered in time.
    Expired,
}

/// One reading of the cluster. Indices are those of the policy's nodes and machines.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Seconds since 1970.
    pub now: u64,
    /// The node that the controller runs on.
    pub here: String,
    /// This partition decides.
    pub quorum: bool,
    /// The administrator has told Pacemaker to keep its hands off.
    pub maintenance: bool,
    /// Of this host's links to other members: how many reach somebody, and how many there are. `None`: nobody could tell.
    pub links: Option<(usize, usize)>,
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Measured load of each, percent.
    pub load: Vec<Option<u32>>,
    /// The machines.
    pub machines: Vec<MachineNow>,
    /// Pacemaker itself moves what is on an ill host (`node-health-strategy`).
    pub health: bool,
    /// What the monitors find. `None`: nobody could tell.
    pub findings: Option<Vec<Finding>>,
    /// What the controller has kept.
    pub records: Records,
    /// By plan. What is not there has not been asked.
    pub approvals: BTreeMap<String, ApprovalState>,
}

impl Snapshot {
    /// The monitors say that machines are to leave this host.
    pub fn is_left(&self, node: usize) -> bool {
        self.findings.iter().flatten().any(|f| f.node == node && f.machine.is_none() && f.verdict == Verdict::Move)
    }
}

/// Something that a person has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    /// The same for the same trouble: who is told twice is told once.
    pub key: String,
    /// The machine, if it is about one.
    pub machine: Option<String>,
    /// A sentence: what is, and what to do.
    pub text: String,
}

/// What is to be done. In this order: alarms; then records and scores in one change that fails if the cluster is not that of the
/// snapshot any more; then the questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// To be told. At least once: if the change fails, or the controller dies before it, they come again, with the same keys.
    pub alarms: Vec<Alarm>,
    /// The records as they should be.
    pub records: Records,
    /// Machines and the scores that they should have, instead of those that they have.
    pub scores: Vec<(usize, Vec<(usize, i32)>)>,
    /// Plans that somebody has to be asked about.
    pub ask: Vec<String>,
}
