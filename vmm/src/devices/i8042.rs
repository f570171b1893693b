//! The keyboard controller as far as a machine without a PS/2 keyboard needs one: guests reset through it (command
//! 0xfe), and their probes get prompt answers that say "nothing attached". Port 0x92, its shortcut for reset and the
//! A20 gate, is here too.
//!
//! A probe hangs for half a second on every answer that does not come, so every command that has an answer gets one:
//! the self-test passes, both interface tests fail, the AUX loopback answers as a controller without AUX does.

use serde::{Deserialize, Serialize};

use super::{Action, PioDevice, RestoreError, Snapshot, VmTime};

/// Offset of the data port.
const DATA: u16 = 0;
/// Offset of the status and command port.
const COMMAND: u16 = 4;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;

const CTR_AUX_DISABLED: u8 = 0x20;
const CTR_KEYBOARD_DISABLED: u8 = 0x10;
/// Translation, both interfaces disabled, system flag.
const CTR_RESET: u8 = 0x74;

/// Output port: reset line inactive, A20 on.
const OUTPUT_PORT_RESET: u8 = 0x03;
const OUTPUT_PORT_NOT_RESET: u8 = 0x01;

/// The controller. Ports [`super::I8042_PORT`]; only offsets 0 and 4 are its own.
#[derive(Debug, Clone)]
pub struct I8042 {
    ctr: u8,
    output_port: u8,
    /// The byte that waits at the data port.
    output: Option<u8>,
    /// The command whose parameter comes next at the data port.
    command: Option<u8>,
    last_was_command: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl I8042 {
    /// A controller after power-on.
    #[must_use]
    pub fn new() -> Self {
        Self { ctr: CTR_RESET, output_port: OUTPUT_PORT_RESET, output: None, command: None, last_was_command: false }
    }

    fn read_register(&mut self, offset: u16) -> u8 {
        match offset {
            DATA => self.output.take().unwrap_or(0),
            COMMAND => {
                let mut status = STATUS_UNLOCKED | self.ctr & STATUS_SYSTEM;
                if self.output.is_some() {
                    status |= STATUS_OUTPUT_FULL;
                }
                if self.last_was_command {
                    status |= STATUS_COMMAND;
                }
                status
            }
            _ => 0xff,
        }
    }

    fn write_command(&mut self, command: u8) -> Action {
        self.last_was_command = true;
        self.command = None;
        match command {
            0x20 => self.output = Some(self.ctr),
            0x21..=0x3f => self.output = Some(0),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            0xa7 => self.ctr |= CTR_AUX_DISABLED,
            0xa8 => self.ctr &= !CTR_AUX_DISABLED,
            // Tests of the AUX and the keyboard interface: "clock line stuck low", as without a device.
            0xa9 | 0xab => self.output = Some(0x01),
            // The self-test also resets the controller.
            0xaa => {
                *self = Self { last_was_command: true, ..Self::new() };
                self.output = Some(0x55);
            }
            0xad => self.ctr |= CTR_KEYBOARD_DISABLED,
            0xae => self.ctr &= !CTR_KEYBOARD_DISABLED,
            // Input port: keyboard not locked.
            0xc0 => self.output = Some(0x80),
            0xd0 => self.output = Some(self.output_port),
            // Pulse output lines; line 0 is the CPU's reset.
            0xf0..=0xff if command & 0x01 == 0 => return Action::Reset,
            _ => {}
        }
        Action::None
    }

    fn write_data(&mut self, value: u8) -> Action {
        self.last_was_command = false;
        match self.command.take() {
            Some(0x60) => self.ctr = value,
            Some(0xd1) => {
                self.output_port = value | OUTPUT_PORT_NOT_RESET;
                if value & OUTPUT_PORT_NOT_RESET == 0 {
                    return Action::Reset;
                }
            }
            // Write to the output buffer; the loopback of AUX (0xd3) comes back without the AUX flag: no AUX here.
            Some(0xd2 | 0xd3) => self.output = Some(value),
            // For the keyboard or the mouse, and there is none.
            _ => {}
        }
        Action::None
    }
}

impl PioDevice for I8042 {
    fn read(&mut self, offset: u16, data: &mut [u8], _now: VmTime) {
        super::read_bytes(offset, data, |o| self.read_register(o));
    }

    fn write(&mut self, offset: u16, data: &[u8], _now: VmTime) -> Action {
        match (offset, data.first()) {
            (DATA, Some(value)) => self.write_data(*value),
            (COMMAND, Some(value)) => self.write_command(*value),
            _ => Action::None,
        }
    }
}

/// Saved states of the two devices.
pub mod state {
    use super::{Deserialize, Serialize};

    /// The keyboard controller, version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[allow(missing_docs)]
    pub struct V1 {
        pub ctr: u8,
        pub output_port: u8,
        pub output: Option<u8>,
        pub command: Option<u8>,
        pub last_was_command: bool,
    }

    /// Port 0x92, version 1.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    #[allow(missing_docs)]
    pub struct Port92V1 {
        pub a20: bool,
    }
}

impl Snapshot for I8042 {
    const KIND: &'static str = "i8042";
    const VERSION: u32 = 1;
    type State = state::V1;

    fn save(&self) -> state::V1 {
        let Self { ctr, output_port, output, command, last_was_command } = self.clone();
        state::V1 { ctr, output_port, output, command, last_was_command }
    }

    fn restore(&mut self, state: state::V1) -> Result<(), RestoreError> {
        let state::V1 { ctr, output_port, output, command, last_was_command } = state;
        if output_port & OUTPUT_PORT_NOT_RESET == 0 {
            return Err(RestoreError::invalid(Self::KIND, "the reset line is active"));
        }
        if let Some(command) = command.filter(|c| !matches!(c, 0x60..=0x7f | 0xd1..=0xd4)) {
            return Err(RestoreError::invalid(Self::KIND, format!("command {command:#04x} has no parameter")));
        }
        *self = Self { ctr, output_port, output, command, last_was_command };
        Ok(())
    }
}

/// System control port A (0x92): bit 0 resets, bit 1 gates A20 (which is always on here; the bit reads back).
#[derive(Debug, Clone)]
pub struct Port92 {
    a20: bool,
}

impl Default for Port92 {
    fn default() -> Self {
        Self::new()
    }
}

impl Port92 {
    /// The port after power-on: A20 on.
    #[must_use]
    pub fn new() -> Self {
        Self { a20: true }
    }
}

impl PioDevice for Port92 {
    fn read(&mut self, offset: u16, data: &mut [u8], _now: VmTime) {
        super::read_bytes(offset, data, |o| if o == 0 { u8::from(self.a20) << 1 } else { 0xff });
    }

    fn write(&mut self, offset: u16, data: &[u8], _now: VmTime) -> Action {
        let (0, Some(value)) = (offset, data.first()) else { return Action::None };
        self.a20 = value & 0x02 != 0;
        if value & 0x01 != 0 { Action::Reset } else { Action::None }
    }
}

impl Snapshot for Port92 {
    const KIND: &'static str = "port92";
    const VERSION: u32 = 1;
    type State = state::Port92V1;

    fn save(&self) -> state::Port92V1 {
        let Self { a20 } = *self;
        state::Port92V1 { a20 }
    }

    fn restore(&mut self, state: state::Port92V1) -> Result<(), RestoreError> {
        let state::Port92V1 { a20 } = state;
        self.a20 = a20;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{hammer, snapshot_tests};
    use super::*;

    const T0: VmTime = VmTime(0);

    fn command(controller: &mut I8042, command: u8) -> Action {
        controller.write(COMMAND, &[command], T0)
    }

    fn read(controller: &mut I8042, offset: u16) -> u8 {
        let mut data = [0];
        controller.read(offset, &mut data, T0);
        data[0]
    }

    fn used() -> I8042 {
        let mut controller = I8042::new();
        for (offset, value) in [(4, 0x60), (0, 0x47), (4, 0xd1), (0, 0xdd), (4, 0x20), (4, 0xd4)] {
            assert_eq!(controller.write(offset, &[value], T0), Action::None);
        }
        controller
    }

    snapshot_tests! {
        fresh: I8042::new(),
        used: used(),
        exercise: |controller| {
            read(controller, DATA);
            let _ = controller.write(DATA, &[0], T0);
        },
        golden: "47dd014701d401",
    }

    #[test]
    fn random_accesses_never_panic() {
        hammer(5, I8042::new, |_, _| {});
        hammer(1, Port92::new, |_, _| {});
    }

    #[test]
    fn every_way_to_reset_resets() {
        assert_eq!(command(&mut I8042::new(), 0xfe), Action::Reset);
        let mut controller = I8042::new();
        assert_eq!(command(&mut controller, 0xd1), Action::None);
        assert_eq!(controller.write(DATA, &[0x02], T0), Action::Reset);
        assert_eq!(Port92::new().write(0, &[0x03], T0), Action::Reset);
        assert_eq!(Port92::new().write(0, &[0x02], T0), Action::None);
        assert_eq!(command(&mut I8042::new(), 0xff), Action::None, "pulses no line");
    }

    #[test]
    fn every_question_of_a_probe_is_answered_at_once() {
        let mut controller = I8042::new();
        for (question, answer) in [(0xaa, 0x55), (0x20, CTR_RESET), (0xab, 0x01), (0xa9, 0x01), (0xd0, 0x03)] {
            assert_eq!(command(&mut controller, question), Action::None);
            assert_eq!(read(&mut controller, COMMAND) & 0x23, 0x01, "{question:#x}: output full, not AUX, input empty");
            assert_eq!(read(&mut controller, DATA), answer, "{question:#x}");
            assert_eq!(read(&mut controller, COMMAND) & 0x01, 0);
        }
    }

    #[test]
    fn data_without_a_command_goes_to_no_keyboard() {
        let mut controller = I8042::new();
        assert_eq!(controller.write(DATA, &[0xf2], T0), Action::None);
        assert_eq!(read(&mut controller, COMMAND) & 0x01, 0);
    }

    mod port92 {
        use super::*;

        fn used() -> Port92 {
            let mut port = Port92::new();
            assert_eq!(port.write(0, &[0x00], T0), Action::None);
            port
        }

        snapshot_tests! {
            fresh: Port92::new(),
            used: used(),
            exercise: |port| _ = port.write(0, &[0x02], T0),
            golden: "00",
        }
    }
}
