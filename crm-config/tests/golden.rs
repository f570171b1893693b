//! Golden cases: a folder a policy, a line in `faults` a case, and in `expected.log` what Pacemaker's own scheduler makes of it.
//!
//! The scheduler is that of the lab's Debian root; without it (or without root, which chroot needs) the test says SKIPPED
//! and passes. `UPDATE_GOLDEN=1` writes the logs anew; what changed in them is then to be read by somebody.

use std::fs;
use std::path::{Path, PathBuf};

use understudy_crm::check;
use understudy_crm::compile::compile;
use understudy_crm::placement::place;
use understudy_crm::plan::{Fault, Plan, What, plan, table};
use understudy_crm::policy::Policy;
use understudy_crm::simulate::{Scheduler, settled};

fn scheduler() -> Option<Scheduler> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
    let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root || !root.join("usr/sbin/crm_simulate").exists() {
        eprintln!("SKIPPED: the golden cases need root and a lab root with Pacemaker at {}", root.display());
        return None;
    }
    Some(Scheduler { command: vec!["chroot".into(), root.display().to_string(), "crm_simulate".into()] })
}

fn policy(text: &str) -> Policy {
    let (policy, findings) = check::read(text);
    policy.unwrap_or_else(|| panic!("{findings:?}"))
}

fn folders() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut folders: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    folders
}

/// What holds in every case, whatever its log says.
fn invariants(policy: &Policy, plan: &Plan, folder: &str) {
    let placed = place(policy);
    for fate in &plan.machines {
        let preempts = folder.starts_with("priority-");
        let healthy = matches!(fate.fate, What::Stopped | What::Moved);
        assert!(preempts || !healthy, "{folder}: a healthy machine is touched: {fate:?}");
        let Some(to) = &fate.to else { continue };
        let index = policy.machines.iter().position(|m| m.name.get_ref() == &fate.machine).unwrap();
        let permitted = placed[index].targets.iter().any(|t| policy.nodes[t.node].name.get_ref() == to);
        assert!(permitted && !plan.fault.nodes.contains(to), "{folder}: {fate:?}");
    }
}

#[test]
fn every_case_ends_as_its_log_says() {
    let Some(scheduler) = scheduler() else { return };
    let mut cases = 0;
    let mut wrong = Vec::new();
    for folder in folders() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let policy = policy(&fs::read_to_string(folder.join("policy.toml")).unwrap());
        let cib = settled(&policy);
        let quiet = scheduler.ask(&cib).unwrap();
        let vms = |o: &std::collections::BTreeMap<String, _>| {
            o.iter().filter(|(id, _)| id.starts_with("vm-")).map(|(id, r): (_, &Vec<_>)| format!("{id} {r:?}")).collect::<Vec<_>>()
        };
        assert_eq!(vms(&quiet.before), vms(&quiet.after), "{name}: not quiet before anything has happened");
        let mut log = String::new();
        for fault in fs::read_to_string(folder.join("faults")).unwrap().lines() {
            let plan = plan(&scheduler, &policy, &cib, &Fault::parse(fault, &policy).unwrap()).unwrap();
            invariants(&policy, &plan, &name);
            log.push_str(&table(&plan));
            cases += 1;
        }
        let file = folder.join("expected.log");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&file, &log).unwrap();
        } else if fs::read_to_string(&file).unwrap_or_default() != log {
            wrong.push(format!("{name}:\n{log}"));
        }
    }
    assert!(wrong.is_empty(), "other than expected:\n{}", wrong.join("\n"));
    assert!(cases >= 60, "only {cases} cases");
    eprintln!("{cases} cases");
}

#[test]
fn no_generated_configuration_draws_a_word_from_crm_verify() {
    let Some(scheduler) = scheduler() else { return };
    let mut verify = scheduler.command;
    verify.pop();
    for folder in folders() {
        let policy = policy(&fs::read_to_string(folder.join("policy.toml")).unwrap());
        let cib = understudy_crm::cib::document(&policy, &compile(&policy)).to_string();
        let mut child = std::process::Command::new(&verify[0])
            .args(&verify[1..])
            .args(["crm_verify", "-V", "--xml-pipe"])
            .stdin(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), cib.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && words.is_empty(), "{}: {words}", folder.display());
    }
}
