//! `ocf:understudy:vmm`, action by action.

use std::fs;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::Test;
use crate::node::{Node, gone};

pub const TESTS: &[Test] = &[
    ("a standby is started, promoted, demoted and stopped, each twice", life),
    ("a plain primitive runs from start to stop and has no roles", primitive),
    ("a probe of an idle node says not running, whatever else is wrong", idle_probes),
    ("a probe says not installed where the programs are missing", probe_without_programs),
    ("a healthy monitor asks nobody but the machine", quiet_monitor),
    ("a crash while promoted is 9, after the own score is gone", crash_promoted),
    ("a crash as standby is 1, and not running to a probe", crash_standby),
    ("a VMM that does not answer is a failure, not silence", frozen_monitor),
    ("stop ends a VMM that ignores quit and SIGTERM", deaf_stop),
    ("stop ends a frozen VMM", frozen_stop),
    ("stop succeeds with no parameters and no programs", stop_nothing),
    ("stop finds a VMM whose pid file was lost", stop_without_pid_file),
    ("stop leaves nothing of the machine's memory", stop_removes_ram),
    ("start says which file is missing", missing_kernel),
    ("start says why the VMM did not come up, and leaves nothing", start_fails),
    ("start replaces a VMM that has been used up", start_replaces),
    ("promote runs from the image and stores its generation first", promote_image),
    ("promote counts on from the highest generation of all nodes", promote_generation),
    ("promote boots when there is no image anywhere", promote_cold),
    ("promote refuses to boot while another node holds an image", promote_refused),
    ("promote boots although another node holds an image, if the veto keeps that from running", promote_vetoed_image),
    ("a cold boot first stores that older images are of a past life", promote_cold_ends_the_past),
    ("promote does not run a machine whose generation cannot be stored", promote_without_cib),
    ("promote takes over without a replicator process", promote_offline),
    ("promote after a recovery in place finds its replicator still sending", promote_with_sender),
    ("promote of what does not run is 7", promote_stopped),
    ("demote hands over when another node is promoted", demote_hands_over),
    ("demote to nobody shuts the guest down and says so to the cluster", demote_shuts_down),
    ("a hand-over that fails under protection leaves the standby its last checkpoint", demote_without_last_checkpoint),
    ("a guest that ignores the power button is switched off in time", stubborn_guest),
    ("a guest that hangs fails monitor if the cluster is to restart it, and is not asked to shut down", hung_guest),
    ("a promotable clone is not to be restarted for a guest that hangs", hung_guest_of_a_clone),
    ("a fenced machine is 9 and loses its score", fenced),
    ("degraded codes are given only if asked for", degraded),
    ("start advertises the replica that is there", start_score),
    ("the hook sets a standby's score, keeps a running node's, and leaves an absent one to its agent", hook_scores),
];

const CLONE: fn() -> Node = || Node::new("vmm").in_a_clone();

fn cib(generations: &[(&str, u64)], scores: &[(&str, &str)]) -> String {
    let node = |(name, g): &(&str, u64)| {
        format!(
            "<node id='{name}' uname='{name}'><instance_attributes id='i{name}'><nvpair id='g{name}' name='understudy-generation-m1' value='{g}'/></instance_attributes></node>"
        )
    };
    let state = |(name, s): &(&str, &str)| {
        format!(
            "<node_state uname='{name}'><transient_attributes><instance_attributes><nvpair name='master-vm-m1' value='{s}'/></instance_attributes></transient_attributes></node_state>"
        )
    };
    let nodes: String = generations.iter().map(node).collect();
    let states: String = scores.iter().map(state).collect();
    format!(
        "<cib><configuration><nodes>{nodes}</nodes><resources/><constraints/></configuration><status>{states}</status></cib>"
    )
}

fn life() {
    let node = CLONE();
    assert_eq!(node.act("validate-all"), 0);
    assert_eq!(node.probe(), 7);
    assert_eq!((node.act("start"), node.act("start")), (0, 0));
    assert_eq!((node.monitor().code, node.probe()), (0, 0));
    assert_eq!((node.act("demote"), node.monitor().code), (0, 0));
    assert_eq!((node.act("promote"), node.act("promote")), (0, 0));
    assert_eq!((node.monitor().code, node.probe()), (8, 8));
    assert!(node.layout().promoted_mark().exists());
    let first = node.vmm_pid();
    assert_eq!((node.act("demote"), node.act("demote")), (0, 0));
    assert_eq!(node.monitor().code, 0);
    assert!(gone(first), "the machine's process is replaced");
    assert_ne!(node.vmm_pid(), first);
    assert!(!node.layout().promoted_mark().exists());
    let second = node.vmm_pid();
    assert_eq!((node.act("stop"), node.act("stop")), (0, 0));
    assert!(gone(second));
    assert_eq!((node.monitor().code, node.probe()), (7, 7));
    assert_eq!(node.act("notify"), 0);
    assert_eq!((node.act("migrate_to"), node.act("migrate_from"), node.act("reload")), (3, 3, 3));
}

fn primitive() {
    let node = Node::new("vmm");
    assert_eq!(node.act("start"), 0);
    assert_eq!(node.monitor().code, 0);
    assert_eq!((node.act("promote"), node.act("demote")), (3, 3));
    assert_eq!((node.act("migrate_to"), node.act("migrate_from")), (2, 0), "no target; it runs here already");
    assert_eq!(node.act("stop"), 0);
    assert!(node.vmm_told().starts_with("{\"cmd\":\"power-button\"}"), "{}", node.vmm_told());
    assert_eq!(node.monitor().code, 7);
}

fn idle_probes() {
    for (name, value) in [
        ("OCF_RESKEY_name", ""),
        ("OCF_RESKEY_name", "../x"),
        ("OCF_RESKEY_kernel", "/nonexistent"),
        ("OCF_RESKEY_memory", "plenty"),
        ("OCF_RESKEY_mode", "sideways"),
    ] {
        assert_eq!(CLONE().with(name, value).probe(), 7, "{name}={value}");
    }
    let bad = CLONE().with("OCF_RESKEY_memory", "plenty");
    let answer = bad.act_with("start", &[]);
    assert_eq!((answer.code, answer.reason()), (6, "parameter memory is \"plenty\", which is not a whole number"));
    assert_eq!(bad.act("stop"), 0);
}

fn probe_without_programs() {
    let node = CLONE();
    let answer = node.act_with("monitor", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1")]);
    assert_eq!(answer.code, 5);
    assert!(answer.reason().contains("understudy-vmm is not installed"), "{}", answer.reason());
    assert_eq!(CLONE().with("UNDERSTUDY_KVM_DEVICE", "/nonexistent").probe(), 5);
    // What runs is reported even so.
    assert_eq!(node.act("start"), 0);
    assert_eq!(node.act_with("monitor", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1")]).code, 0);
    assert_eq!(node.act_with("stop", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1")]).code, 0);
}

fn quiet_monitor() {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    let before = node.cluster_told();
    let started = Instant::now();
    assert_eq!(node.monitor().code, 8);
    println!("a monitor took {:?}", started.elapsed());
    assert_eq!(node.cluster_told(), before);
}

fn crash_promoted() {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    node.crash(node.vmm_pid());
    let answer = node.monitor();
    assert_eq!(answer.code, 9);
    assert!(answer.reason().contains("has gone"), "{}", answer.reason());
    assert!(node.cluster_told().ends_with("crm_attribute --promotion=vm-m1 -l reboot -D\n"), "{}", node.cluster_told());
    assert_eq!(node.probe(), 9);
    assert_eq!((node.act("demote"), node.monitor().code), (0, 0));
    assert_eq!(node.act("stop"), 0);
}

fn crash_standby() {
    let node = CLONE();
    assert_eq!(node.act("start"), 0);
    node.crash(node.vmm_pid());
    assert_eq!((node.monitor().code, node.probe()), (1, 7));
    assert_eq!((node.act("start"), node.monitor().code), (0, 0));
}

fn frozen_monitor() {
    let node = CLONE().with("OCF_RESKEY_CRM_meta_timeout", "2000");
    assert_eq!(node.act("start"), 0);
    kill(node.vmm_pid(), Signal::SIGSTOP).unwrap();
    let started = Instant::now();
    let answer = node.monitor();
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("does not answer"), "{}", answer.reason());
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}: the agent ends before the cluster kills it",
        started.elapsed()
    );
    kill(node.vmm_pid(), Signal::SIGCONT).unwrap();
    assert_eq!(node.monitor().code, 0);
}

fn deaf_stop() {
    let node = CLONE();
    node.behave("ignores-quit", "");
    node.behave("ignores-sigterm", "");
    assert_eq!(node.act("start"), 0);
    let pid = node.vmm_pid();
    let answer = node.act_with("stop", &[("OCF_RESKEY_CRM_meta_timeout", "4000")]);
    assert_eq!(answer.code, 0);
    assert!(gone(pid));
    assert_eq!(node.monitor().code, 7);
}

fn frozen_stop() {
    let node = CLONE();
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    let pid = node.vmm_pid();
    kill(pid, Signal::SIGSTOP).unwrap();
    let started = Instant::now();
    assert_eq!(node.act_with("stop", &[("OCF_RESKEY_CRM_meta_timeout", "6000")]).code, 0);
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    assert!(gone(pid));
    assert_eq!(node.monitor().code, 7);
}

fn stop_nothing() {
    let node = Node::new("vmm").with("OCF_RESKEY_name", "").with("OCF_RESKEY_kernel", "");
    assert_eq!(node.act_with("stop", &[("OCF_TESTER_FAIL_HAVE_BINARY", "1"), ("PATH", "")]).code, 0);
}

fn stop_without_pid_file() {
    let node = CLONE();
    assert_eq!(node.act("start"), 0);
    let pid = node.vmm_pid();
    fs::remove_file(node.layout().vmm_pid()).unwrap();
    node.behave("ignores-quit", "");
    assert_eq!(node.act("stop"), 0);
    assert!(gone(pid));
}

fn stop_removes_ram() {
    let node = CLONE();
    assert_eq!(node.act("start"), 0);
    assert!(node.layout().ram().exists());
    assert_eq!(node.act("stop"), 0);
    assert!(!node.layout().ram().exists());
    assert!(!node.layout().vmm_pid().exists() && !node.layout().vmm_socket().exists());
}

fn missing_kernel() {
    let answer = CLONE().with("OCF_RESKEY_kernel", "/nonexistent/bzImage").act_with("start", &[]);
    assert_eq!(answer.code, 2);
    assert!(answer.reason().contains("/nonexistent/bzImage"), "{}", answer.reason());
    let node = CLONE().with("OCF_RESKEY_kernel", "/nonexistent/bzImage");
    assert_eq!(node.act("validate-all"), 0, "level 0 does not look at the node");
    assert_eq!(node.act_with("validate-all", &[("OCF_CHECK_LEVEL", "10")]).code, 2);
}

fn start_fails() {
    let node = CLONE();
    node.behave("vmm-dies", "the kernel image is not a bzImage");
    let answer = node.act_with("start", &[]);
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("the kernel image is not a bzImage"), "{}", answer.reason());
    assert_eq!((node.probe(), node.monitor().code), (7, 7));
}

fn start_replaces() {
    for state in ["handed-over", "shut-down", "fenced"] {
        let node = CLONE();
        assert_eq!(node.act("start"), 0);
        let pid = node.vmm_pid();
        node.behave("vmm-state", state);
        assert_eq!(node.act("promote"), 1, "{state}");
        // The new one answers for itself again; here all fakes share the behaviour, so only the process can tell.
        assert_eq!(node.act("start"), 0);
        assert!(gone(pid), "{state}");
    }
}

fn promote_image() {
    let node = CLONE().in_a_cluster(Some(&cib(&[("n2", 3)], &[("n1", "10000")])));
    node.behave("image", r#"{"epoch":41,"generation":3,"state_file":"/shm/state"}"#);
    assert_eq!(node.act("start"), 0);
    assert_eq!(node.act_as("replicator", "start", &[("OCF_RESKEY_peers", "n1=127.0.0.1:1")]).code, 0);
    assert_eq!(node.act("promote"), 0);
    assert!(node.replicator_told().contains(r#"{"cmd":"take-over","generation":4}"#), "{}", node.replicator_told());
    let told = node.vmm_told();
    for part in [r#""generation":4"#, r#""kind":"image""#, r#""epoch":41"#, r#""state_file":"/shm/state""#] {
        assert!(told.contains(part), "{told}");
    }
    let calls = node.cluster_told();
    let stored = calls.find("--node n1 --lifetime forever --name understudy-generation-m1 --update 4").unwrap();
    let scored = calls.find("--promotion=vm-m1 -l reboot -v 10001").unwrap();
    assert!(stored < scored, "{calls}");
}

fn promote_generation() {
    let node = CLONE().in_a_cluster(Some(&cib(&[("n1", 7), ("n2", 12)], &[])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    assert!(node.vmm_told().contains(r#""generation":13"#), "{}", node.vmm_told());
    assert_eq!(fs::read_to_string(node.path("run/m1/generation")).unwrap(), "13\n");
}

fn promote_cold() {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[("n2", "5")])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    assert!(node.vmm_told().contains(r#""from":{"kind":"cold-boot"}"#), "{}", node.vmm_told());
    // Without any cluster the generations are counted in the run directory.
    let alone = CLONE();
    assert_eq!((alone.act("start"), alone.act("promote"), alone.act("demote"), alone.act("promote")), (0, 0, 0, 0));
    let told = alone.vmm_told();
    assert!(told.contains(r#""generation":1"#) && told.contains(r#""generation":2"#), "{told}");
}

fn promote_refused() {
    let node = CLONE().in_a_cluster(Some(&cib(&[("n2", 3)], &[("n1", "5"), ("n2", "10000")])));
    assert_eq!(node.act("start"), 0);
    let answer = node.act_with("promote", &[]);
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("node n2 holds an image"), "{}", answer.reason());
    assert!(!node.vmm_told().contains("promote"));
    assert!(node.cluster_told().ends_with("-l reboot -D\n"), "{}", node.cluster_told());
    assert_eq!(node.monitor().code, 0);
}

fn promote_vetoed_image() {
    // This node had lost its standby, and then its power: what the standby holds may lack what has left the machine since.
    let veto = "<rsc_location id='understudy-veto-m1' rsc='vm-m1-clone'><rule id='r' role='Promoted' score='-INFINITY'>\
                <expression id='e' attribute='#uname' operation='ne' value='n1'/></rule></rsc_location>";
    let cib = cib(&[("n1", 3)], &[("n1", "5"), ("n2", "1000")])
        .replace("<constraints/>", &format!("<constraints>{veto}</constraints>"));
    let node = CLONE().in_a_cluster(Some(&cib));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    assert!(node.vmm_told().contains(r#""from":{"kind":"cold-boot"}"#), "{}", node.vmm_told());
    let other = CLONE().in_a_cluster(Some(&cib.replace("value='n1'/></rule>", "value='n3'/></rule>")));
    assert_eq!((other.act("start"), other.act("promote")), (0, 1), "another node's veto says nothing of n2's image");
}

fn promote_cold_ends_the_past() {
    let node = CLONE().in_a_cluster(Some(&cib(&[("n2", 3)], &[("n2", "5")])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    let calls = node.cluster_told();
    let ended = calls.find("--node n1 --lifetime forever --name understudy-ended-m1 --update 3").expect(&calls);
    assert!(ended < calls.find("--promotion=vm-m1 -l reboot -v 10001").unwrap(), "{calls}");
    // The first boot ever has no past, and a takeover goes on with it.
    let first = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    assert_eq!((first.act("start"), first.act("promote")), (0, 0));
    assert!(!first.cluster_told().contains("understudy-ended-m1"), "{}", first.cluster_told());
}

fn promote_without_cib() {
    let node = CLONE().in_a_cluster(None);
    assert_eq!(node.act("start"), 0);
    let answer = node.act_with("promote", &[]);
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("Could not connect to the CIB"), "{}", answer.reason());
    assert!(!node.vmm_told().contains("promote"));
}

fn promote_offline() {
    let node = CLONE();
    node.behave("image", r#"{"epoch":5,"generation":0,"state_file":"/shm/state"}"#);
    assert_eq!(node.act("start"), 0);
    fs::create_dir_all(node.layout().image_dir()).unwrap();
    // Somebody listens and never answers, and it is not a replicator.
    let _mute = UnixListener::bind(node.layout().replicator_socket()).unwrap();
    node.behave("image", r#"{"epoch":5,"generation":9,"state_file":"/shm/state"}"#);
    assert_eq!(node.act_with("promote", &[("OCF_RESKEY_CRM_meta_timeout", "8000")]).code, 0);
    assert!(
        node.replicator_told().contains("take-over --offline --machine m1 --generation 1"),
        "{}",
        node.replicator_told()
    );
    assert!(node.vmm_told().contains(r#""kind":"image""#), "{}", node.vmm_told());
}

fn promote_with_sender() {
    let node = primary();
    node.crash(node.vmm_pid());
    assert_eq!((node.act("demote"), node.act("stop"), node.act("start"), node.act("promote")), (0, 0, 0, 0));
    let told = node.replicator_told();
    let lines: Vec<&str> = told.lines().collect();
    let last: Vec<_> = lines.iter().rev().take(3).rev().copied().collect();
    assert_eq!(
        last,
        [r#"{"cmd":"demote"}"#, r#"{"cmd":"take-over","generation":2}"#, r#"{"cmd":"promote"}"#],
        "{told}"
    );
}

fn promote_stopped() {
    assert_eq!(CLONE().act("promote"), 7);
}

const TO_N2: [(&str, &str); 2] =
    [("OCF_RESKEY_CRM_meta_notify_promote_resource", "vm-m1:1"), ("OCF_RESKEY_CRM_meta_notify_promote_uname", "n2")];
const TO_NOBODY: [(&str, &str); 2] =
    [("OCF_RESKEY_CRM_meta_notify_demote_resource", "vm-m1:0"), ("OCF_RESKEY_CRM_meta_notify_demote_uname", "n1")];

/// A node that runs the machine, with a replicator.
fn primary() -> Node {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    let peers = [("OCF_RESKEY_peers", "n1=127.0.0.1:1 n2=127.0.0.1:2")];
    assert_eq!(node.act_as("replicator", "start", &peers).code, 0);
    assert_eq!(node.act_as("replicator", "promote", &peers).code, 0);
    node
}

fn demote_hands_over() {
    let node = primary();
    let pid = node.vmm_pid();
    assert_eq!(node.act_with("demote", &TO_N2).code, 0);
    assert!(node.replicator_told().contains("hand-over"), "{}", node.replicator_told());
    assert!(!node.vmm_told().contains("power-button"), "{}", node.vmm_told());
    assert!(gone(pid));
    assert_eq!(node.monitor().code, 0);
    assert!(node.cluster_told().trim_end().ends_with("--promotion=vm-m1 -l reboot -v 5"), "{}", node.cluster_told());
    assert!(!node.cluster_told().contains("understudy-ended"));
}

fn demote_shuts_down() {
    let node = primary();
    assert_eq!(node.act_with("demote", &TO_NOBODY).code, 0);
    assert!(!node.replicator_told().contains("hand-over"), "{}", node.replicator_told());
    assert!(node.vmm_told().contains("power-button"), "{}", node.vmm_told());
    assert!(node.cluster_told().contains("--name understudy-ended-m1 --update 1"), "{}", node.cluster_told());
    assert!(node.cluster_told().contains("--delete --scope constraints"), "{}", node.cluster_told());
    assert_eq!(node.monitor().code, 0);
}

fn demote_without_last_checkpoint() {
    let node = primary();
    node.behave("protected", "");
    node.behave("no-hand-over", "the standby does not answer");
    assert_eq!(node.act_with("demote", &TO_N2).code, 0);
    assert!(!node.vmm_told().contains("power-button"), "{}", node.vmm_told());
    assert!(!node.cluster_told().contains("understudy-ended"));
    let node = primary();
    node.behave("no-hand-over", "the standby does not answer");
    assert_eq!(node.act_with("demote", &TO_N2).code, 0);
    assert!(node.vmm_told().contains("power-button"), "unprotected: {}", node.vmm_told());
}

fn stubborn_guest() {
    let node = Node::new("vmm").with("OCF_RESKEY_CRM_meta_timeout", "4000");
    node.behave("guest-ignores-power-button", "");
    assert_eq!(node.act("start"), 0);
    let pid = node.vmm_pid();
    let started = Instant::now();
    assert_eq!(node.act("stop"), 0);
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert!(gone(pid));
    let off = Node::new("vmm").with("OCF_RESKEY_shutdown_mode", "off");
    assert_eq!((off.act("start"), off.act("stop")), (0, 0));
    assert!(!off.vmm_told().contains("power-button"));
}

fn hung_guest() {
    let node = Node::new("vmm").with("OCF_RESKEY_watchdog", "i6300esb");
    node.behave("guest-ignores-power-button", "");
    assert_eq!(node.act("start"), 0);
    let restart = [("OCF_RESKEY_watchdog_action", "restart"), ("OCF_RESKEY_CRM_meta_interval", "10000")];
    for (state, code) in [("not-armed", 0), ("fed", 0), ("expired", 1)] {
        node.behave("watchdog", state);
        let answer = node.act_with("monitor", &restart);
        assert_eq!((answer.code, node.monitor().code), (code, 0), "{state}");
        assert!(code == 0 || answer.reason().contains("not fed its watchdog for 47 s"), "{}", answer.reason());
    }
    assert_eq!(node.act("stop"), 0);
    assert!(!node.vmm_told().contains("power-button"), "{}", node.vmm_told());
}

fn hung_guest_of_a_clone() {
    let node = CLONE().with("OCF_RESKEY_watchdog", "i6300esb");
    let answer = node.act_with("start", &[("OCF_RESKEY_watchdog_action", "restart")]);
    assert_eq!(answer.code, 2);
    assert!(answer.reason().contains("use reset"), "{}", answer.reason());
    assert_eq!(node.act("stop"), 0);
    assert_eq!((node.act("start"), node.act("promote")), (0, 0));
    node.behave("watchdog", "expired");
    assert_eq!(node.monitor().code, 8);
}

fn fenced() {
    let node = primary();
    node.behave("vmm-state", "fenced");
    let answer = node.monitor();
    assert_eq!(answer.code, 9);
    assert!(answer.reason().contains("runs elsewhere"), "{}", answer.reason());
    assert!(node.cluster_told().ends_with("-l reboot -D\n"), "{}", node.cluster_told());
    node.behave_no_more("vmm-state");
}

fn degraded() {
    let node = primary();
    node.behave("vmm-state", "paused");
    let asked = [("OCF_RESKEY_report_degraded", "true"), ("OCF_RESKEY_CRM_meta_interval", "10000")];
    assert_eq!((node.monitor().code, node.act_with("monitor", &asked).code), (8, 191));
    node.behave("vmm-state", "running");
    let soon = [asked[0], asked[1], ("OCF_RESKEY_unprotected_after", "0")];
    assert_eq!((node.act_with("monitor", &asked).code, node.act_with("monitor", &soon).code), (8, 191));
    node.behave("protected", "");
    assert_eq!(node.act_with("monitor", &soon).code, 8);
}

fn start_score() {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    assert_eq!(node.act("start"), 0);
    assert!(node.cluster_told().ends_with("--promotion=vm-m1 -l reboot -v 5\n"), "{}", node.cluster_told());
    let peers = [("OCF_RESKEY_peers", "n1=127.0.0.1:1")];
    assert_eq!(node.act_as("replicator", "start", &peers).code, 0);
    node.behave("replica", "UpToDate");
    assert_eq!(node.act("start"), 0);
    assert!(node.cluster_told().ends_with("-v 1000\n"), "{}", node.cluster_told());
    node.behave("connected", "");
    assert_eq!(node.act("start"), 0);
    assert!(node.cluster_told().ends_with("-v 10000\n"), "{}", node.cluster_told());
    node.behave("replica", "Outdated");
    assert_eq!(node.act("start"), 0);
    assert!(node.cluster_told().ends_with("-l reboot -D\n"), "{}", node.cluster_told());
}

fn hook_scores() {
    let node = CLONE().in_a_cluster(Some(&cib(&[], &[])));
    let last = || node.cluster_told().lines().last().unwrap_or_default().to_owned();
    let hook = |state: &str| assert_eq!(node.hook(&["replica-state", "--machine", "m1", "--state", state]), 0);
    hook("uptodate");
    assert_eq!(last(), "", "nothing runs here");
    hook("outdated");
    assert!(last().ends_with("--promotion=vm-m1 -l reboot -D"), "{}", last());
    assert_eq!(node.act("start"), 0);
    hook("uptodate");
    assert!(last().ends_with("-v 10000"), "{}", last());
    // A takeover: the agent has left its mark, the machine does not run yet.
    fs::write(node.layout().promoted_mark(), "1").unwrap();
    hook("inconsistent");
    assert!(last().ends_with("-v 10001"), "{}", last());
    assert_eq!(node.act("promote"), 0);
    hook("inconsistent");
    assert!(last().ends_with("-v 10001"), "{}", last());
    assert_eq!(node.act_with("demote", &TO_N2).code, 0);
    hook("disconnected");
    assert!(last().ends_with("-v 1000"), "{}", last());
}
