//! Sessions of several paths: their frames, the door, a whole session under whatever a peer says; and Corosync's configuration.

use std::sync::Arc;
use std::time::Duration;

use understudy_crm::planes;
use understudy_replicator::paths::core::{Core, Next, Outgoing, Settings};
use understudy_replicator::paths::door::{Door, Knock};
use understudy_replicator::paths::wire::{Frame, Level, SessionId};

use crate::input::Input;

/// A window that short inputs reach.
const WINDOW: u64 = 300;

/// Bytes as frames; then a session whose peer says them.
pub fn paths(bytes: &[u8]) {
    if let Ok(Some((frame, len))) = Frame::parse(bytes) {
        assert!(len <= bytes.len());
        let again = frame.encode();
        let (parsed, _) = Frame::parse(&again).ok().flatten().expect("what was understood can be said again");
        // (A sentence need not be UTF-8, nor short enough once it is.)
        assert!(parsed == frame || matches!(frame, Frame::Reject(_)));
        let door = Door::<()>::default();
        assert!(!matches!(door.knock(&frame), Knock::Join(..)), "nobody joins a session that there is not");
    }
    session(Input::new(bytes));
}

fn session(mut input: Input<'_>) {
    let mut core = Core::new(Settings { window: WINDOW, ..Settings::default() }, 2);
    let mut now = Duration::ZERO;
    let mut up = [core.attach(0, now), core.attach(1, now)];
    let (mut written, mut read) = (0, 0);
    for _ in 0..64 {
        let path = usize::from(input.byte() & 1);
        now += Duration::from_millis(u64::from(input.byte()));
        match input.byte() % 8 {
            0 => written += core.write(&[7; 50]) as u64,
            1 => {
                let mut buf = [0; 40];
                read += core.read(&mut buf) as u64;
            }
            2 => core.tick(now),
            3 => {
                let (Some(incarnation), next) = (up[path], up[path].map(|i| core.next(path, i, now))) else { continue };
                if let Some(Next::Send(Outgoing::Data(data))) = next {
                    assert!(matches!(Frame::parse(&data), Ok(Some((Frame::Data(..), _)))));
                }
                assert!(core.incarnation(path).is_none_or(|known| known == incarnation) || up[path].is_some());
            }
            4 => {
                if let Some(incarnation) = up[path].take() {
                    core.detach(path, incarnation, "broken", now);
                }
            }
            5 => up[path] = core.attach(path, now),
            _ => {
                let (a, b) = (input.odd_number(), input.odd_number());
                let level = Level { received: a, limit: b };
                let frame = match input.byte() % 9 {
                    0 => Frame::Ack(level),
                    1 => Frame::Update(level),
                    2 => Frame::Pong(u64::from(input.byte()), level),
                    3 => Frame::Ping(a),
                    4 => Frame::Close(a),
                    5 => Frame::Open { session: SessionId([0; 16]), path: 0, paths: 2 },
                    // As the wire allows: not empty, and its end is a number.
                    _ => Frame::Data(a.min(u64::MAX - 300), vec![1; 1 + usize::from(input.byte())]),
                };
                let Some(incarnation) = up[path] else { continue };
                if core.heard(path, incarnation, frame, now).is_err() {
                    core.detach(path, incarnation, "it breaks the rules", now);
                    up[path] = None;
                }
            }
        }
        assert!(written <= u64::MAX / 2 && read <= WINDOW * 64);
    }
    let reports = core.report(now);
    assert!(reports.iter().filter(|path| path.active).count() <= 1);
    core.close();
    let holder = Arc::new(core);
    let mut door = Door::default();
    let id = SessionId([3; 16]);
    door.admit(id, &holder);
    assert!(matches!(door.knock(&Frame::Join { session: id, path: 9 }), Knock::Join(_, 9)));
}

/// Any text is a configuration with some members, or none.
pub fn corosync(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for member in planes::members(&text) {
        assert!(member.links.iter().all(|link| !link.is_empty()));
    }
}
