//! The configuration as pcs commands, a shell script that can be read line by line.

use crate::alerts::{AGENT, ALERT};
use crate::cib::{DEFAULTS, TAG};
use crate::model::{Agent, Configuration, Constraint, Operation, Pair, Primitive, Resource, Role, Score};
use crate::records;

/// All of it, for an empty cluster; `pcs` stands for `pcs` or `pcs -f FILE`, and then `crm_attribute` for one with `CIB_file=FILE`.
pub fn script(configuration: &Configuration) -> String {
    let mut lines: Vec<String> = Vec::new();
    for node in &configuration.nodes {
        for (kind, content) in [("attribute", &node.attributes), ("utilization", &node.utilization)] {
            if !content.is_empty() {
                lines.push(format!("pcs node {kind} {} {}", node.name, pairs(content)));
            }
        }
    }
    for resource in &configuration.resources {
        match resource {
            Resource::Primitive(p) => lines.push(create(p, None)),
            Resource::Clone { id, meta, primitive } => lines.push(create(primitive, Some((id, meta)))),
        }
    }
    for p in configuration.resources.iter().map(Resource::primitive).filter(|p| !p.utilization.is_empty()) {
        lines.push(format!("pcs resource utilization {} {}", p.id, pairs(&p.utilization)));
    }
    lines.extend(configuration.constraints.iter().map(constraint));
    for level in &configuration.levels {
        lines.push(format!("pcs stonith level add {} {} {}", level.index, level.target, level.devices.join(" ")));
    }
    if !configuration.properties.is_empty() {
        lines.push(format!("pcs property set {}", pairs(&configuration.properties)));
    }
    if !configuration.defaults.is_empty() {
        lines.push(format!("pcs resource defaults set create id={DEFAULTS} meta {}", pairs(&configuration.defaults)));
    }
    if let Some(estate) = &configuration.estate {
        // pcs knows one set of properties; the controller's record is in a set of its own.
        let (set, name, value) = (records::SET, records::POLICY, quoted(estate));
        lines.push(format!("crm_attribute --type crm_config --set-name {set} --name {name} --update {value}"));
    }
    if let Some(alert) = &configuration.alerts {
        lines.push(format!("pcs alert create id={ALERT} path={AGENT} options {}", pairs(&alert.attributes)));
        for recipient in &alert.recipients {
            let value = quoted(&format!("value={}", recipient.value));
            let options = pairs(&recipient.attributes);
            lines.push(format!("pcs alert recipient add {ALERT} {value} id={} options {options}", recipient.id));
        }
    }
    let ids: Vec<&str> = configuration.resources.iter().map(Resource::id).collect();
    if !ids.is_empty() {
        lines.push(format!("pcs tag create {TAG} {}", ids.join(" ")));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// A word as the shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', "'\\''")) }
}

fn pairs(pairs: &[Pair]) -> String {
    let words: Vec<String> = pairs.iter().map(|(name, value)| quoted(&format!("{name}={value}"))).collect();
    words.join(" ")
}

fn create(p: &Primitive, clone: Option<(&str, &[Pair])>) -> String {
    let mut parts = Vec::new();
    match &p.agent {
        Agent::Ocf { provider, kind } => parts.push(format!("pcs resource create {} ocf:{provider}:{kind}", p.id)),
        Agent::Stonith(kind) => parts.push(format!("pcs stonith create {} {kind}", p.id)),
    }
    if !p.parameters.is_empty() {
        parts.push(pairs(&p.parameters));
    }
    parts.extend(p.operations.iter().map(operation));
    if !p.meta.is_empty() {
        parts.push(format!("meta {}", pairs(&p.meta)));
    }
    if let Some((id, meta)) = clone {
        // `promotable` says promotable=true by itself.
        let meta: Vec<Pair> = meta.iter().filter(|(name, _)| name != "promotable").cloned().collect();
        parts.push(format!("promotable {id} {}", pairs(&meta)));
    }
    match &p.agent {
        // All operations are ours: the agent's defaults would come on top of them.
        Agent::Ocf { provider: "pacemaker", kind: "remote" } => {
            // pcs would rather set up the remote host as well; it has been set up.
            parts.push("--no-default-ops --force".into());
        }
        Agent::Ocf { .. } => parts.push("--no-default-ops".into()),
        Agent::Stonith(_) => {}
    }
    parts.join(" \\\n    ")
}

fn operation(op: &Operation) -> String {
    let mut text = format!("op {} interval={}s timeout={}s", op.name, op.interval, op.timeout);
    if let Some(role) = op.role {
        text.push_str(&format!(" role={}", role.as_str()));
    }
    if let Some(on_fail) = op.on_fail {
        text.push_str(&format!(" on-fail={on_fail}"));
    }
    text
}

fn constraint(constraint: &Constraint) -> String {
    let with_role = |resource: &str, role: Option<Role>| match role {
        Some(role) => format!("{} {resource}", role.as_str()),
        None => resource.to_string(),
    };
    match constraint {
        Constraint::Location { id, resource, role, score, tests, discovery } => {
            let discovery = discovery.as_str().map(|d| format!(" resource-discovery={d}")).unwrap_or_default();
            let kind = if matches!(score, Score::Attribute(_)) { "score-attribute" } else { "score" };
            let role = role.map(|r| format!(" role={}", r.as_str())).unwrap_or_default();
            let tests: Vec<String> = tests.iter().map(ToString::to_string).collect();
            let tests = quoted(&tests.join(" and "));
            format!(
                "pcs constraint location {resource} rule id={id}-rule constraint-id={id}{discovery}{role} {kind}={score} {tests}"
            )
        }
        Constraint::Order { id, first, then, symmetrical } => {
            let one_way = if *symmetrical { "" } else { " symmetrical=false" };
            format!(
                "pcs constraint order {} {} then {} {} kind=Mandatory{one_way} id={id}",
                first.0, first.1, then.0, then.1
            )
        }
        Constraint::Colocation { id, resource, with } => format!(
            // Without a score it is INFINITY; how to say so differs from version to version.
            "pcs constraint colocation add {} with {} id={id}",
            with_role(&resource.0, resource.1),
            with_role(&with.0, with.1)
        ),
    }
}
