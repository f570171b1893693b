//! The fault matrix in a policy: what `check` says of its rows, and that the documents show the table that counts.

use understudy_crm::check::{self, Severity};
use understudy_crm::compile::compile;
use understudy_monitor::matrix::Matrix;

const DOCUMENT: &str = include_str!("../../docs/monitoring.md");

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

fn with(row: &str) -> (bool, Vec<check::Finding>) {
    let (policy, findings) = check::read(&format!("{SMALL}[[matrix]]\n{row}\n"));
    (policy.is_some(), findings)
}

#[test]
fn the_document_shows_the_table_that_counts() {
    for line in Matrix::standard().unwrap().table().lines() {
        assert!(DOCUMENT.contains(line), "docs/monitoring.md lacks (see understudy-crm matrix): {line}");
    }
}

#[test]
fn a_row_that_would_run_a_machine_twice_is_an_error_with_its_line() {
    let (usable, findings) = with("name = 'hasty'\nmanagement = 'down'\nverdict = 'evacuate'");
    assert!(!usable);
    let error = findings.iter().find(|f| f.severity == Severity::Error).unwrap();
    assert_eq!(error.line, Some(SMALL.lines().count() + 1));
    assert!(error.what.contains("hasty") && error.what.contains("no power"), "{}", error.what);
}

#[test]
fn a_row_that_fences_who_serves_is_a_warning() {
    let serves = "name = 'management-only'\nmanagement = 'down'\nproduction = 'up'\nmachine = 'running'\nbmc = ['on', 'unknown']\n\
                  guest = ['up', 'unwatched']\nverdict = 'fence-and-evacuate'";
    let (usable, findings) = with(serves);
    assert!(usable, "{findings:?}");
    assert!(findings.iter().any(|f| f.severity == Severity::Warning && f.what.contains("they serve until then")));
    let (usable, findings) = with("name = 'calm'\nmanagement = 'up'\nproduction = 'rack'\nverdict = 'alarm'");
    assert!(usable && findings.iter().all(|f| !f.what.contains("serve until then")), "{findings:?}");
}

#[test]
fn a_word_that_the_matrix_does_not_know_is_an_error() {
    assert!(!with("name = 'x'\nmanagement = 'sideways'\nverdict = 'alarm'").0);
    assert!(!with("name = 'x'\nverdict = 'panic'").0);
    assert!(!with("name = 'x'\nmanagment = 'up'\nverdict = 'alarm'").0);
}

const SHARED: &str = r#"
[cluster]
load_sharing = "pause"
[[nodes]]
name = "n1"
storage = "10.0.0.1"
cpus = 4
memory = 4096
[[nodes]]
name = "n2"
storage = "10.0.0.2"
cpus = 8
[[fencing]]
name = "ipmi"
agent = "fence_ipmilan"
nodes = ["n1", "n2"]
[[machines]]
name = "a"
kernel = "/k"
priority = 7
[[machines]]
name = "b"
kernel = "/k"
mode = "restart"
"#;

fn parameter(policy: &str, resource: &str, name: &str) -> Option<String> {
    let (policy, findings) = check::read(policy);
    let configuration = compile(&policy.unwrap_or_else(|| panic!("{findings:?}")));
    let resource = configuration.resources.iter().map(|r| r.primitive()).find(|p| p.id == resource).unwrap();
    resource.parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone())
}

#[test]
fn load_sharing_becomes_parameters_and_without_it_there_are_none() {
    let says = |resource: &str, name: &str| parameter(SHARED, resource, name);
    assert_eq!(says("vm-a", "load_sharing").as_deref(), Some("pause"));
    assert_eq!(says("vm-a", "priority").as_deref(), Some("7"));
    assert_eq!(says("vm-b", "host_room").as_deref(), Some("n1=4/4096 n2=8"));
    assert_eq!(says("vm-b", "priority"), None);
    let off = SHARED.replace("load_sharing = \"pause\"", "load_sharing = \"off\"");
    for name in ["load_sharing", "priority", "host_room"] {
        assert_eq!(parameter(&off, "vm-a", name), None);
    }
    assert_eq!(parameter(SMALL, "vm-m1", "load_sharing"), None);
}

#[test]
fn load_sharing_that_pauses_nobody_or_guesses_is_a_warning() {
    let warned = |text: &str, words: &str| {
        let (policy, findings) = check::read(text);
        assert!(policy.is_some(), "{findings:?}");
        findings.iter().any(|f| f.severity == Severity::Warning && f.line.is_some() && f.what.contains(words))
    };
    assert!(!warned(SHARED, ""));
    assert!(warned(&SHARED.replace("priority = 7", "priority = 0"), "nobody is ever paused"));
    assert!(warned(&SHARED.replace("cpus = 8\n", ""), "cpus is not given for n2"));
    assert!(warned(&SHARED.replace("mode = \"restart\"", "mode = \"restart\"\nvcpus = 9"), "no node as many cpus"));
}

const WATCHED: &str = r#"
[cluster]
key = "/etc/understudy/key"
[monitoring]
missed = 6
[[nodes]]
name = "n1"
storage = "10.0.0.1"
business = "10.0.1.1"
management = "10.0.2.1"
[[nodes]]
name = "n2"
storage = "10.0.0.2"
business = "fd00::2"
management = "10.0.2.2"
[[nodes]]
name = "n3"
storage = "10.0.0.3"
business = "10.0.1.3"
management = "10.0.2.3"
[[fencing]]
name = "ipmi"
agent = "fence_ipmilan"
nodes = ["n1", "n2", "n3"]
[[machines]]
name = "m1"
kernel = "/k"
mode = "restart"
"#;

#[test]
fn monitoring_becomes_a_clone_that_knows_both_networks() {
    let text = WATCHED.to_owned();
    let says = |text: &str, name: &str| parameter(text, "understudy-monitor", name);
    assert_eq!(says(&text, "production").as_deref(), Some("n1=10.0.1.1:7789 n2=[fd00::2]:7789 n3=10.0.1.3:7789"));
    assert_eq!(says(&text, "management").as_deref(), Some("n1=10.0.2.1:7789 n2=10.0.2.2:7789 n3=10.0.2.3:7789"));
    assert_eq!(says(&text, "racks").as_deref(), None);
    assert_eq!(
        (says(&text, "missed").as_deref(), says(&text, "interval_ms"), says(&text, "matrix")),
        (Some("6"), None, None)
    );
    let own = format!("{text}[[matrix]]\nname = 'calm'\nmanagement = 'up'\nproduction = 'rack'\nverdict = 'alarm'\n");
    let row = says(&own, "matrix").unwrap();
    assert!(Matrix::read_line(&row).unwrap().rows().any(|(row, own)| own && row.name == "calm"), "{row}");
    let (policy, _) = check::read(&text);
    assert!(compile(&policy.unwrap()).properties.iter().all(|(name, _)| name != "node-health-strategy"));
    let (policy, findings) = check::read(&text.replace("missed = 6", "health = true"));
    assert!(findings.is_empty(), "{findings:?}");
    let configuration = compile(&policy.unwrap());
    assert!(configuration.properties.contains(&("node-health-strategy".into(), "migrate-on-red".into())));
    let crm = understudy_crm::crm::text(&configuration);
    assert!(crm.contains("allow-unhealthy-nodes=true"), "{crm}");
}

#[test]
fn monitoring_over_one_network_or_none_is_found() {
    let text = WATCHED.to_owned();
    let said = |text: &str, severity: Severity, words: &str| {
        let (_, findings) = check::read(text);
        assert!(
            findings.iter().any(|f| f.severity == severity && f.line.is_some() && f.what.contains(words)),
            "{words}: {findings:?}"
        );
    };
    said(&text.replace("business = \"10.0.1.3\"\n", ""), Severity::Error, "no business address");
    said(&text.replace("management = \"10.0.2.3\"\n", ""), Severity::Warning, "no management address");
    said(&text.replace("10.0.2.3", "10.0.1.99"), Severity::Warning, "watched once");
    said(&text.replace("missed = 6", "missed = 1"), Severity::Error, "2 to 100");
    said(&text.replace("missed = 6", "interval_ms = 1"), Severity::Error, "20 to 60000");
    let (usable, findings) = with("name = 'calm'\nmanagement = 'up'\nproduction = 'rack'\nverdict = 'alarm'");
    assert!(usable && findings.iter().any(|f| f.what.contains("no [monitoring] section")));
}
