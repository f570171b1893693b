//! The network back end alone, on this host: packets through the gate and a card's port into a tap, and out of one, beside plain reads and writes of the same tap. No guest and no KVM.
//!
//! Two taps are in a bridge, in a network namespace of their own. One thread writes into the first as a vCPU does with an open gate (`passed`), or as a card's
//! worker does after each commit (`released`: held, sealed and committed in epochs of 256 packets, written by the worker's own bursts); or writes plainly. Another reads the second; what
//! it counts is the figure, so that whatever bridge and taps drop does not count. (`sent` is the writer's own count: on two processors the reader is often the slower.)
//! For `in` the ends are exchanged: the worker's own reader brings packets as far as the device. Cases take turns; medians count.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use understudy_protocol::ids::Epoch;
use understudy_protocol::nic::{Mac, NicSpec};
use understudy_vmm::devices::virtio::net::{FRAME, Offloads};
use understudy_vmm::net::backend::{self, Sent};
use understudy_vmm::net::burst::{self, BURST, Reader};
use understudy_vmm::net::gate::{Bound, PacketGate};
use understudy_vmm::net::packet::{HEADER, Packet};
use understudy_vmm::net::pool::Pool;
use understudy_vmm::net::port::NetPort;

use super::rows::{Bar, Report, Row};

/// What both ends of a measured way take.
pub const OFFLOADS: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true };
/// Packets of an epoch.
const EPOCH: usize = 256;

/// What goes into the report.
#[derive(Debug, Serialize)]
pub struct BackEnd {
    /// Figures.
    pub rows: Vec<Row>,
    /// Goals.
    pub bars: Vec<Bar>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Passed,
    Released,
    In,
}

/// Packets that were written and that arrived, in a second.
#[derive(Debug, Clone, Copy)]
struct Rate {
    sent: f64,
    arrived: f64,
}

/// Measure. The calling thread is in another network namespace afterwards.
pub fn measure(quick: bool, say: &dyn Fn(&str)) -> Result<BackEnd> {
    let (time, turns) = if quick { (Duration::from_millis(150), 3) } else { (Duration::from_millis(600), 5) };
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of its own is not allowed here: run it as root")?;
    for args in ["link add br0 type bridge", "link set br0 up"] {
        let done = std::process::Command::new("ip").args(args.split(' ')).status().context("running ip")?;
        ensure!(done.success(), "ip {args} failed");
    }
    let open = |spec: &str, mac| -> Result<NetPort> {
        let spec: NicSpec = spec.parse()?;
        let port = NetPort::new(backend::open(&spec, mac)?)?;
        port.set_offloads(OFFLOADS);
        port.speak()?;
        Ok(port)
    };
    let (here, there) = (Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2]));
    let from = open("name=a,tap=bench0,bridge=br0", here)?;
    let to = Arc::new(open("name=b,tap=bench1,bridge=br0", there)?);
    let mut report = Report::new("none: the back end alone".into());
    let mut best = 0.0f64;
    for (case, packet) in
        [("64KiB", large(here, there)), ("1500B", small(here, there, 1514)), ("64B", small(here, there, 60))]
    {
        let bits = packet.frame.len() as f64 * 8.0 / 1e9;
        let mut rates = [const { Vec::new() }; 4];
        for _ in 0..turns {
            for (way, rates) in [Way::Plain, Way::Passed, Way::Released, Way::In].into_iter().zip(&mut rates) {
                rates.push(run(way, &from, &to, &packet, time)?);
            }
        }
        let median = |rates: &[Rate], of: fn(&Rate) -> f64| {
            let mut all: Vec<f64> = rates.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        let [plain, passed, released, arriving] = rates;
        for (name, ours) in [("passed", &passed), ("released", &released), ("in", &arriving)] {
            for (what, of) in [("arrived", (|r: &Rate| r.arrived) as fn(&Rate) -> f64), ("sent", |r: &Rate| r.sent)] {
                let (rate, beside) = (median(ours, of), median(&plain, of));
                let peer = "plain reads and writes of the same taps";
                report.beside(format!("net/{case}/{name}/{what}"), rate, "packets/s", peer, beside);
                report.beside(format!("net/{case}/{name}/{what}_gbit"), rate * bits, "Gbit/s", peer, beside * bits);
                if case == "64KiB" && name == "released" && what == "arrived" {
                    best = rate * bits;
                }
            }
        }
        say(&format!("{case}: released {:.2} Gbit/s", median(&released, |r| r.arrived) * bits));
    }
    let bar = Bar {
        bar: "back end alone, with offloads, one core writing, through the gate".into(),
        wanted: "at least 10 Gbit/s".into(),
        got: format!("{best:.1} Gbit/s"),
        reached: Some(best >= 10.0),
    };
    Ok(BackEnd { rows: report.rows, bars: vec![bar] })
}

/// A frame of no protocol that the kernel knows.
fn small(from: Mac, to: Mac, len: usize) -> Packet {
    let mut frame = [&to.0[..], &from.0, &[0x88, 0xb5]].concat();
    frame.resize(len, 0x5a);
    Packet { frame, ..Packet::default() }
}

/// 64 KiB of TCP over IPv4, segmentation and checksum left to whoever needs them.
pub fn large(from: Mac, to: Mac) -> Packet {
    let mut frame = [&to.0[..], &from.0, &[8, 0]].concat();
    let total = 65_000u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = ip.chunks(2).fold(0u32, |sum, pair| sum + u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0x30, 0, 0x30, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.resize(14 + usize::from(total), 0x5a);
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&[1, 1]);
    for (at, value) in [(2, 54u16), (4, 1448), (6, 34), (8, 16)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    Packet { header, frame, queue: 0 }
}

/// Write for so long, while another thread reads.
fn run(way: Way, from: &NetPort, to: &Arc<NetPort>, packet: &Packet, time: Duration) -> Result<Rate> {
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (to, stop, ours, len) = (to.clone(), stop.clone(), way == Way::In, HEADER + packet.frame.len());
        std::thread::spawn(move || read(&to, &stop, ours, len))
    };
    let began = Instant::now();
    let sent = match way {
        Way::Released => released(from, packet, time)?,
        Way::Passed => {
            let (mut sent, mut pool) = (0u64, Pool::default());
            while began.elapsed() < time {
                for _ in 0..32 {
                    let copy = out_of_the_guest(packet, &mut pool);
                    sent += u64::from(gone(from.send(&copy))?);
                    pool.give(copy.frame);
                }
            }
            sent
        }
        Way::Plain | Way::In => {
            let mut sent = 0u64;
            while began.elapsed() < time {
                for _ in 0..32 {
                    sent += u64::from(matches!(from.backend().send(packet), Sent::Gone));
                }
            }
            sent
        }
    };
    let wrote = began.elapsed().as_secs_f64();
    stop.store(true, Ordering::Release);
    let arrived = reader.join().map_err(|_| anyhow::anyhow!("the reader ended"))?;
    Ok(Rate { sent: sent as f64 / wrote, arrived: arrived as f64 / wrote })
}

fn gone(sent: Option<Sent>) -> Result<bool> {
    match sent {
        Some(Sent::Gone | Sent::InPart) => Ok(true),
        Some(Sent::Full) => Ok(false),
        Some(Sent::Lost(e)) => Err(e).context("the tap refuses a packet"),
        None => anyhow::bail!("the port is down"),
    }
}

/// A packet as a vCPU's exit makes one of what the guest sends.
fn out_of_the_guest(packet: &Packet, pool: &mut Pool) -> Packet {
    let mut frame = pool.take(packet.frame.len());
    frame.copy_from_slice(&packet.frame);
    Packet { frame, ..*packet }
}

/// Held, sealed, committed; then as a card's worker does it.
fn released(port: &NetPort, packet: &Packet, time: Duration) -> Result<u64> {
    let (mut gate, mut pool) = (PacketGate::new(Bound::default()), Pool::default());
    let (mut epoch, mut sent) = (0, 0);
    let began = Instant::now();
    while began.elapsed() < time {
        for _ in 0..EPOCH {
            gate.push(out_of_the_guest(packet, &mut pool));
        }
        epoch += 1;
        gate.seal(Epoch(epoch));
        gate.commit(Epoch(epoch));
        loop {
            let burst = gate.take(BURST);
            if burst.is_empty() {
                break;
            }
            let written = burst::write(port, burst);
            if let Some(e) = written.why {
                return Err(e).context("the tap refuses a packet");
            }
            sent += written.packets;
            gate.put_back(written.rest);
            written.spent.into_iter().for_each(|buffer| pool.give(buffer));
        }
    }
    Ok(sent)
}

/// Count what arrives. `ours`: as a card's worker does it, up to the device; otherwise plainly.
fn read(port: &NetPort, stop: &AtomicBool, ours: bool, len: usize) -> u64 {
    let (mut reader, mut batch) = (Reader::new(0), Vec::new());
    let mut buffer = vec![0; HEADER + FRAME];
    let mut arrived = 0;
    loop {
        let some = if ours {
            let _ = reader.read(port.backend(), &mut batch);
            arrived += batch.iter().filter(|packet| packet.len() == len).count() as u64;
            let some = !batch.is_empty();
            reader.give_back(batch.drain(..));
            some
        } else {
            let read = port.backend().receive(0, &mut buffer);
            arrived += u64::from(matches!(read, Ok(Some(n)) if n == len));
            matches!(read, Ok(Some(_)))
        };
        if some {
            continue;
        }
        if stop.load(Ordering::Acquire) {
            return arrived;
        }
        if let Some(fd) = port.backend().waits_on(0) {
            let _ = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(10u8));
        }
    }
}

/// For people.
pub fn table(measured: &BackEnd) -> String {
    let mut text = String::new();
    for row in measured.rows.iter().filter(|row| row.unit == "Gbit/s" || row.name.contains("64B")) {
        let beside = row.peer_or_limit.as_ref().map_or(0.0, |peer| row.value / peer.value.max(f64::MIN_POSITIVE));
        text += &format!("  {:<32} {:>14.2} {:<10} {beside:.2} of plain\n", row.name, row.value, row.unit);
    }
    text + &super::rows::bars_table(&measured.bars)
}
