//! What this machine can do at most: copying memory, a plain TCP stream, compressing whole pages.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

use super::Spread;

/// How long the memory of this machine takes to copy `pages` pages that are strewn over a region of four times the size to one
/// place, µs: the median of some copies.
pub fn copy_us(pages: usize) -> f64 {
    let pages = pages.max(1);
    // Not in a row: dirty pages are not, and a processor that sees a row coming fetches ahead.
    let from = vec![1u8; (pages * 4).next_power_of_two() * 4096];
    let mut to = vec![0u8; pages * 4096];
    let mask = from.len() / 4096 - 1;
    let rounds = if pages > 20_000 { 7 } else { 21 };
    let times = (0..rounds).map(|_| {
        let started = Instant::now();
        for (i, page) in to.chunks_exact_mut(4096).enumerate() {
            let at = ((i * 12_289) & mask) * 4096;
            page.copy_from_slice(std::hint::black_box(&from[at..at + 4096]));
        }
        std::hint::black_box(&to);
        started.elapsed().as_secs_f64() * 1e6
    });
    Spread::of(times.collect()).median
}

/// A plain TCP stream over loopback, one thread at each end: bytes a second, and CPU time of both ends, s per byte.
pub fn tcp_stream(time: Duration) -> Result<(f64, f64)> {
    let used = || clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).context("reading the CPU time");
    let before = used()?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening on loopback")?;
    let address = listener.local_addr().context("listening on loopback")?;
    let reader = thread::spawn(move || -> std::io::Result<u64> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; 256 << 10];
        let mut sum = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(sum),
                n => sum += n as u64,
            }
        }
    });
    let mut stream = TcpStream::connect(address).context("connecting over loopback")?;
    let buffer = vec![1; 256 << 10];
    let started = Instant::now();
    while started.elapsed() < time {
        stream.write_all(&buffer).context("writing over loopback")?;
    }
    drop(stream);
    let sum = reader.join().map_err(|_| anyhow::anyhow!("the reader's thread ended"))?.context("reading")?;
    let took = started.elapsed().as_secs_f64();
    Ok((sum as f64 / took, (used()? - before).as_secs_f64() / sum.max(1) as f64))
}

/// Share of their size that pages have when each is compressed alone by LZ4.
pub fn lz4_share(pages: &[[u8; 4096]]) -> f64 {
    let packed: usize = pages.iter().map(|page| lz4_flex::block::compress(page).len().min(4096)).sum();
    packed as f64 / (pages.len().max(1) * 4096) as f64
}

/// As [`lz4_share`], by Zstandard at level 1.
pub fn zstd_share(pages: &[[u8; 4096]]) -> Result<f64> {
    let mut packer = zstd::bulk::Compressor::new(1).context("preparing Zstandard")?;
    let mut packed = 0;
    for page in pages {
        packed += packer.compress(page).context("compressing")?.len().min(4096);
    }
    Ok(packed as f64 / (pages.len().max(1) * 4096) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_shrink_to_nearly_nothing_and_noise_does_not() {
        let mut noise = [0u8; 4096];
        let mut x = 1u64;
        for byte in &mut noise {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (x >> 56) as u8;
        }
        assert!(lz4_share(&[[0; 4096]]) < 0.02 && zstd_share(&[[0; 4096]]).unwrap() < 0.02);
        assert!(lz4_share(&[noise]) > 0.99 && zstd_share(&[noise]).unwrap() > 0.99);
    }
}
