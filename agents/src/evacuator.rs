//! `ocf:understudy:evacuator`: the evacuation controller, one instance in the cluster, on any node.

use std::time::Duration;

use ocf::action::{Action, ActionSpec};
use ocf::parameter::{Declaration, Param};
use ocf::{Agent, CheckLevel, Context, Description, Failure, Status};
use understudy_protocol::control::ControlError;
use understudy_protocol::evacuator::{EvacuatorFiles, EvacuatorRequest, EvacuatorStatus};

use crate::binaries;
use crate::paths::{RUN_ROOT, absolute};
use crate::process::Identity;
use crate::service::{Observed, Service, ask, bring_up, stop};

const PROGRAM: &str = "understudy-evacuator";

/// Journal.
pub static JOURNAL: Param<String> = Param::text("journal")
    .default("/var/log/understudy/evacuation.journal")
    .check(absolute)
    .short("Journal")
    .long("File to which every event is appended, a line of JSON each. Each node has its own part; understudy-crm watch shows the newest from any node.");

/// How long it may be without a round.
pub static PATIENCE: Param<u64> = Param::integer("patience", 5, 3600)
    .default("60")
    .short("Longest time without a round (s)")
    .long("If the controller has not looked at the cluster and acted for as many seconds, its monitor fails, and the cluster starts it elsewhere.");

const LONG: &str = "\
Brings machines elsewhere whose hosts have died: makes a plan by the evacuation policies, asks where the policy says so, and gives the machines their \
new node batch by batch. All that it knows stands in the cluster's configuration, so it may be stopped, killed or moved at any moment.

Configure it as one primitive, without constraints but that it does not run on remote nodes; understudy-crm does so for a policy that needs it.";

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Evacuator;

struct Controller<'a> {
    context: &'a Context,
    files: EvacuatorFiles,
    service: Service,
}

impl<'a> Controller<'a> {
    fn new(context: &'a Context) -> ocf::Result<Self> {
        let files = EvacuatorFiles::below(context.parameters.get(&RUN_ROOT)?);
        let identity =
            Identity { pid_file: files.pid(), socket: files.socket(), program: PROGRAM, words: vec!["run".into()] };
        let service = Service { identity, log: files.log() };
        Ok(Self { context, files, service })
    }

    fn ask<R: serde::de::DeserializeOwned>(
        &self,
        request: EvacuatorRequest,
        patience: Duration,
    ) -> Result<R, ControlError> {
        ask(&self.files.socket(), &request, patience)
    }

    fn observe(&self, limit: Duration) -> Observed<EvacuatorStatus> {
        self.service.observe(|p| self.ask(EvacuatorRequest::Status, p), self.context.deadline.within(limit))
    }

    fn end(&self) -> ocf::Result {
        self.service.end(self.context, |patience| self.ask(EvacuatorRequest::Quit, patience))
    }

    fn launch(&self) -> ocf::Result {
        let program = binaries::locate(&self.context.environment, PROGRAM)?;
        let p = &self.context.parameters;
        let mut line = vec!["run".to_owned()];
        let options =
            [("node", self.context.environment.node()), ("run-root", p.get(&RUN_ROOT)?), ("journal", p.get(&JOURNAL)?)];
        for (name, value) in options {
            line.extend([format!("--{name}"), value]);
        }
        self.service.launch(self.context, &program, &line, |patience| {
            self.ask::<EvacuatorStatus>(EvacuatorRequest::Status, patience).map(drop)
        })
    }
}

fn declarations() -> Vec<&'static Declaration> {
    vec![JOURNAL.declaration(), PATIENCE.declaration(), RUN_ROOT.declaration()]
}

impl Agent for Evacuator {
    fn description(&self) -> Description {
        Description {
            name: "evacuator",
            version: env!("CARGO_PKG_VERSION"),
            short: "Brings virtual machines elsewhere whose hosts have died",
            long: LONG,
            parameters: declarations(),
            actions: vec![
                ActionSpec::new(Action::Start, "20s"),
                ActionSpec::new(Action::Stop, "20s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s"),
            ],
        }
    }

    fn validate(&self, context: &Context, level: CheckLevel) -> ocf::Result {
        if level == CheckLevel::Parameters {
            return Ok(());
        }
        binaries::locate(&context.environment, PROGRAM).map(drop)
    }

    fn start(&self, context: &Context) -> ocf::Result {
        let controller = Controller::new(context)?;
        let observed = controller.observe(Duration::from_secs(5));
        bring_up(context, observed, "the controller runs already", || controller.end(), || controller.launch())
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        stop(context, Controller::new(context), |controller| controller.end())
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        let controller = Controller::new(context)?;
        let patience = context.parameters.get(&PATIENCE)?;
        match controller.observe(context.deadline.remaining()) {
            // A probe asks whether it is there, not how well.
            Observed::Answers(status) if !context.is_probe() && status.last_round_ms > patience * 1000 => {
                let why = if status.trouble.is_empty() { "it says nothing of why" } else { &status.trouble };
                let seconds = status.last_round_ms / 1000;
                Err(Failure::generic(format!("the controller has come to no end of a round for {seconds} s: {why}")))
            }
            Observed::Answers(_) => Ok(Status::Running),
            Observed::Silent(process, why) => Err(Failure::generic(format!(
                "the controller (process {}) lives and does not answer: {why}",
                process.pid()
            ))),
            Observed::Gone => controller.service.absent(context, "the controller has crashed"),
        }
    }
}
