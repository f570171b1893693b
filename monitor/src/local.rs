//! This node's own machines: each VMM is asked on its control socket, as its agent does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use understudy_protocol::control::{ControlError, VmmRequest, VmmState, VmmStatus, call_once};
use understudy_protocol::layout::{Layout, valid_machine_name};
use understudy_protocol::watchdog::WatchdogState;

use crate::matrix::{Guest, Machine};
use crate::wire::MachineSeen;

/// Longest that a VMM may take to answer. Its agent is more patient; this is one look of many.
const ANSWER: Duration = Duration::from_millis(500);

/// The machines below a run root, looked at again and again.
#[derive(Debug)]
pub struct Machines {
    root: PathBuf,
    /// Those that ran when they were last heard: of any other, silence says nothing.
    ran: BTreeMap<String, bool>,
}

impl Machines {
    /// Of this run root.
    pub fn below(root: &Path) -> Self {
        Self { root: root.to_owned(), ran: BTreeMap::new() }
    }

    /// How they are now: those that run here, or ran when they were last heard and were not stopped since.
    pub fn look(&mut self) -> Vec<MachineSeen> {
        let mut seen = Vec::new();
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.retain(|name| valid_machine_name(name));
        names.sort();
        self.ran.retain(|name, _| names.contains(name));
        for name in names {
            let layout = Layout::in_run_dir(self.root.join(&name));
            // Without it, it was stopped, or never started.
            if !layout.vmm_pid().exists() {
                self.ran.remove(&name);
                continue;
            }
            let answer = call_once::<_, VmmStatus>(layout.vmm_socket(), &VmmRequest::Status, ANSWER);
            let (machine, guest) = match answer {
                Ok(status) => {
                    let runs = matches!(status.state, VmmState::Running | VmmState::Paused);
                    self.ran.insert(name.clone(), runs);
                    if !runs {
                        continue;
                    }
                    (Machine::Running, heartbeat(&status))
                }
                Err(_) if self.ran.get(&name) != Some(&true) => continue,
                // Nobody listens there any more.
                Err(ControlError::Io { .. }) if !lives(&layout) => (Machine::Dead, Guest::Unwatched),
                Err(_) => (Machine::Silent, Guest::Unwatched),
            };
            seen.push(MachineSeen { name, machine, guest });
        }
        seen
    }
}

/// A guest's heartbeat: that it feeds its watchdog. (One that was reset because it did not is down until its driver is back.)
fn heartbeat(status: &VmmStatus) -> Guest {
    match status.watchdog.map(|watchdog| watchdog.state) {
        None | Some(WatchdogState::NotArmed) => Guest::Unwatched,
        Some(WatchdogState::Fed) => Guest::Up,
        Some(WatchdogState::Expired) => Guest::Down,
    }
}

/// Whether the process in the pid file is there and is a VMM. (A zombie has no command line.)
fn lives(layout: &Layout) -> bool {
    let pid = fs::read_to_string(layout.vmm_pid()).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let line = pid.and_then(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok()).unwrap_or_default();
    let program = line.split(|b| *b == 0).next().map(String::from_utf8_lossy).unwrap_or_default();
    Path::new(program.as_ref()).file_name().is_some_and(|name| name == "understudy-vmm")
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_guest_is_up_while_it_feeds_its_watchdog_and_down_when_it_does_not() {
        let status = |state: &str, watchdog: &str| {
            format!(
                r#"{{"ok":{{"machine":"m1","state":"{state}","generation":1,"gate":"open","vcpus":1,"ram_bytes":4096,"vm_time_ns":0,"last_cut":0,
                "last_committed":0,"replicated":false,"kvm_backend":"none","resets":0,"serial":[],"recent_pauses_us":[]{watchdog}}}}}"#
            )
            .replace('\n', "")
        };
        let watchdog = |state: &str| {
            format!(
                r#","watchdog":{{"model":"i6300esb","action":"report","state":"{state}","timeout_ms":null,"fed_ms_ago":null,"expired_ms_ago":null,"expirations":0}}"#
            )
        };
        let cases = [
            (status("running", ""), Some(Guest::Unwatched)),
            (status("running", &watchdog("not-armed")), Some(Guest::Unwatched)),
            (status("running", &watchdog("fed")), Some(Guest::Up)),
            (status("running", &watchdog("expired")), Some(Guest::Down)),
            (status("paused", &watchdog("fed")), Some(Guest::Up)),
            (status("standby", &watchdog("expired")), None),
        ];
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::in_run_dir(dir.path().join("m1"));
        fs::create_dir(layout.run_dir()).unwrap();
        fs::write(layout.vmm_pid(), "1\n").unwrap();
        let vmm = UnixListener::bind(layout.vmm_socket()).unwrap();
        let (answers, wanted): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
        let vmm = std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = vmm.accept().unwrap();
                BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
        });
        let mut machines = Machines::below(dir.path());
        for guest in wanted {
            let seen = guest.map(|guest| MachineSeen { name: "m1".into(), machine: Machine::Running, guest });
            assert_eq!(machines.look(), Vec::from_iter(seen));
        }
        vmm.join().unwrap();
    }

    #[test]
    fn a_directory_without_a_process_file_is_no_machine_and_a_standby_that_died_is_none_either() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["m1", "m2", ".monitor", "not a machine"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("m2/vmm.pid"), "999999999\n").unwrap();
        let mut machines = Machines::below(dir.path());
        assert_eq!(machines.look(), []);
        // It ran when it was last heard.
        machines.ran.insert("m2".into(), true);
        let dead = MachineSeen { name: "m2".into(), machine: Machine::Dead, guest: Guest::Unwatched };
        assert_eq!(machines.look(), [dead]);
        fs::remove_file(dir.path().join("m2/vmm.pid")).unwrap();
        assert_eq!(machines.look(), []);
        fs::write(dir.path().join("m2/vmm.pid"), "999999999\n").unwrap();
        assert_eq!(machines.look(), [], "stopped, and something else since");
        assert_eq!(Machines::below(Path::new("/nonexistent")).look(), []);
    }
}
