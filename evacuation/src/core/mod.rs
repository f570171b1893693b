//! The controller's mind: a function from one reading of the cluster to what is to be done. No I/O, no clock, and no memory of its
//! own: everything that it knows of before stands in the records that are part of the reading. So it can be killed between any two steps
//! and go on elsewhere, and it can be simulated.
//!
//! ```text
//!   machine without a host (its home is fenced; it is on no node)
//!        │ settle
//!        ▼                                automatic: brakes
//!     plan ── Waiting ──────────────────► semi: approval ──────────► Ready ──► Released ──► Runs
//!        │       │ home is back,          manual: order               │ gates,     │ verify
//!   no   │       │ target gone                                        │ batch      ▼
//!   place▼       ▼                                                    ▼          Failed ──► alarm;
//!      alarm   Dropped (planned again if it still has no host) ◄── Dropped       enough of them hold the plan
//! ```
//! A machine that is *released* gets one score, [`EVACUATED`], on its new node, and loses that of its old one: so it has one
//! permitted node at any time, and an old home that returns starts nothing. That is safe only if nothing of it is or may be
//! anywhere else, and that is asked in one place: `Decision::safe`.
//!
//! A machine that *leaves* a host while both are well ([`drains`]) has two permitted nodes from its release until it has arrived, the old one with its old
//! score: Pacemaker migrates it live, and whatever goes wrong it runs on where it is.
//!
//! What must hold (the simulator in `tests/` breaks hosts, fences and controllers at random and looks):
//! 1. nothing is released while its old host may live, or while it runs anywhere; but for a *move*, which is released only if the machine runs on a host that is up, is
//!    nowhere else, and is one that Pacemaker migrates;
//! 2. nothing that is well is stopped; in manual mode nothing is released without an order, in semi-automatic mode nothing without an approval or an order;
//! 3. a plan is in the cluster before the first of its scores;
//! 4. a machine without a host is in a plan, or somebody has been told;
//! 5. no rack holds all machines of a business type if there was another way.

pub mod brakes;
mod drains;
mod findings;
pub mod model;
mod planning;
mod progress;

use understudy_crm::estate::Mode;
use understudy_crm::policy::{Machine, Policy};
use understudy_crm::records::{EVACUATED, Event, KEPT_EVENTS, Plan, Progress, Records};

use model::{Alarm, Host, Round, Snapshot};

/// Closed plans that are kept for reading.
const KEPT_PLANS: usize = 20;

/// What is to be done about this.
pub fn decide(policy: &Policy, snapshot: &Snapshot) -> Round {
    let mut decision = Decision {
        policy,
        snapshot,
        records: snapshot.records.clone(),
        alarms: Vec::new(),
        scores: Vec::new(),
        ask: Vec::new(),
        drains: Vec::new(),
    };
    decision.look();
    decision.hear();
    decision.obey();
    decision.follow();
    decision.release();
    decision.plan();
    decision.drain();
    decision.complain();
    decision.forget();
    let Decision { records, alarms, scores, ask, .. } = decision;
    Round { alarms, records, scores, ask }
}

struct Decision<'a> {
    policy: &'a Policy,
    snapshot: &'a Snapshot,
    records: Records,
    alarms: Vec<Alarm>,
    scores: Vec<(usize, Vec<(usize, i32)>)>,
    ask: Vec<String>,
    /// Hosts that somebody wants emptied, and who.
    drains: Vec<(usize, String)>,
}

impl Decision<'_> {
    fn now(&self) -> u64 {
        self.snapshot.now
    }

    fn machine(&self, m: usize) -> &Machine {
        &self.policy.machines[m]
    }

    fn name(&self, m: usize) -> &str {
        self.machine(m).name.get_ref()
    }

    fn node(&self, n: usize) -> &str {
        self.policy.nodes[n].name.get_ref()
    }

    fn machine_of(&self, name: &str) -> Option<usize> {
        self.policy.machines.iter().position(|m| m.name.get_ref() == name)
    }

    fn node_of(&self, name: &str) -> Option<usize> {
        self.policy.nodes.iter().position(|n| n.name.get_ref() == name)
    }

    fn host(&self, node: usize) -> Host {
        self.snapshot.hosts.get(node).copied().unwrap_or(Host::Joining)
    }

    /// How long the machine has been without a host; `None` if it runs, or need not.
    fn idle(&self, m: usize) -> Option<u64> {
        self.records.state.idle.get(self.name(m)).map(|since| self.now().saturating_sub(*since))
    }

    fn in_a_plan(&self, name: &str) -> bool {
        let open = self.records.plans.iter().filter(|p| p.closed.is_none());
        open.flat_map(|p| &p.moves).any(|m| m.machine == name && !m.progress.over())
    }

    /// Whether starting the machine on another node cannot make a second one: nothing of it is anywhere, and the host that it was on
    /// is dead, or lives and says that it is not there.
    fn safe(&self, m: usize, from: Option<usize>) -> bool {
        let machine = &self.snapshot.machines[m];
        let nowhere = machine.on.is_empty() && machine.runs.is_none();
        let told = |n: usize| match self.host(n) {
            Host::Down | Host::Leaving => true,
            Host::Up => machine.failed.contains(&n),
            Host::Unclean | Host::Joining => false,
        };
        // Its home may have become another one since the plan was made.
        nowhere && from.is_some_and(told) && machine.home().is_none_or(told)
    }

    fn say(&mut self, kind: &str, plan: Option<&str>, machine: Option<&str>, text: String) {
        let state = &mut self.records.state;
        state.last_event = state.last_event.saturating_add(1);
        state.events.push(Event {
            number: state.last_event,
            at: self.snapshot.now,
            node: self.snapshot.here.clone(),
            kind: kind.into(),
            plan: plan.map(Into::into),
            machine: machine.map(Into::into),
            text,
        });
        let surplus = state.events.len().saturating_sub(KEPT_EVENTS);
        state.events.drain(..surplus);
    }

    /// Raise an alarm, unless it is up already.
    fn alarm(&mut self, key: String, plan: Option<&str>, machine: Option<&str>, text: String) {
        if self.records.state.alarms.get(&key) == Some(&text) {
            return;
        }
        self.say("alarm", plan, machine, text.clone());
        self.alarms.push(Alarm { key: key.clone(), machine: machine.map(Into::into), text: text.clone() });
        self.records.state.alarms.insert(key, text);
    }

    fn alarm_of_machine(&mut self, name: &str, plan: Option<&str>, text: String) {
        self.alarm(format!("machine:{name}"), plan, Some(name), text);
    }

    fn all_clear(&mut self, key: &str, text: String) {
        if self.records.state.alarms.remove(key).is_some() {
            self.say("over", None, key.strip_prefix("machine:").or(key.strip_prefix("stays:")), text);
        }
    }

    /// Who is without a host since when; how loaded the hosts are.
    fn look(&mut self) {
        for m in 0..self.policy.machines.len() {
            let (name, machine) = (self.name(m).to_string(), &self.snapshot.machines[m]);
            let runs = machine.runs.filter(|n| self.host(*n) != Host::Unclean);
            if let Some(node) = runs {
                let node = self.node(node).to_string();
                let state = &mut self.records.state;
                state.idle.remove(&name);
                state.left.remove(&name);
                state.attempts.remove(&name);
                self.all_clear(&format!("machine:{name}"), format!("{name} runs on {node}"));
            } else if machine.wanted {
                let now = self.now();
                self.records.state.idle.entry(name).or_insert(now);
            } else {
                self.records.state.idle.remove(&name);
                self.all_clear(&format!("machine:{name}"), format!("{name} is not wanted any more"));
            }
        }
        let step = u32::from(*self.policy.rules().load_step.get_ref());
        for (n, load) in self.snapshot.load.iter().enumerate() {
            let name = self.policy.nodes[n].name.get_ref().clone();
            let Some(load) = *load else {
                self.records.state.load.remove(&name);
                continue;
            };
            let counts = self.records.state.load.entry(name).or_insert(load);
            if counts.abs_diff(load) >= step.max(1) {
                *counts = load;
            }
        }
        // What the policy does not have any more.
        let known: Vec<String> = self.policy.machines.iter().map(|m| m.name.get_ref().clone()).collect();
        let state = &mut self.records.state;
        state.idle.retain(|name, _| known.contains(name));
        state.left.retain(|name, _| known.contains(name));
        state.attempts.retain(|name, _| known.contains(name));
        state.stays.retain(|name, _| known.contains(name));
        let of = |key: &str| key.strip_prefix("machine:").or(key.strip_prefix("stays:")).map(str::to_owned);
        state.alarms.retain(|key, _| of(key).is_none_or(|m| known.contains(&m)));
    }

    /// Machines that have been without a host for too long, and are in nobody's plan.
    fn complain(&mut self) {
        let overdue = self.policy.rules().overdue.0;
        let settle = self.policy.rules().settle.0;
        for m in 0..self.policy.machines.len() {
            let name = self.name(m).to_string();
            let Some(idle) = self.idle(m) else { continue };
            let machine = &self.snapshot.machines[m];
            let home = machine.home();
            let unfenced = |n: &usize| self.host(*n) == Host::Unclean;
            let held_back = machine.on.iter().copied().chain(home).find(unfenced);
            // A plan whose host was lost after it was made waits for the fence, perhaps for ever.
            if self.in_a_plan(&name) && (held_back.is_none() || idle < overdue) {
                continue;
            }
            let home_is_down = home.is_some_and(|n| self.host(n) == Host::Down);
            let waits_for_home = self.machine(m).mode() == Mode::None && home_is_down;
            let left = self.records.state.left.get(&name).cloned();
            if idle < overdue && left.is_none() && !(waits_for_home && idle >= settle) {
                continue;
            }
            let text = match (held_back, left, home) {
                (Some(n), ..) => format!(
                    "{name} may still run on {}, whose death nobody has confirmed: see to the fencing device, or confirm with stonith_admin --confirm {}",
                    self.node(n),
                    self.node(n)
                ),
                (_, Some(why), _) => format!("{name} has no host and stays where it was: {why}"),
                (_, _, Some(n)) if waits_for_home => {
                    format!("{name} waits for its host {}, which is down (mode = \"none\")", self.node(n))
                }
                // Why nothing permitted can hold it has been said.
                _ if self.records.state.alarms.contains_key(&format!("machine:{name}")) => continue,
                _ => format!("{name} should run and does not: see what crm_mon and crm_resource --why say of it"),
            };
            self.alarm_of_machine(&name, None, text);
        }
    }

    /// Old plans go, the newest closed ones stay for reading.
    fn forget(&mut self) {
        let closed = self.records.plans.iter().filter(|p| p.closed.is_some()).count();
        let mut surplus = closed.saturating_sub(KEPT_PLANS);
        self.records.plans.retain(|p: &Plan| {
            let goes = p.closed.is_some() && surplus > 0;
            surplus -= usize::from(goes);
            !goes
        });
    }

    /// The machine lives on that node from now on, and on no other.
    fn give_score(&mut self, m: usize, node: usize) {
        self.scores.push((m, vec![(node, EVACUATED)]));
    }
}

/// Whether anything of the plan may still happen.
fn goes_on(plan: &Plan) -> bool {
    plan.moves.iter().any(|m| matches!(m.progress, Progress::Waiting | Progress::Ready { .. }))
}
