//! What an operator does about evacuation, from any node: changes of the cluster's records, each refused if anything else has changed.

use anyhow::{Result, bail};
use understudy_crm::live::{self, Swapped};
use understudy_crm::placement::{HOME, place};
use understudy_crm::records::{self, EVACUATED, Order, Plan, Records, What};
use understudy_crm::xml::Element;

use crate::cluster;

/// How often a change is tried that others were faster with.
const TRIES: u32 = 20;

/// The plans that the cluster has.
pub fn plans() -> Result<Vec<Plan>> {
    Ok(records::read(&live::query()?)?.plans)
}

/// Leave an order for the controller.
pub fn order(order: &Order) -> Result<()> {
    change(|cib| {
        let mut records = records::read(cib)?;
        if order.what == What::Drain {
            let policy = cluster::policy(cib).map_err(anyhow::Error::msg)?;
            if !policy.iter().flat_map(|p| &p.nodes).any(|n| *n.name.get_ref() == order.plan) {
                bail!("{} is not a host of the policy that the cluster was given", order.plan);
            }
        } else {
            check(order, &records)?;
        }
        let last = records.orders.keys().filter_map(|k| k.parse::<u64>().ok()).max().unwrap_or(0);
        records.orders.insert((last + 1).to_string(), order.clone());
        records::write(cib, &records);
        Ok(())
    })
}

fn check(order: &Order, records: &Records) -> Result<()> {
    if order.what == What::Retry {
        let state = &records.state;
        let known = |m: &&String| state.left.contains_key(*m) || state.stays.contains_key(*m);
        if let Some(machine) = order.machines.iter().find(|m| !known(m)) {
            bail!("{machine} is not one of the machines that were left where they are: see understudy-evacuator plans");
        }
        return Ok(());
    }
    let Some(plan) = records.plans.iter().find(|p| p.id == order.plan) else {
        bail!("there is no plan {}: see understudy-evacuator plans", order.plan);
    };
    if let Some(why) = &plan.closed {
        bail!("plan {} is over: {why}", plan.id);
    }
    match order.machines.iter().find(|name| !plan.moves.iter().any(|m| m.machine == **name)) {
        Some(name) => bail!("{name} is not in plan {}", plan.id),
        None => Ok(()),
    }
}

/// Give a machine that was evacuated its home in the policy back. Pacemaker then brings it there: live if it migrates, else by
/// stopping and starting it.
pub fn go_home(machine: &str) -> Result<String> {
    let mut home = String::new();
    change(|cib| {
        let Some(policy) = cluster::policy(cib).map_err(anyhow::Error::msg)? else {
            bail!("the cluster has no record of a policy: run understudy-crm apply");
        };
        let Some(m) = policy.machines.iter().position(|m| m.name.get_ref() == machine) else {
            bail!("there is no machine {machine} in the policy");
        };
        if !records::wishes(cib, machine).iter().any(|(_, score)| *score == EVACUATED) {
            bail!("{machine} was not evacuated: nothing is to be done");
        }
        let placed = &place(&policy)[m];
        let Some(node) = placed.home().map(|n| policy.nodes[n].name.get_ref().clone()) else {
            bail!("the policy has no home for {machine}");
        };
        let scores: Vec<(String, i32)> =
            placed.targets.iter().map(|t| (policy.nodes[t.node].name.get_ref().clone(), t.score)).collect();
        debug_assert!(scores.iter().any(|(_, score)| *score == HOME));
        records::set_wishes(cib, machine, &scores);
        home = node;
        Ok(())
    })?;
    Ok(home)
}

fn change(f: impl FnMut(&mut Element) -> Result<()>) -> Result<()> {
    let mut f = f;
    for _ in 0..TRIES {
        let current = live::query()?;
        live::ensure_cib(&current)?;
        let mut wanted = current.clone();
        f(&mut wanted)?;
        if live::apply_if_unchanged(&current, &wanted)? == Swapped::Done {
            return Ok(());
        }
    }
    bail!("the cluster changed {TRIES} times while this was written; try again")
}
