//! The whole device against a guest made of a socket.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::time::Instant;

use lab_guest::line::{Received, encode};
use understudy_protocol::control::call_once;

use super::*;
use crate::field_device::report::Kind;

const BOUND: Duration = Duration::from_secs(20);

fn configuration(dir: &Path) -> Configuration {
    Configuration {
        port: format!("unix-listen:{}", dir.join("line").display()).parse().unwrap(),
        settings: Settings { silence_ms: 200, resync: false },
        interval_us: 500,
        events: Some(dir.join("events.jsonl")),
        verdict: Some(dir.join("verdict.json")),
        control: Some(dir.join("control")),
        drain_ms: 10_000,
        tick_ms: 50,
        until_stdin_closes: false,
    }
}

/// A guest that writes a report after every line that it receives, until the line closes. `spoil` may change what it sees.
fn guest(dir: &Path, mut spoil: impl FnMut(u64, Vec<u8>) -> Vec<Vec<u8>>) {
    let start = Instant::now();
    let mut line = loop {
        match UnixStream::connect(dir.join("line")) {
            Ok(line) => break line,
            Err(why) => assert!(start.elapsed() < BOUND, "the device does not listen: {why}"),
        }
        thread::yield_now();
    };
    let mut reader = BufReader::new(line.try_clone().unwrap());
    let mut received = Received::default();
    let mut number = 0;
    loop {
        number += 1;
        let Received { last, gaps, repeats, bad } = received;
        let report = encode('R', number, &format!("last={last} gaps={gaps} repeats={repeats} bad={bad}"));
        if line.write_all(report.as_bytes()).is_err() {
            return;
        }
        let mut bytes = Vec::new();
        if reader.read_until(b'\n', &mut bytes).unwrap_or(0) == 0 {
            return;
        }
        bytes.pop();
        for piece in spoil(number, bytes) {
            received.take(&piece);
        }
    }
}

fn play(spoil: impl FnMut(u64, Vec<u8>) -> Vec<Vec<u8>> + Send + 'static) -> (tempfile::TempDir, Verdict) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    let device = thread::spawn({
        let configuration = configuration(&path);
        move || run(&configuration).unwrap()
    });
    let guest = thread::spawn({
        let path = path.clone();
        move || guest(&path, spoil)
    });
    let control = path.join("control");
    let start = Instant::now();
    let ask = |request: &Request| call_once::<_, Verdict>(&control, request, BOUND);
    while ask(&Request::Status).map_or(0, |v| v.last_reported) < 20 {
        assert!(start.elapsed() < BOUND, "the device does not get on");
        thread::yield_now();
    }
    let drained = ask(&Request::Drain { timeout_ms: 10_000 }).unwrap();
    assert!(drained.drained, "{drained:?}");
    ask(&Request::Resume).unwrap();
    let last = ask(&Request::Stop { drain_ms: 10_000 }).unwrap();
    assert_eq!(device.join().unwrap(), last);
    guest.join().unwrap();
    (dir, last)
}

#[test]
fn lines_run_both_ways_and_everything_that_was_sent_is_reported() {
    let (dir, verdict) = play(|_, bytes| vec![bytes]);
    assert!(verdict.ok && verdict.drained && verdict.undelivered == 0, "{verdict:?}");
    assert!(verdict.sent >= 20 && verdict.sent == verdict.last_reported);
    let written: Verdict = serde_json::from_slice(&std::fs::read(dir.path().join("verdict.json")).unwrap()).unwrap();
    assert_eq!(written, verdict);
    let events = std::fs::read_to_string(dir.path().join("events.jsonl")).unwrap();
    let events: Vec<Record> = events.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(events.iter().any(|r| matches!(r.event, Event::Sending { from: 1 })));
    assert!(matches!(events.last().unwrap().event, Event::Draining | Event::Tick { .. }));
}

#[test]
fn a_line_that_reaches_the_guest_twice_is_found() {
    let (_dir, verdict) = play(|number, bytes| if number == 10 { vec![bytes.clone(), bytes] } else { vec![bytes] });
    assert!(!verdict.ok);
    assert_eq!(verdict.first_violations[0].violation.kind, Kind::GuestInput);
    assert_eq!(verdict.guest_repeats, 1);
}

#[test]
fn a_line_that_never_reaches_the_guest_is_found() {
    let (_dir, verdict) = play(|number, bytes| if number == 10 { vec![] } else { vec![bytes] });
    assert!(!verdict.ok);
    assert_eq!(verdict.guest_gaps, 1);
}

#[test]
fn a_pty_of_ours_stays_open_while_no_board_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("tty");
    let place = Place::prepare(&PortName::Pty(link.clone())).unwrap();
    let port = place.open().unwrap();
    assert_eq!(port.read(&mut [0; 10]).unwrap(), None);
    let mut board = File::options().read(true).write(true).open(&link).unwrap();
    board.write_all(b"abc").unwrap();
    drop(board);
    port.wait(false, &[], 1000);
    let mut buffer = [0; 10];
    assert_eq!(port.read(&mut buffer).unwrap(), Some(3));
    assert_eq!(port.read(&mut buffer).unwrap(), None);
}
