//! Pacemaker's alert agent: what its environment says, as an alarm.
//!
//! Pacemaker runs it for every event, once for each recipient, as the user hacluster (Pacemaker Administration, "Alert Agents"). Node
//! and fencing events reach the agent on every node of the cluster: they are marked, and one node tells them ([`crate::sender`]).
//! Resource events reach it on the node where the resource is.

use crate::alarm::{Alarm, Severity};

/// Pacemaker's word for an event, and the alarm that it is. `None` for what is no event of the kinds that we know.
///
/// `get` reads the environment: `CRM_alert_kind` and the others.
pub fn alarm(get: &dyn Fn(&str) -> Option<String>) -> Option<(Alarm, bool)> {
    let part = |name: &str| get(&format!("CRM_alert_{name}")).unwrap_or_default();
    let node = part("node");
    let (alarm, everywhere) = match part("kind").as_str() {
        "node" => Some((node_event(&node, &part("desc")), true)),
        "fencing" => Some((fencing(&node, &part("desc"), &part("rc")), true)),
        "resource" => Some((resource(&part, &node), false)),
        "attribute" => {
            let (name, value) = (part("attribute_name"), part("attribute_value"));
            let text = format!("The attribute {name} of node {node} is now {value}.");
            let alarm = Alarm::new(Severity::Info, format!("{node}: {name} is {value}"), text);
            Some((alarm.key(format!("attribute {node} {name} {value}")).node(node), false))
        }
        _ => None,
    }?;
    // Names and words are whatever somebody configured.
    Some((alarm.bounded(), everywhere))
}

fn node_event(node: &str, desc: &str) -> Alarm {
    let (severity, subject, text) = match desc {
        "lost" => (
            Severity::Critical,
            format!("node {node} is lost"),
            format!(
                "The cluster does not hear from node {node} any more. It will be fenced, and what ran there is started elsewhere as the policy says."
            ),
        ),
        "member" => {
            (Severity::Info, format!("node {node} is a member"), format!("Node {node} has joined the cluster."))
        }
        other => {
            (Severity::Warning, format!("node {node} is {other}"), format!("Pacemaker says of node {node}: {other}."))
        }
    };
    Alarm::new(severity, subject, text).key(format!("node {node} {desc}")).node(node)
}

/// (What Pacemaker calls the task is the name of its own message, `st_notify_fence`, whatever was done; its words say that.)
fn fencing(node: &str, desc: &str, rc: &str) -> Alarm {
    let (severity, subject) = if rc == "0" {
        (Severity::Warning, format!("node {node} was fenced"))
    } else {
        (Severity::Critical, format!("node {node} could not be fenced"))
    };
    let mut text = format!("Pacemaker's words: {desc}.");
    if rc != "0" {
        text.push_str(" Until the node is fenced, nothing that ran there is started elsewhere. Look at the fencing device, or, once the \
            node is certainly off, run `stonith_admin --confirm` with its name.");
    }
    Alarm::new(severity, subject, text).key(format!("fencing {node} {rc}")).node(node)
}

/// OCF's exit statuses as words (OCF Resource Agent API 1.1).
fn status_words(rc: &str) -> &'static str {
    match rc {
        "0" => "it works",
        "1" => "generic error",
        "2" => "wrong arguments",
        "3" => "action not implemented",
        "4" => "insufficient privileges",
        "5" => "not installed",
        "6" => "not configured",
        "7" => "not running",
        "8" => "running as promoted",
        "9" => "failed as promoted",
        "190" => "degraded",
        "191" => "promoted and degraded",
        _ => "an unknown status",
    }
}

fn resource(part: &dyn Fn(&str) -> String, node: &str) -> Alarm {
    let (rsc, task, rc, wanted) = (part("rsc"), part("task"), part("rc"), part("target_rc"));
    let words = status_words(&rc);
    // A probe finds out what there is; nothing has failed if that was not known before.
    let probe = task == "monitor" && matches!(part("interval").as_str(), "0" | "0s" | "");
    let found = probe && matches!(rc.as_str(), "0" | "7" | "8" | "190" | "191");
    let degraded = matches!(rc.as_str(), "190" | "191");
    let (severity, subject) = if degraded {
        (Severity::Warning, format!("{rsc} is degraded on {node}"))
    } else if rc == wanted || found {
        (Severity::Info, format!("{rsc}: {task} on {node}: {words}"))
    } else {
        (Severity::Warning, format!("{rsc} failed on {node}: {task} says {words}"))
    };
    let text = format!(
        "Resource {rsc} on node {node}: {task} returned {rc} ({words}), expected was {wanted}. Pacemaker's words: {}.",
        part("desc")
    );
    let alarm = Alarm::new(severity, subject, text).key(format!("resource {rsc} {node} {task} {rc}")).node(node);
    // As understudy-crm names them; an instance's number says nothing here.
    let name = rsc.split(':').next().unwrap_or_default();
    match name.strip_prefix("vm-").or_else(|| name.strip_prefix("repl-")) {
        Some(machine) => alarm.machine(machine),
        None => alarm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(pairs: &[(&str, &str)]) -> Option<(Alarm, bool)> {
        alarm(&|name| pairs.iter().find(|(n, _)| format!("CRM_alert_{n}") == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn a_lost_node_is_critical_and_every_node_sees_it() {
        let (alarm, everywhere) = said(&[("kind", "node"), ("node", "n1"), ("desc", "lost")]).unwrap();
        assert_eq!((alarm.severity, everywhere), (Severity::Critical, true));
        assert_eq!((alarm.subject.as_str(), alarm.key.as_str()), ("node n1 is lost", "node n1 lost"));
        assert_eq!(said(&[("kind", "node"), ("node", "n1"), ("desc", "member")]).unwrap().0.severity, Severity::Info);
    }

    #[test]
    fn fencing_that_failed_says_what_hangs_on_it() {
        let event = |rc| {
            said(&[("kind", "fencing"), ("node", "n1"), ("task", "st_notify_fence"), ("rc", rc), ("desc", "d")])
                .unwrap()
                .0
        };
        assert_eq!(event("0").severity, Severity::Warning);
        assert_eq!(event("0").subject, "node n1 was fenced");
        let failed = event("-62");
        assert_eq!(failed.severity, Severity::Critical);
        assert!(failed.text.contains("stonith_admin --confirm"), "{}", failed.text);
    }

    #[test]
    fn what_failed_is_told_and_routine_is_only_information() {
        let event = |task, interval, rc, wanted| {
            let pairs = [
                ("kind", "resource"),
                ("rsc", "vm-web1:0"),
                ("node", "n1"),
                ("task", task),
                ("interval", interval),
                ("rc", rc),
                ("target_rc", wanted),
                ("desc", "ok"),
            ];
            said(&pairs).unwrap().0
        };
        assert_eq!(event("start", "0", "0", "0").severity, Severity::Info);
        let failed = event("monitor", "5000", "7", "8");
        assert_eq!(failed.subject, "vm-web1:0 failed on n1: monitor says not running");
        assert_eq!((failed.severity, failed.machine.as_deref()), (Severity::Warning, Some("web1")));
        assert_eq!(event("monitor", "0", "0", "7").severity, Severity::Info);
        assert_eq!(event("monitor", "0", "5", "7").severity, Severity::Warning);
        assert!(event("monitor", "5000", "191", "8").subject.contains("degraded"));
    }

    #[test]
    fn what_is_no_event_is_none() {
        assert!(said(&[]).is_none());
        assert!(said(&[("kind", "weather")]).is_none());
        let empty = said(&[("kind", "resource")]).unwrap().0;
        assert_eq!(empty.machine, None);
    }
}
