//! The disk, driven as a guest drives it: the owner of its requests is the test.

use vm_memory::{Bytes, GuestAddress};

use super::super::block::{Block, Kind, OUT_MAX, Outcome, Range, Request};
use super::*;

/// FLUSH, MQ, DISCARD, WRITE_ZEROES.
const FEATURES: u64 = VERSION_1 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14;
const SECTORS: u64 = 2048;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x4800;
/// What no device writes.
const UNTOUCHED: u8 = 0x77;

fn device(read_only: bool) -> Block {
    Block::new(2, read_only, "vda")
}

fn disk() -> Guest<Block> {
    ready(device(false), FEATURES)
}

fn ready(device: Block, features: u64) -> Guest<Block> {
    let mut guest = Guest::ready(device, features);
    guest.enable_msix();
    guest.device().set_sectors(SECTORS);
    guest.msi_data();
    guest
}

impl Guest<Block> {
    /// Put a request into a ring, its header and status at places of its own.
    fn ask(&mut self, q: u16, number: u64, what: u32, sector: u64, data: &[(u64, u32, bool)]) {
        let (header, status) = (HEADER + 16 * number, STATUS + number);
        self.ram.write_obj(u64::from(what), GuestAddress(header)).unwrap();
        self.ram.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.ram.write_obj(UNTOUCHED, GuestAddress(status)).unwrap();
        let mut buffers = vec![(header, 16, false)];
        buffers.extend(data);
        buffers.push((status, 1, true));
        self.add(q, &buffers);
        self.kick(q);
    }

    fn requests(&mut self) -> Vec<Request> {
        self.with(|d, ctx| d.take_requests(ctx))
    }

    fn complete(&mut self, id: u64, outcome: Outcome) {
        self.with(|d, ctx| d.complete(vec![(id, outcome)], ctx));
    }

    fn status_of(&self, number: u64) -> u8 {
        self.bytes(STATUS + number, 1)[0]
    }

    /// Ask, and have the status at once.
    fn refused(&mut self, what: u32, sector: u64, data: &[(u64, u32, bool)]) -> u8 {
        self.ask(0, 0, what, sector, data);
        assert_eq!(self.requests(), [], "{what} at {sector}");
        self.status_of(0)
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn the_configuration_says_how_large_it_is_and_what_may_be_asked() {
    let mut guest = disk();
    assert_eq!(guest.config_read(0x00), 0x1042_1af4);
    assert_eq!(guest.config_read(0x08) >> 8, 0x01_80_00);
    let config: [u8; 60] = guest.read(0x2000);
    let word = |at: usize| u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]]);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
    assert_eq!((word(8), word(12), word(20)), (65536, 126, 512), "size_max, seg_max, blk_size");
    assert_eq!((config[24], config[34], config[56]), (3, 2, 1), "4 KiB below, two queues, zeroes may unmap");
    assert_eq!((word(36), word(40), word(44), word(48), word(52)), (1 << 22, 16, 8, 1 << 22, 16));
    assert_eq!(guest.read::<2>(0x2000 + 4094), [0, 0]);
    guest.write(0x00, &0u32.to_le_bytes());
    assert_eq!(u32::from_le_bytes(guest.read(0x04)) & 0xffff, 0b0111_0110_0100_0110);
    let mut guest = Guest::new(device(true));
    guest.write(0x00, &0u32.to_le_bytes());
    assert_eq!(u32::from_le_bytes(guest.read(0x04)) & 0xffff, 0b0001_0110_0110_0110, "read-only, no discard");
}

#[test]
fn a_read_comes_out_and_nothing_is_written_before_it_is_completed() {
    let mut guest = disk();
    guest.ask(1, 3, 0, 7, &[(DATA, 1000, true), (0x6000, 24, true)]);
    assert_eq!(guest.requests(), [Request { id: 0, kind: Kind::Read { at: 7 * 512, len: 1024 } }]);
    assert_eq!(guest.requests(), [], "once");
    assert_eq!((guest.used(1).0, guest.status_of(3), guest.device().out()), (0, UNTOUCHED, 1));
    guest.clean();
    let content: Vec<u8> = (0..1024u32).map(|i| (i / 4) as u8).collect();
    guest.complete(0, Outcome::Done(content.clone()));
    assert_eq!([guest.bytes(DATA, 1000), guest.bytes(0x6000, 24)].concat(), content);
    assert_eq!((guest.used(1), guest.status_of(3)), ((1, (0, 1025)), 0));
    assert_eq!(guest.msi_data(), [0x42], "the second queue's vector");
    assert!(guest.dirty(DATA) && guest.dirty(0x6000) && guest.dirty(STATUS) && guest.dirty(ring(1).2));
    assert_eq!(guest.device().out(), 0);
}

#[test]
fn a_write_says_where_its_data_stands_and_is_durable_only_for_drivers_without_flush() {
    for (features, durable) in [(FEATURES, false), (VERSION_1, true)] {
        let mut guest = ready(device(false), features);
        guest.ask(0, 0, 1, SECTORS - 2, &[(DATA, 1, false), (0x6000, 1023, false)]);
        let from = vec![(DATA, 1), (0x6000, 1023)];
        let kind = Kind::Write { at: (SECTORS - 2) * 512, from, durable };
        assert_eq!(guest.requests(), [Request { id: 0, kind }]);
        guest.complete(0, Outcome::Done(Vec::new()));
        assert_eq!((guest.used(0), guest.status_of(0)), ((1, (0, 1)), 0));
    }
}

#[test]
fn requests_are_completed_in_any_order_and_failures_are_told() {
    let mut guest = disk();
    guest.ask(0, 0, 4, 0, &[]);
    guest.ask(0, 1, 0, 0, &[(DATA, 512, true)]);
    assert_eq!(guest.requests().iter().map(|r| r.id).collect::<Vec<_>>(), [0, 1]);
    guest.complete(1, Outcome::Failed);
    assert_eq!((guest.status_of(0), guest.status_of(1)), (UNTOUCHED, 1));
    guest.complete(0, Outcome::Done(Vec::new()));
    assert_eq!((guest.status_of(0), guest.used(0).0), (0, 2));
    guest.ask(0, 2, 0, 0, &[(DATA, 512, true)]);
    guest.complete(2, Outcome::Done(vec![0; 511]));
    assert_eq!(guest.status_of(2), 1, "a read that did not bring all is none");
    guest.complete(2, Outcome::Done(vec![0; 512]));
    assert_eq!(guest.used(0).0, 3, "twice is once");
}

#[test]
fn its_id_is_told_at_once() {
    let mut guest = disk();
    assert_eq!(guest.refused(8, 0, &[(DATA, 20, true)]), 0);
    assert_eq!(guest.bytes(DATA, 20), b"vda\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.refused(8, 0, &[(DATA, 19, true)]), 1);
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let mut guest = disk();
    let two = [range(8, 16, 0), range(2040, 8, 0)].concat();
    guest.ram.write_slice(&two, GuestAddress(DATA)).unwrap();
    guest.ask(0, 0, 11, 0, &[(DATA, 20, false), (DATA + 20, 12, false)]);
    let whole = |unmap| [Range { sector: 8, sectors: 16, unmap }, Range { sector: 2040, sectors: 8, unmap }].to_vec();
    assert_eq!(guest.requests()[0].kind, Kind::Discard(whole(true)));
    guest.ask(0, 1, 13, 0, &[(DATA, 32, false)]);
    assert_eq!(guest.requests()[0].kind, Kind::WriteZeroes(whole(false)));
    guest.ram.write_slice(&range(0, 8, 1), GuestAddress(DATA)).unwrap();
    guest.ask(0, 2, 13, 0, &[(DATA, 16, false)]);
    let unmapped = Kind::WriteZeroes(vec![Range { sector: 0, sectors: 8, unmap: true }]);
    assert_eq!(guest.requests()[0].kind, unmapped);
}

#[test]
fn what_no_disk_could_do_is_refused_at_once() {
    let mut guest = disk();
    for (what, sector, data, status) in [
        (0, SECTORS, &[(DATA, 512, true)][..], 1),
        (0, SECTORS - 1, &[(DATA, 1024, true)], 1),
        (0, u64::MAX, &[(DATA, 512, true)], 1),
        (0, u64::MAX / 512, &[(DATA, 512, true)], 1),
        (0, 0, &[(DATA, 511, true)], 1),
        (1, SECTORS, &[(DATA, 512, false)], 1),
        (1, 0, &[(DATA, 100, false)], 1),
        (11, 0, &[], 1),
        (11, 0, &[(DATA, 15, false)], 1),
        (11, 0, &[(DATA, 17 * 16, false)], 1),
        (14, 0, &[(DATA, 16, false)], 2),
        (2, 0, &[], 2),
        (u32::MAX, 0, &[], 2),
        (0, 0, &[], 0),
        (1, SECTORS, &[], 0),
    ] {
        assert_eq!(guest.refused(what, sector, data), status, "{what} at {sector} {data:?}");
    }
    for (range, what, status) in [
        (range(SECTORS, 1, 0), 11, 1),
        (range(u64::MAX, 8, 0), 13, 1),
        (range(0, u32::MAX, 0), 13, 1),
        (range(0, 8, 1), 11, 2),
        (range(0, 8, 2), 13, 2),
    ] {
        guest.ram.write_slice(&range, GuestAddress(DATA)).unwrap();
        assert_eq!(guest.refused(what, 0, &[(DATA, 16, false)]), status, "{what} {range:?}");
    }
    assert!(!guest.broken());
}

#[test]
fn a_read_only_disk_is_only_read() {
    let mut guest = ready(device(true), VERSION_1 | 1 << 5);
    assert_eq!(guest.refused(1, 0, &[(DATA, 512, false)]), 1);
    guest.ram.write_slice(&range(0, 8, 0), GuestAddress(DATA)).unwrap();
    assert_eq!(guest.refused(11, 0, &[(DATA, 16, false)]), 1);
    assert_eq!(guest.refused(13, 0, &[(DATA, 16, false)]), 1);
    guest.ask(0, 0, 0, 0, &[(DATA, 512, true)]);
    assert_eq!(guest.requests().len(), 1);
}

#[test]
fn requests_that_are_none_need_a_reset() {
    type Offence = fn(&mut Guest<Block>);
    let offences: [(&str, Offence); 4] = [
        ("no header", |g| _ = g.add(0, &[(HEADER, 15, false), (STATUS, 1, true)])),
        ("no status", |g| _ = g.add(0, &[(HEADER, 16, false)])),
        ("nothing", |g| _ = g.add(0, &[(HEADER, 0, false)])),
        ("more than the queue holds", |g| {
            for _ in 0..=SIZE {
                g.ram.write_obj(4u64, GuestAddress(HEADER)).unwrap();
                g.put_descriptor(ring(0).0, 0, HEADER, 16, 1, 1);
                g.put_descriptor(ring(0).0, 1, STATUS, 1, 2, 0);
                g.offer(0, 0);
                g.kick(0);
            }
        }),
    ];
    for (what, commit) in offences {
        let mut guest = disk();
        commit(&mut guest);
        guest.kick(0);
        assert!(guest.broken(), "{what}");
        guest.write(0x14, &[0]);
        assert_eq!((guest.status(), guest.device().out()), (0, 0), "{what}: a reset helps");
    }
}

#[test]
fn a_reset_forgets_requests_and_late_outcomes_write_nothing() {
    let mut guest = disk();
    guest.ask(0, 0, 0, 0, &[(DATA, 512, true)]);
    let [request] = &guest.requests()[..] else { panic!() };
    let (id, life) = (request.id, guest.device().life());
    guest.ask(0, 1, 4, 0, &[]);
    guest.write(0x14, &[0]);
    assert_ne!(guest.device().life(), life);
    assert_eq!(guest.requests(), [], "not taken, and forgotten");
    guest.complete(id, Outcome::Done(vec![1; 512]));
    assert_eq!((guest.bytes(DATA, 512), guest.status_of(0)), (vec![0; 512], UNTOUCHED));
}

#[test]
fn what_is_out_comes_out_again_after_a_restore() {
    let mut guest = disk();
    guest.ask(1, 0, 1, 5, &[(DATA, 512, false)]);
    guest.ask(0, 1, 0, 6, &[(0x6000, 512, true)]);
    guest.ask(0, 2, 4, 0, &[]);
    let before = guest.requests();
    guest.complete(before[2].id, Outcome::Done(Vec::new()));
    let saved = guest.bus.save_payloads();

    let mut other = Guest::new(device(false));
    other.bus.restore_payloads(&mut Payloads::new(saved.clone()).unwrap()).unwrap();
    other.ram = guest.ram.clone();
    assert_eq!(other.bus.save_payloads(), saved, "also before they came out");
    let again = other.requests();
    assert_eq!(again.iter().map(|r| &r.kind).collect::<Vec<_>>(), [&before[0].kind, &before[1].kind]);
    assert_eq!(other.bus.save_payloads(), saved, "and after");
    for request in again {
        let len = if let Kind::Read { len, .. } = request.kind { len } else { 0 };
        other.complete(request.id, Outcome::Done(vec![9; len]));
    }
    assert_eq!((other.used(0).0, other.used(1).0, other.status_of(0), other.status_of(1)), (2, 1, 0, 0));
    assert_eq!(other.bytes(0x6000, 512), [9; 512]);
}

#[test]
fn a_restored_request_outside_ram_needs_a_reset() {
    let mut guest = disk();
    guest.ask(0, 0, 0, 6, &[(0x6000, 512, true)]);
    guest.requests();
    let mut state = guest.device().device().save();
    state.out[0].chain.writable[0].0 = u64::MAX - 100;
    guest.with(|d, _| d.device_mut().restore(state).unwrap());
    assert_eq!(guest.requests(), []);
    assert!(guest.broken());
}

#[test]
fn impossible_states_are_refused() {
    let mut guest = disk();
    guest.ask(0, 0, 0, 6, &[(0x6000, 512, true)]);
    let good = guest.device().device().save();
    let spoil = |change: fn(&mut super::super::block::state::V1)| {
        let mut state = good.clone();
        change(&mut state);
        device(false).restore(state).is_err()
    };
    assert!(!spoil(|_| {}));
    assert!(spoil(|s| s.out[0].queue = 2));
    assert!(spoil(|s| s.out[0].chain.head = 128));
    assert!(spoil(|s| s.out[0].chain.writable = vec![(0, 1); 128]));
    assert!(spoil(|s| s.out[0].chain.writable = vec![(0, u32::MAX); 2]));
    assert!(spoil(|s| s.out = vec![s.out[0].clone(); OUT_MAX + 1]));
    assert!(spoil(|s| s.sectors = u64::MAX));
}

#[test]
fn a_driver_is_told_of_another_size() {
    let mut guest = disk();
    guest.write(0x10, &[0, 0]);
    let generation = guest.read::<1>(0x15)[0];
    guest.device().set_sectors(SECTORS);
    assert_eq!(guest.msi_data(), [0u32; 0], "the same");
    guest.device().set_sectors(2 * SECTORS);
    assert_eq!(guest.msi_data(), [0x40]);
    assert_eq!(guest.read::<8>(0x2000), (2 * SECTORS).to_le_bytes());
    assert_eq!(guest.read::<1>(0x15)[0], generation.wrapping_add(1));
    guest.ask(0, 0, 0, SECTORS, &[(DATA, 512, true)]);
    assert_eq!(guest.requests().len(), 1);
}

mod state {
    use super::*;
    use crate::devices::testing::snapshot_tests;

    fn used() -> Block {
        let mut guest = disk();
        guest.ask(1, 0, 1, 5, &[(DATA, 512, false)]);
        guest.ask(0, 1, 0, 6, &[(0x6000, 300, true), (0x7000, 212, true)]);
        guest.requests();
        let mut block = device(false);
        block.restore(guest.device().device().save()).unwrap();
        block
    }

    snapshot_tests! {
        fresh: device(false),
        used: used(),
        exercise: |block| _ = block.save(),
        golden: "801001020100028080011080a00180040180900101000301908001100380c001ac0280e001d40181900101",
    }
}
