//! How long an output waits: from its birth in the guest to its release from the VMM.
//!
//! The guest sends a byte on COM1 now and then, and notes its own time stamp counter first; the bytes come out of a FIFO here. The
//! guest's clock is told from this process's by readings at the beginning and at the end.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};

use super::guest::Work;
use super::pair::{Pair, Setup};
use super::rows::{Report, percentile};

/// A byte's own time on a line of 115,200 baud, 8N1: it is in the figures, since the UART lets nothing out earlier.
const LINE_US: f64 = 10.0 / 115_200.0 * 1e6;

/// Measure for `time` with checkpoints at most 25 ms apart.
pub fn measure(report: &mut Report, time: Duration, code: &[u8], say: &dyn Fn(&str)) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    let fifo = dir.path().join("com1");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).context("making a FIFO")?;
    // Open for both, so that opening waits for nobody, on either side.
    let mut line = OpenOptions::new().read(true).write(true).open(&fifo).context("opening a FIFO")?;
    let pair = Pair::start(&Setup { serial: Some(format!("file:{}", fifo.display())), ..Setup::new(256) }, code)?;
    let guest = pair.guest()?;
    pair.protect()?;
    for pages in [0, 1000] {
        say(&format!("outputs of a guest that dirties {pages} pages every 25 ms"));
        // No multiple of the interval, so that bytes are born at every moment of an epoch.
        guest.order(&Work { byte_every: Some(Duration::from_micros(17_300)), ..Work::hot(pages) })?;
        std::thread::sleep(Duration::from_millis(500));
        drain(&mut line)?;
        let from = guest.clock(guest.hz())?;
        let mut arrivals = Vec::new();
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            let mut byte = [0; 1];
            if readable(&line, 50)? && line.read(&mut byte).context("reading the FIFO")? == 1 {
                let at = Instant::now();
                arrivals.push((at, guest.birth(byte[0])?));
            }
        }
        let to = guest.clock(guest.hz())?;
        let hz = (to.1 - from.1) as f64 / (to.0 - from.0).as_secs_f64();
        let mut delays: Vec<f64> = arrivals
            .iter()
            .map(|(at, birth)| (at.duration_since(from.0).as_secs_f64() - (*birth as f64 - from.1 as f64) / hz) * 1e6)
            .collect();
        ensure!(!delays.is_empty(), "no output of the guest was released");
        delays.sort_by(f64::total_cmp);
        let note = format!("{} bytes; {LINE_US:.0} µs of it on the serial line", delays.len());
        let name = format!("output/{pages}");
        report.alone(format!("{name}/release-p50"), percentile(&delays, 0.5) / 1e3, "ms").note = Some(note.clone());
        report.alone(format!("{name}/release-p99"), percentile(&delays, 0.99) / 1e3, "ms").note = Some(note);
    }
    Ok(())
}

fn readable(line: &std::fs::File, timeout_ms: u16) -> Result<bool> {
    let mut fds = [PollFd::new(line.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, timeout_ms).context("waiting for output")? > 0)
}

fn drain(line: &mut std::fs::File) -> Result<()> {
    let mut buffer = [0; 4096];
    while readable(line, 0)? {
        line.read(&mut buffer).context("reading the FIFO")?;
    }
    Ok(())
}
