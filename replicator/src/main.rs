//! `understudy-replicator`: the process of one machine on one node, and its commands for people.
#![forbid(unsafe_code)]

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use understudy_protocol::control::{
    HandedOver, ReplicatorRequest, ReplicatorStatus, TakenOver, VerifyStarted, call_once,
};
use understudy_protocol::ids::Generation;
use understudy_protocol::key::{DEFAULT_KEY_FILE, Key};
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, DEFAULT_SHM_ROOT, Layout, valid_machine_name};
use understudy_replicator::codec::EncodingConfig;
use understudy_replicator::codec::method::Method;
use understudy_replicator::codec::writer::{Compression, ShadowBudget};
use understudy_replicator::drill::{self, Drill};
use understudy_replicator::hook::{Arm, MigrationHook};
use understudy_replicator::incoming::{self, Incoming};
use understudy_replicator::link::{self, Encryption};
use understudy_replicator::migrate::{self, Migrate};
use understudy_replicator::process::{Config, Replicator, discard_offline, take_over_handed_over, take_over_offline};
use understudy_replicator::report::{Sample, metrics, text, top};
use understudy_replicator::sender::{MigrationPolicy, SlowLink, SlowPolicy};

/// Keeps a whole image of a machine on another node: epochs out on the primary, commit and take-over on the standby.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run in the foreground, as receiver until it is promoted.
    Run(Run),
    /// Show what the replicator does.
    Status {
        #[command(flatten)]
        place: Place,
        /// As one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Watch what the replicator does: a live view on a terminal (q ends it), one line a sample elsewhere.
    Top {
        #[command(flatten)]
        place: Place,
        /// Milliseconds from one sample to the next.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
        interval_ms: u64,
        /// End after so many samples.
        #[arg(long)]
        count: Option<u64>,
    },
    /// Print measurements in Prometheus' text format, e.g. for node_exporter's textfile collector.
    Metrics {
        #[command(flatten)]
        place: Place,
        /// Do not print, but answer `GET /metrics` on this address (HOST:PORT) until ended. Who can reach it can read it.
        #[arg(long)]
        listen: Option<String>,
    },
    /// Compare all of RAM (or the mirrored disks) with the standby's while the guest runs (asked of the sender). Exit status 1 with --wait: it differs.
    Verify {
        #[command(flatten)]
        place: Place,
        /// Wait for the result and print it.
        #[arg(long)]
        wait: bool,
        /// Compare the mirrored disks with their copies instead.
        #[arg(long)]
        disks: bool,
    },
    /// Try the image on this node out: resume a copy of it, connected to nothing, watch it, throw it away. Protection goes on
    /// meanwhile. Exit status 0: its guest lives; 1: it does not, or the drill could not be held.
    Drill {
        #[command(flatten)]
        place: Place,
        /// How long the guest is watched.
        #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
        seconds: u64,
        /// The result as one JSON object.
        #[arg(long)]
        json: bool,
        /// understudy-vmm [default: beside this program, or in PATH].
        #[arg(long, value_name = "FILE")]
        vmm: Option<PathBuf>,
    },
    /// Become the sender: protect the machine that runs on this node.
    Promote(Place),
    /// Become a receiver again.
    Demote(Place),
    /// Take and commit the last checkpoint; the machine stays stopped here, the standby may run it.
    HandOver(Place),
    /// Make the image on this node whole for a machine of a new generation.
    TakeOver {
        #[command(flatten)]
        place: Place,
        /// Generation of the machine that will run here; higher than any before.
        #[arg(long)]
        generation: u64,
        /// No replicator process runs: work on its files (under its lock).
        #[arg(long)]
        offline: bool,
        /// At the end of a migration: only an image that the machine's old node has handed over.
        #[arg(long, requires = "offline")]
        handed_over: bool,
    },
    /// Bring a machine that runs here, and that nobody protects, to another node while it runs. Exit status 0: it was handed over
    /// there, where `take-over --offline --handed-over` makes it ready to run; 1: it was not, and runs on here.
    ///
    /// SIGTERM cancels. The target's node must run `serve-migrations`.
    Migrate(MigrateArgs),
    /// Receive machines that are migrated to this node, in the foreground.
    ServeMigrations(ServeMigrations),
    /// Give the image on this node up (no replicator may run): the machine can only be booted cold here afterwards.
    Discard(Place),
    /// End the process.
    Quit(Place),
    /// Make a key file for all nodes and boards of the cluster.
    Keygen {
        /// The file to create.
        #[arg(default_value = DEFAULT_KEY_FILE)]
        file: PathBuf,
    },
}

#[derive(Args)]
struct Place {
    /// Name of the machine.
    #[arg(long)]
    machine: String,
    /// Parent of the machines' run directories.
    #[arg(long, default_value = DEFAULT_RUN_ROOT)]
    run_root: PathBuf,
    /// Parent of the machines' shared-memory directories (a tmpfs).
    #[arg(long, default_value = DEFAULT_SHM_ROOT)]
    shm_root: PathBuf,
}

#[derive(Args)]
struct Run {
    #[command(flatten)]
    place: Place,
    /// Name of this node, as in --peers.
    #[arg(long)]
    node: String,
    /// All nodes that may hold the machine, this one too: "n1=10.0.0.1:7790 n2=10.0.0.2:7790". A node with several addresses, with
    /// commas between, best in networks that share nothing, is reached over all of them at once: replication survives the
    /// loss of all paths but one, "n1=10.0.0.1:7790,10.0.1.1:7790 n2=10.0.0.2:7790,10.0.1.2:7790".
    #[arg(long)]
    peers: String,
    /// File with the cluster's key.
    #[arg(long, default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
    /// Encrypt what is replicated. Off only for a link that nobody else can reach: both nodes still prove that they hold the key, but
    /// memory travels in clear, and whoever can change the link's bytes can change it. The same on all nodes.
    #[arg(long, value_enum, default_value_t = Encryption::On)]
    encryption: Encryption,
    /// Milliseconds from one checkpoint to the next. 0: one after the other, for trials.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    interval_ms: u64,
    /// Milliseconds from one checkpoint to the next at least, when the machine waits to say something: its outputs leave when the
    /// checkpoint that holds them is committed, and are not left waiting for the interval's end. 0: as often as can be.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    min_interval_ms: u64,
    /// Checkpoints that may be on their way at once, so that a slow acknowledgement does not delay the next.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=8))]
    pipeline: u64,
    /// What to do when a checkpoint takes longer than --max-lag-ms to be committed: let outputs wait (stall), slow the guest down as
    /// far as a tenth of its speed (throttle), or go on without this standby after a veto (solo).
    #[arg(long, value_enum, default_value_t = SlowPolicy::Throttle)]
    slow_link: SlowPolicy,
    /// Milliseconds from a cut to its commit that are too long.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    max_lag_ms: u64,
    /// Milliseconds of silence after which the other side counts as lost.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    peer_timeout_ms: u64,
    /// Command that makes vetoes durable and sets scores, with its first arguments, separated by blanks.
    #[arg(long)]
    hook: Option<String>,
    /// There is no cluster: run unprotected without a durable record when the standby is lost. For trials by hand.
    #[arg(long, conflicts_with = "hook")]
    no_cluster: bool,
    /// Most MiB that one epoch may take on this node while it arrives.
    #[arg(long)]
    stage_limit_mib: Option<u64>,
    /// Memory of the sender for copies of pages that were sent, as a percentage of the machine's RAM: pages that are written
    /// again are then sent as what changed in them. 0 = no copies.
    #[arg(long, default_value_t = 25, value_parser = clap::value_parser!(u8).range(0..=100))]
    shadow_percent: u8,
    /// The same in MiB, instead of a percentage.
    #[arg(long, conflicts_with = "shadow_percent")]
    shadow_mib: Option<u64>,
    /// How what is sent is compressed: auto (only when the link is slower than the compression), none, lz4, zstd.
    #[arg(long, default_value = "auto", value_parser = parse_compression)]
    compression: Compression,
    /// Seconds from one comparison of all RAM with the standby's to the next (0 = only on request). Once a day finds damage long before
    /// most takeovers and costs next to nothing: the RAM is read once on both nodes, 2 MiB an epoch.
    #[arg(long, default_value_t = 86_400)]
    verify_every: u64,
}

#[derive(Args)]
struct MigrateArgs {
    #[command(flatten)]
    place: Place,
    /// Name of this node, for the target's log.
    #[arg(long)]
    node: String,
    /// The target, e.g. n2=10.0.0.2:7799, or all of its addresses with commas between.
    #[arg(long, value_name = "NODE=HOST:PORT[,HOST:PORT...]")]
    to: String,
    /// File with the cluster's key.
    #[arg(long, default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
    /// Milliseconds for which the last copy may stop the machine. The target's start comes on top.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    max_pause_ms: u64,
    /// Rounds after which a machine that writes faster than its memory can be sent stays here.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_rounds: u32,
    /// Milliseconds of silence after which the target counts as lost.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    peer_timeout_ms: u64,
    /// How what is sent is compressed: auto (only when the link is slower than the compression), none, lz4, zstd.
    #[arg(long, default_value = "auto", value_parser = parse_compression)]
    compression: Compression,
    /// Progress as JSON, one object a line.
    #[arg(long)]
    json: bool,
    /// Cancel when standard input is closed: whoever starts this, and ends, takes it along.
    #[arg(long)]
    until_stdin_closes: bool,
}

#[derive(Args)]
struct ServeMigrations {
    /// Name of this node.
    #[arg(long)]
    node: String,
    /// Address to listen on, or several with commas between.
    #[arg(long, value_name = "HOST:PORT[,HOST:PORT...]")]
    listen: String,
    /// File with the cluster's key.
    #[arg(long, default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
    /// Command that makes a machine's VMM stand by and ends it again, with its first arguments, separated by blanks.
    #[arg(long)]
    hook: String,
    /// Milliseconds of silence after which a sender counts as lost.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u64).range(100..=60_000))]
    peer_timeout_ms: u64,
    /// Most MiB that a machine's last copy may take on this node while it arrives.
    #[arg(long)]
    stage_limit_mib: Option<u64>,
    /// Parent of the machines' run directories.
    #[arg(long, default_value = DEFAULT_RUN_ROOT)]
    run_root: PathBuf,
    /// Parent of the machines' shared-memory directories (a tmpfs).
    #[arg(long, default_value = DEFAULT_SHM_ROOT)]
    shm_root: PathBuf,
}

impl Place {
    fn layout(&self) -> anyhow::Result<Layout> {
        if !valid_machine_name(&self.machine) {
            bail!(
                "{:?} cannot be a machine's name: 1 to 63 of a-z A-Z 0-9 - _, beginning with a letter or digit",
                self.machine
            );
        }
        Ok(Layout::new(&self.run_root, &self.shm_root, &self.machine))
    }

    fn call<R: serde::de::DeserializeOwned>(
        &self,
        request: &ReplicatorRequest,
        timeout: Duration,
    ) -> anyhow::Result<R> {
        Ok(call_once(self.layout()?.replicator_socket(), request, timeout)?)
    }
}

const SHORT: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(70);
/// The process that received a machine may still wait for a sender whose last word was lost.
const RECEIVED: Duration = Duration::from_secs(25);

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("understudy-replicator: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Run(run) => serve(run),
        Command::Status { place, json } => {
            let sample = Sample::take(&place.layout()?);
            let status = sample.replicator.map_err(anyhow::Error::msg)?;
            if json {
                println!("{}", serde_json::to_string_pretty(&status)?);
            } else {
                print!("{}", text::status(&status, sample.vmm.ok().as_ref()));
            }
            Ok(())
        }
        Command::Top { place, interval_ms, count } => {
            let interval = Duration::from_millis(interval_ms);
            top::watch(&place.layout()?, interval, count).context("cannot show the live view")
        }
        Command::Drill { place, seconds, json, vmm } => hold_drill(&place, Duration::from_secs(seconds), json, vmm),
        Command::Verify { place, wait, disks: false } => verify(&place, wait),
        Command::Verify { place, wait, disks: true } => verify_disks(&place, wait),
        Command::Metrics { place, listen } => publish(&place, listen.as_deref()),
        Command::Promote(place) => place.call(&ReplicatorRequest::Promote, SHORT),
        Command::Demote(place) => place.call(&ReplicatorRequest::Demote, LONG),
        Command::HandOver(place) => {
            let done: HandedOver = place.call(&ReplicatorRequest::HandOver, LONG)?;
            println!("handed over at epoch {}", done.epoch);
            Ok(())
        }
        Command::Migrate(args) => migrate(args),
        Command::ServeMigrations(args) => serve_migrations(args),
        Command::TakeOver { place, generation, offline, handed_over } => {
            let generation = Generation(generation);
            let taken: TakenOver = if handed_over {
                take_over_handed_over(&place.layout()?, &place.machine, generation, RECEIVED)
                    .map_err(anyhow::Error::msg)?
            } else if offline {
                take_over_offline(&place.layout()?, &place.machine, generation).map_err(anyhow::Error::msg)?
            } else {
                place.call(&ReplicatorRequest::TakeOver { generation }, LONG)?
            };
            println!("{}", serde_json::to_string(&taken)?);
            Ok(())
        }
        Command::Discard(place) => discard_offline(&place.layout()?, &place.machine).map_err(anyhow::Error::msg),
        Command::Quit(place) => place.call(&ReplicatorRequest::Quit, SHORT),
        Command::Keygen { file } => {
            Key::generate(&file)?;
            println!("{} holds a new key: copy it to every node and board of the cluster", file.display());
            Ok(())
        }
    }
}

fn hold_drill(place: &Place, watch: Duration, json: bool, vmm: Option<PathBuf>) -> anyhow::Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The default action would leave the copy behind.
        signal_hook::flag::register(signal, stop.clone()).context("cannot wait for signals")?;
    }
    let vmm = vmm.unwrap_or_else(|| {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("understudy-vmm")));
        beside.filter(|path| path.exists()).unwrap_or_else(|| "understudy-vmm".into())
    });
    let drill = Drill {
        machine: &place.machine,
        layout: place.layout()?,
        shm_root: place.shm_root.clone(),
        vmm,
        watch,
        stop: &stop,
    };
    let report = drill::hold(&drill).map_err(anyhow::Error::msg)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.text());
    }
    if !report.alive {
        bail!("the machine could not have continued from this image");
    }
    Ok(())
}

fn verify(place: &Place, wait: bool) -> anyhow::Result<()> {
    let VerifyStarted { pass } = place.call(&ReplicatorRequest::Verify, LONG)?;
    if !wait {
        println!("verify {pass} has begun; see the status");
        return Ok(());
    }
    let mut told = None;
    loop {
        let status: ReplicatorStatus = place.call(&ReplicatorRequest::Status, LONG)?;
        let verify = &status.verify;
        if verify.pass < pass {
            bail!("the sender that compared has ended before verify {pass} was finished");
        }
        if verify.pass > pass || !verify.running {
            if verify.pass == pass && !verify.last.contains(" FAILED: ") {
                println!("{}", verify.last);
                return Ok(());
            }
            bail!(
                "{}",
                if verify.pass == pass { &verify.last } else { "another pass has begun meanwhile; see the log" }
            );
        }
        let waiting = !status.protected;
        if told.replace(waiting) != Some(waiting) && waiting {
            eprintln!("there is no whole standby to compare with yet ({}); waiting", status.note);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn verify_disks(place: &Place, wait: bool) -> anyhow::Result<()> {
    let VerifyStarted { pass } = place.call(&ReplicatorRequest::VerifyDisks, LONG)?;
    if !wait {
        println!("disk verify {pass} has begun; see the status");
        return Ok(());
    }
    let mut shown = Instant::now();
    loop {
        let status: ReplicatorStatus = place.call(&ReplicatorRequest::Status, LONG)?;
        let verify = &status.disk_verify;
        if verify.pass != pass {
            bail!("the sender that compared has ended before disk verify {pass} was finished");
        }
        if !verify.running {
            if verify.last.contains(" FAILED: ") {
                bail!("{}", verify.last);
            }
            println!("{}", verify.last);
            return Ok(());
        }
        if shown.elapsed() > Duration::from_secs(2) {
            shown = Instant::now();
            eprintln!("{} of {} MiB compared", verify.done_bytes >> 20, verify.total_bytes >> 20);
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn publish(place: &Place, listen: Option<&str>) -> anyhow::Result<()> {
    let layout = place.layout()?;
    match listen {
        Some(address) => {
            let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
            metrics::serve(&listener, &place.machine, &layout).context("cannot accept connections any more")
        }
        None => {
            print!("{}", metrics::exposition(&place.machine, &Sample::take(&layout)));
            Ok(())
        }
    }
}

fn serve(run: Run) -> anyhow::Result<()> {
    let peers = parse_peers(&run.peers)?;
    let key = Arc::new(Key::load(&run.key)?);
    let arm = match (&run.hook, run.no_cluster) {
        (Some(hook), _) => Arm::Command(hook.split_whitespace().map(str::to_owned).collect()),
        (None, true) => Arm::NoCluster,
        (None, false) => Arm::Nothing,
    };
    if arm == Arm::Command(Vec::new()) {
        bail!("--hook is empty");
    }
    // Before any thread starts, so that no signal is missed.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot wait for signals")?;
    let replicator = Replicator::start(Config {
        layout: run.place.layout()?,
        machine: run.place.machine,
        node: run.node,
        peers,
        key,
        encryption: run.encryption,
        interval: Duration::from_millis(run.interval_ms),
        min_interval: Duration::from_millis(run.min_interval_ms),
        pipeline: run.pipeline as usize,
        slow: SlowLink { policy: run.slow_link, max_lag: Duration::from_millis(run.max_lag_ms) },
        peer_timeout: Duration::from_millis(run.peer_timeout_ms),
        arm,
        encoding: EncodingConfig {
            shadow: run.shadow_mib.map_or(ShadowBudget::Percent(run.shadow_percent), ShadowBudget::Mib),
            compression: run.compression,
        },
        stage_limit: run.stage_limit_mib.map(|mib| mib << 20),
        verify_every: Duration::from_secs(run.verify_every),
    })?;
    let stop = replicator.stopper();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            stop();
        }
    });
    replicator.wait();
    Ok(())
}

fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let to = parse_peers(&args.to)?;
    let [to] = &to[..] else { bail!("--to is one NODE=HOST:PORT") };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).context("cannot wait for signals")?;
    }
    if args.until_stdin_closes {
        let stop = stop.clone();
        thread::spawn(move || {
            // Nothing is ever said there; an error is as good as an end.
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            stop.store(true, std::sync::atomic::Ordering::SeqCst);
        });
    }
    let config = Migrate {
        layout: args.place.layout()?,
        machine: args.place.machine,
        node: args.node,
        to: to.clone(),
        key: Arc::new(Key::load(&args.key)?),
        policy: MigrationPolicy { max_pause: Duration::from_millis(args.max_pause_ms), max_rounds: args.max_rounds },
        peer_timeout: Duration::from_millis(args.peer_timeout_ms),
        // What is sent again in a round would rarely be found in copies: the memory for them is better the machine's.
        encoding: EncodingConfig { shadow: ShadowBudget::Percent(0), compression: args.compression },
    };
    let mut why = None;
    let tell = |report: &migrate::Report| {
        use std::io::Write as _;
        let line = if args.json { serde_json::to_string(report).unwrap_or_default() } else { report.text() };
        // Whoever does not listen any more does not stop the migration.
        let _ = writeln!(std::io::stdout(), "{line}");
        if let migrate::Report::Failed { why: sentence } = report {
            why = Some(sentence.clone());
        }
    };
    if migrate::run(config, &stop, tell) {
        return Ok(());
    }
    bail!("not migrated: {}", why.unwrap_or_default())
}

fn serve_migrations(args: ServeMigrations) -> anyhow::Result<()> {
    let command: Vec<String> = args.hook.split_whitespace().map(str::to_owned).collect();
    if command.is_empty() {
        bail!("--hook is empty");
    }
    let text = |path: &PathBuf| {
        path.to_str().map(str::to_owned).with_context(|| format!("{} is not valid UTF-8", path.display()))
    };
    let hook = MigrationHook::new(command, &text(&args.run_root)?, &text(&args.shm_root)?);
    // Before any thread starts, so that no signal is missed.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot wait for signals")?;
    let incoming = Incoming::start(incoming::Config {
        node: args.node,
        listen: args.listen,
        key: Arc::new(Key::load(&args.key)?),
        run_root: args.run_root,
        shm_root: args.shm_root,
        hook,
        peer_timeout: Duration::from_millis(args.peer_timeout_ms),
        stage_limit: args.stage_limit_mib.map(|mib| mib << 20),
    })?;
    let stop = incoming.stopper();
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            stop();
        }
    });
    incoming.wait();
    Ok(())
}

fn parse_compression(text: &str) -> Result<Compression, String> {
    let method = [Method::Plain].into_iter().chain(Method::COMPRESSING).find(|method| method.name() == text);
    match (text, method) {
        ("auto", _) => Ok(Compression::Auto),
        (_, Some(method)) => Ok(Compression::Always(method)),
        _ => Err("it is one of auto, none, lz4, zstd".into()),
    }
}

fn parse_peers(text: &str) -> anyhow::Result<Vec<(String, String)>> {
    let pairs = text.split_whitespace().map(|pair| match pair.split_once('=') {
        Some((name, addresses)) if !name.is_empty() => match link::check_addresses(addresses) {
            Ok(()) => Ok((name.to_owned(), addresses.to_owned())),
            Err(why) => bail!("--peers: {pair:?} is not NODE=HOST:PORT[,HOST:PORT...]: {why}"),
        },
        _ => bail!("--peers: {pair:?} is not NODE=HOST:PORT[,HOST:PORT...]"),
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_names_with_addresses() {
        let peers = parse_peers(" n1=10.0.0.1:7790  n2=[fe80::1]:7790 ").unwrap();
        assert_eq!(peers[1], ("n2".to_owned(), "[fe80::1]:7790".to_owned()));
        let two = parse_peers("n1=10.0.0.1:7790,10.0.1.1:7790").unwrap();
        assert_eq!(two[0].1, "10.0.0.1:7790,10.0.1.1:7790");
        for bad in ["n1", "n1=10.0.0.1", "=1:2", "n1=1:2,", "n1=1:2,1:2"] {
            assert!(parse_peers(bad).is_err(), "{bad}");
        }
    }
}
