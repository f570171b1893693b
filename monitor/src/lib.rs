//! What is wrong with a node or a machine, and what is to be done about it (spec E-1, E-2).
//!
//! A node is watched over the management network (Corosync's membership), its machines over the production network; neither
//! view is enough: a cable that was pulled, a switch that died and a host that lost power look alike from one side.
//!
//! ```text
//!   every node:  its VMMs ──► Watch ──► heartbeat a second, to every node, over both networks ([`wire`])
//!                               ▲ heartbeats of the others, and what those hear · membership ([`members`])
//!                               ▼
//!                      who is cut off, and with whom ([`scope`]) ──► Observation ──► [`matrix`] ──► Verdict
//! ```
//! Every node watches every other one, so that monitoring grows with the nodes and no monitor is missed; the first of those that are
//! heard speaks for all ([`watch`]). Everything but the executable is without clocks, threads and sockets.
#![forbid(unsafe_code)]

pub mod bmc;
pub mod daemon;
pub mod load;
pub mod local;
pub mod matrix;
pub mod members;
pub mod report;
pub mod scope;
pub mod watch;
pub mod wire;
