//! New plans: machines without a host, and where they could go.

use std::collections::BTreeMap;

use understudy_crm::estate::Automation;
use understudy_crm::placement::Place;
use understudy_crm::records::{Kind, Move, Plan, Progress};
use understudy_crm::situation::{Situation, Wanted, choose, crowded};

use super::Decision;
use super::model::Host;

impl Decision<'_> {
    /// What is where, or will be when the plans are carried out.
    pub(super) fn situation(&self) -> Situation {
        let machines = self.snapshot.machines.iter();
        let mut runs: Vec<Option<usize>> = machines
            .map(|machine| {
                let here = machine.runs.or(machine.on.first().copied());
                // What is about to start at its home takes room there already.
                let starts =
                    |n: &usize| !machine.failed.contains(n) && matches!(self.host(*n), Host::Up | Host::Joining);
                let at_home = machine.home().filter(|n| machine.wanted && starts(n));
                here.or(at_home).filter(|n| !matches!(self.host(*n), Host::Unclean | Host::Down))
            })
            .collect();
        let open = self.records.plans.iter().filter(|p| p.closed.is_none()).flat_map(|p| &p.moves);
        for m in open.filter(|m| !m.progress.over()) {
            if let (Some(machine), Some(to)) = (self.machine_of(&m.machine), self.node_of(&m.to)) {
                runs[machine].get_or_insert(to);
            }
        }
        let beside = self.snapshot.machines.iter().zip(&runs);
        let mut beside: Vec<Vec<usize>> =
            beside.map(|(machine, runs)| machine.on.iter().copied().filter(|n| Some(*n) != *runs).collect()).collect();
        // What leaves its host takes room where it goes as well.
        let open = self.records.plans.iter().filter(|p| p.closed.is_none() && p.kind == Kind::Drain);
        for m in open.flat_map(|p| &p.moves).filter(|m| !m.progress.over()) {
            if let (Some(machine), Some(to)) = (self.machine_of(&m.machine), self.node_of(&m.to))
                && runs[machine] != Some(to)
                && !beside[machine].contains(&to)
            {
                beside[machine].push(to);
            }
        }
        let hosts = 0..self.policy.nodes.len();
        let load = hosts.clone().map(|n| self.records.state.load.get(self.node(n)).copied()).collect();
        Situation {
            runs,
            beside,
            usable: hosts.map(|n| self.host(n) == Host::Up && !self.snapshot.is_left(n)).collect(),
            load,
        }
    }

    /// Machines that have lost their host, that it is the controller's to bring elsewhere, and that nobody is seeing to.
    fn stranded(&mut self) -> Vec<usize> {
        let rules = self.policy.rules();
        let lost = |m: &usize| {
            let (name, home) = (self.name(*m), self.snapshot.machines[*m].home());
            self.idle(*m).is_some()
                && self.policy.held(self.machine(*m))
                && !self.in_a_plan(name)
                && !self.records.state.left.contains_key(name)
                && self.safe(*m, home)
        };
        let lost: Vec<usize> = (0..self.policy.machines.len()).filter(lost).collect();
        // When the first has waited long enough, those that have lost their hosts meanwhile go with it.
        if !lost.iter().any(|m| self.idle(*m).is_some_and(|idle| idle >= rules.settle.0)) {
            return Vec::new();
        }
        let mut out = Vec::new();
        for m in lost {
            let name = self.name(m).to_string();
            let tried = self.records.state.attempts.get(&name).copied().unwrap_or(0);
            if tried >= *rules.attempts.get_ref() {
                let why = format!("it was tried elsewhere {tried} times and did not run");
                self.records.state.left.insert(name.clone(), why.clone());
                self.alarm_of_machine(&name, None, format!("{name} has no host and stays where it was: {why}"));
                continue;
            }
            out.push(m);
        }
        out
    }

    pub(super) fn plan(&mut self) {
        let stranded = self.stranded();
        if stranded.is_empty() {
            return;
        }
        let wanted: Vec<Wanted> = stranded
            .iter()
            .map(|&machine| {
                let now = &self.snapshot.machines[machine];
                Wanted { machine, never: now.failed.iter().copied().chain(now.home()).collect() }
            })
            .collect();
        let situation = self.situation();
        let chosen = choose(self.policy, &situation, &wanted);
        let mut moves: BTreeMap<Automation, Vec<Move>> = BTreeMap::new();
        let mut after = situation.runs.clone();
        for choice in chosen {
            let (name, home) = (self.name(choice.machine).to_string(), self.snapshot.machines[choice.machine].home());
            let from = home.map(|n| self.node(n).to_string()).unwrap_or_default();
            match choice.target {
                Some((to, place)) => {
                    after[choice.machine] = Some(to);
                    let to = self.node(to).to_string();
                    let text = format!("{name} of {from} goes to {to} ({})", place_in_words(place));
                    self.say("planned", None, Some(&name), text);
                    let automation = self.policy.automation(self.machine(choice.machine));
                    let one = Move { machine: name, from, to, progress: Progress::Waiting };
                    moves.entry(automation).or_default().push(one);
                }
                None => {
                    let text = format!(
                        "{name} cannot be evacuated: no node that its evacuation policy ({}) permits is up and has {} MiB free",
                        self.machine(choice.machine).evacuation().as_str(),
                        self.machine(choice.machine).memory
                    );
                    self.alarm_of_machine(&name, None, text);
                }
            }
        }
        if moves.is_empty() {
            return;
        }
        for kind in crowded(self.policy, &after) {
            self.say("crowded", None, None, format!("there is no way to keep {kind} in more than one rack"));
        }
        for (automation, moves) in moves {
            self.open(Kind::Lost, automation, moves, None);
        }
    }

    /// A new plan; `decided`: by whom, if somebody has already.
    pub(super) fn open(&mut self, kind: Kind, automation: Automation, moves: Vec<Move>, decided: Option<String>) {
        self.records.state.plans = self.records.state.plans.saturating_add(1);
        let id = format!("p{}", self.records.state.plans);
        let mut lost: Vec<String> = moves.iter().map(|m| m.from.clone()).collect();
        lost.sort();
        lost.dedup();
        let made = self.now();
        let plan = Plan { id, kind, automation, made, lost, moves, batches: 0, held: None, decided, closed: None };
        let (id, lost, count) = (&plan.id, plan.lost.join(", "), plan.moves.len());
        self.say("plan", Some(id), None, format!("plan {id}: {count} machines of {lost}"));
        let names: Vec<String> = plan.moves.iter().map(|m| format!("{} to {}", m.machine, m.to)).collect();
        let (what, start) = match kind {
            Kind::Lost => ("have no host", "start them elsewhere"),
            Kind::Drain => ("are to leave it while they run", "have them moved"),
        };
        let what = format!("{count} machines of {lost} {what} ({})", names.join(", "));
        match automation {
            Automation::Automatic => {}
            _ if plan.decided.is_some() => {}
            Automation::Manual => {
                let text = format!("{what}; to {start}: understudy-evacuator release {id}");
                self.alarm(format!("plan:{id}"), Some(id), None, text);
            }
            Automation::Semi => {
                let text = format!("{what}; plan {id} waits for an approval, or for understudy-evacuator release {id}");
                self.alarm(format!("plan:{id}"), Some(id), None, text);
            }
        }
        self.records.plans.push(plan);
    }
}

pub(super) fn place_in_words(place: Place) -> &'static str {
    match place {
        Place::Home => "where the policy has its home",
        place => place.as_str(),
    }
}
