//! The standby: performs the receiver's steps, and dies between or inside any two of them.

use understudy_disk::Tag;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::state;
use understudy_replicator::durable::Record;
use understudy_replicator::message::{Envelope, Message};
use understudy_replicator::receiver::{LocalVmm, Receiver, Step, Surroundings};

use super::content::PAGES;
use super::disk::{Onto, Stop, Volatile, crc};
use super::sabotage::Sabotage;
use super::world::{Check, Frame, IDENTITY, World};

impl World {
    pub fn deliver(&mut self) -> Check {
        let Some((conn, frame)) = self.to_receiver.pop_front() else { return Ok(()) };
        let message = Message::parse(frame.kind, &frame.payload).map_err(|e| e.to_string())?;
        let envelope = Envelope { generation: frame.generation, epoch: frame.epoch, message };
        let mut steps = Vec::new();
        let around = || Surroundings { vmm: LocalVmm::Standby(None), ram: Some(IDENTITY) };
        self.receiver.message(conn, &envelope, around, &mut steps);
        if steps.iter().any(|step| matches!(step, Step::Commit(_) | Step::SaveRecord(_))) {
            self.say(format!("standby: kind {} → {steps:?}", frame.kind));
        }
        self.standby_steps(steps, Some(&frame))
    }

    fn copy_step(&mut self, step: &Step, frame: Option<&Frame>) -> Result<(), Stop> {
        let message = frame.and_then(|frame| Message::parse(frame.kind, &frame.payload).ok());
        let late = self.sabotages_copies();
        let copy = &mut self.disk.copy;
        match (step, message) {
            (Step::BeginCopies, _) if self.sabotage == Sabotage::SkipCopyBegin => {}
            (Step::BeginCopies, _) => copy.begin(),
            (Step::ApplyPart, Some(Message::Part(part))) => copy.apply(&part),
            (Step::StepCopies, Some(Message::InStep(tags))) => copy.step_into(&tags),
            (Step::AppendLog, Some(Message::Log(log))) => copy.append(&log)?,
            (Step::SealCopies, Some(Message::Seal(tags))) if !late => copy.seal(&tags),
            (Step::CommitCopies, _) => {
                if late {
                    let all =
                        Tag { serial: u64::MAX, generation: Generation(1), epoch: Epoch::ZERO, records: 0, digest: 0 };
                    copy.seal(&[all]);
                }
                copy.commit();
            }
            _ => {}
        }
        Ok(())
    }

    pub fn standby_steps(&mut self, mut steps: Vec<Step>, frame: Option<&Frame>) -> Check {
        self.sabotage.spoil(&mut steps, frame.is_some());
        for step in steps {
            if self.troubled && self.random.one_in(40) {
                return self.crash();
            }
            match self.perform(&step, frame) {
                Ok(()) => {}
                Err(Stop::Crash) => return self.crash(),
                Err(Stop::Content(why)) => return Err(format!("what arrived is not what was captured: {why}")),
            }
            self.check()?;
        }
        Ok(())
    }

    fn perform(&mut self, step: &Step, frame: Option<&Frame>) -> Result<(), Stop> {
        let limit = if self.troubled && self.random.one_in(20) { self.random.below(PAGES) } else { u64::MAX };
        let payload = frame.map_or(&[][..], |frame| &frame.payload);
        match step {
            Step::SaveFloor(floor) => self.disk.durable.floor = *floor,
            Step::SaveRecord(record) => self.disk.durable.record = record.clone(),
            Step::BeginDigest => {
                self.volatile.decoder.begin();
                self.volatile.encoded_state.clear();
            }
            Step::WriteSync | Step::AppendStage => {
                let staged = *step == Step::AppendStage;
                let mut onto = Onto { disk: &mut self.disk, staged, limit };
                self.volatile.decoder.batch(payload, PAGES, &mut onto)?;
            }
            Step::ResetStage => {
                self.disk.stage.clear();
                self.volatile.encoded_state.clear();
            }
            Step::AppendState => self.volatile.encoded_state.extend_from_slice(payload),
            Step::Verify { epoch, end, base } => {
                let base = base.and_then(|(generation, epoch)| {
                    Some((epoch, &self.disk.states.get(&(generation.0, epoch.0))?[..]))
                });
                let decoded = state::decode(&self.volatile.encoded_state, base);
                self.volatile.state = decoded.map_err(|e| Stop::Content(e.to_string()))?;
                let digest = self.volatile.decoder.digest();
                let (pages, len) = (digest.pages(), self.volatile.state.len() as u64);
                digest.state(&self.volatile.state);
                if (pages, len, digest.finish()) != (end.pages, end.state_len, end.digest) {
                    return Err(Stop::Content(format!("epoch {epoch}: the digest")));
                }
            }
            Step::Commit(record) => {
                let state = std::mem::take(&mut self.volatile.state);
                self.disk.states.insert((record.generation.0, record.epoch.0), state);
                if limit < 3 {
                    return Err(Stop::Crash);
                }
                self.disk.durable.record = Record { pending: Some(crc(&self.disk.stage)), ..record.clone() };
            }
            Step::Apply if !self.disk.apply(limit) => return Err(Stop::Crash),
            Step::Apply => {}
            Step::Send(conn, generation, epoch, message) => {
                if self.conn == Some(*conn) {
                    self.to_sender.push_back((*conn, Frame::new(*generation, *epoch, message)));
                }
            }
            Step::Close(conn) => {
                if self.conn == Some(*conn) {
                    // What was said before arrives.
                    self.conn = None;
                    self.to_receiver.clear();
                }
            }
            Step::Report(standing) => self.reports.push_back(*standing),
            Step::FlushCopies => {
                let (conn, mut steps) = (self.receiver.sender().map(|(conn, ..)| conn), Vec::new());
                self.receiver.flushed(conn.unwrap_or_default(), Vec::new(), &mut steps);
                steps.iter().try_for_each(|step| self.perform(step, None))?;
            }
            Step::OpenCopies { .. } | Step::CheckCopy => {}
            Step::CloseCopies => self.disk.copy.crashed(),
            Step::BeginCopies | Step::ApplyPart | Step::StepCopies => self.copy_step(step, frame)?,
            Step::AppendLog | Step::SealCopies | Step::CommitCopies => self.copy_step(step, frame)?,
            // Nobody asks for it here: what is compared, and when, is tested beside it (verify/tests.rs).
            Step::Compare => {}
        }
        Ok(())
    }

    /// The standby's process dies and is started again.
    pub fn crash(&mut self) -> Check {
        self.say("standby: crash".into());
        self.to_receiver.clear();
        self.conn = None;
        self.ghosts.clear();
        self.reports.clear();
        self.volatile = Volatile::default();
        self.disk.copy.crashed();
        let mut steps = Vec::new();
        let durable = self.disk.durable.clone();
        self.receiver = Receiver::recover("m", "n2", durable, Some(IDENTITY), &mut steps);
        self.check()?;
        self.standby_steps(steps, None)
    }

    pub fn reported(&mut self) -> Check {
        let Some(standing) = self.reports.pop_front() else { return Ok(()) };
        if !self.reports.is_empty() {
            return Ok(()); // only the newest is told
        }
        if self.troubled && self.random.one_in(4) {
            self.reports.push_front(standing); // a failed one is told again
            return Ok(());
        }
        self.score = standing;
        let mut steps = Vec::new();
        self.receiver.reported(standing, &mut steps);
        self.standby_steps(steps, None)
    }
}
