//! `understudy-crm`: check a policy, print what it becomes, put it into the cluster.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use understudy_alerts::approval::Answer;
use understudy_crm::check::{self, Finding, Severity};
use understudy_crm::compile::compile;
use understudy_crm::explain::explain;
use understudy_crm::merge::{Change, canonical, merge};
use understudy_crm::model::Configuration;
use understudy_crm::plan::{self, Fault, What};
use understudy_crm::policy::Policy;
use understudy_crm::simulate::{Scheduler, settled};
use understudy_crm::svg::picture;
use understudy_crm::xml::Element;
use understudy_crm::{approvals, cib, crm, import, live, pcs, planes, watch};
use understudy_monitor::matrix::Matrix;
use understudy_protocol::key::DEFAULT_KEY_FILE;

/// From a policy file to a Pacemaker configuration.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say what is wrong with a policy, what will be regretted, and what is not acted on yet. Exit status 1 if it cannot be used.
    Check {
        /// The policy.
        file: PathBuf,
        /// Print the findings as JSON.
        #[arg(long)]
        json: bool,
        /// Corosync's configuration, to look at its links too [default: /etc/corosync/corosync.conf, if there is one].
        #[arg(long, value_name = "FILE")]
        corosync: Option<PathBuf>,
    },
    /// Print the JSON schema of the policy file.
    Schema,
    /// Say what would become of the machines if nodes died, by Pacemaker's own scheduler. Nothing is changed. Exit status 1 if
    /// some could not be placed.
    Plan {
        /// The policy.
        file: PathBuf,
        /// What dies: nodes and racks, e.g. n1 or rack:r2 or n1,n2,n3. May be given several times; without it every node
        /// and every rack is tried alone.
        #[arg(long = "fail", value_name = "NODES")]
        faults: Vec<String>,
        /// In this cluster, as `cibadmin --query` prints it ("live" asks the cluster on this node). Without it, in a cluster
        /// that looks as the policy says and where every machine is at its home.
        #[arg(long, value_name = "FILE")]
        cib: Option<PathBuf>,
        /// Print the plans as JSON.
        #[arg(long)]
        json: bool,
        /// Draw the plan (of the only, or the first, fault) into this file.
        #[arg(long, value_name = "FILE")]
        svg: Option<PathBuf>,
    },
    /// Say why a machine is where it is, and in which order it would go elsewhere.
    Explain {
        /// The policy.
        file: PathBuf,
        /// The machine.
        machine: String,
    },
    /// Print the fault matrix: what follows from what is seen of a machine, its host and both networks.
    Matrix {
        /// With the rows of this policy; without it, the default rows.
        file: Option<PathBuf>,
        /// Print it as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the configuration that a policy becomes.
    #[command(visible_alias = "export")]
    Show {
        /// The policy.
        file: PathBuf,
        /// As what.
        #[arg(long, value_enum, default_value_t = Format::Crm)]
        format: Format,
    },
    /// Read a policy from a cluster and print it. What it cannot say stands as a comment at its head, and is said on standard error: exit status 1
    /// if there is anything.
    Import {
        /// A saved configuration (`cibadmin --query`) in place of the cluster's.
        #[arg(long, value_name = "FILE")]
        cib: Option<PathBuf>,
    },
    /// Say what `apply` would change in the cluster. Exit status 1 if anything.
    Diff {
        /// The policy.
        file: PathBuf,
        /// A saved configuration (`cibadmin --query`) in place of the cluster's.
        #[arg(long, value_name = "FILE")]
        cib: Option<PathBuf>,
    },
    /// List the questions of semi-automatic evacuation, and what was decided.
    Approvals {
        /// Show the code with which this console may answer (reads the cluster's key).
        #[arg(long)]
        code: bool,
        /// The cluster's key.
        #[arg(long, value_name = "FILE", default_value = DEFAULT_KEY_FILE)]
        key: PathBuf,
        /// Print them as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say yes to a question: what it asks for is done. Exit status 2 and a sentence if the answer does not count.
    Approve(Answering),
    /// Say no to a question: nothing is done.
    Refuse(Answering),
    /// Watch evacuations: what the controller has done, and what it does from now on. From any node.
    Watch {
        /// Print events as JSON, one a line.
        #[arg(long)]
        json: bool,
        /// Print what the cluster keeps (the newest events) and end.
        #[arg(long, conflicts_with = "journal")]
        once: bool,
        /// Print this file, a node's journal (/var/log/understudy/evacuation.journal), and end.
        #[arg(long, value_name = "FILE")]
        journal: Option<PathBuf>,
    },
    /// Put the configuration into the cluster. Touches only what it owns; safe to repeat.
    Apply {
        /// The policy.
        file: PathBuf,
    },
}

#[derive(Args)]
struct Answering {
    /// The question.
    id: String,
    /// The code from the message, or from `approvals --code`.
    code: String,
    /// Who answers, for the record [default: the user that called sudo, or this one].
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
    /// The cluster's key.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_KEY_FILE)]
    key: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A whole CIB (XML), for crm_verify and crm_simulate.
    Cib,
    /// crmsh, for `crm configure load update FILE`.
    Crm,
    /// The nodes' attributes for `crm -f FILE`, to be loaded before what `crm` prints.
    CrmNodes,
    /// pcs commands, for an empty cluster.
    Pcs,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("understudy-crm: {why:#}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Check { file, json, corosync } => {
            let (policy, mut findings) = check::read(&text(file)?);
            if let Some(policy) = &policy {
                findings.extend(planes::check(
                    policy,
                    planes::corosync_conf(corosync.as_deref()).map_err(Error::msg)?.as_deref(),
                ));
            }
            if *json {
                println!("{}", serde_json::to_string_pretty(&findings)?);
            } else {
                report(file, &findings);
                if policy.is_some() {
                    println!("{}: can be applied", file.display());
                }
            }
            Ok(if policy.is_some() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Show { file, format } => {
            let (policy, configuration) = configuration(file)?;
            match format {
                Format::Cib => println!("{}", cib::document(&policy, &configuration)),
                Format::Crm if !configuration.nodes.is_empty() => {
                    eprintln!(
                        "understudy-crm: first load the nodes' attributes: --format crm-nodes > FILE; crm -f FILE"
                    );
                    print!("{}", crm::text(&configuration));
                }
                Format::Crm => print!("{}", crm::text(&configuration)),
                Format::CrmNodes => print!("{}", crm::nodes(&configuration)),
                Format::Pcs => print!("{}", pcs::script(&configuration)),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Schema => {
            println!("{}", serde_json::to_string_pretty(&Policy::schema())?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Matrix { file, json } => {
            let matrix = match file {
                Some(file) => {
                    let (policy, _) = configuration(file)?;
                    let rows: Vec<_> = policy.matrix.iter().map(|row| row.get_ref().clone()).collect();
                    Matrix::with(&rows)?.0
                }
                None => Matrix::standard()?,
            };
            if *json {
                println!("{}", serde_json::to_string_pretty(&matrix.list())?);
            } else {
                print!("{}", matrix.table());
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Plan { file, faults, cib, json, svg } => plans(file, faults, cib.as_deref(), *json, svg.as_deref()),
        Command::Explain { file, machine } => {
            let (policy, _) = configuration(file)?;
            match explain(&policy, machine) {
                Some(text) => print!("{text}"),
                None => bail!("there is no machine {machine} in {}", file.display()),
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Import { cib } => {
            let current = match cib {
                Some(file) => saved(file)?,
                None => live::query()?,
            };
            live::ensure_cib(&current)?;
            let imported = import::import(&current);
            imported.warnings.iter().for_each(|warning| eprintln!("understudy-crm: {warning}"));
            print!("{}", imported.text);
            Ok(if imported.warnings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Diff { file, cib } => {
            let (_, configuration) = configuration(file)?;
            let current = match cib {
                Some(file) => saved(file)?,
                None => live::query()?,
            };
            live::ensure_cib(&current)?;
            let (_, changes) = merge(&current, &configuration);
            changes.iter().for_each(print_change);
            Ok(if changes.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
        }
        Command::Approvals { code, key, json } => {
            print!("{}", approvals::list(code.then_some(key.as_path()), *json)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Approve(answering) => answer(Answer::Approve, answering),
        Command::Refuse(answering) => answer(Answer::Refuse, answering),
        Command::Watch { json, once, journal } => {
            match journal {
                Some(file) => watch::file(&text_of(file)?, *json),
                None => watch::cluster(*json, *once)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Apply { file } => {
            let (_, configuration) = configuration(file)?;
            let current = live::query()?;
            live::ensure_cib(&current)?;
            let (wanted, changes) = merge(&current, &configuration);
            if changes.is_empty() || !live::apply(&current, &wanted)? {
                println!("nothing to change");
            } else {
                changes.iter().for_each(print_change);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn answer(answer: Answer, Answering { id, code, name, key }: &Answering) -> Result<ExitCode> {
    let name = name.clone().or_else(approvals::who);
    let decision = approvals::answer(answer, id, code, name.as_deref(), key)?;
    println!("question {id} is {} by {}", decision.answer, decision.by);
    Ok(ExitCode::SUCCESS)
}

/// A configuration from a file.
fn saved(file: &Path) -> Result<Element> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("reading the configuration {}", file.display()))?;
    Element::parse(&text).with_context(|| format!("reading {} as cibadmin's output", file.display()))
}

fn plans(file: &Path, faults: &[String], cib: Option<&Path>, json: bool, svg: Option<&Path>) -> Result<ExitCode> {
    let (policy, _) = configuration(file)?;
    let scheduler = Scheduler::default();
    let cib = match cib {
        None => settled(&policy),
        Some(file) if file == Path::new("live") => live::query()?,
        Some(file) => saved(file)?,
    };
    live::ensure_cib(&cib)?;
    let faults = match faults {
        [] => Fault::all(&policy),
        some => some.iter().map(|text| Fault::parse(text, &policy)).collect::<Result<_>>()?,
    };
    let plans = faults.iter().map(|f| plan::plan(&scheduler, &policy, &cib, f)).collect::<Result<Vec<_>>>()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&plans)?);
    } else {
        plans.iter().for_each(|p| print!("{}", plan::table(p)));
    }
    if let (Some(file), Some(first)) = (svg, plans.first()) {
        let before = plan::places(&scheduler, &policy, &cib)?;
        let picture = picture(&policy, &before, first);
        std::fs::write(file, picture).with_context(|| format!("writing {}", file.display()))?;
    }
    let all_placed = plans.iter().flat_map(|p| &p.machines).all(|m| !matches!(m.fate, What::Unplaced | What::Stopped));
    Ok(if all_placed { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn text_of(journal: &Path) -> Result<String> {
    std::fs::read_to_string(journal).with_context(|| format!("reading the journal {}", journal.display()))
}

fn text(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).with_context(|| format!("reading the policy {}", file.display()))
}

fn report(file: &Path, findings: &[Finding]) {
    for finding in findings {
        eprintln!("{}: {finding}", file.display());
    }
}

/// The configuration of a policy without errors; complaints go to standard error.
fn configuration(file: &Path) -> Result<(Policy, Configuration)> {
    let (policy, findings) = check::read(&text(file)?);
    report(file, &findings);
    let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
    match policy {
        Some(policy) => {
            let configuration = compile(&policy);
            Ok((policy, configuration))
        }
        None => bail!("{} has {errors} error{}; nothing was done", file.display(), if errors == 1 { "" } else { "s" }),
    }
}

fn print_change(change: &Change) {
    match change {
        Change::Add(element) => println!("+ {} {}", element.name, element.id()),
        Change::Remove(element) => println!("- {} {}", element.name, element.id()),
        Change::Modify(before, after) => {
            println!("~ {} {}", after.name, after.id());
            let (old, new) = (details(before), details(after));
            old.iter().filter(|line| !new.contains(line)).for_each(|line| println!("    - {line}"));
            new.iter().filter(|line| !old.contains(line)).for_each(|line| println!("    + {line}"));
        }
    }
}

/// What stands in an object, one line a fact.
fn details(element: &Element) -> Vec<String> {
    if element.name == "nvpair" {
        let part = |name| element.attribute(name).unwrap_or_default();
        return vec![format!("{} = {}", part("name"), part("value"))];
    }
    let mut lines: Vec<String> = element
        .attributes
        .iter()
        .filter(|(name, _)| name != "id")
        .map(|(name, value)| format!("{} {name} = {value}", element.name))
        .collect();
    for child in &element.children {
        if child.name == "op" || child.name == "rule" {
            lines.push(canonical(child, false));
        } else {
            lines.extend(details(child));
        }
    }
    lines
}
