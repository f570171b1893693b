//! The estate: racks, clusters, capacity, evacuation policies, and what is written down but not acted on yet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Checker, Severity};
use crate::estate::{Automation, Evacuation, Mode, Plane};
use crate::placement::{Place, Placed};
use crate::policy::{Machine, Policy, Protection, Spanned};

/// Everything that needs no placement to be judged.
pub fn check(c: &mut Checker, policy: &Policy) {
    if !(1..=64).contains(policy.cluster.candidates.get_ref()) {
        c.error(&policy.cluster.candidates, "cluster.candidates must be 1 to 64");
    }
    for node in &policy.nodes {
        for (what, name) in
            [("rack", &node.rack), ("cluster", &node.cluster), ("high_performance", &node.high_performance)]
        {
            name.iter().for_each(|name| c.label(what, name));
        }
        if node.memory == Some(0) || node.cpus == Some(0) {
            c.error(&node.name, "memory and cpus of a node must not be 0; leave out what is not known");
        }
    }
    networks(c, policy);
    let asked = policy.cluster.automation.iter().chain(policy.machines.iter().filter_map(|m| m.automation.as_ref()));
    if let Some(semi) = asked.into_iter().find(|a| *a.get_ref() == Automation::Semi)
        && !policy.alerts.iter().any(|a| a.approves)
    {
        c.warn(semi, "nobody is asked: no recipient in [[alerts]] has approves = true, so that only an operator's command releases a machine");
    }
    for (span, what) in policy.evacuation.iter().flat_map(|rules| rules.mistakes()) {
        c.error(&Spanned::new(span, ()), what);
    }
    if policy.places() && !policy.knows_capacity() && policy.nodes.iter().any(|n| n.memory.is_some()) {
        let without = policy.nodes.iter().filter(|n| n.memory.is_none());
        let names: Vec<&str> = without.map(|n| n.name.get_ref().as_str()).collect();
        let what = format!("memory is no limit for any node, because it is not given for {}", names.join(", "));
        c.whole(Severity::Warning, what);
    }
    let known = Known {
        clusters: policy.nodes.iter().map(|n| n.cluster_name()).collect(),
        dedicated: policy.nodes.iter().filter_map(|n| Some(n.high_performance.as_ref()?.get_ref().as_str())).collect(),
        ordinary: policy.ordinary_clusters().into_iter().map(str::to_string).collect(),
    };
    for machine in &policy.machines {
        of_machine(c, policy, machine, &known);
    }
}

struct Known<'a> {
    clusters: BTreeSet<&'a str>,
    dedicated: BTreeSet<&'a str>,
    ordinary: Vec<String>,
}

fn of_machine(c: &mut Checker, policy: &Policy, machine: &Machine, known: &Known) {
    let name = machine.name.get_ref();
    if let Some(mode) = &machine.mode
        && *mode.get_ref() == Mode::Protected
        && machine.protection == Protection::None
    {
        c.error(mode, "mode = \"protected\" and protection = \"none\" contradict each other: leave out protection");
    }
    if let Some(business) = &machine.business {
        c.label("business", business);
    }
    if let Some(priority) = machine.priority.as_ref().filter(|p| !(0..=10_000).contains(p.get_ref())) {
        c.error(priority, "priority must be 0 to 10000");
    }
    if let Some(cluster) = machine.cluster.as_ref().filter(|x| !known.clusters.contains(x.get_ref().as_str())) {
        c.error(cluster, format!("no node belongs to cluster {}", cluster.get_ref()));
    }
    if let Some(id) = machine.high_performance.as_ref().filter(|x| !known.dedicated.contains(x.get_ref().as_str())) {
        c.error(id, format!("no node belongs to the dedicated cluster {}", id.get_ref()));
    }
    if !policy.places() {
        return;
    }
    let named = machine.primary.is_some() && machine.standby.is_some();
    if machine.cluster.is_none() && !named && known.ordinary.len() != 1 {
        let primary_says =
            machine.primary.as_ref().is_some_and(|p| policy.nodes.iter().any(|n| n.name == *p && !n.dedicated()));
        if !primary_says {
            let what = match &known.ordinary[..] {
                [] => format!("{name} has no cluster of its own: every node is dedicated. Say cluster"),
                many => format!("which of the clusters {} is {name}'s? Say cluster or primary", many.join(", ")),
            };
            c.error(&machine.name, what);
        }
    }
    if named {
        if let Some(evacuation) = &machine.evacuation {
            c.warn(evacuation, format!("evacuation is not used: primary and standby name {name}'s nodes"));
        }
        return;
    }
    if let Some(at) = machine.evacuation.as_ref().filter(|e| e.get_ref().uses_dedicated()) {
        let only = *at.get_ref() == Evacuation::Dedicated;
        let nowhere = if only { ", so it can go nowhere" } else { "" };
        if !machine.high_performance_need() {
            let what = format!("{name} never goes to the dedicated cluster{nowhere}: its performance is not \"high\"");
            c.warn(at, what);
        } else if known.dedicated.is_empty() {
            c.warn(at, format!("there is no dedicated cluster{nowhere}: no node has high_performance"));
        }
    }
}

/// A business type's homes.
struct Kind<'a> {
    machines: usize,
    racks: BTreeSet<Option<&'a str>>,
    /// Where the policy first speaks of it.
    first: &'a Spanned<String>,
}

/// What only shows once machines have their places.
pub fn placed(c: &mut Checker, policy: &Policy, placed: &[Placed]) {
    let rack = |node: usize| policy.nodes[node].rack.as_ref().map(|r| r.get_ref().as_str());
    let mut of_type: BTreeMap<&str, Kind> = BTreeMap::new();
    let mut used = vec![0_u64; policy.nodes.len()];
    for (machine, placed) in policy.machines.iter().zip(placed) {
        let name = machine.name.get_ref();
        let Some(home) = placed.home() else { continue };
        used[home] = used[home].saturating_add(machine.memory);
        if let Some(business) = &machine.business {
            let none = || Kind { machines: 0, racks: BTreeSet::new(), first: business };
            let kind = of_type.entry(business.get_ref()).or_insert_with(none);
            kind.machines += 1;
            kind.racks.insert(rack(home));
        }
        if machine.protected() {
            if let Some(standby) = placed.targets.get(1).map(|t| t.node) {
                used[standby] = used[standby].saturating_add(machine.memory);
                if rack(home).is_some() && rack(home) == rack(standby) {
                    let (first, second) = (policy.nodes[home].name.get_ref(), policy.nodes[standby].name.get_ref());
                    let what = format!(
                        "{name}'s primary {first} and standby {second} are both in rack {}: its power cut takes both",
                        rack(home).unwrap_or_default()
                    );
                    c.warn(&machine.name, what);
                }
            }
        } else if machine.mode() == Mode::Restart && placed.targets.len() < 2 && placed.held.is_empty() {
            let home = policy.nodes[home].name.get_ref();
            c.warn(
                &machine.name,
                format!("nothing can hold {name} if {home} dies: no other node is permitted and has room"),
            );
        }
        let holds = |t: &&crate::placement::Target| {
            t.place != Place::Home && policy.nodes[t.node].memory.is_some_and(|memory| memory < machine.memory)
        };
        let small: Vec<&str> =
            placed.targets.iter().filter(holds).map(|t| policy.nodes[t.node].name.get_ref().as_str()).collect();
        if !small.is_empty() {
            let (word, names) =
                if small.len() == 1 { ("target", small[0].into()) } else { ("targets", small.join(", ")) };
            c.warn(
                &machine.name,
                format!("{word} {names} cannot hold machine {name}'s memory, {} MiB", machine.memory),
            );
        }
    }
    for (business, kind) in of_type {
        if let (true, Some(Some(rack))) = (kind.machines > 1 && kind.racks.len() == 1, kind.racks.first()) {
            let what = format!(
                "rack {rack} holds all {} machines of business type {business}: its power cut takes all",
                kind.machines
            );
            c.warn(kind.first, what);
        }
    }
    for (node, used) in policy.nodes.iter().zip(used) {
        if let Some(memory) = node.memory.filter(|memory| used > *memory) {
            let what = format!(
                "node {} is home or standby to machines of {used} MiB and has {memory} MiB: some of them will not start there",
                node.name.get_ref()
            );
            c.warn(&node.name, what);
        }
    }
}

fn networks(c: &mut Checker, policy: &Policy) {
    let mut names = BTreeSet::new();
    for network in &policy.networks {
        c.label("network", &network.name);
        if !names.insert(network.name.get_ref()) {
            c.error(&network.name, format!("there are two networks {}", network.name.get_ref()));
        }
        let Some(subnet) = &network.subnet else { continue };
        let Some((address, bits)) = subnet_of(subnet.get_ref()) else {
            c.error(subnet, format!("{:?} is not a subnet: write 10.77.1.0/24 or fd00::/64", subnet.get_ref()));
            continue;
        };
        let alone = policy.networks.iter().filter(|n| n.plane == network.plane).count() == 1;
        for node in policy.nodes.iter().filter(|_| alone) {
            let on = match network.plane {
                Plane::Management => &node.management,
                Plane::Business => &node.business,
                Plane::Storage => &node.storage,
            };
            // A host's name says nothing of its address.
            let Some(on) = on else { continue };
            let Ok(ip) = on.get_ref().parse::<IpAddr>() else { continue };
            if prefix(ip, bits) != prefix(address, bits) {
                c.error(on, format!("{ip} is not in network {} ({})", network.name.get_ref(), subnet.get_ref()));
            }
        }
    }
}

fn subnet_of(text: &str) -> Option<(IpAddr, u32)> {
    let (address, bits) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let bits: u32 = bits.parse().ok()?;
    (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, bits))
}

/// The first bits of an address, and its family.
fn prefix(address: IpAddr, bits: u32) -> (bool, u128) {
    let (number, width) = match address {
        IpAddr::V4(a) => (u128::from(a.to_bits()), 32),
        IpAddr::V6(a) => (a.to_bits(), 128),
    };
    (address.is_ipv4(), number.checked_shr(width - bits.min(width)).unwrap_or(0))
}
