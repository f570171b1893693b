//! What happens to clusters. Every test starts with the machine protected; [`whole`] checks that it is so again and that the
//! device has seen nothing wrong.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use understudy_protocol::control::{Gate, ReplicaState, VmmState};

use super::Test;
use crate::lab::bmc::FenceMode;
use crate::lab::{Plane, wait_for, wait_until};
use crate::scenario::World;
use crate::scenario::world::{BOUND, MACHINE, VMM, VMM_CLONE};

/// All but the first and the last, in an order in which each leaves what the next needs.
pub const TESTS: &[Test] = &[
    ("the death of the primary's host does not lose or double a byte", primary_dies),
    ("the death of the standby's host does not stop the guest, and protection returns with it", standby_dies),
    (
        "the replication link is cut: the guest goes on unprotected after a durable veto, and is protected when it heals",
        link_cut,
    ),
    ("the death of the sending replicator is not noticed by the guest", sender_dies),
    ("the death of the receiving replicator is not noticed by the guest", receiver_dies),
    ("the board service is restarted: nothing is lost", board_restarts),
    ("a standby with the wrong key is refused with a sentence, and taken when it has the right one", wrong_key),
    ("a second start of a running machine changes nothing", second_start),
    ("the death of the VMM on the primary leads to takeover", vmm_dies),
    ("a planned move loses nothing", planned_move),
];

/// The first test of all: only one node is on when the machine is started.
pub fn start_without_standby(world: &World) -> Result<()> {
    // The policy has just been applied to both; the standby's host goes down before the first guest instruction counts.
    let primary = world.wait_running(None)?;
    let standby = World::other(primary);
    world.lab.power_cut(standby)?;
    // The machine may have been protected for a moment already: lines from before the cut prove nothing.
    wait_until("the gate opens for want of a standby", BOUND, || Ok(world.vmm(primary)?.gate == Gate::Open))?;
    world.wait_lines(20)?;
    world.boot(standby)?;
    world.wait_protected()?;
    let vmm = world.vmm(primary)?;
    ensure!(vmm.gate == Gate::Hold, "protected, but the gate is {:?}", vmm.gate);
    Ok(())
}

/// Protected, heard, nothing wrong since `before` violations, no veto left behind.
pub fn whole(world: &World, before: u64) -> Result<()> {
    let primary = world.wait_protected()?;
    world.wait_lines(50)?;
    let verdict = world.verdict()?;
    if let Some(found) = verdict.first_violations.get(usize::try_from(before).unwrap_or(0)) {
        bail!("{} violations, the first: {:?}", verdict.violations - before, found);
    }
    ensure!(verdict.violations == before, "{} new violations", verdict.violations - before);
    ensure!(verdict.boot_ids.len() == 1, "the guest was booted again: {:?}", verdict.boot_ids);
    ensure!(!vetoed(world, primary)?, "protected, but the veto still stands in the CIB");
    world.lab.output(primary, &["crm_resource", "--cleanup"])?;
    Ok(())
}

/// The device stops writing until the guest has reported everything that it was sent.
pub fn books_agree(world: &World) -> Result<()> {
    let verdict = world.drain()?;
    ensure!(verdict.violations == 0 && verdict.undelivered == 0 && verdict.sent > 0, "{verdict:?}");
    Ok(())
}

fn vetoed(world: &World, node: &str) -> Result<bool> {
    let xml = world.lab.run(node, &["cibadmin", "--query", "--scope", "constraints"])?;
    Ok(xml.contains(&format!("understudy-veto-{MACHINE}")))
}

fn primary_dies(world: &World) -> Result<()> {
    let primary = world.primary()?;
    world.lab.power_cut(primary)?;
    world.wait_running(Some(primary))?;
    world.wait_lines(20)?;
    world.boot(primary)
}

fn standby_dies(world: &World) -> Result<()> {
    let primary = world.primary()?;
    let standby = World::other(primary);
    let before = world.vmm(primary)?;
    world.lab.power_cut(standby)?;
    wait_until("the gate open without a standby", BOUND, || Ok(world.vmm(primary)?.gate == Gate::Open))?;
    ensure!(vetoed(world, primary)?, "outputs are released without a standby and no veto stands in the CIB");
    world.wait_lines(100)?;
    world.boot(standby)?;
    world.wait_protected()?;
    let after = world.vmm(primary)?;
    ensure!(after.generation == before.generation && after.state == VmmState::Running, "{after:?}");
    Ok(())
}

fn link_cut(world: &World) -> Result<()> {
    let primary = world.primary()?;
    let standby = World::other(primary);
    let before = world.vmm(primary)?;
    world.lab.cut(standby, Plane::Storage)?;
    wait_until("the gate open without the link", BOUND, || Ok(world.vmm(primary)?.gate == Gate::Open))?;
    ensure!(vetoed(world, primary)?, "outputs are released without a standby and no veto stands in the CIB");
    let seen_there = world.lab.run(standby, &["cibadmin", "--query", "--local", "--scope", "constraints"])?;
    ensure!(
        seen_there.contains(&format!("understudy-veto-{MACHINE}")),
        "outputs are released, but the standby's own CIB does not show the veto"
    );
    world.wait_lines(100)?;
    world.lab.heal(Some(standby))?;
    world.wait_protected()?;
    ensure!(world.vmm(primary)?.generation == before.generation, "the machine changed hands");
    Ok(())
}

fn replicator_dies(world: &World, node: &str) -> Result<()> {
    let primary = world.primary()?;
    let before = world.vmm(primary)?;
    let old = world.replicator(primary)?.losses;
    let pid = world.kill_process(node, "replicator")?;
    wait_until("a new replicator process", BOUND, || {
        let now = world.lab.run(node, &["cat", &format!("/run/understudy/{MACHINE}/replicator.pid")])?;
        Ok(now.trim() != pid.to_string() && world.replicator(node).is_ok())
    })
    .with_context(|| format!("losses before: {old}"))?;
    world.wait_protected()?;
    let after = world.vmm(primary)?;
    ensure!(
        after.generation == before.generation && after.resets == before.resets && after.state == VmmState::Running,
        "before: {before:?}, after: {after:?}"
    );
    Ok(())
}

fn sender_dies(world: &World) -> Result<()> {
    replicator_dies(world, world.primary()?)
}

fn receiver_dies(world: &World) -> Result<()> {
    replicator_dies(world, World::other(world.primary()?))
}

fn board_restarts(world: &World) -> Result<()> {
    let service = |()| -> Result<String> {
        let pids = world.lab.run("b1", &["pgrep", "-f", "understudy-serial run"])?;
        Ok(pids.lines().next().context("the board service does not run")?.to_string())
    };
    let pid = service(())?;
    world.lab.run("n1", &["crm_resource", "--restart", "--resource", "serial-b1-com1", "--timeout", "120s"])?;
    ensure!(service(())? != pid, "the board service was not restarted");
    world.wait_lines(50)
}

fn wrong_key(world: &World) -> Result<()> {
    let primary = world.primary()?;
    let standby = World::other(primary);
    let swap = |command: &str| world.lab.run(standby, &["bash", "-c", command]);
    swap(
        "cp -p /etc/understudy/key /etc/understudy/key.right && (head -c 32 /dev/zero | od -An -v -tx1 | tr -d ' \\n'; echo) > /etc/understudy/key",
    )?;
    world.kill_process(standby, "replicator")?;
    let said = wait_for("a sentence about the key", BOUND, || {
        let status = world.replicator(primary)?;
        Ok(status.note.contains("key").then_some(status))
    });
    swap("mv /etc/understudy/key.right /etc/understudy/key")?;
    let said = said?;
    ensure!(
        !said.protected && said.replica != ReplicaState::UpToDate,
        "protected by a standby with another key: {said:?}"
    );
    world.kill_process(standby, "replicator").map(drop)
}

fn second_start(world: &World) -> Result<()> {
    let primary = world.primary()?;
    let before = world.vmm(primary)?;
    let out = world.lab.output(
        primary,
        &[
            "understudy-vmm",
            "run",
            "--machine",
            MACHINE,
            "--memory",
            "512",
            "--vcpus",
            "2",
            "--kernel",
            "/var/lib/understudy/demo/vmlinuz",
        ],
    )?;
    let text = String::from_utf8_lossy(&out.stderr);
    ensure!(!out.status.success(), "a second VMM ran");
    ensure!(text.contains("already") || text.contains("another"), "it says: {text}");
    world.lab.output(primary, &["crm_resource", "-r", VMM, "--force-start"])?;
    let after = world.vmm(primary)?;
    ensure!(
        after.generation == before.generation
            && after.vm_time_ns >= before.vm_time_ns
            && after.state == VmmState::Running,
        "before: {before:?}, after: {after:?}"
    );
    Ok(())
}

fn vmm_dies(world: &World) -> Result<()> {
    let primary = world.primary()?;
    world.kill_process(primary, "vmm")?;
    world.wait_running(Some(primary))?;
    world.wait_lines(20)
}

fn planned_move(world: &World) -> Result<()> {
    let primary = world.primary()?;
    let other = World::other(primary);
    world.lab.run(primary, &["crm", "resource", "move", VMM_CLONE, other, "force"])?;
    let moved = world.wait_running(Some(primary));
    world.lab.run(primary, &["crm", "resource", "clear", VMM_CLONE])?;
    moved?;
    world.wait_lines(20)
}

/// The very last test: it leaves a cluster that has met a node it took for dead. A primary is frozen, fenced by its network alone,
/// and wakes up with all its cables plugged in.
pub fn zombie(world: &World) -> Result<()> {
    let old = world.primary()?;
    let before = world.vmm(old)?;
    let board_before = world.verdict()?;
    world.lab.fence_mode(FenceMode::Fabric)?;
    let result =
        (|| {
            world.lab.freeze(old)?;
            let new = wait_for("the machine running elsewhere", BOUND, || {
                let node = World::other(old);
                Ok(world.vmm(node).is_ok_and(|s| s.state == VmmState::Running).then_some(node))
            })?;
            world.wait_lines(50)?;
            // It wakes with all its cables plugged in: nothing but refusals keeps it from speaking.
            world.lab.heal(Some(old))?;
            world.lab.thaw(old)?;
            wait_until("the zombie stopping itself", Duration::from_secs(120), || match world.vmm(old) {
                Ok(status) => Ok(!matches!(status.state, VmmState::Running | VmmState::Paused)
                    || status.generation > before.generation),
                Err(_) => Ok(true),
            })?;
            let now = world.vmm(new)?;
            ensure!(now.generation > before.generation && now.state == VmmState::Running, "{now:?}");
            let after = world.verdict()?;
            ensure!(after.violations == board_before.violations, "the zombie was heard: {:?}", after.first_violations);
            Ok(())
        })();
    world.lab.fence_mode(FenceMode::Power)?;
    result
}
