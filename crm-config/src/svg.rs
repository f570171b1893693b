//! A plan as a picture: racks, their nodes and the machines on them, before and after.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::plan::{Plan, What};
use crate::policy::Policy;

const CELL: usize = 150;
const ROW: usize = 16;
const MOST: usize = 24;

/// Both halves beside each other in words, one above the other in the picture. `before` says where machines run.
pub fn picture(policy: &Policy, before: &BTreeMap<String, String>, plan: &Plan) -> String {
    let mut after = before.clone();
    for m in &plan.machines {
        match &m.to {
            Some(to) => after.insert(m.machine.clone(), to.clone()),
            None => after.remove(&m.machine),
        };
    }
    let lost: Vec<&str> = plan
        .machines
        .iter()
        .filter(|m| matches!(m.fate, What::Unplaced | What::Stopped))
        .map(|m| m.machine.as_str())
        .collect();
    let most = [before, &after].map(|places| {
        let count = |n: &str| places.values().filter(|v| *v == n).count();
        policy.nodes.iter().map(|n| count(n.name.get_ref())).max().unwrap_or(0).min(MOST + 1)
    });
    let most = most.into_iter().max().unwrap_or(0).max(1);
    let height = 60 + most * ROW;
    let width = 20 + policy.nodes.len().max(4) * (CELL + 10);
    let total = 2 * (height + 50) + 40;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{total}\" font-family=\"sans-serif\" font-size=\"12\">\n"
    );
    half(&mut out, policy, before, &[], "before", 0, height, &[]);
    let title = format!("after: {} dies", plan.fault.name);
    let moved: Vec<&str> = plan.machines.iter().map(|m| m.machine.as_str()).collect();
    half(&mut out, policy, &after, &plan.fault.nodes, &title, height + 50, height, &moved);
    if !lost.is_empty() {
        let y = total - 14;
        let _ = writeln!(out, "<text x=\"10\" y=\"{y}\" fill=\"#b00\">not placed: {}</text>", escape(&lost.join(", ")));
    }
    out.push_str("</svg>\n");
    out
}

#[allow(clippy::too_many_arguments)]
fn half(
    out: &mut String,
    policy: &Policy,
    places: &BTreeMap<String, String>,
    dead: &[String],
    title: &str,
    top: usize,
    height: usize,
    marked: &[&str],
) {
    let _ = writeln!(out, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{}</text>", top + 20, escape(title));
    let mut nodes: Vec<_> = policy.nodes.iter().collect();
    // What shares a rack stands together.
    nodes.sort_by_key(|n| n.rack.as_ref().map(|r| r.get_ref().clone()));
    for (at, node) in nodes.iter().enumerate() {
        let (x, y) = (10 + at * (CELL + 10), top + 30);
        let name = node.name.get_ref();
        let is_dead = dead.contains(name);
        let fill = match (is_dead, node.dedicated()) {
            (true, _) => "#ddd",
            (_, true) => "#eef6ff",
            _ => "#f6fff0",
        };
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{height}\" fill=\"{fill}\" stroke=\"#555\"/>"
        );
        let rack = node.rack.as_ref().map(|r| format!(" · rack {}", r.get_ref())).unwrap_or_default();
        let state = if is_dead { " ✕" } else { "" };
        let _ =
            writeln!(out, "<text x=\"{}\" y=\"{}\">{}</text>", x + 6, y + 16, escape(&format!("{name}{rack}{state}")));
        let here: Vec<&String> = places.iter().filter(|(_, n)| *n == name).map(|(m, _)| m).collect();
        for (row, machine) in here.iter().take(MOST).enumerate() {
            let colour = if marked.contains(&machine.as_str()) { "#06c" } else { "#222" };
            let y = y + 36 + row * ROW;
            let _ = writeln!(out, "<text x=\"{}\" y=\"{y}\" fill=\"{colour}\">{}</text>", x + 12, escape(machine));
        }
        if here.len() > MOST {
            let y = y + 36 + MOST * ROW;
            let _ = writeln!(out, "<text x=\"{}\" y=\"{y}\">and {} more</text>", x + 12, here.len() - MOST);
        }
    }
}

fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}
