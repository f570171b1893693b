//! The host bridge in slot 0: an Intel 440FX as firmware and operating systems know it. SeaBIOS and OVMF recognise the
//! machine by its ids and by its subsystem 1af4:1100, and unlock the BIOS area through the PAM registers.
//!
//! RAM is present and writable in the whole BIOS area whatever PAM says; the registers only hold what is written.

use std::any::Any;

use super::config::{ConfigSpace, Identity};
use super::{Payload, Payloads, PciFunction, RestoreError, Snapshot};

/// PAM0 … PAM6.
const PAM: std::ops::RangeInclusive<u8> = 0x59..=0x5f;
const SMRAM: u8 = 0x72;

/// The bridge.
#[derive(Debug, Clone)]
pub struct HostBridge {
    config: ConfigSpace,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// A bridge after power-on.
    #[must_use]
    pub fn new() -> Self {
        let mut config = ConfigSpace::new(Identity {
            id: (0x8086, 0x1237),
            subsystem: (0x1af4, 0x1100),
            class: 0x06_00_00,
            revision: 2,
        });
        for register in PAM {
            config.add_register(register, 0, 0x33);
        }
        config.add_register(SMRAM, 0x02, 0x78);
        Self { config }
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn reset(&mut self) {
        self.config.reset();
    }

    fn save_payloads(&self, name: &str) -> Vec<Payload> {
        vec![Payload::of(self, name)]
    }

    fn restore_payloads(&mut self, payloads: &mut Payloads, name: &str) -> Result<(), RestoreError> {
        payloads.restore(self, name)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Saved state.
pub mod state {
    use serde::{Deserialize, Serialize};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Configuration space, 256 bytes.
        pub config: Vec<u8>,
    }
}

impl Snapshot for HostBridge {
    const KIND: &'static str = "i440fx";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self { config } = self;
        state::V1 { config: config.save() }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { config } = state;
        self.config.restore(Self::KIND, &config)
    }
}
