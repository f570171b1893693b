//! Drivers that break the rules, and guests that do anything at all.

use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::test_runner::{Config, TestRunner};

use super::super::block::{Kind, Outcome};
use super::super::testing::{INDIRECT, NEXT, WRITE};
use super::super::{CHAINS_PER_CALL, VirtioDevice, VirtioPci};
use super::*;
use crate::devices::pci::PciFunction;

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
        assert_eq!(guest.device().take_output(), b"", "{offence}");
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
fn another_vcpu_that_keeps_adding_cannot_hold_the_device_and_is_served_in_the_end() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use vm_memory::{Bytes, GuestAddress};

    let mut guest = Guest::ready(Rng::new(), VERSION_1);
    // An empty buffer: complete without entropy.
    guest.put_descriptor(ring(0).0, 0, 0, 0, WRITE, 0);
    let ram = guest.ram.clone();
    let stop = AtomicBool::new(false);
    let index = |address: u64| ram.load::<u16>(GuestAddress(address), Ordering::SeqCst).unwrap();
    let (available, used) = (ring(0).1 + 2, ring(0).2 + 2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let next = index(available);
                if next.wrapping_sub(index(used)) < SIZE {
                    ram.store(next.wrapping_add(1), GuestAddress(available), Ordering::SeqCst).unwrap();
                }
            }
        });
        for _ in 0..200 {
            let before = index(used);
            guest.kick(0);
            assert!(usize::from(index(used).wrapping_sub(before)) <= CHAINS_PER_CALL);
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest.kick(0);
    while guest.bus.deadline().is_some() {
        let _ = guest.bus.tick(&Ctx { now: VmTime(0), ram: &ram });
    }
    assert_eq!(index(used), index(available));
    assert!(!guest.broken());
}

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

fn torment<D: VirtioDevice>(make: fn() -> D, host: fn(&mut VirtioPci<D>, u8, &Ctx))
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

#[test]
fn a_hostile_guest_cannot_make_the_disk_panic() {
    let make = || {
        let mut disk = VirtioPci::new(super::super::Block::new(2, false, "vda"));
        disk.set_sectors(64);
        let mut device = super::super::Block::new(2, false, "vda");
        device.restore(disk.device().save()).unwrap();
        device
    };
    torment(make, |disk, n, ctx| {
        let requests = disk.take_requests(ctx);
        assert!(disk.out() <= super::super::block::OUT_MAX);
        let outcomes = requests.into_iter().map(|request| match request.kind {
            Kind::Read { at, len } => {
                assert!(at + len as u64 <= 64 * 512);
                (request.id, Outcome::Done(vec![n; len]))
            }
            Kind::Write { at, from, .. } => {
                let len: usize = from.iter().map(|(_, len)| len).sum();
                assert!(at + len as u64 <= 64 * 512);
                assert!(from.iter().all(|(addr, len)| addr + *len as u64 <= RAM_SIZE as u64));
                (request.id, Outcome::Failed)
            }
            _ => (request.id, Outcome::Done(Vec::new())),
        });
        // Some stay out.
        disk.complete(outcomes.filter(|(id, _)| id % 3 != u64::from(n) % 4).collect(), ctx);
    });
}
