//! Is the policy one that can work? Every complaint names a line and says what to do.
//!
//! Errors are what would give a configuration that Pacemaker refuses or that cannot do what it promises; warnings are
//! what works and will be regretted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use understudy_protocol::cdrom::{self, CdromSpec};
use understudy_protocol::disk::{DiskSpec, check_list};
use understudy_protocol::layout::valid_machine_name;
use understudy_protocol::nic;

use crate::compile::Ports;
use crate::placement::{Placed, place};
use crate::policy::{Machine, Policy, Spanned, WatchdogAction};

mod alerts;
mod estate;
mod monitoring;

/// How bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is written from such a policy.
    Error,
    /// Works, but.
    Warning,
    /// Is written down and not acted on yet, or has a consequence that one should know.
    Note,
}

/// One complaint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// Line in the file, from 1; `None` when it is about the whole.
    pub line: Option<usize>,
    /// Column in that line, in characters from 1.
    pub column: Option<usize>,
    /// A sentence.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, self.column) {
            (Some(line), Some(column)) => write!(f, "line {line}, column {column}: ")?,
            (Some(line), None) => write!(f, "line {line}: ")?,
            _ => {}
        }
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        write!(f, "{severity}: {}", self.what)
    }
}

/// Read and check a policy's text. Without an error among the findings there is a policy.
pub fn read(text: &str) -> (Option<Policy>, Vec<Finding>) {
    let policy = match Policy::parse(text) {
        Ok(policy) => policy,
        Err(e) => {
            let (line, column) = e.span.map(|span| position(text, span.start)).unzip();
            return (None, vec![Finding { severity: Severity::Error, line, column, what: e.why }]);
        }
    };
    let findings = check(&policy, text);
    let usable = findings.iter().all(|f| f.severity != Severity::Error);
    (usable.then_some(policy), findings)
}

/// Line and column, both from 1.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.rfind('\n').map_or(0, |at| at + 1);
    (1 + before.bytes().filter(|b| *b == b'\n').count(), 1 + before[line..].chars().count())
}

struct Checker<'a> {
    text: &'a str,
    findings: Vec<Finding>,
}

impl Checker<'_> {
    fn say<T>(&mut self, severity: Severity, at: Option<&Spanned<T>>, what: String) {
        let span = at.map(|s| s.span()).filter(|span| span.end > 0);
        let (line, column) = span.map(|span| position(self.text, span.start)).unzip();
        self.findings.push(Finding { severity, line, column, what });
    }

    fn error<T>(&mut self, at: &Spanned<T>, what: impl Into<String>) {
        self.say(Severity::Error, Some(at), what.into());
    }

    fn warn<T>(&mut self, at: &Spanned<T>, what: impl Into<String>) {
        self.say(Severity::Warning, Some(at), what.into());
    }

    fn note<T>(&mut self, at: &Spanned<T>, what: impl Into<String>) {
        self.say(Severity::Note, Some(at), what.into());
    }

    fn whole(&mut self, severity: Severity, what: impl Into<String>) {
        self.say::<()>(severity, None, what.into());
    }

    fn absolute(&mut self, what: &str, path: &Spanned<String>) {
        if !path.get_ref().starts_with('/') || path.get_ref().contains(char::is_whitespace) {
            self.error(path, format!("{what} {:?} must be an absolute path without blanks", path.get_ref()));
        }
    }

    fn address(&mut self, what: &str, address: &Spanned<String>) {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | ':' | '-' | '_');
        if address.get_ref().is_empty() || !address.get_ref().chars().all(ok) {
            self.error(address, format!("{what} {:?} is neither an IP address nor a host's name", address.get_ref()));
        }
    }

    /// What becomes a node attribute's value, and part of what people read.
    fn label(&mut self, what: &str, name: &Spanned<String>) {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let text = name.get_ref();
        if text.is_empty() || text.len() > 63 || !text.chars().all(ok) {
            self.error(name, format!("{what} {text:?}: use 1 to 63 letters, digits, '.', '-' and '_'"));
        }
    }

    fn host_name(&mut self, what: &str, name: &Spanned<String>) {
        let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let text = name.get_ref();
        if text.is_empty() || !text.starts_with(|c: char| c.is_ascii_alphabetic()) || !text.chars().all(ok) {
            self.error(
                name,
                format!(
                    "{what} {text:?}: use letters, digits, '.', '-' and '_', beginning with a letter (it becomes an id)"
                ),
            );
        }
    }
}

/// Check a policy that was read from `text`.
pub fn check(policy: &Policy, text: &str) -> Vec<Finding> {
    let mut c = Checker { text, findings: Vec::new() };
    c.absolute("key file", &policy.cluster.key);
    if policy.cluster.stickiness > 100_000 {
        c.whole(Severity::Error, "cluster.stickiness must be at most 100000");
    }
    nodes_and_boards(&mut c, policy);
    fencing(&mut c, policy);
    names(&mut c, policy);
    estate::check(&mut c, policy);
    monitoring::check(&mut c, policy);
    alerts::check(&mut c, policy);
    let ports = Ports::assign(policy);
    // Placement trusts names and numbers; what it would say of wrong ones is of no use.
    let sound = c.findings.iter().all(|f| f.severity != Severity::Error);
    let placed = if policy.places() && sound { place(policy) } else { Vec::new() };
    estate::placed(&mut c, policy, &placed);
    let mut replication = BTreeMap::new();
    for (index, machine) in policy.machines.iter().enumerate() {
        machine_alone(&mut c, machine);
        placement(&mut c, policy, machine, placed.get(index));
        serial(&mut c, policy, machine);
        let port = ports.replication(index);
        if machine.protected()
            && let Some(other) = replication.insert(port, machine.name.get_ref())
        {
            let at = machine.port.as_ref().map_or(machine.name.span(), |p| p.span());
            let what = format!("replication port {port} is that of machine {other} already; choose another");
            c.error(&Spanned::new(at, ()), what);
        }
    }
    serial_ports(&mut c, policy, &ports);
    c.findings.sort_by_key(|f| (f.severity, f.line));
    c.findings
}

fn nodes_and_boards(c: &mut Checker, policy: &Policy) {
    if policy.nodes.is_empty() {
        c.whole(Severity::Error, "there is no [[nodes]] section: name the cluster's hosts");
    }
    for node in &policy.nodes {
        c.host_name("node name", &node.name);
        for address in [&node.storage, &node.storage2, &node.management, &node.business].into_iter().flatten() {
            c.address("address", address);
        }
    }
    for board in &policy.boards {
        c.host_name("board name", &board.name);
        c.address("server", &board.server);
        if let Some(address) = &board.business {
            c.address("address", address);
        }
    }
}

fn fencing(c: &mut Checker, policy: &Policy) {
    let known: BTreeSet<&str> = hosts(policy).map(|h| h.get_ref().as_str()).collect();
    let mut covered = BTreeSet::new();
    for device in &policy.fencing {
        c.host_name("fencing device", &device.name);
        c.host_name("fence agent", &device.agent);
        if device.nodes.is_empty() {
            c.error(&device.name, "this device fences nothing: list the nodes that it can switch off");
        }
        for node in &device.nodes {
            if !known.contains(node.get_ref().as_str()) {
                c.error(node, format!("{} is no node and no board of this policy", node.get_ref()));
            }
            covered.insert(node.get_ref().as_str());
        }
        if !(1..=9).contains(&device.level) {
            c.error(&device.name, "level must be 1 to 9");
        }
        if device.interval.0 == 0 {
            c.error(&device.name, "interval must not be 0");
        }
    }
    if policy.fencing.is_empty() {
        c.whole(
            Severity::Error,
            "there is no [[fencing]] section: Pacemaker starts nothing without fencing, and no takeover is safe without it",
        );
        return;
    }
    for node in policy.nodes.iter().filter(|n| !covered.contains(n.name.get_ref().as_str())) {
        c.warn(
            &node.name,
            format!(
                "no fencing device covers node {0}: if it dies, nothing that ran on {0} is taken over",
                node.name.get_ref()
            ),
        );
    }
    for board in policy.boards.iter().filter(|b| !covered.contains(b.name.get_ref().as_str())) {
        let what = format!(
            "no fencing device covers board {0}: if it is lost, its lines stay down until `stonith_admin --confirm {0}`",
            board.name.get_ref()
        );
        c.warn(&board.name, what);
    }
}

fn hosts(policy: &Policy) -> impl Iterator<Item = &Spanned<String>> {
    policy.nodes.iter().map(|n| &n.name).chain(policy.boards.iter().map(|b| &b.name))
}

/// Everything that becomes an id or a directory is there once.
fn names(c: &mut Checker, policy: &Policy) {
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    let machines = policy.machines.iter().map(|m| ("machine", &m.name));
    let nodes = policy.nodes.iter().map(|n| ("node", &n.name));
    let boards = policy.boards.iter().map(|b| ("board", &b.name));
    let devices = policy.fencing.iter().map(|f| ("fencing device", &f.name));
    for (kind, name) in nodes.chain(boards).chain(devices) {
        if let Some(before) = seen.insert(name.get_ref(), kind) {
            c.error(name, format!("the name {} is that of a {before} already", name.get_ref()));
        }
    }
    for own in ["understudy-monitor", "understudy-monitor-clone"] {
        if let Some((name, kind)) = seen.get_key_value(own).filter(|_| policy.monitoring.is_some()) {
            c.whole(Severity::Error, format!("the {kind} {name} has the name of the monitors' resource; rename it"));
        }
    }
    let mut machine_names = BTreeSet::new();
    for (_, name) in machines {
        if !machine_names.insert(name.get_ref().as_str()) {
            c.error(name, format!("there are two machines {}", name.get_ref()));
        }
    }
    // A board "vm-demo" would have the id of a machine's resource.
    for (name, kind) in seen {
        for machine in &policy.machines {
            let m = machine.name.get_ref();
            if [format!("vm-{m}"), format!("vm-{m}-clone"), format!("repl-{m}"), format!("repl-{m}-clone")]
                .contains(&name.to_string())
            {
                c.error(
                    &machine.name,
                    format!("the {kind} {name} has the name of a resource of machine {m}; rename one"),
                );
            }
        }
    }
}

fn machine_alone(c: &mut Checker, machine: &Machine) {
    let name = machine.name.get_ref();
    if !valid_machine_name(name) {
        c.error(
            &machine.name,
            format!(
                "machine name {name:?}: use 1 to 63 letters, digits, '-' and '_', beginning with a letter or digit"
            ),
        );
    }
    if !(1..=32).contains(machine.vcpus.get_ref()) {
        c.error(&machine.vcpus, format!("vcpus is {}; a machine has 1 to 32", machine.vcpus.get_ref()));
    }
    if !(1..=1 << 22).contains(&machine.memory) {
        c.error(&machine.name, format!("memory of machine {name} is {} MiB; it must be 1 to 4194304", machine.memory));
    }
    c.absolute("kernel", &machine.kernel);
    if let Some(initrd) = &machine.initrd {
        c.absolute("initrd", initrd);
    }
    if machine.cmdline.as_ref().is_some_and(|line| line.contains(char::is_control)) {
        c.error(&machine.name, "cmdline must be one line");
    }
    disks(c, machine);
    nics(c, machine);
    watchdog(c, machine);
    if machine.interval_ms.is_some_and(|ms| !(1..=60_000).contains(&ms)) {
        c.error(&machine.name, "interval_ms must be 1 to 60000");
    }
    if machine.peer_timeout_ms.is_some_and(|ms| !(50..=600_000).contains(&ms)) {
        c.error(&machine.name, "peer_timeout_ms must be 50 to 600000");
    }
    let monitor = machine.monitor;
    if monitor.primary.0 == 0 || monitor.standby.0 == 0 {
        c.error(&machine.name, "monitor intervals must not be 0: failures would never be noticed");
    } else if monitor.primary == monitor.standby {
        let what = format!(
            "monitor.primary and monitor.standby are both {}: Pacemaker needs different intervals for the two roles",
            monitor.primary
        );
        c.error(&machine.name, what);
    }
}

fn watchdog(c: &mut Checker, machine: &Machine) {
    let Some(action) = &machine.watchdog_action else { return };
    if machine.watchdog.is_none() {
        c.error(action, "watchdog_action without a watchdog: say watchdog = \"i6300esb\"");
    }
    if machine.protected() && *action.get_ref() == WatchdogAction::Restart {
        c.error(
            action,
            "a protected machine is not restarted for a guest that hangs: it hangs in its standby's image too. \"reset\" resets it where it is, and it stays protected",
        );
    }
}

fn nics(c: &mut Checker, machine: &Machine) {
    let mut good = Vec::new();
    for text in &machine.nics {
        match text.get_ref().parse::<nic::NicSpec>() {
            Ok(card) => {
                good.push(card);
                if let Err(e) = nic::check_list(&good) {
                    c.error(text, e.to_string());
                    good.pop();
                }
            }
            Err(e) => c.error(text, e.to_string()),
        }
    }
}

fn disks(c: &mut Checker, machine: &Machine) {
    let mut good = Vec::new();
    for text in &machine.disks {
        match text.get_ref().parse::<DiskSpec>() {
            Ok(disk) => {
                good.push(disk);
                if let Err(e) = check_list(&good) {
                    c.error(text, e.to_string());
                    good.pop();
                }
            }
            Err(e) => c.error(text, e.to_string()),
        }
    }
    let mut drives = Vec::new();
    for text in &machine.cdroms {
        match text.get_ref().parse::<CdromSpec>() {
            Ok(drive) => {
                drives.push(drive);
                if let Err(e) = cdrom::check_list(&drives, &good) {
                    c.error(text, e.to_string());
                    drives.pop();
                }
            }
            Err(e) => c.error(text, e.to_string()),
        }
    }
    if let Some(migrate) = machine.migrate.as_ref().filter(|migrate| *migrate.get_ref() && !good.is_empty()) {
        c.error(migrate, "a machine with disks cannot be migrated live yet: protect it, and it moves by a hand-over");
    }
}

fn placement(c: &mut Checker, policy: &Policy, machine: &Machine, placed: Option<&Placed>) {
    let known = |name: &str| policy.nodes.iter().any(|n| n.name.get_ref() == name);
    let unknown = |name: &str| {
        if policy.boards.iter().any(|b| b.name.get_ref() == name) {
            format!("{name} is a board; machines run on nodes")
        } else {
            format!("{name} is not a node of this policy")
        }
    };
    if let Some(primary) = &machine.primary {
        if !known(primary.get_ref()) {
            c.error(primary, unknown(primary.get_ref()));
        }
        if machine.standby.as_ref().is_some_and(|s| s.get_ref().names().contains(primary.get_ref())) {
            c.error(primary, format!("{} cannot be its own standby", primary.get_ref()));
        }
    }
    if let Some(standby) = &machine.standby {
        let mut seen = BTreeSet::new();
        for name in standby.get_ref().names() {
            if !known(name) {
                c.error(standby, unknown(name));
            }
            if !seen.insert(name) {
                c.error(standby, format!("standby {name} is listed twice"));
            }
        }
        if machine.primary.is_none() {
            c.error(standby, "standby without primary: say which node should run the machine");
        }
    }
    let candidates: Vec<_> = match placed {
        Some(placed) => placed.targets.iter().map(|t| &policy.nodes[t.node]).collect(),
        None => policy.candidates(machine).collect(),
    };
    let mirrored = |text: &&Spanned<String>| text.get_ref().parse::<DiskSpec>().is_ok_and(|disk| disk.mirrored);
    if let Some(disk) = machine.disks.iter().find(mirrored) {
        if !machine.protected() {
            c.error(disk, "only a protected machine has mirrored disks: nobody else would keep their copies in step");
        }
        if candidates.len() > 2 {
            let what = format!(
                "a machine with a mirrored disk runs on two nodes, and {} can hold {}: name its primary and its one standby",
                candidates.len(),
                machine.name.get_ref()
            );
            c.error(disk, what);
        }
    }
    if let Some(migrate) = machine.migrate.as_ref().filter(|migrate| *migrate.get_ref()) {
        if machine.protected() {
            c.error(migrate, "a protected machine moves by a hand-over: migrate is for protection = \"none\"");
        }
        for node in policy.nodes.iter().filter(|n| n.replication_address().is_none()) {
            let node = node.name.get_ref();
            c.error(
                migrate,
                format!(
                    "node {node} has neither a storage nor a management address on which it could receive migrations"
                ),
            );
        }
    }
    if machine.protected() {
        if candidates.len() < 2 {
            let what = format!(
                "machine {} is protected and needs two nodes; only {} can hold it. Add a node, or say protection = \"none\"",
                machine.name.get_ref(),
                candidates.len()
            );
            c.error(&machine.name, what);
        }
        for node in candidates.iter().filter(|n| n.replication_address().is_none()) {
            let (node, machine) = (node.name.clone(), machine.name.get_ref());
            let what = format!(
                "node {} has neither a storage nor a management address, so {machine}'s checkpoints cannot reach it",
                node.get_ref()
            );
            c.error(&node, what);
        }
    }
    for node in candidates.iter().filter(|_| placed.is_none()) {
        if node.memory.is_some_and(|memory| memory < machine.memory) {
            let (name, m) = (node.name.get_ref(), machine.name.get_ref());
            let what = format!(
                "node {name} cannot hold machine {m}: it has {} MiB, {m} needs {}",
                node.memory.unwrap_or(0),
                machine.memory
            );
            c.warn(&machine.name, what);
        }
    }
}

fn serial(c: &mut Checker, policy: &Policy, machine: &Machine) {
    let mut guest_ports = BTreeSet::new();
    for line in &machine.serial {
        if !guest_ports.insert(line.guest) {
            c.error(
                &line.device,
                format!("{:?} of machine {} has two lines; say guest = \"com2\"", line.guest, machine.name.get_ref()),
            );
        }
        if !policy.boards.iter().any(|b| b.name == line.board) {
            c.error(&line.board, format!("{} is not a board of this policy", line.board.get_ref()));
        }
        let device = line.device.get_ref();
        if !valid_machine_name(device) {
            let what = format!(
                "device {device:?}: use 1 to 63 letters, digits, '-' and '_', beginning with a letter or digit"
            );
            c.error(&line.device, what);
        }
        if !is_line(line.line.get_ref()) {
            let what = format!(
                "line {:?}: give tty:/dev/ttyS0,115200 or pty:/LINK or tcp:HOST:PORT or tcp-listen:ADDRESS:PORT",
                line.line.get_ref()
            );
            c.error(&line.line, what);
        }
    }
}

/// What the board's service can open.
fn is_line(text: &str) -> bool {
    let endpoint =
        |a: &str| a.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    !text.contains(char::is_whitespace)
        && match text.split_once(':') {
            Some(("tty" | "pty", path)) => path.starts_with('/'),
            Some(("tcp" | "tcp-listen", address)) => endpoint(address),
            _ => false,
        }
}

/// One device and one port of a board serve one line.
fn serial_ports(c: &mut Checker, policy: &Policy, ports: &Ports) {
    let mut devices = BTreeMap::new();
    let mut taken = BTreeMap::new();
    for (m, machine) in policy.machines.iter().enumerate() {
        for (s, line) in machine.serial.iter().enumerate() {
            let (board, name) = (line.board.get_ref(), machine.name.get_ref());
            if let Some(other) = devices.insert((board, line.device.get_ref()), name) {
                c.error(
                    &line.device,
                    format!("device {} of {board} belongs to machine {other} already", line.device.get_ref()),
                );
            }
            let port = ports.serial(m, s);
            if let Some(other) = taken.insert((board, port), line.device.get_ref()) {
                c.error(
                    &line.device,
                    format!("port {port} of {board} is that of line {other} already; choose another"),
                );
            }
        }
    }
}
