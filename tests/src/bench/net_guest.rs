//! A guest's network card: our virtio-net beside QEMU's, with the same kernel, servers, tap and bridge in the same run; and ours while protected beside ours while not.
//!
//! ```text
//!  guest: iperf3, echoes ── virtio-net ── tap ── bridge ── cable ── switch ── client: iperf3, questions and answers
//! ```
//! The guest is that of [`crate::connections`], on its first host; QEMU runs in the same namespace, at a tap of the same kind. In the lab VM everything is software-emulated: the
//! figures compare things with each other, and nothing else. vhost-net is off at QEMU's: what is compared are cards in user space.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::pair::{Process, in_namespace};
use super::rows::{Bar, Report};
use crate::connections::clients::{enter_client, wait_for_servers};
use crate::connections::switch::{BRIDGE, CLIENT, Switch, guest, namespace};
use crate::connections::world::{MAC, MEMORY_MIB, Protection, TAP, World, guest_files};
use crate::lab::host::run_quiet;
use crate::lab::wait_for;
use crate::net_cuts::Percentiles;
use crate::power_cuts::ms;

/// A boot under software emulation.
const BOUND: Duration = Duration::from_secs(300);
/// How long each case takes.
const CASE: Duration = Duration::from_secs(2);
/// How often all cases are measured in each boot.
const ROUNDS: usize = 2;
/// How often ours and QEMU's guests are booted, in turns.
const TURNS: usize = 2;
/// The echo protocol's port (RFC 862).
const ECHO: u16 = 7;
/// An answer by UDP that takes longer is lost.
const LOST: Duration = Duration::from_secs(5);

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// iperf3 by TCP, client to guest.
    ToGuest,
    /// iperf3 by TCP, guest to client.
    FromGuest,
    /// iperf3 with datagrams of 64 bytes, client to guest; those that arrive.
    Datagrams,
    /// One byte there, one back, over and over: TCP_RR of netperf.
    TcpAnswers,
    /// The same by UDP, with 16 bytes.
    UdpAnswers,
}

type Case = (What, usize);

const CASES: [Case; 9] = [
    (What::ToGuest, 1),
    (What::ToGuest, 4),
    (What::FromGuest, 1),
    (What::FromGuest, 4),
    (What::Datagrams, 1),
    (What::TcpAnswers, 1),
    (What::TcpAnswers, 4),
    (What::UdpAnswers, 1),
    (What::UdpAnswers, 4),
];

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::ToGuest => "to-guest",
            Self::FromGuest => "from-guest",
            Self::Datagrams => "datagrams-64B-to-guest",
            Self::TcpAnswers => "tcp-rr",
            Self::UdpAnswers => "udp-rr",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::ToGuest | Self::FromGuest => "Mbit/s",
            Self::Datagrams => "packets/s",
            Self::TcpAnswers | Self::UdpAnswers => "answers/s",
        }
    }
}

/// What was seen: rates of each case, one a round; and how long answers took, ms.
#[derive(Debug, Default)]
struct Seen {
    rates: BTreeMap<Case, Vec<f64>>,
    answers: BTreeMap<Case, Vec<f64>>,
}

impl Seen {
    fn rate(&self, case: Case) -> f64 {
        super::Spread::of(self.rates.get(&case).cloned().unwrap_or_default()).median
    }

    fn answers(&self, case: Case) -> Percentiles {
        Percentiles::of(self.answers.get(&case).cloned().unwrap_or_default())
    }
}

/// What can be measured alone, beside our card without protection.
pub const PARTS: [&str; 3] = ["qemu", "protected-event-driven", "protected-every-25ms"];

/// Boots the guest six times, or less often if only some `parts` are wanted. Rows and bars; `say` hears of progress.
pub fn measure(parts: &[String], say: &dyn Fn(&str)) -> Result<(Report, Vec<Bar>)> {
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let (mut ours, mut qemus) = (Seen::default(), Seen::default());
    let mut kvm_backend = String::new();
    for turn in 1..=TURNS {
        say(&format!("our card, {turn} of {TURNS}"));
        let world = World::boot(None, every(400, 100), say)?;
        kvm_backend = world.kvm_backend()?;
        all(&mut ours, say)?;
        drop(world);
        if wanted("qemu") {
            say(&format!("QEMU's card, {turn} of {TURNS}"));
            qemu(&mut qemus, say)?;
        }
    }
    let version = super::qemu::version()?;
    let [_, event_driven, every_25ms] = PARTS;
    let protections = [(event_driven, every(25, 1)), (every_25ms, every(25, 25))];
    let mut report = Report::new(kvm_backend);
    let peer = format!("QEMU {version}'s virtio-net");
    rows(&mut report, "understudy", &ours, &peer, &qemus);
    for (name, protection) in protections.into_iter().filter(|(name, _)| wanted(name)) {
        say(name);
        match protected(protection, say) {
            Ok(seen) => rows(&mut report, name, &seen, "the same, not protected", &ours),
            // What was measured before is not lost with it.
            Err(why) => report.alone(format!("net/guest/{name}/failed"), 1.0, "").note = Some(format!("{why:#}")),
        }
    }
    let bars = bars(&report);
    Ok((report, bars))
}

fn every(interval_ms: u64, min_interval_ms: u64) -> Protection {
    Protection { interval_ms, min_interval_ms, leak: false }
}

fn rows(report: &mut Report, of: &str, seen: &Seen, peer: &str, its: &Seen) {
    for case @ (what, streams) in CASES {
        let name = format!("net/guest/{}/{streams}/{of}", what.name());
        report.beside(&name, seen.rate(case), what.unit(), peer, its.rate(case));
        if seen.answers.contains_key(&case) {
            let (answers, others) = (seen.answers(case), its.answers(case));
            report.beside(format!("{name}/p50"), answers.p50, "ms", peer, others.p50);
            report.beside(format!("{name}/p99"), answers.p99, "ms", peer, others.p99);
        }
    }
}

fn bars(report: &Report) -> Vec<Bar> {
    let ratio = |case: Case, of: &str| {
        let name = format!("net/guest/{}/{}/{of}", case.0.name(), case.1);
        let row = report.rows.iter().find(|row| row.name == name)?;
        let its = row.peer_or_limit.as_ref()?.value;
        (its > 0.0).then(|| row.value / its)
    };
    let bar = |bar: &str, wanted: f64, of: &str, cases: &[Case]| {
        let ratios: Option<Vec<f64>> = cases.iter().map(|case| ratio(*case, of)).collect();
        let worst = ratios.and_then(|ratios| ratios.into_iter().min_by(f64::total_cmp));
        Bar {
            bar: bar.into(),
            wanted: format!("at least {wanted:.1} in every case"),
            got: worst.map_or_else(|| "not measured".into(), |worst| format!("{worst:.2} in the worst")),
            reached: worst.map(|worst| worst >= wanted),
        }
    };
    let bulk = &CASES[..4];
    vec![
        bar("unprotected, beside QEMU's virtio-net in user space", 1.0, "understudy", &CASES),
        bar("protected bulk throughput beside unprotected, event-driven", 0.7, "protected-event-driven", bulk),
        bar("protected bulk throughput beside unprotected, every 25 ms", 0.7, "protected-every-25ms", bulk),
    ]
}

fn protected(protection: Protection, say: &dyn Fn(&str)) -> Result<Seen> {
    let mut world = World::boot(None, protection, say)?;
    world.recover().map_err(|e| world.explain(e))?;
    let before = world.primary_status()?;
    let mut seen = Seen::default();
    all(&mut seen, say).map_err(|e| world.explain(e))?;
    let after = world.primary_status()?;
    ensure!(
        after.protected && after.losses == before.losses && after.committed > before.committed,
        "the machine was not protected all the time: {after:?}"
    );
    Ok(seen)
}

/// As one would configure it for speed without vhost-net.
fn qemu(seen: &mut Seen, say: &dyn Fn(&str)) -> Result<()> {
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    let linux = guest_files(dir.path(), None)?;
    let switch = Switch::new()?;
    switch.plug(0)?;
    let host = namespace(0);
    for args in [
        format!("-n {host} tuntap add dev {TAP} mode tap vnet_hdr"),
        format!("-n {host} link set {TAP} address fe:54:00:78:00:05 master {BRIDGE} up"),
    ] {
        run_quiet(Command::new("ip").args(args.split(' ')))?;
    }
    let mut command = super::qemu::command()?;
    command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-no-reboot", "-append", &linux.cmdline]);
    command.arg("-kernel").arg(&linux.kernel).arg("-initrd").arg(&linux.initrd);
    command.arg("-serial").arg(format!("file:{}", dir.path().join("com1").display()));
    let drive = format!("if=none,id=vda,format=raw,cache=writeback,file={}", dir.path().join("disk").display());
    command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=vda"]);
    command.args(["-netdev", &format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vhost=off")]);
    command.args(["-device", &format!("virtio-net-pci,netdev=net0,mac={MAC}")]);
    let log = dir.path().join("qemu.log");
    let process = Process::start(&in_namespace(&host, &command), &log)?;
    let served = wait_for_servers(BOUND).and_then(|()| all(seen, say));
    drop(process);
    served.with_context(|| format!("QEMU says: {}", fs::read_to_string(&log).unwrap_or_default().trim()))
}

/// All cases, some rounds.
fn all(seen: &mut Seen, say: &dyn Fn(&str)) -> Result<()> {
    for round in 1..=ROUNDS {
        for case @ (what, streams) in CASES {
            let rate = match what {
                What::ToGuest | What::FromGuest | What::Datagrams => iperf3(what, streams),
                What::TcpAnswers | What::UdpAnswers => answers(what, streams).map(|(rate, times)| {
                    seen.answers.entry(case).or_default().extend(times);
                    rate
                }),
            };
            let rate = rate.with_context(|| format!("{}, {streams} streams", what.name()))?;
            say(&format!("round {round}: {} × {streams}: {rate:.0} {}", what.name(), what.unit()));
            seen.rates.entry(case).or_default().push(rate);
        }
    }
    Ok(())
}

/// Mbit/s, or packets a second, that arrive. The server is busy with the test before for a moment: then once more.
fn iperf3(what: What, streams: usize) -> Result<f64> {
    let mut command = Command::new("iperf3");
    command.args(["--client", &guest(), "--json", "--time", &CASE.as_secs().to_string()]);
    command.args(["--connect-timeout", "10000", "--parallel", &streams.to_string()]);
    match what {
        What::FromGuest => drop(command.arg("--reverse")),
        What::Datagrams => drop(command.args(["--udp", "--bitrate", "0", "--length", "64"])),
        _ => {}
    }
    wait_for("an iperf3 server that is free", Duration::from_secs(60), || {
        let output = in_namespace(CLIENT, &command).stdin(Stdio::null()).output().context("starting iperf3")?;
        let said: Value = serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "iperf3 said {:?} {:?}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
        })?;
        match said["error"].as_str() {
            None => arrived(what, &said).map(Some),
            Some(error) if ["busy", "reset", "closed", "refused"].iter().any(|word| error.contains(word)) => Ok(None),
            Some(error) => bail!("iperf3 says: {error}"),
        }
    })
}

/// From iperf3's report.
fn arrived(what: What, said: &Value) -> Result<f64> {
    let sum = &said["end"]["sum_received"];
    let number =
        |key: &str| sum[key].as_f64().with_context(|| format!("iperf3's report has no {key}: {}", said["end"]));
    if what != What::Datagrams {
        return Ok(number("bits_per_second")? / 1e6);
    }
    let (packets, lost, seconds) = (number("packets")?, number("lost_packets")?, number("seconds")?);
    ensure!(seconds > 0.0, "iperf3's report is about no time");
    Ok((packets - lost) / seconds)
}

/// Answers a second of all streams, and how long each took, ms.
fn answers(what: What, streams: usize) -> Result<(f64, Vec<f64>)> {
    let one = || -> Result<Vec<f64>> {
        enter_client()?;
        if what == What::TcpAnswers { by_tcp() } else { by_udp() }
    };
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (0..streams).map(|_| scope.spawn(one)).collect();
        let ends = threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("a client's thread panicked")));
        ends.collect::<Result<Vec<_>>>()
    })?;
    let all = all.concat();
    ensure!(!all.is_empty(), "no answer within {} s", CASE.as_secs());
    Ok((all.len() as f64 / CASE.as_secs_f64(), all))
}

fn by_tcp() -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect((guest(), ECHO)).context("connecting to the echo")?;
    stream.set_nodelay(true).context("sending at once")?;
    stream.set_read_timeout(Some(BOUND)).context("setting a timeout")?;
    let (mut times, mut byte, end) = (Vec::new(), [0], Instant::now() + CASE);
    loop {
        let asked = Instant::now();
        if asked >= end {
            return Ok(times);
        }
        stream.write_all(&[1]).context("asking")?;
        stream.read_exact(&mut byte).context("waiting for an answer")?;
        times.push(ms(asked.elapsed()));
    }
}

fn by_udp() -> Result<Vec<f64>> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("opening a socket")?;
    socket.connect((guest(), ECHO)).context("connecting a socket")?;
    socket.set_read_timeout(Some(LOST)).context("setting a timeout")?;
    let (mut times, mut answer, end) = (Vec::new(), [0; 64], Instant::now() + CASE);
    for number in 0u64.. {
        let asked = Instant::now();
        if asked >= end {
            break;
        }
        let question = number.to_le_bytes();
        socket.send(&[question, [0; 8]].concat()).context("asking")?;
        loop {
            match socket.recv(&mut answer) {
                Ok(n) if n == 16 && answer[..8] == question => break times.push(ms(asked.elapsed())),
                // One that was given up.
                Ok(_) => {}
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(e) => bail!("waiting for an answer: {e}"),
            }
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_counts_is_what_arrived() {
        let said = json!({"end": {"sum_received": {"bits_per_second": 5e6, "packets": 100, "lost_packets": 40, "seconds": 2.0}}});
        assert_eq!(arrived(What::ToGuest, &said).unwrap(), 5.0);
        assert_eq!(arrived(What::Datagrams, &said).unwrap(), 30.0);
        assert!(arrived(What::Datagrams, &json!({"end": {}})).is_err());
    }

    #[test]
    fn a_bar_is_held_against_the_worst_case() {
        let (mut ours, mut its) = (Seen::default(), Seen::default());
        for case in CASES {
            ours.rates.insert(case, vec![if case == (What::UdpAnswers, 4) { 5.0 } else { 20.0 }]);
            its.rates.insert(case, vec![10.0]);
        }
        let mut report = Report::new("kvm".into());
        rows(&mut report, "understudy", &ours, "QEMU", &its);
        let bars = bars(&report);
        assert_eq!((bars[0].reached, bars[0].got.as_str()), (Some(false), "0.50 in the worst"));
        // What was not measured is not said to be reached.
        assert_eq!(bars[1].reached, None);
    }
}
