//! The veto: the cluster's durable word that only this node may run the machine.
//!
//! The primary may let outputs go without a standby only when no other node can be promoted in ignorance of it. So `Ok` from
//! [`impose`] means: the constraint is stored, and the peer's own copy of the CIB shows it, or the peer is known to be dead or
//! cleanly down while we have quorum. Everything else is an error, and outputs go on waiting.
//!
//! ```text
//! quorum? ─► ours the newest generation? ─► constraint ─┬─► peer's own CIB shows it ──────────► proven
//!                                                       ├─► peer offline, not unclean ────────► proven
//!                                                       └─► peer unclean (being fenced): ask again until the deadline
//! ```
//! A node that wakes from the dead still believes itself the primary. Its veto would demote the machine where it really runs; the
//! generation, looked at before and in the peer's copy after, keeps it from that.
//!
//! Two rules here came out of the model (`docs/decisions/0010-takeover-is-model-checked.md`): imposing and lifting exclude each other on a node
//! ([`lock`]), for a hook may outlive the sender that called it; and a configuration that shows only generations older than the
//! machine's own (an older copy prevailed when nodes met again) supersedes nobody: the generation is stored again.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use ocf::Deadline;
use understudy_protocol::ids::Generation;

use crate::cluster::{Cib, Cluster, ClusterError, Member, Veto, generation_attribute, veto_constraint, veto_id};
use crate::run_lock;

/// Reading the peer's CIB takes milliseconds (a second where everything is emulated), or the peer does not answer at all.
const PEER_PATIENCE: Duration = Duration::from_millis(2500);

/// Why there is no proof of a veto.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VetoError {
    /// Another node runs the machine under a newer generation.
    #[error(
        "{machine} belongs to node {owner} now (generation {generation}); this node has been superseded and must stop it"
    )]
    Superseded {
        /// The machine.
        machine: String,
        /// Who runs it.
        owner: String,
        /// Under what.
        generation: Generation,
    },
    /// This partition may not decide.
    #[error("this partition of the cluster has no quorum: nothing can be decided about {0}")]
    NoQuorum(String),
    /// Another hook is at it.
    #[error("another process on this node is still changing the veto for {0}")]
    Busy(String),
    /// The constraint has no resource to speak of.
    #[error(
        "no promotable clone of ocf:understudy:vmm for machine {0} is configured; name the primitive with --vmm-resource"
    )]
    NoClone(String),
    /// It may be stored, but it is not proven that the peer knows.
    #[error("the veto for {machine} is not proven against node {peer}: {why}")]
    NotProven {
        /// The machine.
        machine: String,
        /// The peer.
        peer: String,
        /// What is missing.
        why: String,
    },
    /// A tool failed.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// What a veto is about.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// The machine.
    pub machine: &'a str,
    /// Its vmm primitive; looked for in the CIB if not given.
    pub resource: Option<&'a str>,
    /// The generation under which it runs on this node, as its VMM says; zero if that is not known.
    pub runs_as: Generation,
}

/// Keep other processes on this node from changing the machine's veto, as long as the result lives. Without this, a hook that lifts
/// the veto and has outlived its sender could do so after the next sender's veto has been proven.
pub fn lock(run_dir: &Path, machine: &str, deadline: Deadline) -> Result<File, VetoError> {
    run_lock::take(run_dir, "veto.lock", deadline).ok_or_else(|| VetoError::Busy(machine.to_owned()))
}

impl Subject<'_> {
    fn resource(&self, cib: &Cib) -> Result<String, VetoError> {
        self.resource
            .map(str::to_owned)
            .or_else(|| cib.vmm_of(self.machine))
            .ok_or_else(|| VetoError::NoClone(self.machine.to_owned()))
    }
}

/// Impose the veto and prove it.
pub fn impose(cluster: &dyn Cluster, subject: &Subject<'_>, peer: &str, deadline: Deadline) -> Result<(), VetoError> {
    let machine = subject.machine;
    let node = cluster.node_name(deadline)?;
    if !cluster.quorate(deadline)? {
        return Err(VetoError::NoQuorum(machine.to_owned()));
    }
    let cib = cluster.cib(deadline)?;
    let ours = current_owner(&cib, subject, &node)?;
    if newest(&cib, machine).is_none_or(|(_, stored)| stored < subject.runs_as) && subject.runs_as > Generation::ZERO {
        let attribute = generation_attribute(machine);
        cluster.set_node_attribute(&node, &attribute, &subject.runs_as.to_string(), deadline)?;
    }
    let resource = subject.resource(&cib)?;
    let clone = cib.clone_of(&resource).ok_or_else(|| VetoError::NoClone(machine.to_owned()))?;
    let wanted = Veto { only: node.clone(), clone: clone.clone() };
    if cib.veto(machine) != Some(wanted.clone()) {
        cluster.put_constraint(&veto_constraint(machine, &clone, &node), deadline)?;
    }
    let claim = Claim { machine, node: &node, generation: ours, wanted: &wanted };
    prove(cluster, &claim, peer, deadline)
}

/// What is to be proven: this node's veto under its own generation.
struct Claim<'a> {
    machine: &'a str,
    node: &'a str,
    generation: Generation,
    wanted: &'a Veto,
}

fn prove(cluster: &dyn Cluster, claim: &Claim<'_>, peer: &str, deadline: Deadline) -> Result<(), VetoError> {
    let machine = claim.machine;
    let mut missing = String::from("there was no time left to ask");
    let proven = deadline.wait_for(|| match evidence(cluster, claim, peer, deadline) {
        Ok(Evidence::Proven) => Some(Ok(())),
        Ok(Evidence::NotYet(why)) => {
            missing = why;
            None
        }
        Err(error @ VetoError::Superseded { .. }) => Some(Err(error)),
        // A tool that was cut off by our own deadline says nothing; what was known before does.
        Err(_) if deadline.passed() => None,
        Err(error) => {
            missing = error.to_string();
            None
        }
    });
    match proven {
        Some(Ok(())) => Ok(()),
        Some(Err(superseded)) => {
            // Two nodes claimed the machine at once; ours is the older claim and has to go. If this fails the owner's own
            // veto, of the same id, replaces it.
            let _ = cluster.delete_constraint(&veto_id(machine), Deadline::after(PEER_PATIENCE));
            Err(superseded)
        }
        None => Err(VetoError::NotProven { machine: machine.to_owned(), peer: peer.to_owned(), why: missing }),
    }
}

enum Evidence {
    Proven,
    NotYet(String),
}

fn evidence(cluster: &dyn Cluster, claim: &Claim<'_>, peer: &str, deadline: Deadline) -> Result<Evidence, VetoError> {
    let Claim { machine, node, generation, wanted } = *claim;
    let members = cluster.members(deadline)?;
    let not_yet = |why: String| Ok(Evidence::NotYet(why));
    match members.iter().find(|m| m.name == peer) {
        None => not_yet(format!("the cluster has no node {peer}; its nodes are {}", names(&members))),
        Some(Member { online: true, .. }) => {
            let cib = cluster.cib_of(peer, deadline.within(PEER_PATIENCE))?;
            match newest(&cib, machine) {
                Some((owner, theirs)) if owner != node && theirs > generation => {
                    return Err(VetoError::Superseded { machine: machine.to_owned(), owner, generation: theirs });
                }
                // A node that has just come back still reads what it knew when it died.
                Some((_, theirs)) if theirs < generation => {
                    return not_yet("its copy of the CIB is older than this machine's generation".into());
                }
                _ => {}
            }
            if cib.veto(machine).as_ref() == Some(wanted) {
                return Ok(Evidence::Proven);
            }
            not_yet(format!("its copy of the CIB does not show the constraint {}", veto_id(machine)))
        }
        Some(Member { unclean: true, .. }) => {
            not_yet("it is lost and not yet known to be dead (waiting for fencing)".into())
        }
        Some(_) => {
            // It is down. What it will read when it comes back is what this partition decided, if this partition has
            // quorum still, and has it stored.
            if !cluster.quorate(deadline)? {
                return Err(VetoError::NoQuorum(machine.to_owned()));
            }
            if cluster.cib(deadline)?.veto(machine).as_ref() == Some(wanted) {
                return Ok(Evidence::Proven);
            }
            not_yet("the constraint is not in the CIB".into())
        }
    }
}

fn names(members: &[Member]) -> String {
    members.iter().map(|m| m.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// Who holds the newest generation by this copy of the CIB.
fn newest(cib: &Cib, machine: &str) -> Option<(String, Generation)> {
    cib.generations(&generation_attribute(machine)).first().cloned()
}

/// The generation under which `node` runs the machine; fails if another node holds a newer one (or as new a one, if it is not known
/// under which the machine runs here).
fn current_owner(cib: &Cib, subject: &Subject<'_>, node: &str) -> Result<Generation, VetoError> {
    match newest(cib, subject.machine) {
        Some((owner, generation)) if owner != node && generation >= subject.runs_as => {
            Err(VetoError::Superseded { machine: subject.machine.to_owned(), owner, generation })
        }
        Some((_, generation)) => Ok(generation.max(subject.runs_as)),
        None => Ok(subject.runs_as),
    }
}

/// Lift the veto: the standby holds a whole checkpoint again. Only the owner may.
pub fn lift(cluster: &dyn Cluster, subject: &Subject<'_>, force: bool, deadline: Deadline) -> Result<(), VetoError> {
    let cib = cluster.cib(deadline)?;
    if !force {
        current_owner(&cib, subject, &cluster.node_name(deadline)?)?;
    }
    cluster.delete_constraint(&veto_id(subject.machine), deadline)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Result as ClusterResult;
    use crate::cluster::tests::cib_with;
    use std::cell::RefCell;

    /// A cluster made of values: what is asked is answered from them; what is stored is kept in `constraint`.
    struct Fake {
        quorum: bool,
        peer: Option<Member>,
        generations: Vec<(&'static str, u64)>,
        peer_generations: Vec<(&'static str, u64)>,
        peer_follows: bool,
        constraint: RefCell<String>,
        fenced_after: RefCell<Option<u32>>,
        stored: RefCell<Vec<String>>,
    }

    fn healthy() -> Fake {
        Fake {
            quorum: true,
            peer: Some(Member { name: "n2".into(), online: true, unclean: false }),
            generations: vec![("n1", 3)],
            peer_generations: vec![("n1", 3)],
            peer_follows: true,
            constraint: RefCell::default(),
            fenced_after: RefCell::default(),
            stored: RefCell::default(),
        }
    }

    impl Cluster for Fake {
        fn node_name(&self, _: Deadline) -> ClusterResult<String> {
            Ok("n1".into())
        }
        fn quorate(&self, _: Deadline) -> ClusterResult<bool> {
            Ok(self.quorum)
        }
        fn cib(&self, _: Deadline) -> ClusterResult<Cib> {
            Ok(cib_with(&self.constraint.borrow(), &[], &self.generations))
        }
        fn cib_of(&self, _: &str, _: Deadline) -> ClusterResult<Cib> {
            let shown = if self.peer_follows { self.constraint.borrow().clone() } else { String::new() };
            Ok(cib_with(&shown, &[], &self.peer_generations))
        }
        fn members(&self, _: Deadline) -> ClusterResult<Vec<Member>> {
            let mut peer = self.peer.clone();
            if let (Some(left), Some(peer)) = (self.fenced_after.borrow_mut().as_mut(), peer.as_mut()) {
                peer.unclean = *left > 0;
                *left = left.saturating_sub(1);
            }
            Ok([Member { name: "n1".into(), online: true, unclean: false }].into_iter().chain(peer).collect())
        }
        fn set_node_attribute(&self, node: &str, name: &str, value: &str, _: Deadline) -> ClusterResult<()> {
            self.stored.borrow_mut().push(format!("{node} {name} {value}"));
            Ok(())
        }
        fn set_transient_attribute(&self, name: &str, value: Option<&str>, _: Deadline) -> ClusterResult<()> {
            self.stored.borrow_mut().push(format!("{name} {value:?}"));
            Ok(())
        }
        fn put_constraint(&self, xml: &str, _: Deadline) -> ClusterResult<()> {
            *self.constraint.borrow_mut() = xml.to_owned();
            Ok(())
        }
        fn delete_constraint(&self, _: &str, _: Deadline) -> ClusterResult<()> {
            self.constraint.borrow_mut().clear();
            Ok(())
        }
        fn set_score(&self, _: &str, _: Option<i32>, _: Deadline) -> ClusterResult<()> {
            Ok(())
        }
    }

    const SUBJECT: Subject<'static> = Subject { machine: "m1", resource: None, runs_as: Generation(3) };

    fn try_it(fake: &Fake) -> Result<(), VetoError> {
        impose(fake, &SUBJECT, "n2", Deadline::after(Duration::from_millis(300)))
    }

    #[test]
    fn a_veto_is_proven_by_the_peers_own_copy() {
        let fake = healthy();
        assert_eq!(try_it(&fake), Ok(()));
        assert!(fake.constraint.borrow().contains("vm-m1-clone"));
        assert_eq!(try_it(&fake), Ok(()), "a second time");
    }

    #[test]
    fn a_peer_that_does_not_show_the_veto_proves_nothing() {
        let error = try_it(&Fake { peer_follows: false, ..healthy() }).unwrap_err();
        assert!(matches!(error, VetoError::NotProven { .. }), "{error}");
    }

    #[test]
    fn a_peer_that_is_cleanly_down_or_fenced_is_proof_enough() {
        let down = Member { name: "n2".into(), online: false, unclean: false };
        assert_eq!(try_it(&Fake { peer: Some(down), ..healthy() }), Ok(()));
    }

    #[test]
    fn a_lost_peer_is_waited_for_until_it_is_fenced() {
        let lost = Member { name: "n2".into(), online: false, unclean: true };
        let error = try_it(&Fake { peer: Some(lost.clone()), ..healthy() }).unwrap_err();
        assert!(error.to_string().contains("fencing"), "{error}");
        assert_eq!(try_it(&Fake { peer: Some(lost), fenced_after: RefCell::new(Some(3)), ..healthy() }), Ok(()));
    }

    #[test]
    fn an_unknown_peer_proves_nothing() {
        let error = try_it(&Fake { peer: None, ..healthy() }).unwrap_err();
        assert!(error.to_string().contains("no node n2"), "{error}");
    }

    #[test]
    fn without_quorum_nothing_is_stored() {
        let fake = Fake { quorum: false, ..healthy() };
        assert_eq!(try_it(&fake), Err(VetoError::NoQuorum("m1".into())));
        assert!(fake.constraint.borrow().is_empty());
    }

    #[test]
    fn a_node_that_woke_from_the_dead_stores_no_veto() {
        let fake = Fake { generations: vec![("n1", 3), ("n2", 4)], ..healthy() };
        assert!(matches!(try_it(&fake), Err(VetoError::Superseded { .. })));
        assert!(fake.constraint.borrow().is_empty());
    }

    #[test]
    fn a_superseded_nodes_veto_is_taken_back_when_the_peer_knows_better() {
        let fake = Fake { peer_generations: vec![("n1", 3), ("n2", 4)], ..healthy() };
        assert!(matches!(try_it(&fake), Err(VetoError::Superseded { .. })));
        assert!(fake.constraint.borrow().is_empty());
    }

    #[test]
    fn a_peer_that_has_just_returned_with_an_old_cib_supersedes_nobody() {
        // Its copy still says what it knew when it lost its power: that it was the owner, under an older generation.
        let fake = Fake {
            generations: vec![("n1", 3), ("n2", 2)],
            peer_generations: vec![("n1", 1), ("n2", 2)],
            peer_follows: false,
            ..healthy()
        };
        let error = try_it(&fake).unwrap_err();
        assert!(matches!(error, VetoError::NotProven { .. }), "{error}");
        assert!(!fake.constraint.borrow().is_empty(), "the veto of the true owner must stay");
    }

    #[test]
    fn a_generation_that_the_configuration_has_lost_is_stored_again() {
        // The copy of a node that was fenced has prevailed: it knows nothing of the takeover.
        let old = [("n1", 1), ("n2", 2)].to_vec();
        let fake = Fake { generations: old.clone(), peer_generations: old, ..healthy() };
        let error = try_it(&fake).unwrap_err();
        assert!(matches!(error, VetoError::NotProven { .. }), "not before it can be read back: {error}");
        assert_eq!(*fake.stored.borrow(), ["n1 understudy-generation-m1 3"]);
        assert!(fake.constraint.borrow().contains("vm-m1-clone"));
    }

    #[test]
    fn a_generation_that_is_not_known_here_is_superseded_by_any_other_nodes() {
        let old = [("n1", 1), ("n2", 2)].to_vec();
        let fake = Fake { generations: old.clone(), peer_generations: old, ..healthy() };
        let subject = Subject { runs_as: Generation::ZERO, ..SUBJECT };
        let error = impose(&fake, &subject, "n2", Deadline::after(Duration::from_millis(300))).unwrap_err();
        assert!(matches!(error, VetoError::Superseded { .. }), "{error}");
    }

    #[test]
    fn while_a_veto_is_being_lifted_none_is_imposed() {
        let dir = tempfile::tempdir().unwrap();
        let soon = || Deadline::after(Duration::from_millis(50));
        let lifting = lock(dir.path(), "m1", soon()).unwrap();
        assert!(matches!(lock(dir.path(), "m1", soon()), Err(VetoError::Busy(_))));
        drop(lifting);
        assert!(lock(dir.path(), "m1", soon()).is_ok());
    }

    #[test]
    fn only_the_owner_lifts_a_veto_unless_a_person_insists() {
        let other = Fake { generations: vec![("n1", 3), ("n2", 4)], ..healthy() };
        *other.constraint.borrow_mut() = veto_constraint("m1", "vm-m1-clone", "n2");
        let soon = Deadline::after(Duration::from_secs(1));
        assert!(lift(&other, &SUBJECT, false, soon).is_err());
        assert!(!other.constraint.borrow().is_empty());
        assert_eq!(lift(&other, &SUBJECT, true, soon), Ok(()));
        assert!(other.constraint.borrow().is_empty());
    }
}
