//! KVM's structures in saved states: their bytes, with their exact length checked.
//!
//! (kvm-bindings' own serde support pads or truncates silently; a saved state with a wrong length must be refused.)

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

struct ByteVec(Vec<u8>);

impl<'de> Deserialize<'de> for ByteVec {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteVec;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<ByteVec, E> {
                Ok(ByteVec(bytes.to_vec()))
            }
        }
        d.deserialize_bytes(Visitor)
    }
}

fn exact<T: FromBytes, E: serde::de::Error>(bytes: &[u8]) -> Result<T, E> {
    T::read_from_bytes(bytes).map_err(|_| {
        E::custom(format!("{} bytes instead of {} for {}", bytes.len(), size_of::<T>(), std::any::type_name::<T>()))
    })
}

/// `#[serde(with = "raw::one")]`: one structure.
pub mod one {
    use super::*;
    /// Its bytes.
    pub fn serialize<T: IntoBytes + Immutable, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(value.as_bytes())
    }
    /// From exactly as many bytes.
    pub fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(d: D) -> Result<T, D::Error> {
        exact(&ByteVec::deserialize(d)?.0)
    }
}

/// `#[serde(with = "raw::list")]`: several structures behind one another.
pub mod list {
    use super::*;
    /// Their bytes.
    pub fn serialize<T: IntoBytes + Immutable, S: Serializer>(value: &[T], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(value.as_bytes())
    }
    /// From a multiple of as many bytes.
    pub fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(d: D) -> Result<Vec<T>, D::Error> {
        let bytes = ByteVec::deserialize(d)?.0;
        let chunks = bytes.chunks_exact(size_of::<T>().max(1));
        if !chunks.remainder().is_empty() {
            return Err(D::Error::custom(format!("{} bytes are no whole number of entries", bytes.len())));
        }
        chunks.map(exact).collect()
    }
}

/// `#[serde(with = "raw::bytes")]`: plain bytes, without serde's per-element work.
pub mod bytes {
    use super::*;
    /// The bytes.
    pub fn serialize<S: Serializer>(value: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(value)
    }
    /// The bytes.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        Ok(ByteVec::deserialize(d)?.0)
    }
}
