//! `ocf:understudy:replicator`.

use nix::sys::signal::{Signal, kill};

use crate::Test;
use crate::node::{Node, gone};

pub const TESTS: &[Test] = &[
    ("it is started, promoted, demoted and stopped, each twice", life),
    ("a crash is 9 as sender, 1 as receiver, not running to a probe", crash),
    ("a frozen one is ended by stop", frozen),
    ("under Pacemaker it is given the hook, with the resource whose score it keeps", hook),
    ("start says that the key is missing", no_key),
    ("demote of one that is gone brings a receiver", demote_gone),
];

fn node() -> Node {
    Node::new("replicator")
        .in_a_clone()
        .with("OCF_RESKEY_peers", "n1=127.0.0.1:7790 n2=127.0.0.1:7791")
        .with("OCF_RESKEY_CRM_meta_on_node", "n1")
}

fn life() {
    let node = node();
    assert_eq!((node.act("validate-all"), node.probe(), node.monitor().code), (0, 7, 7));
    assert_eq!((node.act("start"), node.act("start"), node.monitor().code), (0, 0, 0));
    assert_eq!((node.act("promote"), node.act("promote"), node.monitor().code), (0, 0, 8));
    assert_eq!((node.act("demote"), node.act("demote"), node.monitor().code), (0, 0, 0));
    let pid = node.pid(&node.layout().replicator_pid());
    assert_eq!((node.act("stop"), node.act("stop"), node.monitor().code), (0, 0, 7));
    assert!(gone(pid));
    let missing = node.act_with("monitor", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1")]);
    assert_eq!(missing.code, 5);
}

fn crash() {
    let node = node();
    assert_eq!(node.act("start"), 0);
    node.crash(node.pid(&node.layout().replicator_pid()));
    assert_eq!((node.monitor().code, node.probe()), (1, 7));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    node.crash(node.pid(&node.layout().replicator_pid()));
    assert_eq!((node.monitor().code, node.probe()), (9, 9));
    assert_eq!((node.act("stop"), node.monitor().code), (0, 7));
}

fn frozen() {
    let node = node().with("OCF_RESKEY_CRM_meta_timeout", "6000");
    assert_eq!(node.act("start"), 0);
    let pid = node.pid(&node.layout().replicator_pid());
    kill(pid, Signal::SIGSTOP).unwrap();
    assert_eq!(node.act("stop"), 0);
    assert!(gone(pid));
}

fn hook() {
    let node = node().in_a_cluster(None).with("OCF_RESKEY_vmm_resource", "vm-m1");
    assert_eq!(node.act("start"), 0);
    let pid = node.pid(&node.layout().replicator_pid());
    let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().replace('\0', " ");
    let own = node.path("libexec/understudy-ocf");
    assert!(line.contains(&format!("--hook {} hook --run-root ", own.display())), "{line}");
    assert!(line.trim_end().ends_with("--vmm-resource vm-m1"), "{line}");
}

fn no_key() {
    let answer = node().with("OCF_RESKEY_key", "/nonexistent/key").act_with("start", &[]);
    assert_eq!(answer.code, 2);
    assert!(answer.reason().contains("/nonexistent/key"), "{}", answer.reason());
}

fn demote_gone() {
    let node = node();
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    node.crash(node.pid(&node.layout().replicator_pid()));
    assert_eq!((node.act("demote"), node.monitor().code), (0, 0));
}
