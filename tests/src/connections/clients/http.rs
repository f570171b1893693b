//! Downloads and uploads by curl, one after the other; each is to be right to the last byte.

use std::io::{Read, Write};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};

use super::{Home, Kind};
use crate::connections::judge::{Numbers, Sum};
use crate::connections::switch::guest;

const PIECE: usize = 16 << 10;

fn curl() -> Command {
    let mut curl = Command::new("curl");
    // Any HTTP error is curl's.
    curl.args(["--silent", "--show-error", "--fail", "--no-buffer", "--globoff", "--noproxy", "*"]);
    curl
}

/// Numbers come, at the rate that the guest was asked for.
pub fn download(home: &Home) -> Result<()> {
    let last = Numbers::of(home.load.transfer_mib << 20).last();
    let wanted = Numbers::to(last).sum();
    let mut buffer = vec![0; PIECE];
    while !home.stopping() {
        let rate = home.load.rate_kib << 10;
        let mut program = home.program(curl().arg(format!("http://{}/cgi-bin/numbers?{last},{rate}", guest())))?;
        let mut output = program.output.take().context("curl without output")?;
        let mut sum = Sum::default();
        loop {
            match output.read(&mut buffer).context("listening to curl")? {
                0 => break,
                n => {
                    sum.add(&buffer[..n]);
                    home.beat_and(Kind::Download, |state| state.totals.downloaded_bytes += n as u64);
                }
            }
        }
        program.end()?;
        let (came, is) = ((sum.bytes, sum.hex()), (wanted.bytes, wanted.hex()));
        ensure!(came == is, "bytes and SHA-256 of what came are {came:?}, not {is:?}");
        home.state().totals.downloads += 1;
    }
    Ok(())
}

/// Numbers go, at that rate.
pub fn upload(home: &Home) -> Result<()> {
    let last = Numbers::of(home.load.transfer_mib << 20).last();
    let wanted = Numbers::to(last).sum();
    while !home.stopping() {
        // A length without chunks: what a CGI script is given.
        let length = format!("Content-Length: {}", wanted.bytes);
        let mut command = curl();
        command.args([
            "--request",
            "POST",
            "--upload-file",
            "-",
            "--header",
            "Transfer-Encoding:",
            "--header",
            "Expect:",
        ]);
        command.args(["--header", &length]).arg(format!("http://{}/cgi-bin/digest", guest()));
        let mut program = home.program(&command)?;
        let mut input = program.input.take().context("curl without input")?;
        // As small as it gets: what waits in it is no progress.
        fcntl(&input, FcntlArg::F_SETPIPE_SZ(4096)).context("making a pipe small")?;
        let (mut numbers, mut next) = (Numbers::to(last), Instant::now());
        loop {
            let piece = numbers.piece(PIECE);
            if piece.is_empty() {
                break;
            }
            if input.write_all(&piece).is_err() {
                program.end()?;
                anyhow::bail!("curl ended before it had everything, and says that all is well");
            }
            home.beat_and(Kind::Upload, |state| state.totals.uploaded_bytes += piece.len() as u64);
            // At its rate, and no faster after a wait.
            let takes = Duration::from_secs_f64(piece.len() as f64 / (home.load.rate_kib << 10) as f64);
            next = (next + takes).max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        drop(input);
        let mut said = String::new();
        program.output.take().context("curl without output")?.read_to_string(&mut said).context("listening to curl")?;
        program.end()?;
        ensure!(said.trim() == wanted.hex(), "the guest's SHA-256 of what came is {said:?}, not {}", wanted.hex());
        home.state().totals.uploads += 1;
    }
    Ok(())
}
