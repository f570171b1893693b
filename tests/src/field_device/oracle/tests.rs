//! A cable's rule, and every way of breaking it.

use lab_guest::line::encode;

use super::*;

const BOOT: &str = "1a2b3c4d-0000-4000-8000-000000000000";

fn at(ms: u64) -> At {
    At { wall_ms: 1_000_000 + ms, mono_ms: ms }
}

fn l(n: u64) -> String {
    encode('L', n, &format!("1a2b3c4d {}", 1000 + n))
}

fn r(n: u64, fields: &str) -> String {
    encode('R', n, fields)
}

fn c(n: u64, fields: &str) -> String {
    encode('C', n, &format!("boot={BOOT} {fields}"))
}

fn judge_with(resync: bool, stream: &[u8]) -> Verdict {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync });
    // In odd portions: where a read ends must not matter.
    for (i, piece) in stream.chunks(7).enumerate() {
        oracle.receive(at(i as u64), piece);
    }
    oracle.verdict()
}

fn judge(lines: &[String]) -> Verdict {
    judge_with(false, lines.concat().as_bytes())
}

fn kinds(verdict: &Verdict) -> Vec<Kind> {
    verdict.first_violations.iter().map(|v| v.violation.kind).collect()
}

#[test]
fn a_stream_as_a_cable_would_carry_it_is_right() {
    let good = r(4, "last=0 gaps=0 repeats=0 bad=0");
    let clock = c(5, "mono_ns=5 boottime_ns=6 real_ns=7 back=0 rng=16 hvc=2");
    let memory = encode('M', 6, "round=2 page=7 written=500 bad=0");
    let v = judge(&[l(1), l(2), l(3), good, clock, memory, l(7), encode('P', 8, "poweroff")]);
    assert!(v.ok, "{:?}", v.first_violations);
    assert_eq!((v.lines, v.last_line, v.pending_bytes), (8, 8, 0));
    assert_eq!((v.boot_ids.as_slice(), v.boot_id.as_str()), (["1a2b3c4d".to_string()].as_slice(), BOOT));
    assert_eq!((v.guest_clock_ms, v.memory_pages, v.rng_bytes, v.hvc_lines), ((1001, 1007), 500, 16, 2));
    assert!(v.power_off);
}

#[test]
fn silence_alone_is_not_right() {
    assert!(!judge(&[]).ok);
}

#[test]
fn any_lost_byte_is_a_violation() {
    let stream: String = (1..=4).map(l).collect();
    // All but the newline at the very end, which only leaves the last line unfinished.
    for lost in 0..stream.len() - 1 {
        let mut bytes = stream.clone().into_bytes();
        bytes.remove(lost);
        assert!(!judge_with(false, &bytes).ok, "byte {lost} lost unnoticed");
    }
}

#[test]
fn any_repeated_byte_is_a_violation() {
    let stream: String = (1..=4).map(l).collect();
    for again in 0..stream.len() {
        let mut bytes = stream.clone().into_bytes();
        bytes.insert(again, bytes[again]);
        assert!(!judge_with(false, &bytes).ok, "byte {again} repeated unnoticed");
    }
}

#[test]
fn any_changed_byte_is_a_violation() {
    let stream: String = (1..=3).map(l).collect();
    for changed in 0..stream.len() - 1 {
        let mut bytes = stream.clone().into_bytes();
        bytes[changed] ^= 0x04;
        assert!(!judge_with(false, &bytes).ok, "byte {changed} changed unnoticed");
    }
}

#[test]
fn a_lost_line_is_a_violation_that_says_which() {
    let v = judge(&[l(1), l(2), l(5)]);
    assert_eq!(kinds(&v), [Kind::Lost]);
    assert!(v.first_violations[0].violation.what.contains("5 instead of 3: 2 lost"));
}

#[test]
fn a_repeated_line_is_a_violation() {
    let v = judge(&[l(1), l(2), l(2), l(3)]);
    assert_eq!(kinds(&v), [Kind::Repeated]);
    assert_eq!(v.first_violations[0].violation.after_line, 2);
}

#[test]
fn a_replayed_stretch_is_a_violation_for_every_line() {
    let v = judge(&[l(1), l(2), l(3), l(2), l(3), l(4)]);
    assert_eq!(kinds(&v), [Kind::Repeated, Kind::Repeated]);
}

#[test]
fn swapped_lines_are_a_violation() {
    assert_eq!(kinds(&judge(&[l(1), l(3), l(2), l(4)])), [Kind::Lost, Kind::Repeated]);
}

#[test]
fn a_stream_that_begins_in_the_middle_is_a_violation_unless_resync_was_asked_for() {
    assert_eq!(kinds(&judge(&[l(41), l(42)])), [Kind::Start]);
    let mut tail = l(40).into_bytes();
    tail.drain(..5);
    tail.extend((41..45).flat_map(|n| l(n).into_bytes()));
    let v = judge_with(true, &tail);
    assert!(v.ok, "{:?}", v.first_violations);
    assert_eq!((v.lines, v.last_line), (4, 44));
}

#[test]
fn resync_forgives_only_at_the_very_start() {
    let stream = [l(41), l(42), "junk\n".to_string(), l(43)].concat();
    assert_eq!(kinds(&judge_with(true, stream.as_bytes())), [Kind::Corrupt]);
    assert!(!judge_with(true, &[b'x'; 20_000]).ok, "junk without end is no resync");
}

#[test]
fn another_boot_id_is_a_violation() {
    let other = encode('L', 2, "99999999 2000");
    assert_eq!(kinds(&judge(&[l(1), other])), [Kind::BootId]);
    let other = encode('C', 2, "boot=99999999-1 mono_ns=1 back=0");
    assert_eq!(kinds(&judge(&[l(1), other, l(3)])), [Kind::BootId]);
}

#[test]
fn a_clock_that_goes_back_is_a_violation() {
    let back = encode('L', 3, "1a2b3c4d 1001");
    assert_eq!(kinds(&judge(&[l(1), l(2), back])), [Kind::ClockBack]);
    assert_eq!(kinds(&judge(&[c(1, "mono_ns=9 back=0"), c(2, "mono_ns=8 back=0")])), [Kind::ClockBack]);
    assert_eq!(kinds(&judge(&[c(1, "mono_ns=9 back=1"), c(2, "mono_ns=9 back=1")])), [Kind::ClockBack]);
}

#[test]
fn memory_that_the_guest_found_bad_is_a_violation() {
    let m = |n: u64, fields: &str| encode('M', n, fields);
    let grows = [m(1, "round=1 page=1 written=9 bad=0"), m(2, "round=1 page=1 written=9 bad=2")];
    assert_eq!(kinds(&judge(&grows)), [Kind::Memory]);
    let back = [m(1, "round=1 page=1 written=9 bad=0"), m(2, "round=1 page=1 written=8 bad=0")];
    assert_eq!(kinds(&judge(&back)), [Kind::Memory]);
    assert_eq!(kinds(&judge(&[encode('E', 1, "memory bad page=1")])), [Kind::Memory]);
}

#[test]
fn gaps_repeats_and_bad_lines_on_the_guests_side_are_violations() {
    for fields in ["last=0 gaps=1 repeats=0 bad=0", "last=0 gaps=0 repeats=1 bad=0", "last=0 gaps=0 repeats=0 bad=1"] {
        assert_eq!(kinds(&judge(&[r(1, fields)])), [Kind::GuestInput], "{fields}");
    }
    assert_eq!(kinds(&judge(&[encode('E', 1, "rx gap: 5 instead of 4")])), [Kind::GuestInput]);
    assert_eq!(kinds(&judge(&[encode('E', 1, "the reports panicked")])), [Kind::GuestError]);
}

#[test]
fn with_resync_only_the_growth_of_the_guests_counters_counts() {
    let before = "last=7 gaps=3 repeats=0 bad=1";
    let same = judge_with(true, [r(5, before), r(6, before)].concat().as_bytes());
    assert!(same.ok, "{:?}", same.first_violations);
    let grown = judge_with(true, [r(5, before), r(6, "last=7 gaps=4 repeats=0 bad=1")].concat().as_bytes());
    assert_eq!(kinds(&grown), [Kind::GuestInput]);
}

#[test]
fn the_device_begins_where_the_guest_is() {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: false });
    oracle.receive(at(0), l(1).as_bytes());
    assert_eq!(oracle.send_from(), None, "the guest might not listen yet");
    oracle.receive(at(1), r(2, "last=0 gaps=0 repeats=0 bad=0").as_bytes());
    assert_eq!(oracle.send_from(), Some(1));

    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: true });
    for (n, last, from) in [(10, 7, None), (11, 9, None), (12, 9, Some(10))] {
        oracle.receive(at(n), r(n, &format!("last={last} gaps=0 repeats=0 bad=0")).as_bytes());
        assert_eq!(oracle.send_from(), from, "lines of a predecessor may still be under way");
    }
}

#[test]
fn a_sent_line_that_is_never_reported_is_a_violation() {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: false });
    oracle.receive(at(0), r(1, "last=0 gaps=0 repeats=0 bad=0").as_bytes());
    for n in 1..=3 {
        oracle.sent(n);
    }
    oracle.receive(at(1), r(2, "last=2 gaps=0 repeats=0 bad=0").as_bytes());
    assert_eq!((oracle.all_reported(), oracle.verdict().undelivered), (false, 1));
    oracle.close(at(2));
    assert_eq!(kinds(&oracle.verdict()), [Kind::Undelivered]);
}

#[test]
fn a_report_of_lines_that_were_never_sent_is_a_violation() {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: false });
    oracle.receive(at(0), r(1, "last=0 gaps=0 repeats=0 bad=0").as_bytes());
    oracle.sent(1);
    oracle.receive(at(1), r(2, "last=2 gaps=0 repeats=0 bad=0").as_bytes());
    oracle.receive(at(2), r(3, "last=1 gaps=0 repeats=0 bad=0").as_bytes());
    assert_eq!(kinds(&oracle.verdict()), [Kind::Reported, Kind::Reported]);
}

#[test]
fn an_outage_is_measured_from_byte_to_byte_and_by_the_guests_clock() {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: false });
    oracle.receive(at(0), l(1).as_bytes());
    assert!(oracle.tick(at(100)).is_empty());
    let silence = oracle.tick(at(150));
    assert!(matches!(silence[0].event, Event::Silence { after_line: 1, ms: 150 }));
    assert!(oracle.tick(at(200)).is_empty(), "one silence is told once");
    let events = oracle.receive(at(2500), l(2).as_bytes());
    assert!(matches!(events[0].event, Event::FirstByte { after_silence_ms: 2500 }));
    let expected = Outage { from: at(0), ms: 2500, after_line: 1, guest_ms: Some(1) };
    assert_eq!(events[1].event, Event::Outage(expected.clone()));
    let v = oracle.verdict();
    assert!(v.ok, "an outage as such breaks nothing");
    assert_eq!(v.outages, [expected]);
}

#[test]
fn a_violation_says_where_it_is_and_shows_the_bytes() {
    let stream = [l(1), "L 2 \u{1}garbage\n".to_string(), l(2)].concat();
    let v = judge_with(false, stream.as_bytes());
    let found = &v.first_violations[0].violation;
    assert_eq!((found.kind, found.after_line), (Kind::Corrupt, 1));
    assert_eq!(found.offset, (l(1).len() + "L 2 \u{1}garbage\n".len()) as u64);
    assert_eq!(found.context, "L 2 \\x01garbage");
}

#[test]
fn events_read_back_as_they_were_written() {
    let mut oracle = Oracle::new(Settings { silence_ms: 100, resync: false });
    let mut records = oracle.receive(at(0), [l(1), l(3)].concat().as_bytes());
    records.extend(oracle.receive(at(900), l(4).as_bytes()));
    assert!(records.len() >= 4);
    for record in records {
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record, "{text}");
    }
}
