//! `protocol`: frames, control lines, key files, the secure handshake, board sessions.

use std::fmt::Debug;
use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use understudy_protocol::board::{BoardPort, MAX_PAYLOAD, MachinePort, Message, PortConfig};
use understudy_protocol::control::{
    BoardRequest, BoardStatus, ReplicatorRequest, ReplicatorStatus, Reply, VmmRequest, VmmStatus, encode_line,
    read_line,
};
use understudy_protocol::frame::{self, Decoder, Header, Record};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;
use understudy_protocol::secure::{REPLICATION, SecureStream, Timeouts};

use super::with_dir;
use crate::input::Input;

/// Bytes in pieces; then a record made of them.
pub fn frame(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let step = usize::from(input.byte()).max(1);
    let stream = input.rest();
    let mut decoder = Decoder::new(4096);
    let mut apart = Vec::new();
    for piece in stream.chunks(step) {
        decoder.push(piece);
        while let Ok(Some(record)) = decoder.next_record() {
            apart.push(record);
        }
    }
    // In one piece, and by the reader: the same records.
    let mut whole = Decoder::new(4096);
    whole.push(stream);
    let mut reader = stream;
    let mut payload = Vec::new();
    for record in apart {
        assert_eq!(whole.next_record().ok().flatten().as_ref(), Some(&record));
        let header = frame::read_record(&mut reader, 4096, &mut payload).ok().flatten();
        assert_eq!((header.as_ref(), &payload), (Some(&record.header), &record.payload));
    }
    assert!(!matches!(whole.next_record(), Ok(Some(_))));

    let mut input = Input::new(bytes);
    let header = Header {
        kind: input.byte(),
        flags: u16::from(input.byte()),
        epoch: Epoch(input.odd_number()),
        generation: Generation(input.odd_number()),
    };
    let payload = input.rest();
    let mut sealed = Vec::new();
    if frame::encode(&header, payload, &mut sealed).is_ok() && payload.len() <= 4096 {
        let mut decoder = Decoder::new(4096);
        decoder.push(&sealed);
        let back = decoder.next_record().ok().flatten();
        assert_eq!(back, Some(Record { header, payload: payload.to_vec() }));
    }
}

/// Lines, as every request and every reply that there is; a request that is understood reads back the same.
pub fn control(bytes: &[u8]) {
    fn request<T: Serialize + DeserializeOwned + PartialEq + Debug>(line: &[u8]) {
        if let Ok(request) = serde_json::from_slice::<T>(line) {
            let again = encode_line(&request);
            assert_eq!(serde_json::from_slice::<T>(&again).ok(), Some(request));
        }
    }
    let mut reader = bytes;
    while let Ok(Some(line)) = read_line(&mut reader) {
        request::<VmmRequest>(&line);
        request::<ReplicatorRequest>(&line);
        request::<BoardRequest>(&line);
        let _ = serde_json::from_slice::<Reply<VmmStatus>>(&line).map(|status| encode_line(&status));
        let _ = serde_json::from_slice::<Reply<ReplicatorStatus>>(&line).map(|status| encode_line(&status));
        let _ = serde_json::from_slice::<Reply<BoardStatus>>(&line).map(|status| encode_line(&status));
    }
}

/// A key file with this content.
pub fn key(bytes: &[u8]) {
    with_dir(|dir| {
        let file = dir.join("key");
        let written = fs::write(&file, bytes).and_then(|()| fs::set_permissions(&file, Permissions::from_mode(0o600)));
        if written.is_ok() {
            let _ = Key::load(&file).map_err(|e| e.to_string());
        }
    });
}

const PATIENCE: Timeouts = Timeouts { handshake: Duration::from_secs(1), dead_peer: Duration::from_secs(1) };

/// Both sides of the handshake, and a stream after it, with somebody at the other end who says this and hangs up.
pub fn handshake(bytes: &[u8]) {
    let key = Key::from_bytes([7; 32], "key");
    let mut input = Input::new(bytes);
    let role = input.byte();
    let said = input.rest();
    let Ok((near, mut far)) = sockets() else { return };
    if role % 3 < 2 {
        // What does not fit the buffers of a loopback connection would wait for the other side to read.
        let _ = far.write_all(&said[..said.len().min(16 * 1024)]).and_then(|()| far.shutdown(Shutdown::Write));
        let shaken = if role.is_multiple_of(3) {
            SecureStream::accept(near, &key, REPLICATION, PATIENCE)
        } else {
            SecureStream::connect(near, &key, REPLICATION, PATIENCE)
        };
        assert!(shaken.is_err(), "without the key nobody is let in");
        return;
    }
    // Somebody in the middle of an established stream.
    let accepting = std::thread::spawn(move || SecureStream::accept(near, &key, REPLICATION, PATIENCE));
    let Ok(ours) = SecureStream::connect(far, &Key::from_bytes([7; 32], "key"), REPLICATION, PATIENCE) else { return };
    let Ok(Ok(mut theirs)) = accepting.join() else { return };
    let Ok(mut wire) = ours.socket() else { return };
    let _ = wire.write_all(&said[..said.len().min(16 * 1024)]).and_then(|()| wire.shutdown(Shutdown::Write));
    let mut got = Vec::new();
    let read = theirs.read_to_end(&mut got);
    assert!(got.is_empty(), "{} bytes were taken from somebody without the key ({read:?})", got.len());
}

fn sockets() -> std::io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let far = TcpStream::connect(listener.local_addr()?)?;
    Ok((listener.accept()?.0, far))
}

/// Board messages with a right checksum, read by a board and by a machine.
pub fn board(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let config = PortConfig {
        machine: "dispatch-1".into(),
        device: "gps".into(),
        incarnation: 1,
        window: 64,
        input_capacity: 64,
    };
    let mut board = BoardPort::new(config, None);
    board.opened(1);
    let mut machine = MachinePort::new("dispatch-1", "gps", Generation(3), Generation(2), 100, 50);
    machine.connected();
    let _ = machine.queue_output(100, &[7; 300]);
    while !input.is_empty() {
        let (kind, generation) = (input.byte(), u64::from(input.byte()));
        let payload = input.piece().to_vec();
        let header = Header { kind, flags: 0, epoch: Epoch(0), generation: Generation(generation) };
        let Ok(message) = Message::from_record(&Record { header, payload: payload.clone() }) else { continue };
        assert_eq!(message.to_record(Generation(generation)).payload, payload, "{message:?}");
        assert!(payload.len() <= MAX_PAYLOAD);
        let before = board.ownership().generation;
        board.received(1, Generation(generation), message.clone(), &mut |_| Ok(()));
        assert!(board.ownership().generation >= before, "a generation went back");
        board.device_read(&payload[..payload.len() / 3]);
        board.written(board.output().len() / 2);
        assert!(board.pending() <= 64 && board.input_len() <= 64);
        if machine.received(message).is_err() {
            machine.disconnected();
            machine.connected();
        }
        while let Some(message) = machine.poll_message() {
            let mut out = Vec::new();
            assert!(message.encode(Generation(3), &mut out).is_ok());
        }
        while machine.poll_event().is_some() {}
    }
}
