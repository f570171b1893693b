//! Live migration of an unprotected machine, model-checked before it is built: `docs/decisions/0011-live-migration.md` says what the rules are
//! and why; this tries them in every order of events, with power cuts, a dead link, and a sender that is ended at any moment.
//!
//! There is no veto and no standby score here: the only judge is Pacemaker, which learns of a migration from nothing but the exit
//! code of `migrate_to`. So the model's question is whether that one bit is enough for the machine to run exactly once.

use stateright::{Checker, HasDiscoveries, Model, Property};

/// The machine's VMM on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    Runs,
    /// The last cut was made: it stands still, and runs on when the session ends.
    Stands,
    /// It was told that the hand-over is complete: it never runs again.
    HandedOver,
    Gone,
}

/// The image on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Image {
    Nothing,
    /// Committed at the last cut.
    Whole,
    /// And recorded, durably, as handed over.
    HandedOver,
}

/// What the sender is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sender {
    Copies,
    /// The last epoch is under way.
    AwaitsAck,
    /// The target is told that the machine is its own.
    Tells,
    /// The target has recorded it; the source's VMM is to be told.
    Told,
    /// The source's VMM knows.
    Done,
    Ended {
        success: bool,
    },
}

/// Pacemaker's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Cluster {
    MigrateTo,
    MigrateFrom,
    /// `migrate_from` has succeeded; the source is stopped.
    OnTarget,
    /// `migrate_to` has failed: `on-fail=block` leaves the machine where it is.
    Blocked,
    /// The source's node is lost: fence it, then start on the target.
    Recovers,
    Started,
    /// The target's node is lost, or `migrate_from` has failed: the machine is stopped wherever it may be, and started again.
    Restarted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    image: Image,
    /// A machine runs on the target, from the image or (false) from a cold boot.
    target: Option<bool>,
    target_on: bool,
    sender: Sender,
    cluster: Cluster,
    link: bool,
    /// Messages under way: the last epoch, its acknowledgement, "it is yours", and that it was recorded.
    wire: [bool; 4],
    faults: u8,
    /// The source's machine ran on after the cut that the image was made at.
    went_on: bool,
}

/// A rule that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A target whose sender is gone runs what it has committed.
    TargetHelpsItself,
    /// `on-fail=ignore`: Pacemaker goes on with `migrate_from` after a failed `migrate_to`.
    FailureIgnored,
    /// As in the hand-over of a protected machine: the VMM is told at the acknowledgement, before the target has recorded anything.
    SourceToldFirst,
    /// A start after the source's death goes on from an image that was recorded as handed over.
    StartUsesTheImage,
    /// `migrate_to` says what its sender said, not what has become of the machine.
    ExitCodeOfTheSender,
}

#[derive(Debug, Clone)]
struct Migration {
    faults: u8,
    broken: Option<Broken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
    CutLink,
    HealLink,
    CutSource,
    CutTarget,
    /// SIGTERM, SIGKILL, or its own deadline.
    EndSender,
    LastCut,
    Commit,
    TakeAck,
    Record,
    TakeRecorded,
    TellVmm,
    Exit,
    SenderFails,
    MigrateToReturns,
    MigrateFromReturns,
    Helps,
    FenceAndStart,
}

impl Migration {
    fn is(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }

    fn apply(&self, w: &mut World, action: Action) -> Option<()> {
        let fault = |w: &mut World| {
            w.faults = w.faults.checked_sub(1)?;
            Some(())
        };
        match action {
            Action::CutLink if w.link => {
                fault(w)?;
                w.link = false;
            }
            Action::HealLink if !w.link => w.link = true,
            Action::CutSource if w.source != Source::Gone && w.cluster == Cluster::MigrateTo => {
                fault(w)?;
                w.source = Source::Gone;
                w.sender = Sender::Ended { success: false };
                w.cluster = Cluster::Recovers;
            }
            Action::CutTarget if w.target_on && matches!(w.cluster, Cluster::MigrateTo | Cluster::MigrateFrom) => {
                fault(w)?;
                (w.target_on, w.image, w.target) = (false, Image::Nothing, None);
                if w.cluster == Cluster::MigrateFrom {
                    w.cluster = Cluster::Restarted;
                    w.source = Source::Gone;
                }
            }
            Action::EndSender if !matches!(w.sender, Sender::Ended { .. }) => {
                fault(w)?;
                self.fail(w);
            }
            Action::LastCut if w.sender == Sender::Copies && w.link && w.target_on => {
                w.source = Source::Stands;
                w.sender = Sender::AwaitsAck;
                w.wire[0] = true;
            }
            Action::Commit if w.wire[0] && w.link && w.target_on => {
                w.wire[0] = false;
                w.image = w.image.max(Image::Whole);
                w.wire[1] = true;
            }
            Action::TakeAck if w.wire[1] && w.link && w.sender == Sender::AwaitsAck => {
                w.wire[1] = false;
                if self.is(Broken::SourceToldFirst) {
                    w.source = Source::HandedOver;
                }
                w.sender = Sender::Tells;
                w.wire[2] = true;
            }
            Action::Record if w.wire[2] && w.link && w.target_on => {
                w.wire[2] = false;
                w.image = Image::HandedOver;
                w.wire[3] = true;
            }
            Action::TakeRecorded if w.wire[3] && w.link && w.sender == Sender::Tells => {
                w.wire[3] = false;
                w.sender = Sender::Told;
            }
            Action::TellVmm if w.sender == Sender::Told => {
                w.source = Source::HandedOver;
                w.sender = Sender::Done;
            }
            Action::Exit if w.sender == Sender::Done => w.sender = Sender::Ended { success: true },
            // Silence for too long.
            Action::SenderFails if !w.link || !w.target_on => match w.sender {
                Sender::Copies | Sender::AwaitsAck | Sender::Tells => self.fail(w),
                Sender::Told | Sender::Done | Sender::Ended { .. } => return None,
            },
            Action::MigrateToReturns if w.cluster == Cluster::MigrateTo => {
                let Sender::Ended { success } = w.sender else { return None };
                // The agent asks the VMM: what it was told counts, however the sender ended.
                let success = match self.broken {
                    Some(Broken::ExitCodeOfTheSender) => success,
                    _ => w.source == Source::HandedOver,
                };
                w.cluster = match success {
                    true => Cluster::MigrateFrom,
                    false if self.is(Broken::FailureIgnored) => Cluster::MigrateFrom,
                    false => Cluster::Blocked,
                };
            }
            Action::MigrateFromReturns if w.cluster == Cluster::MigrateFrom && w.target_on => {
                let may = w.image == Image::HandedOver || self.is(Broken::FailureIgnored) && w.image == Image::Whole;
                if may {
                    w.target = Some(true);
                    w.cluster = Cluster::OnTarget;
                } else {
                    w.cluster = Cluster::Restarted;
                    w.source = Source::Gone;
                }
            }
            Action::Helps if self.is(Broken::TargetHelpsItself) && w.image >= Image::Whole && !w.link => {
                w.target = Some(true);
            }
            // Only `migrate_from` may use the image: a source whose sender has failed after the record runs on without it.
            Action::FenceAndStart if w.cluster == Cluster::Recovers && w.target_on && w.target.is_none() => {
                w.target = Some(self.is(Broken::StartUsesTheImage) && w.image == Image::HandedOver);
                w.cluster = Cluster::Started;
            }
            _ => return None,
        }
        Some(())
    }

    /// The sender ends without success. Its session with the VMM ends with it, and what stood still runs on.
    fn fail(&self, w: &mut World) {
        w.sender = Sender::Ended { success: false };
        if w.source == Source::Stands {
            w.source = Source::Runs;
            w.went_on = true;
        }
    }
}

const ONCE: &str = "the machine runs at most once";
const ONE_PAST: &str = "an image that the machine has gone on without never runs";
const NOT_LOST: &str = "without a power cut the machine is never lost";

impl Model for Migration {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World {
            source: Source::Runs,
            image: Image::Nothing,
            target: None,
            target_on: true,
            sender: Sender::Copies,
            cluster: Cluster::MigrateTo,
            link: true,
            wire: [false; 4],
            faults: self.faults,
            went_on: false,
        }]
    }

    fn actions(&self, _: &World, actions: &mut Vec<Action>) {
        use Action::*;
        actions.extend([CutLink, HealLink, CutSource, CutTarget, EndSender, LastCut, Commit, TakeAck, Record]);
        actions.extend([
            TakeRecorded,
            TellVmm,
            Exit,
            SenderFails,
            MigrateToReturns,
            MigrateFromReturns,
            Helps,
            FenceAndStart,
        ]);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = *world;
        self.apply(&mut next, action)?;
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONCE, |_, w: &World| w.source != Source::Runs || w.target.is_none()),
            Property::always(ONE_PAST, |_, w: &World| !(w.went_on && w.target == Some(true))),
            // Whoever waits for a repair or an answer is not lost: only an end counts.
            Property::always(NOT_LOST, |_, w: &World| {
                let ended = matches!(w.cluster, Cluster::Blocked | Cluster::Restarted);
                !(ended && w.target_on && w.source != Source::Runs && w.target.is_none())
            }),
            Property::sometimes("it arrives", |_, w: &World| w.cluster == Cluster::OnTarget && w.target == Some(true)),
            Property::sometimes("it stays", |_, w: &World| w.cluster == Cluster::Blocked && w.source == Source::Runs),
        ]
    }
}

fn breaks(broken: Broken, property: &'static str) {
    let model = Migration { faults: 2, broken: Some(broken) };
    let done = model.checker().finish_when(HasDiscoveries::AnyOf([property].into())).spawn_bfs().join();
    let way = done.discovery(property).unwrap_or_else(|| panic!("{broken:?}: nobody noticed; {property}"));
    println!("{broken:?}, and not \"{property}\":\n    {:?}", way.into_actions());
}

#[test]
fn a_machine_that_migrates_runs_exactly_once_whatever_fails() {
    let done = Migration { faults: 3, broken: None }.checker().spawn_bfs().join();
    println!("{} states", done.unique_state_count());
    done.assert_properties();
    assert!(done.unique_state_count() > 100, "the model does not move");
}

#[test]
fn the_checker_notices_a_target_that_runs_what_it_has_committed_by_itself() {
    breaks(Broken::TargetHelpsItself, ONCE);
}

#[test]
fn the_checker_notices_a_failed_migration_that_is_ignored() {
    breaks(Broken::FailureIgnored, ONCE);
}

#[test]
fn the_checker_notices_a_source_that_is_told_before_the_target_has_recorded() {
    breaks(Broken::SourceToldFirst, NOT_LOST);
}

#[test]
fn the_checker_notices_a_start_that_uses_an_image_which_the_machine_has_gone_on_without() {
    breaks(Broken::StartUsesTheImage, ONE_PAST);
}

#[test]
fn the_checker_notices_an_agent_that_believes_the_senders_exit_code() {
    breaks(Broken::ExitCodeOfTheSender, NOT_LOST);
}
