//! `understudy-lab`: the lab by hand. `understudy-lab --help` lists what it can do.

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use understudy_tests::lab::bmc::FenceMode;
use understudy_tests::lab::vm::{self, Vm, VmSize};
use understudy_tests::lab::{Lab, LabOptions, Plane, bmc, fence, guest_disk, host, node, root, vm_init};

#[derive(Parser)]
#[command(name = "understudy-lab", about = "Real Pacemaker clusters on one host", version)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Build the lab root (a private Debian under target/lab) if it is not there yet
    Root {
        /// Also make the lab VM's disk image of it
        #[arg(long)]
        image: bool,
    },
    /// Build the disk of the guest with databases, if it is not there yet
    GuestDisk,
    /// Say where the lab runs on this machine, and why
    Where,
    /// Bring the cluster lab up: nodes n1 and n2 (or more), board b1, three network planes, fencing
    Up {
        #[command(flatten)]
        options: LabOptions,
        #[command(flatten)]
        vm: VmSize,
    },
    /// Take the cluster lab down (and the lab VM with it)
    Down,
    /// Power, cables and freezes of the nodes, and what Pacemaker thinks
    Status,
    /// What happened so far, as JSON lines
    Events,
    /// Run a command in a node (n1, n2, b1), or at the network's outer end (lab)
    Exec {
        node: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        argv: Vec<String>,
    },
    /// Cut a node's power: every process of it dies at once and unheard
    PowerCut { node: String },
    /// Press a node's power button: its services stop in order
    Shutdown { node: String },
    /// Switch a node on
    Boot { node: String },
    /// Stop every process of a node
    Freeze { node: String },
    /// Let a frozen node go on
    Thaw { node: String },
    /// Pull a node's cable of one plane
    Cut { node: String, plane: Plane },
    /// Plug in all cables of a node, or of all nodes
    Heal { node: Option<String> },
    /// Choose what fencing does: cut the power, or only pull the cables
    FenceMode { mode: FenceMode },
    /// The lab VM: where the host's KVM cannot run Linux, everything runs in it
    #[command(subcommand)]
    Vm(VmCmd),
    /// The lab's daemon
    #[command(hide = true)]
    Bmc {
        #[arg(long)]
        tied: bool,
    },
    /// A node's keeper
    #[command(hide = true)]
    NodeStart { node: String },
    /// A node's first process
    #[command(hide = true)]
    NodeInit { node: String },
    /// First process of the lab VM
    #[command(hide = true)]
    VmInit { stage: Option<String> },
    /// The lab VM's agent
    #[command(hide = true)]
    VmAgent,
}

#[derive(Subcommand)]
enum VmCmd {
    /// Start it if it is not up
    Up(VmSize),
    /// End it
    Down,
    /// Say whether it is up
    Status,
    /// Hold it still, its clocks too, while something is measured on this machine
    Pause,
    /// Let it go on
    Resume,
    /// Run a command in it; its outputs and exit code become this command's
    Exec {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        argv: Vec<String>,
    },
    /// Run a command in it, starting it before and ending it afterwards unless it is up already. (On a host with full KVM
    /// the command runs on the host.)
    Run {
        #[command(flatten)]
        size: VmSize,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        argv: Vec<String>,
    },
}

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let name = arguments.next().unwrap_or_default();
    if std::process::id() == 1 && name == "/init" {
        vm_init::main();
    }
    let result = if name.rsplit('/').next() == Some("fence_lab") {
        fence::run(&arguments.collect::<Vec<_>>(), &mut std::io::stdin().lock())
    } else {
        run(Cli::parse().command)
    };
    match result {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(e) => {
            eprintln!("{}: {e:#}", name.rsplit('/').next().unwrap_or("understudy-lab"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Cmd) -> Result<i32> {
    match command {
        Cmd::Root { image } => {
            let path = if image { root::ensure_image()? } else { root::ensure()? };
            println!("{}", path.display());
            Ok(0)
        }
        Cmd::GuestDisk => {
            println!("{}", guest_disk::ensure()?.display());
            Ok(0)
        }
        Cmd::Where => {
            println!("{}", host::choose()?.1);
            Ok(0)
        }
        Cmd::Vm(command) => vm_command(command),
        Cmd::VmInit { .. } => vm_init::second(),
        Cmd::VmAgent => vm_init::agent().map(|()| 0),
        Cmd::Bmc { tied } => bmc::serve(tied).map(|()| 0),
        Cmd::NodeStart { node } => node::start(&node).map(|()| 0),
        Cmd::NodeInit { node } => node::init(&node).map(|()| 0),
        command => match host::choose()? {
            (host::Where::Here, _) => lab_command(command),
            (host::Where::Vm, why) => in_vm(&command, &why),
        },
    }
}

/// Pass the whole command line on to this same program inside the lab VM.
fn in_vm(command: &Cmd, why: &str) -> Result<i32> {
    let vm = match (command, Vm::running()?) {
        (_, Some(vm)) => vm,
        (Cmd::Up { vm, .. }, None) => {
            eprintln!("lab: {why}");
            Vm::ensure(vm)?
        }
        (Cmd::Down, None) => return Ok(0),
        (_, None) => anyhow::bail!("the lab is not up: `understudy-lab up` brings it up"),
    };
    let argv: Vec<String> =
        std::iter::once("/lab/bin/understudy-lab".to_string()).chain(std::env::args().skip(1)).collect();
    let code = vm.exec(&argv)?;
    if matches!(command, Cmd::Down) {
        vm.down()?;
    }
    Ok(code)
}

/// Print, without a complaint when the reader (`head`, `grep -q`) has seen enough.
fn say(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

fn lab_command(command: Cmd) -> Result<i32> {
    match command {
        Cmd::Up { options, .. } => {
            let started = std::time::Instant::now();
            Lab::up(&options)?;
            eprintln!("lab: all nodes are up after {:.1} s", started.elapsed().as_secs_f32());
        }
        Cmd::Down => Lab::down()?,
        Cmd::Status => {
            let lab = Lab::running()?;
            let status = lab.status()?;
            let mut text = format!("fencing: {:?}\n", status.fence_mode);
            for (name, node) in status.nodes.iter().filter(|(_, node)| node.boots > 0) {
                let power = if node.on { "on" } else { "off" };
                let frozen = if node.frozen { ", frozen" } else { "" };
                let cut: String = node.cut.iter().map(|p| format!(", {} cut", p.name())).collect();
                text.push_str(&format!("{name}: {power}{frozen}{cut}, boots {}\n", node.boots));
            }
            for node in ["n1", "n2"] {
                if status.nodes.get(node).is_some_and(|n| n.on && !n.frozen) {
                    text.push('\n');
                    text.push_str(&lab.run(node, &["crm_mon", "-1", "--inactive"])?);
                    break;
                }
            }
            say(&text)?;
        }
        Cmd::Events => {
            let lines = Lab::running()?.events()?.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>()?;
            say(&format!("{}\n", lines.join("\n")))?;
        }
        Cmd::Exec { node, argv } => {
            let status = Lab::running()?.command(&node, &argv[0])?.args(&argv[1..]).status()?;
            return Ok(status.code().unwrap_or(128));
        }
        Cmd::PowerCut { node } => Lab::running()?.power_cut(&node)?,
        Cmd::Shutdown { node } => Lab::running()?.shutdown(&node)?,
        Cmd::Boot { node } => Lab::running()?.boot(&node)?,
        Cmd::Freeze { node } => Lab::running()?.freeze(&node)?,
        Cmd::Thaw { node } => Lab::running()?.thaw(&node)?,
        Cmd::Cut { node, plane } => Lab::running()?.cut(&node, plane)?,
        Cmd::Heal { node } => Lab::running()?.heal(node.as_deref())?,
        Cmd::FenceMode { mode } => Lab::running()?.fence_mode(mode)?,
        _ => anyhow::bail!("this command does not belong to the cluster lab"),
    }
    Ok(0)
}

fn the_vm() -> Result<Vm> {
    Vm::running()?.context("the lab VM is not up: `understudy-lab vm up` starts it")
}

fn vm_command(command: VmCmd) -> Result<i32> {
    match command {
        VmCmd::Up(size) => {
            Vm::ensure(&size)?;
        }
        VmCmd::Down => {
            if let Some(vm) = Vm::running()? {
                vm.down()?;
            }
        }
        VmCmd::Status => println!("{}", if Vm::running()?.is_some() { "up" } else { "down" }),
        VmCmd::Pause => the_vm()?.hold(true)?,
        VmCmd::Resume => the_vm()?.hold(false)?,
        VmCmd::Exec { argv } => return the_vm()?.exec(&argv),
        VmCmd::Run { size, argv } => {
            if host::choose()?.0 == host::Where::Here {
                return vm::here(&argv);
            }
            if let Some(vm) = Vm::running()? {
                return vm.exec(&argv);
            }
            let vm = Vm::tied(&size)?;
            let code = vm.exec(&argv);
            vm.down()?;
            return code;
        }
    }
    Ok(0)
}
