//! What the cluster says, as the controller reads it; what the controller wants, as the cluster gets it.

use understudy_crm::estate::Automation;
use understudy_crm::records::{self, EVACUATED, Plan, Progress, Records};
use understudy_crm::xml::Element;
use understudy_evacuation::cluster::{Beside, LOAD, links, policy, read, wanted};
use understudy_evacuation::core::decide;
use understudy_evacuation::core::model::Host;
use understudy_monitor::matrix::{Observation, Verdict};
use understudy_monitor::report::{Judged, Report};

const POLICY: &str = r#"
nodes = [
    { name = "n1", storage = "s1", rack = "r1", cluster = "c" },
    { name = "n2", storage = "s2", rack = "r2", cluster = "c" },
    { name = "n3", storage = "s3", rack = "r2", cluster = "c" },
]
machines = [
    { name = "a", kernel = "/k", mode = "restart", primary = "n1" },
    { name = "p", kernel = "/k", primary = "n2" },
]
fencing = [{ name = "f", agent = "fence_x", nodes = ["n1", "n2", "n3"] }]
evacuation = { settle = 0 }
"#;

fn cib() -> Element {
    cib_of(POLICY)
}

fn cib_of(policy: &str) -> Element {
    let policy = understudy_crm::policy::Policy::parse(policy).unwrap();
    understudy_crm::cib::document(&policy, &understudy_crm::compile::compile(&policy))
}

fn status(nodes: &str, resources: &str) -> Element {
    Element::parse(&format!("<r><nodes>{nodes}</nodes><resources>{resources}</resources></r>")).unwrap()
}

fn node(name: &str, more: &str) -> String {
    format!("<node name='{name}' online='true' unclean='false' pending='false' standby='false' {more}/>")
}

const DEAD: &str = "<node name='n1' online='false' unclean='false' pending='false'/>";
const LOST: &str = "<node name='n1' online='false' unclean='true' pending='false'/>";

fn vm(id: &str, role: &str, on: &str, more: &str) -> String {
    let node = if on.is_empty() { String::new() } else { format!("<node name='{on}'/>") };
    format!("<resource id='{id}' role='{role}' managed='true' orphaned='false' failed='false' {more}>{node}</resource>")
}

#[test]
fn hosts_and_machines_are_what_crm_mon_says() {
    let cib = cib();
    let policy = policy(&cib).unwrap().unwrap();
    let clone =
        format!("<clone id='c'>{}{}</clone>", vm("vm-p:0", "Promoted", "n2", ""), vm("vm-p:1", "Unpromoted", "n3", ""));
    let at =
        |nodes: &str, a: &str| read(&policy, &cib, &status(nodes, &format!("{a}{clone}")), Beside::default()).unwrap();
    let up = node("n2", "") + &node("n3", "");

    let s = at(&format!("{DEAD}{up}"), &vm("vm-a", "Stopped", "", ""));
    assert_eq!(s.hosts, [Host::Down, Host::Up, Host::Up]);
    assert!(s.machines[0].wanted && s.machines[0].on.is_empty() && s.machines[0].runs.is_none());
    assert_eq!((s.machines[0].home(), s.machines[1].runs, &s.machines[1].on[..]), (Some(0), Some(1), &[1, 2][..]));

    let s = at(&format!("{LOST}{up}"), &vm("vm-a", "Started", "n1", ""));
    assert_eq!((s.hosts[0], s.machines[0].runs, &s.machines[0].on[..]), (Host::Unclean, None, &[0][..]));

    for (more, host) in [("shutdown='true'", Host::Leaving), ("maintenance='true'", Host::Leaving), ("", Host::Up)] {
        assert_eq!(at(&(node("n1", more) + &up), "").hosts[0], host);
    }
    assert_eq!(at(&node("n1", "").replace("pending='false'", "pending='true'"), "").hosts, [Host::Joining; 3]);
    for stopped in ["target_role='Stopped'", "orphaned='true'"] {
        let a = vm("vm-a", "Stopped", "", "").replace("orphaned='false'", stopped);
        assert!(!at(&up, &a).machines[0].wanted, "{stopped}");
    }
    assert!(!at(&up, &vm("vm-a", "Stopped", "", "").replace("managed='true'", "managed='false'")).machines[0].wanted);
    // On a host that is not the policy's nobody moves it.
    assert!(!at(&up, &vm("vm-a", "Started", "elsewhere", "")).machines[0].wanted);
    assert!(!at(&up, "").machines[0].wanted, "what the cluster does not have is not started");
    assert!(read(&policy, &cib, &Element::new("r"), Beside::default()).is_err());
}

#[test]
fn failures_load_and_maintenance_are_read_from_the_configuration() {
    let mut cib = cib();
    let policy = policy(&cib).unwrap().unwrap();
    let read = |cib: &Element| {
        read(&policy, cib, &status(&node("n1", ""), &vm("vm-a", "Stopped", "", "")), Beside::default()).unwrap()
    };
    assert!(!read(&cib).maintenance && read(&cib).quorum);
    let state = &mut cib.child_or_new("status").children[0];
    let set = state.child_or_new("transient_attributes").child_or_new("instance_attributes");
    let mut add =
        |name: &str, value: &str| set.children.push(Element::new("nvpair").with("name", name).with("value", value));
    add("fail-count-vm-a#start_0", "2");
    add("fail-count-vm-ab#start_0", "INFINITY");
    add(LOAD, "73");
    assert!(read(&cib).machines[0].failed.is_empty());
    let set =
        cib.child_or_new("status").children[0].child_or_new("transient_attributes").child_or_new("instance_attributes");
    set.children.push(Element::new("nvpair").with("name", "fail-count-vm-a#monitor_5000").with("value", "1"));
    assert_eq!((&read(&cib).machines[0].failed[..], read(&cib).load[0]), (&[0][..], Some(73)));
    let bootstrap = &mut cib.child_or_new("configuration").child_or_new("crm_config").children[0];
    bootstrap.children.push(Element::new("nvpair").with("name", "maintenance-mode").with("value", "TRUE"));
    cib.set("have-quorum", "0");
    assert!(read(&cib).maintenance && !read(&cib).quorum);
}

#[test]
fn a_host_that_its_health_empties_gives_its_machines_away() {
    let policy = policy(&cib()).unwrap().unwrap();
    let host = |strategy: &str, health: &str| {
        let mut cib = cib();
        let properties = &mut cib.child_or_new("configuration").child_or_new("crm_config").children[0].children;
        properties.push(Element::new("nvpair").with("name", "node-health-strategy").with("value", strategy));
        let nodes = node("n1", &format!("health='{health}'")) + &node("n2", "") + &node("n3", "");
        read(&policy, &cib, &status(&nodes, ""), Beside::default()).unwrap().hosts[0]
    };
    assert_eq!(host("migrate-on-red", "red"), Host::Leaving);
    for (strategy, health) in [("migrate-on-red", "yellow"), ("migrate-on-red", "green"), ("none", "red")] {
        assert_eq!(host(strategy, health), Host::Up, "{strategy}, {health}");
    }
    assert_eq!((host("only-green", "yellow"), host("only-green", "green")), (Host::Leaving, Host::Up));
}

/// In maintenance mode crm_mon calls nothing managed.
#[test]
fn maintenance_mode_takes_nobodys_plan_away() {
    let mut cib = cib();
    let policy = policy(&cib).unwrap().unwrap();
    let unmanaged = vm("vm-a", "Stopped", "", "").replace("managed='true'", "managed='false'");
    let wanted = |cib: &Element, a: &str| {
        read(&policy, cib, &status(&node("n1", ""), a), Beside::default()).unwrap().machines[0].wanted
    };
    assert!(!wanted(&cib, &unmanaged));
    let bootstrap = &mut cib.child_or_new("configuration").child_or_new("crm_config").children[0];
    bootstrap.children.push(Element::new("nvpair").with("name", "maintenance-mode").with("value", "true"));
    assert!(wanted(&cib, &unmanaged));
    assert!(!wanted(&cib, &unmanaged.replace("orphaned='false'", "target_role='Stopped'")));
}

/// Rounds until nothing is to be changed any more; the CIB after each.
fn rounds(mut cib: Element, status: &Element) -> Vec<Element> {
    let mut out = Vec::new();
    for now in 100..110 {
        let policy = policy(&cib).unwrap().unwrap();
        let snapshot = read(&policy, &cib, status, Beside { now, here: "n2".into(), ..Beside::default() }).unwrap();
        let round = decide(&policy, &snapshot);
        let Some(next) = wanted(&policy, &cib, &snapshot, &round) else { break };
        // As it goes through the cluster: as text.
        cib = Element::parse(&next.to_string()).unwrap();
        out.push(cib.clone());
    }
    out
}

#[test]
fn a_dead_hosts_machine_has_its_plan_first_and_its_new_score_then() {
    let s = status(&format!("{DEAD}{}{}", node("n2", ""), node("n3", "")), &vm("vm-a", "Stopped", "", ""));
    let all = rounds(cib(), &s);
    let scores: Vec<_> = all.iter().map(|cib| records::wishes(cib, "a")).collect();
    assert_eq!(scores, [vec![("n1", 1000)], vec![("n2", EVACUATED)]]);
    let last = records::read(&all[1]).unwrap();
    assert!(matches!(last.plans[0].moves[0].progress, Progress::Released { batch: 1, .. }), "{last:?}");
    // What is not the controller's stays as it was.
    let mut undone = all[1].clone();
    records::write(&mut undone, &Records::default());
    records::set_wishes(&mut undone, "a", &[("n1".into(), 1000)]);
    let sorted = |mut cib: Element| {
        for node in &mut cib.child_or_new("configuration").child_or_new("nodes").children {
            for set in &mut node.children {
                set.children.sort_by(|a, b| a.id().cmp(b.id()));
            }
            node.children.retain(|set| !set.children.is_empty());
        }
        cib.to_string()
    };
    assert_eq!(sorted(undone), sorted(cib()));
}

#[test]
fn nothing_is_planned_while_the_host_may_live() {
    let s = status(&format!("{LOST}{}{}", node("n2", ""), node("n3", "")), &vm("vm-a", "Started", "n1", ""));
    for cib in rounds(cib(), &s) {
        assert_eq!(records::wishes(&cib, "a"), [("n1", 1000)]);
        assert!(records::read(&cib).unwrap().plans.is_empty());
    }
}

#[test]
fn what_the_monitor_says_of_others_than_the_policys_is_left_out_and_a_monitor_that_waits_says_nothing() {
    let (cib, text) = (cib(), status(&node("n1", ""), &vm("vm-a", "Started", "n1", "")));
    let policy = policy(&cib).unwrap().unwrap();
    let judged = |node: &str, machine: Option<&str>| Judged {
        node: node.into(),
        machine: machine.map(str::to_owned),
        observation: Observation::all().next().unwrap(),
        row: "r".into(),
        verdict: Verdict::Move,
        for_ms: 3999,
    };
    let report = Report {
        node: "n1".into(),
        speaks: true,
        waits_for: None,
        judged: vec![judged("n1", None), judged("n2", Some("p")), judged("x9", None), judged("n1", Some("old"))],
        refused: 0,
        last_refused: None,
    };
    let findings =
        |report: Option<Report>| read(&policy, &cib, &text, Beside { report, ..Beside::default() }).unwrap().findings;
    let known = findings(Some(report.clone())).unwrap();
    let known: Vec<_> = known.iter().map(|f| (f.node, f.machine, f.verdict, f.lasts)).collect();
    assert_eq!(known, [(0, None, Verdict::Move, 3), (1, Some(1), Verdict::Move, 3)]);
    assert_eq!(findings(Some(Report { waits_for: Some("it began".into()), ..report })), None);
    assert_eq!(findings(None), None);
}

#[test]
fn links_are_counted_as_corosyncs_tool_prints_them() {
    let text = "Local node ID 1, transport knet\nLINK ID 0 udp\n\taddr\t= 10.0.0.1\n\tstatus:\n\
        \t\tnodeid:          1:\tlocalhost\n\t\tnodeid:          2:\tconnected\n\t\tnodeid:          3:\tdisconnected\n\
        LINK ID 1 udp\n\taddr\t= 10.0.1.1\n\tstatus:\n\t\tnodeid:          1:\tlocalhost\n\t\tnodeid:          2:\tdisconnected\n";
    assert_eq!(links(text), Some((1, 2)));
    assert_eq!(links("nodeid: 2: connected\nLINK ID 0 udp\n"), Some((0, 1)), "no more than there are");
    assert_eq!((links(""), links("Could not initialize corosync configuration API error 2")), (None, None));
}

/// A policy that was applied in between may say that the machine is at home where nobody knows whether it runs.
#[test]
fn a_machine_whose_home_has_become_a_lost_host_is_not_started_by_an_older_plan() {
    // Nothing else is to hold it.
    let cib = cib_of(&POLICY.replace("settle = 0", "settle = 0, max_down = 100"));
    let policy = policy(&cib).unwrap().unwrap();
    let round = |cib: &Element, nodes: &str, now| {
        let beside = Beside { now, ..Beside::default() };
        let snapshot = read(&policy, cib, &status(nodes, &vm("vm-a", "Stopped", "", "")), beside).unwrap();
        let round = decide(&policy, &snapshot);
        (wanted(&policy, cib, &snapshot, &round).unwrap_or_else(|| cib.clone()), round)
    };
    let up = format!("{DEAD}{}{}", node("n2", ""), node("n3", ""));
    let (planned, _) = round(&cib, &up, 100);
    let plans = records::read(&planned).unwrap().plans;
    assert_eq!((plans.len(), plans[0].moves[0].to.as_str()), (1, "n2"));
    assert_eq!(round(&planned, &up, 101).1.scores.len(), 1, "as it was planned");
    let mut moved = planned;
    records::set_wishes(&mut moved, "a", &[("n3".into(), 1000)]);
    let unsure = format!("{DEAD}{}{}", node("n2", ""), LOST.replace("n1", "n3"));
    assert_eq!(round(&moved, &unsure, 101).1.scores, []);
}

#[test]
fn the_twenty_newest_plans_that_are_over_are_kept() {
    let mut cib = cib();
    let policy = policy(&cib).unwrap().unwrap();
    let plan = |n: u64| Plan {
        id: format!("p{n}"),
        kind: records::Kind::Lost,
        automation: Automation::Automatic,
        made: n,
        lost: vec!["n1".into()],
        moves: Vec::new(),
        batches: 0,
        held: None,
        decided: None,
        closed: Some("all run".into()),
    };
    let mut before = Records { plans: (1..=24).map(plan).collect(), ..Records::default() };
    before.state.plans = 24;
    records::write(&mut cib, &before);
    let nodes = node("n1", "") + &node("n2", "") + &node("n3", "");
    let snapshot = read(&policy, &cib, &status(&nodes, &vm("vm-a", "Started", "n1", "")), Beside::default()).unwrap();
    let kept: Vec<u64> = decide(&policy, &snapshot).records.plans.iter().map(|p| p.made).collect();
    assert_eq!(kept, (5..=24).collect::<Vec<_>>());
}
