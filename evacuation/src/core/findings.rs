//! What the monitors find, for people: an alarm for what is wrong and lasts, and its end.
//!
//! One alarm a subject. A machine whose host has the same row of the matrix is not told of beside it, and a row that holds of several hosts
//! (a network that is down) is one alarm for all of them. While nobody can tell, what was said stays said.

use std::collections::{BTreeMap, BTreeSet};

use understudy_monitor::matrix::Verdict;

use super::Decision;
use super::model::Finding;

/// What the keys of these alarms begin with.
const KEY: &str = "finding:";

impl Decision<'_> {
    pub(super) fn hear(&mut self) {
        let Some(findings) = &self.snapshot.findings else { return };
        let wrong: Vec<&Finding> = findings.iter().filter(|f| advice(f.verdict).is_some()).collect();
        let hosts: BTreeSet<(&str, Verdict, usize)> =
            wrong.iter().filter(|f| f.machine.is_none()).map(|f| (f.row.as_str(), f.verdict, f.node)).collect();
        let several = |f: &Finding| hosts.iter().filter(|(row, v, _)| (*row, *v) == (&f.row, f.verdict)).count() > 1;
        let mut last: BTreeSet<String> = BTreeSet::new();
        let mut new: BTreeMap<String, (Option<usize>, String)> = BTreeMap::new();
        for f in wrong {
            let machine = f.machine.filter(|_| !hosts.contains(&(f.row.as_str(), f.verdict, f.node)));
            let subject = self.subject(f.node, machine);
            let own = format!("{KEY}{subject}");
            let together = machine.is_none() && several(f) && !self.records.state.alarms.contains_key(&own);
            let (key, who) =
                if together { (format!("{KEY}row:{}", f.row), "several hosts".to_owned()) } else { (own, subject) };
            last.insert(key.clone());
            if f.lasts >= self.policy.rules().settle.0 {
                let advice = advice(f.verdict).unwrap_or_default();
                let text = format!(
                    "{who}: the monitors say {} (row {}): {advice}; what they see: understudy-monitor status",
                    f.verdict, f.row
                );
                new.insert(key, (machine, text));
            }
        }
        for (key, (machine, text)) in new {
            let machine = machine.map(|m| self.name(m).to_owned());
            self.alarm(key, None, machine.as_deref(), text);
        }
        let up = self.records.state.alarms.keys().filter(|key| key.starts_with(KEY) && !last.contains(*key));
        for key in up.cloned().collect::<Vec<_>>() {
            let what = key.strip_prefix(KEY).unwrap_or(&key);
            let text = match what.strip_prefix("row:") {
                Some(row) => format!("row {row} of the fault matrix does not hold of several hosts any more"),
                None => format!("{what}: the monitors say nothing of that kind any more"),
            };
            self.all_clear(&key, text);
        }
    }

    fn subject(&self, node: usize, machine: Option<usize>) -> String {
        let node = self.node(node);
        machine.map_or_else(|| node.to_owned(), |m| format!("{node}/{}", self.name(m)))
    }
}

/// What is to be done about a verdict that nobody else tells of; `None` if nothing is, or a plan or a fence tells of it.
fn advice(verdict: Verdict) -> Option<&'static str> {
    match verdict {
        Verdict::Nothing | Verdict::FenceAndEvacuate | Verdict::Evacuate => None,
        Verdict::Alarm => Some("nothing is done by itself"),
        Verdict::Freeze => {
            Some("nothing of it is started elsewhere by itself; once somebody has looked: understudy-evacuator release")
        }
        Verdict::RestartAgent => Some("the cluster restarts on that host what does not answer"),
        Verdict::RestartMachine => Some(
            "if the cluster does not restart it there, crm resource restart does; it is not started elsewhere for this",
        ),
        Verdict::Relocate => Some(
            "restarts there did not help; the cluster brings it elsewhere when it has failed there often enough: see crm_mon",
        ),
        Verdict::Move => Some("what can leave that host while it runs is brought elsewhere, as the policy decides"),
    }
}
