//! How fast epochs go from one process to another over loopback, without a real VMM. Not a test that can fail: run it with
//! `cargo test --release -p understudy-replicator --test throughput -- --ignored --nocapture`.

mod common;

use std::time::{Duration, Instant};

use common::fake_vmm::Load;
use common::*;

fn measure(name: &str, load: Load) {
    let (pair, _primary, _standby) = Pair::started(&Options {
        load,
        extra: &["--interval-ms", "1", "--peer-timeout-ms", "5000"],
        ..Options::default()
    });
    pair.wait_protected();
    let (begin, from) = (Instant::now(), pair.n1.status());
    std::thread::sleep(Duration::from_secs(5));
    let (to, seconds) = (pair.n1.status(), begin.elapsed().as_secs_f64());
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) / seconds;
    println!(
        "{name}: {:.0} epochs/s, {:.0} MiB/s of pages, {:.0} MiB/s on the wire; first copy of {} MiB in {} ms",
        (to.epochs - from.epochs) as f64 / seconds,
        mib(to.raw_bytes - from.raw_bytes),
        mib(to.wire_bytes - from.wire_bytes),
        load.ram_pages / 256,
        to.last_sync_ms,
    );
}

#[test]
#[ignore = "takes a while; a measurement, not a check"]
fn epochs_and_bytes_per_second() {
    let load = Load { ram_pages: 128 << 10, arena_pages: 32 << 10, burst: 10, pause: None, snapshots: false };
    measure("10 pages an epoch", load);
    measure("1000 pages an epoch", Load { burst: 1000, ..load });
    measure("10000 pages an epoch", Load { burst: 10_000, ..load });
}
