//! virtio-console with its one port (virtio 1.2, 5.3; no VIRTIO_CONSOLE_F_MULTIPORT, no SIZE, no EMERG_WRITE).
//!
//! Output (the driver's transmit queue) goes through a bounded buffer that the owner drains. Without room the driver's
//! buffers stay in the queue, a partly sent one with a note of how far, so that nothing is lost however long the gate
//! is shut. Input waits in a bounded buffer of its own until the driver has receive buffers.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::super::{Ctx, GuestRam, RestoreError, Snapshot};
use super::{Broken, CHAINS_PER_CALL, Progress, VirtQueue, VirtioDevice, VirtioPci};

/// Most bytes that may stand in the output before the owner takes them.
pub const OUTPUT_MAX: usize = 64 * 1024;
/// Most bytes of input that wait for the driver's buffers.
pub const INPUT_MAX: usize = 4096;

const RX: usize = 0;
const TX: usize = 1;

/// The console device.
#[derive(Debug)]
pub struct Console {
    output: Vec<u8>,
    input: VecDeque<u8>,
    /// Bytes of the transmit queue's next chain that have been sent.
    tx_offset: usize,
    /// The transmit queue waits for room in the output.
    tx_blocked: bool,
    /// The owner's wish; not part of the machine's state.
    output_room: usize,
}

impl Default for Console {
    fn default() -> Self {
        Self::new()
    }
}

impl Console {
    /// A console that nobody uses yet.
    #[must_use]
    pub fn new() -> Self {
        Self { output: Vec::new(), input: VecDeque::new(), tx_offset: 0, tx_blocked: false, output_room: OUTPUT_MAX }
    }

    fn transmit(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        self.tx_blocked = false;
        for _ in 0..CHAINS_PER_CALL / 2 {
            let Some(chain) = queue.next_chain(ram)? else { return Ok(Progress::Idle) };
            if chain.writable_len() > 0 {
                return Err(Broken("the transmit queue holds a buffer that the device cannot read"));
            }
            let room = self.output_room.saturating_sub(self.output.len());
            self.tx_offset += chain.read(ram, self.tx_offset, room, &mut self.output)?;
            if self.tx_offset < chain.readable_len() {
                queue.put_back();
                self.tx_blocked = true;
                return Ok(Progress::Idle);
            }
            self.tx_offset = 0;
            queue.complete(ram, &chain, 0)?;
        }
        Ok(Progress::More)
    }

    fn receive(&mut self, queue: &mut VirtQueue, ram: &GuestRam) -> Result<Progress, Broken> {
        for _ in 0..CHAINS_PER_CALL / 2 {
            if self.input.is_empty() {
                return Ok(Progress::Idle);
            }
            let Some(chain) = queue.next_chain(ram)? else { return Ok(Progress::Idle) };
            if chain.readable_len() > 0 {
                return Err(Broken("the receive queue holds a buffer that the device cannot write"));
            }
            let written = chain.write(ram, self.input.make_contiguous())?;
            self.input.drain(..written);
            queue.complete(ram, &chain, written)?;
        }
        Ok(Progress::More)
    }
}

impl VirtioDevice for Console {
    const DEVICE_ID: u16 = 3;
    const PCI_CLASS: u32 = 0x07_80_00;
    const QUEUE_SIZES: &'static [u16] = &[64, 64];

    fn process(&mut self, queues: &mut [VirtQueue], ram: &GuestRam) -> Result<Progress, Broken> {
        let sent = self.transmit(&mut queues[TX], ram)?;
        let received = self.receive(&mut queues[RX], ram)?;
        Ok(if sent == Progress::More { sent } else { received })
    }

    fn reset(&mut self) {
        // What has left has left, and what came in is still to be read by the next driver.
        self.tx_offset = 0;
        self.tx_blocked = false;
    }
}

impl VirtioPci<Console> {
    /// The bytes that the guest wrote since the last call, in order.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.device_mut().output)
    }

    /// From now on at most `bytes` may stand in the output (bounded by [`OUTPUT_MAX`], which it is at first). With 0
    /// the guest's output stops. To be called after [`VirtioPci::take_output`] too: it is what makes a stopped guest go
    /// on.
    pub fn set_output_room(&mut self, bytes: usize, ctx: &Ctx) {
        let device = self.device_mut();
        device.output_room = bytes.min(OUTPUT_MAX);
        if device.tx_blocked && device.output.len() < device.output_room {
            self.process(ctx.ram);
        }
    }

    /// How many input bytes [`VirtioPci::receive`] would take; none before a driver is ready.
    #[must_use]
    pub fn input_room(&self) -> usize {
        if self.running() { INPUT_MAX.saturating_sub(self.device().input.len()) } else { 0 }
    }

    /// Input for the guest. Takes the first [`VirtioPci::input_room`] bytes and says how many.
    pub fn receive(&mut self, bytes: &[u8], ctx: &Ctx) -> usize {
        let n = self.input_room().min(bytes.len());
        if n > 0 {
            self.device_mut().input.extend(&bytes[..n]);
            self.process(ctx.ram);
        }
        n
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Serialize};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Bytes that left and were not taken.
        pub output: Vec<u8>,
        /// Bytes that wait for receive buffers.
        pub input: Vec<u8>,
        /// Bytes of the transmit queue's next chain that have been sent.
        pub tx_offset: u32,
    }
}

impl Snapshot for Console {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        // After a restore the transport has the queues looked at, and that finds out whether it must wait.
        let Self { output, input, tx_offset, tx_blocked: _, output_room: _ } = self;
        // A chain is shorter than 4 GiB.
        state::V1 { output: output.clone(), input: input.iter().copied().collect(), tx_offset: *tx_offset as u32 }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { output, input, tx_offset } = state;
        if output.len() > OUTPUT_MAX || input.len() > INPUT_MAX {
            return Err(RestoreError::invalid(Self::KIND, "more bytes wait than can"));
        }
        let (tx_offset, output_room) = (tx_offset as usize, self.output_room);
        *self = Self { output, input: input.into(), tx_offset, tx_blocked: false, output_room };
        Ok(())
    }
}
