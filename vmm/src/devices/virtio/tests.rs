use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::super::pci::PciFunction;
use super::super::testing::snapshot_tests;
use super::super::{Ctx, Payloads, Snapshot, VmTime};
use super::testing::{EVENT_IDX, Guest, INDIRECT, NEXT, RAM_SIZE, SIZE, SLOT, VERSION_1, WRITE, ring};
use super::transport::status;
use super::{Console, Rng, VirtioPci, console, rng};

const RX: u16 = 0;
const TX: u16 = 1;

fn console() -> Guest<Console> {
    Guest::ready(Console::new(), VERSION_1 | EVENT_IDX)
}

// ---- transport

#[test]
fn the_function_is_a_modern_virtio_device() {
    let mut guest = Guest::new(Rng::new());
    assert_eq!(guest.config_read(0x00), 0x1044_1af4);
    assert_eq!(guest.config_read(0x08), 0x00ff_0001);
    assert_eq!(guest.config_read(0x3c) >> 8 & 0xff, 1, "INTA");
    assert_eq!(Guest::new(Console::new()).config_read(0x00), 0x1043_1af4);
}

#[test]
fn the_capabilities_lead_to_every_structure() {
    let mut guest = Guest::new(Console::new());
    let mut seen = Vec::new();
    for n in 0..5 {
        let at = guest.capability(0x09, n);
        let header = guest.config_read(at);
        let (len, cfg_type) = (header >> 16 & 0xff, header >> 24);
        assert_eq!(guest.config_read(at + 4) & 0xff, 0, "in BAR 0");
        seen.push((cfg_type, len, guest.config_read(at + 8), guest.config_read(at + 12)));
    }
    assert_eq!(
        seen,
        [(1, 16, 0, 0x1000), (3, 16, 0x1000, 0x1000), (4, 16, 0x2000, 0x1000), (2, 20, 0x3000, 0x1000), (5, 20, 0, 0)]
    );
    let notify = guest.capability(0x09, 3);
    assert_eq!(guest.config_read(notify + 16), 4, "notify_off_multiplier");
    let msix = guest.capability(0x11, 0);
    assert_eq!(guest.config_read(msix) >> 16, 2, "three vectors");
}

#[test]
fn features_are_agreed_only_with_version_1_and_within_the_offer() {
    let mut guest = Guest::new(Rng::new());
    guest.write(0x00, &1u32.to_le_bytes());
    assert_eq!(guest.read::<4>(0x04), 1u32.to_le_bytes(), "VERSION_1 is offered");
    guest.write(0x00, &0u32.to_le_bytes());
    assert_eq!(guest.read::<4>(0x04), 0x3000_0000u32.to_le_bytes(), "INDIRECT_DESC and EVENT_IDX");
    for (features, agreed) in
        [(VERSION_1, true), (VERSION_1 | EVENT_IDX, true), (EVENT_IDX, false), (VERSION_1 | 1, false), (0, false)]
    {
        assert_eq!(guest.negotiate(features) & status::FEATURES_OK != 0, agreed, "{features:#x}");
    }
    guest.write(0x14, &[0x0f]);
    assert_eq!(guest.status() & status::DRIVER_OK, 0, "not without FEATURES_OK");
}

#[test]
fn nothing_is_processed_before_driver_ok() {
    let mut guest = Guest::new(Rng::new());
    guest.negotiate(VERSION_1);
    guest.set_up_queue(0);
    guest.add(0, &[(0x5000, 16, true)]);
    guest.kick(0);
    assert_eq!(guest.device().want_entropy(), 0);
    guest.write(0x14, &[0x0f]);
    assert_eq!(guest.device().want_entropy(), 16, "what was offered before is seen at DRIVER_OK");
}

#[test]
fn queue_registers_are_per_queue_and_settle_when_enabled() {
    let mut guest = Guest::new(Console::new());
    guest.negotiate(VERSION_1);
    assert_eq!(guest.read::<2>(0x12), [2, 0]);
    guest.write(0x16, &[1, 0]);
    assert_eq!(guest.read::<2>(0x18), [64, 0]);
    guest.write(0x18, &[33, 0]);
    assert_eq!(guest.read::<2>(0x18), [64, 0], "33 is not a size");
    guest.write(0x1a, &[9, 0]);
    assert_eq!(guest.read::<2>(0x1a), [0xff, 0xff], "there is no vector 9");
    guest.set_up_queue(1);
    assert_eq!(guest.read::<2>(0x1c), [1, 0]);
    assert_eq!(guest.read::<8>(0x28), ring(1).1.to_le_bytes());
    guest.write(0x20, &[0xff; 8]);
    assert_eq!(guest.read::<8>(0x20), ring(1).0.to_le_bytes(), "an enabled queue does not change");
    guest.write(0x16, &[0, 0]);
    assert_eq!(guest.read::<2>(0x1c), [0, 0]);
    guest.write(0x16, &[7, 0]);
    assert_eq!(guest.read::<2>(0x18), [0, 0], "no queue 7");
    guest.write(0x1c, &[1, 0]);
    guest.write(0x14, &[0]);
    guest.write(0x16, &[1, 0]);
    assert_eq!(guest.read::<2>(0x1c), [0, 0], "reset disables");
    assert_eq!(guest.read::<8>(0x20), [0; 8]);
}

#[test]
fn a_queue_at_an_impossible_place_needs_a_reset() {
    for (at, address) in [
        (0x20, 0x1_0008u64),
        (0x28, 0x1_0001),
        (0x30, 0x1_0002),
        (0x20, RAM_SIZE as u64 - 16),
        (0x30, u64::MAX - 3),
        (0x28, 1 << 40),
    ] {
        let mut guest = Guest::new(Rng::new());
        guest.negotiate(VERSION_1);
        let (descriptors, driver, device) = ring(0);
        for (at, address) in [(0x20, descriptors), (0x28, driver), (0x30, device), (at, address)] {
            guest.write(at, &address.to_le_bytes());
        }
        guest.write(0x1c, &[1, 0]);
        assert!(guest.broken(), "{at:#x} = {address:#x}");
        assert_eq!(guest.read::<2>(0x1c), [0, 0]);
        guest.write(0x14, &[0]);
        assert_eq!(guest.status(), 0, "reset helps");
    }
}

#[test]
fn without_msix_interrupts_go_through_isr_and_inta() {
    let mut guest = console();
    guest.send(TX, 0x5000, b"x");
    guest.kick(TX);
    let line = usize::from(SLOT) % 8;
    assert!(guest.bus.intx_levels()[line]);
    assert_eq!(guest.config_read(0x04) >> 19 & 1, 1, "interrupt status");
    guest.config_write(0x04, &0x0406u16.to_le_bytes());
    assert!(!guest.bus.intx_levels()[line], "INTx disabled by the command register");
    guest.config_write(0x04, &0x0006u16.to_le_bytes());
    assert_eq!(guest.read::<1>(0x1000), [1]);
    assert!(!guest.bus.intx_levels()[line], "reading ISR acknowledges");
    assert_eq!(guest.read::<1>(0x1000), [0]);
}

#[test]
fn with_msix_each_queue_has_its_vector() {
    let mut guest = console();
    guest.enable_msix();
    guest.send(TX, 0x5000, b"x");
    guest.kick(TX);
    assert_eq!(guest.msi_data(), [0x42]);
    guest.add(RX, &[(0x6000, 16, true)]);
    guest.kick(RX);
    assert_eq!(guest.msi_data(), [0u32; 0]);
    assert_eq!(guest.with(|d, ctx| d.receive(b"in", ctx)), 2);
    assert_eq!(guest.msi_data(), [0x41]);
    assert_eq!(guest.read::<1>(0x1000), [0]);
    assert_eq!(guest.bus.intx_levels(), [false; 8]);
}

#[test]
fn event_idx_spares_interrupts_that_the_driver_does_not_want() {
    let mut guest = console();
    guest.enable_msix();
    // used_event = 2: tell me when the third is used.
    let used_event = ring(TX).1 + 4 + 2 * u64::from(SIZE);
    vm_memory::Bytes::write_obj(&guest.ram, 2u16, vm_memory::GuestAddress(used_event)).unwrap();
    let mut interrupts = Vec::new();
    for _ in 0..4 {
        guest.send(TX, 0x5000, b"x");
        guest.kick(TX);
        interrupts.push(guest.msi_data().len());
    }
    assert_eq!(interrupts, [0, 0, 1, 0]);
    let avail_event = ring(TX).2 + 4 + 8 * u64::from(SIZE);
    assert_eq!(guest.bytes(avail_event, 2), [4, 0], "and the device asks to be notified from the next one on");
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let mut guest = Guest::new(Console::new());
    let window = guest.capability(0x09, 4);
    guest.config_write(window + 8, &0x12u32.to_le_bytes());
    guest.config_write(window + 12, &2u32.to_le_bytes());
    assert_eq!(guest.config_read(window + 16), 2, "num_queues");
    guest.config_write(window + 8, &0x14u32.to_le_bytes());
    guest.config_write(window + 12, &1u32.to_le_bytes());
    guest.config_write(window + 16, &3u32.to_le_bytes());
    assert_eq!(guest.status(), 3);
    for (offset, len) in [(0x8000u32, 4u32), (1, 2), (0, 3), (u32::MAX - 3, 4)] {
        guest.config_write(window + 8, &offset.to_le_bytes());
        guest.config_write(window + 12, &len.to_le_bytes());
        guest.config_write(window + 16, &0u32.to_le_bytes());
        guest.config_read(window + 16);
    }
    assert_eq!(guest.status(), 3, "windows outside the BAR or unaligned do nothing");
}

#[test]
fn a_machine_reset_forgets_the_driver() {
    let mut guest = console();
    guest.enable_msix();
    guest.bus.reset();
    guest.bus.assign_bars(super::testing::BASE..super::testing::BASE + 0x10_0000).unwrap();
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.read::<16>(0x4000)[12], 1, "vectors are masked again");
}

// ---- rules of the rings

/// A driver that breaks a rule: (what, how).
type Offence = (&'static str, fn(&mut Guest<Console>));

const OFFENCES: &[Offence] = &[
    ("a chain that loops", |g| {
        g.put_descriptor(ring(TX).0, 0, 0x5000, 1, NEXT, 1);
        g.put_descriptor(ring(TX).0, 1, 0x5000, 1, NEXT, 0);
        g.offer(TX, 0);
    }),
    ("a head outside the table", |g| g.offer(TX, SIZE)),
    ("a next outside the table", |g| {
        g.put_descriptor(ring(TX).0, 0, 0x5000, 1, NEXT, SIZE);
        g.offer(TX, 0);
    }),
    ("a buffer outside RAM", |g| _ = g.add(TX, &[(RAM_SIZE as u64 - 1, 2, false)])),
    ("a buffer at the end of the address space", |g| _ = g.add(TX, &[(u64::MAX, 2, false)])),
    ("a buffer as large as addresses go", |g| _ = g.add(TX, &[(0, u32::MAX, false)])),
    ("a readable buffer after a writable one", |g| _ = g.add(TX, &[(0x5000, 1, true), (0x5000, 1, false)])),
    ("a writable buffer to send", |g| _ = g.add(TX, &[(0x5000, 1, true)])),
    ("an available index that jumps", |g| {
        vm_memory::Bytes::write_obj(&g.ram, SIZE + 1, vm_memory::GuestAddress(ring(TX).1 + 2)).unwrap();
    }),
    ("an available index that goes back", |g| {
        vm_memory::Bytes::write_obj(&g.ram, u16::MAX, vm_memory::GuestAddress(ring(TX).1 + 2)).unwrap();
    }),
    ("an indirect table of no whole entries", |g| {
        g.put_descriptor(ring(TX).0, 0, 0x6000, 17, INDIRECT, 0);
        g.offer(TX, 0);
    }),
    ("an indirect table inside an indirect table", |g| {
        g.put_descriptor(0x6000, 0, 0x6000, 16, INDIRECT, 0);
        g.put_descriptor(ring(TX).0, 0, 0x6000, 16, INDIRECT, 0);
        g.offer(TX, 0);
    }),
    ("an indirect table outside RAM", |g| {
        g.put_descriptor(ring(TX).0, 0, RAM_SIZE as u64, 16, INDIRECT, 0);
        g.offer(TX, 0);
    }),
    ("an indirect chain longer than the queue", |g| {
        for i in 0..2 * SIZE {
            g.put_descriptor(0x6000, i, 0x5000, 1, NEXT, i + 1);
        }
        g.put_descriptor(0x6000, 2 * SIZE, 0x5000, 1, 0, 0);
        g.put_descriptor(ring(TX).0, 0, 0x6000, 16 * (2 * u32::from(SIZE) + 1), INDIRECT, 0);
        g.offer(TX, 0);
    }),
];

#[test]
fn a_driver_that_breaks_the_rings_rules_is_told_to_reset() {
    for (offence, commit) in OFFENCES {
        let mut guest = console();
        guest.enable_msix();
        commit(&mut guest);
        guest.kick(TX);
        assert!(guest.broken(), "{offence}");
        assert_eq!(guest.msi_data(), [0x40], "{offence}: configuration interrupt");
        assert_eq!(guest.device().take_output(), [], "{offence}");
        guest.kick(TX);
        assert_eq!(guest.used(TX).0, 0, "{offence}: nothing more happens");
        assert_eq!(guest.device().input_room(), 0);
        guest.write(0x14, &[0]);
        assert_eq!(guest.status(), 0, "{offence}: a reset helps");
    }
}

#[test]
fn indirect_chains_work() {
    let mut guest = console();
    vm_memory::Bytes::write_slice(&guest.ram, b"helloworld", vm_memory::GuestAddress(0x5000)).unwrap();
    guest.put_descriptor(0x6000, 0, 0x5000, 5, NEXT, 1);
    guest.put_descriptor(0x6000, 1, 0x5005, 5, 0, 0);
    guest.put_descriptor(ring(TX).0, 3, 0x6000, 32, INDIRECT, 0);
    guest.offer(TX, 3);
    guest.kick(TX);
    assert_eq!(guest.device().take_output(), b"helloworld");
    assert_eq!(guest.used(TX), (1, (3, 0)));
}

#[test]
fn what_the_device_writes_is_in_the_dirty_log() {
    let mut guest = Guest::ready(Rng::new(), VERSION_1);
    guest.add(0, &[(0x7ff0, 32, true)]);
    guest.clean();
    guest.kick(0);
    guest.with(|d, ctx| d.fill(&[1; 32], ctx));
    assert!(guest.dirty(0x7ff0) && guest.dirty(0x8000), "the buffer");
    assert!(guest.dirty(ring(0).2), "the used ring");
    assert!(!guest.dirty(ring(0).0) && !guest.dirty(0x9000), "and nothing else");
}

#[test]
fn endless_work_is_done_in_bounded_pieces() {
    // Every slot of the ring is the same empty chain, and the index is always ahead: as if another vCPU kept adding.
    let mut guest = Guest::ready(Rng::new(), VERSION_1);
    guest.put_descriptor(ring(0).0, 0, 0, 0, WRITE, 0);
    let mut used = 0;
    for round in 0..100u16 {
        for _ in 0..SIZE {
            guest.offer(0, 0);
        }
        guest.kick(0);
        used = guest.used(0).0;
        assert_eq!(used, (round + 1) * SIZE);
    }
    assert_eq!(used, 800);
    assert!(!guest.broken());
}

// ---- entropy

#[test]
fn entropy_is_asked_for_and_delivered() {
    let mut guest = Guest::ready(Rng::new(), VERSION_1 | EVENT_IDX);
    guest.add(0, &[(0x5000, 10, true), (0x6000, 6, true)]);
    guest.add(0, &[(0x7000, 8, true)]);
    guest.kick(0);
    assert_eq!(guest.device().want_entropy(), 16);
    let bytes: Vec<u8> = (1..=16).collect();
    guest.with(|d, ctx| d.fill(&bytes, ctx));
    assert_eq!(guest.bytes(0x5000, 10), bytes[..10]);
    assert_eq!(guest.bytes(0x6000, 6), bytes[10..]);
    assert_eq!(guest.used(0), (1, (0, 16)));
    assert_eq!(guest.device().want_entropy(), 8);
    guest.with(|d, ctx| d.fill(&bytes, ctx));
    assert_eq!(guest.device().want_entropy(), 0);
    guest.with(|d, ctx| d.fill(&bytes, ctx));
    guest.add(0, &[(0x7000, 8, true)]);
    guest.kick(0);
    assert_eq!(guest.device().want_entropy(), 8, "entropy that nobody wanted is not kept");
}

#[test]
fn a_huge_buffer_gets_a_bounded_amount_of_entropy() {
    let mut guest = Guest::ready(Rng::new(), VERSION_1);
    guest.add(0, &[(0x8_0000, 0x4_0000, true)]);
    guest.kick(0);
    assert_eq!(guest.device().want_entropy(), rng::WANT_MAX);
    guest.with(|d, ctx| d.fill(&vec![7; 100_000], ctx));
    assert_eq!(guest.used(0), (1, (0, rng::WANT_MAX as u32)));
}

// ---- console

#[test]
fn output_comes_in_order_and_input_goes_where_the_driver_wants_it() {
    let mut guest = console();
    for (i, text) in ["one ", "two ", "three"].iter().enumerate() {
        guest.send(TX, 0x5000 + 0x100 * i as u64, text.as_bytes());
    }
    guest.kick(TX);
    assert_eq!(guest.device().take_output(), b"one two three");
    assert_eq!(guest.with(|d, ctx| d.receive(b"early", ctx)), 5);
    let head = guest.add(RX, &[(0x6000, 3, true), (0x6100, 100, true)]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), (1, (u32::from(head), 5)));
    assert_eq!((guest.bytes(0x6000, 3), guest.bytes(0x6100, 2)), (b"ear".to_vec(), b"ly".to_vec()));
}

#[test]
fn without_room_output_waits_in_the_guest_and_nothing_is_lost() {
    let mut guest = console();
    guest.with(|d, ctx| d.set_output_room(0, ctx));
    guest.send(TX, 0x5000, b"0123456789");
    guest.send(TX, 0x5100, b"abc");
    guest.kick(TX);
    assert_eq!(guest.device().take_output(), []);
    assert_eq!(guest.used(TX).0, 0);
    guest.with(|d, ctx| d.set_output_room(4, ctx));
    assert_eq!(guest.device().take_output(), b"0123");
    assert_eq!(guest.used(TX).0, 0, "a part is not done");
    guest.with(|d, ctx| d.set_output_room(7, ctx));
    assert_eq!(guest.device().take_output(), b"456789a");
    assert_eq!(guest.used(TX).0, 1);
    guest.with(|d, ctx| d.set_output_room(100, ctx));
    assert_eq!(guest.device().take_output(), b"bc");
    assert_eq!(guest.used(TX).0, 2);
}

#[test]
fn input_is_bounded_and_waits_for_a_driver() {
    let mut guest = Guest::new(Console::new());
    assert_eq!(guest.device().input_room(), 0);
    assert_eq!(guest.with(|d, ctx| d.receive(b"x", ctx)), 0);
    let mut guest = console();
    assert_eq!(guest.with(|d, ctx| d.receive(&[0; 5000], ctx)), console::INPUT_MAX);
    assert_eq!(guest.device().input_room(), 0);
}

#[test]
fn a_console_moves_to_another_machine_in_the_middle_of_a_chain() {
    let mut guest = console();
    guest.enable_msix();
    guest.with(|d, ctx| d.set_output_room(4, ctx));
    guest.send(TX, 0x5000, b"0123456789");
    guest.kick(TX);
    assert_eq!(guest.device().take_output(), b"0123");
    let saved = guest.bus.save_payloads();

    let mut other = Guest::new(Console::new());
    other.ram = guest.ram.clone();
    let mut payloads = Payloads::new(saved.clone()).unwrap();
    other.bus.restore_payloads(&mut payloads).unwrap();
    payloads.finish().unwrap();
    assert_eq!(other.bus.save_payloads(), saved);
    assert!(other.bus.deadline().is_some(), "it looks at its queues at once");
    let ram = other.ram.clone();
    other.bus.tick(&Ctx { now: VmTime(0), ram: &ram });
    assert_eq!(other.device().take_output(), b"456789");
    assert_eq!(other.used(TX).0, 1);
    assert_eq!(other.msi_data(), [0x42]);
    assert_eq!(other.bus.deadline(), None);
}

#[test]
fn a_machine_with_other_devices_refuses_the_state() {
    let saved = console().bus.save_payloads();
    let mut other = Guest::new(Rng::new());
    let error = other.bus.restore_payloads(&mut Payloads::new(saved.clone()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("virtio-pci"), "{error}");
    let mut twice = saved.clone();
    twice.extend(saved.clone());
    assert!(Payloads::new(twice).is_err());
    let mut more = saved;
    more.push(super::super::Payload::of(&Rng::new(), "00:1f.0"));
    let mut payloads = Payloads::new(more).unwrap();
    console().bus.restore_payloads(&mut payloads).unwrap();
    assert!(payloads.finish().is_err(), "a payload that nobody takes is an error");
}

// ---- anything goes

/// Something that a hostile guest does.
#[derive(Debug, Clone)]
enum Deed {
    Bar(u64, Vec<u8>),
    BarRead(u64, usize),
    Config(u8, Vec<u8>),
    Ram(u64, Vec<u8>),
    Descriptor(u16, u16, u64, u32, u16, u16),
    Offer(u16, u16),
    Kick(u16),
    Host(u8),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let data = || prop_oneof![proptest::collection::vec(any::<u8>(), 0..9), proptest::collection::vec(0..4u8, 2..=2)];
    let addr = || prop_oneof![4 => 0..RAM_SIZE as u64, 1 => any::<u64>()];
    let deed = prop_oneof![
        4 => (prop_oneof![0..0x40u64, 0..0x8000u64], data()).prop_map(|(o, d)| Deed::Bar(o, d)),
        1 => (0..0x8000u64, 0..9usize).prop_map(|(o, n)| Deed::BarRead(o, n)),
        1 => (any::<u8>(), proptest::collection::vec(any::<u8>(), 1..5)).prop_map(|(o, d)| Deed::Config(o, d)),
        2 => (0x1_0000..0x3_0000u64, data()).prop_map(|(o, d)| Deed::Ram(o, d)),
        6 => (0..2u16, 0..SIZE, addr(), prop_oneof![0..100u32, any::<u32>()], 0..8u16, 0..SIZE + 1)
            .prop_map(|(q, i, a, l, f, n)| Deed::Descriptor(q, i, a, l, f, n)),
        4 => (0..2u16, 0..SIZE + 1).prop_map(|(q, h)| Deed::Offer(q, h)),
        4 => (0..2u16).prop_map(Deed::Kick),
        4 => any::<u8>().prop_map(Deed::Host),
    ];
    proptest::collection::vec(deed, 0..80)
}

fn torment<D: super::VirtioDevice>(make: fn() -> D, host: fn(&mut VirtioPci<D>, u8, &Ctx))
where
    D::State: PartialEq + std::fmt::Debug,
{
    let mut runner = TestRunner::new(Config { cases: 150, failure_persistence: None, ..Config::default() });
    runner
        .run(&(deeds(), any::<bool>()), |(deeds, event_idx)| {
            let mut guest = Guest::ready(make(), VERSION_1 | if event_idx { EVENT_IDX } else { 0 });
            let ram = guest.ram.clone();
            let ctx = Ctx { now: VmTime(0), ram: &ram };
            for deed in deeds {
                match deed {
                    Deed::Bar(o, d) => guest.device().bar_write(0, o, &d, &ctx),
                    Deed::BarRead(o, n) => guest.device().bar_read(0, o, &mut vec![0; n], &ctx),
                    Deed::Config(o, d) => guest.device().config_write(o, &d, &ctx),
                    Deed::Ram(o, d) => vm_memory::Bytes::write_slice(&ram, &d, vm_memory::GuestAddress(o)).unwrap(),
                    Deed::Descriptor(q, i, a, l, f, n) => guest.put_descriptor(ring(q).0, i, a, l, f, n),
                    Deed::Offer(q, h) => guest.offer(q, h),
                    Deed::Kick(q) => guest.device().bar_write(0, 0x3000 + 4 * u64::from(q), &[0, 0], &ctx),
                    Deed::Host(n) => host(guest.device(), n, &ctx),
                }
                guest.bus.take_msi();
                let saved = guest.bus.save_payloads();
                let mut other = Guest::new(make());
                other.bus.restore_payloads(&mut Payloads::new(saved.clone()).unwrap()).unwrap();
                assert_eq!(other.bus.save_payloads(), saved);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_hostile_guest_cannot_make_the_entropy_device_panic() {
    torment(Rng::new, |rng, n, ctx| {
        assert!(rng.want_entropy() <= rng::WANT_MAX);
        rng.fill(&vec![n; usize::from(n)], ctx);
    });
}

#[test]
fn a_hostile_guest_cannot_make_the_console_panic() {
    torment(Console::new, |console, n, ctx| {
        if n % 2 == 0 {
            console.set_output_room(usize::from(n) * 300, ctx);
            assert!(console.take_output().len() <= console::OUTPUT_MAX);
        } else {
            let room = console.input_room();
            assert_eq!(console.receive(&vec![n; usize::from(n)], ctx), room.min(usize::from(n)));
        }
    });
}

// ---- saved state

mod transport_state {
    use super::*;

    fn fresh() -> VirtioPci<Console> {
        VirtioPci::new(Console::new())
    }

    fn used() -> VirtioPci<Console> {
        let mut guest = console();
        guest.send(TX, 0x5000, b"x");
        guest.kick(TX); // INTx: leaves the ISR set
        guest.enable_msix();
        guest.write(0x4000 + 16 * 2 + 12, &[1, 0, 0, 0]);
        guest.send(TX, 0x5000, b"x");
        guest.kick(TX); // masked: leaves a pending bit
        guest.add(RX, &[(0x6000, 4, true)]);
        guest.with(|d, ctx| d.receive(b"in", ctx)); // leaves a message
        guest.write(0x08, &[0, 0, 0, 0]);
        guest.write(0x00, &[1, 0, 0, 0]);
        let saved = guest.device().save();
        let mut device = fresh();
        device.restore(saved).unwrap();
        device
    }

    snapshot_tests! {
        fresh: fresh(),
        used: used(),
        exercise: |device| {
            let guest = Guest::new(Rng::new());
            let ctx = Ctx { now: VmTime(0), ram: &guest.ram };
            device.process(&guest.ram);
            device.set_output_room(100, &ctx);
            device.bar_read(0, 0, &mut [0; 64], &ctx);
            device.config_read(0, &mut [0; 4], &ctx);
            device.take_msi(&mut Vec::new());
        },
        golden: "8002f41a4310070018000100800700000000000000c0000000000000000000000000000000000000000000000000f41a001100000000400000000000000000010000114c02800040000000500000095c1001000000000000000000100000096c1003000000000010000000100000097c100400000000002000000010000009901402000000000030000000100000040000000900140500000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000003808080f70f4000808080f70f4100808080f70f42010001808080f70f410208808004808005808006010101010880800880800980800a02010202010080808080120f010001",
    }
}

mod rng_state {
    use super::*;

    fn used() -> Rng {
        let mut guest = Guest::ready(Rng::new(), VERSION_1);
        guest.add(0, &[(0x5000, 300, true)]);
        guest.kick(0);
        let mut rng = Rng::new();
        rng.restore(guest.device().device().save()).unwrap();
        rng
    }

    snapshot_tests! {
        fresh: Rng::new(),
        used: used(),
        exercise: |rng| _ = rng.save(),
        golden: "ac02",
    }
}

mod console_state {
    use super::*;

    fn used() -> Console {
        let mut guest = console();
        guest.with(|d, ctx| d.set_output_room(300, ctx));
        guest.with(|d, ctx| d.receive(b"input", ctx));
        guest.add(TX, &[(0x5000, 1000, false)]);
        guest.kick(TX);
        guest.device().take_output();
        guest.with(|d, ctx| d.set_output_room(3, ctx));
        let mut console = Console::new();
        console.restore(guest.device().device().save()).unwrap();
        console
    }

    snapshot_tests! {
        fresh: Console::new(),
        used: used(),
        exercise: |console| _ = console.save(),
        golden: "0300000005696e707574af02",
    }
}
