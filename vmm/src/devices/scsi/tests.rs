//! The units, without any transport.

use super::cdb::{COMMANDS, op};
use super::*;

const BLOCKS: u64 = 1 << 20;

fn disk() -> Unit {
    let mut unit = Unit::disk("sda", false);
    unit.set_blocks(BLOCKS);
    used(unit)
}

fn used(mut unit: Unit) -> Unit {
    assert_eq!(unit.command(&[0; 6], &[]), Reply::Check(Attention::PowerOn.sense()), "the first thing that is told");
    unit
}

fn medium(blocks: u64) -> Medium {
    Medium { file: "/a.iso".into(), bytes: blocks * CD_BLOCK, identity: 7 }
}

fn cdrom(blocks: u64) -> Unit {
    let mut unit = Unit::cdrom("cd0");
    unit.load_medium((blocks > 0).then(|| medium(blocks)));
    used(unit)
}

fn data(unit: &mut Unit, cdb: &[u8]) -> Vec<u8> {
    match unit.command(cdb, &[]) {
        Reply::Data(data) => data,
        other => panic!("{cdb:x?}: {other:?}"),
    }
}

fn sense(unit: &mut Unit, cdb: &[u8]) -> Sense {
    match unit.command(cdb, &[]) {
        Reply::Check(sense) => sense,
        other => panic!("{cdb:x?}: {other:?}"),
    }
}

/// A ten-byte command for a run of blocks.
fn ten(opcode: u8, first: u32, blocks: u16) -> [u8; 10] {
    let (f, n) = (first.to_be_bytes(), blocks.to_be_bytes());
    [opcode, 0, f[0], f[1], f[2], f[3], 0, n[0], n[1], 0]
}

fn sixteen(opcode: u8, first: u64, blocks: u32) -> Vec<u8> {
    [&[opcode, 0][..], &first.to_be_bytes(), &blocks.to_be_bytes(), &[0, 0]].concat()
}

#[test]
fn an_inquiry_says_who_it_is_and_keeps_within_the_allocation() {
    let inquiry = data(&mut disk(), &[op::INQUIRY, 0, 0, 0, 255, 0]);
    assert_eq!(inquiry.len(), 36);
    assert_eq!(inquiry[..8], [0, 0, 6, 0x12, 31, 0, 0, 2]);
    assert_eq!(&inquiry[8..], b"UNDRSTDYDISK            0001");
    assert_eq!(data(&mut disk(), &[op::INQUIRY, 0, 0, 0, 5, 0]).len(), 5);
    let drive = data(&mut cdrom(1), &[op::INQUIRY, 0, 0, 0, 36, 0]);
    assert_eq!(drive[..2], [5, 0x80], "a drive, with a medium that can be taken out");
    assert_eq!(sense(&mut disk(), &[op::INQUIRY, 0, 0x80, 0, 36, 0]), Sense::INVALID_FIELD, "a page without EVPD");
}

#[test]
fn every_vital_product_data_page_that_is_listed_is_there_and_says_its_length() {
    for mut unit in [disk(), cdrom(0)] {
        let list = data(&mut unit, &[op::INQUIRY, 1, 0, 0, 255, 0]);
        assert_eq!(usize::from(list[3]), list.len() - 4);
        for page in &list[4..] {
            let body = data(&mut unit, &[op::INQUIRY, 1, *page, 0, 255, 0]);
            assert_eq!((body[1], usize::from(body[3])), (*page, body.len() - 4), "{page:#x}");
        }
        assert_eq!(sense(&mut unit, &[op::INQUIRY, 1, 0xb5, 0, 255, 0]), Sense::INVALID_FIELD);
    }
    let limits = data(&mut disk(), &[op::INQUIRY, 1, 0xb0, 0, 255, 0]);
    let word = |at: usize| u32::from_be_bytes(limits[at..at + 4].try_into().unwrap());
    assert_eq!((limits[4], word(8), word(20), word(24), word(28)), (1, 16128, 1 << 22, 16, 8));
    assert_eq!(limits[36..44], (1u64 << 16).to_be_bytes());
    assert_eq!(&data(&mut disk(), &[op::INQUIRY, 1, 0x80, 0, 255, 0])[4..], b"sda");
    assert_eq!(data(&mut disk(), &[op::INQUIRY, 1, 0xb2, 0, 255, 0])[5], 0xe4);
}

#[test]
fn a_disk_tells_its_capacity_also_when_it_is_too_large_for_the_short_form() {
    let mut unit = disk();
    assert_eq!(data(&mut unit, &ten(op::READ_CAPACITY_10, 0, 0)), [0, 15, 255, 255, 0, 0, 2, 0]);
    unit.set_blocks(1 << 33);
    assert_eq!(sense(&mut unit, &[0; 6]), Attention::Capacity.sense());
    let short = data(&mut unit, &ten(op::READ_CAPACITY_10, 0, 0));
    assert_eq!(short, [255, 255, 255, 255, 0, 0, 2, 0]);
    let mut cdb = [0; 16];
    (cdb[0], cdb[1], cdb[13]) = (op::SERVICE_ACTION_IN_16, op::READ_CAPACITY_16, 32);
    let long = data(&mut unit, &cdb);
    assert_eq!(long[..8], ((1u64 << 33) - 1).to_be_bytes());
    assert_eq!((long[13], long[14], long.len()), (3, 0xc0, 32), "4 KiB below; thin, zeroes");
    cdb[1] = 0x12;
    assert_eq!(sense(&mut unit, &cdb), Sense::INVALID_FIELD, "another service action");
}

#[test]
fn reads_and_writes_of_every_length_mean_the_same_run() {
    let mut unit = disk();
    let read = Reply::Do(Work::Read { at: 0x1234 * 512, len: 5 * 512 });
    let twelve = [op::READ_12, 0, 0, 0, 0x12, 0x34, 0, 0, 0, 5, 0, 0];
    for cdb in [
        &[op::READ_6, 0, 0x12, 0x34, 5, 0][..],
        &ten(op::READ_10, 0x1234, 5),
        &twelve,
        &sixteen(op::READ_16, 0x1234, 5),
    ] {
        assert_eq!(unit.command(cdb, &[]), read, "{cdb:x?}");
    }
    let all = Reply::Do(Work::Read { at: 0, len: 256 * 512 });
    assert_eq!(unit.command(&[op::READ_6, 0, 0, 0, 0, 0], &[]), all, "in the short form 0 is 256");
    assert!(data(&mut unit, &ten(op::READ_10, 7, 0)).is_empty(), "nothing is nothing");
    let mut write = ten(op::WRITE_10, 3, 2);
    let work = |durable| Reply::Do(Work::Write { at: 3 * 512, len: 1024, durable });
    assert_eq!(unit.command(&write, &[]), work(false));
    write[1] = 0x18;
    assert_eq!(unit.command(&write, &[]), work(true), "FUA, and a hint that is none to us");
    write[1] = 0x20;
    assert_eq!(sense(&mut unit, &write), Sense::INVALID_FIELD, "there is no protection information");
}

#[test]
fn what_is_not_on_the_disk_is_neither_read_nor_written() {
    let mut unit = disk();
    let last = BLOCKS as u32 - 1;
    assert!(matches!(unit.command(&ten(op::READ_10, last, 1), &[]), Reply::Do(_)));
    for cdb in [
        ten(op::READ_10, last, 2).to_vec(),
        ten(op::WRITE_10, last + 1, 1).to_vec(),
        ten(op::VERIFY_10, last, 2).to_vec(),
        ten(op::SYNCHRONIZE_CACHE_10, last, 2).to_vec(),
        sixteen(op::READ_16, u64::MAX, 1),
        sixteen(op::READ_16, u64::MAX / 512, 1),
        sixteen(op::WRITE_16, BLOCKS - 1, 2),
        sixteen(op::WRITE_SAME_16, BLOCKS, 1),
    ] {
        assert_eq!(sense(&mut unit, &cdb), Sense::OUT_OF_RANGE, "{cdb:x?}");
    }
    assert_eq!(sense(&mut unit, &sixteen(op::READ_16, 0, 16129)), Sense::INVALID_FIELD, "more than one command may");
    assert!(matches!(unit.command(&sixteen(op::READ_16, 0, 16128), &[]), Reply::Do(_)));
}

#[test]
fn a_read_only_disk_protects_its_data_and_says_so() {
    let mut unit = Unit::disk("sda", true);
    unit.set_blocks(BLOCKS);
    let mut unit = used(unit);
    for cdb in [
        ten(op::WRITE_10, 0, 1).to_vec(),
        sixteen(op::WRITE_16, 0, 1),
        sixteen(op::WRITE_SAME_16, 0, 1),
        ten(op::UNMAP, 0, 24).to_vec(),
        vec![op::WRITE_6, 0, 0, 0, 1, 0],
    ] {
        assert_eq!(sense(&mut unit, &cdb), Sense::WRITE_PROTECTED, "{cdb:x?}");
    }
    assert!(data(&mut unit, &ten(op::SYNCHRONIZE_CACHE_10, 0, 0)).is_empty());
    assert_eq!(data(&mut unit, &[op::MODE_SENSE_6, 8, 0x3f, 0, 255, 0])[2], 0x90);
    assert_eq!(data(&mut disk(), &[op::MODE_SENSE_6, 8, 0x3f, 0, 255, 0])[2], 0x10);
}

#[test]
fn ranges_are_unmapped_and_blocks_written_again_and_again() {
    let mut unit = disk();
    let descriptor = |first: u64, blocks: u32| [&first.to_be_bytes()[..], &blocks.to_be_bytes(), &[0; 4]].concat();
    let list = |ranges: &[Vec<u8>]| {
        let body = ranges.concat();
        [&(body.len() as u16 + 6).to_be_bytes()[..], &(body.len() as u16).to_be_bytes(), &[0; 4], &body].concat()
    };
    let two = list(&[descriptor(8, 16), descriptor(100, 0), descriptor(2040, 8)]);
    let cdb = ten(op::UNMAP, 0, two.len() as u16);
    assert_eq!(unit.parameters(&cdb), two.len());
    assert_eq!(unit.command(&cdb, &two), Reply::Do(Work::Zero { runs: vec![(8, 16), (2040, 8)], unmap: true }));
    for (list, sense) in [
        (list(&[descriptor(BLOCKS, 1)]), Sense::OUT_OF_RANGE),
        (list(&[descriptor(u64::MAX, 1)]), Sense::OUT_OF_RANGE),
        (list(&vec![descriptor(0, 1); 17]), Sense::INVALID_PARAMETER),
        (list(&vec![descriptor(0, BLOCKS as u32); 5]), Sense::INVALID_PARAMETER),
        (vec![0; 7], Sense::PARAMETER_LENGTH),
    ] {
        assert_eq!(unit.command(&ten(op::UNMAP, 0, list.len() as u16), &list), Reply::Check(sense));
    }
    let (zero, ones) = (vec![0; 512], vec![1; 512]);
    let mut same = sixteen(op::WRITE_SAME_16, 5, 9);
    assert_eq!(unit.command(&same, &zero), Reply::Do(Work::Zero { runs: vec![(5, 9)], unmap: false }));
    assert_eq!(unit.command(&same, &ones), Reply::Do(Work::Fill { at: 5 * 512, len: 9 * 512, block: ones.clone() }));
    assert_eq!(unit.command(&same, &ones[..100]), Reply::Check(Sense::PARAMETER_LENGTH));
    same[1] = 0x09;
    assert_eq!(unit.parameters(&same), 0);
    assert_eq!(unit.command(&same, &[]), Reply::Do(Work::Zero { runs: vec![(5, 9)], unmap: true }));
    assert_eq!(sense(&mut unit, &sixteen(op::WRITE_SAME_16, 0, 0)), Sense::INVALID_FIELD);
    assert_eq!(sense(&mut unit, &sixteen(op::WRITE_SAME_16, 0, (1 << 16) + 1)), Sense::INVALID_FIELD);
}

#[test]
fn mode_pages_are_as_long_as_they_say_and_the_cache_is_told() {
    for mut unit in [disk(), cdrom(10)] {
        let six = data(&mut unit, &[op::MODE_SENSE_6, 0, 0x3f, 0, 255, 0]);
        assert_eq!((usize::from(six[0]), six.len()), (six.len() - 1, usize::from(six[0]) + 1));
        let mut at = 4 + usize::from(six[3]);
        while at < six.len() {
            at += 2 + usize::from(six[at + 1]);
        }
        assert_eq!(at, six.len());
        let cdb = ten(op::MODE_SENSE_10, 0x3f00_0000, 255);
        let ten = data(&mut unit, &cdb);
        assert_eq!((ten[8..].to_vec(), usize::from(ten[1])), (six[4..].to_vec(), ten.len() - 2));
        assert_eq!(sense(&mut unit, &[op::MODE_SENSE_6, 0, 0xff, 0, 255, 0]), Sense::NOT_SAVED);
        assert_eq!(sense(&mut unit, &[op::MODE_SENSE_6, 0, 0x1f, 0, 255, 0]), Sense::INVALID_FIELD);
    }
    let caching = data(&mut disk(), &[op::MODE_SENSE_6, 8, 0x08, 0, 255, 0]);
    assert_eq!(caching[4..7], [0x08, 18, 0x04], "a write cache");
    assert_eq!(data(&mut disk(), &[op::MODE_SENSE_6, 8, 0x48, 0, 255, 0])[6], 0, "that cannot be switched off");
    assert_eq!(data(&mut cdrom(9), &[op::MODE_SENSE_6, 0, 0x2a, 0, 255, 0])[4 + 2 + 4], 0x29, "tray, ejects, locks");
}

#[test]
fn what_is_reported_as_supported_is_and_nothing_else() {
    for mut unit in [disk(), cdrom(1000)] {
        let cdb =
            |how: u8, opcode: u8, action: u8| [op::MAINTENANCE_IN, 0x0c, how, opcode, 0, action, 0, 0, 4, 0, 0, 0];
        let all = data(&mut unit, &cdb(0, 0, 0));
        assert_eq!(u32::from_be_bytes(all[..4].try_into().unwrap()) as usize, all.len() - 4);
        let listed: Vec<u8> = all[4..].as_chunks::<8>().0.iter().map(|d| d[0]).collect();
        for opcode in 0..=255 {
            let known = sense_of(&mut unit, &[opcode; 16]) != Some(Sense::INVALID_OPCODE);
            assert_eq!(known, listed.contains(&opcode), "{opcode:#x}");
            let action = match opcode {
                op::SERVICE_ACTION_IN_16 => op::READ_CAPACITY_16,
                op::MAINTENANCE_IN => op::REPORT_OPCODES,
                _ => 0,
            };
            let one = data(&mut unit, &cdb(3, opcode, action));
            assert_eq!(one[1] & 7, if known { 3 } else { 1 }, "{opcode:#x}");
            if known {
                assert_eq!((one[4], usize::from(one[3])), (opcode, one.len() - 4));
            }
        }
        assert_eq!(sense(&mut unit, &cdb(1, op::MAINTENANCE_IN, 0)), Sense::INVALID_FIELD, "it has service actions");
        assert_eq!(data(&mut unit, &cdb(0x80, 0, 0)).len(), 4 + listed.len() * 20, "with timeouts");
    }
    assert!(COMMANDS.iter().all(|entry| entry.usage[0] == entry.opcode));
}

fn sense_of(unit: &mut Unit, cdb: &[u8]) -> Option<Sense> {
    match unit.command(cdb, &[]) {
        Reply::Check(sense) => Some(sense),
        _ => None,
    }
}

#[test]
fn attentions_are_told_once_each_and_inquiry_comes_before_them() {
    let mut unit = Unit::disk("sda", false);
    assert_eq!(unit.set_blocks(10), None, "nobody knew another size");
    assert_eq!(data(&mut unit, &[op::INQUIRY, 0, 0, 0, 36, 0]).len(), 36);
    assert_eq!(unit.set_blocks(20), Some(Attention::Capacity));
    unit.reset();
    let told: Vec<_> = (0..3).map_while(|_| sense_of(&mut unit, &[0; 6])).map(|s| (s.key, s.asc, s.ascq)).collect();
    assert_eq!(told, [(6, 0x29, 0), (6, 0x2a, 9)], "power on tells the reset too");
    unit.set_blocks(30);
    let asked = data(&mut unit, &[op::REQUEST_SENSE, 0, 0, 0, 18, 0]);
    assert_eq!((asked[0], asked[2], asked[12], asked[13]), (0x70, 6, 0x2a, 9));
    assert_eq!(data(&mut unit, &[op::REQUEST_SENSE, 1, 0, 0, 18, 0]), [0x72, 0, 0, 0, 0, 0, 0, 0]);
    assert!(data(&mut unit, &[0; 6]).is_empty());
}

#[test]
fn a_drive_reads_its_medium_and_an_empty_one_says_that_it_is() {
    let mut unit = cdrom(1000);
    assert_eq!(unit.command(&ten(op::READ_10, 999, 1), &[]), Reply::Do(Work::Read { at: 999 * 2048, len: 2048 }));
    assert_eq!(sense(&mut unit, &ten(op::READ_10, 999, 2)), Sense::OUT_OF_RANGE);
    assert_eq!(data(&mut unit, &ten(op::READ_CAPACITY_10, 0, 0)), [0, 0, 3, 231, 0, 0, 8, 0]);
    assert_eq!(sense(&mut unit, &ten(op::WRITE_10, 0, 1)), Sense::INVALID_OPCODE);
    let mut toc = ten(op::READ_TOC, 0, 255);
    let lba = data(&mut unit, &toc);
    assert_eq!(lba, [0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xaa, 0, 0, 0, 3, 232]);
    toc[1] = 2;
    let msf = data(&mut unit, &toc);
    assert_eq!((&msf[8..12], &msf[16..20]), (&[0, 0, 2, 0][..], &[0, 0, 15, 25][..]), "150 and 1150 frames");
    toc[2] = 1;
    assert_eq!(data(&mut unit, &toc)[..4], [0, 10, 1, 1]);
    toc[2] = 5;
    assert_eq!(sense(&mut unit, &toc), Sense::INVALID_FIELD);
    assert_eq!(data(&mut unit, &ten(op::READ_DISC_INFORMATION, 0, 255)).len(), 34);
    assert_eq!(data(&mut unit, &ten(op::GET_CONFIGURATION, 0, 255))[7], 0x08, "a CD");
    assert_eq!(data(&mut cdrom(400_000), &ten(op::GET_CONFIGURATION, 0, 255))[7], 0x10, "a DVD");
    let mut empty = cdrom(0);
    for cdb in [ten(0, 0, 0), ten(op::READ_10, 0, 1), ten(op::READ_CAPACITY_10, 0, 0), ten(op::READ_TOC, 0, 255)] {
        assert_eq!(sense(&mut empty, &cdb), Sense::NO_MEDIUM, "{cdb:x?}");
    }
    assert_eq!(data(&mut empty, &ten(op::GET_CONFIGURATION, 0, 255))[6..8], [0, 0], "no profile");
}

#[test]
fn media_come_and_go_and_the_guest_is_told() {
    let event = |unit: &mut Unit| {
        let mut cdb = ten(op::GET_EVENT_STATUS, 0, 8);
        (cdb[1], cdb[4]) = (1, 0x10);
        let data = data(unit, &cdb);
        assert_eq!(data[..4], [0, 6, 4, 0x10]);
        (data[4], data[5])
    };
    let mut unit = cdrom(0);
    assert_eq!(event(&mut unit), (0, 0));
    unit.change_medium(Some(medium(10)), false).unwrap();
    assert_eq!(event(&mut unit), (2, 2), "new, present");
    assert_eq!(event(&mut unit), (0, 2), "once");
    assert_eq!(sense(&mut unit, &[0; 6]), Attention::Medium.sense());
    assert!(data(&mut unit, &[0; 6]).is_empty());
    // Locked by the guest: it is asked, and nothing else happens.
    assert!(data(&mut unit, &[op::PREVENT_ALLOW, 0, 0, 0, 1, 0]).is_empty());
    assert_eq!(unit.change_medium(None, false), Err(Refused::Locked));
    assert_eq!((event(&mut unit), unit.blocks()), ((1, 2), 10));
    assert_eq!(sense(&mut unit, &[op::START_STOP_UNIT, 0, 0, 0, 2, 0]), Sense::REMOVAL_PREVENTED);
    data(&mut unit, &[op::PREVENT_ALLOW, 0, 0, 0, 0, 0]);
    // The guest opens the tray, and closes it.
    data(&mut unit, &[op::START_STOP_UNIT, 0, 0, 0, 2, 0]);
    assert_eq!((event(&mut unit), unit.blocks()), ((3, 1), 0));
    assert_eq!(sense(&mut unit, &[0; 6]), Sense::TRAY_OPEN);
    assert_eq!(unit.medium(), Some(&medium(10)), "it lies there");
    data(&mut unit, &[op::START_STOP_UNIT, 0, 0, 0, 3, 0]);
    assert_eq!(event(&mut unit), (2, 2));
    assert_eq!(sense(&mut unit, &[0; 6]), Attention::Medium.sense());
    // With a paper clip.
    data(&mut unit, &[op::PREVENT_ALLOW, 0, 0, 0, 1, 0]);
    unit.change_medium(None, true).unwrap();
    assert_eq!((event(&mut unit), sense(&mut unit, &[0; 6])), ((3, 0), Sense::NO_MEDIUM));
    assert_eq!(disk().change_medium(None, true), Err(Refused::NoDrive));
}

#[test]
fn a_unit_that_is_not_there_says_so() {
    let Reply::Data(inquiry) = Unit::absent(&[op::INQUIRY, 0, 0, 0, 36, 0]) else { panic!() };
    assert_eq!(inquiry[0], 0x7f);
    assert_eq!(Unit::absent(&[0; 6]), Reply::Check(Sense::NO_UNIT));
    let luns = [op::REPORT_LUNS, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0];
    assert_eq!(Unit::absent(&luns), Reply::Data([vec![0, 0, 0, 8], vec![0; 12]].concat()));
    assert_eq!(data(&mut disk(), &luns).len(), 16);
}

#[test]
fn any_command_at_all_is_answered_within_the_medium() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()
    };
    let mut units = [disk(), cdrom(5000), Unit::disk("ro", true)];
    for i in 0..60_000usize {
        let unit = &mut units[i % 3];
        let mut cdb = [random(), random()].concat();
        if i % 2 == 0 {
            cdb[0] = COMMANDS[i / 2 % COMMANDS.len()].opcode;
            // Small numbers reach further.
            cdb[2..].iter_mut().for_each(|byte| *byte &= *byte >> 4 & 3);
        }
        let parameters = [random(), random(), random(), [0; 8]].concat();
        let blocks = unit.blocks() * unit.block();
        let reply = unit.command(&cdb[..6 + i % 11], &parameters);
        match reply {
            Reply::Do(
                Work::Read { at, len }
                | Work::Write { at, len, .. }
                | Work::Verify { at, len, .. }
                | Work::Fill { at, len, .. },
            ) => {
                assert!(len > 0 && at + len <= blocks, "{cdb:x?}");
            }
            Reply::Do(Work::Zero { runs, .. }) => {
                assert!(runs.iter().all(|(first, n)| (first + n) * 512 <= blocks), "{cdb:x?}");
            }
            Reply::Data(data) => assert!(data.len() < 1 << 12),
            _ => {}
        }
        if i % 1000 == 0 {
            unit.set_blocks(BLOCKS);
            let mut other = unit.clone();
            other.restore(unit.save()).unwrap();
            assert_eq!(other, *unit);
        }
    }
}
