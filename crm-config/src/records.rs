//! What the evacuation controller keeps in the cluster: all that it knows, so that it can be killed at any moment and go on
//! elsewhere.
//!
//! One property set of the CIB, `understudy-evacuation`, one property a thing, values in JSON:
//! ```text
//!   understudy-evacuation-policy     what the controller must know of the policy     written by `understudy-crm apply`
//!   understudy-evacuation-state      what it has seen; the newest events             written by the controller
//!   understudy-evacuation-plan-ID    a plan, its machines, how far each has come     written by the controller
//!   understudy-evacuation-order-ID   what an operator wants done with a plan         written by an operator's command
//! ```
//! A change is one patch of the CIB that fails if anything else has changed since it was read ([`crate::live::apply_if_unchanged`]):
//! records, scores and events change together or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::compile::WISH;
use crate::estate::Automation;
use crate::xml::Element;

/// Id of the property set.
pub const SET: &str = "understudy-evacuation";
/// Name of the policy's record.
pub const POLICY: &str = "understudy-evacuation-policy";
/// Name of [`State`].
pub const STATE: &str = "understudy-evacuation-state";
/// What the names of [`Plan`]s begin with.
pub const PLAN: &str = "understudy-evacuation-plan-";
/// What the names of [`Order`]s begin with.
pub const ORDER: &str = "understudy-evacuation-order-";
/// The score that the controller gives: this node is the machine's home now. [`crate::merge`] leaves such a machine where it is.
pub const EVACUATED: i32 = 2000;
/// The score of the node that a machine is to move to while it runs: more than any stickiness, so that Pacemaker migrates it. It keeps the score of
/// where it is until it has arrived, so that it is never without a permitted node. [`crate::merge`] leaves both as they are.
pub const ARRIVES: i32 = 200_000;
/// Events that are kept in the cluster. Whoever reads them more seldom than that many happen has a gap, and sees that he has.
pub const KEPT_EVENTS: usize = 64;

/// How far one machine of a plan has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Progress {
    /// Nobody has decided yet.
    Waiting,
    /// Decided; its batch has not come.
    Ready {
        /// By a person, not by the controller itself: brakes do not hold it.
        by_person: bool,
    },
    /// It has its score, and should start.
    Released {
        /// When, in seconds since 1970.
        at: u64,
        /// In which batch.
        batch: u32,
    },
    /// It runs where it should.
    Runs,
    /// It did not run in time. Its score stays: it may still start.
    Failed {
        /// A sentence.
        why: String,
    },
    /// It was not released and will not be by this plan.
    Dropped {
        /// A sentence.
        why: String,
    },
}

impl Progress {
    /// Nothing will become of it any more.
    pub fn over(&self) -> bool {
        matches!(self, Self::Runs | Self::Failed { .. } | Self::Dropped { .. })
    }
}

/// One machine of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The machine.
    pub machine: String,
    /// Its home that died, or that it leaves.
    pub from: String,
    /// Where it shall run.
    pub to: String,
    /// How far it has come.
    pub progress: Progress,
}

/// What a plan is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Machines that have lost their host are started elsewhere.
    #[default]
    Lost,
    /// Machines leave a host while they run.
    Drain,
}

impl Kind {
    fn is_lost(&self) -> bool {
        *self == Self::Lost
    }
}

/// What shall become of machines that have lost their hosts, or that are to leave them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Its name, `p1`, `p2`, …: never used twice in a cluster.
    pub id: String,
    /// What it is about.
    #[serde(default, skip_serializing_if = "Kind::is_lost")]
    pub kind: Kind,
    /// Who decides about it.
    pub automation: Automation,
    /// When it was made, in seconds since 1970.
    pub made: u64,
    /// The hosts whose machines these are.
    pub lost: Vec<String>,
    /// The machines, the important first.
    pub moves: Vec<Move>,
    /// Batches that have been started.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub batches: u32,
    /// Why it does not go on by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<Hold>,
    /// Who decided last that it, or some of it, is carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided: Option<String>,
    /// Nothing will be done about it any more, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Why a plan does not go on by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "by")]
pub enum Hold {
    /// A brake; it goes on when that is released.
    Brake {
        /// A sentence.
        why: String,
    },
    /// Machines of a batch did not start; it goes on when an operator says so.
    Failures {
        /// A sentence.
        why: String,
    },
}

impl Hold {
    /// The sentence.
    pub fn why(&self) -> &str {
        let (Self::Brake { why } | Self::Failures { why }) = self;
        why
    }
}

impl Plan {
    /// What an approval is bound to: which machine goes where. SHA-256, in hexadecimal.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        let mut eat = |text: &str| {
            hash.update(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
            hash.update(text);
        };
        eat(&self.id);
        if self.kind == Kind::Drain {
            eat("drain");
        }
        for m in &self.moves {
            eat(&m.machine);
            eat(&m.from);
            eat(&m.to);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What people are asked about: who lost what, and what goes where.
    pub fn summary(&self) -> String {
        let (hosts, count) = (self.lost.join(", "), self.moves.len());
        let mut out = match self.kind {
            Kind::Lost => format!("{hosts} lost; {count} machines to be started elsewhere:\n"),
            Kind::Drain => format!("{hosts} to be left by {count} machines while they run:\n"),
        };
        for m in &self.moves {
            out.push_str(&format!("  {} from {} to {}\n", m.machine, m.from, m.to));
        }
        out
    }
}

/// What somebody at the keyboard wants done with a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The plan, or the host to be emptied; empty if it is about neither.
    pub plan: String,
    /// What.
    pub what: What,
    /// Only these machines of it; all if empty.
    #[serde(default)]
    pub machines: Vec<String>,
    /// Who, for the journal.
    pub by: String,
}

/// What is ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Carry it out, past what held it. (Never past quorum, maintenance mode and fencing.)
    Release,
    /// Leave the machines where they are.
    Cancel,
    /// Machines that were left without a host (refused, cancelled, failed too often) are planned anew. Names no plan.
    Retry,
    /// Machines leave a host while they run. Names the host.
    Drain,
}

/// What the controller has seen and must not forget.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Plans made so far.
    pub plans: u64,
    /// Events so far; the number of the last in [`Self::events`].
    pub last_event: u64,
    /// Since when machines that should run do not, in seconds since 1970.
    pub idle: BTreeMap<String, u64>,
    /// Times that a machine was released since it last ran.
    pub attempts: BTreeMap<String, u32>,
    /// Machines that were left without a host on purpose, and why.
    pub left: BTreeMap<String, String>,
    /// Machines that should leave their host while they run and do not.
    pub stays: BTreeMap<String, Stay>,
    /// Alarms that are up, by key.
    pub alarms: BTreeMap<String, String>,
    /// The load of each host as it counts, in percent.
    pub load: BTreeMap<String, u32>,
    /// The newest events, oldest first.
    pub events: Vec<Event>,
}

/// A machine that stays where it should not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stay {
    /// The host that it should leave.
    pub node: String,
    /// Why it does not: a sentence.
    pub why: String,
    /// An operator wanted it to; else the monitors do.
    pub ordered: bool,
    /// Nothing more is tried until somebody says so.
    pub over: bool,
}

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; each is the one before it and one.
    pub number: u64,
    /// When, in seconds since 1970.
    pub at: u64,
    /// The node whose controller wrote it.
    pub node: String,
    /// What kind of thing, one word: `planned`, `plan`, `crowded`, `order`, `decided`, `held`, `release`, `runs`, `failed`, `dropped`, `closed`,
    /// `alarm`, `over`.
    pub kind: String,
    /// The plan, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// The machine, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// A sentence.
    pub text: String,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = self.plan.as_deref().unwrap_or("-");
        write!(f, "{:>6} {} {:<8} {plan:<5} {}", self.number, time(self.at), self.kind, self.text)
    }
}

/// Seconds since 1970 as `2026-11-23T07:15:29Z`.
pub fn time(seconds: u64) -> String {
    // The last second of the year 9999: the library knows no later one.
    let known = std::time::Duration::from_secs(seconds.min(253_402_300_799));
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + known).to_string()
}

/// All records of a CIB.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Records {
    /// What has been seen.
    pub state: State,
    /// The plans, oldest first.
    pub plans: Vec<Plan>,
    /// The orders, by id.
    pub orders: BTreeMap<String, Order>,
}

/// Why records cannot be used: a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the property {name} is unreadable ({why}); remove it with: crm_attribute --type crm_config --set-name {SET} --name {name} --delete"
)]
pub struct BadRecord {
    /// Which.
    pub name: String,
    /// What was wrong.
    pub why: String,
}

/// A property of our set, by name.
pub fn property<'a>(cib: &'a Element, name: &str) -> Option<&'a str> {
    pairs(cib).find(|(n, _)| *n == name).map(|(_, value)| value)
}

fn pairs(cib: &Element) -> impl Iterator<Item = (&str, &str)> {
    let config = cib.child("configuration").and_then(|c| c.child("crm_config"));
    let sets = config.map(|c| c.children.as_slice()).unwrap_or_default();
    let ours = sets.iter().find(|s| s.id() == SET).into_iter().flat_map(|s| &s.children);
    ours.filter_map(|p| Some((p.attribute("name")?, p.attribute("value")?)))
}

/// Read all records; what is not there is empty. Of two of the same name the first counts, as for Pacemaker.
pub fn read(cib: &Element) -> Result<Records, BadRecord> {
    let mut records = Records::default();
    let mut seen = BTreeSet::new();
    for (name, value) in pairs(cib) {
        if !seen.insert(name) {
            continue;
        }
        let bad = |e: serde_json::Error| BadRecord { name: name.into(), why: e.to_string() };
        if name == STATE {
            records.state = serde_json::from_str(value).map_err(bad)?;
        } else if let Some(id) = name.strip_prefix(PLAN) {
            let plan: Plan = serde_json::from_str(value).map_err(bad)?;
            if plan.id != id {
                return Err(BadRecord { name: name.into(), why: format!("it says that it is plan {:?}", plan.id) });
            }
            records.plans.push(plan);
        } else if let Some(id) = name.strip_prefix(ORDER) {
            records.orders.insert(id.into(), serde_json::from_str(value).map_err(bad)?);
        }
    }
    // By number, not by time: clocks go back, and the next controller has another.
    records.plans.sort_by_key(|p| (p.id.len(), p.id.clone()));
    Ok(records)
}

/// Write all records into `cib`, in place of those that are there. Other properties stay.
pub fn write(cib: &mut Element, records: &Records) {
    let text = |value: Result<String, serde_json::Error>| value.unwrap_or_default();
    let mut wanted: BTreeMap<String, String> = BTreeMap::new();
    if records.state != State::default() {
        wanted.insert(STATE.into(), text(serde_json::to_string(&records.state)));
    }
    wanted.extend(records.plans.iter().map(|p| (format!("{PLAN}{}", p.id), text(serde_json::to_string(p)))));
    wanted.extend(records.orders.iter().map(|(id, o)| (format!("{ORDER}{id}"), text(serde_json::to_string(o)))));
    let is_ours = |name: &str| name == STATE || name.starts_with(PLAN) || name.starts_with(ORDER);
    let set = set_in(cib);
    let mut seen = BTreeSet::new();
    set.children.retain(|p| {
        let ours = p.attribute("name").filter(|n| is_ours(n));
        ours.is_none_or(|n| wanted.contains_key(n) && seen.insert(n.to_owned()))
    });
    for (name, value) in wanted {
        put(set, &name, &value);
    }
}

/// Our property set, made if there is none.
pub fn set_in(cib: &mut Element) -> &mut Element {
    let config = cib.child_or_new("configuration").child_or_new("crm_config");
    let at = match config.children.iter().position(|s| s.id() == SET) {
        Some(at) => at,
        None => {
            config.children.push(Element::new("cluster_property_set").with("id", SET));
            config.children.len() - 1
        }
    };
    &mut config.children[at]
}

/// Set a property in a set.
pub fn put(set: &mut Element, name: &str, value: &str) {
    match set.children.iter_mut().find(|p| p.attribute("name") == Some(name)) {
        Some(pair) => pair.set("value", value),
        None => {
            let pair = Element::new("nvpair").with("id", format!("{SET}-{name}")).with("name", name);
            set.children.push(pair.with("value", value));
        }
    }
}

/// Scores of a machine: node name and value.
pub fn wishes<'a>(cib: &'a Element, machine: &str) -> Vec<(&'a str, i32)> {
    let name = format!("{WISH}{machine}");
    let nodes = cib.child("configuration").and_then(|c| c.child("nodes")).map(|n| n.children.as_slice());
    let score = |node: &'a Element| {
        let sets = node.children.iter().filter(|s| s.name == "instance_attributes").flat_map(|s| &s.children);
        let pair = sets.filter(|p| p.attribute("name") == Some(&name)).find_map(|p| p.attribute("value"))?;
        Some((node.attribute("uname")?, pair.parse().ok()?))
    };
    nodes.unwrap_or_default().iter().filter(|n| n.name == "node").filter_map(score).collect()
}

/// Give the machine exactly these scores.
pub fn set_wishes(cib: &mut Element, machine: &str, wanted: &[(String, i32)]) {
    let name = format!("{WISH}{machine}");
    let nodes = cib.child_or_new("configuration").child_or_new("nodes");
    for node in nodes.children.iter_mut().filter(|n| n.name == "node") {
        let uname = node.attribute("uname").unwrap_or_default().to_string();
        let score = wanted.iter().find(|(n, _)| *n == uname).map(|(_, score)| *score);
        for set in node.children.iter_mut().filter(|s| s.name == "instance_attributes") {
            set.children.retain(|p| p.attribute("name") != Some(&name));
        }
        let Some(score) = score else { continue };
        let id = format!("nodes-{}", node.id());
        let at = node.children.iter().position(|s| s.name == "instance_attributes" && s.id() == id);
        let at = at.unwrap_or_else(|| {
            node.children.push(Element::new("instance_attributes").with("id", &id));
            node.children.len() - 1
        });
        let pair = Element::new("nvpair").with("id", format!("{id}-{name}")).with("name", &name).with("value", score);
        node.children[at].children.push(pair);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cib() -> Element {
        Element::parse(
            "<cib><configuration><crm_config><cluster_property_set id='understudy-evacuation'>\
             <nvpair id='x' name='understudy-approval-p1' value='{}'/></cluster_property_set></crm_config><nodes>\
             <node id='1' uname='n1'><instance_attributes id='nodes-1'><nvpair id='a' name='understudy-evac-m' value='1000'/>\
             <nvpair id='b' name='standby' value='off'/></instance_attributes></node><node id='2' uname='n2'/>\
             </nodes></configuration></cib>",
        )
        .unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_and_what_others_wrote_stays() {
        let mut cib = cib();
        let moves = vec![Move { machine: "m".into(), from: "n1".into(), to: "n2".into(), progress: Progress::Waiting }];
        let plan = Plan {
            id: "p1".into(),
            kind: Kind::Drain,
            automation: Automation::Semi,
            made: 7,
            lost: vec!["n1".into()],
            moves,
            batches: 0,
            held: Some(Hold::Brake { why: "\"why\" <&>".into() }),
            decided: None,
            closed: None,
        };
        let order = Order { plan: "p1".into(), what: What::Release, machines: vec![], by: "root".into() };
        let state = State { plans: 1, ..State::default() };
        let records = Records { state, plans: vec![plan], orders: [("o1".to_string(), order)].into() };
        write(&mut cib, &records);
        let again = Element::parse(&cib.to_string()).unwrap();
        assert_eq!(read(&again).unwrap(), records);
        assert_eq!(property(&again, "understudy-approval-p1"), Some("{}"));
        // Somebody's second one neither counts nor stays.
        let set = set_in(&mut cib);
        set.children.push(Element::new("nvpair").with("name", STATE).with("value", "{}"));
        assert_eq!(read(&cib).unwrap(), records);
        let more = Records { state: State { plans: 2, ..State::default() }, ..records };
        write(&mut cib, &more);
        assert_eq!(read(&cib).unwrap(), more);
        assert_eq!(cib.to_string().matches(STATE).count(), 2, "once in its id, once as its name");
        write(&mut cib, &Records::default());
        assert_eq!(read(&cib).unwrap(), Records::default());
        assert_eq!(property(&cib, "understudy-approval-p1"), Some("{}"));
    }

    #[test]
    fn scores_are_moved_and_other_attributes_are_not() {
        let mut cib = cib();
        assert_eq!(wishes(&cib, "m"), [("n1", 1000)]);
        set_wishes(&mut cib, "m", &[("n2".into(), EVACUATED)]);
        assert_eq!(wishes(&cib, "m"), [("n2", EVACUATED)]);
        assert!(cib.to_string().contains("standby"));
        assert!(wishes(&cib, "x").is_empty());
    }

    #[test]
    fn another_plan_has_another_digest() {
        let go = |to: &str| Move { machine: "m".into(), from: "a".into(), to: to.into(), progress: Progress::Waiting };
        let plan = |id: &str, moves| Plan {
            id: id.into(),
            kind: Kind::Lost,
            automation: Automation::Semi,
            made: 0,
            lost: vec![],
            moves,
            batches: 0,
            held: None,
            decided: None,
            closed: None,
        };
        let first = plan("p1", vec![go("b")]);
        for other in [plan("p2", vec![go("b")]), plan("p1", vec![go("c")]), plan("p1", vec![go("b"), go("c")])] {
            assert_ne!(first.digest(), other.digest());
        }
        assert_ne!(Plan { kind: Kind::Drain, ..first.clone() }.digest(), first.digest());
        let mut same = first.clone();
        same.moves[0].progress = Progress::Runs;
        assert_eq!(first.digest(), same.digest());
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_418_129, "2026-11-23T07:15:29Z"),
        ] {
            assert_eq!(time(seconds), text);
        }
        let _ = time(u64::MAX);
    }
}
