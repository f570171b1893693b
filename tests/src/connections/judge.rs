//! What clients were told, and whether it can be true. Pure: lines, bytes and times in, the first contradiction out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

/// A shell that counts, and says back what it is told: `tick N` and `echo N` from 1 on, each once and in order.
#[derive(Debug, Default)]
pub struct Shell {
    /// Newest of the shell's own numbers.
    pub ticks: u64,
    /// Newest number that it was told and said back.
    pub echoes: u64,
    /// Newest number that it was told.
    pub told: u64,
}

/// What a line of [`Shell`] was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// By itself.
    Tick,
    /// In answer.
    Echo,
}

impl Shell {
    /// The next number to tell.
    pub fn tell(&mut self) -> u64 {
        self.told += 1;
        self.told
    }

    /// A line came.
    pub fn line(&mut self, line: &str) -> Result<Said, String> {
        let number = |text: &str| text.parse::<u64>().map_err(|_| format!("the shell said {line:?}"));
        match line.split_once(' ') {
            Some(("tick", n)) if number(n)? == self.ticks + 1 => {
                self.ticks += 1;
                Ok(Said::Tick)
            }
            Some(("echo", n)) if number(n)? == self.echoes + 1 && self.echoes < self.told => {
                self.echoes += 1;
                Ok(Said::Echo)
            }
            _ => Err(format!(
                "the shell said {line:?} after tick {} and echo {} (it was told {})",
                self.ticks, self.echoes, self.told
            )),
        }
    }
}

/// Questions by UDP, and answers that carry how many there were.
#[derive(Debug, Default)]
pub struct Echoes {
    /// Questions.
    pub asked: u64,
    /// Answers.
    pub answered: u64,
    /// The guest's count in the newest answer.
    count: u64,
    /// Without an answer; those that were lost stay.
    open: BTreeMap<u64, Instant>,
    /// How long answers took.
    pub times: Vec<Duration>,
}

impl Echoes {
    /// A question leaves; its number.
    pub fn ask(&mut self, now: Instant) -> u64 {
        self.asked += 1;
        self.open.insert(self.asked, now);
        self.asked
    }

    /// An answer came.
    pub fn answer(&mut self, datagram: &[u8], now: Instant) -> Result<(), String> {
        let word = |at: usize| datagram.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let (Some(number), Some(count)) = (word(0), word(8)) else {
            return Err(format!("an answer of {} bytes", datagram.len()));
        };
        if count <= self.count {
            return Err(format!(
                "the guest counts {count} answers after it counted {}: it forgot one that had left it",
                self.count
            ));
        }
        self.count = count;
        let Some(asked) = self.open.remove(&number) else {
            return Err(format!("question {number} was answered twice, or never asked"));
        };
        self.times.push(now.saturating_duration_since(asked));
        self.answered += 1;
        Ok(())
    }
}

/// The numbers from 1 to `last`, one a line: what goes up and down. Made as it is needed.
#[derive(Debug)]
pub struct Numbers {
    next: u64,
    last: u64,
}

impl Numbers {
    /// Up to `last`.
    pub fn to(last: u64) -> Self {
        Self { next: 1, last }
    }

    /// So many that they are at least `bytes` long.
    pub fn of(bytes: u64) -> Self {
        let (mut last, mut long, mut digits) = (0u64, 0u64, 1u32);
        while long < bytes {
            let all = 10u64.pow(digits) - 1 - last;
            let wanted = (bytes - long).div_ceil(u64::from(digits) + 1).min(all);
            last += wanted;
            long += wanted * (u64::from(digits) + 1);
            digits += 1;
        }
        Self::to(last)
    }

    /// The last of them.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// The next piece, at most about `bytes` long; empty at the end.
    pub fn piece(&mut self, bytes: usize) -> Vec<u8> {
        use std::io::Write;
        let mut piece = Vec::with_capacity(bytes + 24);
        while piece.len() < bytes && self.next <= self.last {
            // (Writing into a vector does not fail.)
            let _ = writeln!(piece, "{}", self.next);
            self.next += 1;
        }
        piece
    }

    /// How long they are, and their SHA-256 in hex.
    pub fn sum(&self) -> Sum {
        let (mut numbers, mut sum) = (Self::to(self.last), Sum::default());
        loop {
            let piece = numbers.piece(1 << 16);
            if piece.is_empty() {
                return sum;
            }
            sum.add(&piece);
        }
    }
}

/// Length and SHA-256 of what was seen.
#[derive(Debug, Clone, Default)]
pub struct Sum {
    /// Bytes.
    pub bytes: u64,
    digest: Sha256,
}

impl Sum {
    /// More of it.
    pub fn add(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        self.digest.update(piece);
    }

    /// In hex.
    pub fn hex(&self) -> String {
        self.digest.clone().finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_counts_and_says_back_once_and_in_order() {
        let mut shell = Shell::default();
        assert_eq!((shell.tell(), shell.tell()), (1, 2));
        assert_eq!(shell.line("tick 1"), Ok(Said::Tick));
        assert_eq!(shell.line("echo 1"), Ok(Said::Echo));
        assert_eq!(shell.line("echo 2"), Ok(Said::Echo));
        for wrong in ["echo 2", "echo 3", "tick 1", "tick 3", "tick", "", "echo -1", "bash: no"] {
            assert!(shell.line(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_answer_that_the_guest_forgot_is_seen_by_its_count() {
        let mut echoes = Echoes::default();
        let now = Instant::now();
        let answer = |number: u64, count: u64| [number.to_le_bytes(), count.to_le_bytes()].concat();
        for _ in 0..4 {
            echoes.ask(now);
        }
        assert!(echoes.answer(&answer(1, 1), now).is_ok());
        // The guest's third answer was lost with its host.
        assert!(echoes.answer(&answer(3, 4), now).is_ok());
        assert!(echoes.answer(&answer(4, 4), now).unwrap_err().contains("forgot"));
        assert!(echoes.answer(&answer(3, 5), now).unwrap_err().contains("twice"));
        assert!(echoes.answer(&[1; 15], now).is_err());
        assert_eq!((echoes.asked, echoes.answered), (4, 2));
    }

    #[test]
    fn numbers_are_those_of_seq() {
        let mut numbers = Numbers::of(25);
        assert_eq!(numbers.last(), 12);
        assert_eq!(numbers.sum().bytes, 27);
        assert_eq!(numbers.piece(4), b"1\n2\n");
        assert_eq!(numbers.piece(100), b"3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n");
        assert!(numbers.piece(100).is_empty());
        // seq 1 12 | sha256sum
        assert_eq!(numbers.sum().hex(), "67149111d45cf106eb92ab5be7ec08179bddea7426ddde7cfe0ae68a7cffce74");
        for bytes in [1, 2, 18, 19, 20, 21, 1 << 20] {
            let long = Numbers::of(bytes).sum().bytes;
            assert!((bytes..bytes + 8).contains(&long), "{long} for {bytes}");
        }
    }
}
