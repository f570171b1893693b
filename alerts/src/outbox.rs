//! The way in for our own programs: an alarm for everybody, or for one.
//!
//! Telling means queueing: it does not wait for servers. The sender is started with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::alarm::{Alarm, Sink, Trouble};
use crate::cluster::{Cib, ClusterError};
use crate::settings::{Recipient, Settings};
use crate::spool::{DEFAULT_DIR, Item, Spool, SpoolError};

/// Names another directory than [`DEFAULT_DIR`].
pub const DIR_VARIABLE: &str = "UNDERSTUDY_ALERT_SPOOL";

/// The queue, and what the cluster's configuration says of recipients.
#[derive(Debug, Clone)]
pub struct Outbox {
    spool: Spool,
    settings: Settings,
    /// The executable that sends; `None`: nobody is started.
    sender: Option<PathBuf>,
}

/// No queue, or no cluster.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// The queue.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The cluster.
    #[error("cannot learn who is to be told: {0}")]
    Cluster(#[from] ClusterError),
}

/// The queue's directory.
pub fn directory() -> PathBuf {
    std::env::var_os(DIR_VARIABLE).map_or_else(|| DEFAULT_DIR.into(), PathBuf::from)
}

impl Outbox {
    /// This node's queue, with the recipients that the cluster has now.
    pub fn open() -> Result<Self, OutboxError> {
        let settings = Cib::default().settings()?;
        Ok(Self::new(Spool::open(directory())?, settings, sender()))
    }

    /// A queue with these recipients; `sender` is started after something was queued.
    pub fn new(spool: Spool, settings: Settings, sender: Option<PathBuf>) -> Self {
        Self { spool, settings, sender }
    }

    /// What the cluster's configuration says.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The queue.
    pub fn spool(&self) -> &Spool {
        &self.spool
    }

    /// Ask the cluster again who is to be told. If it cannot be asked, those that it named before are.
    pub fn refresh(&mut self) -> Result<(), ClusterError> {
        self.settings = Cib::default().settings()?;
        Ok(())
    }

    /// Tell one, whatever he wants to hear of.
    pub fn tell_one(&self, recipient: &Recipient, alarm: &Alarm) -> Result<(), Trouble> {
        let queued = self.queue(recipient, alarm);
        self.start();
        queued
    }

    fn queue(&self, recipient: &Recipient, alarm: &Alarm) -> Result<(), Trouble> {
        let item = Item {
            at: crate::now(),
            alarm: alarm.clone().bounded(),
            recipient: recipient.clone(),
            delivery: self.settings.delivery.clone(),
            everywhere: false,
            tries: 0,
            next: 0,
        };
        self.spool.take(item).map(drop).map_err(|e| Trouble::passing(e.to_string()))
    }

    fn start(&self) {
        if let Some(program) = &self.sender {
            start(program, self.spool.dir());
        }
    }
}

/// Everybody who wants to hear of alarms that are as bad.
impl Sink for Outbox {
    fn tell(&self, alarm: &Alarm) -> Result<(), Trouble> {
        let wanted = self.settings.recipients.iter().filter(|recipient| alarm.severity >= recipient.severity);
        let results: Vec<_> = wanted.map(|recipient| self.queue(recipient, alarm)).collect();
        self.start();
        results.into_iter().collect()
    }
}

/// The sender's executable: beside ours.
pub fn sender() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?.parent()?.join("understudy-alert");
    program.exists().then_some(program)
}

/// Start it, on its own. If one runs already this one ends at once.
pub fn start(program: &Path, spool: &Path) {
    let mut command = Command::new(program);
    // What the alert agent was told is not for its successor to take for an alert.
    command.args(["send", "--background"]).env_remove("CRM_alert_kind").env(DIR_VARIABLE, spool);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        // A program that lives on waits for it, or it would stay as a zombie.
        Ok(mut child) => drop(std::thread::spawn(move || child.wait())),
        Err(e) => eprintln!("understudy-alert: cannot start {}: {e}", program.display()),
    }
}
