//! Plans that are under way: orders, answers, batches, and what became of each machine.

use understudy_crm::estate::{Automation, Unanswered};
use understudy_crm::records::{Hold, Kind, Move, Plan, Progress, What};
use understudy_crm::situation::{Wanted, fits};

use super::brakes::{brake, gate};
use super::model::{ApprovalState, Host};
use super::{Decision, goes_on};

impl Decision<'_> {
    /// What operators want. An order is carried out once: it goes with the change that obeys it.
    pub(super) fn obey(&mut self) {
        for (_, order) in std::mem::take(&mut self.records.orders) {
            let by = order.by.clone();
            if order.what == What::Retry {
                let all = order.machines.is_empty();
                let state = &mut self.records.state;
                state.left.retain(|name, _| !all && !order.machines.contains(name));
                state.attempts.retain(|name, _| !all && !order.machines.contains(name));
                state.stays.retain(|name, _| !all && !order.machines.contains(name));
                let which = if all { "all machines that were left".into() } else { order.machines.join(", ") };
                self.say("order", None, None, format!("{by} wants another plan for {which}"));
                continue;
            }
            if order.what == What::Drain {
                let host = &order.plan;
                self.say("order", None, None, format!("{by} wants {host} emptied"));
                self.drains.extend(self.node_of(host).map(|n| (n, by)));
                continue;
            }
            let Some(at) = self.records.plans.iter().position(|p| p.id == order.plan && p.closed.is_none()) else {
                let text = format!("{by} ordered something of plan {}, of which nothing is left to do", order.plan);
                self.say("order", None, None, text);
                continue;
            };
            let mut plan = self.records.plans[at].clone();
            let undecided = |m: &Move| matches!(m.progress, Progress::Waiting | Progress::Ready { .. });
            let meant = |m: &Move| order.machines.is_empty() || order.machines.contains(&m.machine);
            match order.what {
                What::Release => {
                    let mut count = 0;
                    for m in plan.moves.iter_mut().filter(|m| meant(m) && undecided(m)) {
                        m.progress = Progress::Ready { by_person: true };
                        count += 1;
                    }
                    // A brake is asked again, for what is left.
                    plan.held = None;
                    plan.decided = Some(by.clone());
                    self.say("order", Some(&plan.id), None, format!("{by} releases {count} machines of {}", plan.id));
                }
                What::Retry | What::Drain => {}
                What::Cancel => {
                    let why = format!("{by} cancelled its evacuation");
                    let stays = |m: &&Move| meant(m) && undecided(m);
                    let count = plan.moves.iter().filter(stays).count();
                    self.say("order", Some(&plan.id), None, format!("{by} cancels {count} machines of {}", plan.id));
                    self.leave(&mut plan, &why, meant);
                }
            }
            self.records.plans[at] = plan;
        }
    }

    /// Machines of the plan that are not under way stay where they are; each is somebody's to handle.
    fn leave(&mut self, plan: &mut Plan, why: &str, meant: impl Fn(&Move) -> bool) {
        for m in &mut plan.moves {
            if meant(m) && matches!(m.progress, Progress::Waiting | Progress::Ready { .. }) {
                m.progress = Progress::Dropped { why: why.into() };
                if plan.kind == Kind::Drain {
                    self.stay(&m.machine, &m.from, why.into(), true);
                    continue;
                }
                self.records.state.left.insert(m.machine.clone(), why.into());
                let text = format!("{} has no host and stays where it was: {why}", m.machine);
                self.alarm_of_machine(&m.machine, Some(&plan.id), text);
            }
        }
    }

    /// What became of each machine, and who has decided meanwhile.
    pub(super) fn follow(&mut self) {
        for at in 0..self.records.plans.len() {
            if self.records.plans[at].closed.is_some() {
                continue;
            }
            let mut plan = self.records.plans[at].clone();
            let failed = self.see(&mut plan);
            if failed > 0 {
                self.hold_after_failures(&mut plan);
            }
            self.settle_decision(&mut plan);
            if plan.moves.iter().all(|m| m.progress.over()) {
                let count = |f: fn(&Progress) -> bool| plan.moves.iter().filter(|m| f(&m.progress)).count();
                let (runs, failed) = (count(|p| *p == Progress::Runs), count(|p| matches!(p, Progress::Failed { .. })));
                let rest = plan.moves.len() - runs - failed;
                let text = format!("{runs} machines run, {failed} failed, {rest} were not moved");
                self.say("closed", Some(&plan.id), None, format!("plan {} is over: {text}", plan.id));
                self.all_clear(&format!("plan:{}", plan.id), format!("plan {} is over", plan.id));
                plan.closed = Some(text);
                plan.held = None;
            }
            self.records.plans[at] = plan;
        }
    }

    /// Look after every machine of the plan. How many failed just now?
    fn see(&mut self, plan: &mut Plan) -> u32 {
        let verify = self.policy.rules().verify.0;
        let closed = gate(self.snapshot).is_some();
        let mut failed = 0;
        for m in plan.moves.iter_mut().filter(|m| !m.progress.over()) {
            let (Some(machine), Some(to)) = (self.machine_of(&m.machine), self.node_of(&m.to)) else {
                m.progress = Progress::Dropped { why: "the policy does not have it any more".into() };
                continue;
            };
            if plan.kind == Kind::Drain {
                failed += u32::from(self.see_leaving(&plan.id, m, machine, to));
                continue;
            }
            let now = &self.snapshot.machines[machine];
            let runs = now.runs.filter(|n| self.host(*n) != Host::Unclean);
            let dropped = |why: String| Progress::Dropped { why };
            let progress = match (&m.progress, runs) {
                (Progress::Released { .. }, Some(n)) if n == to => Progress::Runs,
                (_, Some(n)) => dropped(format!("it runs on {}", self.node(n))),
                _ if !now.wanted => dropped("it is not wanted any more".into()),
                (Progress::Released { .. }, None) if matches!(self.host(to), Host::Down | Host::Unclean) => {
                    dropped(format!("{} was lost before it ran there", m.to))
                }
                (Progress::Released { .. }, None) if now.failed.contains(&to) => {
                    Progress::Failed { why: format!("{} cannot start it", m.to) }
                }
                // Pacemaker starts nothing either: that is not the machine's time.
                (Progress::Released { at, batch }, None) if closed => {
                    if self.now() >= at.saturating_add(verify / 2) {
                        m.progress = Progress::Released { at: self.now(), batch: *batch };
                    }
                    continue;
                }
                (Progress::Released { at, .. }, None) if self.now() >= at.saturating_add(verify) => {
                    Progress::Failed { why: format!("it did not run on {} within {verify} s", m.to) }
                }
                (Progress::Waiting | Progress::Ready { .. }, None) => match self.obstacle(machine, &m.from, to) {
                    Some(why) => dropped(why),
                    None => continue,
                },
                _ => continue,
            };
            match &progress {
                Progress::Runs => {
                    self.say("runs", Some(&plan.id), Some(&m.machine), format!("{} runs on {}", m.machine, m.to));
                }
                Progress::Failed { why } => {
                    failed += 1;
                    let text = format!("{} was released to {} and {why}: see its log there", m.machine, m.to);
                    self.say("failed", Some(&plan.id), Some(&m.machine), text.clone());
                    self.alarm_of_machine(&m.machine, Some(&plan.id), text);
                }
                Progress::Dropped { why } => {
                    let text = format!("{} leaves plan {}: {why}", m.machine, plan.id);
                    self.say("dropped", Some(&plan.id), Some(&m.machine), text);
                    // It gets the time that every machine gets before somebody is told, from now.
                    if let Some(since) = self.records.state.idle.get_mut(&m.machine) {
                        *since = self.snapshot.now;
                    }
                }
                _ => {}
            }
            m.progress = progress;
        }
        failed
    }

    /// Why a machine that has not been released cannot go where the plan says any more.
    fn obstacle(&self, m: usize, from: &str, to: usize) -> Option<String> {
        let now = &self.snapshot.machines[m];
        let home = self.node_of(from)?;
        if self.host(home) == Host::Up && !now.failed.contains(&home) && now.home() == Some(home) {
            return Some(format!("its home {from} is back"));
        }
        if self.host(to) != Host::Up || now.failed.contains(&to) {
            return Some(format!("{} cannot take it any more", self.node(to)));
        }
        if now.home() == Some(to) {
            return Some(format!("{} is its home by now", self.node(to)));
        }
        let mut situation = self.situation();
        situation.runs[m] = None;
        let wanted = Wanted { machine: m, never: Vec::new() };
        (!fits(self.policy, &situation, &wanted, to)).then(|| format!("there is no room on {} any more", self.node(to)))
    }

    /// Enough of it failed: the rest waits for a person.
    fn hold_after_failures(&mut self, plan: &mut Plan) {
        let failed = plan.moves.iter().filter(|m| matches!(m.progress, Progress::Failed { .. })).count();
        if failed < *self.policy.rules().failures.get_ref() as usize || !goes_on(plan) {
            return;
        }
        let id = &plan.id;
        let what = if plan.kind == Kind::Drain { "arrive" } else { "start" };
        let why = format!(
            "{failed} machines of {id} did not {what} where they were released to; the rest waits: understudy-evacuator release {id}, or cancel {id}"
        );
        self.say("held", Some(id), None, why.clone());
        self.alarm(format!("plan:{id}"), Some(id), None, why.clone());
        plan.held = Some(Hold::Failures { why });
    }

    /// Who has decided? Nobody decides anything while the plan is held after failures.
    fn settle_decision(&mut self, plan: &mut Plan) {
        if matches!(plan.held, Some(Hold::Failures { .. })) {
            return;
        }
        match plan.automation {
            // Orders have been obeyed.
            Automation::Manual => {}
            Automation::Semi if plan.moves.iter().any(|m| m.progress == Progress::Waiting) => self.ask_about(plan),
            Automation::Semi => {}
            Automation::Automatic => self.ask_the_brakes(plan),
        }
    }

    /// Before every batch: what began as one host's failure may have become a failure of many.
    fn ask_the_brakes(&mut self, plan: &mut Plan) {
        let ours = |m: &Move| matches!(m.progress, Progress::Waiting | Progress::Ready { by_person: false });
        let (id, key) = (plan.id.clone(), format!("plan:{}", plan.id));
        let why = brake(self.policy, self.snapshot, plan).filter(|_| plan.moves.iter().any(ours));
        let Some(why) = why else {
            if plan.held.take().is_some() {
                self.all_clear(&key, format!("plan {id} goes on"));
            }
            for m in plan.moves.iter_mut().filter(|m| ours(m)) {
                m.progress = Progress::Ready { by_person: false };
            }
            return;
        };
        if plan.held.is_none() {
            let names: Vec<&str> = plan.moves.iter().filter(|m| ours(m)).map(|m| m.machine.as_str()).collect();
            let text = format!(
                "plan {id} ({}) waits: {why}; to carry it out all the same: understudy-evacuator release {id}",
                names.join(", ")
            );
            self.say("held", Some(&id), None, why.clone());
            self.alarm(key, Some(&id), None, text);
        }
        plan.held = Some(Hold::Brake { why });
    }

    fn ask_about(&mut self, plan: &mut Plan) {
        let unanswered = self.policy.approval.unwrap_or_default().unanswered;
        let decided = match self.snapshot.approvals.get(&plan.id).unwrap_or(&ApprovalState::NotAsked) {
            ApprovalState::NotAsked => {
                self.ask.push(plan.id.clone());
                return;
            }
            ApprovalState::Waiting { .. } => return,
            ApprovalState::Approved { by } => Ok(format!("{by} approved")),
            ApprovalState::Refused { by } => Err(format!("{by} refused its evacuation")),
            ApprovalState::Expired if unanswered == Unanswered::Approve => {
                Ok("nobody answered in time, which the policy takes for a yes".into())
            }
            ApprovalState::Expired => Err("nobody approved its evacuation in time".into()),
        };
        match decided {
            Ok(how) => {
                self.say("decided", Some(&plan.id), None, format!("plan {} is carried out: {how}", plan.id));
                self.all_clear(&format!("plan:{}", plan.id), format!("plan {} is carried out", plan.id));
                plan.decided = Some(how);
                for m in plan.moves.iter_mut().filter(|m| m.progress == Progress::Waiting) {
                    m.progress = Progress::Ready { by_person: true };
                }
            }
            Err(why) => {
                self.say("decided", Some(&plan.id), None, format!("plan {} is not carried out: {why}", plan.id));
                self.leave(plan, &why, |_| true);
            }
        }
    }

    /// The next batch of each plan: only of plans that were in the cluster before.
    pub(super) fn release(&mut self) {
        let waiting =
            self.records.plans.iter().any(|p| p.closed.is_none() && p.moves.iter().any(|m| is_ready(m, false)));
        let gate = if waiting { gate(self.snapshot) } else { None };
        match gate {
            Some(why) => {
                let text = format!("nothing is started elsewhere: {why}");
                return self.alarm("gate".into(), None, None, text);
            }
            None => self.all_clear("gate", "machines may be started elsewhere again".into()),
        }
        let size = *self.policy.rules().batch.get_ref() as usize;
        for at in 0..self.records.plans.len() {
            let mut plan = self.records.plans[at].clone();
            let unverified = plan.moves.iter().any(|m| matches!(m.progress, Progress::Released { .. }));
            // What a brake holds is held; a person's order passes it. Failures hold everything.
            let braked = match plan.held {
                Some(Hold::Failures { .. }) => continue,
                Some(Hold::Brake { .. }) => true,
                None => false,
            };
            if plan.closed.is_some() || unverified {
                continue;
            }
            let batch = plan.batches.saturating_add(1);
            let mut released = Vec::new();
            for m in plan.moves.iter_mut().filter(|m| is_ready(m, braked)) {
                let (Some(machine), Some(to)) = (self.machine_of(&m.machine), self.node_of(&m.to)) else { continue };
                let from = self.node_of(&m.from);
                let safe = match plan.kind {
                    Kind::Lost => self.safe(machine, from),
                    Kind::Drain => from.is_some_and(|from| {
                        let meant = m.progress == Progress::Ready { by_person: true };
                        (meant || self.told_to_leave(machine, from)) && self.may_leave(machine, from, to)
                    }),
                };
                if released.len() >= size || !safe {
                    continue;
                }
                m.progress = Progress::Released { at: self.now(), batch };
                match (plan.kind, from) {
                    (Kind::Drain, Some(from)) => self.lead(machine, from, to),
                    _ => {
                        let attempts = self.records.state.attempts.entry(m.machine.clone()).or_insert(0);
                        *attempts = attempts.saturating_add(1);
                        self.give_score(machine, to);
                    }
                }
                released.push(format!("{} on {}", m.machine, m.to));
            }
            if !released.is_empty() {
                plan.batches = batch;
                let text = format!("batch {batch} of {}: {}", plan.id, released.join(", "));
                self.say("release", Some(&plan.id), None, text);
            }
            self.records.plans[at] = plan;
        }
    }
}

fn is_ready(m: &Move, braked: bool) -> bool {
    matches!(m.progress, Progress::Ready { by_person } if by_person || !braked)
}
