//! Faults put in on purpose, to see that the checks see them.

use understudy_replicator::durable::ImageKind;
use understudy_replicator::message::Message;
use understudy_replicator::receiver::Step;

/// One fault, which stays for the whole run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    None,
    SkipCommitRecord,
    ApplyBeforeCommit,
    AckBeforeCommit,
    SkipInconsistentRecord,
    ForgetRepair,
    VetoNotAwaited,
    SealNotAwaited,
    /// The standby acknowledges an epoch before its copies are sealed for it.
    SealOfCopiesLate,
    /// Blocks that only uncommitted slices have count as known to the copy when protection ends.
    ForgetSlices,
    /// The standby does not note that a copy is being written to.
    SkipCopyBegin,
    /// A new first copy refers to what an earlier one had sent.
    KeepShadow,
    /// The same for the device state.
    KeepStateBase,
    /// What is sent again is encoded anew, against what the sender has become meanwhile.
    ResendIsNotTheSame,
    ForgetEarly,
    /// What a lost standby was sent early counts as known to it.
    KeepShadowOfLost,
}

impl Sabotage {
    /// The faults of the standby: what it is to do differs from what the receiver said. The steps follow from a `frame` that
    /// arrived, or else from a start of the process, a report or a connection's end.
    pub fn spoil(self, steps: &mut Vec<Step>, frame: bool) {
        let commit = steps.iter().position(|step| matches!(step, Step::Commit(_)));
        if let Some(at) = commit {
            let find = |wanted: fn(&Step) -> bool| steps.iter().position(wanted);
            let (ack, apply) = (find(|s| matches!(s, Step::Send(_, _, _, Message::Ack))), find(|s| *s == Step::Apply));
            match self {
                Self::SkipCommitRecord => drop(steps.remove(at)),
                Self::ApplyBeforeCommit => steps.swap(at, apply.unwrap()),
                Self::AckBeforeCommit => steps.swap(at, ack.unwrap()),
                _ => {}
            }
        } else if self == Self::SkipInconsistentRecord {
            steps.retain(|step| !matches!(step, Step::SaveRecord(record) if record.image == ImageKind::Inconsistent));
        } else if self == Self::ForgetRepair && !frame {
            steps.retain(|step| *step != Step::Apply);
        }
    }
}
