//! The brakes: each a question that must be answered before machines are started elsewhere.
//!
//! *Closed* means: without a good answer nothing is started. The *gates* hold for everybody, an operator included. The *brakes* are
//! for mass failures and hold what would happen by itself: a person who has seen the plan may pass them.

use understudy_crm::policy::Policy;
use understudy_crm::records::{Kind, Plan};
use understudy_monitor::matrix::Verdict;

use super::model::{Host, Snapshot};

/// One of them, for the documentation.
#[derive(Debug, Clone, Copy)]
pub struct Brake {
    /// Its name.
    pub name: &'static str,
    /// What it asks.
    pub question: &'static str,
    /// What happens if there is no answer.
    pub unknown: &'static str,
    /// An operator's release or approval passes it.
    pub passable: bool,
}

/// All of them.
pub const BRAKES: [Brake; 8] = [
    Brake {
        name: "fence",
        question: "Is the host of this machine certainly dead?",
        unknown: "closed: its machines wait for the fence",
        passable: false,
    },
    Brake { name: "quorum", question: "Does this partition decide?", unknown: "closed", passable: false },
    Brake {
        name: "maintenance",
        question: "Has the administrator told the cluster to keep its hands off?",
        unknown: "closed",
        passable: false,
    },
    Brake {
        name: "fresh",
        question: "Is the cluster still what it was when this was decided?",
        unknown: "closed: the change fails and is decided anew",
        passable: false,
    },
    Brake {
        name: "links",
        question: "Do my own links reach the others, or is it me who is cut off?",
        unknown: "open: quorum has answered already",
        passable: true,
    },
    Brake {
        name: "max_down",
        question: "Are so many hosts down that something else must be wrong?",
        unknown: "closed: hosts whose state is unknown count as down",
        passable: true,
    },
    Brake {
        name: "max_rack_down",
        question: "Are so many hosts of this rack down that the rack itself is the trouble?",
        unknown: "open: without the setting a whole rack is evacuated",
        passable: true,
    },
    Brake {
        name: "matrix",
        question: "Do the monitors say that nothing of this host may be started until somebody has looked (`freeze`)?",
        unknown: "open: fencing has answered already",
        passable: true,
    },
];

/// Why nothing may be started at all.
pub fn gate(snapshot: &Snapshot) -> Option<String> {
    if !snapshot.quorum {
        return Some("this partition has no quorum".into());
    }
    if snapshot.maintenance {
        return Some("the cluster is in maintenance mode".into());
    }
    None
}

/// Why this plan does not go on by itself.
pub fn brake(policy: &Policy, snapshot: &Snapshot, plan: &Plan) -> Option<String> {
    let rules = policy.rules();
    if let Some((up, of)) = snapshot.links
        && of > 1
        && (of - up.min(of)) * 2 >= of
    {
        let here = &snapshot.here;
        return Some(format!("{} of {of} links of {here} reach nobody: it may be {here} that is cut off", of - up));
    }
    // What leaves an ill host goes the same way as what has lost its own: both are mass failures if they are many.
    let left = |at: &usize| plan.kind == Kind::Drain && snapshot.is_left(*at);
    let down =
        |at: &usize| matches!(snapshot.hosts.get(*at), Some(Host::Down | Host::Unclean | Host::Joining)) || left(at);
    let all = policy.nodes.len();
    let lost = (0..all).filter(down).count();
    let most = usize::from(*rules.max_down.get_ref());
    // One host alone is no mass failure, however few there are.
    if lost > 1 && lost * 100 > all * most {
        let what = if plan.kind == Kind::Drain { "down or to be left" } else { "down" };
        return Some(format!("{lost} of {all} hosts are {what}, more than max_down = {most} percent"));
    }
    frozen(policy, snapshot, plan).or_else(|| crowd_of_a_rack(policy, down, plan))
}

/// Nothing is too short here: a verdict that keeps machines where they are counts at once.
fn frozen(policy: &Policy, snapshot: &Snapshot, plan: &Plan) -> Option<String> {
    let freezes = snapshot.findings.iter().flatten().filter(|f| f.verdict == Verdict::Freeze);
    freezes.into_iter().find_map(|f| {
        let host = policy.nodes[f.node].name.get_ref();
        let machine = f.machine.map(|m| policy.machines[m].name.get_ref());
        let mut left = plan.moves.iter().filter(|m| !m.progress.over() && m.from == *host);
        let concerns = left.any(|m| machine.is_none_or(|name| m.machine == *name));
        concerns.then(|| format!("the monitors say freeze of {host} (row {}: {})", f.row, f.seen))
    })
}

fn crowd_of_a_rack(policy: &Policy, down: impl Fn(&usize) -> bool, plan: &Plan) -> Option<String> {
    let limit = policy.rules().max_rack_down.as_ref().map(|limit| *limit.get_ref() as usize)?;
    plan.lost.iter().find_map(|lost| {
        let rack = policy.nodes.iter().find(|n| n.name.get_ref() == lost)?.rack.as_ref()?;
        let of_rack =
            policy.nodes.iter().enumerate().filter(|(n, node)| node.rack.as_ref() == Some(rack) && down(n)).count();
        let rack = rack.get_ref();
        (of_rack > limit).then(|| format!("{of_rack} hosts of rack {rack} are down, more than max_rack_down = {limit}"))
    })
}
