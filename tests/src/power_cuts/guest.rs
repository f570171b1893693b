//! The guest's machine code, and what its records mean.
#![allow(unsafe_code)]

use crate::machine_code::machine_code;

machine_code!(
    /// The program.
    pub fn program, "teller.s", understudy_power_cuts_teller, understudy_power_cuts_end
);

/// Bytes of a record.
pub const RECORD: usize = 12;

/// What the guest tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// 1, 2, 3 …
    pub number: u32,
    /// Bytes that it has heard.
    pub heard: u32,
    /// It has just booted, and this is the newest number on its disk. The next record has the next one.
    pub boot: bool,
}

impl Record {
    /// `None` if it is damaged, or the guest says that something is wrong.
    pub fn parse(bytes: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (number, heard) = (word(0), word(4));
        let check = number.wrapping_mul(0x61c8_8647);
        let boot = heard == 0 && word(8) == !check;
        (boot || word(8) == check ^ heard).then_some(Self { number, heard, boot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_record_and_the_guests_complaint_are_no_records() {
        let mut bytes = [0; RECORD];
        for (at, word) in [(0, 7u32), (4, 300), (8, 7u32.wrapping_mul(0x61c8_8647) ^ 300)] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        assert_eq!(Record::parse(&bytes), Some(Record { number: 7, heard: 300, boot: false }));
        for bit in 0..RECORD * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::parse(&damaged), None, "bit {bit}");
        }
        assert_eq!(Record::parse(&[0xff; RECORD]), None);
    }

    #[test]
    fn the_program_fits_where_it_is_loaded() {
        assert!((64..4096).contains(&program().len()), "{}", program().len());
    }
}
