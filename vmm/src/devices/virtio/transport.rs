//! The PCI transport (virtio 1.2, 4.1) around a [`VirtioDevice`].
//!
//! BAR 0 holds everything: common configuration, ISR, device configuration, notifications, MSI-X table and pending
//! bits. The driver's way through the status register:
//!
//! ```text
//!  0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► (queues enabled) ─► DRIVER_OK ─► 0
//!                                 only with VERSION_1 and           queues are worked on only here,
//!                                 what was offered                  until DEVICE_NEEDS_RESET
//! ```
//! Queue notifications are handled in the call that brings them. Interrupts are MSI-X if the guest enabled it, else
//! INTA through the ISR.

use std::any::Any;

use super::super::pci::config::{ConfigSpace, Identity};
use super::super::pci::msix::Msix;
use super::super::pci::{PciFunction, msix};
use super::super::{Action, Ctx, GuestRam, MsiMessage, Payload, Payloads, RestoreError, Snapshot, VmTime};
use super::queue::{self, Broken, NO_VECTOR, VirtQueue};
use super::{Progress, VirtioDevice};

mod common;

const VENDOR: u16 = 0x1af4;
const DEVICE_ID_BASE: u16 = 0x1040;
/// Any at or above 0x40 says "not transitional" (4.1.2.1).
const SUBSYSTEM: u16 = 0x1100;

/// Device status bits (2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device can go on only after a reset.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver gave up.
    pub const FAILED: u8 = 0x80;
    /// What a driver can write.
    pub const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}
/// VIRTIO_F_INDIRECT_DESC.
const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
const F_VERSION_1: u64 = 1 << 32;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

const BAR: u8 = 0;
const BAR_SIZE: u32 = 0x8000;
/// The regions of the BAR, a page each.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Where the fields of the window capability (VIRTIO_PCI_CAP_PCI_CFG) lie in it.
const WINDOW_BAR: u8 = 4;
const WINDOW_OFFSET: u8 = 8;
const WINDOW_LENGTH: u8 = 12;
const WINDOW_DATA: u8 = 16;

/// A virtio device on the PCI bus.
pub struct VirtioPci<D> {
    device: D,
    config: ConfigSpace,
    msix: Msix,
    /// Offset of the window capability.
    window: u8,
    queues: Vec<VirtQueue>,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    isr: u8,
    config_vector: u16,
    queue_select: u16,
    /// Work was left over: process again at the next tick.
    more: bool,
}

impl<D: VirtioDevice> VirtioPci<D> {
    /// `device` on a function of its own.
    pub fn new(device: D) -> Self {
        let mut config = ConfigSpace::new(Identity {
            id: (VENDOR, DEVICE_ID_BASE + D::DEVICE_ID),
            subsystem: (VENDOR, SUBSYSTEM),
            class: D::PCI_CLASS,
            revision: 1,
        });
        config.add_memory_bar(usize::from(BAR), BAR_SIZE);
        config.use_inta();
        // Configuration and every queue have a vector each.
        let vectors = device.queue_sizes().len() as u16 + 1;
        let msix = Msix::new(&mut config, vectors, BAR, MSIX_TABLE as u32, MSIX_PENDING as u32);
        add_capability(&mut config, CFG_COMMON, COMMON, None);
        add_capability(&mut config, CFG_ISR, ISR, None);
        add_capability(&mut config, CFG_DEVICE, DEVICE, None);
        add_capability(&mut config, CFG_NOTIFY, NOTIFY, Some(NOTIFY_MULTIPLIER));
        let window = add_window(&mut config);
        let queues = device.queue_sizes().iter().map(|size| VirtQueue::new(*size)).collect();
        Self {
            device,
            config,
            msix,
            window,
            queues,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            isr: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            more: false,
        }
    }

    /// The device behind the transport.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device behind the transport. After giving it something to do call [`VirtioPci::process`].
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Whether a driver is at work and the device is not waiting to be reset.
    #[must_use]
    pub fn running(&self) -> bool {
        self.status & status::DRIVER_OK != 0 && self.status & status::NEEDS_RESET == 0
    }

    /// Let the device work on its queues and tell the driver what it finished.
    pub fn process(&mut self, ram: &GuestRam) {
        if !self.running() {
            return;
        }
        self.more = false;
        match self.device.process(&mut self.queues, ram) {
            Ok(progress) => self.more = progress == Progress::More,
            Err(broken) => return self.needs_reset(broken),
        }
        for i in 0..self.queues.len() {
            match self.queues[i].take_interrupt(ram) {
                Ok(true) => self.interrupt(ISR_QUEUE, self.queues[i].setup.vector),
                Ok(false) => {}
                Err(broken) => return self.needs_reset(broken),
            }
        }
    }

    /// The device works on its queues apart from [`VirtioPci::process`], which tells the driver what it finished. `None`: a queue is broken.
    pub(super) fn work<R>(&mut self, f: impl FnOnce(&mut D, &mut [VirtQueue]) -> Result<R, Broken>) -> Option<R> {
        match f(&mut self.device, &mut self.queues) {
            Ok(result) => Some(result),
            Err(broken) => {
                self.needs_reset(broken);
                None
            }
        }
    }

    fn interrupt(&mut self, cause: u8, vector: u16) {
        if self.msix.enabled() {
            self.msix.signal(vector);
        } else {
            self.isr |= cause;
        }
    }

    fn needs_reset(&mut self, _why: Broken) {
        self.more = false;
        self.status |= status::NEEDS_RESET;
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt(ISR_CONFIG, self.config_vector);
        }
    }

    /// The device's configuration is another one: tell the driver.
    pub fn config_changed(&mut self) {
        if self.running() {
            self.interrupt(ISR_CONFIG, self.config_vector);
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | F_INDIRECT | F_EVENT_IDX | F_VERSION_1
    }

    fn event_idx(&self) -> bool {
        self.driver_features & F_EVENT_IDX != 0
    }

    /// The driver writes 0 to the status register.
    fn driver_reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.isr = 0;
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
        self.more = false;
    }

    fn write_status(&mut self, value: u8, ram: &GuestRam) {
        if value == 0 {
            return self.driver_reset();
        }
        // A driver only adds bits (2.1.1).
        let mut added = value & status::DRIVERS & !self.status;
        if added & status::FEATURES_OK != 0 {
            let wanted = self.driver_features;
            if wanted & !self.offered_features() != 0 || wanted & F_VERSION_1 == 0 {
                added &= !status::FEATURES_OK;
            }
        }
        if (self.status | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        self.status |= added;
        if added & status::FEATURES_OK != 0 {
            self.device.agreed(self.driver_features);
        }
        if added & status::DRIVER_OK != 0 {
            self.process(ram);
        }
    }

    /// The data field of the window capability is touched: the access that the window describes, if it describes one.
    fn window_access(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.window + WINDOW_BAR, &mut bar);
        let offset = self.config.dword(self.window + WINDOW_OFFSET);
        let len = self.config.dword(self.window + WINDOW_LENGTH);
        let good = bar[0] == BAR && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && offset < BAR_SIZE;
        good.then_some((u64::from(offset), len as usize))
    }

    fn in_window(&self, offset: u8) -> bool {
        (self.window + WINDOW_DATA..self.window + WINDOW_DATA + 4).contains(&offset)
    }
}

/// What follows a vendor capability's two header bytes: length, type, BAR, id, padding, offset, length of the region.
fn capability_body(cfg_type: u8, offset: u64, region: u64, extra: usize) -> Vec<u8> {
    let mut body = vec![(16 + extra) as u8, cfg_type, BAR, 0, 0, 0];
    // Both lie in the BAR.
    body.extend((offset as u32).to_le_bytes());
    body.extend((region as u32).to_le_bytes());
    body.resize(14 + extra, 0);
    body
}

fn add_capability(config: &mut ConfigSpace, cfg_type: u8, offset: u64, multiplier: Option<u32>) {
    let mut body = capability_body(cfg_type, offset, REGION, 0);
    if let Some(multiplier) = multiplier {
        body[0] += 4;
        body.extend(multiplier.to_le_bytes());
    }
    config.add_capability(CAPABILITY_VENDOR, &body, &vec![0; body.len()]);
}

/// The window through which BAR 0 can be reached from configuration space: BAR, offset, length and data are the
/// guest's.
fn add_window(config: &mut ConfigSpace) -> u8 {
    let body = capability_body(CFG_PCI, 0, 0, 4);
    let mut writable = vec![0; body.len()];
    let field = |at: u8| usize::from(at) - 2;
    writable[field(WINDOW_BAR)] = 0xff;
    writable[field(WINDOW_OFFSET)..].fill(0xff);
    config.add_capability(CAPABILITY_VENDOR, &body, &writable)
}

impl<D: VirtioDevice> PciFunction for VirtioPci<D> {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_read(&mut self, offset: u8, data: &mut [u8], ctx: &Ctx) {
        if self.in_window(offset)
            && let Some((at, len)) = self.window_access()
        {
            let mut value = [0; 4];
            self.bar_read(usize::from(BAR), at, &mut value[..len], ctx);
            self.config.write(self.window + WINDOW_DATA, &value);
        }
        self.config.show_interrupt(self.isr != 0);
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u8, data: &[u8], ctx: &Ctx) {
        self.config.write(offset, data);
        self.msix.sync(&self.config);
        if self.in_window(offset)
            && let Some((at, len)) = self.window_access()
        {
            let value = self.config.dword(self.window + WINDOW_DATA).to_le_bytes();
            self.bar_write(usize::from(BAR), at, &value[..len], ctx);
        }
    }

    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8], _ctx: &Ctx) {
        data.fill(0);
        let within = offset % REGION;
        match offset - within {
            COMMON => self.read_common(within, data),
            ISR => {
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = std::mem::take(&mut self.isr);
                }
            }
            DEVICE => self.device.read_config(within, data),
            MSIX_TABLE => self.msix.read_table(within, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8], ctx: &Ctx) {
        let within = offset % REGION;
        match offset - within {
            COMMON => self.write_common(within, data, ctx.ram),
            DEVICE => {
                self.device.write_config(within, data);
                self.process(ctx.ram);
            }
            // Whichever queue it is for: the device looks at all of them.
            NOTIFY => self.process(ctx.ram),
            MSIX_TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    fn intx_level(&self) -> bool {
        self.isr != 0 && !self.msix.enabled() && !self.config.intx_disabled()
    }

    fn take_msi(&mut self, out: &mut Vec<MsiMessage>) {
        self.msix.take(out);
    }

    fn deadline(&self) -> Option<VmTime> {
        self.more.then_some(VmTime(0))
    }

    fn tick(&mut self, ctx: &Ctx) -> Action {
        self.process(ctx.ram);
        Action::None
    }

    fn reset(&mut self) {
        self.driver_reset();
        self.config.reset();
        self.msix.reset();
    }

    fn save_payloads(&self, name: &str) -> Vec<Payload> {
        vec![Payload::of(self, name), Payload::of(&self.device, name)]
    }

    fn restore_payloads(&mut self, payloads: &mut Payloads, name: &str) -> Result<(), RestoreError> {
        payloads.restore(self, name)?;
        payloads.restore(&mut self.device, name)?;
        if self.status & status::FEATURES_OK != 0 {
            self.device.agreed(self.driver_features);
        }
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Saved state of the transport.
pub mod state {
    use super::{msix, queue};
    use serde::{Deserialize, Serialize};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[allow(missing_docs)]
    pub struct V1 {
        pub config: Vec<u8>,
        pub msix: msix::V1,
        pub queues: Vec<queue::V1>,
        pub device_feature_select: u32,
        pub driver_feature_select: u32,
        pub driver_features: u64,
        pub status: u8,
        pub isr: u8,
        pub config_vector: u16,
        pub queue_select: u16,
    }
}

impl<D: VirtioDevice> Snapshot for VirtioPci<D> {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self {
            device: _, // in a payload of its own
            config,
            msix,
            window: _,
            queues,
            device_feature_select,
            driver_feature_select,
            driver_features,
            status,
            isr,
            config_vector,
            queue_select,
            more: _, // after a restore the device looks at its queues anyway
        } = self;
        state::V1 {
            config: config.save(),
            msix: msix.save(),
            queues: queues.iter().map(VirtQueue::save).collect(),
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            driver_features: *driver_features,
            status: *status,
            isr: *isr,
            config_vector: *config_vector,
            queue_select: *queue_select,
        }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let invalid = |what: &str| Err(RestoreError::invalid(Self::KIND, what));
        if state.queues.len() != self.queues.len() {
            return invalid("it has another number of queues");
        }
        if state.status & !(status::DRIVERS | status::NEEDS_RESET) != 0 || state.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return invalid("reserved bits are set");
        }
        let agreed = state.status & status::FEATURES_OK != 0;
        let features = state.driver_features;
        if agreed && (features & !self.offered_features() != 0 || features & F_VERSION_1 == 0) {
            return invalid("it agreed on features that this device does not have");
        }
        if !agreed && (state.status & status::DRIVER_OK != 0 || state.queues.iter().any(|q| q.position.is_some())) {
            return invalid("it works without having agreed on features");
        }
        let known = |vector: u16| vector < self.msix.vectors() || vector == NO_VECTOR;
        if !known(state.config_vector) || !state.queues.iter().all(|q| known(q.setup.vector)) {
            return invalid("it uses a vector that this device does not have");
        }
        self.config.restore(Self::KIND, &state.config)?;
        self.msix.restore(Self::KIND, state.msix, &self.config)?;
        self.driver_features = features;
        let event_idx = self.event_idx();
        for (queue, saved) in self.queues.iter_mut().zip(state.queues) {
            queue.restore(Self::KIND, saved, event_idx)?;
        }
        self.device_feature_select = state.device_feature_select;
        self.driver_feature_select = state.driver_feature_select;
        self.status = state.status;
        self.isr = state.isr;
        self.config_vector = state.config_vector;
        self.queue_select = state.queue_select;
        self.more = self.running();
        Ok(())
    }
}
