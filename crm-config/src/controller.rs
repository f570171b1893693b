//! `[evacuation]`: what the evacuation controller is told, and which machines are its own.
//!
//! Without this section (and without a machine that asks, `automation = "semi"`) there is no controller, and everything is as it
//! would be without: Pacemaker starts automatic machines elsewhere at once, the others wait for `crm_attribute`. With it,
//! *restart* machines have a score at their home only, and the controller gives them another when their host has died.
//! Takeovers by a standby are Pacemaker's alone, always.
//!
//! What the controller needs of the policy is handed to it through the cluster, as one property ([`estate_record`]): it can run on
//! any node, and no node needs a copy of the file.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use understudy_protocol::key::DEFAULT_KEY_FILE;

use crate::estate::{Automation, Mode};
use crate::model::{Configuration, Constraint, Operation, Primitive, Resource};
use crate::policy::{Machine, Policy, Seconds};
use crate::span::Spanned;

/// Id of the controller's resource.
pub const RESOURCE: &str = "understudy-evacuator";

/// `[evacuation]`: how machines are brought elsewhere.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rules {
    /// Machines that are started at once, 1 to 1000; the next ones when these run.
    pub batch: Spanned<u32>,
    /// How long a batch may take until all of it runs.
    pub verify: Seconds,
    /// As soon as so many machines of a plan have failed to start elsewhere, the rest of it waits for the operator. 1 to 1000.
    pub failures: Spanned<u32>,
    /// How often a machine is tried elsewhere before only the operator can help it, 1 to 100.
    pub attempts: Spanned<u32>,
    /// How long a machine must have been without a host before anything is planned: hosts that die together are one plan.
    pub settle: Seconds,
    /// How long a machine may be without a host before that raises an alarm of its own.
    pub overdue: Seconds,
    /// Brake: more than this share of the hosts down, in percent, and nothing is evacuated by itself. 0 to 100.
    pub max_down: Spanned<u8>,
    /// Brake: more than so many hosts of one rack down, and nothing of that rack is evacuated by itself. Without it a whole rack may be.
    pub max_rack_down: Option<Spanned<u32>>,
    /// A host's load counts as what it was until it differs by as much, in percent. 0 to 100.
    pub load_step: Spanned<u8>,
    /// How often the controller looks.
    pub interval: Seconds,
}

impl Default for Rules {
    fn default() -> Self {
        let at_no_place = |value| Spanned::new(0..0, value);
        Self {
            batch: at_no_place(5),
            verify: Seconds(120),
            failures: at_no_place(1),
            attempts: at_no_place(2),
            settle: Seconds(3),
            overdue: Seconds(120),
            max_down: Spanned::new(0..0, 40),
            max_rack_down: None,
            load_step: Spanned::new(0..0, 10),
            interval: Seconds(2),
        }
    }
}

impl Rules {
    /// What cannot be meant, and where it stands.
    pub fn mistakes(&self) -> Vec<(std::ops::Range<usize>, String)> {
        let mut out = Vec::new();
        let mut number = |at: std::ops::Range<usize>, name: &str, value: u32, least: u32, most: u32| {
            if !(least..=most).contains(&value) {
                out.push((at, format!("{name} = {value}: use {least} to {most}")));
            }
        };
        number(self.batch.span(), "batch", *self.batch.get_ref(), 1, 1000);
        number(self.failures.span(), "failures", *self.failures.get_ref(), 1, 1000);
        number(self.attempts.span(), "attempts", *self.attempts.get_ref(), 1, 100);
        number(self.max_down.span(), "max_down", (*self.max_down.get_ref()).into(), 0, 100);
        number(self.load_step.span(), "load_step", (*self.load_step.get_ref()).into(), 0, 100);
        if let Some(limit) = &self.max_rack_down {
            number(limit.span(), "max_rack_down", *limit.get_ref(), 1, 10_000);
        }
        let seconds = [("verify", self.verify), ("interval", self.interval), ("overdue", self.overdue)];
        for (name, _) in seconds.into_iter().filter(|(_, s)| s.0 == 0) {
            out.push((0..0, format!("[evacuation] {name} cannot be 0")));
        }
        out
    }
}

impl Policy {
    /// Whether the policy needs the controller.
    pub fn has_controller(&self) -> bool {
        let asks = |m: &Machine| m.mode() == Mode::Restart && self.automation(m) == Automation::Semi;
        self.evacuation.is_some() || self.machines.iter().any(asks)
    }

    /// Whether the controller decides where the machine is started when its host has died. (Without a controller nobody does for
    /// those that are not automatic: the operator.)
    pub fn held(&self, machine: &Machine) -> bool {
        machine.mode() == Mode::Restart
            && (self.evacuation.is_some() || self.automation(machine) != Automation::Automatic)
    }

    /// The controller's rules, those that are not said by default.
    pub fn rules(&self) -> Rules {
        self.evacuation.clone().unwrap_or_default()
    }
}

/// What the controller must know of the policy, as one line of JSON; `None` if the policy needs no controller.
///
/// It is a policy again: the same words, without what does not matter for the choice of a host. [`read_estate`] reads it.
pub fn estate_record(policy: &Policy) -> Option<String> {
    if !policy.has_controller() {
        return None;
    }
    let mut nodes = Vec::new();
    for node in &policy.nodes {
        let mut out = Map::new();
        out.insert("name".into(), json!(node.name.get_ref()));
        let texts = [("rack", &node.rack), ("cluster", &node.cluster), ("high_performance", &node.high_performance)];
        for (name, value) in texts {
            put(&mut out, name, value.as_ref().map(|v| json!(v.get_ref())));
        }
        put(&mut out, "memory", node.memory.map(|v| json!(v)));
        put(&mut out, "cpus", node.cpus.map(|v| json!(v)));
        nodes.push(Value::Object(out));
    }
    let machines: Vec<Value> = policy.machines.iter().map(|m| machine_record(policy, m)).collect();
    let rules = policy.rules();
    let mut evacuation = json!({
        "batch": rules.batch.get_ref(), "verify": rules.verify.0, "failures": rules.failures.get_ref(),
        "attempts": rules.attempts.get_ref(), "settle": rules.settle.0, "overdue": rules.overdue.0,
        "max_down": rules.max_down.get_ref(), "load_step": rules.load_step.get_ref(), "interval": rules.interval.0,
    });
    if let (Value::Object(out), Some(limit)) = (&mut evacuation, &rules.max_rack_down) {
        out.insert("max_rack_down".into(), json!(limit.get_ref()));
    }
    let mut all = json!({ "cluster": { "name": policy.cluster.name }, "nodes": nodes, "machines": machines });
    let key = policy.cluster.key.get_ref();
    if key != DEFAULT_KEY_FILE {
        // Codes for approvers are made with it.
        all["cluster"]["key"] = json!(key);
    }
    if let Value::Object(all) = &mut all {
        // Only a policy with the section hands automatic machines to the controller.
        put(all, "evacuation", policy.evacuation.as_ref().map(|_| evacuation));
        let approval = policy.approval.map(|a| {
            let unanswered = match a.unanswered {
                crate::estate::Unanswered::Refuse => "refuse",
                crate::estate::Unanswered::Approve => "approve",
            };
            json!({ "expires": a.expires.0, "unanswered": unanswered })
        });
        put(all, "approval", approval);
    }
    Some(all.to_string())
}

fn put(into: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    into.extend(value.map(|value| (name.to_string(), value)));
}

fn machine_record(policy: &Policy, m: &Machine) -> Value {
    let mode = match m.mode() {
        Mode::Protected => "protected",
        Mode::Restart => "restart",
        Mode::None => "none",
    };
    let automation = match policy.automation(m) {
        Automation::Manual => "manual",
        Automation::Semi => "semi",
        Automation::Automatic => "automatic",
    };
    let mut out = Map::new();
    // A machine needs a kernel to be one; which, is of no concern here.
    let always = [
        ("name", json!(m.name.get_ref())),
        ("kernel", json!("/")),
        ("mode", json!(mode)),
        ("automation", json!(automation)),
        ("memory", json!(m.memory)),
        ("vcpus", json!(m.vcpus.get_ref())),
        ("evacuation", json!(m.evacuation().as_str())),
    ];
    out.extend(always.map(|(name, value)| (name.to_string(), value)));
    for (name, value) in [
        ("business", &m.business),
        ("cluster", &m.cluster),
        ("high_performance", &m.high_performance),
        ("primary", &m.primary),
    ] {
        put(&mut out, name, value.as_ref().map(|v| json!(v.get_ref())));
    }
    put(&mut out, "standby", m.standby.as_ref().map(|s| json!(s.get_ref().names())));
    put(&mut out, "migrate", m.migrates().then_some(json!(true)));
    put(&mut out, "performance", m.high_performance_need().then(|| json!("high")));
    put(&mut out, "priority", m.priority.as_ref().map(|p| json!(p.get_ref())));
    Value::Object(out)
}

/// Read what [`estate_record`] wrote. The error is a sentence.
pub fn read_estate(text: &str) -> Result<Policy, String> {
    let bad = |why: String| format!("the cluster's record of the policy is unreadable ({why}); apply the policy again");
    let table: toml::Table = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
    let text = toml::to_string(&table).map_err(|e| bad(e.to_string()))?;
    Policy::parse(&text).map_err(|e| bad(e.why))
}

/// The controller's resource: one instance, on any host that is not a board.
pub(crate) fn resource(configuration: &mut Configuration, policy: &Policy) {
    let Some(record) = estate_record(policy) else { return };
    configuration.estate = Some(record);
    let once = |name, timeout| Operation { name, interval: 0, timeout, role: None, on_fail: None };
    configuration.resources.push(Resource::Primitive(Primitive {
        id: RESOURCE.into(),
        agent: crate::model::Agent::Ocf { provider: "understudy", kind: "evacuator" },
        parameters: Vec::new(),
        // It is small, and the machines wait for it: it is placed before them, and elsewhere if it fails where it is. A node that its
        // health empties is none for it either: it would take itself for cut off.
        meta: vec![
            ("priority".into(), "20000".into()),
            ("migration-threshold".into(), "2".into()),
            ("failure-timeout".into(), "60s".into()),
        ],
        utilization: Vec::new(),
        operations: vec![
            once("start", 30),
            once("stop", 30),
            Operation { name: "monitor", interval: 10, timeout: 20, role: None, on_fail: None },
        ],
    }));
    configuration.constraints.push(Constraint::on_hosts(RESOURCE));
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
nodes = [
    { name = "n1", storage = "s1", rack = "r1", cluster = "c", memory = 2048, cpus = 4 },
    { name = "n2", storage = "s2", rack = "r2", high_performance = "h", memory = 2048 },
]
machines = [
    { name = "a", kernel = "/k", mode = "restart", automation = "semi", business = "web", priority = 7, memory = 64 },
    { name = "b", kernel = "/k", mode = "restart", migrate = true, performance = "high", evacuation = "dedicated-then-own" },
    { name = "c", kernel = "/k", primary = "n1", standby = "n2" },
]
approval = { expires = "10min", unanswered = "approve" }
"#;

    #[test]
    fn the_record_says_of_machines_and_nodes_what_the_policy_says() {
        for text in [TEXT.to_string(), format!("{TEXT}evacuation = {{ batch = 3, max_rack_down = 2 }}\n")] {
            let policy = Policy::parse(&text).unwrap();
            let record = estate_record(&policy).unwrap();
            assert!(!record.contains('\n'), "attributes of XML have one line");
            let read = read_estate(&record).unwrap();
            assert_eq!(crate::placement::place(&read), crate::placement::place(&policy));
            assert_eq!((read.rules(), read.approval), (policy.rules(), policy.approval));
            for (a, b) in read.machines.iter().zip(&policy.machines) {
                assert_eq!(
                    (read.held(a), read.automation(a), a.mode(), a.migrates()),
                    (policy.held(b), policy.automation(b), b.mode(), b.migrates())
                );
            }
            assert_eq!(estate_record(&read).unwrap(), record);
        }
    }

    #[test]
    fn a_policy_that_asks_nobody_needs_no_controller() {
        let policy = Policy::parse(&TEXT.replace("semi", "manual")).unwrap();
        assert!(!policy.has_controller() && estate_record(&policy).is_none());
    }

    #[test]
    fn a_record_that_somebody_edited_is_an_error_in_words() {
        for text in ["", "{}}", "[]", "{\"nodes\": 7}", "{\"machines\": [{}]}", "{\"x\": null}"] {
            assert!(read_estate(text).unwrap_err().contains("apply the policy again"), "{text}");
        }
    }
}
