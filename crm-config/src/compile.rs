//! Policy → configuration: which resources and constraints make a machine highly available.
//!
//! A protected machine NAME:
//! ```text
//!   vm-NAME-clone     ocf:understudy:vmm         Promoted = runs,  Unpromoted = prepared standby
//!   repl-NAME-clone   ocf:understudy:replicator  Promoted = sends, Unpromoted = receives
//!
//!   order        start vm → start repl            (and so stop repl → stop vm)
//!                promote vm → promote repl        one way
//!                demote vm → demote repl          one way: the last checkpoint needs the sender
//!   colocation   repl with vm, Promoted repl with Promoted vm
//!   location     only on the machine's nodes, never on boards; Promoted elsewhere than on the primary: -1
//! ```
//! What must hold, and by what:
//! * *The replicator never takes the machine with it.* It is the dependent in both colocations and `critical=false`, so
//!   its failures have no say in where the machine runs; a stop of it that fails is `on-fail=block`, not fencing.
//! * *A crashed VMM means takeover, not a restart in place* (its memory is gone): `migration-threshold=1`. With
//!   `failure-timeout` the node is a standby again soon after.
//! * *No fail-back by itself.* The running node's score is only 1 above an up-to-date standby's (agents), and the
//!   preference is 1: a draw, which the node that runs the machine wins.
//! * *A node without a promotion score is never promoted.* A positive score for the role Promoted would make such a node
//!   promotable (tried with Pacemaker 3.0.0); so the primary is preferred by a negative score for all others.
//! * *The loss of a board stops no machine*: serial lines have no constraint with machines at all.

use crate::model::{
    Agent, Configuration, Constraint, Discovery, FencingLevel, NodeSettings, Operation, Pair, Primitive, Resource,
    Role, Score, Test,
};
use crate::placement::{self, HOME, Placed, STICKINESS, Target};
use crate::policy::{Board, Fencing, LoadSharing, Machine, Mode, Monitoring, Node, Policy, Spanned};

/// Score of every other node than the primary for the role Promoted. Must not exceed the distance between the agents'
/// scores for "runs here" and "up to date", or machines would move back by themselves; must not be positive, see above.
const NOT_PRIMARY_SCORE: i32 = -1;
/// Preference for the primary of a machine without standby; far below any sensible stickiness.
const HOME_SCORE: i32 = 10;
/// What the names of our node attributes begin with.
pub const WISH: &str = "understudy-evac-";
/// See [`promotion_attribute`].
pub const PROMOTION: &str = "understudy-promote-";
/// A node's rack.
pub const RACK: &str = "understudy-rack";
/// A node's cluster.
pub const CLUSTER: &str = "understudy-cluster";
/// A node's dedicated cluster.
pub const HIGH_PERFORMANCE: &str = "understudy-high-performance";
/// Memory in MiB, of nodes and machines. A name of our own: what others count as `memory` may be something else.
pub const MEMORY: &str = "understudy-memory";

impl Policy {
    /// Whether any machine is moved while it runs: then every node receives.
    fn migrates(&self) -> bool {
        self.machines.iter().any(Machine::migrates)
    }

    /// Where every node receives migrations: one list for the listener and for all machines.
    fn migration_peers(&self) -> String {
        let of = |n: &Node| {
            n.replication_address()?;
            Some(format!("{}={}", n.name.get_ref(), endpoints(n, self.cluster.migration_port)))
        };
        self.nodes.iter().filter_map(of).collect::<Vec<_>>().join(" ")
    }

    /// Whether machines are paused for others where processors are short.
    pub fn pauses(&self) -> bool {
        self.cluster.load_sharing.as_ref().is_some_and(|sharing| *sharing.get_ref() == LoadSharing::Pause)
    }

    /// What nodes have for machines, as the vmm agent's parameter has it. A node without `cpus` has as many as it has.
    fn host_room(&self) -> String {
        let of = |n: &Node| {
            let memory = n.memory.map(|memory| format!("/{memory}")).unwrap_or_default();
            n.cpus.map(|cpus| format!("{}={cpus}{memory}", n.name.get_ref()))
        };
        self.nodes.iter().filter_map(of).collect::<Vec<_>>().join(" ")
    }

    /// The nodes that may hold `machine`, in the policy's order.
    pub fn candidates<'a>(&'a self, machine: &'a Machine) -> impl Iterator<Item = &'a Node> {
        self.nodes.iter().filter(move |node| machine.may_be_on(node.name.get_ref()))
    }
}

impl Machine {
    /// Whether it is moved while it runs.
    pub fn migrates(&self) -> bool {
        self.mode() == Mode::Restart && self.migrate.as_ref().is_some_and(|migrate| *migrate.get_ref())
    }

    fn may_be_on(&self, node: &str) -> bool {
        match (&self.primary, &self.standby) {
            (Some(primary), Some(standby)) => {
                primary.get_ref() == node || standby.get_ref().names().iter().any(|s| s == node)
            }
            _ => true,
        }
    }

    /// Id of the vmm's primitive.
    pub fn vm_id(&self) -> String {
        format!("vm-{}", self.name.get_ref())
    }
    /// Id of the replicator's primitive.
    pub fn replicator_id(&self) -> String {
        format!("repl-{}", self.name.get_ref())
    }
}

/// Which TCP port serves what: as the policy says, else the next free one in the policy's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    replication: Vec<u16>,
    serial: Vec<Vec<u16>>,
}

impl Ports {
    /// Assign ports for the whole policy.
    pub fn assign(policy: &Policy) -> Self {
        let machines = &policy.machines;
        let mut next = Counter::new(
            policy.cluster.replication_port,
            machines.iter().filter_map(|m| m.port.as_ref()).map(|p| *p.get_ref()).collect(),
        );
        let replication =
            machines.iter().map(|m| m.port.as_ref().map_or_else(|| next.take(), |p| *p.get_ref())).collect();
        let lines = || machines.iter().flat_map(|m| &m.serial);
        let mut next = Counter::new(
            policy.cluster.serial_port,
            lines().filter_map(|l| l.port.as_ref()).map(|p| *p.get_ref()).collect(),
        );
        let serial = machines
            .iter()
            .map(|m| m.serial.iter().map(|l| l.port.as_ref().map_or_else(|| next.take(), |p| *p.get_ref())).collect())
            .collect();
        Self { replication, serial }
    }

    /// Replication port of the policy's `machine`-th machine.
    pub fn replication(&self, machine: usize) -> u16 {
        self.replication.get(machine).copied().unwrap_or_default()
    }

    /// Port of its `line`-th serial line.
    pub fn serial(&self, machine: usize, line: usize) -> u16 {
        self.serial.get(machine).and_then(|m| m.get(line)).copied().unwrap_or_default()
    }
}

struct Counter {
    next: u16,
    taken: Vec<u16>,
}

impl Counter {
    fn new(first: u16, taken: Vec<u16>) -> Self {
        Self { next: first, taken }
    }
    fn take(&mut self) -> u16 {
        while self.taken.contains(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let port = self.next;
        self.next = self.next.wrapping_add(1);
        port
    }
}

/// The whole configuration of a policy that passed [`crate::check`].
pub fn compile(policy: &Policy) -> Configuration {
    let mut configuration = Configuration {
        properties: vec![
            pair("stonith-enabled", "true"),
            pair("no-quorum-policy", policy.cluster.no_quorum.as_str()),
            // A node on which one start failed is tried again after the failure timeout.
            pair("start-failure-is-fatal", "false"),
        ],
        defaults: vec![pair("resource-stickiness", policy.cluster.stickiness)],
        alerts: crate::alerts::compile(policy),
        ..Configuration::default()
    };
    for device in &policy.fencing {
        fencing_device(&mut configuration, device);
    }
    fencing_levels(&mut configuration, policy);
    for board in &policy.boards {
        configuration.resources.push(board_connection(board));
    }
    crate::controller::resource(&mut configuration, policy);
    let ports = Ports::assign(policy);
    let placed = if policy.places() { placement::place(policy) } else { Vec::new() };
    if policy.migrates() {
        listener(&mut configuration, policy);
    }
    if let Some(monitoring) = &policy.monitoring {
        monitors(&mut configuration, policy, *monitoring.get_ref());
    }
    for (index, machine) in policy.machines.iter().enumerate() {
        serial_lines(&mut configuration, policy, machine, index, &ports);
        let placed = placed.get(index);
        match machine.mode() {
            Mode::Protected => protected(&mut configuration, policy, machine, index, &ports, placed),
            Mode::Restart | Mode::None => unprotected(&mut configuration, policy, machine, index, &ports, placed),
        }
    }
    if policy.places() {
        if policy.knows_capacity() {
            configuration.properties.push(pair("placement-strategy", "utilization"));
        }
        configuration.nodes = node_settings(policy, &placed);
    }
    configuration
}

/// Node attribute that says how much a machine wants to be on a node.
pub fn wish_attribute(machine: &str) -> String {
    format!("{WISH}{machine}")
}

/// Node attribute that takes the wish back where it is decided which instance is promoted.
pub fn promotion_attribute(machine: &str) -> String {
    format!("{PROMOTION}{machine}")
}

fn node_settings(policy: &Policy, placed: &[Placed]) -> Vec<NodeSettings> {
    let mut nodes: Vec<NodeSettings> = policy
        .nodes
        .iter()
        .map(|node| {
            let about = [(RACK, &node.rack), (CLUSTER, &node.cluster), (HIGH_PERFORMANCE, &node.high_performance)];
            let about = about.into_iter().filter_map(|(name, value)| Some(pair(name, value.as_ref()?.get_ref())));
            let capacity = node.memory.filter(|_| policy.knows_capacity());
            NodeSettings {
                name: node.name.get_ref().clone(),
                attributes: about.collect(),
                utilization: capacity.map(|memory| pair(MEMORY, memory)).into_iter().collect(),
            }
        })
        .collect();
    for (machine, placed) in policy.machines.iter().zip(placed) {
        let name = machine.name.get_ref();
        let (wish, promotion) = (wish_attribute(name), promotion_attribute(name));
        let least = placed.targets.iter().map(|t| t.score).min().unwrap_or_default();
        for target in &placed.targets {
            nodes[target.node].attributes.push(pair(&wish, target.score));
            if machine.protected() {
                nodes[target.node].attributes.push(pair(&promotion, promotion_score(target, least)));
            }
        }
    }
    nodes
}

/// Scores of a clone count when it is decided which instance is promoted, and would then bring a machine home as soon as its
/// home is up to date again. So they are taken back there: all nodes are alike but for the home's one point. Never
/// positive, or a node without a promotion score would be promotable.
fn promotion_score(target: &Target, least: i32) -> i32 {
    least - target.score + if target.score == HOME { 0 } else { NOT_PRIMARY_SCORE }
}

fn pair(name: &str, value: impl ToString) -> Pair {
    (name.into(), value.to_string())
}

fn once(name: &'static str, timeout: u64) -> Operation {
    Operation { name, interval: 0, timeout, role: None, on_fail: None }
}

fn monitor(interval: u64, timeout: u64, role: Option<Role>) -> Operation {
    Operation { name: "monitor", interval, timeout, role, on_fail: None }
}

fn understudy(kind: &'static str) -> Agent {
    Agent::Ocf { provider: "understudy", kind }
}

fn fencing_device(configuration: &mut Configuration, device: &Fencing) {
    let nodes: Vec<&str> = device.nodes.iter().map(|n| n.get_ref().as_str()).collect();
    let mut parameters = vec![pair("pcmk_host_list", nodes.join(" ")), pair("pcmk_host_check", "static-list")];
    for (name, value) in &device.parameters {
        parameters.retain(|(n, _)| n != name);
        parameters.push(pair(name, value));
    }
    let id = device.name.get_ref().clone();
    configuration.resources.push(Resource::Primitive(Primitive {
        id: id.clone(),
        agent: Agent::Stonith(device.agent.get_ref().clone()),
        parameters,
        meta: Vec::new(),
        utilization: Vec::new(),
        operations: vec![monitor(device.interval.0, 60, None)],
    }));
    // Monitored from elsewhere than the node that it would have to kill.
    if let [node] = nodes[..] {
        configuration.constraints.push(Constraint::Location {
            id: format!("understudy-location-{id}"),
            resource: id,
            role: None,
            score: Score::MinusInfinity,
            tests: vec![Test::is_node(node)],
            discovery: Discovery::Always,
        });
    }
}

/// Levels are needed only where one node has several devices.
fn fencing_levels(configuration: &mut Configuration, policy: &Policy) {
    let targets = policy.nodes.iter().map(|n| &n.name).chain(policy.boards.iter().map(|b| &b.name));
    for target in targets {
        let mut devices: Vec<&Fencing> = policy.fencing.iter().filter(|d| d.nodes.contains(target)).collect();
        if devices.len() < 2 {
            continue;
        }
        devices.sort_by_key(|d| d.level);
        for of_level in devices.chunk_by(|a, b| a.level == b.level) {
            configuration.levels.push(FencingLevel {
                target: target.get_ref().clone(),
                index: of_level[0].level,
                devices: of_level.iter().map(|d| d.name.get_ref().clone()).collect(),
            });
        }
    }
}

fn board_connection(board: &Board) -> Resource {
    let mut parameters = vec![pair("server", board.server.get_ref())];
    if board.port != 3121 {
        parameters.push(pair("port", board.port));
    }
    parameters.push(pair("reconnect_interval", board.reconnect));
    Resource::Primitive(Primitive {
        id: board.name.get_ref().clone(),
        agent: Agent::Ocf { provider: "pacemaker", kind: "remote" },
        parameters,
        meta: Vec::new(),
        utilization: Vec::new(),
        operations: vec![once("start", 60), once("stop", 60), monitor(10, 30, None)],
    })
}

fn serial_lines(configuration: &mut Configuration, policy: &Policy, machine: &Machine, index: usize, ports: &Ports) {
    for (s, line) in machine.serial.iter().enumerate() {
        let Some(board) = policy.boards.iter().find(|b| b.name == line.board) else { continue };
        let id = format!("serial-{}-{}", line.board.get_ref(), line.device.get_ref());
        configuration.resources.push(Resource::Primitive(Primitive {
            id: id.clone(),
            agent: understudy("serial"),
            parameters: vec![
                pair("machine", machine.name.get_ref()),
                pair("device", line.device.get_ref()),
                pair("line", line.line.get_ref()),
                pair("listen", endpoint(board.peripheral_address(), ports.serial(index, s))),
                pair("key", policy.cluster.key.get_ref()),
            ],
            meta: vec![pair("failure-timeout", machine.failure_timeout)],
            utilization: Vec::new(),
            operations: vec![once("start", 30), once("stop", 30), monitor(10, 20, None)],
        }));
        configuration.constraints.push(Constraint::Location {
            id: format!("understudy-location-{id}"),
            resource: id,
            role: None,
            score: Score::MinusInfinity,
            tests: vec![Test::is_not_node(board.name.get_ref())],
            discovery: Discovery::Never,
        });
    }
}

/// The process that receives migrations, on every host that is not a board. (No order with machines: without it they run as well.)
fn listener(configuration: &mut Configuration, policy: &Policy) {
    let id = "understudy-migrations";
    let clone = format!("{id}-clone");
    configuration.resources.push(Resource::Clone {
        id: clone.clone(),
        meta: vec![pair("interleave", "true")],
        primitive: Primitive {
            id: id.into(),
            agent: understudy("migrations"),
            parameters: vec![pair("peers", policy.migration_peers()), pair("key", policy.cluster.key.get_ref())],
            meta: Vec::new(),
            utilization: Vec::new(),
            operations: vec![once("start", 30), once("stop", 30), monitor(10, 20, None)],
        },
    });
    configuration.constraints.push(Constraint::on_hosts(&clone));
}

/// A monitor on every host that is not a board. What runs there does not depend on it.
fn monitors(configuration: &mut Configuration, policy: &Policy, monitoring: Monitoring) {
    let id = "understudy-monitor";
    let clone = format!("{id}-clone");
    let on = |address: fn(&Node) -> Option<&Spanned<String>>| {
        let of = |n: &Node| Some(format!("{}={}", n.name.get_ref(), endpoint(address(n)?.get_ref(), monitoring.port)));
        policy.nodes.iter().filter_map(of).collect::<Vec<_>>().join(" ")
    };
    let rack = |n: &Node| Some(format!("{}={}", n.name.get_ref(), n.rack.as_ref()?.get_ref()));
    let racks = policy.nodes.iter().filter_map(rack).collect::<Vec<_>>().join(" ");
    let rows: Vec<_> = policy.matrix.iter().map(|row| row.get_ref().clone()).collect();
    let rows = if rows.is_empty() { String::new() } else { understudy_monitor::matrix::line(&rows) };
    let (health, default) = (monitoring.health, Monitoring::default());
    let mut parameters = vec![
        pair("production", on(|n| n.business.as_ref())),
        pair("management", on(|n| n.management.as_ref())),
        pair("racks", racks),
        pair("matrix", rows),
    ];
    parameters.retain(|(_, value)| !value.is_empty());
    parameters.push(pair("key", policy.cluster.key.get_ref()));
    let changed = [
        (monitoring.interval_ms != default.interval_ms, pair("interval_ms", monitoring.interval_ms)),
        (monitoring.missed != default.missed, pair("missed", monitoring.missed)),
        (monitoring.restart_after != default.restart_after, pair("restart_after", monitoring.restart_after)),
        (!monitoring.bmc, pair("bmc", false)),
        (health, pair("health", true)),
    ];
    parameters.extend(changed.into_iter().filter(|(changed, _)| *changed).map(|(_, pair)| pair));
    if health {
        configuration.properties.push(pair("node-health-strategy", "migrate-on-red"));
    }
    let mut meta = vec![pair("interleave", "true")];
    // Or it would leave a node that is cut off, and never see that the network is back.
    meta.extend(health.then(|| pair("allow-unhealthy-nodes", "true")));
    configuration.resources.push(Resource::Clone {
        id: clone.clone(),
        meta,
        primitive: Primitive {
            id: id.into(),
            agent: understudy("monitor"),
            parameters,
            // Restarted on its node for as long as it takes (spec E-2): no other node can be this one's monitor.
            meta: vec![pair("failure-timeout", 60), pair("critical", "false")],
            utilization: Vec::new(),
            operations: vec![once("start", 30), once("stop", 30), monitor(10, 20, None)],
        },
    });
    configuration.constraints.push(Constraint::on_hosts(&clone));
}

/// All of a node's addresses for replication, with commas between.
fn endpoints(node: &Node, port: u16) -> String {
    node.replication_addresses().into_iter().map(|host| endpoint(host, port)).collect::<Vec<_>>().join(",")
}

/// `HOST:PORT`, with brackets where an IPv6 address needs them.
fn endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn vmm_parameters(policy: &Policy, machine: &Machine, index: usize, ports: &Ports) -> Vec<Pair> {
    let mut parameters = vec![
        pair("name", machine.name.get_ref()),
        pair("memory", machine.memory),
        pair("vcpus", machine.vcpus.get_ref()),
        pair("kernel", machine.kernel.get_ref()),
    ];
    if let Some(initrd) = &machine.initrd {
        parameters.push(pair("initrd", initrd.get_ref()));
    }
    if let Some(cmdline) = &machine.cmdline {
        parameters.push(pair("cmdline", cmdline));
    }
    if !machine.disks.is_empty() {
        let disks: Vec<_> = machine.disks.iter().map(|disk| disk.get_ref().as_str()).collect();
        parameters.push(pair("disks", disks.join(";")));
    }
    if !machine.cdroms.is_empty() {
        let drives: Vec<_> = machine.cdroms.iter().map(|drive| drive.get_ref().as_str()).collect();
        parameters.push(pair("cdroms", drives.join(";")));
    }
    if !machine.nics.is_empty() {
        let nics: Vec<_> = machine.nics.iter().map(|nic| nic.get_ref().as_str()).collect();
        parameters.push(pair("nics", nics.join(";")));
    }
    for (s, line) in machine.serial.iter().enumerate() {
        let Some(board) = policy.boards.iter().find(|b| b.name == line.board) else { continue };
        let address = endpoint(board.peripheral_address(), ports.serial(index, s));
        let (device, key) = (line.device.get_ref(), policy.cluster.key.get_ref());
        parameters.push(pair(line.guest.parameter(), format!("board:{address}/{device},key={key}")));
    }
    if let Some(watchdog) = &machine.watchdog {
        parameters.push(pair("watchdog", watchdog.get_ref().as_str()));
        parameters.extend(machine.watchdog_action.as_ref().map(|a| pair("watchdog_action", a.get_ref().as_str())));
    }
    if let Some(shutdown) = machine.shutdown {
        parameters.push(pair("shutdown_mode", shutdown.as_str()));
    }
    if policy.pauses() {
        parameters.push(pair("load_sharing", "pause"));
        parameters.extend(machine.priority.as_ref().map(|priority| pair("priority", priority.get_ref())));
        let rooms = policy.host_room();
        parameters.extend((!rooms.is_empty()).then(|| pair("host_room", rooms)));
    }
    parameters
}

/// Only where the machine has a score, and as much as that says.
fn by_score(machine: &Machine, resource: &str, role: Option<Role>) -> Constraint {
    let name = machine.name.get_ref();
    let (kind, attribute) = match role {
        Some(_) => ("primary", promotion_attribute(name)),
        None => ("location", wish_attribute(name)),
    };
    Constraint::Location {
        id: format!("understudy-{kind}-{resource}"),
        resource: resource.into(),
        role,
        tests: vec![Test::is_defined(&attribute)],
        score: Score::Attribute(attribute),
        discovery: if role.is_none() { Discovery::Exclusive } else { Discovery::Always },
    }
}

/// The same nodes, without a wish of its own: it follows the machine.
fn beside(machine: &Machine, resource: &str) -> Constraint {
    Constraint::Location {
        id: format!("understudy-location-{resource}"),
        resource: resource.into(),
        role: None,
        score: Score::Finite(0),
        tests: vec![Test::is_defined(&wish_attribute(machine.name.get_ref()))],
        discovery: Discovery::Exclusive,
    }
}

fn utilization(policy: &Policy, machine: &Machine) -> Vec<Pair> {
    let counts = policy.places() && policy.knows_capacity();
    if counts { vec![pair(MEMORY, machine.memory)] } else { Vec::new() }
}

/// What a placed machine's resource says of itself.
fn placed_meta(policy: &Policy, machine: &Machine, placed: Option<&Placed>) -> Vec<Pair> {
    let mut meta = Vec::new();
    if placed.is_some() {
        meta.push(pair("resource-stickiness", policy.cluster.stickiness.max(STICKINESS)));
    }
    if let Some(priority) = &machine.priority {
        meta.push(pair("priority", priority.get_ref()));
    }
    meta
}

/// Where the machine may be: on its nodes if it names them, else on every host that is not a board.
fn placement(machine: &Machine, policy: &Policy, resource: &str) -> Constraint {
    let named = machine.primary.is_some() && machine.standby.is_some();
    let tests = if named {
        policy.candidates(machine).map(|n| Test::is_not_node(n.name.get_ref())).collect()
    } else {
        vec![Test::is_remote()]
    };
    Constraint::never_where(resource, tests)
}

/// The primary, when there is a choice.
fn preference(
    machine: &Machine,
    resource: &str,
    role: Option<Role>,
    score: i32,
    test: fn(&str) -> Test,
) -> Option<Constraint> {
    let primary = machine.primary.as_ref()?;
    Some(Constraint::Location {
        id: format!("understudy-primary-{resource}"),
        resource: resource.into(),
        role,
        score: Score::Finite(score),
        tests: vec![test(primary.get_ref())],
        discovery: Discovery::Always,
    })
}

fn promotable(primitive: Primitive, more: Vec<Pair>) -> Resource {
    let mut meta = vec![
        pair("promotable", "true"),
        pair("clone-max", 2),
        pair("clone-node-max", 1),
        pair("promoted-max", 1),
        pair("promoted-node-max", 1),
        pair("notify", "true"),
        pair("interleave", "true"),
    ];
    meta.extend(more);
    Resource::Clone { id: format!("{}-clone", primitive.id), meta, primitive }
}

fn protected(
    configuration: &mut Configuration,
    policy: &Policy,
    machine: &Machine,
    index: usize,
    ports: &Ports,
    placed: Option<&Placed>,
) {
    let (vm, repl) = (machine.vm_id(), machine.replicator_id());
    let (vm_clone, repl_clone) = (format!("{vm}-clone"), format!("{repl}-clone"));
    let name = machine.name.get_ref();
    let monitors = |timeout| {
        [
            monitor(machine.monitor.primary.0, timeout, Some(Role::Promoted)),
            monitor(machine.monitor.standby.0, timeout, Some(Role::Unpromoted)),
        ]
    };

    let mut operations =
        vec![once("start", 60), once("stop", 90), once("promote", 60), once("demote", 90), once("notify", 10)];
    operations.extend(monitors(20));
    let vmm = Primitive {
        id: vm.clone(),
        agent: understudy("vmm"),
        parameters: vmm_parameters(policy, machine, index, ports),
        meta: Vec::new(),
        utilization: utilization(policy, machine),
        operations,
    };
    let mut meta = vec![pair("migration-threshold", 1), pair("failure-timeout", machine.failure_timeout)];
    meta.extend(placed_meta(policy, machine, placed));
    configuration.resources.push(promotable(vmm, meta));

    let peer = |n: &Node| {
        n.replication_address()?;
        Some(format!("{}={}", n.name.get_ref(), endpoints(n, ports.replication(index))))
    };
    let peers: Vec<String> = match placed {
        Some(placed) => {
            let mut nodes: Vec<usize> = placed.targets.iter().map(|t| t.node).collect();
            nodes.sort_unstable();
            nodes.into_iter().filter_map(|n| peer(&policy.nodes[n])).collect()
        }
        None => policy.candidates(machine).filter_map(peer).collect(),
    };
    let mut parameters =
        vec![pair("name", name), pair("peers", peers.join(" ")), pair("key", policy.cluster.key.get_ref())];
    if let Some(ms) = machine.interval_ms {
        parameters.push(pair("interval_ms", ms));
    }
    if let Some(ms) = machine.peer_timeout_ms {
        parameters.push(pair("peer_timeout_ms", ms));
    }
    parameters.push(pair("vmm_resource", &vm));
    let stop = Operation { on_fail: Some("block"), ..once("stop", 30) };
    let mut operations = vec![once("start", 30), stop, once("promote", 30), once("demote", 30), once("notify", 10)];
    operations.extend(monitors(20));
    let replicator = Primitive {
        id: repl.clone(),
        agent: understudy("replicator"),
        parameters,
        meta: Vec::new(),
        utilization: Vec::new(),
        operations,
    };
    let meta = vec![pair("failure-timeout", machine.failure_timeout), pair("critical", "false")];
    configuration.resources.push(promotable(replicator, meta));

    let order = |what: &str, action: &'static str, symmetrical: bool| Constraint::Order {
        id: format!("understudy-order-{name}-{what}"),
        first: (action, vm_clone.clone()),
        then: (action, repl_clone.clone()),
        symmetrical,
    };
    let together = |what: &str, role: Option<Role>| Constraint::Colocation {
        id: format!("understudy-colocation-{name}-{what}"),
        resource: (repl_clone.clone(), role),
        with: (vm_clone.clone(), role),
    };
    let (on, replicator_on) = match placed {
        Some(_) => (by_score(machine, &vm_clone, None), beside(machine, &repl_clone)),
        None => (placement(machine, policy, &vm_clone), placement(machine, policy, &repl_clone)),
    };
    configuration.constraints.extend([
        on,
        replicator_on,
        order("start", "start", true),
        order("promote", "promote", false),
        order("demote", "demote", false),
        together("instances", None),
        together("promoted", Some(Role::Promoted)),
    ]);
    configuration.constraints.extend(match placed {
        Some(_) => Some(by_score(machine, &vm_clone, Some(Role::Promoted))),
        None => preference(machine, &vm_clone, Some(Role::Promoted), NOT_PRIMARY_SCORE, Test::is_not_node),
    });
}

fn unprotected(
    configuration: &mut Configuration,
    policy: &Policy,
    machine: &Machine,
    index: usize,
    ports: &Ports,
    placed: Option<&Placed>,
) {
    let vm = machine.vm_id();
    let mut parameters = vmm_parameters(policy, machine, index, ports);
    let mut meta = vec![pair("migration-threshold", 3), pair("failure-timeout", machine.failure_timeout)];
    meta.extend(placed_meta(policy, machine, placed));
    let mut operations = vec![once("start", 60), once("stop", 90), monitor(machine.monitor.primary.0, 20, None)];
    if machine.migrates() {
        parameters.push(pair("migration_peers", policy.migration_peers()));
        parameters.push(pair("migration_key", policy.cluster.key.get_ref()));
        meta.push(pair("allow-migrate", "true"));
        // A migration that failed leaves the machine running where it is; Pacemaker's default would stop it on both nodes.
        operations.push(Operation { on_fail: Some("block"), ..once("migrate_to", 600) });
        operations.push(once("migrate_from", 60));
    }
    configuration.resources.push(Resource::Primitive(Primitive {
        id: vm.clone(),
        agent: understudy("vmm"),
        parameters,
        meta,
        utilization: utilization(policy, machine),
        operations,
    }));
    if placed.is_some() {
        configuration.constraints.push(by_score(machine, &vm, None));
    } else {
        configuration.constraints.push(placement(machine, policy, &vm));
        configuration.constraints.extend(preference(machine, &vm, None, HOME_SCORE, Test::is_node));
    }
}
