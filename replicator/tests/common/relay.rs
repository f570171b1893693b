//! A TCP relay: the cable between two nodes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

#[derive(Default)]
struct Wire {
    /// Connections are refused.
    cut: AtomicBool,
    /// Bytes vanish, connections stay.
    silent: AtomicBool,
    /// After so many more bytes towards the target, the connection breaks (`u64::MAX` = never).
    fuse: AtomicU64,
    /// Each piece (of 64 KiB at most) towards the target takes so many ms.
    slow: AtomicU64,
    streams: Mutex<Vec<TcpStream>>,
}

pub struct Relay {
    port: u16,
    wire: Arc<Wire>,
}

impl Relay {
    pub fn start(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Arc::new(Wire { fuse: AtomicU64::new(u64::MAX), ..Wire::default() });
        let shared = wire.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(near) = stream else { return };
                if shared.cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                shared.streams.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                let (wire, from, to) = (shared.clone(), near.try_clone().unwrap(), far.try_clone().unwrap());
                thread::spawn(move || pump(&wire, from, to, true));
                let wire = shared.clone();
                thread::spawn(move || pump(&wire, far, near, false));
            }
        });
        Self { port, wire }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Break all connections and refuse new ones.
    pub fn cut(&self) {
        self.wire.cut.store(true, Ordering::SeqCst);
        self.break_connections();
    }

    /// Break all connections once.
    pub fn break_connections(&self) {
        for stream in self.wire.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Swallow everything, as a switch that died does.
    pub fn go_silent(&self) {
        self.wire.silent.store(true, Ordering::SeqCst);
    }

    /// Break after so many more bytes towards the standby.
    pub fn break_after(&self, bytes: u64) {
        self.wire.fuse.store(bytes, Ordering::SeqCst);
    }

    /// Carry at most 64 KiB in so many ms towards the standby.
    pub fn slow_down(&self, ms: u64) {
        self.wire.slow.store(ms, Ordering::SeqCst);
    }

    pub fn heal(&self) {
        self.wire.fuse.store(u64::MAX, Ordering::SeqCst);
        self.wire.silent.store(false, Ordering::SeqCst);
        self.wire.cut.store(false, Ordering::SeqCst);
    }
}

fn pump(wire: &Wire, mut from: TcpStream, mut to: TcpStream, forward: bool) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(mut n @ 1..) = from.read(&mut buffer) {
        while wire.silent.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
        let mut last = false;
        if forward {
            thread::sleep(Duration::from_millis(wire.slow.load(Ordering::SeqCst)));
            let fuse = wire.fuse.load(Ordering::SeqCst);
            if fuse < u64::MAX {
                last = fuse <= n as u64;
                n = n.min(fuse as usize);
                wire.fuse.store(if last { u64::MAX } else { fuse - n as u64 }, Ordering::SeqCst);
                wire.cut.fetch_or(last, Ordering::SeqCst);
            }
        }
        if to.write_all(&buffer[..n]).is_err() || last {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
