//! How fast the secure stream is on this machine, beside a plain TCP stream:
//! `cargo run --release -p understudy-protocol --example secure_throughput`

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use understudy_protocol::key::Key;
use understudy_protocol::secure::{REPLICATION, SecureStream, Timeouts};

const TOTAL: usize = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for secure in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let far = listener.accept()?.0;
        let key = Key::from_bytes([7; 32], "example");
        let receiver = thread::spawn(move || {
            let mut stream: Box<dyn Read> = match secure {
                true => Box::new(SecureStream::accept(far, &key, REPLICATION, Timeouts::default()).expect("handshake")),
                false => Box::new(far),
            };
            let mut buf = vec![0; 1 << 18];
            let mut got = 0;
            while got < TOTAL {
                got += stream.read(&mut buf).expect("read").max(1);
            }
        });
        let key = Key::from_bytes([7; 32], "example");
        let mut stream: Box<dyn Write> = match secure {
            true => Box::new(SecureStream::connect(near, &key, REPLICATION, Timeouts::default())?),
            false => Box::new(near),
        };
        let data = vec![0x5a; 1 << 18];
        let begun = Instant::now();
        for _ in 0..TOTAL / data.len() {
            stream.write_all(&data)?;
        }
        receiver.join().expect("receiver");
        let rate = TOTAL as f64 / begun.elapsed().as_secs_f64() / 1e6;
        println!("{}: {rate:.0} MB/s", if secure { "secure" } else { "plain " });
    }
    Ok(())
}
