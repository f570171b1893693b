//! How much a protected machine sends, beside the same machine without protection, on this host's own KVM.
//!
//! The guest is a loop that fills its card's transmit ring with one packet of 64 KiB of TCP, segmentation left to the host, as fast as it is taken. It changes next to no memory, so what is seen is
//! the way of the packets: ring, gate, commit, tap. A tap in the same bridge counts what arrives.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use understudy_protocol::control::{ReplicatorRequest, Role};
use understudy_protocol::nic::Mac;
use understudy_vmm::net::backend::NetBackend;
use understudy_vmm::net::packet::HEADER;
use understudy_vmm::net::tap::Tap;

use super::calm::Answers;
use crate::bench::net::{OFFLOADS, large};
use crate::bench::pair::{BOUND, Setup, Side, free_port};
use crate::bench::rows::{Bar, Report};
use crate::lab::host::run_quiet;
use crate::lab::wait_for;
use crate::machine_code::machine_code;
use crate::power_cuts::key_and_hook;

machine_code!(fn code, "bulk.s", understudy_net_bulk_begin, understudy_net_bulk_end);

const GUEST: Mac = Mac([0x52, 0x54, 0, 0x78, 0, 1]);
const CLIENT: Mac = Mac([0x52, 0x54, 0, 0x78, 0, 2]);
const BRIDGE: &str = "br0";
/// Where the packet is in the image.
const PACKET: usize = 0x800;
const MEMORY_MIB: u64 = 32;

fn program() -> Result<Vec<u8>> {
    let mut image = code().to_vec();
    ensure!(image.len() <= PACKET, "the program of {} bytes reaches into its packet", image.len());
    let packet = large(GUEST, CLIENT);
    image.resize(PACKET, 0);
    image.extend(packet.header);
    image.extend(packet.frame);
    Ok(image)
}

/// Reads a tap until it goes.
struct Counter {
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Counter {
    fn new() -> Result<Self> {
        let tap = Tap::open("client", Some(BRIDGE), 1, CLIENT, None)?;
        tap.set_offloads(OFFLOADS).context("the client's tap takes no offloads")?;
        tap.set_up(true).context("switching the client's tap on")?;
        let (bytes, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (bytes, stop) = (bytes.clone(), stop.clone());
            move || {
                let mut buffer = vec![0; 1 << 17];
                while !stop.load(Ordering::Relaxed) {
                    match tap.receive(0, &mut buffer) {
                        Ok(Some(len)) if buffer.get(HEADER + 6..HEADER + 12) == Some(&GUEST.0) => {
                            bytes.fetch_add((len - HEADER) as u64, Ordering::Relaxed);
                        }
                        Ok(Some(_)) => {}
                        _ => {
                            if let Some(fd) = tap.waits_on(0) {
                                let _ =
                                    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20u8));
                            }
                        }
                    }
                }
            }
        });
        Ok(Self { bytes, stop, thread: Some(thread) })
    }

    /// Gbit/s over so long, as soon as anything arrives.
    fn rate(&self, time: Duration) -> Result<f64> {
        let bytes = || self.bytes.load(Ordering::Relaxed);
        let before = bytes();
        wait_for("packets of the guest", BOUND, || Ok((bytes() > before).then_some(())))?;
        let (from, began) = (bytes(), Instant::now());
        // As long as is measured.
        thread::sleep(time);
        Ok((bytes() - from) as f64 * 8.0 / 1e9 / began.elapsed().as_secs_f64())
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Gbit/s of a machine with these checkpoints, or without any; and its KVM backend.
fn run(intervals_ms: Option<(u64, u64)>, time: Duration) -> Result<(f64, String)> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace (root can)")?;
    for words in ["link set lo up", "link add br0 type bridge forward_delay 0 stp_state 0", "link set br0 up"] {
        run_quiet(Command::new("ip").args(words.split(' ')))?;
    }
    let counter = Counter::new()?;
    let dir = tempfile::tempdir_in("/dev/shm").context("making a directory in /dev/shm")?;
    let at = dir.path();
    fs::write(at.join("code"), program()?).context("writing the guest's program")?;
    let hook = key_and_hook(at)?;
    let (interval_ms, least) = intervals_ms.unwrap_or((25, 1));
    let more = ["--pipeline", "3", "--slow-link", "stall", "--peer-timeout-ms", "15000", "--min-interval-ms"];
    let mut setup = Setup {
        vcpus: 1,
        interval_ms,
        hook: Some(hook),
        replicator: more.map(str::to_owned).into_iter().chain([least.to_string()]).collect(),
        ..Setup::new(MEMORY_MIB)
    };
    let mut sides = [Side::new(at, "a")?, Side::new(at, "b")?];
    let nic = |name: &str| format!("name=net0,tap=tap-{name},bridge={BRIDGE},mac={GUEST}").parse();
    if intervals_ms.is_none() {
        setup.nic = Some(nic("a").context("naming the card")?);
        sides[0].start_vmm(at, "a", &setup, false)?;
        return Ok((counter.rate(time)?, sides[0].vmm()?.kvm_backend));
    }
    let peers = format!("a=127.0.0.1:{} b=127.0.0.1:{}", free_port()?, free_port()?);
    for (side, name) in sides.iter_mut().zip(["a", "b"]).rev() {
        setup.nic = Some(nic(name).context("naming the card")?);
        side.start_vmm(at, name, &setup, name == "b")?;
        side.start_replicator(at, name, &peers, &setup)?;
    }
    let primary = &sides[0];
    primary.ask_replicator::<()>(&ReplicatorRequest::Promote)?;
    wait_for("protection", BOUND * 2, || {
        let status = primary.replicator()?;
        Ok((status.role == Role::Sender && status.protected).then_some(()))
    })?;
    let before = primary.replicator()?;
    let rate = counter.rate(time)?;
    let after = primary.replicator()?;
    ensure!(
        after.protected && after.losses == before.losses && after.committed > before.committed,
        "the machine was not protected all the time: {after:?}"
    );
    Ok((rate, primary.vmm()?.kvm_backend))
}

/// Measure, each for so long. The calling thread is in another network namespace afterwards.
pub fn measure(time: Duration, say: &dyn Fn(&str)) -> Result<Answers> {
    let (without, kvm_backend) = run(None, time).context("without protection")?;
    say(&format!("64 KiB packets, not protected: {without:.2} Gbit/s"));
    let mut report = Report::new(kvm_backend);
    let mut bars = Vec::new();
    for (case, least) in [("event-driven", 1), ("every-25ms", 25)] {
        let (rate, _) = run(Some((25, least)), time).with_context(|| format!("checkpoints {case}"))?;
        say(&format!("64 KiB packets, checkpoints {case}: {rate:.2} Gbit/s"));
        report.beside(format!("net/bulk/{case}"), rate, "Gbit/s", "the same machine, not protected", without);
        let share = rate / without.max(f64::MIN_POSITIVE);
        bars.push(Bar {
            bar: format!("bulk of a protected machine, {case}"),
            wanted: "at least 70 % of unprotected".into(),
            got: format!("{:.0} %", share * 100.0),
            reached: Some(share >= 0.7),
        });
    }
    Ok(Answers { rows: report.rows, bars })
}
