//! One psql session, always in a transaction that was begun before the next event and is committed after it.

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdin, ChildStdout, Command};
use std::sync::atomic::Ordering;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use super::{Home, Kind, Program, Totals};
use crate::bench::pair::in_namespace;
use crate::connections::switch::{CLIENT, guest};
use crate::lab::host::run_quiet;

/// Debian's wrapper would look for clusters of its own.
const PSQL: &str = "/usr/lib/postgresql/17/bin/psql";
/// How an answer ends.
const END: &str = "<end>";

/// To the guest.
pub fn psql() -> Command {
    let mut psql = Command::new(PSQL);
    psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", &guest(), "-U", "postgres", "postgres"]);
    psql
}

struct Session<'a> {
    program: Program<'a>,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session<'_> {
    fn ask(&mut self, statements: &str) -> Result<String> {
        if self.input.write_all(format!("{statements}\n\\echo {END}\n").as_bytes()).is_err() {
            self.program.end()?;
            bail!("psql ended by itself");
        }
        let mut answer = String::new();
        loop {
            let from = answer.len();
            if self.output.read_line(&mut answer).context("listening to psql")? == 0 {
                self.program.end()?;
                bail!("psql ended by itself after {answer:?}");
            }
            if answer[from..].trim_end() == END {
                answer.truncate(from);
                return Ok(answer.trim_end().to_owned());
            }
        }
    }
}

/// Until the end.
pub fn run(home: &Home) -> Result<()> {
    let mut program = home.program(&psql())?;
    let (input, output) = (program.input.take(), program.output.take());
    let (input, output) = input.zip(output).context("psql without input and output")?;
    let mut session = Session { program, input, output: BufReader::new(output) };
    session.ask("CREATE TABLE cuts (n bigint PRIMARY KEY, transaction bigint);")?;
    let server = session.ask("SELECT pg_backend_pid();")?;
    let (mut rows, mut transactions) = (0, 0);
    while !home.stopping() {
        session.ask("BEGIN;")?;
        let id = session.ask("SELECT pg_current_xact_id();")?;
        let before = rows;
        while home.commits.load(Ordering::Acquire) <= transactions || rows == before {
            rows += 1;
            let said = session.ask(&format!("INSERT INTO cuts VALUES ({rows}, {transactions}) RETURNING n;"))?;
            ensure!(said == rows.to_string(), "row {rows} was written, and PostgreSQL says {said:?}");
            home.beat(Kind::Database);
            thread::sleep(home.pause());
            if home.stopping() {
                return Ok(());
            }
        }
        let said = session.ask(
            "SELECT pg_current_xact_id(), pg_backend_pid(), count(*), coalesce(min(n), 0), coalesce(max(n), 0) FROM cuts;",
        )?;
        let wanted = format!("{id}|{server}|{rows}|1|{rows}");
        ensure!(said == wanted, "transaction, server process, rows, least and greatest are {said}, not {wanted}");
        session.ask("COMMIT;")?;
        transactions += 1;
        home.beat_and(Kind::Database, |state| {
            (state.totals.transactions, state.totals.rows) = (transactions, rows);
        });
    }
    Ok(())
}

/// What another session sees.
pub fn check(totals: &Totals) -> Result<()> {
    let question = "SELECT count(*), coalesce(max(n), 0), count(DISTINCT transaction) FROM cuts;";
    let said = run_quiet(&mut in_namespace(CLIENT, psql().args(["-c", question]))).context("a second session")?;
    let wanted = format!("{0}|{0}|{1}", totals.rows, totals.transactions);
    ensure!(said.trim() == wanted, "a second session sees {}, not what was committed: {wanted}", said.trim());
    Ok(())
}
