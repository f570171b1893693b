//! `alerts`: answers that anybody may send, questions that stand in the cluster, the queue after a crash.

use understudy_alerts::approval::{Answer, Code, Given, MAX_WRONG, Record, Unanswered, Way, answer, state};
use understudy_alerts::repeat::Repeats;
use understudy_alerts::spool::Item;
use understudy_alerts::{agent, cluster, reply};
use understudy_protocol::key::Key;

/// A mail, the JSON of a hook, a short message.
pub fn reply(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let replies = [reply::from_mail(bytes), reply::from_hook(bytes), reply::from_text(&text)];
    for reply in replies.into_iter().flatten() {
        let _ = Code::parse(&reply.code).map(|code| assert_eq!(Code::parse(&code.to_string()), Some(code)));
    }
}

/// What cibadmin prints: no answer without the key is ever taken, whatever stands in the record.
pub fn approval(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = cluster::settings(&text);
    let records = cluster::records(&text).unwrap_or_default().into_iter().filter_map(|(_, record)| record.ok());
    let key = Key::from_bytes([1; 32], "fuzz");
    for record in records.chain(Record::parse(&text).ok()) {
        assert_eq!(Record::parse(&record.to_json()).ok().as_ref(), Some(&record));
        for unanswered in [Unanswered::Refuse, Unanswered::Approve] {
            let _ = state(Some(&record), u64::MAX, unanswered);
            let _ = record.close(u64::MAX, unanswered);
        }
        let given = Given { answer: Answer::Approve, code: "0000-0000", name: None, way: Way::Mail };
        let (changed, decision) = answer(&record, &key, &given, 0);
        assert!(decision.is_err());
        // A wrong code is counted or not taken at all.
        assert!(changed.is_none_or(|changed| changed.wrong == record.wrong + 1 && record.wrong < MAX_WRONG));
    }
}

/// Files of the queue, and the alert agent's environment.
pub fn spool(bytes: &[u8]) {
    if let Ok(item) = Item::parse(bytes) {
        let json = serde_json::to_vec(&item).expect("plain data");
        assert_eq!(Item::parse(&json).ok(), Some(item));
    }
    let mut repeats = Repeats::parse(bytes);
    assert_eq!(Repeats::parse(&repeats.to_bytes()), repeats);
    let _ = (repeats.next(), repeats.due(u64::MAX));
    let text = String::from_utf8_lossy(bytes);
    let pairs: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string());
    if let Some((alarm, _)) = agent::alarm(&get) {
        assert_eq!(alarm.clone().bounded(), alarm);
    }
}
