//! Where an iSCSI disk is: `iscsi://HOST[:PORT]/TARGET/LUN`, as QEMU and libiscsi write it, but without a secret in it.

use std::fmt;
use std::str::FromStr;

/// The port that IANA gave to iSCSI.
pub const PORT: u16 = 3260;
/// What every such address begins with.
pub const SCHEME: &str = "iscsi://";

/// An address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// Name or address; an IPv6 address in brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The target's name.
    pub target: String,
    /// Its logical unit.
    pub lun: u16,
}

impl Url {
    /// `host:port`.
    pub fn portal(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rest = text.strip_prefix(SCHEME).ok_or("it does not begin with iscsi://")?;
        let mut parts = rest.split('/');
        let (Some(portal), Some(target), Some(lun), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err("write iscsi://HOST[:PORT]/TARGET/LUN".into());
        };
        if portal.contains(['@', '%']) {
            return Err("user and secret do not belong into it, where everybody can read them: put them into a file, chap=/FILE".into());
        }
        let (host, port) = match portal.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                (host, port.parse().ok().filter(|p| *p > 0).ok_or_else(|| format!("{port:?} is no port"))?)
            }
            _ => (portal, PORT),
        };
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let address = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let plain = |host: &str| !host.is_empty() && host.chars().all(good);
        let v6 = |host: &str| host.parse::<std::net::Ipv6Addr>().is_ok();
        if !address.map_or_else(|| plain(host), v6) {
            return Err(format!("{host:?} is no name or address of a host"));
        }
        let named = ["iqn.", "eui.", "naa."].iter().any(|kind| target.starts_with(kind));
        if !named || target.len() > 223 || !target.chars().all(|c| good(c) || c == ':') {
            return Err(format!("{target:?} is no name of a target; one begins with iqn., eui. or naa."));
        }
        let lun = lun
            .parse()
            .ok()
            .filter(|lun| *lun < 16384)
            .ok_or_else(|| format!("{lun:?} is no logical unit's number"))?;
        Ok(Url { host: host.to_owned(), port, target: target.to_owned(), lun })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}", self.host)?;
        if self.port != PORT {
            write!(f, ":{}", self.port)?;
        }
        write!(f, "/{}/{}", self.target, self.lun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_written_the_same() {
        for text in [
            "iscsi://san/iqn.2026-11.org.example:db/1",
            "iscsi://192.0.2.1:3261/iqn.2026-11.org.example:db/0",
            "iscsi://[2001:db8::1]/naa.60014056/3",
            "iscsi://[2001:db8::1]:3261/iqn.a/3",
        ] {
            assert_eq!(text.parse::<Url>().unwrap().to_string(), text);
        }
        assert_eq!("iscsi://san:3260/iqn.a/1".parse::<Url>().unwrap().portal(), "san:3260");
    }

    #[test]
    fn what_is_no_address_is_told_why() {
        for (text, why) in [
            ("/dev/sda", "begin with"),
            ("iscsi://san/iqn.a", "HOST"),
            ("iscsi://san/iqn.a/1/2", "HOST"),
            ("iscsi://me%secret@san/iqn.a/1", "chap="),
            ("iscsi:///iqn.a/1", "no name or address"),
            ("iscsi://san:0/iqn.a/1", "no port"),
            ("iscsi://[::g]/iqn.a/1", "no name or address"),
            ("iscsi://san/db/1", "iqn."),
            ("iscsi://san/iqn.a/-1", "logical unit"),
            ("iscsi://san/iqn.a/99999", "logical unit"),
        ] {
            let e = text.parse::<Url>().unwrap_err();
            assert!(e.contains(why), "{text}: {e}");
        }
    }
}
