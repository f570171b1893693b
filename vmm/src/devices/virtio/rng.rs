//! virtio-rng, the entropy device (virtio 1.2, 5.4).
//!
//! The device has no entropy of its own. While the driver's buffers wait, [`VirtioPci::want_entropy`] says how many
//! bytes the next one takes; the owner fetches as many from the operating system and hands them in with
//! [`VirtioPci::fill`]:
//!
//! ```text
//! loop { match rng.want_entropy() { 0 => break, n => rng.fill(&random_bytes(n), ctx) } }
//! ```

use serde::{Deserialize, Serialize};

use super::super::{Ctx, GuestRam, RestoreError, Snapshot};
use super::{Broken, CHAINS_PER_CALL, Progress, VirtQueue, VirtioDevice, VirtioPci};

/// Most bytes that are asked for at a time. A longer buffer is returned partly filled, as the specification allows.
pub const WANT_MAX: usize = 4096;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    /// Bytes that the next buffer takes; 0 = no buffer waits.
    wanted: usize,
    /// Entropy that has been handed in; only within a call.
    pool: Vec<u8>,
}

impl Rng {
    /// A device that nobody uses yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    const DEVICE_ID: u16 = 4;
    const PCI_CLASS: u32 = 0x00_ff_00;
    const QUEUE_SIZES: &'static [u16] = &[64];

    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        self.wanted = 0;
        let [queue, ..] = queues else { return Ok(Progress::Idle) };
        for _ in 0..CHAINS_PER_CALL {
            let Some(chain) = queue.next_chain(ram)? else { return Ok(Progress::Idle) };
            if chain.readable_len() > 0 {
                return Err(Broken("the entropy queue holds a buffer that the device cannot write"));
            }
            if chain.writable_len() > 0 && self.pool.is_empty() {
                self.wanted = chain.writable_len().min(WANT_MAX);
                queue.put_back();
                return Ok(Progress::Idle);
            }
            let written = chain.write(ram, &self.pool)?;
            self.pool.drain(..written);
            queue.complete(ram, &chain, written)?;
        }
        Ok(Progress::More)
    }

    fn reset(&mut self) {
        self.wanted = 0;
        self.pool.clear();
    }
}

impl VirtioPci<Rng> {
    /// How many bytes [`VirtioPci::fill`] should get, at most [`WANT_MAX`]; 0 = none are needed.
    #[must_use]
    pub fn want_entropy(&self) -> usize {
        if self.running() { self.device().wanted } else { 0 }
    }

    /// Entropy for the buffers that wait. What they do not take is forgotten.
    pub fn fill(&mut self, entropy: &[u8], ctx: &Ctx) {
        self.device_mut().pool = entropy[..entropy.len().min(WANT_MAX)].to_vec();
        self.process(ctx.ram);
        self.device_mut().pool.clear();
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Serialize};

    /// Version 1. The queue says the rest.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Bytes that the next buffer takes.
        pub wanted: u32,
    }
}

impl Snapshot for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        // The pool is empty between calls.
        let Self { wanted, pool: _ } = self;
        // At most WANT_MAX.
        state::V1 { wanted: *wanted as u32 }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { wanted } = state;
        let wanted = wanted as usize;
        if wanted > WANT_MAX {
            return Err(RestoreError::invalid(Self::KIND, format!("it wants {wanted} bytes")));
        }
        *self = Self { wanted, pool: Vec::new() };
        Ok(())
    }
}
