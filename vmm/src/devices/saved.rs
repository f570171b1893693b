//! How a device's state travels: a [`Payload`] per device with its kind, its version and its bytes.
//!
//! A device's saved state is a type of its own (`state::V1` in the device's module), apart from its running fields.
//! `save` destructures the device exhaustively, so that a forgotten field does not compile; `restore` validates every
//! range, because the bytes may come from anywhere. Restoring goes into a device that was built with the same
//! configuration. After an error the device is unchanged or must not be used; either way the machine does not start.
//!
//! Bytes are postcard (its wire format is specified and stable). Golden bytes of every released version stay in the
//! tests.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Something whose state can be saved and restored.
pub trait Snapshot {
    /// The kind of device, e.g. `uart16550`. Never reused for something else.
    const KIND: &'static str;
    /// The version of [`Snapshot::State`] that `save` makes.
    const VERSION: u32;
    /// The state's type.
    type State: Serialize + DeserializeOwned;
    /// The whole state of the device.
    fn save(&self) -> Self::State;
    /// Become what was saved.
    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError>;
}

/// Why a device could not take a saved state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// A needed payload is not there.
    #[error(
        "the saved machine has no state for {kind} \"{name}\": it was saved from a machine of another configuration"
    )]
    Missing {
        /// Device kind.
        kind: String,
        /// Device name.
        name: String,
    },
    /// A payload that no device took.
    #[error("the saved machine has a {kind} \"{name}\" and this machine has none: give it the same configuration")]
    Leftover {
        /// Device kind.
        kind: String,
        /// Device name.
        name: String,
    },
    /// Two payloads for one device.
    #[error("the saved machine has two states for {kind} \"{name}\": the file is damaged")]
    Duplicate {
        /// Device kind.
        kind: String,
        /// Device name.
        name: String,
    },
    /// Saved by a newer (or a forgotten) version of this program.
    #[error(
        "the state of {kind} has version {found}, this program knows version {known}: use the program that saved it or a newer one"
    )]
    Version {
        /// Device kind.
        kind: &'static str,
        /// Version of the payload.
        found: u32,
        /// Version that this program makes and reads.
        known: u32,
    },
    /// The bytes are not a state.
    #[error("the state of {kind} cannot be decoded ({why}): the file is damaged")]
    Garbled {
        /// Device kind.
        kind: &'static str,
        /// What the decoder said.
        why: String,
    },
    /// A value that the device can never have had.
    #[error("the state of {kind} is impossible ({what}): the file is damaged or belongs to another configuration")]
    Invalid {
        /// Device kind.
        kind: &'static str,
        /// Which value.
        what: String,
    },
}

impl RestoreError {
    /// Shorthand for [`RestoreError::Invalid`].
    pub fn invalid(kind: &'static str, what: impl Into<String>) -> Self {
        Self::Invalid { kind, what: what.into() }
    }
}

/// The saved state of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// [`Snapshot::KIND`].
    pub kind: String,
    /// Which one of its kind, e.g. `com1`; unique per kind.
    pub name: String,
    /// [`Snapshot::VERSION`].
    pub version: u32,
    /// The state, postcard.
    pub bytes: Vec<u8>,
}

impl Payload {
    /// Save `device` under `name`.
    pub fn of<D: Snapshot>(device: &D, name: &str) -> Self {
        let bytes = postcard::to_allocvec(&device.save())
            // Cannot fail: the states are plain structs, and memory is the only resource that a Vec needs.
            .expect("a device state serialises");
        Self { kind: D::KIND.into(), name: name.into(), version: D::VERSION, bytes }
    }

    /// Restore `device` from this payload.
    pub fn restore_into<D: Snapshot>(&self, device: &mut D) -> Result<(), RestoreError> {
        if self.kind != D::KIND {
            return Err(RestoreError::invalid(D::KIND, format!("it is the state of a {}", self.kind)));
        }
        if self.version != D::VERSION {
            return Err(RestoreError::Version { kind: D::KIND, found: self.version, known: D::VERSION });
        }
        let garbled = |why: String| RestoreError::Garbled { kind: D::KIND, why };
        let (state, rest) = postcard::take_from_bytes(&self.bytes).map_err(|e| garbled(e.to_string()))?;
        if !rest.is_empty() {
            return Err(garbled(format!("{} bytes too many", rest.len())));
        }
        device.restore(state)
    }
}

/// The payloads of a saved machine, to be taken one by one; what nobody takes is an error.
#[derive(Debug, Clone, Default)]
pub struct Payloads(Vec<Payload>);

impl Payloads {
    /// All payloads of a saved machine. Refuses two for the same device.
    pub fn new(payloads: Vec<Payload>) -> Result<Self, RestoreError> {
        for (i, p) in payloads.iter().enumerate() {
            if payloads[..i].iter().any(|q| q.kind == p.kind && q.name == p.name) {
                return Err(RestoreError::Duplicate { kind: p.kind.clone(), name: p.name.clone() });
            }
        }
        Ok(Self(payloads))
    }

    /// Take the payload of `device` called `name` and restore it.
    pub fn restore<D: Snapshot>(&mut self, device: &mut D, name: &str) -> Result<(), RestoreError> {
        self.take(D::KIND, name)?.restore_into(device)
    }

    /// Take a payload without restoring it.
    pub fn take(&mut self, kind: &str, name: &str) -> Result<Payload, RestoreError> {
        match self.0.iter().position(|p| p.kind == kind && p.name == name) {
            Some(i) => Ok(self.0.swap_remove(i)),
            None => Err(RestoreError::Missing { kind: kind.into(), name: name.into() }),
        }
    }

    /// What has not been taken.
    pub fn into_vec(self) -> Vec<Payload> {
        self.0
    }

    /// Everything has been restored: anything left is an error.
    pub fn finish(self) -> Result<(), RestoreError> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some(p) => Err(RestoreError::Leftover { kind: p.kind, name: p.name }),
        }
    }
}
