//! From a short policy file to a Pacemaker configuration.
//!
//! ```text
//! policy.toml ─► policy::Policy ─► check (findings with lines) ─► compile ─► model::Configuration
//!                                                                              │
//!                                      cib (XML) ◄───── crm (crmsh) ◄──────────┼──────► pcs (commands)
//!                                       │
//!                 live CIB ─► merge ────┴──► crm_diff ─► cibadmin --patch       (diff, apply)
//! ```
//! [`compile`] is the only place that decides anything; the three printers say the same configuration in three
//! languages. The merge touches only what it owns: see [`merge`].
#![forbid(unsafe_code)]

pub mod check;
pub mod cib;
pub mod compile;
pub mod crm;
pub mod live;
pub mod merge;
pub mod model;
pub mod pcs;
pub mod planes;
pub mod policy;
pub mod xml;
