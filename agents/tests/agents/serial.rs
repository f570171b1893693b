//! `ocf:understudy:serial`.

use crate::Test;
use crate::node::{Node, gone};

pub const TESTS: &[Test] = &[
    ("a line is started and stopped, each twice, and has no roles", life),
    ("a crash is 1, and not running to a probe", crash),
    ("two lines of one machine do not meet", two_lines),
    ("wrong parameters stop nothing from being stopped", wrong),
];

fn node() -> Node {
    Node::new("serial")
        .with("OCF_RESKEY_device", "com1")
        .with("OCF_RESKEY_line", "pty:/run/line")
        .with("OCF_RESKEY_listen", "127.0.0.1:7800")
}

fn life() {
    let node = node();
    assert_eq!((node.act("validate-all"), node.probe()), (0, 7));
    assert_eq!((node.act("start"), node.act("start"), node.monitor().code), (0, 0, 0));
    assert_eq!((node.act("promote"), node.act("demote"), node.act("notify")), (3, 3, 3));
    let pid = node.pid(&node.layout().serial_pid("com1"));
    assert_eq!((node.act("stop"), node.act("stop"), node.monitor().code), (0, 0, 7));
    assert!(gone(pid));
}

fn crash() {
    let node = node();
    assert_eq!(node.act("start"), 0);
    node.crash(node.pid(&node.layout().serial_pid("com1")));
    assert_eq!((node.monitor().code, node.probe()), (1, 7));
    assert_eq!((node.act("start"), node.monitor().code), (0, 0));
}

fn two_lines() {
    let node = node();
    let second = [("OCF_RESKEY_device", "com2"), ("OCF_RESKEY_listen", "127.0.0.1:7801")];
    assert_eq!((node.act("start"), node.act_with("start", &second).code), (0, 0));
    assert_eq!(node.act("stop"), 0);
    assert_eq!((node.monitor().code, node.act_with("monitor", &second).code), (7, 0));
    assert_eq!(node.act_with("stop", &second).code, 0);
}

fn wrong() {
    let bad = node().with("OCF_RESKEY_line", "usb:1");
    let answer = bad.act_with("start", &[]);
    assert_eq!(answer.code, 6);
    assert!(answer.reason().contains("tcp-listen:"), "{}", answer.reason());
    assert_eq!((bad.probe(), bad.act("stop")), (7, 0));
    assert_eq!(bad.with("OCF_RESKEY_device", "").act("stop"), 0);
}
