//! How the sender takes in what happened. (What it does next follows from the state alone: see the parent.)

use std::time::{Duration, Instant};

use understudy_protocol::control::{Captured, HandedOver};
use understudy_protocol::ids::{Epoch, Generation};

use super::*;
use crate::message::{Message, Welcome};

impl Sender {
    /// Take in what happened.
    pub fn event(&mut self, event: Event, now: Instant) {
        if matches!(event, Event::VmmDone | Event::VmmRefused(_) | Event::VmmLost(_)) {
            self.storage_answered(now);
        }
        match event {
            Event::Attached { attached, last_cut, session } => {
                let generation = attached.generation;
                self.vmm = Some(attached);
                self.session = session;
                self.log_on = false;
                self.gate_open = false;
                self.rest = Rest::Nothing;
                self.base = None;
                self.cycle = Cycle::Idle;
                self.forget_epochs();
                (self.early, self.again, self.share, self.share_told) = (false, false, 0, 0);
                self.epoch = self.epoch.max(last_cut);
                (self.sealed, self.mirrored) = (Epoch::ZERO, Epoch::ZERO);
                self.veto_retry = now;
                self.peer_retry = now;
                self.stale = self.stale.filter(|newer| *newer > generation);
                if self.stale.is_none() {
                    self.note(format!("attached to the VMM, generation {generation}"));
                }
            }
            Event::VmmLost(why) => self.forget_vmm(now, format!("the VMM's session ended: {why}")),
            Event::VmmRefused(why) => self.vmm_refused(now, why),
            Event::VmmDone => self.vmm_done(now),
            Event::Harvested { pages } => self.harvested(pages, now),
            Event::DirtySent { done: true } => self.round_sent(),
            Event::DirtySent { done: false } => {}
            Event::Copied { done } => {
                if let Peer::Copying { first } = &mut self.peer {
                    *first = false;
                    if done {
                        self.peer = Peer::Rounds { round: 0, previous: u64::MAX, sending: None };
                        self.migration_sent();
                    }
                }
            }
            Event::CopiesRead { sent, left, wait } => self.copies_read(sent, left, wait),
            Event::DisksSent(DisksSent::All) => self.mirrored = self.epoch,
            Event::DisksSent(DisksSent::Wait) => self.disks_wait = true,
            Event::DisksSent(DisksSent::More) => {}
            Event::Captured(captured) => self.captured(captured),
            Event::Precopied(captured) => self.precopied(captured),
            Event::OutputWaits => self.output = true,
            Event::PieceSent { kept } => self.piece_sent(kept, now),
            Event::Resent => {
                if matches!(self.cycle, Cycle::Resend { .. }) {
                    self.cycle = Cycle::Idle;
                    for epoch in &mut self.in_flight {
                        epoch.deadline = now + self.config.peer_timeout;
                    }
                }
            }
            Event::Connected => {
                if self.peer == Peer::Connecting {
                    self.peer = Peer::Greeting { sent: false };
                    self.last_heard = now;
                    self.last_ping = now;
                } else {
                    // Nobody waits for it any more.
                    self.disconnect = true;
                }
            }
            Event::PeerLost(why) => self.lose_peer(now, why),
            Event::Message(generation, epoch, message) => self.message(generation, epoch, message, now),
            Event::NewerGeneration(generation) => {
                if generation > self.generation() {
                    self.found_stale(generation, now);
                }
            }
            Event::Hook(call, result) => self.hook_done(call, result, now),
            Event::HandOver => self.want_hand_over(),
        }
    }

    /// If it was the storage that the VMM waited for.
    fn storage_answered(&mut self, now: Instant) {
        let Some(since) = self.storage.take() else { return };
        let took = now.saturating_duration_since(since);
        if matches!(self.asked, Asked::SealDisks(_)) {
            self.sealing = took;
        }
        if took >= self.config.peer_timeout {
            let ms = took.as_millis();
            self.note(format!(
                "the storage of the machine's disks has answered after {ms} ms; checkpoints waited for it"
            ));
        }
    }

    pub(super) fn vmm_done(&mut self, now: Instant) {
        match std::mem::replace(&mut self.asked, Asked::Nothing) {
            Asked::Nothing | Asked::Throttle => {}
            Asked::LogStart => {
                self.migration_harvests(now);
                self.log_on = true;
                if let Peer::Welcomed { log_ready, .. } = &mut self.peer {
                    *log_ready = true;
                }
            }
            Asked::GateOpen => {
                // What the standby holds is the past from now on.
                self.gate_open = true;
                self.base = None;
                self.note(if self.config.clustered {
                    "runs unprotected: the veto against the standby is durable, outputs leave at once".into()
                } else {
                    "runs unprotected, without a durable record (there is no cluster): outputs leave at once".into()
                });
            }
            Asked::SealDisks(epoch) => self.sealed = epoch,
            Asked::Committed(epoch) => self.committed_told(epoch, now),
            Asked::Quit => self.forget_vmm(now, self.facts.note.clone()),
        }
    }

    pub(super) fn committed_told(&mut self, epoch: Epoch, now: Instant) {
        if self.hand_over == HandOver::Recorded {
            self.committed = epoch;
            return self.migrated(now);
        }
        self.facts.epochs += epoch.0.saturating_sub(self.committed.0).min(self.config.pipeline.max(1) as u64);
        self.committed = epoch;
        let mut kept = self.base.take().map_or_else(Vec::new, |base| base.kept);
        kept.retain(|kept| *kept > epoch);
        self.base = Some(Base { committed: epoch, kept });
        self.facts.committed_at = Some(now);
        self.peer_backoff = RETRY_MIN;
        if !self.peer_whole {
            self.peer_whole = true;
            self.facts.last_sync = now - self.sync_started;
            let (node, ms) = (self.peer_node.clone(), self.facts.last_sync.as_millis());
            self.note(format!("the first copy to {node} took {ms} ms; epoch {epoch} is its first checkpoint"));
        }
        if self.hand_over == HandOver::Cut && epoch == self.epoch {
            self.hand_over = HandOver::Telling { deadline: None };
        }
    }

    /// Nothing is on its way any more.
    fn forget_epochs(&mut self) {
        self.pages = 0;
        self.disks_wait = false;
        self.in_flight.clear();
        self.acked = None;
        self.early_at = None;
    }

    pub(super) fn precopied(&mut self, captured: Captured) {
        self.busy = Busy::No;
        if self.peer != Peer::Streaming || captured.pages == 0 {
            // Copied for nobody: it has to be copied again.
            self.again |= captured.pages > 0;
            return;
        }
        self.early = true;
        self.pages += captured.pages;
        self.cycle = Cycle::Early(captured);
    }

    pub(super) fn harvested(&mut self, pages: u64, now: Instant) {
        self.migration_harvests(now);
        match &mut self.peer {
            Peer::Welcomed { log_ready, .. } => *log_ready = true,
            Peer::Rounds { sending, .. } => {
                *sending = Some(pages);
                self.migration_round(pages, now);
            }
            _ => {}
        }
    }

    pub(super) fn round_sent(&mut self) {
        let Peer::Rounds { round, previous, sending: Some(pages) } = self.peer else { return };
        if self.migrates() {
            self.peer = Peer::Rounds { round: round + 1, previous: pages, sending: None };
            return self.migration_sent();
        }
        // When a round does not shrink to three quarters of the last, more rounds would only warm the network.
        let hopeless = round >= 1 && pages > previous / 4 * 3;
        self.peer = if pages <= FEW_PAGES || round + 1 >= MAX_ROUNDS || hopeless {
            self.copies_again()
        } else {
            Peer::Rounds { round: round + 1, previous: pages, sending: None }
        };
    }

    pub(super) fn captured(&mut self, captured: Captured) {
        self.busy = Busy::No;
        match self.rest {
            Rest::Nothing => {}
            Rest::Keep(_) | Rest::KeepMore => {
                self.rest = Rest::Keep(captured);
                return;
            }
            Rest::Drop => {
                self.rest = if captured.more { Rest::Drop } else { Rest::Nothing };
                return;
            }
        }
        if self.peer == Peer::Arm {
            self.peer = Peer::Streaming;
            // The cut switched the gate to hold.
            self.gate_open = false;
            self.promotable = false;
        }
        self.pages += captured.pages;
        if !captured.more && std::mem::take(&mut self.hurried) {
            self.budget.spend(Duration::from_micros(captured.pause_us));
        }
        if self.peer == Peer::Streaming {
            self.cycle = Cycle::Sending(captured);
        } else {
            self.rest = if captured.more { Rest::Drop } else { Rest::Nothing };
            self.base = None;
        }
    }

    pub(super) fn piece_sent(&mut self, kept: bool, now: Instant) {
        if let Rest::Keep(captured) = self.rest {
            self.rest = if captured.more { Rest::KeepMore } else { Rest::Nothing };
            if !captured.more {
                self.early = false;
                self.keep(kept);
            }
            return;
        }
        let captured = match self.cycle {
            Cycle::Sending(captured) => captured,
            Cycle::Early(_) => {
                self.cycle = Cycle::Idle;
                // As long as there is much to copy and time before the cut.
                let next = now + self.config.interval / 4;
                self.early_at = (self.pages >= WORTH_EARLY && next < self.next_cut).then_some(next);
                return;
            }
            _ => return,
        };
        if captured.more {
            self.cycle = Cycle::Continue;
            return;
        }
        self.cycle = Cycle::Idle;
        // What our own storage took is not the standby's slowness.
        let sealing = std::mem::take(&mut self.sealing);
        self.in_flight.push_back(InFlight {
            epoch: self.epoch,
            cut: self.last_cut + sealing,
            deadline: now + self.config.peer_timeout,
        });
        self.early = false;
        self.pages_before = std::mem::take(&mut self.pages);
        self.early_at = (self.pages_before >= WORTH_EARLY).then(|| self.last_cut + self.config.interval / 2);
        self.keep(kept);
    }

    /// All of the epoch is encoded; if it could be kept, a standby that lacks only what is kept can be served after a broken link.
    pub(super) fn keep(&mut self, kept: bool) {
        let epoch = self.epoch;
        self.base = self.base.take().filter(|_| kept);
        if let Some(base) = &mut self.base {
            base.kept.push(epoch);
        }
    }

    pub(super) fn message(&mut self, generation: Generation, epoch: Epoch, message: Message<'static>, now: Instant) {
        if matches!(self.peer, Peer::Away | Peer::Connecting) {
            return;
        }
        self.last_heard = now;
        match (message, self.peer) {
            (Message::Welcome(welcome), Peer::Greeting { .. }) => self.welcomed(welcome, now),
            (Message::Stale, _) => {
                if generation > self.generation() {
                    self.found_stale(generation, now);
                } else {
                    self.lose_peer(now, "the standby calls this generation old without knowing a newer one".into());
                }
            }
            (Message::Refused(why) | Message::Failed(why), _) => self.lose_peer(now, why),
            (Message::SyncReady, Peer::Begun) if self.mirrors() => {
                self.peer = Peer::Disks { arm: false, stage: CopyStage::Begin };
            }
            (Message::SyncReady, Peer::Begun) => {
                self.peer = Peer::Copying { first: true };
                self.migration_copies(now);
            }
            (Message::Flushed(_), _) => self.copies_flushed(),
            (Message::Pong, Peer::Rounds { .. }) => self.arrived(epoch, now),
            (Message::Ack, Peer::Streaming) if self.in_flight.iter().any(|sent| sent.epoch == epoch) => {
                let cut = self.in_flight.iter().find(|sent| sent.epoch == epoch).map_or(now, |sent| sent.cut);
                self.in_flight.retain(|sent| sent.epoch > epoch);
                self.acked = Some(epoch);
                self.judge_lag(now, now.saturating_duration_since(cut));
            }
            (Message::Promotable, Peer::Streaming) => {
                self.promotable = true;
                self.veto_retry = now;
            }
            (Message::HandedOverAck, Peer::Streaming) if !self.migrates() => self.handed_over(),
            (Message::HandedOverAck, Peer::Streaming)
                if epoch == self.epoch && matches!(self.hand_over, HandOver::Telling { .. }) =>
            {
                self.hand_over = HandOver::Recorded;
            }
            _ => {}
        }
    }

    pub(super) fn welcomed(&mut self, welcome: Welcome, now: Instant) {
        self.peer_node = welcome.node.clone();
        let ours = welcome.whole && welcome.generation == self.generation();
        self.peer_whole = ours;
        if ours {
            self.epoch = self.epoch.max(welcome.epoch);
        }
        self.promotable = false;
        self.forget_epochs();
        let holds = welcome.epoch;
        let fits = |base: &Base| holds == base.committed || base.kept.contains(&holds);
        let resumable = ours && !self.gate_open && welcome.session == self.session && !self.migrates();
        // A copy of a disk can have more than the image: only the cut that it is begun with says what counts.
        let resumable = resumable && !self.mirrors();
        if let Some(base) = self.base.as_ref().filter(|base| resumable && fits(base)) {
            self.acked = (holds != base.committed).then_some(holds);
            let deadline = now + self.config.peer_timeout;
            let missing = base.kept.iter().filter(|kept| **kept > holds);
            self.in_flight = missing.map(|epoch| InFlight { epoch: *epoch, cut: now, deadline }).collect();
            self.cycle = if self.in_flight.is_empty() { Cycle::Idle } else { Cycle::Resend { after: holds } };
            self.peer = Peer::Streaming;
            self.next_cut = now;
            self.peer_backoff = RETRY_MIN;
            self.note(format!("{} is back with epoch {}; going on from there", welcome.node, welcome.epoch));
        } else {
            self.base = None;
            // A first copy holds everything.
            (self.early, self.again) = (false, false);
            let wait = ours && self.config.clustered || self.mirrors();
            self.peer = Peer::Welcomed { wait, log_ready: false };
            self.note(format!("connected to {}; a first copy is needed", welcome.node));
        }
    }

    pub(super) fn vmm_refused(&mut self, now: Instant, why: String) {
        let pause = Duration::from_secs(1);
        if self.vmm.is_none() {
            if self.migrates() {
                return self.end_migration(Err(format!("the machine here cannot be migrated: {why}")));
            }
            self.vmm_retry = now + RETRY_MIN;
            self.note(format!("the VMM cannot be replicated yet: {why}"));
            return;
        }
        if self.asked == Asked::Throttle {
            // The guest runs as fast as it did; nothing else depends on it.
            self.asked = Asked::Nothing;
            return self.note(format!("the VMM refused to be throttled: {why}"));
        }
        if self.migrates() {
            return self.end_migration(Err(format!("the VMM refused a request: {why}")));
        }
        if self.hand_over == HandOver::Cut {
            self.fail_hand_over(format!("the VMM refused the last checkpoint: {why}"));
            self.detach = Some("the hand-over failed".into());
            return;
        }
        if self.peer == Peer::Streaming && self.cycle == Cycle::Idle {
            match std::mem::replace(&mut self.busy, Busy::No) {
                Busy::Cutting { again } => {
                    // It cannot be cut now (it shuts down, for example): the image stays what it is, and the epoch goes on.
                    self.epoch = Epoch(self.epoch.0.saturating_sub(1));
                    self.again |= again;
                    self.next_cut = now + pause;
                    self.note(format!("the VMM refused a checkpoint: {why}"));
                    return;
                }
                Busy::Copying => return self.note(format!("the VMM refused to copy pages early: {why}")),
                Busy::No => {}
            }
        }
        // Anything else in the middle of something: begin again with a fresh session.
        self.detach = Some(format!("the VMM refused a request: {why}"));
    }

    pub(super) fn forget_vmm(&mut self, now: Instant, why: String) {
        let had = self.vmm.take().is_some();
        self.vmm_retry = now + RETRY_MIN;
        self.base = None;
        self.rest = Rest::Nothing;
        self.forget_epochs();
        (self.early, self.again, self.busy) = (false, false, Busy::No);
        // (The end of the session ends the throttling.)
        (self.share, self.share_told) = (0, 0);
        self.gate_open = false;
        self.log_on = false;
        (self.asked, self.storage) = (Asked::Nothing, None);
        if had && self.peer != Peer::Away {
            self.lose_peer(now, why);
        } else {
            self.note(why);
        }
        self.cycle = Cycle::Idle;
        self.detach = None;
        if self.migrates() {
            return self.end_migration(Err(self.facts.note.clone()));
        }
        if matches!(self.hand_over, HandOver::Wanted | HandOver::Cut) {
            self.fail_hand_over("the VMM's session ended during the hand-over".into());
        }
    }

    pub(super) fn lose_peer(&mut self, now: Instant, why: String) {
        if self.peer == Peer::Away {
            return;
        }
        if self.migrates() {
            if !matches!(self.hand_over, HandOver::Recorded | HandOver::Done) {
                return self.end_migration(Err(why));
            }
            // Nothing depends on the target any more.
            self.disconnect = true;
            self.peer = Peer::Away;
            return;
        }
        let was_protected = self.protected();
        if was_protected {
            self.facts.losses += 1;
        }
        self.disconnect = self.peer != Peer::Connecting;
        if self.peer == Peer::Streaming {
            match self.cycle {
                Cycle::Sending(captured) if self.base.is_some() => self.rest = Rest::Keep(captured),
                Cycle::Continue if self.base.is_some() => self.rest = Rest::KeepMore,
                Cycle::Sending(captured) if captured.more => self.rest = Rest::Drop,
                Cycle::Continue => self.rest = Rest::Drop,
                // Acknowledged, but the VMM was not told: the standby has it, and will say so when it is back.
                Cycle::Sending(_) | Cycle::Early(_) | Cycle::Idle | Cycle::Resend { .. } => {}
            }
            self.veto_retry = now;
            self.veto_backoff = RETRY_MIN;
        }
        if self.rest == Rest::Nothing {
            // The peer forgets half an epoch: what was copied early for it has to be in the next cut again.
            self.again |= std::mem::take(&mut self.early) || matches!(self.cycle, Cycle::Early(_));
        }
        self.forget_epochs();
        // Nobody waits for a standby that is not there.
        self.share = 0;
        match self.hand_over {
            HandOver::Telling { .. } => self.handed_over(),
            HandOver::Cut => {
                self.fail_hand_over(format!("the standby was lost during the hand-over: {why}"));
                // Only the end of the session makes the VMM run again.
                self.detach = Some("the hand-over failed; the machine runs on here".into());
            }
            HandOver::Wanted => self.fail_hand_over(format!("the standby was lost: {why}")),
            HandOver::No | HandOver::Recorded | HandOver::Done => {}
        }
        self.cycle = Cycle::Idle;
        self.peer = Peer::Away;
        self.promotable = false;
        self.peer_retry = now + self.peer_backoff;
        self.peer_backoff = (self.peer_backoff * 2).min(Duration::from_secs(1));
        self.note(if was_protected { format!("protection lost: {why}") } else { why });
    }

    pub(super) fn hook_done(&mut self, call: VetoCall, result: Result<(), String>, now: Instant) {
        let ok = result.is_ok();
        if let Err(why) = result {
            self.veto_retry = now + self.veto_backoff;
            self.veto_backoff = (self.veto_backoff * 2).min(RETRY_MAX);
            let what = match call {
                VetoCall::Veto => "the veto against the standby is not durable; outputs wait",
                VetoCall::ClearVeto => "the veto against the standby could not be lifted; it cannot take over yet",
            };
            self.note(format!("{what}: {why}"));
        } else {
            self.veto_backoff = RETRY_MIN;
        }
        self.veto = match call {
            VetoCall::Veto if ok => Veto::Standing,
            // A hook may outlive the stream that it was called for: then its word says nothing of this one's standby.
            VetoCall::ClearVeto if ok && self.promotable => Veto::Cleared,
            _ => Veto::Unknown,
        };
        if self.protected() {
            self.note(format!("protected: {} holds epoch {}", self.peer_node, self.committed));
        }
    }

    pub(super) fn want_hand_over(&mut self) {
        if self.migrates() {
            // It is under way by itself, and answers when it ends.
            self.answer = self.migration_end();
        } else if self.hand_over == HandOver::Done {
            self.answer = Some(Ok(HandedOver { epoch: self.committed }));
        } else if self.hand_over != HandOver::No {
            // Under way already: whoever asks again hears the same answer.
        } else if !self.protected() {
            let why = "the machine cannot be handed over: no standby is up to date (see the status)";
            self.answer = Some(Err(why.into()));
        } else {
            self.hand_over = HandOver::Wanted;
        }
    }

    pub(super) fn handed_over(&mut self) {
        if matches!(self.hand_over, HandOver::Telling { .. }) {
            self.hand_over = HandOver::Done;
            self.answer = Some(Ok(HandedOver { epoch: self.committed }));
            self.note(format!("handed over at epoch {}; the machine is stopped here", self.committed));
        }
    }

    pub(super) fn fail_hand_over(&mut self, why: String) {
        self.hand_over = HandOver::No;
        self.answer = Some(Err(format!("{why}; the machine runs on here")));
    }

    pub(super) fn found_stale(&mut self, generation: Generation, now: Instant) {
        if self.migrates() {
            // Nothing here depends on what another node has seen once: the machine runs on.
            let ours = self.generation();
            let why = format!(
                "the target knows generation {generation} of the machine, and what runs here is generation {ours}: stop the machine and \
                 start it again before it is migrated there"
            );
            return self.end_migration(Err(why));
        }
        if matches!(self.hand_over, HandOver::Telling { .. } | HandOver::Done) {
            // As planned: the machine runs over there. Losing the peer completes the hand-over.
            return self.lose_peer(now, format!("generation {generation} has taken the machine over"));
        }
        let note = format!(
            "generation {generation} of the machine runs elsewhere; generation {} is ended here",
            self.generation()
        );
        self.stale = self.stale.max(Some(generation));
        self.lose_peer(now, note.clone());
        self.detach = None;
        self.note(note);
    }

    pub(super) fn note(&mut self, note: String) {
        if note != self.facts.note {
            self.notes.push(note.clone());
            self.facts.note = note;
        }
    }
}
