//! Two replicator processes with two network paths between them, each of which is cut in turn: protection stays.

mod common;

use std::time::{Duration, Instant};

use common::fake_vmm::{FakeVmm, Load};
use common::relay::Relay;
use common::*;
use understudy_protocol::control::*;

/// A pair whose n1 reaches n2 over two relays.
struct Doubled {
    pair: Pair,
    second: Relay,
    primary: std::sync::Arc<FakeVmm>,
    _standby: std::sync::Arc<FakeVmm>,
}

impl Doubled {
    fn started(options: &Options) -> Self {
        let mut pair = Pair::new(options);
        let (one, two) = (own_address(), own_address());
        let target = |n: u8| format!("{}:7002", if n == 1 { one } else { two });
        pair.link = Relay::start(target(1));
        let second = Relay::start(target(2));
        let own = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
        let n1 = own(&pair.n1.peers);
        pair.n1.peers = format!("{n1} n2=127.0.0.1:{},127.0.0.1:{}", pair.link.port(), second.port());
        pair.n2.peers = format!("{n1} n2={},{}", target(1), target(2));
        let primary = pair.n1.vmm(options.load, VmmState::Running, 1);
        let standby = pair.n2.vmm(options.load, VmmState::Standby, 0);
        pair.n1.start();
        pair.n2.start();
        pair.n1.promote();
        let this = Self { pair, second, primary, _standby: standby };
        this.pair.wait_protected();
        this.wait_both();
        this
    }

    fn relay(&self, path: usize) -> &Relay {
        if path == 0 { &self.pair.link } else { &self.second }
    }

    fn wait_both(&self) {
        wait_until("both paths work", || {
            let paths = self.pair.n1.status().paths;
            paths.len() == 2 && paths.iter().all(|path| path.works)
        });
    }

    fn active(&self) -> usize {
        let paths = self.pair.n1.status().paths;
        paths.iter().position(|path| path.active).expect("a path carries the data")
    }

    fn vetoes(&self) -> usize {
        self.pair.n1.hook_calls().iter().filter(|call| call.starts_with("veto")).count()
    }
}

#[test]
fn protection_stays_through_twenty_cuts_of_the_path_that_carries_the_data() {
    let paths = Doubled::started(&Options { load: Load { snapshots: true, ..Load::default() }, ..Options::default() });
    let (pair, vetoes) = (&paths.pair, paths.vetoes());
    let opened = paths.primary.machine().gate_opened;
    let mut longest = Duration::ZERO;
    for round in 0..20 {
        let active = paths.active();
        let before = pair.n1.status().committed;
        // A switch that died says nothing; a cable that is pulled at the host, or a firewall, breaks the connection.
        if round % 2 == 0 {
            paths.relay(active).go_silent()
        } else {
            paths.relay(active).cut()
        }
        let cut = Instant::now();
        // Some epochs were on their way: three more are not.
        wait_until("epochs go on being committed", || pair.n1.status().committed.0 > before.0 + 3);
        longest = longest.max(cut.elapsed());
        wait_until("the loss shows", || !pair.n1.status().paths[active].works);
        let status = pair.n1.status();
        assert!(status.protected && status.connected, "round {round}: {status:?}");
        paths.relay(active).heal();
        paths.wait_both();
    }
    println!("the longest wait for the fourth commit after a cut: {longest:?}");
    assert_eq!(paths.vetoes(), vetoes, "no path's loss is the standby's: {:?}", pair.n1.hook_calls());
    let status = pair.n1.status();
    assert_eq!((status.losses, pair.n2.first_copies()), (0, 1), "{}", pair.n1.log());
    assert_eq!(paths.primary.machine().gate_opened, opened, "outputs never left early");
    assert!(status.paths.iter().map(|path| path.again_bytes).sum::<u64>() > 0, "{:?}", status.paths);
    assert!(pair.n1.log().matches("ALARM: the path").count() >= 20, "{}", pair.n1.log());
    let standby = pair.n2.status();
    assert!(standby.paths.len() == 2 && standby.paths.iter().any(|path| path.active), "{standby:?}");

    // Every page of the standby is what the primary has.
    let pass: VerifyStarted = pair.n1.call(&ReplicatorRequest::Verify).unwrap();
    wait_until("memories were compared", || {
        let verify = pair.n1.status().verify;
        verify.passes > 0 && verify.pass >= pass.pass && !verify.running
    });
    assert_eq!(pair.n1.status().verify.failures, 0);
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &paths.primary);
}

#[test]
fn when_the_last_path_goes_it_is_the_loss_of_the_standby_as_ever_and_one_path_is_enough_to_return() {
    let paths = Doubled::started(&Options::impatient());
    let pair = &paths.pair;
    paths.relay(0).cut();
    paths.relay(1).cut();
    wait_until("the gate is open", || paths.primary.machine().gate_open);
    wait_until("the veto shows", || pair.n1.status().vetoed);
    let status = pair.n1.status();
    assert!(!status.protected && status.paths.iter().all(|path| !path.works), "{status:?}");
    paths.relay(1).heal();
    pair.wait_protected();
    let status = pair.n1.status();
    assert!(!status.paths[0].works && status.paths[1].active, "{:?}", status.paths);
    paths.relay(0).heal();
    paths.wait_both();
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &paths.primary);
}

#[test]
fn a_path_that_is_dead_from_the_beginning_delays_nothing_and_is_shown() {
    let mut pair = Pair::new(&Options::default());
    let load = Load::default();
    // (TEST-NET-1 of RFC 5737: nobody is there.)
    let own = pair.n1.peers.split_whitespace().next().unwrap().to_owned();
    let n2 = pair.n2.peers.split_whitespace().nth(1).unwrap().strip_prefix("n2=").unwrap().to_owned();
    pair.n1.peers = format!("{own} n2=192.0.2.1:7790,{n2}");
    pair.n2.peers = format!("{own} n2=192.0.2.1:7790,{n2}");
    let _primary = pair.n1.vmm(load, VmmState::Running, 1);
    let _standby = pair.n2.vmm(load, VmmState::Standby, 0);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    pair.wait_protected();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_understudy-replicator"))
        .args(["status", "--machine", MACHINE, "--run-root"])
        .arg(pair.n1.dir.join("run"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("carries the data") && text.contains("ALARM      1 of 2 paths"), "{text}");
}

#[test]
fn both_processes_may_be_restarted_under_two_paths() {
    let mut paths = Doubled::started(&Options::impatient());
    for round in 0..2 {
        paths.pair.n2.kill();
        wait_until("the loss is seen", || !paths.pair.n1.status().connected);
        paths.pair.n2.start();
        paths.pair.wait_protected();
        paths.wait_both();
        paths.pair.n1.kill();
        paths.pair.n1.start();
        paths.pair.n1.promote();
        paths.pair.wait_protected();
        paths.wait_both();
        paths.pair.wait_epochs(3 + round);
    }
    let taken = paths.pair.n2.take_over(2).unwrap();
    assert_image(&paths.pair.n2, &taken, &paths.primary);
}

/// Two nodes and a switch for each plane, in network namespaces of their own. They end with the processes that hold them.
struct Cables {
    holders: Vec<std::process::Child>,
}

impl Cables {
    /// `None` where the host does not allow it.
    fn new() -> Option<Self> {
        let mut this = Self { holders: Vec::new() };
        for _ in 0..3 {
            // The shell says when it is there; it ends with this test, whose end closes its input.
            let mut holder = std::process::Command::new("unshare")
                .args(["--net", "sh", "-c", "echo there; read end"])
                .stdin(std::process::Stdio::piped())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::null())
                .spawn()
                .ok()?;
            let mut said = String::new();
            let read = std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.take()?), &mut said);
            this.holders.push(holder);
            if read.ok()? == 0 {
                return None;
            }
        }
        for plane in 1..=2 {
            let mut lines = vec![format!("link add p{plane} type bridge"), format!("link set p{plane} up")];
            for node in 1..=2 {
                let pid = this.holders[node].id();
                lines.push(format!("link add n{node}p{plane} type veth peer name e{plane} netns {pid}"));
                lines.push(format!("link set n{node}p{plane} master p{plane} up"));
            }
            this.ip(0, &lines)?;
            for node in 1..=2 {
                let address = format!("10.77.{plane}.{node}/24");
                this.ip(node, &[format!("addr add {address} dev e{plane}"), format!("link set e{plane} up")])?;
            }
        }
        Some(this)
    }

    fn ip(&self, space: usize, lines: &[String]) -> Option<()> {
        for line in lines {
            let done = std::process::Command::new("nsenter")
                .args(["--net", "--target", &self.holders[space].id().to_string(), "ip"])
                .args(line.split_whitespace())
                .status()
                .ok()?;
            done.success().then_some(())?;
        }
        Some(())
    }

    fn wrapper(&self, node: usize) -> Vec<String> {
        ["nsenter", "--net", "--target", &self.holders[node].id().to_string()].map(str::to_owned).to_vec()
    }

    /// The plane's switch forgets the standby's port: nobody hears of it. Or it knows it again.
    fn switch_port(&self, plane: usize, there: bool) {
        let what = if there { format!("master p{plane}") } else { "nomaster".to_owned() };
        self.ip(0, &[format!("link set n2p{plane} {what}")]).unwrap();
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

#[test]
fn on_real_cables_a_plane_that_falls_silent_delays_outputs_by_a_tenth_of_a_second_and_costs_nothing_else() {
    let Some(cables) = Cables::new() else {
        eprintln!("skipped: this host allows no network namespaces to this user");
        return;
    };
    let options = Options::default();
    let mut pair = Pair::new(&options);
    let peers = "n1=10.77.1.1:7790,10.77.2.1:7790 n2=10.77.1.2:7790,10.77.2.2:7790";
    for (i, node) in [&mut pair.n1, &mut pair.n2].into_iter().enumerate() {
        (node.peers, node.wrapper) = (peers.to_owned(), cables.wrapper(i + 1));
    }
    let primary = pair.n1.vmm(options.load, VmmState::Running, 1);
    let _standby = pair.n2.vmm(options.load, VmmState::Standby, 0);
    pair.n1.start();
    pair.n2.start();
    pair.n1.promote();
    pair.wait_protected();
    let works = |path: usize, works: bool| {
        wait_until("the path is as its cable", || pair.n1.status().paths.get(path).is_some_and(|p| p.works == works));
    };
    works(0, true);
    works(1, true);
    let vetoes = || pair.n1.hook_calls().iter().filter(|call| call.starts_with("veto")).count();
    let (before, calm) = (vetoes(), pair.n1.status().statistics.commit_us.max);
    let mut waits = Vec::new();
    for round in 0..20 {
        let active = pair.n1.status().paths.iter().position(|path| path.active).unwrap();
        let committed = pair.n1.status().committed.0;
        let cut = Instant::now();
        cables.switch_port(active + 1, false);
        wait_until("epochs go on being committed", || pair.n1.status().committed.0 > committed + 3);
        waits.push(cut.elapsed().as_millis());
        works(active, false);
        let status = pair.n1.status();
        assert!(status.protected && status.connected, "round {round}: {status:?}");
        cables.switch_port(active + 1, true);
        works(active, true);
    }
    let status = pair.n1.status();
    println!(
        "commit: max {} µs before the cuts, {} µs with them; from cut to the fourth commit {waits:?} ms",
        calm, status.statistics.commit_us.max
    );
    // TCP alone would notice too, after the peer timeout: ten seconds here. (A host that is busy stands still now and then.)
    waits.sort_unstable();
    assert!(waits[waits.len() / 2] < 500, "half of the cuts took longer: {waits:?}");
    assert_eq!((vetoes(), status.losses, pair.n2.first_copies()), (before, 0, 1), "{}", pair.n1.log());
    let taken = pair.n2.take_over(2).unwrap();
    assert_image(&pair.n2, &taken, &primary);
}
