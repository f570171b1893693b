//! Corosync, fencing, Pacemaker and the vmm agent.

use super::{Action, Broken, Takeover};
use crate::world::*;

impl Takeover {
    pub(super) fn fencing(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        let peer = 1 - n;
        let host = &mut w.hosts[n];
        match (action, host.fencing) {
            (Action::RequestFencing(_), Fencing::No) if host.works() && host.quorate && host.unclean => {
                host.fencing = Fencing::Requested;
            }
            // The device acts whatever has become of the node that asked it, unless that had no time to.
            (Action::Fence(_), Fencing::Requested) => {
                host.fencing = Fencing::Executed;
                if !(self.zombies && w.hosts[peer].frozen) {
                    w.cut_power(peer);
                }
            }
            (Action::ConfirmFencing(_), Fencing::Executed) if host.works() && !host.sees => {
                host.fencing = Fencing::No;
                host.unclean = false;
            }
            _ => return None,
        }
        Some(())
    }

    /// The policy engine and the vmm agent (`agents/src/vmm/promote.rs`, `rules.rs`).
    pub(super) fn pacemaker(&self, w: &mut World, action: Action, n: Node) -> Option<()> {
        let together = w.together();
        let (host, peer) = (w.hosts[n], w.hosts[1 - n]);
        match action {
            Action::PromoteStore(_) => {
                let dead = !host.sees && (!host.unclean || self.is(Broken::LostCountsAsDead));
                let free = if together { peer.vm.is_none() && peer.promoting.is_none() } else { dead };
                let allowed = host.cib.veto.is_none_or(|only| only == n);
                let holds = |image| matches!(image, Image::Whole { .. });
                // Where both can be promoted, the better score; without an image it is refused while the other has one.
                // (One that the veto keeps from running is nobody's fallback.)
                let mut better = together && holds(peer.image) && !holds(host.image);
                better &= host.cib.veto != Some(n) || self.is(Broken::VetoedImageBlocks);
                let idle = host.vm.is_none() && host.promoting.is_none();
                if !(idle && free && allowed && w.can_store(n)) || better || host.image == Image::Outdated {
                    return None;
                }
                let known = host.cib.newest().1.max(host.floor);
                let generation = if self.is(Broken::GenerationStays) { known.max(1) } else { known + 1 };
                w.store(n, |cib| cib.generations[n] = generation);
                w.hosts[n].promoting = Some(generation);
            }
            Action::PromoteRun(_) => {
                let generation = host.promoting?;
                w.receiver_closes(n);
                let spares = self.is(Broken::ColdBootSparesImages);
                let past = match host.image {
                    Image::Outdated => return None,
                    Image::Whole { generation: made_by, past } if made_by > host.cib.ended || spares => {
                        let seen = w.board.outside;
                        let lacks = past.life == seen.life && !past.contains(&seen);
                        if lacks || past.life < seen.life {
                            w.wrong = Some(Wrong::StaleTakeover);
                        }
                        past
                    }
                    _ => {
                        // A cold boot: whatever images there are belong to the past.
                        if !w.can_store(n) {
                            return None;
                        }
                        w.store(n, |cib| cib.ended = cib.ended.max(generation - 1));
                        Past::boot(generation)
                    }
                };
                let host = &mut w.hosts[n];
                host.promoting = None;
                host.image = Image::Inconsistent;
                host.floor = generation;
                host.veto = Veto::Unknown;
                host.vm = Some(Vm { generation, past, gate_open: false, committed: past.len, attached: false });
            }
            Action::Demote(_) => {
                host.vm?;
                let forbidden = host.quorate && host.cib.veto.is_some_and(|only| only != n);
                let twice = together && peer.vm.is_some();
                if !(forbidden || twice) {
                    return None;
                }
                w.end_machine(n);
            }
            _ => return None,
        }
        Some(())
    }
}

pub(super) fn repair(w: &mut World, action: Action, n: Node) -> Option<()> {
    let host = &mut w.hosts[n];
    match action {
        Action::PowerOn(_) if !host.on => {
            // Corosync's wait_for_all: it decides nothing before it has seen its peer.
            *host = Host { on: true, cib: host.cib, ..Host::default() };
        }
        Action::Thaw(_) if host.frozen => {
            host.frozen = false;
            let peer = w.hosts[1 - n];
            if w.ring && peer.works() && !peer.sees {
                // The first that it hears is the ring that has been formed without it.
                w.hosts[n].sees = false;
                join(w, n).or_else(|| join(w, 1 - n))?;
            }
        }
        _ => return None,
    }
    Some(())
}

pub(super) fn membership(w: &mut World, action: Action, n: Node) -> Option<()> {
    let peer = 1 - n;
    let heard = w.ring && w.hosts[peer].works() && w.hosts[peer].sees;
    match action {
        Action::LoseMember(_) if w.hosts[n].works() && w.hosts[n].sees && !heard => {
            w.hosts[n].sees = false;
            w.hosts[n].unclean = true;
        }
        Action::Join(_) if w.ring && w.hosts.iter().all(|h| h.works() && !h.sees) => join(w, n)?,
        Action::CatchUp(_) if w.together() && w.hosts[0].cib != w.hosts[1].cib => prevails(w, n)?,
        _ => return None,
    }
    Some(())
}

fn join(w: &mut World, n: Node) -> Option<()> {
    prevails(w, n)?;
    for host in &mut w.hosts {
        (host.sees, host.unclean, host.quorate) = (true, false, true);
        if host.fencing == Fencing::Executed {
            host.fencing = Fencing::No;
        }
    }
    Some(())
}

/// The configuration of `n` replaces the other, if it is not older. A node that has just been booted loses a tie.
fn prevails(w: &mut World, n: Node) -> Option<()> {
    let (ours, theirs) = (w.hosts[n], w.hosts[1 - n]);
    let fresh = |h: &Host| h.vm.is_none() && !h.quorate;
    let tie = ours.cib.version == theirs.cib.version;
    if ours.cib.version < theirs.cib.version || tie && fresh(&ours) && !fresh(&theirs) {
        return None;
    }
    w.hosts[1 - n].cib = ours.cib;
    Some(())
}
