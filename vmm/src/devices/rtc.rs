//! The MC146818 real-time clock with its CMOS memory, ports 0x70 (index) and 0x71 (data).
//!
//! The clock shows the wall-clock time of the machine's first boot plus VM time: it stands still while the machine
//! does, it is part of the saved state, and it never goes back unless the guest sets it. Time registers are computed
//! when they are read; while the guest holds the SET bit they are a copy that it may edit. Alarm, periodic and
//! update-ended interrupts work (IRQ 8).
//!
//! CMOS also tells firmware how much RAM there is (bytes 0x15 to 0x18, 0x30, 0x31, 0x34, 0x35, 0x5b to 0x5d).

use super::{Action, PioDevice, RestoreError, Snapshot, VmTime};

mod calendar;
pub mod state;
#[cfg(test)]
mod tests;

use calendar::DateTime;

const NS: i64 = 1_000_000_000;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES_ALARM: u8 = 0x03;
const HOURS_ALARM: u8 = 0x05;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where the FADT says that the century is.
pub const CENTURY: u8 = 0x32;

const A_UIP: u8 = 0x80;
const A_RATE: u8 = 0x0f;
/// 32.768 kHz time base, 1024 Hz.
const A_RESET: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const B_INTERRUPTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
const C_IRQ: u8 = 0x80;
/// RAM and time are valid.
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;
/// Alarm bytes with both top bits set match anything.
const ALARM_ANY: u8 = 0xc0;
/// The update-in-progress bit is set this long before the seconds change.
const UIP_NS: i64 = 244_000;

/// The clock. See the module.
#[derive(Debug, Clone)]
pub struct Rtc {
    index: u8,
    /// CMOS bytes; the time registers in it are used only while SET is held.
    ram: [u8; 128],
    /// Unix time at VM time 0, in nanoseconds.
    base_ns: i64,
    /// Interrupt conditions up to here are in register C.
    seen: VmTime,
}

impl Rtc {
    /// A clock that shows `base_unix_seconds` at VM time 0, in a machine with `below_4g` bytes of RAM from address 0
    /// and `above_4g` bytes from 4 GiB on.
    #[must_use]
    pub fn new(base_unix_seconds: u64, below_4g: u64, above_4g: u64) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(REG_A)] = A_RESET;
        ram[usize::from(REG_B)] = B_24_HOURS;
        let mut put = |at: usize, value: u64, len: usize| {
            let value = value.min((1 << (8 * len)) - 1);
            ram[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        const KIB: u64 = 1024;
        const MIB: u64 = 1024 * KIB;
        put(0x15, 640, 2);
        let extended = below_4g.saturating_sub(MIB) / KIB;
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        put(0x34, below_4g.saturating_sub(16 * MIB) / (64 * KIB), 2);
        put(0x5b, above_4g / (64 * KIB), 3);
        let base = i64::try_from(base_unix_seconds).unwrap_or(i64::MAX);
        Self { index: 0, ram, base_ns: base.saturating_mul(NS), seen: VmTime(0) }
    }

    /// Unix time in nanoseconds that the clock shows.
    #[must_use]
    pub fn unix_ns(&self, now: VmTime) -> i64 {
        self.base_ns.saturating_add(i64::try_from(now.0).unwrap_or(i64::MAX)).max(0)
    }

    /// The machine was reset: interrupts off; time and CMOS stay, as on a battery.
    pub fn reset(&mut self, now: VmTime) {
        self.write_register(REG_B, self.reg(REG_B) & !(B_INTERRUPTS | B_SET), now);
        self.ram[usize::from(REG_C)] = 0;
        self.index = 0;
    }

    fn reg(&self, index: u8) -> u8 {
        self.ram[usize::from(index & 0x7f)]
    }

    fn held(&self) -> bool {
        self.reg(REG_B) & B_SET != 0
    }

    /// One byte of the time as the guest has chosen to see it.
    fn encode(&self, value: u8) -> u8 {
        if self.reg(REG_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, byte: u8) -> u8 {
        if self.reg(REG_B) & B_BINARY != 0 { byte } else { (byte >> 4).wrapping_mul(10).wrapping_add(byte & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.reg(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, byte: u8) -> u8 {
        if self.reg(REG_B) & B_24_HOURS != 0 {
            return self.decode(byte);
        }
        let hour = self.decode(byte & !HOUR_PM) % 12;
        if byte & HOUR_PM != 0 { hour + 12 } else { hour }
    }

    /// A time register's byte at a running clock; `None` for other registers.
    fn time_register(&self, index: u8, at: &DateTime) -> Option<u8> {
        Some(match index {
            SECONDS => self.encode(at.second),
            0x02 => self.encode(at.minute),
            0x04 => self.encode_hour(at.hour),
            0x06 => self.encode(at.weekday() + 1),
            0x07 => self.encode(at.day),
            0x08 => self.encode(at.month),
            // Both fit: the remainder is below 100, and the calendar ends in the 23rd century.
            YEAR => self.encode((at.year % 100) as u8),
            CENTURY => self.encode((at.year / 100) as u8),
            _ => return None,
        })
    }

    const TIME_REGISTERS: [u8; 8] = [SECONDS, 0x02, 0x04, 0x06, 0x07, 0x08, YEAR, CENTURY];

    /// Copy the running time into CMOS, where the guest can edit it.
    fn hold(&mut self, now: VmTime) {
        let at = DateTime::from_unix(self.unix_ns(now) / NS);
        for index in Self::TIME_REGISTERS {
            if let Some(value) = self.time_register(index, &at) {
                self.ram[usize::from(index)] = value;
            }
        }
    }

    /// Run on from the time that stands in CMOS.
    fn release(&mut self, now: VmTime) {
        let century = match self.decode(self.reg(CENTURY)) {
            c @ 19..=22 => c,
            _ => 20,
        };
        let at = DateTime {
            year: u16::from(century) * 100 + u16::from(self.decode(self.reg(YEAR)) % 100),
            month: self.decode(self.reg(0x08)),
            day: self.decode(self.reg(0x07)),
            hour: self.decode_hour(self.reg(0x04)),
            minute: self.decode(self.reg(0x02)),
            second: self.decode(self.reg(SECONDS)),
        };
        let now = i64::try_from(now.0).unwrap_or(i64::MAX);
        self.base_ns = at.to_unix().max(0).saturating_mul(NS).saturating_sub(now);
    }

    fn read_register(&mut self, index: u8, now: VmTime) -> u8 {
        match index {
            REG_A => {
                let into_second = self.unix_ns(now) % NS;
                let uip = !self.held() && into_second >= NS - UIP_NS;
                self.reg(REG_A) | if uip { A_UIP } else { 0 }
            }
            REG_C => {
                let flags = self.interrupt_flags();
                self.ram[usize::from(REG_C)] = 0;
                flags
            }
            REG_D => D_VALID,
            _ if !self.held() => {
                let at = DateTime::from_unix(self.unix_ns(now) / NS);
                self.time_register(index, &at).unwrap_or_else(|| self.reg(index))
            }
            _ => self.reg(index),
        }
    }

    fn write_register(&mut self, index: u8, value: u8, now: VmTime) {
        match index {
            REG_A => self.ram[usize::from(REG_A)] = value & !A_UIP,
            REG_B => {
                let was_held = self.held();
                let is_held = value & B_SET != 0;
                if is_held && !was_held {
                    self.hold(now);
                }
                // SET also clears the update interrupt enable (data sheet, register B).
                self.ram[usize::from(REG_B)] = if is_held { value & !B_UPDATE } else { value };
                if was_held && !is_held {
                    self.release(now);
                }
            }
            REG_C | REG_D => {}
            _ if Self::TIME_REGISTERS.contains(&index) && !self.held() => {
                // Some systems set the time without stopping it.
                self.hold(now);
                self.ram[usize::from(index)] = value;
                let into_second = self.unix_ns(now) % NS;
                self.release(now);
                self.base_ns = self.base_ns.saturating_add(into_second);
            }
            _ => self.ram[usize::from(index)] = value,
        }
    }

    /// Register C: the three flags and their summary.
    fn interrupt_flags(&self) -> u8 {
        let flags = self.reg(REG_C) & B_INTERRUPTS;
        let active = flags & self.reg(REG_B) != 0;
        flags | if active { C_IRQ } else { 0 }
    }

    /// Period of the periodic interrupt in cycles of 32 768 Hz; 0 = off.
    fn period_cycles(&self) -> u64 {
        match self.reg(REG_A) & A_RATE {
            0 => 0,
            // With the 32 kHz time base, rates 1 and 2 are those of 8 and 9.
            rate @ (1 | 2) => 1 << (rate + 6),
            rate => 1 << (rate - 1),
        }
    }

    /// The first second after `after` (Unix time) at which the alarm matches.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let wanted = |register: u8, decode: &dyn Fn(u8) -> u8| match self.reg(register) {
            any if any & ALARM_ANY == ALARM_ANY => None,
            byte => Some(i64::from(decode(byte))),
        };
        let second = wanted(SECONDS_ALARM, &|b| self.decode(b));
        let minute = wanted(MINUTES_ALARM, &|b| self.decode(b));
        let hour = wanted(HOURS_ALARM, &|b| self.decode_hour(b));
        if [(second, 60), (minute, 60), (hour, 24)].iter().any(|(wanted, end)| wanted.is_some_and(|w| w >= *end)) {
            return None;
        }
        let mut at = after.checked_add(1)?;
        let end = after.checked_add(86_400 + 3_600)?;
        while at < end {
            if hour.is_some_and(|h| at / 3600 % 24 != h) {
                at = (at / 3600 + 1) * 3600;
            } else if minute.is_some_and(|m| at / 60 % 60 != m) {
                at = (at / 60 + 1) * 60;
            } else if second.is_some_and(|s| at % 60 != s) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    /// Note in register C what has happened since the last look.
    fn advance(&mut self, now: VmTime) {
        if now <= self.seen {
            return;
        }
        let mut flags = 0;
        let period = self.period_cycles();
        if period != 0 && cycles(now) / period > cycles(self.seen) / period {
            flags |= B_PERIODIC;
        }
        let (before, after) = (self.unix_ns(self.seen) / NS, self.unix_ns(now) / NS);
        if !self.held() && after > before {
            flags |= B_UPDATE;
            if self.next_alarm(before).is_some_and(|at| at <= after) {
                flags |= B_ALARM;
            }
        }
        self.ram[usize::from(REG_C)] |= flags;
        self.seen = now;
    }

    /// The instant at which the clock shows `unix` seconds.
    fn time_of(&self, unix: i64) -> VmTime {
        let ns = i128::from(unix) * i128::from(NS) - i128::from(self.base_ns);
        VmTime(u64::try_from(ns.max(0)).unwrap_or(u64::MAX))
    }
}

/// Cycles of the 32 768 Hz time base at `now`.
fn cycles(now: VmTime) -> u64 {
    // Below `now`: slower than 1 GHz.
    u64::try_from(u128::from(now.0) * 32_768 / NS as u128).unwrap_or(u64::MAX)
}

/// The first instant of a cycle.
fn time_of_cycle(cycle: u64) -> VmTime {
    let ns = (u128::from(cycle) * NS as u128).div_ceil(32_768);
    VmTime(u64::try_from(ns).unwrap_or(u64::MAX))
}

impl PioDevice for Rtc {
    fn read(&mut self, offset: u16, data: &mut [u8], now: VmTime) {
        self.advance(now);
        let index = self.index;
        super::read_bytes(offset, data, |o| if o == 1 { self.read_register(index, now) } else { 0xff });
    }

    fn write(&mut self, offset: u16, data: &[u8], now: VmTime) -> Action {
        self.advance(now);
        for (offset, value) in super::written_bytes(offset, data) {
            match offset {
                // Bit 7 masks NMIs, and there are none.
                0 => self.index = value & 0x7f,
                1 => self.write_register(self.index, *value, now),
                _ => {}
            }
        }
        Action::None
    }

    fn irq_level(&self) -> bool {
        self.interrupt_flags() & C_IRQ != 0
    }

    /// Only interrupts that the guest has enabled and that are not pending already.
    fn deadline(&self) -> Option<VmTime> {
        let wanted = self.reg(REG_B) & !self.reg(REG_C);
        let period = self.period_cycles();
        let periodic = (wanted & B_PERIODIC != 0 && period != 0)
            .then(|| time_of_cycle((cycles(self.seen) / period).saturating_add(1).saturating_mul(period)));
        let second = self.unix_ns(self.seen) / NS;
        let update = (wanted & B_UPDATE != 0 && !self.held()).then(|| self.time_of(second.saturating_add(1)));
        let alarm = (wanted & B_ALARM != 0 && !self.held())
            .then(|| self.next_alarm(second))
            .flatten()
            .map(|at| self.time_of(at));
        [periodic, update, alarm].into_iter().flatten().min()
    }

    fn tick(&mut self, now: VmTime) {
        self.advance(now);
    }
}

impl Snapshot for Rtc {
    const KIND: &'static str = "rtc";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self { index, ram, base_ns, seen } = self;
        state::V1 { index: *index, ram: ram.to_vec(), base_ns: *base_ns, seen: *seen }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { index, ram, base_ns, seen } = state;
        let ram: [u8; 128] = ram
            .try_into()
            .map_err(|ram: Vec<u8>| RestoreError::invalid(Self::KIND, format!("CMOS has {} bytes", ram.len())))?;
        if index >= 128 {
            return Err(RestoreError::invalid(Self::KIND, format!("index is {index}")));
        }
        if ram[usize::from(REG_A)] & A_UIP != 0 || ram[usize::from(REG_C)] & !B_INTERRUPTS != 0 {
            return Err(RestoreError::invalid(Self::KIND, "read-only bits are set"));
        }
        *self = Self { index, ram, base_ns, seen };
        Ok(())
    }
}
