//! Our configuration into a cluster's: what is ours is replaced, everything else stays as it is.
//!
//! *Ours* are: the resources that the tag `understudy` lists and those of the policy; constraints and fencing levels whose
//! ids begin with one of [`PREFIXES`]; node attributes whose names begin with `understudy-`; the defaults set `understudy-defaults`; the alert `understudy-alert`; of the cluster's properties, those that
//! the policy sets. Not ours, though the names are near: the vetoes (`understudy-veto-…`) that running machines write,
//! and what `crm resource move`, `ban`, `stop` or `maintenance` leave behind.

use std::collections::{BTreeSet, HashMap};

use crate::alerts::ALERT;
use crate::cib::{DEFAULTS, PROPERTIES, TAG, node_sets, sections};
use crate::compile::{CLUSTER, HIGH_PERFORMANCE, MEMORY, PROMOTION, RACK, WISH};
use crate::model::{Configuration, NodeSettings};
use crate::records::{self, ARRIVES, EVACUATED};
use crate::xml::Element;

/// What the ids of our constraints begin with.
pub const PREFIXES: [&str; 5] = [
    "understudy-location-",
    "understudy-primary-",
    "understudy-order-",
    "understudy-colocation-",
    "understudy-fencing-",
];

/// Meta attributes that people set with `crm resource …` and `pcs resource …`; a policy that says nothing of them keeps them.
const OPERATIONAL: [&str; 3] = ["target-role", "is-managed", "maintenance"];

/// What happens to one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Add(Element),
    /// It looks different: before and after.
    Modify(Element, Element),
    /// It is ours, and the policy does not have it any more.
    Remove(Element),
}

/// The CIB (a whole `<cib>` element) as it should be, and what differs.
pub fn merge(cib: &Element, configuration: &Configuration) -> (Element, Vec<Change>) {
    let mut cib = cib.clone();
    let ours = sections(configuration);
    let mut changes = Vec::new();
    let owned = tagged(&cib);
    let live = cib.child_or_new("configuration");

    let section = |name: &str| ours.child(name).map(|s| s.children.clone()).unwrap_or_default();
    let controlled = configuration.estate.is_some();
    node_attributes(live.child_or_new("nodes"), &configuration.nodes, controlled, &mut changes);
    properties(live.child_or_new("crm_config"), &section("crm_config"), &mut changes);
    estate(live.child_or_new("crm_config"), configuration.estate.as_deref(), &mut changes);
    objects(live.child_or_new("resources"), section("resources"), &|e| owned.contains(e.id()), &mut changes);
    let by_prefix = |e: &Element| PREFIXES.iter().any(|p| e.id().starts_with(p));
    objects(live.child_or_new("constraints"), section("constraints"), &by_prefix, &mut changes);
    for name in ["fencing-topology", "rsc_defaults", "alerts", "tags"] {
        let wanted = section(name);
        if live.child(name).is_none() && wanted.is_empty() {
            continue;
        }
        let is_ours = |e: &Element| by_prefix(e) || [DEFAULTS, TAG, ALERT].contains(&e.id());
        objects(live.child_or_new(name), wanted, &is_ours, &mut changes);
    }
    (cib, changes)
}

/// Whether a node attribute or capacity of that name is ours.
fn is_our_attribute(name: &str) -> bool {
    [RACK, CLUSTER, HIGH_PERFORMANCE, MEMORY].contains(&name) || name.starts_with(WISH) || name.starts_with(PROMOTION)
}

/// Our attributes of the cluster's nodes, whichever set they stand in: crm_attribute, crm and pcs each have their own. Nodes
/// are Corosync's to make; one that is not there yet gets nothing.
fn node_attributes(live: &mut Element, wanted: &[NodeSettings], controlled: bool, changes: &mut Vec<Change>) {
    let none = NodeSettings { name: String::new(), attributes: Vec::new(), utilization: Vec::new() };
    let (evacuated, here) = (with_score(live, EVACUATED), EVACUATED.to_string());
    let mut times: HashMap<String, usize> = HashMap::new();
    for (name, _) in wanted.iter().flat_map(|w| &w.attributes) {
        *times.entry(name.clone()).or_default() += 1;
    }
    // Only a controller brings a move to its end.
    let mut under_way = if controlled { with_score(live, ARRIVES) } else { BTreeSet::new() };
    under_way.retain(|name| times.contains_key(name));
    for node in live.children.iter_mut().filter(|n| n.name == "node") {
        let mut wanted = wanted.iter().find(|w| node.attribute("uname") == Some(&w.name)).unwrap_or(&none).clone();
        let lives_here = |name: &str| {
            let sets = node.children.iter().filter(|s| s.name == "instance_attributes").flat_map(|s| &s.children);
            sets.filter(|p| p.attribute("name") == Some(name)).any(|p| p.attribute("value") == Some(&here))
        };
        // A machine that is being moved keeps both its nodes until it has arrived.
        for name in &under_way {
            let sets = node.children.iter().filter(|s| s.name == "instance_attributes").flat_map(|s| &s.children);
            let now = { sets }.find(|p| p.attribute("name") == Some(name)).and_then(|p| p.attribute("value"));
            wanted.attributes.retain(|(n, _)| n != name);
            wanted.attributes.extend(now.map(|now| (name.clone(), now.to_owned())));
        }
        for (name, elsewhere) in evacuated.difference(&under_way).filter_map(|n| Some((n, times.get(n)?))) {
            // A machine with a home only has had it given up; one with targets of its own keeps those.
            if lives_here(name) || *elsewhere == 1 {
                wanted.attributes.retain(|(n, _)| n != name);
            }
            if lives_here(name) {
                wanted.attributes.push((name.clone(), here.clone()));
            }
        }
        let wanted = &wanted;
        let before = node.clone();
        let mut missing = node_sets(node.id(), wanted);
        for set in node.children.iter_mut().filter(|s| matches!(s.name.as_str(), "instance_attributes" | "utilization"))
        {
            let Element { name: kind, children, .. } = set;
            let Some(ours) = missing.iter_mut().find(|m| m.name == *kind) else {
                children.retain(|p| !is_our_attribute(p.attribute("name").unwrap_or_default()));
                continue;
            };
            let mut values: HashMap<String, Element> =
                std::mem::take(&mut ours.children).into_iter().map(|p| (name_of(&p), p)).collect();
            children.retain_mut(|pair| {
                let name = name_of(pair);
                match values.remove(&name) {
                    Some(new) => pair.set("value", new.attribute("value").unwrap_or_default()),
                    None => return !is_our_attribute(&name),
                }
                true
            });
            // In the policy's order again, whatever the map made of it.
            let mut rest: Vec<Element> = values.into_values().collect();
            rest.sort_by(|a, b| a.id().cmp(b.id()));
            ours.children = rest;
        }
        for mut set in missing.into_iter().filter(|s| !s.children.is_empty()) {
            match node.children.iter_mut().find(|s| s.name == set.name && s.id() == set.id()) {
                Some(existing) => existing.children.append(&mut set.children),
                None => node.children.push(set),
            }
        }
        if *node != before {
            changes.push(Change::Modify(before, node.clone()));
        }
    }
}

fn name_of(pair: &Element) -> String {
    pair.attribute("name").unwrap_or_default().to_string()
}

/// What the controller is told of the policy. The rest of the set is the controller's own.
fn estate(live: &mut Element, wanted: Option<&str>, changes: &mut Vec<Change>) {
    let at = live.children.iter().position(|s| s.id() == records::SET);
    let Some(at) = at.or_else(|| {
        wanted?;
        live.children.push(Element::new("cluster_property_set").with("id", records::SET));
        Some(live.children.len() - 1)
    }) else {
        return;
    };
    let set = &mut live.children[at];
    let of_name = |p: &&Element| p.attribute("name") == Some(records::POLICY);
    let before = set.children.iter().find(of_name).cloned();
    let Some(wanted) = wanted else {
        set.children.retain(|p| !of_name(&p));
        changes.extend(before.map(Change::Remove));
        return;
    };
    records::put(set, records::POLICY, wanted);
    let Some(after) = set.children.iter().find(of_name).cloned() else { return };
    match before {
        None => changes.push(Change::Add(after)),
        Some(before) if before != after => changes.push(Change::Modify(before, after)),
        Some(_) => {}
    }
}

/// Names of the scores of machines that have this one anywhere: only the controller gives it.
fn with_score(nodes: &Element, score: i32) -> BTreeSet<String> {
    let sets = nodes.children.iter().flat_map(|n| &n.children).filter(|s| s.name == "instance_attributes");
    let is_it = |p: &&Element| {
        let name = p.attribute("name").unwrap_or_default();
        name.starts_with(WISH) && p.attribute("value") == Some(&score.to_string())
    };
    sets.flat_map(|s| &s.children).filter(is_it).map(name_of).collect()
}

/// Ids that our tag lists.
fn tagged(cib: &Element) -> BTreeSet<String> {
    let tags = cib.child("configuration").and_then(|c| c.child("tags"));
    let tag = tags.and_then(|t| t.children.iter().find(|t| t.id() == TAG));
    tag.map(|t| t.children.iter().map(|r| r.id().to_string()).collect()).unwrap_or_default()
}

fn properties(live: &mut Element, wanted: &[Element], changes: &mut Vec<Change>) {
    let Some(wanted) = wanted.first() else { return };
    if !live.children.iter().any(|s| s.id() == PROPERTIES) {
        live.children.push(Element::new("cluster_property_set").with("id", PROPERTIES));
    }
    let Some(set) = live.children.iter_mut().find(|s| s.id() == PROPERTIES) else { return };
    for pair in &wanted.children {
        match set.children.iter_mut().find(|p| p.attribute("name") == pair.attribute("name")) {
            Some(existing) if existing.attribute("value") == pair.attribute("value") => {}
            Some(existing) => {
                let before = existing.clone();
                existing.set("value", pair.attribute("value").unwrap_or_default());
                changes.push(Change::Modify(before, existing.clone()));
            }
            None => {
                set.children.push(pair.clone());
                changes.push(Change::Add(pair.clone()));
            }
        }
    }
}

fn objects(live: &mut Element, wanted: Vec<Element>, is_ours: &dyn Fn(&Element) -> bool, changes: &mut Vec<Change>) {
    let names: BTreeSet<String> = wanted.iter().map(|w| w.id().to_string()).collect();
    live.children.retain(|existing| {
        let stays = !is_ours(existing) || names.contains(existing.id());
        if !stays {
            changes.push(Change::Remove(existing.clone()));
        }
        stays
    });
    let places: HashMap<String, usize> =
        live.children.iter().enumerate().rev().map(|(at, e)| (e.id().to_string(), at)).collect();
    for mut new in wanted {
        match places.get(new.id()).map(|at| &mut live.children[*at]) {
            Some(existing) => {
                keep_operational(existing, &mut new);
                if !same(existing, &new) {
                    changes.push(Change::Modify(existing.clone(), new.clone()));
                    *existing = new;
                }
            }
            None => {
                changes.push(Change::Add(new.clone()));
                live.children.push(new);
            }
        }
    }
}

/// What operators said of the resource stays said.
fn keep_operational(existing: &Element, new: &mut Element) {
    for set in existing.children.iter().filter(|c| c.name == "meta_attributes") {
        for pair in &set.children {
            let name = pair.attribute("name").unwrap_or_default();
            let sets = new.children.iter().filter(|c| c.name == "meta_attributes");
            let known = sets.flat_map(|s| &s.children).any(|p| p.attribute("name") == Some(name));
            if !OPERATIONAL.contains(&name) || known {
                continue;
            }
            let at = new.children.iter().position(|c| c.name == "meta_attributes");
            match at {
                Some(at) => new.children[at].children.push(pair.clone()),
                None => {
                    let id = format!("{}-meta_attributes", new.id());
                    new.children.push(Element::new("meta_attributes").with("id", id).and(pair.clone()));
                }
            }
        }
    }
    for new_child in new.children.iter_mut().filter(|c| c.name == "primitive") {
        if let Some(old_child) = existing.children.iter().find(|c| c.id() == new_child.id()) {
            keep_operational(old_child, new_child);
        }
    }
}

/// Whether two elements mean the same: ids of inner sets and rules, the order of attributes and of pairs say nothing.
pub fn same(a: &Element, b: &Element) -> bool {
    canonical(a, true) == canonical(b, true)
}

/// A text that is equal for elements that mean the same.
pub fn canonical(element: &Element, top: bool) -> String {
    let keeps_id = top
        || matches!(
            element.name.as_str(),
            "primitive" | "clone" | "obj_ref" | "rsc_location" | "rsc_order" | "rsc_colocation" | "tag"
        );
    let mut attributes: Vec<String> = element
        .attributes
        .iter()
        .filter(|(name, value)| match name.as_str() {
            "id" => keeps_id,
            // What Pacemaker assumes anyway; one tool writes it, the next does not.
            "boolean-op" => value != "and",
            "kind" => value != "Mandatory",
            "symmetrical" => value != "true",
            _ => true,
        })
        .map(|(name, value)| format!("{name}={:?}", normal(name, value)))
        .collect();
    attributes.sort();
    let mut children: Vec<String> =
        element.children.iter().filter(|c| !is_empty_set(c)).map(|c| canonical(c, false)).collect();
    children.sort();
    format!("<{} {}>{}{}</>", element.name, attributes.join(" "), element.text, children.concat())
}

fn is_empty_set(element: &Element) -> bool {
    element.children.is_empty()
        && matches!(element.name.as_str(), "meta_attributes" | "instance_attributes" | "operations")
}

fn normal(name: &str, value: &str) -> String {
    match (name, value) {
        ("interval", "0") => "0s".into(),
        (_, value) => value.to_string(),
    }
}
