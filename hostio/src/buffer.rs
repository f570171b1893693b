//! Memory for requests: aligned as `O_DIRECT` asks for it, and used again, because fresh memory costs a page fault every 4 KiB, which is more
//! than reading it from a page cache.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// What every device's `O_DIRECT` is content with.
pub const ALIGN: usize = 4096;

/// Bytes that are kept for the next request, of all disks together.
const KEPT: usize = 64 << 20;
/// A larger buffer is given back at once.
const LARGEST: usize = 4 << 20;

/// Aligned bytes. What is in a new one is not said: fill it.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

/// Classes of sizes: powers of two from [`ALIGN`].
static POOL: Mutex<(usize, [Vec<Vec<u8>>; 12])> = Mutex::new((0, [const { Vec::new() }; 12]));

fn class(len: usize) -> usize {
    len.max(ALIGN).next_power_of_two().trailing_zeros() as usize - ALIGN.trailing_zeros() as usize
}

impl Buffer {
    /// Of this length.
    pub fn new(len: usize) -> Self {
        let class = class(len);
        let kept = if len <= LARGEST {
            let (kept, pool) = &mut *POOL.lock().unwrap_or_else(PoisonError::into_inner);
            pool.get_mut(class).and_then(Vec::pop).inspect(|bytes| *kept -= bytes.len())
        } else {
            None
        };
        let bytes = kept.unwrap_or_else(|| vec![0; (ALIGN << class) + ALIGN]);
        let start = bytes.as_ptr().align_offset(ALIGN);
        Buffer { bytes, start, len }
    }

    /// With these bytes.
    pub fn copy(from: &[u8]) -> Self {
        let mut buffer = Self::new(from.len());
        buffer.copy_from_slice(from);
        buffer
    }

    /// Whether these bytes lie as `O_DIRECT` asks for.
    pub fn aligned(bytes: &[u8]) -> bool {
        bytes.as_ptr().align_offset(ALIGN) == 0
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let class = class(self.len);
        if self.len > LARGEST {
            return;
        }
        let (kept, pool) = &mut *POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if *kept + self.bytes.len() <= KEPT
            && let Some(pool) = pool.get_mut(class)
        {
            *kept += self.bytes.len();
            pool.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_aligned_and_as_long_as_asked_also_the_second_time() {
        for _ in 0..2 {
            for len in [0, 1, 512, 4096, 4097, 1 << 20, LARGEST, LARGEST + 512] {
                let mut buffer = Buffer::new(len);
                assert_eq!(buffer.len(), len);
                assert!(Buffer::aligned(&buffer));
                buffer.fill(7);
            }
        }
        assert_eq!(&Buffer::copy(b"abc")[..], b"abc");
    }
}
