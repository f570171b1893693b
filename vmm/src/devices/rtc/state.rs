//! Saved state of the real-time clock.

use serde::{Deserialize, Serialize};

use crate::devices::VmTime;

/// Version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct V1 {
    /// Selected register, 0 to 127.
    pub index: u8,
    /// CMOS, 128 bytes.
    pub ram: Vec<u8>,
    /// Unix time at VM time 0, ns.
    pub base_ns: i64,
    /// Interrupt conditions up to here are in register C.
    pub seen: VmTime,
}
