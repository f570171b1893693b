//! Pacemaker's own scheduler, asked "what if": a CIB with a failure written into its status goes in, what the scheduler
//! would do comes out.
//!
//! The failure is written into the copy by us (`in_ccm="false"`: the node has left without a word, which is what Corosync
//! reports of a dead host) and `crm_simulate --run` only plans. `--simulate` would execute every probe and every start as
//! well, minutes for hundreds of machines. Nothing here touches a cluster.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::compile::compile;
use crate::placement::{Placed, place};
use crate::policy::Policy;
use crate::xml::Element;

/// How `crm_simulate` is called.
#[derive(Debug, Clone)]
pub struct Scheduler {
    /// Words before the options, `crm_simulate` itself the last of them.
    pub command: Vec<String>,
}

impl Default for Scheduler {
    fn default() -> Self {
        Self { command: vec!["crm_simulate".into()] }
    }
}

/// Where a resource runs, as Pacemaker sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The node.
    pub node: String,
    /// It is the promoted instance.
    pub promoted: bool,
}

/// What the scheduler knows and would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Where each primitive is before anything is done; clones' instances under the primitive's id.
    pub before: BTreeMap<String, Vec<Running>>,
    /// The same afterwards.
    pub after: BTreeMap<String, Vec<Running>>,
    /// Nodes that would be fenced.
    pub fenced: Vec<String>,
    /// Resources that would be moved while they run.
    pub migrated: Vec<String>,
}

impl Scheduler {
    /// What would be done with this CIB.
    pub fn ask(&self, cib: &Element) -> Result<Outcome> {
        Ok(outcome(&self.run(cib)?))
    }

    /// The same, and how it sees the cluster as it is: nodes and resources, as `crm_mon` prints them.
    pub fn look(&self, cib: &Element) -> Result<(Outcome, Element)> {
        let result = self.run(cib)?;
        let status = result.child("cluster_status").context("crm_simulate printed no cluster_status")?;
        Ok((outcome(&result), status.clone()))
    }

    fn run(&self, cib: &Element) -> Result<Element> {
        let Some((program, words)) = self.command.split_first() else { bail!("no scheduler to ask") };
        let mut child = Command::new(program)
            .args(words)
            .args(["--xml-pipe", "--run", "--output-as=xml"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {program} (package pacemaker-cli-utils)"))?;
        // crm_simulate reads all before it prints anything: no two full pipes can wait for each other.
        let input = child.stdin.take().context("a pipe to crm_simulate")?;
        let written = { input }.write_all(cib.to_string().as_bytes());
        let output = child.wait_with_output().context("waiting for crm_simulate")?;
        if !output.status.success() {
            bail!("crm_simulate failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        written.context("handing the configuration to crm_simulate")?;
        Element::parse(&String::from_utf8_lossy(&output.stdout)).context("reading what crm_simulate printed")
    }
}

/// Read `<pacemaker-result>`.
pub fn outcome(result: &Element) -> Outcome {
    let mut before = BTreeMap::new();
    if let Some(resources) = result.child("cluster_status").and_then(|s| s.child("resources")) {
        running(resources, &mut before);
    }
    let mut out = Outcome { after: before.clone(), before, ..Outcome::default() };
    for action in result.child("actions").map(|a| a.children.as_slice()).unwrap_or_default() {
        let get = |name| action.attribute(name);
        if action.name == "node_action" {
            out.fenced.extend(get("node").map(str::to_string));
            continue;
        }
        // What waits for quorum or for a fence that cannot succeed does not happen.
        if get("blocked") == Some("true") {
            continue;
        }
        let Some(resource) = get("resource") else { continue };
        let id = resource.split(':').next().unwrap_or(resource).to_string();
        let instances = out.after.entry(id).or_default();
        let source = get("source").or(get("node"));
        let target = get("dest").or(get("node"));
        let leave = |instances: &mut Vec<Running>| instances.retain(|r| Some(r.node.as_str()) != source);
        let arrive = |instances: &mut Vec<Running>, promoted| {
            if let Some(node) = target {
                instances.retain(|r| r.node != node);
                instances.push(Running { node: node.into(), promoted });
            }
        };
        match get("action").unwrap_or_default() {
            "start" => arrive(instances, false),
            "promote" => arrive(instances, true),
            "demote" => arrive(instances, false),
            "stop" => leave(instances),
            what @ ("move" | "migrate") => {
                leave(instances);
                if what == "migrate" {
                    out.migrated.extend(get("resource").map(str::to_string));
                }
                arrive(instances, get("next-role") == Some("Promoted"));
            }
            // In place, but the role may be another afterwards.
            "reload" | "restart" | "recover" => {
                if let Some(role) = get("next-role")
                    && let Some(node) = get("dest").or(get("source")).or(get("node"))
                {
                    instances.retain(|r| r.node != node);
                    instances.push(Running { node: node.into(), promoted: role == "Promoted" });
                }
            }
            _ => {}
        }
    }
    out
}

fn running(element: &Element, into: &mut BTreeMap<String, Vec<Running>>) {
    for child in &element.children {
        if child.name != "resource" {
            running(child, into);
            continue;
        }
        let id = child.id().split(':').next().unwrap_or_default().to_string();
        let promoted = child.attribute("role") == Some("Promoted");
        let nodes = child.children.iter().filter(|n| n.name == "node").filter_map(|n| n.attribute("name"));
        into.entry(id).or_default().extend(nodes.map(|node| Running { node: node.into(), promoted }));
    }
}

/// The same CIB with these nodes dead, and without quorum if too few are left.
pub fn with_dead(cib: &Element, dead: &[String]) -> Element {
    let mut cib = cib.clone();
    let is_dead = |e: &Element| dead.iter().any(|d| e.attribute("uname") == Some(d));
    let nodes =
        cib.child("configuration").and_then(|c| c.child("nodes")).map(|n| n.children.as_slice()).unwrap_or_default();
    let members = nodes.iter().filter(|n| n.attribute("type") != Some("remote"));
    let (all, lost) = members.fold((0, 0), |(all, lost), n| (all + 1, lost + usize::from(is_dead(n))));
    for state in cib.child_or_new("status").children.iter_mut().filter(|s| is_dead(s)) {
        state.set("in_ccm", "false");
        state.set("crmd", "offline");
    }
    // Votequorum's rule; corosync.conf's two_node and last_man_standing are not known here.
    if lost * 2 >= all && all > 2 {
        cib.set("have-quorum", "0");
    }
    cib
}

/// The policy's CIB as if every machine ran at its home and every standby were up to date, for plans without a cluster.
pub fn settled(policy: &Policy) -> Element {
    let mut cib = crate::cib::document(policy, &compile(policy));
    let placed = if policy.places() { place(policy) } else { Vec::new() };
    let mut free: Vec<i128> = policy.nodes.iter().map(|n| n.memory.map_or(i128::MAX, i128::from)).collect();
    let mut on_node = vec![Vec::new(); policy.nodes.len()];
    for (m, machine) in policy.machines.iter().enumerate() {
        for (rank, &node) in at_rest(policy, placed.get(m), m).iter().enumerate() {
            if policy.knows_capacity() && policy.places() {
                if free[node] < i128::from(machine.memory) {
                    continue;
                }
                free[node] -= i128::from(machine.memory);
            }
            on_node[node].push((m, machine.protected(), rank == 0));
        }
    }
    let status = cib.child_or_new("status");
    for (index, machines) in on_node.into_iter().enumerate() {
        let name = policy.nodes[index].name.get_ref();
        let Some(state) = status.children.iter_mut().find(|s| s.attribute("uname") == Some(name)) else { continue };
        for (m, protected, first) in machines {
            let machine = &policy.machines[m];
            let vm = machine.vm_id();
            let last = if protected && first { "promote" } else { "start" };
            let resources = state.child_or_new("lrm").child_or_new("lrm_resources");
            resources.children.push(history(&vm, "vmm", last, name));
            if protected {
                resources.children.push(history(&machine.replicator_id(), "replicator", last, name));
                let set = state.child_or_new("transient_attributes").child_or_new("instance_attributes");
                let id = format!("{}-master-{vm}", set.id());
                // What the agents publish: runs here, up to date.
                let score = if first { 10_001 } else { 10_000 };
                set.children.push(
                    Element::new("nvpair").with("id", id).with("name", format!("master-{vm}")).with("value", score),
                );
            }
        }
    }
    // Where nothing is known to run there is nothing to look for.
    let properties = cib.child_or_new("configuration").child_or_new("crm_config").child_or_new("cluster_property_set");
    properties.children.push(
        Element::new("nvpair")
            .with("id", "understudy-what-if-probes")
            .with("name", "enable-startup-probes")
            .with("value", "false"),
    );
    cib
}

/// The nodes on which a machine is when all is well, the one that runs it first.
fn at_rest(policy: &Policy, placed: Option<&Placed>, m: usize) -> Vec<usize> {
    let machine = &policy.machines[m];
    let count = if machine.protected() { 2 } else { 1 };
    let mut nodes: Vec<usize> = match placed {
        Some(placed) => placed.targets.iter().map(|t| t.node).collect(),
        None => {
            let primary = |i: &usize| machine.primary.as_ref() != Some(&policy.nodes[*i].name);
            let mut nodes: Vec<usize> = (0..policy.nodes.len())
                .filter(|i| policy.candidates(machine).any(|n| n.name == policy.nodes[*i].name))
                .collect();
            nodes.sort_by_key(primary);
            nodes
        }
    };
    nodes.truncate(count);
    nodes
}

/// The history of a resource that was started (and perhaps promoted) on a node, so that Pacemaker takes it for running there.
pub fn history(resource: &str, kind: &str, last: &str, node: &str) -> Element {
    let key = "1:0:0:00000000-0000-0000-0000-000000000000";
    let operation = |name: &str, call: u32| {
        Element::new("lrm_rsc_op")
            .with("id", format!("{resource}_{name}_0"))
            .with("operation_key", format!("{resource}_{name}_0"))
            .with("operation", name)
            .with("crm_feature_set", "3.16.1")
            .with("transition-key", key)
            .with("transition-magic", format!("0:0;{key}"))
            .with("on_node", node)
            // Without the digest of what it was started with, Pacemaker would restart it. The digest of no parameters at all
            // as that of those that need a restart makes it a reload, which changes no place.
            .with("op-force-restart", " none ")
            .with("op-restart-digest", "f2317cad3d54cec5d7d7aa7d0bf35cf8")
            .with("call-id", call)
            .with("rc-code", 0)
            .with("op-status", 0)
            .with("interval", 0)
    };
    let element = Element::new("lrm_resource")
        .with("id", resource)
        .with("class", "ocf")
        .with("provider", "understudy")
        .with("type", kind)
        .and(operation("start", 1));
    if last == "start" { element } else { element.and(operation(last, 2)) }
}
