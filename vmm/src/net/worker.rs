//! The threads of a card, one for each pair of queues: what arrives there is brought to the device; the first of them also writes what the gate has released.
//!
//! It exists so that neither a vCPU nor a cut ever waits for the network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::backend::Sent;
use super::packet::{HEADER, Packet};
use super::port::NetPort;
use crate::core::Core;
use crate::devices::virtio::net::FRAME;

/// Packets and bytes that are taken from the port before the device is given them.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 256 << 10;
/// Bytes that are taken from the gate at once: a burst, after which others have their turn.
const BURST: usize = 256 << 10;

/// A card's threads. They end when this goes.
#[derive(Debug)]
pub struct Workers {
    port: Arc<NetPort>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Begin, for the card at this place among the machine's.
    pub fn start(core: &Arc<Core>, nic: usize, name: &str, port: Arc<NetPort>) -> Result<Self> {
        let mut workers = Self { port: port.clone(), stop: Arc::default(), threads: Vec::new() };
        for queue in 0..port.backend().queues() {
            let worker = Worker { core: core.clone(), nic, queue, port: port.clone(), stop: workers.stop.clone() };
            let thread =
                std::thread::Builder::new().name(format!("{name}-{queue}")).stack_size(256 * 1024).spawn(move || {
                    // An output that was let go leaves here.
                    understudy_protocol::urgent::this_thread();
                    worker.main();
                });
            workers.threads.push(thread.context("cannot start a network card's thread")?);
        }
        // Whatever was released before they existed.
        port.wake_all();
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.port.wake_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Worker {
    core: Arc<Core>,
    nic: usize,
    queue: u16,
    port: Arc<NetPort>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn main(&self) {
        let mut buffer = vec![0; HEADER + FRAME];
        // Whether there is something that did not go, and room for what arrives.
        let (mut blocked, mut room, mut reads) = (false, true, true);
        while !self.stop.load(Ordering::Acquire) {
            let due = self.core.with_nic(self.nic, |nic| nic.next_due()).flatten();
            if !self.wait(blocked, room && reads, due) {
                return;
            }
            self.port.heard(self.queue);
            if due.is_some() {
                self.core.with_nic(self.nic, |nic| nic.announce_due());
                self.core.settle();
            }
            if self.queue == 0 {
                blocked = !self.port.flush() || !self.write();
            }
            (room, reads) = self.read(&mut buffer, reads);
        }
    }

    /// Until something may be done, or something is due. False: there is nothing to wait on.
    fn wait(&self, to_write: bool, to_read: bool, due: Option<Duration>) -> bool {
        let Some(woken) = self.port.woken(self.queue) else { return false };
        let mut fds = vec![PollFd::new(woken, PollFlags::POLLIN)];
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, to_read);
        flags.set(PollFlags::POLLOUT, to_write);
        if let Some(fd) = self.port.backend().waits_on(self.queue)
            && !flags.is_empty()
        {
            fds.push(PollFd::new(fd, flags));
        }
        // Interrupted or not: whoever is woken looks at everything.
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            // Not a moment early: it would be asked again and again.
            PollTimeout::try_from(due + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
        });
        let _ = poll(&mut fds, timeout);
        true
    }

    /// Write what is released. False: not all of it goes now.
    fn write(&self) -> bool {
        loop {
            let Some(packets) = self.core.with_nic(self.nic, |nic| nic.take_released(BURST)) else { return true };
            if packets.is_empty() {
                return true;
            }
            let (mut sent, mut bytes, mut lost) = (0, 0, 0);
            let mut packets = packets.into_iter();
            let mut rest: Vec<Packet> = Vec::new();
            while let Some(packet) = packets.next() {
                match self.port.send(&packet) {
                    Some(Sent::Gone | Sent::InPart) => {
                        sent += 1;
                        bytes += packet.frame.len() as u64;
                    }
                    Some(Sent::Full) => {
                        rest.push(packet);
                        rest.extend(&mut packets);
                    }
                    Some(Sent::Lost(e)) => {
                        lost += 1;
                        self.complain(&e);
                    }
                    // Silent: it was discarded from the gate already.
                    None => break,
                }
            }
            let blocked = !rest.is_empty();
            self.core.with_nic(self.nic, |nic| nic.wrote(sent, bytes, lost, rest));
            // Room in the gate may be what the guest waits for.
            self.core.settle();
            if blocked {
                return false;
            }
        }
    }

    /// Bring what has arrived to the device. Whether there is room for more, and whether the port can still be read.
    fn read(&self, buffer: &mut [u8], reads: bool) -> (bool, bool) {
        if !reads {
            return (false, false);
        }
        let Some(mut room) = self.core.with_nic(self.nic, |nic| nic.has_room()) else { return (false, false) };
        let mut reads = true;
        while room && reads {
            let mut batch = Vec::new();
            let mut bytes = 0;
            while batch.len() < BATCH && bytes < BATCH_BYTES {
                match self.port.backend().receive(self.queue, buffer) {
                    Ok(Some(n)) => {
                        bytes += n;
                        batch.push(buffer[..n].to_vec());
                    }
                    Ok(None) => break,
                    // A tap whose port is down says so at each read, until it is up again.
                    Err(e) if e.raw_os_error() == Some(libc::EIO) && !self.port.live() => break,
                    Err(e) => {
                        self.complain(&e);
                        reads = false;
                        break;
                    }
                }
            }
            if batch.is_empty() {
                break;
            }
            let whole = batch.len() == BATCH || bytes >= BATCH_BYTES;
            room = self.core.arrived(self.nic, self.queue, batch);
            if !whole {
                break;
            }
        }
        (room, reads)
    }

    fn complain(&self, e: &std::io::Error) {
        let what = format!("{}: {e}", self.port.backend().describe());
        if self.port.note(what.clone()) {
            eprintln!("network card: {what}");
        }
    }
}
