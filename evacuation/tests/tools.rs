//! The daemon and the operator's commands against Pacemaker's real tools: cibadmin, crm_diff and crm_mon of the lab's Debian root, on a
//! CIB in a file. What is tried is what no simulation can: that a change goes through as one patch, that a change for an older CIB is
//! refused, and that a controller that was killed with SIGKILL goes on as another process.
//!
//! Without root or the lab root the test says SKIPPED and passes.

use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use understudy_alerts::answering::answer;
use understudy_alerts::approval::{Answer, CONSOLE, Given, Record, Way, code, property};
use understudy_alerts::cluster::{Cib, Records as _};
use understudy_crm::policy::Policy;
use understudy_crm::records::{self, ARRIVES, EVACUATED, Progress, Records};
use understudy_crm::simulate::settled;
use understudy_crm::xml::Element;
use understudy_monitor::matrix::{Observation, Verdict};
use understudy_monitor::report::{Judged, Report, socket};
use understudy_protocol::control::{Reply, encode_line, read_line};
use understudy_protocol::key::Key;

fn root() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/lab/root");
    let root = std::env::var_os("UNDERSTUDY_LAB_ROOT").map_or(root, PathBuf::from);
    let is_root = fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0);
    if !is_root || !root.join("usr/sbin/cibadmin").exists() {
        eprintln!("SKIPPED: the controller's tools need root and a lab root with Pacemaker at {}", root.display());
        return None;
    }
    Some(root)
}

const POLICY: &str = r#"
nodes = [
    { name = "n1", storage = "s1", rack = "r1", cluster = "c" },
    { name = "n2", storage = "s2", rack = "r2", cluster = "c" },
    { name = "n3", storage = "s3", rack = "r2", cluster = "c" },
]
machines = [{ name = "a", kernel = "/k", mode = "restart", primary = "n1", automation = "manual" }]
fencing = [{ name = "f", agent = "fence_ipmilan", nodes = ["n1", "n2", "n3"] }]
evacuation = { settle = 0, interval = 1 }
"#;

/// A directory with the CIB and with programs that call the root's tools on it.
struct Place {
    dir: tempfile::TempDir,
    root: PathBuf,
}

impl Place {
    fn new(root: PathBuf) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap(), root };
        fs::create_dir(place.at("tools")).unwrap();
        for tool in ["cibadmin", "crm_diff", "crm_mon"] {
            // The daemon names files in its temporary directory; inside that is /mnt.
            let text = format!(
                "#!/bin/bash\ndir={} root={}\nargs=()\nfor a in \"$@\"; do args+=(\"${{a//$dir//mnt}}\"); done\n\
                 exec unshare --mount --propagation private bash -c 'mount --bind \"$1\" \"$2/mnt\" && mount -t proc proc \"$2/proc\" \
                 && exec chroot \"$2\" env CIB_file=/mnt/cib.xml \"${{@:3}}\"' enter \"$dir\" \"$root\" {tool} \"${{args[@]}}\"\n",
                place.dir.path().display(),
                place.root.display(),
            );
            let file = place.at("tools").join(tool);
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn cib(&self) -> Element {
        // Pacemaker replaces the file as a whole; between two reads it may be gone for a moment.
        let text = || fs::read_to_string(self.at("cib.xml")).ok().and_then(|t| Element::parse(&t).ok());
        self.wait("a readable CIB", text)
    }

    fn records(&self) -> Records {
        records::read(&self.cib()).unwrap()
    }

    fn command(&self, words: &[&str]) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy-evacuator"));
        command
            .args(words)
            .env("PATH", format!("{}:{path}", self.at("tools").display()))
            .env("TMPDIR", self.dir.path())
            .env("UNDERSTUDY_ALERT_SPOOL", self.at("spool"));
        command
    }

    fn daemon(&self, journal: &str) -> Daemon {
        let run_root = self.dir.path().display().to_string();
        let journal = self.at(journal).display().to_string();
        let mut command = self.command(&["run", "--node", "n2", "--run-root", &run_root, "--journal", &journal]);
        let log = fs::OpenOptions::new().append(true).create(true).open(self.at("log")).unwrap();
        Daemon(command.stdin(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn wait<T>(&self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(there) = condition() {
                return there;
            }
            let said = || fs::read_to_string(self.at("log")).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(60), "no {what} within a minute; it says: {}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

struct Daemon(Child);

impl Daemon {
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// n1 is dead and fenced.
fn without_n1(policy: &str) -> Element {
    let mut cib = settled(&Policy::parse(policy).unwrap());
    let n1 = cib.child_or_new("status").children.iter_mut().find(|s| s.attribute("uname") == Some("n1")).unwrap();
    for (name, value) in [("in_ccm", "false"), ("crmd", "offline"), ("join", "down"), ("expected", "down")] {
        n1.set(name, value);
    }
    n1.children.clear();
    cib
}

/// From the question in the cluster to the score, with a controller that dies while the question stands.
#[test]
fn a_plan_is_carried_out_when_somebody_approves_it_and_not_before() {
    let Some(root) = root() else { return };
    let place = Place::new(root);
    let key = Key::generate(place.at("key")).unwrap();
    let policy = format!(
        "cluster = {{ key = \"{}\" }}\nalerts = [{{ name = \"night\", kind = \"command\", to = \"/bin/true\", approves = true }}]\n\
         approval = {{ expires = \"10min\" }}\n{}",
        place.at("key").display(),
        POLICY.replace("\"manual\"", "\"semi\"")
    );
    fs::write(place.at("cib.xml"), without_n1(&policy).to_string()).unwrap();

    let first = place.daemon("journal");
    let record = || {
        let record = Record::parse(records::property(&place.cib(), &property("p1"))?).ok()?;
        record.told.then_some(record)
    };
    let asked = place.wait("question", record);
    assert!(asked.request.approvers.contains(&"night".to_owned()) && asked.request.summary.contains("a from n1"));
    first.kill();

    let second = place.daemon("journal");
    place.wait("its socket", || place.at(".evacuator/evacuator.sock").exists().then_some(()));
    assert_eq!(records::wishes(&place.cib(), "a"), [("n1", 1000)], "nobody has answered");
    let path = std::env::var("PATH").unwrap_or_default();
    let tools = Cib::through(vec!["env".into(), format!("PATH={}:{path}", place.at("tools").display())]);
    assert_eq!(tools.all().unwrap().len(), 1, "its successor asks nobody again");
    let code = code(&key, &asked.request, CONSOLE).to_string();
    let given = Given { answer: Answer::Approve, code: &code, name: Some("ada"), way: Way::Cli };
    answer(&tools, &key, "p1", &given, asked.request.asked + 1, &|_| ()).unwrap();

    let score = || {
        let wishes = place.cib();
        let wishes = records::wishes(&wishes, "a");
        (wishes.len() == 1 && wishes[0].1 == EVACUATED).then(|| wishes[0].0.to_owned())
    };
    assert_eq!(place.wait("score", score), "n2");
    place.wait("the decision in the journal", || {
        fs::read_to_string(place.at("journal"))
            .ok()
            .filter(|journal| journal.contains("ada") && journal.contains("approved"))
    });
    second.kill();
}

/// A monitor's socket that says what it was told to say.
fn monitor(place: &Place, report: &Arc<Mutex<Report>>) {
    let path = socket(place.dir.path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(path).unwrap();
    let report = report.clone();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            while let Ok(Some(_)) = read_line(&mut reader) {
                let said = report.lock().unwrap().clone();
                let _ = stream.write_all(&encode_line(&Reply::Ok(said)));
            }
        }
    });
}

#[test]
fn what_the_monitor_of_its_node_freezes_waits_until_it_does_not() {
    let Some(root) = root() else { return };
    let place = Place::new(root);
    let seen = Observation::all().next().unwrap();
    let frozen = Judged {
        node: "n1".into(),
        machine: None,
        observation: seen,
        row: "ours".into(),
        verdict: Verdict::Freeze,
        for_ms: 60_000,
    };
    let report = Report {
        node: "n2".into(),
        speaks: false,
        waits_for: None,
        judged: vec![frozen],
        refused: 0,
        last_refused: None,
    };
    let report = Arc::new(Mutex::new(report));
    monitor(&place, &report);
    let policy = POLICY.replace("\"manual\"", "\"automatic\"");
    fs::write(place.at("cib.xml"), without_n1(&policy).to_string()).unwrap();
    let daemon = place.daemon("journal");
    let held = || place.records().plans.first()?.held.as_ref().map(|hold| hold.why().to_owned());
    assert!(place.wait("brake", held).contains("freeze of n1 (row ours"));
    assert_eq!(records::wishes(&place.cib(), "a"), [("n1", 1000)]);
    assert!(place.records().state.alarms.contains_key("finding:n1"));
    report.lock().unwrap().judged.clear();
    let score = || records::wishes(&place.cib(), "a").iter().any(|(_, score)| *score == EVACUATED).then_some(());
    place.wait("score", score);
    assert!(!place.records().state.alarms.contains_key("finding:n1"));
    daemon.kill();
}

#[test]
fn an_operator_empties_a_host_and_the_machine_keeps_its_old_score_on_the_way() {
    let Some(root) = root() else { return };
    let place = Place::new(root);
    let policy = POLICY.replace("mode = \"restart\"", "mode = \"restart\", migrate = true");
    fs::write(place.at("cib.xml"), settled(&Policy::parse(&policy).unwrap()).to_string()).unwrap();
    let unknown = place.command(&["drain", "n9"]).output().unwrap();
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("n9 is not a host"));
    let ordered = place.command(&["drain", "n1"]).output().unwrap();
    assert!(ordered.status.success(), "{}", String::from_utf8_lossy(&ordered.stderr));
    let daemon = place.daemon("journal");
    let scores = || {
        let cib = place.cib();
        let wishes: Vec<(String, i32)> =
            records::wishes(&cib, "a").iter().map(|(node, score)| ((*node).to_owned(), *score)).collect();
        (wishes.len() == 2).then_some(wishes)
    };
    assert_eq!(place.wait("scores", scores), [("n1".into(), 1000), ("n2".into(), ARRIVES)]);
    let plans = place.command(&["plans"]).output().unwrap();
    let text = String::from_utf8_lossy(&plans.stdout).into_owned();
    assert!(text.contains("n1 to be left") && text.contains("moves (batch 1)"), "{text}");
    daemon.kill();
}

#[test]
fn a_killed_controller_goes_on_as_another_through_pacemakers_own_tools() {
    let Some(root) = root() else { return };
    let place = Place::new(root);
    fs::write(place.at("cib.xml"), without_n1(POLICY).to_string()).unwrap();

    let first = place.daemon("journal");
    let open = || place.records().plans.into_iter().next();
    let plan = place.wait("plan", open);
    assert_eq!((plan.id.as_str(), &plan.moves[0].progress), ("p1", &Progress::Waiting));
    place.wait("journal", || fs::read_to_string(place.at("journal")).ok().filter(|j| j.contains("plan p1")));
    first.kill();
    assert_eq!(records::wishes(&place.cib(), "a"), [("n1", 1000)]);

    // Nobody is there: the order waits in the cluster.
    let refused = place.command(&["release", "p9"]).output().unwrap();
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("there is no plan p9"));
    let ordered = place.command(&["release", "p1"]).output().unwrap();
    assert!(ordered.status.success(), "{}", String::from_utf8_lossy(&ordered.stderr));
    assert_eq!(place.records().orders.len(), 1);

    let second = place.daemon("journal");
    let score =
        || records::wishes(&place.cib(), "a").first().filter(|(_, s)| *s == EVACUATED).map(|(n, _)| n.to_string());
    assert_eq!(place.wait("score", score), "n2");
    assert_eq!(records::wishes(&place.cib(), "a").len(), 1);
    let numbers = || {
        let text = fs::read_to_string(place.at("journal")).ok()?;
        let number = |l: &str| serde_json::from_str::<records::Event>(l).ok().map(|e| e.number);
        let numbers: Vec<u64> = text.lines().filter_map(number).collect();
        text.contains("\"release\"").then_some(numbers)
    };
    let numbers = place.wait("release in the journal", numbers);
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "every event once");
    let socket = place.at(".evacuator/evacuator.sock");
    let status: understudy_protocol::evacuator::EvacuatorStatus = understudy_protocol::control::call_once(
        socket,
        &understudy_protocol::evacuator::EvacuatorRequest::Status,
        Duration::from_secs(5),
    )
    .unwrap();
    assert!(status.open_plans == 1 && status.node == "n2", "{status:?}");
    second.kill();
}
