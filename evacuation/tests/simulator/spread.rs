//! Whether new plans keep business types in more than one rack whenever anything would: by trying everything.

use std::collections::{BTreeMap, BTreeSet};

use understudy_crm::policy::{Machine, Policy};
use understudy_crm::records::Kind;
use understudy_evacuation::core::model::{Host, Round, Snapshot};

/// More combinations than that are not tried.
const MOST: usize = 4_000;

/// The nodes that the machine's evacuation policy permits, as the specification says it (E-5, E-6).
fn permitted(policy: &Policy, machine: &Machine) -> Vec<usize> {
    let tier = |n: usize| {
        let dedicated = policy.nodes[n].high_performance.is_some();
        (!dedicated || machine.high_performance_need()) && machine.evacuation().tier(dedicated).is_some()
    };
    (0..policy.nodes.len()).filter(|n| tier(*n)).collect()
}

/// Types of which one rack holds all, if there are two or more.
fn crowded(policy: &Policy, runs: &[Option<usize>]) -> usize {
    let mut racks: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (machine, node) in policy.machines.iter().zip(runs) {
        if let (Some(kind), Some(node)) = (&machine.business, node) {
            let rack = policy.nodes[*node].rack.as_ref().unwrap().get_ref();
            racks.entry(kind.get_ref()).or_default().push(rack);
        }
    }
    let alone = |r: &&Vec<&str>| r.len() > 1 && r.iter().collect::<BTreeSet<_>>().len() == 1;
    racks.values().filter(alone).count()
}

/// Whether every machine that is placed anew has room beside what is at least as important.
fn fits(policy: &Policy, runs: &[Option<usize>], new: &[usize]) -> bool {
    if !policy.knows_capacity() {
        return true;
    }
    new.iter().all(|&m| {
        let Some(node) = runs[m] else { return true };
        let least = policy.machines[m].priority();
        let beside = policy.machines.iter().zip(runs).filter(|(x, n)| **n == Some(node) && x.priority() >= least);
        beside.map(|(x, _)| x.memory).sum::<u64>() <= policy.nodes[node].memory.unwrap_or(0)
    })
}

pub fn check(policy: &Policy, snapshot: &Snapshot, round: &Round) -> Result<(), String> {
    // What leaves a host alive takes room on two, which this does not count.
    if round.records.plans.iter().any(|p| p.kind == Kind::Drain && p.closed.is_none()) {
        return Ok(());
    }
    let is_new = |id: &str| snapshot.records.plans.iter().all(|p| p.id != id);
    let index = |name: &str| policy.machines.iter().position(|m| m.name.get_ref() == name);
    let node = |name: &str| policy.nodes.iter().position(|n| n.name.get_ref() == name);
    let moves = round.records.plans.iter().filter(|p| is_new(&p.id)).flat_map(|p| &p.moves);
    let new: Vec<(usize, usize)> =
        moves.map(|m| (index(&m.machine).expect("known"), node(&m.to).expect("known"))).collect();
    if new.is_empty() {
        return Ok(());
    }
    // What is where apart from them.
    let mut runs: Vec<Option<usize>> = snapshot
        .machines
        .iter()
        .map(|m| {
            let starts = |n: &usize| !m.failed.contains(n) && matches!(snapshot.hosts[*n], Host::Up | Host::Joining);
            let home = m.home().filter(starts);
            let here = m.runs.or(m.on.first().copied()).or(home);
            here.filter(|n| !matches!(snapshot.hosts[*n], Host::Unclean | Host::Down))
        })
        .collect();
    let open = round.records.plans.iter().filter(|p| p.closed.is_none()).flat_map(|p| &p.moves);
    for m in open.filter(|m| !m.progress.over()) {
        runs[index(&m.machine).expect("known")].get_or_insert(node(&m.to).expect("known"));
    }
    let machines: Vec<usize> = new.iter().map(|n| n.0).collect();
    let planned = crowded(policy, &runs);
    if !fits(policy, &runs, &machines) {
        return Err("a plan gives machines more memory than there is".into());
    }
    let choices: Vec<Vec<usize>> = machines
        .iter()
        .map(|&m| {
            let now = &snapshot.machines[m];
            let up = |n: &usize| {
                snapshot.hosts[*n] == Host::Up
                    && !snapshot.is_left(*n)
                    && !now.failed.contains(n)
                    && now.home() != Some(*n)
            };
            permitted(policy, &policy.machines[m]).into_iter().filter(up).collect()
        })
        .collect();
    for ((m, to), choices) in new.iter().zip(&choices) {
        if !choices.contains(to) {
            return Err(format!("machine {m} is to go to {to}, which its policy does not permit"));
        }
    }
    if planned == 0 || choices.iter().map(Vec::len).product::<usize>() > MOST {
        return Ok(());
    }
    let mut at = vec![0; choices.len()];
    loop {
        for (i, &m) in machines.iter().enumerate() {
            runs[m] = Some(choices[i][at[i]]);
        }
        if crowded(policy, &runs) < planned && fits(policy, &runs, &machines) {
            let better: Vec<Option<usize>> = machines.iter().map(|m| runs[*m]).collect();
            return Err(format!(
                "machines {machines:?} on {better:?} would leave fewer types in one rack than {new:?}"
            ));
        }
        let Some(i) = (0..at.len()).find(|&i| at[i] + 1 < choices[i].len()) else { return Ok(()) };
        at[i] += 1;
        at[..i].fill(0);
    }
}
