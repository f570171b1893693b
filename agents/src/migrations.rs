//! `ocf:understudy:migrations`: the process that receives live migrations on a node, for all machines.

use std::time::Duration;

use ocf::action::{Action, ActionSpec};
use ocf::parameter::{Declaration, Param};
use ocf::{Agent, CheckLevel, Context, Description, Failure, Status};
use understudy_protocol::control::{ControlError, MigrationsStatus, ReplicatorRequest};
use understudy_protocol::key::DEFAULT_KEY_FILE;
use understudy_protocol::layout::{Layout, MIGRATIONS};

use crate::binaries;
use crate::paths::{RUN_ROOT, SHM_ROOT, absolute};
use crate::process::Identity;
use crate::replicator::peers;
use crate::service::{Observed, Service, ask, bring_up, check_key, stop};

const PROGRAM: &str = "understudy-replicator";

/// Nodes.
pub static PEERS: Param<String> = Param::text("peers").required().check(peers).short("Address of every node").long(
    "One NODE=HOST:PORT for each node that receives migrations, separated by blanks, e.g. \"n1=10.77.1.1:7799 n2=10.77.1.2:7799\"; this \
     node listens on its own. A node may have several addresses with commas between, as in the replicators' parameter peers. The same as the parameter migration_peers of the machines.",
);
/// Key.
pub static KEY: Param<String> = Param::text("key")
    .default(DEFAULT_KEY_FILE)
    .check(absolute)
    .short("Key file")
    .long("File with the key that the nodes know each other by and encrypt with. The same on every node, readable by root only.");

const LONG: &str = "\
Receives machines that are migrated to this node while they run: plain primitives of type ocf:understudy:vmm with the meta attribute \
allow-migrate=true. What such a machine is like is read from the cluster's configuration; a node that sends one only names it.

Configure it as a clone (interleave=true), and let machines that migrate start after it.";

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Migrations;

struct Listener<'a> {
    context: &'a Context,
    layout: Layout,
    service: Service,
}

impl<'a> Listener<'a> {
    fn new(context: &'a Context) -> ocf::Result<Self> {
        let layout = Layout::new(context.parameters.get(&RUN_ROOT)?, context.parameters.get(&SHM_ROOT)?, MIGRATIONS);
        let identity = Identity {
            pid_file: layout.replicator_pid(),
            socket: layout.replicator_socket(),
            program: PROGRAM,
            words: vec!["serve-migrations".into()],
        };
        let service = Service { identity, log: layout.replicator_log() };
        Ok(Self { context, layout, service })
    }

    fn ask<R: serde::de::DeserializeOwned>(
        &self,
        request: &ReplicatorRequest,
        patience: Duration,
    ) -> Result<R, ControlError> {
        ask(&self.layout.replicator_socket(), request, patience)
    }

    fn observe(&self, limit: Duration) -> Observed<MigrationsStatus> {
        self.service.observe(|p| self.ask(&ReplicatorRequest::Status, p), self.context.deadline.within(limit))
    }

    fn end(&self) -> ocf::Result {
        self.service.end(self.context, |patience| self.ask(&ReplicatorRequest::Quit, patience))
    }

    fn launch(&self) -> ocf::Result {
        let program = binaries::locate(&self.context.environment, PROGRAM)?;
        let arguments = self.command_line()?;
        self.service.launch(self.context, &program, &arguments, |patience| {
            self.ask::<MigrationsStatus>(&ReplicatorRequest::Status, patience).map(drop)
        })
    }

    fn command_line(&self) -> ocf::Result<Vec<String>> {
        let p = &self.context.parameters;
        let node = self.context.environment.node();
        let peers = p.get(&PEERS)?;
        let own = peers.split_whitespace().find_map(|e| e.split_once('=').filter(|(n, _)| *n == node));
        let (_, listen) =
            own.ok_or_else(|| Failure::arguments(format!("parameter peers has no address for this node ({node})")))?;
        let me = std::env::current_exe()
            .map_err(|e| Failure::generic(format!("cannot tell where understudy-ocf is: {e}")))?;
        let hook = format!("{} hook --node {node}", me.display());
        let (run_root, shm_root, key) = (p.get(&RUN_ROOT)?, p.get(&SHM_ROOT)?, p.get(&KEY)?);
        let mut line = vec!["serve-migrations".to_owned()];
        let options = [
            ("node", node.as_str()),
            ("listen", listen),
            ("key", &key),
            ("hook", &hook),
            ("run-root", &run_root),
            ("shm-root", &shm_root),
        ];
        for (name, value) in options {
            line.extend([format!("--{name}"), value.to_owned()]);
        }
        Ok(line)
    }
}

fn declarations() -> Vec<&'static Declaration> {
    vec![PEERS.declaration(), KEY.declaration(), RUN_ROOT.declaration(), SHM_ROOT.declaration()]
}

impl Agent for Migrations {
    fn description(&self) -> Description {
        Description {
            name: "migrations",
            version: env!("CARGO_PKG_VERSION"),
            short: "Receives virtual machines that migrate",
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
        let listener = Listener::new(context)?;
        let observed = listener.observe(Duration::from_secs(5));
        bring_up(context, observed, "migrations are received already", || listener.end(), || listener.launch())
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        stop(context, Listener::new(context), |listener| listener.end())
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        let listener = Listener::new(context)?;
        match listener.observe(context.deadline.remaining()) {
            Observed::Answers(_) => Ok(Status::Running),
            Observed::Silent(process, why) => Err(Failure::generic(format!(
                "the process that receives migrations ({}) lives and does not answer: {why}",
                process.pid()
            ))),
            Observed::Gone => listener.service.absent(context, "the process that receives migrations has crashed"),
        }
    }
}
