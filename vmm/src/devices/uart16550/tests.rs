use super::super::testing::{assert_ticks_are_invisible, hammer, snapshot_tests};
use super::registers::lsr;
use super::*;

const CHAR: u64 = 86_805; // 10 bits at 115200 baud

const THR: u16 = 0;
const RBR: u16 = 0;
const IER: u16 = 1;
const IIR: u16 = 2;
const FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

fn write(uart: &mut Uart16550, register: u16, value: u8, now: u64) {
    assert_eq!(uart.write(register, &[value], VmTime(now)), Action::None);
}

fn read(uart: &mut Uart16550, register: u16, now: u64) -> u8 {
    let mut data = [0];
    uart.read(register, &mut data, VmTime(now));
    data[0]
}

/// As a driver sets it up: FIFOs on, trigger 8, DTR, RTS, OUT2.
fn open() -> Uart16550 {
    let mut uart = Uart16550::new();
    write(&mut uart, FCR, 0x87, 0);
    write(&mut uart, MCR, 0x0b, 0);
    uart
}

fn used() -> Uart16550 {
    let mut uart = open();
    write(&mut uart, LCR, 0x80, 0);
    write(&mut uart, THR, 2, 0);
    write(&mut uart, IER, 0, 0);
    write(&mut uart, LCR, 0x1b, 0);
    write(&mut uart, IER, 0x0f, 0);
    write(&mut uart, SCR, 0x5a, 0);
    uart.set_modem_inputs(ModemInputs { cts: false, dsr: true, ri: true, dcd: false });
    for byte in b"hello" {
        write(&mut uart, THR, *byte, 1000);
    }
    uart.set_output_room(2, VmTime(1000));
    assert_eq!(uart.receive(b"abc", VmTime(10_000_000)), 3);
    uart.tick(VmTime(11_000_000));
    uart
}

snapshot_tests! {
    fresh: Uart16550::new(),
    used: used(),
    exercise: |uart| {
        for register in 0..8 {
            write(uart, register, 0xff, 20_000_000);
            read(uart, register, 20_000_001);
        }
        uart.tick(VmTime(u64::MAX));
        uart.deadline();
        uart.rx_room(VmTime(u64::MAX));
    },
    golden: "020f811b0b5a00090000016003616263026c6f016cdc83230180ade204b4e9ca030268650203",
}

#[test]
fn when_it_is_ticked_makes_no_difference_to_the_guest() {
    assert_ticks_are_invisible(8, Uart16550::new);
}

#[test]
fn random_accesses_never_panic_and_never_outrun_the_line() {
    hammer(8, Uart16550::new, |uart, now| {
        assert!(uart.rx.len() <= FIFO && uart.tx.len() <= FIFO);
        assert!(uart.output.len() <= 4096);
        assert!(uart.shift.is_some() || uart.tx.is_empty());
        // The fastest line: 5N1 at divisor 1.
        assert!(uart.tx_total <= now.0 / 60_763 + 1);
        let room = uart.rx_room(now);
        assert_eq!(uart.receive(&[0x55; 32], now), room);
    });
}

#[test]
fn a_byte_leaves_after_its_character_time() {
    let mut uart = open();
    write(&mut uart, THR, b'A', 1000);
    assert_eq!(read(&mut uart, LSR, 1000) & 0x60, 0x20, "in the shift register: THR empty, transmitter not");
    uart.tick(VmTime(1000 + CHAR - 1));
    assert_eq!(uart.take_output(), b"");
    uart.tick(VmTime(1000 + CHAR));
    assert_eq!(uart.take_output(), b"A");
    assert_eq!(uart.tx_total(), 1);
    assert_eq!(read(&mut uart, LSR, 1000 + CHAR) & 0x60, 0x60);
    assert_eq!(uart.deadline(), None);
}

#[test]
fn a_saturated_line_carries_11520_bytes_a_second_with_a_tick_per_fifo() {
    let mut uart = open();
    write(&mut uart, IER, 0x02, 0);
    assert!(uart.irq_level());
    let (mut now, mut ticks, mut sent) = (0, 0u32, 0u8);
    let mut out = Vec::new();
    while now < 1_000_000_000 {
        if uart.irq_level() && read(&mut uart, IIR, now) & 0x0f == 0x02 {
            for _ in 0..16 {
                write(&mut uart, THR, sent, now);
                sent = sent.wrapping_add(1);
            }
        }
        now = uart.deadline().unwrap().0.max(now);
        uart.tick(VmTime(now));
        out.extend(uart.take_output());
        ticks += 1;
    }
    let line = now as usize / CHAR as usize;
    assert!((line - 16..=line).contains(&out.len()), "{} bytes in {line} characters' time", out.len());
    assert!(out.len() > 11_500);
    assert!(ticks < 730, "{ticks} ticks");
    assert!(out.iter().enumerate().all(|(i, b)| *b == i as u8), "in order, nothing lost");
    assert_eq!(uart.tx_total(), out.len() as u64);
}

#[test]
fn a_deadline_for_each_character_is_not_needed() {
    let mut uart = open();
    for i in 0..16 {
        write(&mut uart, THR, i, 0);
    }
    assert_eq!(uart.deadline(), Some(VmTime((1 + 15 + 16) * CHAR)), "a guest that polls");
    write(&mut uart, IER, 0x02, 0);
    assert_eq!(uart.deadline(), Some(VmTime(15 * CHAR)), "a guest that is to be told");
}

#[test]
fn a_short_message_of_a_guest_that_polls_leaves_without_waiting_for_more() {
    let mut uart = open();
    let mut at = 16 * CHAR;
    for i in 1..16 {
        write(&mut uart, THR, i, at);
        assert_eq!(uart.deadline(), Some(VmTime(at + CHAR)), "character {i}");
        at += CHAR;
        uart.tick(VmTime(at));
        assert_eq!(uart.take_output(), [i]);
    }
    write(&mut uart, THR, 16, at);
    assert_eq!(uart.deadline(), Some(VmTime(at + 17 * CHAR)), "a long one goes on with a tick for a FIFO of it");
    write(&mut uart, THR, 1, 100 * CHAR);
    write(&mut uart, THR, 2, 100 * CHAR);
    assert_eq!(uart.deadline(), Some(VmTime(102 * CHAR)), "what is written at once leaves at once");
}

#[test]
fn without_output_room_the_transmitter_stalls_and_loses_nothing() {
    let mut uart = open();
    uart.set_output_room(0, VmTime(0));
    write(&mut uart, THR, 1, 0);
    write(&mut uart, THR, 2, 0);
    uart.tick(VmTime(1_000_000_000));
    assert_eq!(uart.take_output(), b"");
    assert_eq!(read(&mut uart, LSR, 1_000_000_000) & 0x20, 0, "THR stays full");
    assert_eq!(uart.deadline(), None, "nothing happens before there is room");
    uart.set_output_room(100, VmTime(2_000_000_000));
    assert_eq!(uart.take_output(), [1]);
    uart.tick(VmTime(2_000_000_000 + CHAR - 1));
    assert_eq!(uart.take_output(), b"", "the next character takes its time from the end of the stall");
    uart.tick(VmTime(2_000_000_000 + CHAR));
    assert_eq!(uart.take_output(), [2]);
}

#[test]
fn taking_the_output_makes_room() {
    let mut uart = open();
    uart.set_output_room(1, VmTime(0));
    write(&mut uart, THR, 1, 0);
    write(&mut uart, THR, 2, 0);
    uart.tick(VmTime(10 * CHAR));
    assert_eq!(uart.deadline(), None);
    assert_eq!(uart.take_output(), [1]);
    let at = uart.deadline().expect("due at once");
    assert!(at <= VmTime(10 * CHAR));
    uart.tick(VmTime(10 * CHAR));
    assert_eq!(uart.take_output(), [2]);
}

#[test]
fn a_single_byte_to_an_idle_transmitter_delays_the_thre_interrupt() {
    let mut uart = open();
    write(&mut uart, IER, 0x02, 0);
    assert_eq!(read(&mut uart, IIR, 0), 0xc2);
    assert_eq!(read(&mut uart, IIR, 0), 0xc1, "reading IIR acknowledges");
    write(&mut uart, THR, 1, 0);
    assert!(!uart.irq_level(), "a driver that fills the FIFO is not interrupted");
    uart.tick(uart.deadline().unwrap());
    assert!(uart.irq_level());
}

#[test]
fn enabling_the_thre_interrupt_on_an_empty_transmitter_raises_it() {
    let mut uart = open();
    write(&mut uart, IER, 0x02, 0);
    assert!(uart.irq_level());
    write(&mut uart, IER, 0x00, 0);
    assert!(!uart.irq_level());
    write(&mut uart, IER, 0x02, 0);
    assert!(uart.irq_level());
}

#[test]
fn out2_gates_the_interrupt_line() {
    let mut uart = open();
    write(&mut uart, IER, 0x02, 0);
    write(&mut uart, MCR, 0x03, 0);
    assert!(!uart.irq_level());
    write(&mut uart, MCR, 0x0b, 0);
    assert!(uart.irq_level());
}

#[test]
fn input_comes_at_line_rate_and_never_overruns() {
    let mut uart = open();
    write(&mut uart, IER, 0x01, 0);
    let input: Vec<u8> = (0..100).collect();
    let (mut now, mut given, mut got) = (50 * CHAR, 0, Vec::new());
    let start = now;
    while got.len() < input.len() {
        given += uart.receive(&input[given..], VmTime(now));
        uart.set_input_waiting(input.len() - given);
        while uart.irq_level() {
            while read(&mut uart, LSR, now) & 1 != 0 {
                got.push(read(&mut uart, RBR, now));
            }
        }
        match uart.deadline() {
            Some(at) => now = now.max(at.0),
            None => break,
        }
        uart.tick(VmTime(now));
        assert_eq!(read(&mut uart, LSR, now) & 0x02, 0, "no overrun");
    }
    assert_eq!(got, input);
    assert_eq!(uart.rx_total(), 100);
    // A line that was idle saves up at most one FIFO.
    assert!(now - start >= (100 - 16) * CHAR, "100 bytes took {} characters", (now - start) / CHAR);
    assert!(now - start <= 110 * CHAR, "100 bytes took {} characters", (now - start) / CHAR);
}

#[test]
fn a_full_fifo_takes_no_input_until_the_guest_reads() {
    let mut uart = open();
    let now = 100 * CHAR;
    assert_eq!(uart.receive(&[7; 32], VmTime(now)), 16);
    assert_eq!(uart.rx_room(VmTime(2 * now)), 0);
    uart.set_input_waiting(16);
    assert_eq!(uart.deadline(), None);
    assert_eq!(read(&mut uart, RBR, 2 * now), 7);
    assert_eq!(uart.rx_room(VmTime(2 * now)), 1);
}

#[test]
fn input_waits_until_the_guest_opens_the_line() {
    let mut uart = Uart16550::new();
    assert_eq!(uart.rx_room(VmTime(100 * CHAR)), 0);
    write(&mut uart, MCR, 0x02, 0);
    assert_eq!(uart.rx_room(VmTime(100 * CHAR)), 1, "polled guests assert RTS; no FIFO: one byte");
    write(&mut uart, MCR, 0x00, 0);
    write(&mut uart, IER, 0x01, 0);
    assert_eq!(uart.rx_room(VmTime(100 * CHAR)), 1, "or enable the interrupt");
    write(&mut uart, MCR, 0x13, 0);
    assert_eq!(uart.rx_room(VmTime(100 * CHAR)), 0, "in loopback the pin is disconnected");
}

#[test]
fn opening_as_linux_does_keeps_what_came_after_the_clear() {
    let mut uart = Uart16550::new();
    for fcr in [0x01, 0x07, 0x00] {
        write(&mut uart, FCR, fcr, 0);
    }
    write(&mut uart, IER, 0x05, 0);
    assert_eq!(uart.receive(b"x", VmTime(CHAR)), 1);
    write(&mut uart, FCR, 0x01, CHAR);
    write(&mut uart, FCR, 0x81, CHAR);
    assert_eq!(read(&mut uart, RBR, CHAR), b'x');
}

#[test]
fn few_bytes_below_the_trigger_interrupt_after_four_characters_of_silence() {
    let mut uart = open();
    write(&mut uart, IER, 0x01, 0);
    let now = 100 * CHAR;
    assert_eq!(uart.receive(b"ab", VmTime(now)), 2);
    assert!(!uart.irq_level());
    assert_eq!(uart.deadline(), Some(VmTime(now + 4 * CHAR)));
    uart.tick(VmTime(now + 4 * CHAR));
    assert!(uart.irq_level());
    assert_eq!(read(&mut uart, IIR, now + 4 * CHAR), 0xcc);
    assert_eq!(read(&mut uart, RBR, now + 4 * CHAR), b'a');
    assert!(!uart.irq_level(), "reading restarts the clock");
    assert_eq!(uart.deadline(), Some(VmTime(now + 8 * CHAR)));
}

#[test]
fn interrupts_are_reported_by_priority() {
    let mut uart = open();
    let now = 100 * CHAR;
    write(&mut uart, IER, 0x0f, now);
    uart.set_modem_inputs(ModemInputs { cts: false, dsr: true, ri: false, dcd: true });
    uart.receive(&[1; 8], VmTime(now));
    uart.lsr_latched = lsr::OVERRUN;
    assert_eq!(read(&mut uart, IIR, now), 0xc6);
    assert_eq!(read(&mut uart, LSR, now), 0x63);
    assert_eq!(read(&mut uart, IIR, now), 0xc4);
    for _ in 0..8 {
        read(&mut uart, RBR, now);
    }
    assert_eq!(read(&mut uart, IIR, now), 0xc2);
    assert_eq!(read(&mut uart, IIR, now), 0xc0);
    assert_eq!(read(&mut uart, MSR, now), 0xa1);
    assert_eq!(read(&mut uart, IIR, now), 0xc1);
    assert!(!uart.irq_level());
}

#[test]
fn linux_recognises_a_16550a() {
    // drivers/tty/serial/8250/8250_port.c, autoconfig(): scratch, IER, loopback, IIR.
    let mut uart = Uart16550::new();
    write(&mut uart, IER, 0, 0);
    assert_eq!(read(&mut uart, IER, 0) & 0x0f, 0);
    write(&mut uart, IER, 0x0f, 0);
    assert_eq!(read(&mut uart, IER, 0) & 0x0f, 0x0f);
    write(&mut uart, IER, 0, 0);
    write(&mut uart, MCR, 0x10 | 0x0a, 0);
    assert_eq!(read(&mut uart, MSR, 0) & 0xf0, 0x90);
    write(&mut uart, MCR, 0, 0);
    write(&mut uart, FCR, 0x01, 0);
    assert_eq!(read(&mut uart, IIR, 0) >> 6, 3);
    write(&mut uart, SCR, 0xa5, 0);
    assert_eq!(read(&mut uart, SCR, 0), 0xa5);
    // Not one of the better chips: no EFR behind LCR 0xbf, no extra IER bits.
    write(&mut uart, IER, 0xff, 0);
    assert_eq!(read(&mut uart, IER, 0), 0x0f);
}

#[test]
fn loopback_returns_bytes_to_the_guest_and_not_to_the_line() {
    let mut uart = open();
    write(&mut uart, MCR, 0x1b, 0);
    write(&mut uart, THR, 0x42, 0);
    assert_eq!(read(&mut uart, LSR, CHAR) & 1, 1);
    assert_eq!(read(&mut uart, RBR, CHAR), 0x42);
    assert_eq!(uart.take_output(), b"");
    assert_eq!((uart.tx_total(), uart.rx_total()), (0, 0));
    for i in 0..40 {
        write(&mut uart, THR, i, CHAR * (2 + u64::from(i)));
    }
    assert_eq!(read(&mut uart, LSR, 100 * CHAR) & 0x02, 0x02, "the guest can overrun itself");
}

#[test]
fn the_divisor_and_the_frame_set_the_character_time() {
    for (divisor, lcr, ns) in [
        (1u16, 0x03u8, 86_805u64), // 115200 8N1
        (12, 0x03, 1_041_666),     // 9600 8N1
        (1, 0x00, 60_763),         // 5N1
        (1, 0x04, 65_104),         // 5N1.5
        (1, 0x1f, 104_166),        // 8E2
        (0, 0x03, 86_805),
    ] {
        let mut uart = Uart16550::new();
        write(&mut uart, LCR, 0x80, 0);
        write(&mut uart, 0, divisor as u8, 0);
        write(&mut uart, 1, (divisor >> 8) as u8, 0);
        assert_eq!(read(&mut uart, 0, 0), divisor as u8);
        write(&mut uart, LCR, lcr, 0);
        assert_eq!(uart.character_ns(), ns, "divisor {divisor}, LCR {lcr:#x}");
    }
}

#[test]
fn a_guest_reset_keeps_the_totals_and_what_had_left() {
    let mut uart = used();
    uart.set_output_room(100, VmTime(20_000_000));
    let (tx, rx) = (uart.tx_total(), uart.rx_total());
    uart.reset(VmTime(20_000_000));
    assert_eq!((uart.tx_total(), uart.rx_total()), (tx, rx));
    assert_eq!(uart.take_output().len() as u64, tx);
    assert_eq!(read(&mut uart, IER, 20_000_000), 0);
    assert_eq!(read(&mut uart, LSR, 20_000_000), 0x60);
}

#[test]
fn break_and_modem_lines_reach_the_other_end() {
    let mut uart = open();
    assert_eq!(uart.modem_outputs(), ModemOutputs { dtr: true, rts: true, break_condition: false });
    write(&mut uart, LCR, 0x43, 0);
    write(&mut uart, MCR, 0x01, 0);
    assert_eq!(uart.modem_outputs(), ModemOutputs { dtr: true, rts: false, break_condition: true });
}
