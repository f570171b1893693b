//! Golden cases: a folder a policy, in `story` what happens line by line, and in `expected.log` what the controller says and what
//! Pacemaker's own scheduler then starts and stops.
//!
//! The scheduler is that of the lab's Debian root; without it (or without root, which chroot needs) the test says SKIPPED and
//! passes. `UPDATE_GOLDEN=1` writes the logs anew; what changed in them is then to be read by somebody. `UNDERSTUDY_GOLDEN=links,load` tells
//! only these stories.
//!
//! | line | |
//! |---|---|
//! | `lose n1,n2` | the hosts are gone, and nobody has fenced them |
//! | `fence n1` | a lost host is fenced; `dies n1` is both |
//! | `back n1` | it is up again, empty |
//! | `standby n1`, `online n1` | it gives its machines away; it takes some again |
//! | `load n1 80` | it says that its processors are that busy |
//! | `pass 60` | so many seconds |
//! | `release p1 m1`, `cancel p1`, `retry m1` | orders |
//! | `approve p1`, `refuse p1`, `expire p1` | answers |
//! | `drain n1` | an operator wants the host emptied |
//! | `quorum 0`, `maintenance 1` | |
//! | `verdict n1 freeze`, `verdict n1/m1 move` | the monitors say so from now on; `verdict - nothing`: all is well again |
//! | `links 1/2` | so many links of the controller's node reach somebody, of so many |
//! | `breaks m1 n1` | it does not start there, and if it runs there it crashes; `mended m1 n1`: repaired, and its failures cleaned up |
//! | `slow m1` | its starts come to no end; until `quick m1` |
//! | `stop m1`, `start m1` | the administrator does not want it; wants it again |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use understudy_crm::check;
use understudy_crm::policy::Policy;
use understudy_crm::records::{self, Order, What};
use understudy_crm::simulate::{Outcome, Running, Scheduler, history, settled};
use understudy_crm::xml::Element;
use understudy_evacuation::cluster::{Beside, LOAD, policy as policy_of, read, wanted};
use understudy_evacuation::core::decide;
use understudy_evacuation::core::model::ApprovalState;
use understudy_monitor::matrix::{Bmc, Guest, Machine, Management, Observation, Production, Restart, Verdict};
use understudy_monitor::report::{Judged, Report};

fn scheduler() -> Option<Scheduler> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
    let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root || !root.join("usr/sbin/crm_simulate").exists() {
        eprintln!("SKIPPED: the golden cases need root and a lab root with Pacemaker at {}", root.display());
        return None;
    }
    Some(Scheduler { command: vec!["chroot".into(), root.display().to_string(), "crm_simulate".into()] })
}

struct Story<'a> {
    scheduler: &'a Scheduler,
    policy: Policy,
    cib: Element,
    looked: Option<(Element, Outcome, Element)>,
    now: u64,
    approvals: BTreeMap<String, ApprovalState>,
    report: Option<Report>,
    links: (usize, usize),
    /// Machines and the nodes on which they cannot run.
    broken: BTreeSet<(String, String)>,
    /// Machines whose starts come to no end.
    slow: BTreeSet<String>,
    shown: u64,
    log: String,
    /// Controller and cluster did not come to rest.
    endless: bool,
}

impl Story<'_> {
    fn state(&mut self, node: &str) -> &mut Element {
        let states = &mut self.cib.child_or_new("status").children;
        states.iter_mut().find(|s| s.attribute("uname") == Some(node)).unwrap_or_else(|| panic!("no node {node}"))
    }

    fn lose(&mut self, node: &str) {
        let state = self.state(node);
        for (name, value) in [("in_ccm", "false"), ("crmd", "offline"), ("join", "down")] {
            state.set(name, value);
        }
    }

    fn fence(&mut self, node: &str) {
        let state = self.state(node);
        state.set("expected", "down");
        state.children.clear();
    }

    fn back(&mut self, node: &str) {
        let state = self.state(node);
        for (name, value) in [("in_ccm", "true"), ("crmd", "online"), ("join", "member"), ("expected", "member")] {
            state.set(name, value);
        }
        let id = state.id().to_string();
        state.children = vec![Element::new("lrm").with("id", id).and(Element::new("lrm_resources"))];
        let set = Element::new("instance_attributes").with("id", format!("status-{node}"));
        let pair = Element::new("nvpair").with("id", format!("status-{node}-f")).with("name", "#feature-set");
        let set = set.and(pair.with("value", "3.16.1"));
        state.children.push(Element::new("transient_attributes").with("id", node).and(set));
    }

    /// Set an attribute of a node, forever or until it leaves; `None` removes it.
    fn attribute(&mut self, node: &str, transient: bool, name: &str, value: Option<&str>) {
        let owner = if transient {
            self.state(node).child_or_new("transient_attributes")
        } else {
            let nodes = &mut self.cib.child_or_new("configuration").child_or_new("nodes").children;
            nodes.iter_mut().find(|n| n.attribute("uname") == Some(node)).unwrap_or_else(|| panic!("no node {node}"))
        };
        let set = owner.child_or_new("instance_attributes");
        set.children.retain(|p| p.attribute("name") != Some(name));
        if let Some(value) = value {
            let pair = Element::new("nvpair").with("id", format!("{}-{name}", set.id())).with("name", name);
            set.children.push(pair.with("value", value));
        }
    }

    fn resources(&mut self, node: &str) -> &mut Vec<Element> {
        &mut self.state(node).child_or_new("lrm").child_or_new("lrm_resources").children
    }

    fn happened(&mut self, vm: &str, last: &str, node: &str) {
        self.resources(node).retain(|r| r.id() != vm);
        self.resources(node).push(history(vm, "vmm", last, node));
    }

    /// It did not start, or crashed: there is nothing of it, and Pacemaker counts that as often as it takes.
    fn failed(&mut self, vm: &str, node: &str) {
        let mut failed = history(vm, "vmm", "start", node);
        for operation in &mut failed.children {
            operation.set("rc-code", "1");
            operation.set("op-status", "4");
            operation.set("transition-magic", "4:1;1:0:0:00000000-0000-0000-0000-000000000000");
        }
        self.resources(node).retain(|r| r.id() != vm);
        self.resources(node).push(failed);
        self.attribute(node, true, &format!("fail-count-{vm}#start_0"), Some("INFINITY"));
    }

    fn target_role(&mut self, machine: &str, role: &str) {
        let vm = format!("vm-{machine}");
        let resources = &mut self.cib.child_or_new("configuration").child_or_new("resources").children;
        let vm = resources.iter_mut().find(|r| r.id() == vm).unwrap_or_else(|| panic!("no primitive {vm}"));
        let set = vm.child_or_new("meta_attributes");
        set.children.retain(|p| p.attribute("name") != Some("target-role"));
        let id = format!("{}-target-role", set.id());
        set.children.push(Element::new("nvpair").with("id", id).with("name", "target-role").with("value", role));
    }

    fn order(&mut self, what: What, plan: &str, machines: &[&str]) {
        let mut all = records::read(&self.cib).unwrap();
        let machines = machines.iter().map(ToString::to_string).collect();
        all.orders.insert("1".into(), Order { plan: plan.into(), what, machines, by: "operator".into() });
        records::write(&mut self.cib, &all);
    }

    fn happens(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (verb, rest) = words.split_first().unwrap_or((&"", &[]));
        let first = rest.first().copied().unwrap_or_default();
        let second = rest.get(1).copied().unwrap_or_default();
        let vm = format!("vm-{first}");
        let by = || "somebody".to_string();
        match *verb {
            "lose" => first.split(',').for_each(|n| self.lose(n)),
            "fence" => first.split(',').for_each(|n| self.fence(n)),
            "dies" => first.split(',').for_each(|n| {
                self.lose(n);
                self.fence(n);
            }),
            "back" => self.back(first),
            "pass" => self.now += first.parse::<u64>().unwrap(),
            "release" => self.order(What::Release, first, &rest[1..]),
            "cancel" => self.order(What::Cancel, first, &rest[1..]),
            "drain" => self.order(What::Drain, first, &[]),
            "retry" => self.order(What::Retry, "", rest),
            "approve" => drop(self.approvals.insert(first.into(), ApprovalState::Approved { by: by() })),
            "refuse" => drop(self.approvals.insert(first.into(), ApprovalState::Refused { by: by() })),
            "expire" => drop(self.approvals.insert(first.into(), ApprovalState::Expired)),
            "standby" => self.attribute(first, false, "standby", Some("on")),
            "online" => self.attribute(first, false, "standby", None),
            "load" => self.attribute(first, true, LOAD, Some(second)),
            "links" => {
                let (up, of) = first.split_once('/').unwrap();
                self.links = (up.parse().unwrap(), of.parse().unwrap());
            }
            "breaks" => {
                self.broken.insert((vm.clone(), second.into()));
                if self.resources(second).iter().any(|r| r.id() == vm) {
                    self.failed(&vm, second);
                }
            }
            "mended" => {
                self.broken.remove(&(vm.clone(), second.into()));
                self.resources(second).retain(|r| r.id() != vm);
                self.attribute(second, true, &format!("fail-count-{vm}#start_0"), None);
            }
            "slow" => drop(self.slow.insert(vm)),
            "quick" => drop(self.slow.remove(&vm)),
            "stop" => self.target_role(first, "Stopped"),
            "start" => self.target_role(first, "Started"),
            "quorum" => self.cib.set("have-quorum", first),
            "maintenance" => {
                let set = self
                    .cib
                    .child_or_new("configuration")
                    .child_or_new("crm_config")
                    .child_or_new("cluster_property_set");
                set.children.retain(|p| p.attribute("name") != Some("maintenance-mode"));
                let pair = Element::new("nvpair").with("id", "mm").with("name", "maintenance-mode");
                set.children.push(pair.with("value", first));
            }
            "verdict" => self.verdict(first, rest[1]),
            other => panic!("what does {other:?} mean?"),
        }
    }

    /// The monitors say so, and have for a minute.
    fn verdict(&mut self, subject: &str, verdict: &str) {
        let (node, machine) = match subject.split_once('/') {
            Some((node, machine)) => (node, Some(machine.to_owned())),
            None => (subject, None),
        };
        let report = self.report.get_or_insert_with(|| Report {
            node: "n".into(),
            speaks: true,
            waits_for: None,
            judged: Vec::new(),
            refused: 0,
            last_refused: None,
        });
        report.judged.retain(|j| subject != "-" && (j.node != node || j.machine != machine));
        if subject == "-" {
            return;
        }
        let verdict = Verdict::ALL.iter().copied().find(|v| v.as_str() == verdict).unwrap();
        let management = if verdict == Verdict::Freeze { Management::Down } else { Management::Up };
        let (production, bmc) = (Production::Node, Bmc::Unknown);
        let (guest, restart) = (Guest::Unwatched, Restart::Untried);
        let observation = Observation { management, production, bmc, machine: Machine::Running, guest, restart };
        let (node, row) = (node.to_owned(), "story".to_owned());
        report.judged.push(Judged { node, machine, observation, row, verdict, for_ms: 60_000 });
    }

    /// Rounds and transitions until neither the controller nor the cluster has anything to do.
    fn settle(&mut self) {
        for _ in 0..40 {
            let decided = self.round();
            let acted = self.transition();
            if !decided && !acted {
                return;
            }
            self.now += 1;
        }
        self.endless = true;
    }

    /// What the scheduler says of the cluster as it is. It is asked once for each state.
    fn look(&mut self) -> (Outcome, Element) {
        if self.looked.as_ref().is_none_or(|(cib, ..)| *cib != self.cib) {
            let (outcome, status) = self.scheduler.look(&self.cib).unwrap();
            self.looked = Some((self.cib.clone(), outcome, status));
        }
        let (_, outcome, status) = self.looked.as_ref().expect("just looked");
        (outcome.clone(), status.clone())
    }

    fn round(&mut self) -> bool {
        let policy = policy_of(&self.cib).unwrap().unwrap_or_else(|| self.policy.clone());
        let (_, status) = self.look();
        let (approvals, report) = (self.approvals.clone(), self.report.clone());
        let beside = Beside { now: self.now, here: "n".into(), links: Some(self.links), approvals, report };
        let snapshot = read(&policy, &self.cib, &status, beside).unwrap();
        let round = decide(&policy, &snapshot);
        for id in &round.ask {
            let _ = writeln!(self.log, "  asks about {id}");
            self.approvals.insert(id.clone(), ApprovalState::Waiting { expires: u64::MAX });
        }
        for event in round.records.state.events.iter().filter(|e| e.number > self.shown) {
            let _ = writeln!(self.log, "  {:<8} {}", event.kind, event.text);
        }
        self.shown = round.records.state.last_event;
        let asked = !round.ask.is_empty();
        let Some(next) = wanted(&policy, &self.cib, &snapshot, &round) else { return asked };
        self.cib = next;
        true
    }

    /// What the scheduler would do, done.
    fn transition(&mut self) -> bool {
        let (outcome, _) = self.look();
        let vms: Vec<String> = self.policy.machines.iter().map(|m| m.vm_id()).collect();
        let mut acted = false;
        for vm in vms {
            let on = |o: &BTreeMap<String, Vec<Running>>| -> BTreeMap<String, bool> {
                o.get(&vm).into_iter().flatten().map(|r| (r.node.clone(), r.promoted)).collect()
            };
            let (before, after) = (on(&outcome.before), on(&outcome.after));
            let live = outcome.migrated.contains(&vm);
            let down = |node: &str| outcome.fenced.iter().any(|f| f == node);
            for node in before.keys().filter(|n| !after.contains_key(*n) && !down(n)) {
                let what = if live { "migrates" } else { "stops" };
                let _ = writeln!(self.log, "  pacemaker {what} {vm} on {node}");
                self.resources(node).retain(|r| r.id() != vm);
                acted = true;
            }
            // What it would start only after a fence has not been started.
            if before.keys().any(|n| down(n)) {
                continue;
            }
            for (node, promoted) in after {
                let (does, last) = match (before.get(&node), promoted) {
                    (None, false) if live => ("migrates in", "start"),
                    (None, false) => ("starts", "start"),
                    (None | Some(false), true) => ("promotes", "promote"),
                    (Some(_), _) => continue,
                };
                if self.slow.contains(&vm) {
                    continue;
                }
                let _ = writeln!(self.log, "  pacemaker {does} {vm} on {node}");
                acted = true;
                if self.broken.contains(&(vm.clone(), node.clone())) {
                    let _ = writeln!(self.log, "  {vm} does not start on {node}");
                    self.failed(&vm, &node);
                } else {
                    self.happened(&vm, last, &node);
                }
            }
        }
        acted
    }
}

#[test]
fn every_story_ends_as_its_log_says() {
    let Some(scheduler) = scheduler() else { return };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut folders: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 50, "only {} cases", folders.len());
    if let Ok(only) = std::env::var("UNDERSTUDY_GOLDEN") {
        folders.retain(|folder| only.split(',').any(|name| folder.ends_with(name)));
    }
    let mut wrong = Vec::new();
    for folder in &folders {
        let (policy, findings) = check::read(&fs::read_to_string(folder.join("policy.toml")).unwrap());
        let policy = policy.unwrap_or_else(|| panic!("{}: {findings:?}", folder.display()));
        let cib = settled(&policy);
        let mut story = Story {
            scheduler: &scheduler,
            policy,
            cib,
            looked: None,
            now: 1000,
            approvals: BTreeMap::new(),
            report: None,
            links: (2, 2),
            broken: BTreeSet::new(),
            slow: BTreeSet::new(),
            shown: 0,
            log: String::new(),
            endless: false,
        };
        for line in fs::read_to_string(folder.join("story")).unwrap().lines() {
            let _ = writeln!(story.log, "{line}");
            story.happens(line);
            story.settle();
        }
        let file = folder.join("expected.log");
        if story.endless {
            wrong.push(format!("{} comes to no end:\n{}", folder.display(), story.log));
        } else if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&file, &story.log).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != story.log {
            wrong.push(format!("{}:\n{}", folder.display(), story.log));
        }
    }
    assert!(wrong.is_empty(), "other than expected:\n{}", wrong.join("\n"));
    eprintln!("{} cases", folders.len());
}
