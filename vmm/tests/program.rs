//! The program as people and agents meet it: what it says and with which exit code when something is wrong, and its files.

mod common;

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{kvm_is_there, scratch, wait};
use understudy_protocol::control::{PromoteFrom, VmmRequest, VmmState, VmmStatus, call_once};
use understudy_protocol::ids::Generation;
use understudy_protocol::layout::Layout;
use understudy_vmm::boot;

const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy-vmm");
const SECOND: Duration = Duration::from_secs(1);

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(scratch())
    }
    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }
    fn layout(&self) -> Layout {
        Layout::new(self.path("run"), self.path("shm"), "m1")
    }
    /// A file with the head of a bzImage: enough to be taken for a kernel, never run in these tests.
    fn kernel(&self) -> String {
        std::fs::write(self.0.path().join("kernel"), boot::least_bzimage()).unwrap();
        self.path("kernel")
    }
    fn command(&self, subcommand: &str) -> Command {
        let mut c = Command::new(PROGRAM);
        c.args([subcommand, "--machine", "m1", "--run-root", &self.path("run"), "--shm-root", &self.path("shm")]);
        c
    }
    fn standby(&self) -> Running {
        let kernel = self.kernel();
        let mut c = self.command("run");
        c.args(["--memory", "32", "--vcpus", "2", "--kernel", &kernel, "--arena", "1", "--standby"]);
        let mut running = Running(c.stderr(Stdio::piped()).spawn().unwrap());
        wait("the control socket answers", || {
            assert!(running.0.try_wait().unwrap().is_none(), "it ended: {}", running.said());
            self.status().is_some()
        });
        running
    }
    fn status(&self) -> Option<VmmStatus> {
        call_once(self.layout().vmm_socket(), &VmmRequest::Status, SECOND).ok()
    }
}

struct Running(Child);
impl Running {
    fn said(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut e) = self.0.stderr.take() {
            let _ = std::io::Read::read_to_string(&mut e, &mut text);
        }
        text
    }
    fn ends(&mut self) -> i32 {
        let mut code = None;
        wait("the process ends", || {
            code = self.0.try_wait().unwrap();
            code.is_some()
        });
        code.and_then(|c| c.code()).unwrap_or(-1)
    }
}
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn says(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn a_missing_kernel_is_named_and_nothing_is_left_behind() {
    let place = Place::new();
    let out = place.command("run").args(["--memory", "32", "--kernel", "/no/such/vmlinuz"]).output().unwrap();
    says(&out, 1, &["/no/such/vmlinuz", "--kernel"]);
    assert!(!place.layout().ram().exists() && !place.layout().vmm_pid().exists());
}

#[test]
fn a_kernel_that_is_none_is_refused() {
    let place = Place::new();
    let out = place.command("run").args(["--memory", "32", "--kernel", "/etc/passwd"]).output().unwrap();
    says(&out, 1, &["/etc/passwd", "bzImage"]);
}

#[test]
fn wrong_usage_is_exit_code_2_and_explained() {
    let place = Place::new();
    let run =
        |extra: &[&str]| place.command("run").args(["--kernel", "k", "--memory", "64"]).args(extra).output().unwrap();
    says(&run(&["--vcpus", "33"]), 2, &["vcpus"]);
    says(&run(&["--serial0", "tty"]), 2, &["board:HOST:PORT/DEVICE,key=FILE"]);
    says(&place.command("run").output().unwrap(), 2, &["--memory", "--kernel"]);
    let bad = Command::new(PROGRAM).args(["status", "--machine", "../x"]).output().unwrap();
    says(&bad, 1, &["no machine name"]);
}

#[test]
fn talking_to_a_machine_that_is_not_there_says_so() {
    let place = Place::new();
    for command in ["status", "pause", "resume", "quit", "power-button"] {
        says(&place.command(command).output().unwrap(), 1, &["no VMM of this machine runs on this node"]);
    }
}

#[test]
fn a_missing_key_file_is_named_before_anything_runs() {
    let place = Place::new();
    let kernel = place.kernel();
    let out = place
        .command("run")
        .args(["--memory", "32", "--kernel", &kernel, "--serial0", "board:127.0.0.1:1/gps,key=/no/such/key"])
        .output()
        .unwrap();
    says(&out, 1, &["/no/such/key"]);
}

#[test]
fn a_standby_waits_and_leaves_no_socket_and_no_pid_file_at_a_clean_end() {
    if !kvm_is_there() {
        return;
    }
    let place = Place::new();
    let mut running = place.standby();
    let status = place.status().unwrap();
    assert_eq!((status.state, status.generation, status.vcpus), (VmmState::Standby, Generation(0), 2));
    assert_eq!(status.ram_bytes, 32 << 20);
    let pid = std::fs::read_to_string(place.layout().vmm_pid()).unwrap();
    assert_eq!(pid.trim(), running.0.id().to_string());
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(place.layout().vmm_socket()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    says(&place.command("pause").output().unwrap(), 1, &["nothing to pause", "standby"]);
    let shown = place.command("status").output().unwrap();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("m1: Standby"));
    says(&place.command("quit").output().unwrap(), 0, &[]);
    assert_eq!(running.ends(), 0);
    assert!(!place.layout().vmm_pid().exists() && !place.layout().vmm_socket().exists());
    assert!(place.layout().ram().exists(), "RAM outlives the process");
}

#[test]
fn a_second_run_of_the_same_machine_is_refused_and_the_first_goes_on() {
    if !kvm_is_there() {
        return;
    }
    let place = Place::new();
    let mut running = place.standby();
    let kernel = place.kernel();
    let out = place.command("run").args(["--memory", "32", "--kernel", &kernel]).output().unwrap();
    says(&out, 5, &["already", "understudy-vmm quit --machine m1"]);
    assert_eq!(place.status().unwrap().state, VmmState::Standby);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(running.0.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    assert_eq!(running.ends(), 0);
}

#[test]
fn a_crash_leaves_its_pid_file_and_the_next_run_starts_all_the_same() {
    if !kvm_is_there() {
        return;
    }
    let place = Place::new();
    let mut running = place.standby();
    running.0.kill().unwrap();
    running.0.wait().unwrap();
    assert!(place.layout().vmm_pid().exists());
    says(&place.command("status").output().unwrap(), 1, &["has died"]);
    drop(place.standby());
}

#[test]
fn a_promotion_from_a_damaged_image_is_refused_and_leaves_a_standby() {
    if !kvm_is_there() {
        return;
    }
    let place = Place::new();
    let _running = place.standby();
    let state_file = place.path("state");
    std::fs::write(&state_file, b"UNDSTATE nonsense").unwrap();
    let from = PromoteFrom::Image { state_file, epoch: understudy_protocol::ids::Epoch(1) };
    let request = VmmRequest::Promote { generation: Generation(2), from };
    let refused = call_once::<_, ()>(place.layout().vmm_socket(), &request, SECOND).unwrap_err().to_string();
    assert!(refused.contains("cannot load the machine"), "{refused}");
    assert_eq!(place.status().unwrap().state, VmmState::Standby);
}

#[test]
fn a_tmpfs_that_is_too_small_is_said_in_a_sentence() {
    if !kvm_is_there() {
        return;
    }
    let place = Place::new();
    let kernel = place.kernel();
    // More than any machine's /dev/shm.
    let out = place.command("run").args(["--memory", "4194304", "--kernel", &kernel]).output().unwrap();
    says(&out, 1, &["MiB"]);
}

#[test]
fn garbage_on_the_control_socket_is_answered_and_survived() {
    if !kvm_is_there() {
        return;
    }
    use std::io::{BufRead, BufReader, Write};
    let place = Place::new();
    let _running = place.standby();
    let stream = std::os::unix::net::UnixStream::connect(place.layout().vmm_socket()).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for (line, word) in [
        ("{\n", "not a request"),
        ("{\"cmd\":\"dance\"}\n", "not a request"),
        ("{\"cmd\":\"harvest\"}\n", "attach first"),
        ("{\"cmd\":\"attach\"}\n", "standby"),
        ("{\"cmd\":\"gate-open\"}\n", "no output"),
        ("{\"cmd\":\"cut\",\"epoch\":1,\"arm\":true,\"last\":false}\n", "attach first"),
    ] {
        (&stream).write_all(line.as_bytes()).unwrap();
        let mut reply = String::new();
        reader.read_line(&mut reply).unwrap();
        assert!(reply.contains("error") && reply.contains(word), "{line} → {reply}");
    }
    assert!(place.status().is_some());
}
