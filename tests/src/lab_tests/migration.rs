//! Live migration of a plain primitive, as Pacemaker does it. Runs before the cluster has any configuration, and leaves none.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use understudy_protocol::control::{Gate, VmmState, VmmStatus};

use super::Test;
use crate::lab::{Plane, wait_for, wait_until};
use crate::scenario::World;
use crate::scenario::world::{BOUND, HOSTS};

/// All of them.
pub const TESTS: &[Test] =
    &[("a plain machine migrates under Pacemaker and back, and stays where it is when that fails", there_and_back)];

const MACHINE: &str = "plain";
const RESOURCE: &str = "vm-plain";

const PEERS: &str = "n1=10.77.1.1:7799 n2=10.77.1.2:7799";

fn there_and_back(world: &World) -> Result<()> {
    configure(world)?;
    let result = migrations(world);
    if result.is_err() {
        describe(world);
    }
    let cleared = clear(world);
    result.and(cleared)
}

fn pairs(of: &str, pairs: &[(&str, &str)]) -> String {
    pairs.iter().map(|(name, value)| format!(r#"<nvpair id="{of}-{name}" name="{name}" value="{value}"/>"#)).collect()
}

fn configure(world: &World) -> Result<()> {
    let create =
        |xml: &str| world.lab.run("n1", &["cibadmin", "--create", "--scope", "resources", "--xml-text", xml]).map(drop);
    // No fencing device, and nothing here needs one.
    world
        .lab
        .run("n1", &["crm_attribute", "--type", "crm_config", "--name", "stonith-enabled", "--update", "false"])?;
    let listener = pairs("migrations", &[("peers", PEERS), ("key", "/etc/understudy/key")]);
    create(&format!(
        r#"<clone id="migrations-clone"><meta_attributes id="migrations-meta"><nvpair id="migrations-interleave" name="interleave" value="true"/></meta_attributes>
        <primitive id="migrations" class="ocf" provider="understudy" type="migrations"><instance_attributes id="migrations-attrs">{listener}</instance_attributes>
        <operations><op id="migrations-start" name="start" interval="0" timeout="60s"/><op id="migrations-stop" name="stop" interval="0" timeout="60s"/>
        <op id="migrations-monitor" name="monitor" interval="10s" timeout="60s"/></operations></primitive></clone>"#
    ))?;
    let machine = pairs(
        RESOURCE,
        &[
            ("name", MACHINE),
            ("memory", "128"),
            ("kernel", "/var/lib/understudy/demo/vmlinuz"),
            ("initrd", "/var/lib/understudy/demo/initrd"),
            ("cmdline", "console=ttyS1 quiet understudy.mem_pause_us=50000 understudy.rate=1000"),
            ("serial0", "file:/run/understudy/plain-com1"),
            ("shutdown_mode", "off"),
            ("migration_peers", PEERS),
            ("migration_pause_ms", "2000"),
        ],
    );
    create(&format!(
        r#"<primitive id="{RESOURCE}" class="ocf" provider="understudy" type="vmm"><instance_attributes id="{RESOURCE}-attrs">{machine}</instance_attributes>
        <meta_attributes id="{RESOURCE}-meta"><nvpair id="{RESOURCE}-allow" name="allow-migrate" value="true"/></meta_attributes>
        <operations><op id="{RESOURCE}-start" name="start" interval="0" timeout="240s"/><op id="{RESOURCE}-stop" name="stop" interval="0" timeout="120s"/>
        <op id="{RESOURCE}-monitor" name="monitor" interval="10s" timeout="60s"/>
        <op id="{RESOURCE}-to" name="migrate_to" interval="0" timeout="600s" on-fail="block"/>
        <op id="{RESOURCE}-from" name="migrate_from" interval="0" timeout="240s"/></operations></primitive>"#
    ))
}

fn vmm(world: &World, node: &str) -> Result<VmmStatus> {
    let text = world.lab.run(node, &["understudy-vmm", "status", "--machine", MACHINE, "--json"])?;
    serde_json::from_str(&text).with_context(|| format!("reading the status that understudy-vmm printed: {text}"))
}

fn runs(world: &World, node: &str) -> Result<VmmStatus> {
    let status = vmm(world, node)?;
    ensure!(status.state == VmmState::Running, "{status:?}");
    Ok(status)
}

/// Bytes that the guest has sent since it was booted: it starts again from nothing if it is booted anew.
fn said(status: &VmmStatus) -> u64 {
    status.serial.first().map_or(0, |port| port.tx_bytes)
}

fn migrations(world: &World) -> Result<()> {
    let home =
        wait_for("the machine on one node", BOUND, || Ok(HOSTS.into_iter().find(|node| runs(world, node).is_ok())))?;
    wait_until("a guest that talks", BOUND, || Ok(said(&runs(world, home)?) > 2000))?;
    let away = World::other(home);
    let first = runs(world, home)?;
    arrives(world, home, away, &first, &["crm_resource", "--move", "--resource", RESOURCE, "--node", away])?;
    let second = runs(world, away)?;
    arrives(world, away, home, &second, &["crm_resource", "--move", "--resource", RESOURCE, "--node", home])?;
    // The target cannot be reached: it is tried once, and the machine does not notice.
    let third = runs(world, home)?;
    world.lab.cut(away, Plane::Storage)?;
    let moved = world.lab.run(home, &["crm_resource", "--move", "--resource", RESOURCE, "--node", away]);
    let failed = moved.and_then(|_| {
        wait_until("a failed migration", BOUND, || {
            Ok(world.lab.run(home, &["crm_mon", "-1", "--inactive"])?.contains("migrate_to"))
        })
    });
    world.lab.heal(Some(away))?;
    failed?;
    wait_until("a guest that talks on", BOUND, || Ok(said(&runs(world, home)?) > said(&third) + 2000))?;
    let now = runs(world, home)?;
    ensure!(now.generation == third.generation && now.gate == Gate::Open && now.resets == 0, "{now:?}");
    ensure!(vmm(world, away).is_err(), "something of it is left on {away}: {:?}", vmm(world, away));
    Ok(())
}

/// After `command` the machine, which was as `before` on `from`, runs on `to` and nowhere else, and goes on where it was.
fn arrives(world: &World, from: &str, to: &str, before: &VmmStatus, command: &[&str]) -> Result<()> {
    world.lab.run(from, command)?;
    let mut twice = false;
    let after = wait_for(&format!("the machine on {to}"), BOUND, || {
        let here = runs(world, to)?;
        // Asked in this order: what has left can not come back.
        twice |= runs(world, from).is_ok();
        Ok(Some(here))
    })?;
    ensure!(!twice, "the machine runs on both nodes");
    ensure!(
        after.generation.0 == before.generation.0 + 1,
        "generation {} after {}",
        after.generation,
        before.generation
    );
    wait_until("an open gate", Duration::from_secs(60), || Ok(runs(world, to)?.gate == Gate::Open))?;
    wait_until("a guest that talks on", BOUND, || Ok(said(&runs(world, to)?) > said(before) + 2000))?;
    let now = runs(world, to)?;
    ensure!(now.resets == 0 && now.vm_time_ns > before.vm_time_ns, "before: {before:?}, now: {now:?}");
    wait_until(&format!("nothing left on {from}"), BOUND, || Ok(vmm(world, from).is_err()))?;
    wait_until("the cluster knowing it", BOUND, || {
        Ok(world
            .lab
            .run(to, &["crm_resource", "--locate", "--resource", RESOURCE])?
            .contains(&format!("running on: {to}")))
    })
}

fn clear(world: &World) -> Result<()> {
    let lab = &world.lab;
    lab.output("n1", &["crm_resource", "--clear", "--resource", RESOURCE])?;
    lab.output("n1", &["crm_resource", "--cleanup"])?;
    for (resource, meta) in [(RESOURCE, "vm"), ("migrations-clone", "clone")] {
        let stop = [
            "crm_resource",
            "--resource",
            resource,
            "--meta",
            "--set-parameter",
            "target-role",
            "--parameter-value",
            "Stopped",
        ];
        lab.run("n1", &stop).with_context(|| format!("stopping the {meta}"))?;
    }
    wait_until("everything stopped", BOUND, || {
        let text = lab.run("n1", &["crm_mon", "-1"])?;
        Ok(HOSTS.iter().all(|node| vmm(world, node).is_err())
            && !text.contains("Started")
            && !text.contains("Stopping"))
    })?;
    for xml in [format!("<primitive id=\"{RESOURCE}\"/>"), "<clone id=\"migrations-clone\"/>".into()] {
        lab.run("n1", &["cibadmin", "--delete", "--scope", "resources", "--xml-text", &xml])?;
    }
    lab.run("n1", &["crm_attribute", "--type", "crm_config", "--name", "stonith-enabled", "--delete"])?;
    lab.output("n1", &["crm_resource", "--cleanup"]).map(drop)
}

fn describe(world: &World) {
    for node in HOSTS {
        for argv in [
            &["crm_mon", "-1", "-r", "-f", "-A"][..],
            &["tail", "-n", "20", "/run/understudy/.migrations/replicator.log"],
            &["tail", "-n", "20", "/run/understudy/plain/vmm.log"],
            &["tail", "-n", "20", "/run/understudy/plain/migration.log"],
            &["understudy-vmm", "status", "--machine", MACHINE],
        ] {
            if let Ok(out) = world.lab.output(node, argv) {
                let text = [out.stdout, out.stderr].concat();
                println!("--- {node}: {}\n{}", argv.join(" "), String::from_utf8_lossy(&text));
            }
        }
    }
}
