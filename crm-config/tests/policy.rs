//! From a policy's text to findings and to a configuration.

use understudy_crm::check::{self, Severity};
use understudy_crm::compile::compile;
use understudy_crm::merge::{Change, merge};
use understudy_crm::model::{Configuration, Constraint, Resource, Role, Score};
use understudy_crm::xml::Element;
use understudy_crm::{cib, crm, pcs};

const DEMO: &str = include_str!("../../tests/demo/policy.toml");

/// The least that gives a protected machine.
const SMALL: &str = r#"
[[nodes]]
name = "n1"
storage = "10.0.0.1"
[[nodes]]
name = "n2"
storage = "10.0.0.2"
[[fencing]]
name = "ipmi"
agent = "fence_ipmilan"
nodes = ["n1", "n2"]
[[machines]]
name = "m1"
kernel = "/boot/vmlinuz"
"#;

fn compiled(text: &str) -> Configuration {
    let (policy, findings) = check::read(text);
    compile(&policy.unwrap_or_else(|| panic!("{findings:?}")))
}

fn complaints(text: &str) -> Vec<String> {
    check::read(text).1.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn refused(text: &str, line: usize, words: &str) {
    let (policy, findings) = check::read(text);
    let found =
        findings.iter().any(|f| f.severity == Severity::Error && f.line == Some(line) && f.what.contains(words));
    assert!(found && policy.is_none(), "no error in line {line} with {words:?} among {findings:#?}");
}

/// The line (from 1) in which `text` has `words`.
fn line_of(text: &str, words: &str) -> usize {
    1 + text.lines().position(|l| l.contains(words)).unwrap()
}

fn value<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    pairs.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
}

fn resource<'a>(c: &'a Configuration, id: &str) -> &'a Resource {
    c.resources.iter().find(|r| r.id() == id).unwrap_or_else(|| panic!("no resource {id}"))
}

#[test]
fn the_demos_policy_is_without_complaint() {
    assert_eq!(complaints(DEMO), Vec::<String>::new());
}

#[test]
fn three_lines_make_a_protected_machine() {
    let c = compiled(SMALL);
    let vm = resource(&c, "vm-m1-clone").primitive();
    assert_eq!(value(&vm.parameters, "memory"), Some("512"));
    let repl = resource(&c, "repl-m1-clone").primitive();
    assert_eq!(value(&repl.parameters, "peers"), Some("n1=10.0.0.1:7790 n2=10.0.0.2:7790"));
}

#[test]
fn an_unknown_key_is_an_error_with_its_line() {
    refused(&SMALL.replace("kernel =", "kernal ="), line_of(SMALL, "kernel"), "unknown field `kernal`");
    refused(&SMALL.replace("kernel =", "vcpus = \"two\"\nkernel ="), line_of(SMALL, "kernel"), "invalid type");
    refused("[cluster\n", 1, "");
}

#[test]
fn what_refers_to_nothing_is_an_error_with_its_line() {
    let text = format!("{SMALL}primary = \"n3\"\nstandby = \"n2\"\n");
    refused(&text, line_of(&text, "n3"), "n3 is not a node of this policy");
    let text = DEMO.replace("primary = \"n1\"", "primary = \"b1\"");
    refused(&text, line_of(&text, "primary"), "b1 is a board; machines run on nodes");
    let text = DEMO.replace("board = \"b1\"", "board = \"b2\"");
    refused(&text, line_of(&text, "board = "), "b2 is not a board");
    let text = SMALL.replace("nodes = [\"n1\", \"n2\"]", "nodes = [\"n1\", \"n9\"]");
    refused(&text, line_of(&text, "n9"), "n9 is no node and no board");
}

#[test]
fn a_name_that_is_there_twice_is_an_error() {
    let text = SMALL.replace("name = \"n2\"", "name = \"n1\" # again");
    refused(&text, line_of(&text, "again"), "the name n1 is that of a node already");
    let text = format!("{SMALL}[[machines]]\nname = \"m1\" # again\nkernel = \"/k\"\n");
    refused(&text, line_of(&text, "again"), "there are two machines m1");
}

#[test]
fn protection_needs_two_nodes() {
    let text = SMALL.replace("[[nodes]]\nname = \"n2\"\nstorage = \"10.0.0.2\"\n", "").replace(", \"n2\"", "");
    refused(&text, line_of(&text, "m1"), "is protected and needs two nodes");
    let text = text.replace("name = \"m1\"", "name = \"m1\"\nprotection = \"none\"");
    assert!(check::read(&text).0.is_some());
}

#[test]
fn a_standby_without_an_address_for_checkpoints_is_an_error() {
    let text = SMALL.replace("storage = \"10.0.0.2\"\n", "");
    refused(&text, line_of(&text, "n2"), "neither a storage nor a management address");
}

#[test]
fn relative_paths_and_odd_values_are_errors() {
    refused(&SMALL.replace("/boot/vmlinuz", "vmlinuz"), line_of(SMALL, "vmlinuz"), "absolute path");
    refused(&SMALL.replace("kernel =", "vcpus = 33\nkernel ="), line_of(SMALL, "kernel"), "1 to 32");
    let text = DEMO.replace("tty:/run", "/run");
    refused(&text, line_of(&text, "/run/understudy"), "give tty:");
    let text = format!("{SMALL}[machines.monitor]\nprimary = \"5s\"\nstandby = 5\n");
    refused(&text, line_of(&text, "m1"), "different intervals");
}

#[test]
fn two_lines_cannot_share_a_device_or_a_port() {
    let more = "[[machines.serial]]\nguest = \"com2\"\nboard = \"b1\"\nline = \"pty:/x\"\n";
    let text = format!("{DEMO}{more}device = \"com1\" # again\n");
    refused(&text, line_of(&text, "again"), "belongs to machine demo already");
    let text = format!("{DEMO}port = 7900\n{more}device = \"com2\" # again\nport = 7900\n");
    refused(&text, line_of(&text, "again"), "port 7900 of b1 is that of line com1");
    let text = format!("{DEMO}{more}device = \"com2\"\n");
    assert!(check::read(&text).0.is_some(), "ports are chosen so that they differ");
}

#[test]
fn no_fencing_at_all_is_an_error_and_an_uncovered_node_a_warning() {
    let without = SMALL.split("[[fencing]]").next().unwrap();
    assert!(complaints(without)[0].contains("Pacemaker starts nothing without fencing"));
    let text = SMALL.replace("[\"n1\", \"n2\"]", "[\"n1\"]");
    let (policy, findings) = check::read(&text);
    assert!(policy.is_some());
    assert_eq!((findings[0].severity, findings[0].line), (Severity::Warning, Some(line_of(&text, "\"n2\""))));
}

#[test]
fn a_node_that_is_too_small_is_a_warning() {
    let text = SMALL.replace("name = \"n2\"", "name = \"n2\"\nmemory = 256");
    assert!(complaints(&text)[0].contains("node n2 cannot hold machine m1"));
}

#[test]
fn a_protected_machine_is_two_promotable_clones_that_follow_each_other() {
    let c = compiled(DEMO);
    for id in ["vm-demo-clone", "repl-demo-clone"] {
        let Resource::Clone { meta, primitive, .. } = resource(&c, id) else { panic!("{id} is no clone") };
        for (name, wanted) in [
            ("promotable", "true"),
            ("clone-max", "2"),
            ("clone-node-max", "1"),
            ("promoted-max", "1"),
            ("notify", "true"),
            ("interleave", "true"),
            ("failure-timeout", "60s"),
        ] {
            assert_eq!(value(meta, name), Some(wanted), "{id} {name}");
        }
        let monitors: Vec<_> = primitive.operations.iter().filter(|o| o.name == "monitor").collect();
        assert_eq!(monitors.len(), 2);
        assert_ne!(monitors[0].interval, monitors[1].interval, "Pacemaker tells them apart by the interval");
    }
    let one_way: Vec<bool> = c
        .constraints
        .iter()
        .filter_map(|c| match c {
            Constraint::Order { first, symmetrical, .. } => Some((first.0, *symmetrical)),
            _ => None,
        })
        .map(|(action, symmetrical)| {
            assert_eq!(symmetrical, action == "start", "{action}");
            symmetrical
        })
        .collect();
    assert_eq!(one_way.len(), 3);
}

#[test]
fn the_replicator_follows_and_has_no_say() {
    let c = compiled(DEMO);
    for constraint in &c.constraints {
        if let Constraint::Colocation { resource, with, .. } = constraint {
            assert_eq!((resource.0.as_str(), with.0.as_str()), ("repl-demo-clone", "vm-demo-clone"));
        }
    }
    let Resource::Clone { meta, primitive, .. } = resource(&c, "repl-demo-clone") else { panic!() };
    assert_eq!(value(meta, "critical"), Some("false"));
    let stop = primitive.operations.iter().find(|o| o.name == "stop").unwrap();
    assert_eq!(stop.on_fail, Some("block"));
}

#[test]
fn no_score_for_the_promoted_role_is_positive() {
    // It would make a node promotable that has no promotion score: one whose image is outdated, say.
    for text in [DEMO, SMALL] {
        for constraint in compiled(text).constraints {
            if let Constraint::Location { role: Some(Role::Promoted), score, id, .. } = constraint {
                assert!(matches!(score, Score::Finite(s) if s < 0), "{id} has {score}");
            }
        }
    }
}

#[test]
fn nothing_ties_a_machine_to_its_board() {
    for constraint in compiled(DEMO).constraints {
        let ties = match &constraint {
            Constraint::Order { first, then, .. } => vec![&first.1, &then.1],
            Constraint::Colocation { resource, with, .. } => vec![&resource.0, &with.0],
            Constraint::Location { .. } => vec![],
        };
        assert!(ties.iter().all(|r| !r.starts_with("serial-") && *r != "b1"), "{constraint:?}");
    }
}

#[test]
fn a_serial_lines_two_ends_agree() {
    let c = compiled(DEMO);
    let serial = resource(&c, "serial-b1-com1").primitive();
    let vm = resource(&c, "vm-demo-clone").primitive();
    let (listen, device) = (value(&serial.parameters, "listen").unwrap(), value(&serial.parameters, "device").unwrap());
    let key = value(&serial.parameters, "key").unwrap();
    assert_eq!(value(&vm.parameters, "serial0"), Some(format!("board:{listen}/{device},key={key}").as_str()));
    assert_eq!(value(&serial.parameters, "machine"), value(&vm.parameters, "name"));
}

#[test]
fn an_unprotected_machine_is_one_primitive_without_a_replicator() {
    let c = compiled(&DEMO.replace("protection = \"protected\"", "protection = \"none\""));
    assert!(matches!(resource(&c, "vm-demo"), Resource::Primitive(_)));
    assert!(c.resources.iter().all(|r| !r.id().starts_with("repl-")));
}

#[test]
fn a_machine_that_migrates_has_a_listener_on_every_node_and_a_failed_migration_leaves_it_where_it_is() {
    let text = SMALL.replace("name = \"m1\"", "name = \"m1\"\nprotection = \"none\"\nmigrate = true");
    let c = compiled(&text);
    let vm = resource(&c, "vm-m1").primitive();
    let listener = resource(&c, "understudy-migrations-clone").primitive();
    let peers = "n1=10.0.0.1:7780 n2=10.0.0.2:7780";
    assert_eq!(value(&listener.parameters, "peers"), Some(peers));
    assert_eq!(value(&vm.parameters, "migration_peers"), Some(peers));
    assert_eq!(value(&vm.parameters, "migration_key"), value(&listener.parameters, "key"));
    assert_eq!(value(&vm.meta, "allow-migrate"), Some("true"));
    let to = vm.operations.iter().find(|o| o.name == "migrate_to").unwrap();
    assert_eq!(to.on_fail, Some("block"));
    assert!(crm::text(&c).contains("on-fail=block"));
    // Without it nothing of that is there.
    let c = compiled(&text.replace("migrate = true", "migrate = false"));
    assert!(c.resources.iter().all(|r| !r.id().contains("migrations")));
    assert_eq!(value(&resource(&c, "vm-m1").primitive().meta, "allow-migrate"), None);
    let protected = text.replace("protection = \"none\"\n", "");
    refused(&protected, line_of(&protected, "migrate"), "moves by a hand-over");
}

#[test]
fn disks_are_handed_to_the_vmm_and_a_machine_with_disks_does_not_migrate() {
    let disks = "disks = [\"name=a,file=/vm/a.raw,format=raw\",\n\"name=b,file=/vm/b.qcow2,format=qcow2,queues=2\"]";
    let text = SMALL.replace("name = \"m1\"", &format!("name = \"m1\"\n{disks}"));
    let c = compiled(&text);
    let vmm = resource(&c, "vm-m1-clone").primitive();
    let wanted = "name=a,file=/vm/a.raw,format=raw;name=b,file=/vm/b.qcow2,format=qcow2,queues=2";
    assert_eq!(value(&vmm.parameters, "disks"), Some(wanted));
    assert!(crm::text(&c).contains(&format!("disks=\"{wanted}\"")), "{}", crm::text(&c));
    for (from, to, why) in [
        ("format=raw\"", "format=vmdk\"", "there are raw and qcow2"),
        ("name=b,file=/vm/b", "name=a,file=/vm/b", "another disk has its name"),
    ] {
        let wrong = text.replacen(from, to, 1);
        refused(&wrong, line_of(&wrong, to), why);
    }
    let migrates = text.replace("name = \"m1\"", "name = \"m1\"\nprotection = \"none\"\nmigrate = true");
    refused(&migrates, line_of(&migrates, "migrate = true"), "cannot be migrated live yet");
}

#[test]
fn a_mirrored_disk_is_a_protected_machines_on_two_nodes() {
    let disks = "disks = [\"name=a,file=/vm/a.raw,format=raw,mode=mirrored\"]";
    let text = SMALL.replace("name = \"m1\"", &format!("name = \"m1\"\n{disks}"));
    assert_eq!(
        value(&resource(&compiled(&text), "vm-m1-clone").primitive().parameters, "disks"),
        Some("name=a,file=/vm/a.raw,format=raw,mode=mirrored")
    );
    let alone = text.replace("name = \"m1\"", "name = \"m1\"\nprotection = \"none\"");
    refused(&alone, line_of(&alone, "mode=mirrored"), "only a protected machine");
    let third = text.replacen("[[fencing]]", "[[nodes]]\nname = \"n9\"\nstorage = \"10.0.0.9\"\n[[fencing]]", 1);
    refused(&third, line_of(&third, "mode=mirrored"), "runs on two nodes");
}

#[test]
fn a_watchdog_is_handed_to_the_vmm_and_a_hung_guest_of_a_protected_machine_is_not_restarted() {
    let with = |words: &str| SMALL.replace("name = \"m1\"", &format!("name = \"m1\"\n{words}"));
    let none = compiled(SMALL);
    assert_eq!(value(&resource(&none, "vm-m1-clone").primitive().parameters, "watchdog"), None);
    let c = compiled(&with("watchdog = \"i6300esb\"\nwatchdog_action = \"report\""));
    let vmm = resource(&c, "vm-m1-clone").primitive();
    assert_eq!(value(&vmm.parameters, "watchdog"), Some("i6300esb"));
    assert_eq!(value(&vmm.parameters, "watchdog_action"), Some("report"));
    let lonely = with("watchdog_action = \"reset\"");
    refused(&lonely, line_of(&lonely, "watchdog_action"), "without a watchdog");
    let restart = with("watchdog = \"i6300esb\"\nwatchdog_action = \"restart\"");
    refused(&restart, line_of(&restart, "watchdog_action"), "standby's image too");
    let c = compiled(&restart.replace("watchdog = ", "mode = \"restart\"\nwatchdog = "));
    assert_eq!(value(&resource(&c, "vm-m1").primitive().parameters, "watchdog_action"), Some("restart"));
}

#[test]
fn drives_are_handed_to_the_vmm() {
    let drives =
        "cdroms = [\"name=cd0,file=/iso/a.iso\",\n\"name=cd1\"]\ndisks = [\"name=a,file=/a,format=raw,bus=scsi\"]";
    let text = SMALL.replace("name = \"m1\"", &format!("name = \"m1\"\n{drives}"));
    let c = compiled(&text);
    let vmm = resource(&c, "vm-m1-clone").primitive();
    assert_eq!(value(&vmm.parameters, "cdroms"), Some("name=cd0,file=/iso/a.iso;name=cd1"));
    assert_eq!(value(&vmm.parameters, "disks"), Some("name=a,file=/a,format=raw,bus=scsi"));
    for (from, to, why) in [("name=cd1", "name=a", "has its name"), ("file=/iso", "file=iso", "absolute")] {
        let wrong = text.replacen(from, to, 1);
        refused(&wrong, line_of(&wrong, to), why);
    }
}

#[test]
fn network_cards_are_handed_to_the_vmm() {
    let cards = "nics = [\"name=net0,tap=m1n0,bridge=br0,vlan=12\",\n\"name=net1,tap=m1n1\"]";
    let text = SMALL.replace("name = \"m1\"", &format!("name = \"m1\"\n{cards}"));
    let c = compiled(&text);
    let vmm = resource(&c, "vm-m1-clone").primitive();
    assert_eq!(value(&vmm.parameters, "nics"), Some("name=net0,tap=m1n0,bridge=br0,vlan=12;name=net1,tap=m1n1"));
    for (from, to, why) in [("name=net1", "name=net0", "its name"), ("vlan=12", "vlan=4095", "1 to 4094")] {
        let wrong = text.replacen(from, to, 1);
        let line = if to == "name=net0" { line_of(&wrong, "tap=m1n1") } else { line_of(&wrong, to) };
        refused(&wrong, line, why);
    }
}

#[test]
fn ports_that_are_given_stay_and_the_others_keep_out_of_their_way() {
    let text = format!(
        "{SMALL}[[machines]]\nname = \"m2\"\nkernel = \"/k\"\nport = 7790\n[[machines]]\nname = \"m3\"\nkernel = \"/k\"\n"
    );
    let c = compiled(&text);
    let port = |m: &str| {
        let peers =
            value(&resource(&c, &format!("repl-{m}-clone")).primitive().parameters, "peers").unwrap().to_string();
        peers.rsplit_once(':').unwrap().1.to_string()
    };
    assert_eq!([port("m1"), port("m2"), port("m3")], ["7791", "7790", "7792"]);
}

#[test]
fn several_devices_of_one_node_become_levels() {
    let text = format!(
        "{SMALL}[[fencing]]\nname = \"pdu\"\nagent = \"fence_apc\"\nnodes = [\"n1\"]\nlevel = 2\n[fencing.parameters]\nport = 4\n"
    );
    let c = compiled(&text);
    let levels: Vec<_> = c.levels.iter().map(|l| (l.target.as_str(), l.index, l.devices.clone())).collect();
    assert_eq!(levels, [("n1", 1, vec!["ipmi".to_string()]), ("n1", 2, vec!["pdu".to_string()])]);
    assert!(cib::sections(&c).child("fencing-topology").is_some());
    assert!(crm::text(&c).contains("fencing_topology n1: ipmi pdu"));
    assert!(pcs::script(&c).contains("pcs stonith level add 2 n1 pdu"));
}

// ------------------------------------------------------------------------------------------------------------- merge

fn cluster() -> Element {
    Element::parse(
        r##"<cib epoch="7"><configuration>
        <crm_config><cluster_property_set id="cib-bootstrap-options">
          <nvpair id="a" name="cluster-name" value="theirs"/><nvpair id="b" name="stonith-enabled" value="false"/>
        </cluster_property_set></crm_config>
        <nodes/>
        <resources><primitive id="web" class="systemd" type="nginx"/></resources>
        <constraints><rsc_location id="cli-ban-vm-demo-clone-on-n1" rsc="vm-demo-clone" node="n1" score="-INFINITY"/>
          <rsc_location id="understudy-veto-demo" rsc="vm-demo-clone"><rule id="r" role="Promoted" score="-INFINITY">
          <expression id="x" attribute="#uname" operation="ne" value="n1"/></rule></rsc_location></constraints>
        </configuration><status/></cib>"##,
    )
    .unwrap()
}

fn ids(cib: &Element, section: &str) -> Vec<String> {
    let section = cib.child("configuration").and_then(|c| c.child(section));
    section.map(|s| s.children.iter().map(|c| c.id().to_string()).collect()).unwrap_or_default()
}

#[test]
fn applying_twice_changes_nothing_the_second_time() {
    let (merged, changes) = merge(&cluster(), &compiled(DEMO));
    assert!(!changes.is_empty());
    let (again, changes) = merge(&merged, &compiled(DEMO));
    assert_eq!(changes, []);
    assert_eq!(again, merged);
}

#[test]
fn what_is_not_ours_stays() {
    let (merged, changes) = merge(&cluster(), &compiled(DEMO));
    assert!(ids(&merged, "resources").contains(&"web".to_string()));
    for id in ["cli-ban-vm-demo-clone-on-n1", "understudy-veto-demo"] {
        assert!(ids(&merged, "constraints").contains(&id.to_string()), "{id}");
    }
    assert!(changes.iter().all(|c| !matches!(c, Change::Remove(_))));
    let text = merged.to_string();
    assert!(text.contains("theirs") && !text.contains("name=\"stonith-enabled\" value=\"false\""));
}

#[test]
fn a_machine_that_left_the_policy_leaves_the_cluster_and_nothing_else_does() {
    let (merged, _) = merge(&cluster(), &compiled(DEMO));
    let text = DEMO.split("[[machines]]").next().unwrap();
    let (without, changes) = merge(&merged, &compiled(text));
    let gone: Vec<&str> =
        changes.iter().filter_map(|c| if let Change::Remove(e) = c { Some(e.id()) } else { None }).collect();
    assert!(gone.contains(&"vm-demo-clone") && gone.contains(&"understudy-order-demo-start"), "{gone:?}");
    assert_eq!(ids(&without, "resources"), ["web", "fence-n1", "fence-n2", "fence-b1", "b1"]);
    assert!(ids(&without, "constraints").contains(&"understudy-veto-demo".to_string()), "the machine lifts it, not we");
}

#[test]
fn a_changed_value_changes_one_object() {
    let (merged, _) = merge(&cluster(), &compiled(DEMO));
    let (_, changes) = merge(&merged, &compiled(&DEMO.replace("memory = 512", "memory = 768")));
    assert_eq!(changes.len(), 1);
    assert!(matches!(&changes[0], Change::Modify(_, after) if after.id() == "vm-demo-clone"));
}

#[test]
fn what_an_operator_said_of_a_resource_stays_said() {
    let (mut merged, _) = merge(&cluster(), &compiled(DEMO));
    let resources = merged.child_or_new("configuration").child_or_new("resources");
    let clone = resources.children.iter_mut().find(|c| c.id() == "vm-demo-clone").unwrap();
    let stopped = Element::new("nvpair").with("id", "t").with("name", "target-role").with("value", "Stopped");
    clone.child_or_new("meta_attributes").children.push(stopped);
    assert_eq!(merge(&merged, &compiled(DEMO)).1, []);
    let (changed, _) = merge(&merged, &compiled(&DEMO.replace("memory = 512", "memory = 768")));
    assert!(changed.to_string().contains("target-role"));
}

#[test]
fn every_id_in_a_configuration_is_there_once() {
    fn collect(element: &Element, into: &mut Vec<String>) {
        if element.name != "obj_ref" && !element.id().is_empty() {
            into.push(element.id().to_string());
        }
        element.children.iter().for_each(|c| collect(c, into));
    }
    let mut all = Vec::new();
    collect(&cib::sections(&compiled(DEMO)), &mut all);
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
}

proptest::proptest! {
    #[test]
    fn no_policy_text_makes_it_panic(text in ".{0,300}") {
        let _ = check::read(&text);
    }

    #[test]
    fn no_changed_policy_makes_it_panic(at in 0usize..1800, with in "[\\[\\]\"=a-z0-9\\n.-]{0,4}") {
        let mut text = DEMO.to_string();
        let at = at.min(text.len());
        if text.is_char_boundary(at) {
            text.insert_str(at, &with);
        }
        if let (Some(policy), _) = check::read(&text) {
            let c = compile(&policy);
            let _ = (cib::document(&policy, &c).to_string(), crm::text(&c), pcs::script(&c));
        }
    }
}

#[test]
fn a_second_storage_address_becomes_a_second_path() {
    let doubled = SMALL.replace("storage = \"10.0.0.2\"", "storage = \"10.0.0.2\"\nstorage2 = \"fe80::2\"");
    let text = crm::text(&compiled(&doubled));
    assert!(text.contains("n1=10.0.0.1:7790 n2=10.0.0.2:7790,[fe80::2]:7790"), "{text}");
    let odd = SMALL.replace("storage = \"10.0.0.2\"", "storage2 = \"a b\"");
    assert!(complaints(&odd).iter().any(|what| what.contains("neither an IP address")), "{:?}", complaints(&odd));
}
