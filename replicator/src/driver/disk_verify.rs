//! The sender's side of a comparison of mirrored disks with their copies, while both are in use: a thread that asks the VMM and the peer in turn.
//!
//! ```text
//!  this thread ── its own connection ──► VMM: hold still, hash     (understudy_disk::mirror::Verify says what must hold)
//!       │  ▲
//!       ▼  │ through the driver, which has the connection
//!      peer: hold still at the same state, compare
//! ```
//! Bases are held still for a window at a time: meanwhile nothing is merged, and slices wait.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use understudy_disk::Tag;
use understudy_disk::mirror::Range;
use understudy_protocol::control::{ControlClient, DiskCompared, DiskQuestion, DiskVerifyStep, VmmRequest};
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::DiskVerifyStatus;

use super::{Input, VMM_TIMEOUT, lock};
use crate::log;
use crate::message::{DiskCheck, DiskChecked, Message};

/// The bases hold still for so long at once.
const WINDOW: Duration = Duration::from_secs(1);
/// Questions on their way.
const DEPTH: usize = 4;
/// A peer that has not answered for so long does not.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is not committed yet is asked for again after so long.
const AGAIN: Duration = Duration::from_millis(20);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct DiskVerifier {
    status: Arc<Mutex<DiskVerifyStatus>>,
    /// To the thread; it ends without it.
    answers: Option<Sender<DiskChecked>>,
}

impl DiskVerifier {
    /// Begin a pass, or join the one that is under way; its number.
    pub(super) fn request(&mut self, layout: &Layout, connection: u64, say: Sender<Input>) -> u64 {
        let mut status = lock(&self.status);
        if status.running {
            return status.pass;
        }
        *status = DiskVerifyStatus { running: true, pass: status.pass + 1, ..DiskVerifyStatus::default() };
        let pass = status.pass;
        drop(status);
        let (answers, heard) = mpsc::channel();
        self.answers = Some(answers);
        let (status, layout) = (self.status.clone(), layout.clone());
        log::line(&format!("sender: disk verify {pass}: all mirrored disks are compared with their copies"));
        thread::spawn(move || {
            let result = Pass { connection, say, heard, status: status.clone() }.run(&layout);
            let mut status = lock(&status);
            status.running = false;
            status.last = match result {
                Err(why) => format!("disk verify {pass} FAILED: {why}"),
                Ok(()) if status.differing_bytes > 0 => format!(
                    "disk verify {pass} FAILED: {} bytes differ, the first in {}; they are copied the next time that the copies are brought into step",
                    status.differing_bytes,
                    status
                        .differing
                        .first()
                        .map_or_else(String::new, |(disk, at, _)| format!("disk {disk} at byte {at}"))
                ),
                Ok(()) => format!("disk verify {pass}: {} MiB are the same", status.done_bytes >> 20),
            };
            log::line(&format!("sender: {}", status.last));
        });
        pass
    }

    /// The peer has answered.
    pub(super) fn heard(&mut self, checked: &DiskChecked) {
        if let Some(answers) = &self.answers {
            // The pass may be over.
            let _ = answers.send(checked.clone());
        }
    }

    /// The connection is gone, and with it the copies' stillness.
    pub(super) fn interrupted(&mut self) {
        self.answers = None;
    }

    /// For the status.
    pub(super) fn report(&self) -> DiskVerifyStatus {
        lock(&self.status).clone()
    }
}

struct Pass {
    /// With the peer. What is said for it goes to no other.
    connection: u64,
    say: Sender<Input>,
    heard: Receiver<DiskChecked>,
    status: Arc<Mutex<DiskVerifyStatus>>,
}

impl Pass {
    fn run(&self, layout: &Layout) -> Result<(), String> {
        let mut vmm = ControlClient::connect(layout.vmm_socket(), VMM_TIMEOUT * 6).map_err(|e| e.to_string())?;
        let disks: Vec<(String, u64)> = ask(&mut vmm, DiskVerifyStep::Begin)?;
        lock(&self.status).total_bytes = disks.iter().map(|(_, size)| size).sum();
        for (disk, (name, _)) in (0..).zip(&disks) {
            let before = lock(&self.status).clone();
            loop {
                match self.window(&mut vmm, disk, name, &before) {
                    Ok(true) => break,
                    Ok(false) => {}
                    Err(why) => {
                        // (The VMM lets go when its connection ends.)
                        let _ = self.tell(DiskCheck::Unpin { disk });
                        return Err(format!("disk {name}: {why}"));
                    }
                }
            }
        }
        Ok(())
    }

    fn tell(&self, check: DiskCheck) -> Result<(), String> {
        let gone = |_| "the replicator ends".to_owned();
        self.say.send(Input::Say(self.connection, Message::DiskCheck(check))).map_err(gone)
    }

    fn answer(&self) -> Result<DiskChecked, String> {
        let heard = self.heard.recv_timeout(PATIENCE).map_err(|e| match e {
            RecvTimeoutError::Timeout => format!("the standby has not answered for {} s", PATIENCE.as_secs()),
            RecvTimeoutError::Disconnected => "the connection with the standby ended meanwhile".to_owned(),
        });
        match heard? {
            DiskChecked::Failed { why, .. } => Err(format!("the standby says: {why}")),
            answer => Ok(answer),
        }
    }

    /// Both bases at the same tag.
    fn pin(&self, vmm: &mut ControlClient, disk: u16) -> Result<(), String> {
        let until = Instant::now() + PATIENCE;
        let ours: Tag = ask(vmm, DiskVerifyStep::Pin { disk })?;
        loop {
            if Instant::now() > until {
                return Err("the disk and its copy could not be held still at one state".into());
            }
            self.tell(DiskCheck::Pin { disk, tag: ours })?;
            let at = match self.answer()? {
                DiskChecked::Pinned { disk: of, at } if of == disk => at,
                // Of a pass that ended in the middle.
                _ => continue,
            };
            let Some(at) = at else {
                thread::sleep(AGAIN);
                continue;
            };
            if at == ours {
                return Ok(());
            }
            let tag = serde_json::to_value(at).map_err(|e| e.to_string())?;
            loop {
                let held: Option<Tag> = ask(vmm, DiskVerifyStep::PinAt { disk, tag: tag.clone() })?;
                if held == Some(at) {
                    return Ok(());
                }
                if Instant::now() > until {
                    break;
                }
                thread::sleep(AGAIN);
            }
        }
    }

    /// One window; whether all of the disk was compared.
    fn window(
        &self,
        vmm: &mut ControlClient,
        disk: u16,
        name: &str,
        before: &DiskVerifyStatus,
    ) -> Result<bool, String> {
        self.pin(vmm, disk)?;
        let until = Instant::now() + WINDOW;
        let (mut asked, mut over) = (0, false);
        loop {
            while asked < DEPTH && !over && Instant::now() < until {
                match ask::<Option<DiskQuestion>>(vmm, DiskVerifyStep::Ask { disk })? {
                    Some(DiskQuestion { number, at, len, hash }) => {
                        self.tell(DiskCheck::Compare { disk, number, range: Range { at, len }, hash })?;
                        asked += 1;
                    }
                    None => over = true,
                }
            }
            if asked == 0 {
                break;
            }
            let DiskChecked::Compared { number, same, .. } = self.answer()? else {
                return Err("the standby answered something else".into());
            };
            asked -= 1;
            ask::<()>(vmm, DiskVerifyStep::Result { disk, number, same })?;
        }
        self.tell(DiskCheck::Unpin { disk })?;
        ask::<()>(vmm, DiskVerifyStep::Unpin { disk })?;
        let compared: DiskCompared = ask(vmm, DiskVerifyStep::Compared { disk })?;
        let mut status = lock(&self.status);
        status.done_bytes = before.done_bytes + compared.done;
        status.differing_bytes = before.differing_bytes + compared.differing;
        status.differing.clone_from(&before.differing);
        status.differing.extend(compared.ranges.into_iter().map(|(at, len)| (name.to_owned(), at, len)));
        status.differing.truncate(64);
        Ok(over)
    }
}

fn ask<R: serde::de::DeserializeOwned>(vmm: &mut ControlClient, step: DiskVerifyStep) -> Result<R, String> {
    vmm.call(&VmmRequest::VerifyDisks { step }).map_err(|e| e.to_string())
}
