//! Real scripts stand in for BMCs here: what they are asked is written down, what they answer is said.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn device(id: &str, agent: &str, parameters: &[(&str, &str)]) -> String {
    let pair = |(name, value): &(&str, &str)| format!("<nvpair id='{id}-{name}' name='{name}' value='{value}'/>");
    let pairs: String = parameters.iter().map(pair).collect();
    format!(
        "<primitive id='{id}' class='stonith' type='{agent}'><instance_attributes id='{id}-i'>{pairs}</instance_attributes>\
         <operations><op id='{id}-m' name='monitor'/></operations></primitive>"
    )
}

fn fencing(resources: &str, levels: &str) -> Fencing {
    let others = "<primitive id='vm' class='ocf' type='fence_trap'><instance_attributes><nvpair name='pcmk_host_list' value='n2'/>\
                  </instance_attributes></primitive>";
    Fencing::read(&format!(
        "<cib><configuration><resources>{others}{resources}</resources><fencing-topology>{levels}</fencing-topology></configuration>\
         <status><primitive id='x' class='stonith' type='fence_trap'><a/></primitive></status></cib>"
    ))
    .unwrap()
}

/// A directory of agents: `fence_on`, `fence_off`, `fence_deaf` answer; what they were asked is in `asked`.
fn agents() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, code) in [("fence_on", 0), ("fence_off", 2), ("fence_deaf", 1), ("fence_sbd", 2)] {
        let file = dir.path().join(name);
        fs::write(&file, format!("#!/bin/sh\ncat >> {}\nexit {code}\n", dir.path().join("asked").display())).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

const LIST: (&str, &str) = ("pcmk_host_list", "n1 n2");

#[test]
fn the_agents_exit_status_is_the_answer() {
    let dir = agents();
    for (agent, answer) in [
        ("fence_on", Bmc::On),
        ("fence_off", Bmc::Off),
        ("fence_deaf", Bmc::Unreachable),
        ("fence_of_nobody", Bmc::Unknown),
        ("fence_sbd", Bmc::Unknown),
        ("external/ipmi", Bmc::Unknown),
        ("../fence_on", Bmc::Unknown),
    ] {
        assert_eq!(fencing(&device("f", agent, &[LIST]), "").ask("n2", dir.path()), answer, "{agent}");
    }
    assert_eq!(fencing("", "").ask("n2", dir.path()), Bmc::Unknown, "nobody can tell");
}

#[test]
fn the_question_is_status_with_the_parameters_that_pacemaker_would_give_and_nothing_else() {
    let dir = agents();
    let parameters = [
        LIST,
        ("pcmk_host_map", "n2:outlet-7;n3:8"),
        ("pcmk_delay_max", "5"),
        ("ip", "10.0.0.2"),
        ("password", "s3cret"),
        ("action", "off"),
    ];
    let f = fencing(&device("f", "fence_on", &parameters), "");
    assert_eq!(f.ask("n2", dir.path()), Bmc::On);
    let asked = fs::read_to_string(dir.path().join("asked")).unwrap();
    assert_eq!(asked, "action=status\nip=10.0.0.2\nnodename=n2\npassword=s3cret\nplug=outlet-7\n");
    let port = |parameters: &[(&str, &str)]| {
        let f = fencing(&device("f", "fence_on", parameters), "");
        f.devices[0].question("n2").map(|q| q.lines().filter(|l| l.ends_with("2")).collect::<Vec<_>>().join(" "))
    };
    assert_eq!(port(&[LIST, ("pcmk_host_argument", "port")]), Some("nodename=n2 port=n2".into()));
    assert_eq!(port(&[LIST, ("pcmk_host_argument", "none")]), Some("nodename=n2".into()));
    assert_eq!(port(&[LIST, ("port", "12")]), Some("nodename=n2 port=12".into()));
    assert_eq!(port(&[LIST, ("password", "lrm://")]), None, "only Pacemaker's executor has that secret");
}

#[test]
fn a_device_is_asked_only_for_hosts_that_are_known_to_be_its_own() {
    for (parameters, its) in [
        (vec![LIST], true),
        (vec![("pcmk_host_list", "n1,n3")], false),
        (vec![("pcmk_host_map", "n2:7;n3:8")], true),
        (vec![("pcmk_host_list", "n1"), ("pcmk_host_check", "none")], true),
        (vec![LIST, ("pcmk_host_check", "dynamic-list")], false),
        (vec![LIST, ("pcmk_host_check", "static-list")], true),
        (vec![], false),
    ] {
        let f = fencing(&device("f", "fence_on", &parameters), "");
        assert_eq!(f.devices[0].plug("n2").is_some(), its, "{parameters:?}");
    }
}

#[test]
fn levels_are_asked_in_turn_and_all_supplies_of_a_host_must_be_off() {
    let dir = agents();
    let all = ["on", "off", "deaf", "sbd"].map(|kind| device(kind, &format!("fence_{kind}"), &[LIST])).concat();
    for (levels, answer) in [
        (vec!["off"], Bmc::Off),
        (vec!["off,on"], Bmc::On),
        (vec!["off,deaf"], Bmc::Unreachable),
        (vec!["deaf", "off"], Bmc::Off),
        (vec!["deaf", "sbd"], Bmc::Unreachable),
        (vec!["sbd"], Bmc::Unknown),
        (vec!["off,sbd"], Bmc::Unknown),
    ] {
        let level = |(i, devices): (usize, &&str)| {
            format!("<fencing-level id='l{i}' target='n2' index='{}' devices='{devices}'/>", i + 1)
        };
        let text: String = levels.iter().enumerate().map(level).collect();
        assert_eq!(fencing(&all, &text).ask("n2", dir.path()), answer, "{levels:?}");
    }
    let by_pattern = "<fencing-level id='l' target-pattern='n.*' index='1' devices='off'/>";
    assert_eq!(fencing(&all, by_pattern).ask("n2", dir.path()), Bmc::Unknown);
}

#[test]
fn what_is_no_cib_is_said_to_be_none() {
    for text in ["", "Could not connect", "<cib", "<cib><configuration>", "<cib><a b='&x;'/></cib"] {
        assert!(Fencing::read(text).is_err(), "{text}");
    }
    assert!(Fencing::read("<cib/>").is_ok());
}
