//! Changes inputs at random, from a seed: what libFuzzer does, without its knowledge of what was reached. Enough for the short run in
//! every test; `make fuzz` does better.

/// A small generator (xorshift64*): the same seed makes the same inputs everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() >> 33) as usize % n.max(1)
    }
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX];

/// Longest input made.
pub const MAX_LEN: usize = 16 * 1024;

/// Make a new input of `seeds`.
pub fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| seeds.get(random.below(seeds.len())).cloned().unwrap_or_default();
    let mut bytes = pick(random);
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.number() as u8,
            2 => {
                let edge = EDGES[random.below(EDGES.len())];
                let width = [1, 2, 4, 8][random.below(4)];
                let bigger = random.below(4) == 0;
                for (i, byte) in edge.to_le_bytes()[..width].iter().enumerate() {
                    let place = if bigger { width - 1 - i } else { i };
                    if let Some(old) = bytes.get_mut(at + place) {
                        *old = *byte;
                    }
                }
            }
            3 => bytes.truncate(at),
            4 => {
                let n = random.below(9);
                let more: Vec<u8> = (0..n).map(|_| random.number() as u8).collect();
                bytes.splice(at..at, more);
            }
            5 => {
                // A part of it, once more.
                let to = at + random.below(bytes.len() - at + 1);
                let again = bytes[at..to].to_vec();
                let place = random.below(bytes.len() + 1);
                bytes.splice(place..place, again);
            }
            6 => {
                // The end of another.
                let other = pick(random);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            _ => {
                let to = (at + random.below(16)).min(bytes.len());
                bytes.drain(at..to);
            }
        }
    }
    bytes.truncate(MAX_LEN);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_inputs_and_they_differ_from_one_another() {
        let seeds = vec![b"hello world".to_vec(), vec![0; 64]];
        let many = |seed| {
            let mut random = Random::new(seed);
            (0..200).map(|_| mutated(&seeds, &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(many(3), many(3));
        let mut different = many(3);
        different.sort();
        different.dedup();
        assert!(different.len() > 100, "{}", different.len());
        assert_eq!(mutated(&[], &mut Random::new(1)).len().max(MAX_LEN), MAX_LEN);
    }
}
