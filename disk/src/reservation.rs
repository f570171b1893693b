//! SCSI persistent reservations as the fence of a shared device (SPC-4 §5.13).
//!
//! Every owner of a disk registers a key of its own with the device, and one reservation of type *write exclusive, registrants only* lets nobody else
//! write. A takeover registers its own key, then preempts *and aborts* its predecessor's: from then on the device refuses what the predecessor sends, and what it
//! had sent before has ended. All of that is before the first write to the base.
//!
//! ```text
//!  claim the owner record ─► register ─► preempt and abort each older key of this machine (or reserve) ─► verify ─► write
//! ```
//! A key tells what it is of: machine, node, generation ([`Key`]). Only older keys of the same machine are preempted; with any other reservation the disk is refused.
//!
//! **After the connection was lost** a device may have forgotten a registration, or all of them ("nexus loss", a target that restarted without APTPL). [`Fence::again`]
//! puts that right, and must not bring back who was superseded meanwhile. The owner registers *and then* reads the owner record; its successor writes the record
//! *and then* reads the keys. So one of them sees the other: either the old owner finds the record changed and withdraws its key, or the successor finds the key and
//! preempts it. Nothing is written between registering and reading the record.

use std::sync::Arc;

use understudy_protocol::ids::Generation;

use crate::error::{Error, Result};

/// PERSISTENT RESERVE OUT type: write exclusive, registrants only.
pub const TYPE: u8 = 5;

/// A registration's key: 24 bits of the machine, 16 of the node, 24 of the generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(pub u64);

const GENERATION_BITS: u32 = 24;

impl Key {
    /// The key of who runs this generation of this machine on this node.
    pub fn of(machine: &str, node: &str, generation: Generation) -> Self {
        // Never zero, which is no key.
        let machine = u64::from(crc32fast::hash(machine.as_bytes()) & 0xff_ffff).max(1);
        let node = u64::from(crc32fast::hash(node.as_bytes()) & 0xffff);
        Key(machine << 40 | node << GENERATION_BITS | generation.0 & ((1 << GENERATION_BITS) - 1))
    }

    fn same_machine(self, other: Key) -> bool {
        self.0 >> 40 == other.0 >> 40
    }

    fn generation(self) -> u64 {
        self.0 & ((1 << GENERATION_BITS) - 1)
    }

    /// Whether `self` is of a later generation (they wrap after 16 million takeovers).
    fn later_than(self, other: Key) -> bool {
        let ahead = self.generation().wrapping_sub(other.generation()) & ((1 << GENERATION_BITS) - 1);
        ahead != 0 && ahead < 1 << (GENERATION_BITS - 1)
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

/// The reservation of a device: whose key holds it, and its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// The holder's key.
    pub key: Key,
    /// Scope and type byte's lower half.
    pub kind: u8,
}

/// What a device with persistent reservations does for *this* connection to it.
pub trait Reservations: Send + Sync {
    /// All registered keys.
    ///
    /// # Errors
    /// It has no reservations ([`Error::Refused`]); what it says.
    fn keys(&self) -> Result<Vec<Key>>;
    /// The reservation.
    ///
    /// # Errors
    /// What it says.
    fn held(&self) -> Result<Option<Held>>;
    /// Register this key, whatever was registered before. Says whether it survives the device's loss of power (APTPL).
    ///
    /// # Errors
    /// What it says.
    fn register(&self, key: Key) -> Result<bool>;
    /// Reserve, type [`TYPE`].
    ///
    /// # Errors
    /// [`Error::Preempted`] if another holds it; what it says.
    fn reserve(&self, key: Key) -> Result<()>;
    /// Remove another's registration, end what it has under way, and take its reservation over if it had it.
    ///
    /// # Errors
    /// [`Error::Preempted`] if this connection or that key is not registered (any more); what it says.
    fn preempt_and_abort(&self, key: Key, other: Key) -> Result<()>;
    /// Withdraw this connection's registration, and with it its reservation.
    ///
    /// # Errors
    /// What it says.
    fn unregister(&self, key: Key) -> Result<()>;
}

/// A reservation that this process has.
pub struct Fence {
    device: Arc<dyn Reservations>,
    name: String,
    key: Key,
    persistent: bool,
}

impl Fence {
    /// Take it. The owner record is ours already, so that whoever comes later finds it changed.
    ///
    /// # Errors
    /// Somebody else's reservation; a later generation's; what the device says. Nothing stays registered then.
    pub fn take(device: Arc<dyn Reservations>, name: &str, key: Key) -> Result<Self> {
        let persistent = device.register(key)?;
        let fence = Fence { device, name: name.to_owned(), key, persistent };
        fence.settle().inspect_err(|_| fence.withdraw())?;
        Ok(fence)
    }

    /// Whether it survives a power loss of the device.
    pub fn persistent(&self) -> bool {
        self.persistent
    }

    /// The key.
    pub fn key(&self) -> Key {
        self.key
    }

    /// We are registered: every older key of this machine goes, the reservation is ours.
    fn settle(&self) -> Result<()> {
        // Another starter may be at the same; each round at least one of the keys goes.
        for _ in 0..16 {
            let others: Vec<Key> =
                self.device.keys()?.into_iter().filter(|key| *key != self.key && key.same_machine(self.key)).collect();
            if let Some(later) = others.iter().find(|other| !self.key.later_than(**other)) {
                return Err(Error::Owned(format!(
                    "{}: the device has a registration {later} of this machine that is not older than this one ({}): it runs elsewhere, or \
                     a node was named like another",
                    self.name, self.key
                )));
            }
            match self.device.held()? {
                Some(held) if !held.key.same_machine(self.key) => {
                    return Err(Error::Owned(format!(
                        "{}: the device is reserved by a key that is not this machine's ({}, type {}): another machine or another cluster software \
                         uses it; release it there, or choose another device",
                        self.name, held.key, held.kind
                    )));
                }
                Some(held) if held.key == self.key && held.kind != TYPE => {
                    return Err(Error::Owned(format!(
                        "{}: the device is reserved with type {} and not {TYPE}",
                        self.name, held.kind
                    )));
                }
                Some(held) if held.key == self.key && others.is_empty() => return Ok(()),
                Some(_) => {}
                None if others.is_empty() => self.device.reserve(self.key)?,
                None => {}
            }
            for other in others {
                match self.device.preempt_and_abort(self.key, other) {
                    // It went by itself, or somebody later preempts us: the next round sees which.
                    Ok(()) | Err(Error::Preempted { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            if !self.device.keys()?.contains(&self.key) {
                return Err(self.preempted());
            }
        }
        let keys: Vec<_> = self.device.keys()?.iter().map(Key::to_string).collect();
        let held =
            self.device.held()?.map_or_else(|| "nobody".to_owned(), |held| format!("{}, type {}", held.key, held.kind));
        Err(Error::Owned(format!(
            "{}: the device's reservation cannot be had: it is held by {held}, its keys are {}; who else takes it?",
            self.name,
            keys.join(" and ")
        )))
    }

    fn preempted(&self) -> Error {
        Error::Preempted { disk: self.name.clone() }
    }

    /// The device may have forgotten us: be registered again, if `still_ours` says so *afterwards*. Nothing may be written by this process before it has returned.
    ///
    /// # Errors
    /// What `still_ours` says; then this process is not registered. What the device says.
    pub fn again(&self, still_ours: impl Fn() -> Result<()>) -> Result<()> {
        // Saves a later owner the trouble; what counts is the second time.
        still_ours()?;
        self.device.register(self.key)?;
        still_ours().and_then(|()| self.settle()).inspect_err(|_| self.withdraw())
    }

    /// Withdraw the registration, so that others may use the device.
    pub fn withdraw(&self) {
        // It may be gone already; then there is nothing to withdraw.
        let _ = self.device.unregister(self.key);
    }
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fence({}, {})", self.name, self.key)
    }
}

/// The parameter data of PERSISTENT RESERVE IN / READ KEYS (SPC-4 §6.15.2).
///
/// # Errors
/// It is cut short, as the rest of a sentence.
pub fn parse_keys(data: &[u8]) -> std::result::Result<Vec<Key>, &'static str> {
    let keys = additional(data)?;
    Ok(keys
        .chunks_exact(8)
        .map(|key| Key(u64::from_be_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]])))
        .collect())
}

/// The parameter data of PERSISTENT RESERVE IN / READ RESERVATION (SPC-4 §6.15.3).
///
/// # Errors
/// It is cut short, as the rest of a sentence.
pub fn parse_held(data: &[u8]) -> std::result::Result<Option<Held>, &'static str> {
    match additional(data)? {
        [] => Ok(None),
        [a, b, c, d, e, f, g, h, _, _, _, _, _, kind, ..] => {
            Ok(Some(Held { key: Key(u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])), kind: kind & 0xf }))
        }
        _ => Err("its description of a reservation is too short"),
    }
}

/// PRGENERATION, ADDITIONAL LENGTH, and so many bytes.
fn additional(data: &[u8]) -> std::result::Result<&[u8], &'static str> {
    let (head, rest) = data.split_at_checked(8).ok_or("its answer is too short")?;
    let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
    rest.get(..len).ok_or("its answer is longer than it was asked for")
}

#[cfg(test)]
#[path = "reservation/tests.rs"]
mod tests;
