//! The fault matrix in a policy: what `check` says of its rows, and that the documents show the table that counts.

use understudy_crm::check::{self, Severity};
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
    assert!(usable && findings.iter().all(|f| f.severity != Severity::Warning), "{findings:?}");
}

#[test]
fn a_word_that_the_matrix_does_not_know_is_an_error() {
    assert!(!with("name = 'x'\nmanagement = 'sideways'\nverdict = 'alarm'").0);
    assert!(!with("name = 'x'\nverdict = 'panic'").0);
    assert!(!with("name = 'x'\nmanagment = 'up'\nverdict = 'alarm'").0);
}
