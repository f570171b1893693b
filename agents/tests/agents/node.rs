//! A node in a temporary directory: programs, run root, cluster tools, and agents to call.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ocf::Deadline;
use tempfile::TempDir;
use understudy_protocol::layout::Layout;

/// The node. What runs on it ends with it.
pub struct Node {
    dir: TempDir,
    agent: &'static str,
    settings: Vec<(String, String)>,
}

/// What an action answered.
pub struct Answer {
    pub code: i32,
    pub stderr: String,
}

impl Answer {
    /// The text behind `ocf-exit-reason:`.
    pub fn reason(&self) -> &str {
        self.stderr.lines().find_map(|l| l.strip_prefix("ocf-exit-reason:")).unwrap_or("")
    }
}

impl Node {
    /// A node with all of Understudy's programs and no cluster tools.
    pub fn new(agent: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["libexec", "tools", "run", "shm", "behaviour"] {
            fs::create_dir(at(name)).unwrap();
        }
        let built = Path::new(env!("CARGO_BIN_EXE_understudy-ocf"));
        fs::hard_link(built, at("libexec/understudy-ocf"))
            .or_else(|_| fs::copy(built, at("libexec/understudy-ocf")).map(drop))
            .unwrap();
        for name in ["vmm", "replicator", "serial", "monitor"] {
            symlink(at("libexec/understudy-ocf"), at("libexec").join(name)).unwrap();
            symlink(std::env::current_exe().unwrap(), at("libexec").join(format!("understudy-{name}"))).unwrap();
        }
        for name in ["migrations", "evacuator"] {
            symlink(at("libexec/understudy-ocf"), at("libexec").join(name)).unwrap();
        }
        symlink(std::env::current_exe().unwrap(), at("libexec/understudy-evacuator")).unwrap();
        for name in ["kernel", "key", "kvm"] {
            fs::write(at(name), "x").unwrap();
        }
        let path = |name: &str| at(name).display().to_string();
        let settings = [
            ("OCF_ROOT", "/usr/lib/ocf".to_owned()),
            ("OCF_RESOURCE_INSTANCE", "vm-m1:0".into()),
            ("OCF_RESKEY_CRM_meta_timeout", "20000".into()),
            ("OCF_RESKEY_name", "m1".into()),
            ("OCF_RESKEY_machine", "m1".into()),
            ("OCF_RESKEY_run_root", path("run")),
            ("OCF_RESKEY_shm_root", path("shm")),
            ("OCF_RESKEY_kernel", path("kernel")),
            ("OCF_RESKEY_key", path("key")),
            ("UNDERSTUDY_KVM_DEVICE", path("kvm")),
            ("PATH", path("tools")),
        ];
        let settings = settings.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        Self { dir, agent, settings }
    }

    /// In a promotable clone.
    pub fn in_a_clone(self) -> Self {
        self.with("OCF_RESKEY_CRM_meta_clone", "0")
    }

    /// In a cluster whose CIB is this, on node n1, run by Pacemaker.
    pub fn in_a_cluster(self, cib: Option<&str>) -> Self {
        for name in ["crm_attribute", "cibadmin", "crm_node", "attrd_updater"] {
            symlink(std::env::current_exe().unwrap(), self.path("tools").join(name)).unwrap();
        }
        if let Some(cib) = cib {
            fs::write(self.path("tools/cib.xml"), cib).unwrap();
        }
        self.with("OCF_RESKEY_CRM_meta_on_node", "n1").with("OCF_RESKEY_crm_feature_set", "3.16.1")
    }

    /// With a variable set (or set differently).
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(k, _)| k != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn layout(&self) -> Layout {
        Layout::new(self.path("run"), self.path("shm"), "m1")
    }

    /// Have the fakes behave in some way.
    pub fn behave(&self, name: &str, text: &str) {
        fs::write(self.path("behaviour").join(name), text).unwrap();
    }

    pub fn behave_no_more(&self, name: &str) {
        fs::remove_file(self.path("behaviour").join(name)).unwrap();
    }

    /// Call an action with more variables.
    pub fn act_with(&self, action: &str, more: &[(&str, &str)]) -> Answer {
        self.act_as(self.agent, action, more)
    }

    pub fn act_as(&self, agent: &str, action: &str, more: &[(&str, &str)]) -> Answer {
        let mut command = Command::new(self.path("libexec").join(agent));
        command.arg(action).env_clear().envs(self.settings.iter().cloned()).envs(more.iter().copied());
        let Output { status, stderr, .. } = command.output().unwrap();
        let answer = Answer { code: status.code().unwrap(), stderr: String::from_utf8_lossy(&stderr).into_owned() };
        if !answer.stderr.is_empty() {
            println!("{agent} {action} -> {}\n{}", answer.code, answer.stderr);
        }
        answer
    }

    /// Call the hook, as the process that receives migrations does.
    pub fn migration_hook(&self, call: &[&str]) -> (i32, String) {
        let mut command = Command::new(self.path("libexec/understudy-ocf"));
        command.args(["hook", "--node", "n1"]).args(call).args(["--machine", "m1", "--run-root"]).arg(self.path("run"));
        command.arg("--shm-root").arg(self.path("shm")).env_clear().env("PATH", self.path("tools"));
        let output = command.env("UNDERSTUDY_KVM_DEVICE", self.path("kvm")).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Call the hook, as the replicator does.
    pub fn hook(&self, arguments: &[&str]) -> i32 {
        let mut command = Command::new(self.path("libexec/understudy-ocf"));
        command.args(["hook", "--vmm-resource", "vm-m1", "--run-root"]).arg(self.path("run")).args(arguments);
        let output = command.env_clear().env("PATH", self.path("tools")).output().unwrap();
        println!("hook {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.status.code().unwrap()
    }

    pub fn act(&self, action: &str) -> i32 {
        self.act_with(action, &[]).code
    }

    /// A recurring monitor.
    pub fn monitor(&self) -> Answer {
        self.act_with("monitor", &[("OCF_RESKEY_CRM_meta_interval", "10000")])
    }

    pub fn probe(&self) -> i32 {
        self.act_with("monitor", &[("OCF_RESKEY_CRM_meta_interval", "0")]).code
    }

    /// What a fake was told, or what the cluster tools were called with.
    pub fn told(&self, file: &str) -> String {
        fs::read_to_string(self.path(file)).unwrap_or_default()
    }

    pub fn vmm_told(&self) -> String {
        self.told("run/m1/vmm.requests")
    }

    pub fn replicator_told(&self) -> String {
        self.told("run/m1/replicator.requests")
    }

    pub fn cluster_told(&self) -> String {
        self.told("tools/cluster.calls")
    }

    /// Process id of a service.
    pub fn pid(&self, file: &Path) -> Pid {
        Pid::from_raw(fs::read_to_string(file).unwrap().trim().parse().unwrap())
    }

    pub fn vmm_pid(&self) -> Pid {
        self.pid(&self.layout().vmm_pid())
    }

    /// Kill a process and wait until it is gone.
    pub fn crash(&self, pid: Pid) {
        kill(pid, Signal::SIGKILL).unwrap();
        assert!(gone(pid), "{pid} survives SIGKILL");
    }
}

/// Whether a process ends (or is a zombie that nobody has collected) within ten seconds.
pub fn gone(pid: Pid) -> bool {
    let dead = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    Deadline::after(Duration::from_secs(10)).wait_for(|| dead().then_some(())).is_some()
}

impl Drop for Node {
    fn drop(&mut self) {
        // Only processes whose pid files are in our own directory, and only if they are this very executable.
        let dirs = fs::read_dir(self.path("run")).into_iter().flatten().flatten();
        let files = dirs.filter_map(|dir| fs::read_dir(dir.path()).ok()).flatten();
        for file in files.flatten().map(|f| f.path()).filter(|f| f.extension().is_some_and(|e| e == "pid")) {
            let Ok(pid) = fs::read_to_string(&file).unwrap_or_default().trim().parse::<i32>() else { continue };
            if fs::read_link(format!("/proc/{pid}/exe")).ok() == std::env::current_exe().ok() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}
