//! A live migration whose target dies in the middle of it.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy_protocol::control::VmmState;

use super::estate::{BOUND, Estate, HOSTS, Machine};
use super::stories::{count_starts, fences};
use crate::lab::{processes, wait_for, wait_until};

/// A machine that migrates, and where to.
const MOVER: Machine = Machine { name: "mover", home: "n2", more: "automation = \"automatic\"\nmigrate = true" };
const TARGET: &str = "n3";

/// Without a controller: the machines that one holds have one permitted node, and are not moved by hand.
pub fn target_dies(estate: &mut Estate) -> Result<()> {
    estate.fence_delay = 0;
    estate.configure(&[MOVER], "")?;
    let result = dies(estate);
    estate.lab.boot(TARGET)?;
    estate.lab.wait_online(&HOSTS, BOUND)?;
    for argv in [&["crm_resource", "--clear", "--resource", "vm-mover"][..], &["crm_resource", "--cleanup"]] {
        estate.lab.run(HOSTS[0], argv)?;
    }
    result?;
    wait_ready(estate)?;
    // Nothing of it is left to go wrong: it can be moved the next time, and back.
    moves(estate, MOVER.home, TARGET)?;
    moves(estate, TARGET, MOVER.home)
}

/// Nothing orders a migration after the start of what receives it: one that is too early fails, and Pacemaker leaves the machine alone then.
fn wait_ready(estate: &Estate) -> Result<()> {
    wait_until("the cluster to know of no failure, and to receive migrations everywhere", BOUND, || {
        let mon = estate.lab.crm_mon(HOSTS[0])?;
        ensure!(mon.failures.is_empty(), "{:?}", mon.failures);
        Ok(mon.active("understudy-migrations", "Started").count() == HOSTS.len())
    })
}

/// As `crm resource move` does it.
fn order_move(estate: &Estate, to: &str) -> Result<()> {
    estate.lab.run(HOSTS[0], &["crm_resource", "--move", "--resource", "vm-mover", "--node", to]).map(drop)
}

fn dies(estate: &Estate) -> Result<()> {
    wait_ready(estate)?;
    count_starts(estate)?;
    let fenced = fences(estate, TARGET)?;
    let before = estate.vmm(MOVER.name, MOVER.home)?;
    let listeners = processes::running(&estate.lab, "understudy-replicator", "serve-migrations")?;
    let listener = listeners.iter().find(|p| p.node == TARGET).context("nobody receives migrations on the target")?;
    // It takes the connection, its kernel does, and says nothing: the migration is under way until the host dies.
    kill(Pid::from_raw(listener.pid), Signal::SIGSTOP).context("holding the target's listener")?;
    order_move(estate, TARGET)?;
    wait_until("a migration under way", BOUND, || {
        Ok(processes::running(&estate.lab, "understudy-replicator", "migrate")?.iter().any(|p| p.node == MOVER.home))
    })?;
    estate.lab.power_cut(TARGET)?;
    wait_until("the end of the migration", BOUND, || {
        Ok(processes::running(&estate.lab, "understudy-replicator", "migrate")?.is_empty())
    })?;
    wait_until("the target fenced", BOUND, || Ok(fences(estate, TARGET)? > fenced))?;
    let after = wait_for("the machine running where it was", BOUND, || {
        let status = estate.vmm(MOVER.name, MOVER.home)?;
        ensure!(status.state == VmmState::Running, "{status:?}");
        Ok((status.vm_time_ns > before.vm_time_ns).then_some(status))
    })?;
    ensure!(
        after.generation == before.generation && after.resets == before.resets,
        "before: {before:?}, after: {after:?}"
    );
    ensure!(estate.nodes_of(MOVER.name)? == [MOVER.home], "it is in {:?}", estate.nodes_of(MOVER.name)?);
    ensure!(estate.copies.starts(MOVER.name) == 1, "it was started again");
    estate.copies.never_twice()
}

fn moves(estate: &Estate, from: &str, to: &str) -> Result<()> {
    let before = estate.vmm(MOVER.name, from)?;
    order_move(estate, to)?;
    let moved = wait_for(&format!("the machine on {to}"), BOUND, || {
        let status = estate.vmm(MOVER.name, to)?;
        ensure!(status.state == VmmState::Running && estate.vmm(MOVER.name, from).is_err(), "{status:?}");
        Ok(Some(status))
    });
    estate.lab.run(HOSTS[0], &["crm_resource", "--clear", "--resource", "vm-mover"])?;
    let moved = moved?;
    ensure!(moved.generation > before.generation && moved.resets == 0, "before: {before:?}, after: {moved:?}");
    ensure!(moved.vm_time_ns > before.vm_time_ns, "it was booted anew");
    Ok(())
}
