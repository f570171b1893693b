//! The transport and the two devices behind it, driven as a guest drives them.

use super::super::{Ctx, Payloads, Snapshot, VmTime};
use super::testing::{EVENT_IDX, Guest, RAM_SIZE, SIZE, SLOT, VERSION_1, ring};
use super::transport::status;
use super::{Console, Rng, console, rng};

mod block;
mod hostile;
mod net;
mod saved;
mod scsi;

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
    assert_eq!(guest.device().take_output(), b"");
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
    let _ = other.bus.tick(&Ctx { now: VmTime(0), ram: &ram });
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
