//! Who is told what happens in the cluster, and who may say yes.
//!
//! [`approval`] is the question that semi-automatic evacuation asks, and its answer; [`alarm`] is what recipients are told.
#![forbid(unsafe_code)]

pub mod alarm;
pub mod approval;
