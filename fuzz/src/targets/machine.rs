//! `vmm`: saved machines, kernels, and guests that do anything to their devices.

use std::fs;

use understudy_protocol::watchdog::{WatchdogAction, WatchdogModel, WatchdogSpec};
use understudy_vmm::boot::{ACPI_START, LinuxBoot};
use understudy_vmm::container;
use understudy_vmm::devices::acpi_pm::AcpiPm;
use understudy_vmm::devices::i6300esb::I6300esb;
use understudy_vmm::devices::i8042::{I8042, Port92};
use understudy_vmm::devices::pci::PciBus;
use understudy_vmm::devices::rtc::Rtc;
use understudy_vmm::devices::scsi::{self, Medium, Reply, Unit, Work};
use understudy_vmm::devices::uart16550::Uart16550;
use understudy_vmm::devices::virtio::block::{Block, Kind, OUT_MAX, Outcome};
use understudy_vmm::devices::virtio::net::{FRAME, Net, NetConfig};
use understudy_vmm::devices::virtio::{Console, Rng, Scsi, VirtioPci};
use understudy_vmm::devices::{Action, Ctx, GuestRam, Payload, Payloads, PioDevice, Snapshot, VmTime};
use understudy_vmm::memory::Ram;
use understudy_vmm::net::packet::{HEADER, Packet};

use vm_memory::{Bytes, GuestAddress};

use super::with_dir;
use crate::input::Input;

/// Base of the window that the functions' registers are in.
pub const BARS: u64 = 0xc000_0000;
const RAM_BYTES: usize = 0x4_0000;

/// A bus with one of each virtio function, and RAM for their rings.
pub fn bus() -> (PciBus, GuestRam) {
    let mut bus = PciBus::new();
    // Both slots are free and the window is large enough: this cannot fail.
    bus.add(4, Box::new(VirtioPci::new(Rng::new()))).expect("slot 4");
    bus.add(5, Box::new(VirtioPci::new(Console::new()))).expect("slot 5");
    bus.assign_bars(BARS..BARS + 0x10_0000).expect("a window for the registers");
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("a little RAM");
    (bus, ram)
}

/// A saved machine as it is, then its payloads in a container whose checksum is right; and each payload's bytes as the state of
/// each device.
pub fn container(bytes: &[u8]) {
    let _ = container::decode(bytes).map(restore);
    if let Some(body) = bytes.get(16..) {
        let mut sealed = bytes.to_vec();
        sealed[12..16].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
        let _ = container::decode(&sealed).map(restore);
    }
    let mut input = Input::new(bytes);
    let which = input.byte();
    let state = input.rest();
    match which % 8 {
        0 => one(Uart16550::new(), state, |uart| {
            uart.tick(VmTime(1 << 40));
            let _ = (uart.take_output(), uart.rx_room(VmTime(1 << 41)));
        }),
        1 => one(Rtc::new(1_600_000_000, 1 << 30, 0), state, |rtc| rtc.tick(VmTime(1 << 40))),
        2 => one(I8042::new(), state, |device| device.tick(VmTime(1))),
        3 => one(Port92::new(), state, |device| device.tick(VmTime(1))),
        4 => one(AcpiPm::new(), state, |pm| pm.tick(VmTime(1 << 40))),
        5 => one(VirtioPci::new(Console::new()), state, |_| {}),
        6 => one(VirtioPci::new(Rng::new()), state, |_| {}),
        _ => one(PciBus::new(), state, |_| {}),
    }
}

/// `state` as the state of a device: refused, or a device that works and saves what it was given.
fn one<D: Snapshot>(mut device: D, state: &[u8], exercise: impl FnOnce(&mut D)) {
    let payload = Payload { kind: D::KIND.into(), name: "x".into(), version: D::VERSION, bytes: state.to_vec() };
    if payload.restore_into(&mut device).is_ok() {
        let saved = Payload::of(&device, "x");
        assert!(saved.restore_into(&mut device).is_ok(), "{} does not take its own state", D::KIND);
        assert_eq!(Payload::of(&device, "x"), saved);
        exercise(&mut device);
    }
}

fn restore(mut payloads: Payloads) {
    let (mut bus, _) = bus();
    let _ = bus.restore_payloads(&mut payloads);
    for name in ["com1", "com2"] {
        let mut uart = Uart16550::new();
        let _ = payloads.restore(&mut uart, name);
        uart.tick(VmTime(1 << 40));
    }
    let _ = payloads.restore(&mut Rtc::new(1_600_000_000, 1 << 30, 0), "rtc");
    let _ = payloads.restore(&mut AcpiPm::new(), "pm");
    let _ = payloads.restore(&mut I8042::new(), "i8042");
    let _ = payloads.restore(&mut Port92::new(), "port92");
    let _ = payloads.finish();
}

/// A kernel, loaded into the RAM of a small machine.
pub fn bzimage(bytes: &[u8]) {
    with_dir(|dir| {
        let (kernel, ram) = (dir.join("kernel"), dir.join("ram"));
        // Large enough that the default load address can be reached; sparse.
        if fs::write(&kernel, bytes).is_err() {
            return;
        }
        let Ok(linux) = LinuxBoot::open(&kernel, Some(&kernel), "quiet") else { return };
        let Ok(ram) = Ram::open(&ram, 32) else { return };
        let _ = linux.load(&ram, ACPI_START);
    });
}

/// Write a descriptor: address, length, flags, the next one (virtio 1.2, 2.7.5).
fn describe(ram: &GuestRam, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
    // What lies outside of RAM is not there; so it is for a guest.
    let _ = ram.write_obj(addr, GuestAddress(at));
    let _ = ram.write_obj(len, GuestAddress(at + 8));
    let _ = ram.write_obj(flags, GuestAddress(at + 12));
    let _ = ram.write_obj(next, GuestAddress(at + 14));
}

/// Put a chain into the available ring of the queue whose descriptor table is here.
fn offer(ram: &GuestRam, table: u64, head: u16) {
    let ring = table + 0x400;
    let next: u16 = ram.read_obj(GuestAddress(ring + 2)).unwrap_or(0);
    let _ = ram.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(next % SIZE)));
    let _ = ram.write_obj(next.wrapping_add(1), GuestAddress(ring + 2));
}

/// A guest that puts anything into RAM, rings and registers, and a host that hands in and takes out.
pub fn virtio(bytes: &[u8]) {
    let (mut bus, ram) = bus();
    let mut input = Input::new(bytes);
    let mut now = VmTime(0);
    for slot in [0, 1] {
        set_up(&mut bus, &ram, slot, input.byte().is_multiple_of(2));
    }
    while !input.is_empty() {
        let ctx = Ctx { now, ram: &ram };
        let what = input.byte();
        let slot = u64::from(input.byte() % 2);
        let register = |offset: u64| (BARS + slot * 0x8000).wrapping_add(offset);
        match what % 10 {
            0 => _ = bus.mmio_write(register(u64::from(input.byte())), input.piece(), &ctx),
            1 => _ = bus.mmio_write(register(input.odd_number().wrapping_mul(0x100)), input.piece(), &ctx),
            2 => _ = bus.mmio_read(register(input.odd_number()), &mut [0; 8][..usize::from(input.byte() % 9)], &ctx),
            3 => {
                let port = input.byte() % 8;
                let _ = bus.io_write(u16::from(port), input.piece(), &ctx);
            }
            4 => _ = ram.write_slice(input.piece(), GuestAddress(u64::from(input.byte()) * 0x400)),
            5 => {
                let (queue, index) = (u64::from(input.byte() % 2), u64::from(input.byte() % 16));
                let descriptor = table(slot, queue) + 16 * index;
                let address =
                    if input.byte().is_multiple_of(4) { input.number() } else { 0x400 * u64::from(input.byte()) };
                let _ = ram.write_obj(address, GuestAddress(descriptor));
                let _ = ram.write_slice(input.bytes(8), GuestAddress(descriptor + 8));
            }
            6 => {
                let queue = u64::from(input.byte() % 2);
                offer(&ram, table(slot, queue), u16::from(input.byte()));
            }
            7 => {
                let queue = u64::from(input.byte() % 2);
                let _ = bus.mmio_write(register(0x3000 + 4 * queue), &(queue as u16).to_le_bytes(), &ctx);
            }
            8 => {
                let given = input.piece();
                if let Some(rng) = bus.get_mut::<VirtioPci<Rng>>(4) {
                    assert!(rng.want_entropy() <= understudy_vmm::devices::virtio::rng::WANT_MAX);
                    rng.fill(given, &ctx);
                }
                if let Some(console) = bus.get_mut::<VirtioPci<Console>>(5) {
                    let room = console.input_room();
                    assert!(console.receive(given, &ctx) <= room);
                    assert!(console.take_output().len() <= understudy_vmm::devices::virtio::console::OUTPUT_MAX);
                    console.set_output_room(given.len() * 16, &ctx);
                }
            }
            _ => {
                now = bus.deadline().unwrap_or(now).max(now.plus(u64::from(input.byte())));
                let _ = bus.tick(&Ctx { now, ram: &ram });
            }
        }
        bus.take_msi();
    }
    let saved = bus.save_payloads();
    let (mut other, _) = self::bus();
    let taken = Payloads::new(saved.clone()).and_then(|mut payloads| other.restore_payloads(&mut payloads));
    assert_eq!(taken, Ok(()), "what was saved is taken back");
    assert_eq!(other.save_payloads(), saved);
}

/// Sectors of the disk.
const SECTORS: u64 = 64;

/// A disk with two queues, alone on its bus.
pub fn disk() -> PciBus {
    let mut bus = PciBus::new();
    // The slot is free and the window is large enough: this cannot fail.
    bus.add(4, Box::new(VirtioPci::new(Block::new(2, false, "vda")))).expect("slot 4");
    bus.assign_bars(BARS..BARS + 0x10_0000).expect("a window for the registers");
    bus
}

/// A guest that puts anything into its disk's rings; whoever does what it asks answers late, wrongly or twice; and a takeover now and then.
pub fn virtio_blk(bytes: &[u8]) {
    let (mut bus, mut input) = (disk(), Input::new(bytes));
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("a little RAM");
    if let Some(disk) = bus.get_mut::<VirtioPci<Block>>(4) {
        disk.set_sectors(SECTORS);
    }
    set_up(&mut bus, &ram, 0, input.byte().is_multiple_of(2));
    let mut out = Vec::new();
    while !input.is_empty() {
        let ctx = Ctx { now: VmTime(0), ram: &ram };
        match input.byte() % 8 {
            0 => _ = bus.mmio_write(BARS + u64::from(input.byte()), input.piece(), &ctx),
            1 => _ = bus.mmio_read(BARS + 0x2000 + input.odd_number() % 0x1000, &mut [0; 8], &ctx),
            2 => _ = ram.write_slice(input.piece(), GuestAddress(u64::from(input.byte()) * 0x100)),
            // A request: header, data, status; perhaps with other flags.
            3 => {
                let (queue, what, sector) = (u64::from(input.byte() % 2), input.byte(), input.odd_number());
                let (at, len, flags) = (u64::from(input.byte()) * 0x100, input.byte(), input.byte());
                let at_table = table(0, queue);
                let _ = ram.write_obj(u64::from(what), GuestAddress(0x8000));
                let _ = ram.write_obj(sector, GuestAddress(0x8008));
                let writes = u16::from(what != 1) * 2;
                let descriptors = [
                    (0x8000, 16, 1, 1),
                    (at, u32::from(len) * 64, 1 | writes ^ u16::from(flags & 2), 2),
                    (0x8100, 1, 2 ^ u16::from(flags >> 6), 0),
                ];
                for (i, (addr, len, flags, next)) in (0u64..).zip(descriptors) {
                    describe(&ram, at_table + 16 * i, (addr, len, flags, next));
                }
                offer(&ram, at_table, 0);
                let _ = bus.mmio_write(BARS + 0x3000 + 4 * queue, &(queue as u16).to_le_bytes(), &ctx);
            }
            4 | 5 => {
                let Some(disk) = bus.get_mut::<VirtioPci<Block>>(4) else { return };
                out.extend(disk.take_requests(&ctx));
                assert!(disk.out() <= OUT_MAX);
                for request in &out {
                    if let Kind::Read { at, len } = request.kind {
                        assert!(at + len as u64 <= disk.device().sectors() * 512);
                    }
                }
            }
            6 => {
                let (which, how) = (usize::from(input.byte()), input.byte());
                let Some(disk) = bus.get_mut::<VirtioPci<Block>>(4) else { return };
                if let Some(request) = out.get(which % out.len().max(1)) {
                    let len = if let Kind::Read { len, .. } = request.kind { len } else { 0 };
                    let outcome = match how % 4 {
                        0 => Outcome::Failed,
                        1 => Outcome::Done(vec![1; len + 1]),
                        _ => Outcome::Done(vec![1; len]),
                    };
                    disk.complete(vec![(request.id, outcome)], &ctx);
                    if how < 0x80 {
                        out.swap_remove(which % out.len());
                    }
                }
            }
            _ => {
                let saved = bus.save_payloads();
                let mut other = disk();
                let taken = Payloads::new(saved.clone()).and_then(|mut all| other.restore_payloads(&mut all));
                assert_eq!(taken, Ok(()), "what was saved is taken back");
                assert_eq!(other.save_payloads(), saved);
                (bus, out) = (other, Vec::new());
            }
        }
        bus.take_msi();
    }
}

/// A controller with a disk, a drive and two queues of commands, alone on its bus.
pub fn scsi() -> PciBus {
    let mut bus = PciBus::new();
    let units = vec![Unit::disk("sda", false), Unit::cdrom("cd0")];
    // The slot is free and the window is large enough: this cannot fail.
    bus.add(4, Box::new(VirtioPci::new(Scsi::new(2, units)))).expect("slot 4");
    bus.assign_bars(BARS..BARS + 0x10_0000).expect("a window for the registers");
    bus
}

/// A guest that puts anything into its SCSI controller's rings, and a person at its drive and disk; answers late, wrong, or twice; and a takeover now
/// and then.
pub fn virtio_scsi(bytes: &[u8]) {
    let (mut bus, mut input) = (scsi(), Input::new(bytes));
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("a little RAM");
    let disc = |bytes: u64| Medium { file: "/a".into(), bytes: bytes * 2048, identity: 0 };
    if let Some(device) = bus.get_mut::<VirtioPci<Scsi>>(4) {
        device.set_sectors(0, SECTORS, &Ctx { now: VmTime(0), ram: &ram });
        device.load_medium(1, Some(disc(16)));
    }
    let features = if input.byte().is_multiple_of(2) { 1 << 29 | 0b110 } else { 0b100 };
    set_up_queues(&mut bus, &ram, 0, features, 4);
    let mut out = Vec::new();
    while !input.is_empty() {
        let ctx = Ctx { now: VmTime(0), ram: &ram };
        match input.byte() % 9 {
            0 => _ = bus.mmio_write(BARS + input.odd_number() % 0x2100, input.piece(), &ctx),
            1 => _ = bus.mmio_read(BARS + 0x2000 + input.odd_number() % 0x1000, &mut [0; 8], &ctx),
            2 => _ = ram.write_slice(input.piece(), GuestAddress(u64::from(input.byte()) * 0x100)),
            // A request of any queue: header, data that is sent, response, data that is wanted.
            3 | 4 => {
                let (queue, target, how) = (u64::from(input.byte() % 4), input.byte(), input.byte());
                let (header, response, data) = (0x8000, 0x8200, 0x9000 + 0x100 * u64::from(input.byte()));
                let mut bytes = match queue {
                    0 => [
                        &[0, 0, 0, 0, how & 7, 0, 0, 0][..],
                        &[1, target % 3, 0x40, 0, 0, 0, 0, 0],
                        &[target % 4, 0, 0, 0, 0, 0, 0, 0],
                    ]
                    .concat(),
                    _ => [&[1, target % 3, 0x40, 0, 0, 0, 0, 0, target % 4][..], &[0; 10], input.piece()].concat(),
                };
                bytes.resize(if queue == 0 { 24 } else { 51 }, 0);
                let _ = ram.write_slice(&bytes, GuestAddress(header));
                let len = 64 * u32::from(input.byte());
                let (sent, wanted) = if how & 0x40 == 0 { (0, len) } else { (len, 0) };
                let spoiled = u32::from(how == 0xff);
                let descriptors = [
                    (header, bytes.len() as u32 - spoiled, 1, 1),
                    (data, sent, 1, 2),
                    (response, if queue == 0 { 1 } else { 108 } - spoiled, 3, 3),
                    (data, wanted, 2, 0),
                ];
                let at_table = table(0, queue);
                for (i, (addr, len, flags, next)) in (0u64..).zip(descriptors) {
                    describe(&ram, at_table + 16 * i, (addr, len, flags, next));
                }
                // An event needs no header.
                let head = if queue == 1 { 3u16 } else { 0 };
                offer(&ram, at_table, head);
                let _ = bus.mmio_write(BARS + 0x3000 + 4 * queue, &(queue as u16).to_le_bytes(), &ctx);
            }
            5 => {
                let Some(device) = bus.get_mut::<VirtioPci<Scsi>>(4) else { return };
                for unit in 0..2 {
                    let blocks = device.device().units()[unit].blocks() * device.device().units()[unit].block();
                    let fresh = device.take_requests_of(unit, &ctx);
                    for request in &fresh {
                        match &request.kind {
                            Kind::Read { at, len } => assert!(at + *len as u64 <= blocks.max(LARGEST)),
                            Kind::Write { at, from, .. } => {
                                let len: usize = from.iter().map(|(_, len)| len).sum();
                                assert!(unit == 0 && at + len as u64 <= LARGEST);
                            }
                            Kind::Fill { at, len, .. } => assert!(unit == 0 && at + len <= LARGEST),
                            Kind::Discard(all) | Kind::WriteZeroes(all) => {
                                assert!(all.iter().all(|r| (r.sector + u64::from(r.sectors)) * 512 <= LARGEST));
                            }
                            Kind::Flush => assert!(unit == 0),
                        }
                    }
                    out.extend(fresh);
                }
                assert!(device.out() <= OUT_MAX);
            }
            6 => {
                let (which, how) = (usize::from(input.byte()), input.byte());
                let Some(device) = bus.get_mut::<VirtioPci<Scsi>>(4) else { return };
                if let Some(request) = out.get(which % out.len().max(1)) {
                    let len = request.kind.reads();
                    let outcome = match how % 4 {
                        0 => Outcome::Failed,
                        1 => Outcome::Done(vec![1; len + 1]),
                        _ => Outcome::Done(vec![1; len]),
                    };
                    device.complete(vec![(request.id, outcome)], &ctx);
                    if how < 0x80 {
                        out.swap_remove(which % out.len());
                    }
                }
            }
            7 => {
                let how = input.byte();
                let Some(device) = bus.get_mut::<VirtioPci<Scsi>>(4) else { return };
                match how % 3 {
                    0 => device.set_sectors(0, u64::from(how), &ctx),
                    1 => _ = device.change_medium(1, Some(disc(u64::from(how))), how >= 0x80, &ctx),
                    _ => _ = device.change_medium(1, None, how >= 0x80, &ctx),
                }
            }
            _ => {
                let saved = bus.save_payloads();
                let mut other = scsi();
                let taken = Payloads::new(saved.clone()).and_then(|mut all| other.restore_payloads(&mut all));
                assert_eq!(taken, Ok(()), "what was saved is taken back");
                assert_eq!(other.save_payloads(), saved);
                (bus, out) = (other, Vec::new());
            }
        }
        bus.take_msi();
    }
}

/// The largest that disk and disc become, in bytes.
const LARGEST: u64 = 255 * 2048;

/// Any command, to a disk and to a drive: the first byte says which, and how much of what follows is its parameter list.
pub fn scsi_command(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut units = [Unit::disk("sda", false), Unit::disk("ro", true), Unit::cdrom("cd0")];
    units[0].set_blocks(SECTORS);
    units[1].set_blocks(SECTORS);
    units[2].load_medium(Some(Medium { file: "/a".into(), bytes: 16 * 2048, identity: 0 }));
    while !input.is_empty() {
        let unit = &mut units[usize::from(input.byte() % 3)];
        let (cdb, parameters) = (input.piece(), input.piece());
        assert!(unit.parameters(cdb) <= scsi::PARAMETER_BYTES.max(512));
        let bytes = unit.blocks() * unit.block();
        match unit.command(cdb, parameters) {
            Reply::Data(data) => assert!(data.len() < 4096),
            Reply::Check(sense) => assert!(sense.key != 0),
            Reply::Do(Work::Flush) => {}
            Reply::Do(Work::Zero { runs, .. }) => assert!(runs.iter().all(|(first, n)| (first + n) * 512 <= bytes)),
            Reply::Do(
                Work::Read { at, len }
                | Work::Write { at, len, .. }
                | Work::Verify { at, len, .. }
                | Work::Fill { at, len, .. },
            ) => assert!(len > 0 && at + len <= bytes),
        }
        let _ = Unit::absent(cdb);
        let saved = unit.save();
        assert_eq!(unit.restore(saved.clone()), Ok(()));
        assert_eq!(unit.save(), saved);
    }
}

/// A bus with a network card of two pairs of queues.
fn network() -> PciBus {
    let mac = understudy_protocol::nic::Mac([2, 0, 0, 0, 0, 1]);
    let config = NetConfig { mac, pairs: 2, offloads: true, mtu: Some(1500) };
    let mut bus = PciBus::new();
    // As in [`bus`].
    bus.add(4, Box::new(VirtioPci::new(Net::new(config)))).expect("slot 4");
    bus.assign_bars(BARS..BARS + 0x10_0000).expect("a window for the registers");
    bus
}

/// What a guest sent must be such that the host's kernel reads nothing behind its frame.
fn sound(packet: &Packet) {
    let field = |at: usize| usize::from(u16::from_le_bytes([packet.header[at], packet.header[at + 1]]));
    let [flags, gso, ..] = packet.header;
    assert!(packet.frame.len() <= FRAME && packet.queue < 2);
    assert!(flags <= 1 && matches!(gso & 0x7f, 0 | 1 | 4) && field(2) <= packet.frame.len());
    assert!(flags == 0 || field(6) + field(8) + 2 <= packet.frame.len());
    assert!(gso == 0 || flags == 1 && field(4) > 0 && field(2) > field(6));
}

/// A network card: its registers, its rings, its commands, packets from both sides, takeovers.
pub fn virtio_net(bytes: &[u8]) {
    let (mut bus, mut input) = (network(), Input::new(bytes));
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("a little RAM");
    // Not all that is offered.
    let features = u32::from_le_bytes([0xaf, 0x99 & input.byte() | 0x20, input.byte(), 0x20]);
    set_up_queues(&mut bus, &ram, 0, features, 5);
    while !input.is_empty() {
        let ctx = Ctx { now: VmTime(0), ram: &ram };
        match input.byte() % 8 {
            0 => _ = bus.mmio_write(BARS + u64::from(input.byte()), input.piece(), &ctx),
            1 => _ = bus.mmio_read(BARS + 0x2000 + input.odd_number() % 0x1000, &mut [0; 8], &ctx),
            2 => _ = ram.write_slice(input.piece(), GuestAddress(u64::from(input.byte()) * 0x100)),
            // Something in a ring: to send, as a buffer, or as a command with its acknowledgement.
            3 => {
                let (queue, parts) = (u64::from(input.byte() % 5), u64::from(input.byte() % 4));
                let at_table = table(0, queue);
                for i in 0..=parts {
                    let last = i == parts;
                    let writes = queue % 2 == 0 && (queue != 4 || last);
                    let flags = u16::from(!last) | u16::from(writes) << 1;
                    let (addr, len) = (0x8000 + 0x800 * i, input.odd_number());
                    let _ = ram.write_slice(input.piece(), GuestAddress(addr));
                    describe(&ram, at_table + 16 * i, (addr, len as u32, flags, i as u16 + 1));
                }
                offer(&ram, at_table, 0);
                let _ = bus.mmio_write(BARS + 0x3000 + 4 * queue, &(queue as u16).to_le_bytes(), &ctx);
            }
            4 => {
                let (pair, len, some) = (u16::from(input.byte() % 3), input.odd_number(), input.piece());
                let mut packet = some.to_vec();
                packet.resize(some.len().max((len as usize % 0x1000 * 16) % (FRAME + HEADER)), 0x55);
                let Some(card) = bus.get_mut::<VirtioPci<Net>>(4) else { return };
                let _ = card.receive(pair, &mut packet, &ctx);
                card.process(ctx.ram);
            }
            5 => {
                let how = input.byte();
                let Some(card) = bus.get_mut::<VirtioPci<Net>>(4) else { return };
                card.set_link(how % 2 == 0);
                card.ask_to_announce();
            }
            6 => {
                let room = input.byte() % 4 > 0;
                let Some(card) = bus.get_mut::<VirtioPci<Net>>(4) else { return };
                let packets = card.take_packets(room, &ctx);
                packets.iter().for_each(sound);
                card.device_mut().give_back(packets.into_iter().map(|packet| packet.frame));
            }
            _ => {
                let saved = bus.save_payloads();
                let mut other = network();
                let taken = Payloads::new(saved.clone()).and_then(|mut all| other.restore_payloads(&mut all));
                assert_eq!(taken, Ok(()), "what was saved is taken back");
                assert_eq!(other.save_payloads(), saved);
                bus = other;
            }
        }
        bus.take_msi();
    }
}

const SIZE: u16 = 8;

/// Where the descriptors of a queue are; its available ring is 0x400 behind, its used ring 0x800.
fn table(slot: u64, queue: u64) -> u64 {
    0x1_0000 + slot * 0x4000 + queue * 0x1000
}

/// As a driver does it: features, queues, ready.
fn set_up(bus: &mut PciBus, ram: &GuestRam, slot: u64, event_idx: bool) {
    set_up_queues(bus, ram, slot, u32::from(event_idx) << 29, 2);
}

fn set_up_queues(bus: &mut PciBus, ram: &GuestRam, slot: u64, features: u32, queues: u16) {
    let ctx = Ctx { now: VmTime(0), ram };
    let mut write = |offset: u64, data: &[u8]| _ = bus.mmio_write(BARS + slot * 0x8000 + offset, data, &ctx);
    for status in [0, 1, 3] {
        write(0x14, &[status]);
    }
    for (half, features) in [(0u32, features), (1, 1)] {
        write(0x08, &half.to_le_bytes());
        write(0x0c, &features.to_le_bytes());
    }
    write(0x14, &[0x0b]);
    for queue in 0..queues {
        write(0x16, &queue.to_le_bytes());
        write(0x18, &SIZE.to_le_bytes());
        write(0x1a, &(queue + 1).to_le_bytes());
        for (at, behind) in [(0x20, 0u64), (0x28, 0x400), (0x30, 0x800)] {
            write(at, &((table(slot, u64::from(queue)) + behind) as u32).to_le_bytes());
            write(at + 4, &[0; 4]);
        }
        write(0x1c, &[1, 0]);
    }
    write(0x14, &[0x0f]);
}

/// Reads and writes of any width at any port of the devices that have ports, as time goes by.
pub fn ports(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut uart = Uart16550::new();
    let mut rtc = Rtc::new(1_600_000_000, 1 << 30, 0);
    let (mut i8042, mut port92, mut pm) = (I8042::new(), Port92::new(), AcpiPm::new());
    let mut now = VmTime(0);
    while !input.is_empty() {
        let which = input.byte();
        let device: &mut dyn Access = match which % 5 {
            0 => &mut uart,
            1 => &mut rtc,
            2 => &mut i8042,
            3 => &mut port92,
            _ => &mut pm,
        };
        let offset = if which < 250 { u16::from(input.byte() % 16) } else { input.number() as u16 };
        match input.byte() % 4 {
            0 => device.get(offset, usize::from(input.byte() % 9), now),
            1 => now = now.plus(input.odd_number().saturating_mul(1_000_000) % WAIT),
            _ => device.put(offset, input.bytes(1 + usize::from(which / 128)), now),
        }
        device.pass(now);
        if which == 0 {
            let room = uart.rx_room(now);
            assert!(uart.receive(input.piece(), now) <= room);
            let _ = uart.take_output();
            uart.set_output_room(usize::from(input.byte()), now);
        }
    }
}

const WATCHDOG: WatchdogSpec = WatchdogSpec { model: WatchdogModel::I6300esb, action: WatchdogAction::Reset };

fn watched() -> PciBus {
    let mut bus = PciBus::new();
    // The slot is free and the window is large enough: this cannot fail.
    bus.add(31, Box::new(I6300esb::new(WATCHDOG))).expect("slot 31");
    bus.assign_bars(BARS..BARS + 0x1000).expect("a window for the registers");
    bus
}

/// Reads and writes of any width at any of a watchdog's registers as time goes by, or any bytes as its state; after each step another machine can go on
/// from there.
pub fn watchdog(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    if input.byte() == 0xff {
        return one(I6300esb::new(WATCHDOG), input.rest(), |device| device.stood_still(u64::MAX));
    }
    let (mut bus, ram) = (watched(), GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("a little RAM"));
    let mut now = VmTime(0);
    while !input.is_empty() {
        let ctx = Ctx { now, ram: &ram };
        match input.byte() % 8 {
            0 => _ = bus.io_write(4 + u16::from(input.byte() % 4), input.piece(), &ctx),
            1 => _ = bus.io_write(0, &(0x8000_f800 | u32::from(input.byte())).to_le_bytes(), &ctx),
            2 => bus.io_read(u16::from(input.byte() % 8), &mut [0; 8][..usize::from(input.byte() % 9)], &ctx),
            3 => _ = bus.mmio_write(BARS + u64::from(input.byte() % 24), input.piece(), &ctx),
            4 => {
                _ = bus.mmio_read(
                    BARS + u64::from(input.byte() % 24),
                    &mut [0; 8][..usize::from(input.byte() % 9)],
                    &ctx,
                )
            }
            5 => {
                for unlock in [0x80, 0x86] {
                    let _ = bus.mmio_write(BARS + 12, &[unlock], &ctx);
                }
                let _ = bus.mmio_write(BARS + u64::from(input.byte() % 16), input.piece(), &ctx);
            }
            6 => {
                let ns = input.odd_number().saturating_mul(100_000_000) % WAIT;
                now = now.plus(ns);
                if let Some(device) = bus.get_mut::<I6300esb>(31).filter(|_| ns.is_multiple_of(3)) {
                    device.stood_still(ns);
                }
            }
            _ => {
                if bus.tick(&ctx) == Action::Reset {
                    bus.reset();
                }
                assert!(bus.deadline().is_none_or(|next| next > now), "a deadline stays due");
            }
        }
        let saved = bus.save_payloads();
        let mut other = watched();
        let mut payloads = Payloads::new(saved.clone()).expect("one payload a device");
        other.restore_payloads(&mut payloads).expect("a machine can go on from any state that another can be in");
        assert_eq!(other.save_payloads(), saved);
        bus = other;
    }
}

/// Longest wait, ns: two weeks. (At the end of time, in 584 years, nothing is later than now.)
const WAIT: u64 = 1 << 50;

/// A device with ports, whatever its type.
trait Access {
    fn get(&mut self, offset: u16, len: usize, now: VmTime);
    fn put(&mut self, offset: u16, data: &[u8], now: VmTime);
    fn pass(&mut self, now: VmTime);
}

impl<D: PioDevice> Access for D {
    fn get(&mut self, offset: u16, len: usize, now: VmTime) {
        self.read(offset, &mut [0; 8][..len.min(8)], now);
    }
    fn put(&mut self, offset: u16, data: &[u8], now: VmTime) {
        let _ = self.write(offset, data, now);
    }
    fn pass(&mut self, now: VmTime) {
        self.tick(now);
        assert!(self.deadline().is_none_or(|next| next > now), "a deadline stays due");
    }
}
