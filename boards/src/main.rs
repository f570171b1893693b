//! `understudy-serial`: the serial board service, and what an administrator needs around it.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::{Args, Parser, Subcommand};
use serde::de::DeserializeOwned;
use understudy_boards::journal::AfterCrash;
use understudy_boards::line::LineSpec;
use understudy_boards::service::{self, ServiceConfig};
use understudy_protocol::control::{BoardRequest, BoardStatus, call_once};
use understudy_protocol::key::{DEFAULT_KEY_FILE, Key};
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, Layout, valid_machine_name};

const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Owns a serial line and lends it to whichever host runs the machine: every byte once, in both directions, whatever
/// happens to the hosts.
#[derive(Debug, Parser)]
#[command(name = "understudy-serial", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a line, in the foreground, until SIGTERM.
    Run(Run),
    /// Show what a running service does, as JSON.
    Status(Which),
    /// End a running service in order.
    Stop(Which),
    /// Make a new key for the cluster. Copy the file to every node and board.
    Keygen {
        /// File to create, mode 0400.
        #[arg(default_value = DEFAULT_KEY_FILE)]
        file: PathBuf,
    },
    /// Say whether a key file is usable.
    CheckKey {
        /// The file.
        #[arg(default_value = DEFAULT_KEY_FILE)]
        file: PathBuf,
    },
}

/// Which service.
#[derive(Debug, Args)]
struct Which {
    /// The machine that it serves.
    #[arg(long)]
    machine: String,
    /// The device's name.
    #[arg(long)]
    device: String,
    /// Parent of the machines' run directories.
    #[arg(long, default_value = DEFAULT_RUN_ROOT, conflicts_with = "run_dir")]
    run_root: PathBuf,
    /// The run directory itself, instead of RUN_ROOT/MACHINE: control socket and pid file stand in it.
    #[arg(long)]
    run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    which: Which,
    /// Address and port on which machines connect.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    /// The cluster's key.
    #[arg(long, default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
    /// The line: tty:/dev/ttyS0,115200 or pty:/path/of/link or tcp:HOST:PORT or tcp-listen:ADDR:PORT.
    #[arg(long)]
    line: LineSpec,
    /// Directory for what must survive a restart of the service. On a disk the newest owner survives the board's host
    /// too; on a tmpfs only the service.
    #[arg(long, default_value = "/var/lib/understudy")]
    state_dir: PathBuf,
    /// What becomes of the one write (512 bytes at most) that was under way when the service was killed.
    #[arg(long, value_enum, default_value = "skip")]
    after_crash: AfterCrash,
}

impl Which {
    fn layout(&self) -> Result<Layout> {
        for (what, name) in [("machine", &self.machine), ("device", &self.device)] {
            if !valid_machine_name(name) {
                bail!("{name:?} cannot be the name of a {what}: use 1 to 63 letters, digits, - and _");
            }
        }
        Ok(match &self.run_dir {
            Some(dir) => Layout::in_run_dir(dir),
            None => Layout::new(&self.run_root, &self.run_root, &self.machine),
        })
    }
}

fn main() -> ExitCode {
    match act(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("understudy-serial: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(command: Command) -> Result<()> {
    match command {
        Command::Run(run) => {
            let layout = run.which.layout()?;
            service::run(ServiceConfig {
                machine: run.which.machine,
                device: run.which.device,
                listen: run.listen,
                key_file: run.key,
                line: run.line,
                state_dir: run.state_dir,
                layout,
                after_crash: run.after_crash,
            })
        }
        Command::Status(which) => {
            let socket = which.layout()?.serial_socket(&which.device);
            let status: BoardStatus = ask(&socket, &BoardRequest::Status)?;
            println!("{}", serde_json::to_string_pretty(&status)?);
            Ok(())
        }
        Command::Stop(which) => {
            let socket = which.layout()?.serial_socket(&which.device);
            ask(&socket, &BoardRequest::Quit)
        }
        Command::Keygen { file } => {
            Key::generate(&file)?;
            println!("made {}: copy it to every node and board, readable for its owner alone", file.display());
            Ok(())
        }
        Command::CheckKey { file } => {
            Key::load(&file)?;
            println!("{} is usable", file.display());
            Ok(())
        }
    }
}

fn ask<R: DeserializeOwned>(socket: &Path, request: &BoardRequest) -> Result<R> {
    // Its sentence names the cause already.
    call_once(socket, request, CALL_TIMEOUT).map_err(|e| anyhow!(e.to_string()))
}
