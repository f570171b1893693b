//! The commands that people type, when what they need is not there.

use anyhow::{Result, ensure};

use super::Test;
use crate::scenario::World;

/// All of them.
pub const TESTS: &[Test] = &[
    ("a missing kernel image is named, and nothing is left behind", kernel_missing),
    ("a missing /dev/kvm is named, with what to do", kvm_missing),
];

fn refused(world: &World, script: &str, says: &[&str]) -> Result<()> {
    let out = world.lab.output("n1", &["bash", "-c", script])?;
    let text = String::from_utf8_lossy(&out.stderr);
    ensure!(!out.status.success(), "it did not fail: {text}");
    ensure!(out.status.code().is_some_and(|c| c != 101), "it panicked: {text}");
    for word in says {
        ensure!(text.contains(word), "{word:?} is not in: {text}");
    }
    Ok(())
}

const RUN: &str = "understudy-vmm run --machine lone --memory 64 --vcpus 1";

fn kernel_missing(world: &World) -> Result<()> {
    refused(world, &format!("{RUN} --kernel /no/such/vmlinuz"), &["/no/such/vmlinuz"])?;
    let left = world
        .lab
        .run("n1", &["bash", "-c", "ls /run/understudy/lone/*.sock /dev/shm/understudy/lone/ram 2>/dev/null; true"])?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    Ok(())
}

fn kvm_missing(world: &World) -> Result<()> {
    // In a mount namespace of its own /dev/kvm is a device that is not KVM, and then not there at all.
    let kernel = "--kernel /var/lib/understudy/demo/vmlinuz";
    refused(world, &format!("unshare -m sh -c 'mount --bind /dev/null /dev/kvm && {RUN} {kernel}'"), &["/dev/kvm"])?;
    refused(
        world,
        &format!(
            "unshare -m sh -c 'mount -t tmpfs t /tmp && mkdir /tmp/dev && mount --bind /tmp/dev /dev && {RUN} {kernel} --shm-root /tmp'"
        ),
        &["/dev/kvm"],
    )
}
