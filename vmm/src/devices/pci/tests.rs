use vm_memory::GuestAddress;

use super::super::testing::{Step, snapshot_tests, steps};
use super::*;
use crate::devices::GuestRam;

pub fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// A function with a 4 KiB BAR that remembers what was written, INTA, and two MSI-X vectors.
struct Probe {
    config: ConfigSpace,
    msix: msix::Msix,
    written: Vec<(u64, Vec<u8>)>,
    level: bool,
}

impl Probe {
    fn new() -> Self {
        let mut config =
            ConfigSpace::new(config::Identity { id: (1, 2), subsystem: (3, 4), class: 0xff0000, revision: 5 });
        config.add_memory_bar(0, 0x1000);
        config.use_inta();
        let msix = msix::Msix::new(&mut config, 2, 0, 0x800, 0xc00);
        Self { config, msix, written: Vec::new(), level: false }
    }
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn config_write(&mut self, offset: u8, data: &[u8], _ctx: &Ctx) {
        self.config.write(offset, data);
        self.msix.sync(&self.config);
    }
    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8], _ctx: &Ctx) {
        match offset {
            0x800..0xc00 => self.msix.read_table(offset - 0x800, data),
            0xc00.. => self.msix.read_pending(offset - 0xc00, data),
            _ => data.fill(offset as u8),
        }
    }
    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8], _ctx: &Ctx) {
        match offset {
            0x800..0xc00 => self.msix.write_table(offset - 0x800, data),
            _ => self.written.push((offset, data.to_vec())),
        }
    }
    fn intx_level(&self) -> bool {
        self.level
    }
    fn take_msi(&mut self, out: &mut Vec<MsiMessage>) {
        self.msix.take(out);
    }
    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset();
    }
    fn save_payloads(&self, _name: &str) -> Vec<Payload> {
        Vec::new()
    }
    fn restore_payloads(&mut self, _payloads: &mut Payloads, _name: &str) -> Result<(), RestoreError> {
        Ok(())
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

struct Bench {
    bus: PciBus,
    ram: GuestRam,
}

impl Bench {
    fn new() -> Self {
        let mut bus = PciBus::new();
        bus.add(3, Box::new(Probe::new())).unwrap();
        Self { bus, ram: ram() }
    }
    fn select(&mut self, slot: u32, register: u32) {
        let address = (1u32 << 31 | slot << 11 | register).to_le_bytes();
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        assert_eq!(self.bus.io_write(0, &address, &ctx), Action::None);
    }
    fn read(&mut self, slot: u32, register: u32, len: usize) -> u32 {
        self.select(slot, register & !3);
        let mut data = [0; 4];
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        self.bus.io_read(4 + (register & 3) as u16, &mut data[..len], &ctx);
        u32::from_le_bytes(data)
    }
    fn write(&mut self, slot: u32, register: u32, data: &[u8]) {
        self.select(slot, register & !3);
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        assert_eq!(self.bus.io_write(4 + (register & 3) as u16, data, &ctx), Action::None);
    }
    fn mmio_write(&mut self, addr: u64, value: u32) {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        assert!(self.bus.mmio_write(addr, &value.to_le_bytes(), &ctx));
    }
    fn mmio_read(&mut self, addr: u64) -> Option<u32> {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        let mut data = [0; 4];
        self.bus.mmio_read(addr, &mut data, &ctx).then(|| u32::from_le_bytes(data))
    }
    fn probe(&mut self) -> &mut Probe {
        self.bus.get_mut(3).unwrap()
    }
}

#[test]
fn the_host_bridge_is_the_one_that_firmware_looks_for() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0, 0x00, 4), 0x1237_8086);
    assert_eq!(bench.read(0, 0x2c, 4), 0x1100_1af4);
    assert_eq!(bench.read(0, 0x0a, 2), 0x0600);
    bench.write(0, 0x59, &[0x30]);
    assert_eq!(bench.read(0, 0x59, 1), 0x30, "PAM0 is writable");
}

#[test]
fn empty_slots_other_buses_and_functions_read_as_ones() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(7, 0, 4), u32::MAX);
    assert_eq!(bench.read(3 | 1 << 5, 0, 4), u32::MAX, "bus 1");
    assert_eq!(bench.read(3, 0x100, 4), u32::MAX, "function 1");
}

#[test]
fn linux_recognises_configuration_mechanism_1() {
    // arch/x86/pci/direct.c: a byte to 0xcfb does not matter, 0x80000000 reads back from 0xcf8.
    let mut bench = Bench::new();
    let ctx = Ctx { now: VmTime(0), ram: &bench.ram };
    assert_eq!(bench.bus.io_write(3, &[0x01], &ctx), Action::None);
    assert_eq!(bench.bus.io_write(0, &0x8000_0000u32.to_le_bytes(), &ctx), Action::None);
    let mut data = [0; 4];
    bench.bus.io_read(0, &mut data, &ctx);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
}

#[test]
fn bytes_and_words_of_a_register_are_reached_by_port() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(3, 0x2e, 2), 4);
    assert_eq!(bench.read(3, 0x08, 1), 5);
    assert_eq!(bench.read(3, 0x0b, 1), 0xff);
    bench.write(3, 0x3c, &[11]);
    assert_eq!(bench.read(3, 0x3c, 2), 0x010b);
    // A dword at 0xcfe: two bytes of the register, then nothing.
    assert_eq!(bench.read(3, 0x2e, 4), 0xffff_0004);
}

#[test]
fn a_bar_tells_its_size_and_moves() {
    let mut bench = Bench::new();
    bench.write(3, 0x10, &[0xff; 4]);
    assert_eq!(bench.read(3, 0x10, 4), 0xffff_f000);
    bench.write(3, 0x14, &[0xff; 4]);
    assert_eq!(bench.read(3, 0x14, 4), 0, "no BAR 1");
    bench.write(3, 0x10, &0xe000_0000u32.to_le_bytes());
    assert_eq!(bench.mmio_read(0xe000_0010), None, "memory decoding is off");
    bench.write(3, 0x04, &[0x02]);
    assert_eq!(bench.mmio_read(0xe000_0010), Some(0x1010_1010));
    bench.mmio_write(0xe000_0ffc & !0x800, 7);
    assert_eq!(bench.probe().written, [(0x7fc, vec![7, 0, 0, 0])]);
    bench.write(3, 0x10, &0xe123_4000u32.to_le_bytes());
    assert_eq!(bench.mmio_read(0xe000_0010), None);
    assert_eq!(bench.mmio_read(0xe123_4020), Some(0x2020_2020));
    assert_eq!(bench.mmio_read(0xe123_5000), None);
}

#[test]
fn assign_bars_places_them_as_firmware_would() {
    let mut bench = Bench::new();
    bench.bus.add(4, Box::new(Probe::new())).unwrap();
    bench.bus.assign_bars(0xc000_0800..0xc000_3000).unwrap();
    assert_eq!(bench.read(3, 0x10, 4), 0xc000_1000);
    assert_eq!(bench.read(4, 0x10, 4), 0xc000_2000);
    assert!(bench.mmio_read(0xc000_2ffc).is_some());
    assert_eq!(bench.bus.assign_bars(0xc000_0800..0xc000_2fff), Err(PciError::NoRoom { slot: 4, size: 0x1000 }));
}

#[test]
fn a_taken_slot_is_refused() {
    let mut bench = Bench::new();
    for slot in [0, 3, 32] {
        assert_eq!(bench.bus.add(slot, Box::new(Probe::new())), Err(PciError::Slot(slot)));
    }
}

#[test]
fn intx_lines_follow_slot_and_pin() {
    assert_eq!(intx_gsi(3, 0), 19);
    assert_eq!(intx_gsi(7, 1), 16);
    let mut bench = Bench::new();
    assert_eq!(bench.bus.intx_levels(), [false; 8]);
    bench.probe().level = true;
    let mut expected = [false; 8];
    expected[3] = true;
    assert_eq!(bench.bus.intx_levels(), expected);
}

#[test]
fn port_cf9_resets_on_the_rising_bit() {
    let mut bench = Bench::new();
    let ctx = Ctx { now: VmTime(0), ram: &bench.ram };
    assert_eq!(bench.bus.io_write(1, &[0x02], &ctx), Action::None);
    let mut data = [0];
    bench.bus.io_read(1, &mut data, &ctx);
    assert_eq!(data, [0x02]);
    assert_eq!(bench.bus.io_write(1, &[0x06], &ctx), Action::Reset);
}

fn with_msix() -> Bench {
    let mut bench = Bench::new();
    bench.bus.assign_bars(0xc000_0000..0xd000_0000).unwrap();
    for (vector, data) in [(0u64, 0x41), (1, 0x42)] {
        bench.mmio_write(0xc000_0800 + 16 * vector, 0xfee0_1000);
        bench.mmio_write(0xc000_0808 + 16 * vector, data);
    }
    bench
}

#[test]
fn msix_messages_wait_for_enable_and_both_masks() {
    let mut bench = with_msix();
    bench.probe().msix.signal(0);
    bench.write(3, 0x42, &0xc000u16.to_le_bytes());
    assert_eq!(bench.bus.take_msi(), Vec::new(), "what was signalled before MSI-X was on is not pending");
    bench.probe().msix.signal(0);
    bench.probe().msix.signal(1);
    bench.probe().msix.signal(0xffff);
    assert_eq!(bench.mmio_read(0xc000_0c00), Some(0b11), "pending bits");
    bench.mmio_write(0xc000_081c, 0);
    assert_eq!(bench.bus.take_msi(), Vec::new(), "still masked as a whole");
    bench.write(3, 0x42, &0x8000u16.to_le_bytes());
    assert_eq!(bench.bus.take_msi(), [MsiMessage { address: 0xfee0_1000, data: 0x42 }]);
    assert_eq!(bench.mmio_read(0xc000_0c00), Some(0b01));
    bench.mmio_write(0xc000_080c, 0);
    assert_eq!(bench.bus.take_msi(), [MsiMessage { address: 0xfee0_1000, data: 0x41 }]);
    bench.probe().msix.signal(1);
    assert_eq!(bench.bus.take_msi().len(), 1);
}

#[test]
fn msix_ignores_odd_accesses() {
    let mut bench = with_msix();
    let before = bench.probe().msix.save();
    let ctx = Ctx { now: VmTime(0), ram: &ram() };
    for (addr, len) in [
        (0xc000_0801u64, 4usize),
        (0xc000_0800, 1),
        (0xc000_0800, 2),
        (0xc000_0804, 8),
        (0xc000_0820, 4),
        (0xc000_0c00, 4),
    ] {
        bench.bus.mmio_write(addr, &vec![0x55; len], &ctx);
    }
    assert_eq!(bench.probe().msix.save(), before);
}

#[test]
fn the_capability_list_leads_to_msix() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(3, 0x06, 2) & 0x10, 0x10);
    let at = bench.read(3, 0x34, 1);
    assert_eq!(bench.read(3, at, 2), 0x0011);
    assert_eq!(bench.read(3, at + 2, 2), 1, "two vectors");
    assert_eq!(bench.read(3, at + 4, 4), 0x800);
    assert_eq!(bench.read(3, at + 8, 4), 0xc00);
}

#[test]
fn random_accesses_never_panic() {
    let mut runner = proptest::test_runner::TestRunner::new(proptest::test_runner::Config {
        cases: 200,
        failure_persistence: None,
        ..Default::default()
    });
    runner
        .run(&(steps(8), steps(0x1000)), |(io, mmio)| {
            let mut bench = with_msix();
            let memory = ram();
            let ctx = Ctx { now: VmTime(0), ram: &memory };
            for step in io {
                match step {
                    Step::Read(o, n) => bench.bus.io_read(o, &mut vec![0; n], &ctx),
                    Step::Write(o, d) => _ = bench.bus.io_write(o, &d, &ctx),
                    _ => {}
                }
            }
            bench.bus.assign_bars(0xc000_0000..0xd000_0000).unwrap();
            for step in mmio {
                match step {
                    Step::Read(o, n) => _ = bench.bus.mmio_read(0xc000_0000 + u64::from(o), &mut vec![0; n], &ctx),
                    Step::Write(o, d) => _ = bench.bus.mmio_write(0xc000_0000 + u64::from(o), &d, &ctx),
                    _ => bench.probe().msix.signal(1),
                }
            }
            bench.bus.take_msi();
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_bus_with_other_slots_refuses_the_state() {
    let state = Bench::new().bus.save();
    assert!(PciBus::new().restore(state).unwrap_err().to_string().contains("slots"));
}

mod bus_state {
    use super::*;

    fn used() -> PciBus {
        let mut bench = Bench::new();
        bench.select(5, 0x44);
        let ram = ram();
        let ctx = Ctx { now: VmTime(0), ram: &ram };
        let _ = bench.bus.io_write(1, &[0x02], &ctx);
        bench.bus
    }

    snapshot_tests! {
        fresh: Bench::new().bus,
        used: used(),
        exercise: |bus| {
            let ram = ram();
            let ctx = Ctx { now: VmTime(0), ram: &ram };
            bus.io_read(4, &mut [0; 4], &ctx);
        },
        golden: "c4d080800802020003",
    }
}

mod host_bridge_state {
    use super::*;

    fn used() -> HostBridge {
        let mut bridge = HostBridge::new();
        bridge.config_mut().write(0x59, &[0x33; 7]);
        bridge.config_mut().write(0x04, &[0x07, 0x01]);
        bridge
    }

    snapshot_tests! {
        fresh: HostBridge::new(),
        used: used(),
        exercise: |bridge| bridge.reset(),
        golden: "80028680371207010000020000060000000000000000000000000000000000000000000000000000000000000000f41a001100000000000000000000000000000000000000000000000000000000000000000000000000000000003333333333333300000000000000000000000000000000000002000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
    }
}
