//! `ocf:understudy:monitor`.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::Test;
use crate::node::{Node, gone};

pub const TESTS: &[Test] = &[
    ("the monitor is started once, with what it is configured with, and stopped", life),
    ("a monitor that crashed or hangs is a failure here, and started anew", silent),
    ("a monitor without an address of this node is not started, and says which is missing", nowhere),
    ("a probe of an idle node says not running, and stop needs no parameters", idle),
];

const PRODUCTION: &str = "n1=127.0.0.1:7789 n2=127.0.0.2:7789";
const ROW: &str = "matrix = [{ name = 'ours', management = 'up', production = 'rack', verdict = 'alarm' }]";

fn node() -> Node {
    Node::new("monitor").with("OCF_RESKEY_CRM_meta_on_node", "n1").with("OCF_RESKEY_production", PRODUCTION)
}

fn pid(node: &Node) -> nix::unistd::Pid {
    node.pid(&node.path("run/.monitor/monitor.pid"))
}

fn life() {
    let node =
        node().with("OCF_RESKEY_racks", "n1=r1").with("OCF_RESKEY_matrix", ROW).with("OCF_RESKEY_health", "true");
    assert_eq!(node.act("validate-all"), 0);
    assert_eq!((node.act("start"), node.act("start"), node.monitor().code), (0, 0, 0));
    let told = node.told("run/.monitor/monitor.requests");
    assert!(told.starts_with(&format!("serve --node n1 --production {PRODUCTION} --racks n1=r1 --key ")), "{told}");
    assert!(
        told.contains(&format!("--interval-ms 1000 --missed 4 --restart-ms 60000 --matrix {ROW} --run-root ")),
        "{told}"
    );
    assert!(told.trim_end().ends_with("--health") && told.lines().count() == 1, "{told}");
    let process = pid(&node);
    assert_eq!((node.act("stop"), node.act("stop"), node.monitor().code), (0, 0, 7));
    assert!(gone(process));
}

fn silent() {
    let node = node();
    assert_eq!(node.act("start"), 0);
    node.crash(pid(&node));
    assert_eq!(node.monitor().code, 1);
    assert_eq!((node.act("stop"), node.act("start"), node.monitor().code), (0, 0, 0));
    let hung = pid(&node);
    kill(hung, Signal::SIGSTOP).unwrap();
    let began = Instant::now();
    let answer =
        node.act_with("monitor", &[("OCF_RESKEY_CRM_meta_interval", "10000"), ("OCF_RESKEY_CRM_meta_timeout", "3000")]);
    assert_eq!(answer.code, 1);
    assert!(
        answer.reason().contains("does not answer") && began.elapsed() < Duration::from_secs(4),
        "{}",
        answer.reason()
    );
    assert_eq!(node.act_with("stop", &[("OCF_RESKEY_CRM_meta_timeout", "8000")]).code, 0);
    assert!(gone(hung));
}

fn nowhere() {
    let answer = node().with("OCF_RESKEY_production", "n2=127.0.0.2:7789").act_with("start", &[]);
    assert_eq!((answer.code, answer.reason()), (2, "parameter production has no address for this node (n1)"));
    for (name, value) in [
        ("OCF_RESKEY_production", "n1=127.0.0.1"),
        ("OCF_RESKEY_racks", "r1"),
        ("OCF_RESKEY_matrix", "matrix = [{ name = 'x', management = 'down', verdict = 'evacuate' }]"),
    ] {
        assert_eq!(node().with(name, value).act("start"), 6, "{name}={value}");
    }
}

fn idle() {
    assert_eq!((node().probe(), node().act("stop")), (7, 0));
    assert_eq!(Node::new("monitor").act("stop"), 0);
    assert_eq!(node().act_with("monitor", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1")]).code, 5);
}
