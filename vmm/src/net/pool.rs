//! Buffers of packets that have left, kept for the next ones.
//!
//! Without it each epoch's packets get memory that the allocator has fresh from the kernel and gives back as soon as they have left: a page fault for
//! each 4 KiB, which at 10 Gbit/s costs more than the copy into it.
//!
//! Bounded. Buffers are kept by size in classes of a quarter of a power of two, so that a buffer is at most a quarter larger than what is in it (or
//! [`SMALLEST`]): what a gate's bound counts is near to what its packets take.

use std::collections::BTreeMap;

/// Bytes of the smallest buffers.
pub const SMALLEST: usize = 256;
/// Bytes of buffers that are kept for use again, unless said otherwise: 25 ms of 10 Gbit/s.
pub const KEPT: usize = 32 << 20;
/// More than is asked for: a filter may put an 802.1Q tag into a frame.
const SLACK: usize = 4;

/// See the module.
#[derive(Debug)]
pub struct Pool {
    /// By size.
    free: BTreeMap<usize, Vec<Vec<u8>>>,
    /// Bytes in `free`.
    bytes: usize,
    bound: usize,
}

impl Default for Pool {
    fn default() -> Self {
        Self::new(KEPT)
    }
}

impl Pool {
    /// An empty one that keeps at most so many bytes.
    #[must_use]
    pub fn new(bound: usize) -> Self {
        Self { free: BTreeMap::new(), bytes: 0, bound }
    }

    /// A buffer of this length. What is in it is of no meaning: all of it is to be written.
    #[must_use]
    pub fn take(&mut self, len: usize) -> Vec<u8> {
        let size = size_for(len + SLACK);
        let mut buffer = match self.free.get_mut(&size).and_then(Vec::pop) {
            Some(buffer) => {
                self.bytes -= size;
                buffer
            }
            None => Vec::with_capacity(size),
        };
        buffer.resize(len, 0);
        buffer
    }

    /// It is not used any more.
    pub fn give(&mut self, buffer: Vec<u8>) {
        let size = buffer.capacity();
        // One that was not made here, or has grown since, is of no class.
        if size == size_for(size) && self.bytes + size <= self.bound {
            self.bytes += size;
            self.free.entry(size).or_default().push(buffer);
        }
    }

    /// Bytes that are kept.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The size of the buffers that hold `len` bytes.
fn size_for(len: usize) -> usize {
    let len = len.max(SMALLEST);
    let quarter = len.next_power_of_two() / 8;
    len.next_multiple_of(quarter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_for_what_is_about_as_long() {
        let mut pool = Pool::default();
        let buffer = pool.take(65_000);
        let at = buffer.as_ptr();
        pool.give(buffer);
        let small = pool.take(1500);
        assert_ne!(small.as_ptr(), at, "a small packet does not hold a large buffer");
        let again = pool.take(64_000);
        assert_eq!((again.as_ptr(), again.len(), pool.bytes()), (at, 64_000, 0));
    }

    #[test]
    fn a_buffer_is_hardly_larger_than_what_it_holds_and_takes_a_tag() {
        for len in [0, 60, 252, 253, 1500, 1514, 4097, 9000, 65_000, 65_557] {
            let size = Pool::default().take(len).capacity();
            assert!(size >= len + 4 && (size <= SMALLEST || size * 4 <= (len + 4) * 5), "{size} for {len}");
            assert_eq!(size, size_for(size));
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_of_its_own_making() {
        let mut pool = Pool::new(1 << 20);
        let buffers: Vec<_> = (0..100).map(|_| pool.take(60_000)).collect();
        buffers.into_iter().for_each(|buffer| pool.give(buffer));
        assert!(pool.bytes() <= 1 << 20 && pool.bytes() > 900 << 10, "{}", pool.bytes());
        let mut small = Pool::new(1 << 20);
        small.give(Vec::with_capacity(1001));
        small.give(Vec::new());
        assert_eq!(small.bytes(), 0);
    }
}
