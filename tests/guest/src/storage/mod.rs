//! A disk under databases and files. Transaction after transaction goes into all of them, each durably, and then its number out of the serial port.
//!
//! ```text
//!  files ─► SQLite ─► PostgreSQL ─► line "T"        the order in which transaction n becomes durable
//!  ring                                             numbers of its own, as fast as the disk takes them
//! ```
//! This program's own memory knows what everything must hold: a ring of numbers past the page cache, files with checksums, a row for each number without gaps.
//! What disagrees is an `E` line and the end of the work. After a boot only the disk knows anything; what it knows is a `B` line, after the file system's own
//! check and each database's.

mod files;
mod mounts;
mod ring;
mod sql;

pub use mounts::enter;

use std::fmt;
use std::time::Duration;

use files::Files;
pub use ring::Ring;
use sql::{Postgres, Session, Sqlite};

/// What went wrong, as a sentence.
pub type Result<T> = std::result::Result<T, String>;

/// Sentence instead of an error.
pub(crate) fn told<T, E: fmt::Display>(what: &str, result: std::result::Result<T, E>) -> Result<T> {
    result.map_err(|why| format!("{what}: {why}"))
}

/// After so many transactions the page cache is dropped and everything is read again.
const LOOK_AGAIN: u64 = 8;

/// Where the ring is.
pub const RING: &str = "/work/ring";

/// The newest transaction of each, in the order in which they get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    pub files: u64,
    pub sqlite: u64,
    pub postgres: u64,
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, sqlite, postgres } = self;
        write!(f, "files={files} sqlite={sqlite} postgres={postgres}")
    }
}

/// All of it but the ring, open. It is in the root directory: see [`enter`].
pub struct Work {
    files: Files,
    sqlite: Session,
    postgres: Session,
    _server: Postgres,
    known: Known,
    /// What the databases' own checks said at the start.
    pub checks: String,
}

impl Work {
    /// Open everything, let databases recover, look at all of it.
    pub fn open() -> Result<Self> {
        let (files, in_files) = Files::open("/work/files")?;
        let mut sqlite = Sqlite::open("/work/sqlite.db")?;
        let server = Postgres::start()?;
        let mut postgres = server.connect(Duration::from_secs(600))?;
        let checks = format!(
            "sqlite_check={} postgres_check={}",
            sql::check_sqlite(&mut sqlite)?,
            sql::check_postgres(&mut postgres)?
        );
        let known = Known { files: in_files, sqlite: sqlite.rows()?, postgres: postgres.rows()? };
        Ok(Self { files, sqlite, postgres, _server: server, known, checks })
    }

    /// What the disk knows.
    pub fn known(&self) -> Known {
        self.known
    }

    /// The next transaction, everywhere; its number.
    pub fn next(&mut self) -> Result<u64> {
        let number = self.known.postgres + 1;
        // A power cut may have come between two of them.
        if self.known.files < number {
            self.files.put(number)?;
            self.known.files = number;
        }
        if self.known.sqlite < number {
            self.sqlite.put(number)?;
            self.known.sqlite = number;
        }
        self.postgres.put(number)?;
        self.known.postgres = number;
        if number.is_multiple_of(LOOK_AGAIN) {
            self.look_again()?;
        }
        Ok(number)
    }

    /// Everything from the disk, not from the page cache.
    fn look_again(&mut self) -> Result<()> {
        told("dropping the page cache", std::fs::write("/proc/sys/vm/drop_caches", "3"))?;
        self.files.check(self.known.files)?;
        let said = sql::check_sqlite(&mut self.sqlite)?;
        if said != "ok" {
            return Err(format!("SQLite finds its file damaged: {said}"));
        }
        Ok(())
    }
}
