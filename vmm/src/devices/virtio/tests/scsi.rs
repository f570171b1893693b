//! The SCSI controller, driven as a guest drives it: the owner of its requests is the test.

use vm_memory::{Bytes, GuestAddress};

use super::super::super::scsi::{Medium, Unit};
use super::super::requests::{Kind, OUT_MAX, Outcome, Range, Request};
use super::super::scsi::{Scsi, state};
use super::*;

/// HOTPLUG, CHANGE.
const FEATURES: u64 = VERSION_1 | 1 << 1 | 1 << 2;
const SECTORS: u64 = 2048;
const HEADER: u64 = 0xa_0000;
const RESPONSE: u64 = 0xa_8000;
const DATA: u64 = 0xb_0000;
const CONTROL: u16 = 0;
const EVENTS: u16 = 1;
const REQUESTS: u16 = 2;
const UNTOUCHED: u8 = 0x77;
const SDA: u8 = 0;
const CD0: u8 = 1;
const DISC: u64 = 64 * 2048;

fn device() -> Scsi {
    Scsi::new(2, vec![Unit::disk("sda", false), Unit::cdrom("cd0")])
}

fn medium(identity: u64) -> Medium {
    Medium { file: "/a.iso".into(), bytes: DISC, identity }
}

/// Ready, its units asked once so that power on is told.
fn scsi() -> Guest<Scsi> {
    let mut guest = Guest::ready(device(), FEATURES);
    guest.enable_msix();
    guest.with(|d, ctx| d.set_sectors(0, SECTORS, ctx));
    guest.with(|d, _| d.load_medium(1, Some(medium(1))));
    for target in [SDA, CD0] {
        guest.ask(REQUESTS, 0, target, &[0; 6], &[]);
        assert_eq!(guest.answer(0).sense(), (6, 0x29, 0));
    }
    guest.msi_data();
    guest
}

/// What the driver finds.
#[derive(Debug)]
struct Answer {
    sense_len: u32,
    residual: u32,
    status: u8,
    response: u8,
    bytes: Vec<u8>,
}

impl Answer {
    fn sense(&self) -> (u8, u8, u8) {
        assert_eq!((self.status, self.response, self.sense_len), (2, 0, 18));
        (self.bytes[2] & 0xf, self.bytes[12], self.bytes[13])
    }
    fn good(&self) -> u32 {
        assert_eq!((self.status, self.response, self.sense_len), (0, 0, 0), "{self:x?}");
        self.residual
    }
}

impl Guest<Scsi> {
    /// A command, its header and response at places of its own. The tag is its number.
    fn ask(&mut self, q: u16, number: u64, target: u8, cdb: &[u8], data: &[(u64, u32, bool)]) {
        self.ask_lun(q, number, [1, target, 0x40, 0, 0, 0, 0, 0], cdb, data);
    }

    fn ask_lun(&mut self, q: u16, number: u64, lun: [u8; 8], cdb: &[u8], data: &[(u64, u32, bool)]) {
        let (header, response) = (HEADER + 0x100 * number, RESPONSE + 0x100 * number);
        let mut bytes = [&lun[..], &number.to_le_bytes(), &[0, 0, 0], cdb].concat();
        bytes.resize(19 + 32, 0);
        self.ram.write_slice(&bytes, GuestAddress(header)).unwrap();
        self.ram.write_slice(&[UNTOUCHED; 108], GuestAddress(response)).unwrap();
        let mut buffers = vec![(header, 51, false)];
        buffers.extend(data.iter().filter(|(.., writable)| !writable));
        buffers.push((response, 108, true));
        buffers.extend(data.iter().filter(|(.., writable)| *writable));
        self.add(q, &buffers);
        self.kick(q);
    }

    fn answered(&self, number: u64) -> bool {
        self.bytes(RESPONSE + 0x100 * number + 11, 1)[0] != UNTOUCHED
    }

    fn answer(&self, number: u64) -> Answer {
        assert!(self.answered(number), "{number} has no answer");
        let bytes = self.bytes(RESPONSE + 0x100 * number, 108);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Answer {
            sense_len: word(0),
            residual: word(4),
            status: bytes[10],
            response: bytes[11],
            bytes: bytes[12..].to_vec(),
        }
    }

    fn requests_of(&mut self, unit: usize) -> Vec<Request> {
        self.with(|d, ctx| d.take_requests_of(unit, ctx))
    }

    fn complete(&mut self, id: u64, outcome: Outcome) {
        self.with(|d, ctx| d.complete(vec![(id, outcome)], ctx));
    }

    /// Task management; its response stands at `RESPONSE + 0x7000 + 0x10 * number`.
    fn manage(&mut self, number: u64, subtype: u32, target: u8, tag: u64) {
        let (header, response) = (HEADER + 0x7000 + 0x40 * number, RESPONSE + 0x7000 + 0x10 * number);
        let lun = [1, target, 0x40, 0, 0, 0, 0, 0];
        let bytes = [&0u32.to_le_bytes()[..], &subtype.to_le_bytes(), &lun, &tag.to_le_bytes()].concat();
        self.ram.write_slice(&bytes, GuestAddress(header)).unwrap();
        self.ram.write_obj(UNTOUCHED, GuestAddress(response)).unwrap();
        self.add(CONTROL, &[(header, 24, false), (response, 1, true)]);
        self.kick(CONTROL);
    }

    fn managed(&self, number: u64) -> u8 {
        self.bytes(RESPONSE + 0x7000 + 0x10 * number, 1)[0]
    }
}

fn read(first: u8, blocks: u8) -> [u8; 10] {
    [0x28, 0, 0, 0, 0, first, 0, 0, blocks, 0]
}

fn write(first: u8, blocks: u8) -> [u8; 10] {
    [0x2a, 0, 0, 0, 0, first, 0, 0, blocks, 0]
}

#[test]
fn the_configuration_names_its_queues_and_targets_and_takes_sizes() {
    let mut guest = scsi();
    assert_eq!(guest.config_read(0x00), 0x1048_1af4);
    assert_eq!(guest.config_read(0x08) >> 8, 0x01_00_00);
    let config: [u8; 36] = guest.read(0x2000);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(8), word(16), word(20), word(24)), (2, 126, 16128, 16, 96, 32));
    assert_eq!((config[28..30].to_vec(), config[30], word(32)), (vec![0, 0], 1, 0), "channels, targets, units");
    guest.write(0x2014, &20u32.to_le_bytes());
    guest.write(0x2018, &16u32.to_le_bytes());
    assert_eq!(guest.read::<8>(0x2014), [20, 0, 0, 0, 16, 0, 0, 0]);
    guest.write(0x2014, &u32::MAX.to_le_bytes());
    guest.write(0x2018, &0u32.to_le_bytes());
    assert_eq!(guest.read::<8>(0x2014), [20, 0, 0, 0, 16, 0, 0, 0], "these are none");
    guest.write(0x14, &[0]);
    assert_eq!(guest.read::<8>(0x2014), [96, 0, 0, 0, 32, 0, 0, 0]);
}

#[test]
fn commands_that_need_no_storage_are_answered_at_once_with_their_residual() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &[0x12, 0, 0, 0, 255, 0], &[(DATA, 200, true)]);
    assert_eq!(guest.answer(0).good(), 164);
    assert_eq!(guest.bytes(DATA + 8, 8), b"UNDRSTDY");
    assert_eq!(guest.used(REQUESTS).1.1, 108 + 36);
    assert_eq!(guest.msi_data(), [0x43]);
    // More than there is room for.
    guest.ask(REQUESTS + 1, 1, SDA, &[0x12, 0, 0, 0, 255, 0], &[(DATA, 20, true)]);
    assert_eq!((guest.answer(1).response, guest.answer(1).residual), (1, 20), "OVERRUN");
    guest.ask(REQUESTS, 2, SDA, &[0xff; 6], &[(DATA, 20, true)]);
    assert_eq!((guest.answer(2).sense(), guest.answer(2).residual), ((5, 0x20, 0), 20));
    guest.ask(REQUESTS, 3, SDA, &[0; 6], &[(DATA, 20, true), (DATA + 20, 20, false)]);
    assert_eq!(guest.answer(3).response, 9, "both ways at once was not offered");
    assert!(!guest.broken());
}

#[test]
fn addresses_lead_to_units_and_nowhere_else() {
    let mut guest = scsi();
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    for (lun, response, first) in [
        ([1, 0, 0x40, 0, 0, 0, 0, 0], 0, 0x00),
        ([1, 0, 0, 0, 0, 0, 0, 0], 0, 0x00),
        ([1, 1, 0x40, 0, 0, 0, 0, 0], 0, 0x05),
        ([1, 0, 0x40, 1, 0, 0, 0, 0], 0, 0x7f),
        ([1, 0, 0x40, 0, 0, 0, 0, 1], 0, 0x7f),
        ([1, 2, 0x40, 0, 0, 0, 0, 0], 3, UNTOUCHED),
        ([0, 0, 0x40, 0, 0, 0, 0, 0], 3, UNTOUCHED),
        ([0xc1, 1, 0, 0, 0, 0, 0, 0], 3, UNTOUCHED),
    ] {
        guest.ram.write_obj(UNTOUCHED, GuestAddress(DATA)).unwrap();
        guest.ask_lun(REQUESTS, 0, lun, &inquiry, &[(DATA, 36, true)]);
        assert_eq!((guest.answer(0).response, guest.bytes(DATA, 1)[0]), (response, first), "{lun:x?}");
    }
    guest.ask_lun(REQUESTS, 0, [1, 0, 0x40, 9, 0, 0, 0, 0], &[0; 6], &[]);
    assert_eq!(guest.answer(0).sense(), (5, 0x25, 0));
}

#[test]
fn reads_and_writes_go_out_and_are_answered_when_they_are_done() {
    let mut guest = scsi();
    guest.ask(REQUESTS + 1, 3, SDA, &read(7, 2), &[(DATA, 1000, true), (DATA + 0x1000, 100, true)]);
    assert_eq!(guest.requests_of(1), []);
    assert_eq!(guest.requests_of(0), [Request { id: 0, kind: Kind::Read { at: 7 * 512, len: 1024 } }]);
    assert!(!guest.answered(3));
    guest.clean();
    let content: Vec<u8> = (0..1024u32).map(|i| (i / 4) as u8).collect();
    guest.complete(0, Outcome::Done(content.clone()));
    assert_eq!(guest.answer(3).good(), 76, "what was not used of the room");
    assert_eq!([guest.bytes(DATA, 1000), guest.bytes(DATA + 0x1000, 24)].concat(), content);
    assert!(guest.dirty(DATA) && guest.dirty(RESPONSE + 0x300) && guest.dirty(ring(REQUESTS + 1).2));
    let mut fua = write(9, 1);
    fua[1] = 8;
    guest.ask(REQUESTS, 4, SDA, &fua, &[(DATA, 100, false), (DATA + 0x2000, 500, false)]);
    let from = vec![(DATA, 100), (DATA + 0x2000, 412)];
    let [request] = &guest.requests_of(0)[..] else { panic!() };
    assert_eq!(request.kind, Kind::Write { at: 9 * 512, from, durable: true });
    guest.complete(request.id, Outcome::Done(Vec::new()));
    assert_eq!(guest.answer(4).good(), 88);
    for (cdb, data) in [(read(0, 2), (DATA, 1023, true)), (write(0, 2), (DATA, 1023, false))] {
        guest.ask(REQUESTS, 5, SDA, &cdb, &[data]);
        assert_eq!((guest.answer(5).response, guest.answer(5).residual), (1, 1023), "OVERRUN");
    }
    assert_eq!(guest.requests_of(0), []);
}

#[test]
fn what_storage_cannot_do_is_a_medium_error() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &read(0, 1), &[(DATA, 512, true)]);
    guest.ask(REQUESTS, 1, SDA, &write(0, 1), &[(DATA, 512, false)]);
    guest.ask(REQUESTS + 1, 2, SDA, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
    let all = guest.requests_of(0);
    assert_eq!(all[2].kind, Kind::Flush);
    for request in all {
        guest.complete(request.id, Outcome::Failed);
    }
    assert_eq!(guest.answer(0).sense(), (3, 0x11, 0));
    assert_eq!(guest.answer(1).sense(), (3, 0x0c, 0));
    assert_eq!(guest.answer(2).sense(), (3, 0x0c, 0));
    guest.ask(REQUESTS, 3, SDA, &read(0, 1), &[(DATA, 512, true)]);
    let id = guest.requests_of(0)[0].id;
    guest.complete(id, Outcome::Done(vec![0; 511]));
    assert_eq!(guest.answer(3).sense(), (3, 0x11, 0), "a read that did not bring all is none");
}

#[test]
fn verify_compares_and_ranges_are_given_back() {
    let mut guest = scsi();
    guest.ram.write_slice(&[5; 512], GuestAddress(DATA)).unwrap();
    for (theirs, miscompares) in [(5, false), (6, true)] {
        guest.ask(REQUESTS, 0, SDA, &[0x2f, 2, 0, 0, 0, 1, 0, 0, 1, 0], &[(DATA, 512, false)]);
        let [request] = &guest.requests_of(0)[..] else { panic!() };
        assert_eq!(request.kind, Kind::Read { at: 512, len: 512 });
        guest.complete(request.id, Outcome::Done(vec![theirs; 512]));
        if miscompares {
            assert_eq!(guest.answer(0).sense(), (14, 0x1d, 0));
        } else {
            assert_eq!(guest.answer(0).good(), 0);
        }
    }
    let list = [&[0, 22, 0, 16, 0, 0, 0, 0][..], &8u64.to_be_bytes(), &16u32.to_be_bytes(), &[0; 4]].concat();
    guest.ram.write_slice(&list, GuestAddress(DATA)).unwrap();
    guest.ask(REQUESTS, 1, SDA, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &[(DATA, 24, false)]);
    let [request] = &guest.requests_of(0)[..] else { panic!() };
    assert_eq!(request.kind, Kind::Discard(vec![Range { sector: 8, sectors: 16, unmap: true }]));
    guest.complete(request.id, Outcome::Done(Vec::new()));
    assert_eq!(guest.answer(1).good(), 0);
}

#[test]
fn a_drive_is_read_in_blocks_of_its_own() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, CD0, &read(63, 1), &[(DATA, 2048, true)]);
    let [request] = &guest.requests_of(1)[..] else { panic!() };
    assert_eq!(request.kind, Kind::Read { at: 63 * 2048, len: 2048 });
    guest.complete(request.id, Outcome::Done(vec![9; 2048]));
    assert_eq!((guest.answer(0).good(), guest.bytes(DATA, 2048)), (0, vec![9; 2048]));
}

#[test]
fn a_medium_that_is_taken_out_ends_its_reads_and_late_outcomes_write_nothing() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, CD0, &read(0, 1), &[(DATA, 2048, true)]);
    let [request] = &guest.requests_of(1)[..] else { panic!() };
    guest.ask(REQUESTS, 1, CD0, &read(1, 1), &[(DATA, 2048, true)]);
    guest.with(|d, ctx| d.change_medium(1, Some(medium(2)), false, ctx)).unwrap();
    assert_eq!((guest.answer(0).sense(), guest.answer(1).sense()), ((6, 0x28, 0), (6, 0x28, 0)));
    assert_eq!(guest.requests_of(1), [], "nor is what was not begun");
    guest.complete(request.id, Outcome::Done(vec![9; 2048]));
    assert_eq!((guest.bytes(DATA, 2048), guest.device().out()), (vec![0; 2048], 0));
    guest.ask(REQUESTS, 2, CD0, &[0; 6], &[]);
    assert_eq!(guest.answer(2).sense(), (6, 0x28, 0));
    // The guest opens the tray in the middle of a read.
    guest.ask(REQUESTS, 3, CD0, &read(0, 1), &[(DATA, 2048, true)]);
    guest.ask(REQUESTS + 1, 4, CD0, &[0x1b, 0, 0, 0, 2, 0], &[]);
    assert_eq!((guest.answer(3).sense(), guest.answer(4).good()), ((2, 0x3a, 2), 0));
}

#[test]
fn changes_are_told_by_events_and_what_is_missed_is_told_too() {
    let mut guest = scsi();
    let at = 0xc_0000;
    guest.add(EVENTS, &[(at, 16, true)]);
    guest.kick(EVENTS);
    guest.with(|d, ctx| d.set_sectors(0, 2 * SECTORS, ctx));
    assert_eq!(guest.bytes(at, 16), [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x2a, 9, 0, 0]);
    assert_eq!(guest.msi_data(), [0x42]);
    guest.ask(REQUESTS, 0, SDA, &[0; 6], &[]);
    assert_eq!(guest.answer(0).sense(), (6, 0x2a, 9));
    guest.with(|d, ctx| d.set_sectors(0, 2 * SECTORS, ctx));
    // Nobody takes them: so many wait, the others are missed.
    for i in 0..20 {
        guest.with(|d, ctx| d.set_sectors(0, 100 + i, ctx));
    }
    for i in 0..8 {
        guest.add(EVENTS, &[(at + 16 * i, 16, true)]);
    }
    guest.kick(EVENTS);
    let missed: Vec<u8> = (0..8).map(|i| guest.bytes(at + 16 * i + 3, 1)[0]).collect();
    assert_eq!(missed, [0x80, 0, 0, 0, 0, 0, 0, 0], "once");
    guest.add(EVENTS, &[(at, 15, true)]);
    guest.kick(EVENTS);
    assert!(guest.broken());
}

#[test]
fn a_driver_that_knows_no_events_gets_none() {
    let mut guest = Guest::ready(device(), VERSION_1);
    guest.with(|d, ctx| d.set_sectors(0, SECTORS, ctx));
    guest.add(EVENTS, &[(DATA, 16, true)]);
    guest.kick(EVENTS);
    guest.with(|d, ctx| d.set_sectors(0, 2 * SECTORS, ctx));
    assert_eq!(guest.used(EVENTS).0, 0);
}

const ABORT: u32 = 0;
const LUN_RESET: u32 = 5;
const QUERY: u32 = 6;

#[test]
fn an_aborted_task_has_ended_when_the_abort_is_answered() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &write(0, 1), &[(DATA, 512, false)]);
    guest.ask(REQUESTS, 1, SDA, &read(0, 1), &[(DATA, 512, true)]);
    let all = guest.requests_of(0);
    guest.manage(0, QUERY, SDA, 0);
    assert_eq!(guest.managed(0), 10, "FUNCTION SUCCEEDED: it is there");
    guest.manage(1, QUERY, SDA, 77);
    guest.manage(2, ABORT, SDA, 77);
    assert_eq!((guest.managed(1), guest.managed(2)), (0, 0), "no such task");
    guest.manage(3, ABORT, SDA, 0);
    assert_eq!((guest.managed(3), guest.answered(0)), (UNTOUCHED, false), "storage is still at it");
    guest.complete(all[0].id, Outcome::Done(Vec::new()));
    assert_eq!((guest.answer(0).response, guest.managed(3)), (2, 0));
    assert!(!guest.answered(1), "the other goes on");
    guest.complete(all[1].id, Outcome::Done(vec![0; 512]));
    assert_eq!(guest.answer(1).good(), 0);
}

#[test]
fn a_unit_is_reset_when_its_tasks_have_ended() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &write(0, 1), &[(DATA, 512, false)]);
    guest.ask(REQUESTS + 1, 1, CD0, &read(0, 1), &[(DATA, 2048, true)]);
    guest.manage(0, LUN_RESET, SDA, 0);
    let id = guest.requests_of(0)[0].id;
    guest.complete(id, Outcome::Done(Vec::new()));
    assert_eq!((guest.answer(0).response, guest.managed(0)), (4, 0));
    guest.ask(REQUESTS, 2, SDA, &[0; 6], &[]);
    assert_eq!(guest.answer(2).sense(), (6, 0x29, 3));
    assert!(!guest.answered(1), "another unit's");
    for (subtype, target, response) in [(3, SDA, 0), (2, SDA, 11), (99, SDA, 11), (LUN_RESET, 9, 3), (4, SDA, 0)] {
        guest.manage(1, subtype, target, 0);
        assert_eq!(guest.managed(1), response, "{subtype} of {target}");
    }
}

#[test]
fn asynchronous_notifications_are_none() {
    let mut guest = scsi();
    guest.ram.write_obj(1u32, GuestAddress(HEADER)).unwrap();
    guest.add(CONTROL, &[(HEADER, 16, false), (RESPONSE, 5, true)]);
    guest.kick(CONTROL);
    assert_eq!((guest.bytes(RESPONSE, 5), guest.used(CONTROL).1.1), (vec![0; 5], 5));
}

#[test]
fn requests_that_are_none_need_a_reset() {
    type Offence = fn(&mut Guest<Scsi>);
    let offences: [(&str, Offence); 6] = [
        ("no header", |g| _ = g.add(REQUESTS, &[(HEADER, 50, false), (RESPONSE, 108, true)])),
        ("no response", |g| _ = g.add(REQUESTS, &[(HEADER, 51, false), (RESPONSE, 107, true)])),
        ("no control request", |g| _ = g.add(CONTROL, &[(HEADER, 23, false), (RESPONSE, 1, true)])),
        ("no room for its answer", |g| _ = g.add(CONTROL, &[(HEADER, 24, false)])),
        ("an unknown control request", |g| {
            g.ram.write_obj(9u32, GuestAddress(HEADER)).unwrap();
            g.add(CONTROL, &[(HEADER, 24, false), (RESPONSE, 1, true)]);
        }),
        ("more than the queue holds", |g| {
            for _ in 0..=SIZE {
                g.ask(REQUESTS, 0, SDA, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[]);
            }
        }),
    ];
    for (what, commit) in offences {
        let mut guest = scsi();
        commit(&mut guest);
        guest.kick(CONTROL);
        guest.kick(REQUESTS);
        assert!(guest.broken(), "{what}");
        guest.write(0x14, &[0]);
        assert_eq!((guest.status(), guest.device().out()), (0, 0), "{what}: a reset helps");
    }
}

#[test]
fn a_task_attribute_that_is_not_there_is_refused() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &[0; 6], &[]);
    for attribute in [1u8, 2, 3, 255] {
        guest.ram.write_obj(attribute, GuestAddress(HEADER + 16)).unwrap();
        guest.ram.write_slice(&[UNTOUCHED; 108], GuestAddress(RESPONSE)).unwrap();
        guest.add(REQUESTS, &[(HEADER, 51, false), (RESPONSE, 108, true)]);
        guest.kick(REQUESTS);
        assert_eq!(guest.answer(0).sense(), (5, 0x49, 0));
    }
}

#[test]
fn what_is_out_comes_out_again_after_a_restore_and_so_does_what_waits_for_it() {
    let mut guest = scsi();
    guest.ask(REQUESTS + 1, 0, SDA, &write(5, 1), &[(DATA, 512, false)]);
    guest.ask(REQUESTS, 1, SDA, &read(6, 1), &[(DATA + 0x1000, 512, true)]);
    guest.ask(REQUESTS, 2, CD0, &read(3, 1), &[(DATA + 0x2000, 2048, true)]);
    let (before, of_the_drive) = (guest.requests_of(0), guest.requests_of(1));
    guest.manage(0, LUN_RESET, SDA, 0);
    let saved = guest.bus.save_payloads();

    let mut other = Guest::new(device());
    other.bus.restore_payloads(&mut Payloads::new(saved.clone()).unwrap()).unwrap();
    other.ram = guest.ram.clone();
    assert_eq!(other.bus.save_payloads(), saved, "also before they came out");
    let again = other.requests_of(0);
    assert_eq!(again.iter().map(|r| &r.kind).collect::<Vec<_>>(), [&before[0].kind, &before[1].kind]);
    assert_eq!(other.requests_of(1)[0].kind, of_the_drive[0].kind);
    assert_eq!(other.bus.save_payloads(), saved, "and after");
    assert_eq!(other.managed(0), UNTOUCHED);
    for request in again {
        other.complete(request.id, Outcome::Done(vec![9; request.kind.reads()]));
    }
    assert_eq!((other.answer(0).response, other.answer(1).response, other.managed(0)), (4, 4, 0));
    assert!(!other.answered(2));
    assert_eq!(other.device().device().units()[1].medium(), Some(&medium(1)), "the drive holds what it held");
}

#[test]
fn a_reset_forgets_requests_and_late_outcomes_write_nothing() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &read(0, 1), &[(DATA, 512, true)]);
    let (id, life) = (guest.requests_of(0)[0].id, guest.device().life());
    guest.manage(0, ABORT, SDA, 0);
    guest.write(0x14, &[0]);
    assert_ne!(guest.device().life(), life);
    guest.complete(id, Outcome::Done(vec![1; 512]));
    assert_eq!((guest.bytes(DATA, 512), guest.answered(0), guest.managed(0)), (vec![0; 512], false, UNTOUCHED));
}

#[test]
fn impossible_states_are_refused() {
    let mut guest = scsi();
    guest.ask(REQUESTS, 0, SDA, &read(6, 1), &[(DATA, 512, true)]);
    let good = guest.device().device().save();
    let spoil = |change: fn(&mut state::V1)| {
        let mut state = good.clone();
        change(&mut state);
        device().restore(state).is_err()
    };
    assert!(!spoil(|_| {}));
    assert!(spoil(|s| s.out[0].queue = 1));
    assert!(spoil(|s| s.out[0].queue = 4));
    assert!(spoil(|s| s.out[0].chain.head = 128));
    assert!(spoil(|s| s.out = vec![s.out[0].clone(); OUT_MAX + 17]));
    assert!(spoil(|s| s.sense_size = 257));
    assert!(spoil(|s| s.cdb_size = 0));
    assert!(spoil(|s| _ = s.units.pop()));
    assert!(spoil(|s| s.units.swap(0, 1)));
    assert!(spoil(|s| s.units[0].blocks = u64::MAX));
    assert!(spoil(|s| s.units[0].drive = s.units[1].drive.clone()));
    assert!(spoil(|s| s.units[0].attentions = 0x80));
    assert!(spoil(|s| s.units[1].drive.as_mut().unwrap().medium.as_mut().unwrap().bytes = 2047));
    assert!(spoil(|s| s.events = vec![super::super::scsi::Event { event: 3, lun: [0; 8], reason: 0 }; 17]));
}

mod saved {
    use super::*;
    use crate::devices::testing::snapshot_tests;

    fn used() -> Scsi {
        let mut guest = scsi();
        guest.ask(REQUESTS + 1, 0, SDA, &write(5, 1), &[(DATA, 512, false)]);
        guest.ask(REQUESTS, 1, CD0, &read(6, 1), &[(DATA, 2048, true)]);
        guest.ask(REQUESTS, 2, CD0, &[0x1e, 0, 0, 0, 1, 0], &[]);
        guest.with(|d, ctx| d.set_sectors(0, 4096, ctx));
        guest.manage(0, ABORT, SDA, 0);
        let mut scsi = device();
        scsi.restore(guest.device().device().save()).unwrap();
        scsi
    }

    snapshot_tests! {
        fresh: device(),
        used: used(),
        exercise: |scsi| _ = scsi.save(),
        golden: "60200203736461802008000363643000000101062f612e69736f8080080100010001030100000000000000aa1200030304028080283380802c80040180802a6c020701808228330280822a6c80802c801000040180e029180180e02b01",
    }
}
