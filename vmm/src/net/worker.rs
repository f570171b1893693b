//! The threads of a card, one for each pair of queues: what arrives there is brought to the device; the first of them also writes what the gate has released,
//! and takes what a guest sends that sends much.
//!
//! It exists so that neither a vCPU nor a cut ever waits for the network. They are urgent while packets wait for commits, and ordinary threads otherwise.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use understudy_protocol::urgent;

use super::burst::{self, BURST, Reader};
use super::port::NetPort;
use crate::core::Core;

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
        let mut reader = Reader::new(self.queue);
        // Whether there is something that did not go, and room for what arrives.
        let (mut blocked, mut room, mut reads) = (false, true, true);
        while !self.stop.load(Ordering::Acquire) {
            let (due, open) =
                self.core.with_nic(self.nic, |nic| (nic.next_due(), nic.gate.is_open())).unwrap_or_default();
            // An output that was let go leaves here.
            if open {
                urgent::ordinary()
            } else {
                urgent::this_thread()
            }
            if !self.wait(blocked, room && reads, due) {
                return;
            }
            self.port.heard(self.queue);
            if due.is_some() {
                self.core.with_nic(self.nic, |nic| nic.announce_due());
                self.core.settle();
            }
            if self.queue == 0 {
                blocked = !self.port.flush() || !self.send();
            }
            (room, reads) = self.read(&mut reader, reads);
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

    /// Take what the guest sends, if that is left to this thread, and write what is released. False: not all of it goes now.
    fn send(&self) -> bool {
        loop {
            let more = self.core.take_deferred(self.nic);
            if !self.write() {
                return false;
            }
            if !more {
                return true;
            }
        }
    }

    /// Write what is released. False: not all of it goes now.
    fn write(&self) -> bool {
        loop {
            let Some(packets) = self.core.with_nic(self.nic, |nic| nic.take_released(BURST)) else { return true };
            if packets.is_empty() {
                return true;
            }
            let mut written = burst::write(&self.port, packets);
            if let Some(e) = written.why.take() {
                self.complain(&e);
            }
            let blocked = !written.rest.is_empty();
            self.core.with_nic(self.nic, |nic| nic.wrote(written));
            // Room in the gate may be what the guest waits for.
            self.core.settle();
            if blocked {
                return false;
            }
        }
    }

    /// Bring what has arrived to the device. Whether there is room for more, and whether the port can still be read.
    fn read(&self, reader: &mut Reader, reads: bool) -> (bool, bool) {
        if !reads {
            return (false, false);
        }
        let room = self.core.with_nic(self.nic, |nic| nic.has_room(self.queue));
        let (mut room, mut reads, mut more) = (room.unwrap_or(false), true, true);
        let mut batch = Vec::new();
        while room && more {
            more = match reader.read(self.port.backend(), &mut batch) {
                Ok(more) => more,
                // A tap whose port is down says so at each read, until it is up again.
                Err(e) if e.raw_os_error() == Some(libc::EIO) && !self.port.live() => false,
                Err(e) => {
                    self.complain(&e);
                    reads = false;
                    false
                }
            };
            if batch.is_empty() {
                break;
            }
            room = self.core.arrived(self.nic, self.queue, &mut batch);
            reader.give_back(batch.drain(..));
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
