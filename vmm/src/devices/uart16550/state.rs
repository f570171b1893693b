//! Saved state of a UART.

use serde::{Deserialize, Serialize};

use super::registers::{fcr, ier, lsr, mcr, msr};
use super::{FIFO, OUTPUT_MAX, Uart16550};
use crate::devices::{RestoreError, Snapshot, VmTime};

/// Version 1. Field by field the device's own; see there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct V1 {
    pub divisor: u16,
    pub ier: u8,
    pub fcr: u8,
    pub lcr: u8,
    pub mcr: u8,
    pub scratch: u8,
    pub lsr_latched: u8,
    pub msr_deltas: u8,
    pub thre_interrupt: bool,
    pub thre_interrupt_at: Option<VmTime>,
    pub rx_timeout: bool,
    pub modem_inputs: u8,
    pub rx: Vec<u8>,
    pub tx: Vec<u8>,
    pub shift: Option<u8>,
    pub shift_done: VmTime,
    pub stalled: bool,
    pub rx_activity: VmTime,
    pub rx_line: VmTime,
    pub output: Vec<u8>,
    pub tx_total: u64,
    pub rx_total: u64,
}

impl V1 {
    /// Whether a UART can have had this state.
    fn validate(&self) -> Result<(), RestoreError> {
        let masked = [
            ("interrupt enable", self.ier, ier::ALL),
            ("FIFO control", self.fcr, fcr::KEPT),
            ("modem control", self.mcr, mcr::ALL),
            ("line status", self.lsr_latched, lsr::LATCHED),
            ("modem status", self.msr_deltas, msr::DELTAS),
            ("modem inputs", self.modem_inputs, !msr::DELTAS),
        ];
        for (register, value, allowed) in masked {
            if value & !allowed != 0 {
                return Err(RestoreError::invalid(Uart16550::KIND, format!("{register} is {value:#04x}")));
            }
        }
        let depth = if self.fcr & fcr::ENABLE != 0 { FIFO } else { 1 };
        for (fifo, len, limit) in [
            ("receive", self.rx.len(), depth),
            ("transmit", self.tx.len(), depth),
            ("output", self.output.len(), OUTPUT_MAX),
        ] {
            if len > limit {
                return Err(RestoreError::invalid(
                    Uart16550::KIND,
                    format!("{len} bytes in the {fifo} buffer of {limit}"),
                ));
            }
        }
        if self.shift.is_none() && (self.stalled || !self.tx.is_empty()) {
            return Err(RestoreError::invalid(
                Uart16550::KIND,
                "the shift register is empty although bytes wait for it",
            ));
        }
        if (self.output.len() as u64) > self.tx_total {
            return Err(RestoreError::invalid(Uart16550::KIND, "more bytes wait than were ever sent"));
        }
        Ok(())
    }
}

impl Snapshot for Uart16550 {
    const KIND: &'static str = "uart16550";
    const VERSION: u32 = 1;
    type State = V1;

    fn save(&self) -> V1 {
        let Self {
            divisor,
            ier,
            fcr,
            lcr,
            mcr,
            scratch,
            lsr_latched,
            msr_deltas,
            thre_interrupt,
            thre_interrupt_at,
            rx_timeout,
            modem_inputs,
            rx,
            tx,
            shift,
            shift_done,
            stalled,
            rx_activity,
            rx_line,
            output,
            tx_total,
            rx_total,
            since_quiet: _,
            output_room: _,
            input_waiting: _,
        } = self;
        V1 {
            divisor: *divisor,
            ier: *ier,
            fcr: *fcr,
            lcr: *lcr,
            mcr: *mcr,
            scratch: *scratch,
            lsr_latched: *lsr_latched,
            msr_deltas: *msr_deltas,
            thre_interrupt: *thre_interrupt,
            thre_interrupt_at: *thre_interrupt_at,
            rx_timeout: *rx_timeout,
            modem_inputs: *modem_inputs,
            rx: rx.iter().copied().collect(),
            tx: tx.iter().copied().collect(),
            shift: *shift,
            shift_done: *shift_done,
            stalled: *stalled,
            rx_activity: *rx_activity,
            rx_line: *rx_line,
            output: output.clone(),
            tx_total: *tx_total,
            rx_total: *rx_total,
        }
    }

    fn restore(&mut self, state: V1) -> Result<(), RestoreError> {
        state.validate()?;
        *self = Self {
            divisor: state.divisor,
            ier: state.ier,
            fcr: state.fcr,
            lcr: state.lcr,
            mcr: state.mcr,
            scratch: state.scratch,
            lsr_latched: state.lsr_latched,
            msr_deltas: state.msr_deltas,
            thre_interrupt: state.thre_interrupt,
            thre_interrupt_at: state.thre_interrupt_at,
            rx_timeout: state.rx_timeout,
            modem_inputs: state.modem_inputs,
            rx: state.rx.into(),
            tx: state.tx.into(),
            shift: state.shift,
            shift_done: state.shift_done,
            stalled: state.stalled,
            rx_activity: state.rx_activity,
            rx_line: state.rx_line,
            output: state.output,
            tx_total: state.tx_total,
            rx_total: state.rx_total,
            since_quiet: FIFO,
            output_room: self.output_room,
            input_waiting: self.input_waiting,
        };
        Ok(())
    }
}
