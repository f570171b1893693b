//! Load sharing by priority: several machines on one node.

use std::time::Duration;

use understudy_protocol::control::{VmmRequest, VmmState, VmmStatus, call_once};
use understudy_protocol::layout::Layout;

use crate::Test;
use crate::node::{Answer, Node};

pub const TESTS: &[Test] = &[
    ("a machine of higher priority pauses a lower one, which is degraded and goes on when the other has gone", pause),
    ("who was paused for a machine that crashed goes on by its own monitor", crash),
    ("a machine that finds no room is started and waits", waits),
    ("a machine that somebody paused is not resumed, and takes no room", by_hand),
    ("a machine whose memory does not fit is not started", memory),
    ("a protected machine that is promoted pauses others, and waits itself as degraded promoted", promoted),
    ("a standby takes memory and no processor", standby),
    ("a cluster that does not know the degraded codes is told that all is well", old_cluster),
    ("machines that take no part are neither paused nor counted", off),
    ("a machine that cannot be paused does not keep the other from running, and is paused later", stubborn),
    ("a machine goes on that takes no part any more", changed),
];

const CIB: &str = "<cib><configuration><nodes><node id='1' uname='n1'/></nodes><resources/><constraints/></configuration><status/></cib>";

fn host() -> Node {
    Node::new("vmm")
        .in_a_cluster(Some(CIB))
        .with("OCF_RESKEY_load_sharing", "pause")
        .with("OCF_RESKEY_host_room", "n1=4/1500")
}

/// An action on one of the node's machines: its name, priority and vCPUs.
fn act(node: &Node, (name, priority, vcpus): (&str, &str, &str), action: &str, more: &[(&str, &str)]) -> Answer {
    let resource = format!("vm-{name}");
    let mut all = vec![
        ("OCF_RESKEY_name", name),
        ("OCF_RESOURCE_INSTANCE", resource.as_str()),
        ("OCF_RESKEY_priority", priority),
        ("OCF_RESKEY_vcpus", vcpus),
    ];
    if action == "monitor" {
        all.push(("OCF_RESKEY_CRM_meta_interval", "10000"));
    }
    all.extend(more);
    node.act_with(action, &all)
}

fn code(node: &Node, machine: (&str, &str, &str), action: &str) -> i32 {
    act(node, machine, action, &[]).code
}

fn layout(node: &Node, name: &str) -> Layout {
    Layout::new(node.path("run"), node.path("shm"), name)
}

fn state(node: &Node, name: &str) -> VmmState {
    let socket = layout(node, name).vmm_socket();
    call_once::<_, VmmStatus>(&socket, &VmmRequest::Status, Duration::from_secs(5)).unwrap().state
}

const LOW: (&str, &str, &str) = ("low", "0", "2");
const HIGH: (&str, &str, &str) = ("high", "9", "3");

fn pause() {
    let node = host();
    assert_eq!((code(&node, LOW, "start"), code(&node, LOW, "monitor")), (0, 0));
    assert_eq!(code(&node, HIGH, "start"), 0);
    assert_eq!((state(&node, "low"), state(&node, "high")), (VmmState::Paused, VmmState::Running));
    assert_eq!((code(&node, LOW, "monitor"), code(&node, HIGH, "monitor")), (190, 0));
    assert!(
        node.cluster_told().contains("attrd_updater --name understudy-paused-low --update high"),
        "{}",
        node.cluster_told()
    );
    assert_eq!(code(&node, HIGH, "stop"), 0);
    assert_eq!((state(&node, "low"), code(&node, LOW, "monitor")), (VmmState::Running, 0));
    assert!(
        node.cluster_told().contains("attrd_updater --name understudy-paused-low --delete"),
        "{}",
        node.cluster_told()
    );
    assert_eq!(code(&node, LOW, "stop"), 0);
    assert!(!layout(&node, "low").run_dir().join("claim").exists());
}

fn crash() {
    let node = host();
    assert_eq!((code(&node, LOW, "start"), code(&node, HIGH, "start")), (0, 0));
    assert_eq!(code(&node, LOW, "monitor"), 190);
    node.crash(node.pid(&layout(&node, "high").vmm_pid()));
    assert_eq!(code(&node, LOW, "monitor"), 0);
    assert_eq!(state(&node, "low"), VmmState::Running);
}

fn waits() {
    let node = host();
    assert_eq!((code(&node, HIGH, "start"), code(&node, LOW, "start")), (0, 0));
    assert_eq!((state(&node, "low"), state(&node, "high")), (VmmState::Paused, VmmState::Running));
    assert_eq!(code(&node, LOW, "monitor"), 190);
    // There is room for a small one nevertheless.
    let small = ("small", "0", "1");
    assert_eq!(act(&node, small, "start", &[("OCF_RESKEY_memory", "100")]).code, 0);
    assert_eq!(code(&node, small, "monitor"), 0);
}

fn by_hand() {
    let node = host();
    assert_eq!(code(&node, HIGH, "start"), 0);
    let socket = layout(&node, "high").vmm_socket();
    call_once::<_, ()>(&socket, &VmmRequest::Pause, Duration::from_secs(5)).unwrap();
    assert_eq!(code(&node, LOW, "start"), 0);
    assert_eq!((code(&node, LOW, "monitor"), code(&node, HIGH, "monitor")), (0, 0));
    assert_eq!(state(&node, "high"), VmmState::Paused);
}

fn memory() {
    let node = host();
    assert_eq!(act(&node, LOW, "start", &[("OCF_RESKEY_memory", "1000")]).code, 0);
    let refused = act(&node, HIGH, "start", &[("OCF_RESKEY_memory", "501")]);
    assert_eq!(refused.code, 2);
    assert_eq!(
        refused.reason(),
        "high needs 501 MiB, 1 more than n1 has left of its 1500 MiB for machines; paused machines keep their memory"
    );
    assert!(!layout(&node, "high").vmm_socket().exists());
    assert_eq!(state(&node, "low"), VmmState::Running, "nobody waits for a machine that is not there");
    assert_eq!(act(&node, HIGH, "start", &[("OCF_RESKEY_memory", "500")]).code, 0);
    // What was refused has left no claim.
    assert_eq!(code(&node, HIGH, "stop"), 0);
    assert_eq!(code(&node, LOW, "stop"), 0);
    assert_eq!(act(&node, HIGH, "start", &[("OCF_RESKEY_memory", "1500")]).code, 0);
}

fn promoted() {
    let node = host().in_a_clone();
    assert_eq!((code(&node, LOW, "start"), code(&node, LOW, "promote")), (0, 0));
    assert_eq!((code(&node, HIGH, "start"), code(&node, LOW, "monitor")), (0, 8));
    assert_eq!((code(&node, HIGH, "promote"), code(&node, LOW, "monitor")), (0, 191));
    assert_eq!((code(&node, HIGH, "demote"), code(&node, LOW, "monitor")), (0, 8));
    assert_eq!(state(&node, "high"), VmmState::Standby);
    // The other way round it is the one that is promoted.
    assert_eq!((code(&node, LOW, "demote"), code(&node, HIGH, "promote")), (0, 0));
    assert_eq!((code(&node, LOW, "promote"), code(&node, LOW, "monitor")), (0, 191));
}

fn standby() {
    let node = host().in_a_clone();
    let big = [("OCF_RESKEY_memory", "1000")];
    assert_eq!(act(&node, HIGH, "start", &big).code, 0);
    assert_eq!(act(&node, LOW, "start", &big).code, 2);
    assert_eq!((code(&node, LOW, "stop"), act(&node, LOW, "start", &[("OCF_RESKEY_memory", "400")]).code), (0, 0));
    assert_eq!((code(&node, LOW, "promote"), code(&node, LOW, "monitor")), (0, 8));
}

fn old_cluster() {
    let node = host().with("OCF_RESKEY_crm_feature_set", "3.0.14");
    assert_eq!((code(&node, LOW, "start"), code(&node, HIGH, "start")), (0, 0));
    assert_eq!((state(&node, "low"), code(&node, LOW, "monitor")), (VmmState::Paused, 0));
}

fn off() {
    let node = host();
    let alone = [("OCF_RESKEY_load_sharing", "off")];
    assert_eq!(act(&node, LOW, "start", &alone).code, 0);
    assert_eq!((code(&node, HIGH, "start"), state(&node, "low")), (0, VmmState::Running));
    assert!(!layout(&node, "low").run_dir().join("claim").exists());
    assert!(!node.told("run/low/vmm.requests").contains("pause"));
}

fn stubborn() {
    let node = host();
    node.behave("vmm-does-not-pause", "a checkpoint is being taken");
    assert_eq!((code(&node, LOW, "start"), code(&node, HIGH, "start")), (0, 0));
    assert_eq!((state(&node, "low"), code(&node, LOW, "monitor")), (VmmState::Running, 0));
    assert!(!layout(&node, "low").run_dir().join("paused-for").exists());
    // Somebody's monitor tries it again.
    node.behave_no_more("vmm-does-not-pause");
    assert_eq!((code(&node, HIGH, "monitor"), code(&node, LOW, "monitor")), (0, 190));
}

fn changed() {
    let node = host();
    assert_eq!((code(&node, LOW, "start"), code(&node, HIGH, "start")), (0, 0));
    assert_eq!(code(&node, LOW, "monitor"), 190);
    assert_eq!(act(&node, LOW, "reload-agent", &[("OCF_RESKEY_load_sharing", "off")]).code, 0);
    assert_eq!(state(&node, "low"), VmmState::Running);
    assert_eq!((code(&node, LOW, "reload-agent"), state(&node, "low")), (0, VmmState::Paused));
    // More important now than the other.
    let important = ("low", "10", "2");
    assert_eq!((code(&node, important, "reload-agent"), state(&node, "low")), (0, VmmState::Running));
    assert_eq!(state(&node, "high"), VmmState::Paused);
}
