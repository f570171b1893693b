//! From a short policy file to a Pacemaker configuration.
//!
//! ```text
//! policy.toml ─► policy::Policy ─► check (findings with lines) ─► compile ─► model::Configuration
//!                                                                              │
//!                                      cib (XML) ◄───── crm (crmsh) ◄──────────┼──────► pcs (commands)
//!                                       │
//!                 live CIB ─► merge ────┴──► crm_diff ─► cibadmin --patch       (diff, apply)
//! ```
//! Where machines may go is worked out in [`placement`]; [`plan`] asks Pacemaker's scheduler what becomes of it ([`simulate`]).
//! [`compile`] is the only place that decides how it is said; the three printers say the same configuration in three
//! languages. The merge touches only what it owns: see [`merge`].
#![forbid(unsafe_code)]

pub mod alerts;
pub mod approvals;
pub mod check;
pub mod cib;
pub mod compile;
pub mod controller;
pub mod crm;
pub mod estate;
pub mod explain;
pub mod import;
pub mod live;
pub mod merge;
pub mod model;
pub mod pcs;
pub mod placement;
pub mod plan;
pub mod planes;
pub mod policy;
pub mod records;
pub mod simulate;
pub mod situation;
mod span;
pub mod svg;
pub mod watch;
pub mod xml;
