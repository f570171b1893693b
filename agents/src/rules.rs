//! The decisions that matter, as functions of values: which score a node deserves, under which generation a machine runs, what it
//! runs from, and how it leaves.

use ocf::notify::Members;
use understudy_protocol::control::{ReplicaState, ReplicatorStatus, Role, TakenImage};
use understudy_protocol::ids::Generation;

/// May cold-boot, holds nothing.
pub const SCORE_COLD: i32 = 5;
/// Holds a whole image; the primary is not connected, so it may have gone on without us only under a veto.
pub const SCORE_WHOLE: i32 = 1000;
/// Holds the newest committed epoch, and the primary is connected.
pub const SCORE_UP_TO_DATE: i32 = 10_000;
/// The machine runs here.
pub const SCORE_RUNS: i32 = 10_001;

/// What a node knows about its fitness to run the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fitness {
    /// The machine runs here.
    pub runs_here: bool,
    /// The replica that this node holds, and whether its sender is connected; `None` without a receiver.
    pub replica: Option<(ReplicaState, bool)>,
}

impl Fitness {
    /// As the local replicator's status says.
    pub fn new(runs_here: bool, replicator: Option<&ReplicatorStatus>) -> Self {
        let replica = replicator.filter(|r| r.role == Role::Receiver).map(|r| (r.replica, r.connected));
        Self { runs_here, replica }
    }

    /// The promotion score; `None` means never.
    pub fn score(self) -> Option<i32> {
        match (self.runs_here, self.replica) {
            (true, _) => Some(SCORE_RUNS),
            (false, None) => Some(SCORE_COLD),
            (false, Some((ReplicaState::UpToDate, true))) => Some(SCORE_UP_TO_DATE),
            (false, Some((ReplicaState::UpToDate, false))) => Some(SCORE_WHOLE),
            (false, Some((ReplicaState::Outdated, _))) => None,
            // Half a copy is no image. While the primary lives the veto keeps us from booting a second machine.
            (false, Some((ReplicaState::Inconsistent | ReplicaState::Syncing, _))) => Some(SCORE_COLD),
        }
    }
}

/// The next generation: one more than anybody has seen.
pub fn next_generation(seen: impl IntoIterator<Item = Generation>) -> Generation {
    seen.into_iter().max().unwrap_or(Generation::ZERO).next()
}

/// What promote runs the machine from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The committed image.
    Image(TakenImage),
    /// Power on.
    ColdBoot,
    /// Neither: this node holds no image, and the one named does.
    Refuse {
        /// The node that should be promoted instead.
        holder: String,
    },
}

/// From what to run: this node's image unless its generation was shut down on purpose; a cold boot only if no
/// other node holds an image that would be thrown away by it. `highest` is the newest generation that anybody ran under,
/// `ended` the newest that was shut down, `others` the scores of the other nodes.
pub fn origin(image: Option<TakenImage>, ended: Generation, highest: Generation, others: &[(String, i32)]) -> Origin {
    if let Some(image) = image.filter(|i| i.generation > ended) {
        return Origin::Image(image);
    }
    let all_ended = ended >= highest;
    let better = others.iter().filter(|(_, score)| *score >= SCORE_WHOLE).max_by_key(|(_, score)| *score);
    match better {
        Some((holder, _)) if !all_ended => Origin::Refuse { holder: holder.clone() },
        _ => Origin::ColdBoot,
    }
}

/// How a machine leaves this node on `demote`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// Last checkpoint to the standby, where it goes on.
    HandOver,
    /// The guest is shut down.
    ShutDown,
}

/// Hand over if the machine is to go on: another node is about to be promoted, or this one again after a recovery and the standby
/// can take the machine (the promotion here then gives way to the standby). Where the cluster does not say (no `notify=true`), hand over if there is
/// somebody to take it: nothing is lost that way.
pub fn leaving(members: Option<&Members>, node: &str, replicator: Option<&ReplicatorStatus>) -> Leaving {
    let ready =
        replicator.is_some_and(|r| r.role == Role::Sender && r.connected && r.replica == ReplicaState::UpToDate);
    match members {
        Some(members) if members.promotes_elsewhere(node) => Leaving::HandOver,
        // A recovery in place. What runs now is lost with this process; the standby can have it.
        Some(members) if !members.promote.is_empty() && ready => Leaving::HandOver,
        Some(_) => Leaving::ShutDown,
        None if ready => Leaving::HandOver,
        None => Leaving::ShutDown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_protocol::control::SourceState;
    use understudy_protocol::ids::Epoch;

    #[test]
    fn the_score_has_tiers_and_a_stale_image_has_none() {
        use ReplicaState::*;
        let table = [
            (false, None, Some(5)),
            (false, Some((Inconsistent, false)), Some(5)),
            (false, Some((Inconsistent, true)), Some(5)),
            (false, Some((Syncing, false)), Some(5)),
            (false, Some((Syncing, true)), Some(5)),
            (false, Some((UpToDate, false)), Some(1000)),
            (false, Some((UpToDate, true)), Some(10_000)),
            (false, Some((Outdated, false)), None),
            (false, Some((Outdated, true)), None),
            (true, None, Some(10_001)),
            (true, Some((Outdated, false)), Some(10_001)),
        ];
        for (runs_here, replica, score) in table {
            assert_eq!(Fitness { runs_here, replica }.score(), score, "{runs_here} {replica:?}");
        }
    }

    #[test]
    fn a_generation_is_higher_than_every_one_seen() {
        assert_eq!(next_generation([]), Generation(1));
        assert_eq!(next_generation([Generation(4), Generation(9), Generation(2)]), Generation(10));
    }

    fn image(generation: u64) -> TakenImage {
        TakenImage { epoch: Epoch(7), generation: Generation(generation), state_file: "/s".into() }
    }

    #[test]
    fn a_machine_runs_from_its_image_unless_that_was_shut_down() {
        let others = [("n2".to_owned(), 10_000)];
        assert_eq!(origin(Some(image(3)), Generation(0), Generation(3), &others), Origin::Image(image(3)));
        assert_eq!(origin(Some(image(3)), Generation(2), Generation(3), &[]), Origin::Image(image(3)));
        assert_eq!(origin(Some(image(3)), Generation(3), Generation(3), &others), Origin::ColdBoot);
    }

    #[test]
    fn a_cold_boot_is_refused_while_another_node_holds_an_image() {
        let refuse = Origin::Refuse { holder: "n2".into() };
        for score in [1000, 10_000, 1_000_000] {
            assert_eq!(origin(None, Generation(0), Generation(3), &[("n2".into(), score)]), refuse);
        }
        for score in [-5, 5, 999] {
            assert_eq!(origin(None, Generation(0), Generation(3), &[("n2".into(), score)]), Origin::ColdBoot);
        }
        assert_eq!(origin(None, Generation(0), Generation(0), &[]), Origin::ColdBoot);
    }

    #[test]
    fn a_guest_that_was_shut_down_boots_again_although_images_of_it_lie_about() {
        assert_eq!(origin(None, Generation(3), Generation(3), &[("n2".into(), 1000)]), Origin::ColdBoot);
        // Somebody ran it again since.
        let refuse = Origin::Refuse { holder: "n2".into() };
        assert_eq!(origin(None, Generation(3), Generation(4), &[("n2".into(), 1000)]), refuse);
    }

    pub(crate) fn sender(replica: ReplicaState, connected: bool) -> ReplicatorStatus {
        ReplicatorStatus {
            machine: "m1".into(),
            role: Role::Sender,
            replica,
            source: SourceState::Migrating,
            connected,
            peer: None,
            generation: Generation(3),
            committed: Epoch(1),
            current: Epoch(1),
            lag_ms: 0,
            vetoed: false,
            protected: true,
            sync_progress: 1.0,
            last_sync_ms: 0,
            raw_bytes: 0,
            wire_bytes: 0,
            epochs: 0,
            losses: 0,
            pause_p50_us: 0,
            pause_p99_us: 0,
            pause_max_us: 0,
            statistics: Default::default(),
            verify: Default::default(),
            disk_verify: Default::default(),
            paths: Vec::new(),
            note: String::new(),
        }
    }

    fn promoting(nodes: &[&str]) -> Members {
        let instance = |n: &&str| ocf::notify::Instance { resource: "vm:0".into(), node: Some((*n).into()) };
        Members { promote: nodes.iter().map(instance).collect(), ..Members::default() }
    }

    #[test]
    fn a_machine_is_handed_over_when_another_node_is_promoted_and_shut_down_otherwise() {
        let ready = sender(ReplicaState::UpToDate, true);
        assert_eq!(leaving(Some(&promoting(&["n2"])), "n1", Some(&ready)), Leaving::HandOver);
        assert_eq!(leaving(Some(&promoting(&["n2"])), "n1", None), Leaving::HandOver);
        assert_eq!(leaving(Some(&promoting(&["n1"])), "n1", Some(&ready)), Leaving::HandOver);
        assert_eq!(leaving(Some(&promoting(&["n1"])), "n1", None), Leaving::ShutDown);
        assert_eq!(leaving(Some(&promoting(&[])), "n1", Some(&ready)), Leaving::ShutDown);
        assert_eq!(leaving(None, "n1", Some(&ready)), Leaving::HandOver);
        assert_eq!(leaving(None, "n1", Some(&sender(ReplicaState::UpToDate, false))), Leaving::ShutDown);
        assert_eq!(leaving(None, "n1", Some(&sender(ReplicaState::Syncing, true))), Leaving::ShutDown);
        assert_eq!(leaving(None, "n1", None), Leaving::ShutDown);
    }
}
