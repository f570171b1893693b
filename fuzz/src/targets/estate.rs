//! `monitor`, `crm-config`, `evacuation`: what nodes say of themselves and the cluster's tools of the nodes, and what is decided from it.

use std::collections::{BTreeMap, BTreeSet};

use ring::hmac;
use understudy_crm::policy::Policy;
use understudy_crm::records::{self, EVACUATED, Order, Progress, Records, What};
use understudy_crm::xml::Element;
use understudy_crm::{check, import, simulate};
use understudy_evacuation::cluster::{Beside, links as links_of, policy as policy_of, read, wanted};
use understudy_evacuation::core::decide;
use understudy_evacuation::core::model::{ApprovalState, Host};
use understudy_monitor::matrix::{self, Matrix, Observation, forbidden};
use understudy_monitor::members::{Member, members as members_of};
use understudy_monitor::watch::{Config, Watch};
use understudy_monitor::wire::{Heartbeat, Plane};

use crate::input::Input;

const KEY: [u8; 32] = [7; 32];

/// A body as a datagram of ours.
fn sealed(body: &[u8]) -> Vec<u8> {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &KEY), body);
    [b"USMON1", tag.as_ref(), body].concat()
}

/// A datagram as it came, and one with the right key; what was opened goes to a monitor.
pub fn heartbeat(bytes: &[u8]) {
    // Only who has the key makes a datagram that is opened.
    assert!(Heartbeat::open(bytes, &[8; 32]).is_err());
    let _ = Heartbeat::open(bytes, &KEY).map_err(|e| e.to_string());
    let Ok(matrix) = Matrix::standard() else { unreachable!("the default rows are readable") };
    let nodes = ["n1", "n2", "n3"].map(|n| (n.to_owned(), (n != "n3").then(|| "r1".to_owned())));
    let config = Config {
        node: "n1".into(),
        nodes: nodes.into(),
        interval_ms: 1000,
        missed: 3,
        samples: 1,
        restart_ms: 5000,
        matrix,
    };
    let mut watch = Watch::new(config, 1);
    let member = |i: usize| [Member::Online, Member::Left, Member::Lost][(bytes.len() + i) % 3];
    watch.members(Some(["n1", "n2", "n3"].into_iter().enumerate().map(|(i, n)| (n.to_owned(), member(i))).collect()));
    let mut now = 0;
    for body in bytes.split(|byte| *byte == b'\n') {
        now += 999;
        if let Ok(beat) = Heartbeat::open(&sealed(body), &KEY) {
            assert_eq!(Heartbeat::open(&beat.seal(&KEY), &KEY).as_ref(), Ok(&beat));
            assert!(!beat.newer_than(Some((beat.began, beat.number))));
            for plane in Plane::ALL {
                let new = watch.heard(now, plane, beat.clone());
                assert!(!new || beat.plane == plane && !watch.heard(now, plane, beat.clone()), "heard twice");
            }
        }
        let _ = watch.tick(now);
        let _ = watch.report(now);
    }
}

/// What crm_mon prints, to the monitor.
pub fn members(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(why) = members_of(&text) {
        assert!(why.starts_with("crm_mon's answer"), "{why}");
    }
}

/// Rows of the fault matrix: whatever they say, no verdict follows that must not.
pub fn matrix(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = Matrix::read_line(&text);
    let Ok(rows) = matrix::read_rows(&text) else { return };
    let Ok((matrix, bad)) = Matrix::with(&rows) else { unreachable!("the default rows are readable") };
    assert!(bad.iter().all(|row| row.index < rows.len()));
    for o in Observation::all() {
        let verdict = matrix.judge(&o);
        assert_eq!(forbidden(&o, verdict), None, "{o}: {verdict}");
    }
    let _ = (matrix.table(), matrix.list());
    if bad.is_empty() {
        // As an agent's parameter it says the same. (It has no `why`.)
        let again = Matrix::read_line(&matrix::line(&rows));
        let again = again.unwrap_or_else(|why| panic!("{why}: {}", matrix::line(&rows)));
        assert!(Observation::all().all(|o| again.judge(&o) == matrix.judge(&o)));
    }
}

/// What crm_simulate prints.
pub fn simulate(bytes: &[u8]) {
    let Ok(result) = Element::parse(&String::from_utf8_lossy(bytes)) else { return };
    let outcome = simulate::outcome(&result);
    let twice = |o: &BTreeMap<String, Vec<simulate::Running>>| {
        o.values().any(|on| on.iter().map(|r| &r.node).collect::<BTreeSet<_>>().len() < on.len())
    };
    // Nothing is twice on one node because of what is done, only if it was so before.
    assert!(!twice(&outcome.after) || twice(&outcome.before));
    let _ = simulate::with_dead(&result, &["n1".to_owned()]);
}

/// A cluster, back to a policy: a text that can be read, or that says why not.
pub fn import(bytes: &[u8]) {
    let Ok(cib) = Element::parse(&String::from_utf8_lossy(bytes)) else { return };
    let imported = import::import(&cib);
    if check::read(&imported.text).0.is_none() {
        assert!(!imported.warnings.is_empty(), "a policy that cannot be used, and no word of it:\n{}", imported.text);
    }
    assert!(imported.warnings.iter().all(|warning| !warning.is_empty()));
}

/// The controller's records in a CIB: what can be read can be written and read again.
pub fn records(bytes: &[u8]) {
    let Ok(mut cib) = Element::parse(&String::from_utf8_lossy(bytes)) else { return };
    match records::read(&cib) {
        Ok(records) => {
            survive(&mut cib, &records);
            for plan in &records.plans {
                let _ = (plan.digest(), plan.summary(), records::time(plan.made));
            }
            let _ = records.state.events.iter().map(ToString::to_string).collect::<Vec<_>>();
        }
        Err(bad) => assert!(bad.to_string().contains("crm_attribute")),
    }
    records::set_wishes(&mut cib, "m1", &[("n1".into(), EVACUATED)]);
    assert!(records::wishes(&cib, "m1").iter().all(|wish| *wish == ("n1", EVACUATED)));
}

fn survive(cib: &mut Element, records: &Records) {
    records::write(cib, records);
    let again = Element::parse(&cib.to_string()).map(|cib| records::read(&cib));
    assert_eq!(again.ok().and_then(Result::ok).as_ref(), Some(records));
}

/// `corosync-cfgtool -s`.
pub fn links(bytes: &[u8]) {
    if let Some((up, of)) = links_of(&String::from_utf8_lossy(bytes)) {
        assert!(up <= of && of > 0);
    }
}

/// `<both>`: a CIB and what crm_mon says of it. What follows from it is carried out, and looked at again.
pub fn snapshot(bytes: &[u8]) {
    let Ok(both) = Element::parse(&String::from_utf8_lossy(bytes)) else { return };
    let (Some(cib), Some(status)) = (both.child("cib"), both.child("pacemaker-result")) else { return };
    let Ok(Some(policy)) = policy_of(cib) else { return };
    let mut cib = cib.clone();
    for round in 0..4 {
        let beside = Beside { now: 1_000_000 + round * 100, here: "n1".into(), ..Beside::default() };
        let Ok(snapshot) = read(&policy, &cib, status, beside) else { return };
        let decided = decide(&policy, &snapshot);
        if let Some(next) = wanted(&policy, &cib, &snapshot, &decided) {
            cib = next;
            survive(&mut cib, &decided.records);
        }
    }
}

const ESTATE: &str = r#"
nodes = [
    { name = "a", storage = "1", rack = "r1", cluster = "c", memory = 2000 },
    { name = "b", storage = "2", rack = "r2", cluster = "c", memory = 1000 },
    { name = "c", storage = "3", rack = "r3", high_performance = "h", memory = 1000 },
]
machines = [
    { name = "m1", kernel = "/k", mode = "restart", cluster = "c", memory = 400, business = "web", automation = "manual" },
    { name = "m2", kernel = "/k", mode = "restart", cluster = "c", memory = 400, business = "web", automation = "semi" },
    { name = "m3", kernel = "/k", mode = "restart", cluster = "c", memory = 700, performance = "high", evacuation = "own-then-dedicated" },
    { name = "m4", kernel = "/k", cluster = "c", memory = 100, primary = "a", standby = "b" },
]
[cluster]
automation = "automatic"
[evacuation]
batch = 2
max_down = 90
"#;

/// A controller that is shown anything in any order: what no sound cluster would ever show too. It starts nothing that may be elsewhere.
pub fn controller(bytes: &[u8]) {
    let Ok(policy) = Policy::parse(ESTATE) else { unreachable!("our own policy") };
    let mut input = Input::new(bytes);
    let mut cib = Element::new("cib");
    let (hosts, machines) = (policy.nodes.len(), policy.machines.len());
    let nothing = Element::new("r").and(Element::new("nodes")).and(Element::new("resources"));
    let beside = Beside { now: 1_000_000, here: "a".into(), ..Beside::default() };
    let Ok(mut seen) = read(&policy, &cib, &nothing, beside) else { unreachable!("an empty cluster") };
    seen.quorum = true;
    seen.hosts.fill(Host::Up);
    for (m, now) in seen.machines.iter_mut().enumerate() {
        (now.wanted, now.wishes) = (true, vec![(m % 2, 1000)]);
    }
    let nodes = |bits: u8| (0..hosts).filter(|n| bits & 1 << n > 0).collect::<Vec<_>>();
    while !input.is_empty() {
        let what = input.byte();
        let m = usize::from(input.byte()) % machines;
        let n = m % hosts;
        let value = input.byte();
        let plan = format!("p{}", value % 8);
        let now = &mut seen.machines[m];
        match what % 12 {
            0 => {
                const HOSTS: [Host; 5] = [Host::Up, Host::Joining, Host::Leaving, Host::Unclean, Host::Down];
                seen.hosts[n] = HOSTS[usize::from(value) % HOSTS.len()];
            }
            1 => now.on = nodes(value),
            2 => now.runs = nodes(value).first().copied(),
            3 => now.failed = nodes(value),
            4 => now.wishes = nodes(value).into_iter().map(|n| (n, i32::from(value))).collect(),
            5 => now.wanted = !value.is_multiple_of(2),
            6 => seen.now = seen.now.saturating_add_signed(i64::from(value as i8) * 4),
            7 => seen.load[n] = Some(u32::from(value)),
            8 => {
                const WHAT: [What; 3] = [What::Release, What::Cancel, What::Retry];
                let machines = if m == 0 { Vec::new() } else { vec![format!("m{}", value % 6)] };
                let order = Order { plan, what: WHAT[m % 3], machines, by: "somebody".into() };
                seen.records.orders.insert(value.to_string(), order);
            }
            9 => {
                let by = "somebody".to_owned();
                let answers = [ApprovalState::Approved { by: by.clone() }, ApprovalState::Refused { by }];
                seen.approvals.insert(plan, answers.get(m).cloned().unwrap_or(ApprovalState::Expired));
            }
            10 => (seen.quorum, seen.maintenance) = (!value.is_multiple_of(2), value % 3 > 1),
            _ => seen.links = Some((usize::from(value) % 4, m)),
        }
        let round = decide(&policy, &seen);
        survive(&mut cib, &round.records);
        for (m, scores) in &round.scores {
            let (now, name) = (&seen.machines[*m], policy.machines[*m].name.get_ref());
            assert!(now.wanted && now.on.is_empty() && now.runs.is_none(), "{name} is started twice");
            assert!(seen.quorum && !seen.maintenance, "{name} is started without leave");
            let &[(to, EVACUATED)] = scores.as_slice() else { panic!("{name} has the scores {scores:?}") };
            assert_eq!(seen.hosts[to], Host::Up, "{name} is started on a host that is not up");
            let moves = round.records.plans.iter().flat_map(|p| &p.moves);
            let its = |p: &&records::Move| p.machine == *name && matches!(p.progress, Progress::Released { .. });
            assert_eq!(moves.filter(its).count(), 1, "{name} is released by one plan");
            seen.machines[*m].wishes.clone_from(scores);
        }
        seen.records = round.records;
    }
}
