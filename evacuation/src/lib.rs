//! The evacuation controller: where machines go when their hosts have died, who is asked before they do, and how it is seen that they
//! arrived.
//!
//! ```text
//!   CIB ──cibadmin, crm_mon──► cluster::read ─► core::model::Snapshot ─► core::decide ─► Round
//!    ▲                                                                                    │
//!    └────── one patch, refused if anything else has changed ◄── daemon ◄─────────────────┤
//!                                                                  └─► alarms, questions, journal
//! ```
//! [`core`] decides and does nothing else. Everything that it must remember stands in the CIB (`understudy_crm::records`), so the daemon
//! can be killed at any moment, and Pacemaker, whose resource it is (`ocf:understudy:evacuator`), starts it elsewhere. Pacemaker
//! starts and stops the machines; the controller only says, by one score for each machine, where each may be.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod core;
pub mod daemon;
pub mod journal;
pub mod orders;
pub mod outside;
pub mod people;
