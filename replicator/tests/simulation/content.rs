//! What RAM and device state hold: small enough to be remembered, shaped so that the encoder has something to do.

use understudy_protocol::ids::Epoch;
use understudy_replicator::codec::{PAGE, Page};

/// Pages of RAM.
pub const PAGES: u64 = 8;

/// A page that eight bytes describe: each stands in a line of its own, so that a change of some of them is a small delta.
pub fn page(seed: u64) -> Page {
    let mut page = [if seed == 0 { 0 } else { 0xA5 }; PAGE];
    for (byte, line) in seed.to_le_bytes().into_iter().zip(page.as_chunks_mut::<512>().0) {
        line[64] = byte;
    }
    page
}

/// Back; a page that no guest wrote is marked as such.
pub fn seed(content: &Page) -> u64 {
    let mut bytes = [0; 8];
    for (byte, line) in bytes.iter_mut().zip(content.as_chunks::<512>().0) {
        *byte = line[64];
    }
    let seed = u64::from_le_bytes(bytes);
    if page(seed) == *content { seed } else { u64::MAX }
}

/// The device state: long enough that a change of it is much smaller.
pub fn device_state(epoch: Epoch) -> Vec<u8> {
    let mut state: Vec<u8> = (0..200).collect();
    state.splice(100..100, epoch.0.to_string().into_bytes());
    state
}
