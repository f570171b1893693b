//! The machine's end of a serial line: a [`BoardLink`] keeps one port of one machine attached to its board.
//!
//! The VMM starts a link when the machine runs (never on a standby), hands it output bytes *after* their checkpoint was
//! committed, and tells it which inputs are contained in a committed checkpoint. Everything else is the link's: connecting
//! and reconnecting, attaching under the machine's generation, sending again what the board has not applied, dropping
//! inputs that were handed over already.

use std::path::PathBuf;

use understudy_protocol::ids::Generation;

/// Where the board is, and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkConfig {
    /// `HOST:PORT` of the board service.
    pub address: String,
    /// The device's name at the board.
    pub device: String,
    /// The machine's name.
    pub machine: String,
    /// The cluster's key.
    pub key_file: PathBuf,
}

/// What a link tells the VMM. Offsets are bytes since the machine's cold boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The session is up; the board's line has taken all output before `applied`.
    Attached {
        /// Offset of the first output byte that the line has not taken.
        applied: u64,
    },
    /// The line has taken all output before `upto`: it need not be kept any more.
    OutputApplied {
        /// Offset of the first output byte that the line has not taken.
        upto: u64,
    },
    /// Input. Each offset is handed over once per link, in order. An `offset` beyond the end of the previous input means
    /// that the board lost the bytes between (a [`LinkEvent::Notice`] said so): go on counting from `offset`.
    Input {
        /// Offset of the first of `bytes`.
        offset: u64,
        /// At least one byte.
        bytes: Vec<u8>,
    },
    /// The board belongs to a newer generation: stop the machine. The link has ended.
    Fenced {
        /// The generation that owns the line now.
        newer: Generation,
    },
    /// The board does not want this machine (wrong key, wrong device, …); the link goes on trying.
    Refused {
        /// A sentence for the administrator.
        why: String,
    },
    /// There is no session; the link goes on trying.
    Disconnected {
        /// A sentence for the administrator.
        why: String,
    },
    /// Something that an administrator wants to read in the log: bytes lost at the board, a board that restarted, ….
    Notice {
        /// A sentence.
        what: String,
    },
}

/// What a link tells, and on which thread: its own. The callback must not wait for the link.
pub type EventHandler = Box<dyn Fn(LinkEvent) + Send>;

/// One port's link to its board.
#[derive(Debug)]
pub struct BoardLink {}

impl BoardLink {
    /// Start linking, in the background.
    ///
    /// * `generation`: under which the machine runs.
    /// * `life`: the generation under which the machine was cold-booted. Part of the checkpointed state; equal to
    ///   `generation` at a cold boot. A life that the board does not know starts both streams anew at the offsets given.
    /// * `tx_acked`: offset up to which the checkpointed state knows output as applied.
    /// * `rx_delivered`: offset up to which the checkpointed state has taken input.
    pub fn start(
        config: LinkConfig,
        generation: Generation,
        life: Generation,
        tx_acked: u64,
        rx_delivered: u64,
        events: EventHandler,
    ) -> Self {
        let _ = (config, generation, life, tx_acked, rx_delivered, events);
        Self {}
    }

    /// Output of a committed checkpoint. `offset` must be where the previous call ended or before (what is known already
    /// is skipped); the first call starts at or before `tx_acked`. Never waits. The link keeps the bytes until the line
    /// took them, so at most what the VMM itself keeps.
    pub fn send(&self, offset: u64, bytes: &[u8]) {
        let _ = (offset, bytes);
    }

    /// A committed checkpoint has taken all input before `upto`: the board may forget it. Never waits.
    pub fn acknowledge_input(&self, upto: u64) {
        let _ = upto;
    }

    /// End the session and the threads. The board holds the line as it is.
    pub fn stop(self) {}
}
