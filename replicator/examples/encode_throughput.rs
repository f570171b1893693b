//! Prints how fast pages are encoded, decoded and applied, and what is left of them on the wire:
//! `cargo run --release -p understudy-replicator --example encode_throughput [-- DIR [CONTENT]]`. DIR is where the stage and a
//! RAM file are made; it should be on a tmpfs (default: /dev/shm). CONTENT is one of text, database, zero-heavy, random.

use std::path::PathBuf;
use std::process::ExitCode;

use understudy_replicator::codec::measure::{Content, Figures, Plan, run};
use understudy_replicator::codec::method::Method;
use understudy_replicator::codec::writer::{Compression, EncodingConfig, ShadowBudget};

fn main() -> ExitCode {
    let parent = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let dir = parent.join(format!("understudy-encode-{}", std::process::id()));
    if let Err(e) = std::fs::create_dir(&dir) {
        eprintln!("cannot create {}: {e}", dir.display());
        return ExitCode::FAILURE;
    }
    let only = std::env::args().nth(2);
    let printed = print(&dir, only.as_deref());
    let removed = std::fs::remove_dir_all(&dir);
    match (printed, removed) {
        (Ok(()), Ok(())) => ExitCode::SUCCESS,
        (Err(e), _) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
        (_, Err(e)) => {
            eprintln!("cannot remove {}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn print(dir: &std::path::Path, only: Option<&str>) -> Result<(), understudy_replicator::image::ImageError> {
    println!("256 MiB guest, 4096 dirty pages an epoch, 40 epochs; ns per dirty page, GB of dirty pages per second");
    println!(
        "{:<11} {:<22} {:>14} {:>14} {:>8} {:>7}",
        "content", "encoding", "encode", "decode, stage", "apply", "wire"
    );
    for content in Content::ALL.into_iter().filter(|content| only.is_none_or(|only| only == content.name())) {
        let plain = Compression::Always(Method::Plain);
        let variants = [
            ("shadow 25 %", ShadowBudget::Percent(25), plain),
            ("shadow 100 %", ShadowBudget::Percent(100), plain),
            ("hashes only", ShadowBudget::Percent(0), plain),
            ("shadow 25 %, then LZ4", ShadowBudget::Percent(25), Compression::Always(Method::Lz4)),
            ("shadow 25 %, then zstd", ShadowBudget::Percent(25), Compression::Always(Method::Zstd)),
        ];
        let mut last = Figures::default();
        for (name, shadow, compression) in variants {
            let encoding = EncodingConfig { shadow, compression };
            let f = run(&Plan { content, encoding, ..Plan::default() }, dir)?;
            println!(
                "{:<11} {:<22} {:>6.0} ({:>5.2}) {:>6.0} ({:>5.2}) {:>8.0} {:>7.3}",
                content.name(),
                name,
                f.ns_per_page(f.encode),
                f.gb_per_second(f.encode),
                f.ns_per_page(f.decode),
                f.gb_per_second(f.decode),
                f.ns_per_page(f.apply),
                f.ratio(f.wire_bytes)
            );
            last = f;
        }
        let yardsticks = [
            ("LZ4, whole pages", last.lz4, last.lz4_bytes),
            ("zstd -1, whole pages", last.zstd, last.zstd_bytes),
            ("copied once", last.copy, last.dirty_bytes),
        ];
        for (name, time, bytes) in yardsticks {
            println!(
                "{:<11} {:<22} {:>6.0} ({:>5.2}) {:>14} {:>8} {:>7.3}",
                content.name(),
                name,
                last.ns_per_page(time),
                last.gb_per_second(time),
                "",
                "",
                last.ratio(bytes)
            );
        }
    }
    Ok(())
}
