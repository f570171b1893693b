//! The initiator against a real target (tgt): contents, connections that break, a target that dies, the fence. Without tgtd every test says `SKIPPED`.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;

use common::{Network, SIZE, TARGET, Tgt, impatient, wait};
use understudy_disk::block::{Iscsi, read_chap};
use understudy_disk::{Block, Buffer, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Op, Options};
use understudy_protocol::ids::{Epoch, Generation};

fn open(tgt: &Tgt, node: &str) -> Iscsi {
    Iscsi::open(&tgt.url(), node, None, false, impatient()).unwrap()
}

/// What stands at a place, and was not there before.
fn pattern(at: u64, round: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((at + i) / 512 * 31 + i + round * 17) as u8).collect()
}

#[test]
fn what_is_written_is_read_and_is_in_the_targets_file() {
    let Some(tgt) = Tgt::start(false) else { return };
    let disk = open(&tgt, "n1");
    assert_eq!(disk.size(), SIZE);
    for (at, len) in [(0, 512), (512, 4096), (1 << 20, 3 << 20), (SIZE - 512, 512)] {
        disk.write_at(at, &pattern(at, 1, len)).unwrap();
    }
    disk.write_zeroes(512, 1024, false).unwrap();
    disk.write_zeroes(1 << 20, 1 << 20, true).unwrap();
    disk.flush().unwrap();
    let file = std::fs::read(tgt.dir.path().join("unit")).unwrap();
    let mut read = vec![1; SIZE as usize];
    disk.read_at(0, &mut read).unwrap();
    assert!(read == file);
    assert_eq!(read[..512], pattern(0, 1, 512));
    assert!(read[512..1536].iter().chain(&read[1 << 20..2 << 20]).all(|&b| b == 0));
    assert_eq!(read[1536..4608], pattern(512, 1, 4096)[1024..]);
    assert_eq!(read[2 << 20..4 << 20], pattern(1 << 20, 1, 3 << 20)[1 << 20..]);
    assert!(disk.write_at(SIZE, &[0; 512]).is_err());

    // Many at once.
    let (sender, ended) = channel();
    for i in 0..200_u64 {
        let sender = sender.clone();
        let op = Op::Write { at: i * 4096, from: Buffer::copy(&pattern(i * 4096, 2, 4096)) };
        assert!(disk.begin(op, Box::new(move |result| sender.send(result.is_ok()).unwrap())).is_none());
    }
    assert!((0..200).all(|_| ended.recv().unwrap()));
    for i in 0..200_u64 {
        let sender = sender.clone();
        let op = Op::Read { at: i * 4096, to: Buffer::new(4096) };
        let check = move |result: understudy_disk::Result<Buffer>| {
            sender.send(result.unwrap()[..] == pattern(i * 4096, 2, 4096)).unwrap()
        };
        assert!(disk.begin(op, Box::new(check)).is_none());
    }
    assert!((0..200).all(|_| ended.recv().unwrap()));
}

#[test]
fn nothing_is_lost_when_the_connection_breaks_falls_silent_or_the_target_dies_with_requests_under_way() {
    let Some(mut tgt) = Tgt::start(false) else { return };
    let network = Network::to(tgt.port());
    let disk = Arc::new(Iscsi::open(&tgt.url_at(network.port), "n1", None, false, impatient()).unwrap());
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..4_u64)
        .map(|writer| {
            let (disk, stop, rounds) = (disk.clone(), stop.clone(), rounds.clone());
            std::thread::spawn(move || {
                let mut last = 0;
                while !stop.load(Ordering::Acquire) {
                    last += 1;
                    for i in 0..8 {
                        let at = (writer * 8 + i) * (64 << 10);
                        disk.write_at(at, &pattern(at, last, 64 << 10)).unwrap();
                    }
                    rounds.fetch_add(1, Ordering::AcqRel);
                }
                last
            })
        })
        .collect();
    let goes_on = |what: &str| {
        let before = rounds.load(Ordering::Acquire);
        wait(what, || rounds.load(Ordering::Acquire) > before + 12);
    };
    for _ in 0..5 {
        goes_on("writes go on after a cut");
        network.cut();
    }
    goes_on("writes go on");
    network.set_silent(true);
    wait("the silence is noticed", || disk.trouble().is_some_and(|t| t.contains("not answered")));
    network.set_silent(false);
    goes_on("writes go on after a silence");
    assert_eq!(disk.trouble(), None);

    network.set_down(true);
    tgt.kill();
    wait("the loss is noticed", || disk.trouble().is_some());
    let stands_still = rounds.load(Ordering::Acquire);
    // So that it is told in seconds.
    wait("the status says since when", || {
        disk.trouble().is_some_and(|t| t.contains("for 1 s") && t.contains("nothing is lost"))
    });
    assert!(rounds.load(Ordering::Acquire) <= stands_still + 4);
    tgt.run();
    network.set_down(false);
    goes_on("writes go on with the target's next life");
    stop.store(true, Ordering::Release);
    for (writer, last) in writers.into_iter().map(|w| w.join().unwrap()).enumerate() {
        for i in 0..8 {
            let at = (writer as u64 * 8 + i) * (64 << 10);
            let mut read = vec![0; 64 << 10];
            disk.read_at(at, &mut read).unwrap();
            assert!(read == pattern(at, last, 64 << 10), "writer {writer}, round {last}");
        }
    }
}

fn disk(
    base: Arc<dyn Block>,
    slices: &std::path::Path,
    node: &str,
    generation: u64,
    memory: Memory,
) -> understudy_disk::Result<Disk> {
    Disk::open(Options {
        base,
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(slices).unwrap()),
        identity: Identity { machine: "db".into(), node: node.into(), generation: Generation(generation) },
        memory,
        limits: Limits::default(),
    })
}

#[test]
fn after_a_takeover_the_target_itself_refuses_the_old_generations_writes() {
    let Some(tgt) = Tgt::start(false) else { return };
    let slices = tgt.dir.path().join("slices");
    let old_base = Arc::new(open(&tgt, "n1"));
    let old = disk(old_base.clone(), &slices, "n1", 1, Memory::None).unwrap();
    let fence = old.status().fence.unwrap();
    assert!(fence.contains("persistent reservation, key 0x"), "{fence}");
    old.write_at(0, &[1; 512]).unwrap();
    // Whoever is not registered may not write.
    assert!(matches!(open(&tgt, "n3").write_at(0, &[9; 512]), Err(Error::Preempted { .. })));
    old.protect(Epoch(1)).unwrap();
    old.write_at(512, &[2; 512]).unwrap();
    let tag = old.cut(Epoch(1)).unwrap();
    old.seal(Epoch(1)).unwrap();
    old.commit(Epoch(1)).unwrap();

    // The old owner is frozen, not dead, and so is its lock.
    let new_base = Arc::new(open(&tgt, "n2"));
    let new = disk(new_base.clone(), &slices, "n2", 2, Memory::Image(tag)).unwrap();
    assert!(matches!(old_base.write_at(0, &[9; 512]), Err(Error::Preempted { .. })), "the target refuses it");
    assert!(matches!(old.merge(), Err(Error::Superseded { .. })));
    drop((old, old_base));
    new.write_at(1024, &[3; 512]).unwrap();
    new.flush().unwrap();
    wait("everything is in the base", || matches!(new.settle(), Ok(true)) || new.merge().is_err());
    let mut read = [0; 1536];
    new_base.read_at(0, &mut read).unwrap();
    assert!(read[..512] == [1; 512] && read[512..1024] == [2; 512] && read[1024..] == [3; 512]);
    // Let go of, it is anybody's.
    drop(new);
    open(&tgt, "n3").write_at(0, &[4; 512]).unwrap();
}

#[test]
fn what_the_target_forgot_is_registered_again_by_the_owner_and_by_nobody_else() {
    let Some(mut tgt) = Tgt::start(false) else { return };
    let slices = tgt.dir.path().join("slices");
    let base = Arc::new(open(&tgt, "n1"));
    let owner = Arc::new(disk(base.clone(), &slices, "n1", 1, Memory::None).unwrap());
    owner.write_at(0, &[1; 512]).unwrap();
    tgt.kill();
    let waiting = {
        let owner = owner.clone();
        std::thread::spawn(move || owner.write_at(0, &[2; 512]))
    };
    wait("it is noticed", || owner.trouble().is_some());
    tgt.run();
    waiting.join().unwrap().unwrap();
    assert!(matches!(open(&tgt, "n3").write_at(0, &[9; 512]), Err(Error::Preempted { .. })), "it is reserved again");

    // Superseded while the target is away: the record is a successor's, which has not come to the device yet.
    tgt.kill();
    wait("it is noticed", || owner.trouble().is_some());
    let directory = LocalDirectory::make(&slices).unwrap();
    let mut record = understudy_disk::Ownership::load(&directory).unwrap().unwrap();
    (record.node, record.generation) = ("n2".into(), Generation(2));
    let claim = understudy_disk::owner::claim(&directory).unwrap();
    record.store(&directory, &claim).unwrap();
    let waiting = {
        let owner = owner.clone();
        std::thread::spawn(move || owner.write_at(0, &[9; 512]))
    };
    tgt.run();
    assert!(matches!(waiting.join().unwrap(), Err(Error::Superseded { theirs: Generation(2), .. })));
    let other = open(&tgt, "n3");
    let mut read = [0; 512];
    other.read_at(0, &mut read).unwrap();
    assert_eq!(read, [2; 512]);
    other.write_at(0, &[5; 512]).expect("who is superseded has withdrawn");
}

#[test]
fn a_target_that_cannot_be_used_is_refused_with_a_sentence() {
    let Some(tgt) = Tgt::start(true) else { return };
    let secret = |text: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let file = tgt.dir.path().join("chap");
        std::fs::write(&file, text).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        read_chap(&file)
    };
    assert!(secret("me\ncorrecthorse12\n", 0o644).unwrap_err().to_string().contains("chmod 600"));
    assert!(secret("me\n", 0o600).unwrap_err().to_string().contains("two lines"));
    let right = secret("me\ncorrecthorse12\n", 0o600).unwrap();
    let attach = |url: &str, chap| Iscsi::open(&url.parse().unwrap(), "n1", chap, false, impatient()).map(drop);
    let at = format!("iscsi://127.0.0.1:{}", tgt.port());
    attach(&format!("{at}/{TARGET}/1"), Some(right.clone())).unwrap();
    for (url, chap) in [
        (format!("{at}/{TARGET}/1"), None),
        (format!("{at}/{TARGET}/1"), Some((right.0.clone(), "wronghorse1234".to_owned()))),
        (format!("{at}/{TARGET}/7"), Some(right.clone())),
        (format!("{at}/iqn.2026-11.test:other/1"), Some(right.clone())),
        ("iscsi://127.0.0.1:1/iqn.a/1".to_owned(), None),
    ] {
        let e = attach(&url, chap).unwrap_err().to_string();
        println!("{e}");
        assert!(e.contains("cannot be attached as iqn.") && e.len() > url.len() + 60, "{e}");
    }
    // What is said of a target does not have the secret in it.
    assert!(!attach(&format!("{at}/{TARGET}/7"), Some(right)).unwrap_err().to_string().contains("correcthorse"));
}
