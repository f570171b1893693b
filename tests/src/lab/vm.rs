//! The lab VM: QEMU in software emulation with nested AMD-V, for hosts whose own KVM cannot run Linux.
//!
//! One VM per name (`UNDERSTUDY_VM`, default `main`), its files in `target/lab/vm-NAME`. It has no network but a
//! forwarded port on 127.0.0.1, sees the lab root as a read-only disk, this build's executables as a read-only share, the
//! workspace and the lab directory as writable ones, and forgets everything else when it goes down. What the cluster lab
//! would leave in `target/lab/out` on a host it leaves in `target/lab/vm-NAME/out` from in here.

use std::fs;
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use understudy_protocol::control::encode_line;

use super::channel::{AGENT_PORT, ExecRequest, Kind, read_frame, write_frame};
use super::{host, places, root, vm_image};

/// How long the VM may take until its agent answers. (10 to 20 s on an idle machine.)
const BOOT_BOUND: Duration = Duration::from_secs(240);

/// QEMU's monitor, in the VM's directory.
const MONITOR: &str = "monitor";

/// A lab VM that is up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Vm {
    pid: i32,
    port: u16,
    token: String,
    pid_file: PathBuf,
}

/// Size of the VM.
#[derive(Debug, Clone, clap::Args)]
pub struct VmSize {
    /// Memory of the lab VM in MiB; nodes' /dev/shm and guests' RAM come out of it [default: 6144, or 4096 where there is
    /// not so much]
    #[arg(long)]
    pub memory: Option<u32>,
    /// Virtual CPUs of the lab VM
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
}

impl VmSize {
    fn memory_mib(&self) -> Result<u32> {
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let available = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")?.split_ascii_whitespace().next());
        let available: u32 = available.and_then(|kib| kib.parse::<u32>().ok()).unwrap_or(u32::MAX) / 1024;
        choose_memory(self.memory, available)
    }
}

/// QEMU itself and the host's page cache want some too.
fn choose_memory(wanted: Option<u32>, available: u32) -> Result<u32> {
    const BESIDE: u32 = 768;
    let choices = wanted.map_or(vec![6144, 4096], |w| vec![w]);
    match choices.iter().find(|c| c.saturating_add(BESIDE) <= available) {
        Some(memory) => Ok(*memory),
        None => bail!(
            "the lab VM needs {} MiB of memory and {BESIDE} MiB beside it, and {available} MiB are available: \
             free some, or ask for less with --memory",
            choices.last().unwrap_or(&0)
        ),
    }
}

fn vm_name() -> Result<String> {
    let name = std::env::var("UNDERSTUDY_VM").unwrap_or_else(|_| "main".into());
    if !understudy_protocol::layout::valid_machine_name(&name) {
        bail!("UNDERSTUDY_VM is \"{name}\": use letters, digits, - and _");
    }
    Ok(name)
}

fn vm_dir() -> Result<PathBuf> {
    Ok(places::lab_dir()?.join(format!("vm-{}", vm_name()?)))
}

/// The lab root's libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// The lab root's own QEMU, started with the lab root's own loader and libraries. Not the host's: Debian 12's QEMU 7.2 emulates
/// nested AMD-V so that kernels in the lab VM and guests in it die of corrupted memory after a while.
fn qemu(lab_root: &Path) -> [std::ffi::OsString; 4] {
    [
        lab_root.join("lib64/ld-linux-x86-64.so.2").into(),
        "--library-path".into(),
        lab_root.join(LIBRARIES).into(),
        lab_root.join("usr/bin/qemu-system-x86_64").into(),
    ]
}

/// The lab root's QEMU, ready for a machine's arguments; the benchmarks run others than the lab VM with it.
pub fn qemu_command(lab_root: &Path) -> Command {
    let [loader, rest @ ..] = qemu(lab_root);
    let mut command = Command::new(loader);
    command.args(rest).env("QEMU_MODULE_DIR", lab_root.join(LIBRARIES).join("qemu"));
    command.arg("-L").arg(lab_root.join("usr/share/seabios")).arg("-L").arg(lab_root.join("usr/share/qemu"));
    command
}

impl Vm {
    /// The VM that is up, if any.
    pub fn running() -> Result<Option<Self>> {
        let file = vm_dir()?.join("vm.json");
        let Ok(text) = fs::read(&file) else { return Ok(None) };
        let vm: Self = serde_json::from_slice(&text).with_context(|| format!("reading {}", file.display()))?;
        Ok(vm.is_alive().then_some(vm))
    }

    /// The VM that is up, or a new one.
    pub fn ensure(size: &VmSize) -> Result<Self> {
        match Self::running()? {
            Some(vm) => Ok(vm),
            None => Self::up(size, false),
        }
    }

    /// A new VM that ends with this process, however that ends. Must be called in the main thread.
    pub fn tied(size: &VmSize) -> Result<Self> {
        Self::up(size, true)
    }

    fn up(size: &VmSize, tied: bool) -> Result<Self> {
        host::need_root("The lab VM")?;
        host::need_tools(&[("setpriv", "util-linux")])?;
        let image = root::ensure_image()?;
        let lab_root = places::root_dir()?;
        let dir = vm_dir()?;
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let out = dir.join("out");
        fs::create_dir_all(&out)?;
        let started = Instant::now();
        let token = random_token()?;
        let exe = std::env::current_exe().context("finding this executable")?;
        let init_path = dir.join("initramfs");
        // The token goes this way because the kernel's command line is on QEMU's, which every user can read.
        private_file(&init_path, &vm_image::build(&lab_root, &exe, &token)?)?;
        let port = free_port()?;
        let console = dir.join("console.log");
        let pid_file = dir.join("qemu.pid");
        let _ = fs::remove_file(&pid_file);
        let bin = places::bin_dir()?;
        let mut command = if tied {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "SIGKILL"]).args(qemu(&lab_root));
            command
        } else {
            let [loader, rest @ ..] = qemu(&lab_root);
            let mut command = Command::new(loader);
            command.args(rest).arg("-daemonize");
            command
        };
        command.env("QEMU_MODULE_DIR", lab_root.join(LIBRARIES).join("qemu"));
        command.arg("-L").arg(lab_root.join("usr/share/seabios")).arg("-L").arg(lab_root.join("usr/share/qemu"));
        command.args(["-name", "understudy-lab", "-machine", "pc,graphics=off", "-nodefaults", "-no-user-config"]);
        command.args(["-accel", "tcg,thread=single,tb-size=512", "-cpu", "max,+svm,+npt"]);
        command.args(["-smp", &size.cpus.to_string(), "-m", &format!("{}M", size.memory_mib()?)]);
        command.args(["-display", "none", "-no-reboot", "-pidfile"]).arg(&pid_file);
        command.arg("-kernel").arg(lab_root.join("boot/vmlinuz")).arg("-initrd").arg(&init_path);
        command.args([
            "-append",
            &format!(
                "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 random.trust_cpu=on \
                 net.ifnames=0 lab.vm={}",
                vm_name()?
            ),
        ]);
        // Appended to: QEMU's own complaints come first.
        command.arg("-chardev").arg(format!("file,id=console,append=on,path={}", console.display()));
        command.args(["-serial", "chardev:console"]);
        let _ = fs::remove_file(&console);
        // Relative, since a socket's path must be short. Only this user may write to it, so only this user may connect.
        let _ = fs::remove_file(dir.join(MONITOR));
        command.current_dir(&dir).args(["-chardev", &format!("socket,id=monitor,path={MONITOR},server=on,wait=off")]);
        command.args(["-mon", "chardev=monitor,mode=readline"]);
        command.arg("-drive").arg(format!("if=virtio,format=raw,readonly=on,file={}", image.display()));
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-net-pci,netdev=host,romfile="]);
        command.args([
            "-netdev",
            &format!("user,id=host,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{AGENT_PORT}"),
        ]);
        let mut share = |tag: &str, path: &Path, readonly: &str| {
            command.arg("-virtfs").arg(format!(
                "local,path={},mount_tag={tag},security_model=none,readonly={readonly},multidevs=remap",
                path.display()
            ));
        };
        share("bin", &bin, "on");
        share("lab", &places::lab_dir()?, "off");
        if let Some(workspace) = places::workspace_dir() {
            share("workspace", &workspace, "off");
        }
        eprintln!("lab: starting the lab VM");
        let pid = if tied {
            let log = fs::File::create(&console).context("creating the lab VM's console log")?;
            let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
            i32::try_from(child.context("starting the lab VM")?.id()).context("a process id out of range")?
        } else {
            host::run_quiet(&mut command).context("starting the lab VM")?;
            let written = fs::read_to_string(&pid_file).ok().and_then(|t| t.trim().parse().ok());
            written.context("QEMU wrote no process id")?
        };
        let vm = Self { pid, port, token, pid_file };
        let record = serde_json::to_vec(&vm).context("writing down the lab VM")?;
        private_file(&dir.join("vm.json"), &record)?;
        while !vm.answers() {
            let failed = !vm.is_alive();
            if failed || started.elapsed() > BOOT_BOUND {
                let why = if failed { "ended while starting" } else { "does not answer" };
                let _ = vm.down();
                bail!("the lab VM {why}; the end of {}:\n{}", console.display(), root::tail(&console, 20));
            }
            thread::sleep(Duration::from_millis(200));
        }
        eprintln!("lab: the lab VM is up after {:.1} s", started.elapsed().as_secs_f32());
        Ok(vm)
    }

    fn is_alive(&self) -> bool {
        let proc = PathBuf::from(format!("/proc/{}", self.pid));
        // The pid may have been given to another process since: look at what it is.
        let Ok(words) = fs::read(proc.join("cmdline")) else { return false };
        if words.is_empty() {
            // Dead and not yet reaped, or alive in the middle of its exec.
            let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
            return stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']));
        }
        words.split(|b| *b == 0).any(|w| w == self.pid_file.as_os_str().as_encoded_bytes())
    }

    fn answers(&self) -> bool {
        let request = self.request(&[]);
        self.exec_with(request, io::empty(), &mut io::sink(), &mut io::sink(), Some(Duration::from_secs(3)))
            .is_ok_and(|code| code == 0)
    }

    /// End the VM at once; it has nothing to save.
    pub fn down(&self) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        kill(Pid::from_raw(self.pid), Signal::SIGKILL).context("ending the lab VM")?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!("the lab VM (process {}) does not end", self.pid);
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Hold the VM still, its clocks too, while something is measured beside it; or let it go on. Nobody in it notices.
    pub fn hold(&self, still: bool) -> Result<()> {
        let dir = fs::File::open(vm_dir()?).context("opening the lab VM's directory")?;
        let path = format!("/proc/self/fd/{}/{MONITOR}", std::os::fd::AsRawFd::as_raw_fd(&dir));
        let mut monitor = UnixStream::connect(path).context("connecting to the lab VM's monitor")?;
        monitor.set_read_timeout(Some(Duration::from_secs(20)))?;
        let command = if still { "stop" } else { "cont" };
        let wanted = if still { "VM status: paused" } else { "VM status: running" };
        monitor.write_all(format!("{command}\ninfo status\n").as_bytes()).context("telling the lab VM's monitor")?;
        let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&said).contains(wanted) {
            match monitor.read(&mut buffer).context("the lab VM's monitor does not answer")? {
                0 => bail!("the lab VM's monitor hung up"),
                n => said.extend_from_slice(&buffer[..n]),
            }
        }
        Ok(())
    }

    fn request(&self, argv: &[String]) -> ExecRequest {
        let env = std::env::vars()
            .filter(|(k, _)| k == "TERM" || k.starts_with("RUST_") || k.starts_with("UNDERSTUDY_TEST"))
            .collect();
        ExecRequest { token: self.token.clone(), argv: argv.to_vec(), env, cwd: None }
    }

    /// Run a command in the VM with this process's standard input and outputs; its exit code.
    pub fn exec(&self, argv: &[String]) -> Result<i32> {
        // A terminal's input would be swallowed by commands that never read; scripts and pipes pass it on.
        let interactive = io::stdin().is_terminal();
        let input: Box<dyn Read + Send> = if interactive { Box::new(io::empty()) } else { Box::new(io::stdin()) };
        self.exec_with(self.request(argv), input, &mut io::stdout(), &mut io::stderr(), None)
    }

    /// Run a command in the VM without input; its exit code and everything it wrote (both outputs).
    pub fn output(&self, argv: &[&str]) -> Result<(i32, String)> {
        let argv: Vec<String> = argv.iter().map(ToString::to_string).collect();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = self.exec_with(self.request(&argv), io::empty(), &mut out, &mut err, None)?;
        out.extend_from_slice(&err);
        Ok((code, String::from_utf8_lossy(&out).into_owned()))
    }

    fn exec_with(
        &self,
        request: ExecRequest,
        mut input: impl Read + Send + 'static,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
        silence: Option<Duration>,
    ) -> Result<i32> {
        let connect = || -> io::Result<TcpStream> {
            let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(silence)?;
            Ok(stream)
        };
        let mut stream = connect().context("connecting to the lab VM (is it up? `understudy-lab vm up`)")?;
        stream.write_all(&encode_line(&request)).context("asking the lab VM")?;
        let mut to_vm = stream.try_clone().context("sharing the connection to the lab VM")?;
        thread::spawn(move || {
            let mut buffer = vec![0; 32 * 1024];
            while let Ok(n @ 1..) = input.read(&mut buffer) {
                if write_frame(&mut to_vm, Kind::Stdin, &buffer[..n]).is_err() {
                    return;
                }
            }
            let _ = write_frame(&mut to_vm, Kind::Stdin, &[]);
        });
        let mut from_vm = BufReader::new(stream);
        loop {
            match read_frame(&mut from_vm).context("listening to the lab VM")? {
                Some((Kind::Stdout, data)) => {
                    stdout.write_all(&data)?;
                    stdout.flush()?;
                }
                Some((Kind::Stderr, data)) => {
                    stderr.write_all(&data)?;
                    stderr.flush()?;
                }
                Some((Kind::Exit, data)) => {
                    let code: [u8; 4] = data.as_slice().try_into().context("the lab VM sent no whole exit code")?;
                    return Ok(i32::from_le_bytes(code));
                }
                Some((Kind::Stdin, _)) => bail!("the lab VM sent a frame that only the host sends"),
                None => bail!("the lab VM hung up before the command's end (did it go down?)"),
            }
        }
    }
}

fn private_file(path: &Path, content: &[u8]) -> Result<()> {
    let _ = fs::remove_file(path);
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(content)).with_context(|| format!("writing {}", path.display()))
}

fn free_port() -> Result<u16> {
    // Another process may take it in between; QEMU then says so and the user starts again.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    Ok(listener.local_addr().context("looking for a free port")?.port())
}

/// 128 random bits in hexadecimal.
pub fn random_token() -> Result<String> {
    let mut bytes = [0u8; 16];
    fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Run a command of this build (or any other) on this machine, as [`Vm::exec`] does in the VM; its exit code.
pub fn here(argv: &[String]) -> Result<i32> {
    let Some(program) = argv.first() else { bail!("no command given") };
    let own = places::bin_dir()?.join(program);
    let status = Command::new(if own.is_file() { own.as_path() } else { Path::new(program) }).args(&argv[1..]).status();
    Ok(status.with_context(|| format!("running {program}"))?.code().unwrap_or(128))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_host_gets_a_small_vm_and_a_tiny_one_a_sentence() {
        assert_eq!(choose_memory(None, 16_000).unwrap(), 6144);
        assert_eq!(choose_memory(None, 5_000).unwrap(), 4096);
        assert!(choose_memory(None, 3_000).unwrap_err().to_string().contains("--memory"));
        assert!(choose_memory(Some(8192), 8192).is_err());
    }
}
