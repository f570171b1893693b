//! Device state on the wire: what changed since the last one that was sent.
//!
//! ```text
//! encoded = u8 kind, u64 LE base epoch, u32 LE length of the state, body
//! kind 0  body = the state                    base epoch = 0
//! kind 1  body = instructions over the base, until `length` bytes are made; each:
//!         varint  bytes to copy from the base, at the cursor
//!         varint  zigzag: how far the cursor then jumps beyond them
//!         varint  new bytes, then these
//! ```
//! The base is the state of the epoch named, which the receiver has committed by the time that this one ends. The state is a
//! sequence of numbers of varying length, so what stays the same moves: the encoder follows with the cursor. Encoded bytes travel in
//! pieces (`Message::State`); they are decoded when all have arrived.

use thiserror::Error;
use understudy_protocol::ids::Epoch;

/// Larger than any machine's device state; the VMM's own limit.
pub const STATE_LIMIT: usize = 64 << 20;
/// Bytes of an encoded state before its body.
const HEAD: usize = 13;
const FULL: u8 = 0;
const DELTA: u8 = 1;

/// Why bytes are not a device state.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StateError {
    /// Not what an encoder writes.
    #[error("the device state is malformed")]
    Malformed,
    /// More than any machine has.
    #[error("the device state of {0} bytes is larger than any machine's")]
    TooLong(usize),
    /// Another base than the receiver has.
    #[error("the device state is a change to that of epoch {named}, and the one here is of {}", .held.map_or("none".into(), |e| e.to_string()))]
    Base {
        /// Which the sender meant.
        named: Epoch,
        /// Which the receiver has.
        held: Option<Epoch>,
    },
}

/// The sender's side: remembers the last state sent.
#[derive(Debug, Default)]
pub struct StateEncoder {
    base: Option<(Epoch, Vec<u8>)>,
    index: Index,
}

impl StateEncoder {
    /// Encode the state of `epoch` into `out`, which is emptied first; it is the base of the next.
    pub fn encode(&mut self, epoch: Epoch, state: &[u8], out: &mut Vec<u8>) {
        out.clear();
        let len = (state.len() as u32).to_le_bytes();
        let head = |kind: u8, base: Epoch, out: &mut Vec<u8>| {
            out.clear();
            out.push(kind);
            out.extend_from_slice(&base.0.to_le_bytes());
            out.extend_from_slice(&len);
        };
        let mut smaller = false;
        if let Some((base_epoch, base)) = &self.base {
            head(DELTA, *base_epoch, out);
            difference(state, base, &mut self.index, out);
            smaller = out.len() < HEAD + state.len();
        }
        if !smaller {
            head(FULL, Epoch::ZERO, out);
            out.extend_from_slice(state);
        }
        let (base_epoch, base) = self.base.get_or_insert_with(Default::default);
        *base_epoch = epoch;
        base.clear();
        base.extend_from_slice(state);
    }

    /// The receiver has no base any more: a first copy begins.
    pub fn restart(&mut self) {
        self.base = None;
    }
}

/// Decode a state; `base` is the committed one, with its epoch.
pub fn decode(encoded: &[u8], base: Option<(Epoch, &[u8])>) -> Result<Vec<u8>, StateError> {
    let (head, mut body) = encoded.split_first_chunk::<HEAD>().ok_or(StateError::Malformed)?;
    let (kind, rest) = (head[0], &head[1..]);
    let (named, len) = rest.split_first_chunk::<8>().ok_or(StateError::Malformed)?;
    let named = Epoch(u64::from_le_bytes(*named));
    let len = len.first_chunk::<4>().map(|len| u32::from_le_bytes(*len) as usize).ok_or(StateError::Malformed)?;
    if len > STATE_LIMIT {
        return Err(StateError::TooLong(len));
    }
    if kind == FULL {
        return if body.len() == len { Ok(body.to_vec()) } else { Err(StateError::Malformed) };
    }
    if kind != DELTA {
        return Err(StateError::Malformed);
    }
    let base = match base {
        Some((epoch, base)) if epoch == named => base,
        held => return Err(StateError::Base { named, held: held.map(|(epoch, _)| epoch) }),
    };
    // The length is a promise: memory is spent as bytes come.
    let mut state = Vec::with_capacity(len.min(base.len() + body.len()));
    let mut cursor = 0usize;
    while state.len() < len {
        let copied = number(&mut body)?;
        let end = cursor.checked_add(copied).ok_or(StateError::Malformed)?;
        let from_base = base.get(cursor..end).ok_or(StateError::Malformed)?;
        let jump = signed(number(&mut body)?);
        let fresh = number(&mut body)?;
        let (new, rest) = body.split_at_checked(fresh).ok_or(StateError::Malformed)?;
        if copied + fresh == 0 || copied + fresh > len - state.len() {
            return Err(StateError::Malformed);
        }
        state.extend_from_slice(from_base);
        state.extend_from_slice(new);
        body = rest;
        cursor = end.checked_add_signed(jump).filter(|at| *at <= base.len()).ok_or(StateError::Malformed)?;
    }
    if body.is_empty() { Ok(state) } else { Err(StateError::Malformed) }
}

/// Fewer equal bytes than this are not worth an instruction.
const MATCH: usize = 8;
/// How far a value may have grown or shrunk to be found by looking around.
const NEAR: usize = 8;
/// How many bytes a change may have to be stepped over without a search.
const STEP: usize = 64;
/// Bytes that the search over all of the base compares at first.
const KEY: usize = 16;

/// Where in the base a run of [`KEY`] bytes stands; filled only when something has moved far.
#[derive(Debug, Default)]
struct Index {
    places: Vec<u32>,
    filled: bool,
}

impl Index {
    const EMPTY: u32 = u32::MAX;

    fn slot(&self, key: &[u8; KEY]) -> usize {
        let (low, high) = (u128::from_le_bytes(*key) as u64, (u128::from_le_bytes(*key) >> 64) as u64);
        let mixed = (low ^ high.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed >> 32) as usize & (self.places.len() - 1)
    }

    fn find(&mut self, key: &[u8; KEY], base: &[u8]) -> Option<usize> {
        if !self.filled {
            self.filled = true;
            let size = (base.len() / 4).next_power_of_two().max(64);
            self.places.clear();
            self.places.resize(size, Self::EMPTY);
            // Every eighth place: a run that moved is found within its first bytes.
            for at in (0..base.len().saturating_sub(KEY - 1)).step_by(8) {
                if let Some(key) = base[at..].first_chunk() {
                    let slot = self.slot(key);
                    self.places[slot] = at as u32;
                }
            }
        }
        let at = self.places[self.slot(key)] as usize;
        (base.get(at..).and_then(<[u8]>::first_chunk) == Some(key)).then_some(at)
    }
}

/// Append the instructions that make `new` of `base`.
fn difference(new: &[u8], base: &[u8], index: &mut Index, out: &mut Vec<u8>) {
    index.filled = false;
    let (mut at, mut cursor) = (0, 0);
    while at < new.len() {
        let copied = common(&new[at..], &base[cursor..]);
        at += copied;
        cursor += copied;
        let (fresh, resume) = if at == new.len() { (0, cursor) } else { resync(new, at, base, cursor, index) };
        push_number(out, copied as u64);
        let jump = resume as i64 - cursor as i64;
        push_number(out, (jump << 1 ^ jump >> 63) as u64);
        push_number(out, fresh as u64);
        out.extend_from_slice(&new[at..at + fresh]);
        at += fresh;
        cursor = resume;
    }
}

/// From a difference at `new[at]`, `base[cursor]`: how many new bytes there are, and where in the base it goes on after them.
fn resync(new: &[u8], at: usize, base: &[u8], cursor: usize, index: &mut Index) -> (usize, usize) {
    let equal = |n: usize, b: usize, len: usize| match (new.get(n..n + len), base.get(b..b + len)) {
        (Some(new), Some(base)) => new == base,
        _ => false,
    };
    for fresh in 1..=STEP {
        let (n, b) = (at + fresh, cursor + fresh);
        if equal(n, b, MATCH) {
            return (fresh, b);
        }
        // A shift needs a longer match: a few zeros are everywhere.
        for shift in 1..=NEAR {
            if equal(n, b + shift, 2 * MATCH) {
                return (fresh, b + shift);
            }
            if b >= shift + cursor && equal(n, b - shift, 2 * MATCH) {
                return (fresh, b - shift);
            }
        }
    }
    for n in at..new.len() {
        let Some(key) = new[n..].first_chunk::<KEY>() else { break };
        // (Zeros match too easily, and lead away from the place where they belong.)
        if n > at
            && *key != [0; KEY]
            && let Some(found) = index.find(key, base)
        {
            return (n - at, found);
        }
    }
    (new.len() - at, cursor)
}

/// How many bytes are the same.
fn common(a: &[u8], b: &[u8]) -> usize {
    let words = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0).take_while(|(a, b)| a == b).count() * 8;
    words + a[words..].iter().zip(&b[words..]).take_while(|(a, b)| a == b).count()
}

fn push_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A varint that is at most 2^32: nothing here is longer.
fn number(bytes: &mut &[u8]) -> Result<usize, StateError> {
    let mut number = 0u64;
    for shift in (0..35).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(StateError::Malformed)?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return usize::try_from(number).map_err(|_| StateError::Malformed);
        }
    }
    Err(StateError::Malformed)
}

fn signed(number: usize) -> isize {
    (number >> 1) as isize ^ -((number & 1) as isize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A state as a VMM makes them: a lot that stays, numbers that count, a list that grows.
    fn state(epoch: u64) -> Vec<u8> {
        let mut bytes = b"UNDSTATE".to_vec();
        let mut word = 1u64;
        for i in 0..5000u64 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(i);
            bytes.extend_from_slice(&word.to_le_bytes());
            if i % 250 == 0 {
                push_number(&mut bytes, epoch * 1000 + i);
            }
        }
        bytes
    }

    fn encoded(encoder: &mut StateEncoder, epoch: u64, state: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encoder.encode(Epoch(epoch), state, &mut out);
        out
    }

    #[test]
    fn a_state_in_which_some_numbers_moved_on_costs_a_few_bytes_each() {
        let mut encoder = StateEncoder::default();
        let first = encoded(&mut encoder, 1, &state(1));
        assert_eq!(decode(&first, None).unwrap(), state(1));
        // From 2 to 17 the varints grow by a byte.
        let mut before = 1;
        for epoch in [2, 17, 130] {
            let delta = encoded(&mut encoder, epoch, &state(epoch));
            assert!(delta.len() < 20 * 12, "{} bytes at epoch {epoch}", delta.len());
            let decoded = decode(&delta, Some((Epoch(before), &state(before))));
            assert!(decoded.unwrap() == state(epoch), "epoch {epoch}");
            before = epoch;
        }
    }

    #[test]
    fn a_part_that_moved_far_is_found() {
        let mut encoder = StateEncoder::default();
        let before = state(1);
        encoded(&mut encoder, 1, &before);
        let mut after = before[..9000].to_vec();
        after.extend((0..700u32).flat_map(|i| (i * i).to_le_bytes()));
        after.extend_from_slice(&before[12_000..]);
        let delta = encoded(&mut encoder, 2, &after);
        assert!(delta.len() < 3000, "{}", delta.len());
        assert_eq!(decode(&delta, Some((Epoch(1), &before))).unwrap(), after);
    }

    #[test]
    fn a_change_to_a_state_that_is_not_here_is_refused() {
        let mut encoder = StateEncoder::default();
        encoded(&mut encoder, 4, &state(4));
        let delta = encoded(&mut encoder, 5, &state(5));
        let of = |held| StateError::Base { named: Epoch(4), held };
        assert_eq!(decode(&delta, None), Err(of(None)));
        assert_eq!(decode(&delta, Some((Epoch(3), &state(4)))), Err(of(Some(Epoch(3)))));
        encoder.restart();
        let full = encoded(&mut encoder, 6, &state(6));
        assert_eq!(decode(&full, None).unwrap(), state(6), "after a restart nothing is needed");
    }

    proptest! {
        #[test]
        fn any_two_states_give_a_change_that_makes_the_one_of_the_other(
            base in proptest::collection::vec(0u8..4, 0..400), new in proptest::collection::vec(0u8..4, 0..400),
            keep in 0usize..400,
        ) {
            let mut new = new;
            new.splice(0..0, base.iter().take(keep).copied());
            let mut encoder = StateEncoder::default();
            encoded(&mut encoder, 1, &base);
            let delta = encoded(&mut encoder, 2, &new);
            prop_assert_eq!(decode(&delta, Some((Epoch(1), &base))).unwrap(), new);
        }

        #[test]
        fn any_bytes_are_a_state_or_not_but_never_panic(
            kind in 0u8..3, len in 0u32..300, body in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let mut bytes = vec![kind];
            bytes.extend_from_slice(&1u64.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
            bytes.extend_from_slice(&body);
            if let Ok(state) = decode(&bytes, Some((Epoch(1), &[7; 64]))) {
                prop_assert_eq!(state.len(), len as usize);
            }
            let _ = decode(&body, None);
        }
    }
}
