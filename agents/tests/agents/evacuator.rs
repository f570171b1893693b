//! `ocf:understudy:evacuator`, action by action.

use std::fs;

use crate::Test;
use crate::node::Node;

pub const TESTS: &[Test] = &[
    ("the controller is started, watched and stopped", life),
    ("a controller that comes to no end of its rounds fails its monitor, and says why", stuck),
];

fn life() {
    let node = Node::new("evacuator").with("OCF_RESKEY_CRM_meta_on_node", "n1");
    let pid_file = node.path("run/.evacuator/evacuator.pid");
    assert_eq!((node.act("validate-all"), node.probe(), node.monitor().code), (0, 7, 7));
    assert_eq!((node.act("start"), node.act("start"), node.monitor().code, node.probe()), (0, 0, 0, 0));
    let line = fs::read_to_string(format!("/proc/{}/cmdline", node.pid(&pid_file))).unwrap().replace('\0', " ");
    assert!(line.contains(" run --node n1 --run-root ") && line.contains(" --journal /var/log/understudy/"), "{line}");
    node.crash(node.pid(&pid_file));
    assert_eq!((node.monitor().code, node.probe()), (1, 7));
    assert_eq!((node.act("start"), node.act("stop"), node.act("stop"), node.monitor().code), (0, 0, 0, 7));
}

fn stuck() {
    let node = Node::new("evacuator").with("OCF_RESKEY_CRM_meta_on_node", "n1");
    assert_eq!(node.act("start"), 0);
    fs::write(node.path("behaviour/last-round-ms"), "61000").unwrap();
    let answer = node.monitor();
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("for 61 s: no cluster"), "{}", answer.reason());
    assert_eq!(node.probe(), 0);
    fs::write(node.path("behaviour/last-round-ms"), "59000").unwrap();
    assert_eq!((node.monitor().code, node.act("stop")), (0, 0));
}
