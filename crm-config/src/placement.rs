//! Where each machine is at home, and where it may go: the estate's rules, worked out beforehand and handed to Pacemaker as
//! scores.
//!
//! ```text
//!   home                            1000
//!   targets of the first tier        900, 899, 898 …     own or dedicated cluster, as the evacuation policy says
//!   targets of the second tier       500, 499, 498 …
//!   every other node                 forbidden
//! ```
//! Within a tier the order is (E-7, E-8): where there is room; the rack that then holds the fewest machines of the
//! business type; the node that is then least full of memory, then of virtual CPUs; the policy's order. Siblings of one
//! rack are sent to different racks, since what kills one of them may kill all.
//!
//! Why scores and not colocations with the rack: to keep a rule such as "never two of a type in one rack", Pacemaker stops
//! healthy machines; as a wish it is forgotten for the machine that the others depend on; and it needs a constraint for
//! every pair (see decision 0022). Scores cost one attribute for each machine and target, and stop nothing.
//!
//! A node without room for the machine, beside what is at home there and what comes with it, is no target. That holds for
//! the death of one node or one rack; when more die at once, Pacemaker may stop a healthy machine for want of memory, and
//! `plan` shows it.
//!
//! What must hold: the same policy always gives the same placement; time grows linearly with the machines; a protected
//! machine's standby is in another rack than its primary wherever a permitted node is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::estate::{Automation, Evacuation, Mode, Performance};
use crate::policy::{Machine, Node, Policy};

/// Score of a machine's home.
pub const HOME: i32 = 1000;
/// Score of the first target of each tier.
const TIERS: [i32; 2] = [900, 500];
/// Stickiness of placed machines: more than the distance between any two scores, so that nothing moves because a rule
/// changed or a node returned.
pub const STICKINESS: u32 = 5000;

/// Why a machine may be on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It runs there when there is a choice.
    Home,
    /// A target in its own cluster.
    Own,
    /// A target in the dedicated cluster.
    Dedicated,
    /// Named in the policy as standby.
    Named,
}

impl Place {
    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Own => "own cluster",
            Self::Dedicated => "dedicated cluster",
            Self::Named => "named as standby",
        }
    }
}

/// One node on which a machine may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The node, as an index into the policy's.
    pub node: usize,
    /// Why.
    pub place: Place,
    /// How much Pacemaker is told to want it there.
    pub score: i32,
}

/// Where one machine may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Home first, then as wanted. What Pacemaker is told.
    pub targets: Vec<Target>,
    /// Targets that wait for the operator or for the evacuation controller.
    pub held: Vec<Target>,
}

impl Placed {
    /// The home.
    pub fn home(&self) -> Option<usize> {
        self.targets.first().map(|t| t.node)
    }
}

impl Policy {
    /// Whether the policy says anything that needs machines to be placed by score. One that does not is compiled as ever.
    pub fn places(&self) -> bool {
        let node = |n: &Node| n.rack.is_some() || n.cluster.is_some() || n.high_performance.is_some();
        let machine = |m: &Machine| {
            m.business.is_some()
                || m.performance.is_some()
                || m.evacuation.is_some()
                || m.cluster.is_some()
                || m.high_performance.is_some()
                || m.automation.is_some()
                || m.mode() == Mode::None
        };
        self.cluster.automation.is_some()
            || self.evacuation.is_some()
            || self.nodes.iter().any(node)
            || self.machines.iter().any(machine)
    }

    /// Whether capacity is known for every node: only then is memory a limit (a node without it would have none).
    pub fn knows_capacity(&self) -> bool {
        !self.nodes.is_empty() && self.nodes.iter().all(|n| n.memory.is_some())
    }

    /// Who decides that `machine` is started elsewhere.
    pub fn automation(&self, machine: &Machine) -> Automation {
        let said = machine.automation.as_ref().or(self.cluster.automation.as_ref());
        said.map(|a| *a.get_ref()).unwrap_or_default()
    }

    /// The clusters of nodes that are not dedicated.
    pub fn ordinary_clusters(&self) -> BTreeSet<&str> {
        self.nodes.iter().filter(|n| !n.dedicated()).map(Node::cluster_name).collect()
    }

    /// A machine's own cluster; `None` if the policy leaves it open.
    pub fn own_cluster<'a>(&'a self, machine: &'a Machine) -> Option<&'a str> {
        self.own_cluster_among(machine, &self.ordinary_clusters())
    }

    fn own_cluster_among<'a>(&'a self, machine: &'a Machine, ordinary: &BTreeSet<&'a str>) -> Option<&'a str> {
        if let Some(cluster) = &machine.cluster {
            return Some(cluster.get_ref());
        }
        let primary = machine.primary.as_ref().and_then(|p| self.nodes.iter().find(|n| n.name == *p));
        match primary {
            Some(node) if !node.dedicated() => Some(node.cluster_name()),
            _ if ordinary.len() == 1 => ordinary.first().copied(),
            _ => None,
        }
    }
}

impl Node {
    /// Whether it belongs to a dedicated cluster.
    pub fn dedicated(&self) -> bool {
        self.high_performance.is_some()
    }

    /// Its cluster; empty if it has none.
    pub fn cluster_name(&self) -> &str {
        self.cluster.as_ref().map_or("", |c| c.get_ref())
    }
}

impl Machine {
    /// Where it may go.
    pub fn evacuation(&self) -> Evacuation {
        self.evacuation.as_ref().map(|e| *e.get_ref()).unwrap_or_default()
    }

    /// Whether its need lets it go to the dedicated cluster at all (E-6).
    pub fn high_performance_need(&self) -> bool {
        self.performance.as_ref().is_some_and(|p| *p.get_ref() == Performance::High)
    }
}

/// The estate, numbered.
pub(crate) struct Estate<'a> {
    pub(crate) policy: &'a Policy,
    /// Each node's rack. A node without one is a rack of its own.
    pub(crate) rack: Vec<usize>,
    racks: usize,
    /// Each machine's business type.
    pub(crate) kind: Vec<Option<usize>>,
    pub(crate) kinds: usize,
    ordinary: BTreeSet<&'a str>,
    /// Memory is a limit.
    limited: bool,
}

impl<'a> Estate<'a> {
    pub(crate) fn new(policy: &'a Policy) -> Self {
        let mut names = BTreeMap::new();
        let mut racks = 0;
        let mut number = || {
            racks += 1;
            racks - 1
        };
        let rack = policy.nodes.iter().map(|n| match &n.rack {
            Some(rack) => *names.entry(rack.get_ref().as_str()).or_insert_with(&mut number),
            None => number(),
        });
        let rack = rack.collect();
        let mut names = BTreeMap::new();
        let kind = policy.machines.iter().map(|m| {
            let business = m.business.as_ref()?;
            let next = names.len();
            Some(*names.entry(business.get_ref().as_str()).or_insert(next))
        });
        let kind = kind.collect();
        Self {
            policy,
            rack,
            racks,
            kind,
            kinds: names.len(),
            ordinary: policy.ordinary_clusters(),
            limited: policy.knows_capacity(),
        }
    }

    /// How many racks there are.
    pub(crate) fn racks(&self) -> usize {
        self.racks
    }

    /// Which nodes a machine may go to, by the evacuation policy alone: index and tier.
    pub(crate) fn permitted(&self, machine: &Machine) -> Vec<(usize, u8, Place)> {
        let own = self.policy.own_cluster_among(machine, &self.ordinary);
        let named = machine.primary.is_some() && machine.standby.is_some();
        let of = |(index, node): (usize, &Node)| {
            let name = node.name.get_ref();
            if named {
                let standby = machine.standby.as_ref()?.get_ref().names().iter().any(|s| s == name);
                return standby.then_some((index, 0, Place::Named));
            }
            if node.dedicated() {
                let wanted =
                    machine.high_performance.as_ref().is_none_or(|id| Some(id) == node.high_performance.as_ref());
                let tier = machine.evacuation().tier(true)?;
                return (wanted && machine.high_performance_need()).then_some((index, tier, Place::Dedicated));
            }
            let tier = machine.evacuation().tier(false)?;
            (own == Some(node.cluster_name())).then_some((index, tier, Place::Own))
        };
        self.policy.nodes.iter().enumerate().filter_map(of).collect()
    }

    /// Where it may be at home when the policy names no primary.
    fn homes(&self, machine: &Machine) -> Vec<usize> {
        let own = self.policy.own_cluster_among(machine, &self.ordinary);
        let nodes = || self.policy.nodes.iter().enumerate();
        let ordinary: Vec<usize> =
            nodes().filter(|(_, n)| !n.dedicated() && own == Some(n.cluster_name())).map(|(i, _)| i).collect();
        if ordinary.is_empty() { nodes().map(|(i, _)| i).collect() } else { ordinary }
    }
}

/// What is on a node, or would be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Load {
    memory: u64,
    vcpus: u64,
}

impl Load {
    fn add(&mut self, machine: &Machine) {
        self.memory = self.memory.saturating_add(machine.memory);
        self.vcpus += u64::from(*machine.vcpus.get_ref());
    }

    fn remove(&mut self, machine: &Machine) {
        self.memory = self.memory.saturating_sub(machine.memory);
        self.vcpus = self.vcpus.saturating_sub(u64::from(*machine.vcpus.get_ref()));
    }

    fn with(mut self, other: Self) -> Self {
        self.memory = self.memory.saturating_add(other.memory);
        self.vcpus += other.vcpus;
        self
    }
}

/// Room and load in one comparable value: no room last, then the share of memory, then of processors, in use.
pub(crate) fn fullness(node: &Node, load: Load, machine: &Machine) -> (bool, u64, u64) {
    let mut load = load;
    load.add(machine);
    let share = |used: u64, of: Option<u64>| used.saturating_mul(1_000_000) / of.unwrap_or(1 << 20).max(1);
    let full = node.memory.is_some_and(|memory| load.memory > memory);
    (full, share(load.memory, node.memory), share(load.vcpus, node.cpus.map(u64::from)))
}

/// Where every machine of the policy may be.
pub fn place(policy: &Policy) -> Vec<Placed> {
    let estate = Estate::new(policy);
    let mut order: Vec<usize> = (0..policy.machines.len()).collect();
    // The important and the large first, while there is room; after that as in the file.
    order.sort_by_key(|&m| {
        let machine = &policy.machines[m];
        (machine.primary.is_none(), Reverse(machine.priority()), Reverse(machine.memory), m)
    });
    let mut now = Homes::new(&estate);
    let homes = now.choose(&estate, &order);
    let standbys = now.choose_standbys(&estate, &order, &homes);
    Fallbacks::new(&estate).choose(&estate, &order, &homes, &standbys, &now)
}

impl Machine {
    /// As Pacemaker has it.
    pub fn priority(&self) -> i32 {
        self.priority.as_ref().map_or(0, |p| *p.get_ref())
    }
}

/// What is where while nothing has failed.
pub(crate) struct Homes {
    pub(crate) load: Vec<Load>,
    /// Priorities that occur, ascending.
    levels: Vec<i32>,
    /// Memory taken by machines of at least that priority: `level * nodes + node`.
    at_least: Vec<u64>,
    /// Machines of a type in a rack: `kind * racks + rack`.
    types: Vec<u32>,
}

impl Homes {
    pub(crate) fn new(estate: &Estate) -> Self {
        let nodes = estate.policy.nodes.len();
        let levels: BTreeSet<i32> = estate.policy.machines.iter().map(Machine::priority).collect();
        Self {
            load: vec![Load::default(); nodes],
            at_least: vec![0; levels.len() * nodes],
            levels: levels.into_iter().collect(),
            types: vec![0; estate.kinds * estate.racks],
        }
    }

    pub(crate) fn occupy(&mut self, estate: &Estate, m: usize, node: usize) {
        let machine = &estate.policy.machines[m];
        self.load[node].add(machine);
        let nodes = self.load.len();
        for (level, _) in self.levels.iter().enumerate().take_while(|(_, p)| **p <= machine.priority()) {
            let taken = &mut self.at_least[level * nodes + node];
            *taken = taken.saturating_add(machine.memory);
        }
    }

    /// It is gone again.
    pub(crate) fn vacate(&mut self, estate: &Estate, m: usize, node: usize) {
        let machine = &estate.policy.machines[m];
        self.load[node].remove(machine);
        let nodes = self.load.len();
        for (level, _) in self.levels.iter().enumerate().take_while(|(_, p)| **p <= machine.priority()) {
            let taken = &mut self.at_least[level * nodes + node];
            *taken = taken.saturating_sub(machine.memory);
        }
    }

    /// Whether the machine fits beside what it must not displace: machines of its priority and above, and what comes.
    pub(crate) fn has_room(&self, estate: &Estate, machine: &Machine, node: usize, coming: Load) -> bool {
        let Some(memory) = estate.policy.nodes[node].memory.filter(|_| estate.limited) else { return true };
        let level = self.levels.binary_search(&machine.priority()).unwrap_or(0);
        let taken = self.at_least[level * self.load.len() + node];
        taken.saturating_add(coming.memory).saturating_add(machine.memory) <= memory
    }

    fn of_type(&self, estate: &Estate, kind: Option<usize>, rack: usize) -> u32 {
        kind.map_or(0, |kind| self.types[kind * estate.racks + rack])
    }

    fn settle(&mut self, estate: &Estate, m: usize, node: usize) {
        self.occupy(estate, m, node);
        if let Some(kind) = estate.kind[m] {
            self.types[kind * estate.racks + estate.rack[node]] += 1;
        }
    }

    fn choose(&mut self, estate: &Estate, order: &[usize]) -> Vec<Option<usize>> {
        let policy = estate.policy;
        let mut homes = vec![None; policy.machines.len()];
        let by_name: HashMap<&str, usize> =
            policy.nodes.iter().enumerate().map(|(i, n)| (n.name.get_ref().as_str(), i)).collect();
        for &m in order {
            let machine = &policy.machines[m];
            let home = match &machine.primary {
                Some(primary) => by_name.get(primary.get_ref().as_str()).copied(),
                None => estate.homes(machine).into_iter().min_by_key(|&n| {
                    let (full, memory, cpus) = fullness(&policy.nodes[n], self.load[n], machine);
                    (full, self.of_type(estate, estate.kind[m], estate.rack[n]), memory, cpus, n)
                }),
            };
            if let Some(home) = home {
                self.settle(estate, m, home);
            }
            homes[m] = home;
        }
        homes
    }

    /// Protected machines have a second place, which takes memory as well: in the best tier, in another rack.
    fn choose_standbys(&mut self, estate: &Estate, order: &[usize], homes: &[Option<usize>]) -> Vec<Option<usize>> {
        let policy = estate.policy;
        let mut standbys = vec![None; policy.machines.len()];
        for &m in order.iter().filter(|&&m| policy.machines[m].protected()) {
            let (machine, Some(home)) = (&policy.machines[m], homes[m]) else { continue };
            let standby =
                estate.permitted(machine).into_iter().filter(|&(n, ..)| n != home).min_by_key(|&(n, tier, _)| {
                    let (full, memory, cpus) = fullness(&policy.nodes[n], self.load[n], machine);
                    let rack = estate.rack[n];
                    let same = rack == estate.rack[home];
                    (same, tier, full, self.of_type(estate, estate.kind[m], rack), memory, cpus, n)
                });
            if let Some((node, ..)) = standby {
                self.occupy(estate, m, node);
                standbys[m] = Some(node);
            }
        }
        standbys
    }
}

/// What comes where when homes fail.
struct Fallbacks {
    /// Load that comes to a node when another dies, by the dead one.
    from_node: HashMap<usize, Vec<Load>>,
    /// Load that comes to a node when a rack dies, by the dead rack.
    from_rack: HashMap<usize, Vec<Load>>,
    /// Machines of a type (second) that leave a rack (first) and have this as their n-th target outside it (third), by
    /// target rack.
    escapes: HashMap<(usize, usize, usize), Vec<u32>>,
}

/// One machine's choice under way.
struct Choice {
    machine: usize,
    home: usize,
    left: Vec<(usize, u8, Place)>,
    targets: Vec<Target>,
    taken: [usize; 2],
    outside: usize,
}

impl Fallbacks {
    fn new(_: &Estate) -> Self {
        Self { from_node: HashMap::new(), from_rack: HashMap::new(), escapes: HashMap::new() }
    }

    fn choose(
        mut self,
        estate: &Estate,
        order: &[usize],
        homes: &[Option<usize>],
        standbys: &[Option<usize>],
        now: &Homes,
    ) -> Vec<Placed> {
        let policy = estate.policy;
        let limit = *policy.cluster.candidates.get_ref();
        let mut choices: Vec<Choice> = Vec::with_capacity(order.len());
        for &m in order {
            let Some(home) = homes[m] else { continue };
            let machine = &policy.machines[m];
            let mut left = if machine.mode() == Mode::None { Vec::new() } else { estate.permitted(machine) };
            left.retain(|&(n, ..)| n != home);
            let targets = vec![Target { node: home, place: Place::Home, score: HOME }];
            let mut choice = Choice { machine: m, home, left, targets, taken: [0; 2], outside: 0 };
            if let Some(standby) = standbys[m]
                && let Some(at) = choice.left.iter().position(|&(n, ..)| n == standby)
            {
                // The standby is the first target, whatever its tier: it holds the image.
                self.take(estate, &mut choice, at, true);
            }
            choices.push(choice);
        }
        // One target each, then a second each: nobody's third is chosen before everybody has had a second.
        for _ in 0..limit * 2 {
            let mut any = false;
            for choice in &mut choices {
                choice.left.retain(|&(_, tier, _)| choice.taken[usize::from(tier)] < limit);
                if let Some(at) = self.best(estate, choice, now) {
                    self.take(estate, choice, at, false);
                    any = true;
                }
            }
            if !any {
                break;
            }
        }
        let mut placed = vec![Placed { targets: Vec::new(), held: Vec::new() }; policy.machines.len()];
        for mut choice in choices {
            let machine = &policy.machines[choice.machine];
            let held = if policy.held(machine) { choice.targets.split_off(1) } else { Vec::new() };
            placed[choice.machine] = Placed { targets: choice.targets, held };
        }
        placed
    }

    fn best(&self, estate: &Estate, choice: &Choice, now: &Homes) -> Option<usize> {
        if choice.left.is_empty() {
            return None;
        }
        let machine = &estate.policy.machines[choice.machine];
        let kind = estate.kind[choice.machine];
        let home_rack = estate.rack[choice.home];
        let from_node = self.from_node.get(&choice.home);
        let from_rack = self.from_rack.get(&home_rack);
        let escapes = kind.and_then(|kind| self.escapes.get(&(home_rack, kind, choice.outside)));
        // A target without room would still be taken: Pacemaker places the machines of a dead host before healthy ones of
        // the same priority, and would stop those (tried with 3.0.0). So it is none.
        let key = |&(n, tier, _): &(usize, u8, Place)| {
            let rack = estate.rack[n];
            let coming = |loads: Option<&Vec<Load>>| loads.map_or(Load::default(), |l| l[n]);
            let there = now.of_type(estate, kind, rack);
            let (coming, spread) = if rack == home_rack {
                // It stays in its rack: one more there is none more.
                (coming(from_node), there.saturating_sub(u32::from(kind.is_some())))
            } else {
                (coming(from_rack), there + escapes.map_or(0, |e| e[rack]))
            };
            let (full, memory, cpus) = fullness(&estate.policy.nodes[n], now.load[n].with(coming), machine);
            now.has_room(estate, machine, n, coming).then_some((tier, full, spread, memory, cpus, n))
        };
        let possible = choice.left.iter().enumerate().filter_map(|(at, candidate)| Some((key(candidate)?, at)));
        possible.min().map(|(_, at)| at)
    }

    fn take(&mut self, estate: &Estate, choice: &mut Choice, at: usize, standby: bool) {
        let (node, tier, place) = choice.left.swap_remove(at);
        let machine = &estate.policy.machines[choice.machine];
        let tier = usize::from(tier);
        let score = if standby { HOME - 1 } else { TIERS[tier] - i32::try_from(choice.taken[tier]).unwrap_or(0) };
        choice.targets.push(Target { node, place, score });
        choice.taken[tier] += 1;
        let none = || vec![Load::default(); estate.policy.nodes.len()];
        let (rack, home_rack) = (estate.rack[node], estate.rack[choice.home]);
        if rack == home_rack {
            self.from_node.entry(choice.home).or_insert_with(none)[node].add(machine);
        } else {
            // Only the first counts as load: it goes there, not everywhere.
            if choice.outside == 0 {
                self.from_rack.entry(home_rack).or_insert_with(none)[node].add(machine);
            }
            if let Some(kind) = estate.kind[choice.machine] {
                let row = self.escapes.entry((home_rack, kind, choice.outside));
                row.or_insert_with(|| vec![0; estate.racks])[rack] += 1;
            }
            choice.outside += 1;
        }
    }
}
