//! What Pacemaker's own scheduler makes of a generated configuration: `crm_verify`, `crm_simulate`, and the three
//! printers against each other through `crm` and `pcs`.
//!
//! The tools are the host's, or those of the lab's Debian root (`target/lab/root`, entered with chroot, which needs root).
//! With neither, the tests say so and pass: the lab is built by `make test`, and there they run.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use understudy_crm::check;
use understudy_crm::cib;
use understudy_crm::compile::compile;
use understudy_crm::merge::{Change, merge};
use understudy_crm::records;
use understudy_crm::xml::Element;
use understudy_crm::{crm, pcs};

const DEMO: &str = include_str!("../../tests/demo/policy.toml");
/// Enters the lab root with a directory of the test's at /mnt and stand-ins for agents that need not be installed.
const ENTER: &str = r#"
set -e
root=$1 dir=$2; shift 2
mount --bind "$dir" "$root/mnt"
mount --bind "$dir/agents" "$root/usr/lib/ocf/resource.d/understudy"
mount --bind "$dir/fence" "$root/usr/sbin/fence_legacy"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
exec chroot "$root" "$@"
"#;

struct Tools {
    root: PathBuf,
    dir: tempfile::TempDir,
}

impl Tools {
    fn new() -> Option<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
        let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
        let is_root = std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
        if !is_root || !root.join("usr/sbin/crm_simulate").exists() {
            eprintln!("skipped: no lab root with Pacemaker at {}, or not root", root.display());
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let tools = Self { root: root.canonicalize().unwrap(), dir };
        // Without a /mnt there is no place for the test's files; without the agents' directory none for stand-ins.
        std::fs::create_dir(tools.path("agents")).unwrap();
        for agent in ["vmm", "replicator", "serial"] {
            tools.script(&format!("agents/{agent}"), &metadata(agent));
        }
        tools.script("fence", &metadata("fence_legacy"));
        Some(tools)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, metadata: &str) {
        use std::os::unix::fs::PermissionsExt;
        std::fs::write(self.path(name), format!("#!/bin/sh\ncat <<'END'\n{metadata}\nEND\n")).unwrap();
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), content).unwrap();
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "enter"]);
        command.arg(&self.root).arg(self.dir.path()).args(arguments);
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// The demo's cluster in a quiet state: the machine runs on `primary` with these promotion scores of n1 and n2.
    fn running(&self, policy: &str, more: &str, scores: [Option<i32>; 2]) {
        self.write("0.xml", &with_scores(&document(policy, more), scores));
        // The first pass starts everything (a remote node takes a second one), each as the scheduler decides.
        for (from, to) in [("0", "1"), ("1", "2"), ("2", "cib")] {
            let (from, to) = (format!("/mnt/{from}.xml"), format!("/mnt/{to}.xml"));
            self.run(&["crm_simulate", "-x", &from, "-S", "-Q", "-O", &to]);
        }
        let quiet = self.run(&["crm_simulate", "-x", "/mnt/cib.xml", "-R"]);
        assert!(transition(&quiet).is_empty(), "not quiet: {quiet}");
    }

    /// What the scheduler does after `events` in that cluster.
    fn after(&self, scores: [Option<i32>; 2], events: &[&str]) -> Vec<String> {
        let cib = Element::parse(&std::fs::read_to_string(self.path("cib.xml")).unwrap()).unwrap();
        self.write("now.xml", &with_scores(&cib, scores));
        let text = self.run(&[&["crm_simulate", "-x", "/mnt/now.xml", "-S"], events].concat());
        transition(&text)
    }
}

fn metadata(name: &str) -> String {
    let action = |a: &str| format!(r#"<action name="{a}" timeout="20s" interval="0s"/>"#);
    let actions: String = ["start", "stop", "monitor", "promote", "demote", "notify", "meta-data"].map(action).concat();
    let names = [
        "name",
        "memory",
        "vcpus",
        "kernel",
        "initrd",
        "cmdline",
        "peer_timeout_ms",
        "serial0",
        "peers",
        "key",
        "vmm_resource",
        "machine",
        "device",
        "line",
        "listen",
        "plug",
    ];
    let parameter = |n: &str| {
        format!(
            r#"<parameter name="{n}"><longdesc lang="en">x</longdesc><shortdesc lang="en">x</shortdesc><content type="string"/></parameter>"#
        )
    };
    let parameters: String = names.map(parameter).concat();
    format!(
        r#"<?xml version="1.0"?><resource-agent name="{name}" version="1"><version>1.0</version><longdesc lang="en">x</longdesc><shortdesc lang="en">x</shortdesc><parameters>{parameters}</parameters><actions>{actions}</actions></resource-agent>"#
    )
}

/// The demo's CIB with `more` among its constraints.
fn document(policy: &str, more: &str) -> Element {
    let (policy, findings) = check::read(policy);
    let policy = policy.unwrap_or_else(|| panic!("{findings:?}"));
    let mut cib = cib::document(&policy, &compile(&policy));
    if !more.is_empty() {
        let constraints = cib.child_or_new("configuration").child_or_new("constraints");
        constraints.children.push(Element::parse(more).unwrap());
    }
    cib
}

/// Promotion scores as the agents publish them.
fn with_scores(cib: &Element, scores: [Option<i32>; 2]) -> String {
    let mut cib = cib.clone();
    for state in &mut cib.child_or_new("status").children {
        let id = state.id().to_string();
        let Some(score) = id.parse::<usize>().ok().and_then(|i| scores.get(i - 1)) else { continue };
        let set = state.child_or_new("transient_attributes").child_or_new("instance_attributes");
        set.children.retain(|p| p.attribute("name") != Some("master-vm-demo"));
        if let Some(score) = score {
            let pair = Element::new("nvpair").with("id", format!("score-{id}")).with("name", "master-vm-demo");
            set.children.push(pair.with("value", score));
        }
    }
    cib.to_string()
}

/// The lines of the transition summary, blanks made single.
fn transition(text: &str) -> Vec<String> {
    let lines = text.lines().skip_while(|l| !l.starts_with("Transition Summary"));
    let lines = lines.skip(1).take_while(|l| !l.starts_with("Executing") && !l.starts_with("Using"));
    let words = |l: &str| l.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
    lines.map(words).filter(|l| !l.is_empty()).collect()
}

#[track_caller]
fn has(transition: &[String], what: &str) {
    assert!(transition.iter().any(|l| l.starts_with(what)), "no {what:?} in {transition:#?}");
}

#[track_caller]
fn leaves_machine_alone(transition: &[String]) {
    assert!(transition.iter().all(|l| !l.contains("vm-demo")), "the machine is touched: {transition:#?}");
}

const ON_N1: [Option<i32>; 2] = [Some(10_001), Some(10_000)];
const ON_N2: [Option<i32>; 2] = [Some(10_000), Some(10_001)];

#[test]
fn the_configuration_verifies_without_a_word() {
    let Some(tools) = Tools::new() else { return };
    tools.write("cib.xml", &document(DEMO, "").to_string());
    let output = tools.output(&["crm_verify", "-V", "-x", "/mnt/cib.xml"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_new_machine_starts_on_its_primary_and_a_node_without_score_is_never_promoted() {
    let Some(tools) = Tools::new() else { return };
    let first = |scores| {
        tools.write("new.xml", &with_scores(&document(DEMO, ""), scores));
        transition(&tools.run(&["crm_simulate", "-x", "/mnt/new.xml", "-R"]))
    };
    let both = first([Some(5), Some(5)]);
    assert!(both.iter().any(|l| l.starts_with("Promote vm-demo") && l.contains("Promoted n1")), "{both:#?}");
    assert!(both.iter().any(|l| l.starts_with("Promote repl-demo") && l.contains("Promoted n1")), "{both:#?}");
    let second = first([None, Some(5)]);
    assert!(second.iter().any(|l| l.starts_with("Promote vm-demo") && l.contains("Promoted n2")), "{second:#?}");
    let none = first([None, None]);
    assert!(none.iter().all(|l| !l.starts_with("Promote vm-demo")), "{none:#?}");
}

#[test]
fn the_standby_takes_over_when_the_primary_dies_and_only_after_fencing() {
    let Some(tools) = Tools::new() else { return };
    tools.running(DEMO, "", ON_N1);
    let after = tools.after(ON_N1, &["--node-fail", "n1"]);
    has(&after, "Fence (reboot) n1");
    has(&after, "Promote vm-demo:1 ( Unpromoted -> Promoted n2 )");
    has(&after, "Promote repl-demo:1 ( Unpromoted -> Promoted n2 )");
}

#[test]
fn a_stale_standby_is_not_promoted_when_the_primary_dies() {
    let Some(tools) = Tools::new() else { return };
    // The stale one is the preferred primary: preference must not stand in for a score.
    tools.running(DEMO, "", ON_N2);
    let after = tools.after([None, Some(10_001)], &["--node-fail", "n2"]);
    has(&after, "Fence (reboot) n2");
    assert!(after.iter().all(|l| !l.starts_with("Promote vm-demo")), "{after:#?}");
}

#[test]
fn a_vetoed_standby_is_not_promoted_when_the_primary_dies() {
    let Some(tools) = Tools::new() else { return };
    let veto = r##"<rsc_location id="understudy-veto-demo" rsc="vm-demo-clone"><rule id="understudy-veto-demo-rule"
        role="Promoted" score="-INFINITY"><expression id="understudy-veto-demo-node" attribute="#uname" operation="ne" value="n1"/>
        </rule></rsc_location>"##;
    tools.running(DEMO, veto, ON_N1);
    let after = tools.after(ON_N1, &["--node-fail", "n1"]);
    assert!(after.iter().all(|l| !l.starts_with("Promote vm-demo")), "{after:#?}");
}

#[test]
fn a_returned_primary_does_not_take_the_machine_back() {
    let Some(tools) = Tools::new() else { return };
    tools.running(DEMO, "", ON_N2);
    assert_eq!(tools.after(ON_N2, &[]), Vec::<String>::new());
}

#[test]
fn a_failed_replicator_is_restarted_alone_however_often_it_fails() {
    let Some(tools) = Tools::new() else { return };
    tools.running(DEMO, "", ON_N1);
    for failure in ["repl-demo_monitor_5000@n1=1", "repl-demo_monitor_5000@n1=9", "repl-demo_monitor_7000@n2=7"] {
        let after = tools.after(ON_N1, &["--op-inject", failure]);
        has(&after, "Recover repl-demo");
        leaves_machine_alone(&after);
    }
    // Not even its stop can do the machine harm: no fencing.
    let after =
        tools.after(ON_N1, &["--op-inject", "repl-demo_monitor_5000@n1=1", "--op-inject", "repl-demo_stop_0@n1=1"]);
    leaves_machine_alone(&after);
    assert!(after.iter().all(|l| !l.starts_with("Fence")), "{after:#?}");
}

#[test]
fn a_crashed_vmm_leads_to_a_takeover_not_to_a_restart_in_place() {
    let Some(tools) = Tools::new() else { return };
    tools.running(DEMO, "", ON_N1);
    for code in ["vm-demo_monitor_5000@n1=9", "vm-demo_monitor_5000@n1=7"] {
        let after = tools.after(ON_N1, &["--op-inject", code]);
        has(&after, "Promote vm-demo:1 ( Unpromoted -> Promoted n2 )");
        has(&after, "Promote repl-demo:1 ( Unpromoted -> Promoted n2 )");
        assert!(after.iter().all(|l| !l.starts_with("Fence")), "{after:#?}");
    }
}

#[test]
fn a_lost_board_stops_no_machine_and_delays_no_takeover() {
    let Some(tools) = Tools::new() else { return };
    let without_device =
        DEMO.replace("[[fencing]]\nname = \"fence-b1\"\nagent = \"fence_lab\"\nnodes = [\"b1\"]\n", "");
    for policy in [DEMO, &without_device] {
        tools.running(policy, "", ON_N1);
        let lost = ["--op-inject", "b1_monitor_10000@n1=1"];
        leaves_machine_alone(&tools.after(ON_N1, &lost));
        let after = tools.after(ON_N1, &[&lost[..], &["--node-fail", "n1"]].concat());
        has(&after, "Promote vm-demo:1 ( Unpromoted -> Promoted n2 )");
    }
}

#[test]
fn a_planned_move_demotes_and_promotes_the_machine_before_its_replicator() {
    let Some(tools) = Tools::new() else { return };
    tools.running(DEMO, "", ON_N1);
    let mut cib = Element::parse(&std::fs::read_to_string(tools.path("cib.xml")).unwrap()).unwrap();
    let ban = r##"<rsc_location id="cli-ban-vm-demo-clone-on-n1" rsc="vm-demo-clone" role="Promoted" node="n1" score="-INFINITY"/>"##;
    cib.child_or_new("configuration").child_or_new("constraints").children.push(Element::parse(ban).unwrap());
    tools.write("now.xml", &cib.to_string());
    let text = tools.run(&["crm_simulate", "-x", "/mnt/now.xml", "-S"]);
    let at = |what: &str| {
        let squeezed = |l: &str| l.split_whitespace().collect::<Vec<_>>().join(" ");
        let position = text.lines().position(|l| squeezed(l).starts_with(&format!("* Resource action: {what}")));
        position.unwrap_or_else(|| panic!("no {what} in {text}"))
    };
    let steps = ["vm-demo demote on n1", "repl-demo demote on n1", "repl-demo promote on n2"].map(at);
    assert!(steps.is_sorted(), "{text}");
    assert!(
        at("vm-demo demote on n1") < at("vm-demo promote on n2") && at("vm-demo promote on n2") < steps[2],
        "{text}"
    );
}

#[test]
fn what_crm_and_pcs_load_is_what_apply_would_write() {
    let Some(tools) = Tools::new() else { return };
    // A stock agent's name, because pcs looks agents up; a stand-in answers for it.
    let policy = DEMO.replace("fence_lab", "fence_legacy");
    let (policy, _) = check::read(&policy);
    let configuration = compile(&policy.unwrap());
    let empty = r#"<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="0">
        <configuration><crm_config/><nodes><node id="1" uname="n1"/><node id="2" uname="n2"/></nodes><resources/><constraints/>
        </configuration><status/></cib>"#;
    tools.write("crm.txt", &crm::text(&configuration));
    let script: String = pcs::script(&configuration).replace("pcs resource", "pcs -f /mnt/pcs.xml resource");
    let script = ["stonith", "constraint", "property", "tag"]
        .iter()
        .fold(script, |s, word| s.replace(&format!("pcs {word}"), &format!("pcs -f /mnt/pcs.xml {word}")));
    tools.write("pcs.sh", &script);
    for (file, command) in [
        (
            "crm.xml",
            vec![
                "env",
                "CIB_file=/mnt/crm.xml",
                "HOME=/mnt",
                "crm",
                "-F",
                "configure",
                "load",
                "update",
                "/mnt/crm.txt",
            ],
        ),
        ("pcs.xml", vec!["sh", "-e", "/mnt/pcs.sh"]),
    ] {
        tools.write(file, empty);
        tools.run(&command);
        let loaded = Element::parse(&std::fs::read_to_string(tools.path(file)).unwrap()).unwrap();
        let (_, changes) = merge(&loaded, &configuration);
        assert_eq!(changes, [], "{file}");
    }
}

/// The record of the policy that the evacuation controller reads is a property in a set of its own.
#[test]
fn the_controllers_record_is_loaded_by_crm_and_pcs_as_well() {
    let Some(tools) = Tools::new() else { return };
    let (policy, _) =
        check::read(&format!("{}\n[evacuation]\nsettle = 7\n", DEMO.replace("fence_lab", "fence_legacy")));
    let configuration = compile(&policy.unwrap());
    let record = configuration.estate.clone().unwrap();
    let line =
        |text: String, of: &str| text.lines().skip_while(|l| !l.contains(of)).take(2).collect::<Vec<_>>().join("\n");
    tools.write("crm.txt", &line(crm::text(&configuration), "property understudy-evacuation:"));
    tools.write("pcs.sh", &line(pcs::script(&configuration), "crm_attribute").lines().take(1).collect::<String>());
    let empty = r#"<cib crm_feature_set="3.16.1" validate-with="pacemaker-3.9" epoch="1" num_updates="0" admin_epoch="0">
        <configuration><crm_config/><nodes/><resources/><constraints/></configuration><status/></cib>"#;
    let load = ["crm", "-F", "configure", "load", "update", "/mnt/crm.txt"];
    for (by, command) in [("crm", &load[..]), ("pcs", &["sh", "-e", "/mnt/pcs.sh"])] {
        tools.write("live.xml", empty);
        tools.run(&[&["env", "CIB_file=/mnt/live.xml", "HOME=/mnt"], command].concat());
        let live = Element::parse(&std::fs::read_to_string(tools.path("live.xml")).unwrap()).unwrap();
        assert_eq!(records::property(&live, records::POLICY), Some(record.as_str()), "{by}");
        let (_, changes) = merge(&live, &configuration);
        let of_it = |change: &Change| format!("{change:?}").contains(records::POLICY);
        assert!(!changes.iter().any(of_it), "apply would write it again after {by}");
    }
}

#[test]
fn the_patch_changes_what_is_ours_and_keeps_a_veto_written_meanwhile() {
    let Some(tools) = Tools::new() else { return };
    tools.write("before.xml", &document(DEMO, "").to_string());
    let (policy, _) = check::read(&DEMO.replace("memory = 512", "memory = 768"));
    let current = Element::parse(&std::fs::read_to_string(tools.path("before.xml")).unwrap()).unwrap();
    let (wanted, changes) = merge(&current, &compile(&policy.unwrap()));
    assert_eq!(changes.len(), 1);
    tools.write("wanted.xml", &wanted.to_string());
    let patch =
        tools.output(&["crm_diff", "--original", "/mnt/before.xml", "--new", "/mnt/wanted.xml", "--no-version"]);
    tools.write("patch.xml", &String::from_utf8_lossy(&patch.stdout));
    let veto = r#"<rsc_location id="understudy-veto-demo" rsc="vm-demo-clone" node="n2" score="-INFINITY"/>"#;
    tools.write("live.xml", &document(DEMO, veto).to_string().replacen("epoch=\"1\"", "epoch=\"9\"", 1));
    tools.run(&["env", "CIB_file=/mnt/live.xml", "cibadmin", "--patch", "--xml-file", "/mnt/patch.xml"]);
    let live = std::fs::read_to_string(tools.path("live.xml")).unwrap();
    assert!(live.contains("understudy-veto-demo") && live.contains("768"), "{live}");
}
