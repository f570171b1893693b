//! Whether this node has what a machine's network cards need.

use std::path::Path;

use understudy_protocol::nic::{NicBackend, NicSpec};

/// Look below `root` (`/`, but in tests).
pub fn check(nics: &[NicSpec], root: &Path) -> Result<(), String> {
    nics.iter().try_for_each(|nic| one(nic, root).map_err(|why| format!("card {}: {why}", nic.name)))
}

fn one(nic: &NicSpec, root: &Path) -> Result<(), String> {
    let interface = |name: &str| root.join("sys/class/net").join(name);
    match &nic.backend {
        NicBackend::Tap { name, bridge } => {
            if !root.join("dev/net/tun").exists() {
                return Err("this node has no /dev/net/tun: load the kernel module tun".into());
            }
            if let Some(bridge) = bridge {
                if !interface(bridge).exists() {
                    return Err(format!("this node has no bridge {bridge}: create it, under this name on every node"));
                }
                if !interface(bridge).join("bridge").exists() {
                    return Err(format!("{bridge} is an interface of this node, and no bridge"));
                }
            }
            let taken = interface(name).exists() && !interface(name).join("tun_flags").exists();
            if taken {
                return Err(format!(
                    "{name} is an interface of this node already, and no tap: give the tap another name"
                ));
            }
            Ok(())
        }
        NicBackend::Macvtap(name) if !interface(name).join("macvtap").exists() => Err(format!(
            "this node has no macvtap {name}: create it (ip link add link INTERFACE name {name} type macvtap mode bridge)"
        )),
        NicBackend::Macvtap(_) | NicBackend::Stream(_) | NicBackend::Dgram { .. } | NicBackend::None { .. } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn on(root: &Path, nic: &str) -> Result<(), String> {
        check(&[nic.parse().unwrap()], root)
    }

    #[test]
    fn what_a_card_lacks_on_this_node_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let refused = |nic: &str| on(root, nic).unwrap_err();
        let nic = "name=net0,tap=m0,bridge=br0";
        assert!(refused(nic).contains("module tun"));
        fs::create_dir_all(root.join("dev/net")).unwrap();
        fs::write(root.join("dev/net/tun"), "").unwrap();
        assert!(refused(nic).contains("no bridge br0: create it"));
        fs::create_dir_all(root.join("sys/class/net/br0")).unwrap();
        assert!(refused(nic).contains("and no bridge"));
        fs::create_dir_all(root.join("sys/class/net/br0/bridge")).unwrap();
        assert_eq!(on(root, nic), Ok(()));
        fs::create_dir_all(root.join("sys/class/net/m0")).unwrap();
        assert!(refused(nic).contains("another name"));
        fs::write(root.join("sys/class/net/m0/tun_flags"), "").unwrap();
        assert_eq!(on(root, nic), Ok(()), "a tap that is there is used");
        assert!(refused("name=net0,macvtap=mv0").contains("no macvtap mv0"));
        fs::create_dir_all(root.join("sys/class/net/mv0/macvtap")).unwrap();
        assert_eq!(on(root, "name=net0,macvtap=mv0"), Ok(()));
    }
}
