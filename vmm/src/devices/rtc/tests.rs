use super::super::testing::{assert_ticks_are_invisible, hammer, snapshot_tests};
use super::*;

/// 2026-11-22 11:32:09, a Sunday.
const BASE: u64 = 1_795_347_129;
const SEC: u64 = 1_000_000_000;

fn clock() -> Rtc {
    Rtc::new(BASE, 512 << 20, 0)
}

fn read(rtc: &mut Rtc, index: u8, now: u64) -> u8 {
    assert_eq!(rtc.write(0, &[index], VmTime(now)), Action::None);
    let mut data = [0];
    rtc.read(1, &mut data, VmTime(now));
    data[0]
}

fn write(rtc: &mut Rtc, index: u8, value: u8, now: u64) {
    assert_eq!(rtc.write(0, &[index | 0x80], VmTime(now)), Action::None);
    assert_eq!(rtc.write(1, &[value], VmTime(now)), Action::None);
}

fn time(rtc: &mut Rtc, now: u64) -> [u8; 8] {
    Rtc::TIME_REGISTERS.map(|index| read(rtc, index, now))
}

fn used() -> Rtc {
    let mut rtc = clock();
    write(&mut rtc, 0x0b, 0x76, 3 * SEC);
    write(&mut rtc, 0x01, 0xff, 3 * SEC);
    write(&mut rtc, 0x40, 0xa5, 5 * SEC);
    write(&mut rtc, 0x04, 3, 5 * SEC);
    rtc
}

snapshot_tests! {
    fresh: clock(),
    used: used(),
    exercise: |rtc| {
        for index in 0..128 {
            read(rtc, index, 77 * SEC);
        }
        write(rtc, 0x04, 0xff, 78 * SEC);
        rtc.tick(VmTime(u64::MAX));
        rtc.deadline();
    },
    golden: "0480010eff2000030001160b1a26765000000000000000008002ffff0000000000000000000000000000000000000000000000ffff1400001f00000000000000000000a500000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000080e8d7acc3a0a0ea3180e497d012",
}

#[test]
fn when_it_is_ticked_makes_no_difference_to_the_guest() {
    assert_ticks_are_invisible(2, clock);
}

#[test]
fn random_accesses_never_panic() {
    hammer(2, clock, |_, _| {});
}

#[test]
fn the_clock_shows_the_first_boots_time_plus_vm_time() {
    let mut rtc = clock();
    assert_eq!(time(&mut rtc, 0), [0x09, 0x32, 0x11, 0x01, 0x22, 0x11, 0x26, 0x20]);
    assert_eq!(time(&mut rtc, 51 * SEC), [0x00, 0x33, 0x11, 0x01, 0x22, 0x11, 0x26, 0x20]);
    assert_eq!(time(&mut rtc, 86_400 * SEC), [0x09, 0x32, 0x11, 0x02, 0x23, 0x11, 0x26, 0x20]);
}

#[test]
fn binary_and_twelve_hour_modes() {
    let mut rtc = clock();
    write(&mut rtc, 0x0b, 0x06, 0);
    assert_eq!(time(&mut rtc, 0), [9, 32, 11, 1, 22, 11, 26, 20]);
    write(&mut rtc, 0x0b, 0x04, 0);
    for (hours, shown) in [(0, 11), (1, 12 | 0x80), (2, 1 | 0x80), (13, 12), (14, 1)] {
        assert_eq!(read(&mut rtc, 0x04, hours * 3600 * SEC), shown, "{hours} hours later");
    }
}

#[test]
fn setting_the_time_as_linux_does() {
    let mut rtc = clock();
    let now = 7 * SEC + SEC / 2;
    write(&mut rtc, 0x0b, 0x82, now);
    write(&mut rtc, 0x0a, 0x76, now);
    for (index, value) in
        [(0x09, 0x30), (0x08, 0x02), (0x07, 0x28), (0x04, 0x23), (0x02, 0x59), (0x00, 0x58), (0x32, 0x20)]
    {
        write(&mut rtc, index, value, now);
    }
    assert_eq!(read(&mut rtc, 0x00, now + 10 * SEC), 0x58, "stands while it is set");
    write(&mut rtc, 0x0b, 0x02, now + 10 * SEC);
    write(&mut rtc, 0x0a, 0x26, now + 10 * SEC);
    assert_eq!(time(&mut rtc, now + 12 * SEC)[..6], [0x00, 0x00, 0x00, 0x06, 0x01, 0x03]);
}

#[test]
fn update_in_progress_shows_just_before_the_second_changes() {
    let mut rtc = clock();
    assert_eq!(read(&mut rtc, 0x0a, SEC - 245_000), 0x26);
    assert_eq!(read(&mut rtc, 0x0a, SEC - 244_000), 0xa6);
    assert_eq!(read(&mut rtc, 0x0a, SEC), 0x26);
    assert_eq!(read(&mut rtc, 0x0d, SEC), 0x80);
}

#[test]
fn the_periodic_interrupt_comes_at_its_rate() {
    let mut rtc = clock();
    write(&mut rtc, 0x0b, 0x42, 0);
    let mut now = 0;
    for n in 1..=1024 {
        now = rtc.deadline().unwrap().0;
        assert!(!rtc.irq_level());
        rtc.tick(VmTime(now));
        assert!(rtc.irq_level(), "interrupt {n}");
        assert_eq!(rtc.deadline(), None, "pending until register C is read");
        assert_eq!(read(&mut rtc, 0x0c, now) & 0xc0, 0xc0);
    }
    assert_eq!(now, SEC);
}

#[test]
fn the_alarm_rings_at_its_time_and_the_update_interrupt_every_second() {
    let mut rtc = clock();
    for (index, value) in [(0x01, 0x30), (0x03, 0x35), (0x05, 0x11)] {
        write(&mut rtc, index, value, 0);
    }
    write(&mut rtc, 0x0b, 0x22, 0);
    assert_eq!(rtc.deadline(), Some(VmTime(201 * SEC)));
    rtc.tick(VmTime(201 * SEC));
    assert!(rtc.irq_level());
    assert_eq!(read(&mut rtc, 0x0c, 201 * SEC) & 0xa0, 0xa0);
    assert_eq!(rtc.deadline(), Some(VmTime((201 + 86_400) * SEC)), "again tomorrow");
    write(&mut rtc, 0x05, 0xff, 201 * SEC);
    assert_eq!(rtc.deadline(), Some(VmTime((201 + 3_600) * SEC)), "any hour");
    write(&mut rtc, 0x0b, 0x12, 201 * SEC);
    assert_eq!(rtc.deadline(), Some(VmTime(202 * SEC)));
    write(&mut rtc, 0x0b, 0x22, 201 * SEC);
    write(&mut rtc, 0x05, 0x77, 201 * SEC);
    assert_eq!(rtc.deadline(), None, "an hour that never comes");
}

#[test]
fn cmos_tells_the_size_of_ram() {
    let mut rtc = Rtc::new(BASE, 3 << 30, 5 << 30);
    let mut word = |at| u32::from(read(&mut rtc, at, 0)) | u32::from(read(&mut rtc, at + 1, 0)) << 8;
    assert_eq!(word(0x15), 640);
    assert_eq!(word(0x17), 0xffff);
    assert_eq!(word(0x34) * 64 + 16 * 1024, 3 << 20);
    assert_eq!((word(0x5b) | word(0x5d) << 16 & 0xff_0000) * 64, 5 << 20);
}

#[test]
fn a_machine_reset_keeps_the_time_and_disarms_the_interrupts() {
    let mut rtc = used();
    let before = rtc.unix_ns(VmTime(10 * SEC));
    rtc.reset(VmTime(10 * SEC));
    assert_eq!(rtc.unix_ns(VmTime(10 * SEC)), before);
    assert!(!rtc.irq_level());
    assert_eq!(rtc.deadline(), None);
}
