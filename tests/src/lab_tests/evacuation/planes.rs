//! Cables. What docs/monitoring.md says of each happens: to the monitors' verdicts, to the cluster, to the machines.

use anyhow::{Context, Result, ensure};
use understudy_monitor::matrix::Verdict;
use understudy_monitor::report::Report;

use super::estate::{BOUND, Estate, HOSTS};
use super::stories::{ROUNDS, WEB, WEB_HOST, count_starts, fences, started_once, wait_closed, wait_plan};
use super::{machines, rules};
use crate::lab::{Plane, wait_until};

/// What the policy says besides.
fn monitoring() -> String {
    format!("{}\n[monitoring]\nhealth = true\n", rules(5))
}

/// What the monitor of `host` says.
fn report(estate: &Estate, host: &str) -> Result<Report> {
    // Its exit status says whether all is well.
    let out = estate.lab.output(host, &["understudy-monitor", "status", "--json"])?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let report: Report =
        serde_json::from_str(&text).with_context(|| format!("{host}: {}", String::from_utf8_lossy(&out.stderr)))?;
    ensure!(report.waits_for.is_none(), "{host}: {:?}", report.waits_for);
    Ok(report)
}

/// The monitor of `host` says of `node` that `row` decides.
fn wait_row(estate: &Estate, host: &str, node: &str, row: &str, verdict: Verdict) -> Result<()> {
    wait_until(&format!("the row {row} for {node}, seen from {host}"), BOUND, || {
        let report = report(estate, host)?;
        let judged = report.judged.iter().find(|j| j.node == node && j.machine.is_none());
        let judged = judged.with_context(|| format!("nothing of {node}: {report:?}"))?;
        ensure!(judged.row == row && judged.verdict == verdict, "{judged:?}");
        Ok(true)
    })
}

/// Every host's monitor finds nothing wrong with any.
fn wait_healthy(estate: &Estate) -> Result<()> {
    for seen_from in HOSTS {
        for host in HOSTS {
            wait_row(estate, seen_from, host, "healthy", Verdict::Nothing)?;
        }
    }
    Ok(())
}

/// The node attribute that the monitor of `host` sets.
fn wait_attribute(estate: &Estate, host: &str, value: &str) -> Result<()> {
    let argv = ["attrd_updater", "--query", "--name", "understudy-production", "--node", host];
    wait_until(&format!("understudy-production={value} on {host}"), BOUND, || {
        let text = estate.lab.run(HOSTS[0], &argv)?;
        ensure!(text.contains(&format!("value=\"{value}\"")), "{text}");
        Ok(true)
    })
}

/// Seconds in which monitors must see what is before a fence is tried.
const DELAY: u32 = 40;

/// The estate with monitors, all of whom see all well, and fencing that waits so many seconds.
fn begin(estate: &mut Estate, fence_delay: u32) -> Result<u64> {
    estate.fence_delay = fence_delay;
    estate.configure(&machines(), &monitoring())?;
    wait_healthy(estate)?;
    estate.wait_controller()?;
    count_starts(estate)?;
    estate.last_event()
}

/// `host` is a member, was not fenced more than `before` times, and nothing has moved.
fn nothing_happens(estate: &Estate, host: &str, before: usize) -> Result<()> {
    estate.wait_rounds(ROUNDS)?;
    ensure!(fences(estate, host)? == before, "{host} was fenced");
    let mon = estate.lab.crm_mon(HOSTS[0])?;
    ensure!(mon.online.iter().any(|online| online == host), "{host} is no member any more: {:?}", mon.online);
    for machine in &estate.machines {
        ensure!(estate.copies.starts(machine.name) == 1, "{} was started again", machine.name);
        ensure!(estate.runs_on(machine.name, machine.home)?, "{} does not run at home", machine.name);
    }
    Ok(())
}

/// Of the two links from n1 to the node with that number, `link` is down and the other one up.
fn wait_link_down(estate: &Estate, nodeid: &str, link: &str) -> Result<()> {
    wait_until("Corosync to see the cut link", BOUND, || {
        let text = estate.lab.run(HOSTS[0], &["corosync-cfgtool", "-s"])?;
        let (mut id, mut as_expected) = ("", 0);
        for line in text.lines().map(str::trim) {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                (Some("LINK"), Some("ID")) => id = words.next().unwrap_or_default(),
                (Some("nodeid:"), Some(of)) if of.trim_end_matches(':') == nodeid => {
                    as_expected += usize::from((words.next_back() == Some("connected")) != (id == link));
                }
                _ => {}
            }
        }
        ensure!(as_expected == 2, "{text}");
        Ok(true)
    })
}

/// The cluster's own tools read what a policy with everything of this page makes, and find nothing wrong with it.
pub fn tools_accept(estate: &mut Estate) -> Result<()> {
    begin(estate, 0)?;
    for argv in [&["crm_verify", "--live-check", "--verbose"][..], &["crm", "configure", "verify"]] {
        let out = estate.lab.output(HOSTS[0], argv)?;
        let said = [out.stdout, out.stderr].concat();
        ensure!(
            out.status.success() && said.is_empty(),
            "{}: {} {}",
            argv.join(" "),
            out.status,
            String::from_utf8_lossy(&said)
        );
    }
    for (argv, says) in [
        (&["pcs", "alert", "config"][..], "understudy-alert-night (value=night@works.example)"),
        (&["pcs", "resource", "config"], "type=evacuator"),
        (&["pcs", "resource", "config"], "type=monitor"),
        (&["pcs", "property", "config"], "node-health-strategy=migrate-on-red"),
        (&["crm", "configure", "show"], "ocf:understudy:evacuator"),
    ] {
        let text = estate.lab.run(HOSTS[0], argv)?;
        ensure!(text.contains(says), "{}: {says:?} is not in {text}", argv.join(" "));
    }
    Ok(())
}

pub fn management_cut_with_two_links(estate: &mut Estate) -> Result<()> {
    begin(estate, 0)?;
    let before = fences(estate, WEB_HOST)?;
    estate.lab.cut(WEB_HOST, Plane::Management)?;
    wait_link_down(estate, "3", "0")?;
    nothing_happens(estate, WEB_HOST, before)?;
    wait_row(estate, HOSTS[0], WEB_HOST, "healthy", Verdict::Nothing)
}

pub fn production_cut(estate: &mut Estate) -> Result<()> {
    let last = begin(estate, 0)?;
    let before = fences(estate, WEB_HOST)?;
    // The worst place for it.
    estate.move_controller(WEB_HOST)?;
    estate.lab.cut(WEB_HOST, Plane::Business)?;
    wait_row(estate, HOSTS[0], WEB_HOST, "card-or-cable", Verdict::Move)?;
    wait_row(estate, WEB_HOST, WEB_HOST, "card-or-cable", Verdict::Move)?;
    wait_attribute(estate, WEB_HOST, "node")?;
    wait_attribute(estate, HOSTS[0], "up")?;
    estate.wait_elsewhere(&WEB, WEB_HOST)?;
    started_once(estate, &WEB)?;
    ensure!(fences(estate, WEB_HOST)? == before, "{WEB_HOST} was fenced");
    let plan = wait_plan(estate, last, WEB_HOST)?;
    wait_closed(estate, last, &plan)?;
    estate.lab.heal(None)?;
    wait_attribute(estate, WEB_HOST, "up")?;
    wait_healthy(estate)
}

/// `row` follows from what is cut; nothing moves before the fence, and everything after it.
fn fenced_and_evacuated(estate: &Estate, row: &str, verdict: Verdict) -> Result<()> {
    let before = fences(estate, WEB_HOST)?;
    wait_row(estate, HOSTS[0], WEB_HOST, row, verdict)?;
    wait_row(estate, HOSTS[0], HOSTS[1], "healthy", Verdict::Nothing)?;
    // It lives, and what runs there may still write.
    for machine in WEB {
        let nodes = estate.nodes_of(machine)?;
        ensure!(nodes == [WEB_HOST], "{machine} is in {nodes:?}, before {WEB_HOST} was fenced");
    }
    ensure!(fences(estate, WEB_HOST)? == before, "{WEB_HOST} was fenced within {DELAY} s");
    estate.wait_elsewhere(&WEB, WEB_HOST)?;
    ensure!(fences(estate, WEB_HOST)? > before, "{WEB_HOST} was not fenced, and its machines run elsewhere");
    ensure!(!estate.lab.is_on(WEB_HOST)?, "{WEB_HOST} is on");
    started_once(estate, &WEB)
}

pub fn both_cut(estate: &mut Estate) -> Result<()> {
    begin(estate, DELAY)?;
    estate.lab.cut(WEB_HOST, Plane::Business)?;
    estate.lab.cut(WEB_HOST, Plane::Management)?;
    // Its BMC is not asked by monitors.
    fenced_and_evacuated(estate, "hung-or-isolated", Verdict::FenceAndEvacuate)
}

/// The monitors would let it live, but Corosync has lost it.
pub fn management_cut_with_one_link(estate: &mut Estate) -> Result<()> {
    begin(estate, DELAY)?;
    estate.lab.cut(WEB_HOST, Plane::Management)?;
    fenced_and_evacuated(estate, "management-only", Verdict::Alarm)
}
