//! What every device's tests have in common.

use std::fmt::Debug;

use proptest::test_runner::{Config, TestRunner};

use super::{Payload, PioDevice, Snapshot, VmTime};

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// `used`'s state goes into `other`, whatever that has been through, and comes out the same.
pub fn assert_restores<D: Snapshot>(used: &D, other: &mut D)
where
    D::State: PartialEq + Debug,
{
    let before = used.save();
    Payload::of(used, "x").restore_into(other).unwrap();
    assert_eq!(other.save(), before);
}

/// Byte by byte damage to a payload is refused or gives a device that still works; it never panics.
pub fn assert_survives_damage<D: Snapshot>(used: &D, mut fresh: impl FnMut() -> D, exercise: impl Fn(&mut D)) {
    let whole = Payload::of(used, "x");
    for i in 0..whole.bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged.bytes[i] ^= flip;
            let mut device = fresh();
            if damaged.restore_into(&mut device).is_ok() {
                exercise(&mut device);
            }
        }
        let mut short = whole.clone();
        short.bytes.truncate(i);
        assert!(short.restore_into(&mut fresh()).is_err(), "a payload cut to {i} bytes was accepted");
    }
    let mut long = whole.clone();
    long.bytes.push(0);
    assert!(long.restore_into(&mut fresh()).is_err());
    let mut newer = whole.clone();
    newer.version += 1;
    assert!(newer.restore_into(&mut fresh()).is_err());
    let mut other = whole;
    other.kind = "another".into();
    assert!(other.restore_into(&mut fresh()).is_err());
}

/// The tests that every device with a [`Snapshot`] passes. `used` makes, deterministically, a device with as many
/// fields away from their first values as possible; `golden` is its state as version 1 wrote it, in hex.
macro_rules! snapshot_tests {
    (fresh: $fresh:expr, used: $used:expr, exercise: $exercise:expr, golden: $golden:expr $(,)?) => {
        #[test]
        fn saved_state_restores_into_a_fresh_device_and_saves_the_same() {
            $crate::devices::testing::assert_restores(&$used, &mut $fresh);
        }

        #[test]
        fn saved_state_restores_over_any_other_state_and_saves_the_same() {
            $crate::devices::testing::assert_restores(&$fresh, &mut $used);
        }

        #[test]
        fn damaged_state_is_refused_or_harmless() {
            $crate::devices::testing::assert_survives_damage(&$used, || $fresh, $exercise);
        }

        #[test]
        fn version_1_is_written_and_read_as_it_always_was() {
            let used = $crate::devices::Payload::of(&$used, "x");
            assert_eq!($crate::devices::testing::hex(&used.bytes), $golden);
            let mut device = $fresh;
            let bytes = $crate::devices::testing::unhex($golden);
            $crate::devices::Payload { bytes, ..used }.restore_into(&mut device).unwrap();
        }
    };
}
pub(crate) use snapshot_tests;

/// One guest access or passage of time.
#[derive(Debug, Clone)]
pub enum Step {
    Read(u16, usize),
    Write(u16, Vec<u8>),
    Wait(u64),
    /// To the device's own deadline.
    Tick,
}

pub fn steps(offsets: u16) -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    // Mostly inside the device's ports, sometimes anywhere.
    let offset = || prop_oneof![9 => 0..offsets, 1 => any::<u16>()];
    let step = prop_oneof![
        3 => (offset(), 0..9usize).prop_map(|(o, n)| Step::Read(o, n)),
        6 => (offset(), proptest::collection::vec(any::<u8>(), 1..3)).prop_map(|(o, d)| Step::Write(o, d)),
        1 => (offset(), proptest::collection::vec(any::<u8>(), 0..9)).prop_map(|(o, d)| Step::Write(o, d)),
        2 => prop_oneof![0..2_000_000u64, 0..1u64 << 50].prop_map(Step::Wait),
        2 => Just(Step::Tick),
    ];
    proptest::collection::vec(step, 0..120)
}

/// Random accesses never panic; after each, `check` holds and a save restores to the same state; after a tick at its
/// deadline the device has a later one, or none.
pub fn hammer<D: PioDevice + Snapshot>(offsets: u16, fresh: impl Fn() -> D, mut check: impl FnMut(&mut D, VmTime))
where
    D::State: PartialEq + Debug,
{
    let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    let check = std::cell::RefCell::new(&mut check);
    runner
        .run(&steps(offsets), |steps| {
            let mut device = fresh();
            let mut now = VmTime(0);
            for step in steps {
                match step {
                    Step::Read(offset, len) => device.read(offset, &mut vec![0; len], now),
                    Step::Write(offset, data) => _ = device.write(offset, &data, now),
                    Step::Wait(ns) => now = now.plus(ns),
                    Step::Tick => {
                        if let Some(at) = device.deadline() {
                            now = now.max(at);
                        }
                        device.tick(now);
                        // Otherwise a timer that keeps its promise would never sleep.
                        assert!(device.deadline().is_none_or(|next| next > now), "the deadline stays due at {now:?}");
                    }
                }
                (check.borrow_mut())(&mut device, now);
                assert_restores(&device, &mut fresh());
            }
            Ok(())
        })
        .unwrap();
}

/// When, and how often, time is told to the device changes nothing that the guest can see: one device is ticked several
/// times in each wait, the other never; both answer the same and end in the same state.
pub fn assert_ticks_are_invisible<D: PioDevice + Snapshot>(offsets: u16, fresh: impl Fn() -> D)
where
    D::State: PartialEq + Debug,
{
    let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    runner
        .run(&steps(offsets), |steps| {
            let (mut ticked, mut left) = (fresh(), fresh());
            let mut now = VmTime(0);
            for step in steps {
                match step {
                    Step::Read(offset, len) => {
                        let (mut a, mut b) = (vec![0; len], vec![0; len]);
                        ticked.read(offset, &mut a, now);
                        left.read(offset, &mut b, now);
                        assert_eq!(a, b, "offset {offset} at {now:?}");
                    }
                    Step::Write(offset, data) => {
                        assert_eq!(ticked.write(offset, &data, now), left.write(offset, &data, now));
                    }
                    Step::Wait(ns) => {
                        for part in 1..=7 {
                            ticked.tick(now.plus(ns / 7 * part));
                        }
                        now = now.plus(ns);
                    }
                    Step::Tick => ticked.tick(now),
                }
            }
            ticked.tick(now);
            left.tick(now);
            assert_eq!(ticked.save(), left.save());
            assert_eq!(ticked.irq_level(), left.irq_level());
            Ok(())
        })
        .unwrap();
}
