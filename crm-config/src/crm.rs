//! The configuration as crmsh text, for `crm configure load update FILE` or to be read.

use std::fmt::Write;

use crate::alerts::{AGENT, ALERT};
use crate::cib::{DEFAULTS, PROPERTIES, TAG};
use crate::model::{Agent, Configuration, Constraint, Pair, Primitive, Resource, Role};
use crate::records;

/// All of it but what [`nodes`] says. (No comments: crmsh would write them into the CIB.)
pub fn text(configuration: &Configuration) -> String {
    let mut out = String::new();
    for resource in &configuration.resources {
        match resource {
            Resource::Primitive(p) => primitive(&mut out, p),
            Resource::Clone { id, meta, primitive: p } => {
                primitive(&mut out, p);
                line(&mut out, &format!("clone {id} {}", p.id), &[section("meta", meta)]);
            }
        }
    }
    for constraint in &configuration.constraints {
        out.push_str(&constraint_line(constraint));
        out.push('\n');
    }
    for by_target in configuration.levels.chunk_by(|a, b| a.target == b.target) {
        let levels: Vec<String> = by_target.iter().map(|l| l.devices.join(",")).collect();
        let _ = writeln!(out, "fencing_topology {}: {}", by_target[0].target, levels.join(" "));
    }
    line(&mut out, &format!("property {PROPERTIES}:"), &[pairs(&configuration.properties)]);
    line(&mut out, &format!("rsc_defaults {DEFAULTS}:"), &[pairs(&configuration.defaults)]);
    if let Some(estate) = &configuration.estate {
        line(&mut out, &format!("property {}:", records::SET), &[format!("{}={}", records::POLICY, quoted(estate))]);
    }
    if let Some(alert) = &configuration.alerts {
        let mut parts = vec![section("attributes", &alert.attributes)];
        for recipient in &alert.recipients {
            let value = quoted(&recipient.value);
            parts.push(format!("to {{ {value} {} }}", section("attributes", &recipient.attributes)));
        }
        line(&mut out, &format!("alert {ALERT} {AGENT}"), &parts);
    }
    let ids: Vec<&str> = configuration.resources.iter().map(Resource::id).collect();
    if !ids.is_empty() {
        line(&mut out, &format!("tag {TAG}: {}", ids.join(" ")), &[]);
    }
    out
}

/// What the nodes are told, as commands for `crm -f FILE`: one at a time, since a `node` statement replaces a node's
/// attributes as a whole, `standby` among them (tried with crmsh 5).
pub fn nodes(configuration: &Configuration) -> String {
    let mut out = String::new();
    for node in &configuration.nodes {
        for (kind, pairs) in [("attribute", &node.attributes), ("utilization", &node.utilization)] {
            for (name, value) in pairs {
                let _ = writeln!(out, "node {kind} {} set {name} {}", node.name, quoted(value));
            }
        }
    }
    out
}

/// A statement with its continuation lines.
fn line(out: &mut String, head: &str, parts: &[String]) {
    out.push_str(head);
    for part in parts.iter().filter(|p| !p.is_empty()) {
        let _ = write!(out, " \\\n    {part}");
    }
    out.push('\n');
}

fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+#".contains(c);
    if !value.is_empty() && value.chars().all(plain) && !value.contains('=') {
        return value.into();
    }
    if value.contains('"') { format!("'{value}'") } else { format!("\"{value}\"") }
}

fn pairs(pairs: &[Pair]) -> String {
    let words: Vec<String> = pairs.iter().map(|(name, value)| format!("{name}={}", quoted(value))).collect();
    words.join(" ")
}

fn section(name: &str, content: &[Pair]) -> String {
    if content.is_empty() { String::new() } else { format!("{name} {}", pairs(content)) }
}

fn primitive(out: &mut String, p: &Primitive) {
    let agent = match &p.agent {
        Agent::Ocf { provider, kind } => format!("ocf:{provider}:{kind}"),
        Agent::Stonith(kind) => format!("stonith:{kind}"),
    };
    let mut parts = vec![section("params", &p.parameters)];
    for op in &p.operations {
        let mut text = format!("op {} interval={}s timeout={}s", op.name, op.interval, op.timeout);
        if let Some(role) = op.role {
            let _ = write!(text, " role={}", role.as_str());
        }
        if let Some(on_fail) = op.on_fail {
            let _ = write!(text, " on-fail={on_fail}");
        }
        parts.push(text);
    }
    parts.push(section("meta", &p.meta));
    parts.push(section("utilization", &p.utilization));
    line(out, &format!("primitive {} {agent}", p.id), &parts);
}

fn constraint_line(constraint: &Constraint) -> String {
    let with_role = |resource: &str, role: Option<Role>| match role {
        Some(role) => format!("{resource}:{}", role.as_str()),
        None => resource.to_string(),
    };
    match constraint {
        Constraint::Location { id, resource, role, score, tests, discovery } => {
            let discovery = discovery.as_str().map(|d| format!(" resource-discovery={d}")).unwrap_or_default();
            let role = role.map(|r| format!(" $role={}", r.as_str())).unwrap_or_default();
            let score = score.to_string().replace("INFINITY", "inf");
            let tests: Vec<String> = tests.iter().map(ToString::to_string).collect();
            format!("location {id} {resource}{discovery} rule{role} {score}: {}", tests.join(" and "))
        }
        Constraint::Order { id, first, then, symmetrical } => {
            let one_way = if *symmetrical { "" } else { " symmetrical=false" };
            format!("order {id} Mandatory: {}:{} {}:{}{one_way}", first.1, first.0, then.1, then.0)
        }
        Constraint::Colocation { id, resource, with } => {
            format!("colocation {id} inf: {} {}", with_role(&resource.0, resource.1), with_role(&with.0, with.1))
        }
    }
}
