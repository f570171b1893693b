//! A real iSCSI target, tgt, in a process of its own: on a private port, controlled through a private socket, backed by a file. It needs no kernel module.

#![allow(dead_code)] // Not every test program uses all of it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use understudy_hostio::iscsi::{Patience, load_from};
use understudy_protocol::iscsi::Url;

pub const TARGET: &str = "iqn.2026-11.test:disk";

/// Where the executables of the peer are: installed, or taken apart under `target/iscsi` (tests/iscsi-peer does that).
fn peer() -> Option<(PathBuf, PathBuf)> {
    let own = std::env::var_os("UNDERSTUDY_ISCSI_ROOT").map(PathBuf::from);
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("target/iscsi/root");
    [own, Some(workspace), Some(PathBuf::from("/"))].into_iter().flatten().find_map(|root| {
        let tgtd = root.join("usr/sbin/tgtd");
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        tgtd.exists().then_some((root.join("usr/sbin"), libraries))
    })
}

pub struct Tgt {
    pub dir: tempfile::TempDir,
    sbin: PathBuf,
    libraries: PathBuf,
    port: u16,
    control: u32,
    pub chap: bool,
    daemon: Option<Child>,
}

static NEXT: AtomicU32 = AtomicU32::new(1);

pub const SIZE: u64 = 32 << 20;

impl Tgt {
    /// Started, with one logical unit (number 1). `None`: it is not here, which is said.
    pub fn start(chap: bool) -> Option<Tgt> {
        let Some((sbin, libraries)) = peer() else {
            println!("SKIPPED: no tgtd here; tests/iscsi-peer fetches it, apt-get install tgt libiscsi7 installs it");
            return None;
        };
        let library = libraries.join("libiscsi.so.7");
        if library.exists() {
            load_from(&library.display().to_string());
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("unit")).unwrap().set_len(SIZE).unwrap();
        // Freed at once for the target; nobody else asks for it in between.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let control = std::process::id() % 300 * 100 + NEXT.fetch_add(1, Ordering::Relaxed);
        let mut tgt = Tgt { dir, sbin, libraries, port, control, chap, daemon: None };
        tgt.run();
        Some(tgt)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.sbin.join(name));
        command.env("TGT_IPC_SOCKET", self.dir.path().join("control")).env("LD_LIBRARY_PATH", &self.libraries);
        command
            .args(["-C", &self.control.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    fn admin(&self, arguments: &str) -> bool {
        let mut command = self.command("tgtadm");
        command.args(["--lld", "iscsi"]).args(arguments.split(' '));
        command.status().unwrap().success()
    }

    /// Start the daemon.
    pub fn run(&mut self) {
        let portal = format!("portal=127.0.0.1:{}", self.port);
        self.daemon = Some(self.command("tgtd").args(["-f", "--iscsi", &portal]).spawn().unwrap());
        wait("the target daemon answers", || self.admin("--op show --mode sys"));
        assert!(self.admin(&format!("--mode target --op new --tid 1 -T {TARGET}")));
        let unit = self.dir.path().join("unit");
        assert!(self.admin(&format!("--mode logicalunit --op new --tid 1 --lun 1 -b {}", unit.display())));
        if self.chap {
            assert!(self.admin("--mode account --op new --user me --password correcthorse12"));
            assert!(self.admin("--mode account --op bind --tid 1 --user me"));
        }
        assert!(self.admin("--mode target --op bind --tid 1 -I ALL"));
    }

    /// As if its host had lost its power.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            let _ = std::fs::remove_file(self.dir.path().join(format!("control.{}", self.control)));
        }
    }

    pub fn url(&self) -> Url {
        self.url_at(self.port)
    }

    pub fn url_at(&self, port: u16) -> Url {
        format!("iscsi://127.0.0.1:{port}/{TARGET}/1").parse().unwrap()
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Short, so that tests are.
pub fn impatient() -> Patience {
    Patience { again: Duration::from_millis(50), ask: Duration::from_millis(300), lost: Duration::from_millis(600) }
}

pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(30), "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A network between the initiator and the target that can be cut, or swallow everything.
pub struct Network {
    pub port: u16,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    down: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
}

impl Network {
    pub fn to(port: u16) -> Network {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let network = Network {
            port: listener.local_addr().unwrap().port(),
            streams: Arc::default(),
            down: Arc::default(),
            silent: Arc::default(),
        };
        let (streams, down, silent) = (network.streams.clone(), network.down.clone(), network.silent.clone());
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if down.load(Ordering::Acquire) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to, silent) = (from.try_clone().unwrap(), to.try_clone().unwrap(), silent.clone());
                    std::thread::spawn(move || pump(from, to, &silent));
                }
                streams.lock().unwrap().extend([near, far]);
            }
        });
        network
    }

    /// All connections break.
    pub fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// No new ones are possible, or are again.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Release);
        if down {
            self.cut();
        }
    }

    /// Everything is swallowed, and nothing breaks; or not any more: but what was swallowed is lost, so the connections break.
    pub fn set_silent(&self, silent: bool) {
        self.silent.store(silent, Ordering::Release);
        if !silent {
            self.cut();
        }
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        if !silent.load(Ordering::Acquire) && to.write_all(&bytes[..n]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
