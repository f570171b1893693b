//! Every Understudy resource agent in one executable, and the hook by which the replicator reaches the cluster.
//!
//! ```text
//!  Pacemaker ─► resource.d/understudy/{vmm,replicator,serial,migrations,evacuator,monitor} ─► understudy-ocf (argv[0] says which agent)
//!                                                                  │ control sockets        │ crm_attribute, cibadmin
//!                                     understudy-vmm ◄─────────────┤                        ▼
//!                                     understudy-replicator ◄──────┤                    the cluster
//!                                     understudy-serial ◄──────────┘                        ▲
//!                                            │ veto, clear-veto, replica-state              │
//!                                            └──────────► understudy-ocf hook ──────────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`vmm`], [`replicator`], [`serial`], [`migrations`], [`evacuator`], [`monitor`] | the agents |
//! | [`hook`], [`veto`], [`incoming`] | what the replicator asks of the cluster and of this node |
//! | [`rules`], [`sharing`] | scores, generations, what a machine runs from, how it leaves, who waits for whom: functions of values |
//! | [`cluster`], [`pacemaker`] | the cluster as a trait, and through Pacemaker's tools |
//! | [`service`], [`process`], [`daemon`] | processes that outlive the agent: started, asked, ended for certain |
#![deny(unsafe_code)]

pub mod binaries;
pub mod cluster;
pub mod daemon;
pub mod evacuator;
pub mod hook;
pub mod incoming;
pub mod install;
pub mod migrations;
pub mod monitor;
pub mod pacemaker;
pub mod paths;
pub mod process;
pub mod replicator;
pub mod rules;
pub mod run_lock;
pub mod score_lock;
pub mod serial;
pub mod service;
pub mod sharing;
pub mod veto;
pub mod vmm;
pub mod xml;

use ocf::Agent;
use understudy_protocol::control::VmmState;

/// Types of all agents.
pub const AGENTS: [&str; 6] = ["vmm", "replicator", "serial", "migrations", "evacuator", "monitor"];

/// The agent of this type.
pub fn agent(name: &str) -> Option<Box<dyn Agent>> {
    match name {
        "vmm" => Some(Box::new(vmm::Vmm)),
        "replicator" => Some(Box::new(replicator::Replicator)),
        "serial" => Some(Box::new(serial::Serial)),
        "migrations" => Some(Box::new(migrations::Migrations)),
        "evacuator" => Some(Box::new(evacuator::Evacuator)),
        "monitor" => Some(Box::new(monitor::Monitor)),
        _ => None,
    }
}

/// Whether the machine runs (perhaps paused) in this state.
pub fn machine_runs(state: VmmState) -> bool {
    matches!(state, VmmState::Running | VmmState::Paused)
}
