//! [`Lab`]: what tests, the demo and the command line hold to work with the nodes.
//!
//! Everything here happens on the machine that the nodes run on (the lab VM, or a host with full KVM); see
//! [`super::host::choose`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use understudy_protocol::control::{ControlError, call_once};

use super::bmc::{BmcRequest, Event, FenceMode, LabStatus};
use super::net::{self, Kind, NODES, Node, Plane};
use super::node::{Settings, disk_dir};
use super::wait::{wait_for, wait_until};
use super::{host, places, root, vm};

/// Longest wait for the daemon's answer.
const BMC_BOUND: Duration = Duration::from_secs(60);
/// Longest wait for a booted node to be a member. Software emulation on a busy host is slow.
pub const ONLINE_BOUND: Duration = Duration::from_secs(240);

/// How the lab is to be.
#[derive(Debug, Clone, clap::Args)]
pub struct LabOptions {
    /// Corosync's token timeout in milliseconds: 1000, but 3000 in the lab VM, where software emulation on a busy host can
    /// starve a healthy node for longer than a second
    #[arg(long, default_value_t = default_token_ms())]
    pub token_ms: u32,
    /// Leave the cluster without any configuration: no fencing device, no remote node
    #[arg(long)]
    pub bare: bool,
    /// Cluster nodes
    #[arg(long, default_value_t = 2, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(2..=4))]
    pub hosts: usize,
    /// A host that takes mail, in place of the board
    #[arg(long)]
    pub mail: bool,
    /// Corosync has one link, in the management plane
    #[arg(long)]
    pub one_link: bool,
    /// The lab is this program's own: what was up before is taken down, and it ends with the program, however that ends.
    #[arg(skip)]
    pub tied: bool,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { token_ms: default_token_ms(), bare: false, hosts: 2, mail: false, one_link: false, tied: true }
    }
}

impl LabOptions {
    /// The cluster's nodes.
    pub fn hosts(&self) -> impl Iterator<Item = Node> {
        NODES.into_iter().filter(|n| n.kind == Kind::Cluster).take(self.hosts)
    }

    /// Every node that the lab has.
    fn nodes(&self) -> impl Iterator<Item = Node> {
        let beside = if self.mail { Kind::Server } else { Kind::Board };
        self.hosts().chain(NODES.into_iter().filter(move |n| n.kind == beside))
    }
}

fn default_token_ms() -> u32 {
    if places::in_vm() { 3000 } else { 1000 }
}

/// The lab that is up on this machine.
#[derive(Debug, Clone, Copy)]
pub struct Lab(());

impl Lab {
    /// The lab that is up, or an error that says how to bring it up.
    pub fn running() -> Result<Self> {
        let lab = Self(());
        lab.status().map(|_| lab).context("the lab is not up (`understudy-lab up` brings it up)")
    }

    /// Bring the lab up: the network, the BMC, all nodes; wait until the cluster's nodes see each other; give it fencing and
    /// the board as a remote node unless `bare`. A lab that is up is left as it is, unless this one is to be `tied`.
    pub fn up(options: &LabOptions) -> Result<Self> {
        if let Ok(lab) = Self::running() {
            if !options.tied {
                return Ok(lab);
            }
            Self::down()?;
        }
        host::need_root("The lab")?;
        host::need_tools(&[("ip", "iproute2"), ("nsenter", "util-linux")])?;
        let lab_root = root::ensure()?;
        let hosts: Vec<&str> = options.hosts().map(|n| n.name).collect();
        let links = if options.one_link { vec![Plane::Management] } else { vec![Plane::Management, Plane::Business] };
        prepare_run_dir(&Settings {
            token_ms: options.token_ms,
            root: lab_root,
            authkey: vm::random_token()?,
            hosts: hosts.iter().map(ToString::to_string).collect(),
            links,
        })?;
        start_daemon(options.tied)?;
        let lab = Self(());
        for node in options.nodes() {
            lab.boot(node.name)?;
        }
        lab.wait_online(&hosts, ONLINE_BOUND)?;
        if !options.bare {
            lab.configure_base(options)?;
        }
        Ok(lab)
    }

    /// Kill all nodes, keep their logs in the lab's `out` directory, forget everything else.
    pub fn down() -> Result<()> {
        match ask::<()>(&BmcRequest::Quit) {
            Ok(()) => {}
            Err(ControlError::Io { .. }) => {} // not up, or gone before it could answer
            Err(e) => return Err(e.into()),
        }
        let run = places::run_dir();
        if run.exists() {
            keep_logs()?;
            fs::remove_dir_all(&run).with_context(|| format!("deleting {}", run.display()))?;
        }
        let _ = fs::remove_dir_all(places::BMC_DIR);
        Ok(())
    }

    // -------------------------------------------------------------------------------------------------------- switches

    /// Power, cables and freezes of all nodes.
    pub fn status(&self) -> Result<LabStatus> {
        Ok(ask(&BmcRequest::Status)?)
    }

    /// Everything that happened so far, oldest first.
    pub fn events(&self) -> Result<Vec<Event>> {
        Ok(ask(&BmcRequest::Events)?)
    }

    /// Switch a node on.
    pub fn boot(&self, node: &str) -> Result<()> {
        Ok(ask(&BmcRequest::On { node: node.into(), by: "lab".into() })?)
    }

    /// Cut a node's power; returns when no process of it is left.
    pub fn power_cut(&self, node: &str) -> Result<()> {
        Ok(ask(&BmcRequest::Off { node: node.into(), by: "lab".into() })?)
    }

    /// Press the power button: the node's services stop in order.
    pub fn shutdown(&self, node: &str) -> Result<()> {
        ask::<()>(&BmcRequest::Shutdown { node: node.into() })?;
        wait_until(&format!("{node} shutting down"), ONLINE_BOUND, || self.is_on(node).map(|on| !on))
    }

    /// Stop all processes of a node.
    pub fn freeze(&self, node: &str) -> Result<()> {
        Ok(ask(&BmcRequest::Freeze { node: node.into() })?)
    }

    /// Let a frozen node go on.
    pub fn thaw(&self, node: &str) -> Result<()> {
        Ok(ask(&BmcRequest::Thaw { node: node.into() })?)
    }

    /// Pull a node's cable of one plane.
    pub fn cut(&self, node: &str, plane: Plane) -> Result<()> {
        Ok(ask(&BmcRequest::Cut { node: node.into(), plane })?)
    }

    /// Plug in all cables of one node, or of all.
    pub fn heal(&self, node: Option<&str>) -> Result<()> {
        Ok(ask(&BmcRequest::Heal { node: node.map(String::from) })?)
    }

    /// Choose what fencing does.
    pub fn fence_mode(&self, mode: FenceMode) -> Result<()> {
        Ok(ask(&BmcRequest::SetFenceMode { mode })?)
    }

    /// Write a line into the event log.
    pub fn note(&self, text: &str) -> Result<()> {
        Ok(ask(&BmcRequest::Note { text: text.into() })?)
    }

    /// Let the lab outlive this program.
    pub fn keep(&self) -> Result<()> {
        Ok(ask(&BmcRequest::Keep)?)
    }

    /// Whether a node is on.
    pub fn is_on(&self, node: &str) -> Result<bool> {
        Ok(self.status()?.nodes.get(node).is_some_and(|n| n.on))
    }

    // ---------------------------------------------------------------------------------------------------- inside nodes

    /// A command that will run in `node` with a clean environment. `node` may also be `lab`: the outer end of the network, with
    /// this machine's own files.
    pub fn command(&self, node: &str, program: &str) -> Result<Command> {
        let status = self.status()?;
        let (target, namespaces): (u32, &[&str]) = if node == "lab" {
            (status.pid, &["--net"])
        } else {
            let pid = status.nodes.get(net::node(node)?.name).and_then(|n| n.pid);
            (
                pid.with_context(|| format!("{node} is off"))?,
                &["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"],
            )
        };
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(target.to_string()).args(namespaces).args(["--", program]);
        if node != "lab" {
            command.env_clear().env("HOME", "/root").env("LANG", "C.UTF-8").env("PATH", super::node::PATH);
            for (key, value) in std::env::vars().filter(|(k, _)| k == "TERM" || k.starts_with("RUST_")) {
                command.env(key, value);
            }
        }
        Ok(command)
    }

    /// Run a command in a node without input; what it wrote and its exit code.
    pub fn output(&self, node: &str, argv: &[&str]) -> Result<Output> {
        let (program, arguments) = argv.split_first().context("no command given")?;
        let mut command = self.command(node, program)?;
        command.args(arguments).stdin(Stdio::null());
        command.output().with_context(|| format!("running {program} in {node}"))
    }

    /// [`Self::output`] of a command that must succeed; its standard output.
    pub fn run(&self, node: &str, argv: &[&str]) -> Result<String> {
        let out = self.output(node, argv)?;
        if !out.status.success() {
            bail!(
                "`{}` in {node} failed ({}): {}{}",
                argv.join(" "),
                out.status,
                String::from_utf8_lossy(&out.stderr).trim_end(),
                String::from_utf8_lossy(&out.stdout).trim_end()
            );
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// A file of the node's disk (what survives its power cuts), seen from outside, e.g. `log-pacemaker/pacemaker.log`.
    pub fn disk_file(&self, node: &str, path: &str) -> Result<PathBuf> {
        Ok(disk_dir(net::node(node)?).join(path))
    }

    // ----------------------------------------------------------------------------------------------------- the cluster

    /// What the cluster thinks, asked in `node`.
    pub fn crm_mon(&self, node: &str) -> Result<CrmMon> {
        CrmMon::parse(&self.run(node, &["crm_mon", "-1", "--inactive", "--output-as=xml"])?)
    }

    /// What the cluster thinks, asked in any cluster node that answers.
    pub fn crm_mon_any(&self) -> Result<CrmMon> {
        let mut last = anyhow::anyhow!("no cluster node is on");
        let status = self.status()?;
        for node in cluster_nodes() {
            if status.nodes.get(node.name).is_some_and(|n| n.on && !n.frozen && n.cut.is_empty()) {
                match self.crm_mon(node.name) {
                    Ok(mon) => return Ok(mon),
                    Err(e) => last = e,
                }
            }
        }
        Err(last)
    }

    /// Wait until every one of `nodes` is online in the eyes of the others, with a coordinator elected and quorum.
    pub fn wait_online(&self, nodes: &[&str], bound: Duration) -> Result<()> {
        let observer = cluster_nodes().find(|n| nodes.contains(&n.name)).map_or("n1", |n| n.name);
        wait_until(&format!("{} online", nodes.join(", ")), bound, || {
            let mon = self.crm_mon(observer)?;
            Ok(mon.has_dc && mon.quorum && nodes.iter().all(|n| mon.online.iter().any(|o| o == n)))
        })
    }

    /// Wait until `resource` is Promoted on a node other than `not` (if given); that node.
    pub fn wait_promoted(&self, resource: &str, not: Option<&str>, bound: Duration) -> Result<String> {
        let elsewhere = not.map(|n| format!(" elsewhere than on {n}")).unwrap_or_default();
        wait_for(&format!("{resource} promoted{elsewhere}"), bound, || {
            let mon = self.crm_mon_any()?;
            Ok(mon.promoted(resource).find(|n| Some(*n) != not).map(String::from))
        })
    }

    /// Fencing and the board: what every test wants.
    fn configure_base(&self, options: &LabOptions) -> Result<()> {
        let on = "n1";
        let properties: String = [("stonith-enabled", "true"), ("stonith-action", "off"), ("dc-deadtime", "10s")]
            .iter()
            .map(|(name, value)| {
                format!(r#"<nvpair id="cib-bootstrap-options-{name}" name="{name}" value="{value}"/>"#)
            })
            .collect();
        let section = |scope: &str, create: bool, xml: &str| -> Result<()> {
            let how: &[&str] = if create { &["--create"] } else { &["--modify", "--allow-create"] };
            let argv = [&["cibadmin"], how, &["--scope", scope, "--xml-text", xml]].concat();
            self.run(on, &argv).map(drop)
        };
        section(
            "crm_config",
            false,
            &format!(
                r#"<crm_config><cluster_property_set id="cib-bootstrap-options">{properties}</cluster_property_set></crm_config>"#
            ),
        )?;
        let names: Vec<&str> = options.nodes().filter(|n| n.kind != Kind::Server).map(|n| n.name).collect();
        section(
            "resources",
            true,
            &format!(
                r#"<primitive id="fencing" class="stonith" type="fence_lab"><instance_attributes id="fencing-attrs">
                <nvpair id="fencing-list" name="pcmk_host_list" value="{}"/>
                <nvpair id="fencing-check" name="pcmk_host_check" value="static-list"/></instance_attributes>
                <operations><op id="fencing-monitor" name="monitor" interval="120s" timeout="60s"/></operations></primitive>"#,
                names.join(" ")
            ),
        )?;
        for board in options.nodes().filter(|n| n.kind == Kind::Board) {
            let (name, address) = (board.name, Plane::Management.address(board.host));
            section(
                "resources",
                true,
                &format!(
                    r#"<primitive id="{name}" class="ocf" provider="pacemaker" type="remote">
                    <instance_attributes id="{name}-attrs">
                    <nvpair id="{name}-server" name="server" value="{address}"/>
                    <nvpair id="{name}-reconnect" name="reconnect_interval" value="10s"/></instance_attributes>
                    <operations><op id="{name}-start" name="start" interval="0" timeout="120s"/>
                    <op id="{name}-monitor" name="monitor" interval="10s" timeout="60s"/></operations></primitive>"#
                ),
            )?;
        }
        Ok(())
    }
}

fn cluster_nodes() -> impl Iterator<Item = Node> {
    NODES.into_iter().filter(|n| n.kind == Kind::Cluster)
}

fn ask<R: DeserializeOwned>(request: &BmcRequest) -> Result<R, ControlError> {
    call_once(places::bmc_socket(), request, BMC_BOUND)
}

/// Directories, settings, the executables and one key for all nodes.
fn prepare_run_dir(settings: &Settings) -> Result<()> {
    let run = places::run_dir();
    if run.exists() {
        fs::remove_dir_all(&run).with_context(|| format!("deleting what an old lab left in {}", run.display()))?;
    }
    let bin = run.join("bin");
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(places::BMC_DIR)?;
    settings.store()?;
    // A copy of this moment: a build that runs at the same time must not change a node's executables.
    for entry in fs::read_dir(places::bin_dir()?).context("looking for this build's executables")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("understudy-") && !name.contains('.') && entry.file_type()?.is_file() {
            fs::copy(entry.path(), bin.join(&name)).with_context(|| format!("copying {name}"))?;
        }
    }
    let mut key = [0u8; 32];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut key)?;
    let key: String = key.iter().map(|b| format!("{b:02x}")).collect();
    for node in NODES {
        let etc = disk_dir(node).join("etc-understudy");
        fs::create_dir_all(&etc)?;
        let file = etc.join("key");
        fs::write(&file, format!("{key}\n"))?;
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    Ok(())
}

/// The daemon's standard input, of a lab that is tied to this program.
static LIFELINE: Mutex<Option<ChildStdin>> = Mutex::new(None);

fn start_daemon(tied: bool) -> Result<()> {
    let log = fs::File::create(places::run_dir().join("bmc.log")).context("creating the BMC's log")?;
    let mut command = Command::new(places::run_dir().join("bin/understudy-lab"));
    command.arg("bmc").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).current_dir("/");
    command.env(places::ENV_LAB_DIR, places::lab_dir()?);
    if tied {
        command.arg("--tied").stdin(Stdio::piped());
    }
    // A session's interrupt (Ctrl-C in `up`) is not the lab's end: it goes down when it is told to.
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().context("starting the lab's daemon")?;
    // Held until this program ends: its end, of whatever kind, closes the pipe.
    if let Ok(mut holder) = LIFELINE.lock() {
        *holder = child.stdin.take();
    }
    wait_until("the lab's daemon", Duration::from_secs(30), || {
        if let Some(status) = child.try_wait()? {
            let log = root::tail(&places::run_dir().join("bmc.log"), 10);
            bail!("it ended ({status}): {log}");
        }
        Ok(ask::<LabStatus>(&BmcRequest::Status).is_ok())
    })
}

/// Copy consoles and logs of all nodes to `out/NODE/`.
pub fn keep_logs() -> Result<()> {
    let out = places::out_dir()?;
    for node in NODES {
        let target = out.join(node.name);
        fs::create_dir_all(&target)?;
        let disk = disk_dir(node);
        let console = places::run_dir().join("nodes").join(node.name).join("console.log");
        let logs = [console, disk.join("log-corosync/corosync.log"), disk.join("log-pacemaker/pacemaker.log")];
        for log in logs.iter().filter(|l| l.exists()) {
            if let Some(name) = log.file_name() {
                fs::copy(log, target.join(Path::new(name))).with_context(|| format!("keeping {}", log.display()))?;
            }
        }
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------------------------------- crm_mon

/// The parts of `crm_mon --output-as=xml` that tests ask about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CrmMon {
    /// A designated coordinator exists.
    pub has_dc: bool,
    /// The partition has quorum.
    pub quorum: bool,
    /// Nodes that are online (remote ones too).
    pub online: Vec<String>,
    /// Instances of resources.
    pub resources: Vec<Instance>,
    /// `resource on node: task → text`, one for each failure that is recorded.
    pub failures: Vec<String>,
}

/// One instance of a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Resource id without the clone's instance number.
    pub id: String,
    /// `Started`, `Stopped`, `Promoted`, `Unpromoted`, …
    pub role: String,
    /// Nodes it is active on.
    pub nodes: Vec<String>,
    /// Its last operation failed.
    pub failed: bool,
}

impl CrmMon {
    /// Parse the document.
    pub fn parse(xml: &str) -> Result<Self> {
        let document = roxmltree::Document::parse(xml).context("reading crm_mon's XML")?;
        let mut mon = Self::default();
        for element in document.descendants().filter(roxmltree::Node::is_element) {
            let attribute = |name: &str| element.attribute(name).unwrap_or_default().to_string();
            let parent = element.parent().map(|p| p.tag_name().name().to_string()).unwrap_or_default();
            match (parent.as_str(), element.tag_name().name()) {
                ("summary", "current_dc") => {
                    mon.has_dc = attribute("present") == "true";
                    mon.quorum = attribute("with_quorum") == "true";
                }
                ("nodes", "node") if attribute("online") == "true" => mon.online.push(attribute("name")),
                (_, "resource") if !attribute("role").is_empty() => mon.resources.push(Instance {
                    id: attribute("id").split(':').next().unwrap_or_default().to_string(),
                    role: attribute("role"),
                    nodes: element.children().filter_map(|c| c.attribute("name")).map(String::from).collect(),
                    failed: attribute("failed") == "true",
                }),
                (_, "failure") => mon.failures.push(format!(
                    "{} on {}: {} {}",
                    attribute("op_key"),
                    attribute("node"),
                    attribute("exitstatus"),
                    attribute("exitreason")
                )),
                _ => {}
            }
        }
        Ok(mon)
    }

    /// Nodes on which `resource` is Promoted.
    pub fn promoted<'a>(&'a self, resource: &'a str) -> impl Iterator<Item = &'a str> {
        self.active(resource, "Promoted")
    }

    /// Nodes on which `resource` is active in `role`.
    pub fn active<'a>(&'a self, resource: &'a str, role: &'a str) -> impl Iterator<Item = &'a str> {
        let matching = self.resources.iter().filter(move |r| r.id == resource && r.role == role);
        matching.flat_map(|r| r.nodes.iter().map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crm_mons_document_tells_who_is_online_and_what_is_promoted_where() {
        let xml = r#"<pacemaker-result api-version="2.38"><summary>
            <current_dc present="true" name="n1" id="1" with_quorum="true"/></summary>
            <nodes><node name="n1" id="1" online="true"/><node name="n2" id="2" online="false"/></nodes>
            <resources><clone id="c"><resource id="s:0" role="Promoted" failed="false"><node name="n1" id="1"/></resource>
            <resource id="s" role="Stopped" failed="false"/></clone></resources>
            <failures><failure op_key="s_monitor_0" node="n2" exitstatus="error" exitreason="why"/></failures>
            </pacemaker-result>"#;
        let mon = CrmMon::parse(xml).unwrap();
        assert!(mon.has_dc && mon.quorum);
        assert_eq!(mon.online, ["n1"]);
        assert_eq!(mon.promoted("s").collect::<Vec<_>>(), ["n1"]);
        assert_eq!(mon.failures, ["s_monitor_0 on n2: error why"]);
    }
}
