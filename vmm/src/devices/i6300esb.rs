//! The watchdog timer of the Intel 6300ESB (document 300641, "Watchdog Timer (WDT)"): what Linux drives with the module `i6300esb`.
//!
//! ```text
//!          ENABLE 0 → 1                 preload 1 has passed         preload 2 has passed
//!   off ────────────────► first stage ──────────────────────► second stage ───────────────► expired ──► the action
//!    ▲                      ▲    │                                │                            │
//!    └── ENABLE 1 → 0 ──────│────┴────────────────────────────────┴────────────────────────────┤
//!                           └── fed: 0x80, 0x86, RELOAD ◄──────────────────────────────────────┘
//! ```
//! Registers: configuration space 0x60 (what expiry does, pace) and 0x68 (enable, lock); BAR 0, 16 bytes: preloads at 0 and 4, status at 8, reload at
//! 12. Each write to a preload or of RELOAD has to be unlocked by the bytes 0x80 and 0x86 before.
//!
//! The counter runs in VM time, and not while the vCPUs stand still ([`I6300esb::stood_still`]): it is the guest that is watched, not the host.
//! It expires in [`PciFunction::tick`] only; a guest that feeds it in the instant between lives.
//!
//! Left out: the interrupt of the first stage (its status bit is there; Linux switches the interrupt off), and free running mode, in which the chip
//! toggles a pin that nothing is connected to here; a timer in it counts as not armed.

use std::any::Any;

use serde::{Deserialize, Serialize};
use understudy_protocol::watchdog::{WatchdogAction, WatchdogSpec, WatchdogState, WatchdogStatus};

use super::pci::PciFunction;
use super::pci::config::{ConfigSpace, Identity};
use super::{Action, Ctx, Payload, Payloads, RestoreError, Snapshot, VmTime};

#[cfg(test)]
mod tests;

/// Size of BAR 0.
const BAR_SIZE: u32 = 16;

// Configuration space.
const CONFIG: u8 = 0x60;
const LOCK: u8 = 0x68;
const CONFIG_NO_OUTPUT: u16 = 1 << 5;
const CONFIG_FAST: u16 = 1 << 2;
/// No output, pace, interrupt type.
const CONFIG_MASK: u8 = 0x27;
const LOCK_FREE_RUNNING: u8 = 1 << 2;
const LOCK_ENABLE: u8 = 1 << 1;
const LOCK_LOCKED: u8 = 1 << 0;
const LOCK_MASK: u8 = 0x07;

// BAR 0.
const PRELOAD_1: u64 = 0x00;
const PRELOAD_2: u64 = 0x04;
const STATUS: u64 = 0x08;
const RELOAD: u64 = 0x0c;
const STATUS_FIRST_STAGE: u32 = 1 << 0;
const RELOAD_FEED: u32 = 1 << 8;
const RELOAD_TIMED_OUT: u32 = 1 << 9;
/// Preloads have 20 bits: the upper ones of a counter of 35.
const PRELOAD_MASK: u32 = 0xf_ffff;
const UNLOCK: [u32; 2] = [0x80, 0x86];

/// The clock that is counted, Hz.
const PCI_HZ: u64 = 33_000_000;

/// Where the counter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It does not count.
    Off,
    /// In its first stage, until then.
    First(VmTime),
    /// In its second, until then.
    Second(VmTime),
    /// It has run out, and waits to be fed.
    Out,
}

/// The watchdog. See the module.
#[derive(Debug, Clone)]
pub struct I6300esb {
    spec: WatchdogSpec,
    config: ConfigSpace,
    preloads: [u32; 2],
    /// Steps of the unlocking that were made.
    unlocked: u8,
    phase: Phase,
    /// The first stage has passed, and the guest has not taken notice.
    first_stage: bool,
    /// The second has, and the guest has not taken notice; stays over a reset.
    timed_out: bool,
    /// When it was armed or fed last.
    fed: Option<VmTime>,
    /// When it expired, if the guest has given no sign since; stays over a reset.
    expired: Option<VmTime>,
    expirations: u64,
}

impl I6300esb {
    /// A watchdog after power-on.
    #[must_use]
    pub fn new(spec: WatchdogSpec) -> Self {
        let mut config = ConfigSpace::new(Identity {
            id: (0x8086, 0x25ab),
            subsystem: (0x1af4, 0x1100),
            class: 0x08_80_00,
            revision: 0,
        });
        config.add_memory_bar(0, BAR_SIZE);
        config.add_register(CONFIG, 0, CONFIG_MASK);
        config.add_register(LOCK, 0, LOCK_MASK);
        Self {
            spec,
            config,
            preloads: [PRELOAD_MASK; 2],
            unlocked: 0,
            phase: Phase::Off,
            first_stage: false,
            timed_out: false,
            fed: None,
            expired: None,
            expirations: 0,
        }
    }

    /// For the status.
    #[must_use]
    pub fn status(&self, now: VmTime) -> WatchdogStatus {
        let ms_since = |then: VmTime| now.since(then) / 1_000_000;
        let armed = self.phase != Phase::Off;
        WatchdogStatus {
            model: self.spec.model,
            action: self.spec.action,
            state: match (self.expired, armed) {
                (Some(_), _) => WatchdogState::Expired,
                (None, true) => WatchdogState::Fed,
                (None, false) => WatchdogState::NotArmed,
            },
            timeout_ms: armed.then(|| (self.stage_ns(0) + self.stage_ns(1)) / 1_000_000),
            fed_ms_ago: self.fed.filter(|_| armed).map(ms_since),
            expired_ms_ago: self.expired.map(ms_since),
            expirations: self.expirations,
        }
    }

    /// The vCPUs did not run for `ns` nanoseconds of VM time: the guest could not feed it.
    pub fn stood_still(&mut self, ns: u64) {
        match &mut self.phase {
            Phase::First(until) | Phase::Second(until) => *until = until.plus(ns),
            Phase::Off | Phase::Out => {}
        }
    }

    fn lock(&self) -> u8 {
        self.config.word(LOCK) as u8
    }

    /// Whether it counts, as the registers say.
    fn enabled(&self) -> bool {
        self.lock() & (LOCK_ENABLE | LOCK_FREE_RUNNING) == LOCK_ENABLE
    }

    /// Length of a stage, ns: its preload in ticks of 2¹⁵ or 2⁵ clocks.
    fn stage_ns(&self, stage: usize) -> u64 {
        let shift = if self.config.word(CONFIG) & CONFIG_FAST != 0 { 5 } else { 15 };
        // Below 2⁶⁵: 20 bits, 15, and 30 for the billion.
        let ns = (u128::from(self.preloads[stage]) << shift) * 1_000_000_000 / u128::from(PCI_HZ);
        // At most 1041 s.
        ns as u64
    }

    /// A sign of life.
    fn feed(&mut self, now: VmTime) {
        self.phase = Phase::First(now.plus(self.stage_ns(0)));
        self.fed = Some(now);
        self.expired = None;
    }

    fn registers(&self) -> [u8; BAR_SIZE as usize] {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let words = [
            self.preloads[0],
            self.preloads[1],
            flag(self.first_stage, STATUS_FIRST_STAGE),
            flag(self.timed_out, RELOAD_TIMED_OUT),
        ];
        let mut bytes = [0; BAR_SIZE as usize];
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn reload(&mut self, value: u32, now: VmTime) {
        if value & RELOAD_TIMED_OUT != 0 {
            self.timed_out = false;
            // Whoever takes notice lives, if nobody is to feed it yet.
            if self.phase == Phase::Off {
                self.expired = None;
            }
        }
        if value & RELOAD_FEED != 0 && self.phase != Phase::Off {
            self.feed(now);
        }
    }
}

impl PciFunction for I6300esb {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn config_write(&mut self, offset: u8, data: &[u8], ctx: &Ctx) {
        let lock = self.lock();
        self.config.write(offset, data);
        if lock & LOCK_LOCKED != 0 {
            self.config.write(LOCK, &[lock]);
        }
        match (self.phase == Phase::Off, self.enabled()) {
            (true, true) => self.feed(ctx.now),
            (false, false) => (self.phase, self.fed, self.expired) = (Phase::Off, None, None),
            _ => {}
        }
    }

    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8], _ctx: &Ctx) {
        let registers = self.registers();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| registers.get(at)).copied().unwrap_or(0xff);
        }
    }

    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8], ctx: &Ctx) {
        let mut bytes = [0; 4];
        let len = data.len().min(4);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u32::from_le_bytes(bytes);
        let unlocked = std::mem::take(&mut self.unlocked);
        match (offset, len) {
            (RELOAD, 1..) if value == UNLOCK[0] => self.unlocked = 1,
            (RELOAD, 1..) if value == UNLOCK[1] && unlocked == 1 => self.unlocked = 2,
            (RELOAD, 2..) if unlocked == 2 => self.reload(value, ctx.now),
            (PRELOAD_1, 4) if unlocked == 2 => self.preloads[0] = value & PRELOAD_MASK,
            (PRELOAD_2, 4) if unlocked == 2 => self.preloads[1] = value & PRELOAD_MASK,
            (STATUS, 1..) if value & STATUS_FIRST_STAGE != 0 => self.first_stage = false,
            _ => {}
        }
    }

    fn deadline(&self) -> Option<VmTime> {
        match self.phase {
            Phase::First(until) | Phase::Second(until) => Some(until),
            Phase::Off | Phase::Out => None,
        }
    }

    fn tick(&mut self, ctx: &Ctx) -> Action {
        if let Phase::First(until) = self.phase
            && until <= ctx.now
        {
            self.first_stage = true;
            // From then, not from now: the two stages together are what the guest was promised.
            self.phase = Phase::Second(until.plus(self.stage_ns(1)));
        }
        match self.phase {
            Phase::Second(until) if until <= ctx.now => {}
            _ => return Action::None,
        }
        self.phase = Phase::Out;
        self.expired = Some(ctx.now);
        self.expirations = self.expirations.saturating_add(1);
        // The guest wants to know only.
        if self.config.word(CONFIG) & CONFIG_NO_OUTPUT != 0 {
            return Action::None;
        }
        self.timed_out = true;
        match self.spec.action {
            WatchdogAction::Report => Action::None,
            WatchdogAction::Reset => Action::Reset,
            WatchdogAction::Off => Action::PowerOff,
        }
    }

    fn reset(&mut self) {
        let Self { timed_out, expired, expirations, .. } = *self;
        *self = Self { timed_out, expired, expirations, ..Self::new(self.spec) };
    }

    fn save_payloads(&self, name: &str) -> Vec<Payload> {
        vec![Payload::of(self, name)]
    }

    fn restore_payloads(&mut self, payloads: &mut Payloads, name: &str) -> Result<(), RestoreError> {
        payloads.restore(self, name)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Saved state.
pub mod state {
    use serde::{Deserialize, Serialize};

    use super::{Phase, VmTime};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub struct V1 {
        /// Configuration space, 256 bytes.
        pub config: Vec<u8>,
        /// What the two stages begin with.
        pub preloads: [u32; 2],
        /// Steps of the unlocking that were made, 0 to 2.
        pub unlocked: u8,
        /// Where the counter is.
        pub phase: Phase,
        /// The first stage has passed.
        pub first_stage: bool,
        /// The second has.
        pub timed_out: bool,
        /// When it was armed or fed last.
        pub fed: Option<VmTime>,
        /// When it expired.
        pub expired: Option<VmTime>,
        /// How often.
        pub expirations: u64,
    }
}

impl Snapshot for I6300esb {
    const KIND: &'static str = "i6300esb";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self {
            spec: _, // what follows is this node's configuration
            config,
            preloads,
            unlocked,
            phase,
            first_stage,
            timed_out,
            fed,
            expired,
            expirations,
        } = self;
        state::V1 {
            config: config.save(),
            preloads: *preloads,
            unlocked: *unlocked,
            phase: *phase,
            first_stage: *first_stage,
            timed_out: *timed_out,
            fed: *fed,
            expired: *expired,
            expirations: *expirations,
        }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { config, preloads, unlocked, phase, first_stage, timed_out, fed, expired, expirations } = state;
        let impossible = |what: String| Err(RestoreError::invalid(Self::KIND, what));
        if preloads.iter().any(|preload| preload & !PRELOAD_MASK != 0) {
            return impossible(format!("its preloads are {preloads:x?}"));
        }
        if unlocked > 2 {
            return impossible(format!("it is unlocked by {unlocked} steps"));
        }
        self.config.restore(Self::KIND, &config)?;
        if (phase != Phase::Off) != self.enabled() || fed.is_some() != self.enabled() {
            return impossible("its counter and its registers do not agree whether it is armed".into());
        }
        if phase == Phase::Out && expired.is_none() || expired.is_some() && expirations == 0 {
            return impossible("it has expired at no time".into());
        }
        (self.preloads, self.unlocked, self.phase) = (preloads, unlocked, phase);
        (self.first_stage, self.timed_out) = (first_stage, timed_out);
        (self.fed, self.expired, self.expirations) = (fed, expired, expirations);
        Ok(())
    }
}
