use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_795_417_750;

fn key() -> Key {
    Key::from_bytes([7; 32], "test")
}

fn request() -> Request {
    Request {
        id: "n1-17".into(),
        plan: digest("web1 to n2"),
        summary: "web1 to n2".into(),
        asked: NOW,
        expires: NOW + 900,
        approvers: vec!["night-shift".into(), "day-shift".into()],
    }
}

fn asked() -> Record {
    Record::ask(request()).unwrap()
}

fn says(
    record: &Record,
    answer_: Answer,
    code: &str,
    way: Way,
    at: u64,
) -> (Option<Record>, Result<Decision, Refusal>) {
    answer(record, &key(), &Given { answer: answer_, code, name: None, way }, at)
}

fn right() -> String {
    code(&key(), &request(), "night-shift").to_string()
}

#[test]
fn the_right_code_decides_and_says_who() {
    let (record, decision) = says(&asked(), Answer::Approve, &right(), Way::Mail, NOW + 1);
    let decision = decision.unwrap();
    assert_eq!((decision.by.as_str(), decision.at, decision.way), ("night-shift", NOW + 1, Way::Mail));
    let record = record.unwrap();
    assert_eq!(record.revision, 2);
    let approved = ApprovalState::Approved { by: "night-shift".into(), at: NOW + 1 };
    assert_eq!(state(Some(&record), NOW + 5000, Unanswered::Refuse), approved);

    let (record, _) = says(&asked(), Answer::Refuse, &right(), Way::Hook, NOW + 1);
    let refused = ApprovalState::Refused { by: "night-shift".into(), at: NOW + 1 };
    assert_eq!(state(record.as_ref(), NOW + 5000, Unanswered::Approve), refused);
}

#[test]
fn a_code_counts_once() {
    let (record, _) = says(&asked(), Answer::Approve, &right(), Way::Mail, NOW);
    let (again, refusal) = says(&record.unwrap(), Answer::Refuse, &right(), Way::Cli, NOW);
    assert_eq!(again, None);
    let refusal = refusal.unwrap_err().to_string();
    assert_eq!(
        refusal,
        "question n1-17 was approved before, by night-shift by mail: a code counts once, and this answer changes nothing"
    );
}

#[test]
fn a_code_for_another_plan_or_another_question_does_not_count() {
    let mut other = request();
    other.plan = digest("web1 to n3");
    let mut next = request();
    next.id = "n1-18".into();
    for request in [other, next] {
        let code = code(&key(), &request, "night-shift").to_string();
        let (record, refusal) = says(&asked(), Answer::Approve, &code, Way::Mail, NOW);
        assert!(matches!(refusal, Err(Refusal::Wrong { left: Some(4), .. })), "{refusal:?}");
        assert_eq!(record.unwrap().wrong, 1);
    }
}

#[test]
fn somebody_who_was_not_asked_has_no_code() {
    let code = code(&key(), &request(), "stranger").to_string();
    assert!(says(&asked(), Answer::Approve, &code, Way::Mail, NOW).1.is_err());
}

#[test]
fn an_answer_after_its_time_is_refused_with_the_time() {
    assert!(says(&asked(), Answer::Approve, &right(), Way::Cli, NOW + 899).1.is_ok());
    let (record, refusal) = says(&asked(), Answer::Approve, &right(), Way::Cli, NOW + 900);
    assert_eq!(record, None);
    assert!(refusal.unwrap_err().to_string().contains("until 2026-11-23 07:24:10 UTC"));
}

#[test]
fn silence_means_what_the_policy_says_and_is_written_down() {
    let record = asked();
    assert_eq!(state(Some(&record), NOW + 899, Unanswered::Approve), ApprovalState::Waiting { expires: NOW + 900 });
    assert_eq!(record.close(NOW + 899, Unanswered::Approve), None);
    assert_eq!(state(Some(&record), NOW + 900, Unanswered::Refuse), ApprovalState::Expired);
    let closed = record.close(NOW + 901, Unanswered::Refuse).unwrap();
    // Decided is decided, whatever the policy says by then.
    assert_eq!(state(Some(&closed), NOW + 5000, Unanswered::Approve), ApprovalState::Expired);
    let closed = record.close(NOW + 901, Unanswered::Approve).unwrap();
    let approved = ApprovalState::Approved { by: "nobody".into(), at: NOW + 901 };
    assert_eq!(state(Some(&closed), NOW + 5000, Unanswered::Refuse), approved);
    // A node whose clock is behind does not take an answer to what was closed.
    let late = says(&closed, Answer::Refuse, &right(), Way::Mail, NOW + 10).1;
    assert!(matches!(late, Err(Refusal::Decided { way: Way::Silence, .. })), "{late:?}");
    assert_eq!(state(None, NOW, Unanswered::Approve), ApprovalState::NotAsked);
}

#[test]
fn after_five_wrong_codes_only_the_command_line_can_answer() {
    let mut record = asked();
    for left in [4, 3, 2, 1, 0] {
        let (changed, refusal) = says(&record, Answer::Approve, "AAAA-AAAA", Way::Hook, NOW);
        assert_eq!(refusal, Err(Refusal::Wrong { id: "n1-17".into(), left: Some(left) }));
        record = changed.unwrap();
    }
    for way in [Way::Mail, Way::Hook] {
        let (changed, refusal) = says(&record, Answer::Approve, &right(), way, NOW);
        assert_eq!((changed, refusal), (None, Err(Refusal::TooMany { id: "n1-17".into() })));
    }
    assert!(says(&record, Answer::Refuse, "AAAA-AAAA", Way::Cli, NOW).0.is_none());
    assert!(says(&record, Answer::Refuse, &right(), Way::Cli, NOW).1.is_ok());
}

#[test]
fn the_command_line_says_its_name_beside_the_codes_owner() {
    let given = Given { answer: Answer::Approve, code: &right(), name: Some("root"), way: Way::Cli };
    assert_eq!(answer(&asked(), &key(), &given, NOW).1.unwrap().by, "root (with the code of night-shift)");
}

#[test]
fn a_code_may_be_typed_as_people_type() {
    let shown = right();
    assert_eq!(shown.len(), 9);
    let spoken = shown.to_lowercase().replace('-', " ").replace('0', "o").replace('1', "l");
    assert_eq!(Code::parse(&spoken), Code::parse(&shown));
    for bad in ["", "AAAA-AAA", "AAAA-AAAAA", "AAAA-AAAU", "ÄAAA-AAAA"] {
        assert_eq!(Code::parse(bad), None, "{bad}");
    }
}

#[test]
fn codes_are_what_they_were_in_earlier_versions() {
    // A code that is under way while nodes are upgraded stays good. (The value is that of another implementation of HMAC, Python's.)
    assert_eq!(right(), "DBPB-3551");
}

#[test]
fn a_record_is_read_back_and_begins_with_its_revision() {
    let (record, _) = says(&asked(), Answer::Approve, &right(), Way::Mail, NOW);
    for record in [asked(), record.unwrap()] {
        assert_eq!(Record::parse(&record.to_json()).unwrap(), record);
        assert!(record.to_json().starts_with(&Record::revision_prefix(record.revision)));
        assert!(!record.to_json().starts_with(&Record::revision_prefix(record.revision * 10)));
    }
    let foreign = Record::ask(Request { summary: "läuft 🐎".into(), ..request() }).unwrap();
    assert!(foreign.to_json().is_ascii());
    assert_eq!(Record::parse(&foreign.to_json()).unwrap(), foreign);
    let long = Record::ask(Request { summary: "ä".repeat(MAX_SUMMARY), ..request() }).unwrap();
    assert!(long.request.summary.len() <= MAX_SUMMARY && long.request.summary.ends_with('…'));
    assert!(Record::ask(Request { id: "a'b".into(), ..request() }).is_err());
    assert!(Record::parse(&" ".repeat(MAX_RECORD + 1)).is_err());
}

#[test]
fn times_are_dates() {
    assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
    assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
    assert_eq!(utc(NOW), "2026-11-23 07:09:10 UTC");
    let _ = utc(u64::MAX);
}

fn flipped(text: &str, bit: usize) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let at = bit / 8 % bytes.len();
    // Bit 7 would not be text any more.
    bytes[at] ^= 1 << (bit % 7);
    String::from_utf8(bytes).unwrap()
}

proptest! {
    /// The chance that a right check fails this is one in 2^40 a case.
    #[test]
    fn no_single_bit_changed_anywhere_is_accepted(which in 0..8u8, bit in 0..2048usize) {
        let (mut request, mut key_bytes) = (request(), [7; 32]);
        let mut given = right();
        match which {
            0 => request.id = flipped(&request.id, bit),
            1 => request.plan = flipped(&request.plan, bit),
            2 => request.summary = flipped(&request.summary, bit),
            3 => request.asked ^= 1 << (bit % 64),
            4 => request.expires ^= 1 << (bit % 64),
            5 => request.approvers = request.approvers.iter().map(|name| flipped(name, bit)).collect(),
            6 => key_bytes[bit / 8 % 32] ^= 1 << (bit % 8),
            _ => {
                let mut code = Code::parse(&given).unwrap();
                code.flip(bit % 40);
                given = code.to_string();
            }
        }
        let key = Key::from_bytes(key_bytes, "test");
        let code = Code::parse(&given).unwrap();
        prop_assert_eq!(whose(&key, &request, code), None);
    }

    #[test]
    fn what_is_shown_is_what_is_read(bytes in any::<[u8; 5]>()) {
        let code = Code::from_bytes(bytes);
        prop_assert_eq!(Code::parse(&code.to_string()), Some(code));
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in ".{0,100}") {
        let _ = Code::parse(&text);
        let _ = Record::parse(&text);
    }
}
