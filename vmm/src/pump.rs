//! A port's pump: the one thread that moves bytes between the port's stream and its backend.
//!
//! It exists so that neither a vCPU nor a cut ever waits for the network: everybody else only leaves a message.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use understudy_boards::client::LinkEvent;

use crate::backend::{Backend, BackendConfig, Start};
use crate::core::{Core, Event};

/// Most bytes in one send.
const PIECE: usize = 16 * 1024;

/// A message to a pump.
#[derive(Debug)]
pub enum PumpMsg {
    /// The gate has let something out, or inputs are covered.
    Work,
    /// The backend has something to say.
    Event(LinkEvent),
    /// End.
    Stop,
}

/// What the status shows of a port's other end.
#[derive(Debug, Clone, Default)]
pub struct LinkStatus {
    /// What it is.
    pub backend: String,
    /// `connected`, `connecting`, `fenced`, `local`.
    pub link: String,
}

/// A running pump.
pub struct Pump {
    inbox: Sender<PumpMsg>,
    thread: Option<JoinHandle<()>>,
    /// For the status.
    pub status: Arc<Mutex<LinkStatus>>,
}

impl Pump {
    /// Start the backend and the pump of the port called `name`, which is number `port` of [`crate::hardware::Hardware::ports`].
    pub fn start(core: &Arc<Core>, port: usize, name: String, config: &BackendConfig, at: Start) -> Result<Self> {
        let (inbox, messages) = channel();
        let link = if matches!(config, BackendConfig::Board { .. }) { "connecting" } else { "local" };
        let events = {
            let (inbox, core) = (inbox.clone(), core.clone());
            Arc::new(move |event: LinkEvent| {
                if let LinkEvent::Fenced { newer } = &event {
                    // At once, whatever the pump is doing.
                    core.tell(Event::Fenced(*newer));
                }
                let _ = inbox.send(PumpMsg::Event(event));
            })
        };
        let (backend, described) = config.start(&core.machine, at, events)?;
        let status = Arc::new(Mutex::new(LinkStatus { backend: described, link: link.into() }));
        let mut worker = Worker {
            core: core.clone(),
            port,
            name: name.clone(),
            backend: Some(backend),
            messages,
            status: status.clone(),
            sent: at.tx_acked,
            covered: at.rx_delivered,
        };
        let thread = std::thread::Builder::new()
            .name(name)
            .stack_size(256 * 1024)
            .spawn(move || {
                // An output that was let go leaves here.
                understudy_protocol::urgent::this_thread();
                worker.main();
            })
            .context("cannot start a serial port's thread")?;
        // Whatever was written before the pump existed.
        let _ = inbox.send(PumpMsg::Work);
        Ok(Self { inbox, thread: Some(thread), status })
    }

    /// Where to leave messages.
    pub fn inbox(&self) -> Sender<PumpMsg> {
        self.inbox.clone()
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        let _ = self.inbox.send(PumpMsg::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Worker {
    core: Arc<Core>,
    port: usize,
    name: String,
    backend: Option<Box<dyn Backend>>,
    messages: Receiver<PumpMsg>,
    status: Arc<Mutex<LinkStatus>>,
    /// Output offset up to which the backend has been given the stream.
    sent: u64,
    covered: u64,
}

impl Worker {
    fn main(&mut self) {
        while let Ok(message) = self.messages.recv() {
            match message {
                PumpMsg::Work => self.work(),
                PumpMsg::Event(event) => self.event(event),
                PumpMsg::Stop => break,
            }
        }
        if let Some(backend) = self.backend.take() {
            backend.stop();
        }
    }

    /// Send what is released, acknowledge what is covered.
    fn work(&mut self) {
        while let Some(backend) = &mut self.backend {
            let sent = self.sent;
            let news = self.core.with_port(self.port, |p| (p.stream.released(sent, PIECE), p.stream.rx_covered()));
            let Some((bytes, covered)) = news else { return };
            if covered > self.covered {
                self.covered = covered;
                backend.acknowledge_input(covered);
            }
            if bytes.is_empty() {
                return;
            }
            let arrived = backend.send(sent, &bytes);
            self.sent += bytes.len() as u64;
            if let Some(upto) = arrived {
                self.acknowledged(upto);
            }
        }
    }

    fn acknowledged(&mut self, upto: u64) {
        let result = self.core.with_port(self.port, |p| p.stream.acknowledge(upto));
        if let Some(Err(e)) = result {
            self.say(&e.to_string());
        }
        self.core.settle();
    }

    fn event(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Attached { applied } => {
                self.link("connected");
                let result = self.core.with_port(self.port, |p| p.stream.join(applied));
                if let Some(Err(e)) = result {
                    self.say(&e.to_string());
                }
                self.core.settle();
                self.work();
            }
            LinkEvent::OutputApplied { upto } => self.acknowledged(upto),
            LinkEvent::Input { offset, bytes } => {
                if self.core.with_port(self.port, |p| p.queue_input(offset, &bytes)) == Some(false) {
                    self.say("more input than this port keeps; the surplus is lost");
                }
                self.core.settle();
                self.work();
            }
            LinkEvent::Fenced { newer } => {
                self.link("fenced");
                self.say(&format!("the line belongs to generation {newer}"));
            }
            LinkEvent::Refused { why } => {
                self.link("refused");
                self.say(&format!("the board refuses this machine: {why}"));
            }
            LinkEvent::Disconnected { why } => {
                self.link("connecting");
                self.say(&format!("no connection to the board: {why}"));
            }
            LinkEvent::Notice { what } => self.say(&what),
        }
    }

    fn link(&self, link: &str) {
        if let Ok(mut status) = self.status.lock() {
            status.link = link.into();
        }
    }

    fn say(&self, what: &str) {
        eprintln!("{}: {what}", self.name);
    }
}
