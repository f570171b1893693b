//! Machines that leave a host while they run: because the monitors say so (its own network is dead, and it is well otherwise), or because
//! an operator wants it empty.
//!
//! ```text
//!   verdict move, or drain NODE ─► plan (kind drain) ─ decided ─► Released: the new node gets the higher score, the old one keeps its own
//!        │ it cannot leave alive                                     │ Pacemaker migrates it live
//!        ▼                                                           ├─► Runs there: the old node loses its score
//!      alarm; it stays                                               └─► not in time, or the new node is gone: as before, alarm
//! ```
//! A healthy machine is never stopped for this: only what Pacemaker migrates is released, only from a host that is up, and its old node stays permitted
//! until it runs on the new one.

use std::collections::BTreeMap;

use understudy_crm::estate::{Automation, Mode};
use understudy_crm::records::{ARRIVES, EVACUATED, Kind, Move, Progress, Stay};
use understudy_crm::situation::{Wanted, choose, fits};
use understudy_monitor::matrix::Verdict;

use super::Decision;
use super::model::Host;
use super::planning::place_in_words;

impl Decision<'_> {
    /// The monitors say that the machine is to leave this host while it runs.
    pub(super) fn told_to_leave(&self, m: usize, node: usize) -> bool {
        let findings = self.snapshot.findings.iter().flatten();
        let mut of_it = findings.filter(|f| f.node == node && f.machine == Some(m));
        of_it.any(|f| f.verdict == Verdict::Move)
    }

    /// Whether the machine can be moved now and cannot be stopped by it: it runs there and only there, on a host that is up, where alone it may be, and
    /// Pacemaker migrates it.
    pub(super) fn may_leave(&self, m: usize, from: usize, to: usize) -> bool {
        self.leaves_alive(m, from).is_ok() && self.settled_on(m, from) && self.takes(m, to)
    }

    fn settled_on(&self, m: usize, from: usize) -> bool {
        let machine = &self.snapshot.machines[m];
        let there = machine.wanted && !machine.migrating && machine.runs == Some(from) && machine.on == [from];
        there
            && self.host(from) == Host::Up
            && matches!(machine.wishes[..], [(n, score)] if n == from && score < ARRIVES)
    }

    fn takes(&self, m: usize, to: usize) -> bool {
        self.host(to) == Host::Up && !self.snapshot.machines[m].failed.contains(&to) && !self.snapshot.is_left(to)
    }

    /// Why the machine is none that leaves its host while it runs.
    fn leaves_alive(&self, m: usize, node: usize) -> Result<(), String> {
        let (machine, name) = (self.machine(m), self.name(m));
        let node = self.node(node);
        if machine.mode() == Mode::Protected {
            return Err(format!(
                "it is protected: hand it over to its standby with crm resource move {} or ban {node}",
                machine.vm_id()
            ));
        }
        if !machine.migrates() {
            return Err(format!("it is not migrated live (the policy does not say migrate = true of {name})"));
        }
        if !self.policy.held(machine) {
            return Err(format!("the policy leaves its place to Pacemaker: crm resource move {}", machine.vm_id()));
        }
        Ok(())
    }

    /// New plans of this kind, and who stays.
    pub(super) fn drain(&mut self) {
        self.forget_who_left();
        let mut leaving: Vec<(usize, usize, Option<String>)> = Vec::new();
        for (node, by) in std::mem::take(&mut self.drains) {
            for m in 0..self.policy.machines.len() {
                if self.snapshot.machines[m].runs == Some(node) {
                    leaving.push((m, node, Some(by.clone())));
                }
            }
        }
        let settle = self.policy.rules().settle.0;
        // With node health Pacemaker does it, and two would quarrel.
        let findings = self.snapshot.findings.iter().flatten().filter(|_| !self.snapshot.health);
        for f in findings.filter(|f| f.verdict == Verdict::Move && f.lasts >= settle) {
            let Some(m) = f.machine.filter(|m| self.snapshot.machines[*m].runs == Some(f.node)) else { continue };
            let over = self.records.state.stays.get(self.name(m)).is_some_and(|stay| stay.over);
            if !over && !leaving.iter().any(|(other, ..)| *other == m) {
                leaving.push((m, f.node, None));
            }
        }
        leaving.retain(|(m, ..)| !self.in_a_plan(self.name(*m)));
        let mut by_whom: BTreeMap<Option<String>, Vec<(usize, usize)>> = BTreeMap::new();
        for (m, node, by) in leaving {
            match self.leaves_alive(m, node) {
                Err(why) => self.stay_put(m, node, why, by.is_some()),
                // On its way already, or about to be: looked at again in the next round.
                Ok(()) if !self.settled_on(m, node) => {
                    if by.is_some() {
                        self.stay_put(
                            m,
                            node,
                            "it does not run there alone, or the cluster does not manage it; order it again when that is over".into(),
                            true,
                        );
                    }
                }
                Ok(()) => by_whom.entry(by).or_default().push((m, node)),
            }
        }
        for (by, leaving) in by_whom {
            self.send(by, &leaving);
        }
    }

    /// A plan for machines that can leave.
    fn send(&mut self, by: Option<String>, leaving: &[(usize, usize)]) {
        let mut situation = self.situation();
        let never: Vec<usize> = (0..self.policy.nodes.len())
            .filter(|n| self.snapshot.is_left(*n) || leaving.iter().any(|(_, from)| from == n))
            .collect();
        let mut wanted = Vec::new();
        for &(machine, _) in leaving {
            situation.runs[machine] = None;
            let failed = &self.snapshot.machines[machine].failed;
            wanted.push(Wanted { machine, never: never.iter().chain(failed).copied().collect() });
        }
        let mut moves: BTreeMap<Automation, Vec<Move>> = BTreeMap::new();
        for choice in choose(self.policy, &situation, &wanted) {
            let m = choice.machine;
            let Some(&(_, from)) = leaving.iter().find(|(other, _)| *other == m) else { continue };
            let Some((to, place)) = choice.target else {
                self.stay_put(
                    m,
                    from,
                    "no other node that its evacuation policy permits is up and has room".into(),
                    by.is_some(),
                );
                continue;
            };
            let (name, from, to) = (self.name(m).to_owned(), self.node(from).to_owned(), self.node(to).to_owned());
            let text = format!("{name} leaves {from} for {to} ({})", place_in_words(place));
            self.say("planned", None, Some(&name), text);
            let (automation, progress) = match by {
                // Who ordered it has decided.
                Some(_) => (Automation::Manual, Progress::Ready { by_person: true }),
                None => (self.policy.automation(self.machine(m)), Progress::Waiting),
            };
            self.end_stay(&name);
            moves.entry(automation).or_default().push(Move { machine: name, from, to, progress });
        }
        for (automation, moves) in moves {
            self.open(Kind::Drain, automation, moves, by.clone());
        }
    }

    /// The machine is led to its new node, and keeps its old one until it has arrived.
    pub(super) fn lead(&mut self, m: usize, from: usize, to: usize) {
        let here = self.score(m, from);
        self.scores.push((m, vec![(from, here), (to, ARRIVES)]));
    }

    fn score(&self, m: usize, node: usize) -> i32 {
        let wishes = &self.snapshot.machines[m].wishes;
        wishes.iter().find(|(n, _)| *n == node).map_or(EVACUATED, |(_, score)| *score)
    }

    /// Look after a machine that leaves. Whether it failed just now.
    pub(super) fn see_leaving(&mut self, plan: &str, m: &mut Move, machine: usize, to: usize) -> bool {
        let Some(from) = self.node_of(&m.from) else {
            m.progress = Progress::Dropped { why: "the policy does not have its host any more".into() };
            return false;
        };
        let Some(progress) = self.left(m, machine, from, to) else { return false };
        let released = matches!(m.progress, Progress::Released { .. });
        let name = m.machine.clone();
        match &progress {
            Progress::Runs => {
                self.give_score(machine, to);
                self.say("runs", Some(plan), Some(&name), format!("{name} runs on {}", m.to));
            }
            Progress::Failed { why } => {
                self.say(
                    "failed",
                    Some(plan),
                    Some(&name),
                    format!("{name} was to leave {} for {}: {why}", m.from, m.to),
                );
                self.stay(&name, &m.from, why.clone(), true);
            }
            Progress::Dropped { why } => {
                self.say("dropped", Some(plan), Some(&name), format!("{name} leaves plan {plan}: {why}"));
            }
            _ => {}
        }
        if released && progress != Progress::Runs {
            self.settle_scores(machine, from, to);
        }
        let failed = matches!(progress, Progress::Failed { .. });
        m.progress = progress;
        failed
    }

    /// A move is given up: one permitted node again. Where it still is, or may be, that is the old one.
    fn settle_scores(&mut self, machine: usize, from: usize, to: usize) {
        if self.snapshot.machines[machine].on.contains(&from) {
            let here = self.score(machine, from);
            self.scores.push((machine, vec![(from, here)]));
        } else {
            self.give_score(machine, to);
        }
    }

    fn left(&self, m: &Move, machine: usize, from: usize, to: usize) -> Option<Progress> {
        let now = &self.snapshot.machines[machine];
        let runs = now.runs.filter(|n| self.host(*n) != Host::Unclean);
        let verify = self.policy.rules().verify.0;
        let dropped = |why: String| Some(Progress::Dropped { why });
        let failed = |why: String| Some(Progress::Failed { why });
        let Progress::Released { at, .. } = m.progress else {
            return match runs {
                Some(n) if n == from => self.hindrance(m, machine, from, to).and_then(dropped),
                Some(n) => dropped(format!("it runs on {}", self.node(n))),
                None => dropped(format!("it does not run on {} any more", m.from)),
            };
        };
        let lost = matches!(self.host(to), Host::Down | Host::Unclean);
        match runs {
            // For as long as Pacemaker lets it (the timeout of migrate_to).
            _ if now.migrating && !lost => None,
            Some(n) if n == to => (now.on == [to]).then_some(Progress::Runs),
            Some(n) if n != from => dropped(format!("it runs on {}", self.node(n))),
            _ if lost => dropped(format!("{} was lost before it ran there", m.to)),
            Some(_) if now.failed.contains(&to) || self.host(to) != Host::Up => {
                dropped(format!("{} cannot take it any more", m.to))
            }
            None if !now.wanted && now.on.contains(&from) => failed(format!(
                "the cluster leaves it alone where it is, as it does when a live migration has failed; when that is seen to: crm_resource --cleanup --resource {}",
                self.machine(machine).vm_id()
            )),
            _ if !now.wanted => dropped("it is not wanted any more".into()),
            None if now.failed.contains(&to) => failed(format!("{} cannot start it", m.to)),
            _ if self.now() >= at.saturating_add(verify) => {
                failed(format!("it did not run on {} within {verify} s", m.to))
            }
            _ => None,
        }
    }

    /// Why a machine that has not been released is not moved any more.
    fn hindrance(&self, m: &Move, machine: usize, from: usize, to: usize) -> Option<String> {
        let decided = m.progress == Progress::Ready { by_person: true };
        if !decided && self.snapshot.findings.is_some() && !self.told_to_leave(machine, from) {
            return Some("the monitors do not say any more that it should leave".into());
        }
        if self.host(from) != Host::Up {
            return Some(format!("{} is not up any more", m.from));
        }
        if let Err(why) = self.leaves_alive(machine, from) {
            return Some(why);
        }
        if !self.takes(machine, to) {
            return Some(format!("{} cannot take it any more", m.to));
        }
        let mut situation = self.situation();
        situation.runs[machine] = None;
        situation.beside[machine].retain(|n| *n != to);
        let wanted = Wanted { machine, never: vec![from] };
        (!fits(self.policy, &situation, &wanted, to)).then(|| format!("there is no room on {} any more", m.to))
    }

    fn stay_put(&mut self, m: usize, node: usize, why: String, ordered: bool) {
        let (name, node) = (self.name(m).to_owned(), self.node(node).to_owned());
        if ordered {
            self.records
                .state
                .stays
                .insert(name.clone(), Stay { node: node.clone(), why: why.clone(), ordered, over: true });
        }
        self.stay(&name, &node, why, false);
    }

    /// The machine stays where it should not be, and somebody is told.
    pub(super) fn stay(&mut self, name: &str, node: &str, why: String, over: bool) {
        let text = format!("{name} should leave {node} while it runs, and stays: {why}");
        let before = self.records.state.stays.get(name).filter(|stay| stay.node == node);
        let (ordered, over) = before.map_or((false, over), |stay| (stay.ordered, stay.over || over));
        let stay = Stay { node: node.into(), why, ordered, over };
        self.records.state.stays.insert(name.into(), stay);
        self.alarm(format!("stays:{name}"), None, Some(name), text);
    }

    fn end_stay(&mut self, name: &str) {
        if self.records.state.stays.remove(name).is_some() {
            self.all_clear(&format!("stays:{name}"), format!("{name} does not stay where it should not be"));
        }
    }

    /// Who has left after all, or need not any more.
    fn forget_who_left(&mut self) {
        let known = self.snapshot.findings.is_some();
        let stays: Vec<(String, Stay)> = self.records.state.stays.clone().into_iter().collect();
        for (name, stay) in stays {
            let there = match (self.machine_of(&name), self.node_of(&stay.node)) {
                (Some(m), Some(n)) if self.snapshot.machines[m].on.contains(&n) => {
                    stay.ordered || !known || self.told_to_leave(m, n)
                }
                _ => false,
            };
            if !there {
                self.end_stay(&name);
            }
        }
        // A retry has forgotten them.
        let keys: Vec<String> =
            self.records.state.alarms.keys().filter(|key| key.starts_with("stays:")).cloned().collect();
        for key in keys {
            let name = key.strip_prefix("stays:").unwrap_or(&key);
            if !self.records.state.stays.contains_key(name) {
                self.all_clear(&key, format!("{name} does not stay where it should not be"));
            }
        }
    }
}
