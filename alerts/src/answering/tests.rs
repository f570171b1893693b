use std::cell::RefCell;
use std::collections::BTreeMap;

use super::*;
use crate::approval::{ApprovalState, digest, state};
use crate::settings::{Approval, Kind};

const NOW: u64 = 1_795_417_750;

/// A cluster that carries out one change after the other; somebody may get in between.
#[derive(Default)]
struct Cluster {
    records: RefCell<BTreeMap<String, Record>>,
    before_put: RefCell<Vec<Record>>,
}

impl Records for Cluster {
    fn get(&self, id: &str) -> Result<Option<Record>, ClusterError> {
        Ok(self.records.borrow().get(id).cloned())
    }
    fn all(&self) -> Result<Vec<Record>, ClusterError> {
        Ok(self.records.borrow().values().cloned().collect())
    }
    fn put(&self, record: &Record, over: Option<u32>) -> Result<bool, ClusterError> {
        if let Some(other) = self.before_put.borrow_mut().pop() {
            self.records.borrow_mut().insert(other.request.id.clone(), other);
        }
        let mut records = self.records.borrow_mut();
        let there = records.get(&record.request.id).map(|r| r.revision);
        if there != over {
            return Ok(false);
        }
        records.insert(record.request.id.clone(), record.clone());
        Ok(true)
    }
    fn remove(&self, record: &Record) -> Result<(), ClusterError> {
        self.records.borrow_mut().remove(&record.request.id);
        Ok(())
    }
}

fn key() -> Key {
    Key::from_bytes([7; 32], "test")
}

fn settings() -> Settings {
    let recipient = |name: &str, approves| Recipient {
        name: name.into(),
        kind: Kind::Mail,
        to: format!("{name}@works.example"),
        approves,
        severity: Severity::Warning,
        window: 300,
    };
    Settings {
        recipients: vec![recipient("night", true), recipient("day", true), recipient("log", false)],
        approval: Approval { expires: 900, unanswered: Unanswered::Refuse },
        ..Settings::default()
    }
}

fn request(plan: &str) -> Request {
    let (id, summary) = ("n1-17".into(), format!("{plan}\nmore"));
    Request { id, plan: digest(plan), summary, asked: 0, expires: 0, approvers: Vec::new() }
}

/// Ask; what was queued for whom.
fn asked(cluster: &Cluster, plan: &str, now: u64) -> (Record, Vec<(String, Alarm)>) {
    let told = RefCell::new(Vec::new());
    let tell = |recipient: &Recipient, alarm: &Alarm| {
        told.borrow_mut().push((recipient.name.clone(), alarm.clone()));
        Ok(())
    };
    let (record, troubles) = ask(cluster, &key(), &settings(), request(plan), &tell, now).unwrap();
    assert_eq!(troubles, []);
    (record, told.into_inner())
}

/// The line of a message that approves.
fn code_in(alarm: &Alarm) -> String {
    let line = alarm.text.lines().find_map(|line| line.trim().strip_prefix("understudy-crm approve n1-17 ")).unwrap();
    line.to_owned()
}

fn given(cluster: &Cluster, code: &str, answer_: Answer, now: u64) -> Result<Decision, AnswerError> {
    let given = Given { answer: answer_, code, name: None, way: Way::Mail };
    answer(cluster, &key(), "n1-17", &given, now, &|_| {})
}

#[test]
fn approvers_are_told_and_the_code_of_any_of_them_decides() {
    let cluster = Cluster::default();
    let (record, told) = asked(&cluster, "web1 to n2", NOW);
    let names: Vec<_> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names, record.told), (vec!["night", "day"], true));
    assert_eq!(told[0].1.subject, "Approval needed for n1-17: web1 to n2");
    assert!(told[0].1.text.starts_with("web1 to n2\nmore\n\nThis waits"), "{}", told[0].1.text);
    assert!(told[0].1.text.contains("by 2026-11-23 07:24:10 UTC, nothing is done"), "{}", told[0].1.text);
    assert_ne!(code_in(&told[0].1), code_in(&told[1].1));
    // What travels in headers and stands in journals does not have the code.
    assert!(!told[0].1.subject.contains(&code_in(&told[0].1)));
    let decision = given(&cluster, &code_in(&told[1].1), Answer::Approve, NOW + 60).unwrap();
    assert_eq!(decision.by, "day");
    let record = cluster.get("n1-17").unwrap();
    let approved = ApprovalState::Approved { by: "day".into(), at: NOW + 60 };
    assert_eq!(state(record.as_ref(), NOW + 9999, Unanswered::Refuse), approved);
}

#[test]
fn asking_again_asks_nobody_again() {
    let cluster = Cluster::default();
    let (record, _) = asked(&cluster, "web1 to n2", NOW);
    let (again, told) = asked(&cluster, "web1 to n2", NOW + 10);
    assert_eq!((again, told.len()), (record, 0));
}

#[test]
fn a_controller_that_died_before_telling_tells_the_same_codes_afterwards() {
    let cluster = Cluster::default();
    let fail = |_: &Recipient, _: &Alarm| Err(Trouble::passing("full"));
    let (record, troubles) = ask(&cluster, &key(), &settings(), request("p"), &fail, NOW).unwrap();
    assert_eq!((record.told, troubles.len()), (false, 2));
    let (record, told) = asked(&cluster, "p", NOW + 30);
    assert_eq!((record.told, told.len(), record.request.asked), (true, 2, NOW));
    assert!(given(&cluster, &code_in(&told[0].1), Answer::Refuse, NOW + 31).is_ok());
}

#[test]
fn another_plan_is_another_question_and_old_codes_are_worth_nothing() {
    let cluster = Cluster::default();
    let (_, old) = asked(&cluster, "web1 to n2", NOW);
    let (record, new) = asked(&cluster, "web1 to n3", NOW + 10);
    assert_eq!((new.len(), record.decision.as_ref()), (2, None));
    let refused = given(&cluster, &code_in(&old[0].1), Answer::Approve, NOW + 20);
    assert!(matches!(refused, Err(AnswerError::Refused(Refusal::Wrong { .. }))), "{refused:?}");
    assert!(given(&cluster, &code_in(&new[0].1), Answer::Approve, NOW + 20).is_ok());
}

#[test]
fn of_two_answers_at_once_one_counts() {
    let cluster = Cluster::default();
    let (record, told) = asked(&cluster, "p", NOW);
    // Somebody else's refusal arrives between reading and writing.
    let decision = Decision { answer: Answer::Refuse, by: "day".into(), at: NOW + 1, way: Way::Cli };
    let other = Record { revision: record.revision + 1, decision: Some(decision.clone()), ..record };
    cluster.before_put.borrow_mut().push(other);
    let refused = given(&cluster, &code_in(&told[0].1), Answer::Approve, NOW + 1);
    assert!(matches!(&refused, Err(AnswerError::Refused(Refusal::Decided { by, .. })) if by == "day"), "{refused:?}");
    assert_eq!(cluster.get("n1-17").unwrap().unwrap().decision, Some(decision));
}

#[test]
fn an_answer_in_the_last_moment_is_not_overruled_by_silence() {
    let cluster = Cluster::default();
    let (record, _) = asked(&cluster, "p", NOW);
    let decision = Decision { answer: Answer::Refuse, by: "day".into(), at: NOW + 899, way: Way::Cli };
    let other = Record { revision: record.revision + 1, decision: Some(decision.clone()), ..record };
    cluster.before_put.borrow_mut().push(other);
    let closed = close(&cluster, "n1-17", NOW + 900, Unanswered::Approve).unwrap().unwrap();
    assert_eq!(closed.decision, Some(decision));
    assert_eq!(close(&cluster, "n9", NOW, Unanswered::Approve).unwrap(), None);
}

#[test]
fn every_answer_is_written_down_with_who_when_and_which_way() {
    let cluster = Cluster::default();
    let (_, told) = asked(&cluster, "p", NOW);
    let lines = RefCell::new(Vec::new());
    let note = |line: &Line<'_>| lines.borrow_mut().push(serde_json::to_value(line).unwrap());
    let code = code_in(&told[0].1);
    for (id, code) in [("n1-17", "AAAA-AAAA"), ("n9", "AAAA-AAAA"), ("n1-17", &code), ("n1-17", &code)] {
        let given = Given { answer: Answer::Approve, code, name: None, way: Way::Hook };
        let _ = answer(&cluster, &key(), id, &given, NOW + 5, &note);
    }
    let lines = lines.into_inner();
    let what: Vec<_> = lines.iter().map(|line| line["what"].as_str().unwrap()).collect();
    assert_eq!(what, ["refused", "refused", "decided", "refused"]);
    let decided = &lines[2];
    assert_eq!((decided["by"].as_str(), decided["way"].as_str()), (Some("night"), Some("by hook")));
    assert_eq!((decided["at"].as_u64(), decided["why"].as_str()), (Some(NOW + 5), Some("approved")));
    assert!(lines.iter().all(|line| !line.to_string().contains(&code)));
}
