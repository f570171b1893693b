//! The agents against the distribution's own judges: ocf-tester, the schemas, crmsh, pcs, `crm_resource --force-…`.

use anyhow::{Context, Result, ensure};

use super::Test;
use crate::scenario::World;

/// All of them. They run beside the cluster's own machine, with machines and run directories of their own.
pub const TESTS: &[Test] = &[
    ("the metadata of every agent is valid by the DTD, the OCF 1.1 schema, crmsh and pcs", metadata),
    ("ocf-tester passes ocf:understudy:vmm as a primitive", ocf_tester_vmm),
    ("ocf-tester passes ocf:understudy:vmm as a promotable", ocf_tester_vmm_promotable),
    ("ocf-tester passes ocf:understudy:replicator", ocf_tester_replicator),
    ("ocf-tester passes ocf:understudy:serial", ocf_tester_serial),
    ("ocf-tester passes ocf:understudy:migrations", ocf_tester_migrations),
    ("ocf-tester passes ocf:understudy:evacuator", ocf_tester_evacuator),
    ("ocf-tester passes ocf:understudy:monitor", ocf_tester_monitor),
    ("crm_resource --force-* drives the serial agent through its life", force),
    ("a probe on a node that merely does not run the machine says so and nothing worse", idle_probe),
];

const NAMES: [&str; 6] = ["vmm", "replicator", "serial", "migrations", "evacuator", "monitor"];
const DIR: &str = "/usr/lib/ocf/resource.d/understudy";

fn metadata(world: &World) -> Result<()> {
    for name in NAMES {
        let file = format!("/tmp/{name}.xml");
        let agent = format!("{DIR}/{name}");
        world.lab.run("n1", &["sh", "-c", &format!("{agent} meta-data > {file}")])?;
        world.lab.run(
            "n1",
            &[
                "sh",
                "-c",
                &format!(
                    "cp /usr/share/resource-agents/ra-api-1.dtd /tmp/ && cd /tmp && xmllint --noout --valid {file}"
                ),
            ],
        )?;
        world.lab.run("n1", &["xmllint", "--noout", "--relaxng", "/usr/share/pcs/data/ocf-1.1.rng", &file])?;
        let info = world.lab.run("n1", &["crm", "ra", "info", &format!("ocf:understudy:{name}")])?;
        ensure!(info.contains("Parameters"), "crm ra info says: {info}");
        let info = world.lab.run("n1", &["pcs", "resource", "describe", &format!("ocf:understudy:{name}")])?;
        ensure!(info.contains("Resource options"), "pcs resource describe says: {info}");
        world.lab.run("n1", &["crm_resource", "--show-metadata", &format!("ocf:understudy:{name}")])?;
    }
    Ok(())
}

fn ocf_tester(world: &World, agent: &str, parameters: &[&str]) -> Result<()> {
    let tester = world.lab.run("n1", &["sh", "-c", "command -v ocf-tester || echo /usr/sbin/ocf-tester"])?;
    let mut argv = vec![tester.trim(), "-n", "tested"];
    for parameter in parameters {
        argv.extend(["-o", parameter]);
    }
    let agent = format!("{DIR}/{agent}");
    argv.push(&agent);
    let text = world.lab.run("n1", &argv)?;
    ensure!(text.contains("passed all tests"), "ocf-tester says: {text}");
    Ok(())
}

const VMM: [&str; 6] = [
    "name=tested",
    "memory=128",
    "kernel=/var/lib/understudy/demo/vmlinuz",
    "initrd=/var/lib/understudy/demo/initrd",
    "cmdline=console=ttyS0 quiet",
    // The guest of the demo takes a while to shut down under emulation, and ocf-tester has no patience to give.
    "shutdown_mode=off",
];

fn ocf_tester_vmm(world: &World) -> Result<()> {
    ocf_tester(world, "vmm", &VMM)
}

fn ocf_tester_vmm_promotable(world: &World) -> Result<()> {
    ocf_tester(world, "vmm", &[&VMM[..], &["mode=promotable"]].concat())
}

fn ocf_tester_replicator(world: &World) -> Result<()> {
    ocf_tester(
        world,
        "replicator",
        &["name=tested", "peers=n1=127.0.0.1:7901 n2=127.0.0.1:7902", "key=/etc/understudy/key"],
    )
}

const SERIAL: [&str; 4] = ["machine=tested", "device=com1", "listen=127.0.0.1:7903", "line=pty:/run/tested-line"];

fn ocf_tester_serial(world: &World) -> Result<()> {
    let mut parameters = SERIAL.to_vec();
    parameters.push("key=/etc/understudy/key");
    ocf_tester(world, "serial", &parameters)
}

fn ocf_tester_migrations(world: &World) -> Result<()> {
    ocf_tester(world, "migrations", &["peers=n1=127.0.0.1:7904", "key=/etc/understudy/key"])
}

fn ocf_tester_evacuator(world: &World) -> Result<()> {
    ocf_tester(world, "evacuator", &["run_root=/run/understudy-tested", "journal=/tmp/evacuation.journal"])
}

fn ocf_tester_monitor(world: &World) -> Result<()> {
    ocf_tester(world, "monitor", &["production=n1=127.0.0.1:7905 n2=127.0.0.2:7905", "key=/etc/understudy/key"])
}

fn force(world: &World) -> Result<()> {
    let mut params: String = String::new();
    for p in SERIAL.iter().chain(&["key=/etc/understudy/key"]) {
        let (name, value) = p.split_once('=').context("name=value")?;
        params.push_str(&format!(r#"<nvpair id="t-{name}" name="{name}" value="{value}"/>"#));
    }
    let script = format!(
        r#"set -e
cibadmin --empty > /tmp/forced.xml
export CIB_file=/tmp/forced.xml
cibadmin --create --scope resources --xml-text '<primitive id="t" class="ocf" provider="understudy" type="serial"><instance_attributes id="t-a">{params}</instance_attributes></primitive>'
crm_resource -r t --force-start
crm_resource -r t --force-check
crm_resource -r t --force-start
crm_resource -r t --force-stop
crm_resource -r t --force-stop
if crm_resource -r t --force-check; then echo "still there"; exit 1; else test $? -eq 7; fi
"#
    );
    world.lab.run("n1", &["bash", "-c", &script]).map(drop)
}

fn idle_probe(world: &World) -> Result<()> {
    for name in NAMES {
        let out = world.lab.output(
            "n1",
            &[
                "env",
                "OCF_ROOT=/usr/lib/ocf",
                "OCF_RESOURCE_INSTANCE=idle",
                "OCF_RESKEY_name=idle",
                "OCF_RESKEY_machine=idle",
                "OCF_RESKEY_device=com1",
                "OCF_RESKEY_CRM_meta_interval=0",
                &format!("{DIR}/{name}"),
                "monitor",
            ],
        )?;
        ensure!(
            out.status.code() == Some(7),
            "{name}: {:?} {}",
            out.status.code(),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(())
}
