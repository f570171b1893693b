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

/// Of `understudy-bench power-cuts --nic`; `None`: it cannot run here, which was said.
fn seen_from_the_network(how: &[&str]) -> Option<(bool, String)> {
    if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: /dev/kvm cannot be opened, so nothing was proven");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let cuts = Command::new(env!("CARGO_BIN_EXE_understudy-bench"))
        .args(["power-cuts", "--nic"])
        .args(how)
        .arg("--report")
        .arg(dir.path().join("report.json"))
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&cuts.stdout), String::from_utf8_lossy(&cuts.stderr));
    if said.contains("making a network namespace") || said.contains("/dev/net/tun") {
        eprintln!("SKIPPED: no network of its own can be made here, so nothing was proven: {said}");
        return None;
    }
    println!("{said}");
    Some((cuts.status.success(), said))
}

#[test]
fn no_packet_contradicts_the_machine_that_survives_and_announcements_come_first() {
    if let Some((well, said)) = seen_from_the_network(&["--count", "8"]) {
        assert!(well, "{said}");
    }
}

#[test]
fn without_the_gate_the_network_sees_packets_that_the_survivor_never_sent() {
    if let Some((well, said)) = seen_from_the_network(&["--count", "20", "--leak"]) {
        let noticed = ["the image that survived has only", "the witness went back", "the guest has answered"];
        assert!(!well && noticed.iter().any(|words| said.contains(words)), "{said}");
    }
}
