//! The primary: does what the sender asks for, as its driver and the VMM do.

use std::collections::BTreeSet;
use std::time::Duration;

use understudy_protocol::control::{Attached, Captured};
use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::writer::{Compression, ShadowBudget};
use understudy_replicator::codec::{EncodingConfig, EpochDigest, PAGE};
use understudy_replicator::message::{End, Message};
use understudy_replicator::sender::{Action, Event, VetoCall};

use super::content::{PAGES, device_state, page};
use super::sabotage::Sabotage;
use super::world::{Check, Frame, World};

/// Pages that the arena holds.
const ARENA: usize = 3;

impl World {
    pub fn event(&mut self, event: Event) {
        self.sender.event(event, self.now);
    }

    pub fn transmit(&mut self, frame: Frame) -> bool {
        match self.conn {
            Some(conn) => {
                self.to_receiver.push_back((conn, frame));
                true
            }
            None => false,
        }
    }

    pub fn detach(&mut self) {
        self.storage = None;
        self.vmm.gate_open = false;
        self.vmm.early.clear();
        self.vmm.share = 100;
        self.kept.clear();
        self.vmm.log = None;
        self.vmm.rest.clear();
        if !self.vmm.handed_over {
            self.vmm.stopped = false;
        }
    }

    pub fn sender_step(&mut self) -> Check {
        if self.storage.as_ref().is_some_and(|(at, _)| *at <= self.now)
            && let Some((_, action)) = self.storage.take()
        {
            self.say(format!("the storage answers: {action:?}"));
            return self.storage_answers(action);
        }
        let mut action = self.sender.next(self.now);
        self.sender.take_notes();
        if let Action::Wait(until) = action {
            let limit = self.now + Duration::from_millis(self.random.below(60));
            self.now = until.min(limit).max(self.now + Duration::from_millis(1));
            return Ok(());
        }
        self.say(format!("sender: {action:?}"));
        if self.sabotage == Sabotage::VetoNotAwaited && action == Action::Hook(VetoCall::Veto) {
            self.event(Event::Hook(VetoCall::Veto, Ok(())));
            action = Action::Wait(self.now);
        }
        let of_the_vmm = !matches!(
            action,
            Action::Wait(_) | Action::Connect | Action::Send(..) | Action::Disconnect | Action::Hook(_)
        ) && !matches!(action, Action::AnswerHandOver(_) | Action::Quit | Action::Detach);
        if self.storage.is_some() && of_the_vmm {
            return Err(format!("{action:?} while the VMM waits for its storage"));
        }
        match action {
            Action::SealDisks(_) | Action::Committed(_)
                if self.vmm.disks && self.troubled && self.random.one_in(20) && self.sabotage == Sabotage::None =>
            {
                let silence = Duration::from_millis(self.random.below(6000));
                self.storage = Some((self.now + silence, action));
            }
            Action::Wait(_) => {}
            Action::Attach => {
                if self.vmm.quit || self.vmm.handed_over {
                    self.event(Event::VmmRefused("it does not run".into()));
                    return Ok(());
                }
                self.sessions += 1;
                let bytes = PAGES * PAGE as u64;
                let disks = self.vmm.disks;
                let mirrored = self.vmm.mirror.iter().map(|_| "vda".to_owned()).collect();
                let attached =
                    Attached { generation: Generation(1), ram_bytes: bytes, arena_bytes: bytes, disks, mirrored };
                self.event(Event::Attached { attached, last_cut: self.vmm.cut, session: self.sessions });
            }
            Action::Detach => self.detach(),
            Action::Quit => {
                self.vmm.quit = true;
                self.detach();
                self.event(Event::VmmDone);
            }
            Action::DirtyLogStart => {
                if self.vmm.log.replace(BTreeSet::new()).is_some() {
                    return Err("the dirty log was started twice".into());
                }
                self.event(Event::VmmDone);
            }
            Action::Harvest { send } => {
                let Some(log) = &mut self.vmm.log else { return Err("harvest without a dirty log".into()) };
                let log = std::mem::take(log);
                self.vmm.early.clear();
                let pages = log.len() as u64;
                if send {
                    (self.bitmap, self.cursor) = (log, 0);
                }
                self.event(Event::Harvested { pages });
            }
            Action::CopySlice { first } => {
                if first {
                    self.cursor = 0;
                    self.first_copy();
                }
                let end = (self.cursor + 3).min(PAGES);
                for index in self.cursor..end {
                    self.batch.push(index, &page(self.vmm.ram[index as usize]), &mut self.digest);
                }
                self.cursor = end;
                self.send_sync(Event::Copied { done: end == PAGES });
            }
            Action::SendDirty => {
                for index in std::mem::take(&mut self.bitmap) {
                    self.batch.push(index, &page(self.vmm.ram[index as usize]), &mut self.digest);
                }
                self.send_sync(Event::DirtySent { done: true });
            }
            Action::Cut { epoch, arm, last, again } => {
                if self.troubled && self.random.one_in(30) {
                    self.say("the VMM refuses the cut".into());
                    self.event(Event::VmmRefused("busy".into()));
                    return Ok(());
                }
                return self.cut(epoch, arm, last, again);
            }
            Action::Precopy(epoch) => return self.precopy(epoch),
            Action::Throttle(share) => {
                self.vmm.share = share;
                self.event(Event::VmmDone);
            }
            Action::CutContinue => {
                if self.vmm.rest.is_empty() {
                    return Err("nothing to continue".into());
                }
                let captured = self.piece();
                self.event(Event::Captured(captured));
            }
            Action::SendPiece(captured) => self.send_piece(captured),
            Action::SealDisks(_) | Action::Committed(_) => return self.storage_answers(action),
            Action::BeginCopies => return self.begin_copies(),
            Action::CopyDisks => self.copy_disks(),
            Action::SendDisks => return self.send_disks(),
            Action::Resend { after } => {
                let frames = match self.sabotage {
                    Sabotage::ResendIsNotTheSame => self.encoded_again(),
                    _ => self.kept.clone(),
                };
                let frames: Vec<Frame> =
                    frames.into_iter().filter(|frame| frame.epoch > after && frame.epoch <= self.vmm.cut).collect();
                let sent = frames.into_iter().all(|frame| self.transmit(frame));
                self.event(if sent { Event::Resent } else { Event::PeerLost("broken".into()) });
            }
            Action::GateOpen => {
                if !matches!(self.vmm.share, 0 | 100) {
                    return Err(format!("nobody waits for the guest, and it runs for {} %", self.vmm.share));
                }
                if let Some(mirror) = &mut self.vmm.mirror {
                    mirror.unprotect(self.sabotage == Sabotage::ForgetSlices);
                }
                self.vmm.gate_open = true;
                self.release();
                self.event(Event::VmmDone);
            }
            Action::Connect => self.connecting = true,
            Action::Send(_, Message::Flush) => {
                if !self.send_flush() {
                    self.event(Event::PeerLost("broken".into()));
                }
            }
            Action::Send(epoch, message) => {
                if message == Message::SyncBegin {
                    self.digest = EpochDigest::default();
                    self.kept.clear();
                }
                if !self.transmit(Frame::new(Generation(1), epoch, &message)) {
                    self.event(Event::PeerLost("broken".into()));
                }
            }
            Action::Disconnect => {
                self.listening = None;
                self.break_link();
            }
            Action::Hook(call) => self.hooks.push_back(call),
            Action::AnswerHandOver(Ok(done)) => {
                let image = self.disk.recovered().map(|(_, epoch, ..)| epoch);
                if self.taken.is_none() && (image != Some(done.epoch) || !self.vmm.handed_over) {
                    return Err(format!("handed over at {}, but the image is {image:?}", done.epoch));
                }
            }
            Action::AnswerHandOver(Err(why)) => {
                if self.vmm.handed_over {
                    return Err(format!("the machine was handed over, but the answer is: {why}"));
                }
            }
        }
        Ok(())
    }

    fn storage_answers(&mut self, action: Action) -> Check {
        match action {
            Action::SealDisks(epoch) => self.seal_disks(epoch),
            Action::Committed(epoch) => self.commit(epoch),
            other => Err(format!("{other:?} is nothing for storage")),
        }
    }

    fn commit(&mut self, epoch: Epoch) -> Check {
        if epoch > self.vmm.cut || epoch <= self.vmm.committed {
            let (cut, committed) = (self.vmm.cut, self.vmm.committed);
            return Err(format!("epoch {epoch} is called committed, {cut} was cut, {committed} committed"));
        }
        self.vmm.committed = epoch;
        if let Some(mirror) = &mut self.vmm.mirror {
            mirror.committed(epoch.0);
        }
        self.kept.retain(|frame| frame.epoch > epoch);
        self.vmm.released = self.vmm.released.max(self.vmm.snapshots[&epoch.0].1);
        self.vmm.handed_over |= self.vmm.last && epoch == self.vmm.cut;
        self.event(Event::VmmDone);
        Ok(())
    }

    /// Storage says no now and then.
    fn seal_disks(&mut self, epoch: Epoch) -> Check {
        if !self.vmm.disks || epoch != self.vmm.cut {
            return Err(format!("disks ({}) are to be sealed for {epoch}, {} was cut", self.vmm.disks, self.vmm.cut));
        }
        if self.troubled && self.random.one_in(40) {
            self.say("the storage refuses".into());
            self.event(Event::VmmRefused("no space left".into()));
            return Ok(());
        }
        if self.sabotage != Sabotage::SealNotAwaited {
            self.vmm.sealed.insert(epoch.0);
        }
        self.event(Event::VmmDone);
        Ok(())
    }

    /// As the driver does.
    fn first_copy(&mut self) {
        if self.sabotage != Sabotage::KeepShadow || self.sessions == 1 && self.vmm.cut == Epoch::ZERO {
            self.restart_encoding();
        }
        if self.sabotage != Sabotage::KeepStateBase {
            self.state.restart();
        }
    }

    fn send_sync(&mut self, event: Event) {
        self.batch.seal();
        let frame = Frame::new(Generation(1), Epoch::ZERO, &Message::SyncPages(self.batch.bytes()));
        let sent = self.batch.is_empty() || self.transmit(frame);
        self.batch.clear();
        self.event(if sent { event } else { Event::PeerLost("broken".into()) });
    }

    /// Some of the pages that were written, while the guest runs.
    fn precopy(&mut self, epoch: Epoch) -> Check {
        if epoch <= self.vmm.cut {
            return Err(format!("early pages for {epoch} after {} was cut", self.vmm.cut));
        }
        let Some(log) = &mut self.vmm.log else { return Err("early copies without a dirty log".into()) };
        let some: Vec<u64> = log.iter().copied().filter(|_| self.random.one_in(2)).take(ARENA).collect();
        log.retain(|page| !some.contains(page));
        self.vmm.early.extend(&some);
        self.vmm.arena = some.iter().map(|page| (*page, self.vmm.ram[*page as usize])).collect();
        self.begin(epoch, false);
        let captured = Captured { epoch, more: true, state_len: 0, ..self.captured(some.len()) };
        self.event(Event::Precopied(captured));
        Ok(())
    }

    /// The frames of an epoch begin, unless they have begun before.
    fn begin(&mut self, epoch: Epoch, again: bool) {
        if again {
            self.kept.retain(|frame| frame.epoch < epoch);
            self.digest = EpochDigest::default();
            if self.sabotage == Sabotage::KeepShadowOfLost {
                self.batch.clear();
            } else {
                self.batch.forget_receiver();
            }
        }
    }

    /// Nothing is known of the receiver any more.
    fn restart_encoding(&mut self) {
        // Room for copies of half of the pages, so that some are evicted.
        let config = EncodingConfig { shadow: ShadowBudget::Percent(50), compression: Compression::Auto };
        self.batch.restart(PAGES, &config, self.random.next());
    }

    fn cut(&mut self, epoch: Epoch, arm: bool, last: bool, again: bool) -> Check {
        if epoch <= self.vmm.cut || self.vmm.stopped {
            return Err(format!("cut {epoch} after {} (stopped: {})", self.vmm.cut, self.vmm.stopped));
        }
        let Some(log) = &mut self.vmm.log else { return Err("a cut without a dirty log".into()) };
        let mut log = std::mem::take(log);
        let early = std::mem::take(&mut self.vmm.early);
        if again && self.sabotage != Sabotage::ForgetEarly {
            log.extend(early);
        }
        self.vmm.rest = log.into_iter().collect();
        self.vmm.cut = epoch;
        self.vmm.last = last;
        self.vmm.stopped = true;
        if arm {
            self.vmm.gate_open = false;
        }
        if let Some(mirror) = &mut self.vmm.mirror {
            mirror.cut(epoch.0, arm);
        }
        self.vmm.snapshots.insert(epoch.0, (self.vmm.ram.clone(), self.vmm.made));
        self.begin(epoch, again);
        let captured = self.piece();
        self.event(Event::Captured(captured));
        Ok(())
    }

    fn piece(&mut self) -> Captured {
        let n = self.vmm.rest.len().min(ARENA);
        self.vmm.arena = self.vmm.rest.drain(..n).map(|page| (page, self.vmm.ram[page as usize])).collect();
        let more = !self.vmm.rest.is_empty();
        self.vmm.stopped = more || self.vmm.last;
        Captured { more, state_len: if more { 0 } else { 8 }, ..self.captured(n) }
    }

    fn captured(&self, pages: usize) -> Captured {
        Captured {
            epoch: self.vmm.cut,
            // What is sent early must be worth it, or the sender would not ask for more.
            pages: if pages > 0 { 1024 } else { 0 },
            indices_offset: 0,
            pages_offset: 0,
            state_offset: 0,
            state_len: 0,
            more: false,
            pause_us: 1,
            vm_time_ns: 0,
        }
    }

    fn send_piece(&mut self, captured: Captured) {
        for (index, seed) in std::mem::take(&mut self.vmm.arena) {
            self.batch.push(index, &page(seed), &mut self.digest);
        }
        self.batch.seal();
        let epoch = captured.epoch;
        let mut frames = Vec::new();
        if !self.batch.is_empty() {
            frames.push(Frame::new(Generation(1), epoch, &Message::Pages(self.batch.bytes())));
            self.batch.clear();
        }
        if !captured.more {
            let (state, mut encoded) = (device_state(epoch), Vec::new());
            self.digest.state(&state);
            self.state.encode(epoch, &state, &mut encoded);
            for piece in encoded.chunks(150) {
                frames.push(Frame::new(Generation(1), epoch, &Message::State(piece)));
            }
            let pages = self.digest.pages();
            let end = End { pages, state_len: state.len() as u64, digest: self.digest.finish() };
            frames.push(Frame::new(Generation(1), epoch, &Message::End(end)));
        }
        let mut sent = true;
        for frame in frames {
            self.kept.push(frame.clone());
            sent = sent && self.transmit(frame);
        }
        self.event(Event::PieceSent { kept: true });
        if !sent {
            self.event(Event::PeerLost("broken".into()));
        }
    }

    /// What a sender would send that keeps an epoch's pages instead of its frames.
    fn encoded_again(&mut self) -> Vec<Frame> {
        let mut frames = self.kept.clone();
        let (snapshot, _) = self.vmm.snapshots[&self.vmm.cut.0].clone();
        let Some(pages) =
            frames.iter_mut().find(|frame| matches!(Message::parse(frame.kind, &[]), Ok(Message::Pages(_))))
        else {
            return frames;
        };
        (0..PAGES)
            .for_each(|index| self.batch.push(index, &page(snapshot[index as usize]), &mut EpochDigest::default()));
        self.batch.seal();
        if !self.batch.is_empty() {
            pages.payload = self.batch.bytes().to_vec();
        }
        self.batch.clear();
        frames
    }
}
