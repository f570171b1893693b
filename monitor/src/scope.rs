//! Who is cut off from the production network, and is it one node, a rack or all of it?
//!
//! Two nodes are connected if each says that it hears the other. The largest group of connected nodes is taken for the network; whoever is
//! not in it is cut off. Where no group is the largest (two nodes that do not hear each other, a network in two halves) nobody can say who is at fault,
//! and nobody is: that is `everywhere`. So a node whose own card is broken, and which hears nobody, blames itself and not all others.

use std::collections::{BTreeMap, BTreeSet};

use crate::matrix::Production;

/// Who hears whom in the production network; only nodes of which that is known.
pub type Hears = BTreeMap<String, BTreeSet<String>>;

/// How each node is connected. `racks`: every node, and the rack that it is in.
pub fn scopes(racks: &BTreeMap<String, Option<String>>, hears: &Hears) -> BTreeMap<String, Production> {
    let mutual = |a: &str, b: &str| {
        hears.get(a).is_some_and(|heard| heard.contains(b)) && hears.get(b).is_some_and(|heard| heard.contains(a))
    };
    let mut groups: Vec<BTreeSet<&str>> = Vec::new();
    let mut left: BTreeSet<&str> = racks.keys().map(String::as_str).collect();
    while let Some(first) = left.pop_first() {
        let mut group = BTreeSet::from([first]);
        let mut open = vec![first];
        while let Some(node) = open.pop() {
            let near: Vec<&str> = left.iter().copied().filter(|other| mutual(node, other)).collect();
            for other in near {
                left.remove(other);
                group.insert(other);
                open.push(other);
            }
        }
        groups.push(group);
    }
    groups.sort_by_key(|group| std::cmp::Reverse(group.len()));
    let network = match &groups[..] {
        [only] => Some(only),
        [first, second, ..] if first.len() > second.len() => Some(first),
        _ => None,
    };
    let scope = |node: &str, rack: &Option<String>| {
        let Some(network) = network else { return Production::Everywhere };
        if network.contains(node) {
            return Production::Up;
        }
        let of_rack: Vec<&str> = match rack {
            Some(_) => racks.iter().filter(|(_, other)| *other == rack).map(|(name, _)| name.as_str()).collect(),
            None => Vec::new(),
        };
        let all_cut_off = of_rack.iter().all(|other| !network.contains(other));
        if of_rack.len() > 1 && all_cut_off { Production::Rack } else { Production::Node }
    };
    racks.iter().map(|(node, rack)| (node.clone(), scope(node, rack))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hears`: groups of nodes that hear each other; each node is `NAMErackDIGIT`, e.g. `a1`.
    fn judged(nodes: &str, groups: &[&str]) -> String {
        let racks = nodes.split(' ').map(|n| (n.to_owned(), Some(n[1..].to_owned()))).collect();
        let mut hears = Hears::new();
        for group in groups {
            let all: BTreeSet<String> = group.split(' ').map(str::to_owned).collect();
            for node in &all {
                hears.entry(node.clone()).or_default().extend(all.iter().filter(|o| *o != node).cloned());
            }
        }
        let scopes = scopes(&racks, &hears);
        nodes.split(' ').map(|n| scopes[n].as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_largest_group_is_the_network() {
        let six = "a1 b1 c2 d2 e3 f3";
        for (groups, expected) in [
            (vec!["a1 b1 c2 d2 e3 f3"], "up up up up up up"),
            (vec!["b1 c2 d2 e3 f3"], "node up up up up up"),
            (vec!["a1 b1", "c2 d2 e3 f3"], "rack rack up up up up"),
            (vec!["c2 d2 e3 f3"], "rack rack up up up up"),
            (vec!["b1 d2 e3 f3"], "node up node up up up"),
            (vec!["a1 b1 c2", "d2 e3 f3"], "everywhere everywhere everywhere everywhere everywhere everywhere"),
            (vec!["a1 b1", "c2 d2", "e3 f3"], "everywhere everywhere everywhere everywhere everywhere everywhere"),
            (vec![], "everywhere everywhere everywhere everywhere everywhere everywhere"),
        ] {
            assert_eq!(judged(six, &groups), expected, "{groups:?}");
        }
    }

    #[test]
    fn of_two_nodes_that_do_not_hear_each_other_nobody_knows_which_is_ill() {
        assert_eq!(judged("a1 b2", &["a1 b2"]), "up up");
        assert_eq!(judged("a1 b2", &[]), "everywhere everywhere");
        assert_eq!(judged("a1", &[]), "up", "who is alone has nobody to hear");
    }

    #[test]
    fn a_node_that_hears_and_is_not_heard_is_cut_off() {
        let racks: BTreeMap<String, Option<String>> = ["a", "b", "c"].map(|n| (n.to_owned(), None)).into();
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        let hears: Hears =
            [("a".into(), set(&["b", "c"])), ("b".into(), set(&["c"])), ("c".into(), set(&["b"]))].into();
        assert_eq!(scopes(&racks, &hears)["a"], Production::Node);
        assert_eq!(scopes(&racks, &hears)["b"], Production::Up);
    }
}
