//! Writer and decoder against each other.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::batch::Head;
use super::method::Method;
use super::record::kind;
use super::writer::{Compression, ShadowBudget};
use super::*;

/// A receiver in memory: RAM, and the stage over it.
struct Receiver {
    ram: Vec<Page>,
    stage: BTreeMap<u64, Page>,
    decoder: Decoder,
}

impl Receiver {
    fn new(pages: usize) -> Self {
        Self { ram: vec![[0xEE; PAGE]; pages], stage: BTreeMap::new(), decoder: Decoder::default() }
    }

    fn take(&mut self, batch: &[u8]) -> Result<(), BatchError> {
        struct Over<'a>(&'a [Page], &'a mut BTreeMap<u64, Page>);
        impl Target for Over<'_> {
            type Error = BatchError;
            fn read(&mut self, index: u64, page: &mut Page) -> Result<(), BatchError> {
                *page = *self.1.get(&index).unwrap_or(&self.0[index as usize]);
                Ok(())
            }
            fn page(&mut self, index: u64, content: &Page, _: PageHash) -> Result<(), BatchError> {
                assert!((index as usize) < self.0.len());
                self.1.insert(index, *content);
                Ok(())
            }
            fn zeros(&mut self, index: u64, count: u64) -> Result<(), BatchError> {
                assert!((index + count) as usize <= self.0.len());
                (index..index + count).for_each(|index| {
                    self.1.insert(index, [0; PAGE]);
                });
                Ok(())
            }
        }
        let pages = self.ram.len() as u64;
        self.decoder.batch(batch, pages, &mut Over(&self.ram, &mut self.stage))
    }

    fn commit(&mut self) -> [u8; 32] {
        for (index, page) in std::mem::take(&mut self.stage) {
            self.ram[index as usize] = page;
        }
        self.decoder.digest().finish()
    }
}

fn config(percent: u8, compression: Compression) -> EncodingConfig {
    EncodingConfig { shadow: ShadowBudget::Percent(percent), compression }
}

fn writer(pages: u64, config: &EncodingConfig) -> BatchWriter {
    let mut writer = BatchWriter::default();
    writer.restart(pages, config, 42);
    writer
}

fn text(from: usize) -> Page {
    std::array::from_fn(|i| b"the quick brown fox jumps over the lazy dog. "[(i + from) % 45])
}

fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE];
    for (i, word) in page.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word =
            (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_mul(i as u64 * 2 + 1).rotate_left(29).to_le_bytes();
    }
    page
}

fn push_all(writer: &mut BatchWriter, pages: &[(u64, Page)]) -> usize {
    let mut digest = EpochDigest::default();
    writer.clear();
    pages.iter().for_each(|(index, page)| writer.push(*index, page, &mut digest));
    writer.seal();
    if writer.is_empty() { 0 } else { writer.bytes().len() }
}

#[test]
fn what_has_not_changed_takes_no_bytes_and_what_has_takes_few() {
    let mut writer = writer(64, &config(100, Compression::Always(Method::Plain)));
    let first: Vec<_> = (0..10).map(|i| (i, noise(i))).collect();
    assert!(push_all(&mut writer, &first) > 10 * PAGE);
    assert_eq!(push_all(&mut writer, &first), 0, "unchanged");
    let mut changed = first.clone();
    changed.iter_mut().for_each(|(_, page)| page[1000] ^= 1);
    let bytes = push_all(&mut writer, &changed);
    assert_eq!(bytes, batch::HEAD + 10 * (8 + 17), "one word in each of ten pages");
    assert_eq!(push_all(&mut writer, &[(20, noise(3))]), batch::HEAD + 16 + PAGE - 8, "no twin: page 3 has changed");
    assert_eq!(push_all(&mut writer, &[(21, noise(3))]), batch::HEAD + 16, "like page 20");
    let zeros: Vec<_> = (0..30).map(|i| (i, [0; PAGE])).collect();
    assert_eq!(push_all(&mut writer, &zeros), batch::HEAD + 12, "a run of zero pages");
    assert_eq!(push_all(&mut writer, &zeros), 0, "still zero");
    let statistics = writer.statistics();
    assert_eq!((statistics.unchanged_pages, statistics.zero_pages, statistics.same_pages), (10, 60, 1));
    assert_eq!((statistics.delta_pages, statistics.raw_pages), (10, 11));
}

#[test]
fn a_page_that_is_mostly_zeros_travels_as_its_words_even_when_nothing_is_known_of_it() {
    let (mut writer, mut receiver) = (BatchWriter::default(), Receiver::new(4));
    let mut page = [0; PAGE];
    page[..64].copy_from_slice(&noise(1)[64..128]);
    assert_eq!(push_all(&mut writer, &[(3, page)]), batch::HEAD + 8 + 8 + 1 + 64);
    receiver.take(writer.bytes()).unwrap();
    assert!(receiver.stage[&3] == page);
}

#[test]
fn text_travels_compressed_when_the_link_asks_for_it() {
    for method in Method::COMPRESSING {
        let mut writer = writer(64, &config(0, Compression::Always(method)));
        let pages: Vec<_> = (0..20).map(|i| (i, text(i as usize))).collect();
        assert!(push_all(&mut writer, &pages) < 20 * PAGE / 10);
        let (head, _) = Head::parse(writer.bytes()).unwrap();
        assert_eq!((head.method, head.pages), (method, 20));
    }
}

#[test]
fn every_sixteenth_unchanged_page_is_looked_at_by_the_receiver() {
    let (mut writer, mut receiver) = (writer(64, &EncodingConfig::default()), Receiver::new(64));
    let pages: Vec<_> = (0..32).map(|i| (i, noise(i))).collect();
    push_all(&mut writer, &pages);
    receiver.take(writer.bytes()).unwrap();
    receiver.commit();
    // Both ends agree while the receiver's pages are what they were...
    for damaged in [false, true] {
        let mut digest = EpochDigest::default();
        writer.clear();
        pages.iter().for_each(|(index, page)| writer.push(*index, page, &mut digest));
        assert_eq!(writer.len(), 2 * record::HEAD);
        if damaged {
            receiver.ram.iter_mut().for_each(|page| page[7] ^= 0x10);
        }
        writer.seal();
        receiver.take(writer.bytes()).unwrap();
        // ...and differ when they are not.
        assert_eq!(digest.finish() == receiver.commit(), !damaged);
    }
}

#[test]
fn a_delta_over_another_base_than_was_meant_shows_in_the_digest() {
    let (mut writer, mut receiver) = (writer(8, &EncodingConfig::default()), Receiver::new(8));
    for (round, fill) in [1, 2, 3].into_iter().enumerate() {
        let mut digest = EpochDigest::default();
        let mut page = noise(9);
        page[64] = fill;
        writer.clear();
        writer.push(5, &page, &mut digest);
        writer.seal();
        if round == 2 {
            assert_eq!(writer.statistics().delta_pages, 1);
            receiver.ram[5][3000] ^= 1;
        }
        receiver.take(writer.bytes()).unwrap();
        assert_eq!(digest.finish() == receiver.commit(), round != 2);
    }
}

#[test]
fn a_page_beyond_ram_and_a_wrong_count_are_refused() {
    let mut writer = BatchWriter::default();
    push_all(&mut writer, &[(8, noise(1))]);
    let range = BatchError::Range { index: 8, count: 1, ram_pages: 8 };
    assert_eq!(Receiver::new(8).take(writer.bytes()), Err(range));
    let mut bytes = writer.bytes().to_vec();
    bytes[4] = 2;
    assert_eq!(Receiver::new(9).take(&bytes), Err(BatchError::Count { announced: 2, found: 1 }));
    bytes[0] = 9;
    assert_eq!(Receiver::new(9).take(&bytes), Err(BatchError::Method(9)));
}

#[test]
fn another_seed_within_an_epoch_is_refused() {
    let mut receiver = Receiver::new(8);
    let batch = |seed| {
        let mut writer = BatchWriter::default();
        writer.restart(8, &EncodingConfig::default(), seed);
        push_all(&mut writer, &[(1, noise(1))]);
        writer.bytes().to_vec()
    };
    receiver.take(&batch(1)).unwrap();
    assert_eq!(receiver.take(&batch(2)), Err(BatchError::Seed));
    receiver.decoder.begin();
    receiver.take(&batch(2)).unwrap();
}

#[test]
fn after_the_receiver_has_forgotten_pages_travel_whole_and_arrive() {
    let (mut writer, mut receiver) = (writer(8, &config(100, Compression::Always(Method::Plain))), Receiver::new(8));
    push_all(&mut writer, &[(1, noise(1)), (2, [0; PAGE])]);
    // (This batch is lost.)
    writer.forget_receiver();
    let mut digest = EpochDigest::default();
    for (index, page) in [(1, noise(1)), (2, [0; PAGE]), (3, noise(1))] {
        writer.push(index, &page, &mut digest);
    }
    writer.seal();
    receiver.take(writer.bytes()).unwrap();
    assert_eq!(digest.finish(), receiver.commit());
    assert!(receiver.ram[1..4] == [noise(1), [0; PAGE], noise(1)]);
}

/// What a guest may do to a page.
#[derive(Debug, Clone)]
enum Write {
    Noise(u64),
    Words(Vec<u16>),
    Zero,
    Same,
    CopyOf(u64),
}

fn some_write() -> impl Strategy<Value = Write> {
    prop_oneof![
        any::<u64>().prop_map(Write::Noise),
        proptest::collection::vec(0u16..512, 1..40).prop_map(Write::Words),
        Just(Write::Zero),
        Just(Write::Same),
        (0u64..16).prop_map(Write::CopyOf),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn after_every_epoch_the_receiver_has_the_senders_ram_and_the_same_digest(
        epochs in proptest::collection::vec(proptest::collection::vec((0u64..16, some_write()), 0..24), 1..12),
        percent in prop_oneof![Just(0u8), Just(25), Just(100)],
        method in prop_oneof![Just(Method::Plain), Just(Method::Lz4), Just(Method::Zstd)],
        restart_at in 0usize..24,
    ) {
        let config = config(percent, Compression::Always(method));
        let (mut ram, mut receiver) = (vec![[0; PAGE]; 16], Receiver::new(16));
        let (mut writer, mut digest) = (BatchWriter::default(), EpochDigest::default());
        for (number, epoch) in epochs.into_iter().enumerate() {
            let first = number == 0 || number == restart_at;
            if first {
                // A first copy, to a receiver that holds anything.
                writer.restart(16, &config, number as u64);
                receiver.ram.fill([number as u8; PAGE]);
                receiver.decoder.begin();
                digest = EpochDigest::default();
                (0u64..).zip(&ram).for_each(|(index, page)| writer.push(index, page, &mut digest));
            }
            for (index, write) in epoch {
                match write {
                    Write::Noise(seed) => ram[index as usize] = noise(seed),
                    Write::Words(words) => for word in words {
                        ram[index as usize][usize::from(word) * 8 + 3] ^= 0x55;
                    },
                    Write::Zero => ram[index as usize] = [0; PAGE],
                    Write::Same => {}
                    Write::CopyOf(other) => ram[index as usize] = ram[other as usize],
                }
                // (The same page may come again in one epoch.)
                writer.push(index, &ram[index as usize], &mut digest);
                if writer.len() > 30_000 {
                    writer.seal();
                    receiver.take(writer.bytes()).unwrap();
                    writer.clear();
                }
            }
            if !writer.is_empty() {
                writer.seal();
                receiver.take(writer.bytes()).unwrap();
            }
            writer.clear();
            prop_assert_eq!(digest.pages(), receiver.decoder.digest().pages());
            prop_assert_eq!(digest.finish(), receiver.commit());
            prop_assert!(ram == receiver.ram);
        }
    }

    #[test]
    fn any_bytes_are_refused_or_decoded_within_ram_but_never_panic(
        method in 0u8..4, pages in 0u32..4, plain_len in 0u32..8000,
        records in proptest::collection::vec((0u8..8, 0u64..80, proptest::collection::vec(any::<u8>(), 0..40)), 0..5),
        pad in 0usize..2,
    ) {
        let mut body = Vec::new();
        for (kind, index, bytes) in records {
            body.extend_from_slice(&record::head(kind, index));
            body.extend_from_slice(&bytes);
            body.resize(body.len() + pad * 4096, 7);
        }
        let mut batch = vec![method, 0, 0, 0];
        batch.extend_from_slice(&pages.to_le_bytes());
        batch.extend_from_slice(&(if method == 0 { body.len() as u32 } else { plain_len }).to_le_bytes());
        batch.resize(batch::HEAD, 0);
        batch.extend_from_slice(&body);
        let _ = Receiver::new(64).take(&batch);
        let _ = Receiver::new(64).take(&body);
    }

    #[test]
    fn a_batch_that_was_damaged_is_refused_or_gives_another_digest(
        at in 0usize..1_000_000, bit in 0u8..8, method in prop_oneof![Just(Method::Plain), Just(Method::Lz4), Just(Method::Zstd)],
    ) {
        let mut writer = writer(64, &config(100, Compression::Always(method)));
        let mut receiver = Receiver::new(64);
        let pages: Vec<_> = (0..4).map(|i| (i, text(i as usize))).collect();
        push_all(&mut writer, &pages);
        receiver.take(writer.bytes()).unwrap();
        receiver.commit();
        let mut digest = EpochDigest::default();
        writer.clear();
        let (mut word, mut line) = (text(0), text(1));
        word[100] = 0;
        line[512..1024].fill(3);
        for (index, page) in [(0, word), (1, line), (5, word), (6, [0; PAGE]), (7, noise(7))] {
            writer.push(index, &page, &mut digest);
        }
        writer.seal();
        let mut bytes = writer.bytes().to_vec();
        // (The three unused bytes and the unused word of the head mean nothing.)
        let at = at % bytes.len();
        prop_assume!(!matches!(at, 1..4 | 12..16));
        bytes[at] ^= 1 << bit;
        if receiver.take(&bytes).is_ok() {
            prop_assert_ne!(digest.finish(), receiver.commit());
        }
    }
}

#[test]
fn the_kinds_of_records_have_the_numbers_that_are_documented() {
    assert_eq!([kind::RAW, kind::ZERO, kind::DELTA, kind::SAME, kind::CHECK, kind::SPARSE], [0, 2, 3, 4, 5, 6]);
}
