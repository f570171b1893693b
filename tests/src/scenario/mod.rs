//! The protected demo machine in the lab, and what can happen to it: the words in which the demo and the lab tests are told.
//!
//! [`World`] is the lab with one machine configured and a device at the far end of its serial line; [`timeline`] turns an
//! outage into times that a person can read.

pub mod timeline;
pub mod world;

pub use timeline::Outage;
pub use world::World;
