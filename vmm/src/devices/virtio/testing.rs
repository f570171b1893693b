//! A small driver for the tests: sets a device up through the bus, as a guest would, and keeps rings in RAM.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::pci::PciBus;
use super::super::{Action, Ctx, GuestRam, MsiMessage, VmTime};
use super::transport::status;
use super::{VirtioDevice, VirtioPci};

pub const BASE: u64 = 0xc000_0000;
pub const SLOT: u8 = 5;
pub const SIZE: u16 = 8;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const RAM_SIZE: usize = 0x10_0000;

/// A machine with one virtio device, and its driver's view.
pub struct Guest<D> {
    pub bus: PciBus,
    pub ram: GuestRam,
    next_descriptor: u16,
    device: std::marker::PhantomData<D>,
}

/// Where queue `q`'s parts lie.
pub fn ring(q: u16) -> (u64, u64, u64) {
    let base = 0x1_0000 + 0x1_0000 * u64::from(q);
    (base, base + 0x4000, base + 0x8000)
}

impl<D: VirtioDevice> Guest<D> {
    pub fn new(device: D) -> Self {
        let mut bus = PciBus::new();
        bus.add(SLOT, Box::new(VirtioPci::new(device))).unwrap();
        bus.assign_bars(BASE..BASE + 0x10_0000).unwrap();
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap();
        Self { bus, ram, next_descriptor: 0, device: std::marker::PhantomData }
    }

    /// Through the whole set-up, queues of [`SIZE`] with vectors 1, 2 …; ready to work.
    pub fn ready(device: D, features: u64) -> Self {
        let mut guest = Self::new(device);
        assert_eq!(guest.negotiate(features) & status::FEATURES_OK, status::FEATURES_OK);
        for q in 0..guest.device().device().queue_sizes().len() as u16 {
            guest.set_up_queue(q);
        }
        guest.write(0x14, &[0x0f]);
        guest
    }

    pub fn negotiate(&mut self, features: u64) -> u8 {
        self.write(0x14, &[0]);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for half in 0..2u32 {
            self.write(0x08, &half.to_le_bytes());
            self.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        self.write(0x14, &[0x0b]);
        self.status()
    }

    pub fn set_up_queue(&mut self, q: u16) {
        let (descriptors, driver, device) = ring(q);
        self.write(0x16, &q.to_le_bytes());
        self.write(0x18, &SIZE.to_le_bytes());
        self.write(0x1a, &(q + 1).to_le_bytes());
        for (at, address) in [(0x20, descriptors), (0x28, driver), (0x30, device)] {
            self.write(at, &(address as u32).to_le_bytes());
            self.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &[1, 0]);
    }

    pub fn device(&mut self) -> &mut VirtioPci<D> {
        self.bus.get_mut(SLOT).unwrap()
    }

    pub fn with<R>(&mut self, f: impl FnOnce(&mut VirtioPci<D>, &Ctx) -> R) -> R {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        f(self.bus.get_mut(SLOT).unwrap(), &ctx)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        assert!(self.bus.mmio_write(BASE + offset, data, &ctx));
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        let mut data = [0; N];
        assert!(self.bus.mmio_read(BASE + offset, &mut data, &ctx));
        data
    }

    pub fn config_read(&mut self, register: u8) -> u32 {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        let address = 1u32 << 31 | u32::from(SLOT) << 11 | u32::from(register & !3);
        assert_eq!(self.bus.io_write(0, &address.to_le_bytes(), &ctx), Action::None);
        let mut data = [0; 4];
        self.bus.io_read(4, &mut data, &ctx);
        u32::from_le_bytes(data)
    }

    pub fn config_write(&mut self, register: u8, data: &[u8]) {
        let ctx = Ctx { now: VmTime(0), ram: &self.ram };
        let address = 1u32 << 31 | u32::from(SLOT) << 11 | u32::from(register & !3);
        assert_eq!(self.bus.io_write(0, &address.to_le_bytes(), &ctx), Action::None);
        assert_eq!(self.bus.io_write(4 + u16::from(register & 3), data, &ctx), Action::None);
    }

    pub fn status(&mut self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    pub fn broken(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Offset of a capability with `id`, by its `n`th occurrence.
    pub fn capability(&mut self, id: u8, n: usize) -> u8 {
        let mut at = self.config_read(0x34) as u8;
        let mut seen = 0;
        while at != 0 {
            let header = self.config_read(at);
            if header as u8 == id {
                if seen == n {
                    return at;
                }
                seen += 1;
            }
            at = (header >> 8) as u8;
        }
        panic!("no capability {id:#x} number {n}");
    }

    /// Switch MSI-X on with all vectors unmasked; vector `v` sends data `0x40 + v`.
    pub fn enable_msix(&mut self) {
        for vector in 0..=self.device().device().queue_sizes().len() as u64 {
            let entry = 0x4000 + 16 * vector;
            self.write(entry, &0xfee0_0000u64.to_le_bytes());
            self.write(entry + 8, &(0x40 + vector as u32).to_le_bytes());
            self.write(entry + 12, &[0; 4]);
        }
        let capability = self.capability(0x11, 0);
        self.config_write(capability + 2, &0x8000u16.to_le_bytes());
        self.write(0x10, &[0, 0]);
    }

    pub fn msi_data(&mut self) -> Vec<u32> {
        self.bus.take_msi().into_iter().map(|MsiMessage { data, .. }| data).collect()
    }

    pub fn put_descriptor(&mut self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.ram.write_obj(addr, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Make `head` available.
    pub fn offer(&mut self, q: u16, head: u16) {
        let (_, driver, _) = ring(q);
        let index: u16 = self.ram.read_obj(GuestAddress(driver + 2)).unwrap();
        self.ram.write_obj(head, GuestAddress(driver + 4 + 2 * u64::from(index % SIZE))).unwrap();
        self.ram.write_obj(index.wrapping_add(1), GuestAddress(driver + 2)).unwrap();
    }

    /// Put a chain of (address, length, writable) into the ring. Returns its head.
    pub fn add(&mut self, q: u16, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor % SIZE;
        for (i, (addr, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor % SIZE;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let last = i + 1 == buffers.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.put_descriptor(ring(q).0, index, *addr, *len, flags, (index + 1) % SIZE);
        }
        self.offer(q, head);
        head
    }

    /// Put `text` into RAM at `addr` and into the ring.
    pub fn send(&mut self, q: u16, addr: u64, text: &[u8]) -> u16 {
        self.ram.write_slice(text, GuestAddress(addr)).unwrap();
        self.add(q, &[(addr, text.len() as u32, false)])
    }

    pub fn kick(&mut self, q: u16) {
        self.write(0x3000 + 4 * u64::from(q), &q.to_le_bytes());
    }

    /// Number of used elements ever, and the newest (head, length).
    pub fn used(&self, q: u16) -> (u16, (u32, u32)) {
        let (_, _, device) = ring(q);
        let index: u16 = self.ram.read_obj(GuestAddress(device + 2)).unwrap();
        let at = device + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        (index, (self.ram.read_obj(GuestAddress(at)).unwrap(), self.ram.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }

    /// Whether the page of `addr` is in the VMM's dirty log.
    pub fn dirty(&self, addr: u64) -> bool {
        let region = self.ram.find_region(GuestAddress(addr)).unwrap();
        GuestMemoryRegion::bitmap(region).dirty_at(addr as usize)
    }

    pub fn clean(&self) {
        for region in self.ram.iter() {
            vm_memory::MmapRegion::bitmap(region).reset();
        }
    }
}
