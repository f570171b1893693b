//! `disk`: what a crash, another node or a failing storage left beside a disk.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use understudy_disk::block::scsi;
use understudy_disk::mirror::{Content, Copy, CopyOptions, Item, LogPiece, PeerState, Range, SliceLabel, bitmap};
use understudy_disk::record::{Digest, Kind, RECORD, Record, SliceId, Standing, scan};
use understudy_disk::reservation;
use understudy_disk::slice::SliceName;
use understudy_disk::store::{Directory, Lock, LogFile};
use understudy_disk::{Block, Disk, Format, Identity, Limits, Memory, Merged, Options, Ownership, Result, Tag};
use understudy_protocol::disk::DiskSpec;
use understudy_protocol::ids::{Epoch, Generation};
use understudy_protocol::iscsi::Url;

use crate::input::Input;

/// A file in memory.
#[derive(Default)]
struct File(Mutex<Vec<u8>>);

impl File {
    fn with<R>(&self, work: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl LogFile for File {
    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<usize> {
        self.with(|bytes| {
            let from = bytes.get(at as usize..).unwrap_or_default();
            let n = from.len().min(to.len());
            to[..n].copy_from_slice(&from[..n]);
            Ok(n)
        })
    }
    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.with(|bytes| {
            let end = at as usize + from.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at as usize..end].copy_from_slice(from);
            Ok(())
        })
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn size(&self) -> io::Result<u64> {
        self.with(|bytes| Ok(bytes.len() as u64))
    }
    fn truncate(&self, len: u64) -> io::Result<()> {
        self.with(|bytes| bytes.truncate(len as usize));
        Ok(())
    }
}

/// A directory in memory, whose locks are always free.
#[derive(Default)]
struct Dir(Mutex<BTreeMap<String, Arc<File>>>);

struct Free;

impl Lock for Free {}

impl Dir {
    fn with<R>(&self, work: impl FnOnce(&mut BTreeMap<String, Arc<File>>) -> R) -> R {
        work(&mut self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Directory for Dir {
    fn name(&self) -> String {
        "slices".into()
    }
    fn create(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        self.with(|files| match files.contains_key(name) {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            false => Ok(files.entry(name.into()).or_default().clone() as Arc<dyn LogFile>),
        })
    }
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        self.with(|files| Ok(files.get(name).ok_or(io::ErrorKind::NotFound)?.clone() as Arc<dyn LogFile>))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.with(|files| {
            let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
            files.insert(to.into(), file);
            Ok(())
        })
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.with(|files| files.remove(name).map(|_| ()).ok_or(io::ErrorKind::NotFound.into()))
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.with(|files| Ok(files.keys().cloned().collect()))
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn lock(&self, _: &str, _: Duration) -> io::Result<Option<Box<dyn Lock>>> {
        Ok(Some(Box::new(Free)))
    }
}

/// A base in memory.
struct Base(Mutex<Vec<u8>>);

const SECTORS: u64 = 32;

impl Block for Base {
    fn name(&self) -> &str {
        "base"
    }
    fn size(&self) -> u64 {
        SECTORS * 512
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, at: u64, to: &mut [u8]) -> Result<()> {
        let bytes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        to.copy_from_slice(&bytes[at as usize..at as usize + to.len()]);
        Ok(())
    }
    fn write_at(&self, at: u64, from: &[u8]) -> Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        bytes[at as usize..at as usize + from.len()].copy_from_slice(from);
        Ok(())
    }
    fn write_zeroes(&self, at: u64, len: u64, _: bool) -> Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn resize(&self, _: u64) -> Result<()> {
        Ok(())
    }
    fn take_charge(&self) -> Result<()> {
        Ok(())
    }
}

/// A log with right checksums, as the input says: requests, then perhaps a seal, then perhaps a commit mark.
fn log(id: SliceId, input: &mut Input<'_>) -> (Vec<u8>, Digest, Vec<Record>) {
    let (mut bytes, mut digest, mut records) = (Vec::new(), Digest::default(), Vec::new());
    let shape = input.byte();
    let record = |kind, sector, sectors, number, crc| Record { kind, slice: id, sector, sectors, number, crc };
    for _ in 0..shape % 8 {
        let (kind, sector) = (input.byte(), input.odd_number() % (1 << 54));
        let (kind, sectors) = match kind % 4 {
            0 => (Kind::Zero, input.odd_number() as u32 | 1),
            1 => (Kind::Discard, input.odd_number() as u32 | 1),
            _ => (Kind::Data, u32::from(input.byte() % 4) + 1),
        };
        let data = if kind == Kind::Data { vec![input.byte(); sectors as usize * 512] } else { Vec::new() };
        let crc = if kind == Kind::Data { crc32fast::hash(&data) } else { 0 };
        let one = record(kind, sector, sectors, digest.records(), crc);
        let head = one.encode();
        digest.add(&head);
        bytes.extend(head);
        bytes.extend(data);
        records.push(one);
    }
    for (bit, kind) in [(0x80, Kind::Seal), (0x40, Kind::Commit)] {
        if shape & bit != 0 {
            bytes.extend(record(kind, 0, 0, digest.records(), digest.finish()).encode());
        }
    }
    (bytes, digest, records)
}

const ID: SliceId = SliceId { disk: 1, generation: Generation(2), epoch: Epoch(3), serial: 4 };

/// Any bytes as a slice; then a slice with right checksums in which something may be changed.
pub fn slice(bytes: &[u8]) {
    let file = File(Mutex::new(bytes.to_vec()));
    // Memory is never refused.
    let found = scan(&file, ID).expect("a file in memory");
    assert!(found.end <= bytes.len() as u64 && found.records.len() as u32 == found.digest.records());

    let mut input = Input::new(bytes);
    let (mut made, digest, records) = log(ID, &mut input);
    let sealed = made.len() >= RECORD
        && Record::decode(made[made.len() - RECORD..].try_into().expect("a record's length"))
            .is_ok_and(|r| matches!(r.kind, Kind::Seal | Kind::Commit));
    let changed = match input.byte() {
        0 => None,
        flip => made.get(input.number() as usize % made.len().max(1)).map(|_| flip),
    };
    if let Some(flip) = changed {
        let at = input.number() as usize % made.len().max(1);
        made[at] ^= flip;
    }
    let found = scan(&File(Mutex::new(made)), ID).expect("a file in memory");
    if matches!(found.standing, Standing::Sealed | Standing::Committed) {
        // Whatever was changed, what counts is what was written.
        assert!(sealed && found.digest.finish() == digest.finish());
        assert!(found.records.iter().map(|(record, _)| *record).eq(records));
    } else if changed.is_none() && sealed && digest.records() > 0 {
        // A commit mark without a seal is no slice that anybody writes.
        assert!(!matches!(found.standing, Standing::Open { .. }) || bytes[0] & 0x80 == 0);
    }
}

/// The record of ownership, as it is and with a right checksum; file names.
pub fn owner(bytes: &[u8]) {
    let mut line = bytes.to_vec();
    line.retain(|b| *b != b'\n');
    line.push(b'\n');
    let crc = format!("{:08x}\n", crc32fast::hash(&line));
    line.extend(crc.into_bytes());
    for bytes in [bytes, &line] {
        if let Ok(record) = Ownership::decode(bytes) {
            assert_eq!(Ownership::decode(&record.encode()), Ok(record));
        }
    }
    let name = String::from_utf8_lossy(bytes);
    if let Some(name) = SliceName::parse(&name) {
        assert_eq!(SliceName::parse(&name.to_string()), Some(name));
    }
}

fn open(base: &Arc<Base>, dir: &Arc<Dir>, generation: u64, memory: Memory) -> Result<Disk> {
    Disk::open(Options {
        base: base.clone(),
        format: Format::Raw,
        directory: dir.clone(),
        identity: Identity { machine: "m".into(), node: "n".into(), generation: Generation(generation) },
        memory,
        limits: Limits::default(),
    })
}

fn content(disk: &Disk) -> Result<Vec<u8>> {
    let mut bytes = vec![0; SECTORS as usize * 512];
    disk.read_at(0, &mut bytes).map(|()| bytes)
}

/// A directory in which anything may lie. A takeover opens it or refuses; what was opened is the same after a second takeover and after it was
/// merged.
pub fn takeover(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (base, dir) = (Arc::new(Base(Mutex::new(vec![0; SECTORS as usize * 512]))), Arc::new(Dir::default()));
    let me = Identity { machine: "m".into(), node: "n".into(), generation: Generation(2) };
    let mut owner = Ownership::fresh(1, &me, "base", Format::Raw, SECTORS * 512);
    let choices = input.byte();
    owner.newest.serial = u64::from(choices & 3);
    owner.direct = choices & 4 != 0;
    let mut tag = owner.newest;
    for _ in 0..(choices >> 3) % 6 {
        let which = input.byte();
        let id = SliceId {
            disk: 1,
            generation: Generation(u64::from(1 + which % 2)),
            epoch: Epoch(u64::from(input.byte() % 8)),
            serial: tag.serial + u64::from(which >> 1 & 3 != 3),
        };
        let name = SliceName {
            serial: id.serial,
            generation: id.generation,
            epoch: id.epoch,
            owner: Generation(if which & 0x10 == 0 { 2 } else { 1 }),
        };
        if which & 0x20 != 0 {
            owner.accepted.push(name.to_string());
        }
        let (mut log, digest, _) = log(id, &mut input);
        if which & 0x80 != 0 && !log.is_empty() {
            let at = input.number() as usize % log.len();
            log[at] ^= input.byte();
        }
        tag = if which & 0x40 != 0 { Tag { records: 0, ..digest.tag(id) } } else { digest.tag(id) };
        dir.with(|files| files.insert(name.to_string(), Arc::new(File(Mutex::new(log)))));
    }
    dir.with(|files| files.insert("owner".into(), Arc::new(File(Mutex::new(owner.encode())))));
    let memory = if input.byte() & 1 == 0 { Memory::None } else { Memory::Image(tag) };
    let Ok(disk) = open(&base, &dir, 3, memory) else { return };
    let Ok(before) = content(&disk) else { return };
    drop(disk);
    let disk = open(&base, &dir, 4, Memory::None).expect("what was opened once is whole");
    assert!(content(&disk).is_ok_and(|again| again == before), "a second takeover finds something else");
    // Records for sectors that this base does not have end it; what was merged before them stays readable.
    while matches!(disk.merge(), Ok(Merged::Slices { .. })) {}
    assert!(content(&disk).is_ok_and(|again| again == before), "it is something else after it was merged");
}

/// Seeds: a log, whole and committed.
pub fn sample() -> Vec<u8> {
    let (bytes, ..) = log(ID, &mut Input::new(&[0xc3, 2, 1, 1, 7, 0, 9, 3, 2, 4, 0, 5]));
    bytes
}

/// Answers of SCSI targets; addresses and descriptions of disks, which are written as they are read.
pub fn storage(bytes: &[u8]) {
    if let Ok(keys) = reservation::parse_keys(bytes) {
        assert!(keys.len() * 8 + 8 <= bytes.len());
    }
    let _ = reservation::parse_held(bytes);
    if let Some(capacity) = scsi::parse_capacity(bytes) {
        assert!(capacity.blocks.checked_mul(capacity.block.into()).is_some());
    }
    let _ = scsi::parse_block_limits(bytes);
    let text = String::from_utf8_lossy(bytes);
    if let Ok(url) = text.parse::<Url>() {
        assert_eq!(url.to_string().parse(), Ok(url));
    }
    if let Ok(disk) = text.parse::<DiskSpec>() {
        assert_eq!(disk.to_string().parse(), Ok(disk));
    }
}

fn copy(dir: &Arc<Dir>) -> Result<Copy> {
    Copy::open(CopyOptions {
        base: Arc::new(Base(Mutex::new(vec![0; SECTORS as usize * 512]))),
        format: Format::Raw,
        directory: dir.clone(),
        machine: "m".into(),
        node: "b".into(),
        limits: Limits::default(),
    })
}

/// What the other node of a mirrored disk says: its state to the primary, and everything that a primary sends to a copy.
pub fn mirror(bytes: &[u8]) {
    let _ = bitmap::summary(bytes, 7);
    let me = Identity { machine: "m".into(), node: "a".into(), generation: Generation(3) };
    let base = Arc::new(Base(Mutex::new(vec![1; SECTORS as usize * 512])));
    let options = Options {
        base,
        format: Format::Raw,
        directory: Arc::new(Dir::default()),
        identity: me,
        memory: Memory::None,
        limits: Limits::default(),
    };
    let Ok(primary) = Disk::open_mirrored(options).map(Arc::new) else { panic!("nothing stands against opening it") };
    let mut input = Input::new(bytes);
    let at = input.number() as usize % bytes.len().max(1);
    if let Ok(peer) = serde_json::from_slice::<PeerState>(&bytes[at.min(bytes.len())..]) {
        let plan = primary.plan(&peer);
        assert!(plan.is_ok());
        if let Ok((mut sync, _)) = primary.sync(&peer) {
            let _ = sync.next(4096);
            let _ = sync.acknowledge(input.number(), &[Range { at: input.odd_number(), len: input.odd_number() }]);
        }
    }
    // A copy in step to which something is sent.
    let dir = Arc::new(Dir::default());
    let Ok(copy) = copy(&dir) else { panic!("nothing stands against opening it") };
    let Ok(state) = copy.state() else { panic!("it is empty") };
    let Ok((mut sync, mut begin)) = primary.sync(&state) else { return };
    if input.byte() == 1 {
        begin.size = input.odd_number();
        begin.generation = Generation(input.number());
        begin.keep =
            Some(Tag { serial: input.number(), generation: Generation(1), epoch: Epoch(1), records: 0, digest: 0 });
    }
    if copy.begin(&begin).is_err() {
        return;
    }
    for _ in 0..3 {
        let content = match input.byte() % 4 {
            0 => Content::Zero,
            1 => Content::Hash([input.byte(); 32]),
            _ => Content::Data(vec![input.byte(); usize::from(input.byte()) * 16]),
        };
        let _ = copy.apply(&Item { number: 1, at: input.odd_number(), len: input.odd_number(), content });
    }
    let Ok(Some(tag)) = primary.protect(Epoch(1)).and_then(|()| {
        sync.hold()?;
        Ok(Some(Tag { serial: 5, generation: Generation(3), epoch: Epoch(0), records: 0, digest: 0 }))
    }) else {
        return;
    };
    if copy.into_step(tag).is_err() {
        return;
    }
    let id = SliceId { disk: begin.disk, generation: Generation(3), epoch: Epoch(1), serial: 6 };
    let (log, digest, _) = log(id, &mut input);
    let closed = digest.tag(id);
    let label = SliceLabel { serial: 6, generation: Generation(3), epoch: Epoch(1) };
    let cut = input.number() as usize % (log.len() + 1);
    let mut pieces = vec![(0, log[..cut].to_vec(), None), (cut as u64, log[cut..].to_vec(), Some(closed))];
    if input.byte() == 1
        && let Some(byte) = pieces[0].1.first_mut()
    {
        *byte ^= input.byte();
    }
    for (offset, bytes, closed) in pieces {
        if copy.append(&LogPiece { slice: label, offset, bytes, closed }).is_err() {
            copy.abandon();
            break;
        }
    }
    if copy.seal(closed).is_ok() {
        assert!(copy.commit(closed).is_ok());
        let _ = copy.merge();
    }
    let _ = copy.state();
}
