//! A process that is killed with SIGKILL, again and again, on real files with real locks: the next one finds exactly an epoch, and not one that is older
//! than what was said to be committed.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use understudy_disk::block::open;
use understudy_disk::{Block, Disk, Error, Format, Identity, Limits, LocalDirectory, Memory, Merger, Options, Raw};
use understudy_protocol::ids::{Epoch, Generation};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 256;

fn attach(path: &Path, generation: u64) -> Result<Disk, Error> {
    Disk::open(Options {
        base: open(path, Format::Raw, false)?,
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&LocalDirectory::beside(path)).unwrap()),
        identity: Identity { machine: "m".into(), node: "n1".into(), generation: Generation(generation) },
        memory: Memory::None,
        limits: Limits { batch: 256 << 10, ..Limits::default() },
    })
}

/// What the epoch of this number writes: itself, to block 0 and to some others.
fn blocks_of(number: u64) -> impl Iterator<Item = u64> {
    let mut random = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let others = (0..12).map(move |_| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        1 + random % (BLOCKS - 1)
    });
    std::iter::once(0).chain(others)
}

fn block(disk: &dyn Block, at: u64) -> u64 {
    let mut bytes = [0; BLOCK as usize];
    disk.read_at(at * BLOCK, &mut bytes).unwrap();
    let value = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes.chunks(8).all(|c| c == &bytes[..8]), "block {at} is torn");
    value
}

/// The number of the epoch that the disk is as of; all of it is checked.
fn number(disk: &dyn Block) -> u64 {
    let newest = block(disk, 0);
    let mut expected = [0; BLOCKS as usize];
    for number in 1..=newest {
        blocks_of(number).for_each(|b| expected[b as usize] = number);
    }
    for (at, expected) in expected.iter().enumerate() {
        assert_eq!(block(disk, at as u64), *expected, "block {at} of epoch {newest}");
    }
    newest
}

/// The process that is killed: started by the test below, and nothing by itself.
#[test]
fn child() {
    let (Ok(path), Ok(generation)) = (std::env::var("DISK_TEST_PATH"), std::env::var("DISK_TEST_GENERATION")) else {
        return;
    };
    let disk = Arc::new(attach(Path::new(&path), generation.parse().unwrap()).unwrap());
    let first = number(&*disk) + 1;
    disk.protect(Epoch(1)).unwrap();
    let _merger = Merger::start(disk.clone()).unwrap();
    // Two epochs on their way at any time.
    for (epoch, number) in (1..).zip(first..first + 100_000) {
        for at in blocks_of(number) {
            disk.write_at(at * BLOCK, &number.to_le_bytes().repeat(BLOCK as usize / 8)).unwrap();
        }
        disk.cut(Epoch(epoch)).unwrap();
        if epoch > 1 {
            disk.seal(Epoch(epoch - 1)).unwrap();
            disk.commit(Epoch(epoch - 1)).unwrap();
            println!("committed {}", number - 1);
            std::io::stdout().flush().unwrap();
        }
    }
}

#[test]
fn whatever_a_killed_process_said_was_committed_is_there_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.raw");
    drop(Raw::create(&path, BLOCK * BLOCKS).unwrap());
    let mut newest = 0;
    for round in 1..=12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("DISK_TEST_PATH", &path)
            .env("DISK_TEST_GENERATION", (2 * round).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = |line: String| line.strip_prefix("committed ").and_then(|n| n.parse::<u64>().ok());
        // Killed wherever it happens to be after so many.
        let enough = lines.by_ref().map(Result::unwrap).filter_map(said).nth((round * 7 % 20) as usize);
        assert!(enough.is_some(), "the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died counts too.
        let last = lines.map_while(Result::ok).filter_map(said).last().or(enough).unwrap();
        let disk = attach(&path, 2 * round + 1).unwrap();
        let found = number(&disk);
        assert!(
            found >= last && found <= last + 2 && found > newest,
            "{found} is there, {last} was said, {newest} before"
        );
        newest = found;
    }
}
