use proptest::prelude::*;

use super::*;
use crate::devices::GuestRam;
use crate::devices::pci::PciBus;
use crate::devices::testing::snapshot_tests;
use understudy_protocol::watchdog::WatchdogModel;
use vm_memory::GuestAddress;

const SLOT: u8 = 31;
const BASE: u64 = 0xe000_0000;
const SEC: u64 = 1_000_000_000;

fn spec(action: WatchdogAction) -> WatchdogSpec {
    WatchdogSpec { model: WatchdogModel::I6300esb, action }
}

/// A machine with nothing but the watchdog, and a driver that does what Linux's does.
struct Guest {
    bus: PciBus,
    ram: GuestRam,
    now: VmTime,
}

impl Guest {
    fn new(action: WatchdogAction) -> Self {
        let mut bus = PciBus::new();
        bus.add(SLOT, Box::new(I6300esb::new(spec(action)))).unwrap();
        let mut guest = Self { bus, ram: GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap(), now: VmTime(0) };
        guest.firmware();
        guest
    }

    fn firmware(&mut self) {
        self.bus.assign_bars(BASE..BASE + 0x1000).unwrap();
    }

    fn config_write(&mut self, register: u8, data: &[u8]) {
        let ctx = Ctx { now: self.now, ram: &self.ram };
        let address = 0x8000_0000 | u32::from(SLOT) << 11 | u32::from(register & 0xfc);
        let _ = self.bus.io_write(0, &address.to_le_bytes(), &ctx);
        let _ = self.bus.io_write(4 + u16::from(register & 3), data, &ctx);
    }

    fn config_read(&mut self, register: u8, data: &mut [u8]) {
        let ctx = Ctx { now: self.now, ram: &self.ram };
        let address = 0x8000_0000 | u32::from(SLOT) << 11 | u32::from(register & 0xfc);
        let _ = self.bus.io_write(0, &address.to_le_bytes(), &ctx);
        self.bus.io_read(4 + u16::from(register & 3), data, &ctx);
    }

    fn lock(&mut self) -> u8 {
        let mut lock = [0];
        self.config_read(LOCK, &mut lock);
        lock[0]
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        assert!(self.bus.mmio_write(BASE + offset, data, &Ctx { now: self.now, ram: &self.ram }));
    }

    fn word(&mut self, offset: u64) -> u16 {
        let mut word = [0; 2];
        assert!(self.bus.mmio_read(BASE + offset, &mut word, &Ctx { now: self.now, ram: &self.ram }));
        u16::from_le_bytes(word)
    }

    fn unlock(&mut self) {
        self.write(RELOAD, &[0x80]);
        self.write(RELOAD, &[0x86]);
    }

    fn reload(&mut self, value: u16) {
        self.unlock();
        self.write(RELOAD, &value.to_le_bytes());
    }

    /// Linux: probe. Returns whether the driver says that the watchdog had reset the machine.
    fn probe(&mut self, timeout_s: u32) -> bool {
        self.config_write(CONFIG, &0x0003u16.to_le_bytes());
        self.lock();
        self.config_write(LOCK, &[0]);
        self.unlock();
        let was_it = self.word(RELOAD) & 1 << 9 != 0;
        self.reload(1 << 9 | 1 << 8);
        let stage = (timeout_s << 9).to_le_bytes();
        self.unlock();
        self.write(PRELOAD_1, &stage);
        self.unlock();
        self.write(PRELOAD_2, &stage);
        self.reload(1 << 8);
        was_it
    }

    /// Linux: open /dev/watchdog.
    fn start(&mut self, nowayout: bool) {
        self.reload(1 << 8);
        self.config_write(LOCK, &[0x02 | u8::from(nowayout)]);
    }

    /// Linux: write to it.
    fn keepalive(&mut self) {
        self.reload(1 << 8);
    }

    /// Linux: close it after `V`. Returns what the driver takes for success.
    fn stop(&mut self) -> bool {
        self.reload(1 << 8);
        self.config_write(LOCK, &[0]);
        self.lock() & 1 == 0
    }

    /// As the machine's timer thread: ticked at each deadline, and whenever.
    fn pass(&mut self, ns: u64) -> Action {
        let end = self.now.plus(ns);
        while let Some(at) = self.bus.deadline().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            let action = self.bus.tick(&Ctx { now: self.now, ram: &self.ram });
            if action != Action::None {
                return action;
            }
        }
        self.now = end;
        self.bus.tick(&Ctx { now: self.now, ram: &self.ram })
    }

    fn device(&mut self) -> &mut I6300esb {
        self.bus.get_mut(SLOT).unwrap()
    }

    fn status(&mut self) -> WatchdogStatus {
        let now = self.now;
        self.device().status(now)
    }

    fn state(&mut self) -> WatchdogState {
        self.status().state
    }

    /// This machine, taken over by another one in which VM time stands as it stood.
    fn taken_over(&self, action: WatchdogAction) -> Self {
        let mut other = Self::new(action);
        let mut payloads = Payloads::new(self.bus.save_payloads()).unwrap();
        other.bus.restore_payloads(&mut payloads).unwrap();
        payloads.finish().unwrap();
        other.now = self.now;
        other
    }
}

/// Armed by Linux with a timeout of 30 s.
fn armed(action: WatchdogAction) -> Guest {
    let mut guest = Guest::new(action);
    assert!(!guest.probe(30));
    assert_eq!(guest.state(), WatchdogState::NotArmed);
    guest.start(false);
    guest
}

#[test]
fn a_guest_that_feeds_it_is_up_for_ever() {
    let mut guest = armed(WatchdogAction::Reset);
    for _ in 0..100 {
        assert_eq!(guest.pass(20 * SEC), Action::None);
        let status = guest.status();
        assert_eq!((status.state, status.fed_ms_ago, status.expirations), (WatchdogState::Fed, Some(20_000), 0));
        // Linux counts 1000 ticks of 2¹⁵ clocks for a second, and 1024 where it shifts.
        assert_eq!(status.timeout_ms, Some(30_504));
        guest.keepalive();
    }
}

#[test]
fn a_guest_that_does_not_is_reset_after_both_stages() {
    let mut guest = armed(WatchdogAction::Reset);
    assert_eq!(guest.pass(15 * SEC), Action::None);
    assert_eq!(guest.word(STATUS), 0);
    assert_eq!(guest.pass(SEC), Action::None);
    assert_eq!(guest.word(STATUS), 1, "the first stage has passed");
    assert_eq!(guest.pass(14 * SEC), Action::None);
    assert_eq!(guest.pass(SEC), Action::Reset);
    assert_eq!(guest.now.0 / 1_000_000, 30_504);
    assert_eq!(guest.bus.deadline(), None);
    assert_eq!(guest.pass(3600 * SEC), Action::None, "once");
    let status = guest.status();
    assert_eq!((status.state, status.expirations), (WatchdogState::Expired, 1));
    assert_eq!(status.expired_ms_ago, Some(3_600_000));
}

#[test]
fn feeding_it_in_the_second_stage_is_in_time() {
    let mut guest = armed(WatchdogAction::Reset);
    for _ in 0..5 {
        assert_eq!(guest.pass(30 * SEC), Action::None);
        guest.keepalive();
    }
}

#[test]
fn report_and_off_do_what_they_say() {
    let mut guest = armed(WatchdogAction::Off);
    assert_eq!(guest.pass(31 * SEC), Action::PowerOff);
    let mut guest = armed(WatchdogAction::Report);
    assert_eq!(guest.pass(31 * SEC), Action::None);
    assert_eq!(guest.state(), WatchdogState::Expired);
    // It only took long.
    guest.keepalive();
    assert_eq!(guest.state(), WatchdogState::Fed);
    assert_eq!(guest.pass(31 * SEC), Action::None);
    assert_eq!(guest.status().expirations, 2);
    assert!(guest.stop());
    assert_eq!(guest.state(), WatchdogState::NotArmed);
}

#[test]
fn after_its_reset_the_guest_counts_as_hung_until_its_driver_takes_notice() {
    let mut guest = armed(WatchdogAction::Reset);
    assert_eq!(guest.pass(31 * SEC), Action::Reset);
    guest.bus.reset();
    guest.firmware();
    assert_eq!(guest.bus.deadline(), None);
    assert_eq!(guest.pass(60 * SEC), Action::None);
    assert_eq!(guest.state(), WatchdogState::Expired, "it has not come so far as to its driver");
    assert!(guest.probe(30), "the driver says what the reset was");
    assert_eq!(guest.state(), WatchdogState::NotArmed);
    guest.start(false);
    assert_eq!(guest.state(), WatchdogState::Fed);
    let mut second = guest.taken_over(WatchdogAction::Reset);
    assert!(!second.probe(30), "the flag is cleared");
}

#[test]
fn a_guest_that_asks_for_no_output_is_only_reported() {
    let mut guest = armed(WatchdogAction::Reset);
    guest.config_write(CONFIG, &[0x23, 0]);
    assert_eq!(guest.pass(31 * SEC), Action::None);
    assert_eq!(guest.state(), WatchdogState::Expired);
    assert_eq!(guest.word(RELOAD), 0, "the chip's flag is of resets");
}

#[test]
fn nowayout_cannot_be_undone_by_the_guest() {
    let mut guest = Guest::new(WatchdogAction::Reset);
    guest.probe(30);
    guest.start(true);
    assert!(!guest.stop(), "the driver sees that it did not work");
    for (register, data) in [(LOCK, &[0][..]), (LOCK, &[0; 4]), (LOCK, &[4])] {
        guest.config_write(register, data);
        assert_eq!(guest.lock(), 3);
    }
    assert_eq!(guest.pass(31 * SEC), Action::Reset);
    guest.bus.reset();
    assert_eq!(guest.lock(), 0);
}

#[test]
fn nothing_is_fed_or_set_that_was_not_unlocked() {
    let mut guest = armed(WatchdogAction::Reset);
    let attempts: [&[(u64, &[u8])]; 6] = [
        &[(RELOAD, &[0, 1])],
        &[(RELOAD, &[0x80]), (RELOAD, &[0, 1])],
        &[(RELOAD, &[0x86]), (RELOAD, &[0, 1])],
        &[(RELOAD, &[0x86]), (RELOAD, &[0x80]), (RELOAD, &[0, 1])],
        &[(RELOAD, &[0x80]), (PRELOAD_1, &[1, 0, 0, 0]), (RELOAD, &[0x86]), (RELOAD, &[0, 1])],
        // Unlocked once, used twice.
        &[(RELOAD, &[0x80]), (RELOAD, &[0x86]), (PRELOAD_2, &[0, 60, 0, 0]), (RELOAD, &[0, 1])],
    ];
    let before = guest.bus.deadline();
    for writes in attempts {
        assert_eq!(guest.pass(SEC), Action::None);
        for (offset, data) in writes {
            guest.write(*offset, data);
        }
        assert_eq!(guest.bus.deadline(), before, "{writes:x?}");
    }
    assert_eq!(guest.device().preloads, [30 << 9, 30 << 9]);
}

#[test]
fn what_was_left_is_left_after_a_takeover_however_long_that_took() {
    let mut guest = armed(WatchdogAction::Reset);
    for (ran, left) in [(10 * SEC, 20 * SEC), (20 * SEC, 10 * SEC)] {
        guest.keepalive();
        assert_eq!(guest.pass(ran), Action::None);
        // In the checkpoint; then nobody ran it for a while.
        let mut other = guest.taken_over(WatchdogAction::Reset);
        assert_eq!(other.status(), guest.status());
        assert_eq!(other.pass(left), Action::None, "it is not found hung before its time");
        assert_eq!(other.pass(SEC), Action::Reset, "and it is then");
    }
}

#[test]
fn a_guest_that_hung_hangs_after_a_takeover() {
    let mut guest = armed(WatchdogAction::Report);
    assert_eq!(guest.pass(40 * SEC), Action::None);
    let mut other = guest.taken_over(WatchdogAction::Report);
    assert_eq!(other.status(), guest.status());
    assert_eq!(other.state(), WatchdogState::Expired);
}

#[test]
fn it_does_not_count_while_the_vcpus_stand_still() {
    let mut guest = armed(WatchdogAction::Reset);
    assert_eq!(guest.pass(29 * SEC), Action::None);
    // A last cut that nobody committed.
    guest.now = guest.now.plus(60 * SEC);
    guest.device().stood_still(60 * SEC);
    assert_eq!(guest.pass(SEC), Action::None);
    assert_eq!(guest.pass(SEC), Action::Reset);
}

#[test]
fn free_running_is_not_armed() {
    let mut guest = Guest::new(WatchdogAction::Reset);
    guest.probe(30);
    guest.config_write(LOCK, &[0x06]);
    assert_eq!(guest.bus.deadline(), None);
    assert_eq!(guest.state(), WatchdogState::NotArmed);
}

#[test]
fn the_fast_pace_is_a_thousandth() {
    let mut guest = Guest::new(WatchdogAction::Reset);
    guest.probe(30);
    guest.config_write(CONFIG, &[0x07, 0]);
    guest.start(false);
    assert_eq!(guest.status().timeout_ms, Some(29));
    assert_eq!(guest.pass(SEC / 10), Action::Reset);
}

#[test]
fn registers_read_as_they_are_and_the_bar_is_as_large_as_the_chips() {
    let mut guest = armed(WatchdogAction::Reset);
    let mut id = [0; 4];
    guest.config_read(0, &mut id);
    assert_eq!(id, [0x86, 0x80, 0xab, 0x25]);
    assert_eq!((guest.word(PRELOAD_1), guest.word(PRELOAD_2)), (30 << 9, 30 << 9));
    guest.config_write(0x10, &[0xff; 4]);
    let mut size = [0; 4];
    guest.config_read(0x10, &mut size);
    assert_eq!(u32::from_le_bytes(size), 0xffff_fff0);
}

/// Something that a guest does, or that happens to it.
#[derive(Debug, Clone)]
enum Step {
    Config(u8, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Feed,
    Wait(u64),
    StandStill(u64),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bytes = || {
        prop_oneof![
            Just(vec![0x80]),
            Just(vec![0x86]),
            Just(vec![0, 1]),
            Just(vec![0, 3]),
            Just(vec![0; 4]),
            proptest::collection::vec(any::<u8>(), 0..9),
        ]
    };
    let register = prop_oneof![Just(CONFIG), Just(LOCK), any::<u8>()];
    let offset = || prop_oneof![Just(RELOAD), 0..BAR_SIZE as u64];
    let step = prop_oneof![
        3 => (register, bytes()).prop_map(|(register, data)| Step::Config(register, data)),
        2 => (offset(), 0usize..9).prop_map(|(offset, len)| Step::Read(offset, len)),
        6 => (offset(), bytes()).prop_map(|(offset, data)| Step::Write(offset, data)),
        2 => Just(Step::Feed),
        3 => prop_oneof![0..SEC, 0..2000 * SEC].prop_map(Step::Wait),
        1 => (0..100 * SEC).prop_map(Step::StandStill),
        1 => Just(Step::Reset),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_guest_does_it_works_on_and_its_state_can_be_restored(steps in steps()) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut device = I6300esb::new(spec(WatchdogAction::Reset));
        let mut now = VmTime(0);
        for step in steps {
            let ctx = Ctx { now, ram: &ram };
            match step {
                // As the bus: inside of a dword.
                Step::Config(at, data) => {
                    let len = data.len().min(4 - usize::from(at & 3));
                    device.config_write(at, &data[..len], &ctx);
                }
                Step::Read(at, len) => device.bar_read(0, at, &mut vec![0; len], &ctx),
                Step::Write(at, data) => device.bar_write(0, at, &data, &ctx),
                Step::Feed => {
                    for data in [&[0x80][..], &[0x86], &[0, 1]] {
                        device.bar_write(0, RELOAD, data, &ctx);
                    }
                    // Whoever has just fed it has all of its time.
                    let left = device.deadline().map(|at| at.since(now));
                    prop_assert_eq!(left, device.enabled().then(|| device.stage_ns(0)));
                }
                Step::Wait(ns) => {
                    let before = device.expirations;
                    now = now.plus(ns);
                    let action = device.tick(&Ctx { now, ram: &ram });
                    prop_assert!(action == Action::None || device.expirations == before + 1);
                    prop_assert!(device.deadline().is_none_or(|next| next > now), "a deadline stays due");
                }
                Step::StandStill(ns) => {
                    let left = device.deadline().map(|at| at.since(now));
                    now = now.plus(ns);
                    device.stood_still(ns);
                    prop_assert_eq!(device.deadline().map(|at| at.since(now)), left);
                }
                Step::Reset => device.reset(),
            }
            let status = device.status(now);
            prop_assert_eq!(status.timeout_ms.is_some(), device.enabled());
            prop_assert!(status.state != WatchdogState::Fed || device.deadline().is_some());
            let mut other = I6300esb::new(spec(WatchdogAction::Reset));
            Payload::of(&device, "x").restore_into(&mut other).unwrap();
            prop_assert_eq!(other.save(), device.save());
            prop_assert_eq!(other.status(now), status);
        }
    }
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let mut guest = armed(WatchdogAction::Reset);
    let whole = guest.device().save();
    let refused = |change: &dyn Fn(&mut state::V1)| {
        let mut state = whole.clone();
        change(&mut state);
        I6300esb::new(spec(WatchdogAction::Reset)).restore(state).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.preloads[1] = 1 << 20).contains("preloads"));
    assert!(refused(&|s| s.unlocked = 3).contains("unlocked"));
    assert!(refused(&|s| s.phase = Phase::Off).contains("armed"));
    assert!(refused(&|s| s.fed = None).contains("armed"));
    assert!(refused(&|s| s.phase = Phase::Out).contains("expired"));
    assert!(refused(&|s| s.expired = Some(VmTime(1))).contains("expired"));
    assert!(refused(&|s| s.config.truncate(9)).contains("configuration space"));
}

/// Locked, expired once, fed since, in its second stage, half unlocked.
fn used() -> I6300esb {
    let mut guest = Guest::new(WatchdogAction::Report);
    guest.probe(10);
    guest.start(true);
    assert_eq!(guest.pass(11 * SEC), Action::None);
    guest.keepalive();
    assert_eq!(guest.pass(6 * SEC), Action::None);
    guest.write(RELOAD, &[0x80]);
    guest.device().clone()
}

fn exercise(device: &mut I6300esb) {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let _ = device.tick(&Ctx { now: VmTime(u64::MAX), ram: &ram });
    device.stood_still(u64::MAX);
    let _ = device.status(VmTime(0));
    device.bar_write(0, RELOAD, &[0, 1], &Ctx { now: VmTime(u64::MAX), ram: &ram });
}

snapshot_tests! {
    fresh: I6300esb::new(spec(WatchdogAction::Report)),
    used: used(),
    exercise: exercise,
    golden: "80028680ab25070000000000800800000000000000e0000000000000000000000000000000000000000000000000f41a001100000000000000000000\
             000000000000000000000000000000000000000000000000000000000000000000000000000003000000000000000300000000000000000000000000\
             000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
             000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
             000000000000000000000000000000000000802880280102e0e3d8ed4e01010180dc9afd280001",
}
