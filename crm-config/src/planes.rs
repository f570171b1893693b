//! Three planes: are replication, management and business traffic on networks of their own, and is what must not be lost there twice?
//!
//! All of it works on one cable; so these are warnings. `docs/planes.md` says what each loss costs.

use std::net::IpAddr;
use std::path::Path;

use crate::check::{Finding, Severity};
use crate::policy::{Machine, Node, Policy};

/// Where Corosync's configuration is.
pub const COROSYNC_CONF: &str = "/etc/corosync/corosync.conf";

/// Corosync's configuration, if it was named or is where it should be.
pub fn corosync_conf(named: Option<&Path>) -> Result<Option<String>, String> {
    let file = named.unwrap_or(Path::new(COROSYNC_CONF));
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(_) if named.is_none() => Ok(None),
        Err(e) => Err(format!("cannot read Corosync's configuration {}: {e}", file.display())),
    }
}

/// A node as Corosync's `nodelist` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// `name`, else its first address.
    pub name: String,
    /// `ring0_addr`, `ring1_addr`, …: one for each link.
    pub links: Vec<String>,
}

/// The nodes in the text of a `corosync.conf`: sections are `name {` … `}`, entries `key: value`, comments begin with `#` (corosync.conf(5)).
pub fn members(text: &str) -> Vec<Member> {
    let mut sections: Vec<&str> = Vec::new();
    let mut members = Vec::new();
    let mut member = Member::default();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if let Some(section) = line.strip_suffix('{') {
            sections.push(section.trim());
            if sections == ["nodelist", "node"] {
                member = Member::default();
            }
        } else if line == "}" {
            if sections == ["nodelist", "node"] {
                let mut done = std::mem::take(&mut member);
                if done.name.is_empty() {
                    done.name = done.links.first().cloned().unwrap_or_default();
                }
                members.push(done);
            }
            sections.pop();
        } else if let (true, Some((key, value))) = (sections == ["nodelist", "node"], line.split_once(':')) {
            let (key, value) = (key.trim(), value.trim());
            let ring = key.strip_prefix("ring").and_then(|rest| rest.strip_suffix("_addr"));
            match ring {
                Some(number) if number.parse::<u8>().is_ok() && !value.is_empty() => {
                    member.links.push(value.to_owned())
                }
                None if key == "name" => value.clone_into(&mut member.name),
                _ => {}
            }
        }
    }
    members
}

/// What will be regretted, of a policy and, where it is known, Corosync's configuration.
pub fn check(policy: &Policy, corosync: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut warn =
        |what: String| findings.push(Finding { severity: Severity::Warning, line: None, column: None, what });
    let replicating = |node: &&Node| {
        let holds = |m: &Machine| policy.candidates(m).any(|candidate| candidate == *node);
        policy.machines.iter().any(|m| m.protected() && holds(m))
    };
    for node in policy.nodes.iter().filter(replicating) {
        let name = node.name.get_ref();
        for address in node.replication_addresses() {
            let business = node.business.as_ref().map(|business| business.get_ref().as_str());
            if business.is_some_and(|business| one_network(address, business)) {
                warn(format!(
                    "node {name}: checkpoints travel over {address}, which is in the business network; give the node a storage address in a \
                     network of its own, or a guest that fills the line delays its own outputs"
                ));
            }
        }
        if let [first, second] = node.replication_addresses()[..]
            && one_network(first, second)
        {
            warn(format!(
                "node {name}: {first} and {second} look like one network; two paths protect only if they share no switch"
            ));
        }
    }
    let several: Vec<bool> =
        policy.nodes.iter().filter(replicating).map(|node| node.replication_addresses().len() > 1).collect();
    if several.contains(&true) && several.contains(&false) {
        warn("some nodes have a storage2 address and some have none: those are reached over one path".into());
    }
    for member in corosync.map(members).unwrap_or_default() {
        if member.links.len() == 1 {
            warn(format!(
                "corosync.conf: node {} has one link ({}); with a second one (ring1_addr in another network, transport knet) the loss of a \
                 switch fences nobody",
                member.name, member.links[0]
            ));
        }
    }
    findings
}

/// Whether two addresses are the same, or so near that they are hardly in two networks: how long the networks' prefixes are is not known here, so
/// /24 and /64 are taken for it.
pub(crate) fn one_network(a: &str, b: &str) -> bool {
    match (a.parse(), b.parse()) {
        (Ok(IpAddr::V4(a)), Ok(IpAddr::V4(b))) => a.octets()[..3] == b.octets()[..3],
        (Ok(IpAddr::V6(a)), Ok(IpAddr::V6(b))) => a.segments()[..4] == b.segments()[..4],
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "totem {\n  version: 2\n  transport: knet\n}\nnodelist {\n  node {\n    ring0_addr: 10.0.0.1\n    name: n1\n    nodeid: 1\n  }\n\
                       \n  # node {\n  node {\n    ring0_addr: 10.0.0.2\n    ring1_addr: 10.0.9.2\n    nodeid: 2\n  }\n}\n";

    #[test]
    fn links_are_counted_as_corosync_names_them() {
        let found = members(ONE);
        assert_eq!(found[0], Member { name: "n1".into(), links: vec!["10.0.0.1".into()] });
        assert_eq!(found[1].name, "10.0.0.2");
        assert_eq!(found[1].links.len(), 2);
        for odd in [
            "",
            "}",
            "}}}\nnodelist {",
            "node {\nring0_addr: x\n}",
            "nodelist {\nnode {\nring_addr: x\nringx_addr: y\n}",
        ] {
            assert!(members(odd).iter().all(|m| m.links.is_empty()), "{odd}");
        }
    }

    fn policy(addresses: &str) -> Policy {
        let text = format!(
            "[[nodes]]\nname = \"n1\"\n{addresses}\n[[nodes]]\nname = \"n2\"\nstorage = \"10.9.1.2\"\nstorage2 = \"10.9.2.2\"\n\
             [[machines]]\nname = \"m\"\nkernel = \"/k\"\n"
        );
        Policy::parse(&text).unwrap()
    }

    fn said(addresses: &str, corosync: Option<&str>) -> String {
        check(&policy(addresses), corosync).into_iter().map(|f| f.what).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn one_link_and_shared_networks_are_warned_about_and_three_doubled_planes_are_not() {
        let good =
            "storage = \"10.9.1.1\"\nstorage2 = \"10.9.2.1\"\nmanagement = \"10.0.0.1\"\nbusiness = \"192.0.2.1\"";
        assert_eq!(said(good, None), "");
        assert_eq!(said(good, Some(&ONE.replace("name: n1", "ring1_addr: 10.0.9.1"))), "");
        let one = said(good, Some(ONE));
        assert!(one.contains("node n1 has one link (10.0.0.1)") && !one.contains("10.0.0.2"), "{one}");
        let shared = said("storage = \"192.0.2.7\"\nstorage2 = \"10.9.2.1\"\nbusiness = \"192.0.2.1\"", None);
        assert!(shared.contains("192.0.2.7, which is in the business network"), "{shared}");
        let near = said("storage = \"10.9.1.1\"\nstorage2 = \"10.9.1.9\"", None);
        assert!(near.contains("look like one network"), "{near}");
        assert!(said("storage = \"10.9.1.1\"", None).contains("some nodes have a storage2"));
        let named = said("storage = \"n1-data\"\nstorage2 = \"n1-data2\"\nbusiness = \"n1\"", None);
        assert_eq!(named, "");
    }
}
