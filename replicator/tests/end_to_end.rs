//! Two replicator processes and fake VMMs over real sockets: everything except KVM and Pacemaker.

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use common::fake_vmm::Load;
use common::*;
use understudy_protocol::control::*;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::key::Key;

#[test]
fn the_standbys_image_is_the_primarys_memory_at_a_cut_byte_for_byte() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.wait_epochs(50);
    let status = pair.n2.status();
    assert_eq!(status.replica, ReplicaState::UpToDate);
    assert!(status.connected && status.raw_bytes > status.wire_bytes, "{status:?}");
    let taken = pair.n2.take_over(2).unwrap();
    assert!(assert_image(&pair.n2, &taken, &primary) > 50);
    assert_eq!(pair.n2.take_over(2).unwrap(), taken, "asking again changes nothing");
}

#[test]
fn the_first_machine_runs_unprotected_under_a_veto_until_a_standby_has_its_first_checkpoint() {
    let mut pair = Pair::new(&Options::default());
    let load = Load::default();
    let primary = pair.n1.vmm(load, VmmState::Running, 1);
    pair.n1.start();
    pair.n1.promote();
    wait_until("the gate is open", || primary.machine().gate_open);
    // (Its own state is reported by another thread, at any time.)
    assert!(pair.n1.hook_calls().contains(&"veto --machine m --peer n2".into()), "{:?}", pair.n1.hook_calls());
    // (The gate opens a moment before the sender has written that down for the status.)
    wait_until("the veto shows", || pair.n1.status().vetoed);
    let status = pair.n1.status();
    assert!(!status.protected && !status.connected, "{status:?}");

    let _standby = pair.n2.vmm(load, VmmState::Standby, 0);
    pair.n2.start();
    pair.wait_protected();
    assert!(!primary.machine().gate_open, "the first checkpoint arms the gate");
    assert_eq!(pair.n1.hook_calls().last().unwrap(), "clear-veto --machine m");
    let told = pair.n2.hook_calls();
    assert_eq!(
        told,
        ["inconsistent", "syncing", "uptodate"].map(|s| format!("replica-state --machine m --state {s}")),
        "the score is set before the veto is lifted"
    );
}

#[test]
fn a_cut_link_opens_the_gate_only_under_a_veto_and_a_healed_one_protects_again() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    let opened = primary.machine().gate_opened;
    pair.link.cut();
    wait_until("the veto was refused", || pair.n1.status().note.contains("no quorum"));
    assert_eq!(primary.machine().gate_opened, opened, "without a durable veto outputs wait");
    wait_until("the standby knows", || pair.n2.hook_calls().last().unwrap().ends_with("disconnected"));
    assert_eq!(pair.n2.status().replica, ReplicaState::UpToDate, "nothing was released that it has not");

    pair.n1.refuse_vetoes(false);
    wait_until("the gate is open", || primary.machine().gate_open);
    // (It opens a moment before the sender has written that down for the status.)
    wait_until("the veto shows", || pair.n1.status().vetoed);
    let status = pair.n1.status();
    assert!(status.losses == 1 && status.replica == ReplicaState::Outdated, "{status:?}");

    pair.link.heal();
    pair.wait_protected();
    pair.wait_epochs(5);
    assert!(!pair.n1.status().vetoed && !primary.machine().gate_open);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn a_link_that_blinks_while_no_veto_can_be_had_goes_on_without_a_first_copy() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    for round in 0..5 {
        // In the middle of an epoch, at another byte each time.
        pair.link.break_after(5_000 + 40_000 * round);
        wait_until("it broke", || pair.n1.status().losses > round);
        pair.link.heal();
        pair.wait_protected();
        pair.wait_epochs(3);
    }
    assert_eq!(pair.n2.first_copies(), 1, "{}", pair.n1.log());
    assert_eq!(primary.machine().attaches, 1);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn a_standby_whose_memory_is_not_what_was_sent_refuses_the_epoch_and_gets_a_first_copy() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.wait_epochs(5);
    // Every page: sooner or later one is the base of another.
    let ram = fs::File::options().write(true).open(pair.n2.layout.ram()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&ram, &vec![0xEE; ram.metadata().unwrap().len() as usize], 0).unwrap();
    wait_until("a second first copy", || pair.n2.first_copies() >= 2);
    pair.wait_protected();
    pair.wait_epochs(5);
    let log = pair.n2.log();
    assert!(log.contains("differs from what the primary captured"), "{log}");
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn without_encryption_the_same_arrives_and_a_node_that_encrypts_is_told_why_not() {
    let extra = &["--interval-ms", "10", "--peer-timeout-ms", "10000", "--encryption", "off"];
    let (mut pair, primary, _standby) = Pair::started(&Options { extra, ..Options::default() });
    pair.n1.refuse_vetoes(true);
    pair.wait_protected();
    pair.wait_epochs(20);
    pair.n2.kill();
    *pair.n2.extra.iter_mut().find(|word| *word == "off").unwrap() = "on".into();
    pair.n2.start();
    wait_until("both say why", || {
        [&pair.n1, &pair.n2].iter().all(|node| node.log().contains("the same choice of encryption"))
    });
    pair.n2.kill();
    let taken = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"))
        .args(["take-over", "--offline", "--machine", MACHINE, "--generation", "2", "--run-root"])
        .arg(pair.n2.dir.join("run"))
        .arg("--shm-root")
        .arg(pair.n2.dir.join("shm"))
        .output()
        .unwrap();
    let taken: TakenOver = serde_json::from_slice(&taken.stdout).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn half_an_epoch_is_discarded() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.link.break_after(100_000);
    wait_until("the standby is alone", || !pair.n2.status().connected);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn a_silent_peer_is_lost_after_the_timeout() {
    let (pair, primary, _standby) = Pair::started(&Options::impatient());
    pair.wait_protected();
    pair.link.go_silent();
    wait_until("the gate is open", || primary.machine().gate_open);
    wait_until("the standby notices too", || !pair.n2.status().connected);
    pair.link.heal();
    pair.wait_protected();
}

#[test]
fn a_receiver_killed_at_any_moment_finds_a_whole_image_when_it_is_back() {
    let (mut pair, primary, _standby) = Pair::started(&Options::default());
    pair.n1.refuse_vetoes(true);
    pair.wait_protected();
    for _ in 0..4 {
        pair.wait_epochs(7);
        pair.n2.kill();
        pair.n2.start();
        pair.wait_protected();
    }
    pair.n2.kill();
    let offline = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"))
        .args(["take-over", "--offline", "--machine", MACHINE, "--generation", "2", "--run-root"])
        .arg(pair.n2.dir.join("run"))
        .arg("--shm-root")
        .arg(pair.n2.dir.join("shm"))
        .output()
        .unwrap();
    assert!(offline.status.success(), "{}", String::from_utf8_lossy(&offline.stderr));
    let taken: TakenOver = serde_json::from_slice(&offline.stdout).unwrap();
    assert_image(&pair.n2, &taken, &primary);
    pair.n2.start();
    assert_eq!(pair.n2.take_over(2).unwrap(), taken, "what was taken offline is taken");
}

#[test]
fn a_receiver_killed_during_the_first_copy_has_no_image() {
    let load = Load { ram_pages: 64 << 10, ..Load::default() };
    let (mut pair, _primary, _standby) = Pair::started(&Options { load, ..Options::default() });
    wait_until("the first copy runs", || pair.n2.status().replica == ReplicaState::Syncing);
    pair.n2.kill();
    pair.n2.start();
    let taken = pair.n2.take_over(2).unwrap();
    assert_eq!(taken.image, None);
}

#[test]
fn a_killed_sender_leaves_the_guest_alone_and_protects_it_again_when_it_is_back() {
    let (mut pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.n1.kill();
    wait_until("the VMM noticed", || !primary.machine().attached);
    assert_eq!(primary.machine().state, Some(VmmState::Running));
    assert!(!primary.machine().gate_open, "outputs wait while nobody replicates");
    pair.n1.start();
    assert_eq!(pair.n1.status().role, Role::Receiver);
    pair.n1.promote();
    pair.wait_protected();
    pair.wait_epochs(5);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn a_primary_of_an_older_generation_is_refused_and_ends_itself() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    let taken = pair.n2.take_over(2).unwrap();
    wait_until("the old machine was told to quit", || primary.machine().quit);
    assert_image(&pair.n2, &taken, &primary);
    assert!(!primary.machine().gate_open);
    wait_until("it says why", || pair.n1.status().note.contains("generation 2"));
    let again = pair.n2.take_over(1).unwrap_err();
    assert!(again.contains("generation 2 is known"), "{again}");
}

#[test]
fn a_zombie_that_wakes_behind_a_cut_link_is_ended_when_it_can_hear_again() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    pair.link.cut();
    let taken = pair.n2.take_over(2).unwrap();
    wait_until("the veto was refused", || pair.n1.status().note.contains("no quorum"));
    assert!(!primary.machine().gate_open);
    pair.link.heal();
    wait_until("the old machine was told to quit", || primary.machine().quit);
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn after_a_take_over_the_new_primary_replicates_back_and_the_old_sender_must_end() {
    let (pair, old, standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    pair.link.cut();
    pair.n2.take_over(2).unwrap();
    {
        let mut machine = standby.machine();
        machine.state = Some(VmmState::Running);
        machine.generation = Generation(2);
    }
    // The new primary knocks at the old one, which still believes itself to be the sender.
    pair.n2.promote();
    wait_until("the old machine was told to quit", || old.machine().quit);
    old.kill();
    let n1_vmm = pair.n1.vmm(Load::default(), VmmState::Standby, 0);
    pair.n1.call::<()>(&ReplicatorRequest::Demote).unwrap();
    wait_until("the new primary is protected", || pair.n2.status().protected);
    wait_until("epochs flow", || pair.n2.status().epochs > 10);
    let taken = pair.n1.take_over(3).unwrap();
    assert_image(&pair.n1, &taken, &standby);
    drop(n1_vmm);
}

#[test]
fn a_planned_hand_over_loses_nothing() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    assert!(pair.n1.call::<HandedOver>(&ReplicatorRequest::HandOver).is_err(), "nobody could take it yet");
    pair.wait_protected();
    let done: HandedOver = pair.n1.call(&ReplicatorRequest::HandOver).unwrap();
    assert_eq!(primary.machine().state, Some(VmmState::HandedOver));
    let calls = pair.n1.hook_calls().len();
    pair.n1.call::<()>(&ReplicatorRequest::Demote).unwrap();
    wait_until("the standby is alone", || !pair.n2.status().connected);
    assert!(pair.n2.hook_calls().last().unwrap().ends_with("uptodate"), "its score stays");
    let taken = pair.n2.take_over(2).unwrap();
    assert_eq!(assert_image(&pair.n2, &taken, &primary), done.epoch.0);
    assert_eq!(pair.n2.ram_digest(), primary.ram_digest(), "not a byte was written after the last cut");
    let later = pair.n1.hook_calls();
    assert!(!later[calls..].iter().any(|call| call.starts_with("veto")), "{later:?}");
}

#[test]
fn a_hand_over_whose_standby_dies_leaves_the_machine_running() {
    let (mut pair, primary, _standby) = Pair::started(&Options::impatient());
    pair.wait_protected();
    pair.link.go_silent();
    let why = pair.n1.call::<HandedOver>(&ReplicatorRequest::HandOver).unwrap_err();
    assert!(why.contains("runs on here"), "{why}");
    pair.n2.kill();
    wait_until("it runs unprotected", || primary.machine().gate_open);
    assert_eq!(primary.machine().state, Some(VmmState::Running));
    pair.link.heal();
    pair.n2.start();
    pair.wait_protected();
    pair.wait_epochs(3);
}

#[test]
fn a_wrong_key_is_named_on_both_sides_and_nothing_is_received() {
    let mut pair = Pair::new(&Options::default());
    let other = pair.dir.path().join("other-key");
    Key::generate(&other).unwrap();
    pair.n2.key = other;
    let primary = pair.n1.vmm(Load::default(), VmmState::Running, 1);
    let _standby = pair.n2.vmm(Load::default(), VmmState::Standby, 0);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    wait_until("the sender says so", || pair.n1.status().note.contains("same key"));
    wait_until("the receiver says so", || pair.n2.status().note.contains("same key"));
    wait_until("the machine runs unprotected", || primary.machine().gate_open);
    assert_eq!(pair.n2.status().replica, ReplicaState::Inconsistent);
}

#[test]
fn a_missing_key_is_an_error_at_start_that_names_the_file() {
    let mut pair = Pair::new(&Options::default());
    pair.n1.key = pair.dir.path().join("missing");
    pair.n1.spawn();
    let status = pair.n1.process.take().unwrap().wait().unwrap();
    assert!(!status.success());
    assert!(pair.n1.log().contains("missing"), "{}", pair.n1.log());
}

#[test]
fn a_second_start_is_refused_and_does_not_disturb_the_first() {
    let mut pair = Pair::new(&Options::default());
    pair.n1.start();
    let first = pair.n1.process.take().unwrap();
    pair.n1.spawn();
    assert!(!pair.n1.process.take().unwrap().wait().unwrap().success());
    assert!(pair.n1.log().contains("runs already"), "{}", pair.n1.log());
    assert_eq!(pair.n1.status().role, Role::Receiver);
    let pid = fs::read_to_string(pair.n1.layout.replicator_pid()).unwrap();
    assert_eq!(pid.trim(), first.id().to_string());
    pair.n1.process = Some(first);
    pair.n1.call::<()>(&ReplicatorRequest::Quit).unwrap();
    assert!(pair.n1.process.take().unwrap().wait().unwrap().success());
    assert!(!pair.n1.layout.replicator_pid().exists() && !pair.n1.layout.replicator_socket().exists());
}

#[test]
fn an_epoch_that_does_not_fit_is_refused_in_a_sentence_and_the_image_stays_whole() {
    // One burst of noise is about 80 pages; the stage takes 1 MiB.
    let load = Load { burst: 2, pause: None, ..Load::default() };
    let options = Options {
        load,
        extra: &["--interval-ms", "10", "--peer-timeout-ms", "10000", "--stage-limit-mib", "1"],
        hooked: true,
    };
    let (pair, primary, _standby) = Pair::started(&options);
    pair.wait_protected();
    pair.wait_epochs(5);
    pair.n1.refuse_vetoes(true);
    primary.write_noise(400);
    wait_until("the standby says why", || pair.n1.status().note.contains("stage may take"));
    let status = pair.n2.status();
    assert_eq!(status.replica, ReplicaState::UpToDate, "whole, and nothing was released without it: {status:?}");
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

/// A standby whose shared memory is a tmpfs of `mib` MiB of its own, with a RAM file of 2 MiB and no VMM. Needs root.
fn with_small_tmpfs(mib: u32, options: &Options) -> Option<Pair> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can mount a small tmpfs");
        return None;
    }
    let mut pair = Pair::new(options);
    let shm = pair.n2.dir.join("shm");
    fs::create_dir(&shm).unwrap();
    let mount = format!("mount -t tmpfs -o size={mib}m none {} && exec \"$0\" \"$@\"", shm.display());
    pair.n2.wrapper = ["unshare", "-m", "sh", "-c", &mount].map(str::to_owned).to_vec();
    pair.n1.start();
    pair.n2.start();
    // The same directory, seen through the process that has it mounted.
    let inside = format!("/proc/{}/root{}", pair.n2.process.as_ref().unwrap().id(), pair.n2.layout.ram().display());
    fs::File::create(inside).unwrap().set_len(512 * 4096).unwrap();
    Some(pair)
}

#[test]
fn a_full_tmpfs_during_the_first_copy_leaves_no_image_and_says_so() {
    let Some(pair) = with_small_tmpfs(1, &Options::default()) else { return };
    let primary = pair.n1.vmm(Load { pause: None, ..Load::default() }, VmmState::Running, 1);
    primary.write_noise(400);
    pair.n1.promote();
    // (In the status another attempt may have taken its place.)
    wait_until("the sender knows", || pair.n1.log().contains("is full"));
    assert_eq!(pair.n2.take_over(2).unwrap().image, None);
}

#[test]
fn a_full_tmpfs_during_an_epoch_leaves_the_image_whole_and_says_so() {
    let load = Load { burst: 2, pause: None, ..Load::default() };
    let Some(pair) = with_small_tmpfs(3, &Options { load, ..Options::default() }) else { return };
    let primary = pair.n1.vmm(load, VmmState::Running, 1);
    pair.n1.promote();
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    primary.write_noise(400);
    wait_until("the sender knows", || pair.n1.log().contains("is full"));
    let taken = pair.n2.take_over(2).unwrap();
    let inside = format!("/proc/{}/root", pair.n2.process.as_ref().unwrap().id());
    assert_image_below(&inside, &pair.n2, &taken, &primary);
}

#[test]
fn a_node_that_the_cluster_has_superseded_ends_its_machine() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    fs::write(pair.n1.dir.join("hook"), "exit 2\n").unwrap();
    pair.link.cut();
    wait_until("the machine was told to quit", || primary.machine().quit);
}

#[test]
fn a_standby_without_its_vmm_is_waited_for() {
    let mut pair = Pair::new(&Options::default());
    let _primary = pair.n1.vmm(Load::default(), VmmState::Running, 1);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    wait_until("the refusal is passed on", || pair.n1.status().note.contains("has not been started"));
    let _standby = pair.n2.vmm(Load::default(), VmmState::Standby, 0);
    pair.wait_protected();
}

#[test]
fn a_standby_of_another_size_is_refused_in_a_sentence() {
    let mut pair = Pair::new(&Options::default());
    let _primary = pair.n1.vmm(Load::default(), VmmState::Running, 1);
    let _standby = pair.n2.vmm(Load { ram_pages: 1024, ..Load::default() }, VmmState::Standby, 0);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    wait_until("the refusal is passed on", || pair.n1.status().note.contains("configure both alike"));
}

#[test]
fn a_ram_file_that_was_replaced_takes_the_image_with_it() {
    let (pair, primary, standby) = Pair::started(&Options::default());
    pair.wait_protected();
    // The standby's VMM is started again over a new file.
    fs::remove_file(pair.n2.layout.ram()).unwrap();
    standby.kill();
    let _again = pair.n2.vmm(Load::default(), VmmState::Standby, 0);
    wait_until("the standby noticed", || pair.n2.log().contains("has made a new one"));
    wait_until("a new first copy is complete", || pair.n1.log().matches("is its first checkpoint").count() == 2);
    pair.wait_protected();
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn an_image_that_a_machine_may_have_run_from_is_not_given_out_again() {
    let (pair, _primary, standby) = Pair::started(&Options::default());
    pair.wait_protected();
    assert!(pair.n2.take_over(2).unwrap().image.is_some());
    // The same VMM process, vCPUs never ran: RAM is untouched, a promotion may be tried again.
    assert!(pair.n2.take_over(3).unwrap().image.is_some());
    standby.machine().state = Some(VmmState::Running);
    assert!(pair.n2.take_over(4).unwrap_err().contains("already runs"));
    standby.kill();
    assert_eq!(pair.n2.take_over(5).unwrap().image, None);
}

#[test]
fn a_vmm_that_is_restarted_is_attached_again() {
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    primary.kill();
    wait_until("the sender noticed", || pair.n1.status().generation == Generation::ZERO);
    let again = pair.n1.vmm(Load::default(), VmmState::Running, 2);
    pair.wait_protected();
    wait_until("epochs flow", || again.machine().last_committed > Epoch(5));
    let taken = pair.n2.take_over(3).unwrap();
    assert_eq!(taken.image.as_ref().unwrap().generation, Generation(2));
    assert_image(&pair.n2, &taken, &again);
}

#[test]
fn without_a_hook_the_gate_stays_shut_and_with_no_cluster_it_says_so() {
    let mut pair = Pair::new(&Options { hooked: false, ..Options::default() });
    let primary = pair.n1.vmm(Load::default(), VmmState::Running, 1);
    pair.n1.start();
    pair.n1.promote();
    wait_until("it says why", || pair.n1.status().note.contains("--hook"));
    assert_eq!(primary.machine().gate_opened, 0);
    pair.n1.kill();
    pair.n1.extra.push("--no-cluster".into());
    pair.n1.start();
    pair.n1.promote();
    wait_until("the gate is open", || primary.machine().gate_open);
    wait_until("it says so", || pair.n1.log().contains("without a durable record"));
}

#[test]
fn strangers_and_garbage_on_the_sockets_are_survived() {
    use std::io::Write;
    use std::net::TcpStream;
    use std::os::unix::net::UnixStream;
    let (pair, primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    for _ in 0..3 {
        let mut stranger = TcpStream::connect(("127.0.0.1", pair.link.port())).unwrap();
        let _ = stranger.write_all(b"GET / HTTP/1.1\r\n\r\n");
        let mut person = UnixStream::connect(pair.n2.layout.replicator_socket()).unwrap();
        let _ = person.write_all(b"{\"cmd\":\"dance\"}\nnot json\n");
    }
    pair.wait_epochs(20);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn the_status_command_speaks_to_people_and_to_machines() {
    let (pair, _primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    let run = |extra: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"))
            .args(["status", "--machine", MACHINE, "--run-root"])
            .arg(pair.n1.dir.join("run"))
            .args(extra)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&[]);
    assert!(text.contains("sender") && text.contains("protected  yes"), "{text}");
    let status: ReplicatorStatus = serde_json::from_str(&run(&["--json"])).unwrap();
    assert!(status.protected && status.pause_p50_us == 100);
}

/// `understudy-replicator COMMAND --machine m` on the node.
fn people(node: &Node, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"));
    command.args(arguments).args(["--machine", MACHINE, "--run-root"]).arg(node.dir.join("run"));
    command
}

fn said(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The value of a series whose line begins so.
fn metric(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in\n{text}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn the_metrics_of_both_nodes_count_every_epoch() {
    let (pair, _primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    pair.wait_epochs(20);
    let sending = said(people(&pair.n1, &["metrics"]));
    let commits = metric(&sending, "understudy_replicator_commit_seconds_count");
    assert!(commits >= 20.0, "{sending}");
    assert_eq!(commits, metric(&sending, "understudy_replicator_commit_seconds_bucket{machine=\"m\",le=\"+Inf\"}"));
    assert!(metric(&sending, "understudy_replicator_pause_seconds_sum") >= 0.002, "each pause is 100 µs: {sending}");
    let captured = metric(&sending, "understudy_replicator_captured_bytes_total");
    assert!(captured > 0.0 && captured < metric(&sending, "understudy_replicator_raw_bytes_total"));
    assert_eq!(metric(&sending, "understudy_replicator_role{machine=\"m\",role=\"sender\"}"), 1.0);
    assert_eq!(metric(&sending, "understudy_replicator_protected"), 1.0);
    let receiving = said(people(&pair.n2, &["metrics"]));
    assert!(metric(&receiving, "understudy_replicator_epoch_bytes_count") >= commits, "{receiving}");
    assert_eq!(metric(&receiving, "understudy_vmm_state{machine=\"m\",state=\"Standby\"}"), 1.0);
    // Nobody there is an answer too: the collector's file stays valid.
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_understudy-replicator"));
    nobody.args(["metrics", "--machine", MACHINE, "--run-root"]).arg(pair.dir.path().join("nowhere"));
    assert_eq!(metric(&said(nobody), "understudy_replicator_up"), 0.0);
}

#[test]
fn metrics_are_served_over_http_on_request() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    let (pair, _primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    let address = format!("{}:7100", own_address());
    let mut server = people(&pair.n1, &["metrics", "--listen", &address]).spawn().unwrap();
    let mut reply = String::new();
    wait_until("the metrics are served", || {
        let Ok(mut client) = TcpStream::connect(&address) else { return false };
        client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        reply.clear();
        client.read_to_string(&mut reply).is_ok() && reply.starts_with("HTTP/1.1 200")
    });
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(metric(&reply, "understudy_replicator_up"), 1.0);
}

#[test]
fn the_live_view_writes_lines_into_a_pipe_and_a_screen_on_a_terminal_that_q_ends() {
    use std::io::{Read, Write};
    let (pair, _primary, _standby) = Pair::started(&Options::default());
    pair.wait_protected();
    let lines = said(people(&pair.n1, &["top", "--interval-ms", "100", "--count", "3"]));
    assert_eq!(lines.lines().count(), 3);
    let last = lines.lines().last().unwrap();
    assert!(last.contains("m sender UpToDate protected") && last.contains("epochs/s="), "{last}");

    let size = nix::pty::Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = nix::pty::openpty(Some(&size), None).unwrap();
    let slave = |fd: &std::os::fd::OwnedFd| Stdio::from(fd.try_clone().unwrap());
    let before = nix::sys::termios::tcgetattr(&terminal.slave).unwrap();
    let mut top = people(&pair.n1, &["top", "--interval-ms", "100"]);
    top.stdin(slave(&terminal.slave)).stdout(slave(&terminal.slave)).stderr(slave(&terminal.slave));
    let mut top = top.spawn().unwrap();
    let mut keys = fs::File::from(terminal.master);
    let (mut output, screen) = (keys.try_clone().unwrap(), Arc::new(Mutex::new(String::new())));
    let seen = screen.clone();
    // It ends when the last slave is closed, with the test.
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(n @ 1..) = output.read(&mut piece) {
            seen.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..n]));
        }
    });
    let shows = |what: &str| screen.lock().unwrap().contains(what);
    wait_until("a screen is drawn", || shows("understudy  m  sender") && shows("from cut to cut") && shows("q: quit"));
    keys.write_all(b"q").unwrap();
    wait_until("it ended", || top.try_wait().unwrap().is_some());
    assert!(top.wait().unwrap().success());
    wait_until("the screen is given back", || shows("\u{1b}[?1049h") && shows("\u{1b}[?1049l"));
    let after = nix::sys::termios::tcgetattr(&terminal.slave).unwrap();
    assert_eq!(before.local_flags, after.local_flags, "the terminal is as it was");
}

/// `verify --wait` on the node: whether it agreed, and what was said.
fn verify(node: &Node) -> (bool, String) {
    let output = people(node, &["verify", "--wait"]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn a_flipped_byte_in_the_standbys_memory_is_found_named_and_repaired_by_a_new_copy() {
    use std::os::unix::fs::FileExt;
    // The guest writes one page an epoch.
    let load = Load { ram_pages: 3000, burst: 1, pause: None, ..Load::default() };
    let (pair, primary, _standby) = Pair::started(&Options { load, ..Options::default() });
    primary.write_noise(2500);
    pair.wait_protected();
    pair.wait_epochs(3);
    let (agreed, text) = verify(&pair.n1);
    assert!(agreed && text.contains("pages agree"), "{text}");

    // Not a page that the guest is about to write anyway: it has 3000.
    let ram = fs::File::options().read(true).write(true).open(pair.n2.layout.ram()).unwrap();
    let mut byte = [0];
    ram.read_exact_at(&mut byte, 1234 * 4096 + 99).unwrap();
    ram.write_all_at(&[byte[0] ^ 0x10], 1234 * 4096 + 99).unwrap();
    let (agreed, text) = verify(&pair.n1);
    assert!(!agreed && text.contains("FAILED") && text.contains(": 1234;"), "{text}");
    let status = pair.n1.status().verify;
    assert_eq!((status.failures, status.differing_pages, &status.differing[..]), (1, 1, &[1234][..]), "{status:?}");
    assert!(pair.n2.log().contains("pages differ from the primary's") && pair.n2.log().contains(": 1234"));
    assert_eq!(
        metric(&said(people(&pair.n2, &["metrics"])), "understudy_replicator_verify_differing_pages_total"),
        1.0
    );

    wait_until("the image is made anew", || pair.n1.log().matches("is its first checkpoint").count() == 2);
    pair.wait_protected();
    let told: Vec<String> =
        pair.n2.hook_calls().into_iter().map(|call| call.rsplit(' ').next().unwrap().into()).collect();
    assert_eq!(told.iter().filter(|state| *state == "inconsistent").count(), 2, "the cluster knew: {told:?}");
    assert_eq!(told.last().unwrap(), "uptodate", "{told:?}");
    let (agreed, text) = verify(&pair.n1);
    assert!(agreed, "{text}");
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}

#[test]
fn comparing_a_busy_guests_memory_again_and_again_gives_no_false_alarm() {
    // About a tenth of its pages in each epoch, at any moment of it.
    let load = Load { ram_pages: 2000, burst: 30, snapshots: false, ..Load::default() };
    let (pair, _primary, _standby) = Pair::started(&Options { load, ..Options::default() });
    pair.wait_protected();
    for pass in 1..=15 {
        let (agreed, text) = verify(&pair.n1);
        assert!(agreed && text.contains(&format!("verify {pass}: ")), "{text}");
    }
    let (sent, received) = (pair.n1.status().verify, pair.n2.status().verify);
    assert_eq!((sent.passes, sent.failures, received.failures), (15, 0, 0));
    assert!(received.compared_pages > 15 * 500, "{received:?}");
    assert_eq!(pair.n1.status().losses, 0);
}

#[test]
fn ram_is_compared_on_schedule_and_only_the_sender_can_be_asked() {
    let options = ["--interval-ms", "10", "--peer-timeout-ms", "10000", "--verify-every", "1"];
    let options: &'static [&'static str] = Box::leak(Box::new(options));
    let (pair, _primary, _standby) = Pair::started(&Options { extra: options, ..Options::default() });
    pair.wait_protected();
    wait_until("two passes were made", || pair.n1.status().verify.passes >= 2);
    let (agreed, text) = verify(&pair.n2);
    assert!(!agreed && text.contains("is a receiver") && text.contains("n1"), "{text}");
}

#[test]
fn a_copy_of_the_image_is_exactly_one_committed_epoch_however_busy_the_guest_is() {
    let load = Load { ram_pages: 4000, burst: 150, ..Load::default() };
    let (pair, primary, _standby) = Pair::started(&Options { load, ..Options::default() });
    let copy = |node: &Node, name: &str| {
        let dir = pair.dir.path().join(name);
        fs::create_dir(&dir).unwrap();
        let copied: Result<CopiedImage, String> =
            node.call(&ReplicatorRequest::CopyImage { dir: dir.display().to_string() });
        copied.map(|copied| (copied, dir))
    };
    pair.wait_protected();
    let mut changed = 0;
    for round in 0..8 {
        let (copied, dir) = copy(&pair.n2, &format!("copy{round}")).unwrap();
        let ram = fs::File::open(dir.join("ram")).unwrap();
        let snapshot = primary.machine().snapshots.get(&copied.epoch.0).copied();
        assert_eq!(Some(common::fake_vmm::digest_of(&ram)), snapshot, "round {round}: RAM of epoch {}", copied.epoch);
        let state = fs::read_to_string(dir.join("state")).unwrap();
        assert_eq!(state, format!("devices at epoch {} of generation 1", copied.epoch));
        changed += copied.pages - 4000;
        fs::remove_dir_all(dir).unwrap();
    }
    assert!(changed > 0, "epochs went on during the copies");
    pair.wait_epochs(5);
    assert_eq!(pair.n1.status().losses, 0);
    let why = copy(&pair.n1, "sender").unwrap_err();
    assert!(why.contains("is the sender"), "{why}");
    let why: String =
        pair.n2.call::<CopiedImage>(&ReplicatorRequest::CopyImage { dir: "/nowhere".into() }).unwrap_err();
    assert!(why.contains("/nowhere"), "{why}");
    // Once it is a machine's, nobody copies it any more.
    pair.n2.take_over(2).unwrap();
    let why = copy(&pair.n2, "taken").unwrap_err();
    assert!(why.contains("taken over by generation 2"), "{why}");
}

#[test]
fn there_is_nothing_to_copy_before_the_first_checkpoint() {
    let mut pair = Pair::new(&Options::default());
    let _standby = pair.n2.vmm(Load::default(), VmmState::Standby, 0);
    pair.n2.start();
    let dir = pair.dir.path().display().to_string();
    let why = pair.n2.call::<CopiedImage>(&ReplicatorRequest::CopyImage { dir }).unwrap_err();
    assert!(why.contains("no whole image"), "{why}");
}

#[test]
fn a_comparison_that_broken_links_interrupt_goes_on_and_gives_no_false_alarm() {
    let load = Load { ram_pages: 3000, burst: 30, snapshots: false, ..Load::default() };
    let (pair, _primary, _standby) = Pair::started(&Options { load, ..Options::default() });
    pair.wait_protected();
    pair.n1.refuse_vetoes(true);
    for round in 0..6 {
        pair.n1.call::<VerifyStarted>(&ReplicatorRequest::Verify).unwrap();
        // In the middle of an epoch, before or behind its check, with others in flight.
        pair.link.break_after(20_000 + 35_000 * round);
        wait_until("it broke", || pair.n1.status().losses > round);
        pair.link.heal();
        pair.wait_protected();
        wait_until("the comparison ends", || !pair.n1.status().verify.running);
    }
    let (sent, received) = (pair.n1.status().verify, pair.n2.status().verify);
    assert_eq!((sent.failures, received.failures), (0, 0), "{sent:?}");
    assert!(sent.passes >= 6, "{sent:?}");
}
