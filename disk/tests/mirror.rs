//! Mirrored disks on real files: synchronisation, epochs that travel, takeovers there and back, what is refused and in which words.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use understudy_disk::block::open;
use understudy_disk::mirror::{
    Applied, Begin, Content, Copy, CopyOptions, LogReader, Next, Plan, Progress, Range, Standing, Sync,
};
use understudy_disk::{
    Block, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Merged, Options, Qcow2, Raw, Tag,
};
use understudy_protocol::ids::{Epoch, Generation};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// A node with its own storage.
struct Node {
    name: &'static str,
    dir: tempfile::TempDir,
    format: Format,
}

impl Node {
    fn new(name: &'static str, format: Format, size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = Node { name, dir, format };
        match format {
            Format::Raw => drop(Raw::create(&node.disk(), size).unwrap()),
            Format::Qcow2 => drop(Qcow2::create(&node.disk(), size, None).unwrap()),
        }
        node
    }
    fn disk(&self) -> PathBuf {
        self.dir.path().join("m.disk")
    }
    fn slices(&self) -> PathBuf {
        LocalDirectory::beside(&self.disk())
    }
    fn directory(&self) -> Arc<LocalDirectory> {
        Arc::new(LocalDirectory::make(&self.slices()).unwrap())
    }
    fn run(&self, generation: u64, memory: Memory) -> Result<Arc<Disk>, Error> {
        let identity = Identity { machine: "m".into(), node: self.name.into(), generation: Generation(generation) };
        let options = Options {
            base: open(&self.disk(), self.format, false)?,
            format: self.format,
            directory: self.directory(),
            identity,
            memory,
            limits: Limits::default(),
        };
        Disk::open_mirrored(options).map(Arc::new)
    }
    fn copy(&self) -> Result<Copy, Error> {
        Copy::open(CopyOptions {
            base: open(&self.disk(), self.format, false)?,
            format: self.format,
            directory: self.directory(),
            machine: "m".into(),
            node: self.name.into(),
            limits: Limits::default(),
        })
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

fn all(disk: &dyn Block) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(0, &mut bytes).unwrap();
    bytes
}

/// What is to be sent now, sent and acknowledged.
fn pump(sync: &mut Sync, copy: &Copy) -> Next {
    loop {
        let (mut last, mut differing) = (0, Vec::new());
        let end = loop {
            match sync.next(1 << 20).unwrap() {
                Next::Item(item) => {
                    last = item.number;
                    if copy.apply(&item).unwrap() == Applied::Differs {
                        differing.push(Range { at: item.at, len: item.len });
                    }
                }
                other => break other,
            }
        };
        if last == 0 {
            return end;
        }
        copy.flush().unwrap();
        sync.acknowledge(last, &differing).unwrap();
    }
}

/// A whole synchronisation of a disk that runs unprotected; it is protected afterwards, with this epoch open.
fn synchronise(disk: &Arc<Disk>, copy: &Copy, epoch: u64) -> (Tag, Progress, Begin) {
    let (mut sync, begin) = disk.sync(&copy.state().unwrap()).unwrap();
    copy.begin(&begin).unwrap();
    assert_eq!(pump(&mut sync, copy), Next::Wait);
    disk.protect(Epoch(epoch)).unwrap();
    sync.hold().unwrap();
    let Next::Done(tag) = pump(&mut sync, copy) else { panic!("it does not end") };
    copy.into_step(tag).unwrap();
    let progress = sync.progress();
    sync.done(tag).unwrap();
    (tag, progress, begin)
}

/// The primary and its copy in a session in step.
struct Pair {
    disk: Arc<Disk>,
    copy: Copy,
    reader: LogReader,
    epoch: u64,
}

impl Pair {
    fn log(&mut self) {
        while let Some(piece) = self.reader.next(&self.disk, 5000).unwrap() {
            self.copy.append(&piece).unwrap();
        }
    }
    /// An epoch up to the copy's seal.
    fn send(&mut self) -> Tag {
        let tag = self.disk.cut(Epoch(self.epoch)).unwrap();
        self.epoch += 1;
        self.log();
        self.disk.seal(Epoch(self.epoch - 1)).unwrap();
        self.copy.seal(tag).unwrap();
        tag
    }
    fn checkpoint(&mut self) -> Tag {
        let tag = self.send();
        self.copy.commit(tag).unwrap();
        self.disk.commit(Epoch(self.epoch - 1)).unwrap();
        tag
    }
    fn merge(&self) {
        while let Merged::Slices { .. } = self.disk.merge().unwrap() {}
        while let Merged::Slices { .. } = self.copy.merge().unwrap() {}
    }
}

fn pair(primary: &Node, standby: &Node) -> Pair {
    let disk = primary.run(1, Memory::None).unwrap();
    fill(&*disk, 0, 4096, 1);
    fill(&*disk, 40 * MIB, 70_000 / 512 * 512, 2);
    let copy = standby.copy().unwrap();
    let (tag, ..) = synchronise(&disk, &copy, 1);
    Pair { disk, copy, reader: LogReader::new(tag), epoch: 1 }
}

fn nodes() -> (Node, Node) {
    (Node::new("a", Format::Raw, SIZE), Node::new("b", Format::Raw, 512))
}

#[test]
fn a_standby_takes_over_from_its_own_copy_and_the_old_primary_becomes_one() {
    for (one, two) in [(Format::Raw, Format::Raw), (Format::Raw, Format::Qcow2)] {
        let (a, b) = (Node::new("a", one, SIZE), Node::new("b", two, 512));
        let mut pair = pair(&a, &b);
        fill(&*pair.disk, MIB, 8192, 3);
        pair.log();
        fill(&*pair.disk, 0, 512, 4);
        pair.checkpoint();
        pair.merge();
        fill(&*pair.disk, 2 * MIB, 512, 5);
        let tag = pair.checkpoint();
        // Sealed on both sides; the standby's memory is of before.
        fill(&*pair.disk, 2 * MIB, 512, 6);
        pair.send();
        fill(&*pair.disk, 2 * MIB, 512, 7);
        pair.log();
        drop(pair);

        let disk = b.run(2, Memory::Image(tag)).unwrap();
        let content = [(0, 4), (512, 1), (MIB, 3), (2 * MIB, 5), (40 * MIB, 2)];
        content.iter().for_each(|(at, with)| assert_eq!(byte(&*disk, *at), *with, "at {at}"));
        fill(&*disk, 3 * MIB, 512, 8);
        disk.flush().unwrap();
        while let Merged::Slices { .. } = disk.merge().unwrap() {}
        assert!(disk.settle().unwrap());
        fill(&*disk, 50 * MIB, 512, 9);

        // The node that died comes back.
        let copy = a.copy().unwrap();
        let state = copy.state().unwrap();
        assert!(matches!(state.standing, Standing::Ran { direct: false, .. }), "{state:?}");
        let Plan::Blocks { bytes } = disk.plan(&state).unwrap() else { panic!("{:?}", disk.plan(&state)) };
        assert!(bytes <= 4 * 65536, "{bytes}");
        let (_, progress, begin) = synchronise(&disk, &copy, 1);
        assert_eq!(begin.keep, Some(tag));
        assert!(progress.sent <= 4 * 65536, "{progress:?}");
        let mut back = Pair { disk, copy, reader: LogReader::new(begin.keep.unwrap()), epoch: 1 };
        back.reader = LogReader::new(match back.copy.state().unwrap().standing {
            Standing::Follows { at, .. } => at,
            other => panic!("{other:?}"),
        });
        fill(&*back.disk, 4 * MIB, 512, 10);
        let tag = back.checkpoint();
        let expected = all(&*back.disk);
        drop(back);
        let disk = a.run(3, Memory::Image(tag)).unwrap();
        assert!(all(&*disk) == expected);
        assert_eq!(byte(&*disk, 50 * MIB), 9);
    }
}

#[test]
fn a_session_that_breaks_goes_on_in_step_and_sends_nothing_twice() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    fill(&*pair.disk, 0, 512, 2);
    pair.checkpoint();
    fill(&*pair.disk, 512, 512, 3);
    let sealed = pair.send();
    fill(&*pair.disk, 1024, 512, 4);
    pair.disk.cut(Epoch(pair.epoch)).unwrap();
    pair.epoch += 1;
    pair.log();
    // The link drops. Nobody unprotects.
    pair.disk.leave();
    pair.copy.abandon();
    let state = pair.copy.state().unwrap();
    assert!(matches!(&state.standing, Standing::Follows { sealed: s, .. } if s.as_slice() == [sealed]), "{state:?}");
    assert_eq!(pair.disk.plan(&state).unwrap(), Plan::InStep);
    let rejoin = pair.disk.join(&state).unwrap();
    assert_eq!(rejoin.at, sealed);
    pair.copy.rejoin(&rejoin).unwrap();
    assert!(
        matches!(pair.copy.state().unwrap().standing, Standing::Follows { sealed: s, .. } if s == [sealed]),
        "what was sealed is not committed by a new session: the checkpoint may be the one before"
    );
    pair.reader = LogReader::new(rejoin.at);
    fill(&*pair.disk, 1536, 512, 5);
    let tag = pair.checkpoint();
    pair.merge();
    let PairEnd { content } = end(pair);
    let disk = b.run(2, Memory::Image(tag)).unwrap();
    assert!(all(&*disk) == content);
}

struct PairEnd {
    content: Vec<u8>,
}

fn end(pair: Pair) -> PairEnd {
    PairEnd { content: all(&*pair.disk) }
}

#[test]
fn a_synchronisation_that_broke_goes_on_where_it_was() {
    let (a, b) = nodes();
    let disk = a.run(1, Memory::None).unwrap();
    (0..SIZE / MIB).for_each(|i| fill(&*disk, i * MIB, 1 << 20, i as u8 + 1));
    disk.flush().unwrap();
    let copy = b.copy().unwrap();
    assert!(matches!(disk.plan(&copy.state().unwrap()).unwrap(), Plan::Full { .. }));
    let (mut sync, begin) = disk.sync(&copy.state().unwrap()).unwrap();
    says(disk.sync(&copy.state().unwrap()), &["is going on"]);
    copy.begin(&begin).unwrap();
    // Of what travels: first hashes, then what differs.
    let mut sent = 0;
    while sent < 48 * MIB {
        match sync.next(1 << 20).unwrap() {
            Next::Item(item) => {
                sent += if matches!(item.content, Content::Data(_)) { item.len } else { 0 };
                let differs = copy.apply(&item).unwrap() == Applied::Differs;
                copy.flush().unwrap();
                let range = Range { at: item.at, len: item.len };
                sync.acknowledge(item.number, if differs { std::slice::from_ref(&range) } else { &[] }).unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    says(sync.acknowledge(1 << 40, &[]), &["was not sent"]);
    says(sync.acknowledge(1, &[Range { at: 0, len: 512 }]), &["was not sent"]);
    drop(sync);
    drop(copy);

    says(b.run(2, Memory::None), &["is being synchronised from a", "not complete"]);
    let tag = Tag { serial: 1, generation: Generation(1), epoch: Epoch(1), records: 1, digest: 1 };
    says(b.run(2, Memory::Image(tag)), &["is being synchronised from a"]);

    // The primary's process dies too; what it had written directly was in regions that had become hot.
    drop(disk);
    let disk = a.run(2, Memory::None).unwrap();
    let copy = b.copy().unwrap();
    let Plan::Blocks { bytes } = disk.plan(&copy.state().unwrap()).unwrap() else { panic!() };
    assert!(bytes <= SIZE - 47 * MIB, "{bytes} are left");
    let (_, progress, begin) = synchronise(&disk, &copy, 1);
    assert!(begin.resumed);
    assert!(progress.sent <= SIZE - 47 * MIB, "{progress:?}");
    let expected = all(&*disk);
    drop(copy);
    let state = b.run(3, Memory::None).unwrap();
    assert!(all(&*state) == expected);
}

#[test]
fn what_is_the_same_already_does_not_travel() {
    let (a, b) = (Node::new("a", Format::Raw, SIZE), Node::new("b", Format::Raw, SIZE));
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 7919) as u8).collect();
    fs::write(a.disk(), &bytes).unwrap();
    let mut other = bytes.clone();
    other[5 * MIB as usize] ^= 1;
    fs::write(b.disk(), &other).unwrap();
    let disk = a.run(1, Memory::None).unwrap();
    let copy = b.copy().unwrap();
    let (_, progress, _) = synchronise(&disk, &copy, 1);
    assert_eq!(progress.sent, MIB);
    drop(copy);
    assert!(fs::read(b.disk()).unwrap() == bytes);
}

#[test]
fn what_is_written_while_it_is_sent_is_sent_again() {
    let (a, b) = nodes();
    let disk = a.run(1, Memory::None).unwrap();
    fill(&*disk, 0, 512, 1);
    let copy = b.copy().unwrap();
    let (mut sync, begin) = disk.sync(&copy.state().unwrap()).unwrap();
    copy.begin(&begin).unwrap();
    // A write while the block is on its way.
    let mut first = None;
    while first.is_none() {
        match sync.next(1 << 20).unwrap() {
            Next::Item(item) => {
                first =
                    (item.at == 0 && matches!(item.content, Content::Data(_))).then_some(item.clone()).or_else(|| {
                        let differs = copy.apply(&item).unwrap() == Applied::Differs;
                        copy.flush().unwrap();
                        let range = [Range { at: item.at, len: item.len }];
                        sync.acknowledge(item.number, if differs { &range } else { &[] }).unwrap();
                        None
                    })
            }
            other => panic!("{other:?}"),
        }
    }
    fill(&*disk, 512, 512, 2);
    let first = first.unwrap();
    copy.apply(&first).unwrap();
    copy.flush().unwrap();
    sync.acknowledge(first.number, &[]).unwrap();
    assert!(sync.progress().left > 0);
    pump(&mut sync, &copy);
    disk.protect(Epoch(1)).unwrap();
    sync.hold().unwrap();
    let Next::Done(tag) = pump(&mut sync, &copy) else { panic!() };
    copy.into_step(tag).unwrap();
    sync.done(tag).unwrap();
    let expected = all(&*disk);
    drop(copy);
    assert!(all(&*b.run(2, Memory::None).unwrap()) == expected);
}

#[test]
fn after_an_outage_only_what_may_differ_is_copied() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    fill(&*pair.disk, 0, 512, 2);
    pair.checkpoint();
    let Pair { disk, copy, .. } = pair;
    drop(copy);
    disk.leave();
    // The standby is away; the primary goes on alone, boots once more, and is synchronised after it.
    disk.unprotect().unwrap();
    fill(&*disk, 10 * MIB, 512, 3);
    disk.finish().unwrap();
    drop(disk);
    let disk = a.run(4, Memory::None).unwrap();
    fill(&*disk, 20 * MIB, 512, 4);
    disk.finish().unwrap();
    let copy = b.copy().unwrap();
    let state = copy.state().unwrap();
    let Plan::Blocks { bytes } = disk.plan(&state).unwrap() else { panic!("{:?}", disk.plan(&state)) };
    assert!(bytes <= 3 * 65536, "{bytes}");
    let (_, progress, _) = synchronise(&disk, &copy, 1);
    assert!(progress.sent <= 3 * 65536, "{progress:?}");
    let expected = all(&*disk);
    drop(copy);
    assert!(all(&*b.run(5, Memory::None).unwrap()) == expected);
}

#[test]
fn a_lost_bitmap_means_that_everything_is_compared() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    pair.checkpoint();
    let Pair { disk, copy, .. } = pair;
    disk.leave();
    disk.unprotect().unwrap();
    drop(disk);
    fs::remove_file(a.slices().join("peer.b.bits")).unwrap();
    let disk = a.run(2, Memory::None).unwrap();
    let Plan::Full { why } = disk.plan(&copy.state().unwrap()).unwrap() else { panic!() };
    assert!(why.contains("is gone"), "{why}");
    assert!(disk.status().mirror.unwrap().peers[0].lost.is_some());
    let (_, progress, _) = synchronise(&disk, &copy, 1);
    assert_eq!(progress.sent, 0, "nothing differs");
}

#[test]
fn what_was_written_on_both_sides_is_refused_until_an_administrator_gives_one_up() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    let tag = pair.checkpoint();
    let Pair { disk, copy, .. } = pair;
    drop(copy);
    disk.leave();
    // Both go on: what a cluster must prevent.
    disk.unprotect().unwrap();
    fill(&*disk, 0, 512, 7);
    disk.finish().unwrap();
    drop(disk);
    let other = b.run(2, Memory::Image(tag)).unwrap();
    fill(&*other, 0, 512, 8);
    other.flush().unwrap();

    let copy = a.copy().unwrap();
    let state = copy.state().unwrap();
    let Plan::Refused { why } = other.plan(&state).unwrap() else { panic!("{:?}", other.plan(&state)) };
    assert!(why.contains("discard DISK --in-favour-of b") && why.contains("neither used nor overwritten"), "{why}");
    says(other.sync(&state), &["neither used nor overwritten"]);
    // Nor does the copy let itself be talked into it.
    let begin = Begin {
        machine: "m".into(),
        from: "b".into(),
        generation: Generation(2),
        disk: state.disk.unwrap(),
        size: SIZE,
        sync: 1,
        resumed: false,
        keep: Some(tag),
        history: vec![],
    };
    says(copy.begin(&begin), &["was written alone", "not overwritten"]);
    says(copy.begin(&Begin { keep: None, ..begin.clone() }), &["was written alone"]);
    says(copy.begin(&Begin { generation: Generation(0), ..begin }), &["by nobody"]);
    drop(copy);
    understudy_disk::inspect::discard(&a.slices(), "b").unwrap();
    let copy = a.copy().unwrap();
    assert!(matches!(other.plan(&copy.state().unwrap()).unwrap(), Plan::Full { .. }));
    while let Merged::Slices { .. } = other.merge().unwrap() {}
    synchronise(&other, &copy, 1);
    assert_eq!(copy.state().unwrap().discard, None, "consent is for once");
    drop(copy);
    let disk = a.run(3, Memory::None).unwrap();
    assert_eq!(byte(&*disk, 0), 8);
}

#[test]
fn an_outdated_copy_is_not_run_from() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    let tag = pair.checkpoint();
    pair.disk.leave();
    pair.copy.outdate("a").unwrap();
    let Pair { disk, copy, .. } = pair;
    drop(copy);
    says(b.run(2, Memory::None), &["outdated", "a said"]);
    says(b.run(2, Memory::Image(tag)), &["outdated"]);
    disk.unprotect().unwrap();
    fill(&*disk, 0, 512, 9);
    disk.finish().unwrap();
    let disk2 = disk;
    let copy = b.copy().unwrap();
    synchronise(&disk2, &copy, 1);
    drop(copy);
    assert_eq!(byte(&*b.run(2, Memory::None).unwrap(), 0), 9);
}

#[test]
fn a_stale_primary_is_refused_by_the_copy() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    let tag = pair.checkpoint();
    let taken = b.run(5, Memory::Image(tag)).unwrap();
    fill(&*pair.disk, 0, 512, 9);
    let cut = pair.disk.cut(Epoch(pair.epoch)).unwrap();
    pair.log();
    pair.disk.seal(Epoch(pair.epoch)).unwrap();
    pair.copy.seal(cut).unwrap();
    says(pair.copy.commit(cut), &["is owned by generation 5"]);
    says(pair.copy.state(), &["is owned by generation 5"]);
    assert_eq!(byte(&*taken, 0), 1);
}

#[test]
fn verification_finds_what_differs_and_the_next_synchronisation_mends_it() {
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    fill(&*pair.disk, 3 * MIB, 512, 2);
    pair.checkpoint();
    pair.merge();
    // Bit rot, under the copy.
    {
        let image = fs::OpenOptions::new().write(true).open(b.disk()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&image, &[0xff], 40 * MIB + 3).unwrap();
    }
    let mut verify = pair.disk.verify().unwrap();
    says(pair.disk.verify(), &["verification", "going on"]);
    says(verify.ask(), &["not held still"]);
    let mut asked = 0;
    loop {
        // The guest goes on; one side has merged more than the other.
        fill(&*pair.disk, 5 * MIB, 512, asked as u8);
        pair.checkpoint();
        if asked % 2 == 0 {
            while let Merged::Slices { .. } = pair.copy.merge().unwrap() {}
        } else {
            while let Merged::Slices { .. } = pair.disk.merge().unwrap() {}
        }
        let mine = verify.pin().unwrap();
        let theirs = pair.copy.pin(mine).unwrap().unwrap();
        assert_eq!(verify.pin_at(theirs).unwrap(), Some(theirs));
        fill(&*pair.disk, 6 * MIB, 512, asked as u8);
        pair.checkpoint();
        let mut over = false;
        for _ in 0..10 {
            match verify.ask().unwrap() {
                Some(item) => verify.result(item.number, pair.copy.compare(&item).unwrap()).unwrap(),
                None => over = true,
            }
            asked += 1;
        }
        verify.unpin();
        pair.copy.unpin();
        if over {
            break;
        }
    }
    let checked = verify.checked();
    assert_eq!((checked.done, checked.total, checked.differing), (SIZE, SIZE, MIB));
    assert_eq!(checked.ranges, [Range { at: 40 * MIB, len: MIB }]);
    drop(verify);
    pair.merge();
    pair.disk.leave();
    pair.copy.abandon();
    let state = pair.copy.state().unwrap();
    let Plan::Blocks { bytes } = pair.disk.plan(&state).unwrap() else { panic!("{:?}", pair.disk.plan(&state)) };
    assert_eq!(bytes, MIB);
    // The disk is protected already: there is only the second phase.
    let (mut sync, begin) = pair.disk.sync(&state).unwrap();
    pair.copy.begin(&begin).unwrap();
    sync.hold().unwrap();
    let Next::Done(tag) = pump(&mut sync, &pair.copy) else { panic!() };
    pair.copy.into_step(tag).unwrap();
    sync.done(tag).unwrap();
    pair.reader = LogReader::new(tag);
    fill(&*pair.disk, 0, 512, 77);
    let tag = pair.checkpoint();
    let PairEnd { content } = end(pair);
    assert!(all(&*b.run(2, Memory::Image(tag)).unwrap()) == content);
}

#[test]
fn a_log_that_is_not_what_was_written_is_refused() {
    let (a, b) = nodes();
    let pair = pair(&a, &b);
    fill(&*pair.disk, 0, 512, 2);
    let mut reader = pair.reader.clone();
    let good = reader.next(&pair.disk, 1 << 20).unwrap().unwrap();
    assert_eq!((good.bytes.len(), good.closed), (64 + 512, None));
    let mut bad = good.clone();
    bad.bytes[100] ^= 1;
    says(pair.copy.append(&bad), &["wrong checksum"]);
    pair.copy.abandon();
    let mut later = good.clone();
    later.slice.serial += 1;
    says(pair.copy.append(&later), &["does not come next"]);
    let mut gap = good.clone();
    gap.offset = 64;
    says(pair.copy.append(&gap), &["does not begin"]);
    pair.copy.append(&good).unwrap();
    says(pair.copy.append(&good), &["where the last piece ended"]);
    let tag = pair.disk.cut(Epoch(1)).unwrap();
    says(pair.copy.seal(tag), &["in the middle of slice"]);
    let end = reader.next(&pair.disk, 1 << 20).unwrap().unwrap();
    assert_eq!(end.closed, Some(tag));
    let other = Tag { digest: tag.digest ^ 1, ..tag };
    says(
        pair.copy.append(&understudy_disk::mirror::LogPiece { closed: Some(other), ..end.clone() }),
        &["not what its end says"],
    );
    pair.copy.append(&end).unwrap();
    says(pair.copy.seal(other), &["the epoch ends with slice", "what came is slice"]);
    says(pair.copy.commit(tag), &["was not sealed"]);
    pair.copy.seal(tag).unwrap();
    pair.copy.commit(tag).unwrap();
}

#[test]
fn the_tool_shows_compares_and_marks_copies() {
    use std::process::Command;
    let tool = |arguments: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_understudy-disk")).args(arguments).output().unwrap();
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        )
    };
    let (a, b) = nodes();
    let mut pair = pair(&a, &b);
    fill(&*pair.disk, 0, 512, 2);
    pair.checkpoint();
    let (one, two) = (a.disk().display().to_string(), b.disk().display().to_string());
    let (ok, said) = tool(&["verify", &one, &two]);
    assert!(!ok && said.contains("is in use by m"), "{said}");
    pair.disk.leave();
    drop(pair);
    let (ok, said) = tool(&["verify", &one, &two]);
    assert!(ok && said.contains("are the same"), "{said}");
    let (ok, said) = tool(&["inspect", &one]);
    assert!(ok && said.contains("ran from this copy last") && said.contains("b: has up to slice"), "{said}");
    let (ok, said) = tool(&["inspect", &two]);
    assert!(ok && said.contains("a copy that follows a"), "{said}");
    let (ok, said) = tool(&["outdate", &one]);
    assert!(!ok && said.contains("nobody's copy"), "{said}");
    assert!(tool(&["outdate", &two]).0);
    let (_, said) = tool(&["inspect", &two]);
    assert!(said.contains("outdated, as an administrator said") && said.contains("PROBLEM"), "{said}");
    let (ok, said) = tool(&["verify", &one, &two]);
    assert!(!ok && said.contains("is outdated"), "{said}");
    assert!(tool(&["outdate", &two, "--clear"]).0);
    let (ok, said) = tool(&["discard", &two, "--in-favour-of", "b"]);
    assert!(!ok && said.contains("own copy"), "{said}");
    assert!(tool(&["discard", &two, "--in-favour-of", "a"]).0);
    let (_, said) = tool(&["inspect", &two]);
    assert!(said.contains("may be overwritten by a's disk"), "{said}");
    {
        let image = fs::OpenOptions::new().write(true).open(b.disk()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&image, &[0xff], 40 * MIB + 3).unwrap();
    }
    let (ok, said) = tool(&["verify", &one, &two]);
    assert!(!ok && said.contains("differ in 1.0 MiB") && said.contains("41943040"), "{said}");
}
