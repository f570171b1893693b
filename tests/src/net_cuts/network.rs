//! A network of its own: a bridge in a private namespace, and a client on it that is none of the hosts. It asks, and sees everything that the guest sends.
//!
//! ```text
//!  a: tap ──┐
//!  b: tap ──┼── bridge ── tap: the client (asks, sees, judges)
//!  marks ───┘
//! ```
//! Frames arrive at the client in the order in which they entered the bridge. So when a mark has arrived that was sent after a host's death, everything that
//! this host ever sent has arrived before.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use understudy_protocol::nic::Mac;
use understudy_vmm::net::backend::{NetBackend, Sent};
use understudy_vmm::net::packet::{HEADER, Packet};
use understudy_vmm::net::tap::Tap;

use super::guest::{CLIENT, GUEST, question};
use super::judge::Judge;
use crate::lab::host::run_quiet;

/// The bridge.
pub const BRIDGE: &str = "br0";
/// A question so often.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// Whose frames are marks.
const MARKER: [u8; 6] = [0x52, 0x54, 0, 0x77, 0, 3];
/// Ethernet type for experiments (IEEE 802), of marks.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

type Shared = Arc<(Mutex<Judge>, Condvar)>;

/// See the module.
#[derive(Debug)]
pub struct Network {
    judge: Shared,
    marks: Tap,
    made: u64,
    stop: Arc<AtomicBool>,
    client: Option<JoinHandle<()>>,
}

impl Network {
    /// This process, which has no other thread yet, and all that it starts are on it from now on.
    pub fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (root can)")?;
        let ip = |words: &str| run_quiet(Command::new("ip").args(words.split(' '))).map(drop);
        ip("link set lo up")?;
        ip(&format!("link add {BRIDGE} address 02:00:00:77:00:fe type bridge forward_delay 0 stp_state 0"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        let tap = |name: &str, mac: [u8; 6]| -> Result<Tap> {
            let tap = Tap::open(name, Some(BRIDGE), 1, Mac(mac), None)?;
            tap.set_up(true).with_context(|| format!("switching {name} on"))?;
            Ok(tap)
        };
        let (client, marks) = (tap("client", CLIENT)?, tap("marks", MARKER)?);
        let judge = Shared::default();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (judge, stop) = (judge.clone(), stop.clone());
            move || {
                if let Err(e) = be_client(&client, &judge, &stop) {
                    lock(&judge).wrong.get_or_insert(format!("the client: {e:#}"));
                }
                judge.1.notify_all();
            }
        });
        Ok(Self { judge, marks, made: 0, stop, client: Some(thread) })
    }

    /// What was seen until now.
    pub fn judge(&self) -> MutexGuard<'_, Judge> {
        lock(&self.judge)
    }

    /// Everything that entered the network before this call has been seen when it returns.
    pub fn drain(&mut self, bound: Duration) -> Result<()> {
        self.made += 1;
        let number = self.made;
        let mut frame = [&CLIENT[..], &MARKER, &EXPERIMENT, &number.to_le_bytes()].concat();
        frame.resize(60, 0);
        let sent = self.marks.send(&Packet { frame, ..Packet::default() });
        ensure!(matches!(sent, Sent::Gone), "the network does not take a mark: {sent:?}");
        self.wait("everything seen", bound, |judge| judge.mark >= number)
    }

    /// Wait until `holds`; fails at once when anything is wrong.
    pub fn wait(&self, what: &str, bound: Duration, mut holds: impl FnMut(&Judge) -> bool) -> Result<()> {
        let end = Instant::now() + bound;
        let mut judge = self.judge();
        loop {
            if let Some(wrong) = &judge.wrong {
                bail!("{wrong}");
            }
            if holds(&judge) {
                return Ok(());
            }
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{what}: not within {} s", bound.as_secs());
            judge = self.judge.1.wait_timeout(judge, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(client) = self.client.take() {
            let _ = client.join();
        }
    }
}

fn lock(judge: &Shared) -> MutexGuard<'_, Judge> {
    judge.0.lock().unwrap_or_else(PoisonError::into_inner)
}

fn be_client(tap: &Tap, judge: &Shared, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; 1 << 17];
    let (mut number, mut next) = (0, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if now >= next {
            next = now + ASK_EVERY;
            number += 1;
            lock(judge).asks(number, now);
            // What the network does not take was lost on it.
            let _ = tap.send(&Packet { frame: question(number)?, ..Packet::default() });
        }
        let fd = tap.waits_on(0).context("the client's tap cannot be waited for")?;
        let left = next.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::ZERO);
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).context("waiting for packets")?;
        let mut news = false;
        while let Some(len) = tap.receive(0, &mut buffer).context("receiving")? {
            let (frame, at) = (buffer.get(HEADER..len).unwrap_or_default(), Instant::now());
            let mut judge = lock(judge);
            match frame.get(6..12) {
                Some(source) if source == GUEST => judge.frame(frame, at),
                Some(source) if source == MARKER => {
                    let mark = frame.get(14..22).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
                    judge.mark = judge.mark.max(mark);
                }
                _ => continue,
            }
            news = true;
        }
        if news {
            judge.1.notify_all();
        }
    }
    Ok(())
}
