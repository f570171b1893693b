//! A heartbeat, as one UDP datagram.
//!
//! ```text
//!   "USMON1" │ HMAC-SHA-256 of all that follows, under the cluster's key (RFC 2104), 32 bytes │ the heartbeat as JSON
//! ```
//! Who has not the key is not heard. A datagram that was recorded and is sent again says nothing new: each carries when its sender's
//! process began and a number that grows (see [`Heartbeat::newer_than`]).

use std::collections::BTreeMap;

use ring::hmac;
use serde::{Deserialize, Serialize};
use understudy_protocol::key::KEY_LEN;

use crate::matrix::{Bmc, Guest, Machine};

/// What every datagram begins with.
const MAGIC: &[u8; 6] = b"USMON1";
const TAG: usize = 32;
/// Longest datagram that is made or read, bytes: what UDP carries.
pub const MAX_DATAGRAM: usize = 60_000;

/// Over which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Plane {
    /// What the machines serve.
    Production,
    /// Corosync's.
    Management,
}

impl Plane {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Production, Self::Management];

    /// As people read it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Production => "production",
            Self::Management => "management",
        }
    }
}

/// A machine of the sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSeen {
    /// Its name.
    pub name: String,
    /// How it is.
    pub machine: Machine,
    /// How its guest is.
    pub guest: Guest,
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Who.
    pub node: String,
    /// When its process began, ms since 1970.
    pub began: u64,
    /// Grows with each heartbeat; both planes' are of the same number.
    pub number: u64,
    /// The network that it was sent over.
    pub plane: Plane,
    /// Whom it hears in the production network.
    pub hears: Vec<String>,
    /// The machines that run there, or did.
    pub machines: Vec<MachineSeen>,
    /// Machines that found no place in the datagram.
    #[serde(default)]
    pub left_out: usize,
    /// What management controllers have told the sender. Counts if it is the one that speaks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bmc: BTreeMap<String, Bmc>,
}

/// Why a datagram is no heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoHeartbeat {
    /// Somebody else's.
    #[error("it does not begin as a heartbeat does")]
    Foreign,
    /// Another key.
    #[error("it was made with another key: the key file must be the same on all nodes")]
    Key,
    /// Ours, and not to be read.
    #[error("it cannot be read ({0}): is the sender of another version?")]
    Unreadable(String),
}

impl Heartbeat {
    /// Whether it says something new after the one of (began, number).
    pub fn newer_than(&self, last: Option<(u64, u64)>) -> bool {
        last.is_none_or(|last| (self.began, self.number) > last)
    }

    /// As a datagram. Machines that make it too long are left out and counted.
    pub fn seal(&self, key: &[u8; KEY_LEN]) -> Vec<u8> {
        let mut said = self.clone();
        let body = loop {
            // A struct of texts and numbers always has a JSON form.
            let body = serde_json::to_vec(&said).unwrap_or_default();
            if body.len() + MAGIC.len() + TAG <= MAX_DATAGRAM || said.machines.is_empty() {
                break body;
            }
            let keep = said.machines.len() / 2;
            said.left_out += said.machines.len() - keep;
            said.machines.truncate(keep);
        };
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &body);
        [MAGIC, tag.as_ref(), &body].concat()
    }

    /// From a datagram.
    pub fn open(datagram: &[u8], key: &[u8; KEY_LEN]) -> Result<Self, NoHeartbeat> {
        let rest = datagram.strip_prefix(MAGIC).ok_or(NoHeartbeat::Foreign)?;
        let (tag, body) = rest.split_at_checked(TAG).ok_or(NoHeartbeat::Foreign)?;
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, key), body, tag).map_err(|_| NoHeartbeat::Key)?;
        serde_json::from_slice(body).map_err(|e| NoHeartbeat::Unreadable(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heartbeat(machines: usize) -> Heartbeat {
        let machine =
            |i| MachineSeen { name: format!("machine-{i}"), machine: Machine::Running, guest: Guest::Unwatched };
        Heartbeat {
            node: "n1".into(),
            began: 5,
            number: 7,
            plane: Plane::Production,
            hears: vec!["n2".into()],
            machines: (0..machines).map(machine).collect(),
            left_out: 0,
            bmc: BTreeMap::new(),
        }
    }

    #[test]
    fn what_is_sealed_is_opened_by_who_has_the_key_and_by_nobody_else() {
        let sealed = heartbeat(3).seal(&[1; 32]);
        assert_eq!(Heartbeat::open(&sealed, &[1; 32]), Ok(heartbeat(3)));
        assert_eq!(Heartbeat::open(&sealed, &[2; 32]), Err(NoHeartbeat::Key));
        for at in [7, 40, sealed.len() - 1] {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(Heartbeat::open(&changed, &[1; 32]), Err(NoHeartbeat::Key));
        }
        assert_eq!(Heartbeat::open(&sealed[..20], &[1; 32]), Err(NoHeartbeat::Foreign));
        assert_eq!(Heartbeat::open(b"", &[1; 32]), Err(NoHeartbeat::Foreign));
    }

    #[test]
    fn what_was_said_before_is_not_new_nor_is_what_an_earlier_process_said() {
        let said = heartbeat(0);
        assert!(said.newer_than(None) && said.newer_than(Some((5, 6))) && said.newer_than(Some((4, 100))));
        assert!(!said.newer_than(Some((5, 7))) && !said.newer_than(Some((6, 0))));
    }

    #[test]
    fn a_node_with_thousands_of_machines_is_still_heard() {
        let sealed = heartbeat(5000).seal(&[1; 32]);
        assert!(sealed.len() <= MAX_DATAGRAM);
        let opened = Heartbeat::open(&sealed, &[1; 32]).unwrap();
        assert_eq!(opened.machines.len() + opened.left_out, 5000);
        assert!(opened.machines.len() > 300);
    }
}
