//! `understudy-lab`: the lab by hand. `understudy-lab --help` lists what it can do.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use understudy_tests::lab::vm::{self, Vm, VmSize};
use understudy_tests::lab::{host, root, vm_init};

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
    /// Say where the lab runs on this machine, and why
    Where,
    /// The lab VM: where the host's KVM cannot run Linux, everything runs in it
    #[command(subcommand)]
    Vm(VmCmd),
    /// First process of the lab VM
    #[command(hide = true)]
    VmInit { stage: Option<String> },
    /// The lab VM's agent
    #[command(hide = true)]
    VmAgent { token: String },
}

#[derive(Subcommand)]
enum VmCmd {
    /// Start it if it is not up
    Up(VmSize),
    /// End it
    Down,
    /// Say whether it is up
    Status,
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
    if std::process::id() == 1 && std::env::args_os().next().is_some_and(|a| a == "/init") {
        vm_init::main();
    }
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        Err(e) => {
            eprintln!("understudy-lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Cmd) -> Result<i32> {
    match command {
        Cmd::Root { image } => {
            let path = if image { root::ensure_image()? } else { root::ensure()? };
            println!("{}", path.display());
        }
        Cmd::Where => println!("{}", host::choose()?.1),
        Cmd::Vm(command) => return vm_command(command),
        Cmd::VmInit { .. } => vm_init::second(),
        Cmd::VmAgent { token } => vm_init::agent(&token)?,
    }
    Ok(0)
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
        VmCmd::Exec { argv } => match Vm::running()? {
            Some(vm) => return vm.exec(&argv),
            None => anyhow::bail!("the lab VM is not up: `understudy-lab vm up` starts it"),
        },
        VmCmd::Run { size, argv } => {
            if host::choose()?.0 == host::Where::Here {
                return vm::here(&argv);
            }
            let was_up = Vm::running()?.is_some();
            let vm = Vm::ensure(&size)?;
            let code = vm.exec(&argv);
            if !was_up {
                vm.down()?;
            }
            return code;
        }
    }
    Ok(0)
}
