//! Numbered, checksummed lines, the same shape both ways:
//!
//! ```text
//! KIND NUMBER [FIELD …] CRC32\n          CRC32: 8 lower-case hex digits, IEEE, over everything before the space in front of it
//!
//! guest → device                                              numbers 1, 2, 3 … over all kinds
//!   L n BOOT8 MONOTONIC_MS                                    filler, as fast as the line allows
//!   C n boot=UUID mono_ns=… boottime_ns=… real_ns=… back=… rng=… hvc=…
//!   R n last=… gaps=… repeats=… bad=…                         what arrived from the device so far
//!   M n round=… page=… written=… bad=…                        state of the memory sweep
//!   E n TEXT                                                  something is wrong; every one is a violation
//!   P n poweroff                                              the last line of an orderly shutdown
//! guest with databases → device, nothing else from it           numbers 1, 2, 3 … from each boot on, which begins with a newline
//!   B n boot=UUID fsck=… sqlite_check=… postgres_check=… ring=… files=… sqlite=… postgres=…      what the disk knew at the boot
//!   T n tx=… ring=…                                   this transaction is durable everywhere, this number in the ring
//! guest that measures a disk → device
//!   Q n round=… op=… order=… bytes=… depth=… count=… us=…     and `Q n done` at the end
//! device → guest                                              numbers 1, 2, 3 …
//!   D n
//! ```
//! One counter over all kinds is what lets the far end see a lost, repeated or reordered line without knowing kinds.

use std::fmt;

/// Longest line that is written or accepted, newline included.
pub const MAX_LINE: usize = 240;

/// A line that passed its checksum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line<'a> {
    /// One upper-case letter.
    pub kind: char,
    /// Position in its direction's stream, from 1.
    pub number: u64,
    /// What stands between the number and the checksum; may be empty.
    pub fields: &'a str,
}

/// Why bytes are not a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// Not printable ASCII, or not the shape of a line.
    Shape,
    /// The checksum does not fit.
    Checksum,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shape => "not the shape of a line",
            Self::Checksum => "checksum does not fit",
        })
    }
}

/// One line with its newline. Characters of `fields` that could break the line become `?`, excess is cut off.
pub fn encode(kind: char, number: u64, fields: &str) -> String {
    let mut text = format!("{kind} {number}");
    if !fields.is_empty() {
        text.push(' ');
        text.extend(fields.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' }));
        text.truncate(MAX_LINE - 10);
    }
    let crc = crc32fast::hash(text.as_bytes());
    format!("{text} {crc:08x}\n")
}

/// Read one line, given without its newline.
pub fn parse(bytes: &[u8]) -> Result<Line<'_>, Malformed> {
    if bytes.len() >= MAX_LINE || !bytes.iter().all(|b| *b == b' ' || b.is_ascii_graphic()) {
        return Err(Malformed::Shape);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed::Shape)?;
    let (body, crc) = text.rsplit_once(' ').ok_or(Malformed::Shape)?;
    let lower_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if crc.len() != 8 || !crc.bytes().all(lower_hex) {
        return Err(Malformed::Shape);
    }
    // Cannot fail: eight hex digits were just seen.
    let crc = u32::from_str_radix(crc, 16).map_err(|_| Malformed::Shape)?;
    if crc != crc32fast::hash(body.as_bytes()) {
        return Err(Malformed::Checksum);
    }
    let mut parts = body.splitn(3, ' ');
    let kind = parts.next().unwrap_or_default();
    let number = parts.next().unwrap_or_default();
    let fields = parts.next().unwrap_or_default();
    let mut letters = kind.chars();
    match (letters.next(), letters.next(), number.parse()) {
        (Some(kind), None, Ok(number)) if kind.is_ascii_uppercase() => Ok(Line { kind, number, fields }),
        _ => Err(Malformed::Shape),
    }
}

impl Line<'_> {
    /// The value of `key=value` among the fields.
    pub fn field(&self, key: &str) -> Option<&str> {
        self.fields.split(' ').find_map(|f| f.strip_prefix(key)?.strip_prefix('='))
    }

    /// As [`Self::field`], as a number.
    pub fn count(&self, key: &str) -> Option<u64> {
        self.field(key)?.parse().ok()
    }
}

/// Bytes as a person can read them: printable ASCII as it is, the rest escaped.
pub fn printable(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

/// Cuts a byte stream into lines; whatever is too long for a line comes out as a piece of its own.
#[derive(Debug, Clone, Default)]
pub struct Splitter {
    pending: Vec<u8>,
}

impl Splitter {
    /// Hand in bytes; `each` gets every complete line without its newline, and every over-long piece.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for &byte in bytes {
            if byte == b'\n' {
                each(&self.pending);
                self.pending.clear();
                continue;
            }
            self.pending.push(byte);
            if self.pending.len() >= MAX_LINE {
                each(&self.pending);
                self.pending.clear();
            }
        }
    }

    /// Bytes of a line that has not ended yet.
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }
}

/// The guest's book-keeping over the lines that arrive from the device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Received {
    /// Highest number seen; 0 before the first line.
    pub last: u64,
    /// Numbers that were skipped.
    pub gaps: u64,
    /// Lines whose number had been seen or skipped before.
    pub repeats: u64,
    /// Lines that are none.
    pub bad: u64,
}

impl Received {
    /// Judge one line (without its newline). `Some` says in words what is wrong with it.
    pub fn take(&mut self, bytes: &[u8]) -> Option<String> {
        let line = match parse(bytes) {
            Ok(line) if line.kind == 'D' => line,
            Ok(line) => {
                self.bad += 1;
                return Some(format!("rx after {}: a line of kind {}", self.last, line.kind));
            }
            Err(why) => {
                self.bad += 1;
                return Some(format!("rx after {}: {why}: {}", self.last, printable(bytes)));
            }
        };
        let expected = self.last + 1;
        if line.number < expected {
            self.repeats += 1;
            return Some(format!("rx repeated {} after {}", line.number, self.last));
        }
        self.last = line.number;
        if line.number == expected {
            return None;
        }
        self.gaps += line.number - expected;
        Some(format!("rx gap: {} instead of {expected}", line.number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_parsed_again() {
        let text = encode('L', 7, "1a2b3c4d 1234");
        let line = parse(text.trim_end().as_bytes()).unwrap();
        assert_eq!((line.kind, line.number, line.fields), ('L', 7, "1a2b3c4d 1234"));
        assert_eq!(parse(encode('D', 1, "").trim_end().as_bytes()).unwrap().fields, "");
        let text = encode('R', 9, "last=5 gaps=0");
        assert_eq!(parse(text.trim_end().as_bytes()).unwrap().count("last"), Some(5));
    }

    #[test]
    fn every_single_byte_error_is_noticed() {
        let good = encode('L', 4711, "1a2b3c4d 99887766");
        let good = good.trim_end().as_bytes();
        for at in 0..good.len() {
            let mut lost = good.to_vec();
            lost.remove(at);
            assert!(parse(&lost).is_err(), "byte {at} lost");
            let mut repeated = good.to_vec();
            repeated.insert(at, good[at]);
            assert!(parse(&repeated).is_err(), "byte {at} repeated");
            for bit in 0..8 {
                let mut flipped = good.to_vec();
                flipped[at] ^= 1 << bit;
                assert!(parse(&flipped).is_err(), "bit {bit} of byte {at} flipped");
            }
        }
    }

    #[test]
    fn a_field_cannot_break_its_line() {
        let text = encode('E', 1, &format!("a\nb\u{e4}{}", "x".repeat(400)));
        assert!(text.len() <= MAX_LINE);
        assert_eq!(text.matches('\n').count(), 1);
        assert!(parse(text.trim_end().as_bytes()).is_ok());
    }

    #[test]
    fn a_stream_without_newlines_does_not_grow_the_buffer() {
        let mut splitter = Splitter::default();
        let mut pieces = 0;
        splitter.feed(&[b'x'; 10_000], |_| pieces += 1);
        assert!(pieces > 0 && splitter.pending().len() < MAX_LINE);
    }

    #[test]
    fn the_receiver_counts_gaps_repeats_and_bad_lines() {
        let mut received = Received::default();
        let d = |n: u64| encode('D', n, "").trim_end().as_bytes().to_vec();
        assert_eq!(received.take(&d(1)), None);
        assert_eq!(received.take(&d(2)), None);
        assert!(received.take(&d(2)).is_some());
        assert!(received.take(&d(5)).is_some());
        assert_eq!(received.take(&d(6)), None);
        assert!(received.take(b"D 7 00000000").is_some());
        assert!(received.take(encode('L', 7, "").trim_end().as_bytes()).is_some());
        assert_eq!(received, Received { last: 6, gaps: 2, repeats: 1, bad: 2 });
    }
}
