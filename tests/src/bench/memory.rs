//! What a VMM takes beyond its guest's RAM.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// Resident memory of a VMM process by purpose, in KiB.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct VmmMemory {
    /// The guest's RAM: pages of the RAM file that are resident.
    pub guest_ram_kib: u64,
    /// The capture arena: what the largest cut so far needed.
    pub arena_kib: u64,
    /// Everything else, shared libraries in proportion: the VMM's own.
    pub own_kib: u64,
}

/// Read it for process `pid`.
pub fn of(pid: u32) -> Result<VmmMemory> {
    let file = format!("/proc/{pid}/smaps");
    Ok(parse(&fs::read_to_string(&file).with_context(|| format!("reading {file}"))?))
}

/// Sum up a `smaps` text.
pub fn parse(smaps: &str) -> VmmMemory {
    let mut memory = VmmMemory::default();
    let mut mapping = "";
    for line in smaps.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            mapping = line.split_ascii_whitespace().nth(5).unwrap_or_default();
            continue;
        }
        let kib = || line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match (first, mapping.rsplit('/').next().unwrap_or_default()) {
            // Shared with the replicator, so its share is no measure: it is there or not.
            ("Rss:", "ram") => memory.guest_ram_kib += kib(),
            ("Rss:", "arena") => memory.arena_kib += kib(),
            ("Pss:", name) if name != "ram" && name != "arena" => memory.own_kib += kib(),
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_and_arena_are_told_from_the_vmms_own_memory() {
        let smaps = "7f00-7f01 rw-s 00000000 00:01 5   /dev/shm/understudy/m/ram\nRss:  100 kB\nPss:  50 kB\n\
                     7f02-7f03 rw-s 00000000 00:01 6   /dev/shm/understudy/m/arena\nRss:  20 kB\nPss:  20 kB\n\
                     7f04-7f05 rw-p 00000000 00:00 0\nRss:  7 kB\nPss:  7 kB\n";
        let memory = parse(smaps);
        assert_eq!((memory.guest_ram_kib, memory.arena_kib, memory.own_kib), (100, 20, 7));
    }
}
