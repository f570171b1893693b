//! Golden cases: a folder a policy, a line in `faults` a case, and in `expected.log` what Pacemaker's own scheduler makes of it.
//!
//! The scheduler is that of the lab's Debian root; without it (or without root, which chroot needs) the test says SKIPPED
//! and passes. `UPDATE_GOLDEN=1` writes the logs anew; what changed in them is then to be read by somebody.

use std::fs;
use std::path::{Path, PathBuf};

use understudy_crm::check;
use understudy_crm::compile::compile;
use understudy_crm::merge::Change;
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
            o.iter()
                .filter(|(id, _)| id.starts_with("vm-"))
                .map(|(id, r): (_, &Vec<_>)| format!("{id} {r:?}"))
                .collect::<Vec<_>>()
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

/// Everything that only a placed machine has, as small as can be: pcs takes a second for each command.
const ESTATE: &str = r#"
nodes = [
    { name = "n1", storage = "s1", rack = "r1", cluster = "c", memory = 2048 },
    { name = "n2", storage = "s2", rack = "r2", cluster = "c", memory = 2048 },
    { name = "n3", storage = "s3", rack = "r2", high_performance = "h", memory = 4096 },
]
fencing = [{ name = "bmc", agent = "fence_legacy", nodes = ["n1", "n2", "n3"] }]
machines = [
    { name = "a", kernel = "/k", priority = 7, performance = "high", evacuation = "own-then-dedicated" },
    { name = "b", kernel = "/k", mode = "restart" },
]
"#;

#[test]
fn a_home_that_returns_takes_nothing_back() {
    let Some(scheduler) = scheduler() else { return };
    for mode in ["restart", "protected"] {
        let file = format!("tests/golden/{mode}-own-then-dedicated/policy.toml");
        let policy = policy(&fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap());
        let mut cib = settled(&policy);
        // What happened at home happened at own2, and the other way round: the machine was taken over, its home is back.
        let states = &mut cib.child_or_new("status").children;
        let [home, other, ..] = &mut states[..] else { panic!("{states:?}") };
        assert_eq!((home.attribute("uname"), other.attribute("uname")), (Some("own1"), Some("own2")));
        std::mem::swap(&mut home.children, &mut other.children);
        let outcome = scheduler.ask(&cib).unwrap();
        let on = |o: &std::collections::BTreeMap<String, Vec<understudy_crm::simulate::Running>>| {
            let mut on = o["vm-m1"].clone();
            on.sort_by(|a, b| a.node.cmp(&b.node));
            on
        };
        assert_eq!(on(&outcome.before), on(&outcome.after), "{mode}");
        assert!(on(&outcome.after).iter().any(|r| r.node == "own2" && (r.promoted || mode == "restart")), "{mode}");
    }
}

#[test]
fn what_crm_and_pcs_load_of_an_estate_is_what_apply_would_write() {
    let Some(scheduler) = scheduler() else { return };
    let policy = policy(ESTATE);
    let configuration = compile(&policy);
    let nodes: String = policy
        .nodes
        .iter()
        .enumerate()
        .map(|(i, n)| format!("<node id='{0}' uname='{1}'><instance_attributes id='nodes-{0}'><nvpair id='s{0}' name='standby' value='off'/></instance_attributes></node>", i + 1, n.name.get_ref()))
        .collect();
    let empty = format!(
        "<cib crm_feature_set='3.16.1' validate-with='pacemaker-3.9' epoch='1' num_updates='0' admin_epoch='0'>\
         <configuration><crm_config/><nodes>{nodes}</nodes><resources/><constraints/></configuration><status/></cib>"
    );
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    write("crm.txt", &understudy_crm::crm::text(&configuration));
    write("nodes.txt", &understudy_crm::crm::nodes(&configuration));
    write(
        "pcs.sh",
        &understudy_crm::pcs::script(&configuration)
            .replace("pcs ", "pcs -f /mnt/pcs.xml ")
            // The agents are not in that root.
            .replace("pcs -f /mnt/pcs.xml resource create", "pcs --force -f /mnt/pcs.xml resource create")
            .replace("pcs -f /mnt/pcs.xml stonith create", "pcs --force -f /mnt/pcs.xml stonith create"),
    );
    let root = &scheduler.command[1];
    let enter = r#"set -e; root=$1 dir=$2; mount --bind "$dir" "$root/mnt"; mount -t proc proc "$root/proc"; mount --bind /dev "$root/dev"
        exec chroot "$root" sh -c "$3""#;
    for (file, command) in [
        (
            "crm.xml",
            "CIB_file=/mnt/crm.xml HOME=/mnt crm -F -f /mnt/nodes.txt; CIB_file=/mnt/crm.xml HOME=/mnt crm -F configure load update /mnt/crm.txt",
        ),
        ("pcs.xml", "sh -e /mnt/pcs.sh"),
    ] {
        write(file, &empty);
        let output = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", enter, "enter", root])
            .arg(dir.path())
            .arg(command)
            .output()
            .unwrap();
        let loaded = fs::read_to_string(dir.path().join(file)).unwrap();
        let loaded = understudy_crm::xml::Element::parse(&loaded).unwrap();
        let (wanted, changes) = understudy_crm::merge::merge(&loaded, &configuration);
        let said = String::from_utf8_lossy(&output.stderr);
        let changes: Vec<String> = changes
            .iter()
            .map(|c| match c {
                Change::Add(e) | Change::Remove(e) => format!("{} {}", e.name, e.id()),
                Change::Modify(before, after) => format!("{before}\n{after}"),
            })
            .collect();
        assert!(changes.is_empty(), "{file}: {said}\n{}", changes.join("\n"));
        assert!(
            wanted.to_string().matches("name=\"standby\"").count() == policy.nodes.len(),
            "{file}: standby is gone"
        );
    }
}
