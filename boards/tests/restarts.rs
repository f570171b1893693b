//! The board service dies, or does not even start.

mod common;

use std::fs;
use std::process::Command;

use common::{Board, Device, PATIENCE, numbered, until};
use nix::sys::signal::Signal;

/// Ranges of output that the board says may be missing, `A..B`.
fn uncertain_output(board: &Board) -> Vec<(usize, usize)> {
    let sentences = board.status().events;
    let ranges = sentences.iter().filter_map(|e| e.strip_prefix("it is not known whether output "));
    ranges
        .filter_map(|e| {
            let (from, to) = e.split_once(' ')?.0.split_once("..")?;
            Some((from.parse().ok()?, to.parse().ok()?))
        })
        .collect()
}

/// Offsets at which the board says input may be missing.
fn uncertain_input(board: &Board) -> Vec<usize> {
    let sentences = board.status().events;
    let places = sentences.iter().filter_map(|e| e.strip_prefix("it is not known whether input "));
    places.filter_map(|e| e.split_once("..")?.0.parse().ok()).collect()
}

/// Whether the device heard `sent` from `at` on, but for the ends of these ranges.
fn output_explained(heard: &[u8], sent: &[u8], at: usize, ranges: &[(usize, usize)]) -> bool {
    let Some((&(from, to), rest)) = ranges.split_first() else { return heard == &sent[at..] };
    heard.starts_with(&sent[at..from])
        && (0..=to - from).any(|k| {
            let heard = &heard[from - at..];
            heard.starts_with(&sent[from..from + k]) && output_explained(&heard[k..], sent, to, rest)
        })
}

/// Whether the machine got `said`, but for up to 1024 bytes at each of these offsets (of what it got).
fn input_explained(got: &[u8], at: usize, said: &[u8], places: &[usize]) -> bool {
    let Some((&place, rest)) = places.split_first() else { return got == said };
    let n = place - at;
    got.len() >= n
        && said.starts_with(&got[..n])
        && (0..=1024.min(said.len() - n)).any(|k| input_explained(&got[n..], place, &said[n + k..], rest))
}

#[test]
fn a_service_killed_again_and_again_loses_and_repeats_nothing_that_it_does_not_report() {
    let mut device = Device::new();
    let mut board = Board::start(&device.line());
    let mut link = board.link(1, 1, 0, 0);
    link.attached();
    let (out, mut input) = (numbered(0, 150_000), numbered(5_000_000, 60_000));
    let (mut heard, mut said) = (Vec::new(), 0);
    let (mut skipped, mut missed) = (Vec::new(), Vec::new());
    link.send(0, &out);
    for round in 1..=4 {
        // Let a part of both streams pass, then pull the plug while they flow.
        until("the streams flow", || {
            let mut buf = [0; 700];
            let n = std::io::Read::read(&mut device.master, &mut buf).unwrap_or(0);
            heard.extend_from_slice(&buf[..n]);
            if said < input.len() * round / 5 {
                said += device.say(&input[said..input.len().min(said + 500)]);
            }
            (heard.len() > out.len() * round / 5).then_some(())
        });
        board.kill();
        board.run();
        link.attached();
        skipped.extend(uncertain_output(&board));
        missed.extend(uncertain_input(&board));
    }
    device.heard = heard;
    // Nobody dies any more, so this arrives, and all that can arrive is before it.
    input.extend_from_slice(b"the end");
    until("the rest has come", || {
        said += device.say(&input[said..]);
        link.take();
        device.listen();
        (link.applied == out.len() as u64 && link.input.ends_with(b"the end")).then_some(())
    });
    device.listen();
    assert!(output_explained(&device.heard, &out, 0, &skipped), "{skipped:?}");
    assert!(input_explained(&link.input, 0, &input, &missed), "{missed:?}");
    assert_eq!(board.status().generation.0, 1);
}

#[test]
fn an_orderly_restart_is_certain_about_everything() {
    let mut device = Device::new();
    let mut board = Board::start(&device.line());
    let mut link = board.link(3, 1, 0, 0);
    link.attached();
    link.send(0, b"before ");
    link.applied_upto(7);
    device.say(b"not yet committed");
    link.expect_input(b"not yet committed");
    board.signal(Signal::SIGTERM);
    assert!(board.child.take().unwrap().wait().unwrap().success());
    link.send(7, b"after");
    board.run();
    assert_eq!(link.attached(), 7);
    device.expect(b"before after");
    let events = board.status().events.join("\n");
    assert!(events.contains("offsets and input were kept") && !events.contains("not known"), "{events}");
    // And the next host gets the input again that its checkpoint does not hold.
    let mut next = board.link(4, 1, 7, 0);
    next.expect_input(b"not yet committed");
}

#[test]
fn a_zombie_is_refused_by_a_board_that_was_restarted_too() {
    let device = Device::new();
    let mut board = Board::start(&device.line());
    board.link(5, 1, 0, 0).attached();
    board.kill();
    board.run();
    assert_eq!(board.status().generation.0, 5);
    assert_eq!(board.link(4, 1, 0, 0).fenced(), 5);
    board.link(5, 1, 0, 0).attached();
}

#[test]
fn a_second_start_is_refused_and_does_not_disturb_the_first() {
    let device = Device::new();
    let board = Board::start(&device.line());
    let mut link = board.link(1, 1, 0, 0);
    link.attached();
    let output = board.command().output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("another understudy-serial serves this device"), "{said}");
    link.send(0, b"still here");
    link.applied_upto(10);
    assert!(board.try_status().is_some());
}

/// What a service says that cannot start.
fn complaint(change: impl FnOnce(&Board) -> Command) -> String {
    let device = Device::new();
    let mut board = Board::start(&device.line());
    board.signal(Signal::SIGTERM);
    board.child.take().unwrap().wait().unwrap();
    let output = change(&board).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.starts_with("understudy-serial: ") && said.trim_end().lines().count() == 1, "one sentence: {said}");
    assert!(said.matches("os error").count() <= 1, "each thing once: {said}");
    said
}

#[test]
fn what_keeps_it_from_starting_is_said_in_a_sentence_that_helps() {
    let said = complaint(|b| {
        let mut c = b.command();
        c.args(["--line", "tty:/dev/no-such-tty"]);
        // `--line` twice is clap's to refuse; give the changed one alone.
        let mut alone = Command::new(c.get_program());
        let args: Vec<_> = c.get_args().map(ToOwned::to_owned).collect();
        let at = args.iter().position(|a| a == "--line").unwrap();
        alone.args(args[..at].iter().chain(&args[at + 2..]));
        alone
    });
    assert!(said.contains("cannot open the line /dev/no-such-tty: check that the device is plugged in"), "{said}");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let said = complaint(|b| {
        let mut b2 = b.command();
        let args: Vec<_> = b2.get_args().map(ToOwned::to_owned).collect();
        let at = args.iter().position(|a| a == "--listen").unwrap();
        b2 = Command::new(b2.get_program());
        b2.args(&args[..=at]).arg(taken.local_addr().unwrap().to_string()).args(&args[at + 2..]);
        b2
    });
    assert!(said.contains("cannot listen on 127.0.0.1:") && said.contains("no other program uses the port"), "{said}");

    let said = complaint(|b| {
        fs::remove_file(b.path("key")).unwrap();
        b.command()
    });
    assert!(said.contains("key does not exist: copy it from another node"), "{said}");

    let said = complaint(|b| {
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        fs::set_permissions(b.path("key"), readable).unwrap();
        b.command()
    });
    assert!(said.contains("run `chmod 0400"), "{said}");

    let said = complaint(|b| {
        fs::remove_dir_all(b.path("state")).unwrap();
        fs::write(b.path("state"), "a file").unwrap();
        b.command()
    });
    assert!(said.contains("choose another --state-dir"), "{said}");
}

#[test]
fn a_full_state_directory_is_met_at_the_start_and_leaves_nothing_half_made() {
    // A limit on the size of files stands for a full disk: the kernel answers at the same place.
    let limited = |b: &Board| {
        fs::remove_dir_all(b.path("state")).unwrap();
        let command = b.command();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"]);
        shell.arg(command.get_program()).args(command.get_args());
        shell
    };
    let said = complaint(limited);
    assert!(said.contains("cannot reserve room for") && said.contains("make room"), "{said}");
}

#[test]
fn the_status_command_prints_what_an_agent_reads() {
    let device = Device::new();
    let board = Board::start(&device.line());
    let serial = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-serial"));
        command.args(words).args(["--machine", "m", "--device", "gps", "--run-dir"]).arg(board.path("run"));
        command.output().unwrap()
    };
    let status = serial(&["status"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["device"], "gps");
    assert_eq!(status["owner"], serde_json::Value::Null);
    assert!(serial(&["stop"]).status.success());
    let begun = std::time::Instant::now();
    while serial(&["status"]).status.success() {
        assert!(begun.elapsed() < PATIENCE);
    }
    let gone = serial(&["status"]);
    assert!(String::from_utf8_lossy(&gone.stderr).contains("cannot talk to"));
}
