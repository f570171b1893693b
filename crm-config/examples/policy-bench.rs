//! How long a policy takes to become a configuration and a plan, and what the scheduler takes for it, beside the same estate
//! written with a colocation for every pair of one business type. JSON to standard output.
//!
//! `cargo run --release -p understudy-crm --example policy-bench -- [CHROOT]`: with a root, `crm_simulate` is called in there.

use std::time::{Duration, Instant};

use understudy_crm::check;
use understudy_crm::cib;
use understudy_crm::compile::compile;
use understudy_crm::merge::merge;
use understudy_crm::plan::{Fault, plan};
use understudy_crm::simulate::{Scheduler, settled};
use understudy_crm::xml::Element;

fn estate(nodes: usize, machines: usize) -> String {
    let mut text = String::new();
    let mut names = Vec::new();
    for n in 0..nodes {
        text += &format!(
            "[[nodes]]\nname = \"n{n}\"\nstorage = \"10.0.{}.{}\"\nrack = \"r{}\"\nmemory = 1048576\ncpus = 64\n",
            n / 250,
            n % 250,
            n / 8
        );
        names.push(format!("\"n{n}\""));
    }
    text += &format!("[[fencing]]\nname = \"bmc\"\nagent = \"fence_ipmilan\"\nnodes = [{}]\n", names.join(", "));
    for m in 0..machines {
        text += &format!(
            "[[machines]]\nname = \"m{m}\"\nkernel = \"/k\"\nmode = \"restart\"\nbusiness = \"b{}\"\nmemory = {}\n",
            m / 10,
            512 + 512 * (m % 8)
        );
    }
    text
}

/// The settled estate without its scores, and with a colocation for every pair of a type instead.
fn pairwise(cib: &Element, machines: usize) -> (Element, usize) {
    let mut cib = cib.clone();
    let configuration = cib.child_or_new("configuration");
    let constraints = configuration.child_or_new("constraints");
    constraints.children.retain(|c| !c.id().starts_with("understudy-location-vm-"));
    let mut count = 0;
    for a in 0..machines {
        for b in (a + 1..machines).take_while(|b| b / 10 == a / 10) {
            count += 1;
            constraints.children.push(
                Element::new("rsc_colocation")
                    .with("id", format!("apart-{a}-{b}"))
                    .with("score", -1000)
                    .with("rsc", format!("vm-m{b}"))
                    .with("with-rsc", format!("vm-m{a}"))
                    .with("node-attribute", "understudy-rack"),
            );
        }
    }
    (cib, count)
}

/// Peak resident memory of this process so far, KiB.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.split_whitespace().next()?.parse().ok()
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 100_000.0).round() / 100.0
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut scheduler = Scheduler::default();
    if let Some(root) = arguments.first() {
        scheduler.command = vec!["chroot".into(), root.clone(), "crm_simulate".into()];
    }
    let mut rows = Vec::new();
    for (nodes, machines) in [(24, 500), (200, 1000), (200, 2000), (200, 5000), (200, 10_000)] {
        let text = estate(nodes, machines);
        let begin = Instant::now();
        let (policy, findings) = check::read(&text);
        let policy = policy.unwrap_or_else(|| panic!("{findings:?}"));
        let read = begin.elapsed();
        let begin = Instant::now();
        let configuration = compile(&policy);
        let compiled = begin.elapsed();
        let begin = Instant::now();
        let document = cib::document(&policy, &configuration);
        let (_, changes) = merge(&document, &configuration);
        assert!(changes.is_empty());
        let merged = begin.elapsed();
        let mut row = serde_json::json!({
            "nodes": nodes, "machines": machines,
            "read_and_check_ms": ms(read), "compile_ms": ms(compiled), "cib_and_diff_ms": ms(merged), "peak_kib": peak(),
        });
        if nodes == 24 {
            let settled = settled(&policy);
            let begin = Instant::now();
            let fault = Fault::parse("n3", &policy).unwrap_or_else(|e| panic!("{e}"));
            match plan(&scheduler, &policy, &settled, &fault) {
                Ok(plan) => {
                    row["what_if_one_node_ms"] = ms(begin.elapsed()).into();
                    row["moved"] = plan.machines.len().into();
                    let (pairs, count) = pairwise(&settled, machines);
                    let begin = Instant::now();
                    let outcome = plan_of(&scheduler, &policy, &pairs, &fault);
                    row["pairwise_constraints"] = count.into();
                    row["pairwise_what_if_one_node_ms"] = outcome.map(|()| ms(begin.elapsed())).into();
                }
                Err(e) => row["scheduler"] = format!("not measured: {e:#}").into(),
            }
        }
        rows.push(row);
    }
    println!("{}", serde_json::to_string_pretty(&rows).unwrap_or_default());
}

fn plan_of(scheduler: &Scheduler, policy: &understudy_crm::policy::Policy, cib: &Element, fault: &Fault) -> Option<()> {
    plan(scheduler, policy, cib, fault).ok().map(|_| ())
}
