//! Thousands of clusters, each with its own misfortunes, and what must hold in all of them.
//!
//! `UNDERSTUDY_SIMULATIONS=N` tries N clusters, `UNDERSTUDY_SEED=S` only that one, with its journal.

mod estates;
mod spread;
mod world;

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use understudy_crm::estate::{Automation, Mode, Unanswered};
use understudy_crm::policy::Policy;
use understudy_crm::records::{ARRIVES, EVACUATED, Kind, Order, Plan, Progress, Records, What};
use understudy_evacuation::core::decide;
use understudy_evacuation::core::model::{ApprovalState, Finding, Host, Round, Snapshot};
use understudy_monitor::matrix::Verdict;
use world::{Violation, World};

/// Everything around the controller: who was told, who has agreed.
#[derive(Default)]
struct Around {
    /// Keys of alarms that somebody has got.
    told: BTreeSet<String>,
    /// Machines that may be released, by plan: ordered by an operator.
    ordered: BTreeSet<(String, String)>,
    /// Plans that were approved, or that nobody answered where that means yes.
    agreed: BTreeSet<String>,
    /// Hosts that an operator wanted emptied.
    emptied: BTreeSet<String>,
    orders: u64,
    /// For the report.
    counts: BTreeMap<&'static str, u64>,
}

impl Around {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

/// One round of a controller that may be killed between any two of its steps.
fn controller(world: &mut World, around: &mut Around, calm: bool) -> Result<(), Violation> {
    let snapshot = world.snapshot();
    let version = world.version;
    let round = decide(&world.policy, &snapshot);
    heard(&world.policy, &snapshot, &round)?;
    let killed_after = if calm { 9 } else { world.rng.u8(0..12) };
    if killed_after == 0 {
        return Ok(());
    }
    around.told.extend(round.alarms.iter().map(|a| a.key.clone()));
    if killed_after == 1 {
        return Ok(());
    }
    // The world does not wait.
    if !calm && world.rng.u8(0..4) == 0 {
        world.disturb();
    }
    if world.version != version {
        around.count("stale");
        return Ok(());
    }
    commit(world, around, &snapshot, &round)?;
    if killed_after == 2 {
        return Ok(());
    }
    for id in round.ask {
        around.count("asked");
        let expires = world.now + world.rng.u64(5..90);
        world.approvals.entry(id).or_insert(ApprovalState::Waiting { expires });
        world.version += 1;
    }
    Ok(())
}

/// What the monitors say and has lasted is an alarm, one and the same; what they do not say any more is none.
fn heard(policy: &Policy, snapshot: &Snapshot, round: &Round) -> Result<(), Violation> {
    let up: BTreeSet<&str> = round.records.state.alarms.keys().filter_map(|key| key.strip_prefix("finding:")).collect();
    let Some(findings) = &snapshot.findings else {
        let before: BTreeSet<&str> =
            snapshot.records.state.alarms.keys().filter_map(|key| key.strip_prefix("finding:")).collect();
        return if up == before { Ok(()) } else { Err(format!("nobody can tell, and {before:?} became {up:?}")) };
    };
    let tells = |f: &&Finding| !matches!(f.verdict, Verdict::Nothing | Verdict::FenceAndEvacuate | Verdict::Evacuate);
    for f in findings.iter().filter(tells).filter(|f| f.lasts >= policy.rules().settle.0) {
        let node = policy.nodes[f.node].name.get_ref();
        let machine = f.machine.map(|m| format!("{node}/{}", policy.machines[m].name.get_ref()));
        let told = [machine, Some(node.clone()), Some(format!("row:{}", f.row))];
        if !told.iter().flatten().any(|key| up.contains(key.as_str())) {
            return Err(format!("nobody is told of {f:?}, only of {up:?}"));
        }
    }
    let over = |key: &&&str| {
        !findings.iter().filter(tells).any(|f| {
            let node = policy.nodes[f.node].name.get_ref();
            let machine = f.machine.map(|m| format!("{node}/{}", policy.machines[m].name.get_ref()));
            machine.as_deref().unwrap_or(node) == **key || key.strip_prefix("row:") == Some(&f.row)
        })
    };
    up.iter().find(over).map_or(Ok(()), |key| Err(format!("{key} is over and still an alarm")))
}

/// The change is made; here everything is looked at.
fn commit(world: &mut World, around: &mut Around, snapshot: &Snapshot, round: &Round) -> Result<(), Violation> {
    if round.records == world.records && round.scores.is_empty() {
        return Ok(());
    }
    numbered(&world.records, &round.records)?;
    for (m, scores) in &round.scores {
        let m = *m;
        let name = world.policy.machines[m].name.get_ref().clone();
        if let &[(from, here), (to, ARRIVES)] = scores.as_slice() {
            leaves(world, around, snapshot, round, m, (from, here, to))?;
            continue;
        }
        if let &[(node, _)] = scores.as_slice()
            && world.wishes[m].values().any(|score| *score == ARRIVES)
        {
            around.count(if world.wishes[m].get(&node) == Some(&ARRIVES) { "arrived" } else { "given up" });
            let lives = |n: &usize| world.hosts[*n].alive;
            if world.copies[m].iter().any(|n| *n != node && lives(n)) || !world.wishes[m].contains_key(&node) {
                return Err(format!("{name} is to be on {node} alone and is on {:?}", world.copies[m]));
            }
            continue;
        }
        let &[(to, EVACUATED)] = scores.as_slice() else { return Err(format!("{name} gets the scores {scores:?}")) };
        around.count("released");
        let alive: Vec<usize> = world.copies[m].iter().copied().filter(|n| world.hosts[*n].alive).collect();
        let unsure = world.copies[m].iter().any(|n| world.hosts[*n].seen != Host::Down);
        if !alive.is_empty() || unsure || world.starting.iter().any(|s| s.0 == m) {
            return Err(format!("{name} is released to {to} while it is, or may be, on {:?}", world.copies[m]));
        }
        if !world.quorum || world.maintenance || world.hosts[to].seen != Host::Up {
            return Err(format!("{name} is released to {to}, which must not be"));
        }
        let of_it = |p: &&understudy_crm::records::Plan| {
            let released = |m: &understudy_crm::records::Move| matches!(m.progress, Progress::Released { .. });
            p.moves.iter().any(|m| m.machine == name && released(m))
        };
        let plan = round.records.plans.iter().find(of_it).ok_or(format!("{name} is released by no plan"))?;
        if !world.records.plans.iter().any(|p| p.id == plan.id) {
            return Err(format!("{name} is released before its plan {} is in the cluster", plan.id));
        }
        let ordered = around.ordered.contains(&(plan.id.clone(), name.clone()));
        let agreed = match world.policy.automation(&world.policy.machines[m]) {
            Automation::Manual => ordered,
            Automation::Semi => ordered || around.agreed.contains(&plan.id),
            Automation::Automatic => true,
        };
        let from = plan.moves.iter().find(|m| m.machine == name).map(|m| m.from.as_str()).unwrap_or_default();
        let frozen = snapshot.findings.iter().flatten().any(|f| {
            let it = f.machine.is_none_or(|x| x == m) && world.policy.nodes[f.node].name.get_ref() == from;
            it && f.verdict == Verdict::Freeze
        });
        if frozen && world.policy.automation(&world.policy.machines[m]) == Automation::Automatic {
            around.count("released though frozen");
            if !ordered {
                return Err(format!("{name} of {from} is released, and the monitors say freeze"));
            }
        }
        if !agreed {
            return Err(format!("{name} is released and nobody has agreed to {}", plan.id));
        }
    }
    spread::check(&world.policy, snapshot, round)?;
    for (m, scores) in &round.scores {
        world.wishes[*m] = scores.iter().copied().collect();
    }
    for plan in round.records.plans.iter().filter(|p| world.records.plans.iter().all(|old| old.id != p.id)) {
        if plan.kind == Kind::Drain {
            around.count("drains");
            continue;
        }
        around.count(match plan.automation {
            Automation::Manual => "manual plans",
            Automation::Semi => "semi plans",
            Automation::Automatic => "automatic plans",
        });
    }
    world.records = round.records.clone();
    world.version += 1;
    Ok(())
}

/// A machine is moved while it runs.
fn leaves(
    world: &World,
    around: &mut Around,
    snapshot: &Snapshot,
    round: &Round,
    m: usize,
    (from, here, to): (usize, i32, usize),
) -> Result<(), Violation> {
    let machine = &world.policy.machines[m];
    let (name, node) = (machine.name.get_ref(), world.policy.nodes[from].name.get_ref());
    around.count("moved");
    let there = world.copies[m].iter().eq([&from]) && world.hosts[from].seen == Host::Up && world.hosts[from].alive;
    let alone = !world.migrating.iter().any(|s| s.0 == m) && !world.starting.iter().any(|s| s.0 == m);
    if !there || !alone || !machine.migrates() || world.blocked[m] {
        return Err(format!("{name} is moved from {from} while it is on {:?}, or cannot be", world.copies[m]));
    }
    if !world.quorum || world.maintenance || world.hosts[to].seen != Host::Up {
        return Err(format!("{name} is moved to {to}, which must not be"));
    }
    if world.wishes[m] != [(from, here)].into() {
        return Err(format!("{name} has the scores {:?}, and then {here} on {from}", world.wishes[m]));
    }
    let its = |p: &&Plan| {
        let released = |m: &understudy_crm::records::Move| matches!(m.progress, Progress::Released { .. });
        p.kind == Kind::Drain && p.moves.iter().any(|m| m.machine == *name && released(m))
    };
    let plan = round.records.plans.iter().find(its).ok_or(format!("{name} is moved by no plan"))?;
    if !world.records.plans.iter().any(|p| p.id == plan.id) {
        return Err(format!("{name} is moved before its plan {} is in the cluster", plan.id));
    }
    let by_person = around.ordered.contains(&(plan.id.clone(), name.clone()))
        || around.emptied.contains(node) && plan.decided.is_some();
    let mut findings = snapshot.findings.iter().flatten();
    let told = findings.any(|f| (f.node, f.machine, f.verdict) == (from, Some(m), Verdict::Move));
    let agreed = match world.policy.automation(machine) {
        Automation::Manual => by_person,
        Automation::Semi => by_person || around.agreed.contains(&plan.id),
        Automation::Automatic => by_person || told,
    };
    if agreed { Ok(()) } else { Err(format!("{name} is moved by {} and nobody wanted it", plan.id)) }
}

/// Events are numbered without gaps, and what was said stays said.
fn numbered(before: &Records, after: &Records) -> Result<(), Violation> {
    let numbers: Vec<u64> = after.state.events.iter().map(|e| e.number).collect();
    let in_order = numbers.windows(2).all(|w| w[1] == w[0] + 1);
    let last = numbers.last().copied().unwrap_or(0);
    if !in_order || last != after.state.last_event || after.state.last_event < before.state.last_event {
        return Err(format!("events are numbered {numbers:?}, the last is {}", after.state.last_event));
    }
    Ok(())
}

/// Somebody at a keyboard, and somebody with a telephone.
fn people(world: &mut World, around: &mut Around) {
    let now = world.now;
    let yes = world.policy.approval.unwrap_or_default().unanswered == Unanswered::Approve;
    for (id, state) in &mut world.approvals {
        let ApprovalState::Waiting { expires } = state else { continue };
        if now >= *expires {
            *state = ApprovalState::Expired;
            around.counts.entry("expired").and_modify(|c| *c += 1).or_insert(1);
            if yes {
                around.agreed.insert(id.clone());
            }
        } else if world.rng.u8(0..60) == 0 {
            *state = ApprovalState::Refused { by: "somebody".into() };
            around.counts.entry("refused").and_modify(|c| *c += 1).or_insert(1);
        } else if world.rng.u8(0..40) == 0 {
            *state = ApprovalState::Approved { by: "somebody".into() };
            around.agreed.insert(id.clone());
        } else {
            continue;
        }
        world.version += 1;
    }
    if world.rng.u8(0..30) > 0 {
        return;
    }
    if world.rng.u8(0..4) == 0 {
        let n = world.rng.usize(0..world.hosts.len());
        let node = world.policy.nodes[n].name.get_ref().clone();
        around.emptied.insert(node.clone());
        around.orders += 1;
        let order = Order { plan: node, what: What::Drain, machines: Vec::new(), by: "operator".into() };
        world.records.orders.insert(around.orders.to_string(), order);
        world.blocked[world.rng.usize(0..world.copies.len())] = false;
        world.version += 1;
        return;
    }
    let open: Vec<_> = world.records.plans.iter().filter(|p| p.closed.is_none()).cloned().collect();
    let Some(plan) = world.rng.choice(&open) else { return };
    let what = if world.rng.u8(0..4) == 0 { What::Cancel } else { What::Release };
    let mut machines = Vec::new();
    if world.rng.bool() {
        machines.extend(world.rng.choice(&plan.moves).map(|m| m.machine.clone()));
    }
    if what == What::Release {
        let meant = plan.moves.iter().filter(|m| machines.is_empty() || machines.contains(&m.machine));
        around.ordered.extend(meant.map(|m| (plan.id.clone(), m.machine.clone())));
    }
    around.orders += 1;
    let order = Order { plan: plan.id.clone(), what, machines, by: "operator".into() };
    world.records.orders.insert(around.orders.to_string(), order);
    world.version += 1;
    around.count("orders");
}

fn simulate(seed: u64) -> Result<Around, (Violation, Box<World>)> {
    let mut rng = Rng::with_seed(seed);
    let policy = estates::random(&mut rng);
    let mut world = Box::new(World::new(policy, rng));
    let mut around = Around::default();
    match life(&mut world, &mut around) {
        Ok(()) => Ok(around),
        Err(violation) => Err((violation, world)),
    }
}

fn life(world: &mut World, around: &mut Around) -> Result<(), Violation> {
    let misfortunes = world.rng.u64(40..200);
    for _ in 0..misfortunes {
        if world.rng.u8(0..12) == 0 {
            world.disturb();
        }
        people(world, around);
        // A controller that was killed is away for a while.
        if world.rng.u8(0..3) > 0 {
            controller(world, around, false)?;
        }
        world.tick()?;
    }
    // Nothing new happens; what is under way comes to its end.
    world.calm();
    for second in 0..900 {
        // It need not look every second to come to an end.
        if second % 4 == 0 {
            controller(world, around, true)?;
        }
        world.tick()?;
        let now = world.now;
        let yes = world.policy.approval.unwrap_or_default().unanswered == Unanswered::Approve;
        for (id, state) in &mut world.approvals {
            if matches!(state, ApprovalState::Waiting { expires } if now >= *expires) {
                *state = ApprovalState::Expired;
                world.version += 1;
                if yes {
                    around.agreed.insert(id.clone());
                }
            }
        }
    }
    at_the_end(world, around)
}

/// Every machine runs, or is in a plan that somebody knows of, or somebody was told of it.
fn at_the_end(world: &World, around: &mut Around) -> Result<(), Violation> {
    for (m, now) in world.snapshot().machines.iter().enumerate() {
        let name = world.policy.machines[m].name.get_ref();
        if now.wishes.iter().any(|(_, score)| *score == ARRIVES) {
            return Err(format!("{name} is still on its way: {now:?}"));
        }
        if now.runs.is_some() {
            continue;
        }
        let mut plans = world.records.plans.iter().filter(|p| p.closed.is_none());
        let plan = plans.find(|p| p.moves.iter().any(|m| m.machine == *name && !m.progress.over()));
        if let Some(plan) = plan {
            let unfenced = world.records.state.alarms.get(&format!("machine:{name}"));
            if unfenced.is_some_and(|text| text.contains("whose death nobody has confirmed")) {
                around.count("wait for a fence");
                continue;
            }
            if plan.automation == Automation::Automatic && plan.held.is_none() {
                return Err(format!("{name} waits in the automatic plan {} and nothing holds that", plan.id));
            }
            if !around.told.contains(&format!("plan:{}", plan.id)) {
                return Err(format!("{name} waits in plan {} and nobody was told", plan.id));
            }
            around.count("wait for somebody");
            continue;
        }
        let key = format!("machine:{name}");
        if !around.told.contains(&key) || !world.records.state.alarms.contains_key(&key) {
            return Err(format!("{name} ({:?}) has no host and nobody was told", world.mode(m)));
        }
        around.count(if world.mode(m) == Mode::None { "wait for their host" } else { "alarmed" });
    }
    Ok(())
}

fn journal(world: &World) -> String {
    let mut out: Vec<String> = world.records.state.events.iter().map(ToString::to_string).collect();
    out.extend(world.records.plans.iter().map(|p| format!("{p:?}")));
    out.push(format!("{:?}", world.hosts));
    out.join("\n")
}

#[test]
fn whatever_happens_what_must_hold_holds() {
    let seed = std::env::var("UNDERSTUDY_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let count = std::env::var("UNDERSTUDY_SIMULATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let seeds = seed.map_or(0..count, |seed| seed..seed + 1);
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    let began = std::time::Instant::now();
    for seed in seeds.clone() {
        match simulate(seed) {
            Ok(around) => around.counts.into_iter().for_each(|(what, n)| *counts.entry(what).or_default() += n),
            Err((violation, world)) => panic!("seed {seed}: {violation}\n{}", journal(&world)),
        }
    }
    println!("{} clusters in {:?}: {counts:?}", seeds.end - seeds.start, began.elapsed());
    // A simulation in which nothing happens proves nothing.
    for what in [
        "released",
        "manual plans",
        "semi plans",
        "automatic plans",
        "asked",
        "refused",
        "expired",
        "stale",
        "orders",
        "drains",
        "moved",
        "arrived",
        "given up",
    ] {
        assert!(seed.is_some() || counts.get(what).copied().unwrap_or(0) > count / 40, "{what}: {counts:?}");
    }
}

#[test]
fn a_load_that_wavers_within_its_step_changes_nothing_that_is_kept() {
    let mut rng = Rng::with_seed(3);
    let mut world = World::new(estates::random(&mut rng), rng);
    world.load[0] = Some(50);
    world.records = decide(&world.policy, &world.snapshot()).records;
    for load in [45, 55, 59, 41] {
        world.load[0] = Some(load);
        assert_eq!(decide(&world.policy, &world.snapshot()).records, world.records, "{load}");
    }
    world.load[0] = Some(75);
    assert_ne!(decide(&world.policy, &world.snapshot()).records, world.records);
}
