//! The lab tier's tests, by subject. `understudy-lab-tests` runs them; each takes a lab that is whole and leaves one.

pub mod agents;
pub mod bad_days;
pub mod connections;
pub mod disks;
pub mod evacuation;
pub mod migration;
pub mod scsi;
pub mod tools;

use anyhow::Result;

use crate::scenario::World;

/// A test: its name is the sentence that it proves.
pub type Test = (&'static str, fn(&World) -> Result<()>);
