//! What the policy says of monitoring and of sharing a host: rows of the fault matrix, priorities.

use std::collections::BTreeSet;

use understudy_monitor::matrix::{Guest, Machine, Management, Matrix, Observation, Production, Row, Verdict};

use super::{Checker, Severity};
use crate::planes::one_network;
use crate::policy::Policy;

/// Everything that needs no placement to be judged.
pub fn check(c: &mut Checker, policy: &Policy) {
    matrix(c, policy);
    sharing(c, policy);
    heartbeats(c, policy);
}

fn sharing(c: &mut Checker, policy: &Policy) {
    let first = policy.machines.iter().find_map(|m| m.priority.as_ref());
    if let Some(priority) = first
        && policy.places()
        && policy.knows_capacity()
    {
        let pauses = if policy.pauses() { "; pausing gives back processors only" } else { "" };
        c.note(priority, format!("where memory is short, Pacemaker stops machines of lower priority{pauses}"));
    }
    let Some(at) = policy.cluster.load_sharing.as_ref().filter(|_| policy.pauses()) else { return };
    let distinct: BTreeSet<i32> =
        policy.machines.iter().map(|m| m.priority.as_ref().map_or(0, |p| *p.get_ref())).collect();
    if distinct.len() < 2 && !policy.machines.is_empty() {
        c.warn(at, "nobody is ever paused: all machines have the same priority");
    }
    let without = policy.nodes.iter().filter(|n| n.cpus.is_none());
    let names: Vec<&str> = without.map(|n| n.name.get_ref().as_str()).collect();
    if !names.is_empty() {
        let what = format!(
            "cpus is not given for {}: machines are paused there by the number of processors that the host has, and memory is no limit \
             to the agents",
            names.join(", ")
        );
        c.warn(at, what);
    }
    let most = policy.nodes.iter().filter_map(|n| n.cpus).max();
    for machine in policy.machines.iter().filter(|m| most.is_some_and(|cpus| *m.vcpus.get_ref() > cpus)) {
        let what = format!(
            "{} has {} vCPUs and no node as many cpus: it waits wherever a machine of higher priority runs",
            machine.name.get_ref(),
            machine.vcpus.get_ref()
        );
        c.warn(&machine.vcpus, what);
    }
}

fn heartbeats(c: &mut Checker, policy: &Policy) {
    let Some(at) = &policy.monitoring else {
        if let Some(row) = policy.matrix.first() {
            c.warn(row, "nothing reads the rows of the fault matrix: there is no [monitoring] section");
        }
        return;
    };
    let monitoring = at.get_ref();
    if !(20..=60_000).contains(&monitoring.interval_ms) {
        c.error(at, "monitoring.interval_ms must be 20 to 60000");
    }
    if !(2..=100).contains(&monitoring.missed) {
        c.error(at, "monitoring.missed must be 2 to 100");
    }
    if monitoring.port == 0 {
        c.error(at, "monitoring.port must not be 0");
    }
    for node in &policy.nodes {
        let name = node.name.get_ref();
        match (&node.business, &node.management) {
            (None, _) => c.error(
                &node.name,
                format!("{name} is to be monitored and has no business address: nobody could hear it in the production network"),
            ),
            (Some(_), None) => c.warn(
                &node.name,
                format!(
                    "{name} has no management address: cut off from production, it is as silent as if its monitor had ended, and a pulled \
                     cable cannot be told from that"
                ),
            ),
            (Some(business), Some(management)) if one_network(business.get_ref(), management.get_ref()) => c.warn(
                management,
                format!(
                    "{name}: {} and {} look like one network; watched twice over one, it is watched once",
                    business.get_ref(),
                    management.get_ref()
                ),
            ),
            _ => {}
        }
    }
    if policy.nodes.len() == 2 {
        c.note(at, "of two nodes that do not hear each other in the production network nobody can say which is cut off: that is an alarm");
    }
}

fn matrix(c: &mut Checker, policy: &Policy) {
    let rows: Vec<Row> = policy.matrix.iter().map(|row| row.get_ref().clone()).collect();
    let (matrix, bad) = match Matrix::with(&rows) {
        Ok(both) => both,
        Err(e) => return c.whole(Severity::Error, e.to_string()),
    };
    for row in bad {
        if let Some(at) = policy.matrix.get(row.index) {
            c.error(at, row.to_string());
        }
    }
    for at in &policy.matrix {
        let row = at.get_ref();
        let serves = |o: &Observation| {
            o.management == Management::Down
                && o.production == Production::Up
                && o.machine == Machine::Running
                && o.guest != Guest::Down
        };
        let kills = |o: Observation| serves(&o) && matrix.row(&o).is_some_and(|r| r.name == row.name);
        if row.verdict == Verdict::FenceAndEvacuate && Observation::all().any(kills) {
            let what = format!(
                "matrix row {} fences hosts whose machines are heard in the production network: they serve until then",
                row.name
            );
            c.warn(at, what);
        }
    }
}
