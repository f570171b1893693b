//! `ocf:understudy:replicator`: sends checkpoints (Promoted) or receives them (Unpromoted).
//!
//! It depends on the vmm, never the other way round: whatever fails here is restarted alone, and the guest does not notice.

use std::path::PathBuf;
use std::time::Duration;

use ocf::action::{Action, ActionSpec, Role};
use ocf::parameter::{Declaration, Param, Parameters};
use ocf::{Agent, CheckLevel, Context, Description, ExitCode, Failure, Status};
use understudy_protocol::control::{ControlError, ReplicatorRequest, ReplicatorStatus, Role as Doing};
use understudy_protocol::key::DEFAULT_KEY_FILE;
use understudy_protocol::layout::Layout;

use crate::binaries;
use crate::cluster::Cluster;
use crate::pacemaker::Pacemaker;
use crate::paths::{self, NAME, RUN_ROOT, SHM_ROOT, absolute};
use crate::process::{Identity, remove, write_durably};
use crate::service::{Observed, Service, ask, check_key};

const PROGRAM: &str = "understudy-replicator";
/// Paths that a replicator takes at most.
const MAX_ADDRESSES: usize = 8;
/// Where the sender is follows from where the machine runs (colocation), so all instances are equally good.
const SCORE: i32 = 10;

/// Nodes.
pub static PEERS: Param<String> = Param::text("peers").required().check(peers).short("Address of every node").long(
    "One NODE=HOST:PORT for each node that may hold the machine, separated by blanks, e.g. \"n1=10.77.1.1:7790 \
         n2=10.77.1.2:7790\". The addresses should be in the storage network; this node listens on its own. A node may have several \
         addresses with commas between, NODE=HOST:PORT,HOST:PORT, best in networks that share no cable and no switch: replication goes on \
         while one of them works. Every node should have the same number.",
);
/// Key.
pub static KEY: Param<String> = Param::text("key")
    .default(DEFAULT_KEY_FILE)
    .check(absolute)
    .short("Key file")
    .long("File with the key that the nodes know each other by and encrypt with. The same on every node, readable by root only.");
/// Encryption.
pub static ENCRYPTION: Param<String> = Param::choice("encryption", &["on", "off"])
    .default("on")
    .short("Encrypt replication")
    .long(
        "Off only for a link between the nodes that nobody else can reach: both still prove that they hold the key, but the machine's \
         memory travels in clear, and whoever can change the link's bytes can change it. The same on every node.",
    );
/// Epoch length.
pub static INTERVAL_MS: Param<u64> = Param::integer("interval_ms", 1, 60_000)
    .default("25")
    .short("Checkpoint interval (ms)")
    .long("Time from checkpoint to checkpoint. Outputs of the machine wait for about this long; shorter costs more.");
/// Shortest epoch.
pub static MIN_INTERVAL_MS: Param<u64> = Param::integer("min_interval_ms", 0, 60_000)
    .default("1")
    .short("Shortest checkpoint interval (ms)")
    .long("Time from checkpoint to checkpoint at least, when the machine waits to say something and does not want to wait for the interval's end.");
/// Epochs in flight.
pub static PIPELINE: Param<u64> = Param::integer("pipeline", 1, 8)
    .default("2")
    .short("Checkpoints in flight")
    .long("Checkpoints that may be on their way to the standby at once, so that a slow acknowledgement does not delay the next.");
/// What to do with a slow standby.
pub static SLOW_LINK: Param<String> = Param::choice("slow_link", &["stall", "throttle", "solo"])
    .default("throttle")
    .short("When the standby is too slow")
    .long(
        "What happens when a checkpoint takes longer than max_lag_ms to be committed. stall: outputs wait. throttle: the guest is slowed \
         down, to a tenth of its speed at the most. solo: the machine goes on unprotected, after the veto, until the standby keeps up.",
    );
/// How slow is too slow.
pub static MAX_LAG_MS: Param<u64> = Param::integer("max_lag_ms", 10, 60_000)
    .default("500")
    .short("Longest commit (ms)")
    .long("Time from a checkpoint to its commit that is too long; see slow_link.");
/// Silence.
pub static PEER_TIMEOUT_MS: Param<u64> = Param::integer("peer_timeout_ms", 100, 60_000)
    .default("2000")
    .short("Peer timeout (ms)")
    .long(
        "Silence after which the standby counts as lost. Then the machine's outputs wait until the standby's promotion is vetoed \
         in the cluster, and it goes on unprotected.",
    );
/// Stage.
pub static STAGE_LIMIT: Param<u64> = Param::integer("stage_limit", 1, 1 << 20)
    .short("Largest checkpoint (MiB)")
    .long("Most MiB that one checkpoint may take on the standby while it arrives. Not set: chosen by the replicator.");
/// How often the memories are compared.
pub static VERIFY_EVERY: Param<u64> = Param::integer("verify_every", 0, 31_536_000)
    .default("86400")
    .short("Comparison of memories (s)")
    .long(
        "Seconds from one comparison of all of the machine's memory with the standby's to the next, while the machine runs; 0: only on \
         request. A difference costs the standby's image, which is copied again.",
    );
/// Whose score.
pub static VMM_RESOURCE: Param<String> = Param::text("vmm_resource").short("The vmm's primitive").long(
    "Name of the primitive of type ocf:understudy:vmm that runs the machine: its promotion scores are kept by this resource. Not \
     set: found in the configuration by the machine's name.",
);
/// Hook.
pub static HOOK: Param<String> = Param::text("hook").short("Hook").long(
    "Command that is called for what only the cluster can do (veto, clear-veto, replica-state). Not set: this agent's own, which \
     is what everybody wants. none: nothing is called, and a machine that loses its standby goes on although the standby \
     may be promoted too; for trials only.",
);

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Replicator;

pub(crate) fn peers(value: &str) -> Result<(), String> {
    let wrong = |entry: &str| format!("has \"{entry}\", which is not NODE=HOST:PORT or NODE=HOST:PORT,HOST:PORT");
    if value.split_whitespace().next().is_none() {
        return Err("names no node".into());
    }
    for entry in value.split_whitespace() {
        let (node, list) = entry.split_once('=').ok_or_else(|| wrong(entry))?;
        let addresses: Vec<&str> = list.split(',').collect();
        for (i, address) in addresses.iter().enumerate() {
            let (host, port) = address.rsplit_once(':').ok_or_else(|| wrong(entry))?;
            if node.is_empty() || host.is_empty() || !port.parse::<u16>().is_ok_and(|p| p > 0) {
                return Err(wrong(entry));
            }
            if addresses[..i].contains(address) {
                return Err(format!(
                    "names {address} twice for node {node}: two paths through one address are lost together"
                ));
            }
        }
        if addresses.len() > MAX_ADDRESSES {
            return Err(format!("has {} addresses for node {node}; {MAX_ADDRESSES} are the most", addresses.len()));
        }
    }
    Ok(())
}

fn declarations() -> Vec<&'static Declaration> {
    vec![
        NAME.declaration(),
        PEERS.declaration(),
        KEY.declaration(),
        INTERVAL_MS.declaration(),
        MIN_INTERVAL_MS.declaration(),
        PIPELINE.declaration(),
        ENCRYPTION.declaration(),
        SLOW_LINK.declaration(),
        MAX_LAG_MS.declaration(),
        PEER_TIMEOUT_MS.declaration(),
        STAGE_LIMIT.declaration(),
        VERIFY_EVERY.declaration(),
        VMM_RESOURCE.declaration(),
        HOOK.declaration(),
        RUN_ROOT.declaration(),
        SHM_ROOT.declaration(),
    ]
}

/// Arguments of `understudy-replicator` on `node`.
fn command_line(p: &Parameters, node: &str, own_hook: Option<String>) -> ocf::Result<Vec<String>> {
    let mut line: Vec<String> = vec!["run".into()];
    let mut option = |name: &str, value: String| line.extend([format!("--{name}"), value]);
    option("machine", p.get(&NAME)?);
    option("node", node.to_owned());
    let peers = p.get(&PEERS)?;
    if !peers.split_whitespace().any(|e| e.split_once('=').is_some_and(|(n, _)| n == node)) {
        return Err(Failure::arguments(format!("parameter peers has no address for this node ({node})")));
    }
    option("peers", peers);
    option("key", p.get(&KEY)?);
    option("interval-ms", p.get(&INTERVAL_MS)?.to_string());
    option("min-interval-ms", p.get(&MIN_INTERVAL_MS)?.to_string());
    option("pipeline", p.get(&PIPELINE)?.to_string());
    option("encryption", p.get(&ENCRYPTION)?);
    option("slow-link", p.get(&SLOW_LINK)?);
    option("max-lag-ms", p.get(&MAX_LAG_MS)?.to_string());
    option("peer-timeout-ms", p.get(&PEER_TIMEOUT_MS)?.to_string());
    option("verify-every", p.get(&VERIFY_EVERY)?.to_string());
    option("run-root", p.get(&RUN_ROOT)?);
    option("shm-root", p.get(&SHM_ROOT)?);
    if let Some(mib) = p.find(&STAGE_LIMIT)? {
        option("stage-limit-mib", mib.to_string());
    }
    match p.find(&HOOK)?.or(own_hook) {
        Some(hook) if hook == "none" => line.push("--no-cluster".into()),
        Some(hook) => option("hook", hook),
        None => {}
    }
    Ok(line)
}

struct Instance<'a> {
    context: &'a Context,
    name: String,
    layout: Layout,
    service: Service,
}

impl<'a> Instance<'a> {
    fn new(context: &'a Context) -> ocf::Result<Self> {
        let (name, layout) = paths::layout(&context.parameters)?;
        let identity = Identity {
            pid_file: layout.replicator_pid(),
            socket: layout.replicator_socket(),
            program: PROGRAM,
            words: vec![name.clone()],
        };
        let service = Service { identity, log: layout.replicator_log() };
        Ok(Self { context, name, layout, service })
    }

    fn status(&self, patience: Duration) -> Result<ReplicatorStatus, ControlError> {
        ask(&self.layout.replicator_socket(), &ReplicatorRequest::Status, patience)
    }

    fn observe(&self, limit: Duration) -> Observed<ReplicatorStatus> {
        self.service.observe(|patience| self.status(patience), self.context.deadline.within(limit))
    }

    /// "This one was promoted", kept until demote or stop.
    fn mark(&self) -> PathBuf {
        self.layout.run_dir().join("replicator.promoted")
    }

    fn unmark(&self) {
        if let Err(e) = remove(&self.mark()) {
            self.context.log.warning(format!("cannot remove the mark of the promoted role: {e}"));
        }
    }

    fn end(&self) -> ocf::Result {
        self.service.end(self.context, |patience| {
            ask::<_, ()>(&self.layout.replicator_socket(), &ReplicatorRequest::Quit, patience)
        })
    }

    fn set_score(&self, score: Option<i32>) {
        let environment = &self.context.environment;
        let deadline = self.context.deadline.within(Duration::from_secs(2));
        if let Err(e) = Pacemaker::new(environment).set_score(environment.resource(), score, deadline) {
            self.context.log.debug(format!("the promotion score stays as it was: {e}"));
        }
    }

    fn launch(&self) -> ocf::Result {
        let environment = &self.context.environment;
        let program = binaries::locate(environment, PROGRAM)?;
        let arguments = command_line(&self.context.parameters, &environment.node(), self.own_hook()?)?;
        self.service.launch(self.context, &program, &arguments, |patience| self.status(patience).map(drop))
    }

    /// The hook of this very executable. Only where there is a cluster to ask: under `ocf-tester` a veto could never be had.
    fn own_hook(&self) -> ocf::Result<Option<String>> {
        if !self.context.environment.under_pacemaker() {
            return Ok(None);
        }
        let me = std::env::current_exe()
            .map_err(|e| Failure::generic(format!("cannot tell where understudy-ocf is: {e}")))?;
        let run_root = self.context.parameters.get(&RUN_ROOT)?;
        let node = self.context.environment.node();
        let mut hook = format!("{} hook --run-root {run_root} --node {node}", me.display());
        if let Some(resource) = self.context.parameters.find(&VMM_RESOURCE)? {
            hook += &format!(" --vmm-resource {resource}");
        }
        Ok(Some(hook))
    }

    fn silent(&self, pid: i32, why: &str) -> Failure {
        let code = if self.mark().exists() { ExitCode::FailedPromoted } else { ExitCode::Generic };
        Failure::new(code, format!("the replicator of {} (process {pid}) lives and does not answer: {why}", self.name))
    }

    /// Ask for a change of role of a running replicator.
    fn change(&self, request: &ReplicatorRequest) -> ocf::Result {
        let doing = if *request == ReplicatorRequest::Promote { "promoted" } else { "demoted" };
        let patience = self.context.deadline.remaining().max(Duration::from_millis(500));
        ask::<_, ()>(&self.layout.replicator_socket(), request, patience)
            .map_err(|e| Failure::generic(format!("the replicator of {} could not be {doing}: {e}", self.name)))
    }
}

const LONG: &str = "\
Keeps a standby's image of a virtual machine up to date: the promoted instance sends checkpoints of the machine that \
ocf:understudy:vmm runs on its node, the others receive them. It also keeps the promotion score of the vmm: a node that holds no \
or an outdated image is not promoted.

Configure it as a clone with promotable=true promoted-max=1 clone-node-max=1 interleave=true, its Promoted role colocated with \
that of the vmm and ordered after it (promote vmm, then promote replicator; demote vmm, then demote replicator). Never the other way round: this \
resource may fail and be restarted while the machine runs on.";

impl Agent for Replicator {
    fn description(&self) -> Description {
        Description {
            name: "replicator",
            version: env!("CARGO_PKG_VERSION"),
            short: "Replicates a virtual machine to its standby",
            long: LONG,
            parameters: declarations(),
            actions: vec![
                ActionSpec::new(Action::Start, "20s"),
                ActionSpec::new(Action::Stop, "20s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s").in_role(Role::Promoted),
                ActionSpec::new(Action::Monitor, "20s").every("11s").in_role(Role::Unpromoted),
                ActionSpec::new(Action::Promote, "20s"),
                ActionSpec::new(Action::Demote, "20s"),
                ActionSpec::new(Action::Notify, "10s"),
            ],
        }
    }

    fn validate(&self, context: &Context, level: CheckLevel) -> ocf::Result {
        if level == CheckLevel::Parameters {
            return Ok(());
        }
        binaries::locate(&context.environment, PROGRAM)?;
        check_key(&context.parameters.get(&KEY)?, "this node")
    }

    fn start(&self, context: &Context) -> ocf::Result {
        let instance = Instance::new(context)?;
        match instance.observe(Duration::from_secs(5)) {
            Observed::Answers(_) => context.log.info(format!("the replicator of {} runs already", instance.name)),
            Observed::Silent(process, why) => {
                context
                    .log
                    .warning(format!("replacing replicator process {}, which does not answer: {why}", process.pid()));
                instance.end()?;
                instance.launch()?;
            }
            Observed::Gone => {
                instance.unmark();
                instance.launch()?;
            }
        }
        instance.set_score(Some(SCORE));
        Ok(())
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        let instance = match Instance::new(context) {
            Ok(instance) => instance,
            Err(failure) => {
                context.log.warning(format!("nothing to stop: {failure}"));
                return Ok(());
            }
        };
        instance.end()?;
        instance.unmark();
        instance.set_score(None);
        Ok(())
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        let instance = Instance::new(context)?;
        match instance.observe(context.deadline.remaining()) {
            Observed::Answers(status) => {
                Ok(if status.role == Doing::Sender { Status::RunningPromoted } else { Status::Running })
            }
            Observed::Silent(process, why) => Err(instance.silent(process.pid(), &why)),
            Observed::Gone if instance.mark().exists() => Err(Failure::new(
                ExitCode::FailedPromoted,
                format!("the sending replicator of {} has crashed", instance.name),
            )),
            Observed::Gone if context.is_probe() => {
                binaries::locate(&context.environment, PROGRAM)?;
                Ok(Status::NotRunning)
            }
            Observed::Gone if instance.service.identity.recorded() => {
                Err(Failure::generic(format!("the receiving replicator of {} has crashed", instance.name)))
            }
            Observed::Gone => Ok(Status::NotRunning),
        }
    }

    fn promote(&self, context: &Context) -> ocf::Result {
        let instance = Instance::new(context)?;
        match instance.observe(Duration::from_secs(5)) {
            Observed::Answers(status) if status.role == Doing::Sender => {}
            Observed::Answers(_) => {
                instance.change(&ReplicatorRequest::Promote)?;
                context.log.info(format!("the replicator of {} sends", instance.name));
            }
            Observed::Silent(process, why) => return Err(instance.silent(process.pid(), &why)),
            Observed::Gone => {
                let reason = format!("the replicator of {} does not run here; it must be started first", instance.name);
                return Err(Failure::new(ExitCode::NotRunning, reason));
            }
        }
        let mark = instance.mark();
        write_durably(&mark, "").map_err(|e| Failure::generic(format!("cannot write {}: {e}", mark.display())))
    }

    fn demote(&self, context: &Context) -> ocf::Result {
        let instance = Instance::new(context)?;
        match instance.observe(Duration::from_secs(5)) {
            Observed::Answers(status) if status.role == Doing::Receiver => {}
            Observed::Answers(_) => {
                if let Err(failure) = instance.change(&ReplicatorRequest::Demote) {
                    context.log.warning(format!("{failure}; it is started afresh"));
                    instance.end()?;
                    instance.launch()?;
                }
            }
            Observed::Silent(process, why) => {
                context.log.warning(format!(
                    "replicator process {} does not answer ({why}); it is started afresh",
                    process.pid()
                ));
                instance.end()?;
                instance.launch()?;
            }
            Observed::Gone => {
                context.log.info("the replicator has gone; it is started afresh, as a receiver");
                instance.launch()?;
            }
        }
        instance.unmark();
        instance.set_score(Some(SCORE));
        Ok(())
    }

    fn notify(&self, _context: &Context) -> ocf::Result {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ocf::Environment;

    fn parameters(pairs: &[(&str, &str)]) -> Parameters {
        Parameters::new(Environment::from_pairs(pairs.iter().map(|(k, v)| (format!("OCF_RESKEY_{k}"), *v))))
    }

    #[test]
    fn a_node_that_is_not_among_the_peers_cannot_take_part() {
        let p = parameters(&[("name", "m1"), ("peers", "n1=10.0.0.1:7790 n2=10.0.0.2:7790")]);
        let line = command_line(&p, "n2", Some("x hook".into())).unwrap();
        assert!(line.contains(&"n1=10.0.0.1:7790 n2=10.0.0.2:7790".to_owned()), "{line:?}");
        assert_eq!(line[line.len() - 2..], ["--hook", "x hook"]);
        assert_eq!(command_line(&p, "n3", None).unwrap_err().code, ExitCode::Arguments);
    }

    #[test]
    fn without_a_hook_there_is_no_cluster_only_if_somebody_said_so() {
        let pairs = [("name", "m1"), ("peers", "n1=h:1")];
        let line = command_line(&parameters(&pairs), "n1", None).unwrap().join(" ");
        assert!(!line.contains("--no-cluster") && !line.contains("--hook"), "{line}");
        let none = [pairs[0], pairs[1], ("hook", "none")];
        assert!(
            command_line(&parameters(&none), "n1", Some("own".into())).unwrap().contains(&"--no-cluster".to_owned())
        );
    }

    #[test]
    fn addresses_are_checked_before_anything_is_started() {
        assert!(peers("n1=10.0.0.1:7790").is_ok());
        assert!(peers("n1=10.0.0.1:7790,10.0.1.1:7790 n2=10.0.0.2:7790,10.0.1.2:7790").is_ok());
        assert!(peers("n1=a:1,b:1,c:1,d:1,e:1,f:1,g:1,h:1,i:1").is_err(), "nine");
        assert!(peers("n1=a:1,a:1").unwrap_err().contains("lost together"));
        for bad in ["n1=10.0.0.1:7790,", "n1=,10.0.0.1:7790", "n1=10.0.0.1:7790,10.0.1.1"] {
            assert!(peers(bad).is_err(), "{bad:?}");
        }
        for bad in ["", " ", "n1", "n1=10.0.0.1", "n1=:7790", "=h:1", "n1=h:0", "n1=h:x", "n1=h:1 n2"] {
            assert!(peers(bad).is_err(), "{bad:?}");
        }
    }
}
