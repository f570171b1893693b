//! Work for the file system: files are created, synchronised, renamed and deleted, and a log of them grows.

use std::fs::{self, File, OpenOptions};
use std::io::Write;

use super::{Result, told};

/// So many files stay.
const KEEP: u64 = 20;

/// See the module.
pub struct Files {
    dir: String,
    log: File,
}

impl Files {
    /// Open, or make; the newest number that is in the log. What an interrupted transaction left is tidied up.
    pub fn open(dir: &str) -> Result<(Self, u64)> {
        told("making the directory of files", fs::create_dir_all(dir))?;
        let path = format!("{dir}/log");
        let log = told("opening the log of files", OpenOptions::new().append(true).create(true).open(&path))?;
        told("making the directory of files", File::open("/work").and_then(|dir| dir.sync_all()))?;
        let this = Self { dir: dir.into(), log };
        let text = told("reading the log of files", fs::read_to_string(&path))?;
        let newest = newest(&text)?;
        let whole = text.rfind('\n').map_or(0, |at| at as u64 + 1);
        // An append of which only a part arrived was acknowledged to nobody.
        told("tidying the log of files", this.log.set_len(whole).and_then(|()| this.log.sync_all()))?;
        for entry in told("reading the directory of files", fs::read_dir(dir))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix('f').and_then(|n| n.parse::<u64>().ok());
            if number.map_or(name != "log", |n| n + KEEP <= newest) {
                told("tidying up", fs::remove_file(entry.path()))?;
            }
        }
        this.check(newest)?;
        Ok((this, newest))
    }

    /// The file of transaction `number`, durably.
    pub fn put(&mut self, number: u64) -> Result<()> {
        let (temporary, name) = (format!("{}/new", self.dir), self.name(number));
        let content = content(number);
        let written = File::create(&temporary).and_then(|mut file| {
            file.write_all(&content)?;
            file.sync_all()
        });
        told("writing a file", written)?;
        told("naming a file", fs::rename(&temporary, &name))?;
        told("synchronising the directory", File::open(&self.dir).and_then(|dir| dir.sync_all()))?;
        let line = format!("{number} {:08x}\n", crc32fast::hash(&content));
        told("writing the log of files", self.log.write_all(line.as_bytes()).and_then(|()| self.log.sync_data()))?;
        // Last: a power cut before the line is in the log must find all files of the transaction before.
        if number > KEEP {
            match fs::remove_file(self.name(number - KEEP)) {
                Err(why) if why.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("deleting a file: {why}"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether files and log are what they must be when `number` is the newest.
    pub fn check(&self, number: u64) -> Result<()> {
        let text = told("reading the log of files", fs::read_to_string(format!("{}/log", self.dir)))?;
        let logged = newest(&text)?;
        if logged != number {
            return Err(format!("the log of files ends at {logged} and memory knows {number}"));
        }
        for n in number.saturating_sub(KEEP - 1).max(1)..=number {
            let found = told(&format!("reading the file of transaction {n}"), fs::read(self.name(n)))?;
            if found != content(n) {
                return Err(format!("the file of transaction {n} is not what was written ({} bytes)", found.len()));
            }
        }
        Ok(())
    }

    fn name(&self, number: u64) -> String {
        format!("{}/f{number}", self.dir)
    }
}

/// 100 to 8291 bytes that follow from the number.
fn content(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let length = 100 + next() % 8192;
    (0..length).map(|_| next() as u8).collect()
}

/// The last number of a log whose lines are 1, 2, 3 …, each with its file's checksum.
fn newest(log: &str) -> Result<u64> {
    let whole = log.rfind('\n').map_or("", |at| &log[..at]);
    whole.lines().zip(1..).try_fold(0, |_, (line, number)| {
        let expected = format!("{number} {:08x}", crc32fast::hash(&content(number)));
        if line == expected { Ok(number) } else { Err(format!("line {number} of the log of files is \"{line}\"")) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_every_number_once_and_may_end_in_half_a_line() {
        let line = |n: u64| format!("{n} {:08x}\n", crc32fast::hash(&content(n)));
        assert_eq!(newest(""), Ok(0));
        assert_eq!(newest("1 12"), Ok(0));
        assert_eq!(newest(&(line(1) + &line(2) + "3 4")), Ok(2));
        assert!(newest(&(line(1) + &line(3))).is_err());
        assert!(newest("1 00000000\n").is_err());
    }
}
