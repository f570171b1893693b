//! The port of a card: its back end, whether the machine may speak there at all, and how its workers are woken.
//!
//! What must hold: after [`NetPort::silence`] nothing leaves any more, not even a packet that a thread was about to write; and the port is down, so that the
//! network looks for the guest's address elsewhere.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError, RwLock};

use anyhow::{Context, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::backend::{NetBackend, Sent};
use super::packet::Packet;
use crate::devices::virtio::net::Offloads;

/// See the module.
#[derive(Debug)]
pub struct NetPort {
    backend: Box<dyn NetBackend>,
    /// Held to read by whoever sends.
    live: RwLock<bool>,
    /// One a pair of queues.
    wakes: Vec<EventFd>,
    problem: Mutex<Option<String>>,
}

impl NetPort {
    /// A silent one.
    pub fn new(backend: Box<dyn NetBackend>) -> Result<Self> {
        let wake = |_| EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wakes = (0..backend.queues().max(1)).map(wake).collect::<Result<_, _>>();
        let wakes = wakes.context("cannot make what wakes a card's threads")?;
        Ok(Self { backend, live: RwLock::new(false), wakes, problem: Mutex::default() })
    }

    /// What is behind it.
    pub fn backend(&self) -> &dyn NetBackend {
        &*self.backend
    }

    /// Whether the machine may speak.
    pub fn live(&self) -> bool {
        *self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine runs here: the port comes up.
    pub fn speak(&self) -> Result<()> {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        self.backend
            .set_up(true)
            .with_context(|| format!("the port {} cannot be switched on", self.backend.describe()))?;
        *live = true;
        Ok(())
    }

    /// The machine does not run here (any more): nothing leaves from now on, and the port is down.
    pub fn silence(&self) {
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        *live = false;
        if let Err(e) = self.backend.set_up(false) {
            // It was taken away: then it is as silent as can be.
            self.note(format!("the port {} cannot be switched off: {e}", self.backend.describe()));
        }
    }

    /// Send, if the machine may speak. `None`: it may not.
    pub fn send(&self, packet: &Packet) -> Option<Sent> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.then(|| self.backend.send(packet))
    }

    /// As [`NetBackend::flush`].
    pub fn flush(&self) -> bool {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        !*live || self.backend.flush()
    }

    /// What the guest takes is another.
    pub fn set_offloads(&self, offloads: Offloads) {
        if let Err(e) = self.backend.set_offloads(offloads) {
            self.note(format!("{} does not take what the guest wants: {e}", self.backend.describe()));
        }
    }

    /// Wake the thread of a pair of queues.
    pub fn wake(&self, queue: u16) {
        if let Some(wake) = self.wakes.get(usize::from(queue)) {
            // Fails only when it is full of wakes.
            let _ = wake.write(1);
        }
    }

    /// Wake all of them.
    pub fn wake_all(&self) {
        (0..self.wakes.len() as u16).for_each(|queue| self.wake(queue));
    }

    /// What such a thread waits on.
    pub fn woken(&self, queue: u16) -> Option<BorrowedFd<'_>> {
        self.wakes.get(usize::from(queue)).map(AsFd::as_fd)
    }

    /// It has woken.
    pub fn heard(&self, queue: u16) {
        if let Some(wake) = self.wakes.get(usize::from(queue)) {
            let _ = wake.read();
        }
    }

    /// Something is wrong, for the status. True: it was not known.
    pub fn note(&self, what: String) -> bool {
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        let news = problem.as_ref() != Some(&what);
        *problem = Some(what);
        news
    }

    /// What is wrong.
    pub fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
