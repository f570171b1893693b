//! The common configuration structure (virtio 1.2, 4.1.4.3).

use super::super::super::GuestRam;
use super::super::queue::NO_VECTOR;
use super::super::{VirtQueue, VirtioDevice};
use super::{VirtioPci, status};

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const DEVICE_STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const END: usize = 0x40;

/// One half of 64 feature bits; there are no others.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Write a dword or a qword into a 64-bit register, `offset` bytes in.
fn write_address(register: &mut u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    match (offset, data.len()) {
        (0, 4 | 8) | (4, 4) => bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data),
        _ => return,
    }
    *register = u64::from_le_bytes(bytes);
}

impl<D: VirtioDevice> VirtioPci<D> {
    fn selected_queue(&self) -> Option<&VirtQueue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Any width at any offset: a copy of the structure is made and read from.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0u8; END];
        let mut put = |at: u64, value: &[u8]| image[at as usize..at as usize + value.len()].copy_from_slice(value);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(self.offered_features(), self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_MSIX_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status, self.device.config_generation()]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0.
        if let Some(queue) = self.selected_queue() {
            put(QUEUE_SIZE, &queue.setup.size.to_le_bytes());
            put(QUEUE_MSIX_VECTOR, &queue.setup.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled()).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.setup.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.setup.driver.to_le_bytes());
            put(QUEUE_DEVICE, &queue.setup.device.to_le_bytes());
        } else {
            put(QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| image.get(at)).copied().unwrap_or(0);
        }
    }

    /// A write of a whole field, or of one half of an address; anything else is not allowed to a driver (4.1.3.1) and
    /// is ignored.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8], ram: &GuestRam) {
        match (offset, data) {
            (DEVICE_FEATURE_SELECT, [a, b, c, d]) => self.device_feature_select = u32::from_le_bytes([*a, *b, *c, *d]),
            (DRIVER_FEATURE_SELECT, [a, b, c, d]) => self.driver_feature_select = u32::from_le_bytes([*a, *b, *c, *d]),
            (DRIVER_FEATURE, [a, b, c, d]) => self.write_driver_feature(u32::from_le_bytes([*a, *b, *c, *d])),
            (CONFIG_MSIX_VECTOR, [a, b]) => self.config_vector = self.known_vector(u16::from_le_bytes([*a, *b])),
            (DEVICE_STATUS, [value]) => self.write_status(*value, ram),
            (QUEUE_SELECT, [a, b]) => self.queue_select = u16::from_le_bytes([*a, *b]),
            (QUEUE_SIZE.., _) => self.write_queue(offset, data, ram),
            _ => {}
        }
    }

    fn write_driver_feature(&mut self, value: u32) {
        let shift = match self.driver_feature_select {
            _ if self.status & status::FEATURES_OK != 0 => return,
            0 => 0,
            1 => 32,
            _ => return,
        };
        let kept = self.driver_features & !(u64::from(u32::MAX) << shift);
        self.driver_features = kept | u64::from(value) << shift;
    }

    /// A vector that does not exist is answered with "no vector" (4.1.5.1.2.1).
    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    fn write_queue(&mut self, offset: u64, data: &[u8], ram: &GuestRam) {
        let event_idx = self.event_idx();
        let features_agreed = self.status & status::FEATURES_OK != 0;
        let vector = match data {
            [a, b] => self.known_vector(u16::from_le_bytes([*a, *b])),
            _ => NO_VECTOR,
        };
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if let (QUEUE_MSIX_VECTOR, [_, _]) = (offset, data) {
            queue.setup.vector = vector;
            return;
        }
        if queue.enabled() {
            // What an enabled queue is made of no longer changes (4.1.4.3.2).
            return;
        }
        match (offset, data) {
            (QUEUE_SIZE, [a, b]) => queue.set_size(u16::from_le_bytes([*a, *b])),
            (QUEUE_ENABLE, [1, 0]) if features_agreed => {
                if let Err(broken) = queue.enable(event_idx, ram) {
                    self.needs_reset(broken);
                } else if self.running() {
                    self.process(ram);
                }
            }
            (QUEUE_DESC..QUEUE_DRIVER, _) => write_address(&mut queue.setup.descriptors, offset - QUEUE_DESC, data),
            (QUEUE_DRIVER..QUEUE_DEVICE, _) => write_address(&mut queue.setup.driver, offset - QUEUE_DRIVER, data),
            (QUEUE_DEVICE..0x38, _) => write_address(&mut queue.setup.device, offset - QUEUE_DEVICE, data),
            _ => {}
        }
    }
}
