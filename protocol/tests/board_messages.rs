//! The bytes of board messages: version 1 as it stands in `corpus/` decodes for ever, and no bytes make anything panic.

use std::path::PathBuf;

use proptest::prelude::*;
use understudy_protocol::board::{
    Attach, Attached, BoardPort, Cell, Direction, Event, MAX_PAYLOAD, MachinePort, Message, PortConfig,
};
use understudy_protocol::frame::{self, Decoder, Header, Record};
use understudy_protocol::ids::{Epoch, Generation};

/// One of each, with the name of its file.
fn samples() -> Vec<(&'static str, Message)> {
    let text = || "why".to_owned();
    let (direction, from, to) = (Direction::Input, 7, 9);
    let attach = Attach {
        machine: "dispatch-1".into(),
        device: "gps".into(),
        life: Generation(2),
        tx_acked: 100,
        rx_acked: 40,
        rx_next: 50,
    };
    let attached = Attached {
        incarnation: 0x1234,
        applied: 120,
        in_base: 40,
        in_end: 60,
        window: 65536,
        cells: vec![(Cell::Baud, 115_200), (Cell::Format, 0x108), (Cell::Dtr, 1), (Cell::Rts, 0), (Cell::Break, 0)],
    };
    vec![
        ("hello", Message::Hello { incarnation: 0x1234, machine: "dispatch-1".into(), device: "gps".into() }),
        ("attach", Message::Attach(attach)),
        ("attached", Message::Attached(attached)),
        ("stale", Message::Stale { current: Generation(5) }),
        ("refused", Message::Refused { why: text() }),
        ("fenced", Message::Fenced { newer: Generation(5) }),
        ("out", Message::Out { offset: 100, bytes: b"hello".to_vec() }),
        ("out-ack", Message::OutAck { applied: 105 }),
        ("in", Message::In { offset: 50, bytes: b"$GPGGA".to_vec() }),
        ("in-ack", Message::InAck { upto: 56 }),
        ("set", Message::Set { cell: Cell::Baud, value: 9600 }),
        ("event-gap", Message::Event(Event::Gap { direction, from, to, reason: text() })),
        ("event-uncertain", Message::Event(Event::Uncertain { direction, from, to, reason: text() })),
        ("event-reset", Message::Event(Event::Reset { incarnation: 1, kept: true })),
        ("event-new-life", Message::Event(Event::NewLife { dropped: 3 })),
        ("event-busy", Message::Event(Event::Busy)),
        ("event-line-lost", Message::Event(Event::LineLost { why: text() })),
        ("event-line-back", Message::Event(Event::LineBack)),
        ("ping", Message::Ping { token: 1 }),
        ("pong", Message::Pong { token: 1 }),
        ("detach", Message::Detach),
    ]
}

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(format!("board-1-{name}.bin"))
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(Generation(3), &mut bytes).unwrap();
    bytes
}

#[test]
fn every_message_of_version_1_is_read_and_written_as_it_always_was() {
    for (name, message) in samples() {
        let file = corpus(name);
        if std::env::var_os("UNDERSTUDY_WRITE_CORPUS").is_some() && !file.exists() {
            std::fs::write(&file, encoded(&message)).unwrap();
        }
        let golden = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        assert_eq!(encoded(&message), golden, "{name}");
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        decoder.push(&golden);
        let record = decoder.next_record().unwrap().unwrap();
        assert_eq!(record.header.generation, Generation(3));
        assert_eq!(Message::from_record(&record).unwrap(), message, "{name}");
    }
}

#[test]
fn a_message_cut_short_or_with_something_after_it_is_refused() {
    for (name, message) in samples() {
        let whole = message.to_record(Generation(3));
        // What ends in data may be shorter by right, as long as one byte is left.
        let may_shrink = matches!(message, Message::Out { .. } | Message::In { .. });
        for len in 0..whole.payload.len() {
            let cut = Record { header: whole.header, payload: whole.payload[..len].to_vec() };
            assert!(Message::from_record(&cut).is_err() || may_shrink && len > 8, "{name} cut to {len}");
        }
        let mut longer = whole.clone();
        longer.payload.push(0);
        assert!(Message::from_record(&longer).is_err() || may_shrink, "{name} with a byte more");
    }
}

#[test]
fn long_sentences_are_cut_where_a_character_ends() {
    let message = Message::Refused { why: "ä".repeat(1000) };
    let Message::Refused { why } = Message::from_record(&message.to_record(Generation(1))).unwrap() else {
        panic!("another message");
    };
    assert!(why.len() <= 480 && why.chars().all(|c| c == 'ä'));
}

/// Records whose payload is damaged, with a right CRC: what fuzzing a checksummed format needs.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let one =
        (0..samples().len(), proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), 0u64..6)
            .prop_map(|(which, changes, generation)| {
                let Record { header, mut payload } = samples()[which].1.to_record(Generation(generation));
                for (at, value) in changes {
                    if !payload.is_empty() {
                        let at = at.index(payload.len());
                        payload[at] = value;
                    }
                }
                let mut bytes = Vec::new();
                frame::encode(&header, &payload, &mut bytes).unwrap();
                bytes
            });
    proptest::collection::vec(one, 1..12).prop_map(|v| v.concat())
}

fn board() -> BoardPort {
    let config = PortConfig {
        machine: "dispatch-1".into(),
        device: "gps".into(),
        incarnation: 1,
        window: 64,
        input_capacity: 64,
    };
    BoardPort::new(config, None)
}

proptest! {
    #[test]
    fn any_payload_of_any_kind_never_panics(kind: u8, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let header = Header { kind, flags: 0, epoch: Epoch(0), generation: Generation(1) };
        if let Ok(message) = Message::from_record(&Record { header, payload: payload.clone() }) {
            // What is read means what was written: nothing is silently ignored.
            prop_assert_eq!(message.to_record(Generation(1)).payload, payload);
        }
    }

    #[test]
    fn a_board_survives_any_peer(stream in damaged(), device in proptest::collection::vec(any::<u8>(), 0..100)) {
        let mut board = board();
        board.opened(1);
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        decoder.push(&stream);
        while let Ok(Some(record)) = decoder.next_record() {
            if let Ok(message) = Message::from_record(&record) {
                board.received(1, record.header.generation, message, &mut |_| Ok(()));
            }
            board.device_read(&device[..device.len() / 3]);
            let n = board.output().len() / 2;
            board.written(n);
            prop_assert!(board.pending() <= 64 && board.input_len() <= 64);
        }
    }

    #[test]
    fn a_machine_survives_any_board(stream in damaged()) {
        let mut machine = MachinePort::new("dispatch-1", "gps", Generation(3), Generation(2), 100, 50);
        machine.connected();
        machine.queue_output(100, &[7; 300]).unwrap();
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        decoder.push(&stream);
        while let Ok(Some(record)) = decoder.next_record() {
            let Ok(message) = Message::from_record(&record) else { continue };
            if machine.received(message).is_err() {
                machine.disconnected();
                machine.connected();
            }
            while let Some(message) = machine.poll_message() {
                let mut bytes = Vec::new();
                message.encode(Generation(3), &mut bytes).unwrap();
            }
            while machine.poll_event().is_some() {}
        }
    }
}
