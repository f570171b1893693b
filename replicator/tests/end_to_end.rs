//! Two replicator processes and fake VMMs over real sockets: everything except KVM and Pacemaker.

mod common;

use common::*;
use understudy_protocol::control::*;

#[test]
fn the_standbys_image_is_the_primarys_memory_at_a_cut_byte_for_byte() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.wait_epochs(50);
    let status = pair.n2.status();
    assert_eq!(status.replica, ReplicaState::UpToDate);
    let taken = pair.n2.take_over(2).unwrap();
    assert!(assert_image(&pair.n2, &taken, &primary) > 50);
    assert_eq!(pair.n2.take_over(2).unwrap(), taken, "asking again changes nothing");
}
