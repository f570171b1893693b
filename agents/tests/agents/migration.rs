//! Live migration of a plain primitive, action by action, and `ocf:understudy:migrations`.

use std::fs;
use std::path::Path;

use crate::Test;
use crate::node::{Answer, Node, gone};

pub const TESTS: &[Test] = &[
    ("migrate_to succeeds if and only if the machine's VMM says that it was handed over", judge),
    ("migrate_to ends the migration in time and leaves the machine where it is", in_time),
    ("migrate_to says what is missing: a target's address, a running machine", missing),
    ("the target counts on from the source's generation", generation_of_the_source),
    ("migrate_from runs what was handed over, as the next generation, with its gate open", arrives),
    ("migrate_from of nothing, or of what was not handed over, fails and runs nothing", nothing_arrived),
    ("a probe of a node that a machine comes to, or has left, says not running", probes),
    ("a plain start discards what was received and boots under a new generation", plain_start),
    ("stop leaves nothing of what was received", stop_discards),
    ("a machine that arrives is prepared from the cluster's configuration, and forgotten again", prepared),
    ("what is not configured for it is not prepared", not_prepared),
    ("forgetting spares a machine that runs by now, and a VMM of somebody else", spared),
    ("the process that receives migrations is started, watched and stopped", listener),
];

const TO: [(&str, &str); 2] =
    [("OCF_RESKEY_CRM_meta_migrate_source", "n1"), ("OCF_RESKEY_CRM_meta_migrate_target", "n2")];
const FROM: [(&str, &str); 2] =
    [("OCF_RESKEY_CRM_meta_migrate_source", "n2"), ("OCF_RESKEY_CRM_meta_migrate_target", "n1")];
const IMAGE: &str = r#"{"epoch":41,"generation":3,"state_file":"/shm/state"}"#;

/// A CIB with the machine as a primitive whose files are where `node` has them.
fn cib(node: &Node, generation: u64, meta: &str, clone: bool) -> String {
    let path = |name: &str| node.path(name).display().to_string();
    let pairs =
        [("name", "m1".to_owned()), ("kernel", path("kernel")), ("run_root", path("run")), ("shm_root", path("shm"))];
    let pairs: String = pairs.iter().map(|(k, v)| format!("<nvpair id='p{k}' name='{k}' value='{v}'/>")).collect();
    let primitive = format!(
        "<primitive id='vm-m1' class='ocf' provider='understudy' type='vmm'><instance_attributes id='i'>{pairs}</instance_attributes>\
         <meta_attributes id='m'>{meta}</meta_attributes></primitive>"
    );
    let resource = if clone { format!("<clone id='c'>{primitive}</clone>") } else { primitive };
    format!(
        "<cib><configuration><nodes><node id='2' uname='n2'><instance_attributes id='x'>\
         <nvpair id='y' name='understudy-generation-m1' value='{generation}'/></instance_attributes></node></nodes>\
         <resources>{resource}</resources><constraints/></configuration><status/></cib>"
    )
}

const ALLOWED: &str = "<nvpair id='q' name='allow-migrate' value='true'/>";

fn node() -> Node {
    Node::new("vmm")
        .with("OCF_RESKEY_migration_peers", "n1=127.0.0.1:7799 n2=127.0.0.1:7798")
        .with("OCF_RESKEY_mode", "primitive")
}

fn in_cluster(generation: u64) -> Node {
    let node = node();
    let text = cib(&node, generation, ALLOWED, false);
    node.in_a_cluster(Some(&text))
}

fn to(node: &Node) -> Answer {
    let key = node.path("key").display().to_string();
    node.act_with("migrate_to", &[&TO[..], &[("OCF_RESKEY_migration_key", key.as_str())]].concat())
}

fn judge() {
    // (what the migration does, exit code): a finished migration whose sender was killed afterwards is a success.
    for (migration, code) in [("done", 0), ("done, and then it fails", 0), ("n2: there is no kernel", 1)] {
        let node = node();
        node.behave("migration", migration);
        assert_eq!(node.act("start"), 0);
        let answer = to(&node);
        assert_eq!(answer.code, code, "{migration}: {}", answer.reason());
        if code == 1 {
            assert!(answer.reason().ends_with("was not migrated to n2: n2: there is no kernel"), "{}", answer.reason());
            assert_eq!(node.monitor().code, 0, "it runs on");
        } else {
            assert_eq!((node.monitor().code, node.probe()), (7, 7), "it runs here no more");
            assert_eq!(to(&node).code, 0, "asked again");
        }
        let told = node.replicator_told();
        assert!(told.starts_with("migrate --json --until-stdin-closes --machine m1 --node "), "{told}");
        assert!(told.contains(" --to n2=127.0.0.1:7798 --key ") && told.contains(" --max-pause-ms 500 "), "{told}");
    }
}

fn in_time() {
    let node = node().with("OCF_RESKEY_CRM_meta_timeout", "6000");
    node.behave("migration", "hangs");
    assert_eq!(node.act("start"), 0);
    let answer = to(&node);
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("it was cancelled"), "{}", answer.reason());
    assert_eq!(node.monitor().code, 0);
}

fn missing() {
    let stopped = node();
    assert!(to(&stopped).reason().contains("does not run here"));
    let unset = Node::new("vmm");
    assert_eq!(unset.act("start"), 0);
    let answer = to(&unset);
    assert_eq!(answer.code, 2);
    assert!(answer.reason().contains("migration_peers"), "{}", answer.reason());
    let elsewhere = node().with("OCF_RESKEY_migration_peers", "n1=127.0.0.1:7799");
    assert_eq!(elsewhere.act("start"), 0);
    assert!(to(&elsewhere).reason().contains("no address for n2"));
    let paused = node();
    assert_eq!(paused.act("start"), 0);
    paused.behave("vmm-state", "paused");
    assert!(to(&paused).reason().contains("only a machine that runs"));
    assert_eq!(Node::new("vmm").in_a_clone().act_with("migrate_to", &TO).code, 3);
}

fn generation_of_the_source() {
    let node = in_cluster(0);
    node.behave("migration", "done");
    assert_eq!(node.act("start"), 0);
    assert_eq!(to(&node).code, 0);
    let told = node.cluster_told();
    let stored = "crm_attribute --node n1 --lifetime forever --name understudy-generation-m1 --update 1";
    assert_eq!(told.matches(stored).count(), 2, "by start, and, the CIB not having it, by migrate_to: {told}");
}

/// The VMM that a migration's hook would have started.
fn standby(node: &Node) {
    let (code, said) = node.migration_hook(&["prepare-migration", "--from", "n2"]);
    assert_eq!(code, 0, "{said}");
    assert!(node.layout().incoming_mark().exists());
}

fn arrives() {
    let node = in_cluster(3);
    node.behave("image", IMAGE);
    standby(&node);
    let answer = node.act_with("migrate_from", &FROM);
    assert_eq!(answer.code, 0, "{}", answer.reason());
    let told = node.replicator_told();
    assert!(
        told.contains("take-over --offline --machine m1 --generation 4 ") && told.trim_end().ends_with("--handed-over"),
        "{told}"
    );
    assert_eq!(
        node.vmm_told(),
        "{\"cmd\":\"promote\",\"from\":{\"epoch\":41,\"kind\":\"image\",\"state_file\":\"/shm/state\"},\"generation\":4}\n{\"cmd\":\"gate-open\"}\n"
    );
    assert!(node.cluster_told().contains("--name understudy-generation-m1 --update 4"));
    assert!(!node.layout().incoming_mark().exists());
    assert_eq!((node.monitor().code, node.act_with("migrate_from", &FROM).code), (0, 0));
    assert_eq!(node.migration_hook(&["forget-migration"]).0, 0);
    assert_eq!(node.monitor().code, 0, "it is not forgotten any more");
}

fn nothing_arrived() {
    let node = in_cluster(3);
    let answer = node.act_with("migrate_from", &FROM);
    assert_eq!(answer.code, 1);
    assert!(answer.reason().contains("nothing of m1 has arrived here"), "{}", answer.reason());
    standby(&node);
    let answer = node.act_with("migrate_from", &FROM);
    assert_eq!(answer.code, 1, "without an image");
    assert_eq!(node.vmm_told(), "", "nothing was run");
    assert_eq!(node.monitor().code, 7);
}

fn probes() {
    let node = in_cluster(3);
    standby(&node);
    assert_eq!((node.probe(), node.monitor().code), (7, 7));
}

fn plain_start() {
    let node = in_cluster(3);
    standby(&node);
    let received = node.vmm_pid();
    fs::create_dir_all(node.layout().image_dir()).unwrap();
    assert_eq!(node.act("start"), 0);
    assert!(gone(received), "the VMM that held the image has ended");
    assert!(node.replicator_told().starts_with("discard --machine m1 "), "{}", node.replicator_told());
    assert!(!node.layout().incoming_mark().exists());
    let line = fs::read_to_string(Path::new("/proc").join(node.vmm_pid().to_string()).join("cmdline")).unwrap();
    assert!(line.replace('\0', " ").trim_end().ends_with("--generation 4"), "{line:?}");
}

fn stop_discards() {
    let node = in_cluster(3);
    standby(&node);
    fs::create_dir_all(node.layout().image_dir()).unwrap();
    assert_eq!(node.act("stop"), 0);
    assert!(!node.layout().ram().exists() && !node.layout().incoming_mark().exists());
    assert!(node.replicator_told().starts_with("discard "));
}

fn prepared() {
    let node = in_cluster(3);
    standby(&node);
    let first = node.vmm_pid();
    let line = fs::read_to_string(format!("/proc/{first}/cmdline")).unwrap().replace('\0', " ");
    let kernel = format!("--kernel {} ", node.path("kernel").display());
    assert!(line.contains(&kernel) && line.trim_end().ends_with("--standby"), "{line}");
    standby(&node);
    assert!(gone(first), "what an earlier migration left is replaced");
    let second = node.vmm_pid();
    assert_eq!(node.migration_hook(&["forget-migration"]).0, 0);
    assert!(gone(second) && !node.layout().ram().exists() && !node.layout().incoming_mark().exists());
    assert_eq!(node.migration_hook(&["forget-migration"]).0, 0);
}

fn not_prepared() {
    let refused = |node: &Node, word: &str| {
        let (code, said) = node.migration_hook(&["prepare-migration", "--from", "n2"]);
        assert!(code == 1 && said.contains(word), "{code} {said}");
        assert!(!node.layout().vmm_pid().exists());
    };
    let place = node();
    let text = cib(&place, 1, "", false);
    refused(&place.in_a_cluster(Some(&text)), "allow-migrate");
    let place = node();
    let text = cib(&place, 1, ALLOWED, true);
    refused(&place.in_a_cluster(Some(&text)), "protected");
    let place = node();
    let text = cib(&place, 1, ALLOWED, false).replace("/kernel'", "/no-kernel'");
    refused(&place.in_a_cluster(Some(&text)), "no-kernel cannot be read on this node");
    let place = node();
    let text = cib(&place, 1, ALLOWED, false).replace("/shm'", "/elsewhere'");
    refused(&place.in_a_cluster(Some(&text)), "same run_root and shm_root");
    refused(&node().in_a_cluster(None), "CIB");
    let place = in_cluster(1);
    assert_eq!(place.act("start"), 0);
    let pid = place.vmm_pid();
    let (code, said) = place.migration_hook(&["prepare-migration", "--from", "n2"]);
    assert!(code == 1 && said.contains("runs on this node"), "{said}");
    assert_eq!((place.vmm_pid(), place.monitor().code), (pid, 0));
}

fn spared() {
    let node = in_cluster(3);
    standby(&node);
    let pid = node.vmm_pid();
    fs::write(node.layout().incoming_mark(), "1\n").unwrap();
    assert_eq!(node.migration_hook(&["forget-migration"]).0, 0);
    assert_eq!(node.vmm_pid(), pid, "another process than the mark says");
    standby(&node);
    node.behave("vmm-state", "running");
    assert_eq!(node.migration_hook(&["forget-migration"]).0, 0);
    assert_eq!(node.monitor().code, 0, "it runs by now");
}

fn listener() {
    let node = Node::new("migrations")
        .with("OCF_RESKEY_peers", "n1=127.0.0.1:7799 n2=127.0.0.1:7798")
        .with("OCF_RESKEY_CRM_meta_on_node", "n1");
    assert_eq!((node.act("validate-all"), node.probe(), node.monitor().code), (0, 7, 7));
    assert_eq!((node.act("start"), node.act("start"), node.monitor().code), (0, 0, 0));
    let pid_file = node.path("run/.migrations/replicator.pid");
    let line = fs::read_to_string(format!("/proc/{}/cmdline", node.pid(&pid_file))).unwrap().replace('\0', " ");
    assert!(line.contains("--listen 127.0.0.1:7799 ") && line.contains(" hook --node n1 --run-root "), "{line}");
    node.crash(node.pid(&pid_file));
    assert_eq!((node.monitor().code, node.probe()), (1, 7));
    assert_eq!((node.act("start"), node.act("stop"), node.act("stop"), node.monitor().code), (0, 0, 0, 7));
    let answer = node.act_with("start", &[("OCF_RESKEY_peers", "n2=127.0.0.1:7798")]);
    assert_eq!(answer.code, 2);
    assert!(answer.reason().contains("no address for this node (n1)"), "{}", answer.reason());
    assert_eq!(node.act_with("start", &[("OCF_RESKEY_key", "/nonexistent")]).code, 2);
}
