//! A machine, its takeovers, and a board that lives.

mod common;

use common::{Board, Device, Link, exists, numbered, until};
use nix::sys::signal::Signal;
use understudy_protocol::key::Key;

#[test]
fn bytes_pass_both_ways_and_are_acknowledged() {
    let mut device = Device::new();
    let board = Board::start(&device.line());
    let mut link = board.link(1, 1, 0, 0);
    assert_eq!(link.attached(), 0);
    let text = numbered(0, 200_000);
    link.send(0, &text[..100_000]);
    link.send(90_000, &text[90_000..]); // what is known is skipped
    device.expect(&text);
    link.applied_upto(200_000);
    assert_eq!(device.say(b"$GPGGA,1\r\n"), 10);
    link.expect_input(b"$GPGGA,1\r\n");
    let status = board.status();
    assert_eq!((status.applied, status.input_base, status.input_end), (200_000, 0, 10));
    link.link.as_ref().unwrap().acknowledge_input(10);
    until("the board forgets it", || (board.status().input_base == 10).then_some(()));
    link.stop();
    until("the session is gone", || (board.status().sessions == 0).then_some(()));
}

#[test]
fn a_takeover_goes_on_exactly_where_the_line_and_the_checkpoint_stand() {
    let mut device = Device::new();
    let board = Board::start(&device.line());
    let history = numbered(0, 3000);
    let mut first = board.link(1, 1, 0, 0);
    first.attached();
    first.send(0, &history[..2000]);
    first.applied_upto(2000);
    device.say(b"abcdef");
    first.expect_input(b"abcdef");
    first.link.as_ref().unwrap().acknowledge_input(2);

    // The standby's checkpoint knows output only up to 500 as acknowledged, and has taken two bytes of input.
    let mut second = board.link(2, 1, 500, 2);
    second.send(500, &history[500..2500]);
    assert_eq!(second.attached(), 2000);
    second.expect_input(b"cdef");
    assert_eq!(first.fenced(), 2);
    // The old host wakes up and has more to say.
    first.send(2000, b"!!!! from the dead !!!!");
    let mut zombie = board.link(1, 1, 0, 0);
    assert_eq!(zombie.fenced(), 2);
    second.send(2500, &history[2500..]);
    second.applied_upto(3000);
    device.expect(&history);
    assert_eq!(board.status().generation.0, 2);
}

#[test]
fn input_that_arrives_while_nobody_is_attached_waits_for_the_next_owner() {
    let mut device = Device::new();
    let board = Board::start(&device.line());
    let mut first = board.link(1, 1, 0, 0);
    first.attached();
    drop(first);
    until("the session is gone", || (board.status().sessions == 0).then_some(()));
    device.say(b"while you were dead");
    until("the board has read it", || (board.status().input_end == 19).then_some(()));
    let mut second = board.link(2, 1, 0, 0);
    second.expect_input(b"while you were dead");
}

#[test]
fn a_cold_boot_starts_both_streams_anew_and_says_what_was_dropped() {
    let mut device = Device::new();
    let board = Board::start(&device.line());
    let mut first = board.link(1, 1, 0, 0);
    first.attached();
    first.send(0, b"old life ");
    first.applied_upto(9);
    device.say(b"for the old one");
    first.expect_input(b"for the old one");
    let mut second = board.link(2, 2, 0, 0);
    assert_eq!(second.attached(), 0);
    second.send(0, b"new life");
    second.applied_upto(8);
    device.expect(b"old life new life");
    device.say(b"hello");
    second.expect_input(b"hello");
    let events = board.status().events.join("\n");
    assert!(events.contains("15 bytes of input for its former life were dropped"), "{events}");
}

#[test]
fn a_wrong_key_and_a_missing_key_are_refused_with_a_sentence_and_mended_without_a_restart() {
    let device = Device::new();
    let board = Board::start(&device.line());
    let mut config = board.config();
    config.key_file = board.path("other-key");
    let mut link = Link::start(config.clone(), 1, 1, 0, 0);
    let why = link.refused();
    assert!(why.contains("does not exist") && why.contains("keygen"), "{why}");
    Key::generate(&config.key_file).unwrap();
    let why = link.refused();
    assert!(why.contains("does not hold the same key: compare"), "{why}");
    until("the board has said so too", || board.log().contains("does not hold the same key").then_some(()));
    std::fs::remove_file(&config.key_file).unwrap();
    std::fs::copy(board.path("key"), &config.key_file).unwrap();
    link.attached();
}

#[test]
fn another_machine_or_device_is_refused_by_name() {
    let device = Device::new();
    let board = Board::start(&device.line());
    let mut config = board.config();
    config.machine = "intruder".into();
    let why = Link::start(config, 1, 1, 0, 0).refused();
    assert!(why.contains("serves device gps of machine m, not device gps of machine intruder"), "{why}");
}

#[test]
fn a_frozen_board_is_noticed_and_the_session_resumes_when_it_thaws() {
    let mut device = Device::new();
    let mut board = Board::start(&device.line());
    let mut link = board.link(1, 1, 0, 0);
    link.attached();
    board.signal(Signal::SIGSTOP);
    let why = link.wait("the link notices", |e| match e {
        understudy_boards::client::LinkEvent::Disconnected { why } => Some(why.clone()),
        _ => None,
    });
    assert!(why.contains("was not heard for"), "{why}");
    link.send(0, b"patience");
    board.signal(Signal::SIGCONT);
    link.attached();
    link.applied_upto(8);
    device.expect(b"patience");
}

#[test]
fn a_device_that_sends_without_end_is_held_back_not_lost() {
    let mut device = Device::new();
    let board = Board::start(&device.line());
    let mut link = board.link(1, 1, 0, 0);
    link.attached();
    // More than the board keeps: it stops reading, the line's buffers fill, the device must wait.
    let text = numbered(0, 400_000);
    let mut said = 0;
    let capacity = board.status().input_capacity;
    until("the board's log is full", || {
        said += device.say(&text[said..]);
        (board.status().input_end == capacity).then_some(())
    });
    until("the owner was told", || {
        link.take();
        link.seen.iter().any(|e| format!("{e:?}").contains("held back")).then_some(())
    });
    until("all of it has come", || {
        said += device.say(&text[said..]);
        link.take();
        link.link.as_ref().unwrap().acknowledge_input(link.input.len() as u64);
        (link.input.len() == text.len()).then_some(())
    });
    assert!(link.input == text);
}

#[test]
fn a_tcp_device_may_come_late_go_and_come_back() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let board = Board::start(&format!("tcp:{address}"));
    let mut link = board.link(1, 1, 0, 0);
    link.attached();
    link.send(0, b"first");
    assert!(!board.status().line_open);
    let listener = std::net::TcpListener::bind(address).unwrap();
    for text in [b"first", b"again"] {
        let (mut device, _) = listener.accept().unwrap();
        let mut heard = [0; 5];
        std::io::Read::read_exact(&mut device, &mut heard).unwrap();
        assert_eq!(&heard, text);
        drop(device);
        until("the loss is noticed", || (!board.status().line_open).then_some(()));
        if text == b"first" {
            link.send(5, b"again");
        }
    }
}

#[test]
fn an_orderly_end_leaves_no_file_that_claims_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("gps");
    let mut board = Board::start(&format!("pty:{}", link.display()));
    assert!(exists(&link));
    board.signal(Signal::SIGTERM);
    assert!(board.child.take().unwrap().wait().unwrap().success());
    for gone in [link, board.path("run/serial-gps.pid"), board.path("run/serial-gps.sock")] {
        assert!(!exists(&gone), "{}", gone.display());
    }
}
