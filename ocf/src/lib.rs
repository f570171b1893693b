//! The OCF resource agent API 1.1: write a Pacemaker resource agent in Rust.
//!
//! An agent is a type that implements [`Agent`]: it describes itself once (parameters, actions, texts) and has a method
//! per action. Everything that the standard asks for around that comes from here:
//!
//! | module | what |
//! |---|---|
//! | [`agent`] | the trait, and [`run`]: action name in, exit code out |
//! | [`exit`] | exit codes as a type; failures are a code and a sentence |
//! | [`parameter`] | parameters declared once: parsing, validation and metadata come from the declaration |
//! | [`action`] | actions and what the metadata says about them |
//! | [`metadata`] | the XML, valid for the DTD of `ocf-tester`, the OCF 1.1 schema and the tools of `crm` and `pcs` |
//! | [`environment`] | `OCF_RESKEY_*`, `CRM_meta_*`, probes, node and resource names |
//! | [`deadline`] | an action ends before the cluster kills it |
//! | [`notify`] | the notify environment, and what is true after each step |
//! | [`score`] | promotion scores, harmless where there is no cluster |
//! | [`command`] | helper programs that cannot hang their caller, and work without `PATH` |
//! | [`log`] | stderr, syslog and log file, none of which has to exist |
//!
//! ```
//! use ocf::{Agent, Context, Description, Status, action::{Action, ActionSpec}, parameter::Param};
//!
//! static STATE: Param<String> = Param::text("state").default("/run/example.state").unique_group("state")
//!     .short("State file").long("File that exists while the resource is active.");
//!
//! struct Example;
//! impl Agent for Example {
//!     fn description(&self) -> Description {
//!         Description {
//!             name: "example", version: "1.0", short: "Example", long: "Does nothing but remember that it was started.",
//!             parameters: vec![STATE.declaration()],
//!             actions: vec![ActionSpec::new(Action::Start, "20s"), ActionSpec::new(Action::Stop, "20s"),
//!                           ActionSpec::new(Action::Monitor, "20s").every("10s")],
//!         }
//!     }
//!     fn start(&self, context: &Context) -> ocf::Result {
//!         std::fs::write(context.parameters.get(&STATE)?, "").map_err(|e| ocf::Failure::generic(format!("no state: {e}")))
//!     }
//!     fn stop(&self, context: &Context) -> ocf::Result {
//!         let _ = std::fs::remove_file(context.parameters.get(&STATE)?);
//!         Ok(())
//!     }
//!     fn monitor(&self, context: &Context) -> ocf::Result<Status> {
//!         let there = std::path::Path::new(&context.parameters.get(&STATE)?).exists();
//!         Ok(if there { Status::Running } else { Status::NotRunning })
//!     }
//! }
//! # let env = ocf::Environment::from_pairs([("OCF_RESKEY_state", "/nonexistent/x")]);
//! # assert_eq!(ocf::run(&Example, "monitor", env), ocf::ExitCode::NotRunning);
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod action;
pub mod agent;
pub mod command;
pub mod deadline;
pub mod environment;
pub mod exit;
pub mod log;
pub mod metadata;
pub mod notify;
pub mod parameter;
pub mod score;

pub use agent::{Agent, CheckLevel, Context, Description, Status, run};
pub use deadline::Deadline;
pub use environment::Environment;
pub use exit::{ExitCode, Failure, Result};
