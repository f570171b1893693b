//! The secure stream over real sockets on the loopback.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use understudy_protocol::key::Key;
use understudy_protocol::secure::{BOARD, REPLICATION, REPLICATION_IN_CLEAR, SecureError, SecureStream, Timeouts};

const QUICK: Timeouts = Timeouts { handshake: Duration::from_millis(400), dead_peer: Duration::from_secs(2) };

fn key(byte: u8) -> Key {
    Key::from_bytes([byte; 32], "/etc/understudy/key")
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

type Shaken = Result<SecureStream, SecureError>;

fn shake(ours: (Key, &'static str), theirs: (Key, &'static str)) -> (Shaken, Shaken) {
    let (near, far) = sockets();
    let accepting = thread::spawn(move || SecureStream::accept(far, &theirs.0, theirs.1, Timeouts::default()));
    (SecureStream::connect(near, &ours.0, ours.1, Timeouts::default()), accepting.join().unwrap())
}

fn pair() -> (SecureStream, SecureStream) {
    let (a, b) = shake((key(1), BOARD), (key(1), BOARD));
    (a.unwrap(), b.unwrap())
}

#[test]
fn bytes_of_any_amount_arrive_in_both_directions_at_once() {
    let (a, b) = pair();
    let data: Vec<u8> = (0..1_500_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    thread::scope(|scope| {
        for (stream, step) in [(a, 1000), (b, 400_000)] {
            let (mut reader, mut writer) = stream.split();
            let data = &data;
            scope.spawn(move || data.chunks(step).for_each(|piece| writer.write_all(piece).unwrap()));
            scope.spawn(move || {
                let mut got = vec![0; data.len()];
                reader.read_exact(&mut got).unwrap();
                assert!(&got == data);
            });
        }
    });
}

#[test]
fn two_ends_may_go_on_in_clear_after_they_have_proved_the_key() {
    let (a, b) = shake((key(1), REPLICATION_IN_CLEAR), (key(1), REPLICATION_IN_CLEAR));
    let data: Vec<u8> = (0..1_500_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
    thread::scope(|scope| {
        for (stream, step, take) in [(a.unwrap(), 1000, 100_000), (b.unwrap(), 400_000, 37)] {
            let (mut reader, mut writer) = stream.in_clear().split();
            let data = &data;
            scope.spawn(move || data.chunks(step).for_each(|piece| writer.write_all(piece).unwrap()));
            scope.spawn(move || {
                let mut got = vec![0; data.len()];
                got.chunks_mut(take).for_each(|piece| reader.read_exact(piece).unwrap());
                assert!(&got == data);
            });
        }
    });
    let (a, b) = shake((key(1), REPLICATION_IN_CLEAR), (key(2), REPLICATION_IN_CLEAR));
    assert!(a.is_err() && b.is_err(), "without the key nothing is agreed");
    let (a, b) = shake((key(1), REPLICATION), (key(1), REPLICATION_IN_CLEAR));
    for result in [a, b] {
        let sentence = result.unwrap_err().to_string();
        assert!(sentence.ends_with("the same choice of encryption"), "{sentence}");
    }
}

#[test]
fn a_wrong_key_is_named_on_both_sides() {
    let (a, b) = shake((key(1), BOARD), (key(2), BOARD));
    for result in [a, b] {
        let sentence = result.unwrap_err().to_string();
        assert!(
            sentence.ends_with("does not hold the same key: compare /etc/understudy/key on both sides"),
            "{sentence}"
        );
    }
}

#[test]
fn another_protocol_is_named_on_both_sides() {
    let (a, b) = shake((key(1), BOARD), (key(1), REPLICATION));
    let (a, b) = (a.unwrap_err().to_string(), b.unwrap_err().to_string());
    assert!(a.contains("speaks understudy-replication/1, this side speaks understudy-board/1"), "{a}");
    assert!(b.contains("speaks understudy-board/1, this side speaks understudy-replication/1"), "{b}");
}

#[test]
fn a_silent_peer_and_a_dripping_peer_end_at_the_deadline() {
    for drip in [false, true] {
        let (mut near, far) = sockets();
        let begun = Instant::now();
        let accepting = thread::spawn(move || SecureStream::accept(far, &key(1), BOARD, QUICK));
        if drip {
            for byte in b"USTYhs1\n" {
                let _ = near.write_all(&[*byte]);
                thread::sleep(Duration::from_millis(100));
            }
        }
        let error = accepting.join().unwrap().unwrap_err();
        assert!(matches!(error, SecureError::Timeout { .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(3));
    }
}

#[test]
fn something_else_on_the_port_is_called_that() {
    let (mut near, far) = sockets();
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let error = SecureStream::accept(far, &key(1), BOARD, QUICK).unwrap_err();
    assert!(matches!(error, SecureError::NotUnderstudy { .. }), "{error}");

    let (near, mut far) = sockets();
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    let error = SecureStream::connect(near, &key(1), BOARD, QUICK).unwrap_err();
    assert!(matches!(error, SecureError::NotUnderstudy { .. }), "{error}");
}

/// Two secure ends with a thread between them that passes the bytes through `change`, which sees the count of bytes so far.
fn through(change: impl Fn(usize, &mut [u8]) + Send + 'static) -> (Shaken, Shaken) {
    let (near, mut near_wire) = sockets();
    let (far, mut far_wire) = sockets();
    let (mut back_from, mut back_to) = (far_wire.try_clone().unwrap(), near_wire.try_clone().unwrap());
    thread::spawn(move || io::copy(&mut back_from, &mut back_to));
    thread::spawn(move || {
        let mut seen = 0;
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = near_wire.read(&mut buf) {
            change(seen, &mut buf[..n]);
            seen += n;
            if far_wire.write_all(&buf[..n]).is_err() {
                break;
            }
        }
    });
    let accepting = thread::spawn(move || SecureStream::accept(far, &key(1), BOARD, QUICK));
    (SecureStream::connect(near, &key(1), BOARD, QUICK), accepting.join().unwrap())
}

#[test]
fn a_changed_bit_after_the_handshake_breaks_the_stream_and_delivers_nothing() {
    // Handshake bytes of the connecting side: 8 + 1 + 18 + 2 + 48 + 2 + 16.
    const SHAKE: usize = 95;
    let (a, b) = through(|seen, bytes| {
        if seen >= SHAKE {
            bytes[2] ^= 1;
        }
    });
    let (mut a, mut b) = (a.unwrap(), b.unwrap());
    a.write_all(b"attack at dawn").unwrap();
    let mut buf = [0; 64];
    assert_eq!(b.read(&mut buf).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!(b.read(&mut buf).unwrap_err().kind(), io::ErrorKind::InvalidData, "it stays broken");
}

#[test]
fn a_replayed_opening_is_not_taken_for_a_peer() {
    // Record what a genuine client sends first…
    let (near, mut wire) = sockets();
    let client = thread::spawn(move || SecureStream::connect(near, &key(1), BOARD, QUICK).is_ok());
    let mut opening = [0; 8 + 1 + 18 + 2 + 48];
    wire.read_exact(&mut opening).unwrap();
    drop(wire);
    assert!(!client.join().unwrap());
    // …and send it again, with a confirmation made up.
    let (mut near, far) = sockets();
    let accepting = thread::spawn(move || SecureStream::accept(far, &key(1), BOARD, QUICK));
    near.write_all(&opening).unwrap();
    let mut answer = [0; 1 + 2 + 48];
    near.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 0, "the opening itself is genuine");
    near.write_all(&[0, 16]).unwrap();
    near.write_all(&[0; 16]).unwrap();
    assert!(accepting.join().unwrap().is_err());
}

#[test]
fn a_read_timeout_loses_nothing() {
    let (a, mut b) = pair();
    let (mut reader, _writer) = a.split();
    reader.set_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut buf = [0; 64];
    assert!(matches!(reader.read(&mut buf).unwrap_err().kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
    b.write_all(b"late").unwrap();
    reader.set_timeout(Some(Duration::from_secs(5))).unwrap();
    reader.read_exact(&mut buf[..4]).unwrap();
    assert_eq!(&buf[..4], b"late");
    drop(b);
    assert_eq!(reader.read(&mut buf).unwrap(), 0);
}
