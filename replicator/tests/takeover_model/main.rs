//! Takeover and going solo, model-checked: every order of events, within bounds, of two nodes under Pacemaker with fencing.
//!
//! The simulation (`tests/simulation`) runs the real state machines through random schedules. This is the other half: a model
//! small enough for *all* schedules to be tried, of what no single process sees whole: two configurations that drift apart,
//! fencing that takes its time, a hook that outlives its sender, a node that wakes from the dead.
//!
//! | in the model | in the code |
//! |---|---|
//! | `PromoteStore`, `PromoteRun`, `Demote` | `agents/src/vmm/promote.rs`, `rules.rs`, `leave.rs`; Pacemaker's scheduler |
//! | `WriteVeto`, `ProveVeto`, `ClearVeto…`, `OrphanClears` | `agents/src/veto.rs`, `hook.rs` |
//! | when the veto is asked for, `OpenGate` | `replicator/src/sender.rs` (`next_for_veto`), `sender/react.rs` (`hook_done`) |
//! | `Connect`, `BeginCopy`, `Arm`, `Cut`, `TakeAck` | `replicator/src/sender.rs`, `Receiver::hello` |
//! | `Stage`, `Commit`, `Report` | `replicator/src/receiver.rs`, `image.rs` |
//! | `Release`, gate, committed | `vmm/src/gate.rs`, `vmm/src/session.rs` |
//! | `Attach`, `Fenced` | `protocol/src/board/port.rs` |
//! | `Cib`, `store`, `Join`, `CatchUp` | the CIB: a copy on every node, the newer one prevails |
//! | `LoseMember`, `RequestFencing`, `Fence`, `ConfirmFencing` | Corosync's token, Pacemaker's fencer |
//!
//! What is taken for granted, and what was learnt from the counterexamples, is in
//! `docs/decisions/0010-takeover-is-model-checked.md`. More faults: `UNDERSTUDY_MODEL_FAULTS=2 cargo test --test takeover_model`.

mod rules;
mod world;

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use rules::{Action, Broken, Start, Takeover};
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::*;

const ONE_PAST: &str = "the world sees one past";
const NO_STALE: &str = "no stale image is promoted";
const NEWEST: &str = "a board acts for the newest generation only";
const ONE_RUNS: &str = "one node runs the machine";
const OWN_GENERATION: &str = "no two machines run under one generation";
const PROMISE: &str = "who calls itself protected has a standby that holds all that left";
const BOUNDED: &str = "versions and generations stay small";

impl Model for Takeover {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.first()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // After something wrong there is nothing more to learn.
        if world.wrong.is_none() {
            self.possible(world, actions);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.after(world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_PAST, |_, w: &World| w.wrong != Some(Wrong::TwoPasts)),
            Property::always(NO_STALE, |_, w: &World| w.wrong != Some(Wrong::StaleTakeover)),
            Property::always(NEWEST, |_, w: &World| w.wrong != Some(Wrong::OldOwnerActed)),
            // Where fencing lies, two may think so; then the boards decide.
            Property::always(ONE_RUNS, |m: &Self, w: &World| m.zombies || w.hosts.iter().any(|h| h.vm.is_none())),
            Property::always(OWN_GENERATION, |_, w: &World| match w.hosts.map(|h| h.vm) {
                [Some(a), Some(b)] => a.generation != b.generation,
                _ => true,
            }),
            Property::always(PROMISE, |_, w: &World| (0..2).all(|n| !w.protected(n) || keeps_its_promise(w, n))),
            // If this fails, the state space has no end and nothing is proven.
            Property::always(BOUNDED, |_, w: &World| {
                w.hosts.iter().all(|h| h.cib.version < 20 && h.cib.generations.iter().all(|g| *g < 20))
            }),
            // The model can do what it is about.
            Property::sometimes("a standby continues the machine, and the world hears of it", |_, w: &World| {
                w.hosts.iter().flat_map(|h| h.vm).any(|vm| {
                    let takeover = vm.past.life < vm.generation && vm.past.by[1] == vm.generation;
                    takeover && w.board.outside == vm.past
                })
            }),
            Property::sometimes("a machine runs unprotected under a veto", |_, w: &World| {
                (0..2).any(|n| w.hosts[n].veto == Veto::Standing && w.hosts[n].vm.is_some_and(|vm| vm.gate_open))
            }),
            Property::sometimes("protection is back after a takeover", |_, w: &World| {
                (0..2).any(|n| w.protected(n) && w.hosts[n].vm.is_some_and(|vm| vm.generation > 1))
            }),
        ]
    }
}

/// Its standby holds a whole image of all that the world has seen; or has lost its power, which the sender is about to notice; or
/// runs the machine itself.
fn keeps_its_promise(w: &World, n: Node) -> bool {
    let standby = &w.hosts[1 - n];
    let connected = w.conn.is_some_and(|c| c.receiver_open);
    match standby.image {
        Image::Whole { past, .. } => past.contains(&w.board.outside) || past.life > w.board.outside.life,
        Image::Outdated => false,
        Image::Inconsistent => !connected || standby.vm.is_some(),
    }
}

/// What may happen beyond what the test asks for.
fn faults(at_least: u8) -> u8 {
    std::env::var("UNDERSTUDY_MODEL_FAULTS").ok().and_then(|n| n.parse().ok()).unwrap_or(0).max(at_least)
}

fn model(start: Start, faults: u8) -> Takeover {
    Takeover { start, faults, zombies: false, broken: None }
}

/// Every state that can be reached, or an account of how something wrong can be.
fn check(model: Takeover) {
    let what = format!("{model:?}");
    let done = model.checker().spawn_bfs().join();
    let states = done.unique_state_count();
    done.assert_properties();
    println!("{what}: {states} states");
    assert!(states > 1000, "only {states} states: the model does not move");
}

/// The checker must find that `property` does not hold.
fn check_breaks(model: Takeover, property: &'static str) {
    let what = format!("{model:?}");
    let wanted = HasDiscoveries::AnyOf([property].into());
    let done = model.checker().finish_when(wanted).spawn_bfs().join();
    let way = done.discovery(property).unwrap_or_else(|| panic!("{what}: nobody noticed; {property}"));
    println!("{what}, and not \"{property}\":\n    {:?}", way.into_actions());
}

#[test]
fn from_the_first_boot_on_every_order_of_events_keeps_the_invariants() {
    check(model(Start::Boot, 1));
}

#[test]
fn a_protected_machine_keeps_the_invariants_whatever_fails() {
    check(model(Start::Protected, faults(1)));
}

#[test]
fn a_node_that_wakes_from_the_dead_can_do_nothing() {
    // One fault: a fencing device that lies about a node which is cut off too is beyond what two nodes can survive.
    check(Takeover { zombies: true, ..model(Start::Protected, 1) });
}

#[test]
fn the_checker_notices_a_gate_that_opens_without_a_veto() {
    let broken = Some(Broken::GateOpensWithoutVeto);
    check_breaks(Takeover { broken, ..model(Start::Protected, 1) }, NO_STALE);
}

#[test]
fn the_checker_notices_a_veto_that_counts_when_it_is_merely_written() {
    let broken = Some(Broken::VetoCountsWhenWritten);
    check_breaks(Takeover { broken, ..model(Start::Protected, 1) }, NO_STALE);
}

#[test]
fn the_checker_notices_a_board_that_does_not_look_at_generations() {
    let broken = Some(Broken::BoardTakesAnyGeneration);
    check_breaks(Takeover { broken, zombies: true, ..model(Start::Protected, 2) }, NEWEST);
}

#[test]
fn the_checker_notices_a_takeover_without_a_generation_of_its_own() {
    let broken = Some(Broken::GenerationStays);
    check_breaks(Takeover { broken, zombies: true, ..model(Start::Protected, 1) }, OWN_GENERATION);
}

#[test]
fn the_checker_notices_an_acknowledgement_before_the_commit() {
    let broken = Some(Broken::AckBeforeCommit);
    check_breaks(Takeover { broken, ..model(Start::Protected, 1) }, NO_STALE);
}

#[test]
fn the_checker_notices_a_lost_node_that_counts_as_dead() {
    let broken = Some(Broken::LostCountsAsDead);
    check_breaks(Takeover { broken, ..model(Start::Protected, 1) }, ONE_RUNS);
}

#[test]
fn the_checker_notices_a_cold_boot_that_spares_the_images_of_a_past_life() {
    let broken = Some(Broken::ColdBootSparesImages);
    check_breaks(Takeover { broken, ..model(Start::Boot, 1) }, NO_STALE);
}

#[test]
fn the_checker_notices_a_lift_of_the_veto_that_overlaps_the_next_veto() {
    let broken = Some(Broken::HooksOverlap);
    check_breaks(Takeover { broken, ..model(Start::FirstCopy, 2) }, NO_STALE);
}

#[test]
fn the_checker_notices_a_late_lift_that_counts_for_the_next_stream() {
    let broken = Some(Broken::LateLiftCounts);
    check_breaks(Takeover { broken, ..model(Start::Protected, 1) }, PROMISE);
}

/// Whether the machine runs and its outputs leave: it is the newest, and protected or under a proven veto.
fn serves(w: &World) -> bool {
    w.hosts.iter().enumerate().any(|(n, h)| {
        let goes = |vm: Vm| vm.attached && vm.generation == w.board.generation && (vm.gate_open || w.protected(n));
        h.works() && h.vm.is_some_and(goes)
    })
}

/// Counts the states of `model` from which no repair leads back to a machine that serves, and tells the way to one of them.
fn dead_ends(model: &Takeover) -> (usize, String) {
    let number = |w: &World| {
        let mut hasher = DefaultHasher::new();
        w.hash(&mut hasher);
        hasher.finish()
    };
    // For each state: how it was found first, and all states from which a repair leads there.
    type Seen = (Option<(u64, Action)>, Vec<u64>);
    let first = model.first();
    let mut seen: HashMap<u64, Seen> = HashMap::from([(number(&first), (None, Vec::new()))]);
    let (mut open, mut order) = (VecDeque::from([first]), Vec::new());
    let mut good = VecDeque::new();
    let mut actions = Vec::new();
    while let Some(world) = open.pop_front() {
        let here = number(&world);
        order.push(here);
        if serves(&world) {
            good.push_back(here);
        }
        actions.clear();
        model.possible(&world, &mut actions);
        for (action, next) in actions.iter().filter_map(|a| Some((*a, model.after(&world, *a)?))) {
            let entry = seen.entry(number(&next)).or_insert_with(|| {
                open.push_back(next);
                (Some((here, action)), Vec::new())
            });
            // A fault is no way out.
            if next.faults == world.faults {
                entry.1.push(here);
            }
        }
    }
    let mut saved: HashSet<u64> = good.iter().copied().collect();
    while let Some(state) = good.pop_front() {
        good.extend(seen[&state].1.iter().copied().filter(|before| saved.insert(*before)));
    }
    assert!(seen.len() > 1000, "only {} states: the model does not move", seen.len());
    let mut way = Vec::new();
    let mut at = order.into_iter().find(|state| !saved.contains(state));
    while let Some((before, action)) = at.and_then(|state| seen[&state].0) {
        way.push(action);
        at = Some(before);
    }
    way.reverse();
    (seen.len() - saved.len(), format!("{way:?}"))
}

#[test]
fn from_every_state_some_way_leads_back_to_a_machine_that_serves() {
    let (count, way) = dead_ends(&model(Start::Boot, 1));
    assert_eq!(count, 0, "nothing helps after {way}");
}

#[test]
fn a_vetoed_image_that_keeps_others_from_booting_is_noticed_as_a_dead_end() {
    let broken = Some(Broken::VetoedImageBlocks);
    let (count, way) = dead_ends(&Takeover { broken, ..model(Start::FirstCopy, 1) });
    assert!(count > 0, "{way}");
}

#[test]
fn a_generation_that_the_configuration_has_lost_is_noticed_as_a_dead_end() {
    let broken = Some(Broken::LostGenerationEnds);
    let (count, way) = dead_ends(&Takeover { broken, ..model(Start::Boot, 1) });
    assert!(count > 0, "{way}");
}
