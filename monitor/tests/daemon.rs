//! Two monitors as they run on nodes, on this host's loopback addresses, with a membership that a file says.

use std::collections::BTreeMap;
use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use understudy_monitor::daemon::{Daemon, Settings};
use understudy_monitor::matrix::{Bmc, Machine, Management, Matrix, Production, Verdict};
use understudy_monitor::report::{self, Judged};
use understudy_monitor::watch::Config;
use understudy_monitor::wire::Plane;
use understudy_protocol::key::Key;

/// A port that is free now on the addresses that are used here.
fn port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn settings(dir: &Path, node: &str, ports: (u16, u16)) -> Settings {
    let on = |net: u8, port: u16| {
        [("n1", 1_u8), ("n2", 2), ("n3", 3)]
            .map(|(n, host)| (n.to_owned(), format!("127.0.{net}.{host}:{port}")))
            .into()
    };
    let tool = dir.join(format!("attrd_updater-{node}"));
    fs::write(&tool, format!("#!/bin/sh\necho {node} \"$@\" >> {}\n", dir.join("attributes").display())).unwrap();
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
    Settings {
        config: Config {
            node: node.into(),
            nodes: ["n1", "n2", "n3"].map(|n| (n.to_owned(), None)).into(),
            interval_ms: 50,
            missed: 6,
            samples: 2,
            restart_ms: 600_000,
            matrix: Matrix::standard().unwrap(),
        },
        addresses: BTreeMap::from([(Plane::Production, on(1, ports.0)), (Plane::Management, on(2, ports.1))]),
        key: Key::from_bytes([3; 32], "/test"),
        run_root: dir.join(node),
        crm_mon: ["cat".to_owned(), dir.join("members.xml").display().to_string()].to_vec(),
        attrd_updater: tool.display().to_string(),
        cibadmin: ["cat".to_owned(), dir.join("cib.xml").display().to_string()].to_vec(),
        fence_agents: dir.to_owned(),
        bmc: true,
        health: true,
    }
}

fn membership(dir: &Path, lost: &[&str]) {
    let node = |n: &str| {
        let lost = lost.contains(&n);
        format!("<node name='{n}' online='{}' unclean='{lost}' type='member'/>", !lost)
    };
    let text: String = ["n1", "n2", "n3"].map(node).concat();
    // At once: a reader never sees half of it.
    fs::write(dir.join("new"), format!("<pacemaker-result><nodes>{text}</nodes></pacemaker-result>")).unwrap();
    fs::rename(dir.join("new"), dir.join("members.xml")).unwrap();
}

/// Ask `node`'s monitor until what it says of `about` is so.
fn until(dir: &Path, node: &str, about: &str, so: impl Fn(&Judged) -> bool) {
    let began = Instant::now();
    let mut last = None;
    while began.elapsed() < Duration::from_secs(60) {
        if let Ok(report) = report::ask(&dir.join(node), Duration::from_secs(5)) {
            if report.judged.iter().any(|j| j.node == about && j.machine.is_none() && so(j)) {
                return;
            }
            last = Some(report);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{node} says: {last:?}");
}

#[test]
fn monitors_hear_each_other_and_say_who_is_silent_and_who_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    membership(dir, &[]);
    let ports = (port(), port());
    let start = |node: &str| Daemon::start(settings(dir, node, ports)).unwrap();
    let (_n1, _n2, n3) = (start("n1"), start("n2"), start("n3"));
    for (node, about) in [("n1", "n2"), ("n2", "n3"), ("n3", "n1")] {
        until(dir, node, about, |j| j.verdict == Verdict::Nothing && j.observation.production == Production::Up);
    }
    assert!(Daemon::start(settings(dir, "n1", ports)).is_err(), "two of one node");
    // It is a member and says nothing: first it is restarted.
    drop(n3);
    until(dir, "n1", "n3", |j| j.verdict == Verdict::RestartAgent && j.observation.machine == Machine::Silent);
    membership(dir, &["n3"]);
    until(dir, "n1", "n3", |j| j.verdict == Verdict::FenceAndEvacuate && j.observation.management == Management::Down);
    until(dir, "n1", "n2", |j| j.verdict == Verdict::Nothing);
    // Its BMC, which a script stands in for, is asked by n1, and n2 hears of it.
    fs::write(dir.join("fence_standin"), format!("#!/bin/sh\ncat > {}\nexit 2\n", dir.join("asked").display()))
        .unwrap();
    fs::set_permissions(dir.join("fence_standin"), fs::Permissions::from_mode(0o755)).unwrap();
    let pair = |name: &str, value: &str| format!("<nvpair id='{name}' name='{name}' value='{value}'/>");
    let pairs = pair("pcmk_host_list", "n1 n2 n3") + &pair("password", "s3cret");
    let cib = format!(
        "<cib><configuration><resources><primitive id='f' class='stonith' type='fence_standin'><instance_attributes id='i'>{pairs}\
         </instance_attributes></primitive></resources></configuration></cib>"
    );
    fs::write(dir.join("cib.xml"), cib).unwrap();
    for observer in ["n1", "n2"] {
        until(dir, observer, "n3", |j| j.verdict == Verdict::Evacuate && j.observation.bmc == Bmc::Off);
    }
    let asked = fs::read_to_string(dir.join("asked")).unwrap();
    assert_eq!(asked, "action=status\nnodename=n3\npassword=s3cret\nplug=n3\n");
    let told = fs::read_to_string(dir.join("attributes")).unwrap();
    assert!(told.contains("n1 --name understudy-production --update up"), "{told}");
    assert!(told.contains("n2 --name #health-understudy --update green"), "{told}");
}

#[test]
fn a_key_of_somebody_elses_is_not_heard_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    membership(dir, &[]);
    let ports = (port(), port());
    let _n1 = Daemon::start(settings(dir, "n1", ports)).unwrap();
    let other = Settings { key: Key::from_bytes([4; 32], "/other"), ..settings(dir, "n2", ports) };
    let _n2 = Daemon::start(other).unwrap();
    until(dir, "n1", "n2", |j| j.observation.machine == Machine::Silent);
    let report = report::ask(&dir.join("n1"), Duration::from_secs(5)).unwrap();
    assert!(report.refused > 0 && report.last_refused.unwrap().contains("another key"));
}
