//! The executable, as an administrator meets it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError};

use understudy_disk::block::open;
use understudy_disk::{Block, Disk, Format, Identity, Limits, LocalDirectory, Memory, Options};
use understudy_protocol::ids::{Epoch, Generation};

/// A process that is being started has copies of this one's files, and so its locks, until it runs its own program. So no test starts one while
/// the other lets go of a disk.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn tool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy-disk")).args(args).output().unwrap()
}

fn works(args: &[&str]) -> String {
    let out = tool(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn refuses(args: &[&str], words: &[&str]) {
    let out = tool(args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{args:?} works");
    for word in words {
        assert!(said.contains(word), "{args:?}: {said:?} does not say {word:?}");
    }
}

fn attach(disk: &Path, generation: u64) -> Disk {
    Disk::open(Options {
        base: open(disk, Format::Raw, false).unwrap(),
        format: Format::Raw,
        directory: Arc::new(LocalDirectory::make(&LocalDirectory::beside(disk)).unwrap()),
        identity: Identity { machine: "m".into(), node: "n1".into(), generation: Generation(generation) },
        memory: Memory::None,
        limits: Limits::default(),
    })
    .unwrap()
}

#[test]
fn a_disk_is_made_looked_at_merged_copied_and_released() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.raw");
    let name = path.to_str().unwrap();
    works(&["create", name, "--size", "4M"]);
    refuses(&["create", name, "--size", "4M"], &["exists already"]);
    assert!(works(&["inspect", name]).contains("claimed by no machine"));

    let disk = attach(&path, 1);
    disk.protect(Epoch(1)).unwrap();
    disk.write_at(4096, &[7; 4096]).unwrap();
    disk.cut(Epoch(1)).unwrap();
    disk.seal(Epoch(1)).unwrap();
    disk.commit(Epoch(1)).unwrap();
    disk.write_at(4096, &[8; 4096]).unwrap();
    let seen = works(&["inspect", name]);
    for word in ["owner: m on n1, generation 1", "a process holds it", "2 slices", "epoch 1", "committed", "open: "] {
        assert!(seen.contains(word), "{seen}");
    }
    for command in
        [&["merge", name][..], &["convert", name, "x"], &["resize", name, "8M"], &["release", name, "--machine", "m"]]
    {
        refuses(command, &["in use by m on n1"]);
    }
    drop(disk);

    refuses(&["convert", name, "x"], &["2 slices that are not merged"]);
    refuses(&["release", name, "--machine", "m"], &["2 slices that are not merged"]);
    let report: serde_json::Value = serde_json::from_str(&works(&["inspect", name, "--json"])).unwrap();
    assert_eq!(report["slices"][0]["standing"], "committed");
    assert_eq!((report["held"].as_bool(), report["problem"].is_null()), (Some(false), true));
    works(&["check", name, "--read"]);

    // A committed slice is damaged: nothing but the report.
    let mut slices = fs::read_dir(LocalDirectory::beside(&path)).unwrap().map(|e| e.unwrap().path());
    let slice = slices.find(|p| p.to_str().unwrap().contains("-1-1-1.slice")).unwrap();
    let whole = fs::read(&slice).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&slice, damaged).unwrap();
    refuses(&["check", name], &["wrong checksum"]);
    refuses(&["merge", name], &["wrong checksum"]);
    fs::write(&slice, whole).unwrap();

    assert!(works(&["merge", name]).contains("merged 1 slices"));
    assert_eq!(&fs::read(&path).unwrap()[4096..8192], &[7; 4096]);
    assert!(works(&["merge", name]).contains("nothing to merge"));
    // The open slice is the machine's to throw away.
    drop(attach(&path, 2));
    let copy = dir.path().join("copy.qcow2");
    let copy = copy.to_str().unwrap();
    works(&["convert", name, copy, "--to", "qcow2"]);
    refuses(&["convert", name, copy, "--to", "qcow2"], &["exists already"]);
    assert!(works(&["check", copy, "--format", "qcow2", "--read"]).contains("tables: 64.0 KiB of data"));
    let back = dir.path().join("back.raw");
    works(&["convert", copy, back.to_str().unwrap(), "--format", "qcow2"]);
    assert!(fs::read(&back).unwrap() == fs::read(&path).unwrap());

    refuses(&["resize", name, "1M"], &["would lose"]);
    works(&["resize", name, "8M"]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 8 << 20);
    refuses(&["release", name, "--machine", "other"], &["belongs to \"m\""]);
    works(&["release", name, "--machine", "m"]);
    assert!(works(&["inspect", name]).contains("released"));
}

#[test]
fn sizes_and_formats_that_make_no_sense_are_refused() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    for size in ["0", "100", "5X", "G", "99999999T", "-1", ""] {
        let out = tool(&["create", "never", &format!("--size={size}")]);
        assert_eq!(out.status.code(), Some(2), "{size:?}");
    }
    refuses(&["create", "never", "--size", "1M", "--format", "vmdk"], &["raw and qcow2"]);
    refuses(&["create", "never", "--size", "1M", "--backing", "b", "--backing-format", "raw"], &["no backing disk"]);
    refuses(&["inspect", "/does/not/exist"], &["/does/not/exist"]);
}
