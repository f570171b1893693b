//! A saved machine as bytes: a header, a list of device payloads, a checksum.
//!
//! ```text
//! "UNDSTATE" | u32 LE format version | u32 LE CRC-32 of what follows | postcard(Vec<Payload>)
//! ```
//! Any bytes are survived; what does not fit exactly is an error. What is inside each payload is its owner's business
//! ([`crate::devices::saved`]).

use anyhow::{Context, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::devices::{Payload, Payloads, RestoreError};

const MAGIC: &[u8; 8] = b"UNDSTATE";
const FORMAT: u32 = 1;
/// Larger than any machine's device state (32 vCPUs with AMX need about 500 KiB).
pub const MAX_LEN: usize = 64 << 20;

/// Why bytes are not a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// Not ours.
    #[error("this is not the saved state of a machine")]
    NotAState,
    /// Another format.
    #[error(
        "the saved state has format {0}, this program reads format {FORMAT}: use the program that saved it or a newer one"
    )]
    Format(u32),
    /// Damaged.
    #[error("the saved state is damaged: {0}")]
    Damaged(String),
    /// The payloads contradict one another.
    #[error(transparent)]
    Payloads(#[from] RestoreError),
}

/// The bytes of a saved machine.
pub fn encode(payloads: &[Payload]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64 * 1024);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let mut bytes = postcard::to_extend(payloads, bytes)
        // Cannot fail: plain structs into a Vec.
        .expect("payloads serialise");
    let crc = crc32fast::hash(&bytes[16..]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Back to payloads.
pub fn decode(bytes: &[u8]) -> Result<Payloads, ContainerError> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if !bytes.starts_with(MAGIC) || bytes.len() > MAX_LEN {
        return Err(ContainerError::NotAState);
    }
    let (Some(format), Some(crc), Some(body)) = (word(8), word(12), bytes.get(16..)) else {
        return Err(ContainerError::Damaged("it ends within its header".into()));
    };
    if format != FORMAT {
        return Err(ContainerError::Format(format));
    }
    if crc32fast::hash(body) != crc {
        return Err(ContainerError::Damaged("its checksum is wrong".into()));
    }
    let (payloads, rest) =
        postcard::take_from_bytes::<Vec<Payload>>(body).map_err(|e| ContainerError::Damaged(e.to_string()))?;
    if !rest.is_empty() {
        return Err(ContainerError::Damaged(format!("{} bytes too many", rest.len())));
    }
    Ok(Payloads::new(payloads)?)
}

/// A saved machine with one more payload.
pub fn append(bytes: &[u8], payload: Payload) -> Result<Vec<u8>, ContainerError> {
    let mut payloads = decode(bytes)?.into_vec();
    payloads.push(payload);
    Ok(encode(&payloads))
}

/// A payload that is not a device's.
pub fn payload<T: Serialize>(kind: &str, name: &str, version: u32, state: &T) -> anyhow::Result<Payload> {
    let bytes = postcard::to_allocvec(state).with_context(|| format!("cannot write the state of {kind} {name}"))?;
    Ok(Payload { kind: kind.into(), name: name.into(), version, bytes })
}

/// Take such a payload back.
pub fn take<T: DeserializeOwned>(from: &mut Payloads, kind: &str, name: &str, version: u32) -> anyhow::Result<T> {
    let found = from.take(kind, name)?;
    ensure!(
        found.version == version,
        "the saved state of {kind} {name} has version {}, this program reads {version}: use the program that saved it or a newer one",
        found.version
    );
    let (state, rest) = postcard::take_from_bytes(&found.bytes)
        .with_context(|| format!("the saved state of {kind} {name} is damaged"))?;
    ensure!(rest.is_empty(), "the saved state of {kind} {name} has {} bytes too many", rest.len());
    Ok(state)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some() -> Vec<Payload> {
        vec![
            Payload { kind: "a".into(), name: "1".into(), version: 1, bytes: vec![1, 2, 3] },
            Payload { kind: "a".into(), name: "2".into(), version: 7, bytes: vec![] },
        ]
    }

    #[test]
    fn what_was_encoded_is_decoded_and_nothing_may_be_left() {
        let mut p = decode(&encode(&some())).unwrap();
        assert_eq!(p.take("a", "2").unwrap().version, 7);
        assert!(matches!(p.finish(), Err(RestoreError::Leftover { .. })));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = encode(&some());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert!(decode(&bad).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&body);
            let mut bytes = MAGIC.to_vec();
            bytes.extend(FORMAT.to_le_bytes());
            bytes.extend(crc32fast::hash(&body).to_le_bytes());
            bytes.extend(body);
            let _ = decode(&bytes);
        }
    }
}
