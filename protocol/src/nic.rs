//! How a machine's network card is written in configuration: on the VMM's command line, in the agent's parameter `nics`, in a policy.
//!
//! ```text
//! name=net0,tap=vm1n0[,bridge=br0][,mac=52:54:00:12:34:56][,queues=2][,mtu=9000][,hold=BYTES][,at-bound=wait|drop]
//!     [,spoof=deny][,addresses=10.0.0.1+fd00::1][,vlan=12][,rate-out=125M][,rate-in=125M][,burst=256K][,storm=1000]   ([`crate::nic_filter`])
//! name=net0,macvtap=mvt0[,…]
//! name=net0,stream=/run/switch.sock[,…]
//! name=net0,dgram=/run/here.sock:/run/there.sock[,…]
//! ```
//! A *tap* that is not there is made when the machine's VMM starts, and goes with it; one that is there is used and stays. Sockets carry bare frames
//! (no offloads) and are for tests and switches in user space.
//!
//! Parsing opens nothing; whether bridge and interface are there is for the node to say that runs the machine.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::control::NicShape;
use crate::nic_filter::FilterSpec;

/// Most network cards of a machine.
pub const MAX_NICS: usize = 8;
/// Most pairs of queues of a card.
pub const MAX_QUEUES: u16 = 8;
/// Longest name of a card, and (the kernel's IFNAMSIZ less its zero) of an interface.
pub const MAX_NAME: usize = 15;
/// Least and greatest MTU: what IPv4 demands (RFC 791), what a frame of 64 KiB can carry.
pub const MTU: std::ops::RangeInclusive<u16> = 68..=65_521;
/// Bytes that may be held for a commit before the bound is reached, unless configured.
pub const HOLD_BYTES: u64 = 64 << 20;
/// Least that can be configured: a few of the largest packets.
pub const LEAST_HOLD: u64 = 1 << 20;

/// A card's hardware address (EUI-48).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address of a card that was given none: the same on every node, because it follows from both names (FNV-1a, locally administered, unicast).
    #[must_use]
    pub fn of(machine: &str, nic: &str) -> Self {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for byte in machine.bytes().chain([0]).chain(nic.bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        let [a, b, c, d, e, ..] = hash.to_be_bytes();
        Self([0x02, a, b, c, d, e])
    }

    /// Whether it is a group's: broadcast or multicast.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("{text:?} is no address of a network card; write 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.chars().all(|c| c.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(part.ok_or_else(refused)?, 16).map_err(|_| refused())?;
        }
        if parts.next().is_some() { Err(refused()) } else { Ok(Self(bytes)) }
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// What is behind a card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NicBackend {
    /// A tap interface of the host, in a bridge if one is named.
    Tap {
        /// The interface.
        name: String,
        /// The bridge that it is put into.
        bridge: Option<String>,
    },
    /// A macvtap interface that is there.
    Macvtap(String),
    /// A unix stream socket, frames with their length (4 bytes, big endian) in front: QEMU's `-netdev stream`.
    Stream(String),
    /// A unix datagram socket, a frame each: QEMU's `-netdev dgram`.
    Dgram {
        /// Where frames arrive.
        local: String,
        /// Where they go.
        remote: String,
    },
    /// Nothing: what is sent vanishes.
    None {
        /// As if it took packets with a virtio-net header.
        offloads: bool,
    },
}

impl NicBackend {
    /// Whether it takes and gives packets with a virtio-net header: only then the guest may leave checksums and segmentation to it.
    #[must_use]
    pub fn offloads(&self) -> bool {
        match self {
            Self::Tap { .. } | Self::Macvtap(_) => true,
            Self::None { offloads } => *offloads,
            Self::Stream(_) | Self::Dgram { .. } => false,
        }
    }
}

/// What becomes of packets when as many wait for their commit as may.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AtBound {
    /// The guest's queue stands still until there is room.
    #[default]
    Wait,
    /// New ones are dropped, and counted.
    Drop,
}

/// One network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// What status and errors call it.
    pub name: String,
    /// What is behind it.
    pub backend: NicBackend,
    /// Its address; `None`: [`Mac::of`].
    pub mac: Option<Mac>,
    /// Pairs of queues.
    pub queues: u16,
    /// Largest packet, told to the guest; `None`: the guest's choice.
    pub mtu: Option<u16>,
    /// Bytes that may wait for their commit.
    pub hold: u64,
    /// What becomes of more.
    pub at_bound: AtBound,
    /// What passes.
    #[serde(default)]
    pub filter: FilterSpec,
}

/// Why a text is no network card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no network card: {why}; write name=net0,tap=INTERFACE[,bridge=BRIDGE]|macvtap=INTERFACE|stream=/path|dgram=/path:/path[,mac=52:54:00:12:34:56][,queues=N][,mtu=N][,hold=BYTES][,at-bound=wait|drop][,spoof=deny][,addresses=IP+IP][,vlan=ID][,rate-out=BYTES][,rate-in=BYTES][,burst=BYTES][,storm=N]"
)]
pub struct NoNic {
    text: String,
    why: String,
}

impl FromStr for NicSpec {
    type Err = NoNic;

    fn from_str(text: &str) -> Result<Self, NoNic> {
        parse(text.trim()).map_err(|why| NoNic { text: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<NicSpec, String> {
    let (mut name, mut mac, mut queues, mut mtu, mut hold, mut at_bound) = (None, None, None, None, None, None);
    let (mut backend, mut bridge, mut filter) = (None, None, FilterSpec::default());
    for part in text.split(',') {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let again = match key {
            "name" => name.replace(value.to_owned()).is_some(),
            "tap" => {
                check_interface(value)?;
                backend.replace(NicBackend::Tap { name: value.to_owned(), bridge: None }).is_some()
            }
            "macvtap" => {
                check_interface(value)?;
                backend.replace(NicBackend::Macvtap(value.to_owned())).is_some()
            }
            "stream" => {
                check_path(value)?;
                backend.replace(NicBackend::Stream(value.to_owned())).is_some()
            }
            "dgram" => {
                let (local, remote) =
                    value.split_once(':').ok_or("dgram needs two paths, /where/frames/arrive:/where/they/go")?;
                check_path(local)?;
                check_path(remote)?;
                backend.replace(NicBackend::Dgram { local: local.to_owned(), remote: remote.to_owned() }).is_some()
            }
            "none" if matches!(part, "none" | "none=offloads") => {
                backend.replace(NicBackend::None { offloads: value == "offloads" }).is_some()
            }
            "bridge" => {
                check_interface(value)?;
                bridge.replace(value.to_owned()).is_some()
            }
            "mac" => {
                let parsed: Mac = value.parse()?;
                if parsed.is_group() || parsed.0 == [0; 6] {
                    return Err(format!("{value} is not the address of one card"));
                }
                mac.replace(parsed).is_some()
            }
            "queues" => {
                let number = value.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
                let Some(number) = number else { return Err(format!("it can have 1 to {MAX_QUEUES} pairs of queues")) };
                queues.replace(number).is_some()
            }
            "mtu" => {
                let number = value.parse().ok().filter(|n| MTU.contains(n));
                let Some(number) = number else {
                    return Err(format!("its MTU can be {} to {}", MTU.start(), MTU.end()));
                };
                mtu.replace(number).is_some()
            }
            "hold" => {
                let number = value.parse().ok().filter(|n| *n >= LEAST_HOLD);
                let Some(number) = number else { return Err(format!("it can hold {LEAST_HOLD} bytes or more")) };
                hold.replace(number).is_some()
            }
            "at-bound" => {
                let parsed = match value {
                    "wait" => AtBound::Wait,
                    "drop" => AtBound::Drop,
                    _ => return Err(format!("at its bound it can wait or drop, not {value:?}")),
                };
                at_bound.replace(parsed).is_some()
            }
            _ => match filter.word(key, value) {
                Some(said) => said?,
                None => return Err(format!("it has no property {key:?}")),
            },
        };
        if again {
            return Err(format!("{key} is said twice, or two back ends are"));
        }
    }
    let name = name.ok_or("it has no name")?;
    check_name(&name)?;
    let mut backend = backend.ok_or("it has nothing behind it: say tap, macvtap, stream or dgram")?;
    match (&mut backend, bridge) {
        (_, None) => {}
        (NicBackend::Tap { name, bridge }, Some(named)) => {
            if *name == named {
                return Err("tap and bridge are two interfaces, with a name each".into());
            }
            *bridge = Some(named);
        }
        _ => return Err("only a tap can be put into a bridge".into()),
    }
    let queues = queues.unwrap_or(1);
    if queues > 1 && !backend.offloads() {
        return Err("a socket has one pair of queues".into());
    }
    filter.check()?;
    let (hold, at_bound) = (hold.unwrap_or(HOLD_BYTES), at_bound.unwrap_or_default());
    Ok(NicSpec { name, backend, mac, queues, mtu, hold, at_bound, filter })
}

fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) {
        return Err(format!("its name must be up to {MAX_NAME} letters, digits, - and _"));
    }
    Ok(())
}

/// What the kernel takes as an interface's name, less what would be confusing in a list.
fn check_interface(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) || name.starts_with('.') {
        return Err(format!(
            "{name:?} is no name of an interface: the kernel takes up to {MAX_NAME} letters, digits, - _ and ."
        ));
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    if !path.starts_with('/') || path.contains([';', ',', ':', '\n']) || path.trim_end() != path {
        return Err(format!(
            "{path:?} must be an absolute path, without commas, colons and semicolons, and not end in a space"
        ));
    }
    Ok(())
}

impl NicSpec {
    /// A card of this shape with nothing behind it.
    #[must_use]
    pub fn disconnected(shape: &NicShape) -> Self {
        Self {
            name: shape.name.clone(),
            backend: NicBackend::None { offloads: shape.offloads },
            mac: Some(shape.mac),
            queues: shape.queues,
            mtu: shape.mtu,
            hold: HOLD_BYTES,
            at_bound: AtBound::Wait,
            filter: FilterSpec::default(),
        }
    }

    /// Its address in this machine.
    #[must_use]
    pub fn address(&self, machine: &str) -> Mac {
        self.mac.unwrap_or_else(|| Mac::of(machine, &self.name))
    }
}

impl fmt::Display for NicSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, backend, mac, queues, mtu, hold, at_bound, filter } = self;
        write!(f, "name={name},")?;
        match backend {
            NicBackend::Tap { name, bridge: None } => write!(f, "tap={name}")?,
            NicBackend::Tap { name, bridge: Some(bridge) } => write!(f, "tap={name},bridge={bridge}")?,
            NicBackend::Macvtap(name) => write!(f, "macvtap={name}")?,
            NicBackend::Stream(path) => write!(f, "stream={path}")?,
            NicBackend::Dgram { local, remote } => write!(f, "dgram={local}:{remote}")?,
            NicBackend::None { offloads: false } => f.write_str("none")?,
            NicBackend::None { offloads: true } => f.write_str("none=offloads")?,
        }
        if let Some(mac) = mac {
            write!(f, ",mac={mac}")?;
        }
        if *queues != 1 {
            write!(f, ",queues={queues}")?;
        }
        if let Some(mtu) = mtu {
            write!(f, ",mtu={mtu}")?;
        }
        if *hold != HOLD_BYTES {
            write!(f, ",hold={hold}")?;
        }
        if *at_bound == AtBound::Drop {
            f.write_str(",at-bound=drop")?;
        }
        f.write_str(&filter.words())
    }
}

/// A machine's network cards: one a line, or separated by semicolons.
///
/// # Errors
/// The first that is none; a name, an interface or an address that is there twice; too many.
pub fn parse_list(text: &str) -> Result<Vec<NicSpec>, NoNic> {
    let parts = text.split(['\n', ';']).map(str::trim).filter(|part| !part.is_empty());
    let nics = parts.map(NicSpec::from_str).collect::<Result<Vec<_>, _>>()?;
    check_list(&nics)?;
    Ok(nics)
}

/// Whether these cards can be in one machine.
///
/// # Errors
/// A name, an interface or an address that is there twice; too many.
pub fn check_list(nics: &[NicSpec]) -> Result<(), NoNic> {
    for (i, nic) in nics.iter().enumerate() {
        let refuse = |why: String| Err(NoNic { text: nic.to_string(), why });
        if i >= MAX_NICS {
            return refuse(format!("a machine has at most {MAX_NICS} network cards"));
        }
        for other in &nics[..i] {
            if other.name == nic.name {
                return refuse("another card has its name".into());
            }
            if interface(other).is_some() && interface(other) == interface(nic) {
                return refuse("another card has its interface or socket".into());
            }
            if other.mac.is_some() && other.mac == nic.mac {
                return refuse("another card has its address".into());
            }
        }
    }
    Ok(())
}

fn interface(nic: &NicSpec) -> Option<&str> {
    match &nic.backend {
        NicBackend::Tap { name, .. } | NicBackend::Macvtap(name) => Some(name),
        NicBackend::Stream(path) | NicBackend::Dgram { local: path, .. } => Some(path),
        NicBackend::None { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_read_and_written_the_same() {
        for text in [
            "name=net0,tap=vm1n0",
            "name=net0,tap=vm1n0,bridge=br0,mac=52:54:00:12:34:56,queues=4,mtu=9000",
            "name=net0,tap=vm1n0,hold=1048576,at-bound=drop",
            "name=net0,tap=vm1n0,at-bound=drop,spoof=deny,vlan=12",
            "name=lan,macvtap=mvt0",
            "name=lan,stream=/run/switch",
            "name=lan,dgram=/run/a:/run/b",
            "name=lan,none",
            "name=lan,none=offloads,queues=2",
        ] {
            assert_eq!(text.parse::<NicSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_card_is_told_why() {
        for (text, why) in [
            ("", "no property"),
            ("name=a", "nothing behind it"),
            ("tap=x", "no name"),
            ("name=a b,tap=x", "letters, digits"),
            ("name=a,tap=interface-of-far-too-long-a-name", "up to 15"),
            ("name=a,tap=", "no name of an interface"),
            ("name=a,tap=a/b", "no name of an interface"),
            ("name=a,tap=x,tap=y", "twice"),
            ("name=a,tap=x,stream=/y", "two back ends"),
            ("name=a,tap=x,bridge=x", "a name each"),
            ("name=a,macvtap=x,bridge=y", "only a tap"),
            ("name=a,tap=x,mac=52:54:00:12:34", "no address"),
            ("name=a,tap=x,mac=52:54:00:12:34:5g", "no address"),
            ("name=a,tap=x,mac=01:00:5e:00:00:01", "one card"),
            ("name=a,tap=x,queues=9", "1 to 8"),
            ("name=a,stream=/x,queues=2", "one pair"),
            ("name=a,tap=x,mtu=67", "68 to 65521"),
            ("name=a,tap=x,hold=1", "1048576 bytes or more"),
            ("name=a,tap=x,at-bound=crash", "wait or drop"),
            ("name=a,tap=x,vlan=9999", "1 to 4094"),
            ("name=a,tap=x,vlan=1,vlan=1", "twice"),
            ("name=a,tap=x,burst=9999", "without rate"),
            ("name=a,dgram=/x", "two paths"),
            ("name=a,stream=x", "absolute"),
        ] {
            let e = text.parse::<NicSpec>().unwrap_err().to_string();
            assert!(e.contains(why), "{text}: {e}");
        }
    }

    #[test]
    fn a_list_has_nothing_twice() {
        assert_eq!(parse_list("name=a,tap=x\n name=b,tap=y ;").unwrap().len(), 2);
        let refused = |text: &str| parse_list(text).unwrap_err().to_string();
        assert!(refused("name=a,tap=x;name=a,tap=y").contains("its name"));
        assert!(refused("name=a,tap=x;name=b,macvtap=x").contains("its interface"));
        assert!(
            refused("name=a,tap=x,mac=52:54:00:00:00:01;name=b,tap=y,mac=52:54:00:00:00:01").contains("its address")
        );
        let many: Vec<_> = (0..9).map(|i| format!("name=n{i},tap=t{i}")).collect();
        assert!(refused(&many.join(";")).contains("at most 8"));
    }

    #[test]
    fn an_address_that_was_not_given_is_the_same_everywhere_and_one_cards_own() {
        let mac = Mac::of("vm1", "net0");
        assert_eq!(mac.to_string(), "02:62:8d:f5:13:a1");
        assert!(!mac.is_group() && mac != Mac::of("vm1", "net1") && mac != Mac::of("vm1n", "et0"));
    }
}
