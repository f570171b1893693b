//! A raw disk on a real block device: a loop device, which needs root and `losetup`. Without them it says `SKIPPED`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use understudy_disk::{Block, Raw};

struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Loop> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(Loop(PathBuf::from(String::from_utf8_lossy(&made.stdout).trim().to_owned())))
            }
            other => {
                let why = other.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).into_owned());
                println!("SKIPPED: no loop device can be made here: {}", why.trim());
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_block_device_is_read_written_cleared_and_enlarged_past_the_page_cache() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    let file = OpenOptions::new().create_new(true).read(true).write(true).open(&backing).unwrap();
    file.set_len(4 * MIB).unwrap();
    let Some(device) = Loop::over(&backing) else { return };
    let disk = Raw::open(&device.0, false).unwrap();
    assert_eq!(disk.size(), 4 * MIB);
    assert!(disk.how().io.starts_with("cache=none"), "{:?}", disk.how());

    // Neither aligned in memory nor whole pages.
    let bytes: Vec<u8> = (0..3 * 512 + 1).map(|i| i as u8).collect();
    disk.write_at(512, &bytes[1..]).unwrap();
    let mut read = vec![0; 3 * 512];
    disk.read_at(512, &mut read).unwrap();
    assert_eq!(read, bytes[1..]);
    disk.flush().unwrap();
    for unmap in [false, true] {
        disk.write_at(MIB, &[7; 4096]).unwrap();
        disk.write_zeroes(MIB + 512, 1024, unmap).unwrap();
        let mut read = vec![1; 4096];
        disk.read_at(MIB, &mut read).unwrap();
        assert!(read[..512].iter().chain(&read[1536..]).all(|&b| b == 7) && read[512..1536].iter().all(|&b| b == 0));
    }

    // Somebody on this node has read it through the page cache before another node wrote it.
    let other = File::open(&device.0).unwrap();
    let mut sector = [0; 512];
    other.read_exact_at(&mut sector, 2 * MIB).unwrap();
    file.write_all_at(&[9; 512], 2 * MIB).unwrap();
    file.sync_all().unwrap();
    disk.take_charge().unwrap();
    other.read_exact_at(&mut sector, 2 * MIB).unwrap();
    assert_eq!(sector, [9; 512], "what was cached of another node's time is forgotten");

    let refused = disk.resize(8 * MIB).unwrap_err().to_string();
    assert!(refused.contains("enlarge it first"), "{refused}");
    file.set_len(8 * MIB).unwrap();
    assert!(Command::new("losetup").arg("--set-capacity").arg(&device.0).status().unwrap().success());
    disk.resize(8 * MIB).unwrap();
    disk.write_at(8 * MIB - 512, &[1; 512]).unwrap();
    assert!(disk.write_at(8 * MIB, &[1; 512]).is_err());
}
