//! The configuration as CIB XML.
//!
//! Ids of inner elements follow crmsh's habit (`vm-demo-instance_attributes-name`, `vm-demo-monitor-5s`), so that a
//! configuration that was loaded with `crm` and one that was applied look the same.

use std::fmt;

use crate::alerts::{AGENT, ALERT, Alert};
use crate::model::{Agent, Configuration, Constraint, NodeSettings, Operation, Pair, Primitive, Resource, Role, Score};
use crate::policy::Policy;
use crate::records;
use crate::xml::Element;

/// Id of the property set that Pacemaker itself uses; there can be only one that counts.
pub const PROPERTIES: &str = "cib-bootstrap-options";
/// Id of our resource defaults.
pub const DEFAULTS: &str = "understudy-defaults";
/// Id of the tag that lists our resources.
pub const TAG: &str = "understudy";

/// A whole CIB as if every node of the policy were up, for `crm_verify` and `crm_simulate`.
pub fn document(policy: &Policy, configuration: &Configuration) -> Element {
    let mut all = sections(configuration);
    let mut status = Element::new("status");
    let nodes = all.child_or_new("nodes");
    for (i, node) in policy.nodes.iter().enumerate() {
        let (id, name) = (i + 1, node.name.get_ref());
        let element = Element::new("node").with("id", id).with("uname", name);
        let settings = configuration.nodes.iter().find(|n| n.name == *name);
        nodes.children.push(settings.into_iter().flat_map(|s| node_sets(id, s)).fold(element, Element::and));
        let state = Element::new("node_state").with("id", id).with("uname", name);
        let state =
            state.with("in_ccm", "true").with("crmd", "online").with("join", "member").with("expected", "member");
        status.children.push(state.and(features(name)).and(history(&id.to_string())));
    }
    for name in policy.boards.iter().map(|b| b.name.get_ref()) {
        nodes.children.push(Element::new("node").with("id", name).with("uname", name).with("type", "remote"));
        let state = Element::new("node_state").with("id", name).with("uname", name).with("remote_node", "true");
        status.children.push(state.with("in_ccm", "true").and(features(name)).and(history(name)));
    }
    Element::new("cib")
        .with("crm_feature_set", "3.16.1")
        .with("validate-with", "pacemaker-3.9")
        .with("epoch", 1)
        .with("num_updates", 0)
        .with("admin_epoch", 0)
        .with("have-quorum", 1)
        .with("dc-uuid", 1)
        .and(all)
        .and(status)
}

/// A node that has told its feature set is a node that has joined.
fn features(node: &str) -> Element {
    let pair = [("#feature-set".to_string(), "3.16.1".to_string())];
    Element::new("transient_attributes").with("id", node).and(set(
        "instance_attributes",
        &format!("status-{node}"),
        &pair,
    ))
}

/// Nothing has happened on it yet.
fn history(node: &str) -> Element {
    Element::new("lrm").with("id", node).and(Element::new("lrm_resources"))
}

/// What a node is told, under ids that pcs and crm_attribute would give.
pub fn node_sets(id: impl fmt::Display, settings: &NodeSettings) -> Vec<Element> {
    let sets = [
        ("instance_attributes", format!("nodes-{id}"), &settings.attributes),
        ("utilization", format!("nodes-{id}-utilization"), &settings.utilization),
    ];
    sets.into_iter().filter(|(_, _, pairs)| !pairs.is_empty()).map(|(kind, id, pairs)| set(kind, &id, pairs)).collect()
}

/// `<configuration>` with all our sections.
pub fn sections(configuration: &Configuration) -> Element {
    let properties = set("cluster_property_set", PROPERTIES, &configuration.properties);
    let mut resources = Element::new("resources");
    resources.children.extend(configuration.resources.iter().map(resource));
    let mut constraints = Element::new("constraints");
    constraints.children.extend(configuration.constraints.iter().map(constraint));
    let mut config = Element::new("crm_config").and(properties);
    if let Some(estate) = &configuration.estate {
        let mut set = Element::new("cluster_property_set").with("id", records::SET);
        records::put(&mut set, records::POLICY, estate);
        config.children.push(set);
    }
    let mut all = Element::new("configuration").and(config).and(Element::new("nodes")).and(resources).and(constraints);
    if let Some(topology) = fencing_topology(configuration) {
        all.children.push(topology);
    }
    all.children.push(Element::new("rsc_defaults").and(set("meta_attributes", DEFAULTS, &configuration.defaults)));
    if let Some(alert) = &configuration.alerts {
        all.children.push(Element::new("alerts").and(self::alert(alert)));
    }
    all.and(Element::new("tags").and(tag(configuration)))
}

/// Nodes, fencing and resources are what an alert is about without a `select`.
fn alert(alert: &Alert) -> Element {
    let attributes = |id: &str, pairs: &[Pair]| set("instance_attributes", &format!("{id}-instance_attributes"), pairs);
    let mut element = Element::new("alert").with("id", ALERT).with("path", AGENT);
    element.children.push(attributes(ALERT, &alert.attributes));
    for recipient in &alert.recipients {
        let to = Element::new("recipient").with("id", &recipient.id).with("value", &recipient.value);
        element.children.push(to.and(attributes(&recipient.id, &recipient.attributes)));
    }
    element
}

/// The tag with the ids of our resources.
fn tag(configuration: &Configuration) -> Element {
    let mut tag = Element::new("tag").with("id", TAG);
    tag.children.extend(configuration.resources.iter().map(|r| Element::new("obj_ref").with("id", r.id())));
    tag
}

fn set(kind: &str, id: &str, pairs: &[Pair]) -> Element {
    let mut set = Element::new(kind).with("id", id);
    for (name, value) in pairs {
        set.children.push(
            Element::new("nvpair")
                .with("id", format!("{id}-{}", name.replace('#', "")))
                .with("name", name)
                .with("value", value),
        );
    }
    set
}

fn resource(resource: &Resource) -> Element {
    match resource {
        Resource::Primitive(p) => primitive(p),
        Resource::Clone { id, meta, primitive: p } => {
            let clone = Element::new("clone").with("id", id);
            clone.and(set("meta_attributes", &format!("{id}-meta_attributes"), meta)).and(primitive(p))
        }
    }
}

fn primitive(p: &Primitive) -> Element {
    let id = &p.id;
    let mut element = Element::new("primitive").with("id", id);
    element = match &p.agent {
        Agent::Ocf { provider, kind } => element.with("class", "ocf").with("provider", provider).with("type", kind),
        Agent::Stonith(kind) => element.with("class", "stonith").with("type", kind),
    };
    if !p.parameters.is_empty() {
        element.children.push(set("instance_attributes", &format!("{id}-instance_attributes"), &p.parameters));
    }
    if !p.meta.is_empty() {
        element.children.push(set("meta_attributes", &format!("{id}-meta_attributes"), &p.meta));
    }
    if !p.utilization.is_empty() {
        element.children.push(set("utilization", &format!("{id}-utilization"), &p.utilization));
    }
    let mut operations = Element::new("operations");
    operations.children.extend(p.operations.iter().map(|op| operation(id, op)));
    element.and(operations)
}

fn operation(resource: &str, op: &Operation) -> Element {
    let mut element = Element::new("op")
        .with("id", format!("{resource}-{}-{}s", op.name, op.interval))
        .with("name", op.name)
        .with("interval", format!("{}s", op.interval))
        .with("timeout", format!("{}s", op.timeout));
    if let Some(role) = op.role {
        element = element.with("role", role.as_str());
    }
    if let Some(on_fail) = op.on_fail {
        element = element.with("on-fail", on_fail);
    }
    element
}

fn constraint(constraint: &Constraint) -> Element {
    match constraint {
        Constraint::Location { id, resource, role, score, tests, discovery } => {
            let rule_id = format!("{id}-rule");
            let attribute = if matches!(score, Score::Attribute(_)) { "score-attribute" } else { "score" };
            let mut rule = Element::new("rule").with("id", &rule_id).with(attribute, score);
            if let Some(role) = role {
                rule = rule.with("role", role.as_str());
            }
            if tests.len() > 1 {
                rule = rule.with("boolean-op", "and");
            }
            for (i, test) in tests.iter().enumerate() {
                let number = if i == 0 { String::new() } else { format!("-{}", i - 1) };
                let mut expression = Element::new("expression")
                    .with("id", format!("{rule_id}-expression{number}"))
                    .with("attribute", &test.attribute)
                    .with("operation", test.operation);
                if let Some(value) = &test.value {
                    expression = expression.with("value", value);
                }
                rule.children.push(expression);
            }
            let mut location = Element::new("rsc_location").with("id", id).with("rsc", resource);
            if let Some(discovery) = discovery.as_str() {
                location = location.with("resource-discovery", discovery);
            }
            location.and(rule)
        }
        Constraint::Order { id, first, then, symmetrical } => {
            let mut order = Element::new("rsc_order")
                .with("id", id)
                .with("kind", "Mandatory")
                .with("first", &first.1)
                .with("first-action", first.0)
                .with("then", &then.1)
                .with("then-action", then.0);
            if !symmetrical {
                order = order.with("symmetrical", "false");
            }
            order
        }
        Constraint::Colocation { id, resource, with } => {
            let mut colocation =
                Element::new("rsc_colocation").with("id", id).with("score", "INFINITY").with("rsc", &resource.0);
            let role = |role: Option<Role>| role.map(Role::as_str);
            if let Some(role) = role(resource.1) {
                colocation = colocation.with("rsc-role", role);
            }
            colocation = colocation.with("with-rsc", &with.0);
            if let Some(role) = role(with.1) {
                colocation = colocation.with("with-rsc-role", role);
            }
            colocation
        }
    }
}

fn fencing_topology(configuration: &Configuration) -> Option<Element> {
    if configuration.levels.is_empty() {
        return None;
    }
    let mut topology = Element::new("fencing-topology");
    for level in &configuration.levels {
        topology.children.push(
            Element::new("fencing-level")
                .with("id", format!("understudy-fencing-{}-{}", level.target, level.index))
                .with("target", &level.target)
                .with("index", level.index)
                .with("devices", level.devices.join(",")),
        );
    }
    Some(topology)
}
