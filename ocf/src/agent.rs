//! The agent trait, and the one function that turns an action's name into an exit code.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::action::{Action, ActionSpec};
use crate::deadline::Deadline;
use crate::environment::Environment;
use crate::exit::{ExitCode, Failure, Result};
use crate::log::Log;
use crate::metadata;
use crate::parameter::{Declaration, Parameters, parse_time};

/// What an agent says about itself. An action that is not listed here is not implemented.
#[derive(Debug, Clone)]
pub struct Description {
    /// Type name, as in `ocf:provider:NAME`.
    pub name: &'static str,
    /// The agent's own version.
    pub version: &'static str,
    /// Headline.
    pub short: &'static str,
    /// The whole story.
    pub long: &'static str,
    /// Parameters, in the order in which people should read them.
    pub parameters: Vec<&'static Declaration>,
    /// Actions. `meta-data` and `validate-all` are added by themselves.
    pub actions: Vec<ActionSpec>,
}

/// How a resource is, as `monitor` sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Certainly stopped.
    NotRunning,
    /// Running, not promoted.
    Running,
    /// Running, promoted.
    RunningPromoted,
    /// Running with reduced service.
    Degraded,
    /// Running promoted with reduced service.
    DegradedPromoted,
}

impl Status {
    fn exit_code(self) -> ExitCode {
        match self {
            Self::NotRunning => ExitCode::NotRunning,
            Self::Running => ExitCode::Success,
            Self::RunningPromoted => ExitCode::RunningPromoted,
            Self::Degraded => ExitCode::Degraded,
            Self::DegradedPromoted => ExitCode::DegradedPromoted,
        }
    }
}

/// How much `validate-all` looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CheckLevel {
    /// The parameters by themselves; must not look at this node.
    Parameters,
    /// Whether the resource could run on this node, too.
    Host,
}

/// Everything that an action may know.
#[derive(Debug, Clone)]
pub struct Context {
    /// What was asked for.
    pub action: Action,
    /// The environment.
    pub environment: Environment,
    /// The parameters.
    pub parameters: Parameters,
    /// When the action must be over.
    pub deadline: Deadline,
    /// Where to say what is being done.
    pub log: Log,
}

impl Context {
    /// For `action` of the agent described by `description`.
    pub fn new(description: &Description, action: Action, environment: Environment) -> Self {
        let suggested = description.actions.iter().find(|s| s.action == action).and_then(|s| parse_time(s.timeout));
        let timeout = environment.timeout().or(suggested).unwrap_or(Duration::from_secs(20));
        Self {
            action,
            parameters: Parameters::new(environment.clone()),
            deadline: Deadline::for_operation(timeout),
            log: Log::new(&environment, format!("{}({})", description.name, environment.instance())),
            environment,
        }
    }

    /// Whether this is a probe.
    pub fn is_probe(&self) -> bool {
        self.environment.is_probe(self.action)
    }
}

/// A resource agent. All actions must be idempotent: what is already so is success.
pub trait Agent {
    /// Parameters, actions, texts.
    fn description(&self) -> Description;

    /// Make it run, unpromoted. Parameters have been validated at level 10 before this is called.
    fn start(&self, context: &Context) -> Result;

    /// Make it gone. **A failure here has the node fenced**; parameters may be missing or wrong.
    fn stop(&self, context: &Context) -> Result;

    /// Say how it is, locally, without changing it.
    fn monitor(&self, context: &Context) -> Result<Status>;

    /// Checks beyond those of the declarations.
    fn validate(&self, _context: &Context, _level: CheckLevel) -> Result {
        Ok(())
    }
    /// Unpromoted to promoted.
    fn promote(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// Promoted to unpromoted.
    fn demote(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// An instance changes. Pacemaker ignores the result.
    fn notify(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// Send the running resource to `CRM_meta_migrate_target`.
    fn migrate_to(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// Take the running resource over from `CRM_meta_migrate_source`.
    fn migrate_from(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// Have the service re-read its own configuration.
    fn reload(&self, context: &Context) -> Result {
        unimplemented(context)
    }
    /// Put changed reloadable parameters into effect.
    fn reload_agent(&self, context: &Context) -> Result {
        unimplemented(context)
    }
}

fn unimplemented(context: &Context) -> Result {
    Err(Failure::unimplemented(context.action.name()))
}

/// Carry out the action called `name`: metadata goes to stdout, a failure's reason to stderr in the form that `crm_mon` shows.
/// A panic becomes a failure, not an exit code that the cluster does not know.
pub fn run(agent: &dyn Agent, name: &str, environment: Environment) -> ExitCode {
    let prefix = environment.variable("OCF_EXIT_REASON_PREFIX").unwrap_or("ocf-exit-reason:").to_owned();
    let outcome = catch_unwind(AssertUnwindSafe(|| dispatch(agent, name, environment))).unwrap_or_else(|_| {
        Err(Failure::generic(format!("the agent's action {name} ended in a bug; please report it")))
    });
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            // Nobody listens on stderr: the exit code still says it.
            let _ = writeln!(std::io::stderr(), "{prefix}{}", failure.reason.replace('\n', " "));
            failure.code
        }
    }
}

fn dispatch(agent: &dyn Agent, name: &str, environment: Environment) -> Result<ExitCode> {
    let description = agent.description();
    let Some(action) = Action::from_name(name) else {
        return Err(Failure::unimplemented(name));
    };
    if action == Action::MetaData {
        return print(&metadata::document(&description));
    }
    let context = Context::new(&description, action, environment);
    if action == Action::ValidateAll {
        let level = if context.environment.check_level() >= 10 { CheckLevel::Host } else { CheckLevel::Parameters };
        return validate(agent, &description, &context, level).map(|()| ExitCode::Success);
    }
    if !description.actions.iter().any(|s| s.action == action) {
        return Err(Failure::unimplemented(name));
    }
    let done = match action {
        Action::Start => validate(agent, &description, &context, CheckLevel::Host).and_then(|()| agent.start(&context)),
        Action::Stop => agent.stop(&context),
        Action::Monitor => return monitor(agent, &context),
        Action::Promote => agent.promote(&context),
        Action::Demote => agent.demote(&context),
        Action::Notify => agent.notify(&context),
        Action::MigrateTo => agent.migrate_to(&context),
        Action::MigrateFrom => agent.migrate_from(&context),
        Action::Reload => agent.reload(&context),
        Action::ReloadAgent => agent.reload_agent(&context),
        Action::ValidateAll | Action::MetaData => Ok(()), // done above
    };
    done.map(|()| ExitCode::Success)
}

fn validate(agent: &dyn Agent, description: &Description, context: &Context, level: CheckLevel) -> Result {
    context.parameters.validate(&description.parameters)?;
    agent.validate(context, CheckLevel::Parameters)?;
    if level == CheckLevel::Host { agent.validate(context, CheckLevel::Host) } else { Ok(()) }
}

/// A probe that answers 6 stops the resource on *every* node; but a resource that cannot be configured cannot run here
/// either, so "not running" is the truth and `start` will say what is wrong.
fn monitor(agent: &dyn Agent, context: &Context) -> Result<ExitCode> {
    match agent.monitor(context) {
        Ok(status) => Ok(status.exit_code()),
        Err(failure) if context.is_probe() && failure.code == ExitCode::Configured => {
            context.log.warning(format!("does not run here, and could not: {failure}"));
            Ok(ExitCode::NotRunning)
        }
        Err(failure) => Err(failure),
    }
}

fn print(text: &str) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map(|()| ExitCode::Success)
        .map_err(|e| Failure::generic(format!("cannot print the metadata: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameter::Param;
    use std::cell::RefCell;

    static SIZE: Param<u64> = Param::integer("size", 1, 9).default("1");

    #[derive(Default)]
    struct Probe {
        calls: RefCell<Vec<Action>>,
        monitor: Option<Failure>,
    }

    impl Agent for Probe {
        fn description(&self) -> Description {
            let actions = [Action::Start, Action::Stop, Action::Monitor, Action::Promote, Action::Notify];
            Description {
                name: "probe",
                version: "1",
                short: "",
                long: "",
                parameters: vec![SIZE.declaration()],
                actions: actions.map(|a| ActionSpec::new(a, "20s")).to_vec(),
            }
        }
        fn start(&self, context: &Context) -> Result {
            self.calls.borrow_mut().push(context.action);
            Ok(())
        }
        fn stop(&self, _: &Context) -> Result {
            panic!("a bug")
        }
        fn monitor(&self, _: &Context) -> Result<Status> {
            self.monitor.clone().map_or(Ok(Status::RunningPromoted), Err)
        }
        fn demote(&self, _: &Context) -> Result {
            Ok(())
        }
    }

    fn env(pairs: &[(&str, &str)]) -> Environment {
        Environment::from_pairs(pairs.iter().copied())
    }

    #[test]
    fn start_validates_first() {
        let agent = Probe::default();
        assert_eq!(run(&agent, "start", env(&[("OCF_RESKEY_size", "10")])), ExitCode::Configured);
        assert!(agent.calls.borrow().is_empty());
        assert_eq!(run(&agent, "start", env(&[])), ExitCode::Success);
        assert_eq!(*agent.calls.borrow(), [Action::Start]);
    }

    #[test]
    fn what_the_metadata_does_not_list_is_not_implemented() {
        for action in ["demote", "reload", "dance", ""] {
            assert_eq!(run(&Probe::default(), action, env(&[])), ExitCode::Unimplemented, "{action}");
        }
        assert_eq!(run(&Probe::default(), "promote", env(&[])), ExitCode::Unimplemented, "listed, but not there");
    }

    #[test]
    fn a_bug_is_a_failure_and_not_an_unknown_exit_code() {
        assert_eq!(run(&Probe::default(), "stop", env(&[])), ExitCode::Generic);
    }

    #[test]
    fn a_probe_never_says_that_the_configuration_is_wrong() {
        let agent = Probe { monitor: Some(Failure::configured("no")), ..Probe::default() };
        assert_eq!(run(&agent, "monitor", env(&[])), ExitCode::NotRunning);
        let recurring = env(&[("OCF_RESKEY_CRM_meta_interval", "10000")]);
        assert_eq!(run(&agent, "monitor", recurring), ExitCode::Configured);
        assert_eq!(run(&Probe::default(), "monitor", env(&[])), ExitCode::RunningPromoted);
    }
}
