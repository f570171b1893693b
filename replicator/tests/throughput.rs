//! How fast epochs go from one process to another over loopback, without a real VMM. Not a test that can fail: run it with
//! `cargo test --release -p understudy-replicator --test throughput -- --ignored --nocapture`.

mod common;

use std::time::{Duration, Instant};

use common::fake_vmm::Load;
use common::*;
use understudy_protocol::control::VmmState;

fn measure(name: &str, load: Load, paths: usize) {
    let extra = &["--interval-ms", "1", "--peer-timeout-ms", "5000"];
    let mut pair = Pair::new(&Options { load, extra, ..Options::default() });
    // Without a relay between them.
    let list = |port: u16| (0..paths).map(|_| format!("{}:{port}", own_address())).collect::<Vec<_>>().join(",");
    let peers = format!("n1={} n2={}", list(7001), list(7002));
    (pair.n1.peers, pair.n2.peers) = (peers.clone(), peers);
    let _primary = pair.n1.vmm(load, VmmState::Running, 1);
    let _standby = pair.n2.vmm(load, VmmState::Standby, 0);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    pair.wait_protected();
    let cpu = || [&pair.n1, &pair.n2].map(cpu_seconds);
    let before = cpu();
    let (begin, from) = (Instant::now(), pair.n1.status());
    std::thread::sleep(Duration::from_secs(5));
    let (to, seconds) = (pair.n1.status(), begin.elapsed().as_secs_f64());
    let after = cpu();
    let pages = (to.raw_bytes - from.raw_bytes) as f64 / 4096.0;
    let per_page = |i: usize| (after[i] - before[i]) * 1e6 / pages;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) / seconds;
    println!(
        "{name}: {:.0} epochs/s, {:.0} MiB/s of pages, {:.0} MiB/s on the wire; first copy of {} MiB in {} ms; \
         processor time a page: sender {:.1} µs, receiver {:.1} µs",
        (to.epochs - from.epochs) as f64 / seconds,
        mib(to.raw_bytes - from.raw_bytes),
        mib(to.wire_bytes - from.wire_bytes),
        load.ram_pages / 256,
        to.last_sync_ms,
        per_page(0),
        per_page(1),
    );
}

/// User and system time of the node's replicator so far.
fn cpu_seconds(node: &Node) -> f64 {
    let pid = node.process.as_ref().unwrap().id();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks as f64 / 100.0
}

#[test]
#[ignore = "takes a while; a measurement, not a check"]
fn epochs_and_bytes_per_second() {
    let load = Load { ram_pages: 128 << 10, arena_pages: 32 << 10, burst: 10, pause: None, snapshots: false };
    for paths in 1..=2 {
        measure(&format!("{paths} paths, 10 pages an epoch"), load, paths);
        measure(&format!("{paths} paths, 1000 pages an epoch"), Load { burst: 1000, ..load }, paths);
        measure(&format!("{paths} paths, 10000 pages an epoch"), Load { burst: 10_000, ..load }, paths);
    }
}
