//! What truly runs in the nodes, seen from outside: the host's process table, asked neither Pacemaker nor any daemon of ours.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Lab, wait_until};

/// Shortest pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// One process of a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// The node.
    pub node: String,
    /// Its process id, as seen from outside.
    pub pid: i32,
    /// Its command line.
    words: Vec<String>,
}

impl Process {
    /// What follows `option` on its command line.
    fn option(&self, option: &str) -> Option<&str> {
        let at = self.words.iter().position(|word| word == option)?;
        self.words.get(at + 1).map(String::as_str)
    }

    /// It was started to wait for a machine that runs elsewhere: a standby, or the target of a live migration.
    fn stands_by(&self) -> bool {
        self.words.iter().any(|word| word == "--standby")
    }

    /// It has not ended.
    fn lives(&self) -> bool {
        command_line(&self.pid.to_string()).as_ref() == Some(&self.words)
    }
}

/// All processes in the lab's nodes that run `program` with `word` as its first argument.
pub fn running(lab: &Lab, program: &str, word: &str) -> Result<Vec<Process>> {
    let namespace = |pid: &str| fs::read_link(Path::new("/proc").join(pid).join("ns/pid")).ok();
    let nodes = lab.status()?.nodes.into_iter();
    let nodes: HashMap<PathBuf, String> =
        nodes.filter_map(|(name, node)| Some((namespace(&node.pid?.to_string())?, name))).collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("listing processes")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let (Ok(pid), Some(words)) = (name.parse(), command_line(&name)) else { continue };
        let ours = |path: &String| Path::new(path).file_name().is_some_and(|name| name == program);
        if !words.first().is_some_and(ours) || words.get(1).map(String::as_str) != Some(word) {
            continue;
        }
        if let Some(node) = namespace(&name).and_then(|namespace| nodes.get(&namespace)) {
            found.push(Process { node: node.clone(), pid, words });
        }
    }
    Ok(found)
}

/// `None` for a process that has none: a thread of the kernel, or one that has ended.
fn command_line(pid: &str) -> Option<Vec<String>> {
    let line = fs::read(Path::new("/proc").join(pid).join("cmdline")).ok()?;
    let line = line.strip_suffix(b"\0").unwrap_or(&line);
    (!line.is_empty()).then(|| line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect())
}

/// The nodes in which each machine's VMM is a process.
pub fn machines(lab: &Lab) -> Result<BTreeMap<String, Vec<Process>>> {
    let mut out: BTreeMap<String, Vec<Process>> = BTreeMap::new();
    for process in running(lab, "understudy-vmm", "run")? {
        if let Some(machine) = process.option("--machine").map(str::to_owned) {
            out.entry(machine).or_default().push(process);
        }
    }
    Ok(out)
}

/// A look at all machines, again and again: how often each was started, and whether one ever was in two nodes. (Beside those that were
/// started to stand by, of which the process table does not know whether they run by now.)
#[derive(Debug)]
pub struct Copies {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    ends: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    looks: u64,
    longest: Duration,
    started: BTreeMap<String, BTreeSet<(String, i32)>>,
    twice: Vec<String>,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Copies {
    /// Begin to look.
    pub fn watch(lab: Lab) -> Self {
        let shared = Arc::new(Shared::default());
        let looks = shared.clone();
        let thread = thread::spawn(move || {
            while !looks.ends.load(Ordering::Relaxed) {
                let began = Instant::now();
                // A lab that is going down cannot be asked.
                if let Ok(machines) = machines(&lab) {
                    note(&mut looks.seen(), &machines, began);
                }
                // Where looking is slow, the machines get most of the processor all the same.
                thread::sleep(PAUSE.max(began.elapsed() * 4));
            }
        });
        Self { shared, thread: Some(thread) }
    }

    /// Wait for a look that began after this call.
    pub fn look_again(&self, bound: Duration) -> Result<()> {
        // The one that is under way may have begun before.
        let enough = self.looks().0 + 2;
        wait_until("another look at all machines", bound, || Ok(self.looks().0 >= enough))
    }

    /// Forget what was started so far.
    pub fn forget_starts(&self) {
        self.shared.seen().started.clear();
    }

    /// The processes that `machine` has had since [`Self::forget_starts`], those that ran then included.
    pub fn starts(&self, machine: &str) -> usize {
        self.shared.seen().started.get(machine).map_or(0, BTreeSet::len)
    }

    /// No machine was ever in two nodes at once.
    pub fn never_twice(&self) -> Result<()> {
        let seen = self.shared.seen();
        ensure!(seen.looks > 0, "nobody has looked at the machines");
        ensure!(seen.twice.is_empty(), "machines ran twice: {}", seen.twice.join("; "));
        Ok(())
    }

    /// How often it has looked, and the longest look.
    pub fn looks(&self) -> (u64, Duration) {
        let seen = self.shared.seen();
        (seen.looks, seen.longest)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn note(seen: &mut Seen, machines: &BTreeMap<String, Vec<Process>>, began: Instant) {
    seen.looks += 1;
    seen.longest = seen.longest.max(began.elapsed());
    for (machine, processes) in machines {
        let starts = seen.started.entry(machine.clone()).or_default();
        starts.extend(processes.iter().map(|p| (p.node.clone(), p.pid)));
        // One may have ended before the other was started, both within this look: those that still live are two.
        let nodes: BTreeSet<&str> =
            processes.iter().filter(|p| !p.stands_by() && p.lives()).map(|p| p.node.as_str()).collect();
        if nodes.len() > 1 {
            let nodes: Vec<&str> = nodes.into_iter().collect();
            seen.twice.push(format!("{machine} on {}", nodes.join(" and ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_process(node: &str) -> Process {
        let pid = std::process::id();
        Process { node: node.into(), pid: pid.cast_signed(), words: command_line(&pid.to_string()).unwrap() }
    }

    #[test]
    fn a_machine_that_lives_in_two_nodes_is_seen_and_one_that_has_moved_is_not() {
        let mut seen = Seen::default();
        let gone = Process { words: vec!["understudy-vmm".into()], ..this_process("n1") };
        note(&mut seen, &[("a".into(), vec![gone, this_process("n2")])].into(), Instant::now());
        assert!(seen.twice.is_empty() && seen.started["a"].len() == 2);
        note(&mut seen, &[("a".into(), vec![this_process("n1"), this_process("n2")])].into(), Instant::now());
        assert_eq!(seen.twice, ["a on n1 and n2"]);
        let waits = Process { words: vec!["--standby".into()], ..this_process("n1") };
        assert!(waits.stands_by() && !this_process("n1").stands_by());
    }

    #[test]
    fn what_stands_after_an_option_is_its_value() {
        let words = ["understudy-vmm", "run", "--machine", "web1"].map(String::from).to_vec();
        let process = Process { words, ..this_process("n1") };
        assert_eq!(
            (process.option("--machine"), process.option("web1"), process.option("-x")),
            (Some("web1"), None, None)
        );
    }
}
