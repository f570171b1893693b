//! ACPI fixed hardware (ACPI 6.5, 4.8): PM1a event and control registers, the PM timer, the power button, and the SMI
//! command port through which an operating system turns ACPI on.
//!
//! What the FADT says of it: `PM1a_EVT_BLK` = [`super::PM_PORT`] (length 4), `PM1a_CNT_BLK` = +4 (2), `PM_TMR_BLK` = +8
//! (4), `TMR_VAL_EXT` (32 bits), fixed power button (flag `PWR_BUTTON` clear), no sleep button (`SLP_BUTTON` set),
//! `SMI_CMD` = [`super::SMI_CMD_PORT`], `ACPI_ENABLE` = [`ACPI_ENABLE`], `ACPI_DISABLE` = [`ACPI_DISABLE`], `SCI_INT` =
//! [`super::SCI_IRQ`]. The DSDT's `\_S5` gives SLP_TYP [`SLP_TYP_S5`].

use serde::{Deserialize, Serialize};

use super::{Action, PioDevice, RestoreError, Snapshot, VmTime};

/// Frequency of the PM timer.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// Written to the SMI command port: the operating system takes over.
pub const ACPI_ENABLE: u8 = 0xf1;
/// Written to the SMI command port: back to legacy mode.
pub const ACPI_DISABLE: u8 = 0xf0;
/// Sleep type of S5, soft off.
pub const SLP_TYP_S5: u8 = 5;

mod status {
    pub const TIMER: u16 = 1 << 0;
    pub const GLOBAL: u16 = 1 << 5;
    pub const POWER_BUTTON: u16 = 1 << 8;
    pub const WAKE: u16 = 1 << 15;
    /// Those that this device sets.
    pub const ALL: u16 = TIMER | GLOBAL | POWER_BUTTON | WAKE;
    /// Those that can be enabled to raise the SCI; the others' enable bits (sleep button, RTC) only read back.
    pub const ENABLES: u16 = TIMER | GLOBAL | POWER_BUTTON | 1 << 9 | 1 << 10;
}
mod control {
    pub const SCI_EN: u16 = 1 << 0;
    /// "Global release": asks the firmware's lock to be released; there is nobody to ask.
    pub const SLP_TYP_SHIFT: u32 = 10;
    pub const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
    pub const SLP_EN: u16 = 1 << 13;
    /// What lasts: SCI_EN, BM_RLD and SLP_TYP.
    pub const KEPT: u16 = SCI_EN | 1 << 1 | SLP_TYP;
}

/// The PM block.
#[derive(Debug, Clone)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    /// The APM status port: a scratch byte between the operating system and firmware.
    smi_status: u8,
    /// How often the timer's top bit has changed, as far as it has been noticed.
    timer_wraps: u64,
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new()
    }
}

/// The PM timer's count at `now`, all bits.
fn timer_ticks(now: VmTime) -> u64 {
    let ticks = u128::from(now.0) * u128::from(PM_TIMER_HZ) / 1_000_000_000;
    // Cannot be more than `now`: the timer is slower than 1 GHz.
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// The first instant at which the timer shows `ticks`.
fn time_of_ticks(ticks: u64) -> VmTime {
    let ns = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(PM_TIMER_HZ));
    VmTime(u64::try_from(ns).unwrap_or(u64::MAX))
}

impl AcpiPm {
    /// The block after power-on: legacy mode, nothing enabled.
    #[must_use]
    pub fn new() -> Self {
        Self { status: 0, enable: 0, control: 0, smi_status: 0, timer_wraps: 0 }
    }

    /// Somebody presses the power button. Returns whether the guest will be interrupted by it; if not, it may still see
    /// the status bit later.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= status::POWER_BUTTON;
        self.control & control::SCI_EN != 0 && self.enable & status::POWER_BUTTON != 0
    }

    /// The guest writes to the SMI command port (`offset` 0) or the status port next to it (1).
    pub fn smi_write(&mut self, offset: u16, data: &[u8]) {
        for (offset, value) in super::written_bytes(offset, data) {
            match (offset, *value) {
                (0, ACPI_ENABLE) => self.control |= control::SCI_EN,
                (0, ACPI_DISABLE) => self.control &= !control::SCI_EN,
                (1, value) => self.smi_status = value,
                _ => {}
            }
        }
    }

    /// The guest reads the SMI command or status port.
    pub fn smi_read(&self, offset: u16, data: &mut [u8]) {
        super::read_bytes(offset, data, |o| match o {
            0 => 0,
            1 => self.smi_status,
            _ => 0xff,
        });
    }

    fn advance(&mut self, now: VmTime) {
        let wraps = timer_ticks(now) >> 31;
        if wraps > self.timer_wraps {
            self.timer_wraps = wraps;
            self.status |= status::TIMER;
        }
    }

    fn write_byte(&mut self, offset: u16, value: u8) -> Action {
        // In the low or the high byte of a 16-bit register.
        let shift = (offset & 1) * 8;
        let (bits, mask) = (u16::from(value) << shift, 0xff << shift);
        match offset & !1 {
            0 => self.status &= !bits,
            2 => self.enable = (self.enable & !mask | bits) & status::ENABLES,
            4 => {
                // SCI_EN changes only through the SMI command port (4.8.3.2.1).
                let writable = mask & !control::SCI_EN;
                self.control = (self.control & !writable | bits & writable) & control::KEPT;
                if bits & control::SLP_EN != 0 {
                    return self.sleep();
                }
            }
            // The timer is read-only, the rest reserved.
            _ => {}
        }
        Action::None
    }

    fn sleep(&mut self) -> Action {
        if (self.control & control::SLP_TYP) >> control::SLP_TYP_SHIFT == u16::from(SLP_TYP_S5) {
            return Action::PowerOff;
        }
        // No other sleep state exists. A guest that tries waits for WAK_STS: it has slept and is awake.
        self.status |= status::WAKE;
        Action::None
    }
}

impl PioDevice for AcpiPm {
    fn read(&mut self, offset: u16, data: &mut [u8], now: VmTime) {
        self.advance(now);
        let ticks = timer_ticks(now).to_le_bytes();
        super::read_bytes(offset, data, |o| match o {
            0 | 1 => self.status.to_le_bytes()[usize::from(o)],
            2 | 3 => self.enable.to_le_bytes()[usize::from(o - 2)],
            4 | 5 => self.control.to_le_bytes()[usize::from(o - 4)],
            8..=11 => ticks[usize::from(o - 8)],
            _ => 0,
        });
    }

    fn write(&mut self, offset: u16, data: &[u8], now: VmTime) -> Action {
        self.advance(now);
        let mut action = Action::None;
        for (offset, value) in super::written_bytes(offset, data) {
            match self.write_byte(offset, *value) {
                Action::None => {}
                wanted => action = wanted,
            }
        }
        action
    }

    fn irq_level(&self) -> bool {
        self.control & control::SCI_EN != 0 && self.status & self.enable != 0
    }

    fn deadline(&self) -> Option<VmTime> {
        let waits = self.enable & status::TIMER != 0 && self.status & status::TIMER == 0;
        waits.then(|| time_of_ticks(self.timer_wraps.saturating_add(1).saturating_mul(1 << 31)))
    }

    fn tick(&mut self, now: VmTime) {
        self.advance(now);
    }
}

/// Saved state.
pub mod state {
    use super::{Deserialize, Serialize};

    /// Version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[allow(missing_docs)]
    pub struct V1 {
        pub status: u16,
        pub enable: u16,
        pub control: u16,
        pub smi_status: u8,
        pub timer_wraps: u64,
    }
}

impl Snapshot for AcpiPm {
    const KIND: &'static str = "acpi-pm";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self { status, enable, control, smi_status, timer_wraps } = *self;
        state::V1 { status, enable, control, smi_status, timer_wraps }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { status, enable, control, smi_status, timer_wraps } = state;
        for (register, value, allowed) in [
            ("PM1 status", status, status::ALL),
            ("PM1 enable", enable, status::ENABLES),
            ("PM1 control", control, control::KEPT),
        ] {
            if value & !allowed != 0 {
                return Err(RestoreError::invalid(Self::KIND, format!("{register} is {value:#06x}")));
            }
        }
        *self = Self { status, enable, control, smi_status, timer_wraps };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_ticks_are_invisible, hammer, snapshot_tests};
    use super::*;

    fn read(pm: &mut AcpiPm, offset: u16, len: usize, now: u64) -> u32 {
        let mut data = [0; 4];
        pm.read(offset, &mut data[..len], VmTime(now));
        u32::from_le_bytes(data)
    }

    fn used() -> AcpiPm {
        let mut pm = AcpiPm::new();
        pm.smi_write(0, &[ACPI_ENABLE, 0x77]);
        assert_eq!(pm.write(2, &0x0121u16.to_le_bytes(), VmTime(0)), Action::None);
        assert_eq!(pm.write(4, &0x1c02u16.to_le_bytes(), VmTime(0)), Action::None);
        assert!(pm.press_power_button());
        pm.tick(VmTime(700_000_000_000));
        pm
    }

    snapshot_tests! {
        fresh: AcpiPm::new(),
        used: used(),
        exercise: |pm| {
            read(pm, 8, 4, u64::MAX);
            pm.deadline();
            pm.tick(VmTime(u64::MAX));
        },
        golden: "8102a10283387701",
    }

    #[test]
    fn when_it_is_ticked_makes_no_difference_to_the_guest() {
        assert_ticks_are_invisible(16, AcpiPm::new);
    }

    #[test]
    fn an_access_at_the_very_last_offset_goes_nowhere() {
        let mut pm = AcpiPm::new();
        let mut data = [0; 4];
        pm.read(u16::MAX, &mut data, VmTime(0));
        assert_eq!(pm.write(u16::MAX, &[0xff; 4], VmTime(0)), Action::None);
        pm.smi_write(u16::MAX, &[0xff; 4]);
    }

    #[test]
    fn random_accesses_never_panic() {
        hammer(16, AcpiPm::new, |_, _| {});
    }

    #[test]
    fn the_timer_runs_at_3_579545_mhz_and_wraps_at_32_bits() {
        let mut pm = AcpiPm::new();
        for (now, ticks) in [(0, 0u32), (279, 0), (280, 1), (1_000_000_000, 3_579_545), (3_600_000_000_000, 1_510_000)]
        {
            let expected = if now == 3_600_000_000_000 { (3_579_545u64 * 3600) as u32 } else { ticks };
            assert_eq!(read(&mut pm, 8, 4, now), expected);
        }
        assert_eq!(read(&mut pm, 9, 1, 1_000_000_000), 3_579_545 >> 8 & 0xff);
    }

    #[test]
    fn the_timer_interrupts_when_its_top_bit_changes() {
        let mut pm = AcpiPm::new();
        pm.smi_write(0, &[ACPI_ENABLE]);
        assert_eq!(pm.write(2, &[0x01], VmTime(0)), Action::None);
        let at = pm.deadline().unwrap();
        pm.tick(VmTime(at.0 - 1));
        assert!(!pm.irq_level());
        pm.tick(at);
        assert!(pm.irq_level());
        assert_eq!(read(&mut pm, 8, 4, at.0), 1 << 31);
        assert_eq!(pm.write(0, &[0x01], at), Action::None);
        assert!(!pm.irq_level());
        assert!(pm.deadline().unwrap() > at);
    }

    #[test]
    fn the_power_button_interrupts_only_when_acpi_and_the_button_are_enabled() {
        let mut pm = AcpiPm::new();
        assert!(!pm.press_power_button());
        assert!(!pm.irq_level());
        pm.smi_write(0, &[ACPI_ENABLE]);
        assert_eq!(read(&mut pm, 4, 2, 0), 0x0001);
        assert!(!pm.irq_level());
        assert_eq!(pm.write(3, &[0x01], VmTime(0)), Action::None);
        assert!(pm.irq_level());
        assert_eq!(pm.write(1, &[0x01], VmTime(0)), Action::None, "status bits are cleared by writing ones");
        assert!(!pm.irq_level());
        assert!(pm.press_power_button());
        pm.smi_write(0, &[ACPI_DISABLE]);
        assert!(!pm.irq_level());
    }

    #[test]
    fn s5_powers_off_whether_written_as_a_word_or_as_bytes() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write(4, &0x1400u16.to_le_bytes(), VmTime(0)), Action::None, "the type alone does not");
        assert_eq!(pm.write(4, &0x3400u16.to_le_bytes(), VmTime(0)), Action::PowerOff);
        assert_eq!(AcpiPm::new().write(5, &[0x34], VmTime(0)), Action::PowerOff);
    }

    #[test]
    fn other_sleep_states_wake_at_once() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write(4, &0x2400u16.to_le_bytes(), VmTime(0)), Action::None);
        assert_eq!(read(&mut pm, 0, 2, 0), 0x8000);
    }

    #[test]
    fn a_guest_cannot_set_sci_en_itself() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.write(4, &[0x01], VmTime(0)), Action::None);
        assert_eq!(read(&mut pm, 4, 2, 0), 0);
    }
}
