//! What the bitmap of a mirrored disk costs a guest's direct writes: `cargo run --release -p understudy-disk --example first_write DIRECTORY`.
//!
//! Random writes of 4 KiB to a sparse disk of 64 GiB, with no peer and with one; and what the first write to a region costs by itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_disk::mirror::{Copy, CopyOptions};
use understudy_disk::{Block, Disk, Format, Identity, Limits, LocalDirectory, Memory, Options, Raw};
use understudy_protocol::ids::Generation;

const SIZE: u64 = 64 << 30;
const WRITES: u64 = 10_000;

fn run(disk: &Disk) -> (Duration, Vec<Duration>) {
    let mut seed = 1u64;
    let mut each = Vec::new();
    let began = Instant::now();
    for _ in 0..WRITES {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (seed >> 16) % (SIZE / 4096) * 4096;
        let one = Instant::now();
        disk.write_at(at, &[seed as u8; 4096]).unwrap();
        each.push(one.elapsed());
    }
    each.sort_unstable();
    (began.elapsed(), each)
}

fn main() {
    let place = PathBuf::from(std::env::args().nth(1).expect("a directory")).join("first-write");
    std::fs::create_dir(&place).expect("a directory that is not there yet");
    let open = |name: &str, generation| {
        let path = place.join(name);
        if !path.exists() {
            Raw::create(&path, SIZE).unwrap();
        }
        let options = Options {
            base: understudy_disk::block::open(&path, Format::Raw, false).unwrap(),
            format: Format::Raw,
            directory: Arc::new(LocalDirectory::make(&LocalDirectory::beside(&path)).unwrap()),
            identity: Identity { machine: "m".into(), node: "a".into(), generation: Generation(generation) },
            memory: Memory::None,
            limits: Limits::default(),
        };
        Arc::new(Disk::open_mirrored(options).unwrap())
    };
    let disk = open("disk", 1);
    let (alone, _) = run(&disk);
    let (warm, _) = run(&disk);
    // A peer that has everything, as far as is known: its synchronisation begins and breaks off.
    let path = place.join("copy");
    Raw::create(&path, SIZE).unwrap();
    let copy = Copy::open(CopyOptions {
        base: understudy_disk::block::open(&path, Format::Raw, false).unwrap(),
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&LocalDirectory::beside(&path)).unwrap()),
        machine: "m".into(),
        node: "b".into(),
        limits: Limits::default(),
    })
    .unwrap();
    drop(disk.sync(&copy.state().unwrap()).unwrap());
    let (first, each) = run(&disk);
    let (second, _) = run(&disk);
    let per = |all: Duration| all.as_secs_f64() * 1e6 / WRITES as f64;
    println!("{WRITES} random writes of 4 KiB, microseconds each:");
    println!("  no peer, file empty          {:8.1}", per(alone));
    println!("  no peer, again               {:8.1}", per(warm));
    println!(
        "  a peer, all regions cold     {:8.1}   (99th percentile {:?}, longest {:?})",
        per(first),
        each[each.len() * 99 / 100],
        each[each.len() - 1]
    );
    println!("  a peer, all regions hot      {:8.1}", per(second));
    drop(disk);
    std::fs::remove_dir_all(&place).unwrap();
}
