//! `ocf:understudy:monitor`: the monitor of a node, which watches all nodes and machines over two networks.

use std::path::Path;
use std::time::Duration;

use ocf::action::{Action, ActionSpec};
use ocf::parameter::{Declaration, Param};
use ocf::{Agent, CheckLevel, Context, Description, Failure, Status};
use understudy_monitor::matrix::Matrix;
use understudy_monitor::report::{DIRECTORY, Report, Request, socket};
use understudy_protocol::control::ControlError;
use understudy_protocol::key::DEFAULT_KEY_FILE;

use crate::binaries;
use crate::paths::{RUN_ROOT, absolute};
use crate::process::Identity;
use crate::service::{Observed, Service, ask, bring_up, check_key, stop};

const PROGRAM: &str = "understudy-monitor";

/// Addresses in the production network.
pub static PRODUCTION: Param<String> =
    Param::text("production").required().check(addresses).short("Nodes in the production network").long(
        "One NODE=HOST:PORT for each node that is monitored, separated by blanks: where it hears heartbeats in the production (business) \
         network. This node listens on its own.",
    );
/// Addresses in the management network.
pub static MANAGEMENT: Param<String> = Param::text("management").check(addresses).short("Nodes in the management network").long(
    "The same in the management network, by which a node that is cut off from production still says so. Without it, it is as silent as if \
     its monitor had ended.",
);
/// Racks.
pub static RACKS: Param<String> = Param::text("racks")
    .check(pairs)
    .short("Nodes' racks")
    .long("NODE=RACK, separated by blanks: so that a rack's switch is told from a node's cable.");
/// Key.
pub static KEY: Param<String> = Param::text("key")
    .default(DEFAULT_KEY_FILE)
    .check(absolute)
    .short("Key file")
    .long("File with the key that heartbeats are signed with. The same on every node, readable by root only.");
/// Heartbeats.
pub static INTERVAL_MS: Param<u64> = Param::integer("interval_ms", 20, 60_000)
    .default("1000")
    .short("Heartbeat interval (ms)")
    .long("Every node says so often, to every other one and over both networks, that it is there and how its machines are.");
/// Silence.
pub static MISSED: Param<u64> = Param::integer("missed", 2, 100)
    .default("4")
    .short("Heartbeats that are silence")
    .long("So many heartbeats that do not come are silence.");
/// Patience.
pub static RESTART_AFTER: Param<Duration> = Param::time("restart_after").default("60s").short("Time for a restart").long(
    "For so long the cluster may restart on its node what does not answer, before that counts as failed and the fault matrix says what \
     follows then.",
);
/// Rows.
pub static MATRIX: Param<String> = Param::text("matrix").check(matrix).short("Rows of the fault matrix").long(
    "Rows besides the default ones (understudy-crm matrix prints those), in one line of TOML: matrix = [{ name = 'ours', management = \
     'up', production = 'rack', verdict = 'alarm' }].",
);
/// Management controllers.
pub static BMC: Param<bool> = Param::boolean("bmc").default("true").short("Ask BMCs").long(
    "Whether the node that speaks for all asks the fencing devices of hosts that are gone for their power state (action status, nothing else).",
);
/// Node health.
pub static HEALTH: Param<bool> = Param::boolean("health").default("false").short("Tell node health").long(
    "Whether a node that is cut off from the production network says so to Pacemaker (#health-understudy=red; the property \
     node-health-strategy decides what follows: with migrate-on-red everything leaves the node, and what no other node can hold is stopped).",
);

fn pairs(value: &str) -> Result<(), String> {
    let bad = value.split_whitespace().find(|w| w.split_once('=').is_none_or(|(n, v)| n.is_empty() || v.is_empty()));
    bad.map_or(Ok(()), |bad| Err(format!("has \"{bad}\", which is not NODE=…")))
}

fn addresses(value: &str) -> Result<(), String> {
    pairs(value)?;
    let port = |word: &str| word.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let bad = value.split_whitespace().find(|word| !port(word));
    bad.map_or(Ok(()), |bad| Err(format!("has \"{bad}\", which is not NODE=HOST:PORT")))
}

fn matrix(value: &str) -> Result<(), String> {
    Matrix::read_line(value).map(drop).map_err(|why| format!("is not usable: {why}"))
}

const LONG: &str = "\
The monitor of a node. All of them hear each other's heartbeats in the production and in the management network and know the cluster's \
membership; together that says whether a cable, a switch, a host, a machine or a whole network is ill, and what follows (the fault matrix: \
understudy-crm matrix). understudy-monitor status prints it; the first node that is heard writes it into its log.

Configure it as a clone (interleave=true). One that does not answer is restarted on its node. It touches nothing by itself: it says what \
is so, in the node attribute understudy-production, and to the evacuation controller. With health=true give it the meta attribute \
allow-unhealthy-nodes=true, or it leaves with everything else and never sees that its network is back.";

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Monitor;

struct Watcher<'a> {
    context: &'a Context,
    root: String,
    service: Service,
}

impl<'a> Watcher<'a> {
    fn new(context: &'a Context) -> ocf::Result<Self> {
        let root = context.parameters.get(&RUN_ROOT)?;
        let dir = Path::new(&root).join(DIRECTORY);
        let identity = Identity {
            pid_file: dir.join("monitor.pid"),
            socket: socket(Path::new(&root)),
            program: PROGRAM,
            words: vec!["serve".into()],
        };
        Ok(Self { context, service: Service { identity, log: dir.join("monitor.log") }, root })
    }

    fn status(&self, patience: Duration) -> Result<Report, ControlError> {
        ask(&socket(Path::new(&self.root)), &Request::Status, patience)
    }

    fn observe(&self, limit: Duration) -> Observed<Report> {
        self.service.observe(|patience| self.status(patience), self.context.deadline.within(limit))
    }

    fn end(&self) -> ocf::Result {
        let quit = |patience| ask(&socket(Path::new(&self.root)), &Request::Quit, patience);
        self.service.end(self.context, quit)
    }

    fn launch(&self) -> ocf::Result {
        let program = binaries::locate(&self.context.environment, PROGRAM)?;
        self.service.launch(self.context, &program, &self.command_line()?, |patience| self.status(patience).map(drop))
    }

    fn command_line(&self) -> ocf::Result<Vec<String>> {
        let p = &self.context.parameters;
        let node = self.context.environment.node();
        let production = p.get(&PRODUCTION)?;
        if !production.split_whitespace().any(|word| word.split_once('=').is_some_and(|(name, _)| name == node)) {
            return Err(Failure::arguments(format!("parameter production has no address for this node ({node})")));
        }
        let options = [
            ("node", Some(node)),
            ("production", Some(production)),
            ("management", p.find(&MANAGEMENT)?),
            ("racks", p.find(&RACKS)?),
            ("key", Some(p.get(&KEY)?)),
            ("interval-ms", Some(p.get(&INTERVAL_MS)?.to_string())),
            ("missed", Some(p.get(&MISSED)?.to_string())),
            ("restart-ms", Some(p.get(&RESTART_AFTER)?.as_millis().to_string())),
            ("matrix", p.find(&MATRIX)?),
            ("run-root", Some(self.root.clone())),
        ];
        let mut line = vec!["serve".to_owned()];
        for (name, value) in options {
            line.extend(value.into_iter().flat_map(|value| [format!("--{name}"), value]));
        }
        line.extend((!p.get(&BMC)?).then(|| "--no-bmc".to_owned()));
        line.extend(p.get(&HEALTH)?.then(|| "--health".to_owned()));
        Ok(line)
    }
}

fn declarations() -> Vec<&'static Declaration> {
    vec![
        PRODUCTION.declaration(),
        MANAGEMENT.declaration(),
        RACKS.declaration(),
        KEY.declaration(),
        INTERVAL_MS.declaration(),
        MISSED.declaration(),
        RESTART_AFTER.declaration(),
        MATRIX.declaration(),
        BMC.declaration(),
        HEALTH.declaration(),
        RUN_ROOT.declaration(),
    ]
}

impl Agent for Monitor {
    fn description(&self) -> Description {
        Description {
            name: "monitor",
            version: env!("CARGO_PKG_VERSION"),
            short: "Watches nodes and machines over two networks",
            long: LONG,
            parameters: declarations(),
            actions: vec![
                ActionSpec::new(Action::Start, "20s"),
                ActionSpec::new(Action::Stop, "30s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s"),
            ],
        }
    }

    fn validate(&self, context: &Context, level: CheckLevel) -> ocf::Result {
        if level == CheckLevel::Parameters {
            return Ok(());
        }
        binaries::locate(&context.environment, PROGRAM)?;
        check_key(&context.parameters.get(&KEY)?, "this node")
    }

    fn start(&self, context: &Context) -> ocf::Result {
        let watcher = Watcher::new(context)?;
        let observed = watcher.observe(Duration::from_secs(5));
        bring_up(context, observed, "the monitor runs already", || watcher.end(), || watcher.launch())
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        stop(context, Watcher::new(context), |watcher| watcher.end())
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        let watcher = Watcher::new(context)?;
        match watcher.observe(context.deadline.remaining()) {
            Observed::Answers(_) => Ok(Status::Running),
            Observed::Silent(process, why) => Err(Failure::generic(format!(
                "the monitor of this node (process {}) lives and does not answer: {why}",
                process.pid()
            ))),
            Observed::Gone => watcher.service.absent(context, "the monitor of this node has crashed"),
        }
    }
}
