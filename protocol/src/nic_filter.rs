//! What a network card lets through: the words of its configuration. (What they mean for a packet: the VMM's `net::filter`.)
//!
//! ```text
//! spoof=allow|deny        the guest sends from its card's own address only (deny), or from any (allow)
//! addresses=IP+IP+…       and says in IP, ARP and neighbour discovery only that it is these
//! vlan=ID                 tagged towards the bridge, untagged to the guest
//! rate-out=BYTES          bytes a second that leave the guest, with K, M or G for 10³, 10⁶, 10⁹; rate-in= to the guest
//! burst=BYTES             that may pass at once before a rate counts
//! storm=N                 packets a second of each sort: broadcast, multicast, to addresses that the card does not have
//! ```

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most addresses of a card.
pub const MAX_ADDRESSES: usize = 32;
/// Least rate, in bytes a second: the largest packet twice a second.
pub const LEAST_RATE: u64 = 131_072;
/// What may pass at once if nothing is configured: the largest packet four times.
pub const BURST: u64 = 262_144;

/// See the module. By default everything passes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterSpec {
    /// Only the card's own address may be a sender.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deny_spoof: bool,
    /// Only these may be senders; empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_out: Option<u64>,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_in: Option<u64>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    /// Packets a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storm: Option<u32>,
}

impl FilterSpec {
    /// Take one word of a configuration. `None`: it is none of these. Otherwise whether it had been said before.
    ///
    /// # Errors
    /// Why its value cannot be.
    pub fn word(&mut self, key: &str, value: &str) -> Option<Result<bool, String>> {
        Some(match key {
            "spoof" => match value {
                "allow" => Ok(std::mem::replace(&mut self.deny_spoof, false)),
                "deny" => Ok(std::mem::replace(&mut self.deny_spoof, true)),
                _ => Err(format!("spoof is allow or deny, not {value:?}")),
            },
            "addresses" => addresses(value).map(|list| !std::mem::replace(&mut self.addresses, list).is_empty()),
            "vlan" => {
                let id = value.parse().ok().filter(|id| (1..=4094).contains(id));
                id.map(|id| self.vlan.replace(id).is_some()).ok_or_else(|| "a VLAN is 1 to 4094".into())
            }
            "rate-out" => rate(value).map(|rate| self.rate_out.replace(rate).is_some()),
            "rate-in" => rate(value).map(|rate| self.rate_in.replace(rate).is_some()),
            "burst" => match amount(value).filter(|bytes| *bytes >= 1514) {
                Some(bytes) => Ok(self.burst.replace(bytes).is_some()),
                None => Err("burst is a number of bytes, a whole packet (1514) or more".into()),
            },
            "storm" => match value.parse().ok().filter(|n| *n > 0) {
                Some(n) => Ok(self.storm.replace(n).is_some()),
                None => Err("storm is a number of packets a second, 1 or more".into()),
            },
            _ => return None,
        })
    }

    /// Whether these words can stand together.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), String> {
        if self.burst.is_some() && self.rate_in.is_none() && self.rate_out.is_none() {
            return Err("burst means nothing without rate-in or rate-out".into());
        }
        Ok(())
    }

    /// The words, each with a comma in front.
    #[must_use]
    pub fn words(&self) -> String {
        let Self { deny_spoof, addresses, vlan, rate_out, rate_in, burst, storm } = self;
        let list: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        let word = |key: &str, value: Option<String>| value.map(|v| format!(",{key}={v}")).unwrap_or_default();
        [
            word("spoof", deny_spoof.then(|| "deny".into())),
            word("addresses", (!list.is_empty()).then(|| list.join("+"))),
            word("vlan", vlan.map(|v| v.to_string())),
            word("rate-out", rate_out.map(|v| v.to_string())),
            word("rate-in", rate_in.map(|v| v.to_string())),
            word("burst", burst.map(|v| v.to_string())),
            word("storm", storm.map(|v| v.to_string())),
        ]
        .concat()
    }
}

fn addresses(value: &str) -> Result<Vec<IpAddr>, String> {
    let one = |text: &str| IpAddr::from_str(text).map_err(|_| format!("{text:?} is no IP address"));
    let list = value.split('+').map(one).collect::<Result<Vec<_>, _>>()?;
    if list.len() > MAX_ADDRESSES {
        return Err(format!("a card has at most {MAX_ADDRESSES} addresses"));
    }
    Ok(list)
}

fn rate(value: &str) -> Result<u64, String> {
    let refused = || format!("a rate is bytes a second, e.g. 125M, {LEAST_RATE} or more, not {value:?}");
    amount(value).filter(|rate| *rate >= LEAST_RATE).ok_or_else(refused)
}

fn amount(value: &str) -> Option<u64> {
    let (digits, unit) = match value.chars().last()? {
        'K' => (&value[..value.len() - 1], 1_000),
        'M' => (&value[..value.len() - 1], 1_000_000),
        'G' => (&value[..value.len() - 1], 1_000_000_000),
        _ => (value, 1),
    };
    if !digits.chars().all(|c| c.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<FilterSpec, String> {
        let mut spec = FilterSpec::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').unwrap();
            assert!(!spec.word(key, value).unwrap()?);
        }
        spec.check().map(|()| spec)
    }

    #[test]
    fn words_are_read_and_written_the_same() {
        for text in [
            "",
            ",spoof=deny,addresses=10.0.0.1+fd00::1,vlan=12,rate-out=125000000,rate-in=2000000,burst=65536,storm=1000",
        ] {
            assert_eq!(read(text).unwrap().words(), text);
        }
        assert_eq!(read("rate-in=125M,burst=64K").unwrap().words(), ",rate-in=125000000,burst=64000");
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_reason() {
        for (text, why) in [
            ("spoof=maybe", "allow or deny"),
            ("addresses=10.0.0", "no IP address"),
            ("addresses=", "no IP address"),
            ("vlan=0", "1 to 4094"),
            ("vlan=4095", "1 to 4094"),
            ("rate-out=1", "131072 or more"),
            ("rate-out=+5M", "bytes a second"),
            ("rate-in=99999999999G", "bytes a second"),
            ("storm=0", "1 or more"),
            ("burst=100K", "without rate"),
            ("burst=1,rate-in=1M", "whole packet"),
        ] {
            let e = read(text).unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_word_that_is_said_twice_is_noticed() {
        let mut spec = FilterSpec::default();
        assert_eq!(spec.word("vlan", "3"), Some(Ok(false)));
        assert_eq!(spec.word("vlan", "3"), Some(Ok(true)));
        assert_eq!(spec.word("tap", "x"), None);
    }
}
