//! `understudy-bench`: what `make bench` runs. Every figure in a document names the command that makes it again; this is it.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;
use understudy_tests::bench::{disk, disk_guest, host, lab, net, net_guest, pair, pauses, replication, rows, size};
use understudy_tests::cluster_cuts;
use understudy_tests::connections;
use understudy_tests::disk_cuts;
use understudy_tests::net_cuts;
use understudy_tests::power_cuts;

#[derive(Parser)]
#[command(name = "understudy-bench", about = "Figures as JSON, each beside a peer or a physical limit")]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// On this host's own KVM: pauses, epoch rate, first copy, memory, monitor; and the size of the code
    Host {
        #[arg(long, default_value = "target/bench/host.json")]
        report: PathBuf,
    },
    /// Where the nodes run: first serial byte, monitor, memory, power cuts
    Lab {
        #[arg(long, default_value = "target/bench/lab.json")]
        report: PathBuf,
        #[arg(long, default_value = "tests/demo/policy.toml")]
        policy: PathBuf,
        /// How many power cuts
        #[arg(long, default_value_t = 10)]
        cuts: usize,
    },
    /// On this host's own KVM: the replication engine beside COLO, a plain copy and a plain TCP stream
    Replication {
        /// The rows; the bars go to a file beside it
        #[arg(long, default_value = "target/bench/replication.json")]
        report: PathBuf,
        /// Two minutes: fewer cases and samples
        #[arg(long)]
        quick: bool,
        /// Only these parts
        #[arg(long, value_delimiter = ',', value_parser = replication::PARTS)]
        only: Vec<String>,
        /// Pauses of these strategies alone, without the peer; for looking into one of them
        #[arg(long, value_delimiter = ',', value_parser = pauses::STRATEGIES)]
        strategy: Vec<String>,
    },
    /// The block layer alone, beside plain file I/O: no guest, no KVM
    Disk {
        /// An object; what this measures stands under `block_layer`, and everything else in it stays
        #[arg(long, default_value = "target/bench/disk.json")]
        report: PathBuf,
        /// On this directory's file system
        #[arg(long, default_value = "target/bench/disk")]
        place: PathBuf,
        /// Under a minute
        #[arg(long)]
        quick: bool,
    },
    /// On this host's own KVM: power cuts by the hundred, without a cluster; any byte lost, doubled or out of place ends it
    PowerCuts {
        #[arg(long, default_value = "target/bench/power-cuts.json")]
        report: PathBuf,
        #[arg(long, default_value_t = 100)]
        count: usize,
        /// Of the random moments [default: a new one]
        #[arg(long)]
        seed: Option<u64>,
        /// Negative control: each takeover finds the disk as if writes were not redirected; the guest must notice
        #[arg(long, hide = true)]
        unredirected: bool,
        /// Each host has its own copy of the disk, and loses it now and then
        #[arg(long, conflicts_with = "unredirected")]
        mirrored: bool,
        /// Seen from the network: the guest's packets carry its state, and must never contradict the image that survived; with switchovers
        #[arg(long, conflicts_with_all = ["unredirected", "mirrored"])]
        nic: bool,
        /// With --nic: milliseconds between two checkpoints
        #[arg(long, default_value_t = 25, requires = "nic")]
        interval_ms: u64,
        /// With --nic: milliseconds at least, when packets wait
        #[arg(long, default_value_t = 1, requires = "nic")]
        min_interval_ms: u64,
        /// Negative control: packets do not wait for their commit; the network must notice
        #[arg(long, hide = true, requires = "nic")]
        leak: bool,
    },
    /// On this host's own KVM, in a real cluster (corosync, Pacemaker, our agents, fencing): power cuts by the hundred, of a guest that any
    /// KVM can run
    ClusterCuts {
        #[arg(long, default_value = "target/bench/cluster-cuts.json")]
        report: PathBuf,
        #[command(flatten)]
        mix: cluster_cuts::Mix,
    },
    /// Where Linux runs: power cuts of a guest with SQLite, PostgreSQL and files on ext4, without a cluster; after each boot and at the end the disk must
    /// hold what was seen outside
    DiskCuts {
        #[arg(long, default_value = "target/bench/disk-cuts.json")]
        report: PathBuf,
        #[command(flatten)]
        mix: disk_cuts::Mix,
    },
    /// Where Linux runs: power cuts, switchovers and cut cables of a guest with servers, without a cluster; connections of real clients must live on, and their
    /// data be right
    Connections {
        #[arg(long, default_value = "target/bench/connections.json")]
        report: PathBuf,
        #[command(flatten)]
        mix: connections::Mix,
    },
    /// Where Linux runs: virtio-blk beside QEMU's with the same guest and file, and protected beside unprotected
    DiskGuest {
        /// The figures go into its key `guest`
        #[arg(long, default_value = "target/bench/disk.json")]
        report: PathBuf,
    },
    /// The network back end alone, beside plain reads and writes of a tap; and, on this host's own KVM, how long a protected machine's answers take beside
    /// the round trip of its replication, and how much it sends beside the same machine without protection. As root
    Net {
        /// An object; what this measures stands under `back_end`, `answers` and `bulk`, and everything else in it stays
        #[arg(long, default_value = "target/bench/net.json")]
        report: PathBuf,
        /// A few seconds
        #[arg(long)]
        quick: bool,
    },
    /// Where Linux runs: virtio-net beside QEMU's with the same guest, tap and bridge, and protected beside unprotected
    NetGuest {
        /// The figures go into its key `guest`
        #[arg(long, default_value = "target/bench/net.json")]
        report: PathBuf,
        /// Only these parts, beside our card without protection
        #[arg(long, value_delimiter = ',', value_parser = net_guest::PARTS)]
        only: Vec<String>,
    },
    /// The VMM of the measured machines
    #[command(hide = true)]
    FlatVmm(pair::FlatVmm),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(e) => {
            eprintln!("understudy-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Cmd) -> Result<i32> {
    match command {
        Cmd::Host { report } => {
            let lines = size::count(Path::new("."))?;
            println!("lines of Rust (code / tests)");
            for (name, lines) in &lines {
                println!("  {name:<12} {:>6} / {:>5}   {} files", lines.code, lines.tests, lines.files);
            }
            write(&report.with_file_name("size.json"), &lines)?;
            let measured = host::measure(&|text| println!("  … {text}"))?;
            println!("{}, {} vCPUs, {} MiB", measured.kvm_backend, measured.vcpus, measured.ram_mib);
            println!("  pages/epoch   pause p50     p99     max   copy limit   epochs/s   first copy   wire");
            for p in &measured.pauses {
                println!(
                    "  {:>11.0} {:>8} µs {:>7} {:>7} {:>9.0} µs {:>10.1} {:>9} ms {:>5.0} %",
                    p.pages_per_epoch,
                    p.pause_p50_us,
                    p.pause_p99_us,
                    p.pause_max_us,
                    p.copy_limit_us,
                    p.epochs_per_s,
                    p.first_copy_ms,
                    p.wire_ratio * 100.0
                );
            }
            println!("  the VMM's own memory: {} KiB", measured.memory.own_kib);
            println!("  monitor of the running machine: {} ms", measured.monitor_ms);
            write(&report, &measured)?;
            Ok(0)
        }
        Cmd::PowerCuts { report, count, seed, nic: true, interval_ms, min_interval_ms, leak, .. } => {
            let options = net_cuts::Options { count, seed, leak, interval_ms, min_interval_ms };
            let measured = net_cuts::run(&options, &|text| println!("  … {text}"))?;
            println!("{}", measured.kvm_backend);
            print!("{}", net_cuts::table(&measured));
            write(&report, &measured)?;
            Ok(0)
        }
        Cmd::PowerCuts { report, count, seed, unredirected, mirrored, .. } => {
            let disks = match (unredirected, mirrored) {
                (true, _) => power_cuts::Disks::Unredirected,
                (false, true) => power_cuts::Disks::Mirrored,
                (false, false) => power_cuts::Disks::Shared,
            };
            let started = std::time::Instant::now();
            let measured = power_cuts::run(count, seed, disks, &|text| {
                println!("  {:>4} s … {text}", started.elapsed().as_secs())
            })?;
            println!("{}", measured.kvm_backend);
            print!("{}", power_cuts::table(&measured));
            write(&report, &measured)?;
            Ok(0)
        }
        Cmd::Lab { report, policy, cuts } => {
            let measured = lab::measure(&policy, cuts, |text| println!("  … {text}"))?;
            println!("{}; {}", measured.kvm_backend, measured.where_it_ran);
            println!("  first serial byte: {} ms", measured.first_byte_understudy_ms);
            println!("    beside QEMU:     {} ms", measured.first_byte_qemu_ms);
            println!("  monitor:           {} ms", measured.monitor_understudy_ms);
            println!("    beside Dummy:    {} ms", measured.monitor_dummy_ms);
            println!("  the VMM's own memory with Linux: {} KiB", measured.memory.own_kib);
            println!("  first copy: {} ms\n", measured.first_copy_ms);
            print!("{}", understudy_tests::scenario::timeline::table(&measured.power_cuts));
            write(&report, &measured)?;
            if let Some(why) = &measured.failure {
                eprintln!("understudy-bench: {why}");
            }
            Ok(i32::from(measured.failure.is_some()))
        }
        Cmd::Replication { report, quick, only, strategy } => {
            let started = std::time::Instant::now();
            let say = |text: &str| println!("  {:>4} s … {text}", started.elapsed().as_secs());
            let (measured, bars) =
                replication::measure(&replication::Extent { quick, only, strategies: strategy }, &say)?;
            println!("\n{} (figures of other backends are not comparable)", measured.kvm_backend());
            print!("{}{}", pauses::table(&measured), measured.table("pause/"));
            println!("\n  bars for the two-core test host");
            print!("{}", rows::bars_table(&bars));
            write(&report, &measured.rows)?;
            write(&report.with_file_name("replication-bars.json"), &bars)?;
            // A part that could not be measured is no success, though its figures are written.
            Ok(i32::from(measured.rows.iter().any(|r| r.name.ends_with("/failed"))))
        }
        Cmd::Disk { report, place, quick } => {
            let started = std::time::Instant::now();
            let say = |text: &str| println!("  {:>4} s … {text}", started.elapsed().as_secs());
            let measured = disk::measure(quick, &place, &say)?;
            print!("\n{}", disk::table(&measured));
            write_key(&report, "block_layer", &measured)?;
            Ok(0)
        }
        Cmd::ClusterCuts { report, mix } => {
            let measured = cluster_cuts::run(&mix, |text| println!("  … {text}"))?;
            println!("{}", measured.kvm_backend);
            print!("{}", cluster_cuts::table(&measured));
            write(&report, &measured)?;
            if let Some(why) = &measured.failure {
                eprintln!("understudy-bench: {why}");
            }
            Ok(i32::from(measured.failure.is_some()))
        }
        Cmd::DiskCuts { report, mix } => {
            let started = std::time::Instant::now();
            let measured = disk_cuts::run(&mix, &|text| println!("  {:>4} s … {text}", started.elapsed().as_secs()))?;
            println!("{}", measured.kvm_backend);
            print!("{}", disk_cuts::table(&measured));
            write(&report, &measured)?;
            if let Some(why) = &measured.failure {
                eprintln!("understudy-bench: {why}");
            }
            Ok(i32::from(measured.failure.is_some()))
        }
        Cmd::Connections { report, mix } => {
            let started = std::time::Instant::now();
            let measured = connections::run(&mix, &|text| println!("  {:>4} s … {text}", started.elapsed().as_secs()))?;
            println!("{}; {}", measured.kvm_backend, measured.where_it_ran);
            print!("{}", connections::table(&measured));
            write(&report, &measured)?;
            if let Some(why) = &measured.failure {
                eprintln!("understudy-bench: {why}");
            }
            Ok(i32::from(measured.failure.is_some()))
        }
        Cmd::DiskGuest { report } => {
            let measured = disk_guest::measure(&|text| println!("  … {text}"))?;
            print!("{}", disk_guest::table(&measured));
            write_key(&report, "guest", &measured)?;
            Ok(0)
        }
        Cmd::Net { report, quick } => {
            let measured = net::measure(quick, &|text| println!("  … {text}"))?;
            print!("\n{}", net::table(&measured));
            write_key(&report, "back_end", &measured)?;
            if fs::File::options().read(true).write(true).open("/dev/kvm").is_ok() {
                let time = std::time::Duration::from_secs(if quick { 2 } else { 8 });
                let answers = net_cuts::calm::measure(time, &|text| println!("  … {text}"))?;
                print!("\n{}", net_cuts::calm::table(&answers));
                write_key(&report, "answers", &answers)?;
                let bulk = net_cuts::bulk::measure(time, &|text| println!("  … {text}"))?;
                print!("\n{}", net_cuts::calm::table(&bulk));
                write_key(&report, "bulk", &bulk)?;
            } else {
                println!("  answers of a protected machine were not measured: /dev/kvm cannot be opened");
            }
            Ok(0)
        }
        Cmd::NetGuest { report, only } => {
            let started = std::time::Instant::now();
            let say = |text: &str| println!("  {:>4} s … {text}", started.elapsed().as_secs());
            let (measured, bars) = net_guest::measure(&only, &say)?;
            println!("\n{} (figures of other backends are not comparable)", measured.kvm_backend());
            print!("{}\n{}", measured.table("-"), rows::bars_table(&bars));
            write_key(&report, "guest", &serde_json::json!({ "rows": measured.rows, "bars": bars }))?;
            // A part that could not be measured is no success, though its figures are written.
            Ok(i32::from(measured.rows.iter().any(|r| r.name.ends_with("/failed"))))
        }
        Cmd::FlatVmm(args) => pair::flat_vmm(args),
    }
}

/// Into a report that several commands share: this one's key, and everything else stays.
fn write_key(path: &Path, key: &str, value: &impl Serialize) -> Result<()> {
    let mut all: serde_json::Map<String, serde_json::Value> = match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?,
        Err(_) => Default::default(),
    };
    all.insert(key.into(), serde_json::to_value(value)?);
    write(path, &all)
}

fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    let json = serde_json::to_vec_pretty(value).context("writing a report")?;
    fs::write(path, json).with_context(|| format!("writing {}", path.display()))?;
    println!("  → {}", path.display());
    Ok(())
}
