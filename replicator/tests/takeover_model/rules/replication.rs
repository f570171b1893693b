//! The sender, the receiver and the hook that imposes and lifts the veto.

use super::{Action, Broken, Takeover};
use crate::world::*;

impl Takeover {
    /// `replicator/src/sender`: the stream.
    pub(super) fn sender(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        let mut vm = w.hosts[n].vm?;
        let peer = 1 - n;
        let reachable = w.link && w.hosts[peer].works();
        if let Action::Connect(_) = action {
            // A standby's VMM and replicator are started by the cluster.
            let started = w.hosts[peer].quorate && w.hosts[peer].promoting.is_none();
            if !reachable || !started || w.conn.is_some_and(|c| c.sender_open) {
                return None;
            }
            return greet(w, n, &vm);
        }
        let mut conn = *w.sending(n)?;
        match (action, conn.phase) {
            (Action::BeginCopy(_), Phase::Welcomed { wait }) if (!wait || vm.gate_open) && reachable => {
                w.hosts[peer].image = Image::Inconsistent;
                conn.phase = Phase::Copying;
            }
            (Action::Arm(_), Phase::Copying) => {
                vm.gate_open = false;
                conn.phase = Phase::Streaming;
                conn.wire = Some(vm.past);
                conn.awaiting = true;
                conn.promotable = false;
            }
            (Action::Cut(_), Phase::Streaming) if !conn.awaiting && vm.past.len > vm.committed => {
                conn.wire = Some(vm.past);
                conn.awaiting = true;
            }
            (Action::TakeAck(_), Phase::Streaming) if conn.awaiting && w.link => {
                vm.committed = vm.committed.max(conn.ack.take()?);
                conn.awaiting = false;
            }
            (Action::SenderLoses(_), _) if !(reachable && conn.receiver_open) => {
                w.sender_closes(n);
                return Some(());
            }
            _ => return None,
        }
        w.hosts[n].vm = Some(vm);
        w.conn = Some(conn);
        Some(())
    }

    /// `agents/src/veto.rs` and the rules in `replicator/src/sender.rs` that ask for it.
    pub(super) fn veto(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        if let Action::OrphanClears(_) = action {
            if !w.hosts[n].orphan || !w.can_store(n) {
                return None;
            }
            w.hosts[n].orphan = false;
            self.lift(w, n);
            return Some(());
        }
        let vm = w.hosts[n].vm?;
        let streams = w.streams(n);
        let promotable = w.sending(n).is_some_and(|c| c.promotable);
        match (action, w.hosts[n].veto) {
            (Action::WriteVeto(_), Veto::Unknown | Veto::Cleared)
                if !streams
                    && !vm.gate_open
                    && w.can_store(n)
                    && (!w.hosts[n].orphan || self.is(Broken::HooksOverlap)) =>
            {
                if !self.belongs(&w.hosts[n].cib, n, vm.generation) {
                    w.end_machine(n); // superseded
                    return Some(());
                }
                w.store(n, |cib| {
                    cib.veto = Some(n);
                    cib.generations[n] = cib.generations[n].max(vm.generation);
                });
                let proven = self.is(Broken::VetoCountsWhenWritten);
                w.hosts[n].veto = if proven { Veto::Standing } else { Veto::Written };
            }
            (Action::ProveVeto(_), Veto::Written) => prove(w, n)?,
            // The hook's time is over.
            (Action::GiveUpVeto(_), Veto::Written) => w.hosts[n].veto = Veto::Unknown,
            (Action::OpenGate(_), known) if !streams && !vm.gate_open => {
                if known != Veto::Standing && !self.is(Broken::GateOpensWithoutVeto) {
                    return None;
                }
                w.hosts[n].vm = Some(Vm { gate_open: true, ..vm });
            }
            (Action::ClearVeto(_), Veto::Unknown | Veto::Standing) if streams && promotable => {
                w.hosts[n].veto = Veto::Clearing;
            }
            (Action::ClearVetoDone(_), Veto::Clearing) if w.can_store(n) => {
                if self.lift(w, n) {
                    let known = promotable || self.is(Broken::LateLiftCounts);
                    w.hosts[n].veto = if known { Veto::Cleared } else { Veto::Unknown };
                }
            }
            _ => return None,
        }
        Some(())
    }

    /// Whether the machine belongs to `n`, where it runs as `generation`, by this copy of the configuration. A copy that has lost that
    /// generation (an older configuration prevailed when the nodes met again) takes nothing away from it.
    fn belongs(&self, cib: &Cib, n: Node, generation: u8) -> bool {
        let (owner, newest) = cib.newest();
        owner == n || newest < generation && !self.is(Broken::LostGenerationEnds)
    }

    /// Delete the constraint, if the machine belongs to this node.
    fn lift(&self, w: &mut World, n: Node) -> bool {
        let host = &w.hosts[n];
        let ours = self.belongs(&host.cib, n, host.vm.map_or(0, |vm| vm.generation));
        if ours {
            w.store(n, |cib| cib.veto = None);
        }
        ours
    }

    /// `replicator/src/receiver.rs`.
    pub(super) fn receiver(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        let peer = 1 - n;
        let alive = w.link && w.hosts[peer].works();
        let mut conn = w.conn.filter(|c| c.from == peer && c.receiver_open)?;
        match action {
            Action::Stage(_) if w.link => {
                conn.staged = Some(conn.wire.take()?);
                if self.is(Broken::AckBeforeCommit) && conn.sender_open {
                    conn.ack = conn.staged.map(|past| past.len);
                }
            }
            Action::Commit(_) => {
                let past = conn.staged.take()?;
                w.hosts[n].image = Image::Whole { generation: conn.generation, past };
                conn.ack = conn.sender_open.then_some(past.len);
            }
            // The cluster knows the score, and the sender hears of it.
            Action::Report(_) if alive && conn.sender_open && !conn.promotable => {
                if !matches!(w.hosts[n].image, Image::Whole { .. }) || conn.phase != Phase::Streaming {
                    return None;
                }
                conn.promotable = true;
            }
            Action::ReceiverLoses(_) if !(alive && conn.sender_open) => {
                w.receiver_closes(n);
                return Some(());
            }
            _ => return None,
        }
        w.conn = Some(conn);
        Some(())
    }
}

/// `Receiver::hello`.
fn greet(w: &mut World, n: Node, vm: &Vm) -> Option<()> {
    let peer = 1 - n;
    let standby = w.hosts[peer];
    let newest = standby.floor.max(standby.vm.map_or(0, |theirs| theirs.generation));
    if vm.generation < newest {
        w.end_machine(n); // Stale
        return Some(());
    }
    if standby.vm.is_some() {
        return None; // refused: its memory is in use
    }
    w.receiver_closes(peer);
    let host = &mut w.hosts[peer];
    host.floor = vm.generation;
    if let Image::Whole { generation, .. } = host.image
        && (vm.gate_open || generation < vm.generation)
    {
        host.image = Image::Outdated;
    }
    let wait = matches!(host.image, Image::Whole { .. });
    w.conn = Some(Conn {
        from: n,
        generation: vm.generation,
        sender_open: true,
        receiver_open: true,
        phase: Phase::Welcomed { wait },
        wire: None,
        staged: None,
        ack: None,
        awaiting: false,
        promotable: false,
    });
    Some(())
}

/// The proof that a written veto counts.
fn prove(w: &mut World, n: Node) -> Option<()> {
    let (host, peer) = (w.hosts[n], w.hosts[1 - n]);
    let ours = host.cib.newest();
    if host.sees {
        if !w.together() {
            return None; // the peer does not answer
        }
        let (owner, theirs) = peer.cib.newest();
        if owner != n && theirs > ours.1 {
            w.store(n, |cib| cib.veto = None);
            w.end_machine(n); // superseded
            return Some(());
        }
        if theirs < ours.1 || peer.cib.veto != Some(n) {
            return None;
        }
    } else if host.unclean || !host.quorate || host.cib.veto != Some(n) {
        return None;
    }
    w.hosts[n].veto = Veto::Standing;
    Some(())
}
