//! `replicator`: messages, batches of pages, device state, the receiver, what is on its disk.

use std::collections::BTreeMap;
use std::fs;

use understudy_protocol::ids::{Epoch, Generation};
use understudy_replicator::codec::batch::{BatchError, Head};
use understudy_replicator::codec::method::Method;
use understudy_replicator::codec::{Decoder, PAGE, Page, PageHash, Target, state as device_state};
use understudy_replicator::durable::{self, Durable, Pending, RamIdentity, Record};
use understudy_replicator::message::{Envelope, Message};
use understudy_replicator::receiver::{LocalVmm, Receiver, Standing, Step, Surroundings};
use understudy_replicator::stage::Stage;

use super::with_dir;
use crate::input::Input;

/// Any payload of any kind; what is understood reads back the same.
pub fn message(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (kind, payload) = (input.byte(), input.rest());
    if let Ok(message) = Message::parse(kind, payload) {
        assert_eq!(message.kind(), kind);
        let again = message.payload().into_owned();
        // NaN or not, the bytes of the second writing are what counts.
        let back = Message::parse(kind, &again).map(|m| m.payload().into_owned());
        assert_eq!(back, Ok(again), "{message:?}");
    }
}

/// RAM of [`PAGES`] pages that only remembers what was written.
#[derive(Default)]
struct Memory(BTreeMap<u64, Box<Page>>);

const PAGES: u64 = 64;

impl Target for Memory {
    type Error = BatchError;
    fn read(&mut self, index: u64, page: &mut Page) -> Result<(), BatchError> {
        assert!(index < PAGES, "page {index} is read");
        match self.0.get(&index) {
            Some(content) => page.copy_from_slice(&content[..]),
            None => page.fill(0),
        }
        Ok(())
    }
    fn page(&mut self, index: u64, page: &Page, _: PageHash) -> Result<(), BatchError> {
        assert!(index < PAGES, "page {index} is written");
        self.0.insert(index, Box::new(*page));
        Ok(())
    }
    fn zeros(&mut self, index: u64, count: u64) -> Result<(), BatchError> {
        assert!(index.checked_add(count).is_some_and(|end| end <= PAGES), "{count} pages from {index} are cleared");
        for page in index..index + count {
            self.0.remove(&page);
        }
        Ok(())
    }
}

/// A batch as it is, then its body under a head that fits it.
pub fn batch(bytes: &[u8]) {
    let mut memory = Memory::default();
    let mut decoder = Decoder::default();
    decoder.begin();
    let _ = decoder.batch(bytes, PAGES, &mut memory);

    let mut input = Input::new(bytes);
    let pages = u32::from(input.byte());
    let body = input.rest();
    let head = Head { method: Method::Plain, pages, plain_len: body.len() as u32, seed: 1 };
    let mut sealed = head.encode().to_vec();
    sealed.extend_from_slice(body);
    decoder.begin();
    let _ = decoder.batch(&sealed, PAGES, &mut memory);
    let _ = decoder.digest().finish();
}

/// An encoded device state, with and without the one that it refers to.
pub fn state(bytes: &[u8]) {
    let base: Vec<u8> = (0..3000u32).map(|i| (i * 7) as u8).collect();
    for base in [None, Some((Epoch(1), &base[..]))] {
        if let Ok(state) = device_state::decode(bytes, base) {
            assert!(state.len() <= device_state::STATE_LIMIT);
        }
    }
}

const RAM: RamIdentity = RamIdentity { dev: 1, ino: 2, bytes: PAGES * PAGE as u64 };

/// A sender that says anything. An acknowledgement stands only behind its commit; generations never go back; what is called whole
/// was committed.
pub fn receiver(bytes: &[u8]) {
    let mut steps = Vec::new();
    let mut receiver = Receiver::recover("m", "n2", Durable::default(), Some(RAM), &mut steps);
    let mut input = Input::new(bytes);
    let mut committed = Epoch::ZERO;
    while !input.is_empty() {
        let floor = receiver.durable().newest();
        steps.clear();
        let conn = u64::from(input.byte() % 3);
        let around = || Surroundings { vmm: LocalVmm::Standby(None), ram: Some(RAM) };
        match input.byte() {
            250 => receiver.lost(conn, &mut steps),
            251 => receiver.reported(Standing::UpToDate, &mut steps),
            252 => {
                let generation = Generation(u64::from(input.byte()));
                let _ = receiver.take_over(generation, around(), &mut steps);
            }
            253 => receiver.note_generation(Generation(u64::from(input.byte())), &mut steps),
            254 => receiver.compared(conn, Epoch(u64::from(input.byte())), vec![1, 2], &mut steps),
            kind => {
                let (generation, epoch) = (Generation(u64::from(input.byte())), Epoch(u64::from(input.byte())));
                let payload = input.piece();
                let Ok(message) = Message::parse(kind, payload) else { continue };
                receiver.message(conn, &Envelope { generation, epoch, message }, around, &mut steps);
            }
        }
        for step in &steps {
            match step {
                Step::Commit(record) => committed = record.epoch,
                Step::Send(_, _, epoch, Message::Ack) => assert_eq!(*epoch, committed, "acknowledged, not committed"),
                _ => {}
            }
        }
        assert!(receiver.durable().newest() >= floor, "the floor of generations went back");
    }
}

/// A record as it is on the disk, then with a right checksum.
pub fn durable(bytes: &[u8]) {
    with_dir(|dir| {
        let file = dir.join("record");
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let mut sealed = line.to_vec();
        sealed.extend_from_slice(format!("\n{:08x}\n", crc32fast::hash(line)).as_bytes());
        for content in [bytes, &sealed] {
            if fs::write(&file, content).is_err() {
                return;
            }
            if let Ok(Some(record)) = durable::load::<Record>(&file) {
                let durable = Durable { floor: Generation(1), record };
                let mut steps = Vec::new();
                let receiver = Receiver::recover("m", "n2", durable, Some(RAM), &mut steps);
                let _ = receiver.standing();
            }
            let _ = durable::load::<Generation>(&file);
        }
    });
}

/// The stage's index, with a record that vouches for it, over a stage of a few pages.
pub fn stage(bytes: &[u8]) {
    with_dir(|dir| {
        let stage = dir.join("stage");
        let there = fs::metadata(&stage).map_or(0, |m| m.len());
        if there == 0 && fs::write(&stage, vec![0; 1024 * PAGE]).is_err()
            || fs::write(dir.join("stage.index"), bytes).is_err()
        {
            return;
        }
        let Ok(mut stage) = Stage::open(dir) else { return };
        let pending = Pending { stage_len: bytes.len() as u64, stage_crc: crc32fast::hash(bytes) };
        if stage.load(pending, PAGES).is_ok() {
            for page in 0..PAGES + 1 {
                let _ = stage.page(page);
            }
        }
    });
}
