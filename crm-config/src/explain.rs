//! Why a machine is where it is, and in which order it would go elsewhere.

use std::fmt::Write as _;

use crate::estate::{Automation, Mode};
use crate::placement::{Target, place};
use crate::policy::{Node, Policy};

/// The reasons, as lines; `None` if there is no such machine.
pub fn explain(policy: &Policy, name: &str) -> Option<String> {
    let index = policy.machines.iter().position(|m| m.name.get_ref() == name)?;
    let machine = &policy.machines[index];
    let mut out = String::new();
    let mode = match machine.mode() {
        Mode::Protected => "protected: its standby goes on from the last checkpoint",
        Mode::Restart => "restart: it is started again elsewhere",
        Mode::None => "none: it waits for its host",
    };
    let _ = writeln!(out, "{name}: {mode}; {} MiB, {} vCPUs", machine.memory, machine.vcpus.get_ref());
    if !policy.places() {
        let nodes: Vec<&str> = policy.candidates(machine).map(|n| n.name.get_ref().as_str()).collect();
        let _ = writeln!(out, "  may be on {}", nodes.join(", "));
        let _ = writeln!(out, "  Pacemaker chooses: the policy names no racks, clusters or evacuation policies");
        return Some(out);
    }
    let _ = writeln!(
        out,
        "  evacuation {}, performance {}, own cluster {:?}{}",
        machine.evacuation().as_str(),
        if machine.high_performance_need() { "high" } else { "normal (never to the dedicated cluster)" },
        policy.own_cluster(machine).unwrap_or("none"),
        machine.business.as_ref().map(|b| format!(", business type {}", b.get_ref())).unwrap_or_default(),
    );
    let all = place(policy);
    let placed = &all[index];
    let siblings = |rack: &Node| {
        let same_rack = |n: &Node| n.rack.is_some() && n.rack == rack.rack;
        let of_type = |(m, _): &(usize, _)| *m != index && policy.machines[*m].business == machine.business;
        let homes = all.iter().enumerate().filter(of_type).filter_map(|(_, p)| p.home());
        homes.filter(|h| same_rack(&policy.nodes[*h])).count()
    };
    let mut line = |target: &Target, held: bool| {
        let node = &policy.nodes[target.node];
        let rack = node.rack.as_ref().map(|r| format!(", rack {}", r.get_ref())).unwrap_or_default();
        let with = match &machine.business {
            Some(business) if node.rack.is_some() => {
                format!(", which is home to {} others of {}", siblings(node), business.get_ref())
            }
            _ => String::new(),
        };
        let held = if held { " (only when the operator or the evacuation controller releases it)" } else { "" };
        let _ = writeln!(
            out,
            "  {:>5}  {:<12} {}{rack}{with}{held}",
            target.score,
            node.name.get_ref(),
            target.place.as_str()
        );
    };
    placed.targets.iter().for_each(|t| line(t, false));
    placed.held.iter().for_each(|t| line(t, true));
    let _ = writeln!(out, "  every other node is forbidden; it stays where it runs unless that fails (stickiness)");
    if policy.has_controller() && policy.held(machine) {
        let _ = writeln!(
            out,
            "  when its host has died, the evacuation controller plans anew with what is then where: understudy-evacuator plans"
        );
    } else if policy.automation(machine) != Automation::Automatic && machine.mode() == Mode::Restart {
        let attribute = crate::compile::wish_attribute(name);
        let _ =
            writeln!(out, "  to release it: crm_attribute --type nodes --node NODE --name {attribute} --update 900");
    }
    Some(out)
}
