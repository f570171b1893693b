//! Two databases, each through its own command-line client, as a person would ask it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Result, told};

/// The release that the image has.
const POSTGRES: &str = "/usr/lib/postgresql/17/bin";
/// Its cluster of databases, made with the image.
const DATA: &str = "/work/postgres";
/// Where its socket is: a tmpfs.
const SOCKET: &str = "/run";
/// How an answer ends.
const END: &str = "<end>";

/// A client that was asked and answers.
pub struct Session {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    end: &'static str,
}

impl Session {
    fn start(name: &'static str, mut command: Command, end: &'static str) -> Result<Self> {
        let mut child =
            told(&format!("starting {name}"), command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn())?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{name} has no input and output"));
        };
        Ok(Self { name, child, input, output: BufReader::new(output), end })
    }

    /// Run statements; all that they print.
    fn ask(&mut self, statements: &str) -> Result<String> {
        let text = format!("{statements}\n{}\n", self.end);
        told(&format!("asking {}", self.name), self.input.write_all(text.as_bytes()))?;
        let mut answer = String::new();
        loop {
            let from = answer.len();
            let n = told(&format!("listening to {}", self.name), self.output.read_line(&mut answer))?;
            if n == 0 {
                let status = self.child.wait().map(|s| s.to_string()).unwrap_or_default();
                return Err(format!("{} ended ({status}) after: {}", self.name, answer.trim().replace('\n', "; ")));
            }
            if answer[from..].trim_end() == END {
                answer.truncate(from);
                return Ok(answer.trim_end().to_string());
            }
        }
    }

    /// How many rows there are: numbers from 1, without gaps.
    pub fn rows(&mut self) -> Result<u64> {
        let said = self.ask("SELECT count(*), coalesce(max(n), 0), coalesce(min(n), 1) FROM t;")?;
        let numbers: Vec<Option<u64>> = said.split('|').map(|n| n.trim().parse().ok()).collect();
        match numbers[..] {
            [Some(count), Some(max), Some(1)] if count == max => Ok(count),
            _ => Err(format!("{} says that count, greatest and least number are {said}", self.name)),
        }
    }

    /// Transaction `number`, committed.
    pub fn put(&mut self, number: u64) -> Result<()> {
        let note = "x".repeat(usize::try_from(number % 200).unwrap_or(0));
        self.ask(&format!("INSERT INTO t VALUES ({number}, 'transaction {number} {note}');"))?;
        match self.rows()? {
            rows if rows == number => Ok(()),
            rows => Err(format!("{} has {rows} rows after transaction {number}", self.name)),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// SQLite needs no server.
pub struct Sqlite;

impl Sqlite {
    /// Open the database, or make it. `synchronous=FULL`: a commit is durable when it returns.
    pub fn open(path: &str) -> Result<Session> {
        let mut command = Command::new("/usr/bin/sqlite3");
        command.args(["-batch", "-noheader", "-separator", "|", path]);
        let mut session = Session::start("SQLite", command, ".print <end>")?;
        // (Less than EXTRA does not make the end of a transaction durable: the removal of its journal.)
        session.ask("PRAGMA synchronous=EXTRA; CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, note TEXT);")?;
        session.ask("CREATE INDEX IF NOT EXISTS notes ON t (note);")?;
        Ok(session)
    }
}

/// `ok`, or what is damaged.
pub fn check_sqlite(session: &mut Session) -> Result<String> {
    session.ask("PRAGMA integrity_check;").map(|said| said.replace(['\n', ' '], "_"))
}

/// `ok`, or what is damaged: every index against its table (amcheck), and every row is read.
pub fn check_postgres(session: &mut Session) -> Result<String> {
    let said = session.ask(
        "SELECT count(bt_index_check(c.oid, true)) > 0 FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid JOIN pg_am a ON a.oid = c.relam \
         WHERE a.amname = 'btree' AND i.indrelid = 't'::regclass; SELECT count(note) = count(*) FROM t; \
         SELECT count(*) = 0 FROM verify_heapam('t');",
    )?;
    Ok(if said == "t\nt\nt" { "ok".into() } else { format!("failed_{}", said.replace(['\n', ' '], "_")) })
}

/// The server; it ends with this value.
pub struct Postgres(Child, (u32, u32));

impl Postgres {
    /// Start it: it recovers from its log by itself.
    pub fn start() -> Result<Self> {
        let user = postgres_user()?;
        // Where a power cut found it running. It is not: this is the first process of its kind since the boot.
        let _ = std::fs::remove_file(format!("{DATA}/postmaster.pid"));
        let mut command = Command::new(format!("{POSTGRES}/postgres"));
        command.args(["-D", DATA, "-k", SOCKET]).uid(user.0).gid(user.1).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self(told("starting PostgreSQL", command.spawn())?, user))
    }

    /// A client, as soon as the server takes one.
    pub fn connect(&self, patience: Duration) -> Result<Session> {
        let until = Instant::now() + patience;
        loop {
            let mut command = Command::new(format!("{POSTGRES}/psql"));
            command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", SOCKET, "-U", "postgres", "postgres"]);
            command.uid(self.1.0).gid(self.1.1);
            let mut session = Session::start("PostgreSQL", command, "\\echo <end>")?;
            match session.ask("SELECT 1;") {
                Ok(_) => return Ok(session),
                Err(why) if Instant::now() > until => return Err(why),
                Err(_) => std::thread::sleep(Duration::from_millis(500)),
            }
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // SIGINT: end now, in order.
        let pid = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        }
        let _ = self.0.wait();
    }
}

/// Its user and group in the image.
fn postgres_user() -> Result<(u32, u32)> {
    let text = told("reading /etc/passwd", std::fs::read_to_string("/etc/passwd"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("postgres:"));
    let ids: Vec<u32> = line.unwrap_or_default().split(':').skip(1).take(2).filter_map(|id| id.parse().ok()).collect();
    match ids[..] {
        [user, group] => Ok((user, group)),
        _ => Err("the image has no user postgres".into()),
    }
}
