//! What is wrong with a node or a machine, and what is to be done about it.
//!
//! A node is watched over the management network (Corosync's membership), its machines over the production network; neither
//! view is enough: a cable that was pulled, a switch that died and a host that lost power look alike from one side. The
//! [`matrix`] puts both views, the host's management controller (BMC), the machine and its guest into one row and says what follows.
#![forbid(unsafe_code)]

pub mod matrix;
