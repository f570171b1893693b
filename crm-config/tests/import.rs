//! Import: what a cluster's configuration is read back as. Every golden case's configuration, and those that the other tests use.

use std::fs;
use std::path::Path;

use understudy_crm::check;
use understudy_crm::compile::compile;
use understudy_crm::import::{Imported, import};
use understudy_crm::merge::merge;
use understudy_crm::xml::Element;
use understudy_crm::{cib, policy::Policy};

const DEMO: &str = include_str!("../../tests/demo/policy.toml");

fn policy(text: &str) -> Policy {
    let (policy, findings) = check::read(text);
    policy.unwrap_or_else(|| panic!("{findings:?}\n{text}"))
}

fn cib_of(text: &str) -> Element {
    let policy = policy(text);
    cib::document(&policy, &compile(&policy))
}

/// Import, and what would be changed by applying what was imported.
fn around(cib: &Element) -> (Imported, usize) {
    let imported = import(cib);
    let again = policy(&imported.text);
    let changes = merge(cib, &compile(&again)).1.len();
    (imported, changes)
}

/// A little of everything.
const RICH: &str = r#"
cluster = { no_quorum = "stop", stickiness = 300, key = "/etc/key", migration_port = 7000, load_sharing = "pause" }
monitoring = { port = 7001, missed = 6, health = true }
nodes = [
    { name = "n1", storage = "10.0.0.1", storage2 = "10.0.9.1", business = "10.0.1.1", management = "10.0.2.1", cpus = 4, memory = 8192 },
    { name = "n2", storage = "fd00::2", business = "10.0.1.2", management = "10.0.2.2", cpus = 8, memory = 8192 },
]
boards = [{ name = "b1", server = "10.0.2.9", business = "10.0.1.9", port = 3122 }]
fencing = [
    { name = "ipmi-n1", agent = "fence_ipmilan", nodes = ["n1"], parameters = { ip = "10.9.0.1", lanplus = "1" } },
    { name = "pdu", agent = "fence_apc", nodes = ["n1", "n2", "b1"], level = 2 },
    { name = "ipmi-n2", agent = "fence_ipmilan", nodes = ["n2"], interval = "60s" },
]
machines = [
    { name = "a", kernel = "/k", cmdline = "quiet x=\"y\"", vcpus = 2, priority = 5, interval_ms = 30, peer_timeout_ms = 900, primary = "n1", standby = "n2", disks = ["name=vda,file=/a,format=raw", "name=vdb,file=/b,format=qcow2"], serial = [{ guest = "com2", board = "b1", device = "gps", line = "tty:/dev/ttyS0,4800" }] },
    { name = "b", kernel = "/k", initrd = "/i", mode = "restart", migrate = true, failure_timeout = "2min", monitor = { primary = 7, standby = 9 }, shutdown = "off" },
    { name = "c", kernel = "/k", port = 9000, nics = ["name=net0,tap=c0,bridge=br0"], watchdog = "i6300esb" },
    { name = "d", kernel = "/k", mode = "restart", watchdog = "i6300esb", watchdog_action = "restart" },
]
matrix = [{ name = "ours", management = "up", production = ["rack", "node"], machine = "running", verdict = "alarm" }]
"#;

#[test]
fn what_policies_say_of_machines_comes_back_and_applying_it_changes_nothing() {
    for text in [DEMO, RICH] {
        let (imported, changes) = around(&cib_of(text));
        assert_eq!((changes, &imported.warnings), (0, &Vec::new()), "{}", imported.text);
    }
    let (imported, _) = around(&cib_of(RICH));
    let again = policy(&imported.text);
    let rich = policy(RICH);
    assert_eq!((&again.nodes, &again.boards), (&rich.nodes, &rich.boards));
    assert_eq!(again.monitoring, rich.monitoring);
    let cells = |p: &Policy| p.matrix.iter().map(|r| (r.get_ref().cells(), r.get_ref().verdict)).collect::<Vec<_>>();
    assert_eq!(cells(&again), cells(&rich));
    assert_eq!(again.machines[0].serial[0].line, rich.machines[0].serial[0].line);
}

#[test]
fn every_golden_case_comes_back_and_every_difference_is_named() {
    let mut whole = Vec::new();
    for folder in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).unwrap() {
        let folder = folder.unwrap().path();
        let text = fs::read_to_string(folder.join("policy.toml")).unwrap();
        let (imported, changes) = around(&cib_of(&text));
        let named = imported.warnings.iter().filter(|w| w.starts_with("applying this policy would")).count();
        assert_eq!(named, changes, "{}: {:?}", folder.display(), imported.warnings);
        assert!(imported.warnings.iter().any(|w| w.contains("business types")));
        for warning in &imported.warnings {
            assert!(imported.text.contains(&format!("# ! {warning}")), "{warning}");
        }
        if changes == 0 {
            whole.push(folder.file_name().unwrap().to_string_lossy().into_owned());
        } else {
            // Only where placement needs what the cluster does not keep.
            let lost = text.contains("business") || text.contains("standby") || text.contains("memory");
            assert!(lost, "{}: {:?}\n{}", folder.display(), imported.warnings, imported.text);
        }
    }
    assert!(whole.len() >= 17, "{whole:?}");
}

#[test]
fn what_is_not_ours_or_by_another_name_is_said_and_not_doubled() {
    let mut text = cib_of(DEMO).to_string();
    text = text.replace("vm-demo", "my-machine");
    text = text.replacen(
        "<resources>",
        "<resources><primitive id='ip' class='ocf' provider='heartbeat' type='IPaddr2'/><group id='g'><primitive id='x' class='ocf' provider='heartbeat' type='Dummy'/></group>",
        1,
    );
    text = text.replacen(
        "<constraints>",
        "<constraints><rsc_location id='cli-ban-x' rsc='ip' node='n1' score='-INFINITY'/>",
        1,
    );
    let imported = import(&Element::parse(&text).unwrap());
    let said =
        |words: &str| assert!(imported.warnings.iter().any(|w| w.contains(words)), "{words}: {:#?}", imported.warnings);
    said("called my-machine, and a policy would make a second one");
    said("stay as they are: ip");
    said("cli-ban-x");
    said("group g is not read");
    assert!(!imported.text.contains("[[machines]]"));
}

#[test]
fn a_parameter_that_no_policy_has_is_named() {
    let text = cib_of(DEMO).to_string().replacen(
        "name=\"memory\" value=\"512\"/>",
        "name=\"memory\" value=\"512\"/><nvpair id=\"c\" name=\"capture\" value=\"stop\"/>",
        1,
    );
    let imported = import(&Element::parse(&text).unwrap());
    assert!(
        imported.warnings.iter().any(|w| w.contains("vm-demo") && w.contains("capture=stop")),
        "{:#?}",
        imported.warnings
    );
}

#[test]
fn an_empty_cluster_is_an_empty_policy() {
    let imported = import(&Element::parse("<cib/>").unwrap());
    assert!(imported.warnings.iter().any(|w| w.contains("no [[nodes]]")), "{:?}", imported.warnings);
}
