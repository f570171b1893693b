//! What was seen outside, and whether what the guest says, or what its disk is found to hold, agrees with it. Bytes in, the first contradiction out.

use lab_guest::line::{Line, parse, printable};

/// The newest of everything that somebody outside has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Transaction.
    pub transaction: u64,
    /// Number in the ring.
    pub ring: u64,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Books {
    /// What was seen.
    pub seen: Seen,
    /// Number of the newest line of this boot.
    line: u64,
    /// Boots so far.
    pub boots: u32,
    /// Transactions that lines told.
    pub told: u64,
    /// Most transactions that the disk knew at a boot and nobody had seen.
    pub unseen: u64,
    /// The next line may be a boot's first.
    pub may_boot: bool,
    /// A boot was begun, and what its disk knew has not been told yet.
    fresh: bool,
    /// A broken line was forgiven: the end of the machine's former life.
    forgiven: bool,
    /// The first thing that was wrong.
    pub wrong: Option<String>,
    /// The guest itself has found it.
    pub complained: bool,
}

impl Books {
    /// The first line is a boot's first.
    pub fn new() -> Self {
        Self { may_boot: true, ..Self::default() }
    }

    /// The machine loses its memory: it may boot, once.
    pub fn expect_boot(&mut self) {
        (self.may_boot, self.forgiven) = (true, false);
    }

    /// A line without its newline.
    pub fn take(&mut self, bytes: &[u8]) {
        if self.wrong.is_none()
            && let Err(why) = self.judge(bytes)
        {
            self.wrong = Some(why);
        }
    }

    fn judge(&mut self, bytes: &[u8]) -> Result<(), String> {
        if bytes.is_empty() && self.may_boot {
            return Ok(());
        }
        let line = match parse(bytes) {
            Ok(line) => line,
            Err(_) if self.may_boot && !self.forgiven => {
                self.forgiven = true;
                return Ok(());
            }
            Err(why) => return Err(format!("after line {}: {why}: {}", self.line, printable(bytes))),
        };
        if line.number == 1 && self.may_boot {
            (self.may_boot, self.fresh, self.line) = (false, true, 0);
            self.boots += 1;
        }
        if line.number != self.line + 1 {
            return Err(format!("instead of line {} came line {}", self.line + 1, line.number));
        }
        self.line = line.number;
        match line.kind {
            'E' => {
                self.complained = true;
                Err(format!("the guest says: {}", line.fields))
            }
            'B' if self.fresh => {
                self.fresh = false;
                clean(&line, "fsck", "0")?;
                let known = self.agrees(&line)?;
                self.unseen = self.unseen.max(known.transaction.saturating_sub(self.seen.transaction));
                self.seen = known;
                Ok(())
            }
            'T' if !self.fresh => {
                let (Some(transaction), Some(ring)) = (line.count("tx"), line.count("ring")) else {
                    return Err(format!("a transaction without its numbers: {}", line.fields));
                };
                if transaction != self.seen.transaction + 1 || ring < self.seen.ring {
                    return Err(format!("after {:?} came transaction {transaction}, ring {ring}", self.seen));
                }
                self.seen = Seen { transaction, ring };
                self.told += 1;
                Ok(())
            }
            _ => Err(format!("an unexpected line: {}", printable(bytes))),
        }
    }

    /// Whether a disk that knows what `line` says is one that may stand beside what was seen; the newest that all of it knows.
    pub fn agrees(&self, line: &Line) -> Result<Seen, String> {
        clean(line, "sqlite_check", "ok")?;
        clean(line, "postgres_check", "ok")?;
        let number = |key| line.count(key).ok_or_else(|| format!("no number of {key}: {}", line.fields));
        let (ring, files, sqlite, postgres) =
            (number("ring")?, number("files")?, number("sqlite")?, number("postgres")?);
        // A transaction is in the files first and in PostgreSQL last; at most one is on its way.
        if !(files >= sqlite && sqlite >= postgres && files <= postgres + 1) {
            return Err(format!("files, SQLite and PostgreSQL are not of one moment: {}", line.fields));
        }
        if postgres < self.seen.transaction || ring < self.seen.ring {
            return Err(format!("{:?} was seen, and the disk knows only {}", self.seen, line.fields));
        }
        Ok(Seen { transaction: postgres, ring })
    }
}

fn clean(line: &Line, key: &str, wanted: &str) -> Result<(), String> {
    match line.field(key) {
        Some(said) if said == wanted => Ok(()),
        said => Err(format!("{key} says {} instead of {wanted}", said.unwrap_or("nothing"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lab_guest::line::encode;

    fn feed(books: &mut Books, lines: &[(char, u64, &str)]) -> Option<String> {
        for (kind, number, fields) in lines {
            books.take(encode(*kind, *number, fields).trim_end().as_bytes());
        }
        books.wrong.clone()
    }

    const GOOD: &str = "boot=x fsck=0 sqlite_check=ok postgres_check=ok ring=9 files=3 sqlite=3 postgres=2";

    #[test]
    fn a_boot_that_knows_what_was_seen_is_good_and_one_that_does_not_has_lost_it() {
        for (seen, ring, good) in [(2, 9, true), (1, 3, true), (3, 9, false), (2, 10, false)] {
            let mut books = Books { seen: Seen { transaction: seen, ring }, ..Books::new() };
            assert_eq!(feed(&mut books, &[('B', 1, GOOD), ('T', 2, "tx=3 ring=11")]).is_none(), good, "{seen} {ring}");
        }
    }

    #[test]
    fn damage_and_disagreement_are_found_at_a_boot() {
        for (from, to) in [
            ("fsck=0", "fsck=4"),
            ("sqlite_check=ok", "sqlite_check=broken"),
            ("postgres_check=ok", "postgres_check=failed"),
            ("files=3", "files=4"),
            ("files=3", "files=2"),
            ("postgres=2", ""),
        ] {
            assert!(feed(&mut Books::new(), &[('B', 1, &GOOD.replace(from, to))]).is_some(), "{from} → {to}");
        }
    }

    #[test]
    fn transactions_count_up_and_nothing_is_said_twice_or_left_out() {
        let begun = || {
            let mut books = Books::new();
            assert_eq!(feed(&mut books, &[('B', 1, GOOD), ('T', 2, "tx=3 ring=11")]), None);
            books
        };
        assert_eq!(feed(&mut begun(), &[('T', 3, "tx=4 ring=11")]), None);
        for wrong in
            [(2, "tx=4 ring=11"), (4, "tx=4 ring=11"), (3, "tx=3 ring=11"), (3, "tx=5 ring=11"), (3, "tx=4 ring=10")]
        {
            assert!(feed(&mut begun(), &[('T', wrong.0, wrong.1)]).is_some(), "{wrong:?}");
        }
        assert!(feed(&mut begun(), &[('E', 3, "disk is bad")]).is_some());
        assert!(feed(&mut begun(), &[('B', 1, GOOD)]).is_some(), "a boot that nobody expects");
    }

    #[test]
    fn the_broken_end_of_a_former_life_is_forgiven_once() {
        let mut books = Books::new();
        assert_eq!(feed(&mut books, &[('B', 1, GOOD)]), None);
        books.expect_boot();
        books.take(b"T 2 tx=3 ri");
        books.take(b"");
        assert_eq!(feed(&mut books, &[('B', 1, GOOD), ('T', 2, "tx=3 ring=10")]), None);
        assert_eq!(books.boots, 2);
        books.take(b"T 3 tx=4 ri");
        assert!(books.wrong.is_some());
    }
}
