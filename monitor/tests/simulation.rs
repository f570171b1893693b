//! Many nodes' monitors, two networks and a clock, all made of values: what each fault is taken for, and what must never happen.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use understudy_monitor::matrix::{Bmc, Guest, Machine, Matrix, Production, Verdict};
use understudy_monitor::members::Member;
use understudy_monitor::report::Judged;
use understudy_monitor::watch::{Config, Event, Watch};
use understudy_monitor::wire::{Heartbeat, MachineSeen, Plane};

const STEP: u64 = 1000;

/// A cluster: node `a1` is the node a in rack 1. Each runs the machine `vm-a1`.
struct World {
    now: u64,
    nodes: Vec<String>,
    watches: BTreeMap<String, Watch>,
    /// Without power.
    dead: BTreeSet<String>,
    /// The cluster has confirmed that they were fenced, or they left by themselves.
    gone: BTreeSet<String>,
    /// Their monitor does not run (or hangs).
    mute: BTreeSet<String>,
    /// Nodes that a network does not reach.
    cut: BTreeMap<Plane, BTreeSet<String>>,
    /// Racks whose switch has lost its way to the others.
    uplink: BTreeSet<char>,
    machine: BTreeMap<String, Machine>,
    said: Vec<(String, Event)>,
}

impl World {
    fn new(names: &str) -> Self {
        let nodes: Vec<String> = names.split(' ').map(str::to_owned).collect();
        let racks: BTreeMap<_, _> = nodes.iter().map(|n| (n.clone(), Some(n[1..].to_owned()))).collect();
        let watch = |node: &String| {
            let config = Config {
                node: node.clone(),
                nodes: racks.clone(),
                interval_ms: STEP,
                missed: 4,
                samples: 3,
                restart_ms: 30_000,
                matrix: Matrix::standard().unwrap(),
            };
            (node.clone(), Watch::new(config, 1))
        };
        let mut world = Self {
            now: 0,
            watches: nodes.iter().map(watch).collect(),
            machine: nodes.iter().map(|n| (n.clone(), Machine::Running)).collect(),
            nodes,
            dead: BTreeSet::new(),
            gone: BTreeSet::new(),
            mute: BTreeSet::new(),
            cut: BTreeMap::new(),
            uplink: BTreeSet::new(),
            said: Vec::new(),
        };
        world.run(20);
        assert!(world.said.iter().all(|(_, e)| matches!(e, Event::Connected(Production::Up))), "{:?}", world.said);
        world.said.clear();
        world
    }

    fn rack(node: &str) -> char {
        node.chars().last().unwrap_or('?')
    }

    fn carries(&self, plane: Plane, from: &str, to: &str) -> bool {
        let cut = |n: &str| self.cut.get(&plane).is_some_and(|cut| cut.contains(n));
        let apart = plane == Plane::Production
            && Self::rack(from) != Self::rack(to)
            && (self.uplink.contains(&Self::rack(from)) || self.uplink.contains(&Self::rack(to)));
        !cut(from) && !cut(to) && !apart
    }

    /// As Corosync of `node` sees it over the management network.
    fn membership(&self, node: &str) -> BTreeMap<String, Member> {
        let sees = |other: &String| {
            let reached = other == node || (!self.dead.contains(other) && self.carries(Plane::Management, node, other));
            let gone = other != node && self.gone.contains(other);
            (
                other.clone(),
                if gone {
                    Member::Left
                } else if reached {
                    Member::Online
                } else {
                    Member::Lost
                },
            )
        };
        self.nodes.iter().map(sees).collect()
    }

    fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.now += STEP;
            for node in self.nodes.clone() {
                if self.dead.contains(&node) || self.mute.contains(&node) {
                    continue;
                }
                let membership = self.membership(&node);
                let own =
                    MachineSeen { name: format!("vm-{node}"), machine: self.machine[&node], guest: Guest::Unwatched };
                let now = self.now;
                let watch = self.watches.get_mut(&node).unwrap();
                watch.members(Some(membership));
                watch.own(vec![own]);
                for event in watch.tick(now) {
                    match event {
                        Event::Beat(beat) => self.deliver(&beat),
                        other => self.said.push((node.clone(), other)),
                    }
                }
            }
        }
    }

    fn deliver(&mut self, beat: &Heartbeat) {
        for plane in Plane::ALL {
            for to in self.nodes.clone() {
                let there = to != beat.node && !self.dead.contains(&to) && !self.mute.contains(&to);
                if there && self.carries(plane, &beat.node, &to) {
                    let sealed = Heartbeat { plane, ..beat.clone() }.seal(&[7; 32]);
                    let opened = Heartbeat::open(&sealed, &[7; 32]).unwrap();
                    self.watches.get_mut(&to).unwrap().heard(self.now, plane, opened);
                }
            }
        }
    }

    /// What `observer` holds of `node` (and of its machine).
    fn verdicts(&self, observer: &str, node: &str) -> (Verdict, Verdict) {
        let report = self.watches[observer].report(self.now);
        let of = |machine: Option<String>| {
            let found = report.judged.iter().find(|j: &&Judged| j.node == node && j.machine == machine);
            found.unwrap_or_else(|| panic!("{observer} knows nothing of {node}: {report:?}")).verdict
        };
        (of(None), of(Some(format!("vm-{node}"))))
    }

    /// Nodes that believe to speak for all.
    fn speakers(&self) -> Vec<&str> {
        let lives = |n: &&String| !self.dead.contains(*n) && !self.mute.contains(*n);
        self.nodes
            .iter()
            .filter(lives)
            .filter(|n| self.watches[*n].report(self.now).speaks)
            .map(String::as_str)
            .collect()
    }
}

const SIX: &str = "a1 b1 c2 d2 e3 f3";

#[test]
fn a_dead_host_is_fenced_and_its_bmc_makes_it_sooner_said() {
    let mut w = World::new(SIX);
    w.dead.insert("c2".into());
    w.run(12);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::FenceAndEvacuate, Verdict::FenceAndEvacuate));
    // One node asks for all; what another one was told says nothing.
    assert_eq!(w.watches["a1"].to_ask(w.now), ["c2"]);
    assert!(w.watches["b1"].to_ask(w.now).is_empty());
    w.watches.get_mut("a1").unwrap().bmc("c2", Bmc::Off);
    w.watches.get_mut("f3").unwrap().bmc("c2", Bmc::On);
    w.run(5);
    for observer in ["a1", "b1", "f3"] {
        assert_eq!(w.verdicts(observer, "c2").1, Verdict::Evacuate, "as {observer} sees it");
    }
    assert_eq!(w.verdicts("f3", "d2"), (Verdict::Nothing, Verdict::Nothing));
    w.dead.clear();
    w.run(12);
    assert_eq!(
        w.verdicts("a1", "c2"),
        (Verdict::Nothing, Verdict::Nothing),
        "what a BMC has said of a member is forgotten"
    );
    assert!(w.watches["a1"].to_ask(w.now).is_empty(), "and a member's is not asked");
}

#[test]
fn a_confirmed_fence_says_off_and_a_host_that_is_heard_after_it_freezes_everything() {
    let mut w = World::new(SIX);
    w.dead.insert("c2".into());
    w.run(12);
    w.watches.get_mut("a1").unwrap().bmc("c2", Bmc::Unreachable);
    w.run(6);
    assert_eq!(w.verdicts("a1", "c2").1, Verdict::Freeze, "neither host nor BMC");
    w.gone.insert("c2".into());
    w.run(1);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::Evacuate, Verdict::Evacuate), "another device has confirmed it");
    assert_eq!(w.verdicts("a1", "d2"), (Verdict::Nothing, Verdict::Nothing));
    assert!(w.watches["a1"].to_ask(w.now).is_empty());

    let mut w = World::new(SIX);
    w.cut.entry(Plane::Management).or_default().insert("c2".into());
    w.run(12);
    w.gone.insert("c2".into());
    w.run(6);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::Freeze, Verdict::Freeze), "fenced, and it serves");
}

#[test]
fn of_two_nodes_the_one_that_is_left_does_not_miss_the_one_that_was_fenced() {
    let mut w = World::new("a1 b2");
    w.dead.insert("b2".into());
    w.run(12);
    w.gone.insert("b2".into());
    w.run(6);
    assert_eq!(w.verdicts("a1", "b2").1, Verdict::Evacuate);
    assert_eq!(w.verdicts("a1", "a1"), (Verdict::Nothing, Verdict::Nothing));
}

#[test]
fn who_leaves_by_itself_is_not_judged() {
    let mut w = World::new(SIX);
    w.mute.insert("c2".into());
    w.gone.insert("c2".into());
    w.run(30);
    assert!(w.watches["a1"].report(w.now).judged.iter().all(|j| j.node != "c2"));
}

#[test]
fn a_broken_card_moves_that_nodes_machines_and_the_node_knows_it_itself() {
    let mut w = World::new(SIX);
    w.cut.entry(Plane::Production).or_default().insert("c2".into());
    w.run(12);
    for observer in ["a1", "c2"] {
        assert_eq!(w.verdicts(observer, "c2").1, Verdict::Move, "as {observer} sees it");
        assert_eq!(w.verdicts(observer, "d2").1, Verdict::Nothing, "as {observer} sees it");
    }
    assert!(w.said.contains(&("c2".into(), Event::Connected(Production::Node))));
    w.cut.clear();
    w.run(12);
    assert_eq!(w.verdicts("c2", "c2").1, Verdict::Nothing);
    assert_eq!(w.said.last(), w.said.iter().rfind(|(_, e)| matches!(e, Event::Connected(_) | Event::Changed { .. })));
}

#[test]
fn a_racks_switch_is_told_from_a_card_and_from_the_whole_network() {
    let mut w = World::new(SIX);
    w.uplink.insert('2');
    w.run(12);
    let report = w.watches["a1"].report(w.now);
    let of = |node: &str| report.judged.iter().find(|j| j.node == node).unwrap().observation.production;
    assert_eq!((of("c2"), of("d2"), of("e3")), (Production::Rack, Production::Rack, Production::Up));
    assert_eq!(w.verdicts("a1", "c2").1, Verdict::Move);
    w.uplink.extend(['1', '3']);
    w.run(12);
    for node in w.nodes.clone() {
        assert_eq!(w.verdicts("a1", &node).1, Verdict::Alarm, "three racks apart: none is better than another");
    }
}

#[test]
fn where_the_whole_production_network_is_gone_nothing_is_touched() {
    let mut w = World::new(SIX);
    let all = w.nodes.iter().cloned().collect();
    w.cut.insert(Plane::Production, all);
    w.run(100);
    for node in w.nodes.clone() {
        assert_eq!(w.verdicts("b1", &node), (Verdict::Alarm, Verdict::Alarm));
    }
}

#[test]
fn a_node_that_only_the_management_network_has_lost_is_not_fenced_for_it() {
    let mut w = World::new(SIX);
    w.cut.entry(Plane::Management).or_default().insert("c2".into());
    w.run(100);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::Alarm, Verdict::Alarm));
    // Until its machine does not serve either.
    w.machine.insert("c2".into(), Machine::Dead);
    w.run(12);
    assert_eq!(w.verdicts("a1", "c2").1, Verdict::FenceAndEvacuate);
}

#[test]
fn a_silent_monitor_is_restarted_first_and_its_machines_leave_only_when_that_does_not_help() {
    let mut w = World::new(SIX);
    w.mute.insert("c2".into());
    w.run(12);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::RestartAgent, Verdict::RestartAgent));
    w.mute.clear();
    w.run(12);
    assert_eq!(w.verdicts("a1", "c2"), (Verdict::Nothing, Verdict::Nothing));
    w.mute.insert("c2".into());
    w.run(60);
    assert_eq!(w.verdicts("a1", "c2").1, Verdict::Relocate);
    let order: Vec<Verdict> = w
        .said
        .iter()
        .filter_map(|(_, e)| match e {
            Event::Changed { now, speaks: true, .. } if now.machine.is_some() => Some(now.verdict),
            _ => None,
        })
        .collect();
    assert_eq!(order, [Verdict::RestartAgent, Verdict::Nothing, Verdict::RestartAgent, Verdict::Relocate]);
}

#[test]
fn of_two_nodes_neither_is_blamed_for_a_cable() {
    let mut w = World::new("a1 b2");
    w.cut.entry(Plane::Production).or_default().insert("b2".into());
    w.run(60);
    for observer in ["a1", "b2"] {
        assert_eq!(w.verdicts(observer, "a1").1, Verdict::Alarm);
        assert_eq!(w.verdicts(observer, "b2").1, Verdict::Alarm);
    }
}

#[test]
fn one_speaks_for_all_and_another_one_when_it_is_gone() {
    let mut w = World::new(SIX);
    assert_eq!(w.speakers(), ["a1"]);
    w.dead.insert("a1".into());
    w.run(6);
    assert_eq!(w.speakers(), ["b1"]);
    let told = |w: &World| w.said.iter().filter(|(_, e)| matches!(e, Event::Changed { speaks: true, .. })).count();
    w.run(12);
    // The node and its machine, by one of them.
    assert_eq!(told(&w), 2, "{:?}", w.said);
}

#[test]
fn what_was_recorded_and_is_played_again_keeps_nobody_alive() {
    let mut w = World::new("a1 b2 c3");
    let old = Heartbeat {
        node: "b2".into(),
        began: 1,
        number: 5,
        plane: Plane::Production,
        hears: Vec::new(),
        machines: Vec::new(),
        left_out: 0,
        bmc: BTreeMap::new(),
    };
    let (now, a1) = (w.now, w.watches.get_mut("a1").unwrap());
    assert!(!a1.heard(now, Plane::Production, old.clone()));
    let future = Heartbeat { number: 1_000_000, ..old.clone() };
    assert!(!a1.heard(now, Plane::Management, future.clone()), "carried into another network");
    assert!(!a1.heard(now, Plane::Production, Heartbeat { node: "x9".into(), ..future }), "nobody's");
}

#[test]
fn without_the_clusters_word_nothing_is_judged() {
    let mut w = World::new("a1 b2 c3");
    let a1 = w.watches.get_mut("a1").unwrap();
    a1.members(None);
    assert!(a1.tick(w.now + STEP).iter().all(|e| matches!(e, Event::Beat(_))));
    let report = a1.report(w.now + STEP);
    assert!(report.waits_for.is_some() && report.judged.is_empty());
}

#[derive(Debug, Clone)]
enum Fault {
    Dies(usize),
    Mutes(usize),
    Cuts(Plane, usize),
    Uplink(char),
    Heals,
    MachineDies(usize),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0_usize..6).prop_map(Fault::Dies),
        (0_usize..6).prop_map(Fault::Mutes),
        ((0_usize..6), any::<bool>())
            .prop_map(|(n, p)| Fault::Cuts(if p { Plane::Production } else { Plane::Management }, n)),
        prop_oneof![Just('1'), Just('2'), Just('3')].prop_map(Fault::Uplink),
        Just(Fault::Heals),
        (0_usize..6).prop_map(Fault::MachineDies),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn whatever_happens_nobody_well_is_touched_and_nothing_is_started_where_it_may_run(
        faults in proptest::collection::vec((fault(), 1_usize..14), 1..8)
    ) {
        let mut w = World::new(SIX);
        let mut since_heal = 0;
        for (fault, steps) in faults {
            let nodes = w.nodes.clone();
            match fault {
                Fault::Dies(n) => { w.dead.insert(nodes[n].clone()); }
                Fault::Mutes(n) => { w.mute.insert(nodes[n].clone()); }
                Fault::Cuts(plane, n) => { w.cut.entry(plane).or_default().insert(nodes[n].clone()); }
                Fault::Uplink(rack) => { w.uplink.insert(rack); }
                Fault::MachineDies(n) => { w.machine.insert(nodes[n].clone(), Machine::Dead); }
                Fault::Heals => {
                    (w.cut, w.uplink, w.mute) = Default::default();
                    since_heal = 0;
                }
            }
            w.run(steps);
            since_heal += steps;
            for observer in nodes.iter().filter(|n| !w.dead.contains(*n) && !w.mute.contains(*n)) {
                for judged in w.watches[observer].report(w.now).judged {
                    // Elsewhere only after a stop by the node itself, a fence, or a BMC's word (nobody has asked one here).
                    prop_assert_ne!(judged.verdict, Verdict::Evacuate);
                    // Nothing is moved for a network that is nobody's fault.
                    let network = judged.observation.production;
                    prop_assert!(judged.verdict != Verdict::Move || matches!(network, Production::Node | Production::Rack));
                    let unharmed = w.dead.is_empty() && w.machine[&judged.node] == Machine::Running;
                    let nothing_wrong = w.cut.values().all(BTreeSet::is_empty) && w.uplink.is_empty() && w.mute.is_empty();
                    if unharmed && nothing_wrong && since_heal > 8 {
                        prop_assert_eq!(judged.verdict, Verdict::Nothing, "{:?}", judged);
                    }
                }
            }
            prop_assert!(w.cut.get(&Plane::Management).is_some_and(|c| !c.is_empty()) || w.speakers().len() <= 1 || since_heal < 8);
        }
    }
}
