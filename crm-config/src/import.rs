//! From a cluster's configuration back to a policy file.
//!
//! ```text
//!   CIB ──► what a policy would say ──► policy text ──► compile ──► merge into the same CIB ──► what would change
//! ```
//! A policy says more than a CIB keeps (business types, why a target is one) and a CIB can hold what no policy says. So the policy that
//! was read is compiled again and compared with where it came from: every difference is named, as is every resource that is not ours.
//! Nothing is left out silently.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use understudy_monitor::matrix;

use crate::check;
use crate::cib::{DEFAULTS, TAG};
use crate::compile::{CLUSTER, HIGH_PERFORMANCE, MEMORY, RACK, WISH, compile};
use crate::merge::{Change, PREFIXES, merge};
use crate::placement::HOME;
use crate::xml::Element;

/// A policy's text, and what one should know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The policy, with the warnings as comments at its head.
    pub text: String,
    /// What the policy does not say although the cluster has it; what it would change; what is not ours. Sentences.
    pub warnings: Vec<String>,
}

/// Scores above it are of the first tier (see [`crate::placement`]).
const FIRST_TIER: i32 = 500;

/// Read a whole `<cib>`.
pub fn import(cib: &Element) -> Imported {
    let first = Pass::new(cib, &BTreeSet::new());
    let few = Import::new(cib, &BTreeSet::new()).few();
    let passes = if few.is_empty() { vec![first] } else { vec![first, Pass::new(cib, &few)] };
    // The one of which applying changes less; a policy that cannot be used is the worst.
    let best = passes.into_iter().min_by_key(|pass| pass.changes.as_ref().map_or(usize::MAX, Vec::len));
    let Pass { body, mut warnings, changes } = best.unwrap_or_default();
    match changes {
        Ok(changes) => warnings.extend(changes),
        Err(errors) => warnings.extend(errors),
    }
    let mut text = String::from(
        "# Read from a cluster by `understudy-crm import`. `understudy-crm check` and `diff` say what they think of it.\n",
    );
    for line in warnings.iter().flat_map(|warning| warning.lines()) {
        // TOML wants no control characters in comments.
        let _ = writeln!(text, "# ! {}", line.trim_end().replace(char::is_control, " "));
    }
    text.push_str(&body);
    Imported { text, warnings }
}

/// One way to read it.
struct Pass {
    body: String,
    warnings: Vec<String>,
    /// What applying it would change; or why it cannot be applied.
    changes: Result<Vec<String>, Vec<String>>,
}

impl Default for Pass {
    fn default() -> Self {
        Self { body: String::new(), warnings: Vec::new(), changes: Err(Vec::new()) }
    }
}

impl Pass {
    /// With the standbys of these machines named, rather than all of their cluster being targets.
    fn new(cib: &Element, named: &BTreeSet<String>) -> Self {
        let mut import = Import::new(cib, named);
        import.read();
        let Import { text: body, warnings, .. } = import;
        let changes = match check::read(&body) {
            (Some(policy), _) => Ok(merge(cib, &compile(&policy)).1.iter().map(different).collect()),
            (None, findings) => {
                let errors = findings.into_iter().filter(|f| f.severity == check::Severity::Error);
                Err(errors.map(|f| format!("the policy as it was read cannot be used yet: {}", f.what)).collect())
            }
        };
        Self { body, warnings, changes }
    }
}

fn different(change: &Change) -> String {
    let name = |e: &Element| match (e.name.as_str(), e.attribute("name"), e.attribute("value")) {
        ("nvpair", Some(name), Some(value)) => format!("{name} = {value} ({})", e.id()),
        _ => format!("{} {}", e.name, e.id()),
    };
    match change {
        Change::Add(e) => format!("applying this policy would add {}", name(e)),
        Change::Remove(e) => format!("applying this policy would remove {}", name(e)),
        Change::Modify(before, after) if before.name == "nvpair" => {
            format!(
                "applying this policy would change {} into {}",
                name(before),
                after.attribute("value").unwrap_or_default()
            )
        }
        Change::Modify(before, after) => {
            let (old, new) = (facts(before), facts(after));
            let less: Vec<&str> = old.difference(&new).map(String::as_str).collect();
            let more: Vec<&str> = new.difference(&old).map(String::as_str).collect();
            format!("applying this policy would change {}: without {:?}, with {:?}", name(before), less, more)
        }
    }
}

/// What stands in an object, apart from ids.
fn facts(element: &Element) -> BTreeSet<String> {
    let mut facts = BTreeSet::new();
    if let ("nvpair", Some(name)) = (element.name.as_str(), element.attribute("name")) {
        facts.insert(format!("{name}={}", element.attribute("value").unwrap_or_default()));
        return facts;
    }
    let own = element.attributes.iter().filter(|(n, _)| n != "id").map(|(n, v)| format!("{n}={v}"));
    if element.name == "op" {
        facts.insert(format!("op {}", own.collect::<Vec<_>>().join(" ")));
    } else {
        facts.extend(own.map(|fact| format!("{} {fact}", element.name)));
    }
    facts.extend(element.children.iter().flat_map(facts_of));
    facts
}

fn facts_of(element: &Element) -> BTreeSet<String> {
    facts(element)
}

/// A primitive with the clone around it.
struct Resource<'a> {
    primitive: &'a Element,
    clone: Option<&'a Element>,
}

impl<'a> Resource<'a> {
    fn id(&self) -> &'a str {
        self.primitive.id()
    }
    fn top(&self) -> &'a Element {
        self.clone.unwrap_or(self.primitive)
    }
    fn is(&self, class: &str, provider: Option<&str>, kind: &str) -> bool {
        self.primitive.attribute("class") == Some(class)
            && self.primitive.attribute("provider") == provider
            && self.primitive.attribute("type") == Some(kind)
    }
    fn parameter(&self, name: &str) -> Option<&'a str> {
        pairs(self.primitive, "instance_attributes").find(|(n, _)| *n == name).map(|(_, v)| v)
    }
    fn meta(&self, name: &str) -> Option<&'a str> {
        let all = pairs(self.top(), "meta_attributes").chain(pairs(self.primitive, "meta_attributes"));
        { all }.find(|(n, _)| *n == name).map(|(_, v)| v)
    }
    /// Interval of the monitor in this role, in seconds.
    fn interval(&self, role: Option<&str>) -> Option<u64> {
        let operations = self.primitive.children.iter().filter(|c| c.name == "operations").flat_map(|o| &o.children);
        let of_role = |op: &&Element| op.attribute("name") == Some("monitor") && op.attribute("role") == role;
        let interval = { operations }.find(of_role)?.attribute("interval")?;
        seconds(interval)
    }
}

/// Names and values in all sets of that kind.
fn pairs<'a>(element: &'a Element, kind: &'static str) -> impl Iterator<Item = (&'a str, &'a str)> {
    let sets = element.children.iter().filter(move |c| c.name == kind && c.child("rule").is_none());
    let all = sets.flat_map(|set| &set.children).filter(|p| p.name == "nvpair");
    all.filter_map(|p| Some((p.attribute("name")?, p.attribute("value")?)))
}

fn seconds(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().ok()?;
    match text[digits.len()..].trim() {
        "" | "s" | "sec" => Some(number),
        "m" | "min" => number.checked_mul(60),
        "h" | "hr" => number.checked_mul(3600),
        _ => None,
    }
}

/// `HOST:PORT`, with brackets taken off.
fn endpoint(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    Some((host.trim_start_matches('[').trim_end_matches(']').to_owned(), port.parse().ok()?))
}

/// `NODE=VALUE`, separated by blanks.
fn by_node(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_whitespace().filter_map(|word| word.split_once('='))
}

struct Import<'a> {
    configuration: Option<&'a Element>,
    resources: Vec<Resource<'a>>,
    named: &'a BTreeSet<String>,
    text: String,
    warnings: Vec<String>,
}

impl<'a> Import<'a> {
    fn new(cib: &'a Element, named: &'a BTreeSet<String>) -> Self {
        let configuration = cib.child("configuration");
        let mut resources = Vec::new();
        let mut warnings = Vec::new();
        for element in
            configuration.and_then(|c| c.child("resources")).map(|r| r.children.as_slice()).unwrap_or_default()
        {
            match (element.name.as_str(), element.child("primitive")) {
                ("primitive", _) => resources.push(Resource { primitive: element, clone: None }),
                ("clone" | "master", Some(primitive)) => resources.push(Resource { primitive, clone: Some(element) }),
                _ => {
                    warnings.push(format!("{} {} is not read: a policy has no such thing", element.name, element.id()))
                }
            }
        }
        Self { configuration, resources, named, text: String::new(), warnings }
    }

    fn section(&self, name: &str) -> &'a [Element] {
        self.configuration.and_then(|c| c.child(name)).map(|s| s.children.as_slice()).unwrap_or_default()
    }

    fn of(&self, kind: &'static str) -> Vec<usize> {
        let ours = |i: &usize| self.resources[*i].is("ocf", Some("understudy"), kind);
        (0..self.resources.len()).filter(ours).collect()
    }

    fn head(&mut self, head: &str) {
        let _ = writeln!(self.text, "\n{head}");
    }

    fn line(&mut self, name: &str, value: impl Into<toml::Value>) {
        let _ = writeln!(self.text, "{name} = {}", value.into());
    }

    fn maybe(&mut self, name: &str, value: Option<impl Into<toml::Value>>) {
        if let Some(value) = value {
            self.line(name, value);
        }
    }

    /// A number, or a sentence that it is none.
    fn number(&mut self, name: &str, value: Option<&str>) {
        match value.map(|v| (v, v.parse::<i64>())) {
            Some((_, Ok(number))) => self.line(name, number),
            Some((text, Err(_))) => self.warnings.push(format!("{name} = {text:?} is no number and not read")),
            None => {}
        }
    }

    fn read(&mut self) {
        self.cluster();
        self.monitoring();
        self.nodes();
        self.boards();
        self.fencing();
        for machine in self.of("vmm") {
            self.machine(machine);
        }
        self.strangers();
    }

    fn cluster(&mut self) {
        self.head("[cluster]");
        let properties: BTreeMap<&str, &str> = self
            .section("crm_config")
            .iter()
            .flat_map(|set| &set.children)
            .filter_map(|p| Some((p.attribute("name")?, p.attribute("value")?)))
            .collect();
        let policy = properties.get("no-quorum-policy").copied();
        if let Some(policy) = policy.filter(|p| ["freeze", "stop", "demote", "suicide"].contains(p)) {
            self.line("no_quorum", policy);
        }
        let defaults =
            self.section("rsc_defaults").iter().filter(|set| set.id() == DEFAULTS).flat_map(|set| &set.children);
        let stickiness = { defaults }.find(|p| p.attribute("name") == Some("resource-stickiness"));
        self.number("stickiness", stickiness.and_then(|p| p.attribute("value")));
        let key = self.resources.iter().find_map(|r| r.parameter("key").or(r.parameter("migration_key")));
        self.maybe("key", key);
        let listener = self.of("migrations").first().and_then(|i| self.resources[*i].parameter("peers"));
        let port = listener.and_then(|peers| by_node(peers).find_map(|(_, a)| Some(endpoint(a.split(',').next()?)?.1)));
        self.maybe("migration_port", port.map(i64::from));
        if self.of("vmm").iter().any(|i| self.resources[*i].parameter("load_sharing") == Some("pause")) {
            self.line("load_sharing", "pause");
        }
        if !self.wishes().is_empty() {
            // Machines are placed, whatever else the policy says.
            self.line("automation", "automatic");
            self.warnings.push(
                "the cluster does not keep business types, automation levels and why a node is a target: say business and automation \
                 where they are meant"
                    .into(),
            );
        }
    }

    fn monitoring(&mut self) {
        let Some(at) = self.of("monitor").first().copied() else { return };
        let parameter = |name| self.resources[at].parameter(name);
        let (production, interval, missed) = (parameter("production"), parameter("interval_ms"), parameter("missed"));
        let bmc = parameter("bmc");
        let (after, health, rows) = (parameter("restart_after"), parameter("health"), parameter("matrix"));
        self.head("[monitoring]");
        let port = production.and_then(|p| by_node(p).find_map(|(_, address)| Some(endpoint(address)?.1)));
        self.maybe("port", port.map(i64::from));
        self.number("interval_ms", interval);
        self.number("missed", missed);
        self.maybe("restart_after", after);
        self.maybe("bmc", (bmc == Some("false")).then_some(false));
        self.maybe("health", (health == Some("true")).then_some(true));
        match rows.map(matrix::read_rows) {
            Some(Ok(rows)) => {
                for row in rows {
                    self.head("[[matrix]]");
                    self.line("name", row.name.as_str());
                    let columns = ["management", "production", "bmc", "machine", "guest", "restart"];
                    for (column, cell) in columns.iter().zip(row.cells()).filter(|(_, cell)| cell != "-") {
                        let values: Vec<toml::Value> = cell.split('|').map(toml::Value::from).collect();
                        self.line(column, values);
                    }
                    self.line("verdict", row.verdict.as_str());
                }
            }
            Some(Err(why)) => self.warnings.push(format!("the monitors' rows of the fault matrix are not read: {why}")),
            None => {}
        }
    }

    /// Node, machine and score of every wish.
    fn wishes(&self) -> Vec<(&'a str, &'a str, i32)> {
        let mut wishes = Vec::new();
        for node in self.section("nodes") {
            for (name, value) in pairs(node, "instance_attributes") {
                if let (Some(machine), Ok(score)) = (name.strip_prefix(WISH), value.parse()) {
                    wishes.push((node.attribute("uname").unwrap_or_default(), machine, score));
                }
            }
        }
        wishes
    }

    fn nodes(&mut self) {
        let address = |kind: &'static str, parameter: &str, node: &str| {
            let lists = self.of(kind);
            let all = lists.iter().filter_map(|i| self.resources[*i].parameter(parameter));
            let found = { all }.flat_map(by_node).find(|(name, _)| *name == node)?.1;
            Some(found.split(',').filter_map(|a| Some(endpoint(a)?.0)).collect::<Vec<_>>())
        };
        let rooms = self.of("vmm").iter().find_map(|i| self.resources[*i].parameter("host_room")).unwrap_or_default();
        let members =
            self.section("nodes").iter().filter(|n| n.attribute("type").is_none_or(|t| t == "member" || t == "normal"));
        let mut nodes = Vec::new();
        for node in members {
            let name = node.attribute("uname").unwrap_or_default();
            let replication = address("replicator", "peers", name)
                .or_else(|| address("migrations", "peers", name))
                .unwrap_or_default();
            let first = |list: Option<Vec<String>>| list.and_then(|l| l.into_iter().next());
            let attribute = |wanted: &str| {
                pairs(node, "instance_attributes").find(|(n, _)| *n == wanted).map(|(_, v)| v.to_owned())
            };
            let room =
                by_node(rooms).find(|(n, _)| *n == name).map(|(_, room)| room.split_once('/').unwrap_or((room, "")));
            let capacity = pairs(node, "utilization").find(|(n, _)| *n == MEMORY).map(|(_, v)| v);
            nodes.push((
                name,
                replication,
                first(address("monitor", "production", name)),
                first(address("monitor", "management", name)),
                [
                    ("rack", attribute(RACK)),
                    ("cluster", attribute(CLUSTER)),
                    ("high_performance", attribute(HIGH_PERFORMANCE)),
                ],
                capacity.or(room.map(|(_, memory)| memory).filter(|memory| !memory.is_empty())),
                room.map(|(cpus, _)| cpus),
            ));
        }
        for (name, replication, business, management, labels, memory, cpus) in nodes {
            self.head("[[nodes]]");
            self.line("name", name);
            self.maybe("storage", replication.first().map(String::as_str));
            self.maybe("storage2", replication.get(1).map(String::as_str));
            if replication.len() > 2 {
                self.warnings
                    .push(format!("node {name} has {} addresses for replication; a policy has two", replication.len()));
            }
            self.maybe("business", business);
            self.maybe("management", management);
            for (label, value) in labels {
                self.maybe(label, value);
            }
            self.number("memory", memory);
            self.number("cpus", cpus);
        }
    }

    fn boards(&mut self) {
        let remotes: Vec<usize> =
            (0..self.resources.len()).filter(|i| self.resources[*i].is("ocf", Some("pacemaker"), "remote")).collect();
        for at in remotes {
            let parameter = |name| self.resources[at].parameter(name);
            let (id, server) = (self.resources[at].id(), parameter("server"));
            let (port, reconnect) = (parameter("port"), parameter("reconnect_interval"));
            let listens = self.of("serial").into_iter().find(|i| self.board_of(*i) == Some(id));
            let business = listens.and_then(|i| endpoint(self.resources[i].parameter("listen")?)).map(|(host, _)| host);
            self.head("[[boards]]");
            self.line("name", id);
            self.line("server", server.unwrap_or(id));
            self.number("port", port);
            self.maybe("business", business.filter(|b| Some(b.as_str()) != server));
            self.maybe("reconnect", reconnect);
        }
    }

    /// The board on which a serial line is: its constraint forbids every other node.
    fn board_of(&self, serial: usize) -> Option<&'a str> {
        let id = self.resources[serial].top().id();
        let location = self.section("constraints").iter().find(|c| c.id() == format!("understudy-location-{id}"))?;
        location.child("rule")?.child("expression")?.attribute("value")
    }

    fn fencing(&mut self) {
        let levels: Vec<(&str, &str, Vec<&str>)> = self
            .section("fencing-topology")
            .iter()
            .filter_map(|l| {
                Some((l.attribute("target")?, l.attribute("index")?, l.attribute("devices")?.split(',').collect()))
            })
            .collect();
        let devices: Vec<usize> = (0..self.resources.len())
            .filter(|i| self.resources[*i].primitive.attribute("class") == Some("stonith"))
            .collect();
        for at in devices {
            let device = &self.resources[at];
            let (id, agent) = (device.id(), device.primitive.attribute("type").unwrap_or_default());
            let hosts = device.parameter("pcmk_host_list").unwrap_or_default();
            let hosts: Vec<toml::Value> =
                hosts.split([' ', ',']).filter(|h| !h.is_empty()).map(toml::Value::from).collect();
            if hosts.is_empty() {
                self.warnings
                    .push(format!("fencing device {id} has no pcmk_host_list: say which nodes it can switch off"));
            }
            let mut own: BTreeSet<&str> =
                levels.iter().filter(|(_, _, devices)| devices.contains(&id)).map(|(_, index, _)| *index).collect();
            let level = own.pop_first();
            if !own.is_empty() {
                self.warnings.push(format!("fencing device {id} has several levels; a policy gives it one"));
            }
            let interval = self.resources[at].interval(None);
            let parameters: Vec<(&str, &str)> = pairs(self.resources[at].primitive, "instance_attributes")
                .filter(|(n, v)| *n != "pcmk_host_list" && (*n, *v) != ("pcmk_host_check", "static-list"))
                .collect();
            self.head("[[fencing]]");
            self.line("name", id);
            self.line("agent", agent);
            self.line("nodes", hosts);
            self.number("level", level);
            self.maybe("interval", interval.and_then(|s| i64::try_from(s).ok()));
            if !parameters.is_empty() {
                let table: toml::Table =
                    parameters.iter().map(|(n, v)| ((*n).to_owned(), toml::Value::from(*v))).collect();
                self.line("parameters", table);
            }
        }
    }

    fn machine(&mut self, at: usize) {
        let vm = &self.resources[at];
        let Some(name) = vm.parameter("name") else {
            return self.warnings.push(format!("{} has no parameter name and is not read", vm.id()));
        };
        if vm.id() != format!("vm-{name}") {
            return self.warnings.push(format!(
                "machine {name} is not read: its resource is called {}, and a policy would make a second one, vm-{name}, beside it. Rename \
                 it first (stop it, change its id)",
                vm.id()
            ));
        }
        let protected = vm.clone.is_some();
        let replicator = self
            .of("replicator")
            .into_iter()
            .find(|i| self.resources[*i].parameter("name") == Some(name))
            .filter(|_| protected);
        let wishes: Vec<(&'a str, i32)> =
            self.wishes().into_iter().filter(|(_, m, _)| *m == name).map(|(node, _, score)| (node, score)).collect();
        let placed = !wishes.is_empty();
        let vm = &self.resources[at];
        let texts: Vec<(&str, &str)> =
            [("kernel", "kernel"), ("initrd", "initrd"), ("cmdline", "cmdline"), ("shutdown", "shutdown_mode")]
                .into_iter()
                .chain([("watchdog", "watchdog"), ("watchdog_action", "watchdog_action")])
                .filter_map(|(word, parameter)| Some((word, vm.parameter(parameter)?)))
                // No policy says that there is none.
                .filter(|text| *text != ("watchdog", "none"))
                .collect();
        let lists: Vec<(&str, Vec<toml::Value>)> = ["disks", "cdroms", "nics"]
            .into_iter()
            .filter_map(|list| {
                let items = vm.parameter(list)?.split([';', '\n']).map(str::trim).filter(|i| !i.is_empty());
                Some((list, items.map(toml::Value::from).collect()))
            })
            .collect();
        let mode = match (protected, placed && wishes.iter().all(|(_, score)| *score == HOME)) {
            (true, _) => "protected",
            (false, true) => "none",
            (false, false) => "restart",
        };
        let (memory, vcpus) = (vm.parameter("memory"), vm.parameter("vcpus"));
        let (priority, failure) = (vm.meta("priority").or(vm.parameter("priority")), vm.meta("failure-timeout"));
        let migrates = vm.meta("allow-migrate") == Some("true");
        let monitors = if protected {
            (vm.interval(Some("Promoted")), vm.interval(Some("Unpromoted")))
        } else {
            (vm.interval(None), None)
        };
        self.head("[[machines]]");
        self.line("name", name);
        self.line("mode", mode);
        if mode == "none" {
            self.warnings.push(format!(
                "{name} has no target but its home: read as mode \"none\"; it may have been a matter of automation"
            ));
        }
        self.number("memory", memory);
        self.number("vcpus", vcpus);
        for (word, text) in texts {
            self.line(word, text);
        }
        for (word, list) in lists {
            self.line(word, list);
        }
        self.number("priority", priority);
        self.maybe("failure_timeout", failure.and_then(seconds).and_then(|s| i64::try_from(s).ok()));
        self.maybe("migrate", migrates.then_some(true));
        if let Some(at) = replicator {
            let parameter = |name| self.resources[at].parameter(name);
            let (interval, timeout, peers) =
                (parameter("interval_ms"), parameter("peer_timeout_ms"), parameter("peers"));
            let port = peers.and_then(|p| by_node(p).find_map(|(_, a)| Some(endpoint(a.split(',').next()?)?.1)));
            self.maybe("port", port.map(i64::from));
            self.number("interval_ms", interval);
            self.number("peer_timeout_ms", timeout);
        }
        if placed {
            self.targets(name, &wishes)
        } else {
            self.named(at, name)
        }
        let mut monitor = toml::Table::new();
        for (word, interval) in [("primary", monitors.0), ("standby", monitors.1)] {
            monitor
                .extend(interval.and_then(|s| i64::try_from(s).ok()).map(|s| (word.to_owned(), toml::Value::from(s))));
        }
        // Pacemaker needs two intervals; of a machine without a standby only one is known.
        if !monitor.contains_key("standby") && monitor.get("primary").and_then(toml::Value::as_integer) == Some(7) {
            monitor.insert("standby".into(), 8.into());
        }
        if !monitor.is_empty() {
            self.line("monitor", monitor);
        }
        self.serial(at, name);
    }

    /// Placed machines that have fewer targets than their cluster has nodes: their standbys may have been named, or there was no room.
    fn few(&self) -> BTreeSet<String> {
        let attribute = |node: &Element, wanted: &str| {
            pairs(node, "instance_attributes").find(|(n, _)| *n == wanted).map(|(_, v)| v.to_owned())
        };
        let wishes = self.wishes();
        let machines: BTreeSet<&str> = wishes.iter().map(|(_, machine, _)| *machine).collect();
        let few = |machine: &&str| {
            let on = |node: &Element| {
                let name = node.attribute("uname");
                wishes.iter().any(|(n, m, _)| Some(*n) == name && m == machine)
            };
            let mine = || self.section("nodes").iter().filter(|node| on(node));
            let dedicated = |node: &Element| attribute(node, HIGH_PERFORMANCE).is_some();
            let own = mine().find(|node| !dedicated(node)).map(|node| attribute(node, CLUSTER));
            let others =
                self.section("nodes").iter().filter(|n| !dedicated(n) && Some(attribute(n, CLUSTER)) == own && !on(n));
            !mine().any(dedicated) && mine().count() > 1 && others.count() > 0
        };
        machines.into_iter().filter(few).map(str::to_owned).collect()
    }

    /// Evacuation policy, primary and clusters, from the tiers of its targets.
    fn targets(&mut self, name: &str, wishes: &[(&'a str, i32)]) {
        let nodes = self.section("nodes");
        let attribute = |node: &str, wanted: &str| {
            let node = nodes.iter().find(|n| n.attribute("uname") == Some(node))?;
            pairs(node, "instance_attributes").find(|(n, _)| *n == wanted).map(|(_, v)| v.to_owned())
        };
        let home = wishes.iter().find(|(_, score)| *score == HOME).map(|(node, _)| *node);
        let tier = |dedicated: bool| {
            let of = |(node, score): &(&str, i32)| {
                (*score != HOME && attribute(node, HIGH_PERFORMANCE).is_some() == dedicated)
                    .then_some(*score > FIRST_TIER)
            };
            wishes.iter().filter_map(of).max()
        };
        let evacuation = match (tier(false), tier(true)) {
            // It would go to the dedicated cluster first, if its need were high.
            (Some(false), None) => Some("dedicated-then-own"),
            (_, None) => None,
            (None, Some(_)) => Some("dedicated"),
            (Some(_), Some(false)) => Some("own-then-dedicated"),
            (Some(false), Some(true)) => Some("dedicated-then-own"),
            (Some(true), Some(true)) => {
                self.warnings.push(format!(
                    "{name} has targets of both clusters in the first tier, which no evacuation policy gives"
                ));
                Some("own-then-dedicated")
            }
        };
        let own_cluster = { wishes.iter() }
            .filter(|(node, _)| attribute(node, HIGH_PERFORMANCE).is_none())
            .find_map(|(node, _)| attribute(node, CLUSTER));
        let ids = |nodes: &mut dyn Iterator<Item = &str>| {
            nodes.filter_map(|node| attribute(node, HIGH_PERFORMANCE)).collect::<BTreeSet<String>>()
        };
        let used = ids(&mut wishes.iter().map(|(node, _)| *node).filter(|node| Some(*node) != home));
        let all = ids(&mut nodes.iter().filter_map(|n| n.attribute("uname")));
        self.maybe("primary", home);
        if home.is_some() && self.named.contains(name) {
            let mut others: Vec<&(&str, i32)> = wishes.iter().filter(|(_, score)| *score != HOME).collect();
            others.sort_by_key(|(_, score)| std::cmp::Reverse(*score));
            let standby: Vec<toml::Value> = others.into_iter().map(|(node, _)| toml::Value::from(*node)).collect();
            return self.line("standby", standby);
        }
        self.maybe("cluster", own_cluster);
        if tier(true).is_some() {
            self.line("performance", "high");
        }
        self.maybe("evacuation", evacuation);
        if let (1, Some(id), true) = (used.len(), used.first(), all.len() > 1) {
            self.line("high_performance", id.as_str());
        }
    }

    /// Primary and standby, from the constraints of a machine that is not placed.
    fn named(&mut self, at: usize, name: &str) {
        let top = self.resources[at].top().id();
        let constraint = |kind: &str| {
            let id = format!("understudy-{kind}-{top}");
            self.section("constraints").iter().find(|c| c.id() == id).and_then(|c| c.child("rule"))
        };
        let nodes = |rule: &'a Element| {
            let tests = rule.children.iter().filter(|e| e.attribute("attribute") == Some("#uname"));
            tests.filter_map(|e| e.attribute("value")).collect::<Vec<_>>()
        };
        let primary = constraint("primary").and_then(|rule| nodes(rule).first().copied());
        let permitted = constraint("location").map(nodes).unwrap_or_default();
        self.maybe("primary", primary);
        let standby: Vec<toml::Value> =
            permitted.iter().filter(|n| Some(**n) != primary).map(|n| toml::Value::from(*n)).collect();
        match primary {
            Some(_) if !standby.is_empty() => self.line("standby", standby),
            None if !permitted.is_empty() => self.warnings.push(format!(
                "{name} may only be on {}, and none of them is its primary: a policy names both",
                permitted.join(", ")
            )),
            _ => {}
        }
    }

    fn serial(&mut self, at: usize, name: &str) {
        for (parameter, guest) in [("serial0", "com1"), ("serial1", "com2")] {
            let Some(value) = self.resources[at].parameter(parameter) else { continue };
            let device = value
                .strip_prefix("board:")
                .and_then(|rest| rest.split_once('/'))
                .map(|(_, rest)| rest.split(',').next().unwrap_or(rest));
            let line = self.of("serial").into_iter().find(|i| {
                let r = &self.resources[*i];
                r.parameter("machine") == Some(name) && device.is_some() && r.parameter("device") == device
            });
            let Some(line) = line else {
                self.warnings
                    .push(format!("{parameter} of {name} ({value}) is no line of a board that the cluster runs"));
                continue;
            };
            let (board, text) = (self.board_of(line), self.resources[line].parameter("line"));
            let port = self.resources[line].parameter("listen").and_then(endpoint).map(|(_, port)| port);
            self.head("[[machines.serial]]");
            self.line("guest", guest);
            self.maybe("board", board);
            self.maybe("device", device);
            self.maybe("line", text);
            self.maybe("port", port.map(i64::from));
        }
    }

    /// What is not ours stays as it is, whatever a policy says; and what is not read is named.
    fn strangers(&mut self) {
        let known = |r: &Resource| {
            r.primitive.attribute("provider") == Some("understudy")
                || r.primitive.attribute("class") == Some("stonith")
                || r.is("ocf", Some("pacemaker"), "remote")
        };
        let others: Vec<&str> = self.resources.iter().filter(|r| !known(r)).map(|r| r.top().id()).collect();
        let constraints: Vec<&str> = self
            .section("constraints")
            .iter()
            .map(Element::id)
            .filter(|id| !PREFIXES.iter().any(|p| id.starts_with(p)))
            .collect();
        let ruled: Vec<&str> = self
            .resources
            .iter()
            .filter(|r| known(r))
            .filter(|r| r.primitive.attribute("template").is_some() || has_rules(r.top()))
            .map(|r| r.id())
            .collect();
        let tagged = self.section("tags").iter().any(|t| t.id() == TAG);
        let ours = self.resources.iter().any(known);
        let mut say = |what: &str, names: Vec<&str>| {
            if !names.is_empty() {
                self.warnings.push(format!("{what}: {}", names.join(", ")));
            }
        };
        say("resources that are not Understudy's, and stay as they are", others);
        say("constraints that are not Understudy's, and stay as they are", constraints);
        say("templates and parameters by rule are not read; look at", ruled);
        if ours && !tagged {
            self.warnings.push(
                "the cluster has no tag \"understudy\": resources that this policy does not name are not removed by apply".into(),
            );
        }
    }
}

fn has_rules(element: &Element) -> bool {
    element.children.iter().any(|c| {
        (matches!(c.name.as_str(), "instance_attributes" | "meta_attributes")
            && (c.child("rule").is_some() || c.attribute("id-ref").is_some()))
            || (c.name == "primitive" && has_rules(c))
    })
}
