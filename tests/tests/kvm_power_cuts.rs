//! A few of the power cuts of `understudy-bench power-cuts`, in every run of the tests.

use std::process::Command;

#[test]
fn power_cuts_at_random_moments_lose_and_double_nothing() {
    cut(15, &[]);
}

#[test]
fn power_cuts_of_hosts_with_a_disk_each_lose_and_double_nothing() {
    cut(8, &["--mirrored"]);
}

fn cut(count: u64, how: &[&str]) {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, so nothing was proven");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cuts = Command::new(env!("CARGO_BIN_EXE_understudy-bench"))
        .args(["power-cuts", "--count", &count.to_string()])
        .args(how)
        .arg("--report")
        .arg(dir.path().join("report.json"))
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&cuts.stdout), String::from_utf8_lossy(&cuts.stderr));
    println!("{said}");
    assert!(cuts.status.success(), "{said}");
    let report = std::fs::read(dir.path().join("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert_eq!(report["primary_cuts"].as_u64().unwrap() + report["standby_cuts"].as_u64().unwrap(), count);
}

#[test]
fn without_redirection_the_guest_notices_that_its_disk_is_ahead_of_its_memory() {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, so nothing was proven");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cuts = Command::new(env!("CARGO_BIN_EXE_understudy-bench"))
        .args(["power-cuts", "--count", "40", "--unredirected", "--report"])
        .arg(dir.path().join("report.json"))
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&cuts.stdout), String::from_utf8_lossy(&cuts.stderr));
    println!("{said}");
    assert!(!cuts.status.success() && said.contains("its disk not as it knows it"), "{said}");
}
