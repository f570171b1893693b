//! `understudy-alert`: Pacemaker's alert agent; the sender behind it; answers from outside.
//!
//! Without arguments and with `CRM_alert_kind` in the environment it is the agent: it queues and ends.
#![forbid(unsafe_code)]

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use nix::unistd::{Gid, Uid};
use understudy_alerts::alarm::{Alarm, Severity, Sink, Trouble};
use understudy_alerts::answering::{self, AnswerError};
use understudy_alerts::approval::{Given, Way};
use understudy_alerts::cluster::Cib;
use understudy_alerts::outbox::{self, Outbox};
use understudy_alerts::sender::{self, Turn, World};
use understudy_alerts::settings::{Delivery, Recipient};
use understudy_alerts::spool::{Item, Spool};
use understudy_alerts::{agent, deliver, node_name, now, reply};
use understudy_protocol::key::{DEFAULT_KEY_FILE, Key};

/// Tell people what happens in the cluster, and take their answers. Called by Pacemaker as its alert agent.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The queue.
    #[arg(long, value_name = "DIRECTORY", env = outbox::DIR_VARIABLE, default_value = understudy_alerts::spool::DEFAULT_DIR, global = true)]
    spool: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Send what waits, and end when nothing does. Started by whoever queues something.
    Send {
        /// On its own, away from whoever started it.
        #[arg(long)]
        background: bool,
    },
    /// Tell all recipients of the policy something.
    Tell(Tell),
    /// Take an answer from standard input: exit status 0 if it counts, 65 if not (standard output says why), 75 if the cluster could
    /// not be asked and it should be tried again.
    Answer {
        /// What it is.
        #[arg(value_enum)]
        form: Form,
        /// The cluster's key.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_KEY_FILE)]
        key: PathBuf,
    },
    /// List what waits.
    Queue,
}

#[derive(Args)]
struct Tell {
    /// How bad it is.
    #[arg(long, value_enum, default_value_t = Level::Warning)]
    severity: Level,
    /// The machine that it is about.
    #[arg(long)]
    machine: Option<String>,
    /// The node that it is about.
    #[arg(long)]
    node: Option<String>,
    /// The same as others with this key: told once in a while, and counted.
    #[arg(long, default_value = "")]
    key: String,
    /// One line.
    subject: String,
    /// All of it; "-" reads it from standard input.
    #[arg(default_value = "")]
    text: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Level {
    Info,
    Warning,
    Critical,
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    /// A mail (RFC 5322), as a mail server pipes it.
    Mail,
    /// JSON: {"answer": "approve", "id": …, "code": …} or {"text": "APPROVE ID CODE"}.
    Hook,
}

/// EX_DATAERR of sysexits: mail servers send the mail back with what we print.
const NOT_TAKEN: u8 = 65;
/// EX_TEMPFAIL of sysexits: mail servers try again.
const TRY_AGAIN: u8 = 75;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("understudy-alert: {why:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        None if std::env::var_os("CRM_alert_kind").is_some() => agent(&arguments.spool),
        None => bail!("nothing to do: Pacemaker calls this as its alert agent; --help says what else it does"),
        Some(Command::Send { background }) => send(&arguments.spool, *background),
        Some(Command::Tell(tell)) => self::tell(arguments, tell),
        Some(Command::Answer { form, key }) => answer(arguments, *form, key),
        Some(Command::Queue) => queue(&arguments.spool),
    }
}

/// Called by Pacemaker: queue and end.
fn agent(spool: &Path) -> Result<ExitCode> {
    let get = |name: &str| std::env::var(name).ok();
    // Without recipients Pacemaker calls it all the same.
    let Some(to) = get("CRM_alert_recipient").filter(|to| !to.is_empty()) else { return Ok(ExitCode::SUCCESS) };
    let Some((alarm, everywhere)) = agent::alarm(&get) else { return Ok(ExitCode::SUCCESS) };
    let recipient = Recipient::read(&to, &get)?;
    if alarm.severity < recipient.severity {
        return Ok(ExitCode::SUCCESS);
    }
    let item = Item { at: now(), alarm, recipient, delivery: Delivery::read(&get)?, everywhere, tries: 0, next: 0 };
    Spool::open(spool)?.take(item)?;
    // Whatever is beside us, also for what waits from before a restart.
    if let Some(program) = outbox::sender() {
        outbox::start(&program, spool);
    }
    Ok(ExitCode::SUCCESS)
}

struct Node;

impl World for Node {
    fn now(&self) -> u64 {
        now()
    }

    fn pause(&self, at_most: Duration) {
        std::thread::sleep(at_most.min(Duration::from_secs(1)));
    }

    /// The first of the partition by name. A node that cannot say who is there tells it: better twice than never.
    fn turn(&self) -> Turn {
        match Cib::default().members() {
            Ok(members) if members.iter().min().is_some_and(|first| *first != node_name()) => Turn::Anothers,
            _ => Turn::Ours,
        }
    }

    fn current(&self, recipient: &Recipient) -> Option<(Recipient, Delivery)> {
        let settings = Cib::default().settings().ok()?;
        let now = settings.recipients.into_iter().find(|r| r.name == recipient.name)?;
        Some((now, settings.delivery))
    }

    fn tell(&self, item: &Item) -> Result<(), Trouble> {
        deliver::sink(&item.recipient, &item.delivery, deliver::TIMEOUT).tell(&item.alarm)
    }
}

fn send(spool: &Path, background: bool) -> Result<ExitCode> {
    if background {
        // Away from Pacemaker's process group, which it kills with an agent that takes too long.
        let _ = nix::unistd::setsid();
    }
    let spool = Spool::open(spool)?;
    become_owner(spool.dir())?;
    sender::run(&spool, &Node)?;
    Ok(ExitCode::SUCCESS)
}

/// Root sends as the user whose the queue is: recipients' commands, and what mail servers say, are no business of root's.
fn become_owner(dir: &Path) -> Result<()> {
    let owner = std::fs::metadata(dir).with_context(|| format!("looking at {}", dir.display()))?;
    if nix::unistd::geteuid().is_root() && owner.uid() != 0 {
        let (uid, gid) = (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()));
        let became = nix::unistd::setgroups(&[gid]).and_then(|()| nix::unistd::setgid(gid));
        became.and_then(|()| nix::unistd::setuid(uid)).with_context(|| format!("becoming user {uid}"))?;
    }
    Ok(())
}

fn outbox(arguments: &Arguments) -> Result<Outbox> {
    let settings = Cib::default().settings().context("cannot learn who is to be told")?;
    Ok(Outbox::new(Spool::open(&arguments.spool)?, settings, outbox::sender()))
}

fn tell(arguments: &Arguments, tell: &Tell) -> Result<ExitCode> {
    let outbox = outbox(arguments)?;
    if outbox.settings().recipients.is_empty() {
        bail!("the policy that was applied names no recipients: add [[alerts]] to it and `understudy-crm apply` it");
    }
    let severity = match tell.severity {
        Level::Info => Severity::Info,
        Level::Warning => Severity::Warning,
        Level::Critical => Severity::Critical,
    };
    let text = if tell.text == "-" { input()? } else { tell.text.clone().into_bytes() };
    let alarm = Alarm::new(severity, &tell.subject, String::from_utf8_lossy(&text));
    let alarm = Alarm { machine: tell.machine.clone(), node: tell.node.clone(), key: tell.key.clone(), ..alarm };
    outbox.tell(&alarm)?;
    Ok(ExitCode::SUCCESS)
}

/// Standard input, no more than is read of it.
fn input() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = reply::MAX_REPLY as u64 + 1;
    std::io::stdin().take(most).read_to_end(&mut bytes).context("reading standard input")?;
    Ok(bytes)
}

fn answer(arguments: &Arguments, form: Form, key: &Path) -> Result<ExitCode> {
    let key = Key::load(key)?;
    let bytes = input()?;
    let (reply, way) = match form {
        Form::Mail => (reply::from_mail(&bytes), Way::Mail),
        Form::Hook => (reply::from_hook(&bytes), Way::Hook),
    };
    let reply = match reply {
        Ok(reply) => reply,
        Err(why) => {
            // Nobody is told: whoever can send mails could make us send some.
            println!("{why}");
            return Ok(ExitCode::from(NOT_TAKEN));
        }
    };
    let outbox = match outbox(arguments) {
        Ok(outbox) => outbox,
        Err(why) => {
            println!("{why:#}");
            return Ok(ExitCode::from(TRY_AGAIN));
        }
    };
    let given = Given { answer: reply.answer, code: &reply.code, name: None, way };
    let result = answering::answer(&Cib::default(), &key, &reply.id, &given, now(), &|line| outbox.spool().note(line));
    if let Err(AnswerError::Cluster(why)) = &result {
        println!("{why}");
        return Ok(ExitCode::from(TRY_AGAIN));
    }
    // An unknown question concerns nobody.
    if !matches!(result, Err(AnswerError::Unknown(_))) {
        let alarm = answering::outcome(&reply.id, way, &result);
        for recipient in outbox.settings().recipients.iter().filter(|recipient| recipient.approves) {
            if let Err(why) = outbox.tell_one(recipient, &alarm) {
                eprintln!("understudy-alert: {why}");
            }
        }
    }
    match result {
        Ok(decision) => {
            println!("question {} is {} by {}", reply.id, decision.answer, decision.by);
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            println!("{why}");
            Ok(ExitCode::from(NOT_TAKEN))
        }
    }
}

fn queue(spool: &Path) -> Result<ExitCode> {
    let spool = Spool::open(spool)?;
    let names = spool.names()?;
    for name in &names {
        if let Some(item) = spool.get(name) {
            let tries = if item.tries == 0 { String::new() } else { format!(", tried {} times", item.tries) };
            println!(
                "{} for {}: {}{tries}",
                understudy_alerts::approval::utc(item.at),
                item.recipient.name,
                item.alarm.subject
            );
        }
    }
    println!("{} waiting; what happened to others is in {}", names.len(), spool.journal().path().display());
    Ok(ExitCode::SUCCESS)
}
