//! A 16550A UART, as Linux's 8250 driver, SeaBIOS and Windows expect one (National Semiconductor PC16550D data sheet).
//!
//! Both directions run at the programmed line rate in VM time: a 115200 8N1 line carries 11 520 bytes a second, however
//! fast the host is, so that a guest sees a serial line and not a memory copy, and what it does in an epoch is bounded.
//!
//! ```text
//!  THR ─► transmit FIFO (16) ─► shift register ──(character time over, output room)──► output ─► take_output
//!  RBR ◄─ receive FIFO (16) ◄──(line rate, room in the FIFO, line open)── receive ◄─ board
//! ```
//! Nothing is ever dropped on the host's side. A byte leaves only if the owner has room for it
//! ([`Uart16550::set_output_room`]); otherwise the shift register stays full and the guest sees a slow line. A byte
//! enters only if the FIFO has room ([`Uart16550::rx_room`]) and somebody in the guest is there to take it: receive
//! interrupts are enabled or RTS is asserted. A driver that opens the port clears the FIFO first, so bytes accepted
//! before that would be lost.
//!
//! [`Uart16550::tx_total`] and [`Uart16550::rx_total`] number the bytes of the line since first boot; they outlive
//! guest resets.

use std::collections::VecDeque;

use super::{Action, PioDevice, VmTime};
use registers::{fcr, ier, iir, lcr, lsr, mcr, msr};

mod registers;
pub mod state;
#[cfg(test)]
mod tests;

/// Depth of either FIFO.
pub const FIFO: usize = 16;
/// The PC's UART clock.
const CLOCK_HZ: u64 = 1_843_200;
/// Most bytes that may stand in the output before the owner takes them.
pub const OUTPUT_MAX: usize = 64 * 1024;

/// Levels of the modem lines that come from the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModemInputs {
    /// Clear to send.
    pub cts: bool,
    /// Data set ready.
    pub dsr: bool,
    /// Ring indicator.
    pub ri: bool,
    /// Data carrier detect.
    pub dcd: bool,
}

/// Levels of the lines that the guest drives, for the board that owns the real port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModemOutputs {
    /// Data terminal ready.
    pub dtr: bool,
    /// Request to send.
    pub rts: bool,
    /// The guest holds the line in break.
    pub break_condition: bool,
}

/// The UART. See the module.
#[derive(Debug, Clone)]
pub struct Uart16550 {
    // Registers that the guest programs.
    divisor: u16,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    // Status that is latched until it is read.
    lsr_latched: u8,
    msr_deltas: u8,
    thre_interrupt: bool,
    /// When `thre_interrupt` follows a single byte that was written to an idle transmitter: a character time less the
    /// stop bit later (data sheet, "FIFO interrupt mode operation"), so that a driver can fill the FIFO undisturbed.
    thre_interrupt_at: Option<VmTime>,
    rx_timeout: bool,
    /// CTS, DSR, RI, DCD of the other end, as MSR bits.
    modem_inputs: u8,
    // Data paths.
    rx: VecDeque<u8>,
    tx: VecDeque<u8>,
    shift: Option<u8>,
    /// When the character in the shift register has left, or the last one did.
    shift_done: VmTime,
    /// The character in the shift register was ready to leave and there was no room for it.
    stalled: bool,
    /// When the last character came in or was read; the receive timeout counts from here.
    rx_activity: VmTime,
    /// Until when the receive direction of the line has been used up.
    rx_line: VmTime,
    output: Vec<u8>,
    tx_total: u64,
    rx_total: u64,
    // Not part of the machine's state.
    /// Characters written since the line was quiet for a FIFO's time.
    since_quiet: usize,
    // The owner's wishes.
    output_room: usize,
    input_waiting: usize,
}

impl Default for Uart16550 {
    fn default() -> Self {
        Self::new()
    }
}

impl Uart16550 {
    /// A UART after power-on: 115200 8N1 as firmware leaves it, FIFOs off, the other end present (CTS, DSR, DCD).
    #[must_use]
    pub fn new() -> Self {
        Self {
            divisor: 1,
            ier: 0,
            fcr: 0,
            lcr: lcr::WORD_LENGTH,
            mcr: 0,
            scratch: 0,
            lsr_latched: 0,
            msr_deltas: 0,
            thre_interrupt: false,
            thre_interrupt_at: None,
            rx_timeout: false,
            modem_inputs: msr::CTS | msr::DSR | msr::DCD,
            rx: VecDeque::with_capacity(FIFO),
            tx: VecDeque::with_capacity(FIFO),
            shift: None,
            shift_done: VmTime(0),
            stalled: false,
            rx_activity: VmTime(0),
            rx_line: VmTime(0),
            output: Vec::new(),
            tx_total: 0,
            rx_total: 0,
            since_quiet: FIFO,
            output_room: 4096,
            input_waiting: 0,
        }
    }

    /// The machine was reset: registers and FIFOs return to power-on values. Bytes that had left, the totals and the
    /// modem lines stay.
    pub fn reset(&mut self, now: VmTime) {
        self.advance(now);
        let old = std::mem::take(self);
        *self = Self {
            modem_inputs: old.modem_inputs,
            output: old.output,
            tx_total: old.tx_total,
            rx_total: old.rx_total,
            rx_line: old.rx_line,
            output_room: old.output_room,
            input_waiting: old.input_waiting,
            ..Self::new()
        };
    }

    /// The bytes that left since the last call, in order. The first one has offset `tx_total()` − length.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// From `now` on at most `bytes` may stand in the output between two calls of [`Uart16550::take_output`] (bounded
    /// by [`OUTPUT_MAX`]; 4096 at first). With 0 the transmitter stalls.
    pub fn set_output_room(&mut self, bytes: usize, now: VmTime) {
        self.advance(now);
        self.output_room = bytes.min(OUTPUT_MAX);
        self.advance(now);
    }

    /// How many input bytes [`Uart16550::receive`] would take at `now`: as many as the line can have carried and the
    /// FIFO has room for; none while the guest has not opened the line.
    pub fn rx_room(&mut self, now: VmTime) -> usize {
        self.advance(now);
        if !self.line_open() {
            return 0;
        }
        let carried = now.since(self.rx_line) / self.character_ns();
        self.rx_free().min(usize::try_from(carried).unwrap_or(FIFO))
    }

    /// The owner holds `bytes` input bytes for this line: [`PioDevice::deadline`] then also says when some can be
    /// received.
    pub fn set_input_waiting(&mut self, bytes: usize) {
        self.input_waiting = bytes;
    }

    /// Bytes arrive. Takes the first [`Uart16550::rx_room`] of them and says how many; the rest stays with the owner.
    pub fn receive(&mut self, bytes: &[u8], now: VmTime) -> usize {
        let n = self.rx_room(now).min(bytes.len());
        if n == 0 {
            return 0;
        }
        // An idle line saves up one FIFO of credit, not more.
        let character = self.character_ns();
        let earliest = VmTime(now.0.saturating_sub(character * FIFO as u64));
        self.rx_line = self.rx_line.max(earliest).plus(character * n as u64);
        self.rx.extend(&bytes[..n]);
        self.rx_total = self.rx_total.saturating_add(n as u64);
        self.rx_activity = now;
        n
    }

    /// Bytes that have left since first boot.
    #[must_use]
    pub fn tx_total(&self) -> u64 {
        self.tx_total
    }

    /// Bytes that have been received since first boot.
    #[must_use]
    pub fn rx_total(&self) -> u64 {
        self.rx_total
    }

    /// The lines that the guest drives.
    #[must_use]
    pub fn modem_outputs(&self) -> ModemOutputs {
        // In loopback the pins are disconnected and inactive.
        let driven = if self.loopback() { 0 } else { self.mcr };
        ModemOutputs {
            dtr: driven & mcr::DTR != 0,
            rts: driven & mcr::RTS != 0,
            break_condition: self.lcr & lcr::BREAK != 0 && !self.loopback(),
        }
    }

    /// The other end changed its lines.
    pub fn set_modem_inputs(&mut self, inputs: ModemInputs) {
        let before = self.modem_status();
        self.modem_inputs =
            [(inputs.cts, msr::CTS), (inputs.dsr, msr::DSR), (inputs.ri, msr::RI), (inputs.dcd, msr::DCD)]
                .into_iter()
                .fold(0, |bits, (level, bit)| if level { bits | bit } else { bits });
        self.note_modem_change(before);
    }

    /// Nanoseconds that one character takes on the line. At least 1.
    fn character_ns(&self) -> u64 {
        let data = 5 + u64::from(self.lcr & lcr::WORD_LENGTH);
        let parity = u64::from(self.lcr & lcr::PARITY != 0);
        // In half bits: five data bits go with one and a half stop bits.
        let stop = match (self.lcr & lcr::TWO_STOP != 0, data) {
            (false, _) => 2,
            (true, 5) => 3,
            (true, _) => 4,
        };
        let half_bits = 2 * (1 + data + parity) + stop;
        half_bits * self.clocks_per_bit() * 500_000_000 / CLOCK_HZ
    }

    fn bit_ns(&self) -> u64 {
        self.clocks_per_bit() * 1_000_000_000 / CLOCK_HZ
    }

    /// A divisor of 0 stops a real chip; here it counts as 1.
    fn clocks_per_bit(&self) -> u64 {
        16 * u64::from(self.divisor.max(1))
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & fcr::ENABLE != 0
    }

    fn depth(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    fn rx_free(&self) -> usize {
        self.depth().saturating_sub(self.rx.len())
    }

    fn rx_trigger(&self) -> usize {
        if !self.fifo_enabled() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr >> 6)]
    }

    fn loopback(&self) -> bool {
        self.mcr & mcr::LOOPBACK != 0
    }

    fn line_open(&self) -> bool {
        !self.loopback() && (self.ier & ier::RX_AVAILABLE != 0 || self.mcr & mcr::RTS != 0)
    }

    /// Let everything happen that is due at `now`. Called first in every access, so that within one call a condition
    /// may appear and be acknowledged, but never the other way round.
    fn advance(&mut self, now: VmTime) {
        while let Some(byte) = self.shift {
            if now < self.shift_done {
                break;
            }
            let mut left_at = self.shift_done;
            if self.loopback() {
                self.loop_back(byte, left_at);
            } else if self.output.len() < self.output_room {
                if self.stalled {
                    // The line stood still until now.
                    left_at = now;
                }
                self.output.push(byte);
                self.tx_total = self.tx_total.saturating_add(1);
            } else {
                self.stalled = true;
                break;
            }
            self.stalled = false;
            self.shift = None;
            self.load_shift(left_at);
            if self.shift.is_some() && self.tx.is_empty() {
                self.thre_interrupt = true;
            }
        }
        if self.thre_interrupt_at.is_some_and(|at| now >= at) {
            self.thre_interrupt_at = None;
            self.thre_interrupt = true;
        }
        if self.fifo_enabled() && !self.rx.is_empty() && now >= self.rx_timeout_at() {
            self.rx_timeout = true;
        }
    }

    /// Move the next character from the FIFO to the shift register; it starts at `start`.
    fn load_shift(&mut self, start: VmTime) {
        let Some(byte) = self.tx.pop_front() else { return };
        self.shift = Some(byte);
        self.shift_done = start.plus(self.character_ns());
    }

    /// A character comes back in loopback mode.
    fn loop_back(&mut self, byte: u8, at: VmTime) {
        if self.rx_free() == 0 {
            self.lsr_latched |= lsr::OVERRUN;
        } else {
            self.rx.push_back(byte);
            self.rx_activity = at;
        }
    }

    fn rx_timeout_at(&self) -> VmTime {
        self.rx_activity.plus(4 * self.character_ns())
    }

    fn rx_interrupt(&self) -> bool {
        self.rx.len() >= self.rx_trigger()
    }

    fn interrupt(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.lsr_latched != 0 {
            iir::LINE_STATUS
        } else if self.ier & ier::RX_AVAILABLE != 0 && self.rx_interrupt() {
            iir::RX_AVAILABLE
        } else if self.ier & ier::RX_AVAILABLE != 0 && self.rx_timeout {
            iir::RX_TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thre_interrupt {
            iir::THR_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr_deltas != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn line_status(&self) -> u8 {
        let mut status = self.lsr_latched;
        if !self.rx.is_empty() {
            status |= lsr::DATA_READY;
        }
        if self.tx.is_empty() {
            status |= lsr::THR_EMPTY;
            if self.shift.is_none() {
                status |= lsr::TRANSMITTER_EMPTY;
            }
        }
        status
    }

    /// The upper half of MSR.
    fn modem_status(&self) -> u8 {
        if !self.loopback() {
            return self.modem_inputs;
        }
        [(mcr::RTS, msr::CTS), (mcr::DTR, msr::DSR), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .fold(0, |bits, (from, to)| if self.mcr & from != 0 { bits | to } else { bits })
    }

    fn note_modem_change(&mut self, before: u8) {
        let after = self.modem_status();
        let mut deltas = (before ^ after) >> 4;
        if after & msr::RI != 0 {
            deltas &= !msr::DELTA_RI;
        }
        self.msr_deltas |= deltas;
    }

    fn read_register(&mut self, register: u8, now: VmTime) -> u8 {
        let dlab = self.lcr & lcr::DLAB != 0;
        match register {
            0 if dlab => self.divisor.to_le_bytes()[0],
            1 if dlab => self.divisor.to_le_bytes()[1],
            0 => {
                let byte = self.rx.pop_front().unwrap_or(0);
                self.rx_timeout = false;
                self.rx_activity = now;
                byte
            }
            1 => self.ier,
            2 => {
                let source = self.interrupt();
                if source == iir::THR_EMPTY {
                    self.thre_interrupt = false;
                }
                source | if self.fifo_enabled() { iir::FIFOS_ENABLED } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let status = self.line_status();
                self.lsr_latched = 0;
                status
            }
            6 => {
                let status = self.modem_status() | self.msr_deltas;
                self.msr_deltas = 0;
                status
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&mut self, register: u8, value: u8, now: VmTime) {
        let dlab = self.lcr & lcr::DLAB != 0;
        match register {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(value, now),
            1 => {
                // Enabling the interrupt while THR is empty raises it at once; drivers test for that.
                if value & !self.ier & ier::THR_EMPTY != 0 && self.tx.is_empty() {
                    self.thre_interrupt = true;
                }
                self.ier = value & ier::ALL;
            }
            2 => self.write_fcr(value),
            3 => {
                let break_starts = value & !self.lcr & lcr::BREAK != 0;
                self.lcr = value;
                if break_starts && self.loopback() && self.rx_free() > 0 {
                    self.rx.push_back(0);
                    self.rx_activity = now;
                    self.lsr_latched |= lsr::BREAK;
                }
            }
            4 => {
                let before = self.modem_status();
                self.mcr = value & mcr::ALL;
                self.note_modem_change(before);
            }
            7 => self.scratch = value,
            // LSR and MSR are read-only (a factory test writes them).
            _ => {}
        }
    }

    fn transmit(&mut self, byte: u8, now: VmTime) {
        self.thre_interrupt = false;
        self.thre_interrupt_at = None;
        if self.tx.len() >= self.depth() {
            // The guest overruns its own transmitter: the new byte is lost, as on the chip.
            return;
        }
        self.tx.push_back(byte);
        if self.shift.is_none() {
            if now.since(self.shift_done) >= FIFO as u64 * self.character_ns() {
                self.since_quiet = 0;
            }
            self.load_shift(now);
            let stop_bit = self.bit_ns();
            self.thre_interrupt_at = Some(VmTime(self.shift_done.0.saturating_sub(stop_bit)));
        }
        self.since_quiet = (self.since_quiet + 1).min(FIFO);
    }

    fn write_fcr(&mut self, value: u8) {
        if value & fcr::ENABLE == 0 {
            self.fcr = 0;
            self.rx_timeout = false;
            self.rx.truncate(1);
            self.tx.truncate(1);
            return;
        }
        // Switching FIFOs on keeps a byte that stands in RBR or THR. The chip's manual says that it is cleared; a
        // driver that opens the port has cleared it explicitly before, and what came after that is not to be lost.
        self.fcr = value & fcr::KEPT;
        if value & fcr::CLEAR_RX != 0 {
            self.rx.clear();
            self.rx_timeout = false;
        }
        if value & fcr::CLEAR_TX != 0 && !self.tx.is_empty() {
            self.tx.clear();
            self.thre_interrupt = true;
            self.thre_interrupt_at = None;
        }
    }
}

impl PioDevice for Uart16550 {
    fn read(&mut self, offset: u16, data: &mut [u8], now: VmTime) {
        self.advance(now);
        super::read_bytes(offset, data, |o| u8::try_from(o).map_or(0xff, |r| self.read_register(r, now)));
    }

    fn write(&mut self, offset: u16, data: &[u8], now: VmTime) -> Action {
        self.advance(now);
        for (register, value) in super::written_bytes(offset, data) {
            if let Ok(register) = u8::try_from(register) {
                self.write_register(register, *value, now);
            }
        }
        Action::None
    }

    /// OUT2 connects the chip's output to the interrupt line; in loopback the pin is disconnected.
    fn irq_level(&self) -> bool {
        self.mcr & mcr::OUT2 != 0 && !self.loopback() && self.interrupt() != iir::NONE
    }

    /// The earliest of: the transmit FIFO ran empty (not every single character, but those of a short message), the shift register ran empty, receive
    /// timeout, enough line time has passed for the input that waits.
    fn deadline(&self) -> Option<VmTime> {
        let interrupts = |bit: u8| self.ier & bit != 0;
        let transmit = match (self.shift, self.stalled) {
            (None, _) => None,
            // The output's owner is the one to move.
            (Some(_), true) if self.output.len() >= self.output_room => None,
            (Some(_), true) => Some(self.shift_done),
            (Some(_), false) => {
                let waiting = self.tx.len() as u64;
                let characters = match interrupts(ier::THR_EMPTY) {
                    true => waiting.saturating_sub(1),
                    // Nobody is told when the FIFO runs empty, but the other end waits for a short message. In a long one a guest
                    // that polls lets the time pass by itself.
                    false if self.since_quiet < FIFO => waiting,
                    false => waiting + FIFO as u64,
                };
                Some(self.shift_done.plus(characters * self.character_ns()))
            }
        };
        let thre = self.thre_interrupt_at.filter(|_| interrupts(ier::THR_EMPTY));
        let times_out = self.fifo_enabled() && !self.rx.is_empty() && !self.rx_timeout && !self.rx_interrupt();
        let timeout = (interrupts(ier::RX_AVAILABLE) && times_out).then(|| self.rx_timeout_at());
        let receive = (self.input_waiting > 0 && self.line_open() && self.rx_free() > 0).then(|| {
            // Characters below the trigger level may come together: nobody is told of them one by one.
            let batch = self.rx_trigger().saturating_sub(self.rx.len()).max(1);
            let n = batch.min(self.rx_free()).min(self.input_waiting);
            self.rx_line.plus(n as u64 * self.character_ns())
        });
        [transmit, thre, timeout, receive].into_iter().flatten().min()
    }

    fn tick(&mut self, now: VmTime) {
        self.advance(now);
    }
}
