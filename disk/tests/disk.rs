//! The whole crate on real files: both formats, takeovers between two openings, what is refused, and in which words.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use understudy_disk::block::open;
use understudy_disk::{
    Block, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Merged, Merger, Options, Qcow2, Raw,
};
use understudy_protocol::ids::{Epoch, Generation};

const MIB: u64 = 1 << 20;

struct Place {
    dir: tempfile::TempDir,
    disk: PathBuf,
    format: Format,
}

impl Place {
    fn new(format: Format) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("m.disk");
        match format {
            Format::Raw => drop(Raw::create(&disk, 8 * MIB).unwrap()),
            Format::Qcow2 => drop(Qcow2::create(&disk, 8 * MIB, None).unwrap()),
        }
        Place { dir, disk, format }
    }

    fn slices(&self) -> PathBuf {
        LocalDirectory::beside(&self.disk)
    }

    fn slice_files(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.slices()).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "slice")).collect();
        files.sort();
        files
    }

    fn open_as(&self, machine: &str, generation: u64, memory: Memory, limits: Limits) -> Result<Disk, Error> {
        Disk::open(Options {
            base: open(&self.disk, self.format, false)?,
            format: self.format,
            directory: Arc::new(LocalDirectory::make(&self.slices()).unwrap()),
            identity: Identity {
                machine: machine.into(),
                node: format!("n{generation}"),
                generation: Generation(generation),
            },
            memory,
            limits,
        })
    }

    fn open(&self, generation: u64, memory: Memory) -> Result<Disk, Error> {
        self.open_as("m", generation, memory, Limits::default())
    }

    /// The base alone.
    fn base(&self, at: u64) -> u8 {
        byte(&*open(&self.disk, self.format, true).unwrap(), at)
    }
}

fn byte(disk: &dyn Block, at: u64) -> u8 {
    let mut sector = [0; 512];
    disk.read_at(at, &mut sector).unwrap();
    assert!(sector.iter().all(|b| *b == sector[0]));
    sector[0]
}

fn fill(disk: &dyn Block, at: u64, len: usize, with: u8) {
    disk.write_at(at, &vec![with; len]).unwrap();
}

fn says(result: Result<impl Sized, Error>, words: &[&str]) {
    let said = match result {
        Ok(_) => panic!("it works"),
        Err(e) => e.to_string(),
    };
    for word in words {
        assert!(said.contains(word), "{said:?} does not say {word:?}");
    }
}

fn both(test: impl Fn(Place)) {
    test(Place::new(Format::Raw));
    test(Place::new(Format::Qcow2));
}

#[test]
fn an_epoch_reaches_the_base_only_after_its_commit() {
    both(|place| {
        let disk = place.open(1, Memory::None).unwrap();
        fill(&disk, 0, 4096, 1);
        disk.protect(Epoch(1)).unwrap();
        fill(&disk, 0, 512, 2);
        disk.write_zeroes(512, 512, false).unwrap();
        disk.discard(1024, 512).unwrap();
        let read = |disk: &Disk| [0, 512, 1024, 1536].map(|at| byte(disk, at));
        assert_eq!(read(&disk), [2, 0, 0, 1]);
        disk.cut(Epoch(1)).unwrap();
        fill(&disk, 512, 512, 3);
        disk.cut(Epoch(2)).unwrap();
        disk.seal(Epoch(2)).unwrap();
        assert_eq!(disk.merge().unwrap(), Merged::Nothing);
        disk.commit(Epoch(1)).unwrap();
        assert_eq!(disk.merge().unwrap(), Merged::Slices { slices: 1, bytes: 3 * 64 + 512 });
        // The base has epoch 1, and not what came after it.
        assert_eq!([0, 512, 1024, 1536].map(|at| place.base(at)), [2, 0, 0, 1]);
        assert_eq!(read(&disk), [2, 3, 0, 1]);
        disk.commit(Epoch(2)).unwrap();
        disk.merge().unwrap();
        assert_eq!(place.base(512), 3);
        assert!(place.slice_files().is_empty());
        let status = disk.status();
        assert_eq!((status.mode, status.backlog_bytes, status.index_extents), ("protected", 0, 0));
    });
}

#[test]
fn a_takeover_finds_exactly_the_checkpoint_while_the_old_owner_still_lives() {
    let place = Place::new(Format::Raw);
    let old = place.open(1, Memory::None).unwrap();
    old.protect(Epoch(1)).unwrap();
    fill(&old, 0, 4096, 1);
    old.cut(Epoch(1)).unwrap();
    fill(&old, 0, 4096, 2);
    let tag = old.cut(Epoch(2)).unwrap();
    fill(&old, 0, 4096, 3);
    old.cut(Epoch(3)).unwrap();
    fill(&old, 0, 4096, 4);
    // The standby has committed epoch 2; the primary has not heard of it.
    old.seal(Epoch(2)).unwrap();
    old.commit(Epoch(1)).unwrap();

    let new = place.open(2, Memory::Image(tag)).unwrap();
    assert_eq!(byte(&new, 0), 2);
    assert_eq!(new.status().discarded.len(), 2);
    // It runs at once, but does not merge: the frozen one might be writing to the base.
    fill(&new, 8192, 512, 9);
    new.flush().unwrap();
    let Merged::Waiting(why) = new.merge().unwrap() else { panic!("it merges while the old owner lives") };
    assert!(why.contains("earlier owner"), "{why}");
    // The old one wakes.
    fill(&old, 0, 4096, 66);
    assert!(matches!(old.commit(Epoch(2)), Err(Error::Superseded { theirs: Generation(2), .. })));
    assert!(matches!(old.write_at(0, &[6; 512]), Err(Error::Superseded { .. })));
    assert!(old.merge().is_err());
    assert_eq!((byte(&new, 0), byte(&new, 8192)), (2, 9));
    drop(old);
    while new.merge().unwrap() != Merged::Nothing {}
    assert!(new.settle().unwrap(), "it writes the base directly now");
    assert_eq!((place.base(0), place.base(8192)), (2, 9));
}

#[test]
fn a_checkpoint_that_does_not_fit_the_disk_is_refused() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    disk.protect(Epoch(1)).unwrap();
    let mut tags = Vec::new();
    for epoch in 1..=2 {
        fill(&disk, 0, 512, epoch as u8);
        tags.push(disk.cut(Epoch(epoch)).unwrap());
        disk.seal(Epoch(epoch)).unwrap();
    }
    disk.commit(Epoch(2)).unwrap();
    drop(disk);
    says(place.open(2, Memory::Image(tags[0])), &["ahead of the checkpoint", "epoch 2"]);
    let other = understudy_disk::Tag { digest: tags[1].digest ^ 1, ..tags[1] };
    says(place.open(2, Memory::Image(other)), &["different histories"]);
    let newer = understudy_disk::Tag { serial: tags[1].serial + 1, ..tags[1] };
    says(place.open(2, Memory::Image(newer)), &["is missing"]);
    let disk = place.open(2, Memory::Image(tags[1])).unwrap();
    while disk.merge().unwrap() != Merged::Nothing {}
    disk.settle().unwrap();
    drop(disk);
    says(place.open(3, Memory::Image(tags[1])), &["written without protection by n2"]);
}

#[test]
fn a_slice_that_was_committed_and_is_damaged_is_named_and_kept() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    disk.protect(Epoch(1)).unwrap();
    fill(&disk, 0, 4096, 1);
    let tag = disk.cut(Epoch(1)).unwrap();
    disk.seal(Epoch(1)).unwrap();
    disk.commit(Epoch(1)).unwrap();
    let file = place.slice_files().remove(0);
    let whole = fs::read(&file).unwrap();
    drop(disk);
    for at in [0, 30, 64, 1000, 64 + 4096 + 10] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        fs::write(&file, damaged).unwrap();
        for memory in [Memory::None, Memory::Image(tag)] {
            let name = file.file_name().unwrap().to_str().unwrap();
            says(place.open(2, memory), &[name, "committed epoch", "nothing was used"]);
        }
        assert!(file.exists());
    }
    fs::write(&file, &whole).unwrap();
    assert_eq!(byte(&place.open(2, Memory::None).unwrap(), 0), 1);
}

#[test]
fn a_running_merge_stops_at_damage_and_reads_of_it_fail() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    disk.protect(Epoch(1)).unwrap();
    fill(&disk, 0, 4096, 1);
    disk.cut(Epoch(1)).unwrap();
    disk.seal(Epoch(1)).unwrap();
    disk.commit(Epoch(1)).unwrap();
    let file = place.slice_files().remove(0);
    let mut bytes = fs::read(&file).unwrap();
    bytes[200] ^= 1;
    fs::write(&file, bytes).unwrap();
    says(disk.merge(), &["wrong checksum"]);
    says(disk.read_at(0, &mut [0; 512]), &["wrong checksum"]);
    assert_eq!(place.base(0), 0);
    assert!(disk.status().problem.unwrap().contains("wrong checksum"));
    assert_eq!(byte(&disk, 65536), 0);
}

#[test]
fn a_second_user_of_the_disk_is_refused_and_told_who_has_it() {
    let place = Place::new(Format::Raw);
    let disk = place.open(3, Memory::None).unwrap();
    says(place.open(3, Memory::None), &["in use by m on n3", "generation 3"]);
    says(place.open(4, Memory::None), &["in use by m on n3", "fenced"]);
    says(
        place.open_as("other", 9, Memory::None, Limits::default()),
        &["belongs to the machine m", "n3", "not to other"],
    );
    says(place.open(2, Memory::None), &["owned by generation 3 on n3"]);
    drop(disk);
    says(place.open_as("other", 9, Memory::None, Limits::default()), &["belongs to the machine m"]);
    place.open(3, Memory::None).unwrap();
}

#[test]
fn a_full_backlog_refuses_writes_until_something_is_merged() {
    let place = Place::new(Format::Raw);
    let limits = Limits { backlog: MIB, ..Limits::default() };
    let disk = Arc::new(place.open_as("m", 1, Memory::None, limits).unwrap());
    disk.protect(Epoch(1)).unwrap();
    let mut at = 0;
    let refused = loop {
        match disk.write_at(at, &[1; 65536]) {
            Ok(()) => at += 65536,
            Err(e) => break e,
        }
    };
    assert!(refused.is_temporary() && refused.to_string().contains("wait to be merged"), "{refused}");
    assert!(at >= MIB - 65536 && !disk.wait_for_room(Duration::ZERO));
    let _merger = Merger::start(disk.clone()).unwrap();
    disk.cut(Epoch(1)).unwrap();
    disk.seal(Epoch(1)).unwrap();
    disk.commit(Epoch(1)).unwrap();
    assert!(disk.wait_for_room(Duration::from_secs(20)));
    fill(&*disk, at, 65536, 1);
    assert_eq!(disk.status().merged_bytes, at + at / 65536 * 64);
}

#[test]
fn many_threads_write_while_epochs_are_cut_and_merged() {
    both(|place| {
        let disk = Arc::new(place.open(1, Memory::None).unwrap());
        disk.protect(Epoch(1)).unwrap();
        let merger = Merger::start(disk.clone()).unwrap();
        let writers: Vec<_> = (0..3u64)
            .map(|who| {
                let disk = disk.clone();
                thread::spawn(move || {
                    let mut random = who + 1;
                    for round in 0..300u64 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let at = (who * 128 + (random >> 33) % 100) * 4096;
                        let value = (round % 250 + 1) as u8;
                        let data = [value; 4096];
                        let (one, two) = data.split_at(1536);
                        disk.write(at, &&[IoSlice::new(one), IoSlice::new(two)][..]).unwrap();
                        let (mut one, mut two) = ([0; 512], [0; 3584]);
                        disk.read(at, &mut &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)][..]).unwrap();
                        assert!(one.iter().chain(&two).all(|b| *b == value), "what was written is read");
                    }
                })
            })
            .collect();
        let mut epoch = 1;
        while !writers.iter().all(|w| w.is_finished()) {
            disk.cut(Epoch(epoch)).unwrap();
            disk.seal(Epoch(epoch)).unwrap();
            disk.commit(Epoch(epoch)).unwrap();
            epoch += 1;
        }
        writers.into_iter().for_each(|w| w.join().unwrap());
        disk.unprotect().unwrap();
        let before: Vec<_> = (0..400).map(|i| byte(&*disk, i * 4096)).collect();
        let until = Instant::now() + Duration::from_secs(20);
        while disk.status().mode != "direct" {
            assert!(Instant::now() < until, "it never goes back to the base: {:?}", disk.status());
            thread::yield_now();
        }
        drop(merger);
        let base = open(&place.disk, place.format, true).unwrap();
        let after: Vec<_> = (0..400).map(|i| byte(&*base, i * 4096)).collect();
        assert_eq!(before, after);
    });
}

#[test]
fn the_status_can_be_asked_for_while_the_disk_is_written() {
    let place = Place::new(Format::Raw);
    let disk = Arc::new(place.open(1, Memory::None).unwrap());
    disk.protect(Epoch(1)).unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    for _ in 0..2 {
        let (disk, done) = (disk.clone(), done.clone());
        thread::spawn(move || {
            for round in 0..4000 {
                fill(&*disk, round % 64 * 512, 512, round as u8);
                disk.status();
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(Duration::from_secs(60)).expect("neither waits for the other for ever");
    }
    assert!(disk.status().open_bytes >= 8000 * 512);
}

#[test]
fn qcow2_reads_through_its_backing_file_and_says_when_it_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (below, above) = (dir.path().join("below.raw"), dir.path().join("above.qcow2"));
    fill(&Raw::create(&below, 4 * MIB).unwrap(), MIB, 4096, 7);
    says(Qcow2::create(&above, 8 * MIB, Some((Path::new("wrong.raw"), Format::Raw))), &["wrong.raw"]);
    assert!(!above.exists());
    Qcow2::create(&above, 8 * MIB, Some((Path::new("below.raw"), Format::Raw))).unwrap();
    let disk = Qcow2::open(&above, false).unwrap();
    says(disk.write_at(0, &[1; 512]), &["read-only"]);
    disk.take_charge().unwrap();
    fill(&disk, MIB + 512, 512, 8);
    assert_eq!([MIB, MIB + 512, MIB + 1024, 5 * MIB].map(|at| byte(&disk, at)), [7, 8, 7, 0]);
    disk.write_zeroes(MIB, 512, true).unwrap();
    assert_eq!(byte(&disk, MIB), 0);
    disk.flush().unwrap();
    disk.resize(16 * MIB).unwrap();
    assert_eq!((disk.size(), byte(&disk, 15 * MIB)), (16 * MIB, 0));
    let report = disk.check(|_| {}).unwrap();
    assert_eq!(report.data + report.zero, 16 * MIB);
    // It shrinks under the running machine.
    fs::File::options().write(true).open(&below).unwrap().set_len(MIB).unwrap();
    says(disk.read_at(3 * MIB, &mut [0; 512]), &["below.raw shrank from 4194304 to 1048576 bytes"]);
    drop(disk);
    fs::remove_file(&below).unwrap();
    says(Qcow2::open(&above, true), &["below.raw is missing", "bring it back"]);
}

#[test]
fn a_raw_disk_that_shrank_is_named_while_it_runs_and_when_it_is_opened() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    fs::File::options().write(true).open(&place.disk).unwrap().set_len(MIB).unwrap();
    says(disk.read_at(4 * MIB, &mut [0; 512]), &["shrank from 8388608 to 1048576 bytes"]);
    drop(disk);
    says(place.open(2, Memory::None), &["shrank from 8388608 to 1048576 bytes"]);
    fs::File::options().write(true).open(&place.disk).unwrap().set_len(1000).unwrap();
    says(place.open(2, Memory::None), &["1000 bytes", "truncate"]);
    fs::remove_file(&place.disk).unwrap();
    says(place.open(2, Memory::None), &["opening the disk", "No such file"]);
}

#[test]
fn a_disk_grows_while_it_is_protected_and_never_shrinks() {
    both(|place| {
        let disk = place.open(1, Memory::None).unwrap();
        disk.protect(Epoch(1)).unwrap();
        says(disk.write_at(8 * MIB, &[1; 512]), &["beyond the end"]);
        disk.resize(9 * MIB).unwrap();
        fill(&disk, 9 * MIB - 512, 512, 5);
        says(disk.resize(MIB), &["cannot be made smaller"]);
        disk.cut(Epoch(1)).unwrap();
        disk.seal(Epoch(1)).unwrap();
        disk.commit(Epoch(1)).unwrap();
        assert!(disk.finish().is_err());
        fill(&disk, 0, 512, 6);
        disk.unprotect().unwrap();
        disk.finish().unwrap();
        drop(disk);
        assert_eq!([0, 9 * MIB - 512].map(|at| place.base(at)), [6, 5]);
    });
}

#[test]
fn requests_that_no_disk_can_serve_are_refused() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    says(disk.read_at(1, &mut [0; 512]), &["sectors of 512"]);
    says(disk.write_at(0, &[0; 100]), &["sectors of 512"]);
    says(disk.write_at(u64::MAX - 511, &[0; 512]), &["beyond the end"]);
    says(disk.discard(8 * MIB, 512), &["beyond the end"]);
    says(disk.cut(Epoch(1)), &["not protected"]);
    disk.protect(Epoch(1)).unwrap();
    says(disk.cut(Epoch(2)), &["while epoch 1 is open"]);
    fill(&disk, 0, 512, 1);
    disk.cut(Epoch(1)).unwrap();
    says(disk.commit(Epoch(1)), &["not sealed"]);
    drop(place.dir);
}

#[test]
fn requests_longer_than_a_record_arrive_whole() {
    let place = Place::new(Format::Raw);
    let disk = place.open(1, Memory::None).unwrap();
    disk.protect(Epoch(1)).unwrap();
    let long: Vec<u8> = (0..(6 * MIB) as u32).map(|i| (i / 997) as u8).collect();
    disk.write_at(MIB, &long).unwrap();
    let mut back = vec![0; long.len()];
    disk.read_at(MIB, &mut back).unwrap();
    assert!(back == long);
    disk.cut(Epoch(1)).unwrap();
    disk.seal(Epoch(1)).unwrap();
    disk.commit(Epoch(1)).unwrap();
    disk.merge().unwrap();
    open(&place.disk, Format::Raw, true).unwrap().read_at(MIB, &mut back).unwrap();
    assert!(back == long);
}
