//! Both state machines in a simulated world: a guest that writes and speaks, a wire that breaks, a standby that crashes
//! between (and inside) any two of its steps, a hook that fails or lies, a cluster that takes over when it may.
//! Everything follows from a seed.
//!
//! What is checked after every event:
//! 1. *Whole images*: what a restarted standby would find is nothing, or exactly one cut of the primary.
//! 2. *Output commit and no stale takeover*: everything that has left the machine is in that image, or the veto stands.
//! 3. *Disks*: a machine's disks are durable for the epoch that is in that image, and the copy of a mirrored disk is what the disk was at that cut.
//! 4. The floor of generations never goes down.
//!
//! After a take-over: the image does not change any more, nothing more leaves the old machine, and it ends itself as soon
//! as it can hear. Without one: when the troubles end, the machine is protected again.
//!
//! | what | where |
//! |---|---|
//! | the guest, the wire, the cluster | `world` |
//! | who does what the sender and the receiver ask for | `primary`, `standby` |
//! | what a crash leaves | `disk`, with pages as in `content` |
//! | a mirrored disk and its copy | `mirror` |
//! | the checks | `oracle` |
//! | what happens next | `schedule` |
//! | faults put in on purpose, each of which must be noticed | `sabotage` |

mod content;
mod disk;
mod mirror;
mod oracle;
mod primary;
mod sabotage;
mod schedule;
mod standby;
mod world;

use sabotage::Sabotage;
use schedule::Tally;
use world::World;

fn seeds() -> u64 {
    std::env::var("UNDERSTUDY_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(400)
}

#[test]
fn whatever_breaks_the_image_is_whole_and_covers_what_has_left_the_machine() {
    let mut sum = Tally::default();
    for seed in 0..seeds() {
        let tally = World::run(seed, Sabotage::None, seed % 2 == 0).unwrap_or_else(|why| panic!("{why}"));
        sum.epochs += tally.epochs;
        sum.losses += tally.losses;
        sum.taken += tally.taken;
        sum.handed_over += tally.handed_over;
    }
    println!("{} seeds: {sum:?}", seeds());
    // The schedule must reach what it is meant to try.
    assert!(
        sum.epochs > seeds() * 10 && sum.losses > seeds() / 2 && sum.taken > seeds() / 40 && sum.handed_over > 3,
        "{sum:?}"
    );
}

fn is_noticed(sabotage: Sabotage) {
    // Some faults show only after a rare chain of events.
    let noticed = (0..seeds() * 10).find_map(|seed| {
        std::panic::catch_unwind(|| World::run(seed, sabotage, true)).unwrap_or_else(|_| Err("panic".into())).err()
    });
    assert!(noticed.is_some(), "{sabotage:?} was not noticed in {} seeds", seeds() * 10);
}

#[test]
fn the_simulation_notices_a_missing_commit_record() {
    is_noticed(Sabotage::SkipCommitRecord);
}

#[test]
fn the_simulation_notices_an_apply_before_the_commit() {
    is_noticed(Sabotage::ApplyBeforeCommit);
}

#[test]
fn the_simulation_notices_an_acknowledgement_before_the_commit() {
    is_noticed(Sabotage::AckBeforeCommit);
}

#[test]
fn the_simulation_notices_a_first_copy_into_an_image_that_still_counts_as_whole() {
    is_noticed(Sabotage::SkipInconsistentRecord);
}

#[test]
fn the_simulation_notices_a_restart_without_repair() {
    is_noticed(Sabotage::ForgetRepair);
}

#[test]
fn the_simulation_notices_a_gate_that_does_not_wait_for_the_veto() {
    is_noticed(Sabotage::VetoNotAwaited);
}

#[test]
fn the_simulation_notices_an_epoch_that_ends_before_its_disks_are_sealed() {
    is_noticed(Sabotage::SealNotAwaited);
}

#[test]
fn the_simulation_notices_copies_that_are_sealed_after_the_acknowledgement() {
    is_noticed(Sabotage::SealOfCopiesLate);
}

#[test]
fn the_simulation_notices_blocks_of_uncommitted_slices_that_nobody_sends_again() {
    is_noticed(Sabotage::ForgetSlices);
}

#[test]
fn the_simulation_notices_a_copy_that_counts_while_it_is_brought_into_step() {
    is_noticed(Sabotage::SkipCopyBegin);
}

#[test]
fn the_simulation_notices_a_first_copy_that_refers_to_the_one_before() {
    is_noticed(Sabotage::KeepShadow);
}

#[test]
fn the_simulation_notices_a_device_state_that_refers_to_one_from_before_the_first_copy() {
    is_noticed(Sabotage::KeepStateBase);
}

#[test]
fn the_simulation_notices_an_epoch_that_is_encoded_again_instead_of_sent_again() {
    is_noticed(Sabotage::ResendIsNotTheSame);
}

#[test]
fn the_simulation_notices_early_pages_that_a_lost_standby_had_and_nobody_sends_again() {
    is_noticed(Sabotage::ForgetEarly);
}

#[test]
fn the_simulation_notices_changes_against_early_pages_that_a_lost_standby_has_forgotten() {
    is_noticed(Sabotage::KeepShadowOfLost);
}
