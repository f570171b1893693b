//! The cluster's CIB as a [`Snapshot`], and a [`Round`] as the CIB that it wants. No I/O: texts in, texts out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use understudy_crm::policy::{Machine, Policy};
use understudy_crm::records;
use understudy_crm::xml::Element;
use understudy_monitor::report::Report;

use crate::core::model::{ApprovalState, Finding, Host, MachineNow, Round, Snapshot};

pub use understudy_monitor::load::ATTRIBUTE as LOAD;

/// What is known besides the CIB.
#[derive(Debug, Clone, Default)]
pub struct Beside {
    /// Seconds since 1970.
    pub now: u64,
    /// This node.
    pub here: String,
    /// Its links to other members: how many reach somebody, of how many.
    pub links: Option<(usize, usize)>,
    /// Where the questions stand, by plan.
    pub approvals: BTreeMap<String, ApprovalState>,
    /// What this node's monitor says; `None` if there is none, or it does not answer.
    pub report: Option<Report>,
}

/// The policy that the cluster was given; `None`: none that needs a controller. The error is a sentence.
pub fn policy(cib: &Element) -> Result<Option<Policy>, String> {
    records::property(cib, records::POLICY).map(understudy_crm::controller::read_estate).transpose()
}

/// Read the cluster: its CIB, and what crm_mon says of the same CIB. The error is a sentence.
pub fn read(policy: &Policy, cib: &Element, status: &Element, beside: Beside) -> Result<Snapshot, String> {
    let (Some(nodes), Some(resources)) = (status.child("nodes"), status.child("resources")) else {
        return Err("crm_mon said nothing of nodes and resources; is its version known?".into());
    };
    let by_name: HashMap<&str, usize> =
        policy.nodes.iter().enumerate().map(|(n, node)| (node.name.get_ref().as_str(), n)).collect();
    let mut hosts = vec![Host::Joining; policy.nodes.len()];
    let health = property(cib, "node-health-strategy");
    for node in &nodes.children {
        if let Some(n) = node.attribute("name").and_then(|name| by_name.get(name)) {
            hosts[*n] = host(node, health);
        }
    }
    let mut seen = HashMap::new();
    collect(resources, &mut seen);
    let transient = transient(cib);
    let thresholds = thresholds(cib);
    let maintenance = is_true(property(cib, "maintenance-mode"));
    let machines = policy.machines.iter().map(|machine| {
        let id = machine.vm_id();
        let wishes = records::wishes(cib, machine.name.get_ref());
        MachineNow {
            wishes: wishes.into_iter().filter_map(|(node, score)| Some((*by_name.get(node)?, score))).collect(),
            failed: too_often(&id, thresholds.get(&id).copied(), &transient, &by_name),
            ..state(
                machine,
                seen.get(id.as_str()).map(Vec::as_slice).unwrap_or_default(),
                &by_name,
                &hosts,
                maintenance,
            )
        }
    });
    let load = |n: usize| {
        let attributes = transient.get(policy.nodes[n].name.get_ref().as_str())?;
        attributes.get(LOAD)?.parse::<u32>().ok().map(|percent| percent.min(1000))
    };
    Ok(Snapshot {
        now: beside.now,
        here: beside.here,
        quorum: cib.attribute("have-quorum") == Some("1"),
        maintenance,
        links: beside.links,
        machines: machines.collect(),
        load: (0..policy.nodes.len()).map(load).collect(),
        hosts,
        health: property(cib, "node-health-strategy").is_some_and(|strategy| strategy != "none"),
        findings: beside.report.and_then(|report| findings(policy, report, &by_name)),
        records: records::read(cib).map_err(|e| e.to_string())?,
        approvals: beside.approvals,
    })
}

/// The CIB with the round's records and scores; `None` if nothing is to be changed.
pub fn wanted(policy: &Policy, cib: &Element, snapshot: &Snapshot, round: &Round) -> Option<Element> {
    if round.records == snapshot.records && round.scores.is_empty() {
        return None;
    }
    let mut wanted = cib.clone();
    records::write(&mut wanted, &round.records);
    for (m, scores) in &round.scores {
        let name = |n: usize| policy.nodes[n].name.get_ref().clone();
        let scores: Vec<(String, i32)> = scores.iter().map(|(n, score)| (name(*n), *score)).collect();
        records::set_wishes(&mut wanted, policy.machines[*m].name.get_ref(), &scores);
    }
    Some(wanted)
}

/// What the monitor judges of the policy's nodes and machines; `None` while it judges nothing.
fn findings(policy: &Policy, report: Report, by_name: &HashMap<&str, usize>) -> Option<Vec<Finding>> {
    if report.waits_for.is_some() {
        return None;
    }
    let of = |name: &str| policy.machines.iter().position(|m| m.name.get_ref() == name);
    let known = report.judged.into_iter().filter_map(|j| {
        let machine = match &j.machine {
            Some(name) => Some(of(name)?),
            None => None,
        };
        let node = *by_name.get(j.node.as_str())?;
        Some(Finding { node, machine, seen: j.observation, row: j.row, verdict: j.verdict, lasts: j.for_ms / 1000 })
    });
    Some(known.collect())
}

fn is_true(value: Option<&str>) -> bool {
    value.is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "true" | "yes" | "on" | "1" | "y"))
}

/// What one line of crm_mon's says of a node, and what the cluster does with nodes that are not healthy.
fn host(node: &Element, health_strategy: Option<&str>) -> Host {
    let is = |name| node.attribute(name) == Some("true");
    if is("unclean") {
        Host::Unclean
    } else if is("pending") {
        Host::Joining
    } else if !is("online") {
        Host::Down
    } else if is("standby")
        || is("standby_onfail")
        || is("maintenance")
        || is("shutdown")
        || left(node, health_strategy)
    {
        Host::Leaving
    } else {
        Host::Up
    }
}

/// Whether everything leaves the node because of its health.
fn left(node: &Element, strategy: Option<&str>) -> bool {
    match strategy {
        Some("migrate-on-red") => node.attribute("health") == Some("red"),
        Some("only-green") => matches!(node.attribute("health"), Some("red" | "yellow")),
        _ => false,
    }
}

/// All resources by id, a clone's instances under that of the primitive.
fn collect<'a>(element: &'a Element, into: &mut HashMap<&'a str, Vec<&'a Element>>) {
    for child in &element.children {
        if child.name == "resource" {
            into.entry(child.id().split(':').next().unwrap_or_default()).or_default().push(child);
        } else {
            collect(child, into);
        }
    }
}

fn state(
    machine: &Machine,
    instances: &[&Element],
    by_name: &HashMap<&str, usize>,
    hosts: &[Host],
    maintenance: bool,
) -> MachineNow {
    let is = |r: &Element, name| r.attribute(name) == Some("true");
    let unwanted = |r: &&Element| {
        let role = r.attribute("target_role").unwrap_or("Started");
        let role_is = |names: [&str; 3]| names.iter().any(|n| role.eq_ignore_ascii_case(n));
        let stopped = role_is(["Stopped", "", ""]) || machine.protected() && role_is(["Unpromoted", "Slave", ""]);
        // In maintenance mode nothing is managed, and everything is wanted as it was.
        let managed = maintenance || is(r, "managed");
        !managed || stopped || is(r, "orphaned")
    };
    let mut now = MachineNow { wanted: !instances.iter().any(unwanted) && !instances.is_empty(), ..Default::default() };
    for resource in instances {
        let role = resource.attribute("role").unwrap_or_default();
        now.migrating |= role == "Migrating";
        let works = match role {
            "Started" => !machine.protected(),
            "Promoted" | "Master" => true,
            // It runs, on its way.
            "Migrating" => true,
            _ => false,
        };
        for node in resource.children.iter().filter(|n| n.name == "node") {
            // A node that the policy does not know may hold it too: then it is somewhere, and nothing is done about it.
            let Some(&n) = node.attribute("name").and_then(|name| by_name.get(name)) else {
                now.wanted = false;
                continue;
            };
            if !now.on.contains(&n) {
                now.on.push(n);
            }
            if works && !is(resource, "failed") && hosts[n] != Host::Unclean {
                now.runs = Some(n);
            }
        }
    }
    now
}

/// Transient attributes, by node name.
fn transient(cib: &Element) -> HashMap<&str, BTreeMap<&str, &str>> {
    let states = cib.child("status").map(|s| s.children.as_slice()).unwrap_or_default();
    let of = |state: &'static str| move |e: &&Element| e.name == state;
    let mut out: HashMap<&str, BTreeMap<&str, &str>> = HashMap::new();
    for state in states.iter().filter(of("node_state")) {
        let Some(node) = state.attribute("uname") else { continue };
        let sets = state.children.iter().filter(of("transient_attributes")).flat_map(|t| &t.children);
        let pairs = sets.flat_map(|s| &s.children);
        out.entry(node).or_default().extend(pairs.filter_map(|p| Some((p.attribute("name")?, p.attribute("value")?))));
    }
    out
}

/// `migration-threshold` of each primitive that has one.
fn thresholds(cib: &Element) -> HashMap<String, u64> {
    fn walk(element: &Element, inherited: Option<u64>, out: &mut HashMap<String, u64>) {
        for child in element.children.iter().filter(|c| matches!(c.name.as_str(), "primitive" | "clone" | "group")) {
            let sets = child.children.iter().filter(|c| c.name == "meta_attributes").flat_map(|s| &s.children);
            let mut of_name = sets.filter(|p| p.attribute("name") == Some("migration-threshold"));
            let own = of_name.find_map(|p| p.attribute("value")?.parse().ok()).or(inherited);
            if child.name == "primitive" {
                out.extend(own.map(|own| (child.id().to_string(), own)));
            }
            walk(child, own, out);
        }
    }
    let mut out = HashMap::new();
    if let Some(resources) = cib.child("configuration").and_then(|c| c.child("resources")) {
        walk(resources, None, &mut out);
    }
    out
}

/// Nodes on which the resource has failed as often as its threshold says, or for good.
fn too_often(
    id: &str,
    threshold: Option<u64>,
    transient: &HashMap<&str, BTreeMap<&str, &str>>,
    by_name: &HashMap<&str, usize>,
) -> Vec<usize> {
    const INFINITY: u64 = 1_000_000;
    let prefix = format!("fail-count-{id}");
    let mut out = BTreeSet::new();
    for (node, attributes) in transient {
        let counts = attributes.iter().filter(|(name, _)| {
            let rest = name.strip_prefix(prefix.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('#') || rest.starts_with(':'))
        });
        let count = |value: &str| if value.ends_with("INFINITY") { INFINITY } else { value.parse().unwrap_or(0) };
        let sum = counts.map(|(_, value)| count(value)).fold(0_u64, u64::saturating_add);
        let limit = threshold.filter(|t| *t > 0).unwrap_or(INFINITY);
        if sum >= limit {
            out.extend(by_name.get(node));
        }
    }
    out.into_iter().collect()
}

/// A cluster property, whichever set it stands in.
fn property<'a>(cib: &'a Element, name: &str) -> Option<&'a str> {
    let config = cib.child("configuration").and_then(|c| c.child("crm_config"))?;
    let pairs = config.children.iter().filter(|s| s.name == "cluster_property_set").flat_map(|s| &s.children);
    pairs.filter(|p| p.attribute("name") == Some(name)).find_map(|p| p.attribute("value"))
}

/// What `corosync-cfgtool -s` says of this node's links: how many reach somebody, of how many. `None` if it says nothing of that kind.
pub fn links(text: &str) -> Option<(usize, usize)> {
    let (mut all, mut reaching, mut reaches) = (0, 0, false);
    for line in text.lines().map(str::trim) {
        if line.starts_with("LINK ID") {
            reaching += usize::from(std::mem::take(&mut reaches));
            all += 1;
        } else if all > 0
            && line.starts_with("nodeid")
            && line.ends_with("connected")
            && !line.ends_with("disconnected")
        {
            reaches = true;
        }
    }
    reaching += usize::from(reaches);
    (all > 0).then_some((reaching, all))
}
