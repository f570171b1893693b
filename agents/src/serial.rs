//! `ocf:understudy:serial`: one serial line of an interface board.
//!
//! Runs on the board (the host that the line is plugged into), not where the machine runs: the line stays attached because
//! machines reach it over the network. So its loss stops no machine; output waits until the line is back.

use std::net::ToSocketAddrs;
use std::time::Duration;

use ocf::action::{Action, ActionSpec};
use ocf::parameter::{Declaration, Param, Parameters};
use ocf::{Agent, CheckLevel, Context, Description, Failure, Status};
use understudy_protocol::control::{BoardRequest, BoardStatus, ControlError};
use understudy_protocol::key::DEFAULT_KEY_FILE;
use understudy_protocol::layout::{DEFAULT_RUN_ROOT, Layout};

use crate::binaries;
use crate::paths::{absolute, machine_name};
use crate::process::Identity;
use crate::service::{Observed, Service, ask, bring_up, check_key, stop};

const PROGRAM: &str = "understudy-serial";

/// Whose line.
pub static MACHINE: Param<String> = Param::text("machine")
    .required()
    .unique_group("line")
    .check(machine_name)
    .short("Machine name")
    .long("Name of the protected machine that the line belongs to: the parameter name of its ocf:understudy:vmm.");
/// Which line.
pub static DEVICE: Param<String> = Param::text("device")
    .required()
    .unique_group("line")
    .check(machine_name)
    .short("Device name")
    .long("Name of the line at this board, as the machine's serial0 or serial1 parameter has it after the slash, e.g. com1.");
/// What the line is.
pub static LINE: Param<String> = Param::text("line").required().check(line).short("The line").long(
    "What is behind it: tty:/dev/ttyS0,115200 (a serial port and its speed), pty:/path (a pseudo terminal, linked at that \
     path), tcp:HOST:PORT (connect) or tcp-listen:ADDR:PORT (accept).",
);
/// Where sessions are accepted.
pub static LISTEN: Param<String> = Param::text("listen")
    .required()
    .unique_group("listen")
    .check(listen)
    .short("Address to listen on")
    .long("HOST:PORT on which machines connect. Should be in the network of the peripherals.");
/// Key.
pub static KEY: Param<String> = Param::text("key")
    .default(DEFAULT_KEY_FILE)
    .check(absolute)
    .short("Key file")
    .long("File with the key that nodes and boards know each other by and encrypt with. The same everywhere, readable by root only.");
/// State.
pub static STATE_DIR: Param<String> = Param::text("state_dir")
    .default("/var/lib/understudy")
    .check(absolute)
    .short("State directory")
    .long(
        "Directory for what must survive a restart of the service: how far each direction has come, and the newest owner. On a \
         disk it survives the board's host too.",
    );
/// The write that was under way.
pub static AFTER_CRASH: Param<String> = Param::choice("after_crash", &["skip", "repeat"])
    .default("skip")
    .short("What becomes of an uncertain write")
    .long(
        "After the service was killed nobody can tell whether its last write (512 bytes at most) reached the line. skip: those \
         bytes are not written again; repeat: they are. Which bytes is in the service's log either way.",
    );
/// Sockets, pid files, logs.
pub static RUN_ROOT: Param<String> = Param::text("run_root")
    .default(DEFAULT_RUN_ROOT)
    .check(absolute)
    .short("Parent of run directories")
    .long("Directory below which the machine has one for sockets, pid files and logs. Must vanish when the board reboots (a tmpfs).");

const LONG: &str = "\
Owns a serial line of an interface board and lends it to whichever host runs the machine: every byte once and in order, in both \
directions, across failovers of the machine.

Let it run on the board that the line is plugged into (a location constraint), without order or colocation with the machine: the \
machine runs on while the board is away, its output waits, and nothing is lost.";

/// The agent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Serial;

fn line(value: &str) -> Result<(), String> {
    const KINDS: [&str; 4] = ["tty:", "pty:", "tcp:", "tcp-listen:"];
    if KINDS.iter().any(|kind| value.strip_prefix(kind).is_some_and(|rest| !rest.is_empty())) {
        return Ok(());
    }
    Err(format!("is \"{value}\"; it starts with tty:, pty:, tcp: or tcp-listen:"))
}

fn listen(value: &str) -> Result<(), String> {
    match value.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) => Ok(()),
        _ => Err(format!("is \"{value}\", which is not HOST:PORT")),
    }
}

fn declarations() -> Vec<&'static Declaration> {
    vec![
        MACHINE.declaration(),
        DEVICE.declaration(),
        LINE.declaration(),
        LISTEN.declaration(),
        KEY.declaration(),
        STATE_DIR.declaration(),
        AFTER_CRASH.declaration(),
        RUN_ROOT.declaration(),
    ]
}

fn command_line(p: &Parameters) -> ocf::Result<Vec<String>> {
    let mut words: Vec<String> = vec!["run".into()];
    let mut option = |name: &str, value: String| words.extend([format!("--{name}"), value]);
    option("machine", p.get(&MACHINE)?);
    option("device", p.get(&DEVICE)?);
    option("line", p.get(&LINE)?);
    option("listen", p.get(&LISTEN)?);
    option("key", p.get(&KEY)?);
    option("state-dir", p.get(&STATE_DIR)?);
    option("after-crash", p.get(&AFTER_CRASH)?);
    option("run-root", p.get(&RUN_ROOT)?);
    Ok(words)
}

struct Line<'a> {
    context: &'a Context,
    layout: Layout,
    device: String,
    title: String,
    service: Service,
}

impl<'a> Line<'a> {
    fn new(context: &'a Context) -> ocf::Result<Self> {
        let machine = context.parameters.get(&MACHINE)?;
        let device = context.parameters.get(&DEVICE)?;
        let run_root = context.parameters.get(&RUN_ROOT)?;
        let layout = Layout::new(&run_root, &run_root, &machine);
        let identity = Identity {
            pid_file: layout.serial_pid(&device),
            socket: layout.serial_socket(&device),
            program: PROGRAM,
            words: vec![machine.clone(), device.clone()],
        };
        let service = Service { identity, log: layout.serial_log(&device) };
        Ok(Self { context, layout, title: format!("{device} of {machine}"), device, service })
    }

    fn ask<R: serde::de::DeserializeOwned>(
        &self,
        request: &BoardRequest,
        patience: Duration,
    ) -> Result<R, ControlError> {
        ask(&self.layout.serial_socket(&self.device), request, patience)
    }

    fn observe(&self, limit: Duration) -> Observed<BoardStatus> {
        self.service.observe(|p| self.ask(&BoardRequest::Status, p), self.context.deadline.within(limit))
    }

    fn end(&self) -> ocf::Result {
        self.service.end(self.context, |patience| self.ask(&BoardRequest::Quit, patience))
    }

    fn launch(&self) -> ocf::Result {
        let program = binaries::locate(&self.context.environment, PROGRAM)?;
        let arguments = command_line(&self.context.parameters)?;
        self.service.launch(self.context, &program, &arguments, |patience| {
            self.ask::<BoardStatus>(&BoardRequest::Status, patience).map(drop)
        })
    }
}

impl Agent for Serial {
    fn description(&self) -> Description {
        Description {
            name: "serial",
            version: env!("CARGO_PKG_VERSION"),
            short: "Lends a serial line to a virtual machine",
            long: LONG,
            parameters: declarations(),
            actions: vec![
                ActionSpec::new(Action::Start, "20s"),
                ActionSpec::new(Action::Stop, "20s"),
                ActionSpec::new(Action::Monitor, "20s").every("10s"),
            ],
        }
    }

    fn validate(&self, context: &Context, level: CheckLevel) -> ocf::Result {
        if level == CheckLevel::Parameters {
            return Ok(());
        }
        binaries::locate(&context.environment, PROGRAM)?;
        check_key(&context.parameters.get(&KEY)?, "this board")?;
        let listen = context.parameters.get(&LISTEN)?;
        listen
            .to_socket_addrs()
            .map(drop)
            .map_err(|e| Failure::arguments(format!("parameter listen: {listen} means nothing on this board: {e}")))
    }

    fn start(&self, context: &Context) -> ocf::Result {
        let line = Line::new(context)?;
        let observed = line.observe(Duration::from_secs(5));
        bring_up(context, observed, &format!("{} is served already", line.title), || line.end(), || line.launch())
    }

    fn stop(&self, context: &Context) -> ocf::Result {
        stop(context, Line::new(context), |line| line.end())
    }

    fn monitor(&self, context: &Context) -> ocf::Result<Status> {
        let line = Line::new(context)?;
        match line.observe(context.deadline.remaining()) {
            Observed::Answers(status) => {
                if !status.line_open {
                    context.log.warning(format!("the line {} is not open; output waits for it", status.line));
                }
                Ok(Status::Running)
            }
            Observed::Silent(process, why) => Err(Failure::generic(format!(
                "the service of {} (process {}) lives and does not answer: {why}",
                line.title,
                process.pid()
            ))),
            Observed::Gone => line.service.absent(context, &format!("the service of {} has crashed", line.title)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_addresses_are_checked_before_anything_is_started() {
        for good in ["tty:/dev/ttyS0,115200", "pty:/run/x", "tcp:h:1", "tcp-listen:0.0.0.0:9"] {
            assert!(line(good).is_ok(), "{good}");
        }
        for bad in ["", "/dev/ttyS0", "tty:", "usb:1"] {
            assert!(line(bad).is_err(), "{bad}");
        }
        for (address, right) in
            [("10.0.0.1:7800", true), ("[::1]:7800", true), (":1", false), ("h", false), ("h:0", false)]
        {
            assert_eq!(listen(address).is_ok(), right, "{address}");
        }
    }
}
