//! "If this dies": which machine goes where, what cannot be placed, and what else is touched.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::policy::Policy;
use crate::simulate::{Outcome, Running, Scheduler, with_dead};
use crate::xml::Element;

/// What dies at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// As it was asked for: `n1`, `rack r1`, `n1,n2`.
    pub name: String,
    /// The nodes.
    pub nodes: Vec<String>,
}

/// What becomes of one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fate {
    /// The machine.
    pub machine: String,
    /// Where it ran.
    pub from: Option<String>,
    /// Where it runs afterwards.
    pub to: Option<String>,
    /// In a word.
    pub fate: What,
}

/// In a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Its host died and nothing permitted can hold it.
    Unplaced,
    /// Its host lives, and it is stopped for a machine of higher priority or for want of quorum.
    Stopped,
    /// Its host lives, and it moves.
    Moved,
    /// Its standby goes on.
    Takeover,
    /// It is started again elsewhere.
    Restarted,
    /// It was not running, and now does.
    Started,
}

/// What becomes of everything, for one fault. Machines that stay where they are, are not listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// What dies.
    pub fault: Fault,
    /// The survivors are too few: they start nothing.
    pub no_quorum: bool,
    /// Machines of which nothing changes.
    pub untouched: usize,
    /// The others.
    pub machines: Vec<Fate>,
}

impl Fault {
    /// Read `n1`, `rack:r1` or `n1,n2,rack:r2`.
    pub fn parse(text: &str, policy: &Policy) -> Result<Self> {
        let mut nodes: Vec<String> = Vec::new();
        for part in text.split(',').map(str::trim) {
            let before = nodes.len();
            match part.strip_prefix("rack:") {
                Some(rack) => nodes.extend(
                    policy
                        .nodes
                        .iter()
                        .filter(|n| n.rack.as_ref().is_some_and(|r| r.get_ref() == rack))
                        .map(|n| n.name.get_ref().clone()),
                ),
                None => nodes.extend(policy.nodes.iter().map(|n| n.name.get_ref().clone()).filter(|n| n == part)),
            }
            if nodes.len() == before {
                bail!("{part:?} is no node and no rack (rack:NAME) of this policy");
            }
        }
        nodes.sort();
        nodes.dedup();
        Ok(Self { name: text.into(), nodes })
    }

    /// Every node, and every rack, alone.
    pub fn all(policy: &Policy) -> Vec<Self> {
        let mut faults: Vec<Self> = policy
            .nodes
            .iter()
            .map(|n| Self { name: n.name.get_ref().clone(), nodes: vec![n.name.get_ref().clone()] })
            .collect();
        let mut racks: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for node in &policy.nodes {
            if let Some(rack) = &node.rack {
                racks.entry(rack.get_ref()).or_default().push(node.name.get_ref().clone());
            }
        }
        let racks = racks.into_iter().filter(|(_, nodes)| nodes.len() > 1);
        faults.extend(racks.map(|(rack, nodes)| Self { name: format!("rack:{rack}"), nodes }));
        faults
    }
}

/// Ask the scheduler what it would do in `cib` after the fault.
pub fn plan(scheduler: &Scheduler, policy: &Policy, cib: &Element, fault: &Fault) -> Result<Plan> {
    let cib = with_dead(cib, &fault.nodes);
    let no_quorum = cib.attribute("have-quorum") == Some("0");
    Ok(judge(policy, fault, no_quorum, &scheduler.ask(&cib)?))
}

/// Where each machine runs in `cib`, by the scheduler's own reading.
pub fn places(scheduler: &Scheduler, policy: &Policy, cib: &Element) -> Result<BTreeMap<String, String>> {
    let outcome = scheduler.ask(cib)?;
    let place = |m: &crate::policy::Machine| {
        Some((m.name.get_ref().clone(), runs_on(m.protected(), outcome.before.get(&m.vm_id()), &[])?))
    };
    Ok(policy.machines.iter().filter_map(place).collect())
}

/// Where the machine itself is, of all instances.
fn runs_on(policy_protected: bool, instances: Option<&Vec<Running>>, dead: &[String]) -> Option<String> {
    let instances = instances?;
    let it = instances.iter().filter(|r| r.promoted || !policy_protected);
    it.map(|r| r.node.clone()).find(|n| !dead.contains(n))
}

fn judge(policy: &Policy, fault: &Fault, no_quorum: bool, outcome: &Outcome) -> Plan {
    let mut machines = Vec::new();
    for machine in &policy.machines {
        let id = machine.vm_id();
        let from = runs_on(machine.protected(), outcome.before.get(&id), &[]);
        let to = runs_on(machine.protected(), outcome.after.get(&id), &fault.nodes);
        let died = from.as_ref().is_some_and(|n| fault.nodes.contains(n));
        let fate = match (&from, &to) {
            (Some(from), Some(to)) if from == to => continue,
            (None, None) => continue,
            (Some(_), None) if died => What::Unplaced,
            (Some(_), None) => What::Stopped,
            (Some(_), Some(_)) if !died => What::Moved,
            (Some(_), Some(_)) if machine.protected() => What::Takeover,
            (Some(_), Some(_)) => What::Restarted,
            (None, Some(_)) => What::Started,
        };
        machines.push(Fate { machine: machine.name.get_ref().clone(), from, to, fate });
    }
    machines.sort_by(|a, b| (a.fate, &a.machine).cmp(&(b.fate, &b.machine)));
    let untouched = policy.machines.len() - machines.len();
    Plan { fault: fault.clone(), no_quorum, untouched, machines }
}

/// The plan as lines for people and for golden logs.
pub fn table(plan: &Plan) -> String {
    let mut out = format!("if {} dies:\n", plan.fault.name);
    if plan.no_quorum {
        out.push_str("  the rest has no quorum: nothing is started elsewhere\n");
    }
    let none = |node: &Option<String>| node.clone().unwrap_or_else(|| "-".into());
    for m in &plan.machines {
        let line = match m.fate {
            What::Unplaced => format!("CANNOT BE PLACED (was on {})", none(&m.from)),
            What::Stopped => format!("STOPPED on {}, though its host lives", none(&m.from)),
            What::Moved => format!("moves from {} to {}, though its host lives", none(&m.from), none(&m.to)),
            What::Takeover => format!("goes on at its standby {} (was on {})", none(&m.to), none(&m.from)),
            What::Restarted => format!("is started again on {} (was on {})", none(&m.to), none(&m.from)),
            What::Started => format!("is started on {}", none(&m.to)),
        };
        let _ = writeln!(out, "  {:<20} {line}", m.machine);
    }
    let _ = writeln!(out, "  {} machines stay where they are", plan.untouched);
    out
}
