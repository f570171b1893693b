//! Where machines that have lost their host can go *now*: the rules of [`crate::placement`] over what is really where, instead
//! of over what is at home where.
//!
//! Rules and their order (E-5 to E-8): permitted by the evacuation policy; room beside what must not be displaced; not the one
//! rack that would then hold all machines of the business type; the policy's tier; the rack with the fewest of the type; free
//! memory; load; the policy's order of nodes.
//!
//! First everybody takes the best that is left, the important and the large first. Where that leaves a whole business type in one
//! rack, or somebody without a place, a search over all combinations looks for a better one, [`STEPS`] steps long at most. Better is: more
//! machines placed; then fewer types that one rack holds alone; then what is found first, in the order above. With few machines
//! that is every combination, so that a placement that keeps the rule is found if there is one.

use std::cmp::Reverse;

use crate::placement::{Estate, Homes, Load, Place, fullness};
use crate::policy::Policy;

/// How long the search may take: some milliseconds for estates of hundreds of nodes.
pub const STEPS: usize = 20_000;

/// What is where.
#[derive(Debug, Clone, Default)]
pub struct Situation {
    /// For each machine the node that it runs on, or is about to run on.
    pub runs: Vec<Option<usize>>,
    /// For each machine other nodes where it takes memory: its standby's.
    pub beside: Vec<Vec<usize>>,
    /// For each node whether machines can be started there.
    pub usable: Vec<bool>,
    /// For each node its measured load in percent, if it is known.
    pub load: Vec<Option<u32>>,
}

/// A machine that wants a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The machine, as an index into the policy's.
    pub machine: usize,
    /// Nodes that it must not be sent to: where it was, where it failed.
    pub never: Vec<usize>,
}

/// Where it should go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// The machine.
    pub machine: usize,
    /// The node, and why it may be there; `None` if nothing permitted can hold it.
    pub target: Option<(usize, Place)>,
}

/// One node that a machine could go to.
#[derive(Clone, Copy)]
struct Candidate {
    node: usize,
    tier: u8,
    place: Place,
}

struct Search<'a> {
    estate: Estate<'a>,
    situation: &'a Situation,
    /// The machines in the order in which they choose.
    wanted: Vec<&'a Wanted>,
    candidates: Vec<Vec<Candidate>>,
    now: Homes,
    /// Who runs in which rack, by business type: `kind * racks + rack`.
    of_type: Vec<u32>,
    /// How many machines have no place even while all the others have none.
    hopeless: usize,
    steps: usize,
    best: Option<(Score, Vec<Option<Candidate>>)>,
}

/// Smaller is better: machines without a place (the important first), types that one rack holds alone.
type Score = (Vec<bool>, usize);

/// Find a host for each of them. In the order of importance.
pub fn choose(policy: &Policy, situation: &Situation, wanted: &[Wanted]) -> Vec<Chosen> {
    let mut search = Search::new(policy, situation, wanted);
    let mut greedy = vec![None; search.wanted.len()];
    search.descend(0, &mut greedy, true);
    if !search.ideal() {
        search.steps = 0;
        let mut from_scratch = vec![None; search.wanted.len()];
        search.descend(0, &mut from_scratch, false);
    }
    let best = search.best.map(|(_, places)| places).unwrap_or_default();
    let places = best.into_iter().map(|c| c.map(|c| (c.node, c.place)));
    search.wanted.iter().zip(places).map(|(w, target)| Chosen { machine: w.machine, target }).collect()
}

/// Whether the machine may go to the node as things are, and has room there.
pub fn fits(policy: &Policy, situation: &Situation, wanted: &Wanted, node: usize) -> bool {
    let only = [wanted.clone()];
    Search::new(policy, situation, &only).ordered(0).iter().any(|c| c.node == node)
}

/// Business types of which at least two machines run, all of them in one rack.
pub fn crowded(policy: &Policy, runs: &[Option<usize>]) -> Vec<String> {
    let estate = Estate::new(policy);
    let mut of_type = vec![0; estate.kinds * estate.racks()];
    for (m, node) in runs.iter().enumerate() {
        if let (Some(kind), Some(node)) = (estate.kind.get(m).copied().flatten(), node) {
            of_type[kind * estate.racks() + estate.rack[*node]] += 1;
        }
    }
    let name = |kind: usize| {
        let machine = estate.kind.iter().position(|k| *k == Some(kind))?;
        policy.machines[machine].business.as_ref().map(|b| b.get_ref().clone())
    };
    (0..estate.kinds).filter(|&k| alone(&of_type, estate.racks(), k)).filter_map(name).collect()
}

fn alone(of_type: &[u32], racks: usize, kind: usize) -> bool {
    let row = &of_type[kind * racks..(kind + 1) * racks];
    let all: u32 = row.iter().sum();
    all > 1 && row.contains(&all)
}

impl<'a> Search<'a> {
    fn new(policy: &'a Policy, situation: &'a Situation, wanted: &'a [Wanted]) -> Self {
        let estate = Estate::new(policy);
        let mut now = Homes::new(&estate);
        let mut of_type = vec![0; estate.kinds * estate.racks()];
        for m in 0..policy.machines.len() {
            for node in situation.beside.get(m).into_iter().flatten() {
                now.occupy(&estate, m, *node);
            }
            if let Some(node) = situation.runs.get(m).copied().flatten() {
                now.occupy(&estate, m, node);
                if let Some(kind) = estate.kind[m] {
                    of_type[kind * estate.racks() + estate.rack[node]] += 1;
                }
            }
        }
        let mut wanted: Vec<&Wanted> = wanted.iter().collect();
        wanted.sort_by_key(|w| {
            let machine = &policy.machines[w.machine];
            (Reverse(machine.priority()), Reverse(machine.memory), w.machine)
        });
        let candidates = wanted.iter().map(|w| candidates(&estate, situation, w)).collect();
        let mut search =
            Self { estate, situation, wanted, candidates, now, of_type, hopeless: 0, steps: 0, best: None };
        search.hopeless = (0..search.wanted.len()).filter(|&at| search.ordered(at).is_empty()).count();
        search
    }

    /// The candidates for the machine that chooses now, the best first.
    fn ordered(&self, at: usize) -> Vec<Candidate> {
        let machine = self.wanted[at].machine;
        let kind = self.estate.kind[machine];
        let racks = self.estate.racks();
        let key = |c: &Candidate| {
            let node = &self.estate.policy.nodes[c.node];
            let rack = self.estate.rack[c.node];
            let load = self.now.load[c.node];
            let (full, memory, cpus) = fullness(node, load, &self.estate.policy.machines[machine]);
            let there = kind.map_or(0, |k| self.of_type[k * racks + rack]);
            let all: u32 = kind.map_or(0, |k| self.of_type[k * racks..(k + 1) * racks].iter().sum());
            let fills_one_rack = all > 0 && there == all;
            // What was measured counts before what is declared; a host that says nothing counts as its machines.
            let measured = self.situation.load.get(c.node).copied().flatten();
            let cpu = measured.map_or(cpus, |percent| u64::from(percent) * 10_000);
            (fills_one_rack, c.tier, full, there, memory, cpu, c.node)
        };
        let machine_of = &self.estate.policy.machines[machine];
        let room = |c: &&Candidate| self.now.has_room(&self.estate, machine_of, c.node, Load::default());
        let mut fitting: Vec<Candidate> = self.candidates[at].iter().filter(room).copied().collect();
        fitting.sort_by_key(key);
        fitting
    }

    fn descend(&mut self, at: usize, taken: &mut Vec<Option<Candidate>>, first_only: bool) {
        if at == self.wanted.len() {
            let racks = self.estate.racks();
            let crowded = (0..self.estate.kinds).filter(|&k| alone(&self.of_type, racks, k)).count();
            let score = (taken.iter().map(Option::is_none).collect::<Vec<_>>(), crowded);
            // Fewer without a place; then the important placed rather than others.
            let rank = |s: &Score| (s.0.iter().filter(|unplaced| **unplaced).count(), s.0.clone(), s.1);
            if self.best.as_ref().is_none_or(|(best, _)| rank(&score) < rank(best)) {
                self.best = Some((score, taken.clone()));
            }
            return;
        }
        let ordered = self.ordered(at);
        let nobody = ordered.is_empty();
        let machine = self.wanted[at].machine;
        for candidate in ordered {
            self.steps += 1;
            self.put(machine, candidate.node, true);
            taken[at] = Some(candidate);
            self.descend(at + 1, taken, first_only);
            taken[at] = None;
            self.put(machine, candidate.node, false);
            if first_only || self.finished() {
                return;
            }
        }
        // Without a place, for the sake of others or because there is none.
        if nobody || !first_only {
            self.descend(at + 1, taken, first_only);
        }
    }

    fn finished(&self) -> bool {
        self.steps >= STEPS || self.ideal()
    }

    /// Everybody has a place for whom there was one to begin with, and no rack holds a type alone.
    fn ideal(&self) -> bool {
        let unplaced = |score: &Score| score.0.iter().filter(|unplaced| **unplaced).count();
        self.best.as_ref().is_some_and(|(score, _)| score.1 == 0 && unplaced(score) <= self.hopeless)
    }

    fn put(&mut self, machine: usize, node: usize, there: bool) {
        if there {
            self.now.occupy(&self.estate, machine, node);
        } else {
            self.now.vacate(&self.estate, machine, node);
        }
        if let Some(kind) = self.estate.kind[machine] {
            let count = &mut self.of_type[kind * self.estate.racks() + self.estate.rack[node]];
            *count = if there { *count + 1 } else { count.saturating_sub(1) };
        }
    }
}

/// Nodes that the policy permits and that are up. A machine's home is always permitted.
fn candidates(estate: &Estate, situation: &Situation, wanted: &Wanted) -> Vec<Candidate> {
    let machine = &estate.policy.machines[wanted.machine];
    let mut all: Vec<Candidate> =
        estate.permitted(machine).into_iter().map(|(node, tier, place)| Candidate { node, tier, place }).collect();
    let home = estate.policy.nodes.iter().position(|n| machine.primary.as_ref() == Some(&n.name));
    if let Some(home) = home {
        all.retain(|c| c.node != home);
        all.push(Candidate { node: home, tier: 0, place: Place::Home });
    }
    let usable = |c: &Candidate| situation.usable.get(c.node) == Some(&true) && !wanted.never.contains(&c.node);
    all.retain(usable);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(machines: &str) -> Policy {
        let nodes = r#"nodes = [
            { name = "a1", storage = "1", rack = "A", cluster = "c", memory = 1000 },
            { name = "a2", storage = "2", rack = "A", cluster = "c", memory = 1000 },
            { name = "b1", storage = "3", rack = "B", cluster = "c", memory = 1000 },
            { name = "h1", storage = "4", rack = "H", high_performance = "h", memory = 1000 },
        ]"#;
        Policy::parse(&format!("{nodes}\nmachines = [{machines}]\n")).unwrap()
    }

    fn machine(name: &str, memory: u32, more: &str) -> String {
        format!("{{ name = \"{name}\", kernel = \"/k\", mode = \"restart\", memory = {memory}, {more} }},")
    }

    /// Node names, in the policy's order of machines.
    fn places(policy: &Policy, runs: &[Option<usize>], usable: [bool; 4], load: [Option<u32>; 4]) -> Vec<String> {
        let situation = Situation {
            runs: runs.to_vec(),
            beside: vec![Vec::new(); runs.len()],
            usable: usable.to_vec(),
            load: load.to_vec(),
        };
        let stranded: Vec<Wanted> = (0..runs.len())
            .filter(|m| runs[*m].is_none())
            .map(|machine| Wanted { machine, never: Vec::new() })
            .collect();
        let mut chosen = choose(policy, &situation, &stranded);
        chosen.sort_by_key(|c| c.machine);
        let name = |c: &Chosen| c.target.map_or("-".into(), |(n, _)| policy.nodes[n].name.get_ref().clone());
        chosen.iter().map(name).collect()
    }

    const UP: [bool; 4] = [true; 4];
    const UNKNOWN: [Option<u32>; 4] = [None; 4];

    #[test]
    fn free_memory_and_then_measured_load_decide_within_a_tier() {
        let p = policy(&(machine("x", 100, "") + &machine("m", 100, "")));
        assert_eq!(places(&p, &[Some(0), None], UP, UNKNOWN), ["a2"]);
        assert_eq!(places(&p, &[Some(0), None], UP, [None, Some(90), Some(10), None]), ["b1"]);
        assert_eq!(places(&p, &[Some(2), None], UP, [Some(50), Some(20), None, None]), ["a2"]);
    }

    #[test]
    fn a_machine_goes_to_a_later_tier_rather_than_that_one_rack_holds_all_of_its_type() {
        let web = "business = \"web\", performance = \"high\", evacuation = \"own-then-dedicated\"";
        let p = policy(&(machine("x", 100, web) + &machine("m", 100, web)));
        assert_eq!(places(&p, &[Some(0), None], [true, true, true, true], UNKNOWN), ["b1"]);
        assert_eq!(places(&p, &[Some(0), None], [true, true, false, true], UNKNOWN), ["h1"]);
        assert_eq!(places(&p, &[Some(0), None], [true, true, false, false], UNKNOWN), ["a2"]);
    }

    #[test]
    fn the_search_finds_room_for_all_where_the_first_choices_do_not() {
        // The first choice of the larger machine is where the smaller one alone may be.
        let p = policy(&(machine("big", 800, "") + &machine("pinned", 700, "primary = \"a1\", standby = \"a2\"")));
        assert_eq!(places(&p, &[None, None], [true, false, true, false], UNKNOWN), ["b1", "a1"]);
    }

    #[test]
    fn without_room_there_is_no_place_and_the_important_machine_has_the_last_one() {
        let p = policy(&(machine("low", 600, "") + &machine("high", 600, "priority = 9")));
        assert_eq!(places(&p, &[None, None], [true, false, false, false], UNKNOWN), ["-", "a1"]);
    }

    #[test]
    fn only_types_that_one_rack_holds_alone_are_crowded() {
        let p = policy(&(machine("x", 1, "business = \"web\"") + &machine("y", 1, "business = \"web\"")));
        assert_eq!(crowded(&p, &[Some(0), Some(1)]), ["web"]);
        assert!(crowded(&p, &[Some(0), Some(2)]).is_empty() && crowded(&p, &[Some(0), None]).is_empty());
    }
}
